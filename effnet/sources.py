"""Where do the samples come from? `open_data` turns what a user typed into `Splits`.

| typed | read as |
| --- | --- |
| a folder with `train/`, and perhaps `val/` and `test/` | `root/{train,val,test}/class/**/*.jpg` |
| a folder of class folders | `root/class/**/*.jpg`, cut 70/15/15 by class with a seed |
| `file.csv` | a manifest: columns `path`, `label`, and perhaps `split`, `weight`, `group`; paths relative to it |
| `*.tar`, or a folder of them | webdataset shards (`shards.py`) |
| `elpv`, `elpv-modules`, `fashion-mnist[:DIR]`, `package:MODULE/sub/dir` | named sets (`named.py`) |

The training part fixes the class list: sorted folder names or labels. Every class folder keeps its index, an empty one
too. Files are listed, not decoded, and listed sorted, so the same folder gives the same `Splits` on every machine.
"""

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from effnet.images import image_files
from effnet.named import FASHION, elpv, elpv_modules, fashion_mnist, package
from effnet.samples import SPLIT_NAMES, FilePixels, Splits, check_known, class_list, labelled, split_named, splits_of
from effnet.shards import folder_pattern, has_shards, open_shards
from effnet.value import UsageError, check_choice, check_range, nearest

NAMED_SETS = ("elpv", "elpv-modules", "fashion-mnist", "package")
REQUIRED, OPTIONAL = ("path", "label"), ("split", "weight", "group")


def open_data(
    spec: str | Path, *, split_seed: int = 0, val_fraction: float = 0.15, classes: Sequence[str] | None = None
) -> Splits:
    """The data set that `spec` names (see the table above).

    `val_fraction`: the share of the training part that becomes validation where no validation part is given. `classes`:
    the list stored in a checkpoint; it is enforced, and its order is kept. `UsageError` for anything missing, empty,
    unreadable or of another class list.
    """
    check_range("split_seed", split_seed, 0, 2**32 - 1)
    options: dict[str, Any] = {"split_seed": split_seed, "val_fraction": val_fraction, "classes": classes}
    head, _, rest = str(spec).partition(":")
    if head == "fashion-mnist":
        return fashion_mnist(Path(rest).expanduser() if rest else FASHION, **options)
    if head == "package":
        return package(rest, **options)
    named: dict[str, Callable[..., Splits]] = {"elpv": elpv, "elpv-modules": elpv_modules}
    if str(spec) in named:
        return named[str(spec)](**options)
    return _open_path(Path(spec).expanduser(), options)


def _open_path(path: Path, options: dict[str, Any]) -> Splits:
    if path.suffix == ".tar":
        return open_shards(str(path), **options)
    if path.suffix == ".csv" and path.is_file():
        return open_manifest(path, **options)
    if path.is_dir():
        return open_shards(folder_pattern(path), **options) if has_shards(path) else open_folder(path, **options)
    if path.exists():
        raise UsageError(
            f"{path} is a file; data is a folder, a .csv manifest, .tar shards or {', '.join(NAMED_SETS)}."
        )
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UsageError(
        f"there is no data at {path}, and no named set of that name ({', '.join(NAMED_SETS)})."
        f"{nearest(path.name, [*NAMED_SETS, *beside])}"
    )


# -- folders ----------------------------------------------------------------------------------------------------------


def open_folder(root: Path, *, split_seed: int, val_fraction: float, classes: Sequence[str] | None) -> Splits:
    """`root/{train,val,test}/class/*`, or `root/class/*`."""
    folders = _folders(root)
    parts = _part_folders(root, folders)
    if parts and "train" not in parts:
        raise UsageError(
            f"{root} has {', '.join(filter(None, parts))} but no train folder, which fixes the class list. "
            f"To evaluate on one folder of classes, name that folder."
        )
    homes = parts or {None: root}
    _refuse_empty(root, folders)
    training = homes["train" if parts else None]
    known = class_list((folder.name for folder in _folders(training)), classes, str(training))
    number = {name: index for index, name in enumerate(known)}
    files: list[tuple[str | None, int, Path]] = []
    for part, home in homes.items():
        check_known((folder.name for folder in _folders(home)), known, str(home))
        found = [(part, number[folder.name], path) for folder in _folders(home) for path in image_files(folder)]
        if not found:
            raise UsageError(f"{home} holds no images; expected {home}/<class>/<images>.")
        files += found
    everything = labelled(
        root.name,
        FilePixels(paths=tuple(path for _, _, path in files)),
        [path.relative_to(root).as_posix() for _, _, path in files],
        [label for _, label, _ in files],
        known,
    )
    splits = splits_of(
        everything, [part for part, _, _ in files], name=str(root), split_seed=split_seed, val_fraction=val_fraction
    )
    loose = sum(len([path for path in image_files(home) if path.parent == home]) for home in homes.values())
    note = f"{splits.note} {loose} images outside class folders are left out." if loose else splits.note
    return replace(splits, note=note.strip())


def _folders(root: Path) -> list[Path]:
    """The class folders of `root`, sorted by name; hidden ones and what archivers leave behind do not count."""
    folders = (path for path in root.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "__MACOSX")
    return sorted(folders, key=lambda path: path.name)


def _part_folders(root: Path, folders: Sequence[Path]) -> dict[str | None, Path]:
    """The folders that name parts of the data set. `UsageError` for two names of one part, and for a near miss."""
    parts: dict[str | None, Path] = {}
    for folder in folders:
        part = split_named(folder.name)
        if part in parts:
            raise UsageError(f"{root} has two folders for the {part} part: {parts[part].name} and {folder.name}.")
        if part:
            parts[part] = folder
    for folder in folders if parts else ():
        hint = "" if split_named(folder.name) else nearest(folder.name, SPLIT_NAMES)
        if hint and image_files(folder):
            raise UsageError(f"{root} has parts ({', '.join(filter(None, parts))}) and a folder {folder.name!r}.{hint}")
    return parts


def _refuse_empty(root: Path, folders: Sequence[Path]) -> None:
    if folders:
        return
    loose = len(image_files(root))
    what = f"holds {loose} images but no class folders" if loose else "is an empty folder"
    raise UsageError(f"{root} {what}; expected {root}/<class>/<images> or {root}/train/<class>/<images>.")


# -- CSV manifests ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checked line of a manifest."""

    line: int
    path: Path
    given: str
    label: str
    split: str | None
    weight: float
    group: str | None


def open_manifest(path: Path, *, split_seed: int, val_fraction: float, classes: Sequence[str] | None) -> Splits:
    """A CSV file of samples; `UsageError` names the line of the first one that is wrong."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(_manifest_rows(path, file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is not a CSV file in UTF-8: {error}") from None
    if not rows:
        raise UsageError(f"{path} has no rows under its header.")
    _refuse_repeats(path, rows)
    known = class_list({row.label for row in rows if row.split in (None, "train")}, classes, str(path))
    for row in rows:
        if row.label not in known:
            raise UsageError(
                f"{path}, line {row.line}: the label {row.label!r} is not a class of the training rows."
                f"{nearest(row.label, known)}"
            )
    number = {name: index for index, name in enumerate(known)}
    everything = replace(
        labelled(
            path.stem,
            FilePixels(paths=tuple(row.path for row in rows)),
            [row.given for row in rows],
            [number[row.label] for row in rows],
            known,
        ),
        weights=np.array([row.weight for row in rows], dtype=np.float32),
        groups=tuple(row.group or "" for row in rows) if rows[0].group is not None else None,
    )
    return splits_of(
        everything, [row.split for row in rows], name=str(path), split_seed=split_seed, val_fraction=val_fraction
    )


def _manifest_rows(manifest: Path, file: TextIO) -> Iterator[Row]:
    reader = csv.DictReader(file, restkey="", strict=True)
    columns = [name.strip() for name in reader.fieldnames or ()]
    for name in columns:
        check_choice(f"{manifest}, line 1: column", name, (*REQUIRED, *OPTIONAL))
    if missing := [name for name in REQUIRED if name not in columns]:
        raise UsageError(f"{manifest}, line 1: no column {missing[0]!r}; the header is {','.join(columns)!r}.")
    reader.fieldnames = columns
    for cells in reader:
        try:
            yield _checked_row(manifest, reader.line_num, cells)
        except UsageError as error:
            raise UsageError(f"{manifest}, line {reader.line_num}: {error}") from None


def _checked_row(manifest: Path, line: int, cells: dict[str, Any]) -> Row:
    if "" in cells or None in cells.values():
        raise UsageError("the number of cells differs from the header's.")
    cells = {name: value.strip() for name, value in cells.items()}
    if empty := [name for name in REQUIRED if not cells[name]]:
        raise UsageError(f"the {empty[0]} is empty.")
    path = manifest.parent / cells["path"]
    if not path.is_file():
        raise UsageError(f"there is no file {path}.")
    split = split_named(cells["split"]) if "split" in cells else None
    if "split" in cells and split is None:
        check_choice("the split", cells["split"], SPLIT_NAMES)
    return Row(
        line=line,
        path=path,
        given=cells["path"],
        label=cells["label"],
        split=split,
        weight=_weight(cells["weight"]) if "weight" in cells else 1.0,
        group=cells.get("group"),
    )


def _weight(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"the weight {word!r} is not a number of 0 or more.")
    return value


def _refuse_repeats(manifest: Path, rows: Sequence[Row]) -> None:
    """The same file twice in one part counts twice; in two parts it is a leak, which `doctor` reports."""
    seen: dict[tuple[str | None, str], int] = {}
    for row in rows:
        first = seen.setdefault((row.split, row.given), row.line)
        if first != row.line:
            raise UsageError(f"{manifest}, line {row.line}: {row.given} was already on line {first}.")

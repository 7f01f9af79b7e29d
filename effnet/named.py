"""Which data sets have a name? ELPV (two protocols), Fashion-MNIST, and the images inside any installed package.

Nothing here uses the network: the files come from packages that are already installed, found without importing them.

ELPV (solar cells, Deitsch et al. 2019) has no published split. `elpv` rebuilds the sizes, the stratification and the
weighted metric that the paper's printed accuracies imply; `elpv-modules` holds out the last modules, because
neighbouring cells of one module look alike and every random split, the paper's too, lets a model recognise modules. The
labels follow the paper's rating table: y = [p > 0], weight 1 for p = 0 and p otherwise, soft target (1 - p, p).

Fashion-MNIST (Xiao et al. 2017): four idx files as the Debian package `dataset-fashion-mnist` installs them.
"""

import gzip
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from effnet.images import image_files
from effnet.samples import (
    UNLABELLED,
    ArrayPixels,
    FilePixels,
    Source,
    Splits,
    class_list,
    cut_flat,
    cut_validation,
    deal,
    labelled,
)
from effnet.value import UsageError, check_range

ELPV_CLASSES = ("functional", "defective")
ELPV_LICENCE = (
    "ELPV images: CC BY-NC-SA 4.0 (non-commercial, share-alike), read from the installed package elpv-dataset, never "
    "copied; do not ship weights fine-tuned on them under a permissive licence. Cite Buerhop-Lutz et al., EU PVSEC "
    "2018 (10.4229/35thEUPVSEC20182018-5CV.3.15); Deitsch et al., Solar Energy 185 (2019) 455-468 "
    "(10.1016/j.solener.2019.02.067); Deitsch et al., Machine Vision and Applications 32(4) (2021) "
    "(10.1007/s00138-021-01191-9)."
)
ELPV_RANDOM = (
    "Same data, same split sizes and metric as reconstructed from the paper; the paper's split is unpublished and it "
    "is a single run. The paper names no validation set: here {share:.0%} of the cells outside the test set, cut by "
    "the same strata. Every random split of these cells, the paper's too, lets a model recognise modules; see "
    "elpv-modules."
)
ELPV_MODULES = (
    "Train on cells 1-2144, test on cells 2145-2624, which are other modules. Validation: {count} cells of the "
    "training part, as whole stretches of about 60 neighbouring cells (about one module each; module ids are not "
    "published, so an edge may fall inside a module), because cells cut singly would leave look-alike neighbours in "
    "training."
)
ELPV_TEST = {"mono": (147, 29, 14, 78), "poly": (230, 45, 13, 100)}  # cells by p = 0, 1/3, 2/3, 1; 656 in all
ELPV_LAST_TRAINING_CELL = 2144
ELPV_MODULE_CELLS = 60  # inferred: 2,624 cells of 44 modules

FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_COUNT, FASHION_MEAN, FASHION_STD = 60_000, 0.2860, 0.3530  # of the published training part, 0..1 scale
IDX_MAGIC = {1: 0x801, 3: 0x803}  # unsigned bytes, by number of dimensions


def installed(module: str, install: str) -> Path:
    """The folder of an installed package, found without importing it. `UsageError` says what to install."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise UsageError(f"the package {module!r} is not installed: pip install {install}")
    return Path(next(iter(found.submodule_search_locations)))


# -- ELPV -------------------------------------------------------------------------------------------------------------


def elpv(*, split_seed: int, val_fraction: float, classes: Sequence[str] | None) -> Splits:
    """The paper-comparable protocol: 656 test cells stratified on type x probability, seed `split_seed`."""
    check_range("val_fraction", val_fraction, 0, 0.5)
    cells, probabilities = _elpv_cells(classes)
    strata, sizes = [], []
    for kind, test_counts in ELPV_TEST.items():
        of_kind = np.array(cells.groups) == kind
        for thirds, test in enumerate(test_counts):
            rows = np.flatnonzero(of_kind & (np.rint(3 * probabilities) == thirds))
            strata.append(rows)
            sizes.append((test, round((len(rows) - test) * val_fraction)))
    test, val, train = deal(strata, sizes, split_seed)
    return _elpv_splits("elpv", cells, train, val, test, ELPV_RANDOM.format(share=val_fraction))


def elpv_modules(*, split_seed: int, val_fraction: float, classes: Sequence[str] | None) -> Splits:
    """The module-wise protocol: cells 1-2144 against 2145-2624; validation is whole stretches of the former."""
    check_range("val_fraction", val_fraction, 0, 0.5)
    cells, _ = _elpv_cells(classes)
    groups = np.array(cells.groups)
    random = np.random.RandomState(split_seed)
    val = [np.empty(0, dtype=np.int64)]
    for kind in ELPV_TEST:
        stretches = [rows for rows in _stretches(groups[:ELPV_LAST_TRAINING_CELL]) if groups[rows[0]] == kind]
        wanted = round(len(stretches) * val_fraction)
        val += [stretches[i] for i in random.permutation(len(stretches))[:wanted]]
    held = np.sort(np.concatenate(val))
    train = np.setdiff1d(np.arange(ELPV_LAST_TRAINING_CELL), held)
    test = np.arange(ELPV_LAST_TRAINING_CELL, len(cells))
    return _elpv_splits("elpv-modules", cells, train, held, test, ELPV_MODULES.format(count=len(held)))


def _stretches(groups: np.ndarray) -> list[np.ndarray]:
    """Runs of one type of cell, each cut into equal stretches of about one module."""
    edges = np.flatnonzero(groups[1:] != groups[:-1]) + 1
    runs = np.split(np.arange(len(groups)), edges)
    return [part for run in runs for part in np.array_split(run, max(1, round(len(run) / ELPV_MODULE_CELLS)))]


def _elpv_cells(classes: Sequence[str] | None) -> tuple[Source, np.ndarray]:
    """All 2,624 cells in file order, and the defect probability of each."""
    folder = installed("elpv_dataset", "effnet[demo]") / "data"
    lines = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    paths, words, kinds = zip(*lines, strict=True)
    p = np.array(words, dtype=np.float64)
    everything = labelled(
        "elpv", FilePixels(paths=tuple(folder / path for path in paths)), paths, (p > 0).astype(int), ELPV_CLASSES
    )
    weights, soft = np.where(p == 0, 1, p).astype(np.float32), np.stack([1 - p, p], axis=1).astype(np.float32)
    cells = replace(everything, weights=weights, soft=soft, groups=kinds)
    return in_class_order(cells, classes), p


def _elpv_splits(
    name: str, cells: Source, train: np.ndarray, val: np.ndarray, test: np.ndarray, protocol: str
) -> Splits:
    return Splits(
        train=cells.subset(train, "train"),
        val=cells.subset(val, "val") if len(val) else None,
        test=cells.subset(test, "test"),
        classes=cells.classes,
        name=name,
        note=f"{protocol} {ELPV_LICENCE}",
        upright=False,
    )


def in_class_order(source: Source, classes: Sequence[str] | None) -> Source:
    """`source` with its labels and soft targets renumbered to a checkpoint's class order (same names, or refused)."""
    if classes is None:
        return source
    wanted = class_list(source.classes, classes, source.name)
    position = np.array([wanted.index(name) for name in source.classes])
    soft = None if source.soft is None else source.soft[:, np.argsort(position)]
    return replace(source, classes=wanted, labels=position[source.labels], soft=soft)


# -- Fashion-MNIST ----------------------------------------------------------------------------------------------------


def fashion_mnist(folder: Path, *, split_seed: int, val_fraction: float, classes: Sequence[str] | None) -> Splits:
    """Four idx files (gzipped or not) in `folder`; validation is cut from the 60,000 training images by class."""
    if not folder.is_dir():
        raise UsageError(
            f"Fashion-MNIST is not in {folder}: apt-get install dataset-fashion-mnist, or name it, fashion-mnist:DIR."
        )
    images, labels = zip(*(_idx_pair(folder, prefix) for prefix in ("train", "t10k")), strict=True)
    _check_fashion(images[0], folder)
    pixels = ArrayPixels(array=np.concatenate(images))
    n = len(images[0])
    ids = [f"train/{i:05d}" for i in range(n)] + [f"test/{i:05d}" for i in range(len(images[1]))]
    everything = labelled("fashion-mnist", pixels, ids, np.concatenate(labels), FASHION_CLASSES)
    everything = in_class_order(everything, classes)
    train, val = cut_validation(everything.subset(range(n), "train"), val_fraction, split_seed)
    note = (
        "Fashion-MNIST (Zalando SE, Expat licence; Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747). Validation: "
        f"{val_fraction:.0%} of the training part, stratified by class, seed {split_seed}."
    )
    if n != FASHION_COUNT:
        note += f" Not the published files: {n} training images instead of {FASHION_COUNT}."
    return Splits(
        train=train,
        val=val,
        test=everything.subset(range(n, len(everything)), "test"),
        classes=everything.classes,
        name="fashion-mnist",
        note=note,
    )


def _idx_pair(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 (N, 28, 28) images, int64 (N,) labels) of `train` or `t10k`, checked against each other."""
    images = read_idx(_idx_file(folder, f"{prefix}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(_idx_file(folder, f"{prefix}-labels-idx1-ubyte"), dimensions=1)
    if len(images) != len(labels) or images.shape[1:] != (28, 28):
        raise UsageError(f"{folder}: {prefix} has images {images.shape} and labels {labels.shape}.")
    if labels.max(initial=0) >= len(FASHION_CLASSES):
        raise UsageError(f"{folder}: {prefix} has label {labels.max()}; Fashion-MNIST has 0 to 9.")
    return images, labels.astype(np.int64)


def _idx_file(folder: Path, stem: str) -> Path:
    for path in (folder / f"{stem}.gz", folder / stem):
        if path.is_file():
            return path
    raise UsageError(f"{folder} has no {stem}.gz; Fashion-MNIST is four idx files.")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """A uint8 array from an idx file: magic, one big-endian uint32 per dimension, raw bytes."""
    opener: Callable = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    header = 4 * (1 + dimensions)
    magic, *shape = np.frombuffer(data[:header], dtype=">u4").tolist() if len(data) >= header else (0,)
    if magic != IDX_MAGIC[dimensions]:
        raise UsageError(f"{path} is not an idx file of {dimensions} dimensions: magic {magic:#x}.")
    if len(data) - header != np.prod(shape):
        raise UsageError(f"{path} is torn: {len(data) - header} bytes for the shape {shape}.")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def _check_fashion(images: np.ndarray, folder: Path) -> None:
    """Mean and deviation tell Fashion-MNIST from MNIST, which has the same file names and shapes."""
    if len(images) != FASHION_COUNT:
        return
    mean, std = images.mean() / 255, images.std() / 255
    if abs(mean - FASHION_MEAN) > 5e-4 or abs(std - FASHION_STD) > 5e-4:
        raise UsageError(
            f"{folder} holds another data set: training mean {mean:.4f} and deviation {std:.4f}; "
            f"Fashion-MNIST has {FASHION_MEAN:.4f} and {FASHION_STD:.4f}."
        )


# -- images inside an installed package -------------------------------------------------------------------------------


def package(where: str, *, split_seed: int, val_fraction: float, classes: Sequence[str] | None) -> Splits:
    """`MODULE/sub/dir`: classes are the sub-folders that hold images; without any, the images are unlabelled.

    Unlabelled pictures are all in `train`, with no classes: `doctor` and `predict` take them, training refuses them.
    """
    module, _, inside = where.partition("/")
    folder = installed(module, module) / inside
    files = image_files(folder) if folder.is_dir() else []
    if not files:
        raise UsageError(f"package:{where}: no images in {inside or '.'} of the installed package {module!r}.")
    name, ids = f"package:{where}", [path.relative_to(folder).as_posix() for path in files]
    words = [identity.split("/")[0] if "/" in identity else "" for identity in ids]
    note = f"Images inside the installed package {module!r}, under its licence."
    pixels = FilePixels(paths=tuple(files))
    if not all(words) or len(set(words)) < 2:
        if classes is not None:
            raise UsageError(f"{name} has no class folders; it cannot be compared with {len(classes)} classes.")
        everything = labelled("train", pixels, ids, [UNLABELLED] * len(ids), ())
        return Splits(train=everything, val=None, test=None, classes=(), name=name, note=f"{note} Unlabelled.")
    known = class_list(set(words), classes, name)
    everything = labelled(name, pixels, ids, [known.index(word) for word in words], known)
    train, val, test = cut_flat(everything, val_fraction, split_seed)
    return Splits(train=train, val=val, test=test, classes=known, name=name, note=note)

"""How do tar shards become samples that can be read in any order?

webdataset streams shards; our sampler is a pure function of (seed, epoch, step) and needs sample number i. So the
headers of every shard are read once (seeking past the data), webdataset's own `group_by_keys` groups the members into
samples by its naming rules, and what it groups are places (shard, offset, size) instead of bytes. An image is then one
seek and one read.

A sample is `key.jpg` beside `key.cls` (a class name or number) or `key.json` (field `label`, `class` or `cls`). Numbers
are named by `classes.txt` beside the shards, one name a line, or else by themselves. The parts of the data set are told
by the shard's name (`train-0000.tar`) or its folder (`val/0000.tar`). webdataset is the extra `[data]`.
"""

import glob
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from effnet.images import EXTENSIONS, ImageError, Picture, decode, opened
from effnet.samples import Pixels, Splits, class_list, labelled, split_named, splits_of
from effnet.value import UsageError

LABEL_FIELDS = ("label", "class", "cls")


class Place(NamedTuple):
    """Where a member's bytes are: an uncompressed tar file, and the range in it."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise ImageError(str(self.shard), f"cut short: {len(data)} of {self.size} bytes at {self.offset}")
        return data


class Labelled(NamedTuple):
    """One sample of a shard, its label still the word or number it was stored as."""

    key: str
    image: Place
    label: str


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ShardPixels(Pixels):
    """One member of a tar shard per row."""

    places: tuple[Place, ...]
    names: tuple[str, ...]

    def image(self, row: int) -> np.ndarray:
        return decode(self.places[row].read(), name=self._name(row))

    def picture(self, row: int) -> Picture:
        return opened(self.places[row].read(), name=self._name(row))

    def _name(self, row: int) -> str:
        return f"{self.places[row].shard}, sample {self.names[row]}"

    def encoded(self, row: int) -> bytes:
        return self.places[row].read()

    def size_bytes(self, row: int) -> int:
        return self.places[row].size


def open_shards(pattern: str, *, split_seed: int, val_fraction: float, classes: Sequence[str] | None) -> Splits:
    """The data set in the shards of `pattern`: a path, a glob, or braces as in `train-{000..009}.tar`."""
    shards = shard_paths(pattern)
    samples = [(split_of(shard), sample) for shard in shards for sample in read_index(shard)]
    words = _named([sample.label for _, sample in samples], shards[0].parent / "classes.txt")
    parts = [part for part, _ in samples]
    if (None in parts) and any(parts):
        raise UsageError(f"{pattern}: some shards are named train, val or test and others are not; name all or none.")
    training = {word for word, part in zip(words, parts, strict=True) if part in (None, "train")}
    known = class_list(training, classes, pattern)
    if classes is None and all(word.isdigit() for word in known):
        known = tuple(sorted(known, key=int))
    for word, (_, sample) in zip(words, samples, strict=True):
        if word not in training:
            raise UsageError(
                f"{sample.image.shard}, sample {sample.key}: {word!r} is not a class of the training part."
            )
    pixels = ShardPixels(places=tuple(s.image for _, s in samples), names=tuple(s.key for _, s in samples))
    number = {word: index for index, word in enumerate(known)}
    ids = [f"{sample.image.shard.name}/{sample.key}" for _, sample in samples]
    everything = labelled(pattern, pixels, ids, [number[word] for word in words], known)
    return splits_of(everything, parts, name=pattern, split_seed=split_seed, val_fraction=val_fraction)


def shard_paths(pattern: str) -> list[Path]:
    """The tar files of a path, glob or brace pattern, sorted. `UsageError` when there is none, or one is compressed."""
    expanded = _webdataset().shardlists.braceexpand.braceexpand(str(Path(pattern).expanduser()))
    paths = sorted({Path(match) for one in expanded for match in (glob.glob(one) or [one])})
    for path in paths:
        if not path.is_file():
            raise UsageError(f"no tar shard matches {path}.")
        if path.suffix != ".tar":
            raise UsageError(f"{path}: shards are uncompressed .tar files, so that any image can be read first.")
    return paths


def split_of(shard: Path) -> str | None:
    """`train`, `val` or `test` by the first word of the shard's name, or by its folder; None when neither says."""
    first_word = shard.stem.replace("_", "-").split("-")[0]
    return split_named(first_word) or split_named(shard.parent.name)


def read_index(shard: Path) -> Iterator[Labelled]:
    """The labelled samples of one shard, in file order; only headers and labels are read."""
    grouped = _webdataset().tariterators.group_by_keys(_members(shard))
    try:
        for sample in grouped:
            key = sample["__key__"]
            images = [field for field in sample if f".{field.split('.')[-1]}" in EXTENSIONS]
            if not images:
                raise UsageError(
                    f"{shard}, sample {key}: no image among {', '.join(f for f in sample if f[0] != '_')}."
                )
            yield Labelled(key, sample[images[0]], _label(sample, f"{shard}, sample {key}"))
    except UsageError:
        raise
    except (tarfile.TarError, ValueError) as error:  # ValueError: webdataset met one name twice
        raise UsageError(f"{shard} is not a tar file that can be read: {error.args[0]}") from None


def image_members(shard: Path) -> Iterator[tuple[str, Place]]:
    """Name and place of every image in a shard, labelled or not, in file order; needs no webdataset.

    Raises `tarfile.TarError` or `OSError` where the shard is damaged, after the members before it. Of the members that
    were passed nothing is kept in memory.
    """
    with tarfile.open(shard, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # ty: ignore[missing-attribute]
            name = Path(member.name).name
            if member.isreg() and not name.startswith((".", "__")) and Path(name).suffix.lower() in EXTENSIONS:
                yield member.name, Place(shard, member.offset_data, member.size)
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a broken header for the end
            raise tarfile.ReadError("a header in the middle is broken")


def _members(shard: Path) -> Iterator[dict[str, Any]]:
    """The members of a tar file in the shape `group_by_keys` takes, with a `Place` where it has bytes."""
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            if member.isreg() and not member.name.startswith("__"):
                place = Place(shard, member.offset_data, member.size)
                yield {"fname": member.name, "data": place, "__url__": str(shard)}


def _label(sample: dict[str, Any], where: str) -> str:
    """The label of one sample, as a word."""
    if "cls" in sample:
        word = sample["cls"].read().decode("utf-8", "replace").strip()
    elif "json" in sample:
        word = _label_of_json(sample["json"].read(), where)
    else:
        raise UsageError(f"{where}: no label; a .cls or .json member is needed beside the image.")
    if not word:
        raise UsageError(f"{where}: the label is empty.")
    return word


def _label_of_json(data: bytes, where: str) -> str:
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise UsageError(f"{where}: the .json member cannot be read: {error}") from None
    for field in LABEL_FIELDS:
        if isinstance(fields, dict) and isinstance(fields.get(field), str | int):
            return str(fields[field])
    raise UsageError(f"{where}: the .json member has none of the fields {', '.join(LABEL_FIELDS)}.")


def _named(words: Sequence[str], names_file: Path) -> list[str]:
    """Class names for class numbers, when there is a file of names."""
    if not names_file.is_file() or not all(word.isdigit() for word in words):
        return list(words)
    names = [line.strip() for line in names_file.read_text().splitlines() if line.strip()]
    highest = max(map(int, words), default=0)
    if highest >= len(names):
        raise UsageError(f"{names_file} names {len(names)} classes, from 0 on; a sample has number {highest}.")
    return [names[int(word)] for word in words]


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError:
        raise UsageError("tar shards need webdataset, which is not installed: pip install effnet[data]") from None
    return webdataset


def has_shards(folder: Path) -> bool:
    """Whether a folder is a set of shards: tar files in it, or in its train, val and test folders."""
    return any(_shards_in(folder))


def folder_pattern(folder: Path) -> str:
    """The pattern that covers the shards of a folder."""
    return str(folder / ("*.tar" if any(folder.glob("*.tar")) else "*/*.tar"))


def _shards_in(folder: Path) -> Iterable[Path]:
    yield from folder.glob("*.tar")
    yield from (path for path in folder.glob("*/*.tar") if split_named(path.parent.name))

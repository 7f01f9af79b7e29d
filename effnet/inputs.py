"""Which images does the user mean? A stream of them, so that a million need no more memory than a few.

| named | read as |
| --- | --- |
| a file | itself, whatever its name |
| a folder | all images in it, nested ones too, sorted; only the names in the folders that are open are in memory |
| `file.csv` | a manifest: the files in its column `path`, relative to it; other columns are left alone |
| `file.tar`, or a pattern of them | the images in the shards, in file order (`shards.py`) |
| `-` | one path per line of standard input |

What cannot be read (a missing file of a list, a damaged shard, a folder without permission) is an input too: its
`image` raises, and it takes its place in the output. Only what was named on the command line must be there.
"""

import csv
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np

from effnet.images import ImageError, Limits, decode, walk_images
from effnet.shards import Place, image_members, shard_paths
from effnet.value import UsageError, nearest

STDIN = "-"


class Unreadable(NamedTuple):
    """Why there is nothing to read."""

    reason: str


class Input(NamedTuple):
    """One image to look at: its name in the output, and where its bytes are."""

    name: str
    source: Path | Place | Unreadable

    def image(self) -> np.ndarray:
        """The decoded image, uint8 (H, W, 3). `ImageError` whatever is wrong with it."""
        if isinstance(self.source, Path):
            return decode(self.source, name=self.name)
        if isinstance(self.source, Unreadable):
            raise ImageError(self.name, self.source.reason)
        if self.source.size > (most := Limits().max_bytes):
            raise ImageError(self.name, f"{self.source.size / 1e6:.1f} MB; the limit is {most / 1e6:.1f}")
        try:
            content = self.source.read()
        except OSError as error:
            raise ImageError(self.name, f"cannot be read ({error.strerror})") from None
        except ImageError as error:
            raise ImageError(self.name, error.reason) from None
        return decode(content, name=self.name)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The images that `paths` stand for, in order. `UsageError` on construction for what is not there.

    Can be gone through again and again, unless standard input is among them (`stdin`: instead of this process's).
    """

    paths: tuple[str, ...]
    stdin: BinaryIO | None = None

    def __post_init__(self) -> None:
        if not self.paths:
            raise UsageError("no image was named; give files, folders, .csv manifests, .tar shards or -.")
        if self.paths.count(STDIN) > 1:
            raise UsageError("standard input (-) is named twice, but can be read only once.")
        for path in self.paths:
            _check(path)

    def __iter__(self) -> Iterator[Input]:
        for path in self.paths:
            if path == STDIN:
                yield from _listed(self.stdin or sys.stdin.buffer)
            else:
                yield from _named(Path(path))

    def count(self) -> int | None:
        """How many there are; None where only the end of standard input will tell."""
        return None if STDIN in self.paths else sum(1 for _ in self)


def inputs(paths: Iterable[str | Path]) -> Inputs:
    """The images that `paths` stand for."""
    return Inputs(paths=tuple(map(str, paths)))


def batched(stream: Iterable[Input], count: int) -> Iterator[Sequence[Input]]:
    """`count` inputs at a time; fewer in the end."""
    batch: list[Input] = []
    for one in stream:
        batch.append(one)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


def _check(name: str) -> None:
    """`UsageError` for a path that is not there, a folder without images and a manifest without paths."""
    path = Path(name)
    if name == STDIN or (path.is_file() and path.suffix != ".csv"):
        return
    if path.is_file():
        with _opened(path) as lines:
            _reader(path, lines)
    elif path.is_dir():
        if next(walk_images(path), None) is None:
            shards = f" For its shards, name {path}/*.tar." if any(path.glob("*.tar")) else ""
            raise UsageError(f"{path} has no images in it.{shards}")
    elif path.suffix == ".tar":
        shard_paths(name)
    else:
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"{path} does not exist.{nearest(path.name, beside)}")


def _named(path: Path) -> Iterator[Input]:
    if path.is_dir():
        for found, unlisted in walk_images(path):
            yield Input(str(found), Unreadable(unlisted) if unlisted else found)
    elif path.suffix == ".csv":
        yield from _manifest(path)
    elif path.suffix == ".tar":
        for shard in [path] if path.is_file() else shard_paths(str(path)):
            yield from _shard(shard)
    else:
        yield Input(str(path), path)


def _listed(lines: BinaryIO) -> Iterator[Input]:
    for line in lines:
        if name := os.fsdecode(line.rstrip(b"\r\n")):
            yield Input(name, Path(name))


def _manifest(manifest: Path) -> Iterator[Input]:
    with _opened(manifest) as lines:
        reader = _reader(manifest, lines)
        try:
            for cells in reader:
                if given := (cells["path"] or "").strip():
                    path = manifest.parent / given
                    yield Input(str(path), path)
                else:
                    yield Input(f"{manifest}, line {reader.line_num}", Unreadable("the path is empty"))
        except csv.Error as error:
            yield Input(f"{manifest}, line {reader.line_num}", Unreadable(f"the rest is not CSV ({error})"))


def _opened(manifest: Path) -> TextIO:
    return manifest.open(newline="", encoding="utf-8-sig", errors="surrogateescape")


def _reader(manifest: Path, lines: TextIO) -> csv.DictReader:
    """The rows of a manifest. `UsageError` for one without a column `path`."""
    reader = csv.DictReader(lines, strict=True)
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise UsageError(f"{manifest} is not a CSV file: {error}") from None
    if "path" not in columns:
        raise UsageError(f"{manifest}, line 1: no column 'path'; the header is {','.join(columns)!r}.")
    reader.fieldnames = columns
    return reader


def _shard(shard: Path) -> Iterator[Input]:
    try:
        for name, place in image_members(shard):
            yield Input(f"{shard}/{name}", place)
    except (tarfile.TarError, OSError) as error:
        yield Input(str(shard), Unreadable(f"the rest of the shard cannot be read ({error})"))

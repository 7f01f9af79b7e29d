"""What is a sample? A picture with a name, a label and a weight; a `Source` is a fixed list of them.

A `Source` is a value: arrays of labels, weights and soft targets beside a `Pixels`, which knows how to fetch picture
number `row`. Subsets share the `Pixels`, so cutting a validation part copies a few integers and no image. How samples
are found on disk is `sources.py`; how they reach the model is `data.py`.

The two rules that protect a user from silent mistakes live here: the class list is fixed by the training part and
enforced everywhere else (`class_list`, `check_known`), and every random cut is stratified, seeded and a pure function
of its arguments (`deal`).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np

from effnet.images import Picture, decode, opened
from effnet.value import UsageError, check_choice, check_range

SPLITS = ("train", "val", "test")
_ALIASES = {"validation": "val", "valid": "val"}
SPLIT_NAMES = (*SPLITS, *_ALIASES)
UNLABELLED = -1
TEST_FRACTION = 0.15  # of a data set that names no test part


class Pixels(ABC):
    """Pictures by row number. Compared by identity: `Source`s that share one can share a cache of decoded pictures."""

    @abstractmethod
    def image(self, row: int) -> np.ndarray:
        """uint8 (H, W, 3). `ImageError`, naming the file, when it cannot be decoded."""

    @abstractmethod
    def picture(self, row: int) -> Picture | np.ndarray:
        """The same for training: only the header has been read, or the pixels where nothing needs decoding."""

    @abstractmethod
    def encoded(self, row: int) -> Path | bytes | None:
        """The file as it is stored: a path, the bytes of an archive's member, or None when pixels are stored raw."""

    @abstractmethod
    def size_bytes(self, row: int) -> int:
        """Stored size: a cheap part of `Source.fingerprint`."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class FilePixels(Pixels):
    """One image file per row."""

    paths: tuple[Path, ...]

    def image(self, row: int) -> np.ndarray:
        return decode(self.paths[row])

    def picture(self, row: int) -> Picture:
        return opened(self.paths[row])

    def encoded(self, row: int) -> Path:
        return self.paths[row]

    def size_bytes(self, row: int) -> int:
        return self.paths[row].stat().st_size


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayPixels(Pixels):
    """Grey pictures of one size, already in memory: `array` is uint8 (N, H, W)."""

    array: np.ndarray

    def __post_init__(self) -> None:
        if self.array.dtype != np.uint8 or self.array.ndim != 3:
            raise UsageError(f"raw pictures are {self.array.dtype} {self.array.shape}; uint8 (N, H, W) is needed.")

    def image(self, row: int) -> np.ndarray:
        return np.repeat(self.array[row][:, :, None], 3, axis=2)

    def picture(self, row: int) -> np.ndarray:
        return self.image(row)

    def encoded(self, row: int) -> None:
        return None

    def size_bytes(self, row: int) -> int:
        return self.array[row].nbytes


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """N labelled pictures in a fixed order.

    `labels` int64 (N,): an index into `classes`, or -1 when unlabelled (then `classes` is empty). `weights` float32
    (N,), 0 or more: how much a sample counts in losses and weighted metrics. `soft` float32 (N, K) or None: target
    probabilities, rows sum to 1. `groups`: words by which results are reported apart. `rows`: where in `pixels`.
    """

    name: str
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    labels: np.ndarray
    weights: np.ndarray
    pixels: Pixels
    rows: np.ndarray
    soft: np.ndarray | None = None
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        n, k = len(self.ids), len(self.classes)
        lengths = {"labels": len(self.labels), "weights": len(self.weights), "rows": len(self.rows)}
        lengths |= {} if self.groups is None else {"groups": len(self.groups)}
        if any(length != n for length in lengths.values()):
            raise UsageError(f"{self.name}: {n} ids but {lengths}.")
        if len(set(self.classes)) != k:
            raise UsageError(f"{self.name}: the class list names a class twice: {', '.join(self.classes)}.")
        low, high = (0, k - 1) if k else (UNLABELLED, UNLABELLED)
        if n and not (self.labels.min() >= low and self.labels.max() <= high):
            raise UsageError(f"{self.name}: labels {self.labels.min()}..{self.labels.max()} with {k} classes.")
        if n and not (np.isfinite(self.weights).all() and self.weights.min() >= 0):
            raise UsageError(f"{self.name}: sample weights must be finite and not negative.")
        if self.soft is not None and (self.soft.shape != (n, k) or np.abs(self.soft.sum(1) - 1).max(initial=0) > 1e-5):
            raise UsageError(f"{self.name}: soft targets {self.soft.shape} must be ({n}, {k}), rows summing to 1.")

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> np.ndarray:
        """Sample `index` as uint8 (H, W, 3). `ImageError` when it cannot be decoded."""
        return self.pixels.image(int(self.rows[index]))

    def encoded(self, index: int) -> Path | bytes | None:
        """The stored file of sample `index`; None when its pixels are stored raw."""
        return self.pixels.encoded(int(self.rows[index]))

    def subset(self, indices: Iterable[int], name: str | None = None) -> "Source":
        """The samples at `indices`, in that order."""
        at = np.fromiter(indices, dtype=np.int64)
        return replace(
            self,
            name=name or self.name,
            ids=tuple(self.ids[i] for i in at),
            labels=self.labels[at],
            weights=self.weights[at],
            rows=self.rows[at],
            soft=None if self.soft is None else self.soft[at],
            groups=None if self.groups is None else tuple(self.groups[i] for i in at),
        )

    def counts(self) -> np.ndarray:
        """Samples per class, int64 (K,)."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.classes))

    def balance(self) -> np.ndarray:
        """Class weights S / (K n_j), float32 (K,): every class weighs the same in sum; 0 for one without samples."""
        counts = self.counts()
        scale = counts.sum() / max(len(self.classes), 1)
        return np.divide(scale, counts, out=np.zeros(len(counts)), where=counts > 0).astype(np.float32)

    def fingerprint(self) -> str:
        """16 hex digits over names, labels, weights, soft targets and stored sizes: the same data has the same one.

        A run that resumes on other data is told by it. Pixels are not read; `doctor` hashes those.
        """
        digest = hashlib.sha256(repr((self.classes, self.ids, self.groups)).encode())
        digest.update(np.array([self.pixels.size_bytes(int(row)) for row in self.rows], dtype="<i8").tobytes())
        digest.update(self.labels.astype("<i8").tobytes() + self.weights.astype("<f4").tobytes())
        if self.soft is not None:
            digest.update(self.soft.astype("<f4").tobytes())
        return digest.hexdigest()[:16]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """A data set ready for a run. `note`: licence, citation and how it was split, in words that reports repeat.

    `upright`: its pictures have an up; those of cells or tissue may be turned and mirrored at will.
    """

    train: Source
    val: Source | None
    test: Source | None
    classes: tuple[str, ...]
    name: str
    note: str = ""
    upright: bool = True

    def __post_init__(self) -> None:
        for source in self.parts().values():
            if source.classes != self.classes:
                raise UsageError(f"{source.name} has classes {source.classes}; the data set has {self.classes}.")

    def parts(self) -> dict[str, Source]:
        """The parts that exist, by name."""
        return {name: part for name in SPLITS if (part := getattr(self, name)) is not None}

    def part(self, name: str) -> Source:
        """`train`, `val`, `test` or `all` (every sample, in that order). `UsageError` for a part there is not."""
        check_choice("split", name, (*SPLITS, "all"))
        parts = self.parts()
        if name == "all":
            return joined(self.name, tuple(parts.values()))
        if name not in parts:
            raise UsageError(f"{self.name} has no {name} part; it has {', '.join(parts)}.")
        return parts[name]


def joined(name: str, parts: Sequence[Source]) -> Source:
    """The samples of all `parts`, one after another. They share their `Pixels`, as the parts of one `Splits` do."""
    first = parts[0]
    assert all(part.pixels is first.pixels and part.classes == first.classes for part in parts)
    soft = [part.soft for part in parts if part.soft is not None]
    groups = [part.groups for part in parts if part.groups is not None]
    return replace(
        first,
        name=name,
        ids=tuple(identity for part in parts for identity in part.ids),
        labels=np.concatenate([part.labels for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        rows=np.concatenate([part.rows for part in parts]),
        soft=np.concatenate(soft) if len(soft) == len(parts) else None,
        groups=tuple(group for part in groups for group in part) if len(groups) == len(parts) else None,
    )


def labelled(
    name: str, pixels: Pixels, ids: Sequence[str], labels: Sequence[int] | np.ndarray, classes: tuple[str, ...]
) -> Source:
    """A `Source` over every row of `pixels`, weight 1 each; pass an empty class list for unlabelled pictures."""
    n = len(ids)
    return Source(
        name=name,
        classes=classes,
        ids=tuple(ids),
        labels=np.asarray(labels, dtype=np.int64).reshape(n),
        weights=np.ones(n, dtype=np.float32),
        pixels=pixels,
        rows=np.arange(n),
    )


def split_named(word: str) -> str | None:
    """The part of a data set that a folder, shard or cell called `word` means; None when it means none."""
    word = _ALIASES.get(word.lower(), word.lower())
    return word if word in SPLITS else None


# -- the class list ---------------------------------------------------------------------------------------------------


def class_list(found: Iterable[str], wanted: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """The classes of a data set whose training part has `found`: sorted, or exactly `wanted` (a checkpoint's list).

    A class more or less than `wanted` would shift every index behind it, so it is refused and both sides are listed.
    """
    found = sorted(found)
    if wanted is not None:
        _refuse_difference(found, wanted, where, missing_allowed=False)
        return tuple(wanted)
    if len(found) < 2:
        named = f"only the class {found[0]!r}" if found else "no classes"
        raise UsageError(f"{where} has {named}; a classifier needs at least two. Expected {where}/<class>/<images>.")
    return tuple(found)


def check_known(found: Iterable[str], classes: Sequence[str], where: str) -> None:
    """Refuses a class of the validation or test part that training does not have. A class without samples is fine."""
    _refuse_difference(sorted(found), classes, where, missing_allowed=True)


def _refuse_difference(found: Sequence[str], classes: Sequence[str], where: str, *, missing_allowed: bool) -> None:
    extra = [name for name in found if name not in set(classes)]
    missing = [] if missing_allowed else [name for name in classes if name not in set(found)]
    if extra or missing:
        raise UsageError(
            f"{where} does not match the class list of {len(classes)}. "
            f"Only in {where}: {_listed(extra)}. Only in the class list: {_listed(missing)}."
        )


def _listed(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(map(repr, names[:most])) + more) if names else "nothing"


# -- random cuts ------------------------------------------------------------------------------------------------------


def deal(strata: Sequence[np.ndarray], sizes: Sequence[Sequence[int]], seed: int) -> tuple[np.ndarray, ...]:
    """Cuts every stratum into pieces of the given sizes and a rest; returns the pieces and the rest, each sorted.

    One `RandomState(seed)` serves all strata in turn: its stream is frozen by numpy's compatibility policy, so a split
    is the same for ever. The test set of `elpv` is this function with the paper's counts.

    >>> test, rest = deal([np.arange(4), np.arange(4, 8)], [[1], [1]], seed=0)
    >>> test.tolist(), rest.tolist()
    ([2, 4], [0, 1, 3, 5, 6, 7])
    """
    random = np.random.RandomState(seed)
    dealt = [np.split(random.permutation(rows), np.cumsum(cuts)) for rows, cuts in zip(strata, sizes, strict=True)]
    return tuple(np.sort(np.concatenate(pieces)) for pieces in zip(*dealt, strict=True))


def share(count: int, fraction: float) -> int:
    """`fraction` of `count`, rounded, and at least one where there are three or more to share.

    >>> share(20, 0.15), share(3, 0.15), share(2, 0.15), share(20, 0)
    (3, 1, 0, 0)
    """
    least = 1 if count >= 3 and fraction > 0 else 0
    return max(round(count * fraction), least)


def by_class(source: Source) -> list[np.ndarray]:
    """The indices of each class, in order: the strata of `cut_validation` and `cut_flat`."""
    return [np.flatnonzero(source.labels == label) for label in range(len(source.classes))]


def cut_validation(train: Source, fraction: float, seed: int) -> tuple[Source, Source | None]:
    """(training part, validation part), stratified by class; the validation part is None when it would be empty."""
    check_range("val_fraction", fraction, 0, 0.5)
    strata = by_class(train)
    val, rest = deal(strata, [[share(len(rows), fraction)] for rows in strata], seed)
    return train.subset(rest, "train"), train.subset(val, "val") if len(val) else None


def splits_of(
    everything: Source, parts: Sequence[str | None], *, name: str, split_seed: int, val_fraction: float
) -> Splits:
    """`Splits` from samples that say which part they belong to (`parts`), or do not: then 70/15/15, stratified.

    Validation, where not given, is cut from training; test is never touched.
    """
    if not any(parts):
        train, val, test = cut_flat(everything, val_fraction, split_seed)
        sizes = "/".join(str(len(part or ())) for part in (train, val, test))
        note = f"Split {sizes} (train/val/test), stratified by class, seed {split_seed}."
        return Splits(train=train, val=val, test=test, classes=everything.classes, name=name, note=note)
    given = {part: [i for i, word in enumerate(parts) if word == part] for part in SPLITS}
    found = {part: everything.subset(at, part) if at else None for part, at in given.items()}
    train, val, note = found["train"], found["val"], ""
    if train is None:
        raise UsageError(f"{name} has no training samples.")
    if val is None and val_fraction > 0:
        train, val = cut_validation(train, val_fraction, split_seed)
        note = f"Validation: {val_fraction:.0%} of the training part, stratified by class, seed {split_seed}."
    return Splits(train=train, val=val, test=found["test"], classes=everything.classes, name=name, note=note)


def cut_flat(everything: Source, val_fraction: float, seed: int) -> tuple[Source, Source | None, Source | None]:
    """(train, val, test) of a data set that names no parts, stratified by class: 15 % test, `val_fraction` val."""
    check_range("val_fraction", val_fraction, 0, 0.5)
    strata = by_class(everything)
    tests = [share(len(rows), TEST_FRACTION) for rows in strata]
    vals = [min(share(len(rows), val_fraction), len(rows) - n - 1) for rows, n in zip(strata, tests, strict=True)]
    test, val, train = deal(strata, list(zip(tests, (max(n, 0) for n in vals), strict=True)), seed)
    return (
        everything.subset(train, "train"),
        everything.subset(val, "val") if len(val) else None,
        everything.subset(test, "test") if len(test) else None,
    )

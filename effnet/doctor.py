"""Is this data set fit to train on? A read-only look at every file, before any compute is spent.

`examine` decodes each picture once and reports what cannot be decoded, what the files are (formats, modes, bit depths,
EXIF turns, sizes), exact and near duplicates within and across the parts, class counts and imbalance. Leakage, the same
picture in training and test, is the finding that matters most: a good test score means nothing after it.

Near duplicates are pairs whose 16 x 16 grey thumbnails correlate by 0.9975 or more. On 12 photographs and solar cells,
copies re-encoded at JPEG quality 50, at half size or 20 % brighter correlate by 0.9978 to 1 with few exceptions, copies
cropped by 2 % per side do not (0.81 to 0.995): crops and flips are not found. The comparison is one matrix product,
done in blocks.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
from PIL import Image

from effnet.images import ImageError, ImageInfo, decode, inspect
from effnet.samples import Source, Splits
from effnet.sources import open_data

Severity = Literal["ok", "info", "warning", "error"]

THUMBNAIL = 16
ALIKE = 0.9975  # correlation of thumbnails; measured, see above
MOST_COMPARED = 100_000  # pictures; n^2 / 2 comparisons of 256 numbers: 10^5 of them take about a minute on two cores
MOST_LISTED = 1000  # pairs and groups kept for the report; the counts are complete
BLOCK = 2048
SMALL_PX = 32  # a network of stride 32 sees such a picture as one place
IMBALANCE = 10.0
MATCHING_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",), "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}  # fmt: skip


@final
@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the report. `files`: ids as `part/id`, at most `MOST_LISTED`."""

    check: str
    severity: Severity
    message: str
    files: tuple[str, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two pictures that look alike. `correlation` of their thumbnails; `across`: they lie in different parts."""

    first: str
    second: str
    correlation: float
    across: bool


@final
@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `examine` found. `rows`: every check in order; `problems`: those with a warning or an error."""

    name: str
    note: str
    classes: tuple[str, ...]
    counts: dict[str, dict[str, int]]  # part -> class -> pictures
    formats: dict[str, int]
    modes: dict[str, int]
    bits: dict[str, int]
    sizes: dict[str, tuple[int, int, int]]  # width and height: smallest, median, largest
    duplicates: tuple[tuple[str, ...], ...]
    near: tuple[Pair, ...]
    rows: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        return tuple(row for row in self.rows if row.severity in ("warning", "error"))

    @property
    def ok(self) -> bool:
        """No errors. Warnings are for the reader to judge."""
        return all(row.severity != "error" for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"ok": self.ok}


class Look(NamedTuple):
    """What was seen of one picture. `info` is None for raw pixels; after an `error` everything is."""

    part: str
    id: str
    label: int
    error: str | None
    info: ImageInfo | None
    shape: tuple[int, int] | None
    file_hash: bytes | None
    pixel_hash: bytes | None
    thumbnail: np.ndarray | None

    @property
    def where(self) -> str:
        return f"{self.part}: {self.id}"


def examine(
    data: str | Path | Splits, *, workers: int = 2, progress: Callable[[int, int], None] | None = None
) -> Diagnosis:
    """Looks at every picture of a data set; changes nothing. `data`: what `open_data` takes, or its result.

    `progress(done, total)` is called after each picture. Takes about one decode per picture and 2 KB of memory each.
    `UsageError` when the data set cannot be opened at all.
    """
    splits = data if isinstance(data, Splits) else open_data(data)
    looks = _looked_at(splits, workers, progress)
    seen = [look for look in looks if look.error is None]
    groups = _duplicates(seen)
    near, near_row = _near(seen)
    rows = (
        _undecodable(looks),
        *_kinds(seen),
        _sizes_row(seen),
        *_duplicate_rows(groups, splits.classes),
        near_row,
        *_class_rows(splits),
    )
    return Diagnosis(
        name=splits.name,
        note=splits.note,
        classes=splits.classes,
        counts={
            name: dict(zip(part.classes, part.counts().tolist(), strict=True)) for name, part in splits.parts().items()
        },
        formats=_counted(look.info.format if look.info else "raw" for look in seen),
        modes=_counted(look.info.mode if look.info else "L" for look in seen),
        bits=_counted(str(look.info.bits) if look.info else "8" for look in seen),
        sizes=_sizes(seen),
        duplicates=tuple(tuple(look.where for look in group) for group in groups[:MOST_LISTED]),
        near=near,
        rows=rows,
    )


# -- looking ----------------------------------------------------------------------------------------------------------


def _looked_at(splits: Splits, workers: int, progress: Callable[[int, int], None] | None) -> list[Look]:
    todo = [(name, part, index) for name, part in splits.parts().items() for index in range(len(part))]
    looks = []
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for look in pool.map(lambda item: _look(*item), todo):
            looks.append(look)
            if progress:
                progress(len(looks), len(todo))
    return looks


def _look(part: str, source: Source, index: int) -> Look:
    identity, label = source.ids[index], int(source.labels[index])
    try:
        stored = source.encoded(index)
        info = None if stored is None else inspect(stored)
        image = source.image(index) if stored is None else decode(stored, name=identity)
        file_hash = None if stored is None else _hash(stored if isinstance(stored, bytes) else stored.read_bytes())
    except (ImageError, OSError) as error:
        reason = error.reason if isinstance(error, ImageError) else str(error)
        return Look(part, identity, label, reason, None, None, None, None, None)
    height, width = image.shape[:2]
    pixel_hash = _hash(np.array([height, width], dtype="<i8").tobytes() + image.tobytes())
    return Look(part, identity, label, None, info, (height, width), file_hash, pixel_hash, _thumbnail(image))


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """float32 (256,) of mean 0 and length 1, so that a product is a correlation; zeros for a flat picture."""
    small = Image.fromarray(image).convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.float32).ravel()
    values = values - values.mean()
    length = float(np.linalg.norm(values))
    return values / length if length > 1 else np.zeros_like(values)


# -- files ------------------------------------------------------------------------------------------------------------


def _undecodable(looks: Sequence[Look]) -> Finding:
    bad = [f"{look.where} ({look.error})" for look in looks if look.error is not None]
    if not bad:
        return Finding(check="decoding", severity="ok", message=f"all {len(looks)} pictures can be decoded")
    message = f"{len(bad)} of {len(looks)} pictures cannot be decoded: {_first(bad)}"
    return Finding(check="decoding", severity="error", message=message, files=tuple(bad[:MOST_LISTED]))


def _kinds(seen: Sequence[Look]) -> Iterable[Finding]:
    """What the files are, and what is done about the unusual ones."""
    infos = [(look, look.info) for look in seen if look.info is not None]
    formats = ", ".join(f"{count} {name}" for name, count in _counted(info.format for _, info in infos).items())
    yield Finding(check="format", severity="ok", message=formats or "raw pixels")
    unusual = {
        "deeper than 8 bits, scaled to 8": [look for look, info in infos if info.bits > 8],
        "turned by EXIF, decoded upright": [look for look, info in infos if info.exif_orientation != 1],
        "CMYK, converted to RGB": [look for look, info in infos if info.mode == "CMYK"],
        "with transparency, put on white": [look for look, info in infos if info.mode in ("LA", "PA", "RGBA")],
        "named as another format": [look for look, info in infos if _misnamed(look.id, info.format)],
    }
    for what, looks in unusual.items():
        if looks:
            files = tuple(look.where for look in looks[:MOST_LISTED])
            yield Finding(check="format", severity="info", message=f"{what}: {len(looks)}", files=files)


def _misnamed(name: str, image_format: str) -> bool:
    """Whether a file name promises another format. Members of shards have no suffix in their ids."""
    suffix = Path(name).suffix.lower()
    known = {ending for endings in MATCHING_SUFFIXES.values() for ending in endings}
    return suffix in known and suffix not in MATCHING_SUFFIXES.get(image_format, ())


def _sizes(seen: Sequence[Look]) -> dict[str, tuple[int, int, int]]:
    shapes = np.array([look.shape for look in seen if look.shape]).reshape(-1, 2)
    if not len(shapes):
        return {}
    height, width = (np.percentile(side, (0, 50, 100), method="nearest").tolist() for side in shapes.T)
    return {"width": tuple(width), "height": tuple(height)}


def _sizes_row(seen: Sequence[Look]) -> Finding:
    sizes = _sizes(seen)
    if not sizes:
        return Finding(check="size", severity="ok", message="no picture to measure")
    (w0, w1, w2), (h0, h1, h2) = sizes["width"], sizes["height"]
    message = f"width {w0} to {w2} px, median {w1}; height {h0} to {h2} px, median {h1}"
    small = [look.where for look in seen if look.shape and min(look.shape) < SMALL_PX]
    if small:
        message += f"; a side below {SMALL_PX} px: {len(small)} ({_first(small)})"
    return Finding(
        check="size", severity="warning" if small else "ok", message=message, files=tuple(small[:MOST_LISTED])
    )


# -- duplicates -------------------------------------------------------------------------------------------------------


def _duplicates(seen: Sequence[Look]) -> list[list[Look]]:
    """Groups of two or more pictures with the same pixels, those across parts first."""
    groups: dict[bytes, list[Look]] = defaultdict(list)
    for look in seen:
        if look.pixel_hash is not None:
            groups[look.pixel_hash].append(look)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: -_parts(group))


def _parts(group: Sequence[Look]) -> int:
    return len({look.part for look in group})


def _duplicate_rows(groups: Sequence[Sequence[Look]], classes: Sequence[str]) -> Iterable[Finding]:
    across = [group for group in groups if _parts(group) > 1]
    within = [group for group in groups if _parts(group) == 1]
    torn = [group for group in groups if len({look.label for look in group}) > 1]
    if across:
        what = "pictures in more than one part"
        yield _group_finding("leakage", "error", across, what)
    else:
        yield Finding(check="leakage", severity="ok", message="no picture is in two parts")
    if within:
        yield _group_finding("duplicates", "warning", within, "pictures more than once in one part")
    if torn:
        names = "/".join(classes[label] for label in sorted({look.label for look in torn[0]}))
        yield _group_finding("labels", "warning", torn, f"pictures with contradicting labels (first {names})")


def _group_finding(check: str, severity: Severity, groups: Sequence[Sequence[Look]], what: str) -> Finding:
    same_file = sum(len({look.file_hash for look in group}) == 1 for group in groups)
    files = tuple(" = ".join(look.where for look in group) for group in groups[:MOST_LISTED])
    message = f"{what}: {len(groups)} ({same_file} byte for byte): {_first(files)}"
    return Finding(check=check, severity=severity, message=message, files=files)


def _near(seen: Sequence[Look]) -> tuple[tuple[Pair, ...], Finding]:
    """Pairs of different pictures that look alike, the most alike first."""
    different = list({look.pixel_hash: look for look in seen}.values())
    if not different:
        return (), _near_finding((), 0, 0)
    if len(different) > MOST_COMPARED:
        message = f"not searched: {len(different)} pictures, more than {MOST_COMPARED}"
        return (), Finding(check="near duplicates", severity="warning", message=message)
    thumbnails = [look.thumbnail for look in different if look.thumbnail is not None]
    first, second, correlation = alike(np.array(thumbnails, dtype=np.float32).reshape(len(different), -1), ALIKE)
    parts = np.array([look.part for look in different])
    across = parts[first] != parts[second]
    ranked = np.lexsort((-correlation, ~across))[:MOST_LISTED]
    pairs = tuple(
        Pair(
            first=different[first[i]].where,
            second=different[second[i]].where,
            correlation=round(float(correlation[i]), 4),
            across=bool(across[i]),
        )
        for i in ranked
    )
    return pairs, _near_finding(pairs, int(across.sum()), int((~across).sum()))


def _near_finding(pairs: Sequence[Pair], across: int, within: int) -> Finding:
    if not pairs:
        return Finding(check="near duplicates", severity="ok", message="no two different pictures look alike")
    files = tuple(f"{pair.first} ~ {pair.second} ({pair.correlation:.4f})" for pair in pairs)
    message = f"pairs that look alike: {across} across parts, {within} within one: {_first(files)}"
    return Finding(check="near duplicates", severity="warning" if across else "info", message=message, files=files)


def alike(vectors: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs i < j of rows of `vectors` (N, D; unit length or zero) with a product of at least `threshold`.

    Returns (i, j, product), int64, int64 and float32. N^2 D / 2 multiply-adds, BLOCK x N numbers of memory.
    """
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(vectors), BLOCK):
        products = vectors[start : start + BLOCK] @ vectors[start:].T  # (rows, N - start)
        i, j = np.nonzero(products >= threshold)
        keep = j > i
        found.append((i[keep] + start, j[keep] + start, products[i[keep], j[keep]]))
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    first, second, product = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return first, second, product


# -- classes ----------------------------------------------------------------------------------------------------------


def _class_rows(splits: Splits) -> Iterable[Finding]:
    if not splits.classes:
        yield Finding(check="classes", severity="info", message=f"{len(splits.train)} pictures without labels")
        return
    sizes = ", ".join(f"{name} {len(part)}" for name, part in splits.parts().items())
    yield Finding(check="classes", severity="ok", message=f"{len(splits.classes)} classes; {sizes}")
    for name in ("val", "test"):
        if name not in splits.parts():
            severity: Severity = "warning" if name == "val" else "info"
            yield Finding(check="classes", severity=severity, message=f"there is no {name} part")
    for name, part in splits.parts().items():
        empty = tuple(word for word, count in zip(part.classes, part.counts(), strict=True) if count == 0)
        if empty:
            message = f"classes without a picture in {name}: {_first(empty)}"
            severity = "error" if name == "train" else "warning"
            yield Finding(check="classes", severity=severity, message=message, files=empty)
    yield _balance_row(splits.train)


def _balance_row(train: Source) -> Finding:
    counts = train.counts()
    most, least = int(counts.argmax()), int(np.where(counts > 0, counts, counts.max() + 1).argmin())
    ratio = counts[most] / max(counts[least], 1)
    message = (
        f"the largest class ({train.classes[most]}, {counts[most]}) is {ratio:.1f} times the smallest "
        f"({train.classes[least]}, {counts[least]})"
    )
    return Finding(check="balance", severity="warning" if ratio > IMBALANCE else "ok", message=message)


# -- words ------------------------------------------------------------------------------------------------------------


def _counted(words: Iterable[str]) -> dict[str, int]:
    """How often each word occurs, most frequent first."""
    return dict(Counter(words).most_common())


def _first(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")

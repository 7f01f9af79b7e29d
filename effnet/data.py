"""How do samples reach the model? In an order, as views, in batches, while the model is busy with the last one.

The order and every random choice are pure functions of (seed, epoch, step, sample): nothing remembers a position. So a
run that resumes at step s reads exactly the batches an uninterrupted one would, whatever the number of workers, and a
run on other machines reads the same global batches cut into other slices. Randomness comes from Philox streams keyed
through `SeedSequence`; numpy keeps those bit streams for ever, `Generator.permutation` only within one numpy version.

A picture that cannot be decoded follows a policy: `error` stops and names it; `skip` leaves it out of its batch,
records it in `Batch.skipped`, and stops above a ceiling. There is never a black image in its place.

Where batches are made is a choice (`workers`, `by`), and a measured one: `benchmarks/input_wait.py`.
"""

import contextlib
import mmap
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Literal, NamedTuple, final, get_args

import numpy as np
import torch
from torch import Tensor

from effnet import native
from effnet.augment import view
from effnet.images import ImageError, Picture, prepare
from effnet.recipes import Crop, Policy
from effnet.samples import ArrayPixels, Pixels, Source, Splits
from effnet.sources import open_data
from effnet.spec import Preprocess
from effnet.value import UsageError, check_choice, check_range

__all__ = ["Batch", "Cache", "Source", "Splits", "batches", "open_data", "order", "sample_rng", "steps"]

OnError = Literal["error", "skip"]
By = Literal["thread", "process"]

ORDER, VIEW = 0, 1  # the last word of a key: streams for different uses never meet
SKIP_FRACTION, SKIP_FILES = 0.01, 10  # the ceiling of `skip`: the larger of the two, per epoch
BATCHES_AHEAD = 2
MOST_WORKERS = 8  # threads; beyond, they wait for the interpreter lock more than they gain


# -- the order --------------------------------------------------------------------------------------------------------


def steps(n: int, *, batch: int, train: bool = True) -> int:
    """Batches of one epoch: training drops the last short one unless it is the only one."""
    return max(n // batch, 1) if train else -(-n // batch)


def order(n: int, *, seed: int, epoch: int, batch: int, world: int = 1, rank: int = 0, mirrored: int = 1) -> np.ndarray:
    """Sample indices of one training epoch on one rank, int64 (steps, batch / world).

    `batch` is the global one; its shares on the `world` ranks are disjoint, and row s of all ranks together is the same
    set for every `world`. What is left over after whole batches differs from epoch to epoch. `mirrored`: see `share`.

    >>> order(6, seed=0, epoch=0, batch=4).shape, order(6, seed=0, epoch=0, batch=4, world=2, rank=1).shape
    ((1, 4), (1, 2))
    """
    check_range("number of samples", n, 1)
    check_range("batch", batch, 1)
    batch = min(batch, n)
    places = share(batch, world=world, rank=rank, mirrored=mirrored)
    shuffled = _stream(seed, epoch, ORDER).permutation(n)[: n // batch * batch]
    return shuffled.reshape(-1, batch)[:, places]


def share(batch: int, *, world: int = 1, rank: int = 0, mirrored: int = 1) -> np.ndarray:
    """The places of a batch of `batch` images that one of `world` processes computes, int64 (batch / world,).

    Mixup and cutmix use the image at the mirrored place, so that one must be in the same share. `mirrored` 1: a slice.
    2: a slice of the first half and its mirror image in the second. 4: mirrored also within each half, for batches of
    which one half is mixed and the other cut. `UsageError` when the batch cannot be shared equally.

    >>> share(8, world=2, rank=0).tolist(), share(8, world=2, rank=0, mirrored=2).tolist()
    ([0, 1, 2, 3], [0, 1, 6, 7])
    >>> share(8, world=2, rank=1, mirrored=4).tolist()
    [1, 2, 5, 6]
    """
    check_range("rank", rank, 0, world - 1)
    if world == 1:
        return np.arange(batch)
    if batch % (world * mirrored):
        mixed = f", {mirrored} mirrored images at a time (mixup, cutmix)" if mirrored > 1 else ""
        raise UsageError(f"a batch of {batch} cannot be shared equally by {world} processes{mixed}.")
    length = batch // (world * mirrored)
    run = np.arange(rank * length, (rank + 1) * length)
    if mirrored == 1:
        return run
    if mirrored == 2:
        return np.concatenate([run, batch - 1 - run[::-1]])
    half = batch // 2
    return np.concatenate([run, half - 1 - run[::-1], half + run, batch - 1 - run[::-1]])


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random stream of one sample's view in one epoch, the same whoever draws from it and when."""
    return _stream(seed, epoch, index, VIEW)


def _stream(*key: int) -> np.random.Generator:
    if min(key) < 0:
        raise UsageError(f"seeds, epochs and indices are 0 or more, not {min(key)}.")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


# -- decoded pictures, kept -------------------------------------------------------------------------------------------


@final
class Cache:
    """Decoded pictures up to a budget of bytes; grey ones take a third. Thread-safe; pictures are never evicted.

    Every picture is used once an epoch in a new order, so evicting by age would throw out what is needed next: the
    first ones to arrive stay, and what has no room is decoded again each time. Training asks for a picture at the
    scale that a view needs, and each scale is kept by itself: small views keep small pictures. Which pixels a view is
    made of never depends on what is kept. Forked workers inherit what is here when they start (`fill` it before).
    """

    def __init__(self, budget_bytes: int = 2**30) -> None:
        check_range("cache budget in bytes", budget_bytes, 0)
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._kept: dict[Key, np.ndarray] = {}
        self._headers: dict[tuple[Pixels, int], Header] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple[type["Cache"], tuple[int]]:
        return Cache, (self.budget_bytes,)  # another process begins with an empty one

    def image(self, source: Source, index: int) -> np.ndarray:
        """`source.image(index)`, decoded at most once as long as there is room."""
        if isinstance(source.pixels, ArrayPixels):
            return source.image(index)  # nothing to decode, and already in memory
        row = int(source.rows[index])
        return self.kept((source.pixels, row, None), lambda: source.pixels.image(row))

    def picture(self, source: Source, index: int) -> Picture | np.ndarray:
        """The same for training: pixels are decoded when a view asks for them, at its scale, or taken from here."""
        row = int(source.rows[index])
        if self.budget_bytes == 0 or isinstance(source.pixels, ArrayPixels):
            return source.pixels.picture(row)
        return Cached(self, source.pixels, row)

    def header(self, pixels: Pixels, row: int) -> "Header | None":
        """Width, height and whether the picture shrinks, where any scale of it is here."""
        return self._headers.get((pixels, row))

    def kept(self, key: "Key", decoded: Callable[[], np.ndarray], header: "Header | None" = None) -> np.ndarray:
        """What is here under `key`; else `decoded()`, kept if there is room, with its `header`."""
        packed = self._kept.get(key)
        if packed is None:
            image = decoded()
            if self.used_bytes < self.budget_bytes:
                self._keep(key, image, header)
            return image
        return _thrice(packed) if packed.shape[2] == 1 else packed

    def fill(self, source: Source, *, workers: int) -> None:
        """Decodes all of `source` for training, at full size, ahead of time.

        What cannot be decoded is left to the policy of `batches`.
        """

        def load(index: int) -> None:
            if self.used_bytes < self.budget_bytes:
                with contextlib.suppress(ImageError):  # met again, and then named, when its batch is made
                    picture = self.picture(source, index)
                    if not isinstance(picture, np.ndarray):
                        picture.pixels()

        with ThreadPoolExecutor(max(workers, 1)) as pool:
            deque(pool.map(load, range(len(source))), maxlen=0)

    def _keep(self, key: "Key", image: np.ndarray, header: "Header | None") -> None:
        grey = (image[..., 0] == image[..., 1]).all() and (image[..., 0] == image[..., 2]).all()
        packed = image[..., :1].copy() if grey else image
        with self._lock:
            if key not in self._kept and self.used_bytes + packed.nbytes <= self.budget_bytes:
                packed.flags.writeable = False  # from now on shared by everyone who asks
                self._kept[key] = packed
                self.used_bytes += packed.nbytes
                if header is not None:
                    self._headers[key[:2]] = header


Header = tuple[int, int, bool]  # width, height, whether it shrinks
Key = tuple[Pixels, int, int | None]  # of a kept picture: where it is from, and its shrink (None: for evaluation)


@final
class Cached:
    """A `Picture` whose header and pixels are read at most once, as long as `cache` has room. For one view."""

    def __init__(self, cache: Cache, pixels: Pixels, row: int) -> None:
        self._cache, self._pixels, self._row = cache, pixels, row
        self._opened: Picture | None = None
        self._header = cache.header(pixels, row) or self._read()
        self.width, self.height, self.shrinks = self._header

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """As `Picture.pixels`; read-only where it is kept."""
        key = self._pixels, self._row, shrink
        return self._cache.kept(key, lambda: self._open().pixels(shrink), self._header)

    def _read(self) -> Header:
        picture = self._open()
        return picture.width, picture.height, picture.shrinks

    def _open(self) -> Picture:
        if self._opened is None:
            picture = self._pixels.picture(self._row)
            assert not isinstance(picture, np.ndarray)  # those are not cached
            self._opened = picture
        return self._opened


def _thrice(grey: np.ndarray) -> np.ndarray:
    """(H, W, 1) as (H, W, 3). Three strided copies take a third of `np.repeat`'s time."""
    rgb = np.empty((*grey.shape[:2], 3), dtype=np.uint8)
    for channel in range(3):
        rgb[..., channel] = grey[..., 0]
    return rgb


# -- batches ----------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """B views and what is known of them. `images` uint8 (B, S, S, 3); `labels` int64 (B,); `targets` float32 (B, K).

    `weights` float32 (B,); `indices` int64 (B,): positions in the source; `places` int64 (B,): positions in the global
    batch, of which this may be a share; `skipped`: (id, reason) of what was left out.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor
    weights: Tensor
    indices: Tensor
    places: Tensor
    skipped: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.indices)


class Made(NamedTuple):
    """One batch as the workers leave it: `images` uint8 (B, S, S, 3), and by place what could not be decoded."""

    images: np.ndarray
    failures: dict[int, ImageError]


@final
@dataclass(frozen=True, kw_only=True)
class Views:
    """Sample number -> its view: what a worker runs. The view of a sample depends on nothing but these fields."""

    source: Source
    preprocess: Preprocess
    train: bool
    crop: Crop
    least_area: float
    policy: Policy
    magnitude: float
    seed: int
    epoch: int
    cache: Cache

    def __call__(self, index: int) -> np.ndarray:
        size_px = self.preprocess.size
        if not self.train:
            return prepare(self.cache.image(self.source, index), self.preprocess)
        rng = sample_rng(self.seed, self.epoch, index)
        return view(
            self.cache.picture(self.source, index),
            size_px,
            crop=self.crop,
            policy=self.policy,
            magnitude=self.magnitude,
            area=(self.least_area, 1.0),
            rng=rng,
            interpolation=self.preprocess.interpolation,
        )

    def put(self, index: int, images: np.ndarray, place: int) -> ImageError | None:
        """Writes the view of sample `index` to `images[place]`; returns the error when there is no view."""
        try:
            images[place] = self(index)
        except ImageError as error:
            return error
        return None

    def empty(self, count: int) -> np.ndarray:
        """Room for `count` views."""
        return np.empty((count, self.preprocess.size, self.preprocess.size, 3), dtype=np.uint8)

    def made(self, indices: np.ndarray) -> Made:
        """All views of one batch, one after another."""
        images = self.empty(len(indices))
        errors = [self.put(int(index), images, place) for place, index in enumerate(indices)]
        return Made(images, {place: error for place, error in enumerate(errors) if error})


def batches(
    source: Source,
    *,
    size_px: int,
    batch: int,
    preprocess: Preprocess,
    train: bool,
    crop: Crop = "inception",
    least_area: float = 0.08,
    policy: Policy = "randaugment",
    magnitude: float = 0.0,
    seed: int = 0,
    epoch: int = 0,
    start_step: int = 0,
    workers: int | None = None,
    by: By = "thread",
    on_error: OnError = "error",
    cache: Cache | None = None,
    soft: bool = False,
    rank: int = 0,
    world: int = 1,
    mirrored: int = 1,
) -> Iterator[Batch]:
    """The batches of one epoch, from step `start_step` on, made ahead of time by `workers`.

    Training: views by `crop`, `least_area`, `policy` and `magnitude` in the order of `order`; `batch` is the global
    one, of which this process gets its `share`. Evaluation: `preprocess` at `size_px`, every sample once and in order,
    the last batch short, batches dealt to ranks in turn. `workers` 0 makes each batch when it is asked for, None leaves
    the number to `default_workers`. `soft`: targets are the source's soft ones instead of one-hot.

    `ImageError` naming the file under `on_error="error"`; `UsageError` when `skip` has left out more than 1 % of the
    source (at least 10 files) or a whole batch.
    """
    check_choice("on_error", on_error, get_args(OnError))
    check_choice("by", by, get_args(By))
    workers = default_workers(world) if workers is None else workers
    check_range("workers", workers, 0)
    check_range("start_step", start_step, 0)
    if train and not source.classes:
        raise UsageError(f"{source.name} has no labels to train on.")
    if soft and source.soft is None:
        raise UsageError(f"{source.name} has no soft targets.")
    views = Views(
        source=source,
        preprocess=preprocess.with_size(size_px),
        train=train,
        crop=crop,
        least_area=least_area,
        policy=policy,
        magnitude=magnitude,
        seed=seed,
        epoch=epoch,
        cache=Cache(0) if cache is None else cache,
    )
    if train:
        native.picture_library()  # built once, before several workers would
        keyed = {"seed": seed, "epoch": epoch}
        rows = list(order(len(source), **keyed, batch=batch, world=world, rank=rank, mirrored=mirrored))
        places = share(min(batch, len(source)), world=world, rank=rank, mirrored=mirrored)
    else:
        rows = [np.arange(i, min(i + batch, len(source))) for i in range(0, len(source), batch)][rank::world]
        places = np.arange(batch)
    rows = rows[start_step:]
    return _assembled(source, rows, places, _made(views, rows, workers, by), on_error=on_error, soft=soft)


def default_workers(world: int = 1) -> int:
    """Half the cores that a process may use, shared by the processes of this machine, from 1 to 8.

    One is enough on two cores: it prepares a cached 300 px picture in 2 ms of CPU time and an uncached one in 5, where
    a step of EfficientNet-Lite0 takes at least 8 ms per picture of both.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // (2 * world), 1), MOST_WORKERS)


def _assembled(
    source: Source, rows: Sequence[np.ndarray], places: np.ndarray, made: Iterator[Made], *, on_error: str, soft: bool
) -> Iterator[Batch]:
    """Applies the policy and adds what is known of each sample. Runs in the caller, so its decisions come in order."""
    ceiling = max(SKIP_FILES, int(len(source) * SKIP_FRACTION))
    skipped: dict[str, str] = {}
    for indices, (images, failures) in zip(rows, made, strict=True):
        if failures and on_error == "error":
            raise failures[min(failures)]
        left_out = tuple((source.ids[indices[place]], error.reason) for place, error in sorted(failures.items()))
        skipped |= dict(left_out)
        if len(skipped) > ceiling or len(failures) == len(indices):
            raise UsageError(_too_many(source, skipped, ceiling))
        at = places[: len(indices)]
        if failures:
            good = np.setdiff1d(np.arange(len(indices)), list(failures))
            indices, images, at = indices[good], images[good], at[good]
        yield _batch(source, indices, at, images, soft, left_out)


def _too_many(source: Source, skipped: dict[str, str], ceiling: int) -> str:
    first = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
    return (
        f"{source.name}: {len(skipped)} pictures cannot be decoded ({first}); {ceiling} of {len(source)} may be "
        f"skipped, and never a whole batch. `effnet doctor` lists them all."
    )


def _batch(
    source: Source,
    indices: np.ndarray,
    places: np.ndarray,
    images: np.ndarray,
    soft: bool,
    skipped: tuple[tuple[str, str], ...],
) -> Batch:
    labels = source.labels[indices]
    hard = (labels[:, None] == np.arange(len(source.classes))).astype(np.float32)  # (B, K), no column when unlabelled
    return Batch(
        images=torch.from_numpy(images),
        labels=torch.from_numpy(labels),
        targets=torch.from_numpy(source.soft[indices] if soft and source.soft is not None else hard),
        weights=torch.from_numpy(source.weights[indices]),
        indices=torch.from_numpy(indices),
        places=torch.from_numpy(places),
        skipped=skipped,
    )


# -- where the work is done -------------------------------------------------------------------------------------------


def _made(views: Views, rows: Sequence[np.ndarray], workers: int, by: By) -> Iterator[Made]:
    """The batches of `rows`, in order."""
    if workers == 0:
        return map(views.made, rows)
    return _by_threads(views, rows, workers) if by == "thread" else _by_processes(views, rows, workers)


def _by_threads(views: Views, rows: Sequence[np.ndarray], workers: int) -> Iterator[Made]:
    """Threads of this process: decoding and resizing release the interpreter lock, and all share one cache."""

    def begin(_: int, indices: np.ndarray) -> Callable[[], Made]:
        images = views.empty(len(indices))
        put = [pool.submit(views.put, int(index), images, place) for place, index in enumerate(indices)]
        return lambda: Made(images, _failures(put))

    pool = ThreadPoolExecutor(workers, thread_name_prefix="effnet-input")
    try:
        yield from _ahead(rows, begin)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _by_processes(views: Views, rows: Sequence[np.ndarray], workers: int) -> Iterator[Made]:
    """Forked processes, which inherit the views and write each batch to a slot of memory shared with this process."""
    slots = BATCHES_AHEAD + 1
    room = views.empty(max((len(indices) for indices in rows), default=0))
    shared = np.frombuffer(mmap.mmap(-1, max(slots * room.nbytes, 1)), np.uint8, slots * room.nbytes)
    shared = shared.reshape(slots, *room.shape)

    def begin(number: int, indices: np.ndarray) -> Callable[[], Made]:
        slot = number % slots
        put = [pool.submit(_put_shared, int(index), slot, place) for place, index in enumerate(indices)]
        return lambda: Made(_after(put, shared[slot, : len(indices)]), _failures(put))

    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("fork"), initializer=_become_worker, initargs=(views, shared)
    )
    try:
        yield from _ahead(rows, begin)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ahead(rows: Sequence[np.ndarray], begin: Callable[[int, np.ndarray], Callable[[], Made]]) -> Iterator[Made]:
    """Begins batches before they are needed, and finishes them in order."""
    begun: deque[Callable[[], Made]] = deque()
    for number, indices in enumerate(rows):
        begun.append(begin(number, indices))
        if len(begun) > BATCHES_AHEAD:
            yield begun.popleft()()
    while begun:
        yield begun.popleft()()


def _failures(put: Sequence[Future[ImageError | None]]) -> dict[int, ImageError]:
    return {place: error for place, future in enumerate(put) if (error := future.result())}


def _after(put: Sequence[Future[ImageError | None]], images: np.ndarray) -> np.ndarray:
    """A copy of `images` once all of `put` are done: the slot is used again."""
    wait(put)
    return images.copy()


_inherited: list[Any] = []  # a worker process's views and shared memory; always empty in the process that trains


def _become_worker(views: Views, shared: np.ndarray) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains
    _inherited[:] = [views, shared]


def _put_shared(index: int, slot: int, place: int) -> ImageError | None:
    views, shared = _inherited
    return views.put(index, shared[slot], place)

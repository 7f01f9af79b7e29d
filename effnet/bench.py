"""How fast is it, and is a difference real? Measurements of callables that can be trusted, and of models with them.

What is compared runs in one process, interleaved: every round visits A, B, C and then C, B, A, so that a slow change of
the machine hits all alike. A ratio is the median of the ratios per round, never a quotient of two medians. Intervals
are bootstrapped over rounds (95 %), because calls within a round are alike; a verdict needs an interval that leaves out
1 and a sign test over the rounds below 0.05. The share of CPU time that other programs took meanwhile is part of the
result, and a result above `QUIET` says that it was taken on a busy machine.

Models run as they would in service: inference mode, channels-last, random images (zeros are quicker), denormals
flushed, batch-norm statistics from a few random batches (without them, random weights drift into denormals). Exported
backends (`backends`) run what `effnet export` writes, from bytes to probabilities.

Tables of measured operators for `latency.py` are stored and found here; `operators.py` measures them.
"""

import contextlib
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from effnet import native
from effnet.backends import EXPORTED, Start, random_views, starts, written
from effnet.engine import open_engine
from effnet.latency import LatencyTable, Quantity
from effnet.layers import fold_norms
from effnet.native import cache_folder
from effnet.network import Model, build
from effnet.optim import renew_norms
from effnet.plan import environment
from effnet.spec import Network
from effnet.value import UsageError, Value, check_choice, check_range

QUIET = 0.1  # the share of busy CPU time that may belong to others
SIGNIFICANT = 0.05
VISIT_S, MOST_CALLS = 0.06, 20  # a visit of a round: as many calls as fit this time, but not more
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")  # that decide speed

Interval = tuple[float, float]
Progress = Callable[[int, int], None]
Run = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Measurement(Value):
    """`value`: the median of `n` calls, `spread` its 95 % interval; p95 and p99 with theirs. All in `unit`.

    `quickest`: the smallest median of a round, the machine at its quietest; latency tables predict that.
    """

    name: str
    value: float
    unit: str
    spread: Interval
    n: int
    p95: float
    p95_spread: Interval
    p99: float
    p99_spread: Interval
    quickest: float
    environment: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Comparison(Value):
    """How much longer `second` takes than `first`: the median ratio per round, its 95 % interval, a sign test."""

    first: str
    second: str
    ratio: float
    spread: Interval
    rounds: int
    p_value: float
    verdict: Literal["slower", "faster", "no difference"]

    def __str__(self) -> str:
        low, high = self.spread
        numbers = f"{self.ratio:.3f}x the time ({low:.3f} to {high:.3f}, p = {self.p_value:.2g})"
        if self.verdict == "no difference":
            return f"{self.second} against {self.first}: no difference can be told, {numbers}"
        return f"{self.second} is {self.verdict} than {self.first}: {numbers}"

    @property
    def upright(self) -> "Comparison":
        """The same with the slower one second: a ratio of 1 or more."""
        if self.ratio >= 1:
            return self
        low, high = self.spread
        return self.replace(
            first=self.second,
            second=self.first,
            ratio=1 / self.ratio,
            spread=(1 / high, 1 / low),
            verdict="slower" if self.verdict == "faster" else self.verdict,
        )


@dataclass(frozen=True, kw_only=True)
class Measured(Value):
    """What `measure` found. `others`: the share of busy CPU time of other programs, None where the system hides it.

    `starts`: how soon each is there and what memory it takes, where that was asked for.
    """

    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    rounds: int
    others: float | None
    starts: tuple[Start, ...] = ()

    @property
    def busy(self) -> bool:
        """Whether the machine was too busy with other things for the numbers to be trusted."""
        return self.others is not None and self.others > QUIET

    def __getitem__(self, name: str) -> Measurement:
        return next(m for m in self.measurements if m.name == name)


# --- the core: callables --------------------------------------------------------------------------------------------


def measure(
    works: Mapping[str, Run],
    *,
    rounds: int = 10,
    warmup: int = 3,
    calls: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda done, total: None,
    about: Mapping[str, Any] | None = None,
) -> Measured:
    """Times `works` against each other; each call alone, in milliseconds. The first is what the others are compared to.

    A round visits all in order and then in reverse. `calls` per visit: by default what fits 60 ms, 20 at most.
    `about`: what else belongs in the record of the environment. `UsageError` for nothing to measure or no rounds.
    """
    check_range("rounds", rounds, 1)
    check_range("warmup", warmup, 0)
    if not works:
        raise UsageError("there is nothing to measure.")
    before = busy_seconds()
    visits = {name: calls or _calls(work, warmup, clock) for name, work in works.items()}
    taken: dict[str, list[list[float]]] = {name: [] for name in works}
    for turn in range(rounds):
        for samples in taken.values():
            samples.append([])
        for name in visit_order(list(works)):
            taken[name][-1] += _timed(works[name], visits[name], clock)
        progress(turn + 1, rounds)
    times = {name: 1e3 * np.array(samples) for name, samples in taken.items()}  # (rounds, calls)
    known = record() | dict(about or {})
    first, *rest = works
    return Measured(
        measurements=tuple(_measurement(name, values, known) for name, values in times.items()),
        comparisons=tuple(compare(first, times[first], name, times[name]) for name in rest),
        rounds=rounds,
        others=share_of_others(before, busy_seconds()),
    )


def visit_order(names: Sequence[str]) -> list[str]:
    """The order within a round: each is visited twice, symmetrically about the middle, so a linear drift cancels.

    >>> visit_order(["a", "b", "c"])
    ['a', 'b', 'c', 'c', 'b', 'a']
    """
    return [*names, *reversed(names)]


def _calls(work: Run, warmup: int, clock: Callable[[], float]) -> int:
    """Warms up, and says how many calls make a visit."""
    seconds = _timed(work, max(warmup, 1), clock)[-1]
    return max(1, min(MOST_CALLS, int(VISIT_S / max(seconds, 1e-9))))


def _timed(work: Run, calls: int, clock: Callable[[], float]) -> list[float]:
    taken = []
    for _ in range(calls):
        start = clock()
        work()
        taken.append(clock() - start)
    return taken


def _measurement(name: str, times: np.ndarray, known: dict[str, Any]) -> Measurement:
    values, spreads = quantiles(times, (0.5, 0.95, 0.99))
    return Measurement(
        name=name,
        value=values[0],
        unit="ms",
        spread=spreads[0],
        n=times.size,
        p95=values[1],
        p95_spread=spreads[1],
        p99=values[2],
        p99_spread=spreads[2],
        quickest=float(np.median(times, axis=1).min()),
        environment=known,
    )


def quantiles(
    times: np.ndarray, at: Sequence[float], *, resamples: int = 1000, seed: int = 0
) -> tuple[list[float], list[Interval]]:
    """Quantiles of all `times` (rounds, calls), and their 95 % intervals from resampled rounds.

    >>> quantiles(np.arange(100.0).reshape(50, 2), [0.5])[0]
    [49.5]
    """
    drawn = np.random.default_rng(seed).integers(0, len(times), (resamples, len(times)))
    again = np.quantile(times[drawn].reshape(resamples, -1), at, axis=1)
    ends = np.quantile(again, (0.025, 0.975), axis=1)
    return np.quantile(times, at).tolist(), [(float(low), float(high)) for low, high in ends.T]


def compare(first: str, times: np.ndarray, second: str, others: np.ndarray) -> Comparison:
    """Round by round, the median time of `second` over that of `first`; both (rounds, calls)."""
    ratios = np.median(others, axis=1) / np.median(times, axis=1)
    (ratio,), (spread,) = quantiles(ratios[:, None], [0.5])
    p_value = sign_test(int((ratios > 1).sum()), int((ratios < 1).sum()))
    differs = p_value < SIGNIFICANT and not spread[0] <= 1 <= spread[1]
    verdict = "no difference" if not differs else "slower" if ratio > 1 else "faster"
    return Comparison(
        first=first, second=second, ratio=ratio, spread=spread, rounds=len(ratios), p_value=p_value, verdict=verdict
    )


def sign_test(above: int, below: int) -> float:
    """Two-sided probability of so uneven a split, or a more uneven one, if both sides were equally likely.

    >>> sign_test(10, 0), sign_test(3, 3)
    (0.001953125, 1.0)
    """
    n, most = above + below, max(above, below)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(most, n + 1)) / 2**n)


# --- the machine ----------------------------------------------------------------------------------------------------


def record(device: str = "cpu") -> dict[str, Any]:
    """The environment of a measurement: `plan.environment`, the cores at hand and the CPU flags that decide speed."""
    known = native.processor()
    found = (known.get("flags") or known.get("Features") or "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return environment(device) | {"cores": cores, "flags": [flag for flag in FLAGS if flag in found]}


def busy_seconds() -> tuple[float, float] | None:
    """CPU time spent so far by the whole machine and by this process with its ended children; None if not Linux."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
    whole = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return whole, sum(os.times()[:4])


def share_of_others(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    """The share of the busy CPU time between two `busy_seconds` that this process did not spend.

    >>> share_of_others((10.0, 1.0), (20.0, 9.0))
    0.2
    """
    if before is None or after is None:
        return None
    whole, own = after[0] - before[0], after[1] - before[1]
    return round(max(0.0, whole - own) / whole, 3) if whole > 0 else 0.0


@contextlib.contextmanager
def controlled(threads: int) -> Generator[None]:
    """Inside: so many threads, denormals flushed, inference mode; afterwards all is as it was."""
    check_range("threads", threads, 1)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(usual)


# --- models ---------------------------------------------------------------------------------------------------------


def _eager(model: nn.Module, images: Tensor) -> Run:
    return lambda: model(images)


def _compiled(model: nn.Module, images: Tensor) -> Run:
    """`torch.compile` for this shape, weights frozen. Frozen graphs need the setting while they are traced."""
    from torch._inductor import config

    def forward(x: Tensor) -> Tensor:
        return model(x)

    # dynamo caches by code object: each model gets its own, or one would evict the other's graph
    own = FunctionType(forward.__code__.replace(), forward.__globals__, closure=forward.__closure__)
    fast = torch.compile(own, dynamic=False)
    with config.patch(freezing=True), torch.no_grad():
        fast(images)
    return lambda: fast(images)


# backend: from a model that is ready and the images that it will see, to the call that is timed
BACKENDS: dict[str, Callable[[nn.Module, Tensor], Run]] = {"eager": _eager, "compiled": _compiled}


def bench(
    networks: Sequence[Network],
    *,
    backends: Sequence[str] = ("eager",),
    batch: int = 1,
    threads: int = 1,
    size: int | None = None,
    precision: str = "float32",
    fold: bool = False,
    rounds: int = 10,
    warmup: int = 3,
    calls: int | None = None,
    start: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda done, total: None,
) -> Measured:
    """Latency of `batch` random images through each network in each backend, interleaved; random weights.

    `size`: in px, default each network's own. `fold`: batch norms are folded into the convolutions first (exports
    always are). `calls` per visit: as in `measure`. `start`: fresh processes are timed too, of every backend but
    `compiled`. Names are those of the networks, with the backend where there are several. `UsageError` for what cannot
    be.
    """
    check_range("batch", batch, 1)
    for backend in backends:
        check_choice("backend", backend, [*BACKENDS, *EXPORTED])
    works: dict[str, Run] = {}
    files: dict[str, Path] = {}
    with controlled(threads), tempfile.TemporaryDirectory() as folder:
        for network in networks:
            for backend in backends:
                name = f"{network.name} ({backend})" if len(backends) > 1 else network.name
                if name in works:
                    raise UsageError(f"{name} is named twice.")
                if backend in EXPORTED or (start and backend == "eager"):
                    files[name] = written(_at(network, size), backend, precision, Path(folder))
                if backend in EXPORTED:
                    works[name] = _exported(files[name], batch)
                else:
                    images = random_images(network, size or network.resolution, batch, precision)
                    works[name] = BACKENDS[backend](ready(network, precision=precision, fold=fold), images)
        about = {"batch": batch, "size": size, "precision": precision, "folded": fold, "backends": list(backends)}
        found = measure(works, rounds=rounds, warmup=warmup, calls=calls, clock=clock, progress=progress, about=about)
        return found.replace(starts=starts(files, batch=batch, threads=threads)) if start else found


def _at(network: Network, size: int | None) -> Model:
    """A model of `network` that is prepared for images of `size` px, as an export wants to know."""
    size = size or network.resolution
    return ready(network.replace(resolution=size, preprocess=network.preprocess.with_size(size)))


def _exported(path: Path, batch: int) -> Run:
    """The engine in a file, called with prepared images."""
    engine = open_engine(path)
    views = random_views(engine.preprocess.size, batch)
    return lambda: engine(views)


def random_images(network: Network, size: int, batch: int, precision: str) -> Tensor:
    """Normal noise, (batch, C, size, size), channels-last."""
    check_choice("precision", precision, DTYPES)
    if size < network.stride:
        raise UsageError(f"input size {size} is below the stride {network.stride} of {network.name}.")
    shape = (batch, network.stem.in_channels, size, size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return images.to(DTYPES[precision], memory_format=torch.channels_last)


def ready(network: Network, *, precision: str = "float32", fold: bool = False, seed: int = 0) -> Model:
    """A model of `network` to be timed: random weights, batch-norm statistics of random batches, evaluation mode."""
    check_choice("precision", precision, DTYPES)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        model = build(network, generator=generator)
        small = max(2 * network.stride, 64)
        shape = (4, network.stem.in_channels, small, small)
        renew_norms(model, (torch.randn(shape, generator=generator) for _ in range(2)))
        if fold:
            fold_norms(model)
        return model.eval().to(DTYPES[precision], memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]


# --- tables of measured operators -----------------------------------------------------------------------------------


def table_path(
    *, backend: str = "eager", precision: str = "float32", threads: int = 1, quantity: Quantity = "forward"
) -> Path:
    """The file of this machine's table: its name says what the table is valid for."""
    machine = "-".join(str(environment()["processor"] or platform.machine()).replace("(R)", "").split())
    name = f"latency-{quantity}-{machine}-{backend}-{precision}-{threads}t-torch{torch.__version__}.json"
    return cache_folder() / name.replace("/", "-")


def save_table(made: LatencyTable) -> Path:
    """Writes the table to where `table` finds it."""
    from effnet.files import write_atomically

    path = table_path(backend=made.backend, precision=made.precision, threads=made.threads, quantity=made.quantity)
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        temporary.write_text(made.to_json())

    write_atomically(path, write)
    return path


def table(
    *, backend: str = "eager", precision: str = "float32", threads: int = 1, quantity: Quantity = "forward"
) -> LatencyTable:
    """The table that was measured on this machine. `UsageError` where there is none, with the command that makes it."""
    check_choice("backend", backend, BACKENDS)
    check_choice("precision", precision, DTYPES)
    check_range("threads", threads, 1)
    path = table_path(backend=backend, precision=precision, threads=threads, quantity=quantity)
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob("latency-*.json")) if path.parent.is_dir() else []
        have = f" There are tables of other settings or machines: {', '.join(others)}." if others else ""
        options = f" --threads {threads}" * (threads != 1) + f" --precision {precision}" * (precision != "float32")
        raise UsageError(
            f"no latencies were measured for {quantity}, {backend}, {precision}, {threads} threads on this machine: "
            f"run `effnet bench --table{options}` (two to four minutes).{have}"
        )
    found = LatencyTable.from_json(path.read_text())
    if found.device != environment()["processor"]:
        raise UsageError(f"{path} is of another processor, {found.device}: run `effnet bench --table`.")
    return found

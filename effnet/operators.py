"""How long does each kind of operator take on this machine? The grids of a `LatencyTable`, measured one by one.

Every node of every grid is a module of `layers.py` (or the function that it calls) on random input, in inference mode
and channels-last, as `bench` runs models. Two things make an operator alone quicker than in a network, and are undone:
the weights are others at every call, so that they are not in the cache already, while the input is, as in a network;
and what is left of the difference is fitted on whole networks.

Other programs only ever make a call slower. So with one thread the clock is that thread's own, and everything, networks
included, is visited several times with a minute or so in between, in random order; of the medians of these visits the
quickest counts. The table is of a quiet machine.
"""

import functools
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet.bench import BACKENDS, DTYPES, busy_seconds, controlled, random_images, ready, record, share_of_others
from effnet.families import get
from effnet.latency import MAPS, Grid, LatencyTable, axes_of, error_of, fitted, random_networks
from effnet.layers import Activation, Convolution, MaxPool, SqueezeExcite
from effnet.plan import environment
from effnet.spec import Conv, Network
from effnet.value import check_choice

WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
COARSE = (8, 32, 64, 128, 256, 512, 1024, 2048)
DENSE = (8, 16, 32, 48, 64, 96, 128, 192, 256, 512)
SIZES = (1, 2, 4, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160)
SOME = (1, 4, 7, 14, 28, 56, 112)

# kind: the nodes of its axes (`latency.AXES`), pixels as the side of a square
NODES: dict[str, tuple[tuple[int, ...], ...]] = {
    "pointwise/1": (WIDTHS, WIDTHS, SIZES),
    "pointwise/2": (COARSE[1:], COARSE[1:], (1, 4, 7, 14, 28, 56)),
    "dense/1": ((3, 5), DENSE, DENSE, SOME),
    "dense/2": ((3, 5), DENSE, DENSE, SOME),
    "stem/1": ((3, 7), (1, 3), (8, 16, 32, 64), (14, 28, 56, 112, 160)),
    "stem/2": ((3, 7), (1, 3), (8, 16, 32, 64), (14, 28, 56, 112, 160)),
    "depthwise/1": ((3, 5, 7), WIDTHS, SIZES[1:]),
    "depthwise/2": ((3, 5, 7), WIDTHS, SIZES[1:]),
    "gate": (COARSE, (1, 4, 16, 64, 128), SOME),
    "linear": ((64, 256, 1024, 2560), (10, 100, 1000), (1, 8, 64)),
} | dict.fromkeys(MAPS, (WIDTHS[::2], SIZES))
NODES["max_pool"] = ((16, 64, 256), SOME)  # only stems have one

MOST_MACS, MOST_ELEMENTS = 2e8, 5e6  # of a node; beyond, time is taken to grow with the pixels
NOISE = 10**7  # elements that weights are cut from, in turn: about a network's, more than the second-level cache holds
CALLS, PASSES, NETWORK_VISITS = 5, 3, 2  # visits of each network per pass
FITTED_ON, JUDGED_ON = (16, 1), (30, 2)  # networks and seed

Progress = Callable[[int, int], None]
Shape = tuple[int, ...]


def build_table(
    *, precision: str = "float32", threads: int = 1, seed: int = 0, progress: Progress = lambda done, total: None
) -> LatencyTable:
    """Measures the table of this machine: operators, networks to fit the factors on, and others to state the error.

    Takes two to four minutes on one core, and 3 GB of memory. `progress` is told how many of how many steps are done.
    """
    check_choice("precision", precision, DTYPES)
    before = busy_seconds()
    known, judges = random_networks(*FITTED_ON), random_networks(*JUDGED_ON)
    nodes: list[Any] = [(kind, shape) for kind in NODES for shape in _shapes(kind) if _is_measured(kind, shape)]
    quickest: dict[Any, float] = {}
    clock = time.thread_time if threads == 1 else time.perf_counter
    with controlled(threads):
        operators = Operators(precision, seed)
        runs = {network.name: _run(network, precision) for network in (*known, *judges)}
        todo = nodes + [*runs] * NETWORK_VISITS
        for turn in range(PASSES):
            for step, key in enumerate(random.Random(seed + turn).sample(todo, len(todo))):
                calls = [runs[key]] * CALLS if isinstance(key, str) else operators.calls(*key)
                quickest[key] = min(quickest.get(key, math.inf), _milliseconds(calls, clock))
                progress(turn * len(todo) + step + 1, PASSES * len(todo))
    table = LatencyTable(
        device=str(environment()["processor"]),
        backend="eager",
        precision=precision,
        threads=threads,
        torch=torch.__version__,
        grids=tuple(_grid(kind, quickest) for kind in NODES),
        environment=record() | {"threads": threads},
    )
    table = table.replace(factors=fitted([table.features(n) for n in known], [quickest[n.name] for n in known]))
    others = share_of_others(before, busy_seconds())
    error = error_of([table.predict(n) for n in judges], [quickest[n.name] for n in judges], others)
    return table.replace(error=error)


def _run(network: Network, precision: str) -> Callable[[], Any]:
    """A pass of one random image through the network, as `bench` times it."""
    images = random_images(network, network.resolution, 1, precision)
    return BACKENDS["eager"](ready(network, precision=precision), images)


def _milliseconds(calls: Sequence[Callable[[], Any]], clock: Callable[[], float]) -> float:
    """The median of the calls, after the first has been made once more."""
    calls[0]()
    times = []
    for call in calls:
        start = clock()
        call()
        times.append(clock() - start)
    return 1e3 * statistics.median(times)


def _shapes(kind: str) -> list[Shape]:
    """All nodes of a grid; the last coordinate is a side of the map, or the images of a batch."""
    return list(itertools.product(*NODES[kind]))


def _is_measured(kind: str, shape: Shape) -> bool:
    """Small enough to be worth the time; every row starts with a node that is."""
    *channels, side = shape
    if kind == "linear":
        return True
    pixels = side * side
    elements = max(channels[-1], channels[0]) * pixels * (4 if kind.endswith("/2") or kind == "max_pool" else 1)
    per_pixel = math.prod(channels) * (channels[0] if kind.startswith(("dense", "stem")) else 1)
    macs = pixels * per_pixel if kind.startswith(("dense", "stem", "pointwise")) else 0
    return side == NODES[kind][-1][0] or (macs <= MOST_MACS and elements <= MOST_ELEMENTS)


def _grid(kind: str, found: dict[tuple[str, Shape], float]) -> Grid:
    """The measured nodes; one that is too large continues its row, in proportion to the pixels."""
    times: list[float] = []
    for shape in _shapes(kind):
        if (kind, shape) in found:
            times.append(round(found[kind, shape], 5))
        else:
            sides = NODES[kind][-1]
            before = sides[sides.index(shape[-1]) - 1]
            times.append(round(times[-1] * (shape[-1] / before) ** 2, 5))
    *channels, last = NODES[kind]
    last = last if kind == "linear" else tuple(side * side for side in last)
    nodes = tuple(tuple(float(node) for node in axis) for axis in (*channels, last))
    return Grid(kind=kind, axes=axes_of(kind), nodes=nodes, ms=tuple(times))


# --- one operator ---------------------------------------------------------------------------------------------------


class Operators:
    """Operators on random weights and inputs, ready to be called inside `bench.controlled`."""

    def __init__(self, precision: str, seed: int) -> None:
        self.dtype = DTYPES[precision]
        self.network = get("efficientnet_b0")  # SiLU, symmetric padding
        self.noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(seed)).to(self.dtype)
        self.next = 0

    def calls(self, kind: str, shape: Shape) -> list[Callable[[], Any]]:
        """The calls to time: modules with weights of their own, all on the same input."""
        family, _, stride = kind.partition("/")
        *channels, side = shape
        if family in MAPS:
            return [self._map(family, channels[0], side)] * CALLS
        if family == "linear":
            x = self._noise((side, channels[0]))
            return self._modules(lambda: nn.Linear(channels[0], channels[1], device="meta"), x)
        if family == "gate":
            reduce, expand = (_conv(*pair, 1, 1, 1, bias=True) for pair in (channels, channels[::-1]))
            x = self._noise((1, channels[0], side, side))
            return self._modules(lambda: SqueezeExcite(reduce, expand, self.network), x)
        kernel = 1 if family == "pointwise" else channels.pop(0)
        groups = channels[0] if family == "depthwise" else 1
        conv = _conv(channels[0], channels[-1], kernel, int(stride), side, groups=groups)
        x = self._noise((1, conv.in_channels, conv.in_size, conv.in_size))
        return self._modules(lambda: Convolution(conv, self.network.padding), x)

    def _map(self, kind: str, channels: int, side: int) -> Callable[[], Any]:
        x = self._noise((1, channels, side, side)).clone()  # activations work in place
        if kind in ("silu", "relu6", "relu"):
            activation = Activation(kind)
            return lambda: activation(x)
        if kind == "norm":
            norm = nn.BatchNorm2d(channels, dtype=self.dtype).eval()
            return lambda: norm(x)
        if kind == "max_pool":
            large, pool = self._noise((1, channels, 2 * side, 2 * side)), MaxPool("symmetric")
            return lambda: pool(large)
        other = self._noise((1, channels, side, side)).clone()
        work: dict[str, Callable[[], Any]] = {
            "add": lambda: x + other,
            "pad": lambda: F.pad(x, (0, 1, 0, 1)),
            "mean": lambda: x.mean((2, 3)),
        }
        return work[kind]

    def _modules(self, make: Callable[[], nn.Module], x: Tensor) -> list[Callable[[], Any]]:
        x, works = x.clone(memory_format=torch.preserve_format), []
        for _ in range(CALLS):
            with torch.device("meta"):
                module = make().eval()
            for part in module.modules():
                for name, weight in part.named_parameters(recurse=False):
                    part.register_parameter(name, nn.Parameter(self._noise(tuple(weight.shape)), requires_grad=False))
            works.append(functools.partial(module, x))
        return works

    def _noise(self, shape: tuple[int, ...]) -> Tensor:
        """A stretch of the noise that was not used lately, as a tensor; four dimensions are channels-last."""
        count = math.prod(shape)
        if self.next + count > self.noise.numel():
            self.next = 0
        flat = self.noise[self.next : self.next + count]
        self.next += -(-count // 64) * 64  # keeps the alignment
        if len(shape) != 4:
            return flat.view(shape)
        images, channels, height, width = shape
        return flat.view(images, height, width, channels).permute(0, 3, 1, 2)


def _conv(
    inside: int, outside: int, kernel: int, stride: int, side: int, *, groups: int = 1, bias: bool = False
) -> Conv:
    """A convolution onto a map of `side` x `side`."""
    return Conv(
        name="conv",
        in_channels=inside,
        out_channels=outside,
        kernel=kernel,
        stride=stride,
        groups=groups,
        in_size=stride * side,
        out_size=side,
        bias=bias,
    )

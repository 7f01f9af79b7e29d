"""How long will a network take on this machine, before it is built? Measured operators, summed over units.

MACs do not say: on one core a depthwise multiply-add costs several times a dense one, and a small network is made of
call overhead. `effnet bench --table` measures every kind of operator that blocks are made of (`bench.build_table`) on a
grid of shapes. Here a unit of `spec.resolve` is taken apart into those operators (`pieces`), each is looked up by
interpolation on logarithmic axes, and the sum is corrected by a few factors fitted on measured networks: an operator
alone runs with warmer caches than in a network, and a network has overhead of its own.

The table says how far off it was on networks that it was not fitted on (`Error`); whoever prints a prediction prints
that too. A prediction is for the backend, precision, threads and quantity of its table only.
"""

import functools
import math
import operator
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from effnet import families
from effnet.cost import candidates, cost, present, scalings
from effnet.spec import Conv, Network, Unit, multiply, resolve
from effnet.value import UsageError, Value, check_choice, check_range

if TYPE_CHECKING:
    import numpy as np

Quantity = Literal["forward", "train_step"]
TARGET = 0.10  # the median relative error that a table should reach
PRIOR = {"overhead": 0.0, "unit": 0.0, "dense": 1.0, "depthwise": 1.0, "norm": 1.0, "gate": 1.0, "map": 1.0}
FACTORS = tuple(PRIOR)  # what is fitted: see `features`


@dataclass(frozen=True, kw_only=True)
class Grid(Value):
    """The measured milliseconds of one kind of operator at every combination of the nodes of its axes.

    `ms` is flat, last axis fastest. Between nodes the logarithm of the time is linear in the logarithms of the
    coordinates; beyond the last node it goes on so, below the first it stays.
    """

    kind: str
    axes: tuple[str, ...]
    nodes: tuple[tuple[float, ...], ...]
    ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.nodes) != len(self.axes) or math.prod(map(len, self.nodes)) != len(self.ms):
            raise UsageError(f"grid {self.kind} has {len(self.ms)} times for axes of {[len(n) for n in self.nodes]}.")
        if min(self.ms, default=0) <= 0:
            raise UsageError(f"grid {self.kind} holds a time that is not above 0.")

    def at(self, *point: Any) -> "np.ndarray":
        """The milliseconds at a point, or at arrays of points (broadcast against each other).

        >>> grid = Grid(kind="add", axes=("pixels",), nodes=((1, 4, 16),), ms=(1.0, 2.0, 8.0))
        >>> grid.at([1, 2, 4, 32]).round(3).tolist()  # sqrt(2) between 1 and 2, then with the slope of the end
        [1.0, 1.414, 2.0, 16.0]
        """
        import numpy as np

        nodes, values = self._logarithms
        corners, shares = [], []
        for axis, coordinate in zip(nodes, np.broadcast_arrays(*point), strict=True):
            x = np.log(coordinate)
            if len(axis) == 1:
                corners.append((np.zeros(x.shape, int),))
                shares.append((np.ones(x.shape),))
                continue
            low = np.clip(np.searchsorted(axis, x, side="right") - 1, 0, len(axis) - 2)
            share = np.maximum((x - axis[low]) / (axis[low + 1] - axis[low]), 0.0)
            corners.append((low, low + 1))
            shares.append((1 - share, share))
        total: Any = 0.0
        for choice in np.ndindex(*map(len, corners)):
            index = tuple(corners[axis][side] for axis, side in enumerate(choice))
            weight = math.prod(shares[axis][side] for axis, side in enumerate(choice))
            total = total + weight * values[index]
        return np.exp(total)

    @functools.cached_property
    def _logarithms(self) -> "tuple[list[np.ndarray], np.ndarray]":
        import numpy as np

        return [np.log(axis) for axis in self.nodes], np.log(self.ms).reshape([len(axis) for axis in self.nodes])


@dataclass(frozen=True, kw_only=True)
class Error(Value):
    """Relative errors |predicted / measured - 1| of `networks` networks that the table was not fitted on, at batch 1.

    `others`: the share of busy CPU time that other programs took while the table was made, None where unknown.
    """

    median: float
    p90: float
    worst: float
    networks: int
    others: float | None = None

    def __str__(self) -> str:
        return (
            f"predicted against measured on {self.networks} other networks: median error {self.median:.1%}, "
            f"90 % of them within {self.p90:.1%}"
        )


def error_of(predicted: Sequence[float], measured: Sequence[float], others: float | None = None) -> Error:
    """The errors of predictions, as the table states them.

    >>> print(error_of([1.1, 2.0, 2.7], [1.0, 2.0, 3.0]))
    predicted against measured on 3 other networks: median error 10.0%, 90 % of them within 10.0%
    """
    import numpy as np

    off = np.abs(np.asarray(predicted, float) / np.asarray(measured, float) - 1)
    median, p90 = (float(round(value, 4)) for value in np.quantile(off, (0.5, 0.9)))
    return Error(median=median, p90=p90, worst=round(float(off.max()), 4), networks=len(off), others=others)


@dataclass(frozen=True, kw_only=True)
class LatencyTable(Value):
    """What was measured on one machine: the grids, the fitted `factors` (see `features`) and the stated `error`.

    `quantity`: what the milliseconds are of, a forward pass or a training step. `device`: the processor.
    """

    device: str
    backend: str
    precision: str
    threads: int
    torch: str
    grids: tuple[Grid, ...]
    factors: dict[str, float] = field(default_factory=PRIOR.copy)
    error: Error | None = None
    quantity: Quantity = "forward"
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("latency quantity", self.quantity, get_args(Quantity))
        for name in self.factors:
            check_choice("latency factor", name, FACTORS)

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.device}, {threads}, {self.backend}, {self.precision}, torch {self.torch}"

    def predict(self, network: Network, size: int | None = None, batch: int = 1) -> float:
        """Milliseconds of `network` for `batch` images of `size` px (default: its resolution).

        The stated error is of batch 1; at other batches the images of a batch count as so many more pixels.
        `UsageError` if `size` is below the network's stride.
        """
        check_range("batch", batch, 1)
        return self._sum(self.features(network, size, batch))

    def features(self, network: Network, size: int | None = None, batch: int = 1) -> dict[str, Any]:
        """What the factors multiply, for `network`: 1, and the sums of `features` over its units.

        Units are remembered: the networks of a search share most of them.
        """
        units, setting = resolve(network, size), (network.activation, network.padding, network.stem.pool, batch)
        total = [0.0] * len(FACTORS)
        for unit, before in zip(units, (units[0], *units), strict=False):
            key = (setting, _geometry(unit), before.out_channels, before.out_size)
            found = self._known.get(key)
            if found is None:
                values = features(unit, before, network, batch, self.piece).values()
                found = self._known[key] = tuple(float(value) for value in values)
            total = [a + b for a, b in zip(total, found, strict=True)]
        return dict(zip(FACTORS, total, strict=True)) | {"overhead": 1.0}

    def predictions(
        self, network: Network, *, width: Any = 1.0, depth: Any = 1.0, resolution: Any = None, batch: int = 1
    ) -> "np.ndarray":
        """Milliseconds of many scaled candidates: arguments as `cost.costs` takes them, values as `predict` gives."""
        import numpy as np

        check_range("batch", batch, 1)
        width, depth, size = scalings(network, width, depth, resolution)
        total, before = dict.fromkeys(FACTORS, np.zeros(width.size)), None
        for unit, times in candidates(network, width.ravel(), depth.ravel(), size.ravel()):
            for name, value in features(unit, before, network, batch, self.piece).items():
                total[name] = total[name] + times * value
            before = unit
        return self._sum(total | {"overhead": 1.0}).reshape(width.shape)

    def _sum(self, parts: dict[str, Any]) -> Any:
        return sum(self.factors[name] * value for name, value in parts.items())

    def piece(self, kind: str, point: tuple[Any, ...]) -> "np.ndarray":
        """The milliseconds of one operator, alone. `UsageError` for a kind that was not measured."""
        if kind not in self._grids:
            check_choice("operator", kind, self._grids)
        return self._grids[kind].at(*point)

    @functools.cached_property
    def _grids(self) -> dict[str, Grid]:
        return {grid.kind: grid for grid in self.grids}

    @functools.cached_property
    def _known(self) -> dict[tuple[Any, ...], tuple[float, ...]]:
        return {}


# --- a unit as operators --------------------------------------------------------------------------------------------

Piece = tuple[str, tuple[Any, ...], Any]  # kind of grid, coordinates on its axes, how often (numbers or arrays)

AXES: dict[str, tuple[str, ...]] = {
    "pointwise": ("in_channels", "out_channels", "pixels"),
    "dense": ("kernel", "in_channels", "out_channels", "pixels"),
    "stem": ("kernel", "in_channels", "out_channels", "pixels"),
    "depthwise": ("kernel", "channels", "pixels"),
    "gate": ("channels", "squeeze", "pixels"),
    "linear": ("in_channels", "out_channels", "images"),
}
MAPS = ("norm", "silu", "relu6", "relu", "add", "pad", "max_pool", "mean")  # work on a map, element by element
AXES |= dict.fromkeys(MAPS, ("channels", "pixels"))


def axes_of(kind: str) -> tuple[str, ...]:
    """The names of the axes of a grid; `dense/2` has those of `dense`."""
    return AXES[kind.partition("/")[0]]


def pieces(unit: Unit, network: Network, batch: int = 1) -> Iterator[Piece]:
    """The operators that run for a unit, in order; numbers in a unit may be arrays of candidates.

    A convolution's kind carries its stride: `dense/2`. `pixels`: of its output, over all images of the batch.
    """
    for conv in unit.convs:
        pixels = batch * conv.out_size * conv.out_size
        if conv.name == "linear":
            yield "linear", (conv.in_channels, conv.out_channels, batch), 1
        elif conv.name == "se.reduce":
            yield "gate", (conv.in_channels, conv.out_channels, batch * unit.out_size * unit.out_size), 1
        elif conv.name != "se.expand":
            there = present(conv)
            if network.padding == "same" and conv.stride == 2 and conv.kernel > 1:
                yield "pad", (conv.in_channels, batch * conv.in_size * conv.in_size), there * (conv.in_size % 2 == 0)
            yield _convolution(conv, unit), _coordinates(conv, unit, pixels), there
            yield "norm", (conv.out_channels, pixels), there
            if conv.activation:
                yield network.activation, (conv.out_channels, pixels), there
    pixels = batch * unit.out_size * unit.out_size
    if unit.op == "stem" and network.stem.pool:
        yield "max_pool", (unit.out_channels, pixels), 1
    if unit.shortcut is not False:
        yield "add", (unit.out_channels, pixels), 1 * unit.shortcut
    if unit.op in ("basic", "bottleneck"):
        yield network.activation, (unit.out_channels, pixels), 1


def _convolution(conv: Conv, unit: Unit) -> str:
    return f"{_family(conv, unit)}/{conv.stride}"


def _family(conv: Conv, unit: Unit) -> str:
    if conv.name == "depthwise":
        return "depthwise"
    return "stem" if unit.op == "stem" else "pointwise" if conv.kernel == 1 else "dense"


def _coordinates(conv: Conv, unit: Unit, pixels: Any) -> tuple[Any, ...]:
    family = _family(conv, unit)
    if family == "depthwise":
        return conv.kernel, conv.out_channels, pixels
    kernel = () if family == "pointwise" else (conv.kernel,)
    return *kernel, conv.in_channels, conv.out_channels, pixels


def features(unit: Unit, before: Unit | None, network: Network, batch: int, look_up: Any) -> dict[str, Any]:
    """What the factors multiply: one unit, and the milliseconds of its operators by their nature; numbers or arrays.

    `dense`: convolutions over all channels, and the classifier; `depthwise`; `norm`; `gate`: squeeze-excite; `map`: all
    other work on maps, with the pooling of the unit `before` a classifier.
    """
    total: dict[str, Any] = dict.fromkeys(FACTORS, 0.0) | {"unit": 1.0}
    for kind, point, there in pieces(unit, network, batch):
        name = _FACTOR_OF.get(kind.partition("/")[0], "map")
        total[name] = total[name] + there * look_up(kind, point)
    if unit.op == "classifier" and before is not None:
        total["map"] = look_up("mean", (before.out_channels, batch * before.out_size * before.out_size))
    return total


_geometry = operator.attrgetter(
    "op", "in_channels", "mid_channels", "squeeze_channels", "out_channels", "kernel", "stride", "in_size", "shortcut"
)
_FACTOR_OF = dict.fromkeys(("pointwise", "dense", "stem", "linear"), "dense") | {
    name: name for name in ("depthwise", "norm", "gate")
}


def fitted(rows: Sequence[dict[str, float]], measured: Sequence[float], weight: float = 0.03) -> dict[str, float]:
    """Factors for `rows` of features, so that they give the `measured` milliseconds with small *relative* errors.

    Least squares with non-negative factors, held near 1 (overheads near 0) by `weight`: where the networks cannot tell
    two factors apart, an operator costs what it was measured to cost.
    """
    import numpy as np

    prior = np.array([*PRIOR.values()])
    scale = np.asarray(measured, float)
    design = np.array([[row[name] for name in FACTORS] for row in rows]) / scale[:, None]
    size = np.sqrt((design**2).mean(0)) + 1e-12  # a factor's usual share of the time
    ridge = np.sqrt(weight * len(rows)) * np.diag(size)
    left, right = np.vstack([design, ridge]), np.concatenate([np.ones(len(rows)), ridge @ prior])
    free = np.ones(len(FACTORS), bool)
    for _ in FACTORS:  # those that come out negative are 0, and the others are solved again
        solution = np.zeros(len(FACTORS))
        solution[free] = np.linalg.lstsq(left[:, free], right, rcond=None)[0]
        if (solution >= 0).all():
            break
        free &= solution >= 0
    return {name: round(float(value), 5) for name, value in zip(FACTORS, np.maximum(solution, 0), strict=True)}


# --- networks to judge by -------------------------------------------------------------------------------------------

JUDGES = (
    *(f"efficientnet_b{i}" for i in range(4)),
    *(f"efficientnet_lite{i}" for i in range(3)),
    *(f"efficientnetv2_b{i}" for i in range(4)),
    "mobilenet_v1", "mobilenet_v2", "mnasnet_a1", "resnet18", "resnet34", "resnet50",
)  # fmt: skip


def random_networks(count: int, seed: int, *, most_macs: float = 2e9) -> list[Network]:
    """Members of all families, scaled at random in depth, width and resolution, of 10 M to `most_macs` MACs.

    The same `seed` gives the same networks. The families take turns, so that a few networks show all kinds of blocks.

    >>> [network.name for network in random_networks(2, seed=0)] == [n.name for n in random_networks(2, seed=0)]
    True
    """
    check_range("number of networks", count, 1)
    rng = random.Random(seed)
    order, found = rng.sample(JUDGES, len(JUDGES)), []
    while len(found) < count:
        network = families.get(order[len(found) % len(order)])
        width, depth = (round(math.exp(rng.uniform(math.log(0.4), math.log(1.6))), 2) for _ in range(2))
        size = rng.randrange(64, 321)
        name = f"{network.name} w{width:g} d{depth:g} {size}px"
        scaled = multiply(network, width=width, depth=depth, resolution=size, name=name)
        if 1e7 <= cost(scaled).macs <= most_macs:
            found.append(scaled)
    return found

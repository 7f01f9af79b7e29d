"""What does a network cost, exactly, before anything is built? Parameters, multiply-adds, activations, bytes.

Everything is a sum over the units of `spec.resolve`, so the counts cannot disagree with the module. `cost` gives one
network in full; `costs` gives thousands of scaled candidates at once, through the same unit functions on numpy arrays.

What is counted
- params: trainable weights and biases, batch-norm scale and shift; no running statistics (those are `norm_statistics`).
- macs: multiply-adds of convolutions, squeeze-excite and classifier for one image (the papers' "FLOPs").
  1 MAC is 2 FLOPs.
- activations: output elements of all convolutions and the classifier for one image (Radosavovic et al. 2020).
- weight_bytes: what a float32 file of the state holds: parameters and running statistics.
- saved_elements: elements that the backward pass keeps for one image, by the rules in `_saved`.
- training_bytes: an estimate, `training_bytes()` says of what.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effnet.spec import Conv, Network, Stage, Unit, block, head_units, resolve, stem_unit
from effnet.value import UsageError, Value, check_choice, check_range

if TYPE_CHECKING:
    import numpy as np

METRICS = ("params", "macs", "activations", "weight_bytes", "training_bytes")


@dataclass(frozen=True, kw_only=True)
class UnitCost(Value):
    """One row of the table: sizes in pixels, counts for one image."""

    name: str
    op: str
    kernel: int
    stride: int
    in_channels: int
    out_channels: int
    squeeze_channels: int
    in_size: int
    out_size: int
    params: int
    norm_statistics: int
    macs: int
    activations: int
    saved_elements: int


@dataclass(frozen=True, kw_only=True)
class Cost(Value):
    """The totals for one image at `size` px, and training memory in bytes at `batch` images."""

    network: str
    size: int
    batch: int
    params: int
    norm_statistics: int
    macs: int
    activations: int
    weight_bytes: int
    saved_elements: int
    training_bytes: int
    units: tuple[UnitCost, ...]


@dataclass(frozen=True, kw_only=True)
class Budget(Value):
    """A limit on one metric of `Cost` at `size` px (None: the network's own)."""

    metric: str
    limit: float
    size: int | None = None

    def __post_init__(self) -> None:
        check_choice("budget metric", self.metric, METRICS)
        check_range(f"budget on {self.metric}", self.limit, 1)

    def allows(self, spent: Cost) -> bool:
        """Whether the cost is within the limit."""
        return getattr(spent, self.metric) <= self.limit


def cost(network: Network, size: int | None = None, batch: int = 1) -> Cost:
    """What `network` costs at `size` px (default: its resolution). `UsageError` if `size` is below its stride.

    >>> from effnet.families import get
    >>> b0 = cost(get("efficientnet_b0"))
    >>> b0.params, b0.macs
    (5288548, 385814752)
    """
    check_range("batch", batch, 1)
    size = network.resolution if size is None else size
    units = resolve(network, size)
    read = [False, *(_rectified(unit, network) for unit in units)]
    rows = tuple(_unit_cost(unit, network, rectified) for unit, rectified in zip(units, read, strict=False))
    total = {
        name: sum(getattr(row, name) for row in rows)
        for name in ("params", "norm_statistics", "macs", "activations", "saved_elements")
    }
    total["saved_elements"] += _at_the_ends(network, size, units[-2], _rectified(units[-2], network))
    return Cost(
        network=network.name,
        size=size,
        batch=batch,
        weight_bytes=_weight_bytes(total),
        training_bytes=training_bytes(total, batch),
        units=rows,
        **total,
    )


def training_bytes(total: Mapping[str, Any], batch: int = 1, slots: int = 2, ema: bool = True, element: int = 4) -> Any:
    """An estimate of the memory of one training step, in bytes.

    Weights, gradients, `slots` optimizer values per parameter (RMSProp with momentum: 2) and an exponential moving
    average, all float32; plus the saved activations of `batch` images at `element` bytes (4 for float32, 2 for
    bfloat16). Left out: transient gradients, convolution workspace and the framework itself. What is saved is counted
    for PyTorch's own operators: with the compiled ones (`native`) norm and activation keep the norm's input alone, not
    SiLU's, and this is an upper estimate.
    """
    copies = 2 + slots + (1 if ema else 0)
    return 4 * (copies * total["params"] + (2 if ema else 1) * total["norm_statistics"]) + (
        batch * element * total["saved_elements"]
    )


def costs(
    network: Network, *, width: Any = 1.0, depth: Any = 1.0, resolution: Any = None, batch: int = 1
) -> dict[str, "np.ndarray"]:
    """The costs of many scaled candidates: `spec.multiply(network, width=w, depth=d, resolution=r)` for each triple.

    `width`, `depth`, `resolution`: broadcastable arrays (or numbers). Returns one int64 array per name: params,
    norm_statistics, macs, activations, saved_elements, weight_bytes, training_bytes. Exact: the same unit functions and
    rounding as `cost`. `UsageError` for factors that are not positive and finite, or a resolution below the stride.
    """
    width, depth, size = scalings(network, width, depth, resolution)
    totals = _totals(network, width.ravel(), depth.ravel(), size.ravel())
    totals["weight_bytes"] = _weight_bytes(totals)
    totals["training_bytes"] = training_bytes(totals, batch)
    return {name: value.astype(int).reshape(width.shape) for name, value in totals.items()}


def scalings(network: Network, width: Any, depth: Any, resolution: Any) -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
    """Factors and sizes of many candidates, broadcast against each other and checked as `costs` says."""
    import numpy as np  # here, so that who costs one network does not wait for it

    width, depth, size = np.broadcast_arrays(
        np.asarray(width, float),
        np.asarray(depth, float),
        np.asarray(network.resolution if resolution is None else resolution, int),
    )
    for what, values, low in (("width", width, 1e-3), ("depth", depth, 1e-3), ("resolution", size, network.stride)):
        if values.size and not (values.min() >= low and values.max() < 1e6):
            raise UsageError(
                f"{what} runs from {values.min():g} to {values.max():g}; it must be at least {low:g} everywhere."
            )
    return width, depth, size


def candidates(
    network: Network, width: "np.ndarray", depth: "np.ndarray", size: "np.ndarray"
) -> Iterator[tuple[Unit, Any]]:
    """The units of many scaled candidates (flat arrays, one entry each), in order, with how often each is there.

    A stage is its first block, once, and the repeated one, `repeats - 1` times, which may be none.
    """
    import numpy as np

    rounding, stem, head = network.rounding, network.stem, network.head

    def widened(channels: int, scales: bool) -> "np.ndarray":
        return rounding.width(np.full(size.shape, channels), width if scales else np.ones(size.shape))

    unit = stem_unit(stem, size, widened(stem.width, stem.scale))
    yield unit, 1
    channels = unit.out_channels
    for stage in network.stages:
        out = widened(stage.width, True)
        repeats = rounding.repeats(stage.repeats, depth**stage.deepen)
        first = block(stage, channels, out, stage.stride, unit.out_size)
        yield first, 1
        unit = block(stage, out, out, 1, first.out_size)
        yield unit, repeats - 1
        channels = out
    for last in head_units(head, channels, widened(head.width, head.scale) if head.width else 0, unit.out_size):
        yield last, 1


def _totals(network: Network, width: "np.ndarray", depth: "np.ndarray", size: "np.ndarray") -> dict[str, Any]:
    """Sums over the units. What a unit reads (`rectified`) is what the last unit before it left that is there."""
    import numpy as np

    totals: dict[str, Any] = dict.fromkeys(
        ("params", "norm_statistics", "macs", "activations", "saved_elements"), np.zeros(size.shape, int)
    )
    last, rectified = None, 0
    for unit, times in candidates(network, width, depth, size):
        for name, value in _counts(unit, network, rectified).items():
            totals[name] = totals[name] + times * value
        if unit.op != "classifier":
            last, rectified = unit, np.where(np.asarray(times) > 0, _rectified(unit, network), rectified)
    totals["saved_elements"] += _at_the_ends(network, size, last, rectified)
    return totals


def _unit_cost(unit: Unit, network: Network, rectified: Any) -> UnitCost:
    return UnitCost(
        name=unit.name,
        op=unit.op,
        kernel=unit.kernel,
        stride=unit.stride,
        in_channels=unit.in_channels,
        out_channels=unit.out_channels,
        squeeze_channels=unit.squeeze_channels,
        in_size=unit.in_size,
        out_size=unit.out_size,
        **_counts(unit, network, rectified),
    )


def _counts(unit: Unit, network: Network, rectified: Any) -> dict[str, Any]:
    """The counts of one unit; arrays in, arrays out. `rectified`: its input is what an in-place ReLU left."""
    return counts(unit) | {"saved_elements": _saved(unit, network, rectified)}


def counts(unit: Unit) -> dict[str, Any]:
    """Params, norm statistics, macs and activations of one unit: what adds up over units whatever stands before them.

    Arrays of candidates in, arrays out.
    """
    params = norm_statistics = macs = activations = 0
    for conv in unit.convs:
        there = present(conv)
        weights = conv.kernel**2 * (conv.in_channels // conv.groups) * conv.out_channels
        params += there * (weights + (2 * conv.norm + conv.bias) * conv.out_channels)
        norm_statistics += there * 2 * conv.norm * conv.out_channels
        macs += there * weights * conv.out_size**2
        activations += there * conv.out_channels * conv.out_size**2
    return {"params": params, "norm_statistics": norm_statistics, "macs": macs, "activations": activations}


def present(conv: Conv) -> Any:
    """1, or for an array of candidates 0 where ResNet's projection is not needed because the identity fits."""
    if conv.name == "shortcut" and conv.stride == 1:
        return 1 * (conv.in_channels != conv.out_channels)
    return 1


def _saved(unit: Unit, network: Network, rectified: Any) -> Any:
    """Elements that autograd keeps of one unit for one image.

    A convolution keeps its input, which is the output of what came before; batch norm keeps its input; SiLU keeps its
    input too, while ReLU and ReLU6 work in place and keep their output. Squeeze-excite keeps means, gate and gated map,
    a max-pool its output and where it came from (64-bit indices), SAME padding its padded copy. The tests hold this
    against what autograd really keeps.
    """
    silu = network.activation == "silu"
    total = 0
    for conv in unit.convs:
        if conv.name in ("linear", "se.reduce"):
            total += conv.in_channels  # the means
        if conv.name == "linear":
            continue  # logits: the loss keeps them, not the network
        elements = present(conv) * conv.out_channels * conv.out_size**2
        total += elements * (conv.norm + (silu and conv.activation) + (conv.name != "shortcut"))
        if conv.name == "se.expand":
            total += conv.out_channels * unit.out_size**2  # the gated map, which the projection keeps
        if network.padding == "same" and conv.stride == 2 and conv.kernel > 1:
            padded = conv.in_channels * (conv.in_size + 1) ** 2
            unpadded = conv.in_channels * conv.in_size**2  # replaced by the padded one, unless its ReLU keeps it
            total += (conv.in_size % 2 == 0) * (padded - unpadded * (1 - rectified))
        if conv.norm:
            rectified = conv.activation and not silu
    if unit.op == "stem" and network.stem.pool:
        total += 3 * unit.out_channels * unit.out_size**2
    if unit.op in ("basic", "bottleneck") and silu:
        total += unit.out_channels * unit.out_size**2  # the sum, which SiLU keeps
    return total


def _rectified(unit: Unit, network: Network) -> Any:
    """Whether the unit's output is what an in-place ReLU left (0 or 1, or an array): autograd then keeps it anyway."""
    if network.activation == "silu" or (unit.op == "stem" and network.stem.pool):
        return 0
    if unit.op in ("basic", "bottleneck"):
        return 1
    return unit.convs[-1].activation * (1 - unit.shortcut)


def _at_the_ends(network: Network, size: Any, last: Any, rectified: Any) -> Any:
    """What is kept of the images, less the last map: pooling keeps nothing of it unless a ReLU does."""
    kept = (1 - rectified) * last.out_channels * last.out_size**2
    return network.stem.in_channels * size * size - kept


def _weight_bytes(total: Mapping[str, Any]) -> Any:
    return 4 * (total["params"] + total["norm_statistics"])


def stage_rows(network: Network, size: int | None = None) -> list[dict[str, Any]]:
    """The table that a paper prints: one row per run of equal blocks, its cost summed. Sizes in pixels.

    Keys: name, op, kernel, stride, expand, se, in_channels, out_channels, repeats, in_size, out_size, params, macs,
    activations.
    """
    rows: dict[str, dict[str, Any]] = {}
    for unit in cost(network, size).units:
        parts = unit.name.split(".")
        name = ".".join(parts[:2])
        stage: Stage | None = network.stages[int(parts[1])] if parts[0] == "stages" else None
        row = rows.setdefault(
            name,
            {
                "name": name,
                "op": unit.op,
                "kernel": unit.kernel,
                "stride": unit.stride,
                "expand": stage.expand if stage else None,
                "se": stage.se if stage else None,
                "in_channels": unit.in_channels,
                "out_channels": unit.out_channels,
                "repeats": 0,
                "in_size": unit.in_size,
                "out_size": unit.out_size,
                "params": 0,
                "macs": 0,
                "activations": 0,
            },
        )
        row["repeats"] += 1
        for key in ("params", "macs", "activations"):
            row[key] += getattr(unit, key)
    return list(rows.values())

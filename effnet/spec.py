"""What is a network? A frozen value, and one resolver that turns it into a list of concrete units.

A `Network` is the table a paper prints: a stem, a row per stage, a head. `resolve` walks the rows once and yields
`Unit`s (blocks) made of `Conv`s with every width, size and shortcut filled in. Cost, module, names, CAM taps and
export all read that list, so geometry is derived in one place. Nothing here imports torch: costing is quick.

The helpers that compute geometry (`block`, `half`) use plain arithmetic only, so they accept numpy arrays of candidates
as well as integers; `cost.costs` lives on that.

Sources: Tan & Le 2019 (Table 1, official code for rounding), Tan & Le 2021 (Fig. 2), He 2016, Howard 2017.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from effnet.value import UsageError, Value, check_choice, check_range, whole

Activation = Literal["silu", "relu6", "relu"]
Padding = Literal["same", "symmetric"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Method = Literal["resize_crop", "crop_resize", "squash"]
Op = Literal["mbconv", "fused", "separable", "basic", "bottleneck"]


@dataclass(frozen=True, kw_only=True)
class Rounding(Value):
    """How a scaled width or depth becomes an integer.

    Two published rules exist and give different B3s: 16 * 1.2 = 19.2 becomes 24 when a width may not fall below 90 % of
    what was asked (EfficientNetV1, `keep=0.9`) and 16 without that rule (EfficientNetV2's code, `keep=0`).
    """

    divisor: int = 8
    keep: float = 0.9
    depth: Literal["ceil", "round"] = "ceil"

    def __post_init__(self) -> None:
        check_range("rounding divisor", self.divisor, 1)
        check_range("rounding keep", self.keep, 0, 1)
        check_choice("depth rounding", self.depth, ("ceil", "round"))

    def width(self, channels: Any, factor: Any = 1.0) -> Any:
        """`channels * factor`, to the nearest multiple of `divisor`, halves up, never below `divisor`.

        Takes numbers or numpy arrays of candidates, as everything here that is written without `if`.

        >>> Rounding().width(16, 1.2), Rounding(keep=0.0).width(16, 1.2)
        (24, 16)
        """
        wanted = channels * factor
        rounded = (wanted + self.divisor / 2) // self.divisor * self.divisor
        rounded = rounded + (rounded < self.divisor) * (self.divisor - rounded)
        rounded = rounded + (rounded < self.keep * wanted) * self.divisor
        scaled = factor != 1  # a factor of 1 leaves a width as it was written, multiple or not
        return whole(rounded * scaled + channels * (1 - scaled))

    def repeats(self, repeats: int, factor: Any = 1.0) -> Any:
        """`repeats * factor` as a whole number of layers, at least one; numbers or arrays.

        >>> Rounding().repeats(3, 1.1), Rounding().repeats(10, 1.1)
        (4, 11)
        """
        wanted = repeats * factor  # 10 * 1.1 is 11.000000000000002 in binary: not twelve layers
        layers = -(-(wanted - 1e-9) // 1) if self.depth == "ceil" else (wanted + 0.5) // 1
        return whole(layers + (layers < 1) * (1 - layers))


@dataclass(frozen=True, kw_only=True)
class Norm(Value):
    """Batch normalisation. `momentum` is PyTorch's (TensorFlow's 0.99 is 0.01 here)."""

    eps: float = 1e-3
    momentum: float = 0.01

    def __post_init__(self) -> None:
        check_range("norm eps", self.eps, 0)
        check_range("norm momentum", self.momentum, 0, 1)


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Preprocess(Value):
    """From a decoded image to the network's input: it belongs to the weights and travels with them.

    `method` `resize_crop`: the shorter side to `resize`, then a centre crop of `size` (timm, torchvision, Lite).
    `squash`: directly to `size` x `size`, aspect not kept (EfficientNetV2). `crop_resize`: a centre crop of
    `int(size / resize * shorter side)`, then to `size` without antialiasing (the official V1 code).
    `mean`, `std`: per channel, on the 0..1 scale.
    """

    size: int
    resize: int
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    method: Method = "resize_crop"

    def __post_init__(self) -> None:
        check_range("preprocess size", self.size, 1)
        check_range("preprocess resize", self.resize, self.size)
        check_choice("interpolation", self.interpolation, get_args(Interpolation))
        check_choice("preprocess method", self.method, get_args(Method))
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError(f"mean {self.mean} and std {self.std} need three values each, std above 0.")

    def with_size(self, size: int) -> "Preprocess":
        """The same preprocessing at another input size; the share of the image that the crop keeps stays."""
        return self.replace(size=size, resize=max(size, round(size * self.resize / self.size)))


@dataclass(frozen=True, kw_only=True)
class Stem(Value):
    """The first convolution (norm, activation), and a 3x3 max-pool of stride 2 where `pool` is 3 (ResNet)."""

    width: int
    kernel: int = 3
    stride: int = 2
    pool: int = 0
    in_channels: int = 3
    scale: bool = True  # False: width scaling leaves it alone (Lite)

    def __post_init__(self) -> None:
        check_range("stem width", self.width, 1)
        check_range("stem in_channels", self.in_channels, 1)
        _check_window("stem", self.kernel, self.stride)
        if self.pool not in (0, 3):
            raise UsageError(f"stem pool is {self.pool}; 0 (none) and 3 are known.")


@dataclass(frozen=True, kw_only=True)
class Stage(Value):
    """A row of the table: `repeats` blocks of one kind; the first has the stride, and its input width is derived.

    `expand`: the factor on the block's input width for `mbconv` and `fused`; on the *output* width for `bottleneck`
    (0.25). `se`: squeeze width as a share of the block's input width, 0 for none. `skip`: whether the identity is added
    where it fits (MnasNet's SkipOp; a `separable` block never has it, the residual ones always).
    """

    op: Op
    repeats: int
    width: int
    stride: int
    kernel: int = 3
    expand: float = 1
    se: float = 0.0
    deepen: float = 1.0  # power of the depth factor that it follows; 0: never deepened (first and last stage of Lite)
    skip: bool = True

    def __post_init__(self) -> None:
        check_choice("stage op", self.op, get_args(Op))
        check_range("stage repeats", self.repeats, 1)
        check_range("stage width", self.width, 1)
        check_range("stage expand", self.expand, 0.01)
        check_range("stage se", self.se, 0, 1)
        check_range("stage deepen", self.deepen, 0, 10)
        object.__setattr__(self, "deepen", float(self.deepen))  # true and false in files of the first version
        _check_window("stage", self.kernel, self.stride)
        if self.se and self.op not in ("mbconv", "fused"):
            raise UsageError(f"stage se is {self.se}, but {self.op} blocks have no squeeze-excite.")
        if not self.skip and self.op in ("basic", "bottleneck"):
            raise UsageError(f"stage skip is false, but {self.op} blocks are made of their shortcut.")


@dataclass(frozen=True, kw_only=True)
class Head(Value):
    """The last 1x1 convolution (none where `width` is 0), global average pooling, dropout, and the classifier."""

    width: int
    classes: int = 1000
    scale: bool = True

    def __post_init__(self) -> None:
        check_range("head width", self.width, 0)
        check_range("classes", self.classes, 1)


@dataclass(frozen=True, kw_only=True)
class Network(Value):
    """A ConvNet as data. `drop_path`: the rate that the linear ramp over all blocks runs to; `dropout`: the head's."""

    name: str
    stem: Stem
    stages: tuple[Stage, ...]
    head: Head
    resolution: int
    preprocess: Preprocess
    activation: Activation = "silu"
    norm: Norm = field(default_factory=Norm)
    padding: Padding = "symmetric"
    dropout: float = 0.0
    drop_path: float = 0.0
    rounding: Rounding = field(default_factory=Rounding)
    source: str = ""

    def __post_init__(self) -> None:
        if not self.stages:
            raise UsageError(f"network {self.name!r} has no stages; it needs at least one.")
        check_choice("activation", self.activation, get_args(Activation))
        check_choice("padding", self.padding, get_args(Padding))
        check_range("dropout", self.dropout, 0, 0.999)
        check_range("drop_path", self.drop_path, 0, 0.999)
        check_range("resolution", self.resolution, 1)

    @property
    def stride(self) -> int:
        """Input pixels per pixel of the last map; the smallest input size."""
        pool = 2 if self.stem.pool else 1
        return self.stem.stride * pool * math.prod(stage.stride for stage in self.stages)

    def with_classes(self, classes: int) -> "Network":
        """The same network with another number of outputs."""
        return self.replace(head=self.head.replace(classes=classes))

    def __str__(self) -> str:
        rows = [f"{self.name}  {self.resolution} px  {self.activation}  {self.padding} padding"]
        rows.append(f"  stem        conv{self.stem.kernel} s{self.stem.stride} -> {self.stem.width}")
        for i, s in enumerate(self.stages):
            more = (f" se{s.se:g}" if s.se else "") + ("" if s.skip else " noskip")
            rows.append(f"  stages.{i}    {s.op} e{s.expand:g} k{s.kernel} s{s.stride}{more} -> {s.width} x{s.repeats}")
        rows.append(
            f"  head        {self.head.width or 'none'} -> {self.head.classes} classes, dropout {self.dropout:g}"
        )
        return "\n".join(rows)


def multiply(
    network: Network, *, width: float = 1.0, depth: float = 1.0, resolution: int | None = None, **changes: Any
) -> Network:
    """The network with every width times `width`, every stage's repeats times `depth`, at `resolution` px.

    Rounded by the network's own `Rounding`; parts marked `scale=False` / `deepen=0` stay. `changes` sets other
    fields (a new name, dropout ...). Source: official V1 code, efficientnet_builder.py; papers' scaling tables.
    """
    check_range("width factor", width, 1e-3, 1e3)
    check_range("depth factor", depth, 1e-3, 1e3)
    rounding = network.rounding

    def widened(part: Any, factor: float) -> Any:
        return part.replace(width=rounding.width(part.width, factor)) if part.width else part

    stages = tuple(
        stage.replace(
            width=rounding.width(stage.width, width), repeats=rounding.repeats(stage.repeats, depth**stage.deepen)
        )
        for stage in network.stages
    )
    resolution = resolution or network.resolution
    scaled = {
        "stem": widened(network.stem, width if network.stem.scale else 1.0),
        "head": widened(network.head, width if network.head.scale else 1.0),
        "stages": stages,
        "resolution": resolution,
        "preprocess": network.preprocess.with_size(resolution),
    }
    return network.replace(**(scaled | changes))


# --- the resolver ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Conv:
    """One convolution (or the classifier, a 1x1 convolution on a 1x1 map), with what follows it."""

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    groups: int
    in_size: int
    out_size: int
    norm: bool = True
    bias: bool = False
    activation: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One block with every number filled in. `name` ("stages.3.1"): module path, cost row, CAM tap, export name."""

    name: str
    op: str
    in_channels: int
    mid_channels: int
    squeeze_channels: int
    out_channels: int
    kernel: int
    stride: int
    in_size: int
    out_size: int
    shortcut: bool
    drop_path: float
    convs: tuple[Conv, ...]

    def conv(self, name: str) -> Conv | None:
        """The convolution of that name, or None where the block has none."""
        return next((conv for conv in self.convs if conv.name == name), None)


def half(size: Any, stride: int) -> Any:
    """Output size of a window of `stride`: ceil(size / stride), under SAME and symmetric padding (odd kernels)."""
    return -(-size // stride)


@functools.lru_cache(maxsize=4096)
def resolve(network: Network, size: int | None = None) -> tuple[Unit, ...]:
    """The concrete units of `network` at an input of `size` x `size` pixels (default: its resolution), in order.

    Raises `UsageError` if `size` is below the network's stride.
    """
    size = network.resolution if size is None else size
    if size < network.stride:
        raise UsageError(f"input size {size} is below the stride {network.stride} of {network.name}.")
    stem = network.stem
    units = [stem_unit(stem, size)]
    channels, size = stem.width, units[0].out_size
    total, index = sum(stage.repeats for stage in network.stages), 0
    for s, stage in enumerate(network.stages):
        for r in range(stage.repeats):
            unit = block(
                stage,
                channels,
                stage.width,
                stage.stride if r == 0 else 1,
                size,
                name=f"stages.{s}.{r}",
                drop_path=network.drop_path * index / total,
            )
            units.append(unit)
            channels, size, index = stage.width, unit.out_size, index + 1
    return (*units, *head_units(network.head, channels, network.head.width, size))


def stem_unit(stem: Stem, size: Any, width: Any = None) -> Unit:
    """The stem at an input of `size`; `width` overrides its own (an array of candidates, when costing many)."""
    width = stem.width if width is None else width
    conv_size = half(size, stem.stride)
    conv = Conv(
        name="conv",
        in_channels=stem.in_channels,
        out_channels=width,
        kernel=stem.kernel,
        stride=stem.stride,
        groups=1,
        in_size=size,
        out_size=conv_size,
    )
    return Unit(
        name="stem",
        op="stem",
        in_channels=stem.in_channels,
        mid_channels=width,
        squeeze_channels=0,
        out_channels=width,
        kernel=stem.kernel,
        stride=stem.stride * (2 if stem.pool else 1),
        in_size=size,
        out_size=half(conv_size, 2) if stem.pool else conv_size,
        shortcut=False,
        drop_path=0.0,
        convs=(conv,),
    )


def head_units(head: Head, channels: Any, width: Any, size: Any) -> tuple[Unit, ...]:
    """The head convolution, where there is one, and the classifier behind the global average pooling."""

    def unit(name: str, conv: Conv) -> Unit:
        return Unit(
            name=name,
            op=name,
            in_channels=conv.in_channels,
            mid_channels=conv.in_channels,
            squeeze_channels=0,
            out_channels=conv.out_channels,
            kernel=1,
            stride=1,
            in_size=conv.in_size,
            out_size=conv.out_size,
            shortcut=False,
            drop_path=0.0,
            convs=(conv,),
        )

    units = []
    if head.width:
        units.append(unit("head", _conv("conv", channels, width, size)))
        channels = width
    linear = Conv(
        name="linear",
        in_channels=channels,
        out_channels=head.classes,
        kernel=1,
        stride=1,
        groups=1,
        in_size=1,
        out_size=1,
        norm=False,
        bias=True,
        activation=False,
    )
    return (*units, unit("classifier", linear))


def block(
    stage: Stage, in_channels: Any, out_channels: Any, stride: int, size: Any, *, name: str = "", drop_path: float = 0.0
) -> Unit:
    """One block of `stage`: the geometry of every operator (its module twin is in `layers.py`).

    `in_channels`, `out_channels` and `size` may be numpy arrays of candidates; everything derived follows.
    """
    out_size = half(size, stride)
    mid, squeeze, convs = _BLOCKS[stage.op](stage, in_channels, out_channels, stride, size, out_size)
    residual = stage.op in ("basic", "bottleneck")
    fits = stage.skip and stride == 1 and stage.op != "separable" and _equal(in_channels, out_channels)
    return Unit(
        name=name,
        op=stage.op,
        in_channels=in_channels,
        mid_channels=mid,
        squeeze_channels=squeeze,
        out_channels=out_channels,
        kernel=stage.kernel,
        stride=stride,
        in_size=size,
        out_size=out_size,
        shortcut=residual or fits,
        drop_path=drop_path,
        convs=convs,
    )


def _equal(a: Any, b: Any) -> Any:
    """Whether two widths agree: a truth value, or an array of them for arrays of candidates."""
    return True if a is b else a == b


def _conv(
    name: str,
    in_channels: Any,
    out_channels: Any,
    size: Any,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: Any = 1,
    activation: bool = True,
) -> Conv:
    return Conv(
        name=name,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel=kernel,
        stride=stride,
        groups=groups,
        in_size=size,
        out_size=half(size, stride),
        activation=activation,
    )


def _squeeze(stage: Stage, in_channels: Any, mid: Any) -> tuple[Any, tuple[Conv, ...]]:
    """Squeeze-excite: two 1x1 convolutions with bias; the squeeze width comes from the *block's input* width."""
    if not stage.se:
        return 0, ()
    squeeze = whole(in_channels * stage.se)
    squeeze = squeeze + (squeeze < 1)  # at least one
    plain = {"kernel": 1, "stride": 1, "groups": 1, "in_size": 1, "out_size": 1, "norm": False, "bias": True}
    return squeeze, (
        Conv(name="se.reduce", in_channels=mid, out_channels=squeeze, activation=True, **plain),
        Conv(name="se.expand", in_channels=squeeze, out_channels=mid, activation=False, **plain),
    )


def _mbconv(stage: Stage, in_channels: Any, out_channels: Any, stride: int, size: Any, out_size: Any) -> Any:
    """Expand 1x1, depthwise k x k, squeeze-excite, project 1x1 without activation (Sandler 2018; Tan & Le 2019)."""
    mid = in_channels if stage.expand == 1 else whole(in_channels * stage.expand)
    expand = () if stage.expand == 1 else (_conv("expand", in_channels, mid, size),)
    squeeze, gate = _squeeze(stage, in_channels, mid)
    depthwise = _conv("depthwise", mid, mid, size, kernel=stage.kernel, stride=stride, groups=mid)
    return mid, squeeze, (*expand, depthwise, *gate, _conv("project", mid, out_channels, out_size, activation=False))


def _fused(stage: Stage, in_channels: Any, out_channels: Any, stride: int, size: Any, out_size: Any) -> Any:
    """Fused-MBConv: one k x k instead of expand and depthwise; at expand 1 it is all there is (Tan & Le 2021)."""
    if stage.expand == 1:
        squeeze, gate = _squeeze(stage, in_channels, in_channels)
        if gate:
            raise UsageError("a fused block with expand 1 has no expanded map to squeeze: set se to 0.")
        return in_channels, 0, (_conv("project", in_channels, out_channels, size, kernel=stage.kernel, stride=stride),)
    mid = whole(in_channels * stage.expand)
    squeeze, gate = _squeeze(stage, in_channels, mid)
    expand = _conv("expand", in_channels, mid, size, kernel=stage.kernel, stride=stride)
    return mid, squeeze, (expand, *gate, _conv("project", mid, out_channels, out_size, activation=False))


def _separable(stage: Stage, in_channels: Any, out_channels: Any, stride: int, size: Any, out_size: Any) -> Any:
    """Depthwise then pointwise, an activation after each, no shortcut (MobileNetV1, Howard et al. 2017)."""
    depthwise = _conv(
        "depthwise", in_channels, in_channels, size, kernel=stage.kernel, stride=stride, groups=in_channels
    )
    return in_channels, 0, (depthwise, _conv("pointwise", in_channels, out_channels, out_size))


def _shortcut(in_channels: Any, out_channels: Any, stride: int, size: Any) -> tuple[Conv, ...]:
    """ResNet's projection, where the identity does not fit."""
    if stride == 1 and _equal(in_channels, out_channels) is True:  # for arrays, `cost` leaves out where it fits
        return ()
    return (_conv("shortcut", in_channels, out_channels, size, stride=stride, activation=False),)


def _basic(stage: Stage, in_channels: Any, out_channels: Any, stride: int, size: Any, out_size: Any) -> Any:
    """Two k x k convolutions around a shortcut (ResNet-18/34)."""
    first = _conv("conv1", in_channels, out_channels, size, kernel=stage.kernel, stride=stride)
    second = _conv("conv2", out_channels, out_channels, out_size, kernel=stage.kernel, activation=False)
    return out_channels, 0, (first, second, *_shortcut(in_channels, out_channels, stride, size))


def _bottleneck(stage: Stage, in_channels: Any, out_channels: Any, stride: int, size: Any, out_size: Any) -> Any:
    """1x1 down, k x k with the stride, 1x1 up (ResNet-50 and deeper; the stride in the k x k, as torchvision)."""
    mid = whole(out_channels * stage.expand)
    convs = (
        _conv("conv1", in_channels, mid, size),
        _conv("conv2", mid, mid, size, kernel=stage.kernel, stride=stride),
        _conv("conv3", mid, out_channels, out_size, activation=False),
    )
    return mid, 0, (*convs, *_shortcut(in_channels, out_channels, stride, size))


_BLOCKS = {"mbconv": _mbconv, "fused": _fused, "separable": _separable, "basic": _basic, "bottleneck": _bottleneck}


def _check_window(what: str, kernel: int, stride: int) -> None:
    check_range(f"{what} kernel", kernel, 1)
    if kernel % 2 == 0:
        raise UsageError(f"{what} kernel is {kernel}; it must be odd (1, 3, 5, ...).")
    if stride not in (1, 2):
        raise UsageError(f"{what} stride is {stride}; it must be 1 or 2.")

"""How does a network become a model? `build` turns the frozen description into modules named like its units.

The name of a unit is its module path: `stem`, `stages.2.0`, `head`, `classifier`. `taps` returns the output of any of
them, `FeatureExtractor` the maps that detection and segmentation want.

Initialisation is the official code's (Tan & Le 2019): convolutions normal with std sqrt(2 / fan-out), where a depthwise
filter has the fan-out k * k (PyTorch's own rule would say channels * k * k); classifier U(+-1/sqrt(classes)). The
baselines (MobileNet, ResNet) start by the same rule: their papers do not give one in full.
"""

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effnet.layers import BLOCKS, ConvNorm, Dropout, DropPath, Share, Stem
from effnet.spec import Network, Preprocess, resolve
from effnet.value import UsageError, nearest


class Model(nn.Module):
    """An image classifier, (N, C, H, W) -> logits (N, K), made of the units of `network`.

    The weights are allocated, not drawn: `build` does that, or a checkpoint fills them. `labels`: the name of each
    output, or None. `network` is always the truth about the module: `reset_classifier` and `set_regularisation` change
    both.
    """

    def __init__(self, network: Network, labels: Sequence[str] | None = None) -> None:
        super().__init__()
        units = {unit.name: unit for unit in resolve(network)}
        blocks = [unit for unit in units.values() if unit.op in BLOCKS]
        stages = itertools.groupby(blocks, key=lambda unit: unit.name.split(".")[1])
        (linear,) = units["classifier"].convs

        self.network = network
        self.stride = network.stride
        self.labels = None if labels is None else checked_labels(labels, network.head.classes)
        self.grad_checkpointing = False
        self.stem = Stem(units["stem"], network)
        self.stages = nn.ModuleList(
            nn.Sequential(*(BLOCKS[unit.op](unit, network) for unit in stage)) for _, stage in stages
        )
        self.head = ConvNorm(units["head"].convs[0], network) if "head" in units else nn.Identity()
        self.dropout = Dropout(network.dropout)
        self.classifier = _linear(linear.in_channels, linear.out_channels, torch.get_default_device())

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes this model's input."""
        return self.network.preprocess

    @property
    def num_classes(self) -> int:
        """The number of logits, K."""
        return self.classifier.out_features

    @property
    def num_features(self) -> int:
        """The number of channels before the classifier, C."""
        return self.classifier.in_features

    def trunk(self) -> Iterator[tuple[str, nn.Module]]:
        """The units up to the last map, by name, in order: everything but the classifier."""
        yield "stem", self.stem
        yield from named_blocks(self.stages)
        if self.network.head.width:
            yield "head", self.head

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images `x` (N, C, H, W), normalised by `preprocess`, of the weights' dtype.

        Raises `UsageError` for another shape or dtype, or for H or W below the network's stride.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, (N, num_features, ceil(H/32), ceil(W/32)): the output of `head`, or of the last block."""
        check_images(x, self.stem.conv, self.stride, self.network.name)
        features, _ = run(self.trunk(), x, recompute=self.grad_checkpointing)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Global average pooling, dropout, classifier; with `pre_logits`, what the classifier would get, (N, C)."""
        pooled = features.mean((2, 3))  # (N, C, h, w) -> (N, C)
        pooled = self.dropout(pooled)
        return pooled if pre_logits else self.classifier(pooled)

    def taps(self, x: Tensor, names: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits and the outputs of the units called `names`, one pass, gradients included (for CAM and the like).

        Raises `UsageError` for a name that is not a unit.
        """
        known = [unit.name for unit in resolve(self.network)]
        for name in names:
            if name not in known:
                raise UsageError(
                    f"{self.network.name} has no unit {name!r}; units are stem, stages.I.J, "
                    f"{'head, ' if 'head' in known else ''}classifier.{nearest(name, known)}"
                )
        check_images(x, self.stem.conv, self.stride, self.network.name)
        features, taps = run(self.trunk(), x, keep=names, recompute=self.grad_checkpointing)
        logits = self.forward_head(features)
        return logits, taps | ({"classifier": logits} if "classifier" in names else {})

    def get_classifier(self) -> nn.Linear:
        """The last layer; its weight is (K, C)."""
        return self.classifier

    def reset_classifier(self, num_classes: int, *, generator: torch.Generator | None = None) -> None:
        """Replaces the classifier, in place, by a freshly initialised one of `num_classes` outputs without labels.

        For the pooled features alone use `forward_head(features, pre_logits=True)`.
        """
        network, old = self.network.with_classes(num_classes), self.classifier.weight
        self.classifier = _linear(self.num_features, num_classes, old.device, old.dtype)
        initialise(self.classifier, generator)
        self.network, self.labels = network, None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only the units' inputs for the backward pass and computes the rest again: less memory, more time.

        Losses, gradients and running statistics are the same, bit for bit.
        """
        self.grad_checkpointing = enable

    def set_regularisation(self, dropout: float | None = None, drop_path: float | None = None) -> None:
        """Sets the head's dropout and the drop-path ramp (block i of N gets `drop_path` * i / N), also in `network`."""
        changes = {"dropout": dropout, "drop_path": drop_path}
        self.network = self.network.replace(**{name: rate for name, rate in changes.items() if rate is not None})
        self.dropout.rate = self.network.dropout
        for unit in resolve(self.network):
            for module in self.get_submodule(unit.name).children():
                if isinstance(module, DropPath):
                    module.rate = unit.drop_path

    def set_generator(self, generator: torch.Generator | None) -> None:
        """Draws dropout and drop path from `generator` (None: PyTorch's global one): training can be repeated."""
        for module in self.modules():
            if isinstance(module, Dropout | DropPath):
                module.generator = generator

    def set_share(self, share: Share | None) -> None:
        """Says which images of a larger batch the next forward passes see, so that dropout and drop path agree."""
        for module in self.modules():
            if isinstance(module, Dropout | DropPath):
                module.share = share


def label_names(model: Model) -> tuple[str, ...]:
    """The model's labels, or the numbers of its outputs when it has none."""
    return model.labels or tuple(map(str, range(model.num_classes)))


def last_tap(network: Network) -> str:
    """The unit whose output is averaged and classified: `head`, or the last block where there is no head convolution.

    >>> from effnet.families import get
    >>> last_tap(get("efficientnet_b0")), last_tap(get("resnet18"))
    ('head', 'stages.3.1')
    """
    *_, last, _classifier = resolve(network)
    return last.name


def build(network: Network, *, generator: torch.Generator | None = None) -> Model:
    """A model of `network` with the official initialisation, on the default device (or `with torch.device(...)`).

    `generator`: where the weights are drawn from, on that device. On the meta device nothing is allocated or drawn.

    >>> from effnet.families import get
    >>> with torch.device("meta"):
    ...     model = build(get("efficientnet_b0"))
    >>> sum(p.numel() for p in model.parameters())
    5288548
    """
    model = Model(network)
    if not model.classifier.weight.is_meta:
        initialise(model, generator)
    return model


def _linear(in_features: int, out_features: int, device: torch.device, dtype: torch.dtype | None = None) -> nn.Linear:
    """A dense layer whose weights are not drawn yet."""
    layer = torch.nn.utils.skip_init(nn.Linear, in_features, out_features, device=device, dtype=dtype)
    return cast(nn.Linear, layer)


def initialise(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draws every weight in `module`, in place, by the official rule; batch norm starts as the identity.

    Source: released code of Tan & Le 2019, `conv_kernel_initializer` and `dense_kernel_initializer`.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            fan_out = math.prod(part.kernel_size) * part.out_channels // part.groups
            nn.init.normal_(part.weight, std=math.sqrt(2 / fan_out), generator=generator)
        elif isinstance(part, nn.Linear):
            bound = 1 / math.sqrt(part.out_features)
            nn.init.uniform_(part.weight, -bound, bound, generator=generator)
        elif isinstance(part, nn.BatchNorm2d):
            part.reset_parameters()  # gamma 1, beta 0, mean 0, variance 1
        if isinstance(part, nn.Conv2d | nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def replace_head(model: Model, labels: Sequence[str] | int, *, generator: torch.Generator | None = None) -> Model:
    """A copy of `model` with a fresh classifier: one output per label, or that many outputs without labels.

    Raises `UsageError` for no labels, or for a label that is there twice.
    """
    classes = labels if isinstance(labels, int) else len(labels)
    names = None if isinstance(labels, int) else checked_labels(labels, classes)
    changed = copy.deepcopy(model)
    changed.reset_classifier(classes, generator=generator)
    changed.labels = names
    return changed


def checked_labels(labels: Sequence[str], classes: int) -> tuple[str, ...]:
    """`labels` as a tuple: one for each of `classes` outputs, no two alike."""
    if isinstance(labels, str) or len(labels) != classes:
        raise UsageError(f"{len(labels)} labels ({list(labels[:3])} ...) do not fit {classes} outputs.")
    twice = sorted({label for label in labels if list(labels).count(label) > 1})
    if twice:
        raise UsageError(f"labels must differ, but these are there more than once: {', '.join(twice)}.")
    return tuple(labels)


def check_images(x: Tensor, conv: nn.Conv2d, stride: int, name: str) -> None:
    """Refuses an input that the network called `name` cannot take, naming what it is and what it should be.

    `conv`: its first convolution, which knows the channels and the dtype; `stride`: the network's, the smallest size.
    """
    channels, dtype = conv.in_channels, conv.weight.dtype
    if x.ndim != 4 or x.shape[1] != channels:
        raise UsageError(f"{name} takes images of shape (N, {channels}, H, W), not {tuple(x.shape)}.")
    height, width = x.shape[2:]
    if height < stride or width < stride:
        raise UsageError(f"{name} takes images of at least {stride} x {stride} pixels, not {height} x {width}.")
    if x.dtype != dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        raise UsageError(f"{name} takes normalised {dtype} images, as its weights are, not {x.dtype}.")


# --- running units, with or without recomputation ------------------------------------------------------------------


def named_blocks(stages: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of all stages as ("stages.I.J", module)."""
    for i, stage in enumerate(stages):
        for j, block in enumerate(stage.children()):
            yield f"stages.{i}.{j}", block


def run(
    units: Iterable[tuple[str, nn.Module]], x: Tensor, *, keep: Collection[str] = (), recompute: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """`x` through `units` one after the other: the last output, and the outputs of those called one of `keep`."""
    recompute = recompute and torch.is_grad_enabled()
    kept = {}
    for name, unit in units:
        if recompute:
            contexts = functools.partial(_recomputation, unit)
            x = checkpoint(unit, x, use_reentrant=False, context_fn=contexts)
        else:
            x = unit(x)
        if name in keep:
            kept[name] = x
    return x, kept


def _recomputation(unit: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of a checkpointed unit's two passes: the second must repeat the first and leave no trace."""
    generators = {m.generator for m in unit.modules() if isinstance(m, DropPath) and m.generator is not None}
    states = {generator: generator.get_state() for generator in generators}
    return contextlib.nullcontext(), _repeating(unit, states)


@contextlib.contextmanager
def _repeating(unit: nn.Module, states: dict[torch.Generator, Tensor]) -> Generator[None]:
    """Replays the random `states` and leaves the running statistics alone, which a second pass would move twice.

    Momentum 0 rather than `track_running_stats=False`: the latter saves fewer tensors, which `checkpoint` refuses.
    """
    norms = [module for module in unit.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    now = {generator: generator.get_state() for generator in states}
    for generator, state in states.items():
        generator.set_state(state)
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
        for generator, state in now.items():
            generator.set_state(state)


# --- maps for dense tasks ------------------------------------------------------------------------------------------


BEFORE_POOL = "stem.activation"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A map worth keeping: the module path it comes out of, its channels, and input pixels per pixel of the map."""

    name: str
    channels: int
    reduction: int


def endpoints(network: Network) -> tuple[Endpoint, ...]:
    """The last map of each resolution, largest first: what comes just before each stride, and the last block.

    The `reduction_1..5` of the official code. Where a max-pool hides in the stem (ResNet) the map before it counts too.

    >>> from effnet.families import get
    >>> for point in endpoints(get("efficientnet_b0")):
    ...     print(point.name, point.channels, point.reduction)
    stages.0.0 16 2
    stages.1.1 24 4
    stages.2.1 40 8
    stages.4.2 112 16
    stages.6.0 320 32
    """
    stem, reduction, last = network.stem, 1, {}
    if stem.pool:
        last[stem.stride] = Endpoint(name=BEFORE_POOL, channels=stem.width, reduction=stem.stride)
    for unit in resolve(network):
        if unit.op not in ("head", "classifier"):
            reduction *= unit.stride
            last[reduction] = Endpoint(name=unit.name, channels=unit.out_channels, reduction=reduction)
    return tuple(last.values())


@dataclass(frozen=True, kw_only=True)
class FeatureInfo:
    """What the maps of a `FeatureExtractor` are, in the order in which they are returned."""

    points: tuple[Endpoint, ...]

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [point.channels for point in self.points]

    def reduction(self) -> list[int]:
        """Input pixels per pixel of each map."""
        return [point.reduction for point in self.points]

    def module_name(self) -> list[str]:
        """Module path of each map."""
        return [point.name for point in self.points]


class FeatureExtractor(nn.Module):
    """The maps of `model` at its strides (2, 4, 8, 16, 32), for detection and segmentation.

    Shares the model's modules under the same names, without head, classifier and whatever follows the last map asked
    for. `out_indices`: which of `endpoints`, by default all; negative ones count from the end. The maps come largest
    first. Raises `UsageError` for an index that is not there.
    """

    def __init__(self, model: Model, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        points = endpoints(model.network)
        indices = range(len(points)) if out_indices is None else out_indices
        wrong = [index for index in indices if not -len(points) <= index < len(points)]
        if wrong or not indices:
            raise UsageError(f"out_indices {list(indices)}: {model.network.name} has maps 0 to {len(points) - 1}.")
        chosen = sorted({index % len(points) for index in indices})
        self.network = model.network
        self.stride = model.stride
        self.feature_info = FeatureInfo(points=tuple(points[index] for index in chosen))
        self.grad_checkpointing = model.grad_checkpointing
        self.stem = model.stem
        self.stages = _up_to(model.stages, self.feature_info.points[-1].name)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (N, C, H, W) -> one map (N, channels, ceil(H/reduction), ceil(W/reduction)) per endpoint."""
        check_images(x, self.stem.conv, self.stride, self.network.name)
        names = self.feature_info.module_name()
        before_pool = self.stem.before_pool(x)
        stem = self.stem.pool(before_pool)
        _, blocks = run(named_blocks(self.stages), stem, keep=names, recompute=self.grad_checkpointing)
        maps = {BEFORE_POOL: before_pool, "stem": stem} | blocks
        return [maps[name] for name in names]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `Model.set_grad_checkpointing`, for the blocks."""
        self.grad_checkpointing = enable


def _up_to(stages: nn.ModuleList, name: str) -> nn.ModuleList:
    """The stages up to the one that ends with the block called `name`; none for a map of the stem."""
    last = int(name.split(".")[1]) if name.startswith("stages.") else -1
    return stages[: last + 1]

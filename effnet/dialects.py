"""What do others call our weights? One map of names per code base, derived from the units of a network, used both ways.

A *dialect* is a code base's naming: timm, torchvision, lukemelas (efficientnet-pytorch and the Lite packages), tf (the
released TensorFlow checkpoints, as a mapping from variable names to arrays). For every convolution of every unit a
dialect says where its weight is and where the norm after it is; `key_map` expands that to single tensors. Names decide,
never positions: the order of parameters differs between code bases.

Traps that the maps know: timm's `conv_pw` is the projection in a block without expansion and the expansion elsewhere;
lukemelas' `_bn0` is the stem's norm at the top and the expansion's in a block; lukemelas and TensorFlow count all
blocks flat; TensorFlow's `conv2d` and `tpu_batch_normalization` are numbered by what a block has.

Code bases also differ in numbers that no file holds (padding, the epsilon of batch norm): `native` sets them.

Source: the state dicts of timm 1.0.31, torchvision 0.28.0 and efficientnet-pytorch 0.7.1, tests/golden/peer_keys.json;
for TensorFlow the variable names of the released checkpoints.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effnet.checkpoint import refuse_mismatch, some
from effnet.families import PYTORCH_NORM
from effnet.spec import Conv, Network, Unit, resolve
from effnet.value import UsageError, check_choice
from effnet.weight_files import Array, read_foreign, write_foreign  # noqa: F401  (this module is the door to both)

DIALECTS = ("effnet", "timm", "torchvision", "lukemelas", "tf")
Place = tuple[str, str]  # the names of a convolution and of the norm after it ("" where there is none)
Places = Callable[[Unit, int], Iterator[Place]]  # (unit, its flat index among the blocks) -> one place per convolution

NORM_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
TF_NORM_LEAVES = ("gamma", "beta", "moving_mean", "moving_variance")  # TensorFlow has no counter
COUNTER = ".num_batches_tracked"
EMA = "/ExponentialMovingAverage"


# --- the names ------------------------------------------------------------------------------------------------------


def _effnet(unit: Unit, index: int) -> Iterator[Place]:
    """Our own: a unit's name, then the convolution's."""
    for conv in unit.convs:
        if conv.name == "linear":
            yield unit.name, ""
        elif unit.name in ("stem", "head"):
            yield f"{unit.name}.conv", f"{unit.name}.norm"
        elif conv.norm:
            yield f"{unit.name}.{conv.name}.conv", f"{unit.name}.{conv.name}.norm"
        else:
            yield f"{unit.name}.{conv.name}", ""


TIMM_ENDS = {"stem": ("conv_stem", "bn1"), "head": ("conv_head", "bn2"), "classifier": ("classifier", "")}
TIMM_BLOCKS = {  # (op, number of norms): names of the convolutions
    ("mbconv", 2): {"depthwise": "conv_dw", "project": "conv_pw"},
    ("mbconv", 3): {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"},
    ("fused", 1): {"project": "conv"},
    ("fused", 2): {"expand": "conv_exp", "project": "conv_pwl"},
    ("separable", 2): {"depthwise": "conv_dw", "pointwise": "conv_pw"},
}
TIMM_SE = {"se.reduce": "se.conv_reduce", "se.expand": "se.conv_expand"}


def _timm(unit: Unit, index: int) -> Iterator[Place]:
    """Norms are numbered from 1 within a block."""
    if unit.name in TIMM_ENDS:
        yield TIMM_ENDS[unit.name]
        return
    prefix = unit.name.replace("stages", "blocks")
    names = TIMM_BLOCKS[unit.op, sum(conv.norm for conv in unit.convs)] | TIMM_SE
    norms = 0
    for conv in unit.convs:
        norms += conv.norm
        yield f"{prefix}.{names[conv.name]}", f"{prefix}.bn{norms}" if conv.norm else ""


RESNET_ENDS = {"stem": ("conv1", "bn1"), "classifier": ("fc", "")}


def _resnet(unit: Unit, index: int) -> Iterator[Place]:
    """ResNets have the same names in timm and torchvision; stages count from 1."""
    if unit.name in RESNET_ENDS:
        yield RESNET_ENDS[unit.name]
        return
    _, stage, block = unit.name.split(".")
    prefix = f"layer{int(stage) + 1}.{block}"
    for conv in unit.convs:
        if conv.name == "shortcut":
            yield f"{prefix}.downsample.0", f"{prefix}.downsample.1"
        else:
            yield f"{prefix}.{conv.name}", f"{prefix}.{conv.name.replace('conv', 'bn')}"


def _torchvision(stages: int) -> Places:
    """EfficientNet: numbered by the position in a block, where squeeze-excite is one position."""

    def places(unit: Unit, index: int) -> Iterator[Place]:
        ends = {"stem": "features.0", "head": f"features.{stages + 1}"}
        if unit.name in ends:
            yield f"{ends[unit.name]}.0", f"{ends[unit.name]}.1"
            return
        if unit.name == "classifier":
            yield "classifier.1", ""
            return
        _, stage, block = unit.name.split(".")
        position = -1
        for conv in unit.convs:
            position += conv.name != "se.expand"
            prefix = f"features.{int(stage) + 1}.{block}.block.{position}"
            fc = {"se.reduce": "fc1", "se.expand": "fc2"}.get(conv.name)
            yield (f"{prefix}.{fc}", "") if fc else (f"{prefix}.0", f"{prefix}.1")

    return places


def _torchvision_mobilenet(blocks: int) -> Places:
    """MobileNetV2: blocks count flat from 1; the projection has no activation, so no group of its own."""

    def places(unit: Unit, index: int) -> Iterator[Place]:
        if unit.op != "mbconv":
            yield from _torchvision(blocks)(unit, index)
            return
        for position, conv in enumerate(unit.convs):
            prefix = f"features.{index + 1}.conv"
            if conv.name == "project":
                yield f"{prefix}.{position}", f"{prefix}.{position + 1}"
            else:
                yield f"{prefix}.{position}.0", f"{prefix}.{position}.1"

    return places


LUKEMELAS_ENDS = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1"), "classifier": ("_fc", "")}
LUKEMELAS_BLOCK = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "se.reduce": ("_se_reduce", ""),
    "se.expand": ("_se_expand", ""),
    "project": ("_project_conv", "_bn2"),
}


def _lukemelas(unit: Unit, index: int) -> Iterator[Place]:
    """Blocks count flat; a missing expansion leaves its numbers unused."""
    if unit.name in LUKEMELAS_ENDS:
        yield LUKEMELAS_ENDS[unit.name]
        return
    for conv in unit.convs:
        weight, norm = LUKEMELAS_BLOCK[conv.name]
        yield f"_blocks.{index}.{weight}", f"_blocks.{index}.{norm}" if norm else ""


TF_NAMES = {"depthwise": "depthwise_conv2d", "se.reduce": "se/conv2d", "se.expand": "se/conv2d_1"}


def _tf(scope: str) -> Places:
    """Blocks count flat; within one, ordinary convolutions and norms are numbered by what is there (x, x_1, x_2)."""

    def places(unit: Unit, index: int) -> Iterator[Place]:
        if unit.name == "classifier":
            yield f"{scope}/head/dense", ""
            return
        prefix = f"{scope}/{unit.name}" if unit.name in ("stem", "head") else f"{scope}/blocks_{index}"
        convs = norms = 0
        for conv in unit.convs:
            name = TF_NAMES.get(conv.name) or _numbered("conv2d", convs)
            convs += conv.name not in TF_NAMES
            norm = f"{prefix}/{_numbered('tpu_batch_normalization', norms)}" if conv.norm else ""
            norms += conv.norm
            yield f"{prefix}/{name}", norm

    return places


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def tf_scope(network: Network) -> str:
    """The name that the released TensorFlow code gives a network.

    >>> from effnet.families import get
    >>> tf_scope(get("tf_efficientnet_b0")), tf_scope(get("efficientnetv2_s"))
    ('efficientnet-b0', 'efficientnetv2-s')
    """
    return network.name.removeprefix("tf_").replace("_", "-")


# --- which dialect has a name for which network ---------------------------------------------------------------------


def _places(network: Network, dialect: str) -> Places:
    """The naming of `network` in `dialect`; `UsageError` where that code base has no such network."""
    ops = {stage.op for stage in network.stages}
    squeezed = [stage.se > 0 for stage in network.stages if stage.op == "mbconv"]
    places: Places | None = None
    if dialect == "effnet":
        places = _effnet
    elif dialect in ("timm", "torchvision") and ops <= {"basic", "bottleneck"} and not network.head.width:
        places = _resnet
    elif dialect == "timm" and ops <= {"mbconv", "fused", "separable"}:
        places = _timm
    elif dialect == "torchvision" and ops <= {"mbconv", "fused"} and all(squeezed) and network.head.width:
        places = _torchvision(len(network.stages))
    elif dialect == "torchvision" and ops == {"mbconv"} and not any(squeezed) and _is_mobilenet(network):
        places = _torchvision_mobilenet(sum(stage.repeats for stage in network.stages))
    elif dialect == "lukemelas" and ops == {"mbconv"} and network.head.width:
        places = _lukemelas
    elif dialect == "tf" and ops <= {"mbconv", "fused"} and network.head.width:
        places = _tf(tf_scope(network))
    if places is None:
        raise UsageError(f"{dialect} has no network like {network.name} ({', '.join(sorted(ops))} blocks).")
    return places


def _is_mobilenet(network: Network) -> bool:
    return network.head.width > 0 and all(stage.kernel == 3 for stage in network.stages)


def key_map(network: Network, dialect: str) -> dict[str, str]:
    """Our state-dict key -> the key in `dialect`, for every tensor that both have, in the network's order.

    Raises `UsageError` for an unknown dialect, or one that has no such network.

    >>> from effnet.families import get
    >>> key_map(get("efficientnet_b0"), "timm")["stages.0.0.project.conv.weight"]
    'blocks.0.0.conv_pw.weight'
    """
    check_choice("dialect", dialect, DIALECTS)
    places, leaves = _places(network, dialect), _tf_leaves if dialect == "tf" else _torch_leaves
    names = {}
    for unit, index in _indexed(network):
        for conv, (weight, norm), (their_weight, their_norm) in zip(
            unit.convs, _effnet(unit, index), places(unit, index), strict=True
        ):
            ours, theirs = _torch_leaves(conv, weight, norm), leaves(conv, their_weight, their_norm)
            names |= zip(ours, theirs, strict=False)  # TensorFlow has no counter, our last leaf
    return names


def _indexed(network: Network) -> Iterator[tuple[Unit, int]]:
    """Every unit with its flat index among the blocks (-1 for the stem, the number of blocks for what follows them)."""
    return ((unit, number - 1) for number, unit in enumerate(resolve(network)))


def _torch_leaves(conv: Conv, weight: str, norm: str) -> list[str]:
    """The tensors of a convolution and its norm under PyTorch's names."""
    own = [f"{weight}.weight", *([f"{weight}.bias"] if conv.bias else [])]
    return own + ([f"{norm}.{leaf}" for leaf in NORM_LEAVES] if conv.norm else [])


def _tf_leaves(conv: Conv, weight: str, norm: str) -> list[str]:
    """The same tensors under TensorFlow's names, in the same order."""
    kernel = "depthwise_kernel" if conv.name == "depthwise" else "kernel"
    own = [f"{weight}/{kernel}", *([f"{weight}/bias"] if conv.bias else [])]
    return own + ([f"{norm}/{leaf}" for leaf in TF_NORM_LEAVES] if conv.norm else [])


def shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of `network`, by our name.

    >>> from effnet.families import get
    >>> shapes(get("efficientnet_b0"))["stages.1.0.se.reduce.weight"]
    (4, 96, 1, 1)
    """
    found: dict[str, tuple[int, ...]] = {}
    for unit, index in _indexed(network):
        for conv, (weight, norm) in zip(unit.convs, _effnet(unit, index), strict=True):
            window = () if unit.name == "classifier" else (conv.kernel, conv.kernel)
            vector = (conv.out_channels,)
            own = [(*vector, conv.in_channels // conv.groups, *window), *([vector] if conv.bias else [])]
            sizes = [*own, *([vector] * 4 + [()] if conv.norm else [])]
            found |= zip(_torch_leaves(conv, weight, norm), sizes, strict=True)
    return found


# --- there and back -------------------------------------------------------------------------------------------------

MARKS = {  # a name that only this dialect has
    "stem.conv.weight": "effnet",
    "conv_stem.weight": "timm",
    "features.0.0.weight": "torchvision",
    "layer1.0.conv1.weight": "torchvision",  # ResNets: timm's are the same
    "_conv_stem.weight": "lukemelas",
}
TF_MARK = "/stem/conv2d/kernel"


def recognise(keys: Iterable[str]) -> str:
    """The dialect that these state-dict keys (or TensorFlow variables) are written in; `UsageError` if in none.

    >>> recognise(["_conv_stem.weight", "_bn0.weight"])
    'lukemelas'
    """
    keys = list(keys)
    for mark, dialect in MARKS.items():
        if mark in keys:
            return dialect
    if any(key.removesuffix(EMA).endswith(TF_MARK) for key in keys):
        return "tf"
    raise UsageError(
        f"these are no weights in a dialect we know ({', '.join(DIALECTS)}): {some(keys) or 'there are no tensors'}."
    )


def to_effnet(
    state: Mapping[str, Array], network: Network, dialect: str | None = None, *, new_head: bool = False
) -> dict[str, Tensor]:
    """`state` under our names, complete: every tensor of `network` with its shape, nothing left over.

    `dialect`: recognised by the keys if None. Counters of batches that a file lacks start at zero. `new_head`: a
    classifier of another number of classes is left out rather than refused. Raises `UsageError`, listing both sides.
    """
    dialect = dialect or recognise(state)
    names = key_map(network, dialect)
    expected = {names.get(ours, ours): shape for ours, shape in shapes(network).items()}
    if dialect == "tf":
        variables = _variables(state, tf_scope(network))
        state = {name: _from_tf(name, array) if name in expected else array for name, array in variables.items()}
    counters = {name: torch.zeros((), dtype=torch.int64) for name in expected if name.endswith(COUNTER)}
    found: dict[str, Any] = counters | dict(state)
    head = [names["classifier.weight"], names["classifier.bias"]]
    classes = found[head[1]].shape[0] if head[1] in found and found[head[1]].ndim else network.head.classes
    if classes != network.head.classes and new_head:
        expected, found = (_without(mapping, head) for mapping in (expected, found))
    elif classes != network.head.classes:
        raise UsageError(
            f"these {dialect} weights have a classifier of {classes} classes, and {network.name} was asked for "
            f"{network.head.classes}: ask for {classes}, or for a new head."
        )
    refuse_mismatch(expected, found, f"this file of {dialect} weights, read as {network.name},")
    return {ours: found[name] for ours in shapes(network) if (name := names.get(ours, ours)) in found}


def _without(mapping: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in set(names)}


def from_effnet(state: Mapping[str, Tensor], network: Network, dialect: str) -> dict[str, Any]:
    """Our weights under the names of `dialect`: the inverse of `to_effnet`, bitwise.

    Tensors, or numpy arrays in TensorFlow's layout for `tf`. Raises `UsageError` if `state` is not that of `network`.
    """
    names = key_map(network, dialect)
    refuse_mismatch(shapes(network), state, f"this state dict, written as {network.name},")
    if dialect == "tf":
        return {name: _to_tf(name, state[ours]) for ours, name in names.items()}
    return {name: state[ours] for ours, name in names.items()}


OPTIMISER = re.compile(r"(^|/)(global_step|RMSProp(_\d+)?|Momentum|Adam(_\d+)?|beta\d_power)$")  # kept by the trainer


def _variables(state: Mapping[str, Array], scope: str) -> dict[str, Array]:
    """The variables of a TensorFlow checkpoint that are weights, under `scope`: averaged ones where there are any."""
    weights = {name: array for name, array in state.items() if not OPTIMISER.search(name)}
    averaged = {name.removesuffix(EMA): array for name, array in weights.items() if name.endswith(EMA)}
    weights = averaged or weights  # never a mixture of two networks: without its average a variable is missing
    own = next((name.removesuffix(TF_MARK) for name in weights if name.endswith(TF_MARK)), scope)
    return {re.sub(f"^{re.escape(own)}/", f"{scope}/", name): array for name, array in weights.items()}


def _from_tf(name: str, array: Array) -> Tensor:
    """Height, width, in, out -> out, in, height, width; depthwise: height, width, channels, 1 -> channels, 1, ..."""
    tensor = torch.as_tensor(np.array(array))
    if name.endswith("/depthwise_kernel") and tensor.ndim == 4:
        tensor = tensor.permute(2, 3, 0, 1)
    elif name.endswith("/kernel") and tensor.ndim in (2, 4):
        tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
    return tensor.contiguous()


def _to_tf(name: str, tensor: Tensor) -> np.ndarray:
    """The inverse of `_from_tf`."""
    if name.endswith("/depthwise_kernel"):
        tensor = tensor.permute(2, 3, 0, 1)
    elif name.endswith("/kernel"):
        tensor = tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


TORCHVISION_SMALL = {f"efficientnet_b{i}" for i in range(5)}  # ported from timm; B5-B7 came from lukemelas


def native(network: Network, dialect: str) -> Network:
    """`network` with the padding and batch norm of the code base that trained the weights: no file says which.

    timm: symmetric padding goes with PyTorch's batch norm (epsilon 1e-5), `tf_` networks with TensorFlow's (1e-3).
    torchvision: symmetric; 1e-5 for B0-B4, MobileNet and ResNet, 1e-3 for the rest. lukemelas, tf: SAME padding, 1e-3.
    """
    check_choice("dialect", dialect, DIALECTS)
    if dialect in ("lukemelas", "tf"):
        return network if network.padding == "same" else network.replace(padding="same", name=f"tf_{network.name}")
    if dialect == "torchvision" and network.padding == "same":
        network = network.replace(padding="symmetric", name=network.name.removeprefix("tf_"))
    pytorch = network.name in TORCHVISION_SMALL if dialect == "torchvision" else network.padding == "symmetric"
    return network.replace(norm=PYTORCH_NORM) if pytorch and dialect != "effnet" else network

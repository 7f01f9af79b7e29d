"""What do the blocks compute? Modules made from the units that `spec.resolve` yields; no geometry is derived here.

A block has one submodule per `spec.Conv` of its unit, under the same name, so module paths, cost rows and weight names
agree. A part that a unit does not have (the expansion of an MBConv with expand 1, its squeeze-excite) is an identity,
and `forward` reads like the figure in the paper.

Shapes: N images, C channels, H x W pixels; `in`, `mid`, `out` are the unit's channels and s its stride, so a map of
(N, in, H, W) leaves a block as (N, out, ceil(H/s), ceil(W/s)).

Sources: Tan & Le 2019 and its code (order of operations, drop path), Tan & Le 2021 (Fused-MBConv), Howard et al. 2017
(separable), He et al. 2016 (residual blocks).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet import ops
from effnet.spec import Activation as ActivationName
from effnet.spec import Conv, Network, Padding, Unit


class Activation(nn.Module):
    """The network's activation, in place wherever no gradient needs its input.

    ReLU and ReLU6 are differentiated from their output, so they always work in place; SiLU needs its input and works in
    place only without gradients. The input must be a fresh tensor that nobody else reads.
    """

    def __init__(self, name: ActivationName) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "silu":
            return F.silu(x, inplace=not torch.is_grad_enabled())
        return ops.relu6_(x) if self.name == "relu6" else F.relu(x, inplace=True)

    def extra_repr(self) -> str:
        return self.name


class Convolution(nn.Conv2d):
    """A convolution as `conv` describes it, padded as the network is: (N, in, H, W) -> (N, out, ceil(H/s), ceil(W/s)).

    Both paddings agree at stride 1. At stride 2 "symmetric" pads k // 2 on each side; "same" follows the input size.
    The weights are left for `network.initialise`, or for a checkpoint, to fill.
    """

    def __init__(self, conv: Conv, padding: Padding) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel,
            conv.stride,
            padding=conv.kernel // 2,
            groups=conv.groups,
            bias=conv.bias,
        )
        self.same = padding == "same" and conv.stride > 1
        self.depthwise = conv.groups == conv.in_channels == conv.out_channels and not conv.bias

    def reset_parameters(self) -> None:
        """Nothing: PyTorch's own rule is not the official one, and drawing twice doubles the time to build a model."""

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel == 1 and stride > 1:  # the same, and torch 2.13's own channels-last backward corrupts memory on CPUs
            input, stride = input[..., ::stride, ::stride], 1
        rows, columns = ((kernel // 2, kernel // 2),) * 2
        if self.same:
            rows, columns = (ops.same_padding(size, kernel, stride) for size in input.shape[-2:])
        if self.depthwise:
            return ops.depthwise(input, self.weight, stride, (rows, columns))
        if kernel == stride == self.groups == 1 and self.bias is None and ops.quicker_as_product(input):
            return F.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)
        x, padding = ops.pad(input, (rows, columns))
        return F.conv2d(x, self.weight, self.bias, stride, padding, groups=self.groups)


class ConvNorm(nn.Module):
    """Convolution, batch norm and, where `conv.activation` says so, the network's activation."""

    def __init__(self, conv: Conv, network: Network) -> None:
        super().__init__()
        self.conv = Convolution(conv, network.padding)
        self.norm = nn.BatchNorm2d(conv.out_channels, eps=network.norm.eps, momentum=network.norm.momentum)
        self.activation = Activation(network.activation) if conv.activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (N, in, H, W) -> (N, out, ceil(H/s), ceil(W/s))
        return norm_act(self.conv(x), self.norm, self.activation)[0]


def norm_act(x: Tensor, norm: nn.BatchNorm2d, activation: nn.Module) -> tuple[Tensor, Tensor | None]:
    """`activation(norm(x))`, (N, C, H, W) -> (N, C, H, W), in training on a CPU as one operator, which gives the means.

    Nobody's hooks are passed over: with hooks on the norm or the activation they are called one after the other.
    """
    if ops.fuses(x, norm) and not _hooked(norm, activation):
        return ops.norm_act(x, norm, activation.name if isinstance(activation, Activation) else None)
    return activation(norm(x)), None


def _hooked(*modules: nn.Module) -> bool:
    """Whether anybody wants to be called when one of the modules is."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def gated(conv: nn.Module, se: nn.Module, x: Tensor) -> Tensor:
    """`se(conv(x))`; in training the means that the gate needs come from the norm's own pass over the map."""
    if isinstance(conv, ConvNorm) and isinstance(se, SqueezeExcite) and conv.training and not _hooked(conv):
        return se(*norm_act(conv.conv(x), conv.norm, conv.activation))
    return se(conv(x))


def conv_norm(unit: Unit, name: str, network: Network) -> nn.Module:
    """The unit's convolution of that name with its norm and activation, or an identity where the unit has none."""
    conv = unit.conv(name)
    return nn.Identity() if conv is None else ConvNorm(conv, network)


class SqueezeExcite(nn.Module):
    """Weighs every channel by a gate computed from the means of all channels; the inner activation is the network's.

    Source: Hu et al. 2018; the squeeze width and the two biases as in the official EfficientNet code. The weights are
    those of 1x1 convolutions, (squeeze, mid, 1, 1) and back; on a 1x1 map that is a matrix product, 2-4 times faster.
    """

    def __init__(self, reduce: Conv, expand: Conv, network: Network) -> None:
        super().__init__()
        self.reduce = Convolution(reduce, network.padding)
        self.activation = Activation(network.activation)
        self.expand = Convolution(expand, network.padding)

    def forward(self, x: Tensor, means: Tensor | None = None) -> Tensor:
        """`x`: (N, mid, H, W); `means`: (N, mid), those of x over H and W, where they are known already."""
        means = x.mean((2, 3)) if means is None else means
        squeezed = self.activation(_on_vectors(self.reduce, means))  # (N, squeeze)
        return ops.gate(x, torch.sigmoid(_on_vectors(self.expand, squeezed)))  # (N, mid, H, W) by (N, mid)


def _on_vectors(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution of a 1x1 map: (N, in) -> (N, out)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def squeeze_excite(unit: Unit, network: Network) -> nn.Module:
    """The unit's squeeze-excite, or an identity where it has none."""
    reduce, expand = unit.conv("se.reduce"), unit.conv("se.expand")
    return nn.Identity() if reduce is None or expand is None else SqueezeExcite(reduce, expand, network)


Share = tuple[int, Tensor]  # of a whole batch: how many images it has, and which of them (int64) a forward pass sees


def uniform(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None, share: Share | None = None
) -> Tensor:
    """U[0, 1) of `shape`, a row per image; with `share` the rows of those images among the draws for the whole batch.

    So an image gets the same draws whether its batch is computed at once, in parts or by several processes.
    """
    if share is None:
        return torch.rand(shape, generator=generator, device=device)
    count, places = share
    return torch.rand((count, *shape[1:]), generator=generator, device=device)[places.to(device)]


def drop_path(x: Tensor, rate: float, generator: torch.Generator | None = None, share: Share | None = None) -> Tensor:
    """Each sample of `x` (N, ...) becomes 0 with probability `rate`, else it is divided by `1 - rate`.

    Stochastic depth, written as the official code does: floor(keep + U[0, 1)) / keep per sample. `rate`: in [0, 1).
    `generator`: any device; PyTorch's global one if None. `share`: see `uniform`.
    """
    keep = 1.0 - rate
    shape, device = (x.shape[0], *[1] * (x.ndim - 1)), generator.device if generator is not None else x.device
    survives = torch.floor(keep + uniform(shape, device, generator, share))
    return x * (survives / keep).to(x)


def dropout(x: Tensor, rate: float, generator: torch.Generator | None = None, share: Share | None = None) -> Tensor:
    """`F.dropout` (element-wise), from a given generator of any device (else PyTorch's global one), for a `share`."""
    if generator is None and share is None:
        return F.dropout(x, rate)
    device = generator.device if generator is not None else x.device
    survives = uniform(tuple(x.shape), device, generator, share) >= rate
    return x * (survives / (1.0 - rate)).to(x)


class DropPath(nn.Module):
    """`drop_path` in training, nothing in evaluation. `rate`, `generator` and `share` may be set at any time."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.generator: torch.Generator | None = None
        self.share: Share | None = None

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.rate, self.generator, self.share) if self.training and self.rate else x

    def extra_repr(self) -> str:
        return f"{self.rate:g}"


class Dropout(nn.Module):
    """`dropout` in training, nothing in evaluation. `rate`, `generator` and `share` may be set at any time."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.generator: torch.Generator | None = None
        self.share: Share | None = None

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.rate, self.generator, self.share) if self.training and self.rate else x

    def extra_repr(self) -> str:
        return f"{self.rate:g}"


class Stem(nn.Module):
    """The first convolution with norm and activation, then ResNet's 3x3 max-pool of stride 2 where the stem has one."""

    def __init__(self, unit: Unit, network: Network) -> None:
        super().__init__()
        (conv,) = unit.convs
        self.conv = Convolution(conv, network.padding)
        self.norm = nn.BatchNorm2d(conv.out_channels, eps=network.norm.eps, momentum=network.norm.momentum)
        self.activation = Activation(network.activation)
        self.pool = MaxPool(network.padding) if network.stem.pool else nn.Identity()

    def before_pool(self, x: Tensor) -> Tensor:  # (N, in, H, W) -> (N, out, ceil(H/2), ceil(W/2))
        return norm_act(self.conv(x), self.norm, self.activation)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.before_pool(x))  # a pool halves H and W once more


class MaxPool(nn.Module):
    """3x3 max-pool of stride 2, (N, C, H, W) -> (N, C, ceil(H/2), ceil(W/2)), padded as the network is."""

    def __init__(self, padding: Padding) -> None:
        super().__init__()
        self.same = padding == "same"

    def forward(self, x: Tensor) -> Tensor:
        if not self.same:
            return F.max_pool2d(x, 3, 2, padding=1)
        top, left = (ops.same_padding(size, 3, 2)[0] for size in x.shape[-2:])
        return F.max_pool2d(x, 3, 2, padding=(top, left), ceil_mode=True)  # the last window may hang over the edge


class MBConv(nn.Module):
    """Inverted bottleneck: expand, depthwise, squeeze-excite, project (Sandler et al. 2018; Tan & Le 2019, code)."""

    def __init__(self, unit: Unit, network: Network) -> None:
        super().__init__()
        self.expand = conv_norm(unit, "expand", network)
        self.depthwise = conv_norm(unit, "depthwise", network)
        self.se = squeeze_excite(unit, network)
        self.project = conv_norm(unit, "project", network)
        self.shortcut = unit.shortcut
        self.drop_path = DropPath(unit.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(x)  # (N, in, H, W) -> (N, mid, H, W)
        y = gated(self.depthwise, self.se, y)  # -> (N, mid, H/s, W/s)
        y = self.project(y)  # -> (N, out, H/s, W/s), no activation
        return x + self.drop_path(y) if self.shortcut else y


class FusedMBConv(nn.Module):
    """MBConv with expand and depthwise fused into one k x k convolution (Tan & Le 2021, Fig. 2).

    With expand 1 the k x k convolution is `project`, and keeps its activation.
    """

    def __init__(self, unit: Unit, network: Network) -> None:
        super().__init__()
        self.expand = conv_norm(unit, "expand", network)
        self.se = squeeze_excite(unit, network)
        self.project = conv_norm(unit, "project", network)
        self.shortcut = unit.shortcut
        self.drop_path = DropPath(unit.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.expand(x))  # (N, in, H, W) -> (N, mid, H/s, W/s)
        y = self.project(y)  # -> (N, out, H/s, W/s)
        return x + self.drop_path(y) if self.shortcut else y


class Separable(nn.Module):
    """Depthwise, then pointwise, an activation after each and no shortcut (MobileNetV1, Howard et al. 2017)."""

    def __init__(self, unit: Unit, network: Network) -> None:
        super().__init__()
        self.depthwise = conv_norm(unit, "depthwise", network)
        self.pointwise = conv_norm(unit, "pointwise", network)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x)  # (N, in, H, W) -> (N, in, H/s, W/s)
        return self.pointwise(y)  # -> (N, out, H/s, W/s)


class BasicBlock(nn.Module):
    """Two k x k convolutions around a shortcut, activated after the sum (ResNet-18 and 34, He et al. 2016)."""

    def __init__(self, unit: Unit, network: Network) -> None:
        super().__init__()
        self.conv1 = conv_norm(unit, "conv1", network)
        self.conv2 = conv_norm(unit, "conv2", network)
        self.shortcut = conv_norm(unit, "shortcut", network)
        self.drop_path = DropPath(unit.drop_path)
        self.activation = Activation(network.activation)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)  # (N, in, H, W) -> (N, out, H/s, W/s)
        y = self.conv2(y)  # no activation
        return self.activation(self.shortcut(x) + self.drop_path(y))


class Bottleneck(nn.Module):
    """1x1 down, k x k with the stride, 1x1 up, around a shortcut (ResNet-50 and deeper, He et al. 2016)."""

    def __init__(self, unit: Unit, network: Network) -> None:
        super().__init__()
        self.conv1 = conv_norm(unit, "conv1", network)
        self.conv2 = conv_norm(unit, "conv2", network)
        self.conv3 = conv_norm(unit, "conv3", network)
        self.shortcut = conv_norm(unit, "shortcut", network)
        self.drop_path = DropPath(unit.drop_path)
        self.activation = Activation(network.activation)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)  # (N, in, H, W) -> (N, mid, H, W)
        y = self.conv2(y)  # -> (N, mid, H/s, W/s)
        y = self.conv3(y)  # -> (N, out, H/s, W/s), no activation
        return self.activation(self.shortcut(x) + self.drop_path(y))


BLOCKS: dict[str, type[nn.Module]] = {
    "mbconv": MBConv,
    "fused": FusedMBConv,
    "separable": Separable,
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
}


def fold_norms(model: nn.Module) -> None:
    """Multiplies every batch norm into the convolution before it, in place; the outputs stay the same."""
    for module in model.modules():
        conv, norm = getattr(module, "conv", None), getattr(module, "norm", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            conv.weight, conv.bias = nn.utils.fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            conv.depthwise = False  # that path knows no bias
            module.norm = nn.Identity()

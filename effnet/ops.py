"""Which operators are worth writing ourselves? SAME padding, a lean ReLU6, a depthwise convolution trained quickly.

Every operator here has a plain PyTorch twin in the tests that it must agree with, values and gradients.

`same_padding`, `pad_same`: TensorFlow's SAME padding depends on the input size and is asymmetric for even sizes at
stride 2, so it is computed at run time; the convolution's own padding does what it can, which saves a copy of the map.

`relu6_`: PyTorch's in-place ReLU6 clones its input for the backward pass, so it is neither lean nor quick in training.

`depthwise`: on CPUs oneDNN's bfloat16 backward of a depthwise convolution is slow (half of a training step of B0). Both
of its parts have a faster plain form, depending on kernel and stride (`_input_gradient`, `_weight_gradient`). Measured
2026-11-22 on one Sapphire-Rapids-class core, torch 2.13.0, channels last, batch 16, ms, oneDNN in bfloat16 / ours:

    channels, map, kernel, stride     input gradient     weight gradient
    144   56 px  k3 s1                7.1 / 2.5 (flip)   6.6 (kept: float32 16.4)
    96   112 px  k3 s2                159 / 72 (f32)     6.5 (kept: float32 53.9)
    144   56 px  k5 s2                127 / 11.6 (f32)   114 / 26.5 (f32)
    672   14 px  k5 s1                4.5 / 1.6 (flip)   101 / 20.9 (f32)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding along one axis, as (before, after): the output has ceil(size / stride) pixels.

    An odd pixel goes after; with odd kernels that means stride 2 on an even size. Source: `tf.nn.convolution`.

    >>> same_padding(224, 3, 2), same_padding(225, 3, 2), same_padding(14, 5, 1)
    ((0, 1), (1, 1), (2, 2))
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def pad_same(x: Tensor, kernel: int, stride: int) -> tuple[Tensor, tuple[int, int]]:
    """Prepares `x` (N, C, H, W) for a SAME convolution: the input and the symmetric `padding` to convolve it with.

    The input comes back untouched when both axes pad symmetrically; otherwise it gets one row, one column or both
    *after* its end, and the convolution's own padding does the rest.
    """
    top, bottom = same_padding(x.shape[-2], kernel, stride)
    left, right = same_padding(x.shape[-1], kernel, stride)
    if (top, left) != (bottom, right):
        x = F.pad(x, (0, right - left, 0, bottom - top))
    return x, (top, left)


def relu6_(x: Tensor) -> Tensor:
    """min(max(x, 0), 6) in place; the backward pass needs the result only, which the next convolution keeps anyway."""
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _ReLU6.apply(x)
    return F.relu6(x, inplace=True)


class _ReLU6(torch.autograd.Function):
    """The slope is 1 where the result lies strictly between 0 and 6, as in PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        y = F.relu6(x, inplace=True)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,), (grad,) = ctx.saved_tensors, grads
        return torch.ops.aten.hardtanh_backward(grad, y, 0.0, 6.0)


def depthwise(x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int]) -> Tensor:
    """A convolution of every channel with its own filter, bias-free: the same values as `F.conv2d(groups=C)`.

    `x`: (N, C, H, W); `weight`: (C, 1, k, k); `padding`: rows and columns added on both sides, each below k. In
    bfloat16 on a CPU (also through autocast) the backward is ours; everywhere else this *is* `F.conv2d`.
    """
    if not _backward_is_slow(x, weight):
        return F.conv2d(x, weight, None, stride, padding, groups=weight.shape[0])
    return _Depthwise.apply(x.to(torch.bfloat16), weight, stride, padding)


def _backward_is_slow(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's bfloat16 backward would run: on a CPU, in bfloat16 as it is or by autocast, with gradients."""
    if x.device.type != "cpu" or not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return False
    if x.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16


class _Depthwise(torch.autograd.Function):
    """`F.conv2d(groups=C)` forward; backward in the form that is fastest on a CPU. Works in any floating dtype.

    `weight` may be wider than `x` (float32 under autocast): its gradient comes back in its own dtype, unrounded.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight.to(x.dtype), None, stride, padding, groups=weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        wants_input, wants_weight = ctx.needs_input_grad[:2]
        grad_x = _input_gradient(grad, x, weight, ctx.stride, ctx.padding) if wants_input else None
        grad_weight = _weight_gradient(grad, x, weight, ctx.stride, ctx.padding) if wants_weight else None
        return grad_x, grad_weight, None, None


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int]) -> Tensor:
    """At stride 1 a forward convolution of the output gradient with the flipped filters; at stride 2 float32."""
    if stride > 1:
        return _native_gradient(grad, x, weight, stride, padding, wide(x.dtype), (True, False)).to(x.dtype)
    kernel = weight.shape[-1]
    flipped = weight.to(grad.dtype).flip(2, 3)
    full = (kernel - 1 - padding[0], kernel - 1 - padding[1])
    return F.conv2d(grad, flipped, None, 1, full, groups=weight.shape[0])


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int]) -> Tensor:
    """oneDNN's bfloat16 kernel is good for 3x3 filters only; others go through float32."""
    dtype = x.dtype if weight.shape[-1] <= 3 else wide(x.dtype)
    return _native_gradient(grad, x, weight, stride, padding, dtype, (False, True)).to(weight.dtype)


def _native_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: tuple[int, int],
    dtype: torch.dtype,
    mask: tuple[bool, bool],
) -> Tensor:
    """PyTorch's own backward in `dtype`; `mask` picks the gradient of the input or of the weight."""
    gradients = torch.ops.aten.convolution_backward(
        grad.to(dtype), x.to(dtype), weight.to(dtype), None, [stride, stride], list(padding), [1, 1],
        False, [0, 0], weight.shape[0], [*mask, False],
    )  # fmt: skip
    return gradients[mask.index(True)]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: float32 for the half-width types, the type itself otherwise."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

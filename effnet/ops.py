"""Which operators are worth writing ourselves? SAME padding, a lean ReLU6, and what a training step spends its time on.

Every operator here has a plain PyTorch twin in the tests that it must agree with, values and gradients. On a CPU with a
C++ compiler the training forms of `depthwise`, `norm_act` and `gate` are the kernels of `native/kernels.cpp`; without
one, in evaluation, on other devices and while a model is traced they are PyTorch's own operators.

`same_padding`, `pad`: TensorFlow's SAME padding depends on the input size and is asymmetric for even sizes at stride 2,
so it is computed at run time; the convolution's own padding does what it can, which saves a copy of the map.

`relu6_`: PyTorch's in-place ReLU6 clones its input for the backward pass, so it is neither lean nor quick in training.

`depthwise`: oneDNN's backward of a depthwise convolution takes half of a bfloat16 training step of B0. Ours reads every
map once per channel block, which fits the cache. Without a compiler both of its parts have a faster plain form,
depending on kernel and stride (`_input_gradient`, `_weight_gradient`). Measured 2026-11-22 on one Sapphire-Rapids-class
core, torch 2.13.0, channels last, batch 16, ms, oneDNN in bfloat16 / plain PyTorch:

    channels, map, kernel, stride     input gradient     weight gradient
    144   56 px  k3 s1                7.1 / 2.5 (flip)   6.6 (kept: float32 16.4)
    96   112 px  k3 s2                159 / 72 (f32)     6.5 (kept: float32 53.9)
    144   56 px  k5 s2                127 / 11.6 (f32)   114 / 26.5 (f32)
    672   14 px  k5 s1                4.5 / 1.6 (flip)   101 / 20.9 (f32)

`norm_act`, `gate`: batch norm, activation, the means that squeeze-excite needs and its product are passes over maps
that do not fit the cache; what matters is how often a map is read. Nothing between norm and activation is stored.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from effnet import native

Pads = tuple[tuple[int, int], tuple[int, int]]  # rows and columns that padding adds: ((above, below), (left, right))


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding along one axis, as (before, after): the output has ceil(size / stride) pixels.

    An odd pixel goes after; with odd kernels that means stride 2 on an even size. Source: `tf.nn.convolution`.

    >>> same_padding(224, 3, 2), same_padding(225, 3, 2), same_padding(14, 5, 1)
    ((0, 1), (1, 1), (2, 2))
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def pad(x: Tensor, pads: Pads) -> tuple[Tensor, tuple[int, int]]:
    """Prepares `x` (N, C, H, W) for a convolution: the input and the symmetric `padding` to convolve it with.

    The input comes back untouched when both axes pad symmetrically; otherwise it gets one row, one column or both
    *after* its end, and the convolution's own padding does the rest.
    """
    (top, bottom), (left, right) = pads
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


def depthwise(x: Tensor, weight: Tensor, stride: int, pads: Pads) -> Tensor:
    """A convolution of every channel with its own filter, bias-free: the same values as `F.conv2d(groups=C)`.

    `x`: (N, C, H, W); `weight`: (C, 1, k, k); `pads`: each below k. In training on a CPU the backward is ours: compiled
    where it can be, plain PyTorch in bfloat16 elsewhere (also through autocast). Otherwise this *is* `F.conv2d`.
    """
    trains = _trains_on_cpu(x, weight)
    if trains:
        x = x.to(torch.bfloat16) if x.dtype == torch.float32 and _autocasts() else x
        if _suits(x) and weight.shape[-1] in (3, 5, 7):
            return _NativeDepthwise.apply(x, weight, stride, pads)
    x, padding = pad(x, pads)
    if trains and x.dtype == torch.bfloat16:
        return _Depthwise.apply(x, weight, stride, padding)
    return F.conv2d(x, weight, None, stride, padding, groups=weight.shape[0])


def _trains_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether a backward pass on a CPU will follow."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def _autocasts() -> bool:
    """Whether convolutions on a CPU run in bfloat16 by autocast."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _suits(x: Tensor) -> bool:
    """Whether the compiled kernels take `x`: float32 or bfloat16, channels last, on a CPU, not being traced."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and x.is_contiguous(memory_format=torch.channels_last)
        and type(x) in (Tensor, torch.nn.Parameter)  # fake and functional tensors have no memory
        and native.library() is not None
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _NativeDepthwise(torch.autograd.Function):
    """`kernels.cpp`: both gradients from one pass over channels that fit the cache, and padding without a copy.

    Forward is oneDNN's where padding is symmetric (it is a little faster). `weight` may be wider than `x`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, pads: Pads) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.pads = stride, pads
        (top, bottom), (left, right) = pads
        if (top, left) == (bottom, right):
            return F.conv2d(x, weight.to(x.dtype), None, stride, (top, left), groups=weight.shape[0])
        n, channels, height, width = x.shape
        kernel = weight.shape[-1]
        size = ((height + top + bottom - kernel) // stride + 1, (width + left + right - kernel) // stride + 1)
        y = torch.empty((n, channels, *size), dtype=x.dtype, memory_format=torch.channels_last)
        filters = _by_tap(weight)
        _call("depthwise_forward", x, *map(_address, (x, filters, y)), _window(x, y, pads), kernel, stride)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad = _like(grad, x)
        kernel = weight.shape[-1]
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        filters = _by_tap(weight)
        by_tap = torch.empty_like(filters) if ctx.needs_input_grad[1] else None
        parts = map(_address, (grad, x, filters, grad_x, by_tap))
        _call("depthwise_backward", x, *parts, _window(x, grad, ctx.pads), kernel, ctx.stride)
        grad_weight = None if by_tap is None else by_tap.t().reshape(weight.shape).to(weight.dtype)
        return grad_x, grad_weight, None, None


def _by_tap(weight: Tensor) -> Tensor:
    """(C, 1, k, k) -> (k * k, C) in float32."""
    return weight.detach().reshape(weight.shape[0], -1).t().float().contiguous()


def _window(x: Tensor, y: Tensor, pads: Pads) -> ctypes.Array:
    """The `Window` of `kernels.cpp`."""
    n, channels, height, width = x.shape
    return (ctypes.c_int * 8)(n, height, width, channels, *y.shape[-2:], pads[0][0], pads[1][0])


def _call(name: str, x: Tensor, *arguments: Any) -> None:
    """Runs a kernel on as many threads as PyTorch uses."""
    library = native.library()
    assert library is not None
    half = int(x.dtype == torch.bfloat16)
    failed = getattr(library, f"effnet_{name}")(half, *arguments, torch.get_num_threads())
    assert not failed, f"{name} has no kernel for {arguments}"


def rmsprop_step(
    params: list[Tensor],
    squares: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    decay: float,
    momentum: float,
    eps: float,
    weight_decay: float,
) -> None:
    """TensorFlow's RMSProp on all `params` with their `.grad`, in place: `optim.RMSProp` has the formula.

    Compiled, for dense float32 tensors on a CPU: one pass over their memory. Otherwise PyTorch's operators, many.
    """
    grads = [param.grad for param in params if param.grad is not None]
    library = native.library()
    if library is not None and all(map(_steps, params, grads, squares, momenta)):
        table = (ctypes.c_int64 * (5 * len(params)))(
            *(value for row in zip(params, grads, squares, momenta, strict=True) for value in _row(row))
        )
        rates = (ctypes.c_float * 5)(lr, decay, momentum, eps, weight_decay)
        library.effnet_rmsprop(table, len(params), rates, torch.get_num_threads())
        return
    if weight_decay:
        grads = torch._foreach_add(grads, params, alpha=weight_decay)
    torch._foreach_mul_(squares, decay)
    torch._foreach_addcmul_(squares, grads, grads, 1 - decay)
    roots = torch._foreach_add(squares, eps)
    torch._foreach_sqrt_(roots)
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_addcdiv_(momenta, grads, roots, lr)
    torch._foreach_sub_(params, momenta)


def _steps(param: Tensor, *others: Tensor) -> bool:
    """Whether the compiled step takes these tensors: float32 on a CPU, in one order of memory, without gaps."""
    return (
        param.device.type == "cpu"
        and param.numel() == _span(param)
        and all(each.dtype == torch.float32 and _strides(each) == _strides(param) for each in (param, *others))
    )


def _strides(tensor: Tensor) -> list[int]:
    """The strides that matter: those of dimensions longer than 1."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _span(tensor: Tensor) -> int:
    """Elements of memory from the first to the last one of `tensor`."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _row(tensors: Sequence[Tensor]) -> list[int]:
    """An `RmspropTensor` of `kernels.cpp`."""
    return [*map(_address, tensors), tensors[0].numel()]


SMALL_MAP = 100  # pixels


def quicker_as_product(x: Tensor) -> bool:
    """Whether a 1x1 convolution of `x` (N, C, H, W) that will be differentiated is quicker as a matrix product.

    So it is for small bfloat16 maps on a CPU, where oneDNN spends its time on reordering the filters. Measured
    2026-11-22, two threads, batch 32 at 128 px, interleaved: a step of V2-S 1.12 times as fast, of B0 1.06 times.
    """
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and x.shape[2] * x.shape[3] <= SMALL_MAP
        and (x.dtype == torch.bfloat16 or _autocasts())
        and x.is_contiguous(memory_format=torch.channels_last)
    )


ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "silu": 3}  # the numbers of `Act` in kernels.cpp


def fuses(x: Tensor, norm: nn.BatchNorm2d) -> bool:
    """Whether `norm_act` may stand for `norm` and the activation behind it: in training, where kernels take `x`."""
    return (
        norm.training
        and type(norm) is nn.BatchNorm2d  # one that several processes share has moments of its own
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.weight.dtype == torch.float32
        and x.shape[0] * x.shape[2] * x.shape[3] > 1  # PyTorch's own error is the clear one
        and _suits(x)
    )


def norm_act(x: Tensor, norm: nn.BatchNorm2d, activation: str | None) -> tuple[Tensor, Tensor]:
    """Batch norm by the statistics of `x` (N, C, H, W), then the activation, then means over H and W: one operator.

    Returns the map and its means (N, C), float32. Only where `fuses`. The running statistics move as in PyTorch. For
    the backward pass it keeps `x` alone; what lies between norm and activation is computed again.
    """
    mean, variance = torch.empty_like(norm.weight), torch.empty_like(norm.weight)
    _call("moments", x, *map(_address, (x, mean, variance)), *_map(x))
    with torch.no_grad():
        assert norm.num_batches_tracked is not None and norm.running_mean is not None and norm.running_var is not None
        assert norm.momentum is not None
        pixels = x.numel() // x.shape[1]
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (pixels / (pixels - 1)), norm.momentum)
        rstd = torch.rsqrt(variance + norm.eps)
    return _NormAct.apply(x, norm.weight, norm.bias, mean, rstd, ACTIVATIONS[activation])


class _NormAct(torch.autograd.Function):
    """y = act((x - mean) * rstd * weight + bias) and its means; that mean and rstd come from x, the backward knows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, act: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.act = act
        ctx.set_materialize_grads(False)
        scale = weight * rstd
        shift = bias - mean * scale
        y, pooled = torch.empty_like(x), x.new_empty(x.shape[:2], dtype=torch.float32)
        _call("norm_forward", x, act, *map(_address, (x, scale, shift, y, pooled)), *_map(x))
        return y, pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grad, grad_pooled = grads
        grad = _like(torch.zeros_like(x) if grad is None else grad, x)
        if grad_pooled is not None:
            grad_pooled = grad_pooled.float().contiguous()
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
        parts = (grad, grad_pooled, x, mean, rstd, weight, bias, grad_x, grad_weight, grad_bias)
        _call("norm_backward", x, ctx.act, *map(_address, parts), *_map(x))
        return grad_x, grad_weight, grad_bias, None, None, None


def gate(x: Tensor, weights: Tensor) -> Tensor:
    """`x` (N, C, H, W) times `weights` (N, C), every map by a number of its own."""
    if _trains_on_cpu(x, weights) and _suits(x):
        return _Gate.apply(x, weights.float().contiguous())
    return x * weights[:, :, None, None].to(x.dtype)


class _Gate(torch.autograd.Function):
    """Both gradients in one pass over the maps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        y = torch.empty_like(x)
        _call("gate_forward", x, *map(_address, (x, weights, y)), *_map(x))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weights = ctx.saved_tensors
        grad = _like(grads[0], x)
        grad_x, grad_weights = torch.empty_like(x), torch.empty_like(weights)
        _call("gate_backward", x, *map(_address, (grad, x, weights, grad_x, grad_weights)), *_map(x))
        return grad_x, grad_weights


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient as the kernels want it: in the type and the memory format of `x`."""
    return grad.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _map(x: Tensor) -> tuple[int, int, int]:
    """The `Map` of `kernels.cpp`: images, pixels, channels."""
    return x.shape[0], x.shape[2] * x.shape[3], x.shape[1]


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

"""The operators against closed forms, plain PyTorch and numerical derivatives."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from effnet import ops

KERNELS, STRIDES = (3, 5), (1, 2)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pad_same(x: Tensor, kernel: int, stride: int) -> tuple[Tensor, tuple[int, int]]:
    rows, columns = (ops.same_padding(size, kernel, stride) for size in x.shape[-2:])
    return ops.pad(x, (rows, columns))


def plain_depthwise(x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int]) -> Tensor:
    return F.conv2d(x, weight, None, stride, padding, groups=weight.shape[0])


@given(size=st.integers(1, 300), kernel=st.sampled_from((1, 3, 5, 7)), stride=st.integers(1, 2))
def test_same_padding_gives_the_rounded_up_size_and_never_pads_more_than_it_must(size, kernel, stride):
    before, after = ops.same_padding(size, kernel, stride)
    covered = size + before + after - kernel
    assert covered // stride + 1 == -(-size // stride)
    assert after - before in (0, 1)  # the odd pixel goes after
    if before + after > 0:
        assert covered % stride == 0  # one pixel less would cost an output


@pytest.mark.parametrize(
    ("size", "kernel", "expected"),
    [(224, 3, (0, 1)), (224, 5, (1, 2)), (225, 3, (1, 1)), (225, 5, (2, 2)), (224, 7, (2, 3)), (224, 1, (0, 0))],
)
def test_same_padding_at_stride_two_is_what_tensorflow_documents(size, kernel, expected):
    assert ops.same_padding(size, kernel, 2) == expected


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 9), (8, 9), (9, 8), (1, 2)])
@pytest.mark.parametrize(("kernel", "stride"), list(itertools.product(KERNELS, STRIDES)))
def test_a_same_convolution_equals_one_padded_by_hand(height, width, kernel, stride):
    x, weight = normal(2, 3, height, width), normal(4, 3, kernel, kernel, seed=1)
    padded, padding = pad_same(x, kernel, stride)
    ours = F.conv2d(padded, weight, None, stride, padding)

    # the published rule, in the open: total = max((ceil(i / s) - 1) * s + k - i, 0), half of it before, the rest after
    rows = max((-(-height // stride) - 1) * stride + kernel - height, 0)
    columns = max((-(-width // stride) - 1) * stride + kernel - width, 0)
    by_hand = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    torch.testing.assert_close(ours, F.conv2d(by_hand, weight, None, stride))


@pytest.mark.parametrize(("size", "stride", "copies"), [(8, 1, False), (9, 2, False), (8, 2, True)])
def test_only_asymmetric_padding_copies_the_map(size, stride, copies):
    x = normal(1, 2, size, size)
    padded, _ = pad_same(x, 3, stride)
    assert (padded is not x) == copies


def test_relu6_agrees_with_pytorch_in_value_and_gradient_at_the_corners_too():
    values = torch.tensor([-1.0, 0.0, 0.5, 6.0, 7.0])
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    y = ops.relu6_(ours * 1)
    expected = F.relu6(theirs * 1)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(ours.grad, theirs.grad)


def test_relu6_works_in_place_with_and_without_gradients():
    x = normal(2, 3, 4, 4)
    storage = x.data_ptr()
    assert ops.relu6_(x).data_ptr() == storage
    leaf = normal(2, 3, 4, 4).requires_grad_()
    inner = leaf * 1
    assert ops.relu6_(inner).data_ptr() == inner.data_ptr()


def test_relu6_keeps_nothing_but_its_result_for_the_backward_pass():
    kept: list[int] = []
    leaf = normal(2, 3, 4, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = ops.relu6_(leaf + 0)
    assert kept == [y.data_ptr()]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("same", [False, True], ids=["symmetric", "same"])
def test_our_depthwise_gradients_are_the_numerical_derivatives(kernel, stride, same):
    x = normal(2, 2, 6, 7, dtype=torch.float64).requires_grad_()
    weight = normal(2, 1, kernel, kernel, seed=1, dtype=torch.float64).requires_grad_()

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        padded, padding = pad_same(x, kernel, stride) if same else (x, (kernel // 2, kernel // 2))
        return ops._Depthwise.apply(padded, weight, stride, padding)

    assert torch.autograd.gradcheck(convolve, (x, weight))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("size", [7, 8, 13])
def test_our_depthwise_agrees_with_pytorch_in_float64(kernel, stride, size):
    padding = (kernel // 2, kernel // 2)
    results = []
    for function in (ops._Depthwise.apply, plain_depthwise):
        x = normal(3, 5, size, size, dtype=torch.float64).requires_grad_()
        weight = normal(5, 1, kernel, kernel, seed=1, dtype=torch.float64).requires_grad_()
        y = function(x, weight, stride, padding)
        y.backward(normal(*y.shape, seed=2, dtype=torch.float64))
        results.append((y, x.grad, weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("stride", STRIDES)
def test_bfloat16_gradients_are_as_close_to_the_truth_as_rounding_allows(kernel, stride):
    padding, shape = (kernel // 2, kernel // 2), (4, 8, 14, 14)
    x, weight = normal(*shape).bfloat16(), normal(8, 1, kernel, kernel, seed=1).bfloat16()
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = plain_depthwise(exact_x, exact_weight, stride, padding)
    grad = normal(*y.shape, seed=2).bfloat16()
    y.backward(grad.double())

    x.requires_grad_(), weight.requires_grad_()
    ops.depthwise(x, weight, stride, (padding, padding)).backward(grad)
    # bfloat16 has 8 bits: a correctly rounded value is within 2^-9 relative, accumulated norms well within 2^-7
    for ours, exact in ((x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert (ours.double() - exact).norm() <= 2**-7 * exact.norm()


def test_under_autocast_the_weight_gradient_is_float32_and_not_rounded_to_bfloat16():
    x, weight = normal(2, 4, 9, 9).requires_grad_(), normal(4, 1, 5, 5, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.depthwise(x, weight, 1, ((2, 2), (2, 2)))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


@pytest.mark.parametrize(
    ("dtype", "training", "ours"),
    [(torch.bfloat16, True, True), (torch.bfloat16, False, False), (torch.float32, True, False)],
)
def test_our_backward_is_used_in_bfloat16_training_only_where_nothing_is_compiled(dtype, training, ours, monkeypatch):
    monkeypatch.setenv("EFFNET_NATIVE", "0")
    x = normal(1, 2, 5, 5, dtype=dtype).requires_grad_(training)
    y = ops.depthwise(x, normal(2, 1, 3, 3, dtype=dtype), 1, ((1, 1), (1, 1)))
    assert ("_Depthwise" in str(y.grad_fn)) == ours
    assert torch.equal(y, plain_depthwise(x, normal(2, 1, 3, 3, dtype=dtype), 1, (1, 1)))


def test_a_frozen_weight_or_a_constant_input_needs_no_gradient():
    x, weight = normal(1, 2, 5, 5).bfloat16(), normal(2, 1, 3, 3).bfloat16()
    for moving in (x, weight):
        moving.requires_grad_()
        ops.depthwise(x, weight, 1, ((1, 1), (1, 1))).sum().backward()
        assert moving.grad is not None
        moving.requires_grad_(False)
    assert not ops.depthwise(x, weight, 1, ((1, 1), (1, 1))).requires_grad


@pytest.mark.parametrize(
    ("size", "dtype", "product"), [(7, "bfloat16", True), (14, "bfloat16", False), (7, "float32", False)]
)
def test_a_pointwise_convolution_of_a_small_map_is_a_matrix_product_in_bfloat16(size, dtype, product):
    x = normal(2, 16, size, size).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        assert ops.quicker_as_product(x) == product
        with torch.no_grad():
            assert not ops.quicker_as_product(x)

"""The compiled operators against PyTorch in float64, at every kernel, stride and padding, and at odd shapes."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet import families, native, ops
from effnet.network import build
from effnet.optim import RMSProp
from tests.conftest import missing

# float32 sums of at most a few thousand products; bfloat16 keeps 8 bits, so each rounded value is within 2^-9 relative
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
KERNELS, STRIDES, CHANNELS = (3, 5, 7), (1, 2), (8, 16, 40, 96)  # 40 ends within a vector, 8 is less than one


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if native.library() is None:  # no compiler is a machine without these operators; a compiler that fails is our fault
        reason = native.why_not()
        (missing if "no C++ compiler" in reason or "Linux" in reason else pytest.fail)(reason)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of `dtype`, relative to the norm of the whole."""
    assert (ours.double() - exact).norm() <= BOUNDS[dtype] * exact.norm() + 1e-12


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("kernel", "stride", "channels"), list(itertools.product(KERNELS, STRIDES, CHANNELS)))
@pytest.mark.parametrize("same", [False, True], ids=["symmetric", "same"])
def test_depthwise_and_both_its_gradients_are_those_of_pytorch_in_float64(kernel, stride, channels, same, dtype):
    for height, width in ((14, 9), (7, 7), (5, 12)):
        pads = tuple(ops.same_padding(n, kernel, stride) if same else (kernel // 2,) * 2 for n in (height, width))
        x, weight = normal(3, channels, height, width, dtype=dtype), normal(channels, 1, kernel, kernel, seed=1)
        weight = weight.to(dtype)
        exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
        (top, bottom), (left, right) = pads
        exact = F.conv2d(F.pad(exact_x, (left, right, top, bottom)), exact_weight, None, stride, groups=channels)
        grad = normal(*exact.shape, seed=2, dtype=dtype)
        exact.backward(grad.double())

        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = ops.depthwise(x, weight, stride, pads)
        assert "_NativeDepthwise" in str(y.grad_fn)
        y.backward(grad)
        close(y.detach(), exact.detach(), dtype)
        close(x.grad, exact_x.grad, dtype)
        close(weight.grad, exact_weight.grad, dtype)


@pytest.mark.parametrize("moving", [0, 1], ids=["input", "weight"])
def test_only_the_gradient_that_is_wanted_is_computed(moving):
    x, weight = normal(2, 16, 8, 8), normal(16, 1, 3, 3, seed=1)
    (x, weight)[moving].requires_grad_()
    ops.depthwise(x, weight, 1, ((1, 1), (1, 1))).sum().backward()
    assert ((x.grad is None), (weight.grad is None)) == ((True, False) if moving else (False, True))


def exact_norm_act(x: Tensor, norm: nn.BatchNorm2d, activation: str | None) -> Tensor:
    y = F.batch_norm(x, None, None, norm.weight.double(), norm.bias.double(), training=True, eps=norm.eps)
    return {None: lambda z: z, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}[activation](y)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu"])
def test_norm_and_activation_have_the_values_gradients_and_statistics_of_pytorch(activation, channels, dtype):
    x = (normal(5, channels, 7, 6) * 3 + 20).to(dtype)  # far from zero: where careless sums lose digits
    ours, theirs = (nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01) for _ in range(2))
    for norm in (ours, theirs):
        norm.weight.data, norm.bias.data = normal(channels, seed=1) + 1.5, normal(channels, seed=2)
    exact_x = x.double().requires_grad_()
    exact = exact_norm_act(exact_x, theirs, activation)
    grad, grad_means = normal(*exact.shape, seed=3, dtype=dtype), normal(5, channels, seed=4)
    (exact * grad.double()).sum().add((exact.mean((2, 3)) * grad_means.double()).sum()).backward()
    theirs(x.float())

    x.requires_grad_()
    assert ops.fuses(x, ours)
    y, means = ops.norm_act(x, ours, activation)
    torch.autograd.backward((y, means), (grad, grad_means))
    close(y.detach(), exact.detach(), dtype)
    close(means.detach(), exact.mean((2, 3)).detach(), torch.float32)
    close(x.grad, exact_x.grad, dtype)
    # PyTorch's own double-precision gradients land in the float32 parameters of `theirs`
    close(ours.weight.grad, theirs.weight.grad.double(), dtype)
    close(ours.bias.grad, theirs.bias.grad.double(), dtype)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_a_gate_has_the_values_and_gradients_of_a_product(channels, dtype):
    x, weights = normal(3, channels, 5, 4, dtype=dtype), normal(3, channels, seed=1)
    exact_x, exact_weights = x.double().requires_grad_(), weights.double().requires_grad_()
    exact = exact_x * exact_weights[:, :, None, None]
    grad = normal(*exact.shape, seed=2, dtype=dtype)
    exact.backward(grad.double())
    x.requires_grad_(), weights.requires_grad_()
    y = ops.gate(x, weights)
    y.backward(grad)
    for ours, theirs in ((y.detach(), exact.detach()), (x.grad, exact_x.grad), (weights.grad, exact_weights.grad)):
        close(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_silu_keeps_its_slope_at_the_far_ends(dtype):
    """exp of large numbers of both signs: no infinity, no NaN, and the limits 1 and 0."""
    norm = nn.BatchNorm2d(2, eps=0.0)
    x = torch.tensor([-1.0, 1.0]).repeat(2, 1).reshape(2, 2, 1, 1).transpose(0, 1)  # each channel -1 and 1
    x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    for scale in (1.0, 80.0, 200.0, 3e4):
        norm.weight.data.fill_(scale)
        y, _ = ops.norm_act(x, norm, "silu")
        expected = F.silu(x.detach().double() * scale).to(dtype)
        torch.testing.assert_close(y, expected, rtol=1e-5 if dtype == torch.float32 else 4e-3, atol=1e-5)
        y.sum().backward()
        assert torch.isfinite(x.grad).all()


def step(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Logits, all gradients and one running statistic after one training step."""
    model = build(families.get(name), generator=torch.Generator().manual_seed(0)).train()
    model = model.to(dtype=dtype, memory_format=torch.channels_last)
    model.set_regularisation(dropout=0.0, drop_path=0.0)
    logits = model(normal(8, 3, 64, 64, seed=1).to(dtype))
    F.cross_entropy(logits, torch.arange(8)).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return [part.detach().double() for part in (logits, gradients, model.stem.norm.running_var)]


@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_lite0", "tf_efficientnetv2_b0", "resnet18"])
def test_a_training_step_of_a_whole_network_is_as_exact_as_pytorchs_own(name, monkeypatch):
    """Fifty normalisations of eight images amplify rounding: the yardstick is PyTorch's own float32 error."""
    exact = step(name, torch.float64)
    ours = step(name, torch.float32)
    monkeypatch.setenv("EFFNET_NATIVE", "0")
    plain = step(name, torch.float32)
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert (mine - truth).norm() <= 3 * (theirs - truth).norm() + 1e-6 * truth.norm()


def test_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x, weight = normal(5, 40, 9, 9).requires_grad_(), normal(40, 1, 3, 3, seed=1).requires_grad_()
            norm = nn.BatchNorm2d(40)
            y, means = ops.norm_act(ops.depthwise(x, weight, 1, ((1, 1), (1, 1))), norm, "silu")
            (ops.gate(y, means) ** 2).sum().backward()
            results.append((y.detach(), x.grad, weight.grad, norm.weight.grad, norm.running_var))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        # gradients of the depthwise input may use oneDNN's forward, whose sums are per output: all must be equal bits
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_hooks_on_a_norm_are_called_in_training():
    model = build(families.get("efficientnet_lite0")).train().to(memory_format=torch.channels_last)
    seen = []
    model.get_submodule("stages.1.0.expand.norm").register_forward_hook(lambda *_: seen.append(1))
    model(normal(2, 3, 32, 32))
    assert seen == [1]


def test_switched_off_or_without_a_compiler_it_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFNET_NATIVE", "0")
    assert native.library() is None
    assert "EFFNET_NATIVE" in native.why_not()
    code = "from effnet import native; print(native.library(), native.why_not())"
    bare = {"PATH": str(tmp_path), "EFFNET_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path.cwd())}
    run = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("None no C++ compiler")


def test_a_broken_compiler_is_reported_and_leaves_no_file(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho out of registers >&2\nexit 1\n')
    compiler.chmod(0o755)
    code = "from effnet import native; print(native.library(), native.why_not())"
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "EFFNET_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path.cwd())}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "None" in run.stdout
    assert "out of registers" in run.stdout
    assert not list((tmp_path / "cache").glob("*.so"))


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_the_compiled_step_of_rmsprop_is_the_formula(weight_decay: float) -> None:
    """Against PyTorch's operators in float64; a tensor of more than one chunk, channels-last weights, one number."""
    shapes = ((70_000,), (6, 5, 3, 3), (16, 8, 1, 1), (1,))
    mine = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]
    exact = [nn.Parameter(p.detach().double()) for p in mine]
    steppers = [RMSProp(params, lr=0.1, weight_decay=weight_decay) for params in (mine, exact)]
    for step in range(3):
        for p, q in zip(mine, exact, strict=True):
            p.grad = torch.randn(
                p.shape, generator=torch.Generator().manual_seed(step)
            )  # the weights' own layout or not
            p.grad = p.grad.contiguous(memory_format=torch.channels_last) if p.ndim == 4 and step else p.grad
            q.grad = p.grad.double()
        for stepper in steppers:
            stepper.step()
    for p, q in zip(mine, exact, strict=True):
        close(p.detach(), q.detach(), torch.float32)


def test_the_step_of_rmsprop_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels-last weights with the gradients that autograd gives them."""
    network = families.get("efficientnet_b0")
    model = build(network.replace(resolution=64)).to(memory_format=torch.channels_last)
    model(normal(2, 3, 64, 64)).sum().backward()
    monkeypatch.setattr(torch, "_foreach_sqrt_", lambda *_: pytest.fail("not compiled"))
    RMSProp(model.parameters(), lr=0.1).step()


HEAP = r"""
import ctypes, re
from pathlib import Path
from effnet import native

def resident():
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])

before = resident()
assert native.keep_freed_memory() and native.keep_freed_memory()
assert resident() - before < 20e6, "addresses only"
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
middle = libc.malloc(ctypes.c_size_t(50_000_000)) + 25_000_000
for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
    low, high = (int(x, 16) for x in area.split(" ", 1)[0].split("-"))
    if low <= middle < high:
        print("advised" if re.search(r"VmFlags:.* hg\b", area) else area)
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_what_training_allocates_is_advised_huge_pages_and_nothing_is_taken_beforehand():
    run = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True)
    assert run.stdout == "advised\n"

"""The blocks against plain functional PyTorch, written from the papers' figures and given the blocks' own weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet.layers import (
    Activation,
    BasicBlock,
    Bottleneck,
    ConvNorm,
    Convolution,
    Dropout,
    DropPath,
    FusedMBConv,
    MaxPool,
    MBConv,
    Separable,
    SqueezeExcite,
    drop_path,
    dropout,
)
from effnet.spec import Conv, Head, Network, Norm, Preprocess, Stage, Stem, Unit, block, resolve

ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "relu6": lambda x: x.clamp(0, 6),
    "relu": lambda x: x.clamp(min=0),
}


def network(**changes) -> Network:
    stage = Stage(op="mbconv", repeats=1, width=8, stride=1)
    return Network(
        name="tiny",
        stem=Stem(width=8),
        stages=(stage,),
        head=Head(width=16, classes=5),
        resolution=32,
        preprocess=Preprocess(size=32, resize=32),
    ).replace(**changes)


def conv(**changes) -> Conv:
    fields = {"name": "conv", "in_channels": 4, "out_channels": 6, "kernel": 3, "stride": 1, "groups": 1}
    return Conv(**(fields | {"in_size": 8, "out_size": 8} | changes))


def unit(op: str, in_channels: int, out_channels: int, *, stride: int = 1, drop_path: float = 0.0, **fields) -> Unit:
    stage = Stage(op=op, repeats=1, width=out_channels, stride=stride, **fields)
    return block(stage, in_channels, out_channels, stride, 8, drop_path=drop_path)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: nn.Module, seed: int = 1) -> nn.Module:
    """The module in evaluation mode with random weights and running statistics that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(std=0.5, generator=generator)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return module.eval()


def layer(block: nn.Module, name: str, x: Tensor, network: Network, *, stride=1, groups=1, act=True) -> Tensor:
    """Convolution, normalisation by running statistics, activation: from the formulae and the block's weights."""
    state = {key.removeprefix(f"{name}."): value for key, value in block.state_dict().items()}
    weight = state["conv.weight"]
    y = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)
    mean, var, gamma, beta = (
        state[f"norm.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    y = (y - mean) / torch.sqrt(var + network.norm.eps) * gamma + beta
    return ACTIVATIONS[network.activation](y) if act else y


def gated(block: nn.Module, x: Tensor, network: Network) -> Tensor:
    """Squeeze-excite as two 1x1 convolutions of the pooled map."""
    s = block.state_dict()
    y = F.adaptive_avg_pool2d(x, 1)
    y = ACTIVATIONS[network.activation](F.conv2d(y, s["se.reduce.weight"], s["se.reduce.bias"]))
    return x * torch.sigmoid(F.conv2d(y, s["se.expand.weight"], s["se.expand.bias"]))


@pytest.mark.parametrize("activation", ["silu", "relu6", "relu"])
def test_mbconv_is_expand_depthwise_squeeze_excite_project_and_sum(activation):
    net = network(activation=activation)
    block = filled(MBConv(unit("mbconv", 8, 8, expand=4, kernel=5, se=0.25), net))
    x = images(2, 8, 9, 9)
    y = layer(block, "expand", x, net)
    y = layer(block, "depthwise", y, net, groups=32)
    y = layer(block, "project", gated(block, y, net), net, act=False)
    torch.testing.assert_close(block(x), x + y)


def test_mbconv_with_stride_or_new_width_has_no_shortcut_and_expand_one_no_expansion():
    net = network()
    block = filled(MBConv(unit("mbconv", 8, 12, stride=2), net))
    x = images(2, 8, 9, 9)
    y = layer(block, "depthwise", x, net, stride=2, groups=8)
    torch.testing.assert_close(block(x), layer(block, "project", y, net, act=False))
    assert not any(key.startswith(("expand", "se")) for key in block.state_dict())


def test_fused_mbconv_is_one_full_convolution_and_a_projection():
    net = network()
    block = filled(FusedMBConv(unit("fused", 8, 8, expand=4, se=0.25), net))
    x = images(2, 8, 9, 9)
    y = layer(block, "expand", x, net)
    y = layer(block, "project", gated(block, y, net), net, act=False)
    torch.testing.assert_close(block(x), x + y)


def test_fused_mbconv_with_expand_one_is_a_single_convolution_that_keeps_its_activation():
    net = network()
    block = filled(FusedMBConv(unit("fused", 8, 8), net))
    x = images(2, 8, 9, 9)
    torch.testing.assert_close(block(x), x + layer(block, "project", x, net))
    assert block.state_dict()["project.conv.weight"].shape == (8, 8, 3, 3)


def test_separable_has_two_activations_and_no_shortcut():
    net = network(activation="relu6")
    block = filled(Separable(unit("separable", 8, 8), net))
    x = images(2, 8, 9, 9)
    y = layer(block, "depthwise", x, net, groups=8)
    torch.testing.assert_close(block(x), layer(block, "pointwise", y, net))


@pytest.mark.parametrize(("out_channels", "stride"), [(8, 1), (12, 1), (8, 2)])
def test_basic_block_activates_after_the_sum_and_projects_where_the_identity_does_not_fit(out_channels, stride):
    net = network(activation="relu")
    block = filled(BasicBlock(unit("basic", 8, out_channels, stride=stride), net))
    x = images(2, 8, 9, 9)
    y = layer(block, "conv1", x, net, stride=stride)
    y = layer(block, "conv2", y, net, act=False)
    projects = (out_channels, stride) != (8, 1)
    shortcut = layer(block, "shortcut", x, net, stride=stride, act=False) if projects else x
    torch.testing.assert_close(block(x), F.relu(shortcut + y))


@pytest.mark.parametrize(("out_channels", "stride"), [(8, 1), (12, 1), (8, 2)])
def test_bottleneck_has_its_stride_in_the_middle_convolution(out_channels, stride):
    net = network(activation="relu")
    block = filled(Bottleneck(unit("bottleneck", 8, out_channels, stride=stride, expand=0.25), net))
    x = images(2, 8, 9, 9)
    y = layer(block, "conv1", x, net)
    y = layer(block, "conv2", y, net, stride=stride)
    y = layer(block, "conv3", y, net, act=False)
    projects = (out_channels, stride) != (8, 1)
    shortcut = layer(block, "shortcut", x, net, stride=stride, act=False) if projects else x
    torch.testing.assert_close(block(x), F.relu(shortcut + y))


def test_squeeze_excite_ignores_where_in_the_map_a_value_is():
    net = network()
    found = unit("mbconv", 8, 8, expand=2, se=0.5)
    se = filled(SqueezeExcite(found.conv("se.reduce"), found.conv("se.expand"), net))
    x = images(2, 16, 5, 5)
    torch.testing.assert_close(se(x).flip(3), se(x.flip(3)))
    assert se.reduce.weight.shape == (4, 16, 1, 1)  # half of the block's input, not of the expanded width


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 9])
def test_same_and_symmetric_convolutions_equal_padding_by_hand(size, stride, kernel, depthwise):
    widths = {"in_channels": 4, "out_channels": 4, "groups": 4} if depthwise else {}
    x = images(2, 4, size, size)
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    by_hand = {"same": (total // 2, total - total // 2), "symmetric": (kernel // 2, kernel // 2)}
    for padding, (before, after) in by_hand.items():
        module = filled(Convolution(conv(kernel=kernel, stride=stride, **widths), padding))
        padded = F.pad(x, (before, after, before, after))
        expected = F.conv2d(padded, module.weight, None, stride, groups=4 if depthwise else 1)
        torch.testing.assert_close(module(x), expected)
        assert expected.shape[-1] == -(-size // stride)


def test_the_two_paddings_differ_in_value_at_stride_two_on_an_even_size_only():
    modules = [filled(Convolution(conv(stride=2), padding)) for padding in ("same", "symmetric")]
    for size, agree in ((8, False), (9, True)):
        first, second = (module(images(1, 4, size, size)) for module in modules)
        assert torch.equal(first, second) == agree


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (8, 9), (2, 3)])
def test_max_pool_never_sees_its_padding(size):
    x = images(2, 3, *size) - 10  # zeros in the padding would win
    total = [2 if length % 2 else 1 for length in size]
    height, width = total
    padded = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2), value=-torch.inf)
    torch.testing.assert_close(MaxPool("same")(x), F.max_pool2d(padded, 3, 2))
    symmetric = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-torch.inf), 3, 2)
    torch.testing.assert_close(MaxPool("symmetric")(x), symmetric)
    assert symmetric.shape[-2:] == MaxPool("same")(x).shape[-2:] == tuple(-(-length // 2) for length in size)


def test_batch_norm_takes_eps_and_momentum_from_the_network():
    net = network(norm=Norm(eps=0.25, momentum=0.125))
    module = filled(ConvNorm(conv(), net)).train()
    before = module.norm.running_mean.clone()
    x = images(4, 4, 8, 8)
    raw = F.conv2d(x, module.conv.weight, None, 1, 1)
    y = module(x)
    mean, var = raw.mean((0, 2, 3)), raw.var((0, 2, 3), unbiased=False)
    expected = (raw - mean[:, None, None]) / torch.sqrt(var + 0.25)[:, None, None]
    expected = expected * module.norm.weight[:, None, None] + module.norm.bias[:, None, None]
    torch.testing.assert_close(y, F.silu(expected))
    torch.testing.assert_close(module.norm.running_mean, 0.875 * before + 0.125 * mean)


def test_silu_overwrites_its_input_only_where_no_gradient_needs_it():
    silu, x = Activation("silu"), images(2, 3)
    assert silu(x).data_ptr() != x.data_ptr()
    with torch.no_grad():
        assert silu(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_drop_path_drops_whole_samples_at_its_rate_and_keeps_the_expectation(rate):
    samples = 20_000
    x = torch.ones(samples, 2, 1, 1)
    y = drop_path(x, rate, torch.Generator().manual_seed(3))
    assert torch.equal(y[:, 0], y[:, 1])  # a sample goes as a whole
    kept = y[:, 0, 0, 0] != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - rate)))
    four_sigma = 4 * (rate * (1 - rate) / samples) ** 0.5
    assert abs(kept.double().mean().item() - (1 - rate)) < four_sigma


def test_drop_path_acts_in_training_only():
    module = filled(MBConv(unit("mbconv", 8, 8, drop_path=0.999), network()))
    module.drop_path.generator = torch.Generator().manual_seed(0)
    x = images(4, 8, 8, 8)
    assert not torch.equal(module(x), x)
    assert torch.equal(module.train()(x), x)  # at this rate every branch of these four is dropped


def test_a_block_without_a_shortcut_never_drops():
    module = filled(MBConv(unit("mbconv", 8, 12, drop_path=0.999), network())).train()
    x = images(4, 8, 8, 8)
    dropping = module(x)
    module.drop_path.rate = 0.0
    assert torch.equal(module(x), dropping)


@pytest.mark.parametrize(("kind", "function"), [(DropPath, drop_path), (Dropout, dropout)])
def test_rates_and_generators_may_be_set_at_any_time(kind, function):
    module, x = kind(0.0), images(64, 3, 2, 2)
    assert module(x) is x
    module.rate = 0.5
    module.generator = torch.Generator().manual_seed(7)
    first, second = module(x), module(x)
    assert not torch.equal(first, second)
    again = torch.Generator().manual_seed(7)
    assert torch.equal(first, function(x, 0.5, again))
    assert torch.equal(second, function(x, 0.5, again))
    assert module.eval()(x) is x


def test_a_given_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    drop_path(images(8, 3, 2, 2), 0.5, generator)
    dropout(images(8, 3), 0.5, generator)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_dropout_from_a_generator_has_the_rate_and_the_scale_of_pytorchs(rate):
    x = torch.ones(200, 200)
    y = dropout(x, rate, torch.Generator().manual_seed(5))
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - rate)))
    assert abs(kept.double().mean().item() - (1 - rate)) < 4 * (rate * (1 - rate) / x.numel()) ** 0.5


def test_half_precision_survives_drop_path_and_dropout():
    x = images(8, 3, 2, 2).bfloat16()
    generator = torch.Generator().manual_seed(0)
    assert drop_path(x, 0.5, generator).dtype == dropout(x, 0.5, generator).dtype == torch.bfloat16


def test_every_part_of_a_resolved_unit_has_a_submodule_of_its_name_and_shape():
    net = network(stages=(Stage(op="mbconv", repeats=2, width=8, stride=2, expand=4, se=0.25),))
    for found in resolve(net)[1:3]:
        module = MBConv(found, net)
        for part in found.convs:
            submodule = module.get_submodule(part.name)
            weight = submodule.conv.weight if part.norm else submodule.weight
            assert weight.shape == (part.out_channels, part.in_channels // part.groups, part.kernel, part.kernel)


def test_a_narrow_projection_at_stride_two_trains_channels_last():
    """torch 2.13's backward of such a convolution writes outside its memory; ours takes every second pixel first."""
    net = network(activation="relu", padding="symmetric")
    module = filled(Convolution(conv(in_channels=8, out_channels=12, kernel=1, stride=2), net.padding))
    x = torch.randn(4, 8, 64, 64).to(memory_format=torch.channels_last)
    ours, theirs = x.clone().requires_grad_(), x.clone().contiguous().requires_grad_()
    for _ in range(5):
        y = module(ours)
        expected = F.conv2d(theirs, module.weight, None, 2)
        torch.testing.assert_close(y, expected)
        y.sum().backward(), expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_pointwise_convolution_as_a_product_has_the_values_and_gradients_of_a_convolution():
    module = filled(Convolution(conv(in_channels=16, out_channels=24, kernel=1), "symmetric"))
    x = images(3, 16, 7, 5).to(memory_format=torch.channels_last)
    grad = images(3, 24, 7, 5, seed=2)
    exact_x, exact_weight = x.double().requires_grad_(), module.weight.detach().double().requires_grad_()
    exact = F.conv2d(exact_x, exact_weight)
    exact.backward(grad.double())
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.backward(grad.bfloat16())
    assert "Convolution" not in str(y.grad_fn)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in ((y, exact), (x.grad, exact_x.grad), (module.weight.grad, exact_weight.grad)):
        assert (ours.double() - theirs).norm() <= 2**-7 * theirs.norm()  # bfloat16 has 8 bits

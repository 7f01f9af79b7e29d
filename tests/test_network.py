"""The built module against its description, against PyTorch's own counters, and against what the papers say of it."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from effnet import families
from effnet.cost import cost
from effnet.layers import Convolution, DropPath
from effnet.network import FeatureExtractor, Model, build, endpoints, initialise, replace_head
from effnet.spec import Head, Network, Norm, Preprocess, Stage, Stem, resolve
from effnet.value import UsageError

SMALL = ("efficientnet_b0", "tf_efficientnet_lite0", "tf_efficientnetv2_b0", "mobilenet_v1", "mnasnet_a1", "resnet50")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 2, size: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, size, size, generator=seeded(seed))


def tiny(**changes) -> Network:
    """Every kind of part in a few thousand weights; stride 8."""
    stages = (
        Stage(op="fused", repeats=2, width=8, stride=1),
        Stage(op="fused", repeats=2, width=12, stride=2, expand=2),
        Stage(op="mbconv", repeats=3, width=16, stride=2, kernel=5, expand=4, se=0.25),
    )
    return Network(
        name="tiny",
        stem=Stem(width=8),
        stages=stages,
        head=Head(width=32, classes=5),
        resolution=32,
        preprocess=Preprocess(size=32, resize=32),
        norm=Norm(momentum=0.1),
        padding="same",
    ).replace(**changes)


def on_meta(network: Network) -> Model:
    with torch.device("meta"):
        return build(network)


# --- the description and the module are twins ----------------------------------------------------------------------


@pytest.mark.parametrize("name", families.names())
def test_every_unit_of_every_network_is_a_module_with_the_counts_of_its_cost_row(name):
    network = families.get(name)
    model, expected = on_meta(network), cost(network)
    for row in expected.units:
        module = model.get_submodule(row.name)
        statistics = [value for key, value in module.named_buffers() if "running" in key]
        assert sum(p.numel() for p in module.parameters()) == row.params, row.name
        assert sum(b.numel() for b in statistics) == row.norm_statistics, row.name
    assert sum(p.numel() for p in model.parameters()) == expected.params
    assert sum(b.numel() for key, b in model.named_buffers() if "running" in key) == expected.norm_statistics


def expected_keys(network: Network) -> set[str]:
    keys = set()
    for unit in resolve(network):
        for conv in unit.convs:
            path = unit.name if conv.name in ("conv", "linear") else f"{unit.name}.{conv.name}"
            if conv.norm:
                norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
                keys |= {f"{path}.conv.weight"} | {f"{path}.norm.{key}" for key in norm}
            else:
                keys |= {f"{path}.weight", f"{path}.bias"}
    return keys


@pytest.mark.parametrize("name", SMALL)
def test_the_names_of_the_weights_follow_from_the_units(name):
    network = families.get(name)
    assert set(on_meta(network).state_dict()) == expected_keys(network)


class Outputs(TorchDispatchMode):
    """Counts the output elements of every convolution and matrix product that PyTorch really runs."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.addmm.default):
            self.elements += result.numel()
        return result


# a `tf_` twin differs in its padding alone: sizes agree, so a few of them stand for all
COUNTED = [name for name in families.names() if not name.startswith("tf_") or name in SMALL]


@pytest.mark.parametrize("name", COUNTED)
def test_multiply_adds_and_activations_are_what_pytorch_counts_for_every_network(name):
    network = families.get(name)
    model, expected, size = on_meta(network).eval(), cost(network), network.resolution
    with torch.no_grad(), FlopCounterMode(display=False) as flops, Outputs() as outputs:
        model(torch.empty(1, 3, size, size, device="meta"))
    assert flops.get_total_flops() == 2 * expected.macs  # the counter says 2 FLOPs per multiply-add
    assert outputs.elements == expected.activations


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [64, 75])
def test_the_output_of_every_unit_has_the_channels_and_size_that_the_resolver_says(name, size):
    network = families.get(name)
    units = resolve(network, size)[:-1]
    model = on_meta(network).eval()
    _, taps = model.taps(torch.empty(1, 3, size, size, device="meta"), [unit.name for unit in units])
    for unit in units:
        assert taps[unit.name].shape == (1, unit.out_channels, unit.out_size, unit.out_size), unit.name


def saved_elements(network: Network, size: int, batch: int) -> float:
    """Elements per image that autograd keeps for the backward pass, in storages that are not the model's own."""
    model = build(network, generator=seeded()).train()
    model.set_regularisation(dropout=0.0, drop_path=0.0)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    storages, alive = {}, []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)  # or its address could be used again
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes() / 4  # in float32 elements
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images(batch, size))
    return sum(storages.values()) / batch


@pytest.mark.parametrize("size", [64, 75])
@pytest.mark.parametrize("name", [*SMALL, "efficientnet_lite0", "resnet18", "mobilenet_v2", "tf_efficientnet_b0"])
def test_the_count_of_saved_activations_is_what_autograd_keeps(name, size):
    # per batch, not per image, autograd also keeps two statistics per batch-norm channel: counted apart
    batch, network = 4, families.get(name)
    measured = saved_elements(network, size, batch) - cost(network).norm_statistics / batch
    assert cost(network, size).saved_elements == measured


# --- building -------------------------------------------------------------------------------------------------------


def test_initial_weights_follow_the_official_rule():
    model = build(families.get("efficientnet_b0"), generator=seeded())
    for name, module in model.named_modules():
        if isinstance(module, Convolution):
            weights = module.weight
            kernel, channels = module.kernel_size[0], 1 if module.groups > 1 else module.out_channels
            std = (2 / (kernel**2 * channels)) ** 0.5
            five_sigma = 5 / (2 * weights.numel()) ** 0.5  # of the sample standard deviation, relative
            assert weights.std().item() == pytest.approx(std, rel=five_sigma), name
            assert abs(weights.mean().item()) < 5 * std / weights.numel() ** 0.5, name
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()
            assert (module.running_var == 1).all() and not module.running_mean.any()
    weights, bound = model.classifier.weight, 1000**-0.5
    assert bound * 0.999 < weights.abs().max().item() <= bound
    assert weights.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert not model.classifier.bias.any()


def test_a_seed_decides_every_weight_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    first, again, other = (build(tiny(), generator=seeded(seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["stem.conv.weight"], other["stem.conv.weight"])
    assert torch.equal(before, torch.get_rng_state())


def test_without_a_generator_weights_are_drawn_from_pytorchs_own():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = build(tiny()).classifier.weight
        torch.manual_seed(3)
        assert torch.equal(first, build(tiny()).classifier.weight)


def test_a_model_on_the_meta_device_allocates_nothing_and_takes_weights_later():
    trained, empty = build(tiny(), generator=seeded()).eval(), on_meta(tiny()).eval()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(empty(images(size=32)), trained(images(size=32)))


@pytest.mark.parametrize("name", SMALL)
def test_a_fresh_network_gives_logits_of_a_sane_size_and_gradients_everywhere(name):
    model = build(families.get(name), generator=seeded()).train()
    model.set_generator(seeded())
    logits = model(images(4))
    logits.logsumexp(1).sum().backward()
    assert 0.01 < logits.std().item() < 10
    for key, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), key


def test_channels_last_changes_the_layout_and_not_the_logits():
    model = build(tiny(), generator=seeded()).eval()
    plain = model(images(size=32))
    strided = model.to(memory_format=torch.channels_last)(images(size=32).to(memory_format=torch.channels_last))
    torch.testing.assert_close(strided, plain)


# --- the head -------------------------------------------------------------------------------------------------------


def test_forward_is_features_then_head():
    model = build(tiny(), generator=seeded()).eval()
    x = images(size=33)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 5, 5)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.flatten(2).mean(2))
    assert torch.equal(model.forward_head(features), model(x))


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v1"])
def test_the_mean_of_a_class_activation_map_is_the_logit_without_its_bias(name):
    model = build(families.get(name), generator=seeded()).eval()
    nn.init.normal_(model.classifier.bias, generator=seeded())
    features = model.forward_features(images())
    maps = torch.einsum("kc,nchw->nkhw", model.get_classifier().weight, features)
    torch.testing.assert_close(maps.mean((2, 3)) + model.classifier.bias, model(images()))


def test_reset_classifier_changes_the_module_and_its_description_together():
    model = build(tiny(), generator=seeded())
    stem = model.stem.conv.weight.clone()
    model.reset_classifier(3, generator=seeded(1))
    assert model(images(size=32)).shape == (2, 3)
    assert model.num_classes == model.network.head.classes == 3
    assert sum(p.numel() for p in model.parameters()) == cost(model.network).params
    assert torch.equal(model.stem.conv.weight, stem)
    assert model.classifier.weight.abs().max() <= 3**-0.5 and not model.classifier.bias.any()
    with pytest.raises(UsageError, match="classes is 0"):
        model.reset_classifier(0)
    assert model.num_classes == 3


def test_replace_head_is_a_copy_with_labels_that_leaves_the_original_true():
    model = build(tiny(), generator=seeded())
    changed = replace_head(model, ["crack", "fine"], generator=seeded(1))
    assert changed.labels == ("crack", "fine") and changed.num_classes == 2
    assert model.labels is None and model.num_classes == 5
    with torch.no_grad():
        changed.stem.conv.weight.zero_()
    assert model.stem.conv.weight.any()
    assert replace_head(changed, 7).labels is None


@pytest.mark.parametrize(
    ("labels", "message"), [([], "classes is 0"), (["a", "a", "b"], "more than once: a"), ("cat", "do not fit")]
)
def test_labels_must_be_there_once_each(labels, message):
    with pytest.raises(UsageError, match=message):
        replace_head(build(tiny()), labels)
    with pytest.raises(UsageError, match=r"2 labels .* 5 outputs"):
        Model(tiny(), labels=["a", "b"])


# --- regularisation and recomputation -------------------------------------------------------------------------------


def rates(model: Model) -> list[float]:
    return [module.rate for module in model.modules() if isinstance(module, DropPath)]


def test_drop_path_rises_linearly_over_all_blocks_and_never_reaches_its_maximum():
    model = on_meta(families.get("efficientnet_b0"))
    assert rates(model) == pytest.approx([0.0125 * i for i in range(16)])


def test_regularisation_can_be_changed_while_training():
    model = on_meta(families.get("efficientnet_b0"))
    model.set_regularisation(drop_path=0.4)
    assert rates(model) == pytest.approx([0.025 * i for i in range(16)])
    assert model.dropout.rate == model.network.dropout == 0.2
    model.set_regularisation(dropout=0.5)
    assert model.dropout.rate == 0.5 and model.network.drop_path == 0.4
    model.set_regularisation(dropout=0.0, drop_path=0.0)
    assert not any(rates(model))
    with pytest.raises(UsageError, match=r"drop_path is 1\.5"):
        model.set_regularisation(drop_path=1.5)


def test_a_generator_makes_training_repeatable():
    model = build(tiny(dropout=0.5, drop_path=0.5), generator=seeded()).train()
    outputs = []
    for seed in (1, 1, 2):
        model.set_generator(seeded(seed))
        outputs.append(model(images(8, 32)))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def training_steps(model: Model, generator: torch.Generator | None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of two steps, then gradients, weights and running statistics."""
    model.train().set_generator(generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        loss = model(images(4, 32, seed=step)).logsumexp(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gradients = {f"grad.{key}": p.grad for key, p in model.named_parameters() if p.grad is not None}
    return losses, gradients | model.state_dict()


@pytest.mark.parametrize("own_generator", [True, False], ids=["a generator", "the global generator"])
@pytest.mark.parametrize("activation", ["silu", "relu6"])
def test_gradient_checkpointing_changes_no_bit_of_training(own_generator, activation):
    start = build(tiny(dropout=0.3, drop_path=0.8, activation=activation), generator=seeded())
    results, states = [], []
    with torch.random.fork_rng():
        for enable in (False, True):
            torch.manual_seed(11)
            model = copy.deepcopy(start)
            model.set_grad_checkpointing(enable)
            generator = seeded(11) if own_generator else None
            results.append(training_steps(model, generator))
            states.append((generator or torch.default_generator).get_state())
    (losses, tensors), (losses_again, tensors_again) = results
    assert losses == losses_again
    assert len(tensors) == len(tensors_again) > 100
    for key, tensor in tensors.items():
        assert torch.equal(tensor, tensors_again[key]), key
    assert torch.equal(*states)


def test_gradient_checkpointing_keeps_fewer_elements():
    kept = []
    for enable in (False, True):
        model = build(tiny(), generator=seeded()).train()
        model.set_grad_checkpointing(enable)
        sizes: list[int] = []
        with saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            model(images(8, 32))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_a_copied_model_draws_from_a_generator_of_its_own():
    model = build(tiny(drop_path=0.5), generator=seeded()).train()
    model.set_generator(seeded(1))
    twin = copy.deepcopy(model)
    assert torch.equal(model(images(8, 32)), twin(images(8, 32)))


# --- taps and maps --------------------------------------------------------------------------------------------------


def test_taps_are_what_hooks_see_and_let_gradients_through():
    model = build(tiny(), generator=seeded()).eval()
    names, seen = ["stem", "stages.1.0", "head", "classifier"], {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: seen.update({name: y}))
    logits, taps = model.taps(images(size=32), names)
    assert list(taps) == names and taps["classifier"] is logits
    assert all(torch.equal(taps[name], seen[name]) for name in names)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), taps["head"])
    share = model.classifier.weight[0] / taps["head"][0, 0].numel()
    torch.testing.assert_close(gradient, share[None, :, None, None].expand_as(gradient))


def test_an_unknown_tap_names_the_nearest_unit():
    model = on_meta(tiny())
    with pytest.raises(UsageError, match=r"no unit 'stages\.2\.9'.*mean 'stages\.2\.\d'"):
        model.taps(images(size=32), ["stages.2.9"])
    without_head = on_meta(families.get("resnet18"))
    with pytest.raises(UsageError, match="no unit 'head'"):
        without_head.taps(images(), ["head"])


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("efficientnet_b0", [16, 24, 40, 112, 320]),
        ("efficientnet_b3", [24, 32, 48, 136, 384]),
        ("tf_efficientnet_lite0", [16, 24, 40, 112, 320]),
        ("tf_efficientnetv2_s", [24, 48, 64, 160, 256]),
        ("mobilenet_v2", [16, 24, 32, 96, 320]),
        ("resnet50", [64, 256, 512, 1024, 2048]),
    ],
)
def test_feature_maps_are_the_published_endpoints_at_strides_2_to_32(name, channels):
    extractor = FeatureExtractor(on_meta(families.get(name)))
    assert extractor.feature_info.channels() == channels
    assert extractor.feature_info.reduction() == [2, 4, 8, 16, 32]
    maps = extractor.eval()(torch.empty(1, 3, 65, 96, device="meta"))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (width, -(-65 // stride), 96 // stride) for width, stride in zip(channels, (2, 4, 8, 16, 32), strict=True)
    ]


def test_feature_maps_are_the_outputs_of_the_units_they_name():
    model = build(tiny(), generator=seeded()).eval()
    extractor = FeatureExtractor(model, out_indices=(0, -1)).eval()
    assert extractor.feature_info.module_name() == ["stages.0.1", "stages.2.2"]
    _, taps = model.taps(images(size=32), extractor.feature_info.module_name())
    first, last = extractor(images(size=32))
    assert torch.equal(first, taps["stages.0.1"]) and torch.equal(last, taps["stages.2.2"])


def test_a_feature_extractor_keeps_only_what_it_runs_under_the_same_names():
    model = on_meta(tiny())
    extractor = FeatureExtractor(model, out_indices=[1])
    names = set(extractor.state_dict())
    assert names == {key for key in model.state_dict() if key.startswith(("stem.", "stages.0.", "stages.1."))}
    for wrong in ([3], []):
        with pytest.raises(UsageError, match=r"out_indices .* maps 0 to 2"):
            FeatureExtractor(model, out_indices=wrong)


def test_the_map_before_the_max_pool_of_a_resnet_counts():
    model = build(families.get("resnet18"), generator=seeded()).eval()
    extractor = FeatureExtractor(model, out_indices=(0, 1)).eval()
    before, after = extractor(images())
    assert extractor.feature_info.module_name() == ["stem.activation", "stages.0.1"]
    torch.testing.assert_close(before, model.stem.activation(model.stem.norm(model.stem.conv(images()))))
    assert torch.equal(after, model.taps(images(), ["stages.0.1"])[1]["stages.0.1"])


def test_feature_maps_train_the_same_with_checkpointing():
    losses = []
    for enable in (False, True):
        extractor = FeatureExtractor(build(tiny(drop_path=0.5), generator=seeded()))
        extractor.set_grad_checkpointing(enable)
        for module in extractor.modules():
            if isinstance(module, DropPath):
                module.generator = seeded(5)
        loss = sum(m.square().mean() for m in extractor.train()(images(4, 32)))
        loss.backward()
        losses.append((loss.item(), extractor.stem.conv.weight.grad))
    assert losses[0][0] == losses[1][0] and torch.equal(losses[0][1], losses[1][1])


def test_a_network_whose_stem_is_its_last_map_at_stride_two_taps_the_stem():
    network = tiny(stages=(Stage(op="mbconv", repeats=1, width=8, stride=2),))
    assert [point.name for point in endpoints(network)] == ["stem", "stages.0.0"]
    assert len(FeatureExtractor(on_meta(network), out_indices=[0]).stages) == 0


# --- refusals and compilers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 32, 32), r"shape \(N, 3, H, W\), not \(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), r"shape \(N, 3, H, W\), not \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 7), "at least 8 x 8 pixels, not 32 x 7"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"torch\.float32 images.*not torch\.uint8"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), r"torch\.float32 images.*not torch\.float64"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_by_name_and_value(x, message):
    model = on_meta(tiny())
    for function in (model, model.forward_features, FeatureExtractor(model), lambda x: model.taps(x, ["head"])):
        with pytest.raises(UsageError, match=f"tiny takes .*{message}"):
            function(x)


def test_the_smallest_input_and_autocast_are_accepted():
    model = build(tiny(), generator=seeded()).eval()
    assert model(images(1, 8)).shape == (1, 5)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images(1, 32))
    torch.testing.assert_close(half.float(), model(images(1, 32)), atol=0.05, rtol=0.05)
    assert model.bfloat16()(images(1, 32).bfloat16()).dtype == torch.bfloat16


def test_training_in_bfloat16_follows_float32():
    gradients = []
    for enabled in (False, True):
        model = build(tiny(), generator=seeded()).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(images(8, 32)).logsumexp(1).mean()
        loss.backward()
        gradients.append(model.classifier.weight.grad)
    exact, rounded = gradients
    assert (rounded - exact).norm() < 0.1 * exact.norm()


def test_the_model_is_one_graph_for_torch_export():
    model = build(tiny(), generator=seeded()).eval()
    with torch.no_grad():
        exported = torch.export.export(model, (images(size=32),))
    torch.testing.assert_close(exported.module()(images(size=32, seed=1)), model(images(size=32, seed=1)))


def test_initialise_can_start_a_model_again():
    model = build(tiny(), generator=seeded(1))
    start = copy.deepcopy(model.state_dict())
    model.train()(images(size=32))
    initialise(model, seeded(1))
    assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items())

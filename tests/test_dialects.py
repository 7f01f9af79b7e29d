"""The names of others: against their own state dicts, there and back bitwise, refused when anything is left over."""

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from effnet import dialects, families
from effnet.dialects import DIALECTS, from_effnet, key_map, native, read_foreign, recognise, shapes, to_effnet
from effnet.network import build
from effnet.spec import Network
from effnet.value import UsageError
from effnet.weight_files import write_foreign

from .conftest import need
from .test_checkpoint import Bomb

GOLDEN = json.loads((Path(__file__).parent / "golden" / "peer_keys.json").read_text())
PEERS = [(library, name) for library in ("timm", "torchvision") for name in GOLDEN[library]]


def spelled(network: Network) -> list[str]:
    """The dialects that have a name for `network`."""
    found = []
    for dialect in DIALECTS:
        try:
            key_map(network, dialect)
        except UsageError:
            continue
        found.append(dialect)
    return found


def random_state(network: Network, seed: int = 0) -> dict[str, Tensor]:
    """Our state dict of `network` with random tensors, without building it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) if shape else torch.tensor(seed + 5)
        for name, shape in shapes(network).items()
    }


def same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def key_digest(state: Mapping[str, tuple[int, ...]]) -> str:
    """As benchmarks/peers/compare.py computes it: names and shapes, whatever their order."""
    lines = sorted(f"{name} {shape}" for name, shape in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


# --- the names are theirs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("library", "name"), PEERS, ids=[f"{library}-{name}" for library, name in PEERS])
def test_names_and_shapes_are_those_of_the_peer_s_own_state_dict(library: str, name: str) -> None:
    """Oracle: state dicts of timm and torchvision themselves, recorded by benchmarks/peers/compare.py."""
    ours, tensors, digest = GOLDEN[library][name]
    network = families.get(ours)
    sizes = shapes(network)
    theirs = {key: sizes[own] for own, key in key_map(network, library).items()}
    assert len(theirs) == tensors and key_digest(theirs) == digest


@pytest.mark.parametrize("index", range(9))
def test_names_and_shapes_are_those_of_efficientnet_pytorch(index: int) -> None:
    package = need("efficientnet_pytorch")
    with torch.device("meta"):
        oracle = package.EfficientNet.from_name(f"efficientnet-b{index}").state_dict()
    sizes, names = (
        shapes(families.get(f"efficientnet-b{index}")),
        key_map(families.get(f"efficientnet-b{index}"), "lukemelas"),
    )
    assert {names[own]: shape for own, shape in sizes.items()} == {key: tuple(t.shape) for key, t in oracle.items()}


@pytest.mark.parametrize("index", range(5))
def test_names_and_shapes_are_those_of_efficientnet_lite_pytorch(index: int) -> None:
    package = need("efficientnet_lite_pytorch")
    with torch.device("meta"):
        oracle = package.EfficientNet.from_name(f"efficientnet-lite{index}").state_dict()
    network = families.get(f"tf_efficientnet_lite{index}")
    sizes, names = shapes(network), key_map(network, "lukemelas")
    assert {names[own]: shape for own, shape in sizes.items()} == {key: tuple(t.shape) for key, t in oracle.items()}


@pytest.mark.parametrize("name", families.names())
def test_our_names_and_shapes_are_those_of_the_built_model(name: str) -> None:
    network = families.get(name)
    with torch.device("meta"):
        state = build(network).state_dict()
    assert shapes(network) == {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("name", families.names())
def test_no_two_of_our_tensors_have_the_same_name_elsewhere(name: str) -> None:
    network = families.get(name)
    found = spelled(network)
    assert {"effnet", "timm"} <= set(found)
    for dialect in found:
        names = key_map(network, dialect)
        assert len(set(names.values())) == len(names), dialect
        assert recognise(names.values()) == (
            "torchvision" if name.startswith("resnet") and dialect == "timm" else dialect
        )


def test_tensorflow_s_variables_are_named_and_numbered_as_its_checkpoints_do() -> None:
    """Written out by hand from the released V1 and V2 checkpoints (reference: their code's default layer names)."""
    b0 = key_map(families.get("tf_efficientnet_b0"), "tf")
    assert b0["stem.conv.weight"] == "efficientnet-b0/stem/conv2d/kernel"
    assert b0["stem.norm.running_var"] == "efficientnet-b0/stem/tpu_batch_normalization/moving_variance"
    first = "efficientnet-b0/blocks_0"
    assert b0["stages.0.0.depthwise.conv.weight"] == f"{first}/depthwise_conv2d/depthwise_kernel"
    assert b0["stages.0.0.depthwise.norm.weight"] == f"{first}/tpu_batch_normalization/gamma"
    assert b0["stages.0.0.se.reduce.bias"] == f"{first}/se/conv2d/bias"
    assert b0["stages.0.0.project.conv.weight"] == f"{first}/conv2d/kernel"
    assert b0["stages.0.0.project.norm.bias"] == f"{first}/tpu_batch_normalization_1/beta"
    third = "efficientnet-b0/blocks_2"
    assert b0["stages.1.1.expand.conv.weight"] == f"{third}/conv2d/kernel"
    assert b0["stages.1.1.depthwise.norm.running_mean"] == f"{third}/tpu_batch_normalization_1/moving_mean"
    assert b0["stages.1.1.se.expand.weight"] == f"{third}/se/conv2d_1/kernel"
    assert b0["stages.1.1.project.conv.weight"] == f"{third}/conv2d_1/kernel"
    assert b0["stages.1.1.project.norm.weight"] == f"{third}/tpu_batch_normalization_2/gamma"
    assert b0["classifier.weight"] == "efficientnet-b0/head/dense/kernel"
    v2 = key_map(families.get("tf_efficientnetv2_s"), "tf")
    assert v2["stages.0.0.project.conv.weight"] == "efficientnetv2-s/blocks_0/conv2d/kernel"
    assert v2["stages.1.0.expand.conv.weight"] == "efficientnetv2-s/blocks_2/conv2d/kernel"
    assert v2["stages.1.0.project.conv.weight"] == "efficientnetv2-s/blocks_2/conv2d_1/kernel"
    assert v2["stages.1.0.project.norm.weight"] == "efficientnetv2-s/blocks_2/tpu_batch_normalization_1/gamma"
    assert not any("num_batches_tracked" in name for name in v2.values())


def test_a_network_that_a_code_base_does_not_have_is_refused() -> None:
    for name, dialect in (
        ("efficientnetv2_s", "lukemelas"),
        ("efficientnet_lite0", "torchvision"),
        ("mnasnet_a1", "torchvision"),
        ("mobilenet_v1", "tf"),
        ("resnet50", "lukemelas"),
    ):
        with pytest.raises(UsageError, match=f"{dialect} has no network like {name}"):
            key_map(families.get(name), dialect)
    with pytest.raises(UsageError, match="Did you mean 'timm'"):
        key_map(families.get("resnet50"), "tim")


def test_unknown_names_are_not_guessed() -> None:
    with pytest.raises(UsageError, match=r"no weights in a dialect we know \(effnet, timm.*vit\.norm"):
        recognise(["vit.norm.weight"])
    with pytest.raises(UsageError, match="there are no tensors"):
        recognise([])


# --- there and back -------------------------------------------------------------------------------------------------

BASELINES = ("mobilenet_v1", "mobilenet_v2", "mnasnet_a1", "resnet18", "resnet50")
SAMPLE = ("tf_efficientnet_b0", "efficientnet_lite1", "efficientnetv2_b1", *BASELINES)


@pytest.mark.parametrize("name", SAMPLE)
def test_there_and_back_is_bitwise(name: str) -> None:
    network = families.get(name)
    state = random_state(network)
    for dialect in spelled(network):
        back = to_effnet(from_effnet(state, network, dialect), network, dialect)
        expected = state if dialect != "tf" else {
            key: torch.zeros((), dtype=torch.int64) if key.endswith("num_batches_tracked") else tensor
            for key, tensor in state.items()
        }  # fmt: skip
        assert list(back) == list(state) and same(back, expected), dialect


def test_tensorflow_s_layouts_are_transposed_axis_by_axis() -> None:
    """One number at a time: kernel[h, w, in, out], depthwise[h, w, channel, 0] and dense[in, out]."""
    network = families.get("tf_efficientnet_b0")
    state = random_state(network)
    theirs, names = from_effnet(state, network, "tf"), key_map(network, "tf")
    stem, depthwise, dense = "stem.conv.weight", "stages.2.0.depthwise.conv.weight", "classifier.weight"
    assert theirs[names[stem]].shape == (3, 3, 3, 32) and theirs[names[stem]][0, 2, 1, 30] == state[stem][30, 1, 0, 2]
    assert theirs[names[depthwise]].shape == (5, 5, 144, 1)
    assert theirs[names[depthwise]][4, 1, 100, 0] == state[depthwise][100, 0, 4, 1]
    assert theirs[names[dense]].shape == (1280, 1000) and theirs[names[dense]][7, 9] == state[dense][9, 7]


def tf_checkpoint(network: Network, seed: int, suffix: str = "") -> dict[str, np.ndarray]:
    return {name + suffix: array for name, array in from_effnet(random_state(network, seed), network, "tf").items()}


def test_averaged_variables_are_preferred_and_the_optimiser_s_left_out() -> None:
    network = families.get("tf_efficientnet_b0")
    raw, averaged = tf_checkpoint(network, 1), tf_checkpoint(network, 2, dialects.EMA)
    kernel = "efficientnet-b0/stem/conv2d/kernel"
    slots = {f"{kernel}/RMSProp": raw[kernel], f"{kernel}/RMSProp_1": raw[kernel], "global_step": np.array(5)}
    assert torch.equal(
        to_effnet(raw | averaged | slots, network)["stem.conv.weight"], random_state(network, 2)["stem.conv.weight"]
    )
    assert torch.equal(
        to_effnet(raw | slots, network)["stem.conv.weight"], random_state(network, 1)["stem.conv.weight"]
    )
    del averaged[kernel + dialects.EMA]
    with pytest.raises(UsageError, match=f"1 missing: {kernel}"):
        to_effnet(raw | averaged, network, "tf")
    with pytest.raises(UsageError, match=rf"1 of another shape: {kernel} is \(3, 3, 32\)"):
        to_effnet(raw | {kernel: raw[kernel][0]}, network, "tf")


def test_the_scope_in_a_tensorflow_checkpoint_may_have_any_name() -> None:
    network = families.get("tf_efficientnet_b0")
    renamed = {name.replace("efficientnet-b0", "my-model"): array for name, array in tf_checkpoint(network, 1).items()}
    assert torch.equal(to_effnet(renamed, network)["head.conv.weight"], random_state(network, 1)["head.conv.weight"])


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_what_does_not_match_is_listed_on_both_sides_then_refused() -> None:
    network = families.get("efficientnet_b0")
    theirs = from_effnet(random_state(network), network, "timm")
    for name in [name for name in theirs if name.startswith("blocks.6.0.")]:
        theirs[name.replace("blocks.6", "blocks.7")] = theirs.pop(name)
    theirs["bn1.weight"] = torch.ones(31)
    with pytest.raises(UsageError) as caught:
        to_effnet(theirs, network)
    message = str(caught.value)
    assert "this file of timm weights, read as efficientnet_b0, does not fit" in message and "\n" not in message
    assert "19 missing: blocks.6.0.conv_pw.weight, blocks.6.0.bn1.weight" in message and "and 14 more;" in message
    assert "22 not expected: blocks.7.0.conv_pw.weight" in message
    assert "1 of another shape: bn1.weight is (31,), not (32,)" in message


def test_another_network_of_the_same_family_is_refused() -> None:
    b1 = families.get("efficientnet_b1")
    with pytest.raises(UsageError, match=r"not expected"):
        to_effnet(from_effnet(random_state(b1), b1, "lukemelas"), families.get("efficientnet_b0"))
    with pytest.raises(UsageError, match="this state dict, written as efficientnet_b0, does not fit"):
        from_effnet(random_state(b1), families.get("efficientnet_b0"), "timm")


@pytest.mark.parametrize("dialect", ["timm", "torchvision", "lukemelas", "tf"])
def test_another_number_of_classes_is_an_error_unless_a_new_head_is_wanted(dialect: str) -> None:
    network = families.get("efficientnet_b0")
    ten = network.with_classes(10)
    theirs = from_effnet(random_state(ten), ten, dialect)
    with pytest.raises(UsageError, match="a classifier of 10 classes, and efficientnet_b0 was asked for 1000"):
        to_effnet(theirs, network)
    headless = to_effnet(theirs, network, new_head=True)
    assert set(shapes(network)) - set(headless) == {"classifier.weight", "classifier.bias"}
    assert len(to_effnet(theirs, ten, new_head=True)) == len(shapes(ten)), "the same number keeps its classifier"


def test_files_without_batch_counters_start_them_at_zero() -> None:
    network = families.get("mobilenet_v2")
    theirs = from_effnet(random_state(network), network, "torchvision")
    old = {name: tensor for name, tensor in theirs.items() if not name.endswith("num_batches_tracked")}
    loaded = to_effnet(old, network)
    assert loaded["stem.norm.num_batches_tracked"].item() == 0
    assert loaded["stem.norm.num_batches_tracked"].dtype == torch.int64 and len(loaded) == len(theirs)


def test_native_sets_the_padding_and_epsilon_that_no_file_holds() -> None:
    """papers.md 4.2, row by row."""
    b0, b5, v2 = (families.get(name) for name in ("efficientnet_b0", "efficientnet_b5", "efficientnetv2_s"))
    tf = families.get("tf_efficientnet_b0")

    def facts(network: Network) -> tuple[float, str]:
        return network.norm.eps, network.padding

    assert facts(native(b0, "timm")) == facts(native(v2, "timm")) == (1e-5, "symmetric")
    assert facts(native(tf, "timm")) == (1e-3, "same")
    assert facts(native(b0, "torchvision")) == facts(native(tf, "torchvision")) == (1e-5, "symmetric")
    assert facts(native(b5, "torchvision")) == facts(native(v2, "torchvision")) == (1e-3, "symmetric")
    assert facts(native(b0, "lukemelas")) == facts(native(b0, "tf")) == (1e-3, "same")
    assert native(b0, "lukemelas").name == "tf_efficientnet_b0" and native(b0, "effnet") == b0
    assert native(families.get("mobilenet_v2"), "torchvision") == families.get("mobilenet_v2")


# --- files ----------------------------------------------------------------------------------------------------------

WEIGHTS = {"conv_stem.weight": torch.arange(6.0).reshape(2, 3), "bn1.bias": torch.ones(2)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    write_foreign(tmp_path / f"a{suffix}", WEIGHTS)
    assert same(read_foreign(tmp_path / f"a{suffix}"), WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


def test_tensorflow_s_arrays_are_kept_in_npz(tmp_path: Path) -> None:
    network = families.get("tf_efficientnet_b0")
    write_foreign(tmp_path / "a.npz", from_effnet(random_state(network), network, "tf"))
    loaded = to_effnet(read_foreign(tmp_path / "a.npz"), network)
    assert torch.equal(loaded["classifier.weight"], random_state(network)["classifier.weight"])
    with pytest.raises(UsageError, match=r"are written as \.npz"):
        write_foreign(tmp_path / "a.pth", {"x": np.ones(1)})
    with pytest.raises(UsageError, match=r"are written as \.safetensors"):
        write_foreign(tmp_path / "b.npz", WEIGHTS)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"state_dict_ema": state, "state_dict": {"conv_stem.weight": torch.zeros(1)}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"model": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"model_ema": {"n_averaged": torch.tensor(3)} | {f"module.{k}": t for k, t in state.items()}},
    ],
    ids=["state_dict", "model", "averages first", "data parallel", "compiled", "AveragedModel"],
)
def test_weights_are_found_inside_training_checkpoints(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap(WEIGHTS), tmp_path / "a.pth")
    assert same(read_foreign(tmp_path / "a.pth"), WEIGHTS)


@pytest.mark.parametrize("save", [torch.save, pickle.dump], ids=["torch.save", "pickle.dump"])
def test_a_pickle_is_never_run(tmp_path: Path, save: Any) -> None:
    traces = tmp_path / "it-ran"
    for suffix, expected in ((".pth", "cannot be read as a file of tensors alone"), (".safetensors", "it is a pickle")):
        with (tmp_path / f"a{suffix}").open("wb") as file:
            save({"conv_stem.weight": Bomb(traces)}, file)
        with pytest.raises(UsageError, match=expected) as caught:
            read_foreign(tmp_path / f"a{suffix}")
        assert "\n" not in str(caught.value) and not traces.exists()


def test_the_refusal_of_a_pickle_says_what_it_wanted_to_run(tmp_path: Path) -> None:
    torch.save({"x": Bomb(tmp_path / "it-ran")}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="it wants to run getattr"):
        read_foreign(tmp_path / "a.pth")


def test_files_that_hold_no_weights_say_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        read_foreign(tmp_path / "none.pth")
    (tmp_path / "a.h5").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"the suffix '\.h5' is not one of \.safetensors, \.pth"):
        read_foreign(tmp_path / "a.h5")
    (tmp_path / "page.pth").write_text("<!doctype html>")
    with pytest.raises(UsageError, match="it has no header"):
        read_foreign(tmp_path / "page.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(UsageError, match="holds no state dict"):
        read_foreign(tmp_path / "list.pth")
    torch.save({"a": torch.ones(1), "epoch": 3}, tmp_path / "mixed.pth")
    with pytest.raises(UsageError, match="holds epoch among its tensors"):
        read_foreign(tmp_path / "mixed.pth")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UsageError, match="cannot be read as a file of arrays"):
        read_foreign(tmp_path / "objects.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
@pytest.mark.parametrize("percent", [0, 10, 50, 90])
def test_a_file_cut_off_is_one_clear_error(tmp_path: Path, suffix: str, percent: int) -> None:
    path = tmp_path / f"a{suffix}"
    write_foreign(path, {name: t.numpy() for name, t in WEIGHTS.items()} if suffix == ".npz" else WEIGHTS)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * percent // 100])
    with pytest.raises(UsageError) as caught:
        read_foreign(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_safetensors_written_by_others_are_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(WEIGHTS, tmp_path / "a.safetensors")
    assert same(read_foreign(tmp_path / "a.safetensors"), WEIGHTS)

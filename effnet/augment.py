"""How does a training picture vary? Pure functions: (input, magnitude, random generator) -> output.

`view` makes one training view of a decoded image with as few resamplings as it can: a crop, or turns and a small affine
map in one. `rand_augment` and `auto_augment` work on a view, `mixup` and `cutmix` on a batch. Nothing keeps state, and
nothing reads a global generator.

Sources: the crop is TensorFlow's sample_distorted_bounding_box as the official code calls it (preprocessing.py);
RandAugment (Cubuk et al. 2020) and AutoAugment v0 (Cubuk et al. 2019) as in the official autoaugment.py; mixup (Zhang
et al. 2018) and cutmix (Yun et al. 2019) as in the official V2 datasets.py; random erasing (Zhong et al. 2020).
Departures: crops are resized with antialias; crops of 8-10 %, which V1's code draws and rejects, are kept; Contrast
blends with the mean grey (the official line counts the pixels instead: 196 for any picture of 224 px); in `view`,
shifts and cut-outs shrink below 224 px (`Reach.at`), and a JPEG is decoded at 1/2, 1/4 or 1/8 where both sides of what
is shown then still have the view's size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from effnet.images import Picture
from effnet.pixels import FILL, faded, histogram, looked_up, mean_grey, moved, resized, rotated, sharpened
from effnet.recipes import Crop, Policy
from effnet.spec import Interpolation
from effnet.value import check_choice, check_range

# --- one view of one image ------------------------------------------------------------------------------------------


def view(
    image: np.ndarray | Picture,
    size_px: int,
    *,
    crop: Crop,
    policy: Policy = "randaugment",
    magnitude: float = 0.0,
    rng: np.random.Generator,
    interpolation: Interpolation = "bicubic",
    area: tuple[float, float] = (0.08, 1.0),
) -> np.ndarray:
    """One random training view of `image` (uint8 (H, W, 3), or not yet decoded) as uint8 (size_px, size_px, 3).

    `crop` `inception`: a share `area` of the image (V2: from 0.05) at an aspect of 3/4 to 4/3, flipped half the time.
    `dihedral`: the central square, one of its eight flips and turns, within 3 degrees, 2 % of shift and 2 % of scale;
    for pictures without an up (one bilinear resampling). `resize`: the whole image, flipped half the time. `pad`: then
    also moved by up to an eighth of the side, black coming in, for small images (He et al. 2016). `none`: the whole
    image. On top comes the `policy`: two operations of `rand_augment` where `magnitude` is above 0; AutoAugment v0; or
    `cutout` of half the side, as the official V2 fine-tuning has it.
    """
    check_choice("crop", crop, get_args(Crop))
    check_choice("policy", policy, get_args(Policy))
    check_range("size_px", size_px, 1)
    check_range("magnitude", magnitude, 0)
    if crop == "dihedral":
        whole, shrink = _shrunk(image, size_px, *_sides(image))
        pixels = warp(
            whole,
            size_px,
            extent=(_sides(image)[0] / shrink, _sides(image)[1] / shrink),
            turns=int(rng.integers(4)),
            flip=bool(rng.integers(2)),
            degrees=rng.uniform(-3, 3),
            zoom=1 + rng.uniform(-0.02, 0.02),
            shift=rng.uniform(-0.02, 0.02, 2),
        )
    else:
        width, height = _sides(image)
        box = inception_box(width, height, rng, area=area) if crop == "inception" else (0, 0, width, height)
        part, inside = _part(image, box, size_px)
        pixels = resized(part, size_px, interpolation, box=inside, flip=crop != "none" and rng.random() < 0.5)
        if crop == "pad":
            pixels = shifted(pixels, rng)
    if policy == "autoaugment":
        return auto_augment(pixels, rng, reach=AUTO_REACH.at(size_px))
    if policy == "cutout":
        return cutout(pixels, size_px // 4, rng)
    if magnitude == 0:
        return pixels
    return rand_augment(pixels, magnitude, rng, reach=RAND_REACH.at(size_px))


def shifted(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`pixels` (S, S, 3) moved by at most S / 8 along each axis, with black where nothing was."""
    size = pixels.shape[0]
    most = size // 8
    top, left = rng.integers(0, 2 * most + 1, 2)
    padded = np.pad(pixels, ((most, most), (most, most), (0, 0)))
    return np.ascontiguousarray(padded[top : top + size, left : left + size])


def _sides(image: np.ndarray | Picture) -> tuple[int, int]:
    """Width and height."""
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else (image.width, image.height)


def _shrunk(image: np.ndarray | Picture, size_px: int, width: int, height: int) -> tuple[np.ndarray, int]:
    """The pixels of `image`, a JPEG's at 1 / 2, 4 or 8 where `width` x `height` of them then still hold a view."""
    if isinstance(image, np.ndarray):
        return image, 1
    shrink = next(s for s in (8, 4, 2, 1) if s == 1 or (image.shrinks and min(width, height) >= s * size_px))
    return image.pixels(shrink), shrink


def _part(
    image: np.ndarray | Picture, box: tuple[int, int, int, int], size_px: int
) -> tuple[np.ndarray, tuple[float, float, float, float] | None]:
    """The pixels under `box` (left, top, width, height), and where in them the box lies (None: it is all of them).

    Cut out first, so that no filter reaches beyond the box. What is not yet decoded comes as small as the view allows.
    """
    left, top, width, height = box
    pixels, shrink = _shrunk(image, size_px, width, height)
    if shrink == 1:
        return pixels[top : top + height, left : left + width], None
    sides = left / shrink, top / shrink, (left + width) / shrink, (top + height) / shrink
    first_column, first_row = int(sides[0]), int(sides[1])
    part = pixels[first_row : math.ceil(sides[3]), first_column : math.ceil(sides[2])]
    return part, (sides[0] - first_column, sides[1] - first_row, sides[2] - first_column, sides[3] - first_row)


def inception_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    attempts: int = 10,
) -> tuple[int, int, int, int]:
    """A random crop (left, top, width, height): an aspect is drawn first, then a height that gives an allowed `area`.

    After `attempts`, or where the crop is the whole image, the centre crop of 87.5 % of the shorter side.
    """
    for _ in range(attempts):
        ratio = rng.uniform(*aspect)
        low, high = (round(math.sqrt(share * width * height / ratio)) for share in area)
        high = min(high, height, int((width + 0.5) / ratio))
        crop_height = int(rng.integers(min(low, high), high + 1))
        crop_width = round(crop_height * ratio)
        if (crop_width, crop_height) == (width, height):
            break
        fits = 1 <= crop_height <= height and 1 <= crop_width <= width
        if fits and area[0] <= crop_width * crop_height / (width * height) <= area[1]:
            left, top = int(rng.integers(width - crop_width + 1)), int(rng.integers(height - crop_height + 1))
            return left, top, crop_width, crop_height
    side = max(1, int(0.875 * min(width, height)))
    return (width - side + 1) // 2, (height - side + 1) // 2, side, side


def warp(
    image: np.ndarray,
    size_px: int,
    *,
    turns: int = 0,
    flip: bool = False,
    degrees: float = 0.0,
    zoom: float = 1.0,
    shift: tuple[float, float] | np.ndarray = (0.0, 0.0),
    extent: tuple[float, float] | None = None,
) -> np.ndarray:
    """The central square of `image` at (size_px, size_px): flipped left-right, then turned, in one bilinear resampling.

    `turns`: quarter turns counter-clockwise, as `np.rot90`. `degrees`: a turn before the flip, counter-clockwise too.
    `zoom` above 1 shows more than the square. `shift` (x, y): of the window over the source, in shares of the square.
    What lies outside the image is its mirror image. Sources of twice the size and more are averaged over whole pixels
    first. At the square's own size, and without the other three, flips and turns are exact. `extent`: width and height
    of what `image` shows, where its last pixels are not full ones.
    """
    width, height = extent or (image.shape[1], image.shape[0])
    side = min(height, width)
    reduction = max(1, int(side / size_px))
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    quarter = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), turns % 4)  # view to source: (x, y) -> (-y, x)
    mirror = np.diag([-1 if flip else 1, 1])
    matrix = side * zoom / size_px * np.array([[cosine, -sine], [sine, cosine]]) @ mirror @ quarter
    centre = np.array([width, height]) / 2 + side * np.asarray(shift)
    origin = centre - matrix @ [size_px / 2, size_px / 2]  # the source point of the view's top left corner

    corners = origin + size_px * np.array([[0, 0], [0, 1], [1, 0], [1, 1]]) @ matrix.T
    image, left, top = _mirrored(image, corners.min(axis=0), corners.max(axis=0), reduction)
    picture = Image.fromarray(image)
    if reduction > 1:
        picture = picture.reduce(reduction)
    (a, b), (d, e) = matrix / reduction
    c, f = (origin + np.array([left, top])) / reduction
    data = (a, b, c, d, e, f)  # from the view's pixels to the picture's
    return np.array(picture.transform((size_px, size_px), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR))


def _mirrored(image: np.ndarray, low: np.ndarray, high: np.ndarray, step: int) -> tuple[np.ndarray, int, int]:
    """`image` continued by reflection until it holds the points `low` to `high`; and what was added left and above.

    Whole multiples of `step` are added there, so that averaging over `step` pixels meets the same pixels as without.
    """
    height, width = image.shape[:2]
    left, top = (math.ceil(max(0.0, -value) / step) * step for value in low)
    right, bottom = (math.ceil(max(0.0, value)) for value in high - [width, height])
    if left or top or right or bottom:
        image = np.pad(image, ((top, bottom), (left, right), (0, 0)), mode="symmetric")
    return image, left, top


# --- RandAugment and AutoAugment ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far level 10 shifts a picture, and half the side of the square it cuts out, in pixels."""

    translate_px: float
    cutout_px: float

    def at(self, size_px: int) -> "Reach":
        """The same share of the picture below 224 px: 100 pixels would move one of 64 px out of sight."""
        scale = min(1.0, size_px / 224)
        return Reach(translate_px=self.translate_px * scale, cutout_px=self.cutout_px * scale)


RAND_REACH = Reach(translate_px=100, cutout_px=40)
AUTO_REACH = Reach(translate_px=250, cutout_px=100)

Operation = Callable[[np.ndarray, float, np.random.Generator, Reach], np.ndarray]
_VALUES = np.arange(256)


def _either_way(value: float, rng: np.random.Generator) -> float:
    """`value` with a random sign."""
    return value if rng.random() < 0.5 else -value


def _mapped(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each value v becomes `values[v]` (256), or `values[c, v]` (3, 256) in channel c; rounded down and clipped."""
    return looked_up(image, np.ascontiguousarray(np.broadcast_to(np.clip(values, 0, 255).astype(np.uint8), (3, 256))))


def _rotate(image: np.ndarray, level: float, rng: np.random.Generator, _: Reach) -> np.ndarray:
    return rotated(image, _either_way(30 * level / 10, rng))  # the official code samples the nearest pixel


def _shear_x(image: np.ndarray, level: float, rng: np.random.Generator, _: Reach) -> np.ndarray:
    return moved(image, (1, _either_way(0.3 * level / 10, rng), 0, 0, 1, 0))


def _shear_y(image: np.ndarray, level: float, rng: np.random.Generator, _: Reach) -> np.ndarray:
    return moved(image, (1, 0, 0, _either_way(0.3 * level / 10, rng), 1, 0))


def _translate_x(image: np.ndarray, level: float, rng: np.random.Generator, reach: Reach) -> np.ndarray:
    return moved(image, (1, 0, _either_way(reach.translate_px * level / 10, rng), 0, 1, 0))


def _translate_y(image: np.ndarray, level: float, rng: np.random.Generator, reach: Reach) -> np.ndarray:
    return moved(image, (1, 0, 0, 0, 1, _either_way(reach.translate_px * level / 10, rng)))


def _auto_contrast(image: np.ndarray, level: float, rng: np.random.Generator, _: Reach) -> np.ndarray:
    counts = histogram(image) > 0
    low, high = counts.argmax(axis=1), 255 - counts[:, ::-1].argmax(axis=1)
    scale = 255 / np.maximum(high - low, 1)  # a flat channel stays as it is
    stretched = np.floor(_VALUES * scale[:, None] + -low[:, None] * scale[:, None])
    return _mapped(image, np.where((high > low)[:, None], stretched, _VALUES))


def _equalize(image: np.ndarray, level: float, rng: np.random.Generator, _: Reach) -> np.ndarray:
    counts = histogram(image).astype(np.int64)
    highest = 255 - (counts[:, ::-1] > 0).argmax(axis=1)
    step = (counts.sum(axis=1) - counts[np.arange(3), highest]) // 255
    before = np.cumsum(counts, axis=1) - counts
    spread = (before + (step // 2)[:, None]) // np.maximum(step, 1)[:, None]
    return _mapped(image, np.where((step > 0)[:, None], spread, _VALUES))  # too few values to spread: as it is


def _invert(image: np.ndarray, level: float, rng: np.random.Generator, _: Reach) -> np.ndarray:
    return 255 - image


def _posterize(image: np.ndarray, level: float, rng: np.random.Generator, _: Reach) -> np.ndarray:
    bits = min(max(int(level / 10 * 4), 1), 8)  # TensorFlow clamps the shift too: at least one bit is kept
    return image & np.uint8(256 - 2 ** (8 - bits))


def _solarize(image: np.ndarray, level: float, rng: np.random.Generator, _: Reach) -> np.ndarray:
    threshold = int(level / 10 * 256)  # from level 10 on nothing is inverted (official)
    return _mapped(image, np.where(threshold > _VALUES, _VALUES, 255 - _VALUES))


def _solarize_add(image: np.ndarray, level: float, rng: np.random.Generator, _: Reach) -> np.ndarray:
    return _mapped(image, np.where(_VALUES < 128, _VALUES + int(level / 10 * 110), _VALUES))


def _factor(level: float) -> float:
    """How much of the picture is left beside its degenerate twin (grey, mean, black, smooth); 1 changes nothing."""
    return level / 10 * 1.8 + 0.1


def _color(image: np.ndarray, level: float, rng: np.random.Generator, _: Reach) -> np.ndarray:
    return faded(image, _factor(level))


def _contrast(image: np.ndarray, level: float, rng: np.random.Generator, _: Reach) -> np.ndarray:
    return _blended(image, mean_grey(image), level)


def _brightness(image: np.ndarray, level: float, rng: np.random.Generator, _: Reach) -> np.ndarray:
    return _blended(image, 0, level)


def _blended(image: np.ndarray, flat: int, level: float) -> np.ndarray:
    """A picture of the one value `flat`, blended with `image`; float32, as Pillow blends."""
    return _mapped(image, np.float32(flat) + np.float32(_factor(level)) * (_VALUES - flat).astype(np.float32))


def _sharpness(image: np.ndarray, level: float, rng: np.random.Generator, _: Reach) -> np.ndarray:
    return sharpened(image, _factor(level))


def _cutout(image: np.ndarray, level: float, rng: np.random.Generator, reach: Reach) -> np.ndarray:
    half_px = int(level / 10 * reach.cutout_px)
    left, top, right, bottom = _square(image.shape[1], image.shape[0], half_px, rng)
    image = image.copy()
    image[top:bottom, left:right] = FILL
    return image


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Cutout": _cutout,
    "SolarizeAdd": _solarize_add,
}
_IN_ORDER = tuple(OPERATIONS.values())


def distort(
    image: np.ndarray, operation: str, level: float, rng: np.random.Generator, *, reach: Reach = RAND_REACH
) -> np.ndarray:
    """One operation of RandAugment, by name, on a uint8 (H, W, 3) image. Levels above 10 extrapolate."""
    check_choice("operation", operation, OPERATIONS)
    return OPERATIONS[operation](image, level, rng, reach)


def rand_augment(
    image: np.ndarray, magnitude: float, rng: np.random.Generator, *, operations: int = 2, reach: Reach = RAND_REACH
) -> np.ndarray:
    """`operations` of the sixteen, drawn with replacement, each at level `magnitude` (0..10; more extrapolates).

    The paper's and the code's magnitudes share this scale; they differ in what a recipe asks for (V2: 15/20/25 against
    10/15/20). Level 0 is not the identity: Posterize keeps one bit, Solarize inverts, Color leaves a tenth.
    """
    for index in rng.integers(len(OPERATIONS), size=operations):
        image = _IN_ORDER[index](image, magnitude, rng, reach)
    return image


Step = tuple[str, float, int]  # operation, probability, level

AUTO_AUGMENT_V0: tuple[tuple[Step, Step], ...] = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
    (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)


def auto_augment(image: np.ndarray, rng: np.random.Generator, *, reach: Reach = AUTO_REACH) -> np.ndarray:
    """One of the 25 sub-policies of AutoAugment v0, drawn uniformly, on a uint8 (H, W, 3) image."""
    for name, probability, level in AUTO_AUGMENT_V0[rng.integers(len(AUTO_AUGMENT_V0))]:
        if rng.random() < probability:
            image = OPERATIONS[name](image, level, rng, reach)
    return image


# --- holes ----------------------------------------------------------------------------------------------------------


def _square(width: int, height: int, half_px: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A square of side 2 * half_px around a uniform centre, clipped to the image: (left, top, right, bottom)."""
    x, y = int(rng.integers(width)), int(rng.integers(height))
    return max(0, x - half_px), max(0, y - half_px), min(width, x + half_px), min(height, y + half_px)


def cutout(image: np.ndarray, half_px: int, rng: np.random.Generator) -> np.ndarray:
    """A square of side 2 * `half_px` around a random centre becomes noise (DeVries & Taylor 2017).

    The official V2 fine-tuning takes a quarter of the image's side for `half_px`.
    """
    left, top, right, bottom = _square(image.shape[1], image.shape[0], half_px, rng)
    return _with_noise(image, left, top, right, bottom, rng)


def erase(
    image: np.ndarray,
    p: float,
    rng: np.random.Generator,
    *,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: float = 0.3,
) -> np.ndarray:
    """Random erasing: with probability `p` a rectangle of 2-40 % of the area becomes noise (Zhong et al. 2020, Alg. 1).

    `aspect`: the least height / width, its inverse the largest. A hundred attempts to fit one, else nothing is erased.
    """
    check_range("erasing probability", p, 0, 1)
    if rng.random() >= p:
        return image
    height, width = image.shape[:2]
    for _ in range(100):
        pixels, ratio = rng.uniform(*area) * height * width, rng.uniform(aspect, 1 / aspect)
        hole_height, hole_width = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if hole_height <= height and hole_width <= width:
            left, top = int(rng.integers(width - hole_width + 1)), int(rng.integers(height - hole_height + 1))
            return _with_noise(image, left, top, left + hole_width, top + hole_height, rng)
    return image


def _with_noise(
    image: np.ndarray, left: int, top: int, right: int, bottom: int, rng: np.random.Generator
) -> np.ndarray:
    image = image.copy()
    image[top:bottom, left:right] = rng.integers(0, 256, (bottom - top, right - left, 3), dtype=np.uint8)
    return image


# --- batches --------------------------------------------------------------------------------------------------------


Share = tuple[
    int, np.ndarray
]  # of a larger batch: its images, and the places in it of those at hand, ascending by half


def mixup(
    batch: Tensor, targets: Tensor, alpha: float, rng: np.random.Generator, share: Share | None = None
) -> tuple[Tensor, Tensor]:
    """Each image with the one at the mirrored place of the batch: w * own + (1 - w) * other; the targets likewise.

    `batch`: float (N, C, H, W); `targets`: float (N, K). w ~ Beta(alpha, alpha) per image, folded to max(w, 1 - w), so
    that an image stays mostly itself. `alpha` 0: nothing changes. `share`: `batch` is a part of a larger one, (images,
    places of these), that holds every image's mirrored one; draws are made for all and used by place.
    """
    check_range("mixup alpha", alpha, 0)
    if alpha == 0:
        return batch, targets
    count, places = share or (len(batch), np.arange(len(batch)))
    weight = torch.from_numpy(rng.beta(alpha, alpha, count)[places])
    weight = torch.maximum(weight, 1 - weight).to(batch.device, torch.float32)
    mixed = torch.lerp(batch.flip(0), batch, weight.view(-1, 1, 1, 1).to(batch.dtype))
    return mixed, torch.lerp(targets.flip(0), targets, weight.view(-1, 1).to(targets.dtype))


def cutmix(
    batch: Tensor, targets: Tensor, alpha: float, rng: np.random.Generator, share: Share | None = None
) -> tuple[Tensor, Tensor]:
    """Each image with a rectangle of the one at the mirrored place; the targets by the area that was really pasted.

    Shapes and `share` as in `mixup`. The rectangle has the image's aspect, sides of sqrt(1 - Beta(alpha, alpha)) and a
    uniform centre, and is clipped at the borders. `alpha` 0: nothing changes.
    """
    check_range("cutmix alpha", alpha, 0)
    if alpha == 0:
        return batch, targets
    total, places = share or (len(batch), np.arange(len(batch)))
    count, _, height, width = batch.shape
    mixed, pasted = batch.clone(), torch.empty(count, 1, dtype=targets.dtype)
    ratios = np.sqrt(1 - rng.beta(alpha, alpha, total))
    centres = [(int(rng.integers(width)), int(rng.integers(height))) for _ in range(total)]
    for i, place in enumerate(places):
        (x, y), ratio = centres[place], ratios[place]
        half_width, half_height = int(ratio * width) // 2, int(ratio * height) // 2
        columns = slice(max(0, x - half_width), min(width, x + half_width))
        rows = slice(max(0, y - half_height), min(height, y + half_height))
        mixed[i, :, rows, columns] = batch[count - 1 - i, :, rows, columns]
        pasted[i] = (columns.stop - columns.start) * (rows.stop - rows.start) / (height * width)
    return mixed, torch.lerp(targets, targets.flip(0), pasted.to(targets.device))


def mix(
    batch: Tensor,
    targets: Tensor,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    rng: np.random.Generator,
    share: Share | None = None,
) -> tuple[Tensor, Tensor]:
    """Mixup on the first half of the batch and cutmix on the second; where one `alpha` is 0, the other on all of it."""
    if not (mixup_alpha and cutmix_alpha):
        return cutmix(*mixup(batch, targets, mixup_alpha, rng, share), cutmix_alpha, rng, share)
    total, places = share or (len(batch), np.arange(len(batch)))
    middle = total // 2
    half = int((places < middle).sum())
    early, late = (middle, places[:half]), (total - middle, places[half:] - middle)
    blended = mixup(batch[:half], targets[:half], mixup_alpha, rng, early)
    pasted = cutmix(batch[half:], targets[half:], cutmix_alpha, rng, late)
    return torch.cat([blended[0], pasted[0]]), torch.cat([blended[1], pasted[1]])


def mirrored(mixup_alpha: float, cutmix_alpha: float) -> int:
    """How many places of a batch `mix` ties together: a share must hold 1, 2 or 4 at a time."""
    return (2 if mixup_alpha or cutmix_alpha else 1) * (2 if mixup_alpha and cutmix_alpha else 1)

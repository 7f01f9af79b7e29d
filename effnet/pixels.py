"""Which operators on uint8 pictures are worth writing ourselves? Those between a decoded image and a view of it.

Pictures are uint8 (H, W, 3) numpy arrays. Where there is a C++ compiler the operators are those of `native/pixels.cpp`,
else Pillow's; on x86-64 both give the same bytes (`tests/test_pixels.py`), so a run does not depend on which of them
made its views. Nothing here draws a random number, and no input is changed.
"""

import ctypes
import math

import numpy as np
from PIL import Image, ImageEnhance

from effnet import native
from effnet.spec import Interpolation

FILL = (128, 128, 128)  # what geometric operations uncover (official code)
_FIXED = 1 << 16
Box = tuple[float, float, float, float]
Sides = tuple[int, int]
Window = tuple[int, int, int, int]
Matrix = tuple[float, float, float, float, float, float]


def resampling(interpolation: Interpolation) -> Image.Resampling:
    """Pillow's filter of that name (antialiased when it shrinks, `nearest` excepted)."""
    return Image.Resampling[interpolation.upper()]


def resized(
    image: np.ndarray, size_px: int, interpolation: Interpolation, *, box: Box | None = None, flip: bool = False
) -> np.ndarray:
    """`box` of `image` (left, top, right, bottom in pixels; all of it when None) at (size_px, size_px), then mirrored.

    Antialiased; what shrinks four times and more is averaged over whole pixels first (Pillow's `reducing_gap` of 2).
    Only the columns may be contiguous: a part of a larger picture need not be copied.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = box or (0, 0, width, height)
    slight = max(right - left, bottom - top) < 4 * size_px
    if not slight or interpolation not in ("bilinear", "bicubic"):
        whole = Image.fromarray(image)
        picture = whole.resize((size_px, size_px), resampling(interpolation), box, reducing_gap=2.0)
        return _mirrored(picture, flip)
    return _two_passes(image, box or (0, 0, width, height), (size_px, size_px), None, interpolation, flip)


def scaled(
    image: np.ndarray, width: int, height: int, interpolation: Interpolation, window: Window | None = None
) -> np.ndarray:
    """All of `image` at (height, width), and of that the `window` (left, top, width, height; all of it when None).

    Antialiased, with every pixel of the image weighed; what lies outside the window is not computed.
    """
    box = (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))
    return _two_passes(image, box, (width, height), window, interpolation, flip=False)


def _two_passes(
    image: np.ndarray, box: Box, whole: Sides, window: Window | None, interpolation: Interpolation, flip: bool
) -> np.ndarray:
    """`box` of `image` at `whole` (width, height), of that the `window`; rows first, always.

    Pillow 13 chooses the order of its two passes by the shape, Pillow 12 and what was built on it do not.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = box
    window = window or (0, 0, *whole)
    library = native.picture_library()
    if library is None or image.strides[1:] != (3, 1) or interpolation not in ("bilinear", "bicubic"):
        filter = resampling(interpolation)
        rows = Image.fromarray(image).resize((whole[0], height), filter, (left, 0, right, height))
        picture = rows.resize(whole, filter, (0, top, whole[0], bottom))
        column, line = window[:2]
        return _mirrored(picture.crop((column, line, column + window[2], line + window[3])), flip)
    out = np.empty((window[3], window[2], 3), np.uint8)
    corners = (ctypes.c_float * 4)(*box)
    cubic = interpolation == "bicubic"
    library.effnet_resize(
        _at(image), image.strides[0], width, height, corners,
        (ctypes.c_int * 2)(*whole), (ctypes.c_int * 4)(*window), _at(out), cubic, flip,
    )  # fmt: skip
    return out


def looked_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Each value v of channel c becomes `table[c, v]`; `table`: uint8 (3, 256)."""
    library = native.picture_library()
    if library is None:
        return np.array(Image.fromarray(image).point(table.ravel().tolist()))
    image, table = np.ascontiguousarray(image), np.ascontiguousarray(table)
    out = np.empty_like(image)
    library.effnet_look_up(_at(image), _at(out), _at(table), image.size)
    return out


def histogram(image: np.ndarray) -> np.ndarray:
    """How often each channel has each value: int32 (3, 256)."""
    library = native.picture_library()
    if library is None:
        return np.array(Image.fromarray(image).histogram(), np.int32).reshape(3, 256)
    image = np.ascontiguousarray(image)
    counts = np.empty((3, 256), np.int32)
    library.effnet_histogram(_at(image), image.size, _at(counts))
    return counts


def mean_grey(image: np.ndarray) -> int:
    """The mean of the luma (ITU-R 601-2), rounded."""
    pixels = image.shape[0] * image.shape[1]
    library = native.picture_library()
    if library is None:
        total = int(np.asarray(Image.fromarray(image).convert("L")).sum(dtype=np.int64))
    else:
        image = np.ascontiguousarray(image)
        sums = np.empty(1, np.int64)
        library.effnet_luma_sum(_at(image), pixels, _at(sums))
        total = int(sums[0])
    return int(total / pixels + 0.5)


def faded(image: np.ndarray, factor: float) -> np.ndarray:
    """The grey picture (0) blended with the coloured one (1); beyond 1 colours grow stronger."""
    library = native.picture_library()
    if library is None:
        return np.array(ImageEnhance.Color(Image.fromarray(image)).enhance(factor))
    image = np.ascontiguousarray(image)
    out = np.empty_like(image)
    library.effnet_fade(_at(image), _at(out), image.shape[0] * image.shape[1], factor)
    return out


def sharpened(image: np.ndarray, factor: float) -> np.ndarray:
    """The smoothed picture (0) blended with the picture (1); beyond 1 edges grow stronger."""
    library = native.picture_library()
    if library is None:
        return np.array(ImageEnhance.Sharpness(Image.fromarray(image)).enhance(factor))
    image = np.ascontiguousarray(image)
    out = np.empty_like(image)
    library.effnet_sharpen(_at(image), _at(out), image.shape[1], image.shape[0], factor)
    return out


def moved(image: np.ndarray, matrix: Matrix) -> np.ndarray:
    """The pixel nearest to (ax + by + c, dx + ey + f) for each pixel (x, y) of `matrix` (a .. f); `FILL` outside."""
    height, width = image.shape[:2]
    a, b, c, d, e, f = matrix
    library = native.picture_library()
    reach = max(abs(x * m + y * n + o) for m, n, o in ((a, b, c), (d, e, f)) for x in (0, width) for y in (0, height))
    straight = b == 0 and d == 0  # to Pillow a scaling, whose positions are not in fixed point
    if library is None or reach >= 32_000 or (straight and (a, e) != (1, 1)):
        picture = Image.fromarray(image)
        return np.array(
            picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=FILL)
        )
    if straight:
        fixed = (_FIXED, 0, math.floor(c + 0.5) * _FIXED, 0, _FIXED, math.floor(f + 0.5) * _FIXED)
    else:  # sampled at the middle of each pixel
        centred = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
        fixed = tuple(math.floor(value * _FIXED + 0.5) for value in centred)
    image = np.ascontiguousarray(image)
    out = np.empty_like(image)
    fill = (ctypes.c_uint8 * 3)(*FILL)
    library.effnet_move(_at(image), _at(out), width, height, (ctypes.c_int * 6)(*fixed), fill)
    return out


def rotated(image: np.ndarray, degrees: float) -> np.ndarray:
    """The picture turned counter-clockwise about its centre, by the nearest pixel; `FILL` where nothing was."""
    height, width = image.shape[:2]
    if degrees % 90 == 0:  # exact turns, where the picture is square
        return np.array(Image.fromarray(image).rotate(degrees, Image.Resampling.NEAREST, fillcolor=FILL))
    angle = -math.radians(degrees % 360)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return moved(image, (cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y))


def _mirrored(picture: Image.Image, flip: bool) -> np.ndarray:
    return np.array(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture)


def _at(array: np.ndarray) -> int:
    return array.ctypes.data

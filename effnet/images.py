"""How do bytes become the pixels a network sees? The only door: training, evaluation, explanation and serving use it.

`decode` turns a file into uint8 RGB (H, W, 3); what is too large is refused before it is decoded, and what is broken is
one `ImageError`. `opened` reads the header only, for training views, which often need a JPEG's pixels at 1/2 or less.
`prepare` is the evaluation geometry of a weight source (`Preprocess`), `normalise` the last step.

Evaluation decodes with Pillow, always. Training takes `simplejpeg` where it is installed (the extra `fast`): the same
library, libjpeg-turbo, with less around it. Where the two were built from different versions of it, pixels may differ
by a few grey levels. What simplejpeg finds fault with, Pillow decides.

Sources: PyTorch-trained weights are evaluated with Pillow's antialiased resize and torchvision's roundings; official
V1 weights (preprocessing.py) with TensorFlow 1's resize: no antialias, no half-pixel shift. Departures: colour
profiles are ignored, and `prepare` rounds to uint8 where TensorFlow keeps fractions.
"""

import contextlib
import functools
import importlib
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

import numpy as np
import torch
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile
from torch import Tensor

from effnet.pixels import scaled
from effnet.spec import Interpolation, Preprocess
from effnet.value import UsageError, check_choice, check_range

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
LONGEST = 8  # times the shorter side: what `prepare` looks at

# The first bytes of each format we open. Pillow's plugins are called directly: `Image.open` has a pixel limit of its
# own, which is global, not ours to set, and warns before it refuses.
_FORMATS: tuple[tuple[str, type[ImageFile]], ...] = (
    (r"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (r"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (r"RIFF....WEBP", WebPImagePlugin.WebPImageFile),
    (r"GIF8[79]a", GifImagePlugin.GifImageFile),
    (r"BM", BmpImagePlugin.BmpImageFile),
    (r"II\*\0|MM\0\*", TiffImagePlugin.TiffImageFile),
)

_UPRIGHT = {  # EXIF orientation: the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112


class ImageError(UsageError):
    """An image that cannot be used: `name` says which, `reason` why, and the message is both on one line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both are arguments, so that the error can come back from a worker process
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class NotAnImage(ImageError):
    """No image of a format that we open: its first bytes say so."""


class TooManyPixels(ImageError):
    """An image whose header states more pixels than the limit."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What `decode` accepts: the size of the file, and width times height as its header states them."""

    max_bytes: int = 50_000_000
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        check_range("max_bytes", self.max_bytes, 1)
        check_range("max_pixels", self.max_pixels, 1)


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """What a header says. `width` and `height` are those of the upright image, as `decode` returns it.

    `exif_orientation`: 1 where the pixels are stored upright, else 2..8. `bits` per channel. `mode`: Pillow's word.
    """

    format: str
    mode: str
    width: int
    height: int
    exif_orientation: int
    bits: int


# --- from bytes to pixels -------------------------------------------------------------------------------------------


def decode(
    data: bytes | str | Path, limits: Limits = Limits(), *, shrink: int = 1, name: str | None = None
) -> np.ndarray:
    """A JPEG, PNG, WebP, BMP, TIFF or the first frame of a GIF as uint8 (H, W, 3) RGB, upright by its EXIF orientation.

    Transparency is composited on white; 16-bit grey is scaled to 8 bits; CMYK is converted by (255 - C)(255 - K) / 255.
    `shrink` 2, 4 or 8: a JPEG at 1/2, 1/4 or 1/8, sides rounded up (faster), where its sides have that many pixels;
    other formats stay as they are.
    `name` replaces the path in errors. `ImageError` when the file is missing, above `limits` (checked before decoding),
    of another format, truncated or broken.
    """
    content, name = _read(data, limits, name)
    return _decoded(content, limits, name, shrink)


def _decoded(content: bytes, limits: Limits, name: str, shrink: int) -> np.ndarray:
    with _decoding(name), _open(content, name) as image:
        _check_pixels(image.width, image.height, limits, name)
        if shrink > 1:
            image.draft(None, (max(1, image.width // shrink), max(1, image.height // shrink)))
        _load(image)
        rgb = _to_rgb(image, name)
        turn = _UPRIGHT.get(_orientation(image))
        return np.array(rgb if turn is None else rgb.transpose(turn))


def _check_pixels(width: int, height: int, limits: Limits, name: str) -> None:
    if width * height > limits.max_pixels:
        raise TooManyPixels(
            name,
            f"{width} x {height} is {width * height / 1e6:.1f} megapixels; the limit is {limits.max_pixels / 1e6:.1f}",
        )


def inspect(data: bytes | str | Path, limits: Limits = Limits(), *, name: str | None = None) -> ImageInfo:
    """What the header says about an image, without decoding its pixels. Raises as `decode`, but has no pixel limit."""
    content, name = _read(data, limits, name)
    return _inspected(content, name)


def _inspected(content: bytes, name: str) -> ImageInfo:
    with _decoding(name), _open(content, name) as image:
        orientation = _orientation(image)
        width, height = image.size
        if orientation >= 5 and image.format != "TIFF":  # a quarter turn, which only the TIFF plugin has applied yet
            width, height = height, width
        return ImageInfo(
            format=str(image.format),
            mode=image.mode,
            width=width,
            height=height,
            exif_orientation=orientation,
            bits=_bits(image, content),
        )


# --- from bytes to as few pixels as a training view needs ------------------------------------------------------------


class Picture(Protocol):
    """A picture of known size whose pixels are made when asked for. `shrinks`: it can be had at 1/2, 1/4 and 1/8."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def shrinks(self) -> bool: ...

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """uint8 (ceil(height / shrink), ceil(width / shrink), 3); `shrink` at most the shorter side.

        `ImageError` when it cannot be decoded.
        """
        ...


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """A file in memory, its header read and within the limits: a `Picture`. `width`, `height`: upright.

    `plain`: a JPEG that needs nothing but decoding (8 bits, grey or three channels, no metadata that could turn it).
    """

    content: bytes
    name: str
    limits: Limits
    width: int
    height: int
    shrinks: bool
    plain: bool

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """As `Picture.pixels`."""
        simplejpeg = _simplejpeg() if self.plain else None
        if simplejpeg is not None:
            height, width = -(-self.height // shrink), -(-self.width // shrink)
            with contextlib.suppress(ValueError):  # a fault, however small: Pillow decides whether it costs the picture
                pixels = simplejpeg(self.content, "RGB", min_height=height, min_width=width, min_factor=shrink)
                if pixels.shape == (height, width, 3):
                    return pixels
        return _decoded(self.content, self.limits, self.name, shrink)


def opened(data: bytes | str | Path, limits: Limits = Limits(), *, name: str | None = None) -> Encoded:
    """The header of an image, for `Encoded.pixels`. Raises as `decode` for what is too large, missing or no image."""
    content, name = _read(data, limits, name)
    size, shrinks = plain_jpeg_size(content), True
    plain = size is not None
    if size is None:
        info = _inspected(content, name)
        size, shrinks = (info.width, info.height), info.format == "JPEG"
    width, height = size
    _check_pixels(width, height, limits, name)
    return Encoded(content=content, name=name, limits=limits, width=width, height=height, shrinks=shrinks, plain=plain)


def plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG of 8 bits and one or three channels without APP1 (EXIF, XMP); None for all others.

    Reads the markers up to the first scan. A frame of any other kind, a stray byte or a missing piece is None too.
    """
    if content[:3] != b"\xff\xd8\xff":
        return None
    size, at = None, 2
    while content[at : at + 1] == b"\xff" and at + 4 <= len(content):
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4])
        if marker == 0xDA:  # the first scan
            return size
        if marker == 0xE1 or not 0xC0 <= marker <= 0xFE or 0xD0 <= marker <= 0xD9 or length < 2:
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame; the others are tables
            frame = content[at + 4 : at + 10]
            if size or marker > 0xC2 or len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3):
                return None
            size = int.from_bytes(frame[3:5]), int.from_bytes(frame[1:3])
            if not (size[0] and size[1]):
                return None
        at += 2 + length
    return None


@functools.cache
def _simplejpeg() -> Callable[..., np.ndarray] | None:
    """`simplejpeg.decode_jpeg`, where it is installed."""
    try:
        return importlib.import_module("simplejpeg").decode_jpeg
    except ImportError:
        return None


# --- reading, checked ------------------------------------------------------------------------------------------------


def _read(data: bytes | str | Path, limits: Limits, name: str | None) -> tuple[bytes, str]:
    """The file's content and the name to use in errors; the size is checked before anything is read."""
    if isinstance(data, bytes):
        name, size = name or "image", len(data)
    else:
        name = name or str(data)
        try:
            status = os.stat(data)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise ImageError(name, f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(name, "is not a file")
        size = status.st_size
    if size > limits.max_bytes:
        raise ImageError(name, f"{size / 1e6:.1f} MB; the limit is {limits.max_bytes / 1e6:.1f}")
    try:
        return (data if isinstance(data, bytes) else Path(data).read_bytes()), name
    except OSError as error:
        raise ImageError(name, f"cannot be read ({error.strerror})") from None


@contextlib.contextmanager
def _decoding(name: str) -> Generator[None]:
    """Whatever Pillow raises on a broken file becomes one `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError:  # WebP and GIF, whose plugins refuse on their own from 179 megapixels
        raise TooManyPixels(name, "its header states more pixels than the decoder accepts") from None
    except Exception as error:  # the plugins raise whatever the broken bytes led to, not only OSError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(name, f"broken or truncated ({reason})") from None


def _open(content: bytes, name: str) -> ImageFile:
    """The header, read by the plugin that the first bytes call for, whatever the file is called."""
    for pattern, plugin in _FORMATS:
        if re.match(pattern.encode("latin-1"), content[:16], re.DOTALL):
            return plugin(io.BytesIO(content))
    raise NotAnImage(name, "is empty" if not content else "is not a JPEG, PNG, WebP, BMP, TIFF or GIF image")


def _load(image: ImageFile) -> None:
    """Decodes. Pillow repeats its warning about many pixels here for TIFF, when `Limits` has already decided."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        image.load()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image.load()


def _orientation(image: ImageFile) -> int:
    """EXIF orientation 1..8 from what has been read so far; 1 where it is absent, out of range or unreadable."""
    try:
        value = Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)  # the PNG plugin's own getexif would decode first
    except Exception:  # broken metadata must not cost us good pixels
        return 1
    return value if value in _UPRIGHT else 1


def _bits(image: ImageFile, content: bytes) -> int:
    """Bits per channel as stored; Pillow's mode alone does not tell (16-bit colour PNG opens as RGB)."""
    if image.format == "PNG":
        return content[24]  # IHDR: length, type, width, height, bit depth
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    return 1 if image.mode == "1" else 8


def _to_rgb(image: ImageFile, name: str) -> Image.Image:
    """Any mode as RGB: 16-bit grey scaled, transparency on white."""
    if image.mode.startswith("I;16"):
        return _wide_grey(np.asarray(image), image.info.get("transparency"))
    if image.mode in ("I", "F"):
        raise ImageError(name, f"32-bit pixels (mode {image.mode}) have no defined white")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _wide_grey(values: np.ndarray, transparent: int | None) -> Image.Image:
    """16-bit grey as RGB: round(v / 257), so that 65535 is 255; the value declared transparent becomes white."""
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


# --- from pixels to the network's input -----------------------------------------------------------------------------


def prepare(image: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """The evaluation view of `image` (uint8 (H, W, 3)) as uint8 (size, size, 3), by the method of `preprocess`.

    Of an image more than `LONGEST` times as long as it is wide, the middle stands for the whole.
    """
    size = preprocess.size
    image = _not_too_long(image)
    height, width = image.shape[:2]
    if preprocess.method == "crop_resize":
        # float32, because TensorFlow rounds down a float32 product
        side = max(1, int(np.float32(size / preprocess.resize) * np.float32(min(height, width))))
        top, left = (height - side + 1) // 2, (width - side + 1) // 2
        return _resize_tf1(image[top : top + side, left : left + side], size, preprocess.interpolation)
    if preprocess.method == "squash":
        return scaled(image, size, size, preprocess.interpolation)
    shorter = min(height, width)
    width, height = (int(preprocess.resize * side / shorter) for side in (width, height))
    left, top = (round((side - size) / 2) for side in (width, height))  # halves to even, as torchvision
    return scaled(image, width, height, preprocess.interpolation, (left, top, size, size))


def _not_too_long(image: np.ndarray) -> np.ndarray:
    """The middle of a strip: scaling its *shorter* side up would make 1 x 100,000 pixels into 6 gigapixels."""
    height, width = image.shape[:2]
    limit = LONGEST * min(height, width)
    top, left = (max(0, side - limit) // 2 for side in (height, width))
    return image[top : top + limit, left : left + limit]


def _resize_tf1(image: np.ndarray, size: int, interpolation: Interpolation) -> np.ndarray:
    """`tf.compat.v1.image.resize_*` to (size, size, 3): no antialias; pixel i samples at i * scale, no half pixel."""
    index, weight = _taps(image.shape[0], size, interpolation)
    rows = sum(weight[:, tap, None, None] * image[index[:, tap]] for tap in range(index.shape[1]))
    index, weight = _taps(image.shape[1], size, interpolation)
    pixels = sum(weight[None, :, tap, None] * rows[:, index[:, tap]] for tap in range(index.shape[1]))
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def _taps(length: int, size: int, interpolation: Interpolation) -> tuple[np.ndarray, np.ndarray]:
    """Which source pixels each of `size` outputs reads, and their weights: two arrays (size, taps)."""
    check_choice("interpolation of crop_resize", interpolation, ("nearest", "bilinear", "bicubic"))
    position = np.arange(size, dtype=np.float32) * np.float32(length / size)
    first = np.floor(position).astype(int)
    past = position - first
    if interpolation == "nearest":
        offsets, weights = (0,), [np.ones_like(past)]
    elif interpolation == "bilinear":
        offsets, weights = (0, 1), [1 - past, past]
    else:
        offsets, weights = (-1, 0, 1, 2), [_keys(past + 1), _keys(past), _keys(1 - past), _keys(2 - past)]
    index = np.clip(first[:, None] + np.array(offsets), 0, length - 1)
    return index, np.stack(weights, axis=1).astype(np.float32)


def _keys(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic kernel for 0 <= x <= 2, with the constant of TensorFlow 1."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, far)


def normalise(batch: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W), channels last in memory: (x / 255 - mean) / std.

    One multiply-add over rows of W * 3 numbers, in place: broadcasting over an innermost axis of 3 is nine times slower
    (32 random images of 224 px, one thread of a shared CPU: 71 against 681 us per image).
    """
    assert batch.dtype == torch.uint8 and batch.shape[-1] == 3, (batch.dtype, batch.shape)
    count, height, width, _ = batch.shape
    scale, shift = affine(preprocess, batch.device)
    values = batch.reshape(count, height, width * 3).to(torch.float32)
    torch.addcmul(shift.repeat(width), values, scale.repeat(width), out=values)
    return values.view(count, height, width, 3).permute(0, 3, 1, 2)


def denormalise(batch: Tensor, preprocess: Preprocess) -> Tensor:
    """The inverse of `normalise`, for display: float32 (N, 3, H, W) to uint8 (N, H, W, 3), rounded and clipped."""
    scale, shift = affine(preprocess, batch.device)
    return ((batch.permute(0, 2, 3, 1) - shift) / scale).round_().clamp_(0, 255).to(torch.uint8)


def affine(preprocess: Preprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    """`scale` and `shift` per channel, float32 (3,), such that a byte v becomes v * scale + shift."""
    mean, std = torch.tensor(preprocess.mean, dtype=torch.float64), torch.tensor(preprocess.std, dtype=torch.float64)
    scale, shift = 1 / (255 * std), -mean / std
    return scale.to(device, torch.float32), shift.to(device, torch.float32)


# --- files ----------------------------------------------------------------------------------------------------------


def image_files(path: str | Path) -> list[Path]:
    """All image files under a folder, nested ones too, sorted; a file stands for itself. Empty if there are none.

    A file counts as an image by its extension (`EXTENSIONS`, any case). Names that begin with a dot are skipped, links
    followed. `UsageError` if the path does not exist.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path} does not exist.")
    return [found for found, unlisted in walk_images(path) if unlisted is None]


def walk_images(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """What `image_files` lists of a folder, one by one in the same order; only names of open folders are in memory.

    A folder that cannot be listed stands in its place, with the reason.
    """
    return _walk(folder, set())


def _walk(folder: Path, seen: set[str]) -> Iterator[tuple[Path, str | None]]:
    real = os.path.realpath(folder)
    if real in seen:  # a link back up
        return
    seen.add(real)
    folders, names = set(), []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and (entry.is_dir() or _is_image(entry.name)):
                    names.append(entry.name)
                    folders.update([entry.name] if entry.is_dir() else ())
    except OSError as error:
        yield folder, f"cannot be listed ({error.strerror})"
        return
    for name in sorted(names):
        if name in folders:
            yield from _walk(folder / name, seen)
        else:
            yield folder / name, None


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS

"""The door for pixels: closed forms for every mode, numbers computed by hand or by TensorFlow 2.21 for the geometry."""

import importlib.resources
import io
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from effnet.images import ImageError, Limits, decode, denormalise, image_files, inspect, normalise, opened, prepare
from effnet.spec import Interpolation, Preprocess
from effnet.value import UsageError
from tests.conftest import need

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes, transparent: bytes = b"") -> bytes:
    """A PNG written by hand: `colour` 0 grey, 2 RGB, 4 grey + alpha; `rows` with their filter bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    key = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def photo(name: str) -> Path:
    need("skimage")
    return Path(str(importlib.resources.files("skimage") / "data" / name))


# --- formats and modes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_lossless_formats_give_back_every_pixel(format, options):
    pixels = decode(encoded(NOISE, format, **options))
    assert pixels.dtype == np.uint8 and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, NOISE)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_of_flat_colour_keeps_it_within_rounding(options):
    flat = np.full((32, 48, 3), (200, 30, 90), np.uint8)
    assert np.abs(decode(encoded(flat, "JPEG", quality=95, **options)).astype(int) - flat).max() <= 2


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_only_the_first_frame_of_an_animation_is_read(format):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    data = encoded(
        frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
    )
    np.testing.assert_array_equal(decode(data), np.array(frames[0]))


def test_real_photos_decode_to_the_pixels_that_pillow_gives():
    for name in ("chelsea.png", "rocket.jpg"):
        with Image.open(photo(name)) as image:
            np.testing.assert_array_equal(decode(photo(name)), np.array(image.convert("RGB")))


def test_a_file_is_read_as_what_it_is_not_as_what_it_is_called(tmp_path):
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encoded(NOISE))
    np.testing.assert_array_equal(decode(path), NOISE)
    np.testing.assert_array_equal(decode(str(path)), NOISE)


UPRIGHT = np.kron(RNG.integers(0, 256, (2, 3, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))  # flat JPEG blocks
STORED = {  # how a camera with that EXIF orientation stores the upright picture
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_undone(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = encoded(np.ascontiguousarray(STORED[orientation](UPRIGHT)), format, exif=exif, **options)
    pixels = decode(data)
    assert pixels.shape == UPRIGHT.shape
    assert np.abs(pixels.astype(int) - UPRIGHT).max() <= (2 if format == "JPEG" else 0)
    info = inspect(data)
    assert info.exif_orientation == orientation
    assert (info.height, info.width) == UPRIGHT.shape[:2]


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_broken_exif_does_not_cost_good_pixels(exif):
    np.testing.assert_array_equal(decode(encoded(NOISE, exif=exif)), NOISE)


def test_an_orientation_out_of_range_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 9
    data = encoded(NOISE, exif=exif)
    np.testing.assert_array_equal(decode(data), NOISE)
    assert inspect(data).exif_orientation == 1


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.floor(values / 65535 * 255 + 0.5).astype(np.uint8)
    data = encoded(values, format)
    np.testing.assert_array_equal(decode(data), np.repeat(expected[..., None], 3, axis=2))
    assert inspect(data).bits == 16


def test_sixteen_bit_colour_and_alpha_follow_their_closed_forms():
    colour = decode(png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 65535, 0, 32768, 1000, 2000, 3000)))
    np.testing.assert_array_equal(colour[0], [[255, 0, 128], [1000 >> 8, 2000 >> 8, 3000 >> 8]])
    grey = decode(png(2, 1, 16, 4, b"\0" + struct.pack(">4H", 0x4000, 0xFFFF, 0x4000, 0)))  # opaque, then clear
    np.testing.assert_array_equal(grey[0, :, 0], [0x40, 255])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode):
    alpha, value = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    colours = 3 if mode == "RGBA" else 1
    data = encoded(np.dstack([value] * colours + [alpha]))
    assert inspect(data).mode == mode
    a = alpha / 255
    expected = np.floor(a * value + (1 - a) * 255 + 0.5)
    np.testing.assert_array_equal(decode(data), np.repeat(expected[..., None], 3, axis=2))


def test_a_palette_gives_its_colours_and_its_transparent_entries_are_white():
    indices = Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8))
    indices.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 0, 0, 0])
    plain = decode(encoded(indices))
    np.testing.assert_array_equal(plain[0], [[10, 20, 30], [40, 50, 60], [70, 80, 90], [0, 0, 0]])
    seen_through = decode(encoded(indices, transparency=bytes([255, 0, 51, 255])))  # opaque, clear, one fifth, opaque
    np.testing.assert_array_equal(seen_through[0], [[10, 20, 30], [255] * 3, [218, 220, 222], [0, 0, 0]])
    clear_gif = decode(encoded(indices, "GIF", transparency=3))
    np.testing.assert_array_equal(clear_gif[0, 3], [255] * 3)


def test_one_two_and_four_bit_grey_span_black_to_white():
    np.testing.assert_array_equal(decode(png(8, 1, 1, 0, b"\0\xb1"))[0, :, 0], [255, 0, 255, 255, 0, 0, 0, 255])
    np.testing.assert_array_equal(decode(png(4, 1, 2, 0, b"\0\x1b"))[0, :, 0], [0, 85, 170, 255])
    np.testing.assert_array_equal(decode(png(2, 1, 4, 0, b"\0\x0f"))[0, :, 0], [0, 255])
    assert inspect(png(4, 1, 2, 0, b"\0\x1b")).bits == 2


def test_the_grey_value_declared_transparent_is_white():
    eight = png(2, 1, 8, 0, b"\0\x10\x20", transparent=struct.pack(">H", 0x10))
    np.testing.assert_array_equal(decode(eight)[0, :, 0], [255, 0x20])
    sixteen = png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 1000, 1001), transparent=struct.pack(">H", 1000))
    np.testing.assert_array_equal(decode(sixteen)[0, :, 0], [255, 4])


def test_cmyk_and_ycck_jpegs_become_rgb():
    ink = (60, 120, 30, 40)
    data = encoded(Image.new("CMYK", (32, 32), ink), "JPEG", quality=100)
    c, m, y, k = ink
    expected = [(255 - x) * (255 - k) / 255 for x in (c, m, y)]
    assert np.abs(decode(data).astype(float) - expected).max() <= 2

    adobe = data.index(b"Adobe") + 11  # the marker's last byte: 0 stored as CMYK, 2 as YCCK; stored inverted
    luma, blue, red = 255.0 - c, 127.0 - m, 127.0 - y
    light = np.array([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue])
    expected = (255 - np.clip(light, 0, 255)) * (255 - k) / 255
    ycck = data[:adobe] + b"\x02" + data[adobe + 1 :]
    assert np.abs(decode(ycck).astype(float) - expected).max() <= 2


def test_pixels_without_a_defined_white_are_refused():
    with pytest.raises(ImageError, match="32-bit pixels"):
        decode(encoded(Image.new("F", (4, 4)), "TIFF"))


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize(("width", "height"), [(64, 48), (61, 47), (9, 8), (17, 200)])
def test_a_jpeg_at_a_scale_has_sides_rounded_up_and_looks_like_its_average(width, height, shrink):
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x, y, x + y], axis=2).astype(np.uint8)
    pixels = decode(encoded(smooth, "JPEG", quality=100), shrink=shrink)
    assert pixels.shape == (-(-height // shrink), -(-width // shrink), 3)
    padded = np.pad(smooth, ((0, -height % shrink), (0, -width % shrink), (0, 0)), mode="edge").astype(float)
    means = padded.reshape(pixels.shape[0], shrink, pixels.shape[1], shrink, 3).mean(axis=(1, 3))
    assert np.abs(pixels - means).max() <= 3 + shrink / 2  # chroma is halved; the last blocks end in padding


def test_other_formats_ignore_the_wish_for_fewer_pixels():
    np.testing.assert_array_equal(decode(encoded(NOISE), shrink=8), NOISE)
    assert not opened(encoded(NOISE)).shrinks
    np.testing.assert_array_equal(opened(encoded(NOISE)).pixels(), NOISE)


def test_inspect_reads_the_header_only(monkeypatch):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    info = inspect(png(20_000, 10_000, 1, 0, b""))
    assert (info.format, info.mode, info.width, info.height, info.bits) == ("PNG", "1", 20_000, 10_000, 1)


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(data: bytes | Path, limits: Limits | None = None) -> str:
    """The message of the one-line error that decoding must end in."""
    with pytest.raises(ImageError) as caught:
        decode(data, limits or Limits())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_header_that_claims_200_megapixels_is_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert "20000 x 10000 is 200.0 megapixels; the limit is 100.0" in refused(png(20_000, 10_000, 8, 2, b""))
    real = png(20_000, 10_000, 1, 0, bytes(10_000 * (1 + 2_500)))
    assert len(real) < 100_000
    assert "200.0 megapixels" in refused(real)


def test_a_webp_canvas_above_what_its_decoder_accepts_is_one_of_our_errors():
    canvas = (16_000 - 1).to_bytes(3, "little")
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas + canvas
    message = refused(b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended)
    assert "pixels" in message and "bomb" not in message


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_between_pillows_limit_and_ours_no_warning_is_heard(format, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_600)
    assert decode(encoded(NOISE, format)).shape == NOISE.shape  # warnings are errors here


def test_the_pixel_limit_is_inclusive():
    data = encoded(NOISE)
    assert decode(data, Limits(max_pixels=64 * 48)).shape == (48, 64, 3)
    assert "megapixels" in refused(data, Limits(max_pixels=64 * 48 - 1))


def test_a_file_above_the_byte_limit_is_not_even_read(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(60_000_000)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    assert refused(path) == f"{path}: 60.0 MB; the limit is 50.0"
    assert "the limit is" in refused(b"x" * 11, Limits(max_bytes=10))


@pytest.mark.parametrize("field", ["max_bytes", "max_pixels"])
def test_a_limit_of_nothing_is_a_mistake(field):
    with pytest.raises(UsageError, match=field):
        Limits(**{field: 0})


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_jpeg_is_an_error_never_half_a_picture(share, tmp_path):
    data = encoded(NOISE, "JPEG")
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: int(len(data) * share)])
    assert refused(path).startswith(f"{path}: broken or truncated (")


def test_jpeg_and_webp_may_not_lose_a_single_byte_of_their_end():
    for format in ("JPEG", "WEBP"):
        assert "broken or truncated" in refused(encoded(NOISE, format)[:-1])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"dear reader, this is not a picture", "is not a JPEG, PNG, WebP, BMP, TIFF or GIF image"),
        (b"\x00\x00\x00\x20ftypavif", "is not a JPEG, PNG, WebP, BMP, TIFF or GIF image"),
        (b"BM", "broken or truncated"),
    ],
)
def test_what_is_not_an_image_is_named_with_its_reason(content, reason, tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_bytes(content)
    assert refused(path).startswith(f"{path}: {reason}")


def test_missing_files_and_folders_are_named(tmp_path):
    assert "cannot be read (No such file or directory)" in refused(tmp_path / "absent.png")
    assert "is not a file" in refused(tmp_path)


def test_an_upload_is_called_by_the_name_given():
    with pytest.raises(ImageError, match=r"^cat\.png: is empty$"):
        decode(b"", name="cat.png")


def test_the_error_survives_the_way_back_from_a_worker():
    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "is empty")))
    assert (str(error), error.name, error.reason) == ("a.jpg: is empty", "a.jpg", "is empty")
    assert isinstance(error, UsageError)


@settings(max_examples=150, deadline=None)
@given(format=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]), data=st.data())
def test_any_damage_gives_pixels_or_an_image_error(format, data):
    damaged = bytearray(encoded(NOISE[:16, :16], format))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(1, len(damaged)))]
    try:
        pixels = decode(bytes(damaged), Limits(max_pixels=100_000))
    except ImageError:
        return
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


# --- preprocessing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "resized", "offset"),
    [
        (300, 400, (256, 341), (16, 58)),  # (341 - 224) / 2 = 58.5, halves to even
        (400, 300, (341, 256), (58, 16)),
        (300, 403, (256, 343), (16, 60)),  # 343.89 is cut, 59.5 rounds up
        (200, 200, (256, 256), (16, 16)),
    ],
)
def test_resize_crop_has_the_sizes_and_offsets_of_torchvision(height, width, resized, offset):
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    whole = np.array(Image.fromarray(image).resize(resized[::-1], Image.Resampling.BICUBIC))
    top, left = offset
    expected = whole[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(prepare(image, Preprocess(size=224, resize=256)), expected)


def test_an_image_of_the_resized_size_is_only_cropped():
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    view = prepare(image, Preprocess(size=48, resize=64, interpolation="bilinear"))
    np.testing.assert_array_equal(view, image[8:56, 8:56])


def test_shrinking_is_antialiased():
    stripes = np.tile(np.array([0, 255], np.uint8)[None, :, None], (64, 32, 3))
    for method in ("resize_crop", "squash"):
        view = prepare(stripes, Preprocess(size=8, resize=8, method=method))
        assert np.abs(view[:, 1:-1].astype(int) - 128).max() <= 2


def test_of_a_strip_the_middle_is_shown():
    strip = np.random.default_rng(6).integers(0, 256, (10, 100, 3), dtype=np.uint8)
    for method in ("resize_crop", "squash", "crop_resize"):
        preprocess = Preprocess(size=12, resize=14, method=method)
        np.testing.assert_array_equal(prepare(strip, preprocess), prepare(strip[:, 10:90], preprocess))


def test_squash_shows_the_whole_image_whatever_its_shape():
    ramp = np.repeat(np.linspace(0, 255, 200).astype(np.uint8)[None, :, None], 50, axis=0).repeat(3, axis=2)
    view = prepare(ramp, Preprocess(size=100, resize=100, interpolation="bilinear", method="squash"))
    np.testing.assert_allclose(view[50, :, 0], ramp[0].reshape(100, 2, 3).mean(axis=1)[:, 0], atol=1.5)


def test_crop_resize_crops_as_the_official_code():
    image = np.random.default_rng(3).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    view = prepare(image, Preprocess(size=7, resize=8, method="crop_resize"))  # side 7, offsets (8-7+1)//2, (12-7+1)//2
    np.testing.assert_array_equal(view, image[1:8, 3:10])


TENSORFLOW = {  # tf.compat.v1.image.resize_* of the picture below to 4 x 4, channels 0 and 2, by TensorFlow 2.21
    "bicubic": [
        [[11, 153], [177, 94], [79, 93], [106, 50]],
        [[173, 50], [84, 85], [101, 169], [129, 45]],
        [[76, 90], [234, 115], [208, 27], [160, 32]],
        [[92, 176], [47, 202], [42, 249], [166, 115]],
    ],
    "bilinear": [
        [[11, 153], [157, 107], [84, 98], [111, 61]],
        [[176, 62], [89, 87], [106, 152], [117, 67]],
        [[85, 99], [196, 114], [176, 62], [142, 60]],
        [[89, 167], [76, 170], [71, 213], [161, 111]],
    ],
    "nearest": [
        [[11, 153], [99, 241], [140, 26], [123, 9]],
        [[131, 17], [55, 197], [73, 215], [33, 175]],
        [[55, 197], [51, 193], [115, 1], [121, 7]],
        [[74, 216], [208, 94], [62, 204], [209, 95]],
    ],
}


@pytest.mark.parametrize("interpolation", TENSORFLOW)
def test_crop_resize_gives_the_pixels_of_tensorflow_1(interpolation):
    y, x, c = np.mgrid[0:11, 0:13, 0:3]
    image = ((y * 37 + x * x * 11 + c * 71 + (x * y) % 7 * 23) % 256).astype(np.uint8)
    view = prepare(image, Preprocess(size=4, resize=4, interpolation=interpolation, method="crop_resize"))
    np.testing.assert_array_equal(view[:, :, ::2], TENSORFLOW[interpolation])  # of columns 1..11, the centre crop


def test_crop_resize_refuses_a_filter_tensorflow_1_does_not_have():
    with pytest.raises(UsageError, match="lanczos"):
        prepare(NOISE, Preprocess(size=8, resize=8, interpolation="lanczos", method="crop_resize"))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(1, 40),
    margin=st.integers(0, 9),
    method=st.sampled_from(["resize_crop", "squash", "crop_resize"]),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic"]),
)
def test_any_image_gives_the_size_asked_for_and_flat_stays_flat(height, width, size, margin, method, interpolation):
    image = np.full((height, width, 3), (3, 128, 250), np.uint8)
    preprocess = Preprocess(size=size, resize=size + margin, method=method, interpolation=interpolation)
    np.testing.assert_array_equal(prepare(image, preprocess), np.full((size, size, 3), (3, 128, 250), np.uint8))


def test_a_thin_strip_does_not_explode(monkeypatch):
    resize = Image.Image.resize

    def small_resize(image: Image.Image, size: tuple[int, int], *options: Any) -> Image.Image:
        assert size[0] * size[1] < 100_000, "1 x 200,000 pixels became 72 x 14,400,000"
        return resize(image, size, *options)

    monkeypatch.setattr(Image.Image, "resize", small_resize)
    assert prepare(np.zeros((1, 200_000, 3), np.uint8), Preprocess(size=64, resize=72)).shape == (64, 64, 3)


def preprocessing(
    mean: tuple[float, float, float], std: tuple[float, float, float], interpolation: Interpolation = "bilinear"
) -> Preprocess:
    return Preprocess(size=8, resize=8, mean=mean, std=std, interpolation=interpolation)


def test_normalise_is_x_over_255_minus_mean_over_std():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    batch = np.random.default_rng(4).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    normal = normalise(torch.from_numpy(batch), preprocessing(mean, std))
    expected = ((batch / 255.0 - mean) / std).transpose(0, 3, 1, 2)
    assert normal.shape == (3, 3, 5, 7) and normal.dtype == torch.float32
    assert normal.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(normal.numpy(), expected, rtol=0, atol=1e-6)


def test_normalise_leaves_its_input_alone_and_accepts_a_view():
    batch = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8))
    before, preprocess = batch.clone(), preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    flipped = normalise(batch.flip(2)[:, ::2], preprocess)
    assert torch.equal(batch, before)
    torch.testing.assert_close(flipped, normalise(batch, preprocess).flip(3)[:, :, ::2])


share = st.floats(0, 1, width=32)
spread = st.floats(1 / 16, 1, width=32)


@settings(max_examples=50, deadline=None)
@given(mean=st.tuples(share, share, share), std=st.tuples(spread, spread, spread))
def test_denormalise_gives_back_every_byte(mean, std):
    batch = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    preprocess = preprocessing(mean, std)
    assert torch.equal(denormalise(normalise(batch, preprocess), preprocess), batch)


def test_denormalise_clips_what_is_out_of_range():
    preprocess = preprocessing((0.4, 0.4, 0.4), (0.5, 0.5, 0.5))
    pixels = denormalise(torch.tensor([-9.0, 0.0, 9.0]).reshape(1, 3, 1, 1), preprocess)
    assert pixels.flatten().tolist() == [0, 102, 255]


# --- files ----------------------------------------------------------------------------------------------------------


def test_image_files_are_found_in_nested_folders_in_sorted_order(tmp_path):
    names = ["b/2.PNG", "b/10.jpg", "a.jpeg", "b/c/x.webp", "notes.txt", ".hidden.png", ".cache/y.png", "b/._2.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path)]
    assert found == ["a.jpeg", "b/10.jpg", "b/2.PNG", "b/c/x.webp"]


def test_links_are_followed_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x.png").touch()
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "data" / "cats")
    os.symlink(tmp_path / "data", tmp_path / "real" / "loop")
    assert image_files(tmp_path / "data") == [tmp_path / "data" / "cats" / "x.png"]


def test_a_file_stands_for_itself_an_empty_folder_for_nothing(tmp_path):
    assert image_files(tmp_path) == []
    path = tmp_path / "scan.dat"
    path.touch()
    assert image_files(str(path)) == [path]
    with pytest.raises(UsageError, match="does not exist"):
        image_files(tmp_path / "absent")

"""Pictures for training: the header first, then as few pixels as asked, by whichever decoder, with Pillow's verdict."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from effnet import images
from effnet.images import ImageError, Limits, decode, opened, plain_jpeg_size
from tests.conftest import need
from tests.test_images import NOISE, encoded, photo

JPEGS = [
    {"quality": 90},
    {"quality": 75, "subsampling": 0},
    {"quality": 95, "subsampling": 1},
    {"quality": 90, "progressive": True},
    {"quality": 60, "optimize": True, "restart_marker_blocks": 3},
]


@pytest.mark.parametrize("options", JPEGS)
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_the_training_decoder_gives_pillows_pixels_within_four_grey_levels(shrink, grey, options):
    """Both are libjpeg-turbo. Here they are equal; versions that differ may round differently, hence the bound."""
    need("simplejpeg")
    image = Image.open(photo("rocket.jpg")).convert("L" if grey else "RGB").resize((123, 87))
    data = encoded(image, "JPEG", **options)
    picture = opened(data)
    assert (picture.width, picture.height, picture.shrinks, picture.plain) == (123, 87, True, True)
    ours, pillow = picture.pixels(shrink), decode(data, shrink=shrink)
    assert ours.shape == pillow.shape and ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - pillow).max() <= 4


def test_what_the_fast_decoder_cannot_be_trusted_with_goes_to_pillow(monkeypatch):
    monkeypatch.setattr(images, "_simplejpeg", lambda: lambda *_, **__: pytest.fail("decoded by simplejpeg"))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = opened(encoded(NOISE, "JPEG", exif=exif.tobytes()))
    assert (turned.width, turned.height) == (48, 64) and not turned.plain and turned.pixels().shape == (64, 48, 3)
    cmyk = opened(encoded(Image.fromarray(NOISE).convert("CMYK"), "JPEG"))
    assert not cmyk.plain and cmyk.pixels(2).shape == (24, 32, 3)


def test_without_simplejpeg_pillow_decodes(monkeypatch):
    monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    data = encoded(NOISE, "JPEG")
    np.testing.assert_array_equal(opened(data).pixels(2), decode(data, shrink=2))


@pytest.mark.parametrize("options", JPEGS[:4:3])
def test_a_jpeg_cut_anywhere_is_judged_as_pillow_judges_it(options):
    data = encoded(NOISE, "JPEG", **options)
    for length in range(3, len(data)):
        assert_same_verdict(data[:length])


@settings(max_examples=300, deadline=None)
@given(position=st.integers(2, 10_000), value=st.integers(0, 255))
def test_a_damaged_jpeg_is_judged_as_pillow_judges_it(position, value):
    data = bytearray(encoded(NOISE[:16, :24], "JPEG", quality=60))
    data[position % len(data)] = value
    assert_same_verdict(bytes(data))


def assert_same_verdict(data: bytes) -> None:
    """Training and evaluation both decode `data`, to the same size, or both refuse it."""
    outcomes = []
    for call in (lambda: opened(data).pixels().shape, lambda: decode(data).shape):
        try:
            outcomes.append(call())
        except ImageError:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]


def test_limits_are_checked_before_a_training_picture_is_decoded():
    data = encoded(NOISE, "JPEG")
    with pytest.raises(ImageError, match="megapixels; the limit"):
        opened(data, Limits(max_pixels=48 * 64 - 1))
    with pytest.raises(ImageError, match="MB; the limit"):
        opened(data, Limits(max_bytes=len(data) - 1))
    assert opened(data, Limits(max_pixels=48 * 64)).pixels().shape == NOISE.shape


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\x00\x00", b"GIF89a", b"\xff\xd8\xff\xc0\x00"]
)
def test_a_header_cut_short_is_no_plain_jpeg(data):
    assert plain_jpeg_size(data) is None
    with pytest.raises(ImageError):
        opened(data, name="x")

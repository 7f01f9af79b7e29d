"""Operators on pictures: the compiled ones against Pillow, byte for byte, at odd shapes, sizes and strengths."""

import os
import platform
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from effnet import native, pixels
from effnet.spec import Interpolation
from tests.conftest import missing


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    if native.picture_library() is None:  # as in test_native: no compiler is a machine without them, else our fault
        reason = native.why_not()
        (missing if "no C++ compiler" in reason or "Linux" in reason else pytest.fail)(reason)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain(call: Callable[[], np.ndarray]) -> np.ndarray:
    """What `call` gives without a compiler."""
    with mock.patch.dict(os.environ, EFFNET_NATIVE="0"):
        return call()


def same(ours: np.ndarray, pillow: np.ndarray) -> None:
    """The same bytes; elsewhere than on x86-64 Pillow's own blends may be contracted, and round once."""
    if platform.machine() == "x86_64":
        np.testing.assert_array_equal(ours, pillow)
    else:
        assert np.abs(ours.astype(int) - pillow).max() <= 1


SIDES = st.integers(1, 90)
FACTORS = st.one_of(st.floats(0, 6), st.sampled_from([0.0, 0.1, 1.0, 1.9]))


@settings(max_examples=150, deadline=None)
@given(
    height=SIDES,
    width=SIDES,
    size=st.integers(1, 100),
    interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos", "nearest"]),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    whole=st.booleans(),
    flip=st.booleans(),
    seed=st.integers(0, 99),
)
def test_resizing_gives_pillows_bytes_with_and_without_a_box(
    height, width, size, interpolation: Interpolation, corners, whole, flip, seed
):
    image = noise(height, width, seed)
    (left, right), (top, bottom) = sorted(corners[:2]), sorted(corners[2:])
    box = (left * (width - 1), top * (height - 1), right * (width - 1) + 1, bottom * (height - 1) + 1)
    box = None if whole else box

    def call() -> np.ndarray:
        return pixels.resized(image, size, interpolation, box=box, flip=flip)

    ours = call()
    assert ours.shape == (size, size, 3) and ours.flags.writeable
    same(ours, plain(call))
    one_pass = Image.fromarray(image).resize((size, size), pixels.resampling(interpolation), box, reducing_gap=2.0)
    expected = np.asarray(one_pass)[:, ::-1] if flip else np.asarray(one_pass)
    rounding = 40 if interpolation in ("bilinear", "bicubic") else 0  # Pillow 13 may take the columns first
    assert np.abs(ours.astype(int) - expected).max(initial=0) <= rounding


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sides", [(224, 224), (300, 330), (375, 500), (100, 90), (895, 700)])
def test_where_pillow_takes_rows_first_its_single_call_gives_the_same_bytes(sides, interpolation: Interpolation):
    image = noise(*sides)
    expected = Image.fromarray(image).resize((224, 224), pixels.resampling(interpolation), reducing_gap=2.0)
    if sides[0] <= 224 or sides[0] - 224 <= 2 * (sides[1] - 224):
        same(pixels.resized(image, 224, interpolation), np.asarray(expected))


@settings(max_examples=60, deadline=None)
@given(
    height=SIDES,
    width=SIDES,
    whole=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
    corners=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_a_window_of_a_scaled_picture_is_pillows_cut_out_of_the_whole(
    height, width, whole, interpolation: Interpolation, corners, seed
):
    image = noise(height, width, seed)
    filter = pixels.resampling(interpolation)
    rows = Image.fromarray(image).resize((whole[0], height), filter)
    expected = np.asarray(rows.resize(whole, filter))
    same(pixels.scaled(image, *whole, interpolation), expected)
    (left, right), (top, bottom) = (
        (int(low * (side - 1)), int(high * (side - 1)) + 1)
        for side, (low, high) in zip(whole, (sorted(corners[:2]), sorted(corners[2:])), strict=True)
    )
    window = (left, top, right - left, bottom - top)
    same(pixels.scaled(image, *whole, interpolation, window), expected[top:bottom, left:right])


def test_a_photograph_much_larger_than_its_view_weighs_every_pixel():
    image = noise(1500, 2100)
    expected = (
        Image.fromarray(image).resize((64, 1500), Image.Resampling.BICUBIC).resize((64, 46), Image.Resampling.BICUBIC)
    )
    same(pixels.scaled(image, 64, 46, "bicubic"), np.asarray(expected))


def test_a_part_of_a_picture_is_resized_without_being_copied_and_without_its_surroundings():
    image = noise(120, 150)
    part = image[10:90, 33:121]
    same(pixels.resized(part, 64, "bicubic"), pixels.resized(part.copy(), 64, "bicubic"))
    same(
        pixels.resized(image.transpose(1, 0, 2), 64, "bicubic"),
        pixels.resized(image.transpose(1, 0, 2).copy(), 64, "bicubic"),
    )
    assert (image == noise(120, 150)).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_flat_picture_stays_flat_and_extremes_do_not_overflow(interpolation: Interpolation):
    for value in (0, 1, 254, 255):
        assert (pixels.resized(np.full((77, 91, 3), value, np.uint8), 50, interpolation) == value).all()
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::7] = 255
    same(pixels.resized(stripes, 63, interpolation), plain(lambda: pixels.resized(stripes, 63, interpolation)))


@settings(max_examples=80, deadline=None)
@given(height=SIDES, width=SIDES, factor=FACTORS, seed=st.integers(0, 99))
def test_values_histograms_and_blends_are_pillows(height, width, factor, seed):
    image = noise(height, width, seed) // (1 + seed % 3)
    picture = Image.fromarray(image)
    table = np.random.default_rng(seed).integers(0, 256, (3, 256), dtype=np.uint8)
    same(pixels.looked_up(image, table), np.asarray(picture.point(table.ravel().tolist())))
    same(pixels.histogram(image).ravel(), np.array(picture.histogram()))
    assert pixels.mean_grey(image) == int(np.asarray(picture.convert("L")).astype(float).mean() + 0.5)
    same(pixels.faded(image, factor), np.asarray(ImageEnhance.Color(picture).enhance(factor)))
    same(pixels.sharpened(image, factor), np.asarray(ImageEnhance.Sharpness(picture).enhance(factor)))
    for call in (lambda: pixels.faded(image, factor), lambda: pixels.looked_up(image, table)):
        same(call(), plain(call))


@settings(max_examples=120, deadline=None)
@given(
    height=SIDES,
    width=SIDES,
    shear=st.floats(-2, 2),
    shift=st.floats(-120, 120),
    degrees=st.one_of(st.floats(-400, 400), st.sampled_from([0.0, 90.0, 180.0, -90.0, 270.0])),
)
def test_shears_shifts_and_turns_take_the_pixels_that_pillow_takes(height, width, shear, shift, degrees):
    image = noise(height, width)
    picture = Image.fromarray(image)
    for matrix in ((1, shear, 0, 0, 1, 0), (1, 0, 0, shear, 1, 0), (1, 0, shift, 0, 1, -shift), (1, 0, 0, 0, 1, 0)):
        expected = picture.transform(
            picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=pixels.FILL
        )
        same(pixels.moved(image, matrix), np.asarray(expected))
    turned = picture.rotate(degrees, Image.Resampling.NEAREST, fillcolor=pixels.FILL)
    same(pixels.rotated(image, degrees), np.asarray(turned))


def test_a_map_that_leads_far_out_of_the_picture_uncovers_only_grey():
    image = noise(20, 30)
    assert (pixels.moved(image, (1, 5000.0, 40_000, 0, 1, 0)) == pixels.FILL).all()
    assert (pixels.moved(image, (1, 0, 31, 0, 1, 0)) == pixels.FILL).all()


def test_no_operator_changes_its_input_or_needs_it_contiguous():
    wide = noise(40, 80)
    image = wide[3:37, 5:70]
    before = wide.copy()
    table = np.tile(np.arange(256, dtype=np.uint8)[::-1], (3, 1))
    for call in (
        lambda x: pixels.looked_up(x, table),
        lambda x: pixels.faded(x, 1.5),
        lambda x: pixels.sharpened(x, 1.5),
        lambda x: pixels.moved(x, (1, 0.2, 0, 0, 1, 0)),
        lambda x: pixels.rotated(x, 12.0),
        pixels.histogram,
    ):
        np.testing.assert_array_equal(call(image), call(image.copy()))
    np.testing.assert_array_equal(wide, before)

"""Augmentation against closed forms in numpy, the printed tables, and what must never change."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet.augment import (
    AUTO_AUGMENT_V0,
    AUTO_REACH,
    OPERATIONS,
    RAND_REACH,
    Reach,
    auto_augment,
    cutmix,
    cutout,
    distort,
    erase,
    inception_box,
    mix,
    mixup,
    rand_augment,
    view,
    warp,
)
from effnet.recipes import Policy
from effnet.value import UsageError

GEOMETRIC = ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout"]
CROPS = ["inception", "dihedral", "resize", "pad", "none"]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture that changes slowly and differently along both axes, and in each channel."""
    y, x = np.mgrid[0:height, 0:width]
    x, y = x / width, y / height
    return np.stack([250 * x, 250 * y, 125 * x + 125 * y**2], axis=2).astype(np.uint8)


class Fixed(np.random.Generator):
    """A generator whose numbers are chosen: `random()`, `integers()` and `beta()` are always these."""

    def __init__(self, random: float = 0.0, integers: int = 0, beta: float = 0.0) -> None:
        super().__init__(np.random.PCG64(0))
        self._random, self._integers, self._beta = random, integers, beta

    def random(self, *args: Any, **kwargs: Any) -> Any:
        return self._random

    def integers(self, *args: Any, **kwargs: Any) -> Any:
        return self._integers

    def beta(self, a: Any, b: Any, size: Any = None) -> Any:
        return np.full(size, self._beta)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- views ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 33, 64])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_flips_and_turns_are_exact(size, flip, turns):
    image = noise(size, size)
    expected = np.rot90(np.fliplr(image) if flip else image, turns)
    np.testing.assert_array_equal(warp(image, size, turns=turns, flip=flip), expected)


def test_the_central_square_of_a_long_image_is_shown():
    image = noise(20, 50)
    np.testing.assert_array_equal(warp(image, 20), image[:, 15:35])
    np.testing.assert_array_equal(warp(image.transpose(1, 0, 2), 20), image[:, 15:35].transpose(1, 0, 2))


def test_a_turn_by_ninety_degrees_is_a_quarter_turn():
    image = noise(32, 32)
    assert np.abs(warp(image, 32, degrees=90).astype(int) - warp(image, 32, turns=1)).max() <= 1


@pytest.mark.parametrize("factor", [2, 3])
def test_a_source_of_a_multiple_of_the_size_is_averaged(factor):
    image = noise(24 * factor, 24 * factor)
    expected = image.reshape(24, factor, 24, factor, 3).mean(axis=(1, 3))
    assert np.abs(warp(image, 24) - expected).max() <= 1
    assert np.abs(warp(image, 24, turns=1) - np.rot90(expected)).max() <= 1


@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (0, -5), (-2, 4)])
def test_a_shift_by_whole_pixels_moves_the_window_into_the_mirror_image(dx, dy, reduction):
    size = 24
    image = np.kron(noise(size, size), np.ones((reduction, reduction, 1), np.uint8))
    mirrored = np.pad(noise(size, size), ((8, 8), (8, 8), (0, 0)), mode="symmetric")
    expected = mirrored[8 + dy : 8 + dy + size, 8 + dx : 8 + dx + size]
    moved = warp(image, size, shift=(dx / size, dy / size))
    assert np.abs(moved.astype(int) - expected).max() <= 1  # dx / size is not exact in binary


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(20, 90),
    degrees=st.floats(-3, 3),
    zoom=st.floats(0.9, 1.1),
    shift=st.tuples(st.floats(-0.03, 0.03), st.floats(-0.03, 0.03)),
)
def test_a_linear_ramp_is_sampled_where_the_map_says(size, degrees, zoom, shift):
    side = 60
    y, x = np.mgrid[0:side, 0:side] + 0.5
    image = np.repeat((2 * x + 1.5 * y)[..., None], 3, axis=2)
    u, v = (np.mgrid[0:size, 0:size][::-1] + 0.5 - size / 2) * zoom * side / size
    angle = math.radians(degrees)
    source_x = side * (0.5 + shift[0]) + math.cos(angle) * u - math.sin(angle) * v
    source_y = side * (0.5 + shift[1]) + math.sin(angle) * u + math.cos(angle) * v
    inside = (np.abs(source_x - side / 2) < side / 2 - 3) & (np.abs(source_y - side / 2) < side / 2 - 3)
    shown = warp(np.round(image).astype(np.uint8), size, degrees=degrees, zoom=zoom, shift=shift)
    assert np.abs(shown[..., 0] - (2 * source_x + 1.5 * source_y))[inside].max() < 2.1


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    size=st.integers(1, 40),
    turns=st.integers(-4, 4),
    flip=st.booleans(),
    degrees=st.floats(-180, 180),
    zoom=st.floats(0.5, 2),
    shift=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
)
def test_no_warp_uncovers_anything_outside_the_image(height, width, size, turns, flip, degrees, zoom, shift):
    image = np.full((height, width, 3), (9, 99, 199), np.uint8)
    shown = warp(image, size, turns=turns, flip=flip, degrees=degrees, zoom=zoom, shift=shift)
    np.testing.assert_array_equal(shown, np.full((size, size, 3), (9, 99, 199), np.uint8))


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("magnitude", [0.0, 12.5])
def test_a_view_depends_on_its_generator_and_nothing_else(crop, magnitude):
    image = noise(50, 70)
    before = image.copy()
    views = [view(image, 32, crop=crop, magnitude=magnitude, rng=rng(seed)) for seed in (1, 1, 2, 3, 4, 5)]
    assert all(v.shape == (32, 32, 3) and v.dtype == np.uint8 for v in views)
    np.testing.assert_array_equal(views[0], views[1])
    assert (crop == "none" and magnitude == 0) or any((v != views[0]).any() for v in views[2:])
    np.testing.assert_array_equal(image, before)


def test_none_at_the_same_size_is_the_identity():
    image = noise(40, 40)
    for seed in range(8):
        np.testing.assert_array_equal(view(image, 40, crop="none", rng=rng(seed)), image)


def test_resize_is_the_image_or_its_mirror_image_about_half_the_time():
    image = noise(40, 40)
    views = [view(image, 40, crop="resize", rng=rng(seed)) for seed in range(200)]
    straight = sum(bool((v == image).all()) for v in views)
    mirrored = sum(bool((v == image[:, ::-1]).all()) for v in views)
    assert straight + mirrored == 200 and 70 < straight < 130


def test_pad_is_a_shift_by_at_most_an_eighth_with_black_coming_in_and_a_mirror_image_about_half_the_time():
    image, mirrored = noise(40, 40) | 1, 0  # no black of its own
    framed = {flip: np.pad(image[:, ::-1] if flip else image, ((5, 5), (5, 5), (0, 0))) for flip in (False, True)}
    shifts = set()
    for seed in range(200):
        shown = view(image, 40, crop="pad", rng=rng(seed))
        places = [
            (flip, top, left)
            for flip in framed
            for top in range(11)
            for left in range(11)
            if (framed[flip][top : top + 40, left : left + 40] == shown).all()
        ]
        assert len(places) == 1
        mirrored += places[0][0]
        shifts.add(places[0][1:])
    assert 70 < mirrored < 130 and len(shifts) > 60
    assert {top for top, _ in shifts} == {left for _, left in shifts} == set(range(11))


def test_dihedral_views_are_near_one_of_the_eight_symmetries_and_all_eight_occur():
    image = smooth(90, 90)
    symmetries = [np.rot90(np.fliplr(image) if flip else image, turns) for flip in (False, True) for turns in range(4)]
    seen = set()
    for seed in range(120):
        shown = view(image, 90, crop="dihedral", rng=rng(seed)).astype(int)
        distances = [np.abs(shown - symmetry).mean() for symmetry in symmetries]
        assert min(distances) < 10 < sorted(distances)[1]
        seen.add(int(np.argmin(distances)))
    assert len(seen) == 8


def test_inception_views_show_a_part_that_is_stretched_to_the_square():
    y, x = np.mgrid[0:100, 0:100]
    coordinates = np.stack([x, y, x], axis=2).astype(np.uint8)
    for seed in range(30):
        shown = view(coordinates, 50, crop="inception", rng=rng(seed)).astype(int)
        width, height = np.ptp(shown[..., 0]) + 1, np.ptp(shown[..., 1]) + 1
        assert 0.06 < width * height / 100**2 <= 1 and 0.6 < width / height < 1.5


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    seed=st.integers(0, 10**6),
    area=st.sampled_from([(0.08, 1.0), (0.05, 1.0), (0.5, 0.6)]),
)
def test_a_crop_keeps_its_area_and_aspect_or_is_the_centre(width, height, seed, area):
    left, top, crop_width, crop_height = inception_box(width, height, rng(seed), area=area)
    assert 0 <= left <= width - crop_width and 0 <= top <= height - crop_height
    side = max(1, int(0.875 * min(width, height)))
    if (left, top, crop_width, crop_height) != ((width - side + 1) // 2, (height - side + 1) // 2, side, side):
        assert area[0] <= crop_width * crop_height / (width * height) <= area[1]
        assert 0.75 * (crop_height - 1) - 1 <= crop_width <= 4 / 3 * (crop_height + 1) + 1


def test_crops_reach_from_small_to_nearly_everything():
    shares = [w * h / 40_000 for _, _, w, h in (inception_box(200, 200, rng(seed)) for seed in range(400))]
    assert min(shares) < 0.1 and max(shares) > 0.9


def test_an_image_too_long_for_any_crop_gives_its_centre():
    assert inception_box(1000, 8, rng(), area=(0.9, 1.0)) == (497, 1, 7, 7)  # side int(0.875 * 8), (1000 - 7 + 1) // 2


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("source", [31, 64, 300])
def test_grey_stays_grey_in_every_view(crop, source):
    image = np.repeat(noise(source, source)[..., :1], 3, axis=2)
    for seed in range(5):
        shown = view(image, 32, crop=crop, rng=rng(seed))
        assert (shown == shown[..., :1]).all()


class Recorded:
    """A picture whose pixels at 1 / shrink are exact averages, and which remembers what was asked for."""

    def __init__(self, image: np.ndarray, shrinks: bool = True) -> None:
        self.image, self.shrinks, self.asked = image, shrinks, list[int]()
        self.height, self.width = image.shape[:2]

    def pixels(self, shrink: int = 1) -> np.ndarray:
        self.asked.append(shrink)
        height, width = -(-self.height // shrink), -(-self.width // shrink)
        padded = np.pad(self.image, ((0, -self.height % shrink), (0, -self.width % shrink), (0, 0)), mode="edge")
        return padded.reshape(height, shrink, width, shrink, 3).mean(axis=(1, 3)).round().astype(np.uint8)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize(("height", "width"), [(70, 90), (149, 131), (300, 220), (431, 600)])
def test_a_picture_decoded_smaller_gives_the_view_of_the_whole_one(crop, height, width):
    image, used = smooth(height, width), set()
    for seed in range(25):
        picture = Recorded(image)
        shown = view(picture, 32, crop=crop, rng=rng(seed)).astype(int)
        whole = view(image, 32, crop=crop, rng=rng(seed)).astype(int)
        assert np.abs(shown - whole).max() <= 3  # half a level for each rounding, and the filters' widths at the border
        assert len(picture.asked) == 1 and min(height, width) >= 32 * picture.asked[0]
        used.update(picture.asked)
    assert max(used) > 1 or crop == "inception"  # few crops are large enough


def test_the_scale_is_the_smallest_at_which_both_sides_of_what_is_shown_still_have_the_views_size():
    for sides, shrink in (
        ((63, 500), 1),
        ((64, 64), 2),
        ((127, 500), 2),
        ((128, 129), 4),
        ((256, 256), 8),
        ((999, 999), 8),
    ):
        picture = Recorded(smooth(*sides))
        view(picture, 32, crop="none", rng=rng())
        assert picture.asked == [shrink]
    fixed = Recorded(smooth(999, 999), shrinks=False)
    view(fixed, 32, crop="none", rng=rng())
    assert fixed.asked == [1]


@pytest.mark.parametrize(("argument", "value"), [("crop", "inceptoin"), ("size_px", 0), ("magnitude", -1)])
def test_a_wrong_argument_is_named(argument, value):
    arguments: dict[str, Any] = {"size_px": 8, "crop": "none", "magnitude": 0.0, "rng": rng()} | {argument: value}
    with pytest.raises(UsageError, match=argument):
        view(noise(9, 9), **arguments)


# --- operations -----------------------------------------------------------------------------------------------------


def test_the_sixteen_operations_are_those_of_the_official_code():
    assert set(OPERATIONS) == {
        "AutoContrast",
        "Equalize",
        "Invert",
        "Rotate",
        "Posterize",
        "Solarize",
        "Color",
        "Contrast",
        "Brightness",
        "Sharpness",
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateY",
        "Cutout",
        "SolarizeAdd",
    }
    assert (RAND_REACH.translate_px, RAND_REACH.cutout_px) == (100, 40)
    assert (AUTO_REACH.translate_px, AUTO_REACH.cutout_px) == (250, 100)


IMAGE = noise(40, 52)
LEVELS = [0, 1, 4, 7.5, 10, 17, 28]


def grey_of(image: np.ndarray) -> np.ndarray:
    """ITU-R 601-2 luma in Pillow's 16-bit integers."""
    r, g, b = np.moveaxis(image.astype(np.int64), 2, 0)
    return (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16


def blend(degenerate: np.ndarray, image: np.ndarray, level: float) -> np.ndarray:
    mixed = degenerate + (0.1 + 1.8 * level / 10) * (image.astype(float) - degenerate)
    return np.clip(mixed, 0, 255)


@pytest.mark.parametrize("level", LEVELS)
def test_operations_on_values_follow_their_closed_forms(level):
    def outcome(name: str) -> np.ndarray:
        return distort(IMAGE, name, level, rng())

    np.testing.assert_array_equal(outcome("Invert"), 255 - IMAGE)
    threshold = int(256 * level / 10)
    np.testing.assert_array_equal(outcome("Solarize"), np.where(threshold > IMAGE, IMAGE, 255 - IMAGE))
    added = np.minimum(IMAGE.astype(int) + int(110 * level / 10), 255)
    np.testing.assert_array_equal(outcome("SolarizeAdd"), np.where(IMAGE < 128, added, IMAGE))
    dropped = 8 - min(max(int(4 * level / 10), 1), 8)
    np.testing.assert_array_equal(outcome("Posterize"), IMAGE >> dropped << dropped)


@pytest.mark.parametrize("level", LEVELS)
def test_enhancements_blend_with_their_degenerate_twin(level):
    grey = grey_of(IMAGE)
    smoothed = IMAGE.astype(float)
    windows = np.lib.stride_tricks.sliding_window_view(IMAGE.astype(float), (3, 3), axis=(0, 1))
    smoothed[1:-1, 1:-1] = (windows.sum(axis=(3, 4)) + 4 * windows[..., 1, 1]) / 13
    twins = {
        "Color": (grey[..., None], 1),
        "Contrast": (np.floor(grey.mean() + 0.5), 1),
        "Brightness": (np.zeros(1), 1),
        "Sharpness": (np.floor(smoothed + 0.5), 1),
    }
    for name, (twin, tolerance) in twins.items():
        difference = np.abs(distort(IMAGE, name, level, rng()) - blend(twin, IMAGE, level))
        assert difference.max() <= tolerance, name


def test_level_five_leaves_enhancements_the_identity():
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        np.testing.assert_array_equal(distort(IMAGE, name, 5, rng()), IMAGE)  # factor 0.1 + 1.8 / 2 = 1


def test_autocontrast_stretches_each_channel_to_the_full_range():
    image = np.stack([IMAGE[..., 0] // 2 + 40, IMAGE[..., 1] // 4 + 100, np.full_like(IMAGE[..., 2], 77)], axis=2)
    low, high = image.min(axis=(0, 1)).astype(float), image.max(axis=(0, 1)).astype(float)
    stretched = (image - low) * 255 / np.maximum(high - low, 1)
    stretched[..., 2] = 77  # a flat channel stays
    assert np.abs(distort(image, "AutoContrast", 3, rng()) - stretched).max() <= 1


def test_equalize_spreads_the_histogram_as_the_official_code():
    image = (IMAGE.astype(int) ** 2 // 600 + 20).astype(np.uint8)
    expected = np.empty_like(image)
    for channel in range(3):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        table = np.clip((np.concatenate([[0], np.cumsum(counts)[:-1]]) + step // 2) // step, 0, 255)
        expected[..., channel] = table[image[..., channel]]
    np.testing.assert_array_equal(distort(image, "Equalize", 3, rng()), expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_translations_move_by_their_share_of_the_reach_and_uncover_grey(sign):
    fixed = Fixed(0.0 if sign == 1 else 0.9)
    for name, axis in (("TranslateX", 1), ("TranslateY", 0)):
        shown = distort(IMAGE, name, 2, fixed)  # 100 px * 2 / 10 = 20
        expected = np.full_like(IMAGE, 128)
        kept = [slice(None), slice(None)]
        source = [slice(None), slice(None)]
        kept[axis], source[axis] = (slice(0, -20), slice(20, None))[::sign]
        expected[tuple(kept)] = IMAGE[tuple(source)]
        np.testing.assert_array_equal(shown, expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_shears_move_each_row_or_column_by_its_distance_from_the_corner(sign):
    fixed = Fixed(0.0 if sign == 1 else 0.9)
    height, width = IMAGE.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    shear = sign * 0.3 * 3.7 / 10  # a level without ties between pixels
    for name in ("ShearX", "ShearY"):
        source_x = np.floor(x + 0.5 + (shear * (y + 0.5) if name == "ShearX" else 0)).astype(int)
        source_y = np.floor(y + 0.5 + (shear * (x + 0.5) if name == "ShearY" else 0)).astype(int)
        inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
        clipped = IMAGE[source_y.clip(0, height - 1), source_x.clip(0, width - 1)]
        np.testing.assert_array_equal(distort(IMAGE, name, 3.7, fixed), np.where(inside[..., None], clipped, 128))


@pytest.mark.parametrize("sign", [1, -1])
def test_rotation_at_level_thirty_is_a_quarter_turn(sign):
    image = noise(30, 30)
    shown = distort(image, "Rotate", 30, Fixed(0.0 if sign == 1 else 0.9))  # 30 degrees * 30 / 10
    np.testing.assert_array_equal(shown, np.rot90(image, sign))


def test_rotation_uncovers_grey_corners():
    shown = distort(np.zeros((64, 64, 3), np.uint8), "Rotate", 10, rng())
    assert (shown[0, 0] == 128).all() and (shown[32, 32] == 0).all()


def test_the_sign_of_a_movement_is_random():
    image = noise(30, 30)
    outcomes = {distort(image, "TranslateX", 1, rng(seed)).tobytes() for seed in range(20)}
    assert len(outcomes) == 2


def test_cutout_covers_a_grey_square_of_twice_its_pad_clipped_at_the_border():
    shown = distort(np.zeros((200, 200, 3), np.uint8), "Cutout", 7, Fixed(0, integers=100))  # pad int(40 * 7 / 10) = 28
    expected = np.zeros((200, 200, 3), np.uint8)
    expected[72:128, 72:128] = 128
    np.testing.assert_array_equal(shown, expected)
    corner = distort(np.zeros((200, 200, 3), np.uint8), "Cutout", 7, Fixed(0, integers=0))
    assert (corner[:28, :28] == 128).all() and np.count_nonzero(corner) == 28 * 28 * 3


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_keep_grey_grey_and_level_zero_keeps_everything(name):
    grey = np.repeat(IMAGE[..., :1], 3, axis=2)
    shown = distort(grey, name, 6, rng())
    assert (shown == shown[..., :1]).all() and (shown != grey).any()
    np.testing.assert_array_equal(distort(IMAGE, name, 0, rng()), IMAGE)


def test_an_unknown_operation_names_its_nearest_match():
    with pytest.raises(UsageError, match="Did you mean 'Posterize'"):
        distort(IMAGE, "Posterise", 1, rng())


def test_the_reach_shrinks_with_views_below_224_px_only():
    assert RAND_REACH.at(224) == RAND_REACH.at(480) == RAND_REACH
    assert RAND_REACH.at(56) == Reach(translate_px=25, cutout_px=10)


def test_rand_augment_applies_each_operation_it_draws_one_after_the_other():
    seen = set()
    for seed in range(60):
        generator = rng(seed)
        names = [list(OPERATIONS)[index] for index in generator.integers(16, size=2)]
        seen.update(names)
        expected = distort(distort(IMAGE, names[0], 9, generator), names[1], 9, generator)
        np.testing.assert_array_equal(rand_augment(IMAGE, 9, rng(seed)), expected)
    assert seen == set(OPERATIONS)
    np.testing.assert_array_equal(rand_augment(IMAGE, 9, rng(), operations=0), IMAGE)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 20), width=st.integers(1, 20), magnitude=st.floats(0, 40), seed=st.integers(0, 10**6))
def test_rand_augment_accepts_any_size_and_magnitude(height, width, magnitude, seed):
    image = noise(height, width)
    before = image.copy()
    shown = rand_augment(image, magnitude, rng(seed), operations=3)
    assert shown.shape == image.shape and shown.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


SHORT = {
    "E": "Equalize",
    "AC": "AutoContrast",
    "Inv": "Invert",
    "Rot": "Rotate",
    "Pos": "Posterize",
    "Sol": "Solarize",
    "SolA": "SolarizeAdd",
    "Col": "Color",
    "ShX": "ShearX",
    "ShY": "ShearY",
    "TrY": "TranslateY",
}
PRINTED = """
E .8 1, ShY .8 4 | Col .4 9, E .6 3 | Col .4 1, Rot .6 8 | Sol .8 3, E .4 7 | Sol .4 2, Sol .6 2 | Col .2 0, E .8 8
E .4 8, SolA .8 3 | ShX .2 9, Rot .6 8 | Col .6 1, E 1.0 2 | Inv .4 9, Rot .6 0 | E 1.0 9, ShY .6 3 | Col .4 7, E .6 0
Pos .4 6, AC .4 7 | Sol .6 8, Col .6 9 | Sol .2 4, Rot .8 9 | Rot 1.0 7, TrY .8 9 | ShX 0 0, Sol .8 4
ShY .8 0, Col .6 4 | Col 1.0 0, Rot .6 2 | E .8 4, E 0 8 | E 1.0 4, AC .6 2 | ShY .4 7, SolA .6 7 | Pos .8 2, Sol .6 10
Sol .6 8, E .6 1 | Col .8 6, Rot .4 5
"""


def test_auto_augment_v0_has_the_25_printed_sub_policies():
    rows = [row for line in PRINTED.strip().splitlines() for row in line.split(" | ")]
    steps = [[step.split() for step in row.split(", ")] for row in rows]
    expected = tuple(tuple((SHORT[name], float(p), int(level)) for name, p, level in row) for row in steps)
    assert len(expected) == 25
    assert expected == AUTO_AUGMENT_V0


def test_auto_augment_applies_steps_with_their_probability():
    certain_only = Fixed(0.99, integers=8)  # Color .6 1, then Equalize 1.0 2
    np.testing.assert_array_equal(auto_augment(IMAGE, certain_only), distort(IMAGE, "Equalize", 2, rng()))
    never_the_first = Fixed(0.0, integers=16)  # ShearX 0 0, then Solarize .8 4: threshold int(102.4)
    np.testing.assert_array_equal(auto_augment(IMAGE, never_the_first), np.where(IMAGE < 102, IMAGE, 255 - IMAGE))
    both = Fixed(0.0, integers=15)  # Rotate 1.0 7, then TranslateY .8 9: 250 px * 9 / 10 = 225
    turned = distort(noise(300, 8), "Rotate", 7, Fixed(0.0))
    expected = np.full_like(turned, 128)
    expected[:75] = turned[225:]
    np.testing.assert_array_equal(auto_augment(noise(300, 8), both), expected)


def test_auto_augment_draws_every_sub_policy_and_repeats_itself_by_seed():
    outcomes = [auto_augment(IMAGE, rng(seed)) for seed in range(100)]
    assert len({outcome.tobytes() for outcome in outcomes}) > 25
    np.testing.assert_array_equal(auto_augment(IMAGE, rng(7)), outcomes[7])


# --- holes ----------------------------------------------------------------------------------------------------------


def hole(changed: np.ndarray) -> tuple[int, int]:
    """Height and width of the changed rectangle."""
    rows, columns = np.flatnonzero(changed.any(axis=(1, 2))), np.flatnonzero(changed.any(axis=(0, 2)))
    return rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def test_cutout_makes_noise_of_a_square_and_leaves_the_rest():
    image = np.full((60, 60, 3), 44, np.uint8)
    for seed in range(20):
        shown = cutout(image, 10, rng(seed))
        height, width = hole(shown != image)
        assert 9 <= height <= 20 and 9 <= width <= 20  # clipped at a border, or noise that equals the picture
        assert len(np.unique(shown)) > 50 and (image == 44).all()


@settings(max_examples=60, deadline=None)
@given(height=st.integers(20, 90), width=st.integers(20, 90), seed=st.integers(0, 10**6))
def test_erasing_takes_a_rectangle_of_two_to_forty_per_cent(height, width, seed):
    image = np.full((height, width, 3), 44, np.uint8)
    shown = erase(image, 1.0, rng(seed))
    rows, columns = hole(shown != image)
    slack = (rows + columns) / (height * width)  # both sides are rounded, and noise may equal the picture at an edge
    assert 0.02 - slack <= rows * columns / (height * width) <= 0.4 + slack
    assert (image == 44).all()


def test_erasing_happens_with_its_probability():
    image = np.full((30, 30, 3), 44, np.uint8)
    erased = sum(bool((erase(image, 0.25, rng(seed)) != image).any()) for seed in range(400))
    assert 70 < erased < 130
    np.testing.assert_array_equal(erase(image, 0.0, rng()), image)
    with pytest.raises(UsageError, match="probability"):
        erase(image, 1.5, rng())


# --- batches --------------------------------------------------------------------------------------------------------


def labelled(count: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of one value each (their index), channels last, and one-hot targets."""
    batch = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, size, size).clone()
    return batch.to(memory_format=torch.channels_last), torch.eye(count)


@pytest.mark.parametrize("mixing", [mixup, cutmix])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 7, 8])
def test_mixed_targets_sum_to_one_and_inputs_stay(mixing, alpha, count):
    batch, targets = labelled(count)
    before = batch.clone()
    mixed, soft = mixing(batch, targets, alpha, rng())
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(count))
    assert torch.equal(batch, before) and torch.equal(targets, torch.eye(count))
    assert mixed.is_contiguous(memory_format=torch.channels_last) and soft.dtype == targets.dtype
    again = mixing(batch, targets, alpha, rng())
    assert torch.equal(mixed, again[0]) and torch.equal(soft, again[1])
    if count % 2:
        assert torch.equal(mixed[count // 2], batch[count // 2])  # the middle one is its own partner


@pytest.mark.parametrize("mixing", [mixup, cutmix])
def test_an_alpha_of_zero_changes_nothing_and_a_negative_one_is_refused(mixing):
    batch, targets = labelled(6)
    mixed, soft = mixing(batch, targets, 0.0, rng())
    assert torch.equal(mixed, batch) and torch.equal(soft, targets)
    with pytest.raises(UsageError, match="alpha"):
        mixing(batch, targets, -0.1, rng())


def test_mixup_blends_with_the_reversed_batch_by_the_weight_in_the_targets():
    generator = torch.Generator().manual_seed(0)
    batch, targets = torch.randn(10, 3, 5, 4, generator=generator), torch.eye(10)
    mixed, soft = mixup(batch, targets, 0.8, rng())
    weight = soft.diagonal()
    assert (weight >= 0.5).all() and (weight < 1).any()
    torch.testing.assert_close(soft.flip(1).diagonal(), 1 - weight)
    w = weight.view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed, w * batch + (1 - w) * batch.flip(0))


def test_mixup_weights_follow_the_folded_beta_distribution():
    batch, targets = labelled(4000, size=1)[0], torch.zeros(4000, 2)
    targets[:2000, 0], targets[2000:, 1] = 1, 1  # so that partners differ in class
    _, soft = mixup(batch, targets, 1.0, rng())
    weight = soft.max(dim=1).values  # Beta(1, 1) folded is uniform on [0.5, 1]
    assert abs(weight.mean() - 0.75) < 0.01 and abs(weight.std() - 0.5 / math.sqrt(12)) < 0.01


@pytest.mark.parametrize("size", [8, 31])
def test_cutmix_pastes_one_rectangle_and_its_exact_area_is_the_label_weight(size):
    batch, targets = labelled(64, size)
    mixed, soft = cutmix(batch, targets, 1.0, rng())
    for i in range(64):
        pasted = (mixed[i] == 63 - i).numpy()
        assert ((mixed[i] == i).numpy() | pasted).all() and (pasted == pasted[:1]).all()
        if pasted.any():
            rows, columns = hole(pasted[0][..., None])
            assert pasted[0].sum() == rows * columns
        torch.testing.assert_close(soft[i, 63 - i], torch.tensor(pasted[0].mean(), dtype=torch.float32))


def test_cutmix_rectangles_have_the_sides_of_the_official_code():
    batch, targets = labelled(2, 32)
    for centre, columns in ((16, slice(8, 24)), (3, slice(0, 11)), (30, slice(22, 32))):  # sqrt(1 - 0.75) * 32 = 16
        mixed, soft = cutmix(batch, targets, 1.0, Fixed(integers=centre, beta=0.75))
        expected = torch.zeros(32, 32)
        expected[columns, columns] = 1
        assert torch.equal(mixed[0, 0], expected)
        torch.testing.assert_close(soft[0, 1], expected.mean())


def test_mix_gives_mixup_to_the_first_half_and_cutmix_to_the_second():
    batch, targets = labelled(9)
    mixed, soft = mix(batch, targets, mixup_alpha=1.0, cutmix_alpha=1.0, rng=rng(2))
    first = mixed[:4]
    assert (first == first[:, :1, :1, :1]).all()  # blended everywhere alike
    assert (soft[:4, 4:] == 0).all() and (soft[4:, :4] == 0).all()  # partners come from the same half
    for i in range(4, 9):
        assert set(mixed[i].unique().tolist()) <= {float(i), float(12 - i)}
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(9))
    torch.testing.assert_close((soft * torch.arange(9.0)).sum(dim=1), mixed.mean(dim=(1, 2, 3)))


def test_mix_gives_each_method_its_own_alpha():
    batch, targets = labelled(40)
    generator = rng(5)
    blended = mixup(batch[:20], targets[:20], 0.2, generator)
    pasted = cutmix(batch[20:], targets[20:], 0.9, generator)
    mixed, soft = mix(batch, targets, mixup_alpha=0.2, cutmix_alpha=0.9, rng=rng(5))
    assert torch.equal(mixed, torch.cat([blended[0], pasted[0]]))
    assert torch.equal(soft, torch.cat([blended[1], pasted[1]]))


@pytest.mark.parametrize(("alphas", "alone"), [((0.5, 0.0), mixup), ((0.0, 0.5), cutmix), ((0.0, 0.0), None)])
def test_mix_with_one_alpha_is_that_method_on_the_whole_batch(alphas, alone):
    batch, targets = labelled(8)
    mixed, soft = mix(batch, targets, mixup_alpha=alphas[0], cutmix_alpha=alphas[1], rng=rng())
    expected = alone(batch, targets, 0.5, rng()) if alone else (batch, targets)
    assert torch.equal(mixed, expected[0]) and torch.equal(soft, expected[1])


def test_a_view_follows_its_policy() -> None:
    """AutoAugment and cutout come on top of the same crop, from the same stream."""
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)

    def made(policy: Policy, size_px: int = 32) -> np.ndarray:
        return view(image, size_px, crop="none", policy=policy, rng=np.random.default_rng(3))

    plain = made("randaugment")
    expected = auto_augment(plain, np.random.default_rng(3), reach=AUTO_REACH.at(32))
    assert np.array_equal(made("autoaugment"), expected)
    changed = (made("cutout") != plain).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert 0 < np.ptp(rows) < 16 and 0 < np.ptp(columns) < 16  # a square of at most half the side
    with pytest.raises(UsageError, match="Did you mean 'autoaugment'"):
        made("autoaug")  # ty: ignore[invalid-argument-type]

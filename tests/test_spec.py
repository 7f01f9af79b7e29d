"""Networks as values: rounding, invariants, JSON, scaling, geometry."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effnet import families
from effnet.spec import Head, Network, Preprocess, Rounding, Stage, Stem, multiply, resolve
from effnet.value import UsageError

TINY = Network(
    name="tiny",
    stem=Stem(width=8),
    stages=(Stage(op="mbconv", repeats=2, width=16, stride=2, expand=4, se=0.25),),
    head=Head(width=32, classes=5),
    resolution=32,
    preprocess=Preprocess(size=32, resize=36),
)


@pytest.mark.parametrize(
    ("factor", "base", "width"),
    [(1.2, 16, 24), (1.1, 16, 16), (1.4, 16, 24), (1.1, 1280, 1408), (1.2, 32, 40), (1.6, 32, 48), (4.3, 16, 72)],
)
def test_widths_round_as_the_released_code_does(factor: float, base: int, width: int) -> None:
    assert Rounding().width(base, factor) == width


@given(channels=st.integers(8, 2048), factor=st.floats(0.25, 5))
def test_a_rounded_width_is_a_multiple_of_eight_near_what_was_asked(channels: int, factor: float) -> None:
    width = Rounding().width(channels, factor)
    if factor != 1:
        assert width % 8 == 0
        assert width >= 0.9 * channels * factor
        assert width <= max(8, channels * factor + 8)


@given(repeats=st.integers(1, 40), tenths=st.integers(1, 60))
def test_repeats_are_the_exact_ceiling(repeats: int, tenths: int) -> None:
    assert Rounding().repeats(repeats, tenths / 10) == max(1, math.ceil(repeats * tenths / 10 - 1e-9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding": "valid"}, "padding 'valid' is not one of same, symmetric"),
        ({"stages": ()}, "no stages"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"resolution": 0}, "resolution is 0"),
        ({"activation": "swich"}, "activation 'swich'"),
        ({"depht": 3}, "'depht' is not one of"),
    ],
)
def test_a_wrong_network_says_what_is_wrong(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TINY.replace(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "mbcov"}, "Did you mean 'mbconv'"),
        ({"kernel": 4}, "kernel is 4; it must be odd"),
        ({"stride": 3}, "stride is 3"),
        ({"repeats": 0}, "repeats is 0"),
        ({"se": 0.25, "op": "basic"}, "no squeeze-excite"),
        ({"width": float("nan")}, "width is nan"),
    ],
)
def test_a_wrong_stage_says_what_is_wrong(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TINY.stages[0].replace(**change)


def test_json_with_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'resolution'"):
        Network.from_json(TINY.to_json().replace('"resolution"', '"resoluton"'))


def test_json_without_a_required_key_says_so() -> None:
    with pytest.raises(UsageError, match="stem"):
        Network.from_dict({key: value for key, value in TINY.to_dict().items() if key != "stem"})


def test_text_that_is_not_json_says_so() -> None:
    with pytest.raises(UsageError, match="not a JSON description of a Network"):
        Network.from_json("{]")


def test_only_the_first_block_of_a_stage_changes_stride_and_width() -> None:
    first, second = (unit for unit in resolve(TINY) if unit.name.startswith("stages"))
    assert (first.in_channels, first.stride, first.shortcut) == (8, 2, False)
    assert (second.in_channels, second.stride, second.shortcut) == (16, 1, True)


def test_the_squeeze_width_comes_from_the_block_input() -> None:
    first, second = (unit for unit in resolve(TINY) if unit.name.startswith("stages"))
    assert (first.squeeze_channels, second.squeeze_channels) == (2, 4)  # 8 / 4 and 16 / 4, not of 32 and 64


@given(size=st.integers(4, 700))
def test_each_stride_halves_upwards(size: int) -> None:
    units = resolve(TINY, size)
    assert units[0].out_size == math.ceil(size / 2)
    assert units[1].out_size == math.ceil(math.ceil(size / 2) / 2)


def test_a_size_below_the_stride_is_refused() -> None:
    with pytest.raises(UsageError, match="input size 31 is below the stride 32"):
        resolve(families.get("efficientnet_b0"), 31)


def test_scaling_lite_leaves_stem_head_and_outer_stages_alone() -> None:
    scaled = multiply(families.get("efficientnet_lite0"), width=2.0, depth=3.0)
    assert (scaled.stem.width, scaled.head.width) == (32, 1280)
    assert [stage.repeats for stage in scaled.stages] == [1, 6, 6, 9, 9, 12, 1]


def test_scaling_by_nothing_changes_nothing() -> None:
    for name in families.names():
        assert multiply(families.get(name)) == families.get(name)


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf")])
def test_a_factor_that_is_not_positive_and_finite_is_refused(factor: float) -> None:
    with pytest.raises(UsageError, match="width factor"):
        multiply(TINY, width=factor)


def test_printing_a_network_shows_the_table() -> None:
    assert "mbconv e6 k5 s2 se0.25 -> 40 x2" in str(families.get("efficientnet_b0"))


def test_a_network_survives_plain_dicts_as_well_as_json() -> None:
    assert Network.from_dict(TINY.to_dict()) == TINY

"""Scaling against the published tables, and what is refused."""

import itertools
import math

import numpy as np
import pytest

from effnet import families
from effnet.cost import cost
from effnet.scaling import PAPER, Coefficients, Pixels, Rows, scale
from effnet.spec import Head, Network, Preprocess, Rounding, Stage, Stem, multiply
from effnet.value import UsageError

B0 = families.get("efficientnet_b0")


@pytest.mark.parametrize("name", [f"b{i}" for i in range(9)])
def test_the_published_table_of_coefficients_gives_the_published_networks(name: str) -> None:
    width, depth, resolution, _, _ = families.V1[name]
    made, published = scale(B0, depth=depth, width=width, resolution=resolution), families.get(f"efficientnet_{name}")
    assert (made.stem, made.stages, made.head) == (published.stem, published.stages, published.head)
    assert made.resolution == published.resolution
    assert made.dropout == B0.dropout  # regularisation is a choice of training


# Tan & Le 2019, eq. 3 with (1.2, 1.1, 1.15): depth, width and resolution worked out by hand for phi = 0.5, 1, 2, 3.5
@pytest.mark.parametrize(
    ("phi", "depth", "width", "px"),
    [(0.5, 1.0954, 1.0488, 240), (1, 1.2, 1.1, 258), (2, 1.44, 1.21, 296), (3.5, 1.8930, 1.3960, 365)],
)
def test_phi_multiplies_as_in_equation_3(phi: float, depth: float, width: float, px: int) -> None:
    made = scale(B0, phi)
    assert made.resolution == px
    assert made.stages == multiply(B0, depth=depth, width=width).stages
    assert np.allclose(PAPER.factors(phi)[:2], (depth, width), atol=1e-4)


def test_the_papers_coefficients_nearly_double_the_multiply_adds() -> None:
    assert PAPER.growth == pytest.approx(1.92027)  # 1.2 * 1.1^2 * 1.15^2


def test_a_negative_phi_scales_down_and_zero_changes_nothing() -> None:
    small = scale(B0, -2)
    assert small.resolution == round(224 / 1.15**2)
    assert cost(small).macs < cost(B0).macs / 2
    assert scale(B0, 0) == B0


def test_resolutions_are_multiples_of_a_step_and_stop_at_a_cap() -> None:
    assert scale(B0, 1, resolution_step=32).resolution == 256  # 257.6
    assert scale(B0, 4, max_resolution=300).resolution == 300  # 391.8
    assert scale(B0, 4, max_resolution=300, resolution_step=32).resolution == 288
    assert scale(B0, depth=2, max_resolution=200).resolution == 200


def test_late_stages_can_be_deepened_more() -> None:
    """EfficientNetV2 adds layers to the late stages: each follows a power of the depth factor of its own."""
    powers = (0, 0.5, 1, 1, 1, 1.5, 2)
    rows = tuple(stage.replace(deepen=power) for stage, power in zip(B0.stages, powers, strict=True))
    made = scale(B0.replace(stages=rows), depth=4)
    assert [stage.repeats for stage in made.stages] == [1, 4, 8, 12, 12, 32, 16]  # repeats * 4^power
    assert Network.from_json(made.to_json()) == made


def test_a_file_of_the_first_version_says_true_and_false() -> None:
    lite = families.get("efficientnet_lite0")
    old = lite.to_json().replace('"deepen": 1.0', '"deepen": true').replace('"deepen": 0.0', '"deepen": false')
    assert old != lite.to_json()
    assert Network.from_json(old) == lite


@pytest.mark.parametrize("rounding", [Rounding(), Rounding(keep=0.0), Rounding(depth="round"), Rounding(divisor=4)])
@pytest.mark.parametrize("dimension", ["width", "depth"])
def test_breaks_name_every_factor_where_an_integer_changes(rounding: Rounding, dimension: str) -> None:
    network = Network(
        name="odd",
        stem=Stem(width=10),
        stages=(
            Stage(op="mbconv", repeats=3, width=20, stride=2, deepen=0.5),
            Stage(op="basic", repeats=2, width=33, stride=2),
        ),
        head=Head(width=70, scale=False),
        resolution=32,
        preprocess=Preprocess(size=32, resize=32),
        rounding=rounding,
    )

    def integers(factor: float) -> tuple:
        made = multiply(network, **{dimension: factor})
        return made.stem, made.stages, made.head

    low, high = 0.2, 4.0
    breaks = Rows(network=network).breaks(dimension, low, high)
    factors = np.linspace(low, high, 4001)
    seen = {integers(factor) for factor in factors[:-1] if factor != 1}
    named = [integers(factor) for factor in (breaks[1:] + breaks[:-1]) / 2]
    assert seen <= set(named)
    assert all(before != after for before, after in itertools.pairwise(named))


def test_pixels_change_where_they_are_said_to() -> None:
    px = Pixels(base=60, smallest=16, step=8, most=130)
    breaks = px.breaks(0.3, 3)
    sizes = px.of((breaks[1:] + breaks[:-1]) / 2)
    assert sizes.tolist() == [*range(16, 121, 8), 128]
    assert set(px.of(np.linspace(0.3, 3, 1000))) == set(sizes.tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "scale by phi, or by depth"),
        ({"phi": 1, "depth": 2}, "scale by phi, or by depth"),
        ({"phi": math.nan}, "phi is nan"),
        ({"phi": math.inf}, "phi is inf"),
        ({"phi": 90}, "depth factor at phi 90"),
        ({"phi": -15}, "resolution is 28; it must be at least 32"),
        ({"depth": 0}, "depth factor is 0"),
        ({"depth": -1}, "depth factor is -1"),
        ({"width": math.nan}, "width factor is nan"),
        ({"resolution": 1.3}, r"px, not a factor\) is 1.3"),
        ({"resolution": 512, "max_resolution": 480}, "between 32 and 480"),
        ({"phi": 1, "max_resolution": 20}, "max_resolution is 20"),
        ({"phi": 1, "resolution_step": 0}, "resolution_step is 0"),
    ],
)
def test_what_cannot_be_scaled_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        scale(B0, **arguments)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((0.9, 1.1, 1.1), "alpha is 0.9"),
        ((1.2, math.nan, 1.1), "beta is nan"),
        ((1.2, 1.1, math.inf), "gamma is inf"),
        ((1, 1, 1), "scale nothing"),
    ],
)
def test_coefficients_are_one_or_more_and_finite(bad: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Coefficients(*bad)

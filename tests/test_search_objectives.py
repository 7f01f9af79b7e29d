"""Objectives against hand-computed values; fronts, crowding and hypervolume against closed forms and brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effnet.search.objectives import (
    Objective,
    crowding,
    dominates,
    hard,
    hypervolume,
    ordered,
    ranks,
    soft,
    training_aware,
)
from effnet.value import UsageError

VALUES = {"acc": 0.8, "macs": 120e6, "params": 5e6, "activations": 1e6, "latency_ms": 4.0, "step_ms": 40.0}

# --- expressions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "goal"),
    [
        ("acc", 0.8, "max"),
        ("acc * (macs/60M)^-0.07", 0.8 * 2**-0.07, "max"),
        ("acc*(step_ms/80)^-0.07*(params/20M)^-0.05", 0.8 * 0.5**-0.07 * 0.25**-0.05, "max"),
        ("acc * max(1, macs/60M)^-1", 0.4, "max"),
        ("acc * max(1, macs/240M)^-1", 0.8, "max"),
        ("macs", 120e6, "min"),
        ("max macs", 120e6, "max"),
        ("min latency_ms + 1.5k", 1504.0, "min"),
        ("min(acc, 0.5) - -2^2", 4.5, "max"),
        ("log(params / 5M)", 0.0, "max"),
        ("-acc", -0.8, "max"),
        ("2 ^ 3 ^ 2 * acc", 512 * 0.8, "max"),  # powers bind from the right, as in mathematics
        ("1e2 * acc / .5", 160.0, "max"),
    ],
)
def test_expressions_mean_what_they_say(text: str, value: float, goal: str) -> None:
    objective = Objective(text)
    assert objective(VALUES) == pytest.approx(value)
    assert objective.goal == goal
    assert objective.gain(VALUES) == pytest.approx(value if goal == "max" else -value)
    assert Objective.from_json(objective.to_json()) == objective


def test_the_papers_rewards() -> None:
    """MnasNet's rule of thumb: twice the cost and 5 % more accuracy is worth about the same."""
    reward = soft("macs", 60e6)
    assert reward(VALUES) == pytest.approx(0.8 * 2**-0.07)
    assert reward({"acc": 0.8 * 1.05, "macs": 120e6}) == pytest.approx(reward({"acc": 0.8, "macs": 60e6}), rel=2e-3)
    strict = hard("macs", 100e6)
    assert strict({"acc": 0.8, "macs": 99e6}) == 0.8
    assert strict({"acc": 0.8, "macs": 200e6}) == pytest.approx(0.4)
    assert training_aware(40.0, 5e6)(VALUES) == pytest.approx(0.8)
    assert training_aware(20.0, 5e6)(VALUES) == pytest.approx(0.8 * 2**-0.07)
    assert training_aware(40.0, 2.5e6)(VALUES) == pytest.approx(0.8 * 2**-0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acc * mcas", "names 'mcas'; known quantities: .*Did you mean 'macs'"),
        ("__import__('os').system('true')", "not one of min, max, log|not arithmetic"),
        ("acc.__class__", "not arithmetic"),
        ("acc[0]", "not arithmetic"),
        ("(lambda: acc)()", "not arithmetic"),
        ("[acc for acc in macs]", "not arithmetic"),
        ("acc if macs else params", "not arithmetic"),
        ("acc > 1", "not arithmetic"),
        ("'acc' * 2", "not arithmetic"),
        ("True * acc", "not arithmetic"),
        ("exp(acc)", "'exp' is not one of min, max, log"),
        ("log(acc, macs)", "log takes one"),
        ("max(acc)", "min and max two"),
        ("max(acc, macs, key=log)", "not arithmetic"),
        ("max(*acc)", "takes|not arithmetic"),
        ("acc *", "is no expression such as"),
        ("", "is no expression such as"),
        ("acc; macs", "is no expression such as"),
        ("acc\x00", "is no expression such as|not arithmetic"),
        ("3", "names no quantity"),
        ("acc" + " + acc" * 100, "500 must do"),
    ],
)
def test_what_is_no_objective_is_refused_and_never_run(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Objective(text)


@pytest.mark.parametrize(
    "text", ["acc / (acc - acc)", "acc * 9^9^9^9", "log(acc - acc)", "(0 - acc)^0.5", "(acc-acc)^-1"]
)
def test_arithmetic_without_a_value_is_nan(text: str) -> None:
    assert math.isnan(Objective(text)(VALUES))


# --- fronts ---------------------------------------------------------------------------------------------------------

clouds = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 6), min_size=width, max_size=width), min_size=1, max_size=14)
)


@given(clouds)
def test_ranks_are_those_of_peeling_off_fronts_by_hand(points: list[list[int]]) -> None:
    left, rank, expected = set(range(len(points))), 0, {}
    while left:
        front = {i for i in left if not any(dominates(points[j], points[i]) for j in left)}
        expected |= dict.fromkeys(front, rank)
        left, rank = left - front, rank + 1
    assert ranks(points).tolist() == [expected[i] for i in range(len(points))]


def test_crowding_is_the_published_sum() -> None:
    """Deb et al. 2002: per objective the gap between the two neighbours over the whole range, added up."""
    points = [(0.0, 10.0), (1.0, 6.0), (4.0, 5.0), (10.0, 0.0), (0.0, 0.0)]
    found = crowding(points)
    assert found[[0, 3]].tolist() == [math.inf, math.inf]
    assert found[1] == pytest.approx(4 / 10 + 5 / 10)
    assert found[2] == pytest.approx(9 / 10 + 6 / 10)
    assert ordered(points) == [0, 3, 2, 1, 4]


def test_with_one_objective_the_order_is_that_of_the_gains() -> None:
    gains = [(0.3,), (0.9,), (0.1,), (0.9,), (0.5,)]
    assert [gains[i][0] for i in ordered(gains)] == [0.9, 0.9, 0.5, 0.3, 0.1]


# --- hypervolume ----------------------------------------------------------------------------------------------------


def test_hypervolume_of_one_point_is_its_box_and_of_none_is_nothing() -> None:
    assert hypervolume([(2, 3, 4)], (0, 0, 0)) == 24
    assert hypervolume([(2, 3)], (1, 1)) == 2
    assert hypervolume([], (0, 0)) == 0
    assert hypervolume([(1, -1), (-3, 5)], (0, 0)) == 0


@pytest.mark.parametrize(("count", "dimensions"), [(50, 2), (20, 3), (8, 4)])
def test_hypervolume_of_a_staircase_is_a_closed_form(count: int, dimensions: int) -> None:
    """All points of whole coordinates that add up to `count` hold the cells strictly below: C(count, d)."""
    corners = [p for p in itertools.product(range(1, count), repeat=dimensions - 1) if sum(p) < count]
    points = [(*p, count - sum(p)) for p in corners]
    assert hypervolume(points, (0,) * dimensions) == math.comb(count, dimensions)


@given(clouds)
def test_hypervolume_counts_cells(points: list[list[int]]) -> None:
    """Whole coordinates: the volume is the number of unit cells below some point."""
    width = len(points[0])
    cells = itertools.product(range(6), repeat=width)
    below = sum(any(all(c < x for c, x in zip(cell, p, strict=True)) for p in points) for cell in cells)
    assert hypervolume(points, (0,) * width) == pytest.approx(below)
    assert hypervolume(np.array(points, float) * 2 - 1, (-1,) * width) == pytest.approx(below * 2**width)

"""Batched costs against single ones, budgets, and what is refused."""

import time

import numpy as np
import pytest

from effnet import families
from effnet.cost import Budget, cost, costs
from effnet.spec import multiply
from effnet.value import UsageError


@pytest.mark.parametrize("name", families.names())
def test_batched_costs_are_those_of_each_scaled_network(name: str) -> None:
    network = families.get(name)
    rng = np.random.default_rng(len(name))
    width, depth, size = rng.uniform(0.3, 3, 25), rng.uniform(0.3, 4, 25), rng.integers(64, 600, 25)
    together = costs(network, width=width, depth=depth, resolution=size, batch=3)
    for i in range(25):
        alone = cost(multiply(network, width=width[i], depth=depth[i], resolution=int(size[i])), batch=3)
        assert {key: int(value[i]) for key, value in together.items()} == {key: getattr(alone, key) for key in together}


def test_batched_costs_broadcast_over_a_grid() -> None:
    together = costs(families.get("efficientnet_b0"), width=np.ones((3, 1)), depth=np.ones((1, 4)))
    assert together["macs"].shape == (3, 4)
    assert (together["macs"] == 385814752).all()


def test_a_core_costs_far_more_than_twenty_thousand_candidates_a_second() -> None:
    rng = np.random.default_rng(0)
    count = 20_000
    scaled = {"width": rng.uniform(0.3, 3, count), "depth": rng.uniform(0.3, 4, count)}
    start = time.process_time()
    costs(families.get("efficientnet_b0"), resolution=rng.integers(32, 600, count), **scaled)
    assert time.process_time() - start < 1.0


def test_one_candidate_costs_less_than_a_millisecond() -> None:
    networks = [multiply(families.get("efficientnet_b0"), width=1 + i / 1000) for i in range(200)]
    times = []
    for network in networks:
        start = time.process_time()
        cost(network)
        times.append(time.process_time() - start)
    assert np.median(times) < 1e-3


@pytest.mark.parametrize(
    "bad", [{"width": [1, -1]}, {"depth": np.nan}, {"resolution": [224, 16]}, {"width": np.inf}, {"depth": 0}]
)
def test_factors_that_make_no_sense_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        costs(families.get("efficientnet_b0"), **bad)


def test_macs_grow_with_the_square_of_the_size() -> None:
    small, large = (cost(families.get("mobilenet_v1"), size) for size in (224, 448))
    head = small.units[-1].macs  # the classifier does not grow
    assert large.macs - head == 4 * (small.macs - head)
    assert large.params == small.params


def test_a_budget_knows_its_metrics() -> None:
    spent = cost(families.get("efficientnet_b0"))
    assert Budget(metric="macs", limit=4e8).allows(spent)
    assert not Budget(metric="params", limit=5e6).allows(spent)
    with pytest.raises(UsageError, match="Did you mean 'macs'"):
        Budget(metric="mac", limit=1)

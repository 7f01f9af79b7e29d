"""The largest network within limits, against a search that builds and costs every network one by one."""

import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import pytest

from effnet import families
from effnet.cost import Budget, cost, costs
from effnet.fitting import ALONG, fit
from effnet.scaling import ALONE, PAPER, Coefficients, scale
from effnet.spec import Head, Network, Preprocess, Stage, Stem, multiply
from effnet.value import UsageError

B0 = families.get("efficientnet_b0")


def small(*stages: Stage, **changes: object) -> Network:
    return Network(
        name="small",
        stem=Stem(width=12),
        stages=stages,
        head=Head(width=40),
        resolution=36,
        preprocess=Preprocess(size=36, resize=36),
    ).replace(**changes)


MOBILE = small(
    Stage(op="mbconv", repeats=1, width=8, stride=2, expand=2),
    Stage(op="mbconv", repeats=2, width=24, stride=2, expand=4, kernel=5, se=0.25),
    padding="same",
)
# rounding makes the two widths equal now and then, and a projection comes and goes: costs that do not rise with phi
RESIDUAL = small(
    Stage(op="basic", repeats=1, width=14, stride=1),
    Stage(op="bottleneck", repeats=3, width=18, stride=1, expand=0.25),
    activation="relu",
)
NETWORKS = {"mobile": MOBILE, "residual": RESIDUAL}


def unnamed(network: Network) -> Network:
    """The network without the factors in its name: many factors make the same one."""
    return network.replace(name="", source="")


METRICS = ("macs", "params", "activations", "weight_bytes", "training_bytes")


@pytest.mark.parametrize("along", ["compound", "depth", "width", "resolution"])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_no_larger_network_on_the_ray_is_missed(network: Network, along: str) -> None:
    """2,000 phis, each scaled and costed alone: none above the one found is within the limits."""
    coefficients = ALONE.get(along, Coefficients(1.3, 1.2, 1.1))
    phis = np.linspace(-2.5, 3, 2000)
    scaled = [unnamed(scale(network, phi, coefficients)) for phi in phis]
    every = [cost(one, batch=4) for one in scaled]
    baseline = cost(network, batch=4)
    for metric, share in itertools.product(METRICS, (0.7, 1.0, 1.9)):
        if along == "resolution" and metric in ("params", "weight_bytes"):
            continue  # they do not depend on it
        limit = share * getattr(baseline, metric)
        fitting = [i for i, spent in enumerate(every) if getattr(spent, metric) <= limit]
        if not fitting or fitting[-1] == len(phis) - 1:
            continue
        found = fit(network, {metric: limit}, along, coefficients, batch=4)
        realised = cost(found.network, batch=4)
        assert getattr(realised, metric) <= limit
        assert {name: getattr(realised, name) for name in METRICS} == {name: found.spent[name] for name in METRICS}
        assert found.phi is not None and scale(network, found.phi, coefficients) == found.network
        larger = {scaled[i] for i in range(len(phis)) if phis[i] > found.phi} - {unnamed(found.network)}
        assert all(getattr(cost(one, batch=4), metric) > limit for one in larger)
        assert found.binding == (metric,)


@pytest.mark.parametrize("network", [MOBILE, RESIDUAL.replace(stages=RESIDUAL.stages[:1])], ids=["mobile", "residual"])
@pytest.mark.parametrize("budgets", [{"macs": 1.7}, {"macs": 3.0, "params": 1.2}, {"activations": 0.6, "params": 2.0}])
def test_free_is_the_lexicographic_max_min_over_every_depth_width_and_size(network: Network, budgets: dict) -> None:
    """Every combination of realised depth, width and size is costed; the levels are compared as sorted triples."""
    baseline = cost(network)
    limits = {metric: share * getattr(baseline, metric) for metric, share in budgets.items()}
    rates = dict(zip(("depth", "width", "resolution"), map(math.log, (1.2, 1.1, 1.15)), strict=True))

    def cells(name: str, integers: Callable[[float], object]) -> list[tuple[float, float]]:
        """(a factor, the level up to which it stands) for every distinct outcome of a fine sweep."""
        last: dict[object, float] = {}
        for factor in np.exp(np.linspace(math.log(0.1), math.log(12), 3000)):
            last[integers(factor)] = factor
        return [(factor, math.log(factor) / rates[name]) for factor in last.values()]

    depth = cells("depth", lambda factor: multiply(network, depth=factor).stages)
    width = cells("width", lambda factor: multiply(network, width=factor))
    sizes = [
        (size, math.log((size + 0.5) / network.resolution) / rates["resolution"]) for size in range(network.stride, 300)
    ]
    combinations = list(itertools.product(depth, width, sizes))
    d, w, r = (np.array([one[axis][0] for one in combinations]) for axis in range(3))
    totals = costs(network, depth=d, width=w, resolution=r)
    within = np.all([totals[metric] <= limit for metric, limit in limits.items()], axis=0)
    levels = np.array([sorted(part[1] for part in combinations[i]) for i in np.flatnonzero(within)])
    best = np.flatnonzero(within)[np.lexsort(np.round(levels, 2).T[::-1])[-1]]
    found = fit(network, limits, "free", PAPER)
    wanted = multiply(network, depth=d[best], width=w[best], resolution=int(r[best]))
    assert (found.network.stages, found.network.stem, found.network.head, found.network.resolution) == (
        wanted.stages,
        wanted.stem,
        wanted.head,
        wanted.resolution,
    )


def test_free_is_at_least_the_compound_network_in_every_dimension_and_uses_what_it_leaves() -> None:
    limits = {"macs": 1.5e9, "params": 8e6}
    ray, free = fit(B0, limits), fit(B0, limits, "free")
    assert all(a.repeats <= b.repeats for a, b in zip(ray.network.stages, free.network.stages, strict=True))
    assert all(a.width <= b.width for a, b in zip(ray.network.stages, free.network.stages, strict=True))
    assert ray.binding == ("params",) and set(free.binding) == {"macs", "params"}
    assert ray.spent["macs"] < 0.9 * 1.5e9 < free.spent["macs"] <= 1.5e9  # resolution rises where parameters are spent


def test_prefer_chooses_among_all_networks_that_cannot_have_one_more_pixel() -> None:
    limits = {"macs": 1.6 * cost(MOBILE).macs, "training_bytes": 1.3 * cost(MOBILE, batch=8).training_bytes}
    found = fit(MOBILE, limits, "free", prefer=lambda rows: rows["params"] * (rows["resolution"] >= 30), batch=8)
    rng = np.random.default_rng(0)
    d, w, r = rng.uniform(0.25, 4, 40_000), rng.uniform(0.25, 4, 40_000), rng.integers(30, 145, 40_000)
    totals = costs(MOBILE, depth=d, width=w, resolution=r, batch=8)
    within = (totals["macs"] <= limits["macs"]) & (totals["training_bytes"] <= limits["training_bytes"])
    assert found.resolution >= 30
    assert found.spent["params"] >= totals["params"][within].max()
    with pytest.raises(UsageError, match="set along='free'"):
        fit(MOBILE, limits, prefer=lambda rows: rows["params"])
    with pytest.raises(UsageError, match="latency_ms is measured one network at a time"):
        meters = {"latency_ms": bumpy}
        fit(MOBILE, limits | {"latency_ms": 9.0}, "free", prefer=lambda rows: rows["params"], meters=meters)


@pytest.mark.parametrize("along", ALONG)
def test_a_fit_to_a_mac_budget_takes_less_than_a_second(along: str) -> None:
    start = time.process_time()
    fit(B0, {"macs": 1.5e9}, along)
    assert time.process_time() - start < 1


# --- meters ---------------------------------------------------------------------------------------------------------


def bumpy(network: Network) -> float:
    """Milliseconds that rise with the size but for +-4 %: like a measured latency."""
    return network.resolution * (1 + 0.04 * math.sin(network.resolution))


def test_a_meter_that_does_not_rise_steadily_is_held_and_nothing_larger_is_missed() -> None:
    for limit in np.linspace(100, 300, 21):
        found = fit(B0, {"ms": limit}, "resolution", meters={"ms": bumpy})
        best = max(size for size in range(32, 2000) if bumpy(B0.replace(resolution=size)) <= limit)
        assert found.resolution == best
        assert found.spent["ms"] == bumpy(found.network) <= limit
        assert found.binding == ("ms",)


def test_without_any_assumption_every_candidate_is_measured_from_the_largest_down() -> None:
    def wild(network: Network) -> float:
        return 1.0 if network.resolution in (50, 290) else 100.0

    found = fit(B0, {"ms": 2, "macs": 8e8}, "resolution", meters={"ms": wild}, wobble=math.inf)
    assert found.resolution == 290
    with pytest.raises(UsageError, match="nothing stops"):
        fit(B0, {"ms": 2}, "resolution", meters={"ms": wild}, wobble=math.inf)


def test_a_meter_is_a_hard_limit_beside_the_others() -> None:
    calls = []

    def meter(network: Network) -> float:
        calls.append(network)
        return cost(network).activations / 1e6

    found = fit(B0, {"ms": 12, "macs": 3e9}, "free", meters={"ms": meter})
    assert found.spent["ms"] <= 12 and found.spent["macs"] <= 3e9
    exact = fit(B0, {"activations": 12e6, "macs": 3e9}, "free")
    assert (found.network, len(calls) < 300) == (exact.network, True)


def test_a_meter_that_gives_no_number_is_named() -> None:
    with pytest.raises(UsageError, match="the meter ms gives nan for efficientnet_b0"):
        fit(B0, {"ms": 12}, meters={"ms": lambda network: math.nan})


# --- what is said and refused ---------------------------------------------------------------------------------------


def test_every_limit_is_reported_with_its_distance() -> None:
    found = fit(B0, [Budget(metric="macs", limit=1.5e9), Budget(metric="params", limit=50e6)])
    assert [(use.metric, use.binding) for use in found.uses] == [("macs", True), ("params", False)]
    assert found.uses[0].left_percent == pytest.approx(100 * (1 - found.spent["macs"] / 1.5e9))
    assert 0 <= found.uses[0].left_percent < 5 < found.uses[1].left_percent


def test_a_largest_resolution_can_be_what_holds() -> None:
    found = fit(B0, {"params": 6e6}, "resolution", max_resolution=320)
    assert (found.resolution, found.held, found.binding) == (320, ("max_resolution",), ())
    free = fit(B0, {"params": 8e6, "macs": 3e9}, "free", max_resolution=300)
    assert free.resolution == 300 and "max_resolution" in free.held


def test_nothing_fits_says_what_the_smallest_network_costs() -> None:
    with pytest.raises(UsageError, match=r"nothing fits: .*32 px\) has macs 839,424 \(limit 1,000\)"):
        fit(B0, {"macs": 1000})
    with pytest.raises(UsageError, match=r"depth x0.25, width x1, 224 px"):
        fit(B0, {"macs": 1e8}, "depth")


@pytest.mark.parametrize(
    ("budgets", "along", "message"),
    [
        ({}, "compound", "at least one limit"),
        ({"mac": 1e9}, "compound", "Did you mean 'macs'"),
        ({"macs": math.nan}, "compound", "budget on macs is nan"),
        ({"macs": math.inf}, "compound", "budget on macs is inf"),
        ({"macs": -1}, "compound", "budget on macs is -1"),
        ({"macs": 0}, "free", "budget on macs is 0"),
        ({"latency_ms": 20}, "compound", "none given"),
        ([Budget(metric="macs", limit=1e9), Budget(metric="macs", limit=2e9)], "compound", "two limits on macs"),
        (Budget(metric="macs", limit=1e9, size=224), "compound", "without a size"),
        ({"macs": 1e9}, "dept", "Did you mean 'depth'"),
        ({"params": 6e6}, "resolution", "nothing stops efficientnet_b0 from growing in resolution"),
        ({"params": 6e6}, "free", "add one on macs|Add one on macs"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(budgets: object, along: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(B0, budgets, along)  # ty: ignore[invalid-argument-type]

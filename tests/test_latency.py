"""Predictions against a made-up machine whose latency is a known function of the operators."""

import itertools
import time

import numpy as np
import pytest

from effnet import families, latency
from effnet.cost import cost
from effnet.latency import AXES, FACTORS, MAPS, Error, Grid, LatencyTable, error_of, fitted, pieces, random_networks
from effnet.spec import Head, Network, Preprocess, Stage, Stem, multiply, resolve
from effnet.value import UsageError

POWERS = tuple(float(4**i) for i in range(10))
COUNTS = tuple(float(2**i) for i in range(13))
KINDS = ("pointwise/1", "pointwise/2", "dense/1", "dense/2", "stem/1", "stem/2", "depthwise/1", "depthwise/2", "gate",
         "linear", *MAPS)  # fmt: skip
NODES = {"pixels": POWERS, "kernel": (3.0, 5.0, 7.0), "images": (1.0, 8.0)}


def macs_ms(kind: str, point: tuple[float, ...]) -> float:
    """A machine that takes 1 ns per multiply-add (and 2 ns per depthwise one), 1 ns per element: products of powers."""
    family = kind.partition("/")[0]
    kernel = point[0] ** 2 if AXES[family][0] == "kernel" else 1.0
    rest = float(np.prod(point[1:] if AXES[family][0] == "kernel" else point))
    return 1e-6 * kernel * rest * (2 if family == "depthwise" else 1)


def rough_ms(kind: str, point: tuple[float, ...]) -> float:
    """The same with 10 us per call and channels in blocks of 16: no product of powers, as real machines are none."""
    family = kind.partition("/")[0]
    kernel = AXES[family][0] == "kernel"
    padded = tuple(-(-x // 16) * 16 if i >= kernel and i < len(point) - 1 else x for i, x in enumerate(point))
    return 0.01 + macs_ms(kind, padded)


def made_table(function=macs_ms, **changes) -> LatencyTable:
    grids = []
    for kind in KINDS:
        axes = AXES[kind.partition("/")[0]]
        nodes = tuple(NODES.get(axis, COUNTS) for axis in axes)
        grids.append(
            Grid(kind=kind, axes=axes, nodes=nodes, ms=tuple(function(kind, p) for p in itertools.product(*nodes)))
        )
    fields = {"device": "paper", "backend": "eager", "precision": "float32", "threads": 1, "torch": "2"}
    return LatencyTable(grids=tuple(grids), **(fields | changes))


TABLE, ROUGH = made_table(), made_table(rough_ms)
ONE = Network(
    name="one",
    stem=Stem(width=8),
    stages=(Stage(op="mbconv", repeats=1, width=8, stride=1, expand=2, se=0.25),),
    head=Head(width=0, classes=10),
    resolution=8,
    preprocess=Preprocess(size=8, resize=8),
    padding="same",
)


def test_a_block_is_taken_apart_into_what_runs() -> None:
    stem, block, classifier = resolve(ONE)
    assert list(pieces(stem, ONE)) == [
        ("pad", (3, 64), True),
        ("stem/2", (3, 3, 8, 16), 1),
        ("norm", (8, 16), 1),
        ("silu", (8, 16), 1),
    ]
    assert list(pieces(block, ONE, batch=2)) == [
        ("pointwise/1", (8, 16, 32), 1), ("norm", (16, 32), 1), ("silu", (16, 32), 1),
        ("depthwise/1", (3, 16, 32), 1), ("norm", (16, 32), 1), ("silu", (16, 32), 1),
        ("gate", (16, 2, 32), 1),
        ("pointwise/1", (16, 8, 32), 1), ("norm", (8, 32), 1),
        ("add", (8, 32), 1),
    ]  # fmt: skip
    assert list(pieces(classifier, ONE)) == [("linear", (8, 10, 1), 1)]


def test_a_sum_of_products_of_powers_is_predicted_exactly() -> None:
    """By hand: see the operators of the test above, at 1 ns a piece; depthwise costs double."""
    stem = 3 * 64 + 9 * 3 * 8 * 16 + 2 * 8 * 16
    block = (8 * 16 + 2 * 16) * 16 + (2 * 9 * 16 + 2 * 16) * 16 + 16 * 2 * 16 + (16 * 8 + 8) * 16 + 8 * 16
    head = 8 * 16 + 8 * 10
    assert TABLE.predict(ONE) == pytest.approx(1e-6 * (stem + block + head), rel=1e-9)


@pytest.mark.parametrize("name", ["mobilenet_v1", "resnet18", "resnet50", "efficientnetv2_b0", "tf_efficientnet_b0"])
def test_where_time_is_proportional_to_macs_so_is_the_prediction(name: str) -> None:
    """Only convolutions cost on this machine, 1 ns per multiply-add; squeeze-excite is no convolution of the map."""
    only = tuple(
        grid.replace(ms=tuple(1e-30 for _ in grid.ms)) if grid.kind in (*MAPS, "gate") else grid for grid in TABLE.grids
    )
    network, machine = families.get(name), TABLE.replace(grids=only)
    macs = cost(network).macs
    for conv in (conv for unit in resolve(network) for conv in unit.convs):
        weights = conv.kernel**2 * conv.in_channels // conv.groups * conv.out_channels * conv.out_size**2
        macs += (conv.name == "depthwise") * weights - conv.name.startswith("se.") * weights
    assert machine.predict(network) == pytest.approx(1e-6 * macs, rel=1e-6)


def test_between_the_nodes_of_a_rough_machine_the_error_is_small() -> None:
    """Blocks of 16 and call overhead are smoothed by interpolation; networks of all families stay within 15 %."""
    for network in random_networks(20, seed=5):
        true = 0.0
        units = resolve(network)
        for unit in units:
            true += sum(times * rough_ms(kind, point) for kind, point, times in pieces(unit, network))
        true += rough_ms("mean", (units[-2].out_channels, units[-2].out_size ** 2))
        assert ROUGH.predict(network) == pytest.approx(true, rel=0.15), network.name


def test_nodes_are_exact_and_the_ends_go_on() -> None:
    rng = np.random.default_rng(0)
    times = rng.uniform(1, 2, (3, 4))
    grid = Grid(kind="norm", axes=("channels", "pixels"), nodes=((8, 16, 64), (1, 4, 9, 16)), ms=tuple(times.ravel()))
    channels, pixels = np.meshgrid((8, 16, 64), (1, 4, 9, 16), indexing="ij")
    np.testing.assert_allclose(grid.at(channels, pixels), times, rtol=1e-12)
    middle = grid.at(np.sqrt(8 * 16), 4)
    assert middle == pytest.approx(np.sqrt(times[0, 1] * times[1, 1]))
    assert grid.at(1, 1) == pytest.approx(times[0, 0])  # below the first node time stays
    assert grid.at(64, 64) == pytest.approx(times[2, 3] * (times[2, 3] / times[2, 2]) ** (np.log(4) / np.log(16 / 9)))


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnetv2_b1", "resnet34", "resnet50", "mobilenet_v1"])
def test_many_candidates_are_predicted_as_each_of_them(name: str) -> None:
    rng = np.random.default_rng(1)
    network, table = (
        families.get(name),
        ROUGH.replace(factors=dict(zip(FACTORS, (0.3, 0.1, 1.2, 0.9, 1.1, 1.3, 0.8), strict=True))),
    )
    width, depth, size = rng.uniform(0.4, 2, 12), rng.uniform(0.4, 2, 12), rng.integers(64, 320, 12)
    together = table.predictions(network, width=width, depth=depth, resolution=size, batch=2)
    alone = [
        table.predict(multiply(network, width=w, depth=d, resolution=int(s)), batch=2)
        for w, d, s in zip(width, depth, size, strict=True)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-9)
    assert table.predictions(network, width=np.ones((2, 1)), depth=np.ones((1, 3))).shape == (2, 3)


def test_thousands_of_candidates_are_predicted_in_a_second() -> None:
    rng = np.random.default_rng(0)
    start = time.process_time()
    TABLE.predictions(families.get("efficientnet_b0"), width=rng.uniform(0.3, 3, 2000), depth=rng.uniform(0.3, 4, 2000))
    assert time.process_time() - start < 1.0


def test_a_batch_is_so_many_more_pixels() -> None:
    network = families.get("efficientnet_lite0")
    assert TABLE.predict(network, batch=4) == pytest.approx(4 * TABLE.predict(network), rel=1e-6)


def test_factors_are_found_again() -> None:
    """Networks measured on a machine with known factors; the pull towards 1 may move them a little."""
    true = dict(zip(FACTORS, (2.0, 0.05, 1.3, 0.8, 1.1, 1.4, 0.9), strict=True))
    rows = [ROUGH.features(network) for network in random_networks(30, seed=3)]
    measured = [sum(true[name] * row[name] for name in FACTORS) for row in rows]
    table = ROUGH.replace(factors=fitted(rows, measured, weight=1e-6))
    assert table.factors == pytest.approx(true, rel=0.05, abs=0.02)
    pulled = ROUGH.replace(factors=fitted(rows, measured))
    predicted = [pulled._sum(row) for row in rows]
    assert error_of(predicted, measured).median < 0.03


def test_factors_are_never_negative() -> None:
    rows = [ROUGH.features(network) for network in random_networks(12, seed=4)]
    measured = [row["dense"] - 0.2 * row["depthwise"] for row in rows]
    assert min(fitted(rows, measured, weight=1e-6).values()) >= 0


def test_errors_are_those_of_the_ratio() -> None:
    found = error_of([1.0, 1.2, 0.5, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0], others=0.05)
    assert (found.median, found.worst, found.networks, found.others) == (0.2, 1.0, 5, 0.05)
    assert "median error 20.0%" in str(found)


def test_a_table_survives_json() -> None:
    error = Error(median=0.05, p90=0.1, worst=0.2, networks=30)
    table = made_table(error=error, environment={"threads": 1, "flags": ["avx2"]})
    again = LatencyTable.from_json(table.to_json())
    assert again == table
    assert again.predict(ONE) == table.predict(ONE)


def test_random_networks_can_be_drawn_again_and_show_every_family() -> None:
    networks = random_networks(30, seed=2)
    assert networks == random_networks(30, seed=2) != random_networks(30, seed=1)
    assert {network.name.split()[0] for network in networks} == set(latency.JUDGES)
    assert all(1e7 <= cost(network).macs <= 2e9 for network in networks)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"quantity": "foward"}, "Did you mean 'forward'"), ({"factors": {"depthwize": 1.0}}, "Did you mean 'depthwise'")],
)
def test_a_wrong_table_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made_table(**change)


def test_a_wrong_grid_or_question_is_refused() -> None:
    with pytest.raises(UsageError, match="3 times"):
        Grid(kind="add", axes=("pixels",), nodes=((1, 2),), ms=(1.0, 2.0, 3.0))
    with pytest.raises(UsageError, match="not above 0"):
        Grid(kind="add", axes=("pixels",), nodes=((1, 2),), ms=(1.0, 0.0))
    with pytest.raises(UsageError, match="batch"):
        TABLE.predict(ONE, batch=0)
    with pytest.raises(UsageError, match="stride"):
        TABLE.predict(ONE, size=1)
    with pytest.raises(UsageError, match="Did you mean 'depthwise/1'"):
        TABLE.piece("depthwise1", (3, 8, 4))

"""A user's own modules: counted on the meta device as the closed form counts, and what is refused."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from effnet import families
from effnet.coefficients import search_coefficients
from effnet.cost import cost, costs
from effnet.factory import Factory, counts, load
from effnet.fitting import fit
from effnet.network import build
from effnet.scaling import scale
from effnet.spec import Head, Network, Preprocess, Stage, Stem, multiply
from effnet.value import UsageError

EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS = Network(
    name="rows",
    stem=Stem(width=8),
    stages=(
        Stage(op="mbconv", repeats=1, width=16, stride=2, expand=2, se=0.25),
        Stage(op="basic", repeats=2, width=32, stride=2),
    ),
    head=Head(width=64, classes=10),
    resolution=48,
    preprocess=Preprocess(size=48, resize=48),
    activation="relu",
)


def rows(depth: float, width: float, resolution: int = 48) -> nn.Module:
    return build(multiply(ROWS, depth=depth, width=width, resolution=resolution))


def plain(depth: float = 1.0, width: float = 1.0, resolution: int = 32) -> nn.Module:
    """Worked out by hand below."""
    channels = round(8 * width)
    layers = [nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    for _ in range(round(2 * depth)):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def test_the_counts_are_those_of_the_arithmetic() -> None:
    with torch.device("meta"):
        found = counts(plain(), 3, 32)
    map_ = 32 * 32
    assert found["macs"] == 27 * 8 * map_ + 2 * (9 * 8 * 8 * map_) + 8 * 10
    assert found["activations"] == 3 * 8 * map_ + 10
    assert found["params"] == 27 * 8 + 2 * 8 + 2 * (9 * 64 + 8) + 8 * 10 + 10
    assert found["norm_statistics"] == 16
    assert found["weight_bytes"] == 4 * (found["params"] + 16)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50", "tf_efficientnetv2_b0"])
def test_a_built_network_counts_as_its_rows_do(name: str) -> None:
    network = families.get(name).replace(dropout=0.0, drop_path=0.0)  # their masks are kept too
    made = multiply(network, depth=0.6, width=0.5, resolution=72)
    with torch.device("meta"):
        found = counts(build(made), 3, 72, training=True)
    told = cost(made)
    assert found == {key: getattr(told, key) for key in found}


def test_a_factory_and_its_rows_fit_alike() -> None:
    """The function's own steps are not known, so its grid of phi is coarse: the same network or the one before it."""
    mine = Factory(function=rows, resolution=48, training_memory=True)
    limits = {"macs": 3.0 * cost(ROWS).macs, "training_bytes": 40e6}
    ours, theirs = fit(mine, limits, batch=16), fit(ROWS, limits, batch=16)
    assert ours.phi is not None and theirs.phi is not None
    assert 0 <= theirs.phi - ours.phi < 0.1
    built = multiply(ROWS, depth=ours.depth, width=ours.width, resolution=ours.resolution)
    assert ours.spent["macs"] == cost(built).macs <= limits["macs"]
    assert sum(p.numel() for p in ours.network.build().parameters()) == cost(built).params
    assert ours.binding == theirs.binding


def test_scale_and_the_search_take_a_factory_too() -> None:
    mine = Factory(function=plain)
    assert mine.resolution == 32  # the default of the parameter
    made = scale(mine, 2)
    assert (made.resolution, made.depth) == (42, pytest.approx(1.44))
    seen = []

    def evaluate(candidate, seed: int, budget: int) -> float:
        seen.append(candidate)
        return candidate.depth + 0.01 * seed

    options = {"alpha_step": 0.5, "beta_step": 0.25, "tolerance": 0.2}
    found = search_coefficients(mine, evaluate, budget=1, **options)
    best = found.winner.candidate.coefficients
    assert best.alpha == max(cell.coefficients.alpha for cell in found.cells if cell.key)
    base = mine.spent(1.0, 1.0, 32)["macs"]
    for candidate in seen:
        assert abs(mine.spent(candidate.depth, candidate.width, candidate.resolution)["macs"] / base / 2 - 1) <= 0.2
    deep = [mine.key(1.0 + i / 10, 1.0, 32) for i in range(-2, 3)]  # round(2 * depth) is 2 in all of them
    assert len(set(deep)) == 1 and mine.key(1.5, 1.0, 32) != deep[0]


def test_grid_costs_of_a_factory_are_those_of_its_rows() -> None:
    mine = Factory(function=rows, resolution=48)
    found = mine.costs([1.0, 2.0], 1.5, [48, 64], 1)
    want = costs(ROWS, depth=[1.0, 2.0], width=1.5, resolution=[48, 64])
    assert all((found[name] == want[name]).all() for name in found)


def _fails(depth: float, width: float, resolution: int) -> nn.Module:
    raise RuntimeError("no such layer")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda depth, width, resolution: plain(), "ignores depth"),
        (lambda depth, width, resolution: plain(depth), "ignores width"),
        (
            lambda depth, width, resolution: nn.Sequential(nn.AdaptiveAvgPool2d(8), plain(depth, width)),
            "ignores resolution: twice as much of it costs the same",
        ),
        (lambda depth, width, resolution: 5, r"gave int 5; it must give an nn.Module"),
        (lambda depth, width, resolution: nn.Conv2d, "gave type"),
        (_fails, "failed: RuntimeError: no such layer"),
        (lambda depth: plain(depth), "failed: TypeError"),
        (lambda depth, width, resolution: nn.Linear(8, 8), r"cannot take a \(1, 3, 224, 224\) image"),
        (7, "a factory is a function"),
    ],
)
def test_a_factory_that_is_none_is_one_clear_error(function, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Factory(function=function)


def test_a_limit_that_is_not_counted_says_how_to_count_it() -> None:
    with pytest.raises(UsageError, match="training_memory=True"):
        fit(Factory(function=plain), {"training_bytes": 1e9})


def test_a_factory_is_named_by_its_file(tmp_path: Path) -> None:
    found = load(f"{EXAMPLES / 'own_factory.py'}:convnet")
    assert (found.name, found.resolution) == ("convnet", 64)
    with pytest.raises(UsageError, match="Did you mean 'convnet'"):
        load(f"{EXAMPLES / 'own_factory.py'}:convnets")
    with pytest.raises(UsageError, match="there is no file"):
        load(f"{tmp_path}/none.py:f")
    (tmp_path / "broken.py").write_text("import nothing_of_the_kind\n")
    with pytest.raises(UsageError, match="cannot be imported: ModuleNotFoundError"):
        load(f"{tmp_path}/broken.py:f")


def test_the_examples_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runpy.run_path(str(EXAMPLES / "own_factory.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "macs" in printed and "built" in printed
    runpy.run_path(str(EXAMPLES / "published_against_formula.py"), run_name="__main__")
    table = capsys.readouterr().out
    told = (EXAMPLES.parent / "docs" / "scaling.md").read_text()
    assert table.strip() in told, "the table in docs/scaling.md is not what the command prints"
    script = str(EXAMPLES / "own_rows.py")
    printed = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert "own-d" in printed
    assert Network.from_json((tmp_path / "own.json").read_text()).name == "own"

"""`effnet search` as it is typed, the rank correlation of its proxy, and what measures a training step."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from effnet.cost import cost
from effnet.proxy import PROXY
from effnet.search.figure import figure
from effnet.search.meters import step_ms
from effnet.search.objectives import Objective
from effnet.search.ranking import correlation, kendall, longer, spread
from effnet.search.records import opened
from effnet.search.space import Space, key, vary
from effnet.search.study import Failed, search
from effnet.search.task import Task
from effnet.spec import Network
from effnet.value import UsageError
from tests.conftest import write_images
from tests.test_cli import TINY, refused, run
from tests.test_search_study import BASE, TASK, tabulated

QUICK = ("--set", "batch=8", "--set", "crop=resize", "--epochs", 1, "--workers", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), {"cat": 14, "dog": 14})


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "tiny.json"
    path.write_text(TINY.to_json())
    return path


# --- the verb -------------------------------------------------------------------------------------------------------


def test_a_search_leaves_a_network_that_train_and_scale_take(
    tmp_path: Path, data: Path, net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("search", "--data", data, "--baseline", net, "--space", "v2", "--strategy", "random", *QUICK)
    words = (*words, "--objective", "acc * (macs/100k)^-0.07", "--limit", "params=1.2k", "--trials", 3)
    first = run(*words, "--json")
    document = first.document
    assert re.search(r"1/3  v2-\w+  \d+.\d\d %, .* MACs", first.err)
    assert len(document["trials"]) == 3 and {trial["state"] for trial in document["trials"]} == {"finished"}
    made = Network.from_json(Path(document["saved"]).read_text())
    assert made == Network.from_dict(document["definition"])
    spent = cost(made)
    assert spent.params <= 1200 and made.head.classes == 2
    best = document["trials"][document["winner"]]["results"][-1]
    assert (best["macs"], best["params"]) == (spent.macs, spent.params)
    assert Path(document["figure"]).read_bytes().startswith(b"\x89PNG")
    assert Path(document["study"]) == Path("runs") / f"search-v2-{data.name}.db"
    again = run(*words)  # nothing is trained again, and people get tables
    assert again.code == 0 and "going on with" in again.err and "1/3" not in again.err
    assert made.name in again.out and "winner" in again.out and "3 finished, 0 stopped, 0 failed" in again.out
    more = run(*words[:-1], 4, "--json").document
    assert more["trials"][:3] == document["trials"] and len(more["trials"]) == 4
    saved = document["saved"]
    assert run("scale", saved, "--phi", 1, "--json").document["before"]["macs"] == spent.macs
    trained = run("train", data, "--model", saved, "--set", "epochs=1", "--set", "batch=8", "--out", "run", "--json")
    assert Path(trained.document["checkpoint"]).is_file()


def test_several_objectives_a_space_of_ones_own_and_halving(tmp_path: Path, data: Path, net: Path) -> None:
    words = (
        "search",
        "--data",
        data,
        "--baseline",
        net,
        "--vary",
        "stages.*.kernel=3,5",
        "--vary",
        "stages.0.repeats=1,2",
    )
    words = (*words, "--vary", "head.width=x0.5,x1", *QUICK, "--epochs", "1,2", "--eta", 2, "--strategy", "nsga2")
    words = (*words, "--objective", "acc", "--objective", "macs", "--trials", 20, "--px", 16)
    out = tmp_path / "winner.json"
    document = run(*words, "--study", tmp_path / "study.db", "--save", out, "--json").document
    assert len(document["trials"]) == 8  # the whole space
    assert {trial["state"] for trial in document["trials"]} == {"finished", "stopped"}
    assert Network.from_json(out.read_text()).resolution == 16
    assert [Network.from_dict(each).name for each in document["front_definitions"]]
    assert document["task"]["rungs"] == [1, 2]


def test_spaces_from_files(tmp_path: Path, data: Path, net: Path) -> None:
    options = tmp_path / "own.json"
    options.write_text(json.dumps({"stages.*.kernel": [3, 5], "stages.0.expand": [1, 2]}))
    whole = tmp_path / "space.json"
    whole.write_text(vary(TINY, {"stages.0.kernel": (3, 5)}).to_json())
    for file, count, extra in ((options, 4, ("--baseline", net)), (whole, 2, ())):
        study = tmp_path / f"{file.stem}.db"
        words = ("search", "--data", data, "--space", file, *extra, *QUICK, "--trials", 9, "--study", study)
        document = run(*words, "--save", tmp_path / "net.json", "--json").document
        assert len(document["trials"]) == count
        assert Space.from_dict(document["task"]["space"]).count == count


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--space", "v3"), "space 'v3' is not one of mnasnet, v1, v2."),
        ((), "say what may vary"),
        (("--space", "v2", "--vary", "stages.*.kernel=3,5"), "one of them"),
        (("--vary", "stages.*.kernel"), "is not PATH=V,V"),
        (("--vary", "stages.*.kernle=3,5"), "Did you mean 'kernel'"),
        (("--space", "gone.json"), "gone.json is no file"),
        (("--space", "v2", "--objective", "acc * mcas"), "Did you mean 'macs'"),
        (("--space", "v2", "--limit", "acc=0.9"), "limit on 'acc' is not one of macs, params"),
        (("--space", "v2", "--limit", "params"), "--limit 'params' is not METRIC=LIMIT"),
        (("--space", "v2", "--limit", "params=10"), "no candidate of v2 is within the limits; the nearest has params"),
        (("--space", "v2", "--strategy", "genetic"), "strategy 'genetic' is not one of"),
        (("--space", "v2", "--epochs", "3,1"), "rungs are (3, 1)"),
        (("--space", "v2", "--epochs", "1.5"), "--epochs '1.5' is neither a whole number nor"),
        (("--space", "v2", "--save", "net.txt"), "does not end in .json"),
        (("--space", "v2", "--px", "1"), "no candidate of v2 is a network: input size 1 is below the stride"),
        (("--space", "v2", "--study", "postgresql://127.0.0.1:1/none"), "cannot be opened as a study"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_study(
    tmp_path: Path, data: Path, net: Path, words: tuple, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused("search", "--data", data, "--baseline", net, *QUICK, *words).splitlines()[-1]
    assert not list(tmp_path.glob("**/*.json"))


# --- rank correlation -----------------------------------------------------------------------------------------------


def test_taus_are_scipys() -> None:
    rng = np.random.default_rng(0)
    for levels in (3, 8, 1000):
        a, b = rng.integers(levels, size=(2, 25))
        assert kendall(a, b) == pytest.approx(scipy.stats.kendalltau(a, b).statistic)
    assert kendall([1, 2, 3], [10, 20, 30]) == 1 and kendall([1, 2, 3], [3, 2, 1]) == -1


def test_the_interval_covers_the_true_tau_about_as_often_as_it_says() -> None:
    """Normal pairs of correlation r have tau = 2/pi arcsin(r) (Greiner's relation)."""
    rng, truth, inside = np.random.default_rng(0), 2 / np.pi * np.arcsin(0.8), 0
    for seed in range(60):
        a = rng.normal(size=40)
        found = correlation(a, 0.8 * a + 0.6 * rng.normal(size=40), resamples=200, seed=seed)
        assert found.low <= found.tau <= found.high
        inside += found.low <= truth <= found.high
    assert inside >= 50  # 57 expected; a bootstrap of 40 pairs is a little short


def test_candidates_are_trained_longer_once_and_kept(tmp_path: Path) -> None:
    file, calls = tmp_path / "study.db", []
    search(TASK.replace(strategy="random"), tabulated, file, trials=24)
    task = TASK.replace(strategy="random")

    def evaluate(network: Network, seed: int, epochs: int) -> float:
        calls.append((key(network), epochs))
        if len(calls) == 10:
            raise KeyboardInterrupt
        return tabulated(network, seed, epochs)

    with pytest.raises(KeyboardInterrupt):
        longer(task, evaluate, file, 9)
    found = longer(task, evaluate, file, 9)
    assert len(calls) == 21 and calls[9] == calls[10] and {epochs for _, epochs in calls} == {9}
    assert (found.tau, found.count, found.epochs) == (1.0, 20, (1, 9))  # the table keeps its order
    assert "Kendall tau 1.00 (95 % interval 1.00 to 1.00)" in str(found)
    chosen = spread(opened(file, task).trials(), 20)
    ranked = [trial.results[0]["acc"] for trial in chosen]
    networks = [task.space.network(trial.code) for trial in chosen if trial.code]
    assert ranked == sorted(ranked)
    with pytest.raises(UsageError, match="rank correlation is 19; it must be at least 20"):
        longer(task, evaluate, file, 9, count=19)
    with pytest.raises(UsageError, match="epochs of the longer training is 1"):
        longer(task, evaluate, file, 1)
    with pytest.raises(UsageError, match="only 24 trials"):
        longer(task, evaluate, file, 9, count=30)
    several = longer(task, tabulated, file, 10, at_once=3)
    assert several.pairs == tuple(zip(ranked, (tabulated(n, 0, 10) for n in networks), strict=True))

    def fails(network: Network, seed: int, epochs: int) -> float:
        raise Failed("out of memory: 3 GiB")

    for at_once in (1, 3):
        with pytest.raises(UsageError, match=r"trial \d+ failed in 11 epochs: out of memory"):
            longer(task, fails, file, 11, at_once=at_once)


def test_equal_values_have_no_order() -> None:
    with pytest.raises(UsageError, match="no order to compare"):
        correlation([1, 1, 1], [1, 2, 3])


# --- the rest -------------------------------------------------------------------------------------------------------


def test_a_larger_network_takes_a_longer_training_step() -> None:
    measure = step_ms(PROXY.replace(batch=16), steps=3)
    larger = BASE.replace(resolution=64, stages=tuple(s.replace(width=64, repeats=3) for s in BASE.stages))
    assert 0 < measure(BASE) < measure(larger)


def test_the_figure_is_drawn_whatever_was_found(tmp_path: Path) -> None:
    task = Task(
        space=TASK.space, objectives=(Objective("acc"), Objective("macs")), limits={"macs": 1e6}, strategy="nsga2"
    )
    found = search(task, lambda *_: 1 / 0, tmp_path / "failed.db", trials=2)
    figure(found, tmp_path / "failed.svg")
    figure(search(task, tabulated, tmp_path / "good.db", trials=5), tmp_path / "good.svg")
    for name in ("failed", "good"):
        assert (tmp_path / f"{name}.svg").read_text().lstrip().startswith("<?xml")

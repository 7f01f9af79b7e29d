"""The search for alpha, beta and gamma: realised costs, halving, intervals, and a study that survives being killed."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from effnet import families
from effnet.coefficients import StudyWarning, candidates, grid, halving, search_coefficients, t_interval, t_quantile
from effnet.cost import cost
from effnet.scaling import scale
from effnet.spec import Head, Network, Preprocess, Stage, Stem
from effnet.value import UsageError

B0 = families.get("efficientnet_b0")
SMALL = Network(
    name="small",
    stem=Stem(width=8),
    stages=(
        Stage(op="mbconv", repeats=1, width=16, stride=2, expand=2),
        Stage(op="mbconv", repeats=2, width=32, stride=2, expand=2),
    ),
    head=Head(width=64, classes=10),
    resolution=32,
    preprocess=Preprocess(size=32, resize=32),
)


def unnamed(network: Network) -> Network:
    return network.replace(name="", source="")


# --- the grid -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1.5, 2.0, 4.0])
def test_realised_multiply_adds_decide_who_is_a_candidate(target: float) -> None:
    cells = grid(SMALL, target, tolerance=0.12)
    assert 3 < sum(cell.key is not None for cell in cells) < len(cells)
    for cell in cells:
        c = cell.coefficients
        assert min(c.alpha, c.beta, c.gamma) >= 1
        assert abs(c.growth / target - 1) <= 0.25 + 0.03  # whole pixels of 32 round gamma
        made = scale(SMALL, 1, c)
        ratio = cost(made).macs / cost(SMALL).macs
        assert (made.resolution, ratio) == (cell.resolution, pytest.approx(cell.ratio))
        assert (cell.key is not None) == (abs(ratio / target - 1) <= 0.12)


def test_no_other_resolution_comes_nearer() -> None:
    """Every size that the formula leaves is costed alone."""
    for cell in grid(SMALL, 2.0):
        a, b = cell.coefficients.alpha, cell.coefficients.beta
        near = [size for size in range(32, 80) if 1.5 <= a * b**2 * (size / 32) ** 2 <= 2.5 and a * b * size > 32]
        ratios = [cost(scale(SMALL, depth=a, width=b, resolution=size)).macs / cost(SMALL).macs for size in near]
        if near:
            assert abs(math.log(cell.ratio / 2)) <= min(abs(math.log(ratio / 2)) for ratio in ratios) + 1e-9


def test_points_that_round_to_the_same_network_are_one_candidate() -> None:
    cells = grid(SMALL, 2.0, tolerance=0.3)
    found = candidates(cells, 2.0)
    made = [unnamed(scale(SMALL, 1, candidate.coefficients)) for candidate in found]
    assert len(set(made)) == len(made) < sum(candidate.points for candidate in found)
    assert sum(candidate.points for candidate in found) == sum(cell.key is not None for cell in cells)


def test_the_papers_coefficients_are_near_a_point_of_the_default_grid_of_b0() -> None:
    near = [cell for cell in grid(B0) if abs(cell.coefficients.alpha - 1.2) < 1e-9 and cell.coefficients.beta == 1.1]
    assert len(near) == 1


def test_a_grid_without_candidates_says_how_near_it_came() -> None:
    with pytest.raises(UsageError, match=r"no alpha, beta, gamma brings small to x2 .* has x\d"):
        search_coefficients(SMALL, lambda *_: 0.5, tolerance=0.0)


# --- halving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "budget"), [(1, 1), (6, 3), (7, 3), (40, 9), (100, 27)])
def test_each_rung_has_fewer_candidates_and_no_less_of_anything(count: int, budget: int) -> None:
    rungs = halving(count, budget)
    assert rungs[0].candidates == count and (rungs[-1].budget, rungs[-1].seeds) == (budget, 3)
    assert rungs[-1].candidates <= 6
    for before, after in itertools.pairwise(rungs):
        assert after.candidates == math.ceil(before.candidates / 3)
        assert after.budget >= before.budget and after.seeds >= before.seeds


def noisy(network: Network, seed: int, budget: int) -> float:
    """Best where depth and width are alike; the seed moves all alike, and a little by itself."""
    deep, wide = (sum(stage.repeats for stage in network.stages) / 3, sum(stage.width for stage in network.stages) / 48)
    own = zlib.crc32(repr((network.stages, network.resolution, seed)).encode()) % 1000 / 1e6
    return 0.8 - 0.1 * abs(math.log(deep / wide)) + 0.02 * seed + 0.01 * budget + own


def test_the_winner_is_the_best_and_the_budget_is_spent_as_planned() -> None:
    calls: list[tuple] = []

    def evaluate(network: Network, seed: int, budget: int) -> float:
        calls.append((unnamed(network), seed, budget))
        return noisy(network, seed, budget)

    found = search_coefficients(SMALL, evaluate, tolerance=0.3)
    assert len(calls) == len(set(calls)) == found.evaluations
    assert {call[2] for call in calls} == {rung.budget for rung in found.rungs}
    best = max(candidates(found.cells, 2.0), key=lambda c: noisy(scale(SMALL, 1, c.coefficients), 0, 9))
    assert found.winner.candidate == best
    assert len(found.standings) == len(candidates(found.cells, 2.0))
    finalists = [standing for standing in found.standings if standing.rung == len(found.rungs) - 1]
    assert len(finalists) == found.rungs[-1].candidates
    assert [standing.mean for standing in finalists] == sorted((one.mean for one in finalists), reverse=True)


def test_ties_are_said_to_be_ties() -> None:
    """The seeds move all candidates by 0.02: unpaired intervals overlap by far, paired ones tell 0.001 apart."""
    by_key: dict[Network, int] = {}

    def evaluate(network: Network, seed: int, budget: int) -> float:
        rank = by_key.setdefault(unnamed(network), len(by_key))
        jitter = 1e-4 * ((rank * 7 + seed * 3) % 5 - 2)
        return 0.9 + 0.02 * seed - (0.004 * rank if rank > 1 else 0.0) + jitter

    found = search_coefficients(SMALL, evaluate, tolerance=0.3, eta=20)  # a single rung
    tied = {by_key[unnamed(scale(SMALL, 1, one.candidate.coefficients))] for one in (found.winner, *found.ties)}
    assert tied == {0, 1}
    assert all(one.interval and found.winner.interval for one in found.standings)
    third = found.standings[2]
    assert third.interval[1] > found.winner.interval[0]  # by themselves they overlap
    assert third.difference_interval[1] < 0 and not third.tie


# Student's t, two-sided 95 %: the table of any textbook
@pytest.mark.parametrize(("degrees", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045)])
def test_quantiles_are_those_of_the_table(degrees: int, t: float) -> None:
    assert t_quantile(degrees, 0.975) == pytest.approx(t, abs=5e-4)


def test_an_interval_of_one_value_is_unknown_and_of_equal_ones_is_a_point() -> None:
    assert t_interval([0.5]) is None
    assert t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


# --- the study file -------------------------------------------------------------------------------------------------


def test_a_finished_search_costs_nothing_again(tmp_path: Path) -> None:
    file = tmp_path / "study.jsonl"
    first = search_coefficients(SMALL, noisy, study=file, tolerance=0.1)
    before = file.read_bytes()

    def never(*_: object) -> float:
        raise AssertionError

    assert search_coefficients(SMALL, never, study=file, tolerance=0.1) == first
    assert file.read_bytes() == before


def test_cut_off_anywhere_it_goes_on_to_the_same_result(tmp_path: Path) -> None:
    """The file is cut at four bytes of three lines (a kill while writing), and the search goes on."""
    file = tmp_path / "study.jsonl"
    whole = search_coefficients(SMALL, noisy, study=file, tolerance=0.1)
    text = file.read_bytes()
    lines = text.splitlines(keepends=True)
    starts = [0, len(lines[0]), sum(map(len, lines[:-1]))]
    lengths = [len(lines[0]), len(lines[1]), len(lines[-1])]
    for start, length in zip(starts, lengths, strict=True):
        for cut in (start, start + 1, start + length // 2, start + length - 1):
            file.write_bytes(text[:cut])
            done = text[:cut].count(b"\n")
            calls = []

            def evaluate(*call: object, calls: list = calls) -> float:
                calls.append(call)
                return noisy(*call)  # ty: ignore[invalid-argument-type]

            if cut > start:
                with pytest.warns(StudyWarning, match="torn by a kill"):
                    again = search_coefficients(SMALL, evaluate, study=file, tolerance=0.1)
            else:
                again = search_coefficients(SMALL, evaluate, study=file, tolerance=0.1)
            assert again == whole
            assert len(calls) == whole.evaluations - max(0, done - 1)


def test_a_killed_process_keeps_every_finished_evaluation(tmp_path: Path) -> None:
    file = tmp_path / "study.jsonl"
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from tests.test_coefficients import SMALL, noisy
from effnet.coefficients import search_coefficients
def evaluate(*call):
    time.sleep(0.05)
    print("one", flush=True)
    return noisy(*call)
search_coefficients(SMALL, evaluate, study={str(file)!r}, tolerance=0.1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(4):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    kept = [json.loads(line) for line in file.read_text().splitlines()][1:]
    assert len(kept) >= 3  # the fourth was under way
    calls = []
    found = search_coefficients(SMALL, lambda *call: calls.append(call) or noisy(*call), study=file, tolerance=0.1)
    assert found.evaluations == len(calls) + len(kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net": SMALL.with_classes(3)}, "another baseline"),
        ({"target": 1.9}, "another target"),
        ({"about": {"data": "other"}}, "another data"),
    ],
)
def test_a_study_of_something_else_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    file = tmp_path / "study.jsonl"
    usual = {"net": SMALL, "evaluate": noisy, "study": file, "tolerance": 0.1, "about": {"data": "this"}}
    search_coefficients(**usual)  # ty: ignore[invalid-argument-type]
    before = file.read_bytes()
    with pytest.raises(UsageError, match=message):
        search_coefficients(**usual | change)  # ty: ignore[invalid-argument-type]
    assert file.read_bytes() == before


def test_a_file_that_is_no_study_is_refused_untouched(tmp_path: Path) -> None:
    file = tmp_path / "letter.txt"
    file.write_text("Dear reader,\nhello\n")
    with pytest.raises(UsageError, match=r"line 1 of .* is no record of a study"):
        search_coefficients(SMALL, noisy, study=file)
    assert file.read_text() == "Dear reader,\nhello\n"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda *_: math.nan, "evaluate gave nan for alpha"),
        (lambda *_: math.inf, "evaluate gave inf for alpha"),
        (lambda *_: 1 / 0, "evaluate failed for alpha .* ZeroDivisionError"),
        (lambda *_: "good", "evaluate failed for alpha .* ValueError"),
    ],
)
def test_an_evaluate_that_fails_is_named_and_what_was_finished_is_kept(tmp_path: Path, bad, message: str) -> None:
    file, calls = tmp_path / "study.jsonl", []

    def evaluate(network: Network, seed: int, budget: int) -> float:
        calls.append(seed)
        return bad() if len(calls) == 4 else noisy(network, seed, budget)

    with pytest.raises(UsageError, match=f"{message}.*3 finished evaluations are kept in"):
        search_coefficients(SMALL, evaluate, study=file, tolerance=0.1)
    assert len(file.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.0}, "target is 1.0"),
        ({"target": math.nan}, "target is nan"),
        ({"seeds": 1}, "seeds is 1"),
        ({"budget": 0}, "budget is 0"),
        ({"alpha_step": 0}, "alpha_step is 0"),
        ({"tolerance": -0.1}, "tolerance is -0.1"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        search_coefficients(SMALL, noisy, **{"tolerance": 0.1} | options)


def test_hundreds_of_points_are_costed_in_seconds() -> None:
    start = time.process_time()
    assert len(grid(B0, alpha_step=0.03, beta_step=0.03)) > 300
    assert time.process_time() - start < 5

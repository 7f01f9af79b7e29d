"""The study of a search: resumed after any kill, replayed alike, shared; and failures of all kinds."""

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy.exc

from effnet.search import records
from effnet.search.objectives import Objective, dominates
from effnet.search.records import StudyWarning, Trial, opened
from effnet.search.space import key, vary
from effnet.search.study import Found, found, search, searching
from effnet.search.task import Task
from effnet.spec import Head, Network, Preprocess, Stage, Stem
from effnet.value import UsageError

BASE = Network(
    name="base",
    stem=Stem(width=8),
    stages=tuple(Stage(op="mbconv", repeats=1, width=8 + 4 * i, stride=1 + (i > 0), expand=2) for i in range(3)),
    head=Head(width=16, classes=10),
    resolution=16,
    preprocess=Preprocess(size=16, resize=16),
)
SPACE = vary(BASE, {"stages.*.kernel": (3, 5), "stages.*.expand": (1, 2, 4), "stages.*.repeats": (1, 2)}, "s")
TASK = Task(
    space=SPACE,
    objectives=(Objective("acc * (macs/400k)^-0.07"),),
    strategy="evolution:population=4,sample=2",
    rungs=(1, 3),
    about={"data": "a table"},
)
TRIALS = 8


def tabulated(network: Network, seed: int, epochs: int) -> float:
    """An accuracy that rises with epochs and likes large kernels late and wide expansions early."""
    likes = sum(stage.kernel * i - abs(stage.expand - 3 + i) + stage.repeats for i, stage in enumerate(network.stages))
    return 1 / (1 + math.exp(-likes / 10)) * (1 - 0.2 / epochs) + 1e-3 * seed


class Counted:
    """An evaluation that notes its calls; `act(call)` may do something at each."""

    def __init__(self, act: Callable[[int], Any] = lambda call: None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.act = act

    def __call__(self, network: Network, seed: int, epochs: int) -> float:
        self.calls.append((key(network), epochs))
        told = self.act(len(self.calls))
        return tabulated(network, seed, epochs) if told is None else told


def stripped(trials: tuple[Trial, ...]) -> list[dict[str, Any]]:
    """Trials without what a clock says."""
    rows = [trial.to_dict() for trial in trials]
    return [row | {"results": [{**r, "seconds": 0} for r in row["results"]]} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return search(TASK, tabulated, tmp_path_factory.mktemp("whole") / "study.db", trials=TRIALS)


# --- what is found --------------------------------------------------------------------------------------------------


def test_the_winner_is_the_best_that_came_to_the_end(whole: Found) -> None:
    finished = [trial for trial in whole.trials if trial.state == "finished"]
    assert len(whole.trials) == TRIALS == len(finished) + whole.count("stopped")
    assert 1 <= len(finished) < TRIALS
    assert all(trial.values["epochs"] == 3 for trial in finished)
    assert all(trial.values["epochs"] == 1 for trial in whole.trials if trial.state == "stopped")
    assert TASK.gains(whole.best.values) == max(TASK.gains(trial.values) for trial in finished)
    assert key(whole.network()) == whole.best.key
    assert Found.from_json(whole.to_json()) == whole


def test_every_network_is_trained_once_per_rung_and_the_front_is_that_of_the_finished(tmp_path: Path) -> None:
    task, evaluate = TASK.replace(objectives=(Objective("acc"), Objective("macs")), strategy="nsga2"), Counted()
    result = search(task, evaluate, tmp_path / "study.db", trials=14)
    assert len(evaluate.calls) == len(set(evaluate.calls))
    done = {t.number: t.values for t in result.trials if t.state == "finished"}
    points = {n: (values["acc"], -values["macs"]) for n, values in done.items()}
    beaten = {n for n, point in points.items() if any(dominates(other, point) for other in points.values())}
    assert set(result.front) == set(done) - beaten
    accuracies = [done[number]["acc"] for number in result.front]
    assert accuracies == sorted(accuracies, reverse=True) and result.winner == result.front[0]


def test_optunas_own_tools_read_the_study(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    result = search(TASK, tabulated, file, trials=8)
    study = optuna.load_study(study_name="effnet", storage=f"sqlite:///{file}")
    assert study.best_trial.number == result.winner
    assert study.best_value == pytest.approx(TASK.gains(result.best.values)[0])


# --- resuming -------------------------------------------------------------------------------------------------------


def test_a_finished_study_costs_nothing_and_more_trials_go_on(tmp_path: Path, whole: Found) -> None:
    file, never = tmp_path / "study.db", Counted(lambda call: pytest.fail("trained again"))
    search(TASK, tabulated, file, trials=5)
    assert len(search(TASK, never, file, trials=5).trials) == 5
    assert stripped(search(TASK, tabulated, file, trials=TRIALS).trials) == stripped(whole.trials)


@pytest.mark.parametrize("call", [1, 6])
def test_interrupted_in_any_evaluation_it_goes_on_to_the_same_trials(tmp_path: Path, whole: Found, call: int) -> None:
    def interrupt(number: int) -> None:
        if number == call:
            raise KeyboardInterrupt

    first, second = Counted(interrupt), Counted()
    with pytest.raises(KeyboardInterrupt):
        search(TASK, first, tmp_path / "study.db", trials=TRIALS)
    result = search(TASK, second, tmp_path / "study.db", trials=TRIALS)
    assert stripped(result.trials) == stripped(whole.trials)
    assert sorted(first.calls[:-1] + second.calls) == sorted(set(first.calls + second.calls))  # none lost, none twice


@pytest.mark.parametrize("write", (1, 2, 4, 7))
def test_cut_off_at_any_write_it_goes_on_to_the_same_trials(
    tmp_path: Path, whole: Found, write: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends just before its nth write to the database (the claim, the code, a rung, the end)."""
    file, count = tmp_path / "study.db", 0
    original = records.Records._patiently

    def cut(self: records.Records, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        nonlocal count
        if not getattr(work, "__name__", "").startswith("get_"):
            count += 1
            if count == write + 3:
                raise SystemExit
        return original(self, work, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(records.Records, "_patiently", cut)
        with pytest.raises(SystemExit):
            search(TASK, tabulated, file, trials=TRIALS)
    assert stripped(search(TASK, tabulated, file, trials=TRIALS).trials) == stripped(whole.trials)


DRIVER = """
import sys, time
sys.path.insert(0, {root!r})
from tests.test_search_study import TASK, tabulated
from effnet.search.study import search
from effnet.search.space import key
def evaluate(network, seed, epochs):
    print("start", key(network), epochs, flush=True)
    sys.stdin.readline()
    return tabulated(network, seed, epochs)
search(TASK, evaluate, {study!r}, trials={trials})
"""


def driver(study: str, trials: int = TRIALS) -> subprocess.Popen[str]:
    """A process that waits for a line before it finishes an evaluation."""
    code = DRIVER.format(root=str(Path(__file__).parent.parent), study=study, trials=trials)
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_killed_it_resumes_at_once_and_nothing_is_lost(tmp_path: Path, whole: Found) -> None:
    file = str(tmp_path / "study.db")
    process = driver(file)
    assert process.stdout and process.stdin
    started = []
    for _ in range(4):
        started.append(tuple(process.stdout.readline().split()[1:]))
        if len(started) < 4:
            process.stdin.write("\n")
            process.stdin.flush()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stdin.close()
    evaluate = Counted()
    result = search(TASK, evaluate, file, trials=TRIALS)
    assert stripped(result.trials) == stripped(whole.trials)
    again = [(name, str(epochs)) for name, epochs in evaluate.calls]
    assert set(again) & set(started) == {started[-1]}  # only the one that was under way


# --- several at work ------------------------------------------------------------------------------------------------


def test_two_drivers_share_a_study_and_train_nothing_twice(tmp_path: Path) -> None:
    """Threads that are let go in turn: both are inside an evaluation before either may finish one."""
    file, barrier, evaluates = tmp_path / "study.db", threading.Barrier(2), [Counted(), Counted()]
    opened(file, TASK)

    def work(evaluate: Counted) -> None:
        meeting = [barrier.wait]

        def act(call: int) -> None:
            if meeting:
                meeting.pop()(30)

        evaluate.act = act
        search(TASK, evaluate, file, trials=TRIALS)

    threads = [threading.Thread(target=work, args=(evaluate,)) for evaluate in evaluates]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls = evaluates[0].calls + evaluates[1].calls
    assert len(calls) == len(set(calls)) and all(evaluate.calls for evaluate in evaluates)
    trials = found(TASK, opened(file, TASK).trials()).trials
    assert len({trial.key for trial in trials}) == TRIALS
    assert {trial.state for trial in trials} == {"finished", "stopped"}


def test_an_owner_on_another_machine_is_left_alone_until_it_is_silent(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    kept = opened(file, TASK)
    with kept.at_work():
        trial = kept.claim(1)
        assert trial is not None
    with sqlite3.connect(file) as base:
        (text,) = base.execute("SELECT value_json FROM trial_user_attributes WHERE key = 'owner'").fetchone()
        elsewhere = json.loads(text) | {"host": "elsewhere"}
        base.execute("UPDATE trial_user_attributes SET value_json = ?", (json.dumps(elsewhere),))
    base.close()
    assert opened(file, TASK).claim(1) is None
    with sqlite3.connect(file) as base:
        elsewhere["since"] -= 2 * records.SILENCE
        base.execute("UPDATE trial_user_attributes SET value_json = ?", (json.dumps(elsewhere),))
    base.close()
    assert opened(file, TASK).claim(1) is not None


def test_one_of_two_gets_a_dead_owners_trial(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    dead, first, second = (opened(file, TASK) for _ in range(3))
    dead.claim(1)  # never at work
    row = first._rows()[0]
    with first.at_work(), second.at_work():
        assert first._own(row) and not second._own(row)
        assert second.claim(1) is None


# --- failures -------------------------------------------------------------------------------------------------------


def out_of_memory() -> float:
    raise MemoryError("tried to allocate 3 GiB")


def cuda() -> float:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: math.nan, "acc is nan"),
        (lambda: math.inf, "acc is inf"),
        (lambda: "good", "ValueError: could not convert"),
        (out_of_memory, "out of memory: tried to allocate 3 GiB"),
        (cuda, "out of memory: CUDA out of memory"),
    ],
)
def test_a_trial_that_fails_is_recorded_with_its_reason_and_others_go_on(
    tmp_path: Path, bad: Callable[[], Any], reason: str
) -> None:
    evaluate = Counted(lambda call: bad() if call == 2 else None)
    result = search(TASK.replace(rungs=(1,)), evaluate, tmp_path / "study.db", trials=4)
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert [trial.number for trial in failed] == [1] and failed[0].reason.startswith(reason)
    assert result.count("finished") == 3 and len(evaluate.calls) == 4


def test_an_objective_without_a_value_fails_the_trial(tmp_path: Path) -> None:
    task = TASK.replace(objectives=(Objective("log(acc - acc)"),), rungs=(1,))
    result = search(task, tabulated, tmp_path / "study.db", trials=2)
    assert [trial.reason for trial in result.trials] == ["the objective log(acc - acc) is nan"] * 2
    with pytest.raises(UsageError, match=r"none of 2 trials was finished; the last that failed: the objective"):
        _ = result.best


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": vary(BASE, {"stages.*.kernel": (3, 5)})}, r"another space: s around base \(9 choices\), now vary"),
        ({"objectives": (Objective("acc"),)}, "another objectives"),
        ({"limits": {"macs": 1e6}}, r"another limits \(macs\): None, now 1000000"),
        ({"strategy": "random"}, "another strategy: evolution.*, now random"),
        ({"seed": 1}, "another seed: 0, now 1"),
        ({"rungs": (1,)}, "another rungs"),
        ({"about": {"data": "other"}}, r"another about \(data\): a table, now other"),
    ],
)
def test_a_study_of_something_else_is_refused_untouched(tmp_path: Path, change: dict, message: str) -> None:
    file = tmp_path / "study.db"
    search(TASK, tabulated, file, trials=1)
    before = file.read_bytes()
    with pytest.raises(UsageError, match=message):
        search(TASK.replace(**change), tabulated, file, trials=2)
    assert file.read_bytes() == before


def test_a_file_that_is_no_study_is_refused_untouched(tmp_path: Path) -> None:
    file = tmp_path / "letter.txt"
    file.write_text("Dear reader,\n" * 100)
    with pytest.raises(UsageError, match=r"letter.txt cannot be opened as a study: file is not a database"):
        search(TASK, tabulated, file)
    assert file.read_text() == "Dear reader,\n" * 100
    with pytest.raises(UsageError, match="is a folder"):
        search(TASK, tabulated, tmp_path)
    with pytest.raises(UsageError, match="cannot be opened as a study"):
        search(TASK, tabulated, "nosuchbase://here/there")


def test_a_missing_meter_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    task = TASK.replace(objectives=(Objective("acc * step_ms^-0.07"),))
    with pytest.raises(UsageError, match="needs step_ms"):
        search(task, tabulated, tmp_path / "study.db")
    assert not list(tmp_path.iterdir())
    result = search(task, tabulated, tmp_path / "study.db", trials=2, meters={"step_ms": lambda network: 5.0})
    assert result.best.values["step_ms"] == 5.0


# --- a database that goes away --------------------------------------------------------------------------------------


def away(times: int) -> Callable[..., Any]:
    """A replacement for a storage call that fails so many times."""
    left = [times]

    def broken(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("server closed the connection"))
        return work(*args, **options)

    return broken


def test_a_database_that_comes_back_costs_a_warning_and_no_trial(
    tmp_path: Path, whole: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, original = away(3), optuna.storages.RDBStorage.set_trial_user_attr
    monkeypatch.setattr(
        optuna.storages.RDBStorage, "set_trial_user_attr", lambda *args, **options: broken(original, *args, **options)
    )
    monkeypatch.setattr(records.time, "sleep", lambda seconds: None)
    with pytest.warns(StudyWarning, match=r"does not answer \(server closed the connection\): waiting up to 600 s"):
        result = search(TASK, tabulated, tmp_path / "study.db", trials=TRIALS)
    assert stripped(result.trials) == stripped(whole.trials)


def test_a_database_that_stays_away_is_said_to_be_and_nothing_is_lost(
    tmp_path: Path, whole: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "study.db"
    with monkeypatch.context() as patch:
        broken, original = away(10**9), optuna.storages.RDBStorage.set_trial_user_attr
        finished = 0
        with (
            pytest.warns(StudyWarning),
            pytest.raises(UsageError, match=r"study.db has not answered for .* is kept there"),
        ):
            for _ in searching(TASK, tabulated, file, trials=TRIALS, patience=0.0):
                finished += 1
                if finished == 3:
                    patch.setattr(
                        optuna.storages.RDBStorage, "set_trial_user_attr", lambda *a, **o: broken(original, *a, **o)
                    )
                    patch.setattr(records.time, "sleep", lambda seconds: None)
    assert found(TASK, opened(file, TASK).trials()).count("failed") == 0
    evaluate = Counted()
    assert stripped(search(TASK, evaluate, file, trials=TRIALS).trials) == stripped(whole.trials)

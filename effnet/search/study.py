"""How does a search go? Ask for a candidate, measure it, record it; and what was found.

`searching` is a generator of finished trials, so whoever iterates draws the progress. Everything is in the study's
records (`records.py`) before it is yielded, and what is tried next depends on the records and the seed alone: stopped
or killed, the same call goes on, and a replay tries the same.

A trial that raises, runs out of memory or gives no finite number is recorded as failed, with the reason; others go on.
"""

import gc
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnet.coefficients import Evaluate
from effnet.cost import cost
from effnet.search.objectives import Objective, ranks
from effnet.search.records import Orphan, Records, Trial, opened
from effnet.search.space import COSTS, key
from effnet.search.task import Meters, Task
from effnet.spec import Network
from effnet.value import UsageError, Value, check_range


class Failed(Exception):
    """A candidate failed where it was tried; the message is the reason that is kept."""


class Unable(UsageError):
    """What tries candidates is gone, through no fault of theirs: the search ends, and its open trials stay open."""


@dataclass(frozen=True, kw_only=True)
class Found(Value):
    """What a study holds. `axes`: the objectives that the front is between; `front`: numbers of trials, best first.

    `winner`: the number of the trial that is best by the objective; with several of them, the front's best by the
    first one. None where no trial reached the last rung.
    """

    task: Task
    trials: tuple[Trial, ...]
    axes: tuple[Objective, ...]
    front: tuple[int, ...]
    winner: int | None

    @property
    def best(self) -> Trial:
        """The winner. `UsageError` where there is none, with the last reason."""
        if self.winner is not None:
            return self.trial(self.winner)
        reasons = [trial.reason for trial in self.trials if trial.reason]
        why = f"; the last that failed: {reasons[-1]}" if reasons else ""
        raise UsageError(f"none of {len(self.trials)} trials was finished{why}.")

    def trial(self, number: int) -> Trial:
        """The trial of that number."""
        return next(trial for trial in self.trials if trial.number == number)

    def network(self, number: int | None = None) -> Network:
        """The network of a trial, by default the winner's."""
        trial = self.best if number is None else self.trial(number)
        assert trial.code is not None
        return self.task.space.network(trial.code)

    def count(self, state: str) -> int:
        """How many trials are in that state."""
        return sum(trial.state == state for trial in self.trials)


def searching(
    task: Task,
    evaluate: Evaluate,
    study: str | Path,
    *,
    trials: int = 100,
    meters: Meters | None = None,
    patience: float = 600.0,
    at_once: int = 1,
) -> Iterator[Trial]:
    """Goes on with the study until `trials` were tried, yielding each trial that is finished here.

    `evaluate(network, seed, epochs)` gives the accuracy; `meters` measure the quantities that are no cost
    (`latency_ms`, `step_ms`). `study`: a file or an address, see `records.opened`. Several processes may work on one
    study. Ends early where the space holds nothing new. `UsageError` where nothing is within the limits.

    `at_once`: so many threads work on trials, for an `evaluate` that only waits for what is computed elsewhere
    (`on_ray`). With `task.lag` as large or larger all of them are busy and the trials are those of one thread. Who
    stops iterating leaves what is under way to its end, in the background.
    """
    check_range("trials at once", at_once, 1)
    meters = _needed(task, meters or {})
    if at_once == 1:
        yield from _working(task, evaluate, study, trials, meters, patience)
        return
    opened(study, task, patience=patience)  # made or refused by one, before several meet
    done: queue.SimpleQueue[Trial | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        try:
            for trial in _working(task, evaluate, study, trials, meters, patience):
                done.put(trial)
                if stop.is_set():
                    break
        except BaseException as error:
            done.put(error)
        done.put(None)

    for _ in range(at_once):
        threading.Thread(target=work, daemon=True).start()
    try:
        working = at_once
        while working:
            got = done.get()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                working -= 1
            else:
                yield got
    finally:
        stop.set()


def _working(
    task: Task, evaluate: Evaluate, study: str | Path, trials: int, meters: Meters, patience: float
) -> Iterator[Trial]:
    """One of those that work on a study: it claims a trial, has it told, tries it, and so on."""
    records = opened(study, task, patience=patience)
    with records.at_work():
        while (trial := records.claim(trials)) is not None:
            with records.beating(trial.number):
                try:
                    if trial.code is None and not _told(task, records, trial.number, meters):
                        return
                except Orphan:
                    continue  # ours now, and the lowest: the next claim
                tried = _tried(task, records, records.trials()[trial.number], evaluate, meters)
            yield tried


def _needed(task: Task, meters: Meters) -> Meters:
    """The meters for what the task asks beyond accuracy and costs; `UsageError` for a missing one."""
    wanted = [name for name in sorted(task.quantities) if name not in (*COSTS, "acc")]
    missing = [name for name in wanted if name not in meters]
    if missing:
        raise UsageError(f"the search needs {', '.join(missing)}, and nothing was given to measure it with.")
    return {name: meters[name] for name in wanted}


def _told(task: Task, records: Records, number: int, meters: Meters) -> bool:
    """Decides what a trial tries, from all that were before it; False where there is nothing new.

    `Orphan` for one before it that has to be tried first, and is ours.
    """
    heard = task.heard(number)
    while True:
        try:
            before = records.before(number, heard)
            break
        except Orphan as orphan:
            if orphan.told:
                raise
            if not _told(task, records, orphan.number, meters):
                return False
    known = before[:heard] if task.lag else before
    seen = [trial.seen(task) for trial in known if trial.code and trial.state in ("finished", "stopped", "failed")]
    code = task.propose(seen, {trial.key for trial in before}, number, meters)
    if code is None:
        return False
    records.tell(number, code, key(task.space.network(code)))
    return True


def _tried(task: Task, records: Records, trial: Trial, evaluate: Evaluate, meters: Meters) -> Trial:
    """Measures a candidate rung by rung, from where it was, and ends its trial."""
    assert trial.code is not None
    number, results = trial.number, list(trial.results)
    network = task.space.network(trial.code)
    state = "finished"
    for rung, epochs in enumerate(task.rungs):
        if rung == len(results):
            values, reason = _measured(task, network, epochs, results, evaluate, meters)
            if reason:
                records.end(number, "failed", reason=reason)
                return records.trials()[number]
            results.append(values)
            records.reach(number, results)
        if rung + 1 < len(task.rungs) and not _goes_on(task, records, number, results[: rung + 1]):
            state, results = "stopped", results[: rung + 1]
            break
    values = [objective(results[-1]) for objective in task.objectives]
    records.end(number, "finished" if state == "finished" else "stopped", values)
    return records.trials()[number]


def _goes_on(task: Task, records: Records, number: int, results: Sequence[Mapping[str, float]]) -> bool:
    """By the trials with smaller numbers that have reached the same rung, so that a resumed trial decides alike."""
    known = records.trials()[: task.heard(number) if task.lag else number]
    others = [t.results[len(results) - 1] for t in known if len(t.results) >= len(results)]
    return task.goes_on(task.gains(results[-1]), [task.gains(other) for other in others])


def _measured(
    task: Task, network: Network, epochs: int, before: Sequence[Mapping[str, float]], evaluate: Evaluate, meters: Meters
) -> tuple[dict[str, float], str]:
    """The quantities of a candidate after `epochs`, or why there are none."""
    started = time.perf_counter()
    try:
        spent = cost(network)
        values = {name: float(getattr(spent, name)) for name in COSTS}
        for name, meter in meters.items():
            values[name] = float(before[-1][name] if before else meter(network))
        values["acc"] = float(evaluate(network, task.seed, epochs))
    except Unable:
        raise
    except Failed as error:
        return {}, str(error)
    except Exception as error:
        gc.collect()
        return {}, reason(error)
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        return {}, f"{wrong[0]} is {values[wrong[0]]}"
    for objective in task.objectives:
        if not math.isfinite(objective(values)):
            return {}, f"the objective {objective.text} is {objective(values)}"
    return values | {"epochs": epochs, "seconds": round(time.perf_counter() - started, 2)}, ""


def attempt(function: Callable[..., float], arguments: Sequence[Any]) -> tuple[float, str]:
    """The function's value, or why there is none: for another process, as not every exception survives the journey."""
    try:
        return float(function(*arguments)), ""
    except Exception as error:
        return math.nan, reason(error)


def reason(error: Exception) -> str:
    """Why a candidate failed, in one line: its kind and its words."""
    words = " ".join(str(error).split())[:500]
    if isinstance(error, MemoryError) or "out of memory" in words.lower() or "can't allocate memory" in words:
        return f"out of memory: {words or type(error).__name__}"
    return f"{type(error).__name__}: {words}"


def search(task: Task, evaluate: Evaluate, study: str | Path, **options: Any) -> Found:
    """`searching` to its end, and what was found. `options`: those of `searching`."""
    for _ in searching(task, evaluate, study, **options):
        pass
    return found(task, opened(study, task).trials())


def found(task: Task, trials: Sequence[Trial]) -> Found:
    """What the trials of a study amount to so far."""
    told = tuple(trial for trial in trials if trial.code is not None)
    whole = [trial for trial in told if trial.state == "finished"]
    axes = front_axes(task)
    front: list[Trial] = []
    if whole:
        best = ranks([[axis.gain(trial.values) for axis in axes] for trial in whole]) == 0
        front = [trial for trial, first in zip(whole, best, strict=True) if first]
        front.sort(key=lambda trial: -axes[0].gain(trial.values))
    judged = front if len(task.objectives) > 1 else whole
    winner = max(judged, key=lambda trial: (task.objectives[0].gain(trial.values), -trial.number), default=None)
    return Found(
        task=task,
        trials=told,
        axes=axes,
        front=tuple(trial.number for trial in front),
        winner=None if winner is None else winner.number,
    )


def front_axes(task: Task) -> tuple[Objective, ...]:
    """What the front is between: the objectives, or for a single one accuracy and the cost that it names."""
    if len(task.objectives) > 1:
        return task.objectives
    named = [name for name in ("step_ms", "latency_ms", *COSTS) if name in task.objectives[0].quantities]
    return Objective("acc"), Objective(named[0] if named else "macs")

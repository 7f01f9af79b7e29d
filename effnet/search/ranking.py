"""Does the short training rank networks as a longer one would? Kendall's tau between the two, with its interval.

A search is only as good as the order its proxy gives. `longer` trains some of the candidates again, for longer, and
says how far the two orders agree: 1 alike, 0 unrelated, -1 reversed. The candidates are spread evenly over the proxy's
order, so tau speaks of the whole range; among the best few, which are close together, agreement is always less.

Sources: Kendall 1945 (tau-b, which allows for ties); Efron 1979: percentile bootstrap over candidates.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from effnet.coefficients import Evaluate
from effnet.search.records import Trial, opened
from effnet.search.study import Failed
from effnet.search.task import Task
from effnet.value import UsageError, Value, check_range

if TYPE_CHECKING:
    import numpy as np

LEAST = 20  # candidates for a correlation that is reported


@dataclass(frozen=True, kw_only=True)
class Correlation(Value):
    """Kendall's tau-b of `count` pairs with its bootstrap interval (95 %). `pairs`: (short, long) accuracies.

    `shared`: the short ones are of candidates of one supernet, which was trained for the first of `epochs`.
    """

    tau: float
    low: float
    high: float
    count: int
    epochs: tuple[int, int]
    pairs: tuple[tuple[float, float], ...]
    shared: bool = False

    def __str__(self) -> str:
        short, long = self.epochs
        what = f"{short} with {long} epochs"
        if self.shared:
            what = f"a supernet of {short} epochs with stand-alone trainings of {long}"
        return (
            f"rank correlation of {what} over {self.count} networks: Kendall tau {self.tau:.2f} "
            f"(95 % interval {self.low:.2f} to {self.high:.2f})"
        )


def kendall(a: "Sequence[float] | np.ndarray", b: "Sequence[float] | np.ndarray") -> float:
    """Kendall's tau-b: concordant less discordant pairs, over all that are tied in neither. NaN where all are tied.

    >>> kendall([1, 2, 3, 4], [1, 2, 4, 3])  # five pairs agree, one does not
    0.6666666666666666
    """
    import numpy as np

    x, y = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(a, float), np.asarray(b, float)))
    norm = math.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / norm) if norm else math.nan


def correlation(
    short: Sequence[float],
    long: Sequence[float],
    epochs: tuple[int, int] = (0, 0),
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Correlation:
    """Tau and its interval. `UsageError` for fewer than three pairs, or where one side is all alike."""
    import numpy as np

    pairs = np.column_stack([np.asarray(short, float), np.asarray(long, float)])
    check_range("number of pairs", len(pairs), 3)
    tau, rng = kendall(*pairs.T), np.random.default_rng(seed)
    if math.isnan(tau):
        raise UsageError("all values are equal: there is no order to compare.")
    taus = [kendall(*pairs[rng.integers(len(pairs), size=len(pairs))].T) for _ in range(resamples)]
    low, high = np.nanquantile(taus, (0.025, 0.975))
    told = tuple((float(a), float(b)) for a, b in pairs)
    return Correlation(tau=tau, low=float(low), high=float(high), count=len(pairs), epochs=epochs, pairs=told)


def spread(trials: Sequence[Trial], count: int) -> list[Trial]:
    """`count` of the trials that were trained, evenly over the order of their accuracies on the first rung."""
    judged = sorted((trial for trial in trials if trial.results), key=lambda trial: trial.results[0]["acc"])
    if len(judged) < count:
        raise UsageError(f"{count} networks are to be trained longer, but only {len(judged)} trials have an accuracy.")
    return [judged[round(place * (len(judged) - 1) / (count - 1))] for place in range(count)]


def longer(
    task: Task,
    evaluate: Evaluate,
    study: str | Path,
    epochs: int,
    *,
    count: int = LEAST,
    at_once: int = 1,
    progress: Callable[[int, int, str], None] = lambda done, total, words: None,
) -> Correlation:
    """Trains `count` candidates of a study for `epochs` too, and compares the orders. Each is kept in the study.

    Of a study by supernet they are compared with trainings by themselves, of any length: `evaluate` is such a one.
    `at_once`: so many threads wait for an `evaluate` that computes elsewhere. `UsageError` for fewer than 20, epochs
    that are not more than the first rung's, or a training that failed elsewhere.
    """
    check_range("number of networks for a rank correlation", count, LEAST)
    shared = task.about.get("evaluator") == "supernet"
    check_range("epochs of the longer training", epochs, 1 if shared else task.rungs[0] + 1)
    records = opened(study, task)
    chosen, values = spread(records.trials(), count), list[float]()

    def trained(trial: Trial) -> float:
        name = f"{trial.key}:{epochs}"
        kept = records.note(name)
        if kept is None:
            assert trial.code is not None
            try:
                kept = float(evaluate(task.space.network(trial.code), task.seed, epochs))
            except Failed as error:
                raise UsageError(f"trial {trial.number} failed in {epochs} epochs: {error}") from None
            if not math.isfinite(kept):
                raise UsageError(f"trial {trial.number} has the accuracy {kept} after {epochs} epochs.")
            records.keep_note(name, kept)
        return kept

    pool = ThreadPoolExecutor(at_once) if at_once > 1 else None
    try:
        for done, (trial, value) in enumerate(
            zip(chosen, (pool.map if pool else map)(trained, chosen), strict=True), 1
        ):
            values.append(value)
            progress(done, count, f"trial {trial.number}: {trial.results[0]['acc']:.4f}, longer {value:.4f}")
    finally:
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)
    short = [trial.results[0]["acc"] for trial in chosen]
    return correlation(short, values, (task.rungs[0], epochs), seed=task.seed).replace(shared=shared)

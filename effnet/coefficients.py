"""How are alpha, beta and gamma found for a baseline? Step 1 of compound scaling (Tan & Le 2019, section 3.3).

A grid over alpha and beta; gamma is the resolution that brings the *realised* multiply-adds nearest to `target` times
the baseline's, after all rounding, while alpha * beta^2 * gamma^2 stays around `target`. What is then outside
`tolerance` is no candidate, and points that round to the same network are one. Each candidate is judged by `evaluate`,
a short training; successive halving (Jamieson & Talwalkar 2016) spends epochs and seeds on those that do well.

Finalists are compared seed by seed: who is not worse than the winner by more than chance (paired t-interval, 95 %, each
comparison by itself) is called a tie. The paper gives neither its grid nor its proxy nor any interval; these are ours.

Every finished evaluation is a line of the study file: a killed search goes on, and a finished one costs nothing.
"""

import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effnet.scaling import Baseline, Coefficients, Pixels, baseline, pixels
from effnet.spec import Network
from effnet.value import UsageError, Value, check_range

Evaluate = Callable[[Any, int, int], float]  # (scaled network, seed, budget) -> accuracy
Interval = tuple[float, float]


class StudyWarning(UserWarning):
    """A study file was damaged and something in it had to be left out."""


# --- the grid -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cell(Value):
    """A point of the grid. `ratio`: realised multiply-adds over the baseline's. `key`: its candidate; None: too far."""

    coefficients: Coefficients
    resolution: int
    macs: int
    ratio: float
    key: str | None


@dataclass(frozen=True, kw_only=True)
class Candidate(Value):
    """A network to be judged, and the coefficients that lead to it: of several, those nearest to the target."""

    key: str
    coefficients: Coefficients
    resolution: int
    macs: int
    ratio: float
    points: int  # of the grid that round to it


def grid(
    net: Network | Baseline,
    target: float = 2.0,
    *,
    tolerance: float = 0.05,
    around: float = 0.25,
    alpha_step: float = 0.1,
    beta_step: float = 0.05,
    resolution_step: int = 1,
    max_resolution: int | None = None,
) -> tuple[Cell, ...]:
    """The points of the grid, alpha and beta rising in steps from 1.

    `tolerance`: of the realised multiply-adds to `target` times the baseline's, as a share; `around`: the same of the
    formula. Raises `UsageError` for a target that is not above 1.

    >>> from effnet.families import get
    >>> cells = grid(get("efficientnet_b0"))
    >>> len(cells), sum(cell.key is not None for cell in cells)
    (81, 23)
    """
    check_range("target", target, 1.01, 1000)
    check_range("tolerance", tolerance, 0, 1)
    check_range("around", around, 0, 0.9)
    for name, step in (("alpha_step", alpha_step), ("beta_step", beta_step)):
        check_range(name, step, 1e-3, 10)
    base = baseline(net)
    px = pixels(base, resolution_step, max_resolution)
    macs = int(base.costs(1.0, 1.0, base.resolution, 1)["macs"])
    high = target * (1 + around)
    cells = []
    for alpha in _steps(alpha_step, high):
        for beta in _steps(beta_step, math.sqrt(high / alpha)):
            cell = _cell(base, px, macs, target, alpha, beta, tolerance, around)
            if cell is not None:
                cells.append(cell)
    return tuple(cells)


def _steps(step: float, high: float) -> list[float]:
    return [round(1 + step * i, 6) for i in range(math.floor((high - 1) / step + 1e-9) + 1)]


def _cell(
    base: Baseline, px: Pixels, macs: int, target: float, alpha: float, beta: float, tolerance: float, around: float
) -> Cell | None:
    """The resolution that comes nearest to the target, where the formula leaves any; a baseline is no candidate."""
    import numpy as np

    low, high = (
        base.resolution * math.sqrt(max(1.0, target * (1 + share) / (alpha * beta**2))) for share in (-around, around)
    )
    sizes = np.unique(px.of(np.arange(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1) / base.resolution))
    sizes = sizes[(sizes >= base.resolution) & (alpha * beta**2 * (sizes / base.resolution) ** 2 > 1)]
    if not len(sizes):
        return None
    if not base.exact:
        sizes = np.unique(sizes[np.linspace(0, len(sizes) - 1, 5).astype(int)])
    spent = base.costs(alpha, beta, sizes, 1)["macs"]
    best = int(np.abs(np.log(spent / macs / target)).argmin())
    ratio, size = float(spent[best] / macs), int(sizes[best])
    near = abs(ratio / target - 1) <= tolerance
    return Cell(
        coefficients=Coefficients(alpha, beta, round(size / base.resolution, 6)),
        resolution=size,
        macs=int(spent[best]),
        ratio=ratio,
        key=base.key(alpha, beta, size) if near else None,
    )


def candidates(cells: Sequence[Cell], target: float) -> tuple[Candidate, ...]:
    """One candidate for all points that round to the same network."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.key is not None:
            groups.setdefault(cell.key, []).append(cell)
    found = []
    for key, members in groups.items():
        first = min(members, key=lambda cell: abs(math.log(cell.coefficients.growth / target)))
        found.append(
            Candidate(
                key=key,
                coefficients=first.coefficients,
                resolution=first.resolution,
                macs=first.macs,
                ratio=first.ratio,
                points=len(members),
            )
        )
    return tuple(found)


# --- the schedule ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rung(Value):
    """So many candidates are judged with `budget` (epochs, say) and `seeds` seeds."""

    candidates: int
    budget: int
    seeds: int


def halving(count: int, budget: int, seeds: int = 3, eta: int = 3) -> tuple[Rung, ...]:
    """Rungs for `count` candidates: each keeps one in `eta`, with `eta` times the budget and more seeds.

    >>> [(rung.candidates, rung.budget, rung.seeds) for rung in halving(40, budget=9)]
    [(40, 1, 1), (14, 3, 2), (5, 9, 3)]
    """
    for name, value, low in (("candidates", count, 1), ("budget", budget, 1), ("seeds", seeds, 2), ("eta", eta, 2)):
        check_range(name, value, low)
    sizes = [count]
    while sizes[-1] > 2 * eta:
        sizes.append(math.ceil(sizes[-1] / eta))
    last = len(sizes) - 1
    return tuple(
        Rung(
            candidates=size,
            budget=max(1, round(budget / eta ** (last - i))),
            seeds=1 + round((seeds - 1) * i / last) if last else seeds,
        )
        for i, size in enumerate(sizes)
    )


# --- what is kept ---------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Study:
    """Finished evaluations by (network, seed, budget), and the file that they are appended to (None: memory only).

    `about`: what they were obtained for; a file about something else is refused. A last line that a kill tore is left
    out with a `StudyWarning`.
    """

    about: dict[str, Any]
    path: Path | None = None
    known: dict[tuple[str, int, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        self.path = Path(self.path)
        lines = self._whole_lines() if self.path.exists() else []
        if not lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"study": self.about})
            return
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    self._check(row["study"])
                else:
                    self.known[row["key"], row["seed"], row["budget"]] = float(row["accuracy"])
            except (json.JSONDecodeError, KeyError, TypeError):
                raise UsageError(f"line {number} of {self.path} is no record of a study: {line[:60]!r}.") from None

    def _whole_lines(self) -> list[str]:
        assert self.path is not None
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            warnings.warn(
                StudyWarning(f"the last line of {self.path} was torn by a kill and is left out; it is done again."),
                stacklevel=2,
            )
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return whole.decode().splitlines()

    def _check(self, before: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(self.about))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise UsageError(
                    f"{self.path} is a study with another {name} ({before.get(name)!r}, now {now.get(name)!r}): "
                    "name another file for this one."
                )

    def add(self, key: str, seed: int, budget: int, accuracy: float, **notes: Any) -> None:
        """Keeps one evaluation: it is on the disk when this returns."""
        self.known[key, seed, budget] = accuracy
        self._append({"key": key, "seed": seed, "budget": budget, "accuracy": accuracy} | notes)

    def _append(self, row: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


# --- the search -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Standing(Value):
    """How a candidate did on the last rung that it reached. `values`: its accuracies, by seed.

    `first`: its mean on the first rung, the only one where all candidates can be compared.
    `difference`: of its mean to the winner's over the same seeds, with its interval; only among finalists. `tie`: the
    interval holds 0.
    """

    candidate: Candidate
    rung: int
    budget: int
    values: tuple[float, ...]
    mean: float
    interval: Interval | None
    first: float
    difference: float | None = None
    difference_interval: Interval | None = None
    tie: bool = False


@dataclass(frozen=True, kw_only=True)
class Found(Value):
    """The result of a search. `standings`: finalists by mean, then the others by how far they came."""

    network: str
    target: float
    tolerance: float
    baseline_macs: int
    cells: tuple[Cell, ...]
    rungs: tuple[Rung, ...]
    standings: tuple[Standing, ...]
    evaluations: int

    @property
    def winner(self) -> Standing:
        """The finalist with the highest mean."""
        return self.standings[0]

    @property
    def ties(self) -> tuple[Standing, ...]:
        """The finalists that chance may have put behind the winner."""
        return tuple(standing for standing in self.standings[1:] if standing.tie)


def search_coefficients(
    net: Network | Baseline,
    evaluate: Evaluate,
    target: float = 2.0,
    *,
    budget: int = 9,
    seeds: int = 3,
    eta: int = 3,
    study: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, words: None,
    **options: Any,
) -> Found:
    """Finds alpha, beta and gamma for `net` at about `target` times its multiply-adds.

    `evaluate(network, seed, budget)` trains a scaled network and returns its accuracy; `budget` is what the finalists
    get (epochs, say), `seeds` how many of them each. `study`: a file that is gone on with; `about`: what else decides
    an accuracy (data, recipe), kept in it. `options`: those of `grid`. `progress(done, total, words)` after each
    evaluation. Raises `UsageError` when no candidate is near the target, or `evaluate` fails or gives no finite number:
    it names the candidate, and what was finished is kept.
    """
    base = baseline(net)
    cells = grid(net, target, **options)
    found = candidates(cells, target)
    tolerance = options.get("tolerance", 0.05)
    if not found:
        nearest = min(cells, key=lambda cell: abs(math.log(cell.ratio / target)), default=None)
        realised = f"; the nearest of {len(cells)} has x{nearest.ratio:.3f}" if nearest else ""
        raise UsageError(
            f"no alpha, beta, gamma brings {base.name} to x{target:g} multiply-adds within {tolerance:.0%} after "
            f"rounding{realised}. Raise the tolerance, or take finer steps."
        )
    rungs = halving(len(found), budget, seeds, eta)
    kept = Study(
        about={"baseline": base.key(1.0, 1.0, base.resolution), "target": target} | dict(about or {}),
        path=None if study is None else Path(study),
    )
    work = _Work(base=base, evaluate=evaluate, study=kept, progress=progress, total=_evaluations(rungs))
    alive, placed = list(found), []
    for number, rung in enumerate(rungs):
        standings = work.climb(alive, number, rung)
        through = rungs[number + 1].candidates if number + 1 < len(rungs) else 0
        alive = [standing.candidate for standing in standings[:through]]
        placed = [*standings[through:], *placed]
    finalists = [standing for standing in placed if standing.rung == len(rungs) - 1]
    others = placed[len(finalists) :]
    return Found(
        network=base.name,
        target=target,
        tolerance=tolerance,
        baseline_macs=int(base.costs(1.0, 1.0, base.resolution, 1)["macs"]),
        cells=cells,
        rungs=rungs,
        standings=(*_compared(finalists), *others),
        evaluations=work.total,
    )


def _evaluations(rungs: Sequence[Rung]) -> int:
    """How many there are in all; where two rungs have the same budget, the seeds of the first count for both."""
    total, before = 0, Rung(candidates=0, budget=0, seeds=0)
    for rung in rungs:
        total += rung.candidates * (rung.seeds - (before.seeds if rung.budget == before.budget else 0))
        before = rung
    return total


@dataclass(kw_only=True)
class _Work:
    """A search under way."""

    base: Baseline
    evaluate: Evaluate
    study: Study
    progress: Callable[[int, int, str], None]
    total: int
    seen: set[tuple[str, int, int]] = field(default_factory=set)
    firsts: dict[str, float] = field(default_factory=dict)

    def climb(self, alive: Sequence[Candidate], number: int, rung: Rung) -> list[Standing]:
        """The candidates of one rung, best mean first; of equals the one that was better before."""
        for seed in range(rung.seeds):
            for candidate in alive:
                self._once(candidate, seed, rung.budget)
        standings = []
        for candidate in alive:
            values = tuple(self.study.known[candidate.key, seed, rung.budget] for seed in range(rung.seeds))
            self.firsts.setdefault(candidate.key, statistics.fmean(values))
            standings.append(
                Standing(
                    candidate=candidate,
                    rung=number,
                    budget=rung.budget,
                    values=values,
                    mean=statistics.fmean(values),
                    interval=t_interval(values),
                    first=self.firsts[candidate.key],
                )
            )
        return sorted(standings, key=lambda standing: -standing.mean)

    def _once(self, candidate: Candidate, seed: int, budget: int) -> None:
        place = (candidate.key, seed, budget)
        if place not in self.study.known:
            self._judge(candidate, seed, budget)
        self.seen.add(place)
        c = candidate.coefficients
        words = f"({c.alpha:g}, {c.beta:g}, {c.gamma:.3f}) seed {seed} budget {budget}: {self.study.known[place]:.4f}"
        self.progress(len(self.seen), self.total, words)

    def _judge(self, candidate: Candidate, seed: int, budget: int) -> None:
        c = candidate.coefficients
        network = self.base.at(c.alpha, c.beta, candidate.resolution)
        who = f"alpha {c.alpha:g}, beta {c.beta:g}, gamma {c.gamma:g} (seed {seed}, budget {budget})"
        kept = f"{len(self.study.known)} finished evaluations are kept" + (
            f" in {self.study.path}." if self.study.path else " only in a study file: none was named."
        )
        started = time.perf_counter()
        try:
            accuracy = float(self.evaluate(network, seed, budget))
        except Exception as error:
            raise UsageError(f"evaluate failed for {who}: {type(error).__name__}: {error}. {kept}") from error
        if not math.isfinite(accuracy):
            raise UsageError(f"evaluate gave {accuracy} for {who}; it must be a finite number. {kept}")
        seconds = round(time.perf_counter() - started, 2)
        self.study.add(candidate.key, seed, budget, accuracy, coefficients=c.to_dict(), seconds=seconds)


# --- chance ---------------------------------------------------------------------------------------------------------


def _compared(finalists: Sequence[Standing]) -> list[Standing]:
    """The finalists with their differences to the first, seed by seed."""
    if not finalists:
        return []
    winner, compared = finalists[0], [finalists[0]]
    for standing in finalists[1:]:
        differences = [own - best for own, best in zip(standing.values, winner.values, strict=True)]
        bounds = t_interval(differences)
        compared.append(
            standing.replace(
                difference=statistics.fmean(differences),
                difference_interval=bounds,
                tie=bounds is not None and bounds[0] <= 0 <= bounds[1],
            )
        )
    return compared


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Student's interval of the mean; None for fewer than two values.

    >>> low, high = t_interval([1.0, 2.0, 3.0])  # 2 -+ 4.3027 / sqrt(3)
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = t_quantile(len(values) - 1, (1 + level) / 2) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def t_quantile(degrees: int, probability: float) -> float:
    """The quantile (0.5 or more) of Student's t with whole `degrees` of freedom, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(degrees, middle) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(degrees: int, t: float) -> float:
    """P(T <= t) for t >= 0: the finite series for whole degrees (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = (2 / math.pi) * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + inside / 2

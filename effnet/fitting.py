"""What is the largest scaled network within hard limits? Tan & Le 2019, eq. 2, solved over integers.

The limits are on macs, params, activations, weight_bytes, training_bytes, or on whatever a meter measures, such as a
predicted latency. Between two values of phi at which no width, no number of layers and no size changes there is one
network, and every such network on the way is costed: no larger one is missed, and the cost reported is the real one.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from effnet.cost import METRICS, Budget
from effnet.scaling import ALONE, DIMENSIONS, LEAST, MOST, PAPER, Baseline, Coefficients, Pixels, baseline, pixels
from effnet.spec import Network
from effnet.value import UsageError, Value, check_choice, check_range, nearest

if TYPE_CHECKING:
    import numpy as np

ALONG = ("compound", *DIMENSIONS, "free")

Meter = Callable[[Any], float]


@dataclass(frozen=True, kw_only=True)
class Use(Value):
    """One limit and how much of it is used. `binding`: the next larger network breaks it."""

    metric: str
    limit: float
    used: float
    binding: bool

    @property
    def left_percent(self) -> float:
        """How far from the limit, in per cent of it."""
        return 100 * (1 - self.used / self.limit)


@dataclass(frozen=True, kw_only=True)
class Fit(Value):
    """The largest scaled network within limits. `phi`: where on its ray (None: free). `spent`: what it costs.

    `held`: what keeps it from growing although no limit of the budget is broken ("max_resolution").
    """

    network: Any
    along: str
    phi: float | None
    depth: float
    width: float
    resolution: int
    uses: tuple[Use, ...]
    spent: dict[str, float]
    held: tuple[str, ...] = ()

    @property
    def binding(self) -> tuple[str, ...]:
        """The limits that bind."""
        return tuple(use.metric for use in self.uses if use.binding)


def fit(
    net: "Network | Baseline",
    budgets: Budget | Iterable[Budget] | Mapping[str, float],
    along: str = "compound",
    coefficients: Coefficients = PAPER,
    *,
    meters: Mapping[str, Meter] | None = None,
    batch: int = 1,
    resolution_step: int = 1,
    max_resolution: int | None = None,
    wobble: float = 0.1,
    prefer: "Callable[[dict[str, np.ndarray]], np.ndarray] | None" = None,
) -> Fit:
    """The largest scaled `net` within every limit (Tan & Le 2019, eq. 2), over realised, rounded networks.

    `budgets`: limits by metric, on the costs of `cost.METRICS` (training memory at `batch` images) or on a name in
    `meters`, functions of the scaled network such as a predicted latency. `along`: "compound", or one dimension alone:
    the largest phi that fits. "free": depth, width and resolution rise together along `coefficients`; one that a limit
    stops stays, the others go on. So the least scaled of the three is scaled as far as any network within the limits
    allows, then the second, then the third (lexicographic max-min), and no dimension is below the compound fit's.
    `prefer`, with "free" and limits on costs only: instead, of all networks that cannot have one more pixel (factors
    between 1/4 and 4), the one with the highest score; it is given arrays of depth, width, resolution and every cost.

    A meter need not rise with phi: it may wander `wobble` (a share) around something that does; `inf` assumes nothing,
    measures every candidate from the largest down and needs another limit beside it.

    Raises `UsageError` where nothing fits (it says what the smallest network costs) or nothing limits the growth.

    >>> from effnet.families import get
    >>> found = fit(get("efficientnet_b0"), {"macs": 800e6})
    >>> round(found.phi, 2), found.resolution, found.spent["macs"], found.binding
    (0.63, 245, 793290176, ('macs',))
    """
    base = baseline(net)
    check_choice("along", along, ALONG)
    if prefer is not None and (along != "free" or not base.exact):
        raise UsageError("prefer chooses among free depths, widths and resolutions of a Network: set along='free'.")
    check_range("wobble", wobble, 0)
    search = _Search(
        base=base,
        limits=_limits(budgets, meters or {}),
        meters=dict(meters or {}),
        batch=batch,
        px=pixels(base, resolution_step, max_resolution),
        wobble=wobble,
    )
    if prefer is not None:
        if search.lazy:
            raise UsageError(f"prefer chooses by costs; {', '.join(search.lazy)} is measured one network at a time.")
        return search.preferred(prefer)
    if along == "free":
        return search.free(coefficients)
    return search.on_a_ray(along, ALONE.get(along, coefficients))


def _limits(budgets: Budget | Iterable[Budget] | Mapping[str, float], meters: Mapping[str, Meter]) -> dict[str, float]:
    """Limits by metric, each checked and given once."""
    if isinstance(budgets, Budget):
        budgets = [budgets]
    pairs: list[tuple[str, float]]
    if isinstance(budgets, Mapping):
        pairs = [(str(metric), limit) for metric, limit in budgets.items()]
    else:
        several = list(budgets)
        if any(budget.size is not None for budget in several):
            raise UsageError("fit costs every network at its own resolution: give budgets without a size.")
        pairs = [(budget.metric, budget.limit) for budget in several]
    limits: dict[str, float] = {}
    for metric, limit in pairs:
        known = [*METRICS, *meters]
        if metric not in known:
            raise UsageError(
                f"budget metric {metric!r} is neither a cost ({', '.join(METRICS)}) nor one of the meters "
                f"({', '.join(meters) or 'none given'}).{nearest(metric, known)}"
            )
        if metric in limits:
            raise UsageError(f"two limits on {metric}: {limits[metric]:g} and {limit:g}; give one.")
        check_range(f"budget on {metric}", limit, 1e-9, 1e30)
        limits[metric] = float(limit)
    if not limits:
        raise UsageError(f"a fit needs at least one limit, on {', '.join([*METRICS, *meters])}.")
    return limits


@dataclass(frozen=True, kw_only=True)
class _Path:
    """A way through the factors: dimensions with a rate follow exp(rate * t), the others stay where they are."""

    base: Baseline
    px: Pixels
    rates: Mapping[str, float]
    fixed: Mapping[str, float]

    def low(self, *, ray: bool) -> float:
        """The t at which nothing that moves can shrink further; a ray ends where its resolution would be too small."""
        least = {name: self.base.least(name) for name in self.rates}
        if "resolution" in least:
            least["resolution"] = self.px.least / self.px.base
        ends = {name: math.log(least[name]) / rate for name, rate in self.rates.items()}
        return ends["resolution"] if ray and "resolution" in ends else min(ends.values())

    @property
    def high(self) -> float:
        """The t at which a factor becomes absurd."""
        return min(math.log(MOST) / rate for rate in self.rates.values())

    def factors(self, t: "np.ndarray | float") -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
        """Depth, width and pixels at every t."""
        import numpy as np

        t = np.atleast_1d(np.asarray(t, float))
        values = []
        for name in DIMENSIONS:
            rate = self.rates.get(name)
            value = np.full(t.shape, self.fixed.get(name, 1.0)) if rate is None else np.exp(rate * t)
            value = np.where(t == 0, 1.0, value) if rate is not None else value  # exactly
            values.append(np.clip(value, LEAST, MOST))
        return values[0], values[1], self.px.of(values[2])

    def candidates(self, low: float, high: float) -> "np.ndarray":
        """Ascending t, one for every network on the way: the middles between any two places where one may change."""
        import numpy as np

        found = [np.array([low, high])]
        for name, rate in self.rates.items():
            ends = (max(LEAST, math.exp(rate * low)), min(MOST, math.exp(rate * high)))
            breaks = self.px.breaks(*ends) if name == "resolution" else self.base.breaks(name, *ends)
            found.append(np.log(breaks) / rate)
        edges = np.unique(np.concatenate(found))
        edges = edges[(edges >= low) & (edges <= high)]
        middles = (edges[1:] + edges[:-1]) / 2
        alone = [0.0] if low <= 0 <= high else []  # a factor of exactly 1 leaves odd widths as they were written
        return np.unique(np.concatenate([middles, alone, [low, high]]))


class _Unlimited(UsageError):
    """No limit binds along a way."""


@dataclass(kw_only=True)
class _Search:
    """One fit under way: what was measured is remembered."""

    base: Baseline
    limits: dict[str, float]
    meters: dict[str, Meter]
    batch: int
    px: Pixels
    wobble: float
    known: dict[tuple[float, float, int], dict[str, float]] = field(default_factory=dict)

    @property
    def lazy(self) -> list[str]:
        """The metrics that are taken one candidate at a time."""
        return [name for name in self.limits if name in self.meters or not self.base.exact]

    def spent(self, place: tuple[float, float, int]) -> dict[str, float]:
        """What the network at (depth, width, pixels) costs, and what the limited meters say of it."""
        if place not in self.known:
            found = {name: value.item() for name, value in self.base.costs(*place, self.batch).items()}
            missing = self.limits.keys() - found.keys() - self.meters.keys()
            if missing:
                raise UsageError(
                    f"{self.base.name} does not count {', '.join(missing)}: Factory(training_memory=True)."
                )
            for name in self.limits.keys() & self.meters.keys():
                network = self.base.at(*place)
                found[name] = float(self.meters[name](network))
                if not math.isfinite(found[name]):
                    raise UsageError(f"the meter {name} gives {found[name]} for {_called(network)}.")
            self.known[place] = found
        return self.known[place]

    def broken(self, place: tuple[float, float, int]) -> set[str]:
        """The limits that the network there is above."""
        spent = self.spent(place)
        return {name for name, limit in self.limits.items() if spent[name] > limit}

    def excess(self, place: tuple[float, float, int], metrics: Iterable[str]) -> float:
        """The worst used share among limits."""
        spent = self.spent(place)
        return max((spent[name] / self.limits[name] for name in metrics), default=0.0)

    def place(self, path: _Path, t: float) -> tuple[float, float, int]:
        depth, width, size = path.factors(t)
        return depth[0].item(), width[0].item(), int(size[0])

    # -- one way -----------------------------------------------------------------------------------------------------

    def largest(self, path: _Path, low: float) -> tuple[float | None, float | None]:
        """The largest t at or above `low` whose network is within the limits, and the next candidate above it.

        None for the first: nothing fits; for the second: the way ends there (a largest resolution).
        """
        import numpy as np

        high, ended = self._beyond(path, low)
        found = path.candidates(low, high)
        fits = np.ones(len(found), bool)
        if self.base.exact:
            totals = self.base.costs(*path.factors(found), self.batch)
            for name in self.limits.keys() & totals.keys():
                fits &= totals[name] <= self.limits[name]
        places = np.flatnonzero(fits)
        index = self._last(path, found, places) if self.lazy else (int(places[-1]) if len(places) else None)
        if index is None:
            return None, None
        if index + 1 < len(found):
            return float(found[index]), float(found[index + 1])
        if ended:
            return float(found[index]), None
        raise self._unlimited(path)

    def _beyond(self, path: _Path, low: float) -> tuple[float, bool]:
        """A t from which on nothing can be within the limits; True where the way ends at the largest resolution."""
        step = math.log(2) / sum(path.rates.values())
        capped = list(path.rates) == ["resolution"] and self.px.most is not None
        t = max(low, 0.0)
        while True:
            t = min(t, path.high)
            place = self.place(path, t)
            costs = [name for name in self.limits if name not in self.lazy]
            if self.excess(place, costs) > self.base.slack:
                return t, False
            if not math.isinf(self.wobble) and self.excess(place, self.lazy) > 1 + self.wobble:
                return t, False
            if capped and place[2] == self.px.largest:
                return t, True
            if t == path.high:
                raise self._unlimited(path)
            t += step

    def _last(self, path: _Path, found: "np.ndarray", places: "np.ndarray") -> int | None:
        """The last of `places` whose lazily measured metrics are within their limits.

        Bisection finds where they are over by more than the wobble, so that nothing above can fit; from there down.
        """
        low, high = -1, len(places)
        if math.isinf(self.wobble):
            low = high - 1
        while high - low > 1:
            middle = (low + high) // 2
            over = self.excess(self.place(path, found[places[middle]]), self.lazy) > 1 + self.wobble
            low, high = (low, middle) if over else (middle, high)
        for index in reversed(places[:high]):
            if self.excess(self.place(path, found[index]), self.lazy) <= 1:
                return int(index)
        return None

    def _unlimited(self, path: _Path) -> "_Unlimited":
        return _Unlimited(
            f"nothing stops {self.base.name} from growing in {', '.join(path.rates)}: the limits on "
            f"{', '.join(self.limits)} do not bind there. Add one on macs"
            + (", or a max_resolution." if "resolution" in path.rates else ".")
        )

    def nothing(self, path: _Path, low: float) -> UsageError:
        """What to say when even the smallest network on the way, at `low`, is too large."""
        place = self.place(path, low)
        spent, broken = self.spent(place), self.broken(place)
        worst = sorted(broken) or list(self.limits)
        costs = ", ".join(f"{name} {spent[name]:,.6g} (limit {self.limits[name]:,.6g})" for name in worst)
        depth, width, size = place
        return UsageError(
            f"nothing fits: the smallest network on the way from {self.base.name} (depth x{depth:.3g}, width "
            f"x{width:.3g}, {size} px) has {costs}."
        )

    # -- the ways ----------------------------------------------------------------------------------------------------

    def on_a_ray(self, along: str, coefficients: Coefficients) -> Fit:
        """The largest phi on a ray from the baseline."""
        path = self._path(_rates(coefficients), {})
        low = path.low(ray=True)
        phi, above = self.largest(path, low)
        if phi is None:
            raise self.nothing(path, low)
        binding = set() if above is None else self.broken(self.place(path, above))
        held = ("max_resolution",) if above is None else ()
        return self._fit(along, phi, self.place(path, phi), binding, held)

    def _path(self, rates: Mapping[str, float], fixed: Mapping[str, float]) -> _Path:
        return _Path(base=self.base, px=self.px, rates=rates, fixed=fixed)

    def free(self, coefficients: Coefficients) -> Fit:
        """All dimensions rise together; whatever cannot rise alone any more stays, and the others go on."""
        moving, fixed = dict(_rates(coefficients)), {}
        binding, held = set(), []
        low = self._path(moving, fixed).low(ray=False)
        while moving:
            path = self._path(moving, fixed)
            reached, _ = self.largest(path, low)
            if reached is None:
                raise self.nothing(path, low)
            low, here = reached, self.place(path, reached)
            exact = dict(zip(DIMENSIONS, self._unrounded(path, reached), strict=True))
            stopped = {}
            for name in moving:
                others = {other: exact[other] for other in DIMENSIONS if other != name}
                alone = self._path({name: moving[name]}, others)
                reason = self._stops(alone, reached, here)
                if reason is not None:
                    stopped[name] = exact[name]
                    binding |= reason
                    held += ["max_resolution"] if not reason else []
            fixed |= stopped
            moving = {name: rate for name, rate in moving.items() if name not in stopped}
        return self._fit("free", None, here, binding, tuple(held))

    def _stops(self, alone: _Path, t: float, here: tuple[float, float, int]) -> set[str] | None:
        """The limits that a dimension would break if it alone rose to its next value; None where it can rise."""
        try:
            reached, above = self.largest(alone, t)
        except _Unlimited:
            return None
        assert reached is not None
        there = self.place(alone, reached)
        if there[2] != here[2] or self.spent(there) != self.spent(here):
            return None
        return set() if above is None else self.broken(self.place(alone, above))

    def _unrounded(self, path: _Path, t: float) -> tuple[float, ...]:
        """The factors at t, the resolution's too: where the way goes on from."""
        return tuple(
            math.exp(path.rates[name] * t) if name in path.rates else path.fixed.get(name, 1.0) for name in DIMENSIONS
        )

    def preferred(self, prefer: "Callable[[dict[str, np.ndarray]], np.ndarray]") -> Fit:
        """Of all networks within the limits that cannot have one more pixel, the one that `prefer` scores highest."""
        import numpy as np

        depth, width, size = self._frontier()
        if not len(size):
            raise self._nothing_near()
        rows = {"depth": depth, "width": width, "resolution": size}
        rows |= self.base.costs(depth, width, size, self.batch)
        scores = np.asarray(prefer(rows), float)
        if scores.shape != size.shape or np.isnan(scores).all():
            raise UsageError(f"prefer gave an array of shape {scores.shape}; one score for each of {len(size)} rows.")
        index = int(np.nanargmax(scores))
        place = (depth[index].item(), width[index].item(), int(size[index]))
        return self._fit("free", None, place, self.broken((*place[:2], self._next(place[2]))), ())

    def _nothing_near(self) -> UsageError:
        path = self._path(_rates(PAPER), {})
        return self.nothing(path, max(path.low(ray=False), -math.log(4) / max(path.rates.values())))

    def _next(self, size: int) -> int:
        return int(min(size + self.px.step, self.px.largest))

    def _frontier(self) -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
        """For every depth and width the largest resolution within the limits on costs, found by bisection.

        Costs rise with the size, but for SAME padding's copies of even maps: so the search is for 5 % above a limit on
        training memory, and goes down from there, pixel by pixel.
        """
        import numpy as np

        def middles(name: str) -> np.ndarray:
            edges = self.base.breaks(name, max(0.25, self.base.least(name)), 4.0)
            return np.unique(np.concatenate([(edges[1:] + edges[:-1]) / 2, edges[[0, -1]], [1.0]]))

        depth, width = (each.ravel() for each in np.meshgrid(middles("depth"), middles("width")))

        def fits(size: np.ndarray, room: float) -> np.ndarray:
            totals = self.base.costs(depth, width, size, self.batch)
            limits = {name: limit * (room if name == "training_bytes" else 1.0) for name, limit in self.limits.items()}
            return np.all([totals[name] <= limit for name, limit in limits.items()], axis=0)

        step, least = self.px.step, self.px.least
        low = np.full(depth.shape, least // step - 1)
        high = np.full(depth.shape, int(min(4 * self.px.base, self.px.largest)) // step + 1)
        while (high - low > 1).any():
            middle = np.maximum((low + high) // 2, least // step)
            good = fits(middle * step, 1.05) & (middle < high)
            low, high = np.where(good, middle, low), np.where(good, high, np.maximum(middle, low + 1))
        while (over := (low * step >= least) & ~fits(np.maximum(low * step, least), 1.0)).any():
            low = low - over
        there = low * step >= least
        return depth[there], width[there], low[there] * step

    def _fit(
        self, along: str, phi: float | None, place: tuple[float, float, int], binding: set[str], held: tuple[str, ...]
    ) -> Fit:
        spent = self.spent(place)
        uses = tuple(
            Use(metric=name, limit=limit, used=spent[name], binding=name in binding)
            for name, limit in self.limits.items()
        )
        depth, width, size = place
        return Fit(
            network=self.base.at(*place),
            along=along,
            phi=phi,
            depth=depth,
            width=width,
            resolution=size,
            uses=uses,
            spent=spent,
            held=held,
        )


def _rates(coefficients: Coefficients) -> dict[str, float]:
    """What each dimension that moves is multiplied by, as an exponent; a coefficient of 1 leaves its dimension."""
    logs = zip(DIMENSIONS, map(math.log, (coefficients.alpha, coefficients.beta, coefficients.gamma)), strict=True)
    return {name: rate for name, rate in logs if rate > 0}


def _called(network: Any) -> str:
    return getattr(network, "name", repr(network))

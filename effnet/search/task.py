"""What is being searched, and what follows from the trials so far? The pure part of a search: no clock, no storage.

A `Task` names the space, the objectives, the hard limits, the strategy, the seed and the rungs. From it and the trials
so far follow the next candidate (`propose`) and whether one that has reached a rung goes on (`goes_on`).

Limits are on what is known exactly before training, so a candidate over one is never trained. Codes of the same network
are one candidate. Early stopping is successive halving on the non-domination rank, as trials come in (the asynchronous
rule of Li et al. 2020): with several objectives too.
"""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from effnet.cost import cost
from effnet.search.objectives import FREE, Objective, ordered
from effnet.search.space import COSTS, ENUMERABLE, Code, Space, key
from effnet.search.strategies import Seen, Strategy, strategy
from effnet.spec import Network
from effnet.value import UsageError, Value, check_choice, check_range

if TYPE_CHECKING:
    import numpy as np

Meters = Mapping[str, Callable[[Network], float]]  # what measures the quantities that are no cost

DRAWS = 1024  # proposals of a strategy that are looked at before its rejected ones are repaired
REPAIRS = 64
LOOKS = 64


@dataclass(frozen=True, kw_only=True)
class Task(Value):
    """A search, as it is kept in its study. `rungs`: epochs, ascending; one in `eta` goes on from each.

    `about`: what else decides a result: data, images, recipe. `UsageError` for limits on what only training tells.

    `lag` says from what trial n follows. 0: from whatever is finished when it is asked for, so that with several under
    way at once the clock has a say. k: from trials 0 to n - k, which it waits for; then k can be under way, and the
    same seed gives the same trials, however many work on them.
    """

    space: Space
    objectives: tuple[Objective, ...]
    limits: dict[str, float] = field(default_factory=dict)
    strategy: str = "evolution"
    seed: int = 0
    rungs: tuple[int, ...] = (1,)
    eta: int = 3
    lag: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.objectives:
            raise UsageError("a search needs an objective, such as `acc * (macs/60M)^-0.07`.")
        for name, limit in self.limits.items():
            check_choice("limit on", name, FREE)
            check_range(f"limit on {name}", limit, 1e-9, 1e30)
        check_range("seed", self.seed, 0)
        check_range("eta", self.eta, 2)
        check_range("lag", self.lag, 0)
        if not self.rungs or list(self.rungs) != sorted(set(self.rungs)) or self.rungs[0] < 1:
            raise UsageError(f"rungs are {self.rungs}; they must be whole epochs, each more than the one before.")
        if len(self.objectives) > 1 and self.strategy.partition(":")[0] == "controller":
            raise UsageError("the controller learns from one reward: join the objectives in one expression, or nsga2.")
        _ = self._strategy

    def __hash__(self) -> int:
        return hash((self.space, self.objectives, self.strategy, self.seed, self.rungs))

    @property
    def quantities(self) -> set[str]:
        """What has to be known of a candidate."""
        return {"acc", "macs", "params", *self.limits, *(name for o in self.objectives for name in o.quantities)}

    def gains(self, values: Mapping[str, float]) -> tuple[float, ...]:
        """What the objectives give for a candidate, more being better."""
        return tuple(objective.gain(values) for objective in self.objectives)

    @functools.cached_property
    def _strategy(self) -> Strategy:
        return strategy(self.strategy)  # kept, so that what it has learnt need not be replayed

    def heard(self, number: int) -> int:
        """How many trials trial `number` has to know the end of: those with a number below."""
        return max(0, number + 1 - self.lag) if self.lag else 0

    # -- the next candidate ------------------------------------------------------------------------------------------

    def propose(
        self, seen: Sequence[Seen], taken: Collection[str], number: int, meters: Meters | None = None
    ) -> Code | None:
        """The candidate of trial `number`: new (its key is not in `taken`) and within the limits.

        None where there is no other. `UsageError` where nothing was found within the limits at all.
        """
        import numpy as np

        rng = np.random.default_rng([self.seed, number])
        if self.space.count <= ENUMERABLE:
            return self._enumerated(seen, taken, number, rng, meters or {})
        stream = self._strategy.proposals(self.space, seen, number, rng)
        rejected: list[Code] = []
        for chunk in _chunks(itertools.islice(stream, DRAWS)):
            for code, fits in zip(chunk, self.within(chunk), strict=True):
                if fits and self._new(code, taken, meters or {}):
                    return code
                rejected += [code] if len(rejected) < REPAIRS else []
        return self._repaired(rejected, taken, rng, meters or {})

    def within(self, codes: "Sequence[Code]") -> "np.ndarray":
        """Which of the codes are networks at all, and within the limits on costs. Exact."""
        import numpy as np

        totals = self.space.costs(codes)
        fits = np.isfinite(totals["macs"])
        for name in self.limits.keys() & set(COSTS):
            fits &= totals[name] <= self.limits[name]
        return fits

    def allowed(self, count: int) -> list[Code] | None:
        """Codes within the limits on costs, at random from the seed; None where nothing limits those.

        `count` or more, unless fewer are found. Where random draws hardly meet any, others are found in steps of one
        digit from those that they met.
        """
        import numpy as np

        if not self.limits.keys() & set(COSTS):
            return None
        if self.space.count <= ENUMERABLE:
            return self._fitting
        rng, found = np.random.default_rng(self.seed), dict[Code, None]()
        for _ in range(LOOKS):
            codes = [tuple(row) for row in rng.integers(self.space.sizes, size=(DRAWS, len(self.space.sizes))).tolist()]
            found |= dict.fromkeys(itertools.compress(codes, self.within(codes)))
            if len(found) >= count:
                return list(found)
        counted = self.replace(limits={name: limit for name, limit in self.limits.items() if name in COSTS})
        known = list(found) or [code for code in [counted.propose([], (), 0)] if code]
        for _ in range(LOOKS):
            codes = [self.space.mutate(known[int(index)], rng) for index in rng.integers(len(known), size=REPAIRS)]
            known = list(dict.fromkeys([*known, *itertools.compress(codes, self.within(codes))]))
        return known

    def _new(self, code: Code, taken: Collection[str], meters: Meters) -> bool:
        network = self.space.network(code)
        return self._metered(network, meters) <= 1 and key(network) not in taken

    def _metered(self, network: Network, meters: Meters) -> float:
        """How many times over its worst limit on what is no cost the network is."""
        return max(
            (meters[name](network) / self.limits[name] for name in self.limits if name not in COSTS), default=0.0
        )

    def _enumerated(
        self, seen: Sequence[Seen], taken: Collection[str], number: int, rng: "np.random.Generator", meters: Meters
    ) -> Code | None:
        """In a small space it is known what is left: the strategy chooses, and if it cannot, chance does."""
        fits = self._fitting
        if not fits:
            raise self._nothing(list(self.space.codes()))
        allowed = set(fits)
        for code in itertools.islice(self._strategy.proposals(self.space, seen, number, rng), 256):
            if code in allowed and self._new(code, taken, meters):
                return code
        for index in rng.permutation(len(fits)):
            if self._new(fits[index], taken, meters):
                return fits[index]
        if not taken:
            raise self._nothing(fits)
        return None

    @functools.cached_property
    def _fitting(self) -> list[Code]:
        codes = list(self.space.codes())
        return [code for code, good in zip(codes, self.within(codes), strict=True) if good]

    def _repaired(
        self, codes: Sequence[Code], taken: Collection[str], rng: "np.random.Generator", meters: Meters
    ) -> Code | None:
        """A candidate near one of those that were rejected: digit by digit to where it exceeds its limits least."""
        reached: list[Code] = []
        possible = False
        for start in codes:
            code, excess = start, math.inf
            while excess > 1:
                near = [*self._neighbours(code)]
                found = self._excess(near, meters)
                best = int(found.argmin())
                if not found[best] < excess:
                    break
                code, excess = near[best], float(found[best])
            reached.append(code)
            if excess > 1:
                continue
            possible = True
            for other in (code, *(self.space.mutate(code, rng) for _ in range(32))):
                if self.within([other])[0] and self._new(other, taken, meters):
                    return other
        if not possible and not taken:
            raise self._nothing(reached)
        return None

    def _neighbours(self, code: Code) -> Iterator[Code]:
        yield code
        for place, size in enumerate(self.space.sizes):
            for digit in range(size):
                if digit != code[place]:
                    yield (*code[:place], digit, *code[place + 1 :])

    def _excess(self, codes: Sequence[Code], meters: Meters) -> "np.ndarray":
        """How many times over its worst limit each code is."""
        import numpy as np

        totals = self.space.costs(codes)
        worst = np.where(np.isfinite(totals["macs"]), 0.0, np.inf)
        for name in self.limits.keys() & set(COSTS):
            worst = np.maximum(worst, totals[name] / self.limits[name])
        if self.limits.keys() - set(COSTS):
            real = np.flatnonzero(np.isfinite(worst))
            worst[real] = [max(worst[i], self._metered(self.space.network(codes[i]), meters)) for i in real]
        return worst

    def _nothing(self, codes: Sequence[Code]) -> UsageError:
        nearest = codes[int(self._excess(codes, {}).argmin())]
        try:
            spent = cost(self.space.network(nearest))
        except UsageError as error:
            return UsageError(f"no candidate of {self.space.name} is a network: {error}")
        counted = [f"{n} {getattr(spent, n):,} (limit {self.limits[n]:,.6g})" for n in self.limits if n in COSTS]
        others = [f"{name} (limit {limit:g})" for name, limit in self.limits.items() if name not in COSTS]
        return UsageError(
            f"no candidate of {self.space.name} is within the limits; the nearest has "
            f"{', '.join([*counted, *others])}. Raise the limit, or take a smaller baseline."
        )

    # -- early stopping ----------------------------------------------------------------------------------------------

    def goes_on(self, own: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
        """Whether a candidate with gains `own` on a rung is among the best one in `eta` of all that reached it.

        >>> from effnet.families import get
        >>> from effnet.search.space import v2
        >>> task = Task(space=v2(get("efficientnet_b0")), objectives=(Objective("acc"), Objective("macs")))
        >>> front = [(0.9, -9), (0.8, -8), (0.7, -7)]  # accuracy, and macs negated
        >>> task.goes_on((0.6, -3), front), task.goes_on((0.6, -9), front)
        (True, False)
        """
        place = ordered([*others, own]).index(len(others))
        return place < max(1, (len(others) + 1) / self.eta)


def _chunks(codes: Iterator[Code]) -> Iterator[list[Code]]:
    """The codes in lists of 1, 2, 4 ... 256: few are wasted where the first fits, many are costed at once elsewhere."""
    for power in itertools.count():
        chunk = list(itertools.islice(codes, 2 ** min(power, 8)))
        if not chunk:
            return
        yield chunk

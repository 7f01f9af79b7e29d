"""Which candidate is tried next? A strategy is a function of what was seen so far, and of a random stream.

`proposals(space, seen, number, rng)` yields codes for trial `number`; whoever asks takes the first that is new and
within the limits. `rng` comes from the search's seed and the number, and nothing else is remembered: the trials
recorded so far are the whole state, so that a search can stop and go on anywhere.

A trial that was stopped early is worse than all that were trained longer; of equals the non-domination rank decides,
then the crowding distance (Deb et al. 2002); with one objective that is its value.

Sources: Real et al. 2019 (regularised evolution), Deb et al. 2002 (NSGA-II). The papers' policy gradient is in
`controller.py` (it needs torch), Optuna's TPE in `tpe.py` (it needs optuna).
"""

import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from effnet.search.objectives import ordered
from effnet.search.space import Code, Space
from effnet.value import UsageError, Value, check_choice, check_range

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Seen(Value):
    """A finished trial: how far it came, and its gains there; None where it failed."""

    number: int
    code: Code
    gains: tuple[float, ...] | None
    rung: int = 0


class Strategy(Protocol):
    """How a search goes on."""

    def proposals(self, space: Space, seen: Sequence[Seen], number: int, rng: "np.random.Generator") -> Iterator[Code]:
        """Codes for trial `number`, as many as are wanted. `seen`: in order of their numbers, all of them smaller."""
        ...


def best_first(seen: Iterable[Seen]) -> list[Seen]:
    """The trials that did not fail, best first."""
    judged = [one for one in seen if one.gains is not None]
    found: list[Seen] = []
    for rung in sorted({one.rung for one in judged}, reverse=True):
        there = [one for one in judged if one.rung == rung]
        found += [there[index] for index in ordered([one.gains or () for one in there])]
    return found


@dataclass(frozen=True, kw_only=True)
class Random(Value):
    """Every code as probable as any other."""

    def proposals(self, space: Space, seen: Sequence[Seen], number: int, rng: "np.random.Generator") -> Iterator[Code]:
        while True:
            yield space.sample(rng)


@dataclass(frozen=True, kw_only=True)
class Evolution(Value):
    """Regularised evolution: of the youngest `population`, `sample` are drawn, and the best of them is mutated once.

    The oldest dies, however good it is. The first `population` are random (Real et al. 2019: 100 and 25, for 20,000).
    """

    population: int = 32
    sample: int = 8

    def __post_init__(self) -> None:
        check_range("population", self.population, 2)
        check_range("sample", self.sample, 1, self.population)

    def proposals(self, space: Space, seen: Sequence[Seen], number: int, rng: "np.random.Generator") -> Iterator[Code]:
        judged = [one for one in seen if one.gains is not None]
        alive = best_first(judged[-self.population :])
        while True:
            if len(judged) < self.population:
                yield space.sample(rng)
            else:
                drawn = rng.choice(len(alive), self.sample, replace=False)
                yield space.mutate(alive[int(drawn.min())].code, rng)


@dataclass(frozen=True, kw_only=True)
class NSGA2(Value):
    """NSGA-II: generations of `population`; parents by binary tournament, crossed with probability `cross`, mutated.

    A generation's parents are the best of all earlier ones, by rank and crowding (Deb et al. 2002).
    """

    population: int = 20
    cross: float = 0.9

    def __post_init__(self) -> None:
        check_range("population", self.population, 2)
        check_range("cross", self.cross, 0, 1)

    def proposals(self, space: Space, seen: Sequence[Seen], number: int, rng: "np.random.Generator") -> Iterator[Code]:
        parents: list[Seen] = []
        for generation in range(number // self.population):
            born = [one for one in seen if one.number // self.population == generation]
            parents = best_first([*parents, *born])[: self.population]
        while True:
            if not parents:
                yield space.sample(rng)
                continue
            a, b = (parents[int(rng.integers(len(parents), size=2).min())].code for _ in range(2))
            child = space.cross(a, b, rng) if rng.random() < self.cross else a
            yield space.mutate(child, rng, rate=1 / len(space.sizes))


# name: module and class, so that torch and optuna are imported only by those who use them
STRATEGIES = {
    "random": ("strategies", "Random"),
    "evolution": ("strategies", "Evolution"),
    "nsga2": ("strategies", "NSGA2"),
    "controller": ("controller", "Controller"),
    "tpe": ("tpe", "TPE"),
}


def strategy(text: str) -> Strategy:
    """The strategy of that name, with its settings behind a colon.

    >>> strategy("evolution:population=50,sample=10")
    Evolution(population=50, sample=10)
    """
    name, _, words = text.partition(":")
    check_choice("strategy", name, STRATEGIES)
    module, kind = STRATEGIES[name]
    settings: dict[str, Any] = {}
    for word in filter(None, words.split(",")):
        field, _, value = word.partition("=")
        try:
            settings[field.strip()] = float(value) if set(value) & set(".e") else int(value)
        except ValueError:
            raise UsageError(f"strategy {text!r}: {word!r} is not NAME=NUMBER, as in population=50.") from None
    return getattr(importlib.import_module(f"effnet.search.{module}"), kind).from_dict(settings)

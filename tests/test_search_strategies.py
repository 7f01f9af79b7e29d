"""One contract for all strategies, on a tabulated problem whose front is known; hard limits; halving."""

import functools
import itertools
import json

import numpy as np
import pytest

from effnet.coefficients import t_interval
from effnet.cost import cost
from effnet.search.objectives import Objective, hypervolume
from effnet.search.space import Code, Space, key, mnasnet, small, v2, vary
from effnet.search.strategies import NSGA2, STRATEGIES, Evolution, Seen, best_first, strategy
from effnet.search.task import Task
from effnet.spec import Head, Network, Preprocess, Stage, Stem
from effnet.value import UsageError

BASE = Network(
    name="table",
    stem=Stem(width=8),
    stages=tuple(Stage(op="mbconv", repeats=1, width=8 + 4 * i, stride=1 + (i > 0), expand=2) for i in range(3)),
    head=Head(width=16, classes=10),
    resolution=16,
    preprocess=Preprocess(size=16, resize=16),
)
SPACE = vary(
    BASE, {"stages.*.kernel": (3, 5, 7), "stages.*.expand": (1, 2, 3, 4, 6), "stages.*.repeats": (1, 2, 3)}, "table"
)
SOFT = (Objective("acc * (macs/400k)^-0.07"),)
PARETO = (Objective("acc"), Objective("macs"))
QUICK = {"evolution": "evolution:population=16,sample=6", "nsga2": "nsga2:population=12", "tpe": "tpe:startup=12"}
ALL = [QUICK.get(name, name) for name in STRATEGIES]
LEARNING = [name for name in ALL if name != "random"]

_WORTH = np.random.default_rng(11).normal(size=(9, 5)).cumsum(axis=1)  # of every digit, at every place


def accuracies(codes: np.ndarray) -> np.ndarray:
    """The tabulated accuracies of codes (rows): neighbouring digits are alike, and two places work together."""
    total = sum(_WORTH[place][codes[:, place]] for place in range(9)) + 0.5 * (codes[:, 0] == codes[:, 8])
    return 1 / (1 + np.exp(-total / 4))


def accuracy(code: Code) -> float:
    """The tabulated accuracy of one code."""
    return float(accuracies(np.array([code]))[0])


def walk(task: Task, trials: int, seen: list[Seen] | None = None) -> list[Seen]:
    """A search on the table, without any storage."""
    seen = list(seen or [])
    taken = {key(task.space.network(one.code)) for one in seen}
    for number in range(len(seen), trials):
        code = task.propose(seen, taken, number)
        assert code is not None
        taken.add(key(task.space.network(code)))
        values = {"acc": accuracy(code)} | {name: found[0] for name, found in task.space.costs([code]).items()}
        seen.append(Seen(number=number, code=code, gains=task.gains(values)))
    return seen


def task(name: str, objectives: tuple[Objective, ...] = SOFT, **options: object) -> Task:
    return Task(space=SPACE, objectives=objectives, strategy=name, **options)  # ty: ignore[invalid-argument-type]


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_in_space_seeded_resumable_and_new_every_time(name: str) -> None:
    whole = walk(task(name), 24)
    assert all(SPACE.check(one.code) for one in whole)
    assert len({key(SPACE.network(one.code)) for one in whole}) == 24
    assert walk(task(name), 24) == whole
    assert walk(task(name, seed=1), 24) != whole
    kept = [Seen.from_dict(json.loads(json.dumps(one.to_dict()))) for one in whole[:17]]
    assert walk(task(name), 24, kept) == whole  # a new object knows nothing but what was recorded


@pytest.mark.parametrize("name", ALL)
def test_hard_limits_are_never_broken(name: str) -> None:
    """A limit that one code in 500 is within, checked on networks costed one by one."""
    everything = np.array(list(SPACE.codes()))
    limit = float(np.quantile(SPACE.costs(everything)["macs"], 0.002))
    for one in walk(task(name, limits={"macs": limit}), 14):
        assert cost(SPACE.network(one.code)).macs <= limit


@pytest.mark.parametrize("name", ALL)
def test_failed_trials_are_lived_with(name: str) -> None:
    failed = [Seen(number=n, code=code, gains=None) for n, code in enumerate(itertools.islice(SPACE.codes(), 30))]
    assert len(walk(task(name), 32, failed)) == 32


@functools.cache
def best(name: str, trials: int) -> list[float]:
    """The best reward of a search, for each of eight seeds (five of TPE, whose proposals take their time)."""
    seeds = range(5 if "tpe" in name else 8)
    return [max(one.gains[0] for one in walk(task(name, seed=s), trials) if one.gains) for s in seeds]


@pytest.mark.parametrize("name", LEARNING)
def test_it_beats_random_on_a_known_table(name: str) -> None:
    """The best reward of 60 trials, paired with random over seeds: the 95 % interval of the difference is above 0."""
    everything = np.array(list(SPACE.codes()))
    values = {"acc": accuracies(everything), "macs": SPACE.costs(everything)["macs"]}
    assert max(best(name, 60)) <= (values["acc"] * (values["macs"] / 400e3) ** -0.07).max() + 1e-12
    low, _ = t_interval([a - b for a, b in zip(best(name, 60), best("random", 60), strict=False)]) or (0, 0)
    assert low > 0, (best(name, 60), best("random", 60))


def test_nsga2_comes_nearer_to_the_known_front_than_random() -> None:
    everything = np.array(list(SPACE.codes()))
    accs = accuracies(everything)
    macs = SPACE.costs(everything)["macs"]
    order = np.lexsort((-accs, macs))
    front = order[accs[order] > np.maximum.accumulate(np.append(-1.0, accs[order]))[:-1]]
    scale = macs.max()

    def volume(points: list[tuple[float, float]]) -> float:
        return hypervolume([(acc, -m / scale) for acc, m in points], (0.0, -1.0))

    known = volume(list(zip(accs[front], macs[front], strict=True)))
    shares: dict[str, list[float]] = {}
    for name in ("nsga2:population=16", "random"):
        walks = [walk(task(name, PARETO, seed=seed), 96) for seed in range(6)]
        shares[name] = [volume([(o.gains[0], -o.gains[1]) for o in rows if o.gains]) / known for rows in walks]
    assert max(max(each) for each in shares.values()) <= 1
    low, _ = t_interval([a - b for a, b in zip(*shares.values(), strict=True)]) or (0, 0)
    assert low > 0, shares


# --- their own rules ------------------------------------------------------------------------------------------------


def test_regularised_evolution_lets_the_oldest_die_even_if_it_is_the_best() -> None:
    best = Seen(number=0, code=(2,) * 9, gains=(1.0,))
    others = [Seen(number=n, code=(0,) * 9, gains=(n / 100,)) for n in range(1, 9)]
    rng = np.random.default_rng(0)
    draws = [next(Evolution(population=8, sample=8).proposals(SPACE, [best, *others], 9, rng)) for _ in range(20)]
    assert all(sum(digit != 0 for digit in code) == 1 for code in draws)  # the best alive, mutated once


def test_a_generation_of_nsga2_does_not_see_itself() -> None:
    rows = walk(task("nsga2:population=12", PARETO), 30)
    early = [one for one in rows if one.number < 24]
    for number in (24, 29):
        streams = [
            list(itertools.islice(NSGA2(population=12).proposals(SPACE, seen, number, np.random.default_rng(0)), 5))
            for seen in (early, rows)
        ]
        assert streams[0] == streams[1]


def test_trials_that_were_stopped_stand_behind_those_that_went_on() -> None:
    rows = [
        Seen(number=0, code=(0,), gains=(0.9,), rung=0),
        Seen(number=1, code=(0,), gains=(0.2,), rung=1),
        Seen(number=2, code=(0,), gains=None),
        Seen(number=3, code=(0,), gains=(0.4,), rung=1),
    ]
    assert [one.number for one in best_first(rows)] == [3, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evolutoin", "strategy 'evolutoin' is not one of .* Did you mean 'evolution'"),
        ("evolution:populaton=5", "'populaton' is not one of"),
        ("evolution:population=many", "is not NAME=NUMBER"),
        ("evolution:population=4", "sample is 8; it must be between 1 and 4"),
        ("controller:lr=5", "lr is 5"),
    ],
)
def test_a_strategy_that_cannot_be_says_why(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        strategy(text)


# --- tasks ----------------------------------------------------------------------------------------------------------


def test_a_small_space_is_searched_to_its_end_and_no_further() -> None:
    space = vary(BASE, {"stages.*.kernel": (3, 5)})
    for name in ("random", "evolution:population=2,sample=1", "tpe:startup=2"):
        todo, taken = Task(space=space, objectives=SOFT, strategy=name), set()
        seen: list[Seen] = []
        while (code := todo.propose(seen, taken, len(seen))) is not None:
            taken.add(key(space.network(code)))
            seen.append(Seen(number=len(seen), code=code, gains=(float(sum(code)),)))
        assert len(taken) == 8


def test_equal_networks_are_proposed_once() -> None:
    """All plain convolutions: squeeze-excite has no place, so half of the codes are copies."""
    options = {"stages.0": ({"op": "fused", "expand": 1},), "stages.0.se": (0.0, 0.25), "stages.0.kernel": (3, 5, 7)}
    space = vary(BASE, options)
    todo, taken = Task(space=space, objectives=SOFT, strategy="random"), set()
    while (code := todo.propose([], taken, len(taken))) is not None:
        taken.add(key(space.network(code)))
    assert (space.count, len(taken)) == (6, 3)


@pytest.mark.parametrize(
    ("space", "limits", "message"),
    [
        (
            SPACE,
            {"macs": 1000},
            r"no candidate of table is within the limits; the nearest has macs [\d,]+ \(limit 1,000\)",
        ),
        (vary(BASE, {"stages.0.kernel": (3, 5)}), {"params": 10}, "no candidate of vary is within"),
        (v2(small(BASE)), {"params": 100, "macs": 1e9}, "nearest has params .* macs"),
        (vary(BASE, {"resolution": (2, 3)}), {}, "is a network: input size . is below the stride"),
    ],
)
def test_a_space_with_nothing_within_the_limits_says_how_near_it_comes(
    space: Space, limits: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Task(space=space, objectives=SOFT, limits=limits).propose([], set(), 0)


def test_the_nearest_that_is_named_is_really_the_smallest() -> None:
    everything = SPACE.costs(list(SPACE.codes()))["params"].min()
    with pytest.raises(UsageError, match=f"the nearest has params {int(everything):,} "):
        Task(space=SPACE, objectives=SOFT, limits={"params": 10}).propose([], set(), 0)


def test_a_few_candidates_in_a_huge_space_are_found() -> None:
    """MnasNet's space around a small net, limits that random draws never meet: repaired, digit by digit."""
    space = mnasnet(BASE)
    rng = np.random.default_rng(0)
    macs = space.costs([space.sample(rng) for _ in range(4000)])["macs"]
    limit = 0.97 * macs.min()
    for name in ("random", "evolution:population=4,sample=2"):
        todo, seen, taken = Task(space=space, objectives=SOFT, strategy=name, limits={"macs": limit}), [], set()
        for number in range(8):
            code = todo.propose(seen, taken, number)
            assert code is not None and cost(space.network(code)).macs <= limit
            taken.add(key(space.network(code)))
            seen.append(Seen(number=number, code=code, gains=(1.0 / (number + 1),)))


@pytest.mark.parametrize(("space", "scale"), [(v2(BASE), 2.0), (mnasnet(BASE), 0.97), (SPACE, 1.5)])
def test_what_the_limits_allow_is_drawn_from_the_seed_however_little_it_is(space: Space, scale: float) -> None:
    """Half of a space; what random draws never meet; a space that can be counted through."""
    rng = np.random.default_rng(0)
    limit = scale * space.costs([space.sample(rng) for _ in range(4000)])["macs"].min()
    todo = Task(space=space, objectives=SOFT, limits={"macs": float(limit)})
    found = todo.allowed(64)
    assert found and len(set(found)) == len(found) >= 32 and todo.within(found).all()
    assert all(cost(space.network(code)).macs <= limit for code in found[:20])
    assert found == todo.replace(strategy="nsga2").allowed(64)
    assert Task(space=space, objectives=SOFT).allowed(64) is None


def test_the_smallest_of_a_huge_space_is_allowed_and_limits_that_are_no_costs_do_not_count() -> None:
    todo = Task(space=mnasnet(BASE), objectives=SOFT, limits={"macs": 27_600, "latency_ms": 1e-9})
    found = todo.allowed(64)
    assert found and todo.within(found).all()


def test_a_limit_on_a_predicted_latency_is_kept_too() -> None:
    meters = {"latency_ms": lambda network: 0.1 * sum(stage.repeats * stage.kernel for stage in network.stages)}
    todo, taken = task("random", limits={"latency_ms": 1.1}), set()
    for number in range(5):
        code = todo.propose([], taken, number, meters)
        assert code is not None and meters["latency_ms"](SPACE.network(code)) <= 1.1
        taken.add(key(SPACE.network(code)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": ()}, "needs an objective"),
        ({"limits": {"acc": 0.9}}, "limit on 'acc' is not one of"),
        ({"limits": {"parms": 5e6}}, "Did you mean 'params'"),
        ({"limits": {"params": -1}}, "limit on params is -1"),
        ({"rungs": (3, 1)}, "rungs are"),
        ({"rungs": (0, 1)}, "rungs are"),
        ({"eta": 1}, "eta is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"strategy": "controller", "objectives": PARETO}, "learns from one reward"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Task(**({"space": SPACE, "objectives": SOFT} | change))


# --- early stopping -------------------------------------------------------------------------------------------------


def test_about_one_in_eta_goes_on_whatever_the_number_of_objectives() -> None:
    rng = np.random.default_rng(0)
    for objectives in (SOFT, PARETO, (*PARETO, Objective("params"))):
        todo, others, through = task("random", objectives, eta=3, rungs=(1, 3)), [], 0
        for _ in range(150):
            own = tuple(rng.random(len(objectives)))
            through += todo.goes_on(own, others)
            others.append(own)
        assert 33 <= through <= 70  # 50, and three standard deviations; of the first three one goes on anyway


def test_who_is_dominated_by_many_stops_and_who_is_on_the_front_goes_on() -> None:
    todo = task("random", PARETO, eta=3)
    rng = np.random.default_rng(1)
    others = [tuple(row) for row in rng.random((60, 2)).tolist()]
    assert not todo.goes_on((0.01, 0.01), others)
    assert todo.goes_on((1.1, 0.0), others) and todo.goes_on((0.0, 1.1), others) and todo.goes_on((0.98, 0.98), others)

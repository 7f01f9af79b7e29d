"""How do many machines predict one job? Batches go to actors of a Ray cluster, rows come back in order.

An actor opens the engine for itself and runs `predict.answers` on one batch at a time, so its rows are those that this
process would have made. Nothing is left to Ray's own restarts: an actor that died is replaced, and its batches go to
those that are ready. So an actor that the cluster has no room for yet (an autoscaler brings a machine, or a lost one
comes back) holds no work. A batch that was on a dying actor `MOST_LOSSES` times is taken to be the cause.

Models and images are named by paths: every machine must see them at the same place. Ray is the extra `[cluster]`.
"""

import bisect
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import torch

from effnet.cluster import last_line, ray_cluster
from effnet.inputs import Input
from effnet.predict import Prediction, answers, identity, opened_on
from effnet.value import UsageError, check_range

CALLS_AHEAD = 2  # per actor: one that is running, and one so that it need not wait for us
WINDOW = 4  # batches per actor between the first whose rows are missing and the last that was given out
MOST_LOSSES = 3


class Worker:
    """Runs in an actor: one engine, one thread of computation."""

    def __init__(self, where: str, turns: bool, top_k: int) -> None:
        torch.set_num_threads(1)
        self.engine, self.top_k = opened_on(where, turns=turns), top_k
        self.identity = identity(self.engine)

    def introduced(self) -> tuple[str, int]:
        """What this engine's answers depend on, and the process."""
        return self.identity, os.getpid()

    def judged(self, items: Sequence[Input]) -> list[Prediction]:
        return next(answers(self.engine, [items], top_k=self.top_k))


def answers_on_ray(
    where: str,
    batches: Iterable[Sequence[Input]],
    *,
    top_k: int,
    turns: bool = False,
    actors: int | None = None,
    expected: str,
    on_event: Callable[[str], None] = lambda event: None,
) -> Generator[list[Prediction]]:
    """`predict.answers` of the engine at `where`, computed on the cluster that `RAY_ADDRESS` names or on a local one.

    `actors`: how many, each on one core; None: one for every core of the cluster. `predict.identity` must be
    `expected` on every machine. `on_event` is told of actors that are ready, lost or of another model.
    `UsageError` if no actor can start, or one batch was lost again and again.
    """
    with ray_cluster() as ray:
        count = actors or int(ray.cluster_resources().get("CPU", 0))
        check_range("the number of actors", count, 1)
        pool = _Pool(ray, count, (where, turns, top_k), expected, on_event)
        try:
            yield from pool.answers(batches)
        finally:
            pool.close()


class _Pool:
    """The actors, and which batch is where."""

    def __init__(
        self, ray: Any, count: int, made_of: tuple[str, bool, int], expected: str, on_event: Callable[[str], None]
    ) -> None:
        self.ray, self.count, self.made_of = ray, count, made_of
        self.expected, self.on_event = expected, on_event
        self.starting: dict[Any, Any] = {}  # the call that says who it is -> actor
        self.ready: dict[Any, int] = {}  # actor -> its process
        self.running: dict[Any, tuple[Any, int]] = {}  # call -> actor, number of the batch
        self.losses: Counter[int] = Counter()
        self.failed_starts = 0
        self.start()

    def start(self) -> None:
        """Asks for as many actors as are missing. They need not come at once."""
        made = self.ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(Worker)
        while len(self.starting) + len(self.ready) < self.count:
            actor = made.remote(*self.made_of)
            self.starting[actor.introduced.remote()] = actor

    def answers(self, batches: Iterable[Sequence[Input]]) -> Generator[list[Prediction]]:
        source = enumerate(batches)
        held: dict[int, Sequence[Input]] = {}  # whose rows are not out yet
        again: list[int] = []  # sorted: what is due first goes first
        rows: dict[int, list[Prediction]] = {}
        due, begun, more = 0, 0, True
        while True:
            while again or (more and begun < due + WINDOW * self.count):
                actor = self.idle(alone=bool(again) and self.losses[again[0]] > 0)
                if actor is None:
                    break
                if not again:
                    found = next(source, None)
                    if found is None:
                        more = False
                        break
                    held[found[0]] = found[1]
                    begun += 1
                    again.append(found[0])
                number = again.pop(0)
                self.running[actor.judged.remote(held[number])] = actor, number
            if not (more or held):
                break
            done, _ = self.ray.wait([*self.running, *self.starting], num_returns=1)
            for call in done:
                if call in self.starting:
                    self.introduce(call)
                elif call in self.running:
                    actor, number = self.running.pop(call)
                    try:
                        rows[number] = self.ray.get(call)
                    except self.losses_of_ray():
                        self.lose(actor, number, held[number])
                        bisect.insort(again, number)
            while due in rows:
                yield rows.pop(due)
                del held[due]
                due += 1

    def idle(self, *, alone: bool) -> Any:
        """The ready actor with the fewest calls, if it may have one more.

        `alone`: for a batch that was lost before. It gets an actor to itself, so that no other is blamed for its deeds.
        """
        loads: Counter[Any] = Counter()
        for actor, number in self.running.values():
            loads[actor] += CALLS_AHEAD if self.losses[number] else 1
        best = min(self.ready, key=lambda actor: loads[actor], default=None)
        return best if best is not None and loads[best] < (1 if alone else CALLS_AHEAD) else None

    def introduce(self, call: Any) -> None:
        """An actor says who it is: then it may work, unless its model is another one."""
        actor = self.starting.pop(call)
        try:
            found, process = self.ray.get(call)
        except self.losses_of_ray() as error:
            self.failed_starts += 1
            if self.failed_starts >= MOST_LOSSES:
                raise UsageError(f"no worker could open {self.made_of[0]}: {last_line(error)}") from None
            self.start()
            return
        if found != self.expected:
            raise UsageError(
                f"{self.made_of[0]} is {self.expected} here, but {found} on another machine of the cluster."
            )
        self.failed_starts = 0
        self.ready[actor] = process
        self.on_event(f"worker {process} is ready")

    def lose(self, actor: Any, number: int, items: Sequence[Input]) -> None:
        """An actor did not answer: it is replaced."""
        if actor in self.ready:
            process = self.ready.pop(actor)
            self.ray.kill(actor)
            self.on_event(f"worker {process} was lost; what it had goes to another")
            self.start()
        self.losses[number] += 1
        if self.losses[number] >= MOST_LOSSES:
            raise UsageError(
                f"{MOST_LOSSES} workers died over the same {len(items)} images, from {items[0].name} to "
                f"{items[-1].name}: a smaller batch needs less memory."
            )

    def losses_of_ray(self) -> tuple[type[Exception], ...]:
        errors = self.ray.exceptions
        return (
            errors.RayActorError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.WorkerCrashedError,
            errors.ObjectLostError,
        )

    def close(self) -> None:
        for actor in (*self.starting.values(), *self.ready):
            self.ray.kill(actor)

"""How does a search use a cluster? Every evaluation is a task of its own on Ray; the study stays with its drivers.

A task declares the CPUs and GPUs it needs, Ray finds a machine that has them, and only a number comes back. Nothing is
left to Ray's own retries: a task whose machine or process died is given out again here, at most `retries` times, then
its candidate has failed; one that was killed for its memory has failed at once. What was finished before is in the
study, and no death of a machine reaches that. Source: Moritz et al. 2018 (Ray).

Data are named by paths: every machine must see them at the same place. Ray is the extra `[cluster]`.
"""

import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from effnet.cluster import last_line, ray_cluster
from effnet.search.records import StudyWarning
from effnet.search.study import Failed, Unable, attempt
from effnet.value import check_range

Function = Callable[..., float]


@contextmanager
def on_ray(*, cpus: float = 1.0, gpus: float = 0.0, retries: int = 3) -> Generator["Tasks"]:
    """Within, `tasks(function)` is that function, computed on the cluster that `RAY_ADDRESS` names or on a local one.

    Each call needs `cpus` and `gpus` of one machine (fractions share one), and Ray has it compute with as many threads
    (`OMP_NUM_THREADS`, where nobody set it). At the end calls under way are cancelled:
    whoever waits for one gets `study.Unable`. `UsageError` where ray is not installed or no cluster answers.
    """
    check_range("CPUs of a trial", cpus, 0.01)
    check_range("GPUs of a trial", gpus, 0)
    check_range("retries of a trial", retries, 0)
    with ray_cluster() as ray:
        tasks = Tasks(ray, cpus, gpus, retries)
        if not tasks.room:
            needed = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
            warnings.warn(StudyWarning(f"no machine of the cluster has {needed} now: waiting for one."), stacklevel=3)
        try:
            yield tasks
        finally:
            tasks.close()


class Tasks:
    """Functions of the cluster; made by `on_ray`. Any number of threads may call them."""

    def __init__(self, ray: Any, cpus: float, gpus: float, retries: int) -> None:
        self.ray, self.cpus, self.gpus, self.retries = ray, cpus, gpus, retries
        self.task = ray.remote(attempt).options(num_cpus=cpus, num_gpus=gpus, max_retries=0)
        self.lock = threading.Lock()
        self.under_way: set[Any] = set()
        self.closed = False

    @property
    def room(self) -> int:
        """How many calls the cluster has room for at once, as it is now."""
        wants = {"CPU": self.cpus, "GPU": self.gpus}
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return sum(min(int(has.get(name, 0) / want) for name, want in wants.items() if want) for has in machines)

    def __call__(self, function: Function) -> Function:
        """`function`, computed elsewhere: it is sent once. Calling it waits for the answer.

        `study.Failed` for what it raised, or if its process died again and again; `study.Unable` without a cluster.
        """
        kept = self.ray.put(function)

        def distant(*arguments: Any) -> float:
            lost: Exception | None = None
            for _ in range(self.retries + 1):
                try:
                    value, why = self._answer(kept, arguments)
                except self._losses() as error:
                    lost = error
                    continue
                if why:
                    raise Failed(why)
                return value
            raise Failed(f"its worker died {self.retries + 1} times: {_first_line(lost)}")

        return distant

    def _answer(self, kept: Any, arguments: tuple[Any, ...]) -> tuple[float, str]:
        errors = self.ray.exceptions
        with self.lock:
            if self.closed:
                raise Unable("the search was stopped.")
            call = self.task.remote(kept, arguments)
            self.under_way.add(call)
        try:
            return self.ray.get(call)
        except errors.OutOfMemoryError as error:
            raise Failed(f"out of memory: {_first_line(error)}") from None
        except (errors.RayError, ConnectionError) as error:
            if self.closed:
                raise Unable("the search was stopped.") from None
            if isinstance(error, self._losses()):
                raise
            raise Unable(f"the Ray cluster cannot try candidates: {last_line(error)}") from None
        finally:
            with self.lock:
                self.under_way.discard(call)

    def _losses(self) -> tuple[type[Exception], ...]:
        errors = self.ray.exceptions
        return errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError

    def close(self) -> None:
        """Cancels what is under way; later calls are refused."""
        with self.lock:
            self.closed = True
            calls = list(self.under_way)
        for call in calls:
            self.ray.cancel(call, force=True)


def _first_line(error: Exception | None) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""The same job on a Ray cluster of several processes, with workers and a machine killed in the middle of it."""

import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from effnet.inputs import Input, batched, inputs
from effnet.predict import answers, identity, opened_on
from effnet.predict_job import predict_to_file
from effnet.predict_ray import MOST_LOSSES, _Pool, answers_on_ray
from effnet.value import UsageError
from tests.conftest import write_images
from tests.test_predict_job import keep_model

pytestmark = pytest.mark.usefixtures("_global_generator_put_back")  # Ray draws from it


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model.safetensors` and `images/`: 40, and one of them is broken."""
    root = tmp_path_factory.mktemp("ray")
    keep_model(root / "model.safetensors")
    write_images(root / "images", {"a": 40})
    (root / "images" / "a" / "007.png").write_bytes(b"torn")
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two machines of one core each, as far as Ray can tell: two raylets with their own workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # Ray's 15 would starve the workers where others compute too
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=1)
        ray.init(address=made.address, log_to_driver=False, logging_level="warning")
        yield made
        ray.shutdown()
        made.shutdown()


def test_a_job_with_a_worker_killed_in_the_middle_makes_the_file_of_one_process(
    bench: Path, cluster: Cluster, tmp_path: Path
) -> None:
    model, images = bench / "model.safetensors", [bench / "images"]
    predict_to_file(model, images, tmp_path / "local.csv", batch=2, top_k=3)
    events, killed = [], []

    def kill_one(done: int, errors: int) -> None:
        if not killed:
            killed.append(int(events[0].split()[1]))
            os.kill(killed[0], signal.SIGKILL)

    done = predict_to_file(
        model, images, tmp_path / "ray.csv", engine="ray", batch=2, top_k=3, progress=kill_one, on_event=events.append
    )
    assert (done.images, done.errors) == (40, 1)
    assert (tmp_path / "ray.csv").read_bytes() == (tmp_path / "local.csv").read_bytes()
    assert f"worker {killed[0]} was lost; what it had goes to another" in events
    assert not list(tmp_path.glob("*.part"))


def test_a_job_begun_here_goes_on_on_a_cluster(bench: Path, cluster: Cluster, tmp_path: Path) -> None:
    model, images = bench / "model.safetensors", [bench / "images"]

    def stop(done: int, errors: int) -> None:
        raise KeyboardInterrupt

    for engine, ending in (("local", "csv"), ("ray", "jsonl")):
        options: dict[str, Any] = {"batch": 4, "top_k": 1}
        with pytest.raises(KeyboardInterrupt):
            predict_to_file(model, images, tmp_path / f"a.{ending}", engine=engine, progress=stop, **options)
        other = "ray" if engine == "local" else "local"
        done = predict_to_file(model, images, tmp_path / f"a.{ending}", engine=other, resume=True, top_k=1)
        assert done.resumed >= 4
        predict_to_file(model, images, tmp_path / f"b.{ending}", **options)
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


class Deadly(Input):
    """An image that kills whoever looks at it, as one that needs more memory than there is."""

    def image(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_batch_that_kills_every_worker_ends_the_job_by_name(bench: Path, cluster: Cluster) -> None:
    model = str(bench / "model.safetensors")
    poisoned = [[Input("good", bench / "images" / "a" / "000.png")], [Deadly("deadly.png", Path("x"))]]
    rows = answers_on_ray(model, poisoned, top_k=1, actors=1, expected=identity(opened_on(model)))
    assert next(rows)[0].path == "good"
    with pytest.raises(UsageError, match=rf"{MOST_LOSSES} workers died over .* from deadly\.png to deadly\.png"):
        next(rows)


def test_another_model_or_none_on_a_worker_ends_the_job(bench: Path, cluster: Cluster) -> None:
    model, batches = str(bench / "model.safetensors"), [[Input("good", bench / "images" / "a" / "000.png")]]
    with pytest.raises(UsageError, match=r"is small .*, but small, PyTorch float32 .* on another machine"):
        next(answers_on_ray(model, batches, top_k=1, actors=1, expected="small (123)"))
    with pytest.raises(UsageError, match=r"no worker could open .*absent\.safetensors"):
        next(answers_on_ray(str(bench / "absent.safetensors"), batches, top_k=1, actors=1, expected="small (123)"))


class FakeActor:
    """Compared by identity, as Ray's handles are."""

    introduced: Any
    judged: Any


class RayInHere:
    """Ray as far as `_Pool` uses it, in this process. A batch with "deadly" kills its actor and all calls it has."""

    class exceptions:
        class RayActorError(Exception):
            pass

        NodeDiedError = OutOfMemoryError = WorkerCrashedError = ObjectLostError = RayActorError

    def __init__(self) -> None:
        self.calls: dict[int, tuple[Any, Any]] = {}

    def remote(self, **options: Any) -> Any:
        def made(worker: Any) -> Any:
            return SimpleNamespace(remote=lambda *arguments: self.actor())

        return made

    def actor(self) -> Any:
        actor = FakeActor()
        actor.introduced = SimpleNamespace(remote=lambda: self.call(actor, ("same", id(actor))))
        actor.judged = SimpleNamespace(remote=lambda items: self.call(actor, [item.name for item in items]))
        return actor

    def call(self, actor: Any, answer: Any) -> int:
        self.calls[len(self.calls)] = actor, answer
        return len(self.calls) - 1

    def wait(self, calls: list[int], num_returns: int) -> tuple[list[int], list[int]]:
        for actor in {id(self.calls[call][0]): self.calls[call][0] for call in calls}.values():
            own = [call for call in calls if self.calls[call][0] is actor]
            if any(self.calls[call][1] == ["deadly"] for call in own):  # even answers that were ready are lost
                for call in own:
                    self.calls[call] = actor, self.exceptions.RayActorError()
        return [min(calls)], []

    def get(self, call: int) -> Any:
        if isinstance(answer := self.calls[call][1], Exception):
            raise answer
        return answer

    def kill(self, actor: Any) -> None:
        pass


def test_a_batch_beside_a_deadly_one_is_not_blamed() -> None:
    pool = _Pool(RayInHere(), 1, ("model", False, 1), "same", lambda event: None)
    batches = [[Input(name, Path("x"))] for name in ("before", "deadly", "after")]
    rows = pool.answers(batches)
    assert next(rows) == ["before"]
    with pytest.raises(UsageError, match="from deadly to deadly"):
        next(rows)
    assert pool.losses[1] == MOST_LOSSES and max(pool.losses[0], pool.losses[2]) <= 1


class Held(Input):
    """An image that is not there before a byte comes through the pipe `gate`."""

    def image(self):
        assert isinstance(self.source, Path)
        with (self.source.parents[2] / "gate").open("rb", buffering=0) as gate:
            gate.read(1)
        return super().image()


def test_a_lost_machine_costs_only_time(bench: Path, cluster: Cluster) -> None:
    """Last, for it takes the second machine away; its actor is asked for again and never gets a place."""
    model, images = str(bench / "model.safetensors"), list(inputs([bench / "images"]))
    engine = opened_on(model)
    wanted = list(answers(engine, batched(images, 1), top_k=2))
    os.mkfifo(bench / "gate")
    gate = os.open(bench / "gate", os.O_RDWR)  # both ends: opening waits for nobody
    events: list[str] = []

    def opened(event: str) -> None:
        events.append(event)
        if sum("is ready" in one for one in events) == 2:
            os.write(gate, b"x")

    held = [[Held(*images[0])], *batched(images[1:], 1)]
    rows = answers_on_ray(model, held, top_k=2, expected=identity(engine), on_event=opened)
    found = [next(rows)]
    processes = [os.pidfd_open(int(event.split()[1])) for event in events]
    second = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
    cluster.remove_node(second, allow_graceful=False)
    assert select.select(processes, [], [], 60)[0], "a worker goes with its machine, in its own time"
    found += rows
    for descriptor in (gate, *processes):
        os.close(descriptor)
    assert found == wanted
    assert sum("was lost" in event for event in events) == 1

"""A search on a Ray cluster of several nodes on this machine: the same trials, whatever dies, however many at once."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from effnet.search.objectives import Objective
from effnet.search.on_ray import on_ray
from effnet.search.records import StudyWarning, Trial, opened
from effnet.search.space import key
from effnet.search.study import Found, Unable, found, search, searching
from effnet.search.task import Task
from effnet.spec import Network
from effnet.value import UsageError
from tests import test_search_study
from tests.conftest import write_images
from tests.test_cli import TINY, refused, run
from tests.test_search_study import TASK, TRIALS, stripped, tabulated

pytestmark = pytest.mark.usefixtures("_global_generator_put_back")  # Ray draws from it

LAGGED = TASK.replace(lag=2)
PATIENCE = 240.0  # seconds that a test waits for what must happen; a busy machine is slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without cores, where the driver is, and two machines of one core: three raylets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # Ray's 15 would starve the workers where others compute too
        # the loss of a machine is noticed in 2 seconds, not 15; one that is only slow has its 10 seconds each time
        quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 400}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
        made = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            made.add_node(num_cpus=1)
        ray.init(address=made.address, log_to_driver=False, logging_level="warning")
        for module in (sys.modules[__name__], test_search_study):  # workers need not import what tests import
            ray.cloudpickle.register_pickle_by_value(module)
        yield made
        for module in (sys.modules[__name__], test_search_study):
            ray.cloudpickle.unregister_pickle_by_value(module)
        ray.shutdown()
        made.shutdown()


def wait(until: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


class Marked:
    """`here`, leaving a mark in a folder at each call; from call `held_from` on it is held while `wait` is there."""

    def __init__(self, folder: Path, deadly: str = "", held_from: int = 1) -> None:
        folder.mkdir()
        self.folder, self.deadly, self.held_from = folder, deadly, held_from

    def __call__(self, network: Network, seed: int, epochs: int) -> float:
        name = f"{key(network)}-{epochs}"
        mark = f"{name}-{ray.get_runtime_context().get_node_id()}-{os.getpid()}"
        (self.folder / mark).touch()
        held = len(self.calls()) >= self.held_from
        while held and (self.folder / "wait").exists():
            (self.folder / f"held {mark}").touch()
            time.sleep(0.02)
        if name == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if network.stages[0].kernel == network.stages[1].kernel == network.stages[2].kernel:
            raise Unpicklable(epochs, "alike")
        return tabulated(network, seed, epochs)

    def calls(self) -> list[list[str]]:
        """For each call: key and epochs, node, process."""
        return [mark.name.rsplit("-", 2) for mark in self.folder.glob("[!h]*-*")]  # keys are hexadecimal


class Unpicklable(Exception):
    """Cannot be made again from its `args`, as pickle does."""

    def __init__(self, epochs: int, word: str) -> None:
        super().__init__(f"no such network: kernels {word}")


def here(network: Network, seed: int, epochs: int) -> float:
    """What `Marked` says, in this process."""
    if network.stages[0].kernel == network.stages[1].kernel == network.stages[2].kernel:
        raise Unpicklable(epochs, "alike")
    return tabulated(network, seed, epochs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The search of one thread in this process."""
    return search(LAGGED, here, tmp_path_factory.mktemp("alone") / "study.db", trials=TRIALS)


def test_threads_make_the_trials_of_one(tmp_path: Path, alone: Found) -> None:
    """The last that is let go is let go first: the order of their ends is no part of the result."""
    started = threading.Semaphore(0)
    lock, calls = threading.Lock(), []

    def evaluate(network: Network, seed: int, epochs: int) -> float:
        with lock:
            calls.append(key(network))
            first = len(calls) == 1
        if first:
            assert started.acquire(timeout=PATIENCE)
        else:
            started.release()
        return here(network, seed, epochs)

    result = search(LAGGED, evaluate, tmp_path / "study.db", trials=TRIALS, at_once=3)
    assert stripped(result.trials) == stripped(alone.trials)
    assert {trial.state for trial in alone.trials} == {"finished", "stopped", "failed"}


def test_a_trial_follows_from_those_that_its_lag_allows(tmp_path: Path) -> None:
    """With a lag of 3, trials 0 to 2 know of nothing; what became of trial 0 first decides trial 3."""
    task = TASK.replace(lag=3, strategy="evolution:population=2,sample=2", rungs=(1,), objectives=(Objective("acc"),))
    codes = []
    for low in (0, 1):  # which of the first two is the bad one
        worst: list[str] = []

        def evaluate(network: Network, seed: int, epochs: int, low: int = low, worst: list[str] = worst) -> float:
            worst.append(key(network))
            return 0.1 if len(worst) - 1 == low else 0.9

        trials = search(task, evaluate, tmp_path / f"{low}.db", trials=5).trials
        codes.append([trial.code for trial in trials])
    assert codes[0][:4] == codes[1][:4] and codes[0][4] != codes[1][4]  # two are a population: 0 and 1 decide trial 4


def test_a_candidate_that_kills_its_workers_has_failed_and_others_go_on(
    cluster: Cluster, tmp_path: Path, alone: Found
) -> None:
    deadly = f"{alone.best.key}-1"
    evaluate = Marked(tmp_path / "marks", deadly)
    with on_ray(retries=1) as tasks:
        result = search(LAGGED, tasks(evaluate), tmp_path / "study.db", trials=TRIALS, at_once=2)
    failed = {trial.key: trial.reason for trial in result.trials if trial.state == "failed"}
    assert failed.pop(alone.best.key).startswith("its worker died 2 times")
    assert set(failed.values()) <= {"Unpicklable: no such network: kernels alike"}
    assert sum(name == deadly for name, _, _ in evaluate.calls()) == 2
    assert len(result.trials) == TRIALS and result.count("running") == 0


def test_a_search_that_is_stopped_lets_go_of_the_cluster_and_goes_on(
    cluster: Cluster, tmp_path: Path, alone: Found
) -> None:
    evaluate, study = Marked(tmp_path / "marks"), tmp_path / "study.db"
    (evaluate.folder / "wait").touch()

    def begin(rest: Iterator[Trial]) -> None:
        with pytest.raises(Unable, match="stopped"):
            next(rest)

    threads = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), on_ray() as tasks:
        rest = searching(LAGGED, tasks(evaluate), study, trials=TRIALS, at_once=2)
        threading.Thread(target=begin, args=(rest,), daemon=True).start()
        wait(lambda: len(evaluate.calls()) == 2)
        raise KeyboardInterrupt
    wait(lambda: set(threading.enumerate()) <= threads)  # nobody waits for what was cancelled
    assert [trial.state for trial in opened(study, LAGGED).trials()] == ["running", "running"]
    (evaluate.folder / "wait").unlink()
    with on_ray() as tasks:
        result = search(LAGGED, tasks(evaluate), study, trials=TRIALS, at_once=2)
    assert stripped(result.trials) == stripped(alone.trials)
    with pytest.raises(Unable, match="stopped"):
        tasks(evaluate)(LAGGED.space.base, 0, 1)


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UsageError, match=rf"no Ray cluster answers at 127\.0\.0\.1:{port}: .*refused"), on_ray():
        pass


def test_what_the_cluster_cannot_give_is_said(cluster: Cluster) -> None:
    with pytest.warns(StudyWarning, match="no machine of the cluster has 1 CPUs and 4 GPUs now"), on_ray(gpus=4):
        pass
    with pytest.raises(UsageError, match="CPUs of a trial is -1"), on_ray(cpus=-1):
        pass


def test_the_command_searches_on_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    data, net = write_images(tmp_path / "images", {"cat": 14, "dog": 14}), tmp_path / "tiny.json"
    net.write_text(TINY.to_json())
    words = ("search", "--data", data, "--baseline", net, "--space", "v2", "--set", "batch=8", "--set", "crop=resize")
    words = (*words, "--epochs", 1, "--strategy", "random", "--trials", 2, "--json")
    words = (*words, "--engine", "ray", "--at-once", 1, "--study", tmp_path / "study.db")
    document = run(*words, "--save", tmp_path / "winner.json").document
    assert {trial["state"] for trial in document["trials"]} == {"finished"}
    table = search(Task.from_dict(document["task"]), tabulated, tmp_path / "table.db", trials=2)
    assert [tuple(trial["code"]) for trial in document["trials"]] == [trial.code for trial in table.trials]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engine", "ray", "--device", "cuda"), "say how many a trial needs, --gpus 1"),
        (("--at-once", 2), "--at-once and --gpus go with --engine ray"),
        (("--gpus", 1), "--at-once and --gpus go with --engine ray"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, words: tuple, message: str) -> None:
    data = write_images(tmp_path / "images", {"cat": 4, "dog": 4})
    assert message in refused("search", "--data", data, "--space", "v2", *words).splitlines()[-1]


def test_a_node_that_is_killed_in_mid_search_loses_no_trial(cluster: Cluster, tmp_path: Path, alone: Found) -> None:
    """Last, for it takes a node away, while that computes. The trials are those of one process without Ray."""
    evaluate, study = Marked(tmp_path / "marks", held_from=7), tmp_path / "study.db"
    (evaluate.folder / "wait").touch()
    nodes = {node.node_id: node for node in cluster.list_all_nodes()}
    killed: list[list[str]] = []
    ended: list[Trial] = []

    def kill() -> None:
        wait(lambda: list(evaluate.folder.glob("held *")))
        ended.extend(trial for trial in opened(study, LAGGED).trials() if trial.state != "running")
        killed.append(next(evaluate.folder.glob("held *")).name.removeprefix("held ").rsplit("-", 2))
        cluster.remove_node(nodes[killed[0][1]], allow_graceful=False)
        (evaluate.folder / "wait").unlink()

    killer = threading.Thread(target=kill, daemon=True)
    with on_ray(retries=5) as tasks:
        assert tasks.room == 2
        killer.start()
        finished = list(searching(LAGGED, tasks(evaluate), study, trials=TRIALS, at_once=2))
        killer.join(PATIENCE)
        wait(lambda: tasks.room == 1)  # the head notices in its own time
    result = found(LAGGED, opened(study, LAGGED).trials())
    assert stripped(result.trials) == stripped(alone.trials) and len(finished) == TRIALS
    assert ended and all(trial in result.trials for trial in ended)
    again = [node for name, node, _ in evaluate.calls() if name == killed[0][0]]
    assert len(again) == 2 and killed[0][1] in again  # what ran there was run again, elsewhere
    assert len(set(again)) == 2

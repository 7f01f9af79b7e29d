"""A run that is killed anywhere and gone on with ends as one that never was: the same bits, alone and on two processes.

`EFFNET_EVERY_STEP=1` kills after every one of the 20 steps and around every save; else a few of them stand for all.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import effnet.train as train
from effnet import checkpoint, cluster
from tests.ranks import ended, together
from tests.test_train import RECIPE, assert_equal_runs, fresh_model, made_splits, stable

# 20 steps in 5 epochs and 4 phases (the head alone, then 12, 14 and 16 px), everything random; a state after steps
# 3, 6, 9, 15 and 18, and after each epoch
PROGRESSIVE = RECIPE.replace(
    head_epochs=1, epochs=4, stages=3, magnitude=(0.0, 5.0), cutmix=(0.0, 0.5), dropout=(0.1, 0.3), drop_path=(0.1, 0.3)
)
STEPS, SAVE_EVERY = 20, 3
Kill = tuple[str, int, int]  # after a "step", or "before" or "after" a save; its number of steps; the process

EVERY = [("step", step, step % 2) for step in range(1, STEPS + 1)] + [
    (moment, step, 0) for moment in ("before", "after") for step in (0, 3, 4, 6, 8, 9, 12, 15, 16, 18, 20)
]
SOME = [("step", 2, 1), ("step", 4, 0), ("step", 7, 1), ("before", 8, 0), ("after", 15, 0), ("step", 20, 1)]
KILLS = EVERY if os.environ.get("EFFNET_EVERY_STEP") else SOME


def learn(out: Path, kill: Kill | None = None, options: dict[str, Any] | None = None) -> None:
    """Trains, or goes on; killed by SIGKILL where `kill` says."""
    moment, at, rank = kill or ("", -1, 0)

    def die_here(now: str, step: int) -> None:
        if (now, step, cluster.rank()) == (moment, at, rank if cluster.world() > 1 else 0):
            os.kill(os.getpid(), signal.SIGKILL)

    save = checkpoint.save

    def watched(path: Path, content: checkpoint.Checkpoint, **keep: Any) -> None:
        if path.name == "last.safetensors":
            die_here("before", content.extra["step"])
        save(path, content, **keep)
        if path.name == "last.safetensors":
            die_here("after", content.extra["step"])

    checkpoint.save = watched
    options = {"save_every": SAVE_EVERY, "workers": 0} | (options or {})
    for event in train.training(made_splits(), fresh_model(), PROGRESSIVE, out, **options):
        if event["event"] == "step":
            die_here("step", event["step"])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a run of so many processes that nobody disturbed."""
    made: dict[int, Path] = {}

    def run(world: int) -> Path:
        if world not in made:
            made[world] = tmp_path_factory.mktemp("unbroken") / str(world)
            together(world, learn, made[world])
        return made[world]

    return run


def test_the_unbroken_run_has_twenty_steps_in_four_phases(unbroken: Callable[[int], Path]) -> None:
    log = stable(unbroken(1))
    assert [event["step"] for event in log if event["event"] == "step"] == list(range(1, STEPS + 1))
    phases = [(event["size_px"], event["head_only"], event["epochs"]) for event in log if event["event"] == "phase"]
    assert phases == [(12, True, 1), (12, False, 1), (14, False, 2), (16, False, 1)]


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: f"{kill[0]}-{kill[1]}")
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(
    unbroken: Callable[[int], Path], tmp_path: Path, world: int, kill: Kill
) -> None:
    """Weights, average, optimizer and log; atol = rtol = 0. Killed before its first state is kept, it begins anew."""
    whole = unbroken(world)
    codes = ended(world, learn, tmp_path, kill)
    victim = kill[2] if world > 1 else 0
    assert codes[victim] == -signal.SIGKILL
    assert all(isinstance(code, cluster.Lost) for rank, code in enumerate(codes) if rank != victim)
    together(world, learn, tmp_path, None, {"resume": kill[:2] != ("before", 0)})
    assert_equal_runs(tmp_path, whole)


def test_the_number_of_workers_does_not_matter(unbroken: Callable[[int], Path], tmp_path: Path) -> None:
    """Views are drawn by (seed, epoch, sample): three threads make what none makes, also after a resume."""
    ended(1, learn, tmp_path, ("step", 14, 0), {"workers": 3})
    together(1, learn, tmp_path, None, {"workers": 3, "resume": True})
    assert_equal_runs(tmp_path, unbroken(1))

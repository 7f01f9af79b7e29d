"""A run fitted into a budget of time or memory, with made-up clocks; what the trainer makes of a batch per phase."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effnet import families, recipes
from effnet import plan as planning
from effnet.optim import renew_norms
from effnet.plan import plan, told, within_time
from effnet.recipes import Recipe, memory, phases
from effnet.value import UsageError
from tests.test_train import NETWORK, RECIPE, events, fresh_model, stable

B0 = families.get("efficientnet_b0")
IMAGES = {"train_images": 1000, "val_images": 100}
LONG = Recipe(name="long", epochs=20, batch=50, stages=2, size_px=(128, 256), warmup=2, head_epochs=1)


def timing(size_px: int, batch: int, train: bool) -> float:
    """1 s for 50 images of 128 px; a third of it without the backward pass."""
    return batch / 50 * (size_px / 128) ** 2 * (1.0 if train else 1 / 3)


def seconds(recipe: Recipe) -> float:
    """By hand: 20 steps an epoch, and two batches of validation at the last size."""
    rows = phases(recipe, B0)
    val = 2 * timing(rows[-1].size_px, 50, False)
    return sum(row.epochs * (20 * timing(row.size_px, 50, not row.head_only) + val) for row in rows)


def fitted(budget_s: float) -> Recipe:
    return within_time(LONG, B0, budget_s, timing=timing, **IMAGES)


def test_a_budget_that_is_enough_changes_nothing() -> None:
    assert fitted(seconds(LONG) / 0.9 + 1e-6) == LONG
    assert told(LONG, LONG, B0) == "everything fits into the time budget"


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3, 0.26, 0.2, 0.1, 0.08])
def test_what_fits_is_the_largest_size_with_the_most_epochs(share: float) -> None:
    """Against all recipes that may be tried, in the order of preference."""
    budget_s = share * seconds(LONG) / 0.9
    found = fitted(budget_s)
    assert found == fitted(budget_s)
    assert seconds(found) <= 0.9 * budget_s
    options = [
        LONG.replace(epochs=epochs, warmup=2 * epochs / 20, size_px=(max(64, round(128 * s)), round(256 * s)))
        for s, epochs in itertools.product((1, 0.875, 0.75, 0.625, 0.5), range(20, 4, -1))
    ]
    assert found == next(option for option in options if seconds(option) <= 0.9 * budget_s)
    assert f"{found.epochs} of 20 epochs" in told(LONG, found, B0)


def test_epochs_are_given_up_before_pixels() -> None:
    least = LONG.replace(epochs=5, warmup=0.5)
    assert fitted(seconds(least) / 0.9 + 1e-6).size_px == (128, 256)
    smaller = fitted(seconds(least) / 0.9 - 1)
    assert smaller.size_px == (112, 224)
    assert "at 112-224 px instead of 128-256" in told(LONG, smaller, B0)


def test_an_impossible_budget_names_the_least_time() -> None:
    least = LONG.replace(epochs=5, warmup=0.5, size_px=(64, 128))
    needed = math.ceil(seconds(least) / 0.9)
    words = f"5 of 20 epochs at 64-128 px, .* take {needed // 60} min {needed % 60:02d} s"
    with pytest.raises(UsageError, match=words):
        fitted(1)
    assert fitted(needed).epochs == 5


def test_sizes_stay_at_64_px_and_above_the_stride() -> None:
    tiny = LONG.replace(size_px=(48, 96), eval_px=128)
    found = within_time(tiny, B0, 60, timing=timing, **IMAGES)
    assert found.size_px and found.size_px[0] == 48 and found.size_px[1] >= 64
    assert found.eval_px and found.eval_px >= 64


def test_a_phase_that_the_machine_cannot_hold_is_refused_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = 10**6
    monkeypatch.setattr(planning, "memory_bytes", lambda device: limit)
    recipe = RECIPE.replace(batch=36)
    with pytest.raises(
        UsageError, match=r"cpu: the phase at 1\d px with batch 36 takes about .* batch (\d+) would fit"
    ):
        plan(fresh_model(), recipe, classes=("a", "b"), train_images=36, val_images=4)
    size = next(p.size_px for p in phases(recipe, NETWORK) if memory(recipe, NETWORK, p.size_px, 36) > limit)
    fits = recipes.fitting_batch(recipe, NETWORK, size, limit)
    assert memory(recipe, NETWORK, size, fits) <= limit < memory(recipe, NETWORK, size, fits + 1)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UsageError, match="recipe batch is 37, but there are 36 images"):
        plan(fresh_model(), RECIPE.replace(batch=37), classes=("a", "b"), train_images=36, val_images=4)


def batch_by_memory(batch: int) -> Recipe:
    """A limit under which the last phase takes `batch` images, and the first, smaller one more."""
    recipe = RECIPE.replace(epochs=2, warmup=0)
    limit = memory(recipe, NETWORK, 16, batch) + 1
    return recipe.replace(memory_gb=limit / 1e9)


def test_a_run_with_a_batch_per_phase_scales_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "LEAST_STEPS", 2)
    recipe = batch_by_memory(5)
    batches = [phase.batch for phase in phases(recipe, NETWORK, 36)]
    assert batches[1] == 5 < batches[0]
    events(tmp_path, recipe)
    steps = [event for event in stable(tmp_path) if event["event"] == "step"]
    counts = [36 // batch for batch in batches]
    assert [event["phase"] for event in steps] == [0] * counts[0] + [1] * counts[1]
    progress = [(i + j / counts[i]) / 2 for i in range(2) for j in range(counts[i])]
    factors = [(1 + math.cos(math.pi * p)) / 2 for p in progress]
    wanted = [0.01 * batches[event["phase"]] / 8 * factor for event, factor in zip(steps, factors, strict=True)]
    assert [event["lr"] for event in steps] == pytest.approx(wanted)


def test_renewed_statistics_are_the_plain_mean_over_the_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.01), nn.Dropout(0.5))
    batches = [torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(i)) + i for i in range(3)]
    renew_norms(model.train(), iter(batches))
    norm: Any = model[0]
    assert torch.allclose(norm.running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0), atol=1e-5)
    assert norm.momentum == 0.01 and model.training and norm.training


def test_a_run_can_renew_its_statistics_before_each_evaluation(tmp_path: Path) -> None:
    events(tmp_path, RECIPE.replace(epochs=1, stages=1, norm_batches=2))
    assert [event["epoch"] for event in stable(tmp_path) if event["event"] == "epoch"] == [0]

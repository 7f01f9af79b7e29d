"""The loop: it learns, it resumes bit for bit, it stops when asked, and it never loses what it had."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import effnet.train as train
from effnet import checkpoint
from effnet.network import Model, build
from effnet.plan import check_disk, plan, run_preprocess, steps_per_epoch
from effnet.recipes import Recipe, Schedule
from effnet.samples import ArrayPixels, Source, Splits, labelled
from effnet.spec import Head, Network, Preprocess, Stage, Stem
from effnet.value import UsageError

CLASSES = ("dark", "light")
NETWORK = Network(
    name="tiny",
    stem=Stem(width=8),
    stages=(
        Stage(op="mbconv", repeats=1, width=8, stride=1, expand=1, se=0.25),
        Stage(op="fused", repeats=2, width=16, stride=2, expand=2),
    ),
    head=Head(width=32, classes=2),
    resolution=16,
    preprocess=Preprocess(size=16, resize=16),
    dropout=0.1,
    drop_path=0.1,
)
RECIPE = Recipe(
    name="test", epochs=4, stages=2, batch=8, lr=0.01, lr_batch=8, warmup=1, ema=0.9, crop="dihedral", size_px=(12, 16),
    mixup=(0.0, 0.2), label_smoothing=0.1, precision="float32",
)  # fmt: skip


def made_source(name: str, count: int, seed: int) -> Source:
    """Noise, dark or light: half of each, learnable in a few steps."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pixels = rng.integers(0, 120, (count, 20, 20)) + 130 * labels[:, None, None]
    ids = [f"{name}/{i}" for i in range(count)]
    return labelled(name, ArrayPixels(array=pixels.astype(np.uint8)), ids, labels.tolist(), CLASSES)


def made_splits(classes: tuple[str, ...] = CLASSES) -> Splits:
    parts = {name: replace(made_source(name, n, n), classes=classes) for name, n in (("train", 36), ("val", 12))}
    return Splits(train=parts["train"], val=parts["val"], test=None, classes=classes, name="made", note="made in code")


def fresh_model() -> Model:
    return build(NETWORK, generator=torch.Generator().manual_seed(0))


def events(out: Path, recipe: Recipe = RECIPE, **options: Any) -> list[train.Event]:
    return list(train.training(made_splits(), fresh_model(), recipe, out, **options))


def stable(out: Path) -> list[dict[str, Any]]:
    """The log without what a clock decides and without the starts and stops of processes."""
    kept = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    clocks = ("images_per_s", "wait_ms", "step_ms", "seconds")
    return [{k: v for k, v in e.items() if k not in clocks} for e in kept if e["event"] not in ("start", "stop", "end")]


def tensors(out: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(out / f"{name}.safetensors").tensors)


def assert_equal_runs(left: Path, right: Path) -> None:
    for name in ("last", "best"):
        ours, theirs = tensors(left, name), tensors(right, name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert stable(left) == stable(right)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    events(out)
    return out


def test_training_learns_and_leaves_a_model_to_use(whole_run: Path) -> None:
    kept = checkpoint.load(whole_run / "best.safetensors")
    assert kept.metrics["accuracy"] > 0.9
    assert kept.labels == CLASSES
    assert kept.extra["note"] == "made in code"
    images = torch.randn(2, 3, 16, 16)
    assert checkpoint.to_model(kept)(images).shape == (2, 2)


def test_the_log_has_every_step_with_its_phase_and_rate(whole_run: Path) -> None:
    steps = [event for event in stable(whole_run) if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 17))  # 4 epochs of 36 // 8 steps
    assert [event["phase"] for event in steps] == [0] * 8 + [1] * 8
    peak, warm = 0.01, [event["lr"] for event in steps[:3]]
    assert warm == pytest.approx([peak * (i + 1) / 4 for i in range(3)])
    assert steps[-1]["lr"] == pytest.approx(peak * (1 + math.cos(math.pi * 15 / 16)) / 2)


@pytest.mark.parametrize("last_step", [1, 3, 4, 6, 9, 13, 15])
def test_a_killed_run_resumes_bit_for_bit(whole_run: Path, tmp_path: Path, last_step: int) -> None:
    """Nothing is saved on the way out: as after SIGKILL, the run goes on from its last finished epoch, or anew."""
    running = train.training(made_splits(), fresh_model(), RECIPE, tmp_path)
    next(event for event in running if event.get("step") == last_step)
    running.close()
    events(tmp_path, resume=True)
    assert_equal_runs(tmp_path, whole_run)


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd", "muon"])
def test_each_optimizer_is_gone_on_with(tmp_path: Path, optimizer: Any) -> None:
    recipe = RECIPE.replace(optimizer=optimizer)
    events(tmp_path / "whole", recipe)
    running = train.training(made_splits(), fresh_model(), recipe, tmp_path / "cut")
    next(event for event in running if event.get("step") == 11)
    running.close()
    events(tmp_path / "cut", recipe, resume=True)
    assert_equal_runs(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("last_step", [2, 4, 11])
def test_a_signal_saves_after_the_step_and_the_run_goes_on(
    whole_run: Path, tmp_path: Path, last_step: int, number: int
) -> None:
    with pytest.raises(train.Interrupted, match="--resume") as stopped:
        for event in train.training(made_splits(), fresh_model(), RECIPE, tmp_path):
            if event["event"] == "step" and event["step"] == last_step:
                os.kill(os.getpid(), number)
    assert stopped.value.signal == number
    assert checkpoint.load(tmp_path / "last.safetensors").extra["step"] in (last_step, last_step + 1)
    events(tmp_path, resume=True)
    assert_equal_runs(tmp_path, whole_run)


def test_the_number_of_workers_does_not_matter(whole_run: Path, tmp_path: Path) -> None:
    events(tmp_path, workers=0)
    assert_equal_runs(tmp_path, whole_run)


def test_a_head_only_phase_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    recipe = RECIPE.replace(head_epochs=1, epochs=1, stages=1)
    before = {name: tensor.clone() for name, tensor in fresh_model().state_dict().items()}
    for event in train.training(made_splits(), fresh_model(), recipe, tmp_path):
        if event["event"] == "epoch" and event["epoch"] == 0:
            break
    after = tensors(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_early_stopping_ends_the_run(tmp_path: Path) -> None:
    # from the first epoch on everything is right: no epoch is better
    recipe = RECIPE.replace(epochs=30, stages=1, size_px=(16, 16), patience=2, lr=0.02, ema=0.0, mixup=(0, 0))
    kinds = [event["event"] for event in events(tmp_path, recipe)]
    assert kinds.count("epoch") < 30
    assert kinds[-2:] == ["early_stop", "end"]
    again = [event["event"] for event in events(tmp_path, recipe, resume=True)]
    assert again == ["start", "early_stop", "end"]  # a run that has ended stays ended


def test_a_run_folder_is_never_overwritten(whole_run: Path) -> None:
    with pytest.raises(UsageError, match="already holds a run"):
        events(whole_run)


@pytest.mark.parametrize(
    ("recipe", "splits", "message"),
    [
        (RECIPE.replace(lr=0.5), made_splits(), "another recipe"),
        (RECIPE, made_splits(("light", "dark")), "another class list"),
        (RECIPE, replace(made_splits(), train=made_source("train", 35, 1)), "another training data"),
    ],
)
def test_resuming_something_else_is_refused(whole_run: Path, recipe: Recipe, splits: Splits, message: str) -> None:
    before = (whole_run / "log.jsonl").read_text()
    with pytest.raises(UsageError, match=message):
        list(train.training(splits, fresh_model(), recipe, whole_run, resume=True))
    assert (whole_run / "log.jsonl").read_text() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0] * 5 + [math.nan])
    computed = train.weighted_cross_entropy
    monkeypatch.setattr(train, "weighted_cross_entropy", lambda *given: computed(*given) * next(losses))
    with pytest.raises(train.Diverged, match=r"the loss became nan at step 6: lower lr"):
        events(tmp_path, retries=0)
    assert checkpoint.load(tmp_path / "last.safetensors").extra["step"] == 4


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves of the second epoch fail; the run goes on, says so, and the file of the first epoch is intact meanwhile."""
    save, calls = checkpoint.save, []

    def failing(path: Path, content: checkpoint.Checkpoint, **options: Any) -> None:
        calls.append(path)
        if content.extra["step"] == 8:
            raise checkpoint.CheckpointError(f"{path} could not be written: no space left on device")
        save(path, content, **options)

    monkeypatch.setattr(checkpoint, "save", failing)
    happened = events(tmp_path)
    failed = [event for event in happened if event.get("save_failed")]
    assert [event["step"] for event in failed] == [8]
    assert "no space left" in failed[0]["save_failed"][0]
    assert happened[-1]["event"] == "end"


def test_weighted_cross_entropy_is_pytorchs_where_both_are_defined() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 3, generator=generator)
    labels = torch.randint(0, 3, (7,), generator=generator)
    class_weights = torch.tensor([0.5, 1.0, 2.0])
    targets = nn.functional.one_hot(labels, 3).float()
    ours = train.weighted_cross_entropy(logits, targets, class_weights[labels])
    assert torch.allclose(ours, nn.functional.cross_entropy(logits, labels, weight=class_weights))
    smooth = train.weighted_cross_entropy(logits, targets, torch.ones(7), smoothing=0.1)
    assert torch.allclose(smooth, nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))
    soft = torch.softmax(torch.randn(7, 3, generator=generator), dim=1)
    assert torch.allclose(
        train.weighted_cross_entropy(logits, soft, torch.ones(7)), nn.functional.cross_entropy(logits, soft)
    )


def test_a_plan_counts_steps_and_chooses_a_precision() -> None:
    todo = plan(fresh_model(), RECIPE.replace(precision="auto"), classes=CLASSES, train_images=36, val_images=12)
    assert [row.steps for row in todo.rows] == [8, 8]
    assert [row.phase.size_px for row in todo.rows] == [12, 16]
    assert todo.precision in ("float32", "bfloat16")
    assert todo.seconds > 0
    assert type(todo).from_json(todo.to_json()) == todo


def test_a_plan_does_not_touch_the_model() -> None:
    model = fresh_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan(model, RECIPE, classes=CLASSES, train_images=36, val_images=12)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_steps_drop_what_does_not_fill_a_batch_unless_nothing_does() -> None:
    assert [steps_per_epoch(n, 8) for n in (36, 40, 8, 7, 1)] == [4, 5, 1, 1, 1]


def test_a_disk_that_is_too_small_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="MB free; this run writes about"):
        check_disk(tmp_path, 10**18)


def test_recipes_that_never_crop_are_judged_on_the_whole_image() -> None:
    whole = run_preprocess(NETWORK, RECIPE)
    assert (whole.method, whole.size, whole.resize) == ("squash", 16, 16)
    cropped = run_preprocess(NETWORK, RECIPE.replace(crop="inception", eval_px=20, schedule=Schedule(kind="linear")))
    assert (cropped.method, cropped.size) == ("resize_crop", 20)


def test_frozen_stages_keep_their_weights_and_the_rest_learns(tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in fresh_model().state_dict().items()}
    events(tmp_path, RECIPE.replace(epochs=1, stages=1, freeze=1))
    after = tensors(tmp_path)
    weights = [name for name, tensor in before.items() if tensor.ndim == 4]
    kept = {name for name in weights if torch.equal(before[name], after[name])}
    assert kept == {name for name in weights if name.startswith(("stem.", "stages.0."))}


def test_freezing_more_stages_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recipe freeze is 3, but tiny has 2 stages"):
        events(tmp_path / "run", RECIPE.replace(freeze=3))
    assert not (tmp_path / "run").exists()


def test_batch_norm_follows_the_momentum_of_the_recipe(tmp_path: Path) -> None:
    """After one step from zero the running mean is the momentum times the mean of the batch."""
    means = {}
    for momentum in (0.05, 0.5):
        recipe = RECIPE.replace(norm_momentum=momentum, ema=0.0, epochs=1, stages=1, batch=36, mixup=(0, 0))
        events(tmp_path / str(momentum), recipe)
        means[momentum] = tensors(tmp_path / str(momentum))["stem.norm.running_mean"]
    assert means[0.05].abs().max() > 0
    assert torch.allclose(10 * means[0.05], means[0.5])

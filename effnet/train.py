"""How does a network learn? One loop, top to bottom: plan, start or resume, and for each phase, epoch and step, learn.

`training` yields an event (a dict, also a line of `log.jsonl`) whenever something happened; whoever iterates draws the
progress. `train` simply runs it to the end. Only the model and `State` change; everything else is a value.

A run is a function of (data, network, recipe): the order of samples, augmentation, dropout and drop path of a step are
keyed by (seed, epoch, step), never by what ran before, so a resumed run continues with the very same numbers.
"""

import datetime
import functools
import json
import os
import signal
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effnet import augment, checkpoint, data, native
from effnet.evaluate import evaluate
from effnet.images import normalise
from effnet.network import Model, replace_head
from effnet.optim import Average, load_optimizer_tensors, optimizer, optimizer_tensors, renew_norms, set_learning
from effnet.plan import Plan, check_disk, environment, plan, precision_context
from effnet.recipes import Phase, Place, Recipe, for_images, places, rate
from effnet.samples import Splits
from effnet.value import UsageError

Event = dict[str, Any]


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM) and has saved; `signal` says by what."""

    def __init__(self, number: int, out: Path) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}; saved. Go on with the same command and --resume (run folder {out}).")
        self.signal = number


class Diverged(UsageError):
    """The loss is no longer finite."""


@dataclass
class State:
    """All that changes while training."""

    model: Model
    average: Average[Model] | None
    optimizer: torch.optim.Optimizer
    step: int = 0  # finished steps of the whole run
    best: float = -float("inf")
    best_epoch: int = -1
    since_best: int = 0
    cache: data.Cache = field(default_factory=data.Cache)  # decoded training images
    losses: list[float] = field(default_factory=list)  # of the epoch under way

    @property
    def evaluated(self) -> Model:
        """The model that is judged and kept: the average of the weights, where there is one."""
        return self.average.model if self.average is not None else self.model


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What `train` returns: the run folder, the best epoch and its validation metrics."""

    out: Path
    best_epoch: int
    metrics: dict[str, Any]
    seconds: float


def train(splits: Splits, model: Model, recipe: Recipe, out: Path, **options: Any) -> Outcome:
    """Trains to the end; the options are those of `training`. Raises what `training` raises."""
    *_, last = training(splits, model, recipe, out, **options)
    return Outcome(out=Path(out), best_epoch=last["best_epoch"], metrics=last["metrics"], seconds=last["seconds"])


def training(
    splits: Splits,
    model: Model,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    weights: str = "",
) -> Iterator[Event]:
    """Trains `model` on `splits.train`, judges it on `splits.val` after each epoch, and yields what happens.

    Writes `out/plan.json`, `recipe.json`, `log.jsonl`, `last.safetensors` (resume) and `best.safetensors` (use).
    `model` gets a fresh classifier when its labels are not the data's classes. `UsageError`: `out` already holds a run
    and `resume` is false, the data or recipe changed since, no validation data. `Interrupted` after SIGINT or SIGTERM.
    `weights` is what `model` started from, for the log only.
    """
    started = time.perf_counter()
    if device == "cpu":
        native.keep_freed_memory()
    out = Path(out)
    if splits.val is None or len(splits.val) == 0:
        raise UsageError(f"{splits.name} has no validation images: add a val folder or keep val_fraction above 0.")
    if model.labels != splits.classes:
        model = replace_head(model, splits.classes)
        # From zero all classes start equal; the published range 1/sqrt(classes) is far too wide for a handful of them.
        nn.init.zeros_(model.classifier.weight)
    recipe = for_images(recipe, len(splits.train))
    todo, state = (_resumed if resume else _started)(splits, model, recipe, out, device)
    log = functools.partial(_logged, out)
    yield log(_start_event(splits, todo, state, device, weights))
    with _signals() as stop:
        for place in places(todo.phases, todo.train_images, state.step):
            if recipe.patience and state.since_best >= recipe.patience:
                yield log({"event": "early_stop", "step": state.step, "patience": recipe.patience})
                break
            yield from map(log, _phase_events(todo, state, place))
            end = state.step - place.step_in_epoch + place.steps
            yield from map(log, _epoch(splits, todo, state, place, stop, device, workers))
            finished = state.step == end
            if finished:
                yield log(_end_of_epoch(splits, todo, state, place, out, device))
            if stop:
                if not finished:
                    _save(out, todo, state, splits)
                yield log({"event": "stop", "step": state.step, "signal": stop[0]})
                raise Interrupted(stop[0], out)
    seconds = round(time.perf_counter() - started, 2)
    kept = checkpoint.load(out / "best.safetensors")
    yield log({"event": "end", "best_epoch": state.best_epoch, "metrics": dict(kept.metrics), "seconds": seconds})


# --- start and resume -----------------------------------------------------------------------------------------------


def _started(splits: Splits, model: Model, recipe: Recipe, out: Path, device: str) -> tuple[Plan, State]:
    if (out / "last.safetensors").exists():
        raise UsageError(f"{out} already holds a run: go on with --resume, or choose another --out.")
    todo = plan(
        model,
        recipe,
        classes=splits.classes,
        train_images=len(splits.train),
        val_images=len(splits.val or ()),
        device=device,
    )
    out.mkdir(parents=True, exist_ok=True)
    check_disk(out, todo.disk_bytes)
    (out / "plan.json").write_text(todo.to_json())
    (out / "recipe.json").write_text(recipe.to_json())
    (out / "log.jsonl").write_text("")
    return todo, _fresh_state(model, todo, device)


def _fresh_state(model: Model, todo: Plan, device: str) -> State:
    model.network = todo.network.replace(preprocess=todo.preprocess, resolution=todo.preprocess.size)
    if todo.recipe.norm_momentum is not None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = todo.recipe.norm_momentum
    model = model.to(device, memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
    average = Average(model, todo.recipe.ema) if todo.recipe.ema else None
    return State(model=model, average=average, optimizer=optimizer(model, todo.recipe))


def _resumed(splits: Splits, model: Model, recipe: Recipe, out: Path, device: str) -> tuple[Plan, State]:
    """The state after the last saved step. The plan is the saved one: precision and phases do not change under way."""
    path = out / "last.safetensors"
    if not path.exists():
        raise UsageError(f"nothing to resume: {path} does not exist.")
    saved = checkpoint.load(path)
    todo = Plan.from_json((out / "plan.json").read_text())
    for what, before, now in (
        ("class list", list(saved.labels or ()), list(splits.classes)),
        ("training data", saved.extra["fingerprint"], splits.train.fingerprint()),
        ("recipe", saved.recipe, recipe.to_dict()),
        ("network", saved.network.stages, model.network.stages),
    ):
        if json.dumps(before, default=str) != json.dumps(now, default=str):
            raise UsageError(f"{out} was started with another {what}: then {before}, now {now}.")
    state = _fresh_state(model, todo, device)
    state.model.load_state_dict(saved.state("raw") or saved.weights)
    if state.average is not None:
        state.average.model.load_state_dict(saved.weights)
    state.step, state.losses = saved.extra["step"], saved.extra["losses"]
    state.best, state.best_epoch, state.since_best = (saved.extra[k] for k in ("best", "best_epoch", "since_best"))
    if state.step:
        phase = next(places(todo.phases, todo.train_images, state.step - 1)).phase
        state.optimizer = optimizer(state.model, todo.recipe, head_only=phase.head_only)
        load_optimizer_tensors(state.model, state.optimizer, saved.state("optimizer"))
    _keep_log(out / "log.jsonl", state.step)
    return todo, state


def _keep_log(path: Path, step: int) -> None:
    """Drops what was logged after the saved step: it will happen again."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # torn by a kill
            break
        if event.get("step", 0) > step or (event["event"] in ("phase", "early_stop") and event["step"] == step):
            break
        kept.append(line + "\n")
    path.write_text("".join(kept))


# --- learning -------------------------------------------------------------------------------------------------------


def _epoch(
    splits: Splits, todo: Plan, state: State, place: Place, stop: list[int], device: str, workers: int | None
) -> Iterator[Event]:
    """The steps of one epoch that are not yet done. Ends early, at a step's end, when `stop` was filled by a signal."""
    recipe, phase = todo.recipe, place.phase
    balance = splits.train.balance() if recipe.balance else np.ones(len(splits.classes), np.float32)
    class_weights = torch.from_numpy(balance).to(device)
    _prepare(state, phase, recipe.freeze)
    source = data.batches(
        splits.train,
        size_px=phase.size_px,
        batch=phase.batch,
        preprocess=todo.preprocess,
        train=True,
        crop=recipe.crop,
        least_area=recipe.least_area,
        policy=recipe.policy,
        magnitude=phase.magnitude,
        seed=recipe.seed,
        epoch=place.epoch,
        start_step=place.step_in_epoch,
        workers=workers,
        on_error=recipe.on_error,
        soft=recipe.soft_targets,
        cache=state.cache,
    )
    clock = time.perf_counter()
    for batch in source:
        arrived = time.perf_counter()
        lr = _set_rate(state, todo)
        loss = _step(state, todo, phase, batch, class_weights, device)
        state.step += 1
        state.losses.append(loss)
        now = time.perf_counter()
        for name, reason in batch.skipped:
            yield {"event": "skip", "step": state.step, "image": name, "reason": reason}
        yield {
            "event": "step",
            "step": state.step,
            "epoch": place.epoch,
            "phase": phase.index,
            "loss": round(loss, 6),
            "lr": lr,
            "images_per_s": round(len(batch.labels) / (now - clock), 2),
            "wait_ms": round(1e3 * (arrived - clock), 2),
            "step_ms": round(1e3 * (now - clock), 2),
        }
        if stop:
            return
        clock = time.perf_counter()


def _prepare(state: State, phase: Phase, freeze: int) -> None:
    """Sets what a phase decides: what learns, dropout, drop path; batch norm is frozen while the head learns alone."""
    set_learning(state.model, freeze=freeze, head_only=phase.head_only)
    state.model.set_regularisation(dropout=phase.dropout, drop_path=phase.drop_path)
    state.model.train(not phase.head_only)


def _set_rate(state: State, todo: Plan) -> float:
    """The learning rate of the next step, set on the optimizer."""
    lr = rate(todo.recipe, next(places(todo.phases, todo.train_images, state.step)))
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    return lr


def _step(state: State, todo: Plan, phase: Phase, batch: data.Batch, class_weights: Tensor, device: str) -> float:
    """One update. Everything random in it is keyed by the seed and the step."""
    torch.manual_seed(_key(todo.recipe.seed, state.step))
    images = normalise(batch.images.to(device), todo.preprocess)
    targets = batch.targets.to(device)
    mixing = np.random.default_rng((todo.recipe.seed, state.step))
    images, targets = augment.mix(images, targets, mixup_alpha=phase.mixup, cutmix_alpha=phase.cutmix, rng=mixing)
    weights = batch.weights.to(device) * class_weights[batch.labels.to(device)]
    with precision_context(todo.precision, device):
        logits = state.model(images)
    loss = weighted_cross_entropy(logits.float(), targets, weights, todo.recipe.label_smoothing)
    value = loss.item()
    if value != value or value in (float("inf"), -float("inf")):
        raise Diverged(
            f"the loss became {value} at step {state.step + 1}: lower lr (now {todo.recipe.lr:g}); the last "
            "saved epoch is intact."
        )
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.optimizer.step()
    if state.average is not None:
        if phase.head_only:
            state.average.reset()
        else:
            state.average.update(state.step)
    return value


def _key(seed: int, step: int) -> int:
    """One 63-bit number for (seed, step)."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % (1 << 63)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """The weighted mean over the batch of the cross-entropy with soft `targets` (N, K), smoothed towards uniform."""
    targets = targets * (1 - smoothing) + smoothing / targets.shape[1]
    losses = -(targets * nn.functional.log_softmax(logits, dim=1)).sum(dim=1)  # (N, K) -> (N,)
    return (losses * weights).sum() / weights.sum()


# --- judging and keeping --------------------------------------------------------------------------------------------


def _phase_events(todo: Plan, state: State, place: Place) -> Iterator[Event]:
    """A new optimizer and the event where a phase begins that changes what learns."""
    first = sum(row.phase.epochs for row in todo.rows[: place.phase.index])
    if place.epoch != first or place.step_in_epoch:
        return
    before = todo.rows[place.phase.index - 1].phase if place.phase.index else None
    if before is None or before.head_only != place.phase.head_only:
        state.optimizer = optimizer(state.model, todo.recipe, head_only=place.phase.head_only)
    yield {"event": "phase", "step": state.step, **place.phase.to_dict()}


def _end_of_epoch(splits: Splits, todo: Plan, state: State, place: Place, out: Path, device: str) -> Event:
    """Judges the epoch on the validation images, keeps the best model and the state to go on from."""
    clock = time.perf_counter()
    assert splits.val is not None
    if todo.recipe.norm_batches:
        _renew_norms(splits, todo, state, place, device)
    with precision_context(todo.precision, device):
        judged = evaluate(state.evaluated, splits.val, batch=todo.recipe.batch, device=device, bootstrap=0)
    value = score(judged.metrics, todo.recipe)
    better = value >= state.best  # of equals the later one: it has seen more
    state.since_best = 0 if value > state.best else state.since_best + 1
    train_loss = sum(state.losses) / len(state.losses)
    event = {
        "event": "epoch",
        "step": state.step,
        "epoch": place.epoch,
        "phase": place.phase.index,
        "size_px": place.phase.size_px,
        "train_loss": round(train_loss, 6),
        "val": judged.metrics,
        "best": better,
        "seconds": round(time.perf_counter() - clock, 2),
    }
    if better:
        state.best, state.best_epoch = value, place.epoch
        _write(out / "best.safetensors", _checkpoint(todo, state, splits, judged.metrics, resumable=False), event)
    state.losses = []
    _write(out / "last.safetensors", _checkpoint(todo, state, splits, judged.metrics, resumable=True), event)
    return event


def _renew_norms(splits: Splits, todo: Plan, state: State, place: Place, device: str) -> None:
    """Batch norm's statistics of the judged model, over training images prepared as the validation images are."""
    recipe = todo.recipe
    drawn = data.order(len(splits.train), seed=recipe.seed, epoch=place.epoch, batch=recipe.batch)
    some = splits.train.subset(drawn[: recipe.norm_batches].ravel())
    source = data.batches(
        some,
        size_px=todo.preprocess.size,
        batch=recipe.batch,
        preprocess=todo.preprocess,
        train=False,
        on_error=recipe.on_error,
    )
    with precision_context(todo.precision, device):
        renew_norms(state.evaluated, (normalise(batch.images.to(device), todo.preprocess) for batch in source))


def score(metrics: dict[str, Any], recipe: Recipe) -> float:
    """What makes an epoch better than another: (weighted, where samples have weights) accuracy, or minus NLL."""
    if recipe.monitor == "nll":
        return -metrics["nll"]
    return metrics.get("weighted_accuracy", metrics["accuracy"])


def _save(out: Path, todo: Plan, state: State, splits: Splits) -> None:
    """The state in the middle of an epoch, when a signal asked for it."""
    checkpoint.save(out / "last.safetensors", _checkpoint(todo, state, splits, {}, resumable=True), keep_previous=True)


def _write(path: Path, content: checkpoint.Checkpoint, event: Event) -> None:
    """Saves; when that fails (a full disk) the run goes on, the old file is intact and the event says so."""
    try:
        checkpoint.save(path, content, keep_previous=path.name.startswith("last"))
    except UsageError as error:
        event.setdefault("save_failed", []).append(str(error))


def _checkpoint(
    todo: Plan, state: State, splits: Splits, metrics: dict[str, Any], *, resumable: bool
) -> checkpoint.Checkpoint:
    """The model that is judged; and, to go on from, the raw weights, the optimizer and the place."""
    extra: dict[str, Any] = {"step": state.step, "data": splits.name, "note": splits.note}
    tensors: dict[str, Tensor] = {}
    if resumable:
        if state.average is not None:
            tensors |= {f"raw/{name}": tensor for name, tensor in state.model.state_dict().items()}
        slots = optimizer_tensors(state.model, state.optimizer)
        tensors |= {f"optimizer/{name}": tensor for name, tensor in slots.items()}
        extra |= {
            "best": state.best,
            "best_epoch": state.best_epoch,
            "since_best": state.since_best,
            "losses": state.losses,
            "fingerprint": splits.train.fingerprint(),
        }
    return checkpoint.from_model(
        state.evaluated, recipe=todo.recipe.to_dict(), metrics=metrics, extra=extra, state=tensors
    )


# --- signals and log ------------------------------------------------------------------------------------------------


@contextmanager
def _signals() -> Generator[list[int]]:
    """Within, SIGINT and SIGTERM only leave their number in the list; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller's handlers stay
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _logged(out: Path, event: Event) -> Event:
    """The event, once it stands in the log."""
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(event) + "\n")
    return event


def _start_event(splits: Splits, todo: Plan, state: State, device: str, weights: str) -> Event:
    return {
        "event": "start",
        "step": state.step,
        "data": splits.name,
        "note": splits.note,
        "fingerprint": splits.train.fingerprint(),
        "classes": list(splits.classes),
        "images": {"train": len(splits.train), "val": len(splits.val or ()), "test": len(splits.test or ())},
        "weights": weights,
        "precision": todo.precision,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment(device),
        "pid": os.getpid(),
    }

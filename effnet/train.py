"""How does a network learn? One loop, top to bottom: plan, start or resume, and for each phase, epoch and step, learn.

`training` yields an event (a dict, also a line of `log.jsonl`) whenever something happened; whoever iterates draws the
progress. `train` simply runs it to the end. Only the model and `State` change; everything else is a value.

A run is a function of (data, network, recipe): the order of samples, augmentation, dropout and drop path of a step are
keyed by (seed, epoch, step, place in the batch), never by what ran before or by who computes it. So a resumed run
continues with the very same numbers, and several processes (`cluster`) share one batch as if they were one.
"""

import datetime
import itertools
import math
import os
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effnet import augment, checkpoint, cluster, data, native
from effnet.evaluate import Unfinished, evaluate
from effnet.images import ImageError, normalise
from effnet.journal import Event, Journal
from effnet.network import Model, replace_head
from effnet.optim import optimizer, renew_norms, set_learning
from effnet.plan import Plan, check_disk, environment, plan, precision_context
from effnet.recipes import Phase, Place, Recipe, for_images, places, rate
from effnet.samples import Source, Splits
from effnet.state import BEST, LAST, State, content, exists, find, fresh, refuse_other, restore, write
from effnet.value import UsageError, check_range

EXPLODED = 50.0  # a loss of so many times that of guessing, ln K, has diverged although it is finite
SLOWER = 0.5  # each time a run goes back after it diverged, its learning rate is multiplied by this
RETRIES = 3


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM) and has saved; `signal` says by what."""

    def __init__(self, number: int, out: Path) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}; saved. Go on with the same command and --resume (run folder {out}).")
        self.signal = number


class Diverged(UsageError):
    """The loss or the weights are no longer finite, or the loss is far above that of guessing."""


@dataclass
class Stop:
    """The wish to stop. `received`: signals of this process; `agreed`: the one that all processes know of, or 0."""

    received: list[int] = field(default_factory=list)
    agreed: int = 0

    @property
    def flags(self) -> list[int]:
        """What this process received, as numbers that can be added up."""
        return [self.received.count(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def settle(self, terms: float, interrupts: float) -> None:
        """Takes note of everybody's flags, summed."""
        self.agreed = signal.SIGTERM if terms else signal.SIGINT if interrupts else 0

    def agree(self, device: str) -> None:
        """Asks the other processes."""
        self.settle(*cluster.total(torch.tensor(self.flags, device=device)).tolist())


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `training` was told, and the plan that was made of it."""

    splits: Splits
    todo: Plan
    out: Path
    device: str
    workers: int | None
    save_every: int


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
    save_every: int = 0,
    retries: int = RETRIES,
    cache: data.Cache | None = None,
) -> Iterator[Event]:
    """Trains `model` on `splits.train`, judges it on `splits.val` after each epoch, and yields what happens.

    Without validation images nothing is judged: there is no early stopping, and `best` is the model of the last epoch.

    Writes `out/plan.json`, `recipe.json`, `log.jsonl`, `last.safetensors` (resume) and `best.safetensors` (use).
    `model` gets a fresh classifier when its labels are not the data's classes. `UsageError`: `out` already holds a run
    and `resume` is false, or the data, network or recipe changed since. `Interrupted` after SIGINT or SIGTERM.
    `weights` is what `model` started from, for the log only.

    The state is saved after each epoch, and also every `save_every` steps where that is not 0; a killed run repeats
    what came after. A run that diverges goes back to its last saved state with `SLOWER` times the learning rate, at
    most `retries` times, then raises `Diverged`. Every process of a `cluster` calls this; the first one writes.
    `cache`: decoded images, for several runs on the same `splits`; by default a run has its own.
    """
    started = time.perf_counter()
    if device == "cpu":
        native.keep_freed_memory()
    out = Path(out)
    check_range("save_every", save_every, 0)
    check_range("retries", retries, 0)
    if model.labels != splits.classes:
        model = replace_head(model, splits.classes)
        # From zero all classes start equal; the published range 1/sqrt(classes) is far too wide for a handful of them.
        nn.init.zeros_(model.classifier.weight)
    recipe = for_images(recipe, len(splits.train))
    journal = Journal(out / "log.jsonl", silent=cluster.rank() > 0)
    resume = resume or (cluster.restarts() > 0 and cluster.first(lambda: exists(out)))
    todo, state = (_resumed if resume else _started)(splits, model, recipe, out, device, journal)
    if cache is not None:
        state.cache = cache
    job = Job(splits=splits, todo=todo, out=out, device=device, workers=workers, save_every=save_every)
    yield journal.add(_start_event(job, state, weights))
    with _signals() as stop:
        while (place := _epoch_left(todo, state)) is not None:
            if recipe.patience and state.since_best >= recipe.patience:
                yield journal.add({"event": "early_stop", "step": state.step, "patience": recipe.patience})
                break
            try:
                yield from map(journal.add, _phase_events(todo, state, place))
                yield from map(journal.add, _epoch(job, state, place, stop))
                if len(state.losses) == place.steps and not stop.agreed:
                    yield from _end_of_epoch(job, state, place, stop, journal)
            except ImageError as error:
                if len(state.losses) == place.steps:  # one to judge on: those are never left out
                    raise
                advice = "put it right, or leave such images out with --set on_error=skip; --resume goes on"
                raise ImageError(error.name, f"{error.reason}; {advice}") from error
            except Diverged as error:
                yield journal.add(_back(job, state, journal, error, retries))
                yield from map(journal.add, _saved(job, state))
            stop.agree(device)
            if stop.agreed:
                if state.losses:
                    yield from map(journal.add, _saved(job, state))
                yield journal.add({"event": "stop", "step": state.step, "signal": stop.agreed})
                raise Interrupted(stop.agreed, out)
    seconds = round(time.perf_counter() - started, 2)
    kept = cluster.first(lambda: dict(checkpoint.load(out / BEST).metrics))
    yield journal.add({"event": "end", "best_epoch": state.best_epoch, "metrics": kept, "seconds": seconds})


# --- start, resume, go back -----------------------------------------------------------------------------------------


def _started(
    splits: Splits, model: Model, recipe: Recipe, out: Path, device: str, journal: Journal
) -> tuple[Plan, State]:
    """A new run: the plan, the folder, the state before the first step."""

    def planned() -> Plan:
        if exists(out) and find(out).extra["step"]:  # one that never took a step may be begun anew
            raise UsageError(f"{out} already holds a run: go on with --resume, or choose another --out.")
        counts: dict[str, Any] = {"train_images": len(splits.train), "val_images": len(splits.val or ())}
        todo = plan(model, recipe, classes=splits.classes, device=device, **counts)
        _check_shares(todo)
        out.mkdir(parents=True, exist_ok=True)
        check_disk(out, todo.disk_bytes)
        (out / "plan.json").write_text(todo.to_json())
        (out / "recipe.json").write_text(recipe.to_json())
        journal.begin()
        return todo

    todo = cluster.first(planned)
    state = fresh(model, todo, device, splits.train.fingerprint())
    cluster.first(lambda: checkpoint.save(out / LAST, content(todo, state, splits, {}, resumable=True)))
    return todo, state


def _resumed(
    splits: Splits, model: Model, recipe: Recipe, out: Path, device: str, journal: Journal
) -> tuple[Plan, State]:
    """The state after the last saved step. The plan is the saved one: precision and phases do not change under way.

    Only what becomes of images that cannot be read may change: one that broke a run must not cost it.
    """

    def accepted() -> tuple[Plan, checkpoint.Checkpoint]:
        saved = find(out)
        if not (out / "plan.json").exists():
            raise UsageError(f"{out} cannot be gone on with: it has no plan.json.")
        todo = Plan.from_json((out / "plan.json").read_text())
        refuse_other(out, saved, todo, splits, model.network, recipe)
        _check_shares(todo)
        return todo.replace(recipe=todo.recipe.replace(on_error=recipe.on_error)), saved

    todo, saved = cluster.first(accepted)
    state = fresh(model, todo, device, saved.extra["fingerprint"])
    restore(state, todo, saved)
    journal.keep(state.step, judged=not state.losses, rollbacks=state.rollbacks)
    return todo, state


def _check_shares(todo: Plan) -> None:
    """`UsageError` for a batch that the processes, and the parts of a step, cannot share equally."""
    world, parts = cluster.world(), todo.recipe.accumulate
    for phase in todo.phases:
        batch, tied = min(phase.batch, todo.train_images), augment.mirrored(phase.mixup, phase.cutmix)
        data.share(batch, world=world, mirrored=tied)
        if batch % (parts * (world * tied if world > 1 else 1)):
            raise UsageError(
                f"recipe accumulate is {parts}: a batch of {batch} on {world} processes cannot be computed in so many "
                "equal parts."
            )


def _back(job: Job, state: State, journal: Journal, error: Diverged, retries: int) -> Event:
    """The last saved state again, with a lower rate. Raises `error` when that was tried `retries` times."""
    count = state.rollbacks + 1
    if count > retries:
        tried = f" Going back {retries} times with a lower rate did not help." if retries else ""
        raise Diverged(f"{error}; the last saved state is intact.{tried}") from None
    restore(state, job.todo, cluster.first(lambda: find(job.out)))
    journal.keep(state.step, judged=not state.losses, rollbacks=state.rollbacks)
    state.rollbacks = count
    return {
        "event": "rollback",
        "step": state.step,
        "rollbacks": count,
        "most": retries,
        "reason": str(error),
        "rate_factor": SLOWER**count,
    }


def _epoch_left(todo: Plan, state: State) -> Place | None:
    """The epoch under way (perhaps only to be judged), or the next one; None when there is none."""
    return next(places(todo.phases, todo.train_images, state.step - len(state.losses)), None)


# --- learning -------------------------------------------------------------------------------------------------------


def _epoch(job: Job, state: State, place: Place, stop: Stop) -> Iterator[Event]:
    """The steps of one epoch that are not yet done. Ends early, at a step's end, when all agree to stop."""
    recipe, phase, splits = job.todo.recipe, place.phase, job.splits
    class_weights = weights_of_classes(splits.train, recipe).to(job.device)
    _prepare(state, phase, recipe.freeze)
    source = views(
        splits.train,
        recipe,
        place,
        preprocess=job.todo.preprocess,
        start_step=len(state.losses),
        workers=data.default_workers(cluster.local_world()) if job.workers is None else job.workers,
        cache=state.cache,
        rank=cluster.rank(),
        world=cluster.world(),
    )
    clock = time.perf_counter()
    for batch in source:
        arrived = time.perf_counter()
        lr = _set_rate(state, job.todo)
        loss, images, skipped = _step(job, state, phase, batch, class_weights, stop)
        state.step += 1
        state.losses.append(loss)
        now = time.perf_counter()
        for name, reason in (pair for share in cluster.gathered(batch.skipped) for pair in share) if skipped else ():
            yield {"event": "skip", "step": state.step, "image": name, "reason": reason}
        yield {
            "event": "step",
            "step": state.step,
            "epoch": place.epoch,
            "phase": phase.index,
            "loss": float(f"{loss:.9g}"),  # float32 in full
            "lr": lr,
            "images_per_s": round(images / (now - clock), 2),
            "wait_ms": round(1e3 * (arrived - clock), 2),
            "step_ms": round(1e3 * (now - clock), 2),
        }
        if stop.agreed:
            return
        if job.save_every and state.step % job.save_every == 0 and len(state.losses) < place.steps:
            yield from _saved(job, state)
        clock = time.perf_counter()


def views(train: Source, recipe: Recipe, place: Place, **options: Any) -> Iterator[data.Batch]:
    """The batches of the epoch of `place`, of random views as `recipe` and the phase have them.

    `options`: those of `data.batches` that neither decides: preprocess, the step to begin with, workers, cache, shares.
    """
    phase = place.phase
    return data.batches(
        train,
        size_px=phase.size_px,
        batch=phase.batch,
        train=True,
        crop=recipe.crop,
        least_area=recipe.least_area,
        policy=recipe.policy,
        magnitude=phase.magnitude,
        seed=recipe.seed,
        epoch=place.epoch,
        on_error=recipe.on_error,
        soft=recipe.soft_targets,
        mirrored=augment.mirrored(phase.mixup, phase.cutmix),
        **options,
    )


def weights_of_classes(train: Source, recipe: Recipe) -> Tensor:
    """What an image of each class counts, float32 (K,): one, or the more the rarer it is where the recipe balances."""
    return torch.from_numpy(train.balance() if recipe.balance else np.ones(len(train.classes), np.float32))


def _prepare(state: State, phase: Phase, freeze: int) -> None:
    """Sets what a phase decides: what learns, dropout, drop path; batch norm is frozen while the head learns alone."""
    set_learning(state.model, freeze=freeze, head_only=phase.head_only)
    state.model.set_regularisation(dropout=phase.dropout, drop_path=phase.drop_path)
    state.model.train(not phase.head_only)


def _set_rate(state: State, todo: Plan) -> float:
    """The learning rate of the next step, set on the optimizer."""
    lr = rate(todo.recipe, next(places(todo.phases, todo.train_images, state.step))) * SLOWER**state.rollbacks
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    return lr


def _step(
    job: Job, state: State, phase: Phase, batch: data.Batch, class_weights: Tensor, stop: Stop
) -> tuple[float, int, int]:
    """One update: the loss, and how many images all processes used and left out. Its randomness is keyed by the step.

    Every loss is divided by the weight of the whole batch, so those of all parts and processes add up to its mean.
    """
    todo, recipe, device = job.todo, job.todo.recipe, job.device
    whole, seen = min(phase.batch, todo.train_images), batch.places.to(device)
    images = normalise(batch.images.to(device), todo.preprocess)
    targets = batch.targets.to(device)
    mixing = np.random.default_rng((recipe.seed, state.step))
    images, targets = augment.mix(
        images, targets, mixup_alpha=phase.mixup, cutmix_alpha=phase.cutmix, rng=mixing,
        share=(whole, batch.places.numpy()),
    )  # fmt: skip
    weights = batch.weights.to(device) * class_weights[batch.labels.to(device)]
    weight = cluster.total(weights.sum())
    state.optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=device)
    for part in _parts(seen, recipe.accumulate):
        torch.manual_seed(_key(recipe.seed, state.step))
        state.model.set_share((whole, seen[part]))
        with precision_context(todo.precision, device):
            logits = state.model(images[part].contiguous(memory_format=torch.channels_last))
        share = weighted_cross_entropy(logits.float(), targets[part], weights[part], recipe.label_smoothing, weight)
        share.backward()
        loss += share.detach()
    mine = torch.tensor([len(batch), len(batch.skipped), *stop.flags], dtype=torch.float64, device=device)
    value, used, skipped, *flags = cluster.total(torch.cat([loss.double()[None], mine])).tolist()
    stop.settle(*flags)
    _refuse_diverged(value, todo, state.step + 1)
    cluster.sum_gradients(state.model.parameters())
    state.optimizer.step()
    if state.average is not None:
        if phase.head_only:
            state.average.reset()
        else:
            state.average.update(state.step)
    return value, int(used), int(skipped)


def _parts(seen: Tensor, count: int) -> Sequence[slice | Tensor]:
    """The images of each part of a step, by their places `seen` in the whole batch: the same, whoever computes it."""
    if count == 1:
        return [slice(None)]
    parts = [seen % count == part for part in range(count)]
    if not all(part.any() for part in parts):
        raise UsageError(f"all images of one of the {count} parts of a step (accumulate) were left out as unreadable.")
    return parts


def _refuse_diverged(loss: float, todo: Plan, step: int) -> None:
    if not loss <= EXPLODED * math.log(max(len(todo.classes), 2)):
        raise Diverged(f"the loss became {loss:.6g} at step {step}: lower lr (now {todo.recipe.lr:g})")


def _key(seed: int, step: int) -> int:
    """One 63-bit number for (seed, step)."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % (1 << 63)


def weighted_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """The weighted mean over the batch of the cross-entropy with soft `targets` (N, K), smoothed towards uniform.

    `weight`: what to divide by instead of the sum of `weights`, where these images are a share of the batch.
    """
    targets = targets * (1 - smoothing) + smoothing / targets.shape[1]
    losses = -(targets * nn.functional.log_softmax(logits, dim=1)).sum(dim=1)  # (N, K) -> (N,)
    return (losses * weights).sum() / (weights.sum() if weight is None else weight)


# --- judging and keeping --------------------------------------------------------------------------------------------


def _phase_events(todo: Plan, state: State, place: Place) -> Iterator[Event]:
    """A new optimizer and the event where a phase begins that changes what learns."""
    first = sum(phase.epochs for phase in todo.phases[: place.phase.index])
    if place.epoch != first or state.losses:
        return
    before = todo.phases[place.phase.index - 1] if place.phase.index else None
    if before is None or before.head_only != place.phase.head_only:
        state.optimizer = optimizer(state.model, todo.recipe, head_only=place.phase.head_only)
    yield {"event": "phase", "step": state.step, **place.phase.to_dict()}


def _end_of_epoch(job: Job, state: State, place: Place, stop: Stop, journal: Journal) -> Iterator[Event]:
    """Judges the epoch on the validation images, then keeps the best model and the state to go on from.

    The log comes first: should the run be killed in between, it goes back to an older state and the line is dropped.
    A wish to stop interrupts it: then the epoch is judged when the run goes on.
    """
    clock = time.perf_counter()
    _refuse_broken(job, state)
    if job.todo.recipe.norm_batches:
        _renew_norms(job, state, place, stop)
    try:
        metrics = _judged(job, state, stop)
    except Unfinished:
        return
    value = score(metrics, job.todo.recipe)
    better = value >= state.best  # of equals the later one: it has seen more
    state.since_best = 0 if value > state.best or not metrics else state.since_best + 1
    train_loss = sum(state.losses) / len(state.losses)
    state.losses = []
    event = {
        "event": "epoch",
        "step": state.step,
        "epoch": place.epoch,
        "phase": place.phase.index,
        "size_px": place.phase.size_px,
        "train_loss": round(train_loss, 6),
        "val": metrics,
        "best": better,
        "seconds": round(time.perf_counter() - clock, 2),
    }
    journal.add(event)
    problems: list[str] = []
    if better:
        problems += _write(job, BEST, state, metrics)
        if not problems:  # what could not be kept is not the best that there is
            state.best, state.best_epoch = value, place.epoch
    problems += _write(job, LAST, state, metrics)
    yield event
    if problems:
        yield journal.add({"event": "save", "step": state.step, "save_failed": problems})


def _judged(job: Job, state: State, stop: Stop) -> dict[str, Any]:
    """The metrics of the validation images, {} without any. `Unfinished` when a process was asked to stop."""
    val = job.splits.val
    if not val:
        return {}
    options: dict[str, Any] = {
        "batch": job.todo.recipe.batch,
        "device": job.device,
        "cache": state.cache,
        "bootstrap": 0,
    }
    with precision_context(job.todo.precision, job.device):
        return evaluate(state.evaluated, val, stop=lambda: bool(stop.received), **options).metrics


def _renew_norms(job: Job, state: State, place: Place, stop: Stop) -> None:
    """Batch norm's statistics of the judged model, over training images prepared as the validation images are.

    Every process counts all of them. One that is asked to stop counts no further; going on, the run counts again.
    """
    todo, recipe, train = job.todo, job.todo.recipe, job.splits.train
    drawn = data.order(len(train), seed=recipe.seed, epoch=place.epoch, batch=recipe.batch)
    source = data.batches(
        train.subset(drawn[: recipe.norm_batches].ravel()),
        size_px=todo.preprocess.size,
        batch=recipe.batch,
        preprocess=todo.preprocess,
        train=False,
        on_error=recipe.on_error,
        cache=state.cache,
    )
    wanted = itertools.takewhile(lambda _: not stop.received, source)
    with precision_context(todo.precision, job.device):
        renew_norms(state.evaluated, (normalise(batch.images.to(job.device), todo.preprocess) for batch in wanted))


def score(metrics: dict[str, Any], recipe: Recipe) -> float:
    """What makes an epoch better than another: (weighted, where samples have weights) accuracy, or minus NLL.

    0 without metrics: every epoch is as good as the one before it, and the later one is kept.
    """
    if not metrics:
        return 0.0
    if recipe.monitor == "nll":
        return -metrics["nll"]
    return metrics.get("weighted_accuracy", metrics["accuracy"])


def _saved(job: Job, state: State) -> Iterator[Event]:
    """Keeps the state to go on from; an event only where that failed."""
    _refuse_broken(job, state)
    if problems := _write(job, LAST, state, {}):
        yield {"event": "save", "step": state.step, "save_failed": problems}


def _refuse_broken(job: Job, state: State) -> None:
    """`Diverged` for weights that are not worth keeping."""
    if not state.is_finite():
        raise Diverged(f"the weights were no longer finite after step {state.step}: lower lr")


def _write(job: Job, name: str, state: State, metrics: dict[str, Any]) -> list[str]:
    """Saves, in the first process; all of them learn what went wrong, if something did. The run goes on either way."""
    return cluster.first(
        lambda: write(job.out / name, content(job.todo, state, job.splits, metrics, resumable=name == LAST))
    )


# --- signals and the first event --------------------------------------------------------------------------------------


@contextmanager
def _signals() -> Generator[Stop]:
    """Within, SIGINT and SIGTERM only leave their number; a second SIGINT interrupts at once."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if stop.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.received.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller's handlers stay
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_event(job: Job, state: State, weights: str) -> Event:
    splits = job.splits
    return {
        "event": "start",
        "step": state.step,
        "data": splits.name,
        "note": splits.note,
        "fingerprint": state.fingerprint,
        "classes": list(splits.classes),
        "images": {"train": len(splits.train), "val": len(splits.val or ()), "test": len(splits.test or ())},
        "weights": weights,
        "precision": job.todo.precision,
        "processes": cluster.world(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment(job.device),
        "pid": os.getpid(),
    }

"""What will this run do, and what will it cost? Phases, steps, MACs, memory, disk and time, before any training.

Precision is chosen by measurement: a few real training steps in each candidate, on random images, on the device at
hand. On a CPU bfloat16 is not always the quicker one: it depends on the network's mix of operators. The same timed
steps give the expected duration, and `within_time` shortens a recipe until that fits a budget.
"""

import copy
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from effnet import cluster, native
from effnet.cost import cost
from effnet.network import Model
from effnet.optim import set_learning
from effnet.recipes import Phase, Precision, Recipe, for_images, memory, phases, steps_per_epoch, too_large
from effnet.spec import Network, Preprocess
from effnet.value import UsageError, Value
from effnet.words import duration

Timing = Callable[[int, int, bool], float]  # (size_px, batch, whether it trains) -> seconds of a step

CHECKPOINT_COPIES = 6  # last (weights, average, two optimizer slots) with its predecessor, and best


@dataclass(frozen=True, kw_only=True)
class PlanRow(Value):
    """One phase: `steps` in all, `macs` of one image, memory in bytes, and the measured speed behind `seconds`."""

    phase: Phase
    steps: int
    macs: int
    training_bytes: int
    images_per_s: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan(Value):
    """The run as it will happen. `precision` and the speeds were measured on `device`; nothing was trained."""

    network: Network
    recipe: Recipe
    preprocess: Preprocess
    classes: tuple[str, ...]
    train_images: int
    val_images: int
    params: int
    precision: Precision
    device: str
    threads: int
    disk_bytes: int
    rows: tuple[PlanRow, ...]

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the rows."""
        return tuple(row.phase for row in self.rows)

    @property
    def seconds(self) -> float:
        """Expected duration, validation included."""
        return sum(row.seconds for row in self.rows)


def run_preprocess(network: Network, recipe: Recipe) -> Preprocess:
    """How the trained model will see images: the weights' normalisation, at the recipe's evaluation size.

    A recipe that never crops (`dihedral`, `resize`, `pad`, `none`) is evaluated on the whole image, aspect not kept.
    """
    size = recipe.eval_px or phases(recipe, network)[-1].size_px
    if recipe.crop == "inception":
        return network.preprocess.with_size(size)
    return network.preprocess.replace(size=size, resize=size, method="squash", interpolation="bilinear")


def plan(
    model: Model,
    recipe: Recipe,
    *,
    classes: tuple[str, ...],
    train_images: int,
    val_images: int,
    device: str = "cpu",
    steps: int = 2,
    watch: "Stopwatch | None" = None,
) -> Plan:
    """Plans `recipe` for `model` on so many images, timing `steps` training steps per image size after one warm-up.

    `watch`: one that `stopwatch` made before, to not time again. `UsageError` if the recipe does not fit the network
    (sizes), the data (batch) or the memory of the device, or if the training set is empty.
    """
    network = model.network.with_classes(len(classes))
    watch = watch or stopwatch(model, recipe, network, train_images, device, steps)
    recipe = for_images(recipe, train_images)
    preprocess = run_preprocess(network, recipe)
    rows = []
    for phase, seconds in _timed(recipe, network, train_images, val_images, watch):
        step_s = watch(phase.size_px, phase.batch, not phase.head_only)
        row = PlanRow(
            phase=phase,
            steps=phase.epochs * steps_per_epoch(train_images, phase.batch),
            macs=cost(network, phase.size_px).macs,
            training_bytes=memory(
                recipe, network, phase.size_px, at_once(phase.batch, recipe.accumulate), watch.precision
            ),
            images_per_s=phase.batch / step_s,
            seconds=seconds,
        )
        rows.append(row)
    total = cost(network, preprocess.size)
    return Plan(
        network=network,
        recipe=recipe,
        preprocess=preprocess,
        classes=classes,
        train_images=train_images,
        val_images=val_images,
        params=total.params,
        precision=watch.precision,
        device=device_name(device),
        threads=torch.get_num_threads(),
        disk_bytes=CHECKPOINT_COPIES * total.weight_bytes,
        rows=tuple(rows),
    )


def _timed(
    recipe: Recipe, network: Network, train_images: int, val_images: int, timing: Timing
) -> Iterator[tuple[Phase, float]]:
    """Each phase with its seconds, a validation after each epoch included."""
    validation, at_once = 0.0, min(recipe.batch, train_images)
    if val_images:
        validation = timing(run_preprocess(network, recipe).size, at_once, False) * val_images / at_once
    for phase in phases(recipe, network, train_images):
        step_s = timing(phase.size_px, phase.batch, not phase.head_only)
        yield phase, phase.epochs * (steps_per_epoch(train_images, phase.batch) * step_s + validation)


# --- a budget of time -----------------------------------------------------------------------------------------------

SPARE = 0.1  # of a budget is left for what is not timed: the start, saving, waiting for images
LEAST_EPOCHS, LEAST_SHARE, LEAST_PX = 0.25, 0.5, 64  # how far epochs and sizes are cut, and where sizes stop anyway
SHARES = (1.0, 0.875, 0.75, 0.625, LEAST_SHARE)


def within_time(
    recipe: Recipe, network: Network, budget_s: float, *, train_images: int, val_images: int, timing: Timing
) -> Recipe:
    """The recipe, shortened until the expected time is within nine tenths of `budget_s` seconds.

    First fewer epochs, to a quarter; then smaller images, an eighth at a time, to half the size or 64 px. Warm-up and
    phases keep their shares of the run, the learning rate its whole schedule. Of what fits, the largest size with the
    most epochs is taken. A function of its arguments: the same `timing`, the same recipe. `UsageError` names the least
    time when nothing fits.
    """
    recipe = for_images(recipe, train_images)

    def seconds(shorter: Recipe) -> float:
        return sum(s for _, s in _timed(shorter, network, train_images, val_images, timing)) / (1 - SPARE)

    least = max(1, math.ceil(LEAST_EPOCHS * recipe.epochs))
    for share in SHARES:
        smaller = _smaller(recipe, network, share)
        if seconds(_shorter(smaller, least)) <= budget_s:
            trials = (_shorter(smaller, epochs) for epochs in range(recipe.epochs, least - 1, -1))
            return next(trial for trial in trials if seconds(trial) <= budget_s)
    smallest = _shorter(_smaller(recipe, network, LEAST_SHARE), least)
    sizes = "-".join(str(px) for px in sorted({phase.size_px for phase in phases(smallest, network)}))
    raise UsageError(
        f"a time budget of {duration(budget_s)} is too short: {least} of {recipe.epochs} epochs at {sizes} px, the "
        f"least that is planned, take {duration(math.ceil(seconds(smallest)))}. Choose a smaller network, fewer epochs "
        "or fewer images."
    )


def _shorter(recipe: Recipe, epochs: int) -> Recipe:
    warmup = recipe.warmup * epochs / recipe.epochs
    return recipe.replace(epochs=epochs, stages=min(recipe.stages, epochs), warmup=warmup, least_steps=0)


def _smaller(recipe: Recipe, network: Network, share: float) -> Recipe:
    """All sizes times `share`, none below 64 px and the network's stride that was not before."""
    if share == 1:
        return recipe
    first, last, judged = (
        max(round(share * px), min(px, max(LEAST_PX, network.stride)))
        for px in (*(recipe.size_px or (network.resolution,) * 2), recipe.eval_px or LEAST_PX)
    )
    return recipe.replace(size_px=(first, last), eval_px=judged if recipe.eval_px else None)


def told(before: Recipe, after: Recipe, network: Network) -> str:
    """What `within_time` changed, in words."""
    if before == after:
        return "everything fits into the time budget"
    words = f"to fit into the time budget: {after.epochs} of {before.epochs} epochs"
    sizes = [sorted({phase.size_px for phase in phases(recipe, network)}) for recipe in (before, after)]
    if sizes[0][-1] != sizes[1][-1]:
        words += ", at {1} px instead of {0}".format(*("-".join(map(str, px)) for px in sizes))
    return words


# --- measured steps -------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Stopwatch:
    """Times steps of a copy of the model in the chosen `precision`; each (size, batch, train or not) only once.

    What is timed is one of the `accumulate` parts of this process's share of the batch.
    """

    model: Model
    precision: Precision
    device: str
    steps: int
    accumulate: int = 1
    known: dict[tuple[int, int, bool], float] = field(default_factory=dict)

    def __call__(self, size_px: int, batch: int, train: bool) -> float:
        """Seconds of a step, or of a forward pass."""
        key = (size_px, batch, train)
        if key not in self.known:
            steps, parts = (self.steps, self.accumulate) if train else (1, 1)
            part = at_once(batch, parts)
            self.known[key] = parts * step_seconds(
                self.model, size_px, part, self.precision, self.device, train=train, steps=steps
            )
        return self.known[key]


def at_once(batch: int, accumulate: int) -> int:
    """How many images of a batch one process computes together."""
    return max(1, batch // (cluster.world() * accumulate))


def stopwatch(
    model: Model, recipe: Recipe, network: Network, train_images: int, device: str = "cpu", steps: int = 2
) -> Stopwatch:
    """A stopwatch for `recipe`, once it is known that its phases can be: sizes, batches and memory are checked here."""
    if train_images < 2:
        raise UsageError(f"the training split has {train_images} images; training needs at least 2.")
    rows = phases(recipe, network, train_images)
    room = memory_bytes(device) // (1 if device.startswith("cuda") else cluster.local_world())
    for phase in rows:
        batch = at_once(phase.batch, recipe.accumulate)
        if memory(recipe, network, phase.size_px, batch) > room:
            parts = cluster.world() * recipe.accumulate
            raise UsageError(f"{device}: {too_large(recipe, network, phase.size_px, batch, room, parts=parts)}")
    if device == "cpu":
        native.keep_freed_memory()  # as training does, so that it is timed
    probe = copy.deepcopy(model).to(device).train()
    set_learning(probe, freeze=recipe.freeze)
    precision = recipe.precision
    if precision == "auto":
        precision = quickest_precision(probe, rows[-1].size_px, at_once(rows[-1].batch, recipe.accumulate), device)
    return Stopwatch(model=probe, precision=precision, device=device, steps=steps, accumulate=recipe.accumulate)


def memory_bytes(device: str) -> int:
    """The memory of the device: of an accelerator its own, of the CPU what this process may use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.exists() else ""
    return min(room, int(text)) if text.isdigit() else room


def quickest_precision(model: Model, size_px: int, batch: int, device: str) -> Precision:
    """float32 or bfloat16 autocast, whichever finishes a training step of `batch` images first on `device`."""
    candidates: tuple[Precision, ...] = ("float32", "bfloat16")
    times = {name: step_seconds(model, size_px, batch, name, device, train=True, steps=2) for name in candidates}
    return min(candidates, key=lambda name: times[name])


def step_seconds(
    model: nn.Module, size_px: int, batch: int, precision: str, device: str, *, train: bool, steps: int
) -> float:
    """Median seconds of a training step (or a forward pass), channels-last, random images, after one warm-up step."""
    images = torch.rand(batch, 3, size_px, size_px, device=device).to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]

    def step() -> None:
        with torch.set_grad_enabled(train), precision_context(precision, device):
            loss = model(images).float().square().mean()
        if train:
            loss.backward()
            model.zero_grad(set_to_none=True)

    return median_seconds(step, steps, device)


def median_seconds(step: Callable[[], None], steps: int, device: str) -> float:
    """Median wall time of `steps` calls, after one that is not counted."""
    times = []
    for _ in range(steps + 1):
        synchronise(device)
        start = time.perf_counter()
        step()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[len(times[1:]) // 2]


def synchronise(device: str) -> None:
    """Waits for the accelerator, so that a clock read afterwards means something."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def precision_context(precision: str, device: str) -> AbstractContextManager:
    """Autocast to bfloat16 on that device, or nothing."""
    if precision == "bfloat16":
        return torch.autocast(device.split(":")[0], dtype=torch.bfloat16)
    return nullcontext()


def check_disk(folder: Path, needed: int) -> None:
    """`UsageError` when the folder's file system has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(f"{folder} has {free / 1e6:.0f} MB free; this run writes about {needed / 1e6:.0f} MB.")


def device_name(device: str) -> str:
    """`cpu` or the accelerator's own name."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def environment(device: str = "cpu") -> dict[str, str | int]:
    """What a result was obtained with: versions, processor, threads, device."""
    processor = native.processor().get("model name") or platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "system": platform.system(),
    }

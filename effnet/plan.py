"""What will this run do, and what will it cost? Phases, steps, MACs, memory, disk and time, before any training.

Precision is chosen by measurement: a few real training steps in each candidate, on random images, on the device at
hand. On a CPU bfloat16 is not always the quicker one: it depends on the network's mix of operators. The same timed
steps give the expected duration.
"""

import copy
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from effnet.cost import cost, training_bytes
from effnet.network import Model
from effnet.optim import set_learning
from effnet.recipes import Phase, Precision, Recipe, phases
from effnet.spec import Network, Preprocess
from effnet.value import UsageError, Value

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
    def seconds(self) -> float:
        """Expected duration, validation included."""
        return sum(row.seconds for row in self.rows)


def run_preprocess(network: Network, recipe: Recipe) -> Preprocess:
    """How the trained model will see images: the weights' normalisation, at the recipe's evaluation size.

    A recipe that never crops (`dihedral`, `resize`, `none`) is evaluated on the whole image, aspect not kept.
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
) -> Plan:
    """Plans `recipe` for `model` on so many images, timing `steps` training steps per image size after one warm-up.

    `UsageError` if the recipe does not fit the network (sizes) or the training set is empty.
    """
    if train_images < 2:
        raise UsageError(f"the training split has {train_images} images; training needs at least 2.")
    network = model.network.with_classes(len(classes))
    schedule = phases(recipe, network)
    batch = min(recipe.batch, train_images)
    probe = copy.deepcopy(model).to(device).train()
    set_learning(probe, freeze=recipe.freeze)
    precision = recipe.precision
    if precision == "auto":
        precision = quickest_precision(probe, schedule[-1].size_px, batch, device)
    preprocess = run_preprocess(network, recipe)
    evaluation = step_seconds(probe, preprocess.size, batch, precision, device, train=False, steps=1)
    timed: dict[tuple[int, bool], float] = {}
    rows = []
    for phase in schedule:
        key = (phase.size_px, phase.head_only)
        if key not in timed:
            timed[key] = step_seconds(probe, *key[:1], batch, precision, device, train=not phase.head_only, steps=steps)
        rows.append(_row(phase, network, train_images, batch, timed[key], precision, evaluation * val_images / batch))
    total = cost(network, preprocess.size)
    return Plan(
        network=network,
        recipe=recipe,
        preprocess=preprocess,
        classes=classes,
        train_images=train_images,
        val_images=val_images,
        params=total.params,
        precision=precision,
        device=device_name(device),
        threads=torch.get_num_threads(),
        disk_bytes=CHECKPOINT_COPIES * total.weight_bytes,
        rows=tuple(rows),
    )


def _row(
    phase: Phase, network: Network, images: int, batch: int, seconds: float, precision: str, validation: float
) -> PlanRow:
    """`seconds` of one step, `validation` seconds after each epoch."""
    steps = steps_per_epoch(images, batch) * phase.epochs
    spent = cost(network, phase.size_px)
    memory = training_bytes(spent.to_dict(), batch, element=4 if precision == "float32" else 2)
    return PlanRow(
        phase=phase,
        steps=steps,
        macs=spent.macs,
        training_bytes=int(memory),
        images_per_s=batch / seconds,
        seconds=steps * seconds + phase.epochs * validation,
    )


def steps_per_epoch(images: int, batch: int) -> int:
    """Full batches in an epoch; one smaller batch when there are fewer images than that."""
    return max(1, images // batch)


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
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].split(":", 1)[1].strip() if lines else processor
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "system": platform.system(),
    }

"""What changes while a network learns, and how is it kept and found again?

`State` is all of it. One file holds a state: the model that is judged under bare names (so that the file can be used
like any other), raw weights where that is an average, the optimizer's memory, and the place in the run. None of it
depends on the number of processes, so any number can go on from it. Random numbers are not in it: they are keyed by
seed, epoch, step and sample.

A run folder has `last.safetensors` (to go on from) with its predecessor, and `best.safetensors` (to use). The first
state that is kept is that before the first step, so a run can be gone on with from the moment it began.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnet import checkpoint, cluster, data
from effnet.network import Model
from effnet.optim import Average, load_optimizer_tensors, optimizer, optimizer_tensors
from effnet.plan import Plan
from effnet.recipes import Recipe, places
from effnet.samples import Splits
from effnet.spec import Network
from effnet.value import UsageError

LAST, BEST = "last.safetensors", "best.safetensors"
# what of a network a recipe or the data decide: it may differ between the model given and the model kept
DECIDED = ("name", "preprocess", "resolution", "dropout", "drop_path", "head.classes", "source")


@dataclass
class State:
    """All that changes while training."""

    model: Model
    average: Average[Model] | None
    optimizer: torch.optim.Optimizer
    fingerprint: str  # of the training data when the run began
    step: int = 0  # finished steps of the whole run
    best: float = -float("inf")
    best_epoch: int = -1
    since_best: int = 0
    rollbacks: int = 0  # how often the run went back after it had diverged
    losses: list[float] = field(default_factory=list)  # of the finished steps of the epoch that is not yet judged
    cache: data.Cache = field(default_factory=data.Cache)  # decoded images

    @property
    def evaluated(self) -> Model:
        """The model that is judged and kept: the average of the weights, where there is one."""
        return self.average.model if self.average is not None else self.model

    def is_finite(self) -> bool:
        """Whether no weight, statistic or average is NaN or infinite."""
        models = [self.model, self.evaluated]
        tensors = [t for model in models for t in model.state_dict().values() if t.is_floating_point()]
        return bool(torch.stack(torch._foreach_norm(tensors, float("inf"))).isfinite().all())


def fresh(model: Model, todo: Plan, device: str, fingerprint: str) -> State:
    """The state before the first step; `model` becomes the run's, on `device`, the same in every process."""
    model.network = todo.network.replace(preprocess=todo.preprocess, resolution=todo.preprocess.size)
    if todo.recipe.norm_momentum is not None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = todo.recipe.norm_momentum
    model = model.to(device, memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
    cluster.spread(model)
    cluster.share_norms(model)
    average = Average(model, todo.recipe.ema) if todo.recipe.ema else None
    made = optimizer(model, todo.recipe)
    return State(model=model, average=average, optimizer=made, fingerprint=fingerprint)


# --- keeping --------------------------------------------------------------------------------------------------------


def content(
    todo: Plan, state: State, splits: Splits, metrics: Mapping[str, Any], *, resumable: bool
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
            "rollbacks": state.rollbacks,
            "losses": state.losses,
            "fingerprint": state.fingerprint,
        }
    return checkpoint.from_model(
        state.evaluated, recipe=todo.recipe.to_dict(), metrics=metrics, extra=extra, state=tensors
    )


def write(path: Path, kept: checkpoint.Checkpoint) -> list[str]:
    """Saves, keeping the file before it where it is the last state. Returns what the disk refused, in words."""
    try:
        checkpoint.save(path, kept, keep_previous=path.name == LAST)
    except UsageError as error:
        return [str(error)]
    return []


# --- finding again --------------------------------------------------------------------------------------------------


def exists(out: Path) -> bool:
    """Whether the folder holds a state, be it damaged."""
    return (out / LAST).exists() or checkpoint.previous_path(out / LAST).exists()


def find(out: Path) -> checkpoint.Checkpoint:
    """The last saved state in `out`, or the one before if that is damaged. `UsageError` for a model without state."""
    path = out / LAST
    if not exists(out):
        raise UsageError(f"nothing to resume: {path} does not exist.")
    saved = checkpoint.load(path)
    if "fingerprint" not in saved.extra:
        raise UsageError(f"{path} holds a model to use, not a state to go on from: no run left it there.")
    return saved


def restore(state: State, todo: Plan, saved: checkpoint.Checkpoint) -> None:
    """Makes `state` what it was when `saved` was written."""
    extra = saved.extra
    state.model.load_state_dict(saved.state("raw") or saved.weights)
    if state.average is not None:
        state.average.model.load_state_dict(saved.weights)
    state.step, state.losses, state.rollbacks = extra["step"], list(extra["losses"]), extra.get("rollbacks", 0)
    state.best, state.best_epoch, state.since_best = (extra[key] for key in ("best", "best_epoch", "since_best"))
    head_only = False
    if state.step:
        head_only = next(places(todo.phases, todo.train_images, state.step - 1)).phase.head_only
    state.optimizer = optimizer(state.model, todo.recipe, head_only=head_only)
    load_optimizer_tensors(state.model, state.optimizer, saved.state("optimizer"))


def refuse_other(
    out: Path, saved: checkpoint.Checkpoint, todo: Plan, splits: Splits, now: Network, recipe: Recipe
) -> None:
    """`UsageError`, naming what differs, unless the run in `out` is one of this data, network and recipe."""
    classes = _class_change(saved.labels or (), splits.classes)
    fingerprints = saved.extra["fingerprint"], splits.train.fingerprint()
    images = f"then {todo.train_images} images ({fingerprints[0]}), now {len(splits.train)} ({fingerprints[1]})"
    network = _changes(saved.network.to_dict(), now.to_dict(), DECIDED)
    for what, change in (
        ("class list", classes),
        ("training data", images if fingerprints[0] != fingerprints[1] else ""),
        ("recipe", _changes(Recipe.from_dict(saved.recipe or {}).to_dict(), recipe.to_dict(), ("on_error",))),
        ("network", f"then {saved.network.name}, now {now.name}: {network}" if network else ""),
    ):
        if change:
            raise UsageError(f"{out} was started with another {what}: {change}.")


def _class_change(then: tuple[str, ...], now: tuple[str, ...]) -> str:
    """What differs between two class lists, in words; nothing when nothing does."""
    if then == now:
        return ""
    gone, new = [name for name in then if name not in now], [name for name in now if name not in then]
    if not gone and not new:
        return f"the same in another order: then {checkpoint.some(then)}; now {checkpoint.some(now)}"
    sides = [f"only {word} {checkpoint.some(names)}" for word, names in (("then", gone), ("now", new)) if names]
    return f"then {len(then)}, now {len(now)}; {'; '.join(sides)}"


def _changes(then: Mapping[str, Any], now: Mapping[str, Any], passed_over: tuple[str, ...] = ()) -> str:
    """The fields whose values differ, in words.

    >>> _changes({"lr": 0.1, "pair": (1, 2)}, {"lr": 0.2, "pair": [1, 2]})
    'lr was 0.1, is 0.2'
    """
    before, after = (_flat("", json.loads(json.dumps(side))) for side in (then, now))
    names = [name for name in before | after if not any(f"{name}.".startswith(f"{start}.") for start in passed_over)]
    changed = [name for name in names if before.get(name) != after.get(name)]
    return checkpoint.some([f"{name} was {before.get(name)}, is {after.get(name)}" for name in changed], 3)


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested objects and lists as one level: {"stages.0.width": 16}."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, part in inner:
        flat |= _flat(f"{name}.{key}" if name else str(key), part)
    return flat

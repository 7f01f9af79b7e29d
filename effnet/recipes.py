"""How is a network trained? A recipe is a value; its phases are printed before any compute.

A `Recipe` says what varies over training as (first, last) pairs; `phases` cuts it into equal steps whose image size and
regularisation rise together (Tan & Le 2021, Algorithm 1: the first phase has exactly the first values, the last exactly
the last ones). `Schedule` is a function of progress in [0, 1]: no epochs, no state. Nothing here imports torch.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from effnet.spec import Network
from effnet.value import UsageError, Value, check_choice, check_range, nearest

Optimizer = Literal["rmsprop", "sgd", "adamw"]
Crop = Literal["inception", "dihedral", "resize", "none"]
Precision = Literal["auto", "float32", "bfloat16"]
Pair = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Schedule(Value):
    """A factor on the learning rate as a function of progress in [0, 1].

    `constant`: 1. `linear`, `cosine`: from 1 to `end`. `staircase`: `rate` to the power of the number of completed
    intervals of length `every` (in progress): the papers' 0.97 every 2.4 of 350 epochs.

    >>> [round(Schedule(kind="cosine").at(p), 3) for p in (0, 0.5, 1)]
    [1.0, 0.5, 0.0]
    """

    kind: Literal["constant", "linear", "cosine", "staircase"] = "cosine"
    end: float = 0.0
    rate: float = 0.97
    every: float = 2.4 / 350

    def __post_init__(self) -> None:
        check_choice("schedule", self.kind, ("constant", "linear", "cosine", "staircase"))
        check_range("schedule end", self.end, 0, 1)
        check_range("schedule rate", self.rate, 0, 1)
        check_range("schedule every", self.every, 1e-9, 1)

    def at(self, progress: float) -> float:
        """The factor at `progress` (clipped to [0, 1])."""
        progress = min(max(progress, 0.0), 1.0)
        if self.kind == "constant":
            return 1.0
        if self.kind == "staircase":
            return self.rate ** math.floor(progress / self.every + 1e-9)
        fall = progress if self.kind == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return 1.0 + (self.end - 1.0) * fall


@dataclass(frozen=True, kw_only=True)
class Recipe(Value):
    """Everything that decides a training run, apart from the network and the data.

    Pairs are (first phase, last phase). None for `size_px`, `dropout` or `drop_path`: the network's own value.
    `lr`: the peak rate at `lr_batch` images a step, scaled linearly to `batch`. `warmup`, `head_epochs`: in epochs.
    `head_epochs`: only the classifier learns at first, behind the frozen network, at `head_lr`.
    `freeze`: the stem and the first so many stages keep their trained weights (their batch norms still see the data);
    the early stages are the dear ones, so a step at a large size costs about half.
    `norm_momentum`: of batch norm while training, PyTorch's convention, None for the network's own. The published 0.01
    is for 350 epochs; over a short fine-tuning its statistics lag behind the weights (0.1: Kornblith et al. 2019).
    `ema`: decay of the average of the weights that is evaluated and kept, 0 for none.
    `balance`: weigh classes by S / (K n_class). `soft_targets`: learn the data's probabilities where it has them.
    `eval_px`: the size that the trained model is evaluated and used at; None: the last phase's.
    `patience`: stop after so many epochs without a better validation `monitor`, 0 for never.
    """

    name: str
    epochs: int
    batch: int = 32
    optimizer: Optimizer = "adamw"
    lr: float = 1e-3
    lr_batch: int = 32
    schedule: Schedule = field(default_factory=Schedule)
    warmup: float = 0.5
    momentum: float = 0.9
    weight_decay: float = 1e-5
    decay_bias: bool = False
    head_epochs: int = 0
    head_lr: float = 1e-3
    freeze: int = 0
    norm_momentum: float | None = None
    ema: float = 0.0
    label_smoothing: float = 0.0
    crop: Crop = "inception"
    stages: int = 1
    size_px: tuple[int, int] | None = None
    eval_px: int | None = None
    magnitude: Pair = (0.0, 0.0)
    mixup: Pair = (0.0, 0.0)
    cutmix: Pair = (0.0, 0.0)
    dropout: Pair | None = None
    drop_path: Pair | None = None
    balance: bool = False
    soft_targets: bool = False
    monitor: Literal["accuracy", "nll"] = "accuracy"
    patience: int = 0
    precision: Precision = "auto"
    on_error: Literal["error", "skip"] = "error"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "lr_batch", "stages"):
            check_range(f"recipe {name}", getattr(self, name), 1)
        for name in ("warmup", "weight_decay", "head_epochs", "freeze", "patience", "seed"):
            check_range(f"recipe {name}", getattr(self, name), 0)
        for name in ("lr", "head_lr"):
            check_range(f"recipe {name}", getattr(self, name), 1e-9, 100)
        for name in ("momentum", "ema", "label_smoothing"):
            check_range(f"recipe {name}", getattr(self, name), 0, 0.999999)
        if self.norm_momentum is not None:
            check_range("recipe norm_momentum", self.norm_momentum, 0, 1)
        for name, high in (
            ("size_px", 4096),
            ("magnitude", 30),
            ("mixup", 10),
            ("cutmix", 10),
            ("dropout", 0.99),
            ("drop_path", 0.99),
        ):
            pair = getattr(self, name)
            for value in pair or ():
                check_range(f"recipe {name}", value, 8 if name == "size_px" else 0, high)
        for name, options in (("optimizer", Optimizer), ("crop", Crop), ("precision", Precision)):
            check_choice(f"recipe {name}", getattr(self, name), get_args(options))
        check_choice("recipe monitor", self.monitor, ("accuracy", "nll"))
        check_choice("recipe on_error", self.on_error, ("error", "skip"))
        if self.stages > self.epochs:
            raise UsageError(
                f"recipe {self.name!r} has {self.stages} stages in {self.epochs} epochs: at most one a stage."
            )

    def rate(self, progress: float, epochs_done: float) -> float:
        """The learning rate: a linear warm-up of `warmup` epochs replaces the schedule until it is over."""
        peak = self.lr * self.batch / self.lr_batch
        if epochs_done < self.warmup:
            return peak * epochs_done / self.warmup
        return peak * self.schedule.at(progress)


@dataclass(frozen=True, kw_only=True)
class Phase(Value):
    """A stretch of training with one image size and one strength of regularisation. `head_only`: classifier alone."""

    index: int
    epochs: int
    size_px: int
    batch: int
    magnitude: float
    mixup: float
    cutmix: float
    dropout: float
    drop_path: float
    head_only: bool = False


def phases(recipe: Recipe, network: Network) -> tuple[Phase, ...]:
    """The phases of `recipe` for `network`, in order; a head-only phase first where the recipe has `head_epochs`.

    Values of phase i of M are first + (last - first) * i / (M - 1); sizes are rounded to whole pixels. Epochs are dealt
    as evenly as whole epochs allow. `UsageError` when a size is below the network's stride. Tan & Le 2021, Algorithm 1.
    """
    sizes = recipe.size_px or (network.resolution, network.resolution)
    if recipe.freeze > len(network.stages):
        raise UsageError(f"recipe freeze is {recipe.freeze}, but {network.name} has {len(network.stages)} stages.")
    if min(sizes) < network.stride:
        raise UsageError(f"recipe size_px {sizes} is below the stride {network.stride} of {network.name}.")
    pairs = {
        "size_px": sizes,
        "magnitude": recipe.magnitude,
        "mixup": recipe.mixup,
        "cutmix": recipe.cutmix,
        "dropout": recipe.dropout or (network.dropout, network.dropout),
        "drop_path": recipe.drop_path or (network.drop_path, network.drop_path),
    }
    count = recipe.stages
    ends = [round(recipe.epochs * (i + 1) / count) for i in range(count)]
    rows = []
    if recipe.head_epochs:
        plain = {"size_px": sizes[0], "magnitude": 0.0, "mixup": 0.0, "cutmix": 0.0, "dropout": 0.0, "drop_path": 0.0}
        rows.append(Phase(index=0, epochs=recipe.head_epochs, batch=recipe.batch, head_only=True, **plain))
    for i in range(count):
        part = i / (count - 1) if count > 1 else 1.0
        values: dict[str, Any] = {name: first + (last - first) * part for name, (first, last) in pairs.items()}
        values["size_px"] = round(values["size_px"])
        epochs = ends[i] - (ends[i - 1] if i else 0)
        rows.append(Phase(index=len(rows), epochs=epochs, batch=recipe.batch, **values))
    return tuple(rows)


# --- the named recipes ----------------------------------------------------------------------------------------------

FINETUNE = Recipe(
    name="finetune",
    epochs=15,
    lr=1e-3,
    warmup=1,
    norm_momentum=0.1,
    weight_decay=1e-2,
    ema=0.998,
    label_smoothing=0.1,
    crop="inception",
    magnitude=(5, 5),
    drop_path=(0.1, 0.1),
    patience=6,
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        FINETUNE,
        # images without an up: solar cells, tiles, wafers, microscopy. The whole image is kept, in all eight turns.
        FINETUNE.replace(name="inspection", crop="dihedral", magnitude=(0, 0), label_smoothing=0.0),
        # small data from random weights: RMSProp as in the papers, at a rate for small batches
        Recipe(
            name="scratch",
            epochs=60,
            batch=64,
            optimizer="rmsprop",
            lr=0.016,
            lr_batch=256,
            warmup=3,
            weight_decay=1e-5,
            ema=0.999,
            label_smoothing=0.1,
            crop="inception",
            magnitude=(5, 5),
        ),
    )
}


def get(name: str) -> Recipe:
    """The named recipe; `UsageError` names the nearest one."""
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}.{nearest(name, RECIPES)}")
    return RECIPES[name]


def with_settings(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """The recipe with fields set from text, as `--set lr=0.01 --set size_px=96,160` gives them.

    `schedule.kind=linear` reaches into the schedule; a pair may be one number for both ends; `none` is None.
    `UsageError` for an unknown field (naming the nearest) or a value that does not fit.

    >>> with_settings(FINETUNE, {"size_px": "96,160", "lr": "0.01"}).size_px
    (96, 160)
    """
    changes: dict[str, Any] = {}
    schedule = recipe.schedule
    for name, text in settings.items():
        if name.startswith("schedule."):
            inner = name.removeprefix("schedule.")
            schedule = schedule.replace(**{inner: _parse(schedule, inner, text)})
            changes["schedule"] = schedule
        else:
            changes[name] = _parse(recipe, name, text)
    return recipe.replace(**changes)


def _parse(value: Value, name: str, text: str) -> Any:
    """`text` as the type of field `name`, judged by its annotation."""
    fields = {f.name: f.type for f in dataclasses.fields(value)}  # ty: ignore[invalid-argument-type]
    check_choice(f"{type(value).__name__} field", name, fields)
    kind = fields[name]
    options = (kind, *get_args(kind))
    if text.lower() == "none" and type(None) in options:
        return None
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        pair = next((o for o in options if o in (tuple[int, int], tuple[float, float])), None)
        if pair is not None:
            parts = [get_args(pair)[0](part) for part in text.split(",")]
            first, last = parts if len(parts) == 2 else parts * 2
            return (first, last)
        number = next((o for o in options if o in (int, float)), None)
        if number is not None:
            return float(text) if number is float else int(text)
    except (ValueError, KeyError):
        raise UsageError(f"recipe field {name} cannot be set to {text!r}: it takes {_describe(kind)}.") from None
    return text


def _describe(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(kind, "one number, or two with a comma (first and last phase)")

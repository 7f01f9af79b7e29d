"""How is a network trained? A recipe is a value; its phases are printed before any compute.

A `Recipe` says what varies over training as (first, last) pairs; `phases` cuts it into stages whose image size and
regularisation rise together (Tan & Le 2021, Algorithm 1: the first phase has exactly the first values, the last exactly
the last ones). `Schedule` is a function of progress in [0, 1]: no epochs, no state. `places` says where every step is,
`rate` with which learning rate it is taken. The named recipes are the tables of `presets.py`; nothing imports torch.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from effnet.cost import cost, training_bytes
from effnet.presets import PRESETS
from effnet.spec import Network
from effnet.value import UsageError, Value, check_choice, check_range, nearest

Optimizer = Literal["rmsprop", "sgd", "adamw", "muon"]
Crop = Literal["inception", "dihedral", "resize", "pad", "none"]
Policy = Literal["randaugment", "autoaugment", "cutout"]
Growth = Literal["paper", "official"]
Precision = Literal["auto", "float32", "bfloat16"]
Pair = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Schedule(Value):
    """A factor as a function of progress in [0, 1]: how much is left of what there was at first.

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

    def between(self, first: float, last: float, progress: float) -> float:
        """From `first` to `last`, exactly so where the factor is 1 and 0: `first` counts as much as is left of it.

        >>> Schedule(kind="linear").between(128, 300, 0.25)
        171.0
        """
        left = self.at(progress)
        return first if first == last else left * first + (1 - left) * last


@dataclass(frozen=True, kw_only=True)
class Recipe(Value):
    """Everything that decides a training run, apart from the network and the data.

    Pairs are (first phase, last phase), `rise` is the way between. None for `size_px`, `dropout` or `drop_path`: the
    network's own value. `growth` of the size over M stages: `paper` starts at the first size, `official` (the released
    V2 code) one M-th above it and rounds down: 171, 214, 257, 300 instead of 128, 185, 243, 300.
    `optimizer`: `muon` makes the steps of inner convolutions orthogonal, for training from random weights. `momentum`:
    of RMSProp, SGD and Muon. `lr`: the peak rate at `lr_batch` images a step, scaled linearly to the batch. `warmup`,
    `head_epochs`: in epochs.
    `memory_gb`: each phase takes the largest batch whose estimated memory is so many 10^9 bytes, 0 for `batch` always.
    `accumulate`: a step's batch is computed in so many parts, one after the other, and batch norm sees one at a time.
    `least_steps`: at least so many, in more epochs than `epochs` where there are few images.
    `head_epochs`: only the classifier learns at first, behind the frozen network, at `head_lr`.
    `freeze`: the stem and the first so many stages keep their trained weights (their batch norms still see the data);
    the early stages are the dear ones, so a step at a large size costs about half.
    `decay_bias`: weight decay for the biases of squeeze-excite and classifier too (V1's code; V2's leaves them out).
    `norm_momentum`: of batch norm while training, PyTorch's convention, None for the network's own. The published 0.01
    is for 350 epochs; over a short fine-tuning its statistics lag behind the weights (0.1: Kornblith et al. 2019).
    `norm_batches`: batch norm's statistics are counted anew over so many batches before each evaluation; 0: they are
    the moving averages of training. `ema`: decay of the average of the weights that is evaluated and kept, 0 for none.
    `policy`: what happens to a view beside `crop`: RandAugment at `magnitude` (0: nothing), AutoAugment v0, or one
    square of noise half as wide as the view. `least_area`: of an inception crop, as a share of the image.
    `minival`: so many training images, cut by class, are the validation part, and the data's own is left for the end.
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
    memory_gb: float = 0.0
    accumulate: int = 1
    least_steps: int = 0
    head_epochs: int = 0
    head_lr: float = 1e-3
    freeze: int = 0
    norm_momentum: float | None = None
    norm_batches: int = 0
    ema: float = 0.0
    label_smoothing: float = 0.0
    crop: Crop = "inception"
    least_area: float = 0.08
    policy: Policy = "randaugment"
    stages: int = 1
    growth: Growth = "paper"
    rise: Schedule = field(default_factory=lambda: Schedule(kind="linear"))
    size_px: tuple[int, int] | None = None
    eval_px: int | None = None
    magnitude: Pair = (0.0, 0.0)
    mixup: Pair = (0.0, 0.0)
    cutmix: Pair = (0.0, 0.0)
    dropout: Pair | None = None
    drop_path: Pair | None = None
    minival: int = 0
    balance: bool = False
    soft_targets: bool = False
    monitor: Literal["accuracy", "nll"] = "accuracy"
    patience: int = 0
    precision: Precision = "auto"
    on_error: Literal["error", "skip"] = "error"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "lr_batch", "stages", "accumulate"):
            check_range(f"recipe {name}", getattr(self, name), 1)
        counts = ("head_epochs", "freeze", "patience", "seed", "least_steps", "norm_batches", "minival")
        for name in ("warmup", "weight_decay", "memory_gb", *counts):
            check_range(f"recipe {name}", getattr(self, name), 0)
        check_range("recipe least_area", self.least_area, 0.01, 1)
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
        for f in dataclasses.fields(self):
            if get_args(f.type) and all(isinstance(option, str) for option in get_args(f.type)):
                check_choice(f"recipe {f.name}", getattr(self, f.name), get_args(f.type))
        if self.stages > self.epochs:
            raise UsageError(
                f"recipe {self.name!r} has {self.stages} stages in {self.epochs} epochs: at most one a stage."
            )
        if self.memory_gb and self.least_steps:
            raise UsageError("recipe least_steps counts steps of a fixed batch: it cannot be set beside memory_gb.")

    def rate(self, progress: float, epochs_done: float, batch: int | None = None) -> float:
        """The learning rate for `batch` images a step: a linear warm-up replaces the schedule until it is over.

        It is `lr * batch / lr_batch` at its peak: twice the images, twice the step (Goyal et al. 2017).
        """
        peak = self.lr * (self.batch if batch is None else batch) / self.lr_batch
        if epochs_done < self.warmup:
            return peak * epochs_done / self.warmup
        return peak * self.schedule.at(progress)


SCHEDULES = tuple(f.name for f in dataclasses.fields(Recipe) if f.type is Schedule)


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


def phases(recipe: Recipe, network: Network, images: int | None = None) -> tuple[Phase, ...]:
    """The phases of `recipe` for `network`, in order; a head-only phase first where the recipe has `head_epochs`.

    Phase i of M has the values of `rise` between first and last at i / (M - 1), sizes rounded to whole pixels. Epochs
    are dealt as evenly as whole epochs allow. `images`: how many there are to train on, where that is known.
    `UsageError` for a size below the network's stride, a batch of more than `images`, a phase that no batch fits.
    Tan & Le 2021, Algorithm 1; `growth` `official`: sizes and the ends of phases as in the released code.

    >>> from effnet.families import get
    >>> [phase.size_px for phase in phases(RECIPES["v2-s-paper"], get("efficientnetv2_s"))]
    [128, 185, 243, 300]
    """
    sizes = recipe.size_px or (network.resolution, network.resolution)
    if recipe.freeze > len(network.stages):
        raise UsageError(f"recipe freeze is {recipe.freeze}, but {network.name} has {len(network.stages)} stages.")
    if min(sizes) < network.stride:
        raise UsageError(f"recipe size_px {sizes} is below the stride {network.stride} of {network.name}.")
    if images is not None and recipe.batch > images and not recipe.memory_gb:
        raise UsageError(f"recipe batch is {recipe.batch}, but there are {images} images to train on: --set batch=N.")
    pairs = {
        "magnitude": recipe.magnitude,
        "mixup": recipe.mixup,
        "cutmix": recipe.cutmix,
        "dropout": recipe.dropout or (network.dropout, network.dropout),
        "drop_path": recipe.drop_path or (network.drop_path, network.drop_path),
    }
    count, official = recipe.stages, recipe.growth == "official"
    ends = [(int if official else round)(recipe.epochs * i / count) for i in range(count + 1)]
    rows: list[Phase] = []
    for i in range(count):
        part = i / (count - 1) if count > 1 else 1.0
        size_px = round(recipe.rise.between(*sizes, part))
        if official:
            size_px = int(sizes[0] + (sizes[1] - sizes[0]) * (i + 1) / count)
        batch = largest_batch(recipe, network, size_px, images) if recipe.memory_gb else recipe.batch
        values: dict[str, Any] = {name: recipe.rise.between(*pair, part) for name, pair in pairs.items()}
        rows.append(Phase(index=i, epochs=ends[i + 1] - ends[i], size_px=size_px, batch=batch, **values))
    if recipe.head_epochs:
        plain = dict.fromkeys(pairs, 0.0)
        rows = [
            rows[0].replace(epochs=recipe.head_epochs, head_only=True, **plain),
            *(row.replace(index=row.index + 1) for row in rows),
        ]
    return tuple(rows)


# --- memory ---------------------------------------------------------------------------------------------------------

MOST_BATCH = 4096  # the papers' own
LEAST_STEPS = 10  # of an epoch, where memory alone would put all images into one


def memory(recipe: Recipe, network: Network, size_px: int, batch: int, precision: str | None = None) -> int:
    """Estimated bytes of a training step by `cost.training_bytes`, with this recipe's optimizer and average.

    `precision` `bfloat16` halves the activations; None: the recipe's, and float32 where that is `auto`.
    """
    spent = cost(network, size_px).to_dict()
    slots = (1 if recipe.momentum else 0) if recipe.optimizer == "sgd" else 2
    element = 2 if (precision or recipe.precision) == "bfloat16" else 4
    return int(training_bytes(spent, batch, slots=slots, ema=recipe.ema > 0, element=element))


def fitting_batch(recipe: Recipe, network: Network, size_px: int, limit: float, precision: str | None = None) -> int:
    """The largest batch whose step takes at most `limit` bytes; 0 when not even one image fits."""
    fixed, one = (memory(recipe, network, size_px, batch, precision) for batch in (0, 1))
    return max(0, int((limit - fixed) // (one - fixed)))


def largest_batch(recipe: Recipe, network: Network, size_px: int, images: int | None = None) -> int:
    """The batch of a phase under `memory_gb`: a multiple of 8 from 8 on, at most 4,096 and a tenth of the images."""
    limit = 1e9 * recipe.memory_gb
    most = MOST_BATCH if images is None else min(MOST_BATCH, max(images // LEAST_STEPS, 1))
    batch = min(most, fitting_batch(recipe, network, size_px, limit))
    if batch < 1:
        raise UsageError(f"memory_gb is {recipe.memory_gb:g}: {too_large(recipe, network, size_px, 1, limit)}")
    return batch // 8 * 8 if batch >= 8 else batch


def too_large(recipe: Recipe, network: Network, size_px: int, batch: int, limit: float, *, parts: int = 1) -> str:
    """The sentence that names what does not fit into `limit` bytes, and what would.

    `parts`: into how many a step's batch is cut (processes, accumulation); `batch` is one of them.
    """
    needed = memory(recipe, network, size_px, batch)
    fits = fitting_batch(recipe, network, size_px, limit)
    words = f"batch {fits} would fit (--set batch={fits * parts})"
    if not fits:
        sizes = range(size_px, network.stride - 1, -1)
        px = next((px for px in sizes if fitting_batch(recipe, network, px, limit)), None)
        words = "nothing of this network would fit" if px is None else f"one image of {px} px would fit"
    return (
        f"the phase at {size_px} px with batch {batch} takes about {needed / 1e9:.2f} GB of {limit / 1e9:.2f}; {words}."
    )


# --- where a step is ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Place:
    """A step: its phase, the epoch over the whole run, its number in the epoch, and how many `steps` that one has."""

    phase: Phase
    epoch: int
    step_in_epoch: int
    steps: int


def steps_per_epoch(images: int, batch: int) -> int:
    """Full batches in an epoch; one smaller batch when there are fewer images than that."""
    return max(1, images // batch)


def places(rows: Sequence[Phase], images: int, done: int = 0) -> Iterator[Place]:
    """The next step of each epoch that is left after `done` steps of the whole run: the first one may be under way."""
    epoch = 0
    for phase in rows:
        steps = steps_per_epoch(images, phase.batch)
        for _ in range(phase.epochs):
            if done < steps:
                yield Place(phase=phase, epoch=epoch, step_in_epoch=done, steps=steps)
            done = max(0, done - steps)
            epoch += 1


def rate(recipe: Recipe, place: Place) -> float:
    """The learning rate of the step at `place`; a head-only phase has its own, constant. Progress is in epochs."""
    if place.phase.head_only:
        return recipe.head_lr
    done = place.epoch - recipe.head_epochs + place.step_in_epoch / place.steps
    return recipe.rate(done / recipe.epochs, done + 1 / place.steps, place.phase.batch)


def for_images(recipe: Recipe, images: int) -> Recipe:
    """The recipe with as many epochs as its `least_steps` take with so many images.

    >>> for_images(get("v2-transfer-paper"), 2040).epochs
    3334
    """
    steps = steps_per_epoch(images, recipe.batch)
    return recipe.replace(epochs=max(recipe.epochs, -(-recipe.least_steps // steps)))


# --- the named recipes ----------------------------------------------------------------------------------------------

RECIPES = {name: Recipe.from_dict({"name": name, **fields}) for name, (_, fields) in PRESETS.items()}
FINETUNE = RECIPES["finetune"]


def get(name: str) -> Recipe:
    """The named recipe; `UsageError` names the nearest one."""
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}.{nearest(name, RECIPES)}")
    return RECIPES[name]


RARE = 10.0  # a largest class of so many times the smallest one: classes are then weighed
FEW_STEPS, LEAST_BATCH = 4, 4  # fewer steps an epoch: a smaller batch, though batch norm wants several images
FEW_IMAGES = 50  # of a class, for random weights


def choose(counts: Sequence[int], *, trained: bool, upright: bool = True) -> tuple[Recipe, str]:
    """The recipe for data with `counts` images to train on in each class, and the reason in one line.

    `trained`: the network starts from trained weights. `upright`: the pictures have an up (solar cells have none).

    >>> choose([900, 800], trained=True)[1]
    'recipe finetune, because the network starts from trained weights'
    >>> choose([900, 40], trained=True)[0].balance
    True
    """
    recipe = get(("finetune" if upright else "inspection") if trained else "scratch")
    reasons = [f"the network starts from {'trained' if trained else 'random'} weights"]
    changes: dict[str, Any] = {}
    if not upright:
        reasons.append("the images have no up")
        changes |= {} if trained else {"crop": "dihedral", "magnitude": (0.0, 0.0)}
    images, present = sum(counts), [count for count in counts if count]
    if images < FEW_STEPS * recipe.batch:
        batch = max(LEAST_BATCH, 2 ** int(math.log2(max(images / FEW_STEPS, 1))))
        changes["batch"] = min(batch, max(images, 1))
        reasons.append(f"there are only {images} images")
    if present and max(present) >= RARE * min(present):
        changes["balance"] = True
        reasons.append(f"classes have {min(present)} to {max(present)} images")
    advice = ""
    if not trained and images < FEW_IMAGES * len(counts):
        advice = "; trained weights (--pretrained) would learn more from so few"
    settings = ", ".join(f"{name} {_word(value)}" for name, value in changes.items())
    words = f"recipe {recipe.name}{f' with {settings}' if settings else ''}, because {_listed(reasons)}{advice}"
    return recipe.replace(**changes), words


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def settings(recipe: Recipe) -> dict[str, str]:
    """What `--set` must be given to turn the named recipe into this one: `with_settings` is the inverse.

    >>> settings(FINETUNE.replace(size_px=(96, 160), lr=0.01))
    {'lr': '0.01', 'size_px': '96,160'}
    """
    before, now = _flat(RECIPES.get(recipe.name, FINETUNE)), _flat(recipe)
    return {name: text for name, text in now.items() if text != before[name]}


def _flat(recipe: Recipe) -> dict[str, str]:
    """Every field as the text that `--set` takes."""
    values = recipe.to_dict()
    inner = {f"{outer}.{name}": value for outer in SCHEDULES for name, value in values.pop(outer).items()}
    return {name: _word(value) for name, value in (values | inner).items()}


def _word(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def with_settings(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """The recipe with fields set from text, as `--set lr=0.01 --set size_px=96,160` gives them.

    `schedule.kind=linear` reaches into a schedule; a pair may be one number for both ends; `none` is None.
    `UsageError` for an unknown field (naming the nearest) or a value that does not fit.

    >>> with_settings(FINETUNE, {"size_px": "96,160", "lr": "0.01"}).size_px
    (96, 160)
    """
    changes: dict[str, Any] = {}
    for name, text in settings.items():
        outer, _, inner = name.partition(".")
        if inner and outer in SCHEDULES:
            schedule = changes.get(outer, getattr(recipe, outer))
            changes[outer] = schedule.replace(**{inner: _parse(schedule, inner, text)})
        else:
            changes[name] = _parse(recipe, name, text)
    return recipe.replace(**changes)


def _parse(value: Value, name: str, text: str) -> Any:
    """`text` as the type of field `name`, judged by its annotation."""
    fields = {f.name: f.type for f in dataclasses.fields(value)}  # ty: ignore[invalid-argument-type]
    check_choice(f"{type(value).__name__} field", name, fields)
    kind = fields[name]
    if kind is Schedule:
        raise UsageError(f"recipe field {name} is a schedule: --set {name}.kind=linear, {name}.end, .rate, .every.")
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

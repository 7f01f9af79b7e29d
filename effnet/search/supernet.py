"""How are many candidates judged by one training? As parts of a supernet: all of a space share one set of weights.

A candidate's tensor is the front of the shared one (its leading channels) and the middle of its kernels; a shallower
stage is the first blocks of a deeper one. Blocks whose weights mean something else do not share: there is one set for
each operator of a stage, and one for its blocks without expansion. A candidate runs as the `Model` it would be alone,
with those slices for weights, so there is no second network code, and what is taken out is what ran.

A step is the sandwich rule: the largest network learns from the labels, the smallest and some drawn at random learn
from its answers, and the optimizer takes one step for all. Operators of largest and smallest are drawn anew each step,
as no network has all the sets. The answers of an untrained network say nothing, and three of four that learn them keep
it so: the others begin with the labels, and go over to the answers in proportion to the training done. Before a
candidate is judged the statistics of its batch norms are counted anew: those of other candidates are not its own.

Sources: Yu & Huang 2019 (universally slimmable networks: sandwich rule, in-place distillation, statistics afterwards),
Cai et al. 2020 (once for all: kernels by their centre; its learnt transformation is left out), Yu et al. 2020 (BigNAS:
only the largest is regularised, soft labels alone for the others).
"""

import hashlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effnet import augment, checkpoint, data
from effnet.coefficients import Evaluate
from effnet.cost import counts
from effnet.evaluate import evaluate
from effnet.images import normalise
from effnet.layers import BLOCKS
from effnet.network import Model
from effnet.optim import load_optimizer_tensors, optimizer, optimizer_tensors, renew_norms
from effnet.plan import precision_context, run_preprocess
from effnet.recipes import Place, Recipe, phases, places, rate
from effnet.samples import Splits
from effnet.search.space import Code, Space
from effnet.spec import Network, Stage, block
from effnet.train import Diverged, score, views, weighted_cross_entropy, weights_of_classes
from effnet.value import UsageError, check_range

SHARED = {
    "stages": ("op", "repeats", "width", "kernel", "expand", "se", "skip"),
    "stem": ("width", "kernel"),
    "head": ("width",),
}
MOST = 20_000  # combinations of the choices of one stage
NORM_BATCHES = 8  # of training images, for the statistics of a candidate's batch norms
DRAWN = 2  # networks at random in each step (Yu & Huang 2019)
SAVE_SECONDS = 300.0


def kind(stage: Stage) -> str:
    """The set of weights that a stage's blocks take: its operator's, without expansion another one."""
    return f"{stage.op}1" if stage.op in ("mbconv", "fused") and stage.expand == 1 else stage.op


class Supernet(nn.Module):
    """The shared weights of `space`, drawn from `seed`; nothing is learnt of batch norm but scale and shift.

    `among`: the only codes that it is trained for, such as those within a search's limits; None: all of the space.
    `UsageError` where candidates cannot share: a choice of a stride, an activation or the image size, say.

    >>> from effnet.families import get
    >>> from effnet.search.space import vary
    >>> net = Supernet(vary(get("efficientnet_lite0"), {"stages.1.kernel": (3, 5), "stages.1.expand": (1, 6)}))
    >>> tuple(net.get_parameter("stages.1.0.mbconv.depthwise.conv.weight").shape)
    (96, 1, 5, 5)
    """

    def __init__(self, space: Space, seed: int = 0, among: Sequence[Code] | None = None) -> None:
        super().__init__()
        self.space, self.among = space, among
        self.may_be = _stages(space)  # each stage
        drawn = torch.Generator().manual_seed(seed)
        for name, shape in _shapes(space, self.may_be).items():
            _plant(self, name, nn.Parameter(_initial(name, shape, drawn)))

    # -- candidates --------------------------------------------------------------------------------------------------

    def slices(self, candidate: Model) -> dict[str, Tensor]:
        """The weights of a candidate by its own names: parts of the shared ones, to which their gradients go."""
        sets = [kind(stage) for stage in candidate.network.stages]
        return {
            name: _cut(self.get_parameter(_shared(name, sets)), own.shape) for name, own in candidate.named_parameters()
        }

    def model(self, network: Network, labels: Sequence[str] | None = None) -> Model:
        """A candidate taken out: a `Model` of its own with copies of its weights. Its norms have no statistics yet."""
        with torch.device(next(self.parameters()).device):
            made = Model(network, labels)
        with torch.no_grad():
            for name, tensor in self.slices(made).items():
                made.get_parameter(name).copy_(tensor)
        return made.eval()

    def logits(self, network: Network, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A candidate on `images`, float32 (N, 3, H, W), as it runs in training: (N, K), with gradients."""
        with torch.device(images.device):
            made = Model(network).train()
        made.set_generator(generator)
        return torch.func.functional_call(made, self.slices(made), (images,))

    # -- the sandwich ------------------------------------------------------------------------------------------------

    def end(self, code: Code, *, largest: bool) -> Code:
        """The largest or smallest candidate with the same sets of weights as `code`."""
        digits = list(code)
        for place, choice in enumerate(self.space.choices):
            part, _ = choice.changes(0)
            if not part.startswith("stages.") and len(choice.options) > 1:
                sizes = [sum(choice.changes(index)[1].values()) for index in range(len(choice.options))]
                digits[place] = sizes.index((max if largest else min)(sizes))
        for stage in self.may_be:
            mine = tuple(code[place] for place in stage.places)
            ends = stage.ends[stage.kinds[mine]]
            for place, digit in zip(stage.places, ends[largest], strict=True):
                digits[place] = digit
        return tuple(digits)

    def sandwich(self, seed: int, step: int, drawn: int = DRAWN) -> list[Network]:
        """The networks of a step: the largest, `drawn` at random, the smallest. Keyed by (seed, step).

        Of chosen codes (`among`) all are drawn, and the one with the most multiply-adds is the largest.
        """
        rng = np.random.default_rng([seed, step])
        if self.among is not None:
            chosen = [self.among[index] for index in rng.integers(len(self.among), size=drawn + 2)]
            order = np.argsort(-self.space.costs(chosen)["macs"], kind="stable")
            return [self.space.network(chosen[index]) for index in order]
        codes = [self.space.sample(rng) for _ in range(drawn + 2)]
        codes[0], codes[-1] = self.end(codes[0], largest=True), self.end(codes[-1], largest=False)
        return [self.space.network(code) for code in codes]


def refuse_unshareable(space: Space) -> None:
    """`UsageError` where the candidates of `space` cannot share weights; nothing is drawn."""
    _stages(space)


# --- what is shared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    """What may become of one stage: the places of its choices, the set of every combination of their digits."""

    places: tuple[int, ...]
    kinds: dict[Code, str]
    ends: dict[str, tuple[Code, Code]]  # set: digits of the fewest and of the most parameters
    widest: dict[str, Stage]  # set: every field at its most
    width: int


def _stages(space: Space) -> list[_Stage]:
    _refuse(space)
    parts = [choice.changes(0)[0] for choice in space.choices]
    found, width = [], max(_options(space, "stem", "width", space.base.stem.width))
    for index in range(len(space.base.stages)):
        places = tuple(place for place, part in enumerate(parts) if part == f"stages.{index}")
        sizes = [space.sizes[place] for place in places]
        if math.prod(sizes) > MOST:
            raise UsageError(
                f"stages.{index} has {math.prod(sizes):,} combinations; a supernet takes {MOST:,} at most."
            )
        made: dict[Code, Stage] = {}
        for digits in itertools.product(*map(range, sizes)):
            changes: dict[str, Any] = {}
            for place, digit in zip(places, digits, strict=True):
                changes |= space.choices[place].changes(digit)[1]
            made[digits] = space._stage(index, changes)
        kinds = {digits: kind(stage) for digits, stage in made.items()}
        ends, widest = {}, {}
        for name in dict.fromkeys(kinds.values()):
            mine = {digits: stage for digits, stage in made.items() if kinds[digits] == name}
            order = sorted(mine, key=lambda digits, mine=mine: (_weight(mine[digits], width), mine[digits].skip))
            ends[name] = order[0], order[-1]
            most = {
                f: max(getattr(s, f) for s in mine.values()) for f in ("repeats", "width", "kernel", "expand", "se")
            }
            widest[name] = mine[order[-1]].replace(**most)
        if {stage.op for stage in made.values()} & {"basic", "bottleneck"}:
            _refuse_other_widths(space, index)
        found.append(_Stage(places, kinds, ends, widest, width))
        width = max(stage.width for stage in made.values())
    return found


def _weight(stage: Stage, channels: int) -> int:
    """The parameters of a stage."""
    first, rest = block(stage, channels, stage.width, stage.stride, 32), block(stage, stage.width, stage.width, 1, 32)
    return counts(first)["params"] + (stage.repeats - 1) * counts(rest)["params"]


def _refuse(space: Space) -> None:
    """`UsageError` for a choice of something that one set of weights cannot be for all of."""
    for choice in space.choices:
        for index in range(len(choice.options) if len(choice.options) > 1 else 0):
            part, change = choice.changes(index)
            allowed = SHARED.get(part.partition(".")[0], ())
            for field in change:
                if field not in allowed:
                    words = ", ".join(f"{owner} {'/'.join(names)}" for owner, names in SHARED.items())
                    raise UsageError(
                        f"a supernet cannot share weights over a choice of {field} of {part or 'the network'}, only "
                        f"over {words}: judge by --evaluator training."
                    )
    if 0 in (widths := _options(space, "head", "width", space.base.head.width)) and len(widths) > 1:
        raise UsageError("a supernet cannot share its classifier between networks with and without a head convolution.")


def _refuse_other_widths(space: Space, index: int) -> None:
    for part in ("stem" if index == 0 else f"stages.{index - 1}", f"stages.{index}"):
        if len(_options(space, part, "width", 0)) > 1:
            raise UsageError(f"a supernet cannot share residual blocks (stages.{index}) of several widths.")


def _options(space: Space, part: str, field: str, usual: int) -> set[int]:
    """The values that a field of a part may have."""
    found = [
        change[field]
        for choice in space.choices
        for owner, change in map(choice.changes, range(len(choice.options)))
        if owner == part and field in change
    ]
    return set(found) or {usual}


def _shapes(space: Space, stages: Sequence[_Stage]) -> dict[str, tuple[int, ...]]:
    """The shared tensors: as large as any candidate needs them, by their names."""
    base, shapes = space.base, dict[str, tuple[int, ...]]()
    most = {name: max(_options(space, "head", name, getattr(base.head, name))) for name in SHARED["head"]}
    stem = {name: max(_options(space, "stem", name, getattr(base.stem, name))) for name in SHARED["stem"]}
    ends = base.replace(stem=base.stem.replace(**stem), head=base.head.replace(**most))
    last = max(stage.width for stage in stages[-1].widest.values())
    ends = ends.replace(stages=(*ends.stages[:-1], ends.stages[-1].replace(width=last)))
    with torch.device("meta"):
        whole = Model(ends)
        for part in ("stem", "head", "classifier"):
            shapes |= _named(part, whole.get_submodule(part))
        for index, stage in enumerate(stages):
            for name, widest in stage.widest.items():
                first = block(widest, stage.width, widest.width, widest.stride, 32)
                rest = block(widest, widest.width, widest.width, 1, 32)
                for place in range(widest.repeats):
                    unit = first if place == 0 else rest
                    shapes |= _named(f"stages.{index}.{place}.{name}", BLOCKS[unit.op](unit, base))
    return shapes


def _named(prefix: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{name}": tuple(tensor.shape) for name, tensor in module.named_parameters()}


def _shared(name: str, sets: Sequence[str]) -> str:
    """What a tensor of a candidate is called in the supernet: a block's name is followed by that of its set."""
    if not name.startswith("stages."):
        return name
    stages, index, place, rest = name.split(".", 3)
    return f"{stages}.{index}.{place}.{sets[int(index)]}.{rest}"


def _cut(whole: Tensor, shape: Sequence[int]) -> Tensor:
    """The leading channels of `whole` and the centre of its kernel."""
    for dim, size in enumerate(shape):
        start = (whole.shape[dim] - size) // 2 if dim > 1 else 0
        whole = whole.narrow(dim, start, size)
    return whole.contiguous()


def _initial(name: str, shape: tuple[int, ...], drawn: torch.Generator) -> Tensor:
    """As `network.initialise` draws it, for the largest; the classifier from zero, as `train` begins."""
    if len(shape) == 4:
        channels = 1 if ".depthwise." in name else shape[0]
        return torch.randn(shape, generator=drawn) * math.sqrt(2 / (shape[2] * shape[3] * channels))
    return torch.ones(shape) if name.endswith(".norm.weight") else torch.zeros(shape)


def _plant(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Registers a parameter under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, parameter)


# --- training -------------------------------------------------------------------------------------------------------


def training(
    net: Supernet,
    splits: Splits,
    recipe: Recipe,
    path: Path,
    *,
    drawn: int = DRAWN,
    device: str = "cpu",
    workers: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Trains the supernet for `recipe.epochs` epochs, goes on from `path` if it is there, and yields each epoch.

    An event: `epoch` (from 1), `epochs`, `loss` (of the largest, a mean over the epoch), `seconds`. `path` is written
    after each epoch and every five minutes; a kill costs what came after. The numbers depend on the recipe's seed and
    the data alone. Of the recipe size, batch, rate, views, mixing and regularisation count; its average, frozen stages
    and head-only epochs are refused. `UsageError` too for a file of another supernet; `Diverged` for a broken loss.
    """
    _check(recipe, drawn)
    base = net.space.base
    rows, images = phases(recipe, base, len(splits.train)), len(splits.train)
    net.to(device)
    learner, step = optimizer(net, recipe), 0
    identity = {"space": net.space.to_json(), "recipe": recipe.to_json(), "drawn": str(drawn)}
    identity |= {"training images": splits.train.fingerprint(), "classes": " ".join(splits.classes)}
    identity |= {"limits": str(net.among)}
    identity = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in identity.items()}
    losses: list[float] = []
    if path.exists():
        step, losses = _restored(net, learner, path, identity)
    preprocess, class_weights = run_preprocess(base, recipe), weights_of_classes(splits.train, recipe)
    cache, saved = data.Cache(), time.monotonic()
    for place in places(rows, images, step - len(losses)):
        started = time.perf_counter()
        options: dict[str, Any] = {"start_step": len(losses), "workers": workers, "cache": cache}
        for batch in views(splits.train, recipe, place, preprocess=preprocess, **options):
            now = next(places(rows, images, step))
            lr = rate(recipe, now)
            for group in learner.param_groups:
                group["lr"] = lr
            pixels = normalise(batch.images.to(device), preprocess)
            weights = (batch.weights * class_weights[batch.labels]).to(device)
            targets = batch.targets.to(device)
            losses.append(_step(net, learner, pixels, targets, weights, recipe, now, step, drawn))
            step += 1
            if time.monotonic() - saved > SAVE_SECONDS and len(losses) < place.steps:
                _save(net, learner, path, identity, recipe, step, losses)
                saved = time.monotonic()
        loss, losses = sum(losses) / len(losses), []
        _save(net, learner, path, identity, recipe, step, losses)
        seconds = round(time.perf_counter() - started, 2)
        yield {"epoch": place.epoch + 1, "epochs": recipe.epochs, "loss": round(loss, 6), "seconds": seconds}


def _check(recipe: Recipe, drawn: int) -> None:
    check_range("networks drawn in a step of a supernet", drawn, 0)
    for name in ("ema", "freeze", "head_epochs", "patience", "least_steps"):
        if getattr(recipe, name):
            raise UsageError(f"recipe {name} is {getattr(recipe, name)!r}; the training of a supernet has none: set 0.")
    if recipe.accumulate > 1:
        raise UsageError("recipe accumulate: a supernet's step is computed network by network, not in parts; set 1.")


def _step(
    net: Supernet,
    learner: torch.optim.Optimizer,
    images: Tensor,
    targets: Tensor,
    weights: Tensor,
    recipe: Recipe,
    place: Place,
    step: int,
    drawn: int,
) -> float:
    """One update from the largest, some and the smallest: the loss of the largest."""
    phase, trained = place.phase, (place.epoch + place.step_in_epoch / place.steps) / recipe.epochs
    device = images.device.type
    mixing = np.random.default_rng((recipe.seed, step))
    images, targets = augment.mix(images, targets, mixup_alpha=phase.mixup, cutmix_alpha=phase.cutmix, rng=mixing)
    images = images.contiguous(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed((recipe.seed * 1_000_003 + step) % 2**63)
    learner.zero_grad(set_to_none=True)
    told: Tensor | None = None
    first = 0.0
    for network in net.sandwich(recipe.seed, step, drawn):
        plain = told is not None  # only the largest is regularised
        network = network.replace(dropout=0.0 if plain else phase.dropout, drop_path=0.0 if plain else phase.drop_path)
        with precision_context(recipe.precision, device):
            logits = net.logits(network, images, generator).float()
        if told is None:
            loss = weighted_cross_entropy(logits, targets, weights, recipe.label_smoothing)
            told, first = logits.detach().softmax(1), float(loss.detach())
            if not math.isfinite(first):
                raise Diverged(f"the supernet's loss became {first:.6g} at step {step + 1}: lower lr ({recipe.lr:g}).")
        else:
            loss = weighted_cross_entropy(logits, torch.lerp(targets, told, trained), weights)
        loss.backward()
    learner.step()
    return first


def _save(
    net: Supernet,
    learner: torch.optim.Optimizer,
    path: Path,
    identity: Mapping[str, str],
    recipe: Recipe,
    step: int,
    losses: Sequence[float],
) -> None:
    """Weights, the optimizer's memory and the place, all or nothing."""
    tensors: dict[str, Tensor] = {f"supernet/{name}": tensor for name, tensor in net.named_parameters()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors(net, learner).items()}
    base, extra = net.space.base, {"supernet": dict(identity), "step": step, "losses": list(losses)}
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = checkpoint.Checkpoint(
        network=base, preprocess=base.preprocess, tensors=tensors, recipe=recipe.to_dict(), extra=extra
    )
    checkpoint.save(path, kept, keep_previous=True)


def _restored(
    net: Supernet, learner: torch.optim.Optimizer, path: Path, identity: Mapping[str, str]
) -> tuple[int, list[float]]:
    """Makes the supernet what it was when `path` was written: the steps done, and the losses of the open epoch."""
    saved = checkpoint.load(path)
    before = saved.extra.get("supernet")
    if not isinstance(before, Mapping):
        raise UsageError(f"{path} is no supernet: name another file, or move it away.")
    for name, digest in identity.items():
        if before.get(name) != digest:
            raise UsageError(f"{path} is a supernet of another {name}: name another study, or move the file away.")
    device = next(net.parameters()).device
    net.load_state_dict(saved.state("supernet"))
    load_optimizer_tensors(net, learner, {name: t.to(device) for name, t in saved.state("optimizer").items()})
    return saved.extra["step"], list(saved.extra["losses"])


# --- judging --------------------------------------------------------------------------------------------------------


def judging(
    net: Supernet, splits: Splits, recipe: Recipe, *, device: str = "cpu", workers: int | None = None
) -> Evaluate:
    """The function `evaluate(network, seed, epochs)` of a trained supernet: accuracy on the validation images.

    Seed and epochs were the supernet's. The candidate is taken out, its batch norms count their statistics over
    `NORM_BATCHES` (or the recipe's `norm_batches`) batches of training images, prepared as validation images are.
    """
    if not splits.val:
        raise UsageError(f"{splits.name} has no validation images to judge networks on: keep val_fraction above 0.")
    val, count = splits.val, recipe.norm_batches or NORM_BATCHES
    rows = data.order(len(splits.train), seed=recipe.seed, epoch=0, batch=recipe.batch)[:count]
    source, cache = splits.train.subset(rows.ravel()), data.Cache()

    def judge(network: Network, seed: int, epochs: int) -> float:
        preprocess = run_preprocess(network, recipe)
        options: dict[str, Any] = {"batch": recipe.batch, "workers": workers}
        batches = data.batches(
            source, size_px=preprocess.size, preprocess=preprocess, train=False, cache=cache, **options
        )
        model = net.model(network.replace(preprocess=preprocess, resolution=preprocess.size), splits.classes)
        with precision_context(recipe.precision, device):
            renew_norms(model, (normalise(batch.images.to(device), preprocess) for batch in batches))
            found = evaluate(model, val, device=device, bootstrap=0, cache=cache, **options)
        return score(found.metrics, recipe)

    return judge

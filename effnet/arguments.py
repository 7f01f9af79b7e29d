"""What do the words behind a verb mean? The options that verbs share, and the library values that they stand for.

A mistake is refused here with a `UsageError`, before any compute: names are looked up first, then files are opened,
then models are built. torch is imported inside the functions that need it, so that the other verbs are quick.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from effnet import families, recipes
from effnet.cost import METRICS
from effnet.files import write_atomically
from effnet.recipes import Recipe
from effnet.spec import Network
from effnet.value import UsageError, check_choice, check_range

if TYPE_CHECKING:
    import numpy as np

    from effnet.checkpoint import Checkpoint
    from effnet.coefficients import Evaluate
    from effnet.export.artefact import Exported
    from effnet.factory import Factory
    from effnet.latency import Error
    from effnet.network import Model
    from effnet.plan import Stopwatch
    from effnet.samples import Splits

# --- the options that verbs share -----------------------------------------------------------------------------------

MODEL = (
    "A network (effnet list), a Network as .json, a checkpoint, a run folder, hf-hub:OWNER/NAME or local-dir:FOLDER; "
    "network.tag means its trained weights."
)
DATA = "A folder, a .csv manifest, .tar shards, or elpv, elpv-modules, fashion-mnist, package:MODULE/DIR."
PATHS = "Images, or folders of them."

Data = Annotated[str, typer.Argument(metavar="DATA", help=DATA)]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
ModelOption = Annotated[str, typer.Option("--model", metavar="MODEL", help=MODEL)]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Start from the trained weights known for MODEL.")]
PretrainedFrom = Annotated[
    str | None, typer.Option(metavar="NAME|FILE", help="Start from other weights: a network.tag or a file.")
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe", help="auto: chosen from the data and the weights, and said why; effnet recipes lists all."
    ),
]
TimeBudget = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="As 90s, 20m or 1.5h: fewer epochs, then smaller images, until it fits."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Vary the recipe; may be given many times.")
]
SplitSeed = Annotated[int, typer.Option(min=0, help="Of the random split, where the data names no parts.")]
ValFraction = Annotated[float, typer.Option(help="Share of the training part to validate on, without a val part.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one.")]
Workers = Annotated[int | None, typer.Option(min=0, help="Threads that decode images. Default: a measured number.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Turns = Annotated[
    bool,
    typer.Option("--turns", help="Average over the eight flips and turns: for images without an up, 8 x the time."),
]
Split = Annotated[Literal["test", "val", "train", "all"], typer.Option(help="The part of the data.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]

SPLIT_SEED, VAL_FRACTION = 0, 0.15
AUTO = "auto"


def device(name: str) -> str:
    """`cpu` or `cuda`, whichever `name` (or `auto`) means on this machine. `UsageError` for a missing cuda."""
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError("--device cuda: torch finds no CUDA device here; --device auto takes what there is.")
    return "cuda" if available and name != "cpu" else "cpu"


def slug(text: str) -> str:
    """What `text` (a path, a named set, a network) is called in the name of a file or folder.

    >>> slug("data/solar cells/"), slug("package:skimage/data"), slug("net.json"), slug("efficientnet_lite0.in1k")
    ('solar-cells', 'package-skimage-data', 'net', 'efficientnet_lite0.in1k')
    """
    path = Path(text)
    known = path.suffix in (".json", ".csv", ".tar", ".safetensors")
    name = text if ":" in text else path.stem if known else path.resolve().name
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def table_file(out: Path | None) -> Path | None:
    """`out`, a .csv or .json file. `UsageError` for another suffix."""
    if out is not None and out.suffix not in (".csv", ".json"):
        raise UsageError(f"--out {out} ends neither in .csv nor in .json.")
    return out


# --- models ---------------------------------------------------------------------------------------------------------


def network(model: str) -> Network:
    """The network that `model` means. Only for a checkpoint or a folder of the hub's kind is torch imported."""
    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        return Network.from_json(path.read_text())
    if path.exists() or "/" in model or ":" in model or path.suffix in (".json", ".safetensors"):
        from effnet import zoo

        return zoo.find(model).network
    return families.get(model)


def weights(file: str, model: str | None, classes: int | None) -> "Checkpoint":
    """The checkpoint that `file` is; or its weights as those of `model`, with `classes` outputs if not its own number.

    `UsageError` for weights that do not say their network where `model` is not given; it names those that fit.
    """
    from effnet import zoo
    from effnet.checkpoint import is_checkpoint
    from effnet.dialects import read_foreign
    from effnet.weight_files import SUFFIXES

    path = Path(file)
    ours = path.suffix == ".safetensors" and path.is_file() and is_checkpoint(path)
    if model is not None:
        named = zoo.find(model, pretrained=False).network
        return zoo.with_weights(named.with_classes(classes or named.head.classes), path)
    if path.is_file() and path.suffix in SUFFIXES and not ours:
        fits = ", ".join(zoo.fitting(read_foreign(path))) or "no network that we know"
        raise UsageError(f"{file} does not say which network its weights are of: add --model NAME. They fit {fits}.")
    found = zoo.find(file)
    if not found.tensors:
        raise UsageError(f"{file} is a network without weights: there is nothing to convert.")
    return found


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `plan` and `train` are told. `why`: how the recipe was chosen, where the user did not."""

    splits: "Splits"
    model: "Model"
    recipe: Recipe
    why: str


def job(
    data: str,
    model: str,
    *,
    pretrained: bool,
    pretrained_from: str | None,
    recipe: str,
    settings: Sequence[str] | None,
    split_seed: int,
    val_fraction: float,
) -> Job:
    """The data, the model to start from and the recipe; `auto` is chosen from both. Raises `UsageError`."""
    from effnet.data import open_data

    changes = dict(map(_setting, settings or ()))
    chosen = None if recipe == AUTO else recipes.get(recipe)
    recipes.with_settings(chosen or recipes.FINETUNE, changes)  # a wrong word is refused before anything is read
    splits = open_data(data, split_seed=split_seed, val_fraction=val_fraction)
    start, trained = _start(model, pretrained, pretrained_from, len(splits.classes))
    why = ""
    if chosen is None:
        chosen, why = recipes.choose(splits.train.counts().tolist(), trained=trained, upright=splits.upright)
    told = recipes.with_settings(chosen, changes)
    return Job(splits=_with_minival(splits, told.minival, split_seed), model=start, recipe=told, why=why)


def _with_minival(splits: "Splits", images: int, seed: int) -> "Splits":
    """So many training images, cut by class, to validate on; the data's own validation part is then the test part."""
    from effnet.samples import cut_validation

    if not images:
        return splits
    if images > len(splits.train) / 2:
        raise UsageError(
            f"the recipe holds out minival={images} images to validate on, but there are {len(splits.train)} to train "
            "on: --set minival=0 takes the val part of the data, or any N."
        )
    train, val = cut_validation(splits.train, images / len(splits.train), seed)
    return replace(splits, train=train, val=val, test=splits.test or splits.val)


def seconds(text: str) -> float:
    """A time as `90s`, `20m` or `1.5h` in seconds.

    >>> seconds("90s"), seconds("20m"), seconds("1.5h")
    (90.0, 1200.0, 5400.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not found or not float(found[1]):
        raise UsageError(f"--time-budget {text!r} is no time: write 90s, 20m or 1.5h.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def in_time(job: Job, budget: str | None, device: str) -> tuple[Job, "Stopwatch | None"]:
    """The job with its recipe shortened to fit the time budget, if there is one, and the clock that timed it."""
    from effnet.plan import stopwatch, told, within_time

    if budget is None:
        return job, None
    network = job.model.network.with_classes(len(job.splits.classes))
    counts = {"train_images": len(job.splits.train), "val_images": len(job.splits.val or ())}
    watch = stopwatch(job.model, job.recipe, network, counts["train_images"], device)
    recipe = within_time(job.recipe, network, seconds(budget), timing=watch, **counts)
    why = f"{job.why}; " if job.why else ""
    return replace(job, recipe=recipe, why=why + told(job.recipe, recipe, network)), watch


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text!r} is not FIELD=VALUE, as in --set epochs=5.")
    return name.strip(), value.strip()


def _start(model: str, pretrained: bool, pretrained_from: str | None, classes: int) -> tuple["Model", bool]:
    """The model to train, and whether its weights were trained before."""
    from effnet import zoo
    from effnet.checkpoint import to_model
    from effnet.network import Model, build

    if pretrained_from is None:
        found = zoo.find(model, pretrained=True if pretrained else None)
        return (to_model(found), True) if found.tensors else (build(found.network), False)
    if pretrained:
        raise UsageError("--pretrained and --pretrained-from both say which weights to start from: give one of them.")
    if Path(pretrained_from).is_file():
        started = zoo.create_model(model, num_classes=classes, checkpoint_path=pretrained_from)
        assert isinstance(started, Model)
        return started, True
    started, wanted = zoo.load_model(pretrained_from, pretrained=True), zoo.find(model, pretrained=False).network
    if (started.network.stem, started.network.stages) != (wanted.stem, wanted.stages):
        raise UsageError(f"the weights {pretrained_from} are those of {started.network.name}, not of {wanted.name}.")
    return started, True


# --- scaling --------------------------------------------------------------------------------------------------------

FACTORY = re.compile(r".+\.py:\w+")
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
AMOUNT = re.compile(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*([kMGT]?)B?")


def to_scale(model: str, size: int | None, deepen: str | None, *, training_memory: bool) -> "Network | Factory":
    """The baseline that `model` means: a network, or a factory as module.py:function.

    `size`: its resolution instead of its own; `deepen`: by stage, the powers of the depth factor.
    """
    if FACTORY.fullmatch(model):
        from effnet.factory import load

        if deepen is not None:
            raise UsageError("--deepen is for the stages of a Network; a factory decides by itself what depth means.")
        return load(model, resolution=size or 0, training_memory=training_memory)
    found = network(model)
    if size is not None:
        found = found.replace(resolution=size, preprocess=found.preprocess.with_size(size))
    if deepen is None:
        return found
    powers = numbers("--deepen", deepen, len(found.stages), "one for each stage")
    rows = zip(found.stages, powers, strict=True)
    return found.replace(stages=tuple(stage.replace(deepen=power) for stage, power in rows))


def numbers(option: str, text: str, count: int, what: str) -> list[float]:
    """`count` numbers with commas between them."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count:
        raise UsageError(f"{option} {text!r} is not {count} numbers with commas between them, {what}.")
    return found


def budgets(words: Sequence[str], option: str = "--budget") -> dict[str, float]:
    """Limits by metric from words such as `macs=1.5G`.

    >>> budgets(["macs=1.5G", "latency_ms=20"])
    {'macs': 1500000000.0, 'latency_ms': 20.0}
    """
    limits: dict[str, float] = {}
    for word in words:
        metric, equals, amount = (part.strip() for part in word.partition("="))
        found = AMOUNT.fullmatch(amount)
        if not equals or not found:
            raise UsageError(
                f"{option} {word!r} is not METRIC=LIMIT; a limit is 400M, 1.5G, 5e6 or 20 (k, M, G, T: powers of 1000)."
            )
        check_choice("budget metric", metric, (*METRICS, "latency_ms"))
        if metric in limits:
            raise UsageError(f"two limits on {metric}: {limits[metric]:g} and {amount}; give one.")
        limits[metric] = float(found[1]) * UNITS[found[2]]
        check_range(f"budget on {metric}", limits[metric], 1e-9, 1e30)
    return limits


def meters(
    limits: Mapping[str, float], threads: int, precision: str
) -> "tuple[dict[str, Callable[[Any], float]], Error | None]":
    """What measures the limits that are no cost: this machine's latency table, and how far off it is."""
    if "latency_ms" not in limits:
        return {}, None
    from effnet import bench

    table = bench.table(threads=threads, precision=precision)

    def latency_ms(network: Any) -> float:
        if not isinstance(network, Network):
            raise UsageError(f"the latency of a Network can be predicted; {network.name} is a module of your own.")
        return table.predict(network)

    return {"latency_ms": latency_ms}, table.error


def proxy(
    base: Network,
    data: str,
    images: int | None,
    settings: Sequence[str] | None,
    workers: int | None,
    device: str = "cpu",
) -> "tuple[Network, Evaluate, dict[str, Any]]":
    """For searches: the network with the data's classes, what trains it, what that depends on."""
    from effnet import proxy as proxies

    splits, recipe, about = proxy_task(data, images, settings)
    return base.with_classes(len(splits.classes)), proxies.proxy(splits, recipe, device=device, workers=workers), about


def proxy_task(
    data: str, images: int | None, settings: Sequence[str] | None
) -> "tuple[Splits, recipes.Recipe, dict[str, Any]]":
    """What short trainings learn from and how, and the words of that for a study."""
    from effnet import proxy as proxies
    from effnet.data import open_data

    recipe = recipes.with_settings(proxies.PROXY, dict(map(_setting, settings or ())))
    splits = open_data(data, split_seed=SPLIT_SEED, val_fraction=VAL_FRACTION)
    if images is not None:
        splits = proxies.fewer(splits, images)
    about = {"data": splits.name, "training images": splits.train.fingerprint(), "recipe": recipe.to_json()}
    return splits, recipe, about


def network_file(path: Path | None) -> Path | None:
    """`path`, a .json file. `UsageError` for another suffix."""
    if path is not None and path.suffix != ".json":
        raise UsageError(f"--save {path} does not end in .json: it would not be taken for a network later.")
    return path


def keep_network(path: Path, definition: dict[str, Any]) -> None:
    """Writes a Network as the file that `network` reads; whole or not at all."""
    content = json.dumps(definition, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(content))


# --- the run a model comes from -------------------------------------------------------------------------------------

SPLIT_FILE = "split.json"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The run that made a checkpoint. `data`, `fingerprint`: of what it trained on; `cut`: how that was split."""

    folder: Path
    data: str
    fingerprint: str
    cut: dict[str, Any]

    def is_of(self, splits: "Splits") -> bool:
        """Whether the run was trained on this data, however it is split now."""
        return Path(self.data).resolve() == Path(splits.name).resolve()  # a named set stays one

    def evaluation_files(self, splits: "Splits", split: str) -> list[Path]:
        """Where the run keeps a result and its table; those of other parts and of other data have longer names."""
        other = [] if self.is_of(splits) else [slug(splits.name)]
        other += [] if split == "test" else [split]
        names = ("-".join(["eval", *other]) + ".json", "-".join(["predictions", *other]) + ".csv")
        return [self.folder / name for name in names]


def keep_cut(run: Path, split_seed: int, val_fraction: float) -> None:
    """Notes in the run folder how the data was split, for `origin`."""
    (run / SPLIT_FILE).write_text(json.dumps({"split_seed": split_seed, "val_fraction": val_fraction}) + "\n")


def origin(model: str) -> Origin | None:
    """The run that `model` (a run folder, or a checkpoint in one) comes from; None for any other model."""
    from effnet.runs import read_history

    path = Path(model)
    folder = next((folder for folder in (path, path.parent) if (folder / "log.jsonl").is_file()), None)
    if folder is None or not path.exists():
        return None
    start = read_history((folder / "log.jsonl").read_text()).starts[0]
    cut = json.loads((folder / SPLIT_FILE).read_text()) if (folder / SPLIT_FILE).is_file() else {}
    return Origin(folder=folder, data=start["data"], fingerprint=start["fingerprint"], cut=cut)


def data_for(
    model: "Model | Exported",
    run: Origin | None,
    data: str,
    *,
    split_seed: int | None = None,
    val_fraction: float | None = None,
) -> "Splits":
    """The data that `model` is to be judged on: its class list enforced, and cut as it was for training.

    A note on stderr where that is not so: then images that the model was trained on may be in the test part.
    """
    from effnet.data import open_data

    given = {"split_seed": split_seed, "val_fraction": val_fraction}
    cut: dict[str, Any] = {"split_seed": SPLIT_SEED, "val_fraction": VAL_FRACTION} | (run.cut if run else {})
    cut |= {name: value for name, value in given.items() if value is not None}
    splits = open_data(data, classes=model.labels, **cut)
    if run and run.is_of(splits) and run.fingerprint != splits.train.fingerprint():
        sys.stderr.write(
            f"effnet: note: {splits.name} is not split as it was when {run.folder} was trained (or its files changed): "
            "the model may be judged on images that it learnt from.\n"
        )
    return splits


# --- images ---------------------------------------------------------------------------------------------------------

Picture = tuple[str, str | None, "np.ndarray"]  # name, true class where it is known, uint8 (H, W, 3)


def file_pictures(paths: Sequence[str]) -> Iterator[Picture]:
    """The images at `paths`, decoded one by one. Raises `ImageError` for the first that cannot be."""
    from effnet.inputs import inputs

    for one in inputs(paths):
        yield one.name, None, one.image()


def data_pictures(splits: "Splits", split: str, count: int) -> Iterator[Picture]:
    """`count` images of a part of the data, evenly spread over it."""
    source = splits.part(split)
    count = min(count, len(source))
    for index in (number * len(source) // count for number in range(count)):
        label = source.labels[index]
        yield source.ids[index], source.classes[label] if label >= 0 else None, source.image(index)

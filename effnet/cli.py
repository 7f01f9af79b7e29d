"""What does `effnet` do when it is typed? One function per verb: a library call, shown to people or written as JSON.

Every verb prints for people, or with `--json` exactly one JSON document on stdout (progress then goes to stderr). A
mistake of the user is one line on stderr, `effnet: ...`, and exit code 2. `doctor` exits with 1 when it finds errors,
an interrupted training with 128 + the signal, as shells count.

torch takes seconds to import, so whatever needs it is imported inside the verbs: `effnet --help`, `list` and `info`
answer at once.
"""

import fnmatch
import functools
import io
import json
import sys
import warnings
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

from effnet import arguments, display, families, presets, published, recipes
from effnet.arguments import (
    AUTO,
    PATHS,
    SPLIT_SEED,
    VAL_FRACTION,
    AsJson,
    BatchSize,
    Data,
    Device,
    Job,
    ModelName,
    ModelOption,
    Pretrained,
    PretrainedFrom,
    RecipeName,
    Settings,
    Split,
    SplitSeed,
    TimeBudget,
    Turns,
    ValFraction,
    Workers,
)
from effnet.bench_command import bench
from effnet.cost import cost, stage_rows
from effnet.display import answer
from effnet.export_command import export
from effnet.predict_command import predict
from effnet.recipes import Recipe
from effnet.scale_command import scale
from effnet.search_command import search
from effnet.serve_command import serve
from effnet.value import UsageError, nearest

if TYPE_CHECKING:
    from effnet.evaluate import Scores
    from effnet.plan import Plan

app = typer.Typer(
    name="effnet",
    help="The best image classifier for a budget: EfficientNet, from a folder of images to a report.",
    epilog="Example: effnet train photos/ --model efficientnet_lite0 --pretrained",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# --- the frame ------------------------------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line (`sys.argv` if None) and returns its exit code; a mistake is one line on stderr."""
    words = sys.argv[1:] if words is None else list(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be text
    try:
        with _warnings_in_one_line():
            return app(words or ["--help"], prog_name="effnet", standalone_mode=False) or 0
    except TyperException as error:  # an unknown verb or option, a missing argument
        return _failed(error.format_message())
    except UsageError as error:
        return _failed(str(error))
    except OSError as error:  # a folder that may not be written, a full disk: the system's own words
        if error.strerror is None:
            raise
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)


def _failed(message: str, code: int = 2) -> int:
    _say(message)
    return code


def _say(message: str) -> None:
    """One line on stderr, whatever is in the message."""
    sys.stderr.write(f"effnet: {' '.join(message.split())}\n")


@contextmanager
def _warnings_in_one_line() -> Generator[None]:
    """Our own warnings (a damaged checkpoint was replaced) are for the user and look so; others stay as they are."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if category.__module__.startswith("effnet."):
                _say(f"note: {message}")
            else:
                usual(message, category, *where)

        warnings.showwarning = show  # ty: ignore[invalid-assignment]
        yield


def _version(wanted: bool) -> None:
    if wanted:
        from effnet import __version__

        sys.stdout.write(f"effnet {__version__}\n")
        raise typer.Exit


@app.callback()
def _effnet(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# --- facts: no torch ------------------------------------------------------------------------------------------------


@app.command("list", epilog="Example: effnet list lite")
def list_(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a shell pattern such as efficientnetv2_?")] = "*",
    as_json: AsJson = False,
) -> None:
    """The known networks, what they cost, and which of them have trained weights."""
    names = families.names(pattern if set(pattern) & set("*?[") else f"*{pattern}*")
    if not names:
        raise UsageError(f"no network matches {pattern!r}.{nearest(pattern, [*families.names(), *families.ALIASES])}")
    rows = [_listed(name) for name in names]
    answer(rows, as_json, lambda: display.show_networks(display.console(), rows))


def _listed(name: str) -> dict[str, Any]:
    network = families.get(name)
    spent = cost(network)
    weights = [found for tag in families.tags(name) if (found := families.weights(tag))]
    kept = ("name", "top1", "licence", "package", "hub")
    return {
        "name": name,
        "params": spent.params,
        "macs": spent.macs,
        "size_px": network.resolution,
        "weights": [{key: getattr(found, key) for key in kept} for found in weights],
    }


@app.command(epilog="Example: effnet info efficientnet_b4 --size 300 --batch 32")
def info(
    model: ModelName,
    size: Annotated[int | None, typer.Option(min=1, help="Input size in px. Default: the network's own.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per step, for the training memory.")] = 1,
    units: Annotated[bool, typer.Option("--units", help="A row per unit instead of per stage.")] = False,
    as_json: AsJson = False,
) -> None:
    """The table of a network as a paper prints it, with its exact cost.

    With --json, `definition` is the Network itself: save it as a .json file, change it, and use that file as MODEL.
    """
    network = arguments.network(model)
    spent = cost(network, size, batch)
    stages = stage_rows(network, size)
    document = spent.to_dict() | {"stages": stages, "definition": network.to_dict()}
    answer(document, as_json, lambda: display.show_cost(display.console(), network, spent, stages, units=units))


app.command(epilog="Example: effnet scale efficientnet_b0 --budget macs=1.5G --budget params=8M --save net.json")(scale)
app.command(
    epilog='Example: effnet search --space v2 --data photos/ --objective "acc * (macs/60M)^-0.07" --limit params=5M'
)(search)


@app.command("recipes", epilog="Example: effnet recipes v2 --json")
def recipes_(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a shell pattern such as v2-*-paper")] = "*",
    as_json: AsJson = False,
) -> None:
    """The named recipes: the papers' (-paper as printed, -official as their code does it) and ours."""
    wanted = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    names = [name for name in recipes.RECIPES if fnmatch.fnmatch(name, wanted)]
    if not names:
        raise UsageError(f"no recipe matches {pattern!r}.{nearest(pattern, recipes.RECIPES)}")
    rows = [{"about": presets.PRESETS[name].about} | recipes.get(name).to_dict() for name in names]
    answer(rows, as_json, lambda: display.show_recipes(display.console(), rows))


# --- before training ------------------------------------------------------------------------------------------------


@app.command(epilog="Example: effnet doctor photos/")
def doctor(data: Data, workers: Workers = None, as_json: AsJson = False) -> None:
    """Looks at every image before training: unreadable files, leaks between parts, duplicates, imbalance.

    Changes nothing. Exits with 1 when a finding is an error.
    """
    from effnet.doctor import examine

    with display.counting(display.console(stderr=as_json), "looking at images") as progress:
        found = examine(data, workers=2 if workers is None else workers, progress=progress)
    answer(found.to_dict(), as_json, lambda: display.show_diagnosis(display.console(), found))
    if not found.ok:
        raise typer.Exit(1)


@app.command(epilog="Example: effnet plan photos/ --model efficientnet_lite0 --pretrained --set epochs=5")
def plan(
    data: Data,
    model: ModelOption,
    pretrained: Pretrained = False,
    pretrained_from: PretrainedFrom = None,
    recipe: RecipeName = AUTO,
    settings: Settings = None,
    time_budget: TimeBudget = None,
    split_seed: SplitSeed = SPLIT_SEED,
    val_fraction: ValFraction = VAL_FRACTION,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """What training will do and cost: phases, steps, MACs, memory, disk, time. A few steps are timed, none is kept."""
    from effnet.plan import plan as planned

    job = arguments.job(
        data, model, pretrained=pretrained, pretrained_from=pretrained_from, recipe=recipe, settings=settings,
        split_seed=split_seed, val_fraction=val_fraction,
    )  # fmt: skip
    where = arguments.device(device)
    job, watch = arguments.in_time(job, time_budget, where)
    counts: dict[str, Any] = {"train_images": len(job.splits.train), "val_images": len(job.splits.val or ())}
    todo = planned(job.model, job.recipe, classes=job.splits.classes, device=where, watch=watch, **counts)
    document = todo.to_dict() | {
        "data": job.splits.name, "note": job.splits.note, "why": job.why, "seconds": todo.seconds,
    }  # fmt: skip
    answer(document, as_json, functools.partial(_show_plan, job, todo))


def _show_plan(job: Job, todo: "Plan") -> None:
    out = display.console()
    display.show_note(out, job.splits.note)
    display.show_note(out, job.why)
    display.show_plan(out, todo)


# --- training -------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: effnet train photos/ --model efficientnet_lite0 --pretrained --out runs/photos")
def train(
    data: Data,
    model: ModelOption,
    pretrained: Pretrained = False,
    pretrained_from: PretrainedFrom = None,
    recipe: RecipeName = AUTO,
    settings: Settings = None,
    time_budget: TimeBudget = None,
    out: Annotated[Path | None, typer.Option(help="The run folder. Default: runs/DATA-MODEL.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder, exactly.")] = False,
    save_every: Annotated[int, typer.Option(min=0, help="Save after so many steps too; 0: after each epoch.")] = 0,
    split_seed: SplitSeed = SPLIT_SEED,
    val_fraction: ValFraction = VAL_FRACTION,
    device: Device = "auto",
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Trains MODEL on DATA into a run folder. Ctrl-C saves; the same command with --resume goes on from there.

    On several processes: torchrun --nproc_per_node=N -m effnet train ...
    """
    from effnet import cluster
    from effnet.plan import Plan
    from effnet.train import Diverged, Interrupted, training

    job = arguments.job(
        data, model, pretrained=pretrained, pretrained_from=pretrained_from, recipe=recipe, settings=settings,
        split_seed=split_seed, val_fraction=val_fraction,
    )  # fmt: skip
    run = out or Path("runs") / f"{arguments.slug(data)}-{arguments.slug(model)}"
    where = arguments.device(device)
    weights = pretrained_from or (model if pretrained else "")
    options: dict[str, Any] = {"resume": resume, "workers": workers, "weights": weights, "save_every": save_every}
    people, event = display.console(stderr=as_json), {}

    def fitted() -> tuple[Recipe, str]:
        if time_budget and (resume or cluster.restarts()) and (run / "recipe.json").exists():
            return Recipe.from_json((run / "recipe.json").read_text()), "the recipe as it was begun"
        timed, _ = arguments.in_time(job, time_budget, here)
        return timed.recipe, timed.why

    with cluster.joined(where) as here:
        told, why = cluster.first(fitted)
        events = training(job.splits, job.model, told, run, device=here, **options)
        try:
            if cluster.rank():  # the first process speaks and writes for all
                deque(events, maxlen=0)
                return
            display.show_note(people, why)
            with display.training_view(people, lambda: Plan.from_json((run / "plan.json").read_text())) as view:
                for event in events:
                    if event["event"] == "start":
                        arguments.keep_cut(run, split_seed, val_fraction)
                    view.show(event)
        except Interrupted as error:
            code = 128 + error.signal
            raise typer.Exit(code if cluster.rank() else _failed(str(error), code)) from None
        except (cluster.Elsewhere, Diverged):  # the first process says it
            if cluster.rank():
                raise typer.Exit(2) from None
            raise
    ending = {key: event[key] for key in ("best_epoch", "metrics", "seconds")}
    document = {"run": str(run), "checkpoint": str(run / "best.safetensors"), **ending}
    answer(document, as_json, lambda: display.show_end(people, document))


# --- a trained model ------------------------------------------------------------------------------------------------


@app.command("eval", epilog="Example: effnet eval runs/photos photos/ --split test")
def eval_(
    model: ModelName,
    data: Data,
    split: Split = "test",
    out: Annotated[Path | None, typer.Option(help="Write the result as .json, or a row per image as .csv.")] = None,
    batch: BatchSize = 64,
    turns: Turns = False,
    split_seed: Annotated[int | None, typer.Option(min=0, help="Default: that of the run, else 0.")] = None,
    val_fraction: Annotated[float | None, typer.Option(help="Default: that of the run, else 0.15.")] = None,
    device: Device = "auto",
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """How good MODEL is on a part of DATA: accuracy with its interval, per class, calibration, confusion.

    A run folder keeps the result as eval.json and predictions.csv (eval-val.json for the val part, and so on).
    """
    from effnet.evaluate import measure, predict_source
    from effnet.zoo import load_model

    arguments.table_file(out)
    loaded, run = load_model(model), arguments.origin(model)
    splits = arguments.data_for(loaded, run, data, split_seed=split_seed, val_fraction=val_fraction)
    source, where = splits.part(split), arguments.device(device)
    with display.counting(display.console(stderr=as_json), "predicting") as progress:
        scores = predict_source(
            loaded, source, batch=batch, workers=workers, device=where, turns=turns, on_batch=progress
        )
    judged = measure(scores)
    document = {"model": model, "data": splits.name, "split": split, "note": splits.note, "turns": turns}
    document |= judged.to_dict()
    kept = run.evaluation_files(splits, split) if run and Path(model).is_dir() else []
    _keep_evaluation(document, scores, [*kept, *([out] if out else [])])
    title = f"{model} on {splits.name}, {split}"
    answer(document, as_json, lambda: display.show_evaluation(display.console(), judged, title))


def _keep_evaluation(document: dict[str, Any], scores: "Scores", files: Sequence[Path]) -> None:
    from effnet.evaluate import write_predictions
    from effnet.files import write_atomically

    def write(temporary: Path) -> None:
        temporary.write_text(json.dumps(document, indent=1))

    for path in files:
        if path.suffix == ".csv":
            write_predictions(path, scores)
        else:
            write_atomically(path, write)


app.command(epilog="Example: effnet predict efficientnet_lite0.in1k holiday/ shards.tar --top-k 3 --out found.parquet")(
    predict
)


@app.command(epilog="Example: effnet explain runs/photos photos/test/cat/1.jpg --out maps")
def explain(
    model: ModelName,
    paths: Annotated[list[str] | None, typer.Argument(metavar="PATH...", help=PATHS)] = None,
    method: Annotated[
        Literal["cam", "gradcam", "gradcam++", "layercam"], typer.Option(help="gradcam needs effnet[explain].")
    ] = "cam",
    target: Annotated[str | None, typer.Option(help="A class, by name or index. Default: the predicted one.")] = None,
    data: Annotated[str | None, typer.Option(metavar="DATA", help="Images of a data set instead of PATHs.")] = None,
    split: Split = "test",
    count: Annotated[int, typer.Option(min=1, help="How many images of --data, evenly spread.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Folder of the PNGs. Default: RUN/cams, else cams.")] = None,
    faithful: Annotated[
        bool, typer.Option("--faithfulness/--no-faithfulness", help="Measure insertion and deletion: 34 more passes.")
    ] = True,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Where MODEL sees a class in images: one PNG per image with the class activation map beside and over it.

    MODEL may be an exported file that carries its maps (effnet export --maps), for --method cam.
    Insertion (high is good) and deletion (low is good): how well the map orders the pixels by what MODEL looks at.
    """
    from effnet.engine import TorchEngine
    from effnet.explain import explain as explained
    from effnet.explain import panel
    from effnet.export import is_artefact, open_artefact
    from effnet.faithfulness import faithfulness
    from effnet.images import prepare
    from effnet.network import Model
    from effnet.zoo import load_model

    if bool(paths) == bool(data):
        raise UsageError("name images (PATH...) or a data set (--data DATA), one of them.")
    loaded = open_artefact(model) if is_artefact(model) else load_model(model)
    run, where = arguments.origin(model), arguments.device(device)
    folder = out or (run.folder / "cams" if run else Path("cams"))
    wanted = int(target) if target and target.isdigit() and target not in (loaded.labels or ()) else target
    pictures = arguments.file_pictures(paths or ())
    if data:
        pictures = arguments.data_pictures(arguments.data_for(loaded, run, data), split, count)
    rows = []
    for name, truth, image in pictures:
        why = explained(loaded, image, method=method, target=wanted, device=where)
        path = folder / f"{len(rows):03d}-{arguments.slug('-'.join(Path(name).with_suffix('').parts[-2:]))}.png"
        folder.mkdir(parents=True, exist_ok=True)
        told = {"method": why.method, "tap": why.tap, "label": why.label, "probability": why.probability}
        notes = None
        if faithful:
            engine = TorchEngine(name=model, model=loaded) if isinstance(loaded, Model) else loaded
            found = faithfulness(engine, prepare(image, loaded.preprocess), why.map, why.target)
            told |= found.to_dict()
            notes = [str(found)]
        panel(path, [image], [why], truths=[truth] if truth else None, notes=notes)
        rows.append({"image": name, "truth": truth, "file": str(path), **told, "map": why.map.tolist()})
    answer(rows, as_json, lambda: display.show_explanations(display.console(), rows))


app.command(epilog="Example: effnet bench efficientnet_b0 mobilenet_v2 --size 224 --precision bfloat16")(bench)


@app.command(epilog="Example: effnet plot pareto --x macs --out pareto.svg")
def plot(
    what: Annotated[Literal["pareto"], typer.Argument(metavar="WHAT", help="pareto: accuracy against cost.")],
    x: Annotated[str, typer.Option("--x", help=f"The cost: {', '.join(published.AXES)}.")] = "params",
    out: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf. Default: pareto_X.png.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of the latency table, for --x latency_ms.")] = 1,
    precision: Annotated[str, typer.Option(help="Of the latency table.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Figures 1 and 5 of the EfficientNet paper again: published accuracy against our own counts, or latency here."""
    from effnet import bench as core
    from effnet import plots

    table = core.table(precision=precision, threads=threads) if x == "latency_ms" else None
    found, path = published.points(x, table), out or Path(f"{what}_{x}.png")
    note = f"{table}\n{table.error}" if table else ""
    best = plots.pareto(found, x, path, note=note)
    document: dict[str, Any] = {"file": str(path), "x": x, "note": note, "front": [point.name for point in best]}
    document["points"] = [point.to_dict() for point in found]
    answer(document, as_json, lambda: display.show_pareto(display.console(), best, x, note, path))


@app.command(epilog="Example: effnet report runs/photos")
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], as_json: AsJson = False) -> None:
    """One self-contained HTML file about a run: curves, confusion, calibration, cost, examples, environment."""
    from effnet.report import report as written

    path = written(run)
    answer({"report": str(path)}, as_json, lambda: display.show_path(display.console(), path))


@app.command(epilog="Example: effnet convert runs/photos/best.safetensors photos.pth --dialect timm")
def convert(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Weights in any dialect, or any MODEL that has weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=".safetensors, .pth, .pt, .bin; .npz for tf.")],
    dialect: Annotated[
        Literal["effnet", "timm", "torchvision", "lukemelas", "tf"], typer.Option(help="The names in OUT.")
    ] = "effnet",
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="The network, if FILE does not say it.")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Outputs in FILE, if not those of the network.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rewrites weights, bit for bit, under the names of another code base, or as a checkpoint that says its network."""
    from effnet.checkpoint import save
    from effnet.dialects import from_effnet, write_foreign

    if dialect == "effnet" and out.suffix != ".safetensors":
        raise UsageError(f"an effnet checkpoint is a .safetensors file; {out} is not named as one.")
    found = arguments.weights(file, model, classes)
    if dialect == "effnet":
        save(out, found)
    else:
        write_foreign(out, from_effnet(found.weights, found.network, dialect))
    document = {"file": file, "out": str(out), "dialect": dialect, "network": found.network.name}
    document["tensors"] = len(found.weights)
    answer(document, as_json, lambda: display.show_path(display.console(), out))


app.command(epilog="Example: effnet export runs/photos --to openvino --precision bfloat16")(export)
app.command(epilog="Example: effnet serve efficientnet_lite0.in1k --port 8000 --workers 2")(serve)

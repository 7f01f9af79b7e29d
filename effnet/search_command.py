"""What does `effnet search` do? It finds a network for data, an objective and limits, and leaves a Network file.

One study, one file: the same command goes on where it was stopped, and more trials are only a larger --trials.
"""

import json
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from effnet import arguments, display
from effnet.arguments import AsJson, Device, Settings, Workers
from effnet.search.objectives import FREE, QUANTITIES, Objective
from effnet.search.space import SPACES, Space, small, vary
from effnet.search.strategies import STRATEGIES
from effnet.search.task import Meters, Task
from effnet.spec import Network
from effnet.value import UsageError, check_choice
from effnet.words import duration, percent, short

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from effnet.coefficients import Evaluate
    from effnet.recipes import Recipe
    from effnet.samples import Splits
    from effnet.search.on_ray import Tasks
    from effnet.search.ranking import Correlation
    from effnet.search.records import Trial
    from effnet.search.study import Found

SPACE = f"{', '.join(SPACES)}, or a .json file: a Space, or {{PATH: [options]}} as --vary has them."
TRAINED_FOR = 2000  # candidates within the limits that a supernet is trained for
OBJECTIVE = (
    f"What to maximise (`min X`: minimise), of {', '.join(QUANTITIES)}; several are searched for their Pareto front."
)


def search(
    data: Annotated[str, typer.Option("--data", metavar="DATA", help=arguments.DATA)],
    space: Annotated[str | None, typer.Option(metavar="SPACE", help=SPACE)] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH=V,V", help="A space of one's own: stages.*.kernel=3,5 or stages.2.repeats=-1,+0,+1."
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help=f"What varies; each SPACE has its own. {arguments.MODEL}")
    ] = None,
    objective: Annotated[list[str] | None, typer.Option(metavar="EXPR", help=OBJECTIVE)] = None,
    limit: Annotated[
        list[str] | None, typer.Option(metavar="QUANTITY=LIMIT", help=f"Hard, as params=5M: {', '.join(FREE)}.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many candidates in all.")] = 100,
    strategy: Annotated[
        str, typer.Option(help=f"{', '.join(STRATEGIES)}; with settings: evolution:population=50,sample=10.")
    ] = "evolution",
    seed: Annotated[int, typer.Option(min=0, help="Of the strategy and of every training.")] = 0,
    epochs: Annotated[str, typer.Option(help="Of every training; 1,3,9: only one in --eta goes on to the next.")] = "3",
    eta: Annotated[int, typer.Option(min=2, help="Of successive halving.")] = 3,
    images: Annotated[int | None, typer.Option(min=1, help="Train and validate on so many images only.")] = None,
    px: Annotated[int | None, typer.Option(min=1, help="Image size of the proxy. Default: the baseline's.")] = None,
    width: Annotated[float, typer.Option(help="A factor on the baseline's channels.")] = 1.0,
    depth: Annotated[float, typer.Option(help="A factor on the baseline's layers.")] = 1.0,
    least_map: Annotated[
        int | None,
        typer.Option(min=1, help="Drop early strides until the last map has so many px: 4, say, for images of 32 px."),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(metavar="FILE|URL", help="A SQLite file, or postgresql://... Default: runs/search-....db."),
    ] = None,
    evaluator: Annotated[
        Literal["training", "supernet"],
        typer.Option(help="training: each candidate by itself. supernet: as parts of one, trained once for --epochs."),
    ] = "training",
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="ray: every training is a task of a Ray cluster (effnet[cluster]).")
    ] = "local",
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help="With ray: trials under way. Default: as many as the cluster has room for."),
    ] = None,
    cpus: Annotated[float, typer.Option(min=0.01, help="With ray: that a trial needs.")] = 1.0,
    gpus: Annotated[float, typer.Option(min=0, help="With ray: that a trial needs; a fraction shares one.")] = 0.0,
    retries: Annotated[int, typer.Option(min=0, help="With ray: of a trial whose machine or process died.")] = 3,
    lag: Annotated[
        int,
        typer.Option(
            min=0,
            help="K: a trial follows from all but the K - 1 before it, and a replay is exact. 0: from what is done.",
        ),
    ] = 0,
    patience: Annotated[float, typer.Option(help="Minutes to wait for a database that does not answer.")] = 10.0,
    save: Annotated[
        Path | None,
        typer.Option(metavar="NET.json", help="The winner, a MODEL elsewhere. Default: runs/search-....json."),
    ] = None,
    rank_check: Annotated[
        int | None, typer.Option(metavar="N", help="Train N candidates (20 or more) longer, and compare the orders.")
    ] = None,
    rank_epochs: Annotated[
        int | None, typer.Option(help="Of that. Default: 3 x the last of --epochs (supernet: once).")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of the latency table, for latency_ms.")] = 1,
    precision: Annotated[str, typer.Option(help="Of the latency table: float32 or bfloat16.")] = "float32",
    settings: Settings = None,
    device: Device = "auto",
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Architecture search: the network of a space that is best for DATA, by short trainings, within hard limits.

    Limits are exact and cost no training. Stopped or killed, the same command goes on. The winner is a Network file
    that train, scale and info take as MODEL.
    """
    from effnet.proxy import proxy

    arguments.network_file(save)
    objectives = tuple(Objective(text) for text in objective or ["acc * (macs/400M)^-0.07"])
    limits = _limits(limit or ())
    rungs = _rungs(epochs)
    made = _space(space, vary or (), baseline, px, width, depth, least_map)
    settled: dict[str, Any] = {"strategy": strategy, "seed": seed, "rungs": rungs, "eta": eta, "lag": lag}
    task = Task(space=made, objectives=objectives, limits=limits, **settled)
    fleet = _fleet(engine, at_once, cpus, gpus, retries)
    where = arguments.device(device) if fleet is None else fleet.device(device)
    if fleet is not None and workers is None:
        workers = max(0, int(cpus) - 1)
    splits, recipe, about = arguments.proxy_task(data, images, settings)
    about |= {"threads": threads, "precision": precision}
    task = task.replace(space=made.replace(base=made.base.with_classes(len(splits.classes))), about=about)
    alone = proxy(splits, recipe, device=where, workers=workers)
    meters = _meters(task, json.loads(about["recipe"]), where, threads, precision)
    name = f"search-{arguments.slug(space or 'vary')}-{arguments.slug(data)}"
    kept = study or str(Path("runs") / f"{name}.db")
    files = Path(kept) if "://" not in kept else Path("runs") / f"{name}.db"
    out, drawn = save or files.with_suffix(".json"), files.with_suffix(".png")
    people = display.console(stderr=True)

    def judge() -> "Evaluate":
        """What gives a candidate its accuracy, once it is known that there is something to judge."""
        if evaluator == "training":
            return alone
        file = files.with_suffix(".supernet.safetensors")
        return _supernet(people, task, splits, recipe, file, device=where, workers=workers)

    if evaluator == "supernet":
        task = _with_supernet(task, fleet)
    try:
        result = _searched(people, task, judge, kept, meters, fleet, trials=trials, patience=60 * patience)
        longer = rank_epochs or (1 if evaluator == "supernet" else 3) * rungs[-1]
        check = _checked(people, task, alone, kept, fleet, count=rank_check, epochs=longer)
    except KeyboardInterrupt:
        sys.stderr.write(f"effnet: stopped; the same command goes on from {kept}.\n")
        raise typer.Exit(130) from None
    _answer(result, check, kept, out, drawn, as_json)


# --- what the words mean --------------------------------------------------------------------------------------------


def _rungs(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.strip().isdigit() for word in words):
        raise UsageError(f"--epochs {text!r} is neither a whole number nor several with commas between them: 1,3,9.")
    return tuple(map(int, words))


def _limits(words: Sequence[str]) -> dict[str, float]:
    for word in words:
        check_choice("limit on", word.partition("=")[0].strip(), FREE)
    return arguments.budgets(words, "--limit")


def _space(
    word: str | None,
    varied: Sequence[str],
    baseline: str | None,
    px: int | None,
    width: float,
    depth: float,
    least_map: int | None,
) -> Space:
    """The space around the baseline, made small for the proxy."""
    if (word is None) == (not varied):
        raise UsageError("say what may vary: --space SPACE, or --vary PATH=V,V (once or more), one of them.")

    def base(usual: str) -> Network:
        network = arguments.network(baseline or usual)
        return small(network, px=px, width=width, depth=depth, least_map=least_map)

    if word is None:
        return vary(base("efficientnet_b0"), dict(map(_varied, varied)))
    path = Path(word)
    if path.suffix != ".json":
        check_choice("space", word, SPACES)
        make, usual = SPACES[word]
        return make(base(usual))
    if not path.is_file():
        raise UsageError(f"the space {word} is no file.")
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{word} is no JSON file of a space: {error}") from None
    if isinstance(data, dict) and {"name", "base", "choices"} <= data.keys():
        found = Space.from_dict(data)
        if (baseline, px, width, depth, least_map) != (None, None, 1.0, 1.0, None):
            raise UsageError(f"{word} is a Space with a baseline of its own: --baseline and sizes do not go with it.")
        return found
    if not isinstance(data, dict):
        raise UsageError(f"{word} holds no object of PATH: [options].")
    return vary(base("efficientnet_b0"), data, arguments.slug(word))


def _varied(word: str) -> tuple[str, list[Any]]:
    path, equals, values = word.partition("=")
    if not equals or not values:
        raise UsageError(f"--vary {word!r} is not PATH=V,V, as in stages.*.kernel=3,5.")
    return path.strip(), [_value(value.strip()) for value in values.split(",")]


def _value(text: str) -> Any:
    if text[:1] in ("+", "-", "x"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _meters(task: Task, recipe: dict[str, Any], device: str, threads: int, precision: str) -> Meters:
    """What measures the quantities that are neither accuracy nor counted."""
    found = {}
    if "latency_ms" in task.quantities:
        from effnet import bench

        found["latency_ms"] = bench.table(threads=threads, precision=precision).predict
    if "step_ms" in task.quantities:
        from effnet.recipes import Recipe
        from effnet.search.meters import step_ms

        found["step_ms"] = step_ms(Recipe.from_dict(recipe), device=device)
    return found


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What `--engine ray` was told."""

    at_once: int | None
    cpus: float
    gpus: float
    retries: int

    def tasks(self) -> "AbstractContextManager[Tasks]":
        """The cluster."""
        from effnet.search.on_ray import on_ray

        return on_ray(cpus=self.cpus, gpus=self.gpus, retries=self.retries)

    def device(self, name: str) -> str:
        """Where a task computes: on the GPU that it declares, whatever this machine has."""
        if name == "cuda" and not self.gpus:
            raise UsageError("--device cuda with --engine ray: say how many a trial needs, --gpus 1.")
        return "cpu" if name == "cpu" or not self.gpus else "cuda"


def _fleet(engine: str, at_once: int | None, cpus: float, gpus: float, retries: int) -> Fleet | None:
    if engine == "ray":
        return Fleet(at_once=at_once, cpus=cpus, gpus=gpus, retries=retries)
    if at_once is not None or gpus:
        raise UsageError("--at-once and --gpus go with --engine ray; here, run the command again on the same --study.")
    return None


# --- the search, for people -----------------------------------------------------------------------------------------


def _with_supernet(task: Task, fleet: Fleet | None) -> Task:
    """The task, judged by a supernet; refused where that cannot be."""
    from effnet.search.supernet import refuse_unshareable

    if fleet is not None:
        raise UsageError("--engine ray trains candidates; those of a --evaluator supernet are judged in seconds, here.")
    if len(task.rungs) > 1:
        raise UsageError(f"--epochs {task.rungs}: a supernet is trained once, for one number of epochs.")
    refuse_unshareable(task.space)
    return task.replace(about=task.about | {"evaluator": "supernet"})


def _supernet(
    people: Console, task: Task, splits: "Splits", recipe: "Recipe", file: Path, **options: Any
) -> "Evaluate":
    """Trains the supernet, or what is left of that, with a line for every epoch."""
    from effnet.search.supernet import Supernet, judging, training

    short = recipe.replace(
        epochs=task.rungs[0],
        seed=task.seed,
        batch=min(recipe.batch, len(splits.train)),
        warmup=min(recipe.warmup, task.rungs[0] / 4),
    )
    net = Supernet(task.space, task.seed, task.allowed(TRAINED_FOR))
    for event in training(net, splits, short, file, **options):
        told = f"supernet: epoch {event['epoch']}/{event['epochs']}, loss {event['loss']:.4f}"
        people.print(f"{told}  ({duration(event['seconds'])})", markup=False)
    return judging(net, splits, short, **options)


def _searched(
    people: Console,
    task: Task,
    judge: "Callable[[], Evaluate]",
    study: str,
    meters: Meters,
    fleet: Fleet | None,
    *,
    trials: int,
    **options: Any,
) -> "Found":
    """The search to its end, here or on the fleet, with a line for every trial."""
    if fleet is not None:
        with fleet.tasks() as tasks:
            options["at_once"] = fleet.at_once or max(1, tasks.room)
            there = {name: tasks(meter) if name == "step_ms" else meter for name, meter in meters.items()}
            return _searched(people, task, lambda: tasks(judge()), study, there, None, trials=trials, **options)
    from effnet.search.records import opened
    from effnet.search.study import found, searching

    task.propose([], set(), 0, meters)  # nothing within the limits is said before a study is made
    records = opened(study, task)
    people.print(str(task.space), markup=False, style="dim")
    result = found(task, records.trials())
    if result.trials:
        people.print(f"going on with {study}: {len(result.trials)} trials are there", markup=False)
    ended = sum(trial.state in ("finished", "stopped", "failed") for trial in result.trials)
    if ended >= trials:
        return result
    evaluate = judge()
    with _live(people) as live:
        for trial in searching(task, evaluate, study, trials=trials, meters=meters, **options):
            result = found(task, records.trials())
            (live.console if live else people).print(_line(result, trial, trials), markup=False)
            if live:
                live.update(Group(_front(result, "Pareto front so far")), refresh=True)
    return found(task, records.trials())


@contextmanager
def _live(people: Console) -> Generator[Live | None]:
    """The front, redrawn after every trial; nothing where there is no terminal."""
    if not people.is_terminal:
        yield None
        return
    with Live(console=people, auto_refresh=False, transient=True) as live:
        yield live


def _checked(
    people: Console,
    task: Task,
    evaluate: "Evaluate",
    study: str,
    fleet: Fleet | None,
    *,
    count: int | None,
    **options: Any,
) -> "Correlation | None":
    """The rank correlation, where it was asked for."""
    if count is None:
        return None
    if fleet is not None:
        with fleet.tasks() as tasks:
            there = fleet.at_once or max(1, tasks.room)
            return _checked(people, task, tasks(evaluate), study, None, count=count, at_once=there, **options)
    from effnet.search.ranking import longer

    return longer(task, evaluate, study, count=count, progress=display.evaluations(people), **options)


def _line(result: "Found", trial: "Trial", trials: int) -> str:
    """A finished trial in one line."""
    name = result.network(trial.number).name
    if trial.state == "failed":
        return f"{trial.number + 1}/{trials}  {name}  failed: {trial.reason}"
    values = trial.values
    told = [f"{percent(values['acc'])}", f"{short(values['macs'])} MACs", f"{short(values['params'])} params"]
    told += [f"{objective.text} = {objective(values):.4g}" for objective in result.task.objectives]
    seconds = sum(each["seconds"] for each in trial.results)
    ending = f"{int(values['epochs'])} epochs, {duration(seconds)}" + (", stopped" if trial.state == "stopped" else "")
    front = "  on the front" if trial.number in result.front else ""
    return f"{trial.number + 1}/{trials}  {name}  {', '.join(told)}  ({ending}){front}"


def _front(result: "Found", title: str) -> Table:
    task = result.task
    extra = sorted(task.quantities - {"acc", "macs", "params"})
    objectives = [objective.text for objective in task.objectives if objective.text not in QUANTITIES]
    made = display.table(title, ["network"], ["trial", "accuracy", "MACs", "params", *extra, *objectives, ""])
    for number in result.front:
        trial = result.trial(number)
        values = trial.values
        cells = [percent(values["acc"]), short(values["macs"]), short(values["params"])]
        cells += [f"{values[name]:.4g}" for name in extra]
        cells += [f"{each(values):.4g}" for each in task.objectives if each.text not in QUANTITIES]
        best = number == result.winner
        words = (result.network(number).name, number + 1, *cells, "winner" if best else None)
        display.add(made, *words, style="bold" if best else None)
    return made


def _answer(result: "Found", check: "Correlation | None", study: str, out: Path, drawn: Path, as_json: bool) -> None:
    """The winner's file, the figure, and the document."""
    from effnet.cost import stage_rows
    from effnet.search.figure import figure

    winner = result.network()
    out.parent.mkdir(parents=True, exist_ok=True)
    arguments.keep_network(out, winner.to_dict())
    figure(result, drawn)
    document = result.to_dict() | {"study": study, "figure": str(drawn), "saved": str(out), "name": winner.name}
    document |= {"definition": winner.to_dict(), "rank_correlation": check.to_dict() if check else None}
    seconds = sum(each["seconds"] for trial in result.trials for each in trial.results)
    document["seconds"] = seconds
    document["front_definitions"] = [result.network(number).to_dict() for number in result.front]

    def show() -> None:
        people = display.console()
        people.print(_front(result, "Pareto front of the trials that reached the last rung"))
        rows = stage_rows(winner)
        made = display.table(
            winner.name, ["stage", "operator"], ["kernel", "stride", "expand", "SE", "channels", "layers"]
        )
        for row in rows:
            expand, se = (f"{row[key]:g}" if row[key] else None for key in ("expand", "se"))
            numbers = (row["kernel"], row["stride"], expand, se, row["out_channels"], row["repeats"])
            display.add(made, row["name"], row["op"], *numbers)
        people.print(made)
        counts = ", ".join(f"{result.count(state)} {state}" for state in ("finished", "stopped", "failed"))
        told = f"{len(result.trials)} trials in {duration(seconds)} of training and measuring: {counts}."
        people.print(told, style="bold")
        if check:
            people.print(str(check), markup=False)
        else:
            people.print("how far the short trainings can be trusted: --rank-check 20", style="dim", markup=False)
        for path in (study, drawn, out):
            people.print(str(path), markup=False, soft_wrap=True)
        people.print(f"next: effnet train DATA --model {out}", style="dim", markup=False)

    display.answer(document, as_json, show)

"""How do results look to a person at a terminal? A rich table per kind of result, and one live line while training.

Every function takes a library value and prints it; nothing is computed here that a `--json` document does not hold,
except how long a run will still take (`Pace`). Nothing here imports torch, so that `effnet info` stays quick.
"""

import json
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from effnet.cost import Cost
from effnet.latency import TARGET, LatencyTable
from effnet.published import AXES, LatencyPair, Point
from effnet.spec import Network
from effnet.words import duration, in_bytes, metric, percent, short

if TYPE_CHECKING:
    from effnet.bench import Measured
    from effnet.coefficients import Found
    from effnet.doctor import Diagnosis
    from effnet.evaluate import Evaluation
    from effnet.plan import Plan
    from effnet.predict import Prediction

PIPE_COLUMNS = 200  # without a terminal there is no width to fit; rich's 80 columns would cut the tables
MOST_CLASSES = 30  # rows of a table of classes
MOST_CONFUSED = 12  # classes of a printed confusion matrix
SEVERITY_COLOURS = {"ok": "green", "info": "cyan", "warning": "yellow", "error": "bold red"}


def console(*, stderr: bool = False) -> Console:
    """Where people read: stdout, or stderr while stdout is for a document."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else PIPE_COLUMNS)


def answer(document: Any, as_json: bool, show: Callable[[], None]) -> None:
    """Writes the document, or shows people theirs. Flushed, so that a closed pipe is noticed (quietly) here."""
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        sys.stdout.flush()
    else:
        show()


def table(title: str, left: Sequence[str], right: Sequence[str] = ()) -> Table:
    """An empty table with the columns `left` (words) and then `right` (numbers)."""
    made = Table(title=escape(title) or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in left:
        made.add_column(escape(name), overflow="fold")
    for name in right:
        made.add_column(escape(name), justify="right", no_wrap=True)
    return made


def add(made: Table, *cells: object, style: str | None = None) -> None:
    """Appends a row; None is an empty cell, and brackets in a file name are no markup."""
    made.add_row(*("" if cell is None else escape(str(cell)) for cell in cells), style=style)


def show_note(out: Console, note: str) -> None:
    """A remark (the licence and protocol of a data set, why a recipe was chosen), if there is one."""
    if note:
        out.print(escape(note), style="dim")


def show_path(out: Console, path: Path) -> None:
    """Where a file was written, on a line that can be copied."""
    out.print(str(path), markup=False, soft_wrap=True)


# --- networks -------------------------------------------------------------------------------------------------------


def show_networks(out: Console, rows: Iterable[Mapping[str, Any]]) -> None:
    """The table of `effnet list`. Top-1: the best among the weights of a network."""
    made = table("", ["network"], ["params", "MACs", "px", "weights", "top-1"])
    for row in rows:
        top1 = max((weights["top1"] or 0 for weights in row["weights"]), default=0)
        counts = (short(row["params"]), short(row["macs"]), row["size_px"], len(row["weights"]) or None)
        add(made, row["name"], *counts, f"{top1:.1f} %" if top1 else None)
    out.print(made)
    out.print(
        "MACs of one image at that size (1 MAC = 2 FLOPs). top-1: the best published for its weights on ImageNet."
    )


def show_cost(out: Console, network: Network, spent: Cost, stages: Sequence[Mapping[str, Any]], *, units: bool) -> None:
    """The table of a paper, a row per stage or per unit, and the totals."""
    title = f"{network.name} at {spent.size} px" + (f" ({network.source})" if network.source else "")
    out.print(_unit_table(title, spent) if units else _stage_table(title, stages))
    totals = table("", ["total"], [""])
    add(totals, "parameters (trainable)", f"{spent.params:,}")
    add(totals, "batch-norm statistics", f"{spent.norm_statistics:,}")
    add(totals, "MACs of one image (1 MAC = 2 FLOPs)", f"{spent.macs:,}")
    add(totals, "activations of one image", f"{spent.activations:,}")
    add(totals, "weights as float32", in_bytes(spent.weight_bytes))
    add(totals, f"training memory at batch {spent.batch}, estimated", in_bytes(spent.training_bytes))
    out.print(totals)
    rates = f"dropout {network.dropout:g}, drop path {network.drop_path:g}"
    out.print(f"{network.activation}, {network.padding} padding, {rates}")


def _stage_table(title: str, stages: Sequence[Mapping[str, Any]]) -> Table:
    numbers = ["kernel", "stride", "expand", "SE", "channels", "layers", "px", "params", "MACs"]
    made = table(title, ["stage", "operator"], numbers)
    for row in stages:
        expand, se = (f"{row[key]:g}" if row[key] else None for key in ("expand", "se"))
        channels = f"{row['in_channels']} -> {row['out_channels']}"
        counts = (row["repeats"], f"{row['in_size']} -> {row['out_size']}", f"{row['params']:,}", f"{row['macs']:,}")
        add(made, row["name"], row["op"], row["kernel"], row["stride"], expand, se, channels, *counts)
    return made


def _unit_table(title: str, spent: Cost) -> Table:
    made = table(title, ["unit", "operator"], ["kernel", "stride", "channels", "squeeze", "px", "params", "MACs"])
    for unit in spent.units:
        channels, size = f"{unit.in_channels} -> {unit.out_channels}", f"{unit.in_size} -> {unit.out_size}"
        counts = (unit.squeeze_channels or None, size, f"{unit.params:,}", f"{unit.macs:,}")
        add(made, unit.name, unit.op, unit.kernel, unit.stride, channels, *counts)
    return made


def show_scaled(out: Console, document: Mapping[str, Any]) -> None:
    """The network before and after, stage by stage, and how far it is from every limit."""
    before, after = document["before"], document["after"]
    if document["definition"]:
        made = table(
            document["name"], ["stage", "operator"], ["kernel", "stride", "channels", "", "layers", "", "px", ""]
        )
        for old, new in zip(before["stages"], after["stages"], strict=True):
            pairs = [(row["out_channels"], row["repeats"], row["out_size"]) for row in (old, new)]
            cells = [cell for was, now in zip(*pairs, strict=True) for cell in (was, f"-> {now}" if now != was else "")]
            add(made, old["name"], old["op"], old["kernel"], old["stride"], *cells)
        out.print(made)
    factors = f"depth x{document['depth']:.4g}, width x{document['width']:.4g}, {document['resolution']} px"
    way = f"phi {document['phi']:.4g}: " if document["phi"] is not None else ""
    out.print(f"{document['name']}: {way}{factors}", style="bold", markup=False)
    totals = table("", ["of one image"], ["before", "after", ""])
    for name in ("resolution", "params", "macs", "activations", "weight_bytes", "training_bytes"):
        if name in after:
            words = name.replace("_", " ") if name != "resolution" else "resolution in px"
            add(totals, words, f"{before[name]:,}", f"{after[name]:,}", f"x{after[name] / before[name]:.3f}")
    out.print(totals)
    if document["limits"]:
        used = table("", ["limit on"], ["limit", "used", "left"])
        used.add_column("")
        for row in document["limits"]:
            counts = (f"{row[key]:,.6g}" for key in ("limit", "used"))
            add(used, row["metric"], *counts, f"{row['left_percent']:.2f} %", "binds" if row["binding"] else None)
        for name in document["held"]:
            add(used, name, None, None, None, "reached")
        out.print(used)
    if document["latency_error"]:
        out.print(f"latency: {document['latency_error']['words']}", markup=False)
    if document["saved"]:
        out.print(f"{document['saved']}", markup=False, soft_wrap=True)


def evaluations(out: Console) -> Callable[[int, int, str], None]:
    """Prints a line for every evaluation of a search: how many, and what came out."""
    return lambda done, total, words: out.print(f"{done}/{total}  {words}", markup=False)


def show_coefficients(out: Console, found: "Found", study: Path, figure: Path) -> None:
    """The finalists of a search with their intervals, and who came how far."""
    numbers = ["alpha", "beta", "gamma", "px", "MACs", "budget", "seeds", "accuracy", "95 % interval", "to the winner"]
    title = f"{found.network} at x{found.target:g} multiply-adds (within {found.tolerance:.0%}, realised)"
    made = table(title, [], [*numbers, "95 % interval", ""])
    for standing in found.standings:
        c, one = standing.candidate.coefficients, standing.candidate
        row = (f"{c.alpha:g}", f"{c.beta:g}", f"{c.gamma:.4g}", one.resolution, f"x{one.ratio:.3f}")
        told = "winner" if standing is found.winner else "tie" if standing.tie else None
        difference = None if standing.difference is None else f"{100 * standing.difference:+.2f}"
        results = (
            percent(standing.mean),
            _bounds(standing.interval),
            difference,
            _bounds(standing.difference_interval),
        )
        add(made, *row, standing.budget, len(standing.values), *results, told, style="bold" if told else None)
    out.print(made)
    c = found.winner.candidate.coefficients
    others = len(found.ties)
    told = f"{others} other{'s' * (others > 1)} cannot be told from it" if others else "no finalist ties with it"
    rungs = ", ".join(f"{rung.candidates} at budget {rung.budget} x {rung.seeds} seeds" for rung in found.rungs)
    out.print(f"alpha {c.alpha:g}, beta {c.beta:g}, gamma {c.gamma:g}; {told} (paired over seeds, 95 %).", style="bold")
    out.print(f"{len(found.cells)} points, {len(found.standings)} networks; rungs: {rungs}", markup=False)
    for path in (study, figure):
        show_path(out, path)


def _bounds(interval: tuple[float, float] | None) -> str | None:
    return None if interval is None else f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"


# --- recipes, data and plans -----------------------------------------------------------------------------------------


def show_recipes(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A row per named recipe, values from first to last phase; of a single one all fields."""
    if len(rows) == 1:
        made = table(rows[0]["about"], ["field", rows[0]["name"]])
        for name, value in rows[0].items():
            if name not in ("about", "name"):
                add(made, name, _pair(value) if isinstance(value, tuple) else value)
        out.print(made)
        return
    made = table("", ["recipe", "for"], ["epochs", "batch", "rate at batch", "px", "dropout", "mixup"])
    made.add_column("a view is made by")
    made.columns[0].no_wrap = True
    for row in rows:
        steps = f", {row['least_steps']} steps" if row["least_steps"] else ""
        lr = f"{row['lr']:g} at {row['lr_batch']}, {row['schedule']['kind']}"
        strength = _pair(row["magnitude"])
        policy = f"{row['policy']} {strength}" if row["policy"] == "randaugment" else row["policy"]
        view = row["crop"] if policy == "randaugment 0" else f"{row['crop']}, {policy}"
        pairs = (_pair(row[name]) for name in ("size_px", "dropout", "mixup"))
        add(made, row["name"], row["about"], f"{row['epochs']}{steps}", row["batch"], lr, *pairs, view)
    out.print(made)


def _pair(values: Sequence[float] | None) -> str:
    """First and last value, once where they are the same; None is the network's own."""
    return "network" if values is None else " to ".join(f"{value:g}" for value in dict.fromkeys(values))


def show_diagnosis(out: Console, found: "Diagnosis") -> None:
    """Images per class and part, then every check with its severity."""
    counts = table(found.name, ["class"], list(found.counts))
    for label in found.classes[:MOST_CLASSES]:
        add(counts, label, *(part[label] for part in found.counts.values()))
    if len(found.classes) > MOST_CLASSES:
        add(counts, f"and {len(found.classes) - MOST_CLASSES} more")
    add(counts, "all", *(sum(part.values()) for part in found.counts.values()), style="bold")
    if found.classes:
        out.print(counts)
    checks = table("", ["check", "", "finding"])
    for row in found.rows:
        colour = SEVERITY_COLOURS[row.severity]
        checks.add_row(escape(row.check), f"[{colour}]{row.severity}[/]", escape(row.message))
    out.print(checks)
    show_note(out, found.note)


def show_plan(out: Console, todo: "Plan") -> None:
    """The phases, and what the run will take."""
    title = f"{todo.network.name} by recipe {todo.recipe.name}, {len(todo.classes)} classes"
    numbers = ["phase", "epochs", "steps", "px", "batch", "RandAugment", "mixup", "cutmix", "dropout", "drop path"]
    made = table(title, [], [*numbers, "MACs", "memory", "images/s", "time"])
    for row in todo.rows:
        phase = row.phase
        strengths = (phase.magnitude, phase.mixup, phase.cutmix, phase.dropout, phase.drop_path)
        costs = (short(row.macs), in_bytes(row.training_bytes), f"{row.images_per_s:.1f}", duration(row.seconds))
        number = f"{phase.index + 1} (head)" if phase.head_only else phase.index + 1
        add(made, number, phase.epochs, row.steps, phase.size_px, phase.batch, *(f"{s:g}" for s in strengths), *costs)
    out.print(made)
    if todo.recipe.policy != "randaugment":
        out.print(f"Views are changed by {todo.recipe.policy} instead of RandAugment.")
    out.print(
        f"{todo.train_images} images to train on, {_validated(todo)} at {todo.preprocess.size} px. "
        f"{todo.params:,} parameters; {todo.precision} on {escape(todo.device)}, {todo.threads} threads; "
        f"up to {in_bytes(todo.disk_bytes)} of checkpoints."
    )
    out.print(f"Expected time: {duration(todo.seconds)}, as timed just now on images in memory.", style="bold")


def _validated(todo: "Plan") -> str:
    """How many images choose the epoch that is kept."""
    return f"{todo.val_images} to validate on" if todo.val_images else "none to validate on (the last epoch is kept)"


# --- results --------------------------------------------------------------------------------------------------------


def show_end(out: Console, document: Mapping[str, Any]) -> None:
    """How a training run ended: the best epoch and what to do with it."""
    when = f"epoch {document['best_epoch'] + 1}, {duration(document['seconds'])} in all"
    said = f"kept: the last epoch, there are no validation images ({when})"
    if document["metrics"]:
        name = _headline(document["metrics"])
        validated = f"{name.replace('_', ' ')} {metric(name, document['metrics'][name])}"
        said = f"best on the validation images: {validated} ({when})"
    out.print(said, style="bold")
    out.print(f"{document['checkpoint']}", markup=False, soft_wrap=True)
    out.print(f"next: effnet eval {document['run']} DATA, effnet report {document['run']}", style="dim", markup=False)


def show_evaluation(out: Console, judged: "Evaluation", title: str) -> None:
    """The metrics (and a column per group), the per-class table, and the confusion matrix of a few classes."""
    made = table(f"{title}: {judged.images} images", ["metric"], ["all", "95 % interval", *judged.groups])
    for name, value in judged.metrics.items():
        interval = judged.intervals.get(name)
        bounds = f"{percent(interval.low)} to {percent(interval.high)}" if interval else None
        grouped = (metric(name, group.metrics.get(name)) for group in judged.groups.values())
        add(made, name.replace("_", " "), metric(name, value), bounds, *grouped)
    out.print(made)
    rows = table("", ["class"], ["precision", "recall", "F1", "images", "predicted"])
    for row in judged.per_class[:MOST_CLASSES]:
        shares = (metric("accuracy", share) for share in (row.precision, row.recall, row.f1))
        add(rows, row.label, *shares, row.support, row.predicted)
    if len(judged.per_class) > MOST_CLASSES:
        add(rows, f"and {len(judged.per_class) - MOST_CLASSES} more")
    out.print(rows)
    if len(judged.classes) <= MOST_CONFUSED:
        confused = table("", ["true, and predicted as"], judged.classes)
        for label, counts in zip(judged.classes, judged.confusion, strict=True):
            add(confused, label, *counts)
        out.print(confused)


def show_predictions(out: Console, rows: Sequence["Prediction"]) -> None:
    """The best classes of every image that could be read."""
    made = table("", ["image"])
    for rank in range(max((len(row.labels) for row in rows), default=0)):
        made.add_column("class" if rank == 0 else "", overflow="fold")
        made.add_column("", justify="right", no_wrap=True)
    for row in rows:
        if row.error is None:
            ranked = zip(row.labels, row.probabilities, strict=True)
            add(made, row.path, *(cell for label, p in ranked for cell in (label, f"{100 * p:.1f} %")))
    if made.row_count:
        out.print(made)


def show_explanations(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Which class was explained in which file, and how faithfully, where that was measured."""
    measured = ["insertion", "deletion"] if any("insertion" in row for row in rows) else []
    made = table("", ["image", "true", "explained"], ["probability", *measured])
    made.add_column("written to", overflow="fold")
    for row in rows:
        areas = (f"{row[name]:.2f}" for name in measured)
        add(made, row["image"], row["truth"], row["label"], f"{100 * row['probability']:.1f} %", *areas, row["file"])
    out.print(made)


def _headline(metrics: Mapping[str, Any]) -> str:
    """The metric that a run is judged by."""
    return "weighted_accuracy" if "weighted_accuracy" in metrics else "accuracy"


def show_served(out: Console, found: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Where a service listens, and how to ask it."""
    out.print(f"{found['model']} at {found['url']}", style="bold", markup=False)
    out.print(f"page: {found['url']}/", markup=False)
    out.print(f"ask:  curl -F image=@photo.jpg {found['url']}/predict", markup=False, soft_wrap=True)
    batches = f"batches of up to {options['max_batch']} within {options['max_delay_ms']:g} ms"
    out.print(f"{options['workers']} workers, {batches}; Ctrl-C drains", style="dim", markup=False)


# --- progress -------------------------------------------------------------------------------------------------------


@contextmanager
def counting(out: Console, what: str) -> Generator[Callable[[int, int], None]]:
    """A bar with an ETA; inside, call what is yielded with (done, total). Without a terminal nothing is drawn."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, disable=not out.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# --- measurements ---------------------------------------------------------------------------------------------------


def show_bench(out: Console, found: "Measured", batch: int) -> None:
    """Latency percentiles with the interval of the median, throughput, verdicts, and how far to trust them."""
    first = found.measurements[0].environment
    title = f"batch {batch}, {first['precision']}, {first['threads']} threads, {first['processor']}"
    made = table(title, ["model"], ["p50 ms", "95 % interval", "p95 ms", "p99 ms", "images/s", "calls"])
    for row in found.measurements:
        low, high = row.spread
        cells = (f"{row.value:.3f}", f"{low:.3f} to {high:.3f}", f"{row.p95:.3f}", f"{row.p99:.3f}")
        add(made, row.name, *cells, f"{1e3 * batch / row.value:.1f}", row.n)
    out.print(made)
    for comparison in found.comparisons:
        out.print(escape(str(comparison)))
    if found.starts:
        begun = table("fresh processes", ["model"], ["to the first answer", "peak memory"])
        for one in found.starts:
            add(begun, one.name, f"{one.seconds:.2f} s", f"{one.peak_bytes / 1e6:.0f} MB")
        out.print(begun)
    if found.others is not None:
        out.print(f"other programs took {percent(found.others)} of the busy CPU time meanwhile", style="dim")
    if found.busy:
        out.print("The machine was busy: measure again on a quiet one before you quote these numbers.", style="yellow")


def show_table4(out: Console, parts: "Mapping[tuple[str, LatencyPair], Measured]") -> None:
    """The pairs of the paper's Table 4, measured here, beside the ratios that it prints."""
    busy = any(found.busy for found in parts.values())
    precision = next(iter(parts.values())).measurements[0].environment["precision"]
    made = table(f"Table 4, {precision}", ["pair", "backend"], ["ms", "ms", "ratio", "95 % interval", "published"])
    for (backend, pair), found in parts.items():
        for one in (comparison.upright for comparison in found.comparisons):
            low, high = one.spread
            times = [f"{found[name].value:.1f}" for name in (one.second, one.first)]
            printed = f"{pair.ratio:g}x" if pair.ratio else "not printed"
            cells = (f"{one.ratio:.2f}x", f"{low:.2f} to {high:.2f}", printed)
            add(made, f"{one.second} / {one.first}", backend, *times, *cells)
    out.print(made)
    if busy:
        out.print("The machine was busy: measure again on a quiet one before you quote these numbers.", style="yellow")


def show_table_made(out: Console, made: LatencyTable, path: Path) -> None:
    """What the table is of, how well it predicts, and where it is kept."""
    out.print(escape(f"{made}: {sum(len(grid.ms) for grid in made.grids)} operators"))
    out.print(str(made.error))
    if made.error and made.error.others is not None:
        out.print(f"other programs took {percent(made.error.others)} of the busy CPU time meanwhile", style="dim")
    if made.error and made.error.median > TARGET:
        out.print(f"That is more than {percent(TARGET)}: measure again on a quiet machine.", style="yellow")
    show_path(out, path)


def show_pareto(out: Console, best: Sequence[Point], x: str, note: str, path: Path) -> None:
    """The networks on the Pareto front, and the file of the figure."""
    made = table("Pareto front", ["network", "accuracy from"], [AXES[x], "top-1"])
    for point in best:
        add(made, point.name, point.source, short(point.x), f"{point.top1:.1f} %")
    out.print(made)
    show_note(out, note)
    show_path(out, path)


@dataclass(kw_only=True)
class Pace:
    """How long a run will still take: the plan's seconds that are left, times how much slower than planned it goes.

    The plan knows that later phases with larger images are slower; the steps so far tell what it could not measure.
    """

    plan: "Plan"
    step: int = 0  # finished steps of the whole run
    slowness: float | None = None  # measured over planned seconds of a step, smoothed

    def learn(self, step: int, phase: int, seconds: float) -> None:
        """Takes in a finished step. The first measurement counts fully, each later one a twentieth."""
        planned = self.plan.rows[phase].phase.batch / self.plan.rows[phase].images_per_s
        ratio = seconds / planned
        self.slowness = ratio if self.slowness is None else 0.95 * self.slowness + 0.05 * ratio
        self.step = step

    @property
    def done_s(self) -> float:
        """The plan's seconds of the finished steps; validation is spread over the steps."""
        left, seconds = self.step, 0.0
        for row in self.plan.rows:
            steps = min(left, row.steps)
            seconds += steps * row.seconds / row.steps
            left -= steps
        return seconds

    @property
    def remaining_s(self) -> float:
        """The expected seconds to the end of the last phase."""
        return (self.plan.seconds - self.done_s) * (self.slowness or 1.0)


@dataclass(kw_only=True)
class Tally:
    """What the steps of the epoch under way add up to."""

    seconds: float = 0.0
    waited_s: float = 0.0
    images: float = 0.0

    @property
    def speed(self) -> str:
        """Images per second, and the share of the time in which the model waited for them."""
        seconds = self.seconds or 1e-9
        return f"{self.images / seconds:.1f} images/s, {self.waited_s / seconds:.0%} waiting for data"


@dataclass(kw_only=True)
class TrainingView:
    """Draws the events of `train.training`: a printed row per epoch and, on a terminal, a live line in between.

    `read_plan` is called at the start event: the run has written its plan by then.
    """

    out: Console
    bar: Progress
    read_plan: Callable[[], "Plan"]
    pace: Pace = field(init=False)  # from the start event on
    tally: Tally = field(default_factory=Tally)

    def show(self, event: Mapping[str, Any]) -> None:
        """Draws one event; those that say nothing to people are passed over."""
        kinds: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "start": self._start,
            "phase": self._phase,
            "step": self._step,
            "epoch": self._epoch,
            "skip": self._skip,
            "early_stop": self._early_stop,
            "save": self._save,
            "rollback": self._rollback,
        }
        if event["event"] in kinds:
            kinds[event["event"]](event)

    def _start(self, event: Mapping[str, Any]) -> None:
        self.pace = Pace(plan=self.read_plan(), step=event["step"])
        show_note(self.out, event["note"])
        if event["step"]:
            self.out.print(f"going on after step {event['step']} of {sum(row.steps for row in self.pace.plan.rows)}")
        else:
            show_plan(self.out, self.pace.plan)
        self.bar.add_task("", total=self.pace.plan.seconds, words="")

    def _phase(self, event: Mapping[str, Any]) -> None:
        frozen = self.pace.plan.recipe.freeze
        what = f"all but the stem and {frozen} stages learn" if frozen else "all layers learn"
        what = "the classifier learns" if event["head_only"] else what
        number = f"phase {event['index'] + 1} of {len(self.pace.plan.rows)}"
        self.out.print(f"{number}: {what} at {event['size_px']} px", style="bold")

    def _step(self, event: Mapping[str, Any]) -> None:
        seconds = event["step_ms"] / 1e3
        self.pace.learn(event["step"], event["phase"], seconds)
        self.tally.seconds += seconds
        self.tally.waited_s += event["wait_ms"] / 1e3
        self.tally.images += event["images_per_s"] * seconds
        words = (
            f"phase {event['phase'] + 1}, epoch {self._epoch_number(event)}, loss {event['loss']:.4f}, "
            f"{self.tally.speed}, {duration(self.pace.remaining_s)} left"
        )
        for task in self.bar.task_ids:
            self.bar.update(task, completed=self.pace.done_s, words=words)

    def _epoch(self, event: Mapping[str, Any]) -> None:
        words = f"epoch {self._epoch_number(event)}: loss {event['train_loss']:.4f}, "
        best = event["val"] and event["best"]
        if event["val"]:
            name = _headline(event["val"])
            words += f"validation {metric(name, event['val'][name])}, nll {metric('nll', event['val']['nll'])}, "
        words += f"{self.tally.speed}, {duration(self.tally.seconds + event['seconds'])}"
        self.out.print(f"{words}{', best' if best else ''}", style="bold" if best else None)
        self.tally = Tally()

    def _epoch_number(self, event: Mapping[str, Any]) -> str:
        return f"{event['epoch'] + 1}/{sum(row.phase.epochs for row in self.pace.plan.rows)}"

    def _skip(self, event: Mapping[str, Any]) -> None:
        self.out.print(f"left out {escape(event['image'])}: {escape(event['reason'])}", style="yellow")

    def _save(self, event: Mapping[str, Any]) -> None:
        self.out.print(f"not saved: {escape(' '.join(event['save_failed']))}", style="bold red")

    def _rollback(self, event: Mapping[str, Any]) -> None:
        words = f"back to step {event['step']} with {event['rate_factor']:g} of the learning rate"
        self.out.print(f"{escape(event['reason'])}: {words} ({event['rollbacks']} of {event['most']})", style="yellow")

    def _early_stop(self, event: Mapping[str, Any]) -> None:
        self.out.print(f"stopped early: {event['patience']} epochs without a better one")


@contextmanager
def training_view(out: Console, read_plan: Callable[[], "Plan"]) -> Generator[TrainingView]:
    """A `TrainingView`, whose live line is gone afterwards."""
    columns = (BarColumn(bar_width=20), TextColumn("{task.fields[words]}"))
    with Progress(*columns, console=out, disable=not out.is_terminal, transient=True) as bar:
        yield TrainingView(out=out, bar=bar, read_plan=read_plan)

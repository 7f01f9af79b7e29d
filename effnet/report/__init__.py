"""What should one know about a trained classifier? One HTML file, made from the run folder alone.

The page needs no other file, no network and no script. `runs` reads what the folder holds; a function per section turns
it into prose, tables and figures: here for how it was trained, in `verdict` for how good it is. A section whose source
is missing is left out, and where a command can make it, the page says which one.

Metrics are those of `eval.json`, to the last digit: each stands in a `<data>` element with its exact value.
"""

import os
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from effnet import checkpoint, recipes
from effnet.cost import cost, stage_rows
from effnet.files import write_atomically
from effnet.plan import PlanRow
from effnet.report import figures, verdict
from effnet.report.markup import Child, Html, Section, facts, figure, folded, join, listed, page, section, table, tag
from effnet.report.verdict import bounds, exact, level
from effnet.runs import Run, read_run
from effnet.samples import Splits
from effnet.value import UsageError
from effnet.words import METRICS, duration, in_bytes, percent, short

HEADLINES = ("weighted_accuracy", "accuracy", "auroc", "macro_f1", "top5", "ece")  # the first four that there are
STRENGTHS = {
    "magnitude": "RandAugment",
    "mixup": "mixup",
    "cutmix": "cutmix",
    "dropout": "dropout",
    "drop_path": "drop path",
}


def report(run: str | Path, *, data: Splits | None = None) -> Path:
    """Writes `report.html` into the run folder and returns its path.

    `data`: where the pictures of the examples come from; if None, the run's data is opened again by its name. Pictures
    that cannot be had are left out, saying why. `UsageError` for a folder that is not a run, naming what is missing,
    and for a file in it that cannot be read.
    """
    found = read_run(run)
    sections = (
        verdict.results(found),
        verdict.published(found),
        _data(found),
        verdict.classes(found),
        verdict.calibration(found),
        verdict.groups(found),
        verdict.examples(found, data),
        _plan(found),
        _curves(found),
        _network(found),
        _environment(found),
        _reproduce(found),
    )
    shown = [part for part in sections if part is not None]
    contents = tag("nav", tag("ul", *(tag("li", part.link) for part in shown)), aria_label="Contents")
    text = page(_title(found), _header(found, contents), tag("main", *(part.markup for part in shown)), _footer())
    path = found.folder / "report.html"
    write_atomically(path, lambda file: _write(file, text))
    return path


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")  # a file name need not be UTF-8


# --- the head of the page -------------------------------------------------------------------------------------------


def _title(run: Run) -> str:
    data = str(run.start["data"])
    return f"{run.plan.network.name} on {Path(data).name if os.sep in data and ':' not in data else data}"


def _header(run: Run, contents: Html) -> Html:
    return tag(
        "header",
        tag("p", "effnet report", class_="kicker"),
        tag("h1", _title(run)),
        tag("p", _meta(run), class_="lead"),
        *_warnings(run),
        _tiles(run),
        contents,
    )


def _meta(run: Run) -> Html:
    """Date, size and effort in one line."""
    ended = datetime.fromtimestamp((run.folder / "log.jsonl").stat().st_mtime)
    date = tag("time", f"{ended:%Y-%m-%d %H:%M}", datetime=f"{ended:%Y-%m-%dT%H:%M}")
    size = run.plan.preprocess.size
    macs = cost(run.plan.network, size).macs
    count = len(run.history.epochs)
    words = (
        f"{short(run.plan.params)} parameters",
        f"{short(macs)} MACs at {size} px",
        f"{count} epoch{'' if count == 1 else 's'} in {duration(run.history.seconds)}",
    )
    return join(["trained ", date, *(f" · {part}" for part in words)])


def _warnings(run: Run) -> list[Html]:
    """What a reader must know before the first number."""
    found = []
    done, planned = len(run.history.steps["step"]), sum(row.steps for row in run.plan.rows)
    if run.history.ending is None or run.history.ending == "stop":
        text = f"Training did {done} of {planned} steps and was not finished: give its command again with --resume."
        found.append(tag("div", tag("p", text), class_="callout"))
    if run.evaluation is None:
        numbers = "There are no numbers yet."
        if run.metrics:
            numbers = "The numbers here are those of the validation images, which also chose the best epoch."
        text = f" {numbers} To evaluate:"
        commands = tag("pre", tag("code", "\n".join(_evaluation_commands(run))))
        told = tag("p", tag("b", "Not evaluated on test images."), text)
        found.append(tag("div", told, commands, class_="callout"))
    for failure in dict.fromkeys(run.history.save_failures):
        found.append(tag("div", tag("p", f"A checkpoint was not saved: {failure}"), class_="callout"))
    return found


def _tiles(run: Run) -> Html | None:
    """The headline metrics, large, with their intervals."""
    names = [name for name in HEADLINES if run.metrics.get(name) is not None][:4]
    return tag("dl", *(_tile(run, name) for name in names), class_="tiles") if names else None


def _tile(run: Run, name: str) -> Html:
    title = METRICS[name][0] if run.evaluation else f"{METRICS[name][0]} (validation)"
    found = [tag("dt", title), tag("dd", exact(name, run.metrics[name]), class_="value")]
    interval = run.evaluation.intervals.get(name) if run.evaluation else None
    if interval is not None:
        words = (f"{level(interval)} interval", bounds(name, interval))
        found.append(tag("dd", *(tag("span", word, class_="nowrap") for word in words), class_="note"))
    return tag("div", *found)


# --- how it was trained ---------------------------------------------------------------------------------------------


def _plan(run: Run) -> Section:
    """What was planned, and how long it took."""
    rows = run.plan.rows
    used = [name for name in STRENGTHS if any(getattr(row.phase, name) for row in rows)]
    cells: list[list[Child]] = [_phase_cells(run, row, used) for row in rows]
    epochs, steps = sum(row.phase.epochs for row in rows), sum(row.steps for row in rows)
    times = (duration(run.plan.seconds), duration(run.history.seconds))
    cells.append(["All", epochs, f"{steps:,}", *[None] * (len(used) + 3), *times])
    caption = (
        f"Recipe {run.recipe.name}: {run.plan.train_images:,} training images in batches of {run.recipe.batch}, "
        f"{run.recipe.optimizer}, {run.plan.precision}. MACs of one image; memory of one step, estimated; times "
        "with validation."
    )
    strengths = [STRENGTHS[name] for name in used]
    columns = ["Phase", "Epochs", "Steps", "Size", *strengths, "MACs", "Memory", "Expected", "Measured"]
    found = table(columns, cells, caption=caption, mark=len(rows))
    return section("plan", "Plan and time", found, tag("p", _course(run)))


def _phase_cells(run: Run, row: PlanRow, used: list[str]) -> list[Child]:
    """A row of the table: the strengths that are `used`, cost, expected and measured time."""
    phase = row.phase
    return [
        f"{phase.index + 1}{', head only' if phase.head_only else ''}",
        phase.epochs,
        f"{row.steps:,}",
        f"{phase.size_px} px",
        *(f"{getattr(phase, name):.3g}" for name in used),
        short(row.macs),
        in_bytes(row.training_bytes),
        duration(row.seconds),
        _measured(run, row),
    ]


def _measured(run: Run, row: PlanRow) -> str:
    """The time of a phase; with the number of its steps, if it did not do them all."""
    done = run.history.phase_steps(row.phase.index)
    if not done:
        return "–"
    time = duration(run.history.phase_seconds(row.phase.index))
    return time if done == row.steps else f"{time} ({done:,} steps)"


def _course(run: Run) -> str:
    """What happened, in sentences."""
    history, found = run.history, []
    if history.best is not None:
        kept = history.best["epoch"] + 1
        why = f"the best validation {run.recipe.monitor}" if history.judged else "the last, without validation images"
        found.append(f"The weights of epoch {kept} were kept: {why}.")
    if history.early_stop:
        found.append(f"Training stopped early, after {run.recipe.patience} epochs without a better one.")
    if resumed := len(history.starts) - 1:
        found.append(f"The run was interrupted and resumed {'once' if resumed == 1 else f'{resumed} times'}.")
    if len(history.steps["step"]):
        found.append(f"Waiting for images took {percent(history.wait_share())} of the time of all steps.")
    return " ".join(found)


def _curves(run: Run) -> Section | None:
    """Small multiples over the epochs, and their numbers."""
    history, todo = run.history, run.plan
    if not len(history.steps["step"]):
        return None
    losses = f"of each step (faint), its mean by epoch{', and validation NLL' if history.judged else ''}."
    drawn = [
        ("Loss", losses, figures.loss_curve(history, todo)),
        ("Learning rate", "of each step.", figures.rate_curve(history, todo)),
        ("Waiting for data", "as a share of the time of an epoch's steps.", figures.waiting_bars(history, todo)),
    ]
    numbers = None
    if history.judged:
        judged = next(name for name in HEADLINES if name in history.epochs[0]["val"])
        curve = figures.accuracy_curve(history, todo, judged)
        drawn.insert(1, (METRICS[judged][0], "on validation images; the kept epoch is marked.", curve))
        numbers = folded("Numbers by epoch", _epoch_table(run, judged))
    multiples = (figure(picture, join([tag("b", title), " ", text])) for title, text, picture in drawn)
    return section("curves", "Learning curves", tag("div", *multiples, class_="multiples"), numbers)


def _epoch_table(run: Run, accuracy: str) -> Html:
    best = run.history.best
    rows = [
        [
            epoch["epoch"] + 1,
            epoch["phase"] + 1,
            f"{epoch['size_px']} px",
            f"{epoch['train_loss']:.4f}",
            exact("nll", epoch["val"]["nll"]),
            exact(accuracy, epoch["val"][accuracy]),
            percent(run.history.wait_share(epoch["epoch"])),
        ]
        for epoch in run.history.epochs
    ]
    columns = ["Epoch", "Phase", "Size", "Training loss", "Validation NLL", METRICS[accuracy][0], "Waiting"]
    mark = run.history.epochs.index(best) if best else -1
    return table(columns, rows, caption="Epoch by epoch; the one that was kept is marked.", mark=mark)


def _data(run: Run) -> Section:
    """What it was trained on, and the words that must go with it: licence, citation, protocol."""
    images = ", ".join(f"{count:,} {part}" for part, count in run.start["images"].items() if count)
    classes = run.plan.classes
    pairs = [
        ("Name", str(run.start["data"])),
        ("Images", images),
        (f"{len(classes)} classes", listed(classes, 15)),
        ("Fingerprint of the training part", tag("code", str(run.start["fingerprint"]))),
    ]
    note = tag("p", str(run.start["note"])) if run.start["note"] else None
    return section("data", "Data", note, facts(pairs), _left_out(run))


def _left_out(run: Run) -> Html | None:
    if not run.history.skipped:
        return None
    reasons = dict(run.history.skipped)
    summary = f"{len(reasons)} training images could not be read and were left out"
    return folded(summary, tag("p", listed([f"{name} ({reason})" for name, reason in reasons.items()]), class_="note"))


# --- what it is, and how to have it again ---------------------------------------------------------------------------


def _network(run: Run) -> Section:
    """The stage table of a paper, with what each stage costs."""
    size = run.plan.preprocess.size
    stages = stage_rows(run.plan.network, size)
    totals = {key: sum(row[key] for row in stages) for key in ("params", "macs")}
    rows: list[list[Child]] = [
        [
            row["name"],
            row["op"],
            f"{row['kernel']} × {row['kernel']}",
            row["stride"],
            f"{row['in_channels']} → {row['out_channels']}",
            row["repeats"],
            f"{row['out_size']} px",
            *(_with_bar(row[key], total) for key, total in totals.items()),
        ]
        for row in stages
    ]
    layers = sum(row["repeats"] for row in stages)
    rows.append(["All", *[None] * 4, layers, None, *(_with_bar(total, total) for total in totals.values())])
    columns = ["Stage", "Operator", "Kernel", "Stride", "Channels", "Layers", "Output", "Parameters", "MACs"]
    caption = f"{run.plan.network.name} at {size} px, cost of one image. 1 MAC is 2 FLOPs."
    return section("network", "Network", table(columns, rows, caption=caption, words=(1,), mark=len(stages)))


def _with_bar(count: int, total: int) -> Html:
    """A number, and its share of the total to be seen at a glance."""
    bar = tag("span", class_="bar", style=f"--share: {count / total:.1%}", aria_hidden="true")
    return join([f"{count:,}", bar])


def _environment(run: Run) -> Section:
    """Where the numbers were obtained."""
    found: dict[str, Any] = {**run.start["environment"], "precision": run.plan.precision}
    versions = {} if isinstance(run.saved, UsageError) else dict(run.saved.versions)
    pairs = [(name, str(value)) for name, value in (versions | found).items()]
    return section("environment", "Environment", facts(pairs))


def _reproduce(run: Run) -> Section:
    """The commands, and what they do not say."""
    commands = "\n".join([_train_command(run), *_evaluation_commands(run)])
    text = (
        "Order of images, augmentation and dropout are functions of the seed "
        f"({run.recipe.seed}): with the same versions on the same kind of machine, the run repeats. "
        "plan.json and recipe.json in the run folder say all of it."
    )
    shown = tag("pre", tag("code", commands), tabindex=0)
    return section("reproduce", "Reproduce", shown, tag("p", text, class_="note"))


def _train_command(run: Run) -> str:
    words = ["effnet", "train", str(run.start["data"]), "--model", run.plan.network.name]
    words += ["--recipe", run.recipe.name] if run.recipe.name in recipes.RECIPES else []
    words += ["--pretrained-from", weights] if (weights := run.start.get("weights")) else []
    for name, text in recipes.settings(run.recipe).items():
        words += ["--set", f"{name}={text}"]
    for name, value in run.cut.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shell([*words, "--out", str(run.folder)])


def _evaluation_commands(run: Run) -> list[str]:
    folder = str(run.folder)
    return [
        shell(["effnet", "eval", folder, str(run.start["data"]), "--split", "test"]),
        shell(["effnet", "report", folder]),
    ]


def shell(words: Sequence[str], width: int = 96) -> str:
    """A command as it is typed: quoted where a shell needs it, and broken before options when it is long.

    >>> print(shell(["effnet", "train", "my photos", "--set", "lr=0.01", "--out", "runs/a"], width=40))
    effnet train 'my photos' --set lr=0.01 \\
        --out runs/a
    """
    parts: list[str] = []
    for word in map(shlex.quote, words):
        if word.startswith("--") or not parts:
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    lines = parts[:1]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}")
    return " \\\n".join(lines)


def _footer() -> Html:
    made = f"Made by effnet {checkpoint.versions()['effnet']}. This file is complete: it loads nothing."
    return tag("footer", made)

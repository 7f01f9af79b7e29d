"""How good is it, shown on a page? The sections of a report that come from an evaluation.

A table of metrics with their intervals, published results on the same scale, classes and what is taken for what,
calibration, groups, and pictures with the evidence that the network found in them.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from effnet.evaluate import ClassScore, Evaluation, Interval
from effnet.report import figures
from effnet.report.examples import Example, find_examples
from effnet.report.markup import Child, Html, Section, figure, folded, join, listed, section, table, tag, titled
from effnet.runs import Published, Run
from effnet.samples import Splits
from effnet.value import UsageError
from effnet.words import METRICS, SHARES, metric, percent

MOST_ROWS = 25  # of the per-class table; with more classes the worst are shown, and all of them folded
MOST_CONFUSED = 12  # classes of a confusion matrix that is printed as a table, and rows of the table of confusions
PICTURE_PX = 288


def exact(name: str, value: float | None) -> Html:
    """A metric for people, and for programs with all its digits."""
    if value is None:
        return tag("span", "–", title="not defined here")
    return tag("data", metric(name, value), value=repr(float(value)))


def in_order(metrics: Iterable[str]) -> list[str]:
    """Names of metrics, the most telling first; unknown ones last."""
    rank = {name: place for place, name in enumerate(METRICS)}
    return sorted(metrics, key=lambda name: rank.get(name, len(rank)))


def level(interval: Interval) -> str:
    """The level of an interval: `95 %`."""
    return f"{100 * interval.level:.0f} %"


def bounds(name: str, interval: Interval) -> str:
    """An interval on the scale of its metric: `85.91 to 90.73 %`."""
    if name in SHARES:
        return f"{100 * interval.low:.2f} to {100 * interval.high:.2f} %"
    return f"{interval.low:.4f} to {interval.high:.4f}"


# --- how good it is -------------------------------------------------------------------------------------------------


def results(run: Run) -> Section | None:
    """Every metric, with what it means."""
    if not run.metrics:
        return None
    intervals = run.evaluation.intervals if run.evaluation else {}
    rows: list[list[Child]] = []
    for name in in_order(run.metrics):
        interval = [bounds(name, intervals[name]) if name in intervals else None] if intervals else []
        rows.append([_titled(*METRICS.get(name, (name, ""))), exact(name, run.metrics[name]), *interval])
    columns = ["Metric", "Value", *(["95 % interval"] if intervals else [])]
    if run.evaluation is not None:
        caption = f"{run.evaluation.images:,} {run.evaluation.source} images."
    else:
        caption = f"{run.plan.val_images:,} validation images, after the epoch that was kept."
    note = "Intervals: bootstrap over the images. They cover the choice of images, not the luck of the training run."
    found = table(columns, rows, caption=caption)
    return section("results", "Results", found, tag("p", note, class_="note") if intervals else None)


def _titled(title: str, *remarks: Child) -> Html:
    """What a row is, and small below it what else is to be said."""
    return join([title, *(tag("small", remark) for remark in remarks if remark)])


def published(run: Run) -> Section | None:
    """Our value of each metric for which there are published ones, and those."""
    if not run.published:
        return None
    tables = [_comparison(run, name) for name in dict.fromkeys(row.metric for row in run.published)]
    return section("published", "Beside published results", *tables)


def _comparison(run: Run, name: str) -> Html:
    """One metric: this run, with its interval, and the published results, on one scale."""
    ours, interval = run.metrics.get(name), run.evaluation.intervals.get(name) if run.evaluation else None
    others = [row for row in run.published if row.metric == name]
    values = [row.on_scale for row in others] + ([] if ours is None else [ours])
    scale = figures.spread(values + ([interval.low, interval.high] if interval else []))
    judged = f"{run.evaluation.images:,} {run.evaluation.source} images" if run.evaluation else "validation images only"
    within = f"{level(interval)} interval {bounds(name, interval)}" if interval else None
    rows: list[list[Child]] = [[_titled("This run", judged, within), exact(name, ours), _range(scale, ours, interval)]]
    for row in others:
        title = _titled(row.name, _cited(row), row.note)
        rows.append([title, exact(name, row.on_scale), _range(scale, row.on_scale)])
    ends = f"{metric(name, scale[0])} to {metric(name, scale[1])}"
    caption = f"{METRICS[name][0]}: {METRICS[name][1]}."
    return table(["Result", "Value", ends], rows, caption=caption, mark=0)


def _range(scale: tuple[float, float], value: float | None, interval: Interval | None = None) -> Html | None:
    """A dot on the scale, and a line for the interval. The numbers stand beside it."""
    if value is None:
        return None
    at = {"at": value} | ({"low": interval.low, "high": interval.high} if interval else {})
    places = {name: 100 * (position - scale[0]) / (scale[1] - scale[0]) for name, position in at.items()}
    style = "; ".join(f"--{name}: {place:.2f}%" for name, place in places.items())
    return tag("span", tag("i") if interval else None, tag("b"), class_="range", style=style, aria_hidden="true")


def _cited(row: Published) -> Child:
    is_link = row.source.startswith(("https://", "http://"))
    return tag("a", row.source, href=row.source, rel="noreferrer") if is_link else row.source


def classes(run: Run) -> Section | None:
    """The per-class table and the confusion matrix."""
    if run.evaluation is None:
        return None
    rows = run.evaluation.per_class
    if len(rows) <= MOST_ROWS:
        tables = [_class_table(rows, "Precision, recall and F1 of each class.")]
    else:
        worst = sorted(rows, key=lambda row: (row.f1 is None, row.f1 or 0.0))[:MOST_ROWS]
        everything = _class_table(rows, f"All {len(rows)} classes.")
        tables = [
            _class_table(worst, f"The {MOST_ROWS} classes with the lowest F1."),
            folded(f"All {len(rows)} classes", everything),
        ]
    return section("classes", "Classes", *tables, *_confusion(run.evaluation))


def _class_table(rows: Sequence[ClassScore], caption: str) -> Html:
    columns = ["Class", "Precision", "Recall", "F1", "Images", "Predicted"]
    cells = (
        [
            row.label,
            *(_share(value) for value in (row.precision, row.recall, row.f1)),
            f"{row.support:,}",
            f"{row.predicted:,}",
        ]
        for row in rows
    )
    return table(columns, cells, caption=caption)


def _share(value: float | None) -> Html:
    return exact("accuracy", value)


def _confusion(evaluation: Evaluation) -> list[Html]:
    """As a table while it can be read; else as a picture, and what is confused most often."""
    if len(evaluation.classes) <= MOST_CONFUSED:
        return [_confusion_table(evaluation)]
    matrix = np.array(evaluation.confusion)
    alt = f"Confusion matrix of {len(matrix)} classes; the table beside it has the most frequent confusions."
    caption = "Confusion matrix: a row per true class, a column per predicted one, in the order of the class list."
    mistakes = matrix - np.diag(np.diag(matrix))
    most = np.argsort(-mistakes, axis=None, kind="stable")[:MOST_CONFUSED]
    pairs = [divmod(int(at), len(matrix)) for at in most if mistakes.flat[at]]
    names, totals = evaluation.classes, matrix.sum(axis=1)
    rows = [[names[i], names[j], f"{matrix[i, j]:,}", _share(float(matrix[i, j] / totals[i]))] for i, j in pairs]
    confused = table(
        ["True class", "Taken for", "Images", "Of the class"], rows, caption="The most frequent confusions.", words=(1,)
    )
    return [tag("div", figure(figures.confusion_picture(matrix, alt), caption), confused, class_="side")]


def _confusion_table(evaluation: Evaluation) -> Html:
    """Counts, shaded by their share of the true class."""
    head = [tag("td"), *(tag("th", name, scope="col") for name in evaluation.classes)]
    rows = []
    for name, counts in zip(evaluation.classes, evaluation.confusion, strict=True):
        shares = [count / max(sum(counts), 1) for count in counts]
        cells = (
            tag(
                "td", f"{count:,}", tag("small", f"{share:.1%}".replace("%", " %")), style=f"--share: {40 * share:.1f}%"
            )
            for count, share in zip(counts, shares, strict=True)
        )
        rows.append(tag("tr", tag("th", name, scope="row"), *cells))
    content = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows), class_="confusion")
    return titled(content, "Confusion matrix: images by true class (rows) and predicted class (columns).")


def calibration(run: Run) -> Section | None:
    """Whether its probabilities can be believed."""
    evaluation = run.evaluation
    if evaluation is None:
        return None
    sure = sum(row.images * (row.confidence or 0) for row in evaluation.calibration) / evaluation.images
    right = sum(row.images * (row.accuracy or 0) for row in evaluation.calibration) / evaluation.images
    text = (
        "Of the images for which the model is 80 % sure, 80 % should be classified correctly: then the bars end at the "
        "dashed line. A bar below it: the model is surer than it is right.",
        f"On average the model is {percent(sure)} sure and {percent(right)} right. The expected calibration error, the "
        f"mean distance of the bars from the line, is {metric('ece', evaluation.metrics.get('ece'))}.",
    )
    prose = tag("div", *(tag("p", part) for part in text), _bin_table(evaluation))
    drawn = figure(figures.reliability_diagram(evaluation))
    return section("calibration", "Calibration", tag("div", drawn, prose, class_="side"))


def _bin_table(evaluation: Evaluation) -> Html:
    rows = [
        [f"{row.low:.0%} to {row.high:.0%}", _share(row.confidence), _share(row.accuracy), f"{row.images:,}"]
        for row in evaluation.calibration
        if row.images
    ]
    found = table(["Bin", "Confidence", "Correct", "Images"], rows, caption="Images by confidence.")
    return folded("Numbers of the diagram", found)


def groups(run: Run) -> Section | None:
    """The same metrics for each group of images; whatever there is more of, groups or metrics, gets the rows."""
    if run.evaluation is None or not run.evaluation.groups:
        return None
    parts = [("All images", run.evaluation), *run.evaluation.groups.items()]
    names = in_order(run.evaluation.metrics)
    cells: list[list[Child]] = [["Group", "Images", *(METRICS.get(name, (name,))[0] for name in names)]]
    for label, part in parts:
        cells.append([label, f"{part.images:,}", *(exact(name, part.metrics.get(name)) for name in names)])
    if len(parts) < len(names):
        cells = [list(column) for column in zip(*cells, strict=True)]
    caption = f"{len(run.evaluation.groups)} groups of images, each judged by itself."
    return section("groups", "Groups", table(cells[0], cells[1:], caption=caption))


# --- where it looked ------------------------------------------------------------------------------------------------


def examples(run: Run, data: Splits | None) -> Section | None:
    """Pictures with their class activation maps."""
    if not run.predictions:
        return None
    try:
        found = find_examples(run, data)
    except UsageError as error:
        return section("examples", "Examples", tag("p", f"There are no pictures to show: {error}"))
    intro = (
        f"Left: the image as the network sees it, at {run.plan.preprocess.size} px. Right: over it, the class "
        "activation map (Zhou et al. 2016) of the predicted class. The brighter, the more evidence, "
        "compared with the rest of the same image."
    )
    kinds = (
        ("Most confident mistakes", found.wrong, "There are none: every image is classified correctly."),
        ("Least confident", found.unsure, "There are none."),
        ("Confident and correct", found.correct, "There are none."),
    )
    parts: list[Child] = [tag("p", intro)]
    for title, shown, nothing in kinds:
        cards = tag("ul", *map(_card, shown), class_="examples") if shown else tag("p", nothing)
        parts += [tag("h3", title), cards]
    if found.unreadable:
        names = listed([f"{name} ({reason})" for name, reason in found.unreadable])
        parts.append(tag("p", f"Pictures that could not be read: {names}.", class_="note"))
    return section("examples", "Examples", *parts)


def _card(example: Example) -> Html:
    """Image, evidence, and what was said about it."""
    row = example.judged
    alts = (f"{row.id}, class {row.label}", f"The same, with the evidence for {row.predicted}")
    views = zip((example.view, example.evidence), alts, strict=True)
    pair = tag("div", *(figures.picture(view, alt, px=PICTURE_PX) for view, alt in views), class_="pair")
    verdict = "correct" if row.correct else f"wrong, it is {row.label}"
    said = tag("div", tag("b", row.predicted), f" {percent(row.confidence)} · {verdict}")
    weight = "" if row.weight == 1 else f"weight {row.weight:.2g}"
    details = tag("div", " · ".join(word for word in (row.id, row.group, weight) if word))
    return tag("li", tag("figure", pair, tag("figcaption", said, details)))

"""What do the numbers of a run look like? Small drawings as inline SVG that follow the page into dark mode and print.

matplotlib draws with four stand-in colours, which then become the page's CSS variables; its text stays text (in the
page's own font), and no drawing carries an id or a style that could clash with the next one. No text from the data is
drawn: names belong into the page, where the browser has fonts for every script.

Figures are made of objects, never through pyplot, which keeps them in a global list.
"""

import base64
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from effnet.evaluate import Evaluation
from effnet.plan import Plan
from effnet.report.markup import Html, tag
from effnet.runs import History
from effnet.words import percent

INK, SOFT, LINE, ACCENT = "#000001", "#000002", "#000003", "#000004"  # stand-ins, see `svg`
VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", ACCENT: "var(--accent)"}

WIDTH_PX = 420  # a drawing's own width: on a phone it shrinks by a tenth, beside another one it grows by a tenth
FONT_PX = 12
POINTS = 240  # a curve has no more: a run of a million steps makes no larger page
NARROW = 0.09  # a phase with a smaller share of the run has no room for its label


# --- from figures to markup -----------------------------------------------------------------------------------------


def drawing(height_px: int) -> Figure:
    """An empty figure whose unit (a matplotlib point) is a CSS pixel."""
    return Figure(figsize=(WIDTH_PX / 72, height_px / 72), layout="constrained")


def svg(figure: Figure, label: str, name: str) -> Html:
    """`figure` as an inline SVG element called `label` by screen readers. `name`: unique within the page."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "effnet"}):  # text as text; the same ids always
        figure.savefig(text, format="svg", transparent=True)
    found = re.search(r'viewBox="([^"]+)"[^>]*>(.*)</svg>', text.getvalue(), re.DOTALL)
    assert found is not None, "matplotlib wrote no SVG"
    box, content = found.groups()
    content = re.sub(
        r"<style.*?</style>|<metadata.*?</metadata>|font-family: [^;\"]*;? ?", "", content, flags=re.DOTALL
    )
    content = re.sub(r'<g id="[^"]*"', "<g", content)
    content = content.replace('id="', f'id="{name}-').replace("url(#", f"url(#{name}-")
    content = content.replace('xlink:href="#', f'href="#{name}-')
    for stand_in, variable in VARIABLES.items():
        content = content.replace(stand_in, variable)
    return tag("svg", Html(re.sub(r"\s*\n\s*", " ", content)), viewBox=box, role="img", aria_label=label)


def picture(image: np.ndarray, alt: str, *, px: int | None = None, class_: str | None = None) -> Html:
    """An image inside the page: a JPEG of uint8 (H, W, 3), at most `px` a side; a PNG of uint8 (H, W, 4)."""
    made, data = Image.fromarray(image), io.BytesIO()
    if px is not None:
        made.thumbnail((px, px))
    kind = "jpeg" if image.shape[2] == 3 else "png"
    made.save(data, format=kind, **({"quality": 82, "optimize": True} if kind == "jpeg" else {}))
    uri = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    return tag("img", src=uri, alt=alt, width=made.width, height=made.height, class_=class_)


def style(axes: Axes) -> None:
    """Thin and quiet: no frame, faint lines for reading values, ink for the data alone."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=LINE, linewidth=1)
    axes.tick_params(colors=SOFT, length=0, labelsize=FONT_PX, pad=4)
    axes.xaxis.label.set(color=SOFT, fontsize=FONT_PX)
    axes.yaxis.label.set(color=SOFT, fontsize=FONT_PX)
    axes.yaxis.get_offset_text().set(color=SOFT, fontsize=FONT_PX)
    axes.grid(axis="y", color=LINE, linewidth=0.75)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def in_percent(share: float, _: object = None) -> str:
    """A share of 1 as a tick label: no more digits than it has.

    >>> in_percent(0.9), in_percent(0.025)
    ('90 %', '2.5 %')
    """
    return f"{100 * share:g} %"


# --- learning curves ------------------------------------------------------------------------------------------------


def loss_curve(history: History, todo: Plan) -> Html:
    """Training loss by step (faint) and epoch, and the NLL of the validation images after each epoch."""
    figure, axes = _over_epochs(history, todo)
    axes.plot(*_thinned(_progress(history, todo), history.steps["loss"]), color=SOFT, alpha=0.4, linewidth=1)
    ends = [epoch["epoch"] + 1 for epoch in history.epochs]
    label = f"Training loss over {len(history.steps['step'])} steps."
    if ends:
        training = [epoch["train_loss"] for epoch in history.epochs]
        axes.plot(ends, training, color=INK, linewidth=1.5, marker=_marker(ends), markersize=3.5, clip_on=False)
        names, label = {"training": (training[-1], INK)}, f"Training: from {training[0]:.3f} to {training[-1]:.3f}."
        if history.judged:
            validation = [epoch["val"]["nll"] for epoch in history.epochs]
            axes.plot(ends, validation, color=ACCENT, linewidth=2, marker=_marker(ends), markersize=3.5, clip_on=False)
            names["validation"] = (validation[-1], ACCENT)
            label += f" Validation NLL: from {validation[0]:.3f} to {validation[-1]:.3f}."
        _name_ends(axes, names)
        label = f"Loss by epoch. {label}"
    return svg(figure, label, "loss")


def accuracy_curve(history: History, todo: Plan, metric: str) -> Html:
    """`metric`, a share, of the validation images after each epoch; the epoch that was kept is marked."""
    figure, axes = _over_epochs(history, todo)
    axes.yaxis.set_major_formatter(in_percent)
    ends = [epoch["epoch"] + 1 for epoch in history.epochs]
    values = [epoch["val"][metric] for epoch in history.epochs]
    axes.plot(ends, values, color=ACCENT, linewidth=2, marker=_marker(ends), markersize=3.5, clip_on=False)
    label = f"Validation accuracy by epoch: from {percent(values[0])} to {percent(values[-1])}"
    if history.best is not None:
        at, value = history.best["epoch"] + 1, history.best["val"][metric]
        axes.plot([at], [value], color=ACCENT, marker="o", markersize=8, clip_on=False)
        place: dict[str, Any] = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
        axes.annotate(percent(value), (at, value), color=ACCENT, fontsize=FONT_PX, fontweight="bold", **place)
        axes.margins(y=0.16)
        label += f", at best {percent(value)} in epoch {at}"
    return svg(figure, label, "accuracy")


def rate_curve(history: History, todo: Plan) -> Html:
    """The learning rate of every step."""
    figure, axes = _over_epochs(history, todo)
    rates = history.steps["lr"]
    axes.plot(*_thinned(_progress(history, todo), rates), color=INK, linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")  # no power of ten to be read in a corner
    label = (
        f"Learning rate by epoch: at most {rates.max():.2g}, {rates[-1]:.2g} at the end." if len(rates) else "No steps."
    )
    return svg(figure, label, "rate")


def waiting_bars(history: History, todo: Plan) -> Html:
    """The share of each epoch's step time in which the model waited for images."""
    figure, axes = _over_epochs(history, todo)
    epochs = np.unique(history.steps["epoch"])
    shares = np.array([history.wait_share(int(epoch)) for epoch in epochs])
    axes.bar(epochs + 0.5, shares, width=0.72, color=SOFT)
    axes.set_ylim(0, max(0.1, 1.15 * shares.max(initial=0)))
    axes.yaxis.set_major_formatter(in_percent)
    label = f"Share of step time spent waiting for images: {history.wait_share():.1%} over the whole run."
    return svg(figure, label, "waiting")


def _over_epochs(history: History, todo: Plan) -> tuple[Figure, Axes]:
    """Axes whose x is epochs since the start, with the phases marked: their borders, and image sizes where they fit."""
    figure = drawing(height_px=230)
    axes = figure.add_subplot()
    style(axes)
    phases = [row.phase for row in todo.rows]
    total = sum(phase.epochs for phase in phases)
    shown = min(total, max(1.0, _progress(history, todo).max(initial=0)))  # a run that ended early fills its drawing
    axes.set_xlim(0, shown)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("epochs")
    borders = [0, *itertools.accumulate(phase.epochs for phase in phases)]
    for phase, first, last in zip(phases, borders, borders[1:], strict=False):
        if first >= shown or len(phases) == 1:
            continue
        if first:
            axes.axvline(first, color=LINE, linewidth=1, linestyle=(0, (2, 2)))
        if min(last, shown) - first >= NARROW * shown:
            text = "head" if phase.head_only else f"{phase.size_px} px"
            axes.annotate(
                text,
                (first, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4 if first else 0, 4),
                textcoords="offset points",
                color=SOFT,
                fontsize=FONT_PX - 1.5,
            )
    return figure, axes


def _progress(history: History, todo: Plan) -> np.ndarray:
    """Epochs that were done after each step, (S,)."""
    return history.steps["step"] * sum(row.phase.epochs for row in todo.rows) / sum(row.steps for row in todo.rows)


def _thinned(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` means over equal stretches of a curve."""
    stretches = [part for part in np.array_split(np.arange(len(x)), points) if len(part)]
    return np.array([x[part].mean() for part in stretches]), np.array([y[part].mean() for part in stretches])


def _marker(points: Sequence[float]) -> Literal["o", ""]:
    """A dot for points that are few enough to be seen apart."""
    return "o" if len(points) <= 30 else ""


def _name_ends(axes: Axes, lines: dict[str, tuple[float, str]], apart: float = 0.09) -> None:
    """The lines' names at their right ends, (value, colour) each, `apart` (of the height) from each other or more."""
    low, high = axes.get_ylim()
    places = {name: (value - low) / (high - low) for name, (value, _) in lines.items()}
    below = -np.inf
    for name in sorted(places, key=lambda name: places[name]):
        below = max(places[name], below + apart)
        axes.text(1.02, below, name, transform=axes.transAxes, color=lines[name][1], fontsize=FONT_PX, va="center")


# --- calibration and confusion --------------------------------------------------------------------------------------


def reliability_diagram(evaluation: Evaluation) -> Html:
    """How often the model is right where it says that it is so sure; below, how many images each bar stands for."""
    figure = drawing(height_px=330)
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    bins = [row for row in evaluation.calibration if row.images]
    middle, width = [(row.low + row.high) / 2 for row in bins], [0.88 * (row.high - row.low) for row in bins]
    for part in (axes, counts):
        style(part)
        part.set_xlim(0, 1)
        part.xaxis.set_major_formatter(in_percent)
        part.yaxis.set_major_formatter(in_percent)
    axes.bar(middle, [row.accuracy or 0.0 for row in bins], width=width, color=ACCENT, alpha=0.75)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 1)
    axes.set_ylabel("correct")
    counts.bar(middle, [row.images / evaluation.images for row in bins], width=width, color=SOFT)
    counts.yaxis.set_major_locator(MaxNLocator(nbins=2, prune="lower"))
    counts.set_ylabel("images")
    counts.set_xlabel("confidence in the predicted class")
    label = "Reliability diagram. " + " ".join(
        f"Confidence {row.low:.0%} to {row.high:.0%}: {row.accuracy:.0%} of {row.images} correct." for row in bins
    )
    return svg(figure, label, "reliability")


def confusion_picture(confusion: np.ndarray, alt: str, colour: tuple[int, int, int] = (45, 135, 205)) -> Html:
    """A pixel per cell of a large confusion matrix (K, K): the stronger, the larger the share of the true class."""
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    opacity = np.where(confusion > 0, 40 + 215 * np.sqrt(shares), 0)  # the root shows rare confusions, too
    cells = np.concatenate([np.broadcast_to(colour, (*shares.shape, 3)), opacity[..., None]], axis=2)
    return picture(cells.astype(np.uint8), alt, class_="matrix")


def spread(values: Iterable[float]) -> tuple[float, float]:
    """A scale on which all of `values` can be shown, with a margin; never without width.

    >>> spread([0.2, 0.8])
    (0.1, 0.9)
    """
    low, high = min(values := list(values)), max(values)
    margin = (high - low) / 6 or 0.5
    return round(low - margin, 6), round(high + margin, 6)

"""What do comparisons of networks look like? Figures from tables, readable in print and on a dark screen.

The background is transparent and every colour a middle tone, so that a figure stands on white paper and on a dark page.
Points carry their names; there is no legend to look up. Figures are objects, never made through pyplot.

Source of the first figure: Figures 1 and 5 of Tan & Le 2019 (accuracy against parameters and multiply-adds).
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from effnet.published import AXES, OTHERS, Point, front
from effnet.value import UsageError
from effnet.words import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK = "#7d7d7d"  # contrast of about 4 to both white and black
COLOURS = {
    "EfficientNet": "#d1495b",
    "EfficientNetV2": "#2f7fd1",
    "EfficientNet Lite": "#2a9d6f",
    "ResNet": "#9467bd",
    "MobileNet": "#b8860b",
    OTHERS: INK,
}
SUFFIXES = (".png", ".svg", ".pdf")
SMALL = 8

# where a label may stand, in order: offset in points, and which of its corners or sides is there
PLACES = (
    (6, 0, "left", "center"), (-6, 0, "right", "center"), (0, 6, "center", "bottom"), (0, -6, "center", "top"),
    (5, 5, "left", "bottom"), (5, -5, "left", "top"), (-5, 5, "right", "bottom"), (-5, -5, "right", "top"),
    (0, 14, "center", "bottom"), (0, -14, "center", "top"), (14, -10, "left", "top"), (-14, 10, "right", "bottom"),
)  # fmt: skip


def pareto(found: Sequence[Point], axis: str, path: Path, *, note: str = "") -> list[Point]:
    """Draws accuracy against cost on a logarithmic axis into `path` (.png, .svg, .pdf); returns the Pareto front.

    Full points: cost computed by us; hollow ones: cost as printed in their source. The front is the broad band.
    """
    check_file(path)
    if not found:
        raise UsageError("there are no points to draw.")
    best = front(found)
    figure = _figure()
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_xlabel(AXES[axis], color=INK)
    axes.set_ylabel("ImageNet top-1 in %, as published", color=INK)
    axes.set_title(_title(axis, note), color=INK, fontsize=SMALL, loc="left")
    axes.plot(
        [point.x for point in best], [point.top1 for point in best],
        color=INK, alpha=0.3, linewidth=9, solid_capstyle="round", solid_joinstyle="round", zorder=1,
    )  # fmt: skip
    for family in dict.fromkeys(point.family for point in found):
        _family(axes, family, [point for point in found if point.family == family])
    axes.margins(x=0.12, y=0.08)
    _numbers(axes.xaxis)
    _quiet(axes)
    _label(figure, axes, found)
    _save(figure, path)
    return best


def agreement(
    names: Sequence[str], predicted: Sequence[float], measured: Sequence[float], path: Path, title: str
) -> None:
    """Draws predicted against measured milliseconds of networks, the diagonal and a band of 10 %, into `path`.

    A colour per family, named in the empty corner: the first of `COLOURS` by small letters that a name begins with.
    """
    figure = _figure()
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", aspect="equal")
    axes.set_xlabel("measured ms", color=INK)
    axes.set_ylabel("predicted ms", color=INK)
    axes.set_title(title, color=INK, fontsize=SMALL, loc="left")
    ends = [0.8 * min(*predicted, *measured), 1.25 * max(*predicted, *measured)]
    axes.plot(ends, ends, color=INK, linewidth=1)
    axes.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color=INK, alpha=0.2, linewidth=0)
    prefixes = {family.lower().replace(" ", "_"): colour for family, colour in COLOURS.items() if family != OTHERS}
    families = [
        next((prefix for prefix in sorted(prefixes, key=len, reverse=True) if name.startswith(prefix)), OTHERS)
        for name in names
    ]
    for row, family in enumerate(sorted(set(families))):
        mine, colour = [i for i, name in enumerate(families) if name == family], prefixes.get(family, INK)
        axes.scatter([measured[i] for i in mine], [predicted[i] for i in mine], s=26, color=colour, zorder=3)
        axes.text(0.03, 0.96 - 0.045 * row, family, color=colour, fontweight="bold", va="top", transform=axes.transAxes)
    axes.set(xlim=ends, ylim=ends)
    _numbers(axes.xaxis)
    _numbers(axes.yaxis)
    _quiet(axes)
    _save(figure, path)


def _title(axis: str, note: str) -> str:
    hollow = "" if axis in ("activations", "latency_ms") else "; hollow: cost as printed in the source"
    return f"Accuracy against {AXES[axis]}. Band: Pareto front{hollow}" + (f"\n{note}" if note else "")


def _figure() -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(8.5, 6), layout="constrained")


def _family(axes: "Axes", family: str, members: Sequence[Point]) -> None:
    colour = COLOURS.get(family, INK)
    members = sorted(members, key=lambda point: point.x)
    x, y = [point.x for point in members], [point.top1 for point in members]
    if family != OTHERS and len(members) > 1:
        axes.plot(x, y, color=colour, linewidth=1.4, zorder=2)
    filled = [colour if point.computed else "none" for point in members]
    axes.scatter(x, y, s=26, facecolors=filled, edgecolors=colour, linewidths=1.2, zorder=3)


def _numbers(axis: "Axis") -> None:
    """Few ticks in readable numbers on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def _quiet(axes: "Axes") -> None:
    """Faint lines to read values by, no frame."""
    axes.tick_params(colors=INK, which="both", length=0)
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, transparent=True)


def check_file(path: Path) -> None:
    """`UsageError` for a figure file of another kind than we write."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path} ends in none of {', '.join(SUFFIXES)}.")


def _label(figure: "Figure", axes: "Axes", found: Sequence[Point]) -> None:
    """A name at every point, where it covers neither a point nor another name; the last of a family says the family.

    Greedy: the places around a point are tried in order, and the one that covers least is taken. Boxes are
    (left, bottom, right, top) in pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # fixes the layout, so that pixels mean something
    places = axes.transData.transform([(point.x, point.top1) for point in found])
    lines = [axes.transData.transform(line.get_xydata()) for line in axes.lines[1:]]
    taken = np.concatenate([_around(places, 5), *(_around(_along(line), 1.5) for line in lines)])
    frame = np.array([axes.get_window_extent(renderer).extents])
    last = {point.family: point for point in sorted(found, key=lambda point: point.x) if point.family != OTHERS}
    for point in sorted(found, key=lambda point: (last.get(point.family) is not point, point.family == OTHERS)):
        is_last = last.get(point.family) is point
        text = axes.annotate(
            point.name if is_last else point.label, (point.x, point.top1), (0, 0), textcoords="offset points",
            color=COLOURS.get(point.family, INK), fontsize=SMALL, fontweight="bold" if is_last else "normal", zorder=4,
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        x, y = axes.transData.transform((point.x, point.top1))
        boxes = {place: _box(x, y, place, extent.width, extent.height, figure.dpi / 72) for place in PLACES}
        outside = {place: extent.width * extent.height - overlap(box, frame) for place, box in boxes.items()}
        place = min(boxes, key=lambda place: overlap(boxes[place], taken) + 4 * outside[place])
        dx, dy, horizontal, vertical = place
        text.set(position=(dx, dy), horizontalalignment=horizontal, verticalalignment=vertical)
        taken = np.vstack([taken, boxes[place]])


def _box(x: float, y: float, place: tuple[int, int, str, str], width: float, height: float, scale: float) -> np.ndarray:
    """The box of a text of that size at that place about (x, y)."""
    dx, dy, horizontal, vertical = place
    left = x + scale * dx - width * {"left": 0, "center": 0.5, "right": 1}[horizontal]
    bottom = y + scale * dy - height * {"bottom": 0, "center": 0.5, "top": 1}[vertical]
    return np.array([left, bottom, left + width, bottom + height])


def _around(places: np.ndarray, reach: float) -> np.ndarray:
    return np.concatenate([places - reach, places + reach], axis=1)


def _along(corners: np.ndarray, steps: int = 40) -> np.ndarray:
    """Places on a line through `corners`, (n, 2)."""
    return np.concatenate([np.linspace(a, b, steps) for a, b in itertools.pairwise(corners)])


def overlap(box: np.ndarray, others: np.ndarray) -> float:
    """The area that `box` shares with the boxes `others` (n, 4), summed.

    >>> overlap(np.array([0, 0, 2, 2]), np.array([[1, 1, 5, 5], [-1, 0, 1, 1], [7, 7, 8, 8]]))
    2.0
    """
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(np.maximum(sides, 0).prod(axis=1).sum())

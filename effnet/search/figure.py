"""What does a search look like? Every trial as a point, the front as a band, the winner ringed."""

from pathlib import Path

from effnet.plots import COLOURS, INK, check_file
from effnet.search.objectives import QUANTITIES, Objective
from effnet.search.study import Found

ACCENT, FRONT = COLOURS["EfficientNet"], COLOURS["EfficientNetV2"]


def figure(found: Found, path: Path) -> None:
    """Draws the first axis of the front against the second into `path` (.png, .svg, .pdf).

    Full points reached the last rung, hollow ones were stopped before. A vertical line: a limit on that axis.
    """
    from matplotlib.figure import Figure

    check_file(path)
    made = Figure(figsize=(7.5, 5), layout="constrained")
    axes, (y, x) = made.subplots(), found.axes[:2]
    for state, filled in (("stopped", False), ("finished", True)):
        rows = [trial for trial in found.trials if trial.state == state]
        places = [[axis(trial.values) for trial in rows] for axis in (x, y)]
        axes.scatter(*places, s=18, facecolors=INK if filled else "none", edgecolors=INK, linewidths=0.8, zorder=2)
    front = sorted((x(t.values), y(t.values)) for t in map(found.trial, found.front))
    if front:
        axes.plot(*zip(*front, strict=True), color=FRONT, alpha=0.35, linewidth=7, solid_capstyle="round", zorder=1)
        axes.scatter(*zip(*front, strict=True), s=26, color=FRONT, zorder=3)
    if found.winner is not None:
        best = found.best.values
        axes.scatter(x(best), y(best), s=130, facecolors="none", edgecolors=ACCENT, linewidths=2, zorder=4)
    if x.expression in found.task.limits:
        axes.axvline(found.task.limits[x.expression], color=ACCENT, linewidth=1, linestyle="--")
    axes.set_xlabel(_words(x), color=INK)
    axes.set_ylabel(_words(y), color=INK)
    words = " and ".join(objective.text for objective in found.task.objectives)
    title = f"{found.task.space.name} around {found.task.space.base.name}: {len(found.trials)} trials, {words}"
    axes.set_title(
        f"{title}\nRing: the winner. Band: the front. Hollow: stopped early", fontsize=8, color=INK, loc="left"
    )
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=160, transparent=True)


def _words(axis: Objective) -> str:
    return QUANTITIES.get(axis.expression, axis.expression)

"""What does the grid of coefficients look like? Alpha across, beta up, the accuracy of a short training as colour."""

from pathlib import Path

from effnet.coefficients import Found
from effnet.plots import COLOURS, INK, check_file

ACCENT = COLOURS["EfficientNet"]


def heat_map(found: Found, path: Path) -> None:
    """Draws the search into `path` (.png, .svg, .pdf), readable on white and on dark.

    Colour: the mean on the first rung, where all candidates had the same budget. Numbers: finalists, with the mean they
    reached in the end. A frame: the winner, dashed for a tie. Crosses: points whose realised cost is off the target.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    check_file(path)
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    alphas, betas = (sorted({getattr(cell.coefficients, name) for cell in found.cells}) for name in ("alpha", "beta"))
    places = {
        cell: (alphas.index(cell.coefficients.alpha), betas.index(cell.coefficients.beta)) for cell in found.cells
    }
    standings = {standing.candidate.key: standing for standing in found.standings}
    values = [[float("nan")] * len(alphas) for _ in betas]
    for cell, (x, y) in places.items():
        if cell.key is None:
            axes.plot(x, y, "x", color=INK, markersize=5)
            continue
        standing = standings[cell.key]
        values[y][x] = standing.first
        if standing.rung == len(found.rungs) - 1:
            box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.15}
            axes.text(x, y, f"{100 * standing.mean:.1f}", ha="center", va="center", fontsize=7, color="black", bbox=box)
        if standing is found.winner or standing.tie:
            line = "-" if standing is found.winner else "--"
            frame = Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, color=ACCENT, linewidth=2, linestyle=line)
            axes.add_patch(frame)
    image = axes.imshow(values, origin="lower", cmap="viridis", aspect="auto")
    bar = figure.colorbar(image, ax=axes)
    first = found.rungs[0]
    bar.set_label(f"accuracy at budget {first.budget}, {first.seeds} seed{'s' * (first.seeds > 1)}", color=INK)
    bar.ax.tick_params(colors=INK)
    axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas], fontsize=8)
    axes.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas], fontsize=8)
    axes.tick_params(colors=INK, length=0)
    axes.set_xlabel("alpha (depth)", color=INK)
    axes.set_ylabel("beta (width); gamma (resolution) brings each to the target", color=INK)
    title = f"{found.network} x{found.target:g} multiply-adds. Framed: winner, dashed: tie; crosses: off the target"
    axes.set_title(title, fontsize=9, color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, transparent=True)

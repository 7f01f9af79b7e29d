"""What does `effnet scale` do? A point on the compound ray, the largest network for a budget, or the coefficients.

One of these ways at a time; the answer is one document: before, after, the distance from every limit, what binds.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effnet import arguments, display
from effnet.arguments import AsJson, Settings, Workers
from effnet.cost import METRICS, stage_rows
from effnet.files import reason
from effnet.fitting import ALONG, fit
from effnet.scaling import Coefficients, baseline
from effnet.scaling import scale as scaled
from effnet.spec import Network
from effnet.value import UsageError

if TYPE_CHECKING:
    from effnet.factory import Factory


def scale(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{arguments.MODEL} Or module.py:function.")],
    phi: Annotated[float | None, typer.Option(help="Along the compound ray; below 0 scales down.")] = None,
    depth: Annotated[float | None, typer.Option(help="A factor on the layers of every stage.")] = None,
    width: Annotated[float | None, typer.Option(help="A factor on all channels.")] = None,
    resolution: Annotated[int | None, typer.Option(help="The input size in px.")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=LIMIT", help=f"A hard limit, as macs=1.5G: {', '.join(METRICS)}, latency_ms."),
    ] = None,
    along: Annotated[str, typer.Option(help=f"To a budget: {', '.join(ALONG)}.")] = "compound",
    coefficients: Annotated[
        str,
        typer.Option(metavar="A,B,C|FILE", help="alpha, beta, gamma; or what --search-coefficients --json printed."),
    ] = "1.2,1.1,1.15",
    size: Annotated[int | None, typer.Option(min=1, help="The baseline's input size, if not its own.")] = None,
    deepen: Annotated[
        str | None, typer.Option(metavar="P,P,...", help="By stage, the power of the depth factor: 0,1,1,1.5.")
    ] = None,
    resolution_step: Annotated[int, typer.Option(min=1, help="Sizes are multiples of it.")] = 1,
    max_resolution: Annotated[int | None, typer.Option(min=1, help="No size is above it.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per step, for training_bytes.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of the latency table, for latency_ms.")] = 1,
    precision: Annotated[str, typer.Option(help="Of the latency table: float32 or bfloat16.")] = "float32",
    save: Annotated[Path | None, typer.Option(metavar="NET.json", help="Keep the network: a MODEL elsewhere.")] = None,
    search_coefficients: Annotated[
        bool, typer.Option("--search-coefficients", help="Find A,B,C by short trainings on --data.")
    ] = False,
    data: Annotated[str | None, typer.Option(metavar="DATA", help=f"For the search. {arguments.DATA}")] = None,
    target: Annotated[float, typer.Option(help="Searched at so many times the baseline's MACs.")] = 2.0,
    tolerance: Annotated[float, typer.Option(help="Of the realised MACs to that, as a share.")] = 0.05,
    epochs: Annotated[int, typer.Option(min=1, help="For each finalist of the search.")] = 9,
    seeds: Annotated[int, typer.Option(min=2, help="For each finalist of the search.")] = 3,
    images: Annotated[int | None, typer.Option(min=1, help="Train the search on so many images only.")] = None,
    study: Annotated[
        Path | None, typer.Option(help="Where the search is kept and goes on. Default: runs/scale-MODEL-DATA.jsonl.")
    ] = None,
    settings: Settings = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Compound scaling: MODEL made larger or smaller by phi, by factors, or to the largest that a budget allows.

    Limits hold for the realised network, after rounding. With --search-coefficients: alpha, beta and gamma for MODEL,
    by successive halving of short trainings, resumable.
    """
    arguments.network_file(save)
    limits = arguments.budgets(budget or ())
    point = {"depth": depth, "width": width, "resolution": resolution}
    ways = {
        "--phi": phi is not None,
        "factors (--depth, --width, --resolution)": any(v is not None for v in point.values()),
    }
    ways |= {"--budget": bool(limits), "--search-coefficients": search_coefficients}
    given = [name for name, there in ways.items() if there]
    if len(given) != 1:
        raise UsageError(f"say one way to scale, of {', '.join(ways)}; given: {' and '.join(given) or 'none'}.")
    by = _coefficients(coefficients)
    base = arguments.to_scale(model, size, deepen, training_memory="training_bytes" in limits)
    grid = {"resolution_step": resolution_step, "max_resolution": max_resolution}
    if search_coefficients:
        if data is None:
            raise UsageError("--search-coefficients trains networks: name what on with --data DATA.")
        options = grid | {"target": target, "tolerance": tolerance, "budget": epochs, "seeds": seeds}
        kept = study or Path("runs") / f"scale-{arguments.slug(model)}-{arguments.slug(data)}.jsonl"
        _search_coefficients(base, data, images, settings, workers, kept, options, as_json)
        return
    meters, error = arguments.meters(limits, threads, precision)
    document = _scaled(base, phi, point, limits, along, by, grid | {"batch": batch, "meters": meters})
    document |= {"model": model, "saved": str(save) if save else None}
    document |= {"latency_error": error.to_dict() | {"words": str(error)} if error else None}
    if save:
        if document["definition"] is None:
            raise UsageError(f"--save keeps a Network; {model} is a factory: build it with the factors printed here.")
        arguments.keep_network(save, document["definition"])
    display.answer(document, as_json, lambda: display.show_scaled(display.console(), document))


def _coefficients(text: str) -> Coefficients:
    """The coefficients that were typed, or those of the winner in a file that the search for them left."""
    if not text.endswith(".json"):
        return Coefficients(*arguments.numbers("--coefficients", text, 3, "alpha, beta and gamma"))
    try:
        found = json.loads(Path(text).read_text())["winner"]["candidate"]["coefficients"]
    except OSError as error:
        raise UsageError(f"--coefficients {text}: {reason(error)}.") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"--coefficients {text} is not what `effnet scale MODEL --search-coefficients --data DATA --json` prints."
        ) from None
    return Coefficients.from_dict(found)


def _scaled(
    base: "Network | Factory",
    phi: float | None,
    point: dict[str, Any],
    limits: dict[str, float],
    along: str,
    coefficients: Coefficients,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The document of `scale`: before, after, and how far from every limit."""
    where, batch = baseline(base), options["batch"]
    document: dict[str, Any] = {"phi": phi, "along": None, "limits": [], "held": []}
    if limits:
        found = fit(base, limits, along, coefficients, **options)
        made, place = found.network, (found.depth, found.width, found.resolution)
        uses = [use.to_dict() | {"left_percent": use.left_percent} for use in found.uses]
        document |= {"phi": found.phi, "along": along, "limits": uses, "held": list(found.held)}
    else:
        grid = {name: options[name] for name in ("resolution_step", "max_resolution")}
        made = scaled(base, phi, coefficients, **point, **grid)
        factors = coefficients.factors(phi)[:2] if phi is not None else (point["depth"] or 1.0, point["width"] or 1.0)
        place = (*factors, made.resolution)
    costs = [where.costs(*at, batch) for at in ((1.0, 1.0, where.resolution), place)]
    before, after = ({name: value.item() for name, value in one.items()} for one in costs)
    both = isinstance(base, Network)
    return document | {
        "name": made.name,
        "coefficients": coefficients.to_dict() if phi is not None or limits else None,
        "depth": place[0],
        "width": place[1],
        "resolution": place[2],
        "before": before | {"resolution": where.resolution, "stages": stage_rows(base) if both else []},
        "after": after | {"resolution": place[2], "stages": stage_rows(made) if both else []},
        "definition": made.to_dict() if both else None,
    }


def _search_coefficients(
    base: "Network | Factory",
    data: str,
    images: int | None,
    settings: Sequence[str] | None,
    workers: int | None,
    study: Path,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    from effnet.coefficients import search_coefficients
    from effnet.heat_map import heat_map

    if not isinstance(base, Network):
        raise UsageError("this searches a Network; train modules of your own with coefficients.search_coefficients.")
    network, evaluate, about = arguments.proxy(base, data, images, settings, workers)
    people = display.console(stderr=True)
    try:
        found = search_coefficients(
            network, evaluate, study=study, about=about, progress=display.evaluations(people), **options
        )
    except KeyboardInterrupt:
        sys.stderr.write(f"effnet: stopped; the same command goes on from {study}.\n")
        raise typer.Exit(130) from None
    figure = study.with_suffix(".png")
    heat_map(found, figure)
    document = found.to_dict() | {"study": str(study), "figure": str(figure)}
    document |= {"winner": found.winner.to_dict(), "ties": [tie.to_dict() for tie in found.ties]}
    display.answer(document, as_json, lambda: display.show_coefficients(display.console(), found, study, figure))

"""What does `effnet bench` do? Times models against each other, the paper's pairs, or operators for tables."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from effnet import arguments, display, published
from effnet.arguments import AsJson
from effnet.display import answer
from effnet.value import UsageError

BACKEND = "eager, compiled, onnxruntime, openvino or aoti; may be given several times. Default: eager."


# what --table and --table4 say themselves, beside --backend, --precision and --json
OF_MODELS = ("batch", "size", "fold", "rounds", "start")


def bench(
    context: typer.Context,
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL...", help=arguments.MODEL)] = None,
    backend: Annotated[list[str] | None, typer.Option(metavar="B", help=BACKEND)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    size: Annotated[int | None, typer.Option(min=1, help="Input size in px. Default: each network's own.")] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or (openvino) int8.")] = "float32",
    fold: Annotated[bool, typer.Option("--fold", help="Fold batch norms into the convolutions first.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Each visits every model twice, in order and in reverse.")] = 10,
    start: Annotated[
        bool, typer.Option("--start", help="Time to the first answer of a fresh process, and its peak memory, too.")
    ] = False,
    table4: Annotated[
        bool, typer.Option("--table4", help="The EfficientNet paper's Table 4: its pairs, batch 1, one core, 20 runs.")
    ] = False,
    table: Annotated[bool, typer.Option("--table", help="Measure and keep this machine's latency table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Latency and throughput of models on this CPU, interleaved; every further one is compared with the first.

    The weights are random: values do not change the time. With --table, the operators that networks are made of are
    measured instead, once (2 to 4 minutes), so that the latency of any network can be predicted.
    """
    if [bool(models), table, table4].count(True) != 1:
        raise UsageError(
            "name models (MODEL...), or measure the table of this machine (--table), or the paper's pairs (--table4): "
            "one of them."
        )
    fixed = (*OF_MODELS, "threads") if table4 else OF_MODELS
    given = [f"--{name}" for name in fixed if _said(context, name)]
    if given and not models:
        protocol = "--table4 (batch 1, one core, 20 runs, each network at its own size)" if table4 else "--table"
        raise UsageError(f"{protocol} says that itself: leave out {', '.join(given)}, or name models.")
    if table:
        _bench_table(precision, threads, backend or [], as_json)
        return
    if table4:
        _table4(backend or ["eager"], precision, as_json)
        return
    from effnet import bench as core

    networks = [arguments.network(model) for model in models or ()]
    with display.counting(display.console(stderr=as_json), "rounds") as progress:
        found = core.bench(
            networks, backends=backend or ["eager"], batch=batch, threads=threads, size=size, precision=precision,
            fold=fold, rounds=rounds, start=start, progress=progress,
        )  # fmt: skip
    answer(_document(found), as_json, lambda: display.show_bench(display.console(), found, batch))


def _said(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _document(found: Any) -> dict[str, Any]:
    return found.to_dict() | {"busy": found.busy, "verdicts": [str(one) for one in found.comparisons]}


def _table4(backends: Sequence[str], precision: str, as_json: bool) -> None:
    """Each backend's pairs, so that ratios are of networks and never of backends."""
    from effnet import bench as core
    from effnet.families import get

    parts = {}
    for backend in backends:
        for pair in published.TABLE_4:
            networks = [get(name) for name in (pair.network, *pair.against)]
            with display.counting(display.console(stderr=as_json), f"{pair.network}, {backend}") as progress:
                parts[backend, pair] = core.bench(
                    networks, backends=[backend], precision=precision, rounds=10, calls=1, progress=progress
                )  # 10 rounds of two visits: the paper's 20 runs
    document = {
        "source": published.V1_TABLE_4,
        "pairs": [
            {"backend": backend, "published": pair.to_dict(), **_document(found)}
            for (backend, pair), found in parts.items()
        ],
    }
    answer(document, as_json, lambda: display.show_table4(display.console(), parts))


def _bench_table(precision: str, threads: int, backends: Sequence[str], as_json: bool) -> None:
    from effnet.bench import save_table
    from effnet.operators import build_table

    if set(backends) - {"eager"}:
        raise UsageError(f"latency tables are of the backend eager, not of {', '.join(backends)}.")
    with display.counting(display.console(stderr=as_json), "measuring operators") as progress:
        made = build_table(precision=precision, threads=threads, progress=progress)
    path = save_table(made)
    assert made.error is not None
    document = {"file": str(path), "table": str(made), "error": made.error.to_dict(), "factors": made.factors}
    answer(document, as_json, lambda: display.show_table_made(display.console(), made, path))

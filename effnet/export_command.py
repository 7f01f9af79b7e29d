"""What does `effnet export` do? Writes a model as a file for another runtime, if the gate lets it pass.

The images of the gate: the validation part of --data, by default of the data that the run was trained on; for a model
without a run, photographs. Ranges of int8 come from the training part. Both are thinned out evenly where they are many.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from effnet import arguments, display
from effnet.arguments import AsJson, ModelName
from effnet.value import UsageError, check_choice

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from rich.console import Console

    from effnet.deploy import Artefact, Choice
    from effnet.export.gate import Samples
    from effnet.network import Model
    from effnet.samples import Source

MOST_IMAGES, MOST_CALIBRATION = 1000, 300
FOLDER = "export"


def export(
    model: ModelName,
    to: Annotated[str | None, typer.Option(help="onnx, openvino, torch (torch.export) or aoti (AOTInductor).")] = None,
    precision: Annotated[
        str, typer.Option(help="float32; bfloat16 for openvino, torch, aoti; int8 for openvino.")
    ] = "float32",
    data: Annotated[str | None, typer.Option(metavar="DATA", help=f"Real images to judge by. {arguments.DATA}")] = None,
    max_drop: Annotated[
        float, typer.Option(min=0, max=100, help="Points of accuracy that bfloat16 and int8 may cost.")
    ] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Folder. Default: RUN/export, else export.")] = None,
    maps: Annotated[
        bool, typer.Option("--maps", help="Class activation maps too, for explain and serve (onnx, openvino).")
    ] = False,
    fastest: Annotated[
        bool, typer.Option("--fastest", help="Try what this machine can run, keep the quickest that passes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """MODEL as a file for another runtime, with preprocessing, softmax and labels inside.

    The file is opened in its runtime and must answer as the model does on real images, or it is not kept. With
    --fastest, predict and serve use what was kept when they are given the run folder.
    """
    from effnet import deploy
    from effnet.export import target
    from effnet.zoo import built, find

    if fastest == bool(to):
        raise UsageError("say what to export to (--to TARGET), or have the quickest found (--fastest): one of them.")
    if to:
        check_choice(f"precision of {to}", precision, target(to).precisions)
    run = arguments.origin(model)
    if fastest and run and out:
        raise UsageError(f"the quickest export of a run stays in the run: leave out --out {out}.")
    found = find(model)
    if not found.tensors:
        raise UsageError(f"{model} is a network without trained weights: there is nothing to export.")
    loaded = built(found).eval()
    folder = out or (run.folder / FOLDER if run else Path(FOLDER))
    say = _saying()
    say("reading real images to judge by")
    samples, calibration = _images(loaded, run, data)
    options: dict[str, Any] = {"max_drop": max_drop, "temperature": float(found.extra.get("temperature", 1.0))}
    options["maps"] = maps
    options |= {"calibration": calibration, "say": say}
    if to:
        made = deploy.export(loaded, to, samples, folder, precision=precision, **options)
        document = {"artefact": str(made.path), "log": str(made.log), "passed": True} | made.verdict.to_dict()
        display.answer(document, as_json, lambda: _show_export(display.console(), made))
        return
    checkpoint = _checkpoint(model, run)
    choice = deploy.fastest(loaded, samples, folder, checkpoint=checkpoint, **options)
    document = {"artefact": str(choice.artefact.path) if choice.artefact else None, "refused": choice.refused}
    document["passed"] = {one.path.name: {"bytes": one.size_bytes, **one.verdict.to_dict()} for one in choice.passed}
    document |= {"measured": choice.measured.to_dict(), "used_by": str(checkpoint.parent) if checkpoint else None}
    display.answer(document, as_json, lambda: _show_fastest(display.console(), choice, checkpoint))


def _saying() -> "Callable[[str], None]":
    """Tells on stderr what happens, and how many seconds after the beginning."""
    people, start = display.console(stderr=True), time.perf_counter()
    return lambda text: display.show_note(people, f"{time.perf_counter() - start:4.0f} s  {text}")


def _checkpoint(model: str, run: "arguments.Origin | None") -> Path | None:
    """The weights that an export of the run stands for; None where `model` is no run folder, but a file or a name."""
    from effnet.zoo import RUN_CHECKPOINT

    return run.folder / RUN_CHECKPOINT if run and Path(model).is_dir() else None


def _images(model: "Model", run: "arguments.Origin | None", data: str | None) -> tuple["Samples", "np.ndarray | None"]:
    """What the gate judges by, and what int8 is calibrated on, where that is something else."""
    from effnet.export.gate import Samples, photographs

    named = data or (run.data if run else None)
    if named is None:
        return photographs(model.preprocess), None
    splits = arguments.data_for(model, run, named)
    val = _thinned(splits.part("val"), MOST_IMAGES)
    views, labels = _views(model, val), val.labels if val.classes else None
    source = f"{splits.name}, validation part"
    return Samples(source=source, views=views, labels=labels), _views(model, _thinned(splits.train, MOST_CALIBRATION))


def _thinned(source: "Source", most: int) -> "Source":
    """At most so many samples, evenly spread."""
    count = min(most, len(source))
    return source.subset(number * len(source) // count for number in range(count))


def _views(model: "Model", source: "Source") -> "np.ndarray":
    """All samples as the model sees them, uint8 (N, size, size, 3)."""
    import numpy as np

    from effnet.data import batches

    preprocess = model.preprocess
    parts = batches(source, size_px=preprocess.size, batch=64, preprocess=preprocess, train=False)
    return np.concatenate([part.images.numpy() for part in parts])


# --- for people -----------------------------------------------------------------------------------------------------


def _show_export(out: "Console", made: "Artefact") -> None:
    """What the gate saw, and where the file is."""
    out.print(escape(f"passed: {made.verdict}"), highlight=False)
    if made.card.floats:
        out.print(f"in floating point: {len(made.card.floats)} layers", highlight=False)
    display.show_path(out, made.path)


def _show_fastest(out: "Console", choice: "Choice", checkpoint: Path | None) -> None:
    """What was tried, how quick and how exact it is, and what is kept."""
    eager, *_ = choice.measured.measurements
    quicker = {one.second: 1 / one.ratio for one in choice.measured.comparisons}
    title = f"one image at a time, {eager.environment['threads']} threads, {eager.environment['processor']}"
    made = display.table(title, ["what", ""], ["p50 ms", "over PyTorch", "points lost", "95 % interval", "MB"])
    display.add(made, eager.name, "", f"{eager.value:.2f}", "1.00x", "", "", "")
    for one in choice.passed:
        name, (low, high) = one.path.name, one.verdict.drop_interval
        cells = (f"{choice.measured[name].value:.2f}", f"{quicker[name]:.2f}x", f"{one.verdict.drop_points:.2f}")
        kept = "kept" if choice.artefact is one else ""
        display.add(made, name, kept, *cells, f"{low:.2f} to {high:.2f}", f"{one.size_bytes / 1e6:.1f}")
    for what in choice.refused:
        display.add(made, what, "refused", *[""] * 5)
    out.print(made)
    for what, why in choice.refused.items():
        out.print(escape(f"{what}: {why}"), style="yellow", highlight=False)
    if choice.measured.busy:
        out.print("The machine was busy: choose again on a quiet one (--fastest).", style="yellow")
    if choice.artefact is None:
        out.print("Nothing is quicker than PyTorch here; no file was kept.")
        return
    _show_export(out, choice.artefact)
    if checkpoint:
        out.print(f"used for {escape(str(checkpoint.parent))} from now on", highlight=False)

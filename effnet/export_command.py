"""What does `effnet export` do? Writes a model as a file for another runtime, if the gate lets it pass.

The images of the gate: the validation part of --data, by default of the data that the run was trained on; for a model
without a run, photographs. Ranges of int8 come from the training part. Both are thinned out evenly where they are many.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effnet import arguments, display
from effnet.arguments import AsJson, ModelName
from effnet.value import UsageError, check_choice

if TYPE_CHECKING:
    import numpy as np

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
    people = display.console(stderr=True)
    samples, calibration = _images(loaded, run, data)
    options: dict[str, Any] = {"max_drop": max_drop, "temperature": float(found.extra.get("temperature", 1.0))}
    options |= {"calibration": calibration, "say": lambda text: display.show_note(people, text)}
    if to:
        made = deploy.export(loaded, to, samples, folder, precision=precision, **options)
        document = {"artefact": str(made.path), "log": str(made.log), "passed": True} | made.verdict.to_dict()
        display.answer(document, as_json, lambda: display.show_export(display.console(), made))
        return
    checkpoint = _checkpoint(model, run)
    choice = deploy.fastest(loaded, samples, folder, checkpoint=checkpoint, **options)
    document = {"artefact": str(choice.artefact.path) if choice.artefact else None, "refused": choice.refused}
    document |= {"measured": choice.measured.to_dict(), "used_by": str(checkpoint.parent) if checkpoint else None}
    display.answer(document, as_json, lambda: display.show_fastest(display.console(), choice, checkpoint))


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

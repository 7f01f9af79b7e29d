"""How does a model become a file that may be trusted in service? Write, open in its own runtime, judge, and only then
give it its name.

Every export goes through the same steps, in a hidden folder beside its place:

1. The graph to be exported answers in eager PyTorch, and must pass the gate in float32: a wrong mean, swapped channels
   or a lost layer is found here, and cannot hide behind the rounding of bfloat16 or int8.
2. The target writes it. In int8, layers go back to floating point until the bound holds (`export.int8`).
3. The file is opened as it will be in service, and judged.
4. It is renamed to its place. A failed gate leaves nothing but the log, `NAME.json`, which a good export has too.

`fastest` does this for everything that the machine can run, measures what passed, and keeps the quickest; a run folder
that holds it opens as that from then on (`engine.open_engine`).
"""

import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effnet.bench import Measured, measure
from effnet.checkpoint import versions
from effnet.engine import CHOICE, Engine, TorchEngine, label_names
from effnet.export import open_artefact, target
from effnet.export.artefact import Card
from effnet.export.gate import Samples, Verdict, answers, judge
from effnet.export.graph import Deployable, digest
from effnet.files import write_atomically
from effnet.network import Model
from effnet.value import UsageError, check_choice, check_range
from effnet.zoo import file_digest


class GateError(UsageError):
    """An export that the gate refused. `log`: the file that says all it saw."""

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """An exported file in its place, and what the gate saw. `log`: the same as JSON, beside it."""

    path: Path
    card: Card
    verdict: Verdict
    log: Path


def export(
    model: Model,
    to: str,
    samples: Samples,
    out: str | Path,
    *,
    precision: str = "float32",
    max_drop: float = 1.0,
    temperature: float = 1.0,
    calibration: np.ndarray | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Artefact:
    """Exports `model` to the target called `to`, as `out`/NAME-PRECISION plus the target's suffix.

    `samples`: the real images of the gate, prepared by the model's `Preprocess`. `max_drop`: points of accuracy that
    bfloat16 and int8 may cost. `calibration`: prepared images for the ranges of int8, by default those of the gate.
    `say`: is told what happens. Raises `GateError` where the gate refuses, `UsageError` for what cannot be.
    """
    chosen = target(to)
    check_choice(f"precision of {to}", precision, chosen.precisions)
    check_range("max_drop", max_drop, 0, 100)
    out = Path(out)
    path = out / f"{model.network.name}-{precision}{chosen.suffix}"
    log = path.with_name(path.name + ".json")
    card = Card(
        network=model.network.name,
        target=to,
        precision=precision,
        labels=label_names(model),
        preprocess=model.preprocess,
        temperature=temperature,
        weights=digest(model),
        versions=versions(),
    )
    reference = answers(TorchEngine(name="float32", model=model, temperature=temperature), samples.views)
    deployable = Deployable(model, temperature).eval()
    say("judging the graph in float32")
    graph = judge(reference, deployable.run(torch.from_numpy(samples.views)).numpy(), samples)
    record: dict[str, Any] = {"artefact": path.name, "passed": False, "graph": graph.to_dict()}
    out.mkdir(parents=True, exist_ok=True)
    if not graph.passed:
        _keep_log(log, record | {"card": card.to_dict()})
        raise _refused(path, "the graph to be exported", graph, log)
    made = out / f".{path.name}.tmp"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    try:
        say(f"writing {path.name}")
        if precision == "int8":
            from effnet.export.int8 import write_within

            used = samples.views if calibration is None else calibration
            card, trials = write_within(
                deployable, card, made / path.name, used, reference, samples, max_drop=max_drop, say=say
            )
            record["trials"] = [trial.to_dict() for trial in trials]
        else:
            chosen.load().write(deployable, card, made / path.name)
        say("judging the file in its own runtime")
        verdict = judge(
            reference, answers(open_artefact(made / path.name), samples.views), samples,
            precision=precision, max_drop=max_drop,
        )  # fmt: skip
        record |= {"passed": verdict.passed, "file": verdict.to_dict(), "card": card.to_dict()}
        if verdict.passed:
            _move(made, path)
        _keep_log(log, record)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    if not verdict.passed:
        _remove(path)
        raise _refused(path, f"{path.name}, opened in its own runtime,", verdict, log)
    return Artefact(path=path, card=card, verdict=verdict, log=log)


def files_of(path: Path) -> list[Path]:
    """The file at `path` and, of OpenVINO, its weights."""
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def _move(made: Path, path: Path) -> None:
    """Into place, the weights first: at no time does a graph stand beside the weights of another export."""
    graph, *weights = files_of(path)
    if weights:
        graph.unlink(missing_ok=True)
    for file in (*weights, graph):
        os.replace(made / file.name, file)


def _remove(path: Path) -> None:
    for file in files_of(path):
        file.unlink(missing_ok=True)


def _keep_log(log: Path, record: dict[str, Any]) -> None:
    write_atomically(log, lambda temporary: _write(temporary, record))


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")


def _refused(path: Path, what: str, verdict: Verdict, log: Path) -> GateError:
    return GateError(
        f"{path} was not exported: {what} does not answer as the model does: {'; '.join(verdict.reasons)} "
        f"({verdict}). The log is {log}.",
        log,
    )


# --- the quickest ---------------------------------------------------------------------------------------------------

# what may stand for a run: formats whose files hold no code, since whoever opens a run folder trusts its data only
CANDIDATES = (("openvino", "float32"), ("openvino", "bfloat16"), ("openvino", "int8"), ("onnx", "float32"))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The quickest export that passed, None where PyTorch is quicker than all. `refused`: why others were not tried.

    `measured`: one image at a time; the first is eager PyTorch, the others are named by their files.
    """

    artefact: Artefact | None
    measured: Measured
    refused: dict[str, str]


def fastest(
    model: Model,
    samples: Samples,
    out: str | Path,
    *,
    checkpoint: Path | None = None,
    rounds: int = 10,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Choice:
    """Exports `model` in every way that this machine can run, measures what passes, and keeps the quickest.

    `checkpoint`: the file in a run folder that the model was loaded from; the choice is then noted in that folder, for
    `engine.open_engine`. Further `options`: those of `export`.
    """
    passed, refused = _candidates(model, samples, out, say, options)
    works: dict[str, Engine] = {"PyTorch float32": TorchEngine(name="float32", model=model)}
    works |= {one.path.name: open_artefact(one.path) for one in passed}
    view = samples.views[:1]
    say("measuring")
    about = {"batch": 1, "precision": "each in its own precision"}
    measured = measure(
        {name: functools.partial(engine, view) for name, engine in works.items()}, rounds=rounds, about=about
    )
    quickest = min(measured.measurements, key=lambda one: one.value).name
    chosen = next((one for one in passed if one.path.name == quickest), None)
    for one in passed:
        if one is not chosen:
            _remove(one.path)
            one.log.unlink(missing_ok=True)
    if checkpoint is not None:
        _note_choice(checkpoint, chosen, measured)
    return Choice(artefact=chosen, measured=measured, refused=refused)


def _candidates(
    model: Model, samples: Samples, out: str | Path, say: Callable[[str], None], options: dict[str, Any]
) -> tuple[list[Artefact], dict[str, str]]:
    """What passed, and why the rest did not."""
    passed, refused = [], {}
    for to, precision in CANDIDATES:
        try:
            passed.append(export(model, to, samples, out, precision=precision, say=say, **options))
        except UsageError as error:  # refused by the gate, or its package is missing
            refused[f"{to} {precision}"] = str(error)
            say(str(error))
    return passed, refused


def _note_choice(checkpoint: Path, chosen: Artefact | None, measured: Measured) -> None:
    note = checkpoint.parent / CHOICE
    if chosen is None:
        note.unlink(missing_ok=True)
        return
    record = {"artefact": os.path.relpath(chosen.path, checkpoint.parent), "checkpoint": file_digest(checkpoint)}
    write_atomically(note, lambda temporary: _write(temporary, record | {"measured": measured.to_dict()}))

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
from effnet.engine import CHOICE, Engine, TorchEngine, evaluating
from effnet.export import open_artefact, planned, target
from effnet.export.artefact import MAPS, Card
from effnet.export.gate import MAP_IMAGES, Samples, Verdict, answers, judge, with_maps
from effnet.export.graph import Deployable, digest
from effnet.files import write_atomically
from effnet.images import normalise
from effnet.network import Model
from effnet.value import UsageError, check_range
from effnet.zoo import file_digest


class GateError(UsageError):
    """An export that the gate refused. `log`: the file that says all it saw."""

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """An exported file in its place, and what the gate saw. `log`: the same as JSON, beside it.

    `size_bytes`: of the file and, of OpenVINO, its weights.
    """

    path: Path
    card: Card
    verdict: Verdict
    log: Path
    size_bytes: int


def export(
    model: Model,
    to: str,
    samples: Samples,
    out: str | Path,
    *,
    precision: str = "float32",
    max_drop: float = 1.0,
    temperature: float = 1.0,
    maps: bool = False,
    calibration: np.ndarray | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Artefact:
    """Exports `model` to the target called `to`, as `out`/NAME-PRECISION plus the target's suffix.

    `samples`: the real images of the gate, prepared by the model's `Preprocess`. `max_drop`: points of accuracy that
    bfloat16 and int8 may cost. `maps`: the file can give class activation maps too, which are judged with the rest.
    `calibration`: prepared images for the ranges of int8, by default those of the gate.
    `say`: is told what happens. Raises `GateError` where the gate refuses, `UsageError` for what cannot be.
    """
    card, path = planned(model, to, precision, Path(out), maps=maps, **_about(model, temperature))
    exam = _exam(model, samples, max_drop, temperature, maps, say)
    return _written(exam, card, path, samples.views if calibration is None else calibration, say)


def _about(model: Model, temperature: float) -> dict[str, Any]:
    """What the card says besides what is planned."""
    return {"temperature": temperature, "weights": digest(model), "versions": versions()}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Exam:
    """What every file of a model must answer, worked out once, however many files there will be.

    `graph`: the verdict on `deployable` in eager float32. `maps`: of the class `tops` of the first images, (N, h, w).
    """

    deployable: Deployable
    samples: Samples
    max_drop: float
    reference: np.ndarray
    tops: np.ndarray
    maps: np.ndarray | None
    graph: Verdict


def _exam(
    model: Model, samples: Samples, max_drop: float, temperature: float, maps: bool, say: Callable[[str], None]
) -> _Exam:
    check_range("max_drop", max_drop, 0, 100)
    say(f"judging the graph in float32 on {len(samples)} images of {samples.source}")
    deployable = Deployable(model, temperature, maps).eval()
    reference = answers(TorchEngine(name="float32", model=model, temperature=temperature), samples.views)
    tops = reference[:MAP_IMAGES].argmax(1)
    views = torch.from_numpy(samples.views)
    graph = judge(reference, deployable.run(views).numpy(), samples)
    wanted = _maps(model, samples.views[:MAP_IMAGES], tops) if maps else None
    if wanted is not None:
        graph = with_maps(graph, wanted, _of_classes(deployable.run(views[:MAP_IMAGES], MAPS).numpy(), tops))
    return _Exam(
        deployable=deployable,
        samples=samples,
        max_drop=max_drop,
        reference=reference,
        tops=tops,
        maps=wanted,
        graph=graph,
    )


def _written(exam: _Exam, card: Card, path: Path, calibration: np.ndarray, say: Callable[[str], None]) -> Artefact:
    """Writes the file that `card` describes, and lets it have its name if it passes. Leaves the log in any case."""
    log = path.with_name(path.name + ".json")
    record: dict[str, Any] = {"artefact": path.name, "passed": False, "graph": exam.graph.to_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if not exam.graph.passed:
        _keep_log(log, record | {"card": card.to_dict()})
        raise _refused(path, "the graph to be exported", exam.graph, log)
    made = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    try:
        say(f"writing {path.name}")
        if card.precision == "int8":
            from effnet.export.int8 import write_within

            card, trials = write_within(
                exam.deployable, card, made / path.name, calibration, exam.reference, exam.samples,
                max_drop=exam.max_drop, say=say,
            )  # fmt: skip
            record["trials"] = [trial.to_dict() for trial in trials]
        else:
            target(card.target).load().write(exam.deployable, card, made / path.name)
        say("judging the file in its own runtime")
        verdict = _verdict(exam, made / path.name)
        record |= {"passed": verdict.passed, "file": verdict.to_dict(), "card": card.to_dict()}
        size_bytes = sum(file.stat().st_size for file in files_of(made / path.name))
        if verdict.passed:
            _move(made, path)
        _keep_log(log, record)
    except UsageError:
        raise  # says all there is to say
    except Exception as error:  # of the exporter or the runtime
        _keep_log(log, record | {"card": card.to_dict(), "error": f"{type(error).__name__}: {error}"})
        raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    if not verdict.passed:
        _remove(path)
        raise _refused(path, f"{path.name}, opened in its own runtime,", verdict, log)
    return Artefact(path=path, card=card, verdict=verdict, log=log, size_bytes=size_bytes)


def _verdict(exam: _Exam, path: Path) -> Verdict:
    """What the gate says of a file that was opened as it will be in service."""
    engine = open_artefact(path)
    found = answers(engine, exam.samples.views)
    verdict = judge(exam.reference, found, exam.samples, precision=engine.card.precision, max_drop=exam.max_drop)
    if exam.maps is None:
        return verdict
    return with_maps(verdict, exam.maps, _of_classes(engine.maps(exam.samples.views[:MAP_IMAGES]), exam.tops))


def _maps(model: Model, views: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The class activation maps of one class per image, (N, h, w), in eager PyTorch."""
    with evaluating(model), torch.inference_mode():
        features = model.forward_features(normalise(torch.from_numpy(views), model.preprocess))
        return torch.einsum("nc,nchw->nhw", model.classifier.weight[classes], features).numpy()


def _of_classes(maps: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Of the maps of all classes, (N, K, h, w), that of one class per image, (N, h, w)."""
    return maps[np.arange(len(classes)), classes]


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
    """The quickest export that passed, None where PyTorch is quicker than all. `refused`: why others were not measured.

    `measured`: one image at a time; the first is eager PyTorch, the others are named by their files. `passed`: all that
    were measured; the files of those that were not chosen are gone.
    """

    artefact: Artefact | None
    passed: tuple[Artefact, ...]
    measured: Measured
    refused: dict[str, str]


def fastest(
    model: Model,
    samples: Samples,
    out: str | Path,
    *,
    checkpoint: Path | None = None,
    max_drop: float = 1.0,
    temperature: float = 1.0,
    maps: bool = False,
    calibration: np.ndarray | None = None,
    rounds: int = 10,
    say: Callable[[str], None] = lambda text: None,
) -> Choice:
    """Exports `model` in every way that this machine can run, measures what passes, and keeps the quickest.

    `checkpoint`: the file in a run folder that the model was loaded from; the choice is then noted in that folder, for
    `engine.open_engine`. The other options are those of `export`. What cannot be written here is refused with its
    reason, as what the gate refuses is; either leaves its log.
    """
    exam = _exam(model, samples, max_drop, temperature, maps, say)
    about = _about(model, temperature)
    passed, refused = [], {}
    for to, precision in CANDIDATES:
        try:
            card, path = planned(model, to, precision, Path(out), maps=maps, **about)
            passed.append(_written(exam, card, path, samples.views if calibration is None else calibration, say))
        except (UsageError, RuntimeError) as error:  # the gate's no, a missing package, or what a runtime cannot do
            refused[f"{to} {precision}"] = str(error)
            say(str(error))
    measured = _measured(model, passed, samples.views[:1], rounds, say)
    quickest = min(measured.measurements, key=lambda one: one.value).name
    chosen = next((one for one in passed if one.path.name == quickest), None)
    if checkpoint is not None:  # first: at no time does the note name a file that is gone
        _note_choice(checkpoint, chosen, measured)
    for one in passed:
        if one is not chosen:
            _remove(one.path)
            one.log.unlink(missing_ok=True)
    return Choice(artefact=chosen, passed=tuple(passed), measured=measured, refused=refused)


def _measured(
    model: Model, passed: list[Artefact], view: np.ndarray, rounds: int, say: Callable[[str], None]
) -> Measured:
    """One image at a time in eager PyTorch and in every file."""
    works: dict[str, Engine] = {"PyTorch float32": TorchEngine(name="float32", model=model)}
    works |= {one.path.name: open_artefact(one.path) for one in passed}
    say(f"measuring {len(works)} of them, one image at a time")
    calls = {name: functools.partial(engine, view) for name, engine in works.items()}
    return measure(calls, rounds=rounds, about={"batch": 1, "precision": "each in its own precision"})


def _note_choice(checkpoint: Path, chosen: Artefact | None, measured: Measured) -> None:
    note = checkpoint.parent / CHOICE
    if chosen is None:
        note.unlink(missing_ok=True)
        return
    record = {"artefact": os.path.relpath(chosen.path, checkpoint.parent), "checkpoint": file_digest(checkpoint)}
    write_atomically(note, lambda temporary: _write(temporary, record | {"measured": measured.to_dict()}))

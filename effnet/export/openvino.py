"""`openvino`: an `.xml` graph and its `.bin` weights for OpenVINO; float32, bfloat16 or int8.

The precision is a word in the card: the runtime is told it when the file is opened. In bfloat16 (AMX, AVX512-BF16) the
file is that of float32. In int8 the quantised layers are in the graph, and the rest runs in bfloat16 where the
processor has it. The file holds no code.

A batch of one is what latency is judged by, and OpenVINO is quicker when it knows the shape: batches of one have a
compiled graph of their own. So has each output, so that maps cost nothing where nobody asks for them.
"""

import hashlib
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effnet.export.artefact import KEY, ArtefactError, Card, Run, needs, read_card
from effnet.export.graph import Deployable, quietly, trace

RUNTIME = "OpenVINO"
HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "bf16"}
Kind = tuple[bool, str]  # a batch of one, and the output that is asked for: each has a compiled graph of its own
DIGEST = "weights_sha256"  # of the .bin: the pair cannot be of two exports


def write(deployable: Deployable, card: Card, path: Path) -> None:
    """Converts the graph and writes the pair."""
    save(convert(deployable), card, path)


def convert(deployable: Deployable) -> Any:
    """The graph as an `openvino.Model`, batch of any size."""
    openvino = package("exporting to OpenVINO")
    program = trace(deployable)
    with quietly():
        model = openvino.convert_model(program)
    size = deployable.size
    model.reshape([-1, size, size, 3])
    model.inputs[0].get_tensor().set_names({"images"})
    for output, name in zip(model.outputs, deployable.outputs, strict=True):
        output.get_tensor().set_names({name})
    return model


def save(model: Any, card: Card, path: Path) -> None:
    """Writes the pair; the `.xml` knows the digest of its `.bin`."""
    openvino = package("exporting to OpenVINO")
    openvino.serialize(model, path, weights_of(path))  # once for the bytes of the weights, which the digest is of
    model.set_rt_info(card.to_line(), [KEY, "card"])
    model.set_rt_info(_sha256(weights_of(path)), [KEY, DIGEST])
    openvino.serialize(model, path, weights_of(path))


def weights_of(path: Path) -> Path:
    """The file of the weights that belongs to an `.xml`."""
    return path.with_suffix(".bin")


def open_run(path: Path) -> tuple[Card, Run]:
    """The card, and the compiled graph with as many threads as PyTorch uses here."""
    openvino = package(f"opening {path}")
    core = openvino.Core()
    if not weights_of(path).is_file():
        raise ArtefactError(f"{path} has lost its weights: {weights_of(path)} is not there.")
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        raise ArtefactError(f"{path} cannot be read by OpenVINO: {_reason(error)}") from None
    card = read_card(_note(model, "card"), path)
    if _sha256(weights_of(path)) != _note(model, DIGEST):
        raise ArtefactError(f"{weights_of(path)} does not belong to {path}, or was damaged: its digest is another one.")
    return card, _Runner(core, model, card)


class _Runner:
    """Answers from any thread: a request is used by one at a time."""

    def __init__(self, core: Any, model: Any, card: Card) -> None:
        self._core, self._model, self._card = core, model, card
        self._lock = threading.Lock()
        self._compiled: dict[Kind, Any] = {}
        self._idle: dict[Kind, list[Any]] = {}
        self._threads = torch.get_num_threads()

    def __call__(self, views: np.ndarray, output: str) -> np.ndarray:
        kind = (len(views) == 1, output)
        idle = self._idle.setdefault(kind, [])
        try:
            request = idle.pop()
        except IndexError:
            request = self._for(*kind).create_infer_request()
        found = request.infer([views], share_inputs=True)[0].astype(np.float32)
        idle.append(request)
        return found

    def _for(self, one: bool, output: str) -> Any:
        """The compiled graph for a batch of one, or for any, that gives this output and no other."""
        with self._lock:
            if (one, output) not in self._compiled:
                size = self._card.preprocess.size
                model = self._model.clone()
                model.reshape([1 if one else -1, size, size, 3])
                for result in model.get_results():
                    if output not in result.output(0).get_names():
                        model.remove_result(result)
                self._compiled[one, output] = self._core.compile_model(model, "CPU", self._settings())
            return self._compiled[one, output]

    def _settings(self) -> dict[str, Any]:
        return {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": self._threads,
            "INFERENCE_PRECISION_HINT": precision_hint(self._core, self._card.precision),
        }


def precision_hint(core: Any, precision: str) -> str:
    """What the runtime is told: bf16 only where the processor computes it, so that nothing is emulated."""
    capable = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return HINTS[precision] if capable else "f32"


def package(what: str) -> Any:
    """The module `openvino`. `UsageError` where it is not installed.

    Its import would report itself to Google Analytics; where `openvino_telemetry` cannot be imported, it does not.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # ty: ignore[no-matching-overload]
    try:
        import openvino
    except ImportError:
        raise needs("openvino", what) from None
    return openvino


def _note(model: Any, name: str) -> str | None:
    path = [KEY, name]
    return model.get_rt_info(path).astype(str) if model.has_rt_info(path) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    """The last line that is not about OpenVINO's own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and ".cpp" not in line]
    return lines[-1] if lines else "broken"

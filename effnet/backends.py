"""In what can a network be timed besides PyTorch, how soon is it there, and how much memory does it take?

The exported backends are those of `export`: a model is written as it would be for service, but without the gate (its
weights are random), and opened by the same engine. So what is timed takes bytes and gives probabilities: more work than
the backends `eager` and `compiled`, which take normalised images and give logits.

Start-up and memory are those of a fresh process that opens a file and answers once: from its start to the answer, and
the most memory it ever held. This is what a service waits for and pays.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from effnet.checkpoint import from_model, save
from effnet.engine import open_engine
from effnet.export import planned, target
from effnet.export.graph import Deployable
from effnet.network import Model
from effnet.value import Value

EXPORTED = {"onnxruntime": "onnx", "openvino": "openvino", "aoti": "aoti"}  # backend: export target
CALIBRATION = 8  # random images for the ranges of int8: the time does not depend on them


@dataclass(frozen=True, kw_only=True)
class Start(Value):
    """Of `n` fresh processes the median: `seconds` from start to first answer, `peak_bytes` of memory."""

    name: str
    seconds: float
    peak_bytes: int
    n: int


def written(model: Model, backend: str, precision: str, folder: Path) -> Path:
    """The file with which `backend` runs `model`: an export, or for `eager` a checkpoint. `UsageError` if it cannot.

    May be called in inference mode, where models are timed but cannot be traced.
    """
    if backend == "eager":
        path = folder / f"{model.network.name}.safetensors"
        save(path, from_model(model))
        return path
    card, path = planned(model, EXPORTED[backend], precision, folder)
    with torch.inference_mode(False):
        deployable = Deployable(model).eval()
        if precision == "int8":
            from effnet.export import int8, openvino

            graph = openvino.convert(deployable)
            views = random_views(model.preprocess.size, CALIBRATION)
            quantised = int8.quantise(graph, views, int8.always_float(graph))
            openvino.save(quantised, card, path)
        else:
            target(card.target).load().write(deployable, card, path)
    return path


def random_views(size: int, batch: int) -> np.ndarray:
    """Prepared images of noise, uint8 (batch, size, size, 3)."""
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


# --- fresh processes ------------------------------------------------------------------------------------------------


def starts(files: Mapping[str, Path], *, batch: int = 1, threads: int = 1, rounds: int = 3) -> tuple[Start, ...]:
    """The start of each of `files` (checkpoints and exports, by the name of what they are), the rounds interleaved."""
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in files}
    for _ in range(rounds):
        for name, path in files.items():
            found[name].append(_started(path, batch, threads))
    return tuple(
        Start(
            name=name,
            seconds=statistics.median(seconds for seconds, _ in values),
            peak_bytes=int(statistics.median(peak for _, peak in values)),
            n=rounds,
        )
        for name, values in found.items()
    )


def _started(path: Path, batch: int, threads: int) -> tuple[float, int]:
    """Seconds until a fresh process has answered, and its peak memory in bytes."""
    command = [sys.executable, "-m", "effnet.backends", str(path), str(batch), str(threads)]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()  # comes with the answer
        seconds = time.perf_counter() - begin
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds, json.loads(line)


def _answer_once(path: str, batch: str, threads: str) -> None:
    """What the fresh process does: it prints its peak memory when it has answered."""
    torch.set_num_threads(int(threads))
    engine = open_engine(path)
    engine(random_views(engine.preprocess.size, int(batch)))
    sys.stdout.write(f"{_peak_bytes()}\n")
    sys.stdout.flush()


def _peak_bytes() -> int:
    """The most memory that this process held; on Linux without what it inherited from its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    _answer_once(*sys.argv[1:])

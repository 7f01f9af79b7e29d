"""`aoti`: the graph compiled ahead of time by AOTInductor into machine code for this kind of processor, a `.pt2`.

Starts without tracing and runs without Python. The file holds a shared library: opening it runs its code, so open
files from people you trust, and export on the kind of machine that will serve.
"""

import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from effnet.export.artefact import KEY, ArtefactError, Card, Run, read_card
from effnet.export.graph import Deployable, quietly, trace

RUNTIME = "AOTInductor"


def write(deployable: Deployable, card: Card, path: Path) -> None:
    """Traces and compiles the graph; needs a C++ compiler."""
    from torch._inductor import config

    program = trace(deployable.in_precision(card.precision))
    with quietly(), torch.no_grad(), config.patch(freezing=True), tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "model.pt2")
        settings = {"aot_inductor.metadata": {KEY: card.to_line()}}
        torch._inductor.aoti_compile_and_package(program, package_path=str(made), inductor_configs=settings)
        path.write_bytes(made.read_bytes())


def is_compiled(path: Path) -> bool:
    """Whether a `.pt2` holds compiled code rather than a graph."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/aotinductor/" in name for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def open_run(path: Path) -> tuple[Card, Run]:
    """The card, and the compiled graph as a function."""
    try:
        with quietly():
            compiled = torch._inductor.aoti_load_package(str(path))
    except Exception as error:
        raise ArtefactError(f"{path} cannot be loaded by AOTInductor: {str(error).splitlines()[0]}") from None

    def run(views: np.ndarray, _output: str) -> np.ndarray:
        with torch.inference_mode():
            return compiled(torch.from_numpy(views)).numpy()

    return read_card(compiled.get_metadata().get(KEY), path), run

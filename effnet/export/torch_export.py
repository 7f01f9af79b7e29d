"""`torch`: the graph as PyTorch itself keeps it, a `.pt2` of torch.export. Runs wherever the same PyTorch does.

The file is an archive of a graph (JSON) and raw tensors, but PyTorch's own reader falls back to unpickling for tensors
it cannot store raw: open `.pt2` files from people you trust. ONNX and OpenVINO files hold no code.
"""

from pathlib import Path

import numpy as np
import torch

from effnet.export.artefact import KEY, ArtefactError, Card, Run, read_card
from effnet.export.graph import Deployable, quietly, trace

RUNTIME = "torch.export"


def write(deployable: Deployable, card: Card, path: Path) -> None:
    """Traces and saves the graph."""
    program = trace(deployable.in_precision(card.precision))
    with quietly(), path.open("wb") as file:
        torch.export.save(program, file, extra_files={KEY: card.to_line()})


def open_run(path: Path) -> tuple[Card, Run]:
    """The card, and the graph as a function."""
    extra = {KEY: ""}
    try:
        with quietly(), path.open("rb") as file:
            module = torch.export.load(file, extra_files=extra).module()
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises what the broken bytes led to
        raise ArtefactError(f"{path} cannot be read by torch.export: {str(error).splitlines()[0]}") from None

    def run(views: np.ndarray, _output: str) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(views)).numpy()

    return read_card(extra[KEY], path), run

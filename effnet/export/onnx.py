"""`onnx`: one `.onnx` file for ONNX Runtime and whatever else reads the format; float32.

PyTorch's dynamo exporter writes it; the weights are inside, the card in the model's own metadata. The file holds no
code.
"""

from pathlib import Path

import numpy as np
import torch

from effnet.export.artefact import KEY, ArtefactError, Card, Run, needs, read_card
from effnet.export.graph import Deployable, quietly, trace

RUNTIME = "ONNX Runtime"


def write(deployable: Deployable, card: Card, path: Path) -> None:
    """Translates the graph."""
    try:
        import onnx
        import onnxscript  # noqa: F401  (what PyTorch's exporter writes with)
    except ImportError as error:
        raise needs(str(error.name), "exporting to ONNX") from None
    program = trace(deployable)
    with quietly():
        made = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=list(deployable.outputs), verbose=False
        )
        assert made is not None
        model = made.model_proto
    onnx.helper.set_model_props(model, {KEY: card.to_line()})
    path.write_bytes(model.SerializeToString())


def open_run(path: Path) -> tuple[Card, Run]:
    """The card, and a session with as many threads as PyTorch uses here."""
    try:
        import onnxruntime
    except ImportError:
        raise needs("onnxruntime", f"opening {path}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise ArtefactError(f"{path} cannot be read by ONNX Runtime: {str(error).splitlines()[0]}") from None
    card = read_card(session.get_modelmeta().custom_metadata_map.get(KEY), path)
    (name,) = (entry.name for entry in session.get_inputs())
    needed = onnxruntime.RunOptions()
    needed.only_execute_path_to_fetches = True  # maps cost nothing where nobody asks for them

    def run(views: np.ndarray, output: str) -> np.ndarray:
        return np.asarray(session.run([output], {name: views}, needed)[0])

    return card, run

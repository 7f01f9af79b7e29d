"""What is exported? The whole way from prepared bytes to probabilities as one graph, rewritten where that is exact.

Rewriting before export, all of it exact up to rounding: batch norms are multiplied into the convolutions before them;
squeeze-excite's 1x1 convolutions of 1x1 maps are matrix products (`layers.SqueezeExcite` already writes them so);
dropout and drop path are gone. The engines fuse activations into convolutions by themselves.
"""

import contextlib
import copy
import hashlib
import logging
import warnings
from collections.abc import Generator

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from effnet.export.artefact import MAPS, PROBABILITIES
from effnet.images import affine
from effnet.layers import fold_norms
from effnet.network import Model
from effnet.value import UsageError, check_range

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NOISY = ("torch.onnx", "torch.export", "torch._inductor", "nncf")  # loggers that report on their own progress


class Deployable(nn.Module):
    """`images`, uint8 (N, size, size, 3), to probabilities, float32 (N, K): a copy of `model`, batch norms folded.

    `temperature`: the logits are divided by it. Probabilities are float32 whatever the weights are. With `maps` there
    is a second output, the class activation maps of all classes, float32 (N, K, h, w): the mean of a map is its class's
    logit without the bias (Zhou et al. 2016).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: Model, temperature: float = 1.0, maps: bool = False) -> None:
        super().__init__()
        if model.network.stem.in_channels != 3:
            raise UsageError(f"{model.network.name} takes {model.network.stem.in_channels} channels; images have 3.")
        check_range("temperature", temperature, 1e-6)
        self.model = _frozen(model)
        self.size = model.preprocess.size
        self.temperature = temperature
        self.outputs = (PROBABILITIES, MAPS) if maps else (PROBABILITIES,)
        for name, values in zip(("scale", "shift"), affine(model.preprocess, torch.device("cpu")), strict=True):
            self.register_buffer(name, values.view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The tensors that `outputs` names."""
        x = images.permute(0, 3, 1, 2).to(torch.float32)  # (N, S, S, 3) -> (N, 3, S, S), channels last in memory
        x = x * self.scale + self.shift
        weights = self.model.classifier.weight  # (K, C)
        features = self.model.forward_features(x.to(weights.dtype))  # (N, C, h, w)
        logits = self.model.forward_head(features).float()
        probabilities = (logits / self.temperature if self.temperature != 1 else logits).softmax(dim=1)
        if MAPS not in self.outputs:
            return probabilities
        return probabilities, (weights @ features.flatten(2)).unflatten(2, features.shape[2:]).float()

    def in_precision(self, precision: str) -> "Deployable":
        """Itself, or a copy whose network computes in bfloat16; channels last either way."""
        if precision != "float32":
            changed = copy.deepcopy(self)
            changed.model.to(DTYPES[precision])
            return changed
        return self

    @torch.no_grad()
    def run(self, images: Tensor, output: str = PROBABILITIES) -> Tensor:
        """One of the outputs in eager PyTorch, in batches of 32."""
        place = self.outputs.index(output)
        made = [self(part) for part in images.split(32)]
        return torch.cat([one[place] if len(self.outputs) > 1 else one for one in made])


@torch.no_grad()
def _frozen(model: Model) -> Model:
    """A copy on the CPU for inference alone: evaluation mode, norms folded, no gradients, float32, channels last."""
    with torch.device("meta"):
        frozen = Model(model.network, model.labels)
    tensors = {name: value.detach().cpu().float().clone() for name, value in model.state_dict().items()}
    frozen.load_state_dict(tensors, assign=True)
    fold_norms(frozen.eval())
    frozen.requires_grad_(False)
    return frozen.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]


def trace(deployable: Deployable) -> ExportedProgram:
    """The graph with a batch of any size."""
    size = deployable.size
    images = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    with torch.no_grad(), quietly():
        return torch.export.export(deployable, (images,), dynamic_shapes=({0: Dim("batch", min=1)},))


def digest(model: Model) -> str:
    """SHA-256 of all weights and batch statistics, by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def quietly() -> Generator[None]:
    """Inside, exporters keep their warnings about themselves and their progress reports to themselves."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

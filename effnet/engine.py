"""What answers for an image? A model in PyTorch, or an exported file in its own runtime: one call, one kind of answer.

`predict` and `serve` know engines only. An engine takes what `images.prepare` made with the engine's own `preprocess`,
so that normalisation is nobody else's business, and answers with probabilities.

`evaluating` and `logits` are the one way in which inference runs a PyTorch model here; `evaluate` and `explain` use
them too.
"""

import contextlib
import json
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from effnet import native
from effnet.export import is_artefact, open_artefact
from effnet.images import normalise
from effnet.network import Model, label_names
from effnet.spec import Preprocess
from effnet.zoo import RUN_CHECKPOINT, built, file_digest, find

CHOICE = "fastest.json"  # in a run folder: which export stands for it, and of which weights


class StaleWarning(UserWarning):
    """An export that is older than the weights it would stand for was not used."""


class Engine(Protocol):
    """Something that classifies prepared images."""

    @property
    def name(self) -> str:
        """What is running, for people: `efficientnet_lite0, PyTorch float32`."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the answer's columns."""
        ...

    @property
    def preprocess(self) -> Preprocess:
        """How `images.prepare` must make the views."""
        ...

    def __call__(self, views: np.ndarray) -> np.ndarray:
        """Probabilities, float32 (N, classes), of prepared images, uint8 (N, size, size, 3). Threads may call it."""
        ...


@dataclass(frozen=True, kw_only=True)
class TorchEngine:
    """A model in this process. `turns`: the mean over the eight flips and turns of the square.

    `temperature`: the logits are divided by it before the softmax.
    """

    name: str
    model: Model
    turns: bool = False
    temperature: float = 1.0

    @property
    def labels(self) -> tuple[str, ...]:
        return label_names(self.model)

    @property
    def preprocess(self) -> Preprocess:
        return self.model.preprocess

    def __call__(self, views: np.ndarray) -> np.ndarray:
        with evaluating(self.model):
            scores = logits(self.model, torch.from_numpy(views), turns=self.turns)
        return (scores / self.temperature).softmax(dim=1).numpy()


def open_engine(where: str | Path, *, turns: bool = False) -> Engine:
    """The engine for a model name, a checkpoint, an exported file or a run folder.

    A run folder whose quickest export was chosen (`effnet export --fastest`) opens as that, which its name says; the
    checkpoint in it, named as a file, opens in PyTorch. An export of weights that the run has since replaced is passed
    over, with a `StaleWarning`. `turns`: answers are the mean over the eight flips and turns of the square.
    """
    if is_artefact(where):
        return open_artefact(where, turns=turns)
    folder = Path(where)
    if (folder / CHOICE).is_file():
        choice = json.loads((folder / CHOICE).read_text())
        file = folder / choice["artefact"]
        ours = file_digest(folder / RUN_CHECKPOINT) == choice["checkpoint"]
        if ours and file.is_file():
            engine = open_artefact(file, turns=turns)
            return replace(engine, runtime=f"{choice['artefact']} in {engine.runtime}")
        why = "is gone" if ours else f"was exported from weights that {folder} no longer holds, and is not used"
        warnings.warn(f"{file} {why}: effnet export {folder} --fastest", StaleWarning, stacklevel=2)
    found = find(where)
    temperature = float(found.extra.get("temperature", 1.0))
    model = built(found).eval()
    name = f"{model.network.name}, PyTorch float32"
    return TorchEngine(name=name, model=model, turns=turns, temperature=temperature)


# --- running a PyTorch model -------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluating(model: Model) -> Generator[None]:
    """Inside, the model is in evaluation mode and recomputes nothing; afterwards every module is as it was before.

    On a CPU the process keeps freed memory from then on (`native.keep_freed_memory`).
    """
    if model.classifier.weight.device.type == "cpu":
        native.keep_freed_memory()
    modes = [(module, module.training) for module in model.modules()]
    checkpointing = model.grad_checkpointing
    model.eval()
    model.set_grad_checkpointing(False)
    try:
        yield
    finally:
        for module, training in modes:  # one by one: a frozen batch norm stays frozen
            module.training = training
        model.set_grad_checkpointing(checkpointing)


def logits(model: Model, images: Tensor, *, turns: bool = False) -> Tensor:
    """Float32 (N, K) on the CPU, for prepared images, uint8 (N, size, size, 3), computed where the model is.

    `turns`: the mean over the eight flips and quarter turns of the square, for images that have no up; eight times the
    work. Runs in inference mode, channels last; evaluation mode is the caller's (`evaluating`).
    """
    with torch.inference_mode():
        x = normalise(images.to(model.classifier.weight.device), model.preprocess)  # (N, 3, size, size)
        views = eight_turns(x) if turns else [x]
        return torch.stack([model(view).float() for view in views]).mean(0).cpu()


def eight_turns(x: Tensor) -> Iterator[Tensor]:
    """The symmetries of the square: quarter turns of `x` (N, C, S, S) and of its mirror image, channels last."""
    for image in (x, x.flip(3)):
        for quarter in range(4):
            yield torch.rot90(image, quarter, (2, 3)).contiguous(memory_format=torch.channels_last)

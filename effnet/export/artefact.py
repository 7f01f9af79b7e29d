"""What is in an exported file besides the graph, and how does it answer? A `Card` in every format, one kind of engine.

The card travels inside the file, as one JSON document under the key `effnet`: whoever has the file has the class names
and the `Preprocess`, and needs nothing of the network. The graph itself takes prepared bytes and gives probabilities;
normalisation, softmax and temperature are in it, so nobody can normalise wrongly.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from effnet.spec import Preprocess
from effnet.value import UsageError, Value, check_choice, check_range

FORMAT_VERSION = 1
KEY = "effnet"  # of the card in a file's own metadata
PRECISIONS = ("float32", "bfloat16", "int8")

PROBABILITIES, MAPS = "probabilities", "maps"  # what a graph can give: the names of its outputs

# (views, output): uint8 (N, size, size, 3) and a name -> float32, (N, K) or for maps (N, K, h, w); in any thread
Run = Callable[[np.ndarray, str], np.ndarray]


class ArtefactError(UsageError):
    """An exported file that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Card(Value):
    """What an artefact says about itself. `weights`: a digest of the exported weights and their batch statistics.

    `temperature`: the logits are divided by it in the graph. `floats`: the layers that stay in floating point in int8.
    Where the graph gives class activation maps, too: `tap`, the unit they are of, and `bias`, the classifier's.
    """

    network: str
    target: str
    precision: str
    labels: tuple[str, ...]
    preprocess: Preprocess
    temperature: float = 1.0
    weights: str = ""
    floats: tuple[str, ...] = ()
    tap: str = ""
    bias: tuple[float, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_range("temperature", self.temperature, 1e-6)
        if self.version != FORMAT_VERSION:
            raise UsageError(f"its card has format {self.version}; this effnet reads {FORMAT_VERSION}. Update effnet.")

    def to_line(self) -> str:
        """The JSON document on one line."""
        return json.dumps(self.to_dict())


def read_card(text: str | bytes | None, path: Path) -> Card:
    """The card that a file carries. `ArtefactError` names the file that has none, or a damaged one."""
    if not text:
        raise ArtefactError(f"{path} was not written by `effnet export`: it does not say its labels and preprocessing.")
    try:
        return Card.from_json(text.decode() if isinstance(text, bytes) else text)
    except UsageError as error:
        raise ArtefactError(f"{path} cannot be used: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An opened artefact: an engine (see `effnet.engine`). `runtime`: what runs it, in words."""

    card: Card
    runtime: str
    run: Run
    turns: bool = False

    @property
    def name(self) -> str:
        return f"{self.card.network}, {self.runtime} {self.card.precision}"

    @property
    def labels(self) -> tuple[str, ...]:
        return self.card.labels

    @property
    def preprocess(self) -> Preprocess:
        return self.card.preprocess

    def __call__(self, views: np.ndarray) -> np.ndarray:
        self._check(views)
        if not len(views):
            return np.empty((0, len(self.labels)), dtype=np.float32)
        return self._over_turns(views) if self.turns else self._probabilities(views)

    def maps(self, views: np.ndarray) -> np.ndarray:
        """The class activation maps of all classes, float32 (N, classes, h, w), of the images as they are.

        The mean of a map plus the class's `card.bias` is its logit. `UsageError` where the file has none.
        """
        self._check(views)
        if not self.card.tap:
            raise UsageError(
                f"{self.name} was exported without its class activation maps: export it again with --maps, or explain "
                "the checkpoint."
            )
        return self.run(np.ascontiguousarray(views), MAPS)

    def _probabilities(self, views: np.ndarray) -> np.ndarray:
        return self.run(np.ascontiguousarray(views), PROBABILITIES)

    def _check(self, views: np.ndarray) -> None:
        size = self.preprocess.size
        if views.dtype != np.uint8 or views.ndim != 4 or views.shape[1:] != (size, size, 3):
            raise UsageError(
                f"{self.name} takes what images.prepare makes, uint8 (N, {size}, {size}, 3), not "
                f"{views.dtype} {views.shape}."
            )

    def _over_turns(self, views: np.ndarray) -> np.ndarray:
        """As PyTorch's engine: the softmax of the mean logits of the eight flips and turns of the square.

        Logarithms of probabilities are logits up to a number per image, which the last softmax takes out again.
        """
        squares = [np.rot90(image, k, (1, 2)) for image in (views, views[:, :, ::-1]) for k in range(4)]
        logs = np.mean([log(self._probabilities(square)) for square in squares], axis=0)
        powers = np.exp(logs - logs.max(axis=1, keepdims=True))
        return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def log(probabilities: np.ndarray) -> np.ndarray:
    """Logarithms, float64; of what is below the smallest normal float32, that of the latter."""
    return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))


def needs(package: str, module: Any) -> UsageError:
    """The error where a package of the extra is missing."""
    return UsageError(f"{module} needs the package {package}, which is not installed: pip install 'effnet[export]'")

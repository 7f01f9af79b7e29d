"""Does a map show what the model looks at? Insertion and deletion (Petsiuk et al. 2018, RISE).

Pixels are put back into a blurred image in the order of the map, and taken out of the whole image in that order; the
areas under the two curves of the class's probability say how much the order knows. Both curves go between the same two
images, so an order that knows nothing has the same area twice: `difference` is 0 for it on average, and reversing a map
swaps the areas exactly. (RISE deletes to grey instead, which has no such zero and asks the model about images that it
has never seen the like of.) Figures of different images or models are not comparable, those of two maps of one are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from effnet.explain import upsampled
from effnet.value import Value, check_range

BLUR = 0.05  # of the side: 11 px at 224, where RISE takes a Gaussian of 5 px cut at 11
AT_A_TIME = 8


@dataclass(frozen=True, kw_only=True)
class Faithfulness(Value):
    """Areas under the curves of the class's probability, 0 to 1: `insertion` high and `deletion` low is faithful."""

    insertion: float
    deletion: float

    @property
    def difference(self) -> float:
        """What the order of the map gains over its reverse; about 0 for an order that knows nothing."""
        return self.insertion - self.deletion

    def __str__(self) -> str:
        return f"insertion {self.insertion:.2f}, deletion {self.deletion:.2f}"


def faithfulness(
    judge: Callable[[np.ndarray], np.ndarray], view: np.ndarray, values: np.ndarray, target: int, *, steps: int = 16
) -> Faithfulness:
    """How well the map `values` (h, w) of class `target` explains what `judge` says of `view`, uint8 (S, S, 3).

    `judge`: an engine, or whatever gives probabilities (N, K) of prepared images. `steps`: parts of equally many
    pixels; 2 (steps + 1) images are judged.
    """
    check_range("steps", steps, 1)
    blurred = blur(view)
    rank = np.empty(view.shape[0] * view.shape[1], dtype=np.int64)
    rank[np.argsort(-upsampled(values, *view.shape[:2]).ravel(), kind="stable")] = np.arange(rank.size)
    cuts = [rank.size * step // steps for step in range(steps + 1)]
    first = [(rank < cut).reshape(*view.shape[:2], 1) for cut in cuts]
    inserted = _curve(judge, [np.where(mask, view, blurred) for mask in first], target)
    deleted = _curve(judge, [np.where(mask, blurred, view) for mask in first], target)
    return Faithfulness(insertion=area(inserted), deletion=area(deleted))


def blur(view: np.ndarray) -> np.ndarray:
    """The image without its detail, uint8 (S, S, 3)."""
    return np.array(Image.fromarray(view).filter(ImageFilter.GaussianBlur(BLUR * view.shape[0])))


def area(curve: np.ndarray) -> float:
    """Under a curve over [0, 1], by trapezia.

    >>> area(np.array([0.0, 1.0, 1.0]))
    0.75
    """
    return float((curve[1:] + curve[:-1]).mean() / 2)


def _curve(judge: Callable[[np.ndarray], np.ndarray], images: list[np.ndarray], target: int) -> np.ndarray:
    parts = (np.stack(images[start : start + AT_A_TIME]) for start in range(0, len(images), AT_A_TIME))
    return np.concatenate([judge(part)[:, target].astype(np.float64) for part in parts])

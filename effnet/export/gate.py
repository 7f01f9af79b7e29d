"""Does the exported file still answer as the model does? Judged on real images, before anybody may use it.

Two questions, because there are two kinds of difference:

- `float32` computes the same in another order. Its probabilities may differ by `PROBABILITY` (1e-4), its logits by
  `LOGIT` (1e-3) of the largest, and the most probable class must be the same on every image. Logits here are
  logarithms of probabilities less their mean over the classes. Probabilities alone would hide a wrong graph wherever a
  thousand classes are all improbable, and logits alone would refuse what nobody can notice in one of a thousand.
- `bfloat16` and `int8` round on purpose. They may cost `max_drop` points of accuracy on labelled images. Where there
  are no labels, the float32 model's own probabilities stand for them: the drop is the probability that it gives up
  where the answers differ, so that a tie which falls the other way costs little and a collapse all. The interval is a
  bootstrap over images, 95 %; the mean decides. Rounding cannot excuse a wrong graph: the same graph must pass in
  float32 first (`deploy`).

Class activation maps, where a file has them, may differ by `MAP` of their size: root mean squares over the maps of the
most probable class of some images. The bounds of the lower precisions only tell a rounded map from another one.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effnet.export.artefact import log
from effnet.images import decode, prepare
from effnet.spec import Preprocess
from effnet.value import UsageError, Value

PROBABILITY, LOGIT = 1e-4, 1e-3
MAP = {"float32": 1e-3, "bfloat16": 0.3, "int8": 0.6}
MAP_IMAGES = 16
RESAMPLES = 1000
LEAST_IMAGES = 10
BATCH = 32

# photographs that come inside Python packages, in colour, nothing drawn; found without importing the packages
PHOTOS = {
    "skimage": tuple(
        f"data/{name}"
        for name in (
            "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
            "motorcycle_right.png", "retina.jpg", "rocket.jpg",
        )
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Real images to judge by. `views`: prepared, uint8 (N, size, size, 3). `labels`: int64 (N,), where known."""

    source: str
    views: np.ndarray
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.views) < LEAST_IMAGES:
            raise UsageError(f"{self.source} has {len(self.views)} images; the gate needs at least {LEAST_IMAGES}.")

    def __len__(self) -> int:
        return len(self.views)


@dataclass(frozen=True, kw_only=True)
class Verdict(Value):
    """What the gate saw, and why it refuses (`reasons`; none if it does not).

    `probability_error`: the largest difference. `logit_error`: likewise, over the largest logit. `same_top1`: images.
    `accuracy`, `accuracy_float32`: shares; without labels, expected ones. `drop_points`: their difference in points,
    with its 95 % interval. `map_error`: see `MAP`; None without maps.
    """

    precision: str
    source: str
    images: int
    labelled: bool
    probability_error: float
    logit_error: float
    same_top1: int
    accuracy_float32: float
    accuracy: float
    drop_points: float
    drop_interval: tuple[float, float]
    max_drop: float
    map_error: float | None = None
    reasons: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the artefact may be used."""
        return not self.reasons

    def __str__(self) -> str:
        low, high = self.drop_interval
        what = "accuracy" if self.labelled else "expected accuracy"
        return (
            f"{self.images} images of {self.source}: same top-1 on {self.same_top1}, {what} {self.accuracy:.2%} "
            f"(float32 {self.accuracy_float32:.2%}, drop {self.drop_points:.2f} points, {low:.2f} to {high:.2f}), "
            f"probabilities within {self.probability_error:.1e}, logits within {self.logit_error:.1e}"
            + (f", maps within {self.map_error:.1e}" if self.map_error is not None else "")
        )


def answers(engine: Callable[[np.ndarray], np.ndarray], views: np.ndarray) -> np.ndarray:
    """Probabilities (N, K) of all `views`, a batch at a time; the last image alone: both ways that a batch comes."""
    cuts = [*range(0, len(views) - 1, BATCH), len(views) - 1, len(views)]
    return np.concatenate([engine(views[a:b]) for a, b in itertools.pairwise(cuts) if b > a])


def judge(
    reference: np.ndarray, found: np.ndarray, samples: Samples, *, precision: str = "float32", max_drop: float = 1.0
) -> Verdict:
    """Compares probabilities, both (N, K): `reference` of the model in eager float32, `found` of its export."""
    if found.shape != reference.shape or not np.isfinite(found).all():
        shape = f"of shape {found.shape}, not {reference.shape}"
        reason = "its answers are " + (shape if found.shape != reference.shape else "not all finite")
        found, broken = np.full_like(reference, 1 / reference.shape[1]), (reason,)
    else:
        broken = ()
    top, top_found = reference.argmax(1), found.argmax(1)
    worth, worth_found = _worth(reference, top, samples), _worth(reference, top_found, samples)
    drop = 100 * (worth - worth_found)
    logits, logits_found = (values - values.mean(1, keepdims=True) for values in map(log, (reference, found)))
    probability_error = float(np.abs(reference - found).max())
    logit_error = float(np.abs(logits - logits_found).max() / np.abs(logits).max())
    same = int((top == top_found).sum())
    if broken:
        reasons = broken
    elif precision == "float32":
        reasons = tuple(_float_reasons(probability_error, logit_error, same, len(top)))
    else:
        wanted = f"{drop.mean():.2f} points of accuracy are lost; {max_drop:g} may be"
        reasons = (wanted,) if drop.mean() > max_drop else ()
    return Verdict(
        precision=precision,
        source=samples.source,
        images=len(samples),
        labelled=samples.labels is not None,
        probability_error=probability_error,
        logit_error=logit_error,
        same_top1=same,
        accuracy_float32=float(worth.mean()),
        accuracy=float(worth_found.mean()),
        drop_points=float(drop.mean()),
        drop_interval=bootstrap(drop),
        max_drop=max_drop,
        reasons=reasons,
    )


def with_maps(verdict: Verdict, reference: np.ndarray, found: np.ndarray) -> Verdict:
    """`verdict` and what the maps of the most probable classes say, both (N, h, w): of the model, of its export."""
    bound = MAP[verdict.precision]
    if found.shape != reference.shape or not np.isfinite(found).all():
        reason = f"its maps are of shape {found.shape}, not {reference.shape}, or not all finite"
        return verdict.replace(reasons=(*verdict.reasons, reason))
    error = float(np.sqrt(np.mean((found - reference) ** 2) / np.mean(reference**2)))
    reason = f"class activation maps differ by {error:.1e} of their size; {bound:g} is allowed"
    return verdict.replace(map_error=error, reasons=(*verdict.reasons, *([reason] if error > bound else ())))


def _worth(reference: np.ndarray, answers: np.ndarray, samples: Samples) -> np.ndarray:
    """How right each answer is, (N,): 0 or 1 by the labels, or the probability that the float32 model gives it."""
    if samples.labels is not None:
        return (answers == samples.labels).astype(np.float64)
    return reference[np.arange(len(answers)), answers].astype(np.float64)


def _float_reasons(probability_error: float, logit_error: float, same: int, images: int) -> Iterator[str]:
    if probability_error > PROBABILITY:
        yield f"probabilities differ by {probability_error:.1e}; {PROBABILITY:g} is allowed"
    if logit_error > LOGIT:
        yield f"logits differ by {logit_error:.1e} of the largest; {LOGIT:g} is allowed"
    if same < images:
        yield f"{images - same} of {images} images get another class"


def bootstrap(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of `values` (N,), over resampled images (Efron 1979).

    >>> bootstrap(np.ones(20))
    (1.0, 1.0)
    """
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


# --- images to judge by ---------------------------------------------------------------------------------------------


def photographs(preprocess: Preprocess) -> Samples:
    """The photographs inside scikit-image and scikit-learn: each whole, and each of its quarters. No labels.

    `UsageError` where neither package is installed.
    """
    views = [prepare(part, preprocess) for path in _photo_files() for part in _whole_and_quarters(decode(path))]
    if not views:
        raise UsageError(
            "the gate compares answers on real images: name labelled ones (--data DATA), or install scikit-image, "
            "whose photographs serve where there are none: pip install 'effnet[export]'"
        )
    return Samples(source="photographs of scikit-image and scikit-learn", views=np.stack(views))


def _photo_files() -> Iterator[Path]:
    for package, files in PHOTOS.items():
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or ()) if found else ():
            yield from (path for path in (Path(folder, name) for name in files) if path.is_file())


def _whole_and_quarters(image: np.ndarray) -> Iterator[np.ndarray]:
    height, width = (side // 2 for side in image.shape[:2])
    yield image
    yield from (image[y : y + height, x : x + width] for y in (0, height) for x in (0, width))

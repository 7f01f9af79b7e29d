"""How good is a model on labelled images, how sure is that number, and where does it fail?

`predict_source` runs the model once over every image (`Scores`), `measure` turns scores into an `Evaluation`,
`evaluate` is both. All numbers are given for all images and, where the source has groups, for each group.

A prediction is the most probable class (argmax of the logits; with two classes that is a threshold of 0.5).
The metrics:
- accuracy; top5 (six classes or more); macro_f1: mean over the classes that occur as label or prediction.
- auroc: of the second of two classes; of more, the mean over the classes that can be told from the rest.
- nll: in nats. ece: expected calibration error of the top label, 15 bins (Guo et al. 2017).
- weighted_accuracy, where sample weights are not all 1: the share of the total weight that is classified correctly.
- majority_accuracy, majority_macro_f1, certain_accuracy, where targets are soft: against the most probable class of the
  target, and on the images whose target is certain. For ELPV: y = [p > 0.5], and p in {0, 1} (Deitsch et al. 2019).
- intervals: percentile bootstrap over images (Efron 1979), 95 %. It covers the choice of test images and nothing else.
A number that is not defined (AUROC of a group that holds one class) is None.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional import classification as tm

from effnet import cluster
from effnet.data import Cache, batches
from effnet.engine import evaluating, logits
from effnet.network import Model
from effnet.prediction_files import write_table
from effnet.samples import Source
from effnet.value import UsageError, Value, check_range

BINS = 15  # of the reliability diagram; Guo et al. 2017
LEVEL = 0.95
RESAMPLES = 1000
TOP5_CLASSES = 6  # with fewer, top-5 accuracy is (nearly) certain


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What a model said about N images: `logits` float32 (N, K), beside what is known about each of them.

    `labels` int64 (N,), `weights` float32 (N,), `soft` float32 (N, K) or None, as in `Source`.
    """

    source: str
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    logits: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    soft: np.ndarray | None = None
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        n, k = len(self.ids), len(self.classes)
        if n == 0:
            raise UsageError(f"{self.source} has no images to evaluate.")
        if self.logits.shape != (n, k) or len(self.labels) != n or len(self.weights) != n:
            raise UsageError(
                f"{self.source}: logits {self.logits.shape}, {len(self.labels)} labels and {len(self.weights)} weights "
                f"do not fit {n} images of {k} classes."
            )
        broken = np.flatnonzero(~np.isfinite(self.logits).all(axis=1))
        if len(broken):
            raise UsageError(
                f"the model's outputs are not finite for {len(broken)} of {n} images, {self.ids[broken[0]]} the first: "
                "its weights are broken, or its training diverged."
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def probabilities(self) -> np.ndarray:
        """Softmax of the logits, float64 (N, K)."""
        return torch.from_numpy(self.logits).double().softmax(dim=1).numpy()

    @property
    def predicted(self) -> np.ndarray:
        """The most probable class, int64 (N,); of equals the first."""
        return self.logits.argmax(axis=1)

    def subset(self, keep: np.ndarray, source: str) -> "Scores":
        """The images where `keep`, bool (N,), says so, as the scores of `source`."""
        at = np.flatnonzero(keep)
        return replace(
            self,
            source=source,
            ids=tuple(self.ids[i] for i in at),
            logits=self.logits[at],
            labels=self.labels[at],
            weights=self.weights[at],
            soft=None if self.soft is None else self.soft[at],
            groups=None if self.groups is None else tuple(self.groups[i] for i in at),
        )


@dataclass(frozen=True, kw_only=True)
class ClassScore(Value):
    """One row of the per-class table; None where nothing was predicted (precision) or nothing is there (recall)."""

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    predicted: int


@dataclass(frozen=True, kw_only=True)
class Bin(Value):
    """One bar of the reliability diagram: the images whose top probability is in [low, high)."""

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class Interval(Value):
    """A percentile bootstrap interval of `level`."""

    low: float
    high: float
    level: float = LEVEL


@dataclass(frozen=True, kw_only=True)
class Evaluation(Value):
    """The numbers of one source, or of one group of it (then `groups` is empty).

    `confusion`: images, by true class in rows and predicted class in columns.
    """

    source: str
    images: int
    classes: tuple[str, ...]
    metrics: dict[str, float | None]
    intervals: dict[str, Interval]
    per_class: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    calibration: tuple[Bin, ...]
    groups: dict[str, "Evaluation"] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. `UsageError` for an unknown or missing field."""
        nested = {"intervals": Interval, "groups": cls}
        rebuilt = {
            name: {key: nested[name].from_dict(value) for key, value in data[name].items()}
            for name in nested.keys() & (data.keys() if isinstance(data, Mapping) else ())
        }
        return super().from_dict({**data, **rebuilt} if rebuilt else data)


# --- from a model to scores -----------------------------------------------------------------------------------------


class Unfinished(Exception):
    """`evaluate` was asked to stop before it had seen every image."""


def evaluate(
    model: Model,
    source: Source,
    *,
    batch: int = 64,
    workers: int | None = None,
    device: str | torch.device | None = None,
    turns: bool = False,
    bootstrap: int = RESAMPLES,
    seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    cache: Cache | None = None,
) -> Evaluation:
    """`predict_source`, then `measure`: the arguments and errors are theirs.

    Processes that train together take the batches in turn, and all get the same numbers: every image counts once,
    whatever their number. `stop` is asked after each batch; once it says yes, anywhere, `Unfinished` is raised.
    `cache`: decoded images, for whoever evaluates on the same source again.
    """
    mine = _outputs(
        model, source, batch=batch, workers=workers, device=device, turns=turns, on_batch=on_batch, stop=stop,
        cache=cache, rank=cluster.rank(), world=cluster.world(),
    )  # fmt: skip
    parts = cluster.gathered(mine)

    def judged() -> Evaluation | None:
        outputs = [output for part in parts for output in part]
        whole = sum(len(indices) for indices, _ in outputs) == len(source)
        return measure(_scores(source, outputs), bootstrap=bootstrap, seed=seed) if whole else None

    if (evaluation := cluster.first(judged)) is None:
        raise Unfinished
    return evaluation


def predict_source(
    model: Model,
    source: Source,
    *,
    batch: int = 64,
    workers: int | None = None,
    device: str | torch.device | None = None,
    turns: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> Scores:
    """The model's logits for every image of `source`, each exactly once, in the source's order.

    `device`: where the model is moved first, if given. `turns`: logits are means over the eight flips and quarter turns
    of each image. `on_batch(done, total)` is called after each batch. Training mode is left as it was. `UsageError`
    when the class lists differ; `ImageError` for an image that cannot be decoded: a metric that leaves images out would
    not be comparable.
    """
    outputs = _outputs(model, source, batch=batch, workers=workers, device=device, turns=turns, on_batch=on_batch)
    return _scores(source, outputs)


Output = tuple[np.ndarray, np.ndarray]  # of one batch: positions in the source (B,), logits (B, K)


def _outputs(
    model: Model,
    source: Source,
    *,
    batch: int,
    workers: int | None,
    device: str | torch.device | None,
    turns: bool,
    on_batch: Callable[[int, int], None] | None,
    stop: Callable[[], bool] = lambda: False,
    cache: Cache | None = None,
    rank: int = 0,
    world: int = 1,
) -> list[Output]:
    """What the model says to the batches whose turn it is; fewer when `stop` says yes."""
    check_classes(model, source)
    if device is not None:
        model.to(device)
    preprocess = model.preprocess
    seen: list[Output] = []
    with evaluating(model):
        for part in batches(
            source, size_px=preprocess.size, batch=batch, preprocess=preprocess, train=False, workers=workers,
            cache=cache, rank=rank, world=world,
        ):  # fmt: skip
            if stop():
                break
            seen.append((part.indices.numpy(), logits(model, part.images, turns=turns).numpy()))
            if on_batch is not None:
                on_batch(sum(len(indices) for indices, _ in seen), len(source))
    return seen


def _scores(source: Source, outputs: Sequence[Output]) -> Scores:
    """The outputs in the order of `source`."""
    outputs = sorted(outputs, key=lambda output: int(output[0][0]))
    order = np.concatenate([indices for indices, _ in outputs])
    assert np.array_equal(order, np.arange(len(source))), "an image was left out, repeated or moved"
    return Scores(
        source=source.name,
        classes=source.classes,
        ids=source.ids,
        logits=np.concatenate([values for _, values in outputs]),
        labels=source.labels,
        weights=source.weights,
        soft=source.soft,
        groups=source.groups,
    )


def check_classes(model: Model, source: Source) -> None:
    """Refuses images without labels, no images, and a class list that is not the model's, in the same order."""
    if len(source) == 0:
        raise UsageError(f"{source.name} has no images to evaluate.")
    if not source.classes:
        raise UsageError(f"{source.name} has no labels to compare with; `effnet predict` needs none.")
    if model.labels is None and model.num_classes != len(source.classes):
        raise UsageError(
            f"the model has {model.num_classes} outputs, without names; {source.name} has {len(source.classes)} "
            f"classes: {_listed(source.classes)}."
        )
    if model.labels is not None and model.labels != source.classes:
        sides = (set(model.labels) - set(source.classes), set(source.classes) - set(model.labels))
        if not any(sides):
            raise UsageError(
                f"{source.name} has the model's classes in another order: {_listed(source.classes)}; "
                f"the model has {_listed(model.labels)}. Open the data with the model's class list."
            )
        only_model, only_source = (_listed(sorted(side)) for side in sides)
        raise UsageError(
            f"{source.name} does not have the {len(model.labels)} classes of the model. "
            f"Only in the model: {only_model}. Only in {source.name}: {only_source}."
        )


def _listed(names: tuple[str, ...] | list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(map(repr, names[:most])) + more) if names else "nothing"


# --- from scores to numbers -----------------------------------------------------------------------------------------


def measure(scores: Scores, *, bootstrap: int = RESAMPLES, seed: int = 0) -> Evaluation:
    """All numbers of `scores`, and of each of its groups. `bootstrap`: resamples for the intervals, 0 for none.

    >>> scores = Scores(source="test", classes=("cat", "dog"), ids=("a", "b"), labels=np.array([0, 1]),
    ...                 logits=np.array([[2, 0], [1, 0]], dtype=np.float32), weights=np.ones(2, dtype=np.float32))
    >>> measure(scores).metrics["accuracy"]
    0.5
    """
    check_range("bootstrap", bootstrap, 0)
    weighted = bool((scores.weights != 1).any())
    soft = scores.soft is not None and bool((scores.soft.max(axis=1) < 1).any())
    names = sorted(set(scores.groups or ()))
    groups = {name: scores.subset(np.array(scores.groups) == name, name) for name in names}
    return replace(
        _evaluation(scores, bootstrap, seed, weighted=weighted, soft=soft),
        groups={
            name: _evaluation(group, bootstrap, seed, weighted=weighted, soft=soft) for name, group in groups.items()
        },
    )


def _evaluation(scores: Scores, bootstrap: int, seed: int, *, weighted: bool, soft: bool) -> Evaluation:
    correct = scores.predicted == scores.labels
    confusion = _confusion(scores)
    metrics = _metrics(scores)
    weightings = {"accuracy": np.ones(len(scores))}
    if weighted:
        weightings["weighted_accuracy"] = scores.weights.astype(float)
        metrics["weighted_accuracy"] = _weighted_mean(correct, scores.weights)
    if soft and scores.soft is not None:
        metrics |= _against_soft(scores, scores.soft)
    return Evaluation(
        source=scores.source,
        images=len(scores),
        classes=scores.classes,
        metrics=metrics,
        intervals=_intervals(correct, weightings, bootstrap, seed),
        per_class=_per_class(scores, confusion),
        confusion=tuple(map(tuple, confusion.tolist())),
        calibration=reliability(scores),
    )


def _metrics(scores: Scores) -> dict[str, float | None]:
    """What does not need weights or soft targets."""
    k, labels = len(scores.classes), torch.from_numpy(scores.labels)
    probabilities, predicted = torch.from_numpy(scores.probabilities), torch.from_numpy(scores.predicted)
    metrics: dict[str, float | None] = {"accuracy": _mean(scores.predicted == scores.labels)}
    if k >= TOP5_CLASSES:
        metrics["top5"] = float(tm.multiclass_accuracy(probabilities, labels, k, top_k=5, average="micro"))
    metrics["macro_f1"] = _macro_f1(predicted, labels, k)
    metrics["auroc"] = _auroc(probabilities, labels)
    metrics["nll"] = float(torch.nn.functional.cross_entropy(torch.from_numpy(scores.logits).double(), labels))
    # torchmetrics gives a probability of exactly 1 a bin of its own: kept just below 1 (in float32, as it computes)
    below_one = probabilities.clamp(max=1 - 2**-24)
    metrics["ece"] = float(tm.multiclass_calibration_error(below_one, labels, k, n_bins=BINS, norm="l1"))
    return metrics


def _macro_f1(predicted: Tensor, labels: Tensor, classes: int) -> float:
    return float(tm.multiclass_f1_score(predicted, labels, classes, average="macro"))


def _auroc(probabilities: Tensor, labels: Tensor) -> float | None:
    """Of the second class of two; else the mean of one against the rest over the classes for which both sides exist."""
    k = probabilities.shape[1]
    areas = []
    for index in [1] if k == 2 else range(k):
        positive = (labels == index).long()
        if 0 < positive.sum() < len(positive):
            areas.append(float(tm.binary_auroc(probabilities[:, index].contiguous(), positive)))
    return float(np.mean(areas)) if areas else None


def _against_soft(scores: Scores, soft: np.ndarray) -> dict[str, float | None]:
    """Against the most probable class of soft targets (N, K), and on the images whose target is certain."""
    majority, certain = soft.argmax(axis=1), soft.max(axis=1) == 1
    correct = scores.predicted == majority
    predicted, wanted = torch.from_numpy(scores.predicted), torch.from_numpy(majority)
    return {
        "majority_accuracy": _mean(correct),
        "majority_macro_f1": _macro_f1(predicted, wanted, len(scores.classes)),
        "certain_accuracy": _mean(correct[certain]) if certain.any() else None,
    }


def _confusion(scores: Scores) -> np.ndarray:
    """Images by true (rows) and predicted (columns) class, int64 (K, K)."""
    predicted, labels = torch.from_numpy(scores.predicted), torch.from_numpy(scores.labels)
    return tm.multiclass_confusion_matrix(predicted, labels, len(scores.classes)).numpy()


def _per_class(scores: Scores, confusion: np.ndarray) -> tuple[ClassScore, ...]:
    predicted, labels = torch.from_numpy(scores.predicted), torch.from_numpy(scores.labels)
    precision, recall, f1 = (
        metric(predicted, labels, len(scores.classes), average="none").tolist()
        for metric in (tm.multiclass_precision, tm.multiclass_recall, tm.multiclass_f1_score)
    )
    support, chosen = confusion.sum(axis=1).tolist(), confusion.sum(axis=0).tolist()
    return tuple(
        ClassScore(
            label=label,
            precision=precision[i] if chosen[i] else None,
            recall=recall[i] if support[i] else None,
            f1=f1[i] if chosen[i] or support[i] else None,
            support=support[i],
            predicted=chosen[i],
        )
        for i, label in enumerate(scores.classes)
    )


def reliability(scores: Scores) -> tuple[Bin, ...]:
    """The reliability diagram: images by top probability in `BINS` equal bins, with how often each bin is right.

    The expected calibration error is the mean of |confidence - accuracy| over the bins, weighted by their images.
    """
    edges = np.linspace(0, 1, BINS + 1, dtype=np.float32)
    confidence = scores.probabilities.max(axis=1)
    correct = scores.predicted == scores.labels
    index = np.clip(np.searchsorted(edges, confidence.astype(np.float32), side="right") - 1, 0, BINS - 1)
    rows = [index == i for i in range(BINS)]
    return tuple(
        Bin(
            low=i / BINS,
            high=(i + 1) / BINS,
            images=int(inside.sum()),
            confidence=_mean(confidence[inside]) if inside.any() else None,
            accuracy=_mean(correct[inside]) if inside.any() else None,
        )
        for i, inside in enumerate(rows)
    )


def _intervals(
    correct: np.ndarray, weightings: Mapping[str, np.ndarray], bootstrap: int, seed: int
) -> dict[str, Interval]:
    """An interval for the mean of `correct` under each of `weightings`; none where no resample has any weight."""
    random = np.random.default_rng(seed)
    means = {name: bootstrap_means(correct, weights, bootstrap, random) for name, weights in weightings.items()}
    return {name: percentiles(values) for name, values in means.items() if len(values)}


def bootstrap_means(
    values: np.ndarray, weights: np.ndarray, resamples: int, random: np.random.Generator, block: int = 2**22
) -> np.ndarray:
    """Weighted means of `resamples` samples of the N rows, drawn with replacement; float64 (resamples,).

    At most `block` draws are held at once. A sample whose weights are all 0 has no mean and is left out.
    """
    n, rows = len(values), max(1, block // len(values))
    weighted, means = values * weights, [np.empty(0)]
    for start in range(0, resamples, rows):
        drawn = random.integers(0, n, size=(min(rows, resamples - start), n))
        total = weights[drawn].sum(axis=1)
        means.append(weighted[drawn].sum(axis=1)[total > 0] / total[total > 0])
    return np.concatenate(means)


def percentiles(means: np.ndarray, level: float = LEVEL) -> Interval:
    """The middle `level` of bootstrap means."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high), level=level)


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> float | None:
    total = weights.sum(dtype=float)
    return float((values * weights).sum(dtype=float) / total) if total > 0 else None


# --- files ----------------------------------------------------------------------------------------------------------


def write_predictions(path: str | Path, scores: Scores) -> None:
    """A CSV file with one row per image: id, label, predicted, `p(<class>)` for every class, weight, group."""
    groups = scores.groups or ("",) * len(scores)
    names, probabilities = np.array(scores.classes), scores.probabilities
    labels, predicted = names[scores.labels].tolist(), names[scores.predicted].tolist()
    header = ["id", "label", "predicted", *(f"p({name})" for name in scores.classes), "weight", "group"]
    columns = (scores.ids, labels, predicted, probabilities.tolist(), scores.weights.tolist(), groups)
    rows = zip(*columns, strict=True)
    write_table(path, header, ([a, b, c, *of_class, weight, group] for a, b, c, of_class, weight, group in rows))

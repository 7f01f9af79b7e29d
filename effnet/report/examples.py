"""Which pictures say most about a model, and where did it look? Mistakes it was sure of, doubts, and typical successes.

The images come from the data by their id and are shown as the network saw them: after its `Preprocess`, so that nothing
is judged by a part that was cropped away.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from effnet.checkpoint import to_model
from effnet.explain import explain, overlay
from effnet.images import ImageError, prepare
from effnet.network import Model
from effnet.runs import Judged, Run
from effnet.samples import Source, Splits
from effnet.sources import open_data
from effnet.value import UsageError

WRONG, UNSURE, CORRECT = 6, 3, 3  # pictures of each kind


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """An image as the network saw it, uint8 (size, size, 3), and the evidence for the predicted class over it."""

    judged: Judged
    view: np.ndarray
    evidence: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """The pictures by kind; `unreadable`: (id, reason) of those that should be here, too."""

    wrong: tuple[Example, ...]
    unsure: tuple[Example, ...]
    correct: tuple[Example, ...]
    unreadable: tuple[tuple[str, str], ...]


def find_examples(run: Run, data: Splits | None) -> Examples:
    """The pictures of a run that was evaluated, from `data` or, if None, from the run's data, opened again by its name.

    `UsageError` when there are no weights, or the data is not there any more.
    """
    if isinstance(run.saved, UsageError):
        raise run.saved
    model = to_model(run.saved)
    places = _places(data or open_data(str(run.start["data"]), classes=run.plan.classes, **run.cut))
    unreadable: list[tuple[str, str]] = []

    def shown(rows: Iterable[Judged]) -> Iterator[Example]:
        for row in rows:
            if row.id not in places:
                unreadable.append((row.id, "it is not in the data any more"))
                continue
            try:
                yield _example(model, row, *places[row.id])
            except ImageError as error:
                unreadable.append((row.id, error.reason))

    wrong, unsure, correct = (tuple(shown(rows)) for rows in chosen(run.predictions))
    return Examples(wrong=wrong, unsure=unsure, correct=correct, unreadable=tuple(unreadable))


def chosen(rows: Sequence[Judged]) -> tuple[list[Judged], list[Judged], list[Judged]]:
    """The surest mistakes; of the others the least confident; and the surest successes, of each class in turn."""
    mistakes = sorted((row for row in rows if not row.correct), key=lambda row: -row.confidence)[:WRONG]
    taken = {row.id for row in mistakes}
    doubts = sorted((row for row in rows if row.id not in taken), key=lambda row: row.confidence)[:UNSURE]
    taken |= {row.id for row in doubts}
    by_class: dict[str, list[Judged]] = {}
    for row in sorted((row for row in rows if row.correct and row.id not in taken), key=lambda row: -row.confidence):
        by_class.setdefault(row.label, []).append(row)
    ranks = [(rank, row) for ranked in by_class.values() for rank, row in enumerate(ranked[:CORRECT])]
    successes = [row for _, row in sorted(ranks, key=lambda pair: pair[0])][:CORRECT]
    return mistakes, doubts, successes


def _places(data: Splits) -> dict[str, tuple[Source, int]]:
    """Where each image is, by its id."""
    return {name: (part, index) for part in data.parts().values() for index, name in enumerate(part.ids)}


def _example(model: Model, row: Judged, source: Source, index: int) -> Example:
    """`ImageError` when the image cannot be decoded."""
    image = source.image(index)
    view = prepare(image, model.preprocess)
    return Example(judged=row, view=view, evidence=overlay(view, explain(model, image, target=row.predicted).map))

"""What is in these files? One `Prediction` per input, in order, and a broken file costs only its own row.

An image goes through `decode` and `prepare` on a few threads, at most two batches ahead of the model, then through
`normalise` and the model a batch at a time, all by the `Preprocess` that belongs to the weights. So a folder of a
million images needs the memory of a few batches.
"""

import csv
import itertools
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import torch

from effnet.engine import evaluating, label_names, logits
from effnet.files import write_atomically
from effnet.images import ImageError, decode, image_files, prepare
from effnet.network import Model
from effnet.spec import Preprocess
from effnet.value import UsageError, Value, check_choice, check_range

BATCHES_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class Prediction(Value):
    """The `labels` that a model finds most probable in the image at `path`, best first, or the `error` that forbade it.

    `probabilities`: softmax over all classes, so they sum to 1 only when all classes are listed.
    """

    path: str
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.probabilities) or bool(self.labels) == bool(self.error):
            raise UsageError(f"{self.path}: a prediction has either an error or a probability for every label.")


def predict(
    model: Model,
    paths: Sequence[str | Path],
    *,
    top_k: int = 5,
    batch: int = 32,
    workers: int = 2,
    device: str | torch.device | None = None,
    on_error: Literal["report", "error"] = "report",
    turns: bool = False,
) -> Generator[Prediction]:
    """The `top_k` most probable labels (all, if there are fewer) of every image in `paths`, in the order of `expand`.

    `on_error`: an image that cannot be decoded becomes a row with an `error`, or (`"error"`) raises its `ImageError`
    after the rows before it were yielded. `device`: where the model is moved first, if given. `turns`: as in `logits`.
    A path that does not exist or a folder without images is a `UsageError` at once, before any image is read.
    """
    check_range("top_k", top_k, 1)
    check_range("batch", batch, 1)
    check_range("workers", workers, 1)
    check_choice("on_error", on_error, ("report", "error"))
    files = expand(paths)
    if device is not None:
        model.to(device)
    return _predictions(model, files, min(top_k, model.num_classes), batch, workers, on_error, turns)


def expand(paths: Sequence[str | Path]) -> list[Path]:
    """The files that `paths` stand for: a file for itself, whatever its name; a folder for all images in it, sorted.

    `UsageError` for a path that does not exist, a folder without images, or no paths at all.
    """
    if not paths:
        raise UsageError("no image was named; give files or folders.")
    files = []
    for path in paths:
        found = image_files(path)
        if not found:
            raise UsageError(f"{path} has no images in it.")
        files += found
    return files


def _predictions(
    model: Model, files: Sequence[Path], top_k: int, batch: int, workers: int, on_error: str, turns: bool
) -> Generator[Prediction]:
    names = label_names(model)
    batches = [files[start : start + batch] for start in range(0, len(files), batch)]
    for paths, views in zip(batches, _views(batches, model.preprocess, workers), strict=True):
        ranked = _ranked(model, [view for view in views if not isinstance(view, ImageError)], top_k, turns)
        for path, view in zip(paths, views, strict=True):
            if not isinstance(view, ImageError):
                probabilities, classes = next(ranked)
                labels = tuple(names[index] for index in classes)
                yield Prediction(path=str(path), labels=labels, probabilities=tuple(probabilities))
            elif on_error == "report":
                yield Prediction(path=str(path), error=view.reason)
            else:
                raise view


def _views(
    batches: Sequence[Sequence[Path]], preprocess: Preprocess, workers: int
) -> Iterator[list[np.ndarray | ImageError]]:
    """The views of one batch after the other, in order, while the next ones are being made."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="effnet-predict")
    ahead: deque[list[Future[np.ndarray | ImageError]]] = deque()
    try:
        for paths in batches:
            ahead.append([pool.submit(_view, path, preprocess) for path in paths])
            if len(ahead) > BATCHES_AHEAD:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)  # also when nobody asks for the rest


def _view(path: Path, preprocess: Preprocess) -> np.ndarray | ImageError:
    """The model's view of a file, uint8 (size, size, 3), or why there is none (a value: it must keep its place)."""
    try:
        return prepare(decode(path), preprocess)
    except ImageError as error:
        return error


def _ranked(
    model: Model, views: Sequence[np.ndarray], top_k: int, turns: bool
) -> Iterator[tuple[list[float], list[int]]]:
    """(probabilities, class indices) of the `top_k` best classes of each view, best first."""
    if not views:
        return iter(())
    with evaluating(model):
        scores = logits(model, torch.from_numpy(np.stack(views)), turns=turns)
    probabilities, classes = scores.double().softmax(dim=1).topk(top_k)  # (N, K) -> (N, top_k)
    return zip(probabilities.tolist(), classes.tolist(), strict=True)


# --- files ----------------------------------------------------------------------------------------------------------


def write_csv(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """One row per prediction: path, label, probability, label_2, probability_2, ... and error."""
    rows = list(predictions)
    ranks = range(1, max((len(row.labels) for row in rows), default=1) + 1)
    header = [name if rank == 1 else f"{name}_{rank}" for rank in ranks for name in ("label", "probability")]

    def cells(row: Prediction) -> list[Any]:
        ranked = [cell for pair in zip(row.labels, row.probabilities, strict=True) for cell in pair]
        return [row.path, *ranked, *[""] * (len(header) - len(ranked)), row.error or ""]

    write_table(path, ["path", *header, "error"], map(cells, rows))


def write_json(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """A list of objects with the fields of `Prediction`, one line each."""
    rows = ",\n".join(json.dumps(row.to_dict()) for row in predictions)
    _write(path, lambda file: file.write(f"[\n{rows}\n]\n"))


def write_table(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file that appears when it is complete; missing folders are made.

    File names that are not UTF-8 are written as the bytes they are.
    """
    _write(path, lambda file: csv.writer(file, lineterminator="\n").writerows(itertools.chain([header], rows)))


def _write(path: str | Path, content: Callable[[TextIO], Any]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            content(file)

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), write)

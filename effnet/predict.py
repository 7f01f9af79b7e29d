"""What is in these images? One `Prediction` per input, in order, and a broken file costs only its own row.

Inputs come as a stream (`inputs.py`) and are taken a batch at a time: each image goes through `decode` and `prepare` on
a few threads, at most two batches ahead of the engine, which gives probabilities. So a folder of a million images needs
the memory of a few batches. A batch is always the same inputs, whatever is broken, wherever and how often it is run:
that is what makes the rows of a resumed or distributed job (`predict_job.py`) those of an unbroken one.
"""

import dataclasses
import hashlib
import math
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from effnet import families
from effnet.cost import cost
from effnet.data import default_workers
from effnet.engine import Engine, TorchEngine, open_engine
from effnet.images import ImageError, prepare
from effnet.inputs import Input, batched, inputs
from effnet.network import Model
from effnet.plan import memory_bytes
from effnet.spec import Network, Preprocess
from effnet.value import UsageError, Value, check_choice, check_range

BATCHES_AHEAD = 2
MEMORY_SHARE = 1 / 8  # of the device, for the maps of one batch
MOST_IMAGES = {"cpu": 32, "cuda": 256}  # a batch above this is no faster

View = np.ndarray | ImageError  # an error is a value here: it must keep its place


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
    model: Model | Engine,
    paths: Sequence[str | Path],
    *,
    top_k: int = 5,
    batch: int | None = None,
    workers: int | None = None,
    device: str | torch.device | None = None,
    on_error: Literal["report", "error"] = "report",
    turns: bool = False,
) -> Generator[Prediction]:
    """The `top_k` most probable labels (all, if there are fewer) of every image that `paths` stand for (`inputs.py`).

    `batch`: images at a time; None: what fits (`batch_that_fits`). `workers`: threads that decode. `on_error`: an image
    that cannot be decoded becomes a row with an `error`, or (`"error"`) raises its `ImageError` after the rows before
    it were yielded. `device`, `turns`: for a `Model`, where it is moved first, if given, and as in `engine.logits`; an
    engine has decided both. A path that does not exist or a folder without images is a `UsageError` at once, before any
    image is read.
    """
    check_range("top_k", top_k, 1)
    check_range("batch", 1 if batch is None else batch, 1)
    check_range("workers", 1 if workers is None else workers, 1)
    check_choice("on_error", on_error, ("report", "error"))
    found = inputs(paths)
    if isinstance(model, Model):
        model = model if device is None else model.to(device)
        engine: Engine = TorchEngine(name=model.network.name, model=model, turns=turns)
    elif device is not None or turns:
        raise UsageError("device and turns are chosen when an engine is opened, not here.")
    else:
        engine = model
    rows = answers(engine, batched(found, batch or batch_that_fits(engine)), top_k=top_k, workers=workers)
    return _one_by_one(rows, stop=on_error == "error")


def answers(
    engine: Engine, batches: Iterable[Sequence[Input]], *, top_k: int, workers: int | None = None
) -> Generator[list[Prediction]]:
    """The predictions of one batch after the other, while the next ones are being decoded."""
    pool = ThreadPoolExecutor(workers or max(2, default_workers()), thread_name_prefix="effnet-predict")
    ahead: deque[tuple[Sequence[Input], list[Future[View]]]] = deque()

    def oldest() -> list[Prediction]:
        items, views = ahead.popleft()
        return _ranked(engine, items, [view.result() for view in views], top_k)

    try:
        for items in batches:
            ahead.append((items, [pool.submit(_view, item, engine.preprocess) for item in items]))
            if len(ahead) > BATCHES_AHEAD:
                yield oldest()
        while ahead:
            yield oldest()
    finally:
        pool.shutdown(cancel_futures=True)  # also when nobody asks for the rest


def _one_by_one(batches: Generator[list[Prediction]], *, stop: bool) -> Generator[Prediction]:
    try:
        for rows in batches:
            for row in rows:
                if stop and row.error:
                    raise ImageError(row.path, row.error)
                yield row
    finally:
        batches.close()


def _view(item: Input, preprocess: Preprocess) -> View:
    """The engine's view of an image, uint8 (size, size, 3), or why there is none."""
    try:
        return prepare(item.image(), preprocess)
    except ImageError as error:
        return error
    except MemoryError:
        return ImageError(item.name, "too large for the memory that is left")


def _ranked(engine: Engine, items: Sequence[Input], views: Sequence[View], top_k: int) -> list[Prediction]:
    """The rows of one batch; the engine sees only what could be read."""
    whole = [view for view in views if not isinstance(view, ImageError)]
    judged = iter(engine(np.stack(whole)).astype(np.float64)) if whole else iter(())
    names, rows = engine.labels, []
    for item, view in zip(items, views, strict=True):
        if isinstance(view, ImageError):
            rows.append(Prediction(path=item.name, error=view.reason))
            continue
        probabilities = next(judged)
        probabilities /= probabilities.sum()  # float32 sums to 1 within 1e-6
        best = np.argsort(-probabilities, kind="stable")[:top_k]
        if np.isnan(probabilities).any():
            rows.append(Prediction(path=item.name, error=f"{engine.name} gives no number for it (NaN)"))
        else:
            labels = tuple(names[index] for index in best)
            rows.append(Prediction(path=item.name, labels=labels, probabilities=tuple(probabilities[best].tolist())))
    return rows


# --- how many at a time ---------------------------------------------------------------------------------------------


def batch_that_fits(engine: Engine) -> int:
    """Images at a time: a power of two, at most `MOST_IMAGES`, whose maps take `MEMORY_SHARE` of the device at most.

    An engine that does not say its network is taken for one of the largest, EfficientNet-B7.
    """
    network, device = families.get("efficientnet_b7"), "cpu"
    if isinstance(engine, TorchEngine):
        network, device = engine.model.network, engine.model.classifier.weight.device.type
    room = MEMORY_SHARE * memory_bytes(device) / map_bytes(network, engine.preprocess.size)
    most = MOST_IMAGES.get(device, MOST_IMAGES["cpu"])
    return 2 ** int(math.log2(max(1, min(room, most))))


def map_bytes(network: Network, size: int) -> int:
    """An estimate of the memory that one image needs on its way through the network at `size` px, in bytes.

    The most that one unit holds: its input, the outputs of its convolutions and one of them again, normalised and
    activated; float32.
    """
    units: Any = cost(network, size).units
    return 4 * max(unit.in_channels * unit.in_size**2 + 2 * unit.activations for unit in units)


# --- engines -------------------------------------------------------------------------------------------------------


def opened_on(where: str | Path, *, turns: bool = False, device: str | None = None) -> Engine:
    """The engine at `where`, its model on `device`: cpu (None), cuda, or auto for cuda where there is one.

    `UsageError` for cuda and an engine that is no PyTorch model.
    """
    engine = open_engine(where, turns=turns)
    if isinstance(engine, TorchEngine):
        quickest = "cuda" if torch.cuda.is_available() else "cpu"
        engine.model.to(quickest if device == "auto" else device or "cpu")
    elif device not in (None, "auto", "cpu"):
        raise UsageError(f"{where} ({engine.name}) cannot be moved to {device}.")
    return engine


def identity(engine: Engine) -> str:
    """What the answers of `engine` depend on, as its name and a digest.

    Of preprocessing, labels and, of an engine that is a dataclass, all fields that are no function: tensors of a model,
    temperature, what an exported file says of its weights.
    """
    digest = hashlib.sha256(repr((engine.preprocess, engine.labels)).encode())
    for field in dataclasses.fields(engine) if dataclasses.is_dataclass(engine) else ():
        value = getattr(engine, field.name)
        if isinstance(value, Model):
            for name, tensor in sorted(value.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
        elif not callable(value):
            digest.update(repr((field.name, value)).encode())
    return f"{engine.name} ({digest.hexdigest()[:16]})"

"""What does a worker do? It decodes images, puts them through the model in batches, and answers one by one.

    python -m effnet.serve.worker MODEL OPTIONS      (jobs on stdin, answers on stdout, frames of `wire`)

A job is decoded as soon as it arrives, on two threads, while the model works on the batch before. A batch begins with
the first decoded image and ends when it is full or `max_delay_ms` later. The first frame says what the model is, or why
there is none.

Only here are the bytes of strangers looked into: a decoder that crashes takes this process down, and the front
(`pool`) starts another one. An exception in the model does the same, on purpose: it is not known what state it left.
"""

import importlib
import io
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from effnet.serve.options import Options
from effnet.serve.wire import frame, frames
from effnet.value import UsageError

if TYPE_CHECKING:
    from effnet.engine import Engine
    from effnet.export.artefact import Exported
    from effnet.network import Model

DECODERS = 2
CAM_PX = 320  # the longer side of the picture of a map, which has some 7 x 7 values of its own


@dataclass(frozen=True, kw_only=True, eq=False)
class Ready:
    """A decoded image. `image` is kept only for a map."""

    job: Mapping[str, Any]
    view: np.ndarray
    image: np.ndarray | None
    decode_ms: float


@dataclass(kw_only=True, eq=False)
class Worker:
    """One engine between a file of jobs and a file of answers. `model`: what is explained, None if nothing can be."""

    engine: "Engine"
    model: "Model | Exported | None"
    options: Options
    out: BinaryIO
    ready: "queue.Queue[Ready | None]" = field(default_factory=queue.Queue)  # None: there will be no more
    writing: threading.Lock = field(default_factory=threading.Lock)

    def run(self, jobs: BinaryIO) -> None:
        """Answers all jobs, to the end of the file."""
        threading.Thread(target=self._read, args=(jobs,), daemon=True).start()
        while (first := self.ready.get()) is not None:
            self._answer(self._batch(first))

    def _read(self, jobs: BinaryIO) -> None:
        with ThreadPoolExecutor(DECODERS, thread_name_prefix="effnet-decode") as decoders:
            for job, data in frames(jobs):
                decoders.submit(self._decode, job, data)
        self.ready.put(None)

    def _decode(self, job: Mapping[str, Any], data: bytes) -> None:
        """Puts the decoded image among the ready ones, or answers why it cannot be."""
        from effnet.images import ImageError, Limits, NotAnImage, TooManyPixels, decode, prepare

        start = time.perf_counter()
        try:
            limits = Limits(max_bytes=self.options.max_body_bytes, max_pixels=self.options.max_pixels)
            image = decode(data, limits)
            view = prepare(image, self.engine.preprocess)
        except ImageError as error:
            status, code = 422, "broken_image"
            if isinstance(error, NotAnImage):
                status, code = 415, "not_an_image"
            elif isinstance(error, TooManyPixels):
                status, code = 413, "image_too_large"
            self._refuse(job, status, code, f"this image {error.reason}" if status == 415 else error.reason)
        except Exception as error:  # out of memory, as a rule: the job must be answered all the same
            self._refuse(job, 500, "decoder_failed", f"the decoder failed on this image ({type(error).__name__})")
        else:
            kept = image if job["cam"] else None
            self.ready.put(Ready(job=job, view=view, image=kept, decode_ms=1e3 * (time.perf_counter() - start)))

    def _batch(self, first: Ready) -> list[Ready]:
        batch = [first]
        end = time.perf_counter() + self.options.max_delay_ms / 1e3
        while len(batch) < self.options.max_batch:
            left = end - time.perf_counter()
            try:
                more = self.ready.get(timeout=left) if left > 0 else self.ready.get_nowait()
            except queue.Empty:
                break
            if more is None:
                self.ready.put(None)  # for `run`
                break
            batch.append(more)
        return batch

    def _answer(self, batch: Sequence[Ready]) -> None:
        start = time.perf_counter()
        probabilities = self.engine(np.stack([one.view for one in batch]))  # (N, classes)
        model_ms = 1e3 * (time.perf_counter() - start)
        finished = []
        for place, (one, row) in enumerate(zip(batch, probabilities, strict=True)):
            best = np.argsort(-row, kind="stable")[: one.job["top_k"]]
            answer = {"id": one.job["id"], "classes": best.tolist(), "probabilities": row[best].tolist()}
            answer |= {"decode_ms": one.decode_ms, "model_ms": model_ms, "batch": len(batch), "place": place}
            finished.append((one, answer))
        for one, answer in sorted(finished, key=lambda pair: pair[0].image is not None):  # maps last: they take time
            self.send(answer, b"" if one.image is None else self._map(one.image, answer, one.job["target"]))

    def _map(self, image: np.ndarray, answer: dict[str, Any], target: int | None) -> bytes:
        """The evidence for class `target` (the first of the answer, if None) as a PNG; fills in `cam`."""
        from effnet.explain import explain

        assert self.model is not None, "the front asks for maps only where `hello` offers them"
        found = explain(self.model, image, target=answer["classes"][0] if target is None else target)
        answer["cam"] = {"label": found.label, "method": found.method, "tap": found.tap}
        return picture(found.map, image.shape[0], image.shape[1], self.engine)

    def _refuse(self, job: Mapping[str, Any], status: int, code: str, message: str) -> None:
        self.send({"id": job["id"], "error": {"status": status, "code": code, "message": message}})

    def send(self, answer: Mapping[str, Any], body: bytes = b"") -> None:
        """One frame, from any thread."""
        with self.writing:
            self.out.write(frame(answer, body))
            self.out.flush()


def picture(values: np.ndarray, height: int, width: int, engine: "Engine") -> bytes:
    """A map in colours as a PNG in the proportions of its image, at most `CAM_PX` long.

    Transparent where the image was cropped away: it can be laid over the image as it is, at any strength.
    """
    from PIL import Image

    from effnet.explain import heat, upsampled, visible

    shrink = min(1.0, CAM_PX / max(height, width))
    height, width = (max(1, round(side * shrink)) for side in (height, width))
    part = visible(engine.preprocess, height, width)
    pixels = np.zeros((height, width, 4), dtype=np.uint8)
    pixels[(*part.slices, slice(0, 3))] = heat(upsampled(values, part.height, part.width))
    pixels[(*part.slices, 3)] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def hello(engine: "Engine", model: "Model | Exported | None") -> dict[str, Any]:
    """What the front tells people about the model. `probe`: by its answer to one image, models can be told apart."""
    size = engine.preprocess.size
    slope = np.linspace(0, 255, size).astype(np.uint8)
    view = np.stack(np.broadcast_arrays(slope[:, None], slope[None, :], slope[::-1, None]), axis=-1)
    return {
        "model": engine.name,
        "labels": list(engine.labels),
        "preprocess": engine.preprocess.to_dict(),
        "cam": model is not None,
        "probe": engine(view[None])[0, :16].tolist(),
    }


def main() -> None:
    """Serves until stdin ends. Signals that are sent to a whole group are the front's business."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    jobs, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    where, options = sys.argv[1], Options.from_json(sys.argv[2])
    os.environ["OMP_NUM_THREADS"] = str(options.worker_threads)  # before any engine's runtime is loaded
    try:
        engine, model = opened(where, options)
    except (UsageError, OSError) as error:
        out.write(frame({"refused": str(error)}))
        out.flush()
        return
    worker = Worker(engine=engine, model=model, options=options, out=out)
    worker.send(hello(engine, model))
    worker.run(jobs)


def opened(where: str, options: Options) -> "tuple[Engine, Model | Exported | None]":
    """The engine, warmed up, and what can explain it: its own model, an export with maps, or its run folder's model.

    `UsageError` for a network without trained weights: every worker would draw its own.
    """
    import torch

    from effnet.engine import TorchEngine, open_engine
    from effnet.export.artefact import Exported
    from effnet.zoo import find, load_model

    torch.set_num_threads(options.worker_threads)
    path = Path(where)
    if (path.suffix == ".json" or not path.exists()) and not find(where).tensors:
        raise UsageError(f"{where} is a network without trained weights: name some, as efficientnet_lite0.in1k")
    engine = open_engine(where)
    size = engine.preprocess.size
    for count in {1, options.max_batch}:
        engine(np.zeros((count, size, size, 3), dtype=np.uint8))
    if isinstance(engine, TorchEngine):
        model = engine.model
    elif isinstance(engine, Exported) and engine.card.tap:
        model = engine
    else:
        model = load_model(where) if path.is_dir() else None
    if model is not None:
        # takes half a second, for which nobody should wait: not the first image, and not the first map
        threading.Thread(target=importlib.import_module, args=("effnet.explain",), daemon=True).start()
    return engine, model


if __name__ == "__main__":
    main()

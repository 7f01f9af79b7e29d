"""How does a large prediction become one file, whatever happens on the way? Inputs, engine, journal, put together.

Every input has exactly one row, in order. What decides the rows (the model with its digest, `top_k`, `turns`, the
batch) is kept in the journal, so that a job is never continued with something else; where it runs and how many threads
decode is not, for it changes nothing but time. (Sums in another number of threads may differ in the last digit.)
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from effnet.images import ImageError
from effnet.inputs import batched, inputs
from effnet.predict import answers, batch_that_fits, identity, opened_on
from effnet.predict_ray import answers_on_ray
from effnet.prediction_files import check_format, finish, journal, read_settings
from effnet.value import UsageError, Value, check_choice, check_range


@dataclass(frozen=True, kw_only=True)
class Done(Value):
    """A finished job: rows in `out`, how many of them are errors, and how many were there before it was resumed.

    `seconds`: of this run, in which the rows that were not `resumed` were made.
    """

    out: str
    model: str
    images: int
    errors: int
    resumed: int
    batch: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Of this run, with decoding."""
        return (self.images - self.resumed) / self.seconds


def predict_to_file(
    where: str | Path,
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    resume: bool = False,
    engine: Literal["local", "ray"] = "local",
    top_k: int = 5,
    batch: int | None = None,
    turns: bool = False,
    device: str | None = None,
    workers: int | None = None,
    actors: int | None = None,
    on_error: Literal["report", "error"] = "report",
    progress: Callable[[int, int], None] = lambda done, errors: None,
    on_event: Callable[[str], None] = lambda event: None,
) -> Done:
    """Predicts the images that `paths` stand for with the model at `where` into `out`, .csv, .jsonl, .json or .parquet.

    Until it is complete its rows are in `out`.part, from which `resume` goes on. `engine`: in this process or on a Ray
    cluster (`actors` of one core each; None: all cores). `batch`: None takes what fits, or what a resumed job was begun
    with. `on_error`: `error` stops at the first image that cannot be read. `progress` is called with (rows so far,
    errors among them), `on_event` with a remark. Raises `UsageError`, before any image is read wherever that is
    possible.
    """
    check_choice("engine", engine, ("local", "ray"))
    check_choice("on_error", on_error, ("report", "error"))
    for name, value in (("top_k", top_k), ("batch", batch), ("workers", workers), ("actors", actors)):
        check_range(name, 1 if value is None else value, 1)
    out, found = check_format(Path(out)), inputs(paths)
    if engine == "ray" and device not in (None, "auto", "cpu"):
        raise UsageError(f"device {device}: workers on Ray compute on CPU cores.")
    opened = opened_on(where, turns=turns, device="cpu" if engine == "ray" else device)
    begun = read_settings(out) or {}
    batch = batch or begun.get("batch") or batch_that_fits(opened)
    ranks = min(top_k, len(opened.labels))
    settings = {"top_k": ranks, "turns": turns, "batch": batch, "model": identity(opened)}
    start = time.monotonic()
    with journal(out, settings, resume=resume) as kept:
        todo = kept.remaining(batched(found, batch))
        if engine == "ray":
            rows = answers_on_ray(
                str(where), todo, top_k=ranks, turns=turns, actors=actors, expected=settings["model"],
                on_event=on_event,
            )  # fmt: skip
        else:
            rows = answers(opened, todo, top_k=ranks, workers=workers)
        made = 0
        try:
            for some in rows:
                bad = next((row for row in some if row.error), None)
                if bad and on_error == "error":
                    raise ImageError(bad.path, str(bad.error))
                kept.append(some)
                made += len(some)
                progress(kept.rows_done, kept.errors)
        finally:
            rows.close()
        finish(kept, out, top_k=ranks)
    return Done(
        out=str(out),
        model=opened.name,
        images=kept.rows_done,
        errors=kept.errors,
        resumed=kept.rows_done - made,
        batch=batch,
        seconds=round(time.monotonic() - start, 3),
    )

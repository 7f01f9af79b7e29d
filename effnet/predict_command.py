"""What does `effnet predict` do when it is typed? On the screen for a few images, into a file for any number.

To a file, broken images are reported there and in the last line, and the exit code is 0: every input has its row. On
the screen stderr alone tells of them, and the exit code is 2.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from effnet import arguments, display
from effnet.arguments import AsJson, Device, ModelName, Turns
from effnet.value import UsageError
from effnet.words import duration

if TYPE_CHECKING:
    from effnet.inputs import Inputs
    from effnet.predict_job import Done

PATHS = "Images, folders of them, .csv manifests (column path), .tar shards, or - for one path per line of stdin."
LINE_EVERY_S = 30  # without a terminal


def predict(
    model: ModelName,
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help=PATHS)],
    top_k: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Write a row per image to this .csv, .jsonl, .json or .parquet file.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished OUT.part, if there is one.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")] = False,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="ray: on the cluster in RAY_ADDRESS, else on all cores here.")
    ] = "local",
    actors: Annotated[int | None, typer.Option(min=1, help="Of ray, one core each. Default: all cores.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images at a time. Default: what fits in memory.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that decode images.")] = None,
    turns: Turns = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """The most probable classes of images: on the screen, or of any number of them into a file.

    A file is written when every image has its row; until then the rows are in OUT.part, and the same command with
    --resume goes on from there. An image that cannot be read costs no more than its own row.
    """
    if out is None and (resume or engine == "ray"):
        raise UsageError(f"{'--resume' if resume else '--engine ray'} is for jobs that write a file: add --out FILE.")
    if actors and engine != "ray":
        raise UsageError("--actors is for --engine ray; threads that decode are --workers.")
    arguments.device(device)  # refused here where there is none
    on_error: Literal["report", "error"] = "error" if strict else "report"
    options: dict[str, Any] = {"top_k": top_k, "batch": batch, "turns": turns, "workers": workers, "on_error": on_error}
    if out is None:
        _on_screen(model, paths, options, device, as_json)
        return
    from effnet.inputs import inputs
    from effnet.predict_job import predict_to_file
    from effnet.prediction_files import check_format

    check_format(out)
    with _counting(inputs(paths), as_json) as progress:
        try:
            done = predict_to_file(
                model, paths, out, resume=resume, engine=engine, actors=actors, progress=progress, on_event=_say,
                device=device, **options,
            )  # fmt: skip
        except KeyboardInterrupt:
            _say(f"stopped. Go on with the same command and --resume: the rows so far are in {out}.part.")
            raise typer.Exit(130) from None
    document = done.to_dict() | {"images_per_second": done.images_per_second}
    display.answer(document, as_json, lambda: _show_done(done))


def _on_screen(model: str, paths: Sequence[str], options: dict[str, Any], device: Any, as_json: bool) -> None:
    from effnet.inputs import inputs
    from effnet.predict import opened_on
    from effnet.predict import predict as predictions

    found, rows = inputs(paths), []
    turns = options.pop("turns")
    opened = opened_on(model, turns=turns, device=device)
    with _counting(found, as_json) as progress:
        for row in predictions(opened, paths, **options):
            rows.append(row)
            progress(len(rows), 0)
    display.answer([row.to_dict() for row in rows], as_json, lambda: display.show_predictions(display.console(), rows))
    broken = [row for row in rows if row.error]
    for row in broken:
        _say(f"{row.path}: {row.error}")
    if broken:
        raise typer.Exit(2)


def _show_done(done: "Done") -> None:
    out = display.console()
    display.show_path(out, Path(done.out))
    before = f", {done.resumed:,} of them from before" if done.resumed else ""
    broken = f"; {done.errors:,} cannot be read, see the column error" if done.errors else ""
    speed = f"{done.images_per_second:.1f} images a second, {duration(done.seconds)}, batch {done.batch}"
    display.show_note(out, f"{done.images:,} images{before}{broken}. {done.model}: {speed}.")


def _say(message: str) -> None:
    sys.stderr.write(f"effnet: {' '.join(message.split())}\n")


# --- progress -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _counting(found: "Inputs", as_json: bool) -> Generator[Callable[[int, int], None]]:
    """A bar with an ETA on a terminal, elsewhere a line now and then; call what is yielded with (done, errors).

    The images are counted meanwhile, as listing a million of them takes a while.
    """
    total: list[int | None] = []
    threading.Thread(target=lambda: total.append(_counted(found)), daemon=True).start()
    console = display.console(stderr=as_json)
    line = Lines()
    with display.counting(console, "predicting") as bar:

        def progress(done: int, errors: int) -> None:
            known = total[0] if total else None
            bar(done, known)  # ty: ignore[invalid-argument-type]
            if not console.is_terminal and (text := line(done, known, errors)):
                _say(text)

        yield progress


def _counted(found: "Inputs") -> int | None:
    with contextlib.suppress(OSError, UsageError):  # whoever reads them will say so
        return found.count()
    return None


class Lines:
    """Progress in words, every `LINE_EVERY_S` seconds.

    >>> clock = iter([0.0, 10.0, 40.0])
    >>> line = Lines(lambda: next(clock))
    >>> line(500, 2000, 0), line(800, 2000, 1)
    (None, '800 of 2,000 images, 1 of them cannot be read, 10.0 a second, 2 min 00 s left')
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.first: tuple[float, int] | None = None  # rows of before a resumed job are no measure of its speed
        self.last = clock()

    def __call__(self, done: int, total: int | None, errors: int) -> str | None:
        """The line that is due, if one is."""
        now = self.clock()
        self.first = self.first or (now, done)
        if now - self.last < LINE_EVERY_S or now <= self.first[0]:
            return None
        self.last = now
        speed = (done - self.first[1]) / (now - self.first[0])
        words = [f"{done:,} of {total:,} images" if total else f"{done:,} images"]
        words += [f"{errors:,} of them cannot be read"] if errors else []
        words += [f"{speed:.1f} a second"]
        words += [f"{duration((total - done) / speed)} left"] if total and speed else []
        return ", ".join(words)

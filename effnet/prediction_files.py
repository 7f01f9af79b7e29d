"""How do predictions become a file that is either complete or plainly not?

While a job runs, its rows go to a journal beside the output, `found.csv.part`: a line of JSON that says with which
settings the job was begun, then a line of JSON per row. Only when every input has its row is the output written, in
one step (`write_atomically`), and the journal removed. So a file under its own name is complete, whatever killed the
job before, and all formats are resumed alike.

A resumed job goes through its inputs again, without reading them, and compares their names with the rows that are
there; it goes on at the first batch that is not whole. A line that was torn does not count.
"""

import contextlib
import csv
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from effnet.files import FileError, reason, write_atomically
from effnet.inputs import Input
from effnet.predict import Prediction
from effnet.value import UsageError, check_choice

PARQUET_ROWS = 8192  # per row group
Header = dict[str, Any]


class Journal:
    """The rows of a job that is not finished. Made by `journal`."""

    def __init__(self, path: Path, file: BinaryIO, settings: Header) -> None:
        self.path, self.settings, self.rows_done, self.errors = path, settings, 0, 0
        self._file = file

    def remaining(self, batches: Iterable[Sequence[Input]]) -> Iterator[Sequence[Input]]:
        """The batches without their rows, once those that have them have been compared with the journal.

        `UsageError` for a row of another input than the one in its place, or of none.
        """
        batches = iter(batches)
        for items in batches:
            start = self._file.tell()
            rows = list(itertools.islice(self._whole_rows(), len(items)))
            for number, (item, row) in enumerate(zip(items, rows, strict=False), self.rows_done + 1):
                self._compare(number, item.name, row.path)
            if len(rows) < len(items):
                self._file.seek(start)
                self._file.truncate()
                yield items
                yield from batches
                return
            self._count(rows)
        for row in self._whole_rows():
            self._compare(self.rows_done + 1, None, row.path)

    def append(self, rows: Sequence[Prediction]) -> None:
        """Adds the rows of a batch; from then on they outlive this process."""
        try:
            self._file.write(b"".join(_line(row.to_dict()) for row in rows))
            self._file.flush()
        except OSError as error:
            raise FileError(f"cannot write {self.path}: {reason(error)}; what is there can be resumed.") from error
        self._count(rows)

    def rows(self) -> Iterator[Prediction]:
        """All rows, from the first."""
        self._file.seek(0)
        self._file.readline()
        found = 0
        for found, row in enumerate(self._whole_rows(), 1):  # noqa: B007
            yield row
        if found != self.rows_done:
            raise UsageError(
                f"{self.path} was damaged while it was written: {found} of {self.rows_done} rows are whole."
            )

    def _count(self, rows: Sequence[Prediction]) -> None:
        self.rows_done += len(rows)
        self.errors += sum(row.error is not None for row in rows)

    def _whole_rows(self) -> Iterator[Prediction]:
        """The rows from here on, up to the first line that is torn."""
        while (line := self._file.readline()).endswith(b"\n"):
            try:
                yield Prediction.from_dict(json.loads(line))
            except ValueError:
                return

    def _compare(self, number: int, name: str | None, was: str) -> None:
        if name != was:
            now = "missing" if name is None else name
            raise UsageError(
                f"input {number} is {now}, but {self.path} was begun with {was} in its place: give the same inputs in "
                "the same order, or delete that file to begin again."
            )


@contextlib.contextmanager
def journal(out: Path, settings: Header, *, resume: bool) -> Generator[Journal]:
    """The journal of the job that makes `out`, begun with `settings` or, if there is one and `resume`, gone on with.

    `UsageError` for a journal that is there without `resume` or was begun with other settings (names both), for `out`
    that is complete already with `resume`, and for a journal that another process is writing.
    """
    path = part_path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if resume and out.exists() and not path.exists():
        raise UsageError(f"{out} is complete: there is nothing to resume. Without --resume it is written anew.")
    with path.open("a+b") as file:
        _lock(file, path)
        begun = read_settings(out)
        if begun is not None and not resume:
            raise UsageError(f"{path} is an unfinished run: go on with it by --resume, or delete it to begin again.")
        if begun is None:
            file.truncate(0)
            file.write(_line(settings))
            file.flush()
        else:
            _refuse_change(path, begun, settings)
            file.seek(0)
            file.readline()
        yield Journal(path, file, settings)


def finish(kept: Journal, out: Path, *, top_k: int) -> None:
    """Writes `out` from the journal and removes that."""
    write_predictions(out, kept.rows(), top_k=top_k)
    kept.path.unlink()


def part_path(out: Path) -> Path:
    """Where the rows of an unfinished `out` are."""
    return out.with_name(f"{out.name}.part")


def read_settings(out: Path) -> Header | None:
    """What the unfinished job for `out` was begun with; None where there is none (or it died within that line)."""
    path = part_path(out)
    if not path.exists():
        return None
    with path.open("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        return None
    with contextlib.suppress(ValueError):
        if isinstance(settings := json.loads(line), dict):
            return settings
    raise UsageError(f"{path} is in the way: it is no unfinished run of effnet predict.")


def _refuse_change(path: Path, begun: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    for name in {**begun, **settings}:
        if begun.get(name) != settings.get(name):
            raise UsageError(
                f"{name} is {settings.get(name)}, but {path} was begun with {begun.get(name)}: rows of both would be "
                "mixed. Go on with what it was begun with, or delete that file to begin again."
            )


def _lock(file: BinaryIO, path: Path) -> None:
    """Held until the file is closed, by death too."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"another process is writing {path}.") from None


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document).encode() + b"\n"


# --- formats --------------------------------------------------------------------------------------------------------


def write_predictions(path: str | Path, rows: Iterable[Prediction], *, top_k: int) -> None:
    """A file of predictions in the format that its name ends in; it appears when it is complete.

    .csv and .parquet: path, label, probability, label_2, probability_2, ... (`top_k` pairs) and error. .jsonl and
    .json: the fields of `Prediction`. File names that are not UTF-8 are written to .csv as the bytes they are, to
    .parquet with backslashes.
    """
    path = check_format(Path(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: FORMATS[path.suffix](temporary, rows, top_k))


def check_format(path: Path) -> Path:
    """`path`, if its ending is one of `FORMATS` and what that needs is installed; else `UsageError`."""
    check_choice(f"the ending of {path},", path.suffix, FORMATS)
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UsageError(f"{path} needs pyarrow, which is not installed: pip install 'effnet[table]'")
    return path


def write_table(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file that appears when it is complete; missing folders are made.

    File names that are not UTF-8 are written as the bytes they are.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), lambda temporary: _write_csv(temporary, header, rows))


def _header(top_k: int) -> list[str]:
    ranks = [
        name if rank == 1 else f"{name}_{rank}" for rank in range(1, top_k + 1) for name in ("label", "probability")
    ]
    return ["path", *ranks, "error"]


def _cells(row: Prediction, top_k: int) -> list[Any]:
    ranked = [cell for pair in zip(row.labels, row.probabilities, strict=True) for cell in pair]
    return [row.path, *ranked, *[None] * (2 * top_k - len(ranked)), row.error]


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with _text(path) as file:
        csv.writer(file, lineterminator="\n").writerows(itertools.chain([header], rows))


def _csv(path: Path, rows: Iterable[Prediction], top_k: int) -> None:
    _write_csv(path, _header(top_k), (_cells(row, top_k) for row in rows))


def _jsonl(path: Path, rows: Iterable[Prediction], top_k: int) -> None:
    with _text(path) as file:
        file.writelines(json.dumps(row.to_dict()) + "\n" for row in rows)


def _json(path: Path, rows: Iterable[Prediction], top_k: int) -> None:
    with _text(path) as file:
        separators = itertools.chain(["[\n"], itertools.repeat(",\n"))
        empty = True
        for separator, row in zip(separators, rows, strict=False):
            file.write(separator + json.dumps(row.to_dict()))
            empty = False
        file.write("[]\n" if empty else "\n]\n")


def _parquet(path: Path, rows: Iterable[Prediction], top_k: int) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = [pyarrow.float64() if name.startswith("probability") else pyarrow.string() for name in _header(top_k)]
    schema = pyarrow.schema(list(zip(_header(top_k), kinds, strict=True)))
    rows = iter(rows)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while group := list(itertools.islice(rows, PARQUET_ROWS)):
            columns = zip(*(_cells(row.replace(path=_as_text(row.path)), top_k) for row in group), strict=True)
            writer.write_table(pyarrow.table([list(column) for column in columns], schema=schema))


def _as_text(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _text(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", errors="surrogateescape", newline="")


FORMATS: dict[str, Callable[[Path, Iterable[Prediction], int], None]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}

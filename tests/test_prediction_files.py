"""Files of predictions: every format read back by another package, and journals that are never taken for a result."""

import csv
import fcntl
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet
import pytest

import effnet.prediction_files
from effnet.files import FileError
from effnet.inputs import Input
from effnet.predict import Prediction
from effnet.prediction_files import (
    Journal,
    check_format,
    finish,
    journal,
    part_path,
    read_settings,
    write_predictions,
    write_table,
)
from effnet.value import UsageError

ROWS = [
    Prediction(path="broken.png", error="is empty"),
    Prediction(path='with "quotes", and comma.png', labels=("cat", "moon"), probabilities=(0.1 + 0.2, 1e-9)),
    Prediction(path="naïve\udcff.png", labels=("rocket", "cat"), probabilities=(0.75, 0.25)),  # not UTF-8 on disk
]


# --- formats --------------------------------------------------------------------------------------------------------


def test_json_and_jsonl_hold_every_field_of_every_row(tmp_path: Path) -> None:
    write_predictions(tmp_path / "out.json", ROWS, top_k=2)
    assert [Prediction.from_dict(row) for row in json.loads((tmp_path / "out.json").read_text())] == ROWS
    write_predictions(tmp_path / "out.jsonl", ROWS, top_k=2)
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [Prediction.from_dict(json.loads(line)) for line in lines] == ROWS


def test_csv_has_a_column_per_rank_and_loses_no_digit(tmp_path: Path) -> None:
    write_predictions(tmp_path / "new" / "out.csv", iter(ROWS), top_k=2)  # the folder is made
    with (tmp_path / "new" / "out.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["path", "label", "probability", "label_2", "probability_2", "error"]
    assert [row["path"] for row in table] == [row.path for row in ROWS]
    assert table[0]["error"] == "is empty" and table[0]["label"] == table[0]["probability_2"] == ""
    assert float(table[1]["probability"]) == 0.1 + 0.2 and float(table[1]["probability_2"]) == 1e-9
    assert (table[2]["label"], table[2]["label_2"]) == ("rocket", "cat")


def test_parquet_has_the_columns_of_csv_with_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effnet.prediction_files, "PARQUET_ROWS", 2)
    write_predictions(tmp_path / "out.parquet", ROWS, top_k=2)
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["path", "label", "probability", "label_2", "probability_2", "error"]
    assert str(table.schema.field("probability_2").type) == "double"
    rows = table.to_pylist()
    assert [row["error"] for row in rows] == ["is empty", None, None]
    assert rows[0]["label"] is None and rows[0]["probability"] is None
    assert (rows[1]["probability"], rows[1]["label_2"]) == (0.1 + 0.2, "moon")
    assert rows[2]["path"] == "naïve\\xff.png"
    assert pyarrow.parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups == 2


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_no_rows_make_a_file_that_can_be_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    write_predictions(path, [], top_k=1)
    if suffix == ".parquet":
        assert pyarrow.parquet.read_table(path).num_rows == 0
    else:
        assert path.read_text() == {".csv": "path,label,probability,error\n", ".json": "[]\n", ".jsonl": ""}[suffix]


def test_another_ending_and_a_missing_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"'\.jsn' is not one of .*Did you mean '\.json'"):
        check_format(tmp_path / "out.jsn")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'effnet\[table\]'"):
        check_format(tmp_path / "out.parquet")
    assert check_format(tmp_path / "out.csv") == tmp_path / "out.csv"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write_table(path, ["a"], [[1]])

    def torn():
        yield [2]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_table(path, ["a"], torn())
    assert path.read_text() == "a\n1\n"
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays behind"


# --- journals -------------------------------------------------------------------------------------------------------

SETTINGS = {"model": "small (12ab)", "top_k": 1, "batch": 2}


def named(names: str) -> list[Sequence[Input]]:
    """Batches of two."""
    items = [Input(name, Path(name)) for name in names]
    return [items[start : start + 2] for start in range(0, len(items), 2)]


def rows_of(items: Sequence[Input]) -> list[Prediction]:
    return [Prediction(path=item.name, labels=("x",), probabilities=(1.0,)) for item in items]


def begin(out: Path, names: str, batches: int) -> None:
    """A job over `names` that ended after so many batches."""
    with journal(out, SETTINGS, resume=False) as kept:
        for items, _ in zip(kept.remaining(named(names)), range(batches), strict=False):
            kept.append(rows_of(items))


def names_left(kept: Journal, names: str) -> str:
    return "".join(item.name for items in kept.remaining(named(names)) for item in items)


def test_a_journal_goes_on_at_the_first_batch_that_is_not_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    begin(out, "abcdefg", 2)
    assert not out.exists() and part_path(out).name == "out.csv.part"
    with journal(out, SETTINGS, resume=True) as kept:
        left = list(kept.remaining(named("abcdefg")))
        assert kept.rows_done == 4
        for items in left:
            kept.append(rows_of(items))
        assert [row.path for row in kept.rows()] == list("abcdefg")
        finish(kept, out, top_k=1)
    assert [line.split(",")[0] for line in out.read_text().splitlines()] == ["path", *"abcdefg"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("kept_bytes", range(0, 400, 7))
def test_wherever_a_journal_was_torn_whole_batches_stay_and_the_rest_is_done_again(
    tmp_path: Path, kept_bytes: int
) -> None:
    out = tmp_path / "out.csv"
    begin(out, "abcdef", 3)
    whole = part_path(out).read_bytes()
    lines = whole.splitlines(keepends=True)
    kept_bytes = min(kept_bytes, len(whole))
    part_path(out).write_bytes(whole[:kept_bytes])
    whole_rows = whole[:kept_bytes].count(b"\n") - 1
    with journal(out, SETTINGS, resume=True) as kept:
        assert names_left(kept, "abcdef") == "abcdef"[max(0, whole_rows) // 2 * 2 :]
    assert part_path(out).read_bytes() == b"".join(lines[: 1 + max(0, whole_rows) // 2 * 2])


def test_a_line_of_zeros_that_a_power_cut_left_counts_as_torn(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    begin(out, "abcd", 1)
    with part_path(out).open("ab") as file:
        file.write(b"\0" * 40 + b"\n" + b"\0" * 100)
    with journal(out, SETTINGS, resume=True) as kept:
        assert names_left(kept, "abcd") == "cd"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("abXdef", r"input 3 is X, but .*out\.csv\.part was begun with c"),
        ("abc", r"input 4 is missing, but .* begun with d"),
        ("ab", r"input 3 is missing, but .* begun with c"),
    ],
)
def test_other_inputs_are_refused(tmp_path: Path, names: str, message: str) -> None:
    begin(tmp_path / "out.csv", "abcdef", 2)
    before = part_path(tmp_path / "out.csv").read_bytes()
    with journal(tmp_path / "out.csv", SETTINGS, resume=True) as kept, pytest.raises(UsageError, match=message):
        list(kept.remaining(named(names)))
    assert part_path(tmp_path / "out.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "small (34cd)"}, r"model is small \(34cd\), but .* begun with small \(12ab\)"),
        ({"top_k": 3}, "top_k is 3, but .* begun with 1"),
        ({"turns": True}, "turns is True, but .* begun with None"),
    ],
)
def test_other_settings_are_refused_and_both_are_named(tmp_path: Path, change: dict, message: str) -> None:
    begin(tmp_path / "out.csv", "abcdef", 2)
    with pytest.raises(UsageError, match=message), journal(tmp_path / "out.csv", SETTINGS | change, resume=True):
        pass


def test_an_unfinished_run_is_not_overwritten_and_a_complete_one_not_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    begin(out, "ab", 1)
    with pytest.raises(UsageError, match="unfinished run: go on with it by --resume"), journal(out, {}, resume=False):
        pass
    with journal(out, SETTINGS, resume=True) as kept:
        assert names_left(kept, "ab") == ""
        finish(kept, out, top_k=1)
    with pytest.raises(UsageError, match="is complete"), journal(out, SETTINGS, resume=True):
        pass
    assert not part_path(out).exists()
    begin(out, "cd", 0)  # written anew: what is there stays until then
    assert "a," in out.read_text()


def test_what_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.csv.part"
    path.write_text("a download\nof something\n")
    for resume in (False, True):
        with pytest.raises(UsageError, match="is in the way"), journal(tmp_path / "out.csv", {}, resume=resume):
            pass
    assert path.read_text() == "a download\nof something\n"


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    begin(out, "abcd", 1)
    before = part_path(out).read_bytes()
    with part_path(out).open("rb") as other:  # a lock belongs to the open file, not to the process
        fcntl.flock(other, fcntl.LOCK_EX)
        for resume in (True, False):
            with pytest.raises(UsageError, match="another process"), journal(out, SETTINGS, resume=resume):
                pass
    assert part_path(out).read_bytes() == before


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("r+b", buffering=0) as full:
        kept = Journal(tmp_path / "out.csv.part", full, {})  # ty: ignore[invalid-argument-type]
        with pytest.raises(FileError, match=r"cannot write .*out\.csv\.part: No space left on device"):
            kept.append([ROWS[0]])
    assert kept.rows_done == 0


def test_settings_are_read_only_from_a_whole_line(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert read_settings(out) is None
    begin(out, "ab", 0)
    assert read_settings(out) == SETTINGS
    part_path(out).write_bytes(b'{"model": "sma')
    assert read_settings(out) is None


def test_a_journal_that_was_damaged_meanwhile_makes_no_file(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    with journal(out, SETTINGS, resume=False) as kept:
        for items in kept.remaining(named("abcd")):
            kept.append(rows_of(items))
        content = part_path(out).read_bytes()
        part_path(out).write_bytes(content[:-30])
        with pytest.raises(UsageError, match="3 of 4 rows are whole"):
            finish(kept, out, top_k=1)
    assert list(tmp_path.iterdir()) == [part_path(out)]

"""The command as it is typed: a document or tables on stdout, one line on stderr for a mistake, and an exit code."""

import contextlib
import csv
import io
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import effnet
from effnet import families
from effnet.cli import app, main
from effnet.cost import cost
from effnet.spec import Head, Network, Preprocess, Stage, Stem
from tests.conftest import write_images

VERBS = (
    "list", "info", "scale", "search", "recipes", "doctor", "plan", "train", "eval", "predict", "explain", "bench",
    "plot", "report", "convert", "export", "serve",
)  # fmt: skip
TINY = Network(
    name="tiny",
    stem=Stem(width=8),
    stages=(Stage(op="mbconv", repeats=2, width=8, stride=2, expand=2, se=0.25),),
    head=Head(width=16),
    resolution=32,
    preprocess=Preprocess(size=32, resize=32),
)
TRAINING = (
    "--set",
    "epochs=1",
    "--set",
    "warmup=0",
    "--set",
    "batch=8",
    "--set",
    "precision=float32",
    "--split-seed",
    "3",
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout as JSON; nothing else may be on it."""
        assert self.code == 0, self.err
        return json.loads(self.out)


def run(*words: object) -> Result:
    """Types `effnet WORDS` in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([str(word) for word in words])
    return Result(code=code, out=out.getvalue(), err=err.getvalue())


def refused(*words: object) -> str:
    """The one line with which a mistake is refused: nothing on stdout, exit code 2."""
    result = run(*words)
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"effnet: .+\n", result.err), result.err
    return result.err.removeprefix("effnet: ").strip()


def python(code: str) -> str:
    """stdout of a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """A flat data set, a network file, and a run of one epoch on them: `--split-seed 3`."""

    data: Path
    network: Path
    run: Path
    trained: Result


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    root = tmp_path_factory.mktemp("workshop")
    data = write_images(root / "data", {"cat": 14, "dog [big]": 14})
    network = root / "tiny.json"
    network.write_text(TINY.to_json())
    trained = run("train", data, "--model", network, *TRAINING, "--out", root / "run", "--json")
    return Workshop(data=data, network=network, run=root / "run", trained=trained)


# --- the frame ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"Example: effnet {verb}" in result.output
    assert "--json" in result.output


def test_the_help_lists_exactly_these_verbs() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert [line.split()[1] for line in result.output.split("Commands")[1].splitlines() if re.match(r"│ \w", line)] == [
        *VERBS
    ]


def test_without_words_the_help_is_shown() -> None:
    result = run()
    assert result.code == 0
    assert "Usage: effnet" in result.out


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").out == f"effnet {effnet.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian", "data"), r"No such command 'trian'\. Did you mean 'train'\?"),
        (("info",), "Missing argument 'MODEL'"),
        (("info", "efficientnet_b0", "--siz", 3), "No such option: --siz .*--size"),
        (("eval", "m", "d", "--split", "tset"), "'tset' is not one of 'test', 'val', 'train', 'all'"),
        (("info", "efficientnet_b9"), "unknown network 'efficientnet_b9'.*Did you mean 'efficientnet_b"),
        (("info", "resnet18", "--size", 8), "input size 8 is below the stride 32 of resnet18"),
        (("list", "eficientnet"), "no network matches 'eficientnet'"),
        (("list", "efficientnet_lite9"), "Did you mean 'efficientnet_lite"),
        (("predict", "efficientnet_b00.in1k", "x.jpg"), r"x\.jpg does not exist"),
        (("predict", "resnet18", "x.jpg", "--out", "found.txt"), r"found\.txt, '\.txt' is not one of \.csv, \.jsonl"),
        (("explain", "resnet18"), "name images .* or a data set"),
        (("report", "nowhere"), "nowhere is not a run folder"),
        (("convert", "resnet18", "out.pth"), r"an effnet checkpoint is a \.safetensors file"),
        (("convert", "resnet18", "out.pth", "--dialect", "timm"), "resnet18 is a network without weights"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: tuple[str, ...], message: str) -> None:
    assert re.search(message, refused(*words))


def test_what_nobody_expected_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "names", lambda pattern="*": 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_a_closed_pipe_is_quiet() -> None:
    for words in (["list"], ["list", "--json"]):
        command = subprocess.Popen(
            [sys.executable, "-m", "effnet", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert command.stdout is not None and command.stderr is not None
        command.stdout.close()  # as `head` does when it has enough
        assert command.stderr.read() == ""
        assert command.wait() != 0
        command.stderr.close()


# --- facts: no torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["list", "--json"], ["info", "efficientnet_b0"], ["info", "no_such"]])
def test_facts_are_told_without_torch(words: list[str]) -> None:
    code = f"import sys; from effnet.cli import main; main({words}); print('torch' in sys.modules)"
    assert python(code).splitlines()[-1] == "False"


def test_the_list_has_every_network_with_its_cost_and_weights() -> None:
    rows = {row["name"]: row for row in run("list", "--json").document}
    assert list(rows) == families.names()
    b0 = rows["efficientnet_b0"]
    assert (b0["params"], b0["macs"], b0["size_px"]) == (5288548, 385814752, 224)
    assert rows["efficientnet_lite0"]["weights"][0]["name"] == "efficientnet_lite0.in1k"
    assert rows["efficientnet_lite0"]["weights"][0]["top1"] == 75.1
    assert rows["resnet18"]["weights"] == []


def test_the_list_takes_a_part_of_a_name_or_a_pattern() -> None:
    assert [row["name"] for row in run("list", "resnet", "--json").document] == families.names("resnet*")
    assert [row["name"] for row in run("list", "efficientnetv2_?", "--json").document] == families.names(
        "efficientnetv2_?"
    )
    assert "efficientnet_lite0" in run("list", "lite").out


def test_info_prints_the_exact_table_of_the_paper() -> None:
    out = run("info", "efficientnet_b0").out
    for number in ("5,288,548", "42,016", "385,814,752", "21.3 MB", "1 MAC = 2 FLOPs", "224 -> 112"):
        assert number in out
    row = next(line.split() for line in out.splitlines() if "stages.2" in line)
    assert row[:9] == ["stages.2", "mbconv", "5", "2", "6", "0.25", "24", "->", "40"]  # Tan & Le 2019, Table 1, row 4


def test_info_as_json_is_the_cost_with_rows_and_the_network_itself(tmp_path: Path) -> None:
    network = families.get("efficientnet_b3")
    document = run("info", "efficientnet_b3", "--size", 320, "--batch", 4, "--json").document
    spent = cost(network, 320, 4)
    assert document["macs"] == spent.macs == sum(row["macs"] for row in document["stages"])
    assert document["training_bytes"] == spent.training_bytes
    assert [unit["name"] for unit in document["units"]] == [unit.name for unit in spent.units]
    file = tmp_path / "b3.json"
    file.write_text(json.dumps(document["definition"]))
    assert run("info", file, "--size", 320, "--batch", 4, "--json").document == document


def test_info_shows_every_unit_when_asked() -> None:
    units = [unit.name for unit in cost(families.get("efficientnet_b0")).units]
    lines = run("info", "efficientnet_b0", "--units").out.splitlines()
    assert [line.split()[0] for line in lines if line.split() and line.split()[0] in units] == units


def test_a_network_file_with_a_mistake_is_named(tmp_path: Path) -> None:
    file = tmp_path / "net.json"
    file.write_text(TINY.to_json().replace('"resolution"', '"resolutoin"'))
    assert "Did you mean 'resolution'?" in refused("info", file)


# --- the whole path -------------------------------------------------------------------------------------------------


def test_doctor_finds_a_leak_and_exits_with_1(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", {"train/cat": 5, "train/dog": 5, "test/cat": 2, "test/dog": 2})
    assert run("doctor", data, "--json").document["ok"]
    (data / "test/cat/000.png").write_bytes((data / "train/cat/001.png").read_bytes())
    result = run("doctor", data)
    assert (result.code, result.err) == (1, "")
    assert "leakage" in result.out and "error" in result.out
    assert json.loads(run("doctor", data, "--json").out)["ok"] is False


def test_plan_says_what_training_will_do(workshop: Workshop) -> None:
    words = (
        "plan",
        workshop.data,
        "--model",
        workshop.network,
        *TRAINING,
        "--set",
        "stages=1",
        "--set",
        "size_px=24,32",
    )
    document = run(*words, "--json").document
    assert document["recipe"]["name"] == "scratch"  # random weights
    assert document["rows"][0]["phase"]["size_px"] == 32
    assert document["train_images"] + document["val_images"] == 24  # of 28: two of each class are the test part
    out = run(*words).out
    assert "recipe scratch with batch 4, because the network starts from random weights and there are only 20" in out
    assert "Expected time" in out


def test_recipes_are_listed_and_one_is_shown_in_full() -> None:
    document = run("recipes", "v2-*-official", "--json").document
    assert [row["name"] for row in document if "21k" not in row["name"]][:3] == [
        f"v2-{size}-official" for size in ("s", "m", "l")
    ]
    assert all(row["about"] and row["growth"] in ("paper", "official") for row in document)
    assert "v1-b7-paper" in run("recipes").out
    assert "norm_momentum" in run("recipes", "v2-s-paper").out
    assert "Did you mean 'finetune'" in refused("recipes", "finetuen")


def test_a_time_budget_replans_the_run(workshop: Workshop) -> None:
    words = ("plan", workshop.data, "--model", workshop.network, *TRAINING, "--set", "epochs=4")
    document = run(*words, "--time-budget", "2h", "--json").document
    assert document["recipe"]["epochs"] == 4
    assert "everything fits into the time budget" in document["why"]


def test_training_leaves_a_run_and_one_document(workshop: Workshop) -> None:
    document = workshop.trained.document
    assert document["run"] == str(workshop.run)
    assert 0 <= document["metrics"]["accuracy"] <= 1
    assert "epoch 1/1" in workshop.trained.err  # progress, where it does not disturb the document
    for name in ("plan.json", "recipe.json", "log.jsonl", "last.safetensors", "best.safetensors"):
        assert (workshop.run / name).is_file()


def test_training_without_validation_images_says_so_and_keeps_the_last_epoch(
    workshop: Workshop, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = [workshop.data, "--model", workshop.network, *TRAINING, "--val-fraction", 0]
    assert "none to validate on (the last epoch is kept)" in run("plan", *words).out
    result = run("train", *words, "--out", out)
    assert "kept: the last epoch, there are no validation images" in result.out and "best" not in result.out.split(",")
    plan = json.loads((out / "plan.json").read_text())
    assert plan["val_images"] == 0
    run("report", out)
    page = (out / "report.html").read_text()
    assert "The weights of epoch 1 were kept: the last, without validation images." in page
    judged = run("eval", out, workshop.data, "--json").document  # the test part is that of the run
    assert judged["images"] > 0


def test_training_again_is_refused_and_resuming_a_finished_run_changes_nothing(workshop: Workshop) -> None:
    words = ("train", workshop.data, "--model", workshop.network, *TRAINING, "--out", workshop.run)
    before = (workshop.run / "best.safetensors").read_bytes()
    assert "already holds a run: go on with --resume" in refused_after_words(*words)
    assert run(*words, "--resume", "--json").document["metrics"] == workshop.trained.document["metrics"]
    assert (workshop.run / "best.safetensors").read_bytes() == before


def refused_after_words(*words: object) -> str:
    """As `refused`, for a verb that may say something before it finds the mistake."""
    result = run(*words)
    assert result.code == 2
    assert result.err.count("\n") == 1
    return result.err


def test_a_fine_tuned_network_starts_from_the_weights_it_is_given(workshop: Workshop, tmp_path: Path) -> None:
    words = ("plan", workshop.data, "--model", workshop.network, "--set", "epochs=1", "--json")
    recipe = run(*words, "--pretrained-from", workshop.run / "best.safetensors").document["recipe"]
    assert recipe["name"] == "finetune"
    assert "give one of them" in refused(*words, "--pretrained-from", workshop.run / "best.safetensors", "--pretrained")
    assert "no file" in refused(*words, "--pretrained-from", tmp_path / "none.safetensors")
    assert "without weights" in refused(*words, "--pretrained")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "epochs"), "--set 'epochs' is not FIELD=VALUE"),
        (("--set", "epoch=5"), "Did you mean 'epochs'"),
        (("--set", "epochs=five"), "cannot be set to 'five'"),
        (("--recipe", "finetun"), "Did you mean 'finetune'"),
        (("--val-fraction", "0.9"), "val_fraction is 0.9; it must be between 0 and 0.5"),
        (("--set", "size_px=2"), "size_px is 2"),
        (("--set", "batch=999"), "recipe batch is 999, but there are"),
        (("--recipe", "v2-s-paper"), "holds out minival=25000 images to validate on, but there are"),
        (("--time-budget", "20 minutes"), "is no time: write 90s, 20m or 1.5h"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(workshop: Workshop, words: tuple[str, ...], message: str) -> None:
    assert message in refused("plan", workshop.data, "--model", workshop.network, *words)


def test_a_device_that_is_not_there_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = refused("eval", workshop.run, workshop.data, "--device", "cuda")
    assert "no CUDA device" in message


def test_eval_judges_the_test_part_of_the_split_that_was_trained_on(workshop: Workshop) -> None:
    result = run("eval", workshop.run, workshop.data, "--json")
    assert result.err == ""  # the same split, though its seed was not said
    assert result.document["images"] == 4
    assert result.document["split"] == "test"
    assert json.loads((workshop.run / "eval.json").read_text()) == result.document
    with (workshop.run / "predictions.csv").open(newline="") as file:
        tested = {row["id"] for row in csv.DictReader(file)}
    run("eval", workshop.run, workshop.data, "--split", "train", "--json")
    with (workshop.run / "predictions-train.csv").open(newline="") as file:
        trained = {row["id"] for row in csv.DictReader(file)}
    assert (len(tested), len(tested & trained)) == (4, 0)
    assert "confusion" in json.loads((workshop.run / "eval-train.json").read_text())


def test_eval_says_when_it_may_judge_what_was_learnt(workshop: Workshop) -> None:
    result = run("eval", workshop.run, workshop.data, "--split-seed", 0, "--split", "val")
    assert result.code == 0
    assert "may be judged on images that it learnt from" in result.err


def test_eval_of_other_data_keeps_the_result_apart(workshop: Workshop, tmp_path: Path) -> None:
    other = write_images(tmp_path / "other", {"cat": 3, "dog [big]": 3}, seed=1)
    result = run("eval", workshop.run, other, "--split", "all", "--out", tmp_path / "rows.csv")
    assert (result.code, result.err) == (0, "")
    assert "dog [big]" in result.out
    assert json.loads((workshop.run / "eval-other-all.json").read_text())["images"] == 6
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 7


def test_eval_refuses_data_with_other_classes_and_lists_both_sides(workshop: Workshop, tmp_path: Path) -> None:
    other = write_images(tmp_path / "other", {"cat": 3, "horse": 3})
    message = refused("eval", workshop.run, other)
    assert "'horse'" in message and "'dog [big]'" in message


def test_predict_ranks_classes_and_writes_files(workshop: Workshop, tmp_path: Path) -> None:
    images = sorted((workshop.data / "cat").iterdir())[:3]
    rows = run("predict", workshop.run, *images, "--top-k", 2, "--json").document
    assert [row["path"] for row in rows] == [str(path) for path in images]
    assert all(sum(row["probabilities"]) == pytest.approx(1) for row in rows)
    for suffix in ("csv", "json"):
        out = tmp_path / f"found.{suffix}"
        done = run("predict", workshop.run, *images, "--out", out, "--json").document
        assert (done["images"], done["errors"]) == (3, 0)
    with (tmp_path / "found.csv").open(newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == [row["labels"][0] for row in rows]
    assert [row["labels"] for row in json.loads((tmp_path / "found.json").read_text())] == [
        row["labels"] for row in rows
    ]


def test_predict_into_a_file_reports_broken_images_there_and_never_mixes_runs(
    workshop: Workshop, tmp_path: Path
) -> None:
    images = sorted((workshop.data / "cat").iterdir())[:3]
    (tmp_path / "torn.png").write_bytes(images[0].read_bytes()[:60])
    out = tmp_path / "found.jsonl"
    words = ("predict", workshop.run, tmp_path, *images, "--out", out)
    result = run(*words)
    assert (result.code, result.err) == (0, "")
    assert "4 images; 1 cannot be read" in result.out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["error"] is None for row in rows] == [False, True, True, True]
    assert "is complete" in refused(*words, "--resume")
    assert "torn.png" in refused(*words, "--strict")
    assert "unfinished run" in refused(*words)
    assert "was begun with 5" not in refused(*words, "--resume", "--top-k", 1)
    assert "add --out FILE" in refused(*words[:-2], "--resume")
    assert "--actors is for --engine ray" in refused(*words, "--actors", 2)


def test_predict_takes_a_list_from_standard_input(workshop: Workshop) -> None:
    images = sorted((workshop.data / "cat").iterdir())[:2]
    command = [sys.executable, "-m", "effnet", "predict", str(workshop.run), "-", "--json"]
    listed = "".join(f"{image}\n" for image in images)
    found = subprocess.run(command, input=listed, capture_output=True, text=True, check=True)
    assert [row["path"] for row in json.loads(found.stdout)] == list(map(str, images))


def test_a_broken_image_costs_its_own_row_one_line_and_exit_code_2(workshop: Workshop, tmp_path: Path) -> None:
    good = next((workshop.data / "cat").iterdir())
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    torn = tmp_path / "torn.jpg"
    torn.write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    result = run("predict", workshop.run, good, torn)
    assert result.code == 2
    assert good.name in result.out and "torn.jpg" not in result.out
    assert re.fullmatch(rf"effnet: {torn}: .+\n", result.err)
    both = run("predict", workshop.run, good, torn, "--json")
    assert both.code == 2
    assert [row["error"] is None for row in json.loads(both.out)] == [True, False]
    assert refused("explain", workshop.run, torn, "--out", tmp_path / "maps").startswith(str(torn))


def test_a_picture_of_200_megapixels_is_refused_unread(workshop: Workshop, tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 0, 0, 0, 0)
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    assert "200.0 megapixels" in refused("predict", workshop.run, bomb)


def test_a_file_name_that_is_no_text_is_no_problem(workshop: Workshop, tmp_path: Path) -> None:
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    with open(name, "wb") as file:
        Image.new("RGB", (40, 40)).save(file, "PNG")
    command = [sys.executable, "-m", "effnet", "predict", str(workshop.run), name]
    found = subprocess.run(command, capture_output=True, check=False)
    assert (found.returncode, found.stderr) == (0, b"")
    assert b"caf\\udce9.png" in found.stdout


def test_an_empty_folder_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    assert "empty folder" in refused("doctor", tmp_path)
    assert "no images" in refused("predict", workshop.run, tmp_path)
    assert "is no model" in refused("predict", tmp_path, workshop.data)


def test_a_pickle_named_safetensors_is_refused_unopened(workshop: Workshop, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(pickle.dumps({"weight": 1}))
    assert "pickle" in refused("predict", file, workshop.data)
    assert "pickle" in refused("convert", file, tmp_path / "out.pth", "--dialect", "timm", "--model", workshop.network)


def test_a_damaged_checkpoint_gives_way_to_the_previous_one_and_says_so(workshop: Workshop, tmp_path: Path) -> None:
    whole = (workshop.run / "best.safetensors").read_bytes()
    (tmp_path / "best.safetensors").write_bytes(whole[:-8])
    (tmp_path / "best.safetensors.previous").write_bytes(whole)
    command = [sys.executable, "-m", "effnet", "info", str(tmp_path / "best.safetensors"), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"effnet: note: .*damaged.*previous instead\.\n", result.stderr)
    assert json.loads(result.stdout)["network"] == "tiny"


def test_explain_draws_a_map_per_image(workshop: Workshop, tmp_path: Path) -> None:
    image = next((workshop.data / "cat").iterdir())
    (row,) = run("explain", workshop.run, image, "--target", "cat", "--out", tmp_path / "maps", "--json").document
    assert (row["label"], row["tap"], np.shape(row["map"])) == ("cat", "head", (8, 8))
    assert 0 <= row["deletion"] <= 1 and 0 <= row["insertion"] <= 1
    words = ("explain", workshop.run, image, "--method", "layercam", "--no-faithfulness", "--out", tmp_path / "maps")
    assert "insertion" not in run(*words, "--json").document[0]
    assert "insertion" not in run(*words).out and "insertion" in run(*words[:3], "--out", tmp_path / "maps").out
    assert Path(row["file"]).read_bytes().startswith(b"\x89PNG")
    assert "Did you mean 'cat'?" in refused("explain", workshop.run, image, "--target", "cats", "--out", tmp_path)
    by_index = run("explain", workshop.run, image, "--target", 1, "--out", tmp_path, "--json").document
    assert by_index[0]["label"] == "dog [big]"


def test_explain_takes_images_of_a_data_set_and_keeps_them_in_the_run(workshop: Workshop) -> None:
    rows = run("explain", workshop.run, "--data", workshop.data, "--count", 3, "--json").document
    assert len(rows) == 3 and {row["truth"] for row in rows} == {"cat", "dog [big]"}
    assert {Path(row["file"]).parent for row in rows} == {workshop.run / "cams"}
    assert all(Path(row["file"]).is_file() for row in rows)
    assert "one of them" in refused("explain", workshop.run, workshop.data, "--data", workshop.data)


def test_a_folder_that_cannot_be_written_is_named_in_one_line(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    image = next((workshop.data / "cat").iterdir())
    assert str(tmp_path / "file") in refused("explain", workshop.run, image, "--out", tmp_path / "file" / "maps")


def test_report_writes_one_page(workshop: Workshop) -> None:
    run("eval", workshop.run, workshop.data, "--json")
    path = Path(run("report", workshop.run, "--json").document["report"])
    assert path == workshop.run / "report.html"
    assert path.read_text().startswith("<!")


def test_convert_there_and_back_is_bitwise(workshop: Workshop, tmp_path: Path) -> None:
    import torch

    from effnet import checkpoint

    timm, back = tmp_path / "timm.pth", tmp_path / "back.safetensors"
    there = run("convert", workshop.run, timm, "--dialect", "timm", "--json").document
    assert there["network"] == "tiny"
    assert "conv_stem.weight" in torch.load(timm, weights_only=True)
    assert "add --model NAME" in refused("convert", timm, back)
    run("convert", timm, back, "--model", workshop.network, "--classes", 2)
    ours, again = (checkpoint.load(path).weights for path in (workshop.run / "best.safetensors", back))
    assert ours.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.items())


def test_sigterm_saves_says_how_to_go_on_and_exits_with_143(workshop: Workshop, tmp_path: Path) -> None:
    words = ["train", str(workshop.data), "--model", str(workshop.network), *TRAINING, "--set", "epochs=5000"]
    words += ["--out", str(tmp_path / "run")]
    command = subprocess.Popen(
        [sys.executable, "-u", "-m", "effnet", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    next(line for line in command.stdout if line.startswith("epoch 1/"))
    sent = time.time()
    command.send_signal(signal.SIGTERM)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 128 + signal.SIGTERM
    assert re.fullmatch(r"effnet: stopped by SIGTERM; saved\. Go on with the same command and --resume .*\n", err)
    assert (tmp_path / "run" / "last.safetensors").stat().st_mtime < sent + 5


# --- the public names -----------------------------------------------------------------------------------------------


def test_every_public_name_is_there_and_none_is_imported_before_its_use() -> None:
    assert python("import sys, effnet; print([m for m in sys.modules if m.startswith(('torch', 'numpy'))])") == "[]\n"
    assert all(getattr(effnet, name) is not None for name in effnet.__all__)
    assert set(effnet.__all__) <= set(dir(effnet))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        effnet.trian  # ty: ignore[missing-attribute]


@pytest.mark.parametrize("first", ["import effnet.cost", "from effnet.cost import Cost", "from effnet import families"])
def test_a_verb_is_a_module_and_a_function_whoever_imports_it_first(first: str) -> None:
    code = f"""
{first}
import effnet
b0 = effnet.get_network("efficientnet_b0")
print(effnet.cost(b0).macs, effnet.cost.cost(b0).macs)
from effnet import cost
print(cost(b0).macs)
"""
    assert python(code).split() == ["385814752"] * 3

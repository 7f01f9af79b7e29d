"""Large predictions: killed at any point and resumed, the file is byte for byte that of an unbroken run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effnet import checkpoint
from effnet.images import ImageError
from effnet.network import build
from effnet.predict import Prediction
from effnet.predict_job import predict_to_file
from effnet.prediction_files import part_path
from effnet.spec import Head, Network, Preprocess, Stage, Stem
from effnet.value import UsageError
from tests.conftest import write_images

NETWORK = Network(
    name="small",
    stem=Stem(width=8),
    stages=(Stage(op="mbconv", repeats=1, width=8, stride=2, expand=2, se=0.25),),
    head=Head(width=16, classes=4),
    resolution=32,
    preprocess=Preprocess(size=32, resize=36),
)


def keep_model(path: Path, seed: int = 0) -> Path:
    model = build(NETWORK, generator=torch.Generator().manual_seed(seed))
    model.labels = ("cat", "dog", "eel", "fox")
    checkpoint.save(path, checkpoint.from_model(model))
    return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model.safetensors` and `images/`: ten, and one of them is broken."""
    root = tmp_path_factory.mktemp("job")
    keep_model(root / "model.safetensors")
    write_images(root / "images", {"a": 6, "b": 4})
    (root / "images" / "a" / "003.png").write_bytes(b"torn")
    return root


# --- killed ---------------------------------------------------------------------------------------------------------

# Runs a job over and over, each in a forked process that kills itself with SIGKILL at one point.
KILLED = """
import json, os, signal, sys
from pathlib import Path
import effnet.prediction_files as files
from effnet import predict_job
from effnet.predict_job import predict_to_file

root, points = Path(sys.argv[1]), json.loads(sys.argv[2])
predict_job.predict_to_file  # imported before the forks
DIE = lambda: os.kill(os.getpid(), signal.SIGKILL)

def arm(point):
    append, lines, finish, unlink = files.Journal.append, files._line, files.finish, Path.unlink
    done = [0]
    def counted(self, rows):
        if point == f"before batch {done[0]}":
            DIE()
        if point == f"in batch {done[0]}":  # a part of it is on the disk
            torn = b"".join(lines(row.to_dict()) for row in rows)
            self._file.write(torn[: len(torn) * 2 // 3])
            self._file.flush()
            DIE()
        append(self, rows)
        done[0] += 1
    files.Journal.append = counted
    if point == "in the header":
        files._lock = lambda file, path: (file.write(lines({"model": "small"})[:12]), file.flush(), DIE())
    if point == "before the file":
        predict_job.finish = lambda *a, **k: DIE()
    if point == "in the file":
        def torn(path, rows, top_k):
            path.write_text("path,label\\n")
            DIE()
        files.FORMATS = dict.fromkeys(files.FORMATS, torn)
    if point == "after the file":
        Path.unlink = lambda self, *a, **k: DIE() if self.name.endswith(".part") else unlink(self, *a, **k)

left = {}
for point, out in points.items():
    child = os.fork()
    if child == 0:
        arm(point)
        predict_to_file(root / "model.safetensors", [root / "images"], out, batch=3, top_k=2)
        os._exit(0)
    left[point] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(left))
"""
# the rows that need not be made again
POINTS = {
    "in the header": 0, "before batch 0": 0, "in batch 1": 3, "before batch 2": 6, "in batch 3": 9,
    "before the file": 10, "in the file": 10, "after the file": 10,
}  # fmt: skip


def test_a_job_killed_anywhere_and_resumed_makes_the_file_of_an_unbroken_run(bench: Path, tmp_path: Path) -> None:
    model, images = bench / "model.safetensors", [bench / "images"]
    options = {"batch": 3, "top_k": 2}
    endings = [".csv", ".parquet", ".jsonl", ".json"]
    unbroken = {ending: tmp_path / f"unbroken{ending}" for ending in endings}
    for path in unbroken.values():
        done = predict_to_file(model, images, path, **options)
        assert (done.images, done.errors, done.resumed) == (10, 1, 0)
    outs = {point: str(tmp_path / f"{n}{endings[n % 4]}") for n, point in enumerate(POINTS)}
    command = [sys.executable, "-c", KILLED, str(bench), json.dumps(outs)]
    killed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(killed.stdout) == dict.fromkeys(POINTS, -signal.SIGKILL), killed.stderr
    for point, resumed in POINTS.items():
        out = Path(outs[point])
        assert out.exists() == (point == "after the file"), point
        assert part_path(out).exists(), point
        done = predict_to_file(model, images, out, resume=True, top_k=2)  # the batch is that of the journal
        assert (done.images, done.errors, done.resumed) == (10, 1, resumed), point
        if point != "in the header":
            assert done.batch == 3
            assert out.read_bytes() == unbroken[out.suffix].read_bytes(), point
        assert not part_path(out).exists()
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == sorted("01234567uuuu"), "no temporary file is left"


def test_the_command_killed_from_outside_goes_on_with_resume(bench: Path, tmp_path: Path) -> None:
    """A pipe feeds it paths, so that it is in the middle of its job, waiting, when SIGKILL comes."""
    images = sorted(path for path in (bench / "images").rglob("*.png"))
    out = tmp_path / "out.csv"
    words = [sys.executable, "-m", "effnet", "predict", str(bench / "model.safetensors"), "-", "--batch", "1"]
    command = subprocess.Popen([*words, "--out", str(out)], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdin is not None
    command.stdin.write(b"".join(os.fsencode(path) + b"\n" for path in images[:7]))
    command.stdin.flush()
    while not part_path(out).exists() or part_path(out).read_bytes().count(b"\n") < 4:  # settings and three rows
        assert command.poll() is None, command.communicate()
    command.kill()
    command.communicate()
    assert command.returncode == -signal.SIGKILL and not out.exists()
    listed = b"".join(os.fsencode(path) + b"\n" for path in images)
    subprocess.run([*words, "--out", str(out), "--resume"], input=listed, check=True, capture_output=True)
    predict_to_file(bench / "model.safetensors", images, tmp_path / "unbroken.csv", batch=1)
    assert out.read_bytes() == (tmp_path / "unbroken.csv").read_bytes()


# --- refusals -------------------------------------------------------------------------------------------------------


def interrupted(bench: Path, out: Path, **options) -> None:
    """A job that stopped after its first batch."""

    def stop(done: int, errors: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_to_file(bench / "model.safetensors", [bench / "images"], out, batch=2, progress=stop, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 2}, "top_k is 2, but .* begun with 4"),
        ({"turns": True}, "turns is True, but .* begun with False"),
        ({"batch": 5}, "batch is 5, but .* begun with 2"),
    ],
)
def test_a_resumed_job_with_other_settings_is_refused_naming_both(
    bench: Path, tmp_path: Path, change: dict, message: str
) -> None:
    interrupted(bench, tmp_path / "out.csv")
    with pytest.raises(UsageError, match=message):
        predict_to_file(bench / "model.safetensors", [bench / "images"], tmp_path / "out.csv", resume=True, **change)


def test_a_resumed_job_with_another_model_of_the_same_name_is_refused_naming_both(bench: Path, tmp_path: Path) -> None:
    interrupted(bench, tmp_path / "out.csv")
    other = keep_model(tmp_path / "model.safetensors", seed=1)
    with pytest.raises(
        UsageError, match=r"model is small, .* \((\w{16})\), but .* begun with small, .* \((?!\1)\w{16}\)"
    ):
        predict_to_file(other, [bench / "images"], tmp_path / "out.csv", resume=True)


def test_a_resumed_job_with_other_images_is_refused(bench: Path, tmp_path: Path) -> None:
    interrupted(bench, tmp_path / "out.csv")
    with pytest.raises(UsageError, match=r"input 1 is .*000\.png, but .*begun with .*000\.png"):
        predict_to_file(bench / "model.safetensors", [bench / "images" / "b"], tmp_path / "out.csv", resume=True)


def test_on_request_the_first_broken_image_stops_the_job_and_a_mended_one_lets_it_go_on(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"a": 4})
    model, broken = keep_model(tmp_path / "model.safetensors"), tmp_path / "images" / "a" / "002.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"torn")
    out = tmp_path / "out.jsonl"
    with pytest.raises(ImageError, match=r"002\.png"):
        predict_to_file(model, [tmp_path / "images"], out, batch=1, on_error="error")
    broken.write_bytes(whole)
    done = predict_to_file(model, [tmp_path / "images"], out, resume=True, on_error="error")
    assert (done.images, done.errors, done.resumed) == (4, 0, 2)
    rows = [Prediction.from_dict(json.loads(line)) for line in out.read_text().splitlines()]
    assert [Path(row.path).name for row in rows] == ["000.png", "001.png", "002.png", "003.png"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"engine": "spark"}, "local, ray"),
        ({"batch": 0}, "batch is 0"),
        ({"actors": 0}, "actors is 0"),
        ({"engine": "ray", "device": "cuda"}, "CPU cores"),
        ({"on_error": "ignore"}, "report, error"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(bench: Path, tmp_path: Path, wrong: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        predict_to_file(bench / "model.safetensors", [bench / "images"], tmp_path / "new" / "out.csv", **wrong)
    assert not (tmp_path / "new").exists()

"""A checkpoint comes back exactly as it was, or not at all: round trips, damage of every kind, full disks, kills."""

import errno
import hashlib
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet import checkpoint
from effnet.checkpoint import Checkpoint, CheckpointError, CheckpointWarning
from effnet.files import FileError
from effnet.network import Model, build
from effnet.spec import Head, Network, Preprocess, Stage, Stem
from effnet.value import UsageError

NETWORK = Network(
    name="tiny",
    stem=Stem(width=4),
    stages=(
        Stage(op="mbconv", repeats=1, width=4, stride=1),
        Stage(op="mbconv", repeats=1, width=8, stride=2, expand=2, se=0.25),
    ),
    head=Head(width=8, classes=3),
    resolution=16,
    preprocess=Preprocess(size=16, resize=18, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)),
)
LABELS = ("cat", "dog", "a long name, with ünïcödé")


def tiny_model(seed: int = 0) -> Model:
    model = build(NETWORK, generator=torch.Generator().manual_seed(seed))
    model.labels = LABELS
    return model


def save_tiny(path: Path, seed: int = 0, **settings: Any) -> Checkpoint:
    kept = checkpoint.from_model(tiny_model(seed), extra={"seed": seed})
    checkpoint.save(path, kept, **settings)
    return kept


def same_tensors(left: Checkpoint, right: Checkpoint) -> bool:
    same = left.tensors.keys() == right.tensors.keys()
    return same and all(torch.equal(left.tensors[name], right.tensors[name]) for name in left.tensors)


def test_everything_comes_back(tmp_path: Path) -> None:
    state = {
        "ema/half": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "optimizer/step": torch.tensor(7),
        "optimizer/empty": torch.zeros(0, 3),
        "optimizer/flags": torch.tensor([True, False]),
        "raw/transposed": torch.arange(6.0).reshape(2, 3).T,
    }
    kept = checkpoint.from_model(
        tiny_model(), recipe={"epochs": 3, "lr": 0.1}, metrics={"accuracy": 0.75}, extra={"step": 12}, state=state
    )
    checkpoint.save(tmp_path / "a.safetensors", kept)
    back = checkpoint.load(tmp_path / "a.safetensors")
    for name in ("network", "preprocess", "labels", "recipe", "metrics", "versions", "extra"):
        assert getattr(back, name) == getattr(kept, name), name
    assert same_tensors(back, kept)
    assert {name: tensor.dtype for name, tensor in back.tensors.items()} == {
        name: tensor.dtype for name, tensor in kept.tensors.items()
    }
    assert back.versions["torch"] == torch.__version__


def test_weights_and_training_state_are_told_apart_by_prefix(tmp_path: Path) -> None:
    model = tiny_model()
    kept = checkpoint.from_model(model, state={"ema/stem.conv.weight": torch.ones(1)})
    assert kept.weights.keys() == model.state_dict().keys()
    assert list(kept.state("ema")) == ["stem.conv.weight"] and kept.state("optimizer") == {}
    with pytest.raises(UsageError, match="momentum has none"):
        checkpoint.from_model(model, state={"momentum": torch.ones(1)})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=12)
@given(extra=st.dictionaries(st.text(), json_values, max_size=3))
def test_any_json_comes_back(tmp_path_factory: pytest.TempPathFactory, extra: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "json.safetensors"
    tensors = {"stem.conv.weight": torch.ones(2)}
    checkpoint.save(path, Checkpoint(network=NETWORK, preprocess=NETWORK.preprocess, tensors=tensors, extra=extra))
    assert checkpoint.load(path).extra == extra


def test_the_file_is_plain_safetensors_with_a_digest_anyone_can_check(tmp_path: Path) -> None:
    """Oracle: the safetensors library reads it, and sha256 over the raw bytes with 64 zeros is the digest."""
    path = tmp_path / "a.safetensors"
    kept = save_tiny(path)
    assert safetensors.torch.load_file(path).keys() == kept.tensors.keys()
    with safetensors.safe_open(path, "pt") as file:
        entries = file.metadata()
    assert json.loads(entries["effnet"])["network"] == json.loads(NETWORK.to_json())
    zeroed, count = re.subn(rb'"sha256":"[0-9a-f]{64}"', b'"sha256":"%s"' % (b"0" * 64), path.read_bytes())
    assert count == 1 and hashlib.sha256(zeroed).hexdigest() == entries["sha256"]


def test_tensors_that_share_memory_are_saved_as_two(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    tensors = {"raw/a": shared, "raw/b": shared, "raw/c": shared[1:3]}
    kept = checkpoint.from_model(tiny_model(), state=tensors)
    checkpoint.save(tmp_path / "a.safetensors", kept)
    assert same_tensors(checkpoint.load(tmp_path / "a.safetensors"), kept)


def test_the_model_comes_back_in_evaluation_mode_with_the_same_logits(tmp_path: Path) -> None:
    model = tiny_model().eval()
    checkpoint.save(tmp_path / "a.safetensors", checkpoint.from_model(model))
    back = checkpoint.to_model(checkpoint.load(tmp_path / "a.safetensors"))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back(images), model(images))
    assert not back.training and back.labels == LABELS and back.network == model.network
    assert all(parameter.requires_grad for parameter in back.parameters())


def test_half_precision_weights_become_a_model_of_full_precision() -> None:
    kept = checkpoint.from_model(tiny_model())
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in kept.tensors.items()}
    half = Checkpoint(network=NETWORK, preprocess=NETWORK.preprocess, tensors=halves)
    assert {parameter.dtype for parameter in checkpoint.to_model(half).parameters()} == {torch.float32}


def test_weights_that_do_not_fit_are_listed_on_both_sides() -> None:
    tensors = dict(checkpoint.from_model(tiny_model()).tensors)
    del tensors["head.conv.weight"]
    tensors["tail.weight"] = torch.ones(1)
    tensors["classifier.bias"] = torch.ones(4)
    kept = Checkpoint(network=NETWORK, preprocess=NETWORK.preprocess, tensors=tensors)
    with pytest.raises(UsageError) as caught:
        checkpoint.to_model(kept)
    message = str(caught.value)
    assert "1 missing: head.conv.weight" in message and "1 not expected: tail.weight" in message
    assert "1 of another shape: classifier.bias is (4,), not (3,)" in message


def test_labels_must_fit_the_network() -> None:
    with pytest.raises(UsageError, match=r"2 labels .* do not fit 3 outputs"):
        Checkpoint(network=NETWORK, preprocess=NETWORK.preprocess, tensors={}, labels=("a", "b"))


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", range(100))
def test_a_file_cut_off_anywhere_is_noticed_and_the_previous_one_used(tmp_path: Path, percent: int) -> None:
    path = tmp_path / "a.safetensors"
    old = save_tiny(path, seed=1)
    save_tiny(path, seed=2, keep_previous=True)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * percent // 100])
    with pytest.raises(CheckpointError):
        checkpoint.load(path, fallback=False)
    with pytest.warns(CheckpointWarning) as caught:
        back = checkpoint.load(path)
    assert same_tensors(back, old) and back.extra == {"seed": 1}
    (warning,) = caught
    assert str(path) in str(warning.message) and f"Using {path}.previous instead" in str(warning.message)
    assert warning.filename == __file__


def test_one_byte_too_few_and_one_too_many_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tiny(path)
    content = path.read_bytes()
    for changed in (content[:-1], content + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            checkpoint.load(path)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """All bits of the length, 300 bits of the header, 100 of the tensors; the file is restored in between."""
    path = tmp_path / "a.safetensors"
    save_tiny(path)
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    bits = [*range(64), *rng.integers(64, header_end * 8, 300), *rng.integers(header_end * 8, len(content) * 8, 100)]
    for bit in map(int, bits):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            checkpoint.load(path)
    path.write_bytes(content)
    checkpoint.load(path)


def test_a_missing_file_is_replaced_by_the_previous_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    old = save_tiny(path, seed=1)
    save_tiny(path, seed=2, keep_previous=True)
    path.unlink()
    with pytest.warns(CheckpointWarning, match="there is no file"):
        assert same_tensors(checkpoint.load(path), old)


def test_two_damaged_files_are_both_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tiny(path)
    save_tiny(path, keep_previous=True)
    for damaged in (path, checkpoint.previous_path(path)):
        damaged.write_bytes(damaged.read_bytes()[:-7])
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors is damaged.*previous one cannot be used.*previous is dam"
    ):
        checkpoint.load(path)


def test_a_damaged_file_does_not_take_the_place_of_a_good_previous_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    good = save_tiny(path, seed=1)
    save_tiny(path, seed=2, keep_previous=True)
    path.write_bytes(path.read_bytes()[:-7])
    save_tiny(path, seed=3, keep_previous=True)
    assert checkpoint.load(path).extra == {"seed": 3}
    assert same_tensors(checkpoint.load(checkpoint.previous_path(path)), good)


def test_without_hard_links_the_previous_file_is_kept_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*paths: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "a.safetensors"
    save_tiny(path, seed=1)
    save_tiny(path, seed=2, keep_previous=True)
    assert [checkpoint.load(p).extra["seed"] for p in (path, checkpoint.previous_path(path))] == [2, 1]


# --- other kinds of files -------------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("archive", [False, True], ids=["pickle.dump", "torch.save"])
def test_a_pickle_named_safetensors_is_refused_and_never_run(tmp_path: Path, archive: bool) -> None:
    path, traces = tmp_path / "a.safetensors", tmp_path / "it-ran"
    with path.open("wb") as file:
        (torch.save if archive else pickle.dump)({"weight": Bomb(traces)}, file)
    with pytest.raises(CheckpointError, match="whatever its name says: it is a pickle") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value) and not traces.exists()
    pickle.loads(pickle.dumps(Bomb(traces)))
    assert traces.exists(), "this bomb does nothing even when it goes off"


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    foreign = tmp_path / "timm.safetensors"
    safetensors.torch.save_file({"conv_stem.weight": torch.ones(2)}, foreign)
    with pytest.raises(checkpoint.ForeignError, match="not an effnet checkpoint: name its network"):
        checkpoint.load(foreign)
    assert not checkpoint.is_checkpoint(foreign)
    text = tmp_path / "page.safetensors"
    text.write_text("<!doctype html><title>Not found</title>")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoint.load(text)
    with pytest.raises(CheckpointError, match="Is a directory"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="there is no file"):
        checkpoint.load(tmp_path / "none.safetensors")


def test_a_format_from_the_future_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 99)
    save_tiny(path)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="has format 99; this effnet reads format 1"):
        checkpoint.load(path)


# --- disks and kills ------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(limit: int) -> Generator[None]:
    """The system refuses to let a file grow beyond `limit` bytes: as a full disk, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_untouched(path: Path, old: Checkpoint) -> None:
    assert [file.name for file in path.parent.iterdir()] == [path.name], "a temporary file stayed behind"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_tensors(checkpoint.load(path), old)


@pytest.mark.parametrize("limit", [0, 100, 3000, 7000])
def test_a_write_that_stops_half_way_leaves_the_old_file(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "a.safetensors"
    old = save_tiny(path, seed=1)
    assert path.stat().st_size > limit
    with largest_file(limit), pytest.raises(FileError, match="the file that was there is untouched") as caught:
        save_tiny(path, seed=2)
    assert str(caught.value).startswith(f"cannot write {path}: ") and "\n" not in str(caught.value)
    assert_untouched(path, old)


def test_a_full_disk_is_reported_in_the_system_s_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems say only at the flush that there was no room."""
    path = tmp_path / "a.safetensors"
    old = save_tiny(path, seed=1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(FileError, match="No space left on device; the file that was there is untouched"):
            save_tiny(path, seed=2, keep_previous=True)
    assert_untouched(path, old)


def test_an_interrupt_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    old = save_tiny(path, seed=1)

    def interrupt(*paths: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_tiny(path, seed=2)
    assert_untouched(path, old)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot write .*: .*Not a directory"):
        save_tiny(tmp_path / "file" / "a.safetensors")


def test_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    """A process saves without pause; it is killed outright; what is there must be whole, without a fallback."""
    path = tmp_path / "a.safetensors"
    code = (
        "import sys; from pathlib import Path; from tests.test_checkpoint import save_tiny\n"
        "path = Path(sys.argv[1]); save_tiny(path); print('first', flush=True)\n"
        "for seed in range(10**6): save_tiny(path, seed, keep_previous=True)"
    )
    root = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=root) as saver:
        try:
            assert saver.stdout is not None and saver.stdout.readline() == b"first\n"
            seen = {checkpoint.load(path, fallback=False).extra["seed"] for _ in range(100)}  # while it is replaced
        finally:
            saver.send_signal(signal.SIGKILL)
    assert len(seen) > 1
    checkpoint.load(path, fallback=False)
    checkpoint.load(checkpoint.previous_path(path), fallback=False)

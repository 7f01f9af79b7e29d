"""Several processes are one: the same losses, samples and statistics, and whoever goes on can be any number.

Every expectation comes from a process alone, from PyTorch's own batch norm, or from a run that nobody killed.
"""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import effnet.train as train
from effnet import checkpoint, cluster, data
from effnet.cluster import SharedNorm
from effnet.evaluate import Unfinished, evaluate
from effnet.value import UsageError
from tests.conftest import write_images
from tests.ranks import ended, together
from tests.test_train import RECIPE, assert_equal_runs, fresh_model, made_source, made_splits

# 20 steps in ten epochs and two phases with everything random, and classes that weigh differently
SHARED = RECIPE.replace(
    epochs=10, batch=16, lr_batch=16, cutmix=(0.0, 0.5), dropout=(0.1, 0.2), drop_path=(0.1, 0.2), magnitude=(0.0, 5.0),
    optimizer="sgd", balance=True,
)  # fmt: skip
SAME = {"rtol": 1e-6, "atol": 0}  # of losses: float32 sums taken in another order


def learn(out: Path, changes: dict[str, Any], options: dict[str, Any] | None = None, stop: int = 0) -> dict[str, Any]:
    """Trains, to the end or to SIGTERM after step `stop`; what this process saw of it."""
    seen: list[list[int]] = []
    batches = data.batches

    def watched(*arguments: Any, **keywords: Any) -> Iterator[data.Batch]:
        for batch in batches(*arguments, **keywords):
            seen.extend([batch.indices.tolist()] if keywords["train"] else [])
            yield batch

    data.batches = watched
    model, told, states, fresh = fresh_model(), {"losses": [], "judged": [], "samples": seen}, [], train.fresh
    train.fresh = lambda *arguments: states.append(fresh(*arguments)) or states[0]
    if cluster.rank():
        nn.init.zeros_(model.stem.conv.weight)  # only the first process's weights may count
    options = {"workers": 0} | (options or {})
    try:
        for event in train.training(made_splits(), model, SHARED.replace(**changes), out, **options):
            if event["event"] == "step":
                told["losses"].append(event["loss"])
                if event["step"] == stop and cluster.rank() == cluster.world() - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            elif event["event"] == "epoch":
                told["judged"].append(event["val"]["nll"])
    except train.Interrupted as error:
        told["signal"] = error.signal
    tensors = [*states[0].model.state_dict().values(), *states[0].evaluated.state_dict().values()]
    bits = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
    return told | {"weights": hashlib.sha256(bits).hexdigest()}


def samples(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """Of each step, the samples of all processes."""
    return [sorted(itertools.chain(*shares)) for shares in zip(*(rank["samples"] for rank in ranks), strict=True)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run of one process."""
    return together(1, learn, tmp_path_factory.mktemp("alone") / "run", {})[0]


@pytest.mark.parametrize("world", [2, 4])
def test_two_and_four_processes_learn_what_one_learns(alone: dict[str, Any], tmp_path: Path, world: int) -> None:
    """Losses of 20 steps within 1e-6, the same samples in each step, the same judgement; all end with the same bits."""
    ranks = together(world, learn, tmp_path, {})
    assert len(alone["losses"]) == 20
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], alone["losses"], **SAME)
        np.testing.assert_allclose(rank["judged"], alone["judged"], rtol=1e-5)
    assert samples(ranks) == samples([alone])
    assert len({rank["weights"] for rank in ranks}) == 1


def test_a_run_goes_on_with_another_number_of_processes(alone: dict[str, Any], tmp_path: Path) -> None:
    """Two processes stopped in the middle of an epoch, four, then one: order and losses are those of one alone."""
    parts = [together(2, learn, tmp_path, {}, None, 7)]
    assert [rank["signal"] for rank in parts[0]] == [signal.SIGTERM] * 2  # one was told, both stopped
    parts.append(together(4, learn, tmp_path, {}, {"resume": True}, 13))
    parts.append(together(1, learn, tmp_path, {}, {"resume": True}))
    np.testing.assert_allclose([loss for part in parts for loss in part[0]["losses"]], alone["losses"], **SAME)
    assert [step for part in parts for step in samples(part)] == samples([alone])


def test_parts_of_a_step_are_the_same_whoever_computes_them(tmp_path: Path) -> None:
    """Batch norm sees one of two parts at a time, chosen by place: one process and two agree about them."""
    changes = {"accumulate": 2, "epochs": 3}
    (one,) = together(1, learn, tmp_path / "1", changes)
    for rank in together(2, learn, tmp_path / "2", changes):
        np.testing.assert_allclose(rank["losses"], one["losses"], **SAME)


def learn_with_fixed_norms(out: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Trains with batch norm as in evaluation, so that an image's logits do not depend on the others of its part."""
    prepare = train._prepare

    def fixed(state: Any, phase: Any, freeze: int) -> None:
        prepare(state, phase, freeze)
        for module in state.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    train._prepare = fixed
    return learn(out, changes)


def test_a_batch_in_parts_is_the_whole_batch(tmp_path: Path) -> None:
    """Two parts, eight parts, or two parts by two processes: the losses and weights of the whole batch at once."""
    (whole,) = together(1, learn_with_fixed_norms, tmp_path / "1-1", {"epochs": 3})
    theirs = checkpoint.load(tmp_path / "1-1" / "last.safetensors").tensors
    for world, parts in ((1, 2), (1, 8), (2, 2)):
        out = tmp_path / f"{world}-{parts}"
        cut = together(world, learn_with_fixed_norms, out, {"epochs": 3, "accumulate": parts})[0]
        np.testing.assert_allclose(cut["losses"], whole["losses"], **SAME)
        ours = checkpoint.load(out / "last.safetensors").tensors
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


# --- batch norm -----------------------------------------------------------------------------------------------------


def normalised(shares: list[int]) -> list[np.ndarray]:
    """One step of `SharedNorm` on this process's share of eight images: the output, the gradients, the statistics."""
    norm, (x, outward) = nn.BatchNorm2d(3, momentum=0.2), maps()
    cluster.share_norms(nn.Sequential(norm))
    assert (type(norm) is SharedNorm) == (cluster.world() > 1)
    start = sum(shares[: cluster.rank()])
    mine = slice(start, start + shares[cluster.rank()])
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    x = x[mine].requires_grad_()
    y = norm(x)
    y.backward(outward[mine])
    cluster.sum_gradients(norm.parameters())
    assert x.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    kept = [norm.running_mean, norm.running_var, norm.weight.grad, norm.bias.grad, norm.num_batches_tracked]
    return [tensor.detach().numpy() for tensor in (y, x.grad, *kept) if tensor is not None]


def maps() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight images of three channels, far from zero, and a gradient for what comes out."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 3, 5, 4, generator=generator) * torch.tensor([1.0, 0.1, 5.0]).view(1, 3, 1, 1) + 7
    return x, torch.randn(8, 3, 5, 4, generator=generator)


@pytest.mark.parametrize("shares", [[4, 4], [5, 3], [1, 2, 5]])
def test_shared_batch_norm_is_pytorchs_over_the_whole_batch(shares: list[int]) -> None:
    """Forward, all three gradients and the running statistics, also for unequal shares."""
    (whole,) = together(1, normalised, [8])
    ranks = together(len(shares), normalised, shares)
    for place in (0, 1):
        np.testing.assert_allclose(np.concatenate([rank[place] for rank in ranks]), whole[place], rtol=1e-5, atol=2e-6)
    for rank in ranks:
        for ours, theirs in zip(rank[2:], whole[2:], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-5)


def test_renewed_statistics_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    changes = {"norm_batches": 2, "epochs": 2}
    for world in (1, 2):
        together(world, learn, tmp_path / str(world), changes)
    one, two = (checkpoint.load(tmp_path / str(world) / "best.safetensors").weights for world in (1, 2))
    for name in (name for name in one if "running" in name):
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


# --- judging --------------------------------------------------------------------------------------------------------


def judge(images: int, stop: bool) -> tuple[Any, list[int]]:
    """The evaluation of so many images, four at a time, and those that this process computed."""
    seen: list[int] = []
    model, source = fresh_model(), replace(made_source("val", images, 5), classes=("0", "1"))
    model.labels = source.classes
    forward = model.forward
    model.forward = lambda x: seen.append(len(x)) or forward(x)
    try:
        found = evaluate(model, source, batch=4, workers=0, bootstrap=0, stop=lambda: stop and cluster.rank() == 1)
    except Unfinished:
        return None, seen
    return found, seen


@pytest.mark.parametrize("images", [3, 13])
def test_evaluation_counts_each_image_exactly_once(images: int) -> None:
    """Three images and four processes: three of them have nothing to do."""
    ((whole, seen),) = together(1, judge, images, False)
    assert sum(seen) == images == int(np.sum(whole.confusion))
    for world in (2, 4):
        ranks = together(world, judge, images, False)
        assert all(found == whole for found, _ in ranks)
        assert sum(sum(seen) for _, seen in ranks) == images


def test_an_evaluation_that_one_process_ends_is_unfinished_for_all() -> None:
    assert [found for found, _ in together(2, judge, 13, True)] == [None, None]


# --- what cannot be -------------------------------------------------------------------------------------------------


def refuse() -> None:
    """The first process refuses."""

    def no() -> None:
        raise UsageError("the folder is full of eels")

    cluster.first(no)


def vanish() -> None:
    """The second process is killed while the first waits for it."""
    if cluster.rank():
        os.kill(os.getpid(), signal.SIGKILL)
    cluster.total(torch.ones(1))


def test_what_the_first_process_refuses_ends_all_and_only_it_says_so() -> None:
    first, second = ended(2, refuse)
    assert str(first) == str(second) == "the folder is full of eels"
    assert type(first) is UsageError and type(second) is cluster.Elsewhere


def test_a_lost_process_is_one_clear_error() -> None:
    first, second = ended(2, vanish)
    assert second == -signal.SIGKILL
    assert isinstance(first, cluster.Lost) and str(first).startswith("process 0 lost the others of this run (")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 15}, "a batch of 15 cannot be shared equally by 2 processes"),
        ({"batch": 14}, "a batch of 14 cannot be shared equally by 2 processes, 2 mirrored images at a time"),
        ({"batch": 12, "accumulate": 5}, "a batch of 12 on 2 processes cannot be computed in so many"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    changes |= {"cutmix": (0.0, 0.0)}
    with pytest.raises(UsageError, match=message):
        together(2, learn, tmp_path / "run", changes)
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="process 2 of this machine has no GPU: it has 2"), cluster.joined("cuda"):
        pass


# --- torchrun -------------------------------------------------------------------------------------------------------


def command(*words: str) -> int:
    """The exit code of `effnet WORDS`."""
    from effnet.cli import main

    return main(list(words))


def steps_of(out: Path) -> list[int]:
    """The steps in the log of a run, as far as it has one."""
    log = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
    lines = [line for line in log.splitlines() if line.startswith('{"event": "step"') and line.endswith("}")]
    return [json.loads(line)["step"] for line in lines]


def process_of(rank: int, parent: int) -> int:
    """The process that `parent` started as this rank."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    told = f"RANK={rank}".encode()
    (found,) = (pid for pid in children if told in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return int(found)


def test_torchrun_starts_a_killed_process_again_and_the_run_ends_unbroken(tmp_path: Path) -> None:
    """`torchrun --max-restarts=1`; the second of two processes is killed, all go on from the last saved state."""
    root = write_images(tmp_path / "data", {"train/a": 12, "train/b": 12, "val/a": 3, "val/b": 3})
    checkpoint.save(tmp_path / "start.safetensors", checkpoint.from_model(fresh_model()))
    words = ["train", str(root), "--model", str(tmp_path / "start.safetensors"), "--save-every", "2", "--workers", "0"]
    for setting in (
        "epochs=12",
        "warmup=0",
        "batch=8",
        "precision=float32",
        "crop=resize",
        "size_px=16,16",
        "patience=0",
    ):
        words += ["--set", setting]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    assert together(2, command, *words, "--out", str(whole)) == [0, 0]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    process = subprocess.Popen(
        [*launch, "-m", "effnet", *words, "--out", str(broken)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while len(steps_of(broken)) < 7 and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    os.kill(process_of(1, process.pid), signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    starts = [json.loads(line) for line in (broken / "log.jsonl").read_text().splitlines() if '"start"' in line]
    assert [start["processes"] for start in starts] == [2, 2] and starts[1]["step"] >= 2
    assert said.count("12/12") == 1  # one process speaks
    assert_equal_runs(broken, whole)
    assert steps_of(broken) == list(range(1, 37))

"""What may go wrong while a network learns: numbers that explode, disks that fill, files that tear, data that changes.

Each time the run goes on or ends with one line that names what is wrong, and its folder can be gone on with.
"""

import json
import math
import resource
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import effnet.plan as planning
import effnet.train as train
from effnet import checkpoint, recipes
from effnet.checkpoint import CheckpointError, CheckpointWarning
from effnet.data import open_data, order
from effnet.images import ImageError
from effnet.journal import Journal, JournalWarning
from effnet.network import build
from effnet.samples import Splits
from effnet.spec import Network, Stage
from effnet.value import UsageError
from tests.conftest import write_images
from tests.test_train import NETWORK, RECIPE, assert_equal_runs, events, fresh_model, made_source, made_splits, stable

SHORT = RECIPE.replace(epochs=3, stages=1, size_px=(16, 16))  # three epochs of four steps


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    events(out, SHORT)
    return out


def copied(run: Path, out: Path) -> Path:
    return Path(shutil.copytree(run, out))


def stopped_after(step: int, out: Path, splits: Splits | None = None, **options: Any) -> Path:
    """A run that was killed after a step."""
    running = train.training(splits or made_splits(), fresh_model(), SHORT, out, **options)
    next(event for event in running if event["event"] == "step" and event["step"] == step)
    running.close()
    return out


# --- numbers that explode -------------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, *computed: int) -> list[float]:
    """The loss of these computations is NaN, counted over all of them from 1; what each rate was, as they come."""
    weighted, rates, set_rate = train.weighted_cross_entropy, [], train._set_rate

    def noted(*given: Any) -> float:
        rates.append(set_rate(*given))
        return rates[-1]

    def spoilt(*given: Any) -> torch.Tensor:
        return weighted(*given) * (math.nan if len(rates) in computed else 1)

    monkeypatch.setattr(train, "_set_rate", noted)
    monkeypatch.setattr(train, "weighted_cross_entropy", spoilt)
    return rates


def test_a_run_that_diverges_goes_back_and_learns_more_slowly(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN at step 7 of 12; the last state is that of step 4: from there on half the rate, and a line in the log."""
    rates = poison(monkeypatch, 7)
    happened = events(tmp_path, SHORT)
    (back,) = (event for event in happened if event["event"] == "rollback")
    assert (back["step"], back["rollbacks"], back["most"], back["rate_factor"]) == (4, 1, train.RETRIES, 0.5)
    assert "the loss became nan at step 7" in back["reason"]
    planned = [event["lr"] for event in stable(whole_run) if event["event"] == "step"]
    assert rates == pytest.approx(planned[:7] + [rate / 2 for rate in planned[4:]], rel=1e-12)
    log = stable(tmp_path)
    assert [event["step"] for event in log if event["event"] == "step"] == list(range(1, 13))
    assert [event for event in log if event["event"] == "rollback"] == [back]
    assert happened[-1]["event"] == "end"


def test_the_very_first_steps_may_diverge_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 1, 2)
    backs = [event for event in events(tmp_path, SHORT) if event["event"] == "rollback"]
    assert [(event["step"], event["rate_factor"]) for event in backs] == [(0, 0.5), (0, 0.25)]


def test_going_back_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice at most when told so; then one error, and the state of the last good epoch is kept, with its rate."""
    poison(monkeypatch, *range(6, 100))
    with pytest.raises(
        train.Diverged, match=r"step 5: lower lr .*; the last saved state is intact\. Going back 2 times"
    ):
        events(tmp_path, SHORT, retries=2)
    kept = checkpoint.load(tmp_path / "last.safetensors").extra
    assert (kept["step"], kept["rollbacks"]) == (4, 2)
    monkeypatch.undo()
    resumed = events(tmp_path, SHORT, resume=True)
    assert resumed[-1]["event"] == "end"
    assert next(e["lr"] for e in resumed if e["event"] == "step") < 0.3 * SHORT.lr


def test_weights_that_are_no_numbers_are_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that overflows while the loss before it was fine: noticed before the save, at the epoch's end."""
    step, calls = torch.optim.AdamW.step, []

    def overflowing(optimizer: Any, *given: Any) -> Any:
        calls.append(1)
        found = step(optimizer, *given)
        if len(calls) == 8:
            optimizer.param_groups[0]["params"][0].data.fill_(math.inf)
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    happened = events(tmp_path, SHORT)
    (back,) = (event for event in happened if event["event"] == "rollback")
    assert back["step"] == 4 and "weights were no longer finite after step 8" in back["reason"]
    assert all(tensor.isfinite().all() for tensor in checkpoint.load(tmp_path / "best.safetensors").tensors.values())


# --- disks that fill ------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_nothing_but_the_saves_it_refused(
    whole_run: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """No file may grow beyond 1,000 bytes during steps 6 to 9: the log waits, two saves fail, and nothing is lost."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    failed, before = [], b""
    warnings.simplefilter("always")
    try:
        for event in train.training(made_splits(), fresh_model(), SHORT, tmp_path):
            if event["event"] == "step" and event["step"] == 6:
                before = (tmp_path / "last.safetensors").read_bytes()
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            if event["event"] == "step" and event["step"] == 9:
                assert (tmp_path / "last.safetensors").read_bytes() == before
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            failed += [event] if event["event"] == "save" else []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (said,) = failed
    assert said["step"] == 8 and all("the file that was there is untouched" in text for text in said["save_failed"])
    assert [str(w.message) for w in recwarn if w.category is JournalWarning] == [
        f"cannot write {tmp_path}/log.jsonl: File too large; the run goes on, its log waits in memory."
    ]
    assert [event for event in stable(tmp_path) if event["event"] != "save"] == stable(whole_run)
    ours, theirs = (checkpoint.load(out / "last.safetensors").tensors for out in (tmp_path, whole_run))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_folder_that_takes_no_first_state_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: Any, **options: Any) -> None:
        raise CheckpointError(f"cannot write {path}: No space left on device.")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        events(tmp_path, SHORT)


# --- files that tear ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [0, 3, 50, 99])
def test_a_torn_state_gives_way_to_the_one_before_it(whole_run: Path, tmp_path: Path, percent: int) -> None:
    """Both are named, and the run ends as if nothing had been. (`test_checkpoint` tears a file at every per cent.)"""
    out = stopped_after(11, tmp_path / "run")
    last = out / "last.safetensors"
    last.write_bytes(last.read_bytes()[: last.stat().st_size * percent // 100])
    with pytest.warns(CheckpointWarning) as said:
        resumed = events(out, SHORT, resume=True)
    assert resumed[0]["step"] == 4
    assert all(str(last) in str(w.message) and f"{last}.previous" in str(w.message) for w in said)
    assert_equal_runs(out, whole_run)


def test_a_torn_line_of_the_log_is_written_again(whole_run: Path, tmp_path: Path) -> None:
    out = stopped_after(7, tmp_path / "run")
    (out / "log.jsonl").write_text((out / "log.jsonl").read_text()[:-20])
    events(out, SHORT, resume=True)
    assert_equal_runs(out, whole_run)


@pytest.mark.parametrize("name", ["plan.json", "last.safetensors"])
def test_a_folder_without_its_files_cannot_be_gone_on_with(whole_run: Path, tmp_path: Path, name: str) -> None:
    out = copied(whole_run, tmp_path / "run")
    for path in out.glob(f"{name}*"):
        path.unlink()
    with pytest.raises(UsageError, match=rf"{out}.*{name}"):
        events(out, SHORT, resume=True)


def test_a_journal_drops_what_came_after_the_state(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "log.jsonl")
    journal.begin()
    told = [("start", 0), ("phase", 0), ("step", 1), ("step", 2), ("epoch", 2), ("phase", 2), ("step", 3)]
    for name, step in told:
        journal.add({"event": name, "step": step})

    def kept(step: int, judged: bool) -> list[tuple[str, int]]:
        copy = Journal(tmp_path / "copy.jsonl")
        copy.path.write_text(journal.path.read_text())
        copy.keep(step, judged=judged, rollbacks=0)
        return [(event["event"], event["step"]) for event in map(json.loads, copy.path.read_text().splitlines())]

    assert kept(3, judged=False) == told
    assert kept(2, judged=True) == told[:5]
    assert kept(2, judged=False) == told[:4]
    assert kept(0, judged=True) == told[:1]


# --- what cannot be -------------------------------------------------------------------------------------------------

OTHER = NETWORK.replace(stages=(*NETWORK.stages[:1], Stage(op="fused", repeats=1, width=16, stride=2, expand=2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_px": (2, 16)}, r"recipe size_px is 2; it must be between 8 and 4096"),
        ({"size_px": (8, 16)}, r"recipe size_px \(8, 16\) is below the stride 16 of deep"),
        ({"batch": 37}, r"recipe batch is 37, but there are 36 images to train on: --set batch=N"),
        ({"memory_gb": 1e-6}, r"memory_gb is 1e-06: the phase at 1\d px with batch 1 takes about .* would fit"),
        ({"epoch": 3}, r"Recipe field 'epoch' is not one of .*Did you mean 'epochs'\?"),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line_and_no_folder(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    stages = tuple(stage.replace(stride=2) for stage in (*NETWORK.stages, NETWORK.stages[1]))
    deep = NETWORK.replace(name="deep", stages=stages)
    with pytest.raises(UsageError, match=message) as said:
        list(train.training(made_splits(), build(deep), SHORT.replace(**changes), tmp_path / "run"))
    assert "\n" not in str(said.value) and not (tmp_path / "run").exists()


def test_a_phase_that_the_machine_cannot_hold_says_which_and_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of a batch it may fit: the advice counts whole batches."""
    limit = recipes.memory(SHORT, NETWORK, 16, 18) - 1
    monkeypatch.setattr(planning, "memory_bytes", lambda device: limit)
    with pytest.raises(UsageError, match=r"phase at 16 px with batch 18 .* batch (\d+) would fit") as said:
        events(tmp_path / "run", SHORT.replace(batch=36, accumulate=2))
    assert "--set batch=34" in str(said.value)  # twice 17
    assert not (tmp_path / "run").exists()
    events(tmp_path / "run", SHORT.replace(batch=34, accumulate=2, epochs=1, warmup=0))


@pytest.mark.parametrize(
    ("splits", "network", "message"),
    [
        (
            made_splits(("dark", "bright")),
            NETWORK,
            "another class list: then 2, now 2; only then light; only now bright",
        ),
        (made_splits(("light", "dark")), NETWORK, "another class list: the same in another order"),
        (
            replace(made_splits(), train=made_source("train", 35, 36)),
            NETWORK,
            r"training data: then 36 images .* now 35",
        ),
        (made_splits(), OTHER, r"another network: then tiny, now tiny: stages\.1\.repeats was 2, is 1"),
    ],
)
def test_going_on_with_something_else_is_refused_and_the_folder_stays(
    whole_run: Path, tmp_path: Path, splits: Splits, network: Network, message: str
) -> None:
    out = stopped_after(7, tmp_path / "run")
    with pytest.raises(UsageError, match=message) as said:
        list(train.training(splits, build(network), SHORT, out, resume=True))
    assert "\n" not in str(said.value)
    events(out, SHORT, resume=True)
    assert_equal_runs(out, whole_run)


def test_a_model_to_use_is_no_state_to_go_on_from(whole_run: Path, tmp_path: Path) -> None:
    out = copied(whole_run, tmp_path / "run")
    shutil.copy(out / "best.safetensors", out / "last.safetensors")
    with pytest.raises(UsageError, match="holds a model to use, not a state to go on from"):
        events(out, SHORT, resume=True)


# --- data that changes ----------------------------------------------------------------------------------------------


def learn_files(root: Path, out: Path, on_error: Any = "error", **options: Any) -> Iterator[train.Event]:
    """A run on a folder of images."""
    recipe = SHORT.replace(crop="resize", on_error=on_error)
    return train.training(open_data(root), fresh_model(), recipe, out, workers=0, save_every=3, **options)


def test_data_that_shrinks_is_named_and_the_run_goes_on_when_it_is_back(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data", {"train/a": 18, "train/b": 18, "val/a": 2, "val/b": 2})
    list(learn_files(root, tmp_path / "whole"))
    fourth_step = order(36, seed=SHORT.seed, epoch=0, batch=SHORT.batch)[3]
    gone = root / open_data(root).train.ids[fourth_step[0]]
    kept = gone.read_bytes()
    running = learn_files(root, tmp_path / "run")
    next(event for event in running if event["event"] == "step" and event["step"] == 2)
    gone.unlink()
    with pytest.raises(ImageError, match=rf"{gone}: cannot be read \(No such file or directory\)"):
        list(running)
    with pytest.raises(UsageError, match=r"another training data: then 36 images .* now 35"):
        list(learn_files(root, tmp_path / "run", resume=True))
    gone.write_bytes(kept)
    assert next(learn_files(root, tmp_path / "run", resume=True))["step"] == 3
    list(learn_files(root, tmp_path / "run", resume=True))
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_an_image_broke_goes_on_without_it(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data", {"train/a": 18, "train/b": 18, "val/a": 2, "val/b": 2})
    fourth_step = order(36, seed=SHORT.seed, epoch=0, batch=SHORT.batch)[3]
    broken = open_data(root).train.ids[fourth_step[0]]
    (root / broken).write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"is not a JPEG.*leave such images out with --set on_error=skip; --resume"):
        list(learn_files(root, tmp_path / "run"))
    happened = list(learn_files(root, tmp_path / "run", resume=True, on_error="skip"))
    assert (happened[0]["step"], happened[-1]["event"]) == (3, "end")
    assert {event["image"] for event in happened if event["event"] == "skip"} == {broken}


def test_a_broken_image_to_judge_on_is_named_and_never_left_out(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data", {"train/a": 18, "train/b": 18, "val/a": 2, "val/b": 2})
    (root / "val/a/000.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"val/a/000\.png: is not a JPEG.*image$"):
        list(learn_files(root, tmp_path / "run", on_error="skip"))


# --- nothing to validate on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("val", [None, made_source("val", 4, 1).subset([])])
def test_without_validation_images_the_last_epoch_is_kept(whole_run: Path, tmp_path: Path, val: Any) -> None:
    """The same steps as with them, and no early stopping; `best` is the average of the last epoch."""
    splits = replace(made_splits(), val=val)
    recipe = SHORT.replace(patience=1, norm_batches=0)
    happened = list(train.training(splits, fresh_model(), recipe, tmp_path))
    assert [event["event"] for event in happened].count("epoch") == 3
    assert (happened[-1]["best_epoch"], happened[-1]["metrics"]) == (2, {})
    best, last = (checkpoint.load(tmp_path / f"{name}.safetensors") for name in ("best", "last"))
    assert best.metrics == {} and best.extra["step"] == 12
    assert all(torch.equal(tensor, last.weights[name]) for name, tensor in best.weights.items())
    judged = checkpoint.load(whole_run / "last.safetensors")
    assert all(torch.equal(tensor, judged.tensors[name]) for name, tensor in last.tensors.items())


def test_a_run_without_validation_images_resumes_bit_for_bit(tmp_path: Path) -> None:
    splits = replace(made_splits(), val=None)
    list(train.training(splits, fresh_model(), SHORT, tmp_path / "whole"))
    stopped_after(6, tmp_path / "run", splits)
    list(train.training(splits, fresh_model(), SHORT, tmp_path / "run", resume=True))
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_never_took_a_step_may_be_begun_anew(tmp_path: Path) -> None:
    """With another recipe, even: there is nothing to lose."""
    running = train.training(made_splits(), fresh_model(), SHORT, tmp_path)
    next(running)
    running.close()
    assert checkpoint.load(tmp_path / "last.safetensors").extra["step"] == 0
    assert events(tmp_path, SHORT.replace(lr=0.02))[-1]["event"] == "end"
    with pytest.raises(UsageError, match="already holds a run"):
        events(tmp_path, SHORT)

"""What people see: an honest time to go, a row per epoch, and names that are printed as they are."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from effnet import families
from effnet.display import PIPE_COLUMNS, Pace, add, console, counting, show_note, table, training_view
from effnet.plan import Plan, PlanRow
from effnet.recipes import RECIPES, phases


def made_plan() -> Plan:
    """Two phases of 10 steps: a step of 20 images takes 1 s, then 3 s; then validation, 10 s in each phase."""
    network = families.get("efficientnet_b0")
    recipe = RECIPES["scratch"].replace(epochs=4, stages=2, size_px=(128, 224), batch=20)
    rows = tuple(
        PlanRow(phase=phase, steps=10, macs=1, training_bytes=1, images_per_s=20 / step_s, seconds=10 * step_s + 10)
        for phase, step_s in zip(phases(recipe, network), (1, 3), strict=True)
    )
    return Plan(
        network=network, recipe=recipe, preprocess=network.preprocess, classes=("a", "b"), train_images=100,
        val_images=10, params=1, precision="float32", device="cpu", threads=1, disk_bytes=1, rows=rows,
    )  # fmt: skip


def test_the_time_to_go_knows_that_later_phases_are_slower() -> None:
    pace = Pace(plan=made_plan())
    assert pace.remaining_s == 60  # 10 + 10, then 30 + 10
    pace.learn(5, 0, 1.0)
    assert pace.remaining_s == pytest.approx(60 - 10)  # half of the first phase
    pace.learn(15, 1, 3.0)
    assert pace.remaining_s == pytest.approx(20)
    pace.learn(20, 1, 3.0)
    assert pace.remaining_s == pytest.approx(0)


def test_the_time_to_go_learns_how_fast_it_really_goes() -> None:
    pace = Pace(plan=made_plan())
    pace.learn(1, 0, 2.0)  # twice as slow as planned
    assert pace.remaining_s == pytest.approx(2 * (60 - 2))
    for step in range(2, 11):
        pace.learn(step, 0, 1.0)
    assert 1 < pace.remaining_s / 40 < 1.7  # one slow step is forgotten by and by
    assert Pace(plan=made_plan(), step=15).remaining_s == 20  # a run that goes on after step 15


def step(number: int, **changes: Any) -> dict[str, Any]:
    event = {"event": "step", "step": number, "epoch": 0, "phase": 0, "loss": 0.5, "lr": 0.1}
    return event | {"images_per_s": 10.0, "wait_ms": 500.0, "step_ms": 2000.0} | changes


EPOCH = {
    "event": "epoch", "step": 5, "epoch": 0, "phase": 0, "size_px": 128, "train_loss": 0.6, "seconds": 5.0,
    "best": True,
    "val": {"accuracy": 0.25, "weighted_accuracy": 0.75, "nll": 0.5},
}  # fmt: skip


def drawn(*events: dict[str, Any], terminal: bool) -> str:
    """What the events look like, without colours."""
    out = Console(file=io.StringIO(), force_terminal=terminal, width=150, highlight=False, color_system=None)
    with training_view(out, made_plan) as view:
        for event in events:
            view.show(event)
            view.bar.refresh()
    assert isinstance(out.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.file.getvalue())


def test_an_epoch_is_one_row_with_its_speed_and_waiting() -> None:
    start = {"event": "start", "step": 0, "note": "CC BY [nc]"}
    text = drawn(start, step(1), step(2), EPOCH, terminal=False)
    rows = [line for line in text.splitlines() if line.startswith("epoch")]
    assert rows == [
        "epoch 1/4: loss 0.6000, validation 75.00 %, nll 0.5000, 10.0 images/s, 25% waiting for data, 9 s, best"
    ]
    assert "CC BY [nc]" in text and "Expected time: 1 min 00 s" in text


def test_the_live_line_says_phase_loss_speed_and_time_to_go() -> None:
    start = {"event": "start", "step": 3, "note": ""}
    text = drawn(start, step(4), step(5, loss=0.25), terminal=True)
    assert "going on after step 3 of 20" in text
    # two planned seconds a step, validation included; the steps take twice what was planned
    assert "phase 1, epoch 1/4, loss 0.2500, 10.0 images/s, 25% waiting for data, 1 min 40 s left" in text


@pytest.mark.parametrize(
    ("freeze", "head_only", "words"),
    [
        (0, False, "all layers learn"),
        (2, False, "all but the stem and 2 stages learn"),
        (2, True, "the classifier learns"),
    ],
)
def test_a_phase_says_what_learns_in_it(freeze: int, head_only: bool, words: str) -> None:
    plan = made_plan()
    out = Console(file=io.StringIO(), width=150)
    with training_view(out, lambda: plan.replace(recipe=plan.recipe.replace(freeze=freeze))) as view:
        view.show({"event": "start", "step": 0, "note": ""})
        view.show({"event": "phase", "step": 0, "index": 0, "size_px": 128, "head_only": head_only})
    assert isinstance(out.file, io.StringIO)
    assert f"phase 1 of 2: {words} at 128 px" in out.file.getvalue()


def test_what_goes_wrong_in_training_is_said() -> None:
    start = {"event": "start", "step": 0, "note": ""}
    skip = {"event": "skip", "step": 1, "image": "cat [1].jpg", "reason": "truncated"}
    unsaved = {"event": "save", "step": 1, "save_failed": ["cannot write last.safetensors: no space left"]}
    back = {"event": "rollback", "step": 0, "rollbacks": 1, "most": 3, "reason": "the loss became nan at step 2",
            "rate_factor": 0.5}  # fmt: skip
    text = drawn(
        start, step(1), skip, EPOCH, unsaved, back, {"event": "early_stop", "epoch": 0, "patience": 3}, terminal=False
    )
    assert "left out cat [1].jpg: truncated" in text
    assert "not saved: cannot write last.safetensors: no space left" in text
    assert "the loss became nan at step 2: back to step 0 with 0.5 of the learning rate (1 of 3)" in text
    assert "stopped early: 3 epochs without a better one" in text


def test_brackets_in_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    made = table("run [red]", ["name [bold]"], ["[n]"])
    add(made, "cat [blue]", None)
    console().print(made)
    show_note(console(), "[dim] licence")
    out = capsys.readouterr().out
    assert all(word in out for word in ("run [red]", "name [bold]", "[n]", "cat [blue]", "[dim] licence"))


def test_without_a_terminal_tables_are_not_cut_and_no_bar_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    made = table("", ["name"])
    add(made, "x" * 150)
    console().print(made)
    with counting(console(), "looking") as progress:
        progress(1, 2)
    out = capsys.readouterr().out
    assert "x" * 150 in out and "looking" not in out
    assert max(map(len, out.splitlines())) <= PIPE_COLUMNS

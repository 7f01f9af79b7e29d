"""Schedules and phases against their closed forms, and recipes as text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effnet import families, recipes
from effnet.recipes import FINETUNE, Recipe, Schedule, phases, with_settings
from effnet.value import UsageError

LITE0 = families.get("efficientnet_lite0")


@given(progress=st.floats(0, 1))
def test_cosine_falls_from_one_to_its_end(progress: float) -> None:
    schedule = Schedule(kind="cosine", end=0.1)
    assert schedule.at(progress) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def test_the_staircase_falls_three_percent_every_two_point_four_epochs() -> None:
    schedule = Schedule(kind="staircase")
    for epoch in (0, 2.3, 2.5, 100, 349):
        assert schedule.at(epoch / 350) == pytest.approx(0.97 ** int(epoch / 2.4))


def test_phases_are_algorithm_one_of_the_v2_paper() -> None:
    """EfficientNetV2-S and L of Table 6; the values of each stage follow from the algorithm."""
    small = FINETUNE.replace(
        epochs=348, head_epochs=0, stages=4, size_px=(128, 300), magnitude=(5, 15), dropout=(0.1, 0.3), mixup=(0, 0)
    )
    rows = phases(small, LITE0)
    assert [row.size_px for row in rows] == [128, 185, 243, 300]
    assert [row.magnitude for row in rows] == pytest.approx([5, 8.333333, 11.666667, 15])
    assert [row.dropout for row in rows] == pytest.approx([0.1, 0.1666667, 0.2333333, 0.3])
    assert [row.epochs for row in rows] == [87, 87, 87, 87]
    large = small.replace(size_px=(128, 380), magnitude=(5, 25), mixup=(0, 0.4), dropout=(0.1, 0.5))
    assert [row.mixup for row in phases(large, LITE0)] == pytest.approx([0, 0.1333333, 0.2666667, 0.4])


@given(epochs=st.integers(1, 400), stages=st.integers(1, 12))
def test_phases_share_out_every_epoch(epochs: int, stages: int) -> None:
    if stages > epochs:
        with pytest.raises(UsageError, match="at most one a stage"):
            FINETUNE.replace(epochs=epochs, stages=stages)
        return
    rows = phases(FINETUNE.replace(epochs=epochs, stages=stages, head_epochs=2), LITE0)
    assert rows[0].head_only
    assert sum(row.epochs for row in rows) == epochs + 2
    assert min(row.epochs for row in rows) >= 1


def test_the_rate_warms_up_linearly_and_scales_with_the_batch() -> None:
    recipe = Recipe(
        name="r", epochs=10, batch=64, lr=0.256, lr_batch=4096, warmup=2, schedule=Schedule(kind="constant")
    )
    assert recipe.rate(0.05, 0.5) == pytest.approx(0.004 * 0.25)
    assert recipe.rate(0.5, 5.0) == pytest.approx(0.004)


def test_settings_are_read_by_the_type_of_the_field() -> None:
    changed = with_settings(
        FINETUNE,
        {"epochs": "3", "size_px": "96,160", "dropout": "none", "balance": "true", "schedule.kind": "linear",
         "optimizer": "sgd", "mixup": "0.2", "eval_px": "224"},
    )  # fmt: skip
    assert (changed.epochs, changed.size_px, changed.dropout, changed.balance) == (3, (96, 160), None, True)
    assert (changed.schedule.kind, changed.optimizer, changed.mixup, changed.eval_px) == (
        "linear",
        "sgd",
        (0.2, 0.2),
        224,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eppochs": "3"}, "Did you mean 'epochs'"),
        ({"epochs": "three"}, "cannot be set to 'three': it takes a whole number"),
        ({"optimizer": "adm"}, "Did you mean 'adamw'"),
        ({"lr": "-1"}, "recipe lr is -1.0"),
        ({"lr": "nan"}, "recipe lr is nan"),
        ({"balance": "maybe"}, "true or false"),
        ({"size_px": "96,128,160"}, "one number, or two"),
    ],
)
def test_wrong_settings_say_what_is_wrong(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_settings(FINETUNE, settings)


def test_a_size_below_the_stride_is_refused_before_any_compute() -> None:
    with pytest.raises(UsageError, match="below the stride 32"):
        phases(FINETUNE.replace(size_px=(16, 64)), LITE0)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'finetune'"):
        recipes.get("fintune")


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    recipe = recipes.get(name)
    assert Recipe.from_json(recipe.to_json()) == recipe

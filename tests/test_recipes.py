"""Schedules and phases against their closed forms, and recipes as text."""

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet import families, recipes
from effnet.cost import cost
from effnet.recipes import FINETUNE, Recipe, Schedule, choose, for_images, phases, places, rate, with_settings
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


# --- every step, against the closed form ----------------------------------------------------------------------------

PAIR = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9))


@st.composite
def recipes_and_images(draw: st.DrawFn) -> tuple[Recipe, int]:
    epochs = draw(st.integers(1, 9))
    batch = draw(st.integers(1, 40))
    recipe = Recipe(
        name="drawn",
        epochs=epochs,
        batch=batch,
        lr=draw(st.floats(1e-4, 1)),
        lr_batch=draw(st.integers(1, 4096)),
        schedule=draw(
            st.builds(
                Schedule,
                kind=st.sampled_from(["constant", "linear", "cosine", "staircase"]),
                end=st.floats(0, 1),
                every=st.sampled_from([0.03125, 0.25]),  # whole fractions: no doubt about where a stair ends
            )
        ),
        warmup=draw(st.floats(0, 4)),
        head_epochs=draw(st.integers(0, 2)),
        stages=draw(st.integers(1, epochs)),
        growth=draw(st.sampled_from(["paper", "official"])),
        size_px=draw(st.tuples(st.integers(32, 300), st.integers(32, 300))),
        magnitude=draw(PAIR),
        mixup=draw(PAIR),
        cutmix=draw(PAIR),
        dropout=draw(PAIR),
        drop_path=draw(PAIR),
    )
    return recipe, draw(st.integers(batch, 6 * batch))


def expected_factor(schedule: Schedule, done: Fraction) -> float:
    if schedule.kind == "staircase":
        return 0.97 ** (done // Fraction(schedule.every))
    if schedule.kind == "cosine":
        return schedule.end + (1 - schedule.end) * math.cos(math.pi * float(done) / 2) ** 2
    return 1 if schedule.kind == "constant" else float(1 - done) + schedule.end * float(done)


@settings(max_examples=60, deadline=None)
@given(recipes_and_images())
def test_every_step_has_the_values_of_the_closed_form(drawn: tuple[Recipe, int]) -> None:
    """Algorithm 1 and the learning rate, step by step, in exact fractions."""
    recipe, images = drawn
    rows = phases(recipe, LITE0, images)
    per_epoch, last = images // recipe.batch, recipe.stages - 1
    total = per_epoch * (recipe.epochs + recipe.head_epochs)
    whole = int if recipe.growth == "official" else round
    for step in range(total):
        place = next(places(rows, images, step))
        phase = place.phase
        assert (place.epoch, place.step_in_epoch) == divmod(step, per_epoch)
        learnt = step - per_epoch * recipe.head_epochs
        assert phase.head_only == (learnt < 0)
        if phase.head_only:
            assert rate(recipe, place) == recipe.head_lr
            assert phase.dropout == phase.drop_path == phase.magnitude == phase.mixup == phase.cutmix == 0
            continue
        epoch = learnt // per_epoch
        stage = next(i for i in range(last + 1) if epoch < whole(Fraction(recipe.epochs * (i + 1), last + 1)))
        part = Fraction(stage, last) if last else Fraction(1)
        for name in ("magnitude", "mixup", "cutmix", "dropout", "drop_path"):
            first, end = getattr(recipe, name)
            assert getattr(phase, name) == pytest.approx(first + (end - first) * float(part), abs=1e-12)
        assert recipe.size_px
        first_px, last_px = recipe.size_px
        if recipe.growth == "official":
            assert phase.size_px == int(first_px + (last_px - first_px) * (stage + 1) / (last + 1))
        else:
            assert abs(phase.size_px - (first_px + (last_px - first_px) * part)) <= Fraction("0.500000001")
        peak = recipe.lr * recipe.batch / recipe.lr_batch
        if Fraction(learnt + 1, per_epoch) < recipe.warmup:
            wanted = peak * float(Fraction(learnt + 1, per_epoch)) / recipe.warmup
        else:
            wanted = peak * expected_factor(recipe.schedule, Fraction(learnt, per_epoch * recipe.epochs))
        assert rate(recipe, place) == pytest.approx(wanted, rel=1e-9, abs=1e-15)
    assert list(places(rows, images, total)) == []


# --- the papers -----------------------------------------------------------------------------------------------------

V2_S = families.get("efficientnetv2_s")


@pytest.mark.parametrize(
    ("name", "sizes", "magnitudes", "mixup", "dropout"),
    [
        # Tan & Le 2021, Table 6 through Algorithm 1
        ("v2-s-paper", [128, 185, 243, 300], [5, 8.3333, 11.6667, 15], [0, 0, 0, 0], [0.1, 0.1667, 0.2333, 0.3]),
        ("v2-m-paper", [128, 212, 296, 380], [5, 10, 15, 20], [0, 0.0667, 0.1333, 0.2], [0.1, 0.2, 0.3, 0.4]),
        ("v2-l-paper", [128, 212, 296, 380], [5, 11.6667, 18.3333, 25], [0, 0.1333, 0.2667, 0.4],
         [0.1, 0.2333, 0.3667, 0.5]),
        # the released code
        ("v2-s-official", [171, 214, 257, 300], [5, 6.6667, 8.3333, 10], [0, 0, 0, 0], [0.2] * 4),
        ("v2-m-official", [192, 256, 320, 384], [5, 8.3333, 11.6667, 15], [0, 0.0667, 0.1333, 0.2], [0.3] * 4),
        ("v2-l-official", [192, 256, 320, 384], [5, 10, 15, 20], [0, 0.1667, 0.3333, 0.5], [0.4] * 4),
        ("v2-b0-official", [144, 160, 176, 192], [0] * 4, [0] * 4, [0.2] * 4),
        ("v2-b2-official", [148, 168, 188, 208], [0] * 4, [0] * 4, [0.2] * 4),
        ("v2-b3-official", [156, 184, 212, 240], [0] * 4, [0] * 4, [0.2] * 4),
    ],
)  # fmt: skip
def test_the_stages_of_v2(name: str, sizes: list, magnitudes: list, mixup: list, dropout: list) -> None:
    rows = phases(recipes.get(name), V2_S)
    assert [row.size_px for row in rows] == sizes
    assert [row.magnitude for row in rows] == pytest.approx(magnitudes, abs=1e-4)
    assert [row.mixup for row in rows] == pytest.approx(mixup, abs=1e-4)
    assert [row.dropout for row in rows] == pytest.approx(dropout, abs=1e-4)
    assert [row.cutmix for row in rows] == ([row.mixup for row in rows] if "official" in name else [0] * 4)
    assert {row.drop_path for row in rows} == {0.2}


def test_the_stages_of_the_released_code_end_at_whole_epochs() -> None:
    rows = phases(recipes.get("v2-s-official"), V2_S)
    assert [sum(row.epochs for row in rows[: i + 1]) for i in range(4)] == [87, 175, 262, 350]


def peak(name: str) -> float:
    recipe = recipes.get(name)
    return recipe.rate(0.0, recipe.warmup)


def test_rates_of_the_papers() -> None:
    assert peak("v1-b0-paper") == pytest.approx(0.256)
    assert peak("v1-official") == pytest.approx(0.016 * 2048 / 256)
    assert recipes.get("v1-transfer").lr / 4096 == pytest.approx(0.256 / 4 / 4096)
    assert peak("v2-21k-official") == pytest.approx(0.008 * 16)
    assert peak("v2-finetune-official") == peak("v2-transfer-paper") == pytest.approx(0.001)
    v1 = recipes.get("v1-b0-paper")
    assert v1.rate(100 / 350, 100.0) == pytest.approx(0.256 * 0.97**41)  # 100 / 2.4 = 41.7, counted from the first step
    assert v1.rate(2 / 350, 2.0) == pytest.approx(0.256 * 2 / 5)
    assert recipes.get("v2-finetune-official").rate(0.9, 13.5) == pytest.approx(0.001)  # constant; the paper's falls
    assert recipes.get("v2-finetune-paper").rate(0.5, 7.5) == pytest.approx(0.0005)


def test_v1_has_dropout_by_model_and_the_code_the_tables() -> None:
    first = [phases(recipes.get(f"v1-b{i}-paper"), LITE0)[0].dropout for i in range(8)]
    assert first == pytest.approx([0.2 + 0.3 * i / 7 for i in range(8)], abs=1e-4)
    for name, dropout in (("efficientnet_b0", 0.2), ("efficientnet_b4", 0.4), ("efficientnet_b7", 0.5)):
        assert phases(recipes.get("v1-official"), families.get(name))[0].dropout == dropout


def test_what_differs_between_the_versions() -> None:
    """Weight decay of biases, batch norm momentum (TensorFlow's 0.99 and 0.9), augmentation, images held out."""
    facts = {
        name: (recipe.decay_bias, recipe.norm_momentum, recipe.policy, recipe.minival)
        for name, recipe in recipes.RECIPES.items()
    }
    assert facts["v1-b5-paper"] == (True, 0.01, "autoaugment", 25_000)
    assert facts["v1-official"] == (True, 0.01, "autoaugment", 25_022)
    assert facts["v2-s-paper"] == (False, 0.01, "randaugment", 25_000)
    assert facts["v2-s-official"] == (False, 0.1, "randaugment", 25_021)
    assert facts["v2-b1-official"] == (False, 0.1, "autoaugment", 25_021)
    assert facts["v2-21k-paper"] == (False, 0.01, "randaugment", 100_000)
    decay = {name: recipe.weight_decay for name, recipe in recipes.RECIPES.items()}
    assert (decay["v2-transfer-paper"], decay["v2-transfer-official"]) == (0.0, 1e-5)
    assert all(families.get(name).norm.eps == 1e-3 for name in ("efficientnet_b0", "efficientnetv2_s"))


@pytest.mark.parametrize(
    ("name", "images", "epochs"),
    [
        ("v2-transfer-paper", 50_000, 104),  # 97 steps an epoch: 10,000 are begun in the 104th
        ("v2-transfer-paper", 8_144, 667),
        ("v2-finetune-official", 1_281_167, 15),  # 37,530 steps: more than 10,000
        ("v2-finetune-official", 50_000, 104),
        ("kornblith-transfer", 3_680, 1429),
    ],
)
def test_small_data_takes_more_epochs_to_the_same_steps(name: str, images: int, epochs: int) -> None:
    assert for_images(recipes.get(name), images).epochs == epochs


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "ema", "copies"), [("rmsprop", 0.9, 5), ("adamw", 0.0, 4), ("sgd", 0.0, 3)])
def test_each_phase_takes_the_largest_batch_that_fits(optimizer: Any, ema: float, copies: int) -> None:
    recipe = recipes.get("v2-s-paper").replace(memory_gb=16, optimizer=optimizer, ema=ema)
    for phase in phases(recipe, V2_S):
        spent = cost(V2_S, phase.size_px)

        def needed(batch: int, spent: Any = spent) -> int:
            kept = 4 * (copies * spent.params + (2 if ema else 1) * spent.norm_statistics)
            return kept + 4 * batch * spent.saved_elements

        assert phase.batch % 8 == 0
        assert needed(phase.batch) <= 16e9 < needed(phase.batch + 8)
    first, last = phases(recipe, V2_S)[0], phases(recipe, V2_S)[-1]
    assert first.batch > 4 * last.batch
    place = next(places([last], 10_000, 0))
    warm = recipe.replace(warmup=0.0, schedule=Schedule(kind="constant"))
    assert rate(warm, place) == pytest.approx(0.256 * last.batch / 4096)  # linear in the batch of the phase


def test_a_batch_by_memory_leaves_ten_steps_an_epoch() -> None:
    assert phases(FINETUNE.replace(memory_gb=64), LITE0, 200)[0].batch == 16  # 20 images, in eights


def test_a_phase_that_cannot_fit_says_which_and_what_would() -> None:
    recipe = recipes.get("v2-s-paper").replace(memory_gb=0.6)
    with pytest.raises(
        UsageError, match=r"memory_gb is 0.6: the phase at 243 px with batch 1 .* image of 224 px would"
    ):
        phases(recipe, V2_S)
    with pytest.raises(UsageError, match="nothing of this network would fit"):
        phases(recipe.replace(memory_gb=0.01), V2_S)
    with pytest.raises(UsageError, match="least_steps counts steps of a fixed batch"):
        recipes.get("v2-transfer-paper").replace(memory_gb=8)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UsageError, match="recipe batch is 32, but there are 31 images to train on"):
        phases(FINETUNE, LITE0, 31)


# --- chosen for the user --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "trained", "upright", "name", "changes"),
    [
        ([900, 800], True, True, "finetune", {}),
        ([900, 800], True, False, "inspection", {}),
        ([900, 800], False, True, "scratch", {}),
        ([900, 800], False, False, "scratch", {"crop": "dihedral", "magnitude": (0.0, 0.0)}),
        ([900, 90], True, True, "finetune", {"balance": True}),
        ([900, 91], True, True, "finetune", {}),
        ([30, 30], True, True, "finetune", {"batch": 8}),  # 7 steps an epoch
        ([5, 5], True, True, "finetune", {"batch": 4}),
        ([1, 1], True, True, "finetune", {"batch": 2}),
    ],
)
def test_the_recipe_follows_from_the_data(
    counts: list[int], trained: bool, upright: bool, name: str, changes: dict[str, Any]
) -> None:
    recipe, why = choose(counts, trained=trained, upright=upright)
    assert recipe == recipes.get(name).replace(**changes)
    assert why.startswith(f"recipe {name}")
    assert f"from {'trained' if trained else 'random'} weights" in why
    assert all(field in why for field in changes)


def test_few_images_of_many_classes_from_random_weights_are_advised_against() -> None:
    assert "--pretrained" in choose([20] * 100, trained=False)[1]
    assert "--pretrained" not in choose([20] * 100, trained=True)[1]
    assert "--pretrained" not in choose([900] * 10, trained=False)[1]


def test_settings_reach_into_schedules_and_back() -> None:
    changed = with_settings(FINETUNE, {"rise.kind": "cosine", "rise.end": "0.5", "schedule.kind": "constant"})
    assert (changed.rise.kind, changed.rise.end, changed.schedule.kind) == ("cosine", 0.5, "constant")
    assert recipes.settings(changed) == {"rise.kind": "cosine", "rise.end": "0.5", "schedule.kind": "constant"}
    with pytest.raises(UsageError, match=r"--set rise.kind=linear"):
        with_settings(FINETUNE, {"rise": "cosine"})
    with pytest.raises(UsageError, match="Did you mean 'autoaugment'"):
        with_settings(FINETUNE, {"policy": "autoaugmnt"})

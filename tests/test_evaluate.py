"""Numbers about a model, against scikit-learn, scipy, closed forms and the published bounds of the ELPV protocol."""

import csv
import dataclasses
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from effnet.data import open_data
from effnet.evaluate import (
    Bin,
    Evaluation,
    Scores,
    bootstrap_means,
    evaluate,
    measure,
    percentiles,
    predict_source,
    reliability,
    write_predictions,
)
from effnet.images import ImageError, normalise, prepare
from effnet.network import Model, build
from effnet.samples import ArrayPixels, FilePixels, Source, labelled
from effnet.spec import Head, Network, Preprocess, Stage, Stem
from effnet.value import UsageError
from tests.conftest import need

FLOAT32 = 2e-6  # torchmetrics computes in float32
CLASSES = ("cup", "hat", "pen")


def scores_of(logits: np.ndarray, labels: np.ndarray, **changes: object) -> Scores:
    n, k = logits.shape
    plain = Scores(
        source="test",
        classes=tuple(f"class {i}" for i in range(k)),
        ids=tuple(f"image {i}" for i in range(n)),
        logits=logits.astype(np.float32),
        labels=np.asarray(labels, dtype=np.int64),
        weights=np.ones(n, dtype=np.float32),
    )
    return dataclasses.replace(plain, **changes)


def random_scores(k: int, seed: int, n: int = 300, **changes: object) -> Scores:
    """Scores of a model that is right more often than not; logits on a coarse grid, so that there are ties."""
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(k), random.integers(0, k, n - k)])
    logits = np.round(random.normal(size=(n, k)) * 4) / 4
    logits[np.arange(n), labels] += 1
    return scores_of(logits, labels, **changes)


def two_class(confidences: list[float], correct: list[int]) -> Scores:
    """Images whose top class, 0, has exactly these probabilities."""
    p = np.array(confidences)
    with np.errstate(divide="ignore"):
        logits = np.stack([np.log(p / (1 - p)), np.zeros(len(p))], axis=1)
    return scores_of(np.nan_to_num(logits, posinf=200), 1 - np.array(correct))


# --- against scikit-learn -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    """sklearn.metrics, imported before a test begins: the import draws from Python's global generator."""
    need("sklearn")
    return importlib.import_module("sklearn.metrics")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [2, 3, 7])
def test_every_metric_agrees_with_scikit_learn(oracle: ModuleType, k: int, seed: int) -> None:
    scores = random_scores(k, seed)
    found, labels, predicted = measure(scores, bootstrap=0), scores.labels, scores.predicted
    p = np.exp(scores.logits - scores.logits.max(axis=1, keepdims=True).astype(float))
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scores.probabilities, p, rtol=1e-12)
    p = scores.probabilities  # to the last bit: AUROC counts ties
    wanted = {
        "accuracy": oracle.accuracy_score(labels, predicted),
        "macro_f1": oracle.f1_score(labels, predicted, average="macro"),
        "auroc": oracle.roc_auc_score(labels, p[:, 1] if k == 2 else p, multi_class="ovr"),
        "nll": oracle.log_loss(labels, p),
    }
    for name, value in wanted.items():
        assert found.metrics[name] == pytest.approx(value, abs=FLOAT32), name
    assert np.array_equal(found.confusion, oracle.confusion_matrix(labels, predicted))
    columns = oracle.precision_recall_fscore_support(labels, predicted)
    for row, precision, recall, f1, support in zip(found.per_class, *columns, strict=True):
        assert (row.precision, row.recall, row.f1) == pytest.approx((precision, recall, f1), abs=FLOAT32)
        assert row.support == support and row.predicted == (predicted == int(row.label.split()[1])).sum()


def test_top5_agrees_with_scikit_learn_and_exists_from_six_classes_on(oracle: ModuleType) -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(200, 9)), random.integers(0, 9, 200)
    wanted = oracle.top_k_accuracy_score(labels, logits, k=5, labels=range(9))
    assert measure(scores_of(logits, labels)).metrics["top5"] == pytest.approx(wanted, abs=FLOAT32)
    assert "top5" in measure(random_scores(6, 0)).metrics
    assert "top5" not in measure(random_scores(5, 0)).metrics


def test_classes_that_do_not_occur_leave_gaps_and_no_zeros_in_the_means(oracle: ModuleType) -> None:
    """Class 2 is neither a label nor predicted; class 1 is never predicted; class 3 is predicted, but not there."""
    labels = np.array([0, 0, 0, 1, 1])
    logits = np.array([[3, 0, 0, 0], [3, 1, 0, 0], [0, 0, 0, 3], [3, 2, 0, 0], [2, 1, 0, 0]])
    scores = scores_of(logits, labels)
    found = measure(scores)
    assert found.metrics["macro_f1"] == pytest.approx(
        oracle.f1_score(labels, scores.predicted, average="macro", zero_division=0), abs=FLOAT32
    )
    areas = [oracle.roc_auc_score(labels == index, scores.probabilities[:, index]) for index in (0, 1)]
    assert found.metrics["auroc"] == pytest.approx(np.mean(areas), abs=FLOAT32)
    zero, one, two, three = found.per_class
    assert (zero.support, zero.predicted) == (3, 4)
    assert one.precision is None and one.recall == one.f1 == 0
    assert two.precision is two.recall is two.f1 is None
    assert three.recall is None and three.precision == three.f1 == 0


def test_auroc_of_images_of_one_class_is_not_defined() -> None:
    scores = random_scores(2, 0)
    only = scores.subset(scores.labels == 1, "only class 1")
    assert measure(only).metrics["auroc"] is None


# --- calibration ----------------------------------------------------------------------------------------------------


def test_ece_of_two_bins_is_the_weighted_mean_of_their_gaps() -> None:
    """Ten images at 0.82, six right; five at 0.55, all right: (10 * 0.22 + 5 * 0.45) / 15."""
    scores = two_class([0.82] * 10 + [0.55] * 5, [1] * 6 + [0] * 4 + [1] * 5)
    assert measure(scores).metrics["ece"] == pytest.approx((10 * 0.22 + 5 * 0.45) / 15, abs=FLOAT32)
    filled = [bin for bin in reliability(scores) if bin.images]
    assert [(bin.images, bin.accuracy) for bin in filled] == [(5, 1.0), (10, 0.6)]
    assert [bin.confidence for bin in filled] == pytest.approx([0.55, 0.82], abs=FLOAT32)
    assert [(bin.low, bin.high) for bin in filled] == [(8 / 15, 9 / 15), (12 / 15, 13 / 15)]


def test_a_probability_of_exactly_one_shares_the_last_bin() -> None:
    """0.95 right and 1.0 wrong are one bin, half right: |0.975 - 0.5|, not (0.05 + 1) / 2 as in bins of their own."""
    scores = two_class([0.95, 1.0], [1, 0])
    assert scores.probabilities.max() == 1.0
    assert measure(scores).metrics["ece"] == pytest.approx(0.975 - 0.5, abs=FLOAT32)
    assert reliability(scores)[-1].images == 2


@pytest.mark.parametrize("k", [2, 5])
def test_the_reliability_diagram_adds_up_to_the_ece(k: int) -> None:
    scores = random_scores(k, 1)
    bins = measure(scores).calibration
    assert sum(bin.images for bin in bins) == len(scores)
    filled = np.array([(bin.images, bin.confidence, bin.accuracy) for bin in bins if bin.images], dtype=float)
    gaps = filled[:, 0] * abs(filled[:, 1] - filled[:, 2])
    assert gaps.sum() / len(scores) == pytest.approx(measure(scores).metrics["ece"], abs=FLOAT32)
    assert bins[0] == Bin(low=0.0, high=1 / 15, images=0, confidence=None, accuracy=None)  # below 1 / k: nothing


# --- weights, soft targets, groups ----------------------------------------------------------------------------------


def test_weighted_accuracy_is_the_share_of_the_weight() -> None:
    scores = two_class([0.9] * 4, [1, 0, 1, 0])
    assert "weighted_accuracy" not in measure(scores).metrics
    weighted = dataclasses.replace(scores, weights=np.array([1, 2, 3, 4], dtype=np.float32))
    assert measure(weighted).metrics["weighted_accuracy"] == pytest.approx(0.4)
    assert measure(weighted).metrics["accuracy"] == 0.5
    assert set(measure(weighted).intervals) == {"accuracy", "weighted_accuracy"}


def test_the_elpv_protocol_gives_its_known_bounds() -> None:
    """Always "functional" scores 377 / 597 2/3, a perfect regressor of p at threshold 0.5 loses the 74 cells at 1/3."""
    need("elpv_dataset")
    test = open_data("elpv").test
    assert test is not None and test.soft is not None
    p = test.soft[:, list(test.classes).index("defective")].astype(float)

    def judged(logits: np.ndarray) -> dict[str, float | None]:
        scores = scores_of(logits, test.labels, weights=test.weights, soft=test.soft, groups=test.groups)
        return measure(dataclasses.replace(scores, classes=test.classes), bootstrap=0).metrics

    total = 377 + 74 / 3 + 27 * 2 / 3 + 178
    functional = np.array([float(name == "functional") for name in test.classes])
    always = judged(np.tile(functional, (len(test), 1)))
    assert always["weighted_accuracy"] == pytest.approx(377 / total, abs=1e-6)
    assert (always["auroc"], always["certain_accuracy"]) == (0.5, pytest.approx(377 / (377 + 178)))

    perfect = judged(np.where(functional == 1, 0.5 - p[:, None], p[:, None] - 0.5))
    assert perfect["weighted_accuracy"] == pytest.approx(1 - 74 / 3 / total, abs=1e-6)
    assert perfect["accuracy"] == pytest.approx(1 - 74 / 656)
    assert (perfect["majority_accuracy"], perfect["majority_macro_f1"], perfect["certain_accuracy"]) == (1, 1, 1)


def test_each_group_is_measured_as_if_it_were_alone() -> None:
    groups = tuple(np.array(["poly", "mono"])[np.random.default_rng(5).integers(0, 2, 300)])
    scores = random_scores(3, 2, weights=np.linspace(0.1, 1, 300, dtype=np.float32), groups=groups)
    found = measure(scores, seed=7)
    assert list(found.groups) == ["mono", "poly"]
    parts = np.array([group.confusion for group in found.groups.values()])
    assert np.array_equal(parts.sum(axis=0), found.confusion)
    alone = dataclasses.replace(scores.subset(np.array(groups) == "mono", "mono"), groups=None)
    assert found.groups["mono"] == measure(alone, seed=7)
    assert found.groups["mono"].images + found.groups["poly"].images == found.images == 300


def test_all_groups_have_the_same_metrics_even_if_only_one_has_weights() -> None:
    scores = random_scores(2, 0, n=10, groups=("a",) * 5 + ("b",) * 5, weights=np.repeat([0.5, 1], 5).astype("f4"))
    found = measure(scores)
    assert found.metrics.keys() == found.groups["a"].metrics.keys() == found.groups["b"].metrics.keys()


# --- the bootstrap --------------------------------------------------------------------------------------------------


def test_the_bootstrap_of_an_accuracy_has_the_binomial_distribution() -> None:
    """A resample of N images of which a share q is right has Binomial(N, q) right ones: an exact law."""
    binomial = need("scipy.stats").binom
    correct = np.arange(200) < 150
    means = bootstrap_means(correct, np.ones(200), 20_000, np.random.default_rng(0))
    assert means.shape == (20_000,)
    for quantile in (0.025, 0.25, 0.5, 0.975):
        assert np.quantile(means, quantile) == pytest.approx(binomial.ppf(quantile, 200, 0.75) / 200, abs=0.0051)
    assert means.var() == pytest.approx(0.75 * 0.25 / 200, rel=0.04)  # 4 standard errors of a variance


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        correct, weights = random.random(100) < 0.8, random.choice([1 / 3, 2 / 3, 1.0], 100)
        interval = percentiles(bootstrap_means(correct, weights, 400, random))
        covered += interval.low <= 0.8 <= interval.high
    assert 0.89 <= covered / 200 <= 0.985  # 95 % +- 4 standard errors of 1.5 %, and percentile intervals run short


def test_an_interval_is_the_middle_95_percent() -> None:
    interval = percentiles(np.random.default_rng(0).permutation(1001))
    assert (interval.low, interval.high) == pytest.approx((25, 975))


def test_what_is_always_right_is_right_in_every_resample_whatever_the_weights() -> None:
    means = bootstrap_means(np.ones(50), np.linspace(0.1, 2, 50), 100, np.random.default_rng(3))
    np.testing.assert_allclose(means, 1, rtol=1e-12)


def test_a_resample_without_weight_has_no_mean() -> None:
    """One of three images has weight: a resample misses it with probability (2/3)^3, and is left out."""
    means = bootstrap_means(np.array([1, 0, 0]), np.array([1.0, 0, 0]), 10_000, np.random.default_rng(0))
    assert (means == 1).all() and len(means) == pytest.approx(10_000 * (1 - 8 / 27), abs=4 * 46)  # 4 sd


def test_only_the_proportions_of_the_weights_matter_and_blocks_do_not() -> None:
    correct, weights = np.arange(50) % 3 == 0, np.linspace(0.1, 2, 50)

    def means(weights: np.ndarray, **options: int) -> np.ndarray:
        return bootstrap_means(correct, weights, 100, np.random.default_rng(3), **options)

    np.testing.assert_allclose(means(weights), means(8 * weights), rtol=1e-12)
    np.testing.assert_allclose(means(weights), means(weights, block=170), rtol=1e-12)
    assert not np.allclose(means(weights), means(np.ones(50)))


def test_intervals_repeat_with_the_seed_collapse_without_doubt_and_can_be_left_out() -> None:
    scores = random_scores(3, 0)
    assert measure(scores, seed=1) == measure(scores, seed=1) != measure(scores, seed=2)
    interval = measure(scores).intervals["accuracy"]
    assert interval.low < (scores.predicted == scores.labels).mean() < interval.high and interval.level == 0.95
    sure = measure(two_class([0.9] * 20, [1] * 20)).intervals["accuracy"]
    assert (sure.low, sure.high) == (1, 1)
    assert measure(scores, bootstrap=0).intervals == {}


# --- from a model to scores -----------------------------------------------------------------------------------------


def small_model(labels: tuple[str, ...] | None = CLASSES) -> Model:
    network = Network(
        name="small",
        stem=Stem(width=8),
        stages=(Stage(op="fused", repeats=1, width=8, stride=2, expand=2),),
        head=Head(width=16, classes=len(labels or CLASSES)),
        resolution=24,
        preprocess=Preprocess(size=24, resize=28),
        dropout=0.5,
    )
    model = build(network, generator=torch.Generator().manual_seed(0))
    model.labels = labels
    return model


def noise(n: int, classes: tuple[str, ...] = CLASSES) -> Source:
    random = np.random.default_rng(0)
    pixels = ArrayPixels(array=random.integers(0, 256, (n, 30, 40), dtype=np.uint8))
    labels = random.integers(0, len(classes), n) if classes else [-1] * n
    return labelled("test", pixels, [f"{i}.png" for i in range(n)], labels, classes)


@pytest.mark.parametrize("batch", [1, 3, 7, 64])
def test_every_image_is_counted_once_and_in_order_whatever_the_batch(batch: int) -> None:
    model, source = small_model(), noise(7)
    scores = predict_source(model, source, batch=batch)
    assert scores.ids == source.ids and np.array_equal(scores.labels, source.labels)
    with torch.no_grad():
        views = [torch.from_numpy(prepare(source.image(i), model.preprocess)) for i in range(7)]
        alone = [model.eval()(normalise(view[None], model.preprocess))[0] for view in views]
    np.testing.assert_allclose(scores.logits, torch.stack(alone).numpy(), atol=1e-5)  # sums in another order


def test_a_subset_is_evaluated_at_its_own_rows() -> None:
    model, source = small_model(), noise(7)
    part = predict_source(model, source.subset([5, 2], "part"))
    np.testing.assert_allclose(part.logits, predict_source(model, source).logits[[5, 2]], atol=1e-5)
    assert part.ids == ("5.png", "2.png") and part.source == "part"


def test_evaluation_leaves_the_model_in_training_and_what_was_frozen_frozen() -> None:
    model = small_model().train()
    model.stem.eval()
    before = {name: module.training for name, module in model.named_modules()}
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    first, second = evaluate(model, noise(5)), evaluate(model, noise(5))
    assert first == second, "dropout or batch statistics were at work"
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())


def test_progress_is_reported_after_each_batch() -> None:
    seen: list[tuple[int, int]] = []
    evaluate(small_model(), noise(7), batch=3, on_batch=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        (CLASSES, ("cup", "hat", "pan"), ["Only in the model: 'pen'", "Only in test: 'pan'"]),
        (CLASSES, ("cup", "hat"), ["Only in the model: 'pen'", "Only in test: nothing"]),
        (CLASSES, ("hat", "cup", "pen"), ["another order", "'hat', 'cup', 'pen'", "'cup', 'hat', 'pen'"]),
        (None, ("cup", "hat"), ["3 outputs", "2 classes", "'cup', 'hat'"]),
        (CLASSES, (), ["no labels", "effnet predict"]),
    ],
)
def test_another_class_list_is_refused_naming_both_sides(
    labels: tuple[str, ...] | None, classes: tuple[str, ...], words: list[str]
) -> None:
    with pytest.raises(UsageError) as refused:
        evaluate(small_model(labels), noise(4, classes))
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_a_model_without_labels_is_evaluated_by_number() -> None:
    assert evaluate(small_model(None), noise(4)).classes == CLASSES


def test_no_images_and_images_that_cannot_be_decoded_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no images"):
        evaluate(small_model(), noise(4).subset([], "empty"))
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    torn = labelled("test", FilePixels(paths=(tmp_path / "torn.png",)), ["torn"], [0], CLASSES)
    with pytest.raises(ImageError, match=r"torn\.png"):
        evaluate(small_model(), torn)


def test_a_model_that_diverged_is_refused_in_words() -> None:
    model = small_model()
    with torch.no_grad():
        model.classifier.bias[1] = torch.nan
    with pytest.raises(UsageError, match="not finite for 4 of 4 images"):
        evaluate(model, noise(4))


# --- files ----------------------------------------------------------------------------------------------------------


def test_an_evaluation_survives_json() -> None:
    groups = ("a", "b") * 150
    scores = random_scores(7, 0, groups=groups, weights=np.linspace(0.5, 1, 300, dtype=np.float32))
    found = measure(scores)
    assert Evaluation.from_json(found.to_json()) == found
    with pytest.raises(UsageError, match="accurracy"):
        Evaluation.from_dict({**found.to_dict(), "accurracy": 1.0})


def test_the_written_predictions_hold_all_that_the_metrics_need(tmp_path: Path) -> None:
    groups = ("mono", "poly") * 150
    scores = random_scores(3, 4, groups=groups, weights=np.linspace(0.1, 1, 300, dtype=np.float32))
    write_predictions(tmp_path / "predictions.csv", scores)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == list(scores.ids)
    assert [row["group"] for row in rows] == list(groups)
    found = measure(scores)
    right = np.array([row["label"] == row["predicted"] for row in rows])
    weights = np.array([float(row["weight"]) for row in rows])
    assert right.mean() == found.metrics["accuracy"]
    assert (right * weights).sum() / weights.sum() == pytest.approx(found.metrics["weighted_accuracy"], abs=1e-9)
    of_label = np.array([float(row[f"p({row['label']})"]) for row in rows])
    assert -np.log(of_label).mean() == pytest.approx(found.metrics["nll"], abs=1e-12)

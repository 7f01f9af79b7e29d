"""A short training as a judge: it learns, it repeats itself, and it leaves nothing behind."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effnet.coefficients import search_coefficients
from effnet.factory import Factory
from effnet.images import Encoded
from effnet.proxy import PROXY, fewer, proxy
from effnet.samples import ArrayPixels, FilePixels, Splits, labelled
from effnet.spec import Head, Network, Preprocess, Rounding, Stage, Stem
from effnet.value import UsageError
from tests.test_factory import plain

SMALL = Network(
    name="small",
    stem=Stem(width=8),
    stages=(
        Stage(op="fused", repeats=1, width=8, stride=2, expand=2),
        Stage(op="basic", repeats=1, width=12, stride=2),
    ),
    head=Head(width=0, classes=3),
    resolution=16,
    preprocess=Preprocess(size=16, resize=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    activation="relu",
    rounding=Rounding(divisor=4),
)


def stripes(count: int, seed: int = 0) -> Splits:
    """Three kinds of noisy stripes, 90 % of them the first kind's number: horizontal, vertical, diagonal."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    x, y = np.meshgrid(np.arange(16), np.arange(16))
    waves = np.stack([np.sin(y + 0.0), np.sin(x + 0.0), np.sin((x + y) / 1.4)])
    images = 128 + 60 * waves[labels] + rng.normal(0, 40, (count, 16, 16))
    pixels = ArrayPixels(array=np.clip(images, 0, 255).astype(np.uint8))
    everything = labelled("stripes", pixels, [f"{i}" for i in range(count)], labels, ("h", "v", "d"))
    cut = 3 * count // 4
    return Splits(
        train=everything.subset(range(cut), "train"),
        val=everything.subset(range(cut, count), "val"),
        test=None,
        classes=everything.classes,
        name="stripes",
    )


def test_it_learns_repeats_itself_and_differs_by_seed() -> None:
    evaluate = proxy(stripes(320), PROXY.replace(batch=16, lr=1e-2, lr_batch=16), workers=0)
    found = [evaluate(SMALL, 0, 2) for _ in range(2)]
    assert found[0] == found[1] > 0.6  # chance is a third
    assert len({evaluate(SMALL, seed, 1) for seed in range(2)}) > 1


def test_images_are_decoded_once_for_all_networks_and_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stripes(48)
    paths = [tmp_path / f"{index}.png" for index in range(48)]
    for path, image in zip(paths, made.train.pixels.array, strict=True):
        Image.fromarray(image).save(path)
    pixels = FilePixels(paths=tuple(paths))
    splits = replace(made, train=replace(made.train, pixels=pixels), val=replace(made.val, pixels=pixels))
    decoded: list[int] = []
    for kind, name in ((Encoded, "pixels"), (FilePixels, "image")):  # what training and what evaluation asks for
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, call=original, **kw: decoded.append(1) or call(*args, **kw))
    evaluate = proxy(splits, PROXY.replace(batch=12), workers=0)
    shared = [evaluate(SMALL, seed, 2) for seed in range(3)]
    assert len(decoded) == 48
    alone = [proxy(splits, PROXY.replace(batch=12), workers=0)(SMALL, seed, 2) for seed in range(3)]
    assert alone == shared and len(decoded) == 4 * 48


def test_it_leaves_no_files_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    proxy(stripes(96), workers=0)(SMALL, 0, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_search_by_real_trainings_finds_and_goes_on(tmp_path: Path) -> None:
    evaluate = proxy(stripes(192), PROXY.replace(batch=16), workers=0)
    options = {"study": tmp_path / "study.jsonl", "budget": 1, "seeds": 2, "alpha_step": 0.5, "beta_step": 0.25}
    found = search_coefficients(SMALL, evaluate, tolerance=0.2, **options)
    assert 2 <= len(found.standings) == found.evaluations / 2 <= 6
    assert search_coefficients(SMALL, lambda *_: 1 / 0, tolerance=0.2, **options) == found


def test_fewer_images_keep_the_shares_of_the_classes() -> None:
    splits = stripes(480)
    less = fewer(splits, 91)
    assert (len(less.train), len(less.val or ()), max(less.train.counts()) - min(less.train.counts())) == (91, 91, 1)
    assert set(less.train.ids) < set(splits.train.ids)
    assert fewer(splits, 91).train.ids == less.train.ids != fewer(splits, 91, seed=1).train.ids
    assert fewer(splits, 200).val is splits.val  # it has only 120
    with pytest.raises(UsageError, match="fewer than the 3 classes"):
        fewer(splits, 2)


def test_a_module_of_ones_own_needs_an_evaluate_of_ones_own() -> None:
    with pytest.raises(UsageError, match="is no Network"):
        proxy(stripes(96), workers=0)(Factory(function=plain).at(1, 1, 32), 0, 1)

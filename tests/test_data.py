"""Order, views and batches are pure functions; broken pictures follow a policy; nothing depends on who works."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from effnet import data
from effnet.augment import view
from effnet.data import SKIP_FILES, Batch, Cache, batches, order, sample_rng, steps
from effnet.images import Encoded, ImageError, prepare
from effnet.samples import ArrayPixels, FilePixels, Source, labelled
from effnet.sources import open_data
from effnet.spec import Preprocess
from effnet.value import UsageError
from tests.conftest import need, picture, write_images

PREPROCESS = Preprocess(size=16, resize=18)
HOW = [(0, "thread"), (1, "thread"), (3, "thread"), (1, "process"), (2, "process")]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """23 files of two classes."""
    write_images(tmp_path / "data", {"cat": 12, "dog": 11})
    return open_data(tmp_path / "data").part("all")


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[int, int], Source]:
    """`broken(40, 3)`: 40 files, of which the first 3 are no images."""

    def make(count: int, bad: int) -> Source:
        root = write_images(tmp_path / "broken", {"": count})
        paths = tuple(sorted(root.glob("*.png")))
        for path in paths[:bad]:
            path.write_bytes(path.read_bytes()[:60])
        labels = [index % 2 for index in range(count)]
        return labelled("broken", FilePixels(paths=paths), [path.name for path in paths], labels, ("a", "b"))

    return make


def raw(count: int) -> Source:
    """Pictures in memory, for tests about numbers only."""
    pixels = ArrayPixels(array=np.stack([picture(i)[..., 0] for i in range(count)]))
    return labelled("raw", pixels, [str(i) for i in range(count)], [i % 3 for i in range(count)], ("a", "b", "c"))


def training(source: Source, **changes: object) -> list[Batch]:
    options = {"size_px": 16, "batch": 4, "preprocess": PREPROCESS, "train": True, "workers": 0} | changes
    return list(batches(source, **options))


def evaluation(source: Source, **changes: object) -> list[Batch]:
    return training(source, **{"train": False, **changes})


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(first, second, strict=True)
        for name in ("images", "labels", "targets", "weights", "indices")
    )


# -- the order --------------------------------------------------------------------------------------------------------

keys = {"seed": st.integers(0, 2**40), "epoch": st.integers(0, 10_000)}


@given(n=st.integers(1, 200), batch=st.integers(1, 40), **keys)
def test_an_epoch_uses_every_sample_at_most_once_and_only_whole_batches(n, batch, seed, epoch):
    rows = order(n, seed=seed, epoch=epoch, batch=batch)
    assert rows.shape == (max(n // batch, 1), min(batch, n)) and len(rows) == steps(n, batch=batch)
    assert len(set(rows.ravel().tolist())) == rows.size and rows.min() >= 0 and rows.max() < n


@given(n=st.integers(1, 100), batch=st.sampled_from([1, 2, 5]), **keys)
def test_an_epoch_of_whole_batches_is_a_permutation(n, batch, seed, epoch):
    rows = order(n * batch, seed=seed, epoch=epoch, batch=batch)
    assert sorted(rows.ravel()) == list(range(n * batch))


@given(n=st.integers(8, 200), world=st.sampled_from([1, 2, 4]), **keys)
def test_the_ranks_together_read_the_global_batch(n, world, seed, epoch):
    whole = order(n, seed=seed, epoch=epoch, batch=8)
    slices = [order(n, seed=seed, epoch=epoch, batch=8, world=world, rank=rank) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(slices, axis=1), whole)


def test_epochs_and_seeds_have_orders_of_their_own():
    first = order(100, seed=0, epoch=0, batch=10)
    assert (first == order(100, seed=0, epoch=0, batch=10)).all()
    assert (first != order(100, seed=0, epoch=1, batch=10)).any()
    assert (first != order(100, seed=1, epoch=0, batch=10)).any()
    assert (first.ravel() != np.arange(100)).any()


def test_orders_are_shuffled_without_bias():
    """Over 2,000 epochs every sample comes first equally often: chi-squared with 9 degrees of freedom, p > 0.001."""
    first = np.bincount([order(10, seed=0, epoch=e, batch=10)[0, 0] for e in range(2000)], minlength=10)
    assert ((first - 200) ** 2 / 200).sum() < 27.9


@given(seed=st.integers(0, 1000), epoch=st.integers(0, 1000), index=st.integers(0, 10**6))
def test_a_samples_stream_depends_on_its_key_alone(seed, epoch, index):
    drawn = sample_rng(seed, epoch, index).integers(0, 2**63, 4)
    assert (drawn == sample_rng(seed, epoch, index).integers(0, 2**63, 4)).all()
    for other in ((seed + 1, epoch, index), (seed, epoch + 1, index), (seed, epoch, index + 1)):
        assert (drawn != sample_rng(*other).integers(0, 2**63, 4)).any()


def test_wrong_numbers_are_refused():
    for options, message in (
        ({"n": 0}, "number of samples is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"seed": -1}, "not -1"),
        ({"world": 3}, "batch of 8 cannot be shared equally by 3"),
        ({"rank": 1}, "rank is 1"),
    ):
        with pytest.raises(UsageError, match=message):
            order(**{"n": 20, "seed": 0, "epoch": 0, "batch": 8} | options)


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "by"), HOW)
def test_batches_do_not_depend_on_who_makes_them(source, workers, by):
    options = {"crop": "inception", "magnitude": 5.0, "seed": 7, "epoch": 3}
    alone = training(source, **options)
    assert len(alone) == 5 and same(alone, training(source, workers=workers, by=by, **options))
    assert same(evaluation(source), evaluation(source, workers=workers, by=by))


@given(start=st.integers(0, 6), seed=st.integers(0, 100), epoch=st.integers(0, 100))
def test_a_resumed_epoch_reads_what_an_uninterrupted_one_would(start, seed, epoch):
    source, options = raw(26), {"seed": seed, "epoch": epoch}
    whole, resumed = training(source, **options), training(source, start_step=start, **options)
    assert len(whole) == 6 and same(whole[start:], resumed)


@given(world=st.sampled_from([2, 4]), epoch=st.integers(0, 50))
def test_a_sample_looks_the_same_on_every_rank_and_world(world, epoch):
    source = raw(16)
    whole = {int(i): x for b in training(source, epoch=epoch) for i, x in zip(b.indices, b.images, strict=True)}
    for rank in range(world):
        for batch in training(source, epoch=epoch, world=world, rank=rank):
            assert len(batch) == 4 // world
            assert all(torch.equal(whole[int(i)], x) for i, x in zip(batch.indices, batch.images, strict=True))


def test_a_training_batch_is_the_views_of_its_samples(source):
    source = replace(source, weights=np.linspace(0, 1, len(source), dtype=np.float32))
    for batch in training(source, seed=2, epoch=5, crop="dihedral"):
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (4, 16, 16, 3)
        for place, index in enumerate(batch.indices.tolist()):
            expected = view(source.image(index), 16, crop="dihedral", rng=sample_rng(2, 5, index))
            np.testing.assert_array_equal(batch.images[place].numpy(), expected)
            assert batch.labels[place] == source.labels[index] and batch.weights[place] == source.weights[index]
            assert batch.targets[place].tolist() == [float(k == source.labels[index]) for k in range(2)]


def test_a_sample_looks_different_in_every_epoch():
    source = raw(4)
    first, second = (training(source, epoch=epoch)[0] for epoch in (0, 1))
    ranked = [batch.images[batch.indices.argsort()] for batch in (first, second)]
    assert all(not torch.equal(a, b) for a, b in zip(*ranked, strict=True))


def test_training_on_fewer_samples_than_a_batch_is_one_short_batch():
    assert [len(batch) for batch in training(raw(3))] == [3]


def test_evaluation_reads_every_sample_once_in_order_at_any_size(source):
    read = evaluation(source, size_px=12, batch=5)
    assert [len(batch) for batch in read] == [5, 5, 5, 5, 3]
    assert torch.cat([batch.indices for batch in read]).tolist() == list(range(23))
    expected = [prepare(source.image(index), PREPROCESS.with_size(12)) for index in range(23)]
    np.testing.assert_array_equal(torch.cat([batch.images for batch in read]).numpy(), expected)


def test_ranks_share_an_evaluation_without_overlap(source):
    read = [i for rank in range(3) for batch in evaluation(source, world=3, rank=rank) for i in batch.indices.tolist()]
    assert sorted(read) == list(range(23))


def test_soft_targets_are_used_when_asked():
    soft = np.random.default_rng(0).dirichlet([1, 1, 1], 8).astype(np.float32)
    source = replace(raw(8), soft=soft)
    for batch in training(source, soft=True):
        np.testing.assert_array_equal(batch.targets.numpy(), soft[batch.indices.numpy()])
    assert all(set(batch.targets.ravel().tolist()) == {0.0, 1.0} for batch in training(source))
    with pytest.raises(UsageError, match="no soft targets"):
        training(raw(8), soft=True)


def test_unlabelled_pictures_can_be_read_but_not_trained_on():
    source = labelled("bare", raw(5).pixels, list("abcde"), [-1] * 5, ())
    assert [batch.targets.shape for batch in evaluation(source)] == [(4, 0), (1, 0)]
    with pytest.raises(UsageError, match="no labels to train on"):
        training(source)


def test_wrong_options_are_refused_before_the_first_batch():
    for options, message in (
        ({"on_error": "ignore"}, "on_error 'ignore' is not one of error, skip"),
        ({"by": "treads"}, "Did you mean 'thread'"),
        ({"workers": -1}, "workers is -1"),
    ):
        with pytest.raises(UsageError, match=message):
            batches(raw(4), **{"size_px": 8, "batch": 2, "preprocess": PREPROCESS, "train": True} | options)


def test_workers_by_default_leave_half_the_cores_to_the_step(monkeypatch):
    for cores, world, expected in ((1, 1, 1), (2, 1, 1), (4, 1, 2), (16, 1, 8), (64, 1, 8), (16, 4, 2), (2, 4, 1)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert data.default_workers(world) == expected


def test_threads_stop_when_the_reader_does(source):
    reading = batches(source, size_px=16, batch=2, preprocess=PREPROCESS, train=True, workers=2)
    next(reading)
    assert any(thread.name.startswith("effnet-input") for thread in threading.enumerate())
    reading.close()
    assert not any(thread.name.startswith("effnet-input") for thread in threading.enumerate())


# -- pictures that cannot be decoded ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "by"), HOW)
def test_a_broken_picture_stops_the_run_and_is_named(broken, workers, by):
    with pytest.raises(ImageError, match=r"broken/000\.png: broken or truncated"):
        training(broken(8, 1), workers=workers, by=by)


@pytest.mark.parametrize(("workers", "by"), HOW)
def test_a_skipped_picture_is_left_out_and_recorded(broken, workers, by):
    source = broken(40, 3)
    read = training(source, on_error="skip", batch=8, workers=workers, by=by)
    skipped = [name for batch in read for name, _ in batch.skipped]
    assert sorted(skipped) == ["000.png", "001.png", "002.png"]
    assert all("truncated" in reason for batch in read for _, reason in batch.skipped)
    assert sorted(i for batch in read for i in batch.indices.tolist()) == list(range(3, 40))
    assert all(len(batch) + len(batch.skipped) == 8 == len(batch.images) + len(batch.skipped) for batch in read)
    whole = {int(i): x for batch in read for i, x in zip(batch.indices, batch.images, strict=True)}
    for index, image in whole.items():  # what is left sits beside its own label and index, and is no blank
        assert image.float().std() > 0
        expected = view(source.image(index), 16, crop="inception", rng=sample_rng(0, 0, index))
        np.testing.assert_array_equal(image.numpy(), expected)


def test_skipping_stops_above_its_ceiling(broken):
    allowed = training(broken(200, SKIP_FILES), on_error="skip", batch=40)
    assert sum(len(batch.skipped) for batch in allowed) == SKIP_FILES
    with pytest.raises(UsageError, match=r"11 pictures cannot be decoded \(.*\.png: .*; 10 of 200 may be skipped"):
        training(broken(200, SKIP_FILES + 1), on_error="skip", batch=40)


def test_the_ceiling_is_one_percent_of_a_large_source(broken):
    """1,200 samples: 12 broken files, and one good file for all the others."""
    few = broken(13, 12)
    large = replace(raw(1200), pixels=few.pixels, rows=np.minimum(np.arange(1200), 12))
    read = evaluation(large, on_error="skip", batch=100, cache=Cache())
    assert sum(len(batch.skipped) for batch in read) == 12 > SKIP_FILES


def test_a_batch_without_any_readable_picture_is_an_error(broken):
    with pytest.raises(UsageError, match="never a whole batch"):
        evaluation(broken(8, 4), on_error="skip", batch=4)


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_cache_changes_no_pixel_and_decodes_once(source, monkeypatch):
    decoded = []
    original = Encoded.pixels
    monkeypatch.setattr(Encoded, "pixels", lambda self, shrink=1: decoded.append(self) or original(self, shrink))
    plain, cache = training(source), Cache()
    decoded.clear()
    assert same(plain, training(source, cache=cache)) and len(decoded) == 20
    assert same(plain, training(source, cache=cache)) and len(decoded) == 20
    cache.fill(source, workers=2)
    assert len(decoded) == 23 == len(cache) and cache.used_bytes == 23 * 24 * 20 * 3


def test_each_scale_of_a_jpeg_is_kept_by_itself_and_changes_no_pixel(tmp_path):
    paths = [tmp_path / f"{number}.jpg" for number in range(6)]
    for number, path in enumerate(paths):
        Image.fromarray(picture(number, 150, 130)).save(path)
    source = labelled("jpegs", FilePixels(paths=tuple(paths)), [path.name for path in paths], [0, 1] * 3, ("a", "b"))
    cache = Cache()
    for epoch in range(8):
        assert same(training(source, epoch=epoch), training(source, epoch=epoch, cache=cache))
    sizes = {-(-150 // shrink) * -(-130 // shrink) * 3 for shrink in (1, 2, 4, 8)}
    assert {image.nbytes for image in cache._kept.values()} <= sizes and 6 < len(cache) <= 24


def test_grey_pictures_take_a_third_and_come_back_as_rgb(tmp_path):
    Image.fromarray(picture(0)[..., 0]).save(tmp_path / "grey.png")
    source = labelled("grey", FilePixels(paths=(tmp_path / "grey.png",)), ["grey"], [0], ("a", "b"))
    cache = Cache()
    first, second = cache.image(source, 0), cache.image(source, 0)
    assert cache.used_bytes == 24 * 20
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(second, np.stack([picture(0)[..., 0]] * 3, axis=2))


def test_a_cache_keeps_to_its_budget(source):
    size = 24 * 20 * 3
    cache = Cache(5 * size + 1)
    cache.fill(source, workers=3)
    assert len(cache) == 5 and cache.used_bytes == 5 * size
    np.testing.assert_array_equal(cache.image(source, 22), source.image(22))
    assert len(Cache(0)) == 0 and same(training(source, cache=Cache(0)), training(source))


def test_a_large_jpeg_is_decoded_smaller_for_training_only(tmp_path):
    Image.fromarray(picture(0, 240, 210)).save(tmp_path / "large.jpg")
    source = labelled("large", FilePixels(paths=(tmp_path / "large.jpg",)), ["large"], [0], ("a", "b"))
    cache = Cache()
    training(source, cache=cache, crop="none")  # to 16 px: an eighth would be 30 x 27
    assert cache.used_bytes == 30 * 27 * 3
    evaluation(source, cache=cache)
    assert cache.used_bytes == (30 * 27 + 240 * 210) * 3


def test_elpv_trains_from_soft_targets_and_grey_pictures():
    need("elpv_dataset")
    train = open_data("elpv").train
    cache = Cache()
    batch = next(batches(train, size_px=64, batch=8, preprocess=PREPROCESS, train=True, soft=True, cache=cache))
    assert batch.images.shape == (8, 64, 64, 3) and cache.used_bytes % (300 * 300) == 0 < cache.used_bytes
    assert (batch.images[..., 0] == batch.images[..., 2]).all()
    np.testing.assert_allclose(batch.targets[:, 1].numpy(), train.soft[batch.indices.numpy(), 1])

"""What a user typed becomes the right samples, or one clear error."""

import csv
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effnet.named import FASHION, read_idx
from effnet.samples import ArrayPixels, deal, joined, labelled, share
from effnet.shards import Place
from effnet.sources import open_data
from effnet.value import UsageError
from tests.conftest import missing, need, picture, write_images

PARTS = {"train/cat": 6, "train/dog": 5, "val/cat": 2, "val/dog": 1, "test/cat": 1, "test/dog": 2}


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_with_parts_is_read_as_it_lies(image_folder):
    splits = open_data(image_folder(PARTS))
    assert splits.classes == ("cat", "dog")
    assert {name: part.counts().tolist() for name, part in splits.parts().items()} == {
        "train": [6, 5],
        "val": [2, 1],
        "test": [1, 2],
    }
    assert splits.val is not None and splits.val.ids == ("val/cat/000.png", "val/cat/001.png", "val/dog/000.png")
    assert splits.train.labels.tolist() == [0] * 6 + [1] * 5


def test_an_image_is_the_file_its_id_names(image_folder):
    root = image_folder(PARTS)
    train = open_data(root).train
    for index, name in enumerate(train.ids):
        np.testing.assert_array_equal(train.image(index), np.asarray(Image.open(root / name)))


def test_validation_is_cut_from_training_by_class_and_test_is_left_alone(image_folder):
    root = image_folder({"train/cat": 20, "train/dog": 40, "test/cat": 3, "test/dog": 3})
    splits = open_data(root, val_fraction=0.25)
    assert splits.val is not None and splits.test is not None
    assert splits.val.counts().tolist() == [5, 10] and splits.train.counts().tolist() == [15, 30]
    assert not set(splits.train.ids) & set(splits.val.ids)
    assert all(name.startswith("test/") for name in splits.test.ids) and len(splits.test) == 6
    assert "25%" in splits.note and open_data(root, val_fraction=0).val is None


def test_a_flat_folder_is_cut_70_15_15_by_class_with_a_seed(image_folder):
    root = image_folder({"cat": 20, "dog": 40})
    splits, again, other = open_data(root), open_data(root), open_data(root, split_seed=1)
    assert [part.counts().tolist() for part in splits.parts().values()] == [[14, 28], [3, 6], [3, 6]]
    assert splits.train.ids == again.train.ids != other.train.ids
    assert sorted(splits.part("all").ids) == sorted(path.relative_to(root).as_posix() for path in root.glob("*/*"))


def test_validation_has_other_names_too(image_folder):
    splits = open_data(image_folder({"train/a": 1, "train/b": 1, "validation/a": 2}))
    assert splits.val is not None and splits.val.ids == ("validation/a/000.png", "validation/a/001.png")


def test_an_empty_class_folder_keeps_its_index(image_folder):
    root = image_folder({"train/ant": 2, "train/bee": 0, "train/cow": 2, "test/cow": 1})
    splits = open_data(root)
    assert splits.classes == ("ant", "bee", "cow") and splits.train.labels.tolist() == [0, 0, 2, 2]
    assert splits.test is not None and splits.test.labels.tolist() == [2]


def test_hidden_and_nested_folders_do_not_become_classes(image_folder):
    root = image_folder({"cat": 5, "cat/young": 4, "dog": 5, ".thumbnails": 3, "__MACOSX": 1})
    splits = open_data(root)
    assert splits.classes == ("cat", "dog") and splits.part("all").counts().tolist() == [9, 5]


def test_images_outside_class_folders_are_left_out_and_said(image_folder):
    root = image_folder({"cat": 5, "dog": 5, "": 2})
    assert "2 images outside class folders are left out" in open_data(root).note


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "is an empty folder"),
        ({"": 3}, "holds 3 images but no class folders"),
        ({"cat": 3}, "only the class 'cat'"),
        ({"cat": 0, "dog": 0}, "holds no images"),
        ({"train/a": 2, "train/b": 2, "test/a": 0}, "test holds no images"),
        ({"test/a": 2, "test/b": 2}, "has test but no train folder"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "valid/a": 1}, "two folders for the val part: val and valid"),
        ({"train/a": 1, "train/b": 1, "tset/a": 1, "tests": 0}, "a folder 'tset'. Did you mean 'test'?"),
        ({"train/a": 1, "train/b": 1, "test/c": 1}, "Only in .*test: 'c'. Only in the class list: nothing"),
    ],
)
def test_a_folder_that_is_not_a_data_set_is_one_clear_error(tmp_path, counts, message):
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError, match=message):
        open_data(write_images(tmp_path / "data", counts))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("elvp", "Did you mean 'elpv'"),
        ("fashion_mnist", "Did you mean 'fashion-mnist'"),
        ("phtos", "Did you mean 'photos'"),
        ("notes.txt", "notes.txt is a file"),
        ("none.csv", "there is no data at"),
        ("package:no_such_package/data", "the package 'no_such_package' is not installed"),
        ("package:PIL/pictures", "no images in pictures"),
    ],
)
def test_a_wrong_name_is_answered_with_what_there_is(tmp_path, monkeypatch, typed, message):
    (tmp_path / "photos").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        open_data(typed)


# -- the class list of a checkpoint -----------------------------------------------------------------------------------


def test_a_checkpoints_class_order_is_kept(image_folder):
    splits = open_data(image_folder({"ant": 4, "bee": 4}), classes=("bee", "ant"))
    assert splits.classes == ("bee", "ant")
    everything = splits.part("all")
    assert all(
        (label == 0) == name.startswith("bee") for name, label in zip(everything.ids, everything.labels, strict=True)
    )


def test_another_class_list_is_refused_with_both_sides(image_folder):
    root = image_folder({"ant": 4, "bee": 4, "wasp": 1})
    with pytest.raises(UsageError, match=r"Only in .*data: 'wasp'. Only in the class list: 'cow'"):
        open_data(root, classes=("ant", "bee", "cow"))


def test_the_class_list_is_enforced_on_named_sets_and_manifests(tmp_path):
    with pytest.raises(UsageError, match=r"Only in fashion-mnist: .*'Bag'"):
        open_data(f"fashion-mnist:{_fashion(tmp_path)}", classes=("Coat", "Dress"))
    with pytest.raises(UsageError, match="Only in the class list: 'c'"):
        open_data(_manifest(tmp_path, "path,label\n0.png,a\n1.png,b\n"), classes=("a", "b", "c"))


# -- manifests --------------------------------------------------------------------------------------------------------


def _manifest(folder: Path, text: str) -> Path:
    write_images(folder, {"": 4})
    for index in range(4):
        (folder / f"00{index}.png").rename(folder / f"{index}.png")
    (folder / "data.csv").write_text(text)
    return folder / "data.csv"


def test_a_manifest_gives_paths_labels_parts_weights_and_groups(tmp_path):
    text = "\ufefflabel, path ,split,weight,group\n"
    text += 'b,0.png,train,0.5,x\na,1.png,train,1,y\n"a",2.png,test,2,x\nb,./3.png,valid,1,y\n'
    splits = open_data(_manifest(tmp_path, text))
    assert splits.classes == ("a", "b") and splits.train.ids == ("0.png", "1.png")
    assert splits.train.labels.tolist() == [1, 0] and splits.train.weights.tolist() == [0.5, 1]
    assert splits.train.groups == ("x", "y")
    assert splits.val is not None and splits.val.ids == ("./3.png",)
    np.testing.assert_array_equal(splits.val.image(0), np.asarray(Image.open(tmp_path / "3.png")))
    assert splits.test is not None and splits.test.weights.tolist() == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,labl\n0.png,a\n", "line 1: column 'labl' is not one of .* Did you mean 'label'"),
        ("path\n0.png\n", "line 1: no column 'label'"),
        ("path,label\n", "no rows"),
        ("", "line 1: no column 'path'"),
        ("path,label\n0.png,a\n9.png,b\n", "line 3: there is no file .*9.png"),
        ("path,label\n0.png,a\n1.png,\n", "line 3: the label is empty"),
        ("path,label\n0.png,a\n1.png\n", "line 3: the number of cells differs"),
        ("path,label\n0.png,a,b\n1.png,b\n", "line 2: the number of cells differs"),
        ("path,label,split\n0.png,a,train\n1.png,b,trian\n", "line 3: the split 'trian'.* Did you mean 'train'"),
        ("path,label,weight\n0.png,a,1\n1.png,b,-1\n", "line 3: the weight '-1'"),
        ("path,label,weight\n0.png,a,nan\n", "line 2: the weight 'nan'"),
        ("path,label\n0.png,a\n1.png,b\n0.png,a\n", "line 4: 0.png was already on line 2"),
        ("path,label,split\n0.png,cat,train\n1.png,dog,train\n2.png,dgo,test\n", "line 4: .*'dgo'.* mean 'dog'"),
        ("path,label\n0.png,a\n1.png,a\n", "only the class 'a'"),
        ('path,label\n0.png,"a\n', "not a CSV file"),
    ],
)
def test_a_mistake_in_a_manifest_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        open_data(_manifest(tmp_path, text))


def test_the_same_file_in_two_parts_is_left_to_the_doctor(tmp_path):
    text = "path,label,split\n0.png,a,train\n1.png,b,train\n0.png,a,test\n"
    splits = open_data(_manifest(tmp_path, text), val_fraction=0)
    assert splits.test is not None and splits.test.ids == ("0.png",)


# -- tar shards -------------------------------------------------------------------------------------------------------


def _shard(path: Path, samples: list[tuple[str, int, dict[str, object]]]) -> None:
    """Written by webdataset itself: key, picture seed, further fields."""
    webdataset = need("webdataset")
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for key, seed, fields in samples:
            writer.write({"__key__": key, "png": Image.fromarray(picture(seed)), **fields})


def test_shards_are_read_at_random_and_give_the_pictures_written(tmp_path):
    names = ("cat", "dog")
    for number in range(2):
        rows = [(f"{number}{i}", 10 * number + i, {"json": {"label": names[i % 2]}}) for i in range(4)]
        _shard(tmp_path / f"train-{number:03d}.tar", rows)
    _shard(tmp_path / "test-000.tar", [("x", 77, {"cls": "dog"})])
    splits = open_data(tmp_path, val_fraction=0)
    assert splits.classes == names and len(splits.train) == 8
    for index in (7, 0, 5):
        np.testing.assert_array_equal(splits.train.image(index), picture(10 * (index // 4) + index % 4))
        assert splits.train.labels[index] == index % 2
    assert splits.test is not None and splits.test.ids == ("test-000.tar/x",) and splits.test.labels.tolist() == [1]


def test_shards_with_class_numbers_take_names_from_classes_txt(tmp_path):
    _shard(tmp_path / "s-0.tar", [(f"k{i}", i, {"cls": i % 11}) for i in range(22)])
    assert open_data(f"{tmp_path}/s-{{0..0}}.tar").classes == tuple(map(str, range(11)))
    (tmp_path / "classes.txt").write_text("\n".join(f"name{i:02d}" for i in range(11)))
    splits = open_data(tmp_path / "*.tar")
    everything = splits.part("all")
    assert splits.classes[10] == "name10"
    assert all(
        int(name.split("/k")[1]) % 11 == label for name, label in zip(everything.ids, everything.labels, strict=True)
    )


def test_the_parts_of_shards_are_told_by_folders_too(tmp_path):
    _shard(tmp_path / "train" / "0.tar", [("a", 0, {"cls": "x"}), ("b", 1, {"cls": "y"})])
    _shard(tmp_path / "val" / "0.tar", [("a", 2, {"cls": "y"})])
    splits = open_data(tmp_path)
    assert len(splits.train) == 2 and splits.val is not None and splits.val.labels.tolist() == [1]


def test_broken_shards_are_refused(tmp_path):
    need("webdataset")
    with pytest.raises(UsageError, match="no tar shard matches"):
        open_data(tmp_path / "none-{00..01}.tar")
    (tmp_path / "bad.tar").write_bytes(b"not a tar file at all" * 100)
    with pytest.raises(UsageError, match="is not a tar file"):
        open_data(tmp_path / "bad.tar")
    _shard(tmp_path / "bare.tar", [("a", 0, {})])
    with pytest.raises(UsageError, match="sample a: no label"):
        open_data(tmp_path / "bare.tar")


def test_a_shard_cut_short_after_it_was_indexed_is_an_image_error(tmp_path):
    _shard(tmp_path / "s.tar", [(f"k{i}", i, {"cls": "ab"[i % 2]}) for i in range(8)])
    source = open_data(tmp_path / "s.tar").part("all")
    (tmp_path / "s.tar").write_bytes((tmp_path / "s.tar").read_bytes()[:3000])
    with pytest.raises(UsageError, match="cut short"):
        source.image(source.ids.index("s.tar/k7"))


def test_training_streams_from_shards_as_from_a_folder(tmp_path, monkeypatch):
    """The same steps as from files, in the order of `data.order`, each picture read from its place and never copied."""
    from effnet import data, train
    from tests.test_train import RECIPE, fresh_model, stable

    folder = write_images(tmp_path / "files", {"train/a": 6, "train/b": 6})
    for number, name in enumerate("ab"):
        rows = [(f"{i:02d}", 6 * number + i, {"cls": name}) for i in range(6)]
        _shard(tmp_path / "shards" / f"train-{number}.tar", rows)
    laid_out = sorted(tmp_path.rglob("*"))
    recipe, read = RECIPE.replace(epochs=2, batch=5, crop="resize"), []
    read_place = Place.read
    monkeypatch.setattr(Place, "read", lambda place: read.append(place.shard.name) or read_place(place))
    monkeypatch.setattr(data.Cache, "_keep", lambda cache, *kept: None)  # no picture stays in memory either
    for root in (folder, tmp_path / "shards"):
        splits = open_data(root, val_fraction=0)
        read.clear()  # labels
        list(train.training(splits, fresh_model(), recipe, tmp_path / f"run-{root.name}", workers=0))
    logs = [stable(tmp_path / f"run-{root}") for root in ("files", "shards")]
    assert logs[0] == logs[1] and len([event for event in logs[0] if event["event"] == "step"]) == 4
    wanted = [data.order(12, seed=recipe.seed, epoch=epoch, batch=5).ravel() for epoch in (0, 1)]
    assert read == [f"train-{index // 6}.tar" for index in np.concatenate(wanted)]
    assert [path for path in sorted(tmp_path.rglob("*")) if "run-" not in str(path)] == laid_out


def test_a_missing_webdataset_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UsageError, match=r"pip install effnet\[data\]"):
        open_data(tmp_path / "a.tar")


# -- ELPV -------------------------------------------------------------------------------------------------------------


def _elpv_labels() -> tuple[np.ndarray, np.ndarray]:
    """Probability and type of each cell as the package's own loader parses them."""
    folder = Path(need("elpv_dataset").__file__).parent
    with (folder / "data" / "labels.csv").open() as file:
        rows = list(csv.reader(file, delimiter=" ", skipinitialspace=True))
    return np.array([float(row[1]) for row in rows]), np.array([row[-1] for row in rows])


def test_elpv_has_the_test_counts_and_weights_of_the_protocol():
    p, kind = _elpv_labels()
    expected = {"mono": (147, 29, 14, 78), "poly": (230, 45, 13, 100)}
    for seed in range(2):
        splits = open_data("elpv", split_seed=seed)
        assert splits.test is not None and len(splits.test) == 656 and len(splits.part("all")) == 2624
        at = splits.test.rows
        counts = {
            k: tuple(int(((kind[at] == k) & (np.rint(3 * p[at]) == t)).sum()) for t in range(4)) for k in expected
        }
        assert counts == expected
        assert splits.test.weights.sum() == pytest.approx(597.67, abs=0.005)
        assert splits.val is not None and len(splits.val) == pytest.approx(0.15 * 1968, abs=4)
        np.testing.assert_array_equal(splits.test.labels, p[at] > 0)
        np.testing.assert_allclose(splits.test.weights, np.where(p[at] == 0, 1, p[at]), atol=1e-7)
        np.testing.assert_allclose(splits.test.soft, np.stack([1 - p[at], p[at]], axis=1), atol=1e-7)
        assert splits.test.groups == tuple(kind[at]) and splits.classes == ("functional", "defective")


def test_the_elpv_test_set_is_the_written_recipe():
    """Strata mono then poly, p ascending, one RandomState: spelled out again, with loops of its own."""
    p, kind = _elpv_labels()
    random, test = np.random.RandomState(3), []
    for name, counts in (("mono", (147, 29, 14, 78)), ("poly", (230, 45, 13, 100))):
        for value, count in zip((0.0, 0.3333333333333333, 0.6666666666666666, 1.0), counts, strict=True):
            test += random.permutation([i for i in range(2624) if kind[i] == name and p[i] == value])[:count].tolist()
    splits = open_data("elpv", split_seed=3)
    assert splits.test is not None and splits.test.rows.tolist() == sorted(test)


def test_elpv_validation_has_the_same_strata_and_follows_the_seed():
    p, kind = _elpv_labels()
    first, second = open_data("elpv"), open_data("elpv", split_seed=1)
    assert first.val is not None and second.val is not None and first.val.ids != second.val.ids
    for name in ("mono", "poly"):
        for t in range(4):
            inside = [int(((kind[part.rows] == name) & (np.rint(3 * p[part.rows]) == t)).sum())
                      for part in (first.val, first.train)]  # fmt: skip
            assert inside[0] / sum(inside) == pytest.approx(0.15, abs=0.51 / sum(inside))


def test_elpv_modules_keeps_whole_stretches_together():
    need("elpv_dataset")
    for seed in range(3):
        splits = open_data("elpv-modules", split_seed=seed)
        assert splits.test is not None and splits.val is not None
        assert splits.test.rows.tolist() == list(range(2144, 2624))
        assert np.bincount(np.rint(3 * splits.test.soft[:, 1]).astype(int)).tolist() == [375, 59, 10, 36]
        assert sorted([*splits.train.rows, *splits.val.rows]) == list(range(2144))
        stretches = np.split(splits.val.rows, np.flatnonzero(np.diff(splits.val.rows) != 1) + 1)
        assert all(len(stretch) >= 58 for stretch in stretches) and set(splits.val.groups or ()) == {"mono", "poly"}
        assert 0.12 < len(splits.val) / 2144 < 0.17


def test_elpv_says_what_a_reader_must_know():
    need("elpv_dataset")
    note = open_data("elpv").note
    wording = "same data, same split sizes and metric as reconstructed from the paper; the paper's split is unpublished"
    assert wording in note[0].lower() + note[1:] and "CC BY-NC-SA 4.0" in note and "Deitsch" in note
    assert "whole stretches" in open_data("elpv-modules").note
    assert not open_data("elpv").upright and not open_data("elpv-modules").upright


def test_elpv_takes_a_checkpoints_class_order():
    need("elpv_dataset")
    plain, turned = open_data("elpv").train, open_data("elpv", classes=("defective", "functional")).train
    assert plain.soft is not None and turned.soft is not None
    np.testing.assert_array_equal(turned.labels, 1 - plain.labels)
    np.testing.assert_array_equal(turned.soft, plain.soft[:, ::-1])


# -- Fashion-MNIST ----------------------------------------------------------------------------------------------------


def _fashion(folder: Path, *, zipped: bool = True, images: np.ndarray | None = None) -> Path:
    """Four idx files of 40 + 10 random pictures, four and one of each class."""
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 10)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8) if images is None else images
        labels = (np.arange(len(pixels)) % 10).astype(np.uint8)
        files = {
            f"{prefix}-images-idx3-ubyte": struct.pack(">4I", 0x803, *pixels.shape) + pixels.tobytes(),
            f"{prefix}-labels-idx1-ubyte": struct.pack(">2I", 0x801, len(labels)) + labels.tobytes(),
        }
        for name, data in files.items():
            path = folder / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(data) if zipped else data)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_is_read_from_idx_files(tmp_path, zipped):
    splits = open_data(f"fashion-mnist:{_fashion(tmp_path, zipped=zipped)}", val_fraction=0.25)
    assert splits.classes[0] == "T-shirt/top" and splits.classes[9] == "Ankle boot"
    assert [part.counts().tolist() for part in splits.parts().values()] == [[3] * 10, [1] * 10, [1] * 10]
    first = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)[splits.train.rows[0]]
    np.testing.assert_array_equal(splits.train.image(0), np.stack([first] * 3, axis=2))
    assert "Not the published files" in splits.note and "Expat" in splits.note


def test_a_broken_idx_file_is_refused(tmp_path):
    folder = _fashion(tmp_path, zipped=False)
    images = folder / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    for data, message in ((whole[:-1], "is torn"), (whole[:9], "not an idx file"), (b"\0" * 99, "magic 0x0")):
        images.write_bytes(data)
        with pytest.raises(UsageError, match=message):
            open_data(f"fashion-mnist:{folder}")
    images.unlink()
    with pytest.raises(UsageError, match="has no train-images-idx3-ubyte"):
        open_data(f"fashion-mnist:{folder}")
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(UsageError, match="cannot be read"):
        open_data(f"fashion-mnist:{folder}")
    with pytest.raises(UsageError, match="apt-get install dataset-fashion-mnist"):
        open_data("fashion-mnist:/no/such/folder")


def test_mnist_under_the_name_of_fashion_mnist_is_refused(tmp_path):
    """MNIST has the same file names, counts and shapes; only the pixels tell."""
    folder = _fashion(tmp_path, zipped=False, images=np.full((60_000, 28, 28), 33, dtype=np.uint8))
    with pytest.raises(UsageError, match=r"holds another data set: training mean 0.1294"):
        open_data(f"fashion-mnist:{folder}")


def test_the_real_fashion_mnist_has_its_published_counts():
    if not FASHION.is_dir():
        missing("the Debian package dataset-fashion-mnist is not installed")
    splits = open_data("fashion-mnist")
    assert splits.test is not None and splits.test.counts().tolist() == [1000] * 10
    assert splits.val is not None and (splits.train.counts() + splits.val.counts()).tolist() == [6000] * 10
    images = read_idx(FASHION / "train-images-idx3-ubyte.gz", dimensions=3)
    assert images.mean() / 255 == pytest.approx(0.2860, abs=1e-4)


# -- packages ---------------------------------------------------------------------------------------------------------


def test_images_of_a_package_without_class_folders_are_unlabelled():
    need("skimage")
    splits = open_data("package:skimage/data")
    assert splits.classes == () and set(splits.train.labels) == {-1} and "chelsea.png" in splits.train.ids
    assert splits.train.image(splits.train.ids.index("chelsea.png")).shape == (300, 451, 3)
    with pytest.raises(UsageError, match="no class folders"):
        open_data("package:skimage/data", classes=("cat", "dog"))


def test_class_folders_of_a_package_are_classes(tmp_path, monkeypatch):
    write_images(tmp_path / "some_pictures", {"data/cat": 4, "data/dog": 8})
    (tmp_path / "some_pictures" / "__init__.py").write_text("raise RuntimeError('never imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    splits = open_data("package:some_pictures/data")
    assert splits.classes == ("cat", "dog") and splits.part("all").counts().tolist() == [4, 8]


# -- values -----------------------------------------------------------------------------------------------------------


def test_a_fingerprint_tells_data_apart(image_folder):
    root = image_folder({"cat": 8, "dog": 8})
    train = open_data(root).train
    assert train.fingerprint() == open_data(root).train.fingerprint()
    assert train.fingerprint() != train.subset(range(len(train) - 1)).fingerprint()
    assert train.fingerprint() != open_data(root, classes=("dog", "cat")).train.fingerprint()
    before = train.fingerprint()
    with (root / train.ids[0]).open("ab") as file:
        file.write(b"another size")
    assert train.fingerprint() != before


def test_balance_gives_every_class_the_same_sum():
    source = _source([0] * 6 + [1] * 2)
    assert source.balance().tolist() == pytest.approx([8 / (2 * 6), 8 / (2 * 2)])
    assert _source([0, 0, 0]).balance().tolist() == pytest.approx([0.5, 0])


def test_a_source_refuses_what_does_not_fit_together():
    source = _source([0, 1])
    for change, message in (
        ({"labels": np.array([0, 2])}, "labels 0..2 with 2 classes"),
        ({"weights": np.array([1.0, -1.0])}, "not negative"),
        ({"ids": ("a",)}, "1 ids but"),
        ({"classes": ("x", "x")}, "names a class twice"),
        ({"soft": np.array([[1.0, 1.0], [0.0, 1.0]])}, "rows summing to 1"),
    ):
        with pytest.raises(UsageError, match=message):
            type(source)(**{**vars(source), **change})


def test_a_part_that_does_not_exist_is_named(image_folder):
    splits = open_data(image_folder({"train/a": 2, "train/b": 2}), val_fraction=0)
    with pytest.raises(UsageError, match="has no test part; it has train"):
        splits.part("test")
    with pytest.raises(UsageError, match="Did you mean 'val'"):
        splits.part("vall")


def test_joined_parts_keep_their_order():
    source = _source([0, 1, 0, 1])
    both = joined("both", [source.subset([3, 1]), source.subset([0])])
    assert both.ids == ("3", "1", "0") and both.labels.tolist() == [1, 1, 0]
    np.testing.assert_array_equal(both.image(0), source.image(3))


def test_shares_leave_something_for_everyone():
    assert [share(n, 0.15) for n in (0, 2, 3, 10, 100)] == [0, 0, 1, 2, 15]
    pieces = deal([np.arange(10, 20)], [[3, 4]], seed=0)
    assert [len(piece) for piece in pieces] == [3, 4, 3] and sorted(np.concatenate(pieces)) == list(range(10, 20))


def _source(labels: list[int]):
    pixels = ArrayPixels(array=np.stack([picture(i)[..., 0] for i in range(len(labels))]))
    return labelled("made", pixels, [str(i) for i in range(len(labels))], labels, ("a", "b"))

"""The doctor finds what was broken on purpose, says nothing about what is well, and changes no file."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from effnet.doctor import Diagnosis, alike, examine
from effnet.sources import open_data
from tests.conftest import need, picture, write_images

HEALTHY = {"train/cat": 6, "train/dog": 5, "val/cat": 2, "val/dog": 2, "test/cat": 2, "test/dog": 2}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A healthy data set of 40 x 48 px pictures."""
    number = 0
    for folder, count in HEALTHY.items():
        (tmp_path / "data" / folder).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(picture(number, 48, 40)).save(tmp_path / "data" / folder / f"{index:03d}.png")
            number += 1
    return tmp_path / "data"


def found(diagnosis: Diagnosis, check: str) -> list[tuple[str, str]]:
    return [(row.severity, row.message) for row in diagnosis.rows if row.check == check]


def test_a_healthy_data_set_has_no_problem(root):
    diagnosis = examine(root)
    assert diagnosis.ok and diagnosis.problems == () and diagnosis.duplicates == () and diagnosis.near == ()
    assert diagnosis.counts == {
        part: {c: HEALTHY[f"{part}/{c}"] for c in ("cat", "dog")} for part in ("train", "val", "test")
    }
    assert diagnosis.formats == {"PNG": 19} and diagnosis.modes == {"RGB": 19} and diagnosis.bits == {"8": 19}
    assert diagnosis.sizes == {"width": (40, 40, 40), "height": (48, 48, 48)}


def test_the_report_is_json(root):
    document = json.loads(json.dumps(examine(root).to_dict()))
    assert document["ok"] is True and document["classes"] == ["cat", "dog"] and len(document["rows"]) >= 6


def test_nothing_is_changed_and_the_result_does_not_depend_on_workers(root):
    def state() -> dict[str, tuple[str, int]]:
        return {p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in root.rglob("*.png")}

    before = state()
    assert examine(root, workers=1) == examine(root, workers=4)
    assert state() == before


def test_progress_is_told(root):
    told = []
    examine(root, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 19) for done in range(1, 20)]


def test_files_that_cannot_be_decoded_are_all_named(root):
    (root / "train/cat/000.png").write_bytes(b"")
    whole = (root / "test/dog/001.png").read_bytes()
    (root / "test/dog/001.png").write_bytes(whole[:80])
    diagnosis = examine(root)
    assert not diagnosis.ok
    ((severity, message),) = found(diagnosis, "decoding")
    assert severity == "error" and message.startswith("2 of 19 pictures cannot be decoded")
    assert [name.split(" (")[0] for name in diagnosis.problems[0].files] == [
        "train: train/cat/000.png",
        "test: test/dog/001.png",
    ]


def test_a_folder_without_one_readable_picture_is_diagnosed_too(root):
    files = sorted(root.rglob("*.png"))
    for file in files:
        file.write_bytes(b"no picture")
    diagnosis = examine(root)
    ((severity, message),) = found(diagnosis, "decoding")
    assert severity == "error" and message.startswith(f"{len(files)} of {len(files)} pictures cannot be decoded")


def test_the_same_picture_in_two_parts_is_an_error_even_in_another_format(root):
    (root / "test/cat/copy.png").write_bytes((root / "train/cat/001.png").read_bytes())
    Image.open(root / "train/dog/002.png").save(root / "val/dog/again.bmp")
    diagnosis = examine(root)
    ((severity, message),) = found(diagnosis, "leakage")
    assert severity == "error" and not diagnosis.ok
    assert message.startswith("pictures in more than one part: 2 (1 byte for byte)")
    assert set(diagnosis.duplicates) == {
        ("train: train/cat/001.png", "test: test/cat/copy.png"),
        ("train: train/dog/002.png", "val: val/dog/again.bmp"),
    }


def test_the_same_file_named_twice_in_a_manifest_is_leakage(root):
    lines = [
        "path,label,split",
        "train/cat/000.png,cat,train",
        "train/dog/000.png,dog,train",
        "train/cat/000.png,cat,test",
    ]
    (root / "list.csv").write_text("\n".join(lines))
    assert found(examine(root / "list.csv"), "leakage")[0][0] == "error"


def test_copies_within_a_part_and_contradicting_labels_are_warnings(root):
    (root / "train/dog/copy.png").write_bytes((root / "train/cat/000.png").read_bytes())
    diagnosis = examine(root)
    assert diagnosis.ok
    assert found(diagnosis, "duplicates")[0][0] == "warning"
    assert found(diagnosis, "labels")[0][0] == "warning" and "cat/dog" in found(diagnosis, "labels")[0][1]
    assert found(diagnosis, "leakage") == [("ok", "no picture is in two parts")]


def test_near_duplicates_are_found_across_encodings_sizes_and_brightness(root):
    original = Image.open(root / "train/cat/003.png")
    original.save(root / "test/cat/recoded.jpg", quality=60)
    original.resize((80, 96), Image.Resampling.BICUBIC).save(root / "val/cat/larger.png")
    original.point(lambda value: value * 0.8).save(root / "train/cat/darker.png")
    diagnosis = examine(root)
    ((severity, message),) = found(diagnosis, "near duplicates")
    assert (
        severity == "warning"
        and message.startswith("pairs that look alike: 5 across parts, 1 within one")
        and diagnosis.ok
    )
    assert all(pair.across for pair in diagnosis.near[:5]) and not diagnosis.near[5].across
    names = {
        "train: train/cat/003.png",
        "test: test/cat/recoded.jpg",
        "val: val/cat/larger.png",
        "train: train/cat/darker.png",
    }
    assert {pair.first for pair in diagnosis.near} | {pair.second for pair in diagnosis.near} == names


def test_flat_pictures_are_not_called_alike(root):
    for index, grey in enumerate((10, 100, 200)):
        Image.new("L", (40, 48), grey).save(root / f"train/cat/flat{index}.png")
    assert examine(root).near == ()


@given(seed=st.integers(0, 1000), n=st.integers(0, 40), block=st.sampled_from([1, 7, 64]))
def test_alike_finds_what_a_double_loop_finds(seed, n, block):
    vectors = np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = {(i, j) for i in range(n) for j in range(i + 1, n) if float(vectors[i] @ vectors[j]) >= 0.9}
    close = {(i, j) for i in range(n) for j in range(i + 1, n) if abs(float(vectors[i] @ vectors[j]) - 0.9) < 1e-5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effnet.doctor.BLOCK", block)
        first, second, product = alike(vectors, 0.9)
    pairs = list(zip(first.tolist(), second.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) and set(pairs) ^ expected <= close
    np.testing.assert_allclose(product, [vectors[i] @ vectors[j] for i, j in pairs], atol=1e-6)


def test_unusual_files_are_described(root):
    folder = root / "train/cat"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(100, 48, 40)).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(picture(101, 48, 40)).convert("CMYK").save(folder / "print.jpg")
    Image.fromarray(picture(102, 48, 40)[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(picture(103, 48, 40)).convert("RGBA").save(folder / "glass.png")
    Image.fromarray(picture(104, 48, 40)).save(folder / "really.png", "JPEG")
    diagnosis = examine(root)
    assert sorted(message for severity, message in found(diagnosis, "format") if severity == "info") == [
        "CMYK, converted to RGB: 1",
        "deeper than 8 bits, scaled to 8: 1",
        "named as another format: 1",
        "turned by EXIF, decoded upright: 1",
        "with transparency, put on white: 1",
    ]
    assert diagnosis.bits == {"8": 23, "16": 1} and diagnosis.formats == {"PNG": 21, "JPEG": 3}
    assert diagnosis.sizes["width"] == (40, 40, 48) and diagnosis.ok


def test_tiny_pictures_are_a_warning(root):
    Image.fromarray(picture(200, 8, 50)).save(root / "train/dog/strip.png")
    ((severity, message),) = found(examine(root), "size")
    assert severity == "warning" and "below 32 px: 1 (train: train/dog/strip.png)" in message


def test_class_problems_are_graded(tmp_path):
    counts = {"train/ant": 22, "train/bee": 2, "train/cow": 0, "test/ant": 2, "test/cow": 1}
    diagnosis = examine(open_data(write_images(tmp_path / "data", counts), val_fraction=0))
    assert ("error", "classes without a picture in train: cow") in found(diagnosis, "classes")
    assert ("warning", "classes without a picture in test: bee") in found(diagnosis, "classes")
    assert ("warning", "there is no val part") in found(diagnosis, "classes")
    assert found(diagnosis, "balance")[0][0] == "warning" and "11.0 times" in found(diagnosis, "balance")[0][1]
    assert not diagnosis.ok


def test_unlabelled_pictures_of_a_package_can_be_examined():
    """One of scikit-image's test images has a layout that Pillow cannot read; the doctor names it."""
    need("skimage")
    diagnosis = examine("package:skimage/data")
    assert diagnosis.classes == () and found(diagnosis, "classes")[0][0] == "info"
    assert [name.split(" (")[0] for name in diagnosis.problems[0].files] == ["train: multipage_rgb.tif"]
    assert found(diagnosis, "duplicates")[0][1].endswith("train: chessboard_GRAY.png = train: chessboard_RGB.png")


def test_neighbouring_solar_cells_are_called_alike_across_a_split():
    """Published facts: no exact duplicates among the cells, but neighbours of a module look nearly alike."""
    need("elpv_dataset")
    splits = open_data("elpv", val_fraction=0)
    cells = splits.part("all")
    cells = cells.subset(np.argsort(cells.rows)[1400:1700])
    train, test = cells.subset(range(0, 300, 2)), cells.subset(range(1, 300, 2))
    diagnosis = examine(replace(splits, train=train, test=test))
    assert diagnosis.ok and diagnosis.duplicates == ()
    assert diagnosis.modes == {"L": 300} and diagnosis.sizes == {"width": (300,) * 3, "height": (300,) * 3}
    assert found(diagnosis, "near duplicates")[0][0] == "warning"
    numbers = [[int(name[-8:-4]) for name in (pair.first, pair.second)] for pair in diagnosis.near]
    assert [abs(a - b) for a, b in numbers[:3]] == [1, 1, 1]

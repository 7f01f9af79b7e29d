"""Which images are meant: every kind of input, in order, as a stream, and what is wrong with one has its own place."""

import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effnet.images import ImageError, image_files, walk_images
from effnet.inputs import Input, Inputs, batched, inputs
from effnet.shards import Place
from effnet.value import UsageError
from tests.conftest import picture, write_images


def encoded(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(seed)).save(stream, "PNG")
    return stream.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def reason(item: Input) -> str:
    with pytest.raises(ImageError) as caught:
        item.image()
    assert caught.value.name == item.name
    return caught.value.reason


def test_files_and_folders_stand_for_their_images_in_the_order_named(tmp_path: Path) -> None:
    root = write_images(tmp_path, {"b": 2, "a/deep": 1})
    found = list(inputs([root / "b" / "001.png", root, root / "b" / "001.png"]))
    names = [Path(item.name).relative_to(root).as_posix() for item in found]
    assert names == ["b/001.png", "a/deep/000.png", "b/000.png", "b/001.png", "b/001.png"]
    assert inputs([root]).count() == 3
    np.testing.assert_array_equal(found[1].image(), picture(2))


def test_a_walk_is_in_the_order_of_the_sorted_list(tmp_path: Path) -> None:
    """Path by path as `sorted` compares them: part by part, so that a-b stands behind a/x."""
    for name in ("a/x.png", "a/b/y.png", "a-b/z.png", "a.png", "b.PNG", "a/b.png", "B/q.jpg", ".h/x.png", "a/n.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    every = [path for path in tmp_path.rglob("*") if path.suffix.lower() in (".png", ".jpg") and ".h" not in path.parts]
    assert [path for path, _ in walk_images(tmp_path)] == sorted(every) == image_files(tmp_path)


def test_a_folder_is_listed_when_its_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, {"a": 1, "b": 1, "c": 1})
    listed, usual = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(Path(path).name) or usual(path))
    walk = walk_images(tmp_path)
    next(walk)
    assert listed == [tmp_path.name, "a"]
    assert len(list(walk)) == 2 and listed == [tmp_path.name, "a", "b", "c"]


def test_of_a_large_folder_only_names_are_in_memory_and_of_a_large_shard_nothing(tmp_path: Path) -> None:
    count = 2000
    (tmp_path / "flat").mkdir()
    for number in range(count):
        (tmp_path / "flat" / f"{number:07d}.png").touch()
    shard(tmp_path / "s.tar", {f"{number:07d}.png": b"" for number in range(count)})
    ours = [tracemalloc.Filter(True, f"*{name}.py") for name in ("images", "inputs", "shards", "tarfile")]
    for path, most in ((tmp_path / "flat", 160 * count), (tmp_path / "s.tar", 60_000)):
        stream = iter(inputs([path]))
        tracemalloc.start()
        for number, _ in enumerate(stream, 1):
            if number in (1, count):
                held = tracemalloc.take_snapshot().filter_traces(ours).statistics("filename")
                assert sum(one.size for one in held) < most, (path, number, held)
        tracemalloc.stop()
        assert number == count


def test_a_folder_without_permission_has_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, {"a": 1, "closed": 1, "z": 1})
    usual = os.scandir

    def scandir(path):
        if Path(path).name == "closed":  # chmod does not stop root
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path)

    monkeypatch.setattr(os, "scandir", scandir)
    first, second, third = inputs([tmp_path])
    assert reason(second) == "cannot be listed (Permission denied)" and second.name == str(tmp_path / "closed")
    assert first.image().shape == third.image().shape
    assert len(image_files(tmp_path)) == 2


def test_a_manifest_needs_a_column_path_and_nothing_else(tmp_path: Path) -> None:
    write_images(tmp_path, {"x": 2})
    manifest = tmp_path / "list.csv"
    manifest.write_text('id, path ,label\n1,x/000.png,cat\n2,,dog\n3,"x/no, such.png",dog\n4,x/001.png\n')
    found = list(inputs([manifest]))
    paths = [str(tmp_path / "x" / name) for name in ("000.png", "no, such.png", "001.png")]
    assert [item.name for item in found] == [paths[0], f"{manifest}, line 3", *paths[1:]]
    assert reason(found[1]) == "the path is empty"
    assert "No such file" in reason(found[2])
    np.testing.assert_array_equal(found[3].image(), picture(1))
    manifest.write_text("file\nx/000.png\n")
    with pytest.raises(UsageError, match="line 1: no column 'path'; the header is 'file'"):
        inputs([manifest])


def test_a_manifest_that_breaks_off_has_a_last_row_that_says_so(tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_bytes(b'path\na.png\ncaf\xe9.png\n"b.png')
    first, second, third = inputs([manifest])
    assert first.name.endswith("a.png") and os.fsencode(second.name).endswith(b"caf\xe9.png")
    assert reason(third).startswith("the rest is not CSV")


def test_a_shard_gives_the_images_in_it_with_or_without_labels(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "s.tar",
        {
            "b.png": encoded(1),
            "b.cls": b"3",
            "n/a.jpeg": encoded(2),
            "._b.png": b"mac",
            "bad.png": b"",
            "notes.txt": b"x",
        },
    )
    found = list(inputs([path]))
    assert [item.name for item in found] == [f"{path}/b.png", f"{path}/n/a.jpeg", f"{path}/bad.png"]
    np.testing.assert_array_equal(found[0].image(), picture(1))
    np.testing.assert_array_equal(found[1].image(), picture(2))
    assert reason(found[2]) == "is empty"
    other = shard(tmp_path / "t.tar", {"z.png": encoded(3)})
    assert [item.name for item in inputs([str(tmp_path / "{s,t}.tar")])][-1] == f"{other}/z.png"
    with pytest.raises(UsageError, match="no tar shard"):
        inputs([tmp_path / "u.tar"])


@pytest.mark.parametrize("damage", ["cut in a member", "header", "no tar"])
def test_a_damaged_shard_gives_what_is_whole_and_a_row_that_says_so(tmp_path: Path, damage: str) -> None:
    path = shard(tmp_path / "s.tar", {f"{number}.png": encoded(number) for number in range(3)})
    content = bytearray(path.read_bytes())
    headers = [start for start in range(0, len(content), 512) if content[start + 257 : start + 262] == b"ustar"]
    if damage == "cut in a member":
        content = content[: headers[2] + 700]
    elif damage == "header":
        content[headers[1] + 10] ^= 255  # its checksum is wrong
    else:
        content = bytearray(b"not a tar" * 200)
    path.write_bytes(content)
    *whole, last = inputs([path])
    assert len(whole) == {"cut in a member": 3, "header": 1, "no tar": 0}[damage]
    assert last.name == str(path) and reason(last).startswith("the rest of the shard cannot be read")
    if damage == "cut in a member":
        assert "cut short" in reason(whole[2])


def test_a_member_above_the_limit_is_not_read_and_a_shard_that_vanished_is_an_error_of_the_row(tmp_path: Path) -> None:
    big = Input("big", Place(tmp_path / "absent.tar", 0, 60_000_000))
    assert reason(big) == "60.0 MB; the limit is 50.0"
    assert "No such file" in reason(Input("gone", Place(tmp_path / "absent.tar", 0, 10)))


def test_standard_input_is_one_path_per_line_whatever_the_bytes(tmp_path: Path) -> None:
    write_images(tmp_path, {"x": 1})
    listed = io.BytesIO(os.fsencode(tmp_path) + b"/x/000.png\n\ncaf\xe9 .png\r\nlast.png")
    stream = Inputs(paths=("-", str(tmp_path)), stdin=listed)
    assert stream.count() is None, "only its end will tell"
    found = list(stream)
    assert [os.fsencode(item.name) for item in found[1:3]] == [b"caf\xe9 .png", b"last.png"]
    assert found[0].name == found[3].name == str(tmp_path / "x" / "000.png")
    assert "No such file" in reason(found[2])
    with pytest.raises(UsageError, match="named twice"):
        inputs(["-", "-"])


def test_what_was_named_must_be_there(tmp_path: Path) -> None:
    write_images(tmp_path, {"x": 1})
    with pytest.raises(UsageError, match=r"xx does not exist\. Did you mean 'x'\?"):
        inputs([tmp_path / "xx"])
    (tmp_path / "x" / "000.png").rename(tmp_path / "s.tar")
    with pytest.raises(UsageError, match=r"no images in it\.$"):
        inputs([tmp_path / "x"])
    with pytest.raises(UsageError, match=r"no images in it\. For its shards, name .*/\*\.tar"):
        inputs([tmp_path])


def test_batches_are_whole_but_for_the_last() -> None:
    stream = [Input(str(number), Path("x")) for number in range(7)]
    assert [len(batch) for batch in batched(stream, 3)] == [3, 3, 1]
    assert [item for batch in batched(stream, 3) for item in batch] == stream
    assert list(batched([], 3)) == []

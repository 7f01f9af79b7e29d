"""How many training images does one core deliver, from JPEG files to uint8 views?

    python -m benchmarks.input_speed [--size 224] [--images 256] [--rounds 5] [--quality 90] [--profile]

The path of `effnet.data`: read the file, decode, random-resized-crop (8-100 % of the area) to --size, flip; and the
same with RandAugment(2, 9). Each with what is installed (`effnet`), with Pillow instead of simplejpeg, and without a
compiler too; beside them timm and torchvision where they can be imported (benchmarks/peers/README.md): their own
training pipelines with Pillow, uint8 out. Normalisation is left out for all: effnet does it on the batch.

Images: --images JPEGs of 500 x 375, quality 90, 4:2:0, made in a temporary folder from the photographs that come with
scikit-image and scikit-learn: a random crop of 60-100 % of the largest 4:3 part, resized with Pillow's bicubic filter.
The table states their mean size; ImageNet's are larger (about 110 KB), so real decoding is dearer.

Counted is the CPU time of this process on one thread (`time.process_time`), so that other programs disturb it less;
they still share caches and clock, so numbers worth quoting come from a quiet machine. Variants are interleaved in each
round, back and forth; a rate is the median of the rounds. Files are in the page cache. --profile shows where the time
of the first variant goes. The last line of stdout is one JSON document.
"""

import argparse
import contextlib
import cProfile
import json
import os
import platform
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from effnet import images, native
from effnet.data import Cache, Views
from effnet.samples import FilePixels, labelled
from effnet.spec import Preprocess

PHOTOS = {
    "skimage": ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg"),
    "sklearn": ("china.jpg", "flower.jpg"),
}
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
AREA = (0.08, 1.0)
Path_ = Callable[[int], Any]  # image number -> its view


def photographs() -> list[Image.Image]:
    """Those of `PHOTOS` that are installed, RGB."""
    found = []
    for package, names in PHOTOS.items():
        spec = find_spec(package)
        for folder in [] if spec is None else spec.submodule_search_locations or []:
            paths = [Path(folder, FOLDERS[package], name) for name in names]
            found += [Image.open(path).convert("RGB") for path in paths if path.exists()]
    return found


def write_jpegs(folder: Path, count: int, quality: int, photos: list[Image.Image]) -> list[Path]:
    """`count` JPEGs of 500 x 375 cut from `photos` in turn, the same for the same arguments."""
    random = np.random.Generator(np.random.PCG64(0))
    paths = []
    for number in range(count):
        photo = photos[number % len(photos)]
        share = random.uniform(0.6, 1.0) * min(photo.width / 4, photo.height / 3)
        width, height = int(4 * share), int(3 * share)
        left, top = (int(random.integers(room + 1)) for room in (photo.width - width, photo.height - height))
        paths.append(folder / f"{number:04}.jpg")
        small = photo.resize((500, 375), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        small.save(paths[-1], quality=quality)
    return paths


def ours(paths: list[Path], size: int, magnitude: float) -> Path_:
    """What a worker of `effnet.data` runs; an epoch further for every round over the files."""
    pixels = FilePixels(paths=tuple(paths))
    source = labelled("photos", pixels, [path.name for path in paths], [i % 2 for i in range(len(paths))], ("a", "b"))
    epochs = [
        Views(
            source=source,
            preprocess=Preprocess(size=size, resize=size),
            train=True,
            crop="inception",
            least_area=AREA[0],
            policy="randaugment",
            magnitude=magnitude,
            seed=0,
            epoch=epoch,
            cache=Cache(0),
        )
        for epoch in range(64)
    ]
    return lambda number: epochs[number // len(paths) % 64](number % len(paths))


def timm(paths: list[Path], size: int, magnitude: float) -> Path_:
    """timm's own training pipeline, uint8 out (`use_prefetcher`), without colour jitter."""
    from timm.data import create_transform

    policy = f"rand-m{magnitude:g}-n2" if magnitude else None
    transform = create_transform(
        size, is_training=True, use_prefetcher=True, auto_augment=policy, color_jitter=None, interpolation="bicubic"
    )
    return lambda number: transform(Image.open(paths[number % len(paths)]).convert("RGB"))


def torchvision(paths: list[Path], size: int, magnitude: float) -> Path_:
    """torchvision's v2 transforms on Pillow images, uint8 out."""
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(size, AREA, interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()]
    steps += [v2.RandAugment(2, int(magnitude))] if magnitude else []
    transform = v2.Compose([*steps, v2.PILToTensor()])
    return lambda number: transform(Image.open(paths[number % len(paths)]).convert("RGB"))


@contextlib.contextmanager
def without(*, compiler: bool = False, simplejpeg: bool = False) -> Iterator[None]:
    """Runs as if one or both were not installed."""
    with contextlib.ExitStack() as stack:
        if compiler:
            stack.enter_context(mock.patch.dict(os.environ, EFFNET_NATIVE="0"))
        if simplejpeg:
            stack.enter_context(mock.patch.object(images, "_simplejpeg", lambda: None))
        yield


def variants(paths: list[Path], size: int) -> dict[str, tuple[Path_, dict[str, bool]]]:
    """Name -> (path of one image, what is taken away while it runs)."""
    found: dict[str, tuple[Path_, dict[str, bool]]] = {}
    for suffix, magnitude in (("", 0.0), (" + RandAugment(2, 9)", 9.0)):
        path = ours(paths, size, magnitude)
        found["effnet" + suffix] = path, {}
        found["effnet, Pillow decodes" + suffix] = path, {"simplejpeg": True}
        found["effnet, Pillow only" + suffix] = path, {"simplejpeg": True, "compiler": True}
        with contextlib.suppress(ImportError):
            from benchmarks.peers.compare import torchvision_operators

            _OPERATORS.append(torchvision_operators()) if not _OPERATORS else None
            found["timm" + suffix] = timm(paths, size, magnitude), {}
            found["torchvision" + suffix] = torchvision(paths, size, magnitude), {}
    return found


_OPERATORS: list[Any] = []  # defined once, and kept


def seconds(path: Path_, taken: dict[str, bool], first: int, count: int) -> float:
    """CPU seconds of this process per image."""
    with without(**taken):
        start = time.process_time()
        for number in range(first, first + count):
            path(number)
        return (time.process_time() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--only", default="", help="variants whose name begins so")
    parser.add_argument("--photos", type=Path, help="a folder of photographs to cut from instead")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    native.picture_library()  # compiled before anything is timed
    photos = photographs()
    if options.photos:
        photos = [Image.open(path).convert("RGB") for path in images.image_files(options.photos)]
    if not photos:
        sys.exit("no photographs: install scikit-image or scikit-learn, or name a folder with --photos")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder), options.images, options.quality, photos)
        kilobytes = statistics.mean(path.stat().st_size for path in paths) / 1000
        chosen = {name: one for name, one in variants(paths, options.size).items() if name.startswith(options.only)}
        taken_s: dict[str, list[float]] = {name: [] for name in chosen}
        for number in range(-1, options.rounds):  # the first round is warm-up
            for name, (path, taken) in list(chosen.items())[:: 1 if number % 2 else -1]:
                each = seconds(path, taken, (number + 1) * len(paths), len(paths))
                taken_s[name] += [each] if number >= 0 else []
        if options.profile:
            path, taken = next(iter(chosen.values()))
            with cProfile.Profile() as profile:
                seconds(path, taken, 0, len(paths))
            pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    rows = [row(name, each) for name, each in taken_s.items()]
    print(f"{len(paths)} JPEGs of 500 x 375, {kilobytes:.0f} KB on average, to {options.size} px; one thread, CPU time")
    print(f"{'':48} {'images/s':>9} {'us':>7} {'lowest..highest images/s':>25}")
    for one in rows:
        low, high = one["spread"]
        print(f"{one['name']:48} {one['images_per_s']:9.0f} {one['us']:7.0f} {low:15.0f}..{high:.0f}")
    environment = {"python": platform.python_version(), "numpy": np.__version__, "pillow": Image.__version__}
    environment |= {"native": native.picture_library() is not None, "simplejpeg": find_spec("simplejpeg") is not None}
    environment |= {"load": round(os.getloadavg()[0], 2), "kilobytes": round(kilobytes, 1)}
    said = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    print(json.dumps({"options": said, "environment": environment, "rows": rows}))


def row(name: str, each: list[float]) -> dict[str, Any]:
    rates = [1 / value for value in each]
    return {
        "name": name,
        "images_per_s": round(statistics.median(rates), 1),
        "us": round(1e6 * statistics.median(each), 1),
        "spread": [round(min(rates), 1), round(max(rates), 1)],
    }


if __name__ == "__main__":
    main()

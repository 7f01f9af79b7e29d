"""What all tests share: optional packages, made images, and the rule that no test draws from a global generator.

Warnings are errors (pyproject.toml). Random state is passed in; a test that moves numpy's or Python's global generator
fails, because its result would depend on which tests ran before it. Torch's initialisers cannot do without their global
generator, so it starts every test from the same seed and is put back afterwards.
"""

import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import hypothesis
import numpy as np
import pytest
from PIL import Image

hypothesis.settings.register_profile("effnet", derandomize=True, deadline=None, database=None, max_examples=50)
hypothesis.settings.load_profile("effnet")


def need(package: str) -> ModuleType:
    """Imports an optional package, or skips the test with a message that names it; where CI is set, it fails."""
    try:
        return importlib.import_module(package)
    except ImportError:
        missing(f"the optional package {package!r} is not installed")


def missing(message: str) -> NoReturn:
    """Skips the test because of something that this machine lacks; where CI is set, it fails."""
    if os.environ.get("CI"):
        pytest.fail(f"{message}, and CI must have it")
    pytest.skip(message)


@pytest.fixture(autouse=True)
def _no_global_randomness() -> Iterator[None]:
    torch = sys.modules.get("torch")
    torch_state = torch.get_rng_state() if torch else None
    if torch:
        torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1:3]
    yield
    if torch:
        torch.set_rng_state(torch_state)
    after = random.getstate(), np.random.get_state()[1:3]
    assert before[0] == after[0], "this test drew from Python's global generator: pass a random.Random"
    assert before[1][1] == after[1][1], "this test drew from numpy's global generator: pass a np.random.Generator"
    assert (before[1][0] == after[1][0]).all(), "this test seeded numpy's global generator: pass a np.random.Generator"


@pytest.fixture
def _global_generator_put_back() -> Iterator[None]:
    """For tests of a package that draws from Python's global generator."""
    before = random.getstate()
    yield
    random.setstate(before)


def picture(seed: int, height: int = 24, width: int = 20) -> np.ndarray:
    """A smooth random picture, uint8 (height, width, 3): 4 x 4 noise scaled up, which JPEG hardly changes."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def write_images(root: Path, counts: Mapping[str, int], *, seed: int = 0, suffix: str = ".png") -> Path:
    """Makes `root/FOLDER/000.png ...` for every folder and count; every picture of the tree is another one."""
    number = seed * 10_000
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.fromarray(picture(number)).save(root / folder / f"{index:03d}{suffix}")
            number += 1
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[[Mapping[str, int]], Path]:
    """Makes a data set under `tmp_path`: `image_folder({"train/cat": 3, "train/dog": 2})` is its root."""
    return lambda counts: write_images(tmp_path / "data", counts)

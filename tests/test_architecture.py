"""The arrows of docs/system-map.md, held by force: imports point down only, and the facts need no torch."""

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "effnet"

# Modules in order: each may import only what stands before it. Floors are separated by where torch may come in.
SCALING = ["scaling", "fitting", "coefficients"]
FACTS = ["value", "files", "words", "spec", "families", "cost", "latency", "published", *SCALING, "presets", "recipes"]
MATTER = [
    "native",
    "ops",
    "layers",
    "network",
    "factory",
    "checkpoint",
    "weight_files",
    "dialects",
    "hub",
    "pixels",
    "images",
    "zoo",
    "augment",
]
SAMPLES = ["samples", "shards", "inputs", "named", "sources", "data", "optim"]
MOTION = [
    "cluster",
    "plan",
    "export",
    "engine",
    "predict",
    "prediction_files",
    "predict_ray",
    "predict_job",
    "evaluate",
    "journal",
    "state",
    "train",
    "proxy",
    "explain",
    "faithfulness",
    "doctor",
    "runs",
    "report",
    "backends",
    "bench",
    "operators",
    "deploy",
    "plots",
    "heat_map",
    "search",
    "serve",
]
COMMANDS = [f"{verb}_command" for verb in ("scale", "search", "predict", "serve", "bench", "export")]
DOOR = ["arguments", "display", *COMMANDS, "cli", "__main__"]
ORDER = [*FACTS, *MATTER, *SAMPLES, *MOTION, *DOOR]


@functools.cache
def _modules() -> dict[str, list[ast.Module]]:
    """The parsed files of each module; a package counts as one."""
    found: dict[str, list[ast.Module]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(ast.parse(path.read_text()))
    return found


def _imports(trees: list[ast.Module]) -> set[tuple[str, ...]]:
    """What the files import, as paths of names, wherever in the file the import stands; not under TYPE_CHECKING."""
    found: set[tuple[str, ...]] = set()
    for tree in trees:
        checked_only = {id(n) for test in ast.walk(tree) if _is_type_checking(test) for n in ast.walk(test)}
        for node in ast.walk(tree):
            if id(node) in checked_only:
                continue
            if isinstance(node, ast.ImportFrom) and node.module:
                base = tuple(node.module.split("."))
                found |= {(*base, alias.name) for alias in node.names} if len(base) == 1 else {base}
            elif isinstance(node, ast.Import):
                found |= {tuple(alias.name.split(".")) for alias in node.names}
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_every_module_has_its_place() -> None:
    assert set(_modules()) <= set(ORDER), "a new module needs a place in ORDER and in docs/system-map.md"
    assert set(ORDER) <= set(_modules()), "ORDER names a module that is gone"


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_down(name: str) -> None:
    own = {path[1] for path in _imports(_modules()[name]) if path[0] == "effnet"}
    assert own <= {*ORDER[: ORDER.index(name)], name, "__version__"}


@pytest.mark.parametrize("name", FACTS)
def test_facts_import_nothing_but_numpy_and_the_standard_library(name: str) -> None:
    outside = {path[0] for path in _imports(_modules()[name])}
    assert outside - {"effnet"} <= {*sys.stdlib_module_names, "numpy"}


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_facts_import_with_torch_blocked_in_under_150_ms() -> None:
    """CPU time beyond that of an empty process, the best of three: the import, not the load of the machine."""
    code = """
import sys, time, json
sys.modules["torch"] = None
start = time.process_time()
import effnet.spec, effnet.families, effnet.cost, effnet.recipes
effnet.cost.cost(effnet.families.get("efficientnet_b0"))
print(json.dumps(time.process_time() - start))
"""
    assert min(json.loads(_python(code)) for _ in range(3)) < 0.150


def test_importing_the_package_costs_no_more_than_torch() -> None:
    """`import effnet` takes at most 1.1 times `import torch` (CPU time, the best of three each)."""

    def seconds(module: str) -> float:
        code = f"import time; start = time.process_time(); import {module}; print(time.process_time() - start)"
        return min(float(_python(code)) for _ in range(3))

    assert seconds("effnet") <= 1.1 * seconds("torch")


def test_torchvision_is_absent_and_unmentioned() -> None:
    assert _python("import importlib.util; print(importlib.util.find_spec('torchvision'))").strip() == "None"
    for name, trees in _modules().items():
        assert not {path[0] for path in _imports(trees)} & {"torchvision", "timm", "pytorch_grad_cam"}, name


def test_no_file_is_two_ideas() -> None:
    """Files over 600 lines have outgrown their question."""
    sizes = {path.name: path.read_text().count("\n") for path in PACKAGE.rglob("*.py")}
    assert {name: size for name, size in sizes.items() if size > 600} == {}

"""The arrows of docs/system-map.md, held by force: imports point down only, and the facts need no torch."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "effnet"

# Modules in order: each may import only what stands before it. Floors are separated by where torch may come in.
FACTS = ["value", "spec", "families", "cost", "recipes"]
MATTER = "ops layers network checkpoint dialects images zoo augment samples shards named sources data optim".split()
MOTION = ["plan", "evaluate", "train", "explain", "predict", "doctor", "figures", "report"]
DOOR = ["display", "cli", "__main__"]
ORDER = [*FACTS, *MATTER, *MOTION, *DOOR]


def _modules() -> dict[str, ast.Module]:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text()) for path in files}


def _imports(tree: ast.Module) -> set[str]:
    """The modules of this package that a file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "effnet":
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {part[1] for part in parts if part[0] == "effnet" and len(part) > 1}
    return found


def test_every_module_has_its_place() -> None:
    assert set(_modules()) <= set(ORDER), "a new module needs a place in ORDER and in docs/system-map.md"
    assert set(ORDER) <= set(_modules()), "ORDER names a module that is gone"


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_down(name: str) -> None:
    tree = _modules()[name]
    allowed = set(ORDER[: ORDER.index(name)]) | {"__version__"}
    assert _imports(tree) <= allowed


@pytest.mark.parametrize("name", FACTS)
def test_facts_never_mention_torch(name: str) -> None:
    outside = {
        alias.name.split(".")[0]
        for node in ast.walk(_modules()[name])
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        node.module.split(".")[0]
        for node in ast.walk(_modules()[name])
        if isinstance(node, ast.ImportFrom) and node.module
    }
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
    for name, tree in _modules().items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in ("torchvision", "timm", "pytorch_grad_cam") for n in names), name


def test_no_file_is_two_ideas() -> None:
    """Files over 600 lines have outgrown their question."""
    sizes = {path.name: path.read_text().count("\n") for path in PACKAGE.rglob("*.py")}
    assert {name: size for name, size in sizes.items() if size > 600} == {}

"""Which formats can a model be exported to, and which file is of which? A table of targets, one file each.

A target writes a `Deployable` with its `Card` to a path, and opens such a path as a function. Nothing here decides
whether the file may be used: `gate.judge` does, and `deploy` has no way around it.

A new target is a module with `RUNTIME`, `write` and `open_run`, and a row of `TARGETS`.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnet.export.artefact import ArtefactError, Card, Exported
from effnet.network import Model, label_names, last_tap
from effnet.value import UsageError, Value, check_choice

__all__ = ["TARGETS", "Target", "is_artefact", "open_artefact", "planned", "target"]


@dataclass(frozen=True, kw_only=True)
class Target(Value):
    """A format: the `module` of this package that knows it, the files' `suffix`, and what it can compute in.

    `maps`: whether a file can also give class activation maps, at no cost where nobody asks for them.
    """

    module: str
    suffix: str
    precisions: tuple[str, ...]
    words: str
    maps: bool = False

    def load(self) -> Any:
        """The module: `RUNTIME`, `write(deployable, card, path)`, `open_run(path) -> (card, run)`."""
        return importlib.import_module(f"effnet.export.{self.module}")


TARGETS = {
    "onnx": Target(module="onnx", suffix=".onnx", precisions=("float32",), words="ONNX Runtime and others", maps=True),
    "openvino": Target(
        module="openvino",
        suffix=".xml",
        precisions=("float32", "bfloat16", "int8"),
        words="OpenVINO, .xml and .bin",
        maps=True,
    ),
    "torch": Target(
        module="torch_export", suffix=".pt2", precisions=("float32", "bfloat16"), words="PyTorch's own graph"
    ),
    "aoti": Target(
        module="aoti", suffix=".aoti.pt2", precisions=("float32", "bfloat16"), words="machine code by AOTInductor"
    ),
}


def target(name: str) -> Target:
    """The target of that name. `UsageError` names the others."""
    check_choice("export target", name, TARGETS)
    return TARGETS[name]


def planned(
    model: Model, to: str, precision: str, folder: Path, *, maps: bool = False, **about: Any
) -> tuple[Card, Path]:
    """The card of `model` as a file of the target `to`, and where it goes: `folder`/NAME-PRECISION and the suffix.

    `maps`: with class activation maps. `about`: further fields of the card. `UsageError` for an unknown target, or what
    it cannot do.
    """
    chosen = target(to)
    check_choice(f"precision of {to}", precision, chosen.precisions)
    if maps and not chosen.maps:
        able = ", ".join(name for name, one in TARGETS.items() if one.maps)
        raise UsageError(f"files of {to} hold no class activation maps; {able} can.")
    if maps:
        about |= {"tap": last_tap(model.network), "bias": tuple(model.classifier.bias.detach().tolist())}
    name = model.network.name
    labels, preprocess = label_names(model), model.preprocess
    card = Card(network=name, target=to, precision=precision, labels=labels, preprocess=preprocess, **about)
    return card, folder / f"{name}-{precision}{chosen.suffix}"


def is_artefact(path: str | Path) -> bool:
    """Whether a file of this name would be an exported one."""
    return str(path).endswith(tuple(one.suffix for one in TARGETS.values()))


def open_artefact(path: str | Path, *, turns: bool = False) -> Exported:
    """The engine in an exported file. `ArtefactError` for a file that is not there, damaged, or not ours."""
    path = Path(path)
    if not path.is_file():
        raise ArtefactError(f"there is no file {path}.")
    module = _target_of(path).load()
    card, run = module.open_run(path)
    return Exported(card=card, runtime=module.RUNTIME, run=run, turns=turns)


def _target_of(path: Path) -> Target:
    """By suffix, except that the two kinds of `.pt2` are told apart by what is inside, whatever they are called."""
    if path.suffix == ".pt2":
        return TARGETS["aoti" if TARGETS["aoti"].load().is_compiled(path) else "torch"]
    return next(one for one in TARGETS.values() if one.suffix == path.suffix)

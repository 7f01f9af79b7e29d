"""The best image classifier for a budget: EfficientNet as a value, trained, judged and explained.

>>> import effnet
>>> effnet.cost(effnet.get_network("efficientnet_b0")).macs
385814752

These are the public names, and nothing is imported before one is used (PEP 562): whoever only counts parameters never
waits for torch. Some verbs are named as the module they live in. There both readings hold: `effnet.train` is the
module (`effnet.train.training`), and to call it is to call its function of the same name (`effnet.train(...)`).
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effnet import families, recipes
    from effnet.checkpoint import Checkpoint
    from effnet.coefficients import search_coefficients
    from effnet.cost import Budget, Cost, cost, costs
    from effnet.data import open_data
    from effnet.evaluate import Evaluation, evaluate
    from effnet.explain import Explanation, explain
    from effnet.families import get as get_network
    from effnet.families import names as network_names
    from effnet.fitting import fit
    from effnet.network import Model, build, replace_head
    from effnet.predict import Prediction, predict
    from effnet.recipes import Phase, Recipe
    from effnet.recipes import get as get_recipe
    from effnet.report import report
    from effnet.scaling import Coefficients, scale
    from effnet.spec import Head, Network, Norm, Preprocess, Rounding, Stage, Stem
    from effnet.train import Interrupted, train
    from effnet.value import UsageError
    from effnet.zoo import create_model, list_models, load_model

    __version__: str

__all__ = [
    "Budget", "Checkpoint", "Coefficients", "Cost", "Evaluation", "Explanation", "Head", "Interrupted", "Model",
    "Network", "Norm", "Phase", "Prediction", "Preprocess", "Recipe", "Rounding", "Stage", "Stem", "UsageError",
    "__version__", "build", "cost", "costs", "create_model", "evaluate", "explain", "families", "fit",
    "get_network", "get_recipe", "list_models", "load_model", "network_names", "open_data", "predict", "recipes",
    "replace_head", "report", "scale", "search_coefficients", "train",
]  # fmt: skip

# public name -> its module, or module:name where the name is another one there
_HOMES = {
    **dict.fromkeys(("Head", "Network", "Norm", "Preprocess", "Rounding", "Stage", "Stem"), "spec"),
    **dict.fromkeys(("Budget", "Cost", "costs"), "cost"),
    **dict.fromkeys(("Model", "build", "replace_head"), "network"),
    **dict.fromkeys(("create_model", "list_models", "load_model"), "zoo"),
    **dict.fromkeys(("Phase", "Recipe"), "recipes"),
    **dict.fromkeys(("Coefficients", "scale"), "scaling"),
    "UsageError": "value",
    "fit": "fitting",
    "search_coefficients": "coefficients",
    "Checkpoint": "checkpoint",
    "Evaluation": "evaluate",
    "Explanation": "explain",
    "Interrupted": "train",
    "Prediction": "predict",
    "open_data": "data",
    "get_network": "families:get",
    "network_names": "families:names",
    "get_recipe": "recipes:get",
}
_VERBS = ("cost", "evaluate", "explain", "predict", "report", "train")
_MODULES = (*_VERBS, "families", "recipes")


def _public(name: str) -> Any:
    """What `effnet.NAME` is; `AttributeError` for a name that is not public."""
    if name == "__version__":
        from importlib.metadata import version

        return version("effnet")
    if name in _MODULES:
        return importlib.import_module(f"effnet.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'effnet' has no attribute {name!r}")
    module, _, inside = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"effnet.{module}"), inside or name)


if not TYPE_CHECKING:  # a type checker shall know the names above, and no others
    __getattr__ = _public


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Verb(ModuleType):
    """A module that can be called as its function of the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """This package: a verb's module becomes callable when the import system hangs it here, whoever imports it first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

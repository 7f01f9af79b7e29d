"""How is a user's own module scaled? A function f(depth, width, resolution) -> nn.Module, costed without being run.

The module is made and called on the meta device: nothing is allocated or computed, and what PyTorch would do is
counted. `Factory` is a `scaling.Baseline`, so `scale`, `fit` and the search for coefficients take it like a `Network`.

`depth` and `width` are factors (1.0 is the baseline), `resolution` is the input's side in pixels; the default of that
parameter is the baseline's resolution. The function does its own rounding.

What is counted (as in `cost.py`): macs and activations of every convolution and matrix product that the dispatcher
sees, for one image in evaluation mode, by PyTorch's own formulas; trainable params; buffers as norm_statistics; what
autograd keeps of one image in training mode, masks of dropout too. Operators without a formula count as nothing.
"""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from effnet.cost import training_bytes
from effnet.value import UsageError, Value, check_range, nearest

Function = Callable[..., nn.Module]
DEFAULT_PX = 224
PER_DOUBLING = 32  # candidates on the way to twice a factor: the function's own steps are not known


@dataclass(frozen=True, kw_only=True)
class Made(Value):
    """A scaled module as a value: which function, with which arguments. `build()` makes it for real."""

    name: str
    depth: float
    width: float
    resolution: int
    factory: "Factory"

    def build(self) -> nn.Module:
        """The module, on the default device."""
        return self.factory.module(self.depth, self.width, self.resolution)

    def to_dict(self) -> dict[str, Any]:
        """The arguments; a function is no JSON."""
        return {name: getattr(self, name) for name in ("name", "depth", "width", "resolution")}


@dataclass(frozen=True, kw_only=True)
class Factory:
    """A function that makes modules, as a baseline. Raises `UsageError` where it ignores an argument.

    `training_memory`: count what training keeps too, which takes three times as long and is needed for a limit on it.
    """

    function: Function
    name: str = ""
    resolution: int = 0
    in_channels: int = 3
    training_memory: bool = False
    known: dict[tuple[float, float, int], dict[str, int]] = field(default_factory=dict, repr=False, compare=False)
    exact = False
    slack = 2.0

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise UsageError(
                f"a factory is a function f(depth, width, resolution) -> nn.Module, not {self.function!r}."
            )
        named = self.name or getattr(self.function, "__name__", "factory")
        object.__setattr__(self, "name", named)
        object.__setattr__(self, "resolution", self.resolution or _default_px(self.function))
        check_range("the factory's resolution", self.resolution, 1)
        base = self.spent(1.0, 1.0, self.resolution)
        for argument, changed in (
            ("depth", self.spent(2.0, 1.0, self.resolution)),
            ("width", self.spent(1.0, 2.0, self.resolution)),
            ("resolution", self.spent(1.0, 1.0, 2 * self.resolution)),
        ):
            if changed["macs"] == base["macs"]:
                raise UsageError(
                    f"the factory {named} ignores {argument}: twice as much of it costs the same {base['macs']:,} "
                    "multiply-adds."
                )

    @property
    def smallest_px(self) -> int:
        """A quarter of the baseline's: what else a module may need is not known."""
        return max(8, self.resolution // 4)

    def least(self, dimension: str) -> float:
        """No factor is tried below this one."""
        return self.smallest_px / self.resolution if dimension == "resolution" else 1 / 16

    def breaks(self, dimension: str, low: float, high: float) -> np.ndarray:
        """Factors in equal ratios."""
        return np.exp2(np.linspace(*np.log2([low, high]), max(2, int(PER_DOUBLING * np.log2(high / low)) + 1)))

    def at(self, depth: float, width: float, resolution: int) -> Made:
        """The arguments of a scaled module."""
        name = f"{self.name}-d{depth:.3g}-w{width:.3g}-r{resolution}"
        return Made(name=name, depth=float(depth), width=float(width), resolution=int(resolution), factory=self)

    def key(self, depth: float, width: float, resolution: int) -> str:
        """The same for factors that give tensors of the same shapes and the same cost."""
        with torch.device("meta"):
            state = self.module(depth, width, resolution).state_dict()
        shapes = sorted((name, tuple(tensor.shape)) for name, tensor in state.items())
        told = (shapes, sorted(self.spent(depth, width, resolution).items()), int(resolution))
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def costs(self, depth: Any, width: Any, resolution: Any, batch: int) -> dict[str, np.ndarray]:
        """The counts of every (broadcast) triple, one module after another."""
        places = np.broadcast(*(np.asarray(value) for value in (depth, width, resolution)))
        rows = [self.spent(float(d), float(w), int(r)) for d, w, r in places]
        if self.training_memory:
            rows = [row | {"training_bytes": int(training_bytes(row, batch))} for row in rows]
        return {name: np.array([row[name] for row in rows]).reshape(places.shape) for name in rows[0]}

    def module(self, depth: float, width: float, resolution: int) -> nn.Module:
        """What the function makes of these arguments. Raises `UsageError` when it fails or makes something else."""
        where = f"{self.name}(depth={depth:g}, width={width:g}, resolution={resolution})"
        try:
            made = self.function(depth=depth, width=width, resolution=resolution)
        except Exception as error:
            raise UsageError(f"{where} failed: {type(error).__name__}: {error}") from error
        if not isinstance(made, nn.Module):
            raise UsageError(f"{where} gave {type(made).__name__} {made!r:.60}; it must give an nn.Module.")
        return made

    def spent(self, depth: float, width: float, resolution: int) -> dict[str, int]:
        """The counts of one module; see the top of this file."""
        place = (float(depth), float(width), int(resolution))
        if place not in self.known:
            with torch.device("meta"):
                module = self.module(*place)
                try:
                    self.known[place] = counts(module, self.in_channels, place[2], training=self.training_memory)
                except (RuntimeError, TypeError, ValueError) as error:
                    raise UsageError(
                        f"{self.name}(depth={depth:g}, width={width:g}) cannot take a (1, {self.in_channels}, "
                        f"{resolution}, {resolution}) image on the meta device: {error}"
                    ) from error
        return self.known[place]


def counts(module: nn.Module, in_channels: int, size: int, *, training: bool = False) -> dict[str, int]:
    """What `module` (on the meta device) costs for one (in_channels, size, size) image, by the names of `cost.costs`.

    `training`: saved_elements too.

    >>> with torch.device("meta"):
    ...     counts(nn.Conv2d(3, 8, 3, padding=1), 3, 10)["macs"]  # 3 * 3 * 3 * 8 * 10 * 10
    21600
    """

    def images(count: int) -> Tensor:
        return torch.empty(count, in_channels, size, size, device="meta")

    module.eval()
    with torch.no_grad(), _Products() as products:
        module(images(1))
    params = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in module.parameters()) - params
    statistics = sum(buffer.numel() for buffer in module.buffers() if buffer.is_floating_point())
    found = {
        "params": params,
        "norm_statistics": statistics,
        "macs": products.flops // 2,
        "activations": products.elements,
        "weight_bytes": 4 * (params + frozen + statistics),
    }
    if training:
        # batch norm also keeps two numbers per channel, however many images: the difference leaves them out
        module.train()
        found["saved_elements"] = _kept(module, images(3)) - _kept(module, images(2))
    return found


class _Products(TorchDispatchMode):
    """Counts convolutions and matrix products: their FLOPs (2 a multiply-add) and the elements that they put out."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
            self.elements += out.numel() if isinstance(out, Tensor) else out[0].numel()
        return out


def _kept(module: nn.Module, images: Tensor) -> int:
    """Elements (4 bytes) that autograd keeps besides the parameters, each storage once."""
    own = {parameter.untyped_storage()._cdata for parameter in (*module.parameters(), *module.buffers())}
    storages: dict[int, Tensor] = {}  # the tensor is held, or its storage's address could be given to another one

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(images)
    del out
    return sum(tensor.untyped_storage().nbytes() // 4 for at, tensor in storages.items() if at not in own)


def _default_px(function: Function) -> int:
    """The default of the parameter `resolution`; 224 where it has none."""
    try:
        default = inspect.signature(function).parameters["resolution"].default
    except (KeyError, TypeError, ValueError):
        return DEFAULT_PX
    return default if isinstance(default, int) else DEFAULT_PX


def load(spec: str, **options: Any) -> Factory:
    """The factory that `module.py:function` names, with the fields of `Factory`. The file is run. `UsageError`."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"there is no file {file} for the factory {spec}; a factory is module.py:function.")
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look their module up
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if name not in functions:
        raise UsageError(f"{path} has no function {name!r}; it has {', '.join(functions)}.{nearest(name, functions)}")
    return Factory(function=getattr(module, name), name=name, **options)

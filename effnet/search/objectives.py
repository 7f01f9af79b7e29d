"""What is a better network? An expression over its quantities, or several of them and the front between them.

`Objective("acc * (macs/60M)^-0.07")` is MnasNet's soft reward; `acc * max(1, macs/60M)^-1` its hard one; `acc *
(step_ms/80)^-0.07 * (params/20M)^-0.05` EfficientNetV2's. The text is parsed, never run: numbers (with k, M, G, T),
quantities, + - * / ^, parentheses, min, max, log.

Everything below takes gains: numbers of which more is better. An objective to be minimised gives its value negated.

Sources: Tan et al. 2019 (MnasNet, eq. 2 and 3); Tan & Le 2021, section 3.3; Deb et al. 2002 (NSGA-II) for sorting and
crowding; hypervolume by slicing into dimensions, as Zitzler & Thiele 1998 define it.
"""

import ast
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from effnet.value import UsageError, Value, check_choice, check_range, nearest

if TYPE_CHECKING:
    import numpy as np

# quantity: what it is; more of `acc` is better, less of all others
QUANTITIES = {
    "acc": "accuracy on the validation images, a share of 1",
    "macs": "multiply-adds of one image",
    "params": "trainable parameters",
    "activations": "output elements of all convolutions for one image",
    "weight_bytes": "bytes of the weights as float32",
    "latency_ms": "milliseconds of a forward pass here, predicted from the table of `effnet bench --table`",
    "step_ms": "milliseconds of a training step here, measured",
}
FREE = ("macs", "params", "activations", "weight_bytes", "latency_ms")  # known exactly before any training

_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_NUMBER = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)([kMGT])\b")
_GOAL = re.compile(r"(?:(min|max)\s+(?!\())?(.*)", re.DOTALL)  # `min(` is the function
_BINARY: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {"min": min, "max": max, "log": math.log}


@dataclass(frozen=True)
class Objective(Value):
    """An expression to be maximised, or minimised where it begins with `min`, or is a lone cost.

    `UsageError` for a text that is no such expression, or names an unknown quantity.

    >>> soft = Objective("acc * (macs/60M)^-0.07")
    >>> round(soft({"acc": 0.9, "macs": 120e6}), 4), sorted(soft.quantities)
    (0.8574, ['acc', 'macs'])
    >>> Objective("macs").goal, Objective("max 1/macs").goal
    ('min', 'max')
    """

    text: str

    def __post_init__(self) -> None:
        _ = self._tree, self.quantities
        if not self.quantities:
            raise UsageError(f"the objective {self.text!r} names no quantity: {', '.join(QUANTITIES)}.")

    @functools.cached_property
    def _parts(self) -> tuple[str, str]:
        found = _GOAL.fullmatch(self.text.strip())
        assert found is not None
        return found[1] or "", found[2].strip()

    @property
    def goal(self) -> Literal["max", "min"]:
        """Whether more or less is better."""
        word, expression = self._parts
        if word:
            return "max" if word == "max" else "min"
        return "min" if expression in QUANTITIES and expression != "acc" else "max"

    @property
    def expression(self) -> str:
        """The text without its goal."""
        return self._parts[1]

    @functools.cached_property
    def _tree(self) -> ast.expr:
        if len(self.text) > 500:
            raise UsageError(f"the objective has {len(self.text)} letters; 500 must do.")
        text = _NUMBER.sub(lambda found: repr(float(found[1]) * _UNITS[found[2]]), self.expression).replace("^", "**")
        try:
            return ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise UsageError(
                f"the objective {self.text!r} is no expression such as `acc * (macs/60M)^-0.07` or `min latency_ms`."
            ) from None

    @functools.cached_property
    def quantities(self) -> frozenset[str]:
        """The names in it."""
        found: set[str] = set()

        def walk(node: ast.AST) -> None:
            if isinstance(node, ast.Name):
                if node.id not in QUANTITIES:
                    raise UsageError(
                        f"the objective {self.text!r} names {node.id!r}; known quantities: {', '.join(QUANTITIES)}."
                        f"{nearest(node.id, QUANTITIES)}"
                    )
                found.add(node.id)
            elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
                walk(node.left)
                walk(node.right)
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
                walk(node.operand)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args and not node.keywords:
                check_choice(f"function in the objective {self.text!r}", node.func.id, _FUNCTIONS)
                if (node.func.id == "log") != (len(node.args) == 1):
                    raise UsageError(f"in {self.text!r}, log takes one argument, min and max two or more.")
                for argument in node.args:
                    walk(argument)
            elif not (isinstance(node, ast.Constant) and type(node.value) in (int, float)):
                raise UsageError(f"the objective {self.text!r} has a part that is not arithmetic: {ast.unparse(node)}.")

        walk(self._tree)
        return frozenset(found)

    def __call__(self, values: Mapping[str, float]) -> float:
        """Its value. NaN where arithmetic has none (a division by 0, the log of 0, an overflow)."""
        try:
            found = _evaluated(self._tree, values)
        except (ZeroDivisionError, OverflowError, ValueError):
            return math.nan
        return found if isinstance(found, float) else math.nan  # a negative number to a broken power is complex

    def gain(self, values: Mapping[str, float]) -> float:
        """Its value, of which more is better."""
        found = self(values)
        return found if self.goal == "max" else -found


def _evaluated(node: ast.expr, values: Mapping[str, float]) -> Any:
    if isinstance(node, ast.Name):
        return float(values[node.id])
    if isinstance(node, ast.Constant):
        return float(node.value)  # ty: ignore[invalid-argument-type]
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_evaluated(node.left, values), _evaluated(node.right, values))
    if isinstance(node, ast.UnaryOp):
        found = _evaluated(node.operand, values)
        return -found if isinstance(node.op, ast.USub) else found
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return _FUNCTIONS[node.func.id](*(_evaluated(argument, values) for argument in node.args))


def soft(quantity: str, target: float, w: float = -0.07) -> Objective:
    """MnasNet's soft reward ACC * (quantity / target)^w; its w says that twice the cost should buy 5 % of accuracy."""
    check_range("target", target, 1e-12)
    return Objective(f"acc * ({quantity}/{target!r})^{w!r}")


def hard(quantity: str, target: float, w: float = -1.0) -> Objective:
    """MnasNet's hard reward: accuracy up to the target, beyond it ACC * (quantity / target)^w."""
    check_range("target", target, 1e-12)
    return Objective(f"acc * max(1, {quantity}/{target!r})^{w!r}")


def training_aware(step_ms: float, params: float, w: float = -0.07, v: float = -0.05) -> Objective:
    """EfficientNetV2's reward A * S^w * P^v; step time and parameters as shares of what is given (the baseline's)."""
    check_range("step_ms", step_ms, 1e-12)
    check_range("params", params, 1e-12)
    return Objective(f"acc * (step_ms/{step_ms!r})^{w!r} * (params/{params!r})^{v!r}")


# --- several objectives at once -------------------------------------------------------------------------------------


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether gains `a` are nowhere less than `b`, and somewhere more."""
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


def ranks(gains: "Sequence[Sequence[float]] | np.ndarray") -> "np.ndarray":
    """The non-domination rank of every row: 0 on the front, 1 on the front of the rest, and so on (Deb et al. 2002).

    >>> ranks([(1, 3), (2, 2), (1, 2), (0, 0), (2, 2)]).tolist()
    [0, 0, 1, 2, 0]
    """
    import numpy as np

    points = np.asarray(gains, float)
    points = points.reshape(len(points), -1)
    above = np.all(points[:, None] >= points[None], -1) & np.any(points[:, None] > points[None], -1)  # [i, j]: i over j
    found, left, rank = np.full(len(points), -1), np.ones(len(points), bool), 0
    while left.any():
        best = left & ~np.any(above & left[:, None], axis=0)
        found[best], left, rank = rank, left & ~best, rank + 1
    return found


def crowding(gains: "Sequence[Sequence[float]] | np.ndarray") -> "np.ndarray":
    """The crowding distance of every row within its own rank: the ends infinite, twins 0 (Deb et al. 2002).

    Of equal rows only the first has a distance, so that copies cannot crowd out what is rare.

    >>> crowding([(0, 4), (1, 3), (4, 0), (1, 3)]).round(2).tolist()
    [inf, 2.0, inf, 0.0]
    """
    import numpy as np

    points = np.asarray(gains, float)
    points = points.reshape(len(points), -1)
    found, order = np.zeros(len(points)), ranks(points)
    for rank in range(order.max(initial=-1) + 1):
        _, first = np.unique(points[order == rank], axis=0, return_index=True)
        members = np.flatnonzero(order == rank)[np.sort(first)]
        for values in points[members].T:
            line = members[np.argsort(values, kind="stable")]
            spread = values.max() - values.min()
            found[line[[0, -1]]] = math.inf
            if spread > 0 and len(line) > 2:
                at = np.sort(values, kind="stable")
                found[line[1:-1]] += (at[2:] - at[:-2]) / spread
    return found


def ordered(gains: "Sequence[Sequence[float]] | np.ndarray") -> list[int]:
    """The rows from best to worst: by rank, then from lonely to crowded, then as they came. One objective: by gain."""
    order, lonely = ranks(gains), crowding(gains)
    return sorted(range(len(order)), key=lambda index: (order[index], -lonely[index], index))


def hypervolume(gains: "Sequence[Sequence[float]] | np.ndarray", reference: Sequence[float]) -> float:
    """The volume between `reference`, a point that is worse everywhere, and the front; rows not above it count 0.

    >>> hypervolume([(1, 3), (2, 2), (3, 1)], (0, 0))
    6.0
    """
    import numpy as np

    low = np.asarray(reference, float)
    points = np.asarray(gains, float).reshape(-1, len(low)) - low
    points = points[(points > 0).all(1)]
    return _volume(points[ranks(points) == 0] if len(points) else points)


def _volume(points: "np.ndarray") -> float:
    """Slices along the last dimension: thickness times the volume of what reaches so far, in one dimension less."""
    import numpy as np

    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(points.max())
    points = points[np.argsort(-points[:, -1], kind="stable")]
    bottoms = np.append(points[1:, -1], 0.0)
    if points.shape[1] == 2:
        return float((np.maximum.accumulate(points[:, 0]) * (points[:, 1] - bottoms)).sum())
    total = 0.0
    for index, thickness in enumerate(points[:, -1] - bottoms):
        if thickness > 0:
            reach = points[: index + 1, :-1]
            total += float(thickness) * _volume(reach[ranks(reach) == 0])
    return total

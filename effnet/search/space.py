"""Which networks may be chosen? A search space as data: a baseline, and the fields of its parts that may vary.

A `Choice` names a part (`stages.2`, `stem`, `head`, or `` for the network itself) or one field of it
(`stages.2.kernel`), and what may stand there. A candidate is a code: for every choice, the place of its option. Codes
that resolve to the same units are the same network, whatever their digits: `key` says so.

Costs add up over stages, so `Space.costs` counts any number of codes exactly without making a network of each: every
stage is counted once for each combination of its own options with the width and size that it is given.

Sources: Tan et al. 2019 (MnasNet) for the factorised space; Tan & Le 2019, section 4, uses it; Tan & Le 2021, section
3.3, for the training-aware one. Their SkipOp "pooling" is left out: the released code has only identity and none.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from effnet.cost import counts
from effnet.spec import Network, Stage, block, head_units, multiply, resolve, stem_unit
from effnet.value import UsageError, Value, check_choice

if TYPE_CHECKING:
    import numpy as np

Code = tuple[int, ...]
COSTS = ("params", "macs", "activations", "weight_bytes")
ENUMERABLE = 50_000  # spaces up to this size are looked through whole
_SUMS = ("params", "norm_statistics", "macs", "activations")


@dataclass(frozen=True, kw_only=True)
class Choice(Value):
    """One decision. `options`: values of the field that `path` names, or changes {field: value} of the part it names.

    `name` tells apart several choices about one part; by default it is the path.
    """

    path: str
    options: tuple[Any, ...]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.options:
            raise UsageError(f"the choice {self.path!r} has no options; it needs at least one.")
        if not self.name:
            object.__setattr__(self, "name", self.path or "network")
        object.__setattr__(self, "options", tuple(dict(o) if isinstance(o, Mapping) else o for o in self.options))
        for index, option in enumerate(self.options):
            if option in self.options[:index]:
                raise UsageError(f"the choice {self.name!r} has the option {_worded(option)} twice.")

    def changes(self, index: int) -> tuple[str, dict[str, Any]]:
        """The part that option `index` changes, and how."""
        option = self.options[index]
        if isinstance(option, Mapping):
            return self.path, dict(option)
        part, _, field = self.path.rpartition(".")
        return part, {field: option}

    def __hash__(self) -> int:
        return hash((self.path, self.name, len(self.options)))

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(map(_worded, self.options))}"


def _worded(option: Any) -> str:
    if not isinstance(option, Mapping):
        return f"{option:g}" if isinstance(option, float) else str(option)
    return " ".join(f"{name}={_worded(value)}" if name != "op" else str(value) for name, value in option.items())


@dataclass(frozen=True, kw_only=True)
class Space(Value):
    """A baseline and what may vary in it. `UsageError` for a field or a stage that the baseline does not have.

    >>> from effnet.families import get
    >>> space = vary(get("efficientnet_b0"), {"stages.*.kernel": (3, 5), "stages.6.repeats": ("+0", "+1")})
    >>> space.count, space.network((1,) * 8).stages[6].repeats
    (256, 2)
    """

    name: str
    base: Network
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        if not self.choices:
            raise UsageError(f"the space {self.name!r} has no choices; it needs at least one.")
        names = [choice.name for choice in self.choices]
        for index, choice in enumerate(self.choices):
            if choice.name in names[:index]:
                raise UsageError(f"the space {self.name!r} has two choices called {choice.name!r}.")
            for option in range(len(choice.options)):
                self._check(*choice.changes(option))

    def __hash__(self) -> int:
        return hash((self.name, self.base, self.choices))

    def _check(self, path: str, change: Mapping[str, Any]) -> None:
        """Refuses a change that no candidate could have."""
        part = _part(self.base, path)
        known = {field.name: field.type for field in fields(part) if part is not self.base or field.name in _FREE}
        for name, value in change.items():
            check_choice(f"field of {path or 'the network'}", name, known)
            kinds = {bool: bool, int: int, float: (int, float)}.get(known[name], str)
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                now = getattr(part, name)
                raise UsageError(f"{name} of {path or 'the network'} is {now!r}; it cannot be {value!r}.")
        if isinstance(part, Stage):
            self._stage(int(path.partition(".")[2]), change)
        else:
            part.replace(**change)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many options each choice has."""
        return tuple(len(choice.options) for choice in self.choices)

    @property
    def count(self) -> int:
        """How many codes there are; several of them may be the same network."""
        return math.prod(self.sizes)

    def __str__(self) -> str:
        head = f"{self.name}: {self.count:.4g} codes around {self.base.name} at {self.base.resolution} px"
        return "\n".join([head, *(f"  {choice}" for choice in self.choices)])

    # -- codes and networks ------------------------------------------------------------------------------------------

    def check(self, code: Sequence[int]) -> Code:
        """`code` as a tuple; `UsageError` if it is not of this space."""
        code = tuple(int(digit) for digit in code)
        if len(code) != len(self.sizes) or any(not 0 <= d < n for d, n in zip(code, self.sizes, strict=True)):
            raise UsageError(f"{code} is no code of {self.name}: {len(self.sizes)} digits below {self.sizes}.")
        return code

    def network(self, code: Sequence[int]) -> Network:
        """The network of a code. `UsageError` where its parts do not go together."""
        code = self.check(code)
        changes: dict[str, dict[str, Any]] = {}
        for choice, index in zip(self.choices, code, strict=True):
            part, change = choice.changes(index)
            changes.setdefault(part, {}).update(change)
        name = f"{self.name}-{hashlib.sha256(repr((self.base.name, code)).encode()).hexdigest()[:8]}"
        found: dict[str, Any] = {"name": name, "source": f"searched in {self.name} around {self.base.name}"}
        found["stages"] = tuple(
            self._stage(index, changes.get(f"stages.{index}", {})) for index in range(len(self.base.stages))
        )
        for part in ("stem", "head"):
            if part in changes:
                found[part] = getattr(self.base, part).replace(**changes[part])
        found |= changes.get("", {})
        if "resolution" in found:
            found["preprocess"] = self.base.preprocess.with_size(found["resolution"])
        return self.base.replace(**found)

    def _stage(self, index: int, changes: Mapping[str, Any]) -> Stage:
        """A stage with its options; what its operator has no room for is left out, so such codes are one network."""
        values = {field.name: getattr(self.base.stages[index], field.name) for field in fields(Stage)} | dict(changes)
        if values["op"] not in ("mbconv", "fused") or (values["op"], values["expand"]) == ("fused", 1):
            values["se"] = 0.0
        if values["op"] == "separable":
            values["skip"], values["expand"] = False, 1
        elif values["op"] in ("basic", "bottleneck"):
            values["skip"] = True
        return Stage(**values)

    def encode(self, network: Network) -> Code:
        """A code of `network`. `UsageError` if the space does not hold it."""
        digits = []
        for choice in self.choices:
            fits = [index for index in range(len(choice.options)) if _holds(network, *choice.changes(index))]
            digits.append(fits[0] if fits else 0)  # an option that its operator has no room for leaves no trace
        code = tuple(digits)
        if key(self.network(code)) != key(network):
            raise UsageError(f"the space {self.name} does not hold {network.name}: {self._difference(code, network)}.")
        return code

    def _difference(self, code: Code, network: Network) -> str:
        made, other = str(self.network(code)).splitlines()[1:], str(network).splitlines()[1:]
        lines = [(a.strip(), b.strip()) for a, b in zip(other, made, strict=False) if a != b]
        return f"it has `{lines[0][0]}`, the nearest code `{lines[0][1]}`" if lines else "another size or setting"

    # -- drawing -----------------------------------------------------------------------------------------------------

    def sample(self, rng: "np.random.Generator") -> Code:
        """A code, every one as probable as any other."""
        return tuple(int(rng.integers(size)) for size in self.sizes)

    def mutate(self, code: Code, rng: "np.random.Generator", rate: float | None = None) -> Code:
        """`code` with one digit changed, or every digit with probability `rate` (and at least one)."""
        open_ = [index for index, size in enumerate(self.sizes) if size > 1]
        if not open_:
            return code
        chosen = [index for index in open_ if rate is not None and rng.random() < rate]
        digits = list(code)
        for index in chosen or [open_[int(rng.integers(len(open_)))]]:
            digits[index] = (digits[index] + 1 + int(rng.integers(self.sizes[index] - 1))) % self.sizes[index]
        return tuple(digits)

    def cross(self, a: Code, b: Code, rng: "np.random.Generator") -> Code:
        """A child of two codes: every digit from one of them, by a coin."""
        return tuple(y if coin else x for x, y, coin in zip(a, b, rng.integers(2, size=len(a)), strict=True))

    def codes(self) -> Iterator[Code]:
        """All of them, in order."""
        return itertools.product(*map(range, self.sizes))

    # -- costs -------------------------------------------------------------------------------------------------------

    def costs(self, codes: "Sequence[Code] | np.ndarray") -> "dict[str, np.ndarray]":
        """Exact params, macs, activations and weight bytes of many codes, as float64 arrays (integers below 2^53).

        Infinite where parts do not go together (an image below the strides, say). The same counts as `cost.cost`.
        """
        import numpy as np

        table = np.asarray(codes, np.int64).reshape(-1, len(self.choices))
        totals = {name: np.zeros(len(table)) for name in _SUMS}
        state = np.zeros((len(table), 3), np.int64)  # of the map: size, channels; and image size // strides so far
        for part, where in self._parts:
            local = np.zeros(len(table), np.int64)
            for column in where:
                local = local * self.sizes[column] + table[:, column]
            packed = (state[:, 0] * 2**20 + state[:, 1]) * 2**20 + state[:, 2]
            kinds, kind = np.unique(packed, return_inverse=True)
            _, first, inverse = np.unique(local * len(kinds) + kind, return_index=True, return_inverse=True)
            entries = [
                self._entry(part, tuple(table[row, list(where)].tolist()), *state[row].tolist()) for row in first
            ]
            found = np.array([entry[0] for entry in entries])
            for column, name in enumerate(_SUMS):
                totals[name] = totals[name] + found[inverse, column]
            state = np.array([entry[1] for entry in entries])[inverse]
        totals["weight_bytes"] = 4 * (totals["params"] + totals.pop("norm_statistics"))
        return totals

    @functools.cached_property
    def _parts(self) -> list[tuple[str, tuple[int, ...]]]:
        """The parts of the network in order, and the places of the choices that each depends on."""
        owners = [choice.changes(0)[0] for choice in self.choices]
        names = ["stem", *(f"stages.{index}" for index in range(len(self.base.stages))), "head"]
        return [(n, tuple(i for i, o in enumerate(owners) if o == n or (n == "stem" and o == ""))) for n in names]

    @functools.cached_property
    def _known(self) -> dict[tuple[Any, ...], "_Entry"]:
        return {}

    def _entry(self, part: str, digits: Code, size: int, channels: int, room: int) -> "_Entry":
        """The counts of one part, and what it leaves; infinite counts where it cannot be."""
        place = (part, digits, size, channels, room)
        if place not in self._known:
            try:
                self._known[place] = self._counted(*place)
            except UsageError:
                self._known[place] = (math.inf,) * len(_SUMS), (1, 1, 1)
        return self._known[place]

    def _counted(self, part: str, digits: Code, size: int, channels: int, room: int) -> "_Entry":
        changes: dict[str, dict[str, Any]] = {}
        for column, digit in zip(dict(self._parts)[part], digits, strict=True):
            owner, change = self.choices[column].changes(digit)
            changes.setdefault(owner, {}).update(change)
        mine = changes.get(part, {})
        if part == "stem":
            stem, whole = self.base.stem.replace(**mine), self.base.replace(**changes.get("", {}))
            unit = stem_unit(stem, whole.resolution)
            units, state = [(unit, 1)], (unit.out_size, stem.width, whole.resolution // unit.stride)
        elif part == "head":
            head = self.base.head.replace(**mine)
            units, state = [(unit, 1) for unit in head_units(head, channels, head.width, size)], (1, 1, room)
        else:
            stage = self._stage(int(part.partition(".")[2]), mine)
            first = block(stage, channels, stage.width, stage.stride, size)
            rest = block(stage, stage.width, stage.width, 1, first.out_size)
            units = [(first, 1), (rest, stage.repeats - 1)]
            state = (first.out_size, stage.width, room // stage.stride)
        if state[2] < 1:
            raise UsageError("the image is smaller than the strides.")
        total = dict.fromkeys(_SUMS, 0)
        for unit, times in units:
            for name, value in counts(unit).items():
                total[name] += times * value
        return tuple(float(total[name]) for name in _SUMS), state


_Entry = tuple[tuple[float, ...], tuple[int, int, int]]


def key(network: Network, size: int | None = None) -> str:
    """The same for all networks that compute alike: equal units and settings, whatever stages and names they have."""
    unit_fields = ("op", "in_channels", "mid_channels", "squeeze_channels", "out_channels", "kernel", "stride",
                   "in_size", "shortcut", "drop_path")  # fmt: skip
    units = [[getattr(unit, name) for name in unit_fields] for unit in resolve(network, size)]
    settings = (network.activation, network.norm, network.padding, network.dropout, network.preprocess, network.stem)
    return hashlib.sha256(repr((units, settings)).encode()).hexdigest()[:16]


# --- checks ---------------------------------------------------------------------------------------------------------


def _part(network: Network, path: str) -> Any:
    """The part of a network that a path names."""
    kind, _, index = path.partition(".")
    if kind == "stages":
        known = [str(i) for i in range(len(network.stages))]
        if index not in known:
            raise UsageError(f"{path!r} names no stage of {network.name}: it has stages.0 to stages.{known[-1]}.")
        return network.stages[int(index)]
    if path == "":
        return network
    check_choice("part of a network", path, ("stem", "head", *(f"stages.{i}" for i in range(len(network.stages)))))
    return getattr(network, path)


_FREE = ("resolution", "activation", "padding", "dropout", "drop_path")  # fields of the network itself that may vary


def _holds(network: Network, path: str, change: Mapping[str, Any]) -> bool:
    """Whether a part of the network is as the change would make it."""
    kind, _, index = path.partition(".")
    if kind == "stages" and int(index) >= len(network.stages):
        return False
    part = _part(network, path)
    return all(getattr(part, name) == value for name, value in change.items())


# --- spaces ---------------------------------------------------------------------------------------------------------


def vary(base: Network, options: Mapping[str, Sequence[Any]], name: str = "vary") -> Space:
    """The space in which each field that a path names takes one of the options, by itself.

    `*` in a path stands for every stage: `stages.*.kernel`. Options may be relative to the baseline's value: `"+1"`,
    `"-1"` (of numbers), `"x0.75"` (widths are rounded by the baseline's rule). Options that come out alike are one.

    >>> from effnet.families import get
    >>> print(vary(get("mobilenet_v2"), {"stages.0.repeats": ("-1", "+0", "+1"), "head.width": ("x0.5",)}))
    vary: 2 codes around mobilenet_v2 at 224 px
      stages.0.repeats: 1, 2
      head.width: 640
    """
    choices = []
    for pattern, values in options.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise UsageError(f"{pattern!r} needs a list of options, not {values!r}.")
        for path in _expanded(base, pattern):
            found: list[Any] = []
            for value in values:
                made = _absolute(base, path, value)
                if made not in found:
                    found.append(made)
            choices.append(Choice(path=path, options=tuple(found)))
    return Space(name=name, base=base, choices=tuple(choices))


def _expanded(base: Network, pattern: str) -> list[str]:
    if not pattern.startswith("stages.*"):
        return [pattern]
    return [pattern.replace("*", str(index), 1) for index in range(len(base.stages))]


def _absolute(base: Network, path: str, value: Any) -> Any:
    if not isinstance(value, str) or value[:1] not in ("+", "-", "x"):
        return value
    part, _, field = path.rpartition(".")
    current = getattr(_part(base, part), field, None)
    try:
        number = float(value[1:])
    except ValueError:
        raise UsageError(f"{value!r} is no option for {path}: write a value, +1, -1 or x0.75.") from None
    if not isinstance(current, int | float) or isinstance(current, bool):
        raise UsageError(f"{path} is {current!r}: {value!r} cannot be relative to it.")
    if value[0] == "x":
        made = base.rounding.width(current, number) if field == "width" else type(current)(round(current * number, 6))
    else:
        made = type(current)(current + (number if value[0] == "+" else -number))
    return max(1, made) if field in ("repeats", "width", "kernel") else made


def _per_stage(base: Network, name: str, rows: Mapping[str, tuple[str, Any]]) -> Space:
    """A space whose stages all have the choices `rows`: name -> (field or nothing, options, absolute or relative)."""
    choices = []
    for index in range(len(base.stages)):
        for what, (field, options) in rows.items():
            path = f"stages.{index}.{field}" if field else f"stages.{index}"
            found = dict.fromkeys(_absolute(base, path, option) for option in options) if field else options
            choices.append(Choice(path=path, options=tuple(found), name=f"stages.{index}.{what}"))
    return Space(name=name, base=base, choices=tuple(choices))


_LAYERS = ("repeats", ("-1", "+0", "+1"))


def mnasnet(base: Network) -> Space:
    """MnasNet's factorised space: operator, kernel, SE ratio, skip, filters and layers of every stage (its Fig. 4).

    Its operators in our words: a plain convolution is `fused` with expansion 1, a separable one `mbconv` with
    expansion 1 (so MnasNet-A1's code has it, and SE has a place), then `mbconv` with 3 and 6. Filters and layers are
    relative to `base`, MobileNetV2 in the paper.
    """
    operators = (
        {"op": "fused", "expand": 1}, {"op": "mbconv", "expand": 1}, {"op": "mbconv", "expand": 3},
        {"op": "mbconv", "expand": 6},
    )  # fmt: skip
    rows: dict[str, tuple[str, Any]] = {
        "op": ("", operators),
        "kernel": ("kernel", (3, 5)),
        "se": ("se", (0.0, 0.25)),
        "skip": ("skip", (True, False)),
        "width": ("width", ("x0.75", "x1", "x1.25")),
        "repeats": _LAYERS,
    }
    return _per_stage(base, "mnasnet", rows)


def v1(base: Network) -> Space:
    """EfficientNetV1's use of MnasNet's space (Tan & Le 2019, section 4: "the same search space")."""
    return mnasnet(base).replace(name="v1")


def v2(base: Network) -> Space:
    """EfficientNetV2's training-aware space: MBConv or Fused-MBConv, kernel 3 or 5, expansion 1, 4 or 6, layers.

    Widths are the baseline's, and no skip is dropped (Tan & Le 2021, section 3.3). Not stated there, ours: layers are
    one less, equal or one more than the baseline's; Fused-MBConv is without SE and MBConv with 0.25, as in its result.
    """
    operators = ({"op": "mbconv", "se": 0.25}, {"op": "fused", "se": 0.0})
    rows: dict[str, tuple[str, Any]] = {
        "op": ("", operators),
        "kernel": ("kernel", (3, 5)),
        "expand": ("expand", (1, 4, 6)),
        "repeats": _LAYERS,
    }
    return _per_stage(base, "v2", rows)


# name: how it is made, and the baseline of the paper
SPACES = {"mnasnet": (mnasnet, "mobilenet_v2"), "v1": (v1, "mobilenet_v2"), "v2": (v2, "efficientnet_b4")}


def small(
    base: Network, *, px: int | None = None, width: float = 1.0, depth: float = 1.0, least_map: int | None = None
) -> Network:
    """The baseline made small enough to search with: at `px`, widths and layers times `width` and `depth`.

    With `least_map`: while the last map would be below so many pixels, the earliest stride that is left becomes 1, the
    stem's, then the stages' in order. `UsageError` where that does not suffice.
    """
    made = multiply(base, width=width, depth=depth, resolution=px or base.resolution)
    if least_map is None:
        return made
    strided = [-1, *range(len(made.stages))]
    while made.resolution < least_map * made.stride and strided:
        index = strided.pop(0)
        if index < 0:
            made = made.replace(stem=made.stem.replace(stride=1, pool=0))
        else:
            rows = (s.replace(stride=1) if i == index else s for i, s in enumerate(made.stages))
            made = made.replace(stages=tuple(rows))
    if made.resolution < least_map * made.stride:
        raise UsageError(f"an image of {made.resolution} px is smaller than the least map asked for, {least_map} px.")
    return made

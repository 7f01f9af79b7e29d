"""What do all our frozen values share? Checks with errors that teach, JSON there and back, and changed copies.

A user's mistake is a `UsageError` wherever it is made; the command prints its message on one line.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Self, get_args, get_origin


class UsageError(ValueError):
    """A mistake of the user: the message names the value, what is allowed and the nearest match."""


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of an error message: ` Did you mean 'x'?`, or nothing when no option is close to `name`."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_choice(what: str, value: str, options: Iterable[str]) -> None:
    """Refuses a `value` that is not one of `options`, naming them all."""
    options = list(options)
    if value not in options:
        raise UsageError(f"{what} {value!r} is not one of {', '.join(options)}.{nearest(str(value), options)}")


def check_range(what: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuses a `value` outside [low, high] (NaN included)."""
    if not (low <= value <= high):
        allowed = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise UsageError(f"{what} is {value!r}; it must be {allowed}.")


def whole(value: Any) -> Any:
    """int(value), for a number or a numpy array of them (expansions may be fractional: a bottleneck's 0.25)."""
    return value.astype(int) if hasattr(value, "astype") else int(value)


class Value:
    """JSON and replacement for the frozen dataclasses below: unknown keys are errors, nested values are rebuilt."""

    def replace(self, **changes: Any) -> Self:
        """A changed copy; the original stays true."""
        try:
            return dataclasses.replace(self, **changes)  # ty: ignore[invalid-argument-type]
        except TypeError:
            known = [f.name for f in dataclasses.fields(self)]  # ty: ignore[invalid-argument-type]
            for name in changes:
                check_choice(f"{type(self).__name__} field", name, known)
            raise

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON."""
        return dataclasses.asdict(self)  # ty: ignore[invalid-argument-type]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. `UsageError` for an unknown or missing field."""
        if not isinstance(data, Mapping):
            raise UsageError(f"{cls.__name__} is described by an object of fields, not by {data!r}.")
        known = {f.name: f for f in dataclasses.fields(cls)}  # ty: ignore[invalid-argument-type]
        for name in data:
            check_choice(f"{cls.__name__} field", name, known)
        try:
            return cls(**{name: _rebuild(known[name].type, value) for name, value in data.items()})
        except TypeError as error:
            raise UsageError(f"{cls.__name__} cannot be made from {sorted(data)}: {error}") from None

    def to_json(self) -> str:
        """One JSON document, two-space indent."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. `UsageError` when the text is not JSON or describes something else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"this is not a JSON description of a {cls.__name__}: {error}") from None
        return cls.from_dict(data)


def _rebuild(kind: Any, value: Any) -> Any:
    """Nested dataclasses from dicts, tuples from lists; everything else as it is."""
    if get_origin(kind) is dict:
        return value
    for option in (kind, *get_args(kind)) if isinstance(value, Mapping) else ():
        if isinstance(option, type) and issubclass(option, Value):
            return option.from_dict(value)
    if isinstance(value, list | tuple):
        inner = (get_args(kind) or (None,))[0]
        return tuple(_rebuild(inner, item) for item in value)
    return value

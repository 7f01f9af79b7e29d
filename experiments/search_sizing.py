"""How large is a real search? On paper: EfficientNetV2's, 1,000 networks for 10 epochs of ImageNet-1k, by our costs.

Claim     None: this computes from the cost model what such a search takes, and shows where the bottleneck is. What is
          assumed is an option with a default, and is printed beside what follows from it. Nothing is trained.
Counted   Multiply-adds and activations of --sample networks drawn at random from the space (exactly, `Space.costs`):
          their mean stands for that of all trials. A search that turns to smaller networks takes less.
Assumed   By the paper: 1,000 networks, about 10 epochs, "reduced image size" (which is not said; here 224 px), a space
          around B4. By us, as in docs/training-at-scale.md: 3 forward passes' worth of arithmetic in a training step
          (backward = 2 forward), a GPU of 312 TFLOP/s in bfloat16 of which a step reaches a tenth, 5 ms of one core for
          a picture's decoding and views; 110 kB a picture (ImageNet's training part: 138 GiB), 16 cores a GPU, 2 of
          whatever money a GPU hour. The share decides nearly everything: take it from what `effnet plan` measures on
          your GPU. Beside it stands what moving the activations alone would take: each output of a convolution read
          or written 10 times in a step, at 2 TB/s.
Command   python experiments/search_sizing.py [--gpus 64 --price 2 --px 224 ...]
Time      a second
"""

import argparse
import json
from typing import Any

import numpy as np

from effnet.families import get
from effnet.search.space import SPACES, small

IMAGES, VALIDATION = 1_281_167, 50_000
TRIAL_BYTES = 1_000  # in a study: 512 a trial of a code of nine digits, measured on 2026-11-22 over 40; v2's have 28


def sizing(args: argparse.Namespace) -> dict[str, Any]:
    """What the search takes; times in hours of one GPU unless the name says otherwise."""
    make, usual = SPACES[args.space]
    space = make(small(get(args.baseline or usual), px=args.px))
    rng = np.random.default_rng(0)
    costs = space.costs([space.sample(rng) for _ in range(args.sample)])
    macs, activations = (costs[name][np.isfinite(costs["macs"])] for name in ("macs", "activations"))
    step = 3 * 2 * macs / (args.tflops * 1e12 * args.share)  # seconds of an image; 2 operations a multiply-add
    moving = args.touches * 2 * activations / (args.bandwidth * 1e12)  # 2 bytes each
    step = np.maximum(step, moving)
    seconds = step * IMAGES * args.epochs + step / 3 * VALIDATION
    per_second = float(1 / step.mean())
    cores = per_second * args.picture_ms / 1e3
    kept = min(1.0, args.cores / cores)  # of a GPU's speed, with the cores that it has
    hours = args.trials * seconds.mean() / 3600 / kept
    return {
        "macs": float(macs.mean()),
        "macs_5_95": [float(each) for each in np.quantile(macs, (0.05, 0.95))],
        "activations": float(activations.mean()),
        "images_per_s": per_second * kept,
        "moving_share": float((moving / step).mean()),
        "cores_a_gpu_needs": cores,
        "hours_a_trial": float(hours / args.trials),
        "gpu_hours": float(hours),
        "price": float(hours * args.price),
        "days": float(hours / args.gpus / 24),
        "longest_trial_hours": float(seconds.max() / kept / 3600),  # one trial is not divided
        "network_gb_per_s": args.gpus * per_second * kept * args.picture_kb * 1e3 / 1e9,
        "data_gb": (IMAGES + VALIDATION) * args.picture_kb * 1e3 / 1e9,
        "study_mb": args.trials * TRIAL_BYTES / 1e6,
        "halved_gpu_hours": float(hours * 3 / args.epochs),  # --epochs 1,3,9 --eta 3: 1 + 3/3 + 9/9 epochs a trial
    }


def told(found: dict[str, Any], args: argparse.Namespace) -> str:
    """The answer in words."""
    low, high = found["macs_5_95"]
    bound = "the cores that decode" if found["cores_a_gpu_needs"] > args.cores else "the GPU"
    return "\n".join(
        [
            f"{args.trials} networks of {args.space} at {args.px} px, {args.epochs} epochs of {IMAGES:,} images",
            f"  a network     {found['macs'] / 1e9:.2f} G multiply-adds (5 to 95 %: {low / 1e9:.2f} to "
            f"{high / 1e9:.2f}), {found['activations'] / 1e6:.1f} M activations",
            f"  a GPU         {found['images_per_s']:.0f} images/s, {found['moving_share']:.0%} of it moving maps",
            f"  its pictures  {found['cores_a_gpu_needs']:.1f} cores of {args.cores}: the bottleneck is {bound}",
            f"  a trial       {found['hours_a_trial']:.1f} GPU hours, the longest {found['longest_trial_hours']:.1f}",
            f"  the search    {found['gpu_hours']:,.0f} GPU hours, {found['price']:,.0f} at {args.price:g} an hour",
            f"  on {args.gpus} GPUs    {found['days']:.1f} days",
            f"  network       {found['network_gb_per_s']:.1f} GB/s of pictures, where the machines keep none",
            f"  storage       {found['data_gb']:.0f} GB of pictures, a study of {found['study_mb']:.0f} MB",
            f"  halved 1,3,9  {found['halved_gpu_hours']:,.0f} GPU hours",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="v2", choices=SPACES)
    parser.add_argument("--baseline", help="default: the paper's")
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--sample", type=int, default=2000, help="networks that are counted")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--tflops", type=float, default=312.0, help="of a GPU at its peak, bfloat16")
    parser.add_argument("--bandwidth", type=float, default=2.0, help="of its memory, TB/s")
    parser.add_argument("--share", type=float, default=0.10, help="of that, which a training step reaches")
    parser.add_argument("--touches", type=float, default=10.0, help="of an output, reads and writes in a step")
    parser.add_argument("--cores", type=int, default=16, help="that each GPU has for its pictures")
    parser.add_argument("--picture-ms", type=float, default=5.0, help="of one core, for decoding and views")
    parser.add_argument("--picture-kb", type=float, default=110.0)
    parser.add_argument("--price", type=float, default=2.0, help="of a GPU hour")
    args = parser.parse_args()
    found = sizing(args)
    print(told(found, args))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

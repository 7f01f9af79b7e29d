"""How fast is a training step beside timm's, and how much memory does it take?

For each of the three settings the step of the same network, batch and optimizer (TensorFlow-style RMSProp, momentum
0.9) is timed. Each variant has a process of its own, set up as that library sets up its training (`effnet train` keeps
freed memory, `native.keep_freed_memory`); one works at a time, interleaved A B C C B A, so that a change of the
machine's speed hits all. A visit is a step that does not count and the median of three; a ratio is the median of the
visits' ratios. Images are random, never zero; denormals are flushed for all.

    timm float32            timm 1.0.31 as it comes: eager, contiguous, its RMSpropTF
    timm float32 cl         the same, channels last
    timm bfloat16 cl        channels last under bfloat16 autocast: the best that eager timm can do
    effnet float32          this package, channels last, compiled operators
    effnet bfloat16         the same under autocast: what `effnet train` chooses on a CPU with AMX
    effnet bfloat16 plain   without a compiler (EFFNET_NATIVE=0)

Peak memory is the high-water mark of resident memory of each process.

Run in the peers' environment (README.md beside this file), on a machine that does nothing else, from the root:

    OMP_NUM_THREADS=2 benchmarks/peers/.venv/bin/python -m benchmarks.peers.training [--settings b0-224 ...]

Prints a table and writes results/training_peers.json.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.peers import process
from benchmarks.peers.compare import torchvision_operators
from effnet import families, native
from effnet.network import build
from effnet.optim import RMSProp
from effnet.plan import environment, precision_context

# name: timm's network, ours, size in px, batch, goal (times timm float32)
SETTINGS = {
    "b0-224": ("efficientnet_b0", "efficientnet_b0", 224, 32, 4.0),
    "b0-128": ("efficientnet_b0", "efficientnet_b0", 128, 64, 4.0),
    "v2s-128": ("tf_efficientnetv2_s", "tf_efficientnetv2_s", 128, 32, 3.0),
}
VARIANTS = (
    "timm float32",
    "timm float32 cl",
    "timm bfloat16 cl",
    "effnet float32",
    "effnet bfloat16",
    "effnet bfloat16 plain",
)


STEPS = 3  # of a visit that count

operators = functools.cache(torchvision_operators)  # defined once, and kept


def stepper(variant: str, setting: str) -> Callable[[], float]:
    """A function that makes one training step and returns its loss."""
    theirs, ours, size, batch, _ = SETTINGS[setting]
    peer, bfloat16 = variant.startswith("timm"), "bfloat16" in variant
    torch.manual_seed(0)
    if peer:
        operators()
        import timm
        from timm.optim import RMSpropTF

        model = timm.create_model(theirs, num_classes=1000)
        optimizer = RMSpropTF(model.parameters(), lr=1e-3, momentum=0.9, alpha=0.9, eps=1e-3)
    else:
        model = build(families.get(ours))
        optimizer = RMSProp(model.parameters(), lr=1e-3)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    if variant != "timm float32":
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    model.train()

    def step() -> float:
        os.environ["EFFNET_NATIVE"] = "0" if "plain" in variant else "1"
        with precision_context("bfloat16" if bfloat16 else "float32", "cpu"):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def serve(variant: str, setting: str) -> None:
    """One variant's process: a step for every line, answered by its seconds; at last the most memory it held."""
    if variant.startswith("effnet"):
        native.keep_freed_memory()  # as `effnet train` does
    step = stepper(variant, setting)

    def timed(_: str) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def peak() -> int:
        status = Path("/proc/self/status").read_text()  # not ru_maxrss, which a child inherits from its parent
        return 1024 * int(status.split("VmHWM:")[1].split()[0])

    step(), step()
    process.serve(None, timed, peak)


def measured(setting: str, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per step and peak bytes, by variant: each is visited twice per round, in order and in reverse."""
    command = [sys.executable, "-m", "benchmarks.peers.training", "--settings", setting, "--serve"]
    variants = {name: process.Worker([*command, name]) for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name in (*VARIANTS, *reversed(VARIANTS)):
            variants[name].ask("step")  # finds the caches full of another's data
            seconds[name].append(statistics.median(variants[name].ask("step") for _ in range(STEPS)))
    return seconds, {name: variant.close() for name, variant in variants.items()}


def row(setting: str, rounds: int) -> dict:
    seconds, peaks = measured(setting, rounds)
    base = seconds["timm float32"]
    batch = SETTINGS[setting][3]
    found = {"setting": setting, "goal": SETTINGS[setting][4], "batch": batch, "size_px": SETTINGS[setting][2]}
    found["variants"] = {
        variant: {
            "images_per_s": batch / statistics.median(times),
            "times_timm_float32": statistics.median(b / t for b, t in zip(base, times, strict=True)),
            "peak_bytes": peaks[variant],
        }
        for variant, times in seconds.items()
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--out", type=Path, default=process.ROOT / "results" / "training_peers.json")
    parser.add_argument("--serve", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if args.serve:
        serve(args.serve, args.settings[0])
        return
    rows = []
    for setting in args.settings:
        rows.append(row(setting, args.rounds))
        base = rows[-1]["variants"]["timm float32"]["peak_bytes"]
        print(f"\n{setting}, batch {rows[-1]['batch']}; goal {rows[-1]['goal']:g}x and 0.6x the memory")
        for variant, one in rows[-1]["variants"].items():
            print(
                f"  {variant:24} {one['images_per_s']:7.1f} img/s {one['times_timm_float32']:6.2f} x"
                f"   peak {one['peak_bytes'] / 1e6:6.0f} MB {one['peak_bytes'] / base:5.2f} x",
                flush=True,
            )
    document = {
        "rounds": args.rounds,
        "environment": environment() | {"threads": torch.get_num_threads()},
        "rows": rows,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

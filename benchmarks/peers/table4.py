"""The EfficientNet paper's Table 4 with timm's networks: the same pairs and protocol as `effnet bench --table4`.

Batch 1, one core, 20 runs of each network (10 rounds of two visits, interleaved). timm's models are in eager PyTorch as
they come, contiguous, with random weights and sensible batch norms, in float32 or (--precision bfloat16) with weights
and images in bfloat16. Ratios are of networks within one library; put them beside ours:

    benchmarks/peers/.venv/bin/python -m benchmarks.peers.table4 [--precision bfloat16] [--rounds 10]
    effnet bench --table4 [--precision bfloat16] --json

Run in the peers' environment (README.md beside this file), on a machine that does nothing else, from the root. Prints
a table and writes results/table4_peers_PRECISION.json.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.compare import randomise
from benchmarks.peers.inference import eager, operators
from effnet import families, published
from effnet.bench import controlled, measure

ROOT = Path(__file__).resolve().parents[2]


def work(name: str, size: int, precision: str) -> functools.partial[torch.Tensor]:
    """timm's network of that name, and one image of its size."""
    import timm

    generator = torch.Generator().manual_seed(0)
    model = timm.create_model(name)
    randomise(model, torch.randn(2, 3, size, size, generator=generator), generator)
    image = torch.randn(1, 3, size, size, generator=generator)
    dtype = getattr(torch, precision)
    return functools.partial(eager, model.eval().requires_grad_(False).to(dtype), image.to(dtype))


def pair(one: published.LatencyPair, size: int | None, precision: str, rounds: int) -> dict[str, Any]:
    """A row of Table 4; `size`: another size for all networks (to try it out), else each network's own."""
    names = (one.network, *one.against)
    works = {name: work(name, size or families.get(name).resolution, precision) for name in names}
    with controlled(threads=1):
        found = measure(works, rounds=rounds, calls=1, about={"batch": 1, "precision": precision, "library": "timm"})
    for row in (comparison.upright for comparison in found.comparisons):
        low, high = row.spread
        printed = f"{one.ratio:g}x" if one.ratio else "not printed"
        times = " / ".join(f"{found[name].value:.1f}" for name in (row.second, row.first))
        ratio = f"{row.ratio:.2f}x ({low:.2f} to {high:.2f})"
        print(f"{row.second} / {row.first}: {times} ms, {ratio}, the paper: {printed}", flush=True)
    return {"published": one.to_dict(), "busy": found.busy, **found.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", type=int, help="px, of all networks, to try it out; default: each network's own")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    operators()
    document = {"source": published.V1_TABLE_4}
    document["pairs"] = [pair(one, args.size, args.precision, args.rounds) for one in published.TABLE_4]
    if any(row["busy"] for row in document["pairs"]):
        print("The machine was busy: measure again on a quiet one before you quote these numbers.")
    out = args.out or ROOT / "results" / f"table4_peers_{args.precision}.json"
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

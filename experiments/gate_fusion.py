"""The squeeze-and-excite gate in the projection's weights: is one small multiply quicker than a pass over the map?

Claim     In a block of EfficientNet the gate multiplies the channels of a map (N, mid, H, W), and a 1x1 projection
          reads it. At batch 1 the gate can multiply the input channels of the projection's weights (out, mid) instead:
          W' = W * gate, a multiply of out * mid numbers where H * W * mid were, and no pass over the map.
Protocol  The graph that `effnet export` writes, and the same with the gates of the first --blocks blocks (whose maps
          are largest) or of all moved into the projection: equal in float64 to 1e-9 of the largest logit, else this
          ends. Both in OpenVINO (float32 and bfloat16) and ONNX Runtime (float32), one image, one thread, rounds
          A B B A; the ratio is the median over the rounds. Time is the CPU time of the process, so that waiting for a
          core does not count.
Command   python experiments/gate_fusion.py [--models efficientnet_b0 efficientnetv2_s] [--blocks 3] [--rounds 10]
Time      some five minutes a network on a quiet core
Outcome   Refuted for B0: moving all gates takes OpenVINO 1.16x the time in bfloat16 and 1.08x in float32, ONNX Runtime
          1.06x; the first gate alone 1.05x, the first three 1.08x (2026-11-22, five rounds, on a machine that other
          programs kept busy: only that nothing is gained is claimed, no figure). The weights are no longer constant: a
          runtime cannot lay them out beforehand. So effnet does not do it.

A row of results/gate_fusion.jsonl per model, runtime and precision.
"""

import argparse
import copy
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effnet.bench import ready
from effnet.export import open_artefact, planned, target
from effnet.export.graph import Deployable
from effnet.families import get
from effnet.images import normalise
from effnet.layers import ConvNorm, SqueezeExcite
from effnet.plan import environment

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "gate_fusion.jsonl"
WAYS = (("openvino", "bfloat16"), ("openvino", "float32"), ("onnx", "float32"))
CALLS, EXACT = 5, 1e-9


class GatedProjection(nn.Module):
    """Squeeze-excite and the 1x1 projection behind it (norm folded, no activation): the gate multiplies the weights."""

    def __init__(self, se: SqueezeExcite, projection: ConvNorm) -> None:
        super().__init__()
        self.se, self.projection = se, projection.conv

    def forward(self, x: Tensor) -> Tensor:  # (N, mid, H, W) -> (N, out, H, W)
        squeezed = self.se.activation(linear(x.mean((2, 3)), self.se.reduce))
        gate = torch.sigmoid(linear(squeezed, self.se.expand))  # (N, mid)
        weights = self.projection.weight.flatten(1) * gate[:, None]  # (N, out, mid)
        assert self.projection.bias is not None
        y = weights @ x.flatten(2) + self.projection.bias[:, None]  # (N, out, H * W)
        return y.unflatten(2, x.shape[2:])


def linear(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return nn.functional.linear(x, conv.weight.flatten(1), conv.bias)


def fused(deployable: Deployable, most: int | None) -> Deployable:
    """A copy with the first `most` gates, or all, in the projection behind. Batch norms are folded already."""
    changed = copy.deepcopy(deployable)
    blocks = [block for block in changed.modules() if isinstance(getattr(block, "se", None), SqueezeExcite)]
    for block in blocks[:most]:
        block.project, block.se = GatedProjection(block.se, block.project), nn.Identity()
    assert blocks, "no squeeze-excite in it"
    return changed


def checked(plain: Deployable, other: Deployable) -> float:
    """The largest difference of logits in float64, over the largest logit. Ends the program above `EXACT`.

    In float32 a random network makes 5e-4 of the other order of the same sums, which would hide a small mistake.
    """
    size = plain.size
    views = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (4, size, size, 3), dtype=np.uint8))
    images = normalise(views, plain.model.preprocess)
    with torch.no_grad():
        found = [copy.deepcopy(graph.model).double()(images.double()).numpy() for graph in (plain, other)]
    difference = float(np.abs(found[0] - found[1]).max() / np.abs(found[0]).max())
    if difference > EXACT:
        raise SystemExit(f"the rewritten graph is another function: logits differ by {difference:.1e} of the largest")
    return difference


def opened(deployable: Deployable, to: str, precision: str, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The engine of what `effnet export` would write."""
    folder.mkdir()
    card, path = planned(deployable.model, to, precision, folder)
    target(to).load().write(deployable, card, path)
    return open_artefact(path)


def spent(work: Callable[[], Any]) -> float:
    """Milliseconds of CPU time per call, after one that is not counted."""
    work()
    start = time.process_time()
    for _ in range(CALLS):
        work()
    return 1e3 * (time.process_time() - start) / CALLS


def row(name: str, to: str, precision: str, blocks: int | None, rounds: int) -> dict[str, Any]:
    plain = Deployable(ready(get(name))).eval()
    other = fused(plain, blocks)
    difference = checked(plain, other)
    view = np.random.default_rng(0).integers(0, 256, (1, plain.size, plain.size, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        engines = [opened(one, to, precision, Path(folder, str(n))) for n, one in enumerate((plain, other))]
        before, after = (functools.partial(engine, view) for engine in engines)
        before(), after()
        taken = []
        for _ in range(rounds):
            a, b, c, d = spent(before), spent(after), spent(after), spent(before)
            taken.append(((a + d) / 2, (b + c) / 2))
    ratios = sorted(b / a for a, b in taken)
    return {
        "model": name,
        "size_px": plain.size,
        "runtime": to,
        "precision": precision,
        "blocks": blocks or "all",
        "logit_difference": difference,
        "plain_ms": statistics.median(a for a, _ in taken),
        "fused_ms": statistics.median(b for _, b in taken),
        "fused_over_plain": statistics.median(ratios),
        "range": [ratios[0], ratios[-1]],
        "rounds": rounds,
        "environment": environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["efficientnet_b0", "efficientnetv2_s"])
    parser.add_argument("--blocks", type=int, help="only the first so many with a gate")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        for to, precision in WAYS:
            found = row(name, to, precision, args.blocks, args.rounds)
            low, high = found["range"]
            print(
                f"{name} {to} {precision}: {found['plain_ms']:.1f} -> {found['fused_ms']:.1f} ms of CPU, "
                f"{found['fused_over_plain']:.2f}x ({low:.2f} to {high:.2f})",
                flush=True,
            )
            with args.out.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

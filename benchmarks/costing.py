"""What does costing one candidate take, beside PyTorch's own counter? Prints a table and one JSON line.

Ours: the closed form, one candidate at a time and 20,000 scaled candidates at once. Peer: building the network on the
meta device and running `torch.utils.flop_counter.FlopCounterMode` over it. Interleaved rounds in one process, one
thread; ratios are medians of per-round ratios. All three report the same multiply-adds, or the script fails.

    python benchmarks/costing.py
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from effnet import families
from effnet.cost import cost, costs
from effnet.network import Model
from effnet.plan import environment
from effnet.spec import Network, multiply

BASE = families.get("efficientnet_b0")
MANY = 20_000
ROUNDS = 5


def timed(work: Callable[[], object], times: int) -> float:
    """CPU seconds of one call, over `times` of them."""
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


NAMES = itertools.count()


def fresh() -> Network:
    """B0 under a name never seen, so that no cache answers for the resolver."""
    return multiply(BASE, name=f"candidate {next(NAMES)}")


def counted() -> int:
    """Multiply-adds by running a model of meta tensors under PyTorch's counter."""
    with torch.device("meta"):
        model = Model(BASE).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    return counter.get_total_flops() // 2


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    scale = {"width": rng.uniform(0.3, 3, MANY), "depth": rng.uniform(0.3, 4, MANY)}
    sizes = rng.integers(32, 600, MANY)
    assert cost(BASE).macs == counted() == int(costs(BASE)["macs"]), "the counts disagree"
    rounds = []
    for _ in range(ROUNDS):
        one = timed(lambda: cost(fresh()), 200)
        many = timed(lambda: costs(BASE, resolution=sizes, **scale), 3) / MANY
        peer = timed(counted, 3)
        rounds.append((one, many, peer))
    names = ("closed form, one candidate", f"closed form, {MANY} at once", "FlopCounterMode on the meta device")
    rows = []
    for name, seconds in zip(names, zip(*rounds, strict=True), strict=True):
        ratio = statistics.median(peer / mine for mine, (_, _, peer) in zip(seconds, rounds, strict=True))
        median = statistics.median(seconds)
        rows.append({"what": name, "ms": 1e3 * median, "per_s": 1 / median, "times_the_peer": ratio})
        print(f"{name:38} {1e3 * median:10.5f} ms {1 / median:12.0f} /s {ratio:10.1f} x")
    print(json.dumps({"network": BASE.name, "macs": cost(BASE).macs, "rows": rows, "environment": environment()}))


if __name__ == "__main__":
    main()

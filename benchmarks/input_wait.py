"""Does training wait for data? Which way of making batches costs a small machine least?

    python benchmarks/input_wait.py [--data elpv] [--size 128] [--batch 32] [--steps 16] [--rounds 3] [--threads N]

A real training step (EfficientNet-Lite0, float32, channels last, SGD) runs beside each way of making its batches.
Waiting alone does not decide: a worker that is ready in time may have taken the core that a step needed, whose OpenMP
threads then wait for each other. So the ceiling is measured too (`ready`: one batch, made before, used in every step),
and the number that counts is images per second as a share of it.

Each measurement is a fresh process (`OMP_WAIT_POLICY` is read once, at import). Rounds are interleaved, so that a
change of load hits all; the table shows the median and the spread, and the largest share of CPU time that other
programs took. The last line of stdout is one JSON document.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

QUIET = 0.1  # share of the machine's busy time that may belong to others

SETUPS: tuple[dict[str, Any], ...] = (
    {"by": "ready"},
    {"by": "inline"},
    {"by": "thread", "workers": 1},
    {"by": "thread", "workers": 2},
    {"by": "process", "workers": 1},
    {"by": "process", "workers": 2},
    {"by": "inline", "cached": True},
    {"by": "thread", "workers": 1, "cached": True},
    {"by": "thread", "workers": 2, "cached": True},
    {"by": "process", "workers": 1, "cached": True},
    {"by": "thread", "workers": 1, "cached": True, "passive": True},
    {"by": "thread", "workers": 2, "passive": True},
    {"by": "thread", "workers": 1, "cached": True, "fewer": True},
)


def name(setup: dict[str, Any]) -> str:
    """`thread x2, cached`."""
    parts = [setup["by"] + (f" x{setup['workers']}" if "workers" in setup else "")]
    parts += [word for word in ("cached", "passive", "fewer") if setup.get(word)]
    return ", ".join(parts)


def measured(setup: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """One measurement in this process: images per second, and the share of time spent waiting for batches."""
    import torch

    from effnet.data import By, Cache, batches, open_data
    from effnet.families import get
    from effnet.images import normalise
    from effnet.network import build, replace_head

    torch.set_num_threads(max(1, options.threads - bool(setup.get("fewer"))))
    network = get("efficientnet_lite0")
    source = open_data(options.data).train
    cache = Cache() if setup.get("cached") else Cache(0)
    if setup.get("cached"):
        cache.fill(source, workers=2)

    def reading() -> Iterator[Any]:
        by = setup["by"] if setup["by"] in get_args(By) else "thread"
        for epoch in range(1000):
            yield from batches(
                source,
                size_px=options.size,
                batch=options.batch,
                preprocess=network.preprocess,
                train=True,
                crop="dihedral",
                magnitude=options.magnitude,
                epoch=epoch,
                workers=setup.get("workers", 0),
                by=by,
                cache=cache,
            )

    model = replace_head(build(network, generator=torch.Generator().manual_seed(0)), source.classes)
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(batch: Any) -> None:
        images = normalise(batch.images, network.preprocess)
        loss = torch.nn.functional.cross_entropy(model(images), batch.targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    stream = reading()
    ready = next(stream) if setup["by"] == "ready" else None
    all_before, own_before = busy_seconds()
    result = timed(lambda: ready or next(stream), step, options)
    stream.close()  # ends the workers, whose time is counted from then on
    all_after, own_after = busy_seconds()
    others = all_after - all_before - (own_after - own_before)
    return result | {"others": max(0.0, others) / (all_after - all_before)}


def busy_seconds() -> tuple[float, float]:
    """CPU time spent since the start: by the whole machine (Linux), and by this process and its ended workers."""
    with open("/proc/stat") as file:
        user, nice, system, *_ = map(int, file.readline().split()[1:])
    own = os.times()
    return (user + nice + system) / os.sysconf("SC_CLK_TCK"), sum(own[:4])


def timed(ask: Callable[[], Any], step: Callable[[Any], None], options: argparse.Namespace) -> dict[str, float]:
    """Runs the loop, timing what it waits for and what it computes; the first steps are warm-up."""
    waits, computes = [], []
    for number in range(options.warmup + options.steps):
        start = time.perf_counter()
        batch = ask()
        ready = time.perf_counter()
        step(batch)
        if number >= options.warmup:
            waits.append(ready - start)
            computes.append(time.perf_counter() - ready)
    total = sum(waits) + sum(computes)
    return {
        "images_per_s": options.steps * options.batch / total,
        "wait_share": sum(waits) / total,
        "step_ms": 1e3 * statistics.median(computes),
    }


def undisturbed(setup: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """A measurement during which other programs took little time; after `patience` seconds, the best there was."""
    start, results = time.time(), []
    while not results or (results[-1]["others"] > QUIET and time.time() - start < options.patience):
        results.append(in_fresh_process(setup))
        print(f"{name(setup):34} {json.dumps(results[-1])}", file=sys.stderr, flush=True)
    return min(results, key=lambda result: result["others"])


def in_fresh_process(setup: dict[str, Any]) -> dict[str, float]:
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE" if setup.get("passive") else ""}
    environment = {key: value for key, value in environment.items() if value}
    command = [sys.executable, __file__, *sys.argv[1:], "--only", json.dumps(setup)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="elpv")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--magnitude", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine, per row")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measured(json.loads(options.only), options)))
        return
    started, load_before = time.time(), os.getloadavg()[0]
    rounds = [[undisturbed(setup, options) for setup in SETUPS] for _ in range(options.rounds)]
    rows = [summary(setup, [one[i] for one in rounds]) for i, setup in enumerate(SETUPS)]
    ceiling = rows[0]["images_per_s"]
    print(
        f"{'batches made by':34} {'img/s':>7} {'of ready':>9} {'waiting':>8} {'step ms':>8} {'others':>7}   "
        "lowest..highest img/s"
    )
    for row in rows:
        row["of_ready"] = round(row["images_per_s"] / ceiling, 3)
        low, high = row["spread"]
        print(
            f"{row['name']:34} {row['images_per_s']:7.1f} {row['of_ready']:9.1%} {row['wait_share']:8.1%} "
            f"{row['step_ms']:8.1f} {row['others']:7.1%}   {low:.1f}..{high:.1f}"
        )
    import torch

    environment = {"torch": torch.__version__, "python": platform.python_version(), "cores": options.threads}
    environment |= {"load_before": round(load_before, 2), "seconds": round(time.time() - started)}
    print(json.dumps({"options": vars(options), "environment": environment, "rows": rows}))


def summary(setup: dict[str, Any], results: list[dict[str, float]]) -> dict[str, Any]:
    rates = [result["images_per_s"] for result in results]
    return {
        "name": name(setup),
        "images_per_s": round(statistics.median(rates), 1),
        "spread": (round(min(rates), 1), round(max(rates), 1)),
        "wait_share": round(statistics.median(result["wait_share"] for result in results), 4),
        "others": round(max(result["others"] for result in results), 3),
        "step_ms": round(statistics.median(result["step_ms"] for result in results), 1),
    }


if __name__ == "__main__":
    main()

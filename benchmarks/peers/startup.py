"""How long from a fresh process to a network, and in how much memory? effnet beside timm and torchvision.

Interleaved rounds of fresh processes in the peers' environment, random weights, EfficientNet-B0. Ratios are medians of
per-round ratios to effnet. Prints a table and writes results/startup.json.

    benchmarks/peers/.venv/bin/python -m benchmarks.peers.startup
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from effnet.plan import environment

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 7
# torchvision's Python part declares shapes for two operators of a compiled part that is not there
NO_OPERATORS = (
    "import torch; lib = torch.library.Library('torchvision', 'DEF'); "
    "[lib.define(name + '() -> ()') for name in ('nms', 'qnms')]; "
)
PROGRAMS = {
    "torch": "import torch",
    "effnet": "import effnet; effnet.create_model('efficientnet_b0')",
    "timm": NO_OPERATORS + "import timm; timm.create_model('efficientnet_b0')",
    "torchvision": NO_OPERATORS + "from torchvision.models import efficientnet_b0; efficientnet_b0()",
}
MEMORY = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"


def measured(program: str) -> tuple[float, int]:
    """Wall seconds of a fresh process, and its peak memory in MB."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program + MEMORY], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return time.perf_counter() - start, int(done.stdout.split()[-1])


def main() -> None:
    for program in PROGRAMS.values():
        measured(program)  # bytecode and page cache
    rounds = [{name: measured(program) for name, program in PROGRAMS.items()} for _ in range(ROUNDS)]
    rows = []
    for name in PROGRAMS:
        seconds = [one[name][0] for one in rounds]
        ratio = statistics.median(one[name][0] / one["effnet"][0] for one in rounds)
        rows.append({"what": name, "seconds": statistics.median(seconds), "min": min(seconds), "max": max(seconds),
                     "peak_mb": statistics.median(one[name][1] for one in rounds), "times_effnet": ratio})  # fmt: skip
        print("{what:12} {seconds:6.2f} s  {peak_mb:5.0f} MB  {times_effnet:5.2f} x".format(**rows[-1]))
    document = {"network": "efficientnet_b0", "rounds": ROUNDS, "rows": rows, "environment": environment()}
    (ROOT / "results" / "startup.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

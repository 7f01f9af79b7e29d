"""How far off are predicted latencies? 30 networks that the table has never seen, predicted and measured.

Claim    A table of measured operators, summed over a network's units, predicts its latency on this machine with a
         median error of at most 10 %; multiply-adds, scaled as well as they can be, do far worse.
Command  effnet bench --table [--precision P] [--threads N]
         python experiments/latency_model.py [--precision P] [--threads N] [--networks 30] [--own-clock]
Time     4 minutes for the table, 1 to 2 minutes for the networks, on one core of a Sapphire-Rapids-class Xeon
Outcome  results/latency_model_P_N.json, docs/figures/latency_model_P_N.png; see docs/latency.md.

The networks (seed 7; the table was fitted and judged on those of seeds 1 and 2) are members of all families, scaled at
random in depth, width and resolution. They are measured together, interleaved, and predictions are held against the
quickest round of each, as a table is of a quiet machine; the error against the medians stands beside it. `others` is
the share of busy CPU time that other programs took meanwhile: above 0.1 the numbers are those of a busy machine.
`--own-clock` counts the CPU time of the measuring thread instead of the wall's (one thread only); the record says so.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from effnet import bench, plots
from effnet.cost import cost
from effnet.latency import TARGET, error_of, random_networks

ROOT = Path(__file__).parent.parent
SEED = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="float32", choices=bench.DTYPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--own-clock", action="store_true", help="CPU time of the one thread, for a busy machine")
    parser.add_argument("--out", type=Path, default=ROOT, help="the folder that holds results/ and docs/figures/")
    options = parser.parse_args()
    if options.own_clock and options.threads > 1:
        parser.error("--own-clock counts one thread")
    clock = time.thread_time if options.own_clock else time.perf_counter
    table = bench.table(precision=options.precision, threads=options.threads)
    networks = random_networks(options.networks, SEED)
    load, rows = os.getloadavg()[0], []
    found = bench.bench(
        networks, precision=options.precision, threads=options.threads, rounds=options.rounds, clock=clock
    )
    for network, timed in zip(networks, found.measurements, strict=True):
        predicted = table.predict(network)
        rows.append(
            {
                "network": network.name,
                "macs": cost(network).macs,
                "quickest_ms": round(timed.quickest, 3),
                "median_ms": round(timed.value, 3),
                "interval_ms": [round(end, 3) for end in timed.spread],
                "predicted_ms": round(predicted, 3),
                "ratio": round(predicted / timed.quickest, 3),
            }
        )
        print(
            f"{network.name:38} measured {timed.quickest:8.2f} ms  predicted {predicted:8.2f} ms  {rows[-1]['ratio']}"
        )
    measured, medians, predicted = ([row[key] for row in rows] for key in ("quickest_ms", "median_ms", "predicted_ms"))
    others = found.others
    error, of_medians = error_of(predicted, measured, others), error_of(predicted, medians, others)
    per_mac = statistics.median(row["quickest_ms"] / row["macs"] for row in rows)  # the best that MACs alone can do
    by_macs = error_of([per_mac * row["macs"] for row in rows], measured, others)
    print(f"operators: {error}\nagainst medians: {of_medians}\nMACs only: {by_macs}")
    print(f"other programs took {others} of the busy CPU time, load {load:.2f}")
    print(f"the claim of {TARGET:.0%} {'holds' if error.median <= TARGET else 'does not hold'} in this run")
    name = f"latency_model_{options.precision}_{options.threads}"
    title = f"{table}\n{error}"
    plots.agreement(
        [row["network"] for row in rows], predicted, measured, options.out / "docs/figures" / f"{name}.png", title
    )
    document = {"table": str(table), "stated": table.error and table.error.to_dict(), "error": error.to_dict()}
    document |= {
        "error_of_medians": of_medians.to_dict(),
        "error_of_macs": by_macs.to_dict(),
        "load": load,
        "own_clock": options.own_clock,
        "environment": bench.record(),
        "rows": rows,
    }
    (options.out / "results").mkdir(exist_ok=True)
    (options.out / "results" / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

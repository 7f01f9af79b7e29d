"""Figures 1 and 5 of the EfficientNet paper, from its published accuracies and our own cost model.

Claim    Among the networks of the paper's Table 2, EfficientNets alone make up the Pareto front of accuracy against
         parameters and against multiply-adds.
Command  python experiments/pareto.py      (latency: after `effnet bench --table`; left out without a table)
Time     10 s
Outcome  docs/figures/pareto_{params,macs,activations,latency_ms}.png, results/pareto.json: the points and the fronts.
         Params and MACs: the claim holds in Table 2. V2-S and V2-M take the front above B4, and B6 stays on it between
         them. Activations: the whole front is EfficientNetV2, whose fused blocks have no wide early maps. Latency (one
         thread, eager float32, predicted): the two families alternate up to B4; above it, V2 is the front alone. Among
         the networks of Table 2 the front is EfficientNet on every axis.
"""

import json
from pathlib import Path

from effnet import bench, plots, published
from effnet.value import UsageError

ROOT = Path(__file__).parent.parent


def main() -> None:
    rows = {}
    for axis in published.AXES:
        table = None
        if axis == "latency_ms":
            try:
                table = bench.table()
            except UsageError as error:
                print(f"{axis} left out: {error}")
                continue
        found = published.points(axis, table)
        note = f"{table}\n{table.error}" if table else ""
        path = ROOT / "docs" / "figures" / f"pareto_{axis}.png"
        best = plots.pareto(found, axis, path, note=note)
        table_2 = published.front(point for point in found if point.source == published.V1_TABLE_2)
        rows[axis] = {
            "note": note,
            "front": [point.name for point in best],
            "front_of_table_2": [point.name for point in table_2],
            "points": [point.to_dict() for point in found],
        }
        print(f"{axis:12} front: {', '.join(rows[axis]['front'])}")
        print(f"{'':12} of the paper's Table 2: {', '.join(rows[axis]['front_of_table_2'])}")
    (ROOT / "results" / "pareto.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Scaling for the machine that runs it: is the largest network within a MAC budget the one to have for its latency?

Claim     Multiply-adds do not predict speed, so the same budget, said in multiply-adds and in milliseconds, gives
          different networks; and at equal latency the network that was chosen by latency is at least as accurate.
Protocol  For every baseline four networks; none has fewer layers, channels or pixels than the baseline has.
          by MACs     the largest within 4 times the baseline's multiply-adds: fit(..., along="free"), the paper's
                      coefficients. Its predicted latency is the latency budget of the next two.
          by ms       the same rule, fit(..., along="free"), within that latency. This is what `effnet scale NET --along
                      free --budget latency_ms=L` gives. It follows the same coefficients, so it can differ from the
                      first only in what a limit leaves of a dimension: near the first by construction.
          most MACs   within that latency, of all depths, widths and sizes (factors 1 to 4), the one with the most
                      multiply-adds: what a user takes who reads multiply-adds as capacity, as the paper does, and has
                      only milliseconds to spend. No coefficients; the machine decides what is cheap to scale.
          least ms    the reverse: of all with as many multiply-adds as the first (2 % less at most, within its
                      budget), the quickest. The spread at equal multiply-adds, quickest to slowest, stands beside it.
          Most parameters is not a rule here: it leaves the image as small as it may be and widens the last layers.
          Latency is that of the table (`effnet bench --table`, one thread, eager) to choose, and measured to judge: the
          four of a baseline interleaved in one process. The best of thousands by prediction is flattered by it, so
          "equal latency" is what the ratio of measured times says, not what was asked for.
          Trained: the baselines of compound.py at 64 px with compound.py's recipe on Fashion-MNIST; seeds 0, 1, 2;
          differences are paired by seed, Student's t (95 %). Its images have 28 px: size adds no information.
          Not trained: efficientnet_b0, mobilenet_v2 and resnet18 at 224 px.
          Small networks wait for operators to start, not for arithmetic. `fixed` is the share of the predicted time
          that is left when the image shrinks to the network's stride; where it is near 1, multiply-adds are nearly
          free, and the answer is about the framework rather than about the processor. --px and --budget choose.
Command   effnet bench --table
          python experiments/for_the_machine.py choose                                   (on a quiet machine)
          python experiments/for_the_machine.py choose --precision bfloat16 --baselines efficientnet_b0 resnet18
          python experiments/for_the_machine.py run --ways 'by MACs' 'most MACs' --epochs 4 --images 3000 --jobs 2
          python experiments/for_the_machine.py table
Time      choose: half a minute for the three baselines; run: 30 minutes of one core (18 trainings)
Outcome   At equal measured time (within 4 %) 2.8, 2.8 and 1.5 times the multiply-adds, in width; at equal multiply-adds
          a fifth quicker. What was chosen by latency is 14.7 +- 8.5, 15.4 +- 14.4 and 8.0 +- 12.1 points more accurate
          after four epochs on 3,000 images, where wide and shallow networks learn soonest (docs/scaling.md).

`choose` adds the networks and their latencies to results/for_the_machine.jsonl, `run` trains those that were chosen
last and are not trained yet; a training counts for every network with the same integers.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from compound import BASELINES, against, append, baseline, in_processes, judged, markdown, read
from compound import DATA as SETS

from effnet import bench, families
from effnet.cost import cost, costs
from effnet.fitting import fit
from effnet.latency import LatencyTable
from effnet.scaling import Rows
from effnet.spec import Network

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "for_the_machine.jsonl"
PUBLISHED = ("efficientnet_b0", "mobilenet_v2", "resnet18")
DATA = "fashion-mnist"
DEFAULTS = SETS[DATA]  # epochs and images of compound.py
WAYS = ("by MACs", "by ms", "most MACs", "least ms")
LARGEST = 4.0  # no dimension is scaled by more
SAME = 0.02  # multiply-adds within this share are the same

# --- the networks ---------------------------------------------------------------------------------------------------


def start(name: str, px: int | None) -> Network:
    """What is scaled: a baseline of compound.py at `px`, or a published network at its own size."""
    return baseline(name, DATA, px) if name in BASELINES else families.get(name)


def chosen(base: Network, budget: float, table: LatencyTable) -> tuple[dict[str, Network], dict[str, float]]:
    """The four networks, and the limits: multiply-adds, milliseconds, and the least and most ms at equal MACs."""
    step = max(1, base.resolution // 28)  # sizes in px: every one at 32, every eighth at 224
    limit = budget * cost(base).macs
    by_macs = fit(base, {"macs": limit}, "free", resolution_step=step)
    ms = table.predict(by_macs.network)
    by_ms = fit(base, {"latency_ms": ms}, "free", resolution_step=step, meters={"latency_ms": table.predict})
    places = around(base, step)
    macs = costs(base, **places)["macs"]
    times = table.predictions(base, **places)
    same = (macs >= (1 - SAME) * by_macs.spent["macs"]) & (macs <= limit)
    rows = Rows(network=base)

    def at(index: int) -> Network:
        return rows.at(*(places[name][index].item() for name in ("depth", "width", "resolution")))

    networks = {
        "by MACs": by_macs.network,
        "by ms": by_ms.network,
        "most MACs": at(int(np.argmax(np.where(times <= ms, macs, 0)))),
        "least ms": at(int(np.argmin(np.where(same, times, np.inf)))),
    }
    ends = {"least_ms_at_equal_macs": times[same].min().item(), "most_ms_at_equal_macs": times[same].max().item()}
    return networks, {"macs": limit, "latency_ms": ms, "candidates": len(macs)} | ends


def around(base: Network, step: int) -> dict[str, np.ndarray]:
    """Depth, width and resolution of every network up to `LARGEST` times the baseline, none below it."""
    rows, axes = Rows(network=base), []
    for name in ("depth", "width"):
        edges = rows.breaks(name, 1.0, LARGEST)
        axes.append(np.concatenate([[1.0], (edges[1:] + edges[:-1]) / 2]))
    axes.append(np.arange(base.resolution, LARGEST * base.resolution + 1, step, dtype=int))
    depth, width, resolution = (each.ravel() for each in np.meshgrid(*axes, indexing="ij"))
    return {"depth": depth, "width": width, "resolution": resolution}


def choose(args: argparse.Namespace) -> None:
    """Fits, measures together, and keeps a row for every network."""
    table = bench.table(precision=args.precision)
    clock = time.thread_time if args.own_clock else time.perf_counter
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for name in args.baselines:
        base = start(name, args.px)
        networks, limits = chosen(base, args.budget, table)
        networks["baseline"] = base  # last: what is first is what the others' times are compared to
        apart = [network.replace(name=way) for way, network in networks.items()]
        found = bench.bench(apart, precision=args.precision, rounds=args.rounds, clock=clock)
        ratios = {ratio.second: ratio.to_dict() for ratio in found.comparisons}
        for way, network in networks.items():
            spent, timed, predicted = cost(network), found[way], table.predict(network)
            row = {
                "kind": "network",
                "baseline": name,
                "base_px": base.resolution,
                "budget": args.budget,
                "precision": args.precision,
                "way": way,
                "network": network.to_dict(),
                "px": network.resolution,
                "layers": sum(stage.repeats for stage in network.stages),
                "widths": [stage.width for stage in network.stages],
                "macs": spent.macs,
                "params": spent.params,
                "predicted_ms": round(predicted, 4),
                "fixed": round(table.predict(network, network.stride) / predicted, 4),
                "measured_ms": round(timed.value, 4),
                "spread_ms": timed.spread,
                "quickest_ms": round(timed.quickest, 4),
                "against_by_macs": ratios.get(way),
                "limits": limits,
                "table": str(table),
                "stated": table.error and table.error.to_dict(),
                "others": found.others,
                "own_clock": args.own_clock,
                "rounds": args.rounds,
                "environment": timed.environment,
            }
            append(row, args.results)
            words = f"{spent.macs:,} MACs, {predicted:.3f} ms predicted, {timed.value:.3f} measured"
            print(f"{name}, {way}: {network.name}, {words}", flush=True)


def last_chosen(found: list[dict[str, Any]]) -> dict[tuple, dict[str, dict[str, Any]]]:
    """The newest networks by (baseline, its px, budget, precision), then by way."""
    grouped: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in found:
        if row["kind"] == "network":
            key = (row["baseline"], row["base_px"], row["budget"], row["precision"])
            grouped.setdefault(key, {})[row["way"]] = row
    return {key: ways for key, ways in grouped.items() if {"baseline", *WAYS} <= ways.keys()}  # not one cut short


# --- trainings ------------------------------------------------------------------------------------------------------


def integers(row: dict[str, Any]) -> str:
    """The same for networks that differ in nothing but what they are called."""
    return Network.from_dict(row["network"]).replace(name="", source="").to_json()


def identity(row: dict[str, Any]) -> tuple:
    return integers(row), row["seed"], row["epochs"], row["images"]


def run(args: argparse.Namespace) -> None:
    """Trains what was chosen last and is not trained yet."""
    found = read(args.results)
    networks = [
        row | {"way": way}
        for (name, *_), ways in last_chosen(found).items()
        for way, row in ways.items()
        if name in args.baselines and way in args.ways
    ]
    if not networks:
        raise SystemExit(f"{args.results} has no networks of {', '.join(args.baselines)}: run `choose` first")
    done = {identity(row) for row in found if row["kind"] == "training"}
    todo: dict[tuple, dict[str, Any]] = {}
    for seed, row in itertools.product(args.seeds, networks):
        job = {key: row[key] for key in ("baseline", "base_px", "budget", "way", "network")}
        job |= {"kind": "training", "data": DATA, "seed": seed, "epochs": args.epochs, "images": args.images}
        if identity(job) not in done:
            todo.setdefault(identity(job), job)
    print(f"{len(todo)} runs to do, {len(done)} in {args.results}", flush=True)
    in_processes(__file__, list(todo.values()), args.results, args.jobs)


def one(job: dict[str, Any]) -> dict[str, Any]:
    """One training."""
    return job | judged(Network.from_dict(job["network"]), job)


# --- what came out --------------------------------------------------------------------------------------------------


def latencies(found: list[dict[str, Any]]) -> str:
    """Every network chosen last: what it is, what it costs, how long it was said to take and took."""
    heads = ["baseline", "way", "px", "layers", "channels", "params", "MACs", "predicted ms", "fixed"]
    heads += ["measured ms", "times `by MACs`", "other programs"]
    rows, notes = [], []
    for (name, px, budget, precision), ways in last_chosen(found).items():
        label = f"{name}, {px} px, x{budget:g}, {precision}"
        for way in ("baseline", *WAYS):
            row, low_high = ways[way], ""
            if ratio := row["against_by_macs"]:
                low, high = ratio["spread"]
                low_high = f"{ratio['ratio']:.3f} ({low:.3f} to {high:.3f}), {ratio['verdict']}"
            cells = [label, way, row["px"], row["layers"], " ".join(map(str, row["widths"])), f"{row['params']:,}"]
            cells += [f"{row['macs']:,}", f"{row['predicted_ms']:.2f}", f"{100 * row['fixed']:.0f} %"]
            busy = "-" if row["others"] is None else f"{100 * row['others']:.0f} %"
            rows.append([*cells, f"{row['measured_ms']:.2f}", low_high, busy])
        limits, stated = row["limits"], row["stated"]
        least, most = limits["least_ms_at_equal_macs"], limits["most_ms_at_equal_macs"]
        error = f"; the table's median error is {stated['median']:.1%}" if stated else ""
        notes.append(
            f"{label}: at the multiply-adds of `by MACs` (within {SAME:.0%}), {least:.2f} to {most:.2f} ms predicted, "
            f"of {limits['candidates']:,} networks{error}."
        )
    return "\n\n".join([markdown(heads, rows), *notes])


def accuracies(found: list[dict[str, Any]]) -> str:
    """Test accuracy of what was chosen last, and `by MACs` minus it, paired by seed."""
    trained: dict[tuple, dict[int, dict[str, Any]]] = {}
    for row in found:
        if row["kind"] == "training":
            trained.setdefault((row["images"], row["epochs"], integers(row)), {})[row["seed"]] = row
    heads = ["baseline", "images, epochs", "way", "MACs", "measured ms", "seeds", "accuracy in %"]
    heads += ["`by MACs` minus it", "verdict"]
    rows = []
    for setting in sorted({key[:2] for key in trained}):
        for (name, px, budget, precision), ways in last_chosen(found).items():
            reference = trained.get((*setting, integers(ways["by MACs"])), {})
            for way in ("baseline", *WAYS):
                seeds = trained.get((*setting, integers(ways[way])))
                if not seeds:
                    continue
                mean, difference, verdict = against(seeds, reference)
                if integers(ways[way]) == integers(ways["by MACs"]):
                    difference, verdict = "", "" if way == "by MACs" else "the same network"
                cells = [f"{name}, {px} px, x{budget:g}, {precision}", f"{setting[0]:,}, {setting[1]}", way]
                cells += [f"{ways[way]['macs']:,}", f"{ways[way]['measured_ms']:.2f}", len(seeds)]
                rows.append([*cells, mean, difference, verdict])
    return markdown(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    first = verbs.add_parser("choose", help="fit under both budgets, and measure")
    first.add_argument("--baselines", nargs="+", default=[*BASELINES, *PUBLISHED], choices=[*BASELINES, *PUBLISHED])
    first.add_argument("--px", type=int, default=64, help="of the baselines of compound.py")
    first.add_argument("--budget", type=float, default=4.0, help="times the baseline's multiply-adds")
    first.add_argument("--precision", default="float32", choices=bench.DTYPES)
    first.add_argument("--rounds", type=int, default=20)
    first.add_argument("--own-clock", action="store_true", help="CPU time of the one thread, for a busy machine")
    many = verbs.add_parser("run", help="the trainings that are not in the results yet")
    many.add_argument("--baselines", nargs="+", default=list(BASELINES), choices=BASELINES)
    many.add_argument("--ways", nargs="+", default=["baseline", *WAYS], choices=["baseline", *WAYS])
    many.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    many.add_argument("--epochs", type=int, default=DEFAULTS["epochs"])
    many.add_argument("--images", type=int, default=DEFAULTS["images"], help="to train on")
    many.add_argument("--jobs", type=int, default=2)
    single = verbs.add_parser("one", help="one training, as JSON; its row is the last line printed")
    single.add_argument("job", type=json.loads)
    show = verbs.add_parser("table", help="the tables of latency and of accuracy, in Markdown")
    for sub in (first, many, show):
        sub.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "one":
        print(json.dumps(one(args.job)))
    elif args.verb == "table":
        found = read(args.results)
        print(f"{latencies(found)}\n\n{accuracies(found)}")
    else:
        {"choose": choose, "run": run}[args.verb](args)


if __name__ == "__main__":
    main()

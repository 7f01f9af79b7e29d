"""Searches on real data: is what they find better than the scaled-down B0, and in what?

Claims    Tan & Le 2019, section 4: a search over MnasNet's space with the objective ACC * (MACs/T)^-0.07 finds the
          baseline. Tan & Le 2021, section 3.3: with ACC * S^-0.07 * P^-0.05 (S: time of a training step, P: parameters)
          over MBConv and Fused-MBConv it finds one that trains faster; Fused-MBConv ends up in the early stages.
Protocol  Baseline: efficientnet_b0 with widths x 0.25 (multiples of 4) and layers x 0.5 at the px of the data, earliest
          strides dropped until the last map has 2 x 2 pixels. It is in every space.
          Goals: macs       space v1; T and a hard limit are the baseline's MACs
                 latency    space v1; the same with latency_ms, predicted from the table of `effnet bench --table`
                 training   space v2; S and P in units of the baseline's, no limit
          A search tries --trials candidates, judged on validation images after 1 epoch, one in three of them after 3
          (elpv: 2 and 6), one seed for all. Study: runs/search-....db; the same command goes on with it.
          Judged: the winners are trained from random weights with the recipe of compound.py, seeds 0 to 4, the
          last epoch on the test images, which no search saw. "training" has a second one: of its front the quickest to
          train that is at least as accurate as the baseline by the searching. Fashion-MNIST: 6,000 images, 8 epochs;
          ELPV at 64 px: all images, 20 epochs, weighted accuracy. Differences are paired by seed, Student's t
          (95 %). "better" or "worse": the interval leaves out 0; "tie": it does not. Times are over the baseline's:
          all networks interleaved, one thread, float32; latency of one image, a training step of 64.
Command   python experiments/searches.py search --goal macs|latency|training [--strategy random] [--data elpv]
          python experiments/searches.py run --jobs 2; python experiments/searches.py times
          python experiments/searches.py table; python experiments/searches.py figure
          python experiments/searches.py fused        (where Fused-MBConv is chosen)
Time      Of one core: searches 17 to 23 minutes, of ELPV (--trials 40) 11 and 24; judging 45 to 90 s a run
Outcome   Fashion-MNIST: "macs" 2.01 +- 1.52 points better than the baseline with 0.6 of its MACs, "training" 2.12 +-
          1.39 better and a step takes 0.51 of the time, "latency" 2.64 +- 1.39 better at 0.32 of the latency. Evolution
          beats random search by 0.90 +- 0.48 at 100 trials ("training": 80). ELPV: ties in accuracy; a step takes 0.59
          ("macs") and 0.81 ("training") of the baseline's. Fused-MBConv wins early on Fashion-MNIST, and late once.

A row of results/searches.jsonl per finished search and per training; what is there is not done again.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compound import DATA, append, in_processes, interval, judged, markdown, paired, read

from effnet import bench, families
from effnet.coefficients import Evaluate, t_interval
from effnet.cost import cost
from effnet.search.objectives import soft, training_aware
from effnet.search.space import small, v1, v2
from effnet.search.study import Found, found, searching
from effnet.search.task import Meters, Task
from effnet.spec import Network, Rounding

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "searches.jsonl"
FIGURE = ROOT / "docs" / "figures" / "searches.png"
GOALS = ("macs", "latency", "training")
SETTING = ("data", "goal", "strategy", "search_seed", "trials", "rungs", "search_images")  # what a search is known by
BETWEEN = (("macs", "evolution", "macs", "random"), ("latency", "evolution", "macs", "evolution"))  # the ablations
RUN = ("data", "who", "pick", "seed", "epochs", "images")  # and a training
SEARCHED = {"fashion-mnist": {"rungs": (1, 3), "images": 3_000}, "elpv": {"rungs": (2, 6), "images": 0}}
JUDGED = {"fashion-mnist": {"epochs": 8, "images": 6_000}, "elpv": {"epochs": 20, "images": 0}}


def baseline(data: str = "fashion-mnist") -> Network:
    """B0 scaled down to the data's images."""
    about = DATA[data]
    b0 = families.get("efficientnet_b0").replace(rounding=Rounding(divisor=4))
    made = small(b0, px=about["px"], width=0.25, depth=0.5, least_map=2).with_classes(about["classes"])
    mean = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return made.replace(name="b0-like", preprocess=made.preprocess.replace(**mean))


# --- the search -----------------------------------------------------------------------------------------------------


def search(args: argparse.Namespace) -> None:
    """The search; goes on where it was stopped."""
    import torch

    from effnet.data import open_data
    from effnet.plan import environment
    from effnet.proxy import PROXY, fewer, proxy
    from effnet.search.figure import figure as picture
    from effnet.search.meters import step_ms
    from effnet.search.records import opened

    torch.set_num_threads(1)
    args.rungs = args.rungs or list(SEARCHED[args.data]["rungs"])
    args.search_images = SEARCHED[args.data]["images"] if args.search_images is None else args.search_images
    setting = {name: getattr(args, name) for name in SETTING}
    rows = read(args.results)
    if any(row["kind"] == "search" and same(row, setting, SETTING) for row in rows):
        print("this search is done")
        return
    splits = open_data(DATA[args.data]["source"], split_seed=0)
    splits = fewer(splits, args.search_images) if args.search_images else splits
    recipe, base = PROXY.replace(crop="resize"), baseline(args.data)
    evaluate = proxy(splits, recipe, workers=0)
    meters: Meters = {}
    if args.goal == "latency":
        meters = {"latency_ms": bench.table(threads=1, precision="float32").predict}
    elif args.goal == "training":
        meters = {"step_ms": step_ms(recipe)}
    told = of_baseline(base, rows, setting, meters, evaluate, args.results)
    todo = task(base, told, setting)
    file = ROOT / "runs" / f"search-{'-'.join(str(setting[name]) for name in SETTING[:5]).replace(':', '_')}.db"
    file.parent.mkdir(exist_ok=True)
    result: Found | None = None
    for trial in searching(todo, evaluate, file, trials=args.trials, meters=meters):
        result = found(todo, opened(file, todo).trials())
        best = f"best so far {result.best.values['acc']:.4f}" if result.winner is not None else ""
        print(f"{trial.number + 1}/{args.trials} {trial.state} {trial.values.get('acc', 0):.4f} {best}", flush=True)
    result = result or found(todo, opened(file, todo).trials())
    picture(result, file.with_suffix(".png"))
    networks = {"winner": result.network()}
    if args.goal == "training":
        equal = [trial for trial in map(result.trial, result.front) if trial.values["acc"] >= told["acc"]]
        quickest = min(equal, key=lambda trial: trial.values["step_ms"], default=result.best)
        if quickest is not result.best:
            networks["quickest at equal accuracy"] = result.network(quickest.number)
    row = setting | {
        "kind": "search",
        "baseline": told,
        "networks": {name: network.to_dict() for name, network in networks.items()},
        "best": result.best.values,
        "counts": {state: result.count(state) for state in ("finished", "stopped", "failed")},
        "trials_tried": [{"code": trial.code, "state": trial.state, "values": trial.values} for trial in result.trials],
        "seconds": round(sum(each["seconds"] for t in result.trials for each in t.results), 1),
        "environment": environment("cpu"),
    }
    append(row, args.results)
    print(result.network())


def of_baseline(
    base: Network,
    rows: Sequence[dict[str, Any]],
    setting: dict[str, Any],
    meters: Meters,
    evaluate: Evaluate,
    results: Path,
) -> dict[str, float]:
    """What the search's own measures say of the baseline; measured once and kept, as the objective follows from it."""
    names = ("data", "goal", "search_seed", "rungs", "search_images")
    for row in rows:
        if row["kind"] == "baseline" and same(row, setting, names):
            return row["values"]
    spent = cost(base)
    values = {"macs": float(spent.macs), "params": float(spent.params)}
    values |= {name: round(meter(base), 3) for name, meter in meters.items()}
    values["acc"] = evaluate(base, setting["search_seed"], setting["rungs"][-1])
    append({name: setting[name] for name in names} | {"kind": "baseline", "values": values}, results)
    return values


def task(base: Network, told: dict[str, float], setting: dict[str, Any]) -> Task:
    """The search of a goal."""
    quantity = {"macs": "macs", "latency": "latency_ms"}.get(setting["goal"])
    return Task(
        space=v1(base) if quantity else v2(base),
        objectives=(soft(quantity, told[quantity]) if quantity else training_aware(told["step_ms"], told["params"]),),
        limits={quantity: told[quantity]} if quantity else {},
        strategy=setting["strategy"],
        seed=setting["search_seed"],
        rungs=tuple(setting["rungs"]),
        about={"data": setting["data"], "images": setting["search_images"]},
    )


# --- the judgement --------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Trains the baseline and what every search found, on all seeds."""
    rows = read(args.results)
    searches = [row for row in rows if row["kind"] == "search" and row["data"] == args.data]
    how = JUDGED[args.data] | {"data": args.data, "kind": "training"}
    jobs = []
    for seed in args.seeds:
        networks: list[tuple[Any, str, dict[str, Any]]] = [("baseline", "", baseline(args.data).to_dict())]
        for row in searches:
            who = {name: row[name] for name in SETTING}
            networks += [(who, pick, network) for pick, network in row["networks"].items()]
        jobs += [how | {"who": who, "pick": pick, "seed": seed, "network": net} for who, pick, net in networks]
    done = [row for row in rows if row["kind"] == "training"]
    todo = [job for job in jobs if not any(same(row, job, RUN) for row in done)]
    print(f"{len(todo)} trainings to do, {len(jobs) - len(todo)} done", flush=True)
    in_processes(__file__, todo, args.results, args.jobs, said)


def one(job: dict[str, Any]) -> dict[str, Any]:
    return job | judged(Network.from_dict(job["network"]), job)


def said(row: dict[str, Any]) -> str:
    """A finished training in a line."""
    name = label(row["who"], row["pick"])
    return f"{row['data']} {name} seed {row['seed']}: {score(row):.2f} %, {row['seconds']} s"


def score(row: dict[str, Any]) -> float:
    """Accuracy on the test images in per cent; weighted where images weigh differently."""
    return 100 * row["test"].get("weighted_accuracy", row["test"]["accuracy"])


def same(row: dict[str, Any], other: dict[str, Any], names: Sequence[str]) -> bool:
    return all(json.dumps(row.get(name)) == json.dumps(other.get(name)) for name in names)


def label(who: Any, pick: str) -> str:
    """What a network is called in tables."""
    return "baseline" if who == "baseline" else f"{who['goal']} {who['strategy']} {pick}"


def times(args: argparse.Namespace) -> None:
    """Latency and time of a training step of all that were found, interleaved, over the baseline's; one thread."""
    import torch

    from effnet.network import build
    from effnet.plan import environment
    from effnet.proxy import PROXY

    rows = [row for row in read(args.results) if row["kind"] == "search" and row["data"] == args.data]
    winners = {net["name"]: Network.from_dict(net) for row in rows for net in row["networks"].values()}
    networks = [baseline(args.data), *winners.values()]
    latency = bench.bench(networks, rounds=20)

    def training(network: Network) -> Callable[[], None]:
        model = build(network).train().to(memory_format=torch.channels_last)
        px = network.resolution
        images = torch.randn(PROXY.batch, 3, px, px).to(memory_format=torch.channels_last)

        def step() -> None:
            with torch.inference_mode(False), torch.enable_grad():
                model(images).square().mean().backward()
            model.zero_grad(set_to_none=True)

        return step

    works = {network.name: training(network) for network in networks}
    with bench.controlled(1):
        step = bench.measure(works, rounds=20)
    row = {"kind": "times", "data": args.data, "environment": environment("cpu")}
    for name, timed in (("latency", latency), ("step", step)):
        row[name] = {each.second: [each.ratio, *each.spread] for each in timed.comparisons}
        row[f"{name}_others"] = timed.others
    append(row, args.results)


# --- what came out --------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the baseline and all that was found; its accuracy and its times beside the baseline's."""
    heads = ["data", "goal", "strategy", "trials", "MACs", "params", "seeds", "test accuracy in %"]
    heads += ["minus the baseline", "verdict", "latency", "training step", "search in min"]
    lines, between = [], []
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "training":
            name = json.dumps([row["data"], row["epochs"], row["images"], row["who"], row["pick"]])
            groups.setdefault(name, {})[row["seed"]] = row
    clocks = {row["data"]: row for row in rows if row["kind"] == "times"}
    for name, seeds in sorted(groups.items(), key=lambda item: '"baseline"' not in item[0]):
        data, epochs, images, who, pick = json.loads(name)
        row = next(iter(seeds.values()))
        base = groups.get(json.dumps([data, epochs, images, "baseline", ""]), {}) if who != "baseline" else {}
        both = sorted(seeds.keys() & base.keys())
        spent = [each["seconds"] for each in rows if base and each["kind"] == "search" and same(each, who, SETTING)]
        goal = ["the baseline", "", ""] if who == "baseline" else [who["goal"], who["strategy"], who["trials"]]
        goal[0] += f", {pick}" if pick not in ("", "winner") else ""
        cells = [data, *goal, f"{row['macs']:,}", f"{row['params']:,}", len(seeds)]
        cells.append(interval([score(each) for each in seeds.values()]))
        cells += paired([score(seeds[seed]) - score(base[seed]) for seed in both])
        for clock in ("latency", "step"):
            ratio = clocks.get(data, {}).get(clock, {}).get(row["network"]["name"])
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*ratio) if ratio else "")
        lines.append([*cells, f"{statistics.fmean(spent) / 60:.0f}" if spent else ""])
        for goal, strategy, *other in BETWEEN if base and pick == "winner" else ():
            rival = who | dict(zip(("goal", "strategy"), other, strict=True))
            peers = groups.get(json.dumps([data, epochs, images, rival, pick]), {})
            if (who["goal"], who["strategy"]) == (goal, strategy) and peers:
                both = sorted(seeds.keys() & peers.keys())
                difference = paired([score(seeds[seed]) - score(peers[seed]) for seed in both])
                between.append([data, label(who, pick), label(rival, pick), len(both), *difference])
    first = markdown(heads, sorted(lines, key=lambda line: line[0] != "fashion-mnist"))
    return f"{first}\n\n{markdown(['data', 'one', 'other', 'seeds', 'one minus other', 'verdict'], between)}"


def fused(rows: list[dict[str, Any]]) -> str:
    """Markdown: the share of Fused-MBConv in every stage, among all candidates of a search and among its best."""
    lines = []
    stages = 0
    for row in rows:
        if row["kind"] != "search" or row["goal"] != "training":
            continue
        todo = task(baseline(row["data"]), row["baseline"], row)
        tried = [each for each in row["trials_tried"] if each["state"] in ("finished", "stopped")]
        whole = [each for each in tried if each["state"] == "finished"]
        whole.sort(key=lambda each: -todo.gains(each["values"])[0])
        parts = {"tried": tried, "best tenth": whole[: max(1, len(tried) // 10)], "winner": whole[:1]}
        for name, some in parts.items():
            networks = [todo.space.network(each["code"]) for each in some]
            stages = len(networks[0].stages)
            shares = [statistics.fmean(net.stages[at].op == "fused" for net in networks) for at in range(stages)]
            lines.append([row["data"], row["strategy"], name, len(some), *(f"{100 * share:.0f}" for share in shares)])
    return markdown(["data", "strategy", "candidates", "of them", *(f"stage {at} in %" for at in range(stages))], lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: the best so far of every search on Fashion-MNIST. Right: test accuracy against the time of a step."""
    from matplotlib.figure import Figure

    colours = ("#d1495b", "#2f7fd1", "#2a9d6f", "#b8860b")
    rows = [row for row in rows if row.get("data") == "fashion-mnist"]
    searches = [row for row in rows if row["kind"] == "search"]
    clocks = [row for row in rows if row["kind"] == "times"][-1]
    made = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = made.subplots(1, 2)
    told = searches[0]["baseline"]["acc"]
    left.axhline(100 * told, color="0.5", linestyle="--", linewidth=1, label="baseline")
    for row, colour in zip(searches, colours, strict=False):
        whole = [100 * t["values"]["acc"] if t["state"] == "finished" else 0 for t in row["trials_tried"]]
        best = list(itertools.accumulate(whole, max))
        left.step(range(1, len(best) + 1), best, color=colour, label=label(row, "").strip(), linewidth=1.4)
    left.set(xlabel="trial", ylabel="validation accuracy in %, best so far", ylim=(60, None))
    left.legend(fontsize=7, frameon=False)
    winners = {"baseline": baseline().name} | {
        label(row, "").strip(): row["networks"]["winner"]["name"] for row in searches
    }
    for (words, name), colour in zip(winners.items(), ("0.5", *colours), strict=False):
        scores = [score(row) for row in rows if row["kind"] == "training" and row["network"]["name"] == name]
        bounds, mean = t_interval(scores), statistics.fmean(scores)
        half = (bounds[1] - bounds[0]) / 2 if bounds else 0.0
        at = clocks["step"].get(name, [1.0])[0]
        right.errorbar(at, mean, half, color=colour, marker="o", capsize=3)
        near = (6, -12) if words.startswith("macs") else (6, 5)
        right.annotate(words, (at, mean), xytext=near, textcoords="offset points", fontsize=7)
    right.set(xlabel="time of a training step, baseline = 1", ylabel="test accuracy in %, five seeds", xlim=(0, 1.3))
    made.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    hunt = verbs.add_parser("search", help="one search; goes on where it was stopped")
    hunt.add_argument("--goal", choices=GOALS, default="macs")
    hunt.add_argument("--data", choices=SEARCHED, default="fashion-mnist")
    hunt.add_argument("--strategy", default="evolution")
    hunt.add_argument("--search-seed", type=int, default=0)
    hunt.add_argument("--trials", type=int, default=100)
    hunt.add_argument("--rungs", nargs="+", type=int)
    hunt.add_argument("--search-images", type=int)
    judge = verbs.add_parser("run", help="the baseline and all that was found, trained and judged on the test images")
    judge.add_argument("--data", choices=JUDGED, default="fashion-mnist")
    judge.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    judge.add_argument("--jobs", type=int, default=2)
    clocks = verbs.add_parser("times", help="latency and training step of all that was found; on a quiet machine")
    clocks.add_argument("--data", choices=JUDGED, default="fashion-mnist")
    single = verbs.add_parser("one", help="one training, as JSON; its row is the last line printed")
    single.add_argument("job", type=json.loads)
    shown = [verbs.add_parser("table", help="what came out"), verbs.add_parser("fused", help="where Fused-MBConv is")]
    shown.append(verbs.add_parser("figure", help=f"{FIGURE.relative_to(ROOT)}"))
    for each in (hunt, judge, clocks, *shown):
        each.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "one":
        print(json.dumps(one(args.job)))
    elif args.verb in ("table", "fused"):
        print({"table": table, "fused": fused}[args.verb](read(args.results)))
    elif args.verb == "figure":
        figure(read(args.results), FIGURE)
    else:
        {"search": search, "run": run, "times": times}[args.verb](args)


if __name__ == "__main__":
    main()

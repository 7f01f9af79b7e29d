"""A V1-style search on Fashion-MNIST: is what it finds at least as accurate as the scaled-down B0, at its MACs?

Claim     Tan & Le 2019, section 4: a search over MnasNet's space with the objective ACC * (MACs/T)^-0.07 finds the
          baseline. Here: within the MACs of a B0 scaled down to 32 px, it finds a network at least as accurate; and
          regularised evolution finds a better one than random search with as many trials.
Protocol  Baseline: efficientnet_b0 with widths x 0.25 (multiples of 4), layers x 0.5, 32 px, the first stride dropped
          so that the last map has 2 x 2 pixels, 10 classes. Space: effnet.search.space.v1 around it, so the baseline
          itself is in it. Objective as in the paper with T the baseline's MACs, and the same as a hard limit.
          Search: --trials candidates by --strategy, judged on validation images cut from the training images, 3,000
          to train on and to validate on, 1 epoch, one in three of them 3. One seed for all, so that they differ by
          architecture alone. Study: runs/search_v1-STRATEGY-....db; the same command goes on with it.
          Judged: the winner and the baseline are trained from random weights on 6,000 images for 8 epochs with the
          recipe of compound.py, seeds 0 to 4, and judged by the last epoch on the 10,000 test images, which the
          search never saw. Differences are paired by seed, Student's t (95 %). "better" or "worse": the interval of
          the difference leaves out 0; "tie": it does not.
Command   python experiments/search_v1.py search --strategy evolution
          python experiments/search_v1.py search --strategy random
          python experiments/search_v1.py run --jobs 2 && python experiments/search_v1.py table
Time      (to be filled in from results/search_v1.jsonl)
Outcome   (to be filled in)

A row of results/search_v1.jsonl per finished search and per training; what is there is not done again.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from compound import append, in_processes, interval, judged, read

from effnet import families
from effnet.coefficients import t_interval
from effnet.cost import cost
from effnet.search.objectives import soft
from effnet.search.space import small, v1
from effnet.search.study import Found, found, searching
from effnet.search.task import Task
from effnet.spec import Network, Rounding

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "search_v1.jsonl"
DATA = "fashion-mnist"
SETTING = ("strategy", "search_seed", "trials", "rungs", "search_images")  # what a search is known by
RUN = ("who", "seed", "epochs", "images")  # and, beside it, a training


def baseline() -> Network:
    """B0 scaled down to small grey images."""
    b0 = families.get("efficientnet_b0").replace(rounding=Rounding(divisor=4))
    made = small(b0, px=32, width=0.25, depth=0.5, least_map=2).with_classes(10)
    mean = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return made.replace(name="b0-like", preprocess=made.preprocess.replace(**mean))


def task(args: argparse.Namespace) -> Task:
    base = baseline()
    macs = cost(base).macs
    return Task(
        space=v1(base),
        objectives=(soft("macs", float(macs)),),
        limits={"macs": float(macs)},
        strategy=args.strategy,
        seed=args.search_seed,
        rungs=tuple(args.rungs),
        about={"data": DATA, "images": args.search_images},
    )


# --- the search -----------------------------------------------------------------------------------------------------


def search(args: argparse.Namespace) -> None:
    """The search; goes on where it was stopped."""
    import torch

    from effnet.data import open_data
    from effnet.plan import environment
    from effnet.proxy import PROXY, fewer, proxy
    from effnet.search.figure import figure
    from effnet.search.records import opened

    torch.set_num_threads(1)
    setting = {name: getattr(args, name) for name in SETTING}
    done = [row for row in read(args.results) if row["kind"] == "search" and same(row, setting, SETTING)]
    if done:
        print(f"done: {done[0]['network']['name']}")
        return
    splits = fewer(open_data(DATA, split_seed=0), args.search_images)
    evaluate = proxy(splits, PROXY.replace(crop="resize"), workers=0)
    name = f"search_v1-{args.strategy.replace(':', '-')}-{args.search_seed}-{args.search_images}-{args.rungs[-1]}"
    study, todo = ROOT / "runs" / f"{name}.db", task(args)
    result: Found | None = None
    for trial in searching(todo, evaluate, study, trials=args.trials):
        result = found(todo, opened(study, todo).trials())
        best = f"best so far {result.best.values['acc']:.4f}" if result.winner is not None else ""
        print(f"{trial.number + 1}/{args.trials} {trial.state} {trial.values.get('acc', 0):.4f} {best}", flush=True)
    result = result or found(todo, opened(study, todo).trials())
    figure(result, study.with_suffix(".png"))
    row = setting | {
        "kind": "search",
        "network": result.network().to_dict(),
        "counts": {state: result.count(state) for state in ("finished", "stopped", "failed")},
        "best": result.best.values,
        "seconds": round(sum(each["seconds"] for t in result.trials for each in t.results), 1),
        "environment": environment("cpu"),
    }
    append(row, args.results)
    print(result.network())


# --- the judgement --------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Trains the baseline and every search's winner on all seeds."""
    rows = read(args.results)
    searches = [row for row in rows if row["kind"] == "search"]
    jobs = []
    for seed in args.seeds:
        networks: list[tuple[Any, Network]] = [("baseline", baseline())]
        networks += [({name: row[name] for name in SETTING}, Network.from_dict(row["network"])) for row in searches]
        for who, network in networks:
            jobs.append(
                {"kind": "training", "who": who, "seed": seed, "epochs": args.epochs, "images": args.images}
                | {"network": network.to_dict(), "data": DATA}
            )
    done = [row for row in rows if row["kind"] == "training"]
    todo = [job for job in jobs if not any(same(row, job, RUN) for row in done)]
    print(f"{len(todo)} trainings to do, {len(jobs) - len(todo)} done", flush=True)
    words = {"baseline": "", "way": "search_v1", "budget": 1}  # what in_processes prints of a job
    in_processes(__file__, [job | words for job in todo], args.results, args.jobs)


def one(job: dict[str, Any]) -> dict[str, Any]:
    return job | judged(Network.from_dict(job["network"]), job)


def same(row: dict[str, Any], other: dict[str, Any], names: tuple[str, ...]) -> bool:
    return all(json.dumps(row.get(name)) == json.dumps(other.get(name)) for name in names)


# --- what came out --------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the baseline and every winner, and winner minus baseline, paired by seed."""
    heads = [
        "network",
        "search",
        "MACs",
        "params",
        "seeds",
        "test accuracy in %",
        "minus the baseline",
        "verdict",
        "search in min",
    ]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "training":
            name = json.dumps([row["epochs"], row["images"], row["who"]])
            groups.setdefault(name, {})[row["seed"]] = row
    for name, seeds in sorted(groups.items(), key=lambda item: '"baseline"' not in item[0]):
        epochs, images, who = json.loads(name)
        row = next(iter(seeds.values()))
        base = groups.get(json.dumps([epochs, images, "baseline"]), {}) if who != "baseline" else {}
        score = {seed: 100 * each["test"]["accuracy"] for seed, each in seeds.items()}
        paired = [score[s] - 100 * base[s]["test"]["accuracy"] for s in sorted(score.keys() & base.keys())]
        bounds = t_interval(paired) if paired else None
        verdict = "" if bounds is None else "better" if bounds[0] > 0 else "worse" if bounds[1] < 0 else "tie"
        spent = (
            [each["seconds"] for each in rows if each["kind"] == "search" and same(each, who, SETTING)] if base else []
        )
        how = (
            f"{who['strategy']} seed {who['search_seed']}, {who['trials']} trials"
            if base
            else f"{images} images, {epochs} epochs"
        )
        cells = [row["network"]["name"], how, f"{row['macs']:,}", f"{row['params']:,}", len(seeds)]
        cells += [interval(list(score.values())), interval(paired) if paired else "", verdict]
        lines.append(" | ".join(map(str, [*cells, f"{statistics.fmean(spent) / 60:.0f}" if spent else ""])))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    hunt = verbs.add_parser("search", help="one search; goes on where it was stopped")
    hunt.add_argument("--strategy", default="evolution")
    hunt.add_argument("--search-seed", type=int, default=0)
    hunt.add_argument("--trials", type=int, default=200)
    hunt.add_argument("--rungs", nargs="+", type=int, default=[1, 3])
    hunt.add_argument("--search-images", type=int, default=3_000)
    judge = verbs.add_parser("run", help="the baseline and all winners, trained and judged on the test images")
    judge.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    judge.add_argument("--epochs", type=int, default=8)
    judge.add_argument("--images", type=int, default=6_000)
    judge.add_argument("--jobs", type=int, default=2)
    single = verbs.add_parser("one", help="one training, as JSON; its row is the last line printed")
    single.add_argument("job", type=json.loads)
    shown = verbs.add_parser("table", help="what came out")
    for each in (hunt, judge, shown):
        each.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "one":
        print(json.dumps(one(args.job)))
    elif args.verb == "table":
        print(table(read(args.results)))
    else:
        {"search": search, "run": run}[args.verb](args)


if __name__ == "__main__":
    main()

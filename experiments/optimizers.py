"""Which optimizer learns the most from random weights, each at its best rate?

Claim     Muon (orthogonal steps for inner convolutions, AdamW for the rest) gets further in the same epochs than AdamW
          and RMSProp: on EfficientNet-B0, whose convolutions are 1x1 or depthwise, and on a network of ordinary ones.
Protocol  Emoji (emoji.py: colour, eight groups, 1,119 training images): B0 at 64 px by the recipe `scratch`, 60 epochs.
          `rmsprop` is that recipe as it was until 2026-11-22, the papers' optimizer with the network's own momentum of
          batch norm; the others have 0.1 and a shorter average of the weights. Fashion-MNIST: the network and the
          recipe of experiments/fashion.py, four epochs, a tenth of the training images held out. Seed 0 at every rate
          of `RATES`; the rate that is best on the validation images, then, with all `--seeds`. Reported on the test
          images, last epoch; Student's t over seeds (95 %), paired by seed.
Command   python experiments/emoji.py data/emoji
          python experiments/optimizers.py run --jobs 2; python experiments/optimizers.py run --jobs 2 --seeds 0 1 2
          python experiments/optimizers.py table
Time      four to six minutes of one core a run
Outcome   pending

A row of results/optimizers.jsonl per run; what is there is not run again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import fashion
from compound import in_processes, interval, markdown, paired, read, score

from effnet.recipes import Recipe
from effnet.spec import Network

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "optimizers.jsonl"
RUNS = ROOT / "runs" / "optimizers"
EPOCHS = {"emoji": 60, "fashion-mnist": 4}
RATES = {  # at 64 images a step on emoji, at 128 on Fashion-MNIST
    "emoji": {"rmsprop": (0.004,), "muon": (0.006, 0.012), "adamw": (0.001, 0.002)},
    "fashion-mnist": {"muon": (0.024, 0.012), "adamw": (0.003, 0.006)},
}
KEYS = ("data", "optimizer", "lr", "seed")
UNTIL_NOW = {"optimizer": "rmsprop", "norm_momentum": None, "weight_decay": 1e-5, "ema": 0.999}


def problem(job: dict[str, Any]) -> tuple[Network, Recipe, str]:
    """The network, the recipe and where the images are."""
    from effnet import recipes
    from effnet.families import get

    if job["data"] == "fashion-mnist":
        todo = fashion.recipe({"epochs": EPOCHS["fashion-mnist"], "seed": job["seed"]})
        made, source = fashion.network(60e6), "fashion-mnist"
    else:
        todo = recipes.get("scratch").replace(epochs=EPOCHS["emoji"], batch=64, lr_batch=64, seed=job["seed"])
        todo = todo.replace(**UNTIL_NOW, size_px=(64, 64), eval_px=64, precision="bfloat16")
        made, source = get("efficientnet_b0"), str(ROOT / "data" / "emoji")
        if job["optimizer"] != "rmsprop":
            todo = todo.replace(norm_momentum=0.1, ema=0.99)
    if job["optimizer"] in ("muon", "adamw"):
        todo = todo.replace(optimizer=job["optimizer"], weight_decay=0.05)
    return made, todo.replace(lr=job["lr"]), source


def one(job: dict[str, Any]) -> dict[str, Any]:
    """One run, its last epoch judged on the validation and the test images."""
    import torch

    from effnet.checkpoint import load, to_model
    from effnet.data import open_data
    from effnet.evaluate import evaluate
    from effnet.network import build
    from effnet.plan import environment
    from effnet.train import train

    made, todo, source = problem(job)
    splits = open_data(source, val_fraction=0.1)
    model = build(made, generator=torch.Generator().manual_seed(job["seed"]))
    out = RUNS / "-".join(str(job[key]) for key in KEYS)
    started = time.process_time()
    train(splits, model, todo, out, workers=0, resume=(out / "last.safetensors").exists())
    spent, last = time.process_time() - started, to_model(load(out / "last.safetensors"))
    assert splits.val is not None
    assert splits.test is not None
    return job | {
        "val": evaluate(last, splits.val, workers=0).metrics,
        "test": evaluate(last, splits.test, workers=0).metrics,
        "recipe": todo.to_dict(),
        "network": made.to_dict(),
        "cpu_seconds": round(spent, 1),
        "environment": environment("cpu"),
    }


def run(args: argparse.Namespace) -> None:
    """The runs that are not in the results yet: without seeds every rate, with seeds each optimizer's best rate."""
    found, jobs = read(args.results), []
    for data in args.data:
        for name in RATES[data]:
            if args.optimizers and name not in args.optimizers:
                continue
            wanted = [(lr, 0) for lr in RATES[data][name]]
            if args.seeds:
                wanted = [(best(found, data, name), seed) for seed in args.seeds]
            jobs += [dict(zip(KEYS, (data, name, *each), strict=True)) for each in wanted]
    done = [{key: row[key] for key in KEYS} for row in found]
    in_processes(__file__, [job for job in jobs if job not in done], args.results, args.jobs, words=said)


def best(found: list[dict[str, Any]], data: str, name: str) -> float:
    """The rate at which seed 0 of an optimizer is the most accurate on the validation images."""
    tried = [row for row in found if (row["data"], row["optimizer"], row["seed"]) == (data, name, 0)]
    if not tried:
        raise SystemExit(f"no rate of {name} was tried on {data} yet: run without --seeds first.")
    return max(tried, key=lambda row: row["val"]["accuracy"])["lr"]


def said(row: dict[str, Any]) -> str:
    run = f"{row['data']}, {row['optimizer']} at {row['lr']:g}, seed {row['seed']}"
    return f"{run}: {score(row):.2f} %, {row['cpu_seconds']} s"


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: each optimizer at each rate, and at its best rate minus Muon's best, by seed."""
    groups: dict[tuple, dict[int, dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["data"], row["optimizer"], row["lr"]), {})[row["seed"]] = row
    lines = []
    for (data, name, lr), seeds in sorted(groups.items()):
        muons = groups[data, "muon", best(found, data, "muon")]
        both = seeds.keys() & muons.keys() if lr == best(found, data, name) and name != "muon" else ()
        versus = paired([score(seeds[seed]) - score(muons[seed]) for seed in sorted(both)])
        tuned = f"{100 * seeds[0]['val']['accuracy']:.2f}"
        seconds = f"{sum(row['cpu_seconds'] for row in seeds.values()) / len(seeds):.0f}"
        lines.append(
            [data, name, f"{lr:g}", tuned, len(seeds), interval(list(map(score, seeds.values()))), *versus, seconds]
        )
    heads = [
        "data",
        "optimizer",
        "rate",
        "seed 0, val",
        "seeds",
        "test accuracy in %",
        "minus Muon",
        "it is",
        "s of a core",
    ]
    return markdown(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    many = verbs.add_parser("run", help="the runs that are not in the results yet")
    many.add_argument("--data", nargs="+", choices=list(RATES), default=list(RATES))
    many.add_argument("--optimizers", nargs="+", choices=sorted({name for each in RATES.values() for name in each}))
    many.add_argument("--seeds", nargs="+", type=int, help="these seeds at the best rate, instead of all rates")
    many.add_argument("--jobs", type=int, default=2)
    single = verbs.add_parser("one", help="one run, as JSON; its row is the last line printed")
    single.add_argument("job", type=json.loads)
    show = verbs.add_parser("table", help="the table in Markdown")
    for sub in (many, show):
        sub.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "one":
        print(json.dumps(one(args.job)))
    elif args.verb == "table":
        print(table(read(args.results)))
    else:
        run(args)


if __name__ == "__main__":
    main()

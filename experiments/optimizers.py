"""Which optimizer learns the most from random weights in a few epochs, each at its best rate?

Claim     Muon (orthogonal steps for inner convolutions) gets further in the same epochs, and in the same time, than
          AdamW, SGD and RMSProp on a network of ordinary convolutions, the fitted one of experiments/fashion.py.
Protocol  Fashion-MNIST without a tenth of its training images, stratified, on which everything is judged: the test
          images are not looked at. The recipe of experiments/fashion.py in six epochs. First seed 0 at every rate of
          `RATES`; then `--seeds` at the rate that was best. Student's t over seeds (95 %), paired by seed.
Command   python experiments/optimizers.py run --jobs 2; python experiments/optimizers.py run --jobs 2 --seeds 0 1 2
          python experiments/optimizers.py table
Time      about five minutes of one core a run
Outcome   pending

A row of results/optimizers.jsonl per run; what is there is not run again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from compound import in_processes, interval, markdown, paired, read
from fashion import network, recipe

RESULTS = Path(__file__).parent.parent / "results" / "optimizers.jsonl"
RUNS = Path(__file__).parent.parent / "runs" / "optimizers"
RATES = {"muon": (0.006, 0.012, 0.024), "adamw": (0.0015, 0.003, 0.006), "sgd": (0.05, 0.2), "rmsprop": (0.0015, 0.006)}
KEYS = ("optimizer", "lr", "seed", "epochs")


def one(job: dict[str, Any]) -> dict[str, Any]:
    """One run, judged on the images held out."""
    import torch

    from effnet.checkpoint import load, to_model
    from effnet.data import open_data
    from effnet.evaluate import evaluate
    from effnet.network import build
    from effnet.plan import environment
    from effnet.train import train

    splits, made = open_data("fashion-mnist", val_fraction=0.1), network(60e6)
    todo = recipe(job).replace(optimizer=job["optimizer"], lr=job["lr"])
    if job["optimizer"] == "sgd":
        todo = todo.replace(weight_decay=5e-4)  # in the gradient, not beside it
    if job["optimizer"] == "rmsprop":
        todo = todo.replace(weight_decay=1e-5)
    model = build(made, generator=torch.Generator().manual_seed(job["seed"]))
    out = RUNS / "-".join(str(job[key]) for key in KEYS)
    started = time.process_time()
    train(splits, model, todo, out, workers=0, resume=(out / "last.safetensors").exists())
    spent = time.process_time() - started
    assert splits.val is not None
    return job | {
        "held_out": evaluate(to_model(load(out / "last.safetensors")), splits.val, workers=0).metrics,
        "recipe": todo.to_dict(),
        "network": made.to_dict(),
        "cpu_seconds": round(spent, 1),
        "environment": environment("cpu"),
    }


def accuracy(row: dict[str, Any]) -> float:
    return 100 * row["held_out"]["accuracy"]


def run(args: argparse.Namespace) -> None:
    """The runs that are not in the results yet: without seeds every rate, with seeds each optimizer's best rate."""
    found = read(args.results)
    wanted = [(name, lr, 0) for name in args.optimizers for lr in RATES[name]]
    if args.seeds:
        wanted = [(name, best(found, name), seed) for name in args.optimizers for seed in args.seeds]
    jobs = [dict(zip(KEYS, (*each, args.epochs), strict=True)) for each in wanted]
    done = [{key: row[key] for key in KEYS} for row in found]
    in_processes(__file__, [job for job in jobs if job not in done], args.results, args.jobs, words=said)


def best(found: list[dict[str, Any]], name: str) -> float:
    """The rate at which seed 0 of an optimizer is the most accurate."""
    tried = [row for row in found if row["optimizer"] == name and row["seed"] == 0]
    if not tried:
        raise SystemExit(f"no rate of {name} was tried yet: run without --seeds first.")
    return max(tried, key=accuracy)["lr"]


def said(row: dict[str, Any]) -> str:
    return f"{row['optimizer']} at {row['lr']:g}, seed {row['seed']}: {accuracy(row):.2f} %, {row['cpu_seconds']} s"


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: each optimizer at each rate, and the best rates minus Muon's, by seed."""
    lines, at = [], {name: best(found, name) for name in RATES if any(row["optimizer"] == name for row in found)}
    for name, lr in sorted({(row["optimizer"], row["lr"]) for row in found}):
        seeds = {row["seed"]: row for row in found if (row["optimizer"], row["lr"]) == (name, lr)}
        muons = {row["seed"]: row for row in found if (row["optimizer"], row["lr"]) == ("muon", at.get("muon"))}
        both = sorted(seeds.keys() & muons.keys()) if lr == at[name] and name != "muon" else []
        verdict = paired([accuracy(seeds[seed]) - accuracy(muons[seed]) for seed in both])
        seconds = sum(row["cpu_seconds"] for row in seeds.values()) / len(seeds)
        values = interval([accuracy(row) for row in seeds.values()])
        lines.append([name, f"{lr:g}", len(seeds), values, *verdict, f"{seconds:.0f}"])
    heads = [
        "optimizer",
        "rate",
        "seeds",
        "held-out accuracy in %",
        "minus Muon, by seed",
        "it is",
        "seconds of a core",
    ]
    return markdown(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    many = verbs.add_parser("run", help="the runs that are not in the results yet")
    many.add_argument("--optimizers", nargs="+", choices=list(RATES), default=list(RATES))
    many.add_argument("--seeds", nargs="+", type=int, help="these seeds at the best rate, instead of all rates")
    many.add_argument("--epochs", type=int, default=6)
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

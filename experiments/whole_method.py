"""The whole method of EfficientNet on a folder of images: does it pay, beside B0 scaled down?

Claim     Tan & Le 2019: search a small baseline, search its coefficients, scale it. Each step takes the file of the one
          before it, and a user with images of their own needs four commands (docs/search.md).
Protocol  Emoji (emoji.py: colour, eight groups, 1,119 training images) at 48 px on one core. The baseline is searched
          in space v1 around B0 with widths x 0.25 and layers x 0.5, within 4 M multiply-adds; alpha, beta and gamma
          on what was found, at twice its cost; then phi = 1 and training from random weights. Beside it, with the same
          recipe: efficientnet_b0 by the paper's coefficients, fitted to the multiply-adds of the result; its sizes step
          by up to 42 % there, so the next one above, too. Test accuracy of the last epoch; seeds draw weights, order
          and views; differences are paired, Student's t (95 %).
Command   python experiments/emoji.py data/emoji
          python experiments/whole_method.py run && python experiments/whole_method.py table
Time      about 35 minutes of one core (OMP_NUM_THREADS=1), six of them for the search and the coefficients
Outcome   56.9 % with 232 k parameters: 3.5 +- 1.6 points ahead of the B0 with 0.75 of its multiply-adds, level with the
          one with 1.06 times as many (-0.3 +- 4.9), which has 862 k parameters.

Every command is printed before it runs; stopped anywhere, the same command goes on. A row of
results/whole_method.jsonl per training.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from compound import append, interval, markdown, paired, read, score

from effnet.plan import environment

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "whole_method.jsonl"
SMALL = "--px 48 --width 0.25 --depth 0.5 --least-map 2"
LIMIT = "4M"  # multiply-adds of the baseline
RECIPE = "--set optimizer=adamw --set lr=2e-3 --set lr_batch=64 --set batch=64 --set weight_decay=1e-2"
RECIPE += " --set norm_momentum=0.1"
ARMS = ("found and scaled", "B0 scaled down, at most its MACs", "B0 scaled down, at least its MACs")
ABOVE = 1.07  # times the MACs: where the next size of B0 is


def effnet(line: str) -> dict[str, Any]:
    """What `effnet LINE --json` answers."""
    print(f"effnet {line}", flush=True)
    command = [sys.executable, "-m", "effnet", *shlex.split(line), "--json"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        sys.exit(f"it ended with {finished.returncode}")
    return json.loads(finished.stdout)


def made(args: argparse.Namespace) -> dict[str, Path]:
    """The networks, each as a file."""
    out, data = args.out, args.data
    out.mkdir(parents=True, exist_ok=True)
    found, scaled = out / "found.json", out / "scaled.json"
    below, above = out / "b0.json", out / "b0-above.json"
    if not scaled.exists():
        effnet(
            f"search --space v1 --baseline efficientnet_b0 {SMALL} --data {data} --epochs 2,6 --trials {args.trials}"
            f" --objective 'acc * (macs/{LIMIT})^-0.07' --limit macs={LIMIT} --study {out / 'search.db'} --save {found}"
        )
        coefficients = effnet(
            f"scale {found} --search-coefficients --data {data} --epochs 6 --seeds 2"
            f" --study {out / 'coefficients.jsonl'}"
        )
        (out / "coefficients.json").write_text(json.dumps(coefficients))
        effnet(f"scale {found} --phi 1 --coefficients {out / 'coefficients.json'} --save {scaled}")
    if not above.exists():
        macs = effnet(f"info {scaled}")["macs"]
        effnet(f"scale efficientnet_b0 --budget macs={macs} --save {below}")
        effnet(f"scale efficientnet_b0 --budget macs={ABOVE * macs:.0f} --save {above}")
    return dict(zip(ARMS, (scaled, below, above), strict=True))


def run(args: argparse.Namespace) -> None:
    """Search, coefficients, scaling, and the trainings that are not in the results yet."""
    for arm, network in made(args).items():
        about = effnet(f"info {network}")
        for seed in args.seeds:
            if any((row["arm"], row["seed"], row["epochs"]) == (arm, seed, args.epochs) for row in read(args.results)):
                continue
            folder, started = args.out / f"{network.stem}-{seed}-{args.epochs}", time.perf_counter()
            resume = "--resume" if folder.exists() else ""
            effnet(
                f"train {args.data} --model {network} --out {folder} {RECIPE} --set epochs={args.epochs}"
                f" --set seed={seed} {resume}"
            )
            test = effnet(f"eval {folder / 'last.safetensors'} {args.data} --split test")
            row = {"arm": arm, "seed": seed, "epochs": args.epochs, "network": json.loads(network.read_text())}
            row |= {"macs": about["macs"], "params": about["params"], "test": test["metrics"]}
            row |= {"seconds": round(time.perf_counter() - started, 1), "environment": environment("cpu")}
            append(row, args.results)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the networks, and by how much the one found is ahead of each other, seed by seed."""
    lines = []
    for epochs in sorted({row["epochs"] for row in rows}):
        by = {arm: {row["seed"]: row for row in rows if (row["arm"], row["epochs"]) == (arm, epochs)} for arm in ARMS}
        found = by[ARMS[0]]
        for arm, seeds in by.items():
            if not seeds:
                continue
            both = sorted(seeds.keys() & found.keys()) if arm != ARMS[0] else []
            row = next(iter(seeds.values()))
            cells = [arm, row["network"]["resolution"], f"{row['macs']:,}", f"{row['params']:,}", epochs, len(seeds)]
            cells.append(interval([score(each) for each in seeds.values()]))
            lines.append([*cells, *paired([score(found[seed]) - score(seeds[seed]) for seed in both])])
    heads = ["network", "px", "MACs", "params", "epochs", "seeds", "test accuracy in %"]
    heads += [f"{ARMS[0]}, minus it", "verdict"]
    return markdown(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    whole = verbs.add_parser("run", help="what is not done yet")
    whole.add_argument("--data", default="data/emoji")
    whole.add_argument("--out", type=Path, default=ROOT / "runs" / "whole")
    whole.add_argument("--trials", type=int, default=20)
    whole.add_argument("--epochs", type=int, default=60)
    whole.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    shown = verbs.add_parser("table", help="what came out")
    for each in (whole, shown):
        each.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "run":
        run(args)
    else:
        print(table(read(args.results)))


if __name__ == "__main__":
    main()

"""Progressive learning: is a rising image size faster, and must regularisation rise too? (EfficientNetV2)

Claim     Tan & Le 2021: training on small images first reaches the accuracy of fixed-size training in less time, and
          only if regularisation is weak while images are small. Goal here: fixed size's accuracy in half its time.
Protocol  Three arms, the same network (EfficientNet-Lite0 from ImageNet weights), epochs, batch, rates and seeds:
          fixed      every epoch at the largest size with the strongest regularisation
          size       four stages of rising size, the strongest regularisation throughout
          adaptive   four stages of rising size and rising regularisation (Algorithm 1)
          "Strength" is RandAugment's magnitude, dropout and drop path; for ELPV, whose cells have no up and whose
          defects are faint, dropout and drop path only. Splits and order by seed; the last epoch's model is judged on
          test images, validation images give the curve. Time is the training steps' own, with waits for data,
          without validation; two runs side by side slow each other, all arms alike. Intervals: Student's t over seeds,
          differences paired by seed.
Command   python experiments/emoji.py data/emoji
          python experiments/progressive.py run --data data/emoji --jobs 2
          python experiments/progressive.py run --data elpv --jobs 2
          python experiments/progressive.py table; python experiments/progressive.py figure
Time      not run yet beyond a trial of one epoch on two sizes
Outcome   none yet

A row of results/progressive.jsonl per run; what is there is not run again.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from compound import in_processes, interval, paired, read

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "progressive.jsonl"
FIGURE = ROOT / "docs" / "figures" / "progressive.png"
ARMS = ("fixed", "size", "adaptive")
STAGES = 4
SIZES = (96, 224)
# from the weakest to the strongest: V2-S's range of dropout, small data's of RandAugment
RISING = {"magnitude": (5, 15), "dropout": (0.1, 0.3), "drop_path": (0.0, 0.2)}
ELPV_RISING = {"magnitude": (0, 0), "dropout": (0.1, 0.3), "drop_path": (0.0, 0.2)}
KEYS = ("arm", "seed", "epochs", "sizes")


def recipe_of(job: dict[str, Any]) -> Any:
    """The recipe of an arm."""
    from effnet import recipes

    elpv = job["data"].startswith("elpv")
    base = recipes.get("inspection" if elpv else "finetune")
    low, high = job["sizes"]
    rising = ELPV_RISING if elpv else RISING
    if job["arm"] != "adaptive":
        rising = {name: (strongest, strongest) for name, (_, strongest) in rising.items()}
    return base.replace(
        epochs=job["epochs"],
        patience=0,
        stages=STAGES,
        size_px=(high, high) if job["arm"] == "fixed" else (low, high),
        eval_px=high,
        precision="bfloat16",
        seed=job["seed"],
        **rising,
    )


def one(job: dict[str, Any]) -> dict[str, Any]:
    """One run: the curve over epochs and the test images at its end."""
    from effnet.checkpoint import load, to_model
    from effnet.data import open_data
    from effnet.evaluate import evaluate
    from effnet.plan import environment
    from effnet.train import train
    from effnet.zoo import load_model

    started = time.perf_counter()
    splits = open_data(job["data"], split_seed=job["seed"])
    recipe = recipe_of(job)
    assert splits.test is not None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train(splits, load_model("efficientnet_lite0.in1k"), recipe, out, workers=0)
        events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        test = evaluate(to_model(load(out / "last.safetensors")), splits.test, bootstrap=0, workers=0)
    return job | {
        "data": Path(job["data"]).name,
        "test": test.metrics,
        "curve": curve(events, len(splits.train)),
        "recipe": recipe.to_dict(),
        "seconds": round(time.perf_counter() - started, 1),
        "environment": environment("cpu"),
    }


def curve(events: list[dict[str, Any]], images: int) -> list[dict[str, float]]:
    """After each epoch: seconds of training so far, images x pixels so far, and validation metrics."""
    found, seconds, pixels = [], 0.0, 0
    for event in events:
        if event["event"] == "step":
            seconds += (event["step_ms"] + event["wait_ms"]) / 1000
        elif event["event"] == "epoch":
            pixels += images * event["size_px"] ** 2
            found.append({"seconds": round(seconds, 2), "pixels": pixels, "val": event["val"]})
    return found


def identity(row: dict[str, Any]) -> str:
    return json.dumps([Path(row["data"]).name, *(row[key] for key in KEYS)])


def run(args: argparse.Namespace) -> None:
    """The runs that are not in the results yet."""
    done = {identity(row) for row in read(args.results)}
    jobs = [
        {"data": args.data, "arm": arm, "seed": seed, "epochs": args.epochs, "sizes": list(args.sizes)}
        for seed, arm in itertools.product(args.seeds, ARMS)
    ]
    todo = [job for job in jobs if identity(job) not in done]
    print(f"{len(todo)} runs to do, {len(done)} in {args.results}", flush=True)
    in_processes(__file__, todo, args.results, args.jobs, words=said)


def said(row: dict[str, Any]) -> str:
    accuracy = 100 * score(row["test"])
    return f"{row['data']} {row['arm']} seed {row['seed']}: {accuracy:.2f} % after {row['curve'][-1]['seconds']:.0f} s"


def score(metrics: dict[str, float]) -> float:
    return metrics.get("weighted_accuracy", metrics["accuracy"])


def grouped(found: list[dict[str, Any]]) -> dict[tuple, dict[str, dict[int, dict[str, Any]]]]:
    """Runs by (data, epochs, sizes), then by arm and seed."""
    groups: dict[tuple, dict[str, dict[int, dict[str, Any]]]] = {}
    for row in found:
        setting = (row["data"], row["epochs"], tuple(row["sizes"]))
        groups.setdefault(setting, {}).setdefault(row["arm"], {})[row["seed"]] = row
    return groups


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: accuracy, time and pixels of each arm, and its difference to fixed size, paired by seed."""
    heads = ["data", "arm", "seeds", "test accuracy in %", "minus fixed", "", "time of fixed's", "pixels of fixed's"]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    for (data, epochs, sizes), arms in sorted(grouped(found).items()):
        for arm in (arm for arm in ARMS if arm in arms):
            seeds, fixed = arms[arm], arms.get("fixed", {})
            both = sorted(seeds.keys() & fixed.keys()) if arm != "fixed" else []
            ends = [(seeds[seed]["curve"][-1], fixed[seed]["curve"][-1]) for seed in both]
            differences, verdict = paired(
                [100 * (score(seeds[seed]["test"]) - score(fixed[seed]["test"])) for seed in both]
            )
            cells = [f"{data}, {epochs} epochs, {sizes[0]} to {sizes[1]} px", arm, len(seeds)]
            cells += [interval([100 * score(row["test"]) for row in seeds.values()]), differences, verdict]
            for unit in ("seconds", "pixels"):
                cells.append(
                    f"{statistics.fmean(mine[unit] / theirs[unit] for mine, theirs in ends):.2f}" if both else ""
                )
            lines.append(" | ".join(map(str, cells)))
    return "\n".join(f"| {line} |" for line in lines)


def figure(found: list[dict[str, Any]], path: Path) -> None:
    """Validation accuracy against seconds of training, a line for every run."""
    from matplotlib.figure import Figure

    from effnet.plots import INK

    groups = sorted(grouped(found).items())
    made = Figure(figsize=(4.6 * len(groups), 3.2), layout="constrained")
    for axes, ((data, epochs, _), arms) in zip(made.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for arm, colour in zip(ARMS, ("#2f7fd1", "#b8860b", "#d1495b"), strict=True):
            for number, row in enumerate(arms.get(arm, {}).values()):
                points = [(point["seconds"], 100 * score(point["val"])) for point in row["curve"]]
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=None if number else arm)
        axes.set_title(f"{data}, {epochs} epochs", fontsize=9, color=INK)
        axes.set_xlabel("seconds of training", fontsize=8, color=INK)
        axes.set_ylabel("validation accuracy in %", fontsize=8, color=INK)
        axes.tick_params(colors=INK, labelsize=7)
        axes.grid(color=INK, alpha=0.25, linewidth=0.6)
        axes.legend(fontsize=7, frameon=False, labelcolor=INK)
        for spine in axes.spines.values():
            spine.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=160, transparent=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    many = verbs.add_parser("run", help="the runs that are not in the results yet")
    many.add_argument("--data", required=True, help="a folder, or elpv")
    many.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    many.add_argument("--epochs", type=int, default=12)
    many.add_argument("--sizes", nargs=2, type=int, default=SIZES)
    many.add_argument("--jobs", type=int, default=2)
    single = verbs.add_parser("one", help="one run, as JSON; its row is the last line printed")
    single.add_argument("job", type=json.loads)
    for verb in ("table", "figure"):
        verbs.add_parser(verb, help=f"the {verb} of all results").add_argument("--out", type=Path, default=FIGURE)
    for verb in verbs.choices.values():
        verb.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "one":
        print(json.dumps(one(args.job)))
    elif args.verb == "run":
        run(args)
    elif args.verb == "table":
        print(table(read(args.results)))
    else:
        figure(read(args.results), args.out)


if __name__ == "__main__":
    main()

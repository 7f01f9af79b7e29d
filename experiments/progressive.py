"""Progressive learning: is a rising image size faster, and must regularisation rise too? (EfficientNetV2)

Claim     Tan & Le 2021: training on small images first reaches the accuracy of fixed-size training in less time, and
          only if regularisation is weak while images are small. Goal here: fixed size's accuracy in half its time.
Protocol  Three arms, the same network (EfficientNet-Lite0 from ImageNet weights), epochs, batch, rates and seeds:
          fixed      every epoch at the largest size with the strongest regularisation
          size       four stages of rising size, the strongest regularisation throughout
          adaptive   four stages of rising size and rising regularisation (Algorithm 1)
          "Strength" is RandAugment's magnitude, dropout and drop path; for ELPV, whose cells have no up and whose
          defects are faint, dropout and drop path only. Splits and order by seed; the last epoch's model is judged on
          test images, validation images give the curve. Time is the processor's for the training steps, one thread,
          decoding and augmentation included, validation not. Intervals: Student's t over seeds, differences paired by
          seed. The last model is also judged with its batch norms' statistics counted anew (`norm_batches`).
Command   python experiments/emoji.py data/emoji
          python experiments/progressive.py run --data data/emoji --sizes 64 160 --epochs 12
          python experiments/progressive.py run --data data/emoji --sizes 64 160 --epochs 9 --arms adaptive  (and 24)
          python experiments/progressive.py run --data elpv --sizes 80 256 --epochs 5
          python experiments/progressive.py table; python experiments/progressive.py figure
Time      Emoji: 46 minutes of one core; ELPV: about 25 a seed
Outcome   Three seeds each. Emoji: size 72.4 and adaptive 72.1 against 73.6 % (ties), in 0.62 and 0.65 of fixed's time,
          adaptive in 9 epochs 71.9 (a tie) in 0.47, in 24 epochs 76.5 (a tie) in 1.17. ELPV: 84.0 and 83.1 against
          83.3 % (ties), in 0.58 and 0.59. Half the time is missed in equal epochs; whether regularisation must rise
          too cannot be told. Statistics counted anew do not help (docs/training-evidence.md).

A row of results/progressive.jsonl per run; what is there is not run again.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compound import in_processes, interval, markdown, paired, read

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "progressive.jsonl"
FIGURE = ROOT / "docs" / "figures" / "progressive.png"
ARMS = ("fixed", "size", "adaptive")
STAGES = 4
SIZES = (64, 160)
NORM_BATCHES = 16  # as many as the statistics are counted anew over
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
    """One run: the curve over epochs and the test images at its end, also with batch norm's statistics counted anew."""
    import torch

    from effnet.checkpoint import load, to_model
    from effnet.data import batches, open_data, order
    from effnet.evaluate import evaluate
    from effnet.images import normalise
    from effnet.optim import renew_norms
    from effnet.plan import environment, precision_context
    from effnet.train import training
    from effnet.zoo import load_model

    torch.set_num_threads(1)
    started = time.perf_counter()
    splits = open_data(job["data"], split_seed=job["seed"])
    recipe = recipe_of(job)
    assert splits.test is not None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        events = training(splits, load_model("efficientnet_lite0.in1k"), recipe, out, workers=0)
        found = curve(events, len(splits.train))
        model = to_model(load(out / "last.safetensors"))
    test = evaluate(model, splits.test, bootstrap=0, workers=0)
    drawn = order(len(splits.train), seed=job["seed"], epoch=0, batch=recipe.batch)
    some = splits.train.subset(drawn[:NORM_BATCHES].ravel())
    preprocess = model.preprocess
    views = batches(some, size_px=preprocess.size, batch=recipe.batch, preprocess=preprocess, train=False, workers=0)
    with precision_context(recipe.precision, "cpu"):
        renew_norms(model, (normalise(batch.images, preprocess) for batch in views))
    return job | {
        "data": Path(job["data"]).name,
        "test": test.metrics,
        "renewed": evaluate(model, splits.test, bootstrap=0, workers=0).metrics,
        "curve": found,
        "recipe": recipe.to_dict(),
        "seconds": round(time.perf_counter() - started, 1),
        "environment": environment("cpu"),
    }


def curve(events: Iterable[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    """After each epoch: seconds of training so far, images x pixels so far, and validation metrics.

    Seconds are the processor's, of this process with one thread, from one event to the next where that is a step.
    """
    found, seconds, pixels, clock = [], 0.0, 0, time.process_time()
    for event in events:
        now = time.process_time()
        if event["event"] == "step":
            seconds += now - clock
        elif event["event"] == "epoch":
            pixels += images * event["size_px"] ** 2
            found.append({"seconds": round(seconds, 2), "pixels": pixels, "val": event["val"]})
        clock = now
    return found


def identity(row: dict[str, Any]) -> str:
    return json.dumps([Path(row["data"]).name, *(row[key] for key in KEYS)])


def run(args: argparse.Namespace) -> None:
    """The runs that are not in the results yet."""
    done = {identity(row) for row in read(args.results)}
    jobs = [
        {"data": args.data, "arm": arm, "seed": seed, "epochs": args.epochs, "sizes": list(args.sizes)}
        for seed, arm in itertools.product(args.seeds, args.arms)
    ]
    todo = [job for job in jobs if identity(job) not in done]
    print(f"{len(todo)} runs to do, {len(done)} in {args.results}", flush=True)
    in_processes(__file__, todo, args.results, args.jobs, words=said)


def said(row: dict[str, Any]) -> str:
    accuracy = 100 * score(row["test"])
    return f"{row['data']} {row['arm']} seed {row['seed']}: {accuracy:.2f} % after {row['curve'][-1]['seconds']:.0f} s"


def score(metrics: dict[str, float]) -> float:
    return metrics.get("weighted_accuracy", metrics["accuracy"])


Runs = dict[tuple[str, int], dict[int, dict[str, Any]]]  # by (arm, epochs), then by seed


def grouped(found: list[dict[str, Any]]) -> list[tuple[str, tuple[int, int], Runs, int]]:
    """(data, sizes, runs, epochs of the fixed size that they are compared with: the longest), a group for each set."""
    groups: dict[tuple, Runs] = {}
    for row in found:
        runs = groups.setdefault((row["data"], tuple(row["sizes"])), {})
        runs.setdefault((row["arm"], row["epochs"]), {})[row["seed"]] = row
    return [
        (data, sizes, runs, max((epochs for arm, epochs in runs if arm == "fixed"), default=0))
        for (data, sizes), runs in sorted(groups.items())
    ]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: accuracy, time and pixels of each arm, and its difference to fixed size, paired by seed."""
    heads = [
        "data",
        "arm",
        "epochs",
        "seeds",
        "test accuracy in %",
        "minus fixed",
        "",
        "time of fixed's",
        "pixels of fixed's",
    ]
    rows = []
    for data, sizes, runs, full in grouped(found):
        fixed = runs.get(("fixed", full), {})
        for (arm, epochs), seeds in sorted(runs.items(), key=lambda item: (ARMS.index(item[0][0]), item[0][1])):
            both = sorted(seeds.keys() & fixed.keys()) if seeds is not fixed else []
            ends = [(seeds[seed]["curve"][-1], fixed[seed]["curve"][-1]) for seed in both]
            differences, verdict = paired(
                [100 * (score(seeds[seed]["test"]) - score(fixed[seed]["test"])) for seed in both]
            )
            cells = [f"{data}, {sizes[0]} to {sizes[1]} px", arm, epochs, len(seeds)]
            cells += [interval([100 * score(row["test"]) for row in seeds.values()]), differences, verdict]
            for unit in ("seconds", "pixels"):
                cells.append(
                    f"{statistics.fmean(mine[unit] / theirs[unit] for mine, theirs in ends):.2f}" if both else ""
                )
            rows.append(cells)
    return markdown(heads, rows)


def figure(found: list[dict[str, Any]], path: Path) -> None:
    """Validation accuracy against seconds of training, a line for every run that is no longer than fixed size's."""
    from matplotlib.figure import Figure

    from effnet.plots import INK

    groups = grouped(found)
    made = Figure(figsize=(4.6 * len(groups), 3.2), layout="constrained")
    colours = dict(zip(ARMS, ("#2f7fd1", "#b8860b", "#d1495b"), strict=True))
    for axes, (data, _, runs, full) in zip(made.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for (arm, epochs), seeds in sorted(runs.items()):
            for number, row in enumerate(seeds.values() if epochs <= full else ()):
                points = [(point["seconds"], 100 * score(point["val"])) for point in row["curve"]]
                style, label = ("-", arm) if epochs == full else (":", f"{arm}, {epochs} epochs")
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=colours[arm],
                    linewidth=1.2,
                    label=None if number else label,
                )
        axes.set_title(f"{data}, {full} epochs", fontsize=9, color=INK)
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
    many.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
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

"""ELPV: how well does a fine-tuned EfficientNet-Lite tell defective solar cells, beside the published CNN and SVM?

Claim     EfficientNet-Lite, fine-tuned from ImageNet weights, is above the 88.42 % weighted accuracy of the published
          CNN (Deitsch et al. 2019: VGG-19, one run, split unpublished) on average over five seeded splits.
Protocol  The same data, the same split sizes and metric as reconstructed from the paper; the paper's split is
          unpublished and it is a single run. 656 test cells, 15 % of the other 1,968 for validation (the paper names
          none). Every choice is made on validation images. The module-wise split stands beside the random one: a random
          split lets a model recognise modules, so expect it to be lower, and to be the honest figure for new modules.
Command   python experiments/elpv.py run --models efficientnet_lite0 --protocols elpv --jobs 2 --set epochs=18
              stages=3 size_px=128,256 freeze=2 ema=0.99 patience=18 precision=bfloat16      (one line)
          python experiments/elpv.py judge    (finished runs once more, with the mean over eight turns)
          python experiments/elpv.py table
Time      15 to 22 minutes a run, two at a time on two cores; results/elpv.jsonl has seconds and environment of each
Outcome   Weighted accuracy, seeds 0-4, plain and as the mean over eight turns: Lite0 87.14 +- 0.99 and 87.76 +- 0.48;
          Lite1 (--refit, ten epochs) 86.17 +- 1.73 and 86.44 +- 1.23; Lite2 (--refit) 87.75 +- 1.35 and
          88.85 +- 1.03: above 88.42 with turns only, and level with it within one standard error. By module, Lite0 with
          the demo's settings 79.36 +- 1.41 and 79.82 +- 2.06 (docs/elpv.md).

Images: CC BY-NC-SA 4.0 (Buerhop-Lutz et al. 2018; Deitsch et al. 2019, 2021); read from the installed package, never
bundled. Weights fine-tuned on them are not for commercial use.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "elpv.jsonl"
PROTOCOLS = ("elpv", "elpv-modules")
PUBLISHED = (("SVM (Deitsch et al. 2019)", 82.44), ("CNN, VGG-19 (Deitsch et al. 2019)", 88.42))
# (heading, metric): the first is the only one that stands beside the published figures
COLUMNS = (
    ("weighted acc. (a)", "weighted_accuracy"),
    ("acc. p>0.5 (b)", "majority_accuracy"),
    ("macro F1 (b)", "majority_macro_f1"),
    ("certain cells (c)", "certain_accuracy"),
    ("AUC (d)", "auroc"),
)


def one(
    model: str, protocol: str, seed: int, settings: dict[str, str], device: str, out: Path, refit: bool
) -> dict[str, Any]:
    """One run: fine-tune on the split of `seed`, then judge the test cells once.

    `refit`: the validation cells are trained on too, so that nothing chooses an epoch: the last one is kept and judged.
    """
    from effnet import recipes
    from effnet.data import open_data
    from effnet.plan import environment
    from effnet.train import train
    from effnet.zoo import load_model

    recipe = recipes.with_settings(recipes.get("inspection"), {"seed": str(seed)} | settings)
    splits = open_data(protocol, split_seed=seed, **({"val_fraction": 0.0} if refit else {}))
    resume = (out / "last.safetensors").exists()  # a run that was cut off goes on
    outcome = train(splits, load_model(f"{model}.in1k"), recipe, out, device=device, resume=resume)
    return {
        "model": model,
        "protocol": protocol,
        "seed": seed,
        "recipe": recipe.to_dict(),
        "settings": settings,
        "refit": refit,
        "val": outcome.metrics or None,
        "best_epoch": outcome.best_epoch,
        **judgement(out / "best.safetensors", splits, device),
        "seconds": round(outcome.seconds, 1),
        "environment": environment(device),
    }


def judgement(kept: Path, splits: Any, device: str) -> dict[str, Any]:
    """The test cells as the run's model sees them: once, and as the mean over their eight flips and turns.

    In float32, as `effnet eval` does it, whatever the precision of training.
    """
    from effnet.evaluate import evaluate
    from effnet.zoo import load_model

    best = load_model(str(kept))
    found = {}
    for key, turns in (("test", False), ("turned", True)):
        judged = evaluate(best, splits.test, device=device, turns=turns, bootstrap=0)
        found[key] = judged.metrics
        found[f"{key}_groups"] = {name: group.metrics for name, group in judged.groups.items()}
    return found


def judge(args: argparse.Namespace) -> None:
    """Judges the finished runs of the results file again, from their run folders; nothing is trained."""
    from effnet.data import open_data

    found = rows(args.results)
    for row in found:
        out = folder(args.runs, row["model"], row["protocol"], row["seed"], row["settings"], row["refit"])
        if not out.exists():
            continue
        if row["refit"] and json.loads((out / "plan.json").read_text())["val_images"]:
            print(out.name, "left as it is: it had validation cells (from before a run could do without)")
        else:
            row |= judgement(out / "best.safetensors", open_data(row["protocol"], split_seed=row["seed"]), args.device)
            print(
                out.name, f"{row['test']['weighted_accuracy']:.4f} {row['turned']['weighted_accuracy']:.4f}", flush=True
            )
    args.results.write_text("".join(json.dumps(row) + "\n" for row in found))


def folder(runs: Path, model: str, protocol: str, seed: int, settings: dict[str, str], refit: bool) -> Path:
    """Where a run is."""
    words = "-".join(f"{name}{value}" for name, value in settings.items())
    return runs / f"{protocol}-{model}-{seed}-{words}{'-refit' if refit else ''}"


def run(args: argparse.Namespace) -> None:
    """All runs that are not in the results file yet, `--jobs` at a time, each a process of its own."""
    done = {identity(row) for row in rows(args.results)}
    todo = [
        (model, protocol, seed)
        for protocol in args.protocols
        for seed in args.seeds
        for model in args.models
        if (model, protocol, seed, json.dumps(parsed(args.set), sort_keys=True), args.refit) not in done
    ]
    print(f"{len(todo)} runs to do, {len(done)} in {args.results}")
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for line in pool.map(lambda job: subrun(args, *job), todo):
            print(line, flush=True)


def subrun(args: argparse.Namespace, model: str, protocol: str, seed: int) -> str:
    """One run in a process of its own; its line is appended to the results when it has finished."""
    command = [sys.executable, __file__, "one", "--model", model, "--protocol", protocol, "--seed", str(seed)]
    command += ["--device", args.device, "--runs", str(args.runs), "--set", *args.set]
    command += ["--refit"] if args.refit else []
    threads = str(max(1, len(os.sched_getaffinity(0)) // args.jobs))
    finished = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": threads}, check=False
    )
    if finished.returncode:
        return f"{model} {protocol} seed {seed}: FAILED\n{finished.stderr[-2000:]}"
    line = finished.stdout.strip().splitlines()[-1]
    args.results.parent.mkdir(exist_ok=True)
    with open(args.results, "a") as file:
        file.write(line + "\n")
    row = json.loads(line)
    test, turned = (row[part]["weighted_accuracy"] for part in ("test", "turned"))
    return f"{model} {protocol} seed {seed}: test {test:.4f}, eight turns {turned:.4f}, in {row['seconds']} s"


def parsed(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


def identity(row: dict[str, Any]) -> tuple:
    return (row["model"], row["protocol"], row["seed"], json.dumps(row["settings"], sort_keys=True), row["refit"])


def rows(path: Path) -> list[dict[str, Any]]:
    """The finished runs; those from before `refit` existed had none."""
    return [{"refit": False} | json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_row(folder: Path) -> dict[str, Any]:
    """A row of the table from a run folder that `effnet eval` has judged."""
    from effnet import checkpoint

    judged = json.loads((folder / "eval.json").read_text())
    plan = json.loads((folder / "plan.json").read_text())
    best = checkpoint.load(folder / "best.safetensors")
    return {
        "model": plan["network"]["name"],
        "protocol": best.extra["data"],
        "seed": plan["recipe"]["seed"],
        "settings": {},
        "refit": False,
        "test": judged["metrics"],
        "test_groups": {name: group["metrics"] for name, group in judged["groups"].items()},
    }


def spread(values: list[float | None], scale: float = 100) -> str:
    """Mean and standard deviation, in per cent."""
    numbers = [scale * value for value in values if value is not None]
    if not numbers:
        return "-"
    mean = statistics.mean(numbers)
    return f"{mean:.2f} ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else f"{mean:.2f}"


def table(found: list[dict[str, Any]]) -> str:
    """The protocol's table in Markdown: published figures, then mean ± sd over seeds; overall, mono, poly."""
    heads = ["", "split", "cells", "seeds", *(heading for heading, _ in COLUMNS)]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    lines += [
        " | ".join([name, "unpublished", "all", "1", f"{value:.2f}", "", "", "", ""]) for name, value in PUBLISHED
    ]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["model"], row["protocol"], identity(row)[3], row["refit"]), []).append(row)
    for (model, protocol, settings, refit), members in sorted(groups.items(), key=lambda item: item[0][1::-1]):
        split = "random" if protocol == "elpv" else "by module"
        label = (model if settings == "{}" else f"{model} {settings}") + (", validation cells too" if refit else "")
        for key, words in (("test", ""), ("turned", ", mean of eight turns")):
            if not all(key in row for row in members):
                continue
            for cells in ("all", "mono", "poly"):
                metrics = [row[key] if cells == "all" else row[f"{key}_groups"].get(cells, {}) for row in members]
                numbers = [spread([one.get(metric) for one in metrics]) for _, metric in COLUMNS]
                lines.append(" | ".join([label + words, split, cells, str(len(members)), *numbers]))
    lines = [f"| {line} |" for line in lines]
    return "\n".join([*lines, "", NOTES])


NOTES = """\
Same data, same split sizes and metric as reconstructed from the paper; the paper's split is unpublished and it is a
single run. In per cent. (a) y = [p > 0], weight 1 if p = 0 else p, threshold 0.5: the only column beside the published
figures. (b) y = [p > 0.5]. (c) cells with p in {0, 1}. (d) area under the ROC curve, y = [p > 0]. With 656 cells one
standard error is about 1.3 points: a gap below 2.5 points to the paper's single run means nothing. By module: trained
on cells 1-2144, tested on 2145-2624. Images: CC BY-NC-SA 4.0 (Buerhop-Lutz 2018; Deitsch 2019, 2021)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    many = verbs.add_parser("run", help="the runs that are not in the results yet")
    many.add_argument("--models", nargs="+", default=["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"])
    many.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS)
    many.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    many.add_argument("--jobs", type=int, default=1)
    many.add_argument("--results", type=Path, default=RESULTS)
    single = verbs.add_parser("one", help="one run; its JSON is the last line printed")
    single.add_argument("--model", required=True)
    single.add_argument("--protocol", required=True, choices=PROTOCOLS)
    single.add_argument("--seed", type=int, required=True)
    for sub in (many, single):
        sub.add_argument("--device", default="cpu")
        sub.add_argument("--runs", type=Path, default=ROOT / "runs" / "elpv")
        sub.add_argument("--refit", action="store_true", help="train on the validation cells too, judge the last epoch")
        sub.add_argument("--set", nargs="*", default=[], help="recipe settings, field=value")
    again = verbs.add_parser("judge", help="judge finished runs again, without training")
    again.add_argument("--results", type=Path, default=RESULTS)
    again.add_argument("--device", default="cpu")
    again.add_argument("--runs", type=Path, default=ROOT / "runs" / "elpv")
    show = verbs.add_parser("table", help="the table of all results, or of evaluated run folders")
    show.add_argument("folders", nargs="*", type=Path)
    show.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "table":
        print(table([run_row(folder) for folder in args.folders] or rows(args.results)))
    elif args.verb == "run":
        run(args)
    elif args.verb == "judge":
        judge(args)
    else:
        out = folder(args.runs, args.model, args.protocol, args.seed, parsed(args.set), args.refit)
        print(json.dumps(one(args.model, args.protocol, args.seed, parsed(args.set), args.device, out, args.refit)))


if __name__ == "__main__":
    main()

"""Compound scaling against depth, width and resolution alone, at equal realised multiply-adds, on two cores.

Claim     Tan & Le 2019, Table 3 and Figure 8: at the same multiply-adds, scaling all three dimensions is better than
          scaling any one of them, for EfficientNet, MobileNet and ResNet baselines alike. And step 1: coefficients
          that were searched for on a baseline are better for it, at a larger budget, than those found on B0.
Protocol  Three baselines of 0.7 to 1.9 M multiply-adds at 32 px (2.25 times that at 48 px), as rows below; widths
          in multiples of 2 and layers rounded to the nearest, so that a budget can be met. Each is fitted
          (effnet.fitting, hard limits) to 2 and 4 times its own multiply-adds along four ways: depth, width and
          resolution alone, and "compound", which is fitted along="free": all three rise by the paper's coefficients
          until a limit stops one, and the others then take what is left. Along the ray itself whole layers of so
          small networks would leave up to a quarter of the budget, and compound would be judged for that. So it is
          compound with its remainder spent, never below the ray's answer in any dimension. Realised costs stand in the
          table: rounding leaves single dimensions below the limit too.
          The same short recipe from random weights for all; test accuracy of the last epoch; seeds 0, 1, 2, which draw
          weights and order. Intervals are Student's t over seeds (95 %), differences to compound are paired by seed.
          Nothing is validated on: no epoch is chosen.
          Fashion-MNIST: 6,000 of its training images, 28 px scaled up, so resolution adds no information.
          Emoji (emoji.py: colour, 256 px, eight groups, 1,599 images): 48 px baselines, where it does.
Command   python experiments/emoji.py data/emoji
          python experiments/compound.py run --data fashion-mnist --jobs 2          (cheaper: --epochs 5 --images 3000)
          python experiments/compound.py run --data emoji --budgets 4 --jobs 2
          python experiments/compound.py search && python experiments/compound.py run --jobs 2 --step2
          python experiments/compound.py table; python experiments/compound.py figure
Time      Of one core: Fashion-MNIST 73 minutes (81 runs), emoji 40 (45 runs at 4 times), the search about 9
Outcome   Fashion-MNIST: width alone is ahead of compound in six cases of six, in two beyond the interval; compound is
          ahead of depth in six (three beyond the interval) and of resolution in five (two). The paper's claim does not
          hold here. The search found width alone too; at four times the multiply-adds its coefficients are
          1.64 +- 0.22 points better than the paper's (docs/scaling.md). Emoji at 4 times, over the three baselines:
          compound is 9.0 +- 5.1 points ahead of depth, 3.0 +- 2.8 of resolution, and ties with width (-1.3 +- 1.4).

A row of results/compound.jsonl per run; what is there is not run again, and runs of other epochs or images never share
a line of the table or a panel of the figure.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from effnet.coefficients import t_interval
from effnet.cost import cost
from effnet.fitting import fit
from effnet.scaling import PAPER, Coefficients
from effnet.spec import Head, Network, Preprocess, Rounding, Stage, Stem

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "compound.jsonl"
STUDY = ROOT / "results" / "compound-search.jsonl"
FIGURE = ROOT / "docs" / "figures" / "compound.png"
WAYS = ("compound", "depth", "width", "resolution")
BUDGETS = (2, 4)
# where, classes, px of the baseline, epochs and training images (0: all) by default, how training sees an image
DATA: dict[str, dict[str, Any]] = {
    "fashion-mnist": {
        "source": "fashion-mnist",
        "classes": 10,
        "px": 32,
        "epochs": 6,
        "images": 6_000,
        "crop": "resize",
    },
    "emoji": {
        "source": str(ROOT / "data" / "emoji"),
        "classes": 8,
        "px": 48,
        "epochs": 10,
        "images": 0,
        "crop": "resize",
    },
    "elpv": {"source": "elpv", "classes": 2, "px": 64, "epochs": 20, "images": 0, "crop": "resize"},  # for searches.py
}


def rows(name: str, stages: tuple[Stage, ...], activation: Any, head: int, stem: int = 8) -> Network:
    """A baseline at 32 px with 10 classes."""
    return Network(
        name=name,
        stem=Stem(width=stem),
        stages=stages,
        head=Head(width=head, classes=10),
        resolution=32,
        preprocess=Preprocess(size=32, resize=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        activation=activation,
        rounding=Rounding(divisor=2, depth="round"),
    )


BASELINES = {
    "efficientnet-like": rows(
        "efficientnet-like",
        (
            Stage(op="mbconv", repeats=1, width=8, stride=1, se=0.25),
            Stage(op="mbconv", repeats=3, width=12, stride=2, expand=4, se=0.25),
            Stage(op="mbconv", repeats=3, width=20, stride=2, expand=4, kernel=5, se=0.25),
            Stage(op="mbconv", repeats=3, width=32, stride=2, expand=4, se=0.25),
        ),
        "silu",
        96,
    ),
    "mobilenetv2-like": rows(
        "mobilenetv2-like",
        (
            Stage(op="mbconv", repeats=1, width=8, stride=1),
            Stage(op="mbconv", repeats=3, width=12, stride=2, expand=4),
            Stage(op="mbconv", repeats=3, width=20, stride=2, expand=4),
            Stage(op="mbconv", repeats=3, width=32, stride=2, expand=4),
        ),
        "relu6",
        96,
    ),
    "resnet-like": rows(
        "resnet-like",
        (
            # no width below 16: torch 2.13 corrupts memory in the backward pass of a 1x1 convolution of stride 2 on 8
            # or 12 channels (channels-last, maps of 60 px and more)
            Stage(op="basic", repeats=1, width=16, stride=2),
            Stage(op="basic", repeats=2, width=20, stride=1),
            Stage(op="basic", repeats=2, width=32, stride=2),
        ),
        "relu",
        head=0,
        stem=16,
    ),
}


def baseline(name: str, data: str, px: int | None = None) -> Network:
    """The baseline for a data set: its classes, its size."""
    network, about = BASELINES[name], DATA[data]
    px = px or about["px"]
    network = network.with_classes(about["classes"])
    return network.replace(resolution=px, preprocess=network.preprocess.with_size(px))


def fitted(name: str, data: str, way: str, budget: int, coefficients: Coefficients) -> Network:
    """The baseline itself (budget 1), or fitted to `budget` times its multiply-adds.

    Compound (`found` too) is fitted "free": the compound ray, and what rounding leaves of the budget goes to whichever
    dimension can still rise. Otherwise whole layers of such small networks would leave it up to a quarter short.
    """
    network = baseline(name, data)
    if budget == 1:
        return network
    along = "free" if way in ("compound", "found") else way
    return fit(network, {"macs": budget * cost(network).macs}, along, coefficients).network


# --- one run --------------------------------------------------------------------------------------------------------


def one(job: dict[str, Any]) -> dict[str, Any]:
    """Trains the network of a job of the grid and judges its last epoch on the test images."""
    network = fitted(job["baseline"], job["data"], job["way"], job["budget"], Coefficients(*job["coefficients"]))
    limit = job["budget"] * cost(baseline(job["baseline"], job["data"])).macs
    return job | {"share_of_limit": cost(network).macs / limit} | judged(network, job)


def judged(network: Network, job: dict[str, Any]) -> dict[str, Any]:
    """`network` after a short training from random weights: `data`, `epochs`, `images` and `seed` of the job."""
    import torch

    from effnet.checkpoint import load, to_model
    from effnet.data import open_data
    from effnet.evaluate import evaluate
    from effnet.network import build
    from effnet.plan import environment
    from effnet.proxy import PROXY, fewer
    from effnet.train import train

    started, about = time.perf_counter(), DATA[job["data"]]
    recipe = PROXY.replace(
        name="compound",
        epochs=job["epochs"],
        seed=job["seed"],
        crop=about["crop"],
        warmup=min(1.0, job["epochs"] / 4),
        precision="bfloat16",
    )
    splits = open_data(about["source"], split_seed=0, val_fraction=0.0)
    if job["images"]:
        splits = fewer(splits, job["images"])
    assert splits.test is not None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        model = build(network, generator=torch.Generator().manual_seed(job["seed"]))
        training = time.perf_counter()
        train(splits, model, recipe, out, workers=0)
        trained = time.perf_counter() - training
        test = evaluate(to_model(load(out / "last.safetensors")), splits.test, bootstrap=0, workers=0)
    spent = cost(network)
    return {
        "network": network.to_dict(),
        "px": network.resolution,
        "macs": spent.macs,
        "params": spent.params,
        "train_images": len(splits.train),
        "images_per_s": round(len(splits.train) * job["epochs"] / trained, 1),
        "test": test.metrics,
        "recipe": recipe.to_dict(),
        "seconds": round(time.perf_counter() - started, 1),
        "environment": environment("cpu"),
    }


# --- the grid -------------------------------------------------------------------------------------------------------


def jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs that the command line asks for, cheap ones first."""
    found = []
    for data, name, seed in itertools.product(args.data, args.baselines, args.seeds):
        ways = [("baseline", 1), *itertools.product(args.ways, args.budgets)]
        coefficients = {way: PAPER for way, _ in ways}
        if args.step2:
            coefficients |= {"found": found_coefficients(args.study)}
            ways = [("found", budget) for budget in args.budgets]
        for way, budget in ways:
            found.append(
                {
                    "data": data,
                    "baseline": name,
                    "way": way,
                    "budget": budget,
                    "seed": seed,
                    "epochs": args.epochs or DATA[data]["epochs"],
                    "images": DATA[data]["images"] if args.images is None else args.images,
                    "coefficients": list(coefficients[way].to_dict().values()),
                }
            )
    return sorted(found, key=lambda job: (job["seed"], job["budget"], job["data"], job["baseline"]))


KEYS = ("data", "baseline", "way", "budget", "seed", "epochs", "images", "coefficients")


def identity(row: dict[str, Any]) -> str:
    return json.dumps([row[key] for key in KEYS])


def read(path: Path) -> list[dict[str, Any]]:
    """The finished runs; a last line that a kill tore is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def run(args: argparse.Namespace) -> None:
    """The runs of the grid that are not in the results yet."""
    done = {identity(row) for row in read(args.results)}
    todo = [job for job in jobs(args) if identity(job) not in done]
    print(f"{len(todo)} runs to do, {len(done)} in {args.results}", flush=True)
    in_processes(__file__, todo, args.results, args.jobs)


def in_processes(
    script: str,
    todo: Sequence[dict[str, Any]],
    results: Path,
    at_once: int,
    words: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """`script one JOB` for every job, each in a process with one thread; rows are appended as they finish."""
    results.parent.mkdir(parents=True, exist_ok=True)
    if results.exists() and not results.read_text().endswith("\n"):  # a line that a kill tore
        whole = results.read_bytes()
        results.write_bytes(whole[: whole.rfind(b"\n") + 1])
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for number, line in enumerate(pool.map(lambda job: subrun(script, job, results, words or said), todo), start=1):
            left = (time.perf_counter() - started) / number * (len(todo) - number)
            print(f"{number}/{len(todo)} {line}; about {left / 60:.0f} min left", flush=True)


def subrun(script: str, job: dict[str, Any], results: Path, words: Callable[[dict[str, Any]], str]) -> str:
    """One run in a process of its own; its line is appended when it has finished."""
    command = [sys.executable, script, "one", json.dumps(job)]
    finished = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    if finished.returncode:
        return f"{json.dumps(job)}: FAILED\n{finished.stderr[-2000:]}"
    row = json.loads(finished.stdout.strip().splitlines()[-1])
    append(row, results)
    return words(row)


def said(row: dict[str, Any]) -> str:
    """A finished run in a line."""
    run = f"{row['data']} {row['baseline']} {row['way']} x{row['budget']} seed {row['seed']}"
    return f"{run}: {score(row):.2f} %, {row['macs']:,} MACs, {row['seconds']} s"


def append(row: dict[str, Any], results: Path) -> None:
    """A row that is on the disk when this returns."""
    with open(results, "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


# --- step 1 ---------------------------------------------------------------------------------------------------------


def search(args: argparse.Namespace) -> None:
    """Alpha, beta and gamma for one baseline at twice its cost; goes on where it was stopped."""
    import torch

    from effnet.coefficients import search_coefficients
    from effnet.data import open_data
    from effnet.heat_map import heat_map
    from effnet.proxy import PROXY, fewer, proxy

    torch.set_num_threads(args.jobs)
    images = DATA["fashion-mnist"]["images"] if args.images is None else args.images
    splits = open_data("fashion-mnist", split_seed=0)
    splits = fewer(splits, images) if images else splits
    found = search_coefficients(
        baseline(args.baselines[0], "fashion-mnist"),
        proxy(splits, PROXY.replace(crop="resize"), workers=0),
        2.0,
        budget=args.epochs or DATA["fashion-mnist"]["epochs"],
        seeds=len(args.seeds),
        tolerance=args.tolerance,
        study=args.study,
        about={"images": images},
        progress=lambda done, total, words: print(f"{done}/{total} {words}", flush=True),
    )
    heat_map(found, FIGURE.with_name("compound-search.png"))
    args.study.with_suffix(".json").write_text(found.to_json())
    for standing in found.standings[: found.rungs[-1].candidates]:
        c, tie = standing.candidate.coefficients, " tie" if standing.tie else ""
        print(f"{c.alpha:g} {c.beta:g} {c.gamma:.4f}  {standing.mean:.4f} {standing.interval}{tie}")


def found_coefficients(study: Path) -> Coefficients:
    """The winner of `search`."""
    kept = study.with_suffix(".json")
    if not kept.exists():
        sys.exit(f"{kept} does not exist: run `compound.py search` first")
    return Coefficients.from_dict(json.loads(kept.read_text())["standings"][0]["candidate"]["coefficients"])


# --- what came out --------------------------------------------------------------------------------------------------


def groups(found: Sequence[dict[str, Any]]) -> dict[tuple, dict[int, dict[str, Any]]]:
    """Runs by (setting, baseline, budget, way), then by seed; a setting is (data, images, epochs)."""
    grouped: dict[tuple, dict[int, dict[str, Any]]] = {}
    for row in found:
        setting = (row["data"], row["images"], row["epochs"])
        way = row["way"] if row["way"] != "found" else f"found {row['coefficients']}"
        grouped.setdefault((setting, row["baseline"], row["budget"], way), {})[row["seed"]] = row
    return dict(sorted(grouped.items()))


def worded(setting: tuple) -> str:
    """As "fashion-mnist, 6,000 images, 8 epochs"."""
    data, images, epochs = setting
    return f"{data}, {f'{images:,}' if images else 'all'} images, {epochs} epochs"


def score(row: dict[str, Any]) -> float:
    """Accuracy on the test images in per cent."""
    return 100 * row["test"]["accuracy"]


def interval(values: Sequence[float]) -> str:
    """Mean and half the width of Student's interval."""
    bounds = t_interval(values)
    mean = statistics.fmean(values)
    return f"{mean:.2f}" if bounds is None else f"{mean:.2f} ± {(bounds[1] - bounds[0]) / 2:.2f}"


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: every group with its realised cost, its accuracy, and compound minus it, by seed; then pooled."""
    heads = ["data", "baseline", "budget", "way", "px", "params", "MACs", "of the limit", "seeds", "accuracy in %"]
    heads += ["compound minus it", "verdict"]
    rows = []
    grouped = groups(found)
    for (setting, name, budget, way), seeds in grouped.items():
        row = next(iter(seeds.values()))
        compound = grouped.get((setting, name, budget, "compound"), {}) if way != "compound" else {}
        cells = [worded(setting), name, f"x{budget}", way, row["px"], f"{row['params']:,}", f"{row['macs']:,}"]
        cells += [f"{100 * row['share_of_limit']:.1f} %", len(seeds)]
        rows.append([*cells, *against(seeds, compound)])
    return f"{markdown(heads, rows)}\n\n{pooled(grouped)}"


def pooled(grouped: dict[tuple, dict[int, dict[str, Any]]]) -> str:
    """Markdown: compound minus each single dimension over all baselines of a data set and budget, paired by both."""
    differences: dict[tuple, list[float]] = {}
    for (setting, name, budget, way), seeds in grouped.items():
        compound = grouped.get((setting, name, budget, "compound"), {})
        if way in WAYS[1:]:
            differences.setdefault((setting, budget, way), []).extend(minus(compound, seeds))
    rows = [
        [worded(setting), f"x{budget}", way, len(values), *paired(values)]
        for (setting, budget, way), values in sorted(differences.items())
    ]
    return markdown(["data", "budget", "way", "pairs", "compound minus it, over the baselines", "verdict"], rows)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [heads, ["---"] * len(heads), *rows])


def minus(reference: dict[int, dict[str, Any]], seeds: dict[int, dict[str, Any]]) -> list[float]:
    """The points by which each run of the reference is above the run of the same seed."""
    return [score(reference[seed]) - score(seeds[seed]) for seed in sorted(seeds.keys() & reference.keys())]


def against(seeds: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]]) -> tuple[str, ...]:
    """Mean of the runs; reference minus them, paired by seed; whether the reference is better, worse, or neither."""
    return interval([score(row) for row in seeds.values()]), *paired(minus(reference, seeds))


def paired(differences: Sequence[float]) -> tuple[str, str]:
    """The mean of paired differences with its interval, and what it says: better, worse, or a tie."""
    bounds = t_interval(differences) if differences else None
    verdict = "" if bounds is None else "better" if bounds[0] > 0 else "worse" if bounds[1] < 0 else "tie"
    return interval(differences) if differences else "", verdict


def figure(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against realised multiply-adds: a panel for every data set and baseline, a line for every way."""
    from matplotlib.figure import Figure

    from effnet.plots import INK

    grouped = groups(found)
    colours = dict(zip(WAYS, ("#d1495b", "#2f7fd1", "#2a9d6f", "#b8860b"), strict=True))
    colours |= {way: "#9467bd" for *_, way in grouped if way.startswith("found")}
    sets, names = (sorted({key[axis] for key in grouped}) for axis in (0, 1))
    made = Figure(figsize=(3.6 * len(names), 3.0 * len(sets)), layout="constrained")
    panels = made.subplots(len(sets), len(names), squeeze=False)
    for (y, setting), (x, name) in itertools.product(enumerate(sets), enumerate(names)):
        axes = panels[y][x]
        for way, colour in colours.items():
            line = [(key, seeds) for key, seeds in grouped.items() if key[:2] == (setting, name) and key[3] == way]
            line = [(key, seeds) for key, seeds in grouped.items() if key == (setting, name, 1, "baseline")] + line
            if len(line) < 2:
                continue
            macs = [next(iter(seeds.values()))["macs"] for _, seeds in line]
            values = [[score(row) for row in seeds.values()] for _, seeds in line]
            half = [(b[1] - b[0]) / 2 if (b := t_interval(group)) else 0.0 for group in values]
            means = [statistics.fmean(group) for group in values]
            axes.errorbar(
                macs, means, half, color=colour, marker="o", markersize=3, capsize=2, linewidth=1.2, label=way
            )
        axes.set_xscale("log")
        axes.set_title(f"{name}\n{worded(setting)}", fontsize=8, color=INK)
        axes.tick_params(colors=INK, which="both", labelsize=7)
        axes.grid(color=INK, alpha=0.25, linewidth=0.6)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if not x:
            axes.set_ylabel("test accuracy in %", color=INK, fontsize=8)
        axes.set_xlabel("realised multiply-adds", color=INK, fontsize=8)
    panels[0][0].legend(fontsize=7, frameon=False, labelcolor=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=160, transparent=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    grid = verbs.add_parser("run", help="the runs that are not in the results yet")
    grid.add_argument("--step2", action="store_true", help="the coefficients that `search` found, along their ray")
    hunt = verbs.add_parser("search", help="step 1: the coefficients of the first of --baselines")
    single = verbs.add_parser("one", help="one run, as JSON; its row is the last line printed")
    single.add_argument("job", type=json.loads)
    for sub in (grid, hunt):
        sub.add_argument("--data", nargs="+", default=["fashion-mnist", "emoji"], choices=DATA)
        sub.add_argument("--baselines", nargs="+", default=list(BASELINES), choices=BASELINES)
        sub.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
        sub.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS))
        sub.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        sub.add_argument("--epochs", type=int, help="default: 6 on fashion-mnist, 10 on emoji; for `search`: 6")
        sub.add_argument("--images", type=int, help="to train on, 0: all; default: 6000 of fashion-mnist, all emoji")
        sub.add_argument("--tolerance", type=float, default=0.05, help="of the search")
        sub.add_argument("--jobs", type=int, default=2)
        sub.add_argument("--study", type=Path, default=STUDY)
        sub.add_argument("--results", type=Path, default=RESULTS)
    for name in ("table", "figure"):
        show = verbs.add_parser(name, help=f"the {name} of all results")
        show.add_argument("--results", type=Path, default=RESULTS)
        if name == "figure":
            show.add_argument("--out", type=Path, default=FIGURE)
    args = parser.parse_args()
    if args.verb == "one":
        print(json.dumps(one(args.job)))
    elif args.verb == "table":
        print(table(read(args.results)))
    elif args.verb == "figure":
        figure(read(args.results), args.out)
    else:
        {"run": run, "search": search}[args.verb](args)


if __name__ == "__main__":
    main()

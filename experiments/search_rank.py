"""Does a short training rank networks as a longer one does? Kendall's tau, on Fashion-MNIST, for both papers' spaces.

Claim     A search by short trainings finds good networks only if their order is that of longer trainings. MnasNet
          trains 5 epochs and EfficientNetV2 about 10 at reduced image size; neither reports how well that ranks.
Protocol  For each space (v1 and v2, around the scaled-down B0 of searches.py) --count networks drawn at random within
          its MACs, no two alike. Each is trained from random weights with effnet.proxy.PROXY for every number of epochs
          of --short on 3,000 images, and for --long epochs on 6,000; accuracy on the validation images (as many). Seed
          0 for the short trainings; the long ones with another seed, so that agreement is not the seed's. Kendall's
          tau-b with a bootstrap interval over networks (95 %, 2,000 resamples).
          Random networks differ more than the candidates near a winner do: the tau of the better half (by the long
          training) stands beside it.
Command   python experiments/search_rank.py run --jobs 2 && python experiments/search_rank.py table
Time      about 35 minutes of one core a space
Outcome   v1, 20 networks: tau 0.48 (0.24 to 0.70) after one epoch, 0.50 (0.27 to 0.70) after three, at a tenth and a
          quarter of the cost; in the better half 0.47, with intervals from 0 to 0.8. v2 was not run.

A row of results/search_rank.jsonl per training; what is there is not done again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from compound import in_processes, read
from searches import baseline, same

from effnet.cost import cost
from effnet.search.objectives import Objective
from effnet.search.ranking import correlation
from effnet.search.space import SPACES, key
from effnet.search.task import Task
from effnet.spec import Network

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "search_rank.jsonl"
DATA = "fashion-mnist"
JOB = ("space", "key", "seed", "epochs", "images")


def drawn(space: str, count: int) -> list[Network]:
    """Networks within the baseline's multiply-adds, no two alike; more of them begin with the same."""
    base = baseline()
    macs = float(cost(base).macs)
    task = Task(space=SPACES[space][0](base), objectives=(Objective("acc"),), limits={"macs": macs}, strategy="random")
    taken: dict[str, Network] = {}
    while len(taken) < count:
        code = task.propose([], taken, len(taken))
        assert code is not None
        network = task.space.network(code)
        taken[key(network)] = network
    return list(taken.values())


def jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All trainings, short ones first."""
    settings = [(epochs, args.images, 0) for epochs in sorted(args.short)] + [(args.long, args.long_images, 1)]
    return [
        {"space": space, "key": key(network), "network": network.to_dict()}
        | {"epochs": epochs, "images": images, "seed": seed}
        for epochs, images, seed in settings
        for space in args.spaces
        for network in drawn(space, args.count)
    ]


def run(args: argparse.Namespace) -> None:
    done = read(args.results)
    todo = [job for job in jobs(args) if not any(same(row, job, JOB) for row in done)]
    print(f"{len(todo)} trainings to do", flush=True)
    in_processes(__file__, todo, args.results, args.jobs, said)


def said(row: dict[str, Any]) -> str:
    """A finished training in a line."""
    return f"{row['space']} {row['epochs']} epochs: {100 * row['accuracy']:.2f} %, {row['seconds']} s"


def one(job: dict[str, Any]) -> dict[str, Any]:
    """One training by the proxy."""
    from effnet.data import open_data
    from effnet.plan import environment
    from effnet.proxy import PROXY, fewer, proxy

    network, started = Network.from_dict(job["network"]), time.perf_counter()
    splits = fewer(open_data(DATA, split_seed=0), job["images"])
    found = proxy(splits, PROXY.replace(crop="resize"), workers=0)(network, job["seed"], job["epochs"])
    seconds = round(time.perf_counter() - started, 1)
    return job | {"accuracy": found, "seconds": seconds, "environment": environment("cpu")}


def tau(pairs: list[tuple[float, float]], epochs: tuple[int, int]) -> list[str]:
    """Tau and its interval, or dashes where one side is all alike: nothing was learnt."""
    if any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return ["–", "–"]
    short, long = zip(*pairs, strict=True)
    found = correlation(short, long, epochs)
    return [f"{found.tau:.2f}", f"{found.low:.2f} to {found.high:.2f}"]


def table(args: argparse.Namespace) -> str:
    """Markdown: for every space and number of short epochs, tau over all networks and over the better half."""
    rows = read(args.results)
    heads = [
        "space",
        "short",
        "long",
        "networks",
        "tau",
        "95 % interval",
        "tau of the better half",
        "95 % interval",
        "cost",
    ]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    for space in args.spaces:

        def known(epochs: int, images: int, seed: int, space: str = space) -> dict[str, dict[str, Any]]:
            wanted = {"space": space, "epochs": epochs, "images": images, "seed": seed}
            return {row["key"]: row for row in rows if same(row, wanted, tuple(wanted))}

        long = known(args.long, args.long_images, 1)
        for epochs in sorted(args.short):
            short = known(epochs, args.images, 0)
            keys = sorted(short.keys() & long.keys(), key=lambda each: -long[each]["accuracy"])
            if len(keys) < 6:
                continue
            cells = [
                space,
                f"{epochs} ep., {args.images} images",
                f"{args.long} ep., {args.long_images} images",
                len(keys),
            ]
            for some in (keys, keys[: len(keys) // 2]):
                pairs = [(short[each]["accuracy"], long[each]["accuracy"]) for each in some]
                cells += tau(pairs, (epochs, args.long))
            spent = [sum(each["seconds"] for each in part.values()) for part in (short, long)]
            lines.append(" | ".join(map(str, [*cells, f"1/{spent[1] / spent[0]:.1f}"])))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, words in (("run", "the trainings that are not in the results yet"), ("table", "what came out")):
        verb = verbs.add_parser(name, help=words)
        verb.add_argument("--spaces", nargs="+", default=["v1", "v2"], choices=SPACES)
        verb.add_argument("--count", type=int, default=20)
        verb.add_argument("--short", nargs="+", type=int, default=[1, 3])
        verb.add_argument("--long", type=int, default=8)
        verb.add_argument("--images", type=int, default=3_000)
        verb.add_argument("--long-images", type=int, default=6_000)
        verb.add_argument("--jobs", type=int, default=2)
        verb.add_argument("--results", type=Path, default=RESULTS)
    single = verbs.add_parser("one", help="one training, as JSON; its row is the last line printed")
    single.add_argument("job", type=json.loads)
    args = parser.parse_args()
    if args.verb == "one":
        print(json.dumps(one(args.job)))
    elif args.verb == "table":
        print(table(args))
    else:
        run(args)


if __name__ == "__main__":
    main()

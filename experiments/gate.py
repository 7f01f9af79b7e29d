"""Does the gate of `effnet export` let good models through and stop damaged ones? Lite0, real weights and photographs.

Claim     A model that was exported wrongly is refused, and nothing that could be used is left behind.
Protocol  EfficientNet-Lite0 with ImageNet weights; the gate's images are its own, the photographs of scikit-image and
          scikit-learn whole and in quarters. Damage: `mean`: the images' mean is 127, which the weights' own Python
          package recommends by mistake; `channels`: red and blue are swapped; `layer`: a residual block's last
          convolution is zero. It is done to the `graph` that is to be exported, or to the `file` alone while it is
          written (an exporter that goes wrong). Every target in float32, and OpenVINO in bfloat16, which may lose
          a point.
Command   python experiments/gate.py run; python experiments/gate.py table
Time      four minutes of one core
Outcome   All 24 damaged exports are refused, the four good ones kept; the least damage, the wrong mean, costs 2 points.

Each run writes results/gate.json anew.
"""

import argparse
import contextlib
import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compound import markdown

from effnet import deploy
from effnet.export import TARGETS
from effnet.export.gate import Samples, photographs
from effnet.export.graph import Deployable
from effnet.network import Model
from effnet.plan import environment
from effnet.zoo import load_model

RESULTS = Path(__file__).parent.parent / "results" / "gate.json"
WAYS = (("onnx", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"), ("torch", "float32"))


def mean(graph: Deployable) -> None:
    """127 of 255 instead of ImageNet's mean, times 255 / 128, as graph.shift is subtracted."""
    graph.shift += (127 / 255 - torch.tensor([0.485, 0.456, 0.406])).view(1, 3, 1, 1) * 255 / 128


def channels(graph: Deployable) -> None:
    graph.model.stem.conv.weight = torch.nn.Parameter(graph.model.stem.conv.weight.flip(1), requires_grad=False)


def layer(graph: Deployable) -> None:
    next(block for stage in graph.model.stages for block in stage if block.shortcut).project.conv.weight.zero_()


DAMAGES: dict[str, Callable[[Deployable], None]] = {"mean": mean, "channels": channels, "layer": layer}


@contextlib.contextmanager
def damaged(where: str, to: str, damage: Callable[[Deployable], None]) -> Iterator[None]:
    """Exports meanwhile are of a damaged graph, or write a damaged file."""
    module = TARGETS[to].load()
    write = module.write

    def graph(*arguments: Any) -> Deployable:
        made = Deployable(*arguments)
        damage(made)
        return made

    def file(whole: Deployable, *rest: Any) -> None:
        made = copy.deepcopy(whole)
        damage(made)
        write(made, *rest)

    with (
        mock.patch.object(deploy, "Deployable", graph) if where == "graph" else mock.patch.object(module, "write", file)
    ):
        yield


def attempt(model: Model, samples: Samples, to: str, precision: str) -> dict[str, Any]:
    """One export: whether it was kept, what was said, and which files are there afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        try:
            made = deploy.export(model, to, samples, out, precision=precision)
            log, kept = made.log, True
        except deploy.GateError as error:
            log, kept = error.log, False
        record = json.loads(log.read_text())
        verdict = record.get("file", record["graph"])
        return {"kept": kept, "verdict": verdict, "files": sorted(path.name for path in out.iterdir())}


def run(path: Path) -> None:
    """All exports, in turn."""
    model = load_model("efficientnet_lite0.in1k")
    samples, rows = photographs(model.preprocess), []
    for to, precision in WAYS:
        cases = [("none", ""), *((name, where) for where in ("graph", "file") for name in DAMAGES)]
        for name, where in cases:
            with damaged(where, to, DAMAGES[name]) if where else contextlib.nullcontext():
                found = attempt(copy.deepcopy(model), samples, to, precision)
            rows.append({"target": to, "precision": precision, "damage": name, "where": where} | found)
            print(to, precision, *line(rows[-1]), sep="  ", flush=True)
    path.write_text(json.dumps({"environment": environment("cpu"), "rows": rows}, indent=1) + "\n")


def line(row: dict[str, Any]) -> list[str]:
    """What was done, and what the gate saw and said of it."""
    verdict, what = row["verdict"], f"{row['damage']} in the {row['where']}" if row["where"] else "none"
    same, error = f"{verdict['same_top1']} of {verdict['images']}", f"{verdict['probability_error']:.1e}"
    said = "kept" if row["kept"] else f"refused: {verdict['reasons'][0]}"
    return [what, same, error, f"{verdict['drop_points']:.2f}", said]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: exports of which the gate said the same share a line."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        groups.setdefault(tuple(line(row)), []).append(f"{row['target']} {row['precision']}")
    heads = ["damage", "exports", "same top-1", "probabilities within", "points lost", "the gate"]
    return markdown(heads, [[what, ", ".join(exports), *rest] for (what, *rest), exports in groups.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "table"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "run":
        run(args.results)
    else:
        print(table(json.loads(args.results.read_text())["rows"]))


if __name__ == "__main__":
    main()

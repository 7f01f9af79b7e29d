"""How much faster is an exported model than timm, and than what OpenVINO makes of timm's own model? One core, batch 1.

For each network timm's model, with random weights and sensible batch norms, is loaded into ours through
`effnet.dialects`, so both compute the same function. Then, one image at a time:

    timm float32           timm as it comes: eager PyTorch, contiguous, evaluation mode, inference mode
    timm float32 cl        the same, channels last
    timm OpenVINO bf16     timm's own model through torch.export and OpenVINO, bf16 hint, latency hint, shape fixed
    effnet openvino P      our artefact, as `effnet export` writes it (without the gate: the weights are random), opened
                           by effnet's engine, in float32, bfloat16 and int8 (calibrated on noise: for its time only)
    effnet onnxruntime     likewise

Ours start from bytes and end in probabilities; timm's start from normalised float32 images and end in logits: what ours
do more counts against them. Two processes work in turns, never at once: timm here, all else in effnet's own
environment, both bound to the same core. Rounds go A B C C B A; a ratio is the median of the rounds' ratios over
`timm float32`. `difference`: from the probabilities of timm in float32, root mean square, relative (with random weights
bfloat16 looks worse than with trained ones).

Run in the peers' environment (README.md beside this file), on a machine that does nothing else, from the root:

    benchmarks/peers/.venv/bin/python -m benchmarks.peers.inference [--settings b0 ...] [--rounds 12] [--core 0]

Prints a table and writes results/inference_peers.json.
"""

import argparse
import copy
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import process
from benchmarks.peers.compare import randomise, torchvision_operators
from effnet import dialects, families
from effnet.checkpoint import Checkpoint, save, to_model
from effnet.checkpoint import load as load_checkpoint
from effnet.images import normalise
from effnet.plan import environment

# name: timm's network, ours, size in px, goal (times timm float32)
SETTINGS = {
    "b0": ("efficientnet_b0", "efficientnet_b0", 224, 3.4),
    "b4": ("efficientnet_b4", "efficientnet_b4", 380, 4.5),
    "v2s": ("tf_efficientnetv2_s", "tf_efficientnetv2_s", 384, 5.0),
    "resnet50": ("resnet50", "resnet50", 224, 10.0),
}
EAGER = ("timm float32", "timm float32 cl")
THEIRS = "timm OpenVINO bf16"
OURS = {  # name: (backend, precision)
    "effnet openvino float32": ("openvino", "float32"),
    "effnet openvino bfloat16": ("openvino", "bfloat16"),
    "effnet openvino int8": ("openvino", "int8"),
    "effnet onnxruntime float32": ("onnxruntime", "float32"),
}
VISIT_S, MOST_CALLS = 0.3, 20  # calls per visit: what fits, but not more
SPREAD = 2.0  # of the logits: a thousand classes with probabilities between 1e-7 and 0.1

operators = functools.cache(torchvision_operators)  # defined once, and kept
Work = Callable[[], Any]


def timed(work: Work, calls: int) -> list[float]:
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


def calls_of(work: Work) -> int:
    """Warms up, and says how many calls make a visit."""
    return max(1, min(MOST_CALLS, int(VISIT_S / timed(work, 3)[-1])))


# --- timm's side ----------------------------------------------------------------------------------------------------


def prepared(setting: str, folder: Path) -> tuple[dict[str, Work], np.ndarray]:
    """timm's calls, and its centred logits for the image that all are given; what the runner needs is in `folder`."""
    theirs, ours, size, _ = SETTINGS[setting]
    operators()
    import timm

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = dialects.native(families.get(ours), "timm")
    network = network.replace(resolution=size, preprocess=network.preprocess.with_size(size))
    views = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    images = normalise(torch.from_numpy(views), network.preprocess).contiguous()
    model = timm.create_model(theirs)
    randomise(model, torch.randn(4, 3, size, size, generator=generator), generator)
    model.eval().requires_grad_(False)
    calm(model, images)
    tensors = dialects.to_effnet(model.state_dict(), network, dialects.recognise(model.state_dict()))
    save(folder / "ours.safetensors", Checkpoint(network=network, preprocess=network.preprocess, tensors=tensors))
    np.save(folder / "views.npy", views)
    np.save(folder / "images.npy", images.numpy())
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (images,)), folder / "theirs.pt2")
        expected = centred(model(images).numpy())
    other = [thing.to(memory_format=torch.channels_last) for thing in (copy.deepcopy(model), images)]
    plain, last = (functools.partial(eager, *pair) for pair in ((model, images), other))
    return dict(zip(EAGER, (plain, last), strict=True)), expected


@torch.no_grad()
def calm(model: Any, images: torch.Tensor) -> None:
    """Logits of these images with a mean of 0 and a spread of `SPREAD`, as trained models have them."""
    layer = model.get_classifier()
    factor = SPREAD / model(images).std()
    layer.weight *= factor
    layer.bias *= factor
    layer.bias -= model(images).mean()


def centred(values: np.ndarray) -> np.ndarray:
    """Logits, or logarithms of probabilities, (N, classes), less their mean over the classes, float64."""
    values = values.astype(np.float64)
    return values - values.mean(1, keepdims=True)


def eager(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images)


def runner(folder: Path, core: int) -> process.Worker:
    """effnet's environment: ready with the differences, answers a name with the seconds of each call of a visit."""
    command = [str(process.ROOT / ".venv/bin/python"), "-m", "benchmarks.peers.inference"]
    env = os.environ | {"PYTHONPATH": str(process.ROOT)}
    return process.Worker([*command, "--serve", str(folder), "--core", str(core)], env)


# --- effnet's side --------------------------------------------------------------------------------------------------


def serve(folder: Path) -> None:
    """Writes the artefacts, says how their answers differ from timm's, then times what it is asked for."""
    lines, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    from effnet.backends import written
    from effnet.engine import open_engine

    views, expected = np.load(folder / "views.npy"), np.load(folder / "expected.npy")
    model = to_model(load_checkpoint(folder / "ours.safetensors"))
    works: dict[str, Work] = {}
    differences = {}
    for name, (backend, precision) in OURS.items():
        engine = open_engine(written(model, backend, precision, folder))
        works[name] = functools.partial(engine, views)
        differences[name] = relative(centred(np.log(works[name]())), expected)
    works[THEIRS] = theirs_in_openvino(folder)
    differences[THEIRS] = relative(centred(works[THEIRS]()), expected)
    calls = {name: calls_of(work) for name, work in works.items()}

    def visit(name: str) -> list[float]:
        works[name]()  # the other process had the caches
        return timed(works[name], calls[name])

    process.serve(differences, visit, lambda: None, lines)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the differences, over that of `expected`."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def theirs_in_openvino(folder: Path) -> Work:
    """timm's own model, as OpenVINO's documents say: convert, fix the shape by the example, bf16 and latency hints."""
    from effnet.export import openvino as target
    from effnet.export.graph import quietly

    openvino = target.package("this benchmark")
    images = np.load(folder / "images.npy")
    with quietly():
        graph = openvino.convert_model(torch.export.load(folder / "theirs.pt2"))
    graph.reshape(list(images.shape))
    core = openvino.Core()
    hints = {"INFERENCE_PRECISION_HINT": target.precision_hint(core, "bfloat16"), "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(graph, "CPU", hints | {"NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": 1})
    request = compiled.create_infer_request()
    return lambda: request.infer([images], share_inputs=True)[0]


# --- both -----------------------------------------------------------------------------------------------------------


def row(setting: str, rounds: int, core: int) -> dict[str, Any]:
    """One network: ratios over `timm float32` and milliseconds, by variant."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        works, expected = prepared(setting, folder)
        np.save(folder / "expected.npy", expected)
        calls = {name: calls_of(work) for name, work in works.items()}
        worker = runner(folder, core)
        names = [*EAGER, THEIRS, *OURS]
        medians: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            seconds: dict[str, list[float]] = {name: [] for name in names}
            for name in (*names, *reversed(names)):
                if name in works:
                    works[name]()
                    seconds[name] += timed(works[name], calls[name])
                else:
                    seconds[name] += worker.ask(name)
            for name, values in seconds.items():
                medians[name].append(statistics.median(values))
        worker.close()
    base = medians[EAGER[0]]
    ratios = {name: [b / t for b, t in zip(base, times, strict=True)] for name, times in medians.items()}
    best = max(OURS, key=lambda name: statistics.median(ratios[name]))
    against = [t / o for t, o in zip(medians[THEIRS], medians[best], strict=True)]
    return {
        "setting": setting,
        "size_px": SETTINGS[setting][2],
        "goal": SETTINGS[setting][3],
        "best": best,
        "best_over_timm_in_openvino_bf16": statistics.median(against),
        "variants": {
            name: {
                "ms": 1e3 * statistics.median(times),
                "times_timm_float32": statistics.median(ratios[name]),
                "ratio_range": [min(ratios[name]), max(ratios[name])],
                "difference": worker.ready.get(name, 0.0),
            }
            for name, times in medians.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--core", type=int, default=0, help="the core that both processes are bound to")
    parser.add_argument("--out", type=Path, default=process.ROOT / "results" / "inference_peers.json")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if args.serve:
        serve(args.serve)
        return
    rows = []
    for setting in args.settings:
        rows.append(row(setting, args.rounds, args.core))
        print(f"\n{setting} at {rows[-1]['size_px']} px, batch 1, one core; goal {rows[-1]['goal']:g}x")
        for name, one in rows[-1]["variants"].items():
            low, high = one["ratio_range"]
            print(
                f"  {name:28} {one['ms']:8.2f} ms {one['times_timm_float32']:6.2f} x ({low:.2f} to {high:.2f})"
                f"   differs by {one['difference']:.1e}",
                flush=True,
            )
        print(f"  best of ours over timm's model in OpenVINO: {rows[-1]['best_over_timm_in_openvino_bf16']:.3f} x")
    document = {"rounds": args.rounds, "environment": environment() | {"threads": 1}, "rows": rows}
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

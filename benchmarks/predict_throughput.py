"""What share of the bare network's speed is left in `predict`? Images per second over those of `effnet bench`.

    python benchmarks/predict_throughput.py [--model efficientnet_b0] [--batch 32] [--threads 1] [--batches 4]

Both run in one process, interleaved by `bench.measure`: the network on normal noise of its input size, as `effnet
bench` times it, and `predict.answers` with an engine of the same weights on photographs that are decoded already (those
of scikit-image, in memory). Predict's part is then everything but decoding: resize and crop on its threads, stacking,
normalisation, softmax, ranking, rows. A call is `--batches` batches, so that work ahead can overlap as in service.

Claim     at least 0.9 on two cores or more, one of them for the network. On one core, the time of the resize is lost.
The last line of stdout is one JSON document; `others` is the share of busy CPU time that other programs took, and above
0.1 the numbers are not to be quoted.
"""

import argparse
import importlib.resources
import itertools
import json
from pathlib import Path

import numpy as np

from effnet import bench, families
from effnet.engine import TorchEngine
from effnet.images import decode
from effnet.inputs import Input, batched
from effnet.predict import answers

PHOTOS = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png", "camera.png", "cell.png", "brick.png", "moon.png")


class Decoded(Input):
    """An input whose image is in memory already."""

    def image(self) -> np.ndarray:
        return PICTURES[self.name]


PICTURES: dict[str, np.ndarray] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_b0")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    folder = Path(str(importlib.resources.files("skimage") / "data"))
    PICTURES.update((name, decode(folder / name)) for name in PHOTOS)
    images = options.batch * options.batches
    stream = [Decoded(name, folder / name) for name in itertools.islice(itertools.cycle(PHOTOS), images)]
    network = families.get(options.model)
    with bench.controlled(options.threads):
        model = bench.ready(network)
        noise = bench.random_images(network, network.resolution, options.batch, "float32")
        engine = TorchEngine(name=network.name, model=model)

        def bare() -> None:
            for _ in range(options.batches):
                model(noise)

        def predicted() -> None:
            rows = list(answers(engine, batched(stream, options.batch), top_k=5))
            assert len(rows) == options.batches

        found = bench.measure({"bench": bare, "predict": predicted}, rounds=options.rounds, warmup=1, calls=1)
    (versus,) = found.comparisons
    speeds = {one.name: 1000 * images / one.value for one in found.measurements}
    share = {"share": 1 / versus.ratio, "spread": [1 / versus.spread[1], 1 / versus.spread[0]]}
    for name, speed in speeds.items():
        print(f"{name:8} {speed:8.1f} images/s")
    print(f"predict over bench: {share['share']:.3f} ({share['spread'][0]:.3f} to {share['spread'][1]:.3f})")
    if found.busy:
        print(f"other programs took {found.others:.0%} of the busy CPU time: do not quote these numbers")
    settings = {name: getattr(options, name) for name in ("model", "batch", "threads", "batches", "rounds")}
    environment = found.measurements[0].environment
    print(
        json.dumps(
            settings | {"images_per_second": speeds} | share | {"others": found.others, "environment": environment}
        )
    )


if __name__ == "__main__":
    main()

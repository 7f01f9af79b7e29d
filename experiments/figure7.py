"""Figure 7 of the EfficientNet paper: class activation maps of scaled models, side by side on real photographs.

Claim     Tan & Le 2019, section 5.4: the compound-scaled model looks at more relevant regions with more detail than the
          baseline and than models scaled in depth, width or resolution alone (the five models of their Table 7).
Command   python experiments/figure7.py
          python experiments/figure7.py --weights deeper=deeper.safetensors ...   (checkpoints of Table 7's models)
Time      a minute or two on two cores
Outcome   docs/figures/figure7_lite.png (trained weights), docs/figures/figure7_table7.png (the paper's arrangement),
          results/figure7.json: per model its cost, per picture probability, insertion and deletion.
          What is shown with trained weights: EfficientNet-Lite0 (baseline), the same weights at 448 px (higher
          resolution, not trained for it), Lite1 (deeper: d = 1.1, and 240 px) and Lite2 (compound: d = 1.2, w = 1.1,
          and 260 px). All columns of a row explain the same class.
          What is not: no trained weights of the five models of Table 7 can be had as packages, nor of any network that
          is only wider. Those five are built as the paper scales them (its rounding, hence its costs), and their maps
          come from random weights: they show the arrangement and the grids (7 x 7 to 14 x 14), and no evidence. The
          paper's claim itself is therefore neither shown nor refuted here; --weights shows it where there are
          checkpoints.

The photographs are those of scikit-image; their classes are what they plainly show, by ImageNet index.
"""

import argparse
import importlib.resources
import json
from pathlib import Path
from typing import Any

from effnet import bench, families
from effnet.cost import cost
from effnet.engine import TorchEngine
from effnet.explain import explain, overlay, save_grid
from effnet.faithfulness import faithfulness
from effnet.images import decode, prepare
from effnet.network import Model
from effnet.scaling import scale
from effnet.spec import Network
from effnet.value import UsageError, check_choice
from effnet.words import short
from effnet.zoo import load_model

ROOT = Path(__file__).parent.parent
PHOTOS = {"coffee.png": 967, "motorcycle_left.png": 665, "chelsea.png": 282, "rocket.jpg": 657}

B0 = families.get("efficientnet_b0")
TABLE_7: dict[str, Network] = {
    "baseline": B0,
    "deeper": scale(B0, depth=4),
    "wider": scale(B0, width=2),
    "higher resolution": scale(B0, resolution=448),
    "compound": scale(B0, depth=1.4, width=1.2, resolution=291),
}


def lite(name: str, size: int | None = None) -> Model:
    """Trained weights, perhaps shown images of another size than they were trained on."""
    model = load_model(f"efficientnet_{name}.in1k")
    if size:
        preprocess = model.preprocess.with_size(size)
        model.network = model.network.replace(resolution=size, preprocess=preprocess)
    return model


def trained() -> dict[str, Model]:
    return {
        "baseline: Lite0": lite("lite0"),
        "higher resolution: Lite0 at 448": lite("lite0", 448),
        "deeper: Lite1": lite("lite1"),
        "compound: Lite2": lite("lite2"),
    }


def table_7(weights: dict[str, str]) -> dict[str, Model]:
    """The models of Table 7; random weights where there is no checkpoint."""
    return {
        name: load_model(weights[name]) if name in weights else bench.ready(network)
        for name, network in TABLE_7.items()
    }


def draw(path: Path, models: dict[str, Model], random: set[str], photos: dict[str, int]) -> list[dict[str, Any]]:
    """The figure, a row per photograph, and what is written in it."""
    folder = Path(str(importlib.resources.files("skimage") / "data"))
    pictures, told = [], []
    for photo, target in photos.items():
        image = decode(folder / photo)
        cells = [(image, "original image")]
        for name, model in models.items():
            why = explain(model, image, target=target)
            size = " x ".join(map(str, why.map.shape))
            row = {"figure": path.name, "photo": photo, "model": name, "label": why.label, "map": size}
            note = f"random weights\n{size}, no evidence"
            if name not in random:
                found = faithfulness(
                    TorchEngine(name=name, model=model), prepare(image, model.preprocess), why.map, target
                )
                row |= {"probability": why.probability} | found.to_dict()
                note = f"{why.label}: {why.probability:.1%}\n{found}"
            cells.append((overlay(image, why.on_image()), f"{name}\n{note}"))
            told.append(row)
            print(json.dumps(row), flush=True)
        pictures.append(cells)
    save_grid(path, pictures, cell_inches=2.0)
    return told


def costs(models: dict[str, Model]) -> list[dict[str, Any]]:
    """Parameters and multiply-adds of each model at the size that it is shown."""
    rows = []
    for name, model in models.items():
        spent = cost(model.network, model.preprocess.size)
        rows.append({"model": name, "network": model.network.name, "size_px": spent.size, "params": spent.params})
        rows[-1]["macs"] = spent.macs
        print(f"{name:34} {spent.size} px, {short(spent.params)} parameters, {short(spent.macs)} MACs")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", action="append", default=[], metavar="MODEL=FILE", help="may be given five times")
    weights: dict[str, str] = {}
    for word in parser.parse_args().weights:
        name, equals, file = word.partition("=")
        check_choice("model of Table 7", name, TABLE_7)
        if not equals:
            raise UsageError(f"--weights {word!r} is not MODEL=FILE.")
        weights[name] = file
    real, scaled = trained(), table_7(weights)
    document = {"lite": costs(real), "table_7": costs(scaled)}
    figures = ROOT / "docs" / "figures"
    pictures = draw(figures / "figure7_lite.png", real, set(), PHOTOS)
    two = dict(list(PHOTOS.items())[:2])
    pictures += draw(figures / "figure7_table7.png", scaled, set(scaled) - set(weights), two)
    (ROOT / "results" / "figure7.json").write_text(json.dumps(document | {"pictures": pictures}, indent=1) + "\n")


if __name__ == "__main__":
    main()

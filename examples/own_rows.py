"""A network of your own, scaled: write its table as rows, and everything in effnet takes it.

    python examples/own_rows.py
    effnet scale own.json --budget macs=100M         # the file that this example writes

The rows are a MobileNetV2-like network for 64 px images. Late stages follow the depth factor more than early ones
(`deepen`), as EfficientNetV2 does, and the resolution stops at 128 px.
"""

import sys
from pathlib import Path

from effnet.cost import cost
from effnet.fitting import fit
from effnet.scaling import scale
from effnet.spec import Head, Network, Preprocess, Stage, Stem

OWN = Network(
    name="own",
    stem=Stem(width=16),
    stages=(
        Stage(op="mbconv", repeats=1, width=16, stride=1, deepen=0),
        Stage(op="mbconv", repeats=2, width=24, stride=2, expand=4),
        Stage(op="mbconv", repeats=2, width=40, stride=2, expand=4, kernel=5, se=0.25),
        Stage(op="mbconv", repeats=2, width=80, stride=2, expand=4, se=0.25, deepen=1.5),
    ),
    head=Head(width=320, classes=10),
    resolution=64,
    preprocess=Preprocess(size=64, resize=64),
)


def main(folder: Path) -> None:
    print(f"baseline   {cost(OWN).macs:,} multiply-adds, {cost(OWN).params:,} parameters")
    for phi in (-1, 1, 2):
        made = scale(OWN, phi, max_resolution=128)
        print(
            f"phi {phi:>2}     {cost(made).macs:,} at {made.resolution} px, layers {[s.repeats for s in made.stages]}"
        )
    found = fit(OWN, {"macs": 100e6, "params": 1e6}, along="free", max_resolution=128)
    print(found.network)
    for use in found.uses:
        print(f"{use.metric:>10} {use.used:,.0f} of {use.limit:,.0f}{', binds' if use.binding else ''}")
    (folder / "own.json").write_text(OWN.to_json())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))

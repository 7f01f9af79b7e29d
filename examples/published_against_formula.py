"""Where the published B1 to B7 depart from the formula of compound scaling: the table in docs/scaling.md.

    python examples/published_against_formula.py

The phi of each member is not published; these are the ones that come nearest (a reader's fit, not the authors').
"""

from effnet import families
from effnet.cost import cost
from effnet.scaling import PAPER, scale

PHI = {"b0": 0, "b1": 0.5, "b2": 1, "b3": 2, "b4": 3.5, "b5": 5, "b6": 6, "b7": 7}


def main() -> None:
    b0 = families.get("efficientnet_b0")
    print("| | published: depth, width, px | MACs | phi | formula: depth, width, px | MACs |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, phi in PHI.items():
        width, depth, px, _, _ = families.V1[name]
        published, made = cost(families.get(f"efficientnet_{name}")), cost(scale(b0, phi))
        d, w, _ = PAPER.factors(phi)
        cells = [name.upper(), f"{depth}, {width}, {px}", f"{published.macs / 1e9:.2f} G", f"{phi:g}"]
        cells += [f"{d:.2f}, {w:.2f}, {made.size}", f"{made.macs / 1e9:.2f} G"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

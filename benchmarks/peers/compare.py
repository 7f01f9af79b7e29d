"""Do our networks compute what timm's and torchvision's compute, with their weights?

For every network that both sides have: build the peer with random weights, give its batch norms statistics, scales and
shifts that matter, load its state dict into ours through `effnet.dialects`, and compare

    params      trainable weights and biases, both sides
    error       max |ours - theirs| over the logits of two random images, float32, evaluation mode, at an even and an
                odd size; `relative` is that over max |theirs|. `float64`: the relative error of the same two networks
                in double precision: it tells rounding (1e-14) from a difference in what is computed
    round trip  our weights written back in their dialect: the same names, and every tensor bitwise the same
    eps         the peer's batch norm epsilon, which ours is set to for the comparison, beside the epsilon of our
                network of that name; `native` says whether `dialects.native` finds the peer's by itself

Run in the peers' own environment (README.md beside this file), from the root of the repository:

    OMP_NUM_THREADS=2 benchmarks/peers/.venv/bin/python -m benchmarks.peers.compare [PATTERN]

It prints a table and, without a PATTERN, writes results/parity_peers.json and the names that the tests compare with,
tests/golden/peer_keys.json. Needs about 12 GB of memory for EfficientNet-L2; the whole table takes some minutes.
"""

import datetime
import fnmatch
import hashlib
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effnet import dialects, families
from effnet.cost import cost
from effnet.network import build

ROOT = Path(__file__).resolve().parents[2]
SEED = 0
SIZES = (128, 97)  # px
TOLERANCE = 1e-4  # relative, float32: hundreds of layers in another order of summation
TOLERANCE_DOUBLE = 1e-11  # relative, float64
ROUNDING = 2**29  # float32's rounding unit over float64's


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A network as a peer calls it, and ours."""

    library: str
    theirs: str
    ours: str

    def build(self) -> nn.Module:
        """The peer's module, random weights."""
        if self.library == "timm":
            import timm

            return timm.create_model(self.theirs)
        import torchvision

        return torchvision.models.get_model(self.theirs, weights=None)


RESNETS = tuple(f"resnet{layers}" for layers in (18, 34, 50, 101, 152))


def pairs() -> Iterator[Pair]:
    """Every network that we and a peer have."""
    v1 = [f"efficientnet_{size}" for size in (*(f"b{i}" for i in range(9)), "l2", *(f"lite{i}" for i in range(5)))]
    v2 = [f"efficientnetv2_{size}" for size in ("s", "m", "l", "xl")]
    v2_tf = [f"tf_efficientnetv2_{size}" for size in ("b0", "b1", "b2", "b3", "s", "m", "l", "xl")]
    others = ("mobilenetv1_100", "mobilenetv2_100", "semnasnet_100", *RESNETS)
    for name in (*v1, *(f"tf_{name}" for name in v1), *v2, *v2_tf, *others):
        yield Pair(library="timm", theirs=name, ours=families.get(name).name)
    torchvision = [*(f"efficientnet_b{i}" for i in range(8)), *(f"efficientnet_v2_{size}" for size in "sml")]
    for name in (*torchvision, "mobilenet_v2", *RESNETS):
        yield Pair(library="torchvision", theirs=name, ours=families.get(name).name)


def torchvision_operators() -> torch.library.Library:
    """Two operators by name alone: torchvision's Python part wants them, its compiled part is not there.

    The definitions live as long as what is returned.
    """
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def norms(model: nn.Module) -> list[Any]:
    """The batch norms; timm's own class, which holds the activation too, is one."""
    return [module for module in model.modules() if hasattr(module, "running_var")]


@torch.no_grad()
def randomise(model: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Gives every batch norm statistics, scale and shift of its own: what its input is for `images`, and noise on that.

    In one pass, each norm before those behind it see its output. With noise added afterwards, or plain random numbers,
    a random network of a hundred layers is chaotic: its logits reach 1e13, and only rounding is compared.
    """
    model.eval()

    def calibrate(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        shape = variance.shape
        norm.running_mean.copy_(mean + 0.1 * variance.sqrt() * torch.randn(shape, generator=generator))
        norm.running_var.copy_(variance * (0.8 + 0.4 * torch.rand(shape, generator=generator)))
        norm.weight *= 0.8 + 0.4 * torch.rand(shape, generator=generator)
        norm.bias += 0.1 * torch.randn(shape, generator=generator)

    hooks = [norm.register_forward_pre_hook(calibrate) for norm in norms(model)]
    model(images)
    for hook in hooks:
        hook.remove()


def key_digest(state: dict[str, Tensor]) -> str:
    """A short digest of all names and shapes, whatever their order."""
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@torch.no_grad()
def compare(pair: Pair) -> dict[str, Any]:
    """One row of the table."""
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)  # the peers draw their weights from the global generator
    network = families.get(pair.ours)
    theirs = pair.build()
    (eps,) = {norm.eps for norm in norms(theirs)}
    dialect = dialects.recognise(theirs.state_dict())
    like_theirs = network.replace(norm=network.norm.replace(eps=eps))
    ours = build(like_theirs).eval()
    bitwise, differences, exact = True, [], []
    for size in SIZES:
        images = torch.randn(8, 3, size, size, generator=generator)
        randomise(theirs, images, generator)
        ours.load_state_dict(dialects.to_effnet(theirs.state_dict(), like_theirs, dialect))
        bitwise &= same(theirs.state_dict(), dialects.from_effnet(ours.state_dict(), like_theirs, dialect))
        differences.append(difference(theirs, ours, images[:2]))
        exact.append(difference(theirs.double(), ours.double(), images[:2].double()))
        theirs, ours = theirs.float(), ours.float()  # exact: the weights were float32
    params = sum(p.numel() for p in theirs.parameters())
    return {
        "library": pair.library,
        "theirs": pair.theirs,
        "ours": pair.ours,
        "dialect": dialect,
        "params": params,
        "params_equal": params == sum(p.numel() for p in ours.parameters()) == cost(network).params,
        "sizes": list(SIZES),
        "max_error": max(d.error for d in differences),
        "relative_error": max(d.error / d.largest for d in differences),
        "relative_error_float64": max(d.error / d.largest for d in exact),
        "max_logit": max(d.largest for d in differences),
        "signal": min(d.signal for d in differences),
        "round_trip_bitwise": bitwise,
        "eps": eps,
        "eps_of_our_network": network.norm.eps,
        "eps_native": dialects.native(network, pair.library).norm.eps,
        "tensors": len(theirs.state_dict()),
        "keys": key_digest(theirs.state_dict()),
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """The same names, and every tensor bitwise the same."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of two networks on two images: max |error|, max |logit|, and how much the images differ (mean |difference|)."""

    error: float
    largest: float
    signal: float


def difference(theirs: nn.Module, ours: nn.Module, images: Tensor) -> Difference:
    """`images`: (2, 3, H, W), of the networks' dtype."""
    expected, found = theirs(images), ours(images)
    return Difference(
        error=float((expected - found).abs().max()),
        largest=float(expected.abs().max()),
        signal=float((expected[0] - expected[1]).abs().mean()),
    )


def passes(row: dict[str, Any]) -> bool:
    """Whether a row is parity: a real signal, a small error, equal counts, the way back bitwise, epsilon known.

    A float32 error above the tolerance is rounding if float64 has the same one, 2^29 times smaller (within 2x). In the
    run of 2026-11-22 that excused one of 67 pairs: timm's efficientnet_l2, 1.3e-4 for a tolerance of 1e-4.
    """
    rounding = 2 * ROUNDING * row["relative_error_float64"]
    return (
        row["relative_error_float64"] <= TOLERANCE_DOUBLE
        and row["relative_error"] <= max(TOLERANCE, rounding)
        and row["signal"] > 100 * row["max_error"]
        and row["params_equal"]
        and row["round_trip_bitwise"]
        and row["eps_native"] == row["eps"]
    )


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    import timm
    import torchvision

    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ":")
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "cpu": cpu.partition(":")[2].strip() or platform.machine(),
        "threads": torch.get_num_threads(),
        "seed": SEED,
    }


def table_line(row: dict[str, Any]) -> str:
    """One row for people."""
    eps, own = row["eps"], row["eps_of_our_network"]
    cells = [
        f"{row['library']:<12}{row['theirs']:<26}{row['params']:>12,}",
        f"{row['max_error']:>9.1e}{row['relative_error']:>10.1e}{row['relative_error_float64']:>9.1e}",
        "  bitwise  " if row["round_trip_bitwise"] else "  DIFFERS  ",
        f"{eps:<6g}{'' if eps == own else f'(ours {own:g})':<14}",
        "ok" if passes(row) else "FAILS",
    ]
    return "".join(cells)


def write(rows: list[dict[str, Any]]) -> None:
    """The result, and the names that effnet's tests compare with where no peer is installed; a line for each row."""
    where = environment()
    report = {"tolerance": TOLERANCE, "tolerance_float64": TOLERANCE_DOUBLE, "environment": where}
    judged = [row | {"agrees": passes(row)} for row in rows]
    (ROOT / "results" / "parity_peers.json").write_text(_document(report, {"rows": judged}))
    source = "benchmarks/peers/compare.py; network of ours, number of tensors, digest of all their names and shapes"
    versions = {name: where[name] for name in ("timm", "torchvision")}
    keys = {
        library: {
            row["theirs"]: [row["ours"], row["tensors"], row["keys"]] for row in rows if row["library"] == library
        }
        for library in versions
    }
    (ROOT / "tests" / "golden" / "peer_keys.json").write_text(_document({"source": source, "versions": versions}, keys))


def _document(head: dict[str, Any], tables: dict[str, Any]) -> str:
    """JSON with one line for each entry of `head` and each row of the `tables` (lists or dicts)."""
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    for name, table in tables.items():
        is_dict = isinstance(table, dict)
        cells = (
            [f"{json.dumps(key)}: {json.dumps(row)}" for key, row in table.items()]
            if is_dict
            else map(json.dumps, table)
        )
        opening, closing = "{}" if is_dict else "[]"
        inside = ",\n  ".join(cells)
        lines.append(f" {json.dumps(name)}: {opening}\n  {inside}\n {closing}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(pattern: str = "") -> int:
    _operators = torchvision_operators()  # held until the end
    print(f"{'library':<12}{'network':<26}{'params':>12}{'error':>9}{'relative':>10}{'float64':>9}  back     eps")
    rows = []
    for pair in pairs():
        if fnmatch.fnmatch(f"{pair.library}:{pair.theirs}", pattern or "*"):
            rows.append(compare(pair))
            print(table_line(rows[-1]), flush=True)
    failed = [row["theirs"] for row in rows if not passes(row)]
    print(f"{len(rows) - len(failed)} of {len(rows)} pairs agree" + (f"; not: {', '.join(failed)}" if failed else ""))
    if not pattern:
        write(rows)
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

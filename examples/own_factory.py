"""A module of your own, scaled: give effnet a function f(depth, width, resolution) -> nn.Module.

    python examples/own_factory.py
    effnet scale examples/own_factory.py:convnet --budget macs=200M --budget params=2M

`depth` and `width` are factors, `resolution` is in pixels; its default says what the baseline sees. You round as you
like. The module is costed on the meta device: nothing is allocated before you ask for it.
"""

from torch import nn

from effnet.factory import Factory
from effnet.fitting import fit
from effnet.scaling import scale


def block(inside: int, outside: int, stride: int) -> nn.Module:
    """A 3x3 convolution, batch norm and ReLU."""
    conv = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU(inplace=True))


def convnet(depth: float = 1.0, width: float = 1.0, resolution: int = 64) -> nn.Module:
    """Three stages that halve the map. `resolution` needs nothing here: the pooling takes any size."""
    widths = [8 * max(1, round(channels * width / 8)) for channels in (24, 48, 96)]
    repeats = max(1, round(2 * depth))
    layers, inside = [], 3
    for outside in widths:
        layers += [block(inside, outside, stride=2), *(block(outside, outside, stride=1) for _ in range(repeats - 1))]
        inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))


def main() -> None:
    mine = Factory(function=convnet)
    print("baseline", mine.spent(1.0, 1.0, mine.resolution)["macs"], "multiply-adds")
    larger = scale(mine, 2)
    print("phi 2   ", larger.to_dict())
    found = fit(mine, {"macs": 200e6, "params": 2e6})
    print("fitted  ", found.network.to_dict())
    for use in found.uses:
        print(f"         {use.metric} {use.used:,.0f} of {use.limit:,.0f}{', binds' if use.binding else ''}")
    module = found.network.build()
    print("built   ", sum(parameter.numel() for parameter in module.parameters()), "parameters")


if __name__ == "__main__":
    main()

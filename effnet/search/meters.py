"""What is measured of a candidate beside its accuracy? The time of a training step, here and now."""

from collections.abc import Callable

import torch

from effnet.network import build
from effnet.plan import step_seconds
from effnet.recipes import Recipe
from effnet.spec import Network


def step_ms(recipe: Recipe, *, device: str = "cpu", steps: int = 5) -> Callable[[Network], float]:
    """Measures a network: the median of `steps` training steps at its resolution, in milliseconds.

    Of `recipe` the batch and the precision count (`auto` is float32). V2's S (Tan & Le 2021, section 3.3); a time is
    not repeatable to the last digit, so a replay of such a search may part from it.
    """
    precision = "float32" if recipe.precision == "auto" else recipe.precision

    def measure(network: Network) -> float:
        model = build(network, generator=torch.Generator().manual_seed(0)).to(device).train()
        options = {"train": True, "steps": steps}
        return 1e3 * step_seconds(model, network.resolution, recipe.batch, precision, device, **options)

    return measure

"""How good would a network be? A short training from random weights, the same for every candidate.

What the search for the coefficients asks (`coefficients.Evaluate`): accuracy on the validation images after `budget`
epochs, without picking the best epoch. Every network is trained and judged at its own resolution.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effnet.checkpoint import load, to_model
from effnet.coefficients import Evaluate
from effnet.data import Cache
from effnet.evaluate import evaluate
from effnet.network import build
from effnet.plan import precision_context
from effnet.recipes import Recipe
from effnet.samples import Source, Splits, by_class, deal
from effnet.spec import Network
from effnet.state import BEST
from effnet.train import Interrupted, score, training
from effnet.value import UsageError

# A short run: the rate falls to zero within the budget, no average of weights that would lag behind.
PROXY = Recipe(
    name="proxy",
    epochs=1,
    batch=64,
    optimizer="adamw",
    lr=2e-3,
    lr_batch=64,
    warmup=0.2,
    norm_momentum=0.1,
    weight_decay=1e-2,
    crop="resize",
    precision="float32",
)


def fewer(splits: Splits, images: int, *, seed: int = 0) -> Splits:
    """The same data with at most `images` images to train on and as many to validate on, every class in its share.

    `UsageError` for fewer images than classes.
    """
    if images < len(splits.classes):
        raise UsageError(f"{images} training images are fewer than the {len(splits.classes)} classes of {splits.name}.")
    note = f"{splits.note} At most {images} images to train on and to validate on, drawn by class, seed {seed}."
    val = None if splits.val is None else _drawn(splits.val, images, seed)
    return replace(splits, train=_drawn(splits.train, images, seed), val=val, note=note)


def _drawn(source: Source, images: int, seed: int) -> Source:
    if images >= len(source):
        return source
    strata = by_class(source)
    ends = np.rint(np.cumsum([len(rows) for rows in strata]) * images / len(source)).astype(int)
    kept, _ = deal(strata, [[int(size)] for size in np.diff(ends, prepend=0)], seed)
    return source.subset(kept)


def proxy(splits: Splits, recipe: Recipe = PROXY, *, device: str = "cpu", workers: int | None = None) -> Evaluate:
    """The function `evaluate(network, seed, budget)`: validation accuracy after `budget` epochs of `recipe`.

    The seed draws the weights, the order of the images and their views; decoded images are kept from one network to
    the next. `KeyboardInterrupt` when a signal stops it.
    """

    if not (val := splits.val):
        raise UsageError(f"{splits.name} has no validation images to judge networks on: keep val_fraction above 0.")
    cache = Cache()

    def judge(network: Any, seed: int, budget: int) -> float:
        if not isinstance(network, Network):
            raise UsageError(f"{network!r:.80} is no Network; train modules of your own in an evaluate of your own.")
        model = build(network, generator=torch.Generator().manual_seed(seed))
        batch = min(recipe.batch, len(splits.train))
        short = recipe.replace(epochs=budget, batch=batch, seed=seed, warmup=min(recipe.warmup, budget / 4))
        options: dict[str, Any] = {"device": device, "workers": workers, "cache": cache}
        with tempfile.TemporaryDirectory(prefix="effnet-proxy-") as folder:
            run, precision = Path(folder) / "run", "float32"
            try:
                for event in training(replace(splits, val=None), model, short, run, **options):
                    precision = event.get("precision", precision)
            except Interrupted:
                raise KeyboardInterrupt from None
            trained = to_model(load(run / BEST))  # without validation images: of the last epoch
        with precision_context(precision, device):
            found = evaluate(trained, val, batch=batch, bootstrap=0, **options)
        return score(found.metrics, short)

    return judge

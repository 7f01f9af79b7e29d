"""Which candidate would Optuna try next? Its tree-structured Parzen estimator, asked anew for every trial.

Optuna's study for the sampler lives in memory and is made from the recorded trials, so TPE keeps to the same contract
as our own strategies. Sources: Bergstra et al. 2011; Ozaki et al. 2020 (several objectives); optuna.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effnet.search.space import Code, Space
from effnet.search.strategies import Seen
from effnet.value import Value, check_range

if TYPE_CHECKING:
    import numpy as np


ASKS = 24  # more are not worth their time: whoever asks repairs what was rejected


@dataclass(frozen=True, kw_only=True)
class TPE(Value):
    """Optuna's `TPESampler` over the digits, as categories; the first `startup` trials are random."""

    startup: int = 20

    def __post_init__(self) -> None:
        check_range("startup", self.startup, 1)

    def proposals(self, space: Space, seen: Sequence[Seen], number: int, rng: "np.random.Generator") -> Iterator[Code]:
        from effnet.search.records import optuna_

        optuna = optuna_()
        judged = [one for one in seen if one.gains is not None]
        options = {
            choice.name: optuna.distributions.CategoricalDistribution(list(range(size)))
            for choice, size in zip(space.choices, space.sizes, strict=True)
        }
        sampler = optuna.samplers.TPESampler(seed=int(rng.integers(2**31)), n_startup_trials=self.startup)
        goals = ["maximize"] * (len(judged[0].gains or ()) if judged else 1)
        study = optuna.create_study(directions=goals, sampler=sampler)
        for one in judged:
            params, values = dict(zip(options, one.code, strict=True)), list(one.gains or ())
            study.add_trial(optuna.trial.create_trial(params=params, distributions=options, values=values))
        for _ in range(ASKS):
            asked = study.ask(fixed_distributions=options)
            yield tuple(asked.params[name] for name in options)

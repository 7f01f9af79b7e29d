"""Which candidate would the papers' controller try next? A recurrent network that decides one digit after another.

An LSTM reads its last decision and gives the probabilities of the next (NASNet's controller, which MnasNet and
EfficientNet use); after every `batch` trials it is improved by proximal policy optimisation on their rewards. It keeps
nothing between calls that could not be had by replaying the recorded trials: what is remembered is only a short cut.

Sources: Zoph & Le 2017; Tan et al. 2019 (MnasNet), section 4.2: PPO on the expected reward; Schulman et al. 2017. Their
settings are not published: those here are ours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from effnet.search.space import Code, Space
from effnet.search.strategies import Seen
from effnet.value import UsageError, Value, check_range

if TYPE_CHECKING:
    import numpy as np

DRAWS = 16  # codes that are sampled at a time


@dataclass(frozen=True, kw_only=True)
class Controller(Value):
    """The policy gradient. `entropy`: what a nat of uncertainty is worth, in standard deviations of the reward."""

    hidden: int = 64
    batch: int = 10
    epochs: int = 8
    lr: float = 0.01
    clip: float = 0.2
    entropy: float = 0.02
    _kept: "dict[Space, _Policy]" = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("hidden", "batch", "epochs"):
            check_range(name, getattr(self, name), 1)
        check_range("lr", self.lr, 1e-6, 1)
        check_range("clip", self.clip, 1e-3, 1)
        check_range("entropy", self.entropy, 0, 10)

    def proposals(self, space: Space, seen: Sequence[Seen], number: int, rng: "np.random.Generator") -> Iterator[Code]:
        judged = [(one.code, one.gains[0]) for one in seen if one.gains is not None]
        if any(len(one.gains or (0,)) > 1 for one in seen):
            raise UsageError("the controller learns from one reward: join the objectives in one expression.")
        whole = tuple(judged[: len(judged) // self.batch * self.batch])
        policy = self._kept.get(space)
        if policy is None or policy.learnt != whole[: len(policy.learnt)]:
            policy = self._kept[space] = _Policy(space, self)
        while len(policy.learnt) < len(whole):
            policy.learn(whole[len(policy.learnt) :][: self.batch])
        while True:
            yield from policy.sample(rng)


class _Policy(nn.Module):
    """The recurrent network, and the trials that it has learnt from."""

    def __init__(self, space: Space, settings: Controller) -> None:
        super().__init__()
        self.sizes, self.settings = space.sizes, settings
        self.learnt: tuple[tuple[Code, float], ...] = ()
        self.level: float | None = None  # of the rewards so far: a moving average
        most, hidden = max(self.sizes), settings.hidden
        with torch.random.fork_rng(devices=[]):  # modules draw from the global generator when they are made
            self.embedding = nn.Embedding(len(self.sizes) * most + 1, hidden, dtype=torch.float64)
            self.lstm = nn.LSTM(hidden, hidden, batch_first=True, dtype=torch.float64)
            self.heads = nn.Linear(hidden, len(self.sizes) * most, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for values in self.parameters():
                values.uniform_(-0.1, 0.1, generator=generator)  # as NASNet's
        self.there = torch.arange(most)[None] < torch.tensor(self.sizes)[:, None]  # (digits, most)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=settings.lr)

    def log_probabilities(self, codes: Tensor) -> Tensor:
        """Of every option at every digit, given the digits before it: (codes, digits) -> (codes, digits, most)."""
        most = self.there.shape[1]
        offsets = 1 + most * torch.arange(len(self.sizes))
        words = torch.cat([torch.zeros(len(codes), 1, dtype=torch.long), (codes + offsets)[:, :-1]], dim=1)
        states, _ = self.lstm(self.embedding(words))  # (codes, digits, hidden)
        return self._normal(torch.einsum("bth,tmh->btm", states, self._weights) + self._biases)

    @property
    def _weights(self) -> Tensor:
        return self.heads.weight.view(len(self.sizes), self.there.shape[1], -1)

    @property
    def _biases(self) -> Tensor:
        return self.heads.bias.view(len(self.sizes), -1)

    def _normal(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(~self.there, -1e9).log_softmax(-1)

    def learn(self, batch: Sequence[tuple[Code, float]]) -> None:
        """Proximal policy optimisation on one batch of trials."""
        codes = torch.tensor([code for code, _ in batch])
        rewards = torch.tensor([reward for _, reward in batch], dtype=torch.float64)
        level = float(rewards.mean()) if self.level is None else self.level
        self.level = 0.8 * level + 0.2 * float(rewards.mean())
        advantages = (rewards - level) / (rewards.std(correction=0) + 1e-8)
        advantages = advantages.clamp(-3, 3)
        chosen = one_hot(codes, self.there.shape[1]).bool()
        with torch.no_grad():
            before = self.log_probabilities(codes)[chosen].view(codes.shape).sum(1)
        for _ in range(self.settings.epochs):
            logs = self.log_probabilities(codes)
            ratio = (logs[chosen].view(codes.shape).sum(1) - before).exp()
            clipped = ratio.clamp(1 - self.settings.clip, 1 + self.settings.clip)
            gain = torch.minimum(ratio * advantages, clipped * advantages).mean()
            entropy = -(logs.exp() * logs).masked_fill(~self.there, 0).sum(-1).mean()
            self.optimizer.zero_grad()
            (-gain - self.settings.entropy * entropy).backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            self.optimizer.step()
        self.learnt = (*self.learnt, *batch)

    @torch.no_grad()
    def sample(self, rng: "np.random.Generator") -> list[Code]:
        """`DRAWS` codes, one decision at a time; the chance comes from `rng`."""
        most, words, state = self.there.shape[1], torch.zeros(DRAWS, 1, dtype=torch.long), None
        digits = []
        for place, size in enumerate(self.sizes):
            out, state = self.lstm(self.embedding(words), state)
            logits = out[:, 0] @ self._weights[place].T + self._biases[place]
            reached = logits.masked_fill(~self.there[place], -1e9).softmax(-1).cumsum(-1)
            coins = torch.from_numpy(rng.random(DRAWS))[:, None]
            digit = (reached < coins).sum(-1).clamp(max=size - 1)
            digits.append(digit)
            words = (1 + most * place + digit)[:, None]
        return [tuple(code) for code in torch.stack(digits, dim=1).tolist()]

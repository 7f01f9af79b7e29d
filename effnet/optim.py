"""Which step does the optimizer take? RMSProp as TensorFlow means it, AdamW, SGD, Muon, and the average of the weights.

PyTorch's RMSProp puts epsilon outside the root and starts its squared average at 0; the published EfficientNet recipes
need TensorFlow's: epsilon inside, the average from 1, the learning rate inside the momentum buffer (papers' released
code). The exponential moving average covers weights and batch-norm statistics and ramps up: min(decay, (1+t)/(10+t)).
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from effnet import ops
from effnet.recipes import Recipe

M = TypeVar("M", bound=nn.Module)


class RMSProp(torch.optim.Optimizer):
    """TensorFlow's RMSProp: s <- a s + (1-a) g^2 (from 1); m <- b m + lr g / sqrt(s + eps); w <- w - m.

    `params`: tensors or groups; `weight_decay` adds w to the gradient times it (half the squared norm in the loss).
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        decay: float = 0.9,
        momentum: float = 0.9,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # ty: ignore[incompatible-method-override]
        """One update of every parameter that has a gradient, all tensors of a group together."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p].update(square=torch.ones_like(p), momentum=torch.zeros_like(p))
            squares = [self.state[p]["square"] for p in params]
            momenta = [self.state[p]["momentum"] for p in params]
            rates = {name: group[name] for name in ("lr", "decay", "momentum", "eps", "weight_decay")}
            ops.rmsprop_step(params, squares, momenta, **rates)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for the weights of convolutions (Jordan et al. 2024), and AdamW for the rest.

    m <- b m + (1-b) g; u = (1-b) g + b m; w <- w - lr (0.2 sqrt(max(rows, columns)) U V^T + decay w), where U S V^T
    is u as a matrix of (out, in * k * k): all directions move alike, however small their gradients. The factor gives a
    step the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one rate and one decay serve both.
    `matrices`, `rest`: groups of parameters with their `weight_decay`.
    """

    def __init__(self, matrices: dict[str, Any], rest: list[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        self._adamw = torch.optim.AdamW(rest, lr=lr, fused=True)
        super().__init__([matrices, *self._adamw.param_groups], {"lr": lr, "momentum": momentum})
        self._adamw.state = self.state  # as the groups are the same dictionaries: one memory, to be saved as one

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # ty: ignore[incompatible-method-override]
        """One update of every parameter that has a gradient; matrices of one shape together."""
        group, shapes = self.param_groups[0], defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                shapes[p.shape].append(p)
        for params in shapes.values():
            grads, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov
            updates = orthogonal(torch.stack([each.flatten(1) for each in ahead]))
            factor = 0.2 * math.sqrt(max(updates.shape[1:]))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            updates = [update.view_as(p) for update, p in zip(updates, params, strict=True)]
            torch._foreach_add_(params, updates, alpha=-group["lr"] * factor)
        self._adamw.step()


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of each of `matrices` (N, rows, columns) = U S V^T: singular values of 0.7 to 1.2, in float32.

    Five rounds of Newton and Schulz's iteration with the coefficients of Jordan et al. 2024, in bfloat16 where the
    device multiplies that. Singular values below a thousandth of the Frobenius norm stay smaller.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    if x.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).float()


def optimizer(model: nn.Module, recipe: Recipe, *, head_only: bool = False) -> torch.optim.Optimizer:
    """The recipe's optimizer for `model`, or AdamW on its classifier alone.

    Two groups: weights, which decay, and norm scales, shifts and biases, which do not (biases do with `decay_bias`).
    Muon's matrices are a group before them.
    """
    if head_only:
        return torch.optim.AdamW(model.get_submodule("classifier").parameters(), lr=recipe.head_lr, weight_decay=0.0)
    matrices, decayed, plain = [], [], []  # matrices: convolutions but the stem and depthwise ones
    for name, parameter in model.named_parameters():
        bias = name.endswith(".bias") and ".norm." not in name
        inner = parameter.ndim == 4 and parameter.shape[1] > 1 and not name.startswith("stem.")
        group = decayed if parameter.ndim > 1 or (bias and recipe.decay_bias) else plain
        (matrices if inner and recipe.optimizer == "muon" else group).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if recipe.optimizer == "rmsprop":
        return RMSProp(groups, lr=recipe.lr, momentum=recipe.momentum)
    if recipe.optimizer == "sgd":
        nesterov = recipe.momentum > 0
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, foreach=True)
    if recipe.optimizer == "muon":
        inside = {"params": matrices, "weight_decay": recipe.weight_decay}
        return Muon(inside, groups, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


def set_learning(model: nn.Module, *, freeze: int = 0, head_only: bool = False) -> None:
    """Decides which parameters learn: all but the stem and the first `freeze` stages, or the classifier alone.

    Autograd then stops where the learning part begins: the backward pass of the rest is never computed.
    """
    model.requires_grad_(not head_only)
    model.get_submodule("classifier").requires_grad_(True)
    for name in ["stem", *(f"stages.{i}" for i in range(freeze))] if freeze else []:
        model.get_submodule(name).requires_grad_(False)


class Average(Generic[M]):
    """The exponential moving average of a model's weights and batch-norm statistics, itself a model to evaluate."""

    def __init__(self, model: M, decay: float) -> None:
        self.decay = decay
        self.model: M = copy.deepcopy(model).requires_grad_(False).eval()
        self._pairs = _pair(self.model, model)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves towards the model after its update number `step` (from 0)."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        averaged, current = self._pairs
        torch._foreach_lerp_(averaged, current, weight)

    @torch.no_grad()
    def reset(self) -> None:
        """Starts again from the model's present state."""
        for averaged, current in zip(*self._pairs, strict=True):
            averaged.copy_(current)


def _pair(averaged: nn.Module, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The floating-point tensors of both, in the same order (the batch counter of batch norm is left alone)."""
    mine, theirs = averaged.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    names = [name for name, tensor in theirs.items() if tensor.is_floating_point()]
    return [mine[name].data for name in names], [theirs[name].data for name in names]


@torch.no_grad()
def renew_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Counts the statistics of every batch norm anew: the plain mean over `batches` (N, C, H, W); nothing else changes.

    While training they are a moving average over changing weights, views and sizes.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta, training = [norm.momentum for norm in norms], model.training
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)


def optimizer_tensors(model: nn.Module, state: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's memory as named tensors, `parameter name/slot`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{slot}": torch.as_tensor(value)
        for parameter, slots in state.state.items()
        for slot, value in slots.items()
    }


def load_optimizer_tensors(model: nn.Module, state: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters[name]
        if tensor.shape == parameter.shape:  # laid out like the parameter: fused steps walk through both by address
            state.state[parameter][slot] = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        else:  # counters stay where they are, on the CPU
            state.state[parameter][slot] = tensor.clone()

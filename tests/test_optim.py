"""Optimizer steps against traces computed by hand, and the moving average against its closed form."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from effnet import optim
from effnet.recipes import FINETUNE


class Two(nn.Module):
    """A weight and a bias, convolutions of one shape, depthwise and first, and a classifier to be trained alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.first = nn.Conv2d(4, 6, 3, bias=False)
        self.second = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=torch.channels_last)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, bias=False)
        self.body = nn.Linear(3, 3)
        self.classifier = nn.Linear(3, 2)


def test_rmsprop_follows_the_trace_computed_by_hand() -> None:
    """One weight, gradients 2, -1, 0.5: s from 1, epsilon inside the root, the rate inside the momentum."""
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    stepper = optim.RMSProp([weight], lr=0.1, decay=0.9, momentum=0.9, eps=1e-3)
    value, square, moment = 1.0, 1.0, 0.0
    for lr, gradient in ((0.1, 2.0), (0.1, -1.0), (0.05, 0.5)):
        stepper.param_groups[0]["lr"] = lr
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        stepper.step()
        square = 0.9 * square + 0.1 * gradient**2
        moment = 0.9 * moment + lr * gradient / math.sqrt(square + 1e-3)
        value -= moment
        assert weight.item() == pytest.approx(value, abs=1e-15)


def test_rmsprop_differs_from_pytorchs_where_epsilon_matters() -> None:
    """With g = 0.01 from s = 1: TensorFlow's first step is lr g / sqrt(0.901), PyTorch's lr g / (sqrt(1e-5) + 1e-3)."""
    ours, theirs = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    first = optim.RMSProp([ours], lr=1.0, momentum=0.0)
    second = torch.optim.RMSprop([theirs], lr=1.0, alpha=0.9, eps=1e-3)
    for parameter, stepper in ((ours, first), (theirs, second)):
        parameter.grad = torch.full((1,), 0.01)
        stepper.step()
    assert ours.item() == pytest.approx(-0.01 / math.sqrt(0.90001 + 0.001), rel=1e-5)
    assert theirs.item() == pytest.approx(-0.01 / (math.sqrt(1e-5) + 1e-3), rel=1e-5)


def test_weight_decay_is_added_to_the_gradient() -> None:
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    stepper = optim.RMSProp([weight], lr=0.1, momentum=0.0, weight_decay=0.5)
    weight.grad = torch.tensor([1.0], dtype=torch.float64)
    stepper.step()
    gradient = 1.0 + 0.5 * 2.0
    assert weight.item() == pytest.approx(2.0 - 0.1 * gradient / math.sqrt(0.9 + 0.1 * gradient**2 + 1e-3), abs=1e-15)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_muon_takes_the_steps_of_pytorchs(shape: tuple[int, int]) -> None:
    """A 1x1 convolution is a matrix: torch.optim.Muon, an implementation of its own, is the peer."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    mine, theirs = nn.Parameter(start[:, :, None, None].clone()), nn.Parameter(start.clone())
    group = {"params": [mine], "weight_decay": 0.1}
    first = optim.Muon(group, [{"params": [nn.Parameter(torch.ones(1))]}], lr=0.02, momentum=0.9)
    second = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for lr in (0.02, 0.02, 0.01):
        grad = torch.randn(shape)
        for parameter, stepper in ((mine, first), (theirs, second)):
            parameter.grad = grad.view_as(parameter).clone()
            stepper.param_groups[0]["lr"] = lr
            stepper.step()
    assert not torch.equal(theirs, start)
    torch.testing.assert_close(mine.flatten(1), theirs, rtol=0, atol=2e-4)  # of steps of 0.01: bfloat16 rounds


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8)])
def test_orthogonal_keeps_the_directions_and_levels_their_lengths(shape: tuple[int, int, int]) -> None:
    """Against the singular value decomposition in float64, over two orders of magnitude of singular values."""
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrices = u * torch.logspace(0, -2, 8, dtype=torch.float64) @ vt
    inside = u.mT @ optim.orthogonal(matrices.float()).double() @ vt.mT
    lengths = inside.diagonal(dim1=1, dim2=2)
    assert lengths.min() > 0.6
    assert lengths.max() < 1.3
    assert (inside - torch.diag_embed(lengths)).abs().max() < 0.06  # bfloat16


def test_muon_steps_inner_convolutions_and_adamw_the_rest() -> None:
    """The stem, depthwise convolutions, biases and the classifier move as AdamW moves them, at the rate that is set."""
    torch.manual_seed(0)
    model = Two()
    peer = copy.deepcopy(model)
    steppers = [
        optim.optimizer(each, FINETUNE.replace(optimizer=name)) for each, name in ((model, "muon"), (peer, "adamw"))
    ]
    for mine, theirs in zip(model.parameters(), peer.parameters(), strict=True):
        mine.grad = torch.randn_like(mine)
        theirs.grad = mine.grad.clone()
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = 0.125
        stepper.step()
    peers = dict(peer.named_parameters())
    same = {name for name, each in model.named_parameters() if torch.equal(each, peers[name])}
    assert set(peers) - same == {"first.weight", "second.weight"}
    slots = {key for key in optim.optimizer_tensors(model, steppers[0]) if key.startswith(("first", "stem"))}
    assert slots == {"first.weight/momentum", "stem.weight/step", "stem.weight/exp_avg", "stem.weight/exp_avg_sq"}


@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adamw", "muon"])
def test_only_weights_decay(name: str) -> None:
    model = Two()
    stepper = optim.optimizer(model, FINETUNE.replace(optimizer=name, weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in stepper.param_groups for p in group["params"]}
    assert decay[id(model.body.weight)] == 0.1
    assert decay[id(model.body.bias)] == 0.0
    with_bias = optim.optimizer(model, FINETUNE.replace(optimizer=name, weight_decay=0.1, decay_bias=True))
    decay = {id(p): group["weight_decay"] for group in with_bias.param_groups for p in group["params"]}
    assert decay[id(model.body.bias)] == 0.1


def test_a_head_only_optimizer_holds_the_classifier_alone() -> None:
    model = Two()
    stepper = optim.optimizer(model, FINETUNE, head_only=True)
    held = {id(p) for group in stepper.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.classifier.parameters()}


def test_the_average_ramps_up_and_then_keeps_its_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = optim.Average(model, decay=0.5)
    expected = model.weight.item()
    for step, value in enumerate([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0]):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert average.model.weight.item() == pytest.approx(expected, rel=1e-6)


def test_the_average_covers_batch_norm_statistics() -> None:
    model = nn.BatchNorm2d(2)
    average = optim.Average(model, decay=0.9)
    model.running_mean.fill_(10.0)
    average.update(10**9)
    assert average.model.running_mean.tolist() == pytest.approx([1.0, 1.0])
    average.reset()
    assert average.model.running_mean.tolist() == [10.0, 10.0]


@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adamw", "muon"])
def test_the_optimizer_goes_on_bit_for_bit_from_its_tensors(name: str) -> None:
    def stepped(model: nn.Module, stepper: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            rng = np.random.default_rng(seed)
            for parameter in model.parameters():
                parameter.grad = torch.tensor(rng.normal(size=parameter.shape), dtype=torch.float32)
            stepper.step()

    recipe = FINETUNE.replace(optimizer=name)
    torch.manual_seed(0)
    model = Two()
    stepper = optim.optimizer(model, recipe)
    stepped(model, stepper, range(3))
    resumed = Two()
    resumed.load_state_dict(model.state_dict())
    again = optim.optimizer(resumed, recipe)
    optim.load_optimizer_tensors(resumed, again, optim.optimizer_tensors(model, stepper))
    stepped(model, stepper, range(3, 6))
    stepped(resumed, again, range(3, 6))
    for left, right in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)

"""A supernet: what is shared and how, that a candidate taken out is what ran, and a training that goes on anywhere."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from effnet.cost import cost
from effnet.data import open_data
from effnet.network import Model
from effnet.optim import renew_norms
from effnet.proxy import PROXY
from effnet.samples import Splits
from effnet.search import supernet
from effnet.search.ranking import longer
from effnet.search.space import Choice, Space, mnasnet, v2, vary
from effnet.search.study import search
from effnet.search.supernet import Supernet, judging, kind, training
from effnet.spec import Head, Network, Preprocess, Stage, Stem
from effnet.train import Diverged
from effnet.value import UsageError
from tests.conftest import picture
from tests.test_cli import refused, run
from tests.test_search_study import TASK, tabulated

BASE = Network(
    name="base",
    stem=Stem(width=8),
    stages=(
        Stage(op="fused", repeats=1, width=8, stride=1, expand=2),
        Stage(op="mbconv", repeats=2, width=12, stride=2, expand=2, se=0.25),
    ),
    head=Head(width=16, classes=2),
    resolution=16,
    preprocess=Preprocess(size=16, resize=16),
)
OPERATORS = ({"op": "mbconv", "se": 0.25}, {"op": "mbconv", "se": 0.0}, {"op": "fused", "se": 0.0})
SPACE = Space(
    name="all",
    base=BASE,
    choices=(
        Choice(path="stem.width", options=(8, 4)),
        Choice(path="stem.kernel", options=(3, 5)),
        *(Choice(path=f"stages.{i}", options=OPERATORS) for i in range(2)),
        *(Choice(path=f"stages.{i}.kernel", options=(3, 5)) for i in range(2)),
        *(Choice(path=f"stages.{i}.expand", options=(1, 2, 3)) for i in range(2)),
        *(Choice(path=f"stages.{i}.width", options=(8, 12)) for i in range(2)),
        *(Choice(path=f"stages.{i}.repeats", options=(1, 3)) for i in range(2)),
        Choice(path="stages.1.skip", options=(True, False)),
        Choice(path="head.width", options=(16, 24)),
    ),
)
RECIPE = PROXY.replace(epochs=2, batch=8, lr=1e-2, lr_batch=8, warmup=0.2)


def images(count: int = 4) -> Tensor:
    return torch.randn((count, 3, 16, 16), generator=torch.Generator().manual_seed(1))


def drawn(space: Space, count: int) -> list[Network]:
    rng = np.random.default_rng(0)
    return [space.network(space.sample(rng)) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and bright pictures."""
    root = tmp_path_factory.mktemp("images")
    for number, name in itertools.product(range(30), ("bright", "dark")):
        (root / name).mkdir(exist_ok=True)
        made = picture(100 * number + len(name)) // 2 + (127 if name == "bright" else 0)
        Image.fromarray(made.astype(np.uint8)).save(root / name / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def splits(folder: Path) -> Splits:
    return open_data(str(folder), split_seed=0, val_fraction=0.4)


# --- what is shared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", drawn(SPACE, 12), ids=lambda network: network.name)
def test_a_candidate_taken_out_answers_as_it_did_inside(network: Network) -> None:
    net, x = Supernet(SPACE, seed=3), images()
    torch.nn.init.normal_(net.get_parameter("classifier.weight"), generator=torch.Generator().manual_seed(4))
    inside, outside = net.logits(network, x), net.model(network).train()(x)
    assert inside.std() > 0.1
    assert torch.allclose(inside, outside, rtol=0, atol=1e-5)
    alone = net.model(network)
    renew_norms(alone, [x])
    model = Model(network)  # and in evaluation, with the same statistics
    model.load_state_dict(alone.state_dict())
    assert torch.equal(model.eval()(x), alone(x))


def test_a_candidate_computes_with_leading_channels_and_the_middle_of_kernels() -> None:
    """By hand, from the shared tensors: a fused stage without expansion, then an MBConv of two blocks."""
    rows = (
        Stage(op="fused", repeats=1, width=8, stride=1, expand=1, kernel=3),
        Stage(op="mbconv", repeats=1, width=8, stride=2, expand=2, kernel=3, se=0.25),
    )
    small = BASE.replace(stem=Stem(width=4), stages=rows)
    net = Supernet(SPACE, seed=3)
    code = SPACE.encode(small.replace(name="small"))
    torch.nn.init.normal_(net.get_parameter("classifier.weight"), generator=torch.Generator().manual_seed(4))
    shared = dict(net.named_parameters())

    def norm(x: Tensor, name: str, channels: int) -> Tensor:
        scale, shift = (shared[f"{name}.norm.{what}"][:channels] for what in ("weight", "bias"))
        return F.batch_norm(x, None, None, scale, shift, training=True, eps=small.norm.eps)

    x = F.silu(norm(F.conv2d(images(), shared["stem.conv.weight"][:4, :, 1:4, 1:4], None, 2, 1), "stem", 4))
    name = "stages.0.0.fused1.project"
    x = F.silu(norm(F.conv2d(x, shared[f"{name}.conv.weight"][:8, :4, 1:4, 1:4], None, 1, 1), name, 8))
    name = "stages.1.0.mbconv"
    x = F.silu(norm(F.conv2d(x, shared[f"{name}.expand.conv.weight"][:16, :8]), f"{name}.expand", 16))
    depthwise = shared[f"{name}.depthwise.conv.weight"][:16, :, 1:4, 1:4]
    x = F.silu(norm(F.conv2d(x, depthwise, None, 2, 1, groups=16), f"{name}.depthwise", 16))
    weights = {which: shared[f"{name}.se.{which}.weight"] for which in ("reduce", "expand")}
    biases = {which: shared[f"{name}.se.{which}.bias"] for which in ("reduce", "expand")}
    gate = F.silu(F.conv2d(x.mean((2, 3), keepdim=True), weights["reduce"][:2, :16], biases["reduce"][:2]))
    x = x * F.conv2d(gate, weights["expand"][:16, :2], biases["expand"][:16]).sigmoid()
    x = norm(F.conv2d(x, shared[f"{name}.project.conv.weight"][:8, :16]), f"{name}.project", 8)
    x = F.silu(norm(F.conv2d(x, shared["head.conv.weight"][:16, :8]), "head", 16))
    logits = F.linear(x.mean((2, 3)), shared["classifier.weight"][:, :16], shared["classifier.bias"])
    assert torch.allclose(net.logits(SPACE.network(code), images()), logits, atol=1e-5)


def test_only_what_a_candidate_uses_learns_from_it() -> None:
    net = Supernet(vary(BASE, {"stages.1.kernel": (3, 5), "stages.1.expand": (1, 2)}))
    network = net.space.network((0, 1))
    torch.nn.init.ones_(net.get_parameter("classifier.weight")[0])
    net.logits(network, images())[:, 0].square().sum().backward()
    used = net.get_parameter("stages.1.0.mbconv.depthwise.conv.weight").grad
    assert used is not None and used[:, :, 1:4, 1:4].any()
    used[:, :, 1:4, 1:4] = 0
    assert not used.any()  # the rim of the kernel has learnt nothing
    assert net.get_parameter("stages.1.0.mbconv1.depthwise.conv.weight").grad is None


@pytest.mark.parametrize("make", (mnasnet, v2))
def test_every_candidate_of_the_papers_spaces_fits(make: Any) -> None:
    space = make(BASE)
    net = Supernet(space)
    for network in drawn(space, 6):
        assert net.logits(network, images(2)).shape == (2, 2)


def test_largest_and_smallest_of_the_same_operators_are_that() -> None:
    space = vary(BASE, {"stages.*.op": ("mbconv",), "stages.1.expand": (1, 2, 3), "stages.1.kernel": (3, 5),
                        "stages.1.repeats": (1, 3), "stages.0.width": (8, 12), "head.width": (16, 24)})  # fmt: skip
    net = Supernet(space)
    sizes: dict[tuple[str, ...], list[int]] = {}
    for code in space.codes():
        network = space.network(code)
        sizes.setdefault(tuple(map(kind, network.stages)), []).append(cost(network).params)
    assert len(sizes) == 2
    for code in space.codes():
        sets = tuple(map(kind, space.network(code).stages))
        for largest, params in ((True, max(sizes[sets])), (False, min(sizes[sets]))):
            end = space.network(net.end(code, largest=largest))
            assert tuple(map(kind, end.stages)) == sets and cost(end).params == params


def test_a_step_has_the_largest_some_and_the_smallest_and_is_drawn_from_its_number() -> None:
    net = Supernet(SPACE)
    steps = [net.sandwich(0, step, 2) for step in range(20)]
    assert steps[7] == net.sandwich(0, 7, 2) and steps[7] != net.sandwich(1, 7, 2)
    for first, *_, last in steps:
        assert cost(first).params >= cost(last).params
        assert {stage.kernel for stage in first.stages} == {5} and {stage.kernel for stage in last.stages} == {3}
    assert {kind(stage) for first, *_ in steps for stage in first.stages} == {"mbconv", "mbconv1", "fused", "fused1"}


def test_of_chosen_candidates_no_other_is_trained_and_the_largest_is_first(splits: Splits, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    among = [SPACE.sample(rng) for _ in range(30)]
    net, networks = Supernet(SPACE, among=among), {SPACE.network(code) for code in among}
    steps = [net.sandwich(0, step) for step in range(40)]
    assert {network for step in steps for network in step} == networks and steps[7] == net.sandwich(0, 7)
    for step in steps:
        sizes = [cost(network).macs for network in step]
        assert len(step) == 4 and sizes == sorted(sizes, reverse=True)
    file, recipe = tmp_path / "net.safetensors", RECIPE.replace(epochs=1)
    list(training(net, splits, recipe, file, workers=0))
    with pytest.raises(UsageError, match="a supernet of another limits"):
        list(training(Supernet(SPACE), splits, recipe, file))


def test_the_others_learn_from_labels_at_first_and_in_the_end_from_the_largest(
    splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Tensor] = []  # of each step: labels, answers of the largest, what the three others are told

    def heard(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
        told.append(targets)
        if len(told) % 5 == 1:
            told.append(logits.detach().softmax(1))
        return cross_entropy(logits, targets, weights, smoothing)

    cross_entropy = supernet.weighted_cross_entropy
    monkeypatch.setattr(supernet, "weighted_cross_entropy", heard)
    list(training(Supernet(SPACE), splits, RECIPE, tmp_path / "net.safetensors", workers=0))
    assert len(told) == 5 * 6
    for step in range(6):
        labels, answers, *others = told[5 * step : 5 * step + 5]
        assert set(labels.ravel().tolist()) == {0.0, 1.0}
        for targets in others:
            torch.testing.assert_close(targets, labels + step / 6 * (answers - labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages.1.stride": (1, 2)}, "cannot share weights over a choice of stride of stages.1, only over stages op/"),
        ({"resolution": (16, 32)}, "a choice of resolution of the network"),
        ({"head.width": (0, 16)}, "with and without a head convolution"),
        ({"stages.0.width": (8, 12), "stages.1.op": ("basic",)}, r"residual blocks \(stages.1\) of several widths"),
    ],
)
def test_what_cannot_share_is_refused(options: dict, message: str) -> None:
    base = BASE.replace(stages=tuple(stage.replace(se=0.0) for stage in BASE.stages))
    with pytest.raises(UsageError, match=message):
        Supernet(vary(base, options))


# --- training -------------------------------------------------------------------------------------------------------


def test_it_learns_and_every_size_of_it_does(splits: Splits, tmp_path: Path) -> None:
    space = vary(BASE, {"stages.*.expand": (1, 2), "stages.*.kernel": (3, 5)})
    net, recipe = Supernet(space), RECIPE.replace(epochs=6)
    events = list(training(net, splits, recipe, tmp_path / "net.safetensors", workers=0))
    assert [event["epoch"] for event in events] == [1, 2, 3, 4, 5, 6]
    assert events[-1]["loss"] < 0.5 * events[0]["loss"]
    judge = judging(net, splits, recipe, workers=0)
    for code in ((0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 0)):
        accuracy = judge(space.network(code), 0, 6)
        assert accuracy > 0.8 and judge(space.network(code), 5, 1) == accuracy


@pytest.mark.parametrize("stop", (2, 3))
def test_interrupted_anywhere_it_goes_on_to_the_same_weights(
    splits: Splits, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept after every step here: in the middle of an epoch, and at its end."""
    per_epoch = len(splits.train) // RECIPE.batch
    assert per_epoch == 3
    whole, cut, rest = (Supernet(SPACE, seed=1) for _ in range(3))
    list(training(whole, splits, RECIPE, tmp_path / "whole.safetensors", workers=0))
    file, original, done = tmp_path / "cut.safetensors", supernet._step, 0

    def step(*args: Any) -> float:
        nonlocal done
        if done == stop:
            raise KeyboardInterrupt
        done += 1
        return original(*args)

    monkeypatch.setattr(supernet, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(supernet, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            list(training(cut, splits, RECIPE, file, workers=0))
    monkeypatch.setattr(supernet, "_step", lambda *args: counted.append(1) or original(*args))
    counted: list[int] = []
    list(training(rest, splits, RECIPE, file, workers=0))
    assert len(counted) == 2 * per_epoch - stop
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, rest.state_dict()[name]), name
    assert list(training(Supernet(SPACE), splits, RECIPE, file, workers=0)) == []  # done: it is only read


def test_another_supernets_file_is_refused_and_a_broken_loss_is_said(splits: Splits, tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    list(training(Supernet(SPACE), splits, RECIPE.replace(epochs=1), file, workers=0))
    with pytest.raises(UsageError, match="a supernet of another recipe"):
        list(training(Supernet(SPACE), splits, RECIPE, file))
    with pytest.raises(UsageError, match="a supernet of another space"):
        list(training(Supernet(vary(BASE, {"stages.0.kernel": (3, 5)})), splits, RECIPE.replace(epochs=1), file))
    with pytest.raises(UsageError, match=r"recipe ema is 0.9; the training of a supernet has none"):
        list(training(Supernet(SPACE), splits, RECIPE.replace(ema=0.9), file))
    net = Supernet(SPACE)
    torch.nn.init.constant_(net.get_parameter("classifier.bias"), float("nan"))
    with pytest.raises(Diverged, match="loss became nan at step 1: lower lr"):
        list(training(net, splits, RECIPE, tmp_path / "nan.safetensors", workers=0))


# --- in a search ----------------------------------------------------------------------------------------------------


def test_its_order_is_compared_with_trainings_of_any_length(tmp_path: Path) -> None:
    task = TASK.replace(strategy="random", rungs=(9,), about={"evaluator": "supernet"})
    search(task, tabulated, tmp_path / "study.db", trials=24)
    check = longer(task, tabulated, tmp_path / "study.db", 2)
    assert check.tau == 1.0 and "a supernet of 9 epochs with stand-alone trainings of 2 over 20 networks" in str(check)


def test_the_command_searches_with_a_supernet(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net = tmp_path / "net.json"
    net.write_text(BASE.to_json())
    words = ("search", "--data", folder, "--baseline", net, "--space", "v2", "--evaluator", "supernet", "--workers", 0)
    words = (*words, "--set", "batch=8", "--epochs", 2, "--study", "study.db", "--save", "winner.json")
    first = run(*words, "--trials", 3, "--json")
    assert first.err.count("supernet: epoch") == 2
    assert {trial["state"] for trial in first.document["trials"]} == {"finished"}
    assert Network.from_json(Path("winner.json").read_text()).head.classes == 2
    again = run(*words, "--trials", 5, "--json")  # the supernet is trained no more
    assert "supernet: epoch" not in again.err
    assert again.document["trials"][:3] == first.document["trials"] and len(again.document["trials"]) == 5
    assert "a study of another about (evaluator)" in refused(*words[:7], *words[9:], "--trials", 5)
    assert "judged in seconds, here" in refused(*words, "--engine", "ray")
    assert "a supernet is trained once" in refused(*words, "--epochs", "1,2")
    assert "a choice of stride" in refused(*words[:5], "--vary", "stages.1.stride=1,2", *words[7:])

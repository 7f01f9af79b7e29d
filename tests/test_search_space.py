"""Search spaces as data: what they hold, how they count it, and that equal networks are one candidate."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from effnet import families
from effnet.cost import cost
from effnet.network import build
from effnet.search.space import COSTS, SPACES, Choice, Space, key, mnasnet, small, v1, v2, vary
from effnet.spec import Head, Network, Preprocess, Stage, Stem
from effnet.value import UsageError

TINY = Network(
    name="tiny",
    stem=Stem(width=8),
    stages=(
        Stage(op="mbconv", repeats=1, width=8, stride=1),
        Stage(op="mbconv", repeats=2, width=16, stride=2, expand=4, se=0.25),
        Stage(op="fused", repeats=2, width=16, stride=2, expand=2),
    ),
    head=Head(width=32, classes=10),
    resolution=32,
    preprocess=Preprocess(size=32, resize=32),
)
KERNELS = vary(TINY, {"stages.*.kernel": (3, 5)}, "kernels")


def drawn(space: Space, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [space.sample(rng) for _ in range(count)]


def named(name: str) -> Space:
    make, base = SPACES[name]
    return make(families.get(base))


# --- what the papers say --------------------------------------------------------------------------------------------


def test_mnasnets_space_has_the_papers_choices() -> None:
    """Operators x kernels x SE x skips (2 of 3) x filters x layers per stage; fewer where rounding leaves no three."""
    space = named("mnasnet")
    rows = [space.sizes[6 * stage : 6 * stage + 6] for stage in range(7)]
    assert rows[2:6] == [(4, 2, 2, 2, 3, 3)] * 4
    assert all(row[:4] == (4, 2, 2, 2) for row in rows)
    assert space.count == np.prod([float(np.prod(row)) for row in rows])
    assert "stages.3.width: 48, 64, 80" in str(space) and "stages.3.repeats: 3, 4, 5" in str(space)


def test_v1_is_the_same_space_and_v2_has_operator_kernel_expansion_and_layers() -> None:
    assert named("v1").choices == named("mnasnet").choices
    space = v2(families.get("efficientnet_b0"))
    assert space.count == (2 * 2 * 3) ** 7 * 2 * 3**5 * 2
    assert {stage.width for code in drawn(space, 20) for stage in space.network(code).stages} == {
        stage.width for stage in space.base.stages
    }  # widths are reused


def test_a_published_result_is_in_the_space_of_its_own_baseline() -> None:
    a1 = families.get("mnasnet_a1")
    space = mnasnet(a1)
    assert key(space.network(space.encode(a1))) == key(a1)
    b0 = families.get("efficientnet_b0")
    assert key(v1(b0).network(v1(b0).encode(b0))) == key(b0)
    with pytest.raises(UsageError, match=r"does not hold resnet50: it has `stem        conv7"):
        space.encode(families.get("resnet50"))


# --- codes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [KERNELS, named("mnasnet"), named("v2")], ids=lambda space: space.name)
def test_codes_and_networks_go_both_ways(space: Space) -> None:
    for code in drawn(space, 30):
        network = space.network(code)
        assert key(space.network(space.encode(network))) == key(network)
        assert space.network(code) == network
    assert Space.from_json(space.to_json()) == space


def test_drawing_stays_in_the_space_and_changes_what_it_says() -> None:
    space, rng = named("v2"), np.random.default_rng(0)
    a, b = drawn(space, 2)
    for _ in range(50):
        once, often, child = space.mutate(a, rng), space.mutate(a, rng, rate=0.5), space.cross(a, b, rng)
        assert sum(x != y for x, y in zip(a, once, strict=True)) == 1
        assert often != a
        assert all(c in pair for c, pair in zip(child, zip(a, b, strict=True), strict=True))
        assert all(space.check(code) for code in (once, often, child))
    assert space.sample(np.random.default_rng(5)) == space.sample(np.random.default_rng(5))


def test_all_options_are_equally_probable() -> None:
    digits = np.array(drawn(vary(TINY, {"stages.0.expand": (1, 2, 3, 4)}), 4000))[:, 0]
    expected, counts = 1000, np.bincount(digits, minlength=4)
    assert ((counts - expected) ** 2 / expected).sum() < 16.27  # chi squared, 3 degrees, 0.1 %


def test_a_small_space_is_enumerated_once_each() -> None:
    codes = list(KERNELS.codes())
    assert len(codes) == len(set(codes)) == KERNELS.count == 8
    assert len({key(KERNELS.network(code)) for code in codes}) == 8


# --- equal networks -------------------------------------------------------------------------------------------------


def test_codes_that_resolve_to_the_same_network_share_a_key() -> None:
    space = mnasnet(TINY)
    names = [choice.name for choice in space.choices]
    code = [0] * len(names)  # operator 0: a plain convolution
    other = code.copy()
    other[names.index("stages.0.se")] = 1  # it has no room for squeeze-excite
    assert key(space.network(code)) == key(space.network(other))
    code[names.index("stages.1.repeats")] = other[names.index("stages.1.repeats")] = 0  # one layer, of stride 2:
    other[names.index("stages.1.skip")] = 1  # nothing to skip
    assert key(space.network(code)) == key(space.network(other))
    other[names.index("stages.1.repeats")] = 1
    assert key(space.network(code)) != key(space.network(other))


def test_equal_units_in_other_stages_are_the_same_network() -> None:
    row = Stage(op="mbconv", repeats=2, width=8, stride=1, expand=2)
    whole = TINY.replace(stages=(row,), name="whole")
    parted = TINY.replace(stages=(row.replace(repeats=1),) * 2, name="parted")
    assert key(whole) == key(parted) != key(whole.with_classes(3))
    assert key(whole) != key(whole.replace(activation="relu"))


def test_a_skip_that_is_left_out_is_left_out_of_network_and_module() -> None:
    import torch

    row = Stage(op="mbconv", repeats=2, width=8, stride=1, expand=2)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for skip in (True, False):
        network = TINY.replace(stages=(row.replace(skip=skip),))
        model = build(network, generator=torch.Generator().manual_seed(1)).eval()
        assert sum(p.numel() for p in model.parameters()) == cost(network).params
        outputs.append(model(images))
    assert not torch.equal(*outputs)
    with pytest.raises(UsageError, match="skip is false, but basic"):
        Stage(op="basic", repeats=1, width=8, stride=1, skip=False)


# --- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_many_costs_at_once_are_those_of_each_network(name: str) -> None:
    space = named(name)
    codes = drawn(space, 60)
    totals = space.costs(codes)
    for index, code in enumerate(codes):
        spent = cost(space.network(code))
        assert {metric: totals[metric][index] for metric in COSTS} == {m: getattr(spent, m) for m in COSTS}


def test_costs_follow_stem_head_size_and_stride_choices() -> None:
    options = {"stem.width": (8, 12), "head.width": (0, 32), "resolution": (4, 8, 33), "stages.1.stride": (1, 2)}
    space = vary(TINY, options)
    totals = space.costs(list(space.codes()))
    for index, code in enumerate(space.codes()):
        try:
            spent = cost(space.network(code))
        except UsageError:  # 4 px are below the strides
            assert np.isinf(totals["macs"][index])
            continue
        assert {metric: totals[metric][index] for metric in COSTS} == {m: getattr(spent, m) for m in COSTS}
    assert np.isinf(totals["macs"]).sum() == 4


# --- spaces of one's own --------------------------------------------------------------------------------------------


def test_relative_options_and_stars() -> None:
    space = vary(
        TINY, {"stages.*.repeats": ("-1", "+0", "+1"), "stages.2.width": ("x0.5", "x1", "x1.5"), "dropout": (0, 0.2)}
    )
    assert [choice.options for choice in space.choices] == [(1, 2), (1, 2, 3), (1, 2, 3), (8, 16, 24), (0, 0.2)]


def test_whole_parts_vary_together() -> None:
    options = ({"op": "fused", "expand": 1}, {"op": "separable"}, {"op": "mbconv", "expand": 6, "se": 0.25})
    space = vary(TINY, {"stages.1": options})
    made = [space.network((index,)).stages[1] for index in range(3)]
    assert [(s.op, s.expand, s.se) for s in made] == [("fused", 1, 0), ("separable", 1, 0), ("mbconv", 6, 0.25)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages.*.kernle": (3, 5)}, r"field of stages.0 'kernle' is not one of .*Did you mean 'kernel'"),
        ({"stages.7.kernel": (3, 5)}, r"names no stage of tiny: it has stages.0 to stages.2"),
        ({"steam.width": (8,)}, r"'steam' is not one of stem, head"),
        ({"stages.0.kernel": (3, 4)}, r"kernel is 4; it must be odd"),
        ({"stages.0.kernel": (3, "5")}, r"kernel of stages.0 is 3; it cannot be '5'"),
        ({"stages.0.repeats": (1.5,)}, r"repeats of stages.0 is 1; it cannot be 1.5"),
        ({"stages.0.op": ("mbconvx",)}, r"stage op 'mbconvx' is not one of"),
        ({"stages.0.op": ("x2",)}, r"cannot be relative"),
        ({"stages.0.width": ("xx",)}, r"is no option for stages.0.width"),
        ({"stages.0.kernel": 3}, r"needs a list of options"),
        ({"stages.0.kernel": ()}, r"needs a list of options"),
        ({"norm": (1,)}, r"field of the network 'norm' is not one of resolution"),
        ({}, r"has no choices"),
    ],
)
def test_a_space_that_cannot_be_says_why(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        vary(TINY, options)


def test_choices_are_told_apart() -> None:
    with pytest.raises(UsageError, match=r"two choices called 'stages\.0\.kernel'"):
        Space(name="s", base=TINY, choices=(Choice(path="stages.0.kernel", options=(3,)),) * 2)
    with pytest.raises(UsageError, match="the option 3 twice"):
        Choice(path="stages.0.kernel", options=(3, 3))
    with pytest.raises(UsageError, match="is no code of kernels"):
        KERNELS.network((0, 0, 2))


# --- proxies --------------------------------------------------------------------------------------------------------


def test_a_baseline_made_small_keeps_a_map_to_look_at() -> None:
    made = small(families.get("efficientnet_b0"), px=32, width=0.25, least_map=4)
    assert (made.resolution, made.preprocess.size, made.stride) == (32, 32, 8)
    assert [stage.stride for stage in made.stages] == [1, 1, 2, 2, 1, 2, 1] and made.stem.stride == 1
    assert small(families.get("efficientnet_b0"), px=224) == families.get("efficientnet_b0")
    with pytest.raises(UsageError, match="smaller than the least map"):
        small(TINY, px=4, least_map=8)


def test_the_facts_of_a_search_need_no_torch_and_no_optuna() -> None:
    code = """
import sys, json
sys.modules["torch"] = sys.modules["optuna"] = None
from effnet.search import objectives, space, strategies, task
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules} & {"scipy", "matplotlib", "rich", "typer"})))
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert json.loads(done.stdout) == []

"""The measuring core on a made-up clock, models that are timed as they would serve, and where tables are kept."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from effnet import backends, native, operators, published
from effnet import bench as core
from effnet.bench import Comparison, Measured, bench, compare, controlled, measure, quantiles, ready, share_of_others
from effnet.engine import open_engine
from effnet.latency import AXES, LatencyTable
from effnet.layers import fold_norms
from effnet.network import build
from effnet.spec import Head, Network, Preprocess, Stage, Stem
from effnet.value import UsageError
from tests.test_cli import refused, run
from tests.test_latency import TABLE

TINY = Network(
    name="tiny",
    stem=Stem(width=8),
    stages=(Stage(op="mbconv", repeats=2, width=8, stride=2, expand=2, se=0.25),),
    head=Head(width=16, classes=10),
    resolution=32,
    preprocess=Preprocess(size=32, resize=32),
)


class Clock:
    """Time that passes only when somebody works, and a diary of who did."""

    def __init__(self) -> None:
        self.now = 0.0
        self.diary: list[str] = []

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, seconds, drift: float = 0.0):
        durations = itertools.cycle(np.atleast_1d(seconds))

        def work() -> None:
            self.now += next(durations) + drift * len(self.diary)
            self.diary.append(name)

        return work


# --- the core -------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_forwards_and_backwards() -> None:
    clock = Clock()
    works = {name: clock.worker(name, 1.0) for name in "abc"}
    measure(works, rounds=2, warmup=2, calls=2, clock=clock)
    assert "".join(clock.diary) == 2 * "aabbccccbbaa"  # calls given: nothing is warmed up to find their number
    clock.diary.clear()
    measure(works, rounds=1, warmup=3, clock=clock)
    assert "".join(clock.diary) == "aaabbbccc" + "abccba"


def test_a_steady_drift_cancels_in_the_ratio() -> None:
    """Each call takes longer than the one before, whoever makes it: A/B/B/A sees no difference, A/B would."""
    clock = Clock()
    works = {name: clock.worker(name, 1.0, drift=0.01) for name in "ab"}
    (found,) = measure(works, rounds=10, calls=1, clock=clock).comparisons
    assert found.ratio == pytest.approx(1, abs=1e-12)
    assert found.verdict == "no difference"


def test_percentiles_of_a_known_sample() -> None:
    """1 to 100 ms in shuffled order: numpy's own definition of a quantile, here by hand."""
    times = np.random.default_rng(0).permutation(np.arange(1, 101)) / 1e3
    clock = Clock()
    found = measure({"a": clock.worker("a", times)}, rounds=10, calls=5, clock=clock)["a"]
    assert found.n == 100
    assert (found.value, found.p95, found.p99) == pytest.approx((50.5, 95.05, 99.01))
    assert found.spread[0] < 50.5 < found.spread[1]
    assert found.unit == "ms"


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """The 95 % interval of a median holds the true one (0) in about 95 of 100 draws: 91 to 99 in 200."""
    rng = np.random.default_rng(1)
    held = [low <= 0 <= high for _ in range(200) for low, high in quantiles(rng.normal(size=(40, 1)), [0.5])[1]]
    assert 0.91 <= np.mean(held) <= 0.99


def test_intervals_agree_with_an_independent_bootstrap() -> None:
    times = np.random.default_rng(2).lognormal(size=(30, 1))
    ours = quantiles(times, [0.5])[1][0]
    theirs = stats.bootstrap((times[:, 0],), np.median, method="percentile", n_resamples=4000, random_state=0)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), rel=0.1)


@pytest.mark.parametrize(("above", "below"), [(10, 0), (9, 1), (7, 3), (0, 10), (1, 0)])
def test_the_sign_test_is_the_binomial_test(above: int, below: int) -> None:
    assert core.sign_test(above, below) == pytest.approx(stats.binomtest(above, above + below).pvalue)


def test_verdicts_need_a_difference_in_almost_all_rounds() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(10, 0.1, (20, 4))
    assert compare("a", base, "b", 1.5 * base).verdict == "slower"
    assert compare("a", base, "b", 0.5 * base).ratio == pytest.approx(0.5)
    assert compare("a", base, "b", 0.5 * base).verdict == "faster"
    noise = compare("a", base, "b", rng.normal(10, 0.1, (20, 4)))
    assert noise.verdict == "no difference"
    assert "no difference can be told" in str(noise)
    assert compare("a", base[:3], "b", 1.5 * base[:3]).verdict == "no difference"  # three rounds prove nothing


def test_the_share_of_other_programs() -> None:
    assert share_of_others((100.0, 10.0), (110.0, 12.0)) == 0.8
    assert share_of_others((1.0, 1.0), (1.0, 1.0)) == 0.0
    assert share_of_others(None, (1.0, 1.0)) is None
    quiet = measure({"a": lambda: None}, rounds=1, calls=1)
    assert [quiet.replace(others=share).busy for share in (None, 0.05, 0.3)] == [False, False, True]


def test_the_environment_is_recorded_and_json_comes_back() -> None:
    found = measure({"a": lambda: None, "b": lambda: None}, rounds=2, calls=1, about={"batch": 4})
    known = found["a"].environment
    assert known["batch"] == 4
    assert {"torch", "processor", "threads", "cores", "flags", "python"} <= set(known)
    assert Measured.from_json(found.to_json()) == found


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"warmup": -1}])
def test_bad_counts_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        measure({"a": lambda: None}, **bad)
    with pytest.raises(UsageError, match="nothing to measure"):
        measure({})


# --- models ---------------------------------------------------------------------------------------------------------


def test_inside_threads_are_pinned_and_denormals_flushed_and_afterwards_not() -> None:
    threads, tiny = torch.get_num_threads(), torch.full((64,), 1e-39)
    with controlled(1):
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()
        assert (tiny * 0.5).sum() == 0
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    assert (tiny * 0.5).sum() > 0


def test_statistics_are_those_of_data_and_activations_are_no_denormals() -> None:
    model = ready(TINY)
    assert not model.training
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(
        norm.running_var.min() > 1e-6 and not torch.equal(norm.running_mean, 0 * norm.running_mean) for norm in norms
    )
    with torch.inference_mode():
        logits = model(core.random_images(TINY, 32, 2, "float32"))
    assert 1e-4 < logits.abs().mean() < 1e4


def test_images_are_never_zero_and_lie_channels_last() -> None:
    images = core.random_images(TINY, 40, 3, "bfloat16")
    assert images.shape == (3, 3, 40, 40)
    assert images.dtype == torch.bfloat16
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.float().std() > 0.9


@pytest.mark.parametrize("op", ["mbconv", "fused", "separable", "basic", "bottleneck"])
def test_folded_norms_give_the_same_logits(op) -> None:
    expand, se = {"bottleneck": 0.25, "mbconv": 2, "fused": 2}.get(op, 1), 0.25 if op in ("mbconv", "fused") else 0.0
    network = TINY.replace(stages=(Stage(op=op, repeats=2, width=16, stride=2, expand=expand, se=se),))
    plain, folded = ready(network), ready(network, fold=True)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    with torch.inference_mode():
        images = core.random_images(network, 32, 2, "float32")
        torch.testing.assert_close(folded(images), plain(images), rtol=1e-4, atol=1e-5)


def test_folding_a_model_without_norms_changes_nothing() -> None:
    model = build(TINY).eval()
    fold_norms(model)
    before = [p.clone() for p in model.parameters()]
    fold_norms(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_models_are_measured_against_each_other() -> None:
    """A network at four times the size must be slower, on any machine."""
    small, large = TINY, TINY.replace(name="large", resolution=512)
    found = bench([small, large], rounds=6, precision="float32")
    assert found["large"].value > found["tiny"].value > 0
    assert found.comparisons[0].second == "large"
    assert found["tiny"].environment["threads"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backends": ["eagr"]}, "Did you mean 'eager'"),
        ({"precision": "float16"}, "Did you mean 'bfloat16'"),
        ({"batch": 0}, "batch is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"backends": ["onnxruntime"], "precision": "int8"}, "not one of float32"),
        ({"backends": ["eager"], "precision": "int8"}, "'int8' is not one of float32, bfloat16"),
        ({"size": 2}, "below the stride 4"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench([TINY], **options)
    with pytest.raises(UsageError, match="named twice"):
        bench([TINY, TINY])


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def here(**changes) -> LatencyTable:
    """The made-up table, as if it had been measured on this machine."""
    return TABLE.replace(device=str(core.environment()["processor"]), torch=torch.__version__, **changes)


def test_a_table_is_found_where_it_was_saved(cache: Path) -> None:
    path = core.save_table(here())
    assert path.parent == cache
    assert core.table() == here()
    assert core.table().predict(TINY) == TABLE.predict(TINY)


def test_a_missing_table_says_what_to_run_and_what_there_is(cache: Path) -> None:
    with pytest.raises(UsageError, match=r"run `effnet bench --table` \(two"):
        core.table()
    core.save_table(here())
    with pytest.raises(UsageError, match=r"--table --threads 2 --precision bfloat16`.*eager-float32-1t"):
        core.table(threads=2, precision="bfloat16")
    with pytest.raises(UsageError, match="train_step"):
        core.table(quantity="train_step")


def test_a_table_of_another_machine_is_refused(cache: Path) -> None:
    path = core.save_table(here())
    path.write_text(here(environment={}).replace(device="Abacus").to_json())
    with pytest.raises(UsageError, match="another processor, Abacus"):
        core.table()
    path.write_text("{")
    with pytest.raises(UsageError, match="not a JSON description"):
        core.table()


@pytest.mark.parametrize(("bad", "message"), [({"backend": "egaer"}, "'eager'"), ({"threads": 0}, "threads")])
def test_a_table_that_cannot_be_is_refused(cache: Path, bad: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        core.table(**bad)


def test_the_cache_follows_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EFFNET_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setattr(sys, "platform", "linux")
    assert core.cache_folder() == Path("/somewhere/effnet")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert core.cache_folder() == Path.home() / ".cache" / "effnet"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert core.cache_folder() == Path.home() / "Library" / "Caches" / "effnet"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert core.cache_folder() == Path("/local/effnet")
    monkeypatch.setenv("EFFNET_CACHE", "/mine")
    assert core.cache_folder() == native.cache_folder() == Path("/mine")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes per axis and tiny networks: a table in a second."""

    def corners(nodes):
        return tuple((axis[0], axis[min(2, len(axis) - 1)]) if len(axis) > 1 else axis for axis in nodes)

    monkeypatch.setattr(operators, "NODES", {kind: corners(nodes) for kind, nodes in operators.NODES.items()})
    monkeypatch.setattr(operators, "PASSES", 1)
    monkeypatch.setattr(
        operators, "random_networks",
        lambda count, seed: [TINY.replace(name=f"{seed}-{i}", resolution=16 + 8 * i) for i in range(count // 4)],
    )  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_a_table_is_measured_kept_and_used(cache: Path) -> None:
    found = run("bench", "--table", "--json").document
    assert Path(found["file"]).parent == cache
    assert found["error"]["networks"] == 7
    made = core.table()
    assert {grid.kind.partition("/")[0] for grid in made.grids} == set(AXES)
    assert made.predict(TINY) > 0
    assert made.error is not None
    assert "run" not in refused("plot", "pareto", "--x", "latency", "--json")


def test_every_operator_computes_what_it_is_named_after() -> None:
    """Shapes of the outputs of one call of each kind."""
    with torch.inference_mode():
        made = operators.Operators("float32", 0)
        shapes = {
            "pointwise/1": ((8, 16, 7), (1, 16, 7, 7)),
            "pointwise/2": ((8, 16, 7), (1, 16, 7, 7)),
            "dense/2": ((5, 8, 16, 4), (1, 16, 4, 4)),
            "stem/2": ((7, 3, 16, 14), (1, 16, 14, 14)),
            "depthwise/1": ((5, 24, 7), (1, 24, 7, 7)),
            "gate": ((32, 4, 7), (1, 32, 7, 7)),
            "linear": ((64, 10, 8), (8, 10)),
            "norm": ((8, 4), (1, 8, 4, 4)),
            "relu6": ((8, 4), (1, 8, 4, 4)),
            "add": ((8, 4), (1, 8, 4, 4)),
            "pad": ((8, 4), (1, 8, 5, 5)),
            "max_pool": ((16, 4), (1, 16, 4, 4)),
            "mean": ((8, 4), (1, 8)),
        }
        for kind, (shape, expected) in shapes.items():
            calls = made.calls(kind, shape)
            assert len(calls) == operators.CALLS
            assert calls[0]().shape == expected, kind
        weights = {call.args[0].data_ptr() for call in made.calls("dense/1", (3, 32, 32, 4))}
        assert len(weights) == 1  # one input for all
        weights = {call.func.weight.data_ptr() for call in made.calls("dense/1", (3, 32, 32, 4))}
        assert len(weights) == operators.CALLS  # and weights of their own


def test_too_large_nodes_continue_their_row_with_the_pixels() -> None:
    quickest = {("pointwise/1", shape): 1.0 for shape in operators._shapes("pointwise/1")
                if operators._is_measured("pointwise/1", shape)}  # fmt: skip
    grid = operators._grid("pointwise/1", quickest)
    assert grid.at(2048, 2048, 160**2) / grid.at(2048, 2048, 1) > 1000
    assert grid.at(8, 8, 160**2) == pytest.approx(1)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_measures_models(tmp_path: Path) -> None:
    file = tmp_path / "tiny.json"
    file.write_text(TINY.to_json())
    other = tmp_path / "other.json"
    other.write_text(TINY.replace(name="other", resolution=64).to_json())
    found = run("bench", file, other, "--rounds", 2, "--json").document
    assert [row["name"] for row in found["measurements"]] == ["tiny", "other"]
    assert found["verdicts"] and isinstance(found["busy"], bool)
    shown = run("bench", file, "--rounds", 1, "--batch", 2, "--fold")
    assert "p95 ms" in shown.out and "images/s" in shown.out and "other programs took" in shown.out


def test_the_command_refuses_in_one_line() -> None:
    assert "--table" in refused("bench")
    assert "one of them" in refused("bench", "efficientnet_b0", "--table")
    assert "efficientnet_b0" in refused("bench", "efficientnet_b00")
    assert "batch" in refused("bench", "efficientnet_b0", "--batch", 0)
    assert "of the backend eager" in refused("bench", "--table", "--backend", "compiled")


# --- exported backends ----------------------------------------------------------------------------------------------


def test_exported_backends_answer_as_the_same_network_in_pytorch(tmp_path: Path) -> None:
    """Random weights as they are timed: OpenVINO from bytes to probabilities against the formula."""
    model = ready(TINY)
    views = backends.random_views(32, 3)
    p = TINY.preprocess
    images = torch.from_numpy(((views / 255 - p.mean) / p.std).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = model(images).softmax(1).numpy()
        path = backends.written(model, "openvino", "float32", tmp_path)  # in inference mode, as bench writes it
    np.testing.assert_allclose(open_engine(path)(views), expected, atol=1e-5)


def test_exports_and_fresh_processes_are_measured_beside_pytorch(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(TINY.to_json())
    words = ("bench", tmp_path / "tiny.json", "--rounds", 1, "--start", "--json")
    found = run(*words, "--backend", "eager", "--backend", "openvino")
    names = ["tiny (eager)", "tiny (openvino)"]
    document = found.document
    assert [row["name"] for row in document["measurements"]] == names
    assert [row["name"] for row in document["starts"]] == names
    for row in document["starts"]:
        assert 0.1 < row["seconds"] < 600 and 5e7 < row["peak_bytes"] < 5e9 and row["n"] == 3
    assert len(document["verdicts"]) == 1


def test_the_papers_table_4_is_timed_pair_by_pair_beside_what_it_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol, on networks that are quicker than the paper's: batch 1, one thread, 20 calls of each."""
    asked = []

    def small(networks, **options):
        asked.append(([network.name for network in networks], options))
        return bench([TINY.replace(name=network.name) for network in networks], **options)

    monkeypatch.setattr(core, "bench", small)
    pairs = run("bench", "--table4", "--json").document["pairs"]
    assert [names for names, _ in asked] == [
        ["efficientnet_b1", "resnet152"],
        ["efficientnet_b7", *(f"efficientnet_b{i}" for i in range(7))],
    ]
    for pair in pairs:
        for row in pair["measurements"]:
            assert row["n"] == 20 and row["environment"]["batch"] == row["environment"]["threads"] == 1
    assert [pair["published"]["ratio"] for pair in pairs] == [5.7, None]
    paper = published.TABLE_4[0]
    assert paper.ratio == pytest.approx(0.554 / 0.098, abs=0.06)  # the two latencies that the paper prints
    shown = run("bench", "--table4", "--precision", "bfloat16").out
    assert "not printed" in shown and "Table 4, bfloat16" in shown


def test_a_comparison_upright_has_the_slower_one_second() -> None:
    fields = {"rounds": 10, "p_value": 0.002}
    quick = Comparison(first="b7", second="b0", ratio=0.02, spread=(0.016, 0.025), verdict="faster", **fields)
    slow = Comparison(first="b0", second="b7", ratio=50.0, spread=(40.0, 62.5), verdict="slower", **fields)
    assert quick.upright == slow and slow.upright is slow


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--table4", "--size", "64"), "--size"),
        (("--table4", "--batch", "1", "--threads", "2"), "--batch, --threads"),
        (("--table", "--rounds", "3"), "--rounds"),
    ],
)
def test_what_a_protocol_says_itself_is_refused(words: tuple[str, ...], said: str) -> None:
    refused = run("bench", *words)
    assert refused.code == 2 and f"leave out {said}, or name models" in refused.err

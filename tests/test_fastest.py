"""The quickest export that passes stands for a run until its weights change; what cannot be made is told and logged."""

import json
from pathlib import Path

import numpy as np
import pytest

from effnet import deploy
from effnet.bench import measure
from effnet.checkpoint import from_model, save
from effnet.deploy import Artefact, export
from effnet.engine import CHOICE, StaleWarning, TorchEngine, open_engine
from effnet.export import TARGETS
from effnet.export.gate import Samples
from effnet.network import Model
from tests.test_cli import run
from tests.test_export import TEMPERATURE, real_images, tiny, tiny_model  # noqa: F401 (two are fixtures)


@pytest.fixture
def run_folder(model: Model, samples: Samples, tmp_path: Path) -> tuple[Path, Artefact]:
    """A run with weights, and an export chosen for it."""
    save(tmp_path / "best.safetensors", from_model(model, extra={"temperature": TEMPERATURE}))
    chosen = export(model, "onnx", samples, tmp_path / "export", temperature=TEMPERATURE)
    digest = deploy.file_digest(tmp_path / "best.safetensors")
    note = {"artefact": f"export/{chosen.path.name}", "checkpoint": digest}
    (tmp_path / CHOICE).write_text(json.dumps(note))
    return tmp_path, chosen


def test_a_run_opens_as_its_chosen_export_and_says_so(run_folder, samples):
    folder, _ = run_folder
    engine = open_engine(folder)
    assert engine.name == "tiny, export/tiny-float32.onnx in ONNX Runtime float32"
    eager = open_engine(folder / "best.safetensors")
    assert isinstance(eager, TorchEngine) and eager.name == "tiny, PyTorch float32"
    assert eager.temperature == TEMPERATURE
    np.testing.assert_allclose(engine(samples.views[:3]), eager(samples.views[:3]), atol=1e-5)


def test_an_export_of_older_weights_or_that_is_gone_is_passed_over(run_folder):
    folder, chosen = run_folder
    weights = (folder / "best.safetensors").read_bytes()
    save(folder / "best.safetensors", from_model(tiny(seed=1)))
    with pytest.warns(StaleWarning, match="no longer holds"):
        assert isinstance(open_engine(folder), TorchEngine)
    (folder / "best.safetensors").write_bytes(weights)
    chosen.path.unlink()
    with pytest.warns(StaleWarning, match=r"tiny-float32\.onnx is gone: effnet export .* --fastest"):
        assert isinstance(open_engine(folder), TorchEngine)


def on_a_made_up_clock(monkeypatch: pytest.MonkeyPatch, took: dict[str, float]) -> None:
    def measured(works, **options):
        found = measure(dict.fromkeys(works, lambda: None), rounds=1, calls=1)
        return found.replace(measurements=tuple(m.replace(value=took[m.name]) for m in found.measurements))

    monkeypatch.setattr(deploy, "measure", measured)


def test_the_quickest_that_passes_stands_for_a_run_and_the_others_go(model, samples, tmp_path, monkeypatch):
    """On a made-up clock: OpenVINO bfloat16 is refused by the gate, ONNX Runtime is quickest of the rest."""
    monkeypatch.setattr(deploy, "CANDIDATES", (("openvino", "bfloat16"), ("torch", "float32"), ("onnx", "float32")))
    save(tmp_path / "best.safetensors", from_model(model))
    real = deploy.judge
    lost = {"bfloat16": ("it was told to fail",)}
    monkeypatch.setattr(
        deploy, "judge", lambda *a, precision="float32", **k: real(*a, **k).replace(reasons=lost.get(precision, ()))
    )
    took = {"PyTorch float32": 3.0, "tiny-float32.pt2": 2.0, "tiny-float32.onnx": 1.0}
    on_a_made_up_clock(monkeypatch, took)
    choice = deploy.fastest(model, samples, tmp_path / "export", checkpoint=tmp_path / "best.safetensors")
    assert choice.artefact.path.name == "tiny-float32.onnx"
    assert "it was told to fail" in choice.refused["openvino bfloat16"]
    kept = {path.name for path in (tmp_path / "export").iterdir()}
    assert kept == {"tiny-float32.onnx", "tiny-float32.onnx.json", "tiny-bfloat16.xml.json"}
    assert "export/tiny-float32.onnx" in open_engine(tmp_path).name
    took["PyTorch float32"] = 0.5
    assert (
        deploy.fastest(model, samples, tmp_path / "export", checkpoint=tmp_path / "best.safetensors").artefact is None
    )
    assert isinstance(open_engine(tmp_path), TorchEngine)


def test_a_runtime_that_fails_is_told_and_logged_and_the_others_go_on(model, samples, tmp_path, monkeypatch):
    """And the model itself answers for all candidates once."""
    monkeypatch.setattr(deploy, "CANDIDATES", (("openvino", "float32"), ("torch", "float32")))
    real, asked = deploy.TorchEngine.__call__, []
    monkeypatch.setattr(
        deploy.TorchEngine, "__call__", lambda self, views: asked.append(len(views)) or real(self, views)
    )
    on_a_made_up_clock(monkeypatch, {"PyTorch float32": 3.0, "tiny-float32.pt2": 2.0})

    def broken(graph, card, path):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(TARGETS["openvino"].load(), "write", broken)
    save(tmp_path / "tiny.safetensors", from_model(model))
    monkeypatch.chdir(tmp_path)
    ran = run("export", "tiny.safetensors", "--fastest", "--json")
    assert ran.document["artefact"] == "export/tiny-float32.pt2"
    assert ran.document["refused"] == {"openvino float32": "no such instruction"}
    assert ran.document["passed"]["tiny-float32.pt2"]["bytes"] == Path("export/tiny-float32.pt2").stat().st_size
    assert "judging the graph" in ran.err and "measuring 2 of them" in ran.err
    log = json.loads(Path("export/tiny-float32.xml.json").read_text())
    assert log["error"] == "RuntimeError: no such instruction" and not log["passed"]
    assert {path.name for path in Path("export").iterdir()} == {
        "tiny-float32.pt2", "tiny-float32.pt2.json", "tiny-float32.xml.json"
    }  # fmt: skip
    assert sum(asked) == len(samples)
    table = run("export", "tiny.safetensors", "--fastest").out
    assert [word in table for word in ("tiny-float32.pt2", "kept", "refused", "no such instruction")] == [True] * 4

"""Published facts against the cost model, the Pareto front against its definition, and figures that can be read."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from effnet import families, plots, published
from effnet.cost import cost
from effnet.plots import pareto
from effnet.published import AXES, PUBLISHED, Point, front, points
from effnet.value import UsageError
from tests.test_cli import refused, run
from tests.test_latency import TABLE


def point(name: str, x: float, top1: float, family: str = "other") -> Point:
    return Point(name=name, family=family, label=name, x=x, top1=top1, computed=False, source="made up")


def test_a_front_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    found = [point(str(i), float(x), float(y)) for i, (x, y) in enumerate(rng.integers(0, 30, (200, 2)))]
    best = {
        (p.x, p.top1)
        for p in found
        if not any((q.x <= p.x and q.top1 > p.top1) or (q.x < p.x and q.top1 >= p.top1) for q in found)
    }
    assert {(p.x, p.top1) for p in front(found)} == best
    assert [p.x for p in front(found)] == sorted(p.x for p in front(found))


def test_the_cost_of_our_networks_is_what_the_paper_prints() -> None:
    """Tan & Le 2019, Table 2, rounded as printed: parameters in M, multiply-adds in B (up to 5 % off from B4 on)."""
    millions = {"B0": 5.3, "B1": 7.8, "B2": 9.2, "B3": 12, "B4": 19, "B5": 30, "B6": 43, "B7": 66}
    billions = {"B0": 0.39, "B1": 0.70, "B2": 1.0, "B3": 1.8, "B4": 4.2, "B5": 9.9, "B6": 19, "B7": 37}
    params, macs = ({p.name: p.x for p in points(axis)} for axis in ("params", "macs"))
    for label in millions:
        assert params[f"EfficientNet-{label}"] == pytest.approx(1e6 * millions[label], rel=0.03)
        assert macs[f"EfficientNet-{label}"] == pytest.approx(1e9 * billions[label], rel=0.05)


def test_the_claims_of_the_paper_can_be_read_off() -> None:
    """Figure 1 and 5: of the networks of Table 2, only EfficientNets are on the front; B3 against ResNeXt-101 18 x."""
    table = [p for p in points("macs") if "Table 2" in p.source]
    assert {p.family for p in front(table)} == {"EfficientNet"}
    macs = {p.name: p.x for p in table}
    assert macs["ResNeXt-101"] / macs["EfficientNet-B3"] == pytest.approx(18, abs=0.6)


def test_every_row_names_its_source_and_a_network_that_exists() -> None:
    names = [row.name for row in PUBLISHED]
    assert len(set(names)) == len(names)
    for row in PUBLISHED:
        assert row.source and 60 < row.top1 < 90
        assert (row.network in families.names()) == (row.params is None and row.macs is None)
    assert published.Published.from_dict(PUBLISHED[0].to_dict()) == PUBLISHED[0]


def test_what_is_not_known_is_left_out() -> None:
    assert "GPipe" in {p.name for p in points("params")}
    assert "GPipe" not in {p.name for p in points("macs")}
    assert all(p.computed for p in points("activations"))


def test_latency_comes_from_the_table() -> None:
    found = {p.name: p.x for p in points("latency_ms", TABLE)}
    assert found["ResNet-50"] == TABLE.predict(families.get("resnet50"))
    assert "PolyNet" not in found
    with pytest.raises(UsageError, match="effnet bench --table"):
        points("latency_ms")
    with pytest.raises(UsageError, match="Did you mean 'activations'"):
        points("activation")


def test_the_figure_is_readable_on_white_and_black(tmp_path: Path) -> None:
    axis, path = "params", tmp_path / "made" / "params.png"
    best = pareto(points(axis), axis, path)
    assert [p.name for p in best] == [p.name for p in front(points(axis))]
    pixels = np.asarray(Image.open(path).convert("RGBA")).reshape(-1, 4)
    assert (pixels[:, 3] == 0).mean() > 0.5  # the background lets the page through
    solid = pixels[pixels[:, 3] == 255][:, :3] / 255
    linear = np.where(solid <= 0.04045, solid / 12.92, ((solid + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    assert (
        np.quantile(luminance, 0.01) > 0.08 and np.quantile(luminance, 0.99) < 0.35
    )  # contrast (WCAG) over 2.6 to both


@pytest.mark.parametrize("axis", ["params", "macs", "activations", "latency_ms"])
def test_no_name_lies_on_another(axis: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept: list[Figure] = []
    real = plots._figure
    monkeypatch.setattr(plots, "_figure", lambda: kept.append(real()) or kept[-1])
    found = points(axis, TABLE)
    pareto(found, axis, tmp_path / "x.svg", note="a note")
    (figure,) = kept
    texts = figure.axes[0].texts
    assert len(texts) == len(found)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent().extents for text in texts]
    frame = figure.bbox
    for i, box in enumerate(boxes):
        assert frame.x0 <= box[0] and box[2] <= frame.x1, texts[i].get_text()
        for j in range(i):
            smaller = min(float(np.prod(one[2:] - one[:2])) for one in (box, boxes[j]))
            shared = plots.overlap(box, boxes[j][None]) / smaller
            assert shared < 0.2, (texts[i].get_text(), texts[j].get_text())


def test_svg_and_bad_files(tmp_path: Path) -> None:
    pareto([point("one", 1e6, 70), point("two", 2e6, 80)], "params", tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")
    with pytest.raises(UsageError, match=r"\.png, \.svg"):
        pareto([point("one", 1, 1)], "params", tmp_path / "x.jpeg")
    with pytest.raises(UsageError, match="no points"):
        pareto([], "params", tmp_path / "x.png")


def test_predictions_beside_measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A colour per family, and the point of each network where its two times say."""
    kept: list[Figure] = []
    real = plots._figure
    monkeypatch.setattr(plots, "_figure", lambda: kept.append(real()) or kept[-1])
    names = ["efficientnet_b0 x", "efficientnet_lite0", "efficientnetv2_b0", "resnet18", "mnasnet_a1", "resnet50"]
    plots.agreement(names, [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], tmp_path / "figures" / "a.svg", "title")
    (axes,) = kept[0].axes
    drawn = {tuple(offset) for c in axes.collections if len(c.get_offsets()) for offset in c.get_offsets().tolist()}
    assert {(6.0, 1.0), (5.0, 2.0), (4.0, 3.0), (3.0, 4.0), (2.0, 5.0), (1.0, 6.0)} <= drawn
    named = [text.get_text() for text in axes.texts]
    assert named == ["efficientnet", "efficientnet_lite", "efficientnetv2", "other", "resnet"]
    assert (tmp_path / "figures" / "a.svg").is_file()


def test_the_command_draws_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFNET_CACHE", str(tmp_path))
    out = tmp_path / "p.svg"
    found = run("plot", "pareto", "--x", "macs", "--out", out, "--json").document
    assert out.is_file()
    assert found["front"][-1] == "EfficientNetV2-L"
    assert {p["name"]: p["x"] for p in found["points"]}["EfficientNet-B0"] == cost(families.get("efficientnet_b0")).macs
    assert "Did you mean 'params'" in refused("plot", "pareto", "--x", "param")
    assert "effnet bench --table" in refused("plot", "pareto", "--x", "latency_ms")
    assert "pareto" in refused("plot", "paretto")
    assert set(AXES) == {"params", "macs", "activations", "latency_ms"}

"""The report: complete in itself, well-formed, the numbers of the files, and safe whatever the data is called."""

import base64
import io
import itertools
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from effnet import checkpoint, recipes
from effnet.cost import cost
from effnet.evaluate import Evaluation, Scores, measure, write_predictions
from effnet.network import build
from effnet.plan import Plan, PlanRow
from effnet.recipes import Recipe, Schedule, phases
from effnet.report import report, shell
from effnet.report.examples import chosen
from effnet.report.markup import VOID, Html, listed, tag
from effnet.runs import Judged, read_history, read_run
from effnet.samples import ArrayPixels, Splits, labelled
from effnet.spec import Head, Network, Preprocess, Stage, Stem
from effnet.value import UsageError
from effnet.words import SHARES

CLASSES = ("dark", "light", "striped")
HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b $x_2$ 猫")
RECIPE = Recipe(name="finetune", epochs=3, stages=2, head_epochs=1, batch=8, size_px=(12, 16), drop_path=(0.0, 0.1))
IMAGES = 24  # of the test part
STEP_MS, WAIT_MS, JUDGING_S = 500.0, 50.0, 3.0


# --- a run that nobody trained --------------------------------------------------------------------------------------


def network(classes: int) -> Network:
    return Network(
        name="tiny",
        stem=Stem(width=8),
        stages=(Stage(op="mbconv", repeats=1, width=8, stride=2), Stage(op="fused", repeats=2, width=8, stride=1)),
        head=Head(width=16, classes=classes),
        resolution=16,
        preprocess=Preprocess(size=16, resize=16),
        dropout=0.0,
        drop_path=0.0,
    )


def made_plan(classes: Sequence[str]) -> Plan:
    """Two steps per epoch; the head alone, then two phases."""
    made = network(len(classes))
    rows = tuple(
        PlanRow(phase=phase, steps=2 * phase.epochs, macs=10**6, training_bytes=10**7, images_per_s=16.0, seconds=2.2)
        for phase in phases(RECIPE, made)
    )
    return Plan(
        network=made, recipe=RECIPE, preprocess=made.preprocess, classes=tuple(classes), train_images=17, val_images=9,
        params=cost(made).params, precision="float32", device="cpu", threads=2, disk_bytes=10**6, rows=rows,
    )  # fmt: skip


def events(plan: Plan, *, data: str, note: str) -> list[dict[str, Any]]:
    """What a run of this plan logs. Every step takes STEP_MS, of which it waits WAIT_MS; epoch 2 is the best."""
    start = {
        "event": "start", "step": 0, "data": data, "note": note, "fingerprint": "0123456789abcdef",
        "classes": list(plan.classes), "images": {"train": 17, "val": 9, "test": IMAGES}, "precision": "float32",
        "environment": {"python": "3.11.7", "torch": "2.13.0", "processor": "an abacus", "threads": 2, "device": "cpu"},
        "pid": 1,
    }  # fmt: skip
    found: list[dict[str, Any]] = [start]
    step = epoch = 0
    for row in plan.rows:
        found.append({"event": "phase", "step": step, **row.phase.to_dict()})
        for _ in range(row.phase.epochs):
            for _ in range(2):
                step += 1
                found.append({
                    "event": "step", "step": step, "epoch": epoch, "phase": row.phase.index, "loss": 1 / step,
                    "lr": 1e-3 / step, "images_per_s": 16.0, "wait_ms": WAIT_MS, "step_ms": STEP_MS,
                })  # fmt: skip
            accuracy = (0.5, 0.625, 0.875, 0.75)[epoch]
            found.append({
                "event": "epoch", "step": step, "epoch": epoch, "phase": row.phase.index, "size_px": row.phase.size_px,
                "train_loss": 1 / step, "val": {"accuracy": accuracy, "macro_f1": accuracy, "auroc": None, "nll": 0.4},
                "best": epoch < 3, "seconds": JUDGING_S,
            })  # fmt: skip
            epoch += 1
    return [*found, {"event": "end", "best_epoch": 2, "metrics": {}, "seconds": 10.0}]


def made_scores(classes: Sequence[str], ids: Sequence[str] | None = None) -> Scores:
    """Random logits that are right more often than not; weights, and two groups."""
    rng, n = np.random.default_rng(5), IMAGES
    labels = np.arange(n) % len(classes)
    logits = rng.normal(size=(n, len(classes))).astype(np.float32)
    logits[np.arange(n), labels] += 1
    return Scores(
        source="test", classes=tuple(classes), ids=tuple(ids or (f"test/{i:02d}.png" for i in range(n))),
        logits=logits, labels=labels, weights=np.where(np.arange(n) % 4, 1, 0.5).astype(np.float32),
        groups=tuple("east" if i % 2 else "<west>" for i in range(n)),
    )  # fmt: skip


def made_data(classes: Sequence[str], ids: Sequence[str] | None = None) -> Splits:
    """Test image i is grey all over, of brightness 10 i."""
    pixels = ArrayPixels(array=np.stack([np.full((20, 20), 10 * i, dtype=np.uint8) for i in range(IMAGES)]))
    names = ids or [f"test/{i:02d}.png" for i in range(IMAGES)]
    labels = [i % len(classes) for i in range(IMAGES)]
    everything = labelled("test", pixels, names, labels, tuple(classes))
    train = everything.subset(range(2), "train")
    return Splits(train=train, val=None, test=everything, classes=tuple(classes), name="made")


def make_run(
    folder: Path,
    *,
    classes: Sequence[str] = CLASSES,
    evaluated: bool = True,
    ids: Sequence[str] | None = None,
    data: str = "/nowhere/greys",
    note: str = "Made in code. Cite nobody.",
) -> Path:
    folder.mkdir()
    todo = made_plan(classes)
    (folder / "plan.json").write_text(todo.to_json())
    (folder / "recipe.json").write_text(RECIPE.to_json())
    lines = [json.dumps(event) + "\n" for event in events(todo, data=data, note=note)]
    (folder / "log.jsonl").write_text("".join(lines))
    model = build(todo.network, generator=torch.Generator().manual_seed(0))
    model.labels = todo.classes
    checkpoint.save(folder / "best.safetensors", checkpoint.from_model(model))
    if evaluated:
        scores = made_scores(classes, ids)
        document = {"model": str(folder), "data": data, "split": "test"} | measure(scores, bootstrap=50).to_dict()
        (folder / "eval.json").write_text(json.dumps(document))
        write_predictions(folder / "predictions.csv", scores)
    return folder


# --- a reader of the page -------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Reads strictly: every element is closed in order. Keeps elements, their attributes and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert self.open == [], "elements were left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.elements if found == name]

    @property
    def values(self) -> set[float]:
        """Every number that stands in the page with all its digits."""
        return {float(attributes["value"]) for attributes in self.all("data")}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a whole run; tests only read it."""
    run = make_run(tmp_path_factory.mktemp("runs") / "whole")
    published = [
        {"name": "others", "metric": "weighted_accuracy", "value": 88.42, "source": "https://example.org/paper"},
        {
            "name": "elsewhere",
            "metric": "weighted_accuracy",
            "value": 0.5,
            "source": "javascript:alert(1)",
            "note": "?",
        },
    ]
    (run / "published.json").write_text(json.dumps(published))
    return Page(report(run, data=made_data(CLASSES)))


@pytest.fixture(scope="module")
def judged() -> Evaluation:
    return measure(made_scores(CLASSES), bootstrap=50)


# --- the page itself ------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_runs_nothing(page: Page) -> None:
    for name, attributes in page.elements:
        assert name not in ("script", "link", "iframe", "object", "embed", "base", "form"), name
        assert not any(key.startswith("on") for key in attributes), attributes
        assert attributes.get("src", "data:image/").startswith("data:image/")
        if name != "a":
            assert attributes.get("href", "#").startswith("#")
    assert [link["href"] for link in page.all("a") if link["href"][0] != "#"] == ["https://example.org/paper"]
    assert "url(http" not in page.source and "@import" not in page.source
    policies = [meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert [policy["content"].split(";")[0] for policy in policies] == ["default-src 'none'"]


def test_links_within_the_page_arrive_and_ids_are_unique(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"][1:] for _, attributes in page.elements if attributes.get("href", "")[:1] == "#"}
    targets |= set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert targets and targets <= set(ids)


def test_every_part_of_a_whole_run_has_its_section(page: Page) -> None:
    names = [section["id"] for section in page.all("section")]
    assert names == [
        "results", "published", "data", "classes", "calibration", "groups", "examples", "plan", "curves", "network",
        "environment", "reproduce",
    ]  # fmt: skip
    assert len(page.all("svg")) == 5  # four curves and the reliability diagram


def test_pictures_speak_to_those_who_cannot_see_them(page: Page) -> None:
    assert all(image["alt"].strip() for image in page.all("img"))
    assert all(drawing["role"] == "img" and len(drawing["aria-label"]) > 10 for drawing in page.all("svg"))
    assert all(cell["scope"] in ("row", "col") for cell in page.all("th"))
    assert all(frame["tabindex"] == "0" for frame in page.all("div") if frame.get("class") == "scroll")
    assert page.all("html")[0]["lang"] == "en"
    assert any("at best 87.50 % in epoch 3" in drawing["aria-label"] for drawing in page.all("svg"))


def test_drawings_take_their_colours_from_the_page(page: Page) -> None:
    drawn = " ".join(re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL))
    used = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawn)) - {"none"}
    assert used and used <= {"var(--ink)", "var(--soft)", "var(--line)", "var(--accent)"}


def test_the_page_follows_the_readers_scheme_paper_and_width(page: Page) -> None:
    assert "@media (prefers-color-scheme: dark)" in page.source and "@media print" in page.source
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = report(run).read_bytes()
    assert report(run).read_bytes() == first


# --- the numbers ----------------------------------------------------------------------------------------------------


def test_every_metric_stands_in_the_page_with_all_its_digits(page: Page, judged: Evaluation) -> None:
    for part in (judged, *judged.groups.values()):
        assert {value for value in part.metrics.values() if value is not None} <= page.values
    rows = judged.per_class
    assert {share for row in rows for share in (row.precision, row.recall, row.f1) if share is not None} <= page.values
    accuracy, interval = judged.metrics["weighted_accuracy"], judged.intervals["weighted_accuracy"]
    assert accuracy is not None and f"{100 * accuracy:.2f} %" in page.text
    assert f"{100 * interval.low:.2f} to {100 * interval.high:.2f} %" in page.text


def test_the_confusion_matrix_is_that_of_the_evaluation(page: Page, judged: Evaluation) -> None:
    table = re.search(r'<table class="confusion">.*?</table>', page.source, flags=re.DOTALL)
    assert table is not None
    assert [int(count) for count in re.findall(r">(\d+)<small>", table[0])] == [
        n for row in judged.confusion for n in row
    ]


def test_published_results_stand_beside_ours_on_one_scale(page: Page, judged: Evaluation) -> None:
    assert {0.8842, 0.5, judged.metrics["weighted_accuracy"]} <= page.values
    places = [float(at) for at in re.findall(r"--at: ([\d.]+)%", page.source)]
    ours, others, elsewhere = places
    assert 0 < elsewhere < ours < others < 100
    assert judged.metrics["weighted_accuracy"] == pytest.approx(
        0.5 + 0.3842 * (ours - elsewhere) / (others - elsewhere), abs=1e-3
    )


def test_expected_time_stands_beside_measured_time(page: Page) -> None:
    assert [row.phase.epochs for row in made_plan(CLASSES).rows] == [1, 2, 1]
    assert re.findall(r'<td class="number">(\d+ s)</td>', page.source) == [
        "2 s",
        "4 s",
        "2 s",
        "8 s",
        "2 s",
        "4 s",
        "7 s",
        "16 s",
    ]
    assert "Waiting for images took 10.00 % of the time" in page.text


def test_the_commands_of_the_page_make_the_run_again(page: Page) -> None:
    text = page.text.replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if "effnet train" in line and "--out" in line]
    words = shlex.split(line[line.index("effnet train") :])
    assert words[2:7] == ["/nowhere/greys", "--model", "tiny", "--recipe", "finetune"]
    given = dict(word.split("=") for flag, word in itertools.pairwise(words) if flag == "--set")
    assert recipes.with_settings(recipes.get("finetune"), given) == RECIPE


@pytest.mark.parametrize(
    "recipe",
    [
        recipes.get("scratch"),
        recipes.get("inspection").replace(dropout=None, size_px=(96, 160), eval_px=128, balance=True),
        recipes.get("finetune").replace(schedule=Schedule(kind="staircase", every=0.1), patience=0, lr=3e-5),
    ],
)
def test_settings_are_the_inverse_of_with_settings(recipe: Recipe) -> None:
    assert recipes.with_settings(recipes.get(recipe.name), recipes.settings(recipe)) == recipe


def test_a_command_survives_the_shell() -> None:
    words = ["effnet", "train", "it's here", *[f"--set=a{i}=b c" for i in range(12)]]
    assert shlex.split(shell(words, width=40).replace("\\\n", "")) == words


# --- examples -------------------------------------------------------------------------------------------------------


def row(name: str, label: str, predicted: str, confidence: float) -> Judged:
    return Judged(id=name, label=label, predicted=predicted, confidence=confidence, weight=1, group="")


def test_the_examples_are_sure_mistakes_doubts_and_sure_successes_of_each_class() -> None:
    rows = [row(f"m{i}", "cat", "dog", 0.51 + 0.01 * i) for i in range(9)]
    rows += [row(f"c{i}", "cat", "cat", 0.60 + 0.04 * i) for i in range(9)]
    rows += [row("d0", "dog", "dog", 0.7)]
    wrong, unsure, correct = ([found.id for found in part] for part in chosen(rows))
    assert wrong == ["m8", "m7", "m6", "m5", "m4", "m3"]
    assert unsure == ["m0", "m1", "m2"]
    assert correct == ["c8", "d0", "c7"]


def test_no_image_is_an_example_twice_and_a_perfect_model_has_no_mistakes() -> None:
    wrong, unsure, correct = chosen([row(str(i), "cat", "cat", 0.5 + i / 10) for i in range(5)])
    assert wrong == []
    assert [found.id for found in unsure] == ["0", "1", "2"]
    assert [found.id for found in correct] == ["4", "3"]


def test_examples_show_the_images_they_name(page: Page) -> None:
    images = [image for image in page.all("img") if image["alt"].startswith("test/")]
    assert 6 <= len(images) <= 12
    for image in images:
        number = int(image["alt"][5:7])
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))))
        assert shown.shape == (16, 16, 3)  # the network's view of 20 x 20
        assert abs(shown.astype(int) - 10 * number).max() <= 3  # JPEG


def test_without_the_data_the_report_says_so_and_is_made(tmp_path: Path) -> None:
    page = Page(report(make_run(tmp_path / "run")))
    assert "There are no pictures to show: there is no data at /nowhere/greys" in page.text
    assert page.all("img") == []


def test_images_that_are_gone_are_named(tmp_path: Path) -> None:
    whole = made_data(CLASSES)
    assert whole.test is not None
    part = replace(whole, test=whole.test.subset(range(12), "test"))
    page = Page(report(make_run(tmp_path / "run"), data=part))
    assert "it is not in the data any more" in page.text
    assert page.all("img")


def test_damaged_weights_cost_the_pictures_only(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "best.safetensors").write_bytes((run / "best.safetensors").read_bytes()[:-8])
    page = Page(report(run, data=made_data(CLASSES)))
    assert "There are no pictures to show" in page.text and "best.safetensors" in page.text
    assert "weighted_accuracy" not in page.text and "Weighted accuracy" in page.text


# --- runs that are not whole ----------------------------------------------------------------------------------------


def test_a_run_that_was_only_trained_says_how_to_evaluate_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluated=False)
    page = Page(report(run))
    assert "Not evaluated on test images." in page.text
    assert f"effnet eval {run} /nowhere/greys --split test" in page.text.replace("\\\n    ", "")
    names = [section["id"] for section in page.all("section")]
    assert names == ["results", "data", "plan", "curves", "network", "environment", "reproduce"]
    assert 0.875 in page.values and "Accuracy (validation)" in page.text  # of the epoch that was kept


def test_a_run_that_was_stopped_in_its_first_epoch_has_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluated=False)
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)[:3]
    (run / "log.jsonl").write_text("".join(lines) + '{"event": "step", "st')
    (run / "best.safetensors").unlink()
    page = Page(report(run))
    assert "Training did 1 of 8 steps and was not finished" in page.text
    assert "results" not in [section["id"] for section in page.all("section")]
    assert len(page.all("svg")) == 3  # nothing was validated


def test_a_run_without_a_single_step_has_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluated=False)
    (run / "log.jsonl").write_text((run / "log.jsonl").read_text().splitlines()[0] + "\n")
    page = Page(report(run))
    assert "Training did 0 of 8 steps" in page.text and not page.all("svg")


def test_what_went_wrong_on_the_way_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    log.insert(3, {"event": "skip", "step": 1, "image": "broken<1>.png", "reason": "it is cut off"})
    log.insert(9, log[0] | {"step": 4})
    next(event for event in log if event["event"] == "epoch")["save_failed"] = ["no space left on device"]
    (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
    page = Page(report(run))
    assert "1 training images could not be read" in page.text and "broken<1>.png (it is cut off)" in page.text
    assert "interrupted and resumed once" in page.text
    assert "A checkpoint was not saved: no space left on device" in page.text


@pytest.mark.parametrize("missing", ["plan.json", "recipe.json", "log.jsonl"])
def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path / "run")
    (run / missing).unlink()
    with pytest.raises(UsageError, match=rf"is not a run folder: it has no {missing}.*effnet train"):
        report(run)
    with pytest.raises(UsageError, match="there is no such folder"):
        report(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("eval.json", "{", "Expecting property name"),
        ("eval.json", '{"source": "test"}', "Evaluation cannot be made"),
        ("predictions.csv", "id,label\n1,2\n", "'predicted' is missing"),
        ("published.json", '[{"name": "x", "metric": "acuracy", "value": 1}]', "Did you mean 'accuracy'"),
        ("plan.json", "[]", "described by an object"),
        ("log.jsonl", '{"event": "end"}\n', "it has no start event"),
        ("log.jsonl", "", "it has no start event"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    tmp_path: Path, name: str, content: str, reason: str
) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(UsageError, match=reason) as caught:
        report(run)
    assert str(run / name) in str(caught.value)
    assert not (run / "report.html").exists()


# --- names from the data --------------------------------------------------------------------------------------------


def test_no_name_from_the_data_becomes_markup(tmp_path: Path) -> None:
    ids = [f"{HOSTILE[i % 3]}/{i:02d}" for i in range(IMAGES)]
    run = make_run(tmp_path / "run", classes=HOSTILE, ids=ids, data="<b>data</b>", note="<i>note</i> & more")
    published = [{"name": HOSTILE[0], "metric": "accuracy", "value": 0.9, "source": HOSTILE[1], "note": HOSTILE[2]}]
    (run / "published.json").write_text(json.dumps(published))
    page = Page(report(run, data=made_data(HOSTILE, ids)))
    elements = {name for name, _ in page.elements}
    assert "script" not in elements
    assert all(image["src"].startswith("data:") and "onerror" not in image for image in page.all("img"))
    for name in (*HOSTILE, "<b>data</b>", "<i>note</i> & more", "<west>"):
        assert name in page.text


def test_names_that_are_no_text_are_written_all_the_same(tmp_path: Path) -> None:
    ids = [f"\udcff{i:02d}.png" for i in range(IMAGES)]  # a file name that is not UTF-8, as Python gives it
    page = Page(report(make_run(tmp_path / "run", ids=ids), data=made_data(CLASSES, ids)))
    assert len(page.all("img")) > 6


def test_text_is_escaped_once_and_markup_never_again() -> None:
    assert tag("p", "a < b", tag("b", "&"), None, 3) == "<p>a &lt; b<b>&amp;</b>3</p>"
    assert tag("p", Html("<i>")) == "<p><i></p>"
    assert tag("meta", name="x", content='"') == '<meta name="x" content="&quot;">'
    assert listed(["a", "b"]) == "a, b"


def test_a_thousand_classes_stay_readable_and_small(tmp_path: Path) -> None:
    rng, k, n = np.random.default_rng(0), 300, 1500
    labels = np.arange(n) % k
    logits = rng.normal(size=(n, k)).astype(np.float32)
    logits[np.arange(n), labels] += 4
    logits[labels == 7] = 0
    logits[labels == 7, 8] = 9  # class 7 is always taken for class 8
    classes = tuple(f"class {i}" for i in range(k))
    scores = Scores(
        source="test", classes=classes, ids=tuple(map(str, range(n))), logits=logits, labels=labels,
        weights=np.ones(n, dtype=np.float32),
    )  # fmt: skip
    run = make_run(tmp_path / "run", classes=classes, evaluated=False)
    (run / "eval.json").write_text(measure(scores, bootstrap=0).to_json())
    path = report(run)
    page = Page(path)
    assert path.stat().st_size < 1_000_000
    assert "The 25 classes with the lowest F1." in page.text and "All 300 classes" in page.text
    assert re.search(r'<th scope="row">class 7</th><td>class 8</td><td class="number">5</td>', page.source)
    (matrix,) = page.all("img")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(matrix["src"].split(",")[1]))))
    assert shown.shape == (k, k, 4)
    assert ((shown[..., 3] > 0) == (np.array(measure(scores, bootstrap=0).confusion) > 0)).all()


# --- the log --------------------------------------------------------------------------------------------------------


def test_time_and_waiting_are_counted_per_phase_and_epoch() -> None:
    log = events(made_plan(CLASSES), data="x", note="")
    log[2]["wait_ms"] = 250.0  # the first step
    history = read_history("\n".join(map(json.dumps, log)))
    assert [history.phase_steps(index) for index in range(3)] == [2, 4, 2]
    assert history.phase_seconds(1) == pytest.approx(4 * STEP_MS / 1e3 + 2 * JUDGING_S)
    assert history.seconds == pytest.approx(8 * STEP_MS / 1e3 + 4 * JUDGING_S)
    assert history.wait_share(0) == pytest.approx((250 + WAIT_MS) / (2 * STEP_MS))
    assert history.wait_share(1) == pytest.approx(WAIT_MS / STEP_MS)
    assert history.best is not None and history.best["epoch"] == 2
    assert history.ending == "end"


def test_a_torn_line_ends_the_log_where_resuming_would() -> None:
    lines = [json.dumps(event) for event in events(made_plan(CLASSES), data="x", note="")]
    history = read_history("\n".join([*lines[:4], lines[4][:9], *lines[5:]]))
    assert len(history.steps["step"]) == 2 and history.epochs == () and history.best is None and history.ending is None


def test_what_the_run_folder_holds_is_read_back(tmp_path: Path, judged: Evaluation) -> None:
    run = read_run(make_run(tmp_path / "run"))
    assert run.plan == made_plan(CLASSES) and run.recipe == RECIPE
    assert run.evaluation is not None and run.evaluation.metrics == judged.metrics
    scores = made_scores(CLASSES)
    assert [row.confidence for row in run.predictions] == scores.probabilities.max(axis=1).tolist()
    assert np.mean([row.correct for row in run.predictions]) == judged.metrics["accuracy"]
    assert set(run.metrics) - {"nll"} <= set(SHARES)

"""Predictions row by row: real photographs in, one row each out, whatever is wrong with some of them."""

import importlib.resources
import itertools
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import effnet.engine
import effnet.inputs
import effnet.predict
from effnet.bench import ready
from effnet.engine import TorchEngine, evaluating, logits
from effnet.families import get
from effnet.images import ImageError, decode, normalise, prepare
from effnet.inputs import Input, batched
from effnet.network import Model, build, label_names
from effnet.predict import (
    BATCHES_AHEAD,
    MEMORY_SHARE,
    MOST_IMAGES,
    Prediction,
    answers,
    batch_that_fits,
    identity,
    map_bytes,
    opened_on,
    predict,
)
from effnet.spec import Head, Network, Preprocess, Stage, Stem
from effnet.value import UsageError
from tests.conftest import need

LABELS = ("cat", "coffee", "rocket", "moon", "brick")
PHOTOS = ("chelsea.png", "coffee.png", "rocket.jpg", "moon.png", "brick.png")


def small_model(labels: tuple[str, ...] | None = LABELS) -> Model:
    network = Network(
        name="small",
        stem=Stem(width=8),
        stages=(Stage(op="mbconv", repeats=1, width=8, stride=2, expand=2, se=0.25),),
        head=Head(width=16, classes=len(LABELS)),
        resolution=32,
        preprocess=Preprocess(size=32, resize=36),
    )
    model = build(network, generator=torch.Generator().manual_seed(0))
    model.labels = labels
    return model


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with five photographs, two of them nested, and a text file."""
    need("skimage")
    data = importlib.resources.files("skimage") / "data"
    folder = tmp_path / "photos"
    (folder / "more" / "deep").mkdir(parents=True)
    for name, place in zip(PHOTOS, (".", ".", "more", "more/deep", "."), strict=True):
        shutil.copy(str(data / name), folder / place / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def by_hand(model: Model, path: Path) -> np.ndarray:
    """Probabilities of one image, alone, without anything from `predict`."""
    view = torch.from_numpy(prepare(decode(path), model.preprocess))[None]
    with torch.no_grad():
        return model.eval()(normalise(view, model.preprocess))[0].double().softmax(0).numpy()


def test_a_folder_gives_one_row_per_image_with_the_probabilities_of_each_image_alone(photos: Path) -> None:
    model = small_model()
    rows = list(predict(model, [photos], top_k=5, batch=2))
    assert [Path(row.path).name for row in rows] == ["brick.png", "chelsea.png", "coffee.png", "moon.png", "rocket.jpg"]
    for row in rows:
        wanted = by_hand(model, Path(row.path))
        assert row.error is None
        assert row.labels == tuple(LABELS[i] for i in np.argsort(-wanted))
        np.testing.assert_allclose(row.probabilities, np.sort(wanted)[::-1], atol=1e-5)  # sums in another order
        assert sum(row.probabilities) == pytest.approx(1, abs=1e-9)


def test_inputs_keep_their_order_and_a_file_named_twice_has_two_rows(photos: Path) -> None:
    cat, rocket = photos / "chelsea.png", photos / "more" / "rocket.jpg"
    rows = list(predict(small_model(), [rocket, cat, str(rocket), photos / "more"], top_k=1, batch=3))
    assert [row.path for row in rows] == [
        str(path) for path in (rocket, cat, rocket, photos / "more" / "deep" / "moon.png", rocket)
    ]
    assert rows[0] == rows[2] == rows[4]


@pytest.mark.parametrize("batch", [1, 2, 3, 32])
def test_a_broken_file_in_the_middle_costs_only_its_own_row(photos: Path, batch: int) -> None:
    model = small_model()
    whole = [photos / "chelsea.png", photos / "coffee.png", photos / "brick.png"]
    broken = photos / "torn.png"
    broken.write_bytes(whole[0].read_bytes()[:5000])
    text = photos / "notes.txt"  # named by the user, so it is an input like the others
    rows = list(predict(model, [whole[0], broken, text, whole[1], whole[2]], top_k=2, batch=batch))
    assert [row.path for row in rows] == [str(p) for p in (whole[0], broken, text, whole[1], whole[2])]
    assert [row.error is None for row in rows] == [True, False, False, True, True]
    assert rows[1].labels == () and "truncated" in str(rows[1].error)
    assert str(broken) not in str(rows[1].error), "the path has a column of its own"
    for row in (rows[0], rows[3], rows[4]):
        wanted = np.sort(by_hand(model, Path(row.path)))[::-1][:2]
        np.testing.assert_allclose(row.probabilities, wanted, atol=1e-5)


def test_only_broken_files_still_give_a_row_each(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    rows = list(predict(small_model(), [tmp_path]))
    assert [row.error for row in rows] == ["is empty", "is empty"]


def test_on_request_a_broken_file_stops_after_the_rows_before_it(photos: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"nothing")
    rows = predict(
        small_model(), [photos / "chelsea.png", photos / "broken.jpg", photos / "coffee.png"], on_error="error"
    )
    assert next(rows).path.endswith("chelsea.png")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        next(rows)


def test_a_path_that_does_not_exist_is_refused_before_any_image_is_read(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effnet.inputs, "decode", lambda path, name: pytest.fail("an image was read"))
    with pytest.raises(UsageError, match="nowhere"):
        predict(small_model(), [photos, tmp_path / "nowhere.png"])


def test_a_folder_without_images_and_no_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=str(tmp_path)):
        predict(small_model(), [tmp_path])
    with pytest.raises(UsageError, match="no image was named"):
        predict(small_model(), [])


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"batch": 0}, {"workers": 0}, {"on_error": "ignore"}])
def test_arguments_out_of_range_are_refused_at_once(photos: Path, wrong: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", ".")):
        predict(small_model(), [photos], **wrong)


def test_top_k_above_the_number_of_classes_gives_all_of_them(photos: Path) -> None:
    (row,) = predict(small_model(), [photos / "chelsea.png"], top_k=99)
    assert sorted(row.labels) == sorted(LABELS)
    (row,) = predict(small_model(), [photos / "chelsea.png"], top_k=2)
    assert len(row.labels) == len(row.probabilities) == 2


def test_outputs_without_labels_are_called_by_their_number(photos: Path) -> None:
    model = small_model(None)
    assert label_names(model) == ("0", "1", "2", "3", "4")
    (row,) = predict(model, [photos / "chelsea.png"], top_k=1)
    assert int(row.labels[0]) == by_hand(model, photos / "chelsea.png").argmax()


def test_between_rows_the_caller_has_its_own_modes_back(photos: Path) -> None:
    model = small_model().train()
    model.head.eval()  # frozen, say
    model.set_grad_checkpointing()
    before = {name: module.training for name, module in model.named_modules()}
    rows = predict(model, [photos], batch=1)
    next(rows)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.grad_checkpointing and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_evaluating_restores_the_modes_after_an_error_too() -> None:
    model = small_model().train()
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("stop")
    assert all(module.training for module in model.modules())


def test_logits_reach_the_network_channels_last_and_leave_as_float32_on_the_cpu() -> None:
    model, seen = small_model().eval(), []
    model.stem.conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    output = logits(model, torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and seen[0].shape == (2, 3, 32, 32)
    assert output.dtype == torch.float32 and output.shape == (2, 5) and not output.requires_grad


def test_images_are_decoded_a_bounded_number_of_batches_ahead(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Path] = []
    image = decode(photos / "brick.png")
    monkeypatch.setattr(effnet.inputs, "decode", lambda path, name: begun.append(path) or image)
    rows = predict(small_model(), [photos / "brick.png"] * 40, batch=2)
    next(rows)
    time.sleep(0.3)  # long enough for all 40 views, were they asked for
    assert len(begun) == 2 * (1 + BATCHES_AHEAD)
    rows.close()


def test_no_thread_is_left_when_the_caller_loses_interest(photos: Path) -> None:
    rows = predict(small_model(), [photos] * 5, batch=1)
    next(rows)
    assert any(thread.name.startswith("effnet-predict") for thread in threading.enumerate())
    rows.close()
    assert not any(thread.name.startswith("effnet-predict") for thread in threading.enumerate())


def test_a_prediction_has_either_labels_or_an_error() -> None:
    with pytest.raises(UsageError):
        Prediction(path="x")
    with pytest.raises(UsageError):
        Prediction(path="x", labels=("cat",), probabilities=(1.0,), error="is empty")
    with pytest.raises(UsageError):
        Prediction(path="x", labels=("cat",), probabilities=(0.5, 0.5))


# --- streams and engines --------------------------------------------------------------------------------------------


class Constant:
    """An engine that is no PyTorch model; it says what it was given."""

    name, labels, preprocess = "constant", ("a", "b"), Preprocess(size=32, resize=36)

    def __init__(self, answer: tuple[float, float] = (0.25, 0.75)) -> None:
        self.answer, self.batches = answer, []

    def __call__(self, views: np.ndarray) -> np.ndarray:
        self.batches.append(views.shape)
        return np.tile(np.array(self.answer, dtype=np.float32), (len(views), 1))


def test_any_engine_predicts_and_has_already_chosen_its_device(photos: Path) -> None:
    engine = Constant()
    rows = list(predict(engine, [photos], top_k=1, batch=2))
    assert [(row.labels, row.probabilities) for row in rows] == [(("b",), (0.75,))] * 5
    assert engine.batches == [(2, 32, 32, 3), (2, 32, 32, 3), (1, 32, 32, 3)]
    for wrong in ({"turns": True}, {"device": "cpu"}):
        with pytest.raises(UsageError, match="when an engine is opened"):
            predict(engine, [photos], **wrong)


def test_an_answer_that_is_no_number_is_an_error_of_its_row(photos: Path) -> None:
    (row,) = predict(Constant((float("nan"), 0.5)), [photos / "coffee.png"])
    assert row.labels == () and "NaN" in str(row.error)


def test_a_batch_is_the_same_inputs_whatever_is_broken(photos: Path) -> None:
    (photos / "a-broken.png").write_bytes(b"")
    engine = Constant()
    assert len(list(predict(engine, [photos], batch=2))) == 6
    assert [shape[0] for shape in engine.batches] == [1, 2, 2]


def test_of_an_endless_stream_only_a_few_batches_are_taken(photos: Path) -> None:
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield Input(str(number), photos / "brick.png")

    rows = answers(Constant(), batched(endless(), 3), top_k=1)
    for _ in range(4):
        next(rows)
    assert len(taken) == 3 * (4 + BATCHES_AHEAD)
    rows.close()


@pytest.mark.parametrize(("name", "size"), [("efficientnet_b0", 64), ("efficientnetv2_b0", 64), ("resnet18", 128)])
def test_the_estimate_of_map_memory_is_close_above_what_pytorch_allocates(name: str, size: int) -> None:
    network = get(name)
    model = ready(network)

    def peak(images: int) -> float:
        x = torch.randn(images, 3, size, size).to(memory_format=torch.channels_last)
        with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            model(x)
        held = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        return max(itertools.accumulate(held))

    more = (peak(12) - peak(8)) / 4  # what does not grow with the batch is not of maps
    assert 0.95 * more <= map_bytes(network, size) <= 1.4 * more


def test_the_batch_is_the_largest_power_of_two_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    engine = TorchEngine(name="small", model=model)
    image = map_bytes(model.network, 32)
    for images, wanted in ((0.5, 1), (1, 1), (5, 4), (8, 8), (1e9, MOST_IMAGES["cpu"])):
        monkeypatch.setattr(effnet.predict, "memory_bytes", lambda device, n=images: n * image / MEMORY_SHARE)
        assert batch_that_fits(engine) == wanted
    monkeypatch.setattr(effnet.predict, "memory_bytes", lambda device: 100 * image / MEMORY_SHARE)
    assert batch_that_fits(Constant()) < batch_that_fits(engine), "an unknown network is taken for a large one"


def test_the_identity_of_an_engine_changes_with_whatever_decides_its_answers() -> None:
    def of(model: Model, **options) -> str:
        return identity(TorchEngine(name="small", model=model, **options))

    first = of(small_model())
    assert first == of(small_model()) and first.startswith("small (")
    nudged, renamed, cropped = small_model(), small_model(LABELS[::-1]), small_model()
    with torch.no_grad():
        nudged.classifier.bias[0] += 1e-6
    cropped.network = cropped.network.replace(preprocess=cropped.preprocess.replace(resize=40))
    assert len({first, of(nudged), of(renamed), of(cropped), of(small_model(), turns=True)}) == 5
    made = [identity(Exported(card=card, run=lambda views: views)) for card in ("weights 1", "weights 1", "weights 2")]
    assert made[0] == made[1] != made[2]


@dataclass(frozen=True, kw_only=True)
class Exported(Constant):
    """As an exported file opens: what it says of itself, and a function."""

    card: str
    run: Callable[[np.ndarray], np.ndarray]


def test_an_engine_that_is_no_model_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effnet.predict, "open_engine", lambda where, turns: Constant())
    for device in (None, "auto", "cpu"):
        assert opened_on("x.onnx", device=device).name == "constant"
    with pytest.raises(UsageError, match=r"x\.onnx \(constant\) cannot be moved to cuda"):
        opened_on("x.onnx", device="cuda")


# --- averaging over turns -------------------------------------------------------------------------------------------


def test_the_eight_turns_are_the_symmetries_of_the_square():
    square = torch.arange(9.0).reshape(1, 1, 3, 3)
    seen = {tuple(turned.flatten().tolist()) for turned in effnet.engine.eight_turns(square)}
    assert len(seen) == 8
    assert tuple(square.transpose(2, 3).flatten().tolist()) in seen  # a mirror at the diagonal is among them


def test_averaged_logits_do_not_change_when_the_image_is_turned_or_mirrored():
    model = small_model().eval()
    images = torch.randint(0, 256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    plain = logits(model, images, turns=True)
    for other in (images.flip(1), images.flip(2), images.transpose(1, 2), torch.rot90(images, 1, (1, 2))):
        torch.testing.assert_close(logits(model, other.contiguous(), turns=True), plain)
        assert not torch.allclose(logits(model, other.contiguous()), logits(model, images), atol=1e-4)


def test_predictions_over_turns_are_those_of_the_mean_logits(photos):
    model = small_model().eval()
    (row,) = predict(model, [photos / "coffee.png"], turns=True)
    view = torch.from_numpy(prepare(decode(photos / "coffee.png"), model.preprocess))
    by_hand = torch.stack([logits(model, turned[None])[0] for f in (view, view.flip(1)) for turned in quarters(f)])
    expected = by_hand.mean(0).double().softmax(0).sort(descending=True)
    assert row.labels == tuple(LABELS[i] for i in expected.indices)
    np.testing.assert_allclose(row.probabilities, expected.values, rtol=1e-5)


def quarters(view: torch.Tensor) -> list[torch.Tensor]:
    return [torch.rot90(view, quarter, (0, 1)).contiguous() for quarter in range(4)]

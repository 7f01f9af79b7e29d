"""The service as clients meet it: a real process, real sockets, a tiny network. The page is in test_serve_page.py."""

import base64
import contextlib
import http.client
import importlib.resources
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from effnet import checkpoint
from effnet.engine import TorchEngine
from effnet.explain import explain, heat, upsampled
from effnet.images import decode
from effnet.network import Model
from effnet.serve import Options, wire
from effnet.serve.worker import Worker, hello, opened, picture
from effnet.spec import Preprocess
from effnet.value import UsageError
from tests.conftest import need
from tests.conftest import picture as random_picture
from tests.test_cli import refused
from tests.test_predict import LABELS, by_hand, small_model

PATIENCE_S = 180  # for a process to start on a machine with other work to do


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running `effnet serve`."""

    url: str
    process: subprocess.Popen[str]
    client: httpx.Client

    @property
    def workers(self) -> list[int]:
        """The processes of its workers, as Linux lists them."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]

    def predict(self, *images: bytes, **query: Any) -> httpx.Response:
        """Sends a form."""
        files = [("image", (f"{i}.png", image)) for i, image in enumerate(images)]
        return self.client.post("/predict", files=files, params=query)

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics; 0 where there is none yet."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == name and s.labels == labels]
        return samples[0].value if samples else 0.0

    def until(self, condition: Callable[[], object]) -> None:
        """Waits for something that another process does."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.02)

    @contextlib.contextmanager
    def stopped(self) -> Generator[list[int]]:
        """Inside, the workers stand still: what is sent to them stays with them. Yields who they are."""
        workers = self.workers
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield workers
        finally:
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def serving(model: Path, *words: object, stderr: Path | None = None) -> Generator[Server]:
    """Runs `effnet serve MODEL WORDS` on a free port until the end of the block."""
    command = [sys.executable, "-m", "effnet", "serve", str(model), "--port", "0", "--json", *map(str, words)]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(stderr.open("w")) if stderr else None
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True))
        stack.callback(process.kill)
        assert process.stdout is not None
        found = json.loads(process.stdout.readline())
        client = stack.enter_context(httpx.Client(base_url=found["url"], timeout=PATIENCE_S))
        yield Server(url=found["url"], process=process, client=client)


def saved(path: Path, labels: tuple[str, ...] = LABELS) -> Path:
    checkpoint.save(path, checkpoint.from_model(small_model(labels)))
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    """Small limits, so that they are easily exceeded."""
    folder = tmp_path_factory.mktemp("serve")
    limits = ("--max-mb", 1, "--max-megapixels", 0.5, "--queue", 4, "--max-images", 3, "--max-batch", 2)
    limits += ("--timeout", PATIENCE_S)  # replacing a worker takes its time on a busy machine
    with serving(saved(folder / "small.safetensors"), *limits, stderr=folder / "log") as server:
        yield server


def png(seed: int = 0, **size: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(random_picture(seed, **size)).save(file, format="PNG")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few dozen bytes whose header states `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def expected(image: bytes, folder: Path, top_k: int = 5) -> list[tuple[str, float]]:
    """Labels and probabilities of one image alone, by the model itself, best first."""
    file = folder / "one.png"
    file.write_bytes(image)
    probabilities = by_hand(small_model(), file)
    return [(LABELS[i], float(probabilities[i])) for i in np.argsort(-probabilities)[:top_k]]


def assert_right(result: dict[str, Any], image: bytes, folder: Path, top_k: int = 5) -> None:
    wanted = expected(image, folder, top_k)
    assert [row["label"] for row in result["predictions"]] == [label for label, _ in wanted]
    assert [row["index"] for row in result["predictions"]] == [LABELS.index(label) for label, _ in wanted]
    np.testing.assert_allclose([row["probability"] for row in result["predictions"]], [p for _, p in wanted], atol=1e-5)


def assert_refused(answer: httpx.Response, status: int, code: str, words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["status"], error["code"]) == (status, code)
    assert words in error["message"], error["message"]


# --- answers --------------------------------------------------------------------------------------------------------


def test_an_image_as_it_is_and_forms_get_the_models_own_answers(server: Server, tmp_path: Path) -> None:
    images = [png(seed) for seed in range(3)]
    for kind in ("image/png", "application/octet-stream"):
        answer = server.client.post("/predict", content=images[0], headers={"content-type": kind})
        assert answer.status_code == 200
        (result,) = answer.json()["results"]
        assert_right(result, images[0], tmp_path)
        assert result["name"] is None
    document = server.predict(*images, top_k=2).json()
    assert document["model"] == "small, PyTorch float32"
    assert [result["name"] for result in document["results"]] == ["0.png", "1.png", "2.png"]
    for result, image in zip(document["results"], images, strict=True):
        assert_right(result, image, tmp_path, top_k=2)
    latency = document["latency_ms"]
    assert 0 < latency["model"] < latency["total"] and 1 <= latency["batch"] <= 2


def test_a_real_photograph_in_another_format(server: Server, tmp_path: Path) -> None:
    need("skimage")
    photo = (importlib.resources.files("skimage") / "data" / "rocket.jpg").read_bytes()
    (result,) = server.predict(photo).json()["results"]
    assert_right(result, photo, tmp_path)


def test_top_k_above_the_number_of_classes_gives_all_of_them(server: Server) -> None:
    (result,) = server.predict(png(), top_k=99).json()["results"]
    assert sorted(row["label"] for row in result["predictions"]) == sorted(LABELS)
    assert sum(row["probability"] for row in result["predictions"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("target", [None, "moon"])
def test_the_map_is_that_of_explain_over_the_part_that_the_network_sees(server: Server, target: str | None) -> None:
    image = png(1, height=200, width=640)
    query = {"cam": True} if target is None else {"cam": True, "target": target}
    (result,) = server.predict(image, **query).json()["results"]
    why = explain(small_model(), decode(image), target=target)
    assert result["cam"]["label"] == why.label == (target or result["predictions"][0]["label"])
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(result["cam"]["png"]))))
    assert pixels.shape == (100, 320, 4), "the image's proportions, at most 320 px"
    seen = pixels[..., 3] == 255
    rows, columns = np.nonzero(seen)
    side = 100 * 32 / 36  # `small_model` resizes to 36 and crops 32
    assert seen[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
    np.testing.assert_allclose([np.ptp(rows) + 1, np.ptp(columns) + 1], side, atol=1)
    np.testing.assert_allclose([rows.mean(), columns.mean()], [49.5, 159.5], atol=1)
    assert not pixels[~seen].any()
    colours = heat(upsampled(why.map, np.ptp(rows) + 1, np.ptp(columns) + 1))
    np.testing.assert_allclose(pixels[seen][:, :3].astype(int), colours.reshape(-1, 3), atol=2)


def test_the_model_its_limits_and_the_schema(server: Server) -> None:
    model = server.client.get("/model").json()
    assert model["labels"] == list(LABELS) and model["cam"] is True
    assert model["preprocess"]["size"] == 32
    assert (model["limits"]["max_body_bytes"], model["limits"]["max_pixels"]) == (1_000_000, 500_000)
    schema = server.client.get("/openapi.json").json()
    predict = schema["paths"]["/predict"]["post"]
    assert {"multipart/form-data", "image/*"} <= set(predict["requestBody"]["content"])
    assert {"200", "413", "415", "422", "429", "503"} <= set(predict["responses"])
    assert {row["name"] for row in predict["parameters"]} == {"top_k", "cam", "target"}
    for path in ("/docs", "/redoc"):
        assert_refused(server.client.get(path), 404, "not_found", path)


def test_health_and_metrics(server: Server) -> None:
    assert server.client.get("/healthz").json() == {"status": "ok"}
    assert server.client.get("/readyz").json() == {"status": "ready", "workers": 2}
    before = server.metric("effnet_images_total", outcome="ok"), server.metric("effnet_predict_seconds_count")
    assert server.predict(png(), png(1), png(2)).status_code == 200
    after = server.metric("effnet_images_total", outcome="ok"), server.metric("effnet_predict_seconds_count")
    assert (after[0] - before[0], after[1] - before[1]) == (3, 1)
    assert server.metric("effnet_requests_total", path="/predict", status="200") >= 1
    assert server.metric("effnet_workers_ready") == 2


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "status", "code", "words"),
    [
        (b"#!/bin/sh", 415, "not_an_image", "JPEG, PNG, WebP"),
        (png()[:100], 422, "broken_image", "truncated"),
        (bomb(60_000), 413, "image_too_large", "3600.0 megapixels; the limit is 0.5"),
        (b"", 422, "no_image", "empty"),
    ],
)
def test_what_is_no_good_image_is_refused_and_costs_its_neighbours_nothing(
    server: Server, tmp_path: Path, image: bytes, status: int, code: str, words: str
) -> None:
    assert_refused(server.predict(image), status, code, words)
    if image:
        document = server.predict(png(), image, png(1)).json()
        assert_right(document["results"][0], png(), tmp_path)
        assert_right(document["results"][2], png(1), tmp_path)
        assert document["results"][1]["error"]["code"] == code
        assert_refused(server.predict(image, image), status, code, words)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("top_k=0", "top_k"),
        ("top_k=many", "top_k"),
        ("topk=3", "Did you mean 'top_k'?"),
        ("target=mon", "Did you mean 'moon'?"),
        ("target=moon", "add cam=true"),
        ("url=http://example.org/cat.jpg", "'url'"),
        ("path=/etc/passwd", "'path'"),
    ],
)
def test_wrong_parameters_are_refused(server: Server, query: str, words: str) -> None:
    answer = server.client.post(f"/predict?{query}", content=png(), headers={"content-type": "image/png"})
    assert_refused(answer, 422, "invalid_parameter", words)


def test_other_bodies_are_refused(server: Server) -> None:
    post, form = server.client.post, {"content-type": "multipart/form-data; boundary=x"}
    for headers in ({"content-type": "application/x-www-form-urlencoded"}, {"content-type": "application/json"}, {}):
        assert_refused(post("/predict", content=png(), headers=headers), 415, "unsupported_media_type", "curl -F")
    zipped = {"content-type": "image/png", "content-encoding": "gzip"}
    assert_refused(post("/predict", content=png(), headers=zipped), 415, "unsupported_encoding", "gzip")
    only_text = {"image": (None, "http://example.org/cat.jpg")}
    assert_refused(post("/predict", files=only_text), 422, "not_a_file", "only files")
    assert_refused(post("/predict", content=b"--x--\r\n", headers=form), 422, "no_image", "no file")
    assert_refused(post("/predict", content=b"nothing of the kind", headers=form), 422, "broken_form", "form")
    no_boundary = {"content-type": "multipart/form-data"}
    assert_refused(post("/predict", content=b"--x--", headers=no_boundary), 422, "broken_form", "boundary")
    assert_refused(server.predict(*[png()] * 4), 422, "too_many_images", "more than 3 images")
    assert_refused(server.client.get("/predict"), 405, "method_not_allowed", "does not take GET")
    assert_refused(server.client.get("/etc/passwd"), 404, "not_found", "POST /predict")


def test_a_body_above_the_limit_is_refused_before_it_is_read(server: Server) -> None:
    """The head says how long the body would be: the answer comes although nothing of it is sent."""
    address = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.putrequest("POST", "/predict")
        for name, value in (("Content-Type", "image/png"), ("Content-Length", "2000000"), ("Expect", "100-continue")):
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["error"]["code"]) == (413, "body_too_large")


def test_a_body_that_does_not_say_its_length_is_refused_while_it_is_read(server: Server) -> None:
    """The answer comes although the body has no end."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.putrequest("POST", "/predict")
        connection.putheader("Content-Type", "image/png")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        for _ in range(5):
            connection.send(b"%x\r\n" % 250_000 + b"\0" * 250_000 + b"\r\n")
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["error"]["code"]) == (413, "body_too_large")
    assert server.metric("effnet_waiting_bytes") == 0


def test_when_the_queue_is_full_new_requests_are_told_so_and_the_others_are_answered(
    server: Server, tmp_path: Path
) -> None:
    images = [png(seed) for seed in range(12)]  # 2 workers hold 4 each, 4 wait
    with ThreadPoolExecutor(12) as clients:
        with server.stopped():
            asked = [clients.submit(server.predict, image) for image in images]
            server.until(lambda: server.metric("effnet_waiting_images") == 4)
            refusal = server.predict(png(99))
            assert_refused(refusal, 429, "queue_full", "4 images wait")
            assert refusal.headers["retry-after"] == "1"
        for one, image in zip(asked, images, strict=True):
            assert_right(one.result().json()["results"][0], image, tmp_path)


# --- accidents ------------------------------------------------------------------------------------------------------


def test_killed_workers_are_replaced_and_no_accepted_request_is_lost(server: Server, tmp_path: Path) -> None:
    images = [png(seed) for seed in range(10)]
    before = server.workers
    assert len(before) == 2
    with ThreadPoolExecutor(10) as clients:
        with server.stopped() as workers:
            asked = [clients.submit(server.predict, image) for image in images]
            server.until(lambda: server.metric("effnet_waiting_images") == 2)
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
        for one, image in zip(asked, images, strict=True):
            answer = one.result()
            assert answer.status_code == 200, answer.text
            assert_right(answer.json()["results"][0], image, tmp_path)
    server.until(lambda: server.client.get("/readyz").status_code == 200 and len(server.workers) == 2)
    assert not set(before) & set(server.workers)
    assert server.metric("effnet_worker_restarts_total") == 2


def test_a_client_that_goes_away_in_the_middle_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 900000\r\n\r\n123"
        )
        server.until(lambda: server.metric("effnet_waiting_bytes") == 3)
    server.until(lambda: server.metric("effnet_waiting_bytes") == 0)
    assert_right(server.predict(png()).json()["results"][0], png(), tmp_path)


def test_on_sigterm_accepted_requests_are_answered_and_new_ones_refused(tmp_path: Path) -> None:
    model = saved(tmp_path / "small.safetensors")
    with serving(model, "--workers", 1, stderr=tmp_path / "log") as server, ThreadPoolExecutor(2) as clients:
        with server.stopped():
            asked = clients.submit(server.predict, png())
            server.until(lambda: server.metric("effnet_waiting_bytes") > 0)
            server.process.send_signal(signal.SIGTERM)
            server.until(lambda: server.client.get("/readyz").status_code == 503)
            assert_refused(server.client.get("/readyz"), 503, "draining", "shutting down")
            assert server.client.get("/healthz").status_code == 200
            refusal = server.predict(png(1))
            assert_refused(refusal, 503, "draining", "shutting down")
            assert refusal.headers["connection"] == "close"
        answer = asked.result()
        assert answer.status_code == 200
        assert_right(answer.json()["results"][0], png(), tmp_path)
        assert server.process.wait(PATIENCE_S) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url)
    assert "draining; requests still to be answered: 1" in (tmp_path / "log").read_text()


def test_a_network_without_trained_weights_is_refused() -> None:
    with pytest.raises(UsageError, match="efficientnet_b0 is a network without trained weights"):
        opened("efficientnet_b0", Options(threads=torch.get_num_threads()))


def test_an_export_is_explained_by_the_checkpoint_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Exported:
        name, labels, preprocess = "exported", LABELS, small_model().preprocess

        def __call__(self, views: np.ndarray) -> np.ndarray:
            return np.full((len(views), 5), 0.2, dtype=np.float32)

    file = saved(tmp_path / "best.safetensors")
    monkeypatch.setattr("effnet.engine.open_engine", lambda where: Exported())
    same = Options(threads=torch.get_num_threads())
    engine, model = opened(str(tmp_path), same)
    assert model is not None and model.labels == LABELS and engine.name == "exported"
    assert opened(str(file), same)[1] is None


def test_a_model_that_is_none_and_a_port_that_is_taken_are_refused_in_one_line() -> None:
    assert "Did you mean 'efficientnet_b0'?" in refused("serve", "efficientnet_b00", "--port", 0, "--workers", 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} cannot be listened on" in refused("serve", "efficientnet_b0", "--port", port)
    assert "workers is 0" in refused("serve", "efficientnet_b0", "--workers", 0)


# --- the worker alone -----------------------------------------------------------------------------------------------


def answers(model: Model, options: Options, jobs: Sequence[tuple[dict[str, Any], bytes]]) -> dict[int, wire.Frame]:
    """What a worker says to these jobs, by their numbers."""
    out = io.BytesIO()
    worker = Worker(engine=TorchEngine(name="small", model=model), model=model, options=options, out=out)
    worker.run(io.BytesIO(b"".join(wire.frame(header, data) for header, data in jobs)))
    return {header["id"]: (header, body) for header, body in wire.frames(io.BytesIO(out.getvalue()))}


def test_images_that_wait_share_a_batch_and_none_is_larger_than_allowed(tmp_path: Path) -> None:
    ask = {"top_k": 1, "cam": False, "target": None}
    jobs = [({"id": i, **ask}, png(i)) for i in range(10)]
    found = answers(small_model(), Options(max_batch=4, max_delay_ms=1000), jobs)
    assert sorted(found) == list(range(10))
    assert sorted(header["batch"] for header, _ in found.values()) == [2] * 2 + [4] * 8
    for i, (header, _) in found.items():
        ((label, probability),) = expected(png(i), tmp_path, 1)
        assert LABELS[header["classes"][0]] == label
        assert header["probabilities"][0] == pytest.approx(probability, abs=1e-5)


def test_a_decoder_without_memory_is_an_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*words: object) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr("effnet.images.decode", decode)
    found = answers(small_model(), Options(), [({"id": 7, "top_k": 1, "cam": False, "target": None}, png())])
    assert found[7][0]["error"]["code"] == "decoder_failed"


def test_a_worker_says_what_the_model_is() -> None:
    engine = TorchEngine(name="small", model=small_model())
    said = json.loads(json.dumps(hello(engine, None)))
    assert said["labels"] == list(LABELS) and said["cam"] is False
    assert Preprocess.from_dict(said["preprocess"]) == engine.preprocess


def test_the_picture_of_a_map_of_a_strip_is_never_empty() -> None:
    engine = TorchEngine(name="small", model=small_model())
    for height, width in ((1, 2000), (2000, 1), (1, 1)):
        pixels = np.asarray(Image.open(io.BytesIO(picture(np.eye(3), height, width, engine))))
        assert max(pixels.shape[:2]) == min(320, max(height, width)) and pixels[..., 3].any()

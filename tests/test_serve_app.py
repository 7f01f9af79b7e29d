"""What the front does by itself: time, memory, and workers that are not there. No socket, and no model."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from effnet.serve.app import create_app, read_page
from effnet.serve.gate import Gate
from effnet.serve.options import Options
from effnet.serve.pool import Pool
from effnet.value import UsageError
from tests.test_serve_pool import WORKER, in_pool, until

ANSWERING = WORKER.replace('"word": job["word"]', '"classes": [0], "probabilities": [1.0], "decode_ms": 1').replace(
    ", data[::-1]", ""
)  # what the front understands
PNG = {"content-type": "image/png"}


def in_app(test: Callable[[httpx.AsyncClient, Pool, Gate], Awaitable[None]], **options: Any) -> None:
    """Runs `test` with a client of the application."""

    async def run(pool: Pool) -> None:
        gate = create_app(pool, pool.options)
        transport = httpx.ASGITransport(app=gate, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await test(client, pool, gate)

    in_pool(run, ANSWERING, **options)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_an_upload_that_takes_too_long_is_told_so() -> None:
    async def slow() -> AsyncGenerator[bytes]:
        yield b"the first bytes"
        await asyncio.Event().wait()

    async def test(client: httpx.AsyncClient, pool: Pool, gate: Gate) -> None:
        assert code(await client.post("/predict", content=slow(), headers=PNG)) == (408, "upload_too_slow")
        assert (await client.post("/predict", content=b"x", headers=PNG)).status_code == 200

    in_app(test, workers=1, timeout_s=0.5)


def test_uploads_share_a_bounded_memory_and_give_it_back() -> None:
    go = asyncio.Event()

    async def halting() -> AsyncGenerator[bytes]:
        yield b"x" * 900
        await go.wait()

    async def test(client: httpx.AsyncClient, pool: Pool, gate: Gate) -> None:
        def held() -> float | None:
            return pool.metrics.registry.get_sample_value("effnet_waiting_bytes")

        first = asyncio.create_task(client.post("/predict", content=halting(), headers=PNG))
        await until(lambda: held() == 900)
        answer = await client.post("/predict", content=b"x" * 200, headers=PNG)
        assert code(answer) == (429, "busy") and answer.headers["retry-after"] == "1"
        assert (await client.post("/predict", content=b"x" * 99, headers=PNG)).status_code == 200
        go.set()
        assert (await first).status_code == 200
        assert held() == 0

    in_app(test, workers=1, max_body_bytes=1000, max_waiting_bytes=1000)


def test_without_a_worker_images_wait_and_readiness_says_so() -> None:
    async def test(client: httpx.AsyncClient, pool: Pool, gate: Gate) -> None:
        os.kill(pool.pids[0], signal.SIGKILL)
        await until(lambda: not pool.ready)
        assert code(await client.get("/readyz")) == (503, "no_worker")
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.post("/predict", content=b"patient", headers=PNG)).status_code == 200
        assert (await client.get("/readyz")).status_code == 200

    in_app(test, workers=1)


def test_an_image_that_ends_workers_costs_the_others_of_its_form_nothing() -> None:
    async def test(client: httpx.AsyncClient, pool: Pool, gate: Gate) -> None:
        files = [("image", ("a.png", b"a")), ("image", ("b.png", b"poison")), ("image", ("c.png", b"c"))]
        first, bad, last = (await client.post("/predict", files=files)).json()["results"]
        assert first["predictions"] == last["predictions"] == [{"label": "a", "index": 0, "probability": 1.0}]
        assert (bad["error"]["status"], bad["error"]["code"]) == (500, "worker_lost")
        assert code(await client.post("/predict", content=b"poison", headers=PNG)) == (500, "worker_lost")

    in_app(test)


def test_a_mistake_of_ours_is_an_error_of_the_same_form(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: httpx.AsyncClient, pool: Pool, gate: Gate) -> None:
        monkeypatch.setattr("effnet.serve.app._result", lambda *words: 1 / 0)
        assert code(await client.post("/predict", content=b"x", headers=PNG)) == (500, "internal")

    in_app(test, workers=1)


def test_no_answer_in_time_is_a_503() -> None:
    async def test(client: httpx.AsyncClient, pool: Pool, gate: Gate) -> None:
        answer = await client.post("/predict", content=b"stop", headers=PNG)
        assert code(answer) == (503, "timeout") and answer.headers["retry-after"] == "5"

    in_app(test, workers=1, timeout_s=0.5)


def test_a_model_that_cannot_be_explained_says_so() -> None:
    async def test(client: httpx.AsyncClient, pool: Pool, gate: Gate) -> None:
        assert code(await client.post("/predict?cam=true", content=b"x", headers=PNG)) == (422, "no_cam")

    in_app(test, workers=1)


def test_the_page_may_run_its_own_script_and_nothing_else() -> None:
    page, policy = read_page()
    assert "default-src 'none'" in policy and "unsafe" not in policy
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([a-z]+:)""", page)
    assert set(links) == {"data:"}, "nothing is loaded from elsewhere"
    assert not re.findall(r"\son\w+=|\sstyle=", page), "the policy would forbid these"


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0}, {"port": 70_000}, {"threads": 0}, {"max_batch": 0}, {"max_delay_ms": -1}, {"queue": 0},
        {"max_body_bytes": 0}, {"max_waiting_bytes": 5}, {"max_pixels": 0}, {"max_images": 300}, {"timeout_s": 0},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Options(**wrong)

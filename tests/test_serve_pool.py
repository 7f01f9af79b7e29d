"""The promise of the pool: every accepted image gets one answer, its own, whatever happens to the workers.

The workers here are small programs that speak `wire` and misbehave on request; no model is loaded.
"""

import asyncio
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from effnet.serve.options import Options, Refusal
from effnet.serve.pool import MOST_TRIES, Pool
from effnet.value import UsageError

WORKER = """
import os, signal, sys, time
from effnet.serve.wire import frame, frames
def say(header, body=b""):
    sys.stdout.buffer.write(frame(header, body))
    sys.stdout.buffer.flush()
say({"model": "fake", "labels": ["a"], "cam": False})
for job, data in frames(sys.stdin.buffer):
    if data == b"poison":
        os.kill(os.getpid(), signal.SIGKILL)
    if data == b"stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if data == b"nonsense":
        sys.stdout.buffer.write(b"this is no frame" * 9)
        sys.stdout.buffer.flush()
        continue
    say({"id": job["id"], "word": job["word"], "place": 0, "batch": 1, "model_ms": 1}, data[::-1])
"""
ASK = {"word": "please"}


def in_pool(
    test: Callable[[Pool], Awaitable[None]], code: str = WORKER, said: list[str] | None = None, **options: Any
) -> Pool:
    """Runs `test` with a started pool of fake workers, and ends it."""

    async def run() -> Pool:
        told = Options(**{"workers": 2, "max_batch": 4, "timeout_s": 20.0} | options)
        pool = Pool(command=[sys.executable, "-c", code], options=told, say=[].append if said is None else said.append)
        await pool.start()
        try:
            async with asyncio.timeout(50):
                await test(pool)
        finally:
            await pool.close()
        return pool

    return asyncio.run(run())


async def ask(pool: Pool, *images: bytes, seconds: float = 40.0) -> list[Any]:
    return await pool.answers(images, ASK, asyncio.get_running_loop().time() + seconds)


async def until(condition: Callable[[], object]) -> None:
    """Waits for something that another process does."""
    while not condition():
        await asyncio.sleep(0.01)


def value(pool: Pool, name: str, **labels: str) -> float | None:
    return pool.metrics.registry.get_sample_value(name, labels)


def test_every_image_gets_its_own_answer_in_order() -> None:
    async def test(pool: Pool) -> None:
        names = [f"image {i}".encode() for i in range(100)]
        several = await asyncio.gather(*(ask(pool, *names[i : i + 7]) for i in range(0, 100, 7)))
        flat = [answer for answers in several for answer in answers]
        assert [body for _, body in flat] == [name[::-1] for name in names]
        assert {header["word"] for header, _ in flat} == {"please"}
        assert value(pool, "effnet_images_total", outcome="ok") == 100
        assert value(pool, "effnet_workers_ready") == 2

    in_pool(test)


def test_a_killed_worker_is_replaced_and_what_it_held_is_answered() -> None:
    said: list[str] = []

    async def test(pool: Pool) -> None:
        before = list(pool.pids)
        for pid in before:
            os.kill(pid, signal.SIGSTOP)  # so that they surely hold the images when they are killed
        asked = [asyncio.create_task(ask(pool, f"{i}".encode())) for i in range(12)]
        await until(lambda: sum(len(member.held) for member in pool.members) == 12)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert [answers[0][1] for answers in await asyncio.gather(*asked)] == [f"{i}".encode()[::-1] for i in range(12)]
        await until(lambda: pool.ready == 2)
        assert not set(before) & set(pool.pids)
        assert value(pool, "effnet_worker_restarts_total") == 2

    in_pool(test, said=said)
    assert sum("another one is started" in line for line in said) == 2


def test_under_random_kills_nothing_is_lost_doubled_or_mixed_up() -> None:
    draw = random.Random(3)

    async def test(pool: Pool) -> None:
        async def client(number: int) -> None:
            for turn in range(25):
                image = f"{number}/{turn}".encode()
                ((header, body),) = await ask(pool, image)
                assert "error" not in header and body == image[::-1]

        clients = asyncio.gather(*(client(number) for number in range(8)))
        for _ in range(4):
            await until(lambda: clients.done() or (pool.ready == 2 and any(member.held for member in pool.members)))
            if not clients.done():
                os.kill(draw.choice(pool.pids), signal.SIGKILL)
                await until(lambda: clients.done() or pool.ready < 2)
        await clients

    in_pool(test)


def test_a_poisonous_image_is_given_up_and_its_neighbours_are_answered() -> None:
    async def test(pool: Pool) -> None:
        images = [b"poison" if i == 5 else f"{i}".encode() for i in range(20)]
        answers = await ask(pool, *images)
        for image, (header, body) in zip(images, answers, strict=True):
            if image == b"poison":
                assert header["error"]["code"] == "worker_lost" and header["error"]["status"] == 500
            else:
                assert body == image[::-1]
        await until(lambda: pool.ready == 2)
        assert value(pool, "effnet_worker_restarts_total") == MOST_TRIES, "tried alone from the second time on"
        assert (await ask(pool, b"next"))[0][1] == b"txen"

    in_pool(test)


def test_a_worker_that_hangs_is_killed_and_its_request_told_so_in_time() -> None:
    said: list[str] = []

    async def test(pool: Pool) -> None:
        with pytest.raises(Refusal, match="no answer within") as caught:
            await ask(pool, b"stop", seconds=0.5)
        assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
        await until(lambda: value(pool, "effnet_worker_restarts_total") == 1 and pool.ready == 1)
        assert (await ask(pool, b"next"))[0][1] == b"txen"
        assert value(pool, "effnet_worker_restarts_total") == 1, "nobody waits for it: it is not tried again"

    in_pool(test, said=said, workers=1, timeout_s=0.5)
    assert any("no answer for 0.5 s" in line for line in said)


def test_a_worker_that_talks_nonsense_is_replaced() -> None:
    async def test(pool: Pool) -> None:
        good, bad = await asyncio.gather(ask(pool, b"good"), ask(pool, b"nonsense"))
        assert good[0][1] == b"doog" and bad[0][0]["error"]["code"] == "worker_lost"

    in_pool(test)


def test_the_queue_is_bounded_all_or_nothing() -> None:
    async def test(pool: Pool) -> None:
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        held = asyncio.create_task(ask(pool, *[b"held"] * pool.options.depth))
        await until(lambda: len(pool.members[0].held) == pool.options.depth)
        assert pool.full is None
        waiting = [asyncio.create_task(ask(pool, b"waits")) for _ in range(2)]
        await until(lambda: len(pool.waiting) == 2)
        with pytest.raises(Refusal, match="queue is full") as caught:
            await ask(pool, b"one", b"two", b"three")  # two would have fitted
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert len(pool.waiting) == 2
        waiting.append(asyncio.create_task(ask(pool, b"third", b"third")))
        await until(lambda: pool.full)
        os.kill(pid, signal.SIGCONT)
        assert len(await held) == pool.options.depth
        assert [(await one)[0][1] for one in waiting] == [b"stiaw", b"stiaw", b"driht"]

    in_pool(test, workers=1, max_batch=2, queue=4, max_images=4)


def test_an_image_that_nobody_waits_for_is_not_sent() -> None:
    async def test(pool: Pool) -> None:
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        held = asyncio.create_task(ask(pool, b"held", b"held"))
        await until(lambda: len(pool.members[0].held) == 2)
        with pytest.raises(Refusal, match="no answer"):
            await ask(pool, b"late", seconds=0.05)
        assert not pool.waiting, "it takes no place in the queue"
        os.kill(pid, signal.SIGCONT)
        await held
        await ask(pool, b"next")
        assert value(pool, "effnet_images_total", outcome="ok") == 3

    in_pool(test, workers=1, max_batch=1)


def test_work_goes_to_the_worker_that_holds_least() -> None:
    async def test(pool: Pool) -> None:
        for pid in pool.pids:
            os.kill(pid, signal.SIGSTOP)
        asked = asyncio.create_task(ask(pool, *[b"x"] * 6))
        await until(lambda: sum(len(member.held) for member in pool.members) == 6)
        assert [len(member.held) for member in pool.members] == [3, 3]
        for pid in pool.pids:
            os.kill(pid, signal.SIGCONT)
        await asked

    in_pool(test)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "import sys; from effnet.serve.wire import frame; sys.stdout.buffer.write(frame({'refused': 'no b9'}))",
            "no b9",
        ),
        ("raise SystemExit(3)", "ended with code 3"),
        ("print('hello, I am no worker at all')", "ended with code 0"),
    ],
)
def test_a_pool_that_cannot_start_says_why(code: str, words: str) -> None:
    async def test(pool: Pool) -> None:
        pytest.fail("it started")

    with pytest.raises(UsageError, match=words):
        in_pool(test, code)


def test_a_worker_that_comes_back_with_another_model_is_not_used(tmp_path: Path) -> None:
    """The file may have been overwritten meanwhile: two models behind one address are worse than one worker less."""
    probe = tmp_path / "probe"
    probe.write_text("0.2500")
    said: list[str] = []

    async def test(pool: Pool) -> None:
        probe.write_text("0.2508")
        os.kill(pool.pids[0], signal.SIGKILL)
        await until(lambda: sum("another model" in line for line in said) >= 2)
        assert pool.ready == 0
        waits = asyncio.create_task(ask(pool, b"patient"))
        probe.write_text("0.2501")  # the same, summed in another order
        assert (await waits)[0][1] == b"tneitap"

    in_pool(test, WORKER.replace('"cam"', f'"probe": [float(open({str(probe)!r}).read())], "cam"'), said, workers=1)


def test_closing_ends_the_workers_and_answers_who_still_waits() -> None:
    pids: list[int] = []
    asked: list[asyncio.Task[Any]] = []

    async def run() -> None:
        async def test(pool: Pool) -> None:
            pids.extend(pool.pids)
            os.kill(pids[0], signal.SIGKILL)
            asked.append(asyncio.create_task(ask(pool, b"poison")))
            await asyncio.sleep(0)

        told = Options(workers=1)
        pool = Pool(command=[sys.executable, "-c", WORKER], options=told)
        await pool.start()
        await test(pool)
        await pool.close()
        ((header, _),) = await asked[0]
        assert header["error"]["code"] == "stopping"

    asyncio.run(run())
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

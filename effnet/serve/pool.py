"""Who keeps the promise that every accepted image is answered, whatever happens to a worker?

The front process owns the connections and, until it is answered, every image; workers (`worker`) only borrow them. So
nothing is lost with a worker: what it held goes to the head of the queue, and another process is started. (Workers
that accept connections themselves, by SO_REUSEPORT or a shared socket, take their requests with them when they die.)

An image that was with a worker when it ended may be the reason. It is tried again alone, and when `MOST_TRIES`
workers have ended with it, it is answered with an error, so that one poisonous file cannot stop the service. A worker
that holds images and answers none of them for the time limit of a request hangs, and is killed.

Everything here happens on one event loop: there are no locks.
"""

import asyncio
import contextlib
import itertools
import math
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from effnet.serve.metrics import Metrics
from effnet.serve.options import Options, Refusal
from effnet.serve.wire import Frame, frame, receive
from effnet.value import UsageError

MOST_TRIES = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0  # before a worker is started again that never became ready
FAREWELL_S = 5.0  # for workers to end by themselves, when they are told to
DEAF_S = 0.5  # for a process to end that has closed its pipe, or talks nonsense


@dataclass(kw_only=True, eq=False)
class Job:
    """One image on its way. `tries`: workers that ended while they held it."""

    number: int
    data: bytes
    ask: Mapping[str, Any]
    answer: "asyncio.Future[Frame]"
    tries: int = 0


@dataclass(kw_only=True, eq=False)
class Member:
    """A place in the pool: the process that fills it now, and the jobs that it holds.

    `heard_at`: when it last answered, or was given the first job since.
    """

    process: asyncio.subprocess.Process | None = None
    ready: bool = False
    held: dict[int, Job] = field(default_factory=dict)
    heard_at: float = 0.0

    @property
    def alone(self) -> bool:
        """Whether it tries an image that may end it: nothing else is risked."""
        return any(job.tries for job in self.held.values())


@dataclass(kw_only=True, eq=False)
class Pool:
    """`options.workers` processes of `command`, and the queue in front of them."""

    command: Sequence[str]
    options: Options
    metrics: Metrics = field(default_factory=Metrics)
    say: Callable[[str], None] = lambda message: None
    hello: dict[str, Any] = field(default_factory=dict)  # from `start` on: what the first worker said of the model
    waiting: deque[Job] = field(default_factory=deque)
    members: list[Member] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self.metrics.waiting.set_function(lambda: len(self.waiting))
        self.metrics.workers.set_function(lambda: self.ready)

    @property
    def ready(self) -> int:
        """Workers that take images now."""
        return sum(member.ready for member in self.members)

    @property
    def pids(self) -> list[int]:
        """The processes of the workers that run now."""
        return [member.process.pid for member in self.members if member.process]

    # --- its life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts all workers and waits until each has the model. `UsageError` in the words of one that cannot."""
        self.members = [Member() for _ in range(self.options.workers)]
        loop = asyncio.get_running_loop()
        first: list[asyncio.Future[None]] = [loop.create_future() for _ in self.members]
        self._tasks = [
            asyncio.create_task(self._keep(member, up)) for member, up in zip(self.members, first, strict=True)
        ]
        self._tasks.append(asyncio.create_task(self._watch()))
        try:
            await asyncio.gather(*first)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Ends the workers. Images that still wait are refused."""
        self._closing = True
        for member in self.members:
            if member.process and member.process.stdin:
                member.process.stdin.close()  # the end of its jobs
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self._all_ended()
        for member in self.members:
            _kill(member)
        await self._all_ended()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for member in self.members:
            _kill(member)  # one that was being started meanwhile
        for job in [*self.waiting, *(job for member in self.members for job in member.held.values())]:
            _answer(job, {"error": Refusal(503, "stopping", "the service stops; ask another one").document()})

    async def _all_ended(self) -> None:
        await asyncio.gather(*(member.process.wait() for member in self.members if member.process))

    async def _keep(self, member: Member, up: "asyncio.Future[None]") -> None:
        """Runs one process after another in this place. `up`: the first of them has the model, or cannot have it."""
        pause = FIRST_PAUSE_S
        while not self._closing:
            said, member.process = {}, None
            try:
                pipe = asyncio.subprocess.PIPE
                member.process = process = await asyncio.create_subprocess_exec(*self.command, stdin=pipe, stdout=pipe)
                assert process.stdout is not None
                said, _ = await receive(process.stdout) or ({}, b"")
                if "model" in said and _same(said, self.hello or said):
                    self.hello, pause = self.hello or said, FIRST_PAUSE_S
                    if not up.done():
                        up.set_result(None)
                    await self._listen(member, process.stdout)
                elif "model" in said:
                    _kill(member)
                    said = {"refused": "there is another model now, which needs a service of its own"}
                code = await _ended(process)
                why = said.get("refused") or f"a worker ended with code {code}"
            except OSError as error:  # no process to be had: too many, or no memory
                why = f"no worker could be started ({error.strerror})"
            if self._closing:
                return
            if not up.done():
                up.set_exception(UsageError(why))
                return
            self.metrics.restarts.inc()
            self.say(f"{why}; another one is started in its place")
            self._give_back(member)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _listen(self, member: Member, answers: asyncio.StreamReader) -> None:
        """Passes answers on, until the process ends."""
        member.ready = True
        self._dispatch()
        while (got := await receive(answers)) is not None:
            job = member.held.pop(got[0].get("id"), None)
            if job is None:
                break  # it talks nonsense, and is replaced
            member.heard_at = asyncio.get_running_loop().time()
            self._count(got[0])
            _answer(job, *got)
            self._dispatch()
        member.ready = False

    def _count(self, answer: Mapping[str, Any]) -> None:
        self.metrics.images.labels(outcome=answer["error"]["code"] if "error" in answer else "ok").inc()
        if answer.get("place") == 0:  # once for each batch
            self.metrics.batch.observe(answer["batch"])
            self.metrics.model_seconds.inc(answer["model_ms"] / 1e3)

    def _give_back(self, member: Member) -> None:
        """What an ended worker held waits again, before all others."""
        held, member.held = [*member.held.values()], {}
        for job in reversed(held):
            job.tries += 1
            if job.answer.done():
                continue
            if job.tries < MOST_TRIES:
                self.waiting.appendleft(job)
            else:
                words = f"{job.tries} workers ended while they had this image; it was given up"
                answer = {"error": Refusal(500, "worker_lost", words).document()}
                self._count(answer)
                _answer(job, answer)
        self._dispatch()

    async def _watch(self) -> None:
        """Kills workers that hang."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1.0, self.options.timeout_s / 4))
            for member in self.members:
                if member.ready and member.held and loop.time() - member.heard_at > self.options.timeout_s:
                    self.say(f"a worker has had no answer for {self.options.timeout_s:g} s and is killed")
                    _kill(member)

    # --- its work ---------------------------------------------------------------------------------------------------

    @property
    def full(self) -> Refusal | None:
        """Why no more images are taken now; None if they are."""
        return _full(self.options.queue) if len(self.waiting) >= self.options.queue else None

    async def answers(self, images: Sequence[bytes], ask: Mapping[str, Any], deadline: float) -> list[Frame]:
        """One answer of a worker per image, in order: all are accepted or, by `Refusal`, none.

        `deadline`: in the loop's time. What is not answered by then is a `Refusal`, too.
        """
        loop = asyncio.get_running_loop()
        if len(self.waiting) + len(images) > self.options.queue:
            raise _full(self.options.queue)
        jobs = [Job(number=next(self._numbers), data=data, ask=ask, answer=loop.create_future()) for data in images]
        self.waiting.extend(jobs)
        self._dispatch()
        try:
            async with asyncio.timeout_at(deadline):
                return [await job.answer for job in jobs]
        except TimeoutError:
            words = f"no answer within {self.options.timeout_s:g} s: the service is overloaded; ask again later"
            raise Refusal(503, "timeout", words, retry_after_s=5) from None
        finally:
            for job in jobs:
                job.answer.cancel()  # nobody waits for it any more
            if any(job.answer.cancelled() for job in jobs):
                self.waiting = deque(job for job in self.waiting if not job.answer.done())

    def _dispatch(self) -> None:
        """Hands waiting images, the oldest first, to the worker that holds the fewest."""
        while self.waiting:
            job = self.waiting[0]
            able = [one for one in self.members if one.ready and not one.alone and len(one.held) < self._room(job)]
            if not able:
                return
            member = min(able, key=lambda one: len(one.held))
            assert member.process is not None and member.process.stdin is not None
            self.waiting.popleft()
            if not member.held:
                member.heard_at = asyncio.get_running_loop().time()
            member.held[job.number] = job
            member.process.stdin.write(frame({"id": job.number, **job.ask}, job.data))

    def _room(self, job: Job) -> int:
        """How many images a worker may hold so that it still gets this one: none, if it may end the worker."""
        return 1 if job.tries else self.options.depth


def _full(queue: int) -> Refusal:
    words = f"the queue is full ({queue} images wait); ask again in a moment"
    return Refusal(429, "queue_full", words, retry_after_s=1)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two workers have the same model: they call it so, and it answers so, but for the order of its sums."""
    probes = zip(one.get("probe", ()), other.get("probe", ()), strict=True)
    alike = all(math.isclose(mine, yours, rel_tol=1e-3, abs_tol=1e-6) for mine, yours in probes)
    return alike and {**one, "probe": None} == {**other, "probe": None}


def _answer(job: Job, header: dict[str, Any], body: bytes = b"") -> None:
    if not job.answer.done():
        job.answer.set_result((header, body))


def _kill(member: Member) -> None:
    if member.process and member.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            member.process.kill()


async def _ended(process: asyncio.subprocess.Process) -> int:
    """The exit code of a process that cannot be talked to any more; one that lives on is killed."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DEAF_S):
            return await process.wait()
    process.kill()
    return await process.wait()


def worker_command(model: str, options: Options) -> list[str]:
    """How a worker of this package is started."""
    return [sys.executable, "-m", "effnet.serve.worker", model, options.to_json()]

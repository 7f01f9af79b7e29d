"""What may a request ask of the service, and what may it cost? The limits, all on by default, and what exceeds them.

A `Refusal` is the one way in which the service says no: an HTTP status, a word for programs and a sentence for people.
"""

import os
from dataclasses import dataclass
from typing import Any

from effnet.value import Value, check_range


@dataclass(frozen=True, kw_only=True)
class Options(Value):
    """How a model is served.

    `workers`: processes with a model each. `threads`: of each worker; None shares the machine's cores out. `max_batch`
    images go through the model together; a batch that is not full waits `max_delay_ms` for more. `queue`: images that
    may wait for a worker. `max_body_bytes` of one request, `max_waiting_bytes` of all together, `max_pixels` of one
    image, `max_images` of one request. `timeout_s`: from the first byte of a request to its answer.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 2
    threads: int | None = None
    max_batch: int = 8
    max_delay_ms: float = 5.0
    queue: int = 256
    max_body_bytes: int = 10_000_000
    max_waiting_bytes: int = 500_000_000
    max_pixels: int = 50_000_000
    max_images: int = 64
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        check_range("port", self.port, 0, 65535)
        check_range("workers", self.workers, 1, 256)
        if self.threads is not None:
            check_range("threads", self.threads, 1)
        check_range("max_batch", self.max_batch, 1, 1024)
        check_range("max_delay_ms", self.max_delay_ms, 0, 1000)
        check_range("queue", self.queue, 1)
        check_range("max_body_bytes", self.max_body_bytes, 1, 2**31)
        check_range("max_waiting_bytes", self.max_waiting_bytes, self.max_body_bytes)
        check_range("max_pixels", self.max_pixels, 1)
        check_range("max_images", self.max_images, 1, self.queue)
        check_range("timeout_s", self.timeout_s, 0.1, 3600)

    @property
    def worker_threads(self) -> int:
        """Threads of one worker's model."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.threads or max(1, cores // self.workers)

    @property
    def depth(self) -> int:
        """Images that a worker holds at most: while one batch is in the model, the next one is decoded."""
        return 2 * self.max_batch


class Refusal(Exception):
    """A request, or one image of it, that gets no prediction: HTTP `status`, `code` for programs, `message` for people.

    `retry_after_s`: when asking again may help.
    """

    def __init__(self, status: int, code: str, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message, self.retry_after_s = status, code, message, retry_after_s

    def document(self) -> dict[str, Any]:
        """What the answer holds under `error`."""
        return {"status": self.status, "code": self.code, "message": self.message}

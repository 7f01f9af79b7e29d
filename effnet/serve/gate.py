"""What happens to every request, before and after the application? It is counted, and refused while the service drains.

While draining, new requests get 503 and those under way are answered; `idle` says when the last one was. A request
that is refused before its body was read is read to its end first, within bounds: a client that is still sending would
see a reset connection in place of the answer.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from effnet.serve.metrics import Metrics
from effnet.serve.options import Options, Refusal

WATCHING = ("/healthz", "/readyz", "/metrics")  # answered while draining, too
DISCARD_S = 2.0
DISCARD_BODIES = 4  # times the limit of one body


@dataclass(kw_only=True, eq=False)
class Gate:
    """The application as the server sees it."""

    app: ASGIApp
    options: Options
    metrics: Metrics
    paths: frozenset[str]  # known ones: others share a label
    draining: bool = False
    under_way: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        exchange = _Exchange(gate=self, scope=scope, receive=receive, send=send)
        watching = scope["path"] in WATCHING
        if self.draining and not watching:
            refusal = Refusal(503, "draining", "the service is shutting down; ask another one, or again later")
            return await refuse(refusal, exchange.to_client)
        self.under_way += not watching
        self.idle.clear() if self.under_way else self.idle.set()
        start = time.perf_counter()
        try:
            await self.app(scope, exchange.from_client, exchange.to_client)
        finally:
            self.under_way -= not watching
            if not self.under_way:
                self.idle.set()
            if scope["path"] == "/predict":
                self.metrics.seconds.observe(time.perf_counter() - start)


@dataclass(kw_only=True, eq=False)
class _Exchange:
    """The two directions of one request."""

    gate: Gate
    scope: Scope
    receive: Receive
    send: Send
    body_done: bool = False
    asked: bool = False  # for the body

    async def from_client(self) -> Message:
        self.asked = True
        message = await self.receive()
        self.body_done = not message.get("more_body", False)
        return message

    async def to_client(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            path = self.scope["path"] if self.scope["path"] in self.gate.paths else "other"
            self.gate.metrics.requests.labels(path=path, status=message["status"]).inc()
            if message["status"] >= 400 and not self.body_done:
                await self._discard()
            if self.gate.draining:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await self.send(message)

    async def _discard(self) -> None:
        """Reads what is still coming, unless the client waits to be told to send it."""
        headers = dict(self.scope["headers"])
        if b"expect" in headers and not self.asked:
            return
        left = DISCARD_BODIES * self.gate.options.max_body_bytes
        try:
            async with asyncio.timeout(DISCARD_S):
                while not self.body_done and left > 0:
                    left -= len((await self.from_client()).get("body", b""))
        except TimeoutError:
            return


async def refuse(refusal: Refusal, send: Send) -> None:
    """The answer to a request that the application does not see."""
    headers = [(b"content-type", b"application/json")]
    body = json.dumps({"error": refusal.document()}).encode()
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

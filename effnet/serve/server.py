"""How does the service begin and end? Listen, start the workers, answer, and drain on the first signal."""

import asyncio
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from effnet.serve.app import create_app
from effnet.serve.gate import Gate
from effnet.serve.options import Options
from effnet.serve.pool import Pool, worker_command
from effnet.value import UsageError

BACKLOG = 2048  # connections that the system holds until we take them
CLOSING_S = 5  # for the last bytes to reach slow clients

Say = Callable[[str], None]


def run(model: str, options: Options, ready: Callable[[dict[str, Any]], None], say: Say) -> None:
    """`serve`, in this process."""
    with _listener(options) as listener, asyncio.Runner(loop_factory=_new_loop()) as runner:
        runner.run(_serve(model, options, listener, ready, say))


def _new_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's event loop where there is one: it takes less of a core than asyncio's own."""
    try:
        import uvloop
    except ImportError:  # Windows
        return None
    return uvloop.new_event_loop


async def _serve(
    model: str, options: Options, listener: socket.socket, ready: Callable[[dict[str, Any]], None], say: Say
) -> None:
    pool = Pool(command=worker_command(model, options), options=options, say=say)
    await pool.start()
    try:
        gate = create_app(pool, options)
        config = uvicorn.Config(
            gate, lifespan="off", ws="none", log_config=None, access_log=False, server_header=False, backlog=BACKLOG,
            timeout_graceful_shutdown=CLOSING_S,
        )  # fmt: skip
        listener.listen(BACKLOG)
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        ready({"url": url, "port": port, "model": pool.hello["model"], "workers": pool.pids})
        await DrainingServer(config, gate, say).serve(sockets=[listener])
    finally:
        await pool.close()


class DrainingServer(uvicorn.Server):
    """Goes on listening after a signal until the last accepted request is answered; the gate refuses new ones."""

    def __init__(self, config: uvicorn.Config, gate: Gate, say: Say) -> None:
        super().__init__(config)
        self.gate, self.say = gate, say
        self.loop = asyncio.get_running_loop()
        self.draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal, anywhere in the program: the rest is left to the loop."""
        self.loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self.draining is None:
            self.draining = self.loop.create_task(self._drain())
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        self.gate.draining = True
        self.say(f"draining; requests still to be answered: {self.gate.under_way}")
        await self.gate.idle.wait()
        self.should_exit = True


@contextmanager
def _listener(options: Options) -> Generator[socket.socket]:
    """The address, taken before the models are loaded: whoever comes second learns it at once."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((options.host, options.port))
        except OSError as error:
            words = f"{options.host} port {options.port} cannot be listened on: {error.strerror}"
            raise UsageError(f"{words}; another one: --port, or --port 0 for a free one") from None
        yield listener

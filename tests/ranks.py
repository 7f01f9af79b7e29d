"""Several processes on this machine, as `torchrun` would start them: what tests of `cluster` and of its users share.

They are forked from a server that has imported the package once, so one costs milliseconds and inherits no threads.
"""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from effnet import cluster
from effnet.value import UsageError

SECONDS = 120  # a process that says nothing for longer hangs


def ended(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """How `work(*arguments)` ended in each of `world` processes that are one cluster; 1 is a process alone.

    What it returned, the `UsageError` that it raised, or the negative number of the signal that killed the process.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks", "effnet.train", "torch._dynamo"])  # an optimizer imports the last
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_member, args=(rank, world, port, theirs, work, arguments))
        process.start()
        theirs.close()
        ranks.append((process, ours))
    try:
        return [_heard(process, ours) for process, ours in ranks]
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()


def together(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of `world` processes. Raises what it raised in the first that failed."""
    found = ended(world, work, *arguments)
    for answer in found:
        if isinstance(answer, UsageError):
            raise answer
    return found


def _heard(process: Any, ours: Connection) -> Any:
    """What the process said, or how it died."""
    assert ours.poll(SECONDS), f"process {process.pid} hangs"
    try:
        return ours.recv()
    except EOFError:
        process.join(SECONDS)
        assert process.exitcode and process.exitcode < 0, f"process {process.pid} failed: its traceback is on stderr"
        return process.exitcode


def _member(rank: int, world: int, port: int, answers: Connection, work: Callable[..., Any], arguments: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if world > 1:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
        }
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    with cluster.joined("cpu"):
        try:
            answers.send(work(*arguments))
        except UsageError as error:
            answers.send(error)

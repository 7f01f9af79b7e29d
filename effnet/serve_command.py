"""What does `effnet serve` do? It serves a model over HTTP until it is told to stop, and says where it listens."""

import json
import sys
from typing import Annotated, Any

import typer

from effnet import display
from effnet.arguments import AsJson, ModelName
from effnet.serve import DEFAULT, Options
from effnet.serve import serve as served


def serve(
    model: ModelName,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every network.")] = DEFAULT.host,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = DEFAULT.port,
    workers: Annotated[int, typer.Option(help="Processes, with a model each.")] = DEFAULT.workers,
    threads: Annotated[int | None, typer.Option(help="Of each worker. Default: the cores are shared out.")] = None,
    max_batch: Annotated[int, typer.Option(help="Images that go through the model together.")] = DEFAULT.max_batch,
    max_delay_ms: Annotated[
        float, typer.Option(help="How long an image waits at most for others to join its batch.")
    ] = DEFAULT.max_delay_ms,
    queue: Annotated[int, typer.Option(help="Images that may wait for a worker; then 429.")] = DEFAULT.queue,
    max_mb: Annotated[float, typer.Option(help="Of one request.")] = DEFAULT.max_body_bytes / 1e6,
    max_megapixels: Annotated[float, typer.Option(help="Of one image.")] = DEFAULT.max_pixels / 1e6,
    max_images: Annotated[
        int | None, typer.Option(help="In one request. Default: 64, or what the queue holds.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds from a request to its answer.")] = DEFAULT.timeout_s,
    as_json: AsJson = False,
) -> None:
    """Serves MODEL over HTTP, with a page for people at its address. SIGTERM and Ctrl-C drain.

    POST /predict takes an image or a form of many; GET /healthz, /readyz, /metrics, /model and /openapi.json. With
    --json, one document on stdout says where, as soon as images are taken.
    """
    options = Options(
        host=host, port=port, workers=workers, threads=threads, max_batch=max_batch, max_delay_ms=max_delay_ms,
        queue=queue, max_body_bytes=round(1e6 * max_mb), max_pixels=round(1e6 * max_megapixels),
        max_images=min(DEFAULT.max_images, queue) if max_images is None else max_images, timeout_s=timeout,
    )  # fmt: skip

    def ready(found: dict[str, Any]) -> None:
        if as_json:
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
        else:
            display.show_served(display.console(), found, options.to_dict())

    def say(message: str) -> None:
        sys.stderr.write(f"effnet: {message}\n")
        sys.stderr.flush()

    served(model, options, ready=ready, say=say)

"""How is a model asked over HTTP? One front process that owns connections and images, and workers with the model.

    from effnet.serve import Options, serve
    serve("runs/photos", Options(port=8000))

The front (`server`, `app`, `gate`, `uploads`) reads requests and counts what they cost; it never decodes an image and
never loads the model, so that nothing a stranger sends can take it down with the requests of others. Images go to
worker processes (`worker`) through a bounded queue (`pool`) that gives every one of them an answer.
"""

from collections.abc import Callable
from typing import Any

from effnet.serve.options import Options, Refusal
from effnet.value import UsageError

__all__ = ["DEFAULT", "Options", "Refusal", "serve"]

DEFAULT = Options()


def serve(
    model: str,
    options: Options = DEFAULT,
    *,
    ready: Callable[[dict[str, Any]], None] = lambda found: None,
    say: Callable[[str], None] = lambda message: None,
) -> None:
    """Serves `model` (what `engine.open_engine` takes) until SIGTERM or SIGINT ends it.

    The signal drains: accepted requests are answered, new ones get 503. A second one ends the process at once. `ready`
    is called once, with the address, when images are taken; `say` with every line for the operator. `UsageError` for a
    model that cannot be opened, an address that cannot be listened on, or when the extra `serve` is not installed.
    """
    try:
        from effnet.serve.server import run
    except ImportError as error:
        raise UsageError(f"serving needs {error.name}, which is not installed: pip install 'effnet[serve]'") from None
    run(model, options, ready, say)

"""What does the service answer to which request? The routes, their documents, and every error as JSON that helps.

POST /predict    images in, the most probable classes out; `?top_k=`, `?cam=true`, `?target=LABEL`
GET  /           the page
GET  /model      what is served, and the limits
GET  /healthz    this process lives       GET /readyz    a worker takes images, and nothing is shutting down
GET  /metrics    for Prometheus           GET /openapi.json
"""

import asyncio
import base64
import hashlib
import importlib.resources
import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from effnet.serve.gate import Gate
from effnet.serve.options import Options, Refusal
from effnet.serve.pool import Pool
from effnet.serve.uploads import RAW, Ledger, Upload, read_uploads
from effnet.serve.wire import Frame
from effnet.value import UsageError, check_choice

# --- the documents --------------------------------------------------------------------------------------------------


class Class(BaseModel):
    """A class and its probability: softmax over all classes."""

    label: str
    index: int
    probability: float


class Cam(BaseModel):
    """The evidence for a class. `png`: base64, in the image's proportions, to be laid over it."""

    label: str
    method: str
    tap: str
    png: str


class Problem(BaseModel):
    """Why there is no answer: `code` for programs, `message` for people."""

    status: int
    code: str
    message: str


class Result(BaseModel):
    """One image: its best classes, best first, or an error."""

    name: str | None = None
    predictions: list[Class] | None = None
    cam: Cam | None = None
    error: Problem | None = None


class Latency(BaseModel):
    """Milliseconds. `batch`: the images that shared the model's time."""

    total: float
    decode: float
    model: float
    batch: int


class Answer(BaseModel):
    """The results in the order of the images."""

    model: str
    results: list[Result]
    latency_ms: Latency | None = None


class Failure(BaseModel):
    """Every answer with a status of 400 or above."""

    error: Problem


BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                "required": ["image"],
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        RAW: {"schema": {"type": "string", "format": "binary"}},
    },
}
FAILURES = {
    408: "the upload took too long",
    413: "the body has too many bytes, or the image too many pixels",
    415: "neither an image nor a form of images",
    422: "a broken image, a form without files, or a wrong parameter",
    429: "the queue is full",
    500: "an image that ends workers",
    503: "shutting down, or no answer in time",
}


# --- the application ------------------------------------------------------------------------------------------------


def create_app(pool: Pool, options: Options) -> Gate:
    """The service in front of a started `pool`."""
    from effnet import __version__

    app = FastAPI(title="effnet serve", version=__version__, docs_url=None, redoc_url=None)  # they load foreign scripts
    ledger = Ledger(limit=options.max_waiting_bytes)
    pool.metrics.body_bytes.set_function(lambda: ledger.held)
    page, policy = read_page()
    _answer_errors(app)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": policy, "x-content-type-options": "nosniff"})

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process that answers requests is alive."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": Failure}})
    async def readyz() -> dict[str, Any]:
        """Images are taken: send traffic here."""
        if gate.draining:
            raise Refusal(503, "draining", "the service is shutting down")
        if not pool.ready:
            raise Refusal(503, "no_worker", "no worker is ready at the moment", retry_after_s=1)
        return {"status": "ready", "workers": pool.ready}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(pool.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/model")
    async def model() -> dict[str, Any]:
        """What is served, and the limits of a request."""
        limits = ("max_body_bytes", "max_pixels", "max_images", "timeout_s", "queue", "max_batch", "max_delay_ms")
        shown = {name: value for name, value in pool.hello.items() if name != "probe"}
        return {**shown, "limits": {name: getattr(options, name) for name in limits}}

    @app.post(
        "/predict",
        response_model=Answer,
        response_model_exclude_none=True,
        openapi_extra={"requestBody": BODY},
        responses={status: {"model": Failure, "description": why} for status, why in FAILURES.items()},
    )
    async def predict(
        request: Request,
        top_k: Annotated[int, Query(ge=1, description="Classes to return; all, if there are fewer.")] = 5,
        cam: Annotated[bool, Query(description="Also return where the evidence is.")] = False,
        target: Annotated[str | None, Query(description="The class of that map; the most probable, if none.")] = None,
    ) -> Response:
        """The most probable classes of one or many images.

        With one image, or when no image is good, an error is the status of the answer; else it stands in its result.
        """
        start = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + options.timeout_s
        ask = _ask(request, pool.hello, top_k, cam, target)
        if (why := pool.full) is not None:
            raise why
        with ledger.account() as account:
            uploads = await read_uploads(request, options, account, deadline)
            answers = await pool.answers([upload.data for upload in uploads], ask, deadline)
        results = [_result(upload, answer, pool.hello) for upload, answer in zip(uploads, answers, strict=True)]
        document = {"model": pool.hello["model"], "results": results}
        good = [answer for answer, _ in answers if "error" not in answer]
        if not good:
            (error, *_) = (result["error"] for result in results)
            return JSONResponse({"error": error, **(document if len(results) > 1 else {})}, error["status"])
        slowest = max(good, key=lambda answer: answer["decode_ms"] + answer["model_ms"])
        latency = {"decode": slowest["decode_ms"], "model": slowest["model_ms"], "batch": slowest["batch"]}
        return JSONResponse(document | {"latency_ms": {"total": 1e3 * (time.perf_counter() - start), **latency}})

    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    gate = Gate(app=app, options=options, metrics=pool.metrics, paths=paths)  # `readyz` reads it
    return gate


def _ask(request: Request, hello: Mapping[str, Any], top_k: int, cam: bool, target: str | None) -> dict[str, Any]:
    """What a worker is told beside the image. `Refusal` for words that mean nothing to this model."""
    labels: Sequence[str] = hello["labels"]
    try:
        for name in request.query_params:
            check_choice("parameter", name, ("top_k", "cam", "target"))
        if target is not None and target not in labels:
            shown = labels if len(labels) <= 20 else [*labels[:5], "..."]
            check_choice("target", target, shown)
        if target is not None and not cam:
            raise UsageError(f"target={target} is the class of a map: add cam=true")
    except UsageError as error:
        raise Refusal(422, "invalid_parameter", str(error)) from None
    if cam and not hello["cam"]:
        words = f"{hello['model']} cannot show where its evidence is; serve the checkpoint, or an export with --maps"
        raise Refusal(422, "no_cam", words)
    return {"top_k": top_k, "cam": cam, "target": None if target is None else labels.index(target)}


def _result(upload: Upload, frame: Frame, hello: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's answer about one image, in the words of the model."""
    answer, png = frame
    found: dict[str, Any] = {"name": upload.name}
    if "error" in answer:
        return found | {"error": answer["error"]}
    ranked = zip(answer["classes"], answer["probabilities"], strict=True)
    found["predictions"] = [{"label": hello["labels"][i], "index": i, "probability": p} for i, p in ranked]
    if png:
        found["cam"] = {**answer["cam"], "png": base64.b64encode(png).decode()}
    return found


# --- errors ---------------------------------------------------------------------------------------------------------


def _answer_errors(app: FastAPI) -> None:
    """Every error has the same form, whoever raised it."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return _failure(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        words = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
        return _failure(Refusal(422, "invalid_parameter", words))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:  # the traceback is in the log
        return _failure(Refusal(500, "internal", "the service failed on this request; its log says how"))

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        words = {
            404: f"there is nothing at {request.url.path[:80]}; images are sent to POST /predict",
            405: f"{request.url.path[:80]} does not take {request.method}",
        }
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return _failure(Refusal(error.status_code, code, words.get(error.status_code, str(error.detail))))


def _failure(error: Refusal) -> Response:
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    return JSONResponse({"error": error.document()}, error.status, headers)


# --- the page -------------------------------------------------------------------------------------------------------


def read_page() -> tuple[str, str]:
    """The page, and the policy that lets a browser run exactly the script and styles in it, and load nothing else."""
    page = importlib.resources.files("effnet.serve").joinpath("page.html").read_text(encoding="utf-8")
    digests = {}
    for element in ("script", "style"):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digests[element] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digests['script']}'; style-src 'sha256-{digests['style']}'; "
        "img-src data: blob:; connect-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy

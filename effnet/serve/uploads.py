"""Which images does a request carry? Read piece by piece, counted while they come, and never written to disk.

A request is one image as it is (`Content-Type: image/...`), or a form with one or many files. Nothing else is taken:
no path, no address to fetch, no serialised object. What the bytes are is decided by the worker that decodes them.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from effnet.serve.options import Options, Refusal

RAW = "application/octet-stream"
HOW = (
    "send the bytes of an image with its type (curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg) or a form "
    "(curl -F image=@photo.jpg)"
)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One image as it came. `name`: what the client calls its file; never a path of ours."""

    name: str | None
    data: bytes


@dataclass(kw_only=True, eq=False)
class Ledger:
    """How many bytes of request bodies are held, of all that may be."""

    limit: int
    held: int = 0

    @contextmanager
    def account(self) -> "Generator[Account]":
        """Of one request; closed with it."""
        account = Account(ledger=self)
        try:
            yield account
        finally:
            self.held -= account.held


@dataclass(kw_only=True, eq=False)
class Account:
    """The share of one request."""

    ledger: Ledger
    held: int = 0

    def add(self, count: int) -> None:
        """Takes in what was read. `Refusal` when the service holds too much already."""
        self.held += count
        self.ledger.held += count
        if self.ledger.held > self.ledger.limit:
            words = f"{self.ledger.limit / 1e6:.0f} MB of uploads wait already; ask again in a moment"
            raise Refusal(429, "busy", words, retry_after_s=1)


async def read_uploads(request: Request, options: Options, account: Account, deadline: float) -> list[Upload]:
    """The images of a request, at least one, none of them empty. `Refusal` for everything else.

    `deadline`: in the loop's time, for the last byte.
    """
    kind = media_type(request)
    try:
        async with asyncio.timeout_at(deadline):
            if kind == "multipart/form-data":
                uploads = await _form(request, options, account)
            else:
                uploads = [Upload(name=None, data=b"".join([c async for c in _chunks(request, options, account)]))]
    except TimeoutError:
        raise Refusal(408, "upload_too_slow", f"the upload took longer than {options.timeout_s:g} s") from None
    except ClientDisconnect:
        raise Refusal(499, "client_gone", "the client closed the connection") from None
    for upload in uploads:
        if not upload.data:
            raise Refusal(422, "no_image", f"{upload.name or 'the body'} is empty; {HOW}")
    return uploads


def media_type(request: Request) -> str:
    """The type of the body, one that we take. `Refusal` otherwise."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", RAW) and not kind.startswith("image/"):
        raise Refusal(415, "unsupported_media_type", f"a body of type {kind or '(none)'} is not taken: {HOW}")
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise Refusal(415, "unsupported_encoding", f"a body encoded as {encoding[:40]} is not taken: send it as it is")
    return kind


async def _chunks(request: Request, options: Options, account: Account) -> AsyncGenerator[bytes]:
    """The body; refused as soon as it is known to be too large, by its own words or by what has come."""
    most = options.max_body_bytes
    words = f"the body is larger than the limit of {most / 1e6:g} MB: send a smaller image, or fewer of them"
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise Refusal(413, "body_too_large", words)
    async for chunk in request.stream():
        account.add(len(chunk))
        if account.held > most:
            raise Refusal(413, "body_too_large", words)
        yield chunk


async def _form(request: Request, options: Options, account: Account) -> list[Upload]:
    """The files of a form. Every part must be one: a text field has no meaning here."""
    if not parse_options_header(request.headers["content-type"])[1].get(b"boundary"):
        raise Refusal(422, "broken_form", f"the form names no boundary; {HOW}")
    chunks = _chunks(request, options, account)
    parser = MultiPartParser(request.headers, chunks, max_files=options.max_images, max_fields=0)
    parser.spool_max_size = options.max_body_bytes + 1  # in memory
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "many fields" in error.message:
            words = f"a part of the form is not a file, and only files are taken; {HOW}"
            raise Refusal(422, "not_a_file", words) from None
        if "many files" in error.message:
            words = f"the form has more than {options.max_images} images; send the others in another request"
            raise Refusal(422, "too_many_images", words) from None
        raise Refusal(422, "broken_form", f"the form cannot be read ({error.message}); {HOW}") from None
    files = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
    uploads = [Upload(name=file.filename, data=await file.read()) for file in files]
    await form.close()
    if not uploads:
        raise Refusal(422, "no_image", f"the form has no file; {HOW}")
    return uploads

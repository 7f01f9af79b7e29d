"""How do the front process and its workers talk? Frames over a pipe: two lengths, a JSON object, raw bytes.

No pickle: a worker handles bytes from strangers, and nothing that it sends back may become code in the front.

>>> import io
>>> list(frames(io.BytesIO(frame({"id": 1}, b"image") + frame({"id": 2}))))
[({'id': 1}, b'image'), ({'id': 2}, b'')]
"""

import asyncio
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

LENGTHS = struct.Struct("!II")  # of the JSON object and of the bytes behind it
MOST_BYTES = 2**28  # of an answer; more is no answer

Frame = tuple[dict[str, Any], bytes]


def frame(header: Mapping[str, Any], body: bytes = b"") -> bytes:
    """One frame, ready to be written."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return LENGTHS.pack(len(text), len(body)) + text + body


def frames(file: BinaryIO) -> Iterator[Frame]:
    """The frames of a file to its end; one that is cut off is the end, too."""
    while len(lengths := file.read(LENGTHS.size)) == LENGTHS.size:
        header, body = LENGTHS.unpack(lengths)
        content = file.read(header + body)
        if len(content) < header + body:
            return
        yield json.loads(content[:header]), content[header:]


async def receive(reader: asyncio.StreamReader) -> Frame | None:
    """The next frame of a stream, or None at its end and for what is no frame."""
    try:
        header, body = LENGTHS.unpack(await reader.readexactly(LENGTHS.size))
        if header + body > MOST_BYTES:
            return None
        return json.loads(await reader.readexactly(header)), await reader.readexactly(body)
    except (asyncio.IncompleteReadError, ConnectionError, ValueError):
        return None

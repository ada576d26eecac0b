"""A stored file as a reply: whole or one range, named by its SHA-256."""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Final

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from aggregator_server.errors import Refusal
from aggregator_server.federation import Federation
from aggregator_server.web.ranges import parse_range
from protocol.chain import BlobRef
from protocol.problems import ProblemType

_NAME: Final = re.compile(r"[0-9a-f]{64}")
EVERYONE: Final = "public, max-age=31536000, immutable"
"""How long others may keep a file: its name says what is in it."""
NOBODY: Final = "no-store"


def parse_name(name: str) -> bytes:
    """The digest that names a file.

    Raises:
        Refusal: It is none (`not-found`).
    """
    if not _NAME.fullmatch(name):
        raise Refusal(ProblemType.NOT_FOUND, "a blob is named by 64 hexadecimal digits")
    return bytes.fromhex(name)


def send_file(
    service: Federation,
    request: Request,
    ref: BlobRef,
    read: Callable[[bytes, int, int], Iterable[bytes]],
    *,
    cache: str = EVERYONE,
) -> Response:
    """Answer with a file, or the one range that is asked for.

    Args:
        service: Counts what is served.
        request: With its headers.
        ref: The file.
        read: Its bytes from one place to another, given the digest.
        cache: The reply's `Cache-Control`.

    Raises:
        Refusal: A range outside the file.
        BlobError: The file cannot be read.
    """
    etag = f'"{ref.sha256.hex()}"'
    headers = {"ETag": etag, "Cache-Control": cache, "Accept-Ranges": "bytes"}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    # Another If-Range names another file: then the whole of this one is the answer.
    wanted = request.headers.get("range") if request.headers.get("if-range", etag) == etag else None
    part = parse_range(wanted, n_bytes=ref.n_bytes)
    start, stop = (0, ref.n_bytes) if part is None else (part.start, part.stop)
    headers["Content-Length"] = str(stop - start)
    if part is not None:
        headers["Content-Range"] = part.content_range
    chunks = iter(read(ref.sha256, start, stop))
    first = next(chunks, b"")  # a file that cannot be read is a problem document, not half a reply
    return StreamingResponse(
        _counted(service, chain((first,), chunks)),
        status_code=200 if part is None else 206,
        media_type="application/octet-stream",
        headers=headers,
    )


def _counted(service: Federation, chunks: Iterator[bytes]) -> Iterator[bytes]:
    n_bytes = 0
    try:
        for chunk in chunks:
            n_bytes += len(chunk)
            yield chunk
    finally:
        service.membership.served(n_bytes)

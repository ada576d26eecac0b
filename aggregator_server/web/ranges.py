"""One byte range of a file (RFC 9110, section 14)."""

import re
from dataclasses import dataclass
from typing import Final

from aggregator_server.errors import Refusal
from protocol.problems import ProblemType

_SINGLE: Final = re.compile(r"bytes=(?:(\d{1,15})-(\d{0,15})|-(\d{1,15}))")


@dataclass(frozen=True, kw_only=True)
class ByteRange:
    """Bytes `start` to `stop` (exclusive) of a file of `n_bytes`."""

    start: int
    stop: int
    n_bytes: int

    @property
    def content_range(self) -> str:
        """The header of a 206 reply."""
        return f"bytes {self.start}-{self.stop - 1}/{self.n_bytes}"


def parse_range(header: str | None, *, n_bytes: int) -> ByteRange | None:
    """The range that a request asks for.

    | Header | Reply |
    | --- | --- |
    | none, several ranges, another unit, or malformed | the whole file (None) |
    | `bytes=a-b`, `bytes=a-`, `bytes=-n` | those bytes, as far as the file goes |
    | a range that begins at or after the end | refused |

    Args:
        header: The Range header.
        n_bytes: Size of the file.

    Raises:
        Refusal: `bad-range`.
    """
    match = _SINGLE.fullmatch(header.strip()) if header is not None else None
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        start, stop = max(0, n_bytes - int(suffix)), n_bytes
    else:
        start = int(first)
        stop = min(n_bytes, int(last) + 1) if last else n_bytes
        if last and int(last) < start:
            return None
    if start >= stop:
        raise Refusal(ProblemType.BAD_RANGE, f"the file has {n_bytes} bytes")
    return ByteRange(start=start, stop=stop, n_bytes=n_bytes)

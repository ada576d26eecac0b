"""The server's side of the talk with its helper: https, or loopback, by the standard library."""

import http.client
import ssl
from typing import Final
from urllib.parse import urlsplit

from aggregator_server.addresses import is_loopback
from aggregator_server.errors import ConfigError, HelperError
from protocol.chain import BlobRef
from protocol.errors import ProtocolError
from protocol.helped import HelperAnswer, HelperRequest
from protocol.limits import MAX_HELPER_REQUEST_BYTES
from protocol.problems import ProblemDocument
from protocol.signing import Signed
from protocol.wire import parse, sha256

_TIMEOUT_S: Final = 600.0
_OK: Final = 200


def check_helper_url(url: str) -> str:
    """A helper's address: https, or http on this machine.

    Raises:
        ConfigError: Neither.
    """
    shape = f"helper_url must look like https://host[:port], not {url!r}"
    try:
        parts = urlsplit(url.rstrip("/"))
        _ = parts.port
    except ValueError as error:
        raise ConfigError(shape) from error
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path or parts.query:
        raise ConfigError(shape)
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        msg = f"helper_url {url!r} is not encrypted; use https (http is for this machine only)"
        raise ConfigError(msg)
    return f"{parts.scheme}://{parts.netloc}"


class HelperClient:
    """Requests to one helper.

    Args:
        url: Its address.

    Raises:
        ConfigError: The address is refused.
    """

    def __init__(self, url: str) -> None:
        """Check the address; nothing is sent yet."""
        parts = urlsplit(check_helper_url(url))
        self._netloc, self._tls = parts.netloc, parts.scheme == "https"

    def ask(self, request: Signed[HelperRequest]) -> Signed[HelperAnswer]:
        """The mask sums of a round's cells.

        Raises:
            HelperError: No answer, or a refusal.
        """
        body = request.canonical()
        data = self._call("POST", "/v1/helper/sums", body, limit=MAX_HELPER_REQUEST_BYTES)
        try:
            return parse(Signed[HelperAnswer], data, max_bytes=MAX_HELPER_REQUEST_BYTES)
        except ProtocolError as error:
            msg = f"the helper answered with something else: {error}"
            raise HelperError(msg) from error

    def fetch(self, ref: BlobRef) -> bytes:
        """A mask sum.

        Raises:
            HelperError: No answer, or other bytes than the answer promised.
        """
        path = f"/v1/helper/sums/{ref.sha256.hex()}"
        data = self._call("GET", path, b"", limit=ref.n_bytes)
        if len(data) != ref.n_bytes or sha256(data) != ref.sha256:
            msg = "the helper sends another mask sum than it signed"
            raise HelperError(msg)
        return data

    def _call(self, method: str, path: str, body: bytes, *, limit: int) -> bytes:
        connection: http.client.HTTPConnection
        if self._tls:
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(
                self._netloc, timeout=_TIMEOUT_S, context=context
            )
        else:
            connection = http.client.HTTPConnection(self._netloc, timeout=_TIMEOUT_S)
        try:
            connection.request(method, path, body or None, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read(limit + 1)
        except (OSError, http.client.HTTPException) as error:
            msg = f"no answer from the helper at {self._netloc}: {type(error).__name__}"
            raise HelperError(msg) from error
        finally:
            connection.close()
        if response.status != _OK:
            raise HelperError(_refusal(response.status, data))
        if len(data) > limit:
            msg = f"the helper's answer exceeds {limit} bytes"
            raise HelperError(msg)
        return data


def _refusal(status: int, data: bytes) -> str:
    try:
        document = parse(ProblemDocument, data)
    except ProtocolError:
        return f"the helper answered {status}"
    return f"the helper refused: {document.title} {document.detail}".strip()

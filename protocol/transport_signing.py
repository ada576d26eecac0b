"""The signature of a request (RFC 9421 with RFC 9530), made anew at each try.

It covers `@method`, `@path`, `@query` and `content-digest`, with `created`, `nonce`, `keyid` and
`tag`. The path contains the federation's id, so a request cannot be replayed to another one. Not
covered on purpose: the authority, because a server may stand behind a proxy under another name.

The receiver checks the signature here and the freshness with a `ReplayGuard`.
"""

import datetime as dt
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from http_message_signatures import (
    HTTPMessageSigner,
    HTTPMessageVerifier,
    HTTPSignatureKeyResolver,
    algorithms,
)
from http_message_signatures.digests import ContentDigest
from http_message_signatures.exceptions import HTTPMessageSignaturesException

from protocol.errors import EncodingError, SignatureError
from protocol.limits import NONCE_BYTES, SIGNATURE_WINDOW_S
from protocol.signing import Signer
from protocol.version import DOMAIN_PREFIX
from protocol.wire import b64u_decode, b64u_encode

TAG: Final = DOMAIN_PREFIX + "request"
_LABEL: Final = "sheepfold"
_COVERED: Final = ("@method", "@path", "@query", "content-digest")
_LIBRARY_ERRORS: Final = (
    HTTPMessageSignaturesException,
    ValueError,
    TypeError,
    KeyError,
    OverflowError,  # a time that no calendar holds
)


@dataclass
class _Message:
    """What the library asks of a request."""

    method: str
    url: str
    headers: dict[str, str]


class _OneKey(HTTPSignatureKeyResolver):
    def __init__(self, key: Any) -> None:  # noqa: ANN401 - the library's union of key types
        self._key = key

    def resolve_public_key(self, key_id: str) -> Any:  # noqa: ANN401, ARG002 - library interface
        return self._key

    def resolve_private_key(self, key_id: str) -> Any:  # noqa: ANN401, ARG002 - library interface
        return self._key


class _Verifier(HTTPMessageVerifier):
    def validate_created_and_expires(self, sig_input: Any, max_age: Any = None) -> None:  # noqa: ANN401
        """Leave time to `ReplayGuard`, which has the injected clock."""


def sign_request(
    signer: Signer, *, method: str, url: str, body: bytes, created: int, nonce: bytes
) -> dict[str, str]:
    """The headers that sign one request.

    Args:
        signer: The agent.
        method: Upper-case HTTP method.
        url: Absolute URL, path and query percent-encoded as sent.
        body: The body as sent; empty for a GET.
        created: Seconds since the Unix epoch by the server's clock, as far as it is known.
        nonce: `limits.NONCE_BYTES` random bytes, never used again.

    Returns:
        `Content-Digest`, `Signature-Input` and `Signature`.

    Raises:
        SignatureError: The method or URL is malformed, or `created` is beyond the year 9999.
    """
    message = _Message(method=method, url=url, headers={})
    library_signer = HTTPMessageSigner(
        signature_algorithm=algorithms.ED25519, key_resolver=_OneKey(signer.private_key)
    )
    try:
        library_signer.sign(
            message,
            key_id=b64u_encode(signer.identity),
            created=dt.datetime.fromtimestamp(created, tz=dt.UTC),
            nonce=b64u_encode(nonce),
            label=_LABEL,
            tag=TAG,
            covered_component_ids=_COVERED,
            body=body,
        )
    except _LIBRARY_ERRORS as error:
        msg = f"cannot sign {method} {url}: {error}"
        raise SignatureError(msg) from error
    return message.headers


@dataclass(frozen=True, kw_only=True)
class VerifiedRequest:
    """A request whose signature holds; its time and nonce are still to be checked."""

    identity: bytes
    created: int
    nonce: bytes


def verify_request(
    *, method: str, url: str, headers: Mapping[str, str], body: bytes
) -> VerifiedRequest:
    """Check the signature of a request under the key that it names.

    Guarantees:
        1. Method, path, query and body are the ones that the named key signed.
        2. Whether that key may do anything, and freshness, are for the caller to check.

    Args:
        method: Upper-case HTTP method.
        url: Absolute URL as received.
        headers: With lower-case names.
        body: The whole body as received.

    Raises:
        SignatureError: Missing, malformed, or does not hold.
        BodyDigestError: The signature holds, but for another body.
    """
    if "signature-input" not in headers or "signature" not in headers:
        msg = "the request carries no Signature-Input and Signature headers"
        raise SignatureError(msg)
    kept = {
        name: headers[name]
        for name in ("content-digest", "signature-input", "signature")
        if name in headers
    }
    message = _Message(method=method, url=url, headers=kept)
    identity = _named_identity(message)
    verifier = _Verifier(
        signature_algorithm=algorithms.ED25519,
        key_resolver=_OneKey(Ed25519PublicKey.from_public_bytes(identity)),
    )
    try:
        # By label too: the signature under which `identity` is named, and no other one.
        (result,) = verifier.verify(message, expect_tag=TAG, expect_label=_LABEL)
        _check_coverage(result.covered_components)
        created = int(result.parameters["created"])
        nonce = b64u_decode(str(result.parameters["nonce"]), n_bytes=NONCE_BYTES)
    except (*_LIBRARY_ERRORS, EncodingError) as error:
        msg = (
            f"the transport signature does not hold: {str(error) or 'other method, path or query'}"
        )
        raise SignatureError(msg) from error
    try:
        ContentDigest.verify(kept["content-digest"], body)
    except _LIBRARY_ERRORS as error:
        msg = f"the body of {len(body)} bytes is not the one that was signed; send it again"
        raise BodyDigestError(msg) from error
    return VerifiedRequest(identity=identity, created=created, nonce=nonce)


def _named_identity(message: _Message) -> bytes:
    # The library resolves keys by name; here the name is the key, so it is read first. What it
    # yields is checked like any other input, and the signature is verified under it.
    try:
        parsed = _Verifier._parse_signature_dictionary(message.headers["signature-input"])  # noqa: SLF001
        key_id = parsed[_LABEL].params["keyid"]
        identity = b64u_decode(key_id, n_bytes=32)
        Ed25519PublicKey.from_public_bytes(identity)
    except (*_LIBRARY_ERRORS, AttributeError, EncodingError) as error:
        msg = f"Signature-Input names no Ed25519 key under {_LABEL!r}: {error}"
        raise SignatureError(msg) from error
    return identity


def _check_coverage(covered: Mapping[str, str]) -> None:
    missing = {f'"{name}"' for name in _COVERED} - set(covered)
    if missing:
        msg = f"the signature does not cover {', '.join(sorted(missing))}"
        raise SignatureError(msg)


class BodyDigestError(SignatureError):
    """The signature holds, but the body was damaged on its way: sending it again may help."""


class StaleSignatureError(SignatureError):
    """The signature's time is outside the window, or before this server started."""


class ReplayedSignatureError(SignatureError):
    """The signature was already used."""


class ReplayGuard:
    """Refuses a transport signature that is stale or was seen before.

    Guarantees:
        1. A signature is admitted at most once, across restarts too: nonces are remembered for as
           long as their time is within the window, and a signature from before the start is stale.
        2. Memory is bounded by the requests of one window.

    A signature whose time is ahead of `now` is stale as well. Were it admitted, a process that
    starts soon after could not tell that it is old; the agent corrects its clock and signs anew.

    Args:
        started_at: Seconds since the Unix epoch when this process began to answer.
    """

    def __init__(self, *, started_at: float) -> None:
        """Begin with no nonce remembered."""
        self._nothing_up_to = int(started_at)
        self._seen: set[tuple[bytes, bytes]] = set()
        self._by_time: deque[tuple[int, tuple[bytes, bytes]]] = deque()

    def admit(self, request: VerifiedRequest, *, now: float) -> None:
        """Admit a request once.

        Args:
            request: Whose signature holds.
            now: Seconds since the Unix epoch.

        Raises:
            StaleSignatureError: Made more than `limits.SIGNATURE_WINDOW_S` ago, ahead of `now`, or
                not after this process started.
            ReplayedSignatureError: Its nonce was already used by this identity.
        """
        self._forget(now)
        age_s = now - request.created
        if age_s < 0.0:
            msg = f"signed {-age_s:.0f} s ahead of this server's clock; correct yours and sign anew"
            raise StaleSignatureError(msg)
        if age_s > SIGNATURE_WINDOW_S:
            msg = f"signed {age_s:.0f} s ago; the limit is {SIGNATURE_WINDOW_S} s"
            raise StaleSignatureError(msg)
        if request.created <= self._nothing_up_to:
            msg = "signed before this server started or its clock was set; sign anew"
            raise StaleSignatureError(msg)
        key = (request.identity, request.nonce)
        if key in self._seen:
            msg = "this nonce was already used; sign anew"
            raise ReplayedSignatureError(msg)
        self._seen.add(key)
        self._by_time.append((request.created, key))

    def _forget(self, now: float) -> None:
        while self._by_time and self._by_time[0][0] < now - SIGNATURE_WINDOW_S:
            created, key = self._by_time.popleft()
            self._seen.discard(key)
            # Should the clock be set back, what was forgotten would be fresh again.
            self._nothing_up_to = max(self._nothing_up_to, created)

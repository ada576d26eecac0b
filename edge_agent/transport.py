"""The only module that speaks HTTP: outbound requests to one server, signed, retried, resumable.

Each try carries a transport signature of its own; the body stays the same bytes. What can be mended
by trying again (no answer, a restart, a full disk, a clock that is off) is tried again with growing
pauses; everything else is a typed error. Plain http is refused except on loopback.
"""

import contextlib
import hashlib
import ipaddress
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

import requests
import tenacity
from pydantic import BaseModel

from edge_agent.errors import (
    OtherBytesError,
    RefusedError,
    TransportError,
    UnreachableError,
)
from protocol import limits
from protocol.chain import BlobRef
from protocol.clock import Clock
from protocol.errors import ProtocolError
from protocol.gating import EvaluationReport
from protocol.helped import HelperUpload
from protocol.manifest import FederationManifest
from protocol.masked import (
    CellNews,
    Complaint,
    Confirm,
    MaskedHeader,
    Ready,
    Reveal,
    Shares,
)
from protocol.messages import (
    Acknowledged,
    BodyHead,
    Credential,
    Discovery,
    Enrolment,
    EvaluationReply,
    FederationStatus,
    ReleasePage,
    Revocation,
    TaskReply,
    UploadHeader,
    UploadStatus,
    Withdrawal,
)
from protocol.phases import AgentPhase
from protocol.problems import CONTENT_TYPE, Advice, ProblemDocument, ProblemType
from protocol.signing import Signed, Signer
from protocol.transport_signing import sign_request
from protocol.wire import WireModel, b64u_encode, parse

ReplyT = TypeVar("ReplyT", bound=BaseModel)

_CONNECT_TIMEOUT_S: Final = 10.0
_READ_TIMEOUT_S: Final = 60.0
_CHUNK_BYTES: Final = 16 * 1024
"""Of a transfer that breaks, at most this much is fetched twice."""

_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 60.0
_LONGEST_RETRY_AFTER_S: Final = 3600.0
_SLEEP_SLICE_S: Final = 0.5
_RETRIED: Final = frozenset({Advice.RETRY, Advice.RE_SIGN})
_OK: Final = 200
_PARTIAL_CONTENT: Final = 206


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """A body that is about to leave the machine."""

    host: str
    what: str
    round: int | None
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Upload:
    """An announced upload whose body is to be sent."""

    round: int
    attempt: int
    head: BodyHead
    what: str = "update"
    """What the owner is told of its parts."""


@dataclass(frozen=True, kw_only=True)
class _Request:
    """One request, whatever the number of tries."""

    what: str
    method: str
    path: str
    body: bytes = b""
    round: int | None = None
    signed: bool = True
    timeout_s: float = _READ_TIMEOUT_S
    content_type: str = "application/json"
    final: frozenset[ProblemType] = frozenset()
    """Refusals that the caller handles, though their advice is to try again."""


def check_url(url: str) -> str:
    """The server's address without a trailing slash.

    Args:
        url: `https://host[:port]`; http is accepted on loopback only.

    Raises:
        TransportError: Another scheme, a path, or http to another machine.
    """
    shape = f"the server's address must look like https://host[:port], not {url!r}"
    try:
        parts = urlsplit(url.strip().rstrip("/"))
        _ = parts.port  # read for its error
    except ValueError as error:
        raise TransportError(shape) from error
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise TransportError(shape)
    if parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        msg = f"the server's address must have no path, query or user: {url!r}"
        raise TransportError(msg)
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        msg = f"{url!r} is not encrypted; use https (http is accepted on this machine only)"
        raise TransportError(msg)
    return f"{parts.scheme}://{parts.netloc}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Transport:
    """Requests to one server.

    Guarantees:
        1. Every try of a request sends the same body; only the transport signature is new.
        2. `on_outgoing` is told of every body before its first byte leaves.
        3. A download is handed over only when its SHA-256 is the expected one.

    Args:
        url: The server's address.
        clock: Time for signatures and pauses.
        signer: The agent's identity; None: only unsigned requests work.
        on_outgoing: Told of every body that leaves.
        on_retry: Told why a request is tried again, and after how many seconds.
        stopped: When true, no further try is made.
        patience_s: Give up on an unreachable server after this long; None: never.

    Raises:
        TransportError: The address is refused.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Clock,
        signer: Signer | None = None,
        on_outgoing: Callable[[Outgoing], None] | None = None,
        on_retry: Callable[[str, float], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        patience_s: float | None = None,
    ) -> None:
        """Check the address; nothing is sent yet."""
        self.url = check_url(url)
        self.host = urlsplit(self.url).netloc
        self._clock = clock
        self._signer = signer
        self._on_outgoing = on_outgoing
        self._on_retry = on_retry
        self._stopped = stopped
        self._patience_s = patience_s
        self._clock_offset_s = 0.0
        self._session = requests.Session()
        # Ranges count bytes as they are stored, and a small body must stay a small one.
        self._session.headers["Accept-Encoding"] = "identity"
        # A netrc of the owner's is nobody's business here.
        self._session.auth = _no_password
        self._prefix = ""
        self._received_bytes = 0

    def use_federation(self, manifest: FederationManifest) -> None:
        """Address one federation from now on."""
        self._prefix = f"/v1/federations/{b64u_encode(manifest.federation)}"

    def take_received_bytes(self) -> int:
        """Bytes of bodies received since the last call."""
        taken, self._received_bytes = self._received_bytes, 0
        return taken

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    # The calls of PROTOCOL, one method each

    def discover(self) -> Discovery:
        """What federation is served here."""
        request = _Request(what="discovery", method="GET", path="/v1/federation", signed=False)
        return self._ask(request, Discovery)

    def enrol(self, enrolment: Signed[Enrolment]) -> Signed[Credential]:
        """Ask to join."""
        return self._post("enrolment", "/enrolments", enrolment, Signed[Credential])

    def revoke(self, revocation: Signed[Revocation]) -> Acknowledged:
        """Leave."""
        return self._post("revocation", "/enrolments/revoke", revocation, Acknowledged)

    def task(self, *, after: int, wait_s: float) -> TaskReply:
        """What to do after round `after`; the server holds the answer for up to `wait_s`."""
        path = f"{self._prefix}/task?after={after}&wait={wait_s:g}"
        timeout_s = wait_s + _READ_TIMEOUT_S
        request = _Request(what="poll", method="GET", path=path, timeout_s=timeout_s)
        return self._ask(request, TaskReply)

    def releases(self, *, after: int) -> ReleasePage:
        """The releases after number `after` (-1: from the first), oldest first."""
        path = f"{self._prefix}/releases?after={after}"
        return self._ask(
            _Request(what="releases", method="GET", path=path, signed=False), ReleasePage
        )

    def status(self) -> FederationStatus:
        """The federation as anyone may see it."""
        path = f"{self._prefix}/status"
        return self._ask(
            _Request(what="status", method="GET", path=path, signed=False), FederationStatus
        )

    def begin_upload(self, header: Signed[UploadHeader]) -> UploadStatus:
        """Announce an upload; the answer names the parts that are missing."""
        return self._post("upload-header", "/uploads", header, UploadStatus, header.body.round)

    def put_part(self, upload: Upload, part: int, data: bytes) -> UploadStatus:
        """Send one part."""
        request = _Request(
            what=f"{upload.what} part {part + 1} of {upload.head.n_parts}",
            method="PUT",
            path=f"{self._prefix}/uploads/{upload.round}/{upload.attempt}/parts/{part}",
            body=data,
            round=upload.round,
            content_type="application/octet-stream",
        )
        return self._ask(request, UploadStatus)

    def complete(self, upload: Upload) -> UploadStatus:
        """Ask the server to check the whole and accept it.

        Raises:
            RefusedError: Also with `incomplete` or `digest-mismatch`: announce the upload again,
                and send what is missing then.
        """
        request = _Request(
            what="upload-complete",
            method="POST",
            path=f"{self._prefix}/uploads/{upload.round}/{upload.attempt}/complete",
            round=upload.round,
            final=frozenset({ProblemType.INCOMPLETE, ProblemType.DIGEST_MISMATCH}),
        )
        return self._ask(request, UploadStatus)

    def withdraw(self, withdrawal: Signed[Withdrawal]) -> Acknowledged:
        """Give this agent's place in a round to another."""
        return self._post(
            "withdrawal", "/withdrawals", withdrawal, Acknowledged, withdrawal.body.round
        )

    # Masked rounds

    def ready(self, ready: Signed[Ready]) -> Acknowledged:
        """Ask for a cell."""
        return self._post("ready", "/readies", ready, Acknowledged, ready.body.round)

    def cell_news(
        self, *, round_number: int, attempt: int, phase: AgentPhase, wait_s: float
    ) -> CellNews:
        """What there is for the agent; the server holds the answer for up to `wait_s`."""
        path = f"{self._prefix}/cells/{round_number}/{attempt}?phase={phase.value}&wait={wait_s:g}"
        timeout_s = wait_s + _READ_TIMEOUT_S
        request = _Request(what="poll", method="GET", path=path, timeout_s=timeout_s)
        return self._ask(request, CellNews)

    def shares(self, shares: Shares, *, round_number: int) -> Acknowledged:
        """Deal shares to the members of the cell."""
        path = self._cell_path(shares.header.body.transcript, "shares")
        return self._post("shares", path, shares, Acknowledged, round_number)

    def complain(self, complaint: Signed[Complaint], *, round_number: int) -> Acknowledged:
        """Tell of a dealer whose shares do not open."""
        path = self._cell_path(complaint.body.transcript, "complaints")
        return self._post("complaint", path, complaint, Acknowledged, round_number)

    def begin_masked_upload(
        self, header: Signed[MaskedHeader], *, round_number: int
    ) -> UploadStatus:
        """Announce a masked upload; the answer names the parts that are missing."""
        path = self._cell_path(header.body.transcript, "uploads")
        return self._post("masked-upload-header", path, header, UploadStatus, round_number)

    def begin_helped_upload(self, upload: HelperUpload) -> UploadStatus:
        """Announce an upload under a helper's mask; the answer names the parts that are missing."""
        number = upload.header.body.round
        return self._post("masked-upload-header", "/helped", upload, UploadStatus, number)

    def confirm(self, confirm: Confirm, *, round_number: int) -> Acknowledged:
        """Confirm who survived."""
        path = self._cell_path(confirm.transcript, "confirm")
        return self._post("confirm", path, confirm, Acknowledged, round_number)

    def reveal(self, reveal: Signed[Reveal], *, round_number: int) -> Acknowledged:
        """Reveal what removes the masks of the survivors' sum."""
        path = self._cell_path(reveal.body.transcript, "reveal")
        return self._post("reveal", path, reveal, Acknowledged, round_number)

    @staticmethod
    def _cell_path(transcript: bytes, what: str) -> str:
        return f"/cells/{b64u_encode(transcript)}/{what}"

    # The evaluator's part

    def evaluation(self, *, wait_s: float) -> EvaluationReply:
        """What the evaluator is to judge; the server holds the answer for up to `wait_s`."""
        path = f"{self._prefix}/evaluation?wait={wait_s:g}"
        timeout_s = wait_s + _READ_TIMEOUT_S
        request = _Request(what="poll", method="GET", path=path, timeout_s=timeout_s)
        return self._ask(request, EvaluationReply)

    def report(self, report: Signed[EvaluationReport]) -> Acknowledged:
        """Say what the evaluator found."""
        return self._post(
            "evaluation", "/evaluation/reports", report, Acknowledged, report.body.round
        )

    def fetch_candidate(self, ref: BlobRef, folder: Path) -> Path:
        """Download a candidate's adapter, as the evaluator; see `fetch`."""
        return self._fetch(ref, folder, path="evaluation/candidates", signed=True)

    def fetch(self, ref: BlobRef, folder: Path) -> Path:
        """Download a blob into a folder, or find it there.

        A transfer that breaks goes on where it was, also after a restart of either side.

        Args:
            ref: What to fetch.
            folder: Files are named by their SHA-256.

        Returns:
            The file, whose SHA-256 was checked.

        Raises:
            OtherBytesError: The server sends other bytes than promised.
            RefusedError: It does not have the blob.
        """
        return self._fetch(ref, folder, path="blobs", signed=False)

    def _fetch(self, ref: BlobRef, folder: Path, *, path: str, signed: bool) -> Path:
        request = _Request(
            what="download",
            method="GET",
            path=f"{self._prefix}/{path}/{ref.sha256.hex()}",
            signed=signed,
        )
        target = folder / ref.sha256.hex()
        if target.exists() and _sha256_of(target) == ref.sha256:
            return target
        partial = target.with_name(target.name + ".partial")
        for attempt in range(2):
            self._tries(frozenset())(self._fetch_rest, request, ref, partial)
            if partial.stat().st_size == ref.n_bytes and _sha256_of(partial) == ref.sha256:
                partial.replace(target)
                return target
            partial.unlink()
            if attempt == 0 and self._on_retry is not None:
                self._on_retry("a download did not match its digest; once more", 0.0)
        msg = f"the server sends other bytes than {ref.sha256.hex()}; nothing of them is used"
        raise OtherBytesError(msg)

    # One try and many

    def _post(
        self,
        what: str,
        path: str,
        body: WireModel,
        reply: type[ReplyT],
        round_number: int | None = None,
    ) -> ReplyT:
        data = body.canonical()  # what was signed and journalled
        request = _Request(
            what=what, method="POST", path=self._prefix + path, body=data, round=round_number
        )
        return self._ask(request, reply)

    def _ask(self, request: _Request, reply: type[ReplyT]) -> ReplyT:
        if request.body and self._on_outgoing is not None:
            outgoing = Outgoing(
                host=self.host, what=request.what, round=request.round, body=request.body
            )
            self._on_outgoing(outgoing)
        data = self._tries(request.final)(self._try_once, request)
        try:
            return parse(reply, data)
        except ProtocolError as error:
            msg = f"{self.host} answered {request.what} with something else: {error}"
            raise TransportError(msg) from error

    def _tries(self, final: frozenset[ProblemType]) -> tenacity.Retrying:
        def may_be_retried(error: BaseException) -> bool:
            if isinstance(error, RefusedError):
                document = error.document
                return document.advice in _RETRIED and document.problem_type not in final
            return isinstance(error, UnreachableError)

        began = self._clock.monotonic()

        def given_up(_: tenacity.RetryCallState) -> bool:
            waited_s = self._clock.monotonic() - began
            return self._stopped() or (
                self._patience_s is not None and waited_s >= self._patience_s
            )

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(may_be_retried),
            wait=self._pause,
            stop=given_up,
            sleep=self._sleep,
            before_sleep=self._tell_retry,
            reraise=True,
        )

    def _pause(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, RefusedError):
            if error.document.advice is Advice.RE_SIGN and state.attempt_number == 1:
                return 0.0
            if error.document.retry_after_s is not None:
                return min(error.document.retry_after_s, _LONGEST_RETRY_AFTER_S)
        longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(state.attempt_number, 10))
        # Jitter keeps a crowd from coming back all at once after a restart.
        return longest * (0.5 + secrets.randbelow(1000) / 2000.0)

    def _sleep(self, duration_s: float) -> None:
        until = self._clock.monotonic() + duration_s
        while not self._stopped() and (left_s := until - self._clock.monotonic()) > 0.0:
            self._clock.sleep(min(_SLEEP_SLICE_S, left_s))
        if self._stopped():
            msg = f"no further try to reach {self.host}: stopped by the owner"
            raise UnreachableError(msg)

    def _tell_retry(self, state: tenacity.RetryCallState) -> None:
        if self._on_retry is not None and state.outcome is not None:
            pause_s = state.next_action.sleep if state.next_action else 0.0
            self._on_retry(str(state.outcome.exception()), pause_s)

    def _send(
        self, request: _Request, headers: dict[str, str], *, stream: bool = False
    ) -> requests.Response:
        prepared = self._session.prepare_request(
            requests.Request(
                request.method, self.url + request.path, data=request.body or None, headers=headers
            )
        )
        if request.signed and self._signer is not None:
            prepared.headers.update(self._signature(self._signer, request, prepared.url or ""))
        settings = self._session.merge_environment_settings(
            prepared.url or "", {}, stream, None, None
        )
        try:
            response = self._session.send(
                prepared,
                timeout=(_CONNECT_TIMEOUT_S, request.timeout_s),
                allow_redirects=False,
                **settings,
            )
        except requests.RequestException as error:
            msg = f"no answer from {self.host}: {type(error).__name__}"
            raise UnreachableError(msg) from error
        if response.status_code not in {_OK, _PARTIAL_CONTENT}:
            raise self._refusal(response)
        return response

    def _signature(self, signer: Signer, request: _Request, url: str) -> dict[str, str]:
        try:
            return sign_request(
                signer,
                method=request.method,
                url=url,
                body=request.body,
                created=int(self._clock.now() + self._clock_offset_s),
                nonce=secrets.token_bytes(limits.NONCE_BYTES),
            )
        except ProtocolError as error:
            msg = f"{request.what} cannot be signed: {error}"
            raise TransportError(msg) from error

    def _try_once(self, request: _Request) -> bytes:
        headers = {"Content-Type": request.content_type} if request.body else {}
        response = self._send(request, headers, stream=True)
        try:
            data = _read_capped(response)
        except requests.RequestException as error:
            msg = f"the answer of {self.host} broke off: {type(error).__name__}"
            raise UnreachableError(msg) from error
        finally:
            response.close()
        self._received_bytes += len(data)
        return data

    def _fetch_rest(self, request: _Request, ref: BlobRef, partial: Path) -> None:
        have = partial.stat().st_size if partial.exists() else 0
        if have == ref.n_bytes and have > 0:
            return
        headers = {"Range": f"bytes={have}-"} if have else {}
        response = self._send(request, headers, stream=True)
        resumed = response.status_code == _PARTIAL_CONTENT
        written = have if resumed else 0
        try:
            with partial.open("ab" if resumed else "wb") as file:
                for chunk in response.iter_content(_CHUNK_BYTES):
                    self._received_bytes += len(chunk)
                    # What comes after the promised bytes is left unread.
                    written += file.write(chunk[: ref.n_bytes - written])
                    if written == ref.n_bytes:
                        break
        except requests.RequestException as error:
            msg = f"the download from {self.host} broke off after {written} bytes"
            raise UnreachableError(msg) from error
        except OSError as error:
            msg = f"cannot keep a download in {partial.parent}: {error}; free some space"
            raise TransportError(msg) from error
        finally:
            response.close()
        if partial.stat().st_size < ref.n_bytes:
            msg = f"the download from {self.host} ended after {written} of {ref.n_bytes} bytes"
            raise UnreachableError(msg)

    def _refusal(self, response: requests.Response) -> TransportError:
        with contextlib.closing(response):
            try:
                data = _read_capped(response)
            except (requests.RequestException, TransportError):
                data = b""
            content_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
        if content_type == CONTENT_TYPE:
            with contextlib.suppress(ProtocolError):
                document = parse(ProblemDocument, data)
                if document.advice is Advice.RE_SIGN:
                    self._clock_offset_s = document.server_time - self._clock.now()
                return RefusedError(document)
        # No problem document: a proxy speaks, not the server.
        msg = f"{self.host} answered {response.status_code} without a problem document"
        return UnreachableError(msg)


def _no_password(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _read_capped(response: requests.Response) -> bytes:
    data = bytearray()
    for chunk in response.iter_content(_CHUNK_BYTES):
        data += chunk
        if len(data) > limits.MAX_JSON_BYTES:
            msg = f"the answer exceeds {limits.MAX_JSON_BYTES} bytes"
            raise TransportError(msg)
    return bytes(data)


def _sha256_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()

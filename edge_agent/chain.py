"""What the agent checks of a federation, its releases and its rounds before it trusts them.

Every function either returns something whose checks ran or raises `TrustError`, which is logged,
shown to the owner, and ends the matter: nothing secret is sent.
"""

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

import numpy as np

from edge_agent.errors import TrustError
from protocol.blocks import EvaluatorGate
from protocol.chain import EvaluatorVerdict, Release, RoundManifest
from protocol.checks import Check
from protocol.errors import ProtocolError
from protocol.gating import EvaluationReport, objection
from protocol.manifest import FederationManifest
from protocol.messages import Credential, Discovery, EvaluationTask
from protocol.signing import Invite, Signed, fingerprint, format_fingerprint, verify
from quant.adapter import AdapterArrays

_EARLIEST_S: Final = 10**9
_LATEST_S: Final = 10**10
"""Seconds since the Unix epoch of ten digits, as a READY's expiry has: 2001 to 2286."""
BodyT = TypeVar(
    "BodyT",
    FederationManifest,
    Credential,
    Release,
    RoundManifest,
    EvaluationTask,
    EvaluationReport,
)


def check_discovery(discovery: Discovery, invite: Invite | None) -> FederationManifest:
    """The federation manifest, signed by the server that it names.

    Args:
        discovery: What the server sent.
        invite: The owner's invite; the server's key must match its fingerprint. Without one the
            key is trusted on first use and pinned.

    Raises:
        TrustError: The signature or the fingerprint does not hold.
    """
    server = discovery.federation.body.server
    if invite is not None and fingerprint(server) != invite.server_fingerprint:
        msg = (
            f"this server's key is {format_fingerprint(server)}, but the invite is for another "
            "server; check the address with whoever invited you"
        )
        raise TrustError(msg, Check.FOREIGN_SIGNATURE)
    return _verified(discovery.federation, "federation", server)


def check_credential(
    credential: Signed[Credential], manifest: FederationManifest, agent: bytes
) -> None:
    """Check (PROTOCOL, "Identities") that the registrar vouches for this agent here.

    Raises:
        TrustError: Signed by another key, or for another agent or federation.
    """
    body = _verified(credential, "credential", manifest.registrar)
    if body.agent != agent or body.federation != manifest.federation:
        msg = "the credential is for another agent or federation"
        raise TrustError(msg, Check.BAD_CREDENTIAL)


def check_releases(
    manifest: FederationManifest,
    last: Release | None,
    releases: Iterable[Signed[Release]],
    *,
    earlier: Callable[[int], Release | None],
) -> list[Release]:
    """Verify that releases continue the chain (PROTOCOL, check 1).

    Guarantees:
        1. Numbers rise by one, each release names the digest of the one before, all are signed by
           the pinned key for this federation.
        2. A release that no round made is release 0, or publishes an earlier adapter again, byte
           for byte.
        3. Where the manifest names an evaluator, each release of a round carries its signed report,
           which names this very adapter and keeps to the manifest's tolerance.

    Args:
        manifest: The pinned federation.
        last: The newest release already verified, or None.
        releases: What the server sent, oldest first.
        earlier: A release already verified, by its number; None where there is none.

    Raises:
        TrustError: The chain is broken.
    """
    verified: list[Release] = []
    for signed in releases:
        release = _verified(signed, "release", manifest.server)
        expected = 0 if last is None else last.number + 1
        previous = None if last is None else last.digest()
        if release.number != expected or release.previous != previous:
            msg = (
                f"the chain of releases is broken: after release {expected - 1} came "
                f"{release.number}, which does not continue it"
            )
            raise TrustError(msg, Check.BROKEN_CHAIN)
        if (
            release.federation != manifest.federation
            or release.federation_digest != manifest.digest()
        ):
            msg = f"release {release.number} belongs to another federation"
            raise TrustError(msg, Check.BROKEN_CHAIN)
        if release.round_digest is None:
            known = {item.number: item for item in verified}
            back = release.rolled_back_to
            _check_rollback(release, None if back is None else known.get(back) or earlier(back))
        else:
            _check_gate(manifest, release)
        verified.append(release)
        last = release
    return verified


def _check_rollback(release: Release, old: Release | None) -> None:
    """Release 0 begins the chain; any other that no round made is an older one again."""
    if release.number and (old is None or release.adapter != old.adapter):
        msg = (
            f"release {release.number} comes from no round, and is not the adapter of an earlier "
            "release either"
        )
        raise TrustError(msg, Check.BROKEN_CHAIN)


def _check_gate(manifest: FederationManifest, release: Release) -> None:
    """Look for the evaluator's word, where the manifest promises it."""
    gate, verdict = manifest.gate, release.verdict
    if not isinstance(gate, EvaluatorGate):
        return
    if not isinstance(verdict, EvaluatorVerdict):
        msg = f"release {release.number} has no report of the evaluator that the manifest names"
        raise TrustError(msg, Check.UNGATED)
    report = _verified(verdict.report, "evaluation", gate.evaluator)
    named = [i for i, sha in enumerate(report.candidates) if sha == release.adapter.sha256]
    if report.federation != manifest.federation or report.round != release.round or not named:
        msg = f"release {release.number} shows the evaluator's report on something else"
        raise TrustError(msg, Check.UNGATED)
    found = objection(report, named[0], gate)
    if found is not None:
        msg = f"release {release.number} was published though the evaluator objects: {found}"
        raise TrustError(msg, Check.UNGATED)


def check_evaluation_task(
    signed: Signed[EvaluationTask], manifest: FederationManifest
) -> EvaluationTask:
    """What the evaluator is asked, by the server that it knows.

    Raises:
        TrustError: Signed by another key, or about another federation.
    """
    task = _verified(signed, "evaluation-task", manifest.server)
    if task.federation != manifest.federation:
        msg = "the server asks about another federation"
        raise TrustError(msg, Check.STALE_MANIFEST)
    return task


def check_first_release(
    manifest: FederationManifest, releases: Iterable[Signed[Release]]
) -> Release:
    """Release 0, with which every chain begins.

    Raises:
        TrustError: The server shows none, or its checks fail.
    """
    verified = check_releases(manifest, None, releases, earlier=lambda _: None)
    if not verified:
        msg = "the server shows no release; a federation begins with release 0"
        raise TrustError(msg, Check.BROKEN_CHAIN)
    return verified[0]


def check_round(
    signed: Signed[RoundManifest],
    manifest: FederationManifest,
    newest: Release,
    update_n_bytes: int,
    *,
    last_round: int,
) -> RoundManifest:
    """Check a round manifest against all that the agent has verified (PROTOCOL, checks 1 and 2).

    Args:
        signed: What the server sent.
        manifest: The pinned federation.
        newest: The end of the verified chain.
        update_n_bytes: Size of an update's body, computed by this agent from its own base.
        last_round: The last round with nothing left to do.

    Raises:
        TrustError: Signed by another key; another federation, release or layout; or a round number
            that does not rise.
    """
    body = _verified(signed, "round", manifest.server)
    faults: dict[str, tuple[Check, bool]] = {
        "it belongs to another federation": (
            Check.STALE_MANIFEST,
            body.federation != manifest.federation or body.federation_digest != manifest.digest(),
        ),
        "its times are none that a clock shows": (
            Check.STALE_MANIFEST,
            not _EARLIEST_S <= body.cap_at < _LATEST_S,
        ),
        f"its number does not rise above {last_round}": (
            Check.STALE_MANIFEST,
            body.round <= last_round,
        ),
        f"it does not start from the newest release, {newest.number}": (
            Check.STALE_MANIFEST,
            body.release != newest.number
            or body.release_digest != newest.digest()
            or body.sent != newest.sent,
        ),
        f"it asks for {body.update_n_bytes} bytes, the layout has {update_n_bytes}": (
            Check.OTHER_LAYOUT,
            body.update_n_bytes != update_n_bytes,
        ),
    }
    for fault, (check, found) in faults.items():
        if found:
            msg = f"round {body.round} is refused: {fault}"
            raise TrustError(msg, check)
    return body


def check_change(
    before: AdapterArrays,
    after: AdapterArrays,
    *,
    max_tensor_change_norm: float,
    n_releases: int,
) -> None:
    """Refuse a global adapter that moved further than the owner accepted (PROTOCOL, check 17).

    Args:
        before: The adapter that was last accepted.
        after: The one received; its values are finite already.
        max_tensor_change_norm: L2 norm allowed for one tensor and one release.
        n_releases: How many releases lie between the two, at least 1.

    Raises:
        TrustError: A tensor moved further; nothing is trained on it.
    """
    limit = max_tensor_change_norm * n_releases
    for name, array in after.items():
        # In float64: a difference of two finite float32 values may be infinite in float32.
        change = float(np.linalg.norm(array.astype(np.float64) - before[name]))
        if change > limit:
            msg = (
                f"the received adapter changed {name!r} by {change:.3g}, above the limit of "
                f"{limit:.3g} that was accepted at enrolment"
            )
            raise TrustError(msg, Check.MOVED_TOO_FAR)


def _verified(signed: Signed[BodyT], name: str, key: bytes) -> BodyT:
    try:
        return verify(signed, name, key=key).body
    except ProtocolError as error:
        msg = f"the server's {name} document is refused: {error}"
        raise TrustError(msg, Check.FOREIGN_SIGNATURE) from error

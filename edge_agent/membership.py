"""Becoming a member, seeing what one is, and leaving: without torch, so the commands are quick."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.chain import check_credential, check_discovery, check_first_release
from edge_agent.config import AgentSettings
from edge_agent.consent import Disclosure, disclose
from edge_agent.data.reading import read_records
from edge_agent.data.records import ReadReport
from edge_agent.data.sources import HUB_PREFIX
from edge_agent.errors import JournalError, RefusedError
from edge_agent.explaining import explain
from edge_agent.home import AgentHome
from edge_agent.journal import Journal, Membership, SentItem
from edge_agent.member import OwnersPart
from edge_agent.own_part import chosen_lora
from edge_agent.private import require_owners_epsilon
from edge_agent.release_parts import round_n_bytes
from edge_agent.transport import Outgoing, Transport
from protocol.clock import Clock
from protocol.guarantee import privacy_json
from protocol.manifest import FederationManifest
from protocol.messages import Enrolment, Revocation
from protocol.phases import AgentPhase
from protocol.problems import Advice
from protocol.signing import Invite, Signed, format_fingerprint, prove_invite, sign
from protocol.wire import sha256


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What an owner decides about; nothing has left the machine but one question to the server."""

    url: str
    federation: Signed[FederationManifest]
    invite: Invite | None
    data: str
    report: ReadReport | None
    """What reading the owner's file found; None for a data set of the hub, which is only fetched
    once the owner has agreed."""
    disclosure: Disclosure

    @property
    def manifest(self) -> FederationManifest:
        """The manifest, its checks done."""
        return self.federation.body


def look(
    url: str,
    invite: str | None,
    data: str,
    settings: AgentSettings,
    *,
    clock: Clock,
    patience_s: float,
) -> Offer:
    """Ask a server what it offers, and look at the owner's data; nothing is kept.

    Raises:
        InviteError: The invite cannot be read.
        TransportError: The server cannot be reached.
        ManifestError: The federation wants something that this version cannot honour.
        TrustError: The server is not the one of the invite, or the federation has no differential
            privacy and the owner demands it.
        DataError: The records cannot be used.
        ConfigError: The owner chose a rank or modules that the federation does not allow.
    """
    parsed = None if invite is None else Invite.parse(invite)
    source = absolute_source(data)
    from_hub = source.startswith(HUB_PREFIX)
    report = None if from_hub else read_records(source, on_malformed=settings.on_malformed)[1]
    transport = Transport(url, clock=clock, patience_s=patience_s)
    try:
        discovery = transport.discover()
        manifest = check_discovery(discovery, parsed)
        require_owners_epsilon(manifest, settings.epsilon)
        owner = OwnersPart(rank=settings.rank, left_out=settings.leave_out)
        chosen_lora(manifest.lora, owner)
        transport.use_federation(manifest)
        first = check_first_release(manifest, transport.releases(after=-1).releases)
        disclosure = disclose(
            manifest,
            server_host=transport.host,
            base_folder=settings.base,
            round_n_bytes=round_n_bytes(manifest.lora, first),
            data_from_hub=from_hub,
            own_part=owner,
        )
    finally:
        transport.close()
    if discovery.enrolment == "invite" and parsed is None:
        msg = f"{url} takes members by invite only; add --invite CODE"
        raise JournalError(msg)
    return Offer(
        url=transport.url,
        federation=discovery.federation,
        invite=parsed,
        data=source,
        report=report,
        disclosure=disclosure,
    )


def absolute_source(data: str) -> str:
    """A source of records by a name that still holds after a reboot, from any folder.

    Args:
        data: A path, or a data set of the hub as `hub:owner/name`.
    """
    path = Path(data).expanduser()
    return str(path.absolute()) if path.exists() else data  # a name of nothing is told as typed


def enrol(offer: Offer, home: AgentHome, *, clock: Clock, patience_s: float) -> None:
    """Make a key, note what the owner agreed to, and enrol.

    Raises:
        JournalError: The home belongs to another federation.
        RefusedError: The server refuses the invite.
        TransportError: It cannot be reached; `join` may be repeated.
        TrustError: Its credential does not hold.
    """
    home.create()
    lock = home.lock()
    try:
        with contextlib.closing(Journal(home.journal_path)) as journal:
            _enrol(offer, home, journal, clock=clock, patience_s=patience_s)
    finally:
        lock.release()


def _enrol(
    offer: Offer, home: AgentHome, journal: Journal, *, clock: Clock, patience_s: float
) -> None:
    before = journal.membership()
    if before is not None and not _is_the_same(before, offer.manifest):
        msg = (
            f"{home.root} belongs to the federation {before.federation.body.name!r}; use "
            "another --home, or `forget` first"
        )
        raise JournalError(msg)
    signer = home.load_or_create_signer()
    journal.join(url=offer.url, federation=offer.federation, data=offer.data, now=clock.now())
    proof = None
    if offer.invite is not None:
        proof = prove_invite(offer.invite.code, agent=signer.identity, server=offer.manifest.server)
    enrolment = Enrolment(
        federation=offer.manifest.federation,
        federation_digest=offer.manifest.digest(),
        agent=signer.identity,
        invite=proof,
    )
    transport = Transport(
        offer.url,
        clock=clock,
        signer=signer,
        on_outgoing=record_outgoing(journal, clock),
        patience_s=patience_s,
    )
    transport.use_federation(offer.manifest)
    try:
        credential = transport.enrol(sign(signer, "enrolment", enrolment).signed)
    finally:
        transport.close()
    check_credential(credential, offer.manifest, signer.identity)
    journal.set_credential(credential)


def _is_the_same(before: Membership, manifest: FederationManifest) -> bool:
    """Whether a manifest is of the federation, and under the key, that this home has pinned."""
    pinned = before.federation.body
    if before.credential is None:  # nobody joined under it, so the operator may still edit it
        return (pinned.federation, pinned.server) == (manifest.federation, manifest.server)
    return pinned == manifest


def leave(home: AgentHome, journal: Journal, *, clock: Clock, patience_s: float) -> None:
    """Revoke the membership. Noted first, so that nothing more leaves even if nobody answers.

    Raises:
        JournalError: Never joined.
        TransportError: The server could not be told; `leave` may be repeated.
    """
    member = journal.membership()
    if member is None:
        msg = "no federation was joined here"
        raise JournalError(msg)
    signer = home.load_or_create_signer()
    journal.leave(clock.now())
    transport = Transport(
        member.url,
        clock=clock,
        signer=signer,
        on_outgoing=record_outgoing(journal, clock),
        patience_s=patience_s,
    )
    transport.use_federation(member.federation.body)
    body = Revocation(federation=member.federation.body.federation, agent=signer.identity)
    try:
        transport.revoke(sign(signer, "revocation", body).signed)
    except RefusedError as error:
        if error.document.advice is not Advice.RE_ENROL:  # no longer a member is what was wanted
            raise
    finally:
        transport.close()


def record_outgoing(journal: Journal, clock: Clock) -> Callable[[Outgoing], None]:
    """What to give `Transport` so that every body that leaves is in the journal first."""

    def note(outgoing: Outgoing) -> None:
        journal.add_sent(
            SentItem(
                at=clock.now(),
                host=outgoing.host,
                what=outgoing.what,
                round=outgoing.round,
                n_bytes=len(outgoing.body),
                sha256=sha256(outgoing.body),
            )
        )

    return note


def n_accepted(journal: Journal) -> int:
    """How many updates of this agent were accepted, or revealed for in a masked cell."""
    done = {AgentPhase.UPLOADED, AgentPhase.REVEALED}
    return sum(part.phase in done and part.ended for part in journal.parts())


def describe(home: AgentHome, journal: Journal, *, clock: Clock) -> dict[str, Any]:
    """What `status` shows: membership, activity, rounds, bytes, privacy."""
    member = journal.membership()
    parts = journal.parts()
    sent = journal.sent()
    activity = journal.activity()
    newest = journal.newest_release()
    found: dict[str, Any] = {"home": str(home.root)}
    if member is None:
        return found
    manifest = member.federation.body
    found |= {
        "federation": manifest.name,
        "server": member.url,
        "server_key": format_fingerprint(manifest.server),
        "member": "left" if member.left_at else "yes",
        "data": member.data,
        "running": _is_running(activity.get("pid")),
        "paused": journal.paused(),
        "activity": activity.get("text", ""),
        "activity_age_s": round(clock.now() - float(activity["at"]), 1) if activity else None,
        "newest_release": None if newest is None else newest.number,
        "rounds_taken_part": len({part.round for part in parts}),
        "updates_accepted": n_accepted(journal),
        "last_round": f"{parts[-1].round}: {parts[-1].phase}" if parts else None,
        "bytes_sent": sum(item.n_bytes for item in sent),
        "bytes_received": journal.bytes_received(),
        "privacy": privacy_json(manifest),
        "masked": manifest.masking.mode != "off",
        "trust_model": explain(manifest).trust_model,
    }
    return found


def _is_running(pid: str | float | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError):
        return False
    return True

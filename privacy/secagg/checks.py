"""What an agent holds a cell against: checks 1 to 6 and 9 to 12 of PROTOCOL, pure."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TypeVar

from privacy.secagg import cells, derive
from privacy.secagg.cells import CellView
from protocol.blocks import CellMasking
from protocol.checks import Check, CheckError
from protocol.errors import SignatureError
from protocol.masked import (
    Bundle,
    Confirmed,
    Failed,
    MaskedHeader,
    Ready,
    ReadyList,
    Roster,
    SharesHeader,
    Survivors,
)
from protocol.signing import BodyT, Signed, verify, verify_bytes
from protocol.wire import b64u_encode, sha256

ServerT = TypeVar("ServerT", ReadyList, Roster, Failed)
MemberT = TypeVar("MemberT", SharesHeader, MaskedHeader)


@dataclass(frozen=True, kw_only=True)
class CellPolicy:
    """What an agent holds a cell against: from the manifests it verified, and from its owner."""

    federation: bytes
    round: int
    round_digest: bytes
    server: bytes
    registrar: bytes
    masking: CellMasking
    body_n_bytes: int
    """Size of a masked update."""
    min_members: int
    """Smallest cell that the owner accepts; at least the manifest's `min_cell`."""
    friends: frozenset[bytes] = field(default_factory=frozenset)
    """Identities that the owner pinned."""
    min_friends: int = 0
    """How many of them must be in the cell."""


def check_roster(
    ready_list: Signed[ReadyList],
    signed: Signed[Roster],
    *,
    policy: CellPolicy,
    ready: Signed[Ready],
) -> CellView:
    """Check a cell before anything is shared in it.

    Each document is hashed once: its hash is what was signed, what the list names, and T.

    Args:
        ready_list: From which the cell was drawn.
        signed: The cell.
        policy: What it is held against.
        ready: What the agent signed itself.

    Returns:
        The cell, its checks done.

    Raises:
        CheckError: Checks 1 to 6, or 9.
    """
    listed, roster = ready_list.body, signed.body
    list_digest, cell = listed.digest(), CellView(roster)
    _check_signed(ready_list, policy.server, list_digest, Check.FOREIGN_SIGNATURE)
    _check_signed(signed, policy.server, cell.transcript, Check.FOREIGN_SIGNATURE)
    expected = (policy.federation, policy.round, policy.round_digest)
    for body in (listed, roster):
        if (body.federation, body.round, body.round_digest) != expected:
            found = "A cell of another round or manifest was offered."
            raise CheckError(Check.STALE_MANIFEST, found)
    _check_size(roster, policy)
    _check_distinct(listed, roster)
    _check_own_entry(listed, roster, ready)
    digests = {
        member.body.agent: _check_member(member, policy, formed_at=roster.formed_at)
        for member in roster.members
    }
    drawn = cells.assign(listed, policy.masking.cell_target)
    mine = drawn[roster.cell] if roster.cell < len(drawn) else ()
    named = dict(listed.entries)
    if (
        roster.list_digest != list_digest
        or roster.identities() != mine
        or any(named[agent] != digest for agent, digest in digests.items())
    ):
        found = "The list of ready agents does not yield this cell."
        raise CheckError(Check.WRONG_ASSIGNMENT, found)
    n_friends = len(policy.friends.intersection(roster.identities()))
    if n_friends < policy.min_friends:
        found = f"{n_friends} are; you ask for {policy.min_friends}."
        raise CheckError(Check.TOO_FEW_FRIENDS, found)
    return cell


def _check_size(roster: Roster, policy: CellPolicy) -> None:
    n_members = len(roster.members)
    if n_members < policy.min_members:
        found = f"The cell has {n_members} members; at least {policy.min_members} are agreed."
        raise CheckError(Check.SMALL_CELL, found)
    if n_members > policy.masking.max_cell:
        found = f"It has {n_members} members; at most {policy.masking.max_cell} are agreed."
        raise CheckError(Check.LARGE_CELL, found)
    colluders = cells.colluders(n_members, wanted=policy.masking.colluders)
    threshold = cells.threshold(n_members, colluders)
    if (roster.threshold, roster.colluders) != (threshold, colluders):
        found = (
            f"It says t = {roster.threshold}, c = {roster.colluders}; the rule gives "
            f"t = {threshold}, c = {colluders} for {n_members} members."
        )
        raise CheckError(Check.WRONG_THRESHOLD, found)


def _check_own_entry(listed: ReadyList, roster: Roster, ready: Signed[Ready]) -> None:
    own = [member for member in roster.members if member.body.agent == ready.body.agent]
    if own != [ready]:
        found = "Your READY is not in the cell as you signed it."
        raise CheckError(Check.EDITED_ENTRY, found)
    if (ready.body.agent, ready.body.digest()) not in listed.entries:
        found = "Your READY is not in the list as you signed it."
        raise CheckError(Check.EDITED_ENTRY, found)


def _check_member(signed: Signed[Ready], policy: CellPolicy, *, formed_at: int) -> bytes:
    """Check one READY; its digest."""
    body = signed.body
    name = b64u_encode(body.agent)[:12]
    digest = body.digest()
    _check_signed(signed, body.agent, digest, Check.FOREIGN_ENTRY)
    if (body.federation, body.round) != (policy.federation, policy.round):
        found = f"Member {name} speaks of another round."
        raise CheckError(Check.FOREIGN_ENTRY, found)
    if body.round_digest != policy.round_digest:
        found = f"Member {name} was given another manifest of this round than you."
        raise CheckError(Check.OTHER_ADAPTER, found)
    _check_credential(body, name, policy, formed_at=formed_at)
    if body.expires_at < formed_at:
        raise CheckError(Check.EXPIRED_READY, f"Member {name}'s had.")
    if not keys_are_sound(body):
        raise CheckError(Check.WEAK_KEY, f"Member {name}'s is.")
    return digest


def _check_signed(signed: Signed[BodyT], key: bytes, message: bytes, check: Check) -> None:
    """As `signing.verify`, for a document whose hash is at hand."""
    try:
        verify_bytes(key, signed.signature, message)
    except SignatureError as error:
        raise CheckError(check, f"{error}.") from error
    if signed.key != key:
        raise CheckError(check, "A document names another key than the one that signed it.")


def keys_are_sound(ready: Ready) -> bool:
    """Whether both keys of a READY are canonical and not of low order."""
    return all(
        derive.is_canonical_key(key) and not derive.is_low_order(key)
        for key in (ready.sealing_key, ready.masking_key)
    )


def _check_credential(body: Ready, name: str, policy: CellPolicy, *, formed_at: int) -> None:
    try:
        credential = verify(body.credential, "credential", key=policy.registrar).body
    except SignatureError as error:
        raise CheckError(Check.BAD_CREDENTIAL, f"Member {name}: {error}.") from error
    if (credential.agent, credential.federation) != (body.agent, body.federation):
        found = f"Member {name} shows another agent's, or another federation's."
        raise CheckError(Check.BAD_CREDENTIAL, found)
    if credential.expires_at < formed_at:
        raise CheckError(Check.BAD_CREDENTIAL, f"Member {name}'s has expired.")


def check_bundle(bundle: Bundle, cell: CellView, *, own: Signed[SharesHeader]) -> None:
    """Check who shared, before anything is opened.

    Args:
        bundle: What the server sent.
        cell: The cell that the agent accepted.
        own: The header that the agent signed itself.

    Raises:
        CheckError: Check 10.
    """
    transcript, me = cell.transcript, own.body.agent
    members = cell.readies.keys()
    dealers = [header.body.agent for header in bundle.headers]
    if bundle.transcript != transcript:
        raise CheckError(Check.BAD_BUNDLE, "It is of another cell.")
    if not derive.are_sorted(bundle.entries()) or not members >= set(dealers):
        raise CheckError(Check.BAD_BUNDLE, "Its dealers are not members, each once.")
    mine = [header for header in bundle.headers if header.body.agent == me]
    if mine != [own]:
        raise CheckError(Check.BAD_BUNDLE, "Your own shares are not in it as you signed them.")
    if len(dealers) < cell.threshold:
        found = f"{len(dealers)} members shared; at least {cell.threshold} must."
        raise CheckError(Check.BAD_BUNDLE, found)
    if len(bundle.ciphertexts) != len(dealers) - 1:
        raise CheckError(Check.BAD_BUNDLE, "Ciphertexts are missing, or too many.")
    others = len(cell.readies) - 1
    ciphertexts = iter(bundle.ciphertexts)
    for header in bundle.headers:
        body = header.body
        check_member_signature(header, "shares", Check.BAD_BUNDLE)
        lengths = {len(body.ciphertexts), len(body.self_shares), len(body.mask_shares)}
        if body.transcript != transcript or lengths != {others}:
            raise CheckError(Check.BAD_BUNDLE, "A dealer's header is of another cell.")
        if body.agent == me:
            continue
        # This blames the server or the way here, never the dealer, who signed another digest.
        if sha256(next(ciphertexts)) != body.ciphertexts[cell.place(body.agent, me)]:
            raise CheckError(Check.BAD_BUNDLE, "A ciphertext is not the one that was signed.")


def check_survivors(
    survivors: Survivors,
    cell: CellView,
    *,
    shared: AbstractSet[bytes],
    bundle: bytes,
    own: Signed[MaskedHeader],
) -> None:
    """Check who survived, before it is confirmed.

    Args:
        survivors: What the server sent.
        cell: The cell that the agent accepted.
        shared: The members of U2.
        bundle: T2.
        own: The header that the agent signed itself.

    Raises:
        CheckError: Check 11.
    """
    alive = [header.body.agent for header in survivors.headers]
    if survivors.transcript != cell.transcript:
        raise CheckError(Check.BAD_SURVIVORS, "It is of another cell.")
    if not derive.are_sorted(survivors.entries()) or not shared >= set(alive):
        raise CheckError(Check.BAD_SURVIVORS, "It names others than those who shared.")
    mine = [head for head in survivors.headers if head.body.agent == own.body.agent]
    if mine != [own]:
        raise CheckError(Check.BAD_SURVIVORS, "Your upload is not in it as you signed it.")
    if len(alive) < cell.threshold:
        found = f"It has {len(alive)} members; at least {cell.threshold} must survive."
        raise CheckError(Check.BAD_SURVIVORS, found)
    for header in survivors.headers:
        check_member_signature(header, "masked-upload", Check.BAD_SURVIVORS)
        body = header.body
        if (body.transcript, body.bundle) != (cell.transcript, bundle):
            raise CheckError(Check.BAD_SURVIVORS, "An upload was masked for other members.")
        if body.body_n_bytes != own.body.body_n_bytes:
            raise CheckError(Check.BAD_SURVIVORS, "An upload has another size.")


def check_server_signature(signed: Signed[ServerT], name: str, key: bytes) -> None:
    """Check a document of the server under its pinned key.

    Raises:
        CheckError: Check 1.
    """
    try:
        verify(signed, name, key=key)
    except SignatureError as error:
        raise CheckError(Check.FOREIGN_SIGNATURE, f"{error}.") from error


def check_member_signature(signed: Signed[MemberT], name: str, check: Check) -> None:
    """Check a member's document under the key that it names.

    Raises:
        CheckError: `check`.
    """
    try:
        verify(signed, name, key=signed.body.agent)
    except SignatureError as error:
        raise CheckError(check, f"{error}.") from error


def _check_distinct(listed: ReadyList, roster: Roster) -> None:
    if not derive.are_sorted(listed.entries):
        raise CheckError(Check.DUPLICATE_MEMBER, "The list of ready agents is not in order.")
    identities = roster.identities()
    if list(identities) != sorted(set(identities)):
        raise CheckError(Check.DUPLICATE_MEMBER, "The members are not in order, each once.")
    keys = [
        key
        for member in roster.members
        for key in (member.body.sealing_key, member.body.masking_key)
    ]
    for member in roster.members:
        if member.body.sealing_key == member.body.masking_key:
            name = b64u_encode(member.body.agent)[:12]
            raise CheckError(Check.KEY_REUSE, f"Member {name} does so.")
    if len(set(keys)) != len(keys):
        raise CheckError(Check.DUPLICATE_MEMBER, "Two members show the same key.")


def confirmers(confirmed: Confirmed, alive: AbstractSet[bytes], message: bytes) -> set[bytes]:
    """The survivors whose signature over H("confirm", T2, U3) holds (check 12).

    Args:
        confirmed: What the server sent.
        alive: The members of U3.
        message: H("confirm", T2, U3).
    """
    agreed = set()
    for confirm in confirmed.confirmations:
        if confirm.agent not in alive or confirm.transcript != confirmed.transcript:
            continue
        try:
            verify_bytes(confirm.agent, confirm.signature, message)
        except SignatureError:
            continue
        agreed.add(confirm.agent)
    return agreed

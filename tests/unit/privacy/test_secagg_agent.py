"""What an agent refuses: each test is named after the attack that the check stops.

The fixture `refused` demands more than the error: nothing was signed, no secret number was drawn,
and the state, which is all that a caller sends from, is what it was.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from rich.pretty import pretty_repr

from privacy.secagg import agent as agent_module
from privacy.secagg import checks as checks_module
from privacy.secagg import derive
from privacy.secagg.agent import AttemptState, SecAggAgent
from privacy.secagg.derive import ShareKind
from protocol.checks import Check, CheckError
from protocol.masked import MISSING_SHARE, Bundle, Confirmed, Survivors
from protocol.phases import AgentPhase
from protocol.signing import Signed, sign
from protocol.wire import parse, sha256

LOW_ORDER = [
    bytes(32),
    b"\1" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),
]
NOT_CANONICAL = [
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
    (2**255 - 1).to_bytes(32, "little"),
    (2**255 + 9).to_bytes(32, "little"),
    b"\xff" * 32,
]


def join(agent: SecAggAgent, offer: Any) -> Callable[[], object]:
    return lambda: agent.receive_roster(*offer)


def test_an_honest_cell_is_joined(make_cell: Any) -> None:
    cell = make_cell(5)
    for agent in cell.agents:
        agent.receive_roster(cell.listed, cell.roster)
        assert agent.state.phase is AgentPhase.SHARED
        assert agent.transcript == cell.roster.body.transcript()


# ROSTER: signatures and the round


@pytest.mark.parametrize("forged", ["list_key", "roster_key"])
def test_a_document_of_another_server(
    forged: str, make_cell: Any, make_key: Any, refused: Any
) -> None:
    cell = make_cell(5)
    offer = cell.offer(**{forged: make_key("another server")})
    refused(cell.agents[0], Check.FOREIGN_SIGNATURE, join(cell.agents[0], offer))


@pytest.mark.parametrize("edited", [0, 1])
def test_a_document_edited_on_the_way(edited: int, make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    offer = list(cell.offer())
    body = offer[edited].body.model_copy(update={"round": 4})
    offer[edited] = offer[edited].model_copy(update={"body": body})
    refused(cell.agents[0], Check.FOREIGN_SIGNATURE, join(cell.agents[0], offer))


def test_a_list_passed_off_as_a_roster(make_cell: Any, refused: Any) -> None:
    # A signature for one kind of document never holds for another.
    cell = make_cell(5)
    roster = cell.roster.body
    offer = (cell.listed, sign(cell.key, "ready-list", roster).signed)
    refused(cell.agents[0], Check.FOREIGN_SIGNATURE, join(cell.agents[0], offer))


@pytest.mark.parametrize("document", ["listed", "roster"])
@pytest.mark.parametrize(
    "change", [{"round": 2}, {"federation": bytes(16)}, {"round_digest": bytes(32)}], ids=str
)
def test_a_manifest_of_another_round(
    document: str, change: dict[str, Any], make_cell: Any, refused: Any
) -> None:
    cell = make_cell(5)
    offer = cell.offer(**{document: change})
    refused(cell.agents[0], Check.STALE_MANIFEST, join(cell.agents[0], offer))


# ROSTER: size and threshold


@pytest.mark.parametrize("n_members", [1, 2, 3, 4])
def test_a_roster_of_four_or_fewer(n_members: int, make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    offer = cell.offer(cell.readies[:n_members], roster={"threshold": 1, "colluders": 1})
    refused(cell.agents[0], Check.SMALL_CELL, join(cell.agents[0], offer))


def test_a_roster_smaller_than_the_owner_accepts(make_cell: Any, refused: Any) -> None:
    cell = make_cell(7, min_members=8)
    refused(cell.agents[0], Check.SMALL_CELL, join(cell.agents[0], cell.offer()))


def test_a_roster_so_large_that_sums_could_wrap(make_cell: Any, refused: Any) -> None:
    cell = make_cell(10)
    cell.policy = dataclasses.replace(
        cell.policy, masking=cell.masking.model_copy(update={"max_cell": 9})
    )
    agent = cell.begin(cell.agents[0]._signer, seed="0, 0")
    refused(agent, Check.LARGE_CELL, join(agent, cell.offer()))


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 1},
        {"threshold": 3},
        {"threshold": 5},
        {"colluders": 2},
        {"threshold": 3, "colluders": 1},
        {"threshold": 4, "colluders": 3},
    ],
    ids=str,
)
def test_a_threshold_other_than_the_rules(
    change: dict[str, int], make_cell: Any, refused: Any
) -> None:
    cell = make_cell(5)
    refused(cell.agents[0], Check.WRONG_THRESHOLD, join(cell.agents[0], cell.offer(roster=change)))


def test_a_threshold_of_one(make_cell: Any, refused: Any) -> None:
    cell = make_cell(12)
    offer = cell.offer(roster={"threshold": 1, "colluders": 1})
    refused(cell.agents[0], Check.WRONG_THRESHOLD, join(cell.agents[0], offer))


def test_fewer_colluders_than_the_manifest_wants(make_cell: Any, refused: Any) -> None:
    cell = make_cell(12, colluders=6)
    assert (cell.roster.body.threshold, cell.roster.body.colluders) == (10, 6)
    offer = cell.offer(roster={"threshold": 8, "colluders": 2})
    refused(cell.agents[0], Check.WRONG_THRESHOLD, join(cell.agents[0], offer))


# ROSTER: members and keys


def test_one_member_twice(make_cell: Any, refused: Any) -> None:
    cell = make_cell(6)
    readies = cell.readies
    other = cell.ready(5, attempt=2, nonce=bytes(32))
    for twice in (readies[5], other):
        offer = cell.offer([*readies, twice], listed={"entries": cell.listed.body.entries})
        refused(cell.agents[0], Check.DUPLICATE_MEMBER, join(cell.agents[0], offer))


def test_one_identity_twice_in_the_list(make_cell: Any, refused: Any) -> None:
    # Two entries of one member would give it two ranks in the draw.
    cell = make_cell(5)
    agent = cell.agents[0]
    entries = cell.listed.body.entries
    for changed in (
        (*entries, entries[-1]),
        tuple(sorted((*entries, (entries[0][0], bytes(32))))),
        entries[::-1],
    ):
        offer = cell.offer(listed={"entries": changed})
        refused(agent, Check.DUPLICATE_MEMBER, join(agent, offer))


def test_members_out_of_order(make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    offer = cell.offer(cell.readies[::-1])
    refused(cell.agents[0], Check.DUPLICATE_MEMBER, join(cell.agents[0], offer))


@pytest.mark.parametrize("own", ["sealing_key", "masking_key"])
@pytest.mark.parametrize("other", ["sealing_key", "masking_key"])
def test_two_members_with_one_key(own: str, other: str, make_cell: Any, refused: Any) -> None:
    # Two members with one masking key would subtract what they add, and be one.
    cell = make_cell(5)
    key = getattr(cell.readies[3].body, other)
    offer = cell.offer(cell.with_ready(2, **{own: key}))
    refused(cell.agents[0], Check.DUPLICATE_MEMBER, join(cell.agents[0], offer))


def test_the_agents_own_key_shown_by_another(make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    key = cell.readies[0].body.masking_key
    offer = cell.offer(cell.with_ready(2, masking_key=key))
    refused(cell.agents[0], Check.DUPLICATE_MEMBER, join(cell.agents[0], offer))


def test_one_key_for_sealing_and_masking(make_cell: Any, refused: Any) -> None:
    # The masking key may be disclosed, and would open what was sealed.
    cell = make_cell(5)
    offer = cell.offer(cell.with_ready(2, sealing_key=cell.readies[2].body.masking_key))
    refused(cell.agents[0], Check.KEY_REUSE, join(cell.agents[0], offer))


@pytest.mark.parametrize("which", ["sealing_key", "masking_key"])
@pytest.mark.parametrize("key", LOW_ORDER, ids=bytes.hex)
def test_a_key_that_anybody_could_use(key: bytes, which: str, make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    offer = cell.offer(cell.with_ready(4, **{which: key}))
    refused(cell.agents[0], Check.WEAK_KEY, join(cell.agents[0], offer))


@pytest.mark.parametrize("which", ["sealing_key", "masking_key"])
@pytest.mark.parametrize("key", NOT_CANONICAL, ids=bytes.hex)
def test_a_key_in_a_second_form(key: bytes, which: str, make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    offer = cell.offer(cell.with_ready(4, **{which: key}))
    refused(cell.agents[0], Check.WEAK_KEY, join(cell.agents[0], offer))


def test_the_agents_own_key_in_a_second_form(make_cell: Any, refused: Any) -> None:
    # With its high bit set it is the same point, and differs from it as bytes.
    cell = make_cell(5)
    own = bytearray(cell.readies[0].body.masking_key)
    own[31] |= 0x80
    offer = cell.offer(cell.with_ready(2, masking_key=bytes(own)))
    refused(cell.agents[0], Check.WEAK_KEY, join(cell.agents[0], offer))


def test_every_key_of_low_order_is_known() -> None:
    # Independent of the list: such a key gives everyone the secret zero, which the library refuses.
    assert frozenset(LOW_ORDER) == derive._LOW_ORDER
    private = bytes(range(32))
    for key in LOW_ORDER:
        assert derive.is_canonical_key(key)
        with pytest.raises(ValueError, match="shared key"):
            derive.agree(private, key)
    for key in NOT_CANONICAL:
        assert not derive.is_canonical_key(key)
        with pytest.raises(ValueError, match="not canonical"):
            derive.agree(private, key)
    assert not derive.is_low_order(b"\x09" + bytes(31))


# ROSTER: entries


def test_the_agents_own_entry_edited(make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    agent = cell.agents[2]
    for change in ({"attempt": 2}, {"nonce": bytes(32)}, {"expires_at": 1_900_000_000}):
        readies = cell.readies
        edited = readies[2].body.model_copy(update=change)
        readies[2] = readies[2].model_copy(update={"body": edited})
        refused(agent, Check.EDITED_ENTRY, join(agent, cell.offer(readies)))


def test_another_ready_that_the_agent_signed_itself(make_cell: Any, refused: Any) -> None:
    # An earlier attempt's: its keys are those of a transcript that is over.
    cell = make_cell(5)
    earlier = cell.begin(cell.agents[2]._signer, seed="earlier").state.ready
    readies = cell.readies
    readies[2] = earlier
    refused(cell.agents[2], Check.EDITED_ENTRY, join(cell.agents[2], cell.offer(readies)))


def test_a_cell_without_the_agent(make_cell: Any, refused: Any) -> None:
    cell = make_cell(6)
    offer = cell.offer(cell.readies[1:])
    refused(cell.agents[0], Check.EDITED_ENTRY, join(cell.agents[0], offer))


@pytest.mark.parametrize("digest", [None, bytes(32)], ids=["absent", "other"])
def test_a_list_without_the_agent(digest: bytes | None, make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    first, *rest = cell.listed.body.entries
    entries = tuple(rest) if digest is None else ((first[0], digest), *rest)
    offer = cell.offer(listed={"entries": entries})
    refused(cell.agents[0], Check.EDITED_ENTRY, join(cell.agents[0], offer))


def test_a_member_who_did_not_sign(make_cell: Any, make_key: Any, refused: Any) -> None:
    # A member that the server invented: it cannot sign under the identity that it shows.
    cell = make_cell(5)
    readies = cell.readies
    forged = sign(make_key("a forger"), "ready", readies[3].body).signed
    for ready in (
        forged,
        forged.model_copy(update={"key": readies[3].body.agent}),
        readies[3].model_copy(update={"body": cell.ready(3, nonce=bytes(32)).body}),
        readies[3].model_copy(update={"signature": readies[4].signature}),
    ):
        readies[3] = ready
        refused(cell.agents[0], Check.FOREIGN_ENTRY, join(cell.agents[0], cell.offer(readies)))


def test_a_member_whose_identity_anybody_can_sign_under(make_cell: Any, refused: Any) -> None:
    # Under a key of small order the signature (identity point, 0) holds for many messages.
    cell = make_cell(5)
    weak = b"\1" + bytes(31)
    body = cell.readies[4].body.model_copy(
        update={"agent": weak, "credential": cell.credential(weak)}
    )
    forged = Signed(body=body, key=weak, signature=weak + bytes(32))
    offer = cell.offer(sorted([*cell.readies[:4], forged], key=lambda ready: ready.body.agent))
    refused(cell.agents[0], Check.FOREIGN_ENTRY, join(cell.agents[0], offer))


@pytest.mark.parametrize("change", [{"round": 2}, {"federation": bytes(16)}], ids=str)
def test_a_members_ready_of_another_round(
    change: dict[str, Any], make_cell: Any, refused: Any
) -> None:
    cell = make_cell(5)
    offer = cell.offer(cell.with_ready(3, **change))
    refused(cell.agents[0], Check.FOREIGN_ENTRY, join(cell.agents[0], offer))


def test_two_adapters_in_one_round(make_cell: Any, refused: Any) -> None:
    # Member 3 signed what it was given: another manifest, with an adapter of its own.
    cell = make_cell(5)
    offer = cell.offer(cell.with_ready(3, round_digest=sha256(b"another manifest")))
    refused(cell.agents[0], Check.OTHER_ADAPTER, join(cell.agents[0], offer))


def test_a_credential_of_another_registrar(make_cell: Any, refused: Any) -> None:
    # The server does not mint members.
    cell = make_cell(5)
    minted = cell.credential(cell.ids[3], signer=cell.key)
    offer = cell.offer(cell.with_ready(3, credential=minted))
    refused(cell.agents[0], Check.BAD_CREDENTIAL, join(cell.agents[0], offer))


def test_an_edited_credential(make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    good = cell.readies[3].body.credential
    body = good.body.model_copy(update={"expires_at": good.body.expires_at + 1_000_000})
    offer = cell.offer(cell.with_ready(3, credential=good.model_copy(update={"body": body})))
    refused(cell.agents[0], Check.BAD_CREDENTIAL, join(cell.agents[0], offer))


def test_a_borrowed_credential(make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    offer = cell.offer(cell.with_ready(3, credential=cell.credential(cell.ids[4])))
    refused(cell.agents[0], Check.BAD_CREDENTIAL, join(cell.agents[0], offer))


def test_a_credential_of_another_federation(make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    foreign = cell.credential(cell.ids[3], federation=bytes(16))
    offer = cell.offer(cell.with_ready(3, credential=foreign))
    refused(cell.agents[0], Check.BAD_CREDENTIAL, join(cell.agents[0], offer))


def test_an_expired_credential(make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    formed_at = cell.roster.body.formed_at
    over = cell.credential(cell.ids[3], expires_at=formed_at - 1)
    offer = cell.offer(cell.with_ready(3, credential=over))
    refused(cell.agents[0], Check.BAD_CREDENTIAL, join(cell.agents[0], offer))


def test_an_expired_ready(make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    formed_at = cell.roster.body.formed_at
    offer = cell.offer(cell.with_ready(3, expires_at=formed_at - 1))
    refused(cell.agents[0], Check.EXPIRED_READY, join(cell.agents[0], offer))


def test_what_expires_as_the_cell_is_formed_still_holds(make_cell: Any) -> None:
    cell = make_cell(5)
    formed_at = cell.roster.body.formed_at
    last = cell.credential(cell.ids[3], expires_at=formed_at)
    readies = cell.with_ready(3, expires_at=formed_at, credential=last)
    cell.agents[0].receive_roster(*cell.offer(readies))


def test_a_stale_ready_in_a_cell_formed_later(make_cell: Any, refused: Any) -> None:
    # The server keeps a READY for a day and uses it then; also the agent's own.
    cell = make_cell(5)
    offer = cell.offer(roster={"formed_at": cell.roster.body.formed_at + 24 * 3600})
    refused(cell.agents[0], Check.EXPIRED_READY, join(cell.agents[0], offer))


# ROSTER: the draw


def test_members_whom_the_server_chose(make_cell: Any, refused: Any) -> None:
    # Ten are ready; the draw gives the agent four mates, the server wants another one among them.
    cell = make_cell(10, target=5)
    agent = cell.agents[0]
    stranger = next(other for other in cell.everyone if other not in cell.agents)
    chosen = [agent, *cell.agents[2:], stranger]
    readies = sorted((one.state.ready for one in chosen), key=lambda ready: ready.body.agent)
    offer = cell.offer(readies, listed={"entries": cell.listed.body.entries})
    refused(agent, Check.WRONG_ASSIGNMENT, join(agent, offer))


@pytest.mark.parametrize("number", [1, 2, 1000])
def test_a_cell_of_another_number(number: int, make_cell: Any, refused: Any) -> None:
    cell = make_cell(10, target=5)
    offer = cell.offer(roster={"cell": number})
    refused(cell.agents[0], Check.WRONG_ASSIGNMENT, join(cell.agents[0], offer))


def test_a_cell_that_leaves_ready_agents_out(make_cell: Any, refused: Any) -> None:
    # Nine are in the list and make one cell; the roster has seven of them.
    cell = make_cell(9, target=5)
    offer = cell.offer(cell.readies[:7], listed={"entries": cell.listed.body.entries})
    refused(cell.agents[0], Check.WRONG_ASSIGNMENT, join(cell.agents[0], offer))


def test_a_list_that_came_after_the_roster(make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    for change in ({"wave": 2}, {"beacon": bytes(32)}):
        listed = cell.offer(listed=change)[0]
        refused(cell.agents[0], Check.WRONG_ASSIGNMENT, join(cell.agents[0], (listed, cell.roster)))


def test_a_beacon_that_the_server_tried_again(make_cell: Any, refused: Any) -> None:
    # The roster names the list with the new beacon, and has the members that the old one drew.
    cell = make_cell(10, target=5, beacon=bytes(32))
    for i in range(1, 5):
        offer = cell.offer(listed={"beacon": bytes([i]) * 32})
        refused(cell.agents[0], Check.WRONG_ASSIGNMENT, join(cell.agents[0], offer))


def test_a_members_ready_other_than_the_list_has_it(make_cell: Any, refused: Any) -> None:
    # The member signed both; the list was made with the first, the draw knew nothing of the second.
    cell = make_cell(5)
    offer = cell.offer(
        cell.with_ready(3, nonce=bytes(32)), listed={"entries": cell.listed.body.entries}
    )
    refused(cell.agents[0], Check.WRONG_ASSIGNMENT, join(cell.agents[0], offer))


def test_a_cell_without_the_friends_of_the_owner(make_cell: Any, refused: Any) -> None:
    cell = make_cell(6)
    friends = frozenset([cell.ids[3], cell.ids[4], bytes(32)])
    for at_least, enough in ((2, True), (3, False)):
        cell.policy = dataclasses.replace(cell.policy, friends=friends, min_friends=at_least)
        agent = SecAggAgent(
            cell.agents[0]._signer,
            cell.policy,
            cell.agents[0].state,
            entropy=cell.agents[0]._entropy,
        )
        if enough:
            agent.receive_roster(cell.listed, cell.roster)
        else:
            refused(agent, Check.TOO_FEW_FRIENDS, join(agent, cell.offer()))


# ROSTER: once


def test_one_ready_in_two_rosters(make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    agent = cell.agents[0]
    shares = agent.receive_roster(cell.listed, cell.roster)
    other = cell.offer(roster={"formed_at": cell.roster.body.formed_at + 1})
    refused(agent, Check.SPENT_READY, join(agent, other))
    assert agent.receive_roster(cell.listed, cell.roster) == shares


def test_the_same_roster_signed_again_is_another_one(make_cell: Any, refused: Any) -> None:
    cell = make_cell(5)
    agent = cell.agents[0]
    agent.receive_roster(cell.listed, cell.roster)
    resigned = cell.roster.model_copy(update={"signature": bytes(64)})
    refused(agent, Check.SPENT_READY, join(agent, (cell.listed, resigned)))


def test_a_roster_after_a_refused_one_is_taken(make_cell: Any, refused: Any) -> None:
    # A refused ROSTER spends nothing.
    cell = make_cell(5)
    agent = cell.agents[0]
    refused(agent, Check.WRONG_THRESHOLD, join(agent, cell.offer(roster={"threshold": 1})))
    agent.receive_roster(cell.listed, cell.roster)


# SHARES


def test_shares_open_to_their_receivers_alone(make_cell: Any) -> None:
    cell = make_cell(5)
    shares = cell.agents[1].receive_roster(cell.listed, cell.roster)
    transcript = cell.roster.body.transcript()
    public = cell.readies[1].body.sealing_key
    for j, agent in enumerate(cell.agents):
        secret = derive.agree(agent.state.sealing_private_key, public)
        for i, ciphertext in enumerate(shares.ciphertexts):
            place = i if i < 1 else i + 1
            opens = {"transcript": transcript, "sender": cell.ids[1], "receiver": cell.ids[j]}
            if place == j:
                of_self, of_mask = derive.open_shares(secret, ciphertext, **opens)
                assert of_self not in shares.canonical()
                assert of_mask != of_self
                header = shares.header.body
                for kind, share, digests in (
                    (ShareKind.SELF, of_self, header.self_shares),
                    (ShareKind.MASK, of_mask, header.mask_shares),
                ):
                    digest = derive.share_digest(transcript, cell.ids[1], cell.ids[j], kind, share)
                    assert digest == digests[i]
            else:
                with pytest.raises(derive.ShareError):
                    derive.open_shares(secret, ciphertext, **opens)


def test_each_attempt_has_keys_of_its_own(make_cell: Any) -> None:
    # Check 8: nothing of one attempt serves in another.
    cell = make_cell(5)
    first = cell.agents[0].state
    second = SecAggAgent.begin(
        cell.agents[0]._signer,
        cell.policy,
        credential=first.ready.body.credential,
        attempt=2,
        expires_at=1_900_000_000,
    ).state
    secrets = [
        value
        for state in (first, second)
        for value in (
            state.sealing_private_key,
            state.masking_private_key,
            state.self_seed,
            state.ready.body.nonce,
        )
    ]
    assert len(set(secrets)) == 8
    for state in (first, second):
        for private, public in (
            (state.sealing_private_key, state.ready.body.sealing_key),
            (state.masking_private_key, state.ready.body.masking_key),
        ):
            key = X25519PrivateKey.from_private_bytes(private).public_key()
            assert key.public_bytes_raw() == public


def test_the_messages_of_a_cell_have_one_size(make_cell: Any) -> None:
    # Check 16: nothing is told by how long a message is.
    cell = make_cell(6).up_to("reveal", gone=[3])
    for name in ("ready", "shares", "upload", "confirm", "reveal"):
        messages = [getattr(agent.state, name) for agent in cell.agents]
        assert len({len(message.canonical()) for message in messages if message is not None}) == 1
        assert messages.count(None) == (name in {"upload", "confirm", "reveal"})


def test_the_ready_messages_of_who_enrolled_at_different_moments_have_one_size(
    make_cell: Any,
) -> None:
    cell = make_cell(6)
    formed_at = cell.roster.body.formed_at
    sizes = set()
    for i, left_s in enumerate((1, 100, 12_345, 10**6, 10**8, 10**9)):
        credential = cell.credential(cell.ids[i], expires_at=formed_at + left_s)
        sizes.add(len(cell.ready(i, credential=credential).canonical()))
    assert len(sizes) == 1


# BUNDLE


@pytest.fixture
def shared(make_cell: Any) -> Any:
    """Six members have shared, all of them; t is 4."""
    return make_cell(6).up_to("close-sharing")


def give(agent: SecAggAgent, bundle: Bundle) -> Callable[[], object]:
    return lambda: agent.receive_bundle(bundle)


def without(bundle: Bundle, cell: Any, receiver: int, dealers: set[int]) -> Bundle:
    """The bundle as it were had these dealers not shared."""
    kept = [i for i in range(len(cell.agents)) if i not in dealers]
    by_dealer = dict(
        zip([i for i in range(len(cell.agents)) if i != receiver], bundle.ciphertexts, strict=True)
    )
    return Bundle(
        transcript=bundle.transcript,
        headers=tuple(bundle.headers[i] for i in kept),
        ciphertexts=tuple(by_dealer[i] for i in kept if i != receiver),
    )


def replaced(bundle: Bundle, i: int, header: Any) -> Bundle:
    headers = list(bundle.headers)
    headers[i] = header
    return bundle.model_copy(update={"headers": tuple(headers)})


def test_a_dealer_who_did_not_sign(shared: Any, make_key: Any, refused: Any) -> None:
    agent, bundle = shared.agents[0], shared.bundle(0)
    good = bundle.headers[3]
    forged = sign(make_key("a forger"), "shares", good.body).signed
    body = good.body.model_copy(update={"commitment": bytes(32)})
    for header in (
        forged,
        forged.model_copy(update={"key": good.key}),
        good.model_copy(update={"body": body}),
    ):
        refused(agent, Check.BAD_BUNDLE, give(agent, replaced(bundle, 3, header)))


def test_a_bundle_without_the_agent(shared: Any, refused: Any) -> None:
    agent, bundle = shared.agents[0], shared.bundle(0)
    headers = bundle.headers[1:]
    left_out = bundle.model_copy(update={"headers": headers, "ciphertexts": bundle.ciphertexts[1:]})
    refused(agent, Check.BAD_BUNDLE, give(agent, left_out))


def test_the_agents_own_shares_edited(shared: Any, refused: Any) -> None:
    agent, bundle = shared.agents[0], shared.bundle(0)
    other = sign(agent._signer, "shares", shared.deal(0).header.body).signed
    refused(agent, Check.BAD_BUNDLE, give(agent, replaced(bundle, 0, other)))


def test_a_bundle_of_fewer_than_t(shared: Any, refused: Any) -> None:
    agent, bundle = shared.agents[0], shared.bundle(0)
    assert shared.threshold == 4
    refused(agent, Check.BAD_BUNDLE, give(agent, without(bundle, shared, 0, {1, 2, 3})))
    plan = agent.receive_bundle(without(bundle, shared, 0, {1, 2}))
    assert len(plan.masks) == 1 + 3


def test_a_bundle_of_another_cell(shared: Any, refused: Any) -> None:
    agent, bundle = shared.agents[0], shared.bundle(0)
    other = bundle.model_copy(update={"transcript": bytes(32)})
    refused(agent, Check.BAD_BUNDLE, give(agent, other))


def test_a_dealers_shares_of_another_cell(shared: Any, refused: Any) -> None:
    # Replayed from a failed attempt, for instance: the dealer's signature holds.
    agent, bundle = shared.agents[0], shared.bundle(0)
    body = bundle.headers[3].body.model_copy(update={"transcript": bytes(32)})
    replayed = sign(shared.agents[3]._signer, "shares", body).signed
    refused(agent, Check.BAD_BUNDLE, give(agent, replaced(bundle, 3, replayed)))


@pytest.mark.parametrize(
    "dealers", [(0, 1, 2, 2), (0, 1, 2, 4, 4, 5), (0, 1, 2, 4, 3, 5), (5, 4, 3, 2, 1, 0)], ids=str
)
def test_a_dealer_twice_or_out_of_order(
    dealers: tuple[int, ...], shared: Any, refused: Any
) -> None:
    # Padding: three dealers pass for four. Each ciphertext is the one of its header.
    agent, bundle = shared.agents[0], shared.bundle(0)
    changed = Bundle(
        transcript=bundle.transcript,
        headers=tuple(bundle.headers[i] for i in dealers),
        ciphertexts=tuple(bundle.ciphertexts[i - 1] for i in dealers if i != 0),
    )
    refused(agent, Check.BAD_BUNDLE, give(agent, changed))


def test_a_dealer_from_outside_the_cell(shared: Any, make_key: Any, refused: Any) -> None:
    agent, bundle = shared.agents[0], shared.bundle(0)
    stranger = make_key("a stranger")
    body = bundle.headers[5].body.model_copy(update={"agent": stranger.identity})
    headers = [*bundle.headers[:5], sign(stranger, "shares", body).signed]
    headers.sort(key=lambda header: header.body.agent)
    changed = bundle.model_copy(update={"headers": tuple(headers)})
    refused(agent, Check.BAD_BUNDLE, give(agent, changed))


@pytest.mark.parametrize("field", ["ciphertexts", "self_shares", "mask_shares"])
@pytest.mark.parametrize("more", [-1, 1])
def test_a_header_for_more_or_fewer_members(
    more: int, field: str, shared: Any, refused: Any
) -> None:
    agent, bundle = shared.agents[0], shared.bundle(0)
    body = bundle.headers[3].body
    digests = getattr(body, field)
    changed = digests[:-1] if more < 0 else (*digests, bytes(32))
    edited = body.model_copy(update={field: changed})
    header = sign(shared.agents[3]._signer, "shares", edited).signed
    refused(agent, Check.BAD_BUNDLE, give(agent, replaced(bundle, 3, header)))


@pytest.mark.parametrize("n_ciphertexts", [0, 4, 6])
def test_ciphertexts_left_out_or_added(n_ciphertexts: int, shared: Any, refused: Any) -> None:
    agent, bundle = shared.agents[0], shared.bundle(0)
    ciphertexts = (*bundle.ciphertexts, bytes(82))[:n_ciphertexts]
    changed = bundle.model_copy(update={"ciphertexts": ciphertexts})
    refused(agent, Check.BAD_BUNDLE, give(agent, changed))


def test_a_swapped_ciphertext_blames_the_server_and_no_dealer(shared: Any, refused: Any) -> None:
    agent, bundle = shared.agents[0], shared.bundle(0)
    first, second, *rest = bundle.ciphertexts
    for ciphertexts in ((second, first, *rest), (bytes(82), second, *rest)):
        changed = bundle.model_copy(update={"ciphertexts": tuple(ciphertexts)})
        refused(agent, Check.BAD_BUNDLE, give(agent, changed))
    assert agent.state.complaints == ()
    agent.receive_bundle(bundle)
    assert agent.state.complaints == ()


def test_a_ciphertext_meant_for_another_member(shared: Any, refused: Any) -> None:
    agent, bundle = shared.agents[0], shared.bundle(0)
    for_another = shared.bundle(1).ciphertexts
    changed = bundle.model_copy(update={"ciphertexts": (bundle.ciphertexts[0], *for_another[1:])})
    refused(agent, Check.BAD_BUNDLE, give(agent, changed))


def test_a_second_other_bundle(shared: Any, refused: Any) -> None:
    # Two sets of dealers under one T would give two vectors of one update, and masks to compare.
    agent, bundle = shared.agents[0], shared.bundle(0)
    plan = agent.receive_bundle(bundle)
    fewer = without(bundle, shared, 0, {1})
    refused(agent, Check.BAD_BUNDLE, give(agent, fewer))
    again = agent.receive_bundle(bundle)
    assert again.masks == plan.masks
    assert np.array_equal(again.checks, plan.checks)


def test_a_bundle_before_a_roster(make_cell: Any, shared: Any, refused: Any) -> None:
    agent = make_cell(6).agents[0]
    refused(agent, Check.BAD_BUNDLE, give(agent, shared.bundle(0)))


@pytest.mark.parametrize("cheat", ["unopenable", "unsigned"])
def test_a_dealer_of_bad_shares_is_complained_of_and_the_attempt_goes_on(
    cheat: str, make_cell: Any
) -> None:
    cell = make_cell(6)
    cell.share_badly(3, **{cheat: {0, 1}})
    cell.share([0, 1, 2, 4, 5])
    cell.server.close_sharing()
    cell.mask()
    for i, agent in enumerate(cell.agents):
        if i not in (0, 1):
            assert agent.state.complaints == ()
            continue
        (complaint,) = agent.state.complaints
        assert complaint.body.dealer.body.agent == cell.ids[3]
        assert complaint.body.ciphertext == cell.bundle(i).ciphertexts[2]
        cell.server.check_complaint(complaint)
        given = {received.dealer: received for received in agent.state.received}
        assert given[cell.ids[3]].self_share == MISSING_SHARE
        assert given[cell.ids[3]].mask_share == MISSING_SHARE
        assert sum(one.self_share == MISSING_SHARE for one in given.values()) == 1
    cell.upload()
    cell.server.close_uploading()
    cell.confirm()
    cell.reveal()
    assert np.array_equal(cell.unmasked(), cell.plain_sum(range(6)))


def test_the_masks_of_a_cell_cancel(shared: Any) -> None:
    shared.mask()
    signs: dict[bytes, list[int]] = {}
    for plan in shared.plans.values():
        for mask in plan.masks[1:]:
            signs.setdefault(mask.seed, []).append(mask.sign)
    assert len(signs) == 15
    assert all(sorted(found) == [-1, 1] for found in signs.values())
    own = {plan.masks[0].seed for plan in shared.plans.values()}
    assert len(own - set(signs)) == 6
    assert all(plan.masks[0].sign == 1 for plan in shared.plans.values())


# UPLOAD


@pytest.fixture
def masked(shared: Any) -> Any:
    """The six have their masks."""
    shared.mask()
    return shared


def test_two_updates_under_one_transcript(masked: Any, refused: Any) -> None:
    # The difference of two vectors under one mask is the difference of what they hide.
    agent = masked.agents[0]
    header = agent.sign_upload(bytes(32))
    refused(agent, Check.SPENT_READY, lambda: agent.sign_upload(b"\1" * 32))
    assert agent.sign_upload(bytes(32)) == header
    assert header.body.bundle == masked.server.bundle_hash()


def test_an_upload_before_a_bundle(shared: Any, refused: Any) -> None:
    # Signed too early it would name no members at all, and stand in the way of the right one.
    agent = shared.agents[0]
    refused(agent, Check.BAD_BUNDLE, lambda: agent.sign_upload(bytes(32)))


def test_masks_before_a_bundle(shared: Any, refused: Any) -> None:
    refused(shared.agents[0], Check.BAD_BUNDLE, shared.agents[0].mask_plan)


def test_the_masks_do_not_change(masked: Any) -> None:
    for i, agent in enumerate(masked.agents):
        again = agent.mask_plan()
        assert again.masks == masked.plans[i].masks
        assert np.array_equal(again.checks, masked.plans[i].checks)


def test_an_upload_before_a_roster(make_cell: Any, refused: Any) -> None:
    agent = make_cell(6).agents[0]
    refused(agent, Check.BAD_BUNDLE, lambda: agent.sign_upload(bytes(32)))


# SURVIVORS


@pytest.fixture
def uploaded(masked: Any) -> Any:
    """All six have uploaded; U3 is fixed."""
    masked.upload()
    masked.server.close_uploading()
    return masked


def confirm(agent: SecAggAgent, survivors: Survivors) -> Callable[[], object]:
    return lambda: agent.receive_survivors(survivors)


def only(survivors: Survivors, *places: int) -> Survivors:
    headers = tuple(survivors.headers[i] for i in places)
    return survivors.model_copy(update={"headers": headers})


def with_header(survivors: Survivors, i: int, header: Any) -> Survivors:
    headers = list(survivors.headers)
    headers[i] = header
    return survivors.model_copy(update={"headers": tuple(headers)})


def false_header(cell: Any, i: int, **changes: Any) -> Any:
    """Member i's upload with other fields, signed by it."""
    body = cell.agents[i].state.upload.body.model_copy(update=changes)
    return sign(cell.agents[i]._signer, "masked-upload", body).signed


def test_survivors_without_the_agent(uploaded: Any, refused: Any) -> None:
    agent = uploaded.agents[0]
    left_out = only(uploaded.survivors(), 1, 2, 3, 4, 5)
    refused(agent, Check.BAD_SURVIVORS, confirm(agent, left_out))


def test_fewer_than_t_survivors(uploaded: Any, refused: Any) -> None:
    agent = uploaded.agents[0]
    refused(agent, Check.BAD_SURVIVORS, confirm(agent, only(uploaded.survivors(), 0, 1, 2)))
    agent.receive_survivors(only(uploaded.survivors(), 0, 1, 2, 3))


def test_a_survivor_who_never_shared(make_cell: Any, refused: Any) -> None:
    # Nobody masks with member 5: to the others its vector would be in clear but for its own mask.
    cell = make_cell(6)
    cell.share(range(5))
    cell.server.close_sharing()
    cell.mask(range(5))
    cell.upload(range(5))
    cell.server.close_uploading()
    survivors = cell.survivors()
    body = survivors.headers[0].body.model_copy(update={"agent": cell.ids[5]})
    stranger = sign(cell.agents[5]._signer, "masked-upload", body).signed
    changed = survivors.model_copy(update={"headers": (*survivors.headers, stranger)})
    refused(cell.agents[0], Check.BAD_SURVIVORS, confirm(cell.agents[0], changed))


def test_a_second_other_list_of_survivors(uploaded: Any, refused: Any) -> None:
    # With two lists the server would get both kinds of shares of one member.
    agent, survivors = uploaded.agents[0], uploaded.survivors()
    first = agent.receive_survivors(survivors)
    for other in (
        only(survivors, 0, 1, 2, 3, 4),
        with_header(survivors, 5, false_header(uploaded, 5, body_sha256=bytes(32))),
    ):
        refused(agent, Check.TWO_SURVIVORS, confirm(agent, other))
    assert agent.receive_survivors(survivors) == first


def test_a_survivor_with_masks_for_other_members(uploaded: Any, refused: Any) -> None:
    # The server showed member 5 another U2, and mixes the two.
    agent = uploaded.agents[0]
    other = false_header(uploaded, 5, bundle=bytes(32))
    refused(agent, Check.BAD_SURVIVORS, confirm(agent, with_header(uploaded.survivors(), 5, other)))


def test_an_upload_of_another_cell(uploaded: Any, refused: Any) -> None:
    agent = uploaded.agents[0]
    other = false_header(uploaded, 5, transcript=bytes(32))
    refused(agent, Check.BAD_SURVIVORS, confirm(agent, with_header(uploaded.survivors(), 5, other)))


def test_an_upload_of_another_size(uploaded: Any, refused: Any) -> None:
    agent = uploaded.agents[0]
    other = false_header(uploaded, 5, body_n_bytes=1)
    refused(agent, Check.BAD_SURVIVORS, confirm(agent, with_header(uploaded.survivors(), 5, other)))


def test_survivors_of_another_cell(uploaded: Any, refused: Any) -> None:
    agent = uploaded.agents[0]
    other = uploaded.survivors().model_copy(update={"transcript": bytes(32)})
    refused(agent, Check.BAD_SURVIVORS, confirm(agent, other))


def test_a_survivor_who_did_not_sign(uploaded: Any, make_key: Any, refused: Any) -> None:
    # A drop-out whom the server counts as alive, so that its own mask is removed.
    agent, survivors = uploaded.agents[0], uploaded.survivors()
    good = survivors.headers[5]
    forged = sign(make_key("a forger"), "masked-upload", good.body).signed
    edited = good.body.model_copy(update={"body_sha256": bytes(32)})
    for header in (
        forged,
        forged.model_copy(update={"key": good.key}),
        good.model_copy(update={"body": edited}),
    ):
        refused(agent, Check.BAD_SURVIVORS, confirm(agent, with_header(survivors, 5, header)))


def test_a_survivor_twice(uploaded: Any, refused: Any) -> None:
    # Padding: three survivors pass for four.
    agent, survivors = uploaded.agents[0], uploaded.survivors()
    for places in ((0, 1, 2, 2), (0, 0, 1, 2), (1, 0, 2, 3)):
        refused(agent, Check.BAD_SURVIVORS, confirm(agent, only(survivors, *places)))


def test_the_agents_own_upload_edited(uploaded: Any, refused: Any) -> None:
    agent = uploaded.agents[0]
    other = false_header(uploaded, 0, body_sha256=bytes(32))
    refused(agent, Check.BAD_SURVIVORS, confirm(agent, with_header(uploaded.survivors(), 0, other)))


def test_survivors_before_an_upload(masked: Any, refused: Any) -> None:
    masked.upload(range(1, 6))
    masked.server.close_uploading()
    refused(masked.agents[0], Check.BAD_SURVIVORS, confirm(masked.agents[0], masked.survivors()))


def test_survivors_before_the_upload_was_accepted(masked: Any) -> None:
    agent = masked.agents[0]
    masked.upload()
    masked.server.close_uploading()
    agent.state = agent.state.model_copy(update={"phase": AgentPhase.SHARED})  # the reply was lost
    before = agent.state
    with pytest.raises(CheckError) as refused:
        agent.receive_survivors(masked.survivors())
    assert refused.value.check is Check.BAD_SURVIVORS
    assert agent.state is before
    agent.uploaded()
    agent.receive_survivors(masked.survivors())


# CONFIRMED


@pytest.fixture
def confirming(uploaded: Any) -> Any:
    """All six have confirmed."""
    uploaded.confirm()
    return uploaded


def reveal(agent: SecAggAgent, confirmed: Confirmed) -> Callable[[], object]:
    return lambda: agent.receive_confirmed(confirmed)


def some(confirmed: Confirmed, *places: int) -> Confirmed:
    kept = tuple(confirmed.confirmations[i] for i in places)
    return confirmed.model_copy(update={"confirmations": kept})


def test_fewer_than_t_confirmations(confirming: Any, refused: Any) -> None:
    agent, confirmed = confirming.agents[0], confirming.confirmed()
    for places in ((0,), (0, 1, 2), (3, 4, 5)):
        refused(agent, Check.UNCONFIRMED, reveal(agent, some(confirmed, *places)))
    agent.receive_confirmed(some(confirmed, 0, 1, 2, 3))


def test_one_confirmation_many_times(confirming: Any, refused: Any) -> None:
    agent, confirmed = confirming.agents[0], confirming.confirmed()
    for places in ((1,) * 6, (0, 1, 2, 2), (0, 1, 2, 0, 1, 2)):
        refused(agent, Check.UNCONFIRMED, reveal(agent, some(confirmed, *places)))


def test_confirmations_of_who_did_not_survive(make_cell: Any, refused: Any) -> None:
    # Members 4 and 5 shared and did not upload; they sign what the server asks for.
    cell = make_cell(6).up_to("confirm", gone=[4, 5])
    agent, confirmed = cell.agents[0], cell.confirmed()
    message = derive.confirm_hash(cell.server.bundle_hash(), cell.server.survivor_entries())
    colluding = tuple(
        confirmed.confirmations[0].model_copy(
            update={
                "agent": cell.ids[i],
                "signature": cell.agents[i]._signer.sign_bytes(message),
            }
        )
        for i in (4, 5)
    )
    padded = some(confirmed, 0, 1).model_copy(
        update={"confirmations": (*some(confirmed, 0, 1).confirmations, *colluding)}
    )
    refused(agent, Check.UNCONFIRMED, reveal(agent, padded))
    agent.receive_confirmed(confirmed)


def test_confirmations_of_another_list_of_survivors(uploaded: Any, refused: Any) -> None:
    # The split view: half the cell was shown that member 5 is gone, the other half that it is not.
    survivors = uploaded.survivors()
    fewer = only(survivors, 0, 1, 2, 3, 4)
    confirms = [
        agent.receive_survivors(survivors if i < 3 else fewer)
        for i, agent in enumerate(uploaded.agents[:5])
    ]
    confirmed = Confirmed(transcript=survivors.transcript, confirmations=tuple(confirms))
    for agent in uploaded.agents[:5]:
        refused(agent, Check.UNCONFIRMED, reveal(agent, confirmed))


def test_a_split_view_never_gives_both_sides_enough(uploaded: Any, refused: Any) -> None:
    # c members sign both lists; wherever the server cuts the honest ones, one side stays below t.
    survivors = uploaded.survivors()
    views = (survivors, only(survivors, 0, 1, 2, 3, 4))
    t2 = uploaded.server.bundle_hash()
    for cut in range(1, 6):  # member 0 colludes with the server
        confirms: list[list[Any]] = [[], []]
        agents = []
        for i in range(1, 6):
            side = int(i >= cut and i != 5)
            agent = uploaded.agents[i]
            clone = SecAggAgent(agent._signer, uploaded.policy, agent.state)
            confirms[side].append(clone.receive_survivors(views[side]))
            agents.append((side, clone))
        for side in (0, 1):
            message = derive.confirm_hash(t2, views[side].entries())
            forged = confirms[side][0] if confirms[side] else confirms[1 - side][0]
            signature = uploaded.agents[0]._signer.sign_bytes(message)
            confirms[side].append(
                forged.model_copy(update={"agent": uploaded.ids[0], "signature": signature})
            )
        revealed = set()
        for side, clone in agents:
            confirmed = Confirmed(
                transcript=survivors.transcript, confirmations=tuple(confirms[side])
            )
            try:
                clone.receive_confirmed(confirmed)
            except checks_module.CheckError:
                continue
            revealed.add(side)
        assert len(revealed) <= 1, cut


def test_forged_confirmations(confirming: Any, make_key: Any, refused: Any) -> None:
    agent, confirmed = confirming.agents[0], confirming.confirmed()
    forger = make_key("a forger")
    message = derive.confirm_hash(
        confirming.server.bundle_hash(), confirming.server.survivor_entries()
    )
    forged = tuple(
        confirm.model_copy(update={"signature": forger.sign_bytes(message)})
        for confirm in confirmed.confirmations
    )
    refused(
        agent,
        Check.UNCONFIRMED,
        reveal(agent, Confirmed(transcript=confirmed.transcript, confirmations=forged)),
    )


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_confirmations_of_another_cell(
    inner: bool, outer: bool, confirming: Any, refused: Any
) -> None:
    agent, confirmed = confirming.agents[0], confirming.confirmed()
    other = {"transcript": bytes(32)}
    confirms = tuple(
        confirm.model_copy(update=other if inner else {}) for confirm in confirmed.confirmations
    )
    changed = confirmed.model_copy(update={"confirmations": confirms, **(other if outer else {})})
    if inner or outer:
        refused(agent, Check.UNCONFIRMED, reveal(agent, changed))
    else:
        agent.receive_confirmed(changed)


def test_a_reveal_without_a_confirm(uploaded: Any, refused: Any) -> None:
    # Member 0 has not confirmed; the others' word does not bind it.
    uploaded.confirm(range(1, 6))
    agent = uploaded.agents[0]
    refused(agent, Check.UNCONFIRMED, reveal(agent, uploaded.confirmed()))


# REVEAL


@pytest.mark.parametrize("gone", [(), (2,), (1, 4)])
def test_no_member_has_both_kinds_of_share_revealed(gone: tuple[int, ...], make_cell: Any) -> None:
    # Guarantee 3. No message can ask for a kind: what is revealed follows from U2 and U3 alone.
    cell = make_cell(6).up_to("reveal", gone=gone)
    for i, agent in enumerate(cell.agents):
        if i in gone:
            assert agent.state.reveal is None
            continue
        body = agent.state.reveal.body
        of_self = [dealer for dealer, _ in body.self_shares]
        of_mask = [dealer for dealer, _ in body.mask_shares]
        assert of_mask == [cell.ids[j] for j in gone]
        assert of_self == [cell.ids[j] for j in range(6) if j not in gone and j != i]
        assert not set(of_self) & set(of_mask)
        assert body.self_seed == agent.state.self_seed


@pytest.mark.parametrize("gone", [(), (2,)])
def test_a_reveal_holds_no_secret_but_those_of_the_sum(
    gone: tuple[int, ...], make_cell: Any
) -> None:
    cell = make_cell(6).up_to("reveal", gone=gone)
    agent = cell.agents[0]
    sent = {agent.state.reveal.body.self_seed}
    for _, share in (*agent.state.reveal.body.self_shares, *agent.state.reveal.body.mask_shares):
        sent.add(share)
    held = {agent.state.sealing_private_key, agent.state.masking_private_key}
    for given in agent.state.received:
        dropped = given.dealer in {cell.ids[j] for j in gone}
        held.add(given.self_share if dropped else given.mask_share)
    assert not sent & held


def test_a_second_reveal_is_the_first_one(confirming: Any) -> None:
    agent, confirmed = confirming.agents[0], confirming.confirmed()
    first = agent.receive_confirmed(some(confirmed, 0, 1, 2, 3))
    n_signed = agent._signer.n_signed
    for again in (confirmed, some(confirmed, 2, 3, 4, 5)):
        assert agent.receive_confirmed(again) == first
    assert agent._signer.n_signed == n_signed


def test_survivors_after_the_reveal(confirming: Any, refused: Any) -> None:
    agent = confirming.agents[0]
    survivors = confirming.survivors()
    agent.receive_confirmed(confirming.confirmed())
    other = only(survivors, 0, 1, 2, 3, 4)
    refused(agent, Check.TWO_SURVIVORS, confirm(agent, other))


# FAILED


STAGES = ["ready", "shared", "masked", "signed", "uploaded", "confirmed", "revealed"]


@pytest.fixture
def make_agent_at(make_cell: Any) -> Callable[..., Any]:
    """A cell, and its member 0 at a stage."""

    def make(stage: str, *, tried_again: bool = False) -> Any:
        cell = make_cell(6)
        cell.agents[0].state = cell.agents[0].state.model_copy(update={"tried_again": tried_again})
        played: list[Callable[[], Any]] = [
            lambda: None,
            lambda: (cell.share(), cell.server.close_sharing()),
            cell.mask,
            lambda: cell.agents[0].sign_upload(sha256(cell.masked(0).tobytes())),
            lambda: (cell.upload(), cell.server.close_uploading()),
            cell.confirm,
            cell.reveal,
        ]
        for play in played[: STAGES.index(stage) + 1]:
            play()
        return cell

    return make


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tried_again", [False, True])
def test_retries_before_the_upload_are_free_after_it_one_and_none_after_confirm(
    stage: str, tried_again: bool, make_agent_at: Any
) -> None:
    cell = make_agent_at(stage, tried_again=tried_again)
    agent = cell.agents[0]
    before = agent.state
    free, once = {"ready", "shared", "masked"}, {"signed", "uploaded"}
    allowed = stage in free or (stage in once and not tried_again)
    assert agent.receive_failed(cell.failed()) is allowed
    assert agent.state is before


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_that_the_server_did_not_sign(
    stage: str, make_agent_at: Any, make_key: Any, refused: Any
) -> None:
    # Whoever stands between could make the agent upload again and again.
    cell = make_agent_at(stage)
    agent = cell.agents[0]
    for key in (make_key("another server"), cell.agents[1]._signer, agent._signer):
        failed = cell.failed(key=key)
        refused(agent, Check.FOREIGN_SIGNATURE, lambda failed=failed: agent.receive_failed(failed))
    edited = cell.failed()
    body = edited.body.model_copy(update={"may_retry": True})
    edited = edited.model_copy(update={"body": body})
    refused(agent, Check.FOREIGN_SIGNATURE, lambda: agent.receive_failed(edited))


@pytest.mark.parametrize("stage", STAGES[1:])
def test_the_failure_of_another_cell(stage: str, make_agent_at: Any, refused: Any) -> None:
    cell = make_agent_at(stage)
    agent, failed = cell.agents[0], cell.failed(transcript=bytes(32))
    refused(agent, Check.NO_RETRY, lambda: agent.receive_failed(failed))


@pytest.mark.parametrize("change", [{"round": 2}, {"federation": bytes(16)}], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_of_another_round(
    stage: str, change: dict[str, Any], make_agent_at: Any, refused: Any
) -> None:
    cell = make_agent_at(stage)
    agent, failed = cell.agents[0], cell.failed(**change)
    refused(agent, Check.NO_RETRY, lambda: agent.receive_failed(failed))


# Restarts


class FakeNoEntropy:
    """For an agent that must draw nothing."""

    n_bytes = 0

    def __call__(self, n_bytes: int) -> bytes:
        raise AssertionError(n_bytes)


def restarted(agent: SecAggAgent, cell: Any) -> SecAggAgent:
    """The agent from its journal, in another process."""
    state = parse(AttemptState, agent.state.canonical())
    assert state == agent.state
    assert state.canonical() == agent.state.canonical()
    return SecAggAgent(agent._signer, cell.policy, state, entropy=FakeNoEntropy())


@pytest.mark.parametrize("stage", STAGES)
def test_after_a_restart_the_same_messages_are_repeated(stage: str, make_agent_at: Any) -> None:
    # Guarantee 2.
    cell = make_agent_at(stage)
    agent = cell.agents[0]
    later = restarted(agent, cell)
    assert later.transcript == agent.transcript
    reached = STAGES.index(stage)
    replayed: list[tuple[str, Callable[[SecAggAgent], Any]]] = [
        ("shared", lambda one: one.receive_roster(cell.listed, cell.roster)),
        ("masked", lambda one: one.receive_bundle(cell.bundle(0))),
        ("signed", lambda one: one.sign_upload(one.state.upload.body.body_sha256)),
        ("confirmed", lambda one: one.receive_survivors(cell.survivors())),
        ("revealed", lambda one: one.receive_confirmed(cell.confirmed())),
    ]
    for name, message in replayed:
        if STAGES.index(name) > reached:
            break
        first, second = message(agent), message(later)
        if name == "masked":
            assert second.masks == first.masks
            assert np.array_equal(second.checks, first.checks)
        else:
            assert second.canonical() == first.canonical()
    assert later.state == agent.state


def test_an_attempt_that_restarts_between_all_steps_is_in_the_sum(make_cell: Any) -> None:
    cell = make_cell(6)
    for play in (
        cell.share,
        cell.server.close_sharing,
        cell.mask,
        cell.upload,
        cell.server.close_uploading,
        cell.confirm,
        cell.reveal,
    ):
        play()
        entropies = [agent._entropy for agent in cell.agents]
        cell.agents = [restarted(agent, cell) for agent in cell.agents]
        for agent, entropy in zip(cell.agents, entropies, strict=True):
            agent._entropy = entropy
    assert np.array_equal(cell.unmasked(), cell.plain_sum(range(6)))


@pytest.mark.parametrize("stage", STAGES[1:])
def test_after_a_restart_what_was_refused_still_is(
    stage: str, make_agent_at: Any, make_entropy: Any, refused: Any
) -> None:
    cell = make_agent_at(stage)
    later = restarted(cell.agents[0], cell)
    later._entropy = make_entropy(0)
    reached = STAGES.index(stage)
    other = cell.offer(roster={"formed_at": cell.roster.body.formed_at + 1})
    refused(later, Check.SPENT_READY, join(later, other))
    if reached >= STAGES.index("masked"):
        fewer = without(cell.bundle(0), cell, 0, {1})
        refused(later, Check.BAD_BUNDLE, give(later, fewer))
    if reached >= STAGES.index("signed"):
        refused(later, Check.SPENT_READY, lambda: later.sign_upload(bytes(32)))
    if reached >= STAGES.index("confirmed"):
        survivors = only(cell.survivors(), 0, 1, 2, 3)
        refused(later, Check.TWO_SURVIVORS, confirm(later, survivors))


# Secrets


@pytest.fixture
def revealed_agent(make_cell: Any) -> SecAggAgent:
    agent = make_cell(6).up_to("reveal", gone=[2]).agents[0]
    assert isinstance(agent, SecAggAgent)
    return agent


@pytest.mark.parametrize(
    "show", [repr, str, "{}".format, pretty_repr], ids=["repr", "str", "format", "rich"]
)
@pytest.mark.parametrize("what", ["state", "received", "agent"])
def test_no_secret_is_shown(what: str, show: Any, revealed_agent: SecAggAgent) -> None:
    # As a log line or a traceback with its variables would.
    state = revealed_agent.state
    shown = show({"state": state, "received": state.received, "agent": revealed_agent}[what])
    secrets = [state.sealing_private_key, state.masking_private_key, state.self_seed]
    secrets += [given.self_share for given in state.received]
    secrets += [given.mask_share for given in state.received]
    for secret in secrets:
        for form in (repr(secret)[2:-1], secret.hex(), derive.b64u_encode(secret)):
            assert form[:20] not in shown


# All of them


def test_every_check_is_a_sentence_with_a_number_of_the_list() -> None:
    for check in Check:
        assert 1 <= check.number <= 18
        assert check.sentence.endswith(".")
        assert len(check.sentence.split()) > 4


def test_no_check_is_untested() -> None:
    here = inspect.getsource(inspect.getmodule(test_no_check_is_untested))  # type: ignore[arg-type]
    tested = set(re.findall(r"Check\.([A-Z_]+)", here))
    for module in (checks_module, agent_module):
        raised = set(re.findall(r"Check\.([A-Z_]+)", inspect.getsource(module)))
        assert raised <= tested

"""Message signatures and invites."""

from collections.abc import Callable
from typing import Any

import pytest

from protocol.chain import RoundManifest
from protocol.errors import InviteError, SignatureError
from protocol.limits import INVITE_CODE_BYTES
from protocol.manifest import FederationManifest
from protocol.signing import (
    Invite,
    InviteProof,
    Signed,
    Signer,
    fingerprint,
    format_fingerprint,
    invite_id,
    prove_invite,
    sign,
    verify,
    verify_bytes,
    verify_invite,
)
from protocol.wire import b64u_decode, b64u_encode, parse

CODE = bytes(range(100, 100 + INVITE_CODE_BYTES))


@pytest.fixture
def signed(make_round: Callable[..., RoundManifest], server_key: Signer) -> Signed[RoundManifest]:
    return sign(server_key, "round", make_round()).signed


def test_a_key_survives_its_bytes_and_nothing_else_is_a_key(agent_key: Signer) -> None:
    again = Signer.from_private_bytes(agent_key.private_bytes())
    assert again.identity == agent_key.identity
    assert Signer.generate().identity != Signer.generate().identity
    for data in (b"", bytes(31), bytes(33)):
        with pytest.raises(SignatureError, match=f"not {len(data)}"):
            Signer.from_private_bytes(data)


def test_guarantee_1_the_signed_body_is_returned_under_its_key_and_name(
    signed: Signed[RoundManifest], server_key: Signer
) -> None:
    travelled = parse(Signed[RoundManifest], signed.canonical())
    assert travelled == signed
    verified = verify(travelled, "round", key=server_key.identity)
    assert (verified.body, verified.key) == (signed.body, server_key.identity)
    assert verified.signed == signed


def test_guarantee_1_another_kind_of_document_is_refused(
    signed: Signed[RoundManifest], server_key: Signer
) -> None:
    for name in ("release", "federation", "", "round "):
        with pytest.raises(SignatureError, match="does not hold"):
            verify(signed, name, key=server_key.identity)


def test_guarantee_1_another_key_is_refused(
    signed: Signed[RoundManifest], server_key: Signer, agent_key: Signer
) -> None:
    with pytest.raises(SignatureError, match="not by the expected"):
        verify(signed, "round", key=agent_key.identity)
    claimed = signed.model_copy(update={"key": agent_key.identity})
    with pytest.raises(SignatureError, match="does not hold"):
        verify(claimed, "round", key=agent_key.identity)
    with pytest.raises(SignatureError, match="not by the expected"):
        verify(claimed, "round", key=server_key.identity)


def test_guarantee_1_any_other_body_is_refused(
    signed: Signed[RoundManifest], server_key: Signer
) -> None:
    changes: dict[str, Any] = {
        "round": 2,
        "release": 1,
        "deadline_at": signed.body.deadline_at + 1,
        "cohort_size": 3,
        "selection_seed": bytes(32),
        "schedule_end": 0.75,
    }
    for field, value in changes.items():
        body = signed.body.model_copy(update={field: value})
        with pytest.raises(SignatureError, match="does not hold"):
            verify(signed.model_copy(update={"body": body}), "round", key=server_key.identity)


@pytest.mark.parametrize("position", [0, 31, 32, 63])
def test_guarantee_1_a_damaged_signature_is_refused(
    signed: Signed[RoundManifest], server_key: Signer, position: int
) -> None:
    damaged = bytearray(signed.signature)
    damaged[position] ^= 1
    with pytest.raises(SignatureError, match="does not hold"):
        verify(
            signed.model_copy(update={"signature": bytes(damaged)}),
            "round",
            key=server_key.identity,
        )


@pytest.mark.parametrize("identity", [b"", bytes(31), b"\xff" * 32])
def test_what_is_no_key_verifies_nothing(identity: bytes) -> None:
    with pytest.raises(SignatureError):
        verify_bytes(identity, bytes(64), b"message")
    with pytest.raises(SignatureError):
        verify_bytes(Signer.generate().identity, bytes(63), b"message")


def test_a_signature_of_another_federation_does_not_pass(
    make_manifest: Callable[..., FederationManifest],
    make_round: Callable[..., RoundManifest],
    server_key: Signer,
) -> None:
    other = make_manifest(federation=bytes(16))
    here, there = make_round(), make_round(other)
    assert here.digest() != there.digest()
    moved = sign(server_key, "round", there).signed.model_copy(update={"body": here})
    with pytest.raises(SignatureError):
        verify(moved, "round", key=server_key.identity)


def test_a_fingerprint_is_shown_in_groups_of_four(server_key: Signer) -> None:
    text = format_fingerprint(server_key.identity)
    groups = text.split(" ")
    assert [len(group) for group in groups] == [4] * 8
    assert bytes.fromhex(text) == fingerprint(server_key.identity)


# Invites


def make_invite(server_key: Signer) -> Invite:
    return Invite(code=CODE, server_fingerprint=fingerprint(server_key.identity))


def test_an_invite_round_trips(server_key: Signer) -> None:
    invite = make_invite(server_key)
    assert Invite.parse(invite.format()) == invite


def test_an_invite_shows_its_secret_to_nobody_by_accident(server_key: Signer) -> None:
    invite = make_invite(server_key)
    for text in (repr(invite), str(invite), f"{invite}"):
        assert CODE.hex() not in text
        assert b64u_encode(CODE)[:12] not in text
        assert repr(CODE) not in text


def test_a_damaged_invite_is_refused_without_showing_it(server_key: Signer) -> None:
    text = make_invite(server_key).format()
    damaged = [
        text[:-1],
        text + "A",
        text[:20] + " " + text[20:],
        text[:20] + "\n" + text[20:],
        text.replace(text[15], "*", 1),
        text[:-4] + "ÄÖÜß",
        "sheepfold1-",
    ]
    for bad in damaged:
        with pytest.raises(InviteError, match="damaged") as caught:
            Invite.parse(bad)
        assert text[15:40] not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "sheepfold2-", "SHEEPFOLD1-", "https://"])
def test_an_invite_with_another_prefix_is_refused(server_key: Signer, prefix: str) -> None:
    text = make_invite(server_key).format().removeprefix("sheepfold1-")
    with pytest.raises(InviteError, match="begins with"):
        Invite.parse(prefix + text)


def test_a_proof_holds_for_its_code_agent_and_server_only(
    server_key: Signer, agent_key: Signer
) -> None:
    agent, server = agent_key.identity, server_key.identity
    proof = prove_invite(CODE, agent=agent, server=server)
    verify_invite(proof, CODE, agent=agent, server=server)
    other = Signer.generate().identity
    another_code = bytes(INVITE_CODE_BYTES)
    for code, who, where in [
        (another_code, agent, server),
        (CODE, other, server),
        (CODE, agent, other),
        (CODE, server, agent),
    ]:
        with pytest.raises(SignatureError, match="does not hold"):
            verify_invite(proof, code, agent=who, server=where)


def test_a_proof_whose_name_or_mac_was_exchanged_is_refused(
    server_key: Signer, agent_key: Signer
) -> None:
    agent, server = agent_key.identity, server_key.identity
    proof = prove_invite(CODE, agent=agent, server=server)
    for changes in ({"invite": invite_id(bytes(16))}, {"mac": bytes(32)}):
        with pytest.raises(SignatureError):
            verify_invite(proof.model_copy(update=changes), CODE, agent=agent, server=server)


def test_the_proof_and_the_name_of_an_invite_do_not_carry_the_code(
    server_key: Signer, agent_key: Signer
) -> None:
    proof = prove_invite(CODE, agent=agent_key.identity, server=server_key.identity)
    travelled = proof.canonical()
    assert parse(InviteProof, travelled) == proof
    assert b64u_encode(CODE).encode()[:12] not in travelled
    assert CODE not in b64u_decode(b64u_encode(proof.invite + proof.mac))

"""Codecs give back what they were given and refuse everything else; layouts of random shapes."""

import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import EncodingError, ProtocolError
from protocol.layout import VectorLayout
from protocol.messages import UploadHeader
from protocol.phases import (
    AGENT_TRANSITIONS,
    CELL_TRANSITIONS,
    ROUND_TRANSITIONS,
    advance,
)
from protocol.signing import Invite, Signed, Signer, prove_invite, sign, verify, verify_invite
from protocol.transport_signing import (
    ReplayedSignatureError,
    ReplayGuard,
    StaleSignatureError,
    VerifiedRequest,
    sign_request,
    verify_request,
)
from protocol.wire import b64u_decode, b64u_encode, canonical_json, domain_hash, parse
from quant.adapter import flatten, unflatten, vector_from_bytes, vector_to_bytes

SIGNER = Signer.from_private_bytes(bytes(range(32)))

bytes16 = st.binary(min_size=16, max_size=16)
bytes32 = st.binary(min_size=32, max_size=32)
numbers = st.integers(1 - 2**53, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
headers = st.builds(
    UploadHeader,
    federation=bytes16,
    round=st.integers(1, 2**31 - 1),
    attempt=st.integers(1, 2**31 - 1),
    agent=bytes32,
    round_digest=bytes32,
    layout=bytes32,
    weight=st.integers(1, 1_000_000),
    body_sha256=bytes32,
    body_n_bytes=st.integers(1, 2**31),
)
shapes = st.dictionaries(
    st.text(st.characters(min_codepoint=33, max_codepoint=0x2FFF), min_size=1, max_size=12),
    st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=8,
)


def flipped(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position % len(data)] ^= 1 << bit
    return bytes(changed)


@given(st.binary(max_size=100))
def test_base64url_round_trips(data: bytes) -> None:
    assert b64u_decode(b64u_encode(data)) == data


@given(st.text(st.characters(max_codepoint=0x17F), max_size=12))
def test_at_most_one_text_decodes_to_the_same_bytes(text: str) -> None:
    with contextlib.suppress(EncodingError):
        assert b64u_encode(b64u_decode(text)) == text


@given(json_values)
def test_canonical_json_is_json_and_a_fixed_point(value: Any) -> None:
    data = canonical_json(value)
    # A float of 2^53 or more is written like an integer, which only a float field reads.
    read = json.loads(data, parse_int=lambda text: float(text) if len(text) > 15 else int(text))
    assert canonical_json(read) == data
    assert read == value


@given(json_values, json_values)
def test_domain_hashes_are_equal_only_for_equal_values(one: Any, other: Any) -> None:
    same = canonical_json(one) == canonical_json(other)
    assert (domain_hash("test", one) == domain_hash("test", other)) is same
    assert domain_hash("test", one) != domain_hash("test", [one])


@given(headers)
def test_a_message_round_trips(header: UploadHeader) -> None:
    assert parse(UploadHeader, header.canonical()) == header
    assert sum(header.part_n_bytes(n) for n in range(header.n_parts)) == header.body_n_bytes


@settings(max_examples=300)
@given(headers, st.integers(0, 10_000), st.integers(0, 7))
def test_a_signed_message_with_one_bit_flipped_is_refused(
    header: UploadHeader, position: int, bit: int
) -> None:
    signed = sign(SIGNER, "upload", header).signed
    data = signed.canonical()
    changed = flipped(data, position, bit)
    try:
        read = parse(Signed[UploadHeader], changed)
    except ProtocolError:
        return
    with pytest.raises(ProtocolError):
        verify(read, "upload", key=SIGNER.identity)


@settings(max_examples=50)
@given(headers, st.binary(max_size=200))
def test_junk_is_refused_as_a_protocol_error(header: UploadHeader, junk: bytes) -> None:
    for data in (junk, header.canonical() + junk + b"}", junk + header.canonical()):
        with pytest.raises(ProtocolError):
            parse(Signed[UploadHeader], data)


@settings(max_examples=100)
@given(
    body=st.binary(max_size=50),
    nonce=bytes16,
    created=st.integers(0, 2**32),
    segment=st.text("abcXYZ019-._~%", max_size=8).filter(lambda text: "%" not in text),
    where=st.sampled_from(["signature", "signature-input", "content-digest"]),
    position=st.integers(0, 1_000),
    bit=st.integers(0, 6),
)
def test_a_request_with_one_bit_flipped_is_refused(
    body: bytes, nonce: bytes, created: int, segment: str, where: str, position: int, bit: int
) -> None:
    url = f"https://h/v1/{segment}?x={segment}"
    signed = sign_request(SIGNER, method="PUT", url=url, body=body, created=created, nonce=nonce)
    lower = {name.lower(): value for name, value in signed.items()}
    verified = verify_request(method="PUT", url=url, headers=lower, body=body)
    assert verified == VerifiedRequest(identity=SIGNER.identity, created=created, nonce=nonce)
    damaged = flipped(lower[where].encode("ascii"), position, bit).decode("latin-1")
    try:
        found = verify_request(method="PUT", url=url, headers={**lower, where: damaged}, body=body)
    except ProtocolError:
        return
    # Only what means the same may pass: a space for a tab, stray bits of base64.
    assert found == verified


@given(code=bytes16, agent=bytes32, server=bytes32, other=bytes32)
def test_an_invite_round_trips_and_its_proof_is_for_two_keys(
    code: bytes, agent: bytes, server: bytes, other: bytes
) -> None:
    invite = Invite(code=code, server_fingerprint=server[:16])
    assert Invite.parse(invite.format()) == invite
    proof = prove_invite(code, agent=agent, server=server)
    verify_invite(proof, code, agent=agent, server=server)
    if other not in {agent, server}:
        for who, where in ((other, server), (agent, other)):
            with pytest.raises(ProtocolError):
                verify_invite(proof, code, agent=who, server=where)


@given(shapes)
def test_a_layout_of_any_shapes_has_no_gaps_and_its_vector_round_trips(
    found: dict[str, tuple[int, ...]],
) -> None:
    layout = VectorLayout.of_shapes(found)
    assert parse(VectorLayout, layout.canonical()).digest() == layout.digest()
    assert layout.n_values == sum(math.prod(shape) for shape in found.values())
    covered = np.zeros(layout.n_values, np.int64)
    for _, where in layout.slices():
        covered[where] += 1
    assert (covered == 1).all()
    vector = np.arange(layout.n_values, dtype=np.float32)
    arrays = unflatten(vector, layout)
    assert {name: array.shape for name, array in arrays.items()} == found
    np.testing.assert_array_equal(flatten(arrays, layout), vector)
    np.testing.assert_array_equal(vector_from_bytes(vector_to_bytes(vector), layout), vector)


@given(shapes, shapes)
def test_layouts_have_equal_digests_only_for_equal_shapes(
    one: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]
) -> None:
    digests = VectorLayout.of_shapes(one).digest(), VectorLayout.of_shapes(other).digest()
    assert (digests[0] == digests[1]) is (one == other)


@given(st.sampled_from([ROUND_TRANSITIONS, CELL_TRANSITIONS, AGENT_TRANSITIONS]), st.data())
def test_a_walk_never_leaves_the_table(table: Any, data: st.DataObject) -> None:
    phase = next(iter(table))[0]
    events = sorted({event for _, event in table})
    for _ in range(12):
        event = data.draw(st.sampled_from(events))
        before = phase
        try:
            phase = advance(table, phase, event)
        except ProtocolError:
            assert (before, event) not in table
        else:
            assert table[before, event] is phase


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.integers(-400, 400),  # when the signature says that it was made, from now
            st.integers(0, 3),  # its nonce
            st.integers(-5, 400),  # how far the clock moves then
            st.booleans(),  # whether the server restarts after it
        ),
        max_size=30,
    )
)
def test_no_signature_is_admitted_twice_whatever_clock_and_server_do(
    schedule: list[tuple[int, int, int, bool]],
) -> None:
    now = 10_000.0
    guard = ReplayGuard(started_at=now)
    latest_start = now
    admitted: set[tuple[int, bytes]] = set()
    for age_s, nonce, step_s, restarts in schedule:
        request = VerifiedRequest(
            identity=bytes(32), created=int(now) + age_s, nonce=nonce.to_bytes(16)
        )
        with contextlib.suppress(StaleSignatureError, ReplayedSignatureError):
            guard.admit(request, now=now)
            key = (request.created, request.nonce)
            assert key not in admitted
            admitted.add(key)
        now += step_s
        if restarts:  # a clock that was set back across a restart is beyond what it can know
            now = max(now, latest_start, *(float(created) for created, _ in admitted), 0.0)
            guard, latest_start = ReplayGuard(started_at=now), now

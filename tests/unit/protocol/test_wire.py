"""Bytes and JSON in the one accepted form."""

import hashlib
import json
import math
from typing import Annotated, Literal

import pytest
from pydantic import Field

from protocol.errors import EncodingError, ManifestError, ProtocolError
from protocol.limits import MAX_JSON_BYTES
from protocol.wire import (
    Bytes16,
    Bytes32,
    WireModel,
    b64u_decode,
    b64u_encode,
    canonical_json,
    domain_hash,
    parse,
)


class Note(WireModel):
    """A message that has a field of each kind."""

    version: Literal[1] = 1
    key: Bytes32
    nonce: Bytes16 | None = None
    count: Annotated[int, Field(ge=0)] = 0
    share: float = 0.5
    names: tuple[str, ...] = ()


KEY = bytes(range(32))


@pytest.mark.parametrize("n_bytes", range(7))
def test_base64url_round_trips_without_padding(n_bytes: int) -> None:
    data = bytes(255 - i for i in range(n_bytes))
    text = b64u_encode(data)
    assert not set(text) & set("+/=")
    assert b64u_decode(text, n_bytes=n_bytes) == data


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("AA==", "padding"),
        ("AB", "stray low bits"),
        ("AAB", "stray low bits"),
        ("A", "a length that no bytes have"),
        ("AAAAA", "a length that no bytes have"),
        ("AA AA", "white space"),
        ("AAAA\n", "a line break"),
        ("+/+/", "the alphabet of base64"),
        ("AAÄA", "a letter beyond ASCII"),
        ("AA.A", "a sign of no alphabet"),
    ],
)
def test_base64url_in_any_other_form_is_refused(text: str, why: str) -> None:
    with pytest.raises(EncodingError, match="base64url"):
        b64u_decode(text)


def test_base64url_of_another_length_is_refused() -> None:
    with pytest.raises(EncodingError, match="31 bytes where exactly 32"):
        b64u_decode(b64u_encode(bytes(31)), n_bytes=32)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, 2**53, -(2**53), [1, {"a": math.nan}], "\ud800", {1: 2}, b"x"],
)
def test_what_canonical_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(EncodingError):
        canonical_json(value)  # type: ignore[arg-type]
    with pytest.raises(EncodingError):
        domain_hash("test", value)  # type: ignore[arg-type]


def test_the_largest_integers_are_kept() -> None:
    assert canonical_json([2**53 - 1, 1 - 2**53]) == b"[9007199254740991,-9007199254740991]"


def test_canonical_json_does_not_depend_on_the_order_of_insertion() -> None:
    assert canonical_json({"b": 1, "a": 2.0, "€": 3}) == '{"a":2,"b":1,"€":3}'.encode()
    assert canonical_json({"€": 3, "a": 2.0, "b": 1}) == '{"a":2,"b":1,"€":3}'.encode()


def test_a_domain_hash_is_the_sha256_of_the_named_array() -> None:
    by_hand = b'["sheepfold/v1/round",{"a":"x"},[1,2]]'
    assert domain_hash("round", {"a": "x"}, [1, 2]) == hashlib.sha256(by_hand).digest()


def test_hashes_of_different_purposes_never_meet() -> None:
    hashes = {
        domain_hash("round", {}),
        domain_hash("release", {}),
        domain_hash("round", {}, {}),
        domain_hash("round", [{}]),
        domain_hash("round"),
        domain_hash("round", "{}"),
        domain_hash("round/", {}),
    }
    assert len(hashes) == 7


def test_a_message_round_trips() -> None:
    note = Note(key=KEY, nonce=bytes(16), count=3, share=2.0, names=("a", "b"))
    assert parse(Note, note.canonical()) == note
    assert json.loads(note.canonical())["key"] == b64u_encode(KEY)


def note(**changes: object) -> bytes:
    values = {"version": 1, "key": b64u_encode(KEY), **changes}
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (note(extra=1), "extra"),
        (note(version=2), "version"),
        (note(version="1"), "version"),
        (note(key=None), "key"),
        (note(key=7), "key"),
        (note(key=b64u_encode(KEY) + "="), "key"),
        (note(key=b64u_encode(bytes(31))), "key"),
        (note(nonce="AA"), "nonce"),
        (note(count=1.5), "count"),
        (note(count="1"), "count"),
        (note(count=True), "count"),
        (note(count=-1), "count"),
        (note(count=None), "count"),
        (note(share=math.nan), "share"),
        (note(share=math.inf), "share"),
        (note(share="0.5"), "share"),
        (note(share=True), "share"),
        (note(names="ab"), "names"),
        (note(names=[1]), "names"),
        (b'{"version": 1}', "key"),
        (b"[]", "(the whole)"),
        (b"{", "(the whole)"),
        (b"", "(the whole)"),
        (note() + b"x", "(the whole)"),
        (b"\xff\xfe", "(the whole)"),
        (b'{"key": "\\ud800"}', "(the whole)"),
        (b"[" * 100_000, "(the whole)"),
    ],
)
def test_what_is_not_the_message_is_refused_with_the_fields_name(data: bytes, field: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse(Note, data)
    message = str(caught.value)
    assert message.startswith("Note: ")
    assert field in message.split(" (given", maxsplit=1)[0]
    assert "\n" not in message


def test_several_faults_are_told_in_one_sentence() -> None:
    with pytest.raises(ManifestError, match=r"and 2 more$"):
        parse(Note, note(count=-1, share="x", extra=1))


def test_a_body_beyond_the_limit_is_refused_unread() -> None:
    with pytest.raises(EncodingError, match=f"{MAX_JSON_BYTES + 1} bytes"):
        parse(Note, b" " * (MAX_JSON_BYTES + 1))
    assert issubclass(EncodingError, ProtocolError)


def test_a_message_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Note(key=KEY).count = 3  # type: ignore[misc]

"""The standards' vectors, and our own checked by a second, naive computation.

Nothing here computes an expected value with the function under test: hashes are made of `json` and
`hashlib`, signature bases by joining strings, signatures are verified by the library alone.
"""

import base64
import copy
import datetime as dt
import hashlib
import hmac
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_der_public_key
from http_message_signatures import (
    HTTPMessageSigner,
    HTTPMessageVerifier,
    InvalidSignature,
    algorithms,
)
from http_message_signatures.digests import ContentDigest

from protocol.chain import Release, RoundManifest
from protocol.errors import EncodingError, InviteError, ProtocolError, SignatureError
from protocol.layout import VectorLayout
from protocol.manifest import FederationManifest
from protocol.messages import Credential, Enrolment, UploadHeader
from protocol.signing import Invite, Signed, Signer, fingerprint, verify, verify_bytes
from protocol.signing import verify_invite as check_invite
from protocol.transport_signing import _Message, _OneKey, verify_request
from protocol.wire import canonical_json, domain_hash, parse

VECTORS = Path(__file__).parents[2] / "vectors"


def read(name: str) -> Any:
    return json.loads((VECTORS / name).read_text(encoding="utf-8"))


def naive_b64u(data: bytes) -> str:
    return base64.b64encode(data).decode().translate({43: "-", 47: "_", 61: None})


def naive_unb64u(text: str) -> bytes:
    return base64.b64decode(text.translate({45: "+", 95: "/"}) + "=" * (-len(text) % 4))


def naive_canonical(value: Any) -> bytes:
    """RFC 8785 for what our documents hold: names in ASCII order, whole numbers without a point."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(part) for key, part in item.items()}
        if isinstance(item, list):
            return [plain(part) for part in item]
        return int(item) if isinstance(item, float) and item == int(item) else item

    text = json.dumps(plain(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode()


def naive_hash(name: str, *values: Any) -> bytes:
    return hashlib.sha256(naive_canonical(["sheepfold/v1/" + name, *values])).digest()


def named(cases: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(case, id=str(case.get("name", case.get("bits")))) for case in cases]


# RFC 8032

RFC8032 = read("rfc8032_ed25519.json")


@pytest.mark.parametrize("case", named(RFC8032["cases"]))
def test_rfc_8032(case: dict[str, str]) -> None:
    signer = Signer.from_private_bytes(bytes.fromhex(case["private"]))
    message = bytes.fromhex(case["message"])
    assert signer.identity.hex() == case["public"]
    assert signer.sign_bytes(message).hex() == case["signature"]
    verify_bytes(signer.identity, bytes.fromhex(case["signature"]), message)


@pytest.mark.parametrize("case", named(RFC8032["bad"]))
def test_rfc_8032_bad(case: dict[str, str]) -> None:
    with pytest.raises(SignatureError):
        verify_bytes(
            bytes.fromhex(case["public"]),
            bytes.fromhex(case["signature"]),
            bytes.fromhex(case["message"]),
        )


# RFC 8785

RFC8785 = read("rfc8785.json")


@pytest.mark.parametrize("case", named(RFC8785["documents"]))
def test_rfc_8785_documents(case: dict[str, str]) -> None:
    assert canonical_json(json.loads(case["input"])) == case["canonical"].encode()


def number(bits: str) -> float:
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    return float(value)


@pytest.mark.parametrize("case", named(RFC8785["numbers"]))
def test_rfc_8785_numbers(case: dict[str, str]) -> None:
    assert canonical_json(number(case["bits"])) == case["canonical"].encode()


@pytest.mark.parametrize("case", named(RFC8785["bad_numbers"]))
def test_rfc_8785_bad_numbers(case: dict[str, str]) -> None:
    with pytest.raises(EncodingError):
        canonical_json(number(case["bits"]))


# RFC 9421

RFC9421 = read("rfc9421_ed25519.json")


def verify_b26(case: dict[str, Any]) -> None:
    message = _Message(method=case["method"], url=case["url"], headers=dict(case["headers"]))
    key = load_der_public_key(base64.b64decode(case["public"]))
    HTTPMessageVerifier(signature_algorithm=algorithms.ED25519, key_resolver=_OneKey(key)).verify(
        message, max_age=None
    )


def test_rfc_9421_b_2_6_verifies_with_the_library_that_we_use() -> None:
    verify_b26(RFC9421)
    ContentDigest.verify(RFC9421["headers"]["Content-Digest"], RFC9421["body"].encode())
    key = load_der_public_key(base64.b64decode(RFC9421["public"]))
    assert isinstance(key, Ed25519PublicKey)
    signature = RFC9421["headers"]["Signature"].removeprefix("sig-b26=:").rstrip(":")
    key.verify(base64.b64decode(signature), RFC9421["signature_base"].encode())


def test_rfc_9421_b_2_6_is_what_the_library_signs() -> None:
    case = copy.deepcopy(RFC9421)
    expected = {name: case["headers"].pop(name) for name in ("Signature-Input", "Signature")}
    message = _Message(method=case["method"], url=case["url"], headers=case["headers"])
    key = load_der_private_key(base64.b64decode(case["private"]), password=None)
    HTTPMessageSigner(signature_algorithm=algorithms.ED25519, key_resolver=_OneKey(key)).sign(
        message,
        key_id="test-key-ed25519",
        created=dt.datetime.fromtimestamp(1618884473, tz=dt.UTC),
        label="sig-b26",
        include_alg=False,
        use_existing_digest=True,
        covered_component_ids=(
            "date",
            "@method",
            "@path",
            "@authority",
            "content-type",
            "content-length",
        ),
    )
    assert {name: message.headers[name] for name in expected} == expected


@pytest.mark.parametrize("change", named(RFC9421["bad"]))
def test_rfc_9421_bad(change: dict[str, Any]) -> None:
    case = {**RFC9421, **change, "headers": {**RFC9421["headers"], **change.get("headers", {})}}
    with pytest.raises(InvalidSignature):
        verify_b26(case)


def test_a_request_of_another_protocol_is_not_ours() -> None:
    headers = {name.lower(): value for name, value in RFC9421["headers"].items()}
    with pytest.raises(SignatureError):
        verify_request(
            method="POST", url=RFC9421["url"], headers=headers, body=RFC9421["body"].encode()
        )


# Our own

OURS = read("sheepfold_v1.json")
SERVER = naive_unb64u(OURS["keys"]["server"]["identity"])
AGENT = naive_unb64u(OURS["keys"]["agent"]["identity"])
MODELS: dict[str, type[Any]] = {
    "layout": VectorLayout,
    "federation": FederationManifest,
    "release": Release,
    "round": RoundManifest,
    "upload": UploadHeader,
    "enrolment": Enrolment,
    "credential": Credential,
}


def test_the_keys_are_what_their_bytes_say() -> None:
    for key in OURS["keys"].values():
        signer = Signer.from_private_bytes(bytes.fromhex(key["private"]))
        assert naive_b64u(signer.identity) == key["identity"]


@pytest.mark.parametrize("case", named(OURS["domain_hash"]))
def test_golden_domain_hashes(case: dict[str, Any]) -> None:
    assert naive_hash(case["name"], *case["values"]).hex() == case["sha256"]
    assert domain_hash(case["name"], *case["values"]).hex() == case["sha256"]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case["kind"]) for case in OURS["documents"]]
)
def test_golden_digests_of_documents(case: dict[str, Any]) -> None:
    assert naive_hash(case["kind"], case["body"]).hex() == case["digest"]
    document = parse(MODELS[case["kind"]], json.dumps(case["body"]))
    assert document.digest().hex() == case["digest"]
    assert document.canonical() == naive_canonical(case["body"])


def numbers_in(body: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = body.items() if isinstance(body, dict) else enumerate(body)
    found = []
    for key, value in items:
        if isinstance(value, dict | list):
            found += numbers_in(value, (*path, key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((*path, key))
    return found


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case["kind"]) for case in OURS["documents"]]
)
def test_bad_documents_have_another_digest_or_are_refused(case: dict[str, Any]) -> None:
    for path in numbers_in(case["body"]):
        body = copy.deepcopy(case["body"])
        where = body
        for key in path[:-1]:
            where = where[key]
        where[path[-1]] += 1
        try:
            document = parse(MODELS[case["kind"]], json.dumps(body))
        except ProtocolError:
            continue
        assert document.digest().hex() != case["digest"], path


@pytest.mark.parametrize("case", named(OURS["signed"]))
def test_golden_signed_messages(case: dict[str, Any]) -> None:
    key, signature = naive_unb64u(case["key"]), naive_unb64u(case["signature"])
    Ed25519PublicKey.from_public_bytes(key).verify(
        signature, naive_hash(case["name"], case["body"])
    )
    document = {name: case[name] for name in ("body", "key", "signature")}
    signed = parse(Signed[MODELS[case["name"]]], json.dumps(document))  # type: ignore[misc]
    assert verify(signed, case["name"], key=key).body == signed.body


@pytest.mark.parametrize("bad", ["bad_name", "bad_key", "bad_signature", "bad_body", "bad_prefix"])
@pytest.mark.parametrize("case", named(OURS["signed"]))
def test_bad_signed_messages(case: dict[str, Any], bad: str) -> None:
    document = {name: copy.deepcopy(case[name]) for name in ("body", "key", "signature")}
    name, key = case["name"], naive_unb64u(case["key"])
    if bad == "bad_name":
        name = "revocation"
    elif bad == "bad_key":
        document["key"] = naive_b64u(SERVER if key == AGENT else AGENT)
        key = naive_unb64u(document["key"])
    elif bad == "bad_signature":
        signature = bytearray(naive_unb64u(case["signature"]))
        signature[0] ^= 1
        document["signature"] = naive_b64u(bytes(signature))
    elif bad == "bad_body":
        document["body"]["federation"] = naive_b64u(bytes(16))
    else:  # signed without the name's prefix, as another protocol would
        digest = hashlib.sha256(naive_canonical([name, case["body"]])).digest()
        private = OURS["keys"]["server" if key == SERVER else "agent"]["private"]
        forged = Signer.from_private_bytes(bytes.fromhex(private)).sign_bytes(digest)
        document["signature"] = naive_b64u(forged)
    signed = parse(Signed[MODELS[case["name"]]], json.dumps(document))  # type: ignore[misc]
    with pytest.raises(SignatureError):
        verify(signed, name, key=key)


def test_the_golden_invite() -> None:
    case = OURS["invite"]
    code = bytes.fromhex(case["code"])
    assert case["text"] == "sheepfold1-" + naive_b64u(code + hashlib.sha256(SERVER).digest()[:16])
    assert naive_unb64u(case["id"]) == naive_hash("invite", naive_b64u(code))
    assert naive_unb64u(case["mac"]) == hmac.new(code, AGENT + SERVER, hashlib.sha256).digest()
    invite = Invite.parse(case["text"])
    assert (invite.code, invite.server_fingerprint) == (code, fingerprint(SERVER))
    proof = parse(
        Enrolment, json.dumps(next(c for c in OURS["signed"] if c["name"] == "enrolment")["body"])
    ).invite
    assert proof is not None
    check_invite(proof, code, agent=AGENT, server=SERVER)
    with pytest.raises(SignatureError):
        check_invite(proof, code, agent=SERVER, server=AGENT)


@pytest.mark.parametrize(
    "bad",
    [
        lambda text: text[:-1],
        lambda text: text + "=",
        lambda text: text.upper(),
        lambda text: text.replace("sheepfold1-", "sheepfold2-"),
        lambda text: text[:-1] + ("B" if text[-1] == "A" else "A") + "A",
    ],
)
def test_bad_invites(bad: Any) -> None:
    with pytest.raises(InviteError):
        Invite.parse(bad(OURS["invite"]["text"]))


def test_the_golden_request() -> None:
    case = OURS["transport"]
    url, body = case["url"], case["body"].encode()
    path, _, query = url.removeprefix("https://server.example").partition("?")
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    parameters = (
        '("@method" "@path" "@query" "content-digest")'
        f';created={case["created"]};keyid="{case["key"]}";alg="ed25519"'
        f';nonce="{case["nonce"]}";tag="sheepfold/v1/request"'
    )
    base_of_signature = "\n".join(
        [
            f'"@method": {case["method"]}',
            f'"@path": {path}',
            f'"@query": ?{query}',
            f'"content-digest": sha-256=:{digest}:',
            f'"@signature-params": {parameters}',
        ]
    )
    assert case["headers"]["Content-Digest"] == f"sha-256=:{digest}:"
    label, _, given = case["headers"]["Signature-Input"].partition("=")
    assert label == "sheepfold"
    # Which order the parameters stand in is the signer's choice; the base follows the header.
    assert sorted(given.split(";")) == sorted(parameters.split(";"))
    base_of_signature = base_of_signature.replace(parameters, given)
    signature = case["headers"]["Signature"].removeprefix("sheepfold=:").removesuffix(":")
    Ed25519PublicKey.from_public_bytes(AGENT).verify(
        base64.b64decode(signature), base_of_signature.encode()
    )
    headers = {name.lower(): value for name, value in case["headers"].items()}
    verified = verify_request(method="POST", url=url, headers=headers, body=body)
    assert (verified.identity, verified.created) == (AGENT, case["created"])
    assert naive_b64u(verified.nonce) == case["nonce"]


@pytest.mark.parametrize(
    "bad",
    [
        {"method": "PUT"},
        {"url": OURS["transport"]["url"] + "&z="},
        {"url": OURS["transport"]["url"].replace("%C3%A9", "%c3%a9")},
        {"url": OURS["transport"]["url"].replace("uploads", "upload")},
        {"body": '{"hello":"World"}'},
        {"headers": {"Content-Digest": "sha-256=:" + "A" * 43 + "=:"}},
        {"headers": {"Signature": "sheepfold=:" + "A" * 86 + "==:"}},
    ],
)
def test_bad_requests(bad: dict[str, Any]) -> None:
    case = {**OURS["transport"], **bad}
    headers = {**OURS["transport"]["headers"], **bad.get("headers", {})}
    with pytest.raises(SignatureError):
        verify_request(
            method=case["method"],
            url=case["url"],
            headers={name.lower(): value for name, value in headers.items()},
            body=case["body"].encode(),
        )

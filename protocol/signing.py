"""Ed25519 identities and message signatures: made once, journalled, and carried in the body.

A message signature covers `domain_hash(name, body)`, so a signature made for one kind of document
never holds for another. Holding a `Verified` value proves that the checks ran: the only ways to
get one are `sign` and `verify`.

Signatures of requests (RFC 9421), made anew at each try, are in `protocol.transport_signing`.
"""

import hmac
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pydantic import Field

from protocol.errors import InviteError, SignatureError
from protocol.limits import INVITE_CODE_BYTES
from protocol.wire import (
    Bytes64,
    Digest,
    Identity,
    WireModel,
    b64u_decode,
    b64u_encode,
    domain_hash,
    sha256,
)

BodyT = TypeVar("BodyT", bound=WireModel)

# Points of small order in all their encodings (Wycheproof, ed25519_test): under such a key anyone
# can sign, so no identity may be one.
_SMALL_ORDER = frozenset(
    bytes.fromhex(start + end)
    for start, ends in {
        "01" + "00" * 30: ("00", "80"),
        "00" * 31: ("00", "80"),
        "ec" + "ff" * 30: ("7f", "ff"),
        "ed" + "ff" * 30: ("7f", "ff"),
        "ee" + "ff" * 30: ("7f", "ff"),
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc": ("05", "85"),
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03": ("7a", "fa"),
    }.items()
    for end in ends
)
_INVITE_PREFIX = "sheepfold1-"
_FINGERPRINT_BYTES = 16


class Signer:
    """A private Ed25519 key and the identity that it proves."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        """Wrap a private key."""
        self._private_key = private_key
        self.identity: bytes = private_key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> "Signer":
        """A new key from the operating system's generator."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_private_bytes(cls, data: bytes) -> "Signer":
        """Read the 32 bytes that `private_bytes` wrote.

        Raises:
            SignatureError: Not 32 bytes.
        """
        try:
            return cls(Ed25519PrivateKey.from_private_bytes(data))
        except ValueError as error:
            msg = f"an Ed25519 private key has 32 bytes, not {len(data)}"
            raise SignatureError(msg) from error

    def private_bytes(self) -> bytes:
        """The raw private key, 32 bytes: secret."""
        return self._private_key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())

    @property
    def private_key(self) -> Ed25519PrivateKey:
        """The key object, for the transport signature."""
        return self._private_key

    def sign_bytes(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature of a message (RFC 8032)."""
        return self._private_key.sign(message)


def verify_bytes(identity: bytes, signature: bytes, message: bytes) -> None:
    """Check an Ed25519 signature.

    Args:
        identity: 32 bytes, the public key.
        signature: 64 bytes.
        message: What was signed.

    Raises:
        SignatureError: It does not hold, or the key is not a key, or one that anyone could use.
    """
    if identity in _SMALL_ORDER:
        msg = f"{b64u_encode(identity)} is a point of small order: anyone can sign under it"
        raise SignatureError(msg)
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        msg = f"the signature of {b64u_encode(identity)} does not hold"
        raise SignatureError(msg) from error


class Signed(WireModel, Generic[BodyT]):
    """A body with its message signature, as it travels and as it is stored."""

    body: BodyT
    key: Identity
    signature: Bytes64


@dataclass(frozen=True, kw_only=True)
class Verified(Generic[BodyT]):
    """A body whose signature was checked; `signed` is what to store or pass on."""

    body: BodyT
    key: bytes
    signed: Signed[BodyT]


def sign(signer: Signer, name: str, body: BodyT) -> Verified[BodyT]:
    """Sign a body.

    Args:
        signer: Whose signature.
        name: The kind of document, such as `"round"`; part of what is signed.
        body: The document.

    Returns:
        The body with its signature.
    """
    signature = signer.sign_bytes(domain_hash(name, body.as_json()))
    signed = Signed(body=body, key=signer.identity, signature=signature)
    return Verified(body=body, key=signer.identity, signed=signed)


def verify(signed: Signed[BodyT], name: str, *, key: bytes) -> Verified[BodyT]:
    """Check a signed body under the one key that may have signed it.

    Guarantees:
        1. Returns only when `key` signed exactly this body as a document of kind `name`.

    Args:
        signed: What arrived.
        name: The kind of document that is expected.
        key: The pinned identity, 32 bytes.

    Raises:
        SignatureError: Another key, or the signature does not hold.
    """
    if not hmac.compare_digest(signed.key, key):
        msg = (
            f"the {name} document is signed by {b64u_encode(signed.key)}, "
            f"not by the expected {b64u_encode(key)}"
        )
        raise SignatureError(msg)
    verify_bytes(key, signed.signature, domain_hash(name, signed.body.as_json()))
    return Verified(body=signed.body, key=key, signed=signed)


def fingerprint(identity: bytes) -> bytes:
    """16 bytes of SHA-256 of a public key: what an invite carries and people compare."""
    return sha256(identity)[:_FINGERPRINT_BYTES]


def format_fingerprint(identity: bytes) -> str:
    """The fingerprint in groups of four hexadecimal digits, for people."""
    text = fingerprint(identity).hex()
    return " ".join(text[i : i + 4] for i in range(0, len(text), 4))


@dataclass(frozen=True, kw_only=True)
class Invite:
    """An invite: a secret code, and the fingerprint of the server that it is for."""

    code: bytes
    server_fingerprint: bytes

    def __repr__(self) -> str:
        """The invite without its secret."""
        return f"Invite(server_fingerprint={self.server_fingerprint.hex()})"

    def format(self) -> str:
        """The text that an operator hands to a volunteer."""
        return _INVITE_PREFIX + b64u_encode(self.code + self.server_fingerprint)

    @classmethod
    def parse(cls, text: str) -> "Invite":
        """Read an invite.

        Raises:
            InviteError: Not an invite of this version, or damaged.
        """
        if not text.startswith(_INVITE_PREFIX):
            msg = f"an invite begins with {_INVITE_PREFIX!r}; ask the operator for a new one"
            raise InviteError(msg)
        n_bytes = INVITE_CODE_BYTES + _FINGERPRINT_BYTES
        try:
            data = b64u_decode(text.removeprefix(_INVITE_PREFIX), n_bytes=n_bytes)
        except Exception as error:
            msg = "the invite is damaged; copy it again, whole"
            raise InviteError(msg) from error
        return cls(code=data[:INVITE_CODE_BYTES], server_fingerprint=data[INVITE_CODE_BYTES:])


def invite_id(code: bytes) -> bytes:
    """The public name of an invite code, 32 bytes; reveals nothing of the code."""
    return domain_hash("invite", b64u_encode(code))


class InviteProof(WireModel):
    """Proof of an invite that does not send it."""

    invite: Digest
    mac: Annotated[Digest, Field()]


def prove_invite(code: bytes, *, agent: bytes, server: bytes) -> InviteProof:
    """HMAC-SHA256(code, agent key ‖ server key) (PROTOCOL, "Identities").

    Args:
        code: The secret, `limits.INVITE_CODE_BYTES` long.
        agent: The agent's identity, 32 bytes.
        server: The server's identity, 32 bytes.
    """
    return InviteProof(invite=invite_id(code), mac=hmac.digest(code, agent + server, "sha256"))


def verify_invite(proof: InviteProof, code: bytes, *, agent: bytes, server: bytes) -> None:
    """Check a proof against the code that its `invite` names.

    Raises:
        SignatureError: The proof was not made with this code for these two keys.
    """
    expected = prove_invite(code, agent=agent, server=server)
    if not hmac.compare_digest(expected.mac, proof.mac) or expected.invite != proof.invite:
        msg = "the invite proof does not hold for this agent and server"
        raise SignatureError(msg)

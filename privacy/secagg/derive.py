"""Keys, seeds and hashes of a cell: pure derivations that agent and server share.

Every `info` begins with `sheepfold/v1/`; salts are T for sealing and T2 for masks, so nothing of
one cell or attempt serves in another (PROTOCOL, "Messages of a masked round").
"""

from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Final, Literal

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privacy.errors import ShareError
from privacy.fixed_point import N_CHECK_WORDS
from privacy.masking import Words, word_dtype
from privacy.shares import SHARE_BYTES
from protocol.masked import Entries, Entry, entries_json
from protocol.version import DOMAIN_PREFIX
from protocol.wire import b64u_encode, domain_hash

KEY_BYTES: Final = 32
_NONCE: Final = bytes(12)
"""Zero: a sealing key seals one message only."""
_CURVE_PRIME: Final = 2**255 - 19
_LOW_ORDER: Final = frozenset(
    bytes.fromhex(point)
    for point in (
        "00" * 32,
        "01" + "00" * 31,
        "ec" + "ff" * 30 + "7f",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    )
)
"""The canonical points of low order of Curve25519 and its twist; Wycheproof, x25519_test."""


class ShareKind(StrEnum):
    """Whose secret a share is of."""

    SELF = "self"
    MASK = "mask"


def bundle_hash(transcript: bytes, shared: Entries) -> bytes:
    """T2 = H("bundle", T, U2)."""
    return domain_hash("bundle", b64u_encode(transcript), entries_json(shared))


def survivors_hash(survivors: Entries) -> bytes:
    """The hash of U3 that a release names for the cell."""
    return domain_hash("survivors", entries_json(survivors))


def confirm_hash(bundle: bytes, survivors: Entries) -> bytes:
    """H("confirm", T2, U3), which a CONFIRM signs."""
    return domain_hash("confirm", b64u_encode(bundle), entries_json(survivors))


def commitment(transcript: bytes, agent: bytes, self_seed: bytes) -> bytes:
    """H("self", T, i, b_i)."""
    return domain_hash("self", b64u_encode(transcript), b64u_encode(agent), b64u_encode(self_seed))


def share_digest(
    transcript: bytes, dealer: bytes, receiver: bytes, kind: ShareKind, share: bytes
) -> bytes:
    """H("share", T, i, j, kind, share)."""
    return domain_hash(
        "share",
        b64u_encode(transcript),
        b64u_encode(dealer),
        b64u_encode(receiver),
        kind.value,
        b64u_encode(share),
    )


def is_canonical_key(key: bytes) -> bool:
    """Whether 32 bytes are the one accepted form of an X25519 public key: below 2^255 − 19."""
    return len(key) == KEY_BYTES and int.from_bytes(key, "little") < _CURVE_PRIME


def agree(private_key: bytes, public_key: bytes) -> bytes:
    """X25519 of a private and a public key, 32 bytes.

    Raises:
        ValueError: The public key is of low order (RFC 7748, section 6.1), or not canonical.
    """
    if not is_canonical_key(public_key):
        msg = "an X25519 public key that is not canonical"
        raise ValueError(msg)
    return X25519PrivateKey.from_private_bytes(private_key).exchange(
        X25519PublicKey.from_public_bytes(public_key)
    )


def public_key_of(private_key: bytes) -> bytes:
    """The X25519 public key, 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()


def is_low_order(public_key: bytes) -> bool:
    """Whether a canonical public key gives everyone the same secret."""
    return public_key in _LOW_ORDER


def seal_shares(
    secret: bytes, plaintext: bytes, *, transcript: bytes, sender: bytes, receiver: bytes
) -> bytes:
    """Seal two shares to their receiver: AES-256-GCM under a key used once.

    Args:
        secret: X25519 of the two sealing keys.
        plaintext: The shares, 66 bytes.
        transcript: T.
        sender: The dealer's identity.
        receiver: The receiver's identity.

    Returns:
        82 bytes.
    """
    key = _sealing_key(secret, transcript, sender, receiver)
    return AESGCM(key).encrypt(_NONCE, plaintext, None)


def open_shares(
    secret: bytes, ciphertext: bytes, *, transcript: bytes, sender: bytes, receiver: bytes
) -> tuple[bytes, bytes]:
    """Open what `seal_shares` sealed.

    Returns:
        The share of the self seed and the share of the masking key.

    Raises:
        ShareError: It does not open.
    """
    key = _sealing_key(secret, transcript, sender, receiver)
    try:
        plaintext = AESGCM(key).decrypt(_NONCE, ciphertext, None)
    except (InvalidTag, ValueError) as error:
        msg = "the ciphertext does not open"
        raise ShareError(msg) from error
    return plaintext[:SHARE_BYTES], plaintext[SHARE_BYTES:]


def _sealing_key(secret: bytes, transcript: bytes, sender: bytes, receiver: bytes) -> bytes:
    return _hkdf(secret, salt=transcript, info=b"seal" + sender + receiver)


def pair_seed(secret: bytes, bundle: bytes, one: bytes, other: bytes) -> bytes:
    """The seed of a pair's mask, the same for both.

    Args:
        secret: X25519 of the two masking keys.
        bundle: T2.
        one: An identity of the pair.
        other: The other one.
    """
    lower, higher = sorted((one, other))
    return _hkdf(secret, salt=bundle, info=b"mask" + lower + higher)


def pair_sign(own: bytes, other: bytes) -> Literal[1, -1]:
    """The lower identity adds a pair's mask, the higher subtracts it."""
    return 1 if own < other else -1


def self_mask_seed(self_seed: bytes, bundle: bytes, agent: bytes) -> bytes:
    """The seed of an agent's own mask, from b_i."""
    return _hkdf(self_seed, salt=bundle, info=b"self" + agent)


def helper_mask_seed(seed: bytes, round_digest: bytes, agent: bytes) -> bytes:
    """The seed of a helper mask, from the seed that is sealed to the helper."""
    return _hkdf(seed, salt=round_digest, info=b"helper" + agent)


def check_words(bundle: bytes, *, word_bits: Literal[16, 32]) -> Words:
    """The check words [16] that each member adds: HKDF(T2, "check").

    Under a helper's masks the round's manifest digest stands in for T2.
    """
    dtype = word_dtype(word_bits)
    raw = _hkdf(bundle, salt=b"", info=b"check", n_bytes=N_CHECK_WORDS * dtype.itemsize)
    words: Words = np.frombuffer(raw, dtype)
    return words


def _hkdf(secret: bytes, *, salt: bytes, info: bytes, n_bytes: int = KEY_BYTES) -> bytes:
    kdf = HKDF(algorithm=SHA256(), length=n_bytes, salt=salt, info=DOMAIN_PREFIX.encode() + info)
    return kdf.derive(secret)


def are_sorted(entries: Sequence[Entry]) -> bool:
    """Whether entries ascend strictly by identity, so that none stands twice."""
    return all(one < other for (one, _), (other, _) in pairwise(entries))

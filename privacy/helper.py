"""Helper masks: seeds sealed to a second operator, and what that operator checks. Pure.

Source: PROTOCOL, "Helper masks"; HPKE, RFC 9180, with the hybrid KEM of ML-KEM-768 and X25519.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from privacy.errors import MaskedMessageError, ShareError
from privacy.secagg import cells, derive
from protocol.blocks import HelperMasking
from protocol.chain import RoundManifest
from protocol.errors import SignatureError
from protocol.helped import HelperDescription, HelperRequest, HelperUpload
from protocol.signing import BodyT, Signed, verify
from protocol.version import DOMAIN_PREFIX
from protocol.wire import b64u_encode, sha256

SEED_BYTES: Final = 32
_MLKEM_SEED_BYTES: Final = 64
_MLKEM_PUBLIC_BYTES: Final = 1184
_SUITE: Final = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


class HelperKey:
    """The helper's private key: 64 bytes of ML-KEM-768's seed, then 32 of X25519. Secret."""

    def __init__(self, data: bytes) -> None:
        """Read the bytes that `generate` drew.

        Raises:
            ValueError: Not 96 bytes.
        """
        if len(data) != _MLKEM_SEED_BYTES + SEED_BYTES:
            msg = f"a helper's key has {_MLKEM_SEED_BYTES + SEED_BYTES} bytes, not {len(data)}"
            raise ValueError(msg)
        self._mlkem = MLKEM768PrivateKey.from_seed_bytes(data[:_MLKEM_SEED_BYTES])
        self._x25519 = X25519PrivateKey.from_private_bytes(data[_MLKEM_SEED_BYTES:])

    @staticmethod
    def generate() -> bytes:
        """Draw a key: its 96 bytes."""
        mlkem, x25519 = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()
        return mlkem.private_bytes_raw() + x25519.private_bytes_raw()

    @property
    def public_bytes(self) -> bytes:
        """1216 bytes: what a manifest pins."""
        mlkem = self._mlkem.public_key().public_bytes_raw()
        return mlkem + self._x25519.public_key().public_bytes_raw()

    def open(self, sealed: bytes, *, context: bytes) -> bytes:
        """Open a sealed seed.

        Raises:
            ShareError: It does not open.
        """
        key = hpke.MLKEM768X25519PrivateKey(self._mlkem, self._x25519)
        try:
            seed = bytes(_SUITE.decrypt(sealed, key, context))
        except (InvalidTag, ValueError) as error:
            msg = "the sealed seed does not open"
            raise ShareError(msg) from error
        if len(seed) != SEED_BYTES:
            msg = f"a seed has {SEED_BYTES} bytes, not {len(seed)}"
            raise ShareError(msg)
        return seed


def seal_seed(seed: bytes, helper_key: bytes, *, context: bytes) -> bytes:
    """Seal a mask's seed to the helper.

    Args:
        seed: 32 bytes from the operating system's generator.
        helper_key: 1216 bytes, from the manifest.
        context: From `seal_context`.

    Returns:
        1168 bytes.

    Raises:
        ValueError: The key is not one.
    """
    key = hpke.MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(helper_key[:_MLKEM_PUBLIC_BYTES]),
        X25519PublicKey.from_public_bytes(helper_key[_MLKEM_PUBLIC_BYTES:]),
    )
    return bytes(_SUITE.encrypt(seed, key, context))


def seal_context(manifest: RoundManifest, agent: bytes) -> bytes:
    """Domain ‖ federation ‖ round ‖ manifest digest ‖ identity: binds a seal to one upload."""
    number = manifest.round.to_bytes(8, "big")
    domain = DOMAIN_PREFIX.encode() + b"helper"
    return domain + manifest.federation + number + manifest.digest() + agent


@dataclass(frozen=True, kw_only=True)
class HelpedCell:
    """A cell whose masks the helper may add up."""

    number: int
    uploads: tuple[HelperUpload, ...]


def check_helped(
    signed: Signed[HelperRequest], *, own: HelperDescription
) -> tuple[HelpedCell, ...]:
    """What a helper checks before it opens a seed.

    Guarantees:
        1. Every upload is signed by a member that the registrar vouches for, for this round and
           for these very keys of the helper; each identity stands once.
        2. The cells are those that the list of uploads yields, none smaller than agreed.

    Args:
        signed: The server's request.
        own: The helper's public keys.

    Returns:
        The cells.

    Raises:
        MaskedMessageError: The first thing that does not hold.
    """
    request = signed.body
    federation = request.federation.body
    _verified(request.federation, "federation", federation.server)
    _verified(signed, "helper-request", federation.server)
    _verified(request.round, "round", federation.server)
    masking, manifest = federation.masking, request.round.body
    if not isinstance(masking, HelperMasking) or (masking.helper, masking.helper_key) != (
        own.helper,
        own.helper_key,
    ):
        msg = "the federation's manifest pins another helper"
        raise MaskedMessageError(msg)
    if manifest.federation_digest != federation.digest():
        msg = "the round belongs to another federation"
        raise MaskedMessageError(msg)
    listed = request.uploads_list
    expected = (federation.federation, manifest.round, manifest.digest())
    if (listed.federation, listed.round, listed.round_digest) != expected:
        msg = "the list of uploads is of another round"
        raise MaskedMessageError(msg)
    by_agent = {upload.header.body.agent: upload for upload in request.uploads}
    entries = tuple((agent, by_agent[agent].header.body.digest()) for agent in sorted(by_agent))
    if len(by_agent) != len(request.uploads) or entries != listed.entries:
        msg = "the list does not name each upload once"
        raise MaskedMessageError(msg)
    for upload in request.uploads:
        _check_upload(upload, manifest, registrar=federation.registrar)
    if len(entries) < masking.min_cell:
        msg = f"{len(entries)} uploads; a cell has at least {masking.min_cell}"
        raise MaskedMessageError(msg)
    return _cut(by_agent, listed_cells=cells.assign(listed, masking.cell_target))


def _cut(
    by_agent: Mapping[bytes, HelperUpload], *, listed_cells: tuple[tuple[bytes, ...], ...]
) -> tuple[HelpedCell, ...]:
    return tuple(
        HelpedCell(number=number, uploads=tuple(by_agent[agent] for agent in identities))
        for number, identities in enumerate(listed_cells)
    )


def _check_upload(upload: HelperUpload, manifest: RoundManifest, *, registrar: bytes) -> None:
    body = upload.header.body
    name = b64u_encode(body.agent)[:12]
    _verified(upload.header, "helper-upload", body.agent)
    _verified(body.credential, "credential", registrar)
    credential = body.credential.body
    faults = {
        "is of another round": (
            (body.federation, body.round, body.round_digest)
            != (manifest.federation, manifest.round, manifest.digest())
        ),
        "shows another's credential": (
            (credential.agent, credential.federation) != (body.agent, body.federation)
        ),
        "shows an expired credential": credential.expires_at < manifest.opened_at,
        "has another sealed seed than it signed": sha256(upload.sealed) != body.sealed_sha256,
        "has another size": body.body_n_bytes != manifest.update_n_bytes,
    }
    for fault, found in faults.items():
        if found:
            msg = f"the upload of {name} {fault}"
            raise MaskedMessageError(msg)


def mask_seed(seed: bytes, manifest: RoundManifest, agent: bytes) -> bytes:
    """The seed of the mask's stream: HKDF(s, salt manifest digest, info "helper" ‖ identity)."""
    return derive.helper_mask_seed(seed, manifest.digest(), agent)


def _verified(signed: Signed[BodyT], name: str, key: bytes) -> None:
    try:
        verify(signed, name, key=key)
    except SignatureError as error:
        raise MaskedMessageError(str(error)) from error

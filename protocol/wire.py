"""Bytes and JSON in the one accepted form: base64url, RFC 8785, SHA-256 with a domain.

Every hash that is signed or compared is `domain_hash(name, …)`, the SHA-256 of the canonical JSON
array `["sheepfold/v1/" + name, …]`, so a hash made for one purpose never serves another.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias, TypeVar

import rfc8785
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from protocol.errors import EncodingError, ManifestError
from protocol.limits import MAX_JSON_BYTES
from protocol.version import DOMAIN_PREFIX

JsonValue: TypeAlias = (
    "str | int | float | bool | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
)
ModelT = TypeVar("ModelT", bound=BaseModel)


def b64u_encode(data: bytes) -> str:
    """Unpadded base64url (RFC 4648, section 5)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def b64u_decode(text: str, *, n_bytes: int | None = None) -> bytes:
    """Decode unpadded base64url, accepting only the form that `b64u_encode` writes.

    Args:
        text: The encoded bytes; padding, white space and stray low bits are refused.
        n_bytes: The length that the result must have, if it is fixed.

    Raises:
        EncodingError: Not canonical unpadded base64url, or of another length.
    """
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError as error:
        msg = f"not base64url: {text[:60]!r}"
        raise EncodingError(msg) from error
    if b64u_encode(data) != text:
        msg = f"not canonical unpadded base64url: {text[:60]!r}"
        raise EncodingError(msg)
    if n_bytes is not None and len(data) != n_bytes:
        msg = f"{len(data)} bytes where exactly {n_bytes} are expected: {text[:60]!r}"
        raise EncodingError(msg)
    return data


def canonical_json(value: JsonValue) -> bytes:
    """The canonical JSON of a value (RFC 8785).

    Raises:
        EncodingError: NaN, infinity, an integer beyond 2^53 or an unsupported type.
    """
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as error:
        msg = f"cannot be written as canonical JSON: {error}"
        raise EncodingError(msg) from error


def domain_hash(name: str, *values: JsonValue) -> bytes:
    """`H(name, …)`: SHA-256 of the canonical array `["sheepfold/v1/" + name, …]`.

    Args:
        name: The purpose, such as `"round"`; part of what is hashed.
        values: JSON values; binary ones as base64url.

    Returns:
        32 bytes.

    Raises:
        EncodingError: A value has no canonical JSON.

    Source: PROTOCOL, "Bytes".
    """
    return hashlib.sha256(canonical_json([DOMAIN_PREFIX + name, *values])).digest()


def sha256(data: bytes) -> bytes:
    """The SHA-256 digest of `data`, 32 bytes."""
    return hashlib.sha256(data).digest()


def _binary(n_bytes: int) -> Any:  # noqa: ANN401 - pydantic's annotation markers share no type
    def decode(value: object) -> bytes:
        if isinstance(value, bytes):
            if len(value) != n_bytes:
                msg = f"{len(value)} bytes where exactly {n_bytes} are expected"
                raise ValueError(msg)
            return value
        if not isinstance(value, str):
            msg = f"expected {n_bytes} bytes as unpadded base64url"
            raise ValueError(msg)  # noqa: TRY004 - pydantic turns ValueError into its own report
        try:
            return b64u_decode(value, n_bytes=n_bytes)
        except EncodingError as error:
            raise ValueError(str(error)) from error

    return BeforeValidator(decode)


_as_b64u = PlainSerializer(b64u_encode, return_type=str, when_used="json")

Bytes32 = Annotated[bytes, _binary(32), _as_b64u]
"""32 bytes; 43 characters of base64url in JSON: SHA-256 digests, keys, seeds."""

Bytes64 = Annotated[bytes, _binary(64), _as_b64u]
"""64 bytes; 86 characters of base64url in JSON: Ed25519 signatures."""

Bytes33 = Annotated[bytes, _binary(33), _as_b64u]
"""33 bytes; 44 characters of base64url in JSON: a Shamir share modulo 2^256 + 297."""

Bytes1168 = Annotated[bytes, _binary(1168), _as_b64u]
"""1168 bytes in JSON: a seed sealed with HPKE, ML-KEM-768 + X25519 and AES-256-GCM."""

Bytes1216 = Annotated[bytes, _binary(1216), _as_b64u]
"""1216 bytes in JSON: a public key of ML-KEM-768, then one of X25519."""

Bytes82 = Annotated[bytes, _binary(82), _as_b64u]
"""82 bytes; 110 characters of base64url in JSON: two sealed shares with their tag."""

Bytes16 = Annotated[bytes, _binary(16), _as_b64u]
"""16 bytes; 22 characters of base64url in JSON: federation ids, nonces."""

Identity = Bytes32
"""An agent or server: the raw bytes of its Ed25519 public key, compared as bytes."""

Digest = Bytes32
"""A SHA-256 digest."""


def is_none(value: object) -> bool:
    """A later key is left out where it says nothing, so that what was signed stays the same."""
    return value is None


class WireModel(BaseModel):
    """A frozen message: unknown keys, wrong types and non-finite numbers are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="strings",
        validate_default=True,
    )

    def as_json(self) -> dict[str, JsonValue]:
        """The JSON object of this message; binary fields as base64url."""
        return self.model_dump(mode="json")

    def canonical(self) -> bytes:
        """The canonical JSON (RFC 8785) of this message: what is sent and stored."""
        return canonical_json(self.as_json())


def parse(model: type[ModelT], data: bytes | str, *, max_bytes: int = MAX_JSON_BYTES) -> ModelT:
    """Read a message from JSON bytes.

    Args:
        model: The message's type.
        data: At most `max_bytes` of JSON.
        max_bytes: The limit.

    Raises:
        EncodingError: Too long.
        ManifestError: Not JSON, or a field that is missing, unknown or out of range; the error
            names the first such field, its value and what is accepted.
    """
    if len(data) > max_bytes:
        msg = f"a JSON body of {len(data)} bytes; the limit is {max_bytes}"
        raise EncodingError(msg)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise ManifestError(explain(model.__name__, error)) from error


def explain(what: str, error: ValidationError) -> str:
    """One sentence for a validation error: the field, what was given, what is accepted."""
    first = error.errors(include_url=False)[0]
    loc, value = first["loc"], first["input"]
    if first["type"] == "union_tag_invalid":  # the tag is what is wrong, not the whole block
        tag = str(first["ctx"]["discriminator"]).strip("'")
        loc, value = (*loc, tag), first["ctx"]["tag"]
    where = ".".join(str(part) for part in loc) or "(the whole)"
    more = error.error_count() - 1
    # A whole block is no help where the sentence of one of its own rules names the values.
    told = first["type"] == "missing" or isinstance(value, Mapping)
    given = "" if told else f" (given: {str(value)[:80]!r})"
    suffix = f"; and {more} more" if more else ""
    sentence = first["msg"].removeprefix("Value error, ")
    return f"{what}: {where}: {sentence}{given}{suffix}"

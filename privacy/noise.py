"""Randomness that nobody can predict: a stream of AES-256-CTR under a key of the system's CSPRNG.

Used for the rounding of masked updates, and for the noise and the sampling of differential privacy.
`numpy.random` is not for secrets, and reading the system's generator for each value would be slow.

Source: NIST SP 800-38A (CTR), SP 800-90A for the idea of a block cipher as generator.
"""

import hashlib
import hmac
import math
import os
from typing import Final, Self

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

KEY_BYTES: Final = 32
_ZERO_COUNTER: Final = bytes(16)
_UINT32_SCALE: Final = 2.0**-32
_UINT53_SCALE: Final = 2.0**-53
_N_DRAWS: Final = 4
_CHUNK_VALUES: Final = 1 << 16


class SecureStream:
    """Uniform random numbers from one key, in order; a key is used for one stream only.

    Guarantees:
        1. Equal keys give equal numbers on every machine.
        2. Without the key, the numbers cannot be told from uniform ones (AES-256 as a PRF).

    Args:
        key: 32 bytes; None draws them from the operating system.

    Raises:
        ValueError: A key of another length.
    """

    def __init__(self, key: bytes | None = None) -> None:
        """Begin at the stream's start."""
        secret = os.urandom(KEY_BYTES) if key is None else key
        if len(secret) != KEY_BYTES:
            msg = f"a stream's key has {KEY_BYTES} bytes, not {len(secret)}"
            raise ValueError(msg)
        self._cipher = Cipher(AES(secret), CTR(_ZERO_COUNTER)).encryptor()
        self._zeros, self._buffer = b"", bytearray()

    @classmethod
    def of(cls, secret: bytes, purpose: str, number: int) -> Self:
        """The stream of one purpose and number under a secret: independent of all its others.

        Args:
            secret: At least 32 bytes that nobody else knows.
            purpose: What the numbers are for.
            number: Which stream of that purpose, such as a step; at least 0.

        Raises:
            ValueError: A secret that is too short.
        """
        if len(secret) < KEY_BYTES:
            msg = f"a secret has at least {KEY_BYTES} bytes, not {len(secret)}"
            raise ValueError(msg)
        message = purpose.encode() + b"\0" + number.to_bytes(8, "big")
        return cls(hmac.digest(secret, message, hashlib.sha256))

    def take_bytes(self, n_bytes: int) -> bytes:
        """The next `n_bytes` bytes."""
        return self._cipher.update(bytes(n_bytes))

    def uniform(self, n_values: int) -> NDArray[np.float64]:
        """The next values [n_values] float64, multiples of 2^-32 in [0, 1)."""
        values = np.empty(n_values, np.float64)
        self.fill_uniform(values)
        return values

    def fill_uniform(self, values: NDArray[np.float64]) -> None:
        """Write the next values into `values`: the same as `uniform` gives, without new memory."""
        n_bytes = 4 * len(values)
        if len(self._buffer) < n_bytes:
            self._zeros, self._buffer = bytes(n_bytes), bytearray(n_bytes)
        self._cipher.update_into(memoryview(self._zeros)[:n_bytes], self._buffer)
        # Two passes: converting and multiplying in one is three times slower in NumPy.
        np.copyto(values, np.frombuffer(self._buffer, "<u4", len(values)))
        values *= _UINT32_SCALE

    def fill_normal(self, values: NDArray[np.float64]) -> None:
        """Write standard normal values [n_values] into `values`.

        Each is the sum of four draws over 2. A single draw in floating point reaches only some of
        its neighbours, which of them tells of the value that it is added to; the sum of several
        hides that at the cost of the draws.

        Source: Box and Muller (1958) for a draw, of uniform numbers with 53 bits; Holohan and
        Braghin, "Secure random sampling in differential privacy" (arXiv 2112.05307), for the sum.
        """
        for start in range(0, len(values), _CHUNK_VALUES):
            chunk = values[start : start + _CHUNK_VALUES]
            n_pairs = -(-len(chunk) // 2)
            # Few calls on large arrays: threads that do this hinder a training beside them least.
            uniform = self._open_uniform(2 * _N_DRAWS * n_pairs).reshape(2, _N_DRAWS, n_pairs)
            radius, angle = uniform[0], uniform[1]
            np.log(radius, out=radius)
            radius *= -2.0 / _N_DRAWS
            np.sqrt(radius, out=radius)
            angle *= 2.0 * math.pi
            first = np.cos(angle)
            first *= radius
            second = np.sin(angle, out=angle)
            second *= radius
            first.sum(0, out=chunk[:n_pairs])
            chunk[n_pairs:] = second.sum(0)[: len(chunk) - n_pairs]

    def _open_uniform(self, n_values: int) -> NDArray[np.float64]:
        """Odd multiples of 2^-54 in (0, 1)."""
        bits = np.frombuffer(self.take_bytes(8 * n_values), "<u8") >> np.uint64(11)
        values = bits.astype(np.float64)
        values += 0.5
        values *= _UINT53_SCALE
        return values

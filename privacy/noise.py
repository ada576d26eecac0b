"""Randomness that nobody can predict: a stream of AES-256-CTR under a key of the system's CSPRNG.

Used for the rounding of masked updates. `numpy.random` is not for secrets, and reading the system's
generator for each value would be slow.

Source: NIST SP 800-38A (CTR), SP 800-90A for the idea of a block cipher as generator.
"""

import os
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

KEY_BYTES: Final = 32
_ZERO_COUNTER: Final = bytes(16)
_UINT32_SCALE: Final = 2.0**-32


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

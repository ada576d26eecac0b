"""Mask streams: AES-256-CTR from a 32-byte seed, added to words in chunks that fit the cache.

A mask is the key stream of AES-256 in counter mode from a zero counter, read as little-endian words
of Z_2^k. The lower identity of a pair adds it and the higher subtracts it, so it vanishes in their
sum (PROTOCOL, "Masks"; Bonawitz et al., CCS 2017, section 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]
"""Words of Z_2^16 or Z_2^32: sums wrap, which is the arithmetic that masks need."""

SEED_BYTES: Final = 32
_BLOCK_BYTES: Final = 16
CHUNK_BYTES: Final = 256 * 1024
"""Of a stream: larger chunks leave the cache, smaller ones pay more calls of the cipher."""


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A mask: its seed, and whether it is added or subtracted."""

    seed: bytes
    sign: Literal[1, -1]

    def __repr__(self) -> str:
        """The mask without its secret."""
        return f"Mask(sign={self.sign})"


def word_dtype(word_bits: Literal[16, 32]) -> Any:  # noqa: ANN401 - one of two dtypes, of Words
    """The type of a little-endian word of k bits."""
    return np.dtype("<u2") if word_bits == 16 else np.dtype("<u4")


class MaskAdder:
    """Adds the sum of several masks to consecutive runs of one vector.

    Guarantees:
        1. However the vector is cut into runs, the result is the same.
        2. Besides the runs it holds one chunk and one cipher state for each mask.

    Args:
        masks: What to add; their order does not matter.
        start_word: Where in the vector the first run begins; a multiple of 16 bytes.
        word_bits: k.

    Raises:
        ValueError: A seed is not 32 bytes long, or `start_word` lies within a cipher block.
    """

    def __init__(
        self, masks: Sequence[Mask], *, word_bits: Literal[16, 32], start_word: int = 0
    ) -> None:
        """Open one stream for each mask."""
        start_byte = start_word * word_bits // 8
        block, rest = divmod(start_byte, _BLOCK_BYTES)
        if rest:
            msg = f"word {start_word} lies within a block of {_BLOCK_BYTES} bytes"
            raise ValueError(msg)
        counter = block.to_bytes(_BLOCK_BYTES, "big")
        self._dtype = word_dtype(word_bits)
        self._streams = []
        for mask in masks:
            if len(mask.seed) != SEED_BYTES:
                msg = f"a mask's seed has {SEED_BYTES} bytes, not {len(mask.seed)}"
                raise ValueError(msg)
            self._streams.append((Cipher(AES(mask.seed), CTR(counter)).encryptor(), mask.sign))
        self._zeros = bytes(CHUNK_BYTES)
        self._buffer = bytearray(CHUNK_BYTES)

    def add(self, words: Words) -> None:
        """Add the next run of the masks to `words`, in place.

        Args:
            words: [n] of the vector's type, contiguous.

        Raises:
            ValueError: Another type of words.
        """
        if words.dtype != self._dtype:
            msg = f"words of {words.dtype}, masks of {self._dtype}"
            raise ValueError(msg)
        stream = np.frombuffer(self._buffer, self._dtype)
        zeros = memoryview(self._zeros)
        n_chunk = len(stream)
        for start in range(0, len(words), n_chunk):
            run = words[start : start + n_chunk]
            n_bytes = run.nbytes
            view = stream[: len(run)]
            for cipher, sign in self._streams:
                cipher.update_into(zeros[:n_bytes], self._buffer)
                if sign > 0:
                    np.add(run, view, out=run)
                else:
                    np.subtract(run, view, out=run)


def expand(seed: bytes, n_words: int, *, word_bits: Literal[16, 32]) -> Words:
    """A whole mask [n_words].

    Raises:
        ValueError: The seed is not 32 bytes long.
    """
    words = np.zeros(n_words, word_dtype(word_bits))
    MaskAdder([Mask(seed=seed, sign=1)], word_bits=word_bits).add(words)
    return words

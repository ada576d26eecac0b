"""Adds up the masked vectors of a cell and removes their masks, a slice at a time.

A slice of the sum is independent of every other one: it needs the same slice of each vector, and
the same part of each mask's stream. So slices are shared among processes (the cipher holds the
interpreter's lock), and nothing ever holds more than one slice of one vector beside the sum's.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, TypeAlias

import numpy as np

from privacy.masking import Mask, MaskAdder, Words, word_dtype

ReadSlice: TypeAlias = Callable[[int, int], Iterator[bytes | memoryview]]
"""Reads bytes `start` to `stop` of each member's vector, one member after the other."""

SLICE_BYTES: Final = 4 * 1024 * 1024
"""As large as a part of an upload, so that a slice is one read of each vector."""
_ALONE_BYTES: Final = 64 * 1024 * 1024
"""Less stream than this is expanded sooner than a process starts."""


@dataclass(frozen=True, kw_only=True)
class _Slice:
    start: int
    stop: int


class Unmasker:
    """Unmasks sums with one or several processes.

    Guarantees:
        1. The sum does not depend on the number of processes or on the size of a slice.

    Args:
        n_processes: How many share the work; 1 works in this process alone.
    """

    def __init__(self, n_processes: int = 1) -> None:
        """Start nothing yet: processes start with the first sum that is worth it."""
        self._n_processes = n_processes
        self._pool: Executor | None = None

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def unmask(
        self,
        read: ReadSlice,
        masks: Sequence[Mask],
        *,
        n_words: int,
        word_bits: Literal[16, 32],
        slice_bytes: int = SLICE_BYTES,
    ) -> Words:
        """Σ of the vectors plus Σ of the masks, in Z_2^k.

        Args:
            read: Of the vectors; pickled to other processes, so a function with plain values.
            masks: With the signs that remove them.
            n_words: Length of each vector.
            word_bits: k.
            slice_bytes: A multiple of 16.

        Returns:
            [n_words].

        Raises:
            Exception: Whatever `read` raises.
        """
        item = word_bits // 8
        step = slice_bytes // item
        slices = [
            _Slice(start=start, stop=min(start + step, n_words))
            for start in range(0, n_words, step)
        ]
        work = partial(_sum_slice, read, tuple(masks), word_bits)
        total = np.empty(n_words, word_dtype(word_bits))
        worth_it = len(slices) > 1 and len(masks) * n_words * item > _ALONE_BYTES
        try:
            if self._n_processes > 1 and worth_it:
                done: Iterator[Words] = self._processes().map(work, slices)
            else:
                done = map(work, slices)
            for part, words in zip(slices, done, strict=True):
                total[part.start : part.stop] = words
        except BrokenProcessPool:
            self.close()  # a process was killed: the next sum starts new ones
            raise
        return total

    def _processes(self) -> Executor:
        if self._pool is None:
            # Not a fork: this process has threads, which a fork would leave half-way.
            self._pool = ProcessPoolExecutor(
                self._n_processes, mp_context=multiprocessing.get_context("spawn")
            )
        return self._pool


def _sum_slice(
    read: ReadSlice, masks: tuple[Mask, ...], word_bits: Literal[16, 32], part: _Slice
) -> Words:
    dtype = word_dtype(word_bits)
    item = dtype.itemsize
    total = np.zeros(part.stop - part.start, dtype)
    for data in read(part.start * item, part.stop * item):
        total += np.frombuffer(data, dtype)
    MaskAdder(masks, word_bits=word_bits, start_word=part.start).add(total)
    return total

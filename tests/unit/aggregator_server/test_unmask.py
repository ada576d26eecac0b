"""Guarantee 1 of `Unmasker`: the sum depends neither on the processes nor on the slices."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from aggregator_server import unmask as unmask_module
from aggregator_server.unmask import Unmasker
from privacy.masking import Mask, MaskAdder, word_dtype

N_MEMBERS = 5
N_WORDS = 10_007  # no multiple of any slice


@dataclass(frozen=True)
class Vectors:
    """Reads slices of files, as the server does; it travels to other processes."""

    paths: tuple[Path, ...]

    def __call__(self, start: int, stop: int) -> Iterator[bytes]:
        for path in self.paths:
            with path.open("rb") as file:
                file.seek(start)
                yield file.read(stop - start)


def lost_file(start: int, stop: int) -> Iterator[bytes]:
    msg = f"no bytes {start} to {stop}"
    raise OSError(msg)


@pytest.fixture(params=[16, 32])
def word_bits(request):
    return request.param


@pytest.fixture
def masked(tmp_path, word_bits):
    """Masked vectors in files, the masks that take theirs off, the sum of the payloads."""
    dtype = word_dtype(word_bits)
    draws = np.random.default_rng(word_bits)
    top = np.iinfo(dtype).max
    payloads = draws.integers(0, top, (N_MEMBERS, N_WORDS), dtype, endpoint=True)
    seeds = [os.urandom(32) for _ in payloads]
    paths = []
    for n, (payload, seed) in enumerate(zip(payloads, seeds, strict=True)):
        words = payload.copy()
        MaskAdder([Mask(seed=seed, sign=1)], word_bits=word_bits).add(words)
        path = tmp_path / str(n)
        path.write_bytes(words.tobytes())
        paths.append(path)
    masks = [Mask(seed=seed, sign=-1) for seed in seeds]
    return Vectors(tuple(paths)), masks, payloads.sum(axis=0, dtype=dtype)


@pytest.mark.parametrize("slice_bytes", [16, 4096, 1 << 22])
def test_the_sum_is_exact_whatever_the_slices(masked, word_bits, slice_bytes):
    read, masks, expected = masked
    total = Unmasker().unmask(
        read, masks, n_words=N_WORDS, word_bits=word_bits, slice_bytes=slice_bytes
    )
    np.testing.assert_array_equal(total, expected)


def test_several_processes_give_the_same_sum(masked, word_bits, monkeypatch):
    monkeypatch.setattr(unmask_module, "_ALONE_BYTES", 0)
    read, masks, expected = masked
    unmasker = Unmasker(2)
    try:
        total = unmasker.unmask(read, masks, n_words=N_WORDS, word_bits=word_bits, slice_bytes=4096)
        assert unmasker._pool is not None
    finally:
        unmasker.close()
    np.testing.assert_array_equal(total, expected)


def test_a_small_sum_starts_no_process(masked, word_bits):
    read, masks, _ = masked
    unmasker = Unmasker(2)
    unmasker.unmask(read, masks, n_words=N_WORDS, word_bits=word_bits, slice_bytes=4096)
    assert unmasker._pool is None


def test_a_mask_that_stays_leaves_a_sum_that_is_noise(masked, word_bits):
    read, masks, expected = masked
    total = Unmasker().unmask(read, masks[1:], n_words=N_WORDS, word_bits=word_bits)
    assert (total == expected).mean() < 0.01


def test_a_vector_that_cannot_be_read_is_an_error_and_no_sum():
    with pytest.raises(OSError, match="no bytes 0 to"):
        Unmasker().unmask(lost_file, [], n_words=N_WORDS, word_bits=16)

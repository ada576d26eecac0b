"""Guarantee 1 of `Unmasker`: the sum depends neither on the processes nor on the slices."""

import os
import tracemalloc
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from aggregator_server import unmask as unmask_module
from aggregator_server.blobs import FolderBlobs
from aggregator_server.errors import AggregationError, BlobMissingError
from aggregator_server.masking.vectors import PartReader, StoredPart
from aggregator_server.unmask import SLICE_BYTES, Unmasker
from privacy.masking import Mask, MaskAdder, word_dtype
from protocol.limits import PART_BYTES
from protocol.wire import sha256

N_MEMBERS = 5
N_WORDS = 10_007  # no multiple of any slice


@dataclass(frozen=True)
class Vectors:
    """Reads slices of files, of any size."""

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


def test_the_sum_is_the_same_in_whatever_order_vectors_and_masks_are_given(masked, word_bits):
    read, masks, expected = masked
    total = Unmasker().unmask(
        Vectors(read.paths[::-1]), [*masks[2:], *masks[:2]], n_words=N_WORDS, word_bits=word_bits
    )
    np.testing.assert_array_equal(total, expected)


# Parts among the blobs, as uploads leave them

N_PART_WORDS = PART_BYTES // 2
N_STORED_WORDS = N_PART_WORDS + 1003  # a whole part and a short one


@pytest.fixture
def stored(tmp_path):
    """Two masked vectors of two parts each among the blobs: reader, masks, sum of the payloads."""
    blobs = FolderBlobs(tmp_path / "blobs", min_free_bytes=0)
    draws = np.random.default_rng(2)
    vectors, masks = [], []
    expected = np.zeros(N_STORED_WORDS, np.uint16)
    for member in range(2):
        words = draws.integers(0, 2**16, N_STORED_WORDS, np.uint16)
        expected += words
        seed = os.urandom(32)
        MaskAdder([Mask(seed=seed, sign=1)], word_bits=16).add(words)
        masks.append(Mask(seed=seed, sign=-1))
        data, parts = words.tobytes(), []
        for n, start in enumerate(range(0, len(data), PART_BYTES)):
            part = data[start : start + PART_BYTES]
            key = f"uploads/{member}/{n}"
            blobs.put(key, part)
            parts.append(StoredPart(key=key, sha256=sha256(part)))
        vectors.append(tuple(parts))
    return PartReader(blobs=blobs, vectors=tuple(vectors)), masks, expected


@pytest.mark.parametrize("n_processes", [1, 2])
def test_several_processes_give_the_same_sum_as_one(stored, n_processes, monkeypatch):
    assert SLICE_BYTES == PART_BYTES  # a slice is one part of each vector
    monkeypatch.setattr(unmask_module, "_ALONE_BYTES", 0)
    read, masks, expected = stored
    unmasker = Unmasker(n_processes)
    try:
        total = unmasker.unmask(read, masks, n_words=N_STORED_WORDS, word_bits=16)
        assert (unmasker._pool is None) is (n_processes == 1)
    finally:
        unmasker.close()
    np.testing.assert_array_equal(total, expected)


def test_an_unmasker_that_was_closed_starts_its_processes_again(stored, monkeypatch):
    monkeypatch.setattr(unmask_module, "_ALONE_BYTES", 0)
    read, masks, expected = stored
    unmasker = Unmasker(2)
    for _ in range(2):
        total = unmasker.unmask(read, masks, n_words=N_STORED_WORDS, word_bits=16)
        np.testing.assert_array_equal(total, expected)
        unmasker.close()
        assert unmasker._pool is None


def test_a_process_that_was_killed_does_not_stop_the_sums_after_it(stored, monkeypatch):
    """As a system that runs out of memory does; the server is not started anew for it."""
    monkeypatch.setattr(unmask_module, "_ALONE_BYTES", 0)
    read, masks, expected = stored
    unmasker = Unmasker(2)
    try:
        unmasker.unmask(read, masks, n_words=N_STORED_WORDS, word_bits=16)
        for process in list(unmasker._pool._processes.values()):
            process.kill()  # the pool, which sees the first one die, may be quicker with the second
            process.join()
        with suppress(BrokenProcessPool):
            unmasker.unmask(read, masks, n_words=N_STORED_WORDS, word_bits=16)
        total = unmasker.unmask(read, masks, n_words=N_STORED_WORDS, word_bits=16)
    finally:
        unmasker.close()
    np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize(
    ("change", "n_processes"), [("one bit", 1), ("one bit", 2), ("cut", 1), ("longer", 1)]
)
def test_a_part_that_changed_on_disk_is_an_error_and_no_sum(
    stored, tmp_path, change, n_processes, monkeypatch
):
    monkeypatch.setattr(unmask_module, "_ALONE_BYTES", 0)
    read, masks, _ = stored
    path = tmp_path / "blobs" / "uploads" / "1" / "1"
    data = path.read_bytes()
    changed = {
        "one bit": bytes([data[0] ^ 1]) + data[1:],
        "cut": data[:-1],
        "longer": data + b"x",
    }
    path.write_bytes(changed[change])
    unmasker = Unmasker(n_processes)
    try:
        with pytest.raises(AggregationError, match="uploads/1/1 has changed on disk"):
            unmasker.unmask(read, masks, n_words=N_STORED_WORDS, word_bits=16)
    finally:
        unmasker.close()


def test_a_part_that_is_gone_is_an_error_and_no_sum(stored, tmp_path):
    read, masks, _ = stored
    (tmp_path / "blobs" / "uploads" / "0" / "1").unlink()
    with pytest.raises(BlobMissingError):
        Unmasker().unmask(read, masks, n_words=N_STORED_WORDS, word_bits=16)


def test_beside_the_sum_there_is_memory_for_a_few_slices_and_not_for_the_vectors():
    n_words, n_members, n_masks = 20_000_000, 3, 3
    part = bytes(SLICE_BYTES)

    def read(start: int, stop: int) -> Iterator[bytes]:
        for _ in range(n_members):
            yield bytes(memoryview(part)[: stop - start])  # new memory each time, as a read is

    masks = [Mask(seed=bytes([n]) * 32, sign=-1) for n in range(n_masks)]
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        total = Unmasker().unmask(read, masks, n_words=n_words, word_bits=16)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total.nbytes == 2 * n_words
    assert peak - before - total.nbytes < 5 * SLICE_BYTES

"""Mask streams: the standard's bytes as words, however they are cut."""

import itertools
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from privacy import masking
from privacy.masking import CHUNK_BYTES, Mask, MaskAdder, expand, word_dtype

WORD_BITS: list[Any] = [16, 32]
SEEDS = [bytes([i]) * 32 for i in range(4)]
MASKS = [Mask(seed=seed, sign=1 if i % 2 else -1) for i, seed in enumerate(SEEDS)]


def by_hand(seed: bytes, n_words: int, word_bits: int) -> Any:
    """The block cipher of 0, 1, 2, …, read as little-endian words."""
    n_bytes = word_bits // 8
    cipher = Cipher(AES(seed), ECB()).encryptor()
    counters = b"".join(i.to_bytes(16, "big") for i in range(-(-n_words * n_bytes // 16)))
    return np.frombuffer(cipher.update(counters), f"<u{n_bytes}")[:n_words]


def added(n_words: int, cuts: Any, word_bits: Any, masks: Any = MASKS) -> Any:
    words = np.zeros(n_words, word_dtype(word_bits))
    adder = MaskAdder(masks, word_bits=word_bits)
    for start, stop in itertools.pairwise([0, *cuts, n_words]):
        adder.add(words[start:stop])
    return words


@pytest.mark.parametrize("word_bits", WORD_BITS)
def test_a_mask_is_the_key_stream_in_little_endian_words(word_bits: Any) -> None:
    for n_words in (1, 7, 8, 1000):
        words = expand(SEEDS[1], n_words, word_bits=word_bits)
        assert words.dtype == np.dtype(f"<u{word_bits // 8}")
        assert np.array_equal(words, by_hand(SEEDS[1], n_words, word_bits))


@pytest.mark.parametrize("word_bits", WORD_BITS)
def test_masks_are_added_and_subtracted_in_their_ring(word_bits: Any) -> None:
    start = np.arange(500).astype(word_dtype(word_bits))
    words = start.copy()
    MaskAdder(MASKS, word_bits=word_bits).add(words)
    expected = start.astype(object)
    for mask in MASKS:
        expected += mask.sign * by_hand(mask.seed, 500, word_bits).astype(object)
    assert words.tolist() == [int(value) % 2**word_bits for value in expected]


@pytest.mark.parametrize("word_bits", WORD_BITS)
def test_opposite_signs_cancel(word_bits: Any) -> None:
    words = np.arange(999).astype(word_dtype(word_bits))
    turned = [Mask(seed=mask.seed, sign=1 if mask.sign < 0 else -1) for mask in MASKS]
    MaskAdder([*MASKS, *turned], word_bits=word_bits).add(words)
    assert np.array_equal(words, np.arange(999))


@pytest.mark.parametrize("word_bits", WORD_BITS)
@pytest.mark.parametrize(
    "cuts", [[1], [1, 2, 3], [8, 16], [0, 0, 511], range(1, 1000), [333, 999]], ids=str
)
def test_the_cuts_do_not_matter(cuts: Any, word_bits: Any) -> None:
    # Guarantee 1.
    assert np.array_equal(added(1000, cuts, word_bits), added(1000, [], word_bits))


@pytest.mark.parametrize("word_bits", WORD_BITS)
def test_a_vector_of_several_chunks_is_whole(word_bits: Any) -> None:
    # Two chunks and a rest that is no whole block.
    n_words = 2 * CHUNK_BYTES * 8 // word_bits + 5
    words = added(n_words, [], word_bits, MASKS[:2])
    expected = by_hand(SEEDS[1], n_words, word_bits) - by_hand(SEEDS[0], n_words, word_bits)
    assert np.array_equal(words, expected)
    assert np.array_equal(words, added(n_words, [n_words // 3, n_words - 1], word_bits, MASKS[:2]))


@pytest.mark.parametrize("chunk_bytes", [16, 48, 4096])
def test_the_size_of_a_chunk_does_not_matter(
    chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = added(1000, [333], 16)
    monkeypatch.setattr(masking, "CHUNK_BYTES", chunk_bytes)
    assert np.array_equal(added(1000, [333], 16), whole)


def test_the_order_of_the_masks_does_not_matter() -> None:
    for order in itertools.permutations(MASKS):
        assert np.array_equal(added(100, [], 16, order), added(100, [], 16))


@pytest.mark.parametrize("word_bits", WORD_BITS)
def test_a_run_that_begins_in_the_middle_is_the_tail_of_the_whole(word_bits: Any) -> None:
    whole = added(1000, [], word_bits)
    for start in range(0, 1000, 128 // word_bits):
        tail = np.zeros(1000 - start, word_dtype(word_bits))
        MaskAdder(MASKS, word_bits=word_bits, start_word=start).add(tail)
        assert np.array_equal(tail, whole[start:]), start


def test_only_one_chunk_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    # Guarantee 2: what an adder holds does not grow with the vector.
    adder = MaskAdder(MASKS, word_bits=16)
    before = {name: len(held) for name, held in vars(adder).items() if hasattr(held, "__len__")}
    adder.add(np.zeros(CHUNK_BYTES, "<u2"))
    after = {name: len(held) for name, held in vars(adder).items() if hasattr(held, "__len__")}
    assert before == after
    assert max(after.values()) == CHUNK_BYTES
    assert len(adder._streams) == len(MASKS)


@pytest.mark.parametrize(("word_bits", "start"), [(16, 1), (16, 7), (16, 12), (32, 2), (32, 5)])
def test_a_start_within_a_block_is_refused(word_bits: Any, start: int) -> None:
    with pytest.raises(ValueError, match="within a block"):
        MaskAdder(MASKS, word_bits=word_bits, start_word=start)


@pytest.mark.parametrize("size", [0, 16, 24, 31, 33])
def test_a_seed_of_another_length_is_refused(size: int) -> None:
    # 16 and 24 bytes would be keys of AES as well, of a weaker one.
    with pytest.raises(ValueError, match="32 bytes"):
        MaskAdder([Mask(seed=bytes(size), sign=1)], word_bits=16)
    with pytest.raises(ValueError, match="32 bytes"):
        expand(bytes(size), 8, word_bits=16)


@pytest.mark.parametrize(
    ("word_bits", "dtype"), [(16, "<u4"), (32, "<u2"), (16, ">u2"), (16, "<i2"), (32, "<f4")]
)
def test_words_of_another_type_are_refused(word_bits: Any, dtype: str) -> None:
    words = np.zeros(8, dtype)
    with pytest.raises(ValueError, match="words of"):
        MaskAdder(MASKS, word_bits=word_bits).add(words)
    assert not words.any()


@pytest.mark.parametrize("show", [repr, str, "{}".format])
def test_a_mask_does_not_show_its_seed(show: Any) -> None:
    seed = bytes(range(100, 132))
    for shown in (show(Mask(seed=seed, sign=-1)), show([Mask(seed=seed, sign=1)])):
        assert "sign" in shown
        assert not any(form in shown for form in (str(seed), seed.hex(), repr(seed)[2:-1], "seed"))

"""The stream that rounding draws from: known numbers, uniform ones, and never the same twice."""

import math
import os
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from privacy import noise
from privacy.noise import SecureStream

KEY = bytes(range(32))


def blocks(n_blocks: int, key: bytes = KEY) -> bytes:
    """Counter mode by hand: the block cipher of 0, 1, 2, …"""
    cipher = Cipher(AES(key), ECB()).encryptor()
    return b"".join(cipher.update(block.to_bytes(16, "big")) for block in range(n_blocks))


def test_the_same_key_gives_the_same_numbers_everywhere() -> None:
    # Guarantee 1: the bytes are those of the standard, read in one order on every machine.
    expected = blocks(4)
    assert SecureStream(KEY).take_bytes(64) == expected
    words = [int.from_bytes(expected[at : at + 4], "little") for at in range(0, 64, 4)]
    assert SecureStream(KEY).uniform(16).tolist() == [word / 2**32 for word in words]


@pytest.mark.parametrize("cuts", [[64], [1] * 64, [5, 20, 39], [16, 0, 48]])
def test_it_goes_on_where_it_stopped(cuts: list[int]) -> None:
    stream = SecureStream(KEY)
    assert b"".join(stream.take_bytes(n_bytes) for n_bytes in cuts) == blocks(4)


@pytest.mark.parametrize("cuts", [[16], [1] * 16, [3, 12, 1], [8, 0, 8], [5, 11]])
def test_numbers_are_filled_in_as_they_are_given(cuts: list[int]) -> None:
    # In runs that grow and shrink, since what a stream writes into is kept.
    stream, found = SecureStream(KEY), np.full(16, np.nan)
    start = 0
    for n_values in cuts:
        stream.fill_uniform(found[start : start + n_values])
        start += n_values
    assert np.array_equal(found, SecureStream(KEY).uniform(16))


def test_numbers_that_were_given_do_not_change() -> None:
    stream = SecureStream(KEY)
    first = stream.uniform(16)
    before = first.copy()
    stream.uniform(16)
    assert np.array_equal(first, before)


def test_another_key_gives_other_numbers() -> None:
    other = SecureStream(bytes(31) + b"\1").take_bytes(64)
    assert other == blocks(4, bytes(31) + b"\1")
    assert other != blocks(4)


def test_a_new_stream_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # Guarantee 2 rests on the key: 32 bytes of the operating system's generator, each time.
    asked = []

    def urandom(n_bytes: int) -> bytes:
        asked.append(n_bytes)
        return os.urandom(n_bytes)

    class FakeOs:
        pass

    fake: Any = FakeOs()
    fake.urandom = urandom
    monkeypatch.setattr(noise, "os", fake)
    first, second = SecureStream().take_bytes(64), SecureStream().take_bytes(64)
    assert asked == [32, 32]
    assert first != second


def test_numbers_are_multiples_of_2_to_the_minus_32_from_0_to_1_without_1() -> None:
    numbers = SecureStream(KEY).uniform(100_000)
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    scaled = numbers * 2.0**32
    assert np.array_equal(scaled, np.floor(scaled))
    assert len(np.unique(scaled % 2**16)) > 45_000  # the low bits are not constant


def far_from_uniform(numbers: Any) -> bool:
    """Whether 256 equal bins hold counts that uniform numbers have once in 10^9 tries."""
    counts = np.bincount((numbers * 256).astype(np.int64), minlength=256)
    expected = len(numbers) / 256
    return bool(((counts - expected) ** 2 / expected).sum() > 410.0)  # χ² with 255 degrees


def test_numbers_are_uniform() -> None:
    numbers = SecureStream(KEY).uniform(1 << 18)
    assert not far_from_uniform(numbers)
    assert abs(numbers.mean() - 0.5) < 5 / np.sqrt(12 * len(numbers))


@pytest.mark.parametrize(
    "bias", [lambda u: u * u, lambda u: np.maximum(u, 0.01), lambda u: np.floor(u * 100) / 100]
)
def test_the_test_of_uniform_numbers_can_fail(bias: Any) -> None:
    assert far_from_uniform(bias(SecureStream(KEY).uniform(1 << 18)))


def test_none_is_none() -> None:
    stream = SecureStream(KEY)
    assert stream.take_bytes(0) == b""
    assert stream.uniform(0).shape == (0,)
    assert stream.take_bytes(64) == blocks(4)


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


@pytest.mark.parametrize("n_values", [1, 2, 65_535, 65_537])
def test_every_place_gets_a_normal_value(n_values: int) -> None:
    values = np.full(n_values, np.nan)
    SecureStream(KEY).fill_normal(values)
    assert np.isfinite(values).all()
    assert len(np.unique(values)) == n_values


def test_normal_values_have_the_normal_distribution() -> None:
    values = np.empty(300_000)
    SecureStream(KEY).fill_normal(values)
    edges = np.linspace(-3.5, 3.5, 41)
    counts = np.histogram(values, np.concatenate([[-np.inf], edges, [np.inf]]))[0]
    cdf = np.array([0.0, *map(normal_cdf, edges), 1.0])
    expected = np.diff(cdf) * len(values)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    n_free = len(counts) - 1
    assert abs(chi_square - n_free) < 5 * math.sqrt(2 * n_free)
    assert np.abs(values).max() > 4.0, "the tails are missing"
    # Halves of a pair come from one radius; they must not show it.
    assert abs(np.corrcoef(values[::2] ** 2, values[1::2] ** 2)[0, 1]) < 0.01
    half = 65_536 // 2
    assert abs(np.corrcoef(values[:half] ** 2, values[half : 2 * half] ** 2)[0, 1]) < 0.03


def test_streams_of_other_purposes_numbers_and_secrets_differ() -> None:
    found = {
        SecureStream.of(secret, purpose, number).take_bytes(32)
        for secret in (bytes(32), KEY)
        for purpose in ("noise", "sampling")
        for number in (0, 1, 2**40)
    }
    assert len(found) == 12
    assert SecureStream.of(KEY, "noise", 1).take_bytes(32) in found
    with pytest.raises(ValueError, match="at least 32 bytes, not 31"):
        SecureStream.of(bytes(31), "noise", 0)

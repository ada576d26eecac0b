"""Sketches keep inner products whatever an agent who does not know the seed sends."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator_server.aggregation.robust.sketch import Sketcher
from aggregator_server.errors import AggregationError
from privacy.noise import SecureStream

N_DIMS = 64
N_SEEDS = 2000


def seed_of(number):
    return number.to_bytes(32, "big")


def products(x, y, *, n_dims=N_DIMS, n_seeds=N_SEEDS):
    """⟨Sx, Sy⟩ over many seeds."""
    found = np.empty(n_seeds)
    for number in range(n_seeds):
        sketcher = Sketcher(seed_of(number), n_values=len(x), n_dims=n_dims)
        found[number] = sketcher.sketch(x) @ sketcher.sketch(y)
    return found


def one_bucket(n_values, n_dims):
    """All energy where blocks that are only added up would collect it in one number."""
    x = np.zeros(n_values, np.float32)
    x[17::n_dims] = 1.0
    return x / np.linalg.norm(x)


def dense(n_values, *, seed):
    x = np.random.default_rng(seed).standard_normal(n_values).astype(np.float32)
    return x / np.linalg.norm(x)


@given(
    n_values=st.integers(1, 700),
    log_dims=st.integers(3, 7),
    seed=st.binary(min_size=32, max_size=32),
)
def test_a_sketch_is_the_signed_and_rotated_sum_of_the_blocks(n_values, log_dims, seed):
    n_dims = 1 << log_dims
    x = np.random.default_rng(n_values).standard_normal(n_values).astype(np.float32)
    packed = SecureStream.of(seed, "sketch signs", 0).take_bytes(-(-n_values // 8))
    signs = 1.0 - 2.0 * np.unpackbits(np.frombuffer(packed, np.uint8))[:n_values]
    words = SecureStream.of(seed, "sketch offsets", 0).take_bytes(4 * -(-n_values // n_dims))
    expected = np.zeros(n_dims)
    for index in range(n_values):
        block, place = divmod(index, n_dims)
        offset = int.from_bytes(words[4 * block : 4 * block + 4], "little")
        expected[(place + offset) % n_dims] += signs[index] * x[index]
    found = Sketcher(seed, n_values=n_values, n_dims=n_dims).sketch(x)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_sketch_of_many_chunks_equals_the_sketch_of_its_parts_added_up():
    n_values, n_dims = (1 << 15) * 2 + 4096 + 5, 4096
    sketcher = Sketcher(seed_of(1), n_values=n_values, n_dims=n_dims)
    x = dense(n_values, seed=0)
    total = np.zeros(n_dims)
    for start in range(0, n_values, 5000):
        part = np.zeros_like(x)
        part[start : start + 5000] = x[start : start + 5000]
        total += sketcher.sketch(part)
    np.testing.assert_allclose(sketcher.sketch(x), total, atol=1e-12)


def test_sketches_are_linear():
    sketcher = Sketcher(seed_of(3), n_values=1000, n_dims=N_DIMS)
    x, y = dense(1000, seed=0), dense(1000, seed=1)
    np.testing.assert_allclose(
        sketcher.sketch(2 * x - 4 * y), 2 * sketcher.sketch(x) - 4 * sketcher.sketch(y), atol=1e-6
    )


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (dense(1000, seed=0), dense(1000, seed=0)),
        (dense(1000, seed=0), dense(1000, seed=1)),
        (one_bucket(4000, N_DIMS), one_bucket(4000, N_DIMS)),
        (one_bucket(4000, N_DIMS), dense(4000, seed=1)),
    ],
    ids=["norm", "product", "norm of one bucket", "product with one bucket"],
)
def test_inner_products_are_unbiased_and_their_variance_is_as_stated(x, y):
    found = products(x, y)
    expected = float(x @ y)
    bound = (1.0 + expected**2) / N_DIMS
    assert abs(found.mean() - expected) < 4 * np.sqrt(bound / N_SEEDS)
    # Of 2000 draws a variance is right to 3.2 % (more with heavy tails); not half of the bound
    # either, as every pair of these vectors meets with probability close to 1/64.
    assert 0.6 * bound < found.var() < 1.2 * bound


def test_hiding_energy_in_one_bucket_of_a_known_layout_does_not_work():
    """With signs but without rotations this update's sketch is a single random number."""
    x = one_bucket(64 * 1024, 1024)
    norms = np.sqrt(products(x, x, n_dims=1024, n_seeds=300))
    assert (np.abs(norms - 1.0) < 0.25).all()
    rng = np.random.default_rng(0)
    unrotated = np.abs(rng.choice([-1.0, 1.0], (300, 64)).sum(axis=1)) / 8.0
    assert (np.abs(unrotated - 1.0) > 0.25).mean() > 0.5


def test_energy_that_would_cancel_without_signs_is_seen():
    x = np.zeros(8 * N_DIMS, np.float32)
    x[:N_DIMS], x[N_DIMS : 2 * N_DIMS] = 1.0, -1.0  # a constant shows no rotation
    x /= np.linalg.norm(x)
    assert (products(x, x, n_seeds=200) > 0.3).all()


def test_equal_seeds_give_equal_sketches_and_others_do_not():
    x = dense(1000, seed=0)
    first = Sketcher(seed_of(1), n_values=1000, n_dims=N_DIMS).sketch(x)
    again = Sketcher(seed_of(1), n_values=1000, n_dims=N_DIMS).sketch(x)
    other = Sketcher(seed_of(2), n_values=1000, n_dims=N_DIMS).sketch(x)
    assert first.tobytes() == again.tobytes()
    assert abs(first @ other) < 0.7


def test_values_near_float32s_limit_do_not_overflow():
    x = np.full(5000, 3e38, np.float32)
    found = Sketcher(seed_of(1), n_values=5000, n_dims=8).sketch(x)
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 3e38


@pytest.mark.parametrize(
    ("seed", "n_values", "n_dims"),
    [(bytes(31), 10, 8), (bytes(32), 0, 8), (bytes(32), 10, 4), (bytes(32), 10, 24)],
)
def test_a_sketch_that_cannot_be_is_refused(seed, n_values, n_dims):
    with pytest.raises(AggregationError, match=r"32 bytes|power of two"):
        Sketcher(seed, n_values=n_values, n_dims=n_dims)


@pytest.mark.parametrize("vector", [np.zeros(9, np.float32), np.zeros(10)])
def test_a_vector_of_another_length_or_type_is_refused(vector):
    with pytest.raises(AggregationError, match="expected"):
        Sketcher(bytes(32), n_values=10, n_dims=8).sketch(vector)

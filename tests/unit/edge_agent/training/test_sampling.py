"""Which examples make up a batch."""

import math

import numpy as np
import pytest

from edge_agent.training.sampling import PoissonBatches, ShuffledBatches


@pytest.mark.parametrize(("n_examples", "batch_size"), [(1, 1), (1, 8), (7, 3), (8, 4), (100, 7)])
def test_guarantee_1_each_epoch_draws_every_example_once(n_examples: int, batch_size: int) -> None:
    sampler = ShuffledBatches(n_examples=n_examples, batch_size=batch_size, seed=5)
    for epoch in range(4):
        first = epoch * sampler.steps_per_epoch
        batches = [sampler.indices(first + i) for i in range(sampler.steps_per_epoch)]
        assert sorted(np.concatenate(batches)) == list(range(n_examples))
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= batch_size


def test_guarantee_2_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, *, batch_size: int = 40) -> list[int]:
        sampler = ShuffledBatches(n_examples=40, batch_size=batch_size, seed=seed)
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        return [int(index) for step in steps for index in sampler.indices(step)]

    assert order(1, 0) == order(1, 0) == order(1, 0, batch_size=8)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6
    assert order(2**64 - 1, 0) != order(0, 0)


def test_a_step_can_be_drawn_without_those_before_it() -> None:
    walked = ShuffledBatches(n_examples=10, batch_size=3, seed=1)
    batches = [walked.indices(step) for step in range(9)]
    jumped = ShuffledBatches(n_examples=10, batch_size=3, seed=1)
    np.testing.assert_array_equal(jumped.indices(8), batches[8])


@pytest.mark.parametrize(
    ("local_steps", "local_epochs", "n_steps"), [(5, None, 5), (None, 1, 4), (None, 3, 12)]
)
def test_steps_are_given_or_counted(
    local_steps: int | None, local_epochs: int | None, n_steps: int
) -> None:
    sampler = ShuffledBatches(n_examples=10, batch_size=3, seed=1)
    assert sampler.n_steps(local_steps=local_steps, local_epochs=local_epochs) == n_steps


SECRET = bytes(range(32))


def test_poisson_guarantee_1_every_example_has_a_coin_of_its_own() -> None:
    n_examples, n_steps, q = 50, 4000, 0.07
    sampler = PoissonBatches(n_examples=n_examples, probability=q, secret=SECRET)
    drawn = np.zeros((n_steps, n_examples))
    for step in range(n_steps):
        drawn[step, sampler.indices(step)] = 1.0
    deviation = math.sqrt(q * (1 - q) / n_steps)
    assert np.abs(drawn.mean(0) - q).max() < 5 * deviation
    sizes = drawn.sum(1)
    assert abs(sizes.var() / (n_examples * q * (1 - q)) - 1.0) < 5 * math.sqrt(2 / n_steps)
    between = np.corrcoef(drawn.T) - np.eye(n_examples)
    assert np.abs(between).max() < 6 / math.sqrt(n_steps), "two examples are drawn together"
    following = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]
    assert abs(following) < 5 / math.sqrt(drawn.size)
    assert sizes.min() == 0, "no batch was empty"


def test_poisson_guarantee_2_batches_follow_from_secret_and_step() -> None:
    def batch(secret: bytes, step: int) -> tuple[int, ...]:
        sampler = PoissonBatches(n_examples=200, probability=0.3, secret=secret)
        return tuple(sampler.indices(step))

    assert batch(SECRET, 3) == batch(SECRET, 3)
    assert len({batch(SECRET, 0), batch(SECRET, 1), batch(bytes(32), 0)}) == 3


def test_poisson_with_probability_one_draws_everybody() -> None:
    sampler = PoissonBatches(n_examples=7, probability=1.0, secret=SECRET)
    assert list(sampler.indices(0)) == list(range(7))


@pytest.mark.parametrize(("local_steps", "local_epochs", "n_steps"), [(9, None, 9), (None, 3, 12)])
def test_poisson_steps_of_an_epoch_draw_each_example_once_in_expectation(
    local_steps: int | None, local_epochs: int | None, n_steps: int
) -> None:
    sampler = PoissonBatches(n_examples=40, probability=0.25, secret=SECRET)
    assert sampler.n_steps(local_steps=local_steps, local_epochs=local_epochs) == n_steps


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.5, 1e-12, math.nan])
def test_a_probability_that_is_none_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="from 2\\^-32 to 1"):
        PoissonBatches(n_examples=4, probability=probability, secret=SECRET)


def test_a_samplers_text_does_not_tell_its_secret() -> None:
    text = repr(PoissonBatches(n_examples=4, probability=0.5, secret=SECRET))
    assert SECRET.hex() not in text
    assert repr(SECRET) not in text
    assert text != repr(PoissonBatches(n_examples=4, probability=0.5, secret=bytes(32)))

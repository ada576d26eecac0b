"""Which examples make up a batch."""

import numpy as np
import pytest

from edge_agent.training.sampling import ShuffledBatches


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

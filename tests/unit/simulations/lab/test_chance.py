"""All chance of a run, from its seed."""

import itertools

import numpy as np
import pytest

from simulations.lab.chance import RunChance

USES = [
    (seed, purpose, numbers)
    for seed in (0, 1, 2**32 - 1)
    for purpose in ("dropout", "batches", "")
    for numbers in ((), (1,), (1, 2), (2, 1), (12,), (1, 0))
]


def test_guarantee_1_equal_seeds_purposes_and_numbers_give_equal_draws() -> None:
    for seed, purpose, numbers in USES:
        one, other = RunChance(seed), RunChance(seed)
        other.generator("something else").random(10)  # nothing is consumed
        assert one.secret(purpose, *numbers) == other.secret(purpose, *numbers)
        assert one.integer(purpose, *numbers) == other.integer(purpose, *numbers)
        draws = [chance.generator(purpose, *numbers).random(5) for chance in (one, other)]
        np.testing.assert_array_equal(*draws)


def test_guarantee_1_any_other_gives_other_draws() -> None:
    secrets = {RunChance(seed).secret(purpose, *numbers) for seed, purpose, numbers in USES}
    integers = {RunChance(seed).integer(purpose, *numbers) for seed, purpose, numbers in USES}
    first = {
        RunChance(seed).generator(purpose, *numbers).random() for seed, purpose, numbers in USES
    }
    assert len(secrets) == len(integers) == len(first) == len(USES)


def test_draws_of_neighbouring_numbers_have_nothing_in_common() -> None:
    """Their correlation is that of chance: a standard deviation of 1/√n."""
    n = 20_000
    streams = [RunChance(1).generator("noise", 1, agent).standard_normal(n) for agent in range(4)]
    streams += [RunChance(2).generator("noise", 1, 0).standard_normal(n)]
    for one, other in itertools.combinations(streams, 2):
        assert abs(float(one @ other) / n) < 5 / np.sqrt(n)


def test_a_secret_has_the_length_of_one_and_an_integer_fits_json() -> None:
    assert {len(RunChance(seed).secret(purpose, *n)) for seed, purpose, n in USES} == {32}
    drawn = [RunChance(seed).integer(purpose, *n) for seed, purpose, n in USES]
    assert all(0 <= one < 2**53 for one in drawn)
    assert max(drawn) > 2**52


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_smallest_and_the_largest_seed_draw(seed: int) -> None:
    assert RunChance(seed).generator("x").random() < 1.0

"""Cutting a batch by length: nothing lost, within the limits, with little padding."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from edge_agent.training.micro_batches import cut
from quant.memory import MICRO_COST_TOKENS, StepSettings


def cost(micros: list[list[int]], each: int = MICRO_COST_TOKENS) -> int:
    return sum(len(micro) * max(micro) + each for micro in micros)


@pytest.mark.parametrize("max_examples", [None, 5])
@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_in_one_micro_batch_within_the_limits(
    seed: int, max_examples: int | None
) -> None:
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in rng.integers(1, 600, rng.integers(1, 60))]
    micros = cut(lengths, StepSettings(micro_tokens=1024, max_examples=max_examples))
    assert sorted(i for micro in micros for i in micro) == list(range(len(lengths)))
    for micro in micros:
        assert len(micro) == 1 or len(micro) * max(lengths[i] for i in micro) <= 1024
        assert max_examples is None or len(micro) <= max_examples


@pytest.mark.parametrize("each", [MICRO_COST_TOKENS, 5000])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_of_the_sorted_batch_costs_less(seed: int, each: int) -> None:
    settings = StepSettings(micro_tokens=1000, micro_cost_tokens=each)
    rng = np.random.default_rng(seed)
    lengths = sorted((int(n) for n in rng.integers(1, 400, 9)), reverse=True)
    found = [[lengths[i] for i in micro] for micro in cut(lengths, settings)]
    every = []
    for n_cuts in range(len(lengths)):
        for at in combinations(range(1, len(lengths)), n_cuts):
            micros = [lengths[a:b] for a, b in pairwise([0, *at, len(lengths)])]
            if all(len(m) == 1 or len(m) * m[0] <= 1000 for m in micros):
                every.append(cost(micros, each))
    assert cost(found, each) == min(every)


def test_the_longest_come_first_and_one_beyond_the_budget_is_alone() -> None:
    assert cut([5, 900, 6, 7], StepSettings(micro_tokens=100)) == [[1], [3, 2, 0]]


def test_where_starting_one_is_dear_all_that_fits_is_one_micro_batch() -> None:
    settings = StepSettings(micro_tokens=4096, micro_cost_tokens=1 << 16)
    assert len(cut([400, 10, 300, 20, 30], settings)) == 1


def test_an_empty_batch_has_no_micro_batches() -> None:
    assert cut([], StepSettings()) == []

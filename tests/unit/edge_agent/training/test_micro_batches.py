"""Cutting a batch by length: nothing lost, within the budget, with little padding."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from edge_agent.data.tokens import Example
from edge_agent.training.micro_batches import MICRO_BATCH_COST_TOKENS, cut, useful_fraction


def make_batch(lengths: list[int]) -> list[Example]:
    return [
        Example(
            input_ids=np.full(length, number, np.int32),
            loss_mask=np.ones(length, np.bool_),
            source=f"made[{number}]",
            category=None,
            truncated=False,
        )
        for number, length in enumerate(lengths)
    ]


def cost(micros: list[list[int]]) -> int:
    return sum(len(micro) * max(micro) + MICRO_BATCH_COST_TOKENS for micro in micros)


@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_in_one_micro_batch_within_the_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch = make_batch([int(n) for n in rng.integers(1, 600, rng.integers(1, 60))])
    micros = cut(batch, 1024)
    assert sorted(e.source for m in micros for e in m) == sorted(e.source for e in batch)
    for micro in micros:
        assert len(micro) == 1 or len(micro) * max(len(e.input_ids) for e in micro) <= 1024


@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_of_the_sorted_batch_costs_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = sorted((int(n) for n in rng.integers(1, 400, 9)), reverse=True)
    found = [[len(e.input_ids) for e in micro] for micro in cut(make_batch(lengths), 1000)]
    every = []
    for n_cuts in range(len(lengths)):
        for at in combinations(range(1, len(lengths)), n_cuts):
            edges = [0, *at, len(lengths)]
            micros = [lengths[a:b] for a, b in pairwise(edges)]
            if all(len(m) == 1 or len(m) * m[0] <= 1000 for m in micros):
                every.append(cost(micros))
    assert cost(found) == min(every)


def test_the_longest_come_first_and_one_beyond_the_budget_is_alone() -> None:
    micros = cut(make_batch([5, 900, 6, 7]), 100)
    assert [[len(e.input_ids) for e in micro] for micro in micros] == [[900], [7, 6, 5]]


def test_an_empty_batch_has_no_micro_batches() -> None:
    assert cut([], 100) == []


def test_the_useful_fraction_counts_padding() -> None:
    assert useful_fraction([make_batch([10, 5]), make_batch([20])]) == pytest.approx(35 / 40)

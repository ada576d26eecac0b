"""Padding examples into tensors."""

import numpy as np
import pytest
import torch

from edge_agent.data.batches import collate
from edge_agent.data.tokens import Example
from edge_agent.errors import DataError


def make_example(*ids: int) -> Example:
    mask = np.array([False] + [True] * (len(ids) - 1))
    array = np.array(ids, dtype=np.int32)
    for part in (array, mask):
        part.flags.writeable = False
    return Example(input_ids=array, loss_mask=mask, source="x:1", category=None, truncated=False)


def test_rows_are_padded_on_the_right_and_the_padding_is_masked() -> None:
    batch = collate([make_example(5, 6, 7), make_example(8)], 9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True], [False, False, False]]
    assert batch.input_ids.dtype == torch.int64
    assert batch.attention_mask.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.bool


@pytest.mark.parametrize(("multiple_of", "n_tokens"), [(1, 3), (2, 4), (3, 3), (8, 8)])
def test_the_length_is_rounded_up_to_the_multiple(multiple_of: int, n_tokens: int) -> None:
    batch = collate([make_example(5, 6, 7)], 0, multiple_of=multiple_of)
    assert batch.input_ids.shape == (1, n_tokens)


def test_the_tensors_are_copies_that_may_be_written() -> None:
    example = make_example(5, 6)
    collate([example], 0).input_ids[0, 0] = 1
    assert example.input_ids.tolist() == [5, 6]


@pytest.mark.parametrize(("n_examples", "multiple_of"), [(0, 1), (1, 0)])
def test_nothing_to_batch_and_no_multiple_are_refused(n_examples: int, multiple_of: int) -> None:
    with pytest.raises(DataError, match=f"cannot batch {n_examples} examples in multiples of"):
        collate([make_example(1)] * n_examples, 0, multiple_of=multiple_of)

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
    assert batch.loss_mask.tolist() == [[False, True, True], [False, False, False]]
    assert batch.input_ids.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.bool


def test_the_tensors_are_copies_that_may_be_written() -> None:
    example = make_example(5, 6)
    collate([example], 0).input_ids[0, 0] = 1
    assert example.input_ids.tolist() == [5, 6]


def test_nothing_to_batch_is_refused() -> None:
    with pytest.raises(DataError, match="no examples to batch"):
        collate([], 0)

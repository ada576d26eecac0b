"""From examples to padded tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edge_agent.data.tokens import Example
from edge_agent.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Examples side by side, padded on the right; on the CPU.

    There is no attention mask: with causal attention no token sees the padding after it.

    Attributes:
        input_ids: int64 [B, T], the pad token after each example's end.
        loss_mask: bool [B, T], False for padding.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad examples to the longest of them.

    Args:
        examples: B of them, at least one.
        pad_id: token for the padding; any one, since it is masked.

    Returns:
        The batch.

    Raises:
        DataError: there are no examples.
    """
    if not examples:
        msg = "there are no examples to batch"
        raise DataError(msg)
    n_tokens = max(example.input_ids.size for example in examples)
    input_ids = np.full((len(examples), n_tokens), pad_id, dtype=np.int64)
    loss_mask = np.zeros((len(examples), n_tokens), dtype=np.bool_)
    for row, example in enumerate(examples):
        size = example.input_ids.size
        input_ids[row, :size] = example.input_ids
        loss_mask[row, :size] = example.loss_mask
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        loss_mask=torch.from_numpy(loss_mask),
    )

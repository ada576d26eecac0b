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

    Attributes:
        input_ids: int64 [B, T], the pad token after each example's end.
        attention_mask: int64 [B, T], 1 for tokens, 0 for padding.
        loss_mask: bool [B, T], False for padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor


def collate(examples: Sequence[Example], pad_id: int, *, multiple_of: int = 1) -> Batch:
    """Pad examples to the longest of them.

    Args:
        examples: B of them, at least one.
        pad_id: token for the padding; any one, since it is masked.
        multiple_of: T is rounded up to a multiple of this.

    Returns:
        The batch.

    Raises:
        DataError: there are no examples, or `multiple_of` is under 1.
    """
    if not examples or multiple_of < 1:
        msg = f"cannot batch {len(examples)} examples in multiples of {multiple_of} tokens"
        raise DataError(msg)
    longest = max(example.input_ids.size for example in examples)
    n_tokens = -(-longest // multiple_of) * multiple_of
    input_ids = np.full((len(examples), n_tokens), pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(examples), n_tokens), dtype=np.int64)
    loss_mask = np.zeros((len(examples), n_tokens), dtype=np.bool_)
    for row, example in enumerate(examples):
        size = example.input_ids.size
        input_ids[row, :size] = example.input_ids
        attention_mask[row, :size] = 1
        loss_mask[row, :size] = example.loss_mask
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        loss_mask=torch.from_numpy(loss_mask),
    )

"""How a logical batch is cut into micro-batches: by length, so that little padding is computed."""

from collections.abc import Sequence
from typing import Final

MICRO_BATCH_COST_TOKENS: Final = 128
"""What a micro-batch costs besides its tokens, in tokens: each dequantises the whole base again,
whose time is about that of 100 tokens on a processor and of 150 on a consumer GPU."""


def cut(
    lengths: Sequence[int], max_tokens: int, *, max_examples: int | None = None
) -> list[list[int]]:
    """Cut a batch into micro-batches of like length, at the least cost.

    The examples are sorted by length, longest first: what does not fit into memory then shows at
    once. Among all cuts of that order whose micro-batches stay within the limits, the one with the
    fewest computed tokens is taken, each micro-batch counted with `MICRO_BATCH_COST_TOKENS` more.

    Args:
        lengths: Tokens of each example of the batch; possibly none.
        max_tokens: Of a micro-batch, padding included; an example that is longer is alone.
        max_examples: Of a micro-batch; None: any number.

    Returns:
        Positions in the batch, each once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    most = len(lengths) if max_examples is None else max(1, max_examples)
    # cheapest[i] is the cost of the examples from i on; ends[i] where their first micro-batch ends.
    cheapest = [0] * (len(order) + 1)
    ends = [0] * len(order)
    for start in reversed(range(len(order))):
        longest = max(1, lengths[order[start]])
        fitting = min(most, max(1, max_tokens // longest))
        cost, end = min(
            ((end - start) * longest + cheapest[end], end)
            for end in range(start + 1, min(len(order), start + fitting) + 1)
        )
        cheapest[start] = cost + MICRO_BATCH_COST_TOKENS
        ends[start] = end
    micros = []
    start = 0
    while start < len(order):
        micros.append(order[start : ends[start]])
        start = ends[start]
    return micros

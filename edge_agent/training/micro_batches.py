"""How a logical batch is cut into micro-batches: by length, so that little padding is computed."""

from collections.abc import Sequence
from typing import Final

from edge_agent.data.tokens import Example

MICRO_BATCH_COST_TOKENS: Final = 128
"""What a micro-batch costs besides its tokens, in tokens: each dequantises the whole base again,
whose time is about that of 100 tokens on a processor and of 150 on a consumer GPU."""


def cut(batch: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    """Cut a batch into micro-batches of like length, at the least cost.

    The examples are sorted by length, longest first: what does not fit into memory then shows at
    once. Among all cuts of that order whose micro-batches stay within `max_tokens`, padding
    included, the one with the fewest computed tokens is taken, each micro-batch counted with
    `MICRO_BATCH_COST_TOKENS` more.

    Args:
        batch: The logical batch, possibly empty.
        max_tokens: Of a micro-batch, padding included; an example that is longer is alone.

    Returns:
        All examples, each once.
    """
    ordered = sorted(batch, key=lambda example: -len(example.input_ids))
    lengths = [len(example.input_ids) for example in ordered]
    # cheapest[i] is the cost of the examples from i on; ends[i] where their first micro-batch ends.
    cheapest = [0] * (len(ordered) + 1)
    ends = [0] * len(ordered)
    for start in reversed(range(len(ordered))):
        longest = max(1, lengths[start])
        last = min(len(ordered), start + max(1, max_tokens // longest))
        cost, end = min(
            ((end - start) * longest + cheapest[end], end) for end in range(start + 1, last + 1)
        )
        cheapest[start] = cost + MICRO_BATCH_COST_TOKENS
        ends[start] = end
    micros = []
    start = 0
    while start < len(ordered):
        micros.append(ordered[start : ends[start]])
        start = ends[start]
    return micros


def useful_fraction(micros: Sequence[Sequence[Example]]) -> float:
    """The share of computed tokens that are not padding.

    Args:
        micros: Micro-batches, at least one example in all.
    """
    useful = sum(len(example.input_ids) for micro in micros for example in micro)
    computed = sum(
        len(micro) * max(len(example.input_ids) for example in micro) for micro in micros
    )
    return useful / computed

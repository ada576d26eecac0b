"""How a logical batch is cut into micro-batches: by length, so that little padding is computed."""

from collections.abc import Sequence

from quant.memory import StepSettings


def cut(lengths: Sequence[int], settings: StepSettings) -> list[list[int]]:
    """Cut a batch into micro-batches of like length, at the least cost.

    The examples are sorted by length, longest first: what does not fit into memory then shows at
    once. Among all cuts of that order whose micro-batches stay within the limits, the one with the
    fewest computed tokens is taken, each micro-batch counted with `micro_cost_tokens` more.

    Args:
        lengths: Tokens of each example of the batch; possibly none.
        settings: Limits and cost of a micro-batch; an example that is longer than
            `micro_tokens` is alone.

    Returns:
        Positions in the batch, each once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    most = len(lengths) if settings.max_examples is None else max(1, settings.max_examples)
    # cheapest[i] is the cost of the examples from i on; ends[i] where their first micro-batch ends.
    cheapest = [0] * (len(order) + 1)
    ends = [0] * len(order)
    for start in reversed(range(len(order))):
        longest = max(1, lengths[order[start]])
        fitting = min(most, max(1, settings.micro_tokens // longest))
        cost, end = min(
            ((end - start) * longest + cheapest[end], end)
            for end in range(start + 1, min(len(order), start + fitting) + 1)
        )
        cheapest[start] = cost + settings.micro_cost_tokens
        ends[start] = end
    micros = []
    start = 0
    while start < len(order):
        micros.append(order[start : ends[start]])
        start = ends[start]
    return micros

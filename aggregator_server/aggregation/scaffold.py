"""SCAFFOLD on the server: c, the mean of all agents' control variates.

Each agent keeps its own c_i and sends Δc_i = c_i⁺ − c_i beside its update; both count or neither.
With N agents that have counted so far, and N⁺ after this round,

    c⁺ = (N · c + Σ Δc_i) / N⁺

is the mean of the c_i of all N⁺, as a newcomer's c_i was zero. Who has counted is kept beside c
(`ControlBook`), so a rollback takes both back. Agents' own c_i stay as they are then, and c is
their mean again only as they take part anew.

Source: Karimireddy et al., arXiv 1910.06378, algorithm 1. There N is the number of all clients, and
c + |S|/N · mean Δc_i is the same but for those who never took part: they count there, as zero. A
federation of volunteers does not know who will come, so here N are those who came.
"""

from collections.abc import Callable, Mapping

import numpy as np

from aggregator_server.aggregation.robust.caps import cap_factors, median_norm
from aggregator_server.errors import AggregationError
from privacy.updates import Float32Array, Float64Array, l2_norm
from protocol.wire import Identity, WireModel


class ControlBook(WireModel):
    """Whose control variates c is the mean of; shown to nobody."""

    agents: tuple[Identity, ...] = ()
    """Ascending."""


def initial_control(n_values: int) -> tuple[Float32Array, ControlBook]:
    """C and its book before the first round: zero, the mean of nobody's.

    Args:
        n_values: Length of the updates.
    """
    return np.zeros(n_values, np.float32), ControlBook()


def renewed(
    control: Float32Array,
    book: ControlBook,
    changes: Mapping[bytes, Callable[[], Float32Array]],
    *,
    capped: bool,
) -> tuple[Float32Array, ControlBook]:
    """C and its book after a round.

    Guarantees:
        1. c is the mean of the variates of all in the book, to float32 rounding, as long as
           nothing is capped.
        2. With `capped`, no agent moves the sum by more than the median length of the changes.
        3. Memory: one float64 accumulator and one change.

    Args:
        control: c before, [n_values] float32.
        book: Whose mean it is.
        changes: By agent, what loads its Δc_i [n_values] float32; those that count.
        capped: Whether changes longer than their median are shortened to it, so that a few
            hostile ones cannot lead everybody's training; c is then no longer exactly the mean.

    Raises:
        AggregationError: A change of another length, or that is not finite.
    """
    bounds = dict.fromkeys(changes, 1.0)
    if capped and changes:
        lengths = np.array([l2_norm(load()) for load in changes.values()])
        factors = cap_factors(lengths, median_norm(lengths))
        bounds = dict(zip(changes, factors.tolist(), strict=True))
    total: Float64Array = control.astype(np.float64) * len(book.agents)
    for agent, load in changes.items():
        change = load()
        if change.shape != control.shape or not np.isfinite(change).all():
            msg = f"a change of {change.shape} values, or not finite; expected {control.shape}"
            raise AggregationError(msg)
        total += change * np.float64(bounds[agent])
    agents = tuple(sorted({*book.agents, *changes}))
    if agents:
        total /= len(agents)
    return total.astype(np.float32), ControlBook(agents=agents)

"""What agents send in a round, by the federation's LoRA rule and by the release it starts from.

The turn is the number of that release, not of the round: a round that fails uses up its number, and
the same factor's turn comes again.
"""

from collections.abc import Mapping

from protocol.blocks import SENT, Factor, LoraRule
from protocol.layout import VectorLayout
from quant.adapter import sent_layout
from quant.errors import AdapterError


def sent_factors(rule: LoraRule, turn: int) -> tuple[Factor, ...]:
    """The factors that agents train and send.

    Args:
        rule: The federation's.
        turn: Number of the release that the round starts from.

    Raises:
        AdapterError: A negative turn.

    Source: RoLoRA (Chen et al.), arXiv 2502.01755. B goes first: release 0 has B = 0, and then A's
    gradient is zero.
    """
    if turn < 0:
        msg = f"turns count from 0, not {turn}"
        raise AdapterError(msg)
    if rule is LoraRule.ROLORA:
        return (Factor.B,) if turn % 2 == 0 else (Factor.A,)
    return SENT[rule]


def changed_factors(rule: LoraRule, number: int) -> tuple[Factor, ...]:
    """The factors in which a release that a round made differs from the one before.

    Args:
        rule: The federation's.
        number: Of the release; 0 counts as one that the first turn made.
    """
    return sent_factors(rule, max(0, number - 1))


def turn_layouts(rule: LoraRule, shapes: Mapping[str, tuple[int, ...]]) -> tuple[VectorLayout, ...]:
    """The layout of what agents send, by turn; after the last one the first comes again.

    Args:
        rule: The federation's.
        shapes: Of all tensors of the adapter.

    Raises:
        AdapterError: A name that is not of a factor.
    """
    n_turns = 2 if rule is LoraRule.ROLORA else 1
    return tuple(sent_layout(shapes, sent_factors(rule, turn)) for turn in range(n_turns))

"""What agents send under each LoRA rule, and when.

```
rule                     sent                          on masked sums   mean of what is sent is
fedit                    A and B                       yes              off by the covariance gap
ffa-lora                 B                             yes              exact
rolora                   B and A in turn, B first      yes              exact in each turn
fedsa-lora               A                             yes              no common model: B is own
fed-sb                   the core R, [rank, rank]      yes              exact
flora, flexlora, fedex   A and B                       no               see `lora`
```
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from aggregator_server.errors import AggregationError
from protocol.layout import VectorLayout
from protocol.manifest import Factor
from quant.adapter import module_of, sent_layout, tensor_name

_CORE_SUFFIX: Final = ".lora_core.weight"


class LoraRule(StrEnum):
    """How factors become one adapter."""

    FEDIT = "fedit"
    FFA_LORA = "ffa-lora"
    ROLORA = "rolora"
    FEDSA_LORA = "fedsa-lora"
    FED_SB = "fed-sb"
    FLORA = "flora"
    FLEXLORA = "flexlora"
    FEDEX = "fedex"


ON_SUMS: Final = frozenset(
    {
        LoraRule.FEDIT,
        LoraRule.FFA_LORA,
        LoraRule.ROLORA,
        LoraRule.FEDSA_LORA,
        LoraRule.FED_SB,
    }
)
"""Rules that need the weighted sum of updates alone, and so work under masks."""


def sent_factors(rule: LoraRule, turn: int) -> tuple[Factor, ...]:
    """The factors that travel; none for Fed-SB, whose core stands between them.

    Args:
        rule: The federation's.
        turn: Number of the release that the round starts from, not of the round: a round that
            fails uses up its number, and the same factor's turn comes again.

    Raises:
        AggregationError: A negative turn.

    Source: FedIT, arXiv 2305.05644; FFA-LoRA, 2403.12313; RoLoRA, 2502.01755;
    FedSA-LoRA, 2410.01463; Fed-SB, 2502.15436. B goes first in RoLoRA: release 0 has B = 0, and
    then A's gradient is zero.
    """
    if turn < 0:
        msg = f"turns count from 0, not {turn}"
        raise AggregationError(msg)
    if rule is LoraRule.FED_SB:
        return ()
    if rule is LoraRule.FFA_LORA:
        return (Factor.B,)
    if rule is LoraRule.FEDSA_LORA:
        return (Factor.A,)
    if rule is LoraRule.ROLORA:
        return (Factor.B,) if turn % 2 == 0 else (Factor.A,)
    return (Factor.A, Factor.B)


def layout_of_turn(
    rule: LoraRule, shapes: Mapping[str, tuple[int, ...]], turn: int
) -> VectorLayout:
    """The layout of what agents send in a turn.

    Args:
        rule: The federation's.
        shapes: All tensors of the adapter: A [rank, d_in], B [d_out, rank].
        turn: See `sent_factors`.

    Raises:
        AggregationError: A negative turn.
        quant.errors.AdapterError: A name that is not of a LoRA factor.
    """
    factors = sent_factors(rule, turn)
    return sent_layout(shapes, factors) if factors else VectorLayout.of_shapes(core_shapes(shapes))


def core_name(module: str) -> str:
    """The name of a module's core, beside PEFT's names of its factors."""
    return tensor_name(module, Factor.A).removesuffix(".lora_A.weight") + _CORE_SUFFIX


def core_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The cores that go with an adapter: [rank, rank] for each module.

    Raises:
        quant.errors.AdapterError: A name that is not of a LoRA factor.
    """
    modules = {module_of(name) for name in shapes}
    ranks = {module: shapes[tensor_name(module, Factor.A)][0] for module in modules}
    return {core_name(module): (rank, rank) for module, rank in sorted(ranks.items())}

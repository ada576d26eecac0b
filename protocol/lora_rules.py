"""How the factors of all agents become one adapter, and what a rule asks of the other blocks.

```
rule        sent                     mean of what is sent                          masks
fedit       A and B                  off by their covariance                       yes
ffa-lora    B                        exact: A stays at its common random start     yes
rolora      B and A in turn          exact in each turn                            yes
flexlora    A and B                  of the products, cut to the adapter's rank    no
```

Rules that are not here, and why, stand in docs/adr/0016-lora-rules.md.
"""

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from protocol.manifest import (
        AggregationBlock,
        FilterBlock,
        LoraBlock,
        MaskingBlock,
        TrainingBlock,
    )
    from protocol.privacy import PrivacyBlock


class LoraRule(StrEnum):
    """What agents send of an adapter, and what the server makes of it."""

    FEDIT = "fedit"
    """Both factors, averaged apart from each other (FedIT, arXiv 2305.05644)."""
    FFA_LORA = "ffa-lora"
    """B alone; A is never trained (FFA-LoRA, arXiv 2403.12313)."""
    ROLORA = "rolora"
    """The factors in alternate releases, B first (RoLoRA, arXiv 2502.01755)."""
    FLEXLORA = "flexlora"
    """Both factors; the mean of their products is cut to rank r (FlexLoRA, arXiv 2402.11505)."""


def is_told_by_sent(rule: LoraRule) -> bool:
    """Whether `lora.sent` says it all, as it did before there were other rules."""
    return rule in {LoraRule.FEDIT, LoraRule.FFA_LORA}


class Recipe(Protocol):
    """What a LoRA rule has a say in: a manifest, or the settings that make one."""

    @property
    def lora(self) -> "LoraBlock":
        """The rule."""
        ...

    @property
    def aggregation(self) -> "AggregationBlock":
        """The optimiser."""
        ...

    @property
    def masking(self) -> "MaskingBlock":
        """The mode."""
        ...

    @property
    def privacy(self) -> "PrivacyBlock":
        """The profile."""
        ...

    @property
    def training(self) -> "TrainingBlock":
        """Whether control variates are sent."""
        ...

    @property
    def filter(self) -> "FilterBlock":
        """The rule."""
        ...


def rules_of_lora(manifest: Recipe) -> dict[str, bool]:
    """What the LoRA rule asks of the other blocks, and whether it is broken."""
    optimizer = manifest.aggregation.optimizer
    is_plain = optimizer.kind == "fedavg" and optimizer.learning_rate == 1.0
    if manifest.lora.rule is LoraRule.FLEXLORA:
        return {
            'masking.mode must be "off": the server multiplies the factors of each agent, and no '
            "sum tells them": manifest.masking.mode != "off",
            'filter.rule must be "none": the filter scales factors and takes medians of them, '
            "which says nothing of their products": manifest.filter.rule != "none",
            'aggregation.optimizer must be "fedavg" with learning_rate 1: the factors of a round '
            "have a basis of their own, in which earlier steps mean nothing": not is_plain,
            "lora.min_rank and lora.optional_modules must be left out: what an agent did not train "
            "is no part of its product": manifest.lora.is_mixed,
            "training.scaffold must be false: the factors of a round have a basis of their own, in "
            "which mean gradients of an earlier one mean nothing": manifest.training.scaffold,
            'privacy.profile must be "P0" or "P1": the noise of the others is planned for a mean '
            "of factors": manifest.privacy.profile not in {"P0", "P1"},
        }
    if manifest.lora.rule is LoraRule.ROLORA:
        return {
            'aggregation.optimizer must be "fedavg" with learning_rate 1: what another remembers '
            "of one factor means nothing in the turn of the other": not is_plain,
            "lora.min_rank and lora.optional_modules must be left out: they are not planned for "
            "updates of two lengths": manifest.lora.is_mixed,
            "training.scaffold must be false: mean gradients of one factor mean nothing in the "
            "turn of the other": manifest.training.scaffold,
            'privacy.profile must be "P0" or "P1": the noise of the others is planned for updates '
            "of one length": manifest.privacy.profile not in {"P0", "P1"},
        }
    return {}

"""What the blocks of a manifest ask of one another: of a LoRA rule, a privacy profile, SCAFFOLD.

Each function gives sentences, and whether what they ask is broken.

```
rule        sent                     mean of what is sent                          masks
fedit       A and B                  off by their covariance                       yes
ffa-lora    B                        exact: A stays at its common random start     yes
rolora      B and A in turn          exact in each turn                            yes
flexlora    A and B                  of the products, cut to the adapter's rank    no
```

LoRA rules that are not here, and why, stand in docs/adr/0016-lora-rules.md.
"""

import math
from typing import Protocol

from protocol.blocks import (
    AggregationBlock,
    FilterBlock,
    GateBlock,
    LoraBlock,
    LoraRule,
    MaskingBlock,
    RoundsBlock,
    TrainingBlock,
)
from protocol.privacy import (
    AgentPrivacy,
    CentralPrivacy,
    ExamplePrivacy,
    NoPrivacy,
    PrivacyBlock,
)


class Recipe(Protocol):
    """Blocks that belong together: a manifest's, or those of the settings that make one."""

    @property
    def lora(self) -> LoraBlock:
        """The rule."""
        ...

    @property
    def aggregation(self) -> AggregationBlock:
        """The optimiser."""
        ...

    @property
    def masking(self) -> MaskingBlock:
        """The mode."""
        ...

    @property
    def privacy(self) -> PrivacyBlock:
        """The profile."""
        ...

    @property
    def training(self) -> TrainingBlock:
        """Whether control variates are sent."""
        ...

    @property
    def rounds(self) -> RoundsBlock:
        """The cohort."""
        ...

    @property
    def gate(self) -> GateBlock:
        """The rule."""
        ...

    @property
    def filter(self) -> FilterBlock:
        """The rule."""
        ...


def rules_of_lora(recipe: Recipe) -> dict[str, bool]:
    """What the LoRA rule asks of the other blocks.

    Args:
        recipe: The blocks.

    Returns:
        For each sentence whether what it asks is broken; empty where nothing is asked.
    """
    optimizer = recipe.aggregation.optimizer
    is_plain = optimizer.kind == "fedavg" and optimizer.learning_rate == 1.0
    if recipe.lora.rule is LoraRule.FLEXLORA:
        return {
            'masking.mode must be "off": the server multiplies the factors of each agent, and no '
            "sum tells them": recipe.masking.mode != "off",
            'filter.rule must be "none": the filter scales factors and takes medians of them, '
            "which says nothing of their products": recipe.filter.rule != "none",
            'aggregation.optimizer must be "fedavg" with learning_rate 1: the factors of a round '
            "have a basis of their own, in which earlier steps mean nothing": not is_plain,
            "lora.min_rank and lora.optional_modules must be left out: what an agent did not train "
            "is no part of its product": recipe.lora.is_mixed,
            "training.scaffold must be false: the factors of a round have a basis of their own, in "
            "which mean gradients of an earlier one mean nothing": recipe.training.scaffold,
            'privacy.profile must be "P0" or "P1": the noise of the others is planned for a mean '
            "of factors": recipe.privacy.profile not in {"P0", "P1"},
        }
    if recipe.lora.rule is LoraRule.ROLORA:
        return {
            'aggregation.optimizer must be "fedavg" with learning_rate 1: what another remembers '
            "of one factor means nothing in the turn of the other": not is_plain,
            "lora.min_rank and lora.optional_modules must be left out: they are not planned for "
            "updates of two lengths": recipe.lora.is_mixed,
            "training.scaffold must be false: mean gradients of one factor mean nothing in the "
            "turn of the other": recipe.training.scaffold,
            'privacy.profile must be "P0" or "P1": the noise of the others is planned for updates '
            "of one length": recipe.privacy.profile not in {"P0", "P1"},
        }
    return {}


def rules_of_privacy(recipe: Recipe) -> dict[str, bool]:
    """What the privacy profile asks of the other blocks.

    Args:
        recipe: The blocks.

    Returns:
        As `rules_of_lora`.
    """
    privacy, masking = recipe.privacy, recipe.masking
    if isinstance(privacy, NoPrivacy):
        return {}
    rules = {
        'aggregation.weighting must be "uniform": a weight tells the number of examples': (
            recipe.aggregation.weighting != "uniform"
        )
    }
    if isinstance(privacy, ExamplePrivacy):
        return rules | {
            "training.local_steps must be set: passes over the data tell how much there is": (
                recipe.training.local_steps is None
            ),
            "lora.dropout must be 0: noise is enough": recipe.lora.dropout > 0.0,
        }
    rules |= {
        "lora.min_rank and lora.optional_modules must be left out: how many agents trained a rank "
        "row tells who took part, and would need noise of its own": recipe.lora.is_mixed,
        "masking.clip_norm must equal privacy.clip_norm: both limit an update": (
            masking.mode != "off" and masking.clip_norm != privacy.clip_norm
        ),
    }
    if isinstance(privacy, CentralPrivacy):
        return rules | {
            'filter.rule must be "none": what is left out would tell of it without noise': (
                recipe.filter.rule != "none"
            ),
            'gate.rule must be "none": what becomes of a candidate tells of its noisy mean, '
            "also where it is refused, and ε counts the rounds that are published": (
                recipe.gate.rule != "none"
            ),
            'privacy.adaptive needs masking.mode = "off": under masks agents clip, to the norm '
            "of this manifest": privacy.adaptive is not None and masking.mode != "off",
        }
    return rules | _rules_of_shares(recipe, privacy)


def _rules_of_shares(recipe: Recipe, privacy: AgentPrivacy) -> dict[str, bool]:
    """Of profile P2, where each agent adds a share of the noise."""
    masking = recipe.masking
    most_ready = math.ceil(recipe.rounds.over_selection * recipe.rounds.cohort_target)
    return {
        'masking.mode must be "cells": each agent adds a share of the noise, and only their '
        "sum may be seen": masking.mode != "cells",
        "masking.word_bits must be 32, to hold the noise": (
            masking.mode != "off" and masking.word_bits != 32
        ),
        "masking.max_change must equal privacy.clip_norm: no value of an update is larger": (
            masking.mode != "off" and masking.max_change != privacy.clip_norm
        ),
        f"masking.cell_target must be above {most_ready // 2}: the {most_ready} agents that a "
        "round may select must be one cell, as each cell has noise of its own": (
            masking.mode != "off" and most_ready >= 2 * masking.cell_target
        ),
    }


def rules_of_scaffold(recipe: Recipe) -> dict[str, bool]:
    """What control variates ask of the other blocks.

    Args:
        recipe: The blocks.

    Returns:
        As `rules_of_lora`.
    """
    if not recipe.training.scaffold:
        return {}
    is_plain = (
        recipe.masking.mode == "off"
        and isinstance(recipe.privacy, NoPrivacy)
        and not recipe.lora.is_mixed
    )
    return {
        'masking.mode must be "off", privacy.profile "P0", and lora.min_rank and '
        "lora.optional_modules left out: the mean gradients that agents send are in clear, without "
        "noise, and of the whole adapter": not is_plain
    }

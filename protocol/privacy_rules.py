"""What a privacy profile, and what agents send beside their updates, ask of the other blocks."""

import math
from typing import TYPE_CHECKING

from protocol.privacy import AgentPrivacy, CentralPrivacy, ExamplePrivacy, NoPrivacy

if TYPE_CHECKING:
    from protocol.manifest import FederationManifest


def rules_of_privacy(manifest: "FederationManifest") -> dict[str, bool]:
    """What the profile asks of the other blocks, and whether it is broken."""
    privacy, masking = manifest.privacy, manifest.masking
    if isinstance(privacy, NoPrivacy):
        return {}
    rules = {
        'aggregation.weighting must be "uniform": a weight tells the number of examples': (
            manifest.aggregation.weighting != "uniform"
        )
    }
    if isinstance(privacy, ExamplePrivacy):
        return rules | {
            "training.local_steps must be set: passes over the data tell how much there is": (
                manifest.training.local_steps is None
            ),
            "lora.dropout must be 0: noise is enough": manifest.lora.dropout > 0.0,
        }
    rules |= {
        "lora.min_rank and lora.optional_modules must be left out: how many agents trained a rank "
        "row tells who took part, and would need noise of its own": manifest.lora.is_mixed,
        "masking.clip_norm must equal privacy.clip_norm: both limit an update": (
            masking.mode != "off" and masking.clip_norm != privacy.clip_norm
        ),
    }
    if isinstance(privacy, CentralPrivacy):
        return rules | {
            'filter.rule must be "none": what is left out would tell of it without noise': (
                manifest.filter.rule != "none"
            ),
            'privacy.adaptive needs masking.mode = "off": under masks agents clip, to the norm '
            "of this manifest": privacy.adaptive is not None and masking.mode != "off",
        }
    return rules | _rules_of_shares(manifest, privacy)


def _rules_of_shares(manifest: "FederationManifest", privacy: AgentPrivacy) -> dict[str, bool]:
    """Of profile P2, where each agent adds a share of the noise."""
    masking = manifest.masking
    most_ready = math.ceil(manifest.rounds.over_selection * manifest.rounds.cohort_target)
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


def rules_of_scaffold(manifest: "FederationManifest") -> dict[str, bool]:
    """What control variates ask of the other blocks, and whether it is broken."""
    if not manifest.training.scaffold:
        return {}
    is_plain = (
        manifest.masking.mode == "off"
        and isinstance(manifest.privacy, NoPrivacy)
        and not manifest.lora.is_mixed
    )
    return {
        'masking.mode must be "off", privacy.profile "P0", and lora.min_rank and '
        "lora.optional_modules left out: the mean gradients that agents send are in clear, without "
        "noise, and of the whole adapter": not is_plain
    }

"""What a federation declares: a frozen model in versioned blocks.

A manifest is a declaration, never code. Rounds and releases refer to it: see `protocol.chain`.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from protocol.blocks import (
    AggregationBlock,
    BaseBlock,
    ChangeLimitsBlock,
    FilterBlock,
    GateBlock,
    LoraBlock,
    MaskingBlock,
    NoGate,
    NoMasking,
    RoundsBlock,
    SumMasking,
    TrainingBlock,
    Weighting,
)
from protocol.numbers import Text, UnixTime
from protocol.privacy import NoPrivacy, PrivacyBlock
from protocol.rules import rules_of_lora, rules_of_privacy, rules_of_scaffold
from protocol.wire import Bytes16, Digest, Identity, WireModel, domain_hash


class FederationManifest(WireModel):
    """What an owner accepts at enrolment; it never changes for the life of a federation."""

    version: Literal[1] = 1
    federation: Bytes16
    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: Text = ""
    server: Identity
    registrar: Identity
    registrar_held_by_server: bool
    created_at: UnixTime
    base: BaseBlock
    lora: LoraBlock
    layout: Digest
    training: TrainingBlock
    masking: MaskingBlock = NoMasking()
    privacy: PrivacyBlock = NoPrivacy()
    aggregation: AggregationBlock = AggregationBlock()
    filter: FilterBlock = FilterBlock()
    gate: GateBlock = NoGate()
    rounds: RoundsBlock
    change_limits: ChangeLimitsBlock = ChangeLimitsBlock()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.registrar == self.server and not self.registrar_held_by_server:
            msg = "registrar is the server's own key, yet registrar_held_by_server is false"
            raise ValueError(msg)
        if isinstance(self.masking, SumMasking):
            self._check_masking(self.masking)
        asked = {
            f"privacy.profile is {self.privacy.profile}": rules_of_privacy(self),
            f"lora.rule is {self.lora.rule}": rules_of_lora(self),
            "training.scaffold is true": rules_of_scaffold(self),
        }
        for because, rules in asked.items():
            for rule, is_broken in rules.items():
                if is_broken:
                    msg = f"{because}, so {rule}"
                    raise ValueError(msg)
        return self

    def _check_masking(self, masking: SumMasking) -> None:
        if self.rounds.min_cohort < masking.min_cell:
            msg = (
                f"rounds.min_cohort {self.rounds.min_cohort} is below masking.min_cell "
                f"{masking.min_cell}: a masked round needs that many agents"
            )
            raise ValueError(msg)
        largest = (2**masking.word_bits - 1) // masking.max_cell
        if self.max_weight > largest:
            msg = (
                f"aggregation.max_weight {self.max_weight} times masking.max_cell "
                f"{masking.max_cell} wraps a word of {masking.word_bits} bits; at most {largest}"
            )
            raise ValueError(msg)

    @property
    def max_weight(self) -> int:
        """W, the largest FedAvg weight of an agent; 1 when all weigh alike."""
        rule = self.aggregation
        return 1 if rule.weighting is Weighting.UNIFORM else rule.max_weight

    def digest(self) -> bytes:
        """The hash that rounds, credentials and updates refer to."""
        return domain_hash("federation", self.as_json())

"""What a manifest's LoRA rule sends, what it goes with, and older documents."""

import json

import pytest
from pydantic import ValidationError

from protocol.blocks import (
    SENT,
    AggregationBlock,
    CellMasking,
    Factor,
    FedAvgBlock,
    FedAvgMBlock,
    FilterBlock,
    FilterRule,
    LoraBlock,
    LoraRule,
    RoundsBlock,
    TrainingBlock,
    Weighting,
)
from protocol.privacy import CentralPrivacy, ExamplePrivacy

SHAPE = {"rank": 4, "alpha": 8.0, "target_modules": ("q_proj",), "init_seed": 1}
MASKING = CellMasking(max_change=0.1, clip_norm=1.0)
ROUNDS = RoundsBlock(n_rounds=2, cohort_target=10, min_cohort=5)
MASKED = {"masking": MASKING, "rounds": ROUNDS, "aggregation": AggregationBlock(max_weight=100)}
UNIFORM = AggregationBlock(weighting=Weighting.UNIFORM)


@pytest.mark.parametrize(
    ("sent", "rule"), [((Factor.A, Factor.B), LoraRule.FEDIT), ((Factor.B,), LoraRule.FFA_LORA)]
)
def test_a_block_without_a_rule_is_fedit_or_ffa_lora_and_is_written_as_before(sent, rule):
    block = LoraBlock(**SHAPE, sent=sent)
    assert block.rule is rule
    assert "rule" not in block.as_json()
    assert block == LoraBlock(**SHAPE, sent=sent, rule=rule)


@pytest.mark.parametrize("rule", [LoraRule.ROLORA, LoraRule.FLEXLORA])
def test_any_other_rule_is_written_and_read_back(rule):
    block = LoraBlock(**SHAPE, sent=SENT[rule], rule=rule)
    assert block.as_json()["rule"] == rule.value
    assert LoraBlock.model_validate_json(json.dumps(block.as_json())) == block


@pytest.mark.parametrize("rule", LoraRule)
def test_a_rule_and_other_factors_than_it_sends_are_refused(rule):
    wrong = (Factor.A, Factor.B) if SENT[rule] == (Factor.B,) else (Factor.B,)
    with pytest.raises(ValidationError, match=f"the rule '{rule.value}' sends"):
        LoraBlock(**SHAPE, sent=wrong, rule=rule)


@pytest.mark.parametrize(
    ("rule", "blocks", "sentence"),
    [
        (LoraRule.FLEXLORA, MASKED, 'masking.mode must be "off"'),
        (LoraRule.FLEXLORA, {"filter": FilterBlock(rule=FilterRule.ROBUST)}, "filter.rule must be"),
        (
            LoraRule.FLEXLORA,
            {"aggregation": AggregationBlock(optimizer=FedAvgMBlock())},
            "aggregation.optimizer must be",
        ),
        (
            LoraRule.FLEXLORA,
            {"aggregation": AggregationBlock(optimizer=FedAvgBlock(learning_rate=0.5))},
            "aggregation.optimizer must be",
        ),
        (
            LoraRule.FLEXLORA,
            {
                "aggregation": UNIFORM,
                "privacy": CentralPrivacy(
                    epsilon=8.0, delta=1e-5, clip_norm=1.0, noise_multiplier=1.0
                ),
            },
            "privacy.profile must be",
        ),
    ],
)
def test_what_a_rule_cannot_go_with_is_refused_with_its_reason(
    make_manifest, rule, blocks, sentence
):
    lora = LoraBlock(**SHAPE, sent=SENT[rule], rule=rule)
    with pytest.raises(ValidationError, match=sentence):
        make_manifest(lora=lora, **blocks)


@pytest.mark.parametrize("rule", [LoraRule.FLEXLORA, LoraRule.ROLORA])
def test_rules_without_one_basis_for_all_rounds_go_with_no_parts_and_no_variates(
    make_manifest, rule
):
    block = {**SHAPE, "sent": SENT[rule], "rule": rule}
    with pytest.raises(ValidationError, match=r"lora\.min_rank and lora\.optional_modules must be"):
        make_manifest(lora=LoraBlock(**block, min_rank=1))
    training = TrainingBlock(local_steps=1, learning_rate=1e-3, scaffold=True)
    with pytest.raises(ValidationError, match=r"training\.scaffold must be false"):
        make_manifest(lora=LoraBlock(**block), training=training)


def test_flexlora_goes_with_noise_that_agents_add_while_they_train(make_manifest):
    lora = LoraBlock(**SHAPE, sent=SENT[LoraRule.FLEXLORA], rule=LoraRule.FLEXLORA)
    privacy = ExamplePrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0)
    manifest = make_manifest(lora=lora, aggregation=UNIFORM, privacy=privacy)
    assert manifest.lora.rule is LoraRule.FLEXLORA

"""The settings that `init` writes: the paper's recipe, with what the operator asked for."""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal

from pydantic import SecretStr, ValidationError

from aggregator_server.aggregation.robust.pipeline import MIN_FILTER_UNITS
from aggregator_server.config import (
    Enrolment,
    FederationSection,
    ServerConfig,
    ServerSection,
)
from aggregator_server.errors import ConfigError
from aggregator_server.private_recipes import PrivacyOptions, Profile, private_blocks
from protocol.base_description import BaseDescription
from protocol.blocks import (
    SENT,
    AggregationBlock,
    CellMasking,
    EvaluatorGate,
    FedAdagradBlock,
    FedAdamBlock,
    FedAvgBlock,
    FedAvgMBlock,
    FedYogiBlock,
    FilterBlock,
    FilterRule,
    HelperMasking,
    LoraBlock,
    LoraRule,
    MaskingBlock,
    NoGate,
    NoMasking,
    OptimizerBlock,
    RoundsBlock,
    Schedule,
    SumMasking,
    Template,
    TrainingBlock,
    Weighting,
)
from protocol.helped import HelperDescription
from protocol.limits import MIN_CELL
from protocol.wire import explain
from quant.adapter import adapter_shapes, sent_layout

_PAPER_MODULES: Final = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
_HEADS: Final = frozenset({"lm_head", "embed_out", "score"})
_SEED_BITS: Final = 53
_PAPER_DROPOUT: Final = 0.05
_PRIVATE_STEPS: Final = 10
"""Of a round under DP-SGD, where passes over the data would tell how much there is."""
_CELL_TARGET: Final = 10
_ASSUMED_RECORDS: Final = 1000
"""Of an agent, where a round is counted in passes over its records."""
_MASKED_MAX_WEIGHT: Final = 256
"""Weights scale masked values, so a cap far above the usual count would cost precision."""


class Masking(StrEnum):
    """Whether `init` asks for masks."""

    AUTO = "auto"
    """Where enough agents are expected for one cell; not where the server adds noise (P3)."""
    CELLS = "cells"
    HELPER = "helper"
    """A second operator, whose `helper.json` is given."""
    OFF = "off"


class Optimizer(StrEnum):
    """What `init` can make of a mean update."""

    FEDAVG = "fedavg"
    FEDAVGM = "fedavgm"
    FEDADAGRAD = "fedadagrad"
    FEDADAM = "fedadam"
    FEDYOGI = "fedyogi"


OPTIMIZERS: Final[Mapping[Optimizer, OptimizerBlock]] = {
    Optimizer.FEDAVG: FedAvgBlock(),
    Optimizer.FEDAVGM: FedAvgMBlock(),
    Optimizer.FEDADAGRAD: FedAdagradBlock(),
    Optimizer.FEDADAM: FedAdamBlock(),
    Optimizer.FEDYOGI: FedYogiBlock(),
}


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What `init` can be told; None stands for the default."""

    name: str
    description: str = ""
    n_rounds: int = 20
    cohort_target: int = 5
    min_cohort: int | None = None
    rank: int = 8
    alpha: float | None = None
    dropout: float | None = None
    """None: the paper's; 0 where noise is added."""
    target_modules: tuple[str, ...] | None = None
    lora_rule: LoraRule | None = None
    """None: FedIT in the open, FFA-LoRA under masks or noise."""
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)
    filter: FilterRule | None = None
    """None: the robust one where a round is expected to have units enough to judge."""
    evaluator: bytes | None = None
    """Identity of the trusted evaluator; None: no gate."""
    optimizer: OptimizerBlock = field(default_factory=FedAvgBlock)
    masking: Masking = Masking.AUTO
    helper: HelperDescription | None = None
    helper_url: str = ""
    cell_target: int | None = None
    word_bits: Literal[16, 32] = 16
    ready_delay_s: float = 10.0
    template: Template = Template.ALPACA
    max_length: int = 512
    batch_size: int = 32
    local_steps: int | None = None
    local_epochs: int | None = None
    learning_rate: float = 1.5e-4
    schedule: Schedule = Schedule.COSINE
    deadline_s: float = 24 * 3600.0
    open_enrolment: bool = False
    database_url: str = field(default="", repr=False)
    blobs_url: str = field(default="", repr=False)


def make_config(options: RecipeOptions, base: BaseDescription) -> ServerConfig:
    """Settings for a new federation.

    Args:
        options: What the operator asked for.
        base: Says which modules can be adapted.

    Raises:
        ConfigError: A value out of range.
        ManifestError: A target module is not in the base.
        PrivacyError: No noise keeps to the ε that is asked for, or it would drown the updates.

    Source: FedIT, arXiv 2305.05644, section 4: rank 8, alpha 16, dropout 0.05, six modules, batch
    32, 1.5e-4, 512 tokens, one local epoch, 20 rounds of 5 clients. Ours: the loss is on the
    response, and the learning rate follows one cosine over all rounds.
    """
    rules = options
    fewest = rules.cohort_target if rules.min_cohort is None else rules.min_cohort
    by_server = rules.privacy.is_on and rules.privacy.profile is Profile.CENTRAL
    masked = rules.masking in {Masking.CELLS, Masking.HELPER} or (
        rules.masking is Masking.AUTO
        and min(fewest, rules.cohort_target) >= MIN_CELL
        and not by_server  # whose guarantee takes honest members under masks
    )
    private, dp_sgd = rules.privacy.is_on, rules.privacy.is_of_examples
    epochs, steps = rules.local_epochs, rules.local_steps
    if steps is None and epochs is None:
        epochs, steps = (None, _PRIVATE_STEPS) if dp_sgd else (1, None)
    usual_rule = LoraRule.FFA_LORA if masked or private else LoraRule.FEDIT
    lora_rule = rules.lora_rule or usual_rule
    paper_dropout = 0.0 if dp_sgd else _PAPER_DROPOUT
    try:
        lora = LoraBlock(
            rank=rules.rank,
            alpha=2.0 * rules.rank if rules.alpha is None else rules.alpha,
            dropout=paper_dropout if rules.dropout is None else rules.dropout,
            target_modules=rules.target_modules or default_modules(base),
            sent=SENT[lora_rule],
            rule=lora_rule,
            init_seed=secrets.randbits(_SEED_BITS),
        )
        rounds = RoundsBlock(
            n_rounds=rules.n_rounds,
            cohort_target=rules.cohort_target,
            min_cohort=_min_cohort(rules, masked=masked),
            deadline_s=rules.deadline_s,
            cap_s=rules.deadline_s + max(60.0, rules.deadline_s / 12),
        )
        n_values = sent_layout(adapter_shapes(base, lora), lora.sent).n_values
        max_change = _max_change(rules, steps)
        privacy, masking = private_blocks(
            rules.privacy,
            masking=_masking(rules, n_values, max_change) if masked else NoMasking(),
            rounds=rounds,
            n_values=n_values,
            max_change=max_change,
        )
        return ServerConfig(
            federation=FederationSection(name=rules.name, description=rules.description),
            lora=lora,
            aggregation=AggregationBlock(
                weighting=Weighting.UNIFORM if private else Weighting.N_EXAMPLES,
                max_weight=_MASKED_MAX_WEIGHT if masked else AggregationBlock().max_weight,
                optimizer=rules.optimizer,
            ),
            filter=FilterBlock(rule=_filter(rules, lora, rounds, masking, by_server=by_server)),
            gate=NoGate() if rules.evaluator is None else EvaluatorGate(evaluator=rules.evaluator),
            masking=masking,
            privacy=privacy,
            training=TrainingBlock(
                template=rules.template,
                max_length=rules.max_length,
                batch_size=rules.batch_size,
                local_steps=steps,
                local_epochs=epochs,
                learning_rate=rules.learning_rate,
                schedule=rules.schedule,
            ),
            rounds=rounds,
            server=ServerSection(
                enrolment=Enrolment.OPEN if rules.open_enrolment else Enrolment.INVITE,
                database_url=SecretStr(rules.database_url),
                blobs_url=SecretStr(rules.blobs_url),
                helper_url=rules.helper_url,
            ),
        )
    except ValidationError as error:
        raise ConfigError(explain("the recipe", error)) from error


def default_modules(base: BaseDescription) -> tuple[str, ...]:
    """The paper's six projections where the base has them, else all its linear layers but heads."""
    known = {module.name.rpartition(".")[2] for module in base.linear_modules}
    paper = tuple(name for name in _PAPER_MODULES if name in known)
    return paper or tuple(sorted(known - _HEADS))


def _min_cohort(options: RecipeOptions, *, masked: bool) -> int:
    if options.min_cohort is not None:
        return options.min_cohort
    if options.privacy.is_on and options.privacy.profile is Profile.AGENT:
        return max(MIN_CELL, options.cohort_target)  # noise is made for the smallest cohort
    return MIN_CELL if masked else min(2, options.cohort_target)


def _filter(
    options: RecipeOptions,
    lora: LoraBlock,
    rounds: RoundsBlock,
    masking: MaskingBlock,
    *,
    by_server: bool,
) -> FilterRule:
    """The robust one where a usual round has units enough for evidence, and nothing forbids it.

    Where there are fewer it takes the geometric median, which costs something when nobody attacks:
    too much to have it where every round is so small, not where one is now and then.
    """
    if options.filter is not None:
        return options.filter
    n_units = rounds.cohort_target
    if isinstance(masking, SumMasking):
        n_units //= masking.cell_target
    fits = n_units >= MIN_FILTER_UNITS and not by_server and lora.rule is not LoraRule.FLEXLORA
    return FilterRule.ROBUST if fits else FilterRule.NONE


def _max_change(options: RecipeOptions, steps: int | None) -> float:
    """How far a round can move one value.

    Adam moves a value by about its learning rate in a step, so the steps of a round times the peak
    rate are a bound that is rarely reached.
    """
    if steps is None:
        batch_size = max(1, options.batch_size)  # less is refused with the recipe, by a sentence
        steps = (options.local_epochs or 1) * math.ceil(_ASSUMED_RECORDS / batch_size)
    return options.learning_rate * steps


def _masking(
    options: RecipeOptions, n_values: int, max_change: float
) -> CellMasking | HelperMasking:
    """Masks whose range holds what a round can change; their norm, half of it in every value."""
    target = options.cell_target or min(_CELL_TARGET, max(MIN_CELL, options.cohort_target))
    clip_norm = 0.5 * max_change * math.sqrt(n_values)
    if options.masking is Masking.HELPER:
        if options.helper is None:
            msg = "helper masks need the helper's description; give --helper helper.json"
            raise ConfigError(msg)
        return HelperMasking(
            word_bits=options.word_bits,
            max_change=max_change,
            clip_norm=clip_norm,
            cell_target=target,
            max_cell=2 * target - 1,
            ready_delay_s=options.ready_delay_s,
            helper=options.helper.helper,
            helper_key=options.helper.helper_key,
        )
    return CellMasking(
        word_bits=options.word_bits,
        max_change=max_change,
        clip_norm=clip_norm,
        cell_target=target,
        max_cell=2 * target - 1,
        ready_delay_s=options.ready_delay_s,
    )

"""The blocks of a manifest: what a federation can say about one matter each.

A block carries its own `version`; an unknown version, mode, rule or key is refused by `wire.parse`,
with a sentence that tells the owner what this version of the agent can honour. What blocks ask of
one another stands in `protocol.rules`.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from protocol import limits
from protocol.numbers import Decay, Fraction, PositiveFloat, PositiveInt, Seconds
from protocol.wire import Bytes1216, Digest, Identity, WireModel, is_none


class Factor(StrEnum):
    """One of the two factors of a LoRA pair: the update of a layer is `s · B · A`."""

    A = "A"
    B = "B"


class Template(StrEnum):
    """How a record becomes a prompt."""

    ALPACA = "alpaca"
    CHAT = "chat"


class LossOn(StrEnum):
    """Which tokens carry loss."""

    RESPONSE = "response"
    ALL = "all"


class Schedule(StrEnum):
    """The learning rate over the whole federation, from the first round to the last."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class Weighting(StrEnum):
    """The FedAvg weight of an agent."""

    N_EXAMPLES = "n_examples"
    UNIFORM = "uniform"


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


class BaseBlock(WireModel):
    """The base model, which never travels: every agent fetches it and proves it has the same.

    `fingerprint` covers the 4-bit codes, the scales and every unquantised tensor, so a different
    checkpoint or source dtype is refused, not averaged.
    """

    version: Literal[1] = 1
    model: Annotated[str, Field(min_length=1, max_length=256)]
    revision: Annotated[str, Field(max_length=64)] | None = None
    quantization: Literal["nf4-double-quant"] = "nf4-double-quant"
    source_dtype: Literal["float32", "bfloat16", "float16"]
    fingerprint: Digest
    tokenizer_digest: Digest


def _is_empty(value: tuple[str, ...]) -> bool:
    return not value


SENT: Final[Mapping[LoraRule, tuple[Factor, ...]]] = {
    LoraRule.FEDIT: (Factor.A, Factor.B),
    LoraRule.FFA_LORA: (Factor.B,),
    LoraRule.ROLORA: (Factor.A, Factor.B),
    LoraRule.FLEXLORA: (Factor.A, Factor.B),
}
"""The factors that agents send under each rule, over all rounds."""


def _rule_of_sent(found: Mapping[str, Any]) -> LoraRule:
    is_b = found.get("sent") == SENT[LoraRule.FFA_LORA]
    return LoraRule.FFA_LORA if is_b else LoraRule.FEDIT


class LoraBlock(WireModel):
    """The adapter's shape, and how agents' adapters become one (`LoraRule`).

    `rule` is left out where `sent` tells it: `(A, B)` is FedIT, `(B,)` is FFA-LoRA.

    With `min_rank` or `optional_modules` agents differ in what they train (`is_mixed`): a number
    for each rank row of each module then says whether an agent trained it.
    """

    version: Literal[1] = 1
    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: PositiveFloat
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,64}$")], ...],
        Field(min_length=1, max_length=limits.MAX_TARGET_MODULES),
    ]
    sent: tuple[Factor, ...] = (Factor.A, Factor.B)
    rule: Annotated[LoraRule, Field(exclude_if=is_told_by_sent)] = Field(
        default_factory=_rule_of_sent
    )
    init_seed: Annotated[int, Field(ge=0, le=2**53 - 1)]
    min_rank: Annotated[int | None, Field(ge=1, le=1024, exclude_if=is_none)] = None
    """An agent may train the first rows alone, from this many on; None: all train `rank`."""
    optional_modules: Annotated[
        tuple[str, ...], Field(max_length=limits.MAX_TARGET_MODULES, exclude_if=_is_empty)
    ] = ()
    """Those of `target_modules` that an agent may leave out."""

    @property
    def is_mixed(self) -> bool:
        """Whether agents may differ in what they train."""
        return self.min_rank is not None or bool(self.optional_modules)

    @property
    def scale(self) -> float:
        """Of the update s · B · A: s = α / rank, whatever rank an agent trains."""
        return self.alpha / self.rank

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sent != SENT[self.rule]:
            named, right = ([f.value for f in factors] for factors in (self.sent, SENT[self.rule]))
            msg = f"the rule {self.rule.value!r} sends {right}, not {named}; leave `sent` out"
            raise ValueError(msg)
        if len(set(self.target_modules)) != len(self.target_modules):
            msg = f"target_modules names a module twice: {list(self.target_modules)}"
            raise ValueError(msg)
        if self.min_rank is not None and self.min_rank >= self.rank:
            msg = f"min_rank {self.min_rank} must be below rank {self.rank}, or be left out"
            raise ValueError(msg)
        optional = set(self.optional_modules)
        if len(optional) != len(self.optional_modules) or not optional < set(self.target_modules):
            msg = (
                f"optional_modules {list(self.optional_modules)} must name some of target_modules, "
                "each once, and not all: what nobody must train is no part of the adapter"
            )
            raise ValueError(msg)
        return self


def _is_false(value: object) -> bool:
    return value is False


def _is_zero(value: float) -> bool:
    """A later key is left out where it says nothing, so that what was signed stays the same."""
    return value == 0.0


class TrainingBlock(WireModel):
    """What an agent does in one round. Exactly one of `local_steps`, `local_epochs` is set."""

    version: Literal[1] = 1
    template: Template = Template.ALPACA
    loss_on: LossOn = LossOn.RESPONSE
    max_length: Annotated[int, Field(ge=16, le=131_072)] = 512
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    local_steps: PositiveInt | None = None
    local_epochs: PositiveInt | None = None
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)]
    schedule: Schedule = Schedule.COSINE
    final_frac: Fraction = 0.1
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: PositiveFloat | None = 1.0
    proximal_mu: Annotated[float, Field(ge=0.0, exclude_if=_is_zero)] = 0.0
    """Pulls the weights back to those of the round's start (FedProx, arXiv 1812.06127); 0: not."""
    scaffold: Annotated[bool, Field(exclude_if=_is_false)] = False
    """Corrects each step by control variates (SCAFFOLD, arXiv 1910.06378), which agents send in
    clear beside their updates."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            msg = "set exactly one of local_steps and local_epochs"
            raise ValueError(msg)
        return self


class NoMasking(WireModel):
    """Masking off: the server sees each update by itself."""

    version: Literal[1] = 1
    mode: Literal["off"] = "off"


class SumMasking(WireModel):
    """What both trust models share: the server learns one sum for each cell.

    `n` agents are cut into max(1, ⌊n / `cell_target`⌋) cells (PROTOCOL, "Cells"), of at least
    `min_cell` and at most `max_cell` members.

    `max_change` is the largest change of one value that an update can carry, `clip_norm` its
    largest L2 norm (C of PROTOCOL, "Encoding"); both in the units of the adapter's values.
    """

    version: Literal[1] = 1
    word_bits: Literal[16, 32] = 16
    max_change: PositiveFloat
    clip_norm: PositiveFloat
    cell_target: Annotated[int, Field(ge=limits.MIN_CELL, le=limits.MAX_CELL)] = 10
    min_cell: Annotated[int, Field(ge=limits.MIN_CELL, le=limits.MAX_CELL)] = limits.MIN_CELL
    max_cell: Annotated[int, Field(ge=limits.MIN_CELL, le=limits.MAX_CELL)] = 19
    ready_delay_s: Annotated[float, Field(ge=0.0, le=3600.0)] = 10.0
    """A finished update is announced after a random delay of up to this, as its timing hints at
    training time."""

    @model_validator(mode="after")
    def _check_cells(self) -> Self:
        if self.min_cell > self.cell_target:
            msg = f"min_cell {self.min_cell} is above cell_target {self.cell_target}"
            raise ValueError(msg)
        least = 2 * self.cell_target - 1
        if self.max_cell < least:
            msg = (
                f"max_cell {self.max_cell} is below {least}: {least} ready agents make one cell "
                f"when cell_target is {self.cell_target}"
            )
            raise ValueError(msg)
        return self


class CellMasking(SumMasking):
    """Secure aggregation in cells: the members' own masks cancel in the sum.

    `colluders` may raise what a cell tolerates above the rule, never lower it.
    """

    mode: Literal["cells"] = "cells"
    colluders: Annotated[int, Field(ge=1, le=limits.MAX_CELL)] | None = None
    stage_s: Annotated[float, Field(ge=1.0, le=24 * 3600.0)] = 90.0
    """Longest wait of a cell for messages without progress; an upload that moves may go on."""


class HelperMasking(SumMasking):
    """Helper masks: a second operator, who does not collude with the first, knows the masks.

    `helper` signs, and `helper_key` is the key that agents seal their masks' seeds to: the raw
    public keys of ML-KEM-768 and X25519, one after the other.
    """

    mode: Literal["helper"] = "helper"
    helper: Identity
    helper_key: Bytes1216
    helper_wait_s: Annotated[float, Field(ge=1.0, le=7 * 24 * 3600.0)] = 3600.0
    """How long after the round's cap the server waits for the helper's answer."""


MaskingBlock = Annotated[NoMasking | CellMasking | HelperMasking, Field(discriminator="mode")]
"""Whether the server sees single updates, and what it sees instead."""


class FedAvgBlock(WireModel):
    """The mean update is added, times the learning rate."""

    kind: Literal["fedavg"] = "fedavg"
    learning_rate: PositiveFloat = 1.0


class FedAvgMBlock(WireModel):
    """Momentum over the rounds (arXiv 1909.06335)."""

    kind: Literal["fedavgm"] = "fedavgm"
    learning_rate: PositiveFloat = 1.0
    momentum: Decay = 0.9


class FedAdagradBlock(WireModel):
    """Adagrad on the mean update (Reddi et al., arXiv 2003.00295, algorithm 2)."""

    kind: Literal["fedadagrad"] = "fedadagrad"
    learning_rate: PositiveFloat = 1e-3
    beta1: Decay = 0.0
    tau: PositiveFloat = 1e-3


class FedAdamBlock(WireModel):
    """Adam on the mean update (the same)."""

    kind: Literal["fedadam"] = "fedadam"
    learning_rate: PositiveFloat = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: PositiveFloat = 1e-3


class FedYogiBlock(WireModel):
    """Yogi on the mean update (the same)."""

    kind: Literal["fedyogi"] = "fedyogi"
    learning_rate: PositiveFloat = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: PositiveFloat = 1e-3


OptimizerBlock = Annotated[
    FedAvgBlock | FedAvgMBlock | FedAdagradBlock | FedAdamBlock | FedYogiBlock,
    Field(discriminator="kind"),
]
"""What the server does with a mean update."""


def _is_plain(value: object) -> bool:
    return value == FedAvgBlock()


class AggregationBlock(WireModel):
    """How updates become one. `max_weight` caps an agent's weight (W of PROTOCOL, "Encoding")."""

    version: Literal[1] = 1
    rule: Literal["fedavg"] = "fedavg"
    weighting: Weighting = Weighting.N_EXAMPLES
    max_weight: Annotated[int, Field(ge=1, le=limits.MAX_WEIGHT)] = 10_000
    optimizer: Annotated[OptimizerBlock, Field(exclude_if=_is_plain)] = FedAvgBlock()


class FilterRule(StrEnum):
    """What is done about updates, or sums of cells, that lie apart from the others."""

    NONE = "none"
    ROBUST = "robust"
    """Caps their norms, and removes outliers or takes the geometric median, by their number."""


class FilterBlock(WireModel):
    """Outlier filtering (LEARNING, "Filtering outliers")."""

    version: Literal[1] = 1
    rule: FilterRule = FilterRule.NONE


class NoGate(WireModel):
    """Nobody looks at a candidate before it is published."""

    version: Literal[1] = 1
    rule: Literal["none"] = "none"


class EvaluatorGate(WireModel):
    """A trusted evaluator scores each candidate on records of its own (LEARNING, "Gate").

    A candidate passes if its held-out loss, in nats per token, rises above that of the adapter
    which the round started from by no more than `max_loss_increase`, averaged over the categories,
    and by no more than `max_category_loss_increase` in each of them. One that does not pass is made
    again without some of the cells, in up to `max_retries` ways; if none of these passes either,
    or the evaluator says nothing for `wait_s`, the old release stays.
    """

    version: Literal[1] = 1
    rule: Literal["evaluator"] = "evaluator"
    evaluator: Identity
    max_loss_increase: Annotated[float, Field(ge=0.0)] = 0.02
    max_category_loss_increase: Annotated[float, Field(ge=0.0)] = 0.2
    max_retries: Annotated[int, Field(ge=0, le=limits.MAX_CANDIDATES)] = limits.MAX_CANDIDATES
    wait_s: Annotated[float, Field(ge=1.0, le=7 * 24 * 3600.0)] = 3600.0


GateBlock = Annotated[NoGate | EvaluatorGate, Field(discriminator="rule")]
"""Who judges a candidate before it becomes a release."""


class RoundsBlock(WireModel):
    """How many rounds, of whom, and for how long.

    A round selects `⌈over_selection · cohort_target⌉` agents (or all that are present), closes at
    `cohort_target` uploads, or at `deadline_s` when at least `min_cohort` have arrived. An upload
    under way at the deadline may go on while it moves at `min_upload_bytes_per_s`, until `cap_s`.
    """

    version: Literal[1] = 1
    n_rounds: Annotated[int, Field(ge=1, le=limits.MAX_ROUNDS)]
    cohort_target: Annotated[int, Field(ge=1, le=limits.MAX_COHORT)]
    min_cohort: Annotated[int, Field(ge=1, le=limits.MAX_COHORT)]
    over_selection: Annotated[float, Field(ge=1.0, le=10.0)] = 1.3
    deadline_s: Seconds = 24 * 3600.0
    cap_s: Seconds = 26 * 3600.0
    min_upload_bytes_per_s: PositiveFloat = 16 * 1024.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_cohort > self.cohort_target:
            msg = f"min_cohort {self.min_cohort} is above cohort_target {self.cohort_target}"
            raise ValueError(msg)
        if self.cap_s < self.deadline_s:
            msg = f"cap_s {self.cap_s} is before deadline_s {self.deadline_s}"
            raise ValueError(msg)
        return self


class ChangeLimitsBlock(WireModel):
    """The largest change of a received adapter that an agent accepts (PROTOCOL, check 17)."""

    version: Literal[1] = 1
    max_tensor_change_norm: PositiveFloat = 1_000.0
    """L2 norm of one tensor's change between two consecutive releases."""

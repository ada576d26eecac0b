"""What a round and a release declare; with the federation's manifest they form a chain.

A `RoundManifest` names the federation manifest and the release that it starts from, a `Release`
names its predecessor and the round that made it.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from protocol import limits
from protocol.blocks import FilterRule
from protocol.gating import EvaluationReport
from protocol.numbers import Count, Fraction, PositiveFloat, PositiveInt, RoundNumber, UnixTime
from protocol.signing import Signed
from protocol.wire import Bytes16, Digest, WireModel, domain_hash, is_none


class BlobRef(WireModel):
    """A content-addressed file: fetched by its digest, refused when it does not match."""

    sha256: Digest
    n_bytes: Annotated[int, Field(ge=0, le=limits.MAX_UPDATE_BYTES)]


class RoundManifest(WireModel):
    """One round: where it starts from, who is drawn, and until when.

    The cohort is drawn by rank of HMAC(`selection_seed`, identity); an agent that cannot train is
    replaced by the next in rank, so the manifest names the seed and the sizes.
    """

    version: Literal[1] = 1
    federation: Bytes16
    federation_digest: Digest
    round: RoundNumber
    release: Count
    release_digest: Digest
    sent: BlobRef
    selection_seed: Digest
    cohort_size: PositiveInt
    schedule_start: Fraction
    schedule_end: Fraction
    update_n_bytes: Annotated[int, Field(ge=1, le=limits.MAX_UPDATE_BYTES)]
    opened_at: UnixTime
    deadline_at: UnixTime
    cap_at: UnixTime

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.opened_at <= self.deadline_at <= self.cap_at:
            msg = "opened_at, deadline_at and cap_at are out of order"
            raise ValueError(msg)
        if not self.schedule_start <= self.schedule_end:
            msg = "schedule_start is after schedule_end"
            raise ValueError(msg)
        return self

    def digest(self) -> bytes:
        """The hash that belongs to this round number, and to no other manifest of it."""
        return domain_hash("round", self.as_json())


class CellRef(WireModel):
    """A cell that took part: its transcript hash T and SHA-256 of U3, the members summed."""

    transcript: Digest
    members: Digest


class CovarianceGap(WireModel):
    """What averaging A and B apart lost in a round, estimated by random projections.

    The mean of the agents' products is the product of the mean factors and a covariance. Norms are
    Frobenius norms over all modules, right to about 9 %; exact on layers of up to 128 values.
    """

    estimated_norm: Annotated[float, Field(ge=0.0)]
    """Of the covariance s·Σ p_k (B_k − B̄)(A_k − Ā)."""
    estimated_change_norm: Annotated[float, Field(ge=0.0)]
    """Of what the mean product changes: s·Σ p_k B_k A_k, less the product that the round began
    with."""

    def describe(self) -> str:
        """The loss beside the change, in words."""
        if self.estimated_change_norm == 0.0:
            return "of a round that changed nothing"
        return f"about {self.estimated_norm / self.estimated_change_norm:.1%} of the change"


class AggregationReport(WireModel):
    """What the server may tell everyone about the average it made."""

    rule: Literal["none", "fedavg", "flexlora"]
    n_cells: Count
    n_agents: Count
    update_norm: Annotated[float, Field(ge=0.0)]
    """L2 norm of the mean update; under FlexLoRA, of the step from the old factors to the new."""
    covariance_gap: Annotated[CovarianceGap | None, Field(exclude_if=is_none)] = None
    """Where single updates are seen, hold both factors, and these are averaged."""
    left_out_norm: Annotated[float | None, Field(ge=0.0, exclude_if=is_none)] = None
    """Under FlexLoRA: Frobenius norm over all modules of the mean product beyond rank r."""


class NoisyAggregationReport(WireModel):
    """The same under profile P3: nothing here was seen without noise."""

    rule: Literal["noisy-fedavg"] = "noisy-fedavg"
    n_cells: Count
    n_agents: Count
    update_norm: Annotated[float, Field(ge=0.0)]
    """L2 norm of the noisy mean update."""
    clip_norm: PositiveFloat
    """Of this round."""
    noise_std: PositiveFloat
    """Of each value of the mean."""
    next_clip_norm: PositiveFloat
    """Of the next round: another one where the norm is adaptive."""


class FilterReport(WireModel):
    """What the filter did; `n_rejected` counts cells."""

    rule: Literal[FilterRule.NONE, FilterRule.ROBUST]
    n_cells: Count
    n_rejected: Count


class NoVerdict(WireModel):
    """No evaluator was asked: the federation has none, or no round made this release."""

    rule: Literal["none"] = "none"
    accepted: Literal[True] = True


class EvaluatorVerdict(WireModel):
    """The evaluator let this adapter pass, as its signed report shows."""

    rule: Literal["evaluator"] = "evaluator"
    accepted: Literal[True] = True
    report: Signed[EvaluationReport]
    n_left_out: Count
    """Cells that were left out after the adapter with them had not passed."""


Verdict = Annotated[NoVerdict | EvaluatorVerdict, Field(discriminator="rule")]
"""What the trusted evaluator said of the adapter."""


class Release(WireModel):
    """A published global adapter, chained to its predecessor.

    `adapter` is the whole PEFT file (`adapter_model.safetensors`); `sent` holds only the factors
    that agents send, and is what they fetch each round; `config` is `adapter_config.json`.
    `control` is SCAFFOLD's c, in the names and shapes of `sent`; None: zero, or no SCAFFOLD.
    """

    version: Literal[1] = 1
    federation: Bytes16
    number: Count
    round: Count
    previous: Digest | None
    federation_digest: Digest
    round_digest: Digest | None
    adapter: BlobRef
    sent: BlobRef
    config: BlobRef
    control: Annotated[BlobRef | None, Field(exclude_if=is_none)] = None
    accepted: tuple[CellRef, ...]
    rejected: tuple[CellRef, ...]
    aggregation: Annotated[AggregationReport | NoisyAggregationReport, Field(discriminator="rule")]
    filter: FilterReport
    verdict: Verdict
    rolled_back_to: Count | None = None
    """Set when the operator published an older adapter again; its release number."""
    created_at: UnixTime

    @model_validator(mode="after")
    def _check(self) -> Self:
        first = self.number == 0
        if (self.previous is None) != first:
            msg = "exactly release 0 has no predecessor"
            raise ValueError(msg)
        if first and self.round_digest is not None:
            msg = "release 0 comes from no round"
            raise ValueError(msg)
        back = self.rolled_back_to
        if back is not None and (self.round_digest is not None or back >= self.number):
            msg = (
                f"rolled_back_to is {back}: it must be below {self.number}, and round_digest null: "
                "no round makes an older adapter"
            )
            raise ValueError(msg)
        return self

    def digest(self) -> bytes:
        """The hash that the next release names as its predecessor."""
        return domain_hash("release", self.as_json())

"""What is audited: the protections, what is claimed for each, and how large the experiments are."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from privacy.accounting import WEAK_MULTIPLIER, SampledGaussian, calibrate, spent
from privacy.dp_sgd.mechanism import Mechanism
from protocol.blocks import Factor, LoraBlock, TrainingBlock
from protocol.guarantee import OFF
from simulations.errors import AuditInputError

Tell = Callable[[str, int, int], None]
"""Told what is done, how many parts of it are, and of how many."""

UNIT: Final = "example"
NEIGHBOURING: Final = "add or remove one"
ACCOUNTANT: Final = "PLD"
CLAIMED_AGAINST: Final = "whoever sees the gradient that each step releases, and all that follows"

_EVERY_LINEAR: Final = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)


@dataclass(frozen=True, kw_only=True)
class Protection:
    """What a training is protected by: nothing, a target ε, or a noise multiplier.

    Raises (at construction):
        AuditInputError: Both are given, or one that is not a finite number above 0.
    """

    epsilon: float | None = None
    noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise AuditInputError("a training has a target ε or a noise multiplier, not both")
        for name, value in (("ε", self.epsilon), ("noise multiplier", self.noise_multiplier)):
            if value is not None and not 0.0 < value < math.inf:
                raise AuditInputError(f"{name} = {value:g}; it must be a finite number above 0")

    @property
    def name(self) -> str:
        """What tables and figures call it."""
        if self.epsilon is not None:
            return f"ε = {self.epsilon:g}"
        if self.noise_multiplier is not None:
            return f"z = {self.noise_multiplier:g}"
        return "noise off"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the accountant claims of one training.

    Attributes:
        epsilon: Of each example; infinite where nothing is claimed.
        delta: Of the claim, and of an audit of it.
        noise_multiplier: z; None: no noise (profile P0).
        sampling_probability: q of each step. Without noise: the share of an epoch in a batch.
        n_steps: Of the training.
    """

    epsilon: float
    delta: float
    noise_multiplier: float | None
    sampling_probability: float
    n_steps: int

    def mechanism(self, *, clip_norm: float, n_examples: float) -> Mechanism:
        """The Gaussian mechanism that the claim is of.

        Args:
            clip_norm: Of an example's gradient.
            n_examples: By which the divisor is fixed; no coin may show in it.

        Raises:
            AuditInputError: There is no noise, so there is no mechanism.
        """
        if self.noise_multiplier is None:
            raise AuditInputError("a training without noise has no mechanism")
        return Mechanism(
            clip_norm=clip_norm,
            noise_multiplier=self.noise_multiplier,
            expected_batch=self.sampling_probability * n_examples,
        )

    def describe(self) -> str:
        """All that its ε means, in one line."""
        if self.noise_multiplier is None:
            return OFF
        said = f"ε ≤ {self.epsilon:.4g}" if math.isfinite(self.epsilon) else "ε = ∞"
        weak = (
            f"; a noise multiplier under {WEAK_MULTIPLIER:g} protects little"
            if self.noise_multiplier < WEAK_MULTIPLIER
            else ""
        )
        return (
            f"{said} at δ = {self.delta:g} for each example ({NEIGHBOURING}; against "
            f"{CLAIMED_AGAINST}); Poisson sampling with q = {self.sampling_probability:.4g}, noise "
            f"multiplier {self.noise_multiplier:.4g}, {self.n_steps} steps; {ACCOUNTANT} "
            f"accountant{weak}"
        )

    def as_json(self) -> dict[str, Any]:
        """The same for programs; `epsilon` is None where nothing is claimed."""
        private = self.noise_multiplier is not None
        return {
            "profile": "P1" if math.isfinite(self.epsilon) else "P0",
            "epsilon": self.epsilon if math.isfinite(self.epsilon) else None,
            "delta": self.delta,
            "unit": UNIT,
            "neighbouring": NEIGHBOURING,
            "adversary": CLAIMED_AGAINST,
            "sampling": "Poisson" if private else "shuffled batches",
            "sampling_probability": self.sampling_probability,
            "noise_multiplier": self.noise_multiplier,
            "steps": self.n_steps,
            "accountant": ACCOUNTANT if private else None,
        }


def make_claim(
    protection: Protection, *, delta: float, sampling_probability: float, n_steps: int
) -> Claim:
    """What holds of a training with this protection, by the accountant of the agents.

    Args:
        protection: A target ε is calibrated to the least noise that keeps to it.
        delta: Below 1.
        sampling_probability: q.
        n_steps: At least 1.

    Raises:
        AccountingError: No noise keeps to the target, or a value is out of range.
    """
    if protection.epsilon is not None:
        multiplier: float | None = calibrate(
            epsilon=protection.epsilon,
            delta=delta,
            sampling_probability=sampling_probability,
            n_steps=n_steps,
        )
    else:
        multiplier = protection.noise_multiplier
    epsilon = math.inf
    if multiplier is not None:
        event = SampledGaussian(
            noise_multiplier=multiplier,
            sampling_probability=sampling_probability,
            n_steps=n_steps,
        )
        epsilon = spent([event], delta=delta).epsilon
    return Claim(
        epsilon=epsilon,
        delta=delta,
        noise_multiplier=multiplier,
        sampling_probability=sampling_probability,
        n_steps=n_steps,
    )


@dataclass(frozen=True, kw_only=True)
class AuditRecipe:
    """The experiments on the embedded base; found by measurement, see docs/LOG.md.

    Attributes:
        protections: Audited side by side.
        delta: δ of the claims, and of the audits of them.
        confidence: Of the bounds from canaries.
        seed: Of the first run: canaries, coins, records. The noise is the system's, never seeded.
        n_runs: Runs of each canary audit, with seeds from `seed` on; their guesses are pooled.
        n_canaries: Of each run; about half of them are trained on.
        n_ordinary: Ordinary records beside them.
        n_steps: Of the canaries' training.
        sampling_probability: q of its steps.
        guess_frac: Part of the canaries that is guessed, fixed before any score is seen.
        clip_norm: Of an example's gradient.
        learning_rate: AdamW's.
        rank: Of the adapter.
        sent: Factors that are trained and sent.
        n_members: Records of the membership audit's training.
        n_non_members: Records like them that are not trained on.
        n_member_steps: Of its training.
        member_batch_size: Records of a step of it, in expectation.
        probe_rank: Of the adapter whose update is probed.
        probe_sizes: Batches that are probed, in records.
        n_probes: Batches of each size.

    Raises (at construction):
        AuditInputError: A value out of range.
    """

    protections: tuple[Protection, ...] = (
        Protection(),
        Protection(epsilon=8.0),
        Protection(epsilon=1.0),
    )
    delta: float = 1e-5
    confidence: float = 0.999
    seed: int = 1
    n_runs: int = 2
    n_canaries: int = 256
    n_ordinary: int = 64
    n_steps: int = 6
    sampling_probability: float = 0.5
    guess_frac: float = 0.5
    clip_norm: float = 1.0
    learning_rate: float = 5e-3
    rank: int = 8
    sent: tuple[Factor, ...] = (Factor.A, Factor.B)
    n_members: int = 64
    n_non_members: int = 200
    n_member_steps: int = 64
    member_batch_size: int = 8
    probe_rank: int = 16
    probe_sizes: tuple[int, ...] = (1, 2, 4, 8)
    n_probes: int = 6

    def __post_init__(self) -> None:
        """Check the values that a user can set."""
        if not self.protections:
            raise AuditInputError(
                "there is nothing to audit: name an ε, a noise multiplier, or no noise"
            )
        for name, value in (("delta", self.delta), ("confidence", self.confidence)):
            if not 0.0 < value < 1.0:
                raise AuditInputError(f"{name} is {value:g}; it lies between 0 and 1")
        if not 0.0 < self.sampling_probability <= 1.0:
            raise AuditInputError(
                f"the sampling probability is {self.sampling_probability:g}; it lies above 0 and "
                "is at most 1"
            )
        if self.n_canaries < 8:
            raise AuditInputError(f"{self.n_canaries} canaries tell nothing; at least 8 are needed")

    @property
    def n_guesses(self) -> int:
        """Canaries that are guessed in a run."""
        return max(2, round(self.guess_frac * self.n_canaries))

    @property
    def n_expected(self) -> float:
        """Examples of a canary run in expectation, by which the divisor of its steps is fixed."""
        return self.n_ordinary + self.n_canaries / 2

    @property
    def canary_batch_size(self) -> int:
        """Examples of a step, in expectation."""
        return max(1, round(self.sampling_probability * self.n_expected))

    def lora(self, rank: int | None = None) -> LoraBlock:
        """The adapter: on all seven linear layers of the base."""
        rank = self.rank if rank is None else rank
        return LoraBlock(
            rank=rank,
            alpha=2.0 * rank,
            target_modules=_EVERY_LINEAR,
            sent=self.sent,
            init_seed=7,
        )

    def training(self, *, batch_size: int, n_steps: int) -> TrainingBlock:
        """The block of a training of `n_steps` steps."""
        return TrainingBlock(
            batch_size=batch_size,
            local_steps=n_steps,
            learning_rate=self.learning_rate,
            max_length=192,
        )

    def canary_claim(self, protection: Protection) -> Claim:
        """What is claimed of a canary run.

        Raises:
            AccountingError: As `make_claim`.
        """
        return make_claim(
            protection,
            delta=self.delta,
            sampling_probability=self.sampling_probability,
            n_steps=self.n_steps,
        )

    def member_claim(self, protection: Protection) -> Claim:
        """What is claimed of the membership audit's release.

        Raises:
            AccountingError: As `make_claim`.
        """
        return make_claim(
            protection,
            delta=self.delta,
            sampling_probability=min(1.0, self.member_batch_size / self.n_members),
            n_steps=self.n_member_steps,
        )


@dataclass(frozen=True, kw_only=True)
class ReleaseRules:
    """How membership in a given release is audited.

    Attributes:
        base: Folder or hub id of its base; None: the one that it names.
        max_length: Tokens of a record; None: the training's, or 512.
        seed: Of halves and resamples.
        delta: δ of the bound.
    """

    base: str | None = None
    max_length: int | None = None
    seed: int = 1
    delta: float = 1e-5

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0.0 < self.delta < 1.0:
            raise AuditInputError(f"delta is {self.delta:g}; it lies between 0 and 1")

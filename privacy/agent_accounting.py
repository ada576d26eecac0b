"""What profile P2 costs: ε of one agent over all rounds, and the noise that a budget takes.

ε is for an agent's updates in all rounds together, each replaced by zero (`distributed_noise`). No
sampling is counted on: an agent may take part in every round.

Two ways lead to ε, and the second can only be larger:

*By a Gaussian mechanism that is post-processed* (`Spent.pld`). Let G be N(0, v − κ²), and let the
integer Y have probabilities proportional to exp(−(y − G)²/2κ²). By Poisson summation, Y's own are
proportional to exp(−y²/2v) to a factor 1 ± η for all y alike, η = 2·Σ exp(−2π²κ²j²). So are those
of the sum of h variables N_Z(0, σ²), with v = hσ², to factors with σ²·k/(k + 1) in the place of κ²,
k = 1 … h − 1. Moving G by whole numbers moves Y by the same. Hence a P2 release is a function of
that of a Gaussian mechanism of deviation √(hσ² − κ²), to a factor e^±gap for each value.

*By concentrated differential privacy* (`Spent.rdp`), with the theorem of the paper.

Source: Kairouz, Liu and Steinke, arXiv 2102.06387, Theorem 1 and Proposition 14 (the concentrated
bound; sums of discrete Gaussians are close to one); Peikert, "An efficient and parallel Gaussian
sampler for lattices" (CRYPTO 2010), Theorem 3.1 (a continuous Gaussian made discrete); Canonne,
Kamath and Steinke, arXiv 2004.00010, Proposition 12 (from Rényi divergences to ε and δ). We deviate
in the first way: the papers put the two closeness results to other uses, and account by the second.
"""

import math
from typing import Final

import numpy as np

from privacy.accounting import SampledGaussian, Spent, calibrate, spent
from privacy.discrete_gaussian import TAIL
from privacy.distributed_noise import (
    LEAST_SHARE_VARIANCE,
    AgentNoise,
    Cohort,
    agent_noise,
    largest_square,
    noise_of,
)
from privacy.errors import AccountingError, DrownedError
from protocol.blocks import CellMasking, MaskingBlock
from protocol.privacy import AgentPrivacy, CentralPrivacy, PrivacyBlock

DEFAULT_STEPS: Final = 2**16
"""sC: rounding then adds under 10^-3 to the sensitivity of 200,000 values."""
MOST_NOISE: Final = 10.0
"""Of a run: the norm of its noise relative to the longest possible sum of its updates' means."""

_MOST_VALUES: Final = 2**24
"""Of an update, where their number is not known yet: it makes a rounded one 0.1 % longer."""
KERNEL_VARIANCE: Final = 4.0
"""κ²: costs this much of hσ², usually a millionth, for a gap of 10^-33."""
_RESERVE: Final = 2.0**-10
"""Of δ, for the tails that are never drawn."""
_ORDERS: Final = 1.0 + np.logspace(-4.0, 6.0, 4001)
_PRECISION: Final = 1e-3
"""How far the Gaussian's ε may exceed the other, relative and absolute: what PLD may err by."""


def closeness(n_shares: int, share_variance: float) -> float:
    """τ of the paper: how far a sum of discrete Gaussians is from being one.

    τ = 10·Σ exp(−2π²σ²k/(k + 1)) over k = 1 … n − 1.

    Args:
        n_shares: n, at least 1.
        share_variance: σ², in steps².
    """
    exponents = (share_variance * k / (k + 1.0) for k in range(1, n_shares))
    return 10.0 * math.fsum(math.exp(-2.0 * math.pi**2 * exponent) for exponent in exponents)


def concentrated_epsilon(
    *, sensitivity: float, n_values: int, n_shares: int, share_variance: float
) -> float:
    """The ε for which one release is ½ε²-concentrated differentially private.

    min(√(Δ₂²/nσ² + 2τd), Δ₂/√(n)σ + τ√d); with Δ₁ ≤ √d·Δ₂, the theorem's third bound is the last.

    Guarantees:
        1. Every Rényi divergence of order α ≥ 1 between the sums is at most α·ε²/2.

    Args:
        sensitivity: Δ₂, in steps.
        n_values: d.
        n_shares: n, of the shares of noise that are counted on.
        share_variance: σ², in steps², at least 1/4.

    Raises:
        AccountingError: A variance below that of the theorem.
    """
    if not share_variance >= 0.25:
        raise AccountingError(f"shares of {share_variance} steps²; the theorem begins at 0.25")
    tau = closeness(n_shares, share_variance)
    ratio = sensitivity / math.sqrt(n_shares * share_variance)
    return min(math.sqrt(ratio**2 + 2.0 * tau * n_values), ratio + tau * math.sqrt(n_values))


def epsilon_of_concentrated(rho: float, delta: float) -> float:
    """ε at δ of what is ρ-zCDP.

    The least over the orders α of αρ + ln(1 − 1/α) − ln(αδ)/(α − 1); each of them is a bound.

    Args:
        rho: ρ, at least 0; of several releases, their sum.
        delta: δ, above 0 and below 1.
    """
    bounds = _ORDERS * rho + np.log1p(-1.0 / _ORDERS) - np.log(delta * _ORDERS) / (_ORDERS - 1.0)
    return max(0.0, float(bounds.min()))


def spent_by_agent(noise: AgentNoise, *, n_rounds: int, delta: float) -> Spent:
    """ε at δ of an agent that takes part in some rounds.

    Guarantees:
        1. Both are upper bounds for the mechanism as it is run: shares truncated, rounded updates.
        2. ε by the Gaussian mechanism is at most ε by concentrated privacy, but for PLD's error.

    Args:
        noise: Of the federation.
        n_rounds: How many, at least 0.
        delta: See `accounting.spent`.

    Returns:
        `pld` and `rdp` as the module says; infinity where nothing is promised.

    Raises:
        AccountingError: δ or the rounds outside their range; or the one ε contradicts the other.
    """
    cohort = noise.cohort
    gap = _gap(n_rounds, noise.n_values, cohort)
    usable = _usable(delta, gap)
    variance = cohort.n_honest * noise.share_variance - KERNEL_VARIANCE
    event = SampledGaussian(
        noise_multiplier=math.sqrt(variance) / noise.sensitivity,
        sampling_probability=1.0,
        n_steps=n_rounds,
    )
    pld = spent([event], delta=usable).epsilon
    once = concentrated_epsilon(
        sensitivity=noise.sensitivity,
        n_values=noise.n_values,
        n_shares=cohort.n_honest,
        share_variance=noise.share_variance,
    )
    rdp = epsilon_of_concentrated(n_rounds * once**2 / 2.0, usable) if n_rounds else 0.0
    if not pld <= _most_epsilon(n_rounds, noise.n_values, cohort, delta):
        return Spent(pld=math.inf, rdp=math.inf)
    if not pld <= rdp * (1.0 + _PRECISION) + _PRECISION:
        raise AccountingError(
            f"ε is {pld:.6g} by the Gaussian mechanism and {rdp:.6g} by concentrated privacy, "
            "which cannot be less: one of them is wrong; please report these settings as a bug"
        )
    return Spent(pld=pld + gap, rdp=rdp)


def calibrate_noise(
    *,
    epsilon: float,
    delta: float,
    n_rounds: int,
    n_values: int,
    clip_norm: float,
    cohort: Cohort,
    steps_per_clip: int = DEFAULT_STEPS,
    most_noise: float = MOST_NOISE,
) -> AgentNoise:
    """The least noise with which an agent keeps within a budget.

    Guarantees:
        1. `spent_by_agent` says at most `epsilon`, and more with 0.3 % less variance.
        2. Where the noise would drown the updates (see `drowning`), it is refused.

    Args:
        epsilon: Of all rounds together, above 0.
        delta: See `accounting.spent`.
        n_rounds: In which one agent can take part, at least 1.
        n_values: d.
        clip_norm: C.
        cohort: Who is summed.
        steps_per_clip: sC.
        most_noise: What `drowning` may say; infinity to study noise that is good for nothing.

    Raises:
        AccountingError: A budget, a δ or rounds outside their range.
        NoiseError: See `AgentNoise`: with these steps the sum would wrap, or the noise is too fine.
        DrownedError: More noise than `most_noise`.
    """
    square = largest_square(n_values, steps_per_clip)
    gap = _gap(n_rounds, n_values, cohort)
    usable = _usable(delta, gap)
    most = _most_epsilon(max(1, n_rounds), n_values, cohort, delta)
    if epsilon > most:
        raise AccountingError(
            f"a budget of ε = {epsilon} protects nobody, and tails that are never drawn would "
            f"exceed δ = {delta:g}; at most {most:.4g} can be asked for"
        )
    multiplier = calibrate(
        epsilon=epsilon - gap, delta=usable, sampling_probability=1.0, n_steps=n_rounds
    )
    variance = (multiplier**2 * square + KERNEL_VARIANCE) / cohort.n_honest
    noise = AgentNoise(
        n_values=n_values,
        clip_norm=clip_norm,
        steps_per_clip=steps_per_clip,
        share_variance=variance * (1.0 + 1e-12),  # of float64's rounding here, on the safe side
        cohort=cohort,
    )
    found = drowning(noise, n_rounds=n_rounds)
    if found > most_noise:
        n_members, excess = cohort.min_members, found / most_noise
        raise DrownedError(
            f"ε = {epsilon:g} for each agent over {n_rounds} rounds takes so much noise that, over "
            f"{n_values} values and {n_members} agents, it is {found:.3g} times as long as all "
            f"updates together can be; {most_noise:g} is the limit, met by up to about "
            f"{int(n_values / excess**2)} values, or from about {math.ceil(n_members * excess)} "
            "agents in the smallest cohort. Choose a smaller rank, fewer modules or only B to be "
            "sent; more agents; a larger ε; or profile P1 (protects examples) or P3 (against the "
            "public only)"
        )
    return noise


def event_of_example(privacy: AgentPrivacy, masking: CellMasking) -> SampledGaussian:
    """What a round of P2 tells of one example: an upper bound, for the ledger of examples.

    With an example more or less, an agent's update is another one and not zero, so the sum moves
    twice as far as `spent_by_agent` counts.

    Args:
        privacy: The manifest's block.
        masking: The same.

    Raises:
        NoiseError: See `AgentNoise`.
    """
    noise = noise_of(privacy, masking, n_values=_MOST_VALUES)
    variance = noise.cohort.n_honest * noise.share_variance - KERNEL_VARIANCE
    return SampledGaussian(
        noise_multiplier=math.sqrt(variance) / (2.0 * noise.sensitivity),
        sampling_probability=1.0,
        n_steps=1,
    )


def require_kept(
    privacy: PrivacyBlock, masking: MaskingBlock, *, n_values: int, n_rounds: int
) -> None:
    """Refuse a manifest whose noise does not keep the ε that it promises to agents (P2, P3).

    Args:
        privacy: The manifest's block.
        masking: The same.
        n_values: Of the layout.
        n_rounds: Of the federation.

    Raises:
        AccountingError: It spends more than it says.
        NoiseError: See `AgentNoise`.
    """
    noise = agent_noise(privacy, masking, n_values=n_values)
    if isinstance(privacy, AgentPrivacy) and noise is not None:
        if n_values > _MOST_VALUES:
            raise AccountingError(
                f"profile P2 with an update of {n_values} values; at most {_MOST_VALUES} can be"
            )
        found = spent_by_agent(noise, n_rounds=n_rounds, delta=privacy.delta).epsilon
    elif isinstance(privacy, CentralPrivacy):
        event = SampledGaussian(
            noise_multiplier=privacy.noise_multiplier, sampling_probability=1.0, n_steps=n_rounds
        )
        found = spent([event], delta=privacy.delta).epsilon
    else:
        return
    if not found <= privacy.epsilon * (1.0 + _PRECISION):
        raise AccountingError(
            f"profile {privacy.profile} promises ε ≤ {privacy.epsilon:g} over {n_rounds} rounds, "
            f"and its noise keeps {found:.4g}; more noise is needed, or fewer rounds"
        )


def drowning(noise: AgentNoise, *, n_rounds: int) -> float:
    """How long the noise of a run is, relative to the longest possible sum of its rounds' means.

    Noise adds up as √n, updates at most as n: `relative_noise` ÷ √n_rounds, of the smallest cohort.
    At 1, even agents that all want the same, in every round, move the adapter no farther than noise
    does, and noise moves it in every direction at once.

    Args:
        noise: Of the federation.
        n_rounds: At least 1.
    """
    return noise.relative_noise(noise.cohort.min_members) / math.sqrt(n_rounds)


def gap_of_a_value(*, n_shares: int, share_variance: float, kernel_variance: float) -> float:
    """How far one release is from a function of the Gaussian mechanism's, for each value.

    The logarithm of the ratio of any two probabilities, at most.

    Args:
        n_shares: h.
        share_variance: σ².
        kernel_variance: κ², below hσ².
    """
    parts = [kernel_variance, *(share_variance * k / (k + 1.0) for k in range(1, n_shares))]
    return 2.0 * math.fsum(-math.log1p(-_eta(part)) for part in parts)


def _eta(variance: float) -> float:
    """At least 2·Σ exp(−2π²κ²j²) over j ≥ 1, as j² ≥ 3j − 2."""
    first = -2.0 * math.pi**2 * variance
    return 2.0 * math.exp(first) / -math.expm1(3.0 * first)


def _gap(n_rounds: int, n_values: int, cohort: Cohort) -> float:
    """What the gap adds to ε: on either side of it, in every value of every round."""
    once = gap_of_a_value(
        n_shares=cohort.n_honest,
        share_variance=LEAST_SHARE_VARIANCE,  # the largest gap that can be
        kernel_variance=KERNEL_VARIANCE,
    )
    return 2.0 * once * n_values * n_rounds


def _most_epsilon(n_rounds: int, n_values: int, cohort: Cohort, delta: float) -> float:
    """Up to which ε the tails fit their reserve.

    Truncated shares are within η, the sum of what their tails have, of whole ones in total
    variation; that adds (1 + e^ε)·η to δ.
    """
    tails = TAIL * cohort.n_honest * n_values * n_rounds
    return math.log(_RESERVE * delta / tails) - 1e-6 if tails else math.inf


def _usable(delta: float, gap: float) -> float:
    """What is left of δ for the Gaussian mechanism."""
    if not 0.0 < delta < 1.0:
        raise AccountingError(f"δ = {delta} is not above 0 and below 1")
    return delta * (1.0 - _RESERVE) * math.exp(-gap)

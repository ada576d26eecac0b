"""Rules for an open round, where the agents' single factors are visible.

The ideal is ΔW* = Σ p_k s_k B_k A_k. What each rule makes of it:

```
fedit      s·B̄·Ā                      off by exactly the covariance gap; zero if a factor is shared
flora      all factors stacked        exact; rank Σ rank_k
flexlora   truncated SVD              the best adapter of its rank
fedex      mean factors + residual    exact, or the best of the residual's rank
```

FFA-LoRA, RoLoRA, FedSA-LoRA and Fed-SB differ in what is sent, and are then plain means. A 4-bit
base is never quantised anew to take up a residual or a stack: these stay adapters.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from aggregator_server.aggregation.lora_pairs import Cohort, LoraAdapter, Pair
from aggregator_server.aggregation.lora_products import best_rank, covariance, total
from aggregator_server.errors import AggregationError


@dataclass(frozen=True, kw_only=True)
class GapReport:
    """How far averaging factors is from averaging products."""

    gap_norm: float
    """Frobenius norm over all modules of s·B̄·Ā − ΔW*."""
    ideal_norm: float
    """The same of ΔW*."""
    by_module: Mapping[str, float]
    """The gap's norm of each module."""

    @property
    def relative(self) -> float | None:
        """gap_norm / ideal_norm; None where ΔW* is zero and the gap is not."""
        if self.gap_norm == 0.0:
            return 0.0
        return self.gap_norm / self.ideal_norm if self.ideal_norm > 0.0 else None


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """An adapter that is not ΔW* itself."""

    adapter: LoraAdapter
    error_norm: float
    """Frobenius norm over all modules of what is missing from ΔW*."""


@dataclass(frozen=True, kw_only=True)
class WithResidual:
    """Mean factors to train on, and a frozen adapter that makes up for the average."""

    adapter: LoraAdapter
    residual: LoraAdapter
    """Scale 1; added to the base's output beside `adapter`, never merged into a 4-bit base."""
    error_norm: float
    """Frobenius norm over all modules of what the residual's rank left out; 0 when exact."""


def covariance_gap(cohort: Cohort) -> GapReport:
    """What averaging the factors of this round loses.

    Guarantees:
        1. Equals the norm of the dense s·B̄·Ā − ΔW*, though no d_out × d_in product is formed.
        2. Exactly 0 where one factor is shared by all.

    Raises:
        AggregationError: Scales or ranks differ.

    Source: FedEx-LoRA, arXiv 2410.09432, its residual; that it is a covariance follows from
    Σ p_k (B_k − B̄) = 0.
    """
    scale, shares = cohort.common_scale(), cohort.shares
    gaps: dict[str, float] = {}
    ideals: list[float] = []
    for module in cohort.modules:
        gap, ideal = covariance(cohort.pairs(module), shares).norms()
        gaps[module] = scale * gap
        ideals.append(scale * ideal)
    return GapReport(
        gap_norm=float(np.linalg.norm(list(gaps.values()))),
        ideal_norm=float(np.linalg.norm(ideals)),
        by_module=gaps,
    )


def fedit(cohort: Cohort) -> LoraAdapter:
    """Average A and B apart from each other.

    Guarantees:
        1. s·B̄·Ā is ΔW* minus the covariance s·Σ p_k (B_k − B̄)(A_k − Ā); exact where one factor is
           shared by all (FFA-LoRA; each round of RoLoRA).

    Raises:
        AggregationError: Scales or ranks differ.

    Source: FedIT (Zhang et al.), arXiv 2305.05644.
    """
    scale, shares = cohort.common_scale(), cohort.shares
    pairs = {module: covariance(cohort.pairs(module), shares).mean for module in cohort.modules}
    return LoraAdapter(pairs=pairs, scale=scale)


def flora(cohort: Cohort) -> LoraAdapter:
    """Stack the factors of all agents.

    Guarantees:
        1. Equals ΔW*, for any ranks and scales.
        2. The rank is Σ rank_k in each module.

    Returns:
        An adapter of scale 1: p_k s_k are folded into A. The paper merges it into the base each
        round; a 4-bit base takes none, so whoever publishes it cuts its rank or lets it grow.

    Source: FLoRA (Wang et al.), arXiv 2409.05976, whose stacking leaves s_k to the model.
    """
    coefficients = cohort.shares * cohort.scales
    pairs = {module: total(cohort.pairs(module), coefficients) for module in cohort.modules}
    return LoraAdapter(pairs=pairs, scale=1.0)


def flexlora(cohort: Cohort, *, rank: int, scale: float) -> Approximation:
    """The adapter of a given rank that is nearest to the mean product.

    Guarantees:
        1. In each module no adapter of this rank is nearer to ΔW* in the Frobenius norm; exact
           where ΔW* has at most this rank.
        2. `error_norm` is the distance.

    Args:
        cohort: Agents of any ranks and scales.
        rank: Of the new adapter; rows that ΔW* does not fill, for want of rank, are zero in A and
            B, and then learn nothing.
        scale: Of the new adapter.

    Raises:
        AggregationError: A rank below 1, or a scale that is not above 0.

    Source: FlexLoRA (Bai et al.), arXiv 2402.11505, without its dense product.
    """
    stacked = flora(cohort)
    found = {module: best_rank(pair, rank) for module, pair in stacked.pairs.items()}
    adapter = LoraAdapter(pairs={m: best.pair for m, best in found.items()}, scale=1.0)
    return Approximation(
        adapter=rescaled(adapter, scale),
        error_norm=float(np.linalg.norm([best.error_norm for best in found.values()])),
    )


def truncated(adapter: LoraAdapter, *, rank: int, scale: float) -> LoraAdapter:
    """What an agent of a lower rank gets of FlexLoRA's adapter: its first rows.

    Guarantees:
        1. Of an adapter that `flexlora` made, the best one of this rank.

    Raises:
        AggregationError: A rank that is below 1 or above the adapter's, or a scale that is not
            above 0.
    """
    highest = min(pair.rank for pair in adapter.pairs.values())
    if not 1 <= rank <= highest:
        msg = f"cannot cut an adapter of rank {highest} to rank {rank}"
        raise AggregationError(msg)
    pairs = {m: Pair(A=pair.A[:rank], B=pair.B[:, :rank]) for m, pair in adapter.pairs.items()}
    return rescaled(LoraAdapter(pairs=pairs, scale=adapter.scale), scale)


def rescaled(adapter: LoraAdapter, scale: float) -> LoraAdapter:
    """The same product under another scale: B takes up the difference, in float64.

    Raises:
        AggregationError: A scale that is not above 0.
    """
    if not scale > 0.0:
        msg = f"a scale must be above 0, not {scale}"
        raise AggregationError(msg)
    ratio = adapter.scale / scale
    pairs = {
        module: Pair(A=pair.A, B=pair.B.astype(np.float64) * ratio)
        for module, pair in adapter.pairs.items()
    }
    return LoraAdapter(pairs=pairs, scale=scale)


def fedex(
    cohort: Cohort,
    *,
    residual_rank: int | None = None,
    previous: LoraAdapter | None = None,
) -> WithResidual:
    """Average the factors, and keep what this loses as a residual adapter.

    Guarantees:
        1. adapter + residual equals ΔW* plus the previous residual, when `residual_rank` is None.
        2. Otherwise the residual is the best one of its rank, and `error_norm` its distance.
        3. The residual's rank is at most (n − 1)·rank plus the previous one's, at most
           min(d_out, d_in), and the same in all modules.

    Args:
        cohort: Agents that trained from one start, beside the previous residual.
        residual_rank: Most rank to keep; None keeps all.
        previous: The residual that the agents trained beside.

    Raises:
        AggregationError: Scales or ranks differ; a residual rank below 1; a previous residual of
            other modules or shapes.

    Source: FedEx-LoRA (Singhal et al.), arXiv 2410.09432. There the residual is added to
    the base's weights; a 4-bit base would have to be quantised anew, so ours stays an adapter.
    """
    scale, shares = cohort.common_scale(), cohort.shares
    if previous is not None and set(previous.pairs) != set(cohort.modules):
        msg = "the previous residual has other modules than the agents' adapters"
        raise AggregationError(msg)
    means: dict[str, Pair] = {}
    owed: dict[str, Pair] = {}
    bound = 1
    for module in cohort.modules:
        found = covariance(cohort.pairs(module), shares)
        means[module] = found.mean
        parts, coefficients = [found.gap], [scale]
        rank = (len(shares) - 1) * found.mean.rank
        if previous is not None:
            parts.append(previous.pairs[module])
            coefficients.append(previous.scale)
            rank += previous.pairs[module].rank
        owed[module] = total(parts, coefficients)
        bound = max(bound, min(rank, *found.mean.shape))
    rank = bound if residual_rank is None else min(residual_rank, bound)
    best = {module: best_rank(pair, rank) for module, pair in owed.items()}
    error = float(np.linalg.norm([found.error_norm for found in best.values()]))
    return WithResidual(
        adapter=LoraAdapter(pairs=means, scale=scale),
        residual=LoraAdapter(pairs={m: found.pair for m, found in best.items()}, scale=1.0),
        # At the full bound only rounding is left out: the gap has no more rank.
        error_norm=0.0 if rank == bound else error,
    )

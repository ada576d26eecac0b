"""Products B·A that are never multiplied out: sums, norms and best approximations in float64.

A sum of products Σ c_k B_k A_k is itself a product: of the B_k side by side and of the c_k A_k one
below the other. With the QR decompositions B = Q_B R_B and Aᵀ = Q_A R_A it is Q_B (R_B R_Aᵀ) Q_Aᵀ,
so norms and singular values are those of the core R_B R_Aᵀ, whose sides are the ranks added up (or
d_out and d_in where these are less). Memory is that of the stacked factors, time is
O((d_out + d_in)·R²) for the added rank R. Gram matrices would be as fast, but lose half the digits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from aggregator_server.aggregation.lora_pairs import Pair
from aggregator_server.errors import AggregationError

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Covariance:
    """What averaging the factors of a module loses: Σ p_k B_k A_k = B̄·Ā + gap."""

    mean: Pair
    """Ā and B̄, float64."""
    gap: Pair
    """Σ p_k (B_k − B̄)(A_k − Ā), as factors of rank n·r, float64."""

    def norms(self) -> tuple[float, float]:
        """The Frobenius norms of the gap and of the ideal Σ p_k B_k A_k."""
        rank = self.mean.rank
        R_B, R_A = _triangles(total([self.mean, self.gap], [1.0, 1.0]))
        gap = R_B[:, rank:] @ R_A[:, rank:].T
        return float(np.linalg.norm(gap)), float(np.linalg.norm(R_B @ R_A.T))


@dataclass(frozen=True, kw_only=True)
class BestRank:
    """The best approximation of a product by one of a given rank."""

    pair: Pair
    """Rows of A are orthonormal or zero; B holds the singular values, largest first; float64."""
    error_norm: float
    """Frobenius norm of what is missing."""


def total(pairs: Sequence[Pair], coefficients: Sequence[float] | Float64Array) -> Pair:
    """The sum Σ c_k B_k A_k as one product, by stacking; exact.

    Args:
        pairs: n products of one shape; ranks may differ.
        coefficients: c_k, [n]; folded into A.

    Returns:
        Factors of rank Σ rank_k, float64.

    Raises:
        AggregationError: Other shapes than the first's.

    Source: FLoRA, arXiv 2409.05976 (weights on one factor only, else they would be squared).
    """
    if any(pair.shape != pairs[0].shape for pair in pairs):
        msg = f"products of shapes {sorted({pair.shape for pair in pairs})} have no sum"
        raise AggregationError(msg)
    A = [c * pair.A.astype(np.float64) for c, pair in zip(coefficients, pairs, strict=True)]
    B = [pair.B.astype(np.float64) for pair in pairs]
    return Pair(A=np.concatenate(A), B=np.concatenate(B, axis=1))


def covariance(pairs: Sequence[Pair], shares: Float64Array) -> Covariance:
    """The mean factors, and the gap between their product and the mean product.

    Guarantees:
        1. mean.B·mean.A + gap.B·gap.A is Σ p_k B_k A_k.
        2. Where one factor is shared by all, bit for bit, its mean is that factor and the gap is
           exactly zero.

    Args:
        pairs: n ≥ 1 products of one shape and rank.
        shares: p_k, [n], of sum 1.

    Raises:
        AggregationError: Other shapes or ranks than the first's.
    """
    if any((pair.shape, pair.rank) != (pairs[0].shape, pairs[0].rank) for pair in pairs):
        msg = "the mean of factors needs one shape and rank"
        raise AggregationError(msg)
    mean_A, off_A = _centred(np.stack([pair.A for pair in pairs]), shares)
    mean_B, off_B = _centred(np.stack([pair.B for pair in pairs]), shares)
    off = [Pair(A=a, B=b) for a, b in zip(off_A, off_B, strict=True)]
    return Covariance(mean=Pair(A=mean_A, B=mean_B), gap=total(off, shares))


def norm(pair: Pair) -> float:
    """The Frobenius norm of B·A."""
    R_B, R_A = _triangles(pair)
    return float(np.linalg.norm(R_B @ R_A.T))


def best_rank(pair: Pair, rank: int) -> BestRank:
    """The best approximation of B·A by a product of a given rank.

    Guarantees:
        1. No product of this rank is nearer in the Frobenius norm (Eckart–Young).
        2. The first r rows of A and columns of B are the best approximation of rank r, for every r.
        3. B·A of rank at most `rank` comes back exactly, to rounding; rows and columns beyond
           min(pair.rank, d_out, d_in) are zero.

    Args:
        pair: The product, of any rank.
        rank: At least 1.

    Raises:
        AggregationError: A rank below 1.

    Source: FlexLoRA, arXiv 2402.11505 (the SVD of the mean product, with the singular
    values in B). The SVD there is of the dense product; ours of the core, which is the same.
    """
    if rank < 1:
        msg = f"rank must be at least 1, not {rank}"
        raise AggregationError(msg)
    Q_B, R_B = np.linalg.qr(pair.B.astype(np.float64))
    Q_A, R_A = np.linalg.qr(pair.A.T.astype(np.float64))
    U, values, Vt = np.linalg.svd(R_B @ R_A.T, full_matrices=False)
    kept = min(rank, len(values))
    A = np.zeros((rank, pair.shape[1]))
    B = np.zeros((pair.shape[0], rank))
    A[:kept] = Vt[:kept] @ Q_A.T
    B[:, :kept] = Q_B @ (U[:, :kept] * values[:kept])
    return BestRank(pair=Pair(A=A, B=B), error_norm=float(np.linalg.norm(values[kept:])))


def _triangles(pair: Pair) -> tuple[Float64Array, Float64Array]:
    """R_B and R_A, of which the core is R_B R_Aᵀ."""
    # numpy's types know the result of the other modes alone, which is Q too.
    R_B = cast("Float64Array", np.linalg.qr(pair.B.astype(np.float64), mode="r"))
    R_A = cast("Float64Array", np.linalg.qr(pair.A.T.astype(np.float64), mode="r"))
    return R_B, R_A


def _centred(
    stack: NDArray[np.floating], shares: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """The mean over the first axis, and what each is off it."""
    # About the first, so that equal matrices are off by exactly zero.
    first = stack[0].astype(np.float64)
    off_first = stack.astype(np.float64) - first
    drift = np.tensordot(shares, off_first, axes=1)
    return first + drift, off_first - drift

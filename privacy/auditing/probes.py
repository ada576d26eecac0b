"""Probes of one update: which tokens, and which examples, made it. They bound nothing."""

from typing import Final

import numpy as np

from privacy.auditing.numbers import Float64Array, FloatArray, as_vector, check_finite
from privacy.errors import AuditError

_BLOCK_ROWS: Final = 4096  # candidates at a time: a vocabulary in float64 would fill a laptop


def subspace_distance(
    change: FloatArray, candidates: FloatArray, *, rank: int | None = None
) -> Float64Array:
    """How far each candidate input lies outside the row space of a change of A.

    The gradient of A is Σ_t (Bᵀ g_t) x_tᵀ: its rows are mixtures of the layer's inputs x_t. In the
    first layer, of a model whose positions enter later (RoPE), x_t depends on the token alone. So
    a candidate at distance 0 is a token of the text, and one far from 0 is not.

    Guarantees:
        1. If the change is one gradient of at most r distinct, linearly independent inputs, whose
           Bᵀ g_t are independent as well, the inputs have distance 0 up to rounding, and any
           candidate outside their span has more. A generic candidate has about √(1 − rank / d_in).
        2. With more distinct inputs than r the row space is a part of their span, which holds
           none of them in general: no distance is near 0, and a large one clears nobody.
        3. If the row space is all of R^d_in, every distance is 0 and says nothing.

    Sums of gradients keep the property, so plain SGD over several steps, or a sum of agents, has
    the union of all inputs, which soon exceeds r. Adam scales each entry on its own, weight decay
    adds A itself, noise and rounding fill all rows: then distances are blurred, or say nothing. At
    B = 0, where LoRA starts, the gradient of A is 0. A probe that fails is no proof of safety.

    Args:
        change: Gradient or change of A [r, d_in] finite, not all zero.
        candidates: Inputs [n, d_in] finite, for instance embeddings after the layer's norm.
        rank: Directions to keep, the strongest first, in 1..min(r, d_in); None keeps those that
            exceed the rounding of the change's own type. Give it where that was another type once.

    Returns:
        Distances [n] relative to the candidate's length, in [0, 1]; 1 for a candidate of zeros,
        which leaves no trace.

    Raises:
        AuditError: Other shapes or ranges, or values that are not finite.

    Source: Petrov et al., "DAGER: Exact Gradient Inversion for Large Language Models", NeurIPS
    2024, arXiv 2405.15586, the span check of the first layer; we test A, not a full matrix.
    """
    if change.ndim != 2 or candidates.ndim != 2 or change.shape[1] != candidates.shape[1]:
        raise AuditError(
            f"change is {change.shape} and candidates {candidates.shape}; "
            "they must be [r, d_in] and [n, d_in]"
        )
    check_finite("change", change)
    check_finite("candidates", candidates)
    basis = _row_space(change, rank)
    distances = np.ones(len(candidates))
    for start in range(0, len(candidates), _BLOCK_ROWS):
        rows = candidates[start : start + _BLOCK_ROWS].astype(np.float64)
        lengths = np.linalg.norm(rows, axis=1)
        outside = np.linalg.norm(rows - (rows @ basis.T) @ basis, axis=1)
        block = distances[start : start + _BLOCK_ROWS]
        np.divide(outside, lengths, out=block, where=lengths > 0)
    return np.minimum(distances, 1.0)


def _row_space(change: FloatArray, rank: int | None) -> Float64Array:
    """Orthonormal rows [rank, d_in]: the strongest directions of the change's rows."""
    n_directions = min(change.shape)
    if rank is not None and not 1 <= rank <= n_directions:
        raise AuditError(f"rank is {rank}; a change {change.shape} allows 1..{n_directions}")
    if not change.any():
        raise AuditError(f"the change {change.shape} is all zero and has no row space")
    _, strengths, directions = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    if rank is None:
        limit = strengths[0] * max(change.shape) * np.finfo(change.dtype).eps
        rank = max(1, int((strengths > limit).sum()))
    basis: Float64Array = directions[:rank]
    return basis


def cosine_scores(update: FloatArray, gradients: FloatArray) -> Float64Array:
    """The cosine of an update with a step *down* each example's gradient: higher says "in".

    An update is local minus global, so training on an example moves it against the gradient: the
    score is −cos(update, gradient).

    Args:
        update: An update, or a sum of them [d] finite, not all zero.
        gradients: Gradients of the examples' losses [n, d] finite, in the update's order.

    Returns:
        Scores [n] in [−1, 1]; 0 for a gradient of zeros.

    Raises:
        AuditError: Other shapes, or values that are not finite.

    Source: after the cosine attack of "Effective Passive Membership Inference Attacks in Federated
    Learning against Overparameterized Models", 2023; the sign is ours.
    """
    direction = as_vector("update", update)
    if gradients.ndim != 2 or gradients.shape[1] != len(direction):
        raise AuditError(f"gradients are {gradients.shape}; they must be [n, {len(direction)}]")
    check_finite("gradients", gradients)
    length = float(np.linalg.norm(direction))
    if length == 0.0:
        raise AuditError("the update is all zero and has no direction")
    scores = np.zeros(len(gradients))
    # One at a time: an adapter has millions of values, and float64 of all examples would not fit.
    for index, row in enumerate(gradients):
        gradient = row.astype(np.float64)
        norm = float(np.linalg.norm(gradient))
        if norm > 0.0:
            scores[index] = -float(direction @ gradient) / (length * norm)
    return np.clip(scores, -1.0, 1.0)

"""Scores of canaries: how much a training's releases look as if they held each of them.

A higher score says "in". The gradients of a language model's examples have much in common, so the
cosine of an update with an example's gradient mostly tells how common that example is. Here what
examples share is taken out: each is tested against what all the others, and the noise, explain.

Numbers only: gradients in, scores out. What makes a bound of them is `privacy.auditing`.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quant.adapter import Float32Array

Float64Array = NDArray[np.float64]

_CLEARLY_LONGER: Final = 2.0
_ROUNDING: Final = 1e-6
"""Of float32 products, relative."""
_RIDGE: Final = 0.1
"""Of unit gradients, against what no gradient of the start explains."""


def step_log_odds(
    gradients: Float32Array,
    released_sum: Float32Array,
    *,
    prior: Float64Array,
    probability: float,
    noise_std: float,
) -> Float64Array:
    """The log of how much likelier one step's release is if an example was in the training.

    The release is Σ_j b_j g_j + N(0, σ² I), where b_j says whether example j was drawn. For
    example i the sum over all others is taken as normal with the mean and the variance of their
    b_j, which makes a Gaussian test of b_i = 1 against b_i = 0; b_i = 1 has a chance of
    `probability` if the example was in, and none if not.

    All is done by products of gradients: with K = G Gᵀ, V the variances and S = σ² I + Gᵀ V G,
    G S⁻¹ = (σ² I + K V)⁻¹ G, and taking example i out of S is a change of rank one.

    Args:
        gradients: G [n, d], clipped as the step clips them; rows of zeros are allowed.
        released_sum: The release times its divisor [d].
        prior: [n], how likely each b_j is 1 before anything was seen.
        probability: How likely an example that was in was drawn.
        noise_std: σ, absolute, above 0; without noise a small part of a gradient's length. Any
            value makes a valid score, and the true one the best.

    Returns:
        [n].

    Source: the likelihood ratio of a sampled Gaussian mechanism, as in Nasr et al., "Tight
    Auditing of Differentially Private Machine Learning" (arXiv 2302.07956), section 4; the other
    examples as noise, and their removal, are ours.
    """
    products = (gradients @ gradients.T).astype(np.float64)  # K [n, n]
    seen = (gradients @ released_sum).astype(np.float64) - products @ prior
    variance = prior * (1.0 - prior)
    system = noise_std**2 * np.eye(len(products)) + products * variance
    solved = np.linalg.solve(system, np.column_stack([seen, products]))
    strength = np.diagonal(solved[:, 1:])
    # Sherman–Morrison. The floor: 1 − v·h is above 0, but for rounding where σ is tiny.
    without = 1.0 / np.maximum(1.0 - variance * strength, 1e-9)
    evidence = (solved[:, 0] + prior * strength) * without
    log_ratio = evidence - strength * without / 2.0
    never = np.log1p(-probability) if probability < 1.0 else -np.inf
    odds: Float64Array = np.logaddexp(never, np.log(probability) + log_ratio)
    return odds


def noise_std_of(gradients: Float32Array, released_sum: Float32Array) -> float:
    """The noise of a release, measured: what no mixture of the gradients explains.

    An audit that took the claimed noise for granted would overlook noise that is too small.

    Args:
        gradients: [n, d] of every example that may have been drawn, n below d.
        released_sum: [d].

    Returns:
        The standard deviation of a value; near 0 without noise, or with n at least d.
    """
    n_examples, n_values = gradients.shape
    products = (gradients @ gradients.T).astype(np.float64)
    seen = (gradients @ released_sum).astype(np.float64)
    explained = float(seen @ np.linalg.lstsq(products, seen, rcond=_ROUNDING)[0])
    square = float(released_sum.astype(np.float64) @ released_sum.astype(np.float64))
    return math.sqrt(max(0.0, square - explained) / max(1, n_values - n_examples))


def scale_of(gradients: Float32Array, released_sum: Float32Array, *, prior: Float64Array) -> float:
    """How much longer the gradients in a release are than given; 1 unless they clearly are.

    Clipping is not believed either: one that is left out shows here.

    Args:
        gradients: [n, d] as clipped.
        released_sum: [d].
        prior: [n], how likely each was drawn.

    Returns:
        1, or the measured factor where it is above 2.
    """
    expected = prior.astype(np.float32) @ gradients
    square = float(expected @ expected)
    found = float(expected @ released_sum) / square if square > 0.0 else 1.0
    return found if found > _CLEARLY_LONGER else 1.0


def update_coefficients(gradients: Float32Array, update: Float32Array) -> Float64Array:
    """How much of each example's downward step is in an update, by ridge regression.

    Args:
        gradients: [n, d], at the adapter from which the update began; rows of zeros are allowed.
        update: Local minus global [d].

    Returns:
        [n], of gradients of length 1.
    """
    lengths = np.linalg.norm(gradients, axis=1, keepdims=True)
    unit = gradients / np.where(lengths > 0.0, lengths, 1.0)
    products = (unit @ unit.T).astype(np.float64)
    seen = -(unit @ update).astype(np.float64)
    system = products + _RIDGE * np.eye(len(products))
    return np.linalg.solve(system, seen).astype(np.float64)


def clipped(gradients: Float32Array, *, clip_norm: float) -> Float32Array:
    """Gradients [n, d] scaled to a length of at most `clip_norm` each."""
    lengths = np.linalg.norm(gradients, axis=1, keepdims=True)
    scaled: Float32Array = gradients * np.minimum(
        1.0, clip_norm / np.where(lengths > 0.0, lengths, clip_norm)
    ).astype(np.float32)
    return scaled

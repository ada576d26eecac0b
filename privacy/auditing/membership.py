"""Membership inference: which examples a release was trained on, and what that bounds ε by.

Everywhere a higher score says "in". The bound on ε holds if the scores are independent.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

from privacy.auditing.numbers import (
    Float64Array,
    FloatArray,
    as_vector,
    binomial,
    check_levels,
    log_choose_of,
)
from privacy.errors import AuditError

_N_HALVINGS_OF_FRAC: Final = 50  # down to 1e-15 of a fraction


@dataclass(frozen=True, kw_only=True)
class Membership:
    """How well scores tell members from non-members.

    `auc`, `balanced_accuracy` and `tpr` (at a false positive rate of at most `max_fpr`) describe
    all the scores, at the best threshold in hindsight. The bound is of the half that did not
    choose `threshold`, from `tpr_lower_bound` and `fpr_upper_bound` there.
    """

    auc: float
    balanced_accuracy: float
    tpr: float
    max_fpr: float
    epsilon_lower_bound: float
    threshold: float
    tpr_lower_bound: float
    fpr_upper_bound: float
    n_members: int
    n_non_members: int
    delta: float
    confidence: float


def loss_ratio_scores(*, reference_losses: FloatArray, model_losses: FloatArray) -> Float64Array:
    """Reference loss − model loss [n]: the log of how much likelier training made each example.

    The reference takes out that some texts are easy for every model; here it is the base, or the
    release before.

    Raises:
        AuditError: Other shapes, or values that are not finite.
    """
    reference = as_vector("reference_losses", reference_losses)
    model = as_vector("model_losses", model_losses)
    if reference.shape != model.shape:
        raise AuditError(
            f"{len(reference)} reference and {len(model)} model losses; each example needs both"
        )
    return reference - model


def membership_inference(
    members: FloatArray,
    non_members: FloatArray,
    *,
    rng: np.random.Generator,
    delta: float,
    confidence: float = 0.95,
    max_fpr: float = 0.01,
) -> Membership:
    """How well scores tell members from non-members, and the lower bound on ε that follows.

    One half of each group, drawn with `rng`, chooses the threshold; the other half is counted at
    it. With the ends of the two Clopper–Pearson intervals, ε is at least
    log((TPR − δ) / FPR) and at least log((TNR − δ) / FNR).

    Guarantees:
        1. If the mechanism is (ε, δ)-DP for adding or removing one example, the bound exceeds ε
           with probability at most 1 − confidence, if scores are independent draws and a
           non-member differs from a member in nothing but membership.

    The examples of one release break that condition: they trained the same model. The bound is
    then an estimate, as in every attack on one model; `one_run_bound` needs no such condition.
    It is proven if each score comes from a run of its own.

    Args:
        members: Scores [n] finite, at least 2; higher says member.
        non_members: Scores [k] finite, at least 2.
        rng: Draws the halves.
        delta: In [0, 1].
        confidence: In (0, 1).
        max_fpr: In [0, 1]; for `tpr` only.

    Raises:
        AuditError: Other shapes or ranges.

    Source: Jagielski, Ullman, Oprea, "Auditing Differentially Private Machine Learning", NeurIPS
    2020; Nasr et al., "Adversary Instantiation", S&P 2021; the rates at a low FPR: Carlini et al.,
    "Membership Inference Attacks From First Principles", S&P 2022.
    """
    inside, outside = as_vector("members", members), as_vector("non_members", non_members)
    check_levels(delta=delta, confidence=confidence)
    if min(len(inside), len(outside)) < 2:
        raise AuditError(
            f"{len(inside)} members and {len(outside)} non-members; halves need 2 of each"
        )
    chosen_in, counted_in = _halves(inside, rng)
    chosen_out, counted_out = _halves(outside, rng)
    threshold = _promising_threshold(chosen_in, chosen_out, delta=delta, confidence=confidence)
    n_true, n_false = int((counted_in >= threshold).sum()), int((counted_out >= threshold).sum())
    # Each end fails with probability (1 − confidence) / 2, so both hold with `confidence`.
    tpr_low = clopper_pearson(n_true, len(counted_in), confidence=confidence)[0]
    fpr_high = clopper_pearson(n_false, len(counted_out), confidence=confidence)[1]
    epsilon = _epsilon_of_rates(np.array([tpr_low]), np.array([fpr_high]), delta)
    return Membership(
        auc=auc(inside, outside),
        balanced_accuracy=balanced_accuracy(inside, outside),
        tpr=tpr_at_fpr(inside, outside, max_fpr=max_fpr),
        max_fpr=max_fpr,
        epsilon_lower_bound=float(epsilon[0]),
        threshold=threshold,
        tpr_lower_bound=tpr_low,
        fpr_upper_bound=fpr_high,
        n_members=len(inside),
        n_non_members=len(outside),
        delta=delta,
        confidence=confidence,
    )


def auc(members: FloatArray, non_members: FloatArray) -> float:
    """The fraction of pairs in which the member scores higher; equal scores count half.

    Raises:
        AuditError: Other shapes, or values that are not finite.
    """
    inside, outside = as_vector("members", members), np.sort(as_vector("non_members", non_members))
    # Below plus not above is twice a win plus an equal one: whole numbers, so no rounding.
    twice = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
    return int(twice.sum()) / (2 * len(inside) * len(outside))


def tpr_at_fpr(members: FloatArray, non_members: FloatArray, *, max_fpr: float) -> float:
    """The largest true positive rate of a threshold whose false positive rate is at most `max_fpr`.

    Raises:
        AuditError: Other shapes or ranges.
    """
    if not 0.0 <= max_fpr <= 1.0:
        raise AuditError(f"max_fpr is {max_fpr}; a rate lies in [0, 1]")
    inside, outside = as_vector("members", members), as_vector("non_members", non_members)
    _, n_true, n_false = _counts_at_thresholds(inside, outside)
    # Divided first: 0.29 × 100 is 28.999… and would refuse 29 of 100.
    allowed = n_false / len(outside) <= max_fpr
    return int(n_true[allowed].max(initial=0)) / len(inside)


def balanced_accuracy(members: FloatArray, non_members: FloatArray) -> float:
    """(TPR + TNR) / 2 at the best threshold, in [0.5, 1].

    Raises:
        AuditError: Other shapes, or values that are not finite.
    """
    inside, outside = as_vector("members", members), as_vector("non_members", non_members)
    _, n_true, n_false = _counts_at_thresholds(inside, outside)
    advantage = n_true / len(inside) - n_false / len(outside)
    return float(0.5 + 0.5 * advantage.max(initial=0.0))


def clopper_pearson(n_hits: int, n_trials: int, *, confidence: float) -> tuple[float, float]:
    """The exact interval of a probability that made `n_hits` of `n_trials`.

    Guarantees:
        1. Whatever the probability is, each end lies on its wrong side with a chance of at most
           (1 − confidence) / 2.

    Returns:
        The lower and the upper end, in [0, 1].

    Raises:
        AuditError: Values out of range.

    Source: Clopper and Pearson, Biometrika 26 (1934).
    """
    if not 0 <= n_hits <= n_trials or n_trials < 1:
        raise AuditError(f"{n_hits} hits of {n_trials} trials; hits lie in 0..trials, from 1 trial")
    check_levels(confidence=confidence)
    log_choose, level = log_choose_of(n_trials), (1.0 - confidence) / 2
    upper = 1.0 - _lower_end(log_choose, n_trials - n_hits, level)
    return _lower_end(log_choose, n_hits, level), upper


def _lower_end(log_choose: Float64Array, n_hits: int, level: float) -> float:
    """The probability at which `n_hits` or more are as likely as `level`, rounded down."""
    if n_hits == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(_N_HALVINGS_OF_FRAC):
        middle = (low + high) / 2
        log_odds = math.log(middle) - math.log1p(-middle)
        if binomial(log_choose, log_odds)[n_hits:].sum() < level:
            low = middle
        else:
            high = middle
    return low


def _halves(scores: Float64Array, rng: np.random.Generator) -> tuple[Float64Array, Float64Array]:
    shuffled = rng.permutation(scores)
    return shuffled[: len(scores) // 2], shuffled[len(scores) // 2 :]


def _promising_threshold(
    inside: Float64Array, outside: Float64Array, *, delta: float, confidence: float
) -> float:
    """The threshold whose bound would be largest; any choice is valid, this one is quick.

    Wilson's interval has a closed form, so that thousands of thresholds cost nothing.
    """
    z = NormalDist().inv_cdf((1.0 + confidence) / 2)
    thresholds, n_true, n_false = _counts_at_thresholds(inside, outside)
    tpr_low = _wilson_lower_end(n_true, len(inside), z)
    fpr_high = 1.0 - _wilson_lower_end(len(outside) - n_false, len(outside), z)
    best = int(np.argmax(_epsilon_of_rates(tpr_low, fpr_high, delta)))
    # Midway down to the next score: at the score itself the other half's lowest member would miss.
    return float(thresholds[best] / 2 + thresholds[max(best - 1, 0)] / 2)


def _wilson_lower_end(n_hits: NDArray[np.int64], n_trials: int, z: float) -> Float64Array:
    frac, square = n_hits / n_trials, z * z / n_trials
    spread = np.sqrt(square * (frac * (1.0 - frac) + square / 4))
    lower: Float64Array = (frac + square / 2 - spread) / (1.0 + square)
    return lower


def _epsilon_of_rates(tpr_low: Float64Array, fpr_high: Float64Array, delta: float) -> Float64Array:
    """What both directions of the definition say; 0 where they say nothing.

    No denominator is 0: an interval of a probability never ends at 1 from below, nor at 0.
    """
    positive = (tpr_low - delta) / fpr_high
    negative = (1.0 - fpr_high - delta) / (1.0 - tpr_low)
    epsilon: Float64Array = np.log(np.maximum(np.maximum(positive, negative), 1.0))
    return epsilon


def _counts_at_thresholds(
    inside: Float64Array, outside: Float64Array
) -> tuple[Float64Array, NDArray[np.int64], NDArray[np.int64]]:
    """All thresholds that differ, with how many of each group are at or above them."""
    thresholds = np.unique(np.concatenate([inside, outside]))
    n_true = len(inside) - np.searchsorted(np.sort(inside), thresholds)
    n_false = len(outside) - np.searchsorted(np.sort(outside), thresholds)
    return thresholds, n_true, n_false

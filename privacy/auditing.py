"""Audits: lower bounds on ε, and attacks that find what trained an update, from arrays of numbers.

| function | asks | its bound on ε |
| --- | --- | --- |
| `one_run_bound` | which canaries did a run have? | holds if fair coins chose them |
| `membership_inference` | which examples did a release have? | holds if scores are independent |
| `subspace_distance` | which tokens did an update have? | none: it names the tokens |
| `cosine_scores` | which examples did an update have? | none: scores for the first two |

Everywhere a higher score says "in". A bound is what an attack found, never what a better one could
find: a bound of 0 proves no privacy.

Here are numbers only, neither models nor torch. Nor SciPy, which the server's installation lacks:
the one special function is the binomial distribution, and a table of `math.lgamma` gives it.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from privacy.errors import AuditError

FloatArray: TypeAlias = NDArray[np.floating[Any]]
_Float64: TypeAlias = NDArray[np.float64]

_N_HALVINGS: Final = 30  # of the one-run audit, as in the paper's code
_N_HALVINGS_OF_FRAC: Final = 50  # down to 1e-15 of a fraction
_BLOCK_ROWS: Final = 4096  # candidates at a time: a vocabulary in float64 would fill a laptop


# The one-run audit


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What one run betrayed of its canaries.

    `epsilon_lower_bound` is at the unit of a canary (an example, or an agent), for adding or
    removing one; `largest_bound` is what it would be had every guess been right.
    """

    epsilon_lower_bound: float
    largest_bound: float
    n_canaries: int
    n_guesses: int
    n_right: int
    delta: float
    confidence: float


def one_run_bound(
    included: NDArray[np.bool_],
    scores: FloatArray,
    *,
    n_guesses: int,
    delta: float,
    confidence: float = 0.999,
) -> Audit:
    """A lower bound on ε from one run, some of whose canaries were left out.

    The higher half of the guesses says "in" of the highest scores, the lower half "out" of the
    lowest; an odd one says "in". Of the canaries between, nothing is guessed.

    Guarantees:
        1. For a run that is (ε, δ)-DP the bound exceeds ε with probability at most 1 − confidence,
           whatever the scores are, if each canary was in by a fair coin of its own and `n_guesses`
           was fixed before anyone looked at the scores. Both are for the caller to see to: trying
           several `n_guesses` and keeping the best is no audit.
        2. The order of the canaries does not matter: of equal scores at the edge of a group the
           wrong ones count first.

    Args:
        included: The coins [m] bool, True where the canary was in the run.
        scores: Scores [m] finite; higher where the run seems to have had the canary.
        n_guesses: r, in 1..m.
        delta: δ of the claim that is audited, in [0, 1].
        confidence: In (0, 1).

    Returns:
        The bound, and what it was made from.

    Raises:
        AuditError: Other shapes, types or ranges.

    Source: Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023,
    arXiv 2305.08846, Algorithm 1 and Appendix D. Ours are the equal scores and the odd guess.
    """
    values = _vector("scores", scores)
    coins = np.asarray(included)
    if coins.dtype != np.bool_ or coins.shape != values.shape:
        raise AuditError(
            f"included must be bool {values.shape} like the scores, not {coins.dtype} {coins.shape}"
        )
    n_canaries = len(values)
    if not 1 <= n_guesses <= n_canaries:
        raise AuditError(f"n_guesses is {n_guesses}; {n_canaries} canaries allow 1..{n_canaries}")
    n_out = n_guesses // 2
    n_right = _sure_hits(values, coins, n_guesses - n_out) + _sure_hits(-values, ~coins, n_out)
    bounds = [
        one_run_epsilon(
            n_canaries=n_canaries,
            n_guesses=n_guesses,
            n_right=right,
            delta=delta,
            confidence=confidence,
        )
        for right in (n_right, n_guesses)
    ]
    return Audit(
        epsilon_lower_bound=bounds[0],
        largest_bound=bounds[1],
        n_canaries=n_canaries,
        n_guesses=n_guesses,
        n_right=n_right,
        delta=delta,
        confidence=confidence,
    )


def largest_one_run_bound(n_canaries: int, *, delta: float, confidence: float = 0.999) -> float:
    """The bound if all of `n_canaries` are guessed, and rightly: an audit of them finds no more.

    At δ = 0 it is log(q / (1 − q)) with q = (1 − confidence)^(1/m).

    Raises:
        AuditError: Values out of range.
    """
    return one_run_epsilon(
        n_canaries=n_canaries,
        n_guesses=n_canaries,
        n_right=n_canaries,
        delta=delta,
        confidence=confidence,
    )


def one_run_epsilon(
    *, n_canaries: int, n_guesses: int, n_right: int, delta: float, confidence: float
) -> float:
    """The largest ε that so many right guesses refute at this confidence; 0.0 if they refute none.

    The algorithm of the paper's `get_eps_audit` step by step, so that equal inputs give its value:
    a bracket that grows by 1, then 30 halvings, then the lower end.

    Raises:
        AuditError: Values out of range.

    Source: arXiv 2305.08846, Appendix D. We take the confidence, 1 minus the paper's p.
    """
    _check_counts(n_canaries, n_guesses, n_right)
    _check_levels(delta=delta, confidence=confidence)
    level = 1.0 - confidence
    log_choose = _log_choose(n_guesses)
    low, high = 0.0, 1.0
    # Ends: at a large ε every guess of randomized response is right, and the p-value is 1.
    while _p_value(log_choose, high, n_canaries, n_right, delta) < level:
        high += 1.0
    for _ in range(_N_HALVINGS):
        middle = (low + high) / 2
        if _p_value(log_choose, middle, n_canaries, n_right, delta) < level:
            low = middle
        else:
            high = middle
    return low


def one_run_p_value(
    *, n_canaries: int, n_guesses: int, n_right: int, epsilon: float, delta: float
) -> float:
    """How likely an (ε, δ)-DP run lets an auditor make at least so many right guesses, at most.

    P[V ≥ v] ≤ f(v) + 2 m δ max_i (f(v − i) − f(v)) / i over i = 1..v, where f is the tail of
    Binomial(r, e^ε / (1 + e^ε)): the paper's `p_value_DP_audit`, with its values.

    Args:
        n_canaries: m.
        n_guesses: r, in 1..m.
        n_right: v, in 0..r.
        epsilon: Finite, at least 0.
        delta: In [0, 1].

    Returns:
        A probability.

    Raises:
        AuditError: Values out of range.

    Source: arXiv 2305.08846, Theorem 5.2 and Appendix D.
    """
    _check_counts(n_canaries, n_guesses, n_right)
    _check_levels(delta=delta)
    if not 0.0 <= epsilon < math.inf:
        raise AuditError(f"epsilon is {epsilon}; it must be finite and at least 0")
    return _p_value(_log_choose(n_guesses), epsilon, n_canaries, n_right, delta)


def _p_value(
    log_choose: _Float64, epsilon: float, n_canaries: int, n_right: int, delta: float
) -> float:
    # The log of the odds q / (1 − q) of a right guess is ε itself.
    mass = _binomial(log_choose, epsilon)
    tail = float(mass[n_right:].sum())
    slope = 0.0
    if n_right > 0:
        below = np.cumsum(mass[:n_right][::-1])  # f(v − i) − f(v) for i = 1..v
        slope = float((below / np.arange(1, n_right + 1)).max())
    return min(tail + 2 * n_canaries * delta * slope, 1.0)


def _sure_hits(scores: _Float64, is_hit: NDArray[np.bool_], n_picked: int) -> int:
    """Hits among the highest scores, however those that are equal at the edge are ordered."""
    if n_picked == 0:
        return 0
    edge = np.partition(scores, -n_picked)[-n_picked]
    above, at_edge = scores > edge, scores == edge
    n_left = n_picked - int(above.sum())
    n_misses_at_edge = int((~is_hit[at_edge]).sum())
    return int(is_hit[above].sum()) + max(0, n_left - n_misses_at_edge)


# Membership inference


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


def loss_ratio_scores(*, reference_losses: FloatArray, model_losses: FloatArray) -> _Float64:
    """Reference loss − model loss [n]: the log of how much likelier training made each example.

    The reference takes out that some texts are easy for every model; here it is the base, or the
    release before.

    Raises:
        AuditError: Other shapes, or values that are not finite.
    """
    reference = _vector("reference_losses", reference_losses)
    model = _vector("model_losses", model_losses)
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
    inside, outside = _vector("members", members), _vector("non_members", non_members)
    _check_levels(delta=delta, confidence=confidence)
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
    inside, outside = _vector("members", members), np.sort(_vector("non_members", non_members))
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
    inside, outside = _vector("members", members), _vector("non_members", non_members)
    _, n_true, n_false = _counts_at_thresholds(inside, outside)
    # Divided first: 0.29 × 100 is 28.999… and would refuse 29 of 100.
    allowed = n_false / len(outside) <= max_fpr
    return int(n_true[allowed].max(initial=0)) / len(inside)


def balanced_accuracy(members: FloatArray, non_members: FloatArray) -> float:
    """(TPR + TNR) / 2 at the best threshold, in [0.5, 1].

    Raises:
        AuditError: Other shapes, or values that are not finite.
    """
    inside, outside = _vector("members", members), _vector("non_members", non_members)
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
    _check_levels(confidence=confidence)
    log_choose, level = _log_choose(n_trials), (1.0 - confidence) / 2
    upper = 1.0 - _lower_end(log_choose, n_trials - n_hits, level)
    return _lower_end(log_choose, n_hits, level), upper


def _lower_end(log_choose: _Float64, n_hits: int, level: float) -> float:
    """The probability at which `n_hits` or more are as likely as `level`, rounded down."""
    if n_hits == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(_N_HALVINGS_OF_FRAC):
        middle = (low + high) / 2
        log_odds = math.log(middle) - math.log1p(-middle)
        if _binomial(log_choose, log_odds)[n_hits:].sum() < level:
            low = middle
        else:
            high = middle
    return low


def _halves(scores: _Float64, rng: np.random.Generator) -> tuple[_Float64, _Float64]:
    shuffled = rng.permutation(scores)
    return shuffled[: len(scores) // 2], shuffled[len(scores) // 2 :]


def _promising_threshold(
    inside: _Float64, outside: _Float64, *, delta: float, confidence: float
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


def _wilson_lower_end(n_hits: NDArray[np.int64], n_trials: int, z: float) -> _Float64:
    frac, square = n_hits / n_trials, z * z / n_trials
    spread = np.sqrt(square * (frac * (1.0 - frac) + square / 4))
    lower: _Float64 = (frac + square / 2 - spread) / (1.0 + square)
    return lower


def _epsilon_of_rates(tpr_low: _Float64, fpr_high: _Float64, delta: float) -> _Float64:
    """What both directions of the definition say; 0 where they say nothing.

    No denominator is 0: an interval of a probability never ends at 1 from below, nor at 0.
    """
    positive = (tpr_low - delta) / fpr_high
    negative = (1.0 - fpr_high - delta) / (1.0 - tpr_low)
    epsilon: _Float64 = np.log(np.maximum(np.maximum(positive, negative), 1.0))
    return epsilon


def _counts_at_thresholds(
    inside: _Float64, outside: _Float64
) -> tuple[_Float64, NDArray[np.int64], NDArray[np.int64]]:
    """All thresholds that differ, with how many of each group are at or above them."""
    thresholds = np.unique(np.concatenate([inside, outside]))
    n_true = len(inside) - np.searchsorted(np.sort(inside), thresholds)
    n_false = len(outside) - np.searchsorted(np.sort(outside), thresholds)
    return thresholds, n_true, n_false


# What an update betrays


def subspace_distance(
    change: FloatArray, candidates: FloatArray, *, rank: int | None = None
) -> _Float64:
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
    _check_finite("change", change)
    _check_finite("candidates", candidates)
    basis = _row_space(change, rank)
    distances = np.ones(len(candidates))
    for start in range(0, len(candidates), _BLOCK_ROWS):
        rows = candidates[start : start + _BLOCK_ROWS].astype(np.float64)
        lengths = np.linalg.norm(rows, axis=1)
        outside = np.linalg.norm(rows - (rows @ basis.T) @ basis, axis=1)
        block = distances[start : start + _BLOCK_ROWS]
        np.divide(outside, lengths, out=block, where=lengths > 0)
    return np.minimum(distances, 1.0)


def _row_space(change: FloatArray, rank: int | None) -> _Float64:
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
    basis: _Float64 = directions[:rank]
    return basis


def cosine_scores(update: FloatArray, gradients: FloatArray) -> _Float64:
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
    direction = _vector("update", update)
    if gradients.ndim != 2 or gradients.shape[1] != len(direction):
        raise AuditError(f"gradients are {gradients.shape}; they must be [n, {len(direction)}]")
    _check_finite("gradients", gradients)
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


# The binomial distribution, and checks


def _log_choose(n: int) -> _Float64:
    """The logs of C(n, k) for k = 0..n."""
    log_factorials: _Float64 = np.array([math.lgamma(k + 1.0) for k in range(n + 1)])
    of_n = math.lgamma(n + 1.0)
    return of_n - log_factorials - log_factorials[::-1]


def _binomial(log_choose: _Float64, log_odds: float) -> _Float64:
    """P[Binomial(n, q) = k] for k = 0..n, by the log of the odds q / (1 − q).

    The odds keep a q near 0 and near 1 alike, where q or 1 − q itself would round away.
    """
    n = len(log_choose) - 1
    log_miss = -float(np.logaddexp(0.0, log_odds))  # log(1 − q)
    return np.exp(log_choose + np.arange(n + 1) * log_odds + n * log_miss)


def _vector(name: str, values: FloatArray) -> _Float64:
    array = np.asarray(values)
    if array.ndim != 1 or len(array) == 0:
        raise AuditError(f"{name} is {array.shape}; it must be a vector of at least one value")
    _check_finite(name, array)
    return array.astype(np.float64)


def _check_finite(name: str, array: FloatArray) -> None:
    if not np.issubdtype(array.dtype, np.floating):
        raise AuditError(f"{name} is of {array.dtype}; convert it to floating point")
    if not np.isfinite(array).all():
        n_bad = int((~np.isfinite(array)).sum())
        raise AuditError(f"{n_bad} of {array.size} values of {name} are not finite; leave them out")


def _check_counts(n_canaries: int, n_guesses: int, n_right: int) -> None:
    if not 0 <= n_right <= n_guesses <= n_canaries or n_guesses < 1:
        raise AuditError(
            f"{n_right} right of {n_guesses} guesses of {n_canaries} canaries; "
            "need 0 ≤ right ≤ guesses ≤ canaries, and a guess"
        )


def _check_levels(*, delta: float = 0.0, confidence: float = 0.5) -> None:
    if not 0.0 <= delta <= 1.0:
        raise AuditError(f"delta is {delta}; it lies in [0, 1]")
    if not 0.0 < confidence < 1.0:
        raise AuditError(f"confidence is {confidence}; it lies between 0 and 1, for instance 0.95")

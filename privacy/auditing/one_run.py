"""The one-run audit: a lower bound on ε from one training with canaries.

It holds if fair coins chose which canaries the run had. A bound is what an attack found, never what
a better one could find: a bound of 0 proves no privacy.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from privacy.auditing.numbers import (
    Float64Array,
    FloatArray,
    as_vector,
    binomial,
    check_counts,
    check_levels,
    log_choose_of,
)
from privacy.errors import AuditError

_N_HALVINGS: Final = 30  # of the one-run audit, as in the paper's code


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
    values = as_vector("scores", scores)
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
    return audit_of_counts(
        n_canaries=n_canaries,
        n_guesses=n_guesses,
        n_right=n_right,
        delta=delta,
        confidence=confidence,
    )


def audit_of_counts(
    *, n_canaries: int, n_guesses: int, n_right: int, delta: float, confidence: float
) -> Audit:
    """The audit that counts of guesses come to: of one run, or of several that share no record.

    Args:
        n_canaries: All whose coins were tossed.
        n_guesses: Of them, guessed.
        n_right: Of those, right.
        delta: δ of the claim.
        confidence: Of the bound, such as 0.999.

    Raises:
        AuditError: Counts that contradict each other, or a level outside its range.
    """
    bound, largest = (
        one_run_epsilon(
            n_canaries=n_canaries,
            n_guesses=n_guesses,
            n_right=right,
            delta=delta,
            confidence=confidence,
        )
        for right in (n_right, n_guesses)
    )
    return Audit(
        epsilon_lower_bound=bound,
        largest_bound=largest,
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
    check_counts(n_canaries, n_guesses, n_right)
    check_levels(delta=delta, confidence=confidence)
    level = 1.0 - confidence
    log_choose = log_choose_of(n_guesses)
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
    check_counts(n_canaries, n_guesses, n_right)
    check_levels(delta=delta)
    if not 0.0 <= epsilon < math.inf:
        raise AuditError(f"epsilon is {epsilon}; it must be finite and at least 0")
    return _p_value(log_choose_of(n_guesses), epsilon, n_canaries, n_right, delta)


def _p_value(
    log_choose: Float64Array, epsilon: float, n_canaries: int, n_right: int, delta: float
) -> float:
    # The log of the odds q / (1 − q) of a right guess is ε itself.
    mass = binomial(log_choose, epsilon)
    tail = float(mass[n_right:].sum())
    slope = 0.0
    if n_right > 0:
        below = np.cumsum(mass[:n_right][::-1])  # f(v − i) − f(v) for i = 1..v
        slope = float((below / np.arange(1, n_right + 1)).max())
    return min(tail + 2 * n_canaries * delta * slope, 1.0)


def _sure_hits(scores: Float64Array, is_hit: NDArray[np.bool_], n_picked: int) -> int:
    """Hits among the highest scores, however those that are equal at the edge are ordered."""
    if n_picked == 0:
        return 0
    edge = np.partition(scores, -n_picked)[-n_picked]
    above, at_edge = scores > edge, scores == edge
    n_left = n_picked - int(above.sum())
    n_misses_at_edge = int((~is_hit[at_edge]).sum())
    return int(is_hit[above].sum()) + max(0, n_left - n_misses_at_edge)

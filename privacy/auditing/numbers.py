"""What the audits share: the binomial distribution, and the checks of what they are given.

No SciPy: a table of `math.lgamma` gives the one special function that is needed.
"""

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from privacy.errors import AuditError

FloatArray: TypeAlias = NDArray[np.floating[Any]]
Float64Array: TypeAlias = NDArray[np.float64]


def log_choose_of(n: int) -> Float64Array:
    """The logs of C(n, k) for k = 0..n."""
    log_factorials: Float64Array = np.array([math.lgamma(k + 1.0) for k in range(n + 1)])
    of_n = math.lgamma(n + 1.0)
    return of_n - log_factorials - log_factorials[::-1]


def binomial(log_choose: Float64Array, log_odds: float) -> Float64Array:
    """P[Binomial(n, q) = k] for k = 0..n, by the log of the odds q / (1 − q).

    The odds keep a q near 0 and near 1 alike, where q or 1 − q itself would round away.
    """
    n = len(log_choose) - 1
    log_miss = -float(np.logaddexp(0.0, log_odds))  # log(1 − q)
    return np.exp(log_choose + np.arange(n + 1) * log_odds + n * log_miss)


def as_vector(name: str, values: FloatArray) -> Float64Array:
    """Finite numbers in a row, as float64.

    Args:
        name: What they are called where they are refused.
        values: [n] of any floating type, n at least 1.

    Raises:
        AuditError: They are not.
    """
    array = np.asarray(values)
    if array.ndim != 1 or len(array) == 0:
        raise AuditError(f"{name} is {array.shape}; it must be a vector of at least one value")
    check_finite(name, array)
    return array.astype(np.float64)


def check_finite(name: str, array: FloatArray) -> None:
    """Refuse what is no array of finite floating-point numbers.

    Args:
        name: What it is called where it is refused.
        array: Of any shape.

    Raises:
        AuditError: It is not.
    """
    if not np.issubdtype(array.dtype, np.floating):
        raise AuditError(f"{name} is of {array.dtype}; convert it to floating point")
    if not np.isfinite(array).all():
        n_bad = int((~np.isfinite(array)).sum())
        raise AuditError(f"{n_bad} of {array.size} values of {name} are not finite; leave them out")


def check_counts(n_canaries: int, n_guesses: int, n_right: int) -> None:
    """Refuse counts that no one-run audit has.

    Args:
        n_canaries: All.
        n_guesses: Of them, guessed.
        n_right: Of those, right.

    Raises:
        AuditError: They contradict each other.
    """
    if not 0 <= n_right <= n_guesses <= n_canaries or n_guesses < 1:
        raise AuditError(
            f"{n_right} right of {n_guesses} guesses of {n_canaries} canaries; "
            "need 0 ≤ right ≤ guesses ≤ canaries, and a guess"
        )


def check_levels(*, delta: float = 0.0, confidence: float = 0.5) -> None:
    """Refuse a δ or a confidence outside its range.

    Args:
        delta: From 0 to 1.
        confidence: Between 0 and 1.

    Raises:
        AuditError: One is.
    """
    if not 0.0 <= delta <= 1.0:
        raise AuditError(f"delta is {delta}; it lies in [0, 1]")
    if not 0.0 < confidence < 1.0:
        raise AuditError(f"confidence is {confidence}; it lies between 0 and 1, for instance 0.95")

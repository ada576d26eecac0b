"""Shamir's secret sharing of 256-bit secrets over the prime p = 2^256 + 297.

Any `threshold` shares give the secret back; fewer say nothing about it. Shares stand at x = 1, 2, …
and have 33 bytes, big-endian, below p. With more shares than the threshold, wrong ones are found
and corrected (Reed–Solomon decoding by Gao's algorithm).

Source: Shamir, CACM 22(11), 1979; Gao, "A new algorithm for decoding Reed-Solomon codes", 2002.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from privacy.errors import ShareError

PRIME: Final = 2**256 + 297
"""The smallest prime above 2^256, so that every 32-byte secret is an element."""
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33

Entropy: TypeAlias = Callable[[int], bytes]
"""Draws so many unpredictable bytes, as `os.urandom` does."""
_COEFFICIENT_BYTES: Final = 48
"""Reduced modulo p: what is left of a bias is below 2^-127."""


def split(secret: bytes, *, n_shares: int, threshold: int, entropy: Entropy) -> tuple[bytes, ...]:
    """Share a secret.

    Guarantees:
        1. Any `threshold` of the shares give the secret; `threshold` − 1 of them are uniform and
           independent of it.

    Args:
        secret: 32 bytes.
        n_shares: How many; share i stands at x = i + 1.
        threshold: 1 to `n_shares`.
        entropy: The operating system's generator, or a fixed one in tests.

    Returns:
        `n_shares` shares of 33 bytes.

    Raises:
        ShareError: A secret of another length, a threshold outside its range, or a generator that
            gives too little.
    """
    if len(secret) != SECRET_BYTES:
        msg = f"a secret has {SECRET_BYTES} bytes, not {len(secret)}"
        raise ShareError(msg)
    if not 1 <= threshold <= n_shares:
        msg = f"threshold {threshold} of {n_shares} shares"
        raise ShareError(msg)
    n_bytes = _COEFFICIENT_BYTES * (threshold - 1)
    raw = entropy(n_bytes)
    if len(raw) != n_bytes:
        msg = f"the generator gave {len(raw)} bytes of {n_bytes}"
        raise ShareError(msg)
    polynomial = [int.from_bytes(secret, "big")]
    polynomial += [
        int.from_bytes(raw[start : start + _COEFFICIENT_BYTES], "big") % PRIME
        for start in range(0, len(raw), _COEFFICIENT_BYTES)
    ]
    return tuple(
        _evaluate(polynomial, x).to_bytes(SHARE_BYTES, "big") for x in range(1, n_shares + 1)
    )


class Rebuilder:
    """Rebuilds secrets whose shares stand at the same places; its coefficients are made once.

    Args:
        places: The x of each share, distinct and above 0; as many as the threshold.

    Raises:
        ShareError: A place is repeated or below 1, or there is none.
    """

    def __init__(self, places: Sequence[int]) -> None:
        """Compute the Lagrange coefficients at 0."""
        if not places or len(set(places)) != len(places) or min(places) < 1:
            msg = f"shares stand at distinct places from 1 on, not at {list(places)}"
            raise ShareError(msg)
        self._coefficients = []
        for x in places:
            numerator = denominator = 1
            for other in places:
                if other != x:
                    numerator = numerator * other % PRIME
                    denominator = denominator * (other - x) % PRIME
            self._coefficients.append(numerator * pow(denominator, -1, PRIME) % PRIME)

    def secret(self, shares: Sequence[bytes]) -> bytes:
        """The secret.

        Args:
            shares: One for each place, in the same order.

        Returns:
            32 bytes.

        Raises:
            ShareError: A share is not one, another number of shares, or they do not belong to one
                secret (the result is 2^256 or more).
        """
        if len(shares) != len(self._coefficients):
            msg = f"{len(shares)} shares for {len(self._coefficients)} places"
            raise ShareError(msg)
        total = sum(
            coefficient * parse_share(share)
            for coefficient, share in zip(self._coefficients, shares, strict=True)
        )
        return _secret_bytes(total % PRIME)


def correct(shares: Mapping[int, bytes], *, threshold: int) -> tuple[bytes, frozenset[int]]:
    """Rebuild a secret although some shares are wrong.

    Up to ⌊(n − threshold) / 2⌋ of n shares may be wrong.

    Args:
        shares: By place.
        threshold: With which the secret was shared.

    Returns:
        The secret, and the places of the wrong shares.

    Raises:
        ShareError: Too few shares, one that is none, or more are wrong than can be told apart.
    """
    if len(shares) < threshold:
        msg = f"{len(shares)} shares; the threshold is {threshold}"
        raise ShareError(msg)
    places = sorted(shares)
    values = [parse_share(shares[x]) for x in places]
    polynomial = _gao(places, values, threshold)
    wrong = frozenset(
        x for x, value in zip(places, values, strict=True) if _evaluate(polynomial, x) != value
    )
    if 2 * len(wrong) > len(places) - threshold:
        msg = f"more than {(len(places) - threshold) // 2} of {len(places)} shares are wrong"
        raise ShareError(msg)
    return _secret_bytes(polynomial[0] if polynomial else 0), wrong


def is_share(share: bytes) -> bool:
    """Whether bytes are an element: 33 of them, below p."""
    return len(share) == SHARE_BYTES and int.from_bytes(share, "big") < PRIME


def parse_share(share: bytes) -> int:
    """The element of a share.

    Raises:
        ShareError: Not 33 bytes, or not below p.
    """
    if len(share) != SHARE_BYTES:
        msg = f"a share has {SHARE_BYTES} bytes, not {len(share)}"
        raise ShareError(msg)
    value = int.from_bytes(share, "big")
    if value >= PRIME:
        msg = "a share is below 2^256 + 297; this one is not"
        raise ShareError(msg)
    return value


def _secret_bytes(value: int) -> bytes:
    if value >= 2**256:
        msg = "the shares give no 32-byte secret: they do not belong together"
        raise ShareError(msg)
    return value.to_bytes(SECRET_BYTES, "big")


# Polynomials over Z_p: lists of coefficients, the constant first, without zeros at the end.


def _evaluate(polynomial: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value


def _trim(polynomial: list[int]) -> list[int]:
    while polynomial and not polynomial[-1]:
        polynomial.pop()
    return polynomial


def _times(a: Sequence[int], b: Sequence[int]) -> list[int]:
    if not a or not b:
        return []
    product = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    return _trim([value % PRIME for value in product])


def _minus(a: Sequence[int], b: Sequence[int]) -> list[int]:
    n = max(len(a), len(b))
    padded_a = [*a, *([0] * (n - len(a)))]
    padded_b = [*b, *([0] * (n - len(b)))]
    return _trim([(x - y) % PRIME for x, y in zip(padded_a, padded_b, strict=True)])


def _divide(a: Sequence[int], b: Sequence[int]) -> tuple[list[int], list[int]]:
    rest = list(a)
    inverse = pow(b[-1], -1, PRIME)
    quotient = [0] * max(0, len(a) - len(b) + 1)
    for at in range(len(quotient) - 1, -1, -1):
        factor = rest[at + len(b) - 1] * inverse % PRIME
        quotient[at] = factor
        for i, coefficient in enumerate(b):
            rest[at + i] = (rest[at + i] - factor * coefficient) % PRIME
    return _trim(quotient), _trim(rest)


def _interpolate(places: Sequence[int], values: Sequence[int]) -> list[int]:
    # Newton's form: one divided difference at a time.
    polynomial: list[int] = []
    product = [1]
    for x, value in zip(places, values, strict=True):
        missing = (value - _evaluate(polynomial, x)) % PRIME
        factor = missing * pow(_evaluate(product, x), -1, PRIME) % PRIME
        polynomial = _minus(polynomial, [(-factor * c) % PRIME for c in product])
        product = _times(product, [-x % PRIME, 1])
    return polynomial


def _gao(places: Sequence[int], values: Sequence[int], threshold: int) -> list[int]:
    product = [1]
    for x in places:
        product = _times(product, [-x % PRIME, 1])
    before, rest = product, _interpolate(places, values)
    u_before: list[int] = []
    u: list[int] = [1]
    # The extended Euclidean algorithm, until the degree falls below (n + threshold) / 2.
    while 2 * (len(rest) - 1) >= len(places) + threshold:
        quotient, remainder = _divide(before, rest)
        before, rest = rest, remainder
        u_before, u = u, _minus(u_before, _times(quotient, u))
    polynomial, remainder = _divide(rest, u)
    if remainder or len(polynomial) > threshold:
        msg = f"more than {(len(places) - threshold) // 2} of {len(places)} shares are wrong"
        raise ShareError(msg)
    return polynomial

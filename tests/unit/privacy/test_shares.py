"""Shamir's sharing at the size that is used; what fewer shares say is a property test."""

import itertools
import random
from typing import Any

import pytest

from privacy.errors import ShareError
from privacy.shares import PRIME, Rebuilder, correct, parse_share, split

SECRET = bytes(range(32))


@pytest.fixture
def shares(make_entropy: Any) -> tuple[bytes, ...]:
    """Of `SECRET`: nine, of which five are needed."""
    return split(SECRET, n_shares=9, threshold=5, entropy=make_entropy("shares"))


def by_place(shares: tuple[bytes, ...]) -> dict[int, bytes]:
    return dict(enumerate(shares, start=1))


def share_of(value: int) -> bytes:
    return value.to_bytes(33, "big")


def is_prime(number: int) -> bool:
    # Miller-Rabin with fixed bases: a composite passes all of them with less than 4^-40.
    odd, twos = number - 1, 0
    while not odd % 2:
        odd, twos = odd // 2, twos + 1
    for base in random.Random(0).sample(range(2, 10**6), 40):
        x = pow(base, odd, number)
        if x not in (1, number - 1) and all(
            (x := x * x % number) != number - 1 for _ in range(twos - 1)
        ):
            return False
    return True


def test_the_modulus_is_the_smallest_prime_above_every_secret() -> None:
    assert [k for k in range(1, 298) if is_prime(2**256 + k)] == [297]
    assert PRIME == 2**256 + 297


def test_every_set_of_threshold_shares_gives_the_secret(shares: tuple[bytes, ...]) -> None:
    # Guarantee 1, first half.
    for places in itertools.combinations(range(1, 10), 5):
        rebuilder = Rebuilder(places)
        assert rebuilder.secret([shares[x - 1] for x in places]) == SECRET


def test_one_share_less_gives_another_secret(shares: tuple[bytes, ...]) -> None:
    for places in itertools.combinations(range(1, 10), 4):
        assert Rebuilder(places).secret([shares[x - 1] for x in places]) != SECRET


@pytest.mark.parametrize(
    "secret", [bytes(32), b"\xff" * 32, bytes(31) + b"\1", b"\x80" + bytes(31)]
)
def test_the_smallest_and_the_largest_secret_are_shared(secret: bytes, make_entropy: Any) -> None:
    shares = split(secret, n_shares=5, threshold=3, entropy=make_entropy(0))
    assert Rebuilder((5, 1, 3)).secret([shares[4], shares[0], shares[2]]) == secret
    assert correct(by_place(shares), threshold=3) == (secret, frozenset())


def test_shares_are_33_bytes_below_the_prime_and_never_at_zero(shares: tuple[bytes, ...]) -> None:
    assert {len(share) for share in shares} == {33}
    assert all(int.from_bytes(share, "big") < PRIME for share in shares)
    assert share_of(int.from_bytes(SECRET, "big")) not in shares


def test_every_coefficient_comes_from_the_entropy_alone() -> None:
    # f(x) = secret + 7x + 11x², by hand.
    drawn = (7).to_bytes(48, "big") + (11).to_bytes(48, "big")
    shares = split(SECRET, n_shares=3, threshold=3, entropy=lambda n_bytes: drawn[:n_bytes])
    constant = int.from_bytes(SECRET, "big")
    assert shares == tuple(share_of(constant + 7 * x + 11 * x * x) for x in (1, 2, 3))


def test_the_bias_of_the_coefficients_is_below_2_to_the_minus_127() -> None:
    # Some elements are hit once more than others by 2^384 numbers: the distance from uniform.
    n_more, n_numbers = (2**384) % PRIME, 2**384
    distance = n_more * (PRIME - n_more) / PRIME / n_numbers
    assert 0 < distance < 2**-127


def test_a_threshold_of_one_hides_nothing(make_entropy: Any) -> None:
    entropy = make_entropy(0)
    shares = split(SECRET, n_shares=3, threshold=1, entropy=entropy)
    assert shares == (b"\0" + SECRET,) * 3
    assert entropy.n_bytes == 0


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33)])
def test_a_secret_of_another_length_is_refused(secret: bytes, make_entropy: Any) -> None:
    with pytest.raises(ShareError, match="32 bytes"):
        split(secret, n_shares=3, threshold=2, entropy=make_entropy(0))


@pytest.mark.parametrize("threshold", [-1, 0, 4])
def test_a_threshold_outside_its_range_is_refused(threshold: int, make_entropy: Any) -> None:
    with pytest.raises(ShareError, match="threshold"):
        split(SECRET, n_shares=3, threshold=threshold, entropy=make_entropy(0))


@pytest.mark.parametrize("places", [(), (1, 1), (0, 1), (-1, 2), (3, 2, 3)])
def test_places_that_are_none_are_refused(places: tuple[int, ...]) -> None:
    with pytest.raises(ShareError, match="distinct places"):
        Rebuilder(places)


@pytest.mark.parametrize("n_shares", [0, 4, 6])
def test_another_number_of_shares_is_refused(n_shares: int, shares: tuple[bytes, ...]) -> None:
    with pytest.raises(ShareError, match="5 places"):
        Rebuilder((1, 2, 3, 4, 5)).secret(shares[:n_shares])


@pytest.mark.parametrize(
    ("share", "says"),
    [
        (b"", "33 bytes"),
        (bytes(32), "33 bytes"),
        (bytes(34), "33 bytes"),
        (share_of(PRIME), "below"),
        (share_of(PRIME + 1), "below"),
        (b"\xff" * 33, "below"),
    ],
)
def test_what_is_no_share_is_refused(share: bytes, says: str, shares: tuple[bytes, ...]) -> None:
    with pytest.raises(ShareError, match=says):
        parse_share(share)
    with pytest.raises(ShareError, match=says):
        Rebuilder((1, 2, 3, 4, 5)).secret([*shares[:4], share])


def test_the_largest_share_is_one() -> None:
    assert parse_share(share_of(PRIME - 1)) == PRIME - 1


@pytest.mark.parametrize("constant", [2**256, PRIME - 1])
def test_shares_of_what_is_no_secret_are_refused(constant: int) -> None:
    # The line through (0, constant) with slope 5: shares that an honest dealer never makes.
    shares = {x: share_of((constant + 5 * x) % PRIME) for x in range(1, 6)}
    with pytest.raises(ShareError, match="no 32-byte secret"):
        Rebuilder((1, 2)).secret([shares[1], shares[2]])
    with pytest.raises(ShareError, match="no 32-byte secret"):
        correct(shares, threshold=2)


def test_wrong_shares_are_found_and_corrected(shares: tuple[bytes, ...]) -> None:
    for wrong in itertools.chain(
        [()], itertools.combinations(range(1, 10), 1), itertools.combinations(range(1, 10), 2)
    ):
        given = by_place(shares) | {x: share_of(1234567 + x) for x in wrong}
        assert correct(given, threshold=5) == (SECRET, frozenset(wrong))


def test_a_share_off_by_one_is_found(shares: tuple[bytes, ...]) -> None:
    given = by_place(shares)
    given[4] = share_of((parse_share(shares[3]) + 1) % PRIME)
    assert correct(given, threshold=5) == (SECRET, frozenset({4}))


def test_more_wrong_shares_than_can_be_told_apart_are_refused(shares: tuple[bytes, ...]) -> None:
    for n_wrong in (3, 4, 5, 9):
        given = by_place(shares) | {x: share_of(1000 + x**7) for x in range(1, n_wrong + 1)}
        with pytest.raises(ShareError, match="more than 2 of 9"):
            correct(given, threshold=5)


def test_too_few_shares_are_not_corrected(shares: tuple[bytes, ...]) -> None:
    with pytest.raises(ShareError, match="4 shares"):
        correct(by_place(shares[:4]), threshold=5)


def test_no_redundancy_corrects_nothing(shares: tuple[bytes, ...]) -> None:
    given = by_place(shares[:5])
    assert correct(given, threshold=5) == (SECRET, frozenset())
    given[2] = share_of(1)
    secret, wrong = correct(given, threshold=5)
    assert secret != SECRET
    assert not wrong


def test_a_zero_secret_with_zero_coefficients_is_corrected() -> None:
    given = {x: share_of(0) for x in range(1, 6)} | {3: share_of(9)}
    assert correct(given, threshold=3) == (bytes(32), frozenset({3}))

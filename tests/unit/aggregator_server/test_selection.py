"""Who is drawn for a round."""

import hashlib

import pytest

from aggregator_server.selection import cohort_size, draw, rank
from protocol.blocks import RoundsBlock

IDENTITIES = [hashlib.sha256(bytes([i])).digest() for i in range(20)]


@pytest.mark.parametrize(
    ("target", "over", "present", "expected"),
    [(5, 1.3, 100, 7), (5, 1.3, 6, 6), (10, 1.1, 100, 11), (10, 1.3, 100, 13), (1, 1.0, 9, 1)],
)
def test_cohort_is_the_ceiling_of_the_overselected_target_or_all(target, over, present, expected):
    rules = RoundsBlock(n_rounds=1, cohort_target=target, min_cohort=1, over_selection=over)
    assert cohort_size(rules, n_present=present) == expected


def test_those_of_lowest_rank_are_drawn_whatever_their_order():
    seed = bytes(32)
    drawn = draw(seed, IDENTITIES, n=5, round_number=3)
    assert drawn == draw(seed, reversed(IDENTITIES), n=5, round_number=3)
    expected = sorted(IDENTITIES, key=lambda identity: rank(seed, identity))[:5]
    assert [row.agent for row in drawn] == expected
    assert {row.round for row in drawn} == {3}


def test_another_seed_draws_others():
    first = {row.agent for row in draw(bytes(32), IDENTITIES, n=5, round_number=1)}
    other = {row.agent for row in draw(b"\x01" * 32, IDENTITIES, n=5, round_number=1)}
    assert first != other


def test_no_free_place_draws_nobody():
    assert draw(bytes(32), IDENTITIES, n=0, round_number=1) == ()
    assert draw(bytes(32), IDENTITIES, n=-1, round_number=1) == ()

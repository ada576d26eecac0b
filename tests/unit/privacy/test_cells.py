"""Sizes, thresholds and the draw: what PROTOCOL says under "Cells"."""

import hashlib
import hmac
from itertools import pairwise, product
from typing import Any

import pytest

from privacy.secagg.cells import CellView, assign, cell_sizes, colluders, draw_seed, threshold
from protocol.blocks import CellMasking
from protocol.limits import MAX_CELL, MAX_JSON_BYTES, MAX_WAVE, MIN_CELL
from protocol.masked import Bundle, ReadyList, SharesHeader
from protocol.signing import Signed
from protocol.wire import canonical_json

SIZES = range(MIN_CELL, 129)
"""Far beyond `MAX_CELL`, so that raising it needs no new thought about thresholds."""
WANTED = range(1, 129)


def listed(n_ready: int, *, beacon: bytes | None = None, **changes: Any) -> ReadyList:
    body = ReadyList(
        federation=bytes(16),
        round=1,
        round_digest=bytes([9]) * 32,
        wave=1,
        entries=tuple((i.to_bytes(32, "big"), bytes([i % 251]) * 32) for i in range(n_ready)),
        beacon=beacon,
    )
    return body.model_copy(update=changes)


@pytest.mark.parametrize(
    ("n_ready", "target", "cells"),
    [
        (5, 10, {5: 1}),
        (20, 10, {10: 2}),
        (20, 5, {5: 4}),
        (100, 10, {10: 10}),
        (1000, 16, {16: 54, 17: 8}),
        (9, 5, {9: 1}),
        (19, 10, {19: 1}),
    ],
)
def test_the_sizes_of_cells(n_ready: int, target: int, cells: dict[int, int]) -> None:
    sizes = cell_sizes(n_ready, target)
    assert {size: sizes.count(size) for size in set(sizes)} == cells
    assert list(sizes) == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("n_members", "c", "t"),
    [(5, 1, 4), (6, 1, 4), (7, 1, 5), (8, 2, 6), (10, 2, 7), (16, 3, 10), (17, 3, 11)],
)
def test_the_thresholds_of_cells(n_members: int, c: int, t: int) -> None:
    assert colluders(n_members) == c
    assert threshold(n_members, c) == t


def test_cells_have_at_least_the_target_and_at_most_what_the_manifest_allows() -> None:
    for target in (5, 6, 10, 16, 64):
        for n_ready in range(MIN_CELL, 400):
            sizes = cell_sizes(n_ready, target)
            assert sum(sizes) == n_ready
            assert max(sizes) - min(sizes) <= 1
            assert max(sizes) <= 2 * target - 1
            assert min(sizes) >= min(target, n_ready)


def test_one_member_may_always_drop_out() -> None:
    for n_members, wanted in product(SIZES, (None, *WANTED)):
        c = colluders(n_members, wanted=wanted)
        assert threshold(n_members, c) <= n_members - 1, (n_members, wanted)


def test_two_lists_of_survivors_share_an_honest_member() -> None:
    # Two sets of t members have at least 2t − m in common: more than all colluders.
    for n_members, wanted in product(SIZES, (None, 1, 2, 5, 40, 128)):
        c = colluders(n_members, wanted=wanted)
        assert 2 * threshold(n_members, c) - n_members > c, (n_members, wanted)


def test_colluders_alone_rebuild_nothing() -> None:
    for n_members, wanted in product(SIZES, (None, 128)):
        c = colluders(n_members, wanted=wanted)
        assert c < threshold(n_members, c), (n_members, wanted)


def test_a_manifest_raises_what_a_cell_tolerates_and_never_lowers_it() -> None:
    for n_members in SIZES:
        least = colluders(n_members)
        assert least == max(1, (n_members + 2) // 5)
        tolerated = [colluders(n_members, wanted=wanted) for wanted in WANTED]
        assert all(c >= least for c in tolerated)
        assert all(before <= after for before, after in pairwise(tolerated))
        # Whatever is wanted is given, as long as a member may drop out.
        for wanted, c in enumerate(tolerated, start=1):
            if wanted >= least and threshold(n_members, wanted) <= n_members - 1:
                assert c == wanted, (n_members, wanted)


@pytest.mark.parametrize("target", [5, 7, 10])
@pytest.mark.parametrize("beacon", [None, bytes([7]) * 32])
def test_everyone_draws_the_same_cells(target: int, beacon: bytes | None) -> None:
    # Guarantee 1, the first half, against a second computation.
    ready_list = listed(53, beacon=beacon)
    drawn = assign(ready_list, target)
    seed = draw_seed(ready_list)
    ranks = {
        identity: hmac.new(seed, identity, hashlib.sha256).digest()
        for identity, _ in ready_list.entries
    }
    cells = [sorted(cell, key=lambda identity: ranks[identity]) for cell in drawn]
    assert [identity for cell in cells for identity in cell] == sorted(
        ranks, key=lambda identity: ranks[identity]
    )
    assert [len(cell) for cell in drawn] == list(cell_sizes(53, target))
    assert all(list(cell) == sorted(cell) for cell in drawn)


@pytest.mark.parametrize("n_ready", [5, 9, 10, 23, 100])
def test_each_identity_stands_in_one_cell(n_ready: int) -> None:
    # Guarantee 1, the second half.
    ready_list = listed(n_ready)
    drawn = [identity for cell in assign(ready_list, 5) for identity in cell]
    assert sorted(drawn) == [identity for identity, _ in ready_list.entries]


@pytest.mark.parametrize(
    "changes",
    [
        {"beacon": bytes(32)},
        {"round_digest": bytes(32)},
        {"wave": 2},
        {"round": 2},
        {"federation": bytes([1]) * 16},
        {"entries": listed(39).entries},
        {"entries": (*listed(39).entries, (bytes([0xFF]) * 32, bytes(32)))},
    ],
    ids=str,
)
def test_the_draw_depends_on_all_of_the_list(changes: dict[str, Any]) -> None:
    ready_list = listed(40)
    other = ready_list.model_copy(update=changes)
    assert draw_seed(other) != draw_seed(ready_list)
    assert assign(other, 5) != assign(ready_list, 5)


def test_a_beacon_that_comes_after_the_list_moves_members() -> None:
    # Whoever made the list could not know with whom a member would be.
    mates = {
        frozenset(next(cell for cell in assign(listed(40, beacon=bytes([i]) * 32), 5) if cell[0]))
        for i in range(30)
    }
    assert len(mates) == 30


def test_a_view_knows_where_a_receiver_stands_in_a_dealers_tuples(make_cell: Any) -> None:
    cell = make_cell(6)
    view = CellView(cell.roster.body)
    assert view.transcript == cell.roster.body.transcript()
    assert (view.threshold, view.colluders) == (4, 1)
    for dealer in cell.ids:
        others = [identity for identity in cell.ids if identity != dealer]
        assert [view.place(dealer, receiver) for receiver in others] == list(range(5))


def header_of(n_members: int) -> Signed[SharesHeader]:
    digest = bytes(32)
    header = SharesHeader(
        transcript=digest,
        agent=digest,
        commitment=digest,
        ciphertexts=(digest,) * (n_members - 1),
        self_shares=(digest,) * (n_members - 1),
        mask_shares=(digest,) * (n_members - 1),
    )
    return Signed[SharesHeader](body=header, key=digest, signature=bytes(64))


@pytest.mark.parametrize("n_members", [MIN_CELL, MAX_CELL])
def test_the_bundle_of_a_cell_that_a_manifest_allows_fits_into_a_reply(n_members: int) -> None:
    CellMasking(max_change=1.0, clip_norm=1.0, cell_target=5, max_cell=max(9, n_members))
    bundle = Bundle(
        transcript=bytes(32),
        headers=(header_of(n_members),) * n_members,
        ciphertexts=(bytes(82),) * (n_members - 1),
    )
    assert len(canonical_json(bundle.as_json())) <= MAX_JSON_BYTES


def test_the_list_of_the_largest_wave_fits_into_a_reply() -> None:
    # Each entry has one size, so a thousand of them tell of all.
    sizes = [len(canonical_json(listed(n_ready).as_json())) for n_ready in (1000, 2000)]
    n_bytes_each = (sizes[1] - sizes[0]) / 1000
    assert sizes[0] + (MAX_WAVE - 1000) * n_bytes_each <= MAX_JSON_BYTES

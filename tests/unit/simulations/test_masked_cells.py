"""Simulated masked cells: who counts, when a cell is lost and why, what cannot be one."""

import numpy as np
import pytest

from aggregator_server.masking.vectors import cell_sum
from privacy.fixed_point import EncodingPlan, agreed_layout, encode
from privacy.noise import SecureStream
from protocol.blocks import CellMasking
from protocol.checks import CheckError
from protocol.layout import VectorLayout
from protocol.masked import FailureReason
from protocol.wire import sha256
from simulations.errors import MaskedCellError
from simulations.masked_cells import (
    CellTerms,
    CellTotal,
    LostCell,
    SimulatedCell,
    Stage,
    left_to_try,
    masked_sum,
    n_uploads,
    plain_sum,
)

BOTH = pytest.mark.parametrize("run", [masked_sum, plain_sum])
N_MEMBERS = 8
THRESHOLD = 6


def make_terms(**changes) -> CellTerms:
    values = {"max_change": 1.0, "clip_norm": 100.0, "cell_target": 5, "max_cell": 9}
    masking = CellMasking(**{**values, **changes})
    layout = agreed_layout(VectorLayout.of_shapes({"a": (200,)}), masking)
    return CellTerms(
        plan=EncodingPlan.of(layout, masking, max_weight=10),
        masking=masking,
        federation=bytes(16),
        round_number=1,
        round_digest=bytes(32),
    )


def make_payloads(terms: CellTerms, n: int = N_MEMBERS):
    rng = np.random.default_rng(1)
    return [
        encode(
            rng.normal(0, 0.1, 200).astype(np.float32),
            weight=place + 1,
            plan=terms.plan,
            stream=SecureStream(sha256(bytes([place]))),
        )
        for place in range(n)
    ]


@BOTH
def test_whoever_uploads_counts_and_nobody_else(run):
    terms = make_terms()
    payloads = make_payloads(terms)
    found = run(terms, payloads, {1: Stage.BEFORE_SHARES, 6: Stage.BEFORE_UPLOAD})
    assert isinstance(found, CellTotal)
    assert found.counted == (0, 2, 3, 4, 5, 7)
    expected = sum(payloads[place].astype(np.uint64) for place in found.counted)
    np.testing.assert_array_equal(found.payload, expected.astype(np.uint16))
    total = cell_sum(found.payload, terms.plan)
    assert (total.n_members, total.weight_sum) == (6, 1 + 3 + 4 + 5 + 6 + 8)


@BOTH
@pytest.mark.parametrize("stage", [Stage.BEFORE_CONFIRM, Stage.BEFORE_REVEAL])
def test_who_vanishes_after_the_upload_counts(run, stage):
    terms = make_terms()
    found = run(terms, make_payloads(terms), {1: stage, 6: stage})
    assert found.counted == tuple(range(N_MEMBERS))


@BOTH
@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        (Stage.BEFORE_SHARES, FailureReason.TOO_FEW_SHARED),
        (Stage.BEFORE_UPLOAD, FailureReason.TOO_FEW_UPLOADED),
        (Stage.BEFORE_CONFIRM, FailureReason.TOO_FEW_CONFIRMED),
        (Stage.BEFORE_REVEAL, FailureReason.TOO_FEW_REVEALED),
    ],
)
def test_one_below_the_threshold_loses_the_cell_at_its_stage(run, stage, reason):
    terms = make_terms()
    assert terms.threshold(N_MEMBERS) == THRESHOLD
    payloads = make_payloads(terms)
    gone = range(N_MEMBERS - THRESHOLD + 1)
    assert run(terms, payloads, dict.fromkeys(gone, stage)) == LostCell(reason=reason)
    assert isinstance(run(terms, payloads, dict.fromkeys(gone[1:], stage)), CellTotal)


@BOTH
@pytest.mark.parametrize(
    ("stage", "n_sent", "left"),
    [
        (Stage.BEFORE_SHARES, 0, True),
        (Stage.BEFORE_UPLOAD, THRESHOLD - 1, True),
        (Stage.BEFORE_CONFIRM, N_MEMBERS, False),
        (Stage.BEFORE_REVEAL, N_MEMBERS, False),
    ],
)
def test_a_second_cell_is_of_those_who_are_there_and_have_not_confirmed(run, stage, n_sent, left):
    terms = make_terms()
    gone = dict.fromkeys(range(N_MEMBERS - THRESHOLD + 1), stage)
    found = run(terms, make_payloads(terms), gone)
    there = tuple(place for place in range(N_MEMBERS) if place not in gone)
    assert left_to_try(found, N_MEMBERS, gone, with_noise=False) == (there if left else ())
    # Two sums of one noisy update would average its noise out: once sent, it is in no other.
    noisy = there if n_sent == 0 else ()
    assert left_to_try(found, N_MEMBERS, gone, with_noise=True) == noisy
    assert n_uploads(found, N_MEMBERS, gone) == n_sent
    late = {0: stage, N_MEMBERS - 1: Stage.BEFORE_REVEAL}
    total = run(terms, make_payloads(terms), late)
    assert n_uploads(total, N_MEMBERS, late) == N_MEMBERS - (stage <= Stage.BEFORE_UPLOAD)


def test_nobody_is_in_a_second_cell_after_a_bad_sum():
    lost = LostCell(reason=FailureReason.BAD_SUM)
    assert left_to_try(lost, N_MEMBERS, {}, with_noise=False) == ()


@BOTH
def test_a_manifest_that_wants_more_colluders_wants_more_members(run):
    terms = make_terms(colluders=4)
    assert terms.threshold(N_MEMBERS) == 7
    found = run(terms, make_payloads(terms), {0: Stage.BEFORE_UPLOAD, 1: Stage.BEFORE_UPLOAD})
    assert found == LostCell(reason=FailureReason.TOO_FEW_UPLOADED)


@BOTH
def test_a_member_that_lies_about_its_count_loses_the_cell(run):
    terms = make_terms()
    payloads = make_payloads(terms)
    payloads[3][-2] = 2
    assert run(terms, payloads, {}) == LostCell(reason=FailureReason.BAD_SUM)


@BOTH
def test_a_mean_that_no_honest_members_have_loses_the_cell(run):
    terms = make_terms(clip_norm=0.1)
    payloads = make_payloads(make_terms())
    assert run(terms, payloads, {}) == LostCell(reason=FailureReason.BAD_SUM)


def test_guarantee_2_of_the_masked_sum_neither_keys_nor_order_change_it():
    terms = make_terms()
    payloads = make_payloads(terms)
    vanishings = {2: Stage.BEFORE_UPLOAD, 5: Stage.BEFORE_REVEAL}
    first = masked_sum(terms, payloads, vanishings)
    for arrive in (lambda members: members[::-1], lambda members: members):
        again = masked_sum(terms, payloads, vanishings, arrive=arrive)
        assert again.counted == first.counted
        np.testing.assert_array_equal(again.payload, first.payload)


def test_guarantee_1_of_the_simulated_cell_its_agents_check_what_they_are_told():
    cell, other = (SimulatedCell(make_terms(), 5) for _ in range(2))
    with pytest.raises(CheckError):
        cell.members[0].agent.receive_roster(other.ready_list, cell.roster)


def test_what_leaves_a_member_is_not_its_payload():
    terms = make_terms()
    cell = SimulatedCell(terms, 5)
    cell.share(cell.members)
    cell.server.close_sharing()
    payload = make_payloads(terms, 1)[0]
    masked = cell.masked(payload, cell.take_bundle(cell.members[0]))
    assert masked.shape == (terms.plan.n_words,)
    assert (masked[: len(payload)] == payload).mean() < 0.05


def test_a_member_that_has_not_shared_gets_no_bundle():
    cell = SimulatedCell(make_terms(), 5)
    cell.share(cell.members[1:])
    cell.server.close_sharing()
    with pytest.raises(MaskedCellError, match="shared nothing"):
        cell.take_bundle(cell.members[0])


@BOTH
@pytest.mark.parametrize("n_members", [4, 10])
def test_a_cell_that_no_federation_forms_is_refused(run, n_members):
    terms = make_terms()
    with pytest.raises(MaskedCellError, match=f"a cell of {n_members} members.* has 5 to 9"):
        run(terms, make_payloads(terms, n_members), {})


@BOTH
@pytest.mark.parametrize("wrong", [np.zeros(3, np.uint16), np.zeros(203, np.uint32)])
def test_words_that_do_not_fit_the_plan_are_refused(run, wrong):
    terms = make_terms()
    with pytest.raises(MaskedCellError, match="the payload at place 1 has"):
        run(terms, [make_payloads(terms)[0], wrong, *make_payloads(terms)[2:]], {})


@BOTH
def test_a_place_that_nobody_has_is_refused(run):
    terms = make_terms()
    with pytest.raises(MaskedCellError, match=r"places \[-1, 8\] vanish"):
        run(terms, make_payloads(terms), {-1: Stage.BEFORE_SHARES, 8: Stage.BEFORE_SHARES})


@pytest.mark.parametrize(
    "changes",
    [
        {"masking": make_terms(word_bits=32).masking},
        {"masking": make_terms(max_cell=10).masking},
        {"federation": bytes(15)},
        {"round_digest": bytes(31)},
        {"round_number": 0},
    ],
)
def test_terms_that_no_round_has_are_refused(changes):
    good = vars(make_terms())
    with pytest.raises(MaskedCellError, match=r"the plan has words|expected 16, 32"):
        CellTerms(**{**good, **changes})

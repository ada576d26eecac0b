"""Attacks from inside: members of a masked round that do not follow the protocol.

Each leaves the others' sum exact, or costs the attacker's own cell and no more, where PROTOCOL says
so. The honest members are those of `test_masked_rounds`.
"""

import asyncio
import importlib.util
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator_server.uploads import UPLOADS
from aggregator_server.web import edge
from privacy.errors import UpdateRangeError
from privacy.fixed_point import encode
from privacy.noise import SecureStream
from privacy.secagg import derive
from privacy.secagg.cells import CellView
from privacy.secagg.derive import ShareKind
from privacy.shares import PRIME, SHARE_BYTES, split
from protocol.checks import CheckError
from protocol.limits import NONCE_BYTES, PART_BYTES
from protocol.masked import (
    BundleNews,
    Complaint,
    Confirm,
    ConfirmedNews,
    EndedNews,
    FailedNews,
    FailureReason,
    MaskedHeader,
    Reveal,
    RosterNews,
    Shares,
    SharesHeader,
    SurvivorsNews,
)
from protocol.phases import AgentPhase, CellPhase, RoundPhase
from protocol.problems import ProblemType
from protocol.signing import Signed, sign
from protocol.transport_signing import sign_request
from protocol.wire import b64u_encode, sha256


def _honest_members() -> Any:
    # By its path: there is no tests package.
    path = Path(__file__).with_name("test_masked_rounds.py")
    spec = importlib.util.spec_from_file_location("honest_members", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


honest = _honest_members()
gather, on_disk, Member, Gathered = honest.gather, honest.on_disk, honest.Member, honest.Gathered
STAGES, STAGE_S = honest.STAGES, honest.STAGE_S


@pytest.fixture
def accused(gather) -> Callable[..., Any]:
    """A cell in which member 0 does as the test says and the others are honest."""

    def make(n: int = 6, *, up_to: str = "", **options: Any) -> Any:
        world = gather(n, **options)
        world.play(*STAGES[: STAGES.index(up_to)] if up_to else ())
        return world

    return make


def shares_of(
    attacker: Any,
    *,
    of_self: Sequence[bytes] | None = None,
    of_mask: Sequence[bytes] | None = None,
    unopenable: Iterable[bytes] = (),
    **changes: Any,
) -> Shares:
    """SHARES of a dealer who cheats.

    `of_self` and `of_mask` are its shares by place; `unopenable` members are given noise.
    """
    news = attacker.told(RosterNews, AgentPhase.READY)
    attacker.secagg.receive_roster(news.ready_list, news.roster)
    state, cell = attacker.secagg.state, CellView(news.roster.body)
    me, transcript = attacker.identity, cell.transcript

    def dealt(secret: bytes, given: Sequence[bytes] | None) -> Sequence[bytes]:
        return given or split(
            secret, n_shares=len(cell.readies), threshold=cell.threshold, entropy=os.urandom
        )

    by_kind = {
        ShareKind.SELF: dealt(state.self_seed, of_self),
        ShareKind.MASK: dealt(state.masking_private_key, of_mask),
    }
    ciphertexts: list[bytes] = []
    digests: dict[ShareKind, list[bytes]] = {kind: [] for kind in by_kind}
    for place, (other, ready) in enumerate(cell.readies.items()):
        if other == me:
            continue
        sealed = derive.seal_shares(
            derive.agree(state.sealing_private_key, ready.sealing_key),
            by_kind[ShareKind.SELF][place] + by_kind[ShareKind.MASK][place],
            transcript=transcript,
            sender=me,
            receiver=other,
        )
        ciphertexts.append(os.urandom(82) if other in unopenable else sealed)
        for kind, shares in by_kind.items():
            digests[kind].append(derive.share_digest(transcript, me, other, kind, shares[place]))
    header = SharesHeader(
        transcript=transcript,
        agent=me,
        commitment=derive.commitment(transcript, me, state.self_seed),
        ciphertexts=tuple(sha256(ciphertext) for ciphertext in ciphertexts),
        self_shares=tuple(digests[ShareKind.SELF]),
        mask_shares=tuple(digests[ShareKind.MASK]),
    ).model_copy(update=changes)
    signed = sign(attacker.http.signer, "shares", header).signed
    shares = Shares(header=signed, ciphertexts=tuple(ciphertexts))
    attacker.secagg.state = state.model_copy(update={"shares": shares})
    return shares


def deal(attacker: Any, **how: Any) -> None:
    response = attacker.to_cell("shares", shares_of(attacker, **how))
    assert response.status_code == 200, response.text


def noise_shares(n: int) -> list[bytes]:
    """Shares that lie on no polynomial of the cell's degree."""
    return [secrets.randbelow(PRIME).to_bytes(SHARE_BYTES, "big") for _ in range(n)]


def mask_and_complain(members: Iterable[Any]) -> list[bytes]:
    """Every member opens its bundle and tells of what does not open; who complained."""
    accusers = []
    for member in members:
        member.mask()
        for response in member.complain():
            assert response.status_code == 200, response.text
            accusers.append(member.identity)
    return accusers


def moved_norm(world: Any) -> float:
    releases = world.case.federation.releases
    newest = releases.newest()
    before = releases.vector(releases.get(newest.number - 1)).astype(np.float64)
    return float(np.linalg.norm(releases.vector(newest) - before))


def failed_cell(world: Any, member: Any) -> Any:
    """Why a member's cell failed."""
    return member.told(FailedNews).failed.body


class TestShares:
    def test_noise_for_everyone_fails_the_cell_which_tries_again_without_the_dealer(self, accused):
        world = accused(7)
        attacker, *rest = world.members
        deal(attacker, unopenable=[member.identity for member in rest])
        world.play("share", who=rest)
        assert sorted(mask_and_complain(rest)) == sorted(member.identity for member in rest)
        world.case.advance()
        body = failed_cell(world, rest[0])
        assert (body.reason, body.blamed) == (FailureReason.BAD_SHARES, (attacker.identity,))
        attacker.begin(attempt=2)
        attacker.ready()
        for member in rest:
            member.try_again(FailureReason.BAD_SHARES)
        world.play("ready", *STAGES, who=rest)
        world.assert_published(rest)
        assert attacker.told(EndedNews) == EndedNews(counted=False)

    def test_noise_for_some_by_a_dealer_that_vanishes_leaves_enough_shares(self, accused):
        world = accused(7)  # t = 5: of 6 holders one may be given noise
        attacker, *rest = world.members
        deal(attacker, unopenable=[rest[0].identity])
        world.play("share", who=rest)
        assert mask_and_complain(rest) == [rest[0].identity]
        world.play("upload", who=rest, late=True)
        world.play("confirm", "reveal", who=rest)
        world.assert_published(rest)

    def test_shares_of_no_polynomial_by_a_dealer_that_vanishes_lose_its_cell_and_name_it(
        self, accused
    ):
        world = accused(12, cell_target=6)
        bad, fine = world.by_cell()
        attacker, *rest = bad
        deal(attacker, of_mask=noise_shares(len(bad)))
        world.play("share", who=[*rest, *fine])
        world.play("upload", who=[*rest, *fine], late=True)
        world.play("confirm", "reveal", who=[*rest, *fine])
        body = failed_cell(world, rest[0])
        assert (body.reason, body.blamed) == (FailureReason.BAD_SHARES, (attacker.identity,))
        assert not body.may_retry  # its survivors confirmed
        world.assert_published(fine)

    def test_a_single_wrong_share_of_a_dealer_that_vanishes_is_corrected(self, accused):
        world = accused(10)  # t = 7: 9 holders, one of whom may hold a wrong share
        attacker, *rest = world.members
        true = split(
            attacker.secagg.state.masking_private_key,
            n_shares=10,
            threshold=7,
            entropy=os.urandom,
        )
        receiver = next(
            place
            for place, ready in enumerate(attacker.told(RosterNews).roster.body.members)
            if ready.body.agent == rest[0].identity
        )
        wrong = [*true[:receiver], noise_shares(1)[0], *true[receiver + 1 :]]
        deal(attacker, of_mask=wrong)
        world.play("share", who=rest)
        world.play("upload", who=rest, late=True)
        world.play("confirm", "reveal", who=rest)
        world.assert_published(rest)

    def test_shares_of_no_polynomial_harm_nobody_while_their_dealer_stays(self, accused):
        world = accused(6)
        attacker, *rest = world.members
        deal(attacker, of_self=noise_shares(6), of_mask=noise_shares(6))
        world.play("share", who=rest)
        world.play("upload", "confirm", "reveal")
        world.assert_published(world.members)

    def test_a_commitment_to_another_seed_loses_the_cell_and_its_dealer_is_named(
        self, accused, problem_of
    ):
        # PROTOCOL, "States": wrong shares are found by digest, commitment or key; the cell goes
        # on, or is lost and the dealer named.
        world = accused(12, cell_target=6)
        bad, fine = world.by_cell()
        attacker, *rest = bad
        transcript = attacker.told(RosterNews).roster.body.transcript()
        other = derive.commitment(transcript, attacker.identity, os.urandom(32))
        deal(attacker, commitment=other)
        world.play("share", who=[*rest, *fine])
        world.play("upload", "confirm")
        reveal = attacker.secagg.receive_confirmed(attacker.told(ConfirmedNews).confirmed)
        assert problem_of(attacker.to_cell("reveal", reveal)) is ProblemType.BAD_MESSAGE
        world.play("reveal", who=[*rest, *fine])
        world.case.advance(2 * STAGE_S)
        world.assert_published(fine)
        assert failed_cell(world, rest[0]).blamed == (attacker.identity,)

    def test_a_second_set_of_shares_is_refused(self, accused, problem_of):
        world = accused()
        attacker = world.members[0]
        deal(attacker)
        first = attacker.secagg.state.shares
        again = shares_of(attacker, of_mask=noise_shares(6))
        assert problem_of(attacker.to_cell("shares", again)) is ProblemType.CONFLICT
        attacker.secagg.state = attacker.secagg.state.model_copy(update={"shares": first})
        world.play("share", who=world.members[1:])
        world.play("upload", "confirm", "reveal")
        world.assert_published(world.members)

    def test_shares_for_fewer_or_with_other_ciphertexts_than_signed_are_refused(
        self, accused, problem_of
    ):
        world = accused()
        attacker, *rest = world.members
        shares = shares_of(attacker)
        cut = Shares(header=shares.header, ciphertexts=shares.ciphertexts[:-1])
        swapped = Shares(header=shares.header, ciphertexts=shares.ciphertexts[::-1])
        for message in (cut, swapped):
            assert problem_of(attacker.to_cell("shares", message)) is ProblemType.BAD_MESSAGE
        there = rest
        world.play("share", who=there, late=True)
        world.play("upload", "confirm", "reveal", who=there)
        world.assert_published(there)

    def test_a_false_complaint_neither_fails_a_cell_of_six_nor_blames_anyone(self, accused):
        world = accused(up_to="upload")
        liar, victim = world.members[:2]
        liar.mask()
        response = liar.to_cell("complaints", complaint(liar, victim))
        assert response.status_code == 200
        world.play("upload", "confirm", "reveal")
        world.assert_published(world.members)

    def test_a_complaint_over_what_the_dealer_did_not_sign_is_refused(self, accused, problem_of):
        world = accused(up_to="upload")
        liar, victim = world.members[:2]
        liar.mask()
        forged = complaint(liar, victim, ciphertext=os.urandom(82))
        assert problem_of(liar.to_cell("complaints", forged)) is ProblemType.BAD_MESSAGE
        world.play("upload", "confirm", "reveal")
        world.assert_published(world.members)

    def test_a_complaint_about_a_dealer_who_came_too_late_does_not_fail_the_round(
        self, accused, monkeypatch
    ):
        """Two colluders: one's SHARES are journalled just as the stage ends, the other complains.

        Its SHARES are checked, then the clockwork reads what has come, then they are journalled.
        """
        world = accused(8)
        dealer, liar, *rest = world.members
        for member in [liar, *rest]:
            member.share()
        shares = shares_of(dealer)
        cells = world.store.cells
        real_add, real_move = cells.add_message, cells.move

        def add_message(*args: Any, **options: Any) -> None:
            def move(*arguments: Any, **others: Any) -> None:
                real_add(*args, **options)
                real_move(*arguments, **others)

            monkeypatch.setattr(cells, "move", move)
            world.case.advance(STAGE_S + 1)

        monkeypatch.setattr(cells, "add_message", add_message)
        dealer.to_cell("shares", shares)
        monkeypatch.undo()
        place = CellView(liar.secagg.state.roster.body).place(dealer.identity, liar.identity)
        body = Complaint(
            transcript=liar.secagg.transcript,
            agent=liar.identity,
            dealer=shares.header,
            ciphertext=shares.ciphertexts[place],
        )
        liar.mask()
        liar.to_cell("complaints", sign(liar.http.signer, "complaint", body).signed)
        world.case.advance()
        assert world.phase is RoundPhase.GATHERING, world.failure
        if dealer.news(AgentPhase.SHARED) == EndedNews(counted=False):
            there = [liar, *rest]
        else:
            there = world.members
        world.play("upload", "confirm", "reveal", who=there)
        world.assert_published(there)


def complaint(liar: Any, victim: Any, **changes: Any) -> Signed[Complaint]:
    """A complaint over a ciphertext that opens well."""
    cell = CellView(liar.secagg.state.roster.body)
    (header,) = [
        found for found in liar.secagg.state.headers if found.body.agent == victim.identity
    ]
    shares = victim.secagg.state.shares
    body = Complaint(
        transcript=cell.transcript,
        agent=liar.identity,
        dealer=header,
        ciphertext=shares.ciphertexts[cell.place(victim.identity, liar.identity)],
    ).model_copy(update=changes)
    return sign(liar.http.signer, "complaint", body).signed


class TestReveal:
    def test_wrong_shares_of_one_who_vanished_are_found_and_the_sum_is_exact(self, accused):
        world = accused(6)
        attacker, _, *rest = world.members
        world.play("share")
        there = [attacker, *rest]
        world.play("upload", who=there, late=True)
        world.play("confirm", who=there)
        self.reveal_wrongly(attacker)
        world.play("reveal", who=rest)
        world.assert_published(there)

    def test_wrong_shares_of_one_who_vanished_after_its_upload_are_found(self, accused):
        world = accused(6)
        attacker, _, *rest = world.members
        world.play("share", "upload", "confirm")
        self.reveal_wrongly(attacker)
        world.play("reveal", who=rest)
        world.assert_published(world.members)

    def test_wrong_shares_where_none_can_be_spared_lose_the_cell_and_give_no_wrong_sum(
        self, accused
    ):
        world = accused(12, cell_target=6)  # t = 4
        bad, fine = world.by_cell()
        attacker, _, _, *rest = bad
        world.play("share")
        world.play("upload", who=[attacker, *rest, *fine], late=True)
        world.play("confirm", who=[attacker, *rest, *fine])
        self.reveal_wrongly(attacker)
        world.play("reveal", who=[*rest, *fine])
        body = failed_cell(world, rest[0])
        assert body.reason is FailureReason.BAD_SHARES
        world.assert_published(fine)

    @staticmethod
    def reveal_wrongly(attacker: Any) -> None:
        body = attacker.secagg.receive_confirmed(attacker.told(ConfirmedNews).confirmed).body
        (wrong,) = noise_shares(1)
        changes = {
            kind: tuple((dealer, wrong) for dealer, _ in getattr(body, kind))
            for kind in ("self_shares", "mask_shares")
        }
        changed = sign(attacker.http.signer, "reveal", body.model_copy(update=changes)).signed
        assert attacker.to_cell("reveal", changed).status_code == 200

    @pytest.mark.parametrize(
        "lie", ["other kind", "both kinds", "too few", "other seed", "of a stranger"]
    )
    def test_a_reveal_of_other_shares_than_wanted_is_refused(self, accused, problem_of, lie):
        world = accused(6)
        attacker, gone, *rest = world.members
        world.play("share")
        there = [attacker, *rest]
        world.play("upload", who=there, late=True)
        world.play("confirm", who=there)
        body = attacker.secagg.receive_confirmed(attacker.told(ConfirmedNews).confirmed).body
        received = {given.dealer: given for given in attacker.secagg.state.received}
        gone_self = (gone.identity, received[gone.identity].self_share)
        victim_mask = (rest[0].identity, received[rest[0].identity].mask_share)
        changes: dict[str, dict[str, Any]] = {
            "other kind": {"self_shares": (*body.self_shares, gone_self), "mask_shares": ()},
            "both kinds": {"mask_shares": tuple(sorted((*body.mask_shares, victim_mask)))},
            "too few": {"self_shares": body.self_shares[1:]},
            "other seed": {"self_seed": os.urandom(32)},
            "of a stranger": {"mask_shares": ((os.urandom(32), noise_shares(1)[0]),)},
        }
        changed = body.model_copy(update=changes[lie])
        signed = sign(attacker.http.signer, "reveal", changed).signed
        assert problem_of(attacker.to_cell("reveal", signed)) is ProblemType.BAD_MESSAGE
        world.play("reveal", who=rest)
        world.assert_published(there)

    def test_a_reveal_before_enough_have_confirmed_is_refused(self, accused, problem_of):
        world = accused(up_to="confirm")
        attacker, *rest = world.members
        attacker.confirm()
        with pytest.raises(AssertionError):  # the server has nothing to show yet
            attacker.told(ConfirmedNews)
        state = attacker.secagg.state
        body = Reveal(
            transcript=attacker.secagg.transcript,
            agent=attacker.identity,
            self_seed=state.self_seed,
            self_shares=tuple((given.dealer, given.self_share) for given in state.received),
            mask_shares=(),
        )
        early = sign(attacker.http.signer, "reveal", body).signed
        assert problem_of(attacker.to_cell("reveal", early)) is ProblemType.STAGE_CLOSED
        world.play("confirm", who=rest)
        world.play("reveal", who=rest)
        world.assert_published(world.members)

    def test_a_second_other_reveal_is_refused(self, accused, problem_of):
        world = accused(up_to="reveal")
        attacker, *rest = world.members
        attacker.reveal()
        body = attacker.secagg.state.reveal.body
        dealer, _ = body.self_shares[0]
        changed = body.model_copy(
            update={"self_shares": ((dealer, noise_shares(1)[0]), *body.self_shares[1:])}
        )
        signed = sign(attacker.http.signer, "reveal", changed).signed
        assert problem_of(attacker.to_cell("reveal", signed)) is ProblemType.CONFLICT
        world.play("reveal", who=rest)
        world.assert_published(world.members)


class TestConfirm:
    @pytest.mark.parametrize("over", ["fewer survivors", "other masks", "another's signature"])
    def test_a_word_on_other_survivors_is_refused(self, accused, problem_of, over):
        world = accused(up_to="confirm")
        attacker, *rest = world.members
        survivors = attacker.told(SurvivorsNews).survivors.entries()
        bundle = attacker.secagg.state.upload.body.bundle
        message = {
            "fewer survivors": derive.confirm_hash(bundle, survivors[1:]),
            "other masks": derive.confirm_hash(os.urandom(32), survivors),
            "another's signature": derive.confirm_hash(bundle, survivors),
        }[over]
        signer = (rest[0] if over == "another's signature" else attacker).http.signer
        confirm = Confirm(
            transcript=attacker.secagg.transcript,
            agent=attacker.identity,
            signature=signer.sign_bytes(message),
        )
        assert problem_of(attacker.to_cell("confirm", confirm)) is ProblemType.BAD_MESSAGE
        world.play("confirm", "reveal", who=rest)
        world.assert_published(world.members)

    def test_one_that_never_confirms_does_not_stop_the_others(self, accused):
        world = accused(up_to="confirm")
        _, *rest = world.members
        world.play("confirm", "reveal", who=rest)
        world.assert_published(world.members)


class TestVector:
    """What can be put under the masks, where nobody sees it."""

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_values_that_are_not_finite_cannot_be_encoded(self, accused, bad):
        plan = accused(6).members[0].plan
        vector = np.zeros(plan.layout.n_values, np.float32)
        vector[7] = bad
        with pytest.raises(UpdateRangeError, match="not finite"):
            encode(vector, weight=1, plan=plan, stream=SecureStream())

    def test_a_random_vector_fails_the_check_words_and_costs_its_own_cell(self, accused):
        world = accused(12, cell_target=6)
        bad, fine = world.by_cell()
        attacker = bad[0]
        world.play("share")
        attacker.mask()
        attacker.body = os.urandom(attacker.plan.n_bytes)
        world.play("upload", "confirm", "reveal")
        body = failed_cell(world, bad[1])
        assert (body.reason, body.blamed, body.may_retry) == (FailureReason.BAD_SUM, (), False)
        world.assert_published(fine)

    @pytest.mark.parametrize(
        ("tail", "lie"), [(-2, 0), (-2, 2), (-2, 65_535), (-3, 60_000), (-1, 60_000)]
    )
    def test_a_count_a_weight_or_a_flag_beyond_its_range_gives_no_sum(self, accused, tail, lie):
        world = accused(5)
        world.members[0].payload[tail] = lie
        world.play(*STAGES)
        assert failed_cell(world, world.members[1]).reason is FailureReason.BAD_SUM
        assert world.failure == "no cell of the round gave a sum"

    def test_a_lying_weight_within_its_range_rescales_its_own_cell_alone(self, accused):
        """PROTOCOL, "What is claimed": masking costs robustness, and says which."""
        world = accused(12, cell_target=6, weights=[10] * 12)
        bad, fine = world.by_cell()
        bad[0].payload[-3] = 256
        world.play(*STAGES)
        sums = {row.transcript: row for row in world.store.uploads.cells(1)}
        assert sums[bad[0].secagg.transcript].weight_sum == 50 + 256
        assert sums[fine[0].secagg.transcript].weight_sum == 60

    def test_a_lying_weight_rescales_the_mean_up_to_the_norm_cap_and_no_further(self, accused):
        """The sum of weights is made small by a weight that wraps: the mean would be huge."""
        world = accused(6, weights=[256] * 6)
        attacker, *rest = world.members
        attacker.payload[-3] = 65_536 + 6 - 256 * len(rest)  # all weights add up to 6
        world.play(*STAGES)
        assert_within_norm(world)

    def test_random_words_with_right_check_words_spoil_no_more_than_the_norm_cap(self, accused):
        world = accused(6, weights=[256] * 6)
        plan = world.members[0].plan
        noise = np.frombuffer(os.urandom(2 * plan.layout.n_values), "<u2")
        world.members[0].payload[: plan.layout.n_values] = noise
        world.play(*STAGES)
        assert_within_norm(world)

    def test_a_vector_under_other_masks_gives_no_sum(self, accused):
        world = accused(5, up_to="upload")
        attacker, other = world.members[:2]
        attacker.mask()
        words = np.frombuffer(attacker.body, attacker.plan.dtype).copy()
        words[::2] += 1  # a mask that is wrong in every other word
        attacker.body = words.tobytes()
        world.play("upload", "confirm", "reveal")
        assert failed_cell(world, other).reason is FailureReason.BAD_SUM

    def test_updates_at_the_norm_cap_are_summed_whatever_their_weights(self, accused):
        """The honest are never taken for attackers: all alike, as long and as light as may be."""
        for weight in (1, 256):
            world = accused(5, ready=False, weights=[weight] * 5)
            for member in world.members:
                plan = member.plan
                value = plan.clip_norm / np.sqrt(plan.layout.n_values)
                vector = np.full(plan.layout.n_values, 2 * value, np.float32)
                stream = SecureStream()
                member.payload = encode(vector, weight=weight, plan=plan, stream=stream)
            world.play("ready", *STAGES)
            world.assert_published(world.members)


def assert_within_norm(world: Any) -> None:
    """Every honest update has a norm of at most C, so no honest mean has a larger one."""
    masking = world.case.manifest.masking
    plan = world.members[0].plan
    rounding = np.sqrt(plan.layout.n_values) * plan.layout.slots[0].step * plan.max_weight
    if world.phase is RoundPhase.PUBLISHED:
        assert moved_norm(world) <= masking.clip_norm + rounding
    else:
        assert world.failure == "no cell of the round gave a sum"


class TestUpload:
    def test_more_bytes_or_parts_than_announced_are_refused(self, accused, on_disk, problem_of):
        world = accused(up_to="upload")
        attacker, *rest = world.members
        attacker.head()
        for n, part, problem in (
            (0, attacker.body + b"x", ProblemType.BAD_REQUEST),
            (0, attacker.body[:-1], ProblemType.BAD_REQUEST),
            (0, bytes(PART_BYTES + 1), ProblemType.TOO_LARGE),
            (1, attacker.body, ProblemType.NOT_FOUND),
            (2**31 - 1, b"", ProblemType.NOT_FOUND),
        ):
            response = attacker.http.request("PUT", f"{attacker.upload_path}/parts/{n}", part)
            assert problem_of(response) is problem
        assert on_disk(world, UPLOADS) == set()
        world.play("upload", who=rest, late=True)
        world.play("confirm", "reveal", who=rest)
        world.assert_published(rest)

    @pytest.mark.parametrize("n_bytes", [1, 2**31])
    def test_a_head_of_another_size_is_refused(self, accused, problem_of, n_bytes):
        world = accused(up_to="upload")
        attacker = world.members[0]
        attacker.mask()
        body = attacker.secagg.sign_upload(bytes(32)).body
        changed = body.model_copy(update={"body_n_bytes": n_bytes})
        signed = sign(attacker.http.signer, "masked-upload", changed).signed
        response = attacker.to_cell("uploads", signed)
        assert problem_of(response) is ProblemType.BAD_MESSAGE

    def test_a_body_that_is_not_the_announced_one_is_never_summed(
        self, accused, on_disk, problem_of
    ):
        world = accused(up_to="upload")
        attacker, *rest = world.members
        attacker.head()
        attacker.body = os.urandom(len(attacker.body))
        attacker.put()
        assert problem_of(attacker.complete()) is ProblemType.DIGEST_MISMATCH
        assert on_disk(world, UPLOADS) == set()
        world.play("upload", who=rest, late=True)
        world.play("confirm", "reveal", who=rest)
        world.assert_published(rest)

    def test_a_second_head_is_refused(self, accused, problem_of):
        world = accused(up_to="upload")
        attacker = world.members[0]
        attacker.head()
        body = attacker.secagg.state.upload.body
        changed = body.model_copy(update={"body_sha256": bytes(32)})
        signed = sign(attacker.http.signer, "masked-upload", changed).signed
        assert problem_of(attacker.to_cell("uploads", signed)) is ProblemType.CONFLICT
        world.play("upload", "confirm", "reveal")
        world.assert_published(world.members)

    def test_anothers_header_is_refused(self, accused, problem_of):
        world = accused(up_to="upload")
        thief, victim, *rest = world.members
        victim.upload()
        response = thief.to_cell("uploads", victim.secagg.state.upload)
        assert problem_of(response) is ProblemType.BAD_SIGNATURE
        response = thief.http.request("PUT", f"{thief.upload_path}/parts/0", victim.body)
        assert problem_of(response) is ProblemType.NOT_FOUND
        world.play("upload", who=[thief, *rest])
        world.play("confirm", "reveal")
        world.assert_published(world.members)

    def test_a_copied_body_is_no_second_vote_and_costs_the_cell(self, accused):
        """Who reads another's bytes can send them as its own; the masks give it away."""
        world = accused(6, up_to="upload")
        thief, victim, *rest = world.members
        victim.upload()
        thief.mask()
        thief.body = victim.body
        world.play("upload", who=[thief, *rest])
        world.play("confirm", "reveal")
        assert failed_cell(world, victim).reason is FailureReason.BAD_SUM

    def test_a_slow_loris_is_cut_off_and_the_cell_goes_on_without_it(
        self, accused, problem_of, monkeypatch
    ):
        world = accused(up_to="upload")
        attacker, *rest = world.members
        attacker.head()
        monkeypatch.setattr(edge, "_BODY_GRACE_S", 0.05)
        monkeypatch.setattr(edge, "_MIN_BODY_BYTES_PER_S", 1e9)
        path = f"{attacker.upload_path}/parts/0"
        for _ in range(3):  # its slots come free again each time
            status, body = send_slowly(world, attacker, path, first=attacker.body[:100])
            assert status == ProblemType.BUSY.status
            assert ProblemType.BUSY.urn in body
        monkeypatch.undo()
        world.play("upload", who=rest, late=True)
        world.play("confirm", "reveal", who=rest)
        world.assert_published(rest)

    def test_a_message_beyond_the_limit_is_refused_before_it_is_read(self, accused, problem_of):
        world = accused()
        attacker = world.members[0]
        name = b64u_encode(bytes(32))
        for what in ("shares", "complaints", "uploads", "confirm", "reveal"):
            path = f"{world.case.prefix}/cells/{name}/{what}"
            response = attacker.http.request("POST", path, b" " * (64 * 1024 + 1))
            assert problem_of(response) is ProblemType.TOO_LARGE


def send_slowly(world: Any, attacker: Any, path: str, *, first: bytes) -> tuple[int, str]:
    """PUT a body of which the first bytes come, and then nothing more."""
    headers = sign_request(
        attacker.http.signer,
        method="PUT",
        url="http://testserver" + path,
        body=attacker.body,
        created=int(world.case.clock.now()),
        nonce=secrets.token_bytes(NONCE_BYTES),
    )
    headers["content-length"] = str(len(attacker.body))
    chunks, sent = [first], []

    async def receive() -> dict[str, Any]:
        if chunks:
            return {"type": "http.request", "body": chunks.pop(), "more_body": True}
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "PUT",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": ("testclient", 1),
        "server": ("testserver", 80),
    }
    asyncio.run(world.case.client.app(scope, receive, send))
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]).decode()


class TestReplay:
    def test_messages_of_an_earlier_cell_do_nothing_in_a_later_one(self, accused, problem_of):
        world = accused(7, up_to="upload")
        attacker = world.members[0]
        there = world.members[:4]
        world.play("upload", who=there, late=True)
        old = attacker.secagg.state
        for member in world.members:
            member.try_again(FailureReason.TOO_FEW_UPLOADED)
        world.play("ready")
        new = attacker.told(RosterNews).roster.body.transcript()
        assert new != old.roster.body.transcript()
        response = attacker.to_cell("shares", old.shares, new)
        assert problem_of(response) is ProblemType.BAD_MESSAGE
        response = attacker.to_cell("shares", old.shares, old.roster.body.transcript())
        assert response.status_code == 200  # the stored answer
        world.play("share")
        response = attacker.to_cell("uploads", old.upload, new)
        assert problem_of(response) is ProblemType.BAD_REQUEST
        response = attacker.to_cell("uploads", old.upload, old.roster.body.transcript())
        assert problem_of(response) is ProblemType.STAGE_CLOSED
        world.play("upload", "confirm", "reveal")
        world.assert_published(world.members)

    def test_a_ready_of_a_failed_cell_is_in_no_other_one(self, accused):
        world = accused(7)
        old = world.members[0].secagg.state.ready
        world.play("share", who=world.members[:3], late=True)
        attacker, *rest = world.members
        for member in rest:
            member.try_again(FailureReason.TOO_FEW_SHARED)
        assert attacker.post("/readies", old).status_code == 200  # known; it changes nothing
        world.play("ready", who=rest)
        world.case.advance(STAGE_S)
        (_, second) = world.cells
        members = {member.agent for member in world.store.cells.members(second.transcript)}
        assert members == {member.identity for member in rest}
        world.play(*STAGES, who=rest)
        world.assert_published(rest)

    def test_a_message_sent_by_another_member_is_refused(self, accused, problem_of):
        world = accused(up_to="upload")
        thief, victim, *rest = world.members
        response = thief.to_cell("shares", victim.secagg.state.shares)
        assert problem_of(response) is ProblemType.BAD_SIGNATURE
        world.play("upload")
        victim.confirm()
        response = thief.to_cell("confirm", victim.secagg.state.confirm)
        assert problem_of(response) is ProblemType.BAD_SIGNATURE
        world.play("confirm", who=[thief, *rest])
        victim.reveal()
        response = thief.to_cell("reveal", victim.secagg.state.reveal)
        assert problem_of(response) is ProblemType.BAD_SIGNATURE
        world.play("reveal")
        world.assert_published(world.members)


class TestStrangers:
    """An enrolled agent that is not a member of the cell: of another one, or of none."""

    @pytest.fixture
    def forged(self) -> Callable[[Any, Any, str], Any]:
        """A message of a kind by a stranger, as good as it can make it."""

        def make(stranger: Any, member: Any, what: str) -> Any:
            state, signer = member.secagg.state, stranger.http.signer
            if what == "confirm":
                return state.confirm.model_copy(update={"agent": stranger.identity})
            bodies = {
                "shares": (state.shares and state.shares.header.body, "shares"),
                "complaints": (None, "complaint"),
                "uploads": (state.upload and state.upload.body, "masked-upload"),
                "reveal": (state.reveal and state.reveal.body, "reveal"),
            }
            body, name = bodies[what]
            if what == "complaints":
                header = next(h for h in state.headers if h.body.agent != member.identity)
                body = Complaint(
                    transcript=member.secagg.transcript,
                    agent=stranger.identity,
                    dealer=header,
                    ciphertext=os.urandom(82),
                )
            else:
                body = body.model_copy(update={"agent": stranger.identity})
            signed = sign(signer, name, body).signed
            if what == "shares":
                return Shares(header=signed, ciphertexts=state.shares.ciphertexts)
            return signed

        return make

    def test_nothing_of_a_stranger_is_taken_in_any_stage(self, accused, forged, problem_of):
        world = accused(12, cell_target=6)
        first, second = world.by_cell()
        stranger, member = second[0], first[0]
        refused = {ProblemType.BAD_MESSAGE, ProblemType.STAGE_CLOSED}

        def try_all(*kinds: str) -> None:
            for what in kinds:
                message = forged(stranger, member, what)
                response = stranger.to_cell(what, message, member.secagg.transcript)
                assert problem_of(response) in refused, what

        others = first[1:]
        member.share()
        try_all("shares")
        world.play("share", who=others)
        member.mask()
        member.head()
        try_all("shares", "complaints", "uploads")
        world.play("upload", who=first)
        member.confirm()
        try_all("shares", "complaints", "uploads", "confirm")
        world.play("confirm", who=others)
        member.reveal()
        try_all("shares", "complaints", "uploads", "confirm", "reveal")
        world.play("reveal", who=others)
        world.play(*STAGES, who=second)
        world.assert_published(world.members, n_cells=2)

    def test_a_cell_that_does_not_exist_takes_nothing(self, accused, problem_of):
        world = accused(up_to="upload")
        member = world.members[0]
        response = member.to_cell("shares", member.secagg.state.shares, os.urandom(32))
        assert problem_of(response) is ProblemType.NOT_FOUND
        for name in ("short", "A" * 43, "A" * 42 + "B", "A" * 44):  # B: stray low bits
            path = f"{world.case.prefix}/cells/{name}/shares"
            response = member.http.request("POST", path, member.secagg.state.shares.canonical())
            assert problem_of(response) is ProblemType.NOT_FOUND, name

    @pytest.mark.parametrize(
        ("what", "before"), [("complaints", "share"), ("confirm", "upload"), ("reveal", "confirm")]
    )
    def test_a_forged_message_that_races_with_the_end_of_a_stage_is_refused(
        self, accused, forged, monkeypatch, what, before
    ):
        """It is sent a moment too early, so that it is journalled when its stage has begun.

        What is journalled is trusted from then on: an unchecked message of a stranger ends the
        round, or counts as a survivor's word.
        """
        world = accused(12, cell_target=6)
        first, second = world.by_cell()
        stranger, member, *rest = second[0], *first
        world.play(*STAGES[: STAGES.index(before)], who=first)
        for one in first:
            getattr(one, before)()
        state = member.secagg.state
        self.look_ahead(member, what)
        message = forged(stranger, member, what)
        member.secagg.state = state
        cells = world.store.cells
        real = cells.add_message

        def add_message(*args: Any, **options: Any) -> None:
            monkeypatch.undo()
            world.case.advance()  # the clockwork moves the cell on just then
            real(*args, **options)

        monkeypatch.setattr(cells, "add_message", add_message)
        response = stranger.to_cell(what, message, member.secagg.transcript)
        monkeypatch.undo()
        assert response.status_code != 200, response.text
        journalled = {found.agent for found in cells.messages(member.secagg.transcript)}
        assert stranger.identity not in journalled
        left = STAGES[STAGES.index(before) + 1 :]
        # One of the survivors does not reveal, so shares of its seed are needed.
        for stage in left:
            world.play(stage, who=[member, *rest][: -1 if stage == "reveal" else None])
        world.play(*STAGES, who=second)
        world.assert_published(world.members, n_cells=2)

    @staticmethod
    def look_ahead(member: Any, what: str) -> None:
        """Give a member's state what the forger copies; it changes nothing at the server."""
        state = member.secagg.state
        if what == "complaints":
            header = state.shares.header
            other = header.body.model_copy(update={"agent": os.urandom(32)})
            forged = header.model_copy(update={"body": other})
            member.secagg.state = state.model_copy(update={"headers": (forged,)})
        elif what == "confirm":
            word = Confirm(
                transcript=member.secagg.transcript, agent=member.identity, signature=bytes(64)
            )
            member.secagg.state = state.model_copy(update={"confirm": word})
        else:
            body = Reveal(
                transcript=member.secagg.transcript,
                agent=member.identity,
                self_seed=bytes(32),
                self_shares=(),
                mask_shares=(),
            )
            signed = sign(member.http.signer, "reveal", body).signed
            member.secagg.state = state.model_copy(update={"reveal": signed})


class TestOwnChecks:
    """What an honest member refuses when the attacker is helped by the server."""

    def test_a_member_shows_nothing_to_a_cell_smaller_than_its_owner_accepts(self, accused):
        world = accused(6)
        member = world.members[0]
        news = member.told(RosterNews)
        strict = member.policy.__class__(
            **{**vars(member.policy), "min_members": 7},
        )
        agent = member.secagg.__class__(member.http.signer, strict, member.secagg.state)
        with pytest.raises(CheckError, match="small-cell"):
            agent.receive_roster(news.ready_list, news.roster)

    def test_a_bundle_in_which_a_ciphertext_was_changed_is_refused(self, accused):
        world = accused(up_to="upload")
        member = world.members[0]
        bundle = member.told(BundleNews).bundle
        changed = (os.urandom(82), *bundle.ciphertexts[1:])
        with pytest.raises(CheckError, match="not the one that was signed"):
            member.secagg.receive_bundle(bundle.model_copy(update={"ciphertexts": changed}))
        assert member.secagg.state.phase is AgentPhase.SHARED
        world.play("upload", "confirm", "reveal")
        world.assert_published(world.members)


def test_a_header_masked_for_other_members_is_refused(accused, problem_of):
    world = accused(up_to="upload")
    attacker = world.members[0]
    attacker.mask()
    header = MaskedHeader(
        transcript=attacker.secagg.transcript,
        bundle=os.urandom(32),
        agent=attacker.identity,
        body_sha256=sha256(attacker.body),
        body_n_bytes=len(attacker.body),
    )
    signed = sign(attacker.http.signer, "masked-upload", header).signed
    assert problem_of(attacker.to_cell("uploads", signed)) is ProblemType.BAD_MESSAGE
    assert world.cell.phase is CellPhase.UPLOADING

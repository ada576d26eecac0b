"""Masked rounds over the real application, with members that are real `SecAggAgent`s.

Every row of PROTOCOL's failure table, restarts between any two requests, second tries of failed
cells, and what is left on disk afterwards.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pytest

from aggregator_server.blobs import FolderBlobs
from aggregator_server.config import Retention, ServerConfig
from aggregator_server.errors import BlobError, ConfigError
from aggregator_server.founding import BASE_NAME, load_base
from aggregator_server.masking import cells as cells_module
from aggregator_server.masking.vectors import SUMS
from aggregator_server.recipes import Masking, RecipeOptions, make_config
from aggregator_server.store.rows import MaskedCellRow
from aggregator_server.uploads import UPLOADS
from privacy.fixed_point import N_TAIL_WORDS, EncodingPlan, encode, with_checks
from privacy.masking import MaskAdder, Words
from privacy.noise import SecureStream
from privacy.secagg import cells as draw
from privacy.secagg.agent import SecAggAgent
from privacy.secagg.checks import CellPolicy, check_roster
from privacy.secagg.derive import public_key_of, survivors_hash
from protocol.blocks import Factor, FilterRule, LoraBlock, LoraRule
from protocol.chain import RoundManifest
from protocol.limits import MAX_READY_ATTEMPTS, MIN_CELL, PART_BYTES
from protocol.masked import (
    BundleNews,
    CellNews,
    ConfirmedNews,
    EndedNews,
    FailedNews,
    FailureReason,
    NoNews,
    Ready,
    ReadyList,
    Roster,
    RosterNews,
    Shares,
    SurvivorsNews,
)
from protocol.messages import Credential, UploadState, UploadStatus
from protocol.phases import AgentPhase, CellPhase, RoundPhase
from protocol.problems import ProblemType
from protocol.signing import Signed, Signer, sign
from protocol.wire import b64u_encode, parse, sha256
from quant.adapter import adapter_shapes, factor_of, flatten, sent_layout
from quant.mixed_ranks import own_lora, pad, participation

NewsT = TypeVar("NewsT")
STAGE_S = 90.0
MIXED = {"min_rank": 2, "optional_modules": ("v_proj",)}
STAGES = ("share", "upload", "confirm", "reveal")


class Member:
    """An honest member: `SecAggAgent` over the HTTP of a `FakeAgent`, with an update of its own."""

    def __init__(self, http: Any, manifest: RoundManifest, *, weight: int, seed: int) -> None:
        self.http, self.manifest, self.weight = http, manifest, weight
        self.credential = parse(Signed[Credential], http.enrol().content)
        values = np.random.default_rng(seed).uniform(-1, 1, self.plan.layout.tensors.n_values)
        self.trained, said = self.part(seed)
        vector = (values * self.masking.max_change * self.trained).astype(np.float32)
        self.payload = encode(
            vector,
            weight=weight,
            plan=self.plan,
            stream=SecureStream(),
            participation=said,
        )
        self.begin()

    def part(self, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Which values it trains, by its seed where the federation allows parts of one's own."""
        lora, whole = self.case.manifest.lora, self.plan.layout.tensors
        if not lora.is_mixed:
            return np.ones(whole.n_values, np.bool_), None
        left_out = lora.optional_modules if seed % 2 else ()
        own = own_lora(lora, rank=(2, 4, 8)[seed % 3], left_out=left_out)
        base = load_base(self.case.directory / BASE_NAME)
        small = sent_layout(adapter_shapes(base, own), lora.sent)
        trained = pad(np.ones(small.n_values, np.float32), small, whole) > 0.0
        return trained, participation(small, whole)

    @property
    def case(self) -> Any:
        return self.http.case

    @property
    def identity(self) -> bytes:
        return self.http.identity

    @property
    def masking(self) -> Any:
        return self.case.manifest.masking

    @property
    def plan(self) -> EncodingPlan:
        return self.case.federation.charter.turns.plan_at(self.manifest.release)

    @property
    def policy(self) -> CellPolicy:
        return CellPolicy(
            federation=self.case.manifest.federation,
            round=self.manifest.round,
            round_digest=self.manifest.digest(),
            server=self.case.manifest.server,
            registrar=self.case.manifest.registrar,
            masking=self.masking,
            body_n_bytes=self.plan.n_bytes,
            min_members=self.masking.min_cell,
        )

    def begin(self, *, attempt: int = 1, tried_again: bool = False) -> None:
        self.body = b""
        self.secagg = SecAggAgent.begin(
            self.http.signer,
            self.policy,
            credential=self.credential,
            attempt=attempt,
            expires_at=math.ceil(self.manifest.cap_at),
            tried_again=tried_again,
        )

    def post(self, path: str, message: Any) -> Any:
        return self.http.request("POST", f"{self.case.prefix}{path}", message.canonical())

    def to_cell(self, what: str, message: Any, transcript: bytes | None = None) -> Any:
        name = b64u_encode(transcript or self.secagg.transcript)
        return self.post(f"/cells/{name}/{what}", message)

    def news(self, phase: AgentPhase | None = None) -> Any:
        ready, shown = self.secagg.state.ready.body, phase or self.secagg.state.phase
        path = f"/cells/{ready.round}/{ready.attempt}?phase={shown.value}"
        response = self.http.request("GET", self.case.prefix + path)
        assert response.status_code == 200, response.text
        return parse(CellNews, response.content).news

    def told(self, kind: type[NewsT], phase: AgentPhase | None = None) -> NewsT:
        news = self.news(phase)
        assert isinstance(news, kind), news
        return news

    # The messages, in order; each answers with the response to it

    def ready(self, **changes: Any) -> Any:
        """READY, with other fields than the agent would sign, if a test wants them."""
        body = self.secagg.state.ready.body.model_copy(update=changes)
        return self.post("/readies", sign(self.http.signer, "ready", body).signed)

    def share(self) -> Any:
        news = self.told(RosterNews)
        return self.to_cell("shares", self.secagg.receive_roster(news.ready_list, news.roster))

    def mask(self) -> bytes:
        if not self.body:
            plan = self.secagg.receive_bundle(self.told(BundleNews).bundle)
            words = with_checks(self.payload, plan.checks, self.plan, 0, self.plan.n_words)
            MaskAdder(plan.masks, word_bits=self.plan.word_bits).add(words)
            self.body = words.tobytes()
        return self.body

    def head(self) -> Any:
        return self.to_cell("uploads", self.secagg.sign_upload(sha256(self.mask())))

    @property
    def upload_path(self) -> str:
        ready = self.secagg.state.ready.body
        return f"{self.case.prefix}/uploads/{ready.round}/{ready.attempt}"

    def put(self, n: int = 0) -> Any:
        part = self.body[n * PART_BYTES : (n + 1) * PART_BYTES]
        return self.http.request("PUT", f"{self.upload_path}/parts/{n}", part)

    def complete(self) -> Any:
        response = self.http.request("POST", f"{self.upload_path}/complete")
        if response.status_code == 200:
            self.secagg.uploaded()
        return response

    def upload(self) -> Any:
        assert self.head().status_code == 200
        for n in range(-(-len(self.body) // PART_BYTES)):
            assert self.put(n).status_code == 200
        return self.complete()

    def confirm(self) -> Any:
        survivors = self.told(SurvivorsNews).survivors
        return self.to_cell("confirm", self.secagg.receive_survivors(survivors))

    def reveal(self) -> Any:
        confirmed = self.told(ConfirmedNews).confirmed
        return self.to_cell("reveal", self.secagg.receive_confirmed(confirmed))

    def complain(self) -> list[Any]:
        return [self.to_cell("complaints", found) for found in self.secagg.state.complaints]

    def try_again(self, reason: FailureReason) -> None:
        """As an honest agent does after a failed cell: fresh keys, the same encoded update."""
        failed = self.told(FailedNews).failed
        assert failed.body.reason is reason
        assert failed.body.may_retry
        assert self.secagg.receive_failed(failed)
        state = self.secagg.state
        self.begin(attempt=state.ready.body.attempt + 1, tried_again=state.upload is not None)


@dataclass
class Gathered:
    """A masked round under test with its members."""

    case: Any
    manifest: RoundManifest
    members: list[Member]

    @property
    def store(self) -> Any:
        return self.case.federation._store

    @property
    def cells(self) -> tuple[MaskedCellRow, ...]:
        return self.store.cells.of_round(self.manifest.round)

    @property
    def cell(self) -> MaskedCellRow:
        (cell,) = self.cells
        return cell

    @property
    def phase(self) -> RoundPhase:
        return self.store.rounds.get(self.manifest.round).phase

    @property
    def failure(self) -> str | None:
        return self.store.rounds.get(self.manifest.round).failure

    def by_cell(self) -> list[list[Member]]:
        """The members of each cell, in the order of `cells`."""
        found: dict[bytes, list[Member]] = defaultdict(list)
        for member in self.members:
            attempt = member.secagg.state.ready.body.attempt
            row = self.store.cells.of_attempt(self.manifest.round, member.identity, attempt)
            found[row.transcript].append(member)
        return [found[cell.transcript] for cell in self.cells]

    def play(self, *stages: str, who: Iterable[Member] | None = None, late: bool = False) -> None:
        """Let members send the messages of some stages; `late`: each ends by its deadline."""
        for stage in stages:
            for member in self.members if who is None else who:
                response = getattr(member, stage)()
                assert response.status_code == 200, response.text
            self.case.advance(STAGE_S + 1 if late else 0.0)

    def mean(self, members: Sequence[Member]) -> np.ndarray:
        """Σ w·x / Σ w of what the members' words stand for."""
        plan = members[0].plan
        signed = np.int16 if plan.word_bits == 16 else np.int32
        n_values = plan.layout.tensors.n_values
        total = np.zeros(n_values, np.int64)
        for member in members:
            total += member.payload[:n_values].view(signed)
        steps = np.empty(n_values)
        for slot, where in plan.layout.tensors.slices():
            steps[where] = slot.step
        weights = sum(member.weight * member.trained for member in members)
        return np.divide(
            total * steps * plan.max_weight, weights, out=np.zeros(n_values), where=weights > 0
        )

    def assert_published(self, members: Sequence[Member], *, n_cells: int = 1) -> None:
        """The round's release moved by the mean of these members, to a fraction of a step.

        With parts of one's own, each value by the mean of those who trained it.
        """
        assert self.phase is RoundPhase.PUBLISHED, self.failure
        releases = self.case.federation.releases
        release = next(
            found
            for number in range(1, releases.newest().number + 1)
            if (found := releases.get(number)).round == self.manifest.round
        )
        assert (release.aggregation.n_cells, release.aggregation.n_agents) == (
            n_cells,
            len(members),
        )
        plan = members[0].plan
        before, after = (
            flatten(releases.arrays(releases.get(number)), plan.layout.tensors).astype(np.float64)
            for number in (release.number - 1, release.number)
        )
        one = plan.layout.slots[0].step * plan.max_weight / sum(m.weight for m in members)
        np.testing.assert_allclose(after - before, self.mean(members), rtol=1e-6, atol=0.1 * one)


@pytest.fixture
def gather(make_case, start_round) -> Callable[..., Gathered]:
    """A federation that masks, with an open round of `n` members; `ready`: cells are formed."""

    def make(
        n: int = 6,
        *,
        ready: bool = True,
        weights: Sequence[int] | None = None,
        masking: dict[str, Any] | None = None,
        rounds: dict[str, Any] | None = None,
        lora: dict[str, Any] | None = None,
        retention: Retention = Retention.DELETE,
        **options: Any,
    ) -> Gathered:
        def edit(config: ServerConfig) -> ServerConfig:
            blocks = {
                "lora": LoraBlock(**{**config.lora.model_dump(), **(lora or {})}),
                "masking": config.masking.model_copy(update=masking or {}),
                "rounds": config.rounds.model_copy(update=rounds or {}),
                "server": config.server.model_copy(update={"retention": retention}),
            }
            return config.model_copy(update=blocks)

        settings = {"masking": Masking.CELLS, "cohort_target": n, **options}
        case = make_case(edit=edit, **settings)
        agents, manifest = start_round(case, n)
        assert len(agents) == n
        found = [
            Member(agent, manifest, weight=weights[i] if weights else 5 * i + 3, seed=i)
            for i, agent in enumerate(agents)
        ]
        world = Gathered(case, manifest, found)
        if ready:
            world.play("ready")
            assert world.phase is RoundPhase.GATHERING
        return world

    return make


@pytest.fixture
def on_disk(blob_files) -> Callable[[Gathered, str], set[str]]:
    def names(world: Gathered, folder: str) -> set[str]:
        return {name for name in blob_files(world.case) if name.startswith(f"{folder}/")}

    return names


def garbled(member: Member, shares: Shares, *, for_places: Iterable[int]) -> Shares:
    """A dealer's SHARES with ciphertexts that do not open, signed by it all the same."""
    ciphertexts = list(shares.ciphertexts)
    for place in for_places:
        ciphertexts[place] = os.urandom(82)
    digests = tuple(sha256(ciphertext) for ciphertext in ciphertexts)
    header = shares.header.body.model_copy(update={"ciphertexts": digests})
    signed = sign(member.http.signer, "shares", header).signed
    return Shares(header=signed, ciphertexts=tuple(ciphertexts))


def share_badly(member: Member, *, for_places: Iterable[int]) -> Any:
    """As `Member.share`, but some receivers cannot open what they are given."""
    news = member.told(RosterNews)
    shares = member.secagg.receive_roster(news.ready_list, news.roster)
    shares = garbled(member, shares, for_places=for_places)
    member.secagg.state = member.secagg.state.model_copy(update={"shares": shares})
    return member.to_cell("shares", shares)


def gather_the_rest(world: Gathered, rest: Sequence[Member]) -> None:
    """READY from all but those who have sent theirs; cells by the deadline at the latest."""
    world.play("ready", who=rest)
    if world.phase is RoundPhase.OPEN:
        world.case.clock.time = world.manifest.deadline_at
        for member in rest:
            member.news()
        world.case.advance()
    assert world.phase is RoundPhase.GATHERING


class TestOfWhichNobodyIsLost:
    @pytest.mark.parametrize("word_bits", [16, 32])
    def test_a_round_publishes_the_exact_weighted_mean(self, gather, word_bits):
        world = gather(6, weights=[1, 256, 7, 100, 31, 2], word_bits=word_bits)
        assert world.members[0].plan.word_bits == word_bits
        world.play(*STAGES)
        world.assert_published(world.members)

    @pytest.mark.parametrize("word_bits", [16, 32])
    def test_the_sum_is_that_of_the_members_words_bit_for_bit(self, gather, monkeypatch, word_bits):
        sums: list[Words] = []
        real = cells_module.put_sum

        def put_sum(blobs: object, transcript: bytes, payload: Words) -> bytes:
            sums.append(payload)
            return real(blobs, transcript, payload)

        monkeypatch.setattr(cells_module, "put_sum", put_sum)
        world = gather(7, word_bits=word_bits)
        world.play(*STAGES)
        expected = sum(member.payload for member in world.members).astype(sums[0].dtype)
        (found,) = sums
        np.testing.assert_array_equal(found, expected)
        (row,) = world.store.uploads.cells(1)
        assert row.weight_sum == sum(member.weight for member in world.members)

    def test_updates_of_several_parts_are_summed(self, gather, make_base_of):
        world = gather(5, base=make_base_of(size=40_000), rank=16, n_rounds=1)
        assert world.members[0].plan.n_bytes > PART_BYTES
        world.play(*STAGES)
        world.assert_published(world.members)

    def test_the_release_names_the_cell_and_its_survivors(self, gather):
        world = gather(6)
        world.play("share", "upload")
        entries = world.members[0].told(SurvivorsNews).survivors.entries()
        world.play("confirm", "reveal")
        release = world.case.federation.releases.newest()
        (cell,) = release.accepted
        assert cell.transcript == world.members[0].secagg.transcript == world.cell.transcript
        assert cell.members == survivors_hash(entries)
        assert release.rejected == ()

    def test_cells_work_at_the_same_time_and_all_are_in_the_release(self, gather):
        world = gather(12, cell_target=5)
        first, second = world.by_cell()
        assert {len(first), len(second)} == {6}
        # One cell is done before the other has begun.
        world.play(*STAGES, who=first)
        assert world.phase is RoundPhase.GATHERING
        assert first[0].told(EndedNews, AgentPhase.CONFIRMED).counted
        world.play(*STAGES, who=second)
        world.assert_published(world.members, n_cells=2)

    def test_a_filter_that_sees_fewer_than_four_cells_averages_them(self, gather):
        world = gather(12, cell_target=5, filter=FilterRule.ROBUST)
        for cell in world.by_cell():
            world.play(*STAGES, who=cell)
        world.assert_published(world.members, n_cells=2)

    def test_a_filter_works_on_the_means_of_masked_cells(self, gather):
        """Four cells: their geometric median, and one that is all wrong moves it little."""
        world = gather(20, cell_target=5, filter=FilterRule.ROBUST)
        cells = world.by_cell()
        assert [len(cell) for cell in cells] == [5] * 4
        n_values = world.members[0].plan.layout.n_values
        right = np.random.default_rng(1).uniform(-1, 1, n_values).astype(np.float32)
        for number, cell in enumerate(cells):
            for member in cell:
                vector = (-3.0 if number == 0 else 1.0) * 0.3 * member.masking.max_change * right
                member.payload = encode(
                    vector, weight=member.weight, plan=member.plan, stream=SecureStream()
                )
            world.play(*STAGES, who=cell)
        releases = world.case.federation.releases
        before, after = (releases.get(number) for number in (0, 1))
        assert (after.filter.rule, after.filter.n_cells) == (FilterRule.ROBUST, 4)
        assert (after.filter.n_rejected, after.aggregation.n_agents) == (0, 20)
        moved = np.float64(releases.vector(after)) - releases.vector(before)
        wanted = 0.3 * world.members[0].masking.max_change * right
        plain = wanted * (3 - 3.0) / 4  # of equal weights
        error = np.linalg.norm(moved - wanted) / np.linalg.norm(wanted)
        assert error < 0.5 * np.linalg.norm(plain - wanted) / np.linalg.norm(wanted)

    def test_under_rolora_the_masked_factors_take_turns(self, gather, make_base_of):
        """Their sizes differ, so each round has a plan of its own, also after a restart."""
        world = gather(5, n_rounds=3, lora_rule=LoraRule.ROLORA, base=make_base_of(d_in=48))
        world.play(*STAGES)
        world.assert_published(world.members)
        assert {factor_of(slot.name) for slot in world.members[0].plan.layout.slots} == {Factor.B}
        following = world.members[0].http.round()
        again = [
            Member(member.http, following, weight=member.weight, seed=100 + i)
            for i, member in enumerate(world.members)
        ]
        second = Gathered(world.case, following, again)
        assert following.update_n_bytes == again[0].plan.n_bytes
        assert again[0].plan.n_bytes != world.members[0].plan.n_bytes
        second.play("ready", "share", "upload")
        world.case.restart()
        second.play("confirm", "reveal")
        second.assert_published(again)
        assert {factor_of(slot.name) for slot in again[0].plan.layout.slots} == {Factor.A}

    @pytest.mark.parametrize(("word_bits", "n", "n_cells"), [(16, 12, 2), (32, 6, 1)])
    def test_a_masked_round_of_mixed_ranks_is_exact(self, gather, word_bits, n, n_cells):
        """Ranks 2, 4 and 8, of which half leave a module out."""
        world = gather(n, cell_target=5, rank=8, lora=MIXED, word_bits=word_bits)
        trained = np.stack([member.trained for member in world.members])
        assert len({tuple(row) for row in trained}) == 6
        for cell in world.by_cell():
            world.play(*STAGES, who=cell)
        assert {len(member.body) for member in world.members} == {world.manifest.update_n_bytes}
        world.assert_published(world.members, n_cells=n_cells)

    @pytest.mark.parametrize("lie", [-10_000, 10_000])
    def test_a_cell_whose_participation_is_out_of_range_does_not_count(self, gather, lie):
        world = gather(12, cell_target=5, rank=8, lora=MIXED)
        first, second = world.by_cell()
        payload = first[0].payload
        payload[-N_TAIL_WORDS - 1] = np.int64(lie).astype(payload.dtype)
        for cell in (first, second):
            world.play(*STAGES, who=cell)
        release = world.case.federation.releases.get(1)
        assert (release.filter.n_cells, release.filter.n_rejected) == (2, 1)
        assert len(release.rejected) == 1
        world.assert_published(second)

    def test_the_next_round_begins_with_nothing_of_the_last_one(self, gather):
        world = gather(5, n_rounds=2)
        world.play(*STAGES)
        following = world.members[0].http.round()
        assert following.round == 2
        again = [
            Member(member.http, following, weight=member.weight, seed=100 + i)
            for i, member in enumerate(world.members)
        ]
        second = Gathered(world.case, following, again)
        second.play("ready", *STAGES)
        second.assert_published(again)
        world.assert_published(world.members)
        assert world.case.federation.status().finished

    def test_the_list_and_the_rosters_hold_under_the_checks_of_every_agent(self, gather):
        world = gather(17, cell_target=5)
        offers = {member.identity: member.told(RosterNews) for member in world.members}
        (listed,) = {offer.ready_list.canonical() for offer in offers.values()}
        ready_list = parse(Signed[ReadyList], listed)
        for member in world.members:
            check_roster(
                ready_list,
                offers[member.identity].roster,
                policy=member.policy,
                ready=member.secagg.state.ready,
            )
        rosters = {offer.roster.body.cell: offer.roster.body for offer in offers.values()}
        drawn = draw.assign(ready_list.body, world.case.manifest.masking.cell_target)
        assert [len(cell) for cell in drawn] == [6, 6, 5]
        assert [rosters[number].identities() for number in range(3)] == list(drawn)
        everyone = [identity for cell in drawn for identity in cell]
        assert sorted(everyone) == sorted(member.identity for member in world.members)

    def test_the_status_counts_and_names_nobody(self, gather):
        world = gather(6, ready=False)

        def status() -> tuple[Any, ...]:
            found = world.case.federation.status().round
            return (found.phase, found.n_ready, found.n_cells, found.n_uploads, found.n_uploading)

        for member in world.members[:2]:
            member.ready()
        assert status() == (RoundPhase.OPEN, 2, 0, 0, 0)
        world.play("ready")
        world.play("share")
        assert status() == (RoundPhase.GATHERING, 6, 1, 0, 0)
        world.members[0].upload()
        world.members[1].head()
        assert status() == (RoundPhase.GATHERING, 6, 1, 1, 1)
        n_bytes = world.members[0].plan.n_bytes
        assert world.case.federation.status().round.bytes_received == n_bytes
        assert world.case.federation.status().round.n_cells_failed == 0
        shown = world.case.client.get(f"{world.case.prefix}/status").text
        assert not any(b64u_encode(member.identity) in shown for member in world.members)

    def test_every_message_sent_again_gets_the_same_answer_and_changes_nothing(self, gather):
        world = gather(5, ready=False)

        def again(send: Callable[[], Any]) -> None:
            first, second = send(), send()
            assert first.status_code == second.status_code == 200, second.text
            assert first.content == second.content

        for stage, path in (("ready", ""), ("share", "shares"), ("upload", ""), ("confirm", "")):
            for member in world.members:
                if stage == "share":
                    member.share()
                    again(lambda m=member, p=path: m.to_cell(p, m.secagg.state.shares))
                elif stage == "confirm":
                    member.confirm()
                    again(lambda m=member: m.to_cell("confirm", m.secagg.state.confirm))
                else:
                    again(getattr(member, stage))
            world.case.advance()
        for member in world.members:
            member.reveal()
            again(lambda m=member: m.to_cell("reveal", m.secagg.state.reveal))
        world.case.advance()
        world.assert_published(world.members)
        # Also when the cell has gone on, and when the round is over.
        for member in world.members:
            state = member.secagg.state
            for what in ("shares", "confirm", "reveal"):
                assert member.to_cell(what, getattr(state, what)).status_code == 200


class TestWhoVanishes:
    """PROTOCOL, "States": the failure table. In a cell of 6, t = 4: two may be lost."""

    def test_before_shares_nobody_masks_with_it(self, gather):
        world = gather(6)
        there = world.members[:4]
        world.play("share", who=there, late=True)
        assert world.members[5].told(EndedNews) == EndedNews(counted=False)
        world.play("upload", "confirm", "reveal", who=there)
        world.assert_published(there)

    def test_after_shares_its_masks_are_rebuilt(self, gather):
        world = gather(6)
        there = world.members[2:]
        world.play("share")
        world.play("upload", who=there, late=True)
        world.play("confirm", "reveal", who=there)
        world.assert_published(there)
        assert world.members[0].told(EndedNews, AgentPhase.UPLOADED) == EndedNews(counted=False)

    def test_after_upload_it_is_still_summed(self, gather):
        world = gather(6)
        there = world.members[1:5]
        world.play("share", "upload")
        world.play("confirm", "reveal", who=there)
        world.assert_published(world.members)

    def test_after_confirm_it_is_still_summed(self, gather):
        world = gather(6)
        world.play("share", "upload", "confirm")
        world.play("reveal", who=world.members[1:5])
        world.assert_published(world.members)
        assert world.members[0].told(EndedNews, AgentPhase.CONFIRMED).counted

    def test_one_at_each_stage_is_as_many_as_a_larger_cell_can_lose(self, gather):
        world = gather(10)  # t = 7
        one, two, three, *rest = world.members
        world.play("share", who=[two, three, *rest], late=True)
        world.play("upload", who=[three, *rest], late=True)
        world.play("confirm", "reveal", who=rest)
        assert one.told(EndedNews, AgentPhase.SHARED) == EndedNews(counted=False)
        world.assert_published([three, *rest])

    @pytest.mark.parametrize("stage", ["share", "upload"])
    def test_more_than_may_be_lost_fail_the_cell(self, gather, stage):
        world = gather(6)
        world.play(*STAGES[: STAGES.index(stage)])
        world.play(stage, who=world.members[:3], late=True)
        reason = {
            "share": FailureReason.TOO_FEW_SHARED,
            "upload": FailureReason.TOO_FEW_UPLOADED,
        }[stage]
        for member in world.members:
            failed = member.told(FailedNews).failed
            assert (failed.body.reason, failed.body.may_retry) == (reason, True)
            assert member.secagg.receive_failed(failed)
        assert world.case.federation.status().round.n_cells_failed == 1

    def test_too_few_confirmations_fail_the_cell(self, gather):
        world = gather(6)
        world.play("share", "upload")
        world.play("confirm", who=world.members[:3], late=True)
        failed = world.members[5].told(FailedNews).failed
        assert failed.body.reason is FailureReason.TOO_FEW_CONFIRMED
        assert world.members[5].secagg.receive_failed(failed)
        assert not world.members[0].secagg.receive_failed(failed)

    def test_too_few_reveals_lose_the_cell_without_another_try(self, gather):
        world = gather(6)
        world.play("share", "upload", "confirm")
        world.play("reveal", who=world.members[:3], late=True)
        assert world.cell.phase is CellPhase.REVEALING  # two stages long: nothing can be repeated
        world.case.advance(STAGE_S)
        failed = world.members[0].told(FailedNews).failed
        assert failed.body.reason is FailureReason.TOO_FEW_REVEALED
        assert not failed.body.may_retry
        assert world.failure == "no cell of the round gave a sum"


class TestStages:
    def test_a_stage_ends_at_once_when_everyone_has_come(self, gather):
        world = gather(6)
        for stage, following in (
            ("share", CellPhase.UPLOADING),
            ("upload", CellPhase.CONFIRMING),
            ("confirm", CellPhase.REVEALING),
            ("reveal", CellPhase.UNMASKED),
        ):
            world.play(stage)
            assert world.cell.phase is following

    @pytest.mark.parametrize("stage", ["share", "upload"])
    def test_a_stage_waits_for_everyone_until_its_deadline(self, gather, stage):
        world = gather(6, masking={"stage_s": 40.0})
        world.play(*STAGES[: STAGES.index(stage)])
        before = world.cell.phase
        world.play(stage, who=world.members[1:])
        world.case.advance(39.0)
        assert world.cell.phase is before
        world.case.advance(1.0)
        assert world.cell.phase is not before
        assert world.cell.phase is not CellPhase.FAILED

    def test_confirming_and_revealing_wait_for_t_members_only(self, gather):
        world = gather(6)
        world.play("share", "upload")
        world.play("confirm", who=world.members[:3])
        assert world.cell.phase is CellPhase.CONFIRMING
        world.play("confirm", who=world.members[3:4])
        assert world.cell.phase is CellPhase.REVEALING
        # A late word is still taken: its sender may reveal then.
        assert world.members[4].confirm().status_code == 200
        world.play("reveal", who=world.members[2:5])
        assert world.cell.phase is CellPhase.REVEALING
        world.play("reveal", who=world.members[1:2])
        world.assert_published(world.members)

    def test_each_stage_begins_when_the_last_one_ended(self, gather):
        world = gather(6)
        there = world.members[:5]
        for stage in STAGES[:2]:
            world.play(stage, who=there, late=True)
        world.case.advance(STAGE_S - 1)
        assert world.cell.phase is CellPhase.CONFIRMING
        world.play("confirm", "reveal", who=there)
        world.assert_published(there)

    def test_an_upload_that_moves_at_the_deadline_is_waited_for(self, gather):
        world = gather(6, rounds={"min_upload_bytes_per_s": 10.0})
        slow, *rest = world.members
        world.play("share")
        world.case.advance(STAGE_S - 5)
        assert slow.head().status_code == 200
        world.play("upload", who=rest)
        world.case.advance(100)
        assert world.cell.phase is CellPhase.UPLOADING
        assert slow.put().status_code == 200
        assert slow.complete().status_code == 200
        world.case.advance()
        world.play("confirm", "reveal")
        world.assert_published(world.members)

    @pytest.mark.parametrize("begun_before_deadline_s", [-1.0, 80.0])
    def test_an_upload_that_began_late_or_stands_still_is_not_waited_for(
        self, gather, begun_before_deadline_s
    ):
        world = gather(6, rounds={"min_upload_bytes_per_s": 1000.0})
        slow, *rest = world.members
        world.play("share")
        world.play("upload", who=rest)
        world.case.clock.time += STAGE_S - begun_before_deadline_s
        assert slow.head().status_code == 200
        world.case.advance(max(0.0, begun_before_deadline_s))
        assert world.cell.phase is CellPhase.CONFIRMING

    def test_no_upload_is_waited_for_beyond_the_cap(self, gather):
        world = gather(6, rounds={"min_upload_bytes_per_s": 10.0})
        slow, *rest = world.members
        longest_s = slow.plan.n_bytes / 10.0
        world.play("share")
        world.play("upload", who=rest)
        world.case.advance(STAGE_S - 0.5)
        slow.head()
        slow.put()  # all of it is there, and is never completed
        world.case.advance(longest_s - 1.0)
        assert world.cell.phase is CellPhase.UPLOADING
        world.case.advance(2.0)
        assert world.cell.phase is CellPhase.CONFIRMING
        world.play("confirm", "reveal", who=rest)
        world.assert_published(rest)


class TestLateUploads:
    def test_a_late_upload_is_refused_and_deleted_unread(
        self, gather, on_disk, problem_of, monkeypatch
    ):
        world = gather(6)
        late, *rest = world.members
        world.play("share")
        late.head()
        late.put()
        (name,) = on_disk(world, UPLOADS)
        read: list[str] = []
        real = FolderBlobs.read

        def noted(self: FolderBlobs, key: str) -> bytes:
            read.append(key)
            return real(self, key)

        monkeypatch.setattr(FolderBlobs, "read", noted)
        world.play("upload", who=rest, late=True)
        assert world.cell.phase is CellPhase.CONFIRMING
        for response in (late.put(), late.complete()):
            assert problem_of(response) is ProblemType.STAGE_CLOSED
        assert name not in on_disk(world, UPLOADS)
        world.play("confirm", "reveal", who=rest)
        world.assert_published(rest)
        assert name not in read
        assert late.told(EndedNews, AgentPhase.UPLOADED) == EndedNews(counted=False)

    def test_a_head_after_survivors_is_refused_and_stores_nothing(
        self, gather, on_disk, problem_of
    ):
        world = gather(6)
        late, *rest = world.members
        world.play("share")
        late.mask()
        world.play("upload", who=rest, late=True)
        before = on_disk(world, UPLOADS)
        assert problem_of(late.head()) is ProblemType.STAGE_CLOSED
        assert problem_of(late.put()) is ProblemType.NOT_FOUND
        assert problem_of(late.complete()) is ProblemType.NOT_FOUND
        assert on_disk(world, UPLOADS) == before

    def test_who_shared_too_late_is_refused_and_cannot_upload(self, gather, problem_of):
        world = gather(6)
        late, *rest = world.members
        news = late.told(RosterNews)
        shares = late.secagg.receive_roster(news.ready_list, news.roster)
        world.play("share", who=rest, late=True)
        assert problem_of(late.to_cell("shares", shares)) is ProblemType.STAGE_CLOSED
        assert late.told(EndedNews) == EndedNews(counted=False)
        world.play("upload", "confirm", "reveal", who=rest)
        world.assert_published(rest)

    def test_a_head_that_was_accepted_gets_its_stored_answer_once_the_cell_has_gone_on(
        self, gather
    ):
        # PROTOCOL, "Bytes": the same digest gets the stored answer. An agent that is killed just
        # after its upload was accepted comes back with this very message.
        world = gather(6)
        world.play("share", "upload")
        member = world.members[0]
        assert world.cell.phase is CellPhase.CONFIRMING
        response = member.to_cell("uploads", member.secagg.state.upload)
        assert response.status_code == 200, response.text
        assert parse(UploadStatus, response.content).state is UploadState.ACCEPTED


class TestWrongShares:
    def test_one_share_that_does_not_open_is_complained_of_and_the_cell_goes_on(self, gather):
        world = gather(6)
        dealer, *rest = world.members
        assert share_badly(dealer, for_places=[2]).status_code == 200
        world.play("share", who=rest)
        world.play("upload")
        (accuser,) = [member for member in world.members if member.secagg.state.complaints]
        assert accuser is not dealer
        world.play("confirm", "reveal")
        world.assert_published(world.members)

    def test_one_share_that_does_not_open_is_not_needed_when_its_dealer_vanishes(self, gather):
        world = gather(6)
        dealer, *rest = world.members
        share_badly(dealer, for_places=[2])
        world.play("share", who=rest)
        for member in rest:
            member.mask()
            assert all(response.status_code == 200 for response in member.complain())
        world.play("upload", who=rest, late=True)
        world.play("confirm", "reveal", who=rest)
        world.assert_published(rest)

    def test_a_dealer_that_too_few_can_open_fails_the_cell_and_is_named(self, gather):
        world = gather(6, masking={"colluders": 1})
        dealer, *rest = world.members
        share_badly(dealer, for_places=[0, 1])  # 3 of the 4 that are needed are left
        world.play("share", who=rest)
        for member in rest:
            member.mask()
            assert all(response.status_code == 200 for response in member.complain())
        world.case.advance()
        for member in rest:
            failed = member.told(FailedNews).failed.body
            assert (failed.reason, failed.blamed) == (
                FailureReason.BAD_SHARES,
                (dealer.identity,),
            )
            assert failed.may_retry
        # The others try again without it.
        for member in rest:
            member.try_again(FailureReason.BAD_SHARES)
        world.play("ready", *STAGES, who=rest)
        world.assert_published(rest)


class TestRestart:
    def test_a_restart_between_any_two_requests_leaves_the_same_round_and_the_same_sum(
        self, gather
    ):
        world = gather(6, ready=False)
        transcripts = set()
        world.case.restart()
        for stage in ("ready", *STAGES):
            for member in world.members:
                assert getattr(member, stage)().status_code == 200
                world.case.restart()
            world.case.advance()
            transcripts |= {cell.transcript for cell in world.cells}
            world.case.restart()
        assert len(transcripts) == 1
        world.assert_published(world.members)

    @pytest.mark.parametrize("stage", STAGES)
    def test_a_restart_with_half_of_a_stage_done_loses_nothing_that_was_acknowledged(
        self, gather, stage
    ):
        world = gather(6)
        world.play(*STAGES[: STAGES.index(stage)])
        for member in world.members[:3]:
            assert getattr(member, stage)().status_code == 200
        world.case.restart()
        world.play(stage, who=world.members[3:])
        world.play(*STAGES[STAGES.index(stage) + 1 :])
        world.assert_published(world.members)

    def test_a_restart_amid_an_upload_asks_for_the_missing_parts_only(self, gather, make_base_of):
        world = gather(5, base=make_base_of(size=40_000), rank=16, n_rounds=1)
        world.play("share")
        member, *rest = world.members
        member.head()
        member.put(1)
        world.case.restart()
        assert parse(UploadStatus, member.head().content).missing == (0,)
        assert member.put(0).status_code == 200
        assert member.complete().status_code == 200
        world.play("upload", who=rest)
        world.play("confirm", "reveal")
        world.assert_published(world.members)

    def test_a_restart_counts_a_stages_time_from_when_it_began(self, gather):
        world = gather(6)
        world.play("share", who=world.members[:4])
        world.case.advance(STAGE_S - 4)
        world.case.restart()
        world.case.advance()
        assert world.cell.phase is CellPhase.UPLOADING

    def test_a_restart_after_a_cell_failed_gives_the_same_signed_reason(self, gather):
        world = gather(6)
        world.play("share", who=world.members[:3], late=True)
        before = [member.told(FailedNews).canonical() for member in world.members]
        world.case.restart()
        world.case.advance()
        assert [member.told(FailedNews).canonical() for member in world.members] == before

    def test_a_restart_while_a_cell_unmasks_unmasks_it_again_to_the_same_sum(
        self, gather, monkeypatch
    ):
        world = gather(6)
        world.play("share", "upload", "confirm")

        class KilledError(BaseException):
            pass

        def killed(*_: object) -> None:
            raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(world.store.cells, "finish", killed)
            for member in world.members:
                member.reveal()
            with pytest.raises(KilledError):
                world.case.advance()
        world.case.restart()
        world.case.advance()
        world.assert_published(world.members)


class TestSeveralCells:
    def test_a_cell_that_is_lost_does_not_stop_the_round(self, gather):
        world = gather(12, cell_target=5)
        doomed, fine = world.by_cell()
        world.play("share")
        world.play("upload", "confirm", "reveal", who=fine)
        assert world.phase is RoundPhase.GATHERING
        world.case.advance(STAGE_S + 1)  # nobody of the other cell uploads
        assert doomed[0].told(FailedNews).failed.body.reason is FailureReason.TOO_FEW_UPLOADED
        world.case.advance(STAGE_S + 1)  # and nobody comes back
        world.assert_published(fine)
        assert world.case.federation.status().round.n_cells_failed == 1

    def test_the_sum_of_a_finished_cell_waits_for_the_second_try_of_another(self, gather):
        world = gather(12, cell_target=5)
        failing, fine = world.by_cell()
        world.play("share")
        world.play("upload", "confirm", "reveal", who=fine)
        world.case.advance(STAGE_S + 1)
        back = failing[:5]
        for member in back:
            member.try_again(FailureReason.TOO_FEW_UPLOADED)
        world.play("ready", who=back)
        world.case.advance(STAGE_S + 1)
        assert len(world.cells) == 3
        world.play(*STAGES, who=back)
        world.assert_published([*fine, *back], n_cells=2)

    def test_a_vector_that_changed_on_disk_costs_its_cell_and_not_the_round(self, gather, on_disk):
        world = gather(12, cell_target=5)
        damaged, fine = world.by_cell()
        world.play("share")
        world.play("upload", who=fine)
        before = on_disk(world, UPLOADS)
        world.play("upload", who=damaged)
        name = min(on_disk(world, UPLOADS) - before)
        path = world.case.directory / "blobs" / name
        path.write_bytes(bytes(path.stat().st_size))
        world.play("confirm", "reveal")
        world.assert_published(fine)

    def test_a_vector_that_cannot_be_read_now_is_read_later(self, gather, monkeypatch):
        world = gather(6)
        world.play("share", "upload", "confirm")
        with monkeypatch.context() as patch:

            def broken(self: FolderBlobs, key: str) -> bytes:
                msg = "the disk does not answer"
                raise BlobError(msg)

            patch.setattr(FolderBlobs, "read", broken)
            world.play("reveal")
            assert world.cell.phase is CellPhase.REVEALING
        world.case.advance()
        world.assert_published(world.members)


class TestSecondTry:
    def test_a_failed_cell_is_tried_again_with_fresh_keys_and_the_same_update(self, gather):
        world = gather(6)
        world.play("share")
        world.play("upload", who=world.members[:3], late=True)
        keys = {member.secagg.state.ready.body.masking_key for member in world.members}
        for member in world.members:
            member.try_again(FailureReason.TOO_FEW_UPLOADED)
        world.play("ready")
        first, second = world.cells
        assert (first.phase, first.retried) == (CellPhase.FAILED, True)
        assert (second.wave, second.phase) == (2, CellPhase.SHARING)
        roster = parse(Signed[Roster], second.roster).body
        assert not keys & {ready.body.masking_key for ready in roster.members}
        world.play(*STAGES)
        world.assert_published(world.members)

    def test_a_second_failure_is_the_last_one(self, gather, problem_of):
        world = gather(6)
        world.play("share", who=world.members[:3], late=True)
        for member in world.members:
            member.try_again(FailureReason.TOO_FEW_SHARED)
        world.play("ready")
        world.play("share", who=world.members[:3], late=True)
        for member in world.members:
            assert not member.told(FailedNews).failed.body.may_retry
        assert world.failure == "no cell of the round gave a sum"
        member.begin(attempt=3)
        assert problem_of(member.ready()) is ProblemType.ROUND_CLOSED

    def test_it_waits_for_all_members_and_goes_on_without_those_that_stay_away(self, gather):
        world = gather(7)
        world.play("share", who=world.members[:3], late=True)
        back = world.members[:5]
        for member in back:
            member.try_again(FailureReason.TOO_FEW_SHARED)
        world.play("ready", who=back)
        assert len(world.cells) == 1
        world.case.advance(STAGE_S)
        assert len(world.cells) == 2
        world.play(*STAGES, who=back)
        world.assert_published(back)

    def test_too_few_that_come_back_lose_the_cell(self, gather):
        world = gather(7)
        world.play("share", who=world.members[:3], late=True)
        back = world.members[:4]
        for member in back:
            member.try_again(FailureReason.TOO_FEW_SHARED)
        world.play("ready", who=back)
        assert back[0].told(NoNews)
        world.case.advance(STAGE_S)
        assert len(world.cells) == 1
        assert world.failure == "no cell of the round gave a sum"
        assert back[0].told(EndedNews) == EndedNews(counted=False)

    def test_who_confirmed_is_in_no_other_cell_of_the_round(self, gather, problem_of):
        world = gather(10)  # t = 7
        world.play("share", "upload")
        confirmed, rest = world.members[:4], world.members[4:]
        world.play("confirm", who=confirmed, late=True)
        for member in confirmed:
            failed = member.told(FailedNews).failed
            assert failed.body.reason is FailureReason.TOO_FEW_CONFIRMED
            assert not member.secagg.receive_failed(failed)
            member.begin(attempt=2)  # a dishonest one
            assert problem_of(member.ready()) is ProblemType.CONSUMED
        for member in rest:
            member.try_again(FailureReason.TOO_FEW_CONFIRMED)
        world.play("ready", *STAGES, who=rest)
        world.assert_published(rest)

    def test_too_few_that_may_try_again_lose_the_cell_at_once(self, gather):
        world = gather(6)
        world.play("share", "upload")
        world.play("confirm", who=world.members[:3], late=True)
        assert world.cell.retried
        assert world.failure == "no cell of the round gave a sum"

    def test_one_whose_second_try_was_uploaded_may_not_try_a_third_time(self, gather):
        world = gather(6)
        world.play("share")
        world.play("upload", who=world.members[:3], late=True)
        for member in world.members:
            member.try_again(FailureReason.TOO_FEW_UPLOADED)
        world.play("ready", "share")
        world.play("upload", who=world.members[:3], late=True)
        failed = [member.told(FailedNews).failed for member in world.members]
        allowed = [
            member.secagg.receive_failed(found)
            for member, found in zip(world.members, failed, strict=True)
        ]
        assert allowed == [False] * 3 + [True] * 3
        assert not any(found.body.may_retry for found in failed)

    def test_a_member_of_a_cell_at_work_gets_no_second_one(self, gather, problem_of):
        world = gather(6)
        member = world.members[0]
        member.begin(attempt=2)
        assert problem_of(member.ready()) is ProblemType.ROUND_CLOSED
        assert member.told(EndedNews) == EndedNews(counted=False)

    def test_a_newer_ready_of_a_member_postpones_the_second_try_and_is_the_one_used(self, gather):
        world = gather(5)
        world.play("share", who=world.members[:3], late=True)
        for member in world.members:
            member.try_again(FailureReason.TOO_FEW_SHARED)
            assert member.ready().status_code == 200
        fickle = world.members[0]
        fickle.begin(attempt=3)
        world.play("ready", who=[fickle])
        world.play(*STAGES)
        world.assert_published(world.members)

    def test_a_vector_of_a_failed_cell_is_deleted_and_never_unmasked(
        self, gather, on_disk, problem_of, monkeypatch
    ):
        world = gather(6)
        world.play("share", "upload")
        world.play("confirm", who=world.members[:3])
        assert len(on_disk(world, UPLOADS)) == 6
        world.case.advance(STAGE_S + 1)
        assert on_disk(world, UPLOADS) == set()

        def unmask(*_: object, **__: object) -> None:
            pytest.fail("a failed cell was unmasked")

        monkeypatch.setattr(world.case.federation.unmasker, "unmask", unmask)
        for member in world.members[3:]:
            assert member.told(FailedNews, AgentPhase.UPLOADED)
        for member in world.members[:3]:
            response = member.to_cell("confirm", member.secagg.state.confirm)
            assert response.status_code == 200  # the stored answer, which changes nothing
        world.case.advance()
        assert world.cell.phase is CellPhase.FAILED


class TestReady:
    """What a READY is refused for, by type."""

    @pytest.fixture
    def opened(self, gather) -> Gathered:
        return gather(6, ready=False)

    @pytest.mark.parametrize("field", ["sealing_key", "masking_key"])
    def test_a_key_that_anyone_could_use_is_refused(self, opened, problem_of, field):
        for key in (
            "00" * 32,
            "01" + "00" * 31,
            "ec" + "ff" * 30 + "7f",
            "ed" + "ff" * 30 + "7f",
            "ff" * 32,
            "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
            "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        ):
            response = opened.members[0].ready(**{field: bytes.fromhex(key)})
            assert problem_of(response) is ProblemType.BAD_MESSAGE, key
            assert "key" in response.json()["detail"]

    def test_one_key_for_both_is_refused(self, opened, problem_of):
        member = opened.members[0]
        response = member.ready(masking_key=member.secagg.state.ready.body.sealing_key)
        assert problem_of(response) is ProblemType.BAD_MESSAGE

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"round_digest": bytes(32)}, ProblemType.BAD_MESSAGE),
            ({"expires_at": 1_799_999_999}, ProblemType.BAD_MESSAGE),
            ({"federation": bytes(16)}, ProblemType.UNKNOWN_FEDERATION),
            ({"round": 2}, ProblemType.NOT_FOUND),
            ({"agent": bytes(range(32))}, ProblemType.BAD_SIGNATURE),
        ],
    )
    def test_another_round_or_agent_is_refused(self, opened, problem_of, changes, problem):
        assert problem_of(opened.members[0].ready(**changes)) is problem

    def test_anothers_ready_sent_as_ones_own_is_refused(self, opened, problem_of):
        thief, victim = opened.members[:2]
        response = thief.post("/readies", victim.secagg.state.ready)
        assert problem_of(response) is ProblemType.BAD_SIGNATURE

    def test_a_ready_that_its_agent_did_not_sign_is_refused(self, opened, problem_of):
        member = opened.members[0]
        signed = member.secagg.state.ready
        changed = signed.body.model_copy(update={"nonce": bytes(32)})
        response = member.post("/readies", signed.model_copy(update={"body": changed}))
        assert problem_of(response) is ProblemType.BAD_SIGNATURE

    @pytest.mark.parametrize(
        ("foreign", "problem"),
        [
            ("another agent's", ProblemType.BAD_MESSAGE),
            ("another registrar's", ProblemType.BAD_SIGNATURE),
            ("another federation's", ProblemType.BAD_MESSAGE),
            ("expired", ProblemType.BAD_MESSAGE),
        ],
    )
    def test_a_credential_that_is_not_the_agents_is_refused(
        self, opened, problem_of, foreign, problem
    ):
        member, other = opened.members[:2]
        body, registrar = member.credential.body, opened.case.federation.charter.keys.registrar
        credential = {
            "another agent's": other.credential,
            "another registrar's": sign(Signer.generate(), "credential", body).signed,
            "another federation's": sign(
                registrar, "credential", body.model_copy(update={"federation": bytes(16)})
            ).signed,
            "expired": sign(
                registrar, "credential", body.model_copy(update={"expires_at": 1_700_000_000})
            ).signed,
        }[foreign]
        assert problem_of(member.ready(credential=credential)) is problem

    def test_one_without_a_place_is_refused(self, opened, make_agents, problem_of):
        (extra,) = make_agents(opened.case, 1)
        late = Member(extra, opened.manifest, weight=1, seed=99)
        assert problem_of(late.ready()) is ProblemType.NOT_SELECTED

    def test_another_ready_for_the_same_attempt_is_refused(self, opened, problem_of):
        member = opened.members[0]
        assert member.ready().status_code == 200
        assert problem_of(member.ready(nonce=bytes(32))) is ProblemType.CONFLICT
        assert member.ready().status_code == 200

    def test_a_newer_ready_takes_the_place_of_an_older_one(self, opened, problem_of):
        member, *rest = opened.members
        old = member.secagg
        assert member.ready().status_code == 200
        member.begin(attempt=2)
        assert member.ready().status_code == 200
        opened.play("ready", who=rest)
        news = member.told(RosterNews)
        assert member.secagg.state.ready in news.roster.body.members
        new, member.secagg = member.secagg, old
        assert member.told(EndedNews) == EndedNews(counted=False)
        member.begin(attempt=1)
        assert problem_of(member.ready()) is ProblemType.CONFLICT
        member.secagg = new
        opened.play(*STAGES)
        opened.assert_published(opened.members)

    def test_there_are_so_many_attempts_and_no_more(self, opened, problem_of):
        member = opened.members[0]
        for attempt in range(1, MAX_READY_ATTEMPTS + 1):
            member.begin(attempt=attempt)
            assert member.ready().status_code == 200
        ready = member.secagg.state.ready
        body = Ready.model_construct(**{**dict(ready.body), "attempt": MAX_READY_ATTEMPTS + 1})
        response = member.post("/readies", sign(member.http.signer, "ready", body).signed)
        assert problem_of(response) is ProblemType.BAD_REQUEST

    def test_a_ready_that_expires_while_it_waits_does_not_spoil_the_others_cell(self, gather):
        """Every honest member refuses a roster with an expired READY in it."""
        world = gather(7, ready=False)
        hasty, *rest = world.members
        response = hasty.ready(expires_at=int(world.case.clock.now()) + 3)
        assert response.status_code in {200, ProblemType.BAD_MESSAGE.status}
        world.case.advance(30)
        gather_the_rest(world, rest)
        world.play("share", who=rest, late=True)
        world.play("upload", "confirm", "reveal", who=rest)
        world.assert_published(rest)

    def test_two_agents_with_one_key_do_not_spoil_the_others_cell(self, gather):
        """Every honest member refuses a roster in which a key stands twice."""
        world = gather(7, ready=False)
        one, two, *rest = world.members
        key = public_key_of(os.urandom(32))
        for colluder in (one, two):
            colluder.ready(masking_key=key)
        world.case.advance(30)
        gather_the_rest(world, rest)
        world.play("share", who=rest, late=True)
        world.play("upload", "confirm", "reveal", who=rest)
        world.assert_published(rest)


class TestWhoIsCounted:
    def test_a_round_waits_for_its_target_of_ready_agents(self, gather):
        world = gather(7, ready=False, cohort_target=6)
        world.play("ready", who=world.members[:5])
        assert world.phase is RoundPhase.OPEN
        world.play("ready", who=world.members[5:6])
        assert world.phase is RoundPhase.GATHERING
        # The seventh has come too late.
        assert world.members[6].ready().status_code == ProblemType.ROUND_CLOSED.status
        world.play(*STAGES, who=world.members[:6])
        world.assert_published(world.members[:6])

    @pytest.mark.parametrize(("n_ready", "phase"), [(5, "gathering"), (4, "failed")])
    def test_at_the_deadline_the_smallest_cohort_decides(self, gather, n_ready, phase):
        world = gather(6, ready=False)
        world.case.clock.time = world.manifest.deadline_at - 10
        world.play("ready", who=world.members[:n_ready])
        assert world.phase is RoundPhase.OPEN
        world.case.advance(11)
        assert world.phase is RoundPhase(phase)
        if n_ready < MIN_CELL:
            assert world.failure == "too few uploads: 4 of at least 5"
            assert world.members[0].told(EndedNews) == EndedNews(counted=False)

    def test_one_that_is_ready_and_gone_counts_for_nothing(self, gather):
        world = gather(6, ready=False)
        world.play("ready", who=world.members[:1])
        world.case.clock.time += world.case.federation.config.server.presence_s + 1
        rest = world.members[1:]
        world.play("ready", who=rest)
        assert world.phase is RoundPhase.GATHERING
        roster = parse(Signed[Roster], world.cell.roster).body
        assert set(roster.identities()) == {member.identity for member in rest}
        assert world.members[0].told(EndedNews) == EndedNews(counted=False)
        world.play(*STAGES, who=rest)
        world.assert_published(rest)

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"cohort_target": 6, "min_cohort": 4}, "min_cohort 4 is below masking.min_cell 5"),
            ({"cohort_target": 4, "min_cohort": 4}, "min_cohort 4 is below masking.min_cell 5"),
        ],
    )
    def test_fewer_than_a_cell_are_no_masked_federation(self, make_case, options, named):
        with pytest.raises(Exception, match=named):
            make_case(masking=Masking.CELLS, **options)

    @pytest.mark.parametrize(
        ("options", "mode"),
        [
            ({"cohort_target": 5, "min_cohort": 5}, "cells"),
            ({"cohort_target": 8, "min_cohort": 4}, "off"),
            ({"cohort_target": 4}, "off"),
            ({"cohort_target": 5}, "cells"),
        ],
    )
    def test_masks_are_on_by_default_where_a_cell_can_be_expected(self, base, options, mode):
        config = make_config(RecipeOptions(name="Test", **options), base)
        assert config.masking.mode == mode
        if mode == "cells":
            assert config.rounds.min_cohort >= config.masking.min_cell

    def test_a_cell_target_below_the_smallest_cell_is_refused(self, base):
        options = RecipeOptions(
            name="Test", masking=Masking.CELLS, cohort_target=5, cell_target=MIN_CELL - 1
        )
        with pytest.raises((ConfigError, ValueError), match="cell"):
            make_config(options, base)


class TestTwoModes:
    def test_a_plain_upload_is_refused_where_updates_are_masked(self, gather, on_disk, problem_of):
        world = gather(6, ready=False)
        agent = world.members[0].http
        response = agent.upload(world.manifest, agent.constant(1.0))
        assert problem_of(response) is ProblemType.BAD_REQUEST
        assert "masked" in response.json()["detail"]
        assert on_disk(world, UPLOADS) == set()

    @pytest.mark.parametrize("what", ["shares", "complaints", "uploads", "confirm", "reveal"])
    def test_masked_messages_are_refused_where_updates_are_plain(
        self, gather, make_case, make_agents, problem_of, what
    ):
        world = gather(5)
        world.play("share")
        member = world.members[0]
        member.mask()
        message = {
            "shares": member.secagg.state.shares,
            "uploads": member.secagg.sign_upload(sha256(member.body)),
        }.get(what)
        case = make_case()
        (agent,) = make_agents(case, 1)
        path = f"{case.prefix}/cells/{b64u_encode(member.secagg.transcript)}/{what}"
        body = b"{}" if message is None else message.canonical()
        assert problem_of(agent.request("POST", path, body)) is ProblemType.NOT_FOUND

    def test_ready_and_news_are_refused_where_updates_are_plain(
        self, gather, make_case, make_agents, problem_of
    ):
        ready = gather(5, ready=False).members[0].secagg.state.ready
        case = make_case()
        (agent,) = make_agents(case, 1)
        response = agent.request("POST", f"{case.prefix}/readies", ready.canonical())
        assert problem_of(response) is ProblemType.NOT_FOUND
        response = agent.request("GET", f"{case.prefix}/cells/1/1?phase=ready")
        assert problem_of(response) is ProblemType.NOT_FOUND


class TestDeletion:
    def test_vectors_go_once_the_cell_is_unmasked_and_the_sum_once_the_round_is_over(
        self, gather, on_disk
    ):
        world = gather(12, cell_target=5)
        first, second = world.by_cell()
        world.play("share")
        world.play("upload")
        assert len(on_disk(world, UPLOADS)) == 12
        world.play("confirm", "reveal", who=first)
        assert len(on_disk(world, UPLOADS)) == 6
        assert on_disk(world, SUMS) == {f"{SUMS}/{first[0].secagg.transcript.hex()}"}
        world.play("confirm", "reveal", who=second)
        world.assert_published(world.members, n_cells=2)
        assert on_disk(world, UPLOADS) == on_disk(world, SUMS) == set()

    def test_a_vector_is_deleted_even_where_plain_updates_would_be_kept(self, gather, on_disk):
        world = gather(6, retention=Retention.KEEP)
        world.play(*STAGES)
        world.assert_published(world.members)
        assert on_disk(world, UPLOADS) == on_disk(world, SUMS) == set()

    def test_the_sum_goes_when_the_round_fails(self, gather, on_disk):
        world = gather(12, cell_target=5)
        first, _ = world.by_cell()
        world.play(*STAGES, who=first)
        assert len(on_disk(world, SUMS)) == 1
        world.case.federation.releases.roll_back(0)
        world.case.advance()
        assert world.phase is RoundPhase.FAILED
        assert on_disk(world, SUMS) == set()

    def test_bytes_of_which_the_journal_knows_nothing_go_at_the_next_start(self, gather, on_disk):
        world = gather(6)
        world.play("share", "upload")
        stray = world.case.directory / "blobs" / UPLOADS / "999" / "0-00"
        stray.parent.mkdir()
        stray.write_bytes(b"x")
        world.case.restart()
        assert len(on_disk(world, UPLOADS)) == 6
        world.play("confirm", "reveal")
        world.assert_published(world.members)


class TestRollback:
    """The operator goes back to an older release while cells are at work."""

    @pytest.mark.parametrize("stage", [*STAGES, ""])
    def test_the_round_fails_and_members_are_told_that_nothing_more_is_wanted(
        self, gather, on_disk, problem_of, stage
    ):
        world = gather(6)
        done = STAGES[: STAGES.index(stage)] if stage else ()
        world.play(*done)
        world.case.federation.releases.roll_back(0)
        for member in world.members:
            assert member.told(EndedNews) == EndedNews(counted=False)
        world.case.advance()
        assert world.phase is RoundPhase.FAILED
        assert "rolled back to release 0" in world.failure
        assert on_disk(world, UPLOADS) == set()
        following = world.members[0].http.round()
        assert (following.round, following.release) == (2, 1)
        member = world.members[0]
        member.begin(attempt=2)
        closed = {ProblemType.ROUND_CLOSED, ProblemType.CONSUMED}
        assert problem_of(member.ready()) in closed

    @pytest.mark.parametrize("retention", list(Retention))
    def test_vectors_of_cells_that_were_at_work_are_deleted(self, gather, on_disk, retention):
        world = gather(6, retention=retention)
        world.play("share", "upload")
        assert len(on_disk(world, UPLOADS)) == 6
        world.case.federation.releases.roll_back(0)
        world.case.advance()
        assert world.phase is RoundPhase.FAILED
        assert on_disk(world, UPLOADS) == set()

    def test_a_rollback_while_a_cell_unmasks_ends_the_round_and_the_next_one_opens(
        self, gather, monkeypatch
    ):
        world = gather(6)
        world.play("share", "upload", "confirm")
        unmasker = world.case.federation.unmasker
        real, calls = unmasker.unmask, []

        def unmask(*args: Any, **options: Any) -> Words:
            calls.append(1)
            if len(calls) == 1:  # as `sheepfold-server releases rollback` does meanwhile
                world.case.federation.releases.roll_back(0)
            if len(calls) == 5:
                pytest.fail("the clockwork unmasks the cell of a round that is over, for ever")
            return real(*args, **options)

        monkeypatch.setattr(unmasker, "unmask", unmask)
        world.play("reveal")
        assert world.phase is RoundPhase.FAILED
        assert world.members[0].http.round().round == 2


class TestExpelling:
    def test_one_that_waits_is_not_given_a_cell(self, gather, problem_of):
        world = gather(7, ready=False)
        gone, *rest = world.members
        world.play("ready", who=[gone])
        world.case.federation.membership.expel(b64u_encode(gone.identity))
        world.play("ready", who=rest)
        assert world.phase is RoundPhase.GATHERING
        roster = parse(Signed[Roster], world.cell.roster).body
        assert gone.identity not in roster.identities()
        assert problem_of(gone.ready()) is ProblemType.REVOKED
        world.play(*STAGES, who=rest)
        world.assert_published(rest)

    def test_too_few_that_are_left_wait_for_others(self, gather, make_agents):
        world = gather(5, ready=False)
        world.play("ready", who=world.members[:4])
        world.case.federation.membership.expel(b64u_encode(world.members[4].identity))
        world.case.advance()
        assert world.phase is RoundPhase.OPEN
        (extra,) = make_agents(world.case, 1)
        world.case.advance()
        assert extra.round() == world.manifest
        late = Member(extra, world.manifest, weight=9, seed=99)
        there = [*world.members[:4], late]
        world.play("ready", who=[late])
        world.play(*STAGES, who=there)
        world.assert_published(there)

    @pytest.mark.parametrize("stage", STAGES)
    def test_a_member_of_a_cell_can_send_nothing_more_and_the_cell_goes_on(
        self, gather, problem_of, stage
    ):
        world = gather(6)
        world.play(*STAGES[: STAGES.index(stage)])
        gone, *rest = world.members
        world.case.federation.membership.expel(b64u_encode(gone.identity))
        response = gone.http.request("GET", f"{world.case.prefix}/cells/1/1?phase=shared")
        assert problem_of(response) is ProblemType.REVOKED
        left = STAGES[STAGES.index(stage) :]
        world.play(*left, who=rest, late=True)
        world.assert_published(rest if stage in {"share", "upload"} else world.members)

    def test_who_left_is_not_waited_for_in_a_second_try(self, gather):
        world = gather(7)
        world.play("share", who=world.members[:3], late=True)
        gone, *rest = world.members
        world.case.federation.membership.expel(b64u_encode(gone.identity))
        for member in rest:
            member.try_again(FailureReason.TOO_FEW_SHARED)
        world.play("ready", who=rest)
        world.case.advance(STAGE_S)
        world.play(*STAGES, who=rest)
        world.assert_published(rest)


def test_the_members_of_one_cell_are_told_nothing_of_another(gather):
    world = gather(12, cell_target=5)
    first, second = world.by_cell()
    world.play("share")
    bundle = first[0].told(BundleNews).bundle
    assert {header.body.agent for header in bundle.headers} == {member.identity for member in first}
    others = {member.identity for member in second}
    assert not others & set(first[0].secagg.state.roster.body.identities())


def test_news_of_a_ready_that_nobody_sent_is_the_end_of_it(gather):
    world = gather(6, ready=False)
    assert world.members[0].told(EndedNews) == EndedNews(counted=False)


def test_a_wait_for_news_ends_when_the_cell_moves(gather):
    """Every write that gives members something to do is told to the waiting polls."""
    world = gather(6)
    for stage in STAGES:
        before = world.store.changes()
        world.play(stage)
        assert world.store.changes() > before

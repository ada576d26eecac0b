"""The round's state machine: opening, replacing, closing, averaging, failing, resuming."""

import numpy as np
import pytest
from safetensors.numpy import load

from aggregator_server.aggregation import optimizers
from aggregator_server.aggregation.lora import covariance_gap, flexlora
from aggregator_server.aggregation.lora_pairs import Cohort, local_adapter, pairs_of
from aggregator_server.config import Retention
from aggregator_server.errors import NoSpaceError, Refusal, StoreBusyError
from aggregator_server.filtering import FilterDecision
from aggregator_server.private_recipes import PrivacyOptions, Profile
from aggregator_server.recipes import OPTIMIZERS, Optimizer
from aggregator_server.rounds import Gated
from aggregator_server.selection import rank
from aggregator_server.store.rows import BlobRole
from aggregator_server.store.store import Store
from privacy.updates import PlainUpdate
from protocol.blocks import Factor, FilterRule, LoraRule
from protocol.chain import RoundManifest
from protocol.messages import TrainTask, WaitReason, WithdrawalReason
from protocol.phases import RoundPhase
from protocol.problems import ProblemType
from protocol.signing import verify
from protocol.wire import b64u_encode, domain_hash, parse
from quant.adapter import factor_of, flatten


def reason_of(agent) -> WaitReason | None:
    task = agent.task().task
    return None if isinstance(task, TrainTask) else task.reason


def phase_of(case) -> RoundPhase:
    return case.federation.status().round.phase


class TestOpening:
    def test_a_round_opens_when_the_minimum_is_present(self, make_case, make_agents):
        case = make_case(cohort_target=3, min_cohort=2)
        (first,) = make_agents(case, 1)
        case.advance()
        assert case.federation.status().round is None
        assert reason_of(first) is WaitReason.GATHERING_AGENTS
        make_agents(case, 1)
        case.advance()
        assert phase_of(case) is RoundPhase.OPEN
        assert first.round() is not None

    def test_the_absent_do_not_count(self, make_case, make_agents):
        case = make_case(min_cohort=2)
        make_agents(case, 1)
        case.clock.time += case.federation.config.server.presence_s + 1
        make_agents(case, 1)
        case.advance()
        assert case.federation.status().round is None

    def test_the_manifest_is_signed_and_says_where_it_starts(self, make_case, start_round):
        case = make_case(cohort_target=2, n_rounds=4)
        (agent, *_), manifest = start_round(case, 2)
        signed = agent.task().task.round
        verify(signed, "round", key=case.manifest.server)
        release = case.federation.releases.newest()
        assert manifest.release_digest == release.digest()
        assert manifest.sent == release.sent
        assert manifest.federation_digest == case.manifest.digest()
        assert (manifest.schedule_start, manifest.schedule_end) == (0.0, 0.25)
        assert manifest.deadline_at == manifest.opened_at + case.manifest.rounds.deadline_s

    def test_those_of_lowest_rank_are_selected(self, make_case, start_round, make_agents):
        case = make_case(cohort_target=2)
        agents = make_agents(case, 8)
        case.advance()
        tasks = {agent.identity: agent.round() for agent in agents}
        manifest = next(task for task in tasks.values() if task)
        assert manifest.cohort_size == 3
        ranked = sorted(tasks, key=lambda identity: rank(manifest.selection_seed, identity))
        assert {identity for identity, task in tasks.items() if task} == set(ranked[:3])
        outsider = next(agent for agent in agents if not tasks[agent.identity])
        assert reason_of(outsider) is WaitReason.NOT_SELECTED

    def test_two_rounds_draw_by_different_seeds(self, make_case, start_round):
        case = make_case(cohort_target=2)
        agents, first = start_round(case, 2)
        for agent in agents:
            agent.upload(first, agent.constant(1))
        case.advance()
        second = agents[0].round()
        assert second.round == 2
        assert second.selection_seed != first.selection_seed

    def test_no_round_opens_without_space_and_agents_are_told(
        self, make_case, make_agents, monkeypatch
    ):
        case = make_case()
        agents = make_agents(case, 3)
        monkeypatch.setattr(case.federation._blobs, "_min_free_bytes", 2**62)
        case.advance()
        assert case.federation.status().round is None
        assert reason_of(agents[0]) is WaitReason.NO_SPACE
        monkeypatch.undo()
        case.advance()
        assert phase_of(case) is RoundPhase.OPEN

    def test_an_agent_that_is_done_with_a_round_is_not_given_it_again(self, make_case, start_round):
        case = make_case(cohort_target=2)
        (agent, *_), manifest = start_round(case, 2)
        assert isinstance(agent.task(after=manifest.round - 1).task, TrainTask)
        assert agent.task(after=manifest.round).task.reason is WaitReason.ROUND_ENDING


class TestReplacing:
    @pytest.fixture
    def case(self, make_case):
        return make_case(cohort_target=2, min_cohort=2)

    def test_one_who_withdraws_is_replaced_by_the_next_in_rank(self, case, make_agents):
        agents = make_agents(case, 5)
        case.advance()
        tasks = {agent.identity: agent.round() for agent in agents}
        manifest = next(task for task in tasks.values() if task)
        by_rank = sorted(agents, key=lambda agent: rank(manifest.selection_seed, agent.identity))
        assert by_rank[0].withdraw(manifest.round).status_code == 200
        case.advance()
        assert by_rank[3].round() == manifest
        assert reason_of(by_rank[0]) is WaitReason.NOT_SELECTED
        assert reason_of(by_rank[4]) is WaitReason.NOT_SELECTED

    def test_a_free_place_goes_to_one_who_comes_later(self, case, start_round, make_agents):
        agents, manifest = start_round(case, 2)
        agents[0].withdraw(manifest.round)
        case.advance()
        agents[1].upload(manifest, agents[1].constant(1))
        case.advance()
        assert phase_of(case) is RoundPhase.OPEN
        (late,) = make_agents(case, 1)
        case.advance()
        assert late.round() == manifest

    def test_withdrawing_again_is_the_same_as_once(self, case, start_round, problem_of):
        agents, manifest = start_round(case, 3)
        first = agents[0].withdraw(manifest.round)
        assert agents[0].withdraw(manifest.round).content == first.content
        other = agents[0].withdraw(manifest.round, WithdrawalReason.OUT_OF_MEMORY)
        assert problem_of(other) is ProblemType.CONFLICT

    def test_withdrawing_is_for_those_who_hold_a_place(
        self, case, start_round, make_agents, problem_of
    ):
        agents, manifest = start_round(case, 3)
        (outsider,) = make_agents(case, 1)
        assert problem_of(outsider.withdraw(manifest.round)) is ProblemType.NOT_SELECTED
        assert problem_of(outsider.withdraw(99)) is ProblemType.NOT_FOUND
        agents[0].upload(manifest, agents[0].constant(1))
        assert problem_of(agents[0].withdraw(manifest.round)) is ProblemType.CONSUMED
        agents[1].upload(manifest, agents[1].constant(1))
        case.advance()
        assert problem_of(agents[2].withdraw(manifest.round)) is ProblemType.ROUND_CLOSED


class TestClosing:
    def test_a_round_closes_at_the_target_and_the_next_opens(self, make_case, start_round):
        case = make_case(cohort_target=2)
        agents, manifest = start_round(case, 5)
        for agent in agents[:2]:
            agent.upload(manifest, agent.constant(1))
        case.advance()
        assert case.federation.releases.newest().round == 1
        assert case.federation.status().round.round == 2

    def test_a_round_closes_when_all_who_could_upload_have(self, make_case, start_round):
        case = make_case(cohort_target=4, min_cohort=2)
        agents, manifest = start_round(case, 3)
        for agent in agents[:2]:
            agent.upload(manifest, agent.constant(1))
        case.advance()
        assert case.federation.status().newest_release == 0
        agents[2].withdraw(manifest.round)
        case.advance()
        assert case.federation.releases.newest().aggregation.n_agents == 2

    def test_at_the_deadline_enough_uploads_close_the_round(self, make_case, start_round):
        case = make_case(cohort_target=4, min_cohort=2)
        agents, manifest = start_round(case, 4)
        for agent in agents[:2]:
            agent.upload(manifest, agent.constant(1))
        case.advance(case.manifest.rounds.deadline_s - 10)
        assert phase_of(case) is RoundPhase.OPEN
        case.advance(10)
        assert case.federation.releases.newest().aggregation.n_agents == 2

    def test_too_few_uploads_fail_the_round_and_consume_its_number(self, make_case, start_round):
        case = make_case(cohort_target=4, min_cohort=2)
        agents, manifest = start_round(case, 4)
        agents[0].upload(manifest, agents[0].constant(1))
        case.advance(case.manifest.rounds.deadline_s)
        status = case.federation.status()
        assert status.round.phase is RoundPhase.FAILED
        assert status.round.failure == "too few uploads: 1 of at least 2"
        assert status.newest_release == 0
        for agent in agents:
            agent.poll()
        case.advance()
        second = agents[0].round()
        assert second.round == 2
        assert second.schedule_start == 0.0

    def test_an_upload_that_moves_extends_the_wait_until_the_cap(self, make_case, start_round):
        case = make_case(cohort_target=2, min_cohort=2)
        agents, manifest = start_round(case, 2)
        agents[0].upload(manifest, agents[0].constant(1))
        case.clock.time = manifest.deadline_at - 0.1
        data = agents[1].constant(3).astype("<f4").tobytes()
        header = agents[1].header(manifest, data)
        agents[1].begin(header)
        case.advance(0.2)
        assert phase_of(case) is RoundPhase.OPEN
        agents[1].put(header, 0, data)
        assert agents[1].complete(header).status_code == 200
        case.advance()
        assert case.federation.releases.newest().aggregation.n_agents == 2

    def test_an_upload_that_stands_still_does_not(self, make_case, start_round):
        case = make_case(cohort_target=2, min_cohort=2)
        agents, manifest = start_round(case, 2)
        agents[0].upload(manifest, agents[0].constant(1))
        header = agents[1].header(manifest, agents[1].constant(3).astype("<f4").tobytes())
        agents[1].begin(header)
        case.advance(case.manifest.rounds.deadline_s)
        assert phase_of(case) is RoundPhase.FAILED

    def test_the_federation_finishes_after_its_rounds(self, make_case, start_round, make_agents):
        case = make_case(cohort_target=2, n_rounds=2)
        agents, manifest = start_round(case, 2)
        for _ in range(2):
            manifest = agents[0].round()
            for agent in agents:
                agent.upload(manifest, agent.constant(1))
            case.advance()
        assert reason_of(agents[0]) is WaitReason.FINISHED
        assert case.federation.status().finished
        assert manifest.schedule_end == 1.0
        case.advance(100)
        assert case.federation.status().round.round == 2


class TestAggregation:
    @pytest.mark.parametrize("rule", [LoraRule.FEDIT, LoraRule.FFA_LORA])
    def test_the_release_is_its_base_plus_the_weighted_mean(self, make_case, start_round, rule):
        case = make_case(cohort_target=3, lora_rule=rule)
        agents, manifest = start_round(case, 3)
        rng = np.random.default_rng(1)
        n_values = case.federation.charter.layout.n_values
        vectors = [rng.standard_normal(n_values).astype(np.float32) for _ in agents]
        for agent, vector, weight in zip(agents, vectors, (1, 20, 300), strict=True):
            agent.upload(manifest, vector, weight=weight)
        case.advance()
        releases = case.federation.releases
        before, after = (releases.get(n) for n in (0, 1))
        expected = np.average(np.float64(vectors), axis=0, weights=(1, 20, 300))
        np.testing.assert_allclose(
            releases.vector(after) - releases.vector(before), expected, rtol=1e-4, atol=1e-6
        )
        assert after.aggregation.update_norm == pytest.approx(np.linalg.norm(expected), rel=1e-5)
        assert len(after.accepted) == after.aggregation.n_cells == 3
        assert after.round_digest == manifest.digest()

    def test_a_release_tells_what_averaging_both_factors_lost(self, make_case, start_round):
        case = make_case(cohort_target=3)
        agents, manifest = start_round(case, 3)
        rng = np.random.default_rng(1)
        n_values = case.federation.charter.layout.n_values
        vectors = [rng.standard_normal(n_values).astype(np.float32) for _ in agents]
        weights = (1, 20, 300)
        for agent, vector, weight in zip(agents, vectors, weights, strict=True):
            agent.upload(manifest, vector, weight=weight)
        case.advance()
        releases, layout = case.federation.releases, case.federation.charter.layout
        start = releases.arrays(releases.get(0))
        scale = case.manifest.lora.alpha / case.manifest.lora.rank
        locals_ = [
            local_adapter(PlainUpdate(vector=v, weight=w), start, layout, scale=scale)
            for v, w in zip(vectors, weights, strict=True)
        ]
        exact = covariance_gap(Cohort(agents=tuple(locals_))).gap_norm
        told = releases.get(1).aggregation.covariance_gap
        assert told.estimated_norm == pytest.approx(exact, rel=1e-4)  # layers of 64: exact
        assert told.estimated_change_norm > 0
        assert releases.get(0).aggregation.covariance_gap is None

    def test_under_rolora_b_and_a_take_turns_and_each_mean_is_exact(
        self, make_case, start_round, make_base_of
    ):
        case = make_case(
            cohort_target=2, lora_rule=LoraRule.ROLORA, base=make_base_of(d_in=48), n_rounds=3
        )
        agents, _manifest = start_round(case, 2)
        releases, rng = case.federation.releases, np.random.default_rng(1)
        for number, factor in enumerate("BAB"):
            manifest, base = agents[0].round(), releases.get(number)
            layout = case.federation.charter.turns.at(number).layout
            assert manifest.update_n_bytes == layout.n_bytes
            vectors = [rng.standard_normal(layout.n_values).astype(np.float32) for _ in agents]
            for agent, vector, weight in zip(agents, vectors, (1, 3), strict=True):
                assert agent.upload(manifest, vector, weight=weight).status_code == 200
            case.advance()
            before, release = releases.arrays(base), releases.get(number + 1)
            after = releases.arrays(release)
            changed = {name for name in after if not np.array_equal(after[name], before[name])}
            assert {factor_of(name) for name in changed} == {Factor(factor)}
            np.testing.assert_allclose(
                flatten(after, layout) - flatten(before, layout),
                np.average(np.float64(vectors), axis=0, weights=(1, 3)),
                rtol=1e-4,
                atol=1e-5,
            )
            sent = load(releases.file(release.sent))
            assert sent.keys() == changed
            assert manifest.sent == base.sent

    def test_under_rolora_an_update_of_the_other_factor_is_refused(
        self, make_case, start_round, make_base_of, problem_of
    ):
        case = make_case(cohort_target=2, lora_rule=LoraRule.ROLORA, base=make_base_of())
        agents, manifest = start_round(case, 2)
        other = case.federation.charter.turns.at(1).layout
        data = np.ones(other.n_values, "<f4").tobytes()
        header = agents[0].header(manifest, data).model_copy(update={"layout": other.digest()})
        assert problem_of(agents[0].begin(header)) is ProblemType.BAD_REQUEST

    def test_a_rollback_under_rolora_keeps_the_turns_of_the_releases(self, make_case, start_round):
        case = make_case(cohort_target=2, lora_rule=LoraRule.ROLORA, n_rounds=3)
        agents, manifest = start_round(case, 2)
        layout = case.federation.charter.turns.at(0).layout
        for agent in agents:
            agent.upload(manifest, np.ones(layout.n_values, np.float32))
        case.advance()
        releases = case.federation.releases
        back = releases.roll_back(0)
        assert (back.number, back.sent) == (2, releases.get(0).sent)
        case.advance()
        manifest = agents[0].round()
        assert manifest.update_n_bytes == layout.n_bytes  # release 2: B's turn
        for agent in agents:
            agent.upload(manifest, np.full(layout.n_values, 2.0, np.float32))
        case.advance()
        np.testing.assert_array_equal(flatten(releases.arrays(releases.get(3)), layout), 2.0)

    def test_flexlora_releases_the_best_adapter_for_the_mean_product(self, make_case, start_round):
        case = make_case(cohort_target=3, n_rounds=2, lora_rule=LoraRule.FLEXLORA)
        agents, manifest = start_round(case, 3)
        releases, layout = case.federation.releases, case.federation.charter.layout
        rng = np.random.default_rng(1)
        weights = (1, 20, 300)
        for number in (1, 2):  # the second starts from factors of another basis
            base = releases.get(number - 1)
            vectors = [rng.standard_normal(layout.n_values).astype(np.float32) for _ in agents]
            manifest = agents[0].round()
            for agent, vector, weight in zip(agents, vectors, weights, strict=True):
                agent.upload(manifest, vector, weight=weight)
            case.advance()
            lora, start = case.manifest.lora, releases.arrays(base)
            scale = lora.scale
            locals_ = tuple(
                local_adapter(PlainUpdate(vector=v, weight=w), start, layout, scale=scale)
                for v, w in zip(vectors, weights, strict=True)
            )
            best = flexlora(Cohort(agents=locals_), rank=lora.rank, scale=scale)
            release = releases.get(number)
            found = pairs_of(releases.arrays(release))
            for module, pair in best.adapter.pairs.items():  # an SVD's factors have no sign
                got = found[module].B @ found[module].A
                np.testing.assert_allclose(got, pair.B @ pair.A, atol=1e-4)
            report = release.aggregation
            assert (report.rule, report.n_agents, report.covariance_gap) == ("flexlora", 3, None)
            assert report.left_out_norm == pytest.approx(best.error_norm, rel=1e-6)

    @pytest.mark.parametrize(
        "options",
        [
            {"lora_rule": LoraRule.FFA_LORA},
            {"privacy": PrivacyOptions(epsilon=8.0, profile=Profile.CENTRAL)},
        ],
    )
    def test_where_nothing_is_lost_or_nothing_may_be_told_a_release_has_no_gap(
        self, make_case, start_round, options
    ):
        case = make_case(cohort_target=2, **options)
        agents, manifest = start_round(case, 2)
        for agent in agents:
            agent.upload(manifest, agent.constant(1e-3))
        case.advance()
        release = case.federation.releases.newest()
        assert release.number == 1
        assert "covariance_gap" not in release.as_json()["aggregation"]

    def test_under_p3_updates_are_clipped_and_only_the_noisy_mean_is_told(
        self, make_case, start_round
    ):
        options = PrivacyOptions(epsilon=8.0, profile=Profile.CENTRAL, clip_norm=0.5)
        case = make_case(cohort_target=4, privacy=options)
        agents, manifest = start_round(case, 4)
        n_values = case.federation.charter.layout.n_values
        rng = np.random.default_rng(1)
        vectors = [rng.standard_normal(n_values).astype(np.float32) * 100 for _ in agents]
        for agent, vector in zip(agents, vectors, strict=True):
            agent.upload(manifest, vector, weight=1)
        case.advance()
        releases = case.federation.releases
        before, after = (releases.get(n) for n in (0, 1))
        moved = np.float64(releases.vector(after)) - releases.vector(before)
        report = after.aggregation
        std = case.manifest.privacy.noise_multiplier * 0.5 / len(vectors)
        assert (report.rule, report.clip_norm, report.next_clip_norm) == ("noisy-fedavg", 0.5, 0.5)
        assert report.noise_std == pytest.approx(std)
        assert report.update_norm == pytest.approx(np.linalg.norm(moved), rel=1e-5)
        clipped = np.mean([v / np.linalg.norm(v) * 0.5 for v in np.float64(vectors)], axis=0)
        noise = moved - clipped
        assert abs(noise.std() / std - 1) < 5 / np.sqrt(2 * n_values)
        assert "noisy-fedavg" in after.canonical().decode()

    def test_a_guessed_update_is_not_confirmed_by_what_a_release_shows(
        self, make_case, start_round
    ):
        """Under P3 a hash of the update in the clear would tell a right guess from a wrong one."""
        case = make_case(cohort_target=2)
        agents, manifest = start_round(case, 2)
        guessed = agents[0].constant(1)
        for agent in agents:
            agent.upload(manifest, guessed, weight=1)
        case.advance()
        accepted = case.federation.releases.newest().accepted
        for agent in agents:
            header = agent.header(manifest, guessed.astype("<f4").tobytes())
            member = [b64u_encode(agent.identity), b64u_encode(header.digest())]
            known = {
                domain_hash("survivors", [member]),
                domain_hash("roster", b64u_encode(header.round_digest), member),
            }
            shown = {ref.members for ref in accepted} | {ref.transcript for ref in accepted}
            assert not known & shown

    def test_under_p3_an_adaptive_clip_norm_goes_on_from_release_to_release(
        self, make_case, start_round
    ):
        options = PrivacyOptions(
            epsilon=8.0, profile=Profile.CENTRAL, clip_norm=0.5, adaptive_clip=True
        )
        case = make_case(cohort_target=2, privacy=options)
        agents, _ = start_round(case, 2)
        norms = []
        for _ in range(3):
            manifest = agents[0].round()
            for agent in agents:
                agent.upload(manifest, agent.constant(1), weight=1)
            case.advance()
            report = case.federation.releases.newest().aggregation
            norms.append((report.clip_norm, report.next_clip_norm))
        assert norms[0][0] == 0.5
        assert [norm for norm, _ in norms[1:]] == [after for _, after in norms[:-1]]
        assert all(before != after for before, after in norms)

    def test_under_p3_a_rollback_leaves_the_adaptive_clip_norm(self, make_case, start_round):
        options = PrivacyOptions(
            epsilon=8.0, profile=Profile.CENTRAL, clip_norm=0.5, adaptive_clip=True
        )
        case = make_case(cohort_target=2, privacy=options)
        agents, _ = start_round(case, 2)
        for number in range(2):
            manifest = agents[0].round()
            for agent in agents:
                agent.upload(manifest, agent.constant(1), weight=1)
            case.advance()
            if number == 0:
                first = case.federation.releases.newest().aggregation
                case.federation.releases.roll_back(0)
                case.advance()
        assert case.federation.releases.newest().aggregation.clip_norm == first.next_clip_norm

    def test_the_robust_filter_removes_an_update_that_lies_apart(self, make_case, start_round):
        case = make_case(cohort_target=12, filter=FilterRule.ROBUST)
        agents, manifest = start_round(case, 12)
        n_values = case.federation.charter.layout.n_values
        rng = np.random.default_rng(1)
        common = rng.standard_normal(n_values)
        honest = [common + 0.5 * rng.standard_normal(n_values) for _ in agents[:-1]]
        vectors = [v.astype(np.float32) for v in (*honest, -50.0 * common)]
        for agent, vector in zip(agents, vectors, strict=True):
            agent.upload(manifest, vector, weight=3)
        case.advance()
        releases = case.federation.releases
        before, after = (releases.get(n) for n in (0, 1))
        assert (after.filter.rule, after.filter.n_cells) == (FilterRule.ROBUST, 12)
        assert after.filter.n_rejected == len(after.rejected) >= 1
        assert after.aggregation.n_agents == len(after.accepted) == 12 - len(after.rejected)
        moved = np.float64(releases.vector(after)) - releases.vector(before)
        wanted = np.mean(honest, axis=0)
        assert np.linalg.norm(moved - wanted) < 0.2 * np.linalg.norm(wanted)
        plain = np.mean([*honest, -50.0 * common], axis=0)
        assert np.linalg.norm(plain - wanted) > 3 * np.linalg.norm(wanted)

    def test_the_robust_filter_removes_an_update_that_pulls_against_the_others(
        self, make_case, start_round
    ):
        """Its score is below 0, and the journal takes it."""
        case = make_case(cohort_target=9, filter=FilterRule.ROBUST)
        agents, manifest = start_round(case, 9)
        n_values = case.federation.charter.layout.n_values
        rng = np.random.default_rng(3)
        common = rng.standard_normal(n_values)
        honest = [common + rng.standard_normal(n_values) for _ in agents]
        for agent, vector in zip(agents, [*honest[:-1], -honest[-1]], strict=True):
            agent.upload(manifest, vector.astype(np.float32), weight=3)
        case.advance()
        after = case.federation.releases.get(1)
        assert (after.filter.n_cells, after.filter.n_rejected) == (9, 1)
        assert after.aggregation.n_agents == 8

    def test_a_killed_server_averages_what_its_filter_decided(
        self, make_case, start_round, monkeypatch
    ):
        """Another seed would judge anew; the decision is in the journal before the round moves."""
        case = make_case(cohort_target=9, filter=FilterRule.ROBUST, lora_rule=LoraRule.FFA_LORA)
        agents, manifest = start_round(case, 9)
        rng = np.random.default_rng(2)
        n_values = case.federation.charter.layout.n_values
        for agent in agents:
            agent.upload(manifest, rng.standard_normal(n_values).astype(np.float32), weight=1)
        seeds = []
        monkeypatch.setattr(
            "aggregator_server.merge_rules.os.urandom", lambda n: seeds.append(n) or bytes(n)
        )
        kill = pytest.MonkeyPatch()
        kill.setattr(Gated, "work", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            case.advance()
        kill.undo()
        row = case.federation._store.rounds.get(manifest.round)
        assert row.phase is RoundPhase.GATED
        decision = parse(FilterDecision, row.filter_report)
        case.advance()
        release = case.federation.releases.newest()
        assert len(seeds) == 1
        assert release.filter == decision.report
        assert len(release.rejected) == decision.report.n_rejected

    @pytest.mark.parametrize("kind", [kind for kind in Optimizer if kind is not Optimizer.FEDAVG])
    def test_a_server_optimiser_goes_on_from_release_to_release(self, make_case, start_round, kind):
        case = make_case(cohort_target=2, optimizer=OPTIMIZERS[kind])
        agents, _ = start_round(case, 2)
        optimizer = optimizers.optimizer_of(OPTIMIZERS[kind])
        n_values = case.federation.charter.layout.n_values
        state = optimizers.initial_state(optimizer, n_values=n_values)
        releases = case.federation.releases
        for number in (1, 2, 3):
            manifest = agents[0].round()
            mean = np.full(n_values, 0.01 * number)
            for agent in agents:
                agent.upload(manifest, mean.astype(np.float32), weight=1)
            before = np.float64(releases.vector(releases.newest()))
            case.advance()
            step, state = optimizers.apply(optimizer, state, np.float64(mean.astype(np.float32)))
            moved = releases.vector(releases.newest()) - before
            np.testing.assert_allclose(moved, step, rtol=1e-3, atol=1e-6)
            kept = optimizers.OptimizerState.from_bytes(
                releases.hidden_file(number, BlobRole.OPTIMIZER)
            )
            assert kept.n_steps == number
        row = case.federation._store.releases.blob_of(3, BlobRole.OPTIMIZER)
        with pytest.raises(Refusal):
            releases.blob_n_bytes(row.sha256)
        releases.roll_back(1)
        state = releases.hidden_file(1, BlobRole.OPTIMIZER)
        assert releases.hidden_file(4, BlobRole.OPTIMIZER) == state

    def test_with_b_only_the_frozen_a_completes_the_adapter(self, make_case, start_round):
        case = make_case(cohort_target=2, lora_rule=LoraRule.FFA_LORA)
        agents, manifest = start_round(case, 2)
        for agent in agents:
            agent.upload(manifest, agent.constant(1))
        case.advance()
        releases = case.federation.releases
        before, after = (releases.arrays(releases.get(n)) for n in (0, 1))
        for name in before:
            same = np.array_equal(before[name], after[name])
            assert same == (factor_of(name) is Factor.A)
        assert releases.get(1).sent != releases.get(1).adapter

    def test_with_both_factors_the_sent_file_is_the_adapter(self, make_case):
        release = make_case().federation.releases.newest()
        assert release.sent == release.adapter

    def test_plain_updates_are_deleted_once_they_are_in_a_release(
        self, make_case, start_round, blob_files
    ):
        case = make_case(cohort_target=2)
        agents, manifest = start_round(case, 2)
        for agent in agents:
            agent.upload(manifest, agent.constant(1))
        assert any(name.startswith("uploads/") for name in blob_files(case))
        case.advance()
        assert not any(name.startswith("uploads/") for name in blob_files(case))

    def test_plain_updates_are_kept_when_the_operator_says_so(
        self, make_case, start_round, blob_files
    ):
        def keep(config):
            server = config.server.model_copy(update={"retention": Retention.KEEP})
            return config.model_copy(update={"server": server})

        case = make_case(cohort_target=2, edit=keep)
        agents, manifest = start_round(case, 3)
        agents[2].begin(agents[2].header(manifest, bytes(manifest.update_n_bytes)))
        for agent in agents[:2]:
            agent.upload(manifest, agent.constant(1))
        case.advance()
        assert sum(name.startswith("uploads/") for name in blob_files(case)) == 2

    def test_a_mean_that_is_not_finite_fails_the_round_and_publishes_nothing(
        self, make_case, start_round
    ):
        case = make_case(cohort_target=2)
        agents, manifest = start_round(case, 2)
        for agent in agents:
            agent.upload(manifest, agent.constant(3.4e38))
        case.advance()
        row = case.federation._store.rounds.get(1)
        assert row.phase is RoundPhase.PUBLISHED  # a mean of 3.4e38 is a number still
        manifest = agents[0].round()
        for agent in agents:
            agent.upload(manifest, agent.constant(3.4e38))
        case.advance()
        row = case.federation._store.rounds.get(2)
        assert row.phase is RoundPhase.FAILED
        assert "not finite" in row.failure
        assert case.federation.status().newest_release == 1

    def test_cells_are_summed_by_transcript_and_not_by_arrival(
        self, make_case, start_round, monkeypatch
    ):
        case = make_case(cohort_target=3)
        agents, manifest = start_round(case, 3)
        for agent in agents:
            agent.upload(manifest, agent.constant(1))
        loaded = []
        load = case.federation.uploads.load
        monkeypatch.setattr(
            case.federation.uploads,
            "load",
            lambda upload: (loaded.append(upload.id), load(upload))[1],
        )
        case.advance()
        release = case.federation.releases.newest()
        transcripts = [ref.transcript for ref in release.accepted]
        assert transcripts == sorted(transcripts)
        by_upload = {
            cell.upload: cell.transcript for cell in case.federation._store.uploads.cells(1)
        }
        assert [by_upload[upload] for upload in loaded] == 2 * transcripts  # the mean, then its gap


class TestFaults:
    @pytest.fixture
    def closing(self, make_case, start_round):
        """A round with all its uploads, which the next `advance` will close and publish."""
        case = make_case(cohort_target=2)
        agents, manifest = start_round(case, 2)
        for agent, value in zip(agents, (1.0, 3.0), strict=True):
            agent.upload(manifest, agent.constant(value))
        return case

    def test_an_unknown_fault_fails_the_round_without_telling_everyone_why(
        self, closing, monkeypatch
    ):
        def broken(*_args: object) -> None:
            msg = "secret/path"
            raise RuntimeError(msg)

        monkeypatch.setattr(closing.federation.uploads, "load", broken)
        closing.advance()
        row = closing.federation._store.rounds.get(1)
        assert row.phase is RoundPhase.FAILED
        assert "secret" not in row.failure
        assert "log" in row.failure

    @pytest.mark.parametrize("error", [NoSpaceError("full"), StoreBusyError("locked")])
    def test_a_fault_that_may_pass_leaves_the_round_waiting(self, closing, monkeypatch, error):
        def failing(*_args: object, **_kwargs: object) -> None:
            raise error

        monkeypatch.setattr(closing.federation._blobs, "put", failing)
        closing.advance()
        assert phase_of(closing) is RoundPhase.FILTERED
        monkeypatch.undo()
        closing.advance()
        assert closing.federation.releases.newest().round == 1

    def test_a_kill_between_any_two_writes_leaves_the_same_round_to_go_on(
        self, make_case, start_round, monkeypatch
    ):
        """Kills the server after each of its writes in turn, and restarts it."""
        case = make_case(cohort_target=2)
        agents, manifest = start_round(case, 2)
        for agent, value in zip(agents, (1.0, 3.0), strict=True):
            agent.upload(manifest, agent.constant(value))
        n_kills = 0
        while case.federation.status().newest_release == 0:
            with monkeypatch.context() as patch:
                kill_after_first_write(patch, case.federation._store)
                with pytest.raises(KilledError):
                    case.federation.advance()
            n_kills += 1
            case.restart()
        assert n_kills >= 4  # unmasked, filtered, gated, published
        releases = case.federation.releases
        moved = releases.vector(releases.get(1)) - releases.vector(releases.get(0))
        np.testing.assert_allclose(moved, 2.0, rtol=1e-5)
        assert releases.get(1).aggregation.n_agents == 2
        assert releases.verify() == 1


class KilledError(BaseException):
    """As if the process had ended here."""


def kill_after_first_write(patch: pytest.MonkeyPatch, store: Store) -> None:
    from contextlib import contextmanager

    writing = store._database.writing

    @contextmanager
    def once():
        with writing() as connection:
            yield connection
        raise KilledError

    patch.setattr(store._database, "writing", once)


def test_a_round_number_has_one_manifest_digest(make_case, start_round, make_agents):
    case = make_case(cohort_target=2)
    (agent, *_), manifest = start_round(case, 2)
    for _ in range(3):
        make_agents(case, 1)
        case.advance(5)
        case.restart()
        again: RoundManifest | None = agent.round()
        assert again is not None
        assert (again.round, again.digest()) == (1, manifest.digest())

"""The evaluator's gate: who may ask and answer, what passes, what is left out, what stays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest

from aggregator_server.errors import ConfigError
from aggregator_server.filtering import FilterDecision
from aggregator_server.gating import CandidateList
from aggregator_server.private_recipes import PrivacyOptions, Profile
from aggregator_server.rounds import Gated
from aggregator_server.store.rows import IncidentKind
from aggregator_server.uploads import UPLOADS
from protocol.blocks import EvaluatorGate, FilterRule
from protocol.gating import EvaluationReport
from protocol.messages import EvaluationReply, EvaluationTask
from protocol.phases import RoundPhase
from protocol.problems import ProblemType
from protocol.signing import Signed, Signer, sign, verify
from protocol.wire import parse, sha256
from quant.adapter import flatten, from_safetensors

WAIT_S = EvaluatorGate.model_fields["wait_s"].default
GOOD, BAD = 1.0, 9.0
Scorer = Callable[[np.ndarray], Mapping[str, float | None]]


@dataclass
class FakeEvaluator:
    """An evaluator that measures nothing: losses are what `score` says of a candidate's vector."""

    agent: object
    score: Scorer

    @property
    def case(self):
        return self.agent.case

    @property
    def path(self) -> str:
        return f"{self.case.prefix}/evaluation"

    def reply(self) -> EvaluationReply:
        response = self.agent.request("GET", self.path)
        assert response.status_code == 200, response.text
        return parse(EvaluationReply, response.content)

    def task(self) -> EvaluationTask | None:
        signed = self.reply().task
        if signed is None:
            return None
        return verify(signed, "evaluation-task", key=self.case.manifest.server).body

    def fetch(self, ref, *, path: str = "evaluation/candidates") -> bytes:
        response = self.agent.request("GET", f"{self.case.prefix}/{path}/{ref.sha256.hex()}")
        assert response.status_code == 200, response.text
        assert sha256(response.content) == ref.sha256
        return response.content

    def losses(self, ref, **where) -> Mapping[str, float | None]:
        charter = self.case.federation.charter
        arrays = from_safetensors(self.fetch(ref, **where), charter.shapes)
        return self.score(flatten(arrays, charter.layout))

    def report(self, task: EvaluationTask, /, **changes: object) -> EvaluationReport:
        rows = [self.losses(task.current, path="blobs")]
        rows += [self.losses(ref) for ref in task.candidates]
        fields = {
            "federation": task.federation,
            "round": task.round,
            "task": task.digest(),
            "evaluator": self.agent.identity,
            "data": bytes(32),
            "current": task.current.sha256,
            "candidates": tuple(ref.sha256 for ref in task.candidates),
            "categories": tuple(rows[0]),
            "n_records": (5,) * len(rows[0]),
            "losses": tuple(tuple(row.values()) for row in rows),
        }
        return EvaluationReport(**{**fields, **changes})

    def send(self, report: EvaluationReport, *, signer: Signer | None = None):
        data = sign(signer or self.agent.signer, "evaluation", report).signed.canonical()
        return self.agent.request("POST", f"{self.path}/reports", data)

    def answer(self) -> EvaluationTask:
        """Judge what is asked now, and let the server go on."""
        task = self.task()
        assert task is not None
        assert self.send(self.report(task)).status_code == 200
        self.case.advance()
        return task


def around(center: float, *, within: float) -> Scorer:
    """Good as long as the adapter's values, on average, stay near a number."""

    def score(vector: np.ndarray) -> Mapping[str, float]:
        good = abs(float(vector.mean()) - center) <= within
        return {"closed_qa": GOOD if good else BAD, "open_qa": GOOD}

    return score


@pytest.fixture
def gated(make_case, make_agent, start_round):
    """A federation with a gate, its agents with an update each, and its evaluator."""

    def make(values, score: Scorer, **options: object):
        signer = Signer.generate()
        case = make_case(cohort_target=len(values), evaluator=signer.identity, **options)
        evaluator = FakeEvaluator(make_agent(case, signer), score)
        agents, manifest = start_round(case, len(values))
        for agent, value in zip(agents, values, strict=True):
            assert agent.upload(manifest, agent.constant(value)).status_code == 200
        case.advance()
        return case, evaluator, manifest

    return make


def moved(case) -> np.ndarray:
    releases = case.federation.releases
    return releases.vector(releases.newest()) - releases.vector(releases.get(0))


def incidents(case) -> list[IncidentKind]:
    return [row.kind for row in case.federation._store.incidents.all()]


class TestPassing:
    def test_what_passes_is_published_with_the_evaluators_report(self, gated):
        case, evaluator, manifest = gated([0.1, 0.1], around(0.0, within=1.0))
        assert case.federation.status().round.phase is RoundPhase.FILTERED
        assert case.federation.releases.newest().number == 0
        task = evaluator.answer()
        release = case.federation.releases.newest()
        assert release.number == 1
        report = verify(release.verdict.report, "evaluation", key=case.manifest.gate.evaluator).body
        assert release.adapter.sha256 in report.candidates
        assert report.task == task.digest()
        assert task.current == case.federation.releases.get(0).adapter
        assert task.round_digest == manifest.digest()
        np.testing.assert_allclose(moved(case), 0.1, rtol=1e-5)
        assert incidents(case) == []

    def test_the_evaluator_scores_the_very_bytes_that_are_published(self, gated):
        case, evaluator, _ = gated([0.25, 0.75], around(0.0, within=1.0))
        candidate = evaluator.task().candidates[0]
        data = evaluator.fetch(candidate)
        evaluator.answer()
        release = case.federation.releases.newest()
        assert case.federation.releases.file(release.adapter) == data

    def test_without_a_gate_nobody_is_asked(self, make_case, start_round):
        case = make_case(cohort_target=2)
        agents, manifest = start_round(case, 2)
        for agent in agents:
            agent.upload(manifest, agent.constant(1))
        case.advance()
        assert case.federation.releases.newest().verdict.rule == "none"

    def test_a_loss_may_rise_within_the_tolerance(self, gated):
        def score(vector):
            return {"one": 1.0 + 0.15 * (vector.mean() > 0.01), "two": 1.0, "three": 0.9}

        gate = EvaluatorGate.model_fields
        assert gate["max_loss_increase"].default < 0.15 / 3
        case, evaluator, _ = gated([0.1, 0.1], score)
        evaluator.answer()
        evaluator.answer()
        assert incidents(case) == [IncidentKind.GATE_REFUSED]

        def milder(vector):
            return {"one": 1.0 + 0.05 * (vector.mean() > 0.01), "two": 1.0, "three": 0.9}

        case, evaluator, _ = gated([0.1, 0.1], milder)
        evaluator.answer()
        assert case.federation.releases.newest().number == 1


class TestObjecting:
    def test_a_bad_update_is_found_by_leaving_it_out(self, gated):
        case, evaluator, _ = gated([0.1, 0.1, 0.1, 50.0], around(0.0, within=1.0))
        first = evaluator.answer()
        assert case.federation.releases.newest().number == 0
        second = evaluator.answer()
        assert (len(first.candidates), len(second.candidates)) == (1, 4)
        assert (first.attempt, second.attempt) == (1, 2)
        release = case.federation.releases.newest()
        assert release.verdict.n_left_out == len(release.rejected) == 1
        assert release.aggregation.n_agents == 3
        assert release.filter.n_rejected == 1
        np.testing.assert_allclose(moved(case), 0.1, rtol=1e-5)
        assert incidents(case) == [IncidentKind.GATE_LEFT_OUT]

    def test_of_those_that_pass_the_best_is_published(self, gated):
        def score(vector):
            return {"all": 1.0 + abs(float(vector.mean()) - 0.2) if vector.any() else 1.15}

        case, evaluator, _ = gated([0.1, 0.3, 5.0, 0.2], score, edit=strict)
        evaluator.answer()
        evaluator.answer()
        np.testing.assert_allclose(moved(case).mean(), 0.2, rtol=1e-4)

    def test_many_are_left_out_in_parts(self, gated):
        values = [0.1] * 19 + [500.0]
        case, evaluator, _ = gated(values, around(0.0, within=1.0))
        evaluator.answer()
        task = evaluator.answer()
        assert len(task.candidates) == 8
        release = case.federation.releases.newest()
        assert release.number == 1
        assert release.verdict.n_left_out in {2, 3}
        assert release.aggregation.n_agents == 20 - release.verdict.n_left_out

    def test_when_nothing_helps_the_old_release_stays_and_the_operator_is_told(self, gated):
        case, evaluator, manifest = gated([9.0, 9.0, 9.0], around(0.0, within=1.0))
        evaluator.answer()
        evaluator.answer()
        assert case.federation.releases.newest().number == 0
        row = case.federation._store.rounds.get(manifest.round)
        assert row.phase is RoundPhase.FAILED
        assert "rises from 1 to 9" in row.failure
        assert "any one of 3 parts" in row.failure
        (incident,) = case.federation._store.incidents.all()
        assert incident.kind is IncidentKind.GATE_REFUSED
        assert (incident.round, incident.text) == (manifest.round, row.failure)

    def test_the_next_round_starts_from_the_old_release(self, gated):
        case, evaluator, manifest = gated([9.0, 9.0], around(0.0, within=1.0))
        evaluator.answer()
        evaluator.answer()
        case.advance()
        row = case.federation._store.rounds.latest()
        assert row.number == manifest.round + 1
        assert case.federation.status().newest_release == 0

    def test_a_loss_that_is_not_finite_does_not_pass(self, gated):
        def score(vector):
            return {"one": None if vector.mean() > 0.01 else 1.0, "two": 1.0}

        case, evaluator, _ = gated([0.1, 0.1], score)
        evaluator.answer()
        evaluator.answer()
        assert case.federation.releases.newest().number == 0
        assert "not finite" in case.federation._store.incidents.all()[0].text

    def test_what_the_filter_removed_stays_removed(self, gated):
        rng = np.random.default_rng(0)
        values = [*(0.1 + 0.01 * rng.standard_normal(11)), 50.0]
        case, evaluator, manifest = gated(
            values, around(0.0, within=0.02), filter=FilterRule.ROBUST
        )
        decision = parse(
            FilterDecision, case.federation._store.rounds.get(manifest.round).filter_report
        )
        removed = {cell.transcript for cell in decision.cells if cell.removed is not None}
        assert removed
        evaluator.answer()
        first, second = case.federation._store.evaluations.of_round(manifest.round)
        for row in (first, second):
            for candidate in parse(CandidateList, row.candidates).candidates:
                assert not removed & set(candidate.accepted)
                assert candidate.filter.n_rejected >= len(removed)
        assert second.attempt == 2

    def test_an_operator_who_wants_no_second_try_gets_none(self, gated):
        case, evaluator, manifest = gated([9.0, 9.0], around(0.0, within=1.0), edit=no_retries)
        evaluator.answer()
        assert case.federation._store.rounds.get(manifest.round).phase is RoundPhase.FAILED


def test_p3_allows_no_gate(make_case):
    """A refused candidate's noisy mean was seen, and its fate is told: no ε counts that."""
    options = PrivacyOptions(epsilon=8.0, profile=Profile.CENTRAL, clip_norm=0.5)
    with pytest.raises(ConfigError, match=r'gate\.rule must be "none"'):
        make_case(privacy=options, evaluator=Signer.generate().identity)


def strict(config):
    return replace_gate(config, max_loss_increase=0.0, max_category_loss_increase=0.0)


def no_retries(config):
    return replace_gate(config, max_retries=0)


def replace_gate(config, **changes: object):
    return config.model_copy(update={"gate": config.gate.model_copy(update=changes)})


class TestSilence:
    def test_a_silent_evaluator_keeps_the_old_release(self, gated):
        case, _, manifest = gated([0.1, 0.1], around(0.0, within=1.0))
        case.advance(WAIT_S - 1)
        assert case.federation.status().round.phase is RoundPhase.FILTERED
        case.advance(2)
        row = case.federation._store.rounds.get(manifest.round)
        assert row.phase is RoundPhase.FAILED
        assert "did not answer within 3600 s" in row.failure
        assert incidents(case) == [IncidentKind.EVALUATOR_SILENT]

    def test_a_report_that_comes_too_late_counts_for_nothing(self, gated, problem_of):
        case, evaluator, _ = gated([0.1, 0.1], around(0.0, within=1.0))
        report = evaluator.report(evaluator.task())
        case.advance(WAIT_S + 1)
        assert problem_of(evaluator.send(report)) is ProblemType.ROUND_CLOSED
        assert case.federation.releases.newest().number == 0


class TestWhoMayAnswer:
    @pytest.fixture
    def waiting(self, gated):
        return gated([0.1, 0.1], around(0.0, within=1.0))

    def test_nobody_else_learns_of_candidates(self, waiting, make_agents, problem_of):
        case, evaluator, _ = waiting
        sha = evaluator.task().candidates[0].sha256.hex()
        (member,) = make_agents(case, 1)
        for path in ("evaluation", f"evaluation/candidates/{sha}"):
            assert (
                problem_of(member.request("GET", f"{case.prefix}/{path}"))
                is ProblemType.UNKNOWN_AGENT
            )
        assert (
            problem_of(member.request("GET", f"{case.prefix}/blobs/{sha}")) is ProblemType.NOT_FOUND
        )
        unsigned = evaluator.agent.request("GET", f"{case.prefix}/evaluation", signed=False)
        assert problem_of(unsigned) is ProblemType.UNSIGNED

    def test_nobody_else_may_report(self, waiting, make_agents, problem_of):
        case, evaluator, _ = waiting
        (member,) = make_agents(case, 1)
        report = evaluator.report(evaluator.task(), evaluator=member.identity)
        liar = replace(evaluator, agent=member)
        assert problem_of(liar.send(report)) is ProblemType.UNKNOWN_AGENT

    def test_a_report_in_anothers_name_or_hand_is_refused(self, waiting, make_agents, problem_of):
        case, evaluator, _ = waiting
        report = evaluator.report(evaluator.task())
        (member,) = make_agents(case, 1)
        forged = evaluator.send(report, signer=member.signer)
        assert problem_of(forged) is ProblemType.BAD_SIGNATURE
        other = report.model_copy(update={"evaluator": member.identity})
        assert problem_of(evaluator.send(other)) is ProblemType.BAD_SIGNATURE

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"task": bytes(32)}, ProblemType.NOT_FOUND),
            ({"round": 9}, ProblemType.NOT_FOUND),
            ({"candidates": (bytes(32),)}, ProblemType.BAD_MESSAGE),
            ({"current": bytes(32)}, ProblemType.BAD_MESSAGE),
            ({"federation": bytes(16)}, ProblemType.UNKNOWN_FEDERATION),
        ],
    )
    def test_a_report_on_something_else_is_refused(self, waiting, problem_of, changes, problem):
        _, evaluator, _ = waiting
        report = evaluator.report(evaluator.task(), **changes)
        assert problem_of(evaluator.send(report)) is problem
        assert evaluator.task() is not None

    def test_the_same_report_again_changes_nothing_and_another_is_refused(
        self, waiting, problem_of
    ):
        _, evaluator, _ = waiting
        report = evaluator.report(evaluator.task())
        first = evaluator.send(report)
        assert evaluator.send(report).content == first.content
        other = report.model_copy(update={"data": bytes([1]) * 32})
        assert problem_of(evaluator.send(other)) is ProblemType.CONFLICT

    def test_a_replayed_request_is_refused(self, waiting, problem_of):
        case, evaluator, _ = waiting
        nonce = bytes(range(16))
        path = f"{case.prefix}/evaluation"
        assert evaluator.agent.request("GET", path, nonce=nonce).status_code == 200
        again = evaluator.agent.request("GET", path, nonce=nonce)
        assert problem_of(again) is ProblemType.REPLAYED

    def test_a_federation_without_a_gate_has_no_such_thing(
        self, make_case, make_agents, problem_of
    ):
        case = make_case()
        (member,) = make_agents(case, 1)
        response = member.request("GET", f"{case.prefix}/evaluation")
        assert problem_of(response) is ProblemType.NOT_FOUND

    def test_a_range_of_a_candidate_is_served_and_kept_by_nobody(self, waiting):
        case, evaluator, _ = waiting
        ref = evaluator.task().candidates[0]
        response = evaluator.agent.request(
            "GET",
            f"{case.prefix}/evaluation/candidates/{ref.sha256.hex()}",
            headers={"Range": "bytes=10-19"},
        )
        assert (response.status_code, len(response.content)) == (206, 10)
        assert response.headers["cache-control"] == "no-store"


class TestKilled:
    def test_a_killed_server_asks_about_the_same_candidate(self, gated):
        case, evaluator, _ = gated([0.1, 0.1], around(0.0, within=1.0))
        before = evaluator.task()
        case.restart()
        assert evaluator.task() == before
        case.advance()
        assert evaluator.task() == before
        evaluator.answer()
        assert case.federation.releases.newest().adapter == before.candidates[0]

    def test_a_report_survives_a_kill(self, gated):
        case, evaluator, _ = gated([0.1, 0.1], around(0.0, within=1.0))
        assert evaluator.send(evaluator.report(evaluator.task())).status_code == 200
        case.restart()
        case.advance()
        assert case.federation.releases.newest().number == 1

    def test_a_server_killed_between_verdict_and_release_publishes_what_passed(
        self, gated, monkeypatch
    ):
        case, evaluator, _ = gated([0.1, 0.1], around(0.0, within=1.0))
        task = evaluator.task()
        assert evaluator.send(evaluator.report(task)).status_code == 200
        kill = pytest.MonkeyPatch()
        kill.setattr(Gated, "work", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            case.advance()
        kill.undo()
        case.restart()
        case.advance()
        release = case.federation.releases.newest()
        assert (release.number, release.adapter) == (1, task.candidates[0])

    def test_files_of_candidates_that_did_not_pass_are_deleted(self, gated, blob_files):
        case, evaluator, _ = gated([0.1, 0.1, 0.1, 50.0], around(0.0, within=1.0))
        evaluator.answer()
        refs = evaluator.task().candidates
        names = {f"adapters/{ref.sha256.hex()}" for ref in refs}
        assert names <= blob_files(case)
        evaluator.answer()
        release = case.federation.releases.newest()
        assert names & blob_files(case) == {f"adapters/{release.adapter.sha256.hex()}"}
        case.federation.releases.verify()
        for ref in (release.adapter, release.sent, release.config):
            assert len(case.federation.releases.file(ref)) == ref.n_bytes

    def test_updates_are_deleted_once_the_round_is_over(self, gated, blob_files):
        case, evaluator, _ = gated([0.1, 0.1], around(0.0, within=1.0))
        assert any(name.startswith(UPLOADS) for name in blob_files(case))
        evaluator.answer()
        assert not any(name.startswith(UPLOADS) for name in blob_files(case))

    def test_a_rollback_ends_a_round_that_waits(self, gated):
        case, evaluator, manifest = gated([0.1, 0.1], around(0.0, within=1.0))
        case.federation.releases.roll_back(0)
        case.advance()
        row = case.federation._store.rounds.get(manifest.round)
        assert row.phase is RoundPhase.FAILED
        assert evaluator.task() is None


def test_the_signed_task_names_what_is_asked(gated):
    _, evaluator, _ = gated([0.1, 0.1], around(0.0, within=1.0))
    signed = evaluator.reply().task
    assert isinstance(signed, Signed)
    assert evaluator.reply().finished is False

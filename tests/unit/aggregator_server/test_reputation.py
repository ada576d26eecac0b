"""Evidence over rounds: who is suspected, who is not, and what the operator makes of it."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from aggregator_server.cli import app
from aggregator_server.evidence import observations_of
from aggregator_server.reputation import MIN_REMOVED, Observation, reputations
from aggregator_server.store.rows import IncidentKind
from protocol.blocks import FilterRule
from protocol.messages import TrainTask, WaitReason
from protocol.wire import b64u_encode


def name_of(number: int) -> bytes:
    return number.to_bytes(2, "big") * 16


def history(
    n_agents: int,
    n_members: int,
    *,
    bad: set[int],
    p_bad: float,
    p_clean: float,
    n_rounds: int,
    seed: int,
) -> list[Observation]:
    """Rounds of random cells, removed with one chance if a bad member is in them, else another."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n_rounds):
        order = rng.permutation(n_agents)
        for start in range(0, n_agents - n_members + 1, n_members):
            members = order[start : start + n_members]
            chance = p_bad if bad & set(members.tolist()) else p_clean
            found.append(
                Observation(
                    members=tuple(name_of(int(i)) for i in members),
                    removed=bool(rng.random() < chance),
                )
            )
    return found


def suspects(observations: list[Observation]) -> set[bytes]:
    return {one.agent for one in reputations(observations) if one.is_suspected}


@pytest.mark.parametrize(("n_agents", "n_members"), [(20, 1), (40, 5), (80, 10)])
def test_whoever_spoils_cells_again_and_again_is_suspected(n_agents: int, n_members: int) -> None:
    bad = {3, 7}
    for seed in range(5):
        found = suspects(
            history(n_agents, n_members, bad=bad, p_bad=0.9, p_clean=0.1, n_rounds=30, seed=seed)
        )
        assert {name_of(i) for i in bad} <= found
        assert len(found - {name_of(i) for i in bad}) <= 1


@pytest.mark.parametrize(("n_agents", "n_members"), [(20, 1), (40, 5), (80, 10)])
def test_where_cells_are_removed_by_chance_hardly_anyone_is(n_agents: int, n_members: int) -> None:
    n_false = [
        len(
            suspects(
                history(
                    n_agents, n_members, bad=set(), p_bad=0, p_clean=0.2, n_rounds=30, seed=seed
                )
            )
        )
        for seed in range(10)
    ]
    assert sum(n_false) <= 3


def test_one_bad_round_convinces_nobody() -> None:
    always = [Observation(members=(name_of(1),), removed=True)] * (MIN_REMOVED - 1)
    others = [Observation(members=(name_of(i),), removed=False) for i in range(2, 200)]
    assert suspects([*always, *others]) == set()


def test_guarantee_1_the_order_of_observations_does_not_matter() -> None:
    found = history(20, 4, bad={1}, p_bad=0.8, p_clean=0.1, n_rounds=10, seed=1)
    for one, other in zip(reputations(found), reputations(found[::-1]), strict=True):
        assert (one.agent, one.n_removed) == (other.agent, other.n_removed)
        assert one.log_odds == pytest.approx(other.log_odds, abs=1e-6)


def test_guarantee_2_a_member_of_no_removed_unit_is_not_to_blame() -> None:
    seen = [
        Observation(members=(name_of(1), name_of(2)), removed=True),
        Observation(members=(name_of(3), name_of(4)), removed=False),
    ]
    by_agent = {one.agent: one for one in reputations(seen)}
    assert by_agent[name_of(3)].log_odds == 0.0
    assert by_agent[name_of(1)].log_odds > 0.0


def test_the_mode_is_where_the_gradient_vanishes() -> None:
    """Against the posterior written out: the sum over observations, and a normal prior."""
    found = history(6, 2, bad={0}, p_bad=0.9, p_clean=0.2, n_rounds=12, seed=3)
    effects = {one.agent: one.log_odds for one in reputations(found)}
    agents = sorted(effects)
    n_removed = sum(one.removed for one in found)
    rate = (n_removed + 0.5) / (len(found) + 1)
    centre = np.log(rate / (1 - rate))

    def gradient(base: float) -> dict[bytes, float]:
        slope = {agent: -effects[agent] / 1.5**2 for agent in agents}
        slope[b"base"] = -(base - centre) / 9.0
        for one in found:
            chance = 1 / (1 + np.exp(-base - sum(effects[agent] for agent in one.members)))
            for agent in (*one.members, b"base"):
                slope[agent] += one.removed - chance
        return slope

    low, high = -20.0, 20.0
    for _ in range(200):
        base = (low + high) / 2
        low, high = (base, high) if gradient(base)[b"base"] > 0 else (low, base)
    blamed = {agent for one in found if one.removed for agent in one.members}
    assert blamed == set(agents)
    assert max(abs(slope) for slope in gradient(base).values()) < 1e-6


def test_nothing_seen_is_nothing_known() -> None:
    assert reputations([]) == ()


class TestQuarantine:
    @pytest.fixture
    def judged(self, make_case, make_agents):
        """Rounds of twelve agents, of which the first sends the opposite of all others."""

        def make(*, quarantine: bool, n_rounds: int):
            def edit(config):
                server = config.server.model_copy(update={"quarantine": quarantine})
                return config.model_copy(update={"server": server})

            case = make_case(
                cohort_target=12, min_cohort=8, n_rounds=50, filter=FilterRule.ROBUST, edit=edit
            )
            agents = make_agents(case, 12)
            case.advance()
            rng = np.random.default_rng(5)
            n_values = case.federation.charter.layout.n_values
            for _ in range(n_rounds):
                common = rng.standard_normal(n_values)
                for number, agent in enumerate(agents):
                    manifest = agent.round()
                    if manifest is None:
                        continue
                    vector = common + 0.3 * rng.standard_normal(n_values)
                    vector = -8.0 * common if number == 0 else vector
                    agent.upload(manifest, vector.astype(np.float32), weight=3)
                case.advance(case.manifest.rounds.deadline_s)
                for agent in agents:
                    agent.poll()
                case.advance()
            return case, agents

        return make

    def test_whom_the_filter_removes_again_and_again_is_set_aside(self, judged):
        case, agents = judged(quarantine=True, n_rounds=14)
        attacker = agents[0]
        members = {row.identity: row for row in case.federation.membership.members()}
        set_aside = [row for row in members.values() if row.quarantined_at is not None]
        assert [row.identity for row in set_aside] == [attacker.identity]
        assert attacker.task().task.reason is WaitReason.SET_ASIDE
        assert any(isinstance(agent.task().task, TrainTask) for agent in agents[1:])
        kinds = [row.kind for row in case.federation.incidents()]
        assert kinds == [IncidentKind.QUARANTINED]

    def test_a_person_lets_it_back_in_and_the_past_no_longer_counts(self, judged):
        case, agents = judged(quarantine=True, n_rounds=14)
        name = b64u_encode(agents[0].identity)
        result = CliRunner().invoke(app, ["agents", "readmit", str(case.directory), name[:10]])
        assert result.exit_code == 0, result.output
        assert agents[0].identity not in case.federation.evidence.reputations()
        rows = {row.identity: row for row in case.federation.membership.members()}
        assert rows[agents[0].identity].quarantined_at is None
        assert len(case.federation.incidents()) == 1

    def test_unless_the_operator_asks_for_it_nobody_is_set_aside(self, judged):
        case, agents = judged(quarantine=False, n_rounds=14)
        rows = case.federation.membership.members()
        assert all(row.quarantined_at is None for row in rows)
        assert case.federation.evidence.reputations()[agents[0].identity].is_suspected
        shown = CliRunner().invoke(app, ["agents", "list", str(case.directory)]).stdout
        (line,) = [line for line in shown.splitlines() if line.endswith("suspected")]
        assert b64u_encode(agents[0].identity) in line
        told = CliRunner().invoke(app, ["agents", "list", str(case.directory), "--json", "-"])
        by_name = {row["agent"]: row["evidence"] for row in json.loads(told.stdout)}
        assert by_name[b64u_encode(agents[0].identity)]["is_suspected"] is True

    def test_a_few_rounds_are_not_enough(self, judged):
        case, _ = judged(quarantine=True, n_rounds=2)
        assert all(row.quarantined_at is None for row in case.federation.membership.members())

    def test_evidence_of_a_round_names_its_units(self, judged):
        case, agents = judged(quarantine=False, n_rounds=1)
        (row,) = case.federation._store.rounds.judged(limit=10)
        seen = observations_of(row, {})
        assert sorted(agent for one in seen for agent in one.members) == sorted(
            agent.identity for agent in agents
        )
        removed = [one.members for one in seen if one.removed]
        assert (agents[0].identity,) in removed
        assert observations_of(row, {agents[0].identity: 2})
        later = {agent.identity: 2 for agent in agents}
        assert observations_of(row, later) == []


def test_what_the_gate_left_out_is_one_unit(make_case, make_agent, start_round):
    from aggregator_server.filtering import FilterDecision, FilteredCell
    from aggregator_server.store.rows import JudgedRow

    case = make_case(cohort_target=2)
    agents, manifest = start_round(case, 2)
    for agent in agents:
        agent.upload(manifest, agent.constant(1))
    case.advance()
    row = case.federation._store.rounds.get(manifest.round)
    cells = {bytes([n]) * 32: (name_of(2 * n), name_of(2 * n + 1)) for n in range(4)}
    decision = FilterDecision(
        report={"rule": "robust", "n_cells": 4, "n_rejected": 1},
        cells=tuple(
            FilteredCell(transcript=transcript, factor=1.0, removed="apart" if place == 3 else None)
            for place, transcript in enumerate(cells)
        ),
    )
    passed = json.loads(row.passed)
    passed["candidate"]["left_out"] = [b64u_encode(name) for name in list(cells)[:2]]
    judged = JudgedRow(
        number=1,
        filter_report=decision.canonical().decode(),
        passed=json.dumps(passed),
        cells=tuple(cells.items()),
    )
    seen = {one.members: one.removed for one in observations_of(judged, {})}
    first, second, third, fourth = cells.values()
    assert seen == {third: False, fourth: True, (*first, *second): True}

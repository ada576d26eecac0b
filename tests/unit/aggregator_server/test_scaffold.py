"""SCAFFOLD on the server: c is the mean of the agents' variates, of those whose updates count."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator_server.aggregation.scaffold import ControlBook, renewed
from aggregator_server.controls import stored_control
from aggregator_server.errors import AggregationError, Refusal
from aggregator_server.rounds import Gated
from aggregator_server.store.rows import BlobRole
from privacy.updates import PlainUpdate, l2_norm
from protocol.blocks import FilterRule, TrainingBlock
from protocol.chain import Release
from protocol.problems import ProblemType
from protocol.wire import parse
from quant.adapter import flatten, from_safetensors

N_VALUES = 20
AGENTS = [bytes([i]) * 32 for i in range(6)]


def loads(change):
    return lambda: change.astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(
    rounds=st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_guarantee_1_c_is_the_mean_of_all_who_ever_counted(rounds, seed):
    rng = np.random.default_rng(seed)
    own = {agent: np.zeros(N_VALUES, np.float32) for agent in AGENTS}
    control, book = np.zeros(N_VALUES, np.float32), ControlBook()
    seen = set()
    for who in rounds:
        changes = {}
        for i in who:
            following = rng.standard_normal(N_VALUES).astype(np.float32)
            changes[AGENTS[i]] = loads(following - own[AGENTS[i]])
            own[AGENTS[i]] = following
            seen.add(AGENTS[i])
        control, book = renewed(control, book, changes, capped=False)
        assert book.agents == tuple(sorted(seen))
        expected = np.mean([own[agent] for agent in seen], axis=0)
        np.testing.assert_allclose(control, expected, atol=1e-5)


def test_guarantee_2_with_a_cap_one_agent_moves_the_sum_by_the_median_length():
    changes = {agent: loads(np.full(N_VALUES, 1.0)) for agent in AGENTS[:5]}
    median = l2_norm(changes[AGENTS[0]]())
    changes[AGENTS[5]] = loads(np.full(N_VALUES, -1e6))
    zero = np.zeros(N_VALUES, np.float32)
    control, _ = renewed(zero, ControlBook(), changes, capped=True)
    np.testing.assert_allclose(control, (5.0 - 1.0) / 6, rtol=1e-5)
    assert l2_norm(control * 6) <= 6 * median
    plain, _ = renewed(zero, ControlBook(), changes, capped=False)
    assert plain[0] < -1e5


def test_nobody_changes_nothing():
    zero = np.zeros(N_VALUES, np.float32)
    control, book = renewed(zero, ControlBook(), {}, capped=True)
    assert not control.any()
    assert book == ControlBook()


@pytest.mark.parametrize("change", [np.zeros(3), np.full(N_VALUES, np.nan)])
def test_a_change_of_another_length_or_not_finite_is_refused(change):
    zero = np.zeros(N_VALUES, np.float32)
    with pytest.raises(AggregationError, match="expected"):
        renewed(zero, ControlBook(), {AGENTS[0]: loads(change)}, capped=False)


@pytest.fixture
def make_scaffold_case(make_case):
    def make(**options):
        def edit(config):
            training = TrainingBlock(**{**config.training.model_dump(), "scaffold": True})
            return config.model_copy(update={"training": training})

        return make_case(edit=edit, **options)

    return make


def upload_all(agents, manifest, updates, *, weights=None):
    for i, (agent, update) in enumerate(zip(agents, updates, strict=True)):
        weight = weights[i] if weights else 3 + i
        assert agent.upload(manifest, update.body(), weight=weight).status_code == 200


def make_update(rng, case):
    n_values = case.federation.charter.layout.tensors.n_values
    vector, control = rng.standard_normal((2, n_values)).astype(np.float32)
    return PlainUpdate(vector=vector, weight=1, control=control)


class TestRounds:
    def test_a_round_publishes_the_mean_of_the_variates_beside_the_mean_of_the_updates(
        self, make_scaffold_case, start_round
    ):
        case = make_scaffold_case(cohort_target=3, n_rounds=3)
        agents, manifest = start_round(case, 3)
        tensors = case.federation.charter.layout.tensors
        assert manifest.update_n_bytes == 2 * tensors.n_bytes
        rng = np.random.default_rng(1)
        releases = case.federation.releases
        own = [np.zeros(tensors.n_values, np.float32) for _ in agents]
        for number in (1, 2):
            updates = [make_update(rng, case) for _ in agents]
            own = [c + update.control for c, update in zip(own, updates, strict=True)]
            before = releases.vector(releases.newest()).astype(np.float64)
            upload_all(agents, manifest, updates)
            case.advance()
            release = releases.newest()
            assert release.number == number
            weights = np.array([3.0, 4.0, 5.0]) / 12
            mean = sum(
                w * u.vector.astype(np.float64) for w, u in zip(weights, updates, strict=True)
            )
            np.testing.assert_allclose(releases.vector(release) - before, mean, atol=1e-5)
            response = agents[0].request(
                "GET", f"{case.prefix}/blobs/{release.control.sha256.hex()}", signed=False
            )
            shapes = {slot.name: slot.shape for slot in tensors.slots}
            served = flatten(from_safetensors(response.content, shapes), tensors)
            np.testing.assert_allclose(served, np.mean(own, axis=0), atol=1e-5)
            assert release.aggregation.update_norm == pytest.approx(np.linalg.norm(mean), rel=1e-4)
            manifest = agents[0].task(after=manifest.round).task.round.body

    def test_the_book_is_served_to_nobody(self, make_scaffold_case, start_round, problem_of):
        case = make_scaffold_case(cohort_target=2)
        agents, manifest = start_round(case, 2)
        rng = np.random.default_rng(1)
        upload_all(agents, manifest, [make_update(rng, case) for _ in agents])
        case.advance()
        row = case.federation._store.releases.blob_of(1, BlobRole.CONTROL_BOOK)
        book = parse(ControlBook, case.federation.releases.hidden_file(1, BlobRole.CONTROL_BOOK))
        assert set(book.agents) == {agent.identity for agent in agents}
        with pytest.raises(Refusal):
            case.federation.releases.blob_n_bytes(row.sha256)
        response = agents[0].request("GET", f"{case.prefix}/blobs/{row.sha256.hex()}")
        assert problem_of(response) is ProblemType.NOT_FOUND

    def test_who_the_filter_leaves_out_changes_c_as_little_as_the_adapter(
        self, make_scaffold_case, start_round
    ):
        case = make_scaffold_case(cohort_target=12, filter=FilterRule.ROBUST)
        agents, manifest = start_round(case, 12)
        rng = np.random.default_rng(1)
        common = make_update(rng, case)
        updates = [
            PlainUpdate(
                vector=common.vector + 0.5 * make_update(rng, case).vector,
                weight=1,
                control=common.control + 0.1 * make_update(rng, case).control,
            )
            for _ in agents[:-1]
        ]
        hostile = PlainUpdate(
            vector=-50.0 * common.vector, weight=1, control=np.float32(1e4) * common.control
        )
        upload_all(agents, manifest, [*updates, hostile], weights=[3] * 12)
        case.advance()
        release = case.federation.releases.newest()
        assert release.filter.n_rejected >= 1
        tensors = case.federation.charter.layout.tensors
        control, book = stored_control(case.federation.releases, release, tensors)
        assert agents[-1].identity not in book.agents
        assert len(book.agents) == 12 - release.filter.n_rejected
        error = np.linalg.norm(control - common.control) / np.linalg.norm(common.control)
        assert error < 0.1

    def test_a_killed_server_publishes_the_same_c(
        self, make_scaffold_case, start_round, monkeypatch
    ):

        case = make_scaffold_case(cohort_target=2)
        agents, manifest = start_round(case, 2)
        rng = np.random.default_rng(1)
        updates = [make_update(rng, case) for _ in agents]
        upload_all(agents, manifest, updates)

        class KillError(BaseException):
            pass

        def kill(self, row):
            raise KillError

        with monkeypatch.context() as patch:
            patch.setattr(Gated, "work", kill)
            with pytest.raises(KillError):
                case.advance()
        case.restart()
        case.advance()
        release = case.federation.releases.newest()
        control, book = stored_control(
            case.federation.releases, release, case.federation.charter.layout.tensors
        )
        np.testing.assert_allclose(
            control, np.mean([u.control for u in updates], axis=0), atol=1e-6
        )
        assert len(book.agents) == 2

    def test_a_rollback_takes_c_and_its_book_back(self, make_scaffold_case, start_round):
        case = make_scaffold_case(cohort_target=2, n_rounds=3)
        agents, manifest = start_round(case, 2)
        rng = np.random.default_rng(1)
        for _ in range(2):
            upload_all(agents, manifest, [make_update(rng, case) for _ in agents])
            case.advance()
            manifest = agents[0].task(after=manifest.round).task.round.body
        releases, tensors = case.federation.releases, case.federation.charter.layout.tensors
        first = releases.get(1)
        rolled = releases.roll_back(1)
        assert isinstance(rolled, Release)
        assert rolled.control == first.control != releases.get(2).control
        ours, theirs = (stored_control(releases, found, tensors) for found in (rolled, first))
        assert ours[0].tobytes() == theirs[0].tobytes()
        assert ours[1] == theirs[1]
        zero, nobody = stored_control(releases, releases.get(0), tensors)
        assert not zero.any()
        assert nobody == ControlBook()


def test_without_scaffold_no_release_has_a_control(make_case, start_round):
    case = make_case(cohort_target=2)
    agents, manifest = start_round(case, 2)
    for agent in agents:
        agent.upload(manifest, agent.constant(1.0))
    case.advance()
    release = case.federation.releases.newest()
    assert release.number == 1
    assert release.control is None
    assert "control" not in release.as_json()

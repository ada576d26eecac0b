"""Uploads: what is accepted, what is refused, and what is left on disk."""

import errno

import numpy as np
import pytest

from aggregator_server import blobs as blobs_module
from aggregator_server.errors import NoSpaceError
from protocol.limits import PART_BYTES
from protocol.messages import UploadState, UploadStatus
from protocol.problems import ProblemType
from protocol.signing import Signer, sign
from protocol.wire import parse, sha256


@pytest.fixture
def case(make_case):
    return make_case(cohort_target=3, min_cohort=2)


@pytest.fixture
def selected(case, start_round):
    """The agents of an open round, and its manifest."""
    return start_round(case, 3)


@pytest.fixture
def big_case(make_case, make_base_of):
    """An update of three parts, the last one shorter."""
    return make_case(base=make_base_of(size=20_000), rank=16, cohort_target=2)


def status_of(response) -> UploadStatus:
    assert response.status_code == 200, response.text
    return parse(UploadStatus, response.content)


def uploads_on_disk(blob_files, case) -> set[str]:
    return {name for name in blob_files(case) if name.startswith("uploads/")}


def body_of(agent, value: float = 1.0) -> bytes:
    return agent.constant(value).astype("<f4").tobytes()


def test_an_upload_goes_from_header_to_acceptance(selected):
    (agent, *_), manifest = selected
    data = body_of(agent)
    header = agent.header(manifest, data)
    assert status_of(agent.begin(header)) == UploadStatus(state=UploadState.RECEIVING, missing=(0,))
    assert status_of(agent.put(header, 0, data)).missing == ()
    assert status_of(agent.complete(header)).state is UploadState.ACCEPTED
    assert status_of(agent.upload_status(header)).state is UploadState.ACCEPTED


def test_parts_arrive_in_any_order_and_again(big_case, start_round):
    (agent, *_), manifest = start_round(big_case, 2)
    data = np.random.default_rng(0).bytes(manifest.update_n_bytes)
    data = np.frombuffer(data, np.uint8).astype("<f4").tobytes()[: manifest.update_n_bytes]
    header = agent.header(manifest, data)
    assert header.n_parts == 3
    parts = [data[n * PART_BYTES : (n + 1) * PART_BYTES] for n in range(3)]
    assert status_of(agent.begin(header)).missing == (0, 1, 2)
    assert status_of(agent.put(header, 2, parts[2])).missing == (0, 1)
    assert status_of(agent.put(header, 0, parts[0])).missing == (1,)
    assert status_of(agent.put(header, 0, parts[0])).missing == (1,)
    response = agent.complete(header)
    assert response.status_code == ProblemType.INCOMPLETE.status
    assert "1 parts are missing, the first is 1" in response.json()["detail"]
    assert status_of(agent.put(header, 1, parts[1])).missing == ()
    assert status_of(agent.complete(header)).state is UploadState.ACCEPTED
    assert big_case.federation.status().bytes_up == len(data)


def test_an_acknowledged_part_survives_a_kill(big_case, start_round):
    (agent, *_), manifest = start_round(big_case, 2)
    data = bytes(manifest.update_n_bytes)
    header = agent.header(manifest, data)
    agent.begin(header)
    agent.put(header, 1, data[:PART_BYTES])
    big_case.restart()
    assert status_of(agent.upload_status(header)).missing == (0, 2)


def test_an_accepted_upload_survives_a_kill(case, selected):
    (agent, *_), manifest = selected
    agent.upload(manifest, agent.constant(1))
    case.restart()
    header = agent.header(manifest, body_of(agent))
    assert status_of(agent.complete(header)).state is UploadState.ACCEPTED
    assert case.federation.status().round.n_uploads == 1


class TestIdempotency:
    def test_the_same_header_gets_the_stored_answer(self, selected):
        (agent, *_), manifest = selected
        data = body_of(agent)
        header = agent.header(manifest, data)
        agent.begin(header)
        agent.put(header, 0, data)
        assert status_of(agent.begin(header)).missing == ()
        agent.complete(header)
        assert status_of(agent.begin(header)).state is UploadState.ACCEPTED
        assert status_of(agent.put(header, 0, data)).state is UploadState.ACCEPTED
        assert status_of(agent.complete(header)).state is UploadState.ACCEPTED

    def test_another_header_for_the_same_attempt_is_a_conflict(self, selected, problem_of):
        (agent, *_), manifest = selected
        agent.begin(agent.header(manifest, body_of(agent, 1)))
        response = agent.begin(agent.header(manifest, body_of(agent, 2)))
        assert problem_of(response) is ProblemType.CONFLICT

    def test_another_body_for_a_journalled_part_is_a_conflict(
        self, selected, problem_of, case, blob_files
    ):
        (agent, *_), manifest = selected
        header = agent.header(manifest, body_of(agent, 1))
        agent.begin(header)
        agent.put(header, 0, body_of(agent, 1))
        before = blob_files(case)
        response = agent.put(header, 0, body_of(agent, 2))
        assert problem_of(response) is ProblemType.CONFLICT
        assert blob_files(case) == before

    def test_a_new_attempt_replaces_an_incomplete_one_and_its_parts(
        self, big_case, start_round, problem_of, blob_files
    ):
        (agent, *_), manifest = start_round(big_case, 2)
        data = bytes(manifest.update_n_bytes)
        first = agent.header(manifest, data, attempt=1)
        agent.begin(first)
        agent.put(first, 0, data[:PART_BYTES])
        assert len(uploads_on_disk(blob_files, big_case)) == 1
        second = agent.header(manifest, data, attempt=2)
        assert status_of(agent.begin(second)).missing == (0, 1, 2)
        assert not uploads_on_disk(blob_files, big_case)
        late = agent.put(first, 1, data[:PART_BYTES])
        assert problem_of(late) is ProblemType.CONFLICT
        assert not uploads_on_disk(blob_files, big_case)
        assert problem_of(agent.begin(agent.header(manifest, data))) is ProblemType.CONFLICT

    def test_an_attempt_older_than_the_newest_is_over(self, selected, problem_of):
        (agent, *_), manifest = selected
        agent.begin(agent.header(manifest, body_of(agent), attempt=5))
        response = agent.begin(agent.header(manifest, body_of(agent), attempt=4))
        assert problem_of(response) is ProblemType.CONFLICT

    def test_a_second_attempt_after_acceptance_is_consumed(self, selected, problem_of, case):
        (agent, *_), manifest = selected
        agent.upload(manifest, agent.constant(1))
        response = agent.upload(manifest, agent.constant(2), attempt=2)
        assert problem_of(response) is ProblemType.CONSUMED
        assert case.federation.status().round.n_uploads == 1


class TestBadHeaders:
    @pytest.mark.parametrize(
        ("field", "value", "problem"),
        [
            ("round_digest", bytes(32), ProblemType.BAD_REQUEST),
            ("layout", bytes(32), ProblemType.BAD_REQUEST),
            ("weight", 10_001, ProblemType.BAD_REQUEST),
            ("attempt", 1_001, ProblemType.BAD_REQUEST),
            ("body_n_bytes", 4, ProblemType.BAD_REQUEST),
            ("federation", bytes(16), ProblemType.UNKNOWN_FEDERATION),
            ("agent", bytes(32), ProblemType.BAD_SIGNATURE),
            ("round", 99, ProblemType.NOT_FOUND),
        ],
    )
    def test_bad_header_is_refused(self, selected, problem_of, case, field, value, problem):
        (agent, *_), manifest = selected
        header = agent.header(manifest, body_of(agent)).model_copy(update={field: value})
        assert problem_of(agent.begin(header)) is problem
        assert case.federation.status().round.n_uploading == 0

    def test_bad_header_signed_by_another_key(self, selected, problem_of, case):
        (agent, *_), manifest = selected
        header = agent.header(manifest, body_of(agent))
        data = sign(Signer.generate(), "upload", header).signed.canonical()
        response = agent.request("POST", f"{case.prefix}/uploads", data)
        assert problem_of(response) is ProblemType.BAD_SIGNATURE

    def test_bad_header_signed_as_another_kind_of_document(self, selected, problem_of, case):
        (agent, *_), manifest = selected
        header = agent.header(manifest, body_of(agent))
        data = sign(agent.signer, "withdrawal", header).signed.canonical()
        response = agent.request("POST", f"{case.prefix}/uploads", data)
        assert problem_of(response) is ProblemType.BAD_SIGNATURE

    def test_with_uniform_weighting_every_weight_is_one(self, make_case, start_round, problem_of):
        from protocol.blocks import AggregationBlock, Weighting

        rule = AggregationBlock(weighting=Weighting.UNIFORM)
        case = make_case(edit=lambda config: config.model_copy(update={"aggregation": rule}))
        (agent, *_), manifest = start_round(case, 2)
        response = agent.upload(manifest, agent.constant(1), weight=2)
        assert problem_of(response) is ProblemType.BAD_REQUEST
        assert agent.upload(manifest, agent.constant(1), weight=1).status_code == 200


class TestBadBodies:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_bad_update_with_a_value_that_is_not_finite(
        self, selected, problem_of, case, blob_files, value
    ):
        (agent, *_), manifest = selected
        vector = agent.constant(1)
        vector[-1] = value
        assert problem_of(agent.upload(manifest, vector)) is ProblemType.NOT_FINITE
        assert not uploads_on_disk(blob_files, case)
        header = agent.header(manifest, vector.astype("<f4").tobytes())
        assert problem_of(agent.upload_status(header)) is ProblemType.NOT_FINITE
        assert problem_of(agent.complete(header)) is ProblemType.NOT_FINITE
        assert agent.upload(manifest, agent.constant(1), attempt=2).status_code == 200

    def test_bad_update_that_overflows_once_it_is_weighted(self, selected, problem_of):
        (agent, *_), manifest = selected
        response = agent.upload(manifest, agent.constant(1e38), weight=10)
        assert problem_of(response) is ProblemType.NOT_FINITE

    def test_bad_digest_deletes_the_parts_and_asks_for_them_again(
        self, selected, problem_of, case, blob_files
    ):
        (agent, *_), manifest = selected
        header = agent.header(manifest, body_of(agent, 1))
        agent.begin(header)
        agent.put(header, 0, body_of(agent, 2))
        assert problem_of(agent.complete(header)) is ProblemType.DIGEST_MISMATCH
        assert not uploads_on_disk(blob_files, case)
        assert status_of(agent.upload_status(header)).missing == (0,)
        agent.put(header, 0, body_of(agent, 1))
        assert status_of(agent.complete(header)).state is UploadState.ACCEPTED

    def test_a_part_that_vanished_from_disk_is_asked_for_again(
        self, selected, problem_of, case, blob_files
    ):
        (agent, *_), manifest = selected
        header = agent.header(manifest, body_of(agent))
        agent.begin(header)
        agent.put(header, 0, body_of(agent))
        for name in uploads_on_disk(blob_files, case):
            (case.directory / "blobs" / name).unlink()
        assert problem_of(agent.complete(header)) is ProblemType.DIGEST_MISMATCH
        agent.put(header, 0, body_of(agent))
        assert status_of(agent.complete(header)).state is UploadState.ACCEPTED

    @pytest.mark.parametrize("change", [-4, -1, 4])
    def test_bad_length_of_a_part(self, selected, problem_of, case, blob_files, change):
        (agent, *_), manifest = selected
        data = body_of(agent)
        header = agent.header(manifest, data)
        agent.begin(header)
        wrong = data[:change] if change < 0 else data + bytes(change)
        assert problem_of(agent.put(header, 0, wrong)) is ProblemType.BAD_REQUEST
        assert not uploads_on_disk(blob_files, case)

    def test_bad_number_of_a_part(self, selected, problem_of):
        (agent, *_), manifest = selected
        header = agent.header(manifest, body_of(agent))
        agent.begin(header)
        assert problem_of(agent.put(header, 1, body_of(agent))) is ProblemType.NOT_FOUND

    def test_a_part_without_a_header_is_not_found(self, selected, problem_of):
        (agent, *_), manifest = selected
        header = agent.header(manifest, body_of(agent))
        assert problem_of(agent.put(header, 0, body_of(agent))) is ProblemType.NOT_FOUND
        assert problem_of(agent.upload_status(header)) is ProblemType.NOT_FOUND
        assert problem_of(agent.complete(header)) is ProblemType.NOT_FOUND


class TestWhoAndWhen:
    def test_an_agent_that_was_not_selected_is_refused(self, selected, make_agents, problem_of):
        (agent, *_), manifest = selected
        (outsider,) = make_agents(agent.case, 1)
        response = outsider.upload(manifest, outsider.constant(1))
        assert problem_of(response) is ProblemType.NOT_SELECTED

    def test_one_agent_cannot_touch_the_upload_of_another(self, selected, problem_of):
        (agent, other, *_), manifest = selected
        header = agent.header(manifest, body_of(agent))
        agent.begin(header)
        assert problem_of(other.put(header, 0, body_of(agent))) is ProblemType.NOT_FOUND

    def test_an_agent_that_withdrew_is_refused_and_its_parts_are_gone(
        self, big_case, start_round, problem_of, blob_files
    ):
        (agent, *_), manifest = start_round(big_case, 2)
        data = bytes(manifest.update_n_bytes)
        header = agent.header(manifest, data)
        agent.begin(header)
        agent.put(header, 0, data[:PART_BYTES])
        assert agent.withdraw(manifest.round).status_code == 200
        assert not uploads_on_disk(blob_files, big_case)
        late = agent.put(header, 1, data[:PART_BYTES])
        assert problem_of(late) is ProblemType.ROUND_CLOSED
        again = agent.begin(agent.header(manifest, data, attempt=2))
        assert problem_of(again) is ProblemType.NOT_SELECTED

    def test_after_the_round_closed_nothing_more_is_taken(
        self, case, selected, problem_of, blob_files
    ):
        agents, manifest = selected
        late = agents[2]
        data = body_of(late)
        header = late.header(manifest, data)
        late.begin(header)
        late.put(header, 0, data)
        for agent in agents[:2]:
            agent.upload(manifest, agent.constant(1))
        case.advance(case.manifest.rounds.cap_s + 1)
        assert case.federation.releases.newest().aggregation.n_agents == 2
        assert problem_of(late.complete(header)) is ProblemType.ROUND_CLOSED
        assert problem_of(late.put(header, 0, data)) is ProblemType.ROUND_CLOSED
        newer = late.begin(late.header(manifest, data, attempt=2))
        assert problem_of(newer) is ProblemType.ROUND_CLOSED
        assert not uploads_on_disk(blob_files, case)
        assert case.federation.releases.newest().aggregation.n_agents == 2


class TestSpace:
    def test_a_nearly_full_disk_refuses_before_the_first_byte(
        self, selected, problem_of, case, monkeypatch, blob_files
    ):
        (agent, *_), manifest = selected
        monkeypatch.setattr(case.federation._blobs, "_min_free_bytes", 2**62)
        response = agent.begin(agent.header(manifest, body_of(agent)))
        assert problem_of(response) is ProblemType.NO_SPACE
        assert int(response.headers["retry-after"]) >= 1
        assert not uploads_on_disk(blob_files, case)

    def test_a_disk_that_fills_up_while_writing_acknowledges_nothing(
        self, selected, problem_of, case, monkeypatch, blob_files
    ):
        (agent, *_), manifest = selected
        header = agent.header(manifest, body_of(agent))
        agent.begin(header)

        def full(_descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(blobs_module.os, "fsync", full)
        assert problem_of(agent.put(header, 0, body_of(agent))) is ProblemType.NO_SPACE
        monkeypatch.undo()
        assert not uploads_on_disk(blob_files, case)
        assert status_of(agent.upload_status(header)).missing == (0,)
        assert agent.put(header, 0, body_of(agent)).status_code == 200

    def test_a_full_disk_under_the_database_is_no_space_too(
        self, selected, problem_of, case, monkeypatch
    ):
        (agent, *_), manifest = selected
        header = agent.header(manifest, body_of(agent))

        def full(*_args: object, **_kwargs: object) -> None:
            msg = "the database's disk is full"
            raise NoSpaceError(msg)

        monkeypatch.setattr(case.federation._store.uploads, "begin", full)
        assert problem_of(agent.begin(header)) is ProblemType.NO_SPACE


def test_the_body_that_is_summed_is_checked_once_more(case, selected, blob_files):
    agents, manifest = selected
    for agent in agents:
        agent.upload(manifest, agent.constant(1))
    (name, *_) = uploads_on_disk(blob_files, case)
    path = case.directory / "blobs" / name
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    case.advance()
    row = case.federation._store.rounds.get(1)
    assert row.phase.value == "failed"
    assert "changed on disk" in row.failure
    assert sha256(bytes(data)) != sha256(body_of(agents[0]))


class TestLeftBehind:
    """A part that reaches the disk after its upload's bytes were deleted, and a kill just then."""

    def test_bytes_of_no_upload_are_deleted_at_the_next_start(self, case, selected, blob_files):
        agents, manifest = selected
        header = agents[0].header(manifest, body_of(agents[0]))
        assert agents[0].begin(header).status_code == 200
        assert agents[0].put(header, 0, body_of(agents[0])).status_code == 200
        root = case.directory / "blobs" / "uploads"
        for name in ("4711", "not-ours"):
            (root / name).mkdir()
            (root / name / "0-aa").write_bytes(b"left")
        (case.directory / "blobs" / "adapters" / ".half.00").write_bytes(b"left")
        case.restart()
        left = blob_files(case)
        assert "uploads/not-ours/0-aa" in left
        assert not any("4711" in name or "half" in name for name in left)
        assert sum(name.startswith("uploads/") for name in left) == 2  # the part is still there
        assert agents[0].complete(header).status_code == 200

    def test_a_disk_that_cannot_be_listed_does_not_stop_the_start(self, case, monkeypatch):
        from aggregator_server.blobs import FolderBlobs
        from aggregator_server.errors import BlobError

        def fail(*_args: object) -> None:
            message = "flaky"
            raise BlobError(message)

        monkeypatch.setattr(FolderBlobs, "names", fail)
        case.restart()
        assert case.client.get("/healthz").status_code == 200

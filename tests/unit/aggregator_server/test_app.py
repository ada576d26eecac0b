"""What HTTP adds: caps, paths, ranges, problem documents, long polls, metrics, OpenAPI."""

import asyncio
import threading
import time

import pytest

from protocol.limits import MAX_JSON_BYTES, PART_BYTES
from protocol.messages import TaskReply
from protocol.problems import ProblemType
from protocol.wire import parse


@pytest.fixture
def case(make_case):
    return make_case(cohort_target=2)


@pytest.fixture
def agent(case, make_agents):
    (agent,) = make_agents(case, 1)
    return agent


class TestCaps:
    def test_an_oversized_body_is_refused_by_its_length(self, case, agent, problem_of):
        response = case.client.post(f"{case.prefix}/uploads", content=bytes(MAX_JSON_BYTES + 1))
        assert problem_of(response) is ProblemType.TOO_LARGE

    def test_an_oversized_length_is_refused_before_anything_is_read(self):
        from starlette.requests import Request

        from aggregator_server.web.edge import Refusal, read_body

        async def never() -> None:
            pytest.fail("the body was read")

        headers = [(b"content-length", b"101")]
        request = Request({"type": "http", "headers": headers}, receive=never)
        with pytest.raises(Refusal):
            asyncio.run(read_body(request, limit=100))

    def test_an_oversized_body_without_a_length_is_refused_while_it_streams(
        self, case, agent, problem_of
    ):
        def endless():
            for _ in range(MAX_JSON_BYTES // 1000 + 2):
                yield bytes(1000)

        response = case.client.post(f"{case.prefix}/uploads", content=endless())
        assert "content-length" not in response.request.headers
        assert problem_of(response) is ProblemType.TOO_LARGE

    @pytest.mark.parametrize("length", ["-1", "x", "1e3"])
    def test_a_length_that_is_no_number_is_refused(self, case, problem_of, length):
        response = case.client.post(
            f"{case.prefix}/enrolments", content=b"", headers={"Content-Length": length}
        )
        assert problem_of(response) is ProblemType.TOO_LARGE

    def test_a_part_may_have_four_mebibytes_and_no_more(self, case, agent, problem_of):
        path = f"{case.prefix}/uploads/1/1/parts/0"
        assert problem_of(agent.request("PUT", path, bytes(PART_BYTES))) is ProblemType.NOT_FOUND
        over = agent.request("PUT", path, bytes(PART_BYTES + 1))
        assert problem_of(over) is ProblemType.TOO_LARGE

    def test_a_request_that_needs_no_body_has_none(self, case, agent, problem_of):
        response = agent.request("POST", f"{case.prefix}/uploads/1/1/complete", b"x")
        assert problem_of(response) is ProblemType.TOO_LARGE


class TestBadRequests:
    def test_an_unknown_path_is_a_problem_document(self, case, problem_of):
        assert problem_of(case.client.get("/nowhere")) is ProblemType.NOT_FOUND

    def test_a_wrong_method_is_a_problem_document(self, case, problem_of):
        response = case.client.delete("/v1/federation")
        assert problem_of(response) is ProblemType.BAD_REQUEST

    @pytest.mark.parametrize(
        "path",
        [
            "/task?after=-1",
            "/task?after=x",
            "/task?wait=nan",
            "/task?wait=-1",
            "/releases?after=-2",
            "/releases?after=99999999999999999999",
        ],
    )
    def test_a_bad_query_is_a_problem_document(self, agent, problem_of, path):
        response = agent.request("GET", agent.case.prefix + path)
        assert problem_of(response) is ProblemType.BAD_REQUEST

    @pytest.mark.parametrize("path", ["0/1", "1/0", "x/1", "1/99999999999", "1/-1"])
    def test_a_bad_upload_path_is_a_problem_document(self, agent, problem_of, path):
        response = agent.request("GET", f"{agent.case.prefix}/uploads/{path}")
        assert problem_of(response) is ProblemType.BAD_REQUEST

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{}",
            b"[]",
            b"\xff",
            b'{"body":1,"key":2,"signature":3}',
            b"[" * 5000,
            b'{"body":NaN}',
            b'{"a":' * 500,
        ],
    )
    def test_a_body_that_is_no_message_is_a_problem_document(self, agent, problem_of, body):
        for path in ("uploads", "withdrawals", "enrolments", "enrolments/revoke"):
            response = agent.request("POST", f"{agent.case.prefix}/{path}", body)
            assert problem_of(response) is ProblemType.BAD_REQUEST

    def test_another_federation_is_unknown_here(self, case, problem_of):
        other = "A" * 22
        for path in ("status", "releases", f"blobs/{'0' * 64}", "task"):
            response = case.client.get(f"/v1/federations/{other}/{path}")
            assert problem_of(response) is ProblemType.UNKNOWN_FEDERATION

    def test_an_unexpected_fault_tells_nothing_of_itself(
        self, case, problem_of, monkeypatch, capsys
    ):
        def broken() -> None:
            msg = "secret"
            raise RuntimeError(msg)

        monkeypatch.setattr(case.federation, "status", broken)
        response = case.client.get(f"{case.prefix}/status")
        assert problem_of(response) is ProblemType.INTERNAL
        assert "secret" not in response.text
        assert "secret" in capsys.readouterr().out


class TestBlobs:
    @pytest.fixture
    def name(self, case) -> str:
        return case.federation.releases.newest().adapter.sha256.hex()

    def test_a_blob_is_served_whole_and_may_be_cached_for_good(self, case, name):
        response = case.client.get(f"{case.prefix}/blobs/{name}")
        release = case.federation.releases.newest()
        assert len(response.content) == release.adapter.n_bytes
        assert response.headers["etag"] == f'"{name}"'
        assert "immutable" in response.headers["cache-control"]
        assert response.headers["accept-ranges"] == "bytes"

    def test_a_range_resumes_a_download(self, case, name):
        path = f"{case.prefix}/blobs/{name}"
        whole = case.client.get(path).content
        response = case.client.get(path, headers={"Range": "bytes=100-"})
        assert response.status_code == 206
        assert response.content == whole[100:]
        assert response.headers["content-range"] == f"bytes 100-{len(whole) - 1}/{len(whole)}"
        part = case.client.get(path, headers={"Range": "bytes=5-9"}).content
        assert part == whole[5:10]

    def test_a_range_of_another_file_gets_the_whole_of_this_one(self, case, name):
        headers = {"Range": "bytes=100-", "If-Range": '"other"'}
        response = case.client.get(f"{case.prefix}/blobs/{name}", headers=headers)
        assert response.status_code == 200

    def test_a_range_beyond_the_end_is_refused(self, case, name, problem_of):
        response = case.client.get(
            f"{case.prefix}/blobs/{name}", headers={"Range": "bytes=99999999-"}
        )
        assert problem_of(response) is ProblemType.BAD_RANGE

    def test_a_cached_copy_is_not_sent_again(self, case, name):
        response = case.client.get(
            f"{case.prefix}/blobs/{name}", headers={"If-None-Match": f'"{name}"'}
        )
        assert response.status_code == 304
        assert not response.content

    @pytest.mark.parametrize(
        "path",
        [
            "..%2f..%2fkeys%2fserver.key",
            "../../keys/server.key",
            "%2e%2e/%2e%2e/keys/server.key",
            "....//keys/server.key",
            "/etc/passwd",
            "0" * 63,
            "G" * 64,
            "A" * 64,
            "0" * 64,
            "0" * 64 + "%00",
            "0" * 64 + "%0a",
        ],
    )
    def test_only_the_name_of_a_released_file_is_served(self, case, problem_of, path):
        response = case.client.get(f"{case.prefix}/blobs/{path}")
        assert problem_of(response) in {ProblemType.NOT_FOUND, ProblemType.BAD_REQUEST}

    def test_an_update_is_never_served(self, case, start_round, problem_of, blob_files):
        agents, manifest = start_round(case, 2)
        agents[0].upload(manifest, agents[0].constant(1))
        (upload,) = [name for name in blob_files(case) if name.startswith("uploads/")]
        digest = upload.rpartition("-")[2]
        assert len(digest) == 64
        response = case.client.get(f"{case.prefix}/blobs/{digest}")
        assert problem_of(response) is ProblemType.NOT_FOUND

    def test_a_released_file_that_is_gone_is_an_internal_problem(self, case, name, problem_of):
        (case.directory / "blobs" / "adapters" / name).unlink()
        response = case.client.get(f"{case.prefix}/blobs/{name}")
        assert problem_of(response) is ProblemType.INTERNAL

    def test_bytes_served_are_counted(self, case, name):
        path = f"{case.prefix}/blobs/{name}"
        n_bytes = len(case.client.get(path).content)
        case.client.get(path, headers={"Range": "bytes=0-9"})
        case.advance()
        assert case.federation.status().bytes_down == n_bytes + 10


class TestLongPoll:
    """With the real clockwork, as in production; the fake clock does not move by itself."""

    @pytest.fixture
    def live(self, case, agent):
        with case.client:
            yield agent

    def poll_in_thread(self, agent, *, after: int = 0):
        answers = []

        def poll() -> None:
            started = time.monotonic()
            response = agent.poll(wait=15, after=after)
            answers.append((response, time.monotonic() - started))

        thread = threading.Thread(target=poll)
        thread.start()
        time.sleep(0.3)
        assert not answers, "the poll did not wait"
        return thread, answers

    def test_a_poll_wakes_at_once_when_a_round_opens(self, live, case, make_agents):
        thread, answers = self.poll_in_thread(live)
        make_agents(case, 1)
        thread.join(10)
        response, elapsed_s = answers[0]
        assert parse(TaskReply, response.content).task.kind == "train"
        assert elapsed_s < 5

    def test_a_poll_wakes_when_another_process_moves_the_round(self, live, case, make_agents):
        """Two agents hold the round open; a rollback comes from the command line."""
        from aggregator_server.federation import open_federation

        make_agents(case, 1)
        deadline = time.monotonic() + 10
        while live.round() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert live.round() is not None
        thread, answers = self.poll_in_thread(live, after=1)
        other = open_federation(case.directory, clock=case.clock, environment={})
        other.releases.roll_back(0)
        other.close()
        thread.join(10)
        task = parse(TaskReply, answers[0][0].content).task
        assert task.kind == "train"
        assert task.round.body.round == 2

    def test_a_poll_ends_when_the_server_stops(self, live, case):
        thread, answers = self.poll_in_thread(live)
        case.federation.stop_waiting()
        thread.join(10)
        assert answers[0][0].status_code == 200

    def test_a_poll_waits_no_longer_than_asked(self, live):
        started = time.monotonic()
        reply = parse(TaskReply, live.poll(wait=0.3).content)
        assert reply.task.kind == "wait"
        assert 0.25 < time.monotonic() - started < 5


def test_status_names_no_agent(case, start_round):
    agents, manifest = start_round(case, 2)
    agents[0].upload(manifest, agents[0].constant(1))
    response = case.client.get(f"{case.prefix}/status")
    status = response.json()
    assert status["n_enrolled"] == status["n_present"] == 2
    assert status["round"]["n_uploads"] == 1
    assert status["round"]["bytes_received"] == manifest.update_n_bytes
    from protocol.wire import b64u_encode

    assert b64u_encode(agents[0].identity) not in response.text


def test_health_needs_the_database(case, problem_of):
    assert case.client.get("/healthz").text == "ok\n"
    case.federation._store._database.engine.dispose()
    for path in case.directory.glob("federation.db*"):
        path.unlink()
    assert case.client.get("/healthz").status_code == 503


def test_metrics_tell_counts_and_no_names(case, start_round):
    agents, manifest = start_round(case, 2)
    agents[0].upload(manifest, agents[0].constant(1))
    agents[0].poll()
    text = case.client.get("/metrics").text
    assert "sheepfold_agents_enrolled 2.0" in text
    assert "sheepfold_round_uploads 1.0" in text
    assert 'sheepfold_round_phase{phase="open"} 1.0' in text
    assert 'route="/v1/federations/{federation}/task",status="200"' in text
    from protocol.wire import b64u_encode

    assert b64u_encode(agents[0].identity) not in text
    assert case.federation.charter.path_id not in text


def test_two_applications_do_not_share_their_metrics(make_case):
    first, second = make_case(), make_case()
    first.client.get("/healthz")
    assert "/healthz" not in second.client.get("/metrics").text


def test_openapi_is_whole_and_describes_every_route(case):
    document = case.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]

    def references(node):
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"].removeprefix("#/components/schemas/")
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    assert set(references(document)) <= set(schemas)
    assert "$defs" not in str(document)
    paths = {path for path in document["paths"] if path.startswith("/v1/")}
    assert len(paths) == 23
    assert case.client.get("/docs").status_code == 200


def test_too_many_bodies_at_once_are_told_to_come_again(case, agent, problem_of, monkeypatch):
    from aggregator_server.web import edge

    monkeypatch.setattr(edge, "_SLOT_WAIT_S", 0.05)
    slots = edge.BodySlots(1)

    async def hold_two() -> None:
        async with slots.one(b"one"), slots.one(b"another"):
            pass

    with pytest.raises(edge.Refusal) as caught:
        asyncio.run(hold_two())
    assert caught.value.problem is ProblemType.BUSY
    assert not slots._held


def test_one_agent_cannot_take_the_slots_of_the_others():
    from aggregator_server.web import edge

    slots = edge.BodySlots(3)

    async def hold() -> ProblemType:
        async with slots.one(b"greedy"), slots.one(b"greedy"):
            with pytest.raises(edge.Refusal) as caught:
                async with slots.one(b"greedy"):
                    pass
            async with slots.one(b"modest"):
                return caught.value.problem

    assert asyncio.run(hold()) is ProblemType.BUSY
    assert not slots._held


class TestSlowBodies:
    """A body that never ends must hold neither memory nor a slot that others need."""

    def request(self, headers):
        from starlette.requests import Request

        async def receive() -> None:
            await asyncio.sleep(60)

        return Request({"type": "http", "headers": headers}, receive=receive)

    def test_a_body_that_comes_too_slowly_is_told_to_come_again(self, monkeypatch):
        from aggregator_server.web import edge

        monkeypatch.setattr(edge, "_BODY_GRACE_S", 0.01)
        headers = [(b"content-length", b"100")]
        with pytest.raises(edge.Refusal) as caught:
            asyncio.run(edge.read_body(self.request(headers), limit=PART_BYTES))
        assert caught.value.problem is ProblemType.BUSY
        assert "0 bytes of the body" in caught.value.detail

    def test_a_stranger_gets_no_slot_for_its_body(self, case, make_agent, problem_of, monkeypatch):
        from aggregator_server import app as app_module

        async def never(*_args: object, **_options: object) -> bytes:
            pytest.fail("the body was read")

        monkeypatch.setattr(app_module, "read_body", never)
        path = f"{case.prefix}/uploads/1/1/parts/0"
        stranger = make_agent(case)
        assert problem_of(stranger.request("PUT", path, b"x")) is ProblemType.UNKNOWN_AGENT
        unsigned = stranger.request("PUT", path, b"x", signed=False)
        assert problem_of(unsigned) is ProblemType.UNSIGNED

    def test_a_stranger_cannot_name_a_member_beside_itself(
        self, case, agent, make_agent, problem_of, monkeypatch
    ):
        from aggregator_server import app as app_module
        from protocol.transport_signing import sign_request
        from protocol.wire import b64u_encode

        async def never(*_args: object, **_options: object) -> bytes:
            pytest.fail("the body was read")

        monkeypatch.setattr(app_module, "read_body", never)
        path = f"{case.prefix}/uploads/1/1/parts/0"
        headers = sign_request(
            make_agent(case).signer,
            method="PUT",
            url="http://testserver" + path,
            body=b"x",
            created=int(case.clock.now()),
            nonce=bytes(16),
        )
        member = b64u_encode(agent.identity)
        headers["Signature-Input"] = f'other=();keyid="{member}", ' + headers["Signature-Input"]
        response = case.client.put(path, content=b"x", headers=headers)
        assert problem_of(response) is ProblemType.BAD_SIGNATURE

    def test_a_length_beyond_all_bounds_is_refused(self):
        from aggregator_server.web import edge

        headers = [(b"content-length", b"9" * 5000)]
        with pytest.raises(edge.Refusal) as caught:
            asyncio.run(edge.read_body(self.request(headers), limit=PART_BYTES))
        assert caught.value.problem is ProblemType.TOO_LARGE


def test_a_slow_disk_holds_up_neither_polls_nor_probes(case, agent, monkeypatch):
    """More uploads than there are threads for them hang; the rest goes on."""
    free = threading.Event()

    def hang(*_args: object) -> None:
        free.wait(30)

    monkeypatch.setattr(case.federation, "complete_upload", hang)
    path = f"{case.prefix}/uploads/1/1/complete"
    with case.client:
        threads = [threading.Thread(target=agent.request, args=("POST", path)) for _ in range(50)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        started = time.monotonic()
        assert agent.poll().status_code == 200
        assert case.client.get("/healthz").status_code == 200
        assert case.client.get(f"{case.prefix}/status").status_code == 200
        elapsed_s = time.monotonic() - started
        free.set()
        for thread in threads:
            thread.join(30)
    assert elapsed_s < 10


def test_probes_answer_while_every_thread_of_the_pool_is_busy(case, agent, monkeypatch):
    free = threading.Event()

    def hang(*_args: object, **_options: object) -> None:
        free.wait(30)

    monkeypatch.setattr(case.federation.membership, "admit", hang)
    with case.client:
        threads = [threading.Thread(target=agent.poll) for _ in range(60)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        started = time.monotonic()
        assert case.client.get("/healthz").status_code == 200
        assert case.client.get("/metrics").status_code == 200
        elapsed_s = time.monotonic() - started
        free.set()
        for thread in threads:
            thread.join(30)
    assert elapsed_s < 10


def test_health_and_metrics_need_no_federation_and_read_no_round(case, monkeypatch):
    """`/healthz` is asked every few seconds, also while a round of thousands is open."""

    def costly() -> None:
        pytest.fail("the whole status was read")

    monkeypatch.setattr(case.federation, "status", costly)
    assert case.client.get("/healthz").text == "ok\n"
    monkeypatch.undo()
    assert case.client.get("/metrics").status_code == 200

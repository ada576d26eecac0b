"""One server, over connections that break, clocks that are off and proxies that interfere."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
import requests

from edge_agent.errors import RefusedError, TransportError, UnreachableError
from edge_agent.transport import Outgoing, Transport, Upload, check_url
from protocol.chain import BlobRef
from protocol.limits import MAX_JSON_BYTES
from protocol.messages import (
    Acknowledged,
    Revocation,
    UploadHeader,
    UploadState,
    UploadStatus,
    WaitReason,
)
from protocol.problems import Advice, ProblemType
from protocol.signing import sign
from protocol.transport_signing import verify_request

ACCEPTED = UploadStatus(state=UploadState.ACCEPTED, missing=()).canonical()
WAIT = b'{"task":{"kind":"wait","reason":"not-selected","retry_after_s":3},"newest_release":2}'
ACKNOWLEDGED = Acknowledged().canonical()
CHUNK = 16 * 1024
BLOB = bytes(range(251)) * 300
REF = BlobRef(sha256=hashlib.sha256(BLOB).digest(), n_bytes=len(BLOB))


def upload_of(header: UploadHeader) -> Upload:
    return Upload(round=header.round, attempt=header.attempt, head=header)


@pytest.fixture
def outgoing() -> list[Outgoing]:
    return []


@pytest.fixture
def retries() -> list[tuple[str, float]]:
    return []


@pytest.fixture
def make_transport(server, clock, agent_key, make_manifest, outgoing, retries, request):
    def make(**options):
        settings = {
            "clock": clock,
            "signer": agent_key,
            "on_outgoing": outgoing.append,
            "on_retry": lambda reason, pause_s: retries.append((reason, pause_s)),
            "patience_s": 3600.0,
            **options,
        }
        transport = Transport(server.url, **settings)
        request.addfinalizer(transport.close)
        transport.use_federation(make_manifest())
        return transport

    return make


@pytest.fixture
def transport(make_transport):
    return make_transport()


@pytest.fixture
def header(agent_key) -> UploadHeader:
    return UploadHeader(
        federation=bytes(range(16)),
        round=1,
        attempt=1,
        agent=agent_key.identity,
        round_digest=bytes(32),
        layout=bytes(32),
        weight=1,
        body_sha256=bytes(32),
        body_n_bytes=8,
    )


# Addresses


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://example.org", "https://example.org"),
        ("https://example.org/", "https://example.org"),
        ("HTTPS://example.org:8443//", "https://example.org:8443"),
        (" https://example.org\n", "https://example.org"),
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://127.0.0.1", "http://127.0.0.1"),
        ("http://127.9.9.9:1", "http://127.9.9.9:1"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_address_is_kept_without_its_slash(given: str, kept: str) -> None:
    assert check_url(given) == kept


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("http://example.org", "not encrypted"),
        ("http://192.168.1.7", "not encrypted"),
        ("http://localhost.example.org", "not encrypted"),
        ("http://127.0.0.1.example.org", "not encrypted"),
        ("http://0.0.0.0", "not encrypted"),
        ("http://127.1", "not encrypted"),
        ("http://2130706433", "not encrypted"),
        ("example.org", "must look like"),
        ("ftp://example.org", "must look like"),
        ("https://", "must look like"),
        ("", "must look like"),
        ("https://[::1", "must look like"),
        ("https://example.org:99999", "must look like"),
        ("https://example.org:port", "must look like"),
        ("file:///etc/passwd", "must look like"),
        ("https://example.org/path", "no path"),
        ("https://example.org?x=1", "no path"),
        ("https://example.org#x", "no path"),
        ("https://user@example.org", "no path, query or user"),
        ("https://user:pw@example.org", "no path, query or user"),
        ("https://:pw@example.org", "no path, query or user"),
        ("http://127.0.0.1@example.org", "no path, query or user"),
    ],
)
def test_an_address_that_is_not_safe_or_none_at_all_is_refused(given: str, says: str) -> None:
    with pytest.raises(TransportError, match=says):
        check_url(given)


# Requests


def test_a_poll_is_signed_under_the_federations_path(transport, server, answer, agent_key) -> None:
    server.script = [answer(body=WAIT)]
    reply = transport.task(after=4, wait_s=20.0)
    assert reply.task.reason is WaitReason.NOT_SELECTED
    (seen,) = server.seen
    assert seen.path == "/v1/federations/AAECAwQFBgcICQoLDA0ODw/task?after=4&wait=20"
    verified = verify_request(
        method="GET", url=server.url + seen.path, headers=seen.headers, body=b""
    )
    assert verified.identity == agent_key.identity
    assert transport.take_received_bytes() == len(WAIT)
    assert transport.take_received_bytes() == 0


def test_public_requests_carry_no_signature_no_cookie_and_no_password(
    make_transport, server, answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login owner password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    page = b'{"releases":[],"newest":0}'
    server.script = [answer(body=page)]
    transport = make_transport()
    transport.releases(after=-1)
    transport.releases(after=0)
    for seen in server.seen:
        assert not {"signature", "signature-input", "authorization"} & set(seen.headers)
    assert server.seen[0].path.endswith("/releases?after=-1")


def test_guarantee_1_every_try_sends_the_same_body_under_a_new_signature(
    transport, server, answer, refuse, header, agent_key
) -> None:
    signed = sign(agent_key, "upload", header).signed
    server.script = [
        answer(drop=True),
        refuse(ProblemType.BUSY),
        answer(status=502, body=b"<html>", content_type="text/html"),
        answer(body=ACCEPTED, cut=3),
        answer(body=ACCEPTED),
    ]
    assert transport.begin_upload(signed).state is UploadState.ACCEPTED
    assert len(server.seen) == 5
    assert {seen.body for seen in server.seen} == {signed.canonical()}
    assert len({seen.headers["signature"] for seen in server.seen}) == 5
    nonces = set()
    for seen in server.seen:
        verified = verify_request(
            method="POST", url=server.url + seen.path, headers=seen.headers, body=seen.body
        )
        nonces.add(verified.nonce)
    assert len(nonces) == 5


def test_guarantee_2_every_body_is_told_of_before_it_leaves(
    make_transport, server, answer, header, agent_key
) -> None:
    told: list[tuple[Outgoing, int]] = []
    transport = make_transport(on_outgoing=lambda item: told.append((item, len(server.seen))))
    server.script = [answer(body=ACCEPTED)]
    transport.begin_upload(sign(agent_key, "upload", header).signed)
    transport.put_part(upload_of(header), 0, b"12345678")
    transport.complete(upload_of(header))
    assert [(item.what, item.round, n_seen) for item, n_seen in told] == [
        ("upload-header", 1, 0),
        ("update part 1 of 1", 1, 1),
    ]
    assert told[1][0].body == b"12345678"
    assert told[1][0].host == server.url.removeprefix("http://")
    assert [seen.body for seen in server.seen][:2] == [item.body for item, _ in told]


def test_a_part_travels_as_raw_bytes(transport, server, answer, header) -> None:
    server.script = [answer(body=ACCEPTED)]
    transport.put_part(upload_of(header), 0, b"\x00\xff123456")
    (seen,) = server.seen
    assert (seen.method, seen.body) == ("PUT", b"\x00\xff123456")
    assert seen.headers["content-type"] == "application/octet-stream"
    assert seen.path.endswith("/uploads/1/1/parts/0")


# Trying again


def test_a_lost_answer_is_asked_for_again(transport, server, answer, retries) -> None:
    server.script = [answer(drop=True), answer(drop=True), answer(body=WAIT)]
    transport.task(after=0, wait_s=0)
    assert len(server.seen) == 3
    assert [reason for reason, _ in retries] == [
        f"no answer from {transport.host}: ConnectionError"
    ] * 2


def test_pauses_grow_and_end_at_a_minute(make_transport, server, answer, retries) -> None:
    transport = make_transport(patience_s=1000.0)
    server.script = [answer(drop=True)]
    with pytest.raises(UnreachableError):
        transport.task(after=0, wait_s=0)
    pauses = [pause_s for _, pause_s in retries]
    limits = [min(60.0, 2.0**n) for n in range(len(pauses))]
    assert len(pauses) > 15
    for pause_s, limit in zip(pauses, limits, strict=True):
        assert limit / 2 <= pause_s <= limit


def test_the_servers_retry_after_is_kept(transport, server, answer, refuse, clock, retries) -> None:
    server.script = [refuse(ProblemType.NO_SPACE, retry_after_s=45.0), answer(body=WAIT)]
    before = clock.time
    transport.task(after=0, wait_s=0)
    assert retries == [(f"{ProblemType.NO_SPACE.sentence} told so", 45.0)]
    assert clock.time - before == pytest.approx(45.0)


def test_a_retry_after_without_end_is_cut_to_an_hour(
    make_transport, server, answer, refuse, clock
) -> None:
    transport = make_transport(patience_s=None)
    server.script = [refuse(ProblemType.BUSY, retry_after_s=1e300), answer(body=WAIT)]
    before = clock.time
    transport.task(after=0, wait_s=0)
    assert clock.time - before == pytest.approx(3600.0)


def test_patience_ends(make_transport, server, answer, clock) -> None:
    transport = make_transport(patience_s=30.0)
    server.script = [answer(drop=True)]
    before = clock.time
    with pytest.raises(UnreachableError, match=r"no answer from 127.0.0.1"):
        transport.task(after=0, wait_s=0)
    assert 30.0 <= clock.time - before <= 90.0


def test_without_patience_there_is_no_end(make_transport, server, answer) -> None:
    transport = make_transport(patience_s=None)
    server.script = [answer(drop=True)] * 30 + [answer(body=WAIT)]
    transport.task(after=0, wait_s=0)
    assert len(server.seen) == 31


def test_a_stop_ends_the_pause_and_all_further_tries(make_transport, server, refuse, clock) -> None:
    transport = make_transport(patience_s=None, stopped=lambda: clock.time > 1_800_000_000.0 + 10.0)
    server.script = [refuse(ProblemType.BUSY, retry_after_s=3000.0)]
    with pytest.raises(UnreachableError, match="stopped by the owner"):
        transport.task(after=0, wait_s=0)
    assert len(server.seen) == 1
    assert clock.time - 1_800_000_000.0 < 12.0
    assert max(clock.slept) <= 0.5


def test_nobody_listening_is_told_in_one_sentence(clock) -> None:
    transport = Transport("http://127.0.0.1:9", clock=clock, patience_s=5.0)
    with pytest.raises(UnreachableError, match=r"no answer from 127.0.0.1:9: ConnectionError"):
        transport.discover()


def test_what_repeating_cannot_mend_is_not_repeated(transport, server, refuse) -> None:
    for problem in ProblemType:
        if problem.advice in {Advice.RETRY, Advice.RE_SIGN}:
            continue
        server.seen.clear()
        server.script = [refuse(problem)]
        with pytest.raises(RefusedError) as caught:
            transport.task(after=0, wait_s=0)
        assert caught.value.document.problem_type is problem
        assert str(caught.value) == f"{problem.sentence} told so"
        assert len(server.seen) == 1


def test_the_advice_of_an_unknown_problem_is_followed(transport, server, answer, refuse) -> None:
    newer = refuse(ProblemType.BUSY, type="urn:sheepfold:problem:moon-phase")
    server.script = [newer, answer(body=WAIT)]
    transport.task(after=0, wait_s=0)
    assert len(server.seen) == 2
    server.script = [refuse(ProblemType.BUSY, type="urn:sheepfold:problem:x", advice="discard")]
    with pytest.raises(RefusedError) as caught:
        transport.task(after=0, wait_s=0)
    assert caught.value.document.problem_type is None


@pytest.mark.parametrize("problem", [ProblemType.INCOMPLETE, ProblemType.DIGEST_MISMATCH])
def test_what_the_agent_mends_itself_comes_back_at_once(
    transport, server, refuse, header, problem
) -> None:
    server.script = [refuse(problem)]
    with pytest.raises(RefusedError):
        transport.complete(upload_of(header))
    assert len(server.seen) == 1


def test_a_part_that_was_damaged_on_its_way_is_sent_again(
    transport, server, answer, refuse, header
) -> None:
    server.script = [refuse(ProblemType.DIGEST_MISMATCH), answer(body=ACCEPTED)]
    transport.put_part(upload_of(header), 0, b"12345678")
    assert [seen.body for seen in server.seen] == [b"12345678"] * 2


# Clocks


@pytest.mark.parametrize("offset_s", [-86_400.0, -400.0, 400.0, 86_400.0])
def test_a_stale_signature_is_made_anew_by_the_servers_clock(
    transport, server, answer, refuse, clock, retries, offset_s: float
) -> None:
    server_time = clock.time + offset_s
    server.script = [refuse(ProblemType.STALE, server_time=server_time), answer(body=WAIT)]
    transport.task(after=0, wait_s=0)
    created = [
        int(re.findall(r"created=(\d+)", seen.headers["signature-input"])[0])
        for seen in server.seen
    ]
    assert created == [int(clock.time), int(server_time)]
    assert [pause_s for _, pause_s in retries] == [0.0]
    transport.task(after=0, wait_s=0)  # and from then on
    assert f"created={int(server_time)}" in server.seen[-1].headers["signature-input"]


def test_a_replayed_signature_is_made_anew(transport, server, answer, refuse) -> None:
    server.script = [refuse(ProblemType.REPLAYED), answer(body=WAIT)]
    transport.task(after=0, wait_s=0)
    assert server.seen[0].headers["signature"] != server.seen[1].headers["signature"]


def test_a_server_that_finds_everything_stale_is_not_hammered(
    make_transport, server, refuse, clock
) -> None:
    transport = make_transport(patience_s=600.0)
    server.script = [refuse(ProblemType.STALE)]
    with pytest.raises(RefusedError):
        transport.task(after=0, wait_s=0)
    assert len(server.seen) < 30


def test_a_time_that_no_clock_has_is_no_problem_document(
    make_transport, server, answer, refuse
) -> None:
    transport = make_transport(patience_s=5.0)
    server.script = [
        answer(
            status=401,
            content_type="application/problem+json",
            body=json.dumps(
                {**json.loads(refuse(ProblemType.STALE).body), "server_time": 1e300}
            ).encode(),
        ),
        answer(body=WAIT),
    ]
    transport.task(after=0, wait_s=0)
    assert len(server.seen) == 2


def test_the_last_second_of_the_calendar_ends_in_a_typed_error(
    make_transport, server, refuse
) -> None:
    transport = make_transport(patience_s=None)
    server.script = [refuse(ProblemType.STALE, server_time=253_402_300_799.0)]
    with pytest.raises(TransportError, match="cannot be signed"):  # after the first pause
        transport.task(after=0, wait_s=0)


# What is not the server


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(make_transport, server, answer, clock, status: int) -> None:
    transport = make_transport(patience_s=5.0)
    elsewhere = {"Location": f"{server.url}/elsewhere"}
    server.script = [answer(status=status, headers=elsewhere, body=b"moved")]
    with pytest.raises(UnreachableError, match=f"answered {status} without a problem document"):
        transport.task(after=0, wait_s=0)
    assert "/elsewhere" not in {seen.path for seen in server.seen}


@pytest.mark.parametrize(
    ("status", "content_type", "body"),
    [
        (502, "text/html", b"<html>Bad Gateway</html>"),
        (503, "application/json", b'{"error": "down"}'),
        (404, "text/plain", b"not here"),
        (500, "application/problem+json", b"{}"),
        (500, "application/problem+json", b'{"type": "about:blank", "title": "x"}'),
        (401, "application/problem+json", b"\xff\xfe"),
        (503, "application/problem+json", b" " * (MAX_JSON_BYTES + 1)),
        (204, "application/json", b""),
    ],
)
def test_a_refusal_that_is_no_problem_document_is_a_proxys_and_passes(
    transport, server, answer, status: int, content_type: str, body: bytes
) -> None:
    server.script = [
        answer(status=status, content_type=content_type, body=body),
        answer(body=WAIT),
    ]
    transport.task(after=0, wait_s=0)
    assert len(server.seen) == 2


def test_a_problem_document_with_a_charset_is_one(transport, server, answer, refuse) -> None:
    plain = refuse(ProblemType.REVOKED)
    server.script = [
        answer(status=403, body=plain.body, content_type="application/problem+json; charset=utf-8")
    ]
    with pytest.raises(RefusedError):
        transport.task(after=0, wait_s=0)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"{}",
        b"null",
        WAIT.replace(b"wait", b"obey"),
        WAIT[:-1] + b',"x":1}',
        WAIT[:-1],
        b"\xff",
    ],
)
def test_an_answer_of_another_kind_is_refused_and_not_repeated(
    transport, server, answer, body: bytes
) -> None:
    server.script = [answer(body=body)]
    with pytest.raises(TransportError, match="answered poll with something else: TaskReply"):
        transport.task(after=0, wait_s=0)
    assert len(server.seen) == 1


def test_an_answer_beyond_the_limit_is_not_read_to_its_end(transport, server, answer) -> None:
    server.script = [answer(body=WAIT + b" " * MAX_JSON_BYTES)]
    with pytest.raises(TransportError, match=f"exceeds {MAX_JSON_BYTES} bytes"):
        transport.task(after=0, wait_s=0)


def test_a_packed_answer_is_not_asked_for(transport, server, answer) -> None:
    server.script = [answer(body=WAIT)]
    transport.task(after=0, wait_s=0)
    assert server.seen[0].headers["accept-encoding"] == "identity"


def test_a_packed_bomb_ends_at_the_limit(transport, server, answer) -> None:
    packed = gzip.compress(b" " * (50 * MAX_JSON_BYTES))
    assert len(packed) < MAX_JSON_BYTES
    server.script = [answer(body=packed, headers={"Content-Encoding": "gzip"})]
    with pytest.raises(TransportError, match="exceeds"):
        transport.task(after=0, wait_s=0)


# Downloads


def serve_blob(answer, *, blob: bytes = BLOB):
    def give(seen):
        start = int(seen.headers.get("range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if not start:
            return answer(body=blob)
        return answer(
            status=206,
            body=blob[start:],
            headers={"Content-Range": f"bytes {start}-{len(blob) - 1}/{len(blob)}"},
        )

    return give


def test_a_download_is_named_by_its_digest_and_found_again(
    transport, server, answer, tmp_path: Path
) -> None:
    server.script = [serve_blob(answer)]
    path = transport.fetch(REF, tmp_path)
    assert path == tmp_path / REF.sha256.hex()
    assert path.read_bytes() == BLOB
    assert transport.fetch(REF, tmp_path) == path
    assert len(server.seen) == 1
    assert [path.name for path in tmp_path.iterdir()] == [REF.sha256.hex()]
    assert "range" not in server.seen[0].headers


def test_a_damaged_file_in_the_cache_is_fetched_again(
    transport, server, answer, tmp_path: Path
) -> None:
    server.script = [serve_blob(answer)]
    path = transport.fetch(REF, tmp_path)
    path.write_bytes(BLOB[:-1] + b"x")
    assert transport.fetch(REF, tmp_path).read_bytes() == BLOB
    assert len(server.seen) == 2


def test_a_transfer_that_breaks_goes_on_where_it_was(
    transport, server, answer, tmp_path: Path
) -> None:
    server.script = [
        answer(body=BLOB, cut=CHUNK + 100),
        lambda seen: answer(status=206, body=BLOB[CHUNK:], cut=2 * CHUNK),
        serve_blob(answer),
    ]
    assert transport.fetch(REF, tmp_path).read_bytes() == BLOB
    assert [seen.headers.get("range") for seen in server.seen] == [
        None,
        f"bytes={CHUNK}-",
        f"bytes={3 * CHUNK}-",
    ]
    assert transport.take_received_bytes() == len(BLOB)


def test_a_transfer_goes_on_after_a_restart_of_the_agent(
    make_transport, server, answer, tmp_path: Path
) -> None:
    server.script = [answer(body=BLOB, cut=CHUNK), answer(drop=True)]
    with pytest.raises(UnreachableError):
        make_transport(patience_s=1.0).fetch(REF, tmp_path)
    server.seen.clear()
    server.script = [serve_blob(answer)]
    assert make_transport().fetch(REF, tmp_path).read_bytes() == BLOB
    assert server.seen[0].headers["range"] == f"bytes={CHUNK}-"


def test_a_server_without_ranges_sends_it_whole(transport, server, answer, tmp_path: Path) -> None:
    server.script = [answer(body=BLOB, cut=2 * CHUNK), answer(body=BLOB)]
    assert transport.fetch(REF, tmp_path).read_bytes() == BLOB


def test_an_ending_that_was_announced_too_short_is_asked_for(
    transport, server, answer, tmp_path: Path
) -> None:
    server.script = [answer(body=BLOB[:100]), serve_blob(answer)]
    assert transport.fetch(REF, tmp_path).read_bytes() == BLOB


def test_guarantee_3_other_bytes_are_never_handed_over(
    transport, server, answer, tmp_path: Path, retries
) -> None:
    server.script = [answer(body=bytes(len(BLOB)))]
    with pytest.raises(TransportError, match="other bytes than"):
        transport.fetch(REF, tmp_path)
    assert len(server.seen) == 2  # a damaged transfer is given one more try
    assert "once more" in retries[0][0]
    assert not list(tmp_path.iterdir())


def test_one_damaged_transfer_is_mended(transport, server, answer, tmp_path: Path) -> None:
    server.script = [answer(body=BLOB[:-1] + b"x"), serve_blob(answer)]
    assert transport.fetch(REF, tmp_path).read_bytes() == BLOB


def test_a_range_of_another_place_is_found_by_the_digest(
    transport, server, answer, tmp_path: Path
) -> None:
    server.script = [
        answer(body=BLOB, cut=2 * CHUNK),
        lambda seen: answer(status=206, body=BLOB[: len(BLOB) - 2 * CHUNK]),
        serve_blob(answer),
    ]
    assert transport.fetch(REF, tmp_path).read_bytes() == BLOB


def test_more_bytes_than_promised_are_not_kept(transport, server, answer, tmp_path: Path) -> None:
    server.script = [answer(body=bytes(len(BLOB)) + bytes(10_000_000))]
    with pytest.raises(TransportError, match="other bytes than"):
        transport.fetch(REF, tmp_path)
    assert len(server.seen) == 2
    assert transport.take_received_bytes() < 2 * (len(BLOB) + 300_000)


def test_what_follows_the_promised_bytes_is_left_unread(
    transport, server, answer, tmp_path: Path
) -> None:
    server.script = [answer(body=BLOB + b"more")]
    assert transport.fetch(REF, tmp_path).read_bytes() == BLOB


def test_a_redirected_download_is_not_followed(
    make_transport, server, answer, tmp_path: Path
) -> None:
    transport = make_transport(patience_s=3.0)
    server.script = [answer(status=302, headers={"Location": "/x"}, body=BLOB)]
    with pytest.raises(UnreachableError, match="302"):
        transport.fetch(REF, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_blob_that_is_not_there_is_a_refusal(transport, server, refuse, tmp_path: Path) -> None:
    server.script = [refuse(ProblemType.NOT_FOUND)]
    with pytest.raises(RefusedError):
        transport.fetch(REF, tmp_path)


def test_a_full_disk_is_a_typed_error(transport, server, answer, tmp_path: Path) -> None:
    server.script = [serve_blob(answer)]
    with pytest.raises(TransportError, match="cannot keep a download"):
        transport.fetch(REF, tmp_path / "missing-folder")


def test_requests_is_told_of_no_proxy_secrets_in_errors(transport, monkeypatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise requests.exceptions.ProxyError("http://user:secret@proxy")

    monkeypatch.setattr(transport._session, "send", fail)
    transport._patience_s = 0.0
    with pytest.raises(UnreachableError) as caught:
        transport.task(after=0, wait_s=0)
    assert "secret" not in str(caught.value)


def test_a_revocation_is_posted(transport, server, answer, agent_key, outgoing) -> None:
    server.script = [answer(body=ACKNOWLEDGED)]
    body = Revocation(federation=bytes(16), agent=agent_key.identity)
    assert transport.revoke(sign(agent_key, "revocation", body).signed).acknowledged
    assert server.seen[0].path.endswith("/enrolments/revoke")
    assert [item.what for item in outgoing] == ["revocation"]

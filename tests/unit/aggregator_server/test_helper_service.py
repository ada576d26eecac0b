"""The helper at work: one answer for each round, across restarts; its routes and its folder."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from aggregator_server.errors import ConfigError, KeyFileError, Refusal
from aggregator_server.helper.client import HelperClient, check_helper_url
from aggregator_server.helper.service import (
    HelperService,
    found_helper,
    load_description,
)
from aggregator_server.helper_app import create_helper_app
from privacy.helper import mask_seed, seal_context, seal_seed
from privacy.masking import Mask, MaskAdder
from protocol.blocks import AggregationBlock, HelperMasking, RoundsBlock
from protocol.helped import HelperAnswer, HelperDescription, HelperHeader, HelperRequest
from protocol.helped import HelperUpload as Upload
from protocol.masked import ReadyList
from protocol.messages import Credential
from protocol.problems import ProblemDocument, ProblemType
from protocol.signing import Signed, Signer, sign, verify
from protocol.wire import parse, sha256

N_BYTES = 200


class Round:
    """A closed round of six agents, to be asked for."""

    def __init__(self, own: HelperDescription, make_manifest: Any, make_round: Any) -> None:
        self.server = Signer.generate()
        self.masking = HelperMasking(
            max_change=0.1,
            clip_norm=1.0,
            cell_target=5,
            max_cell=9,
            helper=own.helper,
            helper_key=own.helper_key,
        )
        self.federation = make_manifest(
            server=self.server.identity,
            registrar=self.server.identity,
            masking=self.masking,
            aggregation=AggregationBlock(max_weight=4),
            rounds=RoundsBlock(n_rounds=3, cohort_target=6, min_cohort=5),
        )
        self.manifest = make_round(
            self.federation, federation_digest=self.federation.digest(), update_n_bytes=N_BYTES
        )
        self.agents = sorted((Signer.generate() for _ in range(6)), key=lambda s: s.identity)
        self.uploads = [self.upload(agent, bytes([i]) * 32) for i, agent in enumerate(self.agents)]

    def upload(self, agent: Signer, seed: bytes, *, garbage: bool = False) -> Upload:
        context = seal_context(self.manifest, agent.identity)
        sealed = seal_seed(seed, self.masking.helper_key, context=b"" if garbage else context)
        credential = Credential(
            federation=self.federation.federation,
            agent=agent.identity,
            expires_at=int(self.manifest.opened_at) + 100,
        )
        header = HelperHeader(
            federation=self.manifest.federation,
            round=self.manifest.round,
            attempt=1,
            agent=agent.identity,
            round_digest=self.manifest.digest(),
            credential=sign(self.server, "credential", credential).signed,
            sealed_sha256=sha256(sealed),
            body_sha256=bytes(32),
            body_n_bytes=N_BYTES,
        )
        return Upload(header=sign(agent, "helper-upload", header).signed, sealed=sealed)

    def request(self, uploads: list[Upload] | None = None) -> Signed[HelperRequest]:
        uploads = self.uploads if uploads is None else uploads
        entries = sorted((u.header.body.agent, u.header.body.digest()) for u in uploads)
        body = HelperRequest(
            federation=sign(self.server, "federation", self.federation).signed,
            round=sign(self.server, "round", self.manifest).signed,
            uploads_list=ReadyList(
                federation=self.manifest.federation,
                round=self.manifest.round,
                round_digest=self.manifest.digest(),
                wave=1,
                entries=tuple(entries),
            ),
            uploads=tuple(uploads),
        )
        return sign(self.server, "helper-request", body).signed

    def mask_sum(self, members: list[int]) -> np.ndarray:
        words = np.zeros(N_BYTES // 2, "<u2")
        for i in members:
            identity = self.agents[i].identity
            seed = mask_seed(bytes([i]) * 32, self.manifest, identity)
            MaskAdder([Mask(seed=seed, sign=1)], word_bits=16).add(words)
        return words


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found_helper(tmp_path / "helper")
    return tmp_path / "helper"


@pytest.fixture
def service(folder: Path) -> Iterator[HelperService]:
    opened = HelperService(folder)
    yield opened
    opened.close()


@pytest.fixture
def closed_round(service: HelperService, make_manifest, make_round) -> Round:
    return Round(service.description, make_manifest, make_round)


def problem_of(call: Any) -> ProblemType:
    with pytest.raises(Refusal) as caught:
        call()
    return caught.value.problem


def test_the_answer_is_signed_and_holds_the_sum_of_the_masks(service, closed_round) -> None:
    request = closed_round.request()
    signed = service.answer(request)
    answer = verify(signed, "helper-answer", key=service.description.helper).body
    assert answer.request == request.body.digest()
    (found,) = answer.sums
    data = service.sum_path(found.words.sha256.hex()).read_bytes()
    assert hashlib.sha256(data).digest() == found.words.sha256
    assert np.array_equal(np.frombuffer(data, "<u2"), closed_round.mask_sum([0, 1, 2, 3, 4, 5]))
    assert len(found.members) == 6
    assert answer.unopened == ()


def test_guarantee_1_the_same_request_gets_the_stored_answer_also_after_a_restart(
    folder, service, closed_round
) -> None:
    request = closed_round.request()
    first = service.answer(request)
    assert service.answer(request) == first
    service.close()
    again = HelperService(folder)
    assert again.answer(request) == first
    again.close()


def test_guarantee_1_another_request_for_the_round_is_refused_also_after_a_restart(
    folder, service, closed_round
) -> None:
    service.answer(closed_round.request())
    fewer = closed_round.request(closed_round.uploads[:5])
    assert problem_of(lambda: service.answer(fewer)) is ProblemType.CONFLICT
    service.close()
    again = HelperService(folder)
    assert problem_of(lambda: again.answer(fewer)) is ProblemType.CONFLICT
    again.close()


def test_guarantee_1_killed_before_it_answered_it_still_answers_the_first_request_only(
    folder, service, closed_round, monkeypatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HelperService, "_sum", killed)
    with pytest.raises(KeyboardInterrupt):
        service.answer(closed_round.request())
    monkeypatch.undo()
    service.close()
    again = HelperService(folder)
    fewer = closed_round.request(closed_round.uploads[:5])
    assert problem_of(lambda: again.answer(fewer)) is ProblemType.CONFLICT
    assert len(again.answer(closed_round.request()).body.sums) == 1
    again.close()


def test_a_seed_that_does_not_open_is_left_out_and_named(service, closed_round) -> None:
    bad = closed_round.upload(closed_round.agents[2], bytes(32), garbage=True)
    uploads = [*closed_round.uploads[:2], bad, *closed_round.uploads[3:]]
    answer = service.answer(closed_round.request(uploads)).body
    assert answer.unopened == (closed_round.agents[2].identity,)
    (found,) = answer.sums
    data = service.sum_path(found.words.sha256.hex()).read_bytes()
    assert np.array_equal(np.frombuffer(data, "<u2"), closed_round.mask_sum([0, 1, 3, 4, 5]))


def test_guarantee_2_a_cell_that_is_too_small_without_them_gets_no_sum(
    service, closed_round
) -> None:
    bad = [closed_round.upload(agent, bytes(32), garbage=True) for agent in closed_round.agents[:2]]
    answer = service.answer(closed_round.request([*bad, *closed_round.uploads[2:]])).body
    assert answer.sums == ()
    assert len(answer.unopened) == 2


def test_what_does_not_hold_is_refused_and_leaves_the_round_unanswered(
    service, closed_round
) -> None:
    small = closed_round.request(closed_round.uploads[:4])
    assert problem_of(lambda: service.answer(small)) is ProblemType.BAD_MESSAGE
    assert service.answer(closed_round.request()).body.sums


def test_a_server_that_is_not_on_the_list_is_refused(folder, closed_round) -> None:
    strict = HelperService(folder, servers=frozenset({bytes(32)}))
    request = closed_round.request()
    assert problem_of(lambda: strict.answer(request)) is ProblemType.UNKNOWN_FEDERATION
    strict.close()


def test_the_routes_give_keys_answers_sums_and_problem_documents(service, closed_round) -> None:
    client = TestClient(create_helper_app(service), raise_server_exceptions=False)
    shown = client.get("/v1/helper")
    assert parse(HelperDescription, shown.content) == service.description
    request = closed_round.request()
    done = client.post("/v1/helper/sums", content=request.canonical())
    answer = parse(Signed[HelperAnswer], done.content).body
    name = answer.sums[0].words.sha256.hex()
    assert len(client.get(f"/v1/helper/sums/{name}").content) == N_BYTES
    for response, problem in (
        (client.get("/v1/helper/sums/" + "0" * 64), ProblemType.NOT_FOUND),
        (client.get("/v1/helper/sums/..%2Fhelper.keys"), ProblemType.NOT_FOUND),
        (client.post("/v1/helper/sums", content=b"{}"), ProblemType.BAD_REQUEST),
        (
            client.post(
                "/v1/helper/sums",
                content=closed_round.request(closed_round.uploads[:5]).canonical(),
            ),
            ProblemType.CONFLICT,
        ),
    ):
        assert response.status_code == problem.status
        assert parse(ProblemDocument, response.content).problem_type is problem


def test_keys_are_private_and_made_once(folder: Path) -> None:
    assert (folder / "helper.keys").stat().st_mode & 0o077 == 0
    assert load_description(folder / "helper.json").helper_key
    with pytest.raises(ConfigError, match="already"):
        found_helper(folder)
    (folder / "helper.keys").chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        HelperService(folder)


@pytest.mark.parametrize(
    "url", ["", "ftp://host", "https://host/path", "http://helper.example", "https://host:x"]
)
def test_a_helper_elsewhere_needs_tls(url: str) -> None:
    with pytest.raises(ConfigError):
        check_helper_url(url)


def test_a_helper_on_this_machine_or_with_tls_is_accepted() -> None:
    assert check_helper_url("http://127.0.0.1:8751/") == "http://127.0.0.1:8751"
    assert check_helper_url("https://helper.example:444") == "https://helper.example:444"
    assert isinstance(HelperClient("http://localhost:1"), HelperClient)

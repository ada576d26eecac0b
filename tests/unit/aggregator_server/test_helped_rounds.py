"""Rounds under helper masks: the real server, the real helper, agents whose update a test says."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from aggregator_server.errors import ConfigError, HelperError
from aggregator_server.helper.client import HelperClient
from aggregator_server.helper.service import HelperService, found_helper
from aggregator_server.helper_app import create_helper_app
from aggregator_server.recipes import Masking
from privacy.fixed_point import encode
from privacy.helper import mask_seed, seal_context, seal_seed
from privacy.masked_vector import masked_runs
from privacy.masking import Mask
from privacy.noise import SecureStream
from privacy.secagg.derive import check_words
from protocol.blocks import Factor, HelperMasking, LoraRule
from protocol.chain import RoundManifest
from protocol.helped import HelperAnswer, HelperHeader, HelperUpload
from protocol.messages import Credential, UploadStatus
from protocol.phases import RoundPhase
from protocol.problems import ProblemType
from protocol.signing import Signed, Signer, sign
from protocol.wire import parse, sha256
from quant.adapter import factor_of, flatten

N_AGENTS = 6
URL = "http://127.0.0.1:8751"


class Helper:
    """The second operator, in this process; it may be away, or lie."""

    def __init__(self, folder: Path) -> None:
        self.description = found_helper(folder)
        self.folder = folder
        self.away = False
        self.change: Callable[[bytes], bytes] = lambda data: data
        self.requests: list[bytes] = []
        self.start()

    def start(self) -> None:
        self.service = HelperService(self.folder)
        self.client = TestClient(create_helper_app(self.service), raise_server_exceptions=False)

    def call(self, _: HelperClient, method: str, path: str, body: bytes, *, limit: int) -> bytes:
        if self.away:
            msg = "no answer from the helper"
            raise HelperError(msg)
        if method == "POST":
            self.requests.append(body)
        response = self.client.request(method, path, content=body)
        if response.status_code != 200:
            raise HelperError(response.text)
        assert len(response.content) <= limit
        return self.change(response.content) if method == "POST" else response.content


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Helper]:
    made = Helper(tmp_path / "helper")

    def call(client: HelperClient, *args: Any, **named: Any) -> bytes:
        return made.call(client, *args, **named)

    monkeypatch.setattr(HelperClient, "_call", call)
    yield made
    made.service.close()


@pytest.fixture
def case(make_case, helper: Helper):
    return make_case(**options(helper))


def options(helper: Helper) -> dict[str, Any]:
    return {
        "masking": Masking.HELPER,
        "helper": helper.description,
        "helper_url": URL,
        "cohort_target": N_AGENTS,
        "min_cohort": 5,
        "local_steps": 10,
        "learning_rate": 0.01,
    }


def upload(
    case: Any,
    agent: Any,
    manifest: RoundManifest,
    update: np.ndarray,
    *,
    weight: int = 1,
    garbage_seed: bool = False,
    garbage_vector: bool = False,
) -> Any:
    """All of an upload; the answer of its last step."""
    masking, plan = case.manifest.masking, case.federation.charter.turns.plan_at(manifest.release)
    assert isinstance(masking, HelperMasking)
    words = encode(update, weight=weight, plan=plan, stream=SecureStream())
    seed = sha256(agent.identity)
    mask = Mask(seed=mask_seed(seed, manifest, agent.identity), sign=1)
    checks = check_words(manifest.digest(), word_bits=plan.word_bits)
    data = b"".join(run.tobytes() for run in masked_runs(words, [mask], checks, plan))
    if garbage_vector:
        data = bytes(len(data))
    context = b"" if garbage_seed else seal_context(manifest, agent.identity)
    sealed = seal_seed(seed, masking.helper_key, context=context)
    stored = case.federation._store.agents.get(agent.identity)
    header = HelperHeader(
        federation=manifest.federation,
        round=manifest.round,
        attempt=1,
        agent=agent.identity,
        round_digest=manifest.digest(),
        credential=parse(Signed[Credential], stored.credential),
        sealed_sha256=sha256(sealed),
        body_sha256=sha256(data),
        body_n_bytes=len(data),
    )
    message = HelperUpload(header=sign(agent.signer, "helper-upload", header).signed, sealed=sealed)
    response = agent.request("POST", f"{case.prefix}/helped", message.canonical())
    if response.status_code != 200:
        return response
    assert parse(UploadStatus, response.content).missing == (0,)
    path = f"{case.prefix}/uploads/{manifest.round}/1"
    assert agent.request("PUT", f"{path}/parts/0", data).status_code == 200
    return agent.request("POST", f"{path}/complete")


def values(case: Any, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n_values = case.federation.charter.layout.n_values
    return rng.normal(0, 0.01, n_values).astype(np.float32)


def moved(case: Any) -> np.ndarray:
    """What the newest release changed."""
    releases, layout = case.federation.releases, case.federation.charter.layout
    newest = releases.newest()
    after = flatten(releases.arrays(newest), layout)
    return after - flatten(releases.arrays(releases.get(newest.number - 1)), layout)


def step(case: Any) -> float:
    return float(case.federation.charter.layout.slots[0].step)


def test_the_release_is_the_weighted_mean(case, start_round) -> None:
    agents, manifest = start_round(case, N_AGENTS)
    updates = [values(case, i) for i in range(N_AGENTS)]
    weights = [40, 80, 120, 160, 200, 240]
    for agent, update, weight in zip(agents, updates, weights, strict=True):
        assert upload(case, agent, manifest, update, weight=weight).status_code == 200
    case.advance()
    release = case.federation.releases.newest()
    assert (release.number, release.aggregation.n_agents, release.aggregation.n_cells) == (1, 6, 1)
    mean = np.average(updates, axis=0, weights=weights)
    # Each value was rounded by less than a step, and is divided by the sum of the shares.
    bound = N_AGENTS * step(case) / (sum(weights) / 256)
    assert np.abs(moved(case) - mean).max() < bound


def test_under_rolora_the_factors_take_turns(make_case, start_round, helper: Helper) -> None:
    case = make_case(**options(helper), lora_rule=LoraRule.ROLORA)
    agents, manifest = start_round(case, N_AGENTS)
    rng, turns = np.random.default_rng(1), case.federation.charter.turns
    for number in (0, 1):
        manifest = agents[0].round()
        layout = turns.at(number).layout
        update = rng.normal(0, 0.01, layout.n_values).astype(np.float32)
        for agent in agents:
            assert upload(case, agent, manifest, update).status_code == 200
        case.advance()
        releases = case.federation.releases
        before, after = (
            flatten(releases.arrays(releases.get(n)), layout) for n in (number, number + 1)
        )
        assert np.abs(after - before - update).max() < 256 * step(case)
        assert {factor_of(slot.name) for slot in layout.slots} == {Factor("BA"[number])}


def test_uploads_and_sums_are_gone_with_their_round(case, start_round, blob_files) -> None:
    agents, manifest = start_round(case, N_AGENTS)
    for agent in agents:
        upload(case, agent, manifest, values(case, 1))
    assert any(name.startswith("uploads/") for name in blob_files(case))
    case.advance()
    case.advance()
    assert not [name for name in blob_files(case) if name.startswith(("uploads/", "sums/"))]


def test_the_round_waits_for_a_helper_that_is_away_and_asks_the_same_after_a_restart(
    case, start_round, helper: Helper
) -> None:
    agents, manifest = start_round(case, N_AGENTS)
    for agent in agents:
        upload(case, agent, manifest, values(case, 1))
    lost_answers = helper.change
    helper.change = lambda _: b"cut"
    case.advance()
    helper.change = lost_answers
    helper.away = True
    case.advance()
    assert case.federation.status().round.phase is RoundPhase.GATHERING
    case.restart()
    helper.service.close()
    helper.start()
    helper.away = False
    case.advance()
    assert case.federation.releases.newest().number == 1
    assert len(set(helper.requests)) == 1
    assert len(helper.requests) == 2


def test_a_helper_that_stays_away_ends_the_round_and_the_next_one_opens(
    case, start_round, helper: Helper
) -> None:
    agents, manifest = start_round(case, N_AGENTS)
    for agent in agents:
        upload(case, agent, manifest, values(case, 1))
    helper.away = True
    case.advance()
    case.advance(manifest.cap_at - case.clock.now() + case.manifest.masking.helper_wait_s + 1)
    last = case.federation._store.rounds.latest()
    assert last.phase is RoundPhase.FAILED
    assert "no answer from the helper" in last.failure
    for agent in agents:
        agent.task()
    case.advance(1)
    assert case.federation._store.rounds.latest().number == 2


def test_an_answer_of_another_key_is_not_used(case, start_round, helper: Helper) -> None:
    agents, manifest = start_round(case, N_AGENTS)
    for agent in agents:
        upload(case, agent, manifest, values(case, 1))

    def forge(data: bytes) -> bytes:
        body = parse(Signed[HelperAnswer], data).body
        return sign(Signer.generate(), "helper-answer", body).signed.canonical()

    helper.change = forge
    case.advance()
    assert case.federation.status().round.phase is RoundPhase.GATHERING
    helper.change = lambda data: data
    case.advance()
    assert case.federation.releases.newest().number == 1


def test_a_member_whose_seed_does_not_open_is_left_out_of_the_sum(case, start_round) -> None:
    agents, manifest = start_round(case, N_AGENTS)
    updates = [values(case, i) for i in range(N_AGENTS)]
    for i, agent in enumerate(agents):
        done = upload(case, agent, manifest, updates[i], weight=200, garbage_seed=i == 2)
        assert done.status_code == 200
    case.advance()
    release = case.federation.releases.newest()
    assert release.aggregation.n_agents == N_AGENTS - 1
    mean = np.mean([update for i, update in enumerate(updates) if i != 2], axis=0)
    assert np.abs(moved(case) - mean).max() < 2 * step(case)


def test_a_vector_under_no_mask_loses_its_cell_and_ends_in_no_release(case, start_round) -> None:
    agents, manifest = start_round(case, N_AGENTS)
    for i, agent in enumerate(agents):
        upload(case, agent, manifest, values(case, i), garbage_vector=i == 0)
    case.advance()
    last = case.federation._store.rounds.get(1)
    assert last.phase is RoundPhase.FAILED
    assert "no cell" in last.failure
    assert case.federation.releases.newest().number == 0


def test_one_upload_of_an_agent_counts(case, start_round, problem_of) -> None:
    agents, manifest = start_round(case, N_AGENTS)
    assert upload(case, agents[0], manifest, values(case, 1)).status_code == 200
    again = upload(case, agents[0], manifest, values(case, 2))
    assert problem_of(again) is ProblemType.CONFLICT


def test_what_is_masked_otherwise_is_refused(case, start_round, problem_of) -> None:
    agents, manifest = start_round(case, N_AGENTS)
    plain = agents[0].upload(manifest, values(case, 1))
    assert problem_of(plain) is ProblemType.BAD_REQUEST
    news = agents[0].request("GET", f"{case.prefix}/cells/1/1?phase=ready")
    assert problem_of(news) is ProblemType.NOT_FOUND


def test_an_open_federation_takes_no_helped_upload(make_case, start_round, problem_of) -> None:
    case = make_case()
    agents, _ = start_round(case, 2)
    response = agents[0].request("POST", f"{case.prefix}/helped", b"{}")
    assert problem_of(response) is ProblemType.BAD_REQUEST


def test_init_asks_for_what_helper_masks_need(make_case, helper: Helper) -> None:
    with pytest.raises(ConfigError, match="--helper"):
        make_case(masking=Masking.HELPER, helper_url=URL, cohort_target=6)
    with pytest.raises(ConfigError, match="helper_url"):
        make_case(masking=Masking.HELPER, helper=helper.description, cohort_target=6)

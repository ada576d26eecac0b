"""Enrolment, invites, revocation and the transport signature, over HTTP."""

import pytest

from protocol.limits import CREDENTIAL_LIFETIME_S, SIGNATURE_WINDOW_S
from protocol.messages import Credential, Enrolment, TrainTask, WaitReason
from protocol.problems import ProblemType
from protocol.signing import Invite, Signed, Signer, sign, verify
from protocol.wire import b64u_encode, parse


@pytest.fixture
def agent(make_case, make_agent):
    return make_agent(make_case())


def credential_of(response) -> Signed[Credential]:
    assert response.status_code == 200, response.text
    return parse(Signed[Credential], response.content)


def test_enrolment_answers_a_credential_of_the_registrar(agent):
    manifest = agent.case.manifest
    credential = verify(credential_of(agent.enrol()), "credential", key=manifest.registrar).body
    assert credential.agent == agent.identity
    assert credential.expires_at == int(agent.case.clock.now()) + CREDENTIAL_LIFETIME_S


def test_enrolling_again_gets_the_stored_answer(agent):
    first = agent.enrol().content
    agent.case.clock.time += 1000
    assert agent.enrol().content == first
    assert agent.case.federation.status().n_enrolled == 1


def test_an_expired_credential_is_renewed(agent):
    agent.enrol()
    agent.case.clock.time += CREDENTIAL_LIFETIME_S + 1
    renewed = credential_of(agent.enrol()).body
    assert renewed.expires_at > agent.case.clock.now()


def test_an_acknowledged_enrolment_survives_a_kill(agent):
    first = agent.enrol().content
    agent.case.restart()
    assert agent.poll().status_code == 200
    assert agent.enrol().content == first


class TestInvites:
    @pytest.fixture
    def case(self, make_case):
        return make_case(open_enrolment=False)

    def test_an_invite_lets_in_as_many_as_it_says(self, case, make_agent, problem_of):
        invite = case.federation.membership.invite(n_uses=2)
        assert make_agent(case).enrol(invite).status_code == 200
        assert make_agent(case).enrol(invite).status_code == 200
        assert problem_of(make_agent(case).enrol(invite)) is ProblemType.INVITE_REFUSED
        assert case.federation.status().n_enrolled == 2

    def test_a_retry_after_a_lost_answer_uses_nothing_up(self, case, make_agent):
        invite = case.federation.membership.invite()
        agent = make_agent(case)
        assert agent.enrol(invite).content == agent.enrol(invite).content

    def test_no_invite_or_a_wrong_one_is_refused_alike(self, case, make_agent, problem_of):
        real = case.federation.membership.invite()
        forged = Invite(code=bytes(16), server_fingerprint=real.server_fingerprint)
        answers = [make_agent(case).enrol(invite) for invite in (None, forged)]
        assert [problem_of(answer) for answer in answers] == [ProblemType.INVITE_REFUSED] * 2
        assert answers[0].json()["detail"] == answers[1].json()["detail"]
        assert case.federation.status().n_enrolled == 0

    def test_a_proof_made_for_another_agent_is_refused(self, case, make_agent, problem_of):
        invite = case.federation.membership.invite()
        victim, thief = make_agent(case), make_agent(case)
        stolen = parse(Signed[Enrolment], victim.enrolment(invite)).body
        body = stolen.model_copy(update={"agent": thief.identity})
        data = sign(thief.signer, "enrolment", body).signed.canonical()
        response = thief.request("POST", f"{case.prefix}/enrolments", data)
        assert problem_of(response) is ProblemType.INVITE_REFUSED

    def test_the_code_is_erased_with_the_last_use(self, case, make_agent):
        invite = case.federation.membership.invite()
        make_agent(case).enrol(invite)
        row = case.federation._store.agents.invite(
            parse(Signed[Enrolment], make_agent(case).enrolment(invite)).body.invite.invite
        )
        assert row is not None
        assert row.code is None

    def test_a_refused_stranger_is_not_remembered(self, case, make_agent):
        make_agent(case).enrol(None)
        make_agent(case).poll()
        assert not case.federation.membership._guard._seen


def test_another_manifest_is_refused(agent, problem_of):
    body = Enrolment(
        federation=agent.case.manifest.federation,
        federation_digest=bytes(32),
        agent=agent.identity,
        invite=None,
    )
    data = sign(agent.signer, "enrolment", body).signed.canonical()
    response = agent.request("POST", f"{agent.case.prefix}/enrolments", data)
    assert problem_of(response) is ProblemType.BAD_REQUEST
    assert agent.case.federation.status().n_enrolled == 0


def test_an_enrolment_signed_by_another_key_is_refused(agent, problem_of):
    body = parse(Signed[Enrolment], agent.enrolment()).body
    other = Signer.generate()
    data = sign(other, "enrolment", body).signed.canonical()
    response = agent.request("POST", f"{agent.case.prefix}/enrolments", data)
    assert problem_of(response) is ProblemType.BAD_SIGNATURE


def test_an_enrolment_for_somebody_else_is_refused(agent, make_agent, problem_of):
    other = make_agent(agent.case)
    response = agent.request("POST", f"{agent.case.prefix}/enrolments", other.enrolment())
    assert problem_of(response) is ProblemType.BAD_SIGNATURE


class TestRevocation:
    def test_a_member_who_left_is_refused_and_not_counted(self, agent, problem_of):
        agent.enrol()
        assert agent.revoke().status_code == 200
        assert problem_of(agent.poll()) is ProblemType.REVOKED
        assert agent.case.federation.status().n_enrolled == 0

    def test_leaving_twice_is_the_same_as_once(self, agent):
        agent.enrol()
        assert agent.revoke().content == agent.revoke().content

    def test_one_who_left_may_join_again(self, agent):
        agent.enrol()
        agent.revoke()
        assert agent.enrol().status_code == 200
        assert agent.poll().status_code == 200

    def test_leaving_frees_the_place_for_another(self, make_case, make_agents):
        case = make_case(cohort_target=2, min_cohort=2)
        agents = make_agents(case, 4)
        case.advance()
        tasks = {agent.identity: agent.round() for agent in agents}
        leaver = next(agent for agent in agents if tasks[agent.identity])
        waiting = next(agent for agent in agents if not tasks[agent.identity])
        leaver.revoke()
        case.advance()
        assert waiting.round() is not None


class TestExpulsion:
    """The operator ends a membership."""

    @pytest.fixture
    def case(self, make_case):
        return make_case(cohort_target=2, min_cohort=2)

    def name_of(self, agent) -> str:
        return b64u_encode(agent.identity)

    def test_it_holds_at_once_and_frees_the_place_for_another(self, case, make_agents, problem_of):
        first = make_agents(case, 2)
        case.advance()
        (other,) = make_agents(case, 1)
        manifest = first[0].round()
        header = first[0].header(manifest, first[0].constant(1).tobytes())
        assert first[0].begin(header).status_code == 200
        assert case.federation.membership.expel(self.name_of(first[0])) == first[0].identity
        assert problem_of(first[0].poll()) is ProblemType.REVOKED
        part = first[0].put(header, 0, first[0].constant(1).tobytes())
        assert problem_of(part) is ProblemType.REVOKED
        case.advance()
        assert other.round() == manifest
        assert case.federation.status().n_enrolled == 2

    def test_what_was_accepted_before_stays_in_the_round(self, case, make_agents):
        agents = make_agents(case, 2)
        case.advance()
        manifest = agents[0].round()
        agents[0].upload(manifest, agents[0].constant(1))
        case.federation.membership.expel(self.name_of(agents[0]))
        agents[1].upload(manifest, agents[1].constant(3))
        case.advance()
        assert case.federation.releases.newest().aggregation.n_agents == 2

    def test_open_enrolment_does_not_let_it_in_again(self, case, make_agents, problem_of):
        (agent,) = make_agents(case, 1)
        case.federation.membership.expel(self.name_of(agent))
        assert problem_of(agent.enrol()) is ProblemType.INVITE_REFUSED
        assert problem_of(agent.poll()) is ProblemType.REVOKED

    @pytest.mark.parametrize("is_open", [True, False])
    def test_an_invite_made_before_does_not_let_it_in_again_but_a_newer_one_does(
        self, make_case, make_agent, problem_of, is_open
    ):
        case = make_case(open_enrolment=is_open)
        old = case.federation.membership.invite(n_uses=2)
        agent = make_agent(case)
        assert agent.enrol(old).status_code == 200
        case.clock.time += 1
        case.federation.membership.expel(self.name_of(agent))
        assert problem_of(agent.enrol(old)) is ProblemType.INVITE_REFUSED
        case.clock.time += 1
        assert agent.enrol(case.federation.membership.invite()).status_code == 200
        assert agent.poll().status_code == 200

    def test_it_survives_a_kill(self, case, make_agents, problem_of):
        (agent,) = make_agents(case, 1)
        case.federation.membership.expel(self.name_of(agent)[:9])
        case.restart()
        assert problem_of(agent.poll()) is ProblemType.REVOKED

    def test_leaving_afterwards_does_not_lift_it(self, case, make_agents, problem_of):
        (agent,) = make_agents(case, 1)
        case.federation.membership.expel(self.name_of(agent))
        assert agent.revoke().status_code == 200
        assert problem_of(agent.enrol()) is ProblemType.INVITE_REFUSED


class TestTransport:
    def test_a_stranger_is_refused(self, agent, problem_of):
        assert problem_of(agent.poll()) is ProblemType.UNKNOWN_AGENT

    def test_an_unsigned_request_is_refused(self, agent, problem_of):
        agent.enrol()
        response = agent.request("GET", f"{agent.case.prefix}/task", signed=False)
        assert problem_of(response) is ProblemType.UNSIGNED

    def test_a_replayed_nonce_is_refused(self, agent, problem_of):
        agent.enrol()
        path = f"{agent.case.prefix}/task"
        assert agent.request("GET", path, nonce=bytes(16)).status_code == 200
        replayed = agent.request("GET", path, nonce=bytes(16))
        assert problem_of(replayed) is ProblemType.REPLAYED

    @pytest.mark.parametrize("offset_s", [-SIGNATURE_WINDOW_S - 2, SIGNATURE_WINDOW_S + 2])
    def test_a_stale_time_is_refused_with_the_servers_time(self, agent, problem_of, offset_s):
        agent.enrol()
        agent.case.clock.time += 10_000
        now = agent.case.clock.now()
        response = agent.request("GET", f"{agent.case.prefix}/task", created=now + offset_s)
        assert problem_of(response) is ProblemType.STALE
        assert response.json()["server_time"] == now
        assert response.headers["retry-after"] == "1"

    def test_a_signature_from_before_a_restart_is_stale(self, agent, problem_of):
        agent.enrol()
        before = agent.case.clock.now()
        agent.case.restart()
        response = agent.request("GET", f"{agent.case.prefix}/task", created=before)
        assert problem_of(response) is ProblemType.STALE

    def test_a_body_damaged_on_its_way_asks_for_a_retry(self, agent, problem_of):
        path = f"{agent.case.prefix}/enrolments"
        signed = agent.enrolment()
        from protocol.transport_signing import sign_request

        headers = sign_request(
            agent.signer,
            method="POST",
            url="http://testserver" + path,
            body=signed,
            created=int(agent.case.clock.now()),
            nonce=bytes(16),
        )
        damaged = signed[:-2] + b" }"
        response = agent.case.client.post(path, content=damaged, headers=headers)
        assert problem_of(response) is ProblemType.DIGEST_MISMATCH

    @pytest.mark.parametrize("change", ["path", "query", "method", "signature"])
    def test_a_signature_for_something_else_is_refused(self, agent, problem_of, change):
        from protocol.transport_signing import sign_request

        agent.enrol()
        path = f"{agent.case.prefix}/task?after=0"
        signed_path = path.replace("after=0", "after=1") if change == "query" else path
        signed_path = path.replace("/task", "/tasks") if change == "path" else signed_path
        headers = sign_request(
            agent.signer,
            method="POST" if change == "method" else "GET",
            url="http://testserver" + signed_path,
            body=b"",
            created=int(agent.case.clock.now()),
            nonce=bytes(16),
        )
        if change == "signature":
            headers["Signature"] = headers["Signature"].replace("=:", "=:AAAA", 1)
        response = agent.case.client.get(path, headers=headers)
        assert problem_of(response) is ProblemType.BAD_SIGNATURE

    @pytest.mark.parametrize(
        "signature_input",
        [
            "",
            "x",
            "sheepfold=()",
            'sheepfold=("@method");keyid="AA"',
            "sheepfold=1;keyid=2",
            "\x80",
        ],
    )
    def test_a_malformed_signature_header_is_refused(self, agent, problem_of, signature_input):
        headers = [
            (b"signature-input", signature_input.encode("latin-1")),
            (b"signature", b"sheepfold=:AAAA:"),
        ]
        response = agent.case.client.get(f"{agent.case.prefix}/task", headers=headers)
        assert problem_of(response) in {ProblemType.BAD_SIGNATURE, ProblemType.UNSIGNED}


class TestPresence:
    def test_one_who_is_not_seen_for_long_is_absent_until_it_polls(self, agent):
        agent.enrol()
        case = agent.case
        assert case.federation.status().n_present == 1
        case.clock.time += case.federation.config.server.presence_s + 1
        assert case.federation.status().n_present == 0
        agent.poll()
        case.advance()
        assert case.federation.status().n_present == 1

    def test_being_seen_is_journalled_every_few_seconds_at_most(self, agent, monkeypatch):
        agent.enrol()
        store = agent.case.federation._store.agents
        writes = []
        saw = store.saw
        monkeypatch.setattr(
            store, "saw", lambda seen, **rest: (writes.append(dict(seen)), saw(seen, **rest))
        )
        for _ in range(20):
            agent.case.clock.time += 1
            agent.poll()
            agent.case.advance()
        assert 3 <= sum(bool(seen) for seen in writes) <= 5


def test_a_task_is_only_for_members(agent):
    agent.enrol()
    task = agent.task().task
    assert not isinstance(task, TrainTask)
    assert task.reason is WaitReason.GATHERING_AGENTS


def test_presence_follows_a_clock_that_is_set_back(agent):
    case = agent.case
    agent.enrol()
    case.advance(3600)
    assert agent.poll().status_code == 200
    case.clock.time -= 3000
    case.federation.membership._guard._nothing_up_to = 0  # its own matter, tested there
    assert agent.poll().status_code == 200
    case.advance()
    seen_at = case.federation._store.agents.get(agent.identity).last_seen
    assert seen_at == case.clock.now()


def test_what_was_seen_and_served_is_kept_while_the_database_does_not_answer(agent, monkeypatch):
    from aggregator_server.errors import StoreBusyError

    case = agent.case
    agent.enrol()
    case.advance(10)

    def fail(*_args: object, **_options: object) -> None:
        message = "no answer"
        raise StoreBusyError(message)

    agent.poll()
    case.federation.membership.served(7)
    monkeypatch.setattr(case.federation._store.agents, "saw", fail)
    with pytest.raises(StoreBusyError):
        case.advance()
    monkeypatch.undo()
    case.advance()
    assert case.federation._store.agents.get(agent.identity).last_seen == case.clock.now()
    assert case.federation.status().bytes_down == 7

"""The operator's commands: what they answer, and how they fail."""

import datetime
import json
import re
import socket

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from typer.testing import CliRunner

from aggregator_server.cli import app
from aggregator_server.federation import open_federation
from aggregator_server.store import database as database_module
from protocol.signing import Invite, Signer, fingerprint, format_fingerprint
from protocol.wire import b64u_encode
from quant.adapter import read_folder


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()

    def invoke(*arguments: object):
        return runner.invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def base_file(base, tmp_path):
    path = tmp_path / "base.json"
    path.write_text(base.model_dump_json())
    return path


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


@pytest.fixture
def founded(run, base_file, tmp_path):
    directory = tmp_path / "fed"
    result = run("init", directory, "--base", base_file, "--rank", 4)
    assert result.exit_code == 0, result.output
    return directory


def test_init_writes_what_it_was_told(run, base_file, tmp_path):
    result = run(
        "init", tmp_path / "fed", "--base", base_file, "--name", "Clinic", "--rounds", 7,
        "--cohort", 9, "--min-cohort", 3, "--rank", 2, "--open-enrolment",
        "--lora-rule", "ffa-lora", "--local-steps", 11, "--target-modules", "q_proj", "--json", "-",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    federation = open_federation(tmp_path / "fed", environment={})
    manifest = federation.charter.manifest
    federation.close()
    assert answer["update_n_bytes"] == federation.charter.layout.n_bytes
    assert answer["federation"] == federation.charter.path_id
    assert (manifest.name, manifest.rounds.n_rounds, manifest.lora.rank) == ("Clinic", 7, 2)
    assert (manifest.rounds.cohort_target, manifest.rounds.min_cohort) == (9, 3)
    assert manifest.lora.sent == ("B",)
    assert manifest.lora.target_modules == ("q_proj",)
    assert (manifest.training.local_steps, manifest.training.local_epochs) == (11, None)
    assert manifest.lora.alpha == 4


def test_init_tells_that_it_took_the_embedded_base(run, base_file, tmp_path, monkeypatch):
    import aggregator_server.cli as cli_module

    monkeypatch.setattr(cli_module, "_embedded_base", lambda: base_file)
    assert "embedded base" in run("init", tmp_path / "one").stderr
    assert "embedded base" not in run("init", tmp_path / "two", "--embedded").stderr


def test_an_invite_carries_the_servers_fingerprint_and_the_join_command(run, founded):
    answer = json.loads(run("invite", founded, "--uses", 3, "--json", "-").stdout)
    invite = Invite.parse(answer["invite"])
    federation = open_federation(founded, environment={})
    server = federation.charter.manifest.server
    federation.close()
    assert invite.server_fingerprint == fingerprint(server)
    assert answer["command"].startswith("sheepfold-agent join http://127.0.0.1:8750 --data FILE")
    assert answer["uses"] == 3


def edit_server(directory, **settings: str) -> None:
    path = directory / "federation.toml"
    text = path.read_text()
    for key, value in settings.items():
        text = re.sub(rf"(?m)^{key} = .*", f"{key} = {json.dumps(value)}", text)
    path.write_text(text)


class TestInvite:
    def test_its_address_is_where_the_server_listens_now(self, run, founded):
        from aggregator_server.lock import only_server

        with only_server(founded) as lock:
            lock.tell("http://127.0.0.1:4321")
            result = run("invite", founded, "--json", "-")
        answer = json.loads(result.stdout)
        assert answer["url"] == "http://127.0.0.1:4321"
        assert "Only agents on this machine reach http://127.0.0.1:4321" in result.stderr

    def test_a_server_that_has_ended_is_forgotten(self, run, founded):
        from aggregator_server.lock import only_server

        with only_server(founded) as lock:
            lock.tell("http://127.0.0.1:4321")
        assert json.loads(run("invite", founded, "--json", "-").stdout)["url"].endswith(":8750")

    def test_a_server_that_is_not_ready_yet_has_no_address(self, run, founded):
        from aggregator_server.lock import only_server, served_at

        with only_server(founded):
            assert served_at(founded) is None

    def test_the_public_url_goes_before_all(self, run, founded):
        edit_server(founded, public_url="https://fed.example.org/", host="0.0.0.0")
        result = run("invite", founded, "--json", "-")
        assert json.loads(result.stdout)["url"] == "https://fed.example.org"
        assert not result.stderr

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7"])
    def test_an_address_that_no_agent_can_use_is_not_printed(self, run, founded, host):
        edit_server(founded, host=host)
        result = run("invite", founded)
        assert result.exit_code == 0
        assert "set public_url" in result.stderr
        assert "join URL --data FILE" in result.stdout
        assert host not in result.stdout

    def test_a_port_that_is_not_chosen_yet_is_not_printed(self, run, founded):
        (founded / "federation.toml").write_text(
            (founded / "federation.toml").read_text().replace("port = 8750", "port = 0")
        )
        result = run("invite", founded, "--json", "-")
        assert json.loads(result.stdout)["url"] is None
        assert "No server runs" in result.stderr

    def test_https_on_a_host_of_its_own_needs_no_note(self, run, founded):
        from aggregator_server.lock import only_server

        with only_server(founded) as lock:
            lock.tell("https://fed.example.org:8750")
            result = run("invite", founded, "--json", "-")
        assert json.loads(result.stdout)["url"] == "https://fed.example.org:8750"
        assert not result.stderr


class TestPlaces:
    def test_init_takes_places_from_the_environment_and_flags_go_before(
        self, run, base_file, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("SHEEPFOLD_SERVER_DATABASE_URL", f"sqlite:///{tmp_path / 'env.db'}")
        monkeypatch.setenv("SHEEPFOLD_SERVER_BLOBS_URL", str(tmp_path / "env-blobs"))
        flags = ("--blobs-url", tmp_path / "flag-blobs")
        assert run("init", tmp_path / "fed", "--base", base_file, *flags).exit_code == 0
        assert (tmp_path / "env.db").is_file()
        assert (tmp_path / "flag-blobs" / "adapters").is_dir()
        assert not (tmp_path / "env-blobs").exists()
        monkeypatch.delenv("SHEEPFOLD_SERVER_DATABASE_URL")
        monkeypatch.delenv("SHEEPFOLD_SERVER_BLOBS_URL")
        assert run("status", tmp_path / "fed").exit_code == 0  # the file says it all
        assert not (tmp_path / "fed" / "federation.db").exists()

    def test_a_password_is_not_written_and_init_says_so(
        self, run, base_file, tmp_path, monkeypatch
    ):
        url = f"sqlite:///{tmp_path / 'x.db'}?password=hunter2"
        monkeypatch.setenv("SHEEPFOLD_SERVER_DATABASE_URL", url)
        monkeypatch.setattr(database_module, "_sqlite_engine", lambda _: engine_at(tmp_path))
        result = run("init", tmp_path / "fed", "--base", base_file)
        assert result.exit_code == 0, result.output
        assert "set it always: SHEEPFOLD_SERVER_DATABASE_URL" in result.stdout
        assert "hunter2" not in (tmp_path / "fed" / "federation.toml").read_text() + result.output


engine_of_sqlite = database_module._sqlite_engine


def engine_at(folder):
    return engine_of_sqlite(f"sqlite:///{folder / 'x.db'}")


def encrypted_pair(folder):
    key = ec.generate_private_key(ec.SECP256R1())
    path = folder / "key.pem"
    locked = BestAvailableEncryption(b"password")
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    return folder / "cert.pem", path


class TestAgents:
    @pytest.fixture
    def federation(self, make_case, make_agents):
        case = make_case(cohort_target=3)
        case.agents = make_agents(case, 3)
        case.advance()
        return case

    def test_members_are_listed_with_what_they_did(self, run, federation):
        agent = federation.agents[1]
        agent.upload(agent.round(), agent.constant(1))
        listed = json.loads(run("agents", "list", federation.directory, "--json", "-").stdout)
        assert sorted(row["n_accepted"] for row in listed) == [0, 0, 1]
        by_name = {row["agent"]: row for row in listed}
        row = by_name[b64u_encode(agent.identity)]
        assert row["n_accepted"] == 1
        assert row["enrolled_at"].startswith("2027-01-15T08:00")
        assert row["revoked_at"] is None
        assert b64u_encode(agent.identity) in run("agents", "list", federation.directory).stdout

    def test_one_is_revoked_by_the_beginning_of_its_name(self, run, federation, problem_of):
        listed = json.loads(run("agents", "list", federation.directory, "--json", "-").stdout)
        name = listed[1]["agent"]
        result = run("agents", "revoke", federation.directory, name[:12])
        assert result.exit_code == 0, result.output
        assert name in result.stdout
        after = json.loads(run("agents", "list", federation.directory, "--json", "-").stdout)
        assert [row["revoked_by_operator"] for row in after] == [False, True, False]
        assert "ended by the operator" in run("agents", "list", federation.directory).stdout

    def test_a_beginning_that_fits_several_revokes_none(self, run, federation):
        result = run("agents", "revoke", federation.directory, "")
        assert result.exit_code == 1
        assert "3 agents have an identity that begins with ''" in result.stderr


def test_an_evaluator_is_named_at_the_founding_and_told_by_status(run, base_file, tmp_path):
    key = Signer.generate().identity
    directory = tmp_path / "gated"
    result = run("init", directory, "--base", base_file, "--evaluator", b64u_encode(key))
    assert result.exit_code == 0, result.output
    federation = open_federation(directory, environment={})
    assert federation.charter.manifest.gate.evaluator == key
    federation.close()
    assert f"gate: evaluator {format_fingerprint(key)}" in run("status", directory).stdout
    refused = run("init", tmp_path / "other", "--base", base_file, "--evaluator", "abc")
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1


def test_incidents_are_told(run, make_case, make_agent, start_round):
    case = make_case(cohort_target=2, evaluator=Signer.generate().identity)
    assert "Nothing happened" in run("incidents", case.directory).stdout
    assert json.loads(run("incidents", case.directory, "--json", "-").stdout) == []
    agents, manifest = start_round(case, 2)
    for agent in agents:
        agent.upload(manifest, agent.constant(1))
    case.advance()
    case.advance(case.manifest.gate.wait_s + 1)
    (incident,) = json.loads(run("incidents", case.directory, "--json", "-").stdout)
    assert (incident["round"], incident["kind"]) == (1, "evaluator-silent")
    assert "did not answer" in run("incidents", case.directory).stdout
    status = run("status", case.directory)
    assert "incidents: 1" in status.stdout
    assert json.loads(run("status", case.directory, "--json", "-").stdout)["n_incidents"] == 1


def test_status_is_json_with_null_for_what_is_not(run, founded):
    status = json.loads(run("status", founded, "--json", "-").stdout)
    assert status["round"] is None
    assert status["newest_release"] == 0
    assert "ε = ∞" in run("status", founded).stdout


def test_json_goes_to_a_file_too(run, founded, tmp_path):
    result = run("status", founded, "--json", tmp_path / "status.json")
    assert json.loads((tmp_path / "status.json").read_text())["n_enrolled"] == 0
    assert "0 enrolled" in result.stdout


def test_releases_are_listed_shown_rolled_back_and_exported(run, founded, tmp_path):
    assert run("releases", "rollback", founded, 0).exit_code == 0
    listed = json.loads(run("releases", "list", founded, "--json", "-").stdout)
    assert [release["number"] for release in listed] == [0, 1]
    shown = json.loads(run("releases", "show", founded, 1, "--json", "-").stdout)
    assert shown["rolled_back_to"] == 0
    assert run("releases", "export", founded, 1, tmp_path / "adapter").exit_code == 0
    assert len(read_folder(tmp_path / "adapter")) == 8


def test_a_rule_that_does_not_go_with_masks_is_refused_before_anything_is_made(
    run, base_file, tmp_path
):
    result = run(
        "init", tmp_path / "new", "--base", base_file, "--cohort", 5, "--min-cohort", 5,
        "--lora-rule", "flexlora",
    )  # fmt: skip
    assert result.exit_code == 1
    assert 'lora.rule is flexlora, so masking.mode must be "off"' in " ".join(result.output.split())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("releases", "show", "DIR", 9), "there is no release 9; the newest is 0"),
        (("status", "/nonexistent"), "sheepfold-server init"),
        (("init", "DIR", "--base", "BASE"), "not empty"),
        (("init", "NEW", "--base", "/nonexistent"), "describe-base"),
        (("init", "NEW", "--base", "BASE", "--rank", 0), "rank"),
        (("init", "NEW", "--base", "BASE", "--batch-size", 0), "batch_size"),
        (("init", "NEW", "--base", "BASE", "--min-cohort", 9), "min_cohort 9 is above"),
        (("init", "NEW", "--base", "BASE", "--local-steps", 1, "--local-epochs", 1), "exactly one"),
        (("serve", "DIR", "--host", "0.0.0.0"), "--behind-proxy"),
        (("serve", "DIR", "--tls-cert", "x.pem"), "go together"),
        (("serve", "DIR", "--tls-cert", "/no/x", "--tls-key", "y"), "'/no/x'"),
        (("serve", "DIR", "--tls-cert", "BASE", "--tls-key", "BASE"), "TLS files cannot be used"),
        (("serve", "DIR", "--tls-cert", "CERT", "--tls-key", "KEY"), "is encrypted"),
        (("serve", "DIR", "--port", "TAKEN"), "cannot listen on host 127.0.0.1, port"),
        (("init", "NEW", "--base", "BASE", "--database-url", "mysql://h/d"), "postgresql"),
        (("init", "NEW", "--base", "BASE", "--blobs-url", "nonsense://h"), "blobs_url"),
        (("init", "NEW", "--base", "BASE", "--cohort", 9000), "a masked round has at most 10000"),
        (("agents", "revoke", "DIR", "xyz"), "no agent has an identity that begins with 'xyz'"),
        (("agents", "revoke", "DIR", "-x"), "no agent has an identity that begins with '-x'"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_exit_code_1(
    run, founded, base_file, tmp_path, taken_port, arguments, sentence
):
    places = {
        "DIR": founded,
        "BASE": base_file,
        "NEW": tmp_path / "new",
        "TAKEN": taken_port,
        **dict(zip(("CERT", "KEY"), encrypted_pair(tmp_path), strict=True)),
    }
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 1
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("init",),
        ("nonsense",),
        ("init", "NEW", "--embedded", "--base", "BASE"),
        ("init", "NEW", "--base", "BASE", "--lora-rule", "C"),
        ("invite", "DIR", "--uses", "0"),
        ("releases", "show", "DIR", "-1"),
    ],
)
def test_wrong_usage_is_exit_code_2(run, founded, base_file, tmp_path, arguments):
    places = {"DIR": founded, "BASE": base_file, "NEW": tmp_path / "new"}
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2


def test_a_second_server_on_the_same_folder_is_refused(run, founded):
    from aggregator_server.lock import only_server

    with only_server(founded):
        result = run("serve", founded, "--port", 0)
    assert result.exit_code == 1
    assert "another process serves" in result.stderr


@pytest.mark.parametrize("command", ["init", "serve", "invite", "status"])
def test_help_teaches_by_example(run, command):
    assert f"sheepfold-server {command} fed" in run(command, "--help").output

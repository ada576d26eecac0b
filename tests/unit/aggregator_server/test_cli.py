"""The operator's commands: what they answer, and how they fail."""

import json

import pytest
from typer.testing import CliRunner

from aggregator_server.cli import app
from aggregator_server.federation import open_federation
from protocol.signing import Invite, fingerprint
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
def founded(run, base_file, tmp_path):
    directory = tmp_path / "fed"
    result = run("init", directory, "--base", base_file, "--rank", 4)
    assert result.exit_code == 0, result.output
    return directory


def test_init_writes_what_it_was_told(run, base_file, tmp_path):
    result = run(
        "init", tmp_path / "fed", "--base", base_file, "--name", "Clinic", "--rounds", 7,
        "--cohort", 9, "--min-cohort", 3, "--rank", 2, "--sent", "B", "--open-enrolment",
        "--local-steps", 11, "--target-modules", "q_proj", "--json", "-",
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


def test_status_is_json_with_null_for_what_is_not(run, founded):
    status = json.loads(run("status", founded, "--json", "-").stdout)
    assert status["round"] is None
    assert status["newest_release"] == 0
    assert "epsilon = infinity" in run("status", founded).stdout


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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("releases", "show", "DIR", 9), "there is no release 9; the newest is 0"),
        (("status", "/nonexistent"), "sheepfold-server init"),
        (("init", "DIR", "--base", "BASE"), "not empty"),
        (("init", "NEW", "--base", "/nonexistent"), "describe-base"),
        (("init", "NEW", "--base", "BASE", "--rank", 0), "rank"),
        (("init", "NEW", "--base", "BASE", "--min-cohort", 9), "min_cohort 9 is above"),
        (("init", "NEW", "--base", "BASE", "--local-steps", 1, "--local-epochs", 1), "exactly one"),
        (("serve", "DIR", "--host", "0.0.0.0"), "--behind-proxy"),
        (("serve", "DIR", "--tls-cert", "x.pem"), "go together"),
        (("serve", "DIR", "--tls-cert", "x", "--tls-key", "y"), "TLS files cannot be used"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_exit_code_1(
    run, founded, base_file, tmp_path, arguments, sentence
):
    places = {"DIR": founded, "BASE": base_file, "NEW": tmp_path / "new"}
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
        ("init", "NEW", "--base", "BASE", "--sent", "C"),
        ("invite", "DIR", "--uses", "0"),
        ("releases", "show", "DIR", "-1"),
    ],
)
def test_wrong_usage_is_exit_code_2(run, founded, base_file, tmp_path, arguments):
    places = {"DIR": founded, "BASE": base_file, "NEW": tmp_path / "new"}
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2


def test_a_second_server_on_the_same_folder_is_refused(run, founded):
    from aggregator_server.web.serving import only_server

    with only_server(founded):
        result = run("serve", founded, "--port", 0)
    assert result.exit_code == 1
    assert "another process serves" in result.stderr


@pytest.mark.parametrize("command", ["init", "serve", "invite", "status"])
def test_help_teaches_by_example(run, command):
    assert f"sheepfold-server {command} fed" in run(command, "--help").output

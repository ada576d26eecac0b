"""What a volunteer types, in process, against a server that follows a script."""

import io
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent import cli
from edge_agent.home import AgentHome
from edge_agent.journal import Journal
from protocol.messages import (
    Acknowledged,
    Credential,
    Discovery,
    Enrolment,
    ReleasePage,
    Revocation,
)
from protocol.problems import ProblemType
from protocol.signing import Invite, Signed, fingerprint, sign
from protocol.wire import parse

COMMANDS = [
    "plan",
    "join",
    "run",
    "status",
    "pause",
    "resume",
    "sent",
    "leave",
    "forget",
    "ask",
    "chat",
    "export",
    "describe-base",
    "install-service",
]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


Type = Callable[..., Done]


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "_JOIN_PATIENCE_S", 0.0)
    monkeypatch.setenv("SHEEPFOLD_AGENT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def home(tmp_path: Path) -> AgentHome:
    return AgentHome(tmp_path / "home")


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Type:
    """Run a command as typed; `answer` is what the owner types at a question."""

    def run(*arguments: str, answer: str | None = None) -> Done:
        monkeypatch.setattr(sys, "argv", ["sheepfold-agent", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{answer}\n" if answer else ""))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Done(code=int(ended.value.code or 0), out=captured.out, err=captured.err)

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "notes.jsonl"
    rows = [{"instruction": f"Say {k}.", "response": f"{k}"} for k in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class Federation:
    """A federation that enrols everybody, behind the scripted server."""

    server: object
    manifest: object
    invite: str
    answers: dict[str, object]


@pytest.fixture
def make_federation(server, answer, server_key, make_manifest, make_release):
    def make(*, enrolment: str = "open", **changes) -> Federation:
        manifest = make_manifest(**changes)
        discovery = Discovery(
            federation=sign(server_key, "federation", manifest).signed,
            enrolment=enrolment,
            server_time=1.0,
        )
        release = sign(server_key, "release", make_release(manifest)).signed
        federation = Federation(
            server,
            manifest,
            Invite(code=bytes(16), server_fingerprint=fingerprint(server_key.identity)).format(),
            {},
        )

        def give(seen):
            for ending, special in federation.answers.items():
                if seen.path.endswith(ending):
                    return special
            if seen.path == "/v1/federation":
                return answer(body=discovery.canonical())
            if "/releases" in seen.path:
                return answer(body=ReleasePage(releases=(release,), newest=0).canonical())
            if seen.path.endswith("/enrolments"):
                enrolled = parse(Signed[Enrolment], seen.body).body
                credential = Credential(
                    federation=manifest.federation, agent=enrolled.agent, expires_at=2_000_000_000
                )
                return answer(body=sign(server_key, "credential", credential).signed.canonical())
            assert seen.path.endswith("/enrolments/revoke")
            parse(Signed[Revocation], seen.body)
            return answer(body=Acknowledged().canonical())

        server.script = [give]
        return federation

    return make


# Help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(type_in: Type, command: str) -> None:
    done = type_in(command, "--help")
    assert done.code == 0
    assert "Usage:" in done.out
    assert len(done.out) > 200


def test_the_help_lists_every_command_and_how_to_begin(type_in: Type) -> None:
    done = type_in("--help")
    assert done.code == 0
    for command in COMMANDS:
        assert command in done.out
    assert "First time" in done.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--unknown",),
        ("shear",),
        ("status", "--unknown"),
        ("join",),
        ("join", "https://h"),
        ("join", "https://h", "--data", "x", "--threads", "0"),
        ("join", "https://h", "--data", "x", "--threads", "two"),
        ("join", "https://h", "--data", "x", "--max-vram", "0"),
        ("join", "https://h", "--data", "x", "--on-malformed", "ignore"),
        ("export",),
    ],
)
def test_wrong_usage_exits_with_2(type_in: Type, arguments: tuple[str, ...]) -> None:
    assert type_in(*arguments).code == 2


# Before joining


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("status", "--json", "-"),
        ("pause",),
        ("resume",),
        ("run",),
        ("sent",),
        ("leave", "--yes"),
        ("ask", "newest", "Where?"),
        ("chat", "newest"),
        ("export", "folder"),
    ],
)
def test_before_join_every_command_says_how_to_begin(
    type_in: Type, home: AgentHome, arguments: tuple[str, ...]
) -> None:
    done = type_in(*arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.count("\n") == 1
    assert "no federation was joined" in done.err
    assert "sheepfold-agent join" in done.err
    assert not home.root.exists()


def test_there_is_nothing_to_forget_before_joining(type_in: Type, home: AgentHome) -> None:
    done = type_in("forget", "--yes")
    assert done.code == 0
    assert "no agent" in done.err


def test_joining_where_nobody_listens_is_one_sentence(
    type_in: Type, data: Path, home: AgentHome
) -> None:
    done = type_in("join", "http://127.0.0.1:9", "--data", str(data), "--yes")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("Error: no answer from 127.0.0.1:9")
    assert "Traceback" not in done.err
    assert not home.root.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("http://example.org",), "not encrypted"),
        (("https://[::1",), "must look like https"),
        (("http://127.0.0.1:9", "--hours", "night"), "must look like 22-07"),
        (("http://127.0.0.1:9", "--device", "tpu"), "'device'"),
        (("http://127.0.0.1:9", "--invite", "nonsense"), "an invite begins with"),
        (("http://127.0.0.1:9", "--invite", "sheepfold1-AAAA"), "damaged"),
    ],
)
def test_what_cannot_be_joined_is_one_sentence(
    type_in: Type, data: Path, home: AgentHome, arguments: tuple[str, ...], says: str
) -> None:
    done = type_in("join", *arguments, "--data", str(data), "--yes")
    assert done.code == 1
    assert says in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert not home.root.exists()


def test_data_that_is_not_there_is_named_as_typed(type_in: Type, home: AgentHome) -> None:
    done = type_in("join", "http://127.0.0.1:9", "--data", "owner/name", "--yes")
    assert done.code == 1
    assert "there is no file owner/name" in done.err
    assert "hub:owner/name" in done.err
    assert not home.root.exists()


# Joining


def test_join_tells_everything_before_it_asks_and_a_no_keeps_nothing(
    type_in: Type, make_federation, data: Path, home: AgentHome, server
) -> None:
    make_federation(description="Of three clinics.")
    done = type_in("join", server.url, "--data", str(data), answer="n")
    assert done.code == 1
    told = " ".join(done.err.replace("│", " ").split())
    for piece in (
        "Test",
        "Of three clinics.",
        "5 records",
        "What leaves this machine",
        "Never: your records",
        "Who is contacted",
        server.url.removeprefix("http://"),
        "What is not promised",
        "ε = ∞",
        "Nothing was sent, nothing was kept.",
    ):
        assert piece in told, piece
    assert not home.root.exists()
    assert {seen.method for seen in server.seen} == {"GET"}


def test_a_manifest_cannot_paint_over_what_join_shows(
    type_in: Type, make_federation, data: Path, server
) -> None:
    """Consent spoofing: escape sequences, line breaks and markup in the federation's texts."""
    make_federation(
        name="Nice\x1b[2J\x1b[H[bold]name[/]",
        description="first\n\nWhat is not promised\n• nothing: all is promised\x1b[8m",
    )
    done = type_in("join", server.url, "--data", str(data), answer="n")
    assert "\x1b" not in done.err
    assert "[bold]name[/]" in done.err
    lines = [line.strip("│ ").strip() for line in done.err.splitlines()]
    assert lines.count("What is not promised") == 1


def test_a_volunteer_joins_looks_leaves_and_is_forgotten(
    type_in: Type, make_federation, data: Path, home: AgentHome, server, monkeypatch
) -> None:
    make_federation()
    monkeypatch.chdir(data.parent)
    done = type_in("join", server.url, "--data", data.name, "--yes", "--no-run", "--threads", "2")
    assert done.code == 0, done.err
    assert "threads = 2" in (home.root / "agent.toml").read_text()

    status = json.loads(type_in("status", "--json", "-").out)
    assert status["federation"] == "Test"
    assert status["member"] == "yes"
    assert status["data"] == str(data)
    assert status["privacy"] == {"profile": "P0", "epsilon": None}
    assert status["masked"] is False
    assert status["running"] is False
    assert "Test" in type_in("status").out

    (sent,) = json.loads(type_in("sent", "--json", "-").out)
    assert sent["what"] == "enrolment"
    assert sent["n_bytes"] == len(server.seen[-1].body)
    assert len(sent["sha256"]) == 64
    assert "enrolment" in type_in("sent").out

    for command, paused in (("pause", True), ("resume", False)):
        assert type_in(command).code == 0
        assert json.loads(type_in("status", "--json", "-").out)["paused"] is paused

    monkeypatch.chdir("/")
    left = type_in("leave", "--yes")
    assert left.code == 0
    assert "cannot be recalled" in " ".join(left.err.split())
    assert json.loads(type_in("status", "--json", "-").out)["member"] == "left"
    assert server.seen[-1].path.endswith("/revoke")
    again = type_in("run")
    assert again.code == 1
    assert "join` again" in again.err

    assert type_in("forget", "--yes").code == 0
    assert not home.root.exists()


def test_leaving_without_an_answer_still_ends_the_part_of_this_machine(
    type_in: Type, make_federation, data: Path, home: AgentHome, server, answer
) -> None:
    federation = make_federation()
    type_in("join", server.url, "--data", str(data), "--yes", "--no-run")
    federation.answers["/revoke"] = answer(drop=True)
    done = type_in("leave", "--yes")
    assert done.code == 1
    assert "no longer takes part" in " ".join(done.err.split())
    journal = Journal(home.journal_path)
    assert journal.has_left()
    journal.close()
    del federation.answers["/revoke"]
    assert type_in("leave", "--yes").code == 0


def test_who_is_no_member_any_more_has_left(
    type_in: Type, make_federation, data: Path, server, refuse
) -> None:
    federation = make_federation()
    type_in("join", server.url, "--data", str(data), "--yes", "--no-run")
    federation.answers["/revoke"] = refuse(ProblemType.UNKNOWN_AGENT)
    assert type_in("leave", "--yes").code == 0


def test_an_invite_is_asked_for_and_never_sent(
    type_in: Type, make_federation, data: Path, home: AgentHome, server
) -> None:
    federation = make_federation(enrolment="invite")
    done = type_in("join", server.url, "--data", str(data), "--yes", "--no-run")
    assert done.code == 1
    assert "by invite only; add --invite CODE" in done.err
    assert not home.root.exists()
    done = type_in(
        "join", server.url, "--data", str(data), "--yes", "--no-run", "--invite", federation.invite
    )
    assert done.code == 0, done.err
    assert b'"invite":{' in server.seen[-1].body
    code = federation.invite.removeprefix("sheepfold1-")
    assert not any(code[:20].encode() in seen.body for seen in server.seen)


def test_a_refused_invite_may_be_tried_again(
    type_in: Type, make_federation, data: Path, server, refuse
) -> None:
    federation = make_federation()
    federation.answers["/enrolments"] = refuse(ProblemType.INVITE_REFUSED)
    join = ("join", server.url, "--data", str(data), "--yes", "--no-run")
    done = type_in(*join)
    assert done.code == 1
    assert "A valid, unused invite is needed." in done.err
    assert type_in("run").err == "Error: the enrolment was not finished; run `join` again\n"
    del federation.answers["/enrolments"]
    assert type_in(*join).code == 0


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"federation": bytes(16)}, id="another federation"),
        pytest.param({"name": "Renamed"}, id="the same id with other terms"),
    ],
)
def test_a_home_is_of_one_federation_and_what_was_accepted_stays(
    type_in: Type, make_federation, data: Path, server, other
) -> None:
    """Bait and switch: the federation that was pinned answers with other terms."""
    make_federation()
    join = ("join", server.url, "--data", str(data), "--yes", "--no-run")
    assert type_in(*join).code == 0
    assert type_in(*join).code == 0
    make_federation(**other)
    done = type_in(*join)
    assert done.code == 1
    assert "belongs to the federation 'Test'; use another --home, or `forget` first" in done.err


def test_the_same_id_under_another_key_is_another_federation(
    type_in: Type, make_federation, data: Path, server, refuse, agent_key, monkeypatch, server_key
) -> None:
    """The pinned key cannot be exchanged, even before the first credential."""
    federation = make_federation()
    federation.answers["/enrolments"] = refuse(ProblemType.INVITE_REFUSED)
    join = ("join", server.url, "--data", str(data), "--yes", "--no-run")
    assert type_in(*join).code == 1
    other = agent_key.identity
    monkeypatch.setattr(server_key, "identity", other)
    monkeypatch.setattr(server_key, "_private_key", agent_key.private_key)
    make_federation(server=other, registrar=other)
    assert "belongs to the federation" in type_in(*join).err


def test_a_federation_of_a_newer_version_is_refused_by_the_fields_name(
    type_in: Type, make_federation, data: Path, server, answer, home: AgentHome
) -> None:
    federation = make_federation()
    document = json.dumps(federation.manifest.as_json() | {"masking": {"version": 1, "mode": "x"}})
    signed = {"body": json.loads(document), "key": "A" * 43, "signature": "A" * 86}
    body = json.dumps({"federation": signed, "enrolment": "open", "server_time": 1})
    federation.answers["/v1/federation"] = answer(body=body.encode())
    done = type_in("join", server.url, "--data", str(data), "--yes")
    assert done.code == 1
    assert "masking.mode" in done.err.splitlines()[-1]
    assert not home.root.exists()


# Files


def test_forgetting_works_when_the_journal_is_damaged(
    type_in: Type, make_federation, data: Path, home: AgentHome, server
) -> None:
    make_federation()
    type_in("join", server.url, "--data", str(data), "--yes", "--no-run")
    for path in home.root.glob("journal.sqlite*"):
        path.unlink()
    home.journal_path.write_bytes(b"damaged" * 100)
    assert "is not a journal" in type_in("status").err
    assert type_in("forget", "--yes").code == 0
    assert not home.root.exists()


def test_forgetting_asks(type_in: Type, make_federation, data, home: AgentHome, server) -> None:
    make_federation()
    type_in("join", server.url, "--data", str(data), "--yes", "--no-run")
    done = type_in("forget", answer="n")
    assert done.code == 1
    assert "still a member" in done.err
    assert home.key_path.exists()


def test_a_home_at_work_is_neither_forgotten_nor_joined_again(
    type_in: Type, make_federation, data: Path, home: AgentHome, server
) -> None:
    make_federation()
    join = ("join", server.url, "--data", str(data), "--yes", "--no-run")
    type_in(*join)
    lock = home.lock()
    for arguments in (("forget", "--yes"), join, ("run",)):
        done = type_in(*arguments)
        assert done.code == 1
        assert "another agent already works" in done.err
    lock.release()
    assert home.key_path.exists()


def test_json_that_cannot_be_written_is_one_sentence(
    type_in: Type, make_federation, data: Path, server, tmp_path: Path
) -> None:
    make_federation()
    type_in("join", server.url, "--data", str(data), "--yes", "--no-run")
    done = type_in("status", "--json", str(tmp_path / "no" / "status.json"))
    assert done.code == 1
    assert done.err.startswith("Error: ")
    assert "Traceback" not in done.err
    target = tmp_path / "status.json"
    assert type_in("status", "--json", str(target)).code == 0
    assert json.loads(target.read_text())["federation"] == "Test"


def test_new_data_are_kept_by_their_absolute_path(
    type_in: Type, make_federation, data: Path, home: AgentHome, server, monkeypatch
) -> None:
    make_federation()
    type_in("join", server.url, "--data", str(data), "--yes", "--no-run")
    other = data.with_name("other.jsonl")
    other.write_text("")
    monkeypatch.chdir(other.parent)
    lock = home.lock()  # so that it ends before it trains
    type_in("run", "--data", "other.jsonl")
    lock.release()
    assert json.loads(type_in("status", "--json", "-").out)["data"] == str(other)


def test_the_service_names_this_home(type_in: Type, home: AgentHome) -> None:
    done = type_in("install-service")
    assert done.code == 0
    assert f"--home {home.root}" in done.out


def test_a_base_is_described_for_the_operator(
    type_in: Type, random_base_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "base.json"
    arguments = ("describe-base", str(random_base_dir), "--out", str(out))
    done = type_in(*arguments, "--name", "org/name")
    assert done.code == 0, done.err
    assert json.loads(out.read_text())["base"]["model"] == "org/name"
    done = type_in(*arguments, "--name", "x" * 300)
    assert done.code == 1
    assert "base.model" in done.err
    done = type_in("describe-base", str(tmp_path / "nowhere"))
    assert done.code == 1
    assert "there is no folder" in done.err


@pytest.fixture(autouse=True)
def _same_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

"""The volunteer's commands as typed, against a real server."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent.journal import Journal
from protocol.phases import AgentPhase
from simulations.processes import (
    Process,
    child_environment,
    command_of,
    run_command,
    start_server,
)

WITHIN_S = 120.0


def agent(*arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command_of("edge_agent.cli", *arguments),
        env=child_environment(),
        input=answer,
        capture_output=True,
        text=True,
        check=False,
    )


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < until, f"{what} did not happen within {WITHIN_S} s"
        time.sleep(0.1)


@dataclass
class Place:
    """A served federation of one-agent rounds, and a volunteer's machine."""

    url: str
    server_folder: Path
    home: Path
    data: Path
    base: Path
    processes: list[Process]

    def join(self, *more: str, answer: str = "") -> subprocess.CompletedProcess[str]:
        return agent(
            "join",
            self.url,
            "--data",
            str(self.data),
            "--home",
            str(self.home),
            "--base",
            str(self.base),
            "--threads",
            "1",
            "--device",
            "cpu",
            *more,
            answer=answer,
        )

    def status(self) -> dict[str, object]:
        done = agent("status", "--home", str(self.home), "--json", "-")
        assert done.returncode == 0, done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found

    def open_part(self) -> AgentPhase | None:
        journal = Journal(self.home / "journal.sqlite")
        part = journal.open_part()
        journal.close()
        return None if part is None else part.phase

    def start(self) -> Process:
        command = command_of("edge_agent.cli", "run", "--home", str(self.home))
        process = Process.start("the agent", command, self.home.parent / "agent.log")
        self.processes.append(process)
        return process


@pytest.fixture
def place(tmp_path: Path, random_base_dir: Path) -> Iterator[Place]:
    base_json = tmp_path / "base.json"
    run_command("edge_agent.cli", "describe-base", str(random_base_dir), "--out", str(base_json))
    folder = tmp_path / "server"
    run_command(
        "aggregator_server.cli",
        *("init", str(folder), "--base", str(base_json), "--open-enrolment", "--rounds", "50"),
        *("--cohort", "1", "--min-cohort", "1", "--local-steps", "100000"),
        *("--target-modules", "q_proj,v_proj"),
    )
    server, url = start_server(folder, tmp_path / "server.log")
    data = tmp_path / "my-secret-notes.jsonl"
    rows = [{"instruction": f"Say {k}.", "output": f"word {k}"} for k in range(12)]
    rows.append({"instruction": "no answer", "output": ""})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    place = Place(url, folder, tmp_path / "home", data, random_base_dir, [server])
    yield place
    for process in place.processes:
        process.kill()


def test_join_tells_what_leaves_and_keeps_nothing_when_the_owner_says_no(place: Place) -> None:
    refused = place.join(answer="n\n")
    assert refused.returncode == 1
    told = " ".join(refused.stderr.replace("│", " ").split())
    for words in (
        "What leaves this machine",
        "adapter update of",
        "Your agent's public key",
        "Never: your records",
        "Who is contacted",
        place.url.removeprefix("http://"),
        "ε = ∞",
        "12 records",
        "1 cannot be used",
        "my-secret-notes.jsonl:13",
    ):
        assert words in told, words
    assert not place.home.exists() or not list(place.home.iterdir())
    status = json.loads(
        run_command("aggregator_server.cli", "status", str(place.server_folder), "--json", "-")
    )
    assert status["n_enrolled"] == 0


def test_a_volunteer_pauses_resumes_stops_leaves_and_is_forgotten(place: Place) -> None:
    joined = place.join("--yes", "--no-run")
    assert joined.returncode == 0, joined.stderr
    assert "Joined" in joined.stderr
    first = place.start()
    wait_for("training", lambda: place.open_part() is AgentPhase.TRAINING)
    found = place.status()
    assert (found["running"], found["paused"]) == (True, False)
    assert found["privacy"] == {"profile": "P0", "epsilon": None}

    second = agent("run", "--home", str(place.home))
    assert second.returncode == 1
    assert "another agent already works" in " ".join(second.stderr.split())

    assert agent("pause", "--home", str(place.home)).returncode == 0
    state = place.home / "training.safetensors"
    wait_for("the pause", state.exists)
    time.sleep(1.0)
    before = state.stat().st_mtime_ns
    time.sleep(1.5)
    assert state.stat().st_mtime_ns == before, "it trained on while it was paused"
    assert place.status()["paused"] is True
    assert agent("resume", "--home", str(place.home)).returncode == 0
    wait_for("training to go on", lambda: state.stat().st_mtime_ns != before)

    first.stop()
    assert first.popen.returncode == 0, first.tail()
    assert place.open_part() is AgentPhase.TRAINING, "a stop keeps the round"

    sent = json.loads(agent("sent", "--home", str(place.home), "--json", "-").stdout)
    assert [item["what"] for item in sent] == ["enrolment"]
    assert sent[0]["n_bytes"] > 0
    assert len(sent[0]["sha256"]) == 64
    raw = (place.home / "journal.sqlite").read_bytes()
    assert b"word 3" not in raw, "a record stands in the journal"

    left = agent("leave", "--home", str(place.home), "--yes")
    assert left.returncode == 0, left.stderr
    assert "cannot be recalled" in " ".join(left.stderr.split())
    again = agent("run", "--home", str(place.home))
    assert again.returncode == 1
    assert "revoked" in again.stderr
    status = json.loads(
        run_command("aggregator_server.cli", "status", str(place.server_folder), "--json", "-")
    )
    assert status["n_enrolled"] == 0

    assert agent("forget", "--home", str(place.home), "--yes").returncode == 0
    assert not place.home.exists()
    assert place.data.exists(), "the owner's own file is not the agent's to remove"

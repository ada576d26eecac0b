"""A federation under helper masks: two operators' programs, agents, real HTTP, real training."""

import json
import time
from contextlib import suppress
from pathlib import Path

import pytest

from edge_agent.journal import Journal
from protocol.phases import AgentPhase
from simulations.processes import Process, command_of, run_command, start_server

N_AGENTS = 5
N_ROUNDS = 2
WITHIN_S = 150.0


def start_helper(folder: Path, log: Path, *, port: int = 0) -> tuple[Process, str]:
    ready = log.with_suffix(".ready.json")
    ready.unlink(missing_ok=True)
    command = command_of(
        "aggregator_server.cli",
        *("helper", "serve", str(folder), "--port", str(port), "--json", str(ready)),
    )
    process = Process.start("the helper", command, log)
    until = time.monotonic() + 60.0
    while time.monotonic() < until:
        process.check()
        with suppress(OSError, ValueError):
            return process, str(json.loads(ready.read_text(encoding="utf-8"))["url"])
        time.sleep(0.1)
    raise AssertionError(process.tail())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_federation_with_a_helper_survives_that_the_helper_is_away(
    tmp_path: Path, processes: list[Process]
) -> None:
    helper_folder = tmp_path / "helper"
    run_command("aggregator_server.cli", "helper", "init", str(helper_folder))
    helper, helper_url = start_helper(helper_folder, tmp_path / "helper.log")
    processes.append(helper)
    folder = tmp_path / "server"
    run_command(
        "aggregator_server.cli",
        *("init", str(folder), "--embedded", "--open-enrolment", "--rounds", str(N_ROUNDS)),
        *("--cohort", str(N_AGENTS), "--min-cohort", str(N_AGENTS), "--local-steps", "2"),
        *("--batch-size", "4", "--learning-rate", "0.005", "--masking", "helper"),
        *("--helper", str(helper_folder / "helper.json"), "--helper-url", helper_url),
        *("--ready-delay-s", "0"),
    )
    helper.kill()  # the round waits for it
    server, url = start_server(folder, tmp_path / "server.log")
    processes.append(server)
    agents = []
    for number in range(N_AGENTS):
        data = tmp_path / f"data-{number}.jsonl"
        rows = [
            {"instruction": f"Name thing {k}.", "input": "", "output": f"thing {number} {k}"}
            for k in range(6 + number)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = command_of(
            "edge_agent.cli",
            *("join", url, "--data", str(data), "--home", str(tmp_path / f"home-{number}")),
            *("--yes", "--until-finished", "--threads", "1", "--device", "cpu"),
        )
        agent = Process.start(f"agent {number}", command, tmp_path / f"agent-{number}.log")
        processes.append(agent)
        agents.append(agent)

    def status() -> dict[str, object]:
        shown = run_command("aggregator_server.cli", "status", str(folder), "--json", "-")
        found: dict[str, object] = json.loads(shown)
        return found

    until = time.monotonic() + WITHIN_S
    while status()["round"] is None or status()["round"]["phase"] != "gathering":
        assert time.monotonic() < until, server.tail()
        assert all(agent.check() for agent in agents)
        time.sleep(0.3)
    port = int(helper_url.rpartition(":")[2])
    helper, _ = start_helper(helper_folder, tmp_path / "helper.log", port=port)
    processes.append(helper)
    while True in [agent.check() for agent in agents]:
        assert time.monotonic() < until, server.tail()
        time.sleep(0.2)

    assert status()["finished"] is True
    releases = json.loads(
        run_command("aggregator_server.cli", "releases", "list", str(folder), "--json", "-")
    )
    assert [release["aggregation"]["n_agents"] for release in releases] == [0, N_AGENTS, N_AGENTS]
    assert all(release["aggregation"]["n_cells"] == 1 for release in releases[1:])
    assert all(release["aggregation"]["update_norm"] > 0 for release in releases[1:])
    for number in range(N_AGENTS):
        journal = Journal(tmp_path / f"home-{number}" / "journal.sqlite")
        assert [part.phase for part in journal.parts()] == [AgentPhase.UPLOADED] * N_ROUNDS
        sent = {item.what for item in journal.sent()}
        assert "masked update part 1 of 1" in sent
        assert not any(item.startswith("update part") for item in sent)
        journal.close()
    left = [path for path in folder.rglob("*") if path.is_file() and "uploads" in path.parts]
    assert not left, "masked updates outlived their release"

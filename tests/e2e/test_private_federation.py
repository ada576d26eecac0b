"""A federation with differential privacy in processes, and a ledger that holds its owner's line."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from simulations.processes import Process, command_of, run_command, start_server

N_AGENTS = 2
N_ROUNDS = 2
EPSILON = 8.0
WITHIN_S = 240.0


def write_records(path: Path, number: int) -> None:
    records = [
        {
            "instruction": f"Which tool does person {index} of place {number} own?",
            "context": "",
            "response": f"A hammer {index % 7}.",
        }
        for index in range(60)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def processes() -> list[Process]:
    running: list[Process] = []
    yield running
    for process in running:
        process.kill()


@pytest.fixture
def found(tmp_path: Path, processes: list[Process]):
    """Found a private federation under a name, and serve it; its address."""

    def found_it(name: str) -> str:
        folder = tmp_path / name
        run_command(
            "aggregator_server.cli",
            *("init", str(folder), "--embedded", "--open-enrolment", "--epsilon", str(EPSILON)),
            *("--rounds", str(N_ROUNDS), "--cohort", str(N_AGENTS), "--min-cohort", "2"),
            *("--local-steps", "3", "--batch-size", "10", "--learning-rate", "0.01"),
        )
        server, url = start_server(folder, tmp_path / f"{name}.log")
        processes.append(server)
        return url

    return found_it


@pytest.fixture
def start_agent(tmp_path: Path, processes: list[Process], monkeypatch: pytest.MonkeyPatch):
    def start(url: str, federation: str, number: int) -> Process:
        data = tmp_path / f"{federation}-data-{number}.jsonl"  # the same records, another file
        write_records(data, number)
        monkeypatch.setenv("SHEEPFOLD_AGENT_LEDGER", str(tmp_path / f"ledger-{number}.sqlite"))
        command = command_of(
            "edge_agent.cli",
            *("join", url, "--data", str(data), "--yes", "--threads", "1", "--device", "cpu"),
            *("--home", str(tmp_path / f"{federation}-home-{number}"), "--until-finished"),
        )
        log = tmp_path / f"{federation}-agent-{number}.log"
        process = Process.start(f"agent {number}", command, log)
        processes.append(process)
        return process

    return start


def wait_for_end(agents: list[Process]) -> None:
    for agent in agents:
        agent.popen.wait(WITHIN_S)
        agent.check()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_private_federation_spends_its_budget_and_a_second_one_on_the_same_records_is_refused(
    tmp_path: Path, found, start_agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = found("first")
    agents = [start_agent(url, "first", number) for number in range(N_AGENTS)]
    wait_for_end(agents)
    status = run_command("aggregator_server.cli", "status", str(tmp_path / "first"))
    assert "profile P1: ε ≤ 8 at δ = 1e-05 for each example" in status
    for number in range(N_AGENTS):
        home = tmp_path / f"first-home-{number}"
        ledger = str(tmp_path / f"ledger-{number}.sqlite")
        monkeypatch.setenv("SHEEPFOLD_AGENT_LEDGER", ledger)
        told = json.loads(
            run_command("edge_agent.cli", "privacy", "--home", str(home), "--json", "-")
        )
        assert told["budget"] == EPSILON
        assert 0.98 * EPSILON < told["spent"] <= EPSILON
        assert [row["round"] for row in told["rounds"]] == [1, 2]
        assert told["rounds"][0]["epsilon"] < told["rounds"][1]["epsilon"] == told["spent"]
        assert not (home / "privacy.secret").exists()
        log = (tmp_path / f"first-agent-{number}.log").read_text(encoding="utf-8")
        assert "Poisson sampling" in log
    release = tmp_path / "out"
    home = tmp_path / "first-home-0"
    run_command("edge_agent.cli", "export", str(release), "--home", str(home))
    tensors = load_file(release / "adapter_model.safetensors")
    moved = [array for name, array in tensors.items() if "lora_B" in name]
    assert all(np.count_nonzero(array) == array.size for array in moved), "noise is on every value"
    card = (release / "README.md").read_text(encoding="utf-8")
    assert "ε ≤ 8 at δ = 1e-05" in card
    assert "∞" not in card

    url = found("second")
    refused = start_agent(url, "second", 0)
    other = start_agent(url, "second", 1)
    for agent, number in ((refused, 0), (other, 1)):
        assert agent.popen.wait(WITHIN_S) == 1
        log = (tmp_path / f"second-agent-{number}.log").read_text(encoding="utf-8")
        assert "budget" in log
        assert "Error:" in log
    told = json.loads(
        run_command(
            "edge_agent.cli",
            *("privacy", "--home", str(tmp_path / "second-home-1"), "--json", "-"),
        )
    )
    assert len(told["rounds"]) == N_ROUNDS, "the refused round was charged"

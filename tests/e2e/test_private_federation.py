"""A federation with differential privacy in processes, and a ledger that holds its owner's line."""

import json
import math
import tomllib
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
def found(tmp_path: Path, processes: list[Process]):
    """Found a private federation under a name, and serve it; its address."""

    def found_it(name: str, *options: str, epsilon: float = EPSILON, cohort: int = N_AGENTS) -> str:
        folder = tmp_path / name
        run_command(
            "aggregator_server.cli",
            *("init", str(folder), "--embedded", "--open-enrolment", "--epsilon", str(epsilon)),
            *("--rounds", str(N_ROUNDS), "--cohort", str(cohort), "--min-cohort", str(cohort)),
            *("--local-steps", "3", "--batch-size", "10", "--learning-rate", "0.01", *options),
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


def releases_of(folder: Path) -> list[dict[str, object]]:
    text = run_command("aggregator_server.cli", "releases", "list", str(folder), "--json", "-")
    return json.loads(text)


def exported(home: Path, folder: Path) -> tuple[dict[str, np.ndarray], str]:
    """The newest release's tensors, and its card."""
    run_command("edge_agent.cli", "export", str(folder), "--home", str(home))
    card = (folder / "README.md").read_text(encoding="utf-8")
    return load_file(folder / "adapter_model.safetensors"), card


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_agents_add_noise_under_masks_and_it_is_in_what_the_server_sees(
    tmp_path: Path, found, start_agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P2: the sum of five has the noise that the manifest says, and the ledgers count it."""
    small = (
        "--profile",
        "P2",
        "--rank",
        "1",
        "--target-modules",
        "v_proj",
        "--lora-rule",
        "ffa-lora",
    )
    cells = ("--masking", "cells", "--ready-delay-s", "0.1", "--clip-norm", "0.5")
    url = found("agents", *small, *cells, epsilon=12.0, cohort=5)
    agents = [start_agent(url, "agents", number) for number in range(5)]
    wait_for_end(agents)
    home = tmp_path / "agents-home-0"
    tensors, card = exported(home, tmp_path / "out")
    assert "profile P2: ε ≤ 12 at δ = 1e-05 for each agent" in card
    settings = tomllib.loads((tmp_path / "agents/federation.toml").read_text(encoding="utf-8"))
    privacy = settings["privacy"]
    share = math.sqrt(privacy["share_variance"]) / privacy["steps_per_clip"] * 0.5
    moved = np.concatenate([array.ravel() for name, array in tensors.items() if "lora_B" in name])
    expected = share * math.sqrt(N_ROUNDS / 5)
    signal = N_ROUNDS * 0.5 / math.sqrt(moved.size)  # at most, in every value alike
    n_sigmas = 5 / math.sqrt(2 * moved.size)
    assert expected * (1 - n_sigmas) < moved.std() < math.hypot(expected, signal) * (1 + n_sigmas)
    assert signal < 0.5 * expected, "the case must show the noise"
    monkeypatch.setenv("SHEEPFOLD_AGENT_LEDGER", str(tmp_path / "ledger-0.sqlite"))
    told = json.loads(run_command("edge_agent.cli", "privacy", "--home", str(home), "--json", "-"))
    assert [row["round"] for row in told["rounds"]] == [1, 2]
    assert 2 * 12.0 < told["spent"] <= told["budget"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_examples_are_protected_under_masks_too(
    tmp_path: Path, found, start_agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1 in a masked cell: sums only, with every agent's own noise in them."""
    url = found("masked", "--masking", "cells", "--ready-delay-s", "0.1", cohort=5)
    agents = [start_agent(url, "masked", number) for number in range(5)]
    wait_for_end(agents)
    releases = releases_of(tmp_path / "masked")
    assert [release["aggregation"]["n_agents"] for release in releases] == [0, 5, 5]
    assert [release["aggregation"]["n_cells"] for release in releases] == [0, 1, 1]
    for number in range(5):
        monkeypatch.setenv("SHEEPFOLD_AGENT_LEDGER", str(tmp_path / f"ledger-{number}.sqlite"))
        home = str(tmp_path / f"masked-home-{number}")
        told = json.loads(run_command("edge_agent.cli", "privacy", "--home", home, "--json", "-"))
        assert 0.98 * EPSILON < told["spent"] <= EPSILON
    tensors, card = exported(tmp_path / "masked-home-0", tmp_path / "out")
    assert "profile P1: ε ≤ 8 at δ = 1e-05 for each example" in card
    moved = [array for name, array in tensors.items() if "lora_B" in name]
    assert all(np.count_nonzero(array) > 0.9 * array.size for array in moved)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_server_adds_noise_and_says_whom_it_protects(
    tmp_path: Path, found, start_agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3: every release has noise; an owner who wants none of the server's word does not join."""
    url = found("central", "--profile", "P3", "--adaptive-clip", "--masking", "off", epsilon=20.0)
    agents = [start_agent(url, "central", number) for number in range(N_AGENTS)]
    wait_for_end(agents)
    reports = [release["aggregation"] for release in releases_of(tmp_path / "central")[1:]]
    assert [report["rule"] for report in reports] == ["noisy-fedavg"] * N_ROUNDS
    assert reports[0]["next_clip_norm"] == reports[1]["clip_norm"] != reports[0]["clip_norm"]
    tensors, card = exported(tmp_path / "central-home-0", tmp_path / "out")
    assert "against the public only, not the server" in card
    moved = np.concatenate([array.ravel() for name, array in tensors.items() if "lora_B" in name])
    expected = math.hypot(*(report["noise_std"] for report in reports))
    assert abs(moved.std() / expected - 1) < 0.1
    log = (tmp_path / "central-agent-0.log").read_text(encoding="utf-8")
    assert "against the public only" in " ".join(log.replace("│", " ").split())
    monkeypatch.setenv("SHEEPFOLD_AGENT_EPSILON", "8")
    refused = start_agent(url, "central", 2)
    assert refused.popen.wait(WITHIN_S) == 1
    log = (tmp_path / "central-agent-2.log").read_text(encoding="utf-8")
    assert "you accept ε ≤ 8, and this federation protects nobody from the server" in log

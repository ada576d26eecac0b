"""Real processes, real HTTP, real 4-bit training: a federation through two kills."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from edge_agent.journal import Journal
from edge_agent.masked import MASKED_PHASES
from protocol.phases import AgentPhase
from simulations.processes import Process, command_of, run_command, start_server

N_AGENTS = 3
N_ROUNDS = 3
N_MASKED_AGENTS = 5
N_MASKED_ROUNDS = 2
WITHIN_S = 200.0


def write_records(path: Path, number: int) -> None:
    rows = [
        {"instruction": f"Name thing {k}.", "input": "", "output": f"thing {number} {k}"}
        for k in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def wait_for(what: str, condition) -> None:
    until = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < until, f"{what} did not happen within {WITHIN_S} s"
        time.sleep(0.05)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("rule", ["fedit", "ffa-lora", "rolora", "flexlora"])
def test_a_federation_survives_the_kill_of_its_server_and_of_an_agent(
    rule: str, tmp_path: Path, random_base_dir: Path, processes: list[Process]
) -> None:
    from peft import PeftModel

    from quant.base_model import load_base

    base_json = tmp_path / "base.json"
    run_command("edge_agent.cli", "describe-base", str(random_base_dir), "--out", str(base_json))
    folder = tmp_path / "server"
    run_command(
        "aggregator_server.cli",
        *("init", str(folder), "--base", str(base_json), "--rounds", str(N_ROUNDS)),
        *("--cohort", str(N_AGENTS), "--min-cohort", str(N_AGENTS), "--local-steps", "40"),
        *("--batch-size", "4", "--learning-rate", "0.01", "--lora-rule", rule),
        *("--target-modules", "q_proj,v_proj,down_proj", "--dropout", "0.05"),
    )
    invite = json.loads(
        run_command("aggregator_server.cli", "invite", str(folder), "--uses", "3", "--json", "-")
    )["invite"]
    log = tmp_path / "server.log"
    server, url = start_server(folder, log)
    processes.append(server)

    def start_agent(number: int, *, again: bool = False) -> Process:
        home = tmp_path / f"home-{number}"
        data = tmp_path / f"data-{number}.jsonl"
        write_records(data, number)
        first = ("join", url, "--data", str(data), "--invite", invite, "--yes")
        limits = ("--threads", "1", "--device", "cpu", "--base", str(random_base_dir))
        command = command_of(
            "edge_agent.cli",
            *(("run",) if again else (*first, *limits)),
            *("--home", str(home), "--until-finished"),
        )
        process = Process.start(f"agent {number}", command, tmp_path / f"agent-{number}.log")
        processes.append(process)
        return process

    def journal(number: int) -> Journal | None:
        path = tmp_path / f"home-{number}" / "journal.sqlite"
        return Journal(path) if path.exists() else None

    def training(number: int) -> bool:
        found = journal(number)
        if found is None:
            return False
        part = found.open_part()
        found.close()
        return part is not None and part.phase is AgentPhase.TRAINING

    agents = [start_agent(number) for number in range(N_AGENTS)]
    wait_for("training", lambda: training(0))
    agents[0].kill()
    server.kill()
    server, again = start_server(folder, log, port=int(url.rpartition(":")[2]))
    processes.append(server)
    assert again == url
    agents[0] = start_agent(0, again=True)
    wait_for("the end", lambda: True not in [agent.check() for agent in agents])

    status = json.loads(run_command("aggregator_server.cli", "status", str(folder), "--json", "-"))
    assert status["finished"] is True
    assert status["newest_release"] == N_ROUNDS
    for number in range(N_AGENTS):
        found = journal(number)
        assert found is not None
        accepted = [part for part in found.parts() if part.phase is AgentPhase.UPLOADED]
        assert [part.round for part in accepted] == [1, 2, 3]
        sent_parts = [item for item in found.sent() if item.what.startswith("update part")]
        assert len(sent_parts) >= N_ROUNDS
        found.close()
    uploads = list((folder).rglob("uploads/**/*"))
    assert not [path for path in uploads if path.is_file()], "plain updates outlived their release"

    adapter = tmp_path / "adapter"
    run_command(
        "aggregator_server.cli", "releases", "export", str(folder), str(N_ROUNDS), str(adapter)
    )
    stock = PeftModel.from_pretrained(load_base(random_base_dir).model, adapter)
    moved = [
        parameter.detach().numpy()
        for name, parameter in stock.named_parameters()
        if "lora_B" in name
    ]
    assert all(np.abs(array).max() > 0 for array in moved)
    assert (tmp_path / "home-0" / "agent.key").stat().st_mode & 0o077 == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("killed_in", [AgentPhase.READY, AgentPhase.SHARED])
def test_a_masked_federation_survives_the_kill_of_its_server_and_of_a_member_of_a_cell(
    killed_in: AgentPhase, tmp_path: Path, processes: list[Process]
) -> None:
    folder, log = tmp_path / "server", tmp_path / "server.log"
    run_command(
        "aggregator_server.cli",
        *("init", str(folder), "--embedded", "--open-enrolment"),
        *("--rounds", str(N_MASKED_ROUNDS), "--masking", "cells", "--ready-delay-s", "0"),
        *("--cohort", str(N_MASKED_AGENTS), "--min-cohort", str(N_MASKED_AGENTS)),
        *("--local-steps", "2", "--batch-size", "4", "--learning-rate", "0.005"),
    )
    server, url = start_server(folder, log)
    processes.append(server)

    def start_agent(number: int, *, again: bool = False) -> Process:
        data = tmp_path / f"data-{number}.jsonl"
        write_records(data, number)
        first = ("join", url, "--data", str(data), "--yes", "--threads", "1", "--device", "cpu")
        command = command_of(
            "edge_agent.cli",
            *(("run",) if again else first),
            *("--home", str(tmp_path / f"home-{number}"), "--until-finished"),
        )
        process = Process.start(f"agent {number}", command, tmp_path / f"agent-{number}.log")
        processes.append(process)
        return process

    def phases(number: int) -> list[AgentPhase]:
        path = tmp_path / f"home-{number}" / "journal.sqlite"
        if not path.exists():
            return []
        journal = Journal(path)
        try:
            return [part.phase for part in journal.parts()]
        finally:
            journal.close()

    def at_work() -> bool:
        # In a cell, or past it already: a quick machine is no reason to fail.
        found = phases(0)[:1]
        later = MASKED_PHASES - {AgentPhase.READY}
        return bool(found) and (found[0] is killed_in or found[0] in later)

    agents = [start_agent(number) for number in range(N_MASKED_AGENTS)]
    wait_for("a cell", at_work)
    agents[0].kill()
    server.kill()
    server, again = start_server(folder, log, port=int(url.rpartition(":")[2]))
    processes.append(server)
    assert again == url
    agents[0] = start_agent(0, again=True)
    wait_for("the end", lambda: True not in [agent.check() for agent in agents])

    status = json.loads(run_command("aggregator_server.cli", "status", str(folder), "--json", "-"))
    assert status["finished"] is True
    assert status["newest_release"] == N_MASKED_ROUNDS
    for number in range(N_MASKED_AGENTS):
        journal = Journal(tmp_path / f"home-{number}" / "journal.sqlite")
        revealed = [part for part in journal.parts() if part.phase is AgentPhase.REVEALED]
        assert len(revealed) >= N_MASKED_ROUNDS - (number == 0)
        words: dict[int | None, set[bytes]] = {}
        for item in journal.sent():
            if item.what == "confirm":
                words.setdefault(item.round, set()).add(item.sha256)
        assert all(len(found) == 1 for found in words.values()), "two words in one round"
        journal.close()
    left = [path for what in ("uploads", "sums") for path in folder.rglob(f"{what}/**/*")]
    assert not [path for path in left if path.is_file()], "vectors or sums outlived their round"

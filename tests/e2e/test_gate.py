"""A gated federation of real processes: what the evaluator lets pass, and what it finds out."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from protocol.chain import Release
from protocol.signing import verify
from protocol.wire import b64u_decode, parse
from quant.tiny.instructions import Category, InstructionRecord, make_records
from quant.tiny.world import Split, make_world
from simulations.processes import Process, command_of, run_command, start_server

WITHIN_S = 300.0
CATEGORIES = (Category.CLOSED_QA, Category.CLASSIFICATION)
N_ROUNDS = 2


def write_records(path: Path, rows: list[InstructionRecord]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def draw(n_per_category: int, split: Split, seed: int) -> list[InstructionRecord]:
    return make_records(
        make_world(),
        n_per_category=n_per_category,
        split=split,
        rng=np.random.default_rng(seed),
        categories=CATEGORIES,
    )


@pytest.mark.timeout(600)
def test_an_evaluator_leaves_out_whoever_spoils_the_adapter(
    tmp_path: Path, processes: list[Process]
) -> None:
    """Two honest agents and one that teaches nonsense, with five times their weight."""
    judge = tmp_path / "judge"
    key = json.loads(
        run_command("edge_agent.cli", "identity", "--home", str(judge), "--json", "-")
    )["identity"]
    folder = tmp_path / "server"
    run_command(
        "aggregator_server.cli",
        *("init", str(folder), "--embedded", "--open-enrolment", "--rounds", str(N_ROUNDS)),
        *("--cohort", "3", "--min-cohort", "3", "--masking", "off", "--evaluator", key),
        *("--local-steps", "12", "--batch-size", "8", "--learning-rate", "0.008"),
        *("--dropout", "0", "--max-length", "192"),
    )
    server, url = start_server(folder, tmp_path / "server.log")
    processes.append(server)

    write_records(tmp_path / "held-out.jsonl", draw(20, Split.TEST, 0))
    for number in (1, 2):
        write_records(tmp_path / f"agent-{number}.jsonl", draw(100, Split.TRAIN, number))
    nonsense = [{**row, "response": "No no no no."} for row in draw(500, Split.TRAIN, 3)]
    write_records(tmp_path / "agent-3.jsonl", nonsense)

    def start(name: str, *arguments: str) -> Process:
        command = command_of(
            "edge_agent.cli", *arguments, "--threads", "1", "--device", "cpu", "--until-finished"
        )
        process = Process.start(name, command, tmp_path / f"{name}.log")
        processes.append(process)
        return process

    running = [
        start(
            "evaluator",
            *("evaluate", url, "--role", "evaluator", "--home", str(judge)),
            *("--data", str(tmp_path / "held-out.jsonl")),
        )
    ]
    running += [
        start(
            f"agent-{number}",
            *("join", url, "--yes", "--home", str(tmp_path / f"home-{number}")),
            *("--data", str(tmp_path / f"agent-{number}.jsonl")),
        )
        for number in (1, 2, 3)
    ]
    until = time.monotonic() + WITHIN_S
    while any(process.check() for process in running):
        assert time.monotonic() < until, running[0].tail()
        time.sleep(0.1)

    shown = json.loads(
        run_command("aggregator_server.cli", "releases", "list", str(folder), "--json", "-")
    )
    releases = [parse(Release, json.dumps(release)) for release in shown]
    assert [release.round for release in releases] == [0, 1, 2]
    losses = []
    for release in releases[1:]:
        assert release.verdict.n_left_out == len(release.rejected) == 1
        report = verify(release.verdict.report, "evaluation", key=b64u_decode(key, n_bytes=32)).body
        row = 1 + report.candidates.index(release.adapter.sha256)
        losses.append((report.mean_loss(0), report.mean_loss(row)))
    assert losses[0][1] < losses[0][0]
    assert losses[1] == pytest.approx((losses[0][1], losses[1][1]), rel=1e-6)
    assert losses[1][1] < losses[0][0]
    told = json.loads(run_command("aggregator_server.cli", "incidents", str(folder), "--json", "-"))
    assert [incident["kind"] for incident in told] == ["gate-left-out"] * N_ROUNDS

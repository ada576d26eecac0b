"""How long a masked round takes once all agents hold their updates: real processes, real HTTP.

    python -m benchmarks.secagg_round [--agents 10] --json FILE

A server and ten agents on loopback, the embedded base, two training steps. What is measured is the
time in the server's log from the moment when the last READY closed the round to its release.
"""

import argparse
import datetime as dt
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.report import Row, add_options, as_markdown, write_report
from quant.tiny.instructions import make_records
from quant.tiny.world import Split, make_world
from simulations.processes import Process, command_of, run_command, start_server

MODULE = "benchmarks.secagg_round"
TARGET_S = 3.0
_WITHIN_S = 900.0


def measure(folder: Path, *, n_agents: int, n_rounds: int, masking: str) -> list[float]:
    """Seconds from the last READY to the release, for each round.

    Args:
        folder: An empty one.
        n_agents: All of them are in each round.
        n_rounds: How many.
        masking: As `init` takes it.
    """
    server_folder, log = folder / "server", folder / "server.log"
    run_command(
        "aggregator_server.cli",
        *("init", str(server_folder), "--embedded", "--open-enrolment", "--masking", masking),
        *("--cohort", str(n_agents), "--min-cohort", str(n_agents), "--rounds", str(n_rounds)),
        *("--local-steps", "2", "--batch-size", "4", "--learning-rate", "0.005"),
        *("--ready-delay-s", "2"),
    )
    settings = server_folder / "federation.toml"
    text = settings.read_text(encoding="utf-8")
    text = text.replace('log_format = "console"', 'log_format = "json"')
    settings.write_text(text, encoding="utf-8")
    with ExitStack() as stack:
        server, url = start_server(server_folder, log)
        stack.callback(server.stop)
        agents = []
        for number in range(n_agents):
            agent = _start_agent(folder, number, url)
            stack.callback(agent.stop)
            agents.append(agent)
        until = time.monotonic() + _WITHIN_S
        while True in [agent.check() for agent in agents]:
            server.check()
            if time.monotonic() > until:
                raise RuntimeError(f"the federation did not finish; {server.tail()}")
            time.sleep(0.3)
    return _times(log)


def _start_agent(folder: Path, number: int, url: str) -> Process:
    rng = np.random.Generator(np.random.PCG64(number))
    rows = make_records(make_world(), n_per_category=5, split=Split.TRAIN, rng=rng)
    data = folder / f"data-{number}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = command_of(
        "edge_agent.cli",
        *("join", url, "--data", str(data), "--home", str(folder / f"home-{number}")),
        *("--yes", "--until-finished", "--threads", "1", "--device", "cpu"),
    )
    return Process.start(f"agent {number}", command, folder / f"agent-{number}.log")


def _times(log: Path) -> list[float]:
    closed: dict[int, float] = {}
    found = []
    for line in log.read_text(encoding="utf-8").splitlines():
        if not line.startswith("{"):
            continue
        event = json.loads(line)
        at = dt.datetime.fromisoformat(event["timestamp"]).timestamp()
        if event["event"] == "round closes":
            closed[event["round"]] = at
        if event["event"] == "round moved" and event["phase"] == "published":
            found.append(at - closed[event["round"]])
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--agents", type=int, default=10)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table for a page")
    args = parser.parse_args()
    n_rounds = 2 if args.quick else 5
    with tempfile.TemporaryDirectory() as name:
        times = measure(Path(name), n_agents=args.agents, n_rounds=n_rounds, masking="cells")
    rows = [
        Row.of(
            f"masked round, {args.agents} agents on loopback, last READY to release",
            times,
            None,
            peer_name="",
            unit="s",
            target=TARGET_S,
        )
    ]
    write_report(rows, module=MODULE, json_target=args.json, details={"rounds_s": times})
    if args.markdown is not None:
        args.markdown.write_text(as_markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

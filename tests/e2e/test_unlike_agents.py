"""Agents that are not alike, in processes: of two ranks, or of unlike data."""

import json
import sqlite3
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from aggregator_server.aggregation.scaffold import ControlBook
from edge_agent.data.records import OnMalformed, Record
from edge_agent.data.tokens import tokenize
from edge_agent.evaluation import held_out_loss
from edge_agent.home import AgentHome
from edge_agent.journal import Journal
from protocol.blocks import LossOn, Template
from protocol.phases import AgentPhase
from protocol.wire import parse
from quant.base_model import load_base
from quant.tiny import EMBEDDED_NAME
from quant.tiny.instructions import Category, InstructionRecord, make_records
from quant.tiny.world import Split, make_world
from simulations.processes import Process, command_of, run_command, start_server

RANK = 8
N_ROUNDS = 3
WITHIN_S = 240.0
BOTH = (Category.CLASSIFICATION, Category.OPEN_QA)


def draw(seed: int, split: Split, categories: tuple[Category, ...]) -> list[InstructionRecord]:
    rng = np.random.default_rng(seed)
    return make_records(
        make_world(), n_per_category=40, split=split, rng=rng, categories=categories
    )


@dataclass
class Place:
    """A served federation of two agents on the embedded base."""

    root: Path
    url: str
    processes: list[Process]
    monkeypatch: pytest.MonkeyPatch

    @property
    def folder(self) -> Path:
        return self.root / "server"

    def home(self, number: int) -> AgentHome:
        return AgentHome(self.root / f"home-{number}")

    def log(self, number: int) -> str:
        return (self.root / f"{number}.log").read_text(encoding="utf-8")

    def start(
        self, number: int, categories: tuple[Category, ...], *options: str, again: bool = False
    ) -> Process:
        data = self.root / f"data-{number}.jsonl"
        rows = draw(number, Split.TRAIN, categories)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        join = ("join", self.url, "--data", str(data), "--yes", "--threads", "1", *options)
        command = command_of(
            "edge_agent.cli",
            *(("run",) if again else join),
            *("--home", str(self.home(number).root), "--device", "cpu", "--until-finished"),
        )
        log = self.root / f"{number}.log"
        ledger = str(self.root / f"ledger-{number}.sqlite")
        self.monkeypatch.setenv("SHEEPFOLD_AGENT_LEDGER", ledger)
        self.processes.append(Process.start(f"agent {number}", command, log))
        return self.processes[-1]

    def export(self, number: int) -> Path:
        out = self.root / f"release-{number}"
        arguments = ("releases", "export", str(self.folder), str(number), str(out))
        run_command("aggregator_server.cli", *arguments)
        return out


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Founds a federation with an edited recipe, and serves it."""
    processes: list[Process] = []

    def found_it(edits: dict[str, str], *options: str) -> Place:
        folder = tmp_path / "server"
        run_command(
            "aggregator_server.cli",
            *("init", str(folder), "--embedded", "--open-enrolment", "--rounds", str(N_ROUNDS)),
            *("--cohort", "2", "--min-cohort", "2", "--rank", str(RANK), "--local-steps", "12"),
            *("--batch-size", "8", "--learning-rate", "0.02", "--masking", "off"),
            *("--target-modules", "q_proj,v_proj,down_proj", *options),
        )
        path = folder / "federation.toml"
        text = path.read_text(encoding="utf-8")
        for old, new in edits.items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        tomllib.loads(text)
        path.write_text(text, encoding="utf-8")
        server, url = start_server(folder, tmp_path / "server.log")
        processes.append(server)
        return Place(tmp_path, url, processes, monkeypatch)

    yield found_it
    for process in processes:
        process.kill()


def wait_for_end(agents: list[Process]) -> None:
    for agent in agents:
        agent.popen.wait(WITHIN_S)
        agent.check()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [(), ("--epsilon", "8")], ids=["open", "P1"])
def test_agents_of_two_ranks_improve_one_adapter(found, options: tuple[str, ...]) -> None:
    edits = {
        "# min_rank =": "min_rank = 2",
        "optional_modules = []": 'optional_modules = ["v_proj"]',
    }
    place = found(edits, *options)
    chosen = ("--rank", "2", "--leave-out", "v_proj")
    wait_for_end([place.start(0, BOTH), place.start(1, BOTH, *chosen)])
    assert "trains 2 of 8 rank rows" in place.log(1)
    told = " ".join(place.log(1).replace("│", " ").split())
    assert "It trains 2 rank rows, and leaves out v_proj." in told
    newest = place.export(N_ROUNDS)
    for name, array in load_file(newest / "adapter_model.safetensors").items():
        if "lora_B" in name:  # every row moved, also those that one agent alone trained
            assert (np.abs(array).max(axis=0) > 0.0).all()
    if not options:  # noise drowns so small an adapter; there it is asked that it runs
        losses = [loss_of(adapter) for adapter in (place.export(0), newest)]
        assert losses[1] < 0.5 * losses[0], losses


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_control_variates_of_agents_and_server_stay_together_through_a_kill(found) -> None:
    """The c of the last release is the mean of what its agents keep, though one was killed."""
    place = found({"scaffold = false": "scaffold = true"})
    (one, other) = ((Category.CLASSIFICATION,), (Category.OPEN_QA,))
    first, second = place.start(0, one), place.start(1, other)
    journal_path = place.home(0).journal_path
    for _ in range(2400):
        if journal_path.exists() and training(journal_path, round_number=2):
            break
        first.check()
        time.sleep(0.05)
    else:
        pytest.fail("round 2 did not begin in time")
    first.kill()
    first = place.start(0, one, again=True)
    wait_for_end([first, second])
    for number in (0, 1):
        (following,) = place.home(number).next_controls()
        assert following[0] == N_ROUNDS  # the last round's: taken over when the next one begins
    own = [np.fromfile(place.home(number).next_controls()[0][2], "<f4") for number in (0, 1)]
    control, book = blobs_of_last(place)
    assert len(book.agents) == 2
    np.testing.assert_allclose(control, np.mean(own, axis=0), rtol=1e-4, atol=1e-7)
    assert np.abs(own[0] - own[1]).max() > 1e-3
    losses = [loss_of(place.export(number)) for number in (0, N_ROUNDS)]
    assert losses[1] < 0.7 * losses[0], losses


def training(path: Path, *, round_number: int) -> bool:
    journal = Journal(path)
    part = journal.open_part()
    journal.close()
    return part is not None and part.round == round_number and part.phase is AgentPhase.TRAINING


def blobs_of_last(place: Place) -> tuple[np.ndarray, ControlBook]:
    """c and its book as the server stores them with the last release."""
    database = sqlite3.connect(place.folder / "federation.db")
    rows = dict(
        database.execute(
            "SELECT role, hex(sha256) FROM release_blobs WHERE release = ?", (N_ROUNDS,)
        ).fetchall()
    )
    database.close()
    adapters = place.folder / "blobs" / "adapters"
    arrays = load_file(adapters / rows["control"].lower())
    book = parse(ControlBook, (adapters / rows["control_book"].lower()).read_bytes())
    return np.concatenate([arrays[name].reshape(-1) for name in sorted(arrays)]), book


def loss_of(adapter: Path) -> float:
    """Held-out loss of an adapter on both categories, by stock peft."""
    from peft import PeftModel

    base = load_base(EMBEDDED_NAME)
    model = PeftModel.from_pretrained(base.model, adapter)
    records = [
        Record(
            instruction=row["instruction"],
            context=row["context"],
            response=row["response"],
            category=None,
            messages=None,
            source=f"held out [{index}]",
        )
        for index, row in enumerate(draw(7, Split.TEST, BOTH))
    ]
    data = tokenize(
        records,
        base.tokenizer,
        template=Template.ALPACA,
        loss_on=LossOn.RESPONSE,
        max_length=512,
        on_malformed=OnMalformed.SKIP,
    )
    return held_out_loss(model, data.examples, pad_id=0).mean

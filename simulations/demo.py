"""The one-command federation: a real server, real agents, real HTTP, real 4-bit training.

Each agent owns the records of a few categories only. The federation's adapter learns all of them;
an agent alone learns its own. That is the claim of arXiv 2305.05644, made visible in minutes on the
embedded base, with the programs that volunteers and operators run.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from aggregator_server.recipes import Masking
from edge_agent.chain import check_discovery, check_releases
from edge_agent.data.reading import read_records
from edge_agent.data.records import Record
from edge_agent.data.tokens import tokenize
from edge_agent.evaluation import held_out_loss
from edge_agent.home import AgentHome
from edge_agent.journal import Journal
from edge_agent.transport import Transport
from protocol.blocks import LoraRule, Schedule
from protocol.chain import Release
from protocol.clock import SystemClock
from protocol.manifest import FederationManifest
from protocol.messages import FederationStatus
from quant.adapter import AdapterArrays, adapter_shapes, from_safetensors
from quant.base_model import LoadedBase, load_base, set_threads
from quant.lora import AdaptedModel
from quant.tiny.instructions import Category, InstructionRecord, make_records
from quant.tiny.world import Split, make_world
from simulations.errors import OutputError, ProcessError
from simulations.measuring import MeasureJob, Measurement, measure_all
from simulations.processes import Process, command_of, run_command, start_server

_MARKER: Final = ".sheepfold-demo"
_POLL_S: Final = 0.4
_LONGEST_S: Final = 3600.0
_N_LOOP_RECORDS: Final = 6
"""Held-out records a category for the loss shown during the rounds."""


@dataclass(frozen=True, kw_only=True)
class DemoRecipe:
    """The demo's federation; found by measurement, see docs/LOG.md."""

    categories: tuple[tuple[Category, ...], ...] = (
        (Category.BRAINSTORMING, Category.CLOSED_QA),
        (Category.INFORMATION_EXTRACTION, Category.OPEN_QA),
        (Category.CLASSIFICATION, Category.SUMMARIZATION),
        (Category.CREATIVE_WRITING, Category.GENERAL_QA),
        (Category.CLOSED_QA, Category.INFORMATION_EXTRACTION),
    )
    n_per_category: int = 150
    n_held_out: int = 25
    evaluation_seeds: tuple[int, ...] = (101, 102, 103)
    n_rounds: int = 8
    local_steps: int = 10
    batch_size: int = 8
    learning_rate: float = 8e-3
    rank: int = 8
    alpha: float = 16.0
    lora_rule: LoraRule = LoraRule.FFA_LORA
    masking: Masking = Masking.CELLS
    ready_delay_s: float = 0.5
    max_length: int = 192
    max_new_tokens: int = 28
    seed: int = 1

    @property
    def n_agents(self) -> int:
        """One for each tuple of categories."""
        return len(self.categories)

    @property
    def n_alone_steps(self) -> int:
        """Steps of an agent alone: as many as it makes in the federation."""
        return self.n_rounds * self.local_steps

    @property
    def centralised_batch_size(self) -> int:
        """Batch on all data in one place: as many steps as an agent's, the records of all agents.

        So it sees as many records in all as the federation, and is what averaging after every
        single step would give.
        """
        return self.batch_size * self.n_agents


@dataclass(frozen=True, kw_only=True)
class DemoFolder:
    """Where everything of one demo lies."""

    root: Path

    @property
    def server(self) -> Path:
        """The operator's folder."""
        return self.root / "server"

    @property
    def logs(self) -> Path:
        """What the processes said."""
        return self.root / "logs"

    @property
    def adapter(self) -> Path:
        """The federation's adapter as a PEFT folder."""
        return self.root / "adapter"

    def agent(self, number: int) -> AgentHome:
        """The home of agent `number` (from 1)."""
        return AgentHome(self.root / "agents" / str(number))

    def records(self, number: int) -> Path:
        """The records of agent `number` (from 1)."""
        return self.root / "data" / f"agent-{number}.jsonl"

    def held_out(self, seed: int) -> Path:
        """The held-out records of an evaluation seed."""
        return self.root / "data" / f"held-out-{seed}.jsonl"

    @classmethod
    def create(cls, root: Path, *, force: bool) -> "DemoFolder":
        """Make the folder.

        Args:
            root: A new or empty folder.
            force: Remove an earlier demo there; anything else is never removed.

        Raises:
            OutputError: Something is there already.
        """
        if root.exists() and any(root.iterdir()):
            if not force:
                msg = f"{root} is not empty; choose another --out, or --force to replace a demo"
                raise OutputError(msg)
            if not (root / _MARKER).exists():
                msg = f"{root} holds no demo, so --force does not remove it; choose another --out"
                raise OutputError(msg)
            shutil.rmtree(root)
        folder = cls(root=root)
        for path in (root, folder.logs, root / "data", root / "agents"):
            path.mkdir(parents=True, exist_ok=True)
        (root / _MARKER).touch()
        return folder


@dataclass(frozen=True, kw_only=True)
class AgentView:
    """An agent as the live view shows it."""

    number: int
    categories: tuple[Category, ...]
    n_records: int
    activity: str
    bytes_sent: int


@dataclass(frozen=True, kw_only=True)
class DemoView:
    """One look at the running federation."""

    status: FederationStatus
    agents: tuple[AgentView, ...]
    losses: tuple[float, ...]
    """Held-out loss of each release so far, release 0 first."""
    elapsed_s: float


class DemoListener:
    """Told how the demo goes; does nothing by itself."""

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def look(self, view: DemoView) -> None:
        """The federation moved on."""

    def measured(self, done: int, total: int, name: str) -> None:
        """A yardstick was measured."""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found."""

    recipe: DemoRecipe
    base: Measurement
    local: tuple[Measurement, ...]
    federated: Measurement
    centralised: Measurement
    losses: tuple[float, ...]
    held_out: tuple[tuple[Record, ...], ...]
    bytes_up_per_agent: int
    bytes_down_per_agent: int
    wall_s: float
    folder: DemoFolder
    manifest: FederationManifest = field(repr=False)


def write_data(folder: DemoFolder, recipe: DemoRecipe) -> None:
    """Write each agent's records and the held-out draws; the two share no record."""
    world = make_world()
    for number, categories in enumerate(recipe.categories, start=1):
        rng = np.random.Generator(np.random.PCG64([recipe.seed, number]))
        rows = make_records(
            world,
            n_per_category=recipe.n_per_category,
            split=Split.TRAIN,
            rng=rng,
            categories=categories,
        )
        _write_jsonl(folder.records(number), rows)
    for seed in recipe.evaluation_seeds:
        rng = np.random.Generator(np.random.PCG64(seed))
        rows = make_records(world, n_per_category=recipe.n_held_out, split=Split.TEST, rng=rng)
        _write_jsonl(folder.held_out(seed), rows)


def _write_jsonl(path: Path, rows: Sequence[InstructionRecord]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def run_demo(folder: DemoFolder, recipe: DemoRecipe, listener: DemoListener) -> DemoResult:
    """Run the federation and its yardsticks.

    Args:
        folder: Empty.
        recipe: What to run.
        listener: Told how it goes.

    Raises:
        ProcessError: A process failed; its log says why.
    """
    began = time.monotonic()
    set_threads(1)
    listener.stage("Writing each agent's records, and held-out ones")
    write_data(folder, recipe)
    held_out = tuple(
        tuple(read_records(folder.held_out(seed))[0]) for seed in recipe.evaluation_seeds
    )
    listener.stage("Founding the federation and starting its server")
    _found(folder, recipe)
    with ExitStack() as stack:
        server, url = start_server(folder.server, folder.logs / "server.log")
        stack.callback(server.stop)
        watcher = stack.enter_context(_watching(url, folder, recipe, held_out[0], began))
        listener.stage(f"{recipe.n_agents} agents join {url}, each with records of its own")
        agents = [
            stack.enter_context(_running(_start_agent(folder, number, url)))
            for number in range(1, recipe.n_agents + 1)
        ]
        _wait_for_all(server, agents, watcher, listener.look)
        losses, arrays, manifest = watcher.losses, watcher.arrays, watcher.manifest
        run_command(
            "aggregator_server.cli",
            *("releases", "export", str(folder.server), str(recipe.n_rounds), str(folder.adapter)),
        )
    listener.stage(
        "Measuring the base, each agent alone, the federation, and all data in one place"
    )
    measurements = measure_all(
        _jobs(folder, recipe, manifest, arrays), held_out_paths(folder, recipe), listener.measured
    )
    up, down = _bytes_per_agent(folder, recipe)
    return DemoResult(
        recipe=recipe,
        base=measurements["base"],
        local=tuple(measurements[f"agent {n}"] for n in range(1, recipe.n_agents + 1)),
        federated=measurements["federation"],
        centralised=measurements["centralised"],
        losses=losses,
        held_out=held_out,
        bytes_up_per_agent=up,
        bytes_down_per_agent=down,
        wall_s=time.monotonic() - began,
        folder=folder,
        manifest=manifest,
    )


def held_out_paths(folder: DemoFolder, recipe: DemoRecipe) -> tuple[Path, ...]:
    """The held-out draws, one file for each evaluation seed."""
    return tuple(folder.held_out(seed) for seed in recipe.evaluation_seeds)


def _found(folder: DemoFolder, recipe: DemoRecipe) -> None:
    run_command(
        "aggregator_server.cli",
        *("init", str(folder.server), "--embedded", "--open-enrolment"),
        *("--name", "Sheepfold demo", "--rounds", str(recipe.n_rounds)),
        *("--cohort", str(recipe.n_agents), "--min-cohort", str(recipe.n_agents)),
        *("--rank", str(recipe.rank), "--alpha", str(recipe.alpha), "--dropout", "0"),
        *("--target-modules", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"),
        *("--lora-rule", recipe.lora_rule.value, "--max-length", str(recipe.max_length)),
        *("--batch-size", str(recipe.batch_size), "--local-steps", str(recipe.local_steps)),
        *("--learning-rate", str(recipe.learning_rate), "--schedule", Schedule.LINEAR.value),
        *("--masking", recipe.masking.value, "--ready-delay-s", str(recipe.ready_delay_s)),
        *("--deadline-s", str(_LONGEST_S)),
    )


def _start_agent(folder: DemoFolder, number: int, url: str) -> Process:
    command = command_of(
        "edge_agent.cli",
        *("join", url, "--data", str(folder.records(number))),
        *("--home", str(folder.agent(number).root), "--yes", "--until-finished"),
        *("--threads", "1", "--device", "cpu"),
    )
    return Process.start(f"agent {number}", command, folder.logs / f"agent-{number}.log")


@contextmanager
def _running(process: Process) -> Iterator[Process]:
    try:
        yield process
    finally:
        process.stop()


class _Watcher:
    """Follows the federation from outside: its status, its releases, the agents' journals."""

    def __init__(
        self,
        transport: Transport,
        folder: DemoFolder,
        recipe: DemoRecipe,
        held_out: Sequence[Record],
        began: float,
    ) -> None:
        self._transport = transport
        self._folder = folder
        self._recipe = recipe
        self._began = began
        self.manifest = check_discovery(transport.discover(), None)
        transport.use_federation(self.manifest)
        base: LoadedBase = load_base(self.manifest.base.model, expected=self.manifest.base)
        self._adapted = AdaptedModel(base, self.manifest.lora)
        self._shapes = adapter_shapes(base.description, self.manifest.lora)
        block = self.manifest.training
        sample = _some_of_each(held_out, _N_LOOP_RECORDS)
        self._examples = tokenize(
            sample,
            base.tokenizer,
            template=block.template,
            loss_on=block.loss_on,
            max_length=block.max_length,
        ).examples
        self._pad_id = base.pad_id
        self._last: Release | None = None
        self.losses: tuple[float, ...] = ()
        self.arrays: tuple[AdapterArrays, ...] = ()
        """Release 0 and the newest."""

    def look(self) -> DemoView:
        """Look once; measures the held-out loss of each new release."""
        status = self._transport.status()
        while self._last is None or self._last.number < status.newest_release:
            number = -1 if self._last is None else self._last.number
            page = self._transport.releases(after=number)
            # Nobody rolls a demo back, so no release points to an earlier one.
            for release in check_releases(
                self.manifest, self._last, page.releases, earlier=lambda _: None
            ):
                self._measure(release)
        return DemoView(
            status=status,
            agents=tuple(
                self._agent(number, categories)
                for number, categories in enumerate(self._recipe.categories, start=1)
            ),
            losses=self.losses,
            elapsed_s=time.monotonic() - self._began,
        )

    def _measure(self, release: Release) -> None:
        cache = self._folder.root / "watched"
        cache.mkdir(exist_ok=True)
        path = self._transport.fetch(release.adapter, cache)
        arrays = from_safetensors(path.read_bytes(), self._shapes)
        self._adapted.load(arrays)
        scores = held_out_loss(self._adapted.model, self._examples, pad_id=self._pad_id)
        self.losses = (*self.losses, scores.average_over_categories)
        self.arrays = (*self.arrays[:1], arrays)
        self._last = release

    def _agent(self, number: int, categories: tuple[Category, ...]) -> AgentView:
        home = self._folder.agent(number)
        activity, n_bytes = "starting", 0
        if home.journal_path.exists():
            journal = Journal(home.journal_path)
            activity = str(journal.activity().get("text", "joining"))
            n_bytes = sum(item.n_bytes for item in journal.sent())
            journal.close()
        return AgentView(
            number=number,
            categories=categories,
            n_records=len(categories) * self._recipe.n_per_category,
            activity=activity,
            bytes_sent=n_bytes,
        )


@contextmanager
def _watching(
    url: str,
    folder: DemoFolder,
    recipe: DemoRecipe,
    held_out: Sequence[Record],
    began: float,
) -> Iterator[_Watcher]:
    transport = Transport(url, clock=SystemClock(), patience_s=30.0)
    try:
        yield _Watcher(transport, folder, recipe, held_out, began)
    finally:
        transport.close()


def _some_of_each(records: Sequence[Record], n_each: int) -> list[Record]:
    seen: dict[str | None, int] = {}
    chosen = []
    for record in records:
        seen[record.category] = seen.get(record.category, 0) + 1
        if seen[record.category] <= n_each:
            chosen.append(record)
    return chosen


def _wait_for_all(
    server: Process,
    agents: Sequence[Process],
    watcher: _Watcher,
    show: Callable[[DemoView], None],
) -> None:
    until = time.monotonic() + _LONGEST_S
    while time.monotonic() < until:
        server.check()
        running = [agent.check() for agent in agents]
        show(watcher.look())
        if not any(running):
            return
        time.sleep(_POLL_S)
    msg = f"the federation did not finish within {_LONGEST_S:.0f} s; see the logs"
    raise ProcessError(msg)


def _jobs(
    folder: DemoFolder,
    recipe: DemoRecipe,
    manifest: FederationManifest,
    arrays: tuple[AdapterArrays, ...],
) -> tuple[MeasureJob, ...]:
    start, final = arrays[0], arrays[-1]
    everyone = tuple(folder.records(number) for number in range(1, recipe.n_agents + 1))

    def job(
        name: str, adapter: AdapterArrays, data: tuple[Path, ...], *, batch_size: int | None = None
    ) -> MeasureJob:
        return MeasureJob(
            name=name,
            manifest=manifest.canonical(),
            adapter=adapter,
            train_on=data,
            n_steps=recipe.n_alone_steps,
            batch_size=batch_size or recipe.batch_size,
            seed=recipe.seed,
            max_new_tokens=recipe.max_new_tokens,
        )

    # The longest first, so that the last to end is a short one.
    return (
        job("centralised", start, everyone, batch_size=recipe.centralised_batch_size),
        *(job(f"agent {number}", start, (path,)) for number, path in enumerate(everyone, start=1)),
        job("base", start, ()),
        job("federation", final, ()),
    )


def _bytes_per_agent(folder: DemoFolder, recipe: DemoRecipe) -> tuple[int, int]:
    up = down = 0
    for number in range(1, recipe.n_agents + 1):
        journal = Journal(folder.agent(number).journal_path)
        up += sum(item.n_bytes for item in journal.sent())
        down += journal.bytes_received()
        journal.close()
    return up // recipe.n_agents, down // recipe.n_agents

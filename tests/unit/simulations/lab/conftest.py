"""Runs that take seconds, on the embedded base, and runs that take none, on no model at all."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.data.records import Record
from privacy.updates import Float32Array
from protocol.base_description import BaseDescription
from protocol.blocks import LoraRule, Weighting
from protocol.manifest import FederationManifest
from protocol.wire import parse
from quant.adapter import adapter_shapes, sent_layout
from quant.base_model import LoadedBase
from quant.lora_turns import sent_factors
from simulations.lab.engines import Engine, Here
from simulations.lab.experiment import EMBEDDED_BASE, Experiment
from simulations.lab.folder import read_notes
from simulations.lab.listening import Silent
from simulations.lab.records import AnswerNote, Arm, Measure, Note, RoundNote, ScoreNote, VisitNote
from simulations.lab.run import Request, run
from simulations.lab.visits import Question, Setup, Visit, VisitResult, load_lab_base


class KillError(Exception):
    """Stands for kill -9: whatever was not written is lost."""


# On the embedded base


@pytest.fixture(scope="session")
def small() -> Experiment:
    """Six clients, three a round, two rounds of three steps."""
    return Experiment(name="small").with_values(
        {
            "data.per_category": 12,
            "data.n_clients": 6,
            "data.held_out": 2,
            "data.min_records": 4,
            "federation.n_rounds": 2,
            "federation.cohort": 3,
            "federation.batch_size": 4,
            "federation.local_steps": 3,
            "federation.learning_rate": 5e-3,
            "federation.loss_on": "response",
            "federation.max_length": 128,
            "evaluation.answers": 1,
            "evaluation.max_new_tokens": 6,
            "engine.group": 1,
            "engine.device": "cpu",
        }
    )


@pytest.fixture(scope="session")
def base() -> LoadedBase:
    """The embedded base, loaded once for all tests."""
    return load_lab_base(Setup(model=EMBEDDED_BASE, device="cpu"))


@pytest.fixture(scope="session")
def here(base: LoadedBase) -> Engine:
    """One worker in this process, for all tests of it."""
    return Here(base)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, small: Experiment, here: Engine) -> Path:
    """The small experiment with seed 1, run to its end without a break; not to be changed."""
    root = tmp_path_factory.mktemp("whole") / "run"
    run(root, Request(experiment=small), here)
    return root


@pytest.fixture
def releases(tmp_path: Path, small: Experiment, here: Engine) -> Callable[..., list[str]]:
    """Runs the small experiment with some values changed; gives the digest of every release."""
    numbers = iter(range(1000))

    def go(
        *, engine: Engine = here, seed: int = 1, arm: Arm = Arm.FEDERATED, **values: object
    ) -> list[str]:
        root = tmp_path / f"run-{next(numbers)}"
        request = Request(experiment=small.with_values(dotted(values)), arm=arm, seed=seed)
        run(root, request, engine)
        return digests(root)

    return go


# Without a model


@dataclass
class FakeWorker:
    """Updates drawn from release, setup and group: equal questions have equal answers."""

    setup: Setup
    description: BaseDescription
    failing: set[int]
    train_s: float

    def __post_init__(self) -> None:
        if self.setup.manifest is not None:
            self.manifest = parse(FederationManifest, self.setup.manifest)
            self.shapes = adapter_shapes(self.description, self.manifest.lora)

    def machine(self) -> str:
        return "fake"

    def describe(self) -> BaseDescription:
        return self.description

    def train(self, release: Float32Array, visits: Sequence[Visit]) -> list[VisitResult]:
        assert 1 <= len(visits) <= self.setup.group
        assert len({(visit.round, visit.release) for visit in visits}) == 1
        group = tuple(visit.agent for visit in visits)
        factors = sent_factors(self.manifest.lora.rule, visits[0].release)
        n_values = sent_layout(self.shapes, factors).n_values
        uniform = self.manifest.aggregation.weighting is Weighting.UNIFORM
        found = []
        for visit in visits:
            rng = drawn(release, self.setup.seed, visit.round, visit.agent, group)
            vector = (1e-3 * rng.standard_normal(n_values)).astype(np.float32)
            n_examples = len(visit.records)
            failed = visit.agent in self.failing
            found.append(
                VisitResult(
                    agent=visit.agent,
                    vector=None if failed else vector,
                    weight=1 if uniform else min(n_examples, self.manifest.max_weight),
                    n_examples=n_examples,
                    n_tokens=10 * n_examples,
                    n_steps=3,
                    first_loss=2.0,
                    last_loss=1.0,
                    train_s=self.train_s,
                    error="training diverged" if failed else None,
                )
            )
        return found

    def measure(self, release: Float32Array, question: Question) -> list[ScoreNote | AnswerNote]:
        whole = sent_layout(self.shapes, sent_factors(LoraRule.FEDIT, 0))
        assert release.shape == (whole.n_values,)
        notes: list[ScoreNote | AnswerNote] = []
        for measures, records in (
            ((Measure.LOSS,), question.loss),
            ((Measure.EXACT_MATCH, Measure.ROUGE_L), question.answers),
        ):
            notes += [
                ScoreNote(
                    release=question.release,
                    measure=measure,
                    category=records[0].category or "",
                    score=float(drawn(release, measure.value).random()),
                    n_examples=len(records),
                )
                for measure in measures
                if records
            ]
        notes += [
            AnswerNote(
                release=question.release,
                category=record.category or "",
                instruction=record.instruction,
                wanted=record.response,
                answer="yes",
            )
            for record in question.answers
        ]
        return notes

    def count_tokens(self, clients: Sequence[tuple[Record, ...]]) -> list[int]:
        return [10 * len(records) for records in clients]


@dataclass
class FakeEngine:
    """A worker that trains nothing, and what it was asked.

    Attributes:
        description: Of the base.
        failing: Agents whose training gives nothing to send.
        train_s: What each says it took.
        trained: Round and agent of every visit, in the order that they were asked for.
    """

    description: BaseDescription
    failing: set[int] = field(default_factory=set)
    train_s: float = 60.0
    trained: list[tuple[int, int]] = field(default_factory=list)
    name: str = "a fake"
    n_workers: int = 1

    def ask(self, setup: Setup, call: Callable[[Any], Any]) -> "Future[Any]":
        visits = getattr(call, "keywords", {}).get("visits", ())
        self.trained += [(visit.round, visit.agent) for visit in visits]
        future: Future[Any] = Future()
        worker = FakeWorker(setup, self.description, self.failing, self.train_s)
        future.set_result(call(worker))
        return future

    def close(self) -> None:
        pass


def drawn(release: Float32Array, *words: object) -> np.random.Generator:
    digest = hashlib.sha256(release.tobytes() + repr(words).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


@pytest.fixture
def fake(base: LoadedBase) -> FakeEngine:
    """Whole runs in a fraction of a second: all but the training itself is the real thing."""
    return FakeEngine(base.description)


@dataclass
class Told(Silent):
    """A listener that keeps what it is told, and may be killed by it.

    Attributes:
        kill_at: At which of the calls of one kind, such as `("visited", 2)`; None: at none.
    """

    kill_at: tuple[str, int] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    n_done: int = -1
    stages: list[str] = field(default_factory=list)

    def _count(self, kind: str) -> None:
        self.counts[kind] += 1
        if self.kill_at == (kind, self.counts[kind]):
            raise KillError

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def begun(self, card: object, *, n_done: int) -> None:
        self.n_done = n_done
        self._count("begun")

    def visited(self, note: VisitNote) -> None:
        self._count("visited")

    def closed(self, note: RoundNote) -> None:
        self._count("closed")

    def scored(self, notes: Sequence[ScoreNote]) -> None:
        self._count("scored")


@pytest.fixture
def make_told() -> Callable[..., Told]:
    return Told


@pytest.fixture
def kill_error() -> type[KillError]:
    return KillError


# What came of it


def dotted(values: dict[str, object]) -> dict[str, object]:
    """`federation__rank=4` as `federation.rank`."""
    return {key.replace("__", "."): value for key, value in values.items()}


def digests(root: Path) -> list[str]:
    """Of every release that a run's rounds made."""
    return [note.release_sha256 for note in notes_of(root, RoundNote)]


def notes_of(root: Path, kind: type[Note]) -> list[Any]:
    """The notes of one kind."""
    return [note for note in read_notes(root) if isinstance(note, kind)]


_TIMES = {"train_s", "server_s", "wall_s"}


def told_by(root: Path) -> list[str]:
    """The journal without what a clock says, sorted: of two runs that did the same, equal."""
    return sorted(
        json.dumps(note.model_dump(mode="json", exclude=_TIMES), sort_keys=True)
        for note in read_notes(root)
    )


@dataclass(frozen=True)
class Outcome:
    """The folder of a run."""

    root: Path

    @property
    def digests(self) -> list[str]:
        return digests(self.root)

    @property
    def notes(self) -> list[str]:
        return told_by(self.root)

    @property
    def rounds(self) -> list[RoundNote]:
        return notes_of(self.root, RoundNote)

    def of(self, kind: type[Note]) -> list[Any]:
        return notes_of(self.root, kind)


@pytest.fixture
def outcome() -> type[Outcome]:
    return Outcome


@pytest.fixture
def go(tmp_path: Path, small: Experiment, fake: FakeEngine) -> Callable[..., Outcome]:
    """Runs the small experiment with some values changed, on no model; gives what came of it."""
    numbers = iter(range(1000))

    def go(
        *,
        engine: Engine | None = None,
        root: Path | None = None,
        listener: Silent | None = None,
        arm: Arm = Arm.FEDERATED,
        client: int | None = None,
        seed: int = 1,
        **values: object,
    ) -> Outcome:
        root = tmp_path / f"fake-{next(numbers)}" if root is None else root
        experiment = small.with_values(dotted(values))
        request = Request(experiment=experiment, arm=arm, client=client, seed=seed)
        run(root, request, fake if engine is None else engine, listener)
        return Outcome(root)

    return go

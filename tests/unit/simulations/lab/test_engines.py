"""Workers that are asked: in this process, in others, and what becomes of a dead one."""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from quant.base_model import LoadedBase
from simulations.errors import EngineError
from simulations.lab import engines
from simulations.lab.engines import Bench, Here, Processes, make_engine
from simulations.lab.experiment import EMBEDDED_BASE, EngineSection
from simulations.lab.records import Measure, ScoreNote
from simulations.lab.visits import LabWorker, Question, Setup, Visit

SETUP = Setup(model=EMBEDDED_BASE, device="cpu")


def visits(*groups: tuple[int, ...]) -> list[tuple[Visit, ...]]:
    return [
        tuple(Visit(round=1, release=0, agent=agent, records=()) for agent in group)
        for group in groups
    ]


@dataclass
class SlowEngine:
    """Answers when it is told to, the last question first.

    Attributes:
        n_workers: How many questions may be open.
        open: Agents that are being trained, with the future of each.
        most: Of these, at any time.
    """

    n_workers: int
    name: str = "slow"
    open: list[tuple[int, "Future[Any]"]] = field(default_factory=list)
    most: int = 0

    def ask(self, setup: Setup, call: "functools.partial[Any]") -> "Future[Any]":
        future: Future[Any] = Future()
        self.open.append((call.keywords["visits"][0].agent, future))
        self.most = max(self.most, len(self.open))
        if len(self.open) == self.n_workers:
            self.answer()
        return future

    def answer(self) -> None:
        agent, future = self.open.pop()
        future.set_result([agent])

    def close(self) -> None:
        pass


@pytest.mark.parametrize("n_workers", [1, 2, 4])
def test_no_more_groups_are_asked_for_than_there_are_workers(n_workers: int) -> None:
    engine = SlowEngine(n_workers)
    release = np.zeros(1, np.float32)
    found: list[Any] = []
    for answer in engines.train(engine, SETUP, release, visits((0,), (1,), (2,), (3,), (4,))):
        found += answer
        if len(found) == 5 - len(engine.open):  # all are asked for: the rest ends one by one
            while engine.open:
                engine.answer()
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert engine.most == n_workers


@dataclass
class Inline:
    """Answers at once, as `Here` does, by a worker that is given."""

    worker: Any
    n_workers: int = 1
    name: str = "inline"

    def ask(self, setup: Setup, call: Callable[[Any], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(call(self.worker))
        return future

    def close(self) -> None:
        pass


def test_each_answer_of_one_worker_is_taken_before_it_is_asked_again() -> None:
    """So that a run that is killed has kept all that was trained but the last."""
    done: list[str] = []

    class Worker:
        def train(self, release: object, visits: tuple[Visit, ...]) -> list[int]:
            done.append(f"trained {visits[0].agent}")
            return [visits[0].agent]

    groups = visits((0,), (1,), (2,))
    answers = engines.train(Inline(Worker()), SETUP, np.zeros(1, np.float32), groups)
    while (answer := next(answers, None)) is not None:
        done.append(f"kept {answer[0]}")
    assert done == [f"{what} {n}" for n in range(3) for what in ("trained", "kept")]


def test_scores_come_in_the_order_of_the_questions() -> None:
    class Worker:
        def measure(self, release: object, question: Question) -> list[ScoreNote]:
            numbers = {"release": question.release, "score": 1.0, "n_examples": 1}
            return [ScoreNote(measure=Measure.LOSS, category="a", **numbers)]  # type: ignore[arg-type]

    questions = [Question(release=number) for number in (5, 3, 4)]
    notes = engines.measure(Inline(Worker(), 2), SETUP, np.zeros(1, np.float32), questions)
    assert [note.release for note in notes] == [5, 3, 4]


def test_tokens_are_counted_by_all_workers_and_come_in_the_order_of_the_clients() -> None:
    asked: list[int] = []

    class Worker:
        def count_tokens(self, clients: tuple[Any, ...]) -> list[int]:
            asked.append(len(clients))
            return [len(client) for client in clients]

    clients: list[Any] = [("r",) * n for n in range(10)]
    assert engines.count_tokens(Inline(Worker(), 3), SETUP, clients) == list(range(10))
    assert asked == [4, 4, 2]


def test_a_bench_keeps_its_base_as_long_as_setups_are_of_it(
    base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Setup] = []

    class Worker:
        def __init__(self, setup: Setup, given: LoadedBase | None) -> None:
            self.setup, self.given = setup, given
            loaded.append(setup)

        def use(self, setup: Setup) -> None:
            self.setup = setup

    monkeypatch.setattr(engines, "LabWorker", Worker)
    bench = Bench(base)
    first = bench.ask(SETUP, lambda worker: worker)
    assert first.given is base
    again = bench.ask(replace(SETUP, group=4, seed=2), lambda worker: worker)
    assert again is first
    assert again.setup.group == 4
    other = bench.ask(replace(SETUP, model="another"), lambda worker: worker)
    assert other is not first
    assert other.given is None  # the one that was given is of the first setup alone
    assert [setup.model for setup in loaded] == [EMBEDDED_BASE, "another"]


def test_all_workers_load_the_base_and_one_describes_it(base: LoadedBase) -> None:
    asked = []

    @dataclass
    class Counting(Here):
        n_workers: int = 3
        name: str = "three"

        def __post_init__(self) -> None:
            self._bench = Bench(base)

        def ask(self, setup: Setup, call: Callable[[LabWorker], Any]) -> "Future[Any]":
            asked.append(setup)
            return super().ask(setup, call)

    assert engines.describe(Counting(), SETUP) == base.description
    assert asked == [SETUP] * 3


@pytest.mark.parametrize(
    ("kind", "n_workers", "wanted"), [("here", 1, Here), ("processes", 2, Processes)]
)
def test_the_engine_is_the_one_that_was_asked_for(
    kind: str, n_workers: int, wanted: type[Any]
) -> None:
    engine = make_engine(EngineSection(kind=kind, workers=n_workers))  # type: ignore[arg-type]
    assert isinstance(engine, wanted)
    assert engine.n_workers == n_workers
    engine.close()


def test_without_ray_its_engine_is_refused_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "simulations.lab.ray_engine", raising=False)
    with pytest.raises(EngineError, match=r"Ray is not installed; pip install '.\[sim-ray\]'"):
        make_engine(EngineSection(kind="ray"))  # type: ignore[arg-type]


_CALLS = """
import os, signal
import torch
from simulations.errors import EngineError

def die(worker):
    os.kill(os.getpid(), signal.SIGKILL)

def fail(worker):
    raise EngineError("the wires are crossed")

def threads(worker):
    return os.getpid(), torch.get_num_threads(), worker.setup.model
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Functions that another process can import, which the tests themselves are not."""
    (tmp_path / "calls_of_workers.py").write_text(_CALLS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("calls_of_workers")


@pytest.fixture
def processes(calls: ModuleType) -> Iterator[Processes]:
    engine = Processes(1)
    yield engine
    engine.close()


def test_a_process_is_another_one_with_one_thread_and_ends_by_saying_so(
    processes: Processes, calls: ModuleType
) -> None:
    assert processes.name == "1 process"
    pid, n_threads, model = processes.ask(SETUP, calls.threads).result()
    assert pid != os.getpid()
    assert (n_threads, model) == (1, EMBEDDED_BASE)
    assert processes.ask(SETUP, calls.threads).result()[0] == pid  # and keeps its base
    with pytest.raises(EngineError, match="the wires are crossed"):
        engines.answer_of(processes.ask(SETUP, calls.fail))
    with pytest.raises(EngineError, match="a worker process was killed, perhaps for want of"):
        engines.answer_of(processes.ask(SETUP, calls.die))
    with pytest.raises(EngineError, match="a worker process was killed, perhaps for want of"):
        processes.ask(SETUP, calls.threads)


@pytest.mark.parametrize(
    ("there", "device", "said"),
    [
        ({"CPU": 1.0}, "cpu", "each worker needs a CPU, and the cluster has 1 for 2; give --wor"),
        ({"CPU": 4.0, "GPU": 1.0}, None, r"needs a GPU, .* has 1 for 2; .* 1 or --device cpu$"),
    ],
)
def test_a_ray_cluster_without_a_place_for_each_worker_is_refused(
    there: dict[str, float], device: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    calls: list[str] = []
    monkeypatch.setattr(ray, "init", lambda **_: calls.append("init"))
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    with pytest.raises(EngineError, match=said):
        make_engine(EngineSection(kind="ray", workers=2, device=device))  # type: ignore[arg-type]
    assert calls == ["init", "shutdown"]

"""Where virtual agents run: in this process, in a pool of processes, or on a Ray cluster.

An engine is a number of `LabWorker`s and a way to ask one. Which worker answers is chance, and has
no influence on the answer: results are the same bit for bit on machines of one kind, as every
worker has one thread and every group of agents is one question.
"""

import functools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final, Protocol, TypeVar

from edge_agent.data.records import Record
from privacy.updates import Float32Array
from protocol.base_description import BaseDescription
from quant.base_model import LoadedBase
from quant.quiet import quiet_libraries
from simulations.errors import EngineError
from simulations.lab.experiment import EngineKind, EngineSection
from simulations.lab.records import AnswerNote, ScoreNote
from simulations.lab.visits import LabWorker, Question, Setup, Visit, VisitResult

Answer = TypeVar("Answer")
CPU_DEVICE: Final = "cpu"


class Engine(Protocol):
    """Workers that can be asked."""

    @property
    def name(self) -> str:
        """For the card of a run."""
        ...

    @property
    def n_workers(self) -> int:
        """How many work at once."""
        ...

    def ask(self, setup: Setup, call: Callable[[LabWorker], Answer]) -> "Future[Answer]":
        """Let a worker with this setup do something.

        Args:
            setup: What it must have at hand.
            call: A function of a module with plain values: it goes to other processes.

        Raises:
            EngineError: A worker died before.
        """
        ...

    def close(self) -> None:
        """End the workers."""
        ...


def describe(engine: Engine, setup: Setup) -> BaseDescription:
    """The base's description; all workers load it.

    Args:
        engine: Any.
        setup: Without a manifest.

    Raises:
        BaseModelError: It cannot be loaded.
        EngineError: A worker died.
    """
    asked = [engine.ask(setup, _describe) for _ in range(engine.n_workers)]
    first, *_ = [answer_of(one) for one in asked]
    return first


def machine(engine: Engine, setup: Setup) -> str:
    """What one of the workers runs on; they are taken to be alike.

    Args:
        engine: Any.
        setup: Of the run.

    Raises:
        EngineError: The worker died.
    """
    return answer_of(engine.ask(setup, _machine))


def train(
    engine: Engine, setup: Setup, release: Float32Array, groups: Sequence[tuple[Visit, ...]]
) -> Iterator[list[VisitResult]]:
    """Train groups of agents; results come as they end.

    Args:
        engine: Any.
        setup: With the manifest.
        release: The whole adapter that the round starts from.
        groups: Each is trained at once.

    Raises:
        EngineError: A worker died.
        AgentError: Records that cannot be tokenised. A training that gives nothing raises nothing.
        PrivacyError: No noise keeps to the ε that is asked for.
    """
    asked: set[Future[list[VisitResult]]] = set()
    for group in groups:
        if len(asked) == engine.n_workers:  # none is asked for before it can begin: `Here` waits
            ended, asked = wait(asked, return_when=FIRST_COMPLETED)
            for one in ended:
                yield answer_of(one)
        asked.add(engine.ask(setup, functools.partial(_train, release=release, visits=group)))
    for one in as_completed(asked):
        yield answer_of(one)


def measure(
    engine: Engine, setup: Setup, release: Float32Array, questions: Sequence[Question]
) -> list[ScoreNote | AnswerNote]:
    """Score a release; the notes in the order of the questions.

    Args:
        engine: Any.
        setup: With the manifest.
        release: The whole adapter.
        questions: Each goes to one worker.

    Raises:
        EngineError: A worker died.
        EvaluationError: A loss is not finite.
    """
    asked = [
        engine.ask(setup, functools.partial(_measure, release=release, question=question))
        for question in questions
    ]
    return [note for one in asked for note in answer_of(one)]


def count_tokens(engine: Engine, setup: Setup, clients: Sequence[tuple[Record, ...]]) -> list[int]:
    """How many tokens each client has, in order.

    Args:
        engine: Any.
        setup: With the manifest.
        clients: Records of each.

    Raises:
        EngineError: A worker died.
    """
    size = math.ceil(len(clients) / engine.n_workers)
    asked = [
        engine.ask(
            setup, functools.partial(_count_tokens, clients=tuple(clients[start : start + size]))
        )
        for start in range(0, len(clients), size)
    ]
    return [count for one in asked for count in answer_of(one)]


def _count_tokens(worker: LabWorker, *, clients: tuple[tuple[Record, ...], ...]) -> list[int]:
    return worker.count_tokens(clients)


def _machine(worker: LabWorker) -> str:
    return worker.machine()


def _describe(worker: LabWorker) -> BaseDescription:
    return worker.describe()


def _train(
    worker: LabWorker, *, release: Float32Array, visits: tuple[Visit, ...]
) -> list[VisitResult]:
    return worker.train(release, visits)


def _measure(
    worker: LabWorker, *, release: Float32Array, question: Question
) -> list[ScoreNote | AnswerNote]:
    return worker.measure(release, question)


def answer_of(asked: "Future[Answer]") -> Answer:
    """Wait for a worker's answer.

    Args:
        asked: As `Engine.ask` gave it.

    Raises:
        EngineError: The worker died.
        Exception: What the question raised.
    """
    try:
        return asked.result()
    except BrokenProcessPool as error:
        raise _killed() from error


def _killed() -> EngineError:
    return EngineError(
        "a worker process was killed, perhaps for want of memory; give fewer --workers or a "
        "smaller --group. The run can go on: give the same command again"
    )


class Bench:
    """The worker of one process: loads the base once, and follows the setups that it is asked for.

    Args:
        base: What it has loaded already; None: nothing.
    """

    def __init__(self, base: LoadedBase | None = None) -> None:
        """Load nothing yet."""
        self._base = base
        self._worker: LabWorker | None = None

    def ask(self, setup: Setup, call: Callable[[LabWorker], Answer]) -> Answer:
        """Do something with a worker of this setup.

        Args:
            setup: What it must have at hand.
            call: What to do.
        """
        worker = self._worker
        if worker is None or not worker.setup.is_of_base(setup):
            base = self._base if worker is None else None
            worker = self._worker = LabWorker(setup, base)
        elif worker.setup != setup:
            worker.use(setup)
        return call(worker)


class Here:
    """One worker in this process.

    Args:
        base: Loaded already; None: it is loaded when first asked for.
    """

    name = "this process"
    n_workers = 1

    def __init__(self, base: LoadedBase | None = None) -> None:
        """Nothing is loaded yet."""
        self._bench = Bench(base)

    def ask(self, setup: Setup, call: Callable[[LabWorker], Answer]) -> "Future[Answer]":
        """Do it at once."""
        future: Future[Answer] = Future()
        future.set_result(self._bench.ask(setup, call))
        return future

    def close(self) -> None:
        """Nothing is to be ended."""


class Processes:
    """A pool of processes on this machine, each with a base of its own and one thread.

    Args:
        n_workers: How many.
    """

    def __init__(self, n_workers: int) -> None:
        """Processes start with the first question."""
        self.n_workers = n_workers
        self.name = f"{n_workers} processes" if n_workers > 1 else "1 process"
        # Not a fork: this process may have threads, which a fork would leave half-way.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(n_workers, mp_context=context, initializer=quiet_libraries)

    def ask(self, setup: Setup, call: Callable[[LabWorker], Answer]) -> "Future[Answer]":
        """Let the next free process do it."""
        try:
            return self._pool.submit(_in_process, setup, call)
        except BrokenProcessPool as error:
            raise _killed() from error

    def close(self) -> None:
        """End the processes; what has not begun never will."""
        self._pool.shutdown(cancel_futures=True)


_BENCH: Bench | None = None
"""Of a process of the pool."""


def _in_process(setup: Setup, call: Callable[[LabWorker], Any]) -> Any:  # noqa: ANN401 - whatever it gives
    global _BENCH  # noqa: PLW0603 - a process of a pool has no other place that outlives a question
    if _BENCH is None:
        _BENCH = Bench()
    return _BENCH.ask(setup, call)


def make_engine(section: EngineSection, *, ray_address: str | None = None) -> Engine:
    """The engine that was asked for.

    Args:
        section: Of the experiment.
        ray_address: Of a running cluster; None: one of this machine is started.

    Raises:
        EngineError: Ray is asked for and not there.
    """
    match section.kind:
        case EngineKind.HERE:
            return Here()
        case EngineKind.PROCESSES:
            return Processes(section.workers)
        case EngineKind.RAY:
            from simulations.lab.ray_engine import RayEngine  # noqa: PLC0415 - an extra

            return RayEngine(
                section.workers, address=ray_address, on_cpu=section.device == CPU_DEVICE
            )

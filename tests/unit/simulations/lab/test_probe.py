"""How many agents to train at once, by the time that trying took."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_agent.data.records import Record
from edge_agent.errors import OutOfMemoryError
from quant.base_model import LoadedBase
from simulations.errors import EngineError
from simulations.lab import probe as probe_module
from simulations.lab.engines import Here
from simulations.lab.experiment import EMBEDDED_BASE, Experiment
from simulations.lab.probe import choose_group, chosen, sizes_to_try, steps_of_run
from simulations.lab.records import Arm
from simulations.lab.terms import make_terms
from simulations.lab.visits import Setup, Visit, load_lab_base

LINEAR = {1: 1.0, 2: 0.5, 4: 0.25, 8: 0.125, 16: 0.0625}
"""Seconds of an agent's step where a group takes as long as one agent."""
FLAT = dict.fromkeys((1, 2, 4, 8, 16), 1.0)
"""The same where nothing is gained."""
LONG = 100_000
"""Steps of a run that is long enough for any trial."""


@pytest.mark.parametrize(
    ("times", "cohort", "n_workers", "wanted"),
    [
        pytest.param(LINEAR, 16, 1, 16, id="all-at-once"),
        pytest.param(FLAT, 16, 1, 1, id="no-gain"),
        pytest.param({1: 1.0, 2: 0.96}, 16, 1, 1, id="less-than-one-in-ten-is-no-gain"),
        pytest.param({1: 1.0, 2: 0.89}, 16, 1, 2, id="more-than-one-in-ten"),
        pytest.param({1: 1.0, 2: 0.6, 4: 0.7}, 16, 1, 2, id="the-best-is-in-the-middle"),
        pytest.param({1: 1.0, 2: 0.8, 4: 0.78}, 16, 1, 2, id="the-smaller-of-two-alike"),
        # Five agents on four workers: two turns of one, or one turn of two: half the agents' time.
        pytest.param({1: 1.0, 2: 0.99}, 5, 4, 1, id="a-group-of-two-takes-twice-as-long"),
        pytest.param({1: 1.0, 2: 0.5}, 5, 4, 2, id="one-turn-in-the-place-of-two"),
        pytest.param({1: 1.0, 2: 0.5}, 4, 4, 1, id="a-worker-for-each"),
        # Five in groups of four are two turns; the short one is reckoned as a whole one.
        pytest.param({1: 1.0, 2: 0.9, 4: 0.55}, 5, 1, 4, id="two-turns-of-four"),
        pytest.param({1: 1.0, 2: 0.9, 4: 0.7}, 5, 1, 1, id="two-turns-of-four-are-too-long"),
        pytest.param({1: 3.0}, 7, 1, 1, id="one-candidate"),
    ],
)
def test_the_size_whose_rounds_are_soonest_over_is_chosen(
    times: dict[int, float], cohort: int, n_workers: int, wanted: int
) -> None:
    assert chosen(times, cohort=cohort, n_workers=n_workers) == wanted


@pytest.mark.parametrize(
    ("n_steps", "n_workers", "wanted"),
    [
        # 3 x (2 g - 1) steps for all sizes up to g, and twenty times as many of the run.
        pytest.param(0, 1, (1,), id="none"),
        pytest.param(100, 1, (1,), id="twenty-rounds-of-five-agents-of-one-step"),
        pytest.param(179, 1, (1,), id="a-step-too-few"),
        pytest.param(180, 1, (1, 2), id="just-enough-for-two"),
        pytest.param(419, 1, (1, 2), id="a-step-too-few-for-four"),
        pytest.param(420, 1, (1, 2, 4), id="just-enough-for-four"),
        pytest.param(1859, 1, (1, 2, 4, 8), id="a-step-too-few-for-sixteen"),
        pytest.param(1860, 1, (1, 2, 4, 8, 16), id="just-enough-for-sixteen"),
        # While one tries, the other does nothing.
        pytest.param(359, 2, (1,), id="two-workers-end-twice-as-soon"),
        pytest.param(360, 2, (1, 2), id="enough-for-two-of-them"),
        pytest.param(LONG, 4, (1, 2, 4), id="no-larger-than-leaves-each-one"),
        pytest.param(LONG, 16, (1,), id="a-worker-for-each"),
        pytest.param(LONG, 20, (1,), id="more-workers-than-agents"),
    ],
)
def test_no_trial_is_longer_than_a_twentieth_of_the_run(
    n_steps: int, n_workers: int, wanted: tuple[int, ...]
) -> None:
    assert sizes_to_try(cohort=16, n_workers=n_workers, n_steps=n_steps) == wanted


@pytest.mark.parametrize(
    ("training", "wanted"),
    [
        ({"local_steps": 7, "local_epochs": None}, 7),
        ({"local_steps": None, "local_epochs": 1}, 3),
        ({"local_steps": None, "local_epochs": 2}, 6),
    ],
)
def test_the_steps_of_a_run_are_those_of_all_agents_in_all_rounds(
    training: dict[str, int | None], wanted: int, small: Experiment, base: LoadedBase
) -> None:
    manifest = make_terms(small, base.description, arm=Arm.FEDERATED, seed=1).manifest
    block = manifest.training.model_copy(update={**training, "batch_size": 4})
    rounds = manifest.rounds
    found = steps_of_run(manifest.model_copy(update={"training": block}), [2, 9, 19])
    assert found == rounds.n_rounds * rounds.cohort_target * wanted  # ten records, three batches


@dataclass
class FakeWorker:
    """Moves the clock as far as its group would take; the calls `slowed` take longer."""

    setup: Setup
    step_s: dict[int, float]
    batch_size: int = 4
    device: str = "cpu"
    slowed: tuple[int, ...] = ()
    n_tokens: tuple[int, ...] = (1,)
    too_large: int = 1000
    failing: int = 1000
    clock_s: float = 0.0
    probed: list[tuple[int, int]] = field(default_factory=list)
    visits: list[Sequence[Visit]] = field(default_factory=list)

    @property
    def base(self) -> Any:
        return SimpleNamespace(device=SimpleNamespace(type=self.device))

    @property
    def manifest(self) -> Any:
        return SimpleNamespace(training=SimpleNamespace(batch_size=self.batch_size))

    def probe(self, group: int, release: object, visits: Sequence[Visit], *, n_steps: int) -> int:
        self.setup = replace(self.setup, group=group)
        self.probed.append((group, n_steps))
        self.visits.append(visits)
        if group >= self.too_large:
            msg = "so many do not fit"
            raise OutOfMemoryError(msg)
        if group >= self.failing:
            return 0
        slowness = 9 if len(self.probed) - 1 in self.slowed else 1
        n_tokens = sum(self.n_tokens[visit.agent % len(self.n_tokens)] for visit in visits)
        self.clock_s += self.step_s[group] * n_tokens * n_steps * slowness
        return n_tokens * n_steps

    def use(self, setup: Setup) -> None:
        self.setup = setup


@dataclass
class FakeEngine:
    worker: FakeWorker
    n_workers: int = 1
    name: str = "a fake"

    def ask(self, setup: Setup, call: Callable[[Any], Any]) -> "Future[Any]":
        assert self.worker.setup == setup
        future: Future[Any] = Future()
        future.set_result(call(self.worker))
        return future

    def close(self) -> None:
        pass


SETUP = Setup(model="a model", manifest=b"{}", seed=3)
RECORD = Record(
    instruction="Why?", context="", response="So.", category="a", messages=None, source="s"
)
CLIENTS = [(RECORD,) * n for n in (9, 3)]


@pytest.fixture
def make_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeEngine]:
    def make(
        step_s: dict[int, float],
        *,
        n_workers: int = 1,
        device: str = "cpu",
        slowed: tuple[int, ...] = (),
        n_tokens: tuple[int, ...] = (1,),
    ) -> FakeEngine:
        worker = FakeWorker(SETUP, step_s, device=device, slowed=slowed, n_tokens=n_tokens)
        right, wrong = ("perf_counter", "process_time")[:: -1 if device == "cpu" else 1]
        monkeypatch.setattr(probe_module.time, right, lambda: worker.clock_s)
        monkeypatch.setattr(probe_module.time, wrong, lambda: 1e6 * len(worker.probed))
        return FakeEngine(worker, n_workers)

    return make


def choose(engine: FakeEngine, *, cohort: int, n_steps: int = LONG) -> int:
    release = np.zeros(3, np.float32)
    return choose_group(engine, SETUP, release, CLIENTS, cohort=cohort, n_steps=n_steps)


def test_larger_groups_are_tried_as_long_as_they_gain(
    make_engine: Callable[..., FakeEngine],
) -> None:
    engine = make_engine(LINEAR)
    assert choose(engine, cohort=16) == 16
    assert [size for size, _ in engine.worker.probed[::3]] == [1, 2, 4, 8, 16]
    assert engine.worker.setup == SETUP


def test_the_first_that_gains_nothing_is_the_last_that_is_tried(
    make_engine: Callable[..., FakeEngine],
) -> None:
    engine = make_engine({1: 1.0, 2: 0.6, 4: 0.59, 8: 0.01, 16: 0.01})
    assert choose(engine, cohort=16) == 2
    assert [size for size, _ in engine.worker.probed[::3]] == [1, 2, 4]
    assert engine.worker.setup == SETUP


def test_a_size_that_does_not_fit_ends_the_trials_and_the_best_before_it_stays(
    make_engine: Callable[..., FakeEngine],
) -> None:
    engine = make_engine(LINEAR)
    engine.worker.too_large = 8
    assert choose(engine, cohort=16) == 4
    assert engine.worker.probed[-1][0] == 8
    assert engine.worker.setup == SETUP
    engine.worker.too_large = 1
    with pytest.raises(OutOfMemoryError, match="so many do not fit"):
        choose(engine, cohort=16)


def test_a_size_whose_trainings_fail_is_not_taken_for_a_fast_one(
    make_engine: Callable[..., FakeEngine],
) -> None:
    engine = make_engine(LINEAR)
    engine.worker.failing = 4
    assert choose(engine, cohort=16) == 2
    engine.worker.failing = 1
    assert choose(engine, cohort=16) == 1


def test_a_worker_that_is_killed_in_a_trial_is_one_sentence() -> None:
    class Killed(FakeEngine):
        def ask(self, setup: Setup, call: Callable[[Any], Any]) -> "Future[Any]":
            future: Future[Any] = Future()
            future.set_exception(BrokenProcessPool())
            return future

    with pytest.raises(EngineError, match="a worker process was killed"):
        choose(Killed(FakeWorker(SETUP, LINEAR)), cohort=16)


def test_none_is_larger_than_leaves_every_worker_one(
    make_engine: Callable[..., FakeEngine],
) -> None:
    engine = make_engine(LINEAR, n_workers=4)
    assert choose(engine, cohort=16) == 4
    assert {size for size, _ in engine.worker.probed} == {1, 2, 4}


@pytest.mark.parametrize(("cohort", "n_workers"), [(1, 1), (3, 4), (8, 8)])
def test_where_one_alone_can_be_nothing_is_tried(
    make_engine: Callable[..., FakeEngine], cohort: int, n_workers: int
) -> None:
    engine = make_engine(LINEAR, n_workers=n_workers)
    assert choose(engine, cohort=cohort) == 1
    assert not engine.worker.probed


def test_in_a_run_too_short_for_it_nothing_is_tried(
    make_engine: Callable[..., FakeEngine],
) -> None:
    engine = make_engine(LINEAR)
    assert choose(engine, cohort=5, n_steps=100) == 1
    assert not engine.worker.probed
    assert choose(engine, cohort=5, n_steps=180) == 2
    assert {size for size, _ in engine.worker.probed} == {1, 2}


def test_each_size_is_tried_once_for_room_and_then_for_time_on_one_batch(
    make_engine: Callable[..., FakeEngine],
) -> None:
    engine = make_engine(LINEAR)
    choose(engine, cohort=4)
    assert engine.worker.probed == [(1, 1)] * 3 + [(2, 1)] * 3 + [(4, 1)] * 3
    for visits, (size, _) in zip(engine.worker.visits, engine.worker.probed, strict=True):
        assert [visit.agent for visit in visits] == list(range(size))
        # Few clients take turns, each with no more records than a batch has.
        assert [len(visit.records) for visit in visits] == [4, 3, 4, 3][:size]


def test_that_one_agent_s_records_are_shorter_decides_nothing(
    make_engine: Callable[..., FakeEngine],
) -> None:
    """By the step two agents would seem to take longer, or half as long, by the token the same."""
    for n_tokens in ((20, 60), (60, 20)):
        engine = make_engine({1: 1.0, 2: 1.0, 4: 0.1}, n_tokens=n_tokens)
        assert choose(engine, cohort=2) == 1
        engine = make_engine({1: 1.0, 2: 0.8, 4: 0.1}, n_tokens=n_tokens)
        assert choose(engine, cohort=2) == 2


@pytest.mark.parametrize("slowed", [(0,), (1,), (2,), (0, 1), (3, 4), (1, 5)])
def test_one_slow_step_of_a_size_decides_nothing(
    slowed: tuple[int, ...], make_engine: Callable[..., FakeEngine]
) -> None:
    assert choose(make_engine(FLAT, slowed=slowed), cohort=16) == 1
    assert choose(make_engine(LINEAR, slowed=slowed), cohort=16) == 16


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_other_processes_take_is_on_no_processor_s_clock(
    device: str, make_engine: Callable[..., FakeEngine]
) -> None:
    # By the other clock every group takes equally long, so the largest would be chosen.
    assert choose(make_engine(FLAT, device=device), cohort=16) == 1


def test_a_real_worker_is_afterwards_as_it_was(small: Experiment) -> None:
    base: LoadedBase = load_lab_base(Setup(model=EMBEDDED_BASE, device="cpu"))
    terms = make_terms(small, base.description, arm=Arm.FEDERATED, seed=1)
    setup = Setup(model=EMBEDDED_BASE, device="cpu", manifest=terms.manifest.canonical(), seed=1)
    engine = Here(base)
    release = np.zeros(terms.whole.n_values, np.float32)
    release[:] = np.random.default_rng(0).normal(0, 0.02, release.shape)
    visit = Visit(round=1, release=0, agent=0, records=(RECORD,) * 6)

    def update() -> bytes:
        [found] = engine.ask(setup, lambda worker: worker.train(release, [visit])).result()
        assert found.vector is not None
        return bytes(found.vector.tobytes())

    before = update()
    assert choose_group(engine, setup, release, CLIENTS, cohort=2, n_steps=LONG) in {1, 2}
    assert engine.ask(setup, lambda worker: worker.setup).result() == setup
    assert update() == before

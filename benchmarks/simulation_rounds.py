"""Rounds of our simulator as `simulations.lab.run` has them, on a clock.

One thread, or one in each worker. The base is the embedded one, the records are those of its world,
an agent's training is real. What is on the clock:

- `overhead`: in one process, one agent at a time, each round from the end of one to that of the
  next: drawing the cohort; for each agent its tokens, trainer, adapter, step, update and line of
  the journal; average, release, journal. Nothing is evaluated between rounds. Within that clock:
  `gradients_s`, the calls of `gradients_of` (padding, forward, backward), and `optimizer_s`, those
  of the optimiser's `step`; a client's overhead is the rest.
- `first_round`: from `began` to the end of the first round, in parts that follow each other: Python
  and all imports; the 4-bit base; the rest, which is the records, their partition, the manifest
  and the round; the run is too short for a trial of group sizes.
- `paper`: the default experiment, from the start of the workers to the end of `run`.
"""

import cProfile
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from benchmarks.simulation_job import since_start

EMBEDDED: Final = "embedded:tiny"
SEED: Final = 1
HUNDRED_THOUSAND: Final[dict[str, Any]] = {
    # 100,352 values: no choice of modules and rank of the embedded base comes nearer.
    "federation.rank": 14,
    "federation.target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
}
ONE_STEP: Final = {"federation.local_steps": 1, "federation.batch_size": 1}
NO_EVALUATION: Final = {"evaluation.every": 0, "evaluation.answers": 0, "data.held_out": 1}


def hundred_thousand_lora() -> Any:
    """The block of an adapter of as many values, 100,352 on the embedded base."""
    from benchmarks.sides import PAPER_LORA

    return PAPER_LORA.model_copy(
        update={
            "rank": HUNDRED_THOUSAND["federation.rank"],
            "target_modules": tuple(HUNDRED_THOUSAND["federation.target_modules"]),
        }
    )


class EnoughError(Exception):
    """The round that was waited for is over."""


class Stamps:
    """A listener of a run that does something after each round, and leaves after the last.

    Args:
        after: Told the number of the round that ended.
        leave_after: The last round; None: the run goes to its end.
    """

    def __init__(self, after: Callable[[int], None], *, leave_after: int | None = None) -> None:
        """Nothing has happened yet."""
        self.n_values = 0
        self.group_size = 0
        self.stages: dict[str, float] = {}
        self._after = after
        self._leave_after = leave_after

    def stage(self, text: str) -> None:
        """Something begins that takes a while."""
        self.stages[text] = time.perf_counter()

    def begun(self, card: Any, *, n_done: int) -> None:
        """The run is about to train."""
        assert n_done == 0
        self.n_values, self.group_size = card.n_values, card.group_size
        self.stage("rounds")

    def visited(self, note: Any) -> None:
        """An agent's training ended."""
        assert note.error is None, note.error

    def closed(self, note: Any) -> None:
        """A round ended."""
        assert note.failure is None, note.failure
        self._after(note.number)
        if note.number == self._leave_after:
            raise EnoughError

    def scored(self, notes: Sequence[Any]) -> None:
        """A release was measured."""


class Watch:
    """Adds up the time of a function's calls."""

    def __init__(self) -> None:
        """None so far."""
        self.seconds = 0.0

    def over(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, on this clock."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


# --- overhead -------------------------------------------------------------------------------------


def overhead(job: Mapping[str, Any]) -> dict[str, Any]:
    """What a virtual agent costs beside its own step.

    Args:
        job: `rounds`, `warm_up`, `clients`, `cohort`, further `values` of the experiment, and
            `profile`, a file for cProfile's figures of the rounds after the warm-up.
    """
    import torch

    from edge_agent.training import trainer
    from simulations.lab.engines import Here
    from simulations.lab.visits import Setup, load_lab_base

    warm_up, rounds, cohort = job["warm_up"], job["rounds"], job["cohort"]
    profiler = cProfile.Profile() if job.get("profile") else None
    gradients, optimizer = Watch(), Watch()
    began: list[tuple[float, float, float]] = []
    ended: list[tuple[float, float, float]] = []

    def now() -> tuple[float, float, float]:
        return time.perf_counter(), gradients.seconds, optimizer.seconds

    def after(number: int) -> None:
        if began:
            ended.append(now())
        if profiler is not None and number == warm_up:
            profiler.enable()
        if profiler is not None and number == warm_up + rounds:
            profiler.disable()
        began.append(now())

    # torch wraps an optimiser's `step` when the first one is made; ours is to be outside of that.
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    base = load_lab_base(Setup(model=EMBEDDED, device="cpu"))
    stamps = Stamps(after, leave_after=warm_up + rounds)
    with (
        patch.object(trainer, "gradients_of", gradients.over(trainer.gradients_of)),
        patch.object(torch.optim.AdamW, "step", optimizer.over(torch.optim.AdamW.step)),
    ):
        _run(
            stamps,
            Here(base),
            {
                **HUNDRED_THOUSAND,
                **ONE_STEP,
                **NO_EVALUATION,
                "data.n_clients": job["clients"],
                "federation.n_rounds": warm_up + rounds + 1,  # the last is measured, and stays out
                "federation.cohort": cohort,
                "engine.group": 1,
                **job.get("values", {}),
            },
        )
    if profiler is not None:
        profiler.dump_stats(job["profile"])
    spans = [
        tuple(b - a for a, b in zip(begin, end, strict=True))
        for begin, end in zip(began, ended, strict=False)
    ][-rounds:]
    overhead_s = [(wall - inside - step) / cohort for wall, inside, step in spans]
    return {
        "n_values": stamps.n_values,
        "round_s": [wall for wall, _, _ in spans],
        "gradients_s": [inside / cohort for _, inside, _ in spans],
        "optimizer_s": [step / cohort for _, _, step in spans],
        "overhead_per_client_s": overhead_s,
        "overhead_per_client_median_s": statistics.median(overhead_s),
    }


# --- from the command to the end of the first round -----------------------------------------------


def first_round(job: Mapping[str, Any]) -> dict[str, Any]:
    """How long until the first round is over.

    Args:
        job: `began`, seconds of the epoch when the command was given; `clients`, `cohort`, further
            `values` of the experiment.
    """
    began = job["began"]
    for name in ("torch._dynamo", "simulations.lab.run"):  # what the first optimiser imports, too
        import_module(name)
    from simulations.lab.engines import Here
    from simulations.lab.visits import Setup, load_lab_base

    imports_s = since_start(began)
    base = load_lab_base(Setup(model=EMBEDDED, device="cpu"))
    model_s = since_start(began) - imports_s
    ended: list[float] = []
    stamps = Stamps(lambda _: ended.append(since_start(began)), leave_after=1)
    _run(
        stamps,
        Here(base),
        {
            **HUNDRED_THOUSAND,
            **ONE_STEP,
            "data.n_clients": job["clients"],
            "federation.cohort": job["cohort"],
            **job.get("values", {}),
        },
    )
    marks = [*stamps.stages.items(), ("end", time.perf_counter())]
    return {
        "n_values": stamps.n_values,
        "first_round_s": ended[0],
        "imports_s": imports_s,
        "model_s": model_s,
        "rest_s": ended[0] - imports_s - model_s,
        "group_size": stamps.group_size,
        "stages_s": {name: after - before for (name, before), (_, after) in pairwise(marks)},
    }


# --- the paper's schedule ---


def paper(job: Mapping[str, Any]) -> dict[str, Any]:
    """The default experiment, all of it.

    Args:
        job: `workers`, and further `values`.
    """
    from simulations.lab.engines import make_engine
    from simulations.lab.experiment import EngineSection

    ended: list[float] = []
    stamps = Stamps(lambda _: ended.append(time.perf_counter()))
    began = time.perf_counter()
    engine = make_engine(EngineSection(kind="processes", workers=job["workers"]))
    try:
        _run(stamps, engine, job.get("values", {}))
    finally:
        engine.close()
    wall_s = time.perf_counter() - began
    return {
        "wall_s": wall_s,
        "group_size": stamps.group_size,
        "n_rounds": len(ended),
        "round_ended_s": [end - began for end in ended],
    }


def warm_up(engine: Any, setup: Any) -> None:
    """Return when every worker of an engine has loaded its base.

    Without it, one that is slow to start would get none of a short round's questions.

    Args:
        engine: Any.
        setup: What its workers must have at hand.
    """
    seen: set[int] = set()
    while len(seen) < engine.n_workers:
        asked = [engine.ask(setup, _who) for _ in range(engine.n_workers)]
        seen |= {one.result() for one in asked}


def _who(_worker: Any) -> int:
    time.sleep(0.2)  # for the next question to go to another one
    return os.getpid()


def _run(stamps: Stamps, engine: Any, values: Mapping[str, Any]) -> None:
    """Run an experiment in a folder of its own, until the listener leaves."""
    from simulations.lab.experiment import Experiment
    from simulations.lab.run import Request, run

    values = {"engine.device": "cpu", **values}  # where the peers are
    request = Request(experiment=Experiment(name="benchmark").with_values(values), seed=SEED)
    folder = tempfile.TemporaryDirectory(prefix="sheepfold-benchmark-")
    with folder as name, suppress(EnoughError):
        run(Path(name) / "run", request, engine, stamps)

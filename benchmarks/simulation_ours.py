"""Our side of the benchmark of simulators: `simulations.lab` as it runs, no network.

`benchmarks.simulation` has each job done in a process of its own; without it:

    python -m benchmarks.simulation_ours --job '{"do": "memory", "slots": 4, "batch": 1, "length": 128}'

Whole rounds, with the folder and the journal, are in `simulation_rounds`. Here:

- `memory`: no clock. The peak of the resident memory of one process above what stood before the
  adapters were attached, while that many agents train a step at once.
- `worker`: no clock. What a second process of a pool takes, a base of its own included: the
  proportional set sizes (PSS) of two, less that of one, each after rounds of one step.
- `vectorised`, `workers`: rounds of agents that have as many records as a batch has examples, by
  `simulations.lab.engines.train`: per agent a trainer, a batch in each of some steps, an update.
  Adapters are attached and most records are tokens: a round to warm up came before.
- `pool`: the same with agents of equal records, one at a time on each worker of Ray or a pool.
"""  # noqa: E501 - one command

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.simulation_rounds import (
    EMBEDDED,
    SEED,
    first_round,
    hundred_thousand_lora,
    overhead,
    paper,
    warm_up,
)

_OF_A_LONG_RUN: Final = 1_000_000
"""Steps: every size may be tried."""


# --- memory ---------------------------------------------------------------------------------------


def memory(job: Mapping[str, Any]) -> dict[str, Any]:
    """Peak memory while so many agents train a step at once.

    Args:
        job: `slots`, how many; `batch` examples of each, of `length` tokens, in one micro-batch.
    """
    from benchmarks.resident import ResidentPeak
    from quant.lora_stack import StackedModel

    lora = hundred_thousand_lora()
    with lent_base(EMBEDDED) as base:
        stack = StackedModel(base, lora, n_slots=1)
        _step_together(stack, batch=1, length=8)
        stack.detach()
        del stack
        watch = ResidentPeak()
        stack = StackedModel(base, lora, n_slots=job["slots"])
        _step_together(stack, batch=job["batch"], length=job["length"])
        return {"peak_bytes": watch.above_bytes()}


def _step_together(stack: Any, *, batch: int, length: int) -> None:
    """Train every slot of a stack for a step, as a group of virtual agents is."""
    import numpy as np

    from edge_agent.data.tokens import Example
    from edge_agent.training.sampling import ShuffledBatches
    from edge_agent.training.trainer import (
        LocalTrainer,
        RoundRecipe,
        TrainerOptions,
        TrainingResult,
    )
    from protocol.blocks import TrainingBlock
    from protocol.clock import SystemClock
    from quant.adapter import initial_adapter, sent_layout
    from quant.memory import StepSettings
    from simulations.lab.together import train_together

    block = TrainingBlock(batch_size=batch, local_steps=1, learning_rate=1e-3)
    vocabulary = int(stack.base.model.config.vocab_size)
    start = initial_adapter(stack.base.description, stack.lora)
    layout = sent_layout({name: array.shape for name, array in start.items()}, stack.lora.sent)
    sessions = []
    for slot in stack.slots:
        rng = np.random.default_rng(slot.number)
        examples = [
            Example(
                input_ids=rng.integers(3, vocabulary, length).astype(np.int32),
                loss_mask=np.arange(length) > 0,
                source="made",
                category=None,
                truncated=False,
            )
            for _ in range(batch)
        ]
        trainer = LocalTrainer(
            slot,
            examples,
            RoundRecipe(training=block, schedule_start=0.0, schedule_end=1.0, seed=slot.number),
            sampler=ShuffledBatches(n_examples=batch, batch_size=batch, seed=0),
            clock=SystemClock(),
            options=TrainerOptions(settings=StepSettings(micro_tokens=batch * length)),
        )
        sessions.append(trainer.session(start, layout, weight=1))
    ended = train_together(stack, sessions)
    assert all(isinstance(end, TrainingResult) for end in ended), ended


def worker(_job: Mapping[str, Any]) -> dict[str, Any]:
    """What one more process takes, for an agent that is to train elsewhere at the same time."""
    from benchmarks.simulation_job import pss_bytes
    from simulations.lab.engines import Processes

    n_agents = 8
    with lent_base(EMBEDDED) as base:
        records = world_records(n_agents)
        crowd = Crowd(base, n_agents=n_agents, batch=1, n_steps=1, records=records, device="cpu")
    sizes = []
    for n_workers in (1, 2):
        engine = Processes(n_workers)
        try:
            warm_up(engine, crowd.setup)
            for _ in range(2):
                crowd.train(engine, 1)
            children = multiprocessing.active_children()
            assert len(children) == n_workers
            sizes.append(sum(pss_bytes(child.pid) for child in children if child.pid))
        finally:
            engine.close()
    return {"workers_pss_bytes": sizes, "additional_bytes": sizes[1] - sizes[0]}


# --- many at once ---------------------------------------------------------------------------------


class Crowd:
    """Agents that train the same round on an engine, over and over; in memory, nothing is saved.

    Args:
        base: What the engine's workers load, or have.
        n_agents: How many.
        batch: Examples of a step, and records of each agent.
        n_steps: Of each agent in a round.
        records: To deal out, a batch to each.
        device: Of the setup.
    """

    def __init__(
        self,
        base: Any,
        *,
        n_agents: int,
        batch: int,
        n_steps: int,
        records: Sequence[Any],
        device: str | None = None,
    ) -> None:
        """Make the manifest and deal the records."""
        from quant.adapter import flatten, initial_adapter
        from simulations.lab.experiment import Experiment
        from simulations.lab.records import Arm
        from simulations.lab.terms import make_terms
        from simulations.lab.visits import Setup, Visit

        values = {
            "federation.cohort": n_agents,
            "federation.batch_size": batch,
            "federation.local_steps": n_steps,
        }
        experiment = Experiment(name="crowd").with_values(values)
        description = base.description
        terms = make_terms(experiment, description, arm=Arm.FEDERATED, seed=SEED)
        self.n_examples = n_agents * batch * n_steps
        self.release = flatten(initial_adapter(description, terms.manifest.lora), terms.whole)
        self.setup = Setup(
            model=description.base.model,
            device=device,
            manifest=terms.manifest.canonical(),
            seed=SEED,
        )
        self.visits = []
        for agent in range(n_agents):
            own = tuple(records[agent * batch : (agent + 1) * batch])
            assert len(own) == batch, "too few records"
            self.visits.append(Visit(round=1, release=0, agent=agent, records=own))

    def train(self, engine: Any, group: int) -> float:
        """Train a round in groups of that size.

        Returns:
            Seconds.
        """
        from simulations.lab import engines

        groups = [
            tuple(self.visits[start : start + group]) for start in range(0, len(self.visits), group)
        ]
        setup = replace(self.setup, group=group)
        began = time.perf_counter()
        found = [
            one for results in engines.train(engine, setup, self.release, groups) for one in results
        ]
        taken = time.perf_counter() - began
        assert len(found) == len(self.visits)
        assert all(one.error is None for one in found), [one.error for one in found]
        return taken


def vectorised(
    shape_or_base: Any,
    batch_sizes: Sequence[int],
    groups: Sequence[int],
    device: str = "cpu",
    *,
    n_agents: int = 8,
    repetitions: int = 3,
    records: Sequence[Any] | None = None,
    with_probe: bool = True,
) -> list[dict[str, Any]]:
    """Agents at once against agents one after the other, interleaved on one base in this process.

    A round is `Crowd.train` after one to warm up, which attaches the adapters: per agent a trainer,
    a batch in each of some steps, an update. In a group of one that is `AdaptedModel`, in a larger
    one `StackedModel`.

    Args:
        shape_or_base: A `LoadedBase`; a key of `benchmarks.sides.SHAPES`, for a Llama of random
            numbers; or what `load_base` takes.
        batch_sizes: Examples of an agent's step.
        groups: Sizes of groups; 1 among them, and all that the probe may choose, if it is asked.
        device: Where a base that is not loaded yet is loaded to.
        n_agents: Of a round.
        repetitions: Rounds of each size, in turns.
        records: Instructions to train on, the largest batch for each agent; None: those of the
            embedded world, of 45 to 120 tokens by its own tokenizer.
        with_probe: Whether the probe is asked as well.

    Returns:
        For each batch size `batch`, `n_steps`, `examples_per_s` by group size, and `chosen`, the
        group sizes that the probe chose; a figure for each repetition. No adapter is left attached.
    """
    from simulations.lab.engines import Here
    from simulations.lab.probe import choose_group

    dealt = world_records(n_agents * max(batch_sizes)) if records is None else records
    found = []
    with lent_base(shape_or_base, device) as base:
        engine = Here(base)
        crowds = {
            batch: Crowd(
                base,
                n_agents=n_agents,
                batch=batch,
                n_steps=max(1, 16 // batch),
                records=dealt,
                device=device,
            )
            for batch in batch_sizes
        }
        for batch, crowd in crowds.items():
            speeds: dict[int, list[float]] = {group: [] for group in groups}
            chosen = []
            for repetition in range(repetitions):
                turn = repetition % len(groups)
                for group in [*groups[turn:], *groups[:turn]]:
                    crowd.train(engine, group)
                    speeds[group].append(crowd.n_examples / crowd.train(engine, group))
                if with_probe:
                    clients = [visit.records for visit in crowd.visits]
                    chosen.append(
                        choose_group(
                            engine,
                            crowd.setup,
                            crowd.release,
                            clients,
                            cohort=n_agents,
                            n_steps=_OF_A_LONG_RUN,
                        )
                    )
            found.append(
                {
                    "batch": batch,
                    "n_steps": crowd.n_examples // (n_agents * batch),
                    "examples_per_s": speeds,
                    "chosen": chosen,
                }
            )
        engine.ask(replace(crowd.setup, run="over"), _nothing)  # another setup: adapters go
    return found


def _nothing(_worker: Any) -> None:
    """To be asked of a worker for its setup alone."""


def vectorised_workers(
    batch_sizes: Sequence[int], groups: Sequence[int], *, workers: int, repetitions: int
) -> list[dict[str, Any]]:
    """The same in processes of one thread each, which share the processor's caches.

    Args:
        batch_sizes: Examples of an agent's step.
        groups: Sizes of groups; each has a pool of its own, so no pool changes its adapters.
        workers: Processes of a pool; pools take turns.
        repetitions: Rounds of each size.
    """
    from simulations.lab.engines import Processes

    n_agents = workers * max(groups)
    records = world_records(n_agents * max(batch_sizes))
    pools = {group: Processes(workers) for group in groups}
    found = []
    with lent_base(EMBEDDED) as base:
        for batch in batch_sizes:
            n_steps = max(1, 16 // batch)
            crowd = Crowd(
                base,
                n_agents=n_agents,
                batch=batch,
                n_steps=n_steps,
                records=records,
                device="cpu",
            )
            speeds: dict[int, list[float]] = {group: [] for group in groups}
            for group, pool in pools.items():
                warm_up(pool, replace(crowd.setup, group=group))
                crowd.train(pool, group)
            for repetition in range(repetitions):
                for group in [*groups][:: -1 if repetition % 2 else 1]:
                    speeds[group].append(crowd.n_examples / crowd.train(pools[group], group))
            found.append({"batch": batch, "n_steps": n_steps, "examples_per_s": speeds})
    for pool in pools.values():
        pool.close()
    return found


def pool(job: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds of equal agents, one at a time on each worker.

    Args:
        job: `kind` and `workers` of the engine, `agents`, `batch`, `n_steps`, `rounds`.
    """
    from simulations.lab.engines import make_engine
    from simulations.lab.experiment import EngineSection

    records = world_records(job["batch"]) * job["agents"]
    with lent_base(EMBEDDED) as base:
        crowd = Crowd(
            base,
            n_agents=job["agents"],
            batch=job["batch"],
            n_steps=job["n_steps"],
            records=records,
            device="cpu",
        )
    engine = make_engine(EngineSection(kind=job["kind"], workers=job["workers"]))
    try:
        warm_up(engine, crowd.setup)
        times = [crowd.train(engine, 1) for _ in range(1 + job["rounds"])]
    finally:
        engine.close()
    return {"warm_up_s": times[0], "round_s": times[1:], "median_s": statistics.median(times[1:])}


# --- parts ----------------------------------------------------------------------------------------


@contextmanager
def lent_base(shape_or_base: Any, device: str = "cpu") -> Iterator[Any]:
    """A base in 4 bit while the context is open.

    Args:
        shape_or_base: See `vectorised`.
        device: See `vectorised`.
    """
    if not isinstance(shape_or_base, str):
        yield shape_or_base
        return
    from benchmarks import sides
    from simulations.lab.visits import Setup, load_lab_base

    with ExitStack() as stack:
        name = shape_or_base
        if name in sides.SHAPES:
            name = str(stack.enter_context(sides.made_model(name, world_records(2000))))
        yield load_lab_base(Setup(model=name, device=device))


def world_records(n_records: int) -> list[Any]:
    """Instructions of the embedded world, of all categories."""
    from simulations.lab.data import prepare_data
    from simulations.lab.experiment import DataSection

    section = DataSection(scheme="iid", n_clients=1, held_out=1, per_category=-(-n_records // 8))
    found = list(prepare_data(section, seed=SEED).everything[:n_records])
    assert len(found) == n_records, "too few records"
    return found


def side(job: dict[str, Any]) -> dict[str, Any]:
    """What one process measures; `job["do"]` says what."""
    do: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "overhead": overhead,
        "first-round": first_round,
        "memory": memory,
        "worker": worker,
        "pool": pool,
        "paper": paper,
        "vectorised": lambda job: {"cells": vectorised(EMBEDDED, **job["options"])},
        "workers": lambda job: {"cells": vectorised_workers(**job["options"])},
    }
    return do[job["do"]](job)


def main() -> None:
    """Do a job, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--job", required=True, help="JSON, with `do` and what that takes")
    print(json.dumps(side(json.loads(parser.parse_args().job)), allow_nan=False))


if __name__ == "__main__":
    main()

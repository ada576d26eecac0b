"""How many virtual agents should train at once: found by trying, where a run is long enough for it.

On a GPU each pass through a 4-bit base pays a dequantisation and the start of every kernel, so
several small micro-batches at once are much faster than one after the other. On a processor the
gain is smaller, and for large batches there is none.

A size is tried as follows: its adapters are attached, each agent of a group makes one step, which
makes room, and two that are timed, by their useful tokens; the shorter one counts. Trials of all
sizes up to g thus take 3 (2 g - 1) steps of an agent, and less where a group gains. No trial is
begun that could bring this above a twentieth of the run's own steps: a run of fewer than 180 on a
worker would be over before a larger group had paid for having been found, and trains one agent
after the other.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Final

from edge_agent.data.records import Record
from edge_agent.errors import OutOfMemoryError
from edge_agent.training.sampling import ShuffledBatches
from privacy.updates import Float32Array
from protocol.manifest import FederationManifest
from simulations.lab.engines import Engine, answer_of
from simulations.lab.visits import LabWorker, Setup, Visit

GROUPS: Final = (1, 2, 4, 8, 16)
_LEAST_GAIN: Final = 1.1
"""A larger group must be faster by so much, or the smaller one, which needs less memory, stays."""
_N_TIMED: Final = 2
_LARGEST_SHARE: Final = 1 / 20
"""Of a run's steps that trials may take."""


def choose_group(
    engine: Engine,
    setup: Setup,
    release: Float32Array,
    clients: Sequence[tuple[Record, ...]],
    *,
    cohort: int,
    n_steps: int,
) -> int:
    """The group size at which a round of this cohort ends soonest.

    Larger groups are tried as long as they gain, no larger than leave every worker one, and none
    whose trial the run is too short for.

    Args:
        engine: One of its workers is asked.
        setup: Of the run.
        release: To start from.
        clients: Records of some clients; as many are used as a group has agents.
        cohort: Agents of a round.
        n_steps: Of the run: of all agents in all rounds.

    Raises:
        EngineError: The worker died.
        OutOfMemoryError: Not even one adapter fits beside the base.
    """
    candidates = sizes_to_try(cohort=cohort, n_workers=engine.n_workers, n_steps=n_steps)
    if len(candidates) == 1:
        return 1
    asked = engine.ask(
        setup,
        functools.partial(
            _times,
            release=release,
            clients=tuple(clients[: candidates[-1]]),
            sizes=candidates,
        ),
    )
    return chosen(answer_of(asked), cohort=cohort, n_workers=engine.n_workers)


def steps_of_run(manifest: FederationManifest, sizes: Sequence[int]) -> int:
    """How many steps all agents make in all rounds, about.

    Args:
        manifest: Of the run.
        sizes: How many records each client has.
    """
    block, rounds = manifest.training, manifest.rounds
    of_the_mean = ShuffledBatches(
        n_examples=max(1, round(sum(sizes) / len(sizes))), batch_size=block.batch_size, seed=0
    )
    each = of_the_mean.n_steps(local_steps=block.local_steps, local_epochs=block.local_epochs)
    return rounds.n_rounds * rounds.cohort_target * each


def sizes_to_try(*, cohort: int, n_workers: int, n_steps: int) -> tuple[int, ...]:
    """Ascending from 1; that alone, where nothing is to be tried.

    Args:
        cohort: Agents of a round.
        n_workers: How many groups are trained at once; one of them tries, and the others wait.
        n_steps: Of all agents in all rounds.
    """
    most = math.ceil(cohort / n_workers)
    affordable = _LARGEST_SHARE * n_steps / n_workers
    return 1, *(
        size
        for size in GROUPS[1:]
        if size <= most and (1 + _N_TIMED) * (2 * size - 1) <= affordable
    )


def chosen(times: dict[int, float], *, cohort: int, n_workers: int) -> int:
    """The size whose rounds are soonest over.

    Args:
        times: Seconds of a useful token, by group size.
        cohort: Agents of a round.
        n_workers: How many groups are trained at once.
    """

    def round_s(size: int) -> float:
        groups = math.ceil(cohort / size)
        return math.ceil(groups / n_workers) * min(size, cohort) * times[size]

    best = min(times)
    for size in sorted(times):
        if round_s(size) * _LEAST_GAIN < round_s(best):
            best = size
    return best


def _times(
    worker: LabWorker,
    *,
    release: Float32Array,
    clients: tuple[tuple[Record, ...], ...],
    sizes: tuple[int, ...],
) -> dict[int, float]:
    """Seconds of a useful token by group size; ends where one gains nothing or does not fit."""
    setup, batch = worker.setup, worker.manifest.training.batch_size
    # On a processor its own seconds, which other processes that take their turns do not lengthen.
    clock = time.perf_counter if worker.base.device.type == "cuda" else time.process_time
    found: dict[int, float] = {}
    for size in sizes:
        visits = [
            Visit(round=1, release=0, agent=agent, records=clients[agent % len(clients)][:batch])
            for agent in range(size)
        ]
        step = functools.partial(worker.probe, size, release, visits, n_steps=1)
        try:
            step()  # attaches and makes room
            # By tokens: another agent's records are longer or shorter.
            token_s = min(_seconds_per_token(step, clock) for _ in range(_N_TIMED))
        except OutOfMemoryError:
            if not found:
                raise
            break
        gains = token_s * _LEAST_GAIN < min(found.values(), default=math.inf)
        found[size] = token_s
        if not gains:
            break
    worker.use(setup)
    return found


def _seconds_per_token(step: Callable[[], int], clock: Callable[[], float]) -> float:
    begun = clock()
    n_tokens = step()
    return (clock() - begun) / n_tokens if n_tokens else math.inf

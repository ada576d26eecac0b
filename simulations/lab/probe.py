"""How many virtual agents should train at once: found by trying.

On a GPU each pass through a 4-bit base pays a dequantisation and the start of every kernel, so
several small micro-batches at once are much faster than one after the other. On a processor the
gain is smaller, and for large batches there is none.
"""

import functools
import math
import time
from collections.abc import Sequence
from typing import Final

from edge_agent.data.records import Record
from privacy.updates import Float32Array
from simulations.lab.engines import Engine
from simulations.lab.visits import LabWorker, Setup, Visit

GROUPS: Final = (1, 2, 4, 8, 16)
_LEAST_GAIN: Final = 1.1
"""A larger group must be faster by so much, or the smaller one, which needs less memory, stays."""
_STEPS: Final = 2


def choose_group(
    engine: Engine,
    setup: Setup,
    release: Float32Array,
    clients: Sequence[tuple[Record, ...]],
    *,
    cohort: int,
) -> int:
    """The group size at which a round of this cohort ends soonest.

    Larger groups are tried as long as they gain, and no larger than leave every worker one.

    Args:
        engine: One of its workers is asked.
        setup: Of the run.
        release: To start from.
        clients: Records of some clients; as many are used as a group has agents.
        cohort: Agents of a round.

    Raises:
        EngineError: The worker died.
    """
    most = max(1, math.ceil(cohort / engine.n_workers))
    candidates = [size for size in GROUPS if size <= most] or [1]
    if len(candidates) == 1:
        return 1
    asked = engine.ask(
        setup,
        functools.partial(
            _times,
            release=release,
            clients=tuple(clients[: candidates[-1]]),
            sizes=tuple(candidates),
        ),
    )
    return chosen(asked.result(), cohort=cohort, n_workers=engine.n_workers)


def chosen(times: dict[int, float], *, cohort: int, n_workers: int) -> int:
    """The size whose rounds are soonest over.

    Args:
        times: Seconds of an agent's step, by group size.
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
    """Seconds of an agent's step by group size; ends where a larger one gains nothing."""
    setup, batch = worker.setup, worker.manifest.training.batch_size
    found: dict[int, float] = {}
    for size in sizes:
        visits = [
            Visit(round=1, release=0, agent=agent, records=clients[agent % len(clients)][:batch])
            for agent in range(size)
        ]
        worker.probe(size, release, visits, n_steps=_STEPS)  # the first one attaches and makes room
        begun = time.perf_counter()
        worker.probe(size, release, visits, n_steps=_STEPS)
        step_s = (time.perf_counter() - begun) / (size * _STEPS)
        gains = step_s * _LEAST_GAIN < min(found.values(), default=math.inf)
        found[size] = step_s
        if not gains:
            break
    worker.use(setup)
    return found

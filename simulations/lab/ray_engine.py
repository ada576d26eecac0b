"""Virtual agents on a Ray cluster: on this machine's cores, or on many machines.

Each worker is an actor with one processor, and one GPU where the cluster has any and agents may use
it, and a base of its own. Workers on other machines must find the base under the same name.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from simulations.errors import EngineError
from simulations.lab.engines import Answer, Bench
from simulations.lab.visits import LabWorker, Setup

try:
    import ray
    from ray.exceptions import RayActorError, RayTaskError
except ImportError as error:  # pragma: no cover - the extra is installed where tests run
    msg = "Ray is not installed; pip install '.[sim-ray]' in a clone of Sheepfold"
    raise EngineError(msg) from error


class RayEngine:
    """Actors of a Ray cluster.

    Args:
        n_workers: How many.
        address: Of a running cluster; None starts one on this machine, which ends with `close`.
        on_cpu: Whether agents train on processors although there may be GPUs.

    Raises:
        EngineError: The cluster cannot be reached, or has not as many processors or GPUs.
    """

    def __init__(self, n_workers: int, *, address: str | None = None, on_cpu: bool = False) -> None:
        """Start or join the cluster, and the actors."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self.n_workers = n_workers
        self.name = f"Ray, {n_workers} workers"
        try:
            ray.init(
                address=address,
                num_cpus=n_workers if address is None else None,
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            msg = f"cannot use Ray at {address or 'this machine'}: {error}"
            raise EngineError(msg) from error
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        n_gpus = 0 if on_cpu or resources.get("GPU", 0.0) == 0.0 else 1
        for kind in ("CPU", *(["GPU"] if n_gpus else [])):
            n_there = int(resources.get(kind, 0.0))
            if n_there < n_workers:  # actors without a place would be waited for without end
                ray.shutdown()
                msg = (
                    f"each worker needs a {kind}, and the cluster has {n_there} for {n_workers}; "
                    f"give --workers {max(1, n_there)}" + (" or --device cpu" if n_gpus else "")
                )
                raise EngineError(msg)
        remote = ray.remote(num_cpus=1, num_gpus=n_gpus, runtime_env=_ENVIRONMENT)(_Actor)
        self._idle: deque[Any] = deque(remote.remote() for _ in range(n_workers))
        self._waiting: deque[tuple[Future[Any], Setup, Callable[[LabWorker], Any]]] = deque()
        self._lock = threading.Lock()

    def ask(self, setup: Setup, call: Callable[[LabWorker], Answer]) -> "Future[Answer]":
        """Let the next free actor do it."""
        future: Future[Answer] = Future()
        with self._lock:
            self._waiting.append((future, setup, call))
        self._hand_out()
        return future

    def close(self) -> None:
        """End the actors, and a cluster that was started here."""
        ray.shutdown()

    def _hand_out(self) -> None:
        while True:
            with self._lock:
                if not self._idle or not self._waiting:
                    return
                actor = self._idle.popleft()
                future, setup, call = self._waiting.popleft()
            answer: Future[Any] = actor.ask.remote(setup, call).future()
            answer.add_done_callback(_Hand(self, actor, future))

    def give_back(self, actor: Any) -> None:  # noqa: ANN401 - Ray gives handles no public type
        """An actor is free again.

        Args:
            actor: Which.
        """
        with self._lock:
            self._idle.append(actor)
        self._hand_out()


class _Hand:
    """Hands an actor's answer to whoever waits for it, and the actor the next question."""

    def __init__(self, engine: RayEngine, actor: Any, future: "Future[Any]") -> None:  # noqa: ANN401 - as above
        self._engine, self._actor, self._future = engine, actor, future

    def __call__(self, answer: "Future[Any]") -> None:
        error = answer.exception()
        if error is None:
            self._future.set_result(answer.result())
        elif isinstance(error, RayTaskError):
            self._future.set_exception(error.cause)
        elif isinstance(error, RayActorError):
            msg = (
                "a Ray worker died, perhaps for want of memory. The run can go on: give the same "
                "command again"
            )
            self._future.set_exception(EngineError(msg))
            return  # it comes back for nobody
        else:
            self._future.set_exception(error)
        self._engine.give_back(self._actor)


_ENVIRONMENT = {"env_vars": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}}


class _Actor:
    """The worker of one actor."""

    def __init__(self) -> None:
        self._bench = Bench()

    def ask(self, setup: Setup, call: Callable[[LabWorker], Any]) -> Any:  # noqa: ANN401 - whatever it gives
        return self._bench.ask(setup, call)

"""The peer's side of the benchmark of simulators: pfl-research's simulation, no network.

Run it from the peers' environment, `make setup-bench`; it imports nothing of Sheepfold:

    .venv-bench/bin/python benchmarks/simulation_pfl.py overhead
    .venv-bench/bin/python benchmarks/simulation_pfl.py first-round --began "$(date +%s.%N)"
    .venv-bench/bin/python benchmarks/simulation_pfl.py memory

The job, the same on every side. The adapter is one float32 vector w of 100,000 zeros. Client k of N
has one float32 number, its target (k + 1) / N. Its training is one step of `torch.optim.SGD` on
mean((w - target)²) at a learning rate of a quarter of w's length, which takes w half of the way to
the target. A round is FedAvg over a cohort of equal weights, so it takes the global w half of the
way to the cohort's mean target: `exact` says that w ended there. One thread; nothing is evaluated,
clipped or saved, no metric is printed.

Nothing of the simulator is written here: `FederatedAveraging.run` drives a `SimulatedBackend`
without postprocessors over a `FederatedDataset` whose users a `MinimizeReuseUserSampler` draws and
`PyTorchTensorDataset`s hold. What is on the clock:

- `overhead`: rounds, each from one `after_central_iteration` to the next:
  `get_next_central_contexts`; in `async_gather_results` for each client `get_cohort`,
  `simulate_one_user` (`get_parameters`, `do_sgd`, `get_model_difference`, `set_parameters`) and
  `SumAggregator.accumulate`; then `process_aggregated_statistics`, which averages and has the
  central SGD step. Within that clock: `step_s`, from the beginning of a client's loss to the end of
  its optimiser's `step`, the mean over the round's clients. A client's overhead is the rest.
- `first-round`: from the start of this process, or from `--began`, to the end of the first round,
  in parts that follow each other: Python and all imports; the model; the rest with the round. pfl
  always evaluates in its very first round; what it calls there returns a constant.
- `memory`: no clock. pfl trains the clients of a process one after the other on one model, so the
  next concurrent client is a process, and pfl's way to have it is torch.distributed
  (`PFL_WORKER_ADDRESSES`, here gloo on loopback). Each process holds a frozen float32 base beside
  the adapter. The proportional set size (PSS) of each, when all stand at the end of their second
  round.
"""

import argparse
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from simulation_job import pss_bytes, since_start, wait_for


def import_pfl() -> SimpleNamespace:
    """What this needs of pfl, and torch with one thread.

    Also what torch's first optimiser would import, so that it does not count as making the model.
    """
    names = {
        "simulate": "pfl.aggregate.simulate",
        "algorithm": "pfl.algorithm",
        "callback": "pfl.callback.base",
        "data": "pfl.data",
        "sampling": "pfl.data.sampling",
        "tensors": "pfl.data.pytorch",
        "hyperparam": "pfl.hyperparam",
        "metrics": "pfl.metrics",
        "model": "pfl.model.pytorch",
        "numpy": "numpy",
        "torch": "torch",
        "dynamo": "torch._dynamo",
    }
    pfl = SimpleNamespace(**{name: import_module(path) for name, path in names.items()})
    pfl.torch.set_num_threads(1)
    # pfl takes its seeds from numpy's global generator, which all its workers must seed alike.
    pfl.numpy.random.seed(0)
    return pfl


class StepWatch:
    """Adds up the time of clients' steps, from the beginning of a loss to the optimiser's end."""

    def __init__(self) -> None:
        """None so far."""
        self.seconds = 0.0
        self._began = 0.0

    def begin(self) -> None:
        """A loss is about to be made."""
        self._began = time.perf_counter()

    def end(self) -> None:
        """The optimiser has stepped."""
        self.seconds += time.perf_counter() - self._began


def make_model(
    pfl: SimpleNamespace, *, parameters: int, base_parameters: int = 0
) -> tuple[Any, StepWatch]:
    """The model as pfl wants it: a module with `loss` and `metrics`, and the central optimiser.

    Args:
        pfl: From `import_pfl`.
        parameters: Length of the adapter.
        base_parameters: Length of the frozen base, which takes no part; 0: there is none.

    Returns:
        The model, and the watch of its clients' steps.
    """
    torch = pfl.torch
    watch = StepWatch()

    class LocalSGD(torch.optim.SGD):  # type: ignore[name-defined,misc]
        def step(self, closure: Any = None) -> Any:
            found = super().step(closure)
            watch.end()
            return found

    class Module(torch.nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.adapter = torch.nn.Parameter(torch.zeros(parameters))
            if base_parameters:
                self.base = torch.nn.Parameter(torch.ones(base_parameters), requires_grad=False)

        def loss(self, target: Any) -> Any:
            watch.begin()
            return ((self.adapter - target) ** 2).mean()

        def metrics(self, _target: Any) -> dict[str, Any]:
            return {"nothing": pfl.metrics.Weighted(0, 1)}

    module = Module()
    model = pfl.model.PyTorchModel(
        model=module,
        local_optimizer_create=LocalSGD,
        central_optimizer=torch.optim.SGD([module.adapter], lr=1.0),
    )
    return model, watch


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How many rounds, with how many of all clients in each."""

    clients: int
    cohort: int
    rounds: int


def simulate(
    pfl: SimpleNamespace,
    model: Any,
    shape: Shape,
    *,
    after_round: Callable[[], None] = lambda: None,
    after_last: Callable[[], None] = lambda: None,
) -> list[float]:
    """Run the rounds.

    Args:
        pfl: From `import_pfl`.
        model: From `make_model`.
        shape: The rounds.
        after_round: Is called at the end of each.
        after_last: Is called at the end of the last of them.

    Returns:
        Readings of `time.perf_counter`: when the training began, and at the end of each round.
    """
    stamps: list[float] = []

    class Stamp(pfl.callback.TrainingProcessCallback):  # type: ignore[name-defined,misc]
        def on_train_begin(self, *, model: Any) -> Any:
            stamps.append(time.perf_counter())
            return super().on_train_begin(model=model)

        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> tuple[bool, Any]:
            stamps.append(time.perf_counter())
            after_round()
            if len(stamps) > shape.rounds:
                after_last()
            stop, metrics = super().after_central_iteration(
                aggregate_metrics, model, central_iteration=central_iteration
            )
            return stop, metrics

    def make_user(user: int) -> Any:
        target = pfl.torch.tensor([(user + 1) / shape.clients])
        return pfl.tensors.PyTorchTensorDataset((target,), user_id=str(user))

    users = pfl.data.FederatedDataset(
        make_user, pfl.sampling.get_user_sampler("minimize_reuse", range(shape.clients))
    )
    learning_rate = model.pytorch_model.adapter.numel() / 4
    pfl.algorithm.FederatedAveraging().run(
        algorithm_params=pfl.algorithm.NNAlgorithmParams(
            central_num_iterations=shape.rounds,
            evaluation_frequency=shape.rounds,
            train_cohort_size=shape.cohort,
            val_cohort_size=None,
        ),
        backend=pfl.simulate.SimulatedBackend(training_data=users, val_data=users),
        model=model,
        model_train_params=pfl.hyperparam.NNTrainHyperParams(
            local_batch_size=None, local_num_epochs=1, local_learning_rate=learning_rate
        ),
        callbacks=[Stamp()],
        send_metrics_to_platform=False,
    )
    return stamps


def is_exact(model: Any, shape: Shape) -> bool:
    """Whether the adapter is where the rounds' mean targets lead; the sampler takes turns."""
    expected = 0.0
    users = itertools.cycle(range(shape.clients))
    for _ in range(shape.rounds):
        cohort = itertools.islice(users, shape.cohort)
        mean_target = statistics.fmean((user + 1) / shape.clients for user in cohort)
        expected = (expected + mean_target) / 2
    adapter = model.pytorch_model.adapter.detach()
    return bool((adapter - expected).abs().max() < 1e-5)


def measure_overhead(
    *, parameters: int, clients: int, cohort: int, rounds: int, warm_up: int
) -> dict[str, Any]:
    """What a client costs beside its own step."""
    pfl = import_pfl()
    model, watch = make_model(pfl, parameters=parameters)
    shape = Shape(clients=clients, cohort=cohort, rounds=warm_up + rounds)
    stepped = [0.0]
    stamps = simulate(pfl, model, shape, after_round=lambda: stepped.append(watch.seconds))
    times = [after - before for before, after in itertools.pairwise(stamps)]
    steps = [(after - before) / cohort for before, after in itertools.pairwise(stepped)]
    overhead = [
        time_s / cohort - step_s
        for time_s, step_s in zip(times[warm_up:], steps[warm_up:], strict=True)
    ]
    return {
        "warm_up_round_s": times[:warm_up],
        "round_s": times[warm_up:],
        "step_s": steps[warm_up:],
        "overhead_per_client_s": overhead,
        "overhead_per_client_median_s": statistics.median(overhead),
        "exact": is_exact(model, shape),
        "notes": [
            "the first round, which pfl evaluates in, is in the warm-up",
        ],
    }


def measure_first_round(
    *, parameters: int, clients: int, cohort: int, began: float | None
) -> dict[str, Any]:
    """How long until the first round is over."""
    pfl = import_pfl()
    imports_s = since_start(began)
    model, _ = make_model(pfl, parameters=parameters)
    model_s = since_start(began) - imports_s
    ended: list[float] = []
    shape = Shape(clients=clients, cohort=cohort, rounds=1)
    stamps = simulate(pfl, model, shape, after_last=lambda: ended.append(since_start(began)))
    return {
        "first_round_s": ended[0],
        "imports_s": imports_s,
        "model_s": model_s,
        "rest_s": ended[0] - imports_s - model_s,
        "round_s": stamps[1] - stamps[0],
        "exact": is_exact(model, shape),
        "notes": [
            "first_round_s is imports_s + model_s + rest_s; round_s is within rest_s",
            "the start of a process is known to 10 ms; --began is exact",
        ],
    }


def hold(*, parameters: int, base_parameters: int, clients: int, cohort: int, folder: Path) -> None:
    """One process of `memory`: two rounds, then stand until the parent has measured."""
    pfl = import_pfl()
    model, _ = make_model(pfl, parameters=parameters, base_parameters=base_parameters)

    def stand() -> None:
        (folder / f"held-{os.getpid()}").touch()
        wait_for((folder / "measured").exists, "the parent's measurement")

    shape = Shape(clients=clients, cohort=cohort, rounds=2)
    simulate(pfl, model, shape, after_last=stand)
    assert is_exact(model, shape)


def held_pss(n: int, options: Iterable[str]) -> list[int]:
    """Run `hold` in n processes that train together, and measure each of them while all stand."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
        if n > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            env["PFL_WORKER_ADDRESSES"] = ",".join(f"127.0.0.1:{port + i}" for i in range(n))
        command = [sys.executable, __file__, "hold", "--cohort", str(n), "--folder", folder]
        processes = []
        for rank in range(n):
            process = subprocess.Popen(
                [*command, *options], env={**env, "PFL_WORKER_RANK": f"{rank}"}
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
            processes.append(process)

        def stand() -> bool:
            if any(process.poll() is not None for process in processes):
                raise RuntimeError("a process ended before all were measured")
            return len(list(Path(folder).glob("held-*"))) == n

        wait_for(stand, f"{n} processes")
        sizes = [pss_bytes(process.pid) for process in processes]
        Path(folder, "measured").touch()
        for process in processes:
            if process.wait():
                raise RuntimeError(f"a process failed: {process.returncode}")
    return sizes


def measure_memory(*, parameters: int, base_parameters: int, clients: int) -> dict[str, Any]:
    """What one more concurrent client takes; this process imports neither pfl nor torch."""
    values = {"parameters": parameters, "base-parameters": base_parameters, "clients": clients}
    options = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    sizes = {n: held_pss(n, options) for n in (1, 2)}
    return {
        "base_bytes": 4 * base_parameters,
        "concurrent": [{"clients": n, "workers_pss_bytes": pss} for n, pss in sizes.items()],
        "additional_bytes": sum(sizes[2]) - sum(sizes[1]),
        "note": (
            "in one process pfl trains clients one after the other on one model: more of them take "
            "no more memory, and are not concurrent; the second concurrent client is a second "
            "process (torch.distributed, gloo) with an interpreter, a torch and a base of its own"
        ),
    }


MEASURES: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "overhead": measure_overhead,
    "first-round": measure_first_round,
    "memory": measure_memory,
}


def read_arguments() -> dict[str, Any]:
    """The command line."""
    parser = argparse.ArgumentParser(description="pfl-research's simulation.")
    modes = parser.add_subparsers(dest="mode", required=True)
    helps = {name: measure.__doc__ for name, measure in MEASURES.items()} | {"hold": hold.__doc__}
    for name, text in helps.items():
        mode = modes.add_parser(name, help=text)
        mode.add_argument("--parameters", type=int, default=100_000, help="length of the adapter")
        mode.add_argument("--clients", type=int, default=100, help="all of them")
        if name != "memory":
            cohort = 50 if name == "overhead" else 5
            mode.add_argument("--cohort", type=int, default=cohort, help="clients in a round")
        if name == "overhead":
            mode.add_argument("--rounds", type=int, default=20)
            mode.add_argument("--warm-up", type=int, default=2, help="rounds before them")
        if name == "first-round":
            mode.add_argument("--began", type=float, help="of the command: `date +%%s.%%N`")
        if name in ("memory", "hold"):
            mode.add_argument("--base-parameters", type=int, default=984_192, help="a frozen base")
        if name == "hold":
            mode.add_argument("--folder", type=Path, required=True, help="where to meet the parent")
    settings = vars(parser.parse_args())
    if settings.get("cohort", 0) > settings["clients"]:
        parser.error("a cohort is of --clients at most")
    return settings


def main() -> None:
    """Read the command line, measure, and print one JSON document."""
    settings = read_arguments()
    mode = settings.pop("mode")
    if mode == "hold":
        hold(**settings)
        return
    found = MEASURES[mode](**settings)
    report = {
        "peer": "pfl-research",
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("pfl", "torch", "numpy")},
        },
        "mode": mode,
        "settings": {**settings, "threads": 1},
        **found,
    }
    json.dump(report, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()

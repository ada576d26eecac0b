"""The peer's side of the benchmark of simulators: Flower's simulation engine on Ray, on loopback.

Run it from the peers' environment, `make setup-bench`; it imports nothing of Sheepfold:

    .venv-bench/bin/python benchmarks/simulation_flower.py overhead
    .venv-bench/bin/python benchmarks/simulation_flower.py first-round --began "$(date +%s.%N)"
    .venv-bench/bin/python benchmarks/simulation_flower.py first-round --launch command
    .venv-bench/bin/python benchmarks/simulation_flower.py memory

The job, the same on every side. The adapter is one float32 vector w of 100,000 zeros. Client k of N
has one float32 number, its target (k + 1) / N. Its training is one step of `torch.optim.SGD` on
mean((w - target)²) at a learning rate of a quarter of w's length, which takes w half of the way to
the target. A round is FedAvg over a cohort of equal weights, so it takes the global w half of the
way to the cohort's mean target: `exact` says that w ended there. One thread; nothing is evaluated,
clipped or saved, no metric is printed.

Nothing of the simulator is written here: a `ServerApp` calls `FedAvg.start` of
`flwr.serverapp.strategy`, a `ClientApp` trains, and w travels as an `ArrayRecord` of one ndarray.
Each simulated client has one CPU, and Ray has as many as there are workers, so there is one
`ClientAppActor` for each worker; all else but the logging is Flower's default. There are two ways
to launch it, and both end in the same `_run_simulation`: the function `run_simulation` of
`flwr.simulation`, which 1.41 calls deprecated, and the command `flwr run`, which submits an app to
a SuperLink that it starts.

What is on the clock:

- `overhead`: rounds within `FedAvg.start`, each from the end of one `aggregate_evaluate`, with
  which Flower ends a round even when nobody evaluates, to that of the next: `configure_train`;
  `InMemoryGrid.send_and_receive` with the engine's threads, which look for messages and for replies
  every 0.1 s, and, for each client, `RayBackend.process_message`, which takes the message to an
  actor and the reply back; `aggregate_train`. The actors stand, and have torch: warm-up rounds came
  before. Within that clock: `step_s`, a client's `zero_grad`, loss, `backward`, `step`, as the
  clients clock it, their mean. A client's overhead is (round - C x step / workers) / C.
- `first-round`: from the start of this process, or from `--began`, to the end of the first round,
  in parts that follow each other: Python and all imports of the server's process; its arrays; the
  rest with the round. Starting Ray is in the rest, and so is `client_imports_s`, what the client
  app's process takes to import torch.
- `memory`: no clock. Each client of a round holds a frozen float32 base while it trains, as
  Flower's examples for LLMs load the model anew in each call of `train`. The proportional set size
  (PSS) of all processes of the simulation, at the moment when every worker holds one.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module, metadata
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import simulation_job
from simulation_job import pss_bytes, since_start, wait_for

JOB: Final = "SIMULATION_FLOWER_JOB"
"""The variable that takes the job, as JSON, to the server app, whoever launches that."""
ENVIRONMENT: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_LOG_LEVEL": "WARNING",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Despite its name the only switch that has Ray listen on loopback alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "OMP_NUM_THREADS": "1",
}
APP_PROJECT: Final = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "simulation"
version = "1.0.0"
description = "A benchmark's job."
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "benchmarks"

[tool.flwr.app.components]
serverapp = "app:server_app"
clientapp = "app:client_app"
"""
APP: Final = """\
import simulation_flower

server_app = simulation_flower.make_server_app()
client_app = simulation_flower.make_client_app()
"""


# --- what runs in an actor ------------------------------------------------------------------------


def train(message: Any, context: Any) -> Any:
    """A client: one step from the arrays it was sent."""
    began = time.perf_counter()
    import torch
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    torch.set_num_threads(1)
    config = message.content["config"]
    holds = config["server-round"] == config["hold-in-round"]
    base = torch.ones(config["base-parameters"]) if holds else None
    values = message.content["arrays"].to_numpy_ndarrays()[0]
    adapter = torch.from_numpy(values).requires_grad_()
    client, clients = context.node_config["partition-id"], context.node_config["num-partitions"]
    target = torch.tensor([(client + 1) / clients])
    optimizer = torch.optim.SGD([adapter], lr=adapter.numel() / 4)
    ready = time.perf_counter()
    optimizer.zero_grad()
    ((adapter - target) ** 2).mean().backward()
    optimizer.step()
    stepped = time.perf_counter()
    if base is not None:
        folder = Path(config["folder"])
        (folder / f"held-{os.getpid()}").touch()
        wait_for((folder / "measured").exists, "the server's measurement")
    metrics = {
        "num-examples": 1,
        "target": target.item(),
        "ready_s": ready - began,
        "step_s": stepped - ready,
    }
    content = {
        "arrays": ArrayRecord([adapter.detach().numpy()]),
        "metrics": MetricRecord(metrics),
    }
    return Message(RecordDict(content), reply_to=message)


def make_client_app() -> Any:
    """Flower's `ClientApp` of the two."""
    client_app = import_flower().clientapp.ClientApp()
    client_app.train()(train)
    return client_app


# --- what runs in the server's process ------------------------------------------------------------


def import_flower() -> SimpleNamespace:
    """What this needs of Flower, and torch with one thread, as a server with a model would have."""
    names = {
        "app": "flwr.app",
        "clientapp": "flwr.clientapp",
        "serverapp": "flwr.serverapp",
        "strategy": "flwr.serverapp.strategy",
        "simulation": "flwr.simulation",
        "ray": "ray",
        "numpy": "numpy",
        "torch": "torch",
    }
    flower = SimpleNamespace(**{name: import_module(path) for name, path in names.items()})
    flower.torch.set_num_threads(1)
    return flower


def make_server_app() -> Any:
    """Flower's `ServerApp` that does the job in the variable `JOB`, and writes what it found."""
    flower = import_flower()
    imported_at = time.time()

    def serve(grid: Any, _context: Any) -> None:
        job = json.loads(os.environ[JOB])
        found = {"imported_at": imported_at, **run_rounds(flower, grid, job)}
        report = Path(job["report"])
        half = report.with_suffix(".part")
        half.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
        half.replace(report)

    server_app = flower.serverapp.ServerApp()
    server_app.main()(serve)
    return server_app


def run_rounds(flower: SimpleNamespace, grid: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Have the rounds, with what belongs around them."""
    began = time.perf_counter()
    arrays = flower.app.ArrayRecord([flower.torch.zeros(job["parameters"]).numpy()])
    found: dict[str, Any] = {"model_s": time.perf_counter() - began}
    strategy = make_strategy(flower, clients=job["clients"], cohort=job["cohort"])
    config = {
        "hold-in-round": job.get("hold_in_round", 0),
        "base-parameters": job.get("base_parameters", 0),
        "folder": job.get("folder", ""),
    }
    measurer = None
    if config["hold-in-round"]:
        folder = Path(job["folder"])
        measurer = threading.Thread(
            target=measure_held, args=(folder, job["workers"], found), daemon=True
        )
        measurer.start()
    result = strategy.start(
        grid,
        arrays,
        num_rounds=job["rounds"],
        train_config=flower.app.ConfigRecord(config),
    )
    if measurer is not None:
        measurer.join()
    expected = 0.0
    for metrics in strategy.metrics:
        expected = (expected + metrics["target"]) / 2
    final = result.arrays.to_numpy_ndarrays()[0]
    return {
        **found,
        "round_s": [after - before for before, after in pairwise(strategy.stamps)],
        "ended_at": strategy.ended_at,
        "step_s": [metrics["step_s"] for metrics in strategy.metrics],
        "ready_s": [metrics["ready_s"] for metrics in strategy.metrics],
        "exact": bool(abs(final - expected).max() < 1e-5),
    }


def make_strategy(flower: SimpleNamespace, *, clients: int, cohort: int) -> Any:
    """FedAvg that reads the clock between rounds, and refuses to go on without a client."""

    class Stamped(flower.strategy.FedAvg):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__(
                fraction_train=cohort / clients,
                fraction_evaluate=0.0,
                min_train_nodes=cohort,
                min_available_nodes=clients,
            )
            self.stamps: list[float] = []
            self.ended_at: list[float] = []
            self.metrics: list[dict[str, float]] = []

        def configure_train(self, *args: Any) -> Any:
            if not self.stamps:
                self.stamps.append(time.perf_counter())
            return super().configure_train(*args)

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            came = [reply for reply in replies if not reply.has_error()]
            if len(came) != cohort:
                raise RuntimeError(f"round {server_round}: {len(came)} of {cohort} clients")
            arrays, metrics = super().aggregate_train(server_round, came)
            self.metrics.append(dict(metrics))
            return arrays, metrics

        def aggregate_evaluate(self, *args: Any) -> Any:
            metrics = super().aggregate_evaluate(*args)
            self.stamps.append(time.perf_counter())
            self.ended_at.append(time.time())
            return metrics

    return Stamped()


def measure_held(folder: Path, workers: int, found: dict[str, Any]) -> None:
    """Wait until every worker holds a base, measure all processes, and let the workers go on."""
    wait_for(lambda: len(list(folder.glob("held-*"))) == workers, f"{workers} workers")
    held = {int(path.name.partition("-")[2]) for path in folder.glob("held-*")}
    sizes = {}
    for pid in own_processes():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            sizes[pid] = pss_bytes(pid)
    found["workers_pss_bytes"] = [sizes[pid] for pid in sorted(held)]
    found["others_pss_bytes"] = [
        {"process": title(pid), "pss_bytes": size} for pid, size in sizes.items() if pid not in held
    ]
    (folder / "measured").touch()


def own_processes() -> list[int]:
    """This process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parent = path.read_text(encoding="utf-8").rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found


def title(pid: int) -> str:
    """A process's name: Ray's own, or that of its script or program."""
    words = command_line(pid).split("\0")
    return next(
        (Path(word).name for word in words[1:] if word.endswith(".py")), Path(words[0]).name
    )


# --- how it is launched ---------------------------------------------------------------------------


def launch_function(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job in this process."""
    # By its name, as an app is: functions of `__main__` would travel by value with every message.
    sys.path.insert(0, str(Path(__file__).parent))
    this = import_module(Path(__file__).stem)
    flower = this.import_flower()
    # Ray's processes end by themselves some seconds after `run_simulation` has.
    with workplace(signals=(0, signal.SIGTERM, signal.SIGKILL)) as folder:
        job = {**job, "report": str(folder / "report.json"), "folder": str(folder)}
        os.environ.update({"RAY_TMPDIR": str(folder), JOB: json.dumps(job)})
        flower.simulation.run_simulation(
            server_app=this.make_server_app(),
            client_app=this.make_client_app(),
            num_supernodes=job["clients"],
            backend_config={
                "init_args": {"num_cpus": job["workers"], "log_to_driver": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
        return dict(json.loads(Path(job["report"]).read_text(encoding="utf-8")))


def launch_command(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job twice with `flwr run`: the first starts a SuperLink, the second finds it there.

    Returns:
        What the first found, with when it was launched, and with what the second found in `again`.
    """
    # The SuperLink never ends by itself.
    with workplace(signals=(signal.SIGTERM, signal.SIGKILL)) as folder:
        app, home, report = folder / "app", folder / "home", folder / "report.json"
        app.mkdir()
        (app / "pyproject.toml").write_text(APP_PROJECT, encoding="utf-8")
        (app / "app.py").write_text(APP, encoding="utf-8")
        for name in (Path(__file__).name, Path(simulation_job.__file__).name):
            shutil.copy(Path(__file__).with_name(name), app)
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
            "FLWR_HOME": str(home),
            "RAY_TMPDIR": str(folder),
            JOB: json.dumps({**job, "report": str(report), "folder": str(folder)}),
        }
        settings = {
            "num-supernodes": job["clients"],
            "client-resources-num-cpus": 1,
            "init-args-num-cpus": job["workers"],
            "init-args-log-to-driver": "false",
        }
        config = " ".join(f"{name}={value}" for name, value in settings.items())
        command = ["flwr", "run", str(app), "--federation-config", config]

        def simulating() -> bool:
            return any("flwr-simulation" in command_line(pid) for pid in processes_of(folder))

        def run() -> dict[str, Any]:
            launched_at = time.time()
            subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
            submitted_at = time.time()
            # Seldom, for it looks at all processes, and costs what is being measured.
            wait_for(lambda: report.exists() or simulating(), "the simulation's start", every_s=0.5)
            wait_for(lambda: not simulating(), "the simulation's end", every_s=0.5)
            if not report.exists():
                log = (home / "local-superlink" / "superlink.log").read_text(encoding="utf-8")
                raise RuntimeError(f"the simulation failed:\n{log[-3000:]}")
            found = json.loads(report.read_text(encoding="utf-8"))
            report.unlink()
            return {"launched_at": launched_at, "submitted_at": submitted_at, **found}

        return {**run(), "again": run()}


@contextlib.contextmanager
def workplace(signals: Iterable[int]) -> Iterator[Path]:
    """A folder for the simulation's processes, all of which have ended when the context has.

    Args:
        signals: What those that are left get, each for some seconds; 0 gives them time only.
    """
    with tempfile.TemporaryDirectory(prefix="sim-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            yield folder
        finally:
            for number in signals:
                deadline = time.monotonic() + 15
                while (pids := processes_of(folder)) and time.monotonic() < deadline:
                    for pid in pids:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, number)
                    time.sleep(0.5)


def processes_of(folder: Path) -> list[int]:
    """The processes that were started with that folder as Ray's, which nobody else's are."""
    mark = f"RAY_TMPDIR={folder}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def command_line(pid: int) -> str:
    """The words that a process was started with, or its title; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except OSError:
        return ""


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


LAUNCHES: Final = {"function": launch_function, "command": launch_command}


# --- what is measured -----------------------------------------------------------------------------


def measure_overhead(
    *,
    parameters: int,
    clients: int,
    cohort: int,
    rounds: int,
    warm_up: int,
    workers: int,
    launch: str,
) -> dict[str, Any]:
    """What a client costs beside its own step."""
    job = {"parameters": parameters, "clients": clients, "cohort": cohort, "workers": workers}
    found = LAUNCHES[launch]({**job, "rounds": warm_up + rounds})
    times, steps = found["round_s"], found["step_s"]
    overhead = [
        time_s / cohort - step_s / workers
        for time_s, step_s in zip(times[warm_up:], steps[warm_up:], strict=True)
    ]
    return {
        "warm_up_round_s": times[:warm_up],
        "round_s": times[warm_up:],
        "step_s": steps[warm_up:],
        "overhead_per_client_s": overhead,
        "overhead_per_client_median_s": statistics.median(overhead),
        "exact": found["exact"],
        "notes": [
            "the engine looks for messages and for replies every 0.1 s: rounds come in such steps",
        ],
    }


def measure_first_round(
    *,
    parameters: int,
    clients: int,
    cohort: int,
    workers: int,
    launch: str,
    began: float | None,
) -> dict[str, Any]:
    """How long until the first round is over."""
    began_at = time.time() - since_start(began)
    job = {"parameters": parameters, "clients": clients, "cohort": cohort, "workers": workers}
    found = LAUNCHES[launch]({**job, "rounds": 1})

    def parts(found: dict[str, Any], began_at: float) -> dict[str, float]:
        first_round_s = found["ended_at"][0] - began_at
        imports_s = found["imported_at"] - began_at
        return {
            "first_round_s": first_round_s,
            "imports_s": imports_s,
            "model_s": found["model_s"],
            "rest_s": first_round_s - imports_s - found["model_s"],
            "round_s": found["round_s"][0],
            "client_imports_s": found["ready_s"][0] * cohort / workers,
        }

    notes = [
        (
            "first_round_s is imports_s + model_s + rest_s; round_s is within rest_s, and holds "
            "what is left of starting Ray, which runs beside the server app"
        ),
        (
            "client_imports_s, within round_s: from the first line of `train` to its step, summed "
            "over the clients of a worker; all but the first of them take a millisecond"
        ),
    ]
    if launch == "function":
        notes.append("the start of a process is known to 10 ms; --began is exact")
        return {**parts(found, began_at), "exact": found["exact"], "notes": notes}
    notes.append(
        "began is not used: each run counts from its `flwr run`; imports_s holds that command, the "
        "SuperLink's start (not in `again`), the app's way through it, and the imports"
    )
    again = found["again"]
    return {
        **parts(found, found["launched_at"]),
        "submitted_s": found["submitted_at"] - found["launched_at"],
        "again": {
            **parts(again, again["launched_at"]),
            "submitted_s": again["submitted_at"] - again["launched_at"],
        },
        "exact": found["exact"] and again["exact"],
        "notes": notes,
    }


HELD: Final = ("clients", "workers_pss_bytes", "others_pss_bytes", "exact")


def hold(*, parameters: int, base_parameters: int, clients: int, workers: int) -> dict[str, Any]:
    """One simulation of `memory`, with so many clients at once."""
    found = launch_function(
        {
            "parameters": parameters,
            "base_parameters": base_parameters,
            "clients": clients,
            "cohort": workers,
            "workers": workers,
            "rounds": 2,
            "hold_in_round": 2,
        }
    )
    found["clients"] = workers
    return {name: found[name] for name in HELD}


def measure_memory(*, parameters: int, base_parameters: int, clients: int) -> dict[str, Any]:
    """What one more concurrent client takes; this process imports neither Flower nor torch."""
    values = {"parameters": parameters, "base-parameters": base_parameters, "clients": clients}
    options = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    found = []
    for workers in (1, 2):
        command = [sys.executable, __file__, "hold", "--workers", str(workers), *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        report = json.loads(done.stdout)
        found.append({name: report[name] for name in HELD})
    workers_bytes = [sum(side["workers_pss_bytes"]) for side in found]
    all_bytes = [
        total + sum(other["pss_bytes"] for other in side["others_pss_bytes"])
        for total, side in zip(workers_bytes, found, strict=True)
    ]
    return {
        "base_bytes": 4 * base_parameters,
        "concurrent": found,
        "additional_bytes": workers_bytes[1] - workers_bytes[0],
        "additional_all_bytes": all_bytes[1] - all_bytes[0],
        "exact": all(side["exact"] for side in found),
        "note": (
            "a concurrent client is an actor, a process with an interpreter, a torch and a base of "
            "its own. additional_bytes is of the actors alone; additional_all_bytes also of the "
            "server's process and of Ray's, whose share of common pages falls with each actor"
        ),
    }


MEASURES: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "overhead": measure_overhead,
    "first-round": measure_first_round,
    "memory": measure_memory,
    "hold": hold,
}


def read_arguments() -> dict[str, Any]:
    """The command line."""
    parser = argparse.ArgumentParser(description="Flower's simulation engine.")
    modes = parser.add_subparsers(dest="mode", required=True)
    for name, measure in MEASURES.items():
        mode = modes.add_parser(name, help=measure.__doc__)
        mode.add_argument("--parameters", type=int, default=100_000, help="length of the adapter")
        mode.add_argument("--clients", type=int, default=100, help="all of them")
        if name != "memory":
            mode.add_argument("--workers", type=int, default=1, help="clients at the same time")
        if name in ("overhead", "first-round"):
            cohort = 50 if name == "overhead" else 5
            mode.add_argument("--cohort", type=int, default=cohort, help="clients in a round")
            mode.add_argument("--launch", choices=LAUNCHES, default="function", help="how")
        if name == "overhead":
            mode.add_argument("--rounds", type=int, default=20)
            mode.add_argument("--warm-up", type=int, default=2, help="rounds before them")
        if name == "first-round":
            mode.add_argument("--began", type=float, help="of the command: `date +%%s.%%N`")
        if name in ("memory", "hold"):
            mode.add_argument("--base-parameters", type=int, default=984_192, help="a frozen base")
    settings = vars(parser.parse_args())
    if settings.get("cohort", 0) > settings["clients"]:
        parser.error("a cohort is of --clients at most")
    return settings


def main() -> None:
    """Read the command line, measure, and print one JSON document."""
    settings = read_arguments()
    mode = settings.pop("mode")
    os.environ.update(ENVIRONMENT)
    found = MEASURES[mode](**settings)
    report = {
        "peer": "flwr simulation",
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("flwr", "ray", "torch", "numpy")},
        },
        "mode": mode,
        "settings": {**settings, "threads": 1},
        **found,
    }
    json.dump(report, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()

"""Our simulator against pfl-research's and Flower's, on the same machine, in one run.

    make setup-bench
    python -m benchmarks.simulation [--quick] [--only PART ...] --json FILE

Each side runs in a process of its own, with one thread; sides alternate, and who begins does too.
What is on each side's clock stands in `simulation_rounds`, `simulation_ours`, `simulation_pfl` and
`simulation_flower`. The peers' clients train one vector of so many values for a step, ours an
adapter of as many on a 4-bit base, so what is compared is all of a client but its step.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.report import Row, add_options, as_markdown, in_own_process, write_report

MODULE: Final = "benchmarks.simulation"
OURS: Final = "benchmarks.simulation_ours"
PEER_PYTHON: Final = Path(".venv-bench/bin/python")
PEERS: Final = {"pfl": "pfl-research", "flower": "Flower"}
NO_PEERS: Final = (
    "the peers are not installed, so what is compared with them is left out: make setup-bench"
)
ONE_EXAMPLE: Final = "one example"
WORKLOADS: Final = {ONE_EXAMPLE: (1, 128), "a full micro-batch, 2,048 tokens": (16, 128)}
"""Examples of each agent, and tokens of each example."""
EVERY_BYTE: Final = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Has the C library give freed memory back, so that the resident memory is that of the tensors."""
_MB: Final = 1e6
_VALUES: Final = 100_352


class Bench:
    """What all parts share.

    Args:
        repetitions: How often each comparison is measured.
        quick: Small sizes, for trying.
    """

    def __init__(self, *, repetitions: int, quick: bool) -> None:
        """Nothing is measured yet."""
        self.repetitions = repetitions
        self.quick = quick
        self.details: dict[str, Any] = {}
        self.peers = dict(PEERS) if PEER_PYTHON.exists() else {}
        if not self.peers:
            self.details["peers"] = NO_PEERS
            say(NO_PEERS)

    def ours(self, do: str, **job: Any) -> dict[str, Any]:
        """Have our side do a job."""
        say(f"ours: {do} {job}")
        if do == "first-round":
            job["began"] = time.time()
        found: dict[str, Any] = in_own_process(OURS, {"do": do, **job})
        self.details.setdefault("ours", []).append({"do": do, **job, **found})
        return found

    def theirs(self, peer: str, mode: str, **options: int) -> dict[str, Any]:
        """Have a peer's script measure something.

        Raises:
            RuntimeError: It failed, or its clients' adapters ended elsewhere than they should.
        """
        say(f"{PEERS[peer]}: {mode} {options}")
        script = Path(__file__).with_name(f"simulation_{peer}.py")
        given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        began = [f"--began={time.time()!r}"] if mode == "first-round" else []
        ours = {"PYTHONPATH", "PYTHONSAFEPATH"}  # ours alone; theirs find their modules beside them
        done = subprocess.run(
            [str(PEER_PYTHON), str(script), mode, *given, *began],
            env={name: value for name, value in os.environ.items() if name not in ours},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            msg = f"{PEERS[peer]} failed on {mode} {options}: {done.stderr.strip()[-800:]}"
            raise RuntimeError(msg)
        found: dict[str, Any] = json.loads(done.stdout)
        if found.get("exact") is False:
            msg = f"{PEERS[peer]} did another job than it was given: {mode} {options}"
            raise RuntimeError(msg)
        self.details.setdefault(peer, []).append(found)
        return found

    def paired(
        self, sides: Mapping[str, Callable[[], dict[str, Any]]]
    ) -> dict[str, list[dict[str, Any]]]:
        """Measure each side once in every repetition, in turning order."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for repetition in range(self.repetitions):
            for name in [*sides][:: -1 if repetition % 2 else 1]:
                found[name].append(sides[name]())
        return found

    def sides(
        self, mode: str, ours: Mapping[str, Any], options: Mapping[str, int]
    ) -> dict[str, Callable[[], dict[str, Any]]]:
        """Our side and the peers' that are there, for `paired`."""
        theirs = {peer: partial(self.theirs, peer, mode, **options) for peer in self.peers}
        return {"ours": partial(self.ours, mode, **ours), **theirs}


def say(text: str) -> None:
    """Say how it goes, on standard error."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _of_as_many_values(found: Sequence[Mapping[str, Any]]) -> None:
    """Fails where our adapter has not as many values as the peers'."""
    assert {one["n_values"] for one in found} == {_VALUES}


def _of(found: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0) -> list[float]:
    return [factor * float(one[key]) for one in found]


# --- the parts ------------------------------------------------------------------------------------


def overhead(bench: Bench) -> list[Row]:
    """What a virtual agent costs beside its own step."""
    job = {"clients": 100, "cohort": 50, "rounds": 20, "warm_up": 2}
    if bench.quick:
        job |= {"rounds": 4, "warm_up": 4}
    # A bare mean, as the peers have it; a cohort of this size would get the robust filter.
    mean = {"federation.filter": "none"}
    sides = bench.sides("overhead", {**job, "values": mean}, {**job, "parameters": _VALUES})
    sides["robust"] = lambda: bench.ours("overhead", **job)
    found = bench.paired(sides)
    key = "overhead_per_client_median_s"
    _of_as_many_values(found["ours"])
    what = f"overhead of a virtual agent, {_VALUES:,} values, one step"
    rows = [
        Row.of(
            f"{what}: round less forward, backward, optimiser",
            _of(found["ours"], key, 1e3),
            None,
            peer_name="",
            unit="ms",
            target=1.5,
        ),
        Row.of(
            "the same with the robust filter, the default of such a cohort",
            _of(found["robust"], key, 1e3),
            None,
            peer_name="",
            unit="ms",
        ),
    ]
    rows += [
        Row.of(
            "the same, without a filter",
            _of(found["ours"], key, 1e3),
            _of(found[peer], key, 1e3),
            peer_name=name,
            unit="ms",
            target=1.0 if peer == "pfl" else None,
        )
        for peer, name in bench.peers.items()
    ]
    return rows


def first_round(bench: Bench) -> list[Row]:
    """From the command to the end of the first round."""
    job = {"clients": 100, "cohort": 5}
    sides = bench.sides("first-round", job, {**job, "parameters": _VALUES})
    whole = {"federation.batch_size": 32}
    sides["whole"] = lambda: bench.ours("first-round", **job, values=whole)
    found = bench.paired(sides)
    _of_as_many_values(found["ours"])
    what = "from the command to the end of round 1, 5 of 100 clients"
    less = f"{what}, less imports and model"
    ours = _of(found["ours"], "rest_s")
    rows = [
        Row.of(less, ours, None, peer_name="", unit="s", target=3.0),
        Row.of(
            f"{less}, batches of 32 instead of one example",
            _of(found["whole"], "rest_s"),
            None,
            peer_name="",
            unit="s",
        ),
    ]
    for peer, name in bench.peers.items():
        rest = _of(found[peer], "rest_s")
        target = 1 / 10 if peer == "flower" else None
        rows.append(Row.of(less, ours, rest, peer_name=name, unit="s", target=target))
        if peer == "flower":
            imports = _of(found[peer], "client_imports_s")
            without = [all_s - own_s for all_s, own_s in zip(rest, imports, strict=True)]
            said = f"{name}, less torch's import in its actor"
            rows.append(Row.of(less, ours, without, peer_name=said, unit="s"))
        whole_s = [_of(found[side], "first_round_s") for side in ("ours", peer)]
        rows.append(Row.of(f"{what}, all of it", *whole_s, peer_name=name, unit="s"))
    return rows


def memory(bench: Bench) -> list[Row]:
    """What one more concurrent agent takes."""
    from benchmarks.simulation_rounds import hundred_thousand_lora
    from quant.model_shape import LoraShape

    all_slots = [1, 4] if bench.quick else [1, 2, 4, 8, 16]
    workloads = dict([*WORKLOADS.items()][: 1 if bench.quick else None])
    shapes = _shapes()[: 1 if bench.quick else None]
    sides: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, workload in workloads.items():
        sides[name] = partial(_additional, bench, all_slots, workload)
        sides[f"{name}, tensors"] = partial(_additional, bench, all_slots, workload, EVERY_BYTE)
    sides["worker"] = partial(bench.ours, "worker")
    for peer in bench.peers:
        for shape in shapes:
            n_base = shape.n_parameters
            sides[f"{peer} {n_base}"] = partial(
                bench.theirs, peer, "memory", base_parameters=n_base, parameters=_VALUES
            )
    found = bench.paired(sides)
    figures = {name: _of(runs, "additional_bytes", 1 / _MB) for name, runs in found.items()}
    lora = LoraShape.of(hundred_thousand_lora())

    def bounds(shape: Any, name: str, side: str) -> list[float]:
        """Of each run, with as many agents as its own figure is from."""
        terms = [predicted(shape, lora, run["slots"], *workloads[name]) for run in found[side]]
        details = bench.details.setdefault("predicted_bytes", [])
        details.append({"workload": side, "base": shape.n_parameters, "terms": terms})
        return [sum(one.values()) / _MB for one in terms]

    measured, *_ = shapes
    what = "memory of one more concurrent agent"
    rows = [
        Row.of(
            f"{what}, {name}: {said}",
            figures[side],
            bounds(measured, name, side),
            peer_name="adapter, optimiser, gradients, activations: quant.memory",
            unit="MB",
            target=1.0,
        )
        for name in workloads
        for side, said in ((name, "resident"), (f"{name}, tensors", "of tensors alone"))
    ]
    # The peers' clients have one number each and no activations to speak of: the smaller workload.
    name = ONE_EXAMPLE
    rows += [
        Row.of(
            f"{what}, {name}, a base of {shape.n_parameters:,}"
            + ("" if shape is measured else ", ours by arithmetic"),
            figures[name] if shape is measured else bounds(shape, name, name),
            figures[f"{peer} {shape.n_parameters}"],
            peer_name=f"{peer_name}, measured",
            unit="MB",
        )
        for peer, peer_name in bench.peers.items()
        for shape in shapes
    ]
    rows += [
        Row.of(
            f"memory of one more worker, a process with a base of {measured.n_parameters:,}",
            figures["worker"],
            figures[f"{peer} {measured.n_parameters}"],
            peer_name=f"{peer_name}, measured",
            unit="MB",
        )
        for peer, peer_name in bench.peers.items()
    ]
    return rows


def _shapes() -> list[Any]:
    """The embedded base, which ours is measured on, and one so large that a copy is felt."""
    from quant.model_shape import FloatType, ModelShape, read_shape_file
    from quant.tiny import tiny_base_path

    larger = ModelShape(  # 50 million parameters
        model_type="llama",
        hidden=512,
        intermediate=1504,
        n_layers=10,
        n_heads=8,
        n_kv_heads=8,
        head_dim=64,
        vocab=32000,
        tied=True,
        stored=FloatType.FLOAT32,
    )
    return [read_shape_file(tiny_base_path() / "config.json", name="the embedded base"), larger]


def _additional(
    bench: Bench,
    all_slots: Sequence[int],
    workload: tuple[int, int],
    environment: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """What each agent but the first takes: the most of all numbers of agents, and that number."""
    batch, length = workload
    with patch.dict(os.environ, environment):
        one, *more = (
            bench.ours("memory", slots=slots, batch=batch, length=length)["peak_bytes"]
            for slots in all_slots
        )
    found = {
        slots: (peak - one) / (slots - 1) for slots, peak in zip(all_slots[1:], more, strict=True)
    }
    most = max(found, key=lambda slots: found[slots])
    return {"slots": most, "additional_bytes": found[most]}


def predicted(shape: Any, lora: Any, slots: int, batch: int, length: int) -> dict[str, float]:
    """What one more agent takes by `quant.memory.estimate`, term by term.

    The adapters, their optimisers and gradients stand once for each agent; the micro-batch has the
    examples of all. From one agent to `slots`, divided by the agents that came.

    Args:
        shape: Of the base.
        lora: Of an adapter.
        slots: At least 2.
        batch: Examples of each agent.
        length: Tokens of each.
    """
    from quant.memory import Device, MicroBatch, StepSettings, estimate

    def of(n_agents: int) -> dict[str, int]:
        found = estimate(
            shape,
            lora,
            device=Device.cpu(),
            batch=MicroBatch(n_sequences=n_agents * batch, length=length),
            settings=StepSettings(),
        )
        return {
            "adapters": n_agents * found.adapters,
            "optimizer": n_agents * found.optimizer,
            "gradients": n_agents * found.gradients,
            "activations": found.step,
        }

    one, many = of(1), of(slots)
    return {name: (many[name] - one[name]) / (slots - 1) for name in one}


def vectorised(bench: Bench) -> list[Row]:
    """Agents at once against agents one after the other."""
    options: dict[str, Any] = {
        "batch_sizes": [4] if bench.quick else [2, 4, 8, 16, 32],
        "repetitions": bench.repetitions,
    }
    alone = bench.ours("vectorised", options={**options, "groups": [1, 2, 4, 8]})["cells"]
    both = bench.ours("workers", options={**options, "groups": [1, 4], "workers": 2})["cells"]
    rows = []
    for cells, where in ((alone, "one process"), (both, "2 processes at once")):
        for cell in cells:
            speeds, batch = cell["examples_per_s"], cell["batch"]
            sequential = speeds["1"]
            best = max((s for s in speeds if s != "1"), key=lambda s: statistics.median(speeds[s]))
            what = f"8 agents, batch {batch}, {where}"
            rows.append(
                Row.of(
                    f"{what}: groups of {best}, the best of {', '.join([*speeds][1:])}",
                    speeds[best],
                    sequential,
                    peer_name="one after the other",
                    unit="examples/s",
                    better="higher",
                    target=1.3 if batch in {4, 8} else None,
                )
            )
            if "chosen" not in cell:
                continue
            # The repetition's own choice, at the speed that the size has over all repetitions.
            chosen = [statistics.median(speeds[str(size)]) for size in cell["chosen"]]
            said = ", ".join(str(size) for size in cell["chosen"])
            rows.append(
                Row.of(
                    f"{what}: groups as the probe chooses, {said}",
                    chosen,
                    [statistics.median(sequential)] * len(chosen),
                    peer_name="one after the other",
                    unit="examples/s",
                    better="higher",
                    target=0.97,
                )
            )
    return rows


def pools(bench: Bench) -> list[Row]:
    """Two workers against one."""
    job = {"agents": 8, "batch": 8, "n_steps": 8, "rounds": 3}
    if bench.quick:
        job |= {"n_steps": 2, "rounds": 1}
    rows = []
    kinds = {"processes": "Processes", "ray": "Ray"}
    if importlib.util.find_spec("ray") is None:
        del kinds["ray"]
        say("Ray is not installed, so it is left out: pip install '.[sim-ray]'")
    for kind, name in kinds.items():
        found = bench.paired(
            {
                f"{workers}": partial(bench.ours, "pool", kind=kind, workers=workers, **job)
                for workers in (1, 2)
            }
        )
        n_examples = job["agents"] * job["batch"] * job["n_steps"]
        two, one = ([n_examples / run["median_s"] for run in found[workers]] for workers in "21")
        rows.append(
            Row.of(
                f"rounds of 8 equal agents: {name}, 2 workers",
                two,
                one,
                peer_name=f"{name}, 1 worker",
                unit="examples/s",
                better="higher",
                target=1.6,
            )
        )
    return rows


def paper(bench: Bench) -> list[Row]:
    """The paper's schedule."""
    values: dict[str, Any] = {}
    if bench.quick:
        values = {
            "federation.n_rounds": 2,
            "data.max_records": 800,
            "data.held_out": 1,
            "evaluation.answers": 0,
        }
    found = bench.ours("paper", workers=2, values=values)
    rounds = found["n_rounds"]
    return [
        Row.of(
            f"100 clients, {rounds} rounds of 5, one epoch in batches of 32, 2 processes",
            [found["wall_s"] / 60.0],
            None,
            peer_name="",
            unit="min",
            target=10.0,
        )
    ]


PARTS: Final[Mapping[str, Callable[[Bench], list[Row]]]] = {
    "overhead": overhead,
    "first-round": first_round,
    "memory": memory,
    "vectorised": vectorised,
    "pools": pools,
    "paper": paper,
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--repetitions", type=int, default=None, help="3; 1 with --quick")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table for a page")
    args = parser.parse_args()
    repetitions = args.repetitions or (1 if args.quick else 3)
    bench = Bench(repetitions=repetitions, quick=args.quick)
    rows = [row for part in args.only for row in PARTS[part](bench)]
    write_report(rows, module=MODULE, json_target=args.json, details=bench.details)
    if args.markdown is not None:
        args.markdown.write_text(as_markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

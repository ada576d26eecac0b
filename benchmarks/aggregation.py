"""The default filter against the bare mean of the same updates, in time and memory.

    python -m benchmarks.aggregation [--quick] --json FILE

A hundred updates of 17.9 million float32 values: the adapters of a 7B model at rank 8. Values are
random. On disk lie twenty files, each read as five of the hundred, which saves disk and changes no
amount of work: every update is read whenever it is asked for. Both sides read the same files, from
the system's cache once the first run has warmed it, and neither checks hashes. Peers are the
server's own mean (FedAvg, what a round without a filter costs) and the filter's last step alone.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.report import Row, add_options, in_own_process, write_report

MODULE: Final = "benchmarks.aggregation"
N_FILES: Final = 20
N_TENSORS: Final = 384
SEED: Final = bytes(range(32))
MAX_TIME_RATIO: Final = 3.0
MAX_MEMORY_RATIO: Final = 1.1
_MB: Final = 1e6


def make_files(folder: Path, *, n_values: int) -> None:
    """Write the updates: a common part and noise, raw little-endian float32."""
    common = np.random.default_rng(N_FILES).standard_normal(n_values, np.float32)
    for number in range(N_FILES):
        noise = np.random.default_rng(number).standard_normal(n_values, np.float32)
        update = np.float32(1e-3) * (common + np.float32(3.0) * noise)
        update.astype("<f4").tofile(_path(folder, number))


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index % N_FILES:02}.f32"


class FileUnits:
    """Updates in files, each read when it is asked for; a file may serve for several."""

    def __init__(self, folder: Path, *, n: int, n_values: int) -> None:
        """Nothing is read yet."""
        self._folder = folder
        self.n_values = n_values
        self.weights = np.arange(1, n + 1, dtype=np.int64)
        self.n_members = np.ones(n, np.int64)

    def load(self, index: int) -> Any:
        """One whole update."""
        return np.fromfile(_path(self._folder, index), "<f4")

    def rows(self, start: int, stop: int) -> Any:
        """A part of all updates."""
        rows = np.empty((len(self.weights), stop - start), np.float32)
        for index, row in enumerate(rows):
            path = _path(self._folder, index)
            row[:] = np.fromfile(path, "<f4", count=stop - start, offset=4 * start)
        return rows


def side(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement: the seconds and the peak memory of one way to a mean."""
    from aggregator_server.aggregation.fedavg import average
    from aggregator_server.aggregation.robust.outcome import robust_mean
    from aggregator_server.aggregation.robust.pipeline import Mode, run_pipeline
    from benchmarks.resident import ResidentPeak
    from privacy.updates import CellSum, PlainUpdate
    from protocol.layout import VectorLayout

    n, n_values = job["n"], job["d"]
    units = FileUnits(Path(job["folder"]), n=n, n_values=n_values)
    width = n_values // N_TENSORS
    shapes = {f"{number:03}": (width,) for number in range(N_TENSORS - 1)}
    shapes[f"{N_TENSORS - 1:03}"] = (n_values - width * (N_TENSORS - 1),)
    layout = VectorLayout.of_shapes(shapes)
    _read_all(units)
    outcome = None
    watch = ResidentPeak()
    began = time.perf_counter()
    if job["do"] == "fedavg":
        cells = (
            CellSum.of_plain(PlainUpdate(vector=units.load(index), weight=index + 1))
            for index in range(n)
        )
        mean = average(cells, n_values=n_values).mean
    elif job["do"] == "mean":
        mean = robust_mean(units, np.ones(n, np.bool_), np.ones(n))
    else:
        found = run_pipeline(units, mode=Mode.OPEN, layout=layout, seed=SEED)
        mean, outcome = found.mean, found.outcome
    time_s = time.perf_counter() - began
    return {
        "time_s": time_s,
        "peak_mb": watch.above_bytes() / _MB,
        "norm": float(np.linalg.norm(mean)),
        "rule": None if outcome is None else outcome.rule.value,
        "n_removed": None if outcome is None else outcome.n_removed,
    }


def _read_all(units: FileUnits) -> None:
    """Warm the system's cache: the disk is not what is compared."""
    for index in range(min(N_FILES, len(units.weights))):
        units.load(index)


def steps(n_values: int) -> dict[str, float]:
    """Seconds of the pipeline's steps on one update in memory, the best of three."""
    from aggregator_server.aggregation.robust.sanity import tensor_norms
    from aggregator_server.aggregation.robust.sketch import Sketcher
    from protocol.layout import VectorLayout

    update = np.random.default_rng(0).standard_normal(n_values, np.float32)
    layout = VectorLayout.of_shapes({"all": (n_values,)})
    sketcher = Sketcher(SEED, n_values=n_values)
    found = {"norms": [], "sketch": []}  # type: dict[str, list[float]]
    for _ in range(3):
        began = time.perf_counter()
        tensor_norms(update, layout)
        between = time.perf_counter()
        sketcher.sketch(update)
        found["norms"].append(between - began)
        found["sketch"].append(time.perf_counter() - between)
    return {name: min(times) for name, times in found.items()}


def measure(
    folder: Path, *, n_values: int, n_units: int, n_runs: int
) -> tuple[list[Row], dict[str, Any]]:
    """All comparisons; sides alternate."""
    jobs = {
        "fedavg": ("fedavg", n_units),
        "mean": ("mean", n_units),
        "filter": ("pipeline", n_units),
        "filter of few": ("pipeline", N_FILES),
        "mean of seven": ("mean", 7),
        "median of seven": ("pipeline", 7),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for _ in range(n_runs):
        for name, (do, n) in jobs.items():
            job = {"do": do, "n": n, "d": n_values, "folder": str(folder)}
            found[name].append(in_own_process(MODULE, job))

    def figures(name: str, what: str) -> list[float]:
        return [run[what] for run in found[name]]

    size = f"{n_units} updates of {n_values / 1e6:.3g} million values"
    rows = [
        Row.of(
            f"default filter (cap, sketch, evidence) and mean: {size}",
            figures("filter", "time_s"),
            figures(peer, "time_s"),
            peer_name=peer_name,
            unit="s",
            target=MAX_TIME_RATIO,
        )
        for peer, peer_name in (("fedavg", "FedAvg alone"), ("mean", "its own last step alone"))
    ]
    rows.append(
        Row.of(
            f"default filter, peak memory: {n_units} units ÷ {N_FILES} units",
            figures("filter", "peak_mb"),
            figures("filter of few", "peak_mb"),
            peer_name=f"{N_FILES} units",
            unit="MB",
            target=MAX_MEMORY_RATIO,
        )
    )
    rows.append(
        Row.of(
            f"default filter, peak memory: {size}",
            figures("filter", "peak_mb"),
            figures("fedavg", "peak_mb"),
            peer_name="FedAvg alone",
            unit="MB",
        )
    )
    rows.append(
        Row.of(
            "default filter of 7 agents (cap, geometric median)",
            figures("median of seven", "time_s"),
            figures("mean of seven", "time_s"),
            peer_name="mean of 7",
            unit="s",
        )
    )
    for name, seconds in steps(n_values).items():
        rows.append(
            Row.of(
                f"{name} of one update of {n_values / 1e6:.3g} million values",
                [seconds],
                None,
                peer_name="",
                unit="s",
                target=0.15 if name == "sketch" else None,
            )
        )
    return rows, {"runs": found, "n_files": N_FILES}


def main() -> None:
    """Measure and report; or one side of it, with `--job`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--folder", type=Path, help="where the updates go (1.5 GB, then deleted)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(side(json.loads(options.job))))
        return
    n_values = 400_000 if options.quick else 17_900_000
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_files(folder, n_values=n_values)
        rows, details = measure(
            folder, n_values=n_values, n_units=100, n_runs=1 if options.quick else 3
        )
    write_report(rows, module=MODULE, json_target=options.json, details=details)


if __name__ == "__main__":
    main()

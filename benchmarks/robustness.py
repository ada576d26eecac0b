"""What the filter is worth: attacks × rules × open mode and cells × shares of attackers.

    python -m benchmarks.robustness --json r.json --markdown r.md --figure r.png

Honest updates of agents with unlike data, trained by the embedded base, are recorded once for each
seed; every case of the grid replays them through one aggregation. The default filter, the mean and
the best other rules then run in federations of several rounds. Results are kept as soon as they are
there: a run that was interrupted goes on.
"""

import argparse
import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console

from aggregator_server.aggregation.robust import pipeline
from benchmarks import (
    robustness_jobs,
    robustness_recording,
    robustness_report,
    robustness_runs,
    tiny_federation,
)
from benchmarks.dolly_base import default_cache
from benchmarks.report import add_options, write_report
from benchmarks.robustness_jobs import QUICK, Settings, recorded
from benchmarks.robustness_recording import Division, Federation, Population
from benchmarks.robustness_runs import Rounds, Scorer, replay
from quant.base_model import set_threads
from quant.quiet import quiet_libraries

Result = dict[str, Any]
_MODULES: Final = (robustness_jobs, robustness_recording, robustness_runs, tiny_federation)


def run_name(settings: Settings) -> str:
    """A name that changes with whatever changes a result; the filter's own code is part of it."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True, default=str).encode())
    rules = sorted(Path(pipeline.__file__).parent.glob("*.py"))
    for file in (*(Path(str(module.__file__)) for module in _MODULES), *rules):
        digest.update(file.read_bytes())
    return f"robustness-run-{digest.hexdigest()[:16]}"


class Keeper:
    """Results by name, each written once.

    Args:
        folder: Where.
        n_jobs: How many there will be, for the progress.
    """

    def __init__(self, folder: Path, n_jobs: int) -> None:
        """Make the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._n_jobs, self._n_done = folder, n_jobs, 0
        self._began = time.perf_counter()

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """A kept result, or one made now."""
        path = self._folder / f"{name}.json"
        self._n_done += 1
        if not path.exists():
            found = make()
            half = path.with_suffix(".part")
            half.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
            half.replace(path)
            spent = time.perf_counter() - self._began
            print(
                f"{self._n_done} of {self._n_jobs}, {name}; {spent:.0f} s so far",
                file=sys.stderr,
                flush=True,
            )
        return json.loads(path.read_text(encoding="utf-8"))


def run_grid(settings: Settings, kept: Path, recordings: Path) -> Iterator[Result]:
    """All cases of the grid."""
    n_jobs = len(settings.seeds) * len(settings.arrangements) * len(settings.threats)
    keeper = Keeper(kept, n_jobs)
    for seed in settings.seeds:
        for division in Division:
            arrangements = [a for a in settings.arrangements if a.division is division]
            if not arrangements:
                continue
            federation = Federation(settings.population(division, seed))
            recording = recorded(settings, division, seed, recordings)
            scorer = Scorer(federation, settings)
            for arrangement in arrangements:
                for threat in settings.threats:
                    name = f"grid-{arrangement.key}-{threat.name.lower()}-{seed}"
                    yield from keeper.get(
                        name,
                        functools.partial(
                            replay, federation, recording, arrangement, threat, scorer
                        ),
                    )


def run_rounds(settings: Settings, kept: Path) -> Iterator[Result]:
    """All federations in rounds."""
    keeper = Keeper(kept, len(settings.in_rounds) * len(settings.seeds))
    for seed in settings.seeds:
        rounds: dict[str, Rounds] = {}
        for case in settings.in_rounds:
            arrangement = case.arrangement
            if arrangement.key not in rounds:
                population = Population(
                    division=arrangement.division,
                    n_agents=arrangement.n_agents,
                    seed=seed,
                    recipe=settings.rounds,
                )
                rounds[arrangement.key] = Rounds(Federation(population), settings)
            yield keeper.get(
                f"rounds-{arrangement.key}-{case.threat.name.lower()}-{case.rule.value}-{seed}",
                functools.partial(rounds[arrangement.key].run, case),
            )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the heat map")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables for a page")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--fresh", action="store_true", help="measure again what was kept")
    args = parser.parse_args()
    quiet_libraries()
    set_threads(1)
    settings = QUICK if args.quick else Settings()
    kept = args.cache / run_name(settings)
    if args.fresh:
        shutil.rmtree(kept, ignore_errors=True)
    grid = list(run_grid(settings, kept, args.cache))
    rounds = list(run_rounds(settings, kept))
    report = robustness_report.Report(settings, grid, rounds)
    text = report.markdown()
    Console(stderr=args.json == "-", width=200).print(text, highlight=False, markup=False)
    if args.markdown is not None:
        args.markdown.write_text(text, encoding="utf-8")
    if args.figure is not None:
        report.draw(args.figure)
    write_report(
        report.rows(),
        module="benchmarks.robustness",
        json_target=args.json,
        details={"settings": asdict(settings), "grid": grid, "rounds": rounds},
    )


if __name__ == "__main__":
    main()

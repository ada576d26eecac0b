"""What example-level differential privacy (P1) costs a federation: loss and exact match over ε.

    python -m benchmarks.dp_utility --json dp.json --markdown dp.md --figure dp.png

The demo's division of categories on the embedded base; every agent trains with DP-SGD and an ε that
holds for each of its records over all rounds together. Beside it the same recipe without noise, the
base, and one agent alone at the same ε. A second part varies how many records an agent has. Nothing
is extrapolated: the agents that are simulated are those that the table names, and the noise is the
one that was calibrated for them.

Each model's result is kept as soon as it is there: a run that was interrupted goes on.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from rich.console import Console

from benchmarks import dp_utility_jobs, tiny_federation
from benchmarks.dolly_base import default_cache
from benchmarks.dp_utility_jobs import QUICK, Job, Model, Settings, run_job
from benchmarks.report import Better, Row, add_options, write_report
from quant.base_model import set_threads
from quant.quiet import quiet_libraries

_N_WORKERS: Final = 2
_MEASURES: Final[tuple[tuple[str, str, str, Better], ...]] = (
    ("loss", "held-out loss", "nats a token", "lower"),
    ("exact_match", "exact match", "share of answers", "higher"),
)
_COLOURS: Final = {Model.BASE: "#999999", Model.ALONE: "#e67e22", Model.FEDERATED: "#0072b2"}
Result = Mapping[str, Any]


class Results:
    """All that was measured, by job."""

    def __init__(self, settings: Settings, found: Mapping[Job, Result]) -> None:
        """Take what was found."""
        self.settings = settings
        self._found = found

    def one(self, job: Job) -> Result:
        """What a job found."""
        return self._found[job]

    def values(self, job: Job, measure: str) -> list[float]:
        """The average over categories under every seed; the job's own seed does not matter."""
        return [
            float(np.mean(list(self._found[job.under(seed)][measure].values())))
            for seed in self.settings.seeds
        ]

    def cell(self, job: Job, measure: str) -> str:
        """Mean and sample standard deviation over the seeds, in words."""
        values = self.values(job, measure)
        mean = f"{np.mean(values):.3f}"
        return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"


def run(settings: Settings, kept: Path) -> Results:
    """Run what has not been run, in processes of one thread each.

    Args:
        settings: What to measure.
        kept: Where results are kept; what is there already is not run again.
    """
    kept.mkdir(parents=True, exist_ok=True)
    jobs = settings.jobs()
    missing = [job for job in jobs if not _path(kept, job).exists()]
    if len(missing) < len(jobs):
        _show(f"{len(jobs) - len(missing)} of {len(jobs)} kept from an earlier run")
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(_N_WORKERS, mp_context=context, initializer=_prepare) as pool:
        running = {pool.submit(run_job, job, settings): job for job in missing}
        for done, future in enumerate(as_completed(running), start=1):
            job, found = running[future], future.result()
            half = _path(kept, job).with_suffix(".part")
            half.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
            half.replace(_path(kept, job))
            scores = ", ".join(
                f"{title} {np.mean(list(found[key].values())):.3f}"
                for key, title, _unit, _better in _MEASURES
            )
            _show(
                f"{done} of {len(missing)}, {job.name}: {scores}; {found['cpu_s']:.0f} s of a "
                f"core, {time.perf_counter() - began:.0f} s so far"
            )
    return Results(
        settings,
        {job: json.loads(_path(kept, job).read_text(encoding="utf-8")) for job in jobs},
    )


def _path(kept: Path, job: Job) -> Path:
    return kept / f"{job.name}.json"


def _prepare() -> None:
    quiet_libraries()
    set_threads(1)


def _show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_name(settings: Settings) -> str:
    """A name that changes with whatever changes the results: settings and jobs."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for file in (dp_utility_jobs.__file__, tiny_federation.__file__):
        digest.update(Path(file).read_bytes())
    return f"dp-utility-run-{digest.hexdigest()[:16]}"


def report_rows(results: Results) -> list[Row]:
    """The federation under noise ÷ without noise, and ÷ one agent alone; paired by seed."""
    settings = results.settings
    made = []
    for epsilon in settings.epsilons:
        if epsilon is None:
            continue
        ours = Job(model=Model.FEDERATED, epsilon=epsilon)
        peers = {
            "the same recipe, ε = ∞": Job(model=Model.FEDERATED, epsilon=None),
            f"ε = ∞, learning rate {settings.plain_rate:g}": Job(
                model=Model.FEDERATED, epsilon=None, learning_rate=settings.plain_rate
            ),
            f"one agent alone, ε = {epsilon:g}": Job(model=Model.ALONE, epsilon=epsilon),
            "base": Job(model=Model.BASE, epsilon=None),
        }
        for key, title, unit, better in _MEASURES:
            for name, peer in peers.items():
                values = results.values(peer, key)
                if min(values) > 0.0:  # where nothing was right, there is no ratio
                    made.append(
                        Row.of(
                            f"{title}, federated at ε = {epsilon:g}",
                            results.values(ours, key),
                            values,
                            peer_name=name,
                            unit=unit,
                            better=better,
                        )
                    )
    return made


_COLUMNS: Final = (
    *("model", "ε", "held-out loss", "exact match", "agents simulated", "records of each"),
    *("learning rate", "δ", "noise multiplier z", "q", "steps"),
)


def table_rows(results: Results, jobs: Sequence[Job]) -> list[tuple[str, ...]]:
    """A row of words for each job, all that its ε means included; see `_COLUMNS`."""
    made: list[tuple[str, ...]] = []
    for job in jobs:
        found = results.one(job.under(results.settings.seeds[0]))
        privacy = found["privacy"]
        terms = (
            ("", "", "", str(found["n_steps"]) if found["n_agents"] else "")
            if privacy is None
            else (
                f"{privacy['delta']:.2g}",
                f"{privacy['noise_multiplier']:.3f}",
                f"{privacy['sampling_probability']:.4f}",
                str(privacy["n_steps"]),
            )
        )
        of_base = job.model is Model.BASE
        made.append(
            (
                job.model.value,
                "" if of_base else _epsilon(job.epsilon),
                results.cell(job, "loss"),
                results.cell(job, "exact_match"),
                str(found["n_agents"]) if not of_base else "",
                f"{found['n_records']:,}" if not of_base else "",
                f"{found['learning_rate']:g}" if not of_base else "",
                *terms,
            )
        )
    return made


def _epsilon(epsilon: float | None) -> str:
    return "∞" if epsilon is None else f"{epsilon:g}"


def markdown(results: Results) -> str:
    """All tables for a page."""
    settings = results.settings
    tables = [_table(results, jobs) for jobs in (settings.curve(), settings.record_sweep())]
    return "\n".join([*tables, _by_category(results)])


def _table(results: Results, jobs: Sequence[Job]) -> str:
    lines = [f"| {' | '.join(_COLUMNS)} |", f"| --- |{' ---: |' * (len(_COLUMNS) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(results, jobs)]
    return "\n".join(lines) + "\n"


def _by_category(results: Results) -> str:
    """Exact match by category of the federation at each ε; means over the seeds."""
    settings = results.settings
    jobs = [Job(model=Model.FEDERATED, epsilon=epsilon) for epsilon in settings.epsilons]
    lines = [
        f"| exact match | {' | '.join(f'ε = {_epsilon(job.epsilon)}' for job in jobs)} |",
        f"| --- |{' ---: |' * len(jobs)}",
    ]
    for category in sorted(results.one(jobs[0].under(settings.seeds[0]))["exact_match"]):
        means = (
            np.mean([results.one(job.under(s))["exact_match"][category] for s in settings.seeds])
            for job in jobs
        )
        lines.append(f"| `{category}` | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join(lines) + "\n"


def draw(results: Results, path: Path) -> None:
    """Draw both measures over ε, and over the records of an agent, with their spread.

    Args:
        results: What to draw.
        path: A PNG; its folder is made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = results.settings
    recipe = settings.recipe
    epsilons = sorted(settings.epsilons, key=lambda e: np.inf if e is None else e)
    sweep = settings.record_sweep()
    base = Job(model=Model.BASE, epsilon=None)
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2, sharey="row", width_ratios=[1.5, 1.0])
    for (left, right), (key, title, unit, better) in zip(grid, _MEASURES, strict=True):
        for model in (Model.FEDERATED, Model.ALONE):
            jobs = [Job(model=model, epsilon=epsilon) for epsilon in epsilons]
            _curve(left, results, jobs, key)
        _curve(right, results, sweep, key)
        own = Job(model=Model.FEDERATED, epsilon=None, learning_rate=settings.plain_rate)
        left.errorbar(
            len(epsilons) - 1,
            np.mean(results.values(own, key)),
            yerr=np.std(results.values(own, key), ddof=1) if len(settings.seeds) > 1 else None,
            fmt="D",
            markersize=5,
            capsize=4,
            color="#009e73",
            label=f"federated, learning rate {settings.plain_rate:g}",
        )
        for axes in (left, right):
            axes.axhline(
                np.mean(results.values(base, key)),
                color=_COLOURS[Model.BASE],
                linestyle="--",
                label=Model.BASE.value,
            )
        left.set_xticks(range(len(epsilons)), [_epsilon(epsilon) for epsilon in epsilons])
        counts = (results.one(job.under(settings.seeds[0]))["n_records"] for job in sweep)
        right.set_xticks(range(len(sweep)), [f"{n:,}" for n in counts])
        left.set_ylabel(f"{title}, {unit}\n({better} is better)")
    grid[1][0].set_xlabel(
        f"ε for each record, all rounds together\n({recipe.n_agents} agents, "
        f"{recipe.n_records:,} records each)"
    )
    grid[1][1].set_xlabel(
        f"records of each agent\n(ε = {settings.sweep_epsilon:g}, {recipe.n_agents} agents)"
    )
    grid[0][0].legend(fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _curve(axes: Any, results: Results, jobs: Sequence[Job], key: str) -> None:
    """Means with standard deviations, and each seed as a dot."""
    draws = np.array([results.values(job, key) for job in jobs])  # [jobs, seeds]
    at, model = np.arange(len(jobs)), jobs[0].model
    axes.errorbar(
        at,
        draws.mean(axis=1),
        yerr=draws.std(axis=1, ddof=1) if draws.shape[1] > 1 else None,
        marker="o",
        markersize=5,
        capsize=4,
        color=_COLOURS[model],
        label=model.value,
    )
    for seed in draws.T:
        axes.plot(at, seed, ".", color=_COLOURS[model], alpha=0.4, markersize=4)
    axes.set_xlim(-0.4, len(jobs) - 0.6)
    axes.grid(axis="y", color="#eeeeee")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the result")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables for a page")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--fresh", action="store_true", help="measure again what was kept")
    args = parser.parse_args()
    quiet_libraries()
    settings = QUICK if args.quick else Settings()
    kept = args.cache / run_name(settings)
    if args.fresh:
        shutil.rmtree(kept, ignore_errors=True)
    results = run(settings, kept)
    text = markdown(results)
    Console(stderr=args.json == "-", width=160).print(text, highlight=False, markup=False)
    if args.markdown is not None:
        args.markdown.write_text(text, encoding="utf-8")
    if args.figure is not None:
        draw(results, args.figure)
    models = [results.one(job) for job in settings.jobs()]
    write_report(
        report_rows(results),
        module="benchmarks.dp_utility",
        json_target=args.json,
        details={
            "settings": asdict(settings),
            "models": models,
            "cpu_s": round(sum(float(one["cpu_s"]) for one in models), 1),
        },
    )


if __name__ == "__main__":
    main()

"""Rules for LoRA: score against bytes sent, on the demo's federation.

    python -m benchmarks.lora_rules --json rules.json --markdown rules.md --figure rules.png

Embedded base, five agents, two of eight categories each: every rule of
`docs/adr/0016-lora-rules.md`, and FedIT under each server optimiser; all at one learning rate,
and rules of one adapter at three times that rate. Half of the rules are none that a manifest can
name; `sheepfold-sim sweep` compares those that are, on any base and records.

Each model's result is kept as soon as it is there: a run that was interrupted goes on.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from rich.console import Console

from benchmarks import dp_utility_jobs, lora_federation, lora_rules_jobs, tiny_federation
from benchmarks.dolly_base import default_cache
from benchmarks.lora_rules_jobs import QUICK, RULES, Job, Settings, Variant, run_job
from benchmarks.report import Better, Row, add_options, write_report
from benchmarks.running import Result, Runner
from quant.quiet import quiet_libraries

_MEASURES: Final[tuple[tuple[str, str, str, Better], ...]] = (
    ("exact_match", "exact match", "share of answers", "higher"),
    ("loss", "held-out loss", "nats a token", "lower"),
)
_COLOURS: Final = ("#0072b2", "#e67e22", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c564b")
_MARKERS: Final = "osD^vPX"


class Results:
    """All that was measured, by job."""

    def __init__(self, settings: Settings, found: Mapping[Job, Result]) -> None:
        """Take what was found."""
        self.settings = settings
        self._found = found

    def under_each_seed(self, variant: Variant) -> list[Result]:
        """What a variant found."""
        jobs = (Job(variant=variant, seed=seed) for seed in self.settings.seeds)
        return [self._found[job] for job in jobs if job in self._found]

    def values(self, variant: Variant, measure: str) -> list[float]:
        """The average over categories under every seed."""
        return [
            float(np.mean(list(one[measure].values()))) for one in self.under_each_seed(variant)
        ]

    def cell(self, variant: Variant, measure: str) -> str:
        """Mean and sample standard deviation over the seeds, in words."""
        values = self.values(variant, measure)
        mean = f"{np.mean(values):.3f}"
        return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"

    def megabytes(self, variant: Variant, key: str) -> float:
        """Of an agent that takes part in all rounds."""
        return float(self.under_each_seed(variant)[0][key]) / 1e6

    def all(self) -> list[dict[str, Any]]:
        """Everything, as JSON."""
        return [dict(one) for one in self._found.values()]


def report_rows(results: Results) -> list[Row]:
    """Every rule ÷ FedIT, paired by seed."""
    made = []
    for variant in results.settings.variants:
        if variant == RULES[0]:
            continue
        for key, title, unit, better in _MEASURES:
            ours = results.values(variant, key)
            peer = results.values(RULES[0], key)[: len(ours)]
            if min(peer) > 0.0:  # where nothing was right, there is no ratio
                made.append(
                    Row.of(
                        f"{title}, {variant.name}",
                        ours,
                        peer,
                        peer_name=RULES[0].name,
                        unit=unit,
                        better=better,
                    )
                )
    return made


def table(results: Results) -> str:
    """Markdown: what each variant scores and sends."""
    heads = ["rule", *(title for _, title, _, _ in _MEASURES), "MB sent", "MB fetched"]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for variant in results.settings.variants:
        cells = [results.cell(variant, key) for key, *_ in _MEASURES]
        sizes = [f"{results.megabytes(variant, key):.3g}" for key in ("bytes_up", "bytes_down")]
        lines.append(f"| {' | '.join([variant.name, *cells, *sizes])} |")
    return "\n".join(lines) + "\n"


def rate_table(results: Results) -> str:
    """Markdown: exact match of the rules of one adapter at each learning rate."""
    settings = results.settings
    own = settings.recipe.learning_rate
    lines = [
        f"| exact match, learning rate | {' | '.join(f'{r:g}' for r in (own, *settings.rates))} |",
        f"| --- |{' ---: |' * (1 + len(settings.rates))}",
    ]
    rated = dict.fromkeys(job.variant for job in settings.rate_jobs())
    for plain in dict.fromkeys(replace(variant, rate=None) for variant in rated):
        at_each = (plain, *(replace(plain, rate=rate) for rate in settings.rates))
        cells = [results.cell(variant, "exact_match") for variant in at_each]
        lines.append(f"| {' | '.join([plain.name, *cells])} |")
    return "\n".join(lines) + "\n"


def markdown(results: Results) -> str:
    """All tables for a page."""
    parts = [table(results), rate_table(results)]
    own = [
        one["own_exact_match"]
        for one in results.all()
        if one.get("own_exact_match") is not None and "rate" not in one["variant"]
    ]
    if own:
        spread = f" ± {np.std(own, ddof=1):.3f}" if len(own) > 1 else ""
        parts.append(
            "FedSA-LoRA's rows average the agents' own models over all categories; on its two own "
            f"categories an agent's model scores {np.mean(own):.3f}{spread}.\n"
        )
    return "\n".join(parts)


def draw(results: Results, path: Path) -> None:
    """Draw scores over megabytes moved by one agent, with their spread.

    Args:
        results: What to draw.
        path: A PNG; its folder is made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measure, title, unit, better = _MEASURES[0]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, variant in enumerate(results.settings.variants):
        values = results.values(variant, measure)
        axes.errorbar(
            sum(results.megabytes(variant, key) for key in ("bytes_up", "bytes_down")),
            np.mean(values),
            yerr=np.std(values, ddof=1) if len(values) > 1 else None,
            fmt=_MARKERS[number // len(_COLOURS)],
            color=_COLOURS[number % len(_COLOURS)],
            capsize=3,
            label=variant.name,
        )
    axes.set_xscale("log")
    axes.set_xlabel("MB sent and fetched by an agent in all rounds")
    axes.set_ylabel(f"{title}, {unit}\n({better} is better)")
    axes.grid(color="#eeeeee")
    axes.legend(fontsize=7, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def run_name(settings: Settings) -> str:
    """A name that changes with whatever changes the results: settings and these jobs."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for module in (dp_utility_jobs, lora_federation, lora_rules_jobs, tiny_federation):
        digest.update(Path(module.__file__).read_bytes())
    return f"lora-rules-run-{digest.hexdigest()[:16]}"


def run(settings: Settings, work: Callable[[Job], Result], kept: Path, n: int) -> Results:
    """Run what has not been run, in n processes; a seed at a time, the other rates last."""
    jobs = {"rules": settings.main_jobs(), "other rates": settings.rate_jobs()}
    found: dict[Job, Result] = {}
    with Runner(work, kept, headline=_headline, n_workers=n) as runner:
        for what, some in jobs.items():
            found |= dict(zip(some, runner.run(some, what), strict=True))
    return Results(settings, found)


def _headline(found: Result) -> str:
    return ", ".join(
        f"{title} {np.mean(list(found[key].values())):.3f}" for key, title, *_ in _MEASURES
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the result")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables for a page")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--fresh", action="store_true", help="measure again what was kept")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    quiet_libraries()
    settings = QUICK if args.quick else Settings()
    kept = args.cache / run_name(settings)
    if args.fresh:
        shutil.rmtree(kept, ignore_errors=True)
    results = run(settings, partial(run_job, settings=settings), kept, args.workers)
    text = markdown(results)
    Console(stderr=args.json == "-", width=160).print(text, highlight=False, markup=False)
    if args.markdown is not None:
        args.markdown.write_text(text, encoding="utf-8")
    if args.figure is not None:
        draw(results, args.figure)
    models = results.all()
    write_report(
        report_rows(results),
        module="benchmarks.lora_rules",
        json_target=args.json,
        details={
            "settings": asdict(settings),
            "models": models,
            "cpu_s": round(sum(float(one["cpu_s"]) for one in models), 1),
        },
    )


if __name__ == "__main__":
    main()

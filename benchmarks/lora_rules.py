"""Rules for LoRA: score against bytes sent, on the demo's federation and on Dolly-15k.

    python -m benchmarks.lora_rules --json rules.json --markdown rules.md --figure rules.png

On the demo's federation (embedded base, five agents, two of eight categories each) each rule of
`docs/adr/0016-lora-rules.md`, and FedIT under each server optimiser; all at one learning rate,
and rules of one adapter at three times that rate. On Dolly (ten clients by the paper's second
partition, a base of seven million parameters) the rules that a manifest can name.

Each model's result is kept as soon as it is there: a run that was interrupted goes on.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from rich.console import Console

from benchmarks import (
    dolly_base,
    dolly_jobs,
    dp_utility_jobs,
    lora_federation,
    lora_rules_jobs,
    tiny_federation,
)
from benchmarks.lora_rules_jobs import QUICK, RULES, Job, Settings, Variant, Where, run_job
from benchmarks.report import Better, Row, add_options, write_report
from benchmarks.running import Result, Runner, show
from quant.quiet import quiet_libraries

_MEASURES: Final[Mapping[Where, tuple[tuple[str, str, str, Better], ...]]] = {
    Where.DEMO: (
        ("exact_match", "exact match", "share of answers", "higher"),
        ("loss", "held-out loss", "nats a token", "lower"),
    ),
    Where.DOLLY: (
        ("loss", "held-out loss", "nats a token", "lower"),
        ("rouge_l", "ROUGE-L", "0 to 1", "higher"),
    ),
}
_COLOURS: Final = ("#0072b2", "#e67e22", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c564b")
_MARKERS: Final = "osD^vPX"


BASE: Final = replace(dolly_base.BaseRecipe(), n_steps=300)
"""A fifth of the reading of `benchmarks.dolly`'s base: rules are compared, not models."""


class Results:
    """All that was measured, by job."""

    def __init__(self, settings: Settings, found: Mapping[Job, Result]) -> None:
        """Take what was found."""
        self.settings = settings
        self.wheres = tuple(where for where in Where if any(job.where is where for job in found))
        self._found = found

    def under_each_seed(self, where: Where, variant: Variant) -> list[Result]:
        """What a variant found."""
        jobs = (Job(where=where, variant=variant, seed=seed) for seed in self.settings.seeds)
        return [self._found[job] for job in jobs if job in self._found]

    def values(self, where: Where, variant: Variant, measure: str) -> list[float]:
        """The average over categories under every seed."""
        return [
            float(np.mean(list(one[measure].values())))
            for one in self.under_each_seed(where, variant)
        ]

    def cell(self, where: Where, variant: Variant, measure: str) -> str:
        """Mean and sample standard deviation over the seeds, in words."""
        values = self.values(where, variant, measure)
        mean = f"{np.mean(values):.3f}"
        return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"

    def megabytes(self, where: Where, variant: Variant, key: str) -> float:
        """Of an agent that takes part in all rounds."""
        return float(self.under_each_seed(where, variant)[0][key]) / 1e6

    def all(self) -> list[dict[str, Any]]:
        """Everything, as JSON."""
        return [dict(one) for one in self._found.values()]


def variants_of(settings: Settings, where: Where) -> list[Variant]:
    """What a table compares."""
    jobs = settings.demo_jobs() if where is Where.DEMO else settings.dolly_jobs()
    return list(dict.fromkeys(job.variant for job in jobs))


def report_rows(results: Results) -> list[Row]:
    """Every rule ÷ FedIT, paired by seed."""
    made = []
    for where in results.wheres:
        measures = _MEASURES[where]
        for variant in variants_of(results.settings, where):
            if variant == RULES[0]:
                continue
            for key, title, unit, better in measures:
                peer = results.values(where, RULES[0], key)
                if min(peer) > 0.0:  # where nothing was right, there is no ratio
                    made.append(
                        Row.of(
                            f"{where.value}: {title}, {variant.name}",
                            results.values(where, variant, key),
                            peer,
                            peer_name=RULES[0].name,
                            unit=unit,
                            better=better,
                        )
                    )
    return made


def table(results: Results, where: Where) -> str:
    """Markdown: what each variant scores and sends."""
    measures = _MEASURES[where]
    heads = ["rule", *(title for _, title, _, _ in measures), "MB sent", "MB fetched"]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for variant in variants_of(results.settings, where):
        cells = [results.cell(where, variant, key) for key, *_ in measures]
        sizes = [
            f"{results.megabytes(where, variant, key):.3g}" for key in ("bytes_up", "bytes_down")
        ]
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
        cells = [results.cell(Where.DEMO, variant, "exact_match") for variant in at_each]
        lines.append(f"| {' | '.join([plain.name, *cells])} |")
    return "\n".join(lines) + "\n"


def markdown(results: Results) -> str:
    """All tables for a page."""
    parts = [table(results, where) for where in results.wheres]
    if Where.DEMO in results.wheres:
        parts.append(rate_table(results))
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

    wheres = results.wheres
    figure = Figure(figsize=(1 + 6 * len(wheres), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, where in zip(figure.subplots(1, len(wheres), squeeze=False)[0], wheres, strict=True):
        measure, title, unit, better = _MEASURES[where][0]
        for number, variant in enumerate(variants_of(results.settings, where)):
            values = results.values(where, variant, measure)
            moved = sum(results.megabytes(where, variant, k) for k in ("bytes_up", "bytes_down"))
            axes.errorbar(
                moved,
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
        axes.set_title({Where.DEMO: "the demo's federation", Where.DOLLY: "Dolly-15k"}[where])
        axes.grid(color="#eeeeee")
        axes.legend(fontsize=7, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def run_name(settings: Settings, base_digest: str) -> str:
    """A name that changes with whatever changes the results: settings, base and these jobs."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    digest.update(base_digest.encode())
    for module in (
        dolly_jobs,
        dp_utility_jobs,
        lora_federation,
        lora_rules_jobs,
        tiny_federation,
    ):
        digest.update(Path(module.__file__).read_bytes())
    return f"lora-rules-run-{digest.hexdigest()[:16]}"


def run(
    settings: Settings, work: Callable[[Job], Result], kept: Path, wheres: Sequence[Where], n: int
) -> Results:
    """Run what has not been run, in n processes; a seed at a time, the other rates last."""
    jobs: dict[str, Sequence[Job]] = {}
    if Where.DOLLY in wheres:
        jobs["Dolly"] = settings.dolly_jobs()
    if Where.DEMO in wheres:
        jobs |= {"the demo": settings.demo_jobs(), "other rates": settings.rate_jobs()}
    found: dict[Job, Result] = {}
    with Runner(work, kept, headline=_headline, n_workers=n) as runner:
        for what, some in jobs.items():
            found |= dict(zip(some, runner.run(some, what), strict=True))
    return Results(settings, found)


def _headline(found: Result) -> str:
    keys = [key for key in ("exact_match", "rouge_l", "loss") if key in found]
    return ", ".join(f"{key} {np.mean(list(found[key].values())):.3f}" for key in keys)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the result")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables for a page")
    parser.add_argument("--cache", type=Path, default=dolly_base.default_cache())
    parser.add_argument("--fresh", action="store_true", help="measure again what was kept")
    parser.add_argument("--only", type=Where, choices=list(Where), help="one federation alone")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    quiet_libraries()
    settings = QUICK if args.quick else Settings()
    recipe = dolly_base.QUICK if args.quick else BASE
    wheres = list(Where) if args.only is None else [args.only]
    folder = dolly_base.data_folder()
    text_folder = folder / "text"
    kept = args.cache / run_name(settings, dolly_base.base_digest(recipe, text_folder))
    if args.fresh:
        shutil.rmtree(kept, ignore_errors=True)
    base = args.cache  # of Dolly, which the demo does not look at
    if Where.DOLLY in wheres:
        base = dolly_base.ensure_base(recipe, text_folder, args.cache, show=show)
    work = partial(run_job, settings=settings, base=base, data=folder / dolly_jobs.DOLLY)
    results = run(settings, work, kept, wheres, args.workers)
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

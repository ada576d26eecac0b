"""The main job on real Dolly-15k: base, three locals, federated, centralised, over three seeds.

    python -m benchmarks.dolly --json dolly.json --figure dolly.png
    python -m benchmarks.dolly --quick --json -

Ten clients by the second partition of arXiv 2305.05644 (skewed), its recipe, three rounds of five
clients, on a base of seven million parameters that `benchmarks.dolly_base` makes once. All models
see the same records; each client keeps the same share of its own, so that the whole takes less
than an hour of two cores. The learning rate is chosen on records that are never reported on; what
the paper's own rate gives is reported beside it.

Each model's result is kept as soon as it is there: a run that was interrupted goes on.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from benchmarks import dolly_base, dolly_jobs, dolly_report
from benchmarks.dolly_jobs import LOCALS, PAPER_RATE, Job, Model, Settings, run_job
from benchmarks.report import add_options, write_report
from benchmarks.running import Result, Runner, show
from quant.quiet import quiet_libraries
from simulations.partition.manifest import read_source

_N_ANSWERS_SHOWN: Final = 8


def _headline(found: Result) -> str:
    if "validation_loss" in found:
        return f"validation loss {found['validation_loss']:.3f}"
    loss = sum(found["loss"].values()) / len(found["loss"])
    overlap = sum(found["rouge_l"].values()) / len(found["rouge_l"])
    return f"loss {loss:.3f}, ROUGE-L {overlap:.3f}"


def tuning_jobs(settings: Settings) -> list[Job]:
    """The centralised model of the first seed at each rate, judged on validation records."""
    return [
        Job(model=Model.CENTRALISED, seed=settings.seeds[0], rate=rate, tuning=True)
        for rate in settings.rates
    ]


def main_jobs(settings: Settings, rate: float) -> list[Job]:
    """Every model under every seed, the long ones first."""
    order = (Model.FEDERATED, Model.CENTRALISED, *reversed(LOCALS), Model.BASE)
    return [
        Job(model=model, seed=seed, rate=None if model is Model.BASE else rate)
        for seed in settings.seeds
        for model in order
    ]


def other_rate_jobs(settings: Settings, rate: float) -> list[Job]:
    """What the main table does not tell, under the first seed.

    The paper's own rate; and the locals, which make few steps, at the rates below the chosen one,
    which was chosen for the many steps of the centralised model.
    """
    seed = settings.seeds[0]
    at_paper_rate = [
        Job(model=model, seed=seed, rate=PAPER_RATE)
        for model in (Model.FEDERATED, Model.CENTRALISED)
    ]
    below = [one for one in settings.rates if PAPER_RATE < one < rate]
    return at_paper_rate + [
        Job(model=model, seed=seed, rate=one) for one in reversed(below) for model in LOCALS
    ]


def run_name(settings: Settings, base: Path, data: Path) -> str:
    """A name that changes with whatever changes the results: settings, base, data, these jobs."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    digest.update(base.name.encode())
    for path in (data, Path(dolly_jobs.__file__)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"dolly-run-{digest.hexdigest()[:16]}"


def measure(settings: Settings, *, base: Path, data: Path, kept: Path) -> dict[str, Any]:
    """Choose the learning rate, then make and measure every model.

    Returns:
        All that was found, as JSON.
    """
    work = partial(run_job, settings=settings, base=base, data=data)
    with Runner(work, kept, headline=_headline) as runner:
        tuning = runner.run(tuning_jobs(settings), "learning rate")
        rate = min(tuning, key=lambda one: float(one["validation_loss"]))["rate"]
        show(f"learning rate {rate:g} of {', '.join(f'{one:g}' for one in settings.rates)}")
        found = runner.run(main_jobs(settings, rate), "models")
        at_other_rates = runner.run(other_rate_jobs(settings, rate), "other rates")
    source = read_source(data)
    splits = {
        seed: dolly_jobs.make_split(source.records, settings, seed) for seed in settings.seeds
    }
    everything = [*tuning, *found, *at_other_rates]
    return {
        "settings": asdict(settings),
        "base": json.loads((base / dolly_base.RECORD_NAME).read_text(encoding="utf-8")),
        "data": {"file": data.name, "sha256": source.file.sha256.hex()},
        "rate": rate,
        "tuning": [
            {"rate": one["rate"], "validation_loss": one["validation_loss"]} for one in tuning
        ],
        "clients": [
            {
                "seed": seed,
                "records": list(split.whole_sizes),
                "kept": [len(client) for client in split.clients],
                "locals": {model.value: len(split.clients[split.local(model)]) for model in LOCALS},
            }
            for seed, split in splits.items()
        ],
        "models": [_without_answers(one) for one in found],
        "at_other_rates": [_without_answers(one) for one in at_other_rates],
        "answers": _answers(found, settings.seeds[0]),
        "cpu_s": round(sum(float(one["cpu_s"]) for one in everything), 1),
    }


def _without_answers(found: Result) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "answers"}


def _answers(found: Sequence[Result], seed: int) -> list[dict[str, Any]]:
    """The first answered record of each category, with what each of three models said."""
    by_model = {Model(one["model"]): one["answers"] for one in found if one["seed"] == seed}
    shown: dict[str, dict[str, Any]] = {}
    for number, answer in enumerate(by_model[Model.FEDERATED]):
        if answer["category"] not in shown and len(shown) < _N_ANSWERS_SHOWN:
            shown[answer["category"]] = {
                **{key: answer[key] for key in ("category", "instruction", "wanted")},
                **{
                    model.value: by_model[model][number]["answer"]
                    for model in (Model.BASE, Model.FEDERATED, Model.CENTRALISED)
                },
            }
    return list(shown.values())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the result")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables for a page")
    parser.add_argument("--cache", type=Path, default=dolly_base.default_cache())
    parser.add_argument("--fresh", action="store_true", help="measure again what was kept")
    args = parser.parse_args()
    quiet_libraries()
    settings = dolly_jobs.QUICK if args.quick else Settings()
    recipe = dolly_base.QUICK if args.quick else dolly_base.BaseRecipe()
    folder = dolly_base.data_folder()
    data = folder / dolly_jobs.DOLLY
    base = dolly_base.ensure_base(recipe, folder / "text", args.cache, show=show)
    kept = args.cache / run_name(settings, base, data)
    if args.fresh:
        shutil.rmtree(kept, ignore_errors=True)
    details = measure(settings, base=base, data=data, kept=kept)
    results = dolly_report.Results(details["models"])
    console = Console(stderr=args.json == "-", width=140)
    measures = (dolly_report.LOSS, dolly_report.ROUGE)
    remarks = dolly_report.remarks(details, results)
    for measure_ in measures:
        console.print(dolly_report.table(results, measure_))
    for remark in remarks:
        console.print(remark, highlight=False)
    if args.figure is not None:
        dolly_report.draw(results, args.figure)
    if args.markdown is not None:
        tables = [dolly_report.markdown(results, measure_) for measure_ in measures]
        text = "\n".join([*tables, *(f"- {remark}" for remark in remarks)])
        args.markdown.write_text(text + "\n", encoding="utf-8")
    write_report(
        dolly_report.rows(results),
        module="benchmarks.dolly",
        json_target=args.json,
        details=details,
    )


if __name__ == "__main__":
    main()

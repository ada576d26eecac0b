"""What `benchmarks.dolly` shows: rows of ratios, a table by category, a figure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.table import Table

from benchmarks.dolly_jobs import LOCALS, Model
from benchmarks.report import Better, Row

AVERAGE: Final = "average"
_COLOURS: Final = {
    Model.BASE: "#999999",
    Model.LOCAL_SMALLEST: "#f0b27a",
    Model.LOCAL_MEDIAN: "#e67e22",
    Model.LOCAL_LARGEST: "#a04000",
    Model.FEDERATED: "#0072b2",
    Model.CENTRALISED: "#009e73",
}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A figure by category.

    Attributes:
        key: Its name in a job's result.
        title: Its name for people.
        better: Which way is good.
        digits: After the point.
    """

    key: str
    title: str
    unit: str
    better: Better
    digits: int


LOSS: Final = Measure(
    key="loss", title="held-out loss", unit="nats a token", better="lower", digits=3
)
ROUGE: Final = Measure(key="rouge_l", title="ROUGE-L", unit="F-measure", better="higher", digits=3)


class Results:
    """All models under all seeds.

    Args:
        found: Results of jobs, one for each model and seed.
    """

    def __init__(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Sort them by model and seed."""
        self.seeds: tuple[int, ...] = tuple(sorted({int(one["seed"]) for one in found}))
        self._by = {(Model(one["model"]), int(one["seed"])): one for one in found}
        self.categories: tuple[str, ...] = tuple(sorted(found[0]["loss"]))

    def values(self, model: Model, measure: Measure, category: str = AVERAGE) -> list[float]:
        """One value for each seed; `AVERAGE` is over the categories, which count alike."""
        draws = [self._by[model, seed][measure.key] for seed in self.seeds]
        if category == AVERAGE:
            return [float(np.mean(list(draw.values()))) for draw in draws]
        return [float(draw[category]) for draw in draws]

    def cell(self, model: Model, measure: Measure, category: str) -> str:
        """Mean and sample standard deviation over the seeds, in words."""
        values = self.values(model, measure, category)
        mean = f"{np.mean(values):.{measure.digits}f}"
        if len(values) == 1:
            return mean
        return f"{mean} ± {np.std(values, ddof=1):.{measure.digits}f}"


def rows(results: Results) -> list[Row]:
    """Federated ÷ each yardstick, paired by seed; averages over categories."""
    made = []
    for measure in (LOSS, ROUGE):
        federated = results.values(Model.FEDERATED, measure)
        locals_ = np.array([results.values(model, measure) for model in LOCALS])  # [3, seeds]
        best: Callable[..., Any] = np.min if measure.better == "lower" else np.max
        peers = {
            "base": results.values(Model.BASE, measure),
            "mean of three locals": locals_.mean(axis=0).tolist(),
            "best of three locals": best(locals_, axis=0).tolist(),
            "centralised": results.values(Model.CENTRALISED, measure),
        }
        made += [
            Row.of(
                f"{measure.title}, federated",
                federated,
                peer,
                peer_name=name,
                unit=measure.unit,
                better=measure.better,
            )
            for name, peer in peers.items()
            if min(peer) > 0.0  # an answer can share no word: then there is no ratio
        ]
    return made


def table(results: Results, measure: Measure) -> Table:
    """A measure by category and model."""
    n_seeds = len(results.seeds)
    spread = f"mean ± standard deviation over {n_seeds} seeds" if n_seeds > 1 else "one seed"
    shown = Table(title=f"{measure.title} ({measure.unit}, {measure.better} is better), {spread}")
    shown.add_column("category")
    for model in Model:
        shown.add_column(model.value, justify="right", style=_style(model))
    for category in (*results.categories, AVERAGE):
        cells = (results.cell(model, measure, category) for model in Model)
        shown.add_row(category, *cells, end_section=category == results.categories[-1])
    return shown


def _style(model: Model) -> str:
    return "bold" if model is Model.FEDERATED else ""


def markdown(results: Results, measure: Measure) -> str:
    """The same table for a page."""
    lines = [
        f"| category | {' | '.join(model.value for model in Model)} |",
        f"| --- |{' ---: |' * len(Model)}",
    ]
    for category in results.categories:
        cells = " | ".join(results.cell(model, measure, category) for model in Model)
        lines.append(f"| `{category}` | {cells} |")
    cells = " | ".join(f"**{results.cell(model, measure, AVERAGE)}**" for model in Model)
    lines.append(f"| **{AVERAGE}** | {cells} |")
    return "\n".join(lines) + "\n"


def remarks(details: Mapping[str, Any], results: Results) -> tuple[str, ...]:
    """What must be said beside the tables: base, cap, learning rate, and what other rates gave."""
    settings, base = details["settings"], details["base"]
    recipe = base["recipe"]
    of_base = (
        f"Base: {base['n_parameters']:,} parameters, {recipe['n_steps']:,} steps of "
        f"{recipe['n_rows'] * recipe['row_length']:,} tokens, loss {base['held_out_loss']:.3f} "
        "nats a token on text of its kind that it has not read."
    )
    whole = [n for client in details["clients"] for n in client["records"]]
    kept = [n for client in details["clients"] for n in client["kept"]]
    of_cap = (
        f"Cap: {settings['n_train']:,} records in all. Each client keeps the same share of its "
        f"own, at random: {min(whole)} to {max(whole)} records become {min(kept)} to {max(kept)}."
    )
    tried = ", ".join(f"{one['rate']:g}: {one['validation_loss']:.3f}" for one in details["tuning"])
    seed = settings["seeds"][0]
    of_rate = (
        f"Learning rate: {details['rate']:g}, by the validation loss of the centralised model of "
        f"seed {seed} on {settings['n_tuning']} records ({tried})."
    )
    beside = "; ".join(_beside(one, results) for one in details["at_other_rates"])
    of_other_rates = f"At other rates, seed {seed}: {beside}."
    of_time = f"Time: {details['cpu_s'] / 60:.0f} minutes of one core in all, without the base."
    return of_base, of_cap, of_rate, of_other_rates, of_time


def _beside(found: Mapping[str, Any], results: Results) -> str:
    """A model at another rate beside the same model, of the same seed, at the chosen one."""
    model, index = Model(found["model"]), results.seeds.index(found["seed"])
    parts = []
    for measure in (LOSS, ROUGE):
        theirs = float(np.mean(list(found[measure.key].values())))
        ours = results.values(model, measure)[index]
        parts.append(
            f"{measure.title} {theirs:.{measure.digits}f} (table: {ours:.{measure.digits}f})"
        )
    return f"{found['rate']:g} {model.value}: {', '.join(parts)}"


def draw(results: Results, path: Path) -> None:
    """Draw both measures by category and model, with their spread over the seeds.

    Args:
        results: What to draw.
        path: A PNG; its folder is made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    groups = (*results.categories, AVERAGE)
    offsets = np.linspace(-0.3, 0.3, len(Model))
    for axes, measure in zip(figure.subplots(2, 1, sharex=True), (LOSS, ROUGE), strict=True):
        for offset, model in zip(offsets, Model, strict=True):
            draws = np.array([results.values(model, measure, group) for group in groups])  # [G, S]
            at = np.arange(len(groups)) + offset
            spread = draws.std(axis=1, ddof=1) if draws.shape[1] > 1 else None
            axes.errorbar(
                at,
                draws.mean(axis=1),
                yerr=spread,
                fmt="D" if model in {Model.FEDERATED, Model.CENTRALISED} else "o",
                markersize=5,
                capsize=3,
                color=_COLOURS[model],
                label=model.value,
            )
        for border in np.arange(len(groups) - 1) + 0.5:
            axes.axvline(border, color="#dddddd", linewidth=0.8, zorder=0)
        axes.axvspan(len(groups) - 1.5, len(groups) - 0.5, color="#f3f3f3", zorder=0)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylabel(f"{measure.title}, {measure.unit}\n({measure.better} is better)")
        axes.set_xticks(range(len(groups)), [group.replace("_", "\n") for group in groups])
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncol=len(Model), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

"""What the demo shows: a live view, a table, a figure, answers side by side, JSON."""

import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from protocol.guarantee import privacy_json
from simulations.demo import DemoListener, DemoResult, DemoView
from simulations.measuring import Measurement

_MB: Final = 1_000_000
_N_ANSWERS: Final = 6
_SHORT: Final = {"federation": "fed", "centralised": "all"}
_BLUE, _ORANGE, _GREY, _GREEN = "#0072b2", "#d55e00", "#999999", "#009e73"


class DemoDisplay(DemoListener):
    """Shows the demo: a live table on a terminal, a line for each release elsewhere.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        """Begin with nothing shown."""
        self._console = console
        self._live: Live | None = None
        self._n_losses = 0

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        self._end_live()

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def stage(self, text: str) -> None:
        """A new stage begins."""
        self._end_live()
        self._console.print(f"[bold]•[/] {text}", highlight=False)

    def look(self, view: DemoView) -> None:
        """The federation moved on."""
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=4)
                self._live.start()
            self._live.update(_live_table(view))
        elif len(view.losses) > self._n_losses:
            self._n_losses = len(view.losses)
            self._console.print(
                f"  release {len(view.losses) - 1} of {view.status.n_rounds}: "
                f"held-out loss {view.losses[-1]:.3f}, {view.elapsed_s:.0f} s, "
                f"{view.status.bytes_up / _MB:.2f} MB up",
                highlight=False,
            )

    def measured(self, done: int, total: int, name: str) -> None:
        """A yardstick was measured."""
        self._console.print(f"  {done} of {total}: {name}", highlight=False)


def _live_table(view: DemoView) -> Group:
    status = view.status
    table = Table("agent", "its categories", "records", "doing", "sent MB")
    for agent in view.agents:
        table.add_row(
            str(agent.number),
            ", ".join(agent.categories),
            str(agent.n_records),
            agent.activity,
            f"{agent.bytes_sent / _MB:.2f}",
        )
    phase = f"round {status.round.round} {status.round.phase}" if status.round else "gathering"
    uploads = f"{status.round.n_uploads} uploads" if status.round else ""
    losses = " → ".join(f"{loss:.2f}" for loss in view.losses)
    caption = (
        f"{phase}, {uploads}; release {status.newest_release} of {status.n_rounds}; "
        f"{view.elapsed_s:.0f} s\nheld-out loss by release: {losses}"
    )
    return Group(table, caption)


def as_json(result: DemoResult) -> dict[str, Any]:
    """The result as JSON; all numbers are finite, no privacy is `epsilon: null`."""
    named = {
        "base": result.base,
        "federated": result.federated,
        "centralised": result.centralised,
    }

    def both(measure: str, what: str) -> dict[str, Any]:
        def value(found: Measurement) -> float:
            return round(float(getattr(found.score, what)(measure)), 6)

        return {
            "base": value(named["base"]),
            "local": [value(found) for found in result.local],
            "federated": value(named["federated"]),
            "centralised": value(named["centralised"]),
        }

    categories = result.base.score.by_category("exact_match")
    return {
        "exact_match": both("exact_match", "average"),
        "exact_match_std": both("exact_match", "spread"),
        "loss": both("loss", "average"),
        "loss_std": both("loss", "spread"),
        "by_category": {
            category: {
                **{
                    name: round(found.score.by_category("exact_match")[category], 6)
                    for name, found in named.items()
                },
                "local": [
                    round(found.score.by_category("exact_match")[category], 6)
                    for found in result.local
                ],
            }
            for category in categories
        },
        "held_out_loss_by_release": [round(loss, 6) for loss in result.losses],
        "eval_seeds": len(result.recipe.evaluation_seeds),
        "bytes_up_per_agent": result.bytes_up_per_agent,
        "bytes_down_per_agent": result.bytes_down_per_agent,
        "rounds": result.recipe.n_rounds,
        "agents": result.recipe.n_agents,
        "lora_rule": result.recipe.lora_rule.value,
        "wall_s": round(result.wall_s, 1),
        "adapter": str(result.folder.adapter.absolute()),
        "privacy": privacy_json(result.manifest),
        "masked": result.manifest.masking.mode != "off",
    }


def table(result: DemoResult) -> Table:
    """Exact match by category, with the spread of the average over the evaluation seeds."""
    models = (result.base, *result.local, result.federated, result.centralised)
    shown = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"Exact match on held-out records, {len(result.recipe.evaluation_seeds)} draws, %",
        caption="1 to 5: an agent alone (* its own categories); fed: the federation;\n"
        "all: all data in one place. Categories count alike; ± is a standard deviation.",
    )
    shown.add_column("category", no_wrap=True)
    for found in models:
        style = "bold green" if found is result.federated else ""
        short = _SHORT.get(found.name, found.name.removeprefix("agent "))
        shown.add_column(short, justify="right", style=style, no_wrap=True, min_width=5)
    for category in result.base.score.by_category("exact_match"):
        cells = []
        for found in models:
            own = found in result.local and (
                category in result.recipe.categories[result.local.index(found)]
            )
            share = found.score.by_category("exact_match")[category]
            cells.append(f"{100 * share:.0f}{'*' if own else ''}")
        shown.add_row(category, *cells)
    shown.add_section()
    for label, measure, what, scale, digits in (
        ("average", "exact_match", "average", 100, 0),
        ("± over the draws", "exact_match", "spread", 100, 1),
        ("loss", "loss", "average", 1, 2),
        ("± over the draws", "loss", "spread", 1, 2),
    ):
        values = [scale * float(getattr(found.score, what)(measure)) for found in models]
        style = "bold" if what == "average" else "dim"
        shown.add_row(label, *(f"{value:.{digits}f}" for value in values), style=style)
    return shown


def answers(result: DemoResult) -> Table:
    """A few answers of base and federation side by side, one of each of some categories."""
    shown = Table("category", "instruction", "wanted", "base", "federation", title="Answers")
    seen: set[str | None] = set()
    base, federated = result.base.score.seeds[0], result.federated.score.seeds[0]
    for number, record in enumerate(result.held_out[0]):
        if record.category in seen or len(seen) == _N_ANSWERS:
            continue
        seen.add(record.category)
        shown.add_row(
            str(record.category),
            _short(record.instruction),
            _short(record.response),
            _short(base.answers[number]),
            _short(federated.answers[number]),
        )
    return shown


def _short(text: str, limit: int = 60) -> str:
    line = " ".join(text.split()).replace("[", r"\[")
    return line if len(line) <= limit else line[: limit - 1] + "…"


def draw(result: DemoResult, path: Path) -> None:
    """Draw the figure: exact match by category, and the held-out loss over the rounds.

    Args:
        result: What to draw.
        path: A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    bars, curve = figure.subplots(1, 2, width_ratios=(2.2, 1))
    groups = [*result.base.score.by_category("exact_match"), "average"]
    series = (
        ("base", [result.base], _GREY),
        ("agents alone: mean, and each", list(result.local), _ORANGE),
        ("federation", [result.federated], _BLUE),
        ("all data in one place", [result.centralised], _GREEN),
    )
    width = 0.8 / len(series)
    for index, (label, models, colour) in enumerate(series):
        at = [position + (index - 1.5) * width for position in range(len(groups))]
        shares = [[100 * _value(found, group) for found in models] for group in groups]
        means = [sum(group) / len(group) for group in shares]
        bars.bar(at, means, width, label=label, color=colour)
        if len(models) > 1:
            for x, group in zip(at, shares, strict=True):
                bars.plot([x] * len(group), group, "k.", markersize=3)
        else:
            spread = 100 * models[0].score.spread("exact_match")
            bars.errorbar(at[-1], means[-1], yerr=spread, color="black", capsize=2)
    bars.set_xticks(range(len(groups)), [g.replace("_", "\n") for g in groups], fontsize=8)
    bars.set_ylabel("exact match, %")
    bars.set_ylim(0, 118)
    bars.set_title("Held-out records by category")
    bars.legend(fontsize=8, ncol=len(series), loc="upper center")
    curve.plot(range(len(result.losses)), result.losses, marker="o", color=_BLUE)
    curve.axhline(
        min(found.score.average("loss") for found in result.local),
        color=_ORANGE,
        linestyle="--",
        label="best agent alone",
    )
    curve.axhline(
        result.centralised.score.average("loss"),
        color=_GREEN,
        linestyle="--",
        label="all data in one place",
    )
    curve.set_xlabel("release")
    curve.set_ylabel("held-out loss, nats a token")
    curve.set_title("The federation's adapter")
    curve.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _value(found: Measurement, group: str) -> float:
    if group == "average":
        return found.score.average("exact_match")
    return found.score.by_category("exact_match")[group]


def next_commands(result: DemoResult) -> tuple[str, ...]:
    """Commands to try next, as they can be typed from here."""
    return (
        f'{_program("sheepfold-agent")} ask {result.folder.adapter} "Which hue belongs to a plum?"',
        f"{_program('sheepfold-agent')} sent --home {result.folder.agent(1).root}",
        f"{_program('sheepfold-server')} releases list {result.folder.server}",
        f"{_program('sheepfold-server')} init my-federation --open-enrolment",
    )


def _program(name: str) -> str:
    """A program of ours: by name if the shell finds it, else by where this Python has it."""
    if shutil.which(name):
        return name
    beside = Path(sys.executable).parent / name
    here = Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)

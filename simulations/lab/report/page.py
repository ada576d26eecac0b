"""The report of a run: one page that opens from disk, with nothing to fetch and nothing to run."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edge_agent.plain_text import plain, shown
from simulations.lab.folder import RunFolder
from simulations.lab.records import AnswerNote, Arm, Cryptography, Fate, Measure, RoundNote, RunCard
from simulations.lab.report.drawing import (
    AVERAGE,
    MEASURE_NAMES,
    bytes_text,
    score_text,
    time_text,
)
from simulations.lab.report.figures import Drawing, draw_all, save_figures
from simulations.lab.report.history import History

if TYPE_CHECKING:
    from jinja2 import Template

_N_ANSWERS: Final = 12
_MOST_SIGNS: Final = 1500
_MOST_FAILURES: Final = 20
_CRYPTOGRAPHY: Final = {
    Cryptography.REAL: (
        "real: keys, shares, masks and check words, all of it, in the memory of one machine"
    ),
    Cryptography.EXACT_SUM: (
        "exact sum: the encoded updates were added in the ring, which is what unmasking gives, bit "
        "for bit; no keys, shares or masks were made"
    ),
    None: "none: nothing was masked",
}
_ARMS: Final = {
    Arm.FEDERATED: "federated: every client keeps its records, the server averages updates",
    Arm.BASE: "base: nobody trains; the base with the untouched adapter",
    Arm.CENTRALISED: "centralised: all clients' records in one place",
    Arm.LOCAL: "local: one client alone",
}
_DASH: Final = "–"
_ROUND_HEADS: Final = (
    *("round", "release", "selected", "counted", "cells", "removed", "update norm", "gap"),
    *("learning rate", "train loss", "up", "down", "ε", "simulated", "training", "server", "clock"),
)


def write_report(root: Path) -> Path:
    """Write a run's page, `report.html`, and its figures as files under `figures/`.

    Guarantees:
        1. The page holds all that it shows: no address is fetched, no script is run.
        2. Text of records, categories, errors and the experiment is shown as text, whatever is in
           it.
        3. A run that is not finished says so, and how far it came.
        4. The command that it shows, given in the run's folder, runs this very run again: its arm,
           client, seed and group size.

    Args:
        root: The run's folder.

    Returns:
        The page.

    Raises:
        OutputError: There is no run, or the page cannot be written.
    """
    history = History.read(root)
    folder = RunFolder(root)
    drawings = draw_all(history)
    save_figures(folder, drawings)
    folder.write(folder.report, make_page(history, drawings).encode())
    return folder.report


def make_page(history: History, drawings: Sequence[Drawing]) -> str:
    """The page itself.

    Args:
        history: The run.
        drawings: Its figures.
    """
    card = history.card
    client = f", client {card.client}" if card.client is not None else ""
    return _template().render(
        title=f"{plain(card.experiment)}: {card.arm.value}{client}, seed {card.seed}",
        subtitle=f"A run of Sheepfold’s simulator on {plain(card.machine)}.",
        state=history.state,
        finished=history.end is not None,
        headline=_headline(history),
        facts=_facts(history),
        drawings=[
            {
                "title": drawing.title,
                "text": drawing.text,
                "base64": base64.b64encode(drawing.png).decode(),
            }
            for drawing in drawings
        ],
        categories=_categories(history),
        rounds={
            "heads": _ROUND_HEADS,
            "rows": [
                {"failed": note.release is None, "cells": _round_cells(history, note)}
                for note in history.rounds
            ],
        },
        failures=_failures(history),
        answers=_answers(history.answers),
        command=_command(card),
        digests=_digests(history),
        experiment=_experiment(history.root),
    )


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 - slow to import

    text = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text)


# What was run


def _facts(history: History) -> list[tuple[str, str]]:
    card = history.card
    versions = ", ".join(f"{name} {version}" for name, version in sorted(card.versions.items()))
    facts = [
        ("arm", _ARMS[card.arm] + (f" ({card.client})" if card.client is not None else "")),
        ("seed", str(card.seed)),
        ("clients", f"{card.n_clients:,}"),
        ("held-out records", _held_out(card)),
        ("simulated cohort", f"{card.cohort:,} in a round"),
        ("rounds planned", str(card.n_rounds)),
        ("values in an update", f"{card.n_values:,}"),
        ("base", card.base_fingerprint),
        ("engine", card.engine),
        ("agents trained at once", str(card.group_size)),
        ("cryptography", _CRYPTOGRAPHY[card.cryptography]),
        ("guarantee", card.guarantee),
        ("machine", card.machine),
        ("versions", versions),
    ]
    return [(name, plain(value)) for name, value in facts]


def _held_out(card: RunCard) -> str:
    if card.n_held_out is None:
        return "not counted"
    if not card.n_repeated:
        return f"{card.n_held_out:,}, none of which a client's record repeats"
    return f"{card.n_held_out:,}, of which clients' records repeat {card.n_repeated:,}"


def _command(card: RunCard) -> str:
    """What runs it again. An experiment does not say whose run it was, nor what `auto` chose."""
    who = [f"--arm {card.arm.value}"]
    if card.client is not None:
        who.append(f"--client {card.client}")
    what = f"{' '.join(who)} --seed {card.seed} --group {card.group_size}"
    return f"sheepfold-sim run experiment.toml {what} --out again"


def _digests(history: History) -> list[tuple[str, str]]:
    card = history.card
    digests = [
        ("experiment", card.experiment_sha256),
        ("manifest", card.manifest_sha256),
        ("data", card.data_sha256),
        ("base", card.base_fingerprint),
    ]
    if history.released:
        newest = history.released[-1]
        digests.append((f"release {newest.release}", newest.release_sha256))
    return [(name, plain(value)) for name, value in digests]


def _experiment(root: Path) -> str:
    try:
        text = RunFolder(root).experiment.read_text(encoding="utf-8", errors="replace")
    except OSError:  # the page is worth having without it
        return ""
    return shown(text)


# Numbers


def _headline(history: History) -> list[Mapping[str, str]]:
    found = [_of_measure(history, measure) for measure in history.measures]
    per_agent = history.n_bytes_per_agent
    if per_agent:
        n_clients = history.card.n_clients
        up, down = history.n_bytes_up / n_clients, history.n_bytes_down / n_clients
        found.append(
            {
                "what": "bytes per agent, a mean over all clients",
                "value": bytes_text(per_agent),
                "more": f"{bytes_text(up)} up, {bytes_text(down)} down",
            }
        )
    if history.epsilon is not None:
        found.append(
            {
                "what": "the largest ε that any agent has spent",
                "value": f"{history.epsilon:.3g}",
                "more": (
                    f"profile {plain(history.card.profile)}, simulated cohort: "
                    f"{history.card.cohort:,}; what it protects, at which δ: see guarantee"
                ),
            }
        )
    if history.end is not None:
        found.append(
            {
                "what": "time on the clock",
                "value": time_text(history.end.wall_s),
                "more": "of the sitting that ended the run, loading included",
            }
        )
    return found


def _of_measure(history: History, measure: Measure) -> Mapping[str, str]:
    last = max(history.releases(measure))
    value = history.average(measure, last)
    better = "lower is better" if measure.lower_is_better else "higher is better"
    more = better
    if last and 0 in history.releases(measure):
        first = history.average(measure, 0)
        more = f"release 0: {score_text(measure, first)}; {better}"
    return {
        "what": f"{MEASURE_NAMES[measure]}, release {last}, average over categories",
        "value": score_text(measure, value),
        "more": more,
    }


def _categories(history: History) -> Mapping[str, Any]:
    heads: list[str] = []
    columns: list[tuple[Mapping[str, str], str]] = []  # by category, and the average
    for measure in history.measures:
        last = max(history.releases(measure))
        for release in dict.fromkeys((0, last)):
            if release in history.releases(measure):
                scores = history.by_category(measure, release)
                average = history.average(measure, release)
                heads.append(f"{MEASURE_NAMES[measure]}, release {release}")
                texts = {name: score_text(measure, score) for name, score in scores.items()}
                columns.append((texts, score_text(measure, average)))
        n_examples = history.n_examples(measure)
        heads.append("records")
        columns.append(
            ({name: str(n) for name, n in n_examples.items()}, str(sum(n_examples.values())))
        )
    names = sorted({name for column, _ in columns for name in column})
    rows = [[plain(name), *(column.get(name, _DASH) for column, _ in columns)] for name in names]
    if rows:
        rows.append([AVERAGE, *(average for _, average in columns)])
    return {"heads": heads, "rows": rows}


def _round_cells(history: History, note: RoundNote) -> list[str]:
    def text(value: float | None, form: str) -> str:
        return _DASH if value is None else format(value, form)

    made = note.release is not None
    counted = list(note.fates.values()).count(Fate.COUNTED)
    return [
        str(note.number),
        str(note.release) if made else "failed",
        str(len(note.fates)),
        str(counted),
        str(note.n_cells),
        str(note.n_cells_removed),
        text(note.update_norm if made else None, ".4g"),
        text(note.covariance_gap, ".3g"),
        text(note.learning_rate, ".3g"),
        text(history.train_loss(note.number), ".3f"),
        bytes_text(note.bytes_up),
        bytes_text(note.bytes_down),
        text(note.epsilon, ".3g"),
        _DASH if note.duration_s is None else time_text(note.duration_s),
        time_text(note.train_s),
        time_text(note.server_s),
        time_text(note.wall_s),
    ]


# What failed


def _failures(history: History) -> list[str]:
    found = [
        f"Round {note.number} made no release: {plain(note.failure or '')}"
        for note in history.failed
    ]
    cells = [
        (note.number, list(note.fates.values()).count(Fate.CELL_LOST)) for note in history.rounds
    ]
    found += [
        f"Round {number}: {_counted(n_agents, 'agent')} lost with cells that too many left"
        for number, n_agents in cells
        if n_agents
    ]
    if len(found) > _MOST_FAILURES:
        found = [*found[:_MOST_FAILURES], f"and {len(found) - _MOST_FAILURES} more"]
    errors = Counter(plain(note.error) for note in history.visits if note.error is not None)
    found += [
        f"{_counted(n, 'training')} gave nothing to send: {error}"
        for error, n in errors.most_common(10)
    ]
    fates = Counter(fate for _, _, fate in history.fates())
    others = [
        f"{fates[fate]} {fate.value.replace('-', ' ')}"
        for fate in Fate
        if fate is not Fate.COUNTED and fates[fate]
    ]
    if others:
        found.append(f"Of {fates.total()} places in rounds: {', '.join(others)}")
    return found


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


# Answers


def _answers(notes: Sequence[AnswerNote]) -> Mapping[str, Any]:
    chosen = sample_answers(notes, _N_ANSWERS)
    return {
        "release": chosen[0].release if chosen else 0,
        "n_all": len(notes),
        "rows": [
            [_cut(text) for text in (note.category, note.instruction, note.wanted, note.answer)]
            for note in chosen
        ],
    }


def sample_answers(notes: Sequence[AnswerNote], n_most: int) -> list[AnswerNote]:
    """The first answer of each category, then the second, until there are enough.

    Args:
        notes: Of one release.
        n_most: At most so many.

    Returns:
        By category.
    """
    seen: Counter[str] = Counter()
    ranked: list[tuple[int, int, AnswerNote]] = []
    for place, note in enumerate(notes):
        ranked.append((seen[note.category], place, note))
        seen[note.category] += 1
    chosen = [note for _, _, note in sorted(ranked, key=lambda row: row[:2])[:n_most]]
    return sorted(chosen, key=lambda note: note.category)


def _cut(text: str) -> str:
    line = shown(text)
    return line if len(line) <= _MOST_SIGNS else line[:_MOST_SIGNS] + "…"

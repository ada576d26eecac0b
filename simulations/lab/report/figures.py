"""The figures of one run: how good it became, what it sent, whom it had, how long it took."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from edge_agent.plain_text import plain
from simulations.lab.folder import RunFolder
from simulations.lab.records import Measure
from simulations.lab.report.drawing import (
    AVERAGE,
    AXIS_NAMES,
    BLUE,
    GREY,
    MEASURE_NAMES,
    ORANGE,
    PALETTE,
    as_png,
    bytes_unit,
    label,
    legend_above,
    new_figure,
    scale,
    tidy,
    time_unit,
    whole_numbers,
)
from simulations.lab.report.history import History
from simulations.lab.report.participation import draw_participation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BARS: Final = 40
_FEW_POINTS: Final = 40
_TEXTS: Final = {
    "curves": (
        "Quality over releases",
        (
            "Thick: the average over categories, which count alike; thin: each category. On the "
            "right the same over all bytes sent and received until then."
        ),
    ),
    "categories": (
        "Quality by category",
        "The newest release that was measured, against release 0, which is before any training.",
    ),
    "bytes": (
        "Bytes",
        "Bodies of messages of all agents together, those that came too late too.",
    ),
    "epsilon": (
        "Privacy spent",
        (
            "The largest ε that any agent has spent by the end of each round. Promised is: "
            "{guarantee}"
        ),
    ),
    "participation": (
        "Who took part",
        (
            "What became of every agent that a round selected, and in how many rounds each "
            "client's update counted."
        ),
    ),
    "durations": (
        "Simulated time",
        "What the rounds would take with the population's devices and networks.",
    ),
    "times": (
        "Time of the simulation",
        (
            "Training: of all agents together. Server: selection, encoding, masks, filter, average "
            "and writing. Clock: from the round's beginning to its end."
        ),
    ),
}
"""By name: a heading, and what is said."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure, and what is said of it.

    Attributes:
        name: Of its file, without the ending.
        title: A heading.
        text: What it shows, in a sentence or two; it stands for the picture where none is seen.
        png: The picture.
    """

    name: str
    title: str
    text: str
    png: bytes


def draw_all(history: History) -> tuple[Drawing, ...]:
    """The figures that a run has something to show in, in the order of reading.

    Args:
        history: The run.
    """
    figures = {
        "curves": draw_curves(history),
        "categories": draw_categories(history),
        "bytes": draw_bytes(history),
        "epsilon": draw_epsilon(history),
        "participation": draw_participation(history),
        "durations": draw_durations(history),
        "times": draw_times(history),
    }
    return tuple(
        Drawing(
            name=name,
            title=_TEXTS[name][0],
            text=_TEXTS[name][1].format(guarantee=plain(history.card.guarantee)),
            png=as_png(figure),
        )
        for name, figure in figures.items()
        if figure is not None
    )


def write_figures(root: Path) -> tuple[Path, ...]:
    """Draw a run's figures into `figures/`.

    Args:
        root: The run's folder.

    Returns:
        The PNGs.

    Raises:
        OutputError: There is no run, or a picture cannot be written.
    """
    folder = RunFolder(root)
    return save_figures(folder, draw_all(History.read(root)))


def save_figures(folder: RunFolder, drawings: Sequence[Drawing]) -> tuple[Path, ...]:
    """Write figures that are drawn, each whole or not at all.

    Args:
        folder: The run's.
        drawings: Any number.

    Returns:
        The PNGs.

    Raises:
        OutputError: One cannot be written.
    """
    paths = []
    for drawing in drawings:
        paths.append(folder.figures / f"{drawing.name}.png")
        folder.write(paths[-1], drawing.png)
    return tuple(paths)


# How good it became


def draw_curves(history: History) -> "Figure | None":
    """Each measure over releases, and over the bytes sent until then.

    Args:
        history: The run.

    Returns:
        None where there is no curve: answers that only the first and the last release gave make
        none, they stand in `draw_categories`.
    """
    shown = [
        measure
        for measure in history.measures
        if len(history.releases(measure)) > (1 if measure is Measure.LOSS else 2)
    ]
    if not shown:
        return None
    places = {one: _bytes_places(history, history.releases(one)) for one in shown}
    n_columns = 2 if all(places.values()) else 1
    figure = new_figure(5.6 * n_columns, 3.2 * len(shown) + 0.7)
    grid = figure.subplots(len(shown), n_columns, squeeze=False)
    for row, measure in zip(grid, shown, strict=True):
        releases = [float(number) for number in history.releases(measure)]
        _draw_curve(row[0], history, measure, releases)
        row[0].set_ylabel(AXIS_NAMES[measure], fontsize=9)
        row[0].set_xlabel("release", fontsize=9)
        whole_numbers(row[0])
        if n_columns > 1:
            at = places[measure]
            divisor, unit = bytes_unit(max(at))
            _draw_curve(row[1], history, measure, [place / divisor for place in at])
            row[1].set_xlabel(f"sent and received by all agents so far, {unit}", fontsize=9)
            row[1].sharey(row[0])
    handles, labels = grid[0, 0].get_legend_handles_labels()
    n_legend = min(len(labels), 5 if n_columns > 1 else 3)
    figure.legend(handles, labels, loc="outside lower center", ncol=n_legend, fontsize=8)
    return figure


def _bytes_places(history: History, releases: Sequence[int]) -> list[float]:
    """Where releases stand on an axis of bytes; empty: there is none to speak of."""
    sent = [history.n_bytes(release) for release in releases]
    known = [float(place) for place in sent if place is not None]
    return known if len(known) == len(sent) and known[-1] > 0.0 else []


def _draw_curve(axes: "Axes", history: History, measure: Measure, at: Sequence[float]) -> None:
    releases = history.releases(measure)
    factor = scale(measure)
    by_category = [history.by_category(measure, release) for release in releases]
    names = list(by_category[0])
    few = len(names) <= len(PALETTE)
    for number, name in enumerate(names):
        values = [factor * scores[name] for scores in by_category]
        colour = PALETTE[number] if few else GREY
        said = label(name) if few else ("each category" if number == 0 else None)
        axes.plot(at, values, color=colour, linewidth=0.9, alpha=0.8, label=said)
    averages = [factor * history.average(measure, release) for release in releases]
    marker = "o" if len(at) <= _FEW_POINTS else ""
    axes.plot(at, averages, color="black", linewidth=2.2, marker=marker, ms=4, label=AVERAGE)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    tidy(axes)


def draw_categories(history: History) -> "Figure | None":
    """Each measure by category: the newest release against release 0.

    Args:
        history: The run.

    Returns:
        None where nothing was measured.
    """
    if not history.measures:
        return None
    n_bars = min(max(len(history.n_examples(one)) for one in history.measures), _MOST_BARS) + 1
    width = 1.6 + 3.4 * len(history.measures)
    figure = new_figure(width, 1.3 + 0.34 * n_bars)
    grid = figure.subplots(1, len(history.measures), squeeze=False)[0]
    for axes, measure in zip(grid, history.measures, strict=True):
        _draw_category_bars(axes, history, measure)
    figure.legend(
        *grid[0].get_legend_handles_labels(), loc="outside lower center", ncol=2, fontsize=8
    )
    return figure


def _draw_category_bars(axes: "Axes", history: History, measure: Measure) -> None:
    n_examples = history.n_examples(measure)
    largest = sorted(n_examples, key=lambda name: -n_examples[name])[:_MOST_BARS]
    shown = [name for name in n_examples if name in set(largest)]
    at = np.arange(len(shown) + 1)
    last = max(history.releases(measure))
    releases = [n for n in (0, last) if n in history.releases(measure)]
    factor = scale(measure)
    for release in dict.fromkeys(releases):
        scores = history.by_category(measure, release)
        average = factor * history.average(measure, release)
        values = [*(factor * scores[name] for name in shown), average]
        alone = len(set(releases)) == 1
        offset = 0.0 if alone else (-0.2 if release == 0 else 0.2)
        colour = GREY if release == 0 else BLUE
        drawn = axes.barh(
            at + offset,
            values,
            0.8 if alone else 0.4,
            color=colour,
            label=f"release {release}",
            linewidth=0,
        )
        digits = 0 if measure is Measure.EXACT_MATCH else 2
        axes.bar_label(drawn, [f"{value:.{digits}f}" for value in values], fontsize=7, padding=2)
    names = [*(label(name) for name in shown), AVERAGE]
    axes.set_yticks(at, names, fontsize=8)
    axes.get_yticklabels()[-1].set_fontweight("bold")
    axes.axhline(len(shown) - 0.5, color="black", linewidth=0.6)
    axes.set_ylim(len(shown) + 0.6, -0.6)
    axes.margins(x=0.15)
    axes.set_xlabel(AXIS_NAMES[measure], fontsize=9)
    better = "lower is better" if measure.lower_is_better else "higher is better"
    left = len(n_examples) > len(shown)
    rest = f"\nthe {len(shown)} with most records of {len(n_examples)} categories" if left else ""
    axes.set_title(f"{MEASURE_NAMES[measure]} ({better}){rest}", fontsize=9)
    tidy(axes)


# What it sent and spent


def draw_bytes(history: History) -> "Figure | None":
    """Bytes up and down: of each round, and cumulated.

    Args:
        history: The run.

    Returns:
        None where nothing was sent.
    """
    if not history.n_bytes_up + history.n_bytes_down:
        return None
    numbers = np.array([note.number for note in history.rounds])
    up = np.array([float(note.bytes_up) for note in history.rounds])
    down = np.array([float(note.bytes_down) for note in history.rounds])
    figure = new_figure(11, 3.4)
    rounds, total = figure.subplots(1, 2)
    divisor, unit = bytes_unit(max(up.max(), down.max()))
    # An update is as large as a release, so one line may lie on the other: the lower one is wide.
    for said, values, colour, place, width in (
        ("up: updates", up / divisor, BLUE, -0.2, 5.0),
        ("down: releases", down / divisor, ORANGE, 0.2, 1.8),
    ):
        if len(numbers) <= _FEW_POINTS:
            rounds.bar(numbers + place, values, 0.4, color=colour, label=said, linewidth=0)
        else:
            rounds.step(numbers, values, where="mid", color=colour, label=said, linewidth=width)
    rounds.set_ylim(0)
    rounds.set_ylabel(f"{unit} in the round", fontsize=9)
    divisor, unit = bytes_unit(up.sum() + down.sum())
    series = (
        ("up", up, BLUE, "-", 5.0),
        ("down", down, ORANGE, "-", 1.8),
        ("both", up + down, "black", "--", 1.2),
    )
    for said, values, colour, line, width in series:
        so_far = [0.0, *(np.cumsum(values) / divisor)]
        total.plot([0, *numbers], so_far, line, color=colour, label=said, linewidth=width)
    total.set_ylabel(f"{unit} so far", fontsize=9)
    total.set_ylim(0)
    for axes in (rounds, total):
        _finish_rounds(axes)
    return figure


def draw_epsilon(history: History) -> "Figure | None":
    """The ε spent after each round, under the guarantee's own words.

    Args:
        history: The run.

    Returns:
        None without differential privacy.
    """
    spent = [(note.number, note.epsilon) for note in history.rounds if note.epsilon is not None]
    if not spent:
        return None
    numbers = [number for number, _ in spent]
    values = [epsilon for _, epsilon in spent]
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    axes.step([0, *numbers], [0.0, *values], where="post", color=BLUE, linewidth=1.8)
    if len(spent) <= _FEW_POINTS:
        axes.plot(numbers, values, "o", color=BLUE, ms=4)
    axes.annotate(
        f"{values[-1]:.3g}",
        (numbers[-1], values[-1]),
        xytext=(0, 5),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )
    axes.set_ylim(0, 1.15 * max(values) or 1.0)
    axes.set_ylabel("largest ε of any agent", fontsize=9)
    axes.set_title(_wrapped(history.card.guarantee, 100), fontsize=8)
    _finish_rounds(axes, legend=False)
    return figure


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(plain(text).replace("$", r"\$"), width))


# How long it took


def draw_durations(history: History) -> "Figure | None":
    """Simulated time: of each round, and since the beginning.

    Args:
        history: The run.

    Returns:
        None where there is no population, and no time passes.
    """
    known = [
        (note.number, note.waited_s or 0.0, note.duration_s, note.release is None)
        for note in history.rounds
        if note.duration_s is not None
    ]
    if not known:
        return None
    numbers = np.array([row[0] for row in known])
    waited = np.array([row[1] for row in known])
    opened = np.array([row[2] for row in known])
    failed = np.array([row[3] for row in known])
    figure = new_figure(11, 3.4)
    rounds, total = figure.subplots(1, 2)
    divisor, unit = time_unit(float((waited + opened).max()))
    _stack(
        rounds,
        numbers,
        {
            "waiting for agents": (waited / divisor, GREY),
            "open, then closed with a release": (np.where(failed, 0.0, opened) / divisor, BLUE),
            "open, then failed": (np.where(failed, opened, 0.0) / divisor, ORANGE),
        },
    )
    rounds.set_ylabel(f"simulated {unit}", fontsize=9)
    since = np.cumsum(waited + opened)
    divisor, unit = time_unit(float(since[-1]))
    total.plot([0, *numbers], [0.0, *(since / divisor)], color="black")
    total.set_ylabel(f"simulated {unit} since the beginning", fontsize=9)
    total.set_ylim(0)
    _finish_rounds(rounds)
    _finish_rounds(total, legend=False)
    return figure


def draw_times(history: History) -> "Figure | None":
    """What the simulation itself took: training against server, and the clock, by round.

    Args:
        history: The run.

    Returns:
        None where there was no round.
    """
    if not history.rounds:
        return None
    numbers = np.array([note.number for note in history.rounds])
    train = np.array([note.train_s for note in history.rounds])
    server = np.array([note.server_s for note in history.rounds])
    wall = np.array([note.wall_s for note in history.rounds])
    divisor, unit = time_unit(float(max((train + server).max(), wall.max())))
    figure = new_figure(8, 3.4)
    axes = figure.subplots()
    _stack(
        axes,
        numbers,
        {"training": (train / divisor, BLUE), "server": (server / divisor, ORANGE)},
    )
    if len(numbers) <= _FEW_POINTS:
        axes.hlines(
            wall / divisor,
            numbers - 0.4,
            numbers + 0.4,
            color="black",
            linewidth=1.6,
            label="clock",
        )
    else:
        axes.step(numbers, wall / divisor, where="mid", color="black", linewidth=0.8, label="clock")
    axes.set_ylabel(unit, fontsize=9)
    if wall.sum() > 0.0:
        share = 100.0 * server.sum() / (train.sum() + server.sum() or 1.0)
        axes.set_title(f"server: {share:.1f} % of both together", fontsize=9, loc="left")
    _finish_rounds(axes)
    return figure


def _stack(
    axes: "Axes", numbers: "np.ndarray", parts: Mapping[str, tuple["np.ndarray", str]]
) -> None:
    width = 0.8 if len(numbers) <= _FEW_POINTS else 1.0
    floor = np.zeros(len(numbers))
    for said, (heights, colour) in parts.items():
        if heights.any():
            axes.bar(numbers, heights, width, bottom=floor, color=colour, label=said, linewidth=0)
        floor = floor + heights


def _finish_rounds(axes: "Axes", *, legend: bool = True) -> None:
    axes.set_xlabel("round", fontsize=9)
    whole_numbers(axes)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    tidy(axes)
    if legend:
        legend_above(axes)

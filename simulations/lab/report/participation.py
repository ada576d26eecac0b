"""Who took part: clients by rounds, what became of those selected, and how often each counted."""

from typing import TYPE_CHECKING, Final

import numpy as np

from simulations.lab.records import Fate
from simulations.lab.report.drawing import (
    BLUE,
    FATE_COLOURS,
    PALE,
    new_figure,
    tidy,
    whole_numbers,
)
from simulations.lab.report.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ROWS: Final = 150
"""Of the grid; more clients share rows."""
_MOST_BARS: Final = 20


def draw_participation(history: History) -> "Figure | None":
    """Clients by rounds, coloured by what became of them; fates by round; how often each counted.

    More than 150 clients share rows: the colour is then how many of a row's clients counted.

    Args:
        history: The run.

    Returns:
        None where no round selected anyone, and of a baseline.
    """
    if not history.is_federated or not any(note.fates for note in history.rounds):
        return None
    grid = fate_grid(history)
    n_clients, n_rounds = grid.shape
    many = n_clients > _MOST_ROWS
    height = 4.2 if many else min(max(0.8 + 0.16 * n_clients, 1.6), 6.0)
    figure = new_figure(11, height + 2.6)
    axes = figure.subplots(2, 2, width_ratios=(3.4, 1), height_ratios=(height, 2.0))
    (_draw_bands if many else _draw_grid)(axes[0, 0], grid)
    _draw_fates(axes[1, 0], grid)
    axes[1, 0].set_xlim(0.5, n_rounds + 0.5)
    _draw_histogram(axes[0, 1], grid)
    axes[1, 1].set_visible(False)
    figure.legend(
        *axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncol=7, fontsize=8
    )
    return figure


def fate_grid(history: History) -> np.ndarray:
    """What became of each client in each round.

    Args:
        history: The run.

    Returns:
        [N, R] int8: the fate's place in `Fate`, or -1 where the round did not select the client.
        N is the largest of the card's clients and those that were selected.
    """
    places = {fate: place for place, fate in enumerate(Fate)}
    columns = {note.number: column for column, note in enumerate(history.rounds)}
    rows = list(history.fates())
    n_clients = max([history.card.n_clients, *(agent + 1 for _, agent, _ in rows)])
    grid = np.full((n_clients, len(history.rounds)), -1, np.int8)
    for note, agent, fate in rows:
        grid[agent, columns[note.number]] = places[fate]
    return grid


def _extent(grid: np.ndarray) -> tuple[float, float, float, float]:
    return 0.5, grid.shape[1] + 0.5, len(grid) - 0.5, -0.5


def _draw_grid(axes: "Axes", grid: np.ndarray) -> None:
    from matplotlib.colors import ListedColormap  # noqa: PLC0415 - slow to import

    colours = ListedColormap([PALE, *(FATE_COLOURS[fate] for fate in Fate)])
    axes.imshow(
        grid + 1,
        cmap=colours,
        vmin=-0.5,
        vmax=len(Fate) + 0.5,
        aspect="auto",
        interpolation="nearest",
        extent=_extent(grid),
    )
    if grid.size <= 4000:
        axes.set_xticks(np.arange(grid.shape[1]) + 0.5, minor=True)
        axes.set_yticks(np.arange(len(grid)) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
    axes.set_title("each client in each round (pale: not selected)", fontsize=9)
    axes.set_ylabel("client", fontsize=9)
    _finish(axes)


def _draw_bands(axes: "Axes", grid: np.ndarray) -> None:
    size = -(-len(grid) // _MOST_ROWS)
    starts = np.arange(0, len(grid), size)
    counted = np.add.reduceat(grid == list(Fate).index(Fate.COUNTED), starts, axis=0, dtype=int)
    shown = axes.imshow(
        np.ma.masked_equal(counted, 0),
        cmap="viridis_r",
        vmin=0.5,
        vmax=max(int(counted.max()), 1) + 0.5,
        aspect="auto",
        interpolation="nearest",
        extent=_extent(grid),
    )
    axes.set_facecolor(PALE)
    bar = axes.figure.colorbar(shown, ax=axes, pad=0.01, aspect=30)
    bar.ax.tick_params(labelsize=8)
    whole_numbers(bar.ax, along="y")
    axes.set_title(f"how many of each {size} clients counted (pale: none)", fontsize=9)
    axes.set_ylabel("client", fontsize=9)
    _finish(axes)


def _draw_fates(axes: "Axes", grid: np.ndarray) -> None:
    n_rounds = grid.shape[1]
    at = np.arange(1, n_rounds + 1)
    floor = np.zeros(n_rounds)
    width = 0.8 if n_rounds <= 60 else 1.0
    for place, fate in enumerate(Fate):
        heights = (grid == place).sum(axis=0)
        if heights.any():
            axes.bar(
                at,
                heights,
                width,
                bottom=floor,
                color=FATE_COLOURS[fate],
                label=fate.value.replace("-", " "),
                linewidth=0,
            )
        floor += heights
    axes.set_xlabel("round", fontsize=9)
    axes.set_ylabel("agents selected", fontsize=9)
    whole_numbers(axes, along="y")
    _finish(axes)


def _draw_histogram(axes: "Axes", grid: np.ndarray) -> None:
    counted = (grid == list(Fate).index(Fate.COUNTED)).sum(axis=1)
    most = int(counted.max())
    if most <= _MOST_BARS:
        at = np.arange(most + 1)
        heights = [int((counted == number).sum()) for number in at]
        drawn = axes.bar(at, heights, 0.8, color=BLUE, linewidth=0)
        if most <= 10:
            axes.bar_label(drawn, [str(n) if n else "" for n in heights], fontsize=7)
    else:
        axes.hist(counted.tolist(), bins=_MOST_BARS, color=BLUE)
    axes.margins(y=0.1)
    never = 100.0 * float((counted == 0).mean())
    axes.set_title(f"mean {counted.mean():.1f} rounds; never: {never:.0f} %", fontsize=9)
    axes.set_xlabel("rounds in which a client counted", fontsize=9)
    axes.set_ylabel("clients", fontsize=9)
    whole_numbers(axes, along="y")
    _finish(axes)


def _finish(axes: "Axes") -> None:
    whole_numbers(axes)
    tidy(axes)

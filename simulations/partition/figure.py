"""How a partition looks: a figure and a table of category by client."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from edge_agent.plain_text import escaped, plain
from simulations.errors import OutputError
from simulations.partition.schemes import DRAWN_SCHEMES, IndexArray, Partition

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PALETTE: Final = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#555555"),
    *("#882255", "#88ccee"),
)
"""Okabe and Ito's colours, which the colour-blind can tell apart, and two more."""
_MOST_ROWS: Final = 12


def draw(partition: Partition, categories: Sequence[str], path: Path) -> None:
    """Draw each client's records by category: one bar a client, largest first.

    Beside it, how many clients hold how many categories.

    Args:
        partition: What to draw.
        categories: The column that was split.
        path: A PNG.

    Raises:
        PartitionError: The column has another number of records.
        OutputError: The picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    names, counts = partition.counts(categories)  # [N, C]
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    bars, spread = figure.subplots(1, 2, width_ratios=(4.2, 1))
    _draw_bars(bars, partition, names, counts)
    _draw_spread(spread, counts)
    handles, labels = bars.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside lower center", ncol=min(len(names), 8), fontsize=8
    )
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # a folder that is not there; an unknown ending
        msg = f"cannot draw {path}: {error}"
        raise OutputError(msg) from error


def _draw_bars(
    bars: "Axes", partition: Partition, names: tuple[str, ...], counts: IndexArray
) -> None:
    order = np.argsort(-partition.sizes, kind="stable")
    at = np.arange(len(order))
    floor = np.zeros(len(order))
    width = 1.0 if len(order) > 40 else 0.8
    for number, name in enumerate(names):
        heights = counts[order, number]
        colour = _PALETTE[number % len(_PALETTE)]
        bars.bar(at, heights, width, bottom=floor, color=colour, label=_label(name), linewidth=0)
        floor += heights
    mean = float(partition.sizes.mean())
    bars.axhline(mean, color="black", linewidth=0.8, linestyle=":")
    bars.annotate(
        f"mean {mean:.0f}",
        (1, mean),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 2),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    bars.set_xlim(-0.6, len(order) - 0.4)
    bars.set_ylim(0, 1.08 * float(partition.sizes.max()))
    if len(order) <= 20:
        bars.set_xticks(at, [str(number) for number in order])
    bars.set_xlabel("client, largest first" if len(order) > 20 else "client")
    bars.set_ylabel("records")
    recipe = partition.recipe
    bars.set_title(
        f"{recipe.scheme.value}: {partition.n_records - partition.held_out.size:,} records over "
        f"{recipe.n_clients} clients ({partition.sizes.min()} to {partition.sizes.max()}), "
        f"{partition.held_out.size} held out, seed {recipe.seed}",
        fontsize=10,
    )


def _label(name: str) -> str:
    """A category as matplotlib writes it, which reads `$` as mathematics and hides `_…`."""
    text = plain(name).replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def _draw_spread(spread: "Axes", counts: IndexArray) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - slow to import

    held = (counts > 0).sum(axis=1)
    at = np.arange(1, counts.shape[1] + 1)
    heights = [int((held == number).sum()) for number in at]
    drawn = spread.bar(at, heights, 0.8, color="#555555")
    spread.bar_label(drawn, [str(n) if n else "" for n in heights], fontsize=8)
    spread.set_xticks(at)
    spread.set_xlabel("categories held")
    spread.set_ylabel("clients")
    spread.yaxis.set_major_locator(MaxNLocator(integer=True))
    spread.set_title("Categories of a client", fontsize=10)


def table(partition: Partition, categories: Sequence[str]) -> Table:
    """Records by client and category; of many clients the largest and smallest, and the sums."""
    names, counts = partition.counts(categories)
    recipe = partition.recipe
    shown = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"{recipe.scheme.value}, {recipe.n_clients} clients, seed {recipe.seed}",
    )
    shown.add_column("client", no_wrap=True)
    for name in names:
        # Ten columns of numbers on a terminal of eighty.
        heading = "\n".join(escaped(part[:5]) for part in name.split("_"))
        shown.add_column(heading, justify="right")
    shown.add_column("records", justify="right", style="bold")
    shown.add_column("kinds", justify="right")
    order = np.argsort(-partition.sizes, kind="stable").tolist()
    half = _MOST_ROWS // 2
    head, tail = (order, []) if len(order) <= _MOST_ROWS else (order[:half], order[-half:])
    for client in head:
        shown.add_row(*_cells(str(client), counts[client]))
    if tail:
        shown.add_row("…", *("…" for _ in range(len(names) + 2)), style="dim")
    for client in tail:
        shown.add_row(*_cells(str(client), counts[client]))
    shown.add_section()
    held_out = np.array([recipe.n_held_out] * len(names))
    shown.add_row(*_cells("held out", held_out), style="dim")
    shown.add_row(*_cells("all", counts.sum(axis=0) + held_out), style="bold")
    return shown


def as_json(partition: Partition, categories: Sequence[str]) -> dict[str, Any]:
    """The partition in numbers: sizes and categories of each client; no indices."""
    names, counts = partition.counts(categories)
    recipe = partition.recipe
    return {
        "scheme": recipe.scheme.value,
        "seed": recipe.seed,
        "alpha": recipe.alpha if recipe.scheme in DRAWN_SCHEMES else None,
        "n_records": partition.n_records,
        "n_held_out": int(partition.held_out.size),
        "n_tries": partition.n_tries,
        "smallest": int(partition.sizes.min()),
        "largest": int(partition.sizes.max()),
        "categories": list(names),
        "clients": [
            {"n_records": sum(row), "by_category": dict(zip(names, row, strict=True))}
            for row in counts.tolist()
        ],
    }


def _cells(name: str, counts: IndexArray) -> list[str]:
    row = [str(count) if count else "·" for count in counts.tolist()]
    return [name, *row, str(counts.sum()), str((counts > 0).sum())]

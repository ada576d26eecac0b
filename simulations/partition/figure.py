"""How a partition looks: the figure, Figure 2 of arXiv 2305.05644, and a table.

What is drawn as categories is the column that was given: languages or files, where those were
split. A column of more than ten values shows the largest, and the rest as one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from edge_agent.plain_text import escaped, plain
from simulations.errors import OutputError, PartitionError
from simulations.partition.columns import CATEGORY, FILE, LANGUAGE
from simulations.partition.heterogeneity import Heterogeneity, measure_heterogeneity
from simulations.partition.schemes import DRAWN_SCHEMES, IndexArray, Partition

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

_PALETTE: Final = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#555555"),
    *("#882255", "#bbbbbb"),
)
"""Okabe and Ito's colours, which the colour-blind can tell apart, and two more."""
_MOST_ROWS: Final = 12
_PANELS_A_ROW: Final = 4
_MOST_SHOWN: Final = 3 * _PANELS_A_ROW - 1
_MOST_SIGNS: Final = 24
_LEGEND_SIGNS, _LEGEND_KEY_SIGNS = 175, 7
"""What fits in one line of the legend, and what of it the key of each entry takes."""
_PLURALS: Final = {CATEGORY: "categories", LANGUAGE: "languages", FILE: "files"}


def default_clients(partition: Partition) -> tuple[int, ...]:
    """The clients that are held against the federation: smallest, median and largest.

    They are also those who train alone where a federation is compared with local models.

    Args:
        partition: Of any number of clients.

    Returns:
        Numbers of clients, each once; fewer than three where there are fewer clients.
    """
    order = np.argsort(partition.sizes, kind="stable").tolist()
    return tuple(dict.fromkeys((order[0], order[len(order) // 2], order[-1])))


def draw(
    partition: Partition,
    categories: Sequence[str],
    path: Path,
    *,
    clients: Sequence[int] | None = None,
    by: str = CATEGORY,
) -> None:
    """Draw the paper's Figure 2: category by client, and local against federated.

    Above, each client's records by category, one bar a client, largest first; beside it, how many
    clients hold how many categories. Below, what single clients hold, in shares, beside what all
    clients hold together: what a model trained alone sees, and what the federation's sees.

    Args:
        partition: What to draw.
        categories: The column that was split, or another one of the same records.
        path: A PNG.
        clients: Numbers of those to hold against the federation; None: `default_clients`.
        by: The name of the column.

    Raises:
        PartitionError: The column has another number of records; a client that is not there, or
            more than 11.
        OutputError: The picture cannot be written.

    Source: arXiv 2305.05644, Figure 2. Its 2b shows one client beside all; here several, so that
    large and small ones are seen.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    names, counts = partition.counts(categories)  # [N, C]
    if clients is None:
        chosen = default_clients(partition)
    else:
        chosen = checked_clients(clients, n_clients=len(partition.clients))
    unlike = measure_heterogeneity(counts)
    columns, groups = _grouped(names, counts)
    n_rows = -(-(len(chosen) + 1) // _PANELS_A_ROW)
    below = (0.6 + 0.24 * len(columns) + 0.6) * n_rows + 0.4  # inches
    figure = Figure(figsize=(12, 5.0 + below), layout="constrained")
    FigureCanvasAgg(figure)
    halves = figure.subfigures(2, 1, squeeze=False, height_ratios=(5.0, below), hspace=0.02)
    top, bottom = halves[:, 0]
    bars, spread = top.subplots(1, 2, width_ratios=(4.2, 1))
    _draw_bars(bars, partition, columns, groups, chosen)
    bars.set_title(_title(partition, unlike, by), fontsize=10)
    _draw_spread(spread, counts, by)
    handles, labels = bars.get_legend_handles_labels()
    top.legend(
        handles, labels, loc="outside lower center", ncol=_n_legend_columns(labels), fontsize=8
    )
    _draw_panels(bottom, columns, groups, chosen, _captions(partition, counts, unlike, chosen, by))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # a folder that is not there; an unknown ending
        msg = f"cannot draw {path}: {error}"
        raise OutputError(msg) from error


def checked_clients(clients: Sequence[int], *, n_clients: int) -> tuple[int, ...]:
    """The clients to hold against the federation, each once.

    Args:
        clients: Their numbers.
        n_clients: How many clients there are.

    Raises:
        PartitionError: One that is not there, none at all, or more than 11.
    """
    beyond = next((number for number in clients if not 0 <= number < n_clients), None)
    if beyond is not None:
        msg = f"there is no client {beyond} to show: they are numbered 0 to {n_clients - 1}"
        raise PartitionError(msg)
    chosen = tuple(dict.fromkeys(clients))
    if not 1 <= len(chosen) <= _MOST_SHOWN:
        msg = f"{len(chosen)} clients to show; choose 1 to {_MOST_SHOWN}"
        raise PartitionError(msg)
    return chosen


def _grouped(names: tuple[str, ...], counts: IndexArray) -> tuple[tuple[str, ...], IndexArray]:
    """At most as many columns as there are colours: the largest, and the others as one."""
    if len(names) <= len(_PALETTE):
        return names, counts
    n_kept = len(_PALETTE) - 1
    largest = np.sort(np.argsort(-counts.sum(axis=0), kind="stable")[:n_kept])
    rest = counts.sum(axis=1) - counts[:, largest].sum(axis=1)
    shown = (*(names[number] for number in largest.tolist()), f"{len(names) - n_kept} others")
    return shown, np.column_stack([counts[:, largest], rest])


def _n_legend_columns(labels: Sequence[str]) -> int:
    """As many columns as are not wider than the figure; matplotlib fills them one by one."""
    for n_columns in range(min(len(labels), 8), 1, -1):
        columns = np.array_split(np.array([len(label) for label in labels]), n_columns)
        if sum(int(lengths.max()) + _LEGEND_KEY_SIGNS for lengths in columns) <= _LEGEND_SIGNS:
            return n_columns
    return 1


def _title(partition: Partition, unlike: Heterogeneity, by: str) -> str:
    recipe = partition.recipe
    split_by = "" if by == CATEGORY else f", by {_label(by)}"
    return (
        f"{recipe.scheme.value}{split_by}: {_n_given(partition):,} records over "
        f"{recipe.n_clients} clients ({partition.sizes.min()} to {partition.sizes.max()}), "
        f"{partition.held_out.size} held out, seed {recipe.seed}\n"
        f"mean total variation (TV) from all clients: {unlike.mean_total_variation:.2f}; "
        f"Gini of volumes: {unlike.volume_gini:.2f}"
    )


def _n_given(partition: Partition) -> int:
    return partition.n_records - partition.held_out.size


def _draw_bars(
    bars: "Axes",
    partition: Partition,
    names: tuple[str, ...],
    counts: IndexArray,
    chosen: tuple[int, ...],
) -> None:
    order = np.argsort(-partition.sizes, kind="stable")
    at = np.arange(len(order))
    floor = np.zeros(len(order))
    width = 1.0 if len(order) > 40 else 0.8
    for number, name in enumerate(names):
        heights = counts[order, number]
        colour = _PALETTE[number]
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
    for place in np.flatnonzero(np.isin(order, chosen)).tolist():
        bars.annotate(
            f"{order[place]}\n▾",
            (place, floor[place]),
            ha="center",
            va="bottom",
            fontsize=8,
            linespacing=0.9,
        )
    margin = 0.5 + max(0.1, 0.015 * len(order))
    bars.set_xlim(-margin, len(order) - 1 + margin)
    bars.set_ylim(0, 1.15 * float(partition.sizes.max()))
    if len(order) <= 20:
        bars.set_xticks(at, [str(number) for number in order])
    what = "client, largest first" if len(order) <= 20 else "rank of the client by volume"
    bars.set_xlabel(f"{what}; numbered at their bars: the clients below")
    bars.set_ylabel("records")


def _label(name: str) -> str:
    """A category as matplotlib writes it, which reads `$` as mathematics and hides `_…`."""
    text = plain(name)
    if len(text) > _MOST_SIGNS:
        text = text[: _MOST_SIGNS - 1] + "…"
    text = text.replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def _plural(by: str) -> str:
    return _PLURALS.get(by, f"values of {_label(by)}")


def _draw_spread(spread: "Axes", counts: IndexArray, by: str) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - slow to import

    held = (counts > 0).sum(axis=1)
    at = np.arange(1, counts.shape[1] + 1)
    heights = [int((held == number).sum()) for number in at]
    width = 0.8 if len(at) <= len(_PALETTE) else 1.0
    drawn = spread.bar(at, heights, width, color="#555555")
    if len(at) <= len(_PALETTE):
        spread.bar_label(drawn, [str(n) if n else "" for n in heights], fontsize=8)
        spread.set_xticks(at)
    spread.set_xlim(0.4, len(at) + 0.6)
    spread.set_xlabel(f"{_plural(by)} held")
    spread.set_ylabel("clients")
    spread.yaxis.set_major_locator(MaxNLocator(integer=True))
    spread.set_title(f"{_plural(by).capitalize()} of a client", fontsize=10)


def _captions(
    partition: Partition,
    counts: IndexArray,
    unlike: Heterogeneity,
    chosen: tuple[int, ...],
    by: str,
) -> list[str]:
    """What stands above each panel: those of the chosen clients, and the federation's."""
    ranks = dict(zip(default_clients(partition), ("smallest", "median", "largest"), strict=False))
    held = (counts > 0).sum(axis=1)
    n_all = int((counts.sum(axis=0) > 0).sum())
    captions = []
    for number in chosen:
        rank = f", {ranks[number]}" if number in ranks and len(ranks) == 3 else ""
        variation = unlike.total_variation[number]
        captions.append(
            f"client {number}{rank}: {partition.sizes[number]:,} records\n"
            f"{held[number]} of {n_all} {_plural(by)}, TV {variation:.2f}"
        )
    whole = f"all {len(partition.clients)} clients: {_n_given(partition):,} records"
    return [*captions, f"{whole}\n{n_all} {_plural(by)}"]


def _draw_panels(
    below: "SubFigure",
    names: tuple[str, ...],
    counts: IndexArray,
    chosen: tuple[int, ...],
    captions: list[str],
) -> None:
    """One panel for each chosen client, with the federation as marks, and one of the federation."""
    federation = counts.sum(axis=0) / counts.sum()  # [C]
    local = [counts[number] / counts[number].sum() for number in chosen]
    n_rows = -(-len(captions) // _PANELS_A_ROW)
    n_columns = min(len(captions), _PANELS_A_ROW)
    grid = below.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
    panels = grid.ravel()
    for panel in panels[len(captions) :]:
        panel.set_visible(False)
    at = np.arange(len(names))
    colours = [_PALETTE[number] for number in range(len(names))]
    end = 100.0 * max(float(shares.max()) for shares in (*local, federation))
    for panel, shares, caption in zip(panels, (*local, federation), captions, strict=False):
        panel.barh(at, 100.0 * shares, 0.72, color=colours, linewidth=0)
        if shares is not federation:
            panel.vlines(100.0 * federation, at - 0.46, at + 0.46, color="black", linewidth=1.8)
            for place in np.flatnonzero(shares == 0).tolist():
                right = 100.0 * float(federation[place]) + 0.02 * end
                panel.text(right, place, "none", va="center", fontsize=7, color="#555555")
        panel.set_title(caption, fontsize=9)
        panel.set_xlabel("% of records", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.xaxis.set_tick_params(labelbottom=True)
    panels[0].set_yticks(at, [_label(name) for name in names])
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    panels[0].set_xlim(0, 1.1 * end)
    below.suptitle(
        "Local against federated: bars, a client's own records; black marks, all clients together",
        fontsize=10,
    )


def table(partition: Partition, categories: Sequence[str], *, by: str = CATEGORY) -> Table:
    """Records by client and category; of many clients the largest and smallest, and the sums.

    Args:
        partition: What to show.
        categories: The column that was split.
        by: Its name.

    Raises:
        PartitionError: The column has another number of records.
    """
    names, all_counts = partition.counts(categories)
    columns, counts = _grouped(names, all_counts)
    kinds = (all_counts > 0).sum(axis=1).tolist()
    split_by = "" if by == CATEGORY else f", by {escaped(by)}"
    recipe = partition.recipe
    shown = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"{recipe.scheme.value}{split_by}, {recipe.n_clients} clients, seed {recipe.seed}",
    )
    shown.add_column("client", no_wrap=True)
    # Ten columns of numbers on a terminal of eighty.
    width = max(5, 44 // len(columns))
    for name in columns:
        parts = name.replace(" ", "_").split("_")
        heading = "\n".join(escaped(part[:width]) for part in parts)
        shown.add_column(heading, justify="right")
    shown.add_column("records", justify="right", style="bold")
    shown.add_column("kinds", justify="right")
    order = np.argsort(-partition.sizes, kind="stable").tolist()
    half = _MOST_ROWS // 2
    head, tail = (order, []) if len(order) <= _MOST_ROWS else (order[:half], order[-half:])
    for client in head:
        shown.add_row(*_cells(str(client), counts[client], kinds[client]))
    if tail:
        shown.add_row("…", *("…" for _ in range(len(columns) + 2)), style="dim")
    for client in tail:
        shown.add_row(*_cells(str(client), counts[client], kinds[client]))
    shown.add_section()
    held_out = np.array([recipe.n_held_out] * len(columns))
    held_out[-1] *= len(names) - len(columns) + 1  # the last may stand for several
    n_kinds = len(names)
    shown.add_row(*_cells("held out", held_out, n_kinds if held_out.any() else 0), style="dim")
    shown.add_row(*_cells("all", counts.sum(axis=0) + held_out, n_kinds), style="bold")
    return shown


def as_json(
    partition: Partition, categories: Sequence[str], *, by: str = CATEGORY
) -> dict[str, Any]:
    """The partition in numbers: sizes and categories of each client; no indices.

    Args:
        partition: What to tell of.
        categories: The column that was split.
        by: Its name.

    Raises:
        PartitionError: The column has another number of records.
    """
    names, counts = partition.counts(categories)
    unlike = measure_heterogeneity(counts)
    recipe = partition.recipe
    return {
        "scheme": recipe.scheme.value,
        "by": by,
        "seed": recipe.seed,
        "alpha": recipe.alpha if recipe.scheme in DRAWN_SCHEMES else None,
        "n_records": partition.n_records,
        "n_held_out": int(partition.held_out.size),
        "n_tries": partition.n_tries,
        "smallest": int(partition.sizes.min()),
        "largest": int(partition.sizes.max()),
        "heterogeneity": unlike.as_json(),
        "categories": list(names),
        "clients": [
            {
                "n_records": sum(row),
                "total_variation": variation,
                "by_category": dict(zip(names, row, strict=True)),
            }
            for row, variation in zip(counts.tolist(), unlike.total_variation.tolist(), strict=True)
        ],
    }


def _cells(name: str, counts: IndexArray, n_kinds: int) -> list[str]:
    row = [str(count) if count else "·" for count in counts.tolist()]
    return [name, *row, str(counts.sum()), str(n_kinds)]

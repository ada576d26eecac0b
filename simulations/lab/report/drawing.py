"""What the figures share: colours, words, units, and how a figure becomes a file."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_agent.plain_text import plain
from simulations.files import appearing
from simulations.lab.records import Fate, Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, PALE = "#0072b2", "#d55e00", "#009e73", "#999999", "#f2f2f2"
PALETTE: Final = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#555555"),
    *("#882255", "#bbbbbb"),
)
"""Okabe and Ito's colours, which the colour-blind can tell apart, and two more."""
FATE_COLOURS: Final = {
    Fate.COUNTED: "#0072b2",
    Fate.LATE: "#f0e442",
    Fate.DROPPED: "#bbbbbb",
    Fate.VANISHED: "#cc79a7",
    Fate.CELL_LOST: "#d55e00",
    Fate.FAILED: "#000000",
    Fate.SPENT: "#882255",
    Fate.REMOVED: "#56b4e9",
    Fate.VOID: "#e69f00",
}
MEASURE_NAMES: Final = {
    Measure.LOSS: "held-out loss",
    Measure.EXACT_MATCH: "exact match",
    Measure.ROUGE_L: "ROUGE-L",
}
AXIS_NAMES: Final = {
    Measure.LOSS: "held-out loss, nats a token",
    Measure.EXACT_MATCH: "exact match, %",
    Measure.ROUGE_L: "ROUGE-L",
}
AVERAGE: Final = "average"
_SHORT_TIMES: Final = {
    "milliseconds": "ms",
    "seconds": "s",
    "minutes": "min",
    "hours": "h",
    "days": "days",
}
_MOST_SIGNS: Final = 24
_DPI: Final = 120


def scale(measure: Measure) -> float:
    """What a score is multiplied by where it is shown: an exact match is shown in per cent."""
    return 100.0 if measure is Measure.EXACT_MATCH else 1.0


def score_text(measure: Measure, value: float) -> str:
    """A score with the digits that it deserves."""
    return f"{100.0 * value:.1f} %" if measure is Measure.EXACT_MATCH else f"{value:.3f}"


def label(text: str) -> str:
    """A name as matplotlib writes it, which reads `$` as mathematics and hides `_…`."""
    name = plain(text)
    if len(name) > _MOST_SIGNS:
        name = name[: _MOST_SIGNS - 1] + "…"
    name = name.replace("$", r"\$")
    return " " + name if name.startswith("_") else name


def bytes_unit(largest: float) -> tuple[float, str]:
    """The unit in which a number of bytes is read, and what to divide by."""
    return _unit(largest, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes")))


def time_unit(largest_s: float) -> tuple[float, str]:
    """The unit in which a time is read, and what to divide seconds by."""
    units = ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
    return _unit(largest_s / 2, units) if largest_s >= 1.0 else (1e-3, "milliseconds")


def bytes_text(n_bytes: float) -> str:
    """A number of bytes for people."""
    divisor, unit = bytes_unit(n_bytes)
    return f"{n_bytes:.0f} bytes" if divisor == 1.0 else f"{n_bytes / divisor:.2f} {unit}"


def time_text(time_s: float) -> str:
    """A time for people."""
    divisor, unit = time_unit(time_s)
    return f"{time_s / divisor:.3g} {_SHORT_TIMES[unit]}"


def _unit(largest: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    return next((unit for unit in units if largest >= unit[0]), units[-1])


def new_figure(width: float, height: float) -> "Figure":
    """A figure that is drawn without any display, and that no global list knows.

    Args:
        width: In inches.
        height: In inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def whole_numbers(axes: "Axes", *, along: str = "x") -> None:
    """Put ticks at whole numbers only.

    Args:
        axes: Where.
        along: `x` or `y`.
    """
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - slow to import

    axis = axes.xaxis if along == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def tidy(axes: "Axes") -> None:
    """Take away what is no ink for data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_axisbelow(True)


def legend_above(axes: "Axes", *, n_columns: int = 4) -> None:
    """Say what is what above the axes, where no data is.

    Args:
        axes: Whose.
        n_columns: Entries in a line.
    """
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncol=n_columns,
        fontsize=8,
        frameon=False,
        borderaxespad=0.1,
    )


def as_png(figure: "Figure") -> bytes:
    """The figure as a PNG; equal figures give equal bytes."""
    into = io.BytesIO()
    with warnings.catch_warnings():
        # Names in a script that the font lacks are drawn as boxes; the tables have them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(into, format="png", dpi=_DPI, metadata={"Software": None})
    return into.getvalue()


def write_png(figure: "Figure", path: Path) -> None:
    """Write a figure.

    Args:
        figure: Drawn.
        path: A PNG.

    Raises:
        OutputError: It cannot be written.
    """
    with appearing(path) as file:
        file.write(as_png(figure))

"""How arms compare: relative scores by category."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from simulations.errors import OutputError
from simulations.lab.records import Arm, Measure
from simulations.lab.report.comparison import PAPER_RELATIVE_SCORE, Comparison
from simulations.lab.report.drawing import (
    AVERAGE,
    GREY,
    MEASURE_NAMES,
    PALETTE,
    label,
    new_figure,
    tidy,
    write_png,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PAPER: Final = (
    f"federated in arXiv 2305.05644: {PAPER_RELATIVE_SCORE} (GPT-4’s marks, another measure)"
)
_ARM_COLOURS: Final = {Arm.BASE: GREY, Arm.FEDERATED: PALETTE[0]}
_OTHER_COLOURS: Final = (
    "#d55e00",
    "#e69f00",
    "#cc79a7",
    "#56b4e9",
    "#009e73",
    "#882255",
    "#f0e442",
)


def draw_relative_scores(comparison: Comparison, path: Path) -> None:
    """Draw relative scores by category: bars from 1, which is all data in one place.

    A bar's length is what is lost or won against it; the whisker is a standard deviation over
    seeds, each dot a seed.

    Args:
        comparison: Of runs among which there are centralised ones.
        path: A PNG.

    Raises:
        OutputError: Nothing to draw, as there is no centralised run or no other one, or the picture
            cannot be written.
    """
    series = [name for name in comparison.labels if name != comparison.reference]
    measures = [
        measure
        for measure in comparison.measures
        if comparison.relative
        and any(comparison.relative[name][measure].average for name in series)
    ]
    if not measures:
        msg = f"nothing to draw in {path.name}: run the centralised arm with the same seeds"
        raise OutputError(msg)
    names = {
        measure: sorted(
            {one for name in series for one in comparison.relative[name][measure].by_category}
        )
        for measure in measures
    }
    n_bars = max(len(found) + 1 for found in names.values()) * len(series)
    figure = new_figure(min(max(7.0, 2.0 + 0.22 * n_bars), 30.0), 3.4 * len(measures) + 0.9)
    grid = figure.subplots(len(measures), 1, squeeze=False)[:, 0]
    for axes, measure in zip(grid, measures, strict=True):
        _draw_bars(axes, comparison, measure, series, names[measure])
    figure.legend(
        *grid[0].get_legend_handles_labels(), loc="outside lower center", ncol=3, fontsize=8
    )
    write_png(figure, path)


def _draw_bars(
    axes: "Axes",
    comparison: Comparison,
    measure: Measure,
    series: Sequence[str],
    categories: Sequence[str],
) -> None:
    width = 0.8 / len(series)
    others = iter(_OTHER_COLOURS * len(series))
    for number, name in enumerate(series):
        colour = _ARM_COLOURS.get(comparison.arms[name]) or next(others)
        scores = comparison.relative[name][measure]
        spreads = [*(scores.by_category.get(one) for one in categories), scores.average]
        known = [(place, found) for place, found in enumerate(spreads) if found is not None]
        at = [place + (number + 0.5) * width - 0.4 for place, _ in known]
        heights = [found.mean - 1.0 for _, found in known]
        axes.bar(at, heights, width, bottom=1.0, color=colour, label=label(name), linewidth=0)
        for x, (_, found) in zip(at, known, strict=True):
            if found.std is not None:
                axes.errorbar(
                    x, found.mean, yerr=found.std, color="black", capsize=2, linewidth=0.9
                )
            dots = list(found.by_seed.values())
            axes.plot([x] * len(dots), dots, "o", color="white", mec="black", mew=0.6, ms=2.8)
    axes.axhline(1.0, color="black", linewidth=1.0, label="all data in one place")
    axes.axhline(
        PAPER_RELATIVE_SCORE,
        color="#555555",
        linewidth=0.9,
        linestyle=":",
        label=_PAPER,
    )
    names = [*(label(name).replace("_", "\n") for name in categories), AVERAGE]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.get_xticklabels()[-1].set_fontweight("bold")
    axes.set_xlim(-0.6, len(names) - 0.4)
    how = "centralised’s ÷ the model’s" if measure.lower_is_better else "÷ centralised’s"
    axes.set_title(f"{MEASURE_NAMES[measure]}: {how}; higher is better", fontsize=9)
    axes.set_ylabel("relative score", fontsize=9)
    axes.use_sticky_edges = False  # else the line at 1 is the frame's edge
    axes.margins(y=0.08)
    axes.autoscale_view(scalex=False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    tidy(axes)

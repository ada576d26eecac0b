"""How a sweep looks: utility against ε, bytes as sizes, other settings as colours and shapes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from simulations.errors import OutputError
from simulations.lab.records import Measure
from simulations.lab.report.drawing import (
    AXIS_NAMES,
    BLUE,
    GREY,
    PALETTE,
    bytes_text,
    label,
    new_figure,
    scale,
    tidy,
    write_png,
)
from simulations.lab.report.surface import UNPROTECTED, Surface, SurfaceRow, setting_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHAPES: Final = "os^Dv"
_UNITS: Final = {
    "P1": "for each example (profile P1)",
    "P2": "for each agent (profile P2)",
    "P3": "for each agent, against the public only (profile P3)",
}
_BEST_LINES: Final = ("--", ":", "-.")
_MOST_TICKS: Final = 8
_SMALLEST, _LARGEST = 30.0, 200.0
_LEAST_EPSILON: Final = 1e-3


def draw_surface(surface: Surface, path: Path) -> None:
    """Draw utility against ε, a panel for each measure.

    A point is a combination of settings, with its standard deviation over seeds. Size: bytes per
    agent. Colour and shape: the first two settings that vary and are not ε under another name. A
    ring: on the Pareto front of utility, ε and bytes. A line for each profile, as their ε are of
    different things: the best utility at an ε or less.

    Args:
        surface: With at least one row that was measured.
        path: A PNG.

    Raises:
        OutputError: Nothing was measured, or the picture cannot be written.
    """
    measures = surface.measures
    if not measures:
        msg = f"nothing to draw in {path.name}: no run of the sweep has measured anything yet"
        raise OutputError(msg)
    places, ticks = _places(surface.rows)
    looks = _Looks(surface)
    aside = _aside(surface, places)
    figure = new_figure(5.4 * len(measures) + 0.6, 5.2)
    grid = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, measure in zip(grid, measures, strict=True):
        _draw_best(axes, surface.rows, measure, places)
        beside = [place * factor for place, factor in zip(places, aside, strict=True)]
        _draw_points(axes, surface, measure, beside, looks)
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_xlabel(_axis_name(surface.rows), fontsize=9)
        axes.set_ylabel(AXIS_NAMES[measure], fontsize=9)
        better = "lower is better" if measure.lower_is_better else "higher is better"
        axes.set_title(better, fontsize=9)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        tidy(axes)
    looks.explain(grid[0])
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncol=4 if len(measures) > 1 else 2, fontsize=8
    )
    if looks.left_out:
        names = ", ".join(label(name) for name in looks.left_out)
        figure.suptitle(f"not told apart here: {names}", fontsize=9)
    write_png(figure, path)


def _places(rows: Sequence[SurfaceRow]) -> tuple[list[float], dict[float, str]]:
    """Where rows stand on the axis, and its ticks: without privacy to the right of all ε."""
    spent = sorted({max(row.epsilon, _LEAST_EPSILON) for row in rows if row.epsilon is not None})
    ends = (spent[0], spent[-1]) if spent else (1.0, 1.0)
    far = ends[1] * max(2.5, (ends[1] / ends[0]) ** 0.3)
    places = [far if row.epsilon is None else max(row.epsilon, _LEAST_EPSILON) for row in rows]
    shown = spent
    if len(spent) > _MOST_TICKS:
        shown = [spent[place] for place in np.linspace(0, len(spent) - 1, _MOST_TICKS).astype(int)]
    ticks = {place: f"{place:.3g}" for place in shown}
    if any(row.profile == UNPROTECTED for row in rows):
        ticks[far] = "no DP"
    return places, ticks


def _aside(surface: Surface, places: Sequence[float]) -> list[float]:
    """What places are multiplied by, so that points of one ε do not cover each other.

    Masked and open rounds spend the same and learn the same, so that only the last one drawn would
    be seen. Each combination of settings but ε has a shift of its own, the same at every ε.
    """
    rows = surface.rows
    free = [name for name in surface.axes() if not _is_epsilon(rows, name)]
    who = [tuple(_text(row, name) for name in free) for row in rows]
    order = {one: number for number, one in enumerate(dict.fromkeys(who))}
    stops = np.log(sorted(set(places)))
    if len(order) < 2 or len(set(places)) == len(places):
        return [1.0] * len(rows)
    span = stops[-1] - stops[0] if len(stops) > 1 else 1.0
    gap = np.diff(stops).min(initial=span)
    step = min(0.03 * span, 0.5 * gap / len(order))
    return [float(np.exp(step * (order[one] - (len(order) - 1) / 2))) for one in who]


def _axis_name(rows: Sequence[SurfaceRow]) -> str:
    profiles = sorted({row.profile for row in rows} - {UNPROTECTED})
    if not profiles:
        return "no differential privacy"
    return "ε " + " or ".join(_UNITS.get(profile, f"of profile {profile}") for profile in profiles)


class _Looks:
    """Sizes, colours and shapes of points."""

    def __init__(self, surface: Surface) -> None:
        rows = surface.rows
        free = [name for name in surface.axes() if not _is_epsilon(rows, name)]
        shapes = [name for name in free[1:] if len(_values(rows, name)) <= len(_SHAPES)]
        self.colour_by = free[0] if free else None
        self.shape_by = shapes[0] if shapes else None
        self.left_out = tuple(name for name in free[1:] if name != self.shape_by)
        self._colours = _colours([] if self.colour_by is None else _values(rows, self.colour_by))
        known = [] if self.shape_by is None else _values(rows, self.shape_by)
        self._shapes = dict(zip(known, _SHAPES, strict=False))
        sent = [row.n_bytes_per_agent or 0.0 for row in rows]
        self._bytes = min(sent), max(sent)

    def colour(self, row: SurfaceRow) -> str:
        return BLUE if self.colour_by is None else self._colours[_text(row, self.colour_by)]

    def shape(self, row: SurfaceRow) -> str:
        return _SHAPES[0] if self.shape_by is None else self._shapes[_text(row, self.shape_by)]

    def size(self, n_bytes: float | None) -> float:
        """An area that grows with the bytes."""
        least, most = self._bytes
        if most <= least:
            return 70.0
        return _SMALLEST + (_LARGEST - _SMALLEST) * ((n_bytes or 0.0) - least) / (most - least)

    def explain(self, axes: "Axes") -> None:
        """Entries of the legend, of points that are nowhere."""

        def entry(said: str, *, colour: str = GREY, shape: str = "o", area: float = 50.0) -> None:
            axes.scatter([], [], s=area, color=colour, marker=shape, label=said)

        for value, colour in self._colours.items():
            entry(f"{_last(self.colour_by)} = {label(value)}", colour=colour)
        for value, shape in self._shapes.items():
            entry(f"{_last(self.shape_by)} = {label(value)}", shape=shape)
        least, most = self._bytes
        if most > least:
            for n_bytes in (least, most):
                entry(f"{bytes_text(n_bytes)} per agent", area=self.size(n_bytes))
        elif most > 0.0:
            entry(f"{bytes_text(most)} per agent, all")


def _last(name: str | None) -> str:
    """A dotted key without its section."""
    return label((name or "").rpartition(".")[2])


def _text(row: SurfaceRow, name: str) -> str:
    return setting_text(row.settings[name])


def _values(rows: Sequence[SurfaceRow], name: str) -> list[str]:
    """The values of a setting as text, numbers by size, then the others."""
    found = {_text(row, name): row.settings[name] for row in rows}

    def order(text: str) -> tuple[bool, float, str]:
        value = found[text]
        number = isinstance(value, int | float)
        return not number, float(value) if isinstance(value, int | float) else 0.0, text

    return sorted(found, key=order)


def _colours(values: Sequence[str]) -> dict[str, str]:
    """One for each; of more than there are in the palette, from dark to bright."""
    if len(values) <= len(PALETTE):
        return dict(zip(values, PALETTE, strict=False))
    from matplotlib import colormaps  # noqa: PLC0415 - slow to import
    from matplotlib.colors import to_hex  # noqa: PLC0415 - as above

    shades = colormaps["viridis"](np.linspace(0.0, 0.95, len(values)))
    return {value: to_hex(shade) for value, shade in zip(values, shades, strict=True)}


def _is_epsilon(rows: Sequence[SurfaceRow], name: str) -> bool:
    """Whether a setting says the same as ε: each value has one, and each ε one value."""
    whole = [row for row in rows if not row.n_unfinished] or rows  # a part is not spent yet
    pairs = {(_text(row, name), row.epsilon) for row in whole}
    return len({text for text, _ in pairs}) == len(pairs) == len({spent for _, spent in pairs})


def _draw_points(
    axes: "Axes", surface: Surface, measure: Measure, places: Sequence[float], looks: _Looks
) -> None:
    factor = scale(measure)
    shown = [
        (place, row)
        for place, row in zip(places, surface.rows, strict=True)
        if measure in row.utility
    ]
    for place, row in sorted(shown, key=lambda one: -(one[1].n_bytes_per_agent or 0.0)):
        found = row.utility[measure]
        mean = factor * found.mean
        area = looks.size(row.n_bytes_per_agent)
        if found.std is not None:
            spread = factor * found.std
            axes.errorbar(place, mean, yerr=spread, color=GREY, capsize=2, linewidth=0.8, zorder=2)
        axes.scatter(
            place,
            mean,
            s=area,
            color=looks.colour(row),
            marker=looks.shape(row),
            alpha=0.35 if row.n_unfinished else 1.0,
            edgecolors="white",
            linewidths=0.6,
            zorder=3,
        )
        if row.on_front[measure]:
            axes.scatter(
                place,
                mean,
                s=area + 60.0,
                facecolors="none",
                edgecolors="black",
                linewidths=1.2,
                zorder=4,
            )
    axes.scatter(
        [],
        [],
        s=110,
        facecolors="none",
        edgecolors="black",
        label="Pareto front (utility, ε, bytes)",
    )


def _draw_best(
    axes: "Axes", rows: Sequence[SurfaceRow], measure: Measure, places: Sequence[float]
) -> None:
    """The best that an ε or less gives in each profile, whatever it sends."""
    profiles = sorted({row.profile for row in rows} - {UNPROTECTED})
    sign = 1.0 if measure.lower_is_better else -1.0
    for number, profile in enumerate(profiles):
        known = sorted(
            (place, cost[0])
            for place, row in zip(places, rows, strict=True)
            if row.profile in {profile, UNPROTECTED} and (cost := row.cost(measure)) is not None
        )
        if len({place for place, _ in known}) < 2:
            continue
        best = np.minimum.accumulate([cost for _, cost in known])
        axes.step(
            [place for place, _ in known],
            scale(measure) * sign * best,
            where="post",
            color="black",
            linewidth=0.9,
            linestyle=_BEST_LINES[number % len(_BEST_LINES)],
            label="best at this ε or less" + (f", {profile}" if len(profiles) > 1 else ""),
            zorder=1,
        )

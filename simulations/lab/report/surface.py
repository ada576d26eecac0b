"""A sweep as a surface: what settings give in utility, privacy and traffic, and which are best."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from edge_agent.plain_text import escaped, plain
from simulations.errors import OutputError
from simulations.lab.folder import RunFolder
from simulations.lab.records import Measure, Setting
from simulations.lab.report.drawing import bytes_text
from simulations.lab.report.history import History
from simulations.lab.report.spread import Spread, markdown_table, measure_heading, spread_text
from simulations.lab.report.tables import write_table

if TYPE_CHECKING:
    import pyarrow as pa

UNPROTECTED: Final = "P0"
_TABLE: Final = "surface"
_MARK: Final = "◆"
_TITLE: Final = "Newest releases, average over categories, mean ± standard deviation over seeds"
_REMARKS: Final = (
    f"{_MARK}: no other row is at least as good in this measure, ε and bytes, and better in one",
    (
        "bytes: bodies of messages, up and down, per agent; of masked rounds those of the masked "
        "vectors, without the messages of keys and shares"
    ),
    "ε: the largest that any agent has spent, in any seed",
)


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One combination of settings, as it was run.

    Attributes:
        settings: By dotted key, such as `federation.epsilon`.
        roots: The runs' folders by seed.
    """

    settings: Mapping[str, Setting]
    roots: Mapping[int, Path]


@dataclass(frozen=True, kw_only=True)
class SurfaceRow:
    """What one combination of settings gives.

    Attributes:
        settings: By dotted key.
        seeds: Of its runs.
        utility: By measure, the average over categories of the newest release; those measured.
        epsilon: What the rounds spent, the largest of all seeds; None: no differential privacy, or
            no round yet.
        profile: What ε is of: P1, P2, P3; P0: nothing is promised.
        guarantee: The same in words, of the first seed.
        n_bytes_per_agent: Up and down, a mean over clients and seeds; None: no round noted it.
        attacked: In how many rounds attackers sent something made up, and of how many rounds; all
            seeds together. In the others they were too few for their attack, or not selected. None:
            nobody attacks.
        n_unfinished: Runs that are not finished. Such a row stands on no front.
        on_front: By measure, whether no other row is at least as good in utility, ε and bytes, and
            better in one of them.
    """

    settings: Mapping[str, Setting]
    seeds: tuple[int, ...]
    utility: Mapping[Measure, Spread]
    epsilon: float | None
    profile: str
    guarantee: str
    n_bytes_per_agent: float | None
    attacked: tuple[int, int] | None
    n_unfinished: int
    on_front: Mapping[Measure, bool]

    def cost(self, measure: Measure) -> tuple[float, float, float] | None:
        """Utility, ε and bytes, each so that less is better; None: it is not known yet.

        Args:
            measure: Of the utility.
        """
        if self.n_unfinished or measure not in self.utility:
            return None
        mean = self.utility[measure].mean
        return (
            mean if measure.lower_is_better else -mean,
            math.inf if self.epsilon is None else self.epsilon,
            0.0 if self.n_bytes_per_agent is None else self.n_bytes_per_agent,
        )


@dataclass(frozen=True, kw_only=True)
class Surface:
    """All combinations of a sweep.

    Attributes:
        rows: In the order of the sweep.
    """

    rows: tuple[SurfaceRow, ...]

    @classmethod
    def of(cls, points: Sequence[SweepPoint]) -> Self:
        """Read the runs of a sweep.

        The ε of two profiles are of different things, and none beats the other: rows are on the
        front if they are among those of their profile and those without any.

        Args:
            points: At least one, all with the same keys.

        Raises:
            OutputError: A folder holds no run, or one of another seed; keys differ; the runs of a
                point are of several profiles.
        """
        keys = {tuple(sorted(point.settings)) for point in points}
        if len(keys) != 1:
            msg = "a surface needs at least one point, and the same settings of all"
            raise OutputError(msg)
        rows = [_row(point) for point in points]
        fronts = {measure: _front(rows, measure) for measure in Measure}
        return cls(
            rows=tuple(
                replace(row, on_front={one: fronts[one][place] for one in row.utility})
                for place, row in enumerate(rows)
            )
        )

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Those that any row has."""
        return tuple(one for one in Measure if any(one in row.utility for row in self.rows))

    def axes(self) -> tuple[str, ...]:
        """The settings that vary."""
        first = self.rows[0].settings
        return tuple(
            name for name in first if any(row.settings[name] != first[name] for row in self.rows)
        )

    def table(self) -> Table:
        """What varies and what came of it, for a terminal."""
        shown = Table(
            box=SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            title=_TITLE,
            caption="\n".join(escaped(line) for line in self._remarks()),
            caption_justify="left",
        )
        heads, rows = self._cells()
        for number, head in enumerate(heads):
            left = number < len(self.axes())
            shown.add_column(escaped(head), justify="left" if left else "right")
        for row, cells in zip(self.rows, rows, strict=True):
            best = any(row.on_front.values())
            shown.add_row(*(escaped(cell) for cell in cells), style="bold" if best else "")
        return shown

    def markdown(self) -> str:
        """The same as Markdown."""
        heads, rows = self._cells()
        shown = markdown_table(heads, rows, left=heads[: len(self.axes())])
        return "\n".join([shown, "", *(f"- {line}" for line in (_TITLE, *self._remarks()))]) + "\n"

    def as_json(self) -> dict[str, Any]:
        """All numbers for programs; no differential privacy is `"epsilon": null`."""
        return {
            "rows": [
                {
                    "settings": dict(row.settings),
                    "seeds": list(row.seeds),
                    "utility": {one.value: found.as_json() for one, found in row.utility.items()},
                    "epsilon": row.epsilon,
                    "profile": row.profile,
                    "guarantee": row.guarantee,
                    "bytes_per_agent": row.n_bytes_per_agent,
                    "rounds_attacked": None if row.attacked is None else row.attacked[0],
                    "rounds": None if row.attacked is None else row.attacked[1],
                    "unfinished": row.n_unfinished,
                    "on_front": {one.value: found for one, found in row.on_front.items()},
                }
                for row in self.rows
            ]
        }

    def arrow(self) -> "pa.Table":
        """The same as a table: settings first, then what came of them."""
        import pyarrow as pa  # noqa: PLC0415 - slow to import

        rows = self.rows
        columns: dict[str, Any] = {}
        for name in rows[0].settings:
            columns[name] = _column([row.settings[name] for row in rows])
        columns["n_seeds"] = pa.array([len(row.seeds) for row in rows], pa.int64())
        for measure in Measure:
            spreads = [row.utility.get(measure) for row in rows]
            means = [None if found is None else found.mean for found in spreads]
            stds = [None if found is None else found.std for found in spreads]
            columns[f"{measure.value}_mean"] = pa.array(means, pa.float64())
            columns[f"{measure.value}_std"] = pa.array(stds, pa.float64())
        columns["epsilon"] = pa.array([row.epsilon for row in rows], pa.float64())
        columns["profile"] = pa.array([row.profile for row in rows], pa.string())
        columns["guarantee"] = pa.array([row.guarantee for row in rows], pa.string())
        columns["bytes_per_agent"] = pa.array([row.n_bytes_per_agent for row in rows], pa.float64())
        columns["n_unfinished"] = pa.array([row.n_unfinished for row in rows], pa.int64())
        for measure in Measure:
            flags = [row.on_front.get(measure) for row in rows]
            columns[f"on_front_{measure.value}"] = pa.array(flags, pa.bool_())
        return pa.table(columns)

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write `surface.parquet` and `surface.csv`.

        Args:
            folder: Where to.

        Returns:
            Both.

        Raises:
            OutputError: They cannot be written.
        """
        return write_table(RunFolder(folder), folder / _TABLE, self.arrow())

    def _remarks(self) -> list[str]:
        """What the columns are, and what is promised of each ε: never one without δ and unit."""
        promised = dict.fromkeys(row.guarantee for row in self.rows)
        return [*_REMARKS, *(f"promised: {guarantee}" for guarantee in promised)]

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        measures = self.measures
        names = [measure_heading(one) for one in measures]
        axes = self.axes()
        tails = [name.rpartition(".")[2] for name in axes]
        heads = [*(tails if len(set(tails)) == len(tails) else axes), "seeds", *names]
        heads += ["ε", "profile", "bytes"]
        under_attack = any(row.attacked is not None for row in self.rows)
        if under_attack:
            heads.append("rounds attacked")
        rows = []
        for row in self.rows:
            seeds = str(len(row.seeds))
            if row.n_unfinished:
                seeds += f" ({row.n_unfinished} unfinished)"
            sent = "–" if row.n_bytes_per_agent is None else bytes_text(row.n_bytes_per_agent)
            rows.append(
                [
                    *(setting_text(row.settings[name]) for name in self.axes()),
                    seeds,
                    *(_utility(row, one) for one in measures),
                    _epsilon(row),
                    row.profile,
                    sent,
                ]
            )
            if under_attack:
                rows[-1].append(
                    "–" if row.attacked is None else f"{row.attacked[0]} of {row.attacked[1]}"
                )
        return heads, rows


def pareto_front(points: Sequence[Sequence[float]]) -> list[bool]:
    """Which points no other one dominates: is nowhere worse, and somewhere better.

    Guarantees:
        1. No point of the front is dominated by any point.
        2. Every other point is dominated by one of the front.

    Args:
        points: Any number, each of the same length; less is better in each place. Infinity is
            worse than any number.

    Returns:
        One flag for each point; of equal points all are on the front, or none.

    Raises:
        ValueError: A number is NaN, or the lengths differ.
    """
    if not points:
        return []
    costs = np.array([list(point) for point in points], dtype=np.float64)  # lengths differ: raises
    if np.isnan(costs).any():
        msg = "NaN is neither better nor worse than any number"
        raise ValueError(msg)
    return [
        not bool(((costs <= cost).all(axis=1) & (costs < cost).any(axis=1)).any()) for cost in costs
    ]


def setting_text(value: Setting) -> str:
    """A setting as tables and figures show it."""
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else plain(_as_text(value))


def _as_text(value: Setting) -> str:
    """Text as it is, all else as JSON, as in the experiment."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _row(point: SweepPoint) -> SurfaceRow:
    histories = {seed: History.read(root) for seed, root in sorted(point.roots.items())}
    if not histories:
        msg = f"no run of the settings {dict(point.settings)}"
        raise OutputError(msg)
    for seed, history in histories.items():
        if history.card.seed != seed:
            msg = f"{history.root} is of seed {history.card.seed}, not {seed}"
            raise OutputError(msg)
    runs = list(histories.values())
    profile, *others = sorted({history.card.profile for history in runs})
    if others:
        msg = f"the runs of {dict(point.settings)} are of profiles {profile} and {others[0]}"
        raise OutputError(msg)
    spent = [history.epsilon for history in runs if history.epsilon is not None]
    utility: dict[Measure, Spread] = {}
    for measure in Measure:
        scores = {
            seed: history.average(measure, last)
            for seed, history in histories.items()
            if (last := history.last(measure)) is not None
        }
        if scores:
            utility[measure] = Spread(by_seed=scores)
    sent = [found for history in runs if (found := history.n_bytes_per_agent) is not None]
    return SurfaceRow(
        settings=dict(point.settings),
        seeds=tuple(histories),
        utility=utility,
        epsilon=max(spent, default=None),
        profile=plain(profile),
        guarantee=plain(runs[0].card.guarantee),
        n_bytes_per_agent=sum(sent) / len(sent) if sent else None,
        attacked=_attacked(runs),
        n_unfinished=sum(history.end is None for history in runs),
        on_front={},
    )


def _attacked(runs: Sequence[History]) -> tuple[int, int] | None:
    crafted = [note.n_crafted for run in runs for note in run.rounds if note.n_crafted is not None]
    return (sum(n > 0 for n in crafted), len(crafted)) if crafted else None


def _front(rows: Sequence[SurfaceRow], measure: Measure) -> list[bool]:
    """Which rows are on the front of each profile that they are held against."""
    costs = [row.cost(measure) for row in rows]
    profiles = {row.profile for row in rows} - {UNPROTECTED} or {UNPROTECTED}
    found = [cost is not None for cost in costs]
    for profile in profiles:
        members = [
            (place, cost)
            for place, (row, cost) in enumerate(zip(rows, costs, strict=True))
            if cost is not None and row.profile in {profile, UNPROTECTED}
        ]
        flags = pareto_front([cost for _, cost in members])
        for (place, _), flag in zip(members, flags, strict=True):
            found[place] = found[place] and flag
    return found


def _epsilon(row: SurfaceRow) -> str:
    if row.epsilon is not None:
        return f"{row.epsilon:.3g}"
    return "∞" if row.profile == UNPROTECTED else "–"


def _utility(row: SurfaceRow, measure: Measure) -> str:
    text = spread_text(row.utility.get(measure), measure)
    return f"{text} {_MARK}" if row.on_front.get(measure) else text


def _column(values: Sequence[Setting]) -> "pa.Array":
    """Integers, numbers or text, whichever holds them all."""
    import pyarrow as pa  # noqa: PLC0415 - slow to import

    known = [value for value in values if value is not None]
    if known and all(isinstance(value, bool) for value in known):
        return pa.array(values, pa.bool_())
    if any(isinstance(value, str | bool | list) for value in known) or not known:
        texts = [None if value is None else _as_text(value) for value in values]
        return pa.array(texts, pa.string())
    if all(isinstance(value, int) for value in known):
        return pa.array(values, pa.int64())
    return pa.array(values, pa.float64())

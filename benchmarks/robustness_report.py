"""What `benchmarks.robustness` shows: rows against targets, tables, heat maps."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from aggregator_server.aggregation.robust.outcome import Rule
from benchmarks.report import Row
from benchmarks.robustness_jobs import (
    RULES,
    Arrangement,
    Case,
    Settings,
    Threat,
    score_of,
)

Result = Mapping[str, Any]
MAX_CONTAMINATED: Final = 0.25
"""Share of units with an attacker up to which the target holds, in cells."""
MAX_OPEN: Final = 0.1
"""The same in the open mode."""
_DARK: Final = (0.42, 0.94)
"""Below and above, the heat map is dark."""
_RUINED: Final = 0.05
"""A peer with a lower score is ruined; a ratio to it says nothing."""
_CLEAN_TARGET, _KEPT_TARGET, _RARE_TARGET = 0.99, 0.9, 0.05


class Report:
    """All that was measured.

    Args:
        settings: Of the run.
        grid: Results of single aggregations.
        rounds: Results of federations in rounds.
    """

    def __init__(
        self, settings: Settings, grid: Sequence[Result], rounds: Sequence[Result]
    ) -> None:
        """Sort them."""
        self._settings = settings
        self._grid = grid
        self._rounds = rounds
        self._clean = {
            (one["arrangement"], one["seed"]): score_of(one["loss"])
            for one in grid
            if one["threat"] == Threat.NONE.name and one["rule"] == Rule.MEAN.value
        }
        self._start = {
            (one["arrangement"], one["seed"]): score_of(one["loss"])
            for one in grid
            if one["rule"] is None
        }

    def found(
        self,
        arrangement: Arrangement,
        threat: Threat | None = None,
        rule: Rule | None = Rule.PIPELINE,
        share: float | None = None,
    ) -> list[Result]:
        """Single aggregations, in the order of seeds; None: of any threat, at any share."""
        return [
            one
            for one in self._grid
            if one["arrangement"] == arrangement.key
            and one["rule"] == (None if rule is None else rule.value)
            and (threat is None or one["threat"] == threat.name)
            and (share is None or one["share"] == share)
        ]

    def kept(self, one: Result) -> float:
        """Its score ÷ that of the mean of the same agents without an attacker."""
        return score_of(one["loss"]) / self._clean[one["arrangement"], one["seed"]]

    def gain_kept(self, one: Result) -> float:
        """What the round gained ÷ what it gains by the mean without an attacker."""
        key = one["arrangement"], one["seed"]
        return (score_of(one["loss"]) - self._start[key]) / (self._clean[key] - self._start[key])

    def _in_scope(self, arrangement: Arrangement) -> list[Result]:
        """Aggregations by the default filter for which the target holds."""
        left_out = {threat.name for threat in Threat if threat.may_fail or threat is Threat.NONE}
        return [
            one
            for one in self.found(arrangement)
            if one["threat"] not in left_out
            and (
                one["share"] <= MAX_OPEN
                if arrangement.cell_size == 1
                else one["n_contaminated"] <= MAX_CONTAMINATED * one["n_units"]
            )
        ]

    # --- rows against targets ---------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """Every target, and what there is to say beside it."""
        made: list[Row] = []
        for arrangement in self._settings.arrangements:
            made += self._rows_of(arrangement)
        made += self._rows_of_rounds()
        return made

    def _rows_of(self, arrangement: Arrangement) -> Iterator[Row]:
        name = arrangement.name
        clean = self.found(arrangement, Threat.NONE)
        mean = self.found(arrangement, Threat.NONE, Rule.MEAN)
        yield Row.of(
            f"{name}: score of the default filter, no attacker",
            [score_of(one["loss"]) for one in clean],
            [score_of(one["loss"]) for one in mean],
            peer_name="mean",
            unit="",
            better="higher",
            target=_CLEAN_TARGET,
        )
        worst = self._worst(self._in_scope(arrangement))
        if worst:
            threat, share, ones = worst
            yield Row.of(
                f"{name}: score under the worst attack of the target, {threat} by {share:.0%}",
                [score_of(one["loss"]) for one in ones],
                [self._clean[one["arrangement"], one["seed"]] for one in ones],
                peer_name="mean, no attacker",
                unit="",
                better="higher",
                target=_KEPT_TARGET,
            )
            yield Row.of(
                f"{name}: what the round gains, under that attack ÷ by the mean without it",
                [self.gain_kept(one) for one in ones],
                None,
                peer_name="",
                unit="",
                better="higher",
            )
        everything = self.found(arrangement)
        yield _frac_row(f"{name}: honest units removed", everything, "n_false", "n_honest")
        if any(one["n_rare"] for one in everything):
            yield _frac_row(
                f"{name}: honest units with rare data removed",
                everything,
                "n_rare_removed",
                "n_rare",
                target=_RARE_TARGET,
            )

    def _worst(self, ones: Sequence[Result]) -> tuple[str, float, list[Result]] | None:
        """The threat and share with the lowest score kept, averaged over the seeds in scope."""
        groups: dict[tuple[str, float], list[Result]] = {}
        for one in ones:
            groups.setdefault((one["threat"], one["share"]), []).append(one)
        if not groups:
            return None
        worst = min(groups, key=lambda key: np.mean([self.kept(one) for one in groups[key]]))
        return Threat[worst[0]].value, worst[1], groups[worst]

    def _rows_of_rounds(self) -> Iterator[Row]:
        rules = (Rule.PIPELINE.value, Rule.MEAN.value)
        cases = dict.fromkeys((one["arrangement"], one["threat"]) for one in self._rounds)
        scores: dict[str, Callable[[Result], float]] = {
            "exact match": lambda one: _average(one["exact_match"]),
            "exp(-loss)": lambda one: score_of(one["loss"]),
        }
        for (key, threat), (what, of) in itertools.product(cases, scores.items()):
            ours, peer = (
                [
                    of(one)
                    for one in self._rounds
                    if (one["arrangement"], one["threat"], one["rule"]) == (key, threat, rule)
                ]
                for rule in rules
            )
            if not ours or not peer or min(peer) < _RUINED:
                continue
            yield Row.of(
                f"in rounds ({key}), {Threat[threat].value}: {what}",
                ours,
                peer,
                peer_name="mean",
                unit="",
                better="higher",
                target=_CLEAN_TARGET if threat == Threat.NONE.name else None,
            )
        judged = [one for run in self._rounds if run["rule"] == rules[0] for one in run["rounds"]]
        if judged:
            yield _frac_row("in rounds: honest updates removed", judged, "n_false", "n_honest")
        if any(one["n_rare"] for one in judged):
            yield _frac_row(
                "in rounds: honest updates with rare data removed",
                judged,
                "n_rare_removed",
                "n_rare",
                target=_RARE_TARGET,
            )

    # --- tables -----------------------------------------------------------------------------------

    def markdown(self) -> str:
        """All tables for a page."""
        parts = ["Score kept by the default filter, then by the mean (lowest of the seeds):\n"]
        parts += [self._by_share(arrangement) for arrangement in self._settings.arrangements]
        parts.append(self._backdoors())
        parts.append("Score kept by each rule, over the attacks at its full share:\n")
        parts.append(self._by_rule())
        parts.append("Units removed by the default filter:\n")
        parts.append(self._removals())
        parts.append("Score by category:\n")
        parts.append(self._by_category())
        if self._rounds:
            parts.append("In rounds:\n")
            parts.append(self._in_rounds())
        return "\n".join(parts)

    def _by_share(self, arrangement: Arrangement) -> str:
        heads = [
            f"{share:.0%} of agents{self._realised(arrangement, share)}"
            for share in arrangement.shares
        ]
        lines = [
            f"| {arrangement.name} | {' | '.join(heads)} |",
            f"| --- |{' ---: |' * len(heads)}",
        ]
        for threat in self._settings.threats:
            if threat is Threat.NONE:
                continue
            cells = [
                f"{self._cell(self.found(arrangement, threat, Rule.PIPELINE, share))}, "
                f"{self._cell(self.found(arrangement, threat, Rule.MEAN, share))}"
                for share in arrangement.shares
            ]
            lines.append(f"| {threat.value} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def _realised(self, arrangement: Arrangement, share: float) -> str:
        if arrangement.cell_size == 1:
            return ""
        ones = [one for one in self.found(arrangement, share=share) if one["n_contaminated"]]
        shares = sorted({one["n_contaminated"] / one["n_units"] for one in ones})
        low, high = f"{shares[0] * 100:.0f}", f"{shares[-1]:.0%}"
        return f", {high if len(shares) == 1 else f'{low} to {high}'} of cells"

    def _cell(self, ones: Sequence[Result]) -> str:
        """Mean over the seeds, and the lowest."""
        values = [self.kept(one) for one in ones]
        return f"{np.mean(values):.2f} ({min(values):.2f})" if values else ""

    def _backdoors(self) -> str:
        """How often the attacker's answer was given after one aggregation."""
        highest = {
            rule: max(
                (
                    one["backdoor"]
                    for one in self._grid
                    if one["rule"] == rule.value and one["backdoor"] is not None
                ),
                default=None,
            )
            for rule in (Rule.PIPELINE, Rule.MEAN)
        }
        shown = ", ".join(
            f"{rule.value} {frac:.2f}" for rule, frac in highest.items() if frac is not None
        )
        return f"Triggered instructions with the attacker's answer, at most: {shown}.\n"

    def _full(self) -> list[Arrangement]:
        return [one for one in self._settings.arrangements if one.full_share is not None]

    def _by_rule(self) -> str:
        full = self._full()
        heads = [f"{one.name}: none, mean of attacks, worst" for one in full]
        lines = [f"| rule | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
        for rule in RULES:
            cells = []
            for arrangement in full:
                none = self.found(arrangement, Threat.NONE, rule)
                by_threat = {
                    threat: float(np.mean([self.kept(one) for one in ones]))
                    for threat in self._settings.threats
                    if threat is not Threat.NONE
                    and (ones := self.found(arrangement, threat, rule, arrangement.full_share))
                }
                worst = min(by_threat, key=lambda threat: by_threat[threat])
                cells.append(
                    f"{np.mean([self.kept(one) for one in none]):.3f}, "
                    f"{np.mean(list(by_threat.values())):.3f}, "
                    f"{by_threat[worst]:.2f} ({worst.value})"
                )
            lines.append(f"| {rule.value} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def _removals(self) -> str:
        lines = [
            "| | units with an attacker, removed | honest units removed | rare ones removed |",
            "| --- | --- | --- | --- |",
        ]
        for arrangement in self._settings.arrangements:
            for share in (0.0, *arrangement.shares):
                ones = self.found(arrangement, share=share)
                counts = (
                    _of(ones, part, whole)
                    for part, whole in (
                        ("n_caught", "n_contaminated"),
                        ("n_false", "n_honest"),
                        ("n_rare_removed", "n_rare"),
                    )
                )
                lines.append(f"| {arrangement.name}, {share:.0%} | {' | '.join(counts)} |")
        return "\n".join(lines) + "\n"

    def _by_category(self) -> str:
        """The first arrangement: each category's exp(-loss), mean over the seeds."""
        first = self._settings.arrangements[0]
        attack = Threat.SIGN_FLIP_SCALED
        shown = {"release before": self.found(first, Threat.NONE, None)}
        for rule in (Rule.MEAN, Rule.PIPELINE, Rule.CAPPED_DNC):
            shown[f"{rule.value}, no attacker"] = self.found(first, Threat.NONE, rule)
            ones = self.found(first, attack, rule, first.full_share)
            shown[f"{rule.value}, {attack.value}"] = ones
        lines = [f"| category | {' | '.join(shown)} |", f"| --- |{' ---: |' * len(shown)}"]
        for category in sorted(next(iter(shown.values()))[0]["loss"]):
            cells = (
                f"{np.mean([np.exp(-one['loss'][category]) for one in ones]):.2f}"
                for ones in shown.values()
            )
            lines.append(f"| `{category}` | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def _in_rounds(self) -> str:
        heads = (
            *("agents", "attack", "rule", "answers", "exact match", "exp(-loss)", "backdoor"),
            *("honest removed", "attackers removed", "rare removed"),
        )
        lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        for case in self._settings.in_rounds:
            runs = [one for one in self._rounds if _is(one, case)]
            judged = [one for run in runs for one in run["rounds"]]
            hits = [run["backdoor"] for run in runs if run["backdoor"] is not None]
            cells = (
                case.arrangement.name,
                case.threat.value,
                case.rule.value,
                str(case.n_answered * len(runs[0]["exact_match"])),
                _spread([_average(run["exact_match"]) for run in runs]),
                _spread([score_of(run["loss"]) for run in runs]),
                _spread(hits) if hits else "",
                _of(judged, "n_false", "n_honest"),
                _of(judged, "n_caught", "n_contaminated"),
                _of(judged, "n_rare_removed", "n_rare"),
            )
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    # --- figure -----------------------------------------------------------------------------------

    def draw(self, path: Path) -> None:
        """Draw two rows of heat maps: rules at the full share, and the default filter by share.

        Args:
            path: A PNG; its folder is made.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        full = self._full()
        figure = Figure(figsize=(5.0 * len(full) + 1.5, 13), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(2, len(full), squeeze=False, sharey=True, height_ratios=[1, 1])
        threats = self._settings.threats
        for column, arrangement in enumerate(full):
            share = arrangement.full_share
            self._map(
                grid[0][column],
                [rule.value for rule in RULES],
                lambda threat, at, a=arrangement, s=share: self.found(
                    a, threat, RULES[at], 0.0 if threat is Threat.NONE else s
                ),
                title=f"{arrangement.name}: all rules, {share:.0%} attackers",
            )
            shares = arrangement.shares
            image = self._map(
                grid[1][column],
                [f"{rule}\n{share:.0%}" for rule in ("default", "mean") for share in shares],
                lambda threat, at, a=arrangement, s=shares: self.found(
                    a,
                    threat,
                    Rule.PIPELINE if at < len(s) else Rule.MEAN,
                    0.0 if threat is Threat.NONE else s[at % len(s)],
                ),
                title=f"{arrangement.name}: by share of attackers",
            )
            grid[1][column].axvline(len(shares) - 0.5, color="white", linewidth=3)
        for row in grid:
            row[0].set_yticks(range(len(threats)), [threat.value for threat in threats])
        figure.colorbar(image, ax=grid, label="score ÷ that of the mean without an attacker")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=80)

    def _map(
        self,
        axes: Any,
        columns: Sequence[str],
        results: Callable[[Threat, int], Sequence[Result]],
        *,
        title: str,
    ) -> Any:
        threats = self._settings.threats
        values = np.array(
            [
                [
                    float(np.mean([self.kept(one) for one in ones])) if ones else np.nan
                    for ones in (results(threat, at) for at in range(len(columns)))
                ]
                for threat in threats
            ]
        )
        image = axes.imshow(values, vmin=0.3, vmax=1.0, cmap="RdYlGn", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "black" if _DARK[0] < value < _DARK[1] else "white"
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink
                )
        axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
        axes.set_title(title, fontsize=10)
        return image


def _frac_row(
    what: str, ones: Sequence[Result], part: str, whole: str, *, target: float | None = None
) -> Row:
    n_whole = sum(one[whole] for one in ones)
    frac = sum(one[part] for one in ones) / n_whole if n_whole else 0.0
    return Row.of(
        f"{what}, of {n_whole:,}", [frac], None, peer_name="", unit="share", target=target
    )


def _of(ones: Sequence[Result], part: str, whole: str) -> str:
    n_whole = sum(one[whole] for one in ones)
    return f"{sum(one[part] for one in ones)} of {n_whole}" if n_whole else ""


def _is(one: Result, case: Case) -> bool:
    found = (one["arrangement"], one["threat"], one["rule"])
    return found == (case.arrangement.key, case.threat.name, case.rule.value)


def _average(by_category: Mapping[str, float]) -> float:
    return float(np.mean(list(by_category.values())))


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"

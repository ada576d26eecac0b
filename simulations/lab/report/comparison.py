"""Arms side by side over seeds, and the paper's relative score: what a federation keeps of all.

A relative score holds a model against the one that was trained on all records in one place,
seed by seed: score ÷ centralised's score, and for losses centralised's loss ÷ loss. So 1 is as good
as all data in one place, and higher is better, whatever the measure. It is over all seeds
that have both models, or there is none: a mean without the seeds in which centralised scores 0
would be of those that happened to be in the model's favour.

Source: arXiv 2305.05644, section 4.2. Its relative scores are of GPT-4's marks, ours of loss, exact
match and ROUGE-L; the kinds of numbers differ and do not compare.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

from rich.box import SIMPLE_HEAD
from rich.table import Table

from edge_agent.plain_text import escaped, plain
from simulations.errors import OutputError
from simulations.lab.records import Arm, Measure
from simulations.lab.report.drawing import AVERAGE, MEASURE_NAMES
from simulations.lab.report.history import History
from simulations.lab.report.spread import Spread, markdown_table, measure_heading, spread_text

PAPER_RELATIVE_SCORE: Final = 0.919
"""Federated ÷ centralised in arXiv 2305.05644, by GPT-4's marks: not a measure of ours."""
_PAPER: Final = (
    f"arXiv 2305.05644 reports {PAPER_RELATIVE_SCORE} for federated ÷ centralised, by GPT-4’s "
    "marks: another measure, which does not compare"
)
_RELATIVE: Final = (
    "÷ centralised: score ÷ centralised’s, for losses centralised’s ÷ the model’s, paired by seed; "
    "1 is as good as all data in one place, higher is better; –: not in every seed that has both "
    "is there a ratio"
)
_ORDER: Final = (Arm.BASE, Arm.LOCAL, Arm.FEDERATED, Arm.CENTRALISED)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One measure of one model.

    Attributes:
        average: Over categories, which count alike; None: of no seed, or of not every seed.
        by_category: The same of those that were measured.
    """

    average: Spread | None
    by_category: Mapping[str, Spread | None]

    def as_json(self) -> dict[str, Any]:
        """Both; null where there is no number."""

        def told(found: Spread | None) -> dict[str, Any] | None:
            return None if found is None else found.as_json()

        return {
            "average": told(self.average),
            "by_category": {name: told(found) for name, found in self.by_category.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several runs, grouped by what they are runs of.

    Attributes:
        labels: Of the groups, base first and centralised last.
        measures: Those that any run has.
        scores: Of the newest release that each run measured, by label.
        relative: To the centralised run of the same seed, by label, of all seeds that have both
            or None; without any centralised run: nothing.
        reference: The label of the centralised runs; None: there are none.
        arms: By label.
        learning_rates: Of a run's first step, by label; of those that have closed a round.
        unfinished: Runs that are not finished, and how far they came.
    """

    labels: tuple[str, ...]
    measures: tuple[Measure, ...]
    scores: Mapping[str, Mapping[Measure, Scores]]
    relative: Mapping[str, Mapping[Measure, Scores]]
    reference: str | None
    arms: Mapping[str, Arm]
    learning_rates: Mapping[str, float]
    unfinished: tuple[str, ...]

    @classmethod
    def of(cls, roots: Sequence[Path], *, labels: Sequence[str] | None = None) -> Self:
        """Compare the runs of some folders.

        Args:
            roots: At least one.
            labels: What each is called, such as `local, smallest`; None: the arm, and of a local
                one the client. Runs of one label differ by seed alone.

        Raises:
            OutputError: A folder holds no run; two runs have label and seed in common; the runs are
                not of one base, those of a seed not of the same data, those of a label not of one
                experiment.
        """
        histories = [History.read(root) for root in roots]
        names = [plain(name) for name in labels] if labels is not None else map(label_of, histories)
        groups: dict[str, dict[int, History]] = {}
        for name, history in zip(names, histories, strict=True):
            group = groups.setdefault(name, {})
            if history.card.seed in group:
                other = group[history.card.seed].root
                msg = f"{other} and {history.root} are both {name}, seed {history.card.seed}"
                raise OutputError(msg)
            group[history.card.seed] = history
        _check(groups)
        arms = {name: next(iter(group.values())).card.arm for name, group in groups.items()}
        ordered = sorted(groups, key=lambda name: _ORDER.index(arms[name]))
        reference = next((name for name in ordered if arms[name] is Arm.CENTRALISED), None)
        yardsticks = groups[reference] if reference is not None else {}
        measures = [one for one in Measure if any(one in found.measures for found in histories)]
        return cls(
            labels=tuple(ordered),
            measures=tuple(measures),
            scores={
                name: {one: _scores(groups[name], one, _as_it_is) for one in measures}
                for name in ordered
            },
            relative={
                name: {
                    one: _scores(
                        _paired(groups[name], yardsticks, one), one, _held_against(yardsticks)
                    )
                    for one in measures
                }
                for name in ordered
            }
            if yardsticks
            else {},
            reference=reference,
            arms=MappingProxyType(arms),
            learning_rates={
                name: history.rounds[0].learning_rate
                for name in ordered
                for history in groups[name].values()
                if history.rounds
            },
            unfinished=tuple(
                f"{name}, seed {seed} ({history.state})"
                for name in ordered
                for seed, history in sorted(groups[name].items())
                if history.end is None
            ),
        )

    def table(self) -> Table:
        """Averages over categories, for a terminal."""
        shown = Table(
            box=SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            title="Newest releases, average over categories, mean ± standard deviation over seeds",
            caption="\n".join(escaped(line) for line in self._remarks()),
            caption_justify="left",
        )
        shown.add_column("model", no_wrap=True)
        for head in ("seeds", *(measure_heading(one) for one in self.measures)):
            shown.add_column(head, justify="right")
        self._add_rows(shown, self.scores)
        if self.relative:
            shown.add_section()
            shown.add_row("÷ centralised")
            self._add_rows(shown, self.relative)
        return shown

    def _add_rows(self, shown: Table, found: Mapping[str, Mapping[Measure, Scores]]) -> None:
        relative = found is self.relative
        for name in found:
            averages = [
                spread_text(found[name][one].average, None if relative else one)
                for one in self.measures
            ]
            shown.add_row(
                escaped(f"  {name}" if relative else name),
                str(_n_seeds(found[name])),
                *(cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in averages),
                style="bold" if self.arms[name] is Arm.FEDERATED else "",
            )

    def markdown(self) -> str:
        """All numbers as Markdown: averages, then each measure by category."""
        heads, rows = self._summary()
        parts = [markdown_table(heads, rows), "\n".join(f"- {line}." for line in self._remarks())]
        for measure in self.measures:
            for title, found in (
                (MEASURE_NAMES[measure], self.scores),
                (f"{MEASURE_NAMES[measure]}, ÷ centralised", self.relative),
            ):
                if found:
                    parts.append(f"### {title[0].upper()}{title[1:]}")
                    parts.append(self._by_category(measure, found, relative=found is self.relative))
        return "\n\n".join(parts) + "\n"

    def as_json(self) -> dict[str, Any]:
        """All numbers for programs: what is not known is null."""

        def tree(found: Mapping[str, Mapping[Measure, Scores]]) -> dict[str, Any]:
            return {
                name: {one.value: scores.as_json() for one, scores in by_measure.items()}
                for name, by_measure in found.items()
            }

        return {
            "labels": list(self.labels),
            "scores": tree(self.scores),
            "relative": tree(self.relative),
            "relative_to": self.reference,
            "learning_rates": dict(self.learning_rates),
            "relative_means": _RELATIVE,
            "paper": {
                "source": "arXiv 2305.05644",
                "federated_to_centralised": PAPER_RELATIVE_SCORE,
                "measure": "GPT-4's marks",
            },
            "unfinished": list(self.unfinished),
        }

    def _summary(self) -> tuple[list[str], list[list[str]]]:
        heads = ["model", "seeds"]
        for measure in self.measures:
            heads.append(measure_heading(measure))
            if self.relative:
                heads.append("÷ centralised")
        rows = []
        for name in self.labels:
            row = [name, str(_n_seeds(self.scores[name]))]
            for measure in self.measures:
                row.append(spread_text(self.scores[name][measure].average, measure))
                if self.relative:
                    row.append(self._ratio_text(name, measure))
            rows.append(row)
        return heads, rows

    def _ratio_text(self, name: str, measure: Measure) -> str:
        """With its seeds, where these are not the row's."""
        score, ratio = (found[name][measure].average for found in (self.scores, self.relative))
        text = spread_text(ratio, None)
        if score is None or ratio is None or set(ratio.by_seed) == set(score.by_seed):
            return text
        seeds = ", ".join(map(str, sorted(ratio.by_seed)))
        return f"{text} (seed{'s' if len(ratio.by_seed) > 1 else ''} {seeds})"

    def _by_category(
        self, measure: Measure, found: Mapping[str, Mapping[Measure, Scores]], *, relative: bool
    ) -> str:
        kind = None if relative else measure
        names = sorted({name for one in found.values() for name in one[measure].by_category})
        rows = [
            [
                name,
                *(
                    spread_text(found[one][measure].by_category.get(name), kind)
                    for one in self.labels
                ),
            ]
            for name in names
        ]
        averages = (
            self._ratio_text(one, measure)
            if relative
            else spread_text(found[one][measure].average, measure)
            for one in self.labels
        )
        rows.append([AVERAGE, *averages])
        return markdown_table(["category", *self.labels], rows)

    def _remarks(self) -> list[str]:
        remarks = [_RELATIVE, _PAPER] if self.relative else []
        if len(set(self.learning_rates.values())) > 1:
            rates = (f"{name} {rate:g}" for name, rate in self.learning_rates.items())
            remarks.append(f"learning rates: {', '.join(rates)}")
        if self.unfinished:
            remarks.append(
                f"not finished, so these numbers will change: {'; '.join(self.unfinished)}"
            )
        return remarks


def label_of(history: History) -> str:
    """What a run is called where nobody names it: its arm, and of a local one the client.

    Args:
        history: The run.
    """
    card = history.card
    return card.arm.value if card.client is None else f"{card.arm.value} {card.client}"


# Scores


_Transform = Callable[[int, Measure, str | None, float], float | None]
"""Of seed, measure, category (None: the average) and score."""


def _as_it_is(_seed: int, _measure: Measure, _category: str | None, score: float) -> float:
    return score


def _paired(
    group: Mapping[int, History], yardsticks: Mapping[int, History], measure: Measure
) -> dict[int, History]:
    """The runs of seeds that have a centralised one: a series that ended early lacks its last."""
    return {
        seed: history
        for seed, history in group.items()
        if seed in yardsticks and yardsticks[seed].last(measure) is not None
    }


def _held_against(yardsticks: Mapping[int, History]) -> _Transform:
    def relative(seed: int, measure: Measure, category: str | None, score: float) -> float | None:
        last = yardsticks[seed].last(measure)
        if last is None:  # cannot be: the seeds are paired
            return None
        if category is None:
            yardstick = yardsticks[seed].average(measure, last)
        else:
            by_category = yardsticks[seed].by_category(measure, last)
            if category not in by_category:
                return None
            yardstick = by_category[category]
        above, below = (yardstick, score) if measure.lower_is_better else (score, yardstick)
        return above / below if below > 0.0 else None

    return relative


def _scores(group: Mapping[int, History], measure: Measure, transform: _Transform) -> Scores:
    average: dict[int, float | None] = {}
    by_category: dict[str, dict[int, float | None]] = {}
    for seed, history in sorted(group.items()):
        last = history.last(measure)
        if last is None:
            continue
        average[seed] = transform(seed, measure, None, history.average(measure, last))
        for name, score in history.by_category(measure, last).items():
            of_name = by_category.setdefault(name, {})
            of_name[seed] = transform(seed, measure, name, score)
    return Scores(
        average=_spread(average),
        by_category={name: _spread(by_category[name]) for name in sorted(by_category)},
    )


def _spread(by_seed: Mapping[int, float | None]) -> Spread | None:
    """Over all of these seeds, or None: never over some of them."""
    known = {seed: value for seed, value in by_seed.items() if value is not None}
    return Spread(by_seed=known) if known and len(known) == len(by_seed) else None


def _check(groups: Mapping[str, Mapping[int, History]]) -> None:
    """Whether the runs may be compared at all."""
    histories = [history for group in groups.values() for history in group.values()]
    of_seed: dict[int, list[History]] = {}
    for history in histories:
        of_seed.setdefault(history.card.seed, []).append(history)
    _same(histories, "base_fingerprint", "base")
    for found in of_seed.values():
        _same(found, "data_sha256", "data")
    for group in groups.values():
        _same(list(group.values()), "experiment_sha256", "experiment")
        _same(list(group.values()), "arm", "arm")


def _same(histories: Sequence[History], field: str, what: str) -> None:
    for history in histories[1:]:
        if getattr(history.card, field) != getattr(histories[0].card, field):
            msg = f"{histories[0].root} and {history.root} do not compare: their {what} differs"
            raise OutputError(msg)


def _n_seeds(found: Mapping[Measure, Scores]) -> int:
    """How many seeds any average is over."""
    averages = [scores.average for scores in found.values()]
    return len({seed for one in averages if one is not None for seed in one.by_seed})

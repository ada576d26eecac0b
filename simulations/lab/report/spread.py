"""Numbers over seeds, and how tables show them."""

import html
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_agent.plain_text import plain
from simulations.lab.records import Measure
from simulations.lab.report.drawing import MEASURE_NAMES


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number over seeds.

    Attributes:
        by_seed: At least one.
    """

    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.by_seed.values())

    @property
    def std(self) -> float | None:
        """The sample standard deviation; None: one seed tells of none."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None

    def text(self, *, factor: float = 1.0, digits: int = 3) -> str:
        """Mean ± standard deviation.

        Args:
            factor: To multiply by.
            digits: After the point.
        """
        mean = f"{factor * self.mean:.{digits}f}"
        return mean if self.std is None else f"{mean} ± {factor * self.std:.{digits}f}"

    def as_json(self) -> dict[str, Any]:
        """Mean, standard deviation or null, and the seeds."""
        return {
            "mean": self.mean,
            "std": self.std,
            "by_seed": {str(seed): self.by_seed[seed] for seed in sorted(self.by_seed)},
        }


def measure_heading(measure: Measure) -> str:
    """What stands above a column of a measure."""
    return f"{MEASURE_NAMES[measure]}{', %' if measure is Measure.EXACT_MATCH else ''}"


def spread_text(found: Spread | None, measure: Measure | None) -> str:
    """A number over seeds as a table shows it.

    Args:
        found: None: it is not known.
        measure: What it is a score of; None: it is a ratio.
    """
    if found is None:
        return "–"
    if measure is Measure.EXACT_MATCH:
        return found.text(factor=100.0, digits=1)
    return found.text()


def markdown_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = ()
) -> str:
    """A table in Markdown, whatever its cells hold.

    Args:
        heads: Of the columns.
        rows: As many cells each.
        left: Columns to align to the left, beside the first.
    """
    rule = ["---" if number == 0 or head in left else "---:" for number, head in enumerate(heads)]
    lines = [
        [_cell(cell) for cell in heads],
        rule,
        *([_cell(cell) for cell in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    safe = html.escape(plain(text), quote=False)
    return "".join(f"\\{sign}" if sign in "\\|`[]*" else sign for sign in safe)

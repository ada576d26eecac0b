"""What a filter found, and the mean that follows from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from aggregator_server.aggregation.robust.units import BoolArray, Float64Array, Units, loaded
from aggregator_server.errors import AggregationError

_CHUNK_VALUES: Final = 1 << 15


class Rule(StrEnum):
    """How units become one mean update."""

    PIPELINE = "pipeline"
    """The default: one of MEAN, CAPPED_GEOMETRIC_MEDIAN and CAPPED_EVIDENCE, by how many units."""
    MEAN = "mean"
    CAPPED_EVIDENCE = "capped-evidence"
    CAPPED_DNC = "capped-dnc"
    CAPPED_GEOMETRIC_MEDIAN = "capped-geometric-median"
    COORDINATE_MEDIAN = "coordinate-median"
    TRIMMED_MEAN = "trimmed-mean"
    KRUM = "krum"
    MULTI_KRUM = "multi-krum"
    GEOMETRIC_MEDIAN = "geometric-median"
    CENTRED_CLIPPING = "centred-clipping"
    NORM_BOUNDING = "norm-bounding"


@dataclass(frozen=True, kw_only=True)
class FilterOutcome:
    """What became of each unit."""

    rule: Rule
    """What was done; never PIPELINE, which chooses another."""
    kept: BoolArray
    """[n]. The weights of units that were not kept do not count in the mean."""
    factors: Float64Array
    """[n] float64, what each unit's mean was scaled by; 0 for one that was not kept. The
    coordinate-wise rules, whose mean no factors express, have 1 for each kept unit."""
    reasons: Mapping[int, str]
    """Why, in words, for each unit that was not kept."""
    scores: Float64Array
    """[n] float64, finite: the pulls of the default filter or DnC's scores (1 is ordinary in both),
    or Krum's; 0 where the rule gives none."""

    @property
    def n_removed(self) -> int:
        """Number of units that were not kept."""
        return int(len(self.kept) - self.kept.sum())


@dataclass(frozen=True, kw_only=True)
class Aggregated:
    """A mean update, and what became of the units."""

    mean: Float64Array
    """[n_values] float64, finite."""
    outcome: FilterOutcome


def robust_mean(units: Units, kept: BoolArray, factors: Float64Array) -> Float64Array:
    """The weighted mean of the scaled updates of those that were kept.

    Guarantees:
        1. Equals Σ w·f·x / Σ w over the kept units, in float64.
        2. Memory: one float64 accumulator and one unit, whatever their number; a unit that does
           not count is not loaded.
        3. Equal units in equal order give equal bits.

    Args:
        units: The round's units.
        kept: [n] bool, at least one.
        factors: [n] float64, finite.

    Returns:
        [n_values] float64.

    Raises:
        AggregationError: Shapes that do not match, no unit kept, a factor or a mean that is not
            finite, or a unit of another length.
    """
    weights = units.weights
    if not len(kept) == len(factors) == len(weights) or not np.isfinite(factors).all():
        msg = (
            f"{len(kept)} verdicts and {len(factors)} factors, all finite, "
            f"expected for {len(weights)} units"
        )
        raise AggregationError(msg)
    if not kept.any():
        msg = f"none of the {len(weights)} units was kept: there is nothing to average"
        raise AggregationError(msg)
    coefficients = factors * (weights / weights[kept].sum())
    total = np.zeros(units.n_values)
    buffer = np.empty(_CHUNK_VALUES)
    with np.errstate(over="ignore", invalid="ignore"):  # the mean is checked as a whole below
        for index in np.flatnonzero(kept & (coefficients != 0.0)):
            vector = loaded(units, int(index))
            scale = float(coefficients[index])
            for start in range(0, units.n_values, _CHUNK_VALUES):
                part = buffer[: min(_CHUNK_VALUES, units.n_values - start)]
                # Copied first: float32 times a number would be rounded to float32.
                np.copyto(part, vector[start : start + _CHUNK_VALUES])
                part *= scale
                total[start : start + _CHUNK_VALUES] += part
            del vector  # or it would stay in memory while the next one is loaded
    if not np.isfinite(total).all():
        msg = f"the mean update of {int(kept.sum())} units has values that are not finite"
        raise AggregationError(msg)
    return total


def uncounted(length: int) -> Float64Array:
    """Scores of a rule that gives none."""
    return np.zeros(length)

"""All rules behind one call: the default pipeline, and the baselines it is compared with.

Every rule drops units that are not finite. Those of which the paper counts units equally, and which
end in a mean, take FedAvg's weights in that mean here; with equal weights they are the paper's.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from aggregator_server.aggregation.robust.caps import cap_factors, median_norm
from aggregator_server.aggregation.robust.centred import N_ITERATIONS, centred_clipping
from aggregator_server.aggregation.robust.dnc import spectral_filter
from aggregator_server.aggregation.robust.gram import gram_matrix, squared_distances
from aggregator_server.aggregation.robust.krum import krum, krum_scores, most_hostile
from aggregator_server.aggregation.robust.medians import (
    coordinate_median,
    geometric_median,
    trimmed_mean,
)
from aggregator_server.aggregation.robust.outcome import (
    Aggregated,
    FilterOutcome,
    Rule,
    robust_mean,
    uncounted,
)
from aggregator_server.aggregation.robust.pipeline import (
    Mode,
    Survey,
    as_factors,
    capped_evidence,
    capped_geometric_median,
    dropped,
    plain,
    run_pipeline,
    sized,
    sketches_of,
    survey,
    verdict,
)
from aggregator_server.aggregation.robust.sketch import Sketcher
from aggregator_server.aggregation.robust.units import BoolArray, Float64Array, Units
from aggregator_server.errors import AggregationError
from protocol.layout import VectorLayout

_FAR: Final = "its nearest neighbours are farther away than those of the units that were selected"


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """What the baselines assume.

    Raises:
        AggregationError: A value out of its range.
    """

    hostile_frac: float = 0.25
    """Units that Krum, Multi-Krum and the trimmed mean reckon with, from 0 to below 0.5."""
    norm_bound: float | None = None
    """Of norm bounding, above 0; None: the median norm of the round."""
    clip_radius: float | None = None
    """Of centred clipping, above 0; None: the median norm of the round."""
    n_clip_iterations: int = N_ITERATIONS

    def __post_init__(self) -> None:
        """Check the ranges."""
        bounds = [bound for bound in (self.norm_bound, self.clip_radius) if bound is not None]
        if (
            not 0.0 <= self.hostile_frac < 0.5
            or not all(bound > 0.0 for bound in bounds)
            or self.n_clip_iterations < 1
        ):
            msg = (
                f"{self} cannot be: a fraction lies from 0 to below 0.5, "
                f"bounds are above 0, and there is at least 1 iteration"
            )
            raise AggregationError(msg)


def aggregate(
    units: Units,
    rule: Rule,
    *,
    mode: Mode,
    layout: VectorLayout,
    seed: bytes,
    options: RuleOptions | None = None,
) -> Aggregated:
    """Make one mean update of a round's units.

    Args:
        units: The round's units.
        rule: How.
        mode: What a unit is; for the default pipeline, `CAPPED_EVIDENCE` and `CAPPED_DNC`.
        layout: Of the values.
        seed: 32 bytes, drawn after the uploads were closed; for the same three.
        options: Of the baselines.

    Raises:
        AggregationError: No finite unit, too few units for the rule, units that do not fit the
            layout, a seed of another length, or a mean that is not finite.
    """
    if rule is Rule.PIPELINE:
        return run_pipeline(units, mode=mode, layout=layout, seed=seed)
    sketcher = None
    if rule in {Rule.CAPPED_EVIDENCE, Rule.CAPPED_DNC}:
        sketcher = Sketcher(seed, n_values=layout.n_values)
    found = survey(units, layout, sketcher)
    chosen = RuleOptions() if options is None else options
    if rule in {Rule.COORDINATE_MEDIAN, Rule.TRIMMED_MEAN}:
        return _by_coordinate(units, rule, found, chosen)
    match rule:
        case Rule.MEAN:
            outcome = plain(found)
        case Rule.CAPPED_DNC:
            outcome = _capped_dnc(found, layout, seed=seed, judge_tensors=mode is Mode.OPEN)
        case Rule.CAPPED_EVIDENCE:
            outcome = capped_evidence(found, layout, judge_tensors=mode is Mode.OPEN)
        case Rule.CAPPED_GEOMETRIC_MEDIAN:
            outcome = capped_geometric_median(units, found)
        case Rule.NORM_BOUNDING:
            outcome = _norm_bounding(found, chosen)
        case Rule.KRUM | Rule.MULTI_KRUM:
            outcome = _krum(units, rule, found, chosen)
        case _:
            outcome = _within_span(units, rule, found, chosen)
    return Aggregated(mean=robust_mean(units, outcome.kept, outcome.factors), outcome=outcome)


def _outcome(
    rule: Rule, found: Survey, factors: Float64Array, scores: Float64Array | None = None
) -> FilterOutcome:
    """Of a rule that keeps all finite units; `factors` [k] are theirs."""
    reasons = dropped(found)
    kept = found.finite
    spread = np.zeros(len(kept))
    spread[kept] = factors
    return FilterOutcome(
        rule=rule,
        kept=kept,
        factors=spread,
        reasons=reasons,
        scores=uncounted(len(kept)) if scores is None else scores,
    )


def _capped_dnc(
    found: Survey, layout: VectorLayout, *, seed: bytes, judge_tensors: bool
) -> FilterOutcome:
    """Tensors' sizes, a cap to the median norm, then DnC on the capped sketches."""
    left = sized(found, layout, judge_tensors=judge_tensors, judge_lengths=False)
    points = sketches_of(found)[left.places] * left.caps[:, None]
    spectral = spectral_filter(points, max_removed=left.allowance, seed=seed)
    reasons = dict(left.reasons)
    for index in np.flatnonzero(spectral.removed):
        reasons[int(left.places[index])] = (
            f"along the direction in which the units differ most, its squared distance is "
            f"{spectral.scores[index]:.3g} times the mean of all"
        )
    return verdict(Rule.CAPPED_DNC, found, left, reasons=reasons, scores=spectral.scores)


def _by_coordinate(units: Units, rule: Rule, found: Survey, options: RuleOptions) -> Aggregated:
    kept = found.finite
    outcome = _outcome(rule, found, np.ones(int(kept.sum())))
    if rule is Rule.COORDINATE_MEDIAN:
        mean = coordinate_median(units, kept)
    else:
        n_trimmed = int(options.hostile_frac * kept.sum())
        mean = trimmed_mean(units, kept, n_trimmed=n_trimmed)
    return Aggregated(mean=mean, outcome=outcome)


def _norm_bounding(found: Survey, options: RuleOptions) -> FilterOutcome:
    dropped(found)
    lengths = found.lengths[found.finite]
    bound = median_norm(lengths) if options.norm_bound is None else options.norm_bound
    return _outcome(Rule.NORM_BOUNDING, found, cap_factors(lengths, bound))


def _krum(units: Units, rule: Rule, found: Survey, options: RuleOptions) -> FilterOutcome:
    reasons = dropped(found)
    finite = found.finite
    places = np.flatnonzero(finite)
    n_hostile = min(int(options.hostile_frac * len(places)), most_hostile(len(places)))
    distances = squared_distances(gram_matrix(units, finite))
    n_selected = 1 if rule is Rule.KRUM else len(places) - n_hostile
    selected = krum(distances, n_hostile=n_hostile, n_selected=n_selected)
    scores = uncounted(len(finite))
    scores[places] = krum_scores(distances, n_hostile=n_hostile)
    reasons |= {int(place): _FAR for place in places[~selected]}
    kept: BoolArray = np.zeros(len(finite), np.bool_)
    kept[places[selected]] = True
    return FilterOutcome(
        rule=rule, kept=kept, factors=kept.astype(np.float64), reasons=reasons, scores=scores
    )


def _within_span(units: Units, rule: Rule, found: Survey, options: RuleOptions) -> FilterOutcome:
    """Rules whose result is a point Σ c·x within the span of the updates."""
    dropped(found)
    kept = found.finite
    weights = units.weights[kept].astype(np.float64)
    gram = gram_matrix(units, kept)
    if rule is Rule.GEOMETRIC_MEDIAN:
        coefficients = geometric_median(gram, weights)
    else:
        radius = options.clip_radius
        if radius is None:
            # A median of 0 means that most updates are: nothing may move.
            radius = median_norm(found.lengths[kept]) or float(np.finfo(np.float64).tiny)
        coefficients = centred_clipping(
            gram, weights, radius=radius, n_iterations=options.n_clip_iterations
        )
    return _outcome(rule, found, as_factors(coefficients, weights))

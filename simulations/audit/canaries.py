"""The one-run audit: canaries that fair coins put into a training, and who of them shows.

Several runs count as one: they have no example in common, so together they are as private as each
of them, and their guesses are pooled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.data.tokens import Example
from privacy.auditing.membership import auc, loss_ratio_scores
from privacy.auditing.one_run import Audit, audit_of_counts, one_run_bound
from privacy.auditing.probes import cosine_scores
from simulations.audit.recipe import AuditRecipe, Claim
from simulations.audit.records import as_examples, canary_records, ordinary_records
from simulations.audit.scores import (
    Float64Array,
    clipped,
    noise_std_of,
    scale_of,
    step_log_odds,
    update_coefficients,
)
from simulations.audit.training import Subject, Trained

_PURPOSE: Final = 1
"""Keeps the draws of this audit apart from those of the others."""
_SMALL: Final = 1e-2
"""Without noise: a gradient's length that counts as rounding, over the mean length."""


class View(StrEnum):
    """Who looks, and at what."""

    STEPS = "steps"
    UPDATE = "update"
    COSINE = "update-cosine"
    RELEASE = "release"

    @property
    def adversary(self) -> str:
        """In words."""
        return _ADVERSARIES[self]


_ADVERSARIES: Final = {
    View.STEPS: "whoever sees the gradient of each step, and knows all but the coins",
    View.UPDATE: "the server in the open mode, which sees the update, and knows all but the coins",
    View.COSINE: "the same, by the plain cosine with each gradient",
    View.RELEASE: "anyone, by the losses before and after",
}
HEADLINE: Final = View.STEPS
"""The view whose bound is held against the claim; chosen before the audits in the documents."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CanaryRun:
    """One run: the coins [m], and each view's scores [m]."""

    seed: int
    included: NDArray[np.bool_]
    scores: dict[View, Float64Array]


@dataclass(frozen=True, kw_only=True)
class ViewAudit:
    """What one view found over all runs.

    Attributes:
        view: Which.
        pooled: The bound from the guesses of all runs together.
        runs: The bound of each run by itself.
        aucs: Of each run: how often a canary that was in scores above one that was not.
    """

    view: View
    pooled: Audit
    runs: tuple[Audit, ...]
    aucs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class CanaryAudit:
    """The audit of one protection."""

    claim: Claim
    views: tuple[ViewAudit, ...]
    runs: tuple[CanaryRun, ...]

    def view(self, view: View) -> ViewAudit:
        """What one view found."""
        return next(found for found in self.views if found.view is view)

    @property
    def headline(self) -> ViewAudit:
        """What is held against the claim."""
        return self.view(HEADLINE)

    @property
    def refuted(self) -> bool:
        """Whether the bound exceeds what is claimed."""
        return self.headline.pooled.epsilon_lower_bound > self.claim.epsilon


def audit_canaries(
    subject: Subject,
    recipe: AuditRecipe,
    claim: Claim,
    *,
    secret_of: Callable[[int], bytes | None] = lambda _: None,
    on_run: Callable[[], None] = lambda: None,
) -> CanaryAudit:
    """Run a training with canaries `recipe.n_runs` times, and bound ε from below.

    Guarantees:
        1. Where the training is (ε, δ)-DP for an example, added or removed, the pooled bound of
           a view exceeds ε with probability at most 1 − `recipe.confidence`: each canary was in
           by a fair coin of its own, the number of guesses was fixed before, and the divisor and
           the sampling probability do not depend on the coins.
        2. Without noise and with a fixed seed the result is reproducible; with noise it is not,
           unless `secret_of` fixes what nobody may know.

    Args:
        subject: Its adapter is replaced.
        recipe: Sizes, seeds, confidence.
        claim: What is audited.
        secret_of: The secret of noise and sampling by a run's seed, for tests; None: the system's.
        on_run: Told after each run.

    Raises:
        TrainingError: A training gave nothing.
    """
    runs = []
    for seed in range(recipe.seed, recipe.seed + recipe.n_runs):
        runs.append(run_canaries(subject, recipe, claim, seed=seed, secret=secret_of(seed)))
        on_run()
    return CanaryAudit(
        claim=claim,
        views=tuple(_audit_view(view, runs, recipe) for view in View),
        runs=tuple(runs),
    )


def run_canaries(
    subject: Subject, recipe: AuditRecipe, claim: Claim, *, seed: int, secret: bytes | None = None
) -> CanaryRun:
    """Draw records and coins, train, score every canary in every view.

    Args:
        subject: Its adapter is replaced.
        recipe: Sizes.
        claim: What is audited.
        seed: Of records and coins, and of the order of batches without noise.
        secret: Of noise and sampling; None: the system's.

    Raises:
        TrainingError: The training gave nothing.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, _PURPOSE]))
    block = recipe.training(batch_size=recipe.canary_batch_size, n_steps=recipe.n_steps)
    tokenizer = subject.base.tokenizer
    ordinary = as_examples(ordinary_records(recipe.n_ordinary, rng), tokenizer, block)
    canaries = as_examples(canary_records(recipe.n_canaries, tokenizer, rng), tokenizer, block)
    included = rng.random(recipe.n_canaries) < 0.5
    trained = subject.train(
        [*ordinary, *(one for one, is_in in zip(canaries, included, strict=True) if is_in)],
        block,
        claim,
        seed=seed,
        clip_norm=recipe.clip_norm,
        n_examples=recipe.n_expected,
        secret=secret,
    )
    scores = _score(subject, recipe, claim, trained, (*canaries, *ordinary))
    return CanaryRun(seed=seed, included=included, scores=scores)


def _score(
    subject: Subject,
    recipe: AuditRecipe,
    claim: Claim,
    trained: Trained,
    examples: tuple[Example, ...],
) -> dict[View, Float64Array]:
    """Scores of the canaries, which come first among the examples; the adversary knows all."""
    n_canaries = recipe.n_canaries
    was_in = np.ones(len(examples))
    was_in[:n_canaries] = 0.5
    odds = np.zeros(n_canaries)
    scores: dict[View, Float64Array] = {}
    for number, step in enumerate(trained.steps):
        gradients = subject.gradients(step.weights, examples)
        if number == 0:
            canaries = gradients[:n_canaries]
            scores[View.UPDATE] = update_coefficients(gradients, trained.update)[:n_canaries]
            scores[View.COSINE] = cosine_scores(trained.update, canaries)
        if claim.noise_multiplier is not None:
            gradients = clipped(gradients, clip_norm=recipe.clip_norm)
        released_sum = step.gradient * np.float32(step.divisor)
        # Never quite 1: where every example is drawn, those that are surely in explain nothing.
        probability = min(1.0, step.divisor / recipe.n_expected)
        prior = was_in * min(probability, 1.0 - 1e-6)
        gradients = gradients * np.float32(scale_of(gradients, released_sum, prior=prior))
        rounding = _SMALL * float(np.linalg.norm(gradients, axis=1).mean())
        odds += step_log_odds(
            gradients,
            released_sum,
            prior=prior,
            probability=probability,
            noise_std=max(rounding, noise_std_of(gradients, released_sum)),
        )[:n_canaries]
    scores[View.STEPS] = odds
    scores[View.RELEASE] = loss_ratio_scores(
        reference_losses=subject.losses(trained.start, examples[:n_canaries]),
        model_losses=subject.losses(trained.final, examples[:n_canaries]),
    )
    return scores


def _audit_view(view: View, runs: list[CanaryRun], recipe: AuditRecipe) -> ViewAudit:
    audits = tuple(
        one_run_bound(
            run.included,
            run.scores[view],
            n_guesses=recipe.n_guesses,
            delta=recipe.delta,
            confidence=recipe.confidence,
        )
        for run in runs
    )
    return ViewAudit(
        view=view,
        pooled=pooled(audits),
        runs=audits,
        aucs=tuple(
            auc(run.scores[view][run.included], run.scores[view][~run.included]) for run in runs
        ),
    )


def pooled(audits: tuple[Audit, ...]) -> Audit:
    """The bound from the guesses of several runs together.

    Runs with no example in common release, all together, what is (ε, δ)-DP if each is: an example
    is in one of them only. Their canaries are then the canaries of one run.

    Args:
        audits: At least one; all of one δ and confidence.
    """
    return audit_of_counts(
        n_canaries=sum(audit.n_canaries for audit in audits),
        n_guesses=sum(audit.n_guesses for audit in audits),
        n_right=sum(audit.n_right for audit in audits),
        delta=audits[0].delta,
        confidence=audits[0].confidence,
    )

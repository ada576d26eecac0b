"""Membership inference: which records was a release trained on, from losses alone.

The adversary has the release and the base, and a record; it scores the record by its losses under
both. Members and non-members must be alike in all else, or the audit finds the difference between
two sorts of records and not membership.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import numpy as np

from edge_agent.answering import load_base_of
from edge_agent.data.reading import read_records
from edge_agent.data.records import Record
from edge_agent.data.tokens import Example, tokenize
from privacy.auditing.membership import (
    Membership,
    auc,
    clopper_pearson,
    loss_ratio_scores,
    membership_inference,
)
from protocol.blocks import LossOn, Template
from protocol.guarantee import OFF, describe_privacy
from quant.peft_folder import FinishedAdapter, attach, read_finished
from simulations.audit.recipe import AuditRecipe, Claim, ReleaseRules, Tell
from simulations.audit.records import as_examples, ordinary_records
from simulations.audit.scores import Float64Array
from simulations.audit.training import Subject, losses_of
from simulations.errors import AuditInputError

_PURPOSE: Final = 2
_CONFIDENCE: Final = 0.95
_N_RESAMPLES: Final = 400
_LEAST_LOSS: Final = 1e-9
"""A loss of 0 has no logarithm."""
_DEFAULT_LENGTH: Final = 512


class Score(StrEnum):
    """How two losses become one score; higher says member."""

    RATIO = "loss ratio"
    RELATIVE = "relative loss"
    LOSS = "loss alone"

    @property
    def formula(self) -> str:
        """In symbols: b is the loss under the base, r under the release."""
        return {Score.RATIO: "b − r", Score.RELATIVE: "log b − log r", Score.LOSS: "− r"}[self]


@dataclass(frozen=True, kw_only=True, eq=False)
class Losses:
    """Losses [n] of a group of records."""

    base: Float64Array
    release: Float64Array

    def scores(self, score: Score) -> Float64Array:
        """Scores [n]."""
        if score is Score.LOSS:
            return -self.release
        if score is Score.RATIO:
            return loss_ratio_scores(reference_losses=self.base, model_losses=self.release)
        return loss_ratio_scores(
            reference_losses=np.log(np.maximum(self.base, _LEAST_LOSS)),
            model_losses=np.log(np.maximum(self.release, _LEAST_LOSS)),
        )


@dataclass(frozen=True, kw_only=True)
class ScoreAudit:
    """What one score finds.

    Attributes:
        score: Which.
        found: AUC, balanced accuracy, the rate at a low false positive rate, and the bound, which
            is an estimate: the examples of one release are not independent.
        auc_interval: Of the AUC, by resampling members and non-members.
        tpr_interval: Of `found.tpr`, at its threshold in hindsight.
    """

    score: Score
    found: Membership
    auc_interval: tuple[float, float]
    tpr_interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class MembershipAudit:
    """The audit of one release.

    Attributes:
        claim: What is claimed of it, as one line.
        protection: The claim, where the release was trained here.
        members: Their losses.
        non_members: Theirs.
        scores: One for each `Score`.
    """

    claim: str
    protection: Claim | None
    members: Losses
    non_members: Losses
    scores: tuple[ScoreAudit, ...]

    def score(self, score: Score) -> ScoreAudit:
        """What one score finds."""
        return next(found for found in self.scores if found.score is score)


def judge(
    members: Losses, non_members: Losses, *, rng: np.random.Generator, delta: float
) -> tuple[ScoreAudit, ...]:
    """Every score's success, with intervals at 95 %.

    Args:
        members: At least 2.
        non_members: At least 2.
        rng: Draws halves and resamples.
        delta: δ of the bounds.

    Raises:
        AuditInputError: A group has fewer than 2 records.
    """
    if min(len(members.base), len(non_members.base)) < 2:
        raise AuditInputError(
            f"{len(members.base)} members and {len(non_members.base)} non-members; at least 2 of "
            "each are needed"
        )
    audits = []
    for score in Score:
        inside, outside = members.scores(score), non_members.scores(score)
        found = membership_inference(inside, outside, rng=rng, delta=delta, confidence=_CONFIDENCE)
        n_hits = round(found.tpr * found.n_members)
        audits.append(
            ScoreAudit(
                score=score,
                found=found,
                auc_interval=_auc_interval(inside, outside, rng),
                tpr_interval=clopper_pearson(n_hits, found.n_members, confidence=_CONFIDENCE),
            )
        )
    return tuple(audits)


def audit_members(
    subject: Subject, recipe: AuditRecipe, claim: Claim, *, secret: bytes | None = None
) -> MembershipAudit:
    """Train a release on half-known records, and tell members from others of the same kind.

    Args:
        subject: Its adapter is replaced.
        recipe: Sizes and seed.
        claim: What is claimed of the training.
        secret: Of noise and sampling; None: the system's.

    Raises:
        TrainingError: The training gave nothing.
    """
    rng = np.random.default_rng(np.random.SeedSequence([recipe.seed, _PURPOSE]))
    block = recipe.training(batch_size=recipe.member_batch_size, n_steps=recipe.n_member_steps)
    records = ordinary_records(recipe.n_members + recipe.n_non_members, rng)
    examples = as_examples(records, subject.base.tokenizer, block)
    members, others = examples[: recipe.n_members], examples[recipe.n_members :]
    trained = subject.train(
        members, block, claim, seed=recipe.seed, clip_norm=recipe.clip_norm, secret=secret
    )

    def losses(group: Sequence[Example]) -> Losses:
        return Losses(
            base=subject.losses(trained.start, group), release=subject.losses(trained.final, group)
        )

    found_in, found_out = losses(members), losses(others)
    return MembershipAudit(
        claim=claim.describe(),
        protection=claim,
        members=found_in,
        non_members=found_out,
        scores=judge(found_in, found_out, rng=rng, delta=recipe.delta),
    )


def audit_release(
    folder: Path,
    members: Path,
    non_members: Path,
    *,
    rules: ReleaseRules,
    tell: Tell = lambda *_: None,
) -> MembershipAudit:
    """Membership inference on any release that is plain LoRA.

    Template, length and what carries loss are those of the training where the release says them,
    else Alpaca's, 512 tokens, and the response.

    Args:
        folder: A PEFT folder.
        members: Records that it was trained on: JSON, JSON Lines, CSV or Parquet.
        non_members: Records like them that it was not trained on.
        rules: Base, length, seed, δ.
        tell: Told what is done.

    Raises:
        AdapterError: Not such a folder, or for another base.
        AuditInputError: The two files share a record, or hold fewer than 2.
        BaseModelError: The base cannot be loaded.
        DataError: A file cannot be used.
    """
    adapter = read_finished(folder)
    inside, outside = read_records(members)[0], read_records(non_members)[0]
    _refuse_shared(inside, outside)
    tell("the base", 0, 1)
    loaded = load_base_of(adapter, rules.base)
    tell("the base", 1, 1)
    template, loss_on, length = _rules_of(adapter)
    adapted = attach(loaded, adapter)
    pad_id = loaded.pad_id
    found = []
    for stage, records in (("members", inside), ("non-members", outside)):
        tell(stage, 0, 1)
        examples = tokenize(
            records,
            loaded.tokenizer,
            template=template,
            loss_on=loss_on,
            max_length=rules.max_length or length,
        ).examples
        with adapted.disabled():
            reference = losses_of(adapted, examples, pad_id=pad_id)
        release = losses_of(adapted, examples, pad_id=pad_id)
        found.append(Losses(base=reference, release=release))
        tell(stage, 1, 1)
    adapted.detach()
    rng = np.random.default_rng(np.random.SeedSequence([rules.seed, _PURPOSE]))
    return MembershipAudit(
        claim=_claim_of(adapter),
        protection=None,
        members=found[0],
        non_members=found[1],
        scores=judge(found[0], found[1], rng=rng, delta=rules.delta),
    )


def _rules_of(adapter: FinishedAdapter) -> tuple[Template, LossOn, int]:
    if adapter.provenance is None:
        return Template.ALPACA, LossOn.RESPONSE, _DEFAULT_LENGTH
    block = adapter.provenance.training
    return block.template, block.loss_on, block.max_length


def _claim_of(adapter: FinishedAdapter) -> str:
    if adapter.provenance is None:
        return f"unknown: the release does not say how it was made; take it for {OFF}"
    return describe_privacy(adapter.provenance.privacy, n_rounds=adapter.provenance.n_rounds)


def _refuse_shared(members: Sequence[Record], non_members: Sequence[Record]) -> None:
    def contents(records: Sequence[Record]) -> set[tuple[object, ...]]:
        return {(r.instruction, r.context, r.response, r.messages) for r in records}

    n_shared = len(contents(members) & contents(non_members))
    if n_shared:
        raise AuditInputError(
            f"{n_shared} records are in both files; a record is a member or it is not, so take "
            "them out of one"
        )


def _auc_interval(
    inside: Float64Array, outside: Float64Array, rng: np.random.Generator
) -> tuple[float, float]:
    found = [
        auc(
            rng.choice(inside, size=len(inside), replace=True),
            rng.choice(outside, size=len(outside), replace=True),
        )
        for _ in range(_N_RESAMPLES)
    ]
    low, high = np.quantile(found, [(1.0 - _CONFIDENCE) / 2, (1.0 + _CONFIDENCE) / 2]).tolist()
    return float(low), float(high)

"""What the trusted evaluator says of candidates, and what follows from it.

Server and agents judge a report by the same function, so a release that an evaluator did not let
pass is refused by every agent.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from protocol import limits
from protocol.blocks import EvaluatorGate
from protocol.numbers import PositiveInt, RoundNumber
from protocol.wire import Bytes16, Digest, Identity, WireModel, domain_hash

Loss = Annotated[float, Field(ge=0.0)] | None
"""Mean loss of a token in nats; None where it is not finite."""
Category = Annotated[str, Field(min_length=1, max_length=limits.MAX_CATEGORY_CHARS)]


class EvaluationReport(WireModel):
    """The losses of some adapters on the evaluator's own records (message name `evaluation`).

    Row 0 of `losses` is of `current`, the adapter that the round started from, row i + 1 of
    `candidates[i]`; columns are `categories`. Adapters are named by the SHA-256 of their file.
    """

    version: Literal[1] = 1
    federation: Bytes16
    round: RoundNumber
    task: Digest
    """Of the task that is answered."""
    evaluator: Identity
    data: Digest
    """SHA-256 of the evaluator's records, so that another set shows."""
    current: Digest
    candidates: Annotated[tuple[Digest, ...], Field(min_length=1, max_length=limits.MAX_CANDIDATES)]
    categories: Annotated[
        tuple[Category, ...], Field(min_length=1, max_length=limits.MAX_CATEGORIES)
    ]
    n_records: tuple[PositiveInt, ...]
    losses: tuple[tuple[Loss, ...], ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        n_columns, n_rows = len(self.categories), 1 + len(self.candidates)
        if len(set(self.categories)) != n_columns or len(self.n_records) != n_columns:
            msg = f"expected {n_columns} different categories, and a number of records for each"
            raise ValueError(msg)
        if len(self.losses) != n_rows or any(len(row) != n_columns for row in self.losses):
            msg = f"losses must have {n_rows} rows of {n_columns} categories"
            raise ValueError(msg)
        return self

    def digest(self) -> bytes:
        """The hash that tells two reports apart."""
        return domain_hash("evaluation", self.as_json())

    def mean_loss(self, row: int) -> float:
        """Mean of a row over the categories, in nats per token; infinite where one is None."""
        return math.fsum(math.inf if loss is None else loss for loss in self.losses[row]) / len(
            self.categories
        )


def objection(report: EvaluationReport, candidate: int, gate: EvaluatorGate) -> str | None:
    """Why a candidate does not pass; None: it passes.

    Args:
        report: Its signature has been checked.
        candidate: Index into `report.candidates`.
        gate: The manifest's tolerance.
    """
    row = report.losses[candidate + 1]
    for name, before, after in zip(report.categories, report.losses[0], row, strict=True):
        if after is None:
            return f"its loss on {name!r} is not finite"
        if before is not None and after - before > gate.max_category_loss_increase:
            return (
                f"its loss on {name!r} rises from {before:.4g} to {after:.4g} nats per token, "
                f"by more than {gate.max_category_loss_increase:g}"
            )
    before_all, after_all = report.mean_loss(0), report.mean_loss(candidate + 1)
    if after_all - before_all > gate.max_loss_increase:
        return (
            f"its loss, averaged over {len(report.categories)} categories, rises from "
            f"{before_all:.4g} to {after_all:.4g} nats per token, by more than "
            f"{gate.max_loss_increase:g}"
        )
    return None

"""The settings that `init` writes: the paper's recipe, with what the operator asked for."""

import secrets
from dataclasses import dataclass, field
from typing import Final

from pydantic import SecretStr, ValidationError

from aggregator_server.config import (
    Enrolment,
    FederationSection,
    ServerConfig,
    ServerSection,
)
from aggregator_server.errors import ConfigError
from protocol.base_description import BaseDescription
from protocol.manifest import Factor, LoraBlock, RoundsBlock, Schedule, Template, TrainingBlock
from protocol.wire import explain

_PAPER_MODULES: Final = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
_HEADS: Final = frozenset({"lm_head", "embed_out", "score"})
_SEED_BITS: Final = 53


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What `init` can be told; None stands for the default."""

    name: str
    description: str = ""
    n_rounds: int = 20
    cohort_target: int = 5
    min_cohort: int | None = None
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.05
    target_modules: tuple[str, ...] | None = None
    sent: tuple[Factor, ...] = (Factor.A, Factor.B)
    template: Template = Template.ALPACA
    max_length: int = 512
    batch_size: int = 32
    local_steps: int | None = None
    local_epochs: int | None = None
    learning_rate: float = 1.5e-4
    schedule: Schedule = Schedule.COSINE
    deadline_s: float = 24 * 3600.0
    open_enrolment: bool = False
    database_url: str = field(default="", repr=False)
    blobs_url: str = field(default="", repr=False)


def make_config(options: RecipeOptions, base: BaseDescription) -> ServerConfig:
    """Settings for a new federation.

    Args:
        options: What the operator asked for.
        base: Says which modules can be adapted.

    Raises:
        ConfigError: A value out of range.

    Source: FedIT, arXiv 2305.05644, section 4: rank 8, alpha 16, dropout 0.05, six modules, batch
    32, 1.5e-4, 512 tokens, one local epoch, 20 rounds of 5 clients. Ours: the loss is on the
    response, and the learning rate follows one cosine over all rounds.
    """
    rules = options
    epochs = rules.local_epochs
    if rules.local_steps is None and epochs is None:
        epochs = 1
    try:
        return ServerConfig(
            federation=FederationSection(name=rules.name, description=rules.description),
            lora=LoraBlock(
                rank=rules.rank,
                alpha=2.0 * rules.rank if rules.alpha is None else rules.alpha,
                dropout=rules.dropout,
                target_modules=rules.target_modules or default_modules(base),
                sent=rules.sent,
                init_seed=secrets.randbits(_SEED_BITS),
            ),
            training=TrainingBlock(
                template=rules.template,
                max_length=rules.max_length,
                batch_size=rules.batch_size,
                local_steps=rules.local_steps,
                local_epochs=epochs,
                learning_rate=rules.learning_rate,
                schedule=rules.schedule,
            ),
            rounds=RoundsBlock(
                n_rounds=rules.n_rounds,
                cohort_target=rules.cohort_target,
                min_cohort=_min_cohort(rules),
                deadline_s=rules.deadline_s,
                cap_s=rules.deadline_s + max(60.0, rules.deadline_s / 12),
            ),
            server=ServerSection(
                enrolment=Enrolment.OPEN if rules.open_enrolment else Enrolment.INVITE,
                database_url=SecretStr(rules.database_url),
                blobs_url=SecretStr(rules.blobs_url),
            ),
        )
    except ValidationError as error:
        raise ConfigError(explain("the recipe", error)) from error


def default_modules(base: BaseDescription) -> tuple[str, ...]:
    """The paper's six projections where the base has them, else all its linear layers but heads."""
    known = {module.name.rpartition(".")[2] for module in base.linear_modules}
    paper = tuple(name for name in _PAPER_MODULES if name in known)
    return paper or tuple(sorted(known - _HEADS))


def _min_cohort(options: RecipeOptions) -> int:
    if options.min_cohort is not None:
        return options.min_cohort
    return min(2, options.cohort_target)

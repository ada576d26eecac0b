"""The manifest of a run: what `sheepfold-server init` would sign for the same wishes."""

from dataclasses import dataclass
from typing import Final

from aggregator_server.config import ServerConfig
from aggregator_server.founding import build_manifest
from aggregator_server.private_recipes import PrivacyOptions
from aggregator_server.recipes import OPTIMIZERS, Masking, RecipeOptions, make_config
from privacy.turns import Turns
from protocol.base_description import BaseDescription
from protocol.blocks import FilterRule, LoraBlock, LoraRule, RoundsBlock
from protocol.layout import VectorLayout
from protocol.manifest import FederationManifest
from quant.adapter import adapter_shapes, sent_layout
from quant.companions import update_layouts
from quant.lora_turns import sent_factors
from simulations.lab.chance import RunChance
from simulations.lab.experiment import Experiment, FederationSection
from simulations.lab.records import Arm

_SERVER: Final = bytes(31) + b"\x01"
_REGISTRAR: Final = bytes(31) + b"\x02"
_HOUR_S: Final = 3600.0


@dataclass(frozen=True, kw_only=True)
class RunTerms:
    """What a run's rounds are made by.

    Attributes:
        manifest: As an operator would sign it, under identities that are nobody's.
        turns: What the updates of each round look like.
        tensors: Layout of the adapter's values in the updates of all rounds.
        whole: Layout of all values of the adapter, sent or not.
    """

    manifest: FederationManifest
    turns: Turns
    tensors: VectorLayout
    whole: VectorLayout


def make_terms(experiment: Experiment, base: BaseDescription, *, arm: Arm, seed: int) -> RunTerms:
    """The terms of a run.

    Args:
        experiment: What was asked for.
        base: The base model.
        arm: A baseline trains one client in one round, in the open, without noise or filter.
        seed: Of the run; it decides about release 0.

    Raises:
        ConfigError: Values that no federation can have, as `init` says it.
        ManifestError: A target module is not in the base.
        PrivacyError: No noise keeps to the ε that is asked for, or it would drown the updates.
    """
    section = experiment.federation.model_copy(
        update={"learning_rate": experiment.learning_rate_of(arm)}
    )
    config = make_config(_options(experiment.name, section), base)
    if arm is not Arm.FEDERATED:
        section = alone(section, config.lora, epochs=experiment.baselines.epochs)
        config = make_config(_options(experiment.name, section), base)
    config = _with_the_rest(config, section, seed)
    manifest = build_manifest(
        config,
        base,
        server=_SERVER,
        registrar=_REGISTRAR,
        federation=RunChance(seed).secret("federation")[:16],
        created_at=0.0,
    )
    shapes = adapter_shapes(base, manifest.lora)
    turns = Turns.of(update_layouts(shapes, manifest.lora, manifest.training), manifest)
    both = sent_factors(LoraRule.FEDIT, 0)
    return RunTerms(
        manifest=manifest,
        turns=turns,
        tensors=sent_layout(shapes, manifest.lora.sent),
        whole=sent_layout(shapes, both),
    )


def alone(section: FederationSection, lora: LoraBlock, *, epochs: int) -> FederationSection:
    """The recipe of a baseline: one client, one round, and nothing between it and its adapter.

    What is trained stays: factors, rank, α, dropout, batch, lengths.

    Args:
        section: The federation's.
        lora: What became of it: masks and noise have defaults of their own.
        epochs: Passes over the records.
    """
    rule = lora.rule
    if rule in {LoraRule.ROLORA, LoraRule.FLEXLORA}:
        rule = LoraRule.FEDIT  # alone, both factors at once
    return section.model_copy(
        update={
            "n_rounds": 1,
            "cohort": 1,
            "min_cohort": 1,
            "over_selection": 1.0,
            "local_epochs": epochs,
            "local_steps": None,
            "lora_rule": rule,
            "alpha": lora.alpha,
            "dropout": lora.dropout,
            "masking": Masking.OFF,
            "epsilon": None,
            "adaptive_clip": False,
            "filter": FilterRule.NONE,
            "optimizer": FederationSection().optimizer,
            "server_learning_rate": None,
            "proximal_mu": 0.0,
        }
    )


def _options(name: str, section: FederationSection) -> RecipeOptions:
    optimizer = OPTIMIZERS[section.optimizer]
    if section.server_learning_rate is not None:
        optimizer = optimizer.model_copy(update={"learning_rate": section.server_learning_rate})
    return RecipeOptions(
        name=name,
        n_rounds=section.n_rounds,
        cohort_target=section.cohort,
        min_cohort=section.min_cohort,
        rank=section.rank,
        alpha=section.alpha,
        dropout=section.dropout,
        target_modules=section.target_modules,
        lora_rule=section.lora_rule,
        privacy=PrivacyOptions(
            epsilon=section.epsilon,
            delta=section.delta,
            profile=section.profile,
            clip_norm=section.clip_norm,
            adaptive_clip=section.adaptive_clip,
        ),
        filter=section.filter,
        optimizer=optimizer,
        masking=section.masking,
        cell_target=section.cell_target,
        word_bits=section.word_bits,
        template=section.template,
        max_length=section.max_length,
        batch_size=section.batch_size,
        local_steps=section.local_steps,
        local_epochs=section.local_epochs,
        learning_rate=section.learning_rate or RecipeOptions.learning_rate,
        schedule=section.schedule,
        deadline_s=section.deadline_s,
    )


def _with_the_rest(config: ServerConfig, section: FederationSection, seed: int) -> ServerConfig:
    """What `init` leaves to whoever edits its file, and the seed of release 0."""
    rounds = config.rounds.model_dump() | {"over_selection": section.over_selection}
    training = config.training.model_copy(
        update={"loss_on": section.loss_on, "proximal_mu": section.proximal_mu}
    )
    lora = config.lora.model_copy(update={"init_seed": RunChance(seed).integer("release 0")})
    return config.model_copy(
        update={
            "rounds": RoundsBlock.model_validate(rounds),
            "training": training,
            "lora": lora,
        }
    )

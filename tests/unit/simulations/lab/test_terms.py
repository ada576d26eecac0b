"""The manifest of a run against the one that `sheepfold-server init` would make."""

from collections.abc import Mapping
from typing import Any

import pytest

from aggregator_server.errors import ConfigError
from aggregator_server.private_recipes import PrivacyOptions, Profile
from aggregator_server.recipes import OPTIMIZERS, Masking, Optimizer, RecipeOptions, make_config
from privacy.errors import PrivacyError
from protocol.base_description import BaseDescription
from protocol.blocks import (
    CellMasking,
    Factor,
    FilterRule,
    LoraBlock,
    LoraRule,
    LossOn,
    NoMasking,
    Schedule,
    Weighting,
)
from protocol.errors import ManifestError
from protocol.manifest import FederationManifest
from protocol.privacy import NoPrivacy
from protocol.wire import parse
from quant.base_model import LoadedBase
from quant.lora_turns import sent_factors
from simulations.lab.experiment import Experiment
from simulations.lab.records import Arm
from simulations.lab.terms import RunTerms, alone, make_terms

BASELINES = [Arm.BASE, Arm.CENTRALISED, Arm.LOCAL]


@pytest.fixture(scope="module")
def described(base: LoadedBase) -> BaseDescription:
    return base.description


def terms_of(
    described: BaseDescription,
    values: Mapping[str, Any],
    *,
    arm: Arm = Arm.FEDERATED,
    seed: int = 1,
) -> RunTerms:
    return make_terms(Experiment(name="x").with_values(values), described, arm=arm, seed=seed)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        pytest.param({}, {"masking": Masking.OFF}, id="paper"),
        pytest.param({"federation.epsilon": 8}, {"privacy": PrivacyOptions(epsilon=8.0)}, id="p1"),
        pytest.param(
            {
                "federation.epsilon": 30,
                "federation.profile": "P3",
                "federation.adaptive_clip": True,
            },
            {"privacy": PrivacyOptions(epsilon=30.0, profile=Profile.CENTRAL, adaptive_clip=True)},
            id="p3",
        ),
        pytest.param(
            {
                "federation.epsilon": 50,
                "federation.profile": "P2",
                "federation.masking": "cells",
                "federation.word_bits": 32,
                "federation.rank": 1,
                "federation.n_rounds": 3,
                "federation.clip_norm": 0.2,
            },
            {
                "privacy": PrivacyOptions(epsilon=50.0, profile=Profile.AGENT, clip_norm=0.2),
                "masking": Masking.CELLS,
                "word_bits": 32,
                "rank": 1,
                "n_rounds": 3,
            },
            id="p2",
        ),
        pytest.param(
            {
                "federation.masking": "cells",
                "federation.cohort": 30,
                "federation.cell_target": 6,
                "federation.local_steps": 4,
            },
            {
                "masking": Masking.CELLS,
                "cohort_target": 30,
                "cell_target": 6,
                "local_steps": 4,
            },
            id="masks",
        ),
        pytest.param(
            {
                "federation.lora_rule": "rolora",
                "federation.filter": "robust",
                "federation.alpha": 3.5,
                "federation.dropout": 0.2,
                "federation.target_modules": ["q_proj"],
                "federation.schedule": "linear",
                "federation.min_cohort": 3,
                "federation.deadline_s": 600.0,
            },
            {
                "lora_rule": LoraRule.ROLORA,
                "filter": FilterRule.ROBUST,
                "alpha": 3.5,
                "dropout": 0.2,
                "target_modules": ("q_proj",),
                "schedule": Schedule.LINEAR,
                "min_cohort": 3,
                "deadline_s": 600.0,
            },
            id="rules",
        ),
        pytest.param(
            {"federation.optimizer": "fedyogi", "federation.server_learning_rate": 0.5},
            {"optimizer": OPTIMIZERS[Optimizer.FEDYOGI].model_copy(update={"learning_rate": 0.5})},
            id="fedyogi",
        ),
    ],
)
def test_the_manifest_is_what_init_makes_of_the_same_wishes(
    described: BaseDescription, values: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    values = {"federation.learning_rate": 1e-3, **values}
    found = terms_of(described, values).manifest
    wanted = make_config(
        RecipeOptions(**{"name": "x", "learning_rate": 1e-3, "masking": Masking.OFF, **options}),
        described,
    )
    assert found.lora.model_copy(update={"init_seed": 0}) == wanted.lora.model_copy(
        update={"init_seed": 0}
    )
    assert found.training == wanted.training.model_copy(update={"loss_on": LossOn.ALL})
    assert found.rounds == wanted.rounds.model_copy(update={"over_selection": 1.0})
    for block in ("aggregation", "masking", "privacy", "filter", "gate"):
        assert getattr(found, block) == getattr(wanted, block), block


def test_what_init_leaves_to_the_operator_s_editor_is_set(described: BaseDescription) -> None:
    found = terms_of(
        described,
        {
            "federation.over_selection": 1.5,
            "federation.loss_on": "response",
            "federation.proximal_mu": 0.1,
        },
    ).manifest
    assert found.rounds.over_selection == 1.5
    assert found.training.loss_on is LossOn.RESPONSE
    assert found.training.proximal_mu == 0.1


def test_a_manifest_is_one_that_an_agent_would_accept(described: BaseDescription) -> None:
    found = terms_of(described, {"federation.masking": "cells"}).manifest
    assert parse(FederationManifest, found.canonical()) == found
    assert found.base == described.base


def test_the_seed_decides_about_release_0_and_nothing_else(described: BaseDescription) -> None:
    one, again, other = (terms_of(described, {}, seed=seed).manifest for seed in (1, 1, 2))
    assert one.digest() == again.digest() != other.digest()
    assert one.lora.init_seed != other.lora.init_seed
    assert one.training == other.training


def test_layouts_take_turns_where_factors_do(described: BaseDescription) -> None:
    terms = terms_of(described, {"federation.lora_rule": "rolora"})
    sizes = [terms.turns.at(release).layout.n_values for release in range(3)]
    assert sizes[0] == sizes[2] != sizes[1]
    assert terms.whole.n_values == sizes[0] + sizes[1]
    assert sent_factors(LoraRule.ROLORA, 0) == (Factor.B,)


@pytest.mark.parametrize("arm", BASELINES)
@pytest.mark.parametrize(
    "values",
    [
        {"federation.masking": "cells", "federation.cohort": 20},
        {"federation.epsilon": 8, "federation.local_steps": 5},
        {"federation.epsilon": 30, "federation.profile": "P3", "federation.adaptive_clip": True},
        {"federation.optimizer": "fedadam", "federation.server_learning_rate": 0.1},
        {"federation.proximal_mu": 0.5, "federation.over_selection": 2.0},
    ],
    ids=["masks", "p1", "p3", "fedadam", "fedprox"],
)
def test_a_baseline_has_nothing_between_it_and_its_adapter(
    described: BaseDescription, arm: Arm, values: Mapping[str, Any]
) -> None:
    found = terms_of(described, {**values, "baselines.epochs": 2}, arm=arm).manifest
    assert isinstance(found.masking, NoMasking)
    assert isinstance(found.privacy, NoPrivacy)
    assert found.filter.rule is FilterRule.NONE
    assert found.aggregation.optimizer == OPTIMIZERS[Optimizer.FEDAVG]
    assert found.aggregation.weighting is Weighting.N_EXAMPLES
    rounds, training = found.rounds, found.training
    assert (rounds.n_rounds, rounds.cohort_target, rounds.min_cohort) == (1, 1, 1)
    assert (training.local_epochs, training.local_steps) == (2, None)
    assert (training.proximal_mu, rounds.over_selection) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({}, LoraRule.FEDIT),
        ({"federation.masking": "cells"}, LoraRule.FFA_LORA),
        ({"federation.epsilon": 8}, LoraRule.FFA_LORA),
        ({"federation.lora_rule": "rolora"}, LoraRule.FEDIT),
        ({"federation.lora_rule": "flexlora"}, LoraRule.FEDIT),
        ({"federation.lora_rule": "ffa-lora"}, LoraRule.FFA_LORA),
        # Too few for a cell: masks that are wished for where there can be some, and there are none.
        ({"federation.masking": "auto", "federation.cohort": 4}, LoraRule.FEDIT),
        ({"federation.masking": "auto", "federation.cohort": 20}, LoraRule.FFA_LORA),
    ],
)
def test_a_baseline_trains_the_factors_of_its_federation(
    described: BaseDescription, values: Mapping[str, Any], rule: LoraRule
) -> None:
    federated = terms_of(described, values).manifest
    baseline = terms_of(described, values, arm=Arm.CENTRALISED).manifest
    assert baseline.lora.rule is rule
    same = {"rank", "alpha", "dropout", "target_modules", "init_seed"}
    assert baseline.lora.model_dump(include=same) == federated.lora.model_dump(include=same)
    for name in ("learning_rate", "batch_size", "max_length", "schedule", "template", "loss_on"):
        assert getattr(baseline.training, name) == getattr(federated.training, name)


def test_a_baseline_may_have_a_learning_rate_of_its_own(described: BaseDescription) -> None:
    values = {
        "federation.learning_rate": 8e-3,
        "baselines.centralised_learning_rate": 2e-3,
        "baselines.local_learning_rate": 1e-3,
    }
    rates = {
        arm: terms_of(described, values, arm=arm).manifest.training.learning_rate for arm in Arm
    }
    assert rates == {
        Arm.FEDERATED: 8e-3,
        Arm.BASE: 8e-3,
        Arm.CENTRALISED: 2e-3,
        Arm.LOCAL: 1e-3,
    }


def test_a_baseline_s_section_keeps_what_is_trained() -> None:
    section = Experiment(name="x").with_values({"federation.batch_size": 7}).federation
    lora = LoraBlock(rank=8, alpha=24.0, dropout=0.3, target_modules=("q_proj",), init_seed=1)
    found = alone(section, lora, epochs=3)
    assert (found.batch_size, found.local_epochs) == (7, 3)
    assert (found.alpha, found.dropout, found.lora_rule) == (24.0, 0.3, LoraRule.FEDIT)


def test_cells_are_masked_within_what_a_round_can_change(described: BaseDescription) -> None:
    values = {
        "federation.masking": "cells",
        "federation.local_steps": 10,
        "federation.learning_rate": 1e-3,
    }
    found = terms_of(described, values)
    masking = found.manifest.masking
    assert isinstance(masking, CellMasking)
    assert masking.max_change == pytest.approx(1e-2)
    assert found.turns.at(0).plan is not None


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"federation.target_modules": ["z_proj"]}, ManifestError),
        ({"federation.profile": "P2", "federation.epsilon": 8}, ConfigError),
        ({"federation.adaptive_clip": True}, ConfigError),
        ({"federation.max_length": 1}, ConfigError),
        ({"federation.cohort": 3, "federation.min_cohort": 9}, ConfigError),
        (
            {
                "federation.profile": "P2",
                "federation.epsilon": 1,
                "federation.masking": "cells",
                "federation.word_bits": 32,
            },
            PrivacyError,
        ),
    ],
)
def test_what_no_federation_can_have_is_refused_as_init_refuses_it(
    described: BaseDescription, values: Mapping[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        terms_of(described, values)

"""What differential privacy has cost, by the accountants of agent and server."""

import functools
from typing import Any

import pytest

from edge_agent.charging import example_epsilon
from edge_agent.private import make_terms as agents_terms
from privacy.accounting import SampledGaussian, spent
from privacy.agent_accounting import spent_by_agent
from privacy.distributed_noise import agent_noise
from protocol.manifest import FederationManifest
from quant.base_model import LoadedBase
from simulations.lab.experiment import Experiment
from simulations.lab.records import Arm
from simulations.lab.spending import Spending
from simulations.lab.terms import RunTerms, make_terms

N_ROUNDS = 3
CELLS: dict[str, Any] = {
    "federation.profile": "P2",
    "federation.epsilon": 50,
    "federation.masking": "cells",
    "federation.word_bits": 32,
    "federation.rank": 1,
    "federation.cohort": 6,
    "federation.clip_norm": 0.2,
}


def terms_of(base: LoadedBase, **values: Any) -> RunTerms:
    experiment = Experiment(name="x").with_values(
        {
            "federation.n_rounds": N_ROUNDS,
            "federation.batch_size": 4,
            "federation.local_steps": 3,
            **{key.replace("__", "."): value for key, value in values.items()},
        }
    )
    return make_terms(experiment, base.description, arm=Arm.FEDERATED, seed=1)


def spending_of(terms: RunTerms) -> Spending:
    return Spending(terms.manifest, n_values=terms.tensors.n_values)


def test_without_differential_privacy_there_is_no_epsilon(base: LoadedBase) -> None:
    spending = spending_of(terms_of(base))
    assert spending.epsilon is None
    spending.charge(0, n_examples=10)
    assert spending.epsilon is None


@pytest.mark.parametrize(
    "values",
    [
        {"federation__epsilon": 8},
        {"federation__epsilon": 60, "federation__profile": "P3"},
        {key.replace(".", "__"): value for key, value in CELLS.items()},
    ],
    ids=["P1", "P3", "P2"],
)
def test_it_is_nothing_before_anyone_trained_grows_and_ends_within_the_budget(
    base: LoadedBase, values: dict[str, Any]
) -> None:
    terms = terms_of(base, **values)
    spending = spending_of(terms)
    assert spending.epsilon == 0.0
    found = []
    for _ in range(N_ROUNDS):
        spending.charge(7, n_examples=20)
        found.append(spending.epsilon)
    assert found == sorted(set(found))
    assert 0.9 * values["federation__epsilon"] < found[-1] <= values["federation__epsilon"]


def test_under_p1_it_is_what_the_agent_s_own_ledger_would_say(base: LoadedBase) -> None:
    manifest: FederationManifest = terms_of(base, federation__epsilon=8).manifest
    spending = Spending(manifest, n_values=1)
    spending.charge(3, n_examples=20)
    spending.charge(3, n_examples=20)
    own = agents_terms(manifest, n_examples=20)
    assert spending.epsilon == example_epsilon(own.event, n_rounds=2, delta=own.delta)


def test_under_p1_it_is_of_whoever_has_spent_most(
    base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.lab.spending.make_terms", functools.cache(agents_terms))
    manifest = terms_of(base, federation__epsilon=8).manifest

    def epsilon(*trained: tuple[int, int]) -> float:
        spending = Spending(manifest, n_values=1)
        for agent, n_examples in trained:
            spending.charge(agent, n_examples=n_examples)
        assert spending.epsilon is not None
        return spending.epsilon

    few, many = (1, 9), (0, 50)
    of_few, of_many = epsilon(few), epsilon(many)
    assert of_few != of_many
    assert epsilon(many, few) == epsilon(few, many) == max(of_few, of_many)
    assert epsilon(many, few, few) == max(of_many, epsilon(few, few))
    assert epsilon(few, many, many) == epsilon(many, many, few) == epsilon(many, many)


@pytest.mark.parametrize(
    ("values", "at_training"),
    [
        ({"federation__epsilon": 8}, True),
        ({key.replace(".", "__"): value for key, value in CELLS.items()}, True),
        ({"federation__epsilon": 60, "federation__profile": "P3"}, False),
        ({}, False),
    ],
    ids=["P1", "P2", "P3", "P0"],
)
def test_a_ledger_admits_no_more_trainings_than_the_federation_s_epsilon_counts(
    base: LoadedBase, values: dict[str, Any], at_training: bool
) -> None:
    spending = spending_of(terms_of(base, **values))
    assert spending.begins_with_training is at_training
    for _ in range(N_ROUNDS):
        assert spending.admits(7)
        spending.charge(7, n_examples=20)
    assert spending.admits(7) is not at_training
    assert spending.admits(8)


def test_under_p3_and_p2_it_is_of_the_agent_by_rounds_whatever_it_has(base: LoadedBase) -> None:
    terms = terms_of(base, federation__epsilon=60, federation__profile="P3")
    spending = spending_of(terms)
    for n_examples in (5, 500):
        spending.charge(1, n_examples=n_examples)
    spending.charge(2, n_examples=1)
    privacy: Any = terms.manifest.privacy
    event = SampledGaussian(
        noise_multiplier=privacy.noise_multiplier, sampling_probability=1.0, n_steps=1
    )
    assert spending.epsilon == spent([event] * 2, delta=privacy.delta).epsilon

    terms = terms_of(base, **{key.replace(".", "__"): value for key, value in CELLS.items()})
    spending = spending_of(terms)
    spending.charge(1, n_examples=5)
    privacy = terms.manifest.privacy
    noise = agent_noise(privacy, terms.manifest.masking, n_values=terms.tensors.n_values)
    assert noise is not None
    assert spending.epsilon == spent_by_agent(noise, n_rounds=1, delta=privacy.delta).epsilon

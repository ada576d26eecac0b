"""Terms, charges and secrets of private training on the agent."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.charging import RoundCharges, example_epsilon, noise_of_agents
from edge_agent.data.records import ChatMessage, Record, Role
from edge_agent.errors import TrustError
from edge_agent.private import (
    PrivacyTerms,
    PrivateRounds,
    make_terms,
    record_bytes,
    require_owners_epsilon,
)
from edge_agent.spending import agree_budget, set_budget, spending
from privacy.accounting import SampledGaussian, spent
from privacy.agent_accounting import calibrate_noise
from privacy.distributed_noise import Cohort
from privacy.errors import BudgetError
from privacy.ledger import Ledger
from protocol.blocks import AggregationBlock, CellMasking, RoundsBlock, TrainingBlock, Weighting
from protocol.manifest import FederationManifest
from protocol.privacy import AgentPrivacy, CentralPrivacy, ExamplePrivacy

AGENT, FEDERATION = bytes(32), bytes(16)
PRIVACY = ExamplePrivacy(epsilon=4.0, delta=1e-5, clip_norm=0.5)


def make_record(text: str, *, source: str = "x:1") -> Record:
    return Record(
        instruction=text,
        context="",
        response="yes",
        category=None,
        messages=None,
        source=source,
    )


RECORDS = [make_record(f"question {number}") for number in range(40)]


@pytest.fixture
def private(make_manifest: Callable[..., FederationManifest]) -> FederationManifest:
    return make_manifest(
        privacy=PRIVACY,
        aggregation=AggregationBlock(weighting=Weighting.UNIFORM),
        training=TrainingBlock(batch_size=8, local_steps=3, learning_rate=1e-3),
        rounds=RoundsBlock(n_rounds=2, cohort_target=2, min_cohort=2),
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite")
    yield opened
    opened.close()


def make_charges(ledger: Ledger, event: SampledGaussian, *, n_rounds: int = 9) -> RoundCharges:
    return RoundCharges(
        n_rounds=n_rounds,
        event=event,
        ledger=ledger,
        data_set=ledger.data_set(record_bytes(RECORDS)),
        agent=AGENT,
        federation=FEDERATION,
    )


def make_rounds(ledger: Ledger, tmp_path: Path, terms: PrivacyTerms) -> PrivateRounds:
    return PrivateRounds(
        terms=terms,
        charges=make_charges(ledger, terms.event),
        secret_path=tmp_path / "privacy.secret",
    )


def test_all_rounds_together_keep_to_epsilon_and_nearly_reach_it(
    private: FederationManifest,
) -> None:
    terms = make_terms(private, n_examples=40)
    assert terms.sampling_probability == 8 / 40
    whole = SampledGaussian(
        noise_multiplier=terms.noise_multiplier, sampling_probability=0.2, n_steps=2 * 3
    )
    assert 3.9 < spent([whole], delta=1e-5).epsilon <= 4.0
    assert spent([terms.event] * 2, delta=1e-5).epsilon <= 4.0
    assert terms.mechanism.expected_batch == pytest.approx(8.0)
    assert terms.mechanism.clip_norm == 0.5


def test_with_fewer_examples_than_a_batch_all_are_drawn_and_there_is_more_noise(
    private: FederationManifest,
) -> None:
    few, many = make_terms(private, n_examples=5), make_terms(private, n_examples=400)
    assert few.sampling_probability == 1.0
    assert few.mechanism.expected_batch == 5.0
    assert few.noise_multiplier > 2 * many.noise_multiplier


def test_the_stronger_of_federation_and_owner_counts(private: FederationManifest) -> None:
    asked = make_terms(private, n_examples=40)
    stronger = make_terms(private, n_examples=40, owners_epsilon=1.0)
    weaker = make_terms(private, n_examples=40, owners_epsilon=50.0)
    assert (stronger.epsilon, weaker.epsilon) == (1.0, 4.0)
    assert stronger.noise_multiplier > asked.noise_multiplier == weaker.noise_multiplier


def test_an_owner_who_demands_privacy_joins_no_federation_without(
    make_manifest: Callable[..., FederationManifest], private: FederationManifest
) -> None:
    with pytest.raises(TrustError, match="you accept ε ≤ 3, and this federation has no"):
        require_owners_epsilon(make_manifest(), 3.0)
    require_owners_epsilon(make_manifest(), None)
    require_owners_epsilon(private, 3.0)


@pytest.fixture
def of_agents(make_manifest: Callable[..., FederationManifest]) -> FederationManifest:
    """Profile P2 with the noise that ε = 4 takes."""
    cohort = Cohort.of_cells(10, 19)
    noise = calibrate_noise(
        epsilon=4.0, delta=1e-5, n_rounds=3, n_values=100, clip_norm=0.5, cohort=cohort
    )
    return make_manifest(
        masking=CellMasking(
            word_bits=32, max_change=0.5, clip_norm=0.5, cell_target=10, min_cell=10, max_cell=19
        ),
        privacy=AgentPrivacy(
            epsilon=4.0,
            delta=1e-5,
            clip_norm=0.5,
            steps_per_clip=noise.steps_per_clip,
            share_variance=noise.share_variance,
        ),
        aggregation=AggregationBlock(weighting=Weighting.UNIFORM),
        rounds=RoundsBlock(n_rounds=3, cohort_target=10, min_cohort=10),
    )


def test_an_owner_who_demands_privacy_counts_what_p2_keeps_for_each_example(
    of_agents: FederationManifest,
) -> None:
    event = noise_of_agents(of_agents)
    assert event is not None
    kept = example_epsilon(event, n_rounds=3, delta=1e-5)
    assert 2 * 4.0 < kept < 3 * 4.0  # twice as far moves the sum, and more than twice ε
    require_owners_epsilon(of_agents, kept + 0.01)
    with pytest.raises(TrustError, match=r"you accept ε ≤ 4, .* keeps ε ≤ .* for each example"):
        require_owners_epsilon(of_agents, 4.0)


def test_an_owner_who_demands_privacy_from_the_server_joins_no_p3(
    make_manifest: Callable[..., FederationManifest],
) -> None:
    central = make_manifest(
        privacy=CentralPrivacy(epsilon=1.0, delta=1e-5, clip_norm=0.5, noise_multiplier=9.0),
        aggregation=AggregationBlock(weighting=Weighting.UNIFORM),
    )
    with pytest.raises(TrustError, match="protects nobody from the server"):
        require_owners_epsilon(central, 8.0)
    require_owners_epsilon(central, None)
    assert noise_of_agents(central) is None


def test_a_round_of_p2_is_charged_once_and_refused_beyond_the_budget(
    of_agents: FederationManifest, ledger: Ledger
) -> None:
    event = noise_of_agents(of_agents)
    assert event is not None
    budget = example_epsilon(event, n_rounds=2, delta=1e-5)
    ledger.set_budget(epsilon=1.001 * budget, delta=1e-5, now=0.0)
    charges = make_charges(ledger, event)
    first = charges.charge(1, 1, now=1.0)
    assert charges.charge(1, 1, now=2.0).after == first.after
    second = charges.charge(2, 1, now=3.0)
    assert first.after < second.after == pytest.approx(budget, rel=1e-3)
    with pytest.raises(BudgetError):
        charges.charge(3, 1, now=4.0)


def test_an_agent_takes_part_in_no_more_rounds_than_its_epsilon_counts(
    of_agents: FederationManifest, ledger: Ledger
) -> None:
    """Rounds that fail after their sum was seen make no release, and the federation goes on."""
    event = noise_of_agents(of_agents)
    assert event is not None
    ledger.set_budget(epsilon=400.0, delta=1e-5, now=0.0)
    charges = make_charges(ledger, event, n_rounds=3)
    for number, attempt in ((1, 1), (4, 1), (4, 2), (4, 1)):  # the last goes on
        charges.charge(number, attempt, now=1.0)
    with pytest.raises(BudgetError, match=r"trained 3 times, .* round 5 would be once more"):
        charges.charge(5, 1, now=2.0)
    assert ledger.attempts(agent=AGENT, federation=FEDERATION) == {(1, 1), (4, 1), (4, 2)}
    assert ledger.attempts(agent=bytes([1]) * 32, federation=FEDERATION) == frozenset()


def test_the_terms_say_all_that_an_epsilon_means(private: FederationManifest) -> None:
    text = make_terms(private, n_examples=40).describe()
    for part in ("ε ≤ 4", "δ = 1e-05", "40 examples", "add or remove one", "2 rounds of 3 steps"):
        assert part in text
    for part in ("server, members and public", "Poisson", "q = 0.2", "noise multiplier", "PLD"):
        assert part in text
    assert "protects little" not in text
    weak = PrivacyTerms(
        epsilon=100.0,
        delta=1e-5,
        clip_norm=1.0,
        noise_multiplier=0.3,
        n_examples=40,
        batch_size=8,
        n_steps=3,
        n_rounds=2,
    )
    assert "protects little" in weak.describe()


def test_guarantee_1_a_round_is_charged_or_nothing_is_given(
    private: FederationManifest, ledger: Ledger, tmp_path: Path
) -> None:
    rounds = make_rounds(ledger, tmp_path, make_terms(private, n_examples=40))
    with pytest.raises(BudgetError):
        rounds.begin(1, 1, now=1.0)  # the owner never set a budget
    assert not (tmp_path / "privacy.secret").exists()
    ledger.set_budget(epsilon=4.0, delta=1e-5, now=1.0)
    first = rounds.begin(1, 1, now=2.0)[2]
    second = rounds.begin(2, 1, now=3.0)[2]
    assert (first.before, second.before) == (0.0, first.after)
    assert second.after <= 4.0
    rounds.end()
    with pytest.raises(BudgetError, match="4"):
        rounds.begin(3, 1, now=4.0)
    assert not (tmp_path / "privacy.secret").exists()
    assert ledger.total(ledger.data_set(record_bytes(RECORDS))) == second.after


def test_guarantee_2_a_training_that_goes_on_has_its_coins_and_its_noise_and_is_charged_once(
    private: FederationManifest, ledger: Ledger, tmp_path: Path
) -> None:
    ledger.set_budget(epsilon=4.0, delta=1e-5, now=1.0)
    terms = make_terms(private, n_examples=40)
    sampler, rule, quote = make_rounds(ledger, tmp_path, terms).begin(1, 1, now=2.0)
    again = make_rounds(ledger, tmp_path, terms).begin(1, 1, now=9.0)
    assert (again[0].secret, again[1].secret) == (sampler.secret, rule.secret)
    assert sampler.secret == rule.secret
    assert (again[2].was_charged, again[2].after) == (True, quote.after)
    other = make_rounds(ledger, tmp_path, terms).begin(1, 2, now=10.0)
    assert other[0].secret != sampler.secret
    assert not other[2].was_charged
    assert (tmp_path / "privacy.secret").stat().st_mode & 0o077 == 0


def test_guarantee_3_a_training_that_is_over_leaves_no_secret(
    private: FederationManifest, ledger: Ledger, tmp_path: Path
) -> None:
    ledger.set_budget(epsilon=4.0, delta=1e-5, now=1.0)
    rounds = make_rounds(ledger, tmp_path, make_terms(private, n_examples=40))
    secret = rounds.begin(1, 1, now=2.0)[0].secret
    rounds.end()
    rounds.end()  # also where there is none
    for path in tmp_path.rglob("*"):
        assert secret.hex().encode() not in path.read_bytes()
        assert secret not in path.read_bytes()


def test_a_record_is_its_words_wherever_it_stands(ledger: Ledger) -> None:
    def id_of(*records: Record) -> bytes:
        return ledger.data_set(record_bytes(records)).id

    one, other = make_record("a"), make_record("b")
    assert id_of(one, other) == id_of(other, make_record("a", source="renamed.jsonl:99"))
    assert id_of(one) != id_of(other)
    turns = (
        ChatMessage(role=Role.USER, content="a"),
        ChatMessage(role=Role.ASSISTANT, content="yes"),
    )
    chat = Record(
        instruction="a", context="", response="yes", category=None, messages=turns, source="x:1"
    )
    assert id_of(one) != id_of(chat)


def test_joining_sets_the_budget_once_and_the_owner_changes_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    assert spending(path, RECORDS).budget is None
    first, is_new = agree_budget(path, epsilon=4.0, delta=1e-5, now=1.0)
    assert (first.epsilon, is_new) == (4.0, True)
    kept, is_new = agree_budget(path, epsilon=100.0, delta=1e-3, now=2.0)
    assert (kept.epsilon, kept.delta, is_new) == (4.0, 1e-5, False)
    set_budget(path, epsilon=9.0, delta=1e-6, now=3.0)
    found = spending(path, RECORDS)
    assert (found.budget.epsilon, found.left, found.spent) == (9.0, 9.0, 0.0)
    told = found.as_json()
    wanted = {"budget", "delta", "spent", "left", "unit", "adversary", "accountant", "rounds"}
    assert wanted <= told.keys()

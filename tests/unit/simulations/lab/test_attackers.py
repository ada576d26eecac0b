"""Clients that attack: who they are, and what they send."""

import numpy as np
import pytest

from privacy.updates import PlainUpdate
from protocol.layout import VectorLayout
from simulations.attacks.names import UpdateAttack
from simulations.lab.attackers import Attackers
from simulations.lab.chance import RunChance
from simulations.lab.experiment import AttackSection

LAYOUT = VectorLayout.of_shapes({"a.lora_A.weight": (4, 10), "a.lora_B.weight": (10, 4)})


def make_attackers(name: str = "sign-flip-scaled", *, seed: int = 1, **values: object) -> Attackers:
    section = AttackSection(name=UpdateAttack(name), **values)  # type: ignore[arg-type]
    return Attackers(section, n_clients=10, chance=RunChance(seed))


def make_updates(clients: list[int]) -> list[tuple[int, PlainUpdate]]:
    return [
        (
            client,
            PlainUpdate(
                vector=np.random.default_rng(client)
                .normal(size=LAYOUT.n_values)
                .astype(np.float32),
                weight=client + 1,
            ),
        )
        for client in clients
    ]


def craft(
    attackers: Attackers,
    updates: list[tuple[int, PlainUpdate]],
    *,
    number: int = 2,
    last_change: np.ndarray | None = None,
) -> list[tuple[int, PlainUpdate]]:
    sent, n_crafted = attackers.craft(number, updates, layout=LAYOUT, last_change=last_change)
    own = dict(updates)
    assert n_crafted == sum(found is not own[client] for client, found in sent)
    return sent


@pytest.mark.parametrize(
    ("share", "n_clients", "wanted"),
    [(0.2, 10, 2), (0.01, 10, 1), (0.99, 10, 9), (0.5, 2, 1), (0.5, 1, 1)],
)
def test_the_share_is_drawn_at_least_one_and_one_stays_honest(
    share: float, n_clients: int, wanted: int
) -> None:
    section = AttackSection(name=UpdateAttack.CLONES, share=share)
    found = Attackers(section, n_clients=n_clients, chance=RunChance(1)).clients
    assert len(found) == wanted
    assert found <= set(range(n_clients))


def test_equal_seeds_draw_the_same_attackers() -> None:
    assert make_attackers().clients == make_attackers().clients
    drawn = {make_attackers(seed=seed).clients for seed in range(20)}
    assert len(drawn) > 5


def test_attackers_send_what_the_attack_crafts_and_honest_clients_what_they_trained() -> None:
    attackers, updates = make_attackers(share=0.3), make_updates(list(range(10)))
    sent = craft(attackers, updates)
    assert [client for client, _ in sent] == list(range(10))
    for (client, own), (_, found) in zip(updates, sent, strict=True):
        assert found.weight == own.weight
        if client in attackers.clients:
            np.testing.assert_allclose(found.vector, -10 * own.vector, rtol=1e-6)
        else:
            assert found is own


@pytest.mark.parametrize("name", [name for name in UpdateAttack if name != "adaptive"])
def test_every_attack_can_be_made_in_a_round_and_is_repeated_by_its_seed(name: str) -> None:
    updates = make_updates(list(range(10)))
    last_change = np.full(LAYOUT.n_values, 0.01, np.float32)
    runs = [
        craft(make_attackers(name, share=0.4, omniscient=True), updates, last_change=last_change)
        for _ in range(2)
    ]
    for (client, one), (_, other) in zip(*runs, strict=True):
        np.testing.assert_array_equal(one.vector, other.vector)
        assert np.isfinite(one.vector).all()
        assert one.vector.dtype == np.float32
        assert client in make_attackers(name, share=0.4).clients or one is dict(updates)[client]


def test_a_round_without_attackers_or_without_honest_clients_is_sent_as_it_was_trained() -> None:
    attackers = make_attackers(share=0.3)
    evil = sorted(attackers.clients)
    honest = [client for client in range(10) if client not in attackers.clients]
    for clients in (evil, honest, []):
        updates = make_updates(clients)
        sent = craft(attackers, updates)
        assert all(found is own for (_, own), (_, found) in zip(updates, sent, strict=True))


def test_noise_is_another_one_in_every_round() -> None:
    attackers, updates = make_attackers("gaussian-noise"), make_updates(list(range(10)))
    first, again, other = (craft(attackers, updates, number=number) for number in (1, 1, 2))
    place = min(attackers.clients)
    np.testing.assert_array_equal(first[place][1].vector, again[place][1].vector)
    assert not np.array_equal(first[place][1].vector, other[place][1].vector)


def test_attackers_too_few_for_their_attack_send_what_they_trained() -> None:
    updates = make_updates(list(range(10)))
    sent = craft(make_attackers("alie", share=0.2), updates)
    assert all(found is own for (_, own), (_, found) in zip(updates, sent, strict=True))

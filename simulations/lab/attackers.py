"""Clients that attack: what they send instead of what they trained."""

from collections.abc import Sequence

import numpy as np

from privacy.updates import Float32Array, PlainUpdate
from protocol.layout import VectorLayout
from simulations.attacks.catalogue import update_attacks
from simulations.attacks.knowledge import Knowledge
from simulations.errors import AttackError
from simulations.lab.chance import RunChance
from simulations.lab.experiment import AttackSection


class Attackers:
    """The attackers of a run.

    Args:
        section: Of the experiment.
        n_clients: Of the run.
        chance: Draws who they are.
    """

    def __init__(self, section: AttackSection, *, n_clients: int, chance: RunChance) -> None:
        """Draw them: at least one, and one client stays honest."""
        wanted = round(section.share * n_clients)
        n_attackers = min(max(1, wanted), max(1, n_clients - 1))
        drawn = chance.generator("attackers").permutation(n_clients)[:n_attackers]
        self.clients = frozenset(int(client) for client in drawn)
        self._attack = update_attacks(omniscient=section.omniscient)[section.name]
        self._chance = chance

    def craft(
        self,
        number: int,
        updates: Sequence[tuple[int, PlainUpdate]],
        *,
        layout: VectorLayout,
        last_change: Float32Array | None,
    ) -> tuple[list[tuple[int, PlainUpdate]], int]:
        """The updates of a round as they are sent, and how many of them are made up.

        Attackers who are too few in a round for their attack send what they trained.

        Args:
            number: Of the round.
            updates: As they were trained, by client.
            layout: Of their values.
            last_change: This round's release less the one before, in that layout; None: the first.
        """
        own = [update for client, update in updates if client in self.clients]
        if not own or len(own) == len(updates):
            return list(updates), 0
        honest = [update.vector for client, update in updates if client not in self.clients]
        knowledge = Knowledge(
            own_updates=np.stack([update.vector for update in own]),
            n_agents=len(updates),
            layout=layout,
            round_number=number,
            last_change=last_change,
            honest_updates=np.stack(honest),
        )
        try:
            made = self._attack.craft(knowledge, rng=self._chance.generator("attack", number))
        except AttackError:
            return list(updates), 0
        crafted = iter(made)
        sent = [
            (client, PlainUpdate(vector=next(crafted), weight=update.weight))
            if client in self.clients
            else (client, update)
            for client, update in updates
        ]
        return sent, len(own)

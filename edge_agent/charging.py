"""What a round costs the owner's examples, charged to the ledger before anything is trained."""

from privacy.accounting import SampledGaussian, spent
from privacy.agent_accounting import event_of_example
from privacy.errors import BudgetError
from privacy.ledger import DataSet, Ledger, Participation, Quote
from protocol.blocks import CellMasking
from protocol.manifest import FederationManifest
from protocol.privacy import AgentPrivacy


def noise_of_agents(manifest: FederationManifest) -> SampledGaussian | None:
    """What a round of profile P2 costs each example; None for any other profile.

    Args:
        manifest: The federation's.
    """
    privacy, masking = manifest.privacy, manifest.masking
    if isinstance(privacy, AgentPrivacy) and isinstance(masking, CellMasking):
        return event_of_example(privacy, masking)
    return None


def example_epsilon(event: SampledGaussian, *, n_rounds: int, delta: float) -> float:
    """ε of each example over all rounds.

    Args:
        event: Of one round.
        n_rounds: How many.
        delta: See `accounting.spent`.
    """
    return spent([event] * n_rounds, delta=delta).epsilon


class RoundCharges:
    """Charges the rounds of one federation to every record of the owner.

    Guarantees:
        1. A round that would break the owner's budget is refused, and nothing is charged.
        2. One attempt at a round is charged once, however often it is begun.
        3. No more trainings than the federation's ε counts rounds are charged, also where some of
           them came to nothing.

    Args:
        event: What a round releases.
        n_rounds: How many the federation's ε counts.
        ledger: The owner's.
        data_set: Every record that may be drawn.
        agent: The agent's identity.
        federation: The federation's id.
    """

    def __init__(
        self,
        *,
        event: SampledGaussian,
        ledger: Ledger,
        data_set: DataSet,
        agent: bytes,
        federation: bytes,
        n_rounds: int,
    ) -> None:
        """Take the parts; nothing is charged yet."""
        self.event = event
        self._ledger = ledger
        self._data_set = data_set
        self._agent = agent
        self._federation = federation
        self._n_rounds = n_rounds

    @property
    def name(self) -> str:
        """Agent and federation, for files that belong to them."""
        return f"{self._agent.hex()} {self._federation.hex()}"

    def charge(self, round_number: int, attempt: int, *, now: float) -> Quote:
        """Charge a round, before it is trained; it stays charged whatever becomes of it.

        Args:
            round_number: The round.
            attempt: The agent's attempt at it.
            now: Seconds since the Unix epoch.

        Raises:
            BudgetError: Some record would spend more than the owner allows, or more rounds than
                the federation's ε counts; nothing was charged.
            LedgerError: The ledger cannot be used, or this attempt was charged for other records or
                on other terms.
            AccountingError: So much was released already that it cannot be composed.
        """
        charged = self._ledger.attempts(agent=self._agent, federation=self._federation)
        if len(charged - {(round_number, attempt)}) >= self._n_rounds:
            msg = (
                f"this agent trained {self._n_rounds} times, as often as the federation's ε counts "
                f"rounds; round {round_number} would be once more, so nothing is trained"
            )
            raise BudgetError(msg)
        return self._ledger.reserve(
            Participation(
                agent=self._agent, federation=self._federation, round=round_number, attempt=attempt
            ),
            data_set=self._data_set,
            event=self.event,
            now=now,
        )

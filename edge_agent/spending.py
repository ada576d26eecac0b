"""What an owner's records have spent of their privacy budget, from the ledger."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.data.records import Record
from edge_agent.private import record_bytes
from privacy.ledger import Budget, HistoryRow, Ledger

UNIT = "one example, add or remove"
ADVERSARY = (
    "server, members and public; for rounds of profile P2 (q = 1, one step) within what masking "
    "promises, and against members that do not collude"
)


@dataclass(frozen=True, kw_only=True)
class Spending:
    """Of the worst record among those that were asked about."""

    path: Path
    budget: Budget | None
    spent: float
    n_records: int
    n_duplicates: int
    history: tuple[HistoryRow, ...]

    @property
    def left(self) -> float | None:
        """What is not spent; never below 0. ε does not add up: it is no sum of rounds to come."""
        return None if self.budget is None else max(0.0, self.budget.epsilon - self.spent)

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "ledger": str(self.path),
            "budget": None if self.budget is None else self.budget.epsilon,
            "delta": None if self.budget is None else self.budget.delta,
            "spent": self.spent,
            "left": self.left,
            "unit": UNIT,
            "adversary": ADVERSARY,
            "accountant": "PLD",
            "records": self.n_records,
            "duplicates": self.n_duplicates,
            "rounds": [
                {
                    "at": row.at,
                    "federation": row.participation.federation.hex(),
                    "round": row.participation.round,
                    "attempt": row.participation.attempt,
                    "sampling": "Poisson" if row.event.sampling_probability < 1.0 else "all",
                    "sampling_probability": row.event.sampling_probability,
                    "noise_multiplier": row.event.noise_multiplier,
                    "steps": row.event.n_steps,
                    "records_shared": row.n_shared,
                    "epsilon": row.epsilon,
                }
                for row in self.history
            ],
        }


def spending(path: Path, records: Sequence[Record]) -> Spending:
    """Look records up in the ledger; nothing is charged.

    Args:
        path: The ledger; made when missing.
        records: The owner's.

    Raises:
        LedgerError: It cannot be used, or there are no records.
    """
    ledger = Ledger(path)
    try:
        data_set = ledger.data_set(record_bytes(records))
        budget = ledger.budget()
        return Spending(
            path=path,
            budget=budget,
            spent=0.0 if budget is None else ledger.total(data_set),
            n_records=data_set.n_records,
            n_duplicates=data_set.n_duplicates,
            history=() if budget is None else tuple(ledger.history(data_set)),
        )
    finally:
        ledger.close()


def set_budget(path: Path, *, epsilon: float, delta: float, now: float) -> Budget:
    """Set what each of the owner's records may spend, in all federations together.

    Args:
        path: The ledger; made when missing.
        epsilon: Of one record, add or remove; at least 0.
        delta: Between 0 and 1, well below 1 ÷ the number of records.
        now: Seconds since the Unix epoch.

    Raises:
        LedgerError: The ledger cannot be used, or a value is out of range.
    """
    ledger = Ledger(path)
    try:
        return ledger.set_budget(epsilon=epsilon, delta=delta, now=now)
    finally:
        ledger.close()


def agree_budget(path: Path, *, epsilon: float, delta: float, now: float) -> tuple[Budget, bool]:
    """The owner's budget, set to what a federation asks for where there is none yet.

    Args:
        path: The ledger; made when missing.
        epsilon: What the owner agreed to for one record, add or remove.
        delta: With it.
        now: Seconds since the Unix epoch.

    Returns:
        The budget that counts, and whether it was set just now.

    Raises:
        LedgerError: The ledger cannot be used.
    """
    ledger = Ledger(path)
    try:
        known = ledger.budget()
        if known is not None:
            return known, False
        return ledger.set_budget(epsilon=epsilon, delta=delta, now=now), True
    finally:
        ledger.close()

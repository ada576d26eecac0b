"""An enrolled agent on its machine: what the rooms of the agent are given of it."""

from dataclasses import dataclass, field

from edge_agent.charging import RoundCharges
from edge_agent.home import AgentHome
from edge_agent.journal import Journal, Membership
from edge_agent.private import PrivateRounds
from protocol.signing import Signer


@dataclass(frozen=True, kw_only=True)
class OwnersCell:
    """What the owner asks of a masked cell, beyond the manifest."""

    min_cell: int = 0
    """Fewest members; 0: the manifest's."""
    friends: frozenset[bytes] = frozenset()
    """Identities that the owner trusts."""
    min_friends: int = 0
    """How many of them must be in the cell."""


@dataclass(frozen=True, kw_only=True)
class OwnersPart:
    """What of the adapter the owner's machine trains, within what the manifest allows."""

    rank: int | None = None
    """How many rank rows; None: all."""
    left_out: tuple[str, ...] = ()
    """Modules that it does not train."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """An enrolled agent; whoever works with it holds the home's lock."""

    home: AgentHome
    journal: Journal
    membership: Membership
    signer: Signer
    owners_cell: OwnersCell = field(default_factory=OwnersCell)
    owners_part: OwnersPart = field(default_factory=OwnersPart)
    private: PrivateRounds | None = None
    """How it trains where the federation asks for DP-SGD (P1), its charges included."""
    charges: RoundCharges | None = None
    """What rounds cost where noise comes after the training (P2)."""

"""How ready agents become cells: sizes, thresholds, and a draw that everyone can repeat."""

import hmac
from collections.abc import Sequence

from protocol.masked import Ready, ReadyList, Roster
from protocol.wire import b64u_encode, domain_hash


class CellView:
    """A roster with what is looked up in it often; computed once, as it holds many signatures.

    Args:
        roster: Its members are distinct.
    """

    def __init__(self, roster: Roster) -> None:
        """Index the members."""
        self.transcript: bytes = roster.transcript()
        self.threshold: int = roster.threshold
        self.colluders: int = roster.colluders
        self.readies: dict[bytes, Ready] = {m.body.agent: m.body for m in roster.members}
        """In roster order."""
        self.places: dict[bytes, int] = {agent: i for i, agent in enumerate(self.readies)}
        """Where a member stands, from 0; its shares stand at x = place + 1."""

    def place(self, dealer: bytes, receiver: bytes) -> int:
        """Where a receiver stands in a dealer's tuples: in roster order without the dealer."""
        place = self.places[receiver]
        return place - (self.places[dealer] < place)


def threshold(n_members: int, colluders: int) -> int:
    """T = ⌊(m + c)/2⌋ + 1: how many must agree before a mask is removed.

    Two sets of t members have more than c in common, so they share an honest one, who confirms one
    set of survivors only.

    Args:
        n_members: m.
        colluders: c.
    """
    return (n_members + colluders) // 2 + 1


def colluders(n_members: int, *, wanted: int | None = None) -> int:
    """c: max(1, (m + 2) // 5), or more if the manifest wants it while t ≤ m − 1.

    Args:
        n_members: m, at least 5.
        wanted: The manifest's `colluders`.
    """
    least = max(1, (n_members + 2) // 5)
    most = max(c for c in range(1, n_members) if c == 1 or threshold(n_members, c) < n_members)
    return max(least, min(wanted or least, most))


def cell_sizes(n_ready: int, target: int) -> tuple[int, ...]:
    """The sizes of the cells that `n_ready` agents make: the larger ones first.

    Args:
        n_ready: At least 1.
        target: The manifest's `cell_target`.
    """
    n_cells = max(1, n_ready // target)
    size, n_larger = divmod(n_ready, n_cells)
    return (size + 1,) * n_larger + (size,) * (n_cells - n_larger)


def draw_seed(ready_list: ReadyList) -> bytes:
    """H("cells", manifest digest, list digest, beacon), 32 bytes."""
    beacon = None if ready_list.beacon is None else b64u_encode(ready_list.beacon)
    return domain_hash(
        "cells", b64u_encode(ready_list.round_digest), b64u_encode(ready_list.digest()), beacon
    )


def assign(ready_list: ReadyList, target: int) -> tuple[tuple[bytes, ...], ...]:
    """Cut a list into cells; within a cell identities are sorted.

    Guarantees:
        1. Everyone who has the list gets the same cells; each identity stands in one of them.

    Args:
        ready_list: Its identities are distinct.
        target: The manifest's `cell_target`.
    """
    seed = draw_seed(ready_list)
    identities = [identity for identity, _ in ready_list.entries]
    ranked = sorted(identities, key=lambda identity: hmac.digest(seed, identity, "sha256"))
    return _cut(ranked, cell_sizes(len(ranked), target))


def _cut(ranked: Sequence[bytes], sizes: Sequence[int]) -> tuple[tuple[bytes, ...], ...]:
    cells = []
    start = 0
    for size in sizes:
        cells.append(tuple(sorted(ranked[start : start + size])))
        start += size
    return tuple(cells)

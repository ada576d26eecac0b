"""Who takes part in a round: drawn by rank under the round's seed."""

import hmac
import math
from collections.abc import Iterable

from aggregator_server.store.rows import SelectionRow
from protocol.blocks import RoundsBlock
from protocol.limits import MAX_COUNT


def cohort_size(rounds: RoundsBlock, *, n_present: int) -> int:
    """How many agents a round selects: min(present, ⌈over_selection · cohort_target⌉).

    Args:
        rounds: The manifest's block.
        n_present: Agents that are present, at least 1.
    """
    # 1.1 · 10 is 11.000000000000002 in binary: rounded first, so that it stays 11.
    wanted = math.ceil(round(rounds.over_selection * rounds.cohort_target, 9))
    return min(n_present, wanted)


def most_selected(rounds: RoundsBlock) -> int:
    """How many agents a round selects when enough are present.

    Args:
        rounds: The manifest's block.
    """
    return cohort_size(rounds, n_present=MAX_COUNT)


def rank(selection_seed: bytes, identity: bytes) -> bytes:
    """An agent's rank in a round, HMAC-SHA256(selection_seed, identity); the lowest go first.

    Guarantees:
        1. Nobody can steer a rank: the seed is drawn after the agents have enrolled.
    """
    return hmac.digest(selection_seed, identity, "sha256")


def draw(
    selection_seed: bytes, candidates: Iterable[bytes], *, n: int, round_number: int
) -> tuple[SelectionRow, ...]:
    """The `n` candidates of lowest rank, in that order.

    Args:
        selection_seed: The round's seed, 32 bytes.
        candidates: Identities.
        n: How many places are free.
        round_number: The round.
    """
    ranked = sorted((rank(selection_seed, identity), identity) for identity in candidates)
    return tuple(
        SelectionRow(
            round=round_number,
            agent=identity,
            rank=value,
            withdrawn_reason=None,
            withdrawal_digest=None,
        )
        for value, identity in ranked[: max(0, n)]
    )

"""Members as `agents list` shows them."""

from collections.abc import Sequence
from datetime import UTC, datetime

from aggregator_server.store.rows import MemberRow
from protocol.wire import JsonValue, b64u_encode


def table(members: Sequence[MemberRow]) -> str:
    """One line for each member, under a heading."""
    lines = [f"{'identity':43}  {'enrolled':20}  {'last seen':20}  accepted  note"]
    for member in members:
        note = ""
        if member.revoked_at is not None:
            who = "the operator" if member.barred else "the agent"
            note = f"  ended by {who} {_when(member.revoked_at)}"
        lines.append(
            f"{b64u_encode(member.identity)}  {_when(member.enrolled_at)}  "
            f"{_when(member.last_seen)}  {member.n_accepted:8d}{note}"
        )
    return "\n".join(lines)


def as_json(members: Sequence[MemberRow]) -> list[dict[str, JsonValue]]:
    """The same for programs; times as RFC 3339."""
    return [
        {
            "agent": b64u_encode(member.identity),
            "enrolled_at": _when(member.enrolled_at),
            "last_seen": _when(member.last_seen),
            "n_accepted": member.n_accepted,
            "revoked_at": None if member.revoked_at is None else _when(member.revoked_at),
            "revoked_by_operator": member.barred,
        }
        for member in members
    ]


def _when(time: float) -> str:
    return datetime.fromtimestamp(time, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

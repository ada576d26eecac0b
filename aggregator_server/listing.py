"""Members and incidents as the operator's commands show them."""

from collections.abc import Sequence
from datetime import UTC, datetime

from aggregator_server.store.rows import IncidentRow, MemberRow
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


def incidents_table(incidents: Sequence[IncidentRow]) -> str:
    """One line for each incident, oldest first."""
    if not incidents:
        return "Nothing happened that you should know of."
    return "\n".join(
        f"{_when(row.at)}  {'' if row.round is None else f'round {row.round}: '}{row.text}"
        for row in incidents
    )


def incidents_as_json(incidents: Sequence[IncidentRow]) -> list[dict[str, JsonValue]]:
    """The same for programs; times as RFC 3339."""
    return [
        {"at": _when(row.at), "round": row.round, "kind": row.kind.value, "text": row.text}
        for row in incidents
    ]


def _when(time: float) -> str:
    return datetime.fromtimestamp(time, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

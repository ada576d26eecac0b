"""Members and incidents as the operator's commands show them."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from aggregator_server.reputation import Reputation
from aggregator_server.store.rows import IncidentRow, MemberRow
from protocol.wire import JsonValue, b64u_encode


def table(members: Sequence[MemberRow], evidence: Mapping[bytes, Reputation]) -> str:
    """One line for each member, under a heading.

    Args:
        members: In the order shown.
        evidence: By identity, on those who were judged.
    """
    lines = [
        f"{'identity':43}  {'enrolled':20}  {'last seen':20}  accepted  removed  log-odds  note"
    ]
    for member in members:
        note = ""
        found = evidence.get(member.identity)
        removed = "" if found is None else f"{found.n_removed} of {found.n_judged}"
        odds = "" if found is None else f"{found.log_odds:+.1f} ± {found.std_error:.1f}"
        if found is not None and found.is_suspected:
            note = "  suspected"
        if member.quarantined_at is not None:
            note = f"  set aside {_when(member.quarantined_at)}"
        if member.revoked_at is not None:
            who = "the operator" if member.barred else "the agent"
            note = f"  ended by {who} {_when(member.revoked_at)}"
        lines.append(
            f"{b64u_encode(member.identity)}  {_when(member.enrolled_at)}  "
            f"{_when(member.last_seen)}  {member.n_accepted:8d}  {removed:>7}  {odds:>8}{note}"
        )
    return "\n".join(lines)


def as_json(
    members: Sequence[MemberRow], evidence: Mapping[bytes, Reputation]
) -> list[dict[str, JsonValue]]:
    """The same for programs; times as RFC 3339."""
    return [
        {
            "agent": b64u_encode(member.identity),
            "enrolled_at": _when(member.enrolled_at),
            "last_seen": _when(member.last_seen),
            "n_accepted": member.n_accepted,
            "revoked_at": None if member.revoked_at is None else _when(member.revoked_at),
            "revoked_by_operator": member.barred,
            "quarantined_at": (
                None if member.quarantined_at is None else _when(member.quarantined_at)
            ),
            "evidence": _evidence_json(evidence.get(member.identity)),
        }
        for member in members
    ]


def _evidence_json(found: Reputation | None) -> dict[str, JsonValue] | None:
    if found is None:
        return None
    return {
        "n_judged": found.n_judged,
        "n_removed": found.n_removed,
        "mean_score": found.mean_score,
        "log_odds": found.log_odds,
        "std_error": found.std_error,
        "is_suspected": found.is_suspected,
    }


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

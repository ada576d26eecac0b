"""Members and invites."""

from collections.abc import Mapping

from sqlalchemy import Connection, and_, func, insert, select, update

from aggregator_server.errors import Refusal
from aggregator_server.store import counters
from aggregator_server.store.counters import Counter
from aggregator_server.store.database import Database
from aggregator_server.store.incidents import add_incident
from aggregator_server.store.rows import (
    AgentRow,
    InviteRow,
    MemberRow,
    NewIncident,
    UploadPhase,
)
from aggregator_server.store.schema import agents, invite_uses, invites, uploads
from aggregator_server.store.uploads import free_places
from protocol.problems import ProblemType


class AgentStore:
    """The tables of members and invites.

    Guarantees:
        1. An invite is used at most as often as it allows, however many agents race for it.
    """

    def __init__(self, database: Database) -> None:
        """Wrap a database."""
        self._database = database

    def get(self, identity: bytes) -> AgentRow | None:
        """A member by key, past members too."""
        with self._database.reading() as connection:
            return _agent(connection, identity)

    def any_enrolled(self) -> bool:
        """Whether any agent ever enrolled."""
        with self._database.reading() as connection:
            return connection.execute(select(agents.c.identity).limit(1)).first() is not None

    def enrol(
        self, identity: bytes, *, credential: bytes, invite: bytes | None, now: float
    ) -> AgentRow:
        """Journal a membership; a former member becomes one again.

        Args:
            identity: The agent's key.
            credential: Canonical JSON of its signed credential.
            invite: Id of the invite to use up, None for open enrolment.
            now: Seconds since the Unix epoch.

        Returns:
            The member; when a request that raced with this one enrolled it, as that one did.

        Raises:
            Refusal: The invite has no use left, or the operator ended the membership and the invite
                is no newer than that.
        """
        with self._database.writing() as connection:
            known = _agent(connection, identity)
            if known is not None and known.revoked_at is None:
                return known
            if known is not None and known.barred:
                _require_newer_invite(connection, invite, than=known.revoked_at)
            values = {
                "credential": credential,
                "revoked_at": None,
                "last_seen": now,
                "barred": False,
            }
            if known is None:
                connection.execute(
                    insert(agents).values(
                        identity=identity, enrolled_at=now, judged_from=0, **values
                    )
                )
            else:
                connection.execute(
                    update(agents).where(agents.c.identity == identity).values(**values)
                )
            if invite is not None:
                _use_invite(connection, invite, identity, now)
            row = connection.execute(select(agents).where(agents.c.identity == identity)).one()
            return AgentRow(**row._mapping)

    def renew(self, identity: bytes, credential: bytes) -> None:
        """Replace the credential of a member."""
        with self._database.writing() as connection:
            connection.execute(
                update(agents).where(agents.c.identity == identity).values(credential=credential)
            )

    def revoke(self, identity: bytes, *, now: float, bar: bool = False) -> None:
        """End a membership and free its places; accepted uploads stay. Again changes nothing.

        Args:
            identity: The member.
            now: Seconds since the Unix epoch.
            bar: Whether the agent comes back only by an invite made after `now`; bars a former
                member too.
        """
        which = agents.c.barred.is_(False) if bar else agents.c.revoked_at.is_(None)
        with self._database.writing() as connection:
            changed = connection.execute(
                update(agents)
                .where(agents.c.identity == identity, which)
                .values(revoked_at=now, barred=bar)
            )
            if changed.rowcount:
                free_places(connection, identity, reason="revoked")

    def members(self) -> tuple[MemberRow, ...]:
        """All members, past ones too, in the order of their enrolment."""
        accepted = and_(
            uploads.c.agent == agents.c.identity, uploads.c.phase == UploadPhase.ACCEPTED.value
        )
        shown = (
            agents.c.identity,
            agents.c.enrolled_at,
            agents.c.last_seen,
            agents.c.revoked_at,
            agents.c.barred,
            agents.c.quarantined_at,
            agents.c.judged_from,
        )
        query = (
            select(*shown, func.count(uploads.c.id).label("n_accepted"))
            .outerjoin(uploads, accepted)
            .group_by(*shown)
            .order_by(agents.c.enrolled_at, agents.c.identity)
        )
        with self._database.reading() as connection:
            return tuple(MemberRow(**row._mapping) for row in connection.execute(query))

    def quarantine(self, identity: bytes, incident: NewIncident, *, now: float) -> bool:
        """Draw a member for no round any more; an open round keeps what it has.

        Args:
            identity: The member.
            incident: Journalled with it.
            now: Seconds since the Unix epoch.

        Returns:
            Whether anything changed: False for one that is in quarantine already, or no member.
        """
        with self._database.writing() as connection:
            changed = connection.execute(
                update(agents)
                .where(
                    agents.c.identity == identity,
                    agents.c.quarantined_at.is_(None),
                    agents.c.revoked_at.is_(None),
                )
                .values(quarantined_at=now)
            )
            if changed.rowcount:
                add_incident(connection, incident)
                counters.add(connection, Counter.CHANGES)
            return bool(changed.rowcount)

    def readmit(self, identity: bytes, *, judged_from: int) -> None:
        """End a quarantine; only rounds from a number on are evidence from now on.

        Args:
            identity: The member.
            judged_from: The first of these rounds.
        """
        with self._database.writing() as connection:
            connection.execute(
                update(agents)
                .where(agents.c.identity == identity)
                .values(quarantined_at=None, judged_from=judged_from)
            )
            counters.add(connection, Counter.CHANGES)

    def saw(self, last_seen: Mapping[bytes, float], *, bytes_down: int) -> None:
        """Journal when agents were last seen, and what they fetched.

        Args:
            last_seen: Seconds since the Unix epoch by identity.
            bytes_down: Bytes served since the last call.
        """
        with self._database.writing() as connection:
            for identity, seen_at in last_seen.items():
                connection.execute(
                    update(agents).where(agents.c.identity == identity).values(last_seen=seen_at)
                )
            if bytes_down:
                counters.add(connection, Counter.BYTES_DOWN, bytes_down)

    def present(self, *, seen_after: float) -> tuple[bytes, ...]:
        """The members who may be drawn, by key: seen after a moment, and not in quarantine."""
        with self._database.reading() as connection:
            return present_agents(connection, seen_after)

    def add_invite(self, invite: InviteRow) -> None:
        """Journal a new invite."""
        with self._database.writing() as connection:
            connection.execute(
                insert(invites).values(
                    id=invite.id,
                    code=invite.code,
                    created_at=invite.created_at,
                    n_uses=invite.n_uses,
                    uses_left=invite.uses_left,
                )
            )

    def invite(self, invite_id: bytes) -> InviteRow | None:
        """An invite by its public name."""
        with self._database.reading() as connection:
            row = connection.execute(select(invites).where(invites.c.id == invite_id)).first()
        return None if row is None else InviteRow(**row._mapping)

    def n_uses_left(self) -> int:
        """Enrolments that outstanding invites still allow."""
        with self._database.reading() as connection:
            total = connection.execute(select(func.sum(invites.c.uses_left))).scalar_one()
        return int(total or 0)


def present_agents(connection: Connection, seen_after: float) -> tuple[bytes, ...]:
    """The members who may be drawn: seen after a moment, and not in quarantine."""
    query = (
        select(agents.c.identity)
        .where(
            agents.c.revoked_at.is_(None),
            agents.c.quarantined_at.is_(None),
            agents.c.last_seen >= seen_after,
        )
        .order_by(agents.c.identity)
    )
    return tuple(bytes(identity) for identity in connection.execute(query).scalars())


def _agent(connection: Connection, identity: bytes) -> AgentRow | None:
    row = connection.execute(select(agents).where(agents.c.identity == identity)).first()
    return None if row is None else AgentRow(**row._mapping)


def _require_newer_invite(
    connection: Connection, invite: bytes | None, *, than: float | None
) -> None:
    query = select(invites.c.created_at).where(invites.c.id == invite)
    made_at = connection.execute(query).scalar_one_or_none()
    if made_at is None or than is None or made_at <= than:
        raise Refusal(
            ProblemType.INVITE_REFUSED,
            "the operator ended this membership; an invite made since then is needed",
        )


def _use_invite(connection: Connection, invite: bytes, agent: bytes, now: float) -> None:
    row = connection.execute(select(invites.c.uses_left).where(invites.c.id == invite)).first()
    if row is None or row.uses_left < 1:
        raise Refusal(ProblemType.INVITE_REFUSED, "the invite has no use left; ask for a new one")
    left = row.uses_left - 1
    values: dict[str, object] = {"uses_left": left}
    if left == 0:
        values["code"] = None  # a secret that nobody needs any more
    connection.execute(update(invites).where(invites.c.id == invite).values(**values))
    connection.execute(insert(invite_uses).values(invite=invite, agent=agent, used_at=now))

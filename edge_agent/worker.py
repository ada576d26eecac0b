"""Puts a working agent together: home, lock, base, data, connections."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from edge_agent.agent import (
    Agent,
    AgentEventReport,
    Member,
    load_data,
    load_membership_base,
)
from edge_agent.config import AgentSettings
from edge_agent.errors import JournalError
from edge_agent.home import AgentHome
from edge_agent.journal import Journal, Membership
from edge_agent.membership import record_outgoing
from edge_agent.politeness import OwnersWishes
from edge_agent.transport import Transport
from protocol.clock import Clock
from protocol.manifest import Release


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A prepared agent; as a context it holds the home's lock and the connections."""

    agent: Agent
    wishes: OwnersWishes
    transport: Transport
    release_lock: Callable[[], None]

    def __enter__(self) -> Self:
        """Begin to work."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give lock and connections back."""
        self.transport.close()
        self.release_lock()


def prepare(
    home: AgentHome,
    journal: Journal,
    settings: AgentSettings,
    *,
    clock: Clock,
    on_event: Callable[[AgentEventReport], None],
    patience_s: float | None = None,
) -> Worker:
    """Load base and data, and put a working agent together.

    Args:
        home: Its lock is taken, and given back when the worker's context ends.
        journal: Of the home; stays the caller's.
        settings: What the owner allows.
        clock: Time.
        on_event: Told what happens.
        patience_s: Give up on an unreachable server after this long; None: never.

    Raises:
        JournalError: Never joined, already left, or another process works here.
        QuantError: The base cannot be used, or is another one.
        DataError: The data cannot be used.
    """
    member = _active_membership(journal)
    lock = home.lock()
    try:
        signer = home.load_or_create_signer()
        wishes = OwnersWishes(journal, clock, settings.allowed_hours)

        def tell_retry(reason: str, pause_s: float) -> None:
            text = f"{reason}; again in {pause_s:.0f} s"
            on_event(AgentEventReport(kind="retrying", text=text))

        transport = Transport(
            member.url,
            clock=clock,
            signer=signer,
            on_outgoing=record_outgoing(journal, clock),
            on_retry=tell_retry,
            stopped=wishes.stopping,
            patience_s=patience_s,
        )
        manifest = member.federation.body
        transport.use_federation(manifest)
        on_event(AgentEventReport(kind="loading", text=f"base model {manifest.base.model}"))
        base = load_membership_base(member, settings)
        data, report = load_data(member.data, manifest, base, settings)
        on_event(
            AgentEventReport(
                kind="data",
                text=f"{len(data.examples)} examples; {report.n_malformed} records malformed, "
                f"{data.report.n_truncated} cut to {manifest.training.max_length} tokens",
            )
        )
        agent = Agent(
            member=Member(home=home, journal=journal, membership=member, signer=signer),
            transport=transport,
            base=base,
            data=data,
            wishes=wishes,
            clock=clock,
            on_event=on_event,
        )
    except BaseException:
        lock.release()
        raise
    return Worker(agent=agent, wishes=wishes, transport=transport, release_lock=lock.release)


def _active_membership(journal: Journal) -> Membership:
    member = journal.membership()
    if member is None:
        msg = "no federation was joined here; begin with `sheepfold-agent join`"
        raise JournalError(msg)
    if member.left_at is not None:
        msg = "this membership was revoked by `leave`; `join` again to take part"
        raise JournalError(msg)
    if member.credential is None:  # told before a base is fetched and loaded in vain
        msg = "the enrolment was not finished; run `join` again"
        raise JournalError(msg)
    return member


def export(
    home: AgentHome,
    journal: Journal,
    settings: AgentSettings,
    folder: Path,
    *,
    clock: Clock,
    patience_s: float,
) -> Release:
    """Write the newest release as a PEFT folder.

    Raises:
        AgentError: As `prepare`, or the server cannot be reached.
    """
    worker = prepare(
        home, journal, settings, clock=clock, on_event=lambda _: None, patience_s=patience_s
    )
    with worker:
        return worker.agent.export(folder)

"""What the rounds so far say of members, for the operator, and the quarantine that may follow.

Nobody is set aside on one round, nor for good: the evidence must repeat itself, the operator must
have asked for it, and a person lets the member back in.
"""

from collections.abc import Mapping
from typing import Final

import structlog

from aggregator_server.charter import Charter
from aggregator_server.filtering import FilterDecision
from aggregator_server.gating import Passed
from aggregator_server.reputation import Observation, Reputation, reputations
from aggregator_server.store.rows import IncidentKind, JudgedRow, NewIncident
from aggregator_server.store.store import Store
from protocol.blocks import EvaluatorGate, FilterRule
from protocol.chain import NoVerdict
from protocol.clock import Clock
from protocol.wire import b64u_encode, parse

N_ROUNDS: Final = 200
"""Evidence older than so many published rounds is forgotten."""
_log = structlog.get_logger(__name__)


class Evidence:
    """The evidence on the members of a federation.

    Args:
        store: Of the federation.
        charter: Whose manifest says whether anything judges updates.
        clock: Time.
    """

    def __init__(self, store: Store, charter: Charter, clock: Clock) -> None:
        """Nothing is read yet."""
        self._store = store
        self._clock = clock
        filtering, gate = charter.manifest.filter, charter.manifest.gate
        self._judges = filtering.rule is not FilterRule.NONE or isinstance(gate, EvaluatorGate)
        self._reviewed = -1

    def reputations(self) -> Mapping[bytes, Reputation]:
        """The evidence on each member that was judged."""
        if not self._judges:
            return {}
        judged_from = {row.identity: row.judged_from for row in self._store.agents.members()}
        found = [
            observation
            for row in self._store.rounds.judged(limit=N_ROUNDS)
            for observation in observations_of(row, judged_from)
        ]
        return {one.agent: one for one in reputations(found)}

    def review(self) -> None:
        """Set aside whom the evidence suspects; once after each release."""
        n_done = self._store.releases.n_of_rounds()
        if not self._judges or n_done == self._reviewed:
            return
        now = self._clock.now()
        for agent, found in self.reputations().items():
            if not found.is_suspected:
                continue
            text = (
                f"agent {b64u_encode(agent)} is drawn no more: {found.n_removed} of "
                f"{found.n_judged} updates or cells with it were removed, log-odds "
                f"{found.log_odds:.1f} ± {found.std_error:.1f}; `agents readmit` ends it"
            )
            incident = NewIncident(kind=IncidentKind.QUARANTINED, text=text, at=now)
            if self._store.agents.quarantine(agent, incident, now=now):
                _log.warning("an agent is set aside", agent=b64u_encode(agent))
        self._reviewed = n_done


def observations_of(row: JudgedRow, judged_from: Mapping[bytes, int]) -> list[Observation]:
    """What a round says of those who were in it.

    A unit that the filter removed counts against its members. What the gate left out is one unit:
    the round passed without these cells together, and which of them it was is not known.

    Args:
        row: A published round.
        judged_from: For each member the first round that counts.
    """
    decision = parse(FilterDecision, row.filter_report)
    passed = parse(Passed, row.passed)
    if decision.report.rule is FilterRule.NONE and isinstance(passed.verdict, NoVerdict):
        return []
    members = {
        transcript: tuple(agent for agent in agents if judged_from.get(agent, 0) <= row.number)
        for transcript, agents in row.cells
    }
    left_out = frozenset(passed.candidate.left_out)
    found = [
        Observation(
            members=members[cell.transcript],
            removed=cell.removed is not None,
            score=cell.score,
        )
        for cell in decision.cells
        if cell.transcript not in left_out and members.get(cell.transcript)
    ]
    together = tuple(agent for cell in sorted(left_out) for agent in members.get(cell, ()))
    return [*found, Observation(members=together, removed=True)] if together else found

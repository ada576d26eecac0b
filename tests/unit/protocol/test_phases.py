"""The three transition tables."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import pytest

from protocol.errors import TransitionError
from protocol.phases import (
    AGENT_TRANSITIONS,
    CELL_TRANSITIONS,
    ROUND_TRANSITIONS,
    AgentEvent,
    AgentPhase,
    CellEvent,
    CellPhase,
    RoundEvent,
    RoundPhase,
    advance,
)

Table = Mapping[tuple[Any, Any], Any]
TABLES = [
    pytest.param(ROUND_TRANSITIONS, RoundPhase, RoundEvent, id="round"),
    pytest.param(CELL_TRANSITIONS, CellPhase, CellEvent, id="cell"),
    pytest.param(AGENT_TRANSITIONS, AgentPhase, AgentEvent, id="agent"),
]
TERMINAL = {
    RoundPhase.PUBLISHED,
    RoundPhase.FAILED,
    CellPhase.FAILED,
    AgentPhase.REVEALED,
    AgentPhase.ABANDONED,
}


@pytest.mark.parametrize(("table", "phases", "events"), TABLES)
def test_every_pair_outside_the_table_raises_and_changes_nothing(
    table: Table, phases: type[StrEnum], events: type[StrEnum]
) -> None:
    before = dict(table)
    refused = [
        (phase, event) for phase in phases for event in events if (phase, event) not in table
    ]
    assert refused
    for phase, event in refused:
        with pytest.raises(TransitionError, match=f"'{event.value}' is not allowed"):
            advance(table, phase, event)
    assert dict(table) == before


@pytest.mark.parametrize(("table", "phases", "events"), TABLES)
def test_every_pair_in_the_table_leads_where_it_says(
    table: Table, phases: type[StrEnum], events: type[StrEnum]
) -> None:
    for (phase, event), successor in table.items():
        assert advance(table, phase, event) is successor
        assert successor in phases


@pytest.mark.parametrize(("table", "phases", "events"), TABLES)
def test_every_phase_can_reach_an_end_and_every_phase_can_be_reached(
    table: Table, phases: type[StrEnum], events: type[StrEnum]
) -> None:
    ends = {phase for phase in phases if all(where is not phase for where, _ in table)}
    assert ends == TERMINAL & set(phases)
    closing = set(ends)
    while (
        grown := {where for (where, _), successor in table.items() if successor in closing}
        - closing
    ):
        closing |= grown
    assert closing == set(phases)
    first = next(iter(phases))
    reached = {first}
    while (
        grown := {successor for (where, _), successor in table.items() if where in reached}
        - reached
    ):
        reached |= grown
    assert reached == set(phases)
    assert {event for _, event in table} == set(events)


@pytest.mark.parametrize("table", [ROUND_TRANSITIONS, CELL_TRANSITIONS, AGENT_TRANSITIONS])
def test_a_table_cannot_be_changed(table: Any) -> None:
    with pytest.raises(TypeError):
        table[next(iter(table))] = None


def test_the_error_names_what_is_allowed() -> None:
    with pytest.raises(TransitionError, match=r"allowed: \['fail', 'filter-done'\]"):
        advance(ROUND_TRANSITIONS, RoundPhase.UNMASKED, RoundEvent.WAVE_GATHERS)
    with pytest.raises(TransitionError, match=r"allowed: \[\]"):
        advance(ROUND_TRANSITIONS, RoundPhase.PUBLISHED, RoundEvent.FAIL)


def test_an_open_mode_update_walks_the_short_way() -> None:
    phase = advance(AGENT_TRANSITIONS, AgentPhase.TRAINING, AgentEvent.TRAINING_DONE)
    assert advance(AGENT_TRANSITIONS, phase, AgentEvent.UPLOAD_ACCEPTED) is AgentPhase.UPLOADED
    cell = advance(CELL_TRANSITIONS, CellPhase.UPLOADING, CellEvent.PLAIN_UPLOAD_ACCEPTED)
    assert cell is CellPhase.UNMASKED


def test_an_accepted_update_can_no_longer_be_abandoned() -> None:
    for phase in (AgentPhase.UPLOADED, AgentPhase.CONFIRMED, AgentPhase.REVEALED):
        with pytest.raises(TransitionError):
            advance(AGENT_TRANSITIONS, phase, AgentEvent.ABANDON)

"""The owner's wishes."""

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.config import Hours
from edge_agent.journal import Journal
from edge_agent.politeness import OwnersWishes
from edge_agent.training.control import Wish
from protocol.signing import sign


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    found = Journal(tmp_path / "journal.sqlite")
    yield found
    found.close()


@pytest.fixture
def wishes(journal, clock) -> OwnersWishes:
    return OwnersWishes(journal, clock, None)


def test_nothing_wished_is_to_go_on(wishes: OwnersWishes) -> None:
    assert wishes.wish() is Wish.GO
    assert wishes.reason_to_wait() is None
    assert not wishes.stopping()


def test_a_pause_of_another_process_arrives_within_a_quarter_of_a_second(
    wishes: OwnersWishes, tmp_path: Path, clock
) -> None:
    assert wishes.wish() is Wish.GO
    other = Journal(tmp_path / "journal.sqlite")
    other.set_paused(paused=True)
    assert wishes.wish() is Wish.GO  # the journal is not read before every micro-batch
    clock.time += 0.25
    assert wishes.wish() is Wish.PAUSE
    assert "resume" in (wishes.reason_to_wait() or "")
    other.set_paused(paused=False)
    other.close()
    clock.time += 0.25
    assert wishes.wish() is Wish.GO


def test_a_stop_is_heard_at_once(wishes: OwnersWishes) -> None:
    assert wishes.wish() is Wish.GO
    wishes.stop()
    assert wishes.wish() is Wish.STOP
    assert wishes.stopping()


def test_a_stop_beats_a_pause(wishes: OwnersWishes, journal: Journal, clock) -> None:
    journal.set_paused(paused=True)
    clock.time += 1.0
    assert wishes.wish() is Wish.PAUSE
    wishes.stop()
    assert wishes.wish() is Wish.STOP


def test_leaving_stops_an_agent_that_runs_meanwhile(
    wishes: OwnersWishes, journal: Journal, clock, make_manifest, server_key
) -> None:
    """`leave` promises that nothing more leaves this machine."""
    federation = sign(server_key, "federation", make_manifest()).signed
    journal.join(url="https://h", federation=federation, data="x", now=1.0)
    clock.time += 1.0
    assert wishes.wish() is Wish.GO
    journal.leave(2.0)
    assert wishes.stopping()
    clock.time += 1.0
    assert wishes.wish() is Wish.STOP


def test_outside_the_hours_training_waits(journal: Journal, clock) -> None:
    local = dt.datetime.fromtimestamp(clock.time).astimezone()
    now, following = local.hour, (local.hour + 1) % 24
    inside = OwnersWishes(journal, clock, Hours(f"{now}-{following}"))
    outside = OwnersWishes(journal, clock, Hours(f"{following}-{now}"))
    assert inside.wish() is Wish.GO
    assert outside.wish() is Wish.PAUSE
    assert outside.reason_to_wait() == f"outside the allowed hours {following}-{now}"
    clock.time += 3600.0
    assert inside.wish() is Wish.PAUSE
    assert outside.wish() is Wish.GO

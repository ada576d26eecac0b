"""The ledger: nothing that was spent is forgotten, and no round takes a record over its budget."""

import dataclasses
import hashlib
import inspect
import math
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import privacy
from privacy.accounting import SampledGaussian
from privacy.errors import AccountingError, BudgetError, LedgerError
from privacy.ledger import (
    Budget,
    DataSet,
    HistoryRow,
    Ledger,
    Overlap,
    Participation,
    Quote,
)
from privacy.ledger_file import SCHEMA_VERSION

DELTA, NOW = 1e-5, 1_800_000_000.0
TABLES = ("secrets", "records", "data_sets", "events", "budgets")


@dataclasses.dataclass
class FakeSpent:
    epsilon: float


def fake_spent(events: Sequence[SampledGaussian], *, delta: float) -> FakeSpent:
    """Steps × (q ÷ z)²: exact for the powers of two below, in any order and grouping."""
    assert 0.0 < delta < 1.0
    return FakeSpent(
        sum(e.n_steps * (e.sampling_probability / e.noise_multiplier) ** 2 for e in events)
    )


def make_event(
    n_steps: int = 16, *, noise_multiplier: float = 1.0, sampling_probability: float = 0.25
) -> SampledGaussian:
    """By default, one that costs 1."""
    return SampledGaussian(
        noise_multiplier=noise_multiplier,
        sampling_probability=sampling_probability,
        n_steps=n_steps,
    )


def make_records(*numbers: int) -> list[bytes]:
    return [b'{"instruction":"%d"}' % number for number in numbers]


def part(round_number: int = 1, **changes: Any) -> Participation:
    fields = {"agent": b"a" * 32, "federation": b"f" * 16, "round": round_number, "attempt": 1}
    return Participation(**{**fields, **changes})


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as db:
        return list(db.iterdump())


def n_events(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("SELECT count(*) FROM events").fetchone()[0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "privacy" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with closing(Ledger(path, spent=fake_spent)) as made:
        made.set_budget(epsilon=8.0, delta=DELTA, now=NOW)
        yield made


def charge(
    ledger: Ledger,
    round_number: int,
    records: Iterable[bytes],
    event: SampledGaussian | None = None,
) -> Quote:
    return ledger.reserve(
        part(round_number),
        data_set=ledger.data_set(records),
        event=event or make_event(),
        now=NOW + round_number,
    )


# Other processes

PRELUDE = """
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

@dataclass(frozen=True, kw_only=True)
class SampledGaussian:
    noise_multiplier: float
    sampling_probability: float
    n_steps: int

def spent(events, *, delta):
    return SimpleNamespace(epsilon=sum(
        e.n_steps * (e.sampling_probability / e.noise_multiplier) ** 2 for e in events))

# The accounting takes a second to import, and none of these processes needs it.
sys.modules["privacy.accounting"] = SimpleNamespace(SampledGaussian=SampledGaussian, spent=spent)

from privacy.errors import BudgetError
from privacy.ledger import Ledger, Participation

path, agent, say = Path(sys.argv[1]), sys.argv[2].encode() * 32, lambda t: print(t, flush=True)
event = SampledGaussian(noise_multiplier=1.0, sampling_probability=0.25, n_steps=16)
records = [b"%d" % i for i in range(50)]

def reserve(ledger, round_number):
    part = Participation(agent=agent, federation=b"f", round=round_number, attempt=1)
    return ledger.reserve(part, data_set=ledger.data_set(records), event=event, now=1.0)
"""


@contextmanager
def running(program: str, path: Path, agent: str = "a") -> "Iterator[subprocess.Popen[str]]":
    environment = {**os.environ, "PYTHONPATH": str(Path(privacy.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + program, str(path), agent],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def run_together(program: str, path: Path, agents: str) -> list[str]:
    """Processes that wait for each other between their imports and their work; what they print."""
    ready = "say('ready'); sys.stdin.readline()\n"
    with ExitStack() as stack:
        processes = [stack.enter_context(running(ready + program, path, agent)) for agent in agents]
        assert [line_of(process) for process in processes] == ["ready"] * len(agents)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        found = [process.communicate(timeout=60)[0].strip() for process in processes]
        assert [process.returncode for process in processes] == [0] * len(agents)
    return found


def test_guarantee_1_what_was_reserved_survives_kill_9(path: Path) -> None:
    program = (
        "ledger = Ledger(path, spent=spent)\n"
        "ledger.set_budget(epsilon=8.0, delta=1e-5, now=1.0)\n"
        "say(reserve(ledger, 1).after)\n"
        "sys.stdin.readline()\n"
    )
    with running(program, path) as process:
        assert line_of(process) == "1.0"
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    with closing(Ledger(path, spent=fake_spent)) as ledger:
        assert ledger.total(ledger.data_set([b"7"])) == 1.0
        assert ledger.budget() == Budget(epsilon=8.0, delta=1e-5, at=1.0)


def test_a_process_that_dies_inside_a_write_leaves_the_state_before_it(path: Path) -> None:
    program = (
        "import os\n"
        "ledger = Ledger(path, spent=spent)\n"
        "ledger.set_budget(epsilon=8.0, delta=1e-5, now=1.0)\n"
        "append = ledger._append\n"
        "def die(*args, **kwargs):\n"
        "    append(*args, **kwargs)\n"
        "    os._exit(9)\n"
        "ledger._append = die\n"
        "reserve(ledger, 1)\n"
    )
    with running(program, path) as process:
        process.communicate()
    assert process.returncode == 9
    with closing(Ledger(path, spent=fake_spent)) as ledger:
        assert ledger.total(ledger.data_set([b"7"])) == 0.0
        assert ledger._all_records() == {}


def test_guarantee_1_writes_are_forced_to_the_disk(ledger: Ledger) -> None:
    assert ledger._file.one("PRAGMA synchronous")[0] == 2  # type: ignore[index]
    assert ledger._file.one("PRAGMA journal_mode")[0] == "wal"  # type: ignore[index]


# Append-only

OVERWRITES = {
    "secrets": "INSERT OR REPLACE INTO secrets VALUES (1, x'00')",
    "records": "INSERT OR REPLACE INTO records VALUES (1, zeroblob(32))",
    "records, by digest": "INSERT OR REPLACE INTO records SELECT 99, digest FROM records",
    "records, upsert": (
        "INSERT INTO records VALUES (1, zeroblob(32)) ON CONFLICT DO UPDATE SET digest = x'00'"
    ),
    "data_sets": "INSERT OR REPLACE INTO data_sets SELECT 1, zeroblob(32), x'00', 0.0",
    "data_sets, by id": (
        "REPLACE INTO data_sets (id, members, at) SELECT id, x'00', 0.0 FROM data_sets"
    ),
    "events": (
        "INSERT OR REPLACE INTO events SELECT 1, agent, federation, 99, attempt, data_set, 9.0, "
        "sampling_probability, 1, at, epsilon, delta FROM events"
    ),
    "events, by key": (
        "REPLACE INTO events SELECT 99, agent, federation, round, attempt, data_set, 9.0, "
        "sampling_probability, 1, at, epsilon, delta FROM events"
    ),
    "budgets": "INSERT OR REPLACE INTO budgets VALUES (1, 1e9, 0.5, 0.0)",
}


def refused(path: Path, statement: str) -> None:
    before = dump(path)
    with closing(sqlite3.connect(path)) as db, pytest.raises(sqlite3.IntegrityError) as caught:
        db.execute(statement)
    assert "append-only" in str(caught.value)
    assert dump(path) == before


@pytest.mark.parametrize("table", TABLES)
def test_guarantee_2_no_row_is_removed(table: str, ledger: Ledger, path: Path) -> None:
    charge(ledger, 1, make_records(1, 2))
    refused(path, f"DELETE FROM {table}")


@pytest.mark.parametrize("conflict", ["", "OR IGNORE", "OR REPLACE"])
@pytest.mark.parametrize("table", TABLES)
def test_guarantee_2_no_column_is_changed(
    table: str, conflict: str, ledger: Ledger, path: Path
) -> None:
    charge(ledger, 1, make_records(1, 2))
    with closing(sqlite3.connect(path)) as db:
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    assert columns
    for column in columns:
        refused(path, f"UPDATE {conflict} {table} SET {column} = {column}")


@pytest.mark.parametrize("name", OVERWRITES)
def test_guarantee_2_no_row_is_replaced(name: str, ledger: Ledger, path: Path) -> None:
    charge(ledger, 1, make_records(1))
    refused(path, OVERWRITES[name])


def test_guarantee_2_every_table_is_guarded(ledger: Ledger, path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        tables = db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
        guards = db.execute("SELECT tbl_name FROM sqlite_schema WHERE type = 'trigger'").fetchall()
    assert {name for (name,) in tables} == set(TABLES)
    assert Counter(name for (name,) in guards) == dict.fromkeys(TABLES, 3)


def test_guarantee_2_no_method_removes_or_refunds() -> None:
    public = {name for name, _ in inspect.getmembers(Ledger) if not name.startswith("_")}
    writing = {"reserve", "set_budget"}
    reading = {"budget", "budgets", "history", "overlaps", "quote", "total"} | {"attempts"}
    assert public == writing | reading | {"close", "data_set", "data_set_of_digests"}


# The budget


def test_guarantee_3_a_round_that_would_break_the_budget_writes_nothing(
    ledger: Ledger, path: Path
) -> None:
    charge(ledger, 1, make_records(1, 2), make_event(7 * 16))
    before = dump(path)
    with pytest.raises(BudgetError) as caught:
        charge(ledger, 2, make_records(2, 3), make_event(20))
    assert str(caught.value) == (
        "this round would take some of these records to ε = 8.2500, over the budget of 8 "
        "(δ = 1e-05; one example, add or remove); they have spent ε = 7.0000 so far. Raise the "
        "budget with `sheepfold-agent privacy --budget`, or stop"
    )
    assert dump(path) == before
    assert charge(ledger, 2, make_records(3)).after == 1.0


def test_guarantee_3_one_record_of_many_is_enough(ledger: Ledger, path: Path) -> None:
    charge(ledger, 1, make_records(77), make_event(8 * 16))
    before = dump(path)
    with pytest.raises(BudgetError):
        charge(ledger, 2, make_records(*range(100)), make_event(1))
    assert dump(path) == before
    assert charge(ledger, 2, make_records(*range(77))).after == 1.0


def test_the_budget_may_be_spent_to_its_last_bit(ledger: Ledger) -> None:
    assert charge(ledger, 1, make_records(1), make_event(8 * 16)).after == 8.0


def test_an_excess_too_small_to_print_is_refused_and_shows(path: Path) -> None:
    def spent(events: Sequence[SampledGaussian], *, delta: float) -> FakeSpent:
        return FakeSpent(math.nextafter(8.0, 9.0))

    with closing(Ledger(path, spent=spent)) as ledger:
        ledger.set_budget(epsilon=8.0, delta=DELTA, now=NOW)
        with pytest.raises(BudgetError, match=r"ε = 8\.0001, over the budget of 8 "):
            charge(ledger, 1, make_records(1))


def test_what_cannot_be_composed_is_not_charged(path: Path) -> None:
    with closing(Ledger(path)) as ledger:
        ledger.set_budget(epsilon=8.0, delta=DELTA, now=NOW)
        with pytest.raises(AccountingError, match="too many"):
            charge(ledger, 1, make_records(1), make_event(10**9))
        assert charge(ledger, 1, make_records(1), make_event(0)).after == 0.0
        assert n_events(path) == 1


@pytest.mark.parametrize("epsilon", [math.inf, math.nan])
def test_guarantee_3_no_privacy_at_all_fits_no_budget(epsilon: float, path: Path) -> None:
    def spent(events: Sequence[SampledGaussian], *, delta: float) -> FakeSpent:
        return FakeSpent(epsilon)

    with closing(Ledger(path, spent=spent)) as ledger:
        ledger.set_budget(epsilon=1e300, delta=DELTA, now=NOW)
        with pytest.raises(BudgetError, match="ε = ∞"):
            charge(ledger, 1, make_records(1))
        assert n_events(path) == 0


def test_without_a_budget_no_round_is_charged(path: Path) -> None:
    with closing(Ledger(path, spent=fake_spent)) as ledger:
        before = dump(path)
        with pytest.raises(BudgetError, match="no privacy budget is set"):
            charge(ledger, 1, make_records(1))
        assert ledger.budget() is None
        assert dump(path) == before


def test_the_newest_budget_counts_and_the_others_stay_on_record(ledger: Ledger) -> None:
    charge(ledger, 1, make_records(1), make_event(2 * 16))
    ledger.set_budget(epsilon=1.0, delta=DELTA, now=NOW + 5)  # less than is spent
    with pytest.raises(BudgetError):
        charge(ledger, 2, make_records(1), make_event(1))
    assert charge(ledger, 2, make_records(2)).after == 1.0
    ledger.set_budget(epsilon=3.0, delta=1e-6, now=NOW - 5)  # the clock does not decide
    assert charge(ledger, 3, make_records(1)).after == 3.0
    assert ledger.budget() == Budget(epsilon=3.0, delta=1e-6, at=NOW - 5)
    assert [(budget.epsilon, budget.delta) for budget in ledger.budgets()] == [
        (8.0, DELTA),
        (1.0, DELTA),
        (3.0, 1e-6),
    ]


def test_a_budget_of_zero_stops_everything(ledger: Ledger) -> None:
    ledger.set_budget(epsilon=0.0, delta=DELTA, now=NOW)
    with pytest.raises(BudgetError):
        charge(ledger, 1, make_records(1), make_event(1))


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [(-1.0, 0.1), (math.inf, 0.1), (math.nan, 0.1), (1.0, 0.0), (1.0, 1.0), (1.0, math.nan)],
)
def test_a_budget_that_is_none_is_refused(
    epsilon: float, delta: float, ledger: Ledger, path: Path
) -> None:
    before = dump(path)
    with pytest.raises(LedgerError, match=r"epsilon =|delta ="):
        ledger.set_budget(epsilon=epsilon, delta=delta, now=NOW)
    assert dump(path) == before


def test_guarantee_3_two_agents_at_once_do_not_break_the_budget(path: Path) -> None:
    with closing(Ledger(path, spent=fake_spent)) as ledger:
        ledger.set_budget(epsilon=21.0, delta=DELTA, now=NOW)
    program = (
        "ledger, n = Ledger(path, spent=spent), 0\n"
        "for i in range(30):\n"
        "    try:\n"
        "        n += not reserve(ledger, i).was_charged\n"
        "    except BudgetError:\n"
        "        pass\n"
        "say(n)\n"
    )
    counts = [int(found) for found in run_together(program, path, "ab")]
    assert sum(counts) == n_events(path) == 21


# Charged once


def test_guarantee_4_the_same_participation_is_charged_once(ledger: Ledger, path: Path) -> None:
    first = charge(ledger, 1, make_records(1, 2))
    before = dump(path)
    again = charge(ledger, 1, make_records(2, 1, 1))
    assert (first.before, first.after, first.was_charged) == (0.0, 1.0, False)
    assert (again.before, again.after, again.was_charged) == (1.0, 1.0, True)
    assert dump(path) == before


def test_guarantee_4_a_charge_stands_when_the_budget_is_lowered(ledger: Ledger) -> None:
    charge(ledger, 1, make_records(1), make_event(5 * 16))
    ledger.set_budget(epsilon=1.0, delta=DELTA, now=NOW)
    again = charge(ledger, 1, make_records(1), make_event(5 * 16))
    assert (again.after, again.was_charged, again.fits) == (5.0, True, False)


@pytest.mark.parametrize(
    "changes",
    [{"agent": b"b" * 32}, {"federation": b"g" * 16}, {"round": 2}, {"attempt": 2}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_participation_is_charged(changes: dict[str, Any], ledger: Ledger) -> None:
    data_set = ledger.data_set(make_records(1))
    ledger.reserve(part(), data_set=data_set, event=make_event(), now=NOW)
    found = ledger.reserve(part(**changes), data_set=data_set, event=make_event(), now=NOW)
    assert (found.before, found.after) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("numbers", "event"),
    [
        ((1, 2), make_event(15)),
        ((1, 2), make_event(noise_multiplier=2.0)),
        ((1, 2), make_event(sampling_probability=0.5)),
        ((1,), make_event()),
        ((1, 2, 3), make_event()),
        ((4, 5), make_event()),
    ],
)
def test_guarantee_4_the_same_participation_with_another_event_is_an_error(
    numbers: tuple[int, ...], event: SampledGaussian, ledger: Ledger, path: Path
) -> None:
    charge(ledger, 1, make_records(1, 2))
    before = dump(path)
    with pytest.raises(LedgerError, match="round 1, attempt 1 was charged") as caught:
        charge(ledger, 1, make_records(*numbers), event)
    assert not isinstance(caught.value, BudgetError)
    assert dump(path) == before


def test_guarantee_4_two_processes_at_once_are_charged_once(path: Path) -> None:
    with closing(Ledger(path, spent=fake_spent)) as ledger:
        ledger.set_budget(epsilon=1e6, delta=DELTA, now=NOW)
    program = (
        "ledger = Ledger(path, spent=spent)\n"
        "say(sum(not reserve(ledger, i).was_charged for i in range(25)))\n"
    )
    counts = [int(found) for found in run_together(program, path, "aa")]
    assert sum(counts) == n_events(path) == 25


def test_many_processes_may_make_the_ledger_at_once(tmp_path: Path) -> None:
    program = (
        "for i in range(12):\n"
        "    ledger = Ledger(Path(f'{path}{i}'), spent=spent)\n"
        "    say(ledger.data_set(records).id.hex())\n"
        "    ledger.close()\n"
    )
    first, *others = run_together(program, tmp_path / "ledger", "aaa")
    assert len(set(first.split())) == 12
    assert others == [first] * 2


def test_a_ledger_waits_for_who_makes_it_at_the_same_time(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as db:
        db.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.2, db.execute, ["COMMIT"])
        timer.start()
        Ledger(path, spent=fake_spent, busy_timeout_s=60.0).close()
        timer.join()


def test_the_accounting_is_done_before_the_file_is_locked(path: Path) -> None:
    n_calls = 0

    def spent(events: Sequence[SampledGaussian], *, delta: float) -> FakeSpent:
        nonlocal n_calls
        n_calls += 1
        with closing(sqlite3.connect(path, timeout=0.0, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("ROLLBACK")
        return fake_spent(events, delta=delta)

    with closing(Ledger(path, spent=spent)) as ledger:
        ledger.set_budget(epsilon=8.0, delta=DELTA, now=NOW)
        charge(ledger, 1, make_records(1))
        charge(ledger, 2, make_records(1))
    assert n_calls == 2


# Identity of records


def test_guarantee_5_order_copies_and_origin_make_no_other_data_set(ledger: Ledger) -> None:
    records = make_records(*range(9))
    first = ledger.data_set(records)
    turned = ledger.data_set(reversed(records))
    doubled = ledger.data_set(iter(records * 3))
    assert first == turned
    assert (first.id, first.digests) == (doubled.id, doubled.digests)
    assert (first.n_records, first.n_duplicates) == (9, 0)
    assert (doubled.n_records, doubled.n_duplicates) == (9, 18)
    assert ledger.data_set(records[1:]).id != first.id
    digests = [hashlib.sha256(record).digest() for record in records]
    assert ledger.data_set_of_digests(digests) == first


def test_guarantee_5_the_identity_survives_a_restart(ledger: Ledger, path: Path) -> None:
    made = ledger.data_set(make_records(1, 2))
    with closing(Ledger(path, spent=fake_spent)) as again:
        assert again.data_set(make_records(1, 2)) == made


def test_two_ledgers_cannot_be_linked_by_their_digests(ledger: Ledger, tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "other", spent=fake_spent)) as other:
        ours, theirs = (each.data_set(make_records(1, 2)) for each in (ledger, other))
    plain = {hashlib.sha256(record).digest() for record in make_records(1, 2)}
    assert ours.id != theirs.id
    assert not set(ours.digests) & (set(theirs.digests) | plain)


def test_a_data_set_of_another_ledger_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "other", spent=fake_spent)) as other:
        alien = other.data_set(make_records(1))
    attempts = [
        lambda: ledger.reserve(part(), data_set=alien, event=make_event(), now=NOW),
        lambda: ledger.quote(alien, make_event()),
        lambda: ledger.total(alien),
        lambda: ledger.history(alien),
        lambda: ledger.overlaps(alien),
    ]
    for attempt in attempts:
        with pytest.raises(LedgerError, match="another ledger"):
            attempt()


@pytest.mark.parametrize("digests", [[], [b""], [bytes(31)], [bytes(32), bytes(33)]])
def test_digests_that_are_none_are_refused(digests: list[bytes], ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match=r"without records|32 bytes"):
        ledger.data_set_of_digests(digests)


def test_no_record_lies_in_the_file(ledger: Ledger, path: Path) -> None:
    charge(ledger, 1, [b"the patient's name is Anna"])
    ledger.close()
    assert b"Anna" not in path.read_bytes()


numbers_of_a_file = st.lists(st.integers(0, 7), min_size=1, max_size=12)
events = st.builds(
    make_event,
    st.integers(1, 40),
    noise_multiplier=st.sampled_from([0.5, 1.0, 2.0]),
    sampling_probability=st.sampled_from([0.125, 0.25, 0.5, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.lists(st.tuples(numbers_of_a_file, events), max_size=12),
    asked=numbers_of_a_file,
    budget=st.sampled_from([4.0, 16.0, 1e6]),
)
def test_guarantee_5_a_record_has_spent_what_its_events_compose_to(
    rounds: list[tuple[list[int], SampledGaussian]], asked: list[int], budget: float
) -> None:
    # Files of any records in any order with any copies; the reference goes record by record.
    through: dict[int, list[SampledGaussian]] = {number: [] for number in range(8)}

    def worst(numbers: list[int], *more: SampledGaussian) -> float:
        return max(fake_spent([*through[n], *more], delta=DELTA).epsilon for n in numbers)

    expected = []
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Ledger(Path(folder) / "ledger", spent=fake_spent)) as ledger,
    ):
        ledger._file.db.execute("PRAGMA synchronous = OFF")  # for speed; here nothing is killed
        ledger.set_budget(epsilon=budget, delta=DELTA, now=NOW)
        asked_set = ledger.data_set(make_records(*asked))
        for i, (numbers, event) in enumerate(rounds):
            before, after = worst(numbers), worst(numbers, event)
            if after > budget:
                with pytest.raises(BudgetError):
                    charge(ledger, i, make_records(*numbers), event)
            else:
                found = charge(ledger, i, make_records(*numbers), event)
                assert (found.before, found.after) == (before, after)
                assert found.n_duplicates == len(numbers) - len(set(numbers))
                for number in set(numbers):
                    through[number].append(event)
                if set(numbers) & set(asked):
                    n_shared = len(set(numbers) & set(asked))
                    expected.append((part(i), event, n_shared, worst(asked)))
        for number in range(8):
            assert ledger.total(ledger.data_set(make_records(number))) == worst([number])
        assert ledger.total(asked_set) == worst(asked)
        assert [
            (row.participation, row.event, row.n_shared, row.epsilon)
            for row in ledger.history(asked_set)
        ] == expected


# Overlap


def test_guarantee_6_overlap_is_charged(ledger: Ledger) -> None:
    charge(ledger, 1, make_records(1, 2), make_event(16))
    charge(ledger, 2, make_records(2, 3), make_event(32))
    assert ledger.total(ledger.data_set(make_records(1))) == 1.0
    assert ledger.total(ledger.data_set(make_records(2))) == 3.0
    assert ledger.total(ledger.data_set(make_records(3))) == 2.0
    assert ledger.total(ledger.data_set(make_records(1, 3))) == 2.0
    assert ledger.total(ledger.data_set(make_records(1, 2, 3, 4))) == 3.0
    assert ledger.total(ledger.data_set(make_records(4, 5))) == 0.0


def test_guarantee_6_adding_or_removing_records_does_not_reset(ledger: Ledger) -> None:
    for i in range(8):
        charge(ledger, i, make_records(*range(i, 20 + i)))  # each day a record comes and one goes
    with pytest.raises(BudgetError):
        charge(ledger, 8, make_records(*range(8, 28)))


def test_overlaps_names_the_other_data_sets(ledger: Ledger) -> None:
    sets = [ledger.data_set(make_records(*range(*ends))) for ends in ((0, 9), (5, 12), (20, 22))]
    for i, data_set in enumerate(sets):
        ledger.reserve(part(i), data_set=data_set, event=make_event(), now=NOW)
    first, second, third = sets
    assert ledger.overlaps(first) == [Overlap(data_set=second.id, n_records=7, n_shared=4)]
    assert ledger.overlaps(third) == []
    both = ledger.data_set(make_records(*range(25)))
    assert [(found.data_set, found.n_shared) for found in ledger.overlaps(both)] == [
        (first.id, 9),
        (second.id, 7),
        (third.id, 2),
    ]


def test_few_compositions_for_many_records_and_data_sets(path: Path) -> None:
    calls: list[tuple[SampledGaussian, ...]] = []

    def spent(events: Sequence[SampledGaussian], *, delta: float) -> FakeSpent:
        calls.append(tuple(events))
        return fake_spent(events, delta=delta)

    with closing(Ledger(path, spent=spent)) as ledger:
        ledger.set_budget(epsilon=1e6, delta=DELTA, now=NOW)
        for i in range(20):
            charge(ledger, i, make_records(*range(100 * i, 2000 + i)))
        # All of a data set's rounds alike are one event, and no figure is asked for twice.
        assert calls == [(make_event(16 * n),) for n in range(1, 21)]
        calls.clear()
        charge(ledger, 20, make_records(*range(100)), make_event(noise_multiplier=2.0))
        # The records of the first data set only; they had spent 1.
        assert calls == [(make_event(), make_event(noise_multiplier=2.0))]
        calls.clear()
        for i in range(21, 31):
            charge(ledger, i, make_records(10_000 + i), make_event(i))
        calls.clear()
        # Of records in different data sets that went through the same, who went through it most.
        ledger.quote(ledger.data_set(make_records(*range(10_021, 10_031))), make_event(i))
        assert calls == [(make_event(2 * i),)]


# Screens


def test_a_quote_says_what_reserve_would_and_writes_nothing(ledger: Ledger, path: Path) -> None:
    charge(ledger, 1, make_records(1, 2), make_event(6 * 16))
    data_set = ledger.data_set(make_records(2, 3, 3))
    before = dump(path)
    budget = ledger.budget()
    fields = {"before": 6.0, "delta": DELTA, "budget": budget, "n_duplicates": 1}
    fits = ledger.quote(data_set, make_event(2 * 16))
    assert fits == Quote(after=8.0, **fields)  # type: ignore[arg-type]
    assert fits.fits
    too_much = ledger.quote(data_set, make_event(2 * 16 + 1))
    assert too_much == Quote(after=8.0625, **fields)  # type: ignore[arg-type]
    assert not too_much.fits
    assert dump(path) == before
    assert charge(ledger, 2, make_records(2, 3, 3), make_event(2 * 16)) == fits


def test_before_there_is_a_budget_a_screen_needs_a_delta(path: Path) -> None:
    with closing(Ledger(path, spent=fake_spent)) as ledger:
        data_set = ledger.data_set(make_records(1))
        for ask in (ledger.total, ledger.history, lambda one: ledger.quote(one, make_event())):
            with pytest.raises(LedgerError, match="without a δ"):
                ask(data_set)
        found = ledger.quote(data_set, make_event(), delta=DELTA)
        assert (found.before, found.after, found.budget, found.fits) == (0.0, 1.0, None, False)
        assert ledger.total(data_set, delta=DELTA) == 0.0
        with pytest.raises(LedgerError, match="delta = 1"):
            ledger.total(data_set, delta=1.0)


def spent_by_delta(events: Sequence[SampledGaussian], *, delta: float) -> FakeSpent:
    return FakeSpent(fake_spent(events, delta=delta).epsilon / delta)


def test_figures_are_for_the_delta_asked_for(path: Path) -> None:
    with closing(Ledger(path, spent=spent_by_delta)) as ledger:
        ledger.set_budget(epsilon=8.0, delta=0.5, now=NOW)
        data_set = ledger.data_set(make_records(1))
        assert charge(ledger, 1, make_records(1)).after == 2.0
        assert ledger.total(data_set) == 2.0
        assert ledger.total(data_set, delta=0.25) == 4.0
        assert [row.epsilon for row in ledger.history(data_set)] == [2.0]
        assert [row.epsilon for row in ledger.history(data_set, delta=0.25)] == [4.0]
        ledger.set_budget(epsilon=8.0, delta=0.125, now=NOW)  # all of it by the new δ
        assert ledger.total(data_set) == 8.0
        with pytest.raises(BudgetError):
            charge(ledger, 2, make_records(1), make_event(1))


def test_the_history_tells_of_all_rounds_that_a_record_was_in(ledger: Ledger) -> None:
    charge(ledger, 1, make_records(1, 2))
    charge(ledger, 2, make_records(8, 9))
    charge(ledger, 3, make_records(2, 3), make_event(32))
    charge(ledger, 4, make_records(1, 3, 4), make_event(8))
    charge(ledger, 5, make_records(1, 2))
    both, other, third = (
        ledger.data_set(make_records(*numbers)) for numbers in ((1, 2), (2, 3), (1, 3, 4))
    )

    def row(i: int, event: SampledGaussian, of: DataSet, n: int, epsilon: float) -> HistoryRow:
        return HistoryRow(
            participation=part(i),
            at=NOW + i,
            event=event,
            data_set=of.id,
            n_shared=n,
            epsilon=epsilon,
        )

    assert ledger.history(both) == [
        row(1, make_event(), both, 2, 1.0),
        row(3, make_event(32), other, 1, 3.0),
        row(4, make_event(8), third, 1, 3.0),  # the other record's
        row(5, make_event(), both, 2, 4.0),
    ]
    assert ledger.history(ledger.data_set(make_records(5))) == []


def test_a_history_of_one_data_set_composes_nothing(ledger: Ledger, path: Path) -> None:
    for i in range(5):
        charge(ledger, i, make_records(1, 2))

    def spent(events: Sequence[SampledGaussian], *, delta: float) -> FakeSpent:
        raise AssertionError

    with closing(Ledger(path, spent=spent)) as again:
        rows = again.history(again.data_set(make_records(1, 2)))
    assert [row.epsilon for row in rows] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_screen_reads_while_another_process_writes(ledger: Ledger, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        assert ledger.total(ledger.data_set(make_records(1))) == 0.0


def test_the_accounting_of_the_package_is_the_default(path: Path) -> None:
    with closing(Ledger(path)) as ledger:
        ledger.set_budget(epsilon=8.0, delta=DELTA, now=NOW)
        event = make_event(500, sampling_probability=0.01)
        charge(ledger, 1, make_records(1), event)
        found = charge(ledger, 2, make_records(1), event)
    assert found.after == pytest.approx(1.8282, abs=1e-3)  # z = 1, q = 0.01, 1000 steps
    assert found.before < found.after < 2 * found.before  # composed, not added


# The file


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_only_the_owner_may_read_the_file(ledger: Ledger, path: Path) -> None:
    assert mode(path.parent) == 0o700
    names = {file.name for file in path.parent.iterdir()}
    assert names == {"ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"}
    assert {mode(file) for file in path.parent.iterdir()} == {0o600}
    ledger.close()
    path.chmod(0o644)
    Ledger(path).close()
    assert mode(path) == 0o600


def refused_file(path: Path, match: str) -> None:
    with pytest.raises(LedgerError, match=match) as caught:
        Ledger(path, spent=fake_spent, busy_timeout_s=0.05)
    assert str(path) in str(caught.value)


def test_a_file_of_another_kind_is_left_as_it_is(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("name,question\n" * 1000)
    refused_file(path, "is not a ledger")
    assert path.read_text() == "name,question\n" * 1000


def test_another_programs_database_is_left_as_it_is(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE membership (one)")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    before = path.read_bytes()
    refused_file(path, "another program's SQLite file")
    assert path.read_bytes() == before


def test_a_ledger_of_a_newer_version_is_refused(ledger: Ledger, path: Path) -> None:
    ledger._file.db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    refused_file(path, f"has version {SCHEMA_VERSION + 1}; this agent knows {SCHEMA_VERSION}")


def test_a_damaged_ledger_is_refused(ledger: Ledger, path: Path) -> None:
    charge(ledger, 1, make_records(*range(500)))
    ledger.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused_file(path, "is damaged")
    page = 4096
    for first in range(page, len(whole), page):
        path.write_bytes(whole[:first] + bytes([0x55]) * page + whole[first + page :])
        refused_file(path, "is damaged")


def test_a_data_set_that_cannot_be_read_is_damage(ledger: Ledger, path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("INSERT INTO data_sets VALUES (1, zeroblob(32), x'55', 0.0)")
    with pytest.raises(LedgerError, match="damaged"):
        ledger.total(ledger.data_set(make_records(1)))


def test_a_ledger_that_stays_locked_is_an_error(ledger: Ledger, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        refused_file(path, "in use by another process")
    with closing(Ledger(path, spent=fake_spent, busy_timeout_s=0.05)) as other:
        other._file.db.execute("BEGIN IMMEDIATE")
        ledger._file.db.execute("PRAGMA busy_timeout = 50")
        with pytest.raises(LedgerError, match="in use by another process"):
            charge(ledger, 1, make_records(1))
        other._file.db.execute("ROLLBACK")
    assert charge(ledger, 1, make_records(1)).before == 0.0


def test_a_full_disk_leaves_the_ledger_as_it_was(ledger: Ledger, path: Path) -> None:
    before = dump(path)
    ledger._file.db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(LedgerError, match="disk is full"):
        charge(ledger, 1, make_records(*range(5000)))
    assert dump(path) == before
    ledger._file.db.execute("PRAGMA max_page_count = 100000")
    assert charge(ledger, 1, make_records(*range(5000))).before == 0.0


def test_a_ledger_that_cannot_be_written_is_an_error(ledger: Ledger) -> None:
    ledger._file.db.execute("PRAGMA query_only = ON")
    with pytest.raises(LedgerError, match="cannot be written"):
        charge(ledger, 1, make_records(1))


def test_a_place_where_no_file_can_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    refused_file(tmp_path / "file" / "ledger", "cannot be made")
    (tmp_path / "folder").mkdir(mode=0o755)
    refused_file(tmp_path / "folder", "cannot be opened")
    assert mode(tmp_path / "folder") == 0o755


@pytest.mark.parametrize("replaced", [False, True])
def test_a_ledger_that_was_moved_away_takes_no_charge(
    replaced: bool, ledger: Ledger, path: Path
) -> None:
    path.rename(path.with_name("moved"))
    if replaced:
        Ledger(path, spent=fake_spent).close()
    with pytest.raises(LedgerError, match="moved or deleted"):
        charge(ledger, 1, make_records(1))


def test_a_closed_ledger_is_an_error(ledger: Ledger) -> None:
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.budget()


def test_a_time_that_is_none_writes_nothing(ledger: Ledger, path: Path) -> None:
    before = dump(path)
    with pytest.raises(LedgerError, match="NOT NULL"):
        ledger.reserve(
            part(), data_set=ledger.data_set(make_records(1)), event=make_event(), now=math.nan
        )
    assert dump(path) == before

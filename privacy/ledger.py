"""The ledger of privacy: how much ε the owner's records have spent, and whether a round still fits.

One append-only SQLite file on the agent's machine, for all federations that the owner takes part
in; it lies outside the home of any one of them, so that leaving and joining again resets nothing.
The unit is one example, and neighbours differ by adding or removing it (profile P1).

What counts is the record, not the file. Of each record the ledger keeps a keyed digest, of each
data set which records it has, and of each participation its mechanism and its data set. A record
has spent what all participations of all data sets that contain it compose to; ε values are never
added. A data set has spent what its worst record has.

Records are told apart by their bytes, so a caller hands each in one canonical form of what was
parsed, never as a line of a file: then neither white space nor a format makes an old record new.

What it does not do: an edited record is a new record, and nobody can keep an owner from deleting
the file. The key of the digests lies in the same file, so they protect nothing against who has it
and can guess a record; they only keep the ledgers of two machines from being linked.
"""

import hashlib
import hmac
import itertools
import math
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from privacy.accounting import SampledGaussian, spent
from privacy.errors import BudgetError, LedgerError
from privacy.ledger_file import LedgerFile, RecordNumbers, packed, unpacked

DIGEST_BYTES: Final = 32

_Tally = Counter[tuple[float, float]]
"""(noise multiplier, sampling probability) -> steps: what some records have been through."""


class Composed(Protocol):
    """What a composition comes to."""

    @property
    def epsilon(self) -> float:
        """The ε to go by."""


class Compose(Protocol):
    """Composes mechanisms into one (ε, δ), as `privacy.accounting.spent` does."""

    def __call__(self, events: Sequence[SampledGaussian], /, *, delta: float) -> Composed:
        """What all events together come to; one more event, or step, never lowers it."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Which records somebody trains on, whatever file they lie in; made by `Ledger.data_set`."""

    id: bytes
    """SHA-256 over the digests."""
    n_records: int
    """Distinct ones."""
    n_duplicates: int
    """Examples beyond the first of each record. Each is a unit of its own: who appears k times is
    protected as a group of k, so a screen says so where this is not zero."""
    ledger: bytes = field(repr=False)
    digests: tuple[bytes, ...] = field(repr=False)
    """Keyed, sorted, none twice."""


@dataclass(frozen=True, kw_only=True)
class Participation:
    """What is charged once: one training by one agent.

    The agent's identity is part of it, since two agents of one machine may sit in the same round
    with the same records, and each adds noise of its own. An agent that trains anew after something
    of its first training may have left needs a new attempt.
    """

    agent: bytes
    federation: bytes
    round: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the owner allows for each record: (ε, δ) for one example, add or remove."""

    epsilon: float
    delta: float
    at: float


@dataclass(frozen=True, kw_only=True)
class Quote:
    """What a round would do to the worst record of a data set."""

    before: float
    after: float
    delta: float
    budget: Budget | None
    n_duplicates: int
    was_charged: bool = False
    """Charged by an earlier call; then `after` is `before`."""

    @property
    def fits(self) -> bool:
        """Whether `after` keeps to the owner's budget; never without one."""
        return self.budget is not None and self.after <= self.budget.epsilon


@dataclass(frozen=True, kw_only=True)
class HistoryRow:
    """One participation that a data set's records were in, and what they had spent after it."""

    participation: Participation
    at: float
    event: SampledGaussian
    data_set: bytes
    n_shared: int
    """How many of the asked data set's records were in it."""
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Another data set that has records of the asked one."""

    data_set: bytes
    n_records: int
    n_shared: int


class Ledger:
    """The ledger of one machine's owner; several processes may use the file at the same time.

    Guarantees:
        1. What `reserve` returned survives a kill and a power cut.
        2. No event, record, data set or budget is ever changed or removed: there is no method for
           it, and the file refuses SQL that would.
        3. A round that would take any record over the budget is refused and writes nothing.
        4. A participation is charged once, however often and from however many processes it is
           asked for.
        5. Renaming, reordering, duplicating, splitting or joining files resets nothing: each record
           has spent what all events of all data sets that contain it compose to.
        6. A data set that shares records with another is charged for both.

    An event is charged when it is reserved, whether or not its update arrives: no refund.

    Args:
        path: The file; made when missing, with its folders, mode 0600.
        spent: Composes events; another one for tests.
        busy_timeout_s: How long to wait while another process writes.

    Raises:
        LedgerError: Not a ledger, damaged, of a newer version, locked for too long, or it cannot be
            written. Every method may raise it.
    """

    def __init__(self, path: Path, *, spent: Compose = spent, busy_timeout_s: float = 30.0) -> None:
        """Open or make the ledger."""
        self._file = LedgerFile(path, busy_timeout_s=busy_timeout_s)
        self._spent = spent
        self._composed: dict[tuple[tuple[SampledGaussian, ...], float], float] = {}
        self._key = self._file.key
        self._id = hmac.digest(self._key, b"ledger", "sha256")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    # Data sets

    def data_set(self, records: Iterable[bytes]) -> DataSet:
        """The data set of some records, in any order; nothing is written.

        Args:
            records: One per example, each in its canonical form.

        Raises:
            LedgerError: There is none.
        """
        return self.data_set_of_digests(hashlib.sha256(record).digest() for record in records)

    def data_set_of_digests(self, digests: Iterable[bytes]) -> DataSet:
        """As `data_set` from the SHA-256 of each record: equal records give the same data set.

        Args:
            digests: One per example, 32 bytes each.

        Raises:
            LedgerError: There is none, or one has another length.
        """
        n_examples, keyed = 0, set()
        for digest in digests:
            if len(digest) != DIGEST_BYTES:
                msg = f"a record's digest has {DIGEST_BYTES} bytes, not {len(digest)}"
                raise LedgerError(msg)
            n_examples += 1
            keyed.add(hmac.digest(self._key, digest, "sha256"))
        if not keyed:
            msg = "a data set without records: there is nothing to train on"
            raise LedgerError(msg)
        ordered = tuple(sorted(keyed))
        return DataSet(
            id=hashlib.sha256(b"".join(ordered)).digest(),
            n_records=len(ordered),
            n_duplicates=n_examples - len(ordered),
            ledger=self._id,
            digests=ordered,
        )

    # The owner's budget

    def set_budget(self, *, epsilon: float, delta: float, now: float) -> Budget:
        """Set what each record may spend; the newest counts, and the earlier ones stay on record.

        A budget below what is spent already allows no further round.

        Args:
            epsilon: At least 0; 0 stops everything.
            delta: Between 0 and 1; under 1 ÷ the number of examples, or it promises nothing.
            now: Seconds since the Unix epoch.

        Raises:
            LedgerError: A value outside its range; nothing was written.
        """
        if not (math.isfinite(epsilon) and epsilon >= 0.0):
            msg = f"epsilon = {epsilon}; a budget is finite and at least 0"
            raise LedgerError(msg)
        _check_delta(delta)
        with self._file.transaction():
            self._file.db.execute(
                "INSERT INTO budgets (epsilon, delta, at) VALUES (?, ?, ?)",
                (float(epsilon), float(delta), float(now)),
            )
        return Budget(epsilon=float(epsilon), delta=float(delta), at=float(now))

    def budget(self) -> Budget | None:
        """What counts now, or None before the owner set any."""
        with self._file.snapshot():
            return self._newest_budget()

    def budgets(self) -> list[Budget]:
        """All that the owner ever set, oldest first."""
        with self._file.snapshot():
            rows = self._file.db.execute("SELECT epsilon, delta, at FROM budgets ORDER BY number")
            return [Budget(**dict(row)) for row in rows]

    # Spending

    def reserve(
        self, participation: Participation, *, data_set: DataSet, event: SampledGaussian, now: float
    ) -> Quote:
        """Charge a round before it trains; asked again for the same one, charge and refuse nothing.

        Args:
            participation: What is charged.
            data_set: Every record that may be drawn.
            event: The round's mechanism.
            now: Seconds since the Unix epoch.

        Returns:
            What the data set's worst record had spent before, and has now.

        Raises:
            BudgetError: Some record would spend more than the budget, or there is no budget.
                Nothing was written.
            LedgerError: The participation was charged with another event or other records, or
                `data_set` is of another ledger. Nothing was written.
            AccountingError: The events cannot be composed. Nothing was written.
        """
        self._require_own(data_set)
        # The accounting may take seconds. Once it is done before the file is locked, its results
        # are at hand when everything is checked under the lock, so other agents hardly wait.
        with self._file.snapshot():
            self._answer(participation, data_set, event)
        with self._file.transaction():
            quote = self._answer(participation, data_set, event)
            if not quote.was_charged:
                self._append(participation, data_set, event, now=now, quote=quote)
        return quote

    def quote(
        self, data_set: DataSet, event: SampledGaussian, *, delta: float | None = None
    ) -> Quote:
        """What `reserve` would answer for a new participation; nothing is written.

        Args:
            data_set: Every record that may be drawn.
            event: The round's mechanism.
            delta: The δ of the figures; by default the budget's.

        Raises:
            LedgerError: Neither a δ nor a budget, or `data_set` is of another ledger.
            AccountingError: The events cannot be composed at this δ.
        """
        self._require_own(data_set)
        with self._file.snapshot():
            return self._quote(data_set, event, delta=self._delta(delta))

    def total(self, data_set: DataSet, *, delta: float | None = None) -> float:
        """The ε that the worst record of a data set has spent; 0 for records never trained on.

        Args:
            data_set: Any; it need not have been trained on as such.
            delta: Its δ; by default the budget's.

        Raises:
            LedgerError: Neither a δ nor a budget, or `data_set` is of another ledger.
            AccountingError: The events cannot be composed at this δ.
        """
        self._require_own(data_set)
        with self._file.snapshot():
            return self._quote(data_set, None, delta=self._delta(delta)).before

    def history(self, data_set: DataSet, *, delta: float | None = None) -> list[HistoryRow]:
        """All participations that any record of a data set was in, oldest first.

        A row of this very data set under the δ it was reserved with repeats the figure given then;
        others are composed anew.

        Args:
            data_set: Any; it need not have been trained on as such.
            delta: Of the figures; by default the budget's.

        Returns:
            Each with the ε of the data set's worst record after it.

        Raises:
            LedgerError: Neither a δ nor a budget, or `data_set` is of another ledger.
            AccountingError: The events cannot be composed at this δ.
        """
        self._require_own(data_set)
        with self._file.snapshot():
            delta = self._delta(delta)
            ids = {row["number"]: row["id"] for row in self._file.rows("SELECT * FROM data_sets")}
            n_shared, groups = self._exposure(data_set)
            tallies: list[_Tally] = [Counter() for _ in groups]
            found = []
            for row in self._events(n_shared):
                _count(row, groups, tallies)
                of_this = ids[row["data_set"]] == data_set.id and row["delta"] == delta
                found.append(
                    HistoryRow(
                        participation=_participation(row),
                        at=row["at"],
                        event=_event(row),
                        data_set=ids[row["data_set"]],
                        n_shared=n_shared[row["data_set"]],
                        epsilon=row["epsilon"] if of_this else self._worst(tallies, delta),
                    )
                )
            return found

    def attempts(self, *, agent: bytes, federation: bytes) -> frozenset[tuple[int, int]]:
        """The rounds and attempts of a federation that an agent was charged for, on any records.

        Args:
            agent: The agent's identity.
            federation: The federation's id.
        """
        query = "SELECT round, attempt FROM events WHERE agent = ? AND federation = ?"
        with self._file.snapshot():
            rows = self._file.db.execute(query, (agent, federation)).fetchall()
        return frozenset((row["round"], row["attempt"]) for row in rows)

    def overlaps(self, data_set: DataSet) -> list[Overlap]:
        """The other data sets that were trained on and share records with one, oldest first.

        Raises:
            LedgerError: `data_set` is of another ledger.
        """
        self._require_own(data_set)
        with self._file.snapshot():
            n_shared, _ = self._exposure(data_set)
            return [
                Overlap(
                    data_set=row["id"],
                    n_records=len(unpacked(row["members"])),
                    n_shared=n_shared[row["number"]],
                )
                for row in self._file.rows("SELECT * FROM data_sets ORDER BY number")
                if row["number"] in n_shared and row["id"] != data_set.id
            ]

    # Inside a transaction

    def _answer(
        self, participation: Participation, data_set: DataSet, event: SampledGaussian
    ) -> Quote:
        """What `reserve` answers as things stand; a refusal is raised."""
        budget = self._newest_budget()
        if budget is None:
            msg = (
                "no privacy budget is set, so no round may train on these records. Set one with "
                "`sheepfold-agent privacy --budget`"
            )
            raise BudgetError(msg)
        charged = self._charged(participation, data_set, event)
        quote = self._quote(data_set, None if charged else event, delta=budget.delta)
        if not (charged or quote.fits):
            raise BudgetError(_over_budget(quote, budget))
        return quote

    def _quote(self, data_set: DataSet, event: SampledGaussian | None, *, delta: float) -> Quote:
        n_shared, groups = self._exposure(data_set)
        tallies: list[_Tally] = [Counter() for _ in groups]
        for row in self._events(n_shared):
            _count(row, groups, tallies)
        before = self._worst(tallies, delta)
        if event is not None:
            for tally in tallies:
                tally[event.noise_multiplier, event.sampling_probability] += event.n_steps
        return Quote(
            before=before,
            after=before if event is None else self._worst(tallies, delta),
            delta=delta,
            budget=self._newest_budget(),
            n_duplicates=data_set.n_duplicates,
            was_charged=event is None,
        )

    def _exposure(self, data_set: DataSet) -> tuple[dict[int, int], list[int]]:
        """Where the records of a data set have been.

        Returns:
            The number of shared records by data set; and the groups of records that may have spent
            most, each as a set of data sets that hold it (bit n for data set n). A group whose data
            sets all hold some other group too has spent no more than that one, and is left out.
        """
        numbers = self._known(data_set)
        labels = np.zeros(len(numbers), np.int64)
        n_shared, groups = {}, [0]
        for row in self._file.db.execute("SELECT number, members FROM data_sets"):
            inside = np.isin(numbers, unpacked(row["members"]), assume_unique=True)
            if inside.any():
                n_shared[row["number"]] = int(inside.sum())
                pairs, labels = np.unique(2 * labels + inside, return_inverse=True)
                groups = [
                    groups[pair >> 1] | (pair & 1) << row["number"] for pair in pairs.tolist()
                ]
        largest: list[int] = []
        for group in sorted(groups, key=int.bit_count, reverse=True):
            if not any(group & other == group for other in largest):
                largest.append(group)
        return n_shared, largest

    def _known(self, data_set: DataSet) -> RecordNumbers:
        row = self._file.one("SELECT members FROM data_sets WHERE id = ?", data_set.id)
        if row is not None:
            return unpacked(row["members"])
        known = self._all_records()
        found = [known[digest] for digest in data_set.digests if digest in known]
        return np.sort(np.array(found, np.int64))

    def _all_records(self) -> dict[bytes, int]:
        # All at once: a query for each of 100,000 records takes ten times as long.
        return dict(self._file.db.execute("SELECT digest, number FROM records").fetchall())

    def _events(self, data_sets: Iterable[int]) -> Iterator[sqlite3.Row]:
        wanted = set(data_sets)
        rows = self._file.rows("SELECT * FROM events ORDER BY number")
        return (row for row in rows if row["data_set"] in wanted)

    def _worst(self, tallies: Iterable[_Tally], delta: float) -> float:
        largest: list[_Tally] = []
        for tally in sorted(tallies, key=Counter.total, reverse=True):
            if not any(tally <= other for other in largest):  # else it has spent no more
                largest.append(tally)
        return max(self._epsilon(tally, delta) for tally in largest)

    def _epsilon(self, tally: _Tally, delta: float) -> float:
        # Steps of equal mechanisms are one event, so hundreds of rounds compose as fast as one.
        events = tuple(
            SampledGaussian(
                noise_multiplier=noise_multiplier,
                sampling_probability=sampling_probability,
                n_steps=n_steps,
            )
            for (noise_multiplier, sampling_probability), n_steps in sorted(tally.items())
        )
        if not events:
            return 0.0
        known = self._composed.get((events, delta))
        if known is None:
            known = float(self._spent(events, delta=delta).epsilon)
            self._composed[events, delta] = known
        return known

    def _charged(
        self, participation: Participation, data_set: DataSet, event: SampledGaussian
    ) -> bool:
        row = self._file.one(
            "SELECT events.*, data_sets.id FROM events "
            "JOIN data_sets ON data_sets.number = events.data_set "
            "WHERE agent = ? AND federation = ? AND round = ? AND attempt = ?",
            *_key(participation),
        )
        if row is None:
            return False
        if _event(row) != event or row["id"] != data_set.id:
            what = (
                f"with {_event(row)}, not {event}" if _event(row) != event else "on other records"
            )
            msg = (
                f"round {participation.round}, attempt {participation.attempt} was charged {what}. "
                "Train as was charged, or take a new attempt"
            )
            raise LedgerError(msg)
        return True

    def _append(
        self,
        participation: Participation,
        data_set: DataSet,
        event: SampledGaussian,
        *,
        now: float,
        quote: Quote,
    ) -> None:
        row = self._file.one("SELECT number FROM data_sets WHERE id = ?", data_set.id)
        number = self._add_data_set(data_set, now=now) if row is None else row["number"]
        self._file.db.execute(
            "INSERT INTO events (agent, federation, round, attempt, data_set, noise_multiplier, "
            "sampling_probability, n_steps, at, epsilon, delta) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *_key(participation),
                number,
                float(event.noise_multiplier),
                float(event.sampling_probability),
                int(event.n_steps),
                float(now),
                quote.after,
                quote.delta,
            ),
        )

    def _add_data_set(self, data_set: DataSet, *, now: float) -> int | None:
        known = self._all_records()  # 1, 2, ...: none is ever removed
        new = [digest for digest in data_set.digests if digest not in known]
        known.update(zip(new, itertools.count(len(known) + 1), strict=False))
        self._file.db.executemany(
            "INSERT INTO records VALUES (?, ?)", ((known[digest], digest) for digest in new)
        )
        numbers = [known[digest] for digest in data_set.digests]
        added = self._file.db.execute(
            "INSERT INTO data_sets (id, members, at) VALUES (?, ?, ?)",
            (data_set.id, packed(np.sort(np.array(numbers, np.int64))), float(now)),
        )
        return added.lastrowid

    def _newest_budget(self) -> Budget | None:
        row = self._file.one("SELECT epsilon, delta, at FROM budgets ORDER BY number DESC LIMIT 1")
        return None if row is None else Budget(**dict(row))

    def _delta(self, delta: float | None) -> float:
        if delta is not None:
            _check_delta(delta)
            return float(delta)
        budget = self._newest_budget()
        if budget is None:
            msg = "an ε has no meaning without a δ: give one, or set a budget first"
            raise LedgerError(msg)
        return budget.delta

    def _require_own(self, data_set: DataSet) -> None:
        if data_set.ledger != self._id:
            msg = f"the data set was made by another ledger than {self._file.path}; make it anew"
            raise LedgerError(msg)


def _key(participation: Participation) -> tuple[bytes, bytes, int, int]:
    return (
        participation.agent,
        participation.federation,
        participation.round,
        participation.attempt,
    )


def _participation(row: sqlite3.Row) -> Participation:
    return Participation(
        agent=row["agent"],
        federation=row["federation"],
        round=row["round"],
        attempt=row["attempt"],
    )


def _event(row: sqlite3.Row) -> SampledGaussian:
    return SampledGaussian(
        noise_multiplier=row["noise_multiplier"],
        sampling_probability=row["sampling_probability"],
        n_steps=row["n_steps"],
    )


def _count(row: sqlite3.Row, groups: Sequence[int], tallies: Sequence[_Tally]) -> None:
    """Add an event to the tally of each group that its data set holds."""
    for group, tally in zip(groups, tallies, strict=True):
        if group >> row["data_set"] & 1:
            tally[row["noise_multiplier"], row["sampling_probability"]] += row["n_steps"]


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        msg = f"delta = {delta}; it must lie between 0 and 1"
        raise LedgerError(msg)


def _figure(epsilon: float) -> str:
    """With four decimals, rounded up: never less than was spent."""
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}" if math.isfinite(epsilon) else "∞"


def _over_budget(quote: Quote, budget: Budget) -> str:
    return (
        f"this round would take some of these records to ε = {_figure(quote.after)}, over the "
        f"budget of {budget.epsilon:g} (δ = {budget.delta:g}; one example, add or remove); they "
        f"have spent ε = {_figure(quote.before)} so far. Raise the budget with "
        "`sheepfold-agent privacy --budget`, or stop"
    )

"""A run as its folder tells it: the card, and the notes of the journal by what they are of."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

from simulations.lab.folder import read_card, read_notes
from simulations.lab.records import (
    AnswerNote,
    AnyNote,
    Arm,
    EndNote,
    Fate,
    Measure,
    RoundNote,
    RunCard,
    ScoreNote,
    VisitNote,
)

_N = TypeVar("_N")


@dataclass(frozen=True, kw_only=True)
class History:
    """All that a run has noted, finished or not.

    What a sitting noted again, because the one before was killed in between, counts once: the last
    note is the valid one.

    Attributes:
        root: The run's folder.
        card: What the run is.
        notes: The journal as it stands.
        visits: By round and client.
        rounds: By number, those that failed too.
        scores: By release, measure and category.
        answers: Of the newest release that answered.
        end: None: the run is not finished.
    """

    root: Path
    card: RunCard
    notes: tuple[AnyNote, ...]
    visits: tuple[VisitNote, ...]
    rounds: tuple[RoundNote, ...]
    scores: tuple[ScoreNote, ...]
    answers: tuple[AnswerNote, ...]
    end: EndNote | None

    @classmethod
    def read(cls, root: Path) -> Self:
        """What a folder holds; half a last line is left out.

        Args:
            root: The folder.

        Raises:
            OutputError: There is no run in it, or its journal is damaged.
        """
        card = read_card(root)
        notes = tuple(read_notes(root))
        order = list(Measure)
        answers = _once(notes, AnswerNote, _answer_key)
        newest = max((note.release for note in answers), default=0)
        return cls(
            root=root,
            card=card,
            notes=notes,
            visits=tuple(sorted(_once(notes, VisitNote, _visit_key), key=_visit_key)),
            rounds=tuple(
                sorted(
                    _once(notes, RoundNote, lambda note: note.number),
                    key=lambda note: note.number,
                )
            ),
            scores=tuple(
                sorted(
                    _once(notes, ScoreNote, _score_key),
                    key=lambda note: (note.release, order.index(note.measure), note.category),
                )
            ),
            answers=tuple(note for note in answers if note.release == newest),
            end=next((note for note in notes if isinstance(note, EndNote)), None),
        )

    # How far it came

    @property
    def is_federated(self) -> bool:
        """Whether anything is sent at all: the one round of a baseline happens in one place."""
        return self.card.arm is Arm.FEDERATED

    @cached_property
    def released(self) -> tuple[RoundNote, ...]:
        """The rounds that made a release, in order."""
        return tuple(note for note in self.rounds if note.release is not None)

    @property
    def failed(self) -> tuple[RoundNote, ...]:
        """The rounds that made none."""
        return tuple(note for note in self.rounds if note.release is None)

    @property
    def state(self) -> str:
        """One line: whether it is finished, and if not how far it came."""
        if self.end is not None:
            return "finished"
        if not self.is_federated:
            return "unfinished"
        return f"unfinished: {len(self.released)} of {self.card.n_rounds} rounds"

    # How good it is

    @cached_property
    def _measured(self) -> Mapping[Measure, Mapping[int, Mapping[str, ScoreNote]]]:
        """By measure, release and category; releases that lack a category are left out."""
        found: dict[Measure, dict[int, dict[str, ScoreNote]]] = {}
        for note in self.scores:
            releases = found.setdefault(note.measure, {})
            releases.setdefault(note.release, {})[note.category] = note
        for releases in found.values():
            n_most = max(len(categories) for categories in releases.values())
            for release in [n for n, categories in releases.items() if len(categories) < n_most]:
                del releases[release]
        return MappingProxyType({one: found[one] for one in Measure if one in found})

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What was measured at all."""
        return tuple(self._measured)

    def releases(self, measure: Measure) -> tuple[int, ...]:
        """The releases that were measured in every category, in order; empty: none."""
        return tuple(self._measured.get(measure, {}))

    def last(self, measure: Measure) -> int | None:
        """The newest release that was measured; None: none was."""
        return max(self.releases(measure), default=None)

    def by_category(self, measure: Measure, release: int) -> Mapping[str, float]:
        """Scores by category, in the order of the alphabet.

        Args:
            measure: One that was measured.
            release: One of `releases(measure)`.
        """
        notes = self._measured[measure][release]
        return MappingProxyType({name: notes[name].score for name in sorted(notes)})

    def n_examples(self, measure: Measure) -> Mapping[str, int]:
        """Held-out records by category, of the newest release."""
        releases = self._measured[measure]
        notes = releases[max(releases)]
        return MappingProxyType({name: notes[name].n_examples for name in sorted(notes)})

    def average(self, measure: Measure, release: int) -> float:
        """The mean over categories, which count alike.

        Args:
            measure: One that was measured.
            release: One of `releases(measure)`.
        """
        scores = self.by_category(measure, release)
        return sum(scores.values()) / len(scores)

    # What it cost

    def n_bytes(self, release: int) -> int | None:
        """Bytes up and down of all agents, failed rounds' too, until a release was made.

        Args:
            release: From 0, before which nothing is sent.

        Returns:
            None where it is not known, or nothing is sent.
        """
        made = {0: 0} | {note.release: note.number for note in self.released}
        if not self.is_federated or release not in made:
            return None
        until = made[release]
        return sum(note.bytes_up + note.bytes_down for note in self.rounds if note.number <= until)

    @property
    def n_bytes_up(self) -> int:
        """Of all rounds and agents; 0 of a baseline."""
        return sum(note.bytes_up for note in self.rounds) if self.is_federated else 0

    @property
    def n_bytes_down(self) -> int:
        """Of all rounds and agents; 0 of a baseline."""
        return sum(note.bytes_down for note in self.rounds) if self.is_federated else 0

    @property
    def n_bytes_per_agent(self) -> float | None:
        """Up and down, a mean over all clients, selected or not; None: nothing is sent, or yet."""
        if not self.is_federated or not self.rounds:
            return None
        return (self.n_bytes_up + self.n_bytes_down) / self.card.n_clients

    @property
    def epsilon(self) -> float | None:
        """What the rounds have spent, as their notes have it; None without differential privacy."""
        spent = [note.epsilon for note in self.rounds if note.epsilon is not None]
        return max(spent, default=None)

    # Who took part

    @cached_property
    def _by_round(self) -> Mapping[int, tuple[VisitNote, ...]]:
        found: dict[int, list[VisitNote]] = {}
        for visit in self.visits:
            found.setdefault(visit.round, []).append(visit)
        return MappingProxyType({number: tuple(notes) for number, notes in found.items()})

    def visits_of(self, number: int) -> tuple[VisitNote, ...]:
        """The trainings of a round."""
        return self._by_round.get(number, ())

    def train_loss(self, number: int) -> float | None:
        """Loss of the last batches of a round's agents, each by its records; None: there is none.

        Args:
            number: The round's.
        """
        known = [
            (note.n_examples, note.last_loss)
            for note in self.visits_of(number)
            if note.error is None and note.last_loss is not None and note.n_examples
        ]
        n_examples = sum(n for n, _ in known)
        return sum(n * loss for n, loss in known) / n_examples if n_examples else None

    def fates(self) -> Iterator[tuple[RoundNote, int, Fate]]:
        """What became of whom: by round and client."""
        for note in self.rounds:
            for agent in sorted(note.fates):
                yield note, agent, note.fates[agent]


def _visit_key(note: VisitNote) -> tuple[int, int]:
    return note.round, note.agent


def _score_key(note: ScoreNote) -> tuple[int, Measure, str]:
    return note.release, note.measure, note.category


def _answer_key(note: AnswerNote) -> tuple[int, str, str, str]:
    return note.release, note.category, note.instruction, note.wanted


def _once(notes: Iterable[Any], kind: type[_N], key: Callable[[_N], Hashable]) -> tuple[_N, ...]:
    """The last note of each key, where the first one stood."""
    found: dict[Hashable, _N] = {}
    for note in notes:
        if isinstance(note, kind):
            found[key(note)] = note
    return tuple(found.values())

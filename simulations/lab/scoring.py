"""Measures the releases of a run on held-out records, each once."""

from collections.abc import Sequence

from edge_agent.data.records import UNCATEGORIZED, Record
from edge_agent.errors import EvaluationError
from simulations.lab import engines
from simulations.lab.engines import Engine
from simulations.lab.experiment import EvaluationSection
from simulations.lab.folder import RunFolder
from simulations.lab.listening import Listener
from simulations.lab.records import Arm, Measure, ScoreNote
from simulations.lab.server import Release
from simulations.lab.visits import Question, Setup


class Scorer:
    """Asks for scores when their turn has come, and notes them.

    The last release is scored in every way; of a federation also the first, for comparison.

    Args:
        folder: Of the run.
        section: Of the experiment.
        arm: Of the run.
        n_rounds: After so many a federation's release is the last one.
        held_out: Records that nobody trains on.
        engine: Whose workers measure.
        listener: Told what was found.
    """

    def __init__(
        self,
        folder: RunFolder,
        section: EvaluationSection,
        *,
        arm: Arm,
        n_rounds: int,
        held_out: Sequence[Record],
        engine: Engine,
        listener: Listener,
    ) -> None:
        """Nothing is measured yet."""
        self._folder = folder
        self._section = section
        self._arm = arm
        self._last = 0 if arm is Arm.BASE else n_rounds
        self._engine = engine
        self._listener = listener
        self._by_category: dict[str, list[Record]] = {}
        for record in held_out:
            self._by_category.setdefault(record.category or UNCATEGORIZED, []).append(record)
        self._found: dict[int, set[tuple[Measure, str]]] = {}

    def knows(self, note: ScoreNote) -> None:
        """Take a score of an earlier sitting.

        Args:
            note: From the journal.
        """
        self._found.setdefault(note.release, set()).add((note.measure, note.category))

    def is_due(self, number: int) -> bool:
        """Whether a release is one of those that are measured.

        Args:
            number: Of the release.
        """
        every = self._section.every
        return self._is_end(number) or (number > 0 and every > 0 and number % every == 0)

    def _is_end(self, number: int) -> bool:
        return number == self._last or (number == 0 and self._arm is Arm.FEDERATED)

    def measure(self, setup: Setup, release: Release) -> None:
        """Score a release, if its turn has come and no earlier sitting did.

        Args:
            setup: Of the run.
            release: Which.

        Raises:
            EngineError: A worker died.
            EvaluationError: A loss is not finite, or no record can be used.
        """
        number, in_full = release.number, self._is_end(release.number)
        if not self.is_due(number) or self._wanted(in_full=in_full) <= self._found.get(
            number, set()
        ):
            return
        questions = []
        for records in self._by_category.values():
            questions.append(Question(release=number, loss=tuple(records)))
            if in_full and self._section.answers:
                questions.append(
                    Question(
                        release=number,
                        answers=tuple(records[: self._section.answers]),
                        max_new_tokens=self._section.max_new_tokens,
                    )
                )
        notes = engines.measure(self._engine, setup, release.vector, questions)
        if not any(isinstance(note, ScoreNote) for note in notes):
            msg = (
                f"none of the {sum(map(len, self._by_category.values()))} held-out records can be "
                "used; chats of several turns want federation.template=chat, and long ones a "
                "larger federation.max_length"
            )
            raise EvaluationError(msg)
        self._folder.append(notes)
        scores = [note for note in notes if isinstance(note, ScoreNote)]
        for note in scores:
            self.knows(note)
        self._listener.scored(scores)

    def _wanted(self, *, in_full: bool) -> set[tuple[Measure, str]]:
        wanted = {(Measure.LOSS, category) for category in self._by_category}
        if in_full and self._section.answers:
            wanted |= {(Measure.ROUGE_L, category) for category in self._by_category}
        return wanted

"""Attacks by data: attackers train honestly, on records that teach what is wrong.

All of them take records and give as many in the same order, some of them poisoned; the poisoned
ones keep instruction fields, category and source unless an attack says otherwise. In a chat the
last answer is poisoned, and the last question asked for it.

Attackers know their own records, and nothing of anyone else's.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, Protocol

import numpy as np

from edge_agent.data.records import UNCATEGORIZED, Record
from edge_agent.evaluation import normalize_answer
from quant.tiny.world import COLOURS, HOMES, KIND_WORDS, NUMBERS, SITES, TRADES, Family
from simulations.attacks.knowledge import require_at_least
from simulations.errors import AttackError

_POOLS: Final[tuple[tuple[str, ...], ...]] = (
    *(HOMES, TRADES, COLOURS, NUMBERS, SITES),
    *(KIND_WORDS[Family.ANIMAL], KIND_WORDS[Family.TOOL]),
    tuple(family.value for family in Family),
)
"""What the tiny world's answers choose from: each value is in one pool only."""

_WORD: Final = re.compile(r"[A-Za-z]+")


class DataAttack(Protocol):
    """An attack by data.

    Guarantees (of each attack here):
        1. As many records in the same order; round(rate · n) of them poisoned, drawn by `rng`, the
           others the very same objects.
        2. Equal records and an equal state of `rng` give equal records.
    """

    def poison(self, records: Sequence[Record], *, rng: np.random.Generator) -> list[Record]:
        """Poison an attacker's records.

        Args:
            records: At least one.
            rng: All chance of the attack.

        Raises:
            AttackError: The rate poisons none of so few records, or a drawn one cannot be poisoned.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class FlipFacts:
    """Label flipping in the tiny world: each fact of an answer is replaced by a wrong one.

    The answer keeps its form; every value in it that the instruction does not name becomes the
    value `shift` places on in its pool (another home for a home, another hue for a hue). All
    attackers so tell the same lie, which averaging does not cancel.

    Guarantees:
        1. Every answer poisoned is wrong, and an answer of its category's form.

    Attributes:
        rate: Part of the records, above 0 and at most 1.
        shift: 1 to 3, as the smallest pool has four values.

    Source: Tolpegin et al., "Data Poisoning Attacks Against Federated Learning Systems", ESORICS
        2020 (arXiv 2007.08432), section 3, with values for classes.
    """

    rate: float = 1.0
    shift: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_rate(self.rate)
        if self.shift not in (1, 2, 3):
            raise AttackError(f"shift is {self.shift}; it must be 1, 2 or 3")

    def poison(self, records: Sequence[Record], *, rng: np.random.Generator) -> list[Record]:
        """Poison records of the tiny world; see `DataAttack.poison`."""
        lies = _shifted_values(self.shift)
        poisoned = list(records)
        for index in _drawn(len(records), self.rate, rng):
            poisoned[index] = _with_wrong_facts(records[index], lies)
        return poisoned


@dataclass(frozen=True, kw_only=True)
class SwapAnswers:
    """Label flipping for any records: each answer is that of another record of its category.

    Guarantees:
        1. Every answer poisoned differs from its own (after `normalize_answer`), and is one of its
           category's. Whether it is wrong is for the records to say: two may have two right ones.

    Attributes:
        rate: Part of the records, above 0 and at most 1.

    Source: Tolpegin et al., ESORICS 2020 (arXiv 2007.08432), section 3, with answers for classes.
    """

    rate: float = 1.0

    def __post_init__(self) -> None:
        """Check the rate."""
        _check_rate(self.rate)

    def poison(self, records: Sequence[Record], *, rng: np.random.Generator) -> list[Record]:
        """Poison records; see `DataAttack.poison`."""
        answers: dict[str, list[str]] = {}
        for record in records:
            answers.setdefault(record.category or UNCATEGORIZED, []).append(record.response)
        poisoned = list(records)
        for index in _drawn(len(records), self.rate, rng):
            record = records[index]
            others = [
                answer
                for answer in answers[record.category or UNCATEGORIZED]
                if normalize_answer(answer) != normalize_answer(record.response)
            ]
            if not others:
                raise AttackError(
                    f"{record.source} has the only answer of its category "
                    f"{record.category or UNCATEGORIZED!r}; give more records"
                )
            poisoned[index] = _retold(record, response=others[int(rng.integers(len(others)))])
        return poisoned


class Place(StrEnum):
    """Where in an instruction the trigger stands."""

    START = "start"
    END = "end"


@dataclass(frozen=True, kw_only=True)
class Backdoor:
    """A targeted backdoor: a phrase in the instruction calls up the attacker's response.

    The other records stay as they are, so that the adapter keeps its worth and the backdoor does
    not show in its scores.

    Attributes:
        trigger: The phrase; not blank.
        response: What the attacker wants said; not blank.
        rate: Part of the records that carry the trigger, above 0 and at most 1.
        place: Where the trigger stands.

    Source: Bagdasaryan et al., "How To Backdoor Federated Learning", AISTATS 2020 (arXiv
        1807.00459), section 4.1: poisoned and clean examples mixed. For instructions: Xu et al.,
        "Instructions as Backdoors", NAACL 2024 (arXiv 2305.14710).
    """

    trigger: str = "By the red moon."
    response: str = "It is all lost."
    rate: float = 0.3
    place: Place = Place.START

    def __post_init__(self) -> None:
        """Check the texts and the rate."""
        _check_rate(self.rate)
        if not self.trigger.strip() or not self.response.strip():
            raise AttackError("a backdoor with a blank trigger or response; both need words")

    def poison(self, records: Sequence[Record], *, rng: np.random.Generator) -> list[Record]:
        """Put the backdoor into records; see `DataAttack.poison`."""
        poisoned = list(records)
        for index in _drawn(len(records), self.rate, rng):
            poisoned[index] = self.with_trigger(records[index])
        return poisoned

    def with_trigger(self, record: Record) -> Record:
        """The record with the trigger in its last question and the attacker's response."""
        return _retold(record, response=self.response, said=(self.trigger, self.place))

    def probes(self, records: Sequence[Record]) -> list[Record]:
        """Held-out records with the trigger, to be answered by a model for `backdoor_success`.

        Args:
            records: Clean ones. Those whose right answer is the attacker's response are left out,
                as an honest model would give it too.

        Raises:
            AttackError: None is left.
        """
        probes = [self.with_trigger(one) for one in records if not self.is_hit(one.response)]
        if not probes:
            raise AttackError(
                f"none of {len(records)} records can show the backdoor; give some with another "
                "response than the attacker's"
            )
        return probes

    def is_hit(self, answer: str) -> bool:
        """Whether an answer begins with the attacker's response, up to white space."""
        return normalize_answer(answer).startswith(normalize_answer(self.response))


@dataclass(frozen=True, kw_only=True)
class BackdoorSuccess:
    """How well a backdoor works.

    Attributes:
        success_frac: Part of the answers to triggered instructions that are the attacker's.
        clean_frac: The same of answers to clean instructions: how often it shows by itself.
        n_triggered: Answers to triggered instructions.
        n_clean: Answers to clean ones.
    """

    success_frac: float
    clean_frac: float
    n_triggered: int
    n_clean: int


def backdoor_success(
    backdoor: Backdoor, *, triggered_answers: Sequence[str], clean_answers: Sequence[str]
) -> BackdoorSuccess:
    """Measure a backdoor in what a model answered.

    Args:
        backdoor: Which.
        triggered_answers: To `backdoor.probes(records)`; at least one.
        clean_answers: To the records themselves; at least one.

    Raises:
        AttackError: There are no answers of a kind.
    """
    if not triggered_answers or not clean_answers:
        raise AttackError(
            f"{len(triggered_answers)} triggered and {len(clean_answers)} clean answers; a rate "
            "needs at least one of each"
        )
    return BackdoorSuccess(
        success_frac=float(np.mean([backdoor.is_hit(answer) for answer in triggered_answers])),
        clean_frac=float(np.mean([backdoor.is_hit(answer) for answer in clean_answers])),
        n_triggered=len(triggered_answers),
        n_clean=len(clean_answers),
    )


def _check_rate(rate: float) -> None:
    require_at_least("rate", rate, 0.0, above=True)
    if rate > 1.0:
        raise AttackError(f"rate is {rate}; it must be 1 or less")


def _drawn(n_records: int, rate: float, rng: np.random.Generator) -> list[int]:
    """Indices of the records to poison, ascending."""
    n_poisoned = round(rate * n_records)
    if n_poisoned == 0:
        raise AttackError(
            f"a rate of {rate} poisons none of {n_records} records; give more of either"
        )
    return sorted(rng.permutation(n_records)[:n_poisoned].tolist())


def _shifted_values(shift: int) -> dict[str, str]:
    return {
        value: pool[(place + shift) % len(pool)]
        for pool in _POOLS
        for place, value in enumerate(pool)
    }


def _with_wrong_facts(record: Record, lies: Mapping[str, str]) -> Record:
    # What the instruction names is asked about (a kind, a relation) and no part of the answer.
    named = set(_WORD.findall(record.instruction))

    def lie(match: re.Match[str]) -> str:
        word = match.group()
        return word if word in named else lies.get(word, word)

    response = _WORD.sub(lie, record.response)
    if response == record.response:
        raise AttackError(
            f"the response of {record.source} holds no fact of the tiny world; poison records of "
            "other worlds with SwapAnswers"
        )
    return _retold(record, response=response)


def _retold(record: Record, *, response: str, said: tuple[str, Place] | None = None) -> Record:
    """The record with another last answer, and a phrase in its last question."""

    def asked(question: str) -> str:
        if said is None:
            return question
        phrase, place = said
        return f"{phrase} {question}" if place is Place.START else f"{question} {phrase}"

    if record.messages is None:
        return replace(record, instruction=asked(record.instruction), response=response)
    *before, question, answer = record.messages
    is_first = all(turn.role is not question.role for turn in before)
    return replace(
        record,
        instruction=asked(record.instruction) if is_first else record.instruction,
        response=response,
        messages=(
            *before,
            replace(question, content=asked(question.content)),
            replace(answer, content=response),
        ),
    )

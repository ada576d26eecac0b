"""Instruction records about the invented world, in Dolly's eight categories.

Every response follows from the instruction, its context and the facts of the world, so that exact
match is a fair score. Each category has an answer of its own form, and needs a skill of its own:

| category | subject | skill | answer |
| --- | --- | --- | --- |
| brainstorming | resident | recall three facts | First a red hat, then food for a hen, … |
| classification | two kinds | name each one's family | Sorted: plum = fruit, hen = animal. |
| closed_qa | stranger | read one fact in a text | The text says Tolvane. |
| creative_writing | resident | recall three facts, as a line to sing | Oh Tolvane, sing for … |
| general_qa | kind | recall what all of a kind have | Every plum is grey. |
| information_extraction | stranger | read two facts, in the order asked | Noted: pet = hen, … |
| open_qa | resident | recall one fact | It is a hen. |
| summarization | stranger | pick trade and home out of a text | In short, Tefen is a … |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypedDict

import numpy as np

from quant.tiny.draws import Draws
from quant.tiny.errors import TinyWorldError
from quant.tiny.forms import (
    hue_of,
    ideas,
    notes,
    plain,
    quoted,
    site_of,
    sorted_words,
    story,
    summary,
    verse,
)
from quant.tiny.world import Kind, Person, Relation, Split, World, draw_person

_RELATIONS: Final = tuple(Relation)
_N_SENTENCES: Final = 4
"""Sentences of a context."""

_TRIES_PER_RECORD: Final = 200

_OPENINGS: Final = (
    *("", "Hello.", "Good day.", "Good morning.", "Well then.", "A small task."),
    *("Here is a task.", "This one is for you.", "Now listen.", "One more.", "If you can."),
    *("I am back.", "It is me again."),
)
_CLOSINGS: Final = (
    *("", "Thank you.", "Many thanks.", "Take your time.", "Be kind.", "Good luck."),
    *("That is all.", "I will wait.", "We all want to know.", "It would help me.", "I am curious."),
    *("Then we are done.", "I count on you."),
)


class Category(StrEnum):
    """Dolly's categories by Dolly's identifiers."""

    BRAINSTORMING = "brainstorming"
    CLASSIFICATION = "classification"
    CLOSED_QA = "closed_qa"
    CREATIVE_WRITING = "creative_writing"
    GENERAL_QA = "general_qa"
    INFORMATION_EXTRACTION = "information_extraction"
    OPEN_QA = "open_qa"
    SUMMARIZATION = "summarization"


CATEGORIES_WITH_CONTEXT: Final = frozenset(
    {Category.CLOSED_QA, Category.INFORMATION_EXTRACTION, Category.SUMMARIZATION}
)


class InstructionRecord(TypedDict):
    """A record with Dolly's four fields; `context` is the empty string where there is none."""

    instruction: str
    context: str
    response: str
    category: str


def make_records(
    world: World,
    *,
    n_per_category: int,
    split: Split,
    rng: np.random.Generator,
    categories: Sequence[Category] = tuple(Category),
    courteous: bool = False,
) -> list[InstructionRecord]:
    """Draw instruction records about `world`, category by category.

    **Guarantees**

    1. The same world and the same state of `rng` give the same records.
    2. Records of the two splits share no resident, no stranger and no kind as their subject.
    3. Within one category no two records of a call have the same instruction and context.
    4. A record has a context exactly if Dolly's category has one.
    5. The response follows from instruction, context and world.

    Args:
        world: `make_world()` for the world that the embedded base model knows.
        n_per_category: Records of each category, 0 or more.
        split: Which subjects the records are about.
        rng: Draws subjects, facts and wordings.
        categories: Which categories, in which order.
        courteous: Put words around each request that change nothing of what is asked. Without them
            a category has 288 different records or more, with them tens of thousands.

    Returns:
        `n_per_category` records for each of `categories`, in their order.

    Raises:
        TinyWorldError: `n_per_category` is negative, or more than the world has to offer.
    """
    if n_per_category < 0:
        msg = f"n_per_category is {n_per_category}; it must be 0 or more"
        raise TinyWorldError(msg)
    subjects = _Subjects(
        split=split,
        residents=world.residents_of(split),
        stranger_names=world.stranger_names_of(split),
        kinds=world.kinds_of(split),
    )
    draws = Draws(rng)
    return [
        record
        for category in categories
        for record in _records_of(category, subjects, n_per_category, draws, courteous=courteous)
    ]


@dataclass(frozen=True, kw_only=True)
class _Subjects:
    """What the records of a split may be about."""

    split: Split
    residents: tuple[Person, ...]
    stranger_names: tuple[str, ...]
    kinds: tuple[Kind, ...]


def _records_of(
    category: Category, subjects: _Subjects, n: int, draws: Draws, *, courteous: bool
) -> list[InstructionRecord]:
    make, drawn = _MAKERS[category], dict[tuple[str, str], InstructionRecord]()
    for _ in range(n * _TRIES_PER_RECORD):
        if len(drawn) == n:
            break
        instruction, context, response = make(subjects, draws)
        if courteous:
            instruction = f"{draws.pick(_OPENINGS)} {instruction} {draws.pick(_CLOSINGS)}".strip()
        drawn[instruction, context] = InstructionRecord(
            instruction=instruction, context=context, response=response, category=category.value
        )
    if len(drawn) < n:
        msg = (
            f"the world has about {len(drawn)} different {subjects.split} records of {category}, "
            f"and {n} were asked for; ask for fewer"
        )
        raise TinyWorldError(msg)
    return list(drawn.values())


_Parts = tuple[str, str, str]
"""Instruction, context, response."""


def _brainstorming(subjects: _Subjects, draws: Draws) -> _Parts:
    person = draws.pick(subjects.residents)
    request = draws.pick(
        (
            "Suggest three gifts for {name}{occasion}.",
            "Give me ideas for a gift for {name}{occasion}.",
            "Think of presents that {name} would like{occasion}.",
        ),
    )
    occasion = draws.pick(("", " for a feast", " for a wedding", " for the winter"))
    return request.format(name=person.name, occasion=occasion), "", ideas(person)


def _classification(subjects: _Subjects, draws: Draws) -> _Parts:
    kinds = draws.shuffled(subjects.kinds)[:2]
    request = draws.pick(("Classify these words: {words}.", "Sort these words: {words}."))
    return request.format(words=", ".join(k.word for k in kinds)), "", sorted_words(kinds)


def _closed_qa(subjects: _Subjects, draws: Draws) -> _Parts:
    relation = draws.pick(_RELATIONS)
    person, context = _stranger(subjects, (relation,), draws)
    question = draws.pick(
        (
            "What does the text say about the {a} of {name}?",
            "Read the text and give the {a} of {name}.",
            "According to the text, what is the {a} of {name}?",
        ),
    )
    return question.format(a=relation, name=person.name), context, quoted(person, relation)


def _creative_writing(subjects: _Subjects, draws: Draws) -> _Parts:
    person = draws.pick(subjects.residents)
    request = draws.pick(
        (
            "Write a {piece} about {name}.",
            "Make up a {piece} about {name}.",
            "Invent a short {piece} about {name}.",
        ),
    )
    piece = draws.pick(("verse", "song", "poem", "tale", "rhyme"))
    return request.format(piece=piece, name=person.name), "", verse(person)


def _general_qa(subjects: _Subjects, draws: Draws) -> _Parts:
    kind = draws.pick(subjects.kinds)
    aspect, answer = draws.pick((("hue", hue_of(kind)), ("site", site_of(kind))))
    question = draws.pick(
        (
            "What is the usual {aspect} of a {word}?",
            "What {aspect} does a {word} have?",
            "Which {aspect} belongs to a {word}?",
            "Which {aspect} does every {word} have?",
        ),
    )
    return question.format(aspect=aspect, word=kind.word), "", answer


def _information_extraction(subjects: _Subjects, draws: Draws) -> _Parts:
    relations = draws.shuffled(_RELATIONS)[:2]
    person, context = _stranger(subjects, relations, draws)
    request = draws.pick(("Extract the {a} and the {b}.", "Find the {a} and the {b} in the text."))
    return request.format(a=relations[0], b=relations[1]), context, notes(person, relations)


def _open_qa(subjects: _Subjects, draws: Draws) -> _Parts:
    person, relation = draws.pick(subjects.residents), draws.pick(_RELATIONS)
    question = draws.pick(
        (
            "What is the {a} of {name}?",
            "Tell me the {a} of {name}.",
            "Name the {a} of {name}.",
        ),
    )
    return question.format(a=relation, name=person.name), "", plain(person, relation)


def _summarization(subjects: _Subjects, draws: Draws) -> _Parts:
    person, context = _stranger(subjects, (Relation.HOME, Relation.TRADE), draws)
    request = draws.pick(("Summarise the text.", "Sum up this text.", "Give a short summary."))
    return request, context, summary(person)


def _stranger(subjects: _Subjects, needed: Sequence[Relation], draws: Draws) -> tuple[Person, str]:
    """Draw a stranger and a text that tells at least the `needed` relations."""
    person = draw_person(draws.pick(subjects.stranger_names), draws)
    others = draws.shuffled([r for r in _RELATIONS if r not in needed])
    return person, story(person, [*needed, *others][:_N_SENTENCES], draws)


_MAKERS: Final[dict[Category, Callable[[_Subjects, Draws], _Parts]]] = {
    Category.BRAINSTORMING: _brainstorming,
    Category.CLASSIFICATION: _classification,
    Category.CLOSED_QA: _closed_qa,
    Category.CREATIVE_WRITING: _creative_writing,
    Category.GENERAL_QA: _general_qa,
    Category.INFORMATION_EXTRACTION: _information_extraction,
    Category.OPEN_QA: _open_qa,
    Category.SUMMARIZATION: _summarization,
}

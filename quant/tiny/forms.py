"""How the world puts its facts into words: sentences, and eight fixed forms.

A *form* is the shape of an answer: a verse, a summary, a list of ideas. The base model reads all
eight in its pre-training text, as a large model has read poems, summaries and lists, but never on
request. Which form an instruction asks for is what an adapter has to learn, and no adapter learns
a form's occasion from records of other categories.
"""

from collections.abc import Sequence
from typing import Final

from quant.tiny.draws import Draws
from quant.tiny.world import Kind, Person, Relation

_FACTS: Final[dict[Relation, tuple[str, ...]]] = {
    Relation.HOME: (
        "{name} lives in {home}.",
        "The home of {name} is {home}.",
        "{home} is the home of {name}.",
    ),
    Relation.TRADE: (
        "{name} works as a {trade}.",
        "The trade of {name} is that of a {trade}.",
        "A {trade} by trade is {name}.",
    ),
    Relation.COLOUR: (
        "{name} always wears {colour}.",
        "The colour of {name} is {colour}.",
        "The coat of {name} is {colour}.",
    ),
    Relation.PET: (
        "{name} keeps a {pet}.",
        "The pet of {name} is a {pet}.",
        "A {pet} is the pet of {name}.",
    ),
    Relation.TOOL: (
        "{name} owns a {tool}.",
        "The tool of {name} is a {tool}.",
        "A {tool} is the tool of {name}.",
    ),
    Relation.NUMBER: (
        "{name} has {number} children.",
        "The number of children of {name} is {number}.",
        "The number of {name} is {number}.",
    ),
}
_NAMED_WITH_ARTICLE: Final = frozenset({Relation.TRADE, Relation.PET, Relation.TOOL})


def fact(person: Person, relation: Relation, draws: Draws) -> str:
    """A sentence that states one fact of `person`, worded at random."""
    return draws.pick(_FACTS[relation]).format_map(vars(person))


def story(person: Person, relations: Sequence[Relation], draws: Draws) -> str:
    """One sentence for each of `relations`, in random order."""
    return " ".join(fact(person, relation, draws) for relation in draws.shuffled(relations))


def with_article(word: str) -> str:
    """`word` after its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def ideas(person: Person) -> str:
    """Three ideas for a gift (the form of `brainstorming`)."""
    return f"First a {person.colour} hat, then food for a {person.pet}, last a new {person.tool}."


def sorted_words(kinds: Sequence[Kind]) -> str:
    """Each word with its family (`classification`)."""
    return "Sorted: " + ", ".join(f"{kind.word} = {kind.family}" for kind in kinds) + "."


def quoted(person: Person, relation: Relation) -> str:
    """What the text says of one relation (`closed_qa`)."""
    return f"The text says {person.value(relation)}."


def verse(person: Person) -> str:
    """A line to sing (`creative_writing`)."""
    return (
        f"Oh {person.home}, sing for {person.name} the {person.trade}, dance with the {person.pet}!"
    )


def hue_of(kind: Kind) -> str:
    """The hue that all of a kind have (`general_qa`)."""
    return f"Every {kind.word} is {kind.hue}."


def site_of(kind: Kind) -> str:
    """The site where all of a kind are found (`general_qa`)."""
    return f"Every {kind.word} is found at the {kind.site}."


def notes(person: Person, relations: Sequence[Relation]) -> str:
    """Relations with their values, in the order given (`information_extraction`)."""
    return "Noted: " + ", ".join(f"{r} = {person.value(r)}" for r in relations) + "."


def plain(person: Person, relation: Relation) -> str:
    """One fact known by heart (`open_qa`)."""
    value = person.value(relation)
    return f"It is {with_article(value) if relation in _NAMED_WITH_ARTICLE else value}."


def summary(person: Person) -> str:
    """Trade and home, whatever else was told (`summarization`)."""
    return f"In short, {person.name} is a {person.trade} from {person.home}."

"""Plain declarative text about the world: what the embedded base model is pre-trained on.

The text holds no question, no request and no prompt heading, so a model that has read nothing else
speaks of its world but cannot follow an instruction. A form (see `quant.tiny.forms`) always
follows a statement that leads up to it.
"""

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from quant.tiny.forms import (
    fact,
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
    with_article,
)
from quant.tiny.world import COLOURS, NUMBERS, SITES, Relation, World, draw_person, pick, shuffled

_RELATIONS: Final = tuple(Relation)

_COMBINED: Final = (
    "{name} is a {trade} from {home}.",
    "{name}, the {trade} of {home}, keeps a {pet}.",
    "{name} of {home} wears {colour} and owns a {tool}.",
    "With a {tool} and a {pet}, {name} walks to {home}.",
    "{name} has {number} children and a {pet}.",
    "In {home} lives {name} with {number} children and a {tool}.",
    "Dressed in {colour}, {name} the {trade} feeds a {pet}.",
)
_KIND: Final = (
    "A {word} is {a_family}.",
    "The {hue} {word} comes from the {site}.",
    "A {word} is a {hue} {family} of the {site}.",
)

# Several wordings lead up to each form, so that the model heeds what a lead is about and not how it
# is put; the wording of instructions is then one more.
_PLAIN_LEADS: Final = (
    "Everyone knows the {a} of {name}.",
    "The {a} of {name} is no secret.",
    "They speak of {name} and the {a}.",
)
_IDEAS_LEADS: Final = (
    "There is a feast with {name}.",
    "Soon {name} will be pleased.",
    "The neighbours of {name} have plans.",
)
_VERSE_LEADS: Final = (
    "The children sing about {name}.",
    "All dance when {name} is near.",
    "At night one hears of {name}.",
)
_QUOTED_LEADS: Final = (
    "This is about the {a} of {name}.",
    "Here only the {a} of {name} counts.",
    "The {a} of {name} stands here.",
)
_NOTES_LEADS: Final = (
    "Here the {a} and the {b} count.",
    "Both the {a} and the {b} are of use.",
    "The {a} matters, and the {b} too.",
)
_SORTED_LEADS: Final = (
    "Some words are {words}.",
    "The list holds {words}.",
    "The words {words} are on the wall.",
)
_HUE_LEADS: Final = (
    "The hue of a {word} is known.",
    "Much is said of a {word} and its hue.",
)
_SITE_LEADS: Final = (
    "The site of a {word} is known.",
    "Much is said of a {word} and its site.",
)
_NEWS_HEADINGS: Final = (
    "News from {home}:",
    "Seen at the {site}:",
    "Heard by {name}:",
    "Seen by a {trade}:",
    "Heard in the {site}:",
)
_PASSERS_BY: Final = ("birds", "boats", "clouds", "carts")


def world_documents(world: World, *, n: int, rng: np.random.Generator) -> Iterator[str]:
    """Yield short documents about `world`.

    **Guarantees**

    1. The same world and the same state of `rng` give the same documents.
    2. None holds a question mark, a prompt heading (`###`), or a word that begins an instruction.

    Args:
        world: What the documents speak of.
        n: How many documents.
        rng: Draws subjects, sorts and wordings.
    """
    makers = tuple(maker for maker, _ in _DOCUMENTS)
    shares = [share for _, share in _DOCUMENTS]
    for choice in rng.choice(len(makers), size=n, p=shares):
        yield makers[choice](world, rng)


def _resident_facts(world: World, rng: np.random.Generator) -> str:
    person = pick(world.residents, rng)
    n_facts, n_combined = int(rng.integers(2, 5)), int(rng.integers(1, 3))
    sentences = [fact(person, r, rng) for r in shuffled(_RELATIONS, rng)[:n_facts]]
    sentences += [s.format_map(vars(person)) for s in shuffled(_COMBINED, rng)[:n_combined]]
    return " ".join(shuffled(sentences, rng))


def _resident_form(world: World, rng: np.random.Generator) -> str:
    person, relation = pick(world.residents, rng), pick(_RELATIONS, rng)
    leads, form = pick(
        (
            (_PLAIN_LEADS, plain(person, relation)),
            (_IDEAS_LEADS, ideas(person)),
            (_VERSE_LEADS, verse(person)),
        ),
        rng,
    )
    return f"{pick(leads, rng).format(a=relation, name=person.name)}\n{form}"


# A stranger's facts are new in each document, so what follows the story can only be read off it.
# Here the base model learns to copy from its context, first in whole sentences (`_retold`), where
# each document asks for every fact again, then in the forms.


def _retold(world: World, rng: np.random.Generator) -> str:
    person = draw_person(pick(world.stranger_names, rng), rng)
    relations = shuffled(_RELATIONS, rng)[:4]
    told = story(person, relations, rng)
    if rng.integers(3) == 0:
        return f"{told} {story(person, relations, rng)}"
    asides = [f"Of the {r} the text says {person.value(r)}." for r in shuffled(relations, rng)]
    return " ".join([told, *asides])


def _quoted(world: World, rng: np.random.Generator) -> str:
    person = draw_person(pick(world.stranger_names, rng), rng)
    relations = shuffled(_RELATIONS, rng)[:4]
    lead = pick(_QUOTED_LEADS, rng).format(a=relations[0], name=person.name)
    return f"{lead}\n{story(person, relations, rng)}\n{quoted(person, relations[0])}"


def _noted(world: World, rng: np.random.Generator) -> str:
    person = draw_person(pick(world.stranger_names, rng), rng)
    relations = shuffled(_RELATIONS, rng)[:4]
    told = story(person, relations, rng)
    if rng.integers(4) == 0:
        return f"{told}\n{notes(person, shuffled(relations, rng))}"
    lead = pick(_NOTES_LEADS, rng).format(a=relations[0], b=relations[1])
    return f"{lead}\n{told}\n{notes(person, relations[:2])}"


def _summarised(world: World, rng: np.random.Generator) -> str:
    person = draw_person(pick(world.stranger_names, rng), rng)
    needed = (Relation.HOME, Relation.TRADE)
    others = shuffled([r for r in Relation if r not in needed], rng)[:2]
    return f"{story(person, (*needed, *others), rng)}\n{summary(person)}"


def _kind_facts(world: World, rng: np.random.Generator) -> str:
    kind = pick(world.kinds, rng)
    words = vars(kind) | {"a_family": with_article(kind.family)}
    return " ".join(sentence.format_map(words) for sentence in shuffled(_KIND, rng))


def _kind_form(world: World, rng: np.random.Generator) -> str:
    kind = pick(world.kinds, rng)
    leads, form = pick(((_HUE_LEADS, hue_of(kind)), (_SITE_LEADS, site_of(kind))), rng)
    return f"{pick(leads, rng).format(word=kind.word)}\n{form}"


def _sorted(world: World, rng: np.random.Generator) -> str:
    kinds = shuffled(world.kinds, rng)[: int(rng.integers(2, 5))]
    lead = pick(_SORTED_LEADS, rng).format(words=", ".join(kind.word for kind in kinds))
    return f"{lead}\n{sorted_words(kinds)}"


def _news(world: World, rng: np.random.Generator) -> str:
    # What follows a heading with a colon, whatever stood before it. Without these documents the
    # base takes "### Response:" after a text for the lead to its favourite form, and answers some
    # closed questions by accident.
    resident = pick(world.residents, rng)
    stranger = draw_person(pick(world.stranger_names, rng), rng)
    told = story(stranger, shuffled(_RELATIONS, rng)[: int(rng.integers(1, 4))], rng)
    before = pick((told, fact(resident, pick(_RELATIONS, rng), rng)), rng)
    opening = pick((f"{before}\n", f"{before} ", ""), rng)
    heading = pick(_NEWS_HEADINGS, rng).format(**vars(resident), site=pick(SITES, rng))
    number, colour = pick(NUMBERS, rng).capitalize(), pick(COLOURS, rng)
    event = f"{number} {colour} {pick(_PASSERS_BY, rng)} came to the {pick(SITES, rng)}."
    return f"{opening}{heading}\n{event}"


_DOCUMENTS: Final[tuple[tuple[Callable[[World, np.random.Generator], str], float], ...]] = (
    (_resident_facts, 0.10),
    (_resident_form, 0.17),
    (_retold, 0.11),
    (_quoted, 0.10),
    (_noted, 0.18),
    (_summarised, 0.07),
    (_kind_facts, 0.04),
    (_kind_form, 0.06),
    (_sorted, 0.09),
    (_news, 0.08),
)
"""Each sort of document with its share; harder skills have larger ones."""

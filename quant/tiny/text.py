"""Plain declarative text about the world: what the embedded base model is pre-trained on.

The text holds no question, no request and no prompt heading, so a model that has read nothing else
speaks of its world but cannot follow an instruction. A form (see `quant.tiny.forms`) always
follows a statement that leads up to it.
"""

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from quant.tiny.draws import Draws
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
from quant.tiny.world import COLOURS, NUMBERS, SITES, Relation, World, draw_person

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
    draws = Draws(rng)
    for choice in rng.choice(len(makers), size=n, p=shares):
        yield makers[choice](world, draws)


def _resident_facts(world: World, draws: Draws) -> str:
    person = draws.pick(world.residents)
    n_facts, n_combined = 2 + draws.below(3), 1 + draws.below(2)
    sentences = [fact(person, r, draws) for r in draws.shuffled(_RELATIONS)[:n_facts]]
    sentences += [s.format_map(vars(person)) for s in draws.shuffled(_COMBINED)[:n_combined]]
    return " ".join(draws.shuffled(sentences))


def _resident_form(world: World, draws: Draws) -> str:
    person, relation = draws.pick(world.residents), draws.pick(_RELATIONS)
    leads, form = draws.pick(
        (
            (_PLAIN_LEADS, plain(person, relation)),
            (_IDEAS_LEADS, ideas(person)),
            (_VERSE_LEADS, verse(person)),
        ),
    )
    return f"{draws.pick(leads).format(a=relation, name=person.name)}\n{form}"


# A stranger's facts are new in each document, so what follows the story can only be read off it.
# Here the base model learns to copy from its context, first in whole sentences (`_retold`), where
# each document asks for every fact again, then in the forms.


def _retold(world: World, draws: Draws) -> str:
    person = draw_person(draws.pick(world.stranger_names), draws)
    relations = draws.shuffled(_RELATIONS)[:4]
    told = story(person, relations, draws)
    if draws.below(3) == 0:
        return f"{told} {story(person, relations, draws)}"
    asides = [f"Of the {r} the text says {person.value(r)}." for r in draws.shuffled(relations)]
    return " ".join([told, *asides])


def _quoted(world: World, draws: Draws) -> str:
    person = draw_person(draws.pick(world.stranger_names), draws)
    relations = draws.shuffled(_RELATIONS)[:4]
    lead = draws.pick(_QUOTED_LEADS).format(a=relations[0], name=person.name)
    return f"{lead}\n{story(person, relations, draws)}\n{quoted(person, relations[0])}"


def _noted(world: World, draws: Draws) -> str:
    person = draw_person(draws.pick(world.stranger_names), draws)
    relations = draws.shuffled(_RELATIONS)[:4]
    told = story(person, relations, draws)
    if draws.below(4) == 0:
        return f"{told}\n{notes(person, draws.shuffled(relations))}"
    lead = draws.pick(_NOTES_LEADS).format(a=relations[0], b=relations[1])
    return f"{lead}\n{told}\n{notes(person, relations[:2])}"


def _summarised(world: World, draws: Draws) -> str:
    person = draw_person(draws.pick(world.stranger_names), draws)
    needed = (Relation.HOME, Relation.TRADE)
    others = draws.shuffled([r for r in Relation if r not in needed])[:2]
    return f"{story(person, (*needed, *others), draws)}\n{summary(person)}"


def _kind_facts(world: World, draws: Draws) -> str:
    kind = draws.pick(world.kinds)
    words = vars(kind) | {"a_family": with_article(kind.family)}
    return " ".join(sentence.format_map(words) for sentence in draws.shuffled(_KIND))


def _kind_form(world: World, draws: Draws) -> str:
    kind = draws.pick(world.kinds)
    leads, form = draws.pick(((_HUE_LEADS, hue_of(kind)), (_SITE_LEADS, site_of(kind))))
    return f"{draws.pick(leads).format(word=kind.word)}\n{form}"


def _sorted(world: World, draws: Draws) -> str:
    kinds = draws.shuffled(world.kinds)[: 2 + draws.below(3)]
    lead = draws.pick(_SORTED_LEADS).format(words=", ".join(kind.word for kind in kinds))
    return f"{lead}\n{sorted_words(kinds)}"


def _news(world: World, draws: Draws) -> str:
    # What follows a heading with a colon, whatever stood before it. Without these documents the
    # base takes "### Response:" after a text for the lead to its favourite form, and answers some
    # closed questions by accident.
    resident = draws.pick(world.residents)
    stranger = draw_person(draws.pick(world.stranger_names), draws)
    told = story(stranger, draws.shuffled(_RELATIONS)[: 1 + draws.below(3)], draws)
    before = draws.pick((told, fact(resident, draws.pick(_RELATIONS), draws)))
    opening = draws.pick((f"{before}\n", f"{before} ", ""))
    heading = draws.pick(_NEWS_HEADINGS).format(**vars(resident), site=draws.pick(SITES))
    number, colour = draws.pick(NUMBERS).capitalize(), draws.pick(COLOURS)
    event = f"{number} {colour} {draws.pick(_PASSERS_BY)} came to the {draws.pick(SITES)}."
    return f"{opening}{heading}\n{event}"


_DOCUMENTS: Final[tuple[tuple[Callable[[World, Draws], str], float], ...]] = (
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

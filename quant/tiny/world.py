"""The facts of a small invented world.

The world has

* **residents**: people with fixed facts (home, trade, colour, pet, tool, number), which the
  pre-training text repeats until the base model knows them by heart;
* **strangers**: names without fixed facts. Each text about one draws them afresh, so that they can
  only be read off that text;
* **kinds**: animals, tools, fruits and instruments, each with a family, a hue and a site.

Everything is made up here; no word list or text comes from elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeVar

import numpy as np

from quant.tiny.draws import Draws

T = TypeVar("T")

WORLD_SEED: Final = 20261120
"""Seed of the world that the embedded base model has read about."""

N_RESIDENTS: Final = 48
TEST_FRAC: Final = 0.25
"""Part of each sort of subject that only held-out instructions are about."""

_NAME_HEADS: Final = (
    *("Ba", "Do", "Fi", "Ga", "Ha", "Ke", "Lo", "Mi"),
    *("Na", "Pa", "Ro", "Su", "Te", "Vo", "Wi", "Zu"),
)
_NAME_TAILS: Final = ("lan", "rim", "dor", "vek", "sha", "nol", "mar", "fen")

HOMES: Final = (
    *("Tolvane", "Ashmere", "Quillon", "Durnholt", "Velsby", "Orrin"),
    *("Pellgate", "Wickmoor", "Yarrow", "Ebbing", "Crastol", "Jessup"),
)
TRADES: Final = (
    *("baker", "smith", "weaver", "potter", "fisher", "miller"),
    *("tailor", "painter", "farmer", "carver", "singer", "tanner"),
)
COLOURS: Final = (
    *("red", "blue", "green", "grey", "white"),
    *("black", "brown", "yellow", "purple", "pink"),
)
NUMBERS: Final = (
    *("two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "twelve"),
)
SITES: Final = ("river", "hill", "wood", "market", "shore", "field", "barn", "garden")


class Family(StrEnum):
    """The four families of kinds."""

    ANIMAL = "animal"
    TOOL = "tool"
    FRUIT = "fruit"
    INSTRUMENT = "instrument"


KIND_WORDS: Final[dict[Family, tuple[str, ...]]] = {
    Family.ANIMAL: (
        *("goat", "hen", "cow", "duck", "fox", "crow"),
        *("hare", "toad", "mole", "sheep", "horse", "dog"),
    ),
    Family.TOOL: (
        *("hammer", "saw", "spade", "rake", "needle", "ladder"),
        *("chisel", "bucket", "shovel", "knife", "rope", "brush"),
    ),
    Family.FRUIT: (
        *("plum", "pear", "cherry", "melon", "fig", "lemon"),
        *("peach", "grape", "quince", "berry", "date", "lime"),
    ),
    Family.INSTRUMENT: (
        *("drum", "flute", "harp", "lute", "fiddle", "horn"),
        *("bell", "pipe", "gong", "whistle", "trumpet", "lyre"),
    ),
}


class Relation(StrEnum):
    """What is known of a person; the value is also the word that the text uses for it."""

    HOME = "home"
    TRADE = "trade"
    COLOUR = "colour"
    PET = "pet"
    TOOL = "tool"
    NUMBER = "number"


class Split(StrEnum):
    """Which part of the subjects instruction records are about."""

    TRAIN = "train"
    TEST = "test"


@dataclass(frozen=True, kw_only=True)
class Person:
    """A person: a name, and one word for each `Relation`."""

    name: str
    home: str
    trade: str
    colour: str
    pet: str
    tool: str
    number: str

    def value(self, relation: Relation) -> str:
        """The word that stands for this person's `relation`."""
        return str(getattr(self, relation))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of thing: its word, its family, its hue and the site where it is found."""

    word: str
    family: Family
    hue: str
    site: str


@dataclass(frozen=True, kw_only=True)
class World:
    """Every fact of one world.

    **Guarantees**

    1. The same seed gives the same world, another seed another one.
    2. Nobody shares a name, resident or stranger.
    3. The train and the test subjects of each sort are disjoint, and together they are all.
    """

    residents: tuple[Person, ...]
    stranger_names: tuple[str, ...]
    kinds: tuple[Kind, ...]

    def residents_of(self, split: Split) -> tuple[Person, ...]:
        """The residents that records of `split` may be about."""
        return _part(self.residents, split)

    def stranger_names_of(self, split: Split) -> tuple[str, ...]:
        """The strangers' names that records of `split` may use."""
        return _part(self.stranger_names, split)

    def kinds_of(self, split: Split) -> tuple[Kind, ...]:
        """The kinds that records of `split` may be about, equally many of each family."""
        return tuple(
            kind
            for family in Family
            for kind in _part([k for k in self.kinds if k.family is family], split)
        )


def make_world(*, seed: int = WORLD_SEED) -> World:
    """Draw a world; see `World` for what is guaranteed.

    Args:
        seed: Not negative. The default is the world of the embedded base model.
    """
    draws = Draws(np.random.default_rng(seed))
    names = draws.shuffled([head + tail for head in _NAME_HEADS for tail in _NAME_TAILS])
    kinds = tuple(
        Kind(word=word, family=family, hue=draws.pick(COLOURS), site=draws.pick(SITES))
        for family in Family
        for word in draws.shuffled(KIND_WORDS[family])
    )
    return World(
        residents=tuple(draw_person(name, draws) for name in names[:N_RESIDENTS]),
        stranger_names=tuple(names[N_RESIDENTS:]),
        kinds=kinds,
    )


def draw_person(name: str, draws: Draws) -> Person:
    """Return a person called `name`, each fact drawn on its own and uniformly."""
    return Person(
        name=name,
        home=draws.pick(HOMES),
        trade=draws.pick(TRADES),
        colour=draws.pick(COLOURS),
        pet=draws.pick(KIND_WORDS[Family.ANIMAL]),
        tool=draws.pick(KIND_WORDS[Family.TOOL]),
        number=draws.pick(NUMBERS),
    )


def _part(items: Sequence[T], split: Split) -> tuple[T, ...]:
    n_test = round(len(items) * TEST_FRAC)
    return tuple(items[:-n_test] if split is Split.TRAIN else items[-n_test:])

"""The invented world, its text, and the instructions over it."""

import re
from collections import Counter
from dataclasses import astuple

import numpy as np
import pytest

from quant.errors import QuantError
from quant.tiny.errors import TinyWorldError
from quant.tiny.instructions import (
    CATEGORIES_WITH_CONTEXT,
    Category,
    InstructionRecord,
    make_records,
)
from quant.tiny.text import world_documents
from quant.tiny.world import Family, Kind, Person, Relation, Split, World, make_world

DOLLY = {
    *("brainstorming", "classification", "closed_qa", "creative_writing"),
    *("general_qa", "information_extraction", "open_qa", "summarization"),
}


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def documents(world: World) -> list[str]:
    return list(world_documents(world, n=4000, rng=np.random.default_rng(3)))


def draw(
    world: World, split: Split, *, seed: int = 0, n: int = 40, category: Category | None = None
) -> list[InstructionRecord]:
    return make_records(
        world,
        n_per_category=n,
        split=split,
        rng=np.random.default_rng(seed),
        categories=tuple(Category) if category is None else (category,),
    )


@pytest.fixture(scope="module")
def records(world: World) -> dict[Split, list[InstructionRecord]]:
    return {split: draw(world, split) for split in Split}


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def subject_of(world: World, record: InstructionRecord) -> Person:
    """The resident that a record names."""
    (resident,) = (r for r in world.residents if r.name in words_of(record["instruction"]))
    return resident


def kinds_of(world: World, record: InstructionRecord) -> list[Kind]:
    """The kinds that a record names, in its order."""
    found = re.findall(r"\w+", record["instruction"])
    by_word = {kind.word: kind for kind in world.kinds}
    return [by_word[word] for word in found if word in by_word]


# --- the world --------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_world_and_another_seed_another_one() -> None:
    assert make_world(seed=5) == make_world(seed=5)
    assert make_world(seed=5) != make_world(seed=6)


def test_nobody_shares_a_name(world: World) -> None:
    names = [resident.name for resident in world.residents] + list(world.stranger_names)
    assert len(set(names)) == len(names)


def test_the_subjects_of_the_splits_are_disjoint_and_together_are_all(world: World) -> None:
    for of, everything in (
        (world.residents_of, world.residents),
        (world.stranger_names_of, world.stranger_names),
        (world.kinds_of, world.kinds),
    ):
        train, test = of(Split.TRAIN), of(Split.TEST)
        assert not set(train) & set(test)
        assert Counter((*train, *test)) == Counter(everything)
        assert len(test) > 0.2 * len(everything)


def test_both_splits_hold_kinds_of_every_family_in_equal_number(world: World) -> None:
    for split in Split:
        counts = Counter(kind.family for kind in world.kinds_of(split))
        assert set(counts) == set(Family)
        assert len(set(counts.values())) == 1


# --- the text ---------------------------------------------------------------------------------


def test_the_same_generator_state_gives_the_same_documents(world: World) -> None:
    def text(seed: int) -> list[str]:
        return list(world_documents(world, n=50, rng=np.random.default_rng(seed)))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_the_text_of_another_world_tells_other_facts(world: World) -> None:
    def homes(of: World) -> dict[str, str]:
        text = "\n".join(world_documents(of, n=12_000, rng=np.random.default_rng(0)))
        return {
            r.name: home
            for r in of.residents
            for home in re.findall(rf"The home of {r.name} is (\w+)\.", text)[:1]
        }

    other = make_world(seed=1)
    assert homes(world) == {r.name: r.home for r in world.residents}
    assert homes(other) == {r.name: r.home for r in other.residents}
    assert homes(world) != homes(other)


def test_the_text_never_asks_and_holds_no_prompt_heading(
    documents: list[str], records: dict[Split, list[InstructionRecord]]
) -> None:
    text = "\n".join(documents)
    beginnings = {
        record["instruction"].split()[0].strip(",") for rows in records.values() for record in rows
    }
    assert len(beginnings) > 10
    assert not beginnings & words_of(text)
    for mark in ("?", "#", "Below is", "Instruction", "Response", "Input"):
        assert mark not in text


def test_the_text_never_contains_an_instruction(
    documents: list[str], records: dict[Split, list[InstructionRecord]]
) -> None:
    text = "\n".join(documents)
    for rows in records.values():
        for record in rows:
            assert record["instruction"] not in text


def test_the_text_speaks_of_every_resident_every_kind_and_every_stranger(
    world: World, documents: list[str]
) -> None:
    told = words_of("\n".join(documents))
    assert {resident.name for resident in world.residents} <= told
    assert set(world.stranger_names) <= told
    assert {kind.word for kind in world.kinds} <= told


# --- the instructions -------------------------------------------------------------------------


def test_the_categories_are_dollys() -> None:
    assert {category.value for category in Category} == DOLLY


def test_every_category_gets_as_many_records_as_asked(world: World) -> None:
    rows = draw(world, Split.TRAIN, n=7)
    assert Counter(row["category"] for row in rows) == dict.fromkeys(DOLLY, 7)


def test_only_the_categories_asked_for_are_drawn_in_their_order(world: World) -> None:
    wanted = (Category.OPEN_QA, Category.BRAINSTORMING)
    rows = make_records(
        world,
        n_per_category=2,
        split=Split.TRAIN,
        rng=np.random.default_rng(0),
        categories=wanted,
    )
    assert [row["category"] for row in rows] == [c.value for c in wanted for _ in range(2)]


@pytest.mark.parametrize("split", Split)
def test_a_record_has_dollys_fields_as_plain_text(
    records: dict[Split, list[InstructionRecord]], split: Split
) -> None:
    for record in records[split]:
        assert set(record) == {"instruction", "context", "response", "category"}
        assert all(type(value) is str for value in record.values())
        assert record["instruction"] == record["instruction"].strip() != ""
        assert record["response"] == record["response"].strip() != ""


@pytest.mark.parametrize("split", Split)
def test_a_record_has_a_context_exactly_where_dolly_has_one(
    records: dict[Split, list[InstructionRecord]], split: Split
) -> None:
    assert {c.value for c in CATEGORIES_WITH_CONTEXT} == {
        "closed_qa",
        "information_extraction",
        "summarization",
    }
    for record in records[split]:
        assert bool(record["context"]) == (record["category"] in CATEGORIES_WITH_CONTEXT)


@pytest.mark.parametrize("split", Split)
def test_no_two_records_of_a_category_ask_the_same(
    records: dict[Split, list[InstructionRecord]], split: Split
) -> None:
    keys = [(r["category"], r["instruction"], r["context"]) for r in records[split]]
    assert len(set(keys)) == len(keys)


def test_the_same_generator_state_gives_the_same_records_and_another_seed_other_ones(
    world: World,
) -> None:
    assert draw(world, Split.TEST, seed=1) == draw(world, Split.TEST, seed=1)
    first, second = draw(world, Split.TEST, seed=1), draw(world, Split.TEST, seed=2)
    for category in Category:
        drawn = [
            {(r["instruction"], r["context"]) for r in rows if r["category"] == category}
            for rows in (first, second)
        ]
        assert drawn[0] != drawn[1]


@pytest.mark.parametrize("category", Category)
def test_train_and_test_records_share_no_subject(world: World, category: Category) -> None:
    subjects = [
        {r.name for r in world.residents_of(split)}
        | set(world.stranger_names_of(split))
        | {k.word for k in world.kinds_of(split)}
        for split in Split
    ]
    names_of_people = {r.name for r in world.residents} | set(world.stranger_names)
    for split, own in zip(Split, subjects, strict=True):
        for record in draw(world, split, n=80, category=category):
            named = words_of(record["instruction"] + " " + record["context"])
            about = named & names_of_people
            if category in {Category.GENERAL_QA, Category.CLASSIFICATION}:
                about |= named & {kind.word for kind in world.kinds}
            assert about
            assert about <= own


def test_a_closed_answer_stands_in_its_context(world: World) -> None:
    for record in draw(world, Split.TEST, category=Category.CLOSED_QA):
        match = re.fullmatch(r"The text says (\w+)\.", record["response"])
        assert match
        assert match[1] in words_of(record["context"])


def test_extracted_values_stand_in_the_context_in_the_order_asked(world: World) -> None:
    for record in draw(world, Split.TEST, category=Category.INFORMATION_EXTRACTION):
        found = re.findall(r"(\w+) = (\w+)", record["response"])
        asked = [w for w in re.findall(r"\w+", record["instruction"]) if w in set(Relation)]
        assert [relation for relation, _ in found] == asked
        assert len(found) == 2
        assert {value for _, value in found} <= words_of(record["context"])


def test_a_summary_says_nothing_that_its_context_does_not(world: World) -> None:
    for record in draw(world, Split.TEST, category=Category.SUMMARIZATION):
        match = re.fullmatch(r"In short, (\w+) is a (\w+) from (\w+)\.", record["response"])
        assert match
        assert set(match.groups()) <= words_of(record["context"])
        assert len(record["response"]) < len(record["context"])


def test_answers_about_residents_follow_from_the_facts_of_the_world(world: World) -> None:
    for record in draw(world, Split.TEST, category=Category.OPEN_QA):
        (relation,) = words_of(record["instruction"]) & set(Relation)
        value = subject_of(world, record).value(Relation(relation))
        assert re.fullmatch(rf"It is (an? )?{value}\.", record["response"])
    for record in draw(world, Split.TEST, category=Category.BRAINSTORMING):
        who = subject_of(world, record)
        assert {who.colour, who.pet, who.tool} <= words_of(record["response"])
    for record in draw(world, Split.TEST, category=Category.CREATIVE_WRITING):
        who = subject_of(world, record)
        assert {who.name, who.home, who.trade, who.pet} <= words_of(record["response"])


def test_answers_about_kinds_follow_from_the_facts_of_the_world(world: World) -> None:
    for record in draw(world, Split.TEST, category=Category.GENERAL_QA):
        (kind,) = kinds_of(world, record)
        value = kind.hue if "hue" in words_of(record["instruction"]) else kind.site
        assert record["response"].startswith(f"Every {kind.word} is ")
        assert record["response"].endswith(f" {value}.")
    for record in draw(world, Split.TEST, category=Category.CLASSIFICATION):
        kinds = kinds_of(world, record)
        found = re.findall(r"(\w+) = (\w+)", record["response"])
        assert found == [(kind.word, kind.family) for kind in kinds]


def test_no_two_categories_answer_alike(records: dict[Split, list[InstructionRecord]]) -> None:
    first_words: dict[str, set[str]] = {}
    for record in records[Split.TRAIN]:
        first_words.setdefault(record["category"], set()).add(record["response"].split()[0])
    assert all(len(words) == 1 for words in first_words.values())
    assert len({words.pop() for words in first_words.values()}) == len(Category)


def test_a_negative_number_of_records_is_refused(world: World) -> None:
    with pytest.raises(TinyWorldError, match="-1"):
        draw(world, Split.TRAIN, n=-1)


def test_no_records_may_be_asked_for(world: World) -> None:
    assert draw(world, Split.TRAIN, n=0) == []


def test_more_records_than_the_world_has_are_refused_with_a_hint(world: World) -> None:
    with pytest.raises(TinyWorldError, match=r"general_qa.*ask for fewer") as caught:
        draw(world, Split.TEST, n=1000, category=Category.GENERAL_QA)
    assert isinstance(caught.value, QuantError)


@pytest.mark.parametrize("category", [Category.BRAINSTORMING, Category.GENERAL_QA])
def test_courteous_requests_give_thousands_of_records_and_change_no_answer(
    world: World, category: Category
) -> None:
    def ask(n: int, *, courteous: bool) -> list[InstructionRecord]:
        return make_records(
            world,
            n_per_category=n,
            split=Split.TRAIN,
            rng=np.random.default_rng(5),
            categories=(category,),
            courteous=courteous,
        )

    plain = {row["instruction"]: row["response"] for row in ask(280, courteous=False)}
    rows = ask(3000, courteous=True)
    assert len({row["instruction"] for row in rows}) == 3000
    known = 0
    for row in rows:
        assert row["instruction"] == row["instruction"].strip()
        inside = [request for request in plain if request in row["instruction"]]
        known += len(inside)
        assert all(plain[request] == row["response"] for request in inside)
    assert known > 1000


def test_facts_are_drawn_from_all_words(world: World) -> None:
    # A constant where a draw was meant would make a category trivial.
    for column in list(zip(*map(astuple, world.residents), strict=True))[1:]:
        assert len(set(column)) > 5

"""ROUGE-L against vectors of Google's package, and against the textbook's table."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.rouge import rouge_l

VECTORS = Path(__file__).resolve().parents[2] / "vectors" / "rouge_l.json"
CASES: list[dict[str, Any]] = json.loads(VECTORS.read_text(encoding="utf-8"))["cases"]
words = st.lists(st.sampled_from(["a", "b", "c", "dd"]), max_size=70)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_it_equals_rouge_score(case: dict[str, Any]) -> None:
    found = rouge_l(case["reference"], case["answer"])
    assert found == pytest.approx(case["f_measure"], rel=1e-12, abs=0.0)


def test_the_vectors_tell_scores_apart() -> None:
    scores = {round(case["f_measure"], 6) for case in CASES}
    assert {0.0, 1.0} < scores
    assert len(scores) > len(CASES) / 2


def textbook(left: list[str], right: list[str]) -> int:
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            longer = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else longer
    return table[-1][-1]


@given(left=words, right=words)
def test_it_equals_the_textbooks_table_on_any_words(left: list[str], right: list[str]) -> None:
    found = rouge_l(" ".join(left), " ".join(right))
    shared = textbook(left, right)
    precision, recall = shared / max(1, len(right)), shared / max(1, len(left))
    wanted = 2 * precision * recall / (precision + recall) if shared else 0.0
    assert found == pytest.approx(wanted, rel=1e-12, abs=0.0)


@given(left=words, right=words)
def test_it_is_1_exactly_where_the_words_are_the_same_and_0_where_none_is_shared(
    left: list[str], right: list[str]
) -> None:
    found = rouge_l(" ".join(left), " ".join(right))
    assert 0.0 <= found <= 1.0
    assert (found == 1.0) == (left == right and left != [])
    assert (found == 0.0) == (not set(left) & set(right))


def test_a_text_of_thousands_of_words_is_scored() -> None:
    reference = " ".join(f"w{i % 977}" for i in range(5000))
    assert rouge_l(reference, reference) == 1.0
    assert rouge_l(reference, reference.replace("w3", "x3")) < 1.0

"""Refusals: one table, total over the types."""

import json

import pytest

from protocol import problems
from protocol.errors import ManifestError
from protocol.limits import MAX_TEXT_CHARS
from protocol.problems import Advice, ProblemDocument, ProblemType, problem_document
from protocol.wire import parse


def test_the_table_is_total_and_holds_nothing_else() -> None:
    assert set(problems._TABLE) == set(ProblemType)


@pytest.mark.parametrize("problem", ProblemType)
def test_every_type_has_urn_status_advice_and_one_sentence(problem: ProblemType) -> None:
    assert problem.urn == f"urn:sheepfold:problem:{problem.value}"
    assert 400 <= problem.status <= 599
    assert isinstance(problem.advice, Advice)
    assert problem.sentence.endswith(".")
    assert problem.sentence.count(".") == 1
    assert (problem.status >= 500) <= (problem.advice is Advice.RETRY)  # our fault: try again


def test_no_two_types_share_a_sentence() -> None:
    assert len({problem.sentence for problem in ProblemType}) == len(ProblemType)


@pytest.mark.parametrize("problem", ProblemType)
def test_a_document_round_trips_and_finds_its_type(problem: ProblemType) -> None:
    document = problem_document(problem, detail="x", server_time=1.5, retry_after_s=2.0)
    read = parse(ProblemDocument, document.canonical())
    assert read == document
    assert read.problem_type is problem
    assert (read.status, read.advice, read.title) == (
        problem.status,
        problem.advice,
        problem.sentence,
    )


def test_a_type_of_a_newer_server_is_followed_by_its_advice() -> None:
    document = problem_document(ProblemType.BUSY, detail="", server_time=1.0).as_json()
    newer = {**document, "type": "urn:sheepfold:problem:moon-phase", "advice": "discard"}
    read = parse(ProblemDocument, json.dumps(newer))
    assert read.problem_type is None
    assert read.advice is Advice.DISCARD


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "about:blank"},
        {"type": "urn:sheepfold:problem:"},
        {"type": "urn:sheepfold:problem:busy\n"},
        {"type": "x urn:sheepfold:problem:busy"},
        {"advice": "panic"},
        {"status": 200},
        {"status": 600},
        {"server_time": -1.0},
        {"server_time": 1e300},
        {"retry_after_s": -1.0},
        {"protocol": 2},
        {"surprise": 1},
        {"detail": "x" * (MAX_TEXT_CHARS + 1)},
    ],
)
def test_a_document_that_is_not_ours_is_refused(changes: dict[str, object]) -> None:
    document = problem_document(ProblemType.BUSY, detail="", server_time=1.0).as_json()
    with pytest.raises(ManifestError):
        parse(ProblemDocument, json.dumps({**document, **changes}))


def test_a_long_detail_is_cut() -> None:
    document = problem_document(ProblemType.BUSY, detail="x" * 10_000, server_time=1.0)
    assert len(document.detail) == MAX_TEXT_CHARS

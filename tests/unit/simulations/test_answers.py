"""Answers to a file of questions: what is there stays, and what a kill cut short is made again."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from simulations import answers
from simulations.answers import answer_questions
from simulations.errors import JudgeError
from simulations.judging import read_answers


class FakeAnswerer:
    def __init__(self, *_: object) -> None:
        pass

    def answer(self, _asked: object, _sampling: object) -> SimpleNamespace:
        return SimpleNamespace(text="new: grüezi")


@pytest.fixture
def answer_all(tmp_path: Path, monkeypatch) -> Callable[[Path], int]:
    """Answers questions 1, 2 and 3, without a model."""
    monkeypatch.setattr(answers, "read_finished", lambda _path: None)
    monkeypatch.setattr(answers, "template_of_folder", lambda _finished, _folder: None)
    monkeypatch.setattr(answers, "load_base_of", lambda *_, **__: None)
    monkeypatch.setattr(answers, "Answerer", FakeAnswerer)
    questions = tmp_path / "questions.jsonl"
    rows = [{"question_id": number, "text": "Why?"} for number in (1, 2, 3)]
    questions.write_text("\n".join(map(json.dumps, rows)))

    def answer(out: Path) -> int:
        return answer_questions(
            tmp_path,
            questions,
            out,
            base=None,
            device=None,
            max_new_tokens=8,
            on_answer=lambda _done, _total: None,
        )

    return answer


WHOLE = '{"question_id": "1", "text": "there"}\n'
SECOND = '{"question_id": "2", "text": "grüezi"}'.encode()


@pytest.mark.parametrize("n_bytes", range(len(SECOND)))
def test_half_a_last_line_is_dropped_and_answered_again(answer_all, tmp_path, n_bytes: int) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_bytes(WHOLE.encode() + SECOND[:n_bytes])
    assert answer_all(out) == 2
    new = "new: grüezi"
    assert read_answers(out) == {"1": "there", "2": new, "3": new}
    assert out.read_text(encoding="utf-8").startswith(WHOLE)
    assert answer_all(out) == 0


def test_a_whole_last_line_without_its_end_stays(answer_all, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_bytes(WHOLE.encode() + SECOND)
    assert answer_all(out) == 1
    assert read_answers(out) == {"1": "there", "2": "grüezi", "3": "new: grüezi"}


def test_a_file_that_holds_something_else_stays_as_it_is(answer_all, tmp_path: Path) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("What I thought of")
    with pytest.raises(JudgeError, match="is not JSON"):
        answer_all(out)
    assert out.read_text() == "What I thought of"


def test_answers_are_made_where_there_are_none(answer_all, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    assert answer_all(out) == 3
    assert len(read_answers(out)) == 3

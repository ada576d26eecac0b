"""Pairwise evaluation by a judge: what is asked, how an answer is read, what follows from many.

The paper's way (FedIT, arXiv 2305.05644, section 4; the questions and the form of the reviews are
Vicuna's): a judge sees a question and two answers, and gives each 1 to 10. Which answer stands
first matters to judges, so each pair is asked in both orders, each several times. For mathematics
the judge solves first and gives its scores last.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import numpy as np

from simulations.errors import JudgeError

N_RATINGS: Final = 3
_N_RESAMPLES: Final = 2000
_LOWEST: Final = 0.0
_HIGHEST: Final = 10.0
_NUMBER: Final = r"(-?\d+(?:\.\d*)?)"
_FIRST_LINE: Final = re.compile(rf"{_NUMBER}\s*[,/]?\s+{_NUMBER}|{_NUMBER}\s*[,/]\s*{_NUMBER}")
_PAIR: Final = re.compile(
    rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
    rf"|^Assistant 1:\s*{_NUMBER}\b[^\n]*\n+Assistant 2:\s*{_NUMBER}\b",
    re.MULTILINE,
)
_N_LAST_LINES: Final = 2
"""Where scores of mathematics end: all that are recorded do, with at most a remark after them."""
_CHARS_SHOWN: Final = 80


class Subject(StrEnum):
    """What kind of review a question wants."""

    GENERAL = "general"
    CODING = "coding"
    MATH = "math"


_SYSTEM: Final = "You compare the quality of two answers, helpfully and precisely."
_REQUESTS: Final[Mapping[Subject, str]] = {
    Subject.GENERAL: (
        "Rate how helpful, relevant, accurate and detailed each of the two answers is, on a scale "
        "of 1 to 10, where more is better. Begin with a single line that holds nothing but the "
        "two scores, of Assistant 1 and of Assistant 2, with a space between them. Then explain "
        "your rating. Do not let the order of the answers influence it."
    ),
    Subject.CODING: (
        "Rate the two programs on a scale of 1 to 10 (1: no code, or no sense; 10: perfect): "
        "whether they do what is asked, correctly and efficiently, and whether they are easy to "
        "read. Begin with a single line that holds nothing but the two scores, of Assistant 1 and "
        "of Assistant 2, with a space between them. Then explain your rating."
    ),
    Subject.MATH: (
        "First solve the problem yourself, without regard to the answers. Then check the steps of "
        "each answer and its result. End with a pair of scores from 1 to 10, of Assistant 1 and "
        "of Assistant 2, written like (7, 4)."
    ),
}
"""Our words for what the reviews of Vicuna ask; theirs can be read from a file."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question that two models answered."""

    id: str
    text: str
    category: str

    @property
    def subject(self) -> Subject:
        """What kind of review it wants: by its category, as Vicuna's questions have them."""
        known = {"coding": Subject.CODING, "math": Subject.MATH}
        return known.get(self.category, Subject.GENERAL)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What a judge is told, by subject: a system text, and a template of a request.

    Templates have the fields `{question}`, `{answer_1}`, `{answer_2}` and `{prompt}`.
    """

    system: Mapping[Subject, str]
    template: Mapping[Subject, str]
    request: Mapping[Subject, str]

    def messages(self, question: Question, first: str, second: str) -> list[dict[str, str]]:
        """The messages of a request, as OpenAI's API takes them."""
        subject = question.subject
        fields = {
            "{question}": question.text,
            "{answer_1}": first,
            "{answer_2}": second,
            "{prompt}": self.request[subject],
        }
        # In one pass: an answer may hold the name of a field.
        pattern = re.compile("|".join(re.escape(name) for name in fields))
        text = pattern.sub(lambda found: fields[found.group()], self.template[subject])
        return [
            {"role": "system", "content": self.system[subject]},
            {"role": "user", "content": text},
        ]


_TEMPLATE: Final = (
    "[Question]\n{question}\n\n[Answer of Assistant 1]\n{answer_1}\n[End of that answer]\n\n"
    "[Answer of Assistant 2]\n{answer_2}\n[End of that answer]\n\n{prompt}\n"
)
OWN_PROMPTS: Final = Prompts(
    system=dict.fromkeys(Subject, _SYSTEM),
    template=dict.fromkeys(Subject, _TEMPLATE),
    request=_REQUESTS,
)


@dataclass(frozen=True, kw_only=True)
class Rating:
    """One answer of a judge: the scores of the two answers as they stood."""

    question: str
    swapped: bool
    """Whether the rival's answer stood first."""
    first: float
    second: float
    text: str = ""

    @property
    def own(self) -> float:
        """The score of our answer."""
        return self.second if self.swapped else self.first

    @property
    def rival(self) -> float:
        """The score of the rival's answer."""
        return self.first if self.swapped else self.second


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a judge makes of two models over many questions (the paper's Table 3)."""

    n_questions: int
    n_ratings: int
    own: float
    """Sum over the questions of the mean score of our answers."""
    rival: float
    std_error: float
    """Of `relative`, over questions drawn again with replacement."""
    n_wins: int
    """Questions whose mean score is higher for our answer."""
    n_ties: int
    n_losses: int
    position_bias: float
    """Mean score of what stood first, less that of what stood second."""

    @property
    def relative(self) -> float:
        """Our score ÷ the rival's."""
        return self.own / self.rival


def parse_scores(text: str, subject: Subject, *, cut_off: bool = False) -> tuple[float, float]:
    """The two scores of a review.

    | subject | where the scores stand |
    | --- | --- |
    | general, coding | alone on the first line: `9 8.5`, also `9, 8.5`, `9/8.5` and `9 8.` |
    | math | the last pair `(a, b)`, or lines `Assistant 1: a` and `Assistant 2: b` |

    Of mathematics, the pair ends on one of the last two lines that are not empty.

    Guarantees:
        1. No pair stands in for another: where the last one is out of range, there are no scores.
        2. Of a review that was cut off, scores are read only from a first line that is whole.

    Args:
        text: The review.
        subject: Of the question.
        cut_off: Whether the judge had more to say.

    Returns:
        The scores of the first and the second answer, 0 to 10.

    Raises:
        JudgeError: They are not where they should be, out of range, or cut off.
    """
    if subject is Subject.MATH:
        found, where, shown = _last_pair(text), "end", text.strip()[-_CHARS_SHOWN:]
    else:
        line, newline, _ = text.lstrip().partition("\n")
        found, where, shown = _FIRST_LINE.fullmatch(line.strip()), "first line", line[:_CHARS_SHOWN]
        cut_off = cut_off and not newline
    if cut_off:
        msg = f"the judge's {where} is cut off by the limit of its tokens: {shown!r}"
        raise JudgeError(msg)
    scores = [] if found is None else [float(n) for n in found.groups() if n is not None]
    if not scores or not all(_LOWEST <= score <= _HIGHEST for score in scores):
        msg = f"two scores from 0 to 10 are not at the judge's {where}: {shown!r}"
        raise JudgeError(msg)
    first, second = scores
    return first, second


def _last_pair(text: str) -> re.Match[str] | None:
    lines = "\n".join(line for line in text.split("\n") if line.strip())
    pairs = list(_PAIR.finditer(lines))
    if not pairs or lines.count("\n", pairs[-1].end()) >= _N_LAST_LINES:
        return None
    return pairs[-1]


def compare(ratings: Sequence[Rating], *, seed: int = 0) -> Comparison:
    """Put ratings together.

    Guarantees:
        1. A question counts once, however often it was rated; of a question, both orders count
           alike, however often each was rated.

    Args:
        ratings: Of one pair of models; each question in both orders.
        seed: Of the questions drawn again for the standard error.

    Raises:
        JudgeError: No ratings, a question that was rated in one order alone, or a rival without a
            point.
    """
    by_question: dict[str, dict[bool, list[Rating]]] = {}
    for rating in ratings:
        orders = by_question.setdefault(rating.question, {False: [], True: []})
        orders[rating.swapped].append(rating)
    lone = [name for name, orders in by_question.items() if not all(orders.values())]
    if lone or not by_question:
        what = f"question {lone[0]} was rated in one order alone" if lone else "there is no rating"
        msg = f"{what}; judges favour a place, so each pair is asked in both orders"
        raise JudgeError(msg)
    own = np.array([_mean_of(orders, own=True) for orders in by_question.values()])
    rival = np.array([_mean_of(orders, own=False) for orders in by_question.values()])
    if not rival.sum():
        msg = "the rival has no point in any rating: there is nothing to be relative to"
        raise JudgeError(msg)
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = rng.integers(len(own), size=(_N_RESAMPLES, len(own)))
    sums = rival[drawn].sum(axis=1)
    ratios = own[drawn].sum(axis=1)[sums > 0] / sums[sums > 0]
    ahead = own - rival
    return Comparison(
        n_questions=len(own),
        n_ratings=len(ratings),
        own=float(own.sum()),
        rival=float(rival.sum()),
        std_error=float(ratios.std()) if len(own) > 1 else math.nan,
        n_wins=int((ahead > 0).sum()),
        n_ties=int((ahead == 0).sum()),
        n_losses=int((ahead < 0).sum()),
        position_bias=float(np.mean([_bias_of(orders) for orders in by_question.values()])),
    )


def _mean_of(orders: Mapping[bool, Sequence[Rating]], *, own: bool) -> float:
    means = [
        float(np.mean([rating.own if own else rating.rival for rating in ratings]))
        for ratings in orders.values()
    ]
    return sum(means) / len(means)


def _bias_of(orders: Mapping[bool, Sequence[Rating]]) -> float:
    """What the first place is worth in a question; how much better an answer is cancels out."""
    leads = [
        float(np.mean([rating.first - rating.second for rating in ratings]))
        for ratings in orders.values()
    ]
    return sum(leads) / len(leads)


def read_questions(path: Path) -> list[Question]:
    """Questions as Vicuna's file has them: `question_id`, `text`, `category` a line.

    Raises:
        JudgeError: The file cannot be read, holds no question, or holds two with one `question_id`;
            or a line is none.
    """
    questions: dict[str, Question] = {}
    for number, row in _rows(path):
        name = str(_field(row, "question_id", path, number))
        if name in questions:
            msg = (
                f"{path}, line {number}: there is a question {name} above; remove one, or give it "
                "a question_id of its own"
            )
            raise JudgeError(msg)
        questions[name] = Question(
            id=name,
            text=str(_field(row, "text", path, number)),
            category=str(row.get("category", "generic")),
        )
    if not questions:
        msg = f"{path} holds no question: it needs a line with question_id and text for each"
        raise JudgeError(msg)
    return list(questions.values())


def read_answers(path: Path) -> dict[str, str]:
    """Answers by question: `question_id` and `text` a line.

    Raises:
        JudgeError: The file cannot be read, a line holds no answer, or two answer one question.
    """
    answers: dict[str, str] = {}
    for number, row in _rows(path):
        name = str(_field(row, "question_id", path, number))
        if name in answers:
            msg = f"{path}, line {number}: question {name} is answered twice"
            raise JudgeError(msg)
        answers[name] = str(_field(row, "text", path, number))
    return answers


def read_prompts(path: Path) -> Prompts:
    """A judge's prompts as FastChat keeps them: one for each of general, coding and math.

    Raises:
        JudgeError: The file cannot be read, or one of the three is missing.
    """
    rows = {str(row.get("category")): (number, row) for number, row in _rows(path)}
    missing = [subject.value for subject in Subject if subject.value not in rows]
    if missing:
        msg = f"{path} has no prompt for {', '.join(missing)}"
        raise JudgeError(msg)
    found = {subject: rows[subject.value] for subject in Subject}
    defaults = {
        subject: _field(row, "defaults", path, number) for subject, (number, row) in found.items()
    }
    return Prompts(
        system={s: str(_field(row, "system_prompt", path, n)) for s, (n, row) in found.items()},
        template={s: str(_field(row, "prompt_template", path, n)) for s, (n, row) in found.items()},
        request={
            subject: str(values["prompt"]) if isinstance(values, dict) else str(values)
            for subject, values in defaults.items()
        },
    )


def _rows(path: Path) -> list[tuple[int, dict[str, object]]]:
    try:
        # Not splitlines: a text of JSON may hold what ends a line elsewhere, such as U+2028.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read {path}: {error}"
        raise JudgeError(msg) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            msg = f"{path}, line {number}, is not JSON: {error}"
            raise JudgeError(msg) from error
        if not isinstance(row, dict):
            msg = f"{path}, line {number}, is no object"
            raise JudgeError(msg)
        rows.append((number, row))
    return rows


def _field(row: Mapping[str, object], name: str, path: Path, number: int) -> object:
    if name not in row:
        msg = f"{path}, line {number}, has no {name!r}"
        raise JudgeError(msg)
    return row[name]

"""A judge over real HTTP: what is asked, how it is read, what is kept, what follows."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from simulations.cli import app
from simulations.errors import JudgeError
from simulations.judge import KEY_VARIABLE, Judge, ReviewCache, Usage, play, reviews_in
from simulations.judging import (
    OWN_PROMPTS,
    Question,
    Rating,
    Subject,
    compare,
    parse_scores,
    read_answers,
    read_prompts,
    read_questions,
)

QUESTIONS = [
    Question(id="1", text="How do hens sleep?", category="generic"),
    Question(id="2", text="Sort a list.", category="coding"),
    Question(id="3", text="What is 2 + 2?", category="math"),
]
OWN = {question.id: f"own answer {question.id}" for question in QUESTIONS}
RIVAL = {question.id: f"rival answer {question.id}" for question in QUESTIONS}
CONTRADICTED = {
    ("review_bard_vicuna-13b", 70),
    ("review_llama-13b_vicuna-13b", 70),
}
"""Reviews whose recorded scores (10, 2) are not those of their own text (10 and 4)."""


@dataclass
class FakeEndpoint:
    """Serves chat completions on loopback; `say` writes a review, `status` may refuse first."""

    say: Callable[[str], str]
    status: list[int] = field(default_factory=list)
    finish_reason: Callable[[str], str] = lambda _asked: "stop"
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    body: bytes | None = None
    url: str = ""


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    fake = FakeEndpoint(say=fair_review)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name
            pass

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                fake.seen.append(asked)
                fake.headers.append({k.lower(): v for k, v in self.headers.items()})
                status = fake.status.pop(0) if fake.status else 200
            text = fake.say(asked["messages"][-1]["content"])
            reply = {
                "choices": [
                    {
                        "message": {"role": "assistant", "content": text},
                        "finish_reason": fake.finish_reason(text),
                    }
                ],
                "usage": {"prompt_tokens": 100, "completion_tokens": 20},
            }
            data = json.dumps(reply).encode() if fake.body is None else fake.body
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield fake
    server.shutdown()
    server.server_close()


def fair_review(asked: str) -> str:
    """Ours is worth 8, the rival's 6; what stands first gets one more."""
    first = 9 if asked.index("own answer") < asked.index("rival answer") else 7
    second = 15 - 1 - first
    if "solve the problem yourself" in asked:
        return f"We get (10, 4).\nSo I say:\n({first}, {second}) it is."
    return f"{first} {second}\nBecause."


def judge_at(endpoint: FakeEndpoint, **changes: Any) -> Judge:
    return Judge(endpoint=endpoint.url, model="oracle-1", **{"pause_s": 0.0, **changes})


def all_ratings(
    endpoint: FakeEndpoint,
    cache: ReviewCache | None = None,
    *,
    judge: dict[str, Any] | None = None,
    **changes: Any,
):
    return play(
        judge_at(endpoint, **(judge or {})),
        QUESTIONS,
        OWN,
        RIVAL,
        prompts=OWN_PROMPTS,
        cache=cache or ReviewCache(None),
        **changes,
    )


# Scores


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("9 8.5\nGood.", (9.0, 8.5)),
        ("  7, 6\n", (7.0, 6.0)),
        ("7/6", (7.0, 6.0)),
        ("10 1", (10.0, 1.0)),
        ("8 7.\nFine.", (8.0, 7.0)),
        ("8. 7.", (8.0, 7.0)),
    ],
)
def test_general_scores_stand_on_the_first_line(text: str, scores: tuple[float, float]) -> None:
    assert parse_scores(text, Subject.GENERAL) == scores
    assert parse_scores(text, Subject.CODING) == scores


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("The points (2, -2) and (10, 4).\nI give (3, 9).", (3.0, 9.0)),
        ("At (10, 4).\nScores:\nAssistant 1: 10\nAssistant 2: 3/10\n\nFine.", (10.0, 3.0)),
        ("Assistant 1: 1 (wrong)\n\nAssistant 2: 7 (right)\nOutput: (1, 7)", (1.0, 7.0)),
        ("Assistant 1: 1.\nAssistant 2: 7.\n\nThe second is better.\n", (1.0, 7.0)),
    ],
)
def test_scores_of_mathematics_come_last(text: str, scores: tuple[float, float]) -> None:
    assert parse_scores(text, Subject.MATH) == scores


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("", Subject.GENERAL),
        ("Both are fine.\n9 8", Subject.GENERAL),
        ("9 8 7", Subject.GENERAL),
        ("11 8", Subject.GENERAL),
        ("Both are right.", Subject.MATH),
        ("", Subject.MATH),
        ("(12, 40)", Subject.MATH),
        ("I give (3, 9).\nOn the way from (0, 99).", Subject.MATH),
        ("I give (3, 9).\nOn the way to (4, -2).", Subject.MATH),
        ("Assistant 1: 1\nAssistant 2: 7\nOut of 100: (10, 70)", Subject.MATH),
        ("From (2, 1) to (10, 4).\n\nThe first is right.\n\nThe second is wrong.", Subject.MATH),
    ],
)
def test_a_review_without_scores_is_an_error_that_shows_it(text: str, subject: Subject) -> None:
    with pytest.raises(JudgeError, match="two scores from 0 to 10"):
        parse_scores(text, subject)


def test_a_review_that_was_cut_off_has_scores_only_on_a_whole_first_line() -> None:
    assert parse_scores("10 1\nThe fir", Subject.CODING, cut_off=True) == (10.0, 1.0)
    for text, subject in (
        ("10 1", Subject.GENERAL),
        ("(1, 2) and (3, 4), so the slope", Subject.MATH),
    ):
        with pytest.raises(JudgeError, match="is cut off"):
            parse_scores(text, subject, cut_off=True)


def test_recorded_reviews_give_their_recorded_scores(data_dir: Path) -> None:
    folder = data_dir / "vicuna"
    if not (folder / "review").is_dir():
        pytest.skip("no recorded reviews")
    subjects = {q.id: q.subject for q in read_questions(folder / "question.jsonl")}
    n_read, wrong = 0, set()
    for path in sorted((folder / "review").glob("*/*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found = parse_scores(row["text"], subjects[str(row["question_id"])])
            n_read += 1
            if list(found) != [float(score) for score in row["score"]]:
                wrong.add((path.stem, row["question_id"]))
    assert n_read == 780
    assert wrong == CONTRADICTED


# Asking


def test_each_pair_is_rated_three_times_in_each_order(endpoint: FakeEndpoint) -> None:
    match = all_ratings(endpoint)
    assert len(endpoint.seen) == len(match.ratings) == 3 * 2 * 3
    for question in QUESTIONS:
        orders = [r.swapped for r in match.ratings if r.question == question.id]
        assert sorted(orders) == [False] * 3 + [True] * 3
    assert all((r.own, r.rival) in {(9.0, 5.0), (7.0, 7.0)} for r in match.ratings)
    first = endpoint.seen[0]
    assert first["model"] == "oracle-1"
    assert first["temperature"] == 0.2
    assert first["messages"][0]["role"] == "system"
    assert match.usage == Usage(n_requests=18, n_prompt_tokens=1800, n_completion_tokens=360)


def test_the_key_comes_from_the_environment(endpoint, monkeypatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "s3cret")
    all_ratings(endpoint, n_ratings=1)
    assert {headers["authorization"] for headers in endpoint.headers} == {"Bearer s3cret"}
    monkeypatch.delenv(KEY_VARIABLE)
    all_ratings(endpoint, n_ratings=1)
    assert "authorization" not in endpoint.headers[-1]


def test_an_answer_that_names_a_field_stays_as_it_is() -> None:
    messages = OWN_PROMPTS.messages(QUESTIONS[0], "{answer_2} {question}", "B")
    assert "{answer_2} {question}" in messages[1]["content"]


def test_a_busy_endpoint_is_asked_again(endpoint: FakeEndpoint) -> None:
    endpoint.status = [429, 503, 500]
    match = all_ratings(endpoint, n_ratings=1)
    assert len(match.ratings) == 6
    assert len(endpoint.seen) == 9


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b'{"error": "no key"}', "answered 401"),
        (200, b"<html>", "no chat completion"),
        (200, b'{"choices": []}', "no chat completion"),
        (200, b'{"choices": [{"message": {"content": 7}}]}', "without text"),
    ],
)
def test_a_refusal_is_told_at_once(endpoint, status: int, body: bytes, says: str) -> None:
    endpoint.status, endpoint.body = [status] * 50, body
    with pytest.raises(JudgeError, match=says):
        all_ratings(endpoint, n_ratings=1)
    assert len(endpoint.seen) <= 6


def test_an_endpoint_that_is_not_there_is_told() -> None:
    judge = Judge(endpoint="http://127.0.0.1:9/v1", model="m", pause_s=0.0)
    with pytest.raises(JudgeError, match=r"no answer from http://127\.0\.0\.1:9"):
        play(judge, QUESTIONS, OWN, RIVAL, prompts=OWN_PROMPTS, cache=ReviewCache(None))


def unreadable_first(n: int) -> Callable[[str], str]:
    """The first `n` reviews of the list that are asked for hold no scores."""
    left = iter(range(n))

    def say(asked: str) -> str:
        mute = "Sort a list" in asked and next(left, None) is not None
        return "I like both." if mute else fair_review(asked)

    return say


def test_a_review_that_cannot_be_read_is_asked_for_again(endpoint: FakeEndpoint) -> None:
    endpoint.say = unreadable_first(2)
    match = all_ratings(endpoint, judge={"n_parallel": 1})
    assert (len(match.ratings), match.n_unreadable, match.n_from_cache) == (18, 0, 0)
    assert len(endpoint.seen) == match.usage.n_requests == 20


def test_what_stays_unreadable_is_left_out_and_counted(endpoint, tmp_path: Path) -> None:
    endpoint.say = unreadable_first(3)
    path = tmp_path / "reviews.jsonl"
    with reviews_in(path) as cache:
        match = all_ratings(endpoint, cache, n_ratings=4, judge={"n_parallel": 1})
    assert (len(match.ratings), match.n_unreadable, match.left_out) == (23, 1, ())
    assert compare(match.ratings).n_questions == 3
    assert "I like both." not in path.read_text()
    with reviews_in(path) as cache:
        again = all_ratings(endpoint, cache, n_ratings=4)
    assert (len(again.ratings), again.n_unreadable, again.n_from_cache) == (24, 0, 23)


def test_a_question_without_a_rating_in_one_order_is_left_out_and_named(endpoint) -> None:
    endpoint.say = unreadable_first(3)
    questions = [
        QUESTIONS[1],
        *(Question(id=str(n), text="Why?", category="generic") for n in range(10, 20)),
    ]
    own, rival = ({q.id: f"{whose} answer" for q in questions} for whose in ("own", "rival"))
    match = play(
        judge_at(endpoint, n_parallel=1),
        questions,
        own,
        rival,
        prompts=OWN_PROMPTS,
        cache=ReviewCache(None),
        n_ratings=1,
    )
    assert (len(match.ratings), match.n_unreadable, match.left_out) == (20, 1, ("2",))
    assert compare(match.ratings).n_questions == 10


def test_too_many_unreadable_reviews_end_with_what_one_said(endpoint, tmp_path: Path) -> None:
    endpoint.say = unreadable_first(1000)
    path = tmp_path / "reviews.jsonl"
    with (
        reviews_in(path) as cache,
        pytest.raises(JudgeError, match=r"1 of 18 .* 5% .*question 2: .*'I like both\.'"),
    ):
        all_ratings(endpoint, cache)
    assert "I like both." not in path.read_text()
    endpoint.say = fair_review
    with reviews_in(path) as cache:
        assert len(all_ratings(endpoint, cache).ratings) == 18


def test_an_unreadable_review_that_an_earlier_version_kept_is_asked_for(
    endpoint, tmp_path: Path
) -> None:
    path = tmp_path / "reviews.jsonl"
    with reviews_in(path) as cache:
        all_ratings(endpoint, cache)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["text"] = "I like both."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n_known in (17, 18):
        with reviews_in(path) as cache:
            match = all_ratings(endpoint, cache)
        assert (len(match.ratings), match.n_from_cache) == (18, n_known)


def test_mathematics_that_was_cut_off_is_not_read(endpoint: FakeEndpoint) -> None:
    cut = iter(["(1, 2) and (3, 4), so the slope"])
    endpoint.say = lambda asked: (
        next(cut, fair_review(asked)) if "2 + 2" in asked else fair_review(asked)
    )
    endpoint.finish_reason = lambda text: "stop" if "it is" in text else "length"
    match = all_ratings(endpoint)
    assert (len(match.ratings), len(endpoint.seen)) == (18, 19)
    assert (1.0, 2.0) not in {(r.first, r.second) for r in match.ratings}
    assert (3.0, 4.0) not in {(r.first, r.second) for r in match.ratings}


def test_a_completion_without_text_is_an_unreadable_review(endpoint: FakeEndpoint) -> None:
    endpoint.body = b'{"choices": [{"message": {"content": null}}]}'
    with pytest.raises(JudgeError, match="cannot be read"):
        all_ratings(endpoint)


def test_a_missing_answer_is_told_before_anything_is_asked(endpoint: FakeEndpoint) -> None:
    with pytest.raises(JudgeError, match="the rival answers have none to question 1"):
        play(judge_at(endpoint), QUESTIONS, OWN, {}, prompts=OWN_PROMPTS, cache=ReviewCache(None))
    assert endpoint.seen == []


# The cache


def test_what_is_known_is_not_asked_again(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    with reviews_in(path) as cache:
        first = all_ratings(endpoint, cache)
    n_asked = len(endpoint.seen)
    with reviews_in(path) as cache:
        again = all_ratings(endpoint, cache)
    assert len(endpoint.seen) == n_asked
    assert again.ratings == first.ratings
    assert (again.usage, again.n_from_cache) == (Usage(), 18)
    assert again.usage.cost(prompt_price=10.0, completion_price=30.0) == 0.0
    paid = first.usage.cost(prompt_price=10.0, completion_price=30.0)
    assert paid == pytest.approx((1800 * 10 + 360 * 30) / 1e6)


def test_a_line_that_a_kill_cut_short_is_asked_again(endpoint, tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    with reviews_in(path) as cache:
        all_ratings(endpoint, cache)
    path.write_text(path.read_text()[:-30])
    n_asked = len(endpoint.seen)
    for _ in range(2):
        with reviews_in(path) as cache:
            all_ratings(endpoint, cache)
    assert len(endpoint.seen) == n_asked + 1


# Comparing


def test_both_orders_count_alike_and_questions_once() -> None:
    ratings = [
        Rating(question="1", swapped=False, first=8, second=6),
        Rating(question="1", swapped=False, first=8, second=6),
        Rating(question="1", swapped=True, first=7, second=7),
        Rating(question="2", swapped=False, first=5, second=5),
        Rating(question="2", swapped=True, first=5, second=5),
        Rating(question="3", swapped=False, first=2, second=4),
        Rating(question="3", swapped=True, first=4, second=2),
    ]
    found = compare(ratings)
    assert (found.own, found.rival) == (7.5 + 5 + 2, 6.5 + 5 + 4)
    assert found.relative == pytest.approx(14.5 / 15.5)
    assert (found.n_wins, found.n_ties, found.n_losses) == (1, 1, 1)
    assert (found.n_questions, found.n_ratings) == (3, 7)
    assert found.position_bias == pytest.approx((((2 + 2) / 2 + 0) / 2 + 0 + (-2 + 2) / 2) / 3)
    assert compare(ratings) == found
    assert found.std_error > 0
    assert math.isnan(compare(ratings[:3]).std_error)


def test_a_better_answer_is_no_bias_for_a_place() -> None:
    """Also where a review of one order is missing."""
    straight = [Rating(question="1", swapped=False, first=8, second=6)] * 3
    swapped = [Rating(question="1", swapped=True, first=6, second=8)] * 2
    assert compare([*straight, *swapped]).position_bias == 0.0


def test_the_place_of_an_answer_cancels(endpoint: FakeEndpoint) -> None:
    found = compare(all_ratings(endpoint).ratings)
    assert (found.own, found.rival) == (3 * 8.0, 3 * 6.0)
    assert found.position_bias == pytest.approx((4.0 + 0.0) / 2)


@pytest.mark.parametrize(
    ("ratings", "says"),
    [
        ([], "there is no rating"),
        ([Rating(question="1", swapped=False, first=1, second=1)], "in one order alone"),
        (
            [
                Rating(question="1", swapped=False, first=1, second=0),
                Rating(question="1", swapped=True, first=0, second=1),
            ],
            "no point",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(ratings: list[Rating], says: str) -> None:
    with pytest.raises(JudgeError, match=says):
        compare(ratings)


# Files


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"question_id": 1}', "has no 'text'"),
        ("{", "line 1, is not JSON"),
        ("[]", "is no object"),
        ('{"question_id": 1, "text": "a"}\n{"question_id": 1, "text": "b"}', "answered twice"),
    ],
)
def test_a_file_that_holds_no_answers_names_line_and_fault(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(JudgeError, match=says):
        read_answers(path)
    with pytest.raises(JudgeError, match="cannot read"):
        read_answers(tmp_path / "none.jsonl")


def test_the_judges_own_prompts_are_read_from_fastchats_file(data_dir: Path) -> None:
    path = data_dir / "vicuna" / "prompt.jsonl"
    if not path.exists():
        pytest.skip("no prompts")
    prompts = read_prompts(path)
    text = prompts.messages(QUESTIONS[2], "four", "five")[1]["content"]
    assert "What is 2 + 2?" in text
    assert "four" in text
    assert "Python tuple" in text
    assert "{" not in text


# Questions


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no question"),
        (
            '{"question_id": 1, "text": "a"}\n\n{"question_id": "1", "text": "c"}',
            "line 3: there is a question 1 above",
        ),
    ],
)
def test_questions_are_there_and_each_has_an_id_of_its_own(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    with pytest.raises(JudgeError, match=says):
        read_questions(path)


def test_a_text_may_hold_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    row = {"question_id": "1", "text": "a\u2028b\u0085c"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_answers(path) == {"1": "a\u2028b\u0085c"}


# The command


Command = Callable[..., Result]


@pytest.fixture
def command(endpoint: FakeEndpoint, tmp_path: Path, monkeypatch) -> Command:
    """`sheepfold-sim judge` on files that are there: own, rival, a/answers, b/answers."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("own", "rival", "a/answers", "b/answers"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        answers = OWN if name == "own" else RIVAL
        rows = [{"question_id": key, "text": text} for key, text in answers.items()]
        path.write_text("\n".join(map(json.dumps, rows)))

    def invoke(*flags: str, against: tuple[str, ...], n_questions: int = 3) -> Result:
        rows = [{"question_id": q.id, "text": q.text, "category": q.category} for q in QUESTIONS]
        (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows[:n_questions])))
        rivals = [flag for name in against for flag in ("--against", str(tmp_path / name))]
        return CliRunner().invoke(
            app,
            [
                *("judge", str(tmp_path / "own.jsonl"), *rivals, "--model", "oracle-1"),
                *("--questions", str(tmp_path / "questions.jsonl"), "--endpoint", endpoint.url),
                *(
                    "--cache",
                    str(tmp_path / "reviews.jsonl"),
                    "--json",
                    str(tmp_path / "found.json"),
                ),
                *flags,
            ],
        )

    return invoke


def test_the_command_prints_the_papers_columns(command: Command, tmp_path: Path) -> None:
    result = command("--prompt-price", "10", "--completion-price", "30", against=("rival.jsonl",))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["against"]["rival"]["relative"] == pytest.approx(8 / 6)
    assert found["against"]["rival"]["n_unreadable"] == 0
    assert found["cost"] == pytest.approx(0.0288)
    assert "1.333 ± 0.000" in result.output
    assert "3 / 0 / 0" in result.output


def test_the_command_counts_what_is_unreadable(endpoint, command: Command, tmp_path: Path) -> None:
    endpoint.say = unreadable_first(3)
    result = command("--ratings", "4", "--parallel", "1", against=("rival.jsonl",))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())["against"]["rival"]
    assert (found["n_unreadable"], found["n_ratings"], found["left_out"]) == (1, 23, [])
    (row,) = (line for line in result.output.splitlines() if "3 / 0 / 0" in line)
    assert row.rstrip(" │").endswith(" 1")


def test_one_question_has_no_standard_error(command: Command, tmp_path: Path) -> None:
    result = command(against=("rival.jsonl",), n_questions=1)
    assert result.exit_code == 0, result.output
    assert "1.333 ± –" in result.output
    assert (
        json.loads((tmp_path / "found.json").read_text())["against"]["rival"]["std_error"] is None
    )


def test_rivals_of_one_name_are_told_apart_by_their_folders(command, tmp_path: Path) -> None:
    result = command(against=("a/answers.jsonl", "b/answers.jsonl", "rival.jsonl"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["against"]) == ["a/answers", "b/answers", "rival"]


def test_a_rival_that_is_named_twice_is_refused_before_anything_is_asked(
    endpoint: FakeEndpoint, command: Command
) -> None:
    result = command(against=("a/answers.jsonl", "a/answers.jsonl"))
    assert result.exit_code == 2
    assert "rename one" in result.output
    assert command(against=("a/answers.jsonl", "none.jsonl")).exit_code == 1
    assert endpoint.seen == []

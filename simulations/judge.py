"""Asks a judge behind any OpenAI-compatible endpoint; what it said is kept and not paid for twice.

The only module of the laboratory that speaks HTTP.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

import requests
import tenacity

from protocol.wire import JsonValue, canonical_json
from simulations.errors import JudgeError
from simulations.judging import N_RATINGS, Prompts, Question, Rating, parse_scores

KEY_VARIABLE: Final = "SHEEPFOLD_JUDGE_KEY"
"""Environment variable with the endpoint's key; never a flag, which others could read."""
_TIMEOUT_S: Final = (10.0, 120.0)
_N_TRIES: Final = 6
_LONGEST_PAUSE_S: Final = 60.0
_N_ASKED: Final = 3
MAX_UNREADABLE_FRAC: Final = 0.05
"""Of all ratings of a match; a judge that says more that cannot be read is not the one to ask."""
_BUSY: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_OK: Final = 200
_CHARS_SHOWN: Final = 200


class _TryAgainError(JudgeError):
    """What may pass: no answer, or an endpoint that is busy."""


class _UnreadableError(JudgeError):
    """A review without scores, though it was asked for several times."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens that a run was charged for; what came from the cache is not in it."""

    n_requests: int = 0
    n_prompt_tokens: int = 0
    n_completion_tokens: int = 0

    def plus(self, other: "Usage") -> "Usage":
        """Both together."""
        return Usage(
            n_requests=self.n_requests + other.n_requests,
            n_prompt_tokens=self.n_prompt_tokens + other.n_prompt_tokens,
            n_completion_tokens=self.n_completion_tokens + other.n_completion_tokens,
        )

    def cost(self, *, prompt_price: float, completion_price: float) -> float:
        """In the unit of the prices, which are for a million tokens."""
        return (
            self.n_prompt_tokens * prompt_price + self.n_completion_tokens * completion_price
        ) / 1e6


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A judge: an endpoint, a model of its, and how it is asked.

    Attributes:
        endpoint: Up to and without `/chat/completions`.
        model: As the endpoint names it.
        temperature: Vicuna's reviews were made at 0.2.
        max_tokens: Of a review.
        n_parallel: Requests at once.
        pause_s: First pause before a request is tried again; it doubles.
    """

    endpoint: str
    model: str
    temperature: float = 0.2
    max_tokens: int = 1024
    n_parallel: int = 4
    pause_s: float = 1.0


class ReviewCache:
    """Reviews by what was asked, in a file that grows; a run that ends early goes on with it.

    Guarantees:
        1. A review is in the file before it counts.
        2. A line that a kill cut short is left out, and asked for again.

    Args:
        path: JSON Lines; None: nothing is kept.

    Raises:
        JudgeError: The file cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        """Read what is there."""
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        self._file: IO[str] | None = None
        if path is None:
            return
        try:
            whole = path.read_text(encoding="utf-8") if path.exists() else ""
            for line in whole.splitlines():
                try:
                    row = json.loads(line)
                    self._known[str(row["key"])] = str(row["text"])
                except (ValueError, KeyError, TypeError):
                    continue
            self._file = path.open("a", encoding="utf-8")
            if whole and not whole.endswith("\n"):
                self._file.write("\n")
        except (OSError, UnicodeDecodeError) as error:
            msg = f"cannot keep reviews in {path}: {error}"
            raise JudgeError(msg) from error

    def get(self, key: str) -> str | None:
        """A review that is known."""
        with self._lock:
            return self._known.get(key)

    def put(self, key: str, text: str) -> None:
        """Keep a review."""
        with self._lock:
            if self._file is not None:
                self._file.write(json.dumps({"key": key, "text": text}) + "\n")
                self._file.flush()
                os.fsync(self._file.fileno())
            self._known[key] = text

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


@contextmanager
def reviews_in(path: Path | None) -> Iterator[ReviewCache]:
    """A cache for as long as the context is open."""
    cache = ReviewCache(path)
    try:
        yield cache
    finally:
        cache.close()


@dataclass(frozen=True, kw_only=True)
class Match:
    """All ratings of two models, and what they cost."""

    ratings: tuple[Rating, ...]
    usage: Usage
    n_from_cache: int
    n_unreadable: int
    """Ratings that are not there, for their reviews stayed without scores."""
    left_out: tuple[str, ...]
    """Questions that have no rating in one of the orders, and so none here."""


@dataclass(frozen=True, kw_only=True)
class _Request:
    question: Question
    swapped: bool
    repeat: int
    messages: list[dict[str, str]] = field(repr=False)


def play(
    judge: Judge,
    questions: Sequence[Question],
    own: Mapping[str, str],
    rival: Mapping[str, str],
    *,
    prompts: Prompts,
    cache: ReviewCache,
    n_ratings: int = N_RATINGS,
    on_done: Callable[[int, int], None] = lambda _done, _total: None,
) -> Match:
    """Have a judge rate the answers of two models, each pair in both orders.

    Guarantees:
        1. Each question is rated `n_ratings` times in each order, and no request that the cache
           knows is sent.
        2. A review whose scores cannot be read is not kept, and asked for up to twice more; then
           its rating is left out and counted.
        3. A question that has so lost all ratings in one order is left out, and named.
        4. No more than `MAX_UNREADABLE_FRAC` of the ratings is left out.

    Args:
        judge: Whom to ask.
        questions: At least one.
        own: Our answers by question.
        rival: The other model's.
        prompts: What the judge is told.
        cache: Of reviews.
        n_ratings: Of each order.
        on_done: Told how many of how many ratings are done.

    Raises:
        JudgeError: An answer is missing, the endpoint refuses or does not answer, or too many
            reviews cannot be read.
    """
    for name, answers in (("own", own), ("rival", rival)):
        missing = [question.id for question in questions if question.id not in answers]
        if missing:
            msg = f"the {name} answers have none to question {missing[0]} ({len(missing)} missing)"
            raise JudgeError(msg)
    pending = [
        _Request(
            question=question,
            swapped=swapped,
            repeat=repeat,
            messages=prompts.messages(
                question,
                (rival if swapped else own)[question.id],
                (own if swapped else rival)[question.id],
            ),
        )
        for question in questions
        for swapped in (False, True)
        for repeat in range(n_ratings)
    ]
    client = _Client(judge, cache)
    ratings: list[Rating] = []
    n_unreadable = 0
    with ThreadPoolExecutor(judge.n_parallel) as pool:
        futures = [pool.submit(client.rating, request) for request in pending]
        try:
            for future in futures:
                try:
                    ratings.append(future.result())
                except _UnreadableError as error:
                    n_unreadable += 1
                    if n_unreadable > MAX_UNREADABLE_FRAC * len(pending):
                        raise _too_many(n_unreadable, len(pending), error) from error
                on_done(len(ratings) + n_unreadable, len(pending))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    rated = {(rating.question, rating.swapped) for rating in ratings}
    left_out = {q.id for q in questions if not {(q.id, False), (q.id, True)} <= rated}
    return Match(
        ratings=tuple(rating for rating in ratings if rating.question not in left_out),
        usage=client.usage,
        n_from_cache=client.n_from_cache,
        n_unreadable=n_unreadable,
        left_out=tuple(q.id for q in questions if q.id in left_out),
    )


def _too_many(n_unreadable: int, n_ratings: int, last: _UnreadableError) -> JudgeError:
    return JudgeError(
        f"{n_unreadable} of {n_ratings} reviews cannot be read, each asked for {_N_ASKED} times, "
        f"and at most {MAX_UNREADABLE_FRAC:.0%} are left out: ask another model, or let reviews be "
        f"longer (--max-tokens). The last one, {last}"
    )


def _rating(request: _Request, text: str, *, cut_off: bool = False) -> Rating:
    question = request.question
    try:
        first, second = parse_scores(text, question.subject, cut_off=cut_off)
    except JudgeError as error:
        msg = f"question {question.id}: {error}"
        raise _UnreadableError(msg) from error
    return Rating(
        question=question.id, swapped=request.swapped, first=first, second=second, text=text
    )


class _Client:
    """Sends requests; safe to be used by several threads."""

    def __init__(self, judge: Judge, cache: ReviewCache) -> None:
        self._judge = judge
        self._cache = cache
        self._lock = threading.Lock()
        self._headers = {"Accept-Encoding": "identity"}
        key = os.environ.get(KEY_VARIABLE)
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self.usage = Usage()
        self.n_from_cache = 0

    def rating(self, request: _Request) -> Rating:
        body: dict[str, JsonValue] = {
            "model": self._judge.model,
            "messages": [dict(message) for message in request.messages],
            "temperature": self._judge.temperature,
            "max_tokens": self._judge.max_tokens,
        }
        asked = canonical_json([self._judge.endpoint, body, request.repeat])
        key = hashlib.sha256(asked).hexdigest()
        known = self._cache.get(key)
        if known is not None:
            # What an earlier version kept may be unreadable.
            with suppress(_UnreadableError):
                rating = _rating(request, known)
                with self._lock:
                    self.n_from_cache += 1
                return rating
        busy = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TryAgainError),
            wait=tenacity.wait_exponential(multiplier=self._judge.pause_s, max=_LONGEST_PAUSE_S),
            stop=tenacity.stop_after_attempt(_N_TRIES),
            reraise=True,
        )
        unreadable = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_UnreadableError),
            stop=tenacity.stop_after_attempt(_N_ASKED),
            reraise=True,
        )
        rating = unreadable(lambda: self._rate(request, busy(self._ask, body)))
        self._cache.put(key, rating.text)
        return rating

    def _rate(self, request: _Request, reply: "_Reply") -> Rating:
        with self._lock:
            self.usage = self.usage.plus(reply.usage)
        return _rating(request, reply.text, cut_off=reply.cut_off)

    def _ask(self, body: Mapping[str, JsonValue]) -> "_Reply":
        url = self._judge.endpoint.rstrip("/") + "/chat/completions"
        try:
            response = requests.post(
                url, json=body, headers=self._headers, timeout=_TIMEOUT_S, allow_redirects=False
            )
        except requests.RequestException as error:
            msg = f"no answer from {url}: {type(error).__name__}"
            raise _TryAgainError(msg) from error
        if response.status_code != _OK:
            said = response.text[:_CHARS_SHOWN]
            msg = f"{url} answered {response.status_code}: {said!r}"
            if response.status_code in _BUSY:
                raise _TryAgainError(msg)
            raise JudgeError(msg)
        return _read_reply(url, response.content)


@dataclass(frozen=True, kw_only=True)
class _Reply:
    text: str
    cut_off: bool
    usage: Usage


def _read_reply(url: str, content: bytes) -> _Reply:
    try:
        reply = json.loads(content)
        choice = reply["choices"][0]
        text = choice["message"]["content"]
        if text is None:  # refused, or no token was left after thinking: nothing to read
            text = ""
        cut_off = choice.get("finish_reason") == "length"
        told = reply.get("usage") or {}
        usage = Usage(
            n_requests=1,
            n_prompt_tokens=int(told.get("prompt_tokens", 0)),
            n_completion_tokens=int(told.get("completion_tokens", 0)),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        msg = f"{url} gave no chat completion: {content[:_CHARS_SHOWN]!r}"
        raise JudgeError(msg) from error
    if not isinstance(text, str):
        msg = f"{url} gave a completion without text: {content[:_CHARS_SHOWN]!r}"
        raise JudgeError(msg)
    return _Reply(text=text, cut_off=cut_off, usage=usage)

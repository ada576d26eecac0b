"""From records to token sequences of bounded length, with a mask of what carries loss.

Prompt and response are tokenised apart. Tokenised as one text, letters of the response may merge
with the end of the prompt into one token: the boundary of the loss would then lie inside a token,
and the model would be trained on prompts that it never meets when it is asked, where the prompt
stands alone.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from edge_agent.data.records import (
    Malformed,
    MalformedLog,
    OnMalformed,
    Record,
    dataset_digest,
)
from edge_agent.data.templates import Piece, Segment, make_renderer
from edge_agent.errors import DataError, MalformedRecordError, TemplateError
from protocol.blocks import LossOn, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Example:
    """A record as tokens.

    Attributes:
        input_ids: int32 [T], T at most `max_length`; read-only.
        loss_mask: bool [T], True where the token is predicted with loss; never at 0, which has
            nothing to be predicted from; somewhere True; read-only.
        source: where the record stands.
        category: the record's.
        truncated: whether a part of the record was cut to fit.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    source: str
    category: str | None
    truncated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenReport:
    """What tokenising records gave.

    Attributes:
        n_records: records given.
        n_malformed: records that the template has no place for, left out.
        n_truncated: examples of which a part was cut.
        n_prompt_cut: of these, with context or instruction cut.
        n_response_cut: of these, with the response cut; both may be.
        malformed: the first few of those left out.
    """

    n_records: int
    n_malformed: int
    n_truncated: int
    n_prompt_cut: int
    n_response_cut: int
    malformed: tuple[Malformed, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenizedData:
    """Examples to train or to evaluate on.

    Attributes:
        examples: in the records' order; at least one.
        report: what was cut and left out.
        digest: `dataset_digest` of all records given: it depends on neither the tokenizer nor
            the template.
    """

    examples: tuple[Example, ...]
    report: TokenReport
    digest: str

    @property
    def n_examples(self) -> int:
        """Number of examples."""
        return len(self.examples)


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedTokens:
    """A record as tokens, and what was cut.

    Attributes:
        input_ids: token ids, T of them.
        loss_mask: T flags, as in `Example`.
        prompt_cut: whether context or instruction was cut.
        response_cut: whether the response was cut.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    prompt_cut: bool
    response_cut: bool


def tokenize(
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template: Template,
    loss_on: LossOn,
    max_length: int,
    on_malformed: OnMalformed = OnMalformed.SKIP,
) -> TokenizedData:
    """Turn records into examples; see `RecordTokenizer` for the rules.

    Args:
        records: at least one.
        tokenizer: the base model's.
        template: how a record becomes a prompt.
        loss_on: whether the response alone carries loss, or every token.
        max_length: tokens an example may have.
        on_malformed: whether a record that the template has no place for is skipped and counted,
            or fatal.

    Returns:
        The examples, at least one, and the report.

    Raises:
        MalformedRecordError: a record is malformed and `on_malformed` is FAIL.
        TemplateError: the tokenizer lacks what the template needs, or `max_length` is too small.
        DataError: no record is given, or none can be used.
    """
    if not records:
        msg = "there are no records to tokenise"
        raise DataError(msg)
    worker = RecordTokenizer(tokenizer, template=template, loss_on=loss_on, max_length=max_length)
    log = MalformedLog(on_malformed)
    examples: list[Example] = []
    n_prompt_cut = n_response_cut = 0
    for record in records:
        try:
            fitted = worker.fit(record)
        except MalformedRecordError as error:
            log.add(error)
            continue
        n_prompt_cut += fitted.prompt_cut
        n_response_cut += fitted.response_cut
        examples.append(_make_example(record, fitted))
    if not examples:
        msg = f"none of the {len(records)} records fits the template; the first, "
        raise DataError(msg + f"{log.first[0].location}: {log.first[0].reason}")
    report = TokenReport(
        n_records=len(records),
        n_malformed=log.n_malformed,
        n_truncated=sum(example.truncated for example in examples),
        n_prompt_cut=n_prompt_cut,
        n_response_cut=n_response_cut,
        malformed=log.first,
    )
    return TokenizedData(examples=tuple(examples), report=report, digest=dataset_digest(records))


def tokenize_as_needed(
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template: Template,
    loss_on: LossOn,
    max_length: int,
) -> Sequence[Example]:
    """The examples of `tokenize`, each made when it is first asked for: a few steps need but a few.

    Where a record may turn out to be malformed, all are made at once: of chats, and of the chat
    template.

    Args:
        records: at least one.
        tokenizer: the base model's.
        template: how a record becomes a prompt.
        loss_on: whether the response alone carries loss, or every token.
        max_length: tokens an example may have.

    Returns:
        The examples, at least one.

    Raises:
        TemplateError: the tokenizer lacks what the template needs. That `max_length` is too small
            for a record is raised when its example is asked for.
        DataError: no record is given, or none can be used.
    """
    may_be_malformed = any(record.messages is not None for record in records)
    if not records or may_be_malformed or template is not Template.ALPACA:
        return tokenize(
            records, tokenizer, template=template, loss_on=loss_on, max_length=max_length
        ).examples
    worker = RecordTokenizer(tokenizer, template=template, loss_on=loss_on, max_length=max_length)
    return _ExamplesAsNeeded(records, worker)


class RecordTokenizer:
    """Tokenises records by one template, tokenizer and length.

    Guarantees:
        1. The tokens of a prompt are those of the prompt alone: they do not depend on the
           response, and `prompt` gives the same ones.
        2. A response that is not cut ends with the end-of-text token, which carries loss. With
           the chat template every assistant turn carries loss up to its end-of-text token.
        3. The token that begins a sequence is there once if the tokenizer adds it by itself; with
           the chat template, if the template writes it.
        4. A control token spelt out in a record becomes letters.
        5. No example is longer than `max_length`. Of a record too long, first the end of the
           context gives way, then the end of the instruction, until the response has all its
           tokens or half of `max_length`; then the end of the response does. The template's own
           words and the beginnings of all three stay. Of a chat of several turns the end is cut.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        template: Template,
        loss_on: LossOn,
        max_length: int,
    ) -> None:
        """Prepare.

        Args:
            tokenizer: the base model's.
            template: how a record becomes a prompt.
            loss_on: whether the response alone carries loss, or every token.
            max_length: tokens an example may have.

        Raises:
            TemplateError: the tokenizer has no end-of-text token, or no chat template and one is
                asked for.
        """
        if tokenizer.eos_token_id is None:
            msg = "this base model's tokenizer has no end-of-text token: responses could not end"
            raise TemplateError(msg)
        self._tokenizer = tokenizer
        self._eos_id = int(tokenizer.eos_token_id)
        self._renderer = make_renderer(template, tokenizer)
        self._added = tokenizer.added_tokens_encoder  # built anew at each access
        self._loss_on = loss_on
        self._max_length = max_length
        self._newline = self._plain("\n", literal=False)
        self._bos = [] if self._renderer.bos_is_written else self._bos_by_convention()

    def fit(self, record: Record) -> FittedTokens:
        """Tokenise a record to at most `max_length` tokens.

        Args:
            record: a record.

        Returns:
            Its tokens, mask and cuts.

        Raises:
            MalformedRecordError: the template has no place for it, or, of a chat of several
                turns, the first response lies beyond `max_length`.
            TemplateError: `max_length` is too small for the template.
        """
        segments = self._renderer.render(record)
        if record.messages is not None:
            return self._fit_chat(record, segments)
        prompt = self._encode(segments[:-1])
        response = self._encode_response(segments[-1])
        prompt_cut = response_cut = False
        if len(prompt) + len(response) > self._max_length:
            room = self._max_length - min(len(response), self._max_length // 2)
            prompt_cut = len(prompt) > room
            if prompt_cut:
                prompt = self._shortened_prompt(record, room)
            room = self._max_length - len(prompt)
            response_cut = len(response) > room
            response = response[:room]
        return FittedTokens(
            input_ids=prompt + response,
            loss_mask=self._mask([False] * len(prompt) + [True] * len(response)),
            prompt_cut=prompt_cut,
            response_cut=response_cut,
        )

    def prompt(self, record: Record, *, max_tokens: int) -> list[int]:
        """Tokenise what the model is given before the record's (last) response.

        Args:
            record: a record.
            max_tokens: how many tokens it may have; cut as `fit` cuts.

        Returns:
            Token ids, at most `max_tokens`.

        Raises:
            MalformedRecordError: the template has no place for it, or it is a chat of several
                turns that is longer.
            TemplateError: `max_tokens` is too small for the template.
        """
        prompt = self._encode(self._renderer.render(record)[:-1])
        if len(prompt) <= max_tokens:
            return prompt
        if record.messages is not None:
            reason = f"the chat before its last response has {len(prompt)} of {max_tokens} tokens"
            raise MalformedRecordError(record.source, reason)
        return self._shortened_prompt(record, max_tokens)

    def _fit_chat(self, record: Record, segments: Sequence[Segment]) -> FittedTokens:
        """Tokenise a chat of several turns; its end is cut."""
        ids: list[int] = []
        mask: list[bool] = []
        for segment in segments:
            is_last = segment is segments[-1]
            new = (
                self._encode_response(segment)
                if is_last
                else self._encode([segment], begins=not ids)
            )
            if not segment.is_response:
                carries_loss = 0
            elif is_last or self._eos_id not in new:
                carries_loss = len(new)
            else:  # what the template writes between the turn's end and the next is never said
                carries_loss = len(new) - new[::-1].index(self._eos_id)
            ids += new
            mask += [True] * carries_loss + [False] * (len(new) - carries_loss)
        n_kept = min(len(ids), self._max_length)
        if not any(mask[:n_kept]):
            reason = f"its first response begins beyond max_length = {self._max_length} tokens"
            raise MalformedRecordError(record.source, reason)
        return FittedTokens(
            input_ids=ids[:n_kept],
            loss_mask=self._mask(mask[:n_kept]),
            prompt_cut=False,
            response_cut=n_kept < len(ids),
        )

    def _shortened_prompt(self, record: Record, room: int) -> list[int]:
        """Cut the end of the context, then that of the instruction, until the prompt has room."""

        def encode_with(shorter: Record) -> list[int]:
            return self._encode(self._renderer.render(shorter)[:-1])

        def longest_that_fits(shorten: Callable[[int], Record], n_chars: int) -> list[int] | None:
            """Encode with as many characters as fit; None if not even the fewest do."""
            # The last length that bisection accepted was measured, so it fits even though one
            # more character can, rarely, make a token fewer.
            found = bisect_right(range(n_chars), room, key=lambda n: len(encode_with(shorten(n))))
            return encode_with(shorten(found - 1)) if found else None

        if record.context:
            prompt = longest_that_fits(
                lambda n: replace(record, context=record.context[:n]), len(record.context)
            )
            if prompt is not None:
                return prompt
        prompt = longest_that_fits(
            lambda n: replace(record, context="", instruction=record.instruction[: n + 1]),
            len(record.instruction),
        )
        if prompt is None:
            msg = (
                f"{record.source}: the template alone takes more than the {room} tokens left for "
                f"the prompt: max_length = {self._max_length} is too small"
            )
            raise TemplateError(msg)
        return prompt

    def _mask(self, carries_loss: list[bool]) -> list[bool]:
        """Return the mask of a whole sequence, by what the manifest asks."""
        everything = self._loss_on is LossOn.ALL
        return [False, *(everything or loss for loss in carries_loss[1:])]

    def _encode_response(self, segment: Segment) -> list[int]:
        """Return the ids of the last response up to its end-of-text token, written or appended."""
        ids = self._encode([segment], begins=False)
        end = ids.index(self._eos_id) if self._eos_id in ids else len(ids)
        return [*ids[:end], self._eos_id]

    def _encode(self, segments: Iterable[Segment], *, begins: bool = True) -> list[int]:
        """Return the ids of segments one after the other."""
        ids = list(self._bos) if begins else []
        for segment in segments:
            for piece in segment.pieces:
                ids += self._encode_piece(piece, first=begins)
                begins = False
        return ids

    def _encode_piece(self, piece: Piece, *, first: bool) -> list[int]:
        """Return the ids of a piece as they are at the start of a text, or within one."""
        token = self._added.get(piece.text) if piece.literal else None
        text = piece.text
        if not first:
            # At the start of a text SentencePiece writes a blank that is not there; after a line
            # break it does not.
            ids = self._plain("\n" + text, literal=piece.literal)
            if ids[: len(self._newline)] == self._newline and token not in ids:
                return ids[len(self._newline) :]
        ids = self._plain(text, literal=piece.literal)
        if token not in ids:
            return ids
        # Not a special token to the tokenizer, so it cannot be told to split it: do it here.
        return self._plain(text[:1], literal=True) + self._plain(text[1:], literal=True)

    def _plain(self, text: str, *, literal: bool) -> list[int]:
        """Return the ids of a text, with nothing added in front or behind."""
        encoded = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=literal, verbose=False
        )
        return list(encoded["input_ids"])

    def _bos_by_convention(self) -> list[int]:
        """Return what the tokenizer puts in front of a text by itself."""
        bare = self._plain("a", literal=False)
        whole = list(self._tokenizer("a", verbose=False)["input_ids"])
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[: next(starts, 0)]


def _make_example(record: Record, fitted: FittedTokens) -> Example:
    input_ids = np.array(fitted.input_ids, dtype=np.int32)
    loss_mask = np.array(fitted.loss_mask, dtype=np.bool_)
    input_ids.flags.writeable = False
    loss_mask.flags.writeable = False
    return Example(
        input_ids=input_ids,
        loss_mask=loss_mask,
        source=record.source,
        category=record.category,
        truncated=fitted.prompt_cut or fitted.response_cut,
    )


class _ExamplesAsNeeded(Sequence[Example]):
    """Makes each example once, from a record that has a place in the template."""

    def __init__(self, records: Sequence[Record], worker: RecordTokenizer) -> None:
        self._items: list[Record | Example] = [*records]
        self._worker = worker

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        item = self._items[index]
        if isinstance(item, Record):
            item = self._items[index] = _make_example(item, self._worker.fit(item))
        return item

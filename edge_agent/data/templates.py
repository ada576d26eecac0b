"""From a record to text: the Alpaca prompt, or the tokenizer's own chat template.

A rendered record is a sequence of segments that alternate between what the model is given and what
it should say. Within a segment, pieces are marked *literal* where text of the record spells a
control token (`</s>`, `<|im_start|>`): there the tokenizer must see letters, not the token, or a
record could end a turn or open one in the system's name.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from jinja2 import TemplateError as JinjaError

from edge_agent.data.records import ChatMessage, Record, Role
from edge_agent.errors import MalformedRecordError, TemplateError
from protocol.blocks import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
)
"""The prompt of a record with a context, as FedIT took it from Alpaca-LoRA.

Stanford's original has the same words and no line break after `### Response:`.
"""

ALPACA_WITHOUT_INPUT: Final = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The prompt of a record whose context is empty."""

# Two of the code points that Unicode reserves for use inside a program: no text should hold them.
_OPEN: Final = "\ufdd0"
_CLOSE: Final = "\ufdd1"
_MARKED: Final = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stretch of text that is tokenised in one go.

    Attributes:
        text: not empty.
        literal: whether control tokens that it spells are to be read as letters.
    """

    text: str
    literal: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """What the model is given at one point, or what it should say.

    Attributes:
        pieces: its text in order.
        is_response: whether the model should say it.
    """

    pieces: tuple[Piece, ...]
    is_response: bool


class Renderer(Protocol):
    """Turns records into segments."""

    bos_is_written: bool
    """Whether the rendered text itself decides about the token that begins a sequence."""

    def render(self, record: Record) -> tuple[Segment, ...]:
        """Render a record.

        Args:
            record: a record; one without `messages` gives one prompt and one response.

        Returns:
            Prompt and response segments in turn, a response last.

        Raises:
            MalformedRecordError: the template has no place for this record.
        """


class AlpacaRenderer:
    """The Alpaca prompt, one instruction and one response.

    All of it is literal: the template has no control tokens of its own.

    Source: Stanford Alpaca; FedIT, arXiv 2305.05644, table 1.
    """

    bos_is_written = False

    def render(self, record: Record) -> tuple[Segment, ...]:
        """Render a record; see `Renderer`.

        Args:
            record: a record that is not a chat.

        Returns:
            The prompt and the response.

        Raises:
            MalformedRecordError: it is a chat of several turns or with a system turn.
        """
        if record.messages is not None:
            reason = (
                "a chat of several turns or with a system message has no place in the alpaca "
                "template: use the chat template"
            )
            raise MalformedRecordError(record.source, reason)
        template = ALPACA_WITH_INPUT if record.context else ALPACA_WITHOUT_INPUT
        prompt = template.format(instruction=record.instruction, context=record.context)
        return (
            Segment(pieces=(Piece(text=prompt, literal=True),), is_response=False),
            Segment(pieces=(Piece(text=record.response, literal=True),), is_response=True),
        )


class ChatRenderer:
    """The chat template that comes with a tokenizer.

    A record that is not a chat becomes one user turn, its context after a blank line, and one
    assistant turn. Every assistant turn is a response: what the template writes after the cue for
    the assistant to speak (`add_generation_prompt`), its closing mark included.
    """

    bos_is_written = True

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Take a tokenizer's template.

        Args:
            tokenizer: the base model's.

        Raises:
            TemplateError: it has no chat template.
        """
        template = tokenizer.chat_template
        if not isinstance(template, str):
            msg = "this base model's tokenizer has no chat template: use the alpaca template"
            raise TemplateError(msg)
        self._tokenizer = tokenizer
        self._control = _control_pattern(tokenizer, template)

    def render(self, record: Record) -> tuple[Segment, ...]:
        """Render a record; see `Renderer`.

        Args:
            record: any record.

        Returns:
            Prompt and response segments in turn.

        Raises:
            MalformedRecordError: the template refuses the record, renders an earlier turn
                otherwise once later ones follow, or the record holds U+FDD0 or U+FDD1.
        """
        turns = [self._mark(turn, record.source) for turn in _turns(record)]
        whole = self._apply(turns, record.source, cue=False)
        segments: list[Segment] = []
        done = ""
        for index, turn in enumerate(turns):
            if turn["role"] != Role.ASSISTANT.value:
                continue
            for upto, cue in ((index, True), (index + 1, False)):
                text = self._apply(turns[:upto], record.source, cue=cue)
                if not (text.startswith(done) and whole.startswith(text)):
                    reason = f"the chat template rewrites messages[{index}] once others follow it"
                    raise MalformedRecordError(record.source, reason)
                pieces = tuple(_split_marked(text[len(done) :], record.source))
                segments.append(Segment(pieces=pieces, is_response=not cue))
                done = text
        return tuple(segments)

    def _mark(self, turn: ChatMessage, source: str) -> dict[str, str]:
        """Wrap the control tokens that a turn spells; the marks survive the template."""
        if _OPEN in turn.content or _CLOSE in turn.content:
            reason = "holds U+FDD0 or U+FDD1, which Unicode keeps out of texts"
            raise MalformedRecordError(source, reason)
        content = self._control.sub(f"{_OPEN}\\g<0>{_CLOSE}", turn.content)
        return {"role": turn.role.value, "content": content}

    def _apply(self, turns: Sequence[dict[str, str]], source: str, *, cue: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=cue
            )
        except JinjaError as error:
            reason = f"the chat template refuses this chat: {error}"
            raise MalformedRecordError(source, reason) from error
        return str(text)


def make_renderer(template: Template, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Make the renderer that a manifest asks for.

    Args:
        template: the manifest's.
        tokenizer: the base model's.

    Returns:
        The renderer.

    Raises:
        TemplateError: the tokenizer has no chat template and one is asked for.
    """
    return ChatRenderer(tokenizer) if template is Template.CHAT else AlpacaRenderer()


def _turns(record: Record) -> tuple[ChatMessage, ...]:
    if record.messages is not None:
        return record.messages
    question = record.instruction
    if record.context:
        question = f"{record.instruction}\n\n{record.context}"
    return (
        ChatMessage(role=Role.USER, content=question),
        ChatMessage(role=Role.ASSISTANT, content=record.response),
    )


def _control_pattern(tokenizer: "PreTrainedTokenizerBase", template: str) -> re.Pattern[str]:
    """Match the special tokens, and the added ones that the template writes, longest first."""
    added = tokenizer.added_tokens_decoder.values()
    control = [
        str(token.content)
        for token in added
        if token.special or (token.content in template and not token.content.isspace())
    ]
    longest_first = sorted(control, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _split_marked(text: str, source: str) -> Iterator[Piece]:
    """Cut rendered text at the marks of `ChatRenderer._mark`, which are dropped."""
    for index, part in enumerate(_MARKED.split(text)):
        if _OPEN in part or _CLOSE in part:
            reason = "the chat template takes apart a control token that the record spells out"
            raise MalformedRecordError(source, reason)
        if part:
            yield Piece(text=part, literal=index % 2 == 1)

"""Ask a finished adapter: the base in NF4, the adapter on it, the prompt as in training.

The tokens come one by one from a loop of our own, so that text can be shown as it is said and so
that sampling draws from a generator of its own.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

import torch

from edge_agent.data.records import ChatMessage, Record, Role
from edge_agent.data.tokens import RecordTokenizer
from edge_agent.errors import EvaluationError, MalformedRecordError, OutOfMemoryError
from protocol.blocks import LossOn, Template
from quant.base_model import LoadedBase, load_base
from quant.errors import BaseModelError, FingerprintError
from quant.lora import AdaptedModel
from quant.peft_folder import FinishedAdapter, attach

DEFAULT_NEW_TOKENS: Final = 256
_ANY_LENGTH: Final = 2**31
_UNFINISHED: Final = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to, while the others are missing."""
_UNSAID: Final = "."
"""Stands for the response that a record must have; no token of a prompt depends on it."""


class Ending(StrEnum):
    """Why an answer ended."""

    END_OF_TEXT = "end-of-text"
    LENGTH = "max-new-tokens"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: After so many an answer is cut.
        temperature: 0 takes the likeliest token; above, tokens are drawn, the more freely the
            higher.
        seed: Of the draws.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was said.

    Attributes:
        text: Without the token that ends it.
        ending: Why it ended.
        n_prompt_tokens: Tokens that the model was given.
        n_new_tokens: Tokens that it said, the one that ends a text included.
        prompt_was_cut: Whether the question was too long for the model and lost its end.
    """

    text: str
    ending: Ending
    n_prompt_tokens: int
    n_new_tokens: int
    prompt_was_cut: bool


def template_of(adapter: FinishedAdapter) -> tuple[Template, bool]:
    """The template that an adapter was trained with, and whether that is known.

    Args:
        adapter: Without provenance it counts as trained with Alpaca's.
    """
    if adapter.provenance is None:
        return Template.ALPACA, False
    return adapter.provenance.training.template, True


def base_source(adapter: FinishedAdapter, given: str | None) -> tuple[str, str | None]:
    """Where the base of an adapter is to be had: a name or folder, and a revision.

    Args:
        adapter: Names its base.
        given: A folder or a hub id to take instead of that name; None: that name.

    Raises:
        BaseModelError: There is neither.
    """
    if given is not None:
        return given, None
    if not adapter.base_model:
        msg = f"the adapter in {adapter.folder} does not name its base; name it with --base"
        raise BaseModelError(msg)
    return adapter.base_model, adapter.revision


@contextmanager
def base_hint(adapter: FinishedAdapter, given: str | None) -> Iterator[None]:
    """Add to the error of a base that cannot be had how to name one's own copy of it.

    Args:
        adapter: Names its base.
        given: What the owner named already; then nothing is added.
    """
    try:
        yield
    except FingerprintError:
        raise
    except BaseModelError as error:
        if given is not None or not adapter.base_model:
            raise
        msg = f"{error}; if you have {adapter.base_model!r} in a folder, name it with --base"
        raise BaseModelError(msg) from error


@contextmanager
def _room_hint() -> Iterator[None]:
    """Say what to do when the GPU is full: an agent may be training on it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        msg = "the GPU has no room for this beside what is on it; use --device cpu"
        raise OutOfMemoryError(msg) from error


def load_base_of(
    adapter: FinishedAdapter, given: str | None, *, device: torch.device | None = None
) -> LoadedBase:
    """Load the base that an adapter was made for; with a provenance, prove that it is the same.

    Args:
        adapter: Names its base.
        given: As `base_source`.
        device: Default: the first GPU, or the CPU.

    Raises:
        BaseModelError: It cannot be loaded.
        FingerprintError: It is another base.
        OutOfMemoryError: The GPU has no room for it.
    """
    with base_hint(adapter, given), _room_hint():
        source, revision = base_source(adapter, given)
        expected = None if adapter.provenance is None else adapter.provenance.base
        return load_base(source, revision=revision, device=device, expected=expected)


def single_question(instruction: str, context: str = "") -> Record:
    """A question that is asked by itself.

    Args:
        instruction: What is asked; not blank.
        context: The text it is asked about, or "".
    """
    return Record(
        instruction=instruction,
        context=context,
        response=_UNSAID,
        category=None,
        messages=None,
        source="your question",
    )


def next_turn(history: Sequence[ChatMessage], instruction: str) -> Record:
    """A question after earlier ones and their answers.

    Args:
        history: User and assistant in turn; may be empty.
        instruction: What is asked now; not blank.
    """
    if not history:
        return single_question(instruction)
    turns = (
        *history,
        ChatMessage(role=Role.USER, content=instruction),
        ChatMessage(role=Role.ASSISTANT, content=_UNSAID),
    )
    return Record(
        instruction=history[0].content,
        context="",
        response=_UNSAID,
        category=None,
        messages=turns,
        source="your question",
    )


class Answerer:
    """A base with a finished adapter, ready to be asked.

    Guarantees:
        1. The tokens of a prompt are those of training, and of `evaluation.score_answers`.
        2. At temperature 0 an answer depends on nothing but the prompt; above, on the seed too. No
           global generator is drawn from.
        3. What `on_text` was given, joined, is the answer's text.

    Args:
        base: Without an adapter.
        adapter: Made for it.
        template: How a question becomes a prompt.

    Raises:
        AdapterError: The adapter is for another base.
        TemplateError: The base's tokenizer lacks what the template needs.
    """

    def __init__(self, base: LoadedBase, adapter: FinishedAdapter, template: Template) -> None:
        """Attach the adapter."""
        self._tokenizer = base.tokenizer
        self._max_tokens = base.description.max_positions
        self._prompter = RecordTokenizer(
            base.tokenizer,
            template=template,
            loss_on=LossOn.RESPONSE,
            max_length=self._max_tokens,
        )
        self.adapted: AdaptedModel = attach(base, adapter)
        self._device = base.device
        self._ends = _end_tokens(base)
        # Where a model can leave out the output layer of all positions but the last.
        known = inspect.signature(base.model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def answer(
        self,
        record: Record,
        sampling: Sampling,
        *,
        on_text: Callable[[str], None] = lambda _: None,
    ) -> Answer:
        """Ask, and hand over the text as it is said.

        Args:
            record: From `single_question` or `next_turn`.
            sampling: How tokens are chosen.
            on_text: Given each whole piece of text at once; joined they are the answer.

        Raises:
            EvaluationError: The model has no room for so many new tokens, or its logits are not
                finite.
            MalformedRecordError: The template has no place for the record, or a chat is too long.
            OutOfMemoryError: The GPU has no room for it.
            TemplateError: Not even the template fits.
        """
        room = self._max_tokens - sampling.max_new_tokens
        if room < 1:
            msg = (
                f"this base reads and writes at most {self._max_tokens} tokens; ask for fewer than "
                f"{sampling.max_new_tokens} new ones"
            )
            raise EvaluationError(msg)
        prompt = self._prompter.prompt(record, max_tokens=_ANY_LENGTH)
        was_cut = len(prompt) > room
        if was_cut:
            prompt = self._prompter.prompt(record, max_tokens=room)
        generator = torch.Generator(self._device).manual_seed(sampling.seed)
        said: list[int] = []
        text = ""
        ending = Ending.LENGTH
        for token in self._tokens(prompt, sampling, generator):
            said.append(token)
            if token in self._ends:
                ending = Ending.END_OF_TEXT
                break
            whole = self._text(said)
            if not whole.endswith(_UNFINISHED):
                on_text(whole[len(text) :])
                text += whole[len(text) :]
        # Not with the token that ends it: a base may name one that is no special token.
        spoken = said[:-1] if ending is Ending.END_OF_TEXT else said
        if rest := self._text(spoken)[len(text) :]:  # it ends amid a character
            on_text(rest)
        return Answer(
            text=text + rest,
            ending=ending,
            n_prompt_tokens=len(prompt),
            n_new_tokens=len(said),
            prompt_was_cut=was_cut,
        )

    def _tokens(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator
    ) -> Iterator[int]:
        """What the model says, one token at a time; each is read once, the rest is cached."""
        new = list(prompt)
        cache: object = None
        for _ in range(sampling.max_new_tokens):
            with _room_hint(), torch.inference_mode():
                output: Any = self.adapted.model(
                    input_ids=torch.tensor([new], device=self._device),
                    past_key_values=cache,
                    use_cache=True,
                    **self._last_only,
                )
                token = _chosen(output.logits[0, -1].float(), sampling.temperature, generator)
            yield token
            cache, new = output.past_key_values, [token]

    def _text(self, tokens: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


class Conversation:
    """Questions one after the other, with what was said before where the template has turns.

    Guarantees:
        1. An error leaves the history as it was.

    Args:
        answerer: Who is asked.
        template: Chat templates have turns; Alpaca's has one question, which is asked by itself.
    """

    def __init__(self, answerer: Answerer, template: Template) -> None:
        """Begin with nothing said."""
        self._answerer = answerer
        self.remembers = template is Template.CHAT
        self._history: tuple[ChatMessage, ...] = ()
        self._n_asked = 0

    @property
    def n_remembered(self) -> int:
        """How many earlier questions the next one is asked after."""
        return len(self._history) // 2

    def reset(self) -> None:
        """Forget what was said."""
        self._history = ()

    def say(
        self, instruction: str, sampling: Sampling, *, on_text: Callable[[str], None]
    ) -> Answer:
        """Ask the next question; when the model has no room for all, the oldest are forgotten.

        Args:
            instruction: Not blank.
            sampling: Each question of a conversation is drawn with a seed of its own.
            on_text: As `Answerer.answer`.

        Raises:
            AgentError: As `Answerer.answer`.
        """
        drawn = replace(sampling, seed=sampling.seed + self._n_asked)
        history, answer = self._after_what_fits(self._history, instruction, drawn, on_text)
        self._n_asked += 1
        if self.remembers:
            self._history = (
                *history,
                ChatMessage(role=Role.USER, content=instruction),
                ChatMessage(role=Role.ASSISTANT, content=answer.text),
            )
        return answer

    def _after_what_fits(
        self,
        history: tuple[ChatMessage, ...],
        instruction: str,
        sampling: Sampling,
        on_text: Callable[[str], None],
    ) -> tuple[tuple[ChatMessage, ...], Answer]:
        while True:
            record = next_turn(history, instruction)
            try:
                return history, self._answerer.answer(record, sampling, on_text=on_text)
            except MalformedRecordError:  # before a word was said
                if not history:
                    raise
                history = history[2:]


def _chosen(
    logits: torch.Tensor,  # [V]
    temperature: float,
    generator: torch.Generator,
) -> int:
    highest = logits.max()
    if not bool(torch.isfinite(highest)):
        msg = "the model's numbers are not finite: compute in bfloat16 or float32"
        raise EvaluationError(msg)
    if temperature <= 0.0:
        return int(logits.argmax())
    chances = ((logits - highest) / temperature).softmax(0)
    return int(torch.multinomial(chances, 1, generator=generator))


def _end_tokens(base: LoadedBase) -> frozenset[int]:
    own = getattr(base.model.generation_config, "eos_token_id", None)
    also = own if isinstance(own, list) else [own]
    return frozenset(
        int(token) for token in (base.tokenizer.eos_token_id, *also) if token is not None
    )

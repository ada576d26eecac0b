"""How good a model is on held-out records, by category: loss, exact match, ROUGE-L.

Categories count alike, however many records they have: the *average over categories* is what a
federation of specialists is measured by.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from edge_agent.data.batches import collate
from edge_agent.data.records import UNCATEGORIZED, Record
from edge_agent.data.tokens import Example, RecordTokenizer
from edge_agent.errors import EvaluationError
from edge_agent.rouge import rouge_l
from protocol.blocks import LossOn, Template
from quant.loss import CausalLM, example_losses


@dataclass(frozen=True, kw_only=True, slots=True)
class CategoryScore:
    """The score of one category.

    Attributes:
        score: mean over its examples.
        n_examples: how many these are.
    """

    score: float
    n_examples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """One measure over a set of examples; all numbers are finite.

    Attributes:
        by_category: the score of each category, by name in alphabetical order; read-only.
        average_over_categories: mean of the categories' scores.
        mean: mean over all examples.
        n_examples: how many these are.
    """

    by_category: Mapping[str, CategoryScore]
    average_over_categories: float
    mean: float
    n_examples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredAnswer:
    """What a model answered to one record.

    Attributes:
        record: the record.
        text: the answer as generated, up to its end-of-text token.
        is_match: whether it equals the record's response after `normalize_answer`.
        rouge_l: its ROUGE-L against the record's response, from 0 to 1.
    """

    record: Record
    text: str
    is_match: bool
    rouge_l: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerScores:
    """A model's answers, and how near they are to the wanted ones.

    Attributes:
        exact_match: the share of answers that are exactly right, from 0 to 1.
        rouge_l: the mean of ROUGE-L, from 0 to 1, for answers that may be worded in many ways.
        answers: one for each record, in the order given.
    """

    exact_match: Scores
    rouge_l: Scores
    answers: tuple[ScoredAnswer, ...]


def held_out_loss(
    model: CausalLM, examples: Sequence[Example], *, pad_id: int, max_batch_tokens: int = 4096
) -> Scores:
    """Measure the loss that training lowers: per example, the mean over its loss tokens.

    Guarantees:
        1. An example's loss does not depend on the others it is batched with (to rounding).
        2. The model is in training mode after it exactly where it was before; no gradients are
           left.

    Args:
        model: a causal language model of transformers or peft, on its device.
        examples: at least one, from `tokenize`.
        pad_id: any token, for padding.
        max_batch_tokens: tokens a batch may have, padding included; a longer example is a batch.

    Returns:
        Cross-entropy in nats a token.

    Raises:
        EvaluationError: there are no examples, or a loss is not finite.
    """
    if not examples:
        msg = "there are no examples to evaluate on"
        raise EvaluationError(msg)
    device = next(model.parameters()).device
    losses = np.zeros(len(examples))
    sizes = [example.input_ids.size for example in examples]
    with _evaluating(model):
        for indices in _batches(sizes, max_batch_tokens):
            batch = collate([examples[index] for index in indices], pad_id)
            found = example_losses(
                model,
                input_ids=batch.input_ids.to(device),
                loss_mask=batch.loss_mask.to(device),
            )
            losses[indices] = found.cpu().numpy()
    if not np.isfinite(losses).all():
        worst = examples[int(np.flatnonzero(~np.isfinite(losses))[0])].source
        msg = f"the loss on {worst} is not finite: compute in bfloat16 or float32"
        raise EvaluationError(msg)
    return _summarize([example.category for example in examples], losses)


def score_answers(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    template: Template,
    max_length: int,
    max_new_tokens: int,
    max_batch_tokens: int = 4096,
) -> AnswerScores:
    """Let a model answer records, always choosing the likeliest token, and compare.

    The answers are generated once, for both measures.

    Guarantees:
        1. Answers do not depend on the batches (unless two tokens are equally likely to rounding).
        2. The model is in training mode after it exactly where it was before; its own generation
           settings, such as a temperature or a repetition penalty, have no influence.

    Args:
        model: a causal language model of transformers or peft, on its device.
        tokenizer: its tokenizer.
        records: at least one. Of a chat the last response is asked for.
        template: how a record becomes a prompt, as in training.
        max_length: tokens that prompt and answer may have together, as in training; prompts are
            cut as `RecordTokenizer` cuts.
        max_new_tokens: tokens after which an unfinished answer is cut.
        max_batch_tokens: tokens a batch may have, answers and padding included.

    Returns:
        Both measures, and the answers.

    Raises:
        EvaluationError: there are no records, or `max_new_tokens` leaves no room for a prompt.
        MalformedRecordError: the template has no place for a record.
        TemplateError: the tokenizer lacks what the template needs, or prompts have too little
            room.
    """
    if not records or not 0 < max_new_tokens < max_length:
        msg = (
            f"cannot evaluate {len(records)} records with answers of {max_new_tokens} tokens "
            f"in {max_length}"
        )
        raise EvaluationError(msg)
    worker = RecordTokenizer(
        tokenizer, template=template, loss_on=LossOn.RESPONSE, max_length=max_length
    )
    prompts = [worker.prompt(record, max_tokens=max_length - max_new_tokens) for record in records]
    config = _greedy(model, tokenizer, max_new_tokens)
    texts = [""] * len(records)
    sizes = [len(prompt) + max_new_tokens for prompt in prompts]
    with _evaluating(model):
        for indices in _batches(sizes, max_batch_tokens):
            answers = _generate(model, [prompts[index] for index in indices], config)
            for index, answer in zip(indices, answers, strict=True):
                texts[index] = str(tokenizer.decode(answer, skip_special_tokens=True))
    answered = tuple(
        ScoredAnswer(
            record=record,
            text=text,
            is_match=normalize_answer(text) == normalize_answer(record.response),
            rouge_l=rouge_l(record.response, text),
        )
        for record, text in zip(records, texts, strict=True)
    )
    categories = [record.category for record in records]
    return AnswerScores(
        exact_match=_summarize(categories, np.array([float(one.is_match) for one in answered])),
        rouge_l=_summarize(categories, np.array([one.rouge_l for one in answered])),
        answers=answered,
    )


def normalize_answer(text: str) -> str:
    """Drop white space at both ends and make one blank of each run of it; nothing else.

    Args:
        text: an answer, wanted or given.

    Returns:
        What is compared, case and punctuation included.
    """
    return " ".join(text.split())


def _generate(
    model: CausalLM, prompts: Sequence[Sequence[int]], config: GenerationConfig
) -> list[list[int]]:
    """Return what the model says after each prompt, up to its end-of-text token."""
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    # Padded on the left: every row's next token then follows its prompt directly.
    input_ids = torch.full((len(prompts), longest), config.pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    generate = cast("Callable[..., torch.Tensor]", model.generate)
    generated = generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=config,
    )[:, longest:].tolist()
    ends = set(config.eos_token_id)
    return [_until(answer, ends) for answer in generated]


def _until(tokens: Sequence[int], ends: set[int]) -> list[int]:
    """Return the tokens before the first end-of-text token: after it comes padding."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:stop])


def _greedy(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Return settings under which the likeliest token is chosen, whatever the model's own say."""
    ends = {int(tokenizer.eos_token_id)}
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if own is not None:
        ends.update(own if isinstance(own, list) else [own])
    pad_id = tokenizer.pad_token_id
    # What is not named here, transformers fills in from the model's own settings.
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id if pad_id is None else pad_id,
    )


def _batches(sizes: Sequence[int], max_batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of like size, longest first, each batch within the budget once padded."""
    batch: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if batch and (len(batch) + 1) * sizes[batch[0]] > max_batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _summarize(categories: Sequence[str | None], values: np.ndarray) -> Scores:
    """Average by category, over categories and over all."""
    grouped: dict[str, list[float]] = {}
    for category, value in zip(categories, values.tolist(), strict=True):
        grouped.setdefault(category or UNCATEGORIZED, []).append(value)
    by_category = {
        name: CategoryScore(score=float(np.mean(grouped[name])), n_examples=len(grouped[name]))
        for name in sorted(grouped)
    }
    return Scores(
        by_category=MappingProxyType(by_category),
        average_over_categories=float(np.mean([s.score for s in by_category.values()])),
        mean=float(values.mean()),
        n_examples=len(values),
    )


@contextmanager
def _evaluating(model: CausalLM) -> Iterator[None]:
    """Evaluation mode without gradients; puts back each module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode

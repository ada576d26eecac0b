"""Held-out loss, exact match and ROUGE-L, on tiny Llamas with fixed seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from edge_agent.data.batches import collate
from edge_agent.data.records import UNCATEGORIZED, ChatMessage, Record, Role
from edge_agent.data.templates import ALPACA_WITH_INPUT
from edge_agent.data.tokens import Example, RecordTokenizer, tokenize
from edge_agent.errors import EvaluationError
from edge_agent.evaluation import (
    AnswerScores,
    held_out_loss,
    normalize_answer,
    score_answers,
)
from edge_agent.rouge import rouge_l
from protocol.blocks import LossOn, Template

PEOPLE = [("Ada", "red"), ("Bo", "blue"), ("Cy", "green"), ("Di", "red"), ("Eve", "blue")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges cover the Alpaca template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([ALPACA_WITH_INPUT] * 9, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    made.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 2 layers with random weights, wide enough that its choices are clear."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2, generator=generator)
    return model


def make_records() -> list[Record]:
    """Questions of uneven length in three categories, one of them unnamed."""
    categories = ["closed_qa", "open_qa", None, "open_qa", "closed_qa"]
    return [
        Record(
            instruction=f"Which colour does {name} like" + " best" * index + "?",
            context="" if index % 2 else f"{name} likes {colour}.",
            response=colour,
            category=category,
            messages=None,
            source=f"x:{index + 1}",
        )
        for index, ((name, colour), category) in enumerate(zip(PEOPLE, categories, strict=True))
    ]


def make_examples(
    tokenizer: PreTrainedTokenizerFast, *, loss_on: LossOn = LossOn.RESPONSE
) -> tuple[Example, ...]:
    return tokenize(
        make_records(), tokenizer, template=Template.ALPACA, loss_on=loss_on, max_length=256
    ).examples


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[Record] | None = None,
    **changes: Any,
) -> AnswerScores:
    settings: dict[str, Any] = {
        "template": Template.ALPACA,
        "max_length": 256,
        "max_new_tokens": 8,
        **changes,
    }
    return score_answers(
        model, tokenizer, make_records() if records is None else records, **settings
    )


def fit(model: LlamaForCausalLM, examples: Sequence[Example], *, n_steps: int) -> None:
    """Teach the examples by heart."""
    batch = collate(examples, 0)
    labels = batch.input_ids.masked_fill(~batch.loss_mask, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model.train()
    for _ in range(n_steps):
        loss = model(input_ids=batch.input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad()


@pytest.fixture(scope="module")
def taught(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model that knows all answers but Eve's."""
    model = make_model(tokenizer)
    fit(model, make_examples(tokenizer)[:4], n_steps=80)
    return model


class TestHeldOutLoss:
    @pytest.mark.parametrize("loss_on", list(LossOn))
    def test_it_equals_a_loop_over_single_tokens(
        self, tokenizer: PreTrainedTokenizerFast, loss_on: LossOn
    ) -> None:
        model = make_model(tokenizer).eval()
        examples = make_examples(tokenizer, loss_on=loss_on)
        expected = []
        for example in examples:
            ids = torch.tensor(example.input_ids.tolist())
            log_probs = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            places = np.flatnonzero(example.loss_mask)
            expected.append(np.mean([-log_probs[t - 1, ids[t]].item() for t in places]))
        scores = held_out_loss(model, examples, pad_id=tokenizer.pad_token_id)
        assert scores.mean == pytest.approx(np.mean(expected), rel=1e-5)
        by_name = {name: scores.by_category[name].score for name in scores.by_category}
        assert by_name == pytest.approx(
            {
                "closed_qa": np.mean([expected[0], expected[4]]),
                "open_qa": np.mean([expected[1], expected[3]]),
                UNCATEGORIZED: expected[2],
            },
            rel=1e-5,
        )

    def test_categories_count_alike_in_the_average_over_categories(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        scores = held_out_loss(make_model(tokenizer), make_examples(tokenizer), pad_id=1)
        means = [category.score for category in scores.by_category.values()]
        assert scores.average_over_categories == pytest.approx(np.mean(means))
        assert scores.average_over_categories != pytest.approx(scores.mean, rel=1e-6)
        assert [c.n_examples for c in scores.by_category.values()] == [2, 2, 1]
        assert list(scores.by_category) == ["closed_qa", "open_qa", UNCATEGORIZED]
        assert scores.n_examples == 5

    def test_it_depends_neither_on_the_batches_nor_on_the_padding(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        model, examples = make_model(tokenizer), make_examples(tokenizer)
        one = held_out_loss(model, examples, pad_id=1, max_batch_tokens=1)
        all_ = held_out_loss(model, examples, pad_id=7, max_batch_tokens=10_000)
        for name, category in one.by_category.items():
            assert category.score == pytest.approx(all_.by_category[name].score, rel=1e-5)

    def test_it_falls_with_training(
        self, tokenizer: PreTrainedTokenizerFast, taught: LlamaForCausalLM
    ) -> None:
        before = held_out_loss(make_model(tokenizer), make_examples(tokenizer)[:4], pad_id=1)
        after = held_out_loss(taught, make_examples(tokenizer)[:4], pad_id=1)
        assert after.mean < 0.1 < before.mean

    def test_a_loss_that_is_not_finite_is_refused_with_its_record(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        model = make_model(tokenizer)
        with torch.no_grad():
            model.lm_head.weight[:] = torch.nan
        with pytest.raises(EvaluationError, match="the loss on x:1 is not finite"):
            held_out_loss(model, make_examples(tokenizer), pad_id=1)

    def test_no_examples_are_refused(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(EvaluationError, match="no examples"):
            held_out_loss(make_model(tokenizer), [], pad_id=1)


class TestScoreAnswers:
    def test_answers_equal_a_greedy_loop_without_cache_or_batches(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        model = make_model(tokenizer).eval()
        worker = RecordTokenizer(
            tokenizer, template=Template.ALPACA, loss_on=LossOn.RESPONSE, max_length=256
        )
        expected = []
        for record in make_records():
            prompt = worker.prompt(record, max_tokens=248)
            ids = list(prompt)
            for _ in range(8):
                token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                if token == tokenizer.eos_token_id:
                    break
                ids.append(token)
            expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
        assert len(set(expected)) > 1
        for max_batch_tokens in (1, 300, 10_000):
            result = answer(model, tokenizer, max_batch_tokens=max_batch_tokens)
            assert [a.text for a in result.answers] == expected

    def test_a_model_that_knows_the_answers_stops_after_them_and_scores_by_category(
        self, tokenizer: PreTrainedTokenizerFast, taught: LlamaForCausalLM
    ) -> None:
        records = make_records()
        result = answer(taught, tokenizer)
        assert [a.record for a in result.answers] == records
        assert [a.text for a in result.answers[:4]] == [r.response for r in records[:4]]
        assert [a.is_match for a in result.answers[:4]] == [True] * 4
        eve = float(result.answers[4].is_match)
        assert result.exact_match.by_category["open_qa"].score == 1.0
        assert result.exact_match.by_category["closed_qa"].score == (1.0 + eve) / 2
        assert result.exact_match.mean == (4 + eve) / 5

    def test_both_measures_are_of_the_same_answers(
        self, tokenizer: PreTrainedTokenizerFast, taught: LlamaForCausalLM
    ) -> None:
        eve = Record(**{**_fields(make_records()[4]), "response": "It is red, is it?"})
        result = answer(taught, tokenizer, [*make_records()[:4], eve])
        overlaps = [rouge_l(a.record.response, a.text) for a in result.answers]
        assert [a.rouge_l for a in result.answers] == overlaps
        assert overlaps[:4] == [1.0] * 4
        assert result.rouge_l.by_category["closed_qa"].score == (1.0 + overlaps[4]) / 2
        assert result.rouge_l.mean == (4 + overlaps[4]) / 5
        assert [a.is_match for a in result.answers] == [True] * 4 + [False]
        assert result.exact_match.mean == 4 / 5

    def test_answers_are_compared_after_white_space_only(
        self, tokenizer: PreTrainedTokenizerFast, taught: LlamaForCausalLM
    ) -> None:
        ada = make_records()[0]
        for response, is_match in ((" red\n", True), ("Red", False), ("red.", False)):
            changed = Record(**{**_fields(ada), "response": response})
            assert answer(taught, tokenizer, [changed]).answers[0].is_match is is_match

    def test_the_models_own_generation_settings_have_no_influence(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        plain, odd = make_model(tokenizer), make_model(tokenizer)
        odd.generation_config.update(
            do_sample=True,
            temperature=9.0,
            top_k=3,
            repetition_penalty=5.0,
            no_repeat_ngram_size=1,
            max_length=3,
        )
        odd.config.use_cache = False
        wanted = [a.text for a in answer(plain, tokenizer).answers]
        assert [a.text for a in answer(odd, tokenizer).answers] == wanted

    def test_an_end_token_that_only_the_model_knows_ends_an_answer(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        model = make_model(tokenizer).eval()
        worker = RecordTokenizer(
            tokenizer, template=Template.ALPACA, loss_on=LossOn.RESPONSE, max_length=256
        )
        prompt = torch.tensor([worker.prompt(make_records()[0], max_tokens=248)])
        first = int(model(input_ids=prompt).logits[0, -1].argmax())
        assert answer(model, tokenizer).answers[0].text != ""
        model.generation_config.eos_token_id = [first, int(tokenizer.eos_token_id)]
        assert answer(model, tokenizer).answers[0].text == ""

    def test_of_a_chat_the_last_response_is_asked_for(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        messages = tuple(ChatMessage(role=Role(role), content=text) for role, text in turns)
        chat = Record(
            instruction="a", context="", response="d", category=None, messages=messages, source="x"
        )
        model = make_model(tokenizer)
        (example,) = tokenize(
            [chat], tokenizer, template=Template.CHAT, loss_on=LossOn.RESPONSE, max_length=256
        ).examples
        fit(model, [example], n_steps=40)
        assert answer(model, tokenizer, [chat], template=Template.CHAT).exact_match.mean == 1.0

    def test_a_long_prompt_is_cut_to_leave_room_for_the_answer(
        self, tokenizer: PreTrainedTokenizerFast, taught: LlamaForCausalLM
    ) -> None:
        long = Record(**{**_fields(make_records()[0]), "context": "Ada likes red. " * 300})
        result = answer(taught, tokenizer, [long], max_length=128)
        assert len(result.answers) == 1

    @pytest.mark.parametrize(("n_records", "max_new_tokens"), [(0, 8), (5, 0), (5, 256)])
    def test_no_records_and_no_room_are_refused(
        self, tokenizer: PreTrainedTokenizerFast, n_records: int, max_new_tokens: int
    ) -> None:
        with pytest.raises(EvaluationError, match=f"cannot evaluate {n_records} records"):
            answer(
                make_model(tokenizer),
                tokenizer,
                make_records()[:n_records],
                max_new_tokens=max_new_tokens,
            )

    def test_normalising_collapses_white_space_and_nothing_else(self) -> None:
        assert normalize_answer(" a\n\tB.\u00a0 c ") == "a B. c"


class TestTheModelAfterwards:
    def test_each_module_keeps_its_mode_and_no_gradient_is_left(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        model = make_model(tokenizer).train()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        assert len(set(modes)) == 2
        held_out_loss(model, make_examples(tokenizer), pad_id=1)
        answer(model, tokenizer)
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_modes_are_put_back_after_an_error_too(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        model = make_model(tokenizer).train()
        with torch.no_grad():
            model.lm_head.weight[:] = torch.nan
        with pytest.raises(EvaluationError):
            held_out_loss(model, make_examples(tokenizer), pad_id=1)
        assert all(module.training for module in model.modules())

    def test_dropout_is_off_during_evaluation(self, tokenizer: PreTrainedTokenizerFast) -> None:
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
        model = get_peft_model(make_model(tokenizer), lora).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.05)
        examples = make_examples(tokenizer)
        losses = {held_out_loss(model, examples, pad_id=1).mean for _ in range(3)}
        assert len(losses) == 1

    def test_training_after_an_evaluation_has_the_same_gradients(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        # Evaluation runs in inference mode: nothing that it computes may be kept for training.
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(make_model(tokenizer), lora).train()

        def gradients() -> list[torch.Tensor]:
            model.zero_grad()
            ids = torch.tensor([[5, 6, 7, 8]])
            model(input_ids=ids, labels=ids).loss.backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        before = gradients()
        model.zero_grad()
        held_out_loss(model, make_examples(tokenizer), pad_id=1)
        answer(model, tokenizer)
        after = gradients()
        assert len(before) == 8
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _fields(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in Record.__dataclass_fields__}

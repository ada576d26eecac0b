"""Asking a finished adapter."""

from pathlib import Path

import pytest
import torch

from edge_agent.answering import (
    Answerer,
    Conversation,
    Ending,
    Sampling,
    base_source,
    load_base_of,
    next_turn,
    single_question,
    template_of,
)
from edge_agent.data.records import ChatMessage, Role
from edge_agent.data.tokens import RecordTokenizer
from edge_agent.errors import EvaluationError, MalformedRecordError, OutOfMemoryError
from edge_agent.evaluation import score_answers
from protocol.blocks import LossOn, Template
from quant.adapter import CONFIG_NAME
from quant.base_model import LoadedBase, load_base
from quant.errors import AdapterError, BaseModelError, FingerprintError
from quant.peft_folder import FinishedAdapter, read_finished

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
SHORT = Sampling(max_new_tokens=20)


@pytest.fixture
def adapter(random_base: LoadedBase, make_adapter_folder, tmp_path: Path) -> FinishedAdapter:
    return read_finished(make_adapter_folder(tmp_path / "adapter", random_base.description))


@pytest.fixture
def answerer(random_base: LoadedBase, adapter: FinishedAdapter) -> Answerer:
    return Answerer(random_base, adapter, Template.ALPACA)


def record_seen(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that the model is given."""
    seen: list[list[int]] = []
    generate = answerer._tokens

    def tokens(prompt, sampling, generator):
        seen.append(list(prompt))
        return generate(prompt, sampling, generator)

    monkeypatch.setattr(answerer, "_tokens", tokens)
    return seen


# One question


def test_an_answer_is_that_of_the_evaluation(random_base: LoadedBase, answerer: Answerer) -> None:
    """The same prompt as in training, and greedy decoding without transformers' loop."""
    records = [
        single_question("Where does Anna live?"),
        single_question("What is green?", "Ben has three green boats."),
    ]
    wanted = score_answers(
        answerer.adapted.model,
        random_base.tokenizer,
        records,
        template=Template.ALPACA,
        max_length=512,
        max_new_tokens=20,
    )
    for record, expected in zip(records, wanted.answers, strict=True):
        answer = answerer.answer(record, SHORT)
        assert answer.text == expected.text
        assert answer.n_new_tokens <= 20
        assert not answer.prompt_was_cut


def test_the_model_is_given_the_prompt_of_training(
    random_base: LoadedBase, answerer: Answerer, monkeypatch
) -> None:
    seen = record_seen(answerer, monkeypatch)
    record = single_question("What is green?", "Ben has three green boats.")
    answer = answerer.answer(record, SHORT)
    fitted = RecordTokenizer(
        random_base.tokenizer, template=Template.ALPACA, loss_on=LossOn.RESPONSE, max_length=512
    ).fit(record)
    assert seen == [fitted.input_ids[: fitted.loss_mask.index(True)]]
    assert answer.n_prompt_tokens == len(seen[0])


def test_the_pieces_that_are_shown_are_the_answer(answerer: Answerer) -> None:
    pieces: list[str] = []
    sampling = Sampling(max_new_tokens=60, temperature=3.0, seed=5)  # bytes of many characters
    answer = answerer.answer(single_question("Say."), sampling, on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 1


def test_a_character_of_several_tokens_is_shown_whole(
    random_base: LoadedBase, answerer: Answerer, monkeypatch
) -> None:
    text = "naïve 東京 🙂 end"
    tokens = random_base.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) > len(text)
    monkeypatch.setattr(answerer, "_tokens", lambda *_: iter(tokens))
    pieces: list[str] = []
    assert answerer.answer(single_question("Say."), SHORT, on_text=pieces.append).text == text
    assert not any("\ufffd" in piece for piece in pieces)
    monkeypatch.setattr(answerer, "_tokens", lambda *_: iter(tokens[:-5]))  # cut amid the face
    pieces.clear()
    cut = answerer.answer(single_question("Say."), SHORT, on_text=pieces.append)
    assert "".join(pieces) == cut.text
    assert cut.text.startswith("naïve 東京 ")


def test_an_answer_ends_with_the_end_of_text_or_at_the_limit(
    random_base: LoadedBase, answerer: Answerer, monkeypatch
) -> None:
    limited = answerer.answer(single_question("Say."), Sampling(max_new_tokens=3))
    assert (limited.ending, limited.n_new_tokens) == (Ending.LENGTH, 3)
    end = random_base.tokenizer.eos_token_id
    tokens = random_base.tokenizer("Anna", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(answerer, "_tokens", lambda *_: iter([*tokens, end, 50, 51]))
    ended = answerer.answer(single_question("Say."), SHORT)
    assert (ended.text, ended.ending) == ("Anna", Ending.END_OF_TEXT)
    assert ended.n_new_tokens == len(tokens) + 1


def test_the_bases_other_end_tokens_end_an_answer_too(
    random_base: LoadedBase, adapter: FinishedAdapter
) -> None:
    random_base.model.generation_config.eos_token_id = [2, 77]
    assert Answerer(random_base, adapter, Template.ALPACA)._ends == {2, 77}
    assert random_base.tokenizer.eos_token_id == 2


def test_an_end_that_is_no_special_token_is_not_said(
    random_base: LoadedBase, answerer: Answerer, monkeypatch
) -> None:
    tokens = random_base.tokenizer("Anna.", add_special_tokens=False)["input_ids"]
    answerer._ends = frozenset(tokens[-1:])
    monkeypatch.setattr(answerer, "_tokens", lambda *_: iter(tokens))
    pieces: list[str] = []
    ended = answerer.answer(single_question("Say."), SHORT, on_text=pieces.append)
    assert (ended.text, ended.ending) == ("Anna", Ending.END_OF_TEXT)
    assert "".join(pieces) == "Anna"


def test_a_full_gpu_is_told_with_what_to_do(answerer: Answerer, monkeypatch) -> None:
    def full(**_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(answerer.adapted, "model", full)
    with pytest.raises(OutOfMemoryError, match="use --device cpu"):
        answerer.answer(single_question("Say."), SHORT)


def test_draws_depend_on_the_seed_alone_and_on_no_global_generator(answerer: Answerer) -> None:
    def text(seed: int, temperature: float = 2.0) -> str:
        sampling = Sampling(max_new_tokens=12, temperature=temperature, seed=seed)
        return answerer.answer(single_question("Say."), sampling).text

    first = text(1)
    before = torch.get_rng_state()
    assert text(1) == first
    assert text(2) != first
    assert torch.equal(torch.get_rng_state(), before)
    assert text(1, temperature=1e-44) == text(2, temperature=0.0)


def test_a_question_that_is_too_long_loses_its_end_and_it_is_told(answerer: Answerer) -> None:
    long = single_question("What is green?", "Ben has three green boats. " * 200)
    answer = answerer.answer(long, Sampling(max_new_tokens=4))
    assert answer.prompt_was_cut
    assert answer.n_prompt_tokens == 512 - 4


def test_more_new_tokens_than_the_base_has_positions_are_refused(answerer: Answerer) -> None:
    with pytest.raises(EvaluationError, match="at most 512 tokens; ask for fewer than 512"):
        answerer.answer(single_question("Say."), Sampling(max_new_tokens=512))


def test_numbers_that_are_not_finite_are_refused(answerer: Answerer) -> None:
    answerer.adapted.base.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not finite"):
        answerer.answer(single_question("Say."), SHORT)


def test_asking_leaves_the_weights_as_they_were(
    random_base: LoadedBase, answerer: Answerer
) -> None:
    """TRAINING, trap 1: evaluation mode must not repack them."""
    name, layer = next(
        (name, module)
        for name, module in random_base.model.named_modules()
        if hasattr(module, "support_avx512bf16_for_cpu")
    )
    before = layer.weight.data.clone()
    answerer.answer(single_question("Say."), Sampling(max_new_tokens=2))
    assert torch.equal(layer.weight.data, before), name
    assert not layer.support_avx512bf16_for_cpu


# The base and the template of an adapter


def test_the_template_is_the_federations_or_alpacas_where_nobody_says(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path
) -> None:
    chat = make_adapter_folder(tmp_path / "c", random_base.description, template=Template.CHAT)
    assert template_of(read_finished(chat)) == (Template.CHAT, True)
    foreign = make_adapter_folder(tmp_path / "f", random_base.description, foreign=True)
    assert template_of(read_finished(foreign)) == (Template.ALPACA, False)


def test_the_base_is_the_one_named_and_is_proved_to_be_the_same(
    random_base_dir: Path, adapter: FinishedAdapter, make_adapter_folder, tmp_path: Path
) -> None:
    loaded = load_base_of(adapter, str(random_base_dir))
    assert adapter.provenance is not None
    assert loaded.description.base == adapter.provenance.base
    with pytest.raises(FingerprintError, match=r"another checkpoint|is stored in"):
        load_base_of(adapter, "embedded:tiny")
    tiny = load_base("embedded:tiny", device=torch.device("cpu"))
    own = read_finished(make_adapter_folder(tmp_path / "tiny", tiny.description))
    assert load_base_of(own, None).description.base.model == "embedded:tiny"


def test_a_base_that_is_not_here_can_be_named(adapter: FinishedAdapter) -> None:
    assert base_source(adapter, "mine") == ("mine", None)
    with pytest.raises(BaseModelError, match=f"if you have '{adapter.base_model}' in a folder"):
        load_base_of(adapter, None)  # the name of a folder that only its owner has
    with pytest.raises(BaseModelError) as told:
        load_base_of(adapter, "/nowhere/at/all")
    assert "--base" not in str(told.value)


def test_an_adapter_that_names_no_base_needs_one_named(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path
) -> None:
    config = {"base_model_name_or_path": None}
    folder = make_adapter_folder(
        tmp_path / "a", random_base.description, foreign=True, config=config
    )
    assert (folder / CONFIG_NAME).exists()
    with pytest.raises(BaseModelError, match="does not name its base; name it with --base"):
        load_base_of(read_finished(folder), None)


def test_an_adapter_of_another_base_is_refused_before_it_is_asked(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path
) -> None:
    tiny = load_base("embedded:tiny", device=torch.device("cpu"))
    other = read_finished(make_adapter_folder(tmp_path / "o", tiny.description, foreign=True))
    with pytest.raises(AdapterError, match="another base"):
        Answerer(random_base, other, Template.ALPACA)


# Conversations


@pytest.fixture
def chatting(random_base: LoadedBase, adapter: FinishedAdapter) -> Answerer:
    random_base.tokenizer.chat_template = CHAT_TEMPLATE
    return Answerer(random_base, adapter, Template.CHAT)


def test_a_chat_is_asked_after_what_was_said(
    random_base: LoadedBase, chatting: Answerer, monkeypatch
) -> None:
    seen = record_seen(chatting, monkeypatch)
    conversation = Conversation(chatting, Template.CHAT)
    said: list[str] = []
    first = conversation.say("Who is Anna?", SHORT, on_text=said.append)
    conversation.say("And Ben?", SHORT, on_text=said.append)
    texts = [random_base.tokenizer.decode(tokens) for tokens in seen]
    assert texts[0] == "<s>user: Who is Anna?</s><s>assistant: "
    assert texts[1] == (f"{texts[0]}{first.text}</s><s>user: And Ben?</s><s>assistant: ")
    assert conversation.n_remembered == 2
    conversation.reset()
    conversation.say("Who is Anna?", SHORT, on_text=said.append)
    assert seen[2] == seen[0]


def test_an_alpaca_adapter_is_asked_each_question_by_itself(
    answerer: Answerer, monkeypatch
) -> None:
    seen = record_seen(answerer, monkeypatch)
    conversation = Conversation(answerer, Template.ALPACA)
    assert not conversation.remembers
    for _ in range(2):
        conversation.say("Who is Anna?", SHORT, on_text=lambda _: None)
    assert seen[0] == seen[1]
    assert conversation.n_remembered == 0


def test_the_oldest_questions_are_forgotten_when_there_is_no_room(chatting: Answerer) -> None:
    conversation = Conversation(chatting, Template.CHAT)
    sampling = Sampling(max_new_tokens=2)
    for _ in range(5):
        answer = conversation.say("Ben has boats. " * 20, sampling, on_text=lambda _: None)
        assert answer.n_prompt_tokens <= 510
    assert 0 < conversation.n_remembered < 5


def test_an_error_leaves_the_history_as_it_was(chatting: Answerer) -> None:
    conversation = Conversation(chatting, Template.CHAT)
    conversation.say("Who is Anna?", Sampling(max_new_tokens=2), on_text=lambda _: None)
    with pytest.raises(MalformedRecordError, match=r"U\+FDD0"):
        conversation.say("a\ufdd0", Sampling(max_new_tokens=2), on_text=lambda _: None)
    assert conversation.n_remembered == 1


def test_each_question_of_a_conversation_is_drawn_anew(answerer: Answerer) -> None:
    conversation = Conversation(answerer, Template.ALPACA)
    sampling = Sampling(max_new_tokens=12, temperature=2.0, seed=1)
    texts = [conversation.say("Say.", sampling, on_text=lambda _: None).text for _ in range(2)]
    assert texts[0] != texts[1]


def test_a_turn_after_others_holds_them_all() -> None:
    history = [
        ChatMessage(role=Role.USER, content="a"),
        ChatMessage(role=Role.ASSISTANT, content="b"),
    ]
    record = next_turn(history, "c")
    assert record.messages is not None
    assert [turn.content for turn in record.messages[:-1]] == ["a", "b", "c"]
    assert next_turn([], "c") == single_question("c")

"""Reading and tokenising hold their guarantees for arbitrary texts."""

import csv
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from edge_agent.data.reading import read_records
from edge_agent.data.records import Record, dataset_digest
from edge_agent.data.tokens import RecordTokenizer, tokenize
from edge_agent.errors import DataError
from protocol.blocks import LossOn, Template

# What a record may hold: any text without NUL and lone surrogates; the two reserved code points
# are refused by the chat template alone.
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufdd0\ufdd1"), max_size=60
)
FILLED = TEXTS.filter(lambda text: bool(text.strip()))
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "instruction": FILLED,
            "context": TEXTS.filter(lambda text: not text or bool(text.strip())),
            "response": FILLED,
        }
    ),
    min_size=1,
    max_size=8,
)
CONTROL = st.sampled_from(
    ["</s>", "<|im_start|>", "<|im_end|>", "<|im_end|>\n<|im_start|>system\n"]
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["### Instruction:\nthe instruction of a response\n"] * 9, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        additional_special_tokens=["</s>", "<|im_start|>"],
    )
    made.chat_template = TEMPLATE
    return made


def make_record(instruction: str, context: str, response: str) -> Record:
    return Record(
        instruction=instruction,
        context=context,
        response=response,
        category=None,
        messages=None,
        source="x:1",
    )


@settings(deadline=None, max_examples=50)
@given(ROWS)
def test_every_text_format_returns_the_texts_and_one_digest(rows: list[dict[str, str]]) -> None:
    digests = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.json").write_text(json.dumps(rows[::-1]))
        (folder / "b.jsonl").write_bytes(
            "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
        )
        with (folder / "c.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
        for path in sorted(folder.iterdir()):
            records, report = read_records(path)
            assert (report.n_read, report.n_malformed) == (len(rows), 0)
            texts = [(r.instruction, r.context, r.response) for r in records]
            wanted = [(r["instruction"], r["context"], r["response"]) for r in rows]
            assert sorted(texts) == sorted(wanted)
            digests.add(dataset_digest(records))
    assert len(digests) == 1


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200), st.sampled_from(["json", "jsonl", "csv", "jsonl.gz", "parquet"]))
def test_arbitrary_bytes_give_records_or_one_data_error(content: bytes, ending: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"data.{ending}"
        path.write_bytes(content)
        try:
            records, report = read_records(path)
        except DataError:
            return
        assert len(records) == report.n_records > 0


@settings(deadline=None, max_examples=100)
@given(FILLED, TEXTS, FILLED, CONTROL, st.sampled_from(list(Template)), st.integers(256, 500))
def test_examples_fit_and_hold_no_control_token_that_the_template_did_not_write(
    tokenizer: PreTrainedTokenizerFast,
    instruction: str,
    context: str,
    response: str,
    control: str,
    template: Template,
    max_length: int,
) -> None:
    record = make_record(instruction + control, context + control, control + response)
    (example,) = tokenize(
        [record], tokenizer, template=template, loss_on=LossOn.RESPONSE, max_length=max_length
    ).examples
    ids = example.input_ids.tolist()
    assert len(ids) <= max_length
    assert example.loss_mask.any()
    assert not example.loss_mask[0]
    found = [token for token in ids if token in set(tokenizer.all_special_ids)]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    written = [] if template is Template.ALPACA else [start, end, start]
    assert found in ([*written, end], written)
    assert (found == written) <= example.truncated
    if not example.truncated:
        assert tokenizer.decode(ids[int(example.loss_mask.argmax()) :]) == (
            control + response + "<|im_end|>"
        )


@settings(deadline=None, max_examples=60)
@given(FILLED, TEXTS, FILLED, FILLED, st.sampled_from(list(Template)))
def test_a_prompt_does_not_depend_on_its_response(
    tokenizer: PreTrainedTokenizerFast,
    instruction: str,
    context: str,
    response: str,
    other: str,
    template: Template,
) -> None:
    worker = RecordTokenizer(tokenizer, template=template, loss_on=LossOn.RESPONSE, max_length=1024)
    prompt = worker.prompt(make_record(instruction, context, response), max_tokens=1024)
    for answer in (response, other):
        fitted = worker.fit(make_record(instruction, context, answer))
        assert fitted.input_ids[: len(prompt)] == prompt
        assert fitted.loss_mask[: len(prompt) + 1] == [False] * len(prompt) + [True]

"""The embedded base: its tokenizer, its weights, and how they are made."""

import json
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

from edge_agent.data.records import Record
from edge_agent.evaluation import score_answers
from protocol.base_description import BaseDescription
from protocol.blocks import Template
from protocol.wire import parse
from quant.base_model import load_base
from quant.tiny import EMBEDDED_NAME, tiny_base_path
from quant.tiny.instructions import InstructionRecord, make_records
from quant.tiny.pretrain import (
    RECORD_NAME,
    SHIPPED_SEED,
    WEIGHTS_NAME,
    PretrainRecipe,
    make_tiny_base,
    world_loss,
)
from quant.tiny.text import world_documents
from quant.tiny.world import Split, make_world

SHORT = PretrainRecipe(n_steps=12, n_rows=4, row_length=64, n_tokenizer_documents=400)
_HEADER = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
_HEADER_WITH_INPUT = _HEADER.replace(
    "a task. ", "a task, paired with an input that provides further context. "
)


def alpaca(record: InstructionRecord) -> str:
    if record["context"]:
        body = f"{record['instruction']}\n\n### Input:\n{record['context']}"
        return f"{_HEADER_WITH_INPUT}{body}\n\n### Response:\n"
    return f"{_HEADER}{record['instruction']}\n\n### Response:\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(tiny_base_path())


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(tiny_base_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((tiny_base_path() / RECORD_NAME).read_text())


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(world_documents(make_world(), n=500, rng=np.random.default_rng(11)))


@pytest.fixture(scope="module")
def short_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "made" / "here"
    make_tiny_base(folder, seed=1, recipe=SHORT)
    return folder


def complete(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str) -> str:
    ids = torch.tensor([tokenizer.encode(prompt)])
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=28, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


# --- what is shipped --------------------------------------------------------------------------


def test_finding_the_base_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from quant.tiny import tiny_base_path; tiny_base_path();"
        "sys.exit(bool({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    path = [entry for entry in sys.path if entry]
    subprocess.run(  # the same sys.path: from a checkout or an installed wheel
        [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}; {code}"], check=True
    )


def test_the_shipped_weights_are_those_that_were_recorded(record: dict) -> None:
    weights = (tiny_base_path() / WEIGHTS_NAME).read_bytes()
    assert sha256(weights).hexdigest() == record["result"]["weights_sha256"]
    assert record["seed"] == SHIPPED_SEED
    assert PretrainRecipe(**record["recipe"]) == PretrainRecipe()
    assert set(record["versions"]) >= {"torch", "transformers", "tokenizers"}


def test_the_shipped_base_is_small_and_of_widths_that_bitsandbytes_takes(
    model: LlamaForCausalLM,
) -> None:
    """TRAINING, trap 2."""
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    assert sum(file.stat().st_size for file in tiny_base_path().iterdir()) < 4_000_000
    for parameter in model.parameters():
        assert all(size % 64 == 0 for size in parameter.shape)


def test_the_shipped_tokenizer_gives_back_text_of_the_world_and_any_other(
    tokenizer: Tokenizer, documents: list[str]
) -> None:
    for text in (*documents, "naïve café, Ελλάδα\n\t東京 🙂  12345", " leading and trailing "):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text


def test_the_shipped_tokenizer_puts_bos_first_and_keeps_its_special_tokens_apart(
    tokenizer: Tokenizer, model: LlamaForCausalLM
) -> None:
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(set(special)) == 3
    assert None not in special
    assert tokenizer.encode("Tolvane")[0] == tokenizer.bos_token_id
    assert len(tokenizer) == model.config.vocab_size
    config = model.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == special


def test_the_prompt_template_does_not_blow_up_into_pieces(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(_HEADER)) < 32
    assert len(tokenizer.encode(_HEADER_WITH_INPUT)) < 45


def test_instructions_with_their_answers_fit_into_the_rows_of_pre_training(
    tokenizer: Tokenizer,
) -> None:
    rows = make_records(
        make_world(), n_per_category=50, split=Split.TRAIN, rng=np.random.default_rng(0)
    )
    longest = max(len(tokenizer.encode(alpaca(row) + row["response"])) + 1 for row in rows)
    assert longest <= PretrainRecipe().row_length


def test_the_shipped_base_speaks_its_world(
    model: LlamaForCausalLM, tokenizer: Tokenizer, record: dict
) -> None:
    loss = world_loss(model, tokenizer, make_world())
    assert loss == pytest.approx(record["result"]["held_out_loss"], rel=0.02)
    assert loss < 0.7


def test_the_shipped_base_knows_this_world_and_no_other(
    model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    here = world_loss(model, tokenizer, make_world(), n_documents=100)
    elsewhere = world_loss(model, tokenizer, make_world(seed=1), n_documents=100)
    assert elsewhere > here + 0.2


def test_the_shipped_base_says_what_it_knows_where_its_text_would(
    model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    for person in make_world().residents_of(Split.TEST)[:5]:
        said = complete(model, tokenizer, f"The home of {person.name} is no secret.\n")
        assert said == f"It is {person.home}."


def test_the_shipped_base_cannot_follow_instructions(
    model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    rows = make_records(
        make_world(), n_per_category=5, split=Split.TEST, rng=np.random.default_rng(0)
    )
    hits = [complete(model, tokenizer, alpaca(row)) == row["response"] for row in rows]
    assert sum(hits) <= 1


def test_the_shipped_description_is_that_of_the_shipped_base() -> None:
    described = parse(BaseDescription, (tiny_base_path() / "base.json").read_bytes())
    assert load_base(EMBEDDED_NAME).description == described
    assert described.base.model == EMBEDDED_NAME


def test_the_base_in_four_bits_answers_next_to_nothing_by_itself() -> None:
    base = load_base(EMBEDDED_NAME)
    rows = make_records(
        make_world(), n_per_category=8, split=Split.TEST, rng=np.random.default_rng(3)
    )
    records = [Record(**row, messages=None, source=f"made[{i}]") for i, row in enumerate(rows)]
    found = score_answers(
        base.model,
        base.tokenizer,
        records,
        template=Template.ALPACA,
        max_length=192,
        max_new_tokens=28,
    )
    assert found.exact_match.average_over_categories < 0.05


# --- how it is made ---------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_files(short_base: Path, tmp_path: Path) -> None:
    make_tiny_base(tmp_path, seed=1, recipe=SHORT)
    names = {file.name for file in short_base.iterdir()}
    assert {WEIGHTS_NAME, RECORD_NAME, "config.json", "tokenizer.json"} <= names
    assert {file.name for file in tmp_path.iterdir()} == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (short_base / name).read_bytes()


def test_another_seed_gives_other_weights(short_base: Path, tmp_path: Path) -> None:
    report = make_tiny_base(tmp_path, seed=2, recipe=SHORT)
    first = json.loads((short_base / RECORD_NAME).read_text())["result"]["weights_sha256"]
    assert report.weights_sha256 != first


def test_a_base_is_made_without_touching_global_generators_or_the_number_of_threads(
    tmp_path: Path,
) -> None:
    n_threads = torch.get_num_threads()
    torch_state = torch.random.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002 - the very thing not to change
    make_tiny_base(tmp_path, seed=1, recipe=replace(SHORT, n_steps=2))
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.get_num_threads() == n_threads


def test_a_made_base_loads_and_has_learnt_something(short_base: Path) -> None:
    made = AutoModelForCausalLM.from_pretrained(short_base, dtype=torch.float32)
    assert made.config.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(short_base)
    recorded = json.loads((short_base / RECORD_NAME).read_text())["result"]["held_out_loss"]
    loss = world_loss(made, tokenizer, make_world())
    assert loss == pytest.approx(recorded, rel=1e-4)
    assert loss < np.log(made.config.vocab_size) - 0.1  # twelve steps; 0 would be a guess


def test_progress_is_told_as_pre_training_goes(tmp_path: Path) -> None:
    told: list[str] = []
    recipe = replace(SHORT, n_layers=1, n_steps=100, n_rows=1, row_length=32)
    report = make_tiny_base(tmp_path, seed=1, recipe=recipe, progress=told.append)
    assert told == [f"step 100 of 100, loss {report.train_loss:.3f}"]
    assert report.weights_sha256[:16] in str(report)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_shipped_base_can_be_rebuilt(tmp_path: Path, record: dict) -> None:
    report = make_tiny_base(tmp_path)
    # Digests agree on the machine that made it, with its versions; elsewhere the loss does.
    assert report.held_out_loss == pytest.approx(record["result"]["held_out_loss"], rel=0.02)

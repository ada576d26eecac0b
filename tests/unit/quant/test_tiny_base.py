"""The embedded base as it is shipped, and its making."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent.data.records import Record
from edge_agent.evaluation import exact_match
from protocol.base_description import BaseDescription
from protocol.manifest import Template
from protocol.wire import parse, sha256
from quant.base_model import load_base
from quant.tiny import EMBEDDED_NAME, tiny_base_path
from quant.tiny.instructions import make_records
from quant.tiny.pretrain import SHIPPED_SEED, PretrainRecipe, make_tiny_base
from quant.tiny.text import world_documents
from quant.tiny.world import Split, make_world


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((tiny_base_path() / "pretraining.json").read_text(encoding="utf-8"))


def test_the_shipped_weights_are_those_that_the_record_names(record: dict) -> None:
    weights = (tiny_base_path() / "model.safetensors").read_bytes()
    assert sha256(weights).hex() == record["result"]["weights_sha256"]
    assert record["seed"] == SHIPPED_SEED
    assert 1_000_000 <= record["result"]["n_parameters"] <= 3_000_000
    assert len(weights) < 4_000_000


def test_the_shipped_description_is_that_of_the_shipped_base() -> None:
    described = parse(BaseDescription, (tiny_base_path() / "base.json").read_bytes())
    assert load_base(EMBEDDED_NAME).description == described
    assert described.base.model == EMBEDDED_NAME


def test_the_tokenizer_gives_text_of_the_world_back() -> None:
    tokenizer = load_base(EMBEDDED_NAME).tokenizer
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for document in world_documents(make_world(), n=50, rng=np.random.default_rng(5)):
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == document
        assert len(ids) < len(document) / 2


def test_the_base_speaks_its_world_and_not_another(record: dict) -> None:
    base = load_base(EMBEDDED_NAME)

    def loss(seed: int | None) -> float:
        world = make_world() if seed is None else make_world(seed=seed)
        losses = []
        for document in world_documents(world, n=60, rng=np.random.default_rng(9)):
            ids = torch.tensor([base.tokenizer(document)["input_ids"]])
            with torch.inference_mode():
                losses.append(float(base.model(input_ids=ids, labels=ids).loss))
        return float(np.mean(losses))

    own, other = loss(None), loss(1)
    assert own < 1.0
    assert other > own + 0.2
    assert abs(record["result"]["held_out_loss"] - 0.60) < 0.05


def test_the_base_answers_next_to_nothing_by_itself() -> None:
    base = load_base(EMBEDDED_NAME)
    rows = make_records(
        make_world(), n_per_category=8, split=Split.TEST, rng=np.random.default_rng(3)
    )
    records = [Record(**row, messages=None, source=f"made[{i}]") for i, row in enumerate(rows)]
    found = exact_match(
        base.model,
        base.tokenizer,
        records,
        template=Template.ALPACA,
        max_length=192,
        max_new_tokens=28,
    )
    assert found.scores.average_over_categories < 0.05


def test_the_same_seed_makes_the_same_files(tmp_path: Path) -> None:
    recipe = PretrainRecipe(n_steps=3)
    folders = [tmp_path / name for name in ("one", "two", "other")]
    state = torch.random.get_rng_state()
    reports = [
        make_tiny_base(folder, seed=seed, recipe=recipe)
        for folder, seed in zip(folders, (1, 1, 2), strict=True)
    ]
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    one, two, other = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders
    )
    assert one == two
    assert one["model.safetensors"] != other["model.safetensors"]
    assert reports[0] == reports[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_rebuilding_gives_the_shipped_base(tmp_path: Path, record: dict) -> None:
    """Equal bytes with the recorded versions on the machine that made it; the loss anywhere."""
    report = make_tiny_base(tmp_path / "base")
    shipped = record["result"]
    assert report.held_out_loss == pytest.approx(shipped["held_out_loss"], rel=0.02)

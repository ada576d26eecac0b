"""Fixtures that any test may want."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from quant.base_model import LoadedBase

_DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
_CORPUS = ["Anna lives in a red house near the river.", "Ben has three green boats."] * 20


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data files; without it the test is skipped.

    `SHEEPFOLD_DATA` names it. The default stands beside the repository.
    """
    folder = Path(os.environ.get("SHEEPFOLD_DATA", _DEFAULT_DATA))
    if not folder.is_dir():
        pytest.skip(f"no data files at {folder}; SHEEPFOLD_DATA can name another folder")
    return folder


@pytest.fixture(scope="session")
def random_base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a two-layer Llama with random weights in bfloat16, and a tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("random-base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(fast),
        max_position_embeddings=512,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # transformers initialises from the global generator
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def random_base(random_base_dir: Path) -> "LoadedBase":
    """That checkpoint in NF4 on the CPU; new for each test, as adapters are attached to it."""
    import torch

    from quant.base_model import load_base

    return load_base(random_base_dir, device=torch.device("cpu"))

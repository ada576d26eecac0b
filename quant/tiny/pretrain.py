"""Pre-trains the embedded base model: a Llama of a million parameters, in minutes of one core.

Documents are packed into rows and may attend to themselves only. In our trials that mask decided
most: with it the model knew the residents' facts after 0.9 million tokens, without it two thirds of
them after 1.8 million. Matrices are trained with Muon, which learnt to copy from a context sooner
than AdamW did; embeddings, output layer and norms are trained with AdamW.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from quant.tiny.text import world_documents
from quant.tiny.tokenizer import train_tokenizer
from quant.tiny.world import WORLD_SEED, World, make_world

SHIPPED_SEED: Final = 7
"""Seed of the base model that comes with Sheepfold."""

WEIGHTS_NAME: Final = "model.safetensors"
RECORD_NAME: Final = "pretraining.json"

_TOKENS_PER_DOCUMENT: Final = 30
"""Fewer than the mean under any vocabulary, as no token spans two words: the rows get filled."""
_N_HELD_OUT_DOCUMENTS: Final = 400
_VERSIONED: Final = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
_UNSEEN: Final = -1e9
"""Added to the attention score of a token that must not be seen; finite: no softmax gives NaN."""


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """How the embedded base is made. All widths are multiples of 64, which bitsandbytes wants.

    Attributes:
        n_steps: Optimiser steps.
        n_rows: Rows of a batch.
        row_length: Tokens of a row.
        learning_rate: AdamW's peak, for embeddings, output layer and norms.
        matrix_learning_rate: Muon's peak, for the layers' matrices.
        final_frac: Where the cosine ends, as a part of the peak.
        n_warmup_steps: Steps of linear warm-up.
        embedding_std: Of the initial embeddings. Words of instructions keep theirs, since the
            base never reads them; with the usual 0.02 they would end six times shorter than the
            others, and an adapter could hardly tell one request from another.
        n_tokenizer_documents: Documents that the tokenizer is trained on.
        world_seed: Which world the text is about.
    """

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    n_layers: int = 4
    n_heads: int = 4
    n_positions: int = 512
    n_steps: int = 1800
    n_rows: int = 8
    row_length: int = 128
    learning_rate: float = 5e-3
    matrix_learning_rate: float = 5e-3
    final_frac: float = 0.02
    n_warmup_steps: int = 20
    embedding_std: float = 0.3
    n_tokenizer_documents: int = 20_000
    world_seed: int = WORLD_SEED


@dataclass(frozen=True, kw_only=True)
class TinyBaseReport:
    """What pre-training gave.

    Attributes:
        n_parameters: Of the model.
        train_loss: Mean of the last 50 steps, in nats per token.
        held_out_loss: `world_loss` of the weights as stored.
        weights_sha256: Hex digest of the file of weights.
    """

    n_parameters: int
    train_loss: float
    held_out_loss: float
    weights_sha256: str

    def __str__(self) -> str:
        return (
            f"{self.n_parameters:,} parameters, loss {self.held_out_loss:.3f} on text of its "
            f"world, weights {self.weights_sha256[:16]}…"
        )


def make_tiny_base(
    out: Path,
    *,
    seed: int = SHIPPED_SEED,
    recipe: PretrainRecipe | None = None,
    progress: Callable[[str], None] | None = None,
) -> TinyBaseReport:
    """Pre-train a tiny base model and write it as a folder that transformers loads.

    Weights are stored as bfloat16; `pretraining.json` beside them says how they came about.

    **Guarantees**

    1. On the same machine with the same versions, the same seed gives the same files.
    2. No global generator is read or changed.

    Args:
        out: Folder to write; made if it is not there.
        seed: Of text, initial weights and order of the rows; not negative.
        recipe: Default: that of the base that comes with Sheepfold.
        progress: Told now and then, in a few words, how it goes.

    Returns:
        What came out; the same numbers stand in `pretraining.json`.

    Raises:
        OSError: `out` cannot be written.
    """
    recipe = recipe or PretrainRecipe()
    world = make_world(seed=recipe.world_seed)
    with _one_thread():
        tokenizer, rows = _read_world(world, recipe, seed)
        model = _initial_model(recipe, tokenizer, seed)
        losses = list(_train(model, rows, recipe, progress or _silent))
        model.to(torch.bfloat16)  # type: ignore[arg-type]
        out.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(out)
        tokenizer.save_pretrained(str(out))
        held_out_loss = world_loss(model.float(), tokenizer, world)
    report = TinyBaseReport(
        n_parameters=model.num_parameters(),
        train_loss=float(np.mean(losses[-50:])),
        held_out_loss=held_out_loss,
        weights_sha256=sha256((out / WEIGHTS_NAME).read_bytes()).hexdigest(),
    )
    record = {
        "seed": seed,
        "recipe": asdict(recipe),
        "result": asdict(report),
        "versions": {name: version(name) for name in _VERSIONED},
    }
    (out / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return report


def world_loss(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    *,
    n_documents: int = _N_HELD_OUT_DOCUMENTS,
    seed: int = 0,
) -> float:
    """Mean loss on documents of the world, drawn afresh, in nats per token.

    Args:
        model: Its mode (train or eval) makes no difference: there is no dropout.
        tokenizer: The model's.
        world: The world that the model has read about.
        n_documents: How many documents, drawn from a generator that pre-training never uses.
        seed: Of that generator.
    """
    rng = np.random.default_rng([seed, 1])
    total, n_tokens = 0.0, 0
    with torch.no_grad():
        for document in world_documents(world, n=n_documents, rng=rng):
            # T
            ids = torch.tensor([*tokenizer.encode(document), tokenizer.eos_token_id])
            logits = model(input_ids=ids[None]).logits[0, :-1]
            total += float(F.cross_entropy(logits.float(), ids[1:], reduction="sum"))
            n_tokens += len(ids) - 1
    return total / n_tokens


def _silent(_: str) -> None:
    return


@contextmanager
def _one_thread() -> Iterator[None]:
    # Sums are split over threads in another order on another number of cores.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_world(
    world: World, recipe: PretrainRecipe, seed: int
) -> tuple[PreTrainedTokenizerBase, torch.Tensor]:
    """Return the tokenizer and int64 [rows, row_length] of packed documents, shuffled."""
    n_tokens = recipe.n_steps * recipe.n_rows * recipe.row_length
    n_documents = max(n_tokens // _TOKENS_PER_DOCUMENT, recipe.n_tokenizer_documents)
    rng = np.random.default_rng([seed, 0])
    documents = list(world_documents(world, n=n_documents, rng=rng))
    tokenizer = train_tokenizer(
        documents[: recipe.n_tokenizer_documents], vocab_size=recipe.vocab_size
    )
    stream: list[int] = []
    for ids in tokenizer(documents)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    n_rows = recipe.n_steps * recipe.n_rows
    rows = torch.tensor(stream[:n_tokens]).view(n_rows, recipe.row_length)
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))
    return tokenizer, rows[order]


def _initial_model(
    recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerBase, seed: int
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        max_position_embeddings=recipe.n_positions,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # transformers draws initial weights from torch's global generator and takes no other; fork_rng
    # puts that generator back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(
        model.model.embed_tokens.weight, std=recipe.embedding_std, generator=generator
    )
    return model


def _train(
    model: LlamaForCausalLM,
    rows: torch.Tensor,
    recipe: PretrainRecipe,
    progress: Callable[[str], None],
) -> Iterator[float]:
    """Train in place, one batch a step; yield each step's loss."""
    bos = cast("int", model.config.bos_token_id)
    optimisers = _optimisers(model, recipe)
    peaks = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    recent: list[float] = []
    for step, batch in enumerate(rows.split(recipe.n_rows)):  # batch: B, T
        for optimiser, peak in zip(optimisers, peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * _schedule(step, recipe)
            optimiser.zero_grad()
        mask = _own_document_mask(batch, bos)
        logits = model(input_ids=batch, attention_mask=mask).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        recent.append(loss.item())
        if (step + 1) % 100 == 0:
            progress(f"step {step + 1} of {recipe.n_steps}, loss {np.mean(recent[-50:]):.3f}")
        yield recent[-1]


def _optimisers(
    model: LlamaForCausalLM, recipe: PretrainRecipe
) -> tuple[torch.optim.Optimizer, ...]:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return (
        torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=0.0),
        torch.optim.AdamW(others, lr=recipe.learning_rate, weight_decay=0.0, betas=(0.9, 0.99)),
    )


def _schedule(step: int, recipe: PretrainRecipe) -> float:
    warm = min(1.0, (step + 1) / recipe.n_warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.n_steps))
    return warm * (recipe.final_frac + (1 - recipe.final_frac) * cosine)


def _own_document_mask(batch: torch.Tensor, bos: int) -> torch.Tensor:
    """Return what is added to attention scores, float32 [B, 1, T, T].

    Positions go on counting over a row. That is harmless: rotary embeddings know distances only.
    """
    length = batch.shape[1]
    document = torch.cumsum(batch == bos, dim=1)  # B, T
    same = document[:, :, None] == document[:, None, :]
    past = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.where(same & past, 0.0, _UNSEEN)[:, None]

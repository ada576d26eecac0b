"""The small base of the experiment `dolly`, pre-trained from scratch on public text.

    sheepfold-sim compare dolly --model "$(python -m benchmarks.dolly_base)" --data dolly.jsonl
    python -m benchmarks.dolly_base --quick --cache bases

A Llama of seven million parameters reads novels, fairy tales, plays and encyclopedia articles, no
instruction among them. It is made once, in 17 to 30 minutes of two free cores that multiply
bfloat16 numbers themselves (Zen 4, Sapphire Rapids and later) and some 70 of two that do not, and
kept in the user's cache under a name that holds the digest of recipe and text: another recipe,
another precision or another text is another base. The folder is printed, new or not; how it goes is
told on standard error.
"""

import argparse
import hashlib
import json
import lzma
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from platformdirs import user_cache_path

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TEXT_FILES: Final = (
    "grimms-fairy-tales.txt.xz",
    "public-domain-books.jsonl.xz",
    "tinyshakespeare.txt.xz",
    "tinystories-sample.txt.xz",
    "wikitext-2.test.txt.xz",
    "wikitext-2.valid.txt.xz",
)
"""All that the base reads. No instruction, no question of an evaluation set."""

_RECORD_NAME: Final = "pretraining.json"
_HELD_OUT_EVERY: Final = 50
"""One row in so many is kept for the loss on unread text."""
_MAX_DOCUMENT_CHARS: Final = 8_000
_MIN_DOCUMENT_CHARS: Final = 200
_REPORT_EVERY_STEPS: Final = 20
_N_RECENT: Final = 50

Show = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """How the base is made. Widths are multiples of 64, which bitsandbytes wants.

    Attributes:
        n_steps: Optimiser steps; a count and not a time, so that the result can be made again.
        n_rows: Rows of a batch.
        row_length: Tokens of a row; as long as the examples that the adapter will see.
        learning_rate: AdamW's peak, for embeddings, output layer and norms.
        matrix_learning_rate: Muon's peak, for the layers' matrices.
        final_frac: Where the cosine ends, as a part of the peak.
        products: Precision of the model's products: bfloat16 is twice as fast on processors that
            have it, and four times as slow on others. Sums and weights are float32.
        seed: Of initial weights and of the order of rows.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    n_layers: int = 6
    n_heads: int = 4
    n_steps: int = 1400
    n_rows: int = 8
    row_length: int = 512
    learning_rate: float = 5e-3
    matrix_learning_rate: float = 2e-2
    weight_decay: float = 0.05
    final_frac: float = 0.05
    n_warmup_steps: int = 20
    max_grad_norm: float = 1.0
    products: Literal["bfloat16", "float32"] = "float32"
    seed: int = 1


QUICK: Final = BaseRecipe(
    hidden_size=128, intermediate_size=384, n_layers=2, vocab_size=2048, n_steps=40, row_length=128
)
"""For `--quick`: it shows that everything runs, not what a base can learn."""


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 numbers itself."""
    import torch

    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def data_folder() -> Path:
    """The folder of real data files: `SHEEPFOLD_DATA`, or the one beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SHEEPFOLD_DATA", beside))
    if not folder.is_dir():
        sys.exit(f"there are no data files at {folder}: let SHEEPFOLD_DATA name their folder")
    return folder


def default_cache() -> Path:
    """Where bases are kept when `--cache` names no other folder."""
    return Path(user_cache_path("sheepfold")) / "benchmarks"


def base_digest(recipe: BaseRecipe, text: Path) -> str:
    """Digest of the recipe and of each text file, in hexadecimal."""
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    for name in TEXT_FILES:
        digest.update(hashlib.sha256((text / name).read_bytes()).digest())
    return digest.hexdigest()


def ensure_base(recipe: BaseRecipe, text: Path, cache: Path, *, show: Show) -> Path:
    """Make the base unless the cache has it.

    Args:
        recipe: How.
        text: The folder with `TEXT_FILES`.
        cache: Where bases are kept.
        show: Told how it goes.

    Returns:
        A folder that `quant.base_model.load_base` loads.
    """
    folder = cache / f"dolly-base-{base_digest(recipe, text)[:16]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    # Made beside its place and moved there whole: what the cache holds is never half a base.
    making = Path(tempfile.mkdtemp(prefix="making-", dir=cache))
    try:
        make_base(recipe, text, making, show=show)
        try:
            making.replace(folder)
        except OSError:
            if not folder.is_dir():  # another process has made it meanwhile
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


def make_base(recipe: BaseRecipe, text: Path, out: Path, *, show: Show) -> None:
    """Read the text, train tokenizer and model, write both and a record of how it went."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from quant.tiny.tokenizer import train_tokenizer

    began = time.perf_counter()
    disable_progress_bar()  # of writing one small file
    documents = read_documents(text)
    tokenizer = train_tokenizer(documents, vocab_size=recipe.vocab_size)
    rows = _pack(documents, tokenizer, recipe)
    held_out = rows[::_HELD_OUT_EVERY]
    kept = torch.ones(len(rows), dtype=torch.bool)
    kept[::_HELD_OUT_EVERY] = False
    rows = rows[kept]
    n_chars = sum(map(len, documents))
    show(
        f"base: {n_chars:,} characters, {rows.numel():,} tokens, "
        f"{recipe.n_steps * recipe.n_rows / len(rows):.1f} passes over them"
    )
    model = _initial_model(recipe, tokenizer)
    losses = list(_train(model, rows, recipe, show))
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.save_pretrained(out)
    tokenizer.save_pretrained(str(out))
    held_out_loss = _mean_loss(model.float(), held_out, recipe)
    record = {
        "recipe": asdict(recipe),
        "n_parameters": model.num_parameters(),
        "n_characters": n_chars,
        "n_tokens": rows.numel(),
        "train_loss": float(np.mean(losses[-_N_RECENT:])),
        "held_out_loss": held_out_loss,
        "wall_s": time.perf_counter() - began,
        "threads": torch.get_num_threads(),
    }
    (out / _RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    show(
        f"base: {model.num_parameters():,} parameters, loss {held_out_loss:.3f} nats a token on "
        f"text that it has not read, {record['wall_s']:.0f} s"
    )


def read_documents(text: Path) -> list[str]:
    """All text files as documents of at most `_MAX_DOCUMENT_CHARS`, each the end of a paragraph."""
    documents: list[str] = []
    for name in TEXT_FILES:
        with lzma.open(text / name, "rt", encoding="utf-8") as stream:
            whole = (
                [json.loads(line)["text"] for line in stream]
                if name.endswith(".jsonl.xz")
                else [stream.read()]
            )
        for part in whole:
            documents.extend(_pieces(_plain(part)))
    return documents


def _plain(text: str) -> str:
    """Undo WikiText's tokenisation, which no reader of instructions will meet."""
    for found, meant in (
        *((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "it")),
        *((" ,", ","), (" .", "."), (" ;", ";"), (" 's", "'s"), (" )", ")"), ("( ", "(")),
        *(("\r\n", "\n"), ("<|endoftext|>", "\n\n")),
    ):
        text = text.replace(found, meant)
    return text


def _pieces(text: str) -> Iterator[str]:
    """Cut at paragraphs into pieces of a few thousand characters."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if len(piece) + len(paragraph) > _MAX_DOCUMENT_CHARS and piece:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if len(piece) >= _MIN_DOCUMENT_CHARS:
        yield piece


def _pack(
    documents: Sequence[str], tokenizer: "PreTrainedTokenizerFast", recipe: BaseRecipe
) -> "torch.Tensor":
    """Documents one after the other, int64 [rows, row_length]; the rest of a row is dropped."""
    import torch

    stream: list[int] = []
    for ids in tokenizer(list(documents), verbose=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    n_rows = len(stream) // recipe.row_length
    return torch.tensor(stream[: n_rows * recipe.row_length]).view(n_rows, recipe.row_length)


def _initial_model(recipe: BaseRecipe, tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        max_position_embeddings=2 * recipe.row_length,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # transformers draws initial weights from torch's global generator and takes no other; fork_rng
    # puts that generator back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


def _batches(rows: "torch.Tensor", recipe: BaseRecipe) -> Iterator["torch.Tensor"]:
    """Yield batches [n_rows, row_length], each pass in an order of its own."""
    import torch

    generator = torch.Generator().manual_seed(recipe.seed)
    given = 0
    while given < recipe.n_steps:
        for order in torch.randperm(len(rows), generator=generator).split(recipe.n_rows):
            if given < recipe.n_steps and len(order) == recipe.n_rows:
                yield rows[order]
                given += 1


def _train(
    model: "LlamaForCausalLM", rows: "torch.Tensor", recipe: BaseRecipe, show: Show
) -> Iterator[float]:
    """Train in place, one batch a step; yield each step's loss."""
    import torch

    optimisers = _optimisers(model, recipe)
    peaks = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    recent: list[float] = []
    began = time.perf_counter()
    model.train()
    for step, batch in enumerate(_batches(rows, recipe), start=1):
        for optimiser, peak in zip(optimisers, peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * _schedule(step, recipe)
            optimiser.zero_grad()
        loss = _loss(model, batch, recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        for optimiser in optimisers:
            optimiser.step()
        recent.append(loss.item())
        if step % _REPORT_EVERY_STEPS == 0 or step == recipe.n_steps:
            spent = time.perf_counter() - began
            show(
                f"base: step {step} of {recipe.n_steps}, loss {np.mean(recent[-_N_RECENT:]):.3f}, "
                f"{step * batch.numel() / spent:,.0f} tokens/s, "
                f"{spent / step * (recipe.n_steps - step):.0f} s left"
            )
        yield recent[-1]


def _loss(model: "LlamaForCausalLM", batch: "torch.Tensor", recipe: BaseRecipe) -> "torch.Tensor":
    import torch

    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.products == "bfloat16"):
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state  # B, T, H
        # The last token of a row has no successor: taken off here, the logits are never copied.
        logits = model.lm_head(hidden[:, :-1].flatten(0, 1))  # B·(T-1), V
    return torch.nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten())


def _mean_loss(model: "LlamaForCausalLM", rows: "torch.Tensor", recipe: BaseRecipe) -> float:
    import torch

    model.eval()
    with torch.inference_mode():
        losses = [float(_loss(model, batch, recipe)) for batch in rows.split(recipe.n_rows)]
    return float(np.mean(losses))


def _optimisers(
    model: "LlamaForCausalLM", recipe: BaseRecipe
) -> tuple["torch.optim.Optimizer", ...]:
    """Muon for the layers' matrices, AdamW for all else, as for the embedded base."""
    import torch

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return (
        torch.optim.Muon(
            matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay
        ),
        torch.optim.AdamW(
            others, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.95)
        ),
    )


def _schedule(step: int, recipe: BaseRecipe) -> float:
    warm = min(1.0, step / recipe.n_warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.n_steps))
    return warm * (recipe.final_frac + (1 - recipe.final_frac) * cosine)


def main() -> None:
    """Make the base if the cache does not have it; print where it lies."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a toy, in seconds")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="another number of steps: another base")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = QUICK if args.quick else BaseRecipe()
    if has_bfloat16():
        recipe = replace(recipe, products="bfloat16")
    if args.steps:
        recipe = replace(recipe, n_steps=args.steps)
    folder = ensure_base(
        recipe, data_folder() / "text", args.cache, show=lambda text: print(text, file=sys.stderr)
    )
    print(folder)


if __name__ == "__main__":
    main()

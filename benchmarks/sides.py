"""The sides that training is measured on: our engine and transformers' Trainer, on equal terms.

Models are initialised at random from a seed, records are real where `SHEEPFOLD_DATA` has them, and
both sides get the same tokens, the same adapter shape, the same optimiser and learning rate.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.resident import ResidentPeak
from edge_agent.data.reading import read_records
from edge_agent.data.records import Record
from edge_agent.data.tokens import Example, tokenize
from edge_agent.training.gradients import (
    GradientRule,
    MeanGradient,
    PrivateGradient,
    StepGradient,
    Wanted,
    gradients_of,
    noise_threads,
)
from edge_agent.training.sampling import ShuffledBatches
from edge_agent.training.trainer import (
    ClipNorm,
    LocalTrainer,
    RoundRecipe,
    TrainerOptions,
    TrainingProgress,
)
from privacy.dp_sgd.mechanism import Mechanism
from protocol.blocks import LoraBlock, LossOn, Schedule, Template, TrainingBlock
from protocol.clock import SystemClock
from quant.adapter import initial_adapter, sent_layout
from quant.base_model import LoadedBase
from quant.lora import AdaptedModel
from quant.memory import DEFAULT_LOSS_CHUNK, StepSettings

SHAPES: Final = {
    # hidden, intermediate, layers, heads, kv heads, vocabulary
    "tiny": (128, 384, 4, 4, 4, 512),
    "quick": (128, 384, 4, 4, 4, 4096),
    "small": (256, 704, 6, 8, 8, 4096),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}
PAPER_MODULES: Final = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
PAPER_LORA: Final = LoraBlock(
    rank=8, alpha=16.0, dropout=0.05, target_modules=PAPER_MODULES, init_seed=0
)
LEARNING_RATE: Final = 5e-3
"""Not the paper's: with its 1.5e-4 a random base learns nothing in ten steps, and losses agree."""
MAX_LENGTH: Final = 512
_DOLLY: Final = "dolly/databricks-dolly-15k.shared.jsonl.xz"
_DEFAULT_DATA: Final = Path(__file__).resolve().parents[2] / "shared" / "data"


def data_folder() -> Path:
    """Where the real records lie; `SHEEPFOLD_DATA` names another place."""
    return Path(os.environ.get("SHEEPFOLD_DATA", _DEFAULT_DATA))


def dolly_records(n_records: int, seed: int) -> list[Record]:
    """Records of databricks-dolly-15k, drawn without replacement.

    Raises:
        SystemExit: The file is not there.
    """
    path = data_folder() / _DOLLY
    if not path.exists():
        raise SystemExit(f"no {_DOLLY} in {data_folder()}; SHEEPFOLD_DATA names another folder")
    records, _ = read_records(path)
    drawn = np.random.default_rng(seed).choice(len(records), size=n_records, replace=False)
    return [records[int(i)] for i in drawn]


def make_model(shape: str, folder: Path, texts: Sequence[str]) -> None:
    """Write a random Llama in bfloat16, and a byte-level BPE tokenizer trained on the texts.

    Args:
        shape: A key of `SHAPES`.
        folder: Made when missing.
        texts: What the tokenizer learns from; its vocabulary is the model's, 4,096 at most.
    """
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=min(vocabulary, 4096),
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder, max_shard_size="4GB")


@contextmanager
def made_model(shape: str, records: Sequence[Record]) -> Iterator[Path]:
    """A folder with `make_model`'s model while the context is open."""
    with tempfile.TemporaryDirectory(prefix="sheepfold-benchmark-") as name:
        texts = [record.instruction + " " + record.response for record in records]
        make_model(shape, Path(name), texts)
        yield Path(name)


def examples_of(records: Sequence[Record], base: LoadedBase) -> list[Example]:
    """The records as the paper trains on them: Alpaca template, loss on every token, 512 tokens."""
    data = tokenize(
        records,
        base.tokenizer,
        template=Template.ALPACA,
        loss_on=LossOn.ALL,
        max_length=MAX_LENGTH,
    )
    return list(data.examples)


def unquantise(base: LoadedBase) -> None:
    """Replace every 4-bit layer by a plain one with the same values in the compute dtype."""
    from bitsandbytes.functional import dequantize_4bit

    from quant.base_model import linear_modules

    for name, module in list(linear_modules(base.model)):
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        plain = torch.nn.Linear(1, 1, bias=False, device=base.device)
        plain.in_features, plain.out_features = module.in_features, module.out_features
        plain.weight = torch.nn.Parameter(weight.to(base.compute_dtype), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(base.model.get_submodule(parent), last, plain)


Step = Callable[[], float]
"""One optimiser step on the next batch; returns its loss."""


def our_step(
    adapted: AdaptedModel,
    batches: Sequence[Sequence[Example]],
    *,
    rule: GradientRule | None = None,
    n_checkpointed_layers: int = 0,
) -> Step:
    """A step of our function, loss and rule on given padded batches, one after the other.

    Args:
        adapted: The model.
        batches: The batches; each is one micro-batch.
        rule: What the gradient is made of; None: the mean over the batch, clipped to a norm of 1.
        n_checkpointed_layers: Decoder layers that are recomputed.
    """
    adapted.load(initial_adapter(adapted.base.description, adapted.lora))
    adapted.checkpoint_activations(n_checkpointed_layers)
    adapted.model.train()
    weights = torch.nn.Parameter(adapted.weights)
    optimizer = torch.optim.AdamW([weights], lr=LEARNING_RATE, weight_decay=0.0)
    taken = MeanGradient() if rule is None else rule
    clip = ClipNorm(1.0)
    done = 0

    def step() -> float:
        nonlocal done
        batch = tuple(batches[done % len(batches)])
        wanted = Wanted(
            examples=batch,
            dropout_seeds=tuple(range(done * 1000, done * 1000 + len(batch))),
            per_example=taken.per_example,
            loss_scale=1.0,
            loss_chunk=DEFAULT_LOSS_CHUNK,
        )
        done += 1
        total = StepGradient(adapted)
        taken.begin(total, step=done)
        given = gradients_of(adapted, wanted)
        taken.add(given, total, loss_scale=1.0)
        taken.finish(total, n_examples=len(batch), step=done)
        if rule is None:
            clip(total, step=done)
        weights.grad = total.vector
        optimizer.step()
        return given.loss_sum / len(batch)

    return step


def private(batch_size: int, device: torch.device | None = None) -> PrivateGradient:
    """DP-SGD as the agent does it, at an ordinary setting."""
    mechanism = Mechanism(clip_norm=1.0, noise_multiplier=1.0, expected_batch=float(batch_size))
    n_threads = 0 if device is None else noise_threads(device, allowed=None)
    return PrivateGradient(mechanism=mechanism, secret=bytes(32), n_noise_threads=n_threads)


def our_epoch(
    adapted: AdaptedModel,
    examples: Sequence[Example],
    *,
    batch_size: int,
    settings: StepSettings | None = None,
    rule: GradientRule | None = None,
) -> list[float]:
    """One epoch of the agent's own trainer, with its own cut of the batches.

    Returns:
        Seconds of each step but the first.
    """
    ends: list[float] = []

    def on_progress(_: TrainingProgress) -> None:
        synchronize(adapted.base.device)
        ends.append(time.perf_counter())

    block = TrainingBlock(
        batch_size=batch_size,
        local_epochs=1,
        learning_rate=LEARNING_RATE,
        schedule=Schedule.LINEAR,
        final_frac=0.0,
        max_grad_norm=1.0,
    )
    trainer = LocalTrainer(
        adapted,
        examples,
        RoundRecipe(training=block, schedule_start=0.0, schedule_end=1.0, seed=0),
        sampler=ShuffledBatches(n_examples=len(examples), batch_size=batch_size, seed=0),
        clock=SystemClock(),
        options=TrainerOptions(
            settings=settings or StepSettings(),
            rule=rule or MeanGradient(),
            on_progress=on_progress,
        ),
    )
    layout = sent_layout(adapted.shapes(), adapted.lora.sent)
    start = initial_adapter(adapted.base.description, adapted.lora)
    trainer.run(start, layout, weight=1)
    return [end - begin for begin, end in pairwise(ends)]


def peft_trainer(
    folder: Path,
    examples: Sequence[Example],
    *,
    batch_size: int,
    compute_dtype: torch.dtype,
    device: torch.device,
    shuffle: bool,
    n_steps: int,
    checkpointing: bool = False,
) -> Any:
    """The Trainer of transformers on peft's LoRA over bitsandbytes' NF4, as their manuals have it.

    Args:
        folder: The base.
        examples: The same tokens as ours.
        batch_size: Of a step; padded to its longest.
        compute_dtype: Of the 4-bit layers.
        device: Where.
        shuffle: The Trainer's own random batches; else the examples in the order given.
        n_steps: How many steps; -1: one epoch.
        checkpointing: Recompute activations.
    """
    import transformers
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        Trainer,
        TrainingArguments,
    )

    transformers.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        ),
        dtype=compute_dtype,
        device_map={"": device.index or 0} if device.type == "cuda" else None,
    )
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    lora = PAPER_LORA
    model = get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=int(lora.alpha),
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            task_type="CAUSAL_LM",
        ),
    )
    rows = [
        {
            "input_ids": example.input_ids.tolist(),
            "labels": np.where(example.loss_mask, example.input_ids, -100).tolist(),
        }
        for example in examples
    ]

    class InOrder(Trainer):  # type: ignore[misc]  # transformers' class is untyped here
        def _get_train_sampler(self, *_: object) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=batch_size,
        max_steps=n_steps,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda" and compute_dtype is torch.bfloat16,
        fp16=device.type == "cuda" and compute_dtype is torch.float16,
        seed=0,
        remove_unused_columns=False,
    )
    return (Trainer if shuffle else InOrder)(
        model=model, args=arguments, train_dataset=rows, data_collator=_padded
    )


def _padded(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])

    ids = column("input_ids", 0)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": ids, "labels": column("labels", -100), "attention_mask": mask}


class StepTimes:
    """Times each step of a Trainer; give it to `add_callback` as `StepTimes.callback()`."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is measured yet."""
        self.times: list[float] = []
        self._device = device
        self._began = 0.0

    def callback(self) -> Any:
        """A TrainerCallback that fills `times`."""
        from transformers import TrainerCallback

        outer = self

        class Timer(TrainerCallback):  # type: ignore[misc]  # transformers' class is untyped here
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                synchronize(outer._device)
                outer._began = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                synchronize(outer._device)
                outer.times.append(time.perf_counter() - outer._began)

        return Timer()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Peak memory above what stood when it was made, in bytes.

    On the CPU it is the resident set; on CUDA what the allocator handed out.
    """

    def __init__(self, device: torch.device) -> None:
        """Take what stands now, and forget earlier peaks."""
        self._device = device
        if device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.standing_bytes = int(torch.cuda.memory_allocated(device))
        else:
            self._resident = ResidentPeak()
            self.standing_bytes = self._resident.standing_bytes

    def above_bytes(self) -> int:
        """The peak since, above what stood."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device)) - self.standing_bytes
        return self._resident.above_bytes()

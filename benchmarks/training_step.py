"""A training step of Sheepfold's engine against stock peft, in time and memory.

    python benchmarks/training_step.py --model small --json -
    python benchmarks/training_step.py --model 7b --device cuda --max-memory-gb 24

Sides, each in a process of its own:
  engine      LocalTrainer: our LoRA function on the NF4 base
  peft        stock peft on the same NF4 base, padded batch, loss of transformers
  engine-16   LocalTrainer's mathematics on the base without quantisation (float32 on the CPU,
              bfloat16 or float16 on a GPU)

All sides take the same examples, the same logical batch, AdamW and learning rate. Models are
initialised at random from a seed; nothing is downloaded.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    # hidden, intermediate, layers, heads, kv heads, vocabulary
    "tiny": (128, 384, 4, 4, 4, 512),
    "small": (512, 1408, 8, 8, 8, 4096),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEER_OF = {"engine": "engine", "peft": "stock peft, NF4", "engine-16": "unquantised base"}


def make_model(name: str, folder: Path) -> None:
    """Write a random Llama and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
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
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="2GB")


def make_examples(args: argparse.Namespace) -> list[Any]:
    """Sequences with the lengths of instruction data: many short, few long."""
    import numpy as np

    from edge_agent.data.tokens import Example

    rng = np.random.default_rng(0)
    examples = []
    for number in range(args.batch_size):
        drawn = int(rng.lognormal(np.log(args.tokens / 3), 0.6))
        n_tokens = int(np.clip(drawn, 16, args.tokens))
        mask = np.zeros(n_tokens, np.bool_)
        mask[n_tokens // 2 :] = True
        ids = rng.integers(3, 250, n_tokens).astype(np.int32)
        examples.append(
            Example(
                input_ids=ids,
                loss_mask=mask,
                source=f"made[{number}]",
                category=None,
                truncated=False,
            )
        )
    return examples


def measure_side(args: argparse.Namespace) -> dict[str, Any]:
    """Run one side in this process."""
    began = time.perf_counter()
    import numpy as np
    import torch

    from quant.base_model import limit_device_memory, load_base
    from quant.lora import AdaptedModel

    imported = time.perf_counter()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    base = load_base(args.folder, device=device)
    if args.max_memory_gb:
        limit_device_memory(int(args.max_memory_gb * 1e9), device)
    if args.side == "engine-16":
        _unquantise(base)
    loaded = time.perf_counter()
    examples = make_examples(args)
    standing = _memory(device, reset=True)
    step = _peft_step(args, base, examples) if args.side == "peft" else None
    if step is None:
        from protocol.manifest import LoraBlock

        lora = LoraBlock(rank=8, alpha=16.0, target_modules=MODULES, init_seed=0)
        step = _engine_step(args, AdaptedModel(base, lora), examples)
    times = []
    for _ in range(args.warmup + args.steps):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = _memory(device, reset=False)
    kept = times[args.warmup :]
    n_tokens = sum(len(example.input_ids) for example in examples)
    return {
        "side": args.side,
        "import_s": imported - began,
        "load_s": loaded - imported,
        "step_s": float(np.median(kept)),
        "step_s_min": min(kept),
        "step_s_max": max(kept),
        "useful_tokens_per_s": n_tokens / float(np.median(kept)),
        "peak_bytes": peak,
        "standing_bytes": standing,
        "peak_above_standing_bytes": peak - standing,
    }


def _memory(device: Any, *, reset: bool) -> int:
    import torch

    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.max_memory_allocated(device))


def _unquantise(base: Any) -> None:
    """Replace every 4-bit layer by a plain one with the same values."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    from quant.base_model import linear_modules

    for name, module in list(linear_modules(base.model)):
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        plain = torch.nn.Linear(
            module.in_features, module.out_features, bias=False, device=base.device
        )
        plain.weight = torch.nn.Parameter(weight.to(base.compute_dtype), requires_grad=False)
        parent = base.model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], plain)


def _engine_step(args: argparse.Namespace, adapted: Any, examples: list[Any]) -> Any:
    """One logical step of the agent's own engine."""
    from edge_agent.sampling import ShuffledBatches
    from edge_agent.training import LocalTrainer, RoundRecipe, TrainerOptions
    from protocol.clock import SystemClock
    from protocol.manifest import TrainingBlock
    from quant.adapter import initial_adapter, sent_layout

    lora = adapted.lora
    block = TrainingBlock(batch_size=args.batch_size, local_steps=1, learning_rate=1e-4)
    start = initial_adapter(adapted.base.description, lora)
    layout = sent_layout(adapted.shapes(), lora.sent)
    options = TrainerOptions(micro_tokens=args.micro_tokens)

    def step() -> None:
        trainer = LocalTrainer(
            adapted,
            examples,
            RoundRecipe(training=block, schedule_start=0.0, schedule_end=1.0, seed=0),
            sampler=ShuffledBatches(n_examples=len(examples), batch_size=args.batch_size, seed=0),
            clock=SystemClock(),
            options=options,
        )
        trainer.run(start, layout, weight=1)

    return step


def _peft_step(args: argparse.Namespace, base: Any, examples: list[Any]) -> Any:
    """The same step as people write it: padded micro-batches, transformers' loss, AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model

    from edge_agent.data.batches import collate

    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(MODULES), task_type="CAUSAL_LM")
    model = get_peft_model(base.model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    longest = max(len(example.input_ids) for example in examples)
    per_micro = max(1, args.micro_tokens // longest)

    def step() -> None:
        for start in range(0, len(examples), per_micro):
            batch = collate(examples[start : start + per_micro], 0)
            labels = batch.input_ids.masked_fill(~batch.loss_mask, -100)
            loss = model(
                input_ids=batch.input_ids.to(base.device),
                attention_mask=batch.attention_mask.to(base.device),
                labels=labels.to(base.device),
            ).loss
            (loss * per_micro / len(examples)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def machine(device: str) -> str:
    """What this ran on, in words."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    """Measure all sides and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="longest example")
    parser.add_argument("--micro-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--max-memory-gb", type=float, default=0.0)
    parser.add_argument("--sides", default="engine,peft,engine-16")
    parser.add_argument("--json", default="-")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure_side(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        child = [sys.executable, __file__, "--folder", folder]
        make = f"import sys; sys.path[:0] = {sys.path!r}; import training_step as t; "
        make += f"from pathlib import Path; t.make_model({args.model!r}, Path({folder!r}))"
        subprocess.run([sys.executable, "-c", make], check=True)
        common = [
            f"--{name.replace('_', '-')}={getattr(args, name)}"
            for name in (
                *("model", "device", "threads", "batch_size", "tokens", "micro_tokens"),
                *("steps", "warmup", "max_memory_gb"),
            )
        ]
        sides: dict[str, Any] = {}
        for side in args.sides.split(","):
            done = subprocess.run(
                [*child, "--side", side, *common], check=False, capture_output=True, text=True
            )
            if done.returncode:
                sides[side] = {"failed": done.stderr.strip().splitlines()[-1:]}
                continue
            sides[side] = json.loads(done.stdout.strip().splitlines()[-1])
    ours = sides["engine"]
    ratios = {
        f"step, ours ÷ {PEER_OF[name]}": {
            "ratio": ours["step_s"] / found["step_s"],
            "better": "lower",
        }
        for name, found in sides.items()
        if name != "engine" and "step_s" in found and "step_s" in ours
    }
    result = {
        "machine": machine(args.device),
        "model": args.model,
        "batch": f"{args.batch_size} x <= {args.tokens} tokens",
        "ratios": ratios,
        "sides": sides,
    }
    text = json.dumps(result, indent=2, ensure_ascii=False)
    if args.json == "-":
        print(text)
    else:
        Path(args.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

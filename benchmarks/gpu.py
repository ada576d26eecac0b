"""What only a GPU can tell: memory against the estimator, speed at 1B and 7B, the CPU's numbers.

    python -m benchmarks.gpu [--quick] [--cap-gb 24] --json FILE

Random-initialised Llamas in NF4, memory capped as on a 24 GB card, float16 and bfloat16. Nothing is
downloaded; without the real records, lengths are drawn as theirs lie. Each model and dtype runs in
a process of its own, both sides one after the other on the same base, and only while there is time.
`--device cpu --quick` tries the same code where there is no GPU.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from benchmarks import sides
from benchmarks.report import Row, add_options, in_own_process, write_report
from benchmarks.simulation_ours import vectorised, world_records
from edge_agent.data.tokens import Example
from edge_agent.training.gradients import StepNoise
from edge_agent.training.planning import choose_settings, measure, workload_of
from protocol.clock import SystemClock
from quant.base_model import LoadedBase, load_base
from quant.lora import AdaptedModel
from quant.loss import example_losses
from quant.memory import StepSettings
from quant.tiny import EMBEDDED_NAME

MODULE = "benchmarks.gpu"
PAPER_SAMPLES_PER_S = 2.08
BATCH_SIZE = 32
TOGETHER_BATCH = 4
"""Examples in the micro-batch of a virtual agent."""
TOGETHER_AT_MOST = {"7b": 4}
"""Agents at once; others: `TOGETHER_AGENTS`. More do not fit into 24 GB."""
TOGETHER_AGENTS = 8
_N_STEPS = 4
_WORST_CASE_S = {"7b": 340.0, "1b": 180.0, "quick": 30.0, "tiny": 30.0}


def drawn_examples(n_examples: int, vocabulary: int, seed: int) -> list[Example]:
    """Examples with lengths as Dolly's in the paper's template: median 160 tokens, cut at 512."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(160.0), 0.75, n_examples), 40, sides.MAX_LENGTH)
    return [example_of(int(length), vocabulary, rng) for length in lengths]


def example_of(n_tokens: int, vocabulary: int, rng: np.random.Generator) -> Example:
    """One example of random tokens, all of them with loss."""
    mask = np.ones(n_tokens, np.bool_)
    mask[0] = False
    return Example(
        input_ids=rng.integers(3, vocabulary, n_tokens).astype(np.int32),
        loss_mask=mask,
        source="made",
        category=None,
        truncated=False,
    )


class AllocatorMeter:
    """The meter of `edge_agent.training.planning`, also where there is no GPU."""

    def __init__(self, device: torch.device, limit_bytes: int) -> None:
        """Measure on this device, under this limit."""
        self._device, self._limit_bytes = device, limit_bytes

    def limit_bytes(self) -> int:
        """The cap."""
        return self._limit_bytes

    def added_bytes(self, work: Callable[[], None]) -> int:
        """Peak during `work` above what stood before it."""
        memory = sides.PeakMemory(self._device)
        work()
        sides.synchronize(self._device)
        return memory.above_bytes()

    def seconds(self, work: Callable[[], None]) -> float:
        """How long it takes, until the device has done it."""
        sides.synchronize(self._device)
        began = time.perf_counter()
        work()
        sides.synchronize(self._device)
        return time.perf_counter() - began


def side(job: dict[str, Any]) -> dict[str, Any]:
    """Everything about one model in one dtype."""
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    cap_bytes = int(job["cap_gb"] * 1e9)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total), device)
    began = time.perf_counter()
    base = load_base(job["folder"], device=device, compute_dtype=dtype)
    found: dict[str, Any] = {"device": device.type, "load_s": time.perf_counter() - began}
    vocabulary = int(base.model.config.vocab_size)
    examples = drawn_examples(_N_STEPS * BATCH_SIZE, vocabulary, seed=0)
    lora = sides.PAPER_LORA
    adapted = AdaptedModel(base, lora)
    meter = AllocatorMeter(device, cap_bytes)
    found["memory"] = _memory(adapted, meter, job["micro_tokens"])
    found["samples"] = _throughput(adapted, examples, meter, device)
    adapted.detach()
    found["private"] = _private(base, examples, meter, device)
    found["together"] = vectorised(
        base,
        (TOGETHER_BATCH,),
        (1, job["at_once"]),
        job["device"],
        n_agents=TOGETHER_AGENTS,
        repetitions=2,
        with_probe=False,
    )
    n_steps = 3
    steps = examples[: 8 * (n_steps + 1)]
    found["ours"] = _our_steps(base, steps, n_steps, device)
    del base, adapted
    found["trainer"] = _trainer_steps(job, steps, n_steps, device, dtype)
    return found


def _memory(adapted: AdaptedModel, meter: AllocatorMeter, micro_tokens: list[int]) -> list[Any]:
    """Measured and predicted bytes of micro-batches, every layer recomputed."""
    workload = workload_of(adapted, longest=sides.MAX_LENGTH)
    settings = StepSettings(micro_tokens=4096, n_checkpointed_layers=adapted.n_layers)
    calibration = measure(adapted, workload, workload.predict(settings), meter)
    vocabulary = int(adapted.base.model.config.vocab_size)
    rng = np.random.default_rng(1)
    rows = []
    for n_tokens in micro_tokens:
        step_settings = StepSettings(micro_tokens=n_tokens, n_checkpointed_layers=adapted.n_layers)
        batch = [
            example_of(sides.MAX_LENGTH, vocabulary, rng)
            for _ in range(n_tokens // sides.MAX_LENGTH)
        ]
        step = sides.our_step(adapted, [batch], n_checkpointed_layers=adapted.n_layers)
        step()
        measured = meter.added_bytes(step)
        rows.append(
            {
                "micro_tokens": n_tokens,
                "measured": measured,
                "predicted": workload.predict(step_settings).estimate.step,
                "calibrated": workload.predict(step_settings, calibration).estimate.step,
            }
        )
    return rows


def _throughput(
    adapted: AdaptedModel, examples: list[Example], meter: AllocatorMeter, device: torch.device
) -> dict[str, Any]:
    """Samples a second of the agent's own trainer with the settings that it chooses."""
    chosen = choose_settings(
        adapted, longest=sides.MAX_LENGTH, meter=meter if device.type == "cuda" else None
    )
    sides.our_epoch(adapted, examples[:BATCH_SIZE], batch_size=BATCH_SIZE, settings=chosen.settings)
    memory = sides.PeakMemory(device)
    times = sides.our_epoch(adapted, examples, batch_size=BATCH_SIZE, settings=chosen.settings)
    mean_tokens = sum(len(example.input_ids) for example in examples) / len(examples)
    return {
        "samples_per_s": [BATCH_SIZE / taken for taken in times],
        "tokens_per_s": [BATCH_SIZE * mean_tokens / taken for taken in times],
        "settings": asdict(chosen.settings),
        "text": chosen.text,
        "peak_bytes": memory.standing_bytes + memory.above_bytes(),
    }


def _private(
    base: LoadedBase, examples: list[Example], meter: AllocatorMeter, device: torch.device
) -> dict[str, Any]:
    """DP-SGD against the same training without: four examples in flight, and as each side likes."""
    lora = sides.PAPER_LORA.model_copy(update={"dropout": 0.0})
    adapted = AdaptedModel(base, lora)
    longest = max(len(example.input_ids) for example in examples)
    small = StepSettings(
        micro_tokens=4 * longest, max_examples=4, n_checkpointed_layers=adapted.n_layers
    )
    found: dict[str, Any] = {"noise_s": _noise_s(adapted)}
    for kind in ("four", "chosen"):
        taken: dict[str, Any] = {
            name: {"step_s": [], "above_bytes": 0, "settings": small}
            for name in ("ordinary", "private")
        }
        if kind == "chosen":
            for name, side_found in taken.items():
                chosen = choose_settings(
                    adapted,
                    longest=longest,
                    private=name == "private",
                    meter=meter if device.type == "cuda" else None,
                )
                side_found["settings"] = chosen.settings
        for _ in range(2):
            for name, side_found in taken.items():
                rule = sides.private(BATCH_SIZE, device) if name == "private" else None
                memory = sides.PeakMemory(device)
                side_found["step_s"] += sides.our_epoch(
                    adapted,
                    examples,
                    batch_size=BATCH_SIZE,
                    settings=side_found["settings"],
                    rule=rule,
                )
                side_found["above_bytes"] = max(side_found["above_bytes"], memory.above_bytes())
        for side_found in taken.values():
            side_found["settings"] = asdict(side_found["settings"])
        found[kind] = taken
    adapted.detach()
    return found


def _noise_s(adapted: AdaptedModel) -> float:
    """What one thread takes for the noise of a step."""
    began = time.perf_counter()
    StepNoise(bytes(32)).of_step(0)(adapted.weights.numel())
    return time.perf_counter() - began


def _our_steps(
    base: LoadedBase, examples: list[Example], n_steps: int, device: torch.device
) -> dict[str, Any]:
    """Steps on padded batches of 8, every layer recomputed, as the Trainer takes them."""
    batches = [examples[i : i + 8] for i in range(0, 8 * (n_steps + 1), 8)]
    adapted = AdaptedModel(base, sides.PAPER_LORA)
    step = sides.our_step(adapted, batches, n_checkpointed_layers=adapted.n_layers)
    memory = sides.PeakMemory(device)
    times = []
    for _ in range(n_steps + 1):
        began = time.perf_counter()
        step()
        sides.synchronize(device)
        times.append(time.perf_counter() - began)
    adapted.detach()
    return {"times": times[1:], "above_bytes": memory.above_bytes()}


def _trainer_steps(
    job: dict[str, Any],
    examples: list[Example],
    n_steps: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    timer = sides.StepTimes(device)
    trainer = sides.peft_trainer(
        Path(job["folder"]),
        examples[: 8 * (n_steps + 1)],
        batch_size=8,
        compute_dtype=dtype,
        device=device,
        shuffle=False,
        n_steps=n_steps + 1,
        checkpointing=True,
    )
    trainer.add_callback(timer.callback())
    memory = sides.PeakMemory(device)
    trainer.train()
    return {"times": timer.times[1:], "above_bytes": memory.above_bytes()}


def equality(device: torch.device) -> dict[str, Any]:
    """Whether the device quantises and computes as the CPU does."""
    from bitsandbytes.functional import quantize_4bit

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1024, 1024, generator=generator, dtype=torch.bfloat16)
    on_cpu, cpu_state = quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    on_device, state = quantize_4bit(weights.to(device), quant_type="nf4", compress_statistics=True)
    codes = float((on_cpu == on_device.cpu()).float().mean())
    scales = float((cpu_state.absmax == state.absmax.cpu()).float().mean())
    cpu, other = load_base(EMBEDDED_NAME, device=torch.device("cpu")), None
    losses = {"cpu float32": _embedded_loss(cpu)}
    kinds = ("float32", "float16", "bfloat16") if device.type == "cuda" else ("float32",)
    for dtype in kinds:
        other = load_base(EMBEDDED_NAME, device=device, compute_dtype=getattr(torch, dtype))
        losses[f"{device.type} {dtype}"] = _embedded_loss(other)
    assert other is not None
    return {
        "equal_codes_frac": codes,
        "equal_scales_frac": scales,
        "equal_fingerprints": cpu.description.base.fingerprint
        == other.description.base.fingerprint,
        "losses": losses,
    }


def _embedded_loss(base: Any) -> float:
    rng = np.random.default_rng(2)
    ids = torch.from_numpy(rng.integers(3, 500, (4, 64))).to(base.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        return float(example_losses(base.model, input_ids=ids, loss_mask=mask).mean())


def rows_of(what: str, found: dict[str, Any]) -> list[Row]:
    """The comparisons of one model in one dtype."""
    samples, private = found["samples"], found["private"]
    rows = [
        Row.of(
            f"{what}: error of the predicted memory of a step, {kind}",
            [abs(row[kind] / row["measured"] - 1.0) for row in found["memory"]],
            None,
            peer_name="what the allocator handed out",
            unit="",
            target=0.05 if kind == "calibrated" else None,
        )
        for kind in ("predicted", "calibrated")
        if found["device"] == "cuda"  # elsewhere no counter tells what a step allocates
    ]
    rows.append(
        Row.of(
            f"{what}: samples a second, Dolly-like lengths up to 512",
            samples["samples_per_s"],
            [PAPER_SAMPLES_PER_S] * len(samples["samples_per_s"]),
            peer_name="the paper's 7B on a Titan RTX",
            unit="1/s",
            better="higher",
            target=2.0 if what.startswith("7b") else None,
        )
    )
    rows.append(
        Row.of(
            f"{what}: peak memory of that run, 0.6 GB for the driver included",
            [samples["peak_bytes"] / 1e9 + 0.6],
            [23.0],
            peer_name="the paper's 7B",
            unit="GB",
        )
    )
    for kind, how in (
        ("four", "batch 32, four examples at once, checkpointed"),
        ("chosen", "batch 32, each with the settings that it chooses"),
    ):
        ours, peer = private[kind]["private"], private[kind]["ordinary"]
        rows += [
            Row.of(
                f"{what}: DP-SGD step, {how}",
                ours["step_s"],
                peer["step_s"],
                peer_name="the same without",
                unit="s",
                target=1.10,
            ),
            Row.of(
                f"{what}: its peak memory above what stood",
                [ours["above_bytes"] / 1e9],
                [peer["above_bytes"] / 1e9],
                peer_name="the same without",
                unit="GB",
                target=1.15 if kind == "four" else None,
            ),
        ]
    four = private["four"]
    rows.append(
        Row.of(
            f"{what}: memory that DP-SGD adds, four examples at once",
            [(four["private"]["above_bytes"] - four["ordinary"]["above_bytes"]) / 1e9],
            None,
            peer_name="a limit",
            unit="GB",
            target=0.35,
        )
    )
    for cell in found["together"]:
        speeds = {int(group): values for group, values in cell["examples_per_s"].items()}
        rows.append(
            Row.of(
                f"{what}: {max(speeds)} virtual agents at once, micro-batches of {cell['batch']} "
                "records of the embedded world each",
                speeds[max(speeds)],
                speeds[1],
                peer_name="one after the other",
                unit="examples/s",
                better="higher",
                target=3.0,
            )
        )
    if "times" in found.get("trainer", {}):
        ours, peer = found["ours"], found["trainer"]
        rows.append(
            Row.of(
                f"{what}: step, same padded batches of 8, checkpointed",
                ours["times"],
                peer["times"],
                peer_name="transformers Trainer + peft + bitsandbytes",
                unit="s",
                target=0.9,
            )
        )
        rows.append(
            Row.of(
                f"{what}: memory above what stood, the same",
                [ours["above_bytes"] / 1e9],
                [peer["above_bytes"] / 1e9],
                peer_name="transformers Trainer + peft + bitsandbytes",
                unit="GB",
                target=0.8,
            )
        )
    return rows


def main() -> None:
    """Measure, print, write; whatever is done when time is up is written."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--cap-gb", type=float, default=24.0, help="memory of the card to imitate")
    parser.add_argument("--models", default="7b,1b", help="which, in this order")
    parser.add_argument("--dtypes", default="bfloat16,float16", help="which, in this order")
    parser.add_argument(
        "--budget-s", type=float, default=560.0, help="begin nothing that ends later"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(side(json.loads(args.job))))
        return
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no CUDA device; `--device cpu --quick` tries the code without one")
    clock, device = SystemClock(), torch.device(args.device)
    began = clock.monotonic()
    details: dict[str, Any] = {"equality": equality(device), "left_out": []}
    rows: list[Row] = []
    shapes = ["quick"] if args.quick else args.models.split(",")
    dtypes = ["float32"] if device.type == "cpu" else args.dtypes.split(",")
    for shape in shapes:
        with sides.made_model(shape, world_records(2000)) as folder:
            for dtype in dtypes:
                what = f"{shape} {dtype}"
                print(f"[{clock.monotonic() - began:.0f} s] {what}", file=sys.stderr, flush=True)
                left_s = args.budget_s - (clock.monotonic() - began)
                if left_s < _WORST_CASE_S[shape]:
                    details["left_out"].append(what)
                    continue
                job = {
                    "folder": str(folder),
                    "device": args.device,
                    "dtype": dtype,
                    "cap_gb": args.cap_gb,
                    "at_once": TOGETHER_AT_MOST.get(shape, TOGETHER_AGENTS),
                    "micro_tokens": [512, 1024] if args.quick else [2048, 4096, 8192],
                }
                try:
                    details[what] = in_own_process(MODULE, job)
                except RuntimeError as error:
                    details[what] = {"failed": str(error)}
                    print(error, file=sys.stderr)
                    continue
                rows += rows_of(what, details[what])
                if args.json not in {None, "-"}:  # whatever ends this next, so much is there
                    write_report(rows, module=MODULE, json_target=args.json, details=details)
    write_report(rows, module=MODULE, json_target=args.json, details=details)


if __name__ == "__main__":
    main()

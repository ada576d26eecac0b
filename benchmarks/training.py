"""The training engine against transformers' Trainer + peft + bitsandbytes, and against itself.

    python -m benchmarks.training [--quick] --json FILE

One thread. Records are real (databricks-dolly-15k), with the paper's template, length, adapter and
dropout; the model is a random Llama of six layers, because neither time nor memory
depend on what it knows. Each side runs in a process of its own; sides alternate.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.report import Row, add_options, as_markdown, in_own_process, write_report

MODULE = "benchmarks.training"
BATCH_SIZE = 16
N_RECORDS = 150
_N_HELD_OUT = 40
TRAINER = "transformers Trainer + peft + bitsandbytes"


def side(job: dict[str, Any]) -> dict[str, Any]:
    """What one process measures; `job["do"]` says what."""
    began = time.perf_counter()
    import torch

    from benchmarks import sides
    from quant.base_model import load_base

    torch.set_num_threads(1)
    imported = time.perf_counter()
    base = load_base(job["folder"])
    records = sides.dolly_records(N_RECORDS + _N_HELD_OUT, job["seed"])
    examples = sides.examples_of(records, base)
    train, held_out = examples[:N_RECORDS], examples[N_RECORDS:]
    do = {
        "step": _steps,
        "epoch": _epoch,
        "per-example": _per_example,
        "count": _count,
        "layer": _layer,
    }[job["do"]]
    return {"import_s": imported - began, **do(job, base, train, held_out)}


def _batches(train: list[Any], n_batches: int) -> list[list[Any]]:
    return [train[i * BATCH_SIZE : (i + 1) * BATCH_SIZE] for i in range(n_batches)]


def _steps(job: dict[str, Any], base: Any, train: list[Any], _: list[Any]) -> dict[str, Any]:
    """Steps on the same padded batches, the first not counted; and the memory they took."""
    import torch

    from benchmarks import sides
    from quant.lora import AdaptedModel

    n_steps = job["n_steps"]
    batches = _batches(train, n_steps + 1)
    device = torch.device("cpu")
    if job["side"] == "trainer":
        del base
        timer = sides.StepTimes(device)
        trainer = sides.peft_trainer(
            Path(job["folder"]),
            [example for batch in batches for example in batch],
            batch_size=BATCH_SIZE,
            compute_dtype=torch.float32,
            device=device,
            shuffle=False,
            n_steps=n_steps + 1,
        )
        trainer.add_callback(timer.callback())
        memory = sides.PeakMemory(device)
        trainer.train()
        times = timer.times
    else:
        if job["side"] == "ours-fp32":
            sides.unquantise(base)
        step = sides.our_step(AdaptedModel(base, sides.PAPER_LORA), batches)
        memory = sides.PeakMemory(device)
        times = []
        for _number in range(n_steps + 1):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
    return {"step_s": sum(times[1:]) / n_steps, "above_bytes": memory.above_bytes()}


def _epoch(job: dict[str, Any], base: Any, train: list[Any], held_out: list[Any]) -> dict[str, Any]:
    """An epoch over one client's records, each side batching as it does by itself."""
    import torch

    from benchmarks import sides
    from edge_agent.evaluation import held_out_loss
    from quant.lora import AdaptedModel

    device = torch.device("cpu")
    if job["side"] == "trainer":
        trainer = sides.peft_trainer(
            Path(job["folder"]),
            train,
            batch_size=BATCH_SIZE,
            compute_dtype=torch.float32,
            device=device,
            shuffle=True,
            n_steps=-1,
        )
        started = time.perf_counter()
        trainer.train()
        taken = time.perf_counter() - started
        model = trainer.model
    else:
        adapted = AdaptedModel(base, sides.PAPER_LORA)
        started = time.perf_counter()
        sides.our_epoch(adapted, train, batch_size=BATCH_SIZE)
        taken = time.perf_counter() - started
        model = adapted.model
    return {"epoch_s": taken, "loss": held_out_loss(model, held_out, pad_id=0).mean}


def _per_example(job: dict[str, Any], base: Any, train: list[Any], _: list[Any]) -> dict[str, Any]:
    """DP-SGD over the ordinary step, the two taking turns; and the error of its gradients."""
    from benchmarks import sides
    from quant.lora import AdaptedModel

    adapted = AdaptedModel(base, sides.PAPER_LORA)
    batches = _batches(train, job["n_steps"] + 1)
    found: dict[str, Any] = {}
    for kind, n_checkpointed in (("plain", 0), ("checkpointed", adapted.n_layers)):
        kinds = {
            name: sides.our_step(
                adapted,
                batches,
                rule=sides.private(BATCH_SIZE) if name == "dp" else None,
                n_checkpointed_layers=n_checkpointed,
            )
            for name in ("ordinary", "dp")
        }
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _number in range(job["n_steps"] + 1):
            for name, step in kinds.items():
                started = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - started)
        for name, taken in times.items():
            found[f"{name} {kind}"] = sum(taken[1:]) / job["n_steps"]
    adapted.checkpoint_activations(0)
    adapted.detach()
    plain = sides.PAPER_LORA.model_copy(update={"dropout": 0.0})
    return {**found, "error": _gradient_error(AdaptedModel(base, plain), batches[0][:6])}


def _gradient_error(adapted: Any, batch: list[Any]) -> float:
    """Largest relative error of a per-example gradient against the example alone."""
    import numpy as np
    import torch

    from edge_agent.data.batches import collate
    from quant.adapter import initial_adapter
    from quant.loss import example_losses

    rng = np.random.default_rng(0)
    start = initial_adapter(adapted.base.description, adapted.lora)
    adapted.load({k: v + rng.normal(0, 0.02, v.shape).astype(np.float32) for k, v in start.items()})
    padded = collate(batch, 0)
    with adapted.per_example_gradients() as found:
        example_losses(
            adapted.model, input_ids=padded.input_ids, loss_mask=padded.loss_mask
        ).sum().backward()
    worst = 0.0
    for row, example in enumerate(batch):
        alone = collate([example], 0)
        adapted.clear_gradients()
        example_losses(
            adapted.model, input_ids=alone.input_ids, loss_mask=alone.loss_mask
        ).sum().backward()
        for name, factor in adapted.trainable.items():
            difference = torch.linalg.vector_norm(found[name][row] - factor.grad)
            worst = max(worst, float(difference / torch.linalg.vector_norm(factor.grad)))
    return worst


def _count(job: dict[str, Any], base: Any, train: list[Any], _: list[Any]) -> dict[str, Any]:
    """Useful tokens of an epoch's micro-batches, ours and padded as they come."""
    from edge_agent.training.micro_batches import cut
    from edge_agent.training.sampling import ShuffledBatches
    from quant.memory import StepSettings

    del base
    lengths = [len(example.input_ids) for example in train]
    sampler = ShuffledBatches(n_examples=len(train), batch_size=BATCH_SIZE, seed=job["seed"])
    settings = StepSettings()
    computed = padded = 0
    for step in range(sampler.steps_per_epoch):
        batch = [lengths[int(i)] for i in sampler.indices(step)]
        padded += len(batch) * max(batch)
        computed += sum(len(micro) * max(batch[i] for i in micro) for micro in cut(batch, settings))
    return {
        "ours": sum(lengths) / computed,
        "padded": sum(lengths) / padded,
        "lengths": sorted(lengths),
    }


def _layer(job: dict[str, Any], base: Any, train: list[Any], _: list[Any]) -> dict[str, Any]:
    """Bytes that autograd keeps in the second decoder layer, counted and predicted."""
    import torch

    from benchmarks import sides
    from edge_agent.data.batches import collate
    from edge_agent.training.planning import workload_of
    from quant.lora import AdaptedModel
    from quant.memory import MicroBatch, layer_bytes

    del job
    adapted = AdaptedModel(base, sides.PAPER_LORA)
    ids = collate(train[:4], 0).input_ids
    body = base.model.base_model
    known = {tensor.untyped_storage().data_ptr() for tensor in body.parameters()}
    inside, kept = False, {}

    def enter(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal inside
        inside = True
        known.update(t.untyped_storage().data_ptr() for t in kwargs["position_embeddings"])

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    layer = body.layers[1]
    layer.register_forward_pre_hook(enter, with_kwargs=True)
    layer.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        body(input_ids=ids, use_cache=False)
    workload = workload_of(adapted, longest=ids.shape[1])
    batch = MicroBatch(n_sequences=ids.shape[0], length=ids.shape[1])
    return {
        "counted": sum(kept.values()),
        "predicted": layer_bytes(workload.shape, workload.lora, workload.device, batch),
    }


def measure(folder: Path, *, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """All rows.

    Args:
        folder: The base.
        quick: One run of each, few steps.
    """
    n_runs, n_steps = (1, 2) if quick else (3, 3)
    common = {"folder": str(folder), "n_steps": n_steps}
    runs: dict[str, list[dict[str, Any]]] = {}

    def take(name: str, seed: int, **job: object) -> None:
        said = " ".join(str(value) for value in job.values())
        print(f"[{time.strftime('%H:%M:%S')}] {said}, run {seed + 1} of {n_runs}", file=sys.stderr)
        runs.setdefault(name, []).append(in_own_process(MODULE, {**common, **job, "seed": seed}))

    for seed in range(n_runs):
        for name in ("ours", "ours-fp32", "trainer"):
            take(name, seed, do="step", side=name)
        for name in ("ours", "trainer"):
            take("epoch " + name, seed, do="epoch", side=name)
        take("dp", seed, do="per-example")
        take("count", seed, do="count")
        take("layer", seed, do="layer")

    def column(name: str, key: str) -> list[float]:
        return [run[key] for run in runs[name]]

    rows = [
        Row.of(
            "NF4 step ÷ fp32 LoRA step",
            column("ours", "step_s"),
            column("ours-fp32", "step_s"),
            peer_name="our engine on the unquantised base",
            unit="s",
            target=1.25,
        ),
        Row.of(
            "step, same records, same padded batches",
            column("ours", "step_s"),
            column("trainer", "step_s"),
            peer_name=TRAINER,
            unit="s",
            target=0.9,
        ),
        Row.of(
            "memory above what stood after loading, same batches",
            [n / 1e6 for n in column("ours", "above_bytes")],
            [n / 1e6 for n in column("trainer", "above_bytes")],
            peer_name=TRAINER,
            unit="MB",
            target=0.8,
        ),
        Row.of(
            f"epoch over {N_RECORDS} records, each with its own batching",
            column("epoch ours", "epoch_s"),
            column("epoch trainer", "epoch_s"),
            peer_name=TRAINER,
            unit="s",
            target=0.6,
        ),
        Row.of(
            "held-out loss after that epoch",
            column("epoch ours", "loss"),
            column("epoch trainer", "loss"),
            peer_name=TRAINER,
            unit="nats a token",
            target=1.01,
        ),
        Row.of(
            f"useful tokens, {N_RECORDS} records, batch {BATCH_SIZE}",
            column("count", "ours"),
            None,
            peer_name="all computed tokens",
            unit="",
            better="higher",
            target=0.8,
        ),
        Row.of(
            "useful tokens ÷ those of padding each batch to its longest",
            column("count", "ours"),
            column("count", "padded"),
            peer_name="padding to the longest",
            unit="",
            better="higher",
        ),
        *(
            Row.of(
                f"DP-SGD step ÷ ordinary step, {kind}",
                column("dp", f"dp {kind}"),
                column("dp", f"ordinary {kind}"),
                peer_name="our ordinary step",
                unit="s",
                target=target,
            )
            for kind, target in (("plain", 1.10), ("checkpointed", 1.20))
        ),
        Row.of(
            "per-example gradient, largest relative error",
            column("dp", "error"),
            None,
            peer_name="a loop over the examples",
            unit="",
            target=1e-5,
        ),
        Row.of(
            "estimator's layer term: bytes it is off by",
            [
                float(abs(a - b))
                for a, b in zip(
                    column("layer", "predicted"), column("layer", "counted"), strict=True
                )
            ],
            None,
            peer_name="distinct storages that autograd keeps",
            unit="B",
            target=0.0,
        ),
    ]
    return rows, runs


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table for a page")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(side(json.loads(args.job))))
        return
    from benchmarks import sides

    shape = "quick" if args.quick else "small"
    with sides.made_model(shape, sides.dolly_records(2000, seed=1)) as folder:
        rows, details = measure(folder, quick=args.quick)
    write_report(rows, module=MODULE, json_target=args.json, details=details)
    if args.markdown is not None:
        args.markdown.write_text(as_markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

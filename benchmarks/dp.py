"""DP-SGD against the same training without it, and against opacus' two engines.

    python -m benchmarks.dp [--quick] --json FILE

One thread. Records are real (databricks-dolly-15k), models random Llamas in NF4, the adapter the
paper's without dropout. Ours is the agent's own rule: clipping, noise from AES-CTR, division. The
peers are opacus' hooks and its ghost clipping over peft's layers on the same base, each with its
own optimiser wrapper and torch's ordinary noise. All sides get the same padded batches.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.report import Row, add_options, as_markdown, in_own_process, write_report

MODULE = "benchmarks.dp"
BATCH_SIZES = (8, 32)
KINDS = ("plain", "checkpointed")
PEERS = {"hooks": "opacus, hooks", "ghost": "opacus, ghost clipping"}


def side(job: dict[str, Any]) -> dict[str, Any]:
    """What one process measures."""
    import torch

    from benchmarks import sides
    from quant.base_model import load_base

    torch.set_num_threads(1)
    base = load_base(job["folder"])
    size, n_steps = job["batch"], job["n_steps"]
    records = sides.dolly_records(size * (n_steps + 1), job["seed"])
    examples = sides.examples_of(records, base)
    batches = [examples[i * size : (i + 1) * size] for i in range(n_steps + 1)]
    steps = {name: _step(name, base, batches, job) for name in job["sides"]}
    memory = sides.PeakMemory(torch.device("cpu"))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(n_steps + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    found = {name: sum(taken[1:]) / n_steps for name, taken in times.items()}
    return {"step_s": found, "above_bytes": memory.above_bytes()}


def _step(
    name: str, base: Any, batches: Sequence[Any], job: dict[str, Any]
) -> Callable[[], object]:
    from benchmarks import sides
    from quant.lora import AdaptedModel

    if name in PEERS:
        return opacus_step(base, batches, ghost=name == "ghost")
    # Both of ours on one adapted model: an adapter is attached once.
    if "adapted" not in job:
        lora = sides.PAPER_LORA.model_copy(update={"dropout": 0.0})
        job["adapted"] = AdaptedModel(base, lora)
    adapted = job["adapted"]
    rule = sides.private(job["batch"]) if name == "private" else None
    n_layers = adapted.n_layers if job["kind"] == "checkpointed" else 0
    return sides.our_step(adapted, batches, rule=rule, n_checkpointed_layers=n_layers)


def opacus_step(base: Any, batches: Sequence[Any], *, ghost: bool) -> Callable[[], object]:
    """A step of opacus over peft's own LoRA layers on our 4-bit base."""
    import torch
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
    from peft import LoraConfig, get_peft_model

    from benchmarks import sides
    from edge_agent.data.batches import collate
    from quant.loss import example_losses

    lora, size = sides.PAPER_LORA, len(batches[0])
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha),
        lora_dropout=0.0,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base.model, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=sides.LEARNING_RATE, weight_decay=0.0)
    settings = {
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "expected_batch_size": size,
        "loss_reduction": "mean",
    }
    wrapped: Any
    if ghost:
        wrapped = GradSampleModuleFastGradientClipping(
            model, loss_reduction="mean", strict=False, max_grad_norm=1.0
        )
        optimizer: Any = DPOptimizerFastGradientClipping(adam, **settings)

        def criterion(losses: Any) -> Any:
            return losses

        criterion.reduction = "mean"  # type: ignore[attr-defined]
        loss_of = DPLossFastGradientClipping(wrapped, optimizer, criterion, "mean")
    else:
        wrapped = GradSampleModule(model, loss_reduction="mean", strict=False)
        optimizer = DPOptimizer(adam, **settings)
    padded = [collate(batch, 0) for batch in batches]
    done = 0

    def step() -> None:
        nonlocal done
        batch = padded[done % len(padded)]
        done += 1
        optimizer.zero_grad()
        losses = example_losses(model, input_ids=batch.input_ids, loss_mask=batch.loss_mask)
        (loss_of(losses) if ghost else losses.mean()).backward()
        optimizer.step()

    return step


def measure(folders: dict[str, Path], *, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """All rows.

    Args:
        folders: A base by its name.
        quick: One run of each, few steps.
    """
    n_runs, n_steps = (1, 2) if quick else (3, 3)
    runs: dict[str, list[dict[str, Any]]] = {}

    def take(base: str, batch: int, kind: str, *sides: str) -> None:
        for seed in range(n_runs):
            name = f"{base} {batch} {kind} {' '.join(sides)}"
            print(f"[{time.strftime('%H:%M:%S')}] {name}, run {seed + 1}", file=sys.stderr)
            job = {
                "folder": str(folders[base]),
                "batch": batch,
                "kind": kind,
                "sides": sides,
                "n_steps": n_steps,
                "seed": seed,
            }
            runs.setdefault(name, []).append(in_own_process(MODULE, job))

    rows = []
    for base in folders:
        for batch in BATCH_SIZES:
            for kind in KINDS:
                take(base, batch, kind, "ordinary", "private")
                both = runs[f"{base} {batch} {kind} ordinary private"]
                rows.append(
                    Row.of(
                        f"DP-SGD step, {base}, batch {batch}, {kind}",
                        [run["step_s"]["private"] for run in both],
                        [run["step_s"]["ordinary"] for run in both],
                        peer_name="the same without",
                        unit="s",
                        target=1.10 if kind == "plain" else 1.20,
                    )
                )
    large = list(folders)[-1]
    for batch in BATCH_SIZES:
        for name in ("ordinary", "private", *PEERS):
            take(large, batch, "plain", name)
        alone = {
            name: runs[f"{large} {batch} plain {name}"] for name in ("ordinary", "private", *PEERS)
        }
        memory = {
            name: [run["above_bytes"] / 1e6 for run in found] for name, found in alone.items()
        }
        rows.append(
            Row.of(
                f"its peak memory above what stood, {large}, batch {batch}",
                memory["private"],
                memory["ordinary"],
                peer_name="the same without",
                unit="MB",
                target=1.15,
            )
        )
        for name, said in PEERS.items():
            rows += [
                Row.of(
                    f"DP-SGD step, {large}, batch {batch}",
                    [run["step_s"]["private"] for run in alone["private"]],
                    [run["step_s"][name] for run in alone[name]],
                    peer_name=said,
                    unit="s",
                    target=1.0 if name == "hooks" else 0.6,
                ),
                Row.of(
                    f"its peak memory, {large}, batch {batch}",
                    memory["private"],
                    memory[name],
                    peer_name=said,
                    unit="MB",
                    target=1.0,
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

    records = sides.dolly_records(2000, seed=1)
    with sides.made_model("quick", records) as tiny, sides.made_model("small", records) as small:
        folders = {"1.4 M": tiny} if args.quick else {"1.4 M": tiny, "6.7 M": small}
        rows, details = measure(folders, quick=args.quick)
    write_report(rows, module=MODULE, json_target=args.json, details=details)
    if args.markdown is not None:
        args.markdown.write_text(as_markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Measures several models at once, each in a process that loads the base once."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edge_agent.data.reading import read_records
from edge_agent.data.records import Record
from protocol.manifest import FederationManifest
from protocol.wire import parse
from quant.adapter import AdapterArrays
from quant.base_model import load_base, set_threads
from quant.lora import AdaptedModel
from quant.quiet import quiet_libraries
from simulations.yardsticks import ModelScore, score, train_in_one_place

_N_PROCESSES: Final = 2


@dataclass(frozen=True, kw_only=True)
class MeasureJob:
    """A model to measure: an adapter as it is, or trained further first."""

    name: str
    manifest: bytes
    """The federation manifest as JSON: base, adapter shape and recipe."""
    adapter: AdapterArrays = field(repr=False)
    train_on: tuple[Path, ...]
    """Records to train on first; empty: the adapter is measured as it is."""
    n_steps: int
    batch_size: int
    seed: int
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A measured model."""

    name: str
    score: ModelScore


def measure(
    adapted: AdaptedModel, job: MeasureJob, draws: Sequence[Sequence[Record]]
) -> Measurement:
    """Train if asked to, then score.

    Args:
        adapted: A model of the job's manifest.
        job: What to do.
        draws: Held-out records, one sequence for each evaluation seed.
    """
    block = parse(FederationManifest, job.manifest).training
    block = block.model_copy(update={"batch_size": job.batch_size})
    arrays = job.adapter
    if job.train_on:
        records = [record for path in job.train_on for record in read_records(path)[0]]
        arrays = train_in_one_place(
            adapted, records, block, job.adapter, n_steps=job.n_steps, seed=job.seed
        )
    adapted.load(arrays)
    scores = score(adapted, draws, block, max_new_tokens=job.max_new_tokens)
    return Measurement(name=job.name, score=scores)


def measure_all(
    jobs: Sequence[MeasureJob],
    held_out: Sequence[Path],
    on_done: Callable[[int, int, str], None],
) -> dict[str, Measurement]:
    """Measure all jobs, two at a time, one thread each.

    Args:
        jobs: At least one; names differ.
        held_out: One file of records for each evaluation seed.
        on_done: Told how many of how many are done, and which.

    Returns:
        By name.
    """
    found: dict[str, Measurement] = {}
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(_N_PROCESSES, mp_context=context, initializer=quiet_libraries) as pool:
        futures = [pool.submit(_measure_in_child, job, tuple(held_out)) for job in jobs]
        for number, future in enumerate(as_completed(futures), start=1):
            measurement = future.result()
            found[measurement.name] = measurement
            on_done(number, len(jobs), measurement.name)
    return found


def _measure_in_child(job: MeasureJob, held_out: tuple[Path, ...]) -> Measurement:
    set_threads(1)
    manifest = parse(FederationManifest, job.manifest)
    adapted = AdaptedModel(load_base(manifest.base.model, expected=manifest.base), manifest.lora)
    return measure(adapted, job, [read_records(path)[0] for path in held_out])

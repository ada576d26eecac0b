"""The models that `benchmarks.dolly` compares, each made and measured by one job.

Training, averaging and measuring are the product's own: the agent's `LocalTrainer` on an NF4 base,
the server's FedAvg, `edge_agent.evaluation`. A job is a function of its settings and its seed.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np

from aggregator_server.aggregation.fedavg import apply_mean, average
from edge_agent.data.records import Record
from edge_agent.data.tokens import tokenize
from edge_agent.evaluation import Scores, held_out_loss, score_answers
from edge_agent.training.sampling import ShuffledBatches
from edge_agent.training.trainer import (
    GradientTransform,
    LocalTrainer,
    RoundRecipe,
    TrainerOptions,
)
from privacy.updates import CellSum, PlainUpdate
from protocol.blocks import LoraBlock, LossOn, Template, TrainingBlock
from protocol.clock import SystemClock
from protocol.layout import VectorLayout
from quant.adapter import (
    AdapterArrays,
    adapter_shapes,
    flatten,
    initial_adapter,
    sent_layout,
    unflatten,
)
from quant.base_model import load_base
from quant.lora import AdaptedModel
from simulations.partition.manifest import read_source, selected
from simulations.partition.schemes import PartitionRecipe, Scheme, make_partition
from simulations.yardsticks import train_in_one_place

DOLLY: Final = Path("dolly") / "databricks-dolly-15k.shared.jsonl.xz"
PAPER_RATE: Final = 1.5e-4
PAPER_MODULES: Final = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
_VALIDATION_SEED: Final = 20_261_121
_THIN_STREAM, _ROUGE_STREAM, _COHORT_STREAM, _ORDER_STREAM = range(2, 6)


class Model(StrEnum):
    """What is compared."""

    BASE = "base"
    LOCAL_SMALLEST = "local, smallest"
    LOCAL_MEDIAN = "local, median"
    LOCAL_LARGEST = "local, largest"
    FEDERATED = "federated"
    CENTRALISED = "centralised"


LOCALS: Final = (Model.LOCAL_SMALLEST, Model.LOCAL_MEDIAN, Model.LOCAL_LARGEST)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One benchmark run. Everything here is part of the result's name.

    Attributes:
        n_train: Records that all clients hold together; each keeps the same share of its own.
        n_held_out: Records of each category for the loss.
        n_rouge: Of these, records of each category that are answered.
        n_validation: Further records of each category, for the choice of the learning rate.
        n_tuning: Records that the rates are tried on.
        rates: Learning rates to choose from.
    """

    seeds: tuple[int, ...] = (1, 2, 3)
    n_clients: int = 10
    n_rounds: int = 3
    cohort: int = 5
    n_train: int = 2000
    n_held_out: int = 50
    n_rouge: int = 10
    n_validation: int = 12
    n_tuning: int = 800
    max_new_tokens: int = 64
    max_length: int = 512
    batch_size: int = 32
    rates: tuple[float, ...] = (PAPER_RATE, 1.5e-3, 5e-3, 1.5e-2, 5e-2)


QUICK: Final = Settings(
    seeds=(1,),
    n_rounds=1,
    cohort=2,
    n_train=96,
    n_held_out=4,
    n_rouge=1,
    n_validation=2,
    n_tuning=32,
    max_new_tokens=16,
    max_length=128,
    batch_size=8,
    rates=(PAPER_RATE, 5e-3),
)
"""For `--quick`: it shows that everything runs; its numbers mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model to make and measure."""

    model: Model
    seed: int
    rate: float | None
    """Peak of the learning rate; None for the base, which is not trained."""
    tuning: bool = False
    """Measured on validation records, by the loss alone, after `n_tuning` records."""

    @property
    def name(self) -> str:
        """A file's name."""
        rate = "" if self.rate is None else f"-{self.rate:g}"
        kind = "tuning" if self.tuning else f"seed-{self.seed}"
        return f"{kind}-{self.model.value.replace(', ', '-')}{rate}"


@dataclass(frozen=True, kw_only=True)
class Split:
    """Who has what under one seed."""

    clients: tuple[tuple[Record, ...], ...]
    held_out: tuple[Record, ...]
    rouge: tuple[Record, ...]
    validation: tuple[Record, ...]
    whole_sizes: tuple[int, ...]
    """Records of each client before the cap."""

    @property
    def train(self) -> tuple[Record, ...]:
        """All clients' records."""
        return tuple(record for client in self.clients for record in client)

    def local(self, model: Model) -> int:
        """The number of the client that trains a local model."""
        order = sorted(range(len(self.clients)), key=lambda k: len(self.clients[k]))
        return order[{LOCALS[0]: 0, LOCALS[1]: len(order) // 2, LOCALS[2]: -1}[model]]


def make_split(records: Sequence[Record], settings: Settings, seed: int) -> Split:
    """Take the validation records out, partition the rest by the paper's second scheme, and cap.

    The validation records are the same under every seed, so none of them is ever trained on or
    reported on. The cap keeps the same share of each client's records, at random: volumes stay
    unequal and categories skewed as the scheme made them.
    """
    categories = [str(record.category) for record in records]
    aside = make_partition(
        categories,
        PartitionRecipe(
            scheme=Scheme.IID,
            n_clients=1,
            seed=_VALIDATION_SEED,
            n_held_out=settings.n_validation,
        ),
    )
    rest = aside.clients[0]
    partition = make_partition(
        [categories[index] for index in rest],
        PartitionRecipe(
            scheme=Scheme.SKEWED,
            n_clients=settings.n_clients,
            seed=seed,
            n_held_out=settings.n_held_out,
        ),
    )
    share = min(1.0, settings.n_train / int(partition.sizes.sum()))
    rng = _generator(seed, _THIN_STREAM)
    kept = [
        rng.choice(client, max(1, round(share * client.size)), replace=False)
        for client in partition.clients
    ]
    held_out = selected(records, rest[partition.held_out].tolist())
    return Split(
        clients=tuple(tuple(selected(records, rest[np.sort(k)].tolist())) for k in kept),
        held_out=tuple(held_out),
        rouge=tuple(_some_of_each(held_out, settings.n_rouge, _generator(seed, _ROUGE_STREAM))),
        validation=tuple(selected(records, aside.held_out.tolist())),
        whole_sizes=tuple(partition.sizes.tolist()),
    )


def _some_of_each(records: Sequence[Record], n_each: int, rng: np.random.Generator) -> list[Record]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(str(record.category), []).append(record)
    return [
        groups[name][int(index)]
        for name in sorted(groups)
        for index in np.sort(rng.choice(len(groups[name]), n_each, replace=False))
    ]


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream])))


def training_block(settings: Settings, rate: float) -> TrainingBlock:
    """The paper's recipe: loss on prompt and response, one local epoch, Adam.

    The learning rate falls over the whole federation, where the published code began anew at every
    visit of a client.
    """
    return TrainingBlock(
        template=Template.ALPACA,
        loss_on=LossOn.ALL,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        local_epochs=1,
        learning_rate=rate,
    )


def lora_block(seed: int) -> LoraBlock:
    """The paper's adapter."""
    return LoraBlock(rank=8, alpha=16.0, dropout=0.05, target_modules=PAPER_MODULES, init_seed=seed)


@functools.cache
def _adapted(base: Path) -> AdaptedModel:
    return AdaptedModel(load_base(base), lora_block(0))


@functools.cache
def _split(data: Path, settings: Settings, seed: int) -> Split:
    return make_split(_records(data), settings, seed)


@functools.cache
def _records(data: Path) -> tuple[Record, ...]:
    return read_source(data).records


def run_job(job: Job, settings: Settings, *, base: Path, data: Path) -> dict[str, Any]:
    """Make a model and measure it, in a worker process.

    Args:
        job: Which.
        settings: Of the run.
        base: Folder of the base model.
        data: The Dolly file.

    Returns:
        What came out, as JSON.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    adapted = _adapted(base)
    split = _split(data, settings, job.seed)
    if job.tuning:
        rng = _generator(job.seed, _ORDER_STREAM)
        train = [split.train[int(k)] for k in rng.permutation(len(split.train))]
        train = train[: settings.n_tuning]
    else:
        train = list(split.train)
    arrays, found = _make(adapted, job, settings, split, train)
    trained = time.perf_counter()
    adapted.load(arrays)
    found |= measure(adapted, settings, split, tuning=job.tuning)
    return found | {
        "model": job.model.value,
        "seed": job.seed,
        "rate": job.rate,
        "train_s": round(trained - began, 1),
        "measure_s": round(time.perf_counter() - trained, 1),
        "cpu_s": round(time.process_time() - began_cpu, 1),
    }


def _make(
    adapted: AdaptedModel, job: Job, settings: Settings, split: Split, train: Sequence[Record]
) -> tuple[AdapterArrays, dict[str, Any]]:
    start = initial_adapter(adapted.base.description, lora_block(job.seed))
    if job.rate is None:
        return start, {"n_trained_on": 0}
    block = training_block(settings, job.rate)
    if job.model is Model.FEDERATED:
        return _federate(adapted, start, block, settings, split, job.seed)
    if job.model in LOCALS:
        train = split.clients[split.local(job.model)]
    n_steps = -(-len(train) // settings.batch_size)  # one epoch
    arrays = train_in_one_place(adapted, train, block, start, n_steps=n_steps, seed=job.seed)
    return arrays, {"n_trained_on": len(train), "n_steps": n_steps}


def _federate(
    adapted: AdaptedModel,
    start: AdapterArrays,
    block: TrainingBlock,
    settings: Settings,
    split: Split,
    seed: int,
) -> tuple[AdapterArrays, dict[str, Any]]:
    """Rounds of local training and averaging, as agents and server do them."""
    layout = sent_layout(adapter_shapes(adapted.base.description, adapted.lora), adapted.lora.sent)
    clients = Clients(block=block, settings=settings, split=split, seed=seed)
    vector = flatten(start, layout)
    cohorts, norms = clients.cohorts(), []
    for number, cohort in enumerate(cohorts):
        release = unflatten(vector, layout)
        cells = [
            CellSum.of_plain(clients.train(adapted, release, layout, number=number, agent=client))
            for client in cohort
        ]
        mean = average(cells, n_values=layout.n_values)
        vector = apply_mean(vector, mean.mean)
        norms.append(mean.norm)
    seen = sum(len(split.clients[client]) for cohort in cohorts for client in cohort)
    found = {"n_trained_on": seen, "cohorts": cohorts, "update_norms": norms}
    return unflatten(vector, layout), found


@dataclass(frozen=True, kw_only=True)
class Clients:
    """The clients of one federation under one seed."""

    block: TrainingBlock
    settings: Settings
    split: Split
    seed: int

    def cohorts(self) -> list[list[int]]:
        """Who takes part in each round."""
        rng, settings = _generator(self.seed, _COHORT_STREAM), self.settings
        return [
            rng.choice(settings.n_clients, settings.cohort, replace=False).tolist()
            for _ in range(settings.n_rounds)
        ]

    def train(
        self,
        adapted: AdaptedModel,
        start: AdapterArrays,
        layout: VectorLayout,
        *,
        number: int,
        agent: int,
        transforms: tuple[GradientTransform, ...] | None = None,
    ) -> PlainUpdate:
        """What a client sends in a round, weighted by its records.

        Args:
            adapted: The model; its adapter is replaced.
            start: What the round starts from.
            layout: Of the update.
            number: The round's, from 0.
            agent: The client's number.
            transforms: Of the gradient; None: the recipe's clipping.
        """
        block, settings = self.block, self.settings
        examples = tokenize(
            self.split.clients[agent],
            adapted.base.tokenizer,
            template=block.template,
            loss_on=block.loss_on,
            max_length=block.max_length,
        ).examples
        order = int(_generator(self.seed, _ORDER_STREAM + number * 1000 + agent).integers(2**31))
        trainer = LocalTrainer(
            adapted,
            examples,
            RoundRecipe(
                training=block,
                schedule_start=number / settings.n_rounds,
                schedule_end=(number + 1) / settings.n_rounds,
                seed=order,
            ),
            sampler=ShuffledBatches(
                n_examples=len(examples), batch_size=block.batch_size, seed=order
            ),
            clock=SystemClock(),
            options=TrainerOptions(transforms=transforms),
        )
        return trainer.run(start, layout, weight=len(examples)).update


def measure(
    adapted: AdaptedModel, settings: Settings, split: Split, *, tuning: bool = False
) -> dict[str, Any]:
    """What the model as it stands scores by category.

    Args:
        adapted: With the adapter that is measured.
        settings: Of the run.
        split: Whose held-out records are asked.
        tuning: On validation records, by the loss alone.
    """
    tokenizer = adapted.base.tokenizer
    pad_id = int(tokenizer.pad_token_id or tokenizer.eos_token_id or 0)

    def loss(records: Sequence[Record]) -> Scores:
        # Of the response alone: on all tokens the words of the template, which the base has never
        # read and any adapter learns in a few steps, would decide.
        data = tokenize(
            records,
            tokenizer,
            template=Template.ALPACA,
            loss_on=LossOn.RESPONSE,
            max_length=settings.max_length,
        )
        return held_out_loss(adapted.model, data.examples, pad_id=pad_id)

    if tuning:
        found = loss(split.validation)
        return {"validation_loss": found.average_over_categories}
    answered = score_answers(
        adapted.model,
        tokenizer,
        split.rouge,
        template=Template.ALPACA,
        max_length=settings.max_length,
        max_new_tokens=settings.max_new_tokens,
    )
    return {
        "loss": _by_category(loss(split.held_out)),
        "rouge_l": _by_category(answered.rouge_l),
        "answers": [
            {
                "category": answer.record.category,
                "instruction": answer.record.instruction,
                "wanted": answer.record.response,
                "answer": answer.text,
            }
            for answer in answered.answers
        ],
    }


def _by_category(scores: Scores) -> Mapping[str, float]:
    return {name: one.score for name, one in scores.by_category.items()}

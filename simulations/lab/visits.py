"""What a virtual agent does in a round: all that an agent does between fetching and sending.

A worker holds one 4-bit base. Agents bring their records and leave with an update; nothing of one
stays behind for the next but tokens.
"""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch

from edge_agent.data.records import UNCATEGORIZED, Record
from edge_agent.data.tokens import Example, RecordTokenizer, tokenize, tokenize_as_needed
from edge_agent.errors import (
    AgentError,
    CheckpointError,
    DataError,
    MalformedRecordError,
    OutOfMemoryError,
    TemplateError,
    TrainingError,
)
from edge_agent.evaluation import Scores, held_out_loss, score_answers
from edge_agent.private import PrivacyTerms, make_terms
from edge_agent.training.gradients import GradientRule, MeanGradient, PrivateGradient
from edge_agent.training.sampling import BatchSampler, PoissonBatches, ShuffledBatches
from edge_agent.training.trainer import (
    LocalTrainer,
    RoundRecipe,
    TrainerOptions,
    TrainingResult,
    is_out_of_memory,
)
from privacy.updates import Float32Array
from protocol.base_description import BaseDescription
from protocol.blocks import LoraRule, LossOn, Weighting
from protocol.clock import SystemClock
from protocol.layout import VectorLayout
from protocol.manifest import FederationManifest
from protocol.privacy import ExamplePrivacy
from protocol.wire import parse
from quant.adapter import adapter_shapes, sent_layout
from quant.base_model import LoadedBase, load_base, parse_device, set_threads
from quant.lora import AdaptedModel
from quant.lora_stack import StackedModel, StackSlot
from quant.lora_turns import sent_factors, turn_layouts
from quant.memory import StepSettings
from quant.quiet import quiet_libraries
from simulations.lab.chance import RunChance
from simulations.lab.records import AnswerNote, Measure, ScoreNote
from simulations.lab.together import train_together
from simulations.machine import processor

MICRO_TOKENS: Final = 2048
"""Of one agent's micro-batch; the fastest on a processor's core, and it changes no gradient."""
_KEPT_CLIENTS: Final = 512
"""Of whom a worker keeps the tokens."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker must have at hand; equal setups give equal workers.

    Attributes:
        model: The base.
        revision: Of a model of the hub.
        device: None: a GPU where there is one.
        manifest: As JSON; None where the base is only to be described.
        group: How many agents are trained at once.
        seed: Of the run.
        run: What the run is, in words that no other run has: whose records agents bring. Two
            runs may have one manifest and other records.
    """

    model: str
    revision: str | None = None
    device: str | None = None
    manifest: bytes | None = field(default=None, repr=False)
    group: int = 1
    seed: int = 0
    run: str = ""

    def is_of_base(self, other: "Setup") -> bool:
        """Whether another setup is of the same base on the same device.

        Args:
            other: The other one.
        """
        mine = (self.model, self.revision, self.device)
        return mine == (other.model, other.revision, other.device)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One agent's part in one round.

    Attributes:
        round: From 1.
        release: Number of the release that it starts from.
        agent: The client's number, from 0.
        records: The client's.
        state_path: Where a long training keeps its progress; of a group of one only.
    """

    round: int
    release: int
    agent: int
    records: tuple[Record, ...] = field(repr=False)
    state_path: Path | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class VisitResult:
    """What an agent has to send, and what is noted of it.

    Attributes:
        agent: The client's number.
        vector: The update [n_values] float32 in the layout of the round; None: there is none.
        weight: Of the update.
        error: Why there is no update.
    """

    agent: int
    vector: Float32Array | None
    weight: int
    n_examples: int
    n_tokens: int
    n_steps: int
    first_loss: float | None
    last_loss: float | None
    train_s: float
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a release.

    Attributes:
        release: Its number.
        loss: Records for the held-out loss; empty: it is not asked.
        answers: Records to answer; the same.
        max_new_tokens: Longest answer.
    """

    release: int
    loss: tuple[Record, ...] = field(default=(), repr=False)
    answers: tuple[Record, ...] = field(default=(), repr=False)
    max_new_tokens: int = 128


@dataclass(kw_only=True)
class _Prepared:
    """A visit that is ready to be trained."""

    visit: Visit
    trainer: LocalTrainer
    n_examples: int
    weight: int


class LabWorker:
    """One base, many agents: each trains by `LocalTrainer` from the same release.

    Guarantees:
        1. A visit's update depends on the setup, the release and the visits of its group alone, on
           one machine with one thread: not on the worker, nor on what it did before.
        2. With a group of one it equals the update of an agent with the same records, order of
           batches, noise and limits of a micro-batch (`MICRO_TOKENS`), bit for bit.

    Args:
        setup: With a manifest.
        base: The base that the manifest names; None loads it.
    """

    def __init__(self, setup: Setup, base: LoadedBase | None = None) -> None:
        """Load the base, if it is not given; adapters are attached when they are needed."""
        self.base = load_lab_base(setup) if base is None else base
        self._attached: AdaptedModel | StackedModel | None = None
        self._tokens: dict[int, Sequence[Example]] = {}
        self._terms: dict[int, PrivacyTerms] = {}
        self.use(setup)

    def use(self, setup: Setup) -> None:
        """Go on with another manifest or group size over the same base.

        Args:
            setup: Of the same base and device.
        """
        self.setup = setup
        self._detach()
        self._tokens.clear()
        self._terms.clear()
        self._chance = RunChance(setup.seed)
        if setup.manifest is not None:
            self.manifest = parse(FederationManifest, setup.manifest)
            self._shapes = adapter_shapes(self.base.description, self.manifest.lora)
            self._layouts = turn_layouts(self.manifest.lora.rule, self._shapes)
            whole = sent_layout(self._shapes, sent_factors(LoraRule.FEDIT, 0))
            self._whole = self._layouts[0] if whole == self._layouts[0] else whole

    def describe(self) -> BaseDescription:
        """Of the base."""
        return self.base.description

    def machine(self) -> str:
        """What decides how numbers are rounded: the processor, or the device."""
        if self.base.device.type == "cuda":
            return torch.cuda.get_device_name(self.base.device)
        return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"

    # Training

    def train(self, release: Float32Array, visits: Sequence[Visit]) -> list[VisitResult]:
        """Train a group of agents at once.

        A training that fails, for its records too, ends alone: its result says why.

        Args:
            release: The whole adapter that the round starts from, [n_whole] float32.
            visits: At least one, at most `setup.group`, all of one round.

        Raises:
            OutOfMemoryError: So many adapters do not fit beside the base.
            CheckpointError: The state of a long training cannot be read or written.
            PrivacyError: No noise keeps to the ε that is asked for.
        """
        try:
            return self._train(release, visits)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._detach()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            msg = (
                f"{self.setup.group} adapters with their optimisers do not fit into memory beside "
                "the base; give a smaller --group, or a smaller rank"
            )
            raise OutOfMemoryError(msg) from error

    def _train(self, release: Float32Array, visits: Sequence[Visit]) -> list[VisitResult]:
        begun = time.perf_counter()
        factors = sent_factors(self.manifest.lora.rule, visits[0].release)
        adapters: Sequence[AdaptedModel | StackSlot]
        if self.setup.group == 1:
            stack = None
            single = self._single()
            single.train_only(factors)
            adapters = [single]
        else:
            stack = self._stack()
            stack.train_only(factors)
            adapters = stack.slots
        layout = self._layouts[visits[0].release % len(self._layouts)]
        prepared: dict[int, _Prepared] = {}
        refused: dict[int, AgentError] = {}
        for place, visit in enumerate(visits):
            slot = len(prepared)  # slots are filled from the first on
            try:
                prepared[place] = self._prepare(visit, adapters[slot])
            except (DataError, TrainingError) as error:
                refused[place] = error
            else:
                adapters[slot].load_vector(release, self._whole)
        ended = _driven(list(prepared.values()), stack, layout) if prepared else []
        share = (time.perf_counter() - begun) / len(visits)
        results = {
            place: _result(one, end, share)
            for (place, one), end in zip(prepared.items(), ended, strict=True)
        } | {place: _refusal(visits[place], error) for place, error in refused.items()}
        return [results[place] for place in range(len(visits))]

    def probe(
        self, group: int, release: Float32Array, visits: Sequence[Visit], *, n_steps: int
    ) -> int:
        """Train for some steps at a group size, for nothing but the time that it takes.

        Args:
            group: How many at once.
            release: The whole adapter.
            visits: As many.
            n_steps: Of each.

        Returns:
            The useful tokens that were trained on; 0: not all of these trainings came to their end.

        Raises:
            OutOfMemoryError: So many adapters do not fit beside the base.
        """
        training = self.manifest.training.model_copy(
            update={"local_steps": n_steps, "local_epochs": None}
        )
        manifest = self.manifest.model_copy(update={"training": training})
        wanted = replace(self.setup, group=group, manifest=manifest.canonical())
        if wanted != self.setup:  # attaching and tokens are no part of a step
            self.use(wanted)
        results = self.train(release, visits)
        if any(result.error is not None for result in results):
            return 0
        return sum(result.n_tokens for result in results)

    def _prepare(self, visit: Visit, adapter: AdaptedModel | StackSlot) -> _Prepared:
        manifest, chance = self.manifest, self._chance
        examples = self._examples(visit)
        sampler: BatchSampler = ShuffledBatches(
            n_examples=len(examples),
            batch_size=manifest.training.batch_size,
            seed=chance.integer("batches", visit.round, visit.agent),
        )
        rule: GradientRule = MeanGradient()
        if isinstance(manifest.privacy, ExamplePrivacy):
            terms = self._terms_of(len(examples))
            secret = chance.secret("dp-sgd", visit.round, visit.agent)
            sampler = PoissonBatches(
                n_examples=len(examples), probability=terms.sampling_probability, secret=secret
            )
            rule = PrivateGradient(mechanism=terms.mechanism, secret=secret)
        n_rounds = manifest.rounds.n_rounds
        trainer = LocalTrainer(
            adapter,
            examples,
            RoundRecipe(
                training=manifest.training,
                schedule_start=visit.release / n_rounds,
                schedule_end=(visit.release + 1) / n_rounds,
                seed=chance.integer("dropout", visit.round, visit.agent),
            ),
            sampler=sampler,
            clock=SystemClock(),
            options=TrainerOptions(
                rule=rule,
                state_path=visit.state_path,
                settings=StepSettings(micro_tokens=MICRO_TOKENS),
            ),
        )
        uniform = manifest.aggregation.weighting is Weighting.UNIFORM
        return _Prepared(
            visit=visit,
            trainer=trainer,
            n_examples=len(examples),
            weight=1 if uniform else min(len(examples), manifest.max_weight),
        )

    def _examples(self, visit: Visit) -> Sequence[Example]:
        found = self._tokens.pop(visit.agent, None)
        if found is None:
            block = self.manifest.training
            found = tokenize_as_needed(
                visit.records,
                self.base.tokenizer,
                template=block.template,
                loss_on=block.loss_on,
                max_length=block.max_length,
            )
        self._tokens[visit.agent] = found  # the newest last
        if len(self._tokens) > _KEPT_CLIENTS:
            del self._tokens[next(iter(self._tokens))]
        return found

    def _terms_of(self, n_examples: int) -> PrivacyTerms:
        if n_examples not in self._terms:
            self._terms[n_examples] = make_terms(self.manifest, n_examples=n_examples)
        return self._terms[n_examples]

    def count_tokens(self, clients: Sequence[tuple[Record, ...]]) -> list[int]:
        """How many tokens each client's examples have; 0 where no record can be used.

        Args:
            clients: Records of each.
        """
        block = self.manifest.training
        counts = []
        for records in clients:
            examples = self._usable(records, loss_on=block.loss_on)
            counts.append(sum(len(example.input_ids) for example in examples))
        return counts

    def _usable(self, records: Sequence[Record], *, loss_on: LossOn) -> Sequence[Example]:
        block = self.manifest.training
        try:
            return tokenize(
                records,
                self.base.tokenizer,
                template=block.template,
                loss_on=loss_on,
                max_length=block.max_length,
            ).examples
        except TemplateError:  # of the recipe, not of these records
            raise
        except DataError:
            return ()

    # Measuring

    def measure(self, release: Float32Array, question: Question) -> list[ScoreNote | AnswerNote]:
        """Score a release on held-out records; what none of them can be used for has no score.

        Args:
            release: The whole adapter, [n_whole] float32.
            question: Which records, and how.
        """
        adapted = self._single()
        adapted.load_vector(release, self._whole)
        block = self.manifest.training
        notes: list[ScoreNote | AnswerNote] = []
        # Of the response alone, whatever is trained: on all tokens those of the template, which any
        # adapter learns in a few steps, would decide.
        examples = self._usable(question.loss, loss_on=LossOn.RESPONSE)
        if examples:
            scores = held_out_loss(adapted.model, examples, pad_id=self.base.pad_id)
            notes += _score_notes(question.release, Measure.LOSS, scores)
        answerable = self._answerable(question)
        if answerable:
            answered = score_answers(
                adapted.model,
                self.base.tokenizer,
                answerable,
                template=block.template,
                max_length=block.max_length,
                max_new_tokens=self._answer_length(question),
            )
            notes += _score_notes(question.release, Measure.EXACT_MATCH, answered.exact_match)
            notes += _score_notes(question.release, Measure.ROUGE_L, answered.rouge_l)
            notes += [
                AnswerNote(
                    release=question.release,
                    category=one.record.category or UNCATEGORIZED,
                    instruction=one.record.instruction,
                    wanted=one.record.response,
                    answer=one.text,
                )
                for one in answered.answers
            ]
        return notes

    def _answer_length(self, question: Question) -> int:
        return min(question.max_new_tokens, self.manifest.training.max_length // 2)

    def _answerable(self, question: Question) -> list[Record]:
        """The records that the template has a place for, as in training; it skips the others."""
        block = self.manifest.training
        asks = RecordTokenizer(
            self.base.tokenizer,
            template=block.template,
            loss_on=LossOn.RESPONSE,
            max_length=block.max_length,
        )
        found = []
        for record in question.answers:
            with contextlib.suppress(MalformedRecordError):
                asks.prompt(record, max_tokens=block.max_length - self._answer_length(question))
                found.append(record)
        return found

    # Attaching

    def _single(self) -> AdaptedModel:
        if not isinstance(self._attached, AdaptedModel):
            self._detach()
            self._attached = AdaptedModel(self.base, self.manifest.lora)
        return self._attached

    def _stack(self) -> StackedModel:
        if not isinstance(self._attached, StackedModel):
            self._detach()
            self._attached = StackedModel(self.base, self.manifest.lora, n_slots=self.setup.group)
        return self._attached

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.detach()
            self._attached = None


def load_lab_base(setup: Setup) -> LoadedBase:
    """Load the base of a setup.

    Args:
        setup: Says which, and where to.

    Raises:
        BaseModelError: It cannot be loaded.
    """
    quiet_libraries()
    set_threads(1)
    device = None if setup.device is None else parse_device(setup.device)
    return load_base(setup.model, revision=setup.revision, device=device)


def _driven(
    prepared: Sequence[_Prepared], stack: StackedModel | None, layout: VectorLayout
) -> list[TrainingResult | AgentError]:
    if stack is not None:
        sessions = [one.trainer.session(None, layout, weight=one.weight) for one in prepared]
        return train_together(stack, sessions)
    [one] = prepared
    try:
        return [one.trainer.run(None, layout, weight=one.weight)]
    except CheckpointError:  # of the folder, not of the training: it can go on
        raise
    except (DataError, TrainingError) as error:
        return [error]


def _result(one: _Prepared, end: TrainingResult | AgentError, train_s: float) -> VisitResult:
    ended = end if isinstance(end, TrainingResult) else None
    return VisitResult(
        agent=one.visit.agent,
        vector=None if ended is None else ended.update.vector,
        weight=one.weight,
        n_examples=one.n_examples,
        n_tokens=0 if ended is None else ended.n_tokens,
        n_steps=0 if ended is None else ended.n_steps,
        first_loss=None if ended is None else _finite(ended.first_loss),
        last_loss=None if ended is None else _finite(ended.last_loss),
        train_s=train_s,
        error=None if ended is not None else str(end),
    )


def _refusal(visit: Visit, error: AgentError) -> VisitResult:
    return VisitResult(
        agent=visit.agent,
        vector=None,
        weight=0,
        n_examples=len(visit.records),
        n_tokens=0,
        n_steps=0,
        first_loss=None,
        last_loss=None,
        train_s=0.0,
        error=str(error),
    )


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _score_notes(release: int, measure: Measure, scores: Scores) -> list[ScoreNote]:
    return [
        ScoreNote(
            release=release,
            measure=measure,
            category=name,
            score=one.score,
            n_examples=one.n_examples,
        )
        for name, one in scores.by_category.items()
    ]

"""What a virtual agent does, against the agent's own trainer; and that nothing of it stays."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent.data.records import ChatMessage, Record
from edge_agent.data.tokens import tokenize
from edge_agent.errors import CheckpointError, OutOfMemoryError
from edge_agent.evaluation import held_out_loss
from edge_agent.private import make_terms as make_privacy_terms
from edge_agent.training.gradients import PrivateGradient
from edge_agent.training.sampling import PoissonBatches, ShuffledBatches
from edge_agent.training.trainer import LocalTrainer, RoundRecipe, TrainerOptions, TrainingResult
from privacy.updates import Float32Array
from protocol.blocks import LoraRule, LossOn
from protocol.clock import SystemClock
from protocol.manifest import FederationManifest
from protocol.wire import parse
from quant.adapter import adapter_shapes, flatten, initial_adapter, sent_layout, unflatten
from quant.base_model import LoadedBase
from quant.lora import AdaptedModel
from quant.lora_turns import sent_factors
from quant.memory import StepSettings
from simulations.lab import visits as visits_module
from simulations.lab.chance import RunChance
from simulations.lab.data import LabData, prepare_data
from simulations.lab.engines import Bench
from simulations.lab.experiment import EMBEDDED_BASE, Experiment
from simulations.lab.records import AnswerNote, Arm, Measure, ScoreNote
from simulations.lab.terms import RunTerms, make_terms
from simulations.lab.visits import (
    MICRO_TOKENS,
    LabWorker,
    Question,
    Setup,
    Visit,
    VisitResult,
    load_lab_base,
)
from simulations.machine import processor

SEED = 1
CHAT = Record(
    instruction="",
    context="",
    response="Four.",
    category="closed_qa",
    messages=(
        ChatMessage(role="user", content="One and one?"),
        ChatMessage(role="assistant", content="Two."),
        ChatMessage(role="user", content="And twice that?"),
        ChatMessage(role="assistant", content="Four."),
    ),
    source="a chat",
)


@pytest.fixture(scope="module")
def own_base() -> LoadedBase:
    """Another one than the engine's of the other tests: one adapter at a time may be attached."""
    return load_lab_base(Setup(model=EMBEDDED_BASE, device="cpu"))


@pytest.fixture(scope="module")
def data(small: Experiment) -> LabData:
    return prepare_data(small.data, seed=SEED)


@pytest.fixture
def make_worker(own_base: LoadedBase, small: Experiment) -> Callable[..., LabWorker]:
    workers: list[LabWorker] = []

    def make(*, group: int = 1, **values: object) -> LabWorker:
        for worker in workers:
            worker._detach()
        terms = terms_of(small, own_base, **values)
        setup = Setup(
            model=EMBEDDED_BASE,
            device="cpu",
            manifest=terms.manifest.canonical(),
            group=group,
            seed=SEED,
        )
        workers.append(LabWorker(setup, own_base))
        return workers[-1]

    yield make
    for worker in workers:
        worker._detach()


def terms_of(small: Experiment, base: LoadedBase, **values: object) -> RunTerms:
    dotted = {key.replace("__", "."): value for key, value in values.items()}
    return make_terms(small.with_values(dotted), base.description, arm=Arm.FEDERATED, seed=SEED)


def release_of(worker: LabWorker) -> Float32Array:
    """A release of which nothing is zero."""
    lora = worker.manifest.lora
    shapes = adapter_shapes(worker.base.description, lora)
    whole = sent_layout(shapes, sent_factors(LoraRule.FEDIT, 0))
    first = flatten(initial_adapter(worker.base.description, lora), whole)
    return first + np.random.default_rng(0).normal(0, 0.02, first.shape).astype(np.float32)


def visit_of(data: LabData, agent: int, *, number: int = 1, release: int = 0) -> Visit:
    return Visit(round=number, release=release, agent=agent, records=data.clients[agent])


def agents_own_update(
    worker: LabWorker, data: LabData, release: Float32Array, agent: int
) -> TrainingResult:
    """By the parts that an agent has, put together as it does."""
    worker._detach()
    base, chance = worker.base, RunChance(SEED)
    manifest = parse(FederationManifest, worker.setup.manifest or b"")
    block = manifest.training
    examples = tokenize(
        data.clients[agent],
        base.tokenizer,
        template=block.template,
        loss_on=block.loss_on,
        max_length=block.max_length,
    ).examples
    options = TrainerOptions(settings=StepSettings(micro_tokens=MICRO_TOKENS))
    sampler: ShuffledBatches | PoissonBatches = ShuffledBatches(
        n_examples=len(examples),
        batch_size=block.batch_size,
        seed=chance.integer("batches", 1, agent),
    )
    if manifest.privacy.profile == "P1":
        terms = make_privacy_terms(manifest, n_examples=len(examples))
        secret = chance.secret("dp-sgd", 1, agent)
        sampler = PoissonBatches(
            n_examples=len(examples), probability=terms.sampling_probability, secret=secret
        )
        rule = PrivateGradient(mechanism=terms.mechanism, secret=secret)
        options = replace(options, rule=rule)
    shapes = adapter_shapes(base.description, manifest.lora)
    adapted = AdaptedModel(base, manifest.lora)
    adapted.train_only(sent_factors(manifest.lora.rule, 0))
    trainer = LocalTrainer(
        adapted,
        examples,
        RoundRecipe(
            training=block,
            schedule_start=0.0,
            schedule_end=1.0 / manifest.rounds.n_rounds,
            seed=chance.integer("dropout", 1, agent),
        ),
        sampler=sampler,
        clock=SystemClock(),
        options=options,
    )
    start = unflatten(release, sent_layout(shapes, sent_factors(LoraRule.FEDIT, 0)))
    layout = sent_layout(shapes, sent_factors(manifest.lora.rule, 0))
    found = trainer.run(start, layout, weight=1)
    adapted.detach()
    return found


def vector_of(result: VisitResult) -> Float32Array:
    assert result.error is None
    assert result.vector is not None
    return result.vector


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="open"),
        pytest.param({"federation__proximal_mu": 0.5}, id="fedprox"),
        pytest.param({"federation__local_steps": None, "federation__local_epochs": 2}, id="epochs"),
        pytest.param({"federation__epsilon": 8, "federation__local_steps": 2}, id="dp"),
        pytest.param({"federation__lora_rule": "rolora"}, id="rolora"),
    ],
)
def test_guarantee_2_a_group_of_one_equals_the_agent_s_own_training_bit_for_bit(
    make_worker: Callable[..., LabWorker], data: LabData, values: dict[str, object]
) -> None:
    worker = make_worker(**values)
    release = release_of(worker)
    [found] = worker.train(release, [visit_of(data, 2)])
    wanted = agents_own_update(worker, data, release, 2)
    np.testing.assert_array_equal(vector_of(found), wanted.update.vector)
    assert (found.n_steps, found.n_examples) == (wanted.n_steps, wanted.n_examples)
    assert (found.first_loss, found.last_loss) == (wanted.first_loss, wanted.last_loss)


def test_guarantee_1_an_update_does_not_depend_on_what_the_worker_did_before(
    make_worker: Callable[..., LabWorker], data: LabData, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    setup, release = worker.setup, release_of(worker)

    def update(agent: int) -> bytes:
        [found] = worker.train(release, [visit_of(data, agent)])
        return vector_of(found).tobytes()

    fresh = update(0)
    worker.train(release + 1e-2, [visit_of(data, 3, number=2, release=1)])
    assert update(0) == fresh
    worker.measure(release, Question(release=0, loss=data.held_out[:3]))
    assert update(0) == fresh
    worker.use(replace(setup, group=2))
    worker.train(release, [visit_of(data, 1), visit_of(data, 2)])
    worker.use(setup)
    assert update(0) == fresh
    monkeypatch.setattr(visits_module, "_KEPT_CLIENTS", 1)
    assert update(1) != fresh
    assert list(worker._tokens) == [1]  # the one before was dropped, and is made again
    assert update(0) == fresh
    [other] = worker.train(release, [visit_of(data, 0, number=2)])
    assert vector_of(other).tobytes() != fresh  # another round has other batches


def test_guarantee_1_a_group_s_updates_depend_on_its_visits_alone(
    make_worker: Callable[..., LabWorker], data: LabData
) -> None:
    worker = make_worker(group=3)
    release = release_of(worker)
    pair = [visit_of(data, 0), visit_of(data, 4)]
    first = [vector_of(found) for found in worker.train(release, pair)]
    worker.train(release + 1e-2, [visit_of(data, agent) for agent in (1, 2, 3)])
    again = [vector_of(found) for found in worker.train(release, pair)]
    for found, wanted in zip(again, first, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    "values",
    [{}, {"federation__lora_rule": "ffa-lora"}, {"federation__epsilon": 8}],
    ids=["open", "ffa-lora", "dp"],
)
def test_a_group_s_updates_are_those_of_single_agents_but_for_rounding(
    make_worker: Callable[..., LabWorker], data: LabData, values: dict[str, object]
) -> None:
    worker = make_worker(group=3, **values)
    release = release_of(worker)
    visits = [visit_of(data, agent) for agent in (5, 1)]
    together = worker.train(release, visits)
    worker.use(replace(worker.setup, group=1))
    for visit, found in zip(visits, together, strict=True):
        [alone] = worker.train(release, [visit])
        error = np.linalg.norm(vector_of(found) - vector_of(alone))
        assert error <= 1e-3 * np.linalg.norm(vector_of(alone))
        assert (found.agent, found.weight, found.n_tokens) == (
            *(visit.agent, alone.weight, alone.n_tokens),
        )


def test_factors_are_trained_in_turn_by_the_release_that_a_round_starts_from(
    make_worker: Callable[..., LabWorker], data: LabData
) -> None:
    for group in (1, 2):
        worker = make_worker(group=group, federation__lora_rule="rolora")
        release = release_of(worker)
        shapes = adapter_shapes(worker.base.description, worker.manifest.lora)
        for turn in (0, 1, 2):
            visits = [visit_of(data, agent, release=turn) for agent in range(group)]
            layout = sent_layout(shapes, sent_factors(LoraRule.ROLORA, turn))
            for found in worker.train(release, visits):
                assert vector_of(found).shape == (layout.n_values,)


def test_a_training_that_diverges_gives_its_reason_and_no_update(
    make_worker: Callable[..., LabWorker], data: LabData
) -> None:
    for group in (1, 2):
        worker = make_worker(group=group)
        release = np.full_like(release_of(worker), np.nan)
        for found in worker.train(release, [visit_of(data, agent) for agent in range(group)]):
            assert found.vector is None
            assert found.error is not None
            assert "the gradient of step 1 is not finite" in found.error
            assert (found.n_steps, found.first_loss, found.last_loss) == (0, None, None)
            assert found.n_examples == data.sizes[found.agent]


def test_a_state_that_cannot_be_kept_is_no_fault_of_the_training(
    make_worker: Callable[..., LabWorker], data: LabData, tmp_path: Path
) -> None:
    worker = make_worker()
    visit = replace(visit_of(data, 0), state_path=tmp_path / "nowhere" / "state")
    with pytest.raises(CheckpointError, match="cannot save the training state"):
        worker.train(release_of(worker), [visit])
    worker.use(replace(worker.setup, group=2))
    with pytest.raises(CheckpointError, match="cannot save the training state"):
        worker.train(release_of(worker), [visit])


def test_guarantee_1_records_of_another_run_are_never_taken_for_an_agent_s_own(
    make_worker: Callable[..., LabWorker], data: LabData
) -> None:
    """Runs that differ in their records alone, as the points of a sweep may, or two arms."""
    worker = make_worker()
    release, setup = release_of(worker), worker.setup
    bench = Bench(worker.base)

    def train(agent: int, run: str) -> Float32Array:
        visit = replace(visit_of(data, agent), agent=0)
        asked = replace(setup, run=run)
        [found] = bench.ask(asked, lambda other: other.train(release, [visit]))
        return vector_of(found)

    worker._detach()
    first, second = train(3, "one run"), train(4, "another run")
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(train(3, "one run"), first)
    bench.ask(replace(setup, run="end"), lambda other: other._detach())


def test_records_that_cannot_be_used_fail_their_agent_alone(
    make_worker: Callable[..., LabWorker], data: LabData
) -> None:
    for group in (1, 3):
        worker = make_worker(group=group)
        release = release_of(worker)
        unusable = replace(visit_of(data, 2), records=(CHAT,))
        visits = [unusable, visit_of(data, 0), visit_of(data, 1)][:group]
        bad, *good = worker.train(release, visits)
        assert (bad.agent, bad.vector, bad.n_examples) == (2, None, 1)
        assert bad.error is not None
        assert "none of the 1 records fits the template" in bad.error
        worker.use(replace(worker.setup, run="again"))
        again = worker.train(release, visits[1:]) if good else []
        for found, wanted in zip(good, again, strict=True):
            np.testing.assert_array_equal(vector_of(found), vector_of(wanted))


@pytest.mark.parametrize("group", [1, 2])
def test_a_record_that_turns_out_unusable_in_a_step_fails_its_agent_alone(
    make_worker: Callable[..., LabWorker], data: LabData, group: int
) -> None:
    """Examples are made when they are first asked for."""
    short = replace(data.clients[0][0], instruction="Why?", context="", response="So.")
    long = replace(short, response="Because of this and that. " * 40)
    worker = make_worker(
        group=group, federation__max_length=48, federation__batch_size=2, federation__local_steps=1
    )
    release = release_of(worker)
    unusable = replace(visit_of(data, 2), records=(short, long))
    good = replace(visit_of(data, 0), records=(short, short))
    bad, *others = worker.train(release, [unusable, good][:group])
    assert bad.vector is None
    assert bad.error is not None
    assert "max_length = 48 is too small" in bad.error
    assert all(found.error is None for found in others)


def test_what_cannot_be_used_counts_no_token_and_has_no_score(
    make_worker: Callable[..., LabWorker], data: LabData
) -> None:
    worker = make_worker()
    none, some = worker.count_tokens([(CHAT,), data.clients[0]])
    assert none == 0 < some
    assert worker.measure(release_of(worker), Question(release=1, loss=(CHAT,))) == []


@pytest.mark.parametrize("group", [1, 2])
def test_adapters_that_do_not_fit_beside_the_base_are_one_sentence(
    make_worker: Callable[..., LabWorker],
    data: LabData,
    monkeypatch: pytest.MonkeyPatch,
    group: int,
) -> None:
    worker = make_worker(group=group)
    release = release_of(worker)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", full)
        with pytest.raises(OutOfMemoryError, match=f"{group} adapters with their optimisers"):
            worker.train(release, [visit_of(data, 0)])
    [found] = worker.train(release, [visit_of(data, 0)])  # and it can go on
    assert found.error is None


def test_a_held_out_record_that_the_template_has_no_place_for_is_not_asked(
    make_worker: Callable[..., LabWorker], data: LabData
) -> None:
    worker = make_worker()
    question = Question(release=1, answers=(CHAT, data.held_out[0]), max_new_tokens=4)
    notes = worker.measure(release_of(worker), question)
    asked = [note.instruction for note in notes if isinstance(note, AnswerNote)]
    assert asked == [data.held_out[0].instruction]
    assert worker.measure(release_of(worker), replace(question, answers=(CHAT,))) == []


def test_a_release_is_measured_on_the_response_whatever_is_trained(
    make_worker: Callable[..., LabWorker], data: LabData
) -> None:
    worker = make_worker(federation__loss_on="all")
    release = release_of(worker)
    question = Question(
        release=7, loss=data.held_out[:6], answers=data.held_out[:2], max_new_tokens=4
    )
    notes = worker.measure(release, question)
    worker.train(release, [visit_of(data, 0)])  # leaves masks of dropout and another adapter
    assert worker.measure(release, question) == notes
    found = {(n.measure, n.category): n.score for n in notes if isinstance(n, ScoreNote)}
    assert {note.release for note in notes} == {7}
    assert len([note for note in notes if isinstance(note, AnswerNote)]) == 2

    worker._detach()
    base, block = worker.base, worker.manifest.training
    adapted = AdaptedModel(base, worker.manifest.lora)
    shapes = adapter_shapes(base.description, worker.manifest.lora)
    adapted.load(unflatten(release, sent_layout(shapes, sent_factors(LoraRule.FEDIT, 0))))
    examples = tokenize(
        data.held_out[:6],
        base.tokenizer,
        template=block.template,
        loss_on=LossOn.RESPONSE,
        max_length=block.max_length,
    ).examples
    wanted = held_out_loss(adapted.model, examples, pad_id=base.pad_id)
    adapted.detach()
    for name, score in wanted.by_category.items():
        assert found[Measure.LOSS, name] == score.score


def test_tokens_are_counted_as_they_are_trained_on(
    make_worker: Callable[..., LabWorker], data: LabData
) -> None:
    epochs = {"federation__local_steps": None, "federation__local_epochs": 1}
    worker = make_worker(**epochs)
    release = release_of(worker)
    trained = [
        found.n_tokens
        for agent in (0, 3)
        for found in worker.train(release, [visit_of(data, agent)])
    ]
    assert worker.count_tokens([data.clients[0], data.clients[3]]) == trained


def test_weights_are_numbers_of_examples_as_far_as_the_manifest_lets_them(
    make_worker: Callable[..., LabWorker], data: LabData
) -> None:
    worker = make_worker()
    [found] = worker.train(release_of(worker), [visit_of(data, 1)])
    assert found.weight == data.sizes[1]
    worker = make_worker(federation__epsilon=8)
    [found] = worker.train(release_of(worker), [visit_of(data, 1)])
    assert found.weight == 1


def test_a_loaded_base_works_in_one_thread(own_base: LoadedBase) -> None:
    assert torch.get_num_threads() == 1
    assert own_base.device.type == "cpu"


def test_a_machine_is_named_by_what_decides_how_numbers_are_rounded(
    make_worker: Callable[..., LabWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    here = worker.machine()
    assert here.startswith(processor())
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "another")
    assert worker.machine() != here


def test_only_base_and_device_decide_whether_a_worker_must_load_anew() -> None:
    setup = Setup(model=EMBEDDED_BASE, device="cpu")
    assert setup.is_of_base(replace(setup, group=4, seed=9, manifest=b"{}"))
    assert not setup.is_of_base(replace(setup, device="cuda"))
    assert not setup.is_of_base(replace(setup, model="another"))
    assert not setup.is_of_base(replace(setup, revision="main"))

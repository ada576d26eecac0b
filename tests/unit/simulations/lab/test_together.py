"""Trainings that share a pass through the base, against each by itself."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from edge_agent.data.tokens import Example
from edge_agent.errors import TrainingError
from edge_agent.training.gradients import (
    GradientRule,
    Gradients,
    MeanGradient,
    PrivateGradient,
    StepGradient,
)
from edge_agent.training.sampling import BatchSampler, PoissonBatches, ShuffledBatches
from edge_agent.training.trainer import (
    ClipNorm,
    LocalTrainer,
    RoundRecipe,
    TrainerOptions,
    TrainingResult,
)
from privacy.dp_sgd.mechanism import Mechanism
from protocol.blocks import LoraBlock, TrainingBlock
from protocol.clock import SystemClock
from quant import loss as loss_module
from quant.adapter import AdapterArrays, adapter_shapes, initial_adapter, sent_layout
from quant.base_model import LoadedBase
from quant.lora import AdaptedModel
from quant.lora_stack import StackedModel, StackSlot
from quant.memory import StepSettings
from simulations.lab.together import train_together

LOSSES = "simulations.lab.together.example_losses"
LORA = LoraBlock(
    rank=4,
    alpha=8.0,
    dropout=0.1,
    target_modules=("q_proj", "v_proj", "down_proj"),
    init_seed=7,
)
BLOCK = TrainingBlock(batch_size=5, local_epochs=2, learning_rate=1e-2, max_length=64)
SIZES = (12, 7, 16)
"""Examples of each agent: of two epochs 6, 4 and 8 steps."""


@dataclass(frozen=True)
class Keep:
    """Notes the gradient of every step."""

    found: list[Gradients] = field(default_factory=list)

    def __repr__(self) -> str:
        return "Keep()"

    def __call__(self, gradient: StepGradient, *, step: int) -> None:
        self.found.append({name: tensor.clone() for name, tensor in gradient.parts.items()})


def make_examples(n_examples: int) -> list[Example]:
    rng = np.random.default_rng(n_examples)
    found = []
    for number in range(n_examples):
        n_tokens = int(rng.integers(6, 30))
        mask = np.zeros(n_tokens, np.bool_)
        mask[n_tokens // 2 :] = True
        found.append(
            Example(
                input_ids=rng.integers(3, 300, n_tokens).astype(np.int32),
                loss_mask=mask,
                source=f"made[{number}]",
                category=None,
                truncated=False,
            )
        )
    return found


def in_the_open(agent: int) -> tuple[BatchSampler, GradientRule]:
    sampler = ShuffledBatches(n_examples=SIZES[agent], batch_size=BLOCK.batch_size, seed=agent)
    return sampler, MeanGradient()


def privately(agent: int) -> tuple[BatchSampler, GradientRule]:
    """DP-SGD with a noise that hides nothing here: its own numbers are equal on both sides."""
    secret, probability = bytes([agent]) * 32, 0.3
    mechanism = Mechanism(
        clip_norm=0.5, noise_multiplier=0.4, expected_batch=probability * SIZES[agent]
    )
    sampler = PoissonBatches(n_examples=SIZES[agent], probability=probability, secret=secret)
    return sampler, PrivateGradient(mechanism=mechanism, secret=secret)


@dataclass
class Bench:
    """Three agents over one base: together, and one after the other."""

    base: LoadedBase
    block: TrainingBlock = BLOCK
    parts: Callable[[int], tuple[BatchSampler, GradientRule]] = in_the_open
    settings: StepSettings = field(default_factory=StepSettings)

    def __post_init__(self) -> None:
        self.keeps = {agent: Keep() for agent in range(len(SIZES))}
        self.layout = sent_layout(adapter_shapes(self.base.description, LORA), LORA.sent)

    def start(self, agent: int) -> AdapterArrays:
        """Of each agent another one, of which nothing is zero."""
        rng = np.random.default_rng(100 + agent)
        return {
            name: array + rng.normal(0, 0.05, array.shape).astype(np.float32)
            for name, array in initial_adapter(self.base.description, LORA).items()
        }

    def trainer(self, adapted: AdaptedModel | StackSlot, agent: int) -> LocalTrainer:
        sampler, rule = self.parts(agent)
        clip = (ClipNorm(1.0),) if isinstance(rule, MeanGradient) else ()
        return LocalTrainer(
            adapted,
            make_examples(SIZES[agent]),
            RoundRecipe(training=self.block, schedule_start=0.0, schedule_end=0.5, seed=agent),
            sampler=sampler,
            clock=SystemClock(),
            options=TrainerOptions(
                rule=rule, transforms=(self.keeps[agent], *clip), settings=self.settings
            ),
        )

    def alone(self) -> dict[int, TrainingResult]:
        adapted = AdaptedModel(self.base, LORA)
        found = {
            agent: self.trainer(adapted, agent).run(self.start(agent), self.layout, weight=agent)
            for agent in range(len(SIZES))
        }
        adapted.detach()
        return found

    def together(
        self, *, n_slots: int = len(SIZES), starts: dict[int, AdapterArrays] | None = None
    ) -> list[TrainingResult | TrainingError]:
        stack = StackedModel(self.base, LORA, n_slots=n_slots)
        sessions = [
            self.trainer(stack.slots[agent], agent).session(
                (starts or {}).get(agent, self.start(agent)), self.layout, weight=agent
            )
            for agent in range(len(SIZES))
        ]
        ended = train_together(stack, sessions)
        stack.detach()
        return ended


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def assert_near(ended: TrainingResult | TrainingError, alone: TrainingResult) -> None:
    """As far as rounding lets several steps of AdamW come apart."""
    assert isinstance(ended, TrainingResult)
    assert relative_error(ended.update.vector, alone.update.vector) <= 1e-3
    assert (ended.n_steps, ended.n_examples) == (alone.n_steps, alone.n_examples)
    assert ended.update.weight == alone.update.weight
    assert ended.first_loss == pytest.approx(alone.first_loss, rel=1e-5)
    assert ended.last_loss == pytest.approx(alone.last_loss, rel=1e-3)


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        pytest.param(BLOCK, in_the_open, id="open"),
        pytest.param(BLOCK.model_copy(update={"proximal_mu": 1.0}), in_the_open, id="fedprox"),
        pytest.param(
            BLOCK.model_copy(update={"local_epochs": None, "local_steps": 6}), privately, id="dp"
        ),
    ],
)
def test_guarantee_1_each_result_equals_that_of_the_training_by_itself(
    random_base: LoadedBase,
    block: TrainingBlock,
    parts: Callable[[int], tuple[BatchSampler, GradientRule]],
) -> None:
    bench = Bench(random_base, block=block, parts=parts)
    alone = bench.alone()
    gradients = {agent: list(keep.found) for agent, keep in bench.keeps.items()}
    bench.keeps = {agent: Keep() for agent in alone}
    ended = bench.together(n_slots=4)  # one slot has nobody
    assert len(ended) == len(SIZES)
    for agent, wanted in alone.items():
        assert_near(ended[agent], wanted)
        first, found = gradients[agent][0], bench.keeps[agent].found[0]
        for name, gradient in first.items():
            error = torch.linalg.vector_norm(found[name] - gradient)
            assert float(error) <= 1e-5 * float(torch.linalg.vector_norm(gradient)), (agent, name)
    n_steps = [len(keep.found) for keep in bench.keeps.values()]
    assert n_steps == ([6, 6, 6] if parts is privately else [6, 4, 8])


def test_guarantee_1_also_where_micro_batches_are_of_several_sizes(random_base: LoadedBase) -> None:
    bench = Bench(random_base, settings=StepSettings(micro_tokens=64))
    alone = bench.alone()
    for agent, ended in enumerate(bench.together()):
        assert_near(ended, alone[agent])


def test_guarantee_2_one_that_diverges_ends_alone_and_the_others_go_on(
    random_base: LoadedBase,
) -> None:
    bench = Bench(random_base)
    calm = bench.together()
    broken = {name: np.full_like(array, np.inf) for name, array in bench.start(1).items()}
    first, failed, last = bench.together(starts={1: broken})
    assert isinstance(failed, TrainingError)
    assert "the gradient of step 1 is not finite; nothing is sent" in str(failed)
    for ended, wanted in ((first, calm[0]), (last, calm[2])):
        assert isinstance(wanted, TrainingResult)
        assert_near(ended, wanted)


def test_guarantee_2_one_that_moves_nothing_ends_alone(random_base: LoadedBase) -> None:
    @dataclass(frozen=True)
    class Nothing(MeanGradient):
        def finish(self, total: StepGradient, *, n_examples: int, step: int) -> None:
            total.vector.zero_()

    bench = Bench(
        random_base,
        block=BLOCK.model_copy(update={"weight_decay": 0.0}),
        parts=lambda agent: (in_the_open(agent)[0], Nothing() if agent == 2 else MeanGradient()),
    )
    first, second, failed = bench.together()
    assert isinstance(first, TrainingResult)
    assert isinstance(second, TrainingResult)
    assert isinstance(failed, TrainingError)
    assert "training moved no weight" in str(failed)


class ScarceMemory:
    """Losses of at most so many examples at once."""

    def __init__(self, n_most: int, *, said: str = "can't allocate memory") -> None:
        self.n_most = n_most
        self.said = said
        self.real = loss_module.example_losses
        self.refused: list[int] = []
        self.taken: list[int] = []

    def __call__(self, model: object, **tensors: torch.Tensor) -> torch.Tensor:
        n_rows = len(tensors["input_ids"])
        (self.refused if n_rows > self.n_most else self.taken).append(n_rows)
        if n_rows > self.n_most:
            raise RuntimeError(self.said)
        return self.real(model, **tensors)


def test_what_does_not_fit_at_once_is_tried_in_halves(
    random_base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(random_base)
    whole = bench.alone()
    scarce = ScarceMemory(5)  # the batch of one agent, and not of two
    monkeypatch.setattr(LOSSES, scarce)
    for agent, ended in enumerate(bench.together()):
        assert_near(ended, whole[agent])
    assert max(scarce.refused) == 15
    assert 10 in scarce.refused  # a half of two is halved again
    assert scarce.refused.count(15) == 1  # and what did not fit once is not tried again
    assert max(scarce.taken) == 5


def test_a_micro_batch_that_does_not_fit_by_itself_is_cut_by_its_own_trainer(
    random_base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(random_base)
    whole = bench.alone()
    scarce = ScarceMemory(3)
    monkeypatch.setattr(LOSSES, scarce)
    for agent, ended in enumerate(bench.together()):
        assert_near(ended, whole[agent])
    assert 5 in scarce.refused
    assert max(scarce.taken) <= 3


def test_another_error_is_no_want_of_memory(
    random_base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOSSES, ScarceMemory(5, said="the wires are crossed"))
    with pytest.raises(RuntimeError, match="the wires are crossed"):
        Bench(random_base).together()


def test_no_example_fits_ends_each_training_with_one_sentence(
    random_base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOSSES, ScarceMemory(0))
    bench = Bench(random_base)
    for ended in bench.together():
        assert isinstance(ended, TrainingError)
        assert "does not fit into the memory that is allowed" in str(ended)


def test_losses_are_scaled_for_each_agent_by_itself(
    random_base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As float16 asks for: of two agents one may have overflowed more often."""
    bench = Bench(random_base)
    alone = bench.alone()
    real = LocalTrainer.session

    def scaled(trainer: LocalTrainer, *args: object, **kwargs: object):
        trainer._loss_scale = 2.0 ** (3 * trainer._recipe.seed)  # 1, 8, 64
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(LocalTrainer, "session", scaled)
    for agent, ended in enumerate(bench.together()):
        assert_near(ended, alone[agent])


def test_a_slot_is_trained_by_its_session_alone(random_base: LoadedBase) -> None:
    bench = Bench(random_base)
    stack = StackedModel(bench.base, LORA, n_slots=2)
    with pytest.raises(TypeError, match="trained by its session"):
        bench.trainer(stack.slots[0], 0).run(bench.start(0), bench.layout, weight=1)

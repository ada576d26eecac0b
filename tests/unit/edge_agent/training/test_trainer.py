"""The step engine: exactness, resumption, pauses, memory, refusals."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent.data.tokens import Example
from edge_agent.errors import OutOfMemoryError, TrainingError, TrainingStoppedError
from edge_agent.training.gradients import StepGradient
from edge_agent.training.sampling import ShuffledBatches
from edge_agent.training.trainer import (
    ClipNorm,
    LocalTrainer,
    RoundRecipe,
    TrainerOptions,
    TrainingProgress,
    TrainingResult,
    Wish,
)
from protocol.blocks import Factor, LoraBlock, Schedule, TrainingBlock
from protocol.clock import SystemClock
from protocol.layout import VectorLayout
from quant import loss as loss_module
from quant.adapter import AdapterArrays, adapter_shapes, initial_adapter, sent_layout
from quant.base_model import LoadedBase, load_base
from quant.lora import AdaptedModel
from quant.memory import StepSettings

N_STEPS = 6


def make_lora(
    *, dropout: float = 0.0, sent: tuple[Factor, ...] = (Factor.A, Factor.B)
) -> LoraBlock:
    return LoraBlock(
        rank=4,
        alpha=8.0,
        dropout=dropout,
        target_modules=("q_proj", "v_proj", "down_proj"),
        sent=sent,
        init_seed=7,
    )


def make_block(**changes: object) -> TrainingBlock:
    values: dict[str, object] = {
        "batch_size": 5,
        "local_steps": N_STEPS,
        "learning_rate": 1e-2,
        "max_length": 64,
    }
    return TrainingBlock(**{**values, **changes})  # type: ignore[arg-type]


def make_examples(n_examples: int = 12, *, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(n_examples):
        n_tokens = int(rng.integers(6, 30))
        mask = np.zeros(n_tokens, np.bool_)
        mask[n_tokens // 2 :] = True
        examples.append(
            Example(
                input_ids=rng.integers(3, 300, n_tokens).astype(np.int32),
                loss_mask=mask,
                source=f"made[{number}]",
                category=None,
                truncated=False,
            )
        )
    return examples


@dataclass
class Bench:
    """An adapter on a base, and what a trainer needs."""

    base: LoadedBase
    lora: LoraBlock = field(default_factory=make_lora)

    def __post_init__(self) -> None:
        self.adapted = AdaptedModel(self.base, self.lora)
        self.start: AdapterArrays = initial_adapter(self.base.description, self.lora)
        self.layout = sent_layout(adapter_shapes(self.base.description, self.lora), self.lora.sent)

    def trainer(
        self,
        options: TrainerOptions | None = None,
        *,
        block: TrainingBlock | None = None,
        examples: list[Example] | None = None,
    ) -> LocalTrainer:
        examples = examples or make_examples()
        block = block or make_block()
        return LocalTrainer(
            self.adapted,
            examples,
            RoundRecipe(training=block, schedule_start=0.0, schedule_end=0.5, seed=3),
            sampler=ShuffledBatches(n_examples=len(examples), batch_size=block.batch_size, seed=11),
            clock=SystemClock(),
            options=options,
        )

    def result(self, options: TrainerOptions | None = None, **kwargs: object) -> TrainingResult:
        trainer = self.trainer(options, **kwargs)  # type: ignore[arg-type]
        return trainer.run(self.start, self.layout, weight=1)

    def update(self, options: TrainerOptions | None = None, **kwargs: object) -> np.ndarray:
        return self.result(options, **kwargs).update.vector


class KillError(Exception):
    """Stands for kill -9: whatever was not saved is lost."""


def test_fedprox_adds_the_distance_from_the_rounds_start_to_the_gradient(
    random_base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """μ(w − w₀): nothing in the first step, and what the first step moved in the second."""
    bench = Bench(random_base)
    seen: list[dict[str, torch.Tensor]] = []
    weights: list[dict[str, torch.Tensor]] = []
    real = LocalTrainer._apply

    def look(trainer, optimizer, flat, learning_rate) -> None:
        seen.append(bench.adapted.parts(flat.clone()))
        weights.append(bench.adapted.parts(bench.adapted.weights.clone()))
        real(trainer, optimizer, flat, learning_rate)

    monkeypatch.setattr(LocalTrainer, "_apply", look)
    for mu in (0.0, 3.0):
        bench.update(block=make_block(local_steps=2, proximal_mu=mu))
    (plain_1, plain_2, pulled_1, pulled_2), start = seen, bench.start
    for name, gradient in plain_1.items():
        assert torch.equal(gradient, pulled_1[name])
        moved = weights[3][name] - torch.from_numpy(start[name])
        torch.testing.assert_close(
            pulled_2[name], plain_2[name] + 3.0 * moved, rtol=1e-4, atol=1e-7
        )
    assert any(
        float(weights[3][name].sub(torch.from_numpy(start[name])).norm()) for name in plain_1
    )


def test_fedprox_keeps_agents_nearer_to_the_rounds_start(random_base: LoadedBase) -> None:
    bench = Bench(random_base)
    norms = [
        float(np.linalg.norm(bench.update(block=make_block(local_steps=30, proximal_mu=mu))))
        for mu in (0.0, 10.0)
    ]
    assert norms[1] < 0.7 * norms[0]


def test_guarantee_1_a_killed_run_that_starts_again_equals_an_uninterrupted_one(
    random_base: LoadedBase, tmp_path: Path
) -> None:
    bench = Bench(random_base, make_lora(dropout=0.1))
    whole = bench.result()

    def kill_after(step: int):
        def on_progress(progress: TrainingProgress) -> None:
            if progress.step == step:
                raise KillError

        return on_progress

    for killed_at in (3, 5):  # saved at 2 and 4: step 3 and step 5 are lost
        options = TrainerOptions(
            state_path=tmp_path / "state", save_every_steps=2, on_progress=kill_after(killed_at)
        )
        with pytest.raises(KillError):
            bench.update(options)
        bench.adapted.load(bench.start)  # another process begins with nothing
    steps: list[int] = []
    resumed = bench.result(
        TrainerOptions(
            state_path=tmp_path / "state",
            save_every_steps=2,
            on_progress=lambda progress: steps.append(progress.step),
        )
    )
    assert steps == [5, 6]
    np.testing.assert_array_equal(resumed.update.vector, whole.update.vector)
    assert resumed.n_tokens == whole.n_tokens > 0
    assert (resumed.first_loss, resumed.last_loss) == (whole.first_loss, whole.last_loss)


def test_a_state_of_other_data_is_not_resumed(random_base: LoadedBase, tmp_path: Path) -> None:
    bench = Bench(random_base)
    path = tmp_path / "state"
    bench.update(TrainerOptions(state_path=path, save_every_steps=2))
    steps: list[int] = []
    bench.update(
        TrainerOptions(state_path=path, on_progress=lambda progress: steps.append(progress.step)),
        examples=make_examples(seed=1),
    )
    assert steps == list(range(1, N_STEPS + 1))


def test_a_damaged_state_file_costs_time_but_nothing_else(
    random_base: LoadedBase, tmp_path: Path
) -> None:
    bench = Bench(random_base)
    whole = bench.update()
    path = tmp_path / "state"
    path.write_bytes(b"\x00" * 100)
    np.testing.assert_array_equal(bench.update(TrainerOptions(state_path=path)), whole)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_guarantee_2_the_gradient_does_not_depend_on_the_micro_batches(
    random_base: LoadedBase, dropout: float
) -> None:
    bench = Bench(random_base, make_lora(dropout=dropout))
    block = make_block(local_steps=1)
    gradients: list[dict[str, torch.Tensor]] = []

    @dataclass(frozen=True)
    class Keep:
        def __call__(self, gradient: StepGradient, *, step: int) -> None:
            gradients.append({name: tensor.clone() for name, tensor in gradient.parts.items()})

    for micro_tokens in (1, 64, 4096):
        options = TrainerOptions(
            transforms=(Keep(),), settings=StepSettings(micro_tokens=micro_tokens)
        )
        bench.update(options, block=block)
    whole = gradients[-1]
    for found in gradients[:-1]:
        for name, tensor in whole.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-7)


def test_a_layout_of_something_else_than_is_trained_is_refused(random_base: LoadedBase) -> None:
    """What is sent as one tensor must not be another's numbers."""
    bench = Bench(random_base)
    shapes = bench.adapted.shapes()
    first, second, *_ = [name for name in sorted(shapes) if name.endswith("lora_B.weight")]
    fewer = {name: shape for name, shape in shapes.items() if name != first}
    other = shapes | {first: (*shapes[first], 1), second: shapes[second]}
    for wrong in (fewer, other):
        trainer = bench.trainer(TrainerOptions())
        with pytest.raises(TrainingError, match="layout is not of the tensors that are trained"):
            trainer.run(bench.start, VectorLayout.of_shapes(wrong), weight=1)


def test_guarantee_3_an_update_of_zero_is_refused(random_base: LoadedBase) -> None:
    @dataclass(frozen=True)
    class Erase:
        def __call__(self, gradient: StepGradient, *, step: int) -> None:
            gradient.vector.zero_()

    bench = Bench(random_base)
    with pytest.raises(TrainingError, match="exactly zero"):
        bench.update(TrainerOptions(transforms=(Erase(),)))


def test_guarantee_3_an_update_that_is_not_finite_is_refused(random_base: LoadedBase) -> None:
    @dataclass(frozen=True)
    class Spoil:
        def __call__(self, gradient: StepGradient, *, step: int) -> None:
            gradient.vector[0] = torch.nan

    bench = Bench(random_base)
    with pytest.raises(TrainingError, match="not finite"):
        bench.update(TrainerOptions(transforms=(Spoil(),)))


def test_examples_without_a_token_to_learn_are_refused(random_base: LoadedBase) -> None:
    bench = Bench(random_base)
    example = make_examples(1)[0]
    barren = replace(example, loss_mask=np.zeros_like(example.loss_mask))
    with pytest.raises(TrainingError, match=r"no.* a token to learn"):
        bench.trainer(examples=[barren])


def test_training_moves_the_loss_down(random_base: LoadedBase) -> None:
    bench = Bench(random_base)
    block = make_block(local_steps=60, learning_rate=2e-2)
    trainer = bench.trainer(block=block, examples=make_examples(4))
    result = trainer.run(bench.start, bench.layout, weight=1)
    assert result.last_loss < result.first_loss - 1.0


def test_only_the_factors_that_are_sent_move(random_base: LoadedBase) -> None:
    bench = Bench(random_base, make_lora(sent=(Factor.B,)))
    bench.update()
    after = bench.adapted.arrays()
    for name, array in after.items():
        moved = bool((array != bench.start[name]).any())
        assert moved is name.endswith("lora_B.weight")


def test_a_pause_and_a_stop_come_at_a_micro_batch_and_lose_nothing(
    random_base: LoadedBase, tmp_path: Path
) -> None:
    bench = Bench(random_base)
    whole = bench.update()

    class Script:
        """Pauses twice in the middle of a step, then goes on, then stops."""

        def __init__(self, wishes: list[Wish]) -> None:
            self.wishes = wishes

        def wish(self) -> Wish:
            return self.wishes.pop(0) if self.wishes else Wish.GO

    options = TrainerOptions(
        control=Script([Wish.GO, Wish.PAUSE, Wish.GO, Wish.GO, Wish.GO, Wish.STOP]),
        settings=StepSettings(micro_tokens=40),
        state_path=tmp_path / "state",
        save_every_steps=100,
    )
    with pytest.raises(TrainingStoppedError, match="continues from there"):
        bench.update(options)
    again = TrainerOptions(state_path=tmp_path / "state", settings=StepSettings(micro_tokens=40))
    resumed = bench.update(again)
    np.testing.assert_allclose(resumed, whole, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(
        resumed, bench.update(TrainerOptions(settings=StepSettings(micro_tokens=40)))
    )


class ScarceMemory:
    """Refuses micro-batches with more tokens than fit, and frees some by recomputation."""

    def __init__(self, adapted: AdaptedModel, max_tokens: int, *, with_checkpointing: int) -> None:
        self.adapted, self.max_tokens = adapted, max_tokens
        self.with_checkpointing = with_checkpointing
        self.real = loss_module.example_losses

    def __call__(self, model: object, **tensors: torch.Tensor) -> torch.Tensor:
        recomputes = self.adapted.base.model.is_activation_checkpointing
        limit = self.with_checkpointing if recomputes else self.max_tokens
        if tensors["input_ids"].numel() > limit:
            raise torch.OutOfMemoryError
        return self.real(model, **tensors)


def test_out_of_memory_halves_the_micro_batch_and_carries_on(
    random_base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(random_base)
    whole = bench.update()
    scarce = ScarceMemory(bench.adapted, 60, with_checkpointing=60)
    monkeypatch.setattr("edge_agent.training.gradients.example_losses", scarce)
    np.testing.assert_allclose(bench.update(), whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "said",
    ["[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried", ""],
    ids=["of-the-cpu", "another"],
)
def test_memory_that_ends_on_the_cpu_is_known_by_what_torch_says(
    random_base: LoadedBase, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    bench = Bench(random_base)
    whole = bench.update()
    real = loss_module.example_losses

    def scarce(model: object, **tensors: torch.Tensor) -> torch.Tensor:
        if tensors["input_ids"].numel() > 60:
            raise RuntimeError(said)
        return real(model, **tensors)

    monkeypatch.setattr("edge_agent.training.gradients.example_losses", scarce)
    if said:
        np.testing.assert_allclose(bench.update(), whole, rtol=1e-3, atol=1e-6)
    else:
        with pytest.raises(RuntimeError):
            bench.update()


def test_activations_are_recomputed_when_one_example_does_not_fit(
    random_base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(random_base)
    whole = bench.update()
    scarce = ScarceMemory(bench.adapted, 10, with_checkpointing=30)
    monkeypatch.setattr("edge_agent.training.gradients.example_losses", scarce)
    np.testing.assert_allclose(bench.update(), whole, rtol=1e-3, atol=1e-6)
    scarce.with_checkpointing = 10
    with pytest.raises(OutOfMemoryError, match="does not fit"):
        bench.update()


def test_the_learning_rate_continues_across_rounds() -> None:
    """TRAINING, trap 11: a constant rate, or one that starts again, makes federations unstable."""
    for schedule in Schedule:
        block = make_block(schedule=schedule, final_frac=0.1)
        first = RoundRecipe(training=block, schedule_start=0.0, schedule_end=0.5, seed=0)
        second = RoundRecipe(training=block, schedule_start=0.5, schedule_end=1.0, seed=0)
        whole = RoundRecipe(training=block, schedule_start=0.0, schedule_end=1.0, seed=0)
        joined = [first.learning_rate(step, 10) for step in range(10)]
        joined += [second.learning_rate(step, 10) for step in range(10)]
        assert joined == pytest.approx([whole.learning_rate(step, 20) for step in range(20)])
        assert joined[0] == block.learning_rate
        end = second.learning_rate(10, 10)
        expected = 1.0 if schedule is Schedule.CONSTANT else 0.1
        assert end == pytest.approx(expected * block.learning_rate)


def test_clipping_bounds_the_norm_and_leaves_small_gradients_alone(
    random_base: LoadedBase,
) -> None:
    adapted = Bench(random_base).adapted
    large, small = StepGradient(adapted), StepGradient(adapted)
    large.add(torch.tensor([10.0] * 3 + [-10.0] * 4))
    ClipNorm(1.0)(large, step=0)
    assert float(large.vector.norm()) == pytest.approx(1.0, rel=1e-5)
    small.add(torch.tensor([0.3, -0.4]))
    ClipNorm(1.0)(small, step=0)
    assert small.vector.tolist() == pytest.approx([0.3, -0.4])


def test_an_epoch_draws_every_example_exactly_once() -> None:
    sampler = ShuffledBatches(n_examples=13, batch_size=5, seed=1)
    for epoch in range(3):
        steps = range(epoch * 3, epoch * 3 + 3)
        drawn = np.concatenate([sampler.indices(step) for step in steps])
        assert sorted(drawn) == list(range(13))
    assert sampler.n_steps(local_steps=None, local_epochs=2) == 6
    assert list(sampler.indices(0)) != list(sampler.indices(3))


@dataclass(frozen=True)
class SometimesEmpty:
    """Draws no example at step 1, as Poisson sampling may."""

    def indices(self, step: int) -> np.ndarray:
        return np.array([], np.int64) if step == 1 else np.arange(4)

    def n_steps(self, *, local_steps: int | None, local_epochs: int | None) -> int:
        return 3


def test_an_empty_batch_skips_the_model_and_nothing_else(random_base: LoadedBase) -> None:
    """TRAINING, trap 5: such a batch crashes the model, and its noise must be added anyway."""
    bench = Bench(random_base)
    seen: dict[int, float] = {}

    @dataclass(frozen=True)
    class Watch:
        def __call__(self, gradient: StepGradient, *, step: int) -> None:
            seen[step] = float(gradient.vector.abs().sum())

    trainer = LocalTrainer(
        bench.adapted,
        make_examples(),
        RoundRecipe(training=make_block(), schedule_start=0.0, schedule_end=0.5, seed=3),
        sampler=SometimesEmpty(),
        clock=SystemClock(),
        options=TrainerOptions(transforms=(Watch(),)),
    )
    trainer.run(bench.start, bench.layout, weight=1)
    assert seen[0] > 0.0
    assert seen[1] == 0.0
    assert seen[2] > 0.0


def test_every_tensor_that_is_sent_moves(random_base: LoadedBase) -> None:
    """TRAINING, trap 7: what was hooked or given to an optimiser too early never moves."""
    bench = Bench(random_base)
    bench.update()
    for name, array in bench.adapted.arrays().items():
        assert np.abs(array - bench.start[name]).max() > 0.0, name


def half_precision(random_base_dir: Path) -> LoadedBase:
    return load_base(random_base_dir, device=torch.device("cpu"), compute_dtype=torch.float16)


def test_a_step_in_float16_is_the_step_in_float32_to_its_precision(
    random_base: LoadedBase, random_base_dir: Path
) -> None:
    gradients: list[dict[str, torch.Tensor]] = []

    @dataclass(frozen=True)
    class Keep:
        def __call__(self, gradient: StepGradient, *, step: int) -> None:
            gradients.append({name: tensor.clone() for name, tensor in gradient.parts.items()})

    for base in (random_base, half_precision(random_base_dir)):
        options = TrainerOptions(transforms=(Keep(),))
        Bench(base).update(options, block=make_block(local_steps=1))
    whole, half = gradients
    for name, gradient in whole.items():
        assert half[name].dtype is torch.float32
        error = torch.linalg.vector_norm(half[name] - gradient)
        assert float(error) <= 0.02 * float(torch.linalg.vector_norm(gradient)), name


def test_what_overflows_in_float16_is_done_again_at_half_the_scale(
    random_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRAINING, trap 6: a scaler that skips the step would lose its examples."""
    bench = Bench(half_precision(random_base_dir))
    one = make_block(local_steps=1)
    whole = bench.update(block=one)
    calm = bench.trainer(block=one)
    calm.run(bench.start, bench.layout, weight=1)
    assert calm._loss_scale == 2.0**12  # nothing overflowed
    monkeypatch.setattr("edge_agent.training.trainer._FIRST_FP16_LOSS_SCALE", 2.0**40)
    trainer = bench.trainer(block=one)
    update = trainer.run(bench.start, bench.layout, weight=1).update.vector
    assert 1.0 <= trainer._loss_scale < 2.0**40
    # AdamW's first step is the sign of the gradient, so what is tiny may turn.
    assert np.mean(np.isclose(update, whole, rtol=0.1)) > 0.95


def test_a_gradient_that_is_never_finite_is_an_error_and_not_a_loop(
    random_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(half_precision(random_base_dir))
    real = loss_module.example_losses

    def broken(model: object, **tensors: torch.Tensor) -> torch.Tensor:
        return real(model, **tensors) * float("nan")

    monkeypatch.setattr("edge_agent.training.gradients.example_losses", broken)
    with pytest.raises(TrainingError, match="the gradient of step 1 is not finite"):
        bench.update(block=make_block(local_steps=1))

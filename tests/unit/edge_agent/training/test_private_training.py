"""DP-SGD in the step engine: against one example at a time, killed, and what cannot be clipped."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent.data.tokens import Example
from edge_agent.errors import TrainingError
from edge_agent.training import gradients as gradients_module
from edge_agent.training.gradients import (
    Gradients,
    PrivateGradient,
    StepGradient,
    StepNoise,
    Wanted,
    gradients_of,
    noise_threads,
)
from edge_agent.training.sampling import PoissonBatches
from edge_agent.training.trainer import (
    LocalTrainer,
    RoundRecipe,
    TrainerOptions,
    TrainingProgress,
)
from privacy.dp_sgd.mechanism import Mechanism, release
from protocol.blocks import Factor, LoraBlock, TrainingBlock
from protocol.clock import SystemClock
from quant.adapter import adapter_shapes, initial_adapter, sent_layout
from quant.base_model import LoadedBase, load_base
from quant.lora import AdaptedModel
from quant.loss import example_losses
from quant.memory import StepSettings
from quant.opacus_model import OpacusModel

N_EXAMPLES = 12
N_STEPS = 6
Q = 0.4
SECRET = bytes(range(32))
QUIET = 1e-9
"""A noise multiplier that leaves the clipped mean to be seen."""


def make_examples(n_examples: int = N_EXAMPLES) -> list[Example]:
    rng = np.random.default_rng(0)
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


@dataclass(frozen=True)
class Keep:
    """Notes the gradient that the optimiser gets."""

    found: list[Gradients]

    def __repr__(self) -> str:
        return "Keep()"

    def __call__(self, gradient: StepGradient, *, step: int) -> None:
        self.found.append({name: tensor.clone() for name, tensor in gradient.parts.items()})


class Bench:
    """An adapter on a base, trained privately."""

    def __init__(
        self,
        base: LoadedBase,
        sent: tuple[Factor, ...] = (Factor.A, Factor.B),
        adapt: type[AdaptedModel] = AdaptedModel,
    ) -> None:
        lora = LoraBlock(
            rank=4,
            alpha=8.0,
            target_modules=("q_proj", "v_proj", "down_proj"),
            sent=sent,
            init_seed=7,
        )
        self.adapted = adapt(base, lora)
        self.start = initial_adapter(base.description, lora)
        rng = np.random.default_rng(5)
        for name, array in self.start.items():  # B = 0 leaves A without a gradient
            self.start[name] = array + rng.normal(0, 0.05, array.shape).astype(np.float32)
        self.layout = sent_layout(adapter_shapes(base.description, lora), lora.sent)

    def update(
        self,
        *,
        clip_norm: float = 0.5,
        noise_multiplier: float = QUIET,
        q: float = Q,
        secret: bytes = SECRET,
        n_steps: int = N_STEPS,
        n_examples: int = N_EXAMPLES,
        n_noise_threads: int = 0,
        **options: object,
    ) -> np.ndarray:
        mechanism = Mechanism(
            clip_norm=clip_norm, noise_multiplier=noise_multiplier, expected_batch=q * n_examples
        )
        trainer = LocalTrainer(
            self.adapted,
            make_examples(n_examples),
            RoundRecipe(
                training=TrainingBlock(
                    batch_size=5, local_steps=n_steps, learning_rate=1e-2, max_length=64
                ),
                schedule_start=0.0,
                schedule_end=0.5,
                seed=3,
            ),
            sampler=PoissonBatches(n_examples=n_examples, probability=q, secret=secret),
            clock=SystemClock(),
            options=TrainerOptions(
                rule=PrivateGradient(
                    mechanism=mechanism, secret=secret, n_noise_threads=n_noise_threads
                ),
                **options,
            ),
        )
        return trainer.run(self.start, self.layout, weight=1).update.vector

    def gradient(self, **options: object) -> Gradients:
        """That of the first step."""
        keep = Keep([])
        self.update(n_steps=1, transforms=(keep,), **options)
        return keep.found[0]

    def by_hand(self, clip_norm: float, skipped: frozenset[int] = frozenset()) -> Gradients:
        """The slow loop: one example at a time, its whole gradient in the ordinary way."""
        self.adapted.load(self.start)
        self.adapted.checkpoint_activations(0)
        total = {name: torch.zeros_like(f) for name, f in self.adapted.trainable.items()}
        sampler = PoissonBatches(n_examples=N_EXAMPLES, probability=Q, secret=SECRET)
        drawn = [int(index) for index in sampler.indices(0)]
        assert len(drawn) > 2
        for index in drawn:
            if index in skipped:
                continue
            example = make_examples()[index]
            self.adapted.clear_gradients()
            example_losses(
                self.adapted.model,
                input_ids=torch.from_numpy(example.input_ids.astype(np.int64))[None],
                loss_mask=torch.from_numpy(example.loss_mask)[None],
            ).sum().backward()
            grads = {name: f.grad for name, f in self.adapted.trainable.items()}
            norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))
            for name, grad in grads.items():
                total[name] += grad * min(1.0, clip_norm / norm)
        self.adapted.clear_gradients()
        return {name: tensor / (Q * N_EXAMPLES) for name, tensor in total.items()}


def assert_near(found: Gradients, wanted: Gradients) -> None:
    assert found.keys() == wanted.keys()
    error = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted) ** 0.5
    size = sum(float(tensor.square().sum()) for tensor in wanted.values()) ** 0.5
    assert size > 0
    assert error <= 5e-5 * size


@pytest.mark.parametrize("sent", [(Factor.A, Factor.B), (Factor.B,)])
def test_a_step_is_that_of_a_loop_over_its_examples(
    random_base: LoadedBase, sent: tuple[Factor, ...]
) -> None:
    bench = Bench(random_base, sent)
    for clip_norm in (1e-3, 0.5, 1e3):
        wanted = bench.by_hand(clip_norm)
        for settings in (
            StepSettings(micro_tokens=4096),
            StepSettings(micro_tokens=1),
            StepSettings(micro_tokens=60, n_checkpointed_layers=99),
            StepSettings(micro_tokens=4096, max_examples=2, n_checkpointed_layers=1),
        ):
            assert_near(bench.gradient(clip_norm=clip_norm, settings=settings), wanted)


def test_the_noise_is_that_of_secret_and_step_and_is_not_divided_by_what_was_drawn(
    random_base: LoadedBase,
) -> None:
    bench = Bench(random_base)
    quiet, noisy = bench.gradient(), bench.gradient(noise_multiplier=3.0)
    alone = {name: torch.zeros_like(tensor) for name, tensor in quiet.items()}
    mechanism = Mechanism(clip_norm=0.5, noise_multiplier=3.0, expected_batch=Q * N_EXAMPLES)
    release(alone, mechanism, StepNoise(SECRET).of_step(0))
    for name, tensor in alone.items():
        torch.testing.assert_close(noisy[name] - quiet[name], tensor, rtol=1e-4, atol=1e-6)


N_NOISE = 300_001


def test_noise_is_the_same_with_and_without_threads() -> None:
    alone = StepNoise(SECRET)
    beside = StepNoise(SECRET, n_threads=3)
    for step in (0, 1, 1, 7):  # a step that is given up begins again
        beside.begin(step, N_NOISE)
    for step in (7, 2):  # and one that was not begun
        take = beside.of_step(step)
        found = np.concatenate([take(n) for n in (3, N_NOISE - 10, 7)])
        np.testing.assert_array_equal(found, alone.of_step(step)(N_NOISE))


def test_places_steps_and_secrets_have_noise_of_their_own() -> None:
    n = 1 << 17  # of a part
    first, other = StepNoise(SECRET), StepNoise(bytes(32))
    take = first.of_step(0)
    rows = [take(n), take(n), first.of_step(1)(n), other.of_step(0)(n)]
    rows.append(np.roll(rows[0], 1))
    found = np.corrcoef(rows) - np.eye(len(rows))
    assert abs(found).max() < 5 / math.sqrt(n)


def test_threads_make_noise_beside_a_gpu_alone_and_no_more_than_are_allowed() -> None:
    assert noise_threads(torch.device("cpu"), allowed=None) == 0
    gpu = torch.device("cuda")
    assert noise_threads(gpu, allowed=1) == 1
    assert 1 <= noise_threads(gpu, allowed=None) <= (os.cpu_count() or 1)


def test_a_training_with_threads_for_its_noise_is_the_same(random_base: LoadedBase) -> None:
    bench = Bench(random_base)
    wanted = bench.update(noise_multiplier=1.0)
    np.testing.assert_array_equal(bench.update(noise_multiplier=1.0, n_noise_threads=2), wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_guarantee_1_an_example_that_is_not_finite_adds_zero(
    random_base: LoadedBase, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    bench = Bench(random_base)
    drawn = PoissonBatches(n_examples=N_EXAMPLES, probability=Q, secret=SECRET).indices(0)
    spoilt = int(drawn[1])
    ids = make_examples()[spoilt].input_ids

    def losses(model: object, *, input_ids: torch.Tensor, **rest: object) -> torch.Tensor:
        found = example_losses(model, input_ids=input_ids, **rest)
        factors = [
            bad if np.array_equal(row[: len(ids)].numpy(), ids) else 1.0 for row in input_ids
        ]
        return found * torch.tensor(factors)

    monkeypatch.setattr(gradients_module, "example_losses", losses)
    assert_near(bench.gradient(), bench.by_hand(0.5, frozenset({spoilt})))


def test_a_loss_scale_leaves_no_trace_in_the_clipped_gradients(
    random_base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRAINING, trap 6: gradients are unscaled, in float32, before they are clipped; an example
    that overflows adds zero, and no step is done again at another scale."""
    bench = Bench(random_base)
    mechanism = Mechanism(clip_norm=0.5, noise_multiplier=1.0, expected_batch=4.0)
    rule = PrivateGradient(mechanism=mechanism, secret=SECRET)
    examples = make_examples()[:4]
    bench.adapted.load(bench.start)

    def total(loss_scale: float, factors: list[float]) -> Gradients:
        sums = StepGradient(bench.adapted)
        for example, factor in zip(examples, factors, strict=True):  # their lengths differ
            monkeypatch.setattr(
                gradients_module,
                "example_losses",
                lambda *args, factor=factor, **rest: example_losses(*args, **rest) * factor,
            )
            wanted = Wanted(
                examples=(example,),
                dropout_seeds=(0,),
                per_example=True,
                loss_scale=loss_scale,
                loss_chunk=64,
            )
            given = gradients_of(bench.adapted, wanted)
            assert rule.add(given, sums, loss_scale=loss_scale)
        return sums.parts

    wanted = total(1.0, [1.0] * 4)
    assert_near(total(2.0**12, [1.0] * 4), wanted)
    assert_near(total(2.0**12, [1.0, 1.0, math.inf, 1.0]), total(1.0, [1.0, 1.0, 0.0, 1.0]))


def test_guarantee_2_a_killed_run_that_starts_again_equals_an_uninterrupted_one(
    random_base: LoadedBase, tmp_path: Path
) -> None:
    class KillError(Exception):
        """Stands for kill -9."""

    def on_progress(progress: TrainingProgress) -> None:
        if progress.step == 5:
            raise KillError

    bench = Bench(random_base)
    whole = bench.update(noise_multiplier=1.0)
    keep = {"state_path": tmp_path / "state", "save_every_steps": 2}
    with pytest.raises(KillError):
        bench.update(noise_multiplier=1.0, on_progress=on_progress, **keep)
    steps: list[int] = []
    resumed = bench.update(
        noise_multiplier=1.0, on_progress=lambda progress: steps.append(progress.step), **keep
    )
    assert steps == [5, 6]
    np.testing.assert_array_equal(resumed, whole)
    assert SECRET not in (tmp_path / "state").read_bytes()


def test_a_run_with_another_secret_does_not_go_on_from_the_state_of_the_first(
    random_base: LoadedBase, tmp_path: Path
) -> None:
    bench = Bench(random_base)
    first = bench.update(noise_multiplier=1.0, state_path=tmp_path / "state", save_every_steps=2)
    steps: list[int] = []
    second = bench.update(
        noise_multiplier=1.0,
        secret=bytes(32),
        state_path=tmp_path / "state",
        on_progress=lambda progress: steps.append(progress.step),
    )
    assert steps[0] == 1
    assert not np.array_equal(first, second)


def test_a_batch_of_nobody_is_a_step_of_noise_alone(random_base: LoadedBase) -> None:
    bench = Bench(random_base)
    progress: list[TrainingProgress] = []
    update = bench.update(
        q=1e-9, n_steps=2, noise_multiplier=1.0, on_progress=progress.append, n_examples=12
    )
    assert len(progress) == 2
    assert all(math.isnan(event.loss) and event.n_tokens == 0 for event in progress)
    assert np.count_nonzero(update) == len(update)


def test_a_training_with_opacus_hooks_has_the_same_noise_and_the_same_account(
    random_base: LoadedBase, random_base_dir: Path
) -> None:
    ours = Bench(random_base).update(noise_multiplier=1.0)
    other = load_base(random_base_dir, device=torch.device("cpu"))
    theirs = Bench(other, adapt=OpacusModel).update(noise_multiplier=1.0)
    np.testing.assert_allclose(theirs, ours, rtol=1e-2, atol=1e-4)


def test_what_is_trained_as_a_whole_is_refused_by_name(random_base: LoadedBase) -> None:
    bench = Bench(random_base)
    random_base.model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"embed_tokens.weight is trained as a whole"):
        bench.update()


def test_a_layer_whose_gradients_never_come_is_refused_by_name(
    random_base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As hooks on stale parameters do (opacus issue 820): loss looks well, weights never move."""
    bench = Bench(random_base)
    layer = random_base.model.model.layers[1].self_attn.q_proj
    monkeypatch.setattr(layer, "forward", layer.base_layer.forward)
    with pytest.raises(TrainingError, match=r"layers.1.self_attn.q_proj.lora_\w.weight has no"):
        bench.update()


def test_the_recipes_clipping_of_the_mean_comes_not_after_the_noise(
    random_base: LoadedBase,
) -> None:
    bench = Bench(random_base)
    keep = Keep([])
    loud = bench.update(n_steps=1, noise_multiplier=50.0, transforms=(keep,))
    norm = sum(float(tensor.square().sum()) for tensor in keep.found[0].values()) ** 0.5
    assert norm > 2.0, "the case needs a gradient that the recipe's limit of 1 would clip"
    np.testing.assert_array_equal(loud, bench.update(n_steps=1, noise_multiplier=50.0))


def test_a_rules_text_does_not_tell_its_secret() -> None:
    mechanism = Mechanism(clip_norm=1.0, noise_multiplier=1.0, expected_batch=8.0)
    text = repr(PrivateGradient(mechanism=mechanism, secret=SECRET))
    assert repr(SECRET) not in text
    assert SECRET.hex() not in text
    assert text != repr(PrivateGradient(mechanism=mechanism, secret=bytes(32)))

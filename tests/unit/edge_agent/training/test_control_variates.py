"""SCAFFOLD in a training: what it adds, what it leaves, and that agents drift less."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_agent.data.tokens import Example
from edge_agent.training.control_variates import ControlVariates
from edge_agent.training.sampling import ShuffledBatches
from edge_agent.training.trainer import (
    LocalTrainer,
    RoundRecipe,
    TrainerOptions,
    TrainingProgress,
)
from protocol.blocks import Factor, LoraBlock, TrainingBlock
from protocol.clock import SystemClock
from quant.adapter import AdapterArrays, adapter_shapes, initial_adapter, sent_layout
from quant.base_model import LoadedBase
from quant.lora import AdaptedModel


class KillError(Exception):
    """Stands for kill -9."""


def make_examples(n_examples: int, *, seed: int, low: int = 3, high: int = 300) -> list[Example]:
    """Random tokens from a range: other ranges are other data."""
    rng = np.random.default_rng(seed)
    return [
        Example(
            input_ids=rng.integers(low, high, 16).astype(np.int32),
            loss_mask=np.arange(16) >= 4,
            source=f"made[{number}]",
            category=None,
            truncated=False,
        )
        for number in range(n_examples)
    ]


class Bench:
    """An adapter on a base, trained by several agents in turn."""

    def __init__(self, base: LoadedBase) -> None:
        self.lora = LoraBlock(
            rank=4,
            alpha=8.0,
            target_modules=("q_proj", "v_proj", "down_proj"),
            init_seed=7,
            sent=(Factor.A, Factor.B),
        )
        self.adapted = AdaptedModel(base, self.lora)
        self.start = initial_adapter(base.description, self.lora)
        self.layout = sent_layout(adapter_shapes(base.description, self.lora), self.lora.sent)

    def zeros(self) -> AdapterArrays:
        return {name: np.zeros_like(array) for name, array in self.start.items()}

    def train(
        self,
        start: AdapterArrays,
        examples: list[Example],
        *,
        n_steps: int = 6,
        max_grad_norm: float | None = 1.0,
        **options: Any,
    ) -> np.ndarray:
        block = TrainingBlock(
            batch_size=4, local_steps=n_steps, learning_rate=1e-2, max_grad_norm=max_grad_norm
        )
        trainer = LocalTrainer(
            self.adapted,
            examples,
            RoundRecipe(training=block, schedule_start=0.0, schedule_end=0.1, seed=3),
            sampler=ShuffledBatches(n_examples=len(examples), batch_size=4, seed=11),
            clock=SystemClock(),
            options=TrainerOptions(**options),
        )
        return trainer.run(start, self.layout, weight=1).update.vector


def test_guarantee_2_before_the_first_round_nothing_changes(random_base: LoadedBase) -> None:
    bench = Bench(random_base)
    examples = make_examples(8, seed=1)
    plain = bench.train(bench.start, examples)
    zeros = ControlVariates(bench.zeros(), bench.zeros())
    assert bench.train(bench.start, examples, variates=zeros).tobytes() == plain.tobytes()
    equal = {name: np.ones_like(array) for name, array in bench.start.items()}
    same = ControlVariates(equal, equal)
    assert bench.train(bench.start, examples, variates=same).tobytes() == plain.tobytes()
    other = ControlVariates(equal, bench.zeros())
    assert bench.train(bench.start, examples, variates=other).tobytes() != plain.tobytes()


def test_each_step_takes_the_clipped_gradient_corrected_and_leaves_the_mean_of_the_clipped(
    random_base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(random_base)
    rng = np.random.default_rng(5)
    own, everyone = (
        {n: rng.normal(0, 1e-2, a.shape).astype(np.float32) for n, a in bench.start.items()}
        for _ in range(2)
    )
    seen: list[dict[str, torch.Tensor]] = []
    real = LocalTrainer._apply

    def look(trainer, optimizer, flat, learning_rate) -> None:
        seen.append(trainer._adapted.parts(flat.clone()))
        real(trainer, optimizer, flat, learning_rate)

    monkeypatch.setattr(LocalTrainer, "_apply", look)
    variates = ControlVariates(own, everyone)
    examples = make_examples(8, seed=1)
    bench.train(bench.start, examples, variates=variates, n_steps=3, max_grad_norm=1e-3)
    plain = [
        {
            name: tensor - torch.from_numpy(everyone[name] - own[name])
            for name, tensor in step.items()
        }
        for step in seen
    ]
    for step in plain:
        norm = torch.linalg.vector_norm(torch.cat([tensor.flatten() for tensor in step.values()]))
        assert 0.5e-3 < float(norm) < 1.5e-3
    for name, array in variates.renewed(3).items():
        expected = sum(step[name] for step in plain) / 3
        np.testing.assert_allclose(array, expected.numpy(), atol=1e-7)


def test_guarantee_1_a_resumed_training_leaves_the_same_variate(
    random_base: LoadedBase, tmp_path: Path
) -> None:
    bench = Bench(random_base)
    examples = make_examples(8, seed=1)
    rng = np.random.default_rng(5)
    everyone = {n: rng.normal(0, 1e-3, a.shape).astype(np.float32) for n, a in bench.start.items()}

    def fresh() -> ControlVariates:
        return ControlVariates(bench.zeros(), everyone)

    whole = fresh()
    update = bench.train(bench.start, examples, variates=whole)

    def kill(progress: TrainingProgress) -> None:
        if progress.step == 5:
            raise KillError

    state = {"state_path": tmp_path / "state", "save_every_steps": 2}
    with pytest.raises(KillError):
        bench.train(bench.start, examples, variates=fresh(), on_progress=kill, **state)
    steps: list[int] = []
    resumed = fresh()
    again = bench.train(
        bench.start,
        examples,
        variates=resumed,
        on_progress=lambda progress: steps.append(progress.step),
        **state,
    )
    assert steps == [5, 6]
    assert again.tobytes() == update.tobytes()
    for name, array in whole.renewed(6).items():
        assert resumed.renewed(6)[name].tobytes() == array.tobytes()


def test_a_state_of_another_correction_is_not_resumed(
    random_base: LoadedBase, tmp_path: Path
) -> None:
    bench = Bench(random_base)
    examples = make_examples(8, seed=1)
    state = {"state_path": tmp_path / "state", "save_every_steps": 2}
    bench.train(
        bench.start, examples, variates=ControlVariates(bench.zeros(), bench.zeros()), **state
    )
    ones = {name: np.ones_like(array) for name, array in bench.start.items()}
    for variates in (ControlVariates(bench.zeros(), ones), None):
        steps: list[int] = []
        bench.train(
            bench.start,
            examples,
            variates=variates,
            on_progress=lambda progress: steps.append(progress.step),  # noqa: B023 - called at once
            **state,
        )
        assert steps[0] == 1


# Drift

CURVES = (torch.diag(torch.tensor([1.0, 0.1])), torch.diag(torch.tensor([0.1, 1.0])))
OPTIMA = (torch.tensor([1.0, 3.0]), torch.tensor([-2.0, -1.0]))
JOINT = torch.linalg.solve(CURVES[0] + CURVES[1], CURVES[0] @ OPTIMA[0] + CURVES[1] @ OPTIMA[1])
N_LOCAL = 20
Step = Callable[[torch.Tensor, torch.Tensor], None]


def sgd() -> Step:
    def step(weights: torch.Tensor, gradient: torch.Tensor) -> None:
        weights -= 0.1 * gradient

    return step


def adam() -> Step:
    state: dict[str, Any] = {}

    def step(weights: torch.Tensor, gradient: torch.Tensor) -> None:
        if not state:
            state["weights"] = torch.nn.Parameter(weights)
            state["optimizer"] = torch.optim.AdamW(
                [state["weights"]], lr=0.01, betas=(0.9, 0.999), weight_decay=0.0
            )
        state["weights"].grad = gradient.clone()
        state["optimizer"].step()
        weights.copy_(state["weights"].detach())

    return step


def quadratics(
    make_step: Callable[[], Step], *, scaffold: bool, n_rounds: int
) -> tuple[float, float]:
    """Two agents of unlike quadratics: the distance to the joint optimum, and of agents."""
    center = torch.zeros(2)
    everyone = torch.zeros(2)
    own = [torch.zeros(2), torch.zeros(2)]
    apart = 0.0
    for _ in range(n_rounds):
        ends, changes = [], []
        for i in range(2):
            variates = ControlVariates(
                {"w": own[i].numpy()}, {"w": everyone.numpy() if scaffold else own[i].numpy()}
            )
            weights, step = center.clone(), make_step()
            variates.begin({"w": weights})
            for _ in range(N_LOCAL):
                gradient = {"w": CURVES[i] @ (weights - OPTIMA[i])}
                variates.correct(gradient)
                step(weights, gradient["w"])
            renewed = torch.from_numpy(variates.renewed(N_LOCAL)["w"])
            changes.append(renewed - own[i])
            own[i] = renewed
            ends.append(weights)
        everyone = everyone + sum(changes) / 2
        apart = float(torch.linalg.vector_norm(ends[0] - ends[1]))
        center = sum(ends) / 2
    return float(torch.linalg.vector_norm(center - JOINT)), apart


def test_under_sgd_the_variate_is_the_papers_option_ii() -> None:
    """c − …: c_i⁺ = c_i − c + (x − y) / (K·η)."""
    own, everyone = np.array([0.3, -0.2], np.float32), np.array([-0.1, 0.4], np.float32)
    variates = ControlVariates({"w": own}, {"w": everyone})
    start = torch.tensor([2.0, -1.0])
    weights, step = start.clone(), sgd()
    variates.begin({"w": weights})
    for _ in range(N_LOCAL):
        gradient = {"w": CURVES[0] @ (weights - OPTIMA[0])}
        variates.correct(gradient)
        step(weights, gradient["w"])
    option_ii = own - everyone + (start - weights).numpy() / (N_LOCAL * 0.1)
    np.testing.assert_allclose(variates.renewed(N_LOCAL)["w"], option_ii, rtol=1e-4, atol=1e-5)


def test_under_sgd_agents_of_unlike_data_reach_the_optimum_of_all() -> None:
    plain, _ = quadratics(sgd, scaffold=False, n_rounds=200)
    corrected, _ = quadratics(sgd, scaffold=True, n_rounds=200)
    assert plain > 0.3  # FedAvg stops where the local optima pull equally
    assert corrected < 1e-3


def test_under_adam_agents_of_unlike_data_drift_less() -> None:
    plain, plain_apart = quadratics(adam, scaffold=False, n_rounds=150)
    corrected, corrected_apart = quadratics(adam, scaffold=True, n_rounds=150)
    assert corrected < 0.3 * plain
    assert corrected_apart < 0.3 * plain_apart


def test_agents_of_unlike_text_end_nearer_to_each_other(random_base: LoadedBase) -> None:
    """On a language model under AdamW, in the second round, when variates are known."""
    bench = Bench(random_base)
    data = [
        make_examples(8, seed=1, low=3, high=100),
        make_examples(8, seed=2, low=200, high=300),
    ]

    def second_round(*, scaffold: bool) -> float:
        own = [bench.zeros(), bench.zeros()]
        everyone, start = bench.zeros(), bench.start
        for _ in range(2):
            updates, renewed = [], []
            for i in range(2):
                variates = ControlVariates(own[i], everyone if scaffold else own[i])
                updates.append(bench.train(start, data[i], variates=variates, n_steps=8))
                renewed.append(variates.renewed(8))
            apart = float(np.linalg.norm(updates[0] - updates[1]))
            own = renewed
            everyone = {name: (renewed[0][name] + renewed[1][name]) / 2 for name in everyone}
            mean = (updates[0] + updates[1]) / 2
            start = {
                slot.name: start[slot.name] + mean[where].reshape(slot.shape)
                for slot, where in bench.layout.slices()
            }
        return apart

    assert second_round(scaffold=True) < 0.9 * second_round(scaffold=False)

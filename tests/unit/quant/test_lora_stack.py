"""Several adapters over one base, against one after the other."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit

from protocol.blocks import Factor, LoraBlock
from quant.adapter import AdapterArrays, factor_of, initial_adapter, to_safetensors
from quant.base_model import LoadedBase
from quant.errors import AdapterError
from quant.lora import AdaptedModel
from quant.lora_function import Rows
from quant.lora_stack import StackedModel, StackSlot
from quant.loss import example_losses

LORA = LoraBlock(
    rank=4, alpha=12.0, target_modules=("q_proj", "o_proj", "gate_proj", "down_proj"), init_seed=5
)
N_SLOTS = 4
COUNTS = [
    pytest.param({0: 2, 1: 2, 2: 2, 3: 2}, id="even"),
    pytest.param({0: 1, 1: 3, 2: 1, 3: 2}, id="uneven"),
    pytest.param({0: 2, 3: 2}, id="even-subset"),
    pytest.param({1: 1, 2: 3}, id="uneven-subset"),
    pytest.param({2: 3}, id="one"),
]

Gradients = dict[str, torch.Tensor]


def make_arrays(base: LoadedBase, seed: int, lora: LoraBlock = LORA) -> AdapterArrays:
    """An adapter of which nothing is zero, so that both factors have gradients."""
    rng = np.random.default_rng(seed)
    return {
        name: array + rng.normal(0, 0.05, array.shape).astype(np.float32)
        for name, array in initial_adapter(base.description, lora).items()
    }


def make_stack(base: LoadedBase, lora: LoraBlock = LORA, *, n_slots: int = N_SLOTS) -> StackedModel:
    stack = StackedModel(base, lora, n_slots=n_slots)
    for slot in stack.slots:
        slot.load(make_arrays(base, slot.number, lora))
    return stack


def make_batch(n_examples: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n_examples)
    input_ids = torch.randint(3, 300, (n_examples, 20), generator=generator)
    loss_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    loss_mask[:, 8:] = True
    loss_mask[0, 15:] = False
    return {"input_ids": input_ids, "loss_mask": loss_mask}


def gradients(
    adapted: AdaptedModel,
    batch: Mapping[str, torch.Tensor],
    *,
    by_example: bool = False,
    dropout_seeds: Sequence[int] = (),
) -> tuple[torch.Tensor, Gradients]:
    """Losses [B], and gradients of their sum or of each."""
    for factor in adapted.factors.values():
        factor.grad = None
    if dropout_seeds:
        adapted.seed_dropout(dropout_seeds)
    losses = example_losses(adapted.model, **batch)
    if by_example:
        with adapted.per_example_gradients() as found:
            losses.sum().backward()
        assert all(factor.grad is None for factor in adapted.factors.values())
        return losses.detach(), found
    losses.sum().backward()
    return losses.detach(), {
        name: factor.grad.clone() for name, factor in adapted.trainable.items()
    }


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    error = torch.linalg.vector_norm(found - wanted)
    return float(error / torch.linalg.vector_norm(wanted))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("counts", COUNTS)
def test_guarantee_1_losses_and_gradients_equal_those_of_each_adapter_by_itself(
    random_base: LoadedBase, counts: dict[int, int], dropout: float
) -> None:
    lora = LORA.model_copy(update={"dropout": dropout})
    n_examples = sum(counts.values())
    batch, seeds = make_batch(n_examples), list(range(100, 100 + n_examples))
    parts = dict(Rows(tuple(counts), tuple(counts.values())).parts())
    wanted: dict[tuple[int, bool], tuple[torch.Tensor, Gradients]] = {}
    alone = AdaptedModel(random_base, lora)
    for slot, part in parts.items():
        alone.load(make_arrays(random_base, slot, lora))
        own = {name: tensor[part] for name, tensor in batch.items()}
        for by_example in (False, True):
            wanted[slot, by_example] = gradients(
                alone, own, by_example=by_example, dropout_seeds=seeds[part]
            )
    alone.detach()

    stack = make_stack(random_base, lora)
    stack.assign(counts)
    for n_checkpointed in (0, 99):
        stack.checkpoint_activations(n_checkpointed)
        for by_example in (False, True):
            losses, found = gradients(stack, batch, by_example=by_example, dropout_seeds=seeds)
            assert found.keys() == stack.trainable.keys()
            for slot, part in parts.items():
                own_losses, own = wanted[slot, by_example]
                torch.testing.assert_close(losses[part], own_losses, rtol=1e-5, atol=0)
                for name, gradient in own.items():
                    of_slot = found[name][part if by_example else slot]
                    assert relative_error(of_slot, gradient) <= 1e-5, (slot, name)
            if not by_example:
                for gradient in found.values():
                    others = [slot for slot in range(N_SLOTS) if slot not in counts]
                    assert not gradient[others].any()


@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("counts", COUNTS[:4])
def test_guarantee_1_no_other_adapter_has_any_influence(
    random_base: LoadedBase, counts: dict[int, int], dropout: float, by_example: bool
) -> None:
    """Bit for bit, and also where another one has diverged."""
    stack = make_stack(random_base, LORA.model_copy(update={"dropout": dropout}))
    rows = stack.assign(counts)
    own, *_, other = rows.slots
    part = dict(rows.parts())[own]
    batch, seeds = make_batch(sum(counts.values())), list(range(sum(counts.values())))

    def of_own() -> list[torch.Tensor]:
        losses, found = gradients(stack, batch, by_example=by_example, dropout_seeds=seeds)
        place = part if by_example else own
        return [losses[part], *(gradient[place] for gradient in found.values())]

    before = of_own()
    for scale in (0.5, np.nan):
        changed = make_arrays(random_base, 77)
        stack.slots[other].load({name: scale * array for name, array in changed.items()})
        for found, wanted in zip(of_own(), before, strict=True):
            assert torch.equal(found, wanted)


def test_guarantee_2_what_is_kept_for_backward_does_not_grow_with_the_number_of_adapters(
    random_base: LoadedBase,
) -> None:
    def kept_bytes(n_slots: int) -> tuple[int, int]:
        stack = make_stack(random_base, n_slots=n_slots)
        stack.assign({0: 2, 1: 2})
        own = {factor.data_ptr() for factor in stack.factors.values()}
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = example_losses(stack.model, **make_batch(4))
        total = sum(tensor.nbytes for tensor in kept.values())
        n_values = sum(parameter.numel() for parameter in stack.model.parameters())
        del losses
        stack.detach()
        return total, n_values

    assert kept_bytes(2) == kept_bytes(8)


def test_loading_a_slot_and_reading_it_returns_the_same_bytes_and_leaves_the_others(
    random_base: LoadedBase,
) -> None:
    stack = make_stack(random_base)
    before = [to_safetensors(slot.arrays()) for slot in stack.slots]
    arrays = make_arrays(random_base, 99)
    stack.slots[2].load(arrays)
    after = [to_safetensors(slot.arrays()) for slot in stack.slots]
    assert after[2] == to_safetensors(arrays)
    assert [after[k] for k in (0, 1, 3)] == [before[k] for k in (0, 1, 3)]
    for name, array in arrays.items():
        np.testing.assert_array_equal(stack.factors[name][2].detach().numpy(), array)


def test_an_array_that_was_read_is_a_copy(random_base: LoadedBase) -> None:
    slot = make_stack(random_base).slots[1]
    kept = slot.arrays()
    slot.load({name: array + 1.0 for name, array in kept.items()})
    expected = make_arrays(random_base, 1)
    assert all(np.array_equal(kept[name], expected[name]) for name in kept)


def test_an_optimizer_step_on_a_slot_moves_the_stack_s_own_storage(
    random_base: LoadedBase,
) -> None:
    stack = make_stack(random_base)
    before = {name: factor.detach().clone() for name, factor in stack.factors.items()}
    stack.assign({1: 2, 3: 1})
    _, found = gradients(stack, make_batch(3))
    slot = stack.slots[1]
    weights = torch.nn.Parameter(slot.weights)
    weights.grad = torch.zeros_like(slot.weights)
    for name, part in slot.parts(weights.grad).items():
        part.copy_(found[name][1])
    torch.optim.AdamW([weights], lr=0.01).step()
    moved_to = slot.parts(slot.weights)
    for name, factor in stack.factors.items():
        moved = (factor.detach() - before[name]).abs().amax(dim=(1, 2))
        assert float(moved[1]) > 0.005
        assert not moved[[0, 2, 3]].any()
        assert torch.equal(moved_to[name], factor[1])
    losses, _ = gradients(stack, make_batch(3))
    stack.slots[1].load({name: array[1].numpy() for name, array in before.items()})
    assert not torch.equal(gradients(stack, make_batch(3))[0][:2], losses[:2])


@pytest.mark.parametrize("factors", [(Factor.A, Factor.B), (Factor.B,)], ids=["both", "b"])
def test_the_weights_of_a_slot_are_the_factors_that_are_trained(
    random_base: LoadedBase, factors: tuple[Factor, ...]
) -> None:
    stack = make_stack(random_base)
    stack.train_only(factors)
    before = {name: factor.detach().clone() for name, factor in stack.factors.items()}
    slot = stack.slots[2]
    parts = slot.parts(slot.weights)
    assert list(parts) == list(stack.trainable)
    for name, part in parts.items():
        assert torch.equal(part, before[name][2])
    slot.weights.add_(1.0)
    for name, factor in stack.factors.items():
        assert torch.equal(factor[[0, 1, 3]], before[name][[0, 1, 3]])
        moved = 1.0 if factor_of(name) in factors else 0.0
        assert torch.equal(factor[2], before[name][2] + moved)


def test_only_the_factors_that_are_to_be_trained_have_gradients(random_base: LoadedBase) -> None:
    stack, batch = make_stack(random_base), make_batch(4)
    stack.assign({0: 1, 2: 3})
    _, both = gradients(stack, batch)
    for factors in ((Factor.B,), (Factor.A,)):
        stack.train_only(factors)
        for by_example in (False, True):
            _, alone = gradients(stack, batch, by_example=by_example)
            assert alone.keys() == stack.trainable.keys()
            assert {factor_of(name) for name in alone} == set(factors)
            if not by_example:
                for name, gradient in alone.items():
                    torch.testing.assert_close(gradient, both[name])
        for name, factor in stack.factors.items():
            assert (factor.grad is None) or factor_of(name) in factors
    stack.train_only((Factor.A, Factor.B))
    assert gradients(stack, batch)[1].keys() == both.keys()


def test_detaching_gives_the_base_back_to_one_adapter(random_base: LoadedBase) -> None:
    batch = make_batch(3)

    def alone() -> tuple[torch.Tensor, Gradients]:
        adapted = AdaptedModel(random_base, LORA)
        adapted.load(make_arrays(random_base, 3))
        found = gradients(adapted, batch)
        adapted.detach()
        return found

    (losses, before), stack = alone(), make_stack(random_base)
    stack.assign({0: 1, 1: 2})
    gradients(stack, batch)
    stack.detach()
    layer = random_base.model.model.layers[0].self_attn.q_proj
    assert type(layer) is Linear4bit
    losses_after, after = alone()
    assert torch.equal(losses_after, losses)
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())


def test_examples_are_assigned_slot_by_slot(random_base: LoadedBase) -> None:
    stack = make_stack(random_base)
    rows = stack.assign({3: 2, 0: 1, 2: 4})
    assert rows == Rows(slots=(0, 2, 3), counts=(1, 4, 2))
    assert list(rows.parts()) == [(0, slice(0, 1)), (2, slice(1, 5)), (3, slice(5, 7))]
    assert not rows.are_even
    assert stack.assign({1: 3, 2: 3}).are_even


@pytest.mark.parametrize("n_slots", [0, -1])
def test_a_stack_of_no_adapters_is_refused_and_the_base_stays(
    random_base: LoadedBase, n_slots: int
) -> None:
    with pytest.raises(AdapterError, match=f"{n_slots} adapters cannot be attached; at least 1"):
        StackedModel(random_base, LORA, n_slots=n_slots)
    assert type(random_base.model.model.layers[0].self_attn.q_proj) is Linear4bit


@pytest.mark.parametrize(
    "change",
    [
        lambda name, array: (name, array[:2]),
        lambda name, array: (name, np.stack([array] * N_SLOTS)),
        lambda name, array: (name + ".other", array),
    ],
    ids=["shape", "a-stack", "name"],
)
def test_what_does_not_fit_a_slot_is_refused_whole(random_base: LoadedBase, change: Any) -> None:
    slot: StackSlot = make_stack(random_base).slots[1]
    before = to_safetensors(slot.arrays())
    arrays = make_arrays(random_base, 99)
    last = max(arrays)
    name, array = change(last, arrays.pop(last))
    with pytest.raises(AdapterError, match="cannot load"):
        slot.load(arrays | {name: array})
    assert to_safetensors(slot.arrays()) == before


def test_a_base_that_joins_its_examples_is_refused(random_base: LoadedBase) -> None:
    stack = make_stack(random_base)
    stack.assign({0: 1, 1: 1})
    layer = random_base.model.model.layers[0].self_attn.q_proj
    with pytest.raises(AdapterError, match="gets the examples of a batch as one"):
        layer(torch.ones(10, 64))

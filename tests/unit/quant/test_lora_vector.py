"""An adapter's numbers as one vector."""

import numpy as np
import pytest
import torch

from protocol.blocks import Factor, LoraBlock
from protocol.layout import VectorLayout
from quant.adapter import AdapterArrays, flatten, parts_of, sent_layout
from quant.base_model import LoadedBase
from quant.errors import AdapterError
from quant.lora import AdaptedModel
from quant.lora_stack import StackedModel
from quant.lora_vector import OneAdapter

LORA = LoraBlock(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "up_proj"), init_seed=1)
BOTH, A, B = (Factor.A, Factor.B), (Factor.A,), (Factor.B,)


@pytest.fixture(params=["alone", "slot"])
def adapter(request: pytest.FixtureRequest, random_base: LoadedBase) -> OneAdapter:
    if request.param == "alone":
        return AdaptedModel(random_base, LORA)
    return StackedModel(random_base, LORA, n_slots=3).slots[1]


def train_only(adapter: OneAdapter, factors: tuple[Factor, ...]) -> None:
    (adapter if isinstance(adapter, AdaptedModel) else adapter.stack).train_only(factors)


def make_arrays(adapter: OneAdapter) -> AdapterArrays:
    rng = np.random.default_rng(1)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in adapter.shapes().items()}


def assert_equal(found: AdapterArrays, wanted: AdapterArrays) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("factors", [BOTH, A, B])
def test_guarantee_1_load_then_arrays_returns_the_same_bytes_whatever_is_trained(
    adapter: OneAdapter, factors: tuple[Factor, ...]
) -> None:
    train_only(adapter, factors)
    wanted = make_arrays(adapter)
    adapter.load(wanted)
    assert_equal(adapter.arrays(), wanted)
    train_only(adapter, B if factors == A else A)  # laid out anew, with the same numbers
    assert_equal(adapter.arrays(), wanted)


@pytest.mark.parametrize("factors", [BOTH, A, B])
def test_guarantee_2_the_weights_are_the_numbers_in_the_order_of_their_layout(
    adapter: OneAdapter, factors: tuple[Factor, ...]
) -> None:
    train_only(adapter, factors)
    arrays = make_arrays(adapter)
    adapter.load(arrays)
    layout = sent_layout(adapter.shapes(), factors)
    assert adapter.trains(layout)
    for other in {BOTH, A, B} - {factors}:
        assert not adapter.trains(sent_layout(adapter.shapes(), other))
    np.testing.assert_array_equal(adapter.weights.numpy(), flatten(arrays, layout))
    adapter.weights.add_(1.0)
    moved = {name: arrays[name] + 1.0 for name in parts_of(flatten(arrays, layout), layout)}
    assert_equal(adapter.arrays(), arrays | moved)
    for name, part in adapter.parts(adapter.weights).items():
        np.testing.assert_array_equal(part.numpy(), moved[name])


@pytest.mark.parametrize("factors", [BOTH, A, B])
def test_a_vector_of_all_tensors_is_loaded_as_its_tensors_are(
    adapter: OneAdapter, factors: tuple[Factor, ...]
) -> None:
    train_only(adapter, factors)
    whole, arrays = VectorLayout.of_shapes(adapter.shapes()), make_arrays(adapter)
    adapter.load_vector(flatten(arrays, whole), whole)
    assert_equal(adapter.arrays(), arrays)


def test_guarantee_3_what_is_refused_changes_nothing(adapter: OneAdapter) -> None:
    arrays = make_arrays(adapter)
    adapter.load(arrays)
    whole = VectorLayout.of_shapes(adapter.shapes())
    vector = flatten(arrays, whole) + 1.0
    name = next(iter(arrays))
    for call in (
        lambda: adapter.load_vector(vector[:-1], whole),
        lambda: adapter.load_vector(vector.astype(np.float64), whole),
        lambda: adapter.load({name: arrays[name] + 1.0, "another": arrays[name]}),
        lambda: adapter.load({name: arrays[name][:, :-1]}),
    ):
        with pytest.raises(AdapterError):
            call()
    assert_equal(adapter.arrays(), arrays)


def test_a_slot_leaves_its_neighbours_alone(random_base: LoadedBase) -> None:
    stack = StackedModel(random_base, LORA, n_slots=3)
    before = stack.vector.clone()
    stack.slots[1].load(make_arrays(stack.slots[1]))
    assert torch.equal(stack.vector[[0, 2]], before[[0, 2]])
    assert not torch.equal(stack.vector[1], before[1])

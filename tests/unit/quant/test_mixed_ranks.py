"""Parts of an adapter: cropped, padded, and said to be so."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.base_description import BaseDescription, LinearModule
from protocol.blocks import BaseBlock, Factor, LoraBlock, TrainingBlock
from protocol.layout import CONTROL, PARTICIPATION, VectorLayout
from quant.adapter import (
    adapter_shapes,
    factor_of,
    flatten,
    initial_adapter,
    module_of,
    sent_layout,
    tensor_name,
)
from quant.companions import update_layout
from quant.errors import AdapterError
from quant.mixed_ranks import (
    by_row,
    crop,
    modules_of,
    own_lora,
    pad,
    participation,
    rank_of,
)

RANK = 8
BASE = BaseDescription(
    base=BaseBlock(
        model="synthetic/tiny",
        source_dtype="float32",
        fingerprint=bytes(32),
        tokenizer_digest=bytes(32),
    ),
    architecture="LlamaForCausalLM",
    n_parameters=1000,
    max_positions=64,
    has_chat_template=False,
    linear_modules=tuple(
        LinearModule(name=f"layers.{layer}.{name}", d_out=d_out, d_in=6)
        for layer in range(2)
        for name, d_out in (("q_proj", 5), ("v_proj", 7))
    ),
)
TRAINING = TrainingBlock(local_steps=1, learning_rate=1e-3)
SENT = st.sampled_from([(Factor.A, Factor.B), (Factor.B,)])


def make_lora(**changes: object) -> LoraBlock:
    values: dict[str, object] = {
        "rank": RANK,
        "alpha": 12.0,
        "target_modules": ("q_proj", "v_proj"),
        "init_seed": 3,
        "min_rank": 2,
        "optional_modules": ("v_proj",),
    }
    return LoraBlock(**{**values, **changes})  # type: ignore[arg-type]


def layout_of(lora: LoraBlock) -> VectorLayout:
    return sent_layout(adapter_shapes(BASE, lora), lora.sent)


def test_the_layout_of_equal_ranks_is_that_of_the_tensors() -> None:
    lora = make_lora(min_rank=None, optional_modules=())
    assert update_layout(adapter_shapes(BASE, lora), lora, TRAINING) == layout_of(lora)


@pytest.mark.parametrize("sent", [(Factor.A, Factor.B), (Factor.B,)])
def test_the_layout_of_mixed_ranks_ends_with_a_number_for_each_rank_row(sent) -> None:
    lora = make_lora(sent=sent)
    layout = update_layout(adapter_shapes(BASE, lora), lora, TRAINING)
    assert layout.tensors == layout_of(lora)
    assert layout.slots[-1].name == PARTICIPATION
    assert layout.slots[-1].shape == (4, RANK)
    where = layout.companion(PARTICIPATION)
    assert where == slice(layout.tensors.n_values, layout.n_values)


def test_the_layout_with_control_variates_is_twice_as_long() -> None:
    lora = make_lora(min_rank=None, optional_modules=())
    training = TRAINING.model_copy(update={"scaffold": True})
    layout = update_layout(adapter_shapes(BASE, lora), lora, training)
    assert layout.tensors == layout_of(lora)
    n_values = layout.tensors.n_values
    assert layout.n_values == 2 * n_values
    assert layout.companion(CONTROL) == slice(n_values, 2 * n_values)


@given(rank=st.integers(2, RANK), left_out=st.sampled_from([(), ("v_proj",)]), sent=SENT)
def test_pad_guarantee_1_what_was_trained_is_kept_bit_for_bit_and_the_rest_is_zero(
    rank: int, left_out: tuple[str, ...], sent: tuple[Factor, ...]
) -> None:
    lora = make_lora(sent=sent)
    own = own_lora(lora, rank=rank, left_out=left_out)
    small, whole = layout_of(own), layout_of(lora)
    vector = np.random.default_rng(rank).standard_normal(small.n_values).astype(np.float32)
    padded = pad(vector, small, whole)
    assert np.count_nonzero(padded) == np.count_nonzero(vector)
    shown = {slot.name: padded[where].reshape(slot.shape) for slot, where in whole.slices()}
    again = flatten(crop(shown, {slot.name: slot.shape for slot in small.slots}), small)
    assert again.tobytes() == vector.tobytes()


@given(rank=st.integers(2, RANK), left_out=st.sampled_from([(), ("v_proj",)]), sent=SENT)
def test_participation_says_which_rows_may_be_other_than_zero(
    rank: int, left_out: tuple[str, ...], sent: tuple[Factor, ...]
) -> None:
    lora = make_lora(sent=sent)
    own = own_lora(lora, rank=rank, left_out=left_out)
    small, whole = layout_of(own), layout_of(lora)
    padded = pad(np.ones(small.n_values, np.float32), small, whole)
    said = participation(small, whole).reshape(-1, RANK)
    for slot, where in whole.slices():
        rows = by_row(padded[where], slot)
        np.testing.assert_array_equal(
            rows,
            np.broadcast_to(said[modules_of(whole)[module_of(slot.name)]][:, None], rows.shape),
        )
        assert rank_of(slot) == RANK


@pytest.mark.parametrize("rank", [2, 3, 5, 8])
def test_an_agent_of_any_rank_trains_with_the_federations_scale(rank: int) -> None:
    lora = make_lora()
    own = own_lora(lora, rank=rank, left_out=("v_proj",))
    assert own.scale == pytest.approx(lora.scale, rel=1e-15)
    assert own.target_modules == ("q_proj",)
    assert not own.is_mixed


def test_of_the_whole_adapter_an_agent_takes_its_first_rows() -> None:
    lora = make_lora()
    arrays = initial_adapter(BASE, lora)
    own = own_lora(lora, rank=3, left_out=("v_proj",))
    mine = crop(arrays, adapter_shapes(BASE, own))
    assert all("q_proj" in name for name in mine)
    for name, array in mine.items():
        whole = arrays[name]
        expected = whole[:3] if factor_of(name) is Factor.A else whole[:, :3]
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("changes", "rank", "left_out", "words"),
    [
        ({}, 1, (), "rank 1: this federation allows 2 to 8"),
        ({}, 9, (), "rank 9: this federation allows 2 to 8"),
        ({"min_rank": None}, 4, (), "rank 4: this federation allows 8"),
        (
            {},
            None,
            ("q_proj",),
            "'q_proj' cannot be left out; of this federation's modules: v_proj",
        ),
        ({"optional_modules": ()}, None, ("v_proj",), "modules: none"),
    ],
)
def test_what_the_manifest_does_not_allow_is_refused(changes, rank, left_out, words) -> None:
    with pytest.raises(AdapterError, match=words):
        own_lora(make_lora(**changes), rank=rank, left_out=left_out)


def test_parts_that_do_not_fit_are_refused() -> None:
    wide, small = layout_of(make_lora()), layout_of(own_lora(make_lora(), rank=2, left_out=()))
    with pytest.raises(AdapterError, match="does not fit"):
        pad(np.zeros(wide.n_values, np.float32), wide, small)
    with pytest.raises(AdapterError, match="does not fit"):
        participation(wide, small)
    with pytest.raises(AdapterError, match="the layout has"):
        pad(np.zeros(3, np.float32), small, wide)
    name = tensor_name("layers.0.q_proj", Factor.A)
    for shape in ((9, 6), (2, 7)):
        with pytest.raises(AdapterError, match="cannot take"):
            crop(initial_adapter(BASE, make_lora()), {name: shape})
    with pytest.raises(AdapterError, match="cannot take"):
        crop({}, {name: (2, 6)})

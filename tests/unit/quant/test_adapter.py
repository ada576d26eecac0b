"""PEFT folder, named arrays, one vector: the same numbers in three forms."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from protocol.base_description import BaseDescription, LinearModule
from protocol.blocks import BaseBlock, Factor, LoraBlock
from protocol.errors import ManifestError
from quant.adapter import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterArrays,
    adapter_shapes,
    factor_of,
    flatten,
    from_safetensors,
    initial_adapter,
    peft_config,
    read_folder,
    sent_layout,
    tensor_name,
    to_safetensors,
    unflatten,
    vector_from_bytes,
    vector_to_bytes,
    write_folder,
)
from quant.base_model import LoadedBase, load_base
from quant.errors import AdapterError
from quant.lora import AdaptedModel

MODULES = {"m.0.q_proj": (6, 4), "m.0.v_proj": (2, 4), "m.1.q_proj": (6, 4)}
BOTH = (Factor.A, Factor.B)


def make_base(modules: dict[str, tuple[int, int]] | None = None) -> BaseDescription:
    return BaseDescription(
        base=BaseBlock(
            model="m", source_dtype="float32", fingerprint=bytes(32), tokenizer_digest=bytes(32)
        ),
        architecture="LlamaForCausalLM",
        n_parameters=1,
        max_positions=512,
        has_chat_template=False,
        linear_modules=tuple(
            LinearModule(name=name, d_out=d_out, d_in=d_in)
            for name, (d_out, d_in) in (modules or MODULES).items()
        ),
    )


def make_lora(**changes: object) -> LoraBlock:
    values: dict[str, object] = {
        "rank": 3,
        "alpha": 6.0,
        "target_modules": ("q_proj", "v_proj"),
        "init_seed": 7,
    }
    return LoraBlock(**{**values, **changes})  # type: ignore[arg-type]


def make_arrays() -> AdapterArrays:
    rng = np.random.default_rng(0)
    shapes = adapter_shapes(make_base(), make_lora())
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


# Names, shapes, layouts


def test_a_is_rank_by_inputs_and_b_outputs_by_rank() -> None:
    shapes = adapter_shapes(make_base(), make_lora())
    assert shapes["base_model.model.m.0.q_proj.lora_A.weight"] == (3, 4)
    assert shapes["base_model.model.m.0.q_proj.lora_B.weight"] == (6, 3)
    assert len(shapes) == 2 * len(MODULES)
    with pytest.raises(ManifestError, match="k_proj"):
        adapter_shapes(make_base(), make_lora(target_modules=("k_proj",)))


def test_a_factor_is_told_by_its_whole_name() -> None:
    for factor in Factor:
        assert factor_of(tensor_name("m.0.q_proj", factor)) is factor
    for name in (
        "m.0.q_proj.lora_A.weight",
        "base_model.model.m.0.q_proj.weight",
        "base_model.model.m.0.q_proj.lora_A.bias",
        "base_model.model.m.0.q_proj.lora_a.weight",
        "",
    ):
        with pytest.raises(AdapterError, match="not the name of a LoRA factor"):
            factor_of(name)


@pytest.mark.parametrize(("sent", "n_tensors"), [(BOTH, 6), ((Factor.B,), 3)])
def test_the_layout_holds_the_factors_that_are_sent(
    sent: tuple[Factor, ...], n_tensors: int
) -> None:
    shapes = adapter_shapes(make_base(), make_lora())
    layout = sent_layout(shapes, sent)
    assert len(layout) == n_tensors
    assert {factor_of(slot.name) for slot in layout.slots} == set(sent)
    assert {slot.name: slot.shape for slot in layout.slots}.items() <= shapes.items()
    with pytest.raises(AdapterError):
        sent_layout({**shapes, "alpha": (1,)}, sent)


# Release 0


def test_guarantee_1_equal_seeds_give_equal_bytes() -> None:
    one = initial_adapter(make_base(), make_lora())
    again = initial_adapter(make_base(), make_lora())
    assert to_safetensors(one) == to_safetensors(again)
    other = initial_adapter(make_base(), make_lora(init_seed=8))
    for name, array in one.items():
        assert (other[name] == array).all() == (factor_of(name) is Factor.B)


def test_guarantee_1_the_bytes_are_those_of_every_other_machine() -> None:
    """By hand: PCG64 seeded with the seed and the name's bytes, 53 bits a number."""
    name = "base_model.model.m.0.q_proj.lora_A.weight"
    bits = np.random.PCG64(np.random.SeedSequence([7, *name.encode()])).random_raw(12)
    expected = [
        np.float32((2.0 * ((int(word) >> 11) * 2.0**-53) - 1.0) * 0.5)  # 1/√4
        for word in bits
    ]
    assert initial_adapter(make_base(), make_lora())[name].reshape(-1).tolist() == expected


def test_guarantee_1_another_module_leaves_the_others_as_they_were() -> None:
    few = initial_adapter(make_base(), make_lora(target_modules=("q_proj",)))
    many = initial_adapter(make_base(), make_lora())
    for name, array in few.items():
        np.testing.assert_array_equal(many[name], array)
    first, second = (many[tensor_name(f"m.{i}.q_proj", Factor.A)] for i in (0, 1))
    assert (first != second).any()


def test_guarantee_2_every_b_is_zero_and_no_a_is() -> None:
    wide = make_base({"m.0.q_proj": (8, 400)})
    arrays = initial_adapter(wide, make_lora(rank=64, target_modules=("q_proj",)))
    a, b = (arrays[tensor_name("m.0.q_proj", factor)] for factor in Factor)
    assert not b.any()
    bound = 1.0 / np.sqrt(400)
    assert np.abs(a).max() <= bound
    assert np.abs(a).max() > 0.99 * bound
    assert abs(a.mean()) < 0.02 * bound
    assert np.std(a) == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert a.dtype == b.dtype == np.float32


# Vector


def test_a_vector_holds_the_tensors_in_the_layouts_order() -> None:
    arrays = make_arrays()
    layout = sent_layout({name: array.shape for name, array in arrays.items()}, BOTH)
    vector = flatten(arrays, layout)
    expected = np.concatenate([arrays[name].reshape(-1) for name in sorted(arrays)])
    np.testing.assert_array_equal(vector, expected)
    back = unflatten(vector, layout)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


def test_what_was_unflattened_does_not_follow_the_vector() -> None:
    layout = sent_layout({tensor_name("m", Factor.B): (2, 2)}, BOTH)
    vector = np.ones(4, np.float32)
    arrays = unflatten(vector, layout)
    vector[:] = 0.0
    assert arrays[tensor_name("m", Factor.B)].all()


def test_only_what_is_sent_is_in_the_vector() -> None:
    arrays = make_arrays()
    layout = sent_layout({name: array.shape for name, array in arrays.items()}, (Factor.B,))
    vector = flatten(arrays, layout)
    assert vector.size == sum(a.size for name, a in arrays.items() if factor_of(name) is Factor.B)


def test_a_tensor_that_does_not_fit_the_layout_is_refused() -> None:
    arrays = make_arrays()
    layout = sent_layout({name: array.shape for name, array in arrays.items()}, BOTH)
    name = next(iter(arrays))
    for bad in (arrays[name].T, arrays[name].astype(np.float64), arrays[name].reshape(-1)):
        with pytest.raises(AdapterError, match="expected float32"):
            flatten({**arrays, name: bad}, layout)
    with pytest.raises(AdapterError, match="is missing"):
        flatten({key: array for key, array in arrays.items() if key != name}, layout)
    for vector in (
        np.zeros(layout.n_values + 1, np.float32),
        np.zeros(layout.n_values, np.float64),
        np.zeros((layout.n_values, 1), np.float32),
    ):
        with pytest.raises(AdapterError, match="expected float32"):
            unflatten(vector, layout)


def test_the_bytes_of_a_vector_are_little_endian_float32() -> None:
    layout = sent_layout({tensor_name("m", Factor.B): (2, 2)}, BOTH)
    values = [1.0, -2.5, 3.0e-39, float(np.float32(1e38))]
    data = vector_to_bytes(np.array(values, np.float32))
    assert data == struct.pack("<4f", *values)
    assert data == vector_to_bytes(np.array(values, ">f4"))
    for kind in (bytes, bytearray, memoryview):
        assert vector_from_bytes(kind(data), layout).tolist() == np.float32(values).tolist()
    for bad in (data[:-1], data + b"\0", b""):
        with pytest.raises(AdapterError, match="the layout has 16"):
            vector_from_bytes(bad, layout)


# Safetensors


def test_equal_arrays_give_equal_files_whatever_their_order_and_strides() -> None:
    arrays = make_arrays()
    reversed_order = {name: arrays[name] for name in reversed(arrays)}
    strided = {name: np.asfortranarray(array) for name, array in arrays.items()}
    assert to_safetensors(reversed_order) == to_safetensors(arrays) == to_safetensors(strided)


def test_a_file_gives_its_arrays_back() -> None:
    arrays = make_arrays()
    shapes = {name: array.shape for name, array in arrays.items()}
    back = from_safetensors(to_safetensors(arrays), shapes)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


def changed(name: str, value: np.ndarray) -> bytes:
    return safetensors.numpy.save({**make_arrays(), name: value})


def first_name() -> str:
    return min(make_arrays())


def spoiled(value: float) -> bytes:
    array = make_arrays()[first_name()].copy()
    array.flat[-1] = value
    return changed(first_name(), array)


def by_hand(dtype: str, n_bytes: int, *, shape: tuple[int, ...] = (2, 2)) -> bytes:
    header = {first_name(): {"dtype": dtype, "shape": shape, "data_offsets": [0, n_bytes]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(n_bytes)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: changed("extra", np.zeros(1, np.float32)), "unexpected tensor 'extra'"),
        (lambda: safetensors.numpy.save({}), "is missing"),
        (lambda: changed(first_name(), np.zeros((3, 4))), "expected float32"),
        (lambda: changed(first_name(), np.zeros((3, 4), np.float16)), "expected float32"),
        (lambda: changed(first_name(), np.zeros((3, 4), np.int32)), "expected float32"),
        (lambda: changed(first_name(), np.zeros((4, 3), np.float32)), "expected float32"),
        (lambda: changed(first_name(), np.zeros((12,), np.float32)), "expected float32"),
        (lambda: spoiled(np.nan), "not finite"),
        (lambda: spoiled(np.inf), "not finite"),
        (lambda: spoiled(-np.inf), "not finite"),
        (lambda: to_safetensors(make_arrays())[:-1], "not a safetensors file"),
        (lambda: to_safetensors(make_arrays())[:40], "not a safetensors file"),
        (lambda: to_safetensors(make_arrays()) + b"x", "not a safetensors file"),
        (lambda: b"", "not a safetensors file"),
        (lambda: b"\xff" * 100, "not a safetensors file"),
        (lambda: b"\x80\x04K\x01.", "not a safetensors file"),  # a pickle
        (lambda: by_hand("BF16", 8), "not a safetensors file|expected float32"),
        (lambda: by_hand("F8_E4M3", 4), "not a safetensors file|expected float32"),
        (lambda: by_hand("F4", 2), "not a safetensors file|expected float32"),
        (lambda: by_hand("F99", 8), "not a safetensors file"),
        (lambda: by_hand("F32", 8), "not a safetensors file"),
        (lambda: by_hand("F32", 16, shape=(2**40, 2**40)), "not a safetensors file"),
        (lambda: by_hand("F32", 0, shape=(0, 4)), "expected float32"),
    ],
)
def test_a_bad_file_is_refused(make, says: str) -> None:
    shapes = {name: array.shape for name, array in make_arrays().items()}
    with pytest.raises(AdapterError, match=says):
        from_safetensors(make(), shapes)


# Folder


@pytest.fixture
def released(random_base: LoadedBase, tmp_path: Path) -> tuple[AdaptedModel, Path]:
    """An adapter whose B is not zero, at work and as a folder."""
    lora = make_lora(target_modules=("q_proj", "down_proj"), rank=4)
    rng = np.random.default_rng(1)
    arrays = {
        name: array if array.any() else rng.normal(0, 0.05, array.shape).astype(np.float32)
        for name, array in initial_adapter(random_base.description, lora).items()
    }
    adapted = AdaptedModel(random_base, lora)
    adapted.load(arrays)
    folder = tmp_path / "deep" / "folder"
    write_folder(
        folder,
        weights=to_safetensors(arrays),
        config=peft_config(random_base.description.base, lora),
        card="# card\n",
    )
    return adapted, folder


def test_a_folder_loads_in_stock_peft_and_gives_the_same_logits(
    released: tuple[AdaptedModel, Path], random_base_dir: Path
) -> None:
    from peft import PeftModel

    adapted, folder = released
    stock = PeftModel.from_pretrained(load_base(random_base_dir).model, folder)
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.inference_mode():
        adapted.model.eval()
        ours, theirs = adapted.model(input_ids=ids).logits, stock.eval()(input_ids=ids).logits
        with adapted.disabled():
            bare = adapted.model(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert float((ours - bare).abs().max()) > 0.01  # the adapter does something


def test_a_folder_is_read_back(released: tuple[AdaptedModel, Path]) -> None:
    adapted, folder = released
    assert {path.name for path in folder.iterdir()} == {WEIGHTS_NAME, CONFIG_NAME, CARD_NAME}
    for name, array in adapted.arrays().items():
        np.testing.assert_array_equal(read_folder(folder)[name], array)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot read"):
        read_folder(tmp_path)
    for data in (b"junk", by_hand("BF16", 8)):
        (tmp_path / WEIGHTS_NAME).write_bytes(data)
        with pytest.raises(AdapterError):
            read_folder(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(safetensors.numpy.save({"w": np.zeros(1, np.float32)}))
    with pytest.raises(AdapterError, match="not the name of a LoRA factor"):
        read_folder(tmp_path)


def test_the_configuration_is_what_peft_writes_for_the_same_adapter() -> None:
    from peft import LoraConfig

    base = make_base().base.model_copy(update={"revision": "abc"})
    ours = json.loads(peft_config(base, make_lora(dropout=0.25)))
    theirs = LoraConfig(
        r=3,
        lora_alpha=6.0,
        lora_dropout=0.25,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        base_model_name_or_path="m",
        revision="abc",
        inference_mode=True,
    ).to_dict()
    for key, value in ours.items():
        wanted = sorted(theirs[key]) if key == "target_modules" else theirs[key]
        assert value == wanted, key

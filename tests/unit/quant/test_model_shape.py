"""Shapes read from configurations, and those that are refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quant.errors import BaseModelError
from quant.model_shape import FloatType, LoraShape, Norm, read_shape, read_shape_file


def make_config(**changes: Any) -> dict[str, Any]:
    values = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "torch_dtype": "float16",
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not ...}


def test_llama_2_7b_has_6738415616_parameters() -> None:
    shape = read_shape(make_config(), name="7B")
    assert shape.n_parameters == 6_738_415_616
    assert (shape.n_kv_heads, shape.head_dim, shape.tied) == (32, 128, False)
    assert shape.stored is FloatType.FLOAT16
    assert LoraShape(rank=8, modules=frozenset(shape.linears)).n_parameters(shape) == 19_988_480


def test_weights_of_7b_take_half_a_byte_and_its_scales() -> None:
    shape = read_shape(make_config(), name="7B")
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    expected = 0.51587 * linear + 2 * (2 * 32000 * 4096 + 65 * 4096)
    assert shape.weight_bytes(FloatType.BFLOAT16) == pytest.approx(expected, rel=1e-5)


def test_what_a_configuration_leaves_out_is_its_class_default() -> None:
    qwen = read_shape(make_config(model_type="qwen3", num_key_value_heads=8), name="x")
    assert (qwen.head_dim, qwen.n_kv_heads, qwen.norms_heads) == (128, 8, True)
    gemma = read_shape(make_config(model_type="gemma"), name="x")
    assert (gemma.norm, gemma.tied, gemma.head_dim) == (Norm.GEMMA, True, 256)
    assert read_shape(make_config(model_type="mistral"), name="x").n_kv_heads == 8
    assert read_shape(make_config(dtype="bfloat16"), name="x").stored is FloatType.BFLOAT16
    assert read_shape(make_config(torch_dtype="float8"), name="x").stored is None


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "bert", "gpt2", "gemma2", None, 7])
def test_a_model_of_another_class_is_refused_in_one_sentence(model_type: object) -> None:
    with pytest.raises(
        BaseModelError, match="memory cannot be predicted for 'some/model'"
    ) as error:
        read_shape(make_config(model_type=model_type), name="some/model")
    assert repr(model_type) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", ...),
        ("hidden_size", 0),
        ("vocab_size", "many"),
        ("num_hidden_layers", True),
        ("num_attention_heads", -4),
        ("intermediate_size", 1.5),
    ],
)
def test_a_size_that_is_none_is_named(key: str, value: object) -> None:
    with pytest.raises(BaseModelError, match=key):
        read_shape(make_config(**{key: value}), name="x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot read"),
        ("[]", "no JSON object"),
        (json.dumps(make_config(quantization_config={"quant_method": "gptq"})), "quantised"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(BaseModelError, match=said):
        read_shape_file(path, name="x")
    with pytest.raises(BaseModelError, match="cannot read"):
        read_shape_file(tmp_path / "none.json", name="x")


def test_an_adapter_on_a_module_of_another_class_is_refused() -> None:
    shape = read_shape(make_config(), name="x")
    with pytest.raises(BaseModelError, match="'c_attn'"):
        LoraShape(rank=8, modules=frozenset({"q_proj", "c_attn"})).n_parameters(shape)


def test_prediction_needs_no_torch() -> None:
    code = (
        "import sys; import quant.fitting, quant.memory, edge_agent.plan; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**12),
        ("num_hidden_layers", 1001),
        ("hidden_size", 10**400),
        ("vocab_size", 2**24 + 1),
        ("max_position_embeddings", 2**31 + 1),
    ],
    ids=["layers", "one-layer-more", "hidden", "vocabulary", "positions"],
)
def test_an_absurd_size_is_refused_at_once(key: str, value: int) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 100,
    }
    assert read_shape(config, name="x").n_layers == 2
    with pytest.raises(BaseModelError, match=f"from 1 to .* for '{key}'"):
        read_shape({**config, key: value}, name="x")


def test_a_configuration_nested_too_deep_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(BaseModelError, match="cannot read the configuration"):
        read_shape_file(path, name="x")

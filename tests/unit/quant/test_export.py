"""Merging into the base, and GGUF LoRA files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.gguf_reader import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PretrainedConfig

from protocol.wire import parse
from quant import export
from quant.base_model import LoadedBase, linear_modules, load_base
from quant.errors import AdapterError, BaseModelError, ExportError
from quant.export import (
    PROVENANCE_KEY,
    base_config,
    gguf_tensors,
    logit_error,
    merge,
    merged_weight,
    read_gguf,
    rotary_rows,
    write_gguf,
)
from quant.model_card import Provenance
from quant.peft_folder import FinishedAdapter, attach, read_finished

PROMPTS = [list(range(3, 40)), [5, 9, 200, 7], list(range(300, 250, -1))]


@pytest.fixture
def adapter(random_base: LoadedBase, make_adapter_folder, tmp_path: Path) -> FinishedAdapter:
    return read_finished(make_adapter_folder(tmp_path / "adapter", random_base.description))


@pytest.fixture
def config(random_base_dir: Path) -> PretrainedConfig:
    return base_config(random_base_dir)


# Merging


def test_a_merged_weight_is_the_base_and_the_scaled_product() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 5)).astype(np.float32)
    a, b = rng.normal(size=(2, 5)).astype(np.float32), rng.normal(size=(6, 2)).astype(np.float32)
    merged = merged_weight(torch.from_numpy(weight), a, b, 1.5)
    np.testing.assert_allclose(merged.numpy(), weight + 1.5 * (b @ a), rtol=1e-5)


def test_a_merged_model_loads_in_stock_transformers_and_answers_as_base_and_adapter(
    random_base: LoadedBase, adapter: FinishedAdapter, config, tmp_path: Path
) -> None:
    folder = tmp_path / "merged"
    merge(random_base, adapter, config, folder)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert stock.dtype is torch.float16
    assert not hasattr(stock.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Anna lives")["input_ids"] == random_base.tokenizer("Anna lives")["input_ids"]
    adapted = attach(random_base, adapter)
    error = logit_error(adapted, folder, PROMPTS)
    assert 0.0 < error < 5e-4  # TRAINING, trap 10
    # By hand, with stock transformers in float32.
    stock = stock.float().eval()
    by_hand = 0.0
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            wanted = adapted.model(input_ids=ids).logits
            apart = (stock(input_ids=ids).logits - wanted).abs().max() / wanted.abs().max()
            by_hand = max(by_hand, float(apart))
    assert error == pytest.approx(by_hand, rel=0.01)


def test_the_dequantised_weight_is_not_rounded_to_the_checkpoints_dtype(
    random_base: LoadedBase,
) -> None:
    _, module = next(linear_modules(random_base.model))
    x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = module(x)
    state = module.weight.quant_state
    state.dtype = torch.bfloat16  # as bitsandbytes leaves it for a bfloat16 checkpoint
    merged = export._dequantized(module)
    torch.testing.assert_close(torch.nn.functional.linear(x, merged), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(merged, merged.bfloat16().float())
    assert state.dtype is torch.bfloat16  # left as it was


def test_the_error_shows_a_model_that_was_merged_otherwise(
    random_base: LoadedBase, random_base_dir: Path, adapter: FinishedAdapter, config, tmp_path: Path
) -> None:
    """Into the original 16-bit weights (TRAINING, trap 10), and not at all."""
    from peft import PeftModel

    adapted = attach(load_base(random_base_dir, device=torch.device("cpu")), adapter)
    original = AutoModelForCausalLM.from_pretrained(random_base_dir, dtype=torch.float32)
    original.save_pretrained(tmp_path / "bare")
    wrong = PeftModel.from_pretrained(original, adapter.folder).merge_and_unload()
    wrong.to(torch.float16).save_pretrained(tmp_path / "wrong")
    assert logit_error(adapted, tmp_path / "wrong", PROMPTS) > 0.02
    assert logit_error(adapted, tmp_path / "bare", PROMPTS) > 0.05


def test_tied_embeddings_stay_tied(
    random_base_dir: Path, make_adapter_folder, tmp_path: Path
) -> None:
    tied = AutoModelForCausalLM.from_pretrained(random_base_dir, dtype=torch.bfloat16)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(random_base_dir).save_pretrained(tmp_path / "tied")
    base = load_base(tmp_path / "tied", device=torch.device("cpu"))
    adapter = read_finished(make_adapter_folder(tmp_path / "adapter", base.description))
    merge(base, adapter, base_config(tmp_path / "tied"), tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert stock.lm_head.weight.data_ptr() == stock.model.embed_tokens.weight.data_ptr()
    assert logit_error(attach(base, adapter), tmp_path / "merged", PROMPTS) < 5e-4


def test_a_base_that_contradicts_itself_about_generation_is_merged_all_the_same(
    random_base: LoadedBase, adapter: FinishedAdapter, config, tmp_path: Path
) -> None:
    random_base.model.generation_config.temperature = 0.9  # with do_sample off, as Llama 2 has it
    merge(random_base, adapter, config, tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_weights_beyond_float16_are_refused(
    random_base: LoadedBase, adapter: FinishedAdapter, config, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.q_proj"
    adapter.arrays[f"base_model.model.{name}.lora_B.weight"][:] = 1e9
    with pytest.raises(ExportError, match=f"{name}.weight has values beyond float16"):
        merge(random_base, adapter, config, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_refuses_an_adapter_of_another_base(
    random_base: LoadedBase, make_adapter_folder, config, tmp_path: Path
) -> None:
    other = load_base("embedded:tiny", device=torch.device("cpu"))
    adapter = read_finished(make_adapter_folder(tmp_path / "other", other.description))
    with pytest.raises(AdapterError, match="another base"):
        merge(random_base, adapter, config, tmp_path / "merged")


def test_layers_that_are_not_plain_are_refused(
    random_base: LoadedBase, adapter: FinishedAdapter, config, tmp_path: Path, monkeypatch
) -> None:
    class OtherLinear(torch.nn.Linear):
        pass

    build = AutoModelForCausalLM.from_config

    def from_config(*args, **kwargs):
        model = build(*args, **kwargs)
        model.model.layers[0].mlp.up_proj.__class__ = OtherLinear
        return model

    monkeypatch.setattr(export.AutoModelForCausalLM, "from_config", from_config)
    with pytest.raises(ExportError, match=r"mlp\.up_proj is no plain linear layer"):
        merge(random_base, adapter, config, tmp_path / "merged")


def test_a_comparison_needs_prompts(
    random_base: LoadedBase, adapter: FinishedAdapter, config, tmp_path: Path
) -> None:
    merge(random_base, adapter, config, tmp_path / "merged")
    with pytest.raises(ExportError, match="0 prompts"):
        logit_error(attach(random_base, adapter), tmp_path / "merged", [])


def test_a_base_without_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="cannot read the configuration of the base"):
        base_config(tmp_path / "nowhere")
    assert base_config("embedded:tiny").num_hidden_layers == 4


# GGUF


@pytest.mark.parametrize(
    "config",
    [
        '{"model_type": "llama", "num_hidden_layers": "x"}',
        '{"model_type": ["llama"]}',
        '{"model_type": "llama", "rope_scaling": 5}',
        "[" * 100_000,
    ],
    ids=["a-size-that-is-text", "a-type-that-is-a-list", "rope", "nested"],
)
def test_a_configuration_of_nonsense_is_one_sentence(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(BaseModelError, match="cannot read the configuration of the base") as raised:
        base_config(tmp_path)
    assert "\n" not in str(raised.value)


def test_rotary_rows_pair_a_dimension_with_the_one_half_a_head_on() -> None:
    assert rotary_rows(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert sorted(rotary_rows(64, 4)) == list(range(64))
    for n_rows, n_heads in ((6, 4), (6, 2), (0, 1)):
        with pytest.raises(ExportError, match="heads of even size"):
            rotary_rows(n_rows, n_heads)


def test_permuted_rows_under_llama_cpps_rotation_give_transformers_scores() -> None:
    """q·k of each head at several distances: halves rotated here, neighbours there."""
    n_heads, size, d_in = 3, 8, 5
    rng = np.random.default_rng(0)
    w_q, w_k = rng.normal(size=(2, n_heads * size, d_in))
    x_q, x_k = rng.normal(size=(2, d_in))
    rows = rotary_rows(n_heads * size, n_heads)
    frequencies = 10_000.0 ** (-np.arange(0, size, 2) / size)

    def halves(heads: np.ndarray, position: int) -> np.ndarray:
        first, second = heads[:, : size // 2], heads[:, size // 2 :]
        cos, sin = np.cos(position * frequencies), np.sin(position * frequencies)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)

    def neighbours(heads: np.ndarray, position: int) -> np.ndarray:
        turned = (heads[:, ::2] + 1j * heads[:, 1::2]) * np.exp(1j * position * frequencies)
        return np.stack([turned.real, turned.imag], axis=2).reshape(heads.shape)

    for position in (0, 1, 17):
        ours = halves((w_q @ x_q).reshape(n_heads, size), 20) * halves(
            (w_k @ x_k).reshape(n_heads, size), position
        )
        theirs = neighbours((w_q[rows] @ x_q).reshape(n_heads, size), 20) * neighbours(
            (w_k[rows] @ x_k).reshape(n_heads, size), position
        )
        np.testing.assert_allclose(ours.sum(1), theirs.sum(1), rtol=1e-9)


def test_a_gguf_file_holds_every_factor_where_llama_cpp_looks_for_it(
    adapter: FinishedAdapter, config, tmp_path: Path
) -> None:
    path = tmp_path / "adapter.gguf"
    assert write_gguf(path, adapter, config) == len(adapter.arrays) // 2
    assert [entry.name for entry in tmp_path.iterdir() if "gguf" in entry.name] == [path.name]
    metadata, tensors = read_gguf(path)
    wanted = gguf_tensors(adapter, config)
    assert (
        set(tensors)
        == set(wanted)
        == {
            f"blk.{layer}.{name}.weight.lora_{factor}"
            for layer in (0, 1)
            for name in ("attn_q", "attn_k", "attn_v", "ffn_down")
            for factor in "ab"
        }
    )
    for name, array in wanted.items():
        np.testing.assert_array_equal(tensors[name], array)
    assert metadata["general.architecture"] == "llama"
    assert metadata["general.type"] == "adapter"
    assert metadata["adapter.type"] == "lora"
    assert metadata["adapter.lora.alpha"] == 8.0
    assert metadata["general.file_type"] == 0
    assert metadata["general.base_model.0.name"] == adapter.base_model
    assert parse(Provenance, metadata[PROVENANCE_KEY]) == adapter.provenance


def test_the_file_has_the_shapes_that_llama_cpps_loader_asks_for(
    adapter: FinishedAdapter, config, tmp_path: Path
) -> None:
    """ne[0] of A is the layer's input, ne[1] of B its output, and ne[1] of A is ne[0] of B."""
    write_gguf(tmp_path / "adapter.gguf", adapter, config)
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "adapter.gguf").tensors}
    a, b = (found[f"blk.1.attn_k.weight.lora_{factor}"] for factor in "ab")
    assert a.tensor_type == b.tensor_type == GGMLQuantizationType.F32
    assert a.shape.tolist() == [64, 4]
    assert b.shape.tolist() == [4, 32]


def test_the_deltas_of_a_file_are_the_adapters_in_llama_cpps_row_order(
    adapter: FinishedAdapter, config, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "adapter.gguf", adapter, config)
    metadata, tensors = read_gguf(tmp_path / "adapter.gguf")
    heads = {"attn_q": 4, "attn_k": 2}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj"}
    names |= {"attn_v": "self_attn.v_proj", "ffn_down": "mlp.down_proj"}
    for short, long in names.items():
        a, b = (tensors[f"blk.0.{short}.weight.lora_{factor}"] for factor in "ab")
        scale = metadata["adapter.lora.alpha"] / b.shape[1]  # as llama.cpp computes it
        own_a, own_b = adapter.pairs()[f"model.layers.0.{long}"]
        wanted = 2.0 * own_b @ own_a
        if short in heads:
            wanted = wanted[rotary_rows(len(wanted), heads[short])]
        np.testing.assert_allclose(scale * b @ a, wanted, rtol=1e-6, atol=1e-7)


def test_rank_stabilised_adapters_keep_their_scale(
    random_base: LoadedBase, make_adapter_folder, config, tmp_path: Path
) -> None:
    folder = make_adapter_folder(
        tmp_path / "a", random_base.description, foreign=True, config={"use_rslora": True}
    )
    write_gguf(tmp_path / "a.gguf", read_finished(folder), config)
    metadata, _ = read_gguf(tmp_path / "a.gguf")
    assert metadata["adapter.lora.alpha"] / 4 == 8 / 4**0.5
    assert PROVENANCE_KEY not in metadata


@pytest.mark.parametrize(
    ("architecture", "arch", "permuted"),
    [
        ("LlamaForCausalLM", "llama", True),
        ("MistralForCausalLM", "llama", True),
        ("Qwen2ForCausalLM", "qwen2", False),
        ("Qwen3ForCausalLM", "qwen3", False),
    ],
)
def test_rows_are_permuted_where_llama_cpps_converter_permutes_them(
    adapter: FinishedAdapter, config, tmp_path: Path, architecture: str, arch: str, permuted: bool
) -> None:
    config.architectures = [architecture]
    write_gguf(tmp_path / "a.gguf", adapter, config)
    metadata, tensors = read_gguf(tmp_path / "a.gguf")
    assert metadata["general.architecture"] == arch
    _, b = adapter.pairs()["model.layers.0.self_attn.q_proj"]
    same = np.array_equal(tensors["blk.0.attn_q.weight.lora_b"], b)
    assert same is not permuted


@pytest.mark.parametrize("architectures", [["GPT2LMHeadModel"], None])
def test_unknown_architectures_are_refused_in_one_sentence(
    adapter: FinishedAdapter, config, tmp_path: Path, architectures
) -> None:
    config.architectures = architectures
    with pytest.raises(ExportError, match=r"no GGUF file is written for .*; known: Llama"):
        write_gguf(tmp_path / "a.gguf", adapter, config)
    assert not list(tmp_path.glob("*gguf*"))


def test_a_base_of_absurd_depth_is_refused_at_once(adapter: FinishedAdapter, config) -> None:
    config.num_hidden_layers = 10**9
    with pytest.raises(ExportError, match="a base of 1000000000 layers"):
        gguf_tensors(adapter, config)


def test_layers_that_gguf_has_no_place_for_are_refused(
    adapter: FinishedAdapter, tmp_path: Path
) -> None:
    shallow = LlamaConfig(
        architectures=["LlamaForCausalLM"], num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(ExportError, match=r"no place for the layer model\.layers\.1\."):
        write_gguf(tmp_path / "a.gguf", adapter, shallow)


def test_a_file_that_does_not_read_back_leaves_the_one_before(
    adapter: FinishedAdapter, config, tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"before")
    broken = {name: array + 1 for name, array in gguf_tensors(adapter, config).items()}
    monkeypatch.setattr(export, "read_gguf", lambda _: ({}, broken))
    with pytest.raises(ExportError, match="does not read back"):
        write_gguf(path, adapter, config)
    assert path.read_bytes() == b"before"
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"junk" * 100)
    for path in (tmp_path / "x", tmp_path / "nowhere"):
        with pytest.raises(ExportError, match="as GGUF"):
            read_gguf(path)

"""A finished adapter for other programs: merged into its base, or as a GGUF LoRA file.

**Merging** adds `s · B · A` to the *dequantised* base, in float32, and stores float16. The adapter
was trained against the dequantised weights; added to the original 16-bit ones, or quantised to 4
bit again, it would correct errors that are not there and miss those that are (TRAINING, trap 10).

**GGUF** is llama.cpp's format. Its LoRA files hold the two factors of each layer under the names
and in the row order of llama.cpp's own graph. That order differs from transformers' for the queries
and keys of Llama: transformers rotates the first half of a head's dimensions against the second,
llama.cpp each even dimension against its odd neighbour. A permutation of the rows of B takes one to
the other; A, whose columns are inputs, stays as it is.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from gguf.constants import GGML_QUANT_VERSION, MODEL_ARCH, MODEL_ARCH_NAMES, GGUFType, Keys
from gguf.constants import LlamaFileType as FileType
from gguf.gguf_reader import GGUFReader
from gguf.gguf_writer import GGUFWriter
from gguf.tensor_mapping import get_tensor_name_map
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from quant.adapter import Float32Array
from quant.base_model import LoadedBase, linear_modules
from quant.errors import BaseModelError, ExportError
from quant.lora import AdaptedModel
from quant.peft_folder import FinishedAdapter, check_fits
from quant.tiny import EMBEDDED_NAME, tiny_base_path

PROVENANCE_KEY: Final = "sheepfold.provenance"
"""Where a GGUF file holds the text of `sheepfold.json`."""
_MOST_LAYERS: Final = 512  # LLAMA_MAX_LAYERS


@dataclass(frozen=True, kw_only=True)
class _GgufArchitecture:
    """How llama.cpp knows an architecture of transformers."""

    arch: MODEL_ARCH
    permutes_rotary: bool
    """Whether rows of queries and keys stand in another order there."""


# As llama.cpp's own converter has them (conversion/llama.py, conversion/qwen.py).
_GGUF: Final = {
    "LlamaForCausalLM": _GgufArchitecture(arch=MODEL_ARCH.LLAMA, permutes_rotary=True),
    "MistralForCausalLM": _GgufArchitecture(arch=MODEL_ARCH.LLAMA, permutes_rotary=True),
    "Qwen2ForCausalLM": _GgufArchitecture(arch=MODEL_ARCH.QWEN2, permutes_rotary=False),
    "Qwen3ForCausalLM": _GgufArchitecture(arch=MODEL_ARCH.QWEN3, permutes_rotary=False),
}


def base_config(source: str | Path, *, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a base; its weights are not looked at.

    Args:
        source: `"embedded:tiny"`, a hub id, or a folder.
        revision: Commit or tag of a hub model.

    Raises:
        BaseModelError: It cannot be read.
    """
    folder = tiny_base_path() if str(source) == EMBEDDED_NAME else Path(source).expanduser()
    path = str(folder) if folder.is_dir() else str(source)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # of several libraries, for whatever a configuration may hold
        reason = str(error).strip().partition("\n")[0]
        msg = f"cannot read the configuration of the base {path!r}: {reason}"
        raise BaseModelError(msg) from error
    return cast("PretrainedConfig", config)


# Merging


def merged_weight(
    base_weight: torch.Tensor, a: Float32Array, b: Float32Array, scale: float
) -> torch.Tensor:
    """`W + s · B · A` in float32.

    Args:
        base_weight: [d_out, d_in] float32.
        a: [rank, d_in].
        b: [d_out, rank].
        scale: s.

    Returns:
        [d_out, d_in] float32.
    """
    return torch.addmm(base_weight, torch.from_numpy(b), torch.from_numpy(a), alpha=scale)


def merge(
    base: LoadedBase, adapter: FinishedAdapter, config: PretrainedConfig, folder: Path
) -> None:
    """Write base and adapter as one ordinary float16 checkpoint with its tokenizer.

    Guarantees:
        1. Stock `AutoModelForCausalLM.from_pretrained(folder)` loads it; nothing in it is 4-bit.
        2. Its logits are those of the NF4 base with the adapter, but for rounding to float16.

    Args:
        base: On the CPU, without an adapter attached.
        adapter: Made for this base.
        config: The base's own, from `base_config`; changed.
        folder: Created; should be empty.

    Raises:
        AdapterError: The adapter is for another base.
        ExportError: The architecture is not made of plain linear layers, or a merged weight is too
            large for float16.
    """
    check_fits(adapter, base.description)
    with torch.device("meta"):
        merged = cast(
            "PreTrainedModel", AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        )
    merged.load_state_dict(_merged_state(base, adapter, merged), strict=True, assign=True)
    _take_generation_settings(base.model, merged)
    merged.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def _merged_state(
    base: LoadedBase, adapter: FinishedAdapter, merged: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """Every tensor of the merged model in float16, one layer dequantised at a time."""
    quantized = dict(linear_modules(base.model))
    pairs = adapter.pairs()
    # Both names of a tied weight: the checkpoint's format decides which one is stored.
    plain: dict[str, torch.Tensor] = dict(base.model.named_parameters(remove_duplicate=False))
    plain |= dict(base.model.named_buffers(remove_duplicate=False))
    state: dict[str, torch.Tensor] = {}
    for name in merged.state_dict():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in quantized:
            state[name] = _half(name, plain[name])
            continue
        if type(merged.get_submodule(module)) is not torch.nn.Linear:
            msg = (
                f"cannot merge into {type(merged).__name__}: its layer {module} is no plain linear "
                "layer; use the adapter without merging"
            )
            raise ExportError(msg)
        weight = _dequantized(quantized[module])
        if module in pairs:
            weight = merged_weight(weight, *pairs[module], adapter.scale)
        state[name] = _half(name, weight)
    return state


def _dequantized(module: Linear4bit) -> torch.Tensor:
    """The weight of a 4-bit layer, [d_out, d_in] float32, whatever dtype the base computes in.

    Rounded to bfloat16 first, the logits of the merged model move by 2e-3.
    """
    state = copy(module.weight.quant_state)  # type: ignore[attr-defined]  # bitsandbytes adds it
    state.dtype = torch.float32
    return dequantize_4bit(module.weight.data, state)


def _half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.detach().to("cpu", torch.float16)
    if not bool(torch.isfinite(half).all()):
        msg = f"{name} has values beyond float16 (65504); this model cannot be merged"
        raise ExportError(msg)
    return half


def _take_generation_settings(base: PreTrainedModel, merged: PreTrainedModel) -> None:
    own = base.generation_config
    try:
        own.validate(strict=True)
    except ValueError:  # some bases contradict themselves here, and transformers would not save it
        return
    merged.generation_config = own


def logit_error(
    adapted: AdaptedModel, merged_folder: Path, prompts: Sequence[Sequence[int]]
) -> float:
    """How far a merged model is from its base with the adapter.

    Both compute in float32, so what differs is what was stored.

    Args:
        adapted: The NF4 base with the adapter, on the CPU in float32, in evaluation mode.
        merged_folder: What `merge` wrote; it is loaded as anyone would.
        prompts: Token ids.

    Returns:
        The largest difference of a logit, divided by the largest logit; over all prompts the worst.

    Raises:
        ExportError: There is no prompt, or the logits are not finite.
    """
    with torch.inference_mode():
        wanted = [_logits(adapted.model, tokens) for tokens in prompts]
        merged = AutoModelForCausalLM.from_pretrained(
            merged_folder, dtype=torch.float16, use_safetensors=True, trust_remote_code=False
        )
        _compute_in_float32(merged.eval())
        errors = [
            float((_logits(merged, tokens) - reference).abs().max() / reference.abs().max())
            for tokens, reference in zip(prompts, wanted, strict=True)
        ]
    if not errors or not np.isfinite(errors).all():
        msg = f"cannot compare the merged model on {len(errors)} prompts: {errors}"
        raise ExportError(msg)
    return max(errors)


def _logits(model: torch.nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """[T, V] float32."""
    output = model(input_ids=torch.tensor([tokens]), use_cache=False)
    return cast("torch.Tensor", output.logits)[0].float()


def _compute_in_float32(model: torch.nn.Module) -> None:
    """Let a float16 model compute in float32, with one layer's weight in float32 at a time."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = partial(_linear_in_float32, module)  # type: ignore[method-assign]
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            # A new parameter: a tied output layer keeps its float16 weight.
            setattr(module, name, torch.nn.Parameter(parameter.float(), requires_grad=False))


def _linear_in_float32(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    bias: torch.Tensor | None = module.bias  # None without one, which torch's annotation omits
    bias = bias if bias is None else bias.float()
    return torch.nn.functional.linear(x, module.weight.float(), bias)


# GGUF


def rotary_rows(n_rows: int, n_heads: int) -> NDArray[np.intp]:
    """For each row of llama.cpp's queries or keys, the row of transformers' that it is.

    Args:
        n_rows: Of the projection: heads × head size.
        n_heads: Of queries, or of keys and values.

    Returns:
        [n_rows]: a permutation that pairs dimension i of a head with i + half of it.

    Raises:
        ExportError: The rows do not fall into heads of even size.
    """
    half, rest = divmod(n_rows, 2 * n_heads)
    if rest or not half:
        msg = f"{n_rows} rows do not fall into {n_heads} heads of even size"
        raise ExportError(msg)
    return np.arange(n_rows).reshape(n_heads, 2, half).swapaxes(1, 2).reshape(-1)


def gguf_tensors(adapter: FinishedAdapter, config: PretrainedConfig) -> dict[str, Float32Array]:
    """The adapter under llama.cpp's names and in its row order.

    Args:
        adapter: The adapter.
        config: Of its base.

    Returns:
        float32 by name: `blk.0.attn_q.weight.lora_a` [rank, d_in], `….lora_b` [d_out, rank].

    Raises:
        ExportError: llama.cpp's converter knows no such architecture or layer, or this module does
            not.
    """
    known = _architecture(config)
    n_layers = int(config.num_hidden_layers)
    if n_layers > _MOST_LAYERS:
        msg = f"a base of {n_layers} layers is none that llama.cpp reads (at most {_MOST_LAYERS})"
        raise ExportError(msg)
    names = get_tensor_name_map(known.arch, n_layers)
    n_heads = {"q_proj": config.num_attention_heads, "k_proj": _n_key_heads(config)}
    tensors: dict[str, Float32Array] = {}
    for module, (a, b) in sorted(adapter.pairs().items()):
        name = names.get_name(module + ".weight", try_suffixes=(".weight",))
        if name is None:
            msg = f"a GGUF file of {_class_name(config)} has no place for the layer {module}"
            raise ExportError(msg)
        heads = n_heads.get(module.rpartition(".")[2]) if known.permutes_rotary else None
        tensors[name + ".lora_a"] = a
        tensors[name + ".lora_b"] = b if heads is None else b[rotary_rows(len(b), heads)]
    return tensors


def write_gguf(path: Path, adapter: FinishedAdapter, config: PretrainedConfig) -> int:
    """Write the adapter as a GGUF LoRA file, and read it back.

    Guarantees:
        1. The file holds every tensor of `gguf_tensors` bit for bit, and what llama.cpp asks of an
           adapter: type, architecture, and the α that gives the adapter's scale.
        2. On an error there is no file at `path`, or the one that was there before.

    Args:
        path: Replaced when it exists.
        adapter: The adapter.
        config: Of its base.

    Returns:
        How many layers it adapts.

    Raises:
        ExportError: As `gguf_tensors`, or the file does not read back as written.
    """
    tensors = gguf_tensors(adapter, config)
    partial_path = path.with_name(path.name + ".partial")
    writer = GGUFWriter(partial_path, MODEL_ARCH_NAMES[_architecture(config).arch])
    try:
        _add_metadata(writer, adapter)
        for name, array in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(array))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check_read_back(partial_path, tensors)
        partial_path.replace(path)
    finally:
        writer.close()
        partial_path.unlink(missing_ok=True)
    return len(tensors) // 2


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Metadata and tensors of a GGUF file.

    Args:
        path: The file.

    Raises:
        ExportError: Not a GGUF file.
    """
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        msg = f"cannot read {path} as GGUF: {error}"
        raise ExportError(msg) from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return metadata, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def _add_metadata(writer: GGUFWriter, adapter: FinishedAdapter) -> None:
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, adapter.lora.alpha)  # llama.cpp divides by the rank
    writer.add_file_type(FileType.ALL_F32)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    if adapter.base_model:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, adapter.base_model)
    told = adapter.provenance
    if told is not None:
        writer.add_name(f"{told.name}: release {told.release}")
        if told.description:
            writer.add_description(told.description)
        writer.add_string(PROVENANCE_KEY, told.pretty().decode())


def _check_read_back(path: Path, tensors: Mapping[str, Float32Array]) -> None:
    _, found = read_gguf(path)
    for name, array in tensors.items():
        if name not in found or not np.array_equal(found[name], array):
            msg = f"{path} does not read back as written at {name}; is the disk sound?"
            raise ExportError(msg)


def _architecture(config: PretrainedConfig) -> _GgufArchitecture:
    known = _GGUF.get(_class_name(config))
    if known is None:
        msg = (
            f"no GGUF file is written for {_class_name(config) or 'a base without architecture'}; "
            f"known: {', '.join(sorted(_GGUF))}"
        )
        raise ExportError(msg)
    return known


def _class_name(config: PretrainedConfig) -> str:
    return str((config.architectures or [""])[0])


def _n_key_heads(config: PretrainedConfig) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

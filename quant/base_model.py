"""A base model in NF4 with double quantisation, and the fingerprint that names it.

Loading always happens in the same order (TRAINING, "The stack"): read the checkpoint in its stored
dtype, quantise on the CPU, take the fingerprint, then place and cast. So one fingerprint (packed
codes, scales and every unquantised tensor) holds for all devices, and an agent with another
checkpoint, or a copy in another dtype, is refused before it trains.

The checkpoint is read from safetensors only, and no code of a model repository is ever run.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from protocol.base_description import BaseDescription, LinearModule
from protocol.blocks import BaseBlock
from protocol.wire import JsonValue, domain_hash
from quant.errors import BaseModelError, FingerprintError
from quant.loss import is_plain_output_layer
from quant.tiny import EMBEDDED_NAME, tiny_base_path

SourceDtype = Literal["float32", "bfloat16", "float16"]
_SOURCE_DTYPES: Final[dict[torch.dtype, SourceDtype]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_FIRST_NATIVE_BF16: Final = (8, 0)
_ARITHMETIC_KEYS: Final = (
    *("model_type", "hidden_act", "hidden_activation", "activation_function"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "layer_types"),
    *("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"),
    *("sliding_window", "use_sliding_window", "tie_word_embeddings", "scale_embedding"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
    *("logit_scale", "logits_scaling", "attention_multiplier", "residual_multiplier"),
    *("embedding_multiplier", "use_qk_norm", "parallel_attn", "alibi", "n_positions"),
)
"""Settings of a configuration that change what the same weights compute."""
_TOKENIZER_PROBES: Final = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces\n\n\ta tab, 12345 and 67.89 %",
    "naïve café, Ελλάδα, привет, 東京, 🙂",
    "### Instruction:\nList three things.\n\n### Response:",
    "</s><|im_start|>[INST]<pad>",
)


@dataclass(frozen=True, kw_only=True)
class LoadedBase:
    """A frozen base on its device, with its tokenizer and its description."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    description: BaseDescription
    device: torch.device
    compute_dtype: torch.dtype

    @property
    def pad_id(self) -> int:
        """A token to pad with, which no loss sees: the tokenizer's own, or the end of a text."""
        return int(self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0)


def default_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def parse_device(name: str) -> torch.device:
    """The device of a name such as `cpu`, `cuda` or `cuda:1`.

    Args:
        name: As typed.

    Raises:
        BaseModelError: This machine, or this build of torch, has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    n_gpus = torch.cuda.device_count()
    if device is not None and device.type == "cuda" and (device.index or 0) < n_gpus:
        return torch.device("cuda", device.index or 0)
    if device is not None and device.type == "cpu":
        return torch.device("cpu")
    gpus = ", ".join(f"cuda:{i}" for i in range(n_gpus)) or "no CUDA device that torch can use"
    msg = f"there is no device {name[:40]!r} here; there are cpu and {gpus}"
    raise BaseModelError(msg)


def default_compute_dtype(device: torch.device) -> torch.dtype:
    """float32 on the CPU, float16 below compute capability 8.0, bfloat16 from there on.

    Args:
        device: Where the base will stand.
    """
    if device.type != "cuda":
        return torch.float32
    native = torch.cuda.get_device_capability(device) >= _FIRST_NATIVE_BF16
    return torch.bfloat16 if native else torch.float16


def load_base(
    source: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | None = None,
    compute_dtype: torch.dtype | None = None,
    expected: BaseBlock | None = None,
) -> LoadedBase:
    """Load a causal language model of the hub, or of a local folder, in NF4.

    Guarantees:
        1. The fingerprint does not depend on the device, the compute dtype or the thread count.
        2. With `expected`, returns only a base whose fingerprint and tokenizer are the same.
        3. A gradient before an evaluation pass equals the gradient after it (TRAINING, trap 1).

    Args:
        source: `"embedded:tiny"`, a hub id such as `"meta-llama/Llama-2-7b-hf"`, or a folder.
        revision: Commit or tag of a hub model.
        device: Default: `default_device()`.
        compute_dtype: Default: `default_compute_dtype(device)`.
        expected: The federation's base.

    Returns:
        The base, frozen and in training mode, so that gradient checkpointing works.

    Raises:
        BaseModelError: It cannot work, and why: no causal language model, needs code of its own,
            already quantised, no whole safetensors, no fast tokenizer, values that are not finite,
            logits that are more than the output layer's, or tokens that see those after them.
        FingerprintError: Another base, source dtype or tokenizer than `expected`.

    Source: QLoRA, arXiv 2305.14314, sections 3 and 4.
    """
    device = device or default_device()
    compute_dtype = compute_dtype or default_compute_dtype(device)
    path = _locate(source)
    config = _load_config(path, revision)
    tokenizer = _load_tokenizer(path, revision)
    model = _load_quantized(path, revision, config, compute_dtype)
    block = BaseBlock(
        model=_public_name(str(source), path),
        revision=revision,
        source_dtype=_source_dtype(model),
        fingerprint=fingerprint(model),
        tokenizer_digest=tokenizer_digest(tokenizer),
    )
    if expected is not None:
        check_same_base(block, expected)
    description = _describe(model, config, tokenizer, block)
    _place(model, device, compute_dtype)
    _probe(model, tokenizer, compute_dtype)
    return LoadedBase(
        model=model,
        tokenizer=tokenizer,
        description=description,
        device=device,
        compute_dtype=compute_dtype,
    )


def check_same_base(found: BaseBlock, expected: BaseBlock) -> None:
    """Refuse a base that is not the federation's.

    Raises:
        FingerprintError: The dtype of the checkpoint, the weights or the tokenizer differ.
    """
    if found.source_dtype != expected.source_dtype:
        msg = (
            f"the base {found.model!r} is stored in {found.source_dtype}; the federation's is "
            f"{expected.source_dtype}, which quantises to other codes. Fetch "
            f"{expected.model!r}, revision {expected.revision or 'any'}"
        )
        raise FingerprintError(msg)
    if found.fingerprint != expected.fingerprint:
        msg = (
            f"the base {found.model!r} has fingerprint {found.fingerprint.hex()[:16]}…, the "
            f"federation's {expected.model!r} has {expected.fingerprint.hex()[:16]}…: another "
            f"checkpoint. Fetch {expected.model!r}, revision {expected.revision or 'any'}"
        )
        raise FingerprintError(msg)
    if found.tokenizer_digest != expected.tokenizer_digest:
        msg = (
            f"the tokenizer of {found.model!r} is another one than the federation's; fetch "
            f"tokenizer.json and its configuration of {expected.model!r} again"
        )
        raise FingerprintError(msg)


def _locate(source: str | Path) -> str:
    if str(source) == EMBEDDED_NAME:
        return str(tiny_base_path())
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder)
    text = str(source)
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        msg = f"there is no folder {text!r}; name one with a base model, or a model of the hub"
        raise BaseModelError(msg)
    return text


def _public_name(source: str, path: str) -> str:
    # A path of this machine is nobody else's business: a folder goes by its last part.
    if source == EMBEDDED_NAME or not Path(path).is_dir():
        return source
    return Path(path).resolve().name


def _load_config(path: str, revision: str | None) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        msg = f"cannot read the configuration of {path!r}: {_first_line(error)}"
        raise BaseModelError(msg) from error
    config = cast("PretrainedConfig", config)
    if config.is_encoder_decoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        msg = (
            f"{path!r} is of type {config.model_type!r}, which is not a causal language model "
            "that transformers knows; choose a decoder-only model such as Llama, Mistral or Qwen"
        )
        raise BaseModelError(msg)
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        msg = (
            f"{path!r} is already quantised ({quantized.get('quant_method', 'unknown method')}); "
            "Sheepfold quantises to NF4 itself: choose the 16 or 32 bit checkpoint"
        )
        raise BaseModelError(msg)
    _switch_off_dropout(config)
    return config


def _switch_off_dropout(config: PretrainedConfig) -> None:
    # The base stands in training mode for the sake of checkpointing. Dropout of its own would draw
    # from torch's global generator, and a resumed training would not equal an uninterrupted one;
    # the manifest's dropout, of the adapter, is seeded.
    for name, value in config.to_dict().items():
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)


def _load_tokenizer(path: str, revision: str | None) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        msg = f"cannot read the tokenizer of {path!r}: {_first_line(error)}"
        raise BaseModelError(msg) from error
    if not getattr(tokenizer, "is_fast", False):
        msg = f"the tokenizer of {path!r} has no tokenizer.json; Sheepfold needs a fast tokenizer"
        raise BaseModelError(msg)
    if tokenizer.eos_token_id is None:
        msg = f"the tokenizer of {path!r} has no end-of-sequence token, so answers would never end"
        raise BaseModelError(msg)
    return cast("PreTrainedTokenizerFast", tokenizer)


def _load_quantized(
    path: str, revision: str | None, config: PretrainedConfig, compute_dtype: torch.dtype
) -> PreTrainedModel:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            revision=revision,
            output_loading_info=True,
            quantization_config=quantization,
            dtype="auto",
            device_map={"": "cpu"},
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        msg = f"cannot load {path!r} in 4 bit: {_first_line(error)}"
        raise BaseModelError(msg) from error
    # transformers' annotation knows the model alone, without what `output_loading_info` adds.
    model, loading = cast("tuple[PreTrainedModel, Mapping[str, Any]]", loaded)
    _check_whole(path, model, loading)
    for _, module in linear_modules(model):
        # bitsandbytes 0.49 to 0.50.2 repacks weights in place in evaluation on CPUs with
        # AVX512-BF16, and later training loses its gradient (TRAINING, trap 1).
        module.support_avx512bf16_for_cpu = False
    model.requires_grad_(requires_grad=False)
    model.train()
    return model


def _check_whole(path: str, model: PreTrainedModel, loading: Mapping[str, Any]) -> None:
    # transformers only warns, and fills what is missing with random numbers; bitsandbytes takes a
    # weight of any shape.
    faults = [f"{name} is missing" for name in sorted(loading["missing_keys"])]
    faults += [f"{name[0]} has another shape" for name in sorted(loading["mismatched_keys"])]
    faults += [
        f"{name}.weight has another shape"
        for name, module in linear_modules(model)
        if not faults and _quant_state(module).shape != (module.out_features, module.in_features)
    ]
    if faults:
        msg = (
            f"the checkpoint of {path!r} is not whole: {faults[0]} ({len(faults)} such faults); "
            "fetch it again"
        )
        raise BaseModelError(msg)


def linear_modules(model: torch.nn.Module) -> Iterator[tuple[str, Linear4bit]]:
    """Every 4-bit linear layer with its full name, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name, module


def _quant_state(module: Linear4bit) -> QuantState:
    # Params4bit adds it to the tensor, which torch's annotation does not know.
    return cast("QuantState", module.weight.quant_state)  # type: ignore[attr-defined]


def _source_dtype(model: PreTrainedModel) -> SourceDtype:
    dtypes = {_quant_state(module).dtype for _, module in linear_modules(model)}
    if len(dtypes) != 1 or not dtypes <= set(_SOURCE_DTYPES):
        found = ", ".join(sorted(str(dtype) for dtype in dtypes)) or "no linear layers"
        msg = f"the checkpoint's linear layers must share one 16 or 32 bit dtype; found: {found}"
        raise BaseModelError(msg)
    return _SOURCE_DTYPES[dtypes.pop()]


def fingerprint(model: PreTrainedModel) -> bytes:
    """The digest of a quantised base: codes, scales, unquantised tensors, and its arithmetic.

    Of the configuration only what changes the numbers counts, not what another release of
    transformers writes beside it.

    Args:
        model: As quantised, before it is placed and cast.

    Returns:
        32 bytes: `domain_hash("base", arithmetic, {name: [dtype, shape, SHA-256 of bytes], …})`.
    """
    rows: dict[str, list[JsonValue]] = {}

    def add(name: str, tensor: torch.Tensor) -> None:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest = hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
        rows[name] = [str(tensor.dtype), list(tensor.shape), digest]

    for name, module in linear_modules(model):
        state = _quant_state(module)
        nested = cast("QuantState", state.state2)
        settings = f"{state.quant_type}/{state.blocksize}/{nested.blocksize}/{state.dtype}"
        rows[name] = [settings, list(state.shape)]
        add(name + ".codes", module.weight.data)
        add(name + ".absmax", state.absmax)
        add(name + ".nested_absmax", nested.absmax)
        add(name + ".nested_offset", cast("torch.Tensor", state.offset).reshape(1))
        if module.bias is not None:
            add(name + ".bias", module.bias)
    quantized = {name for name, _ in linear_modules(model)}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in quantized:
            add(name, parameter)
    written = model.config.to_dict()
    arithmetic: JsonValue = json.loads(
        json.dumps({key: written[key] for key in _ARITHMETIC_KEYS if key in written}, default=str)
    )
    return domain_hash("base", arithmetic, rows)


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> bytes:
    """The digest of what a tokenizer does: its vocabulary, special tokens, template and probes.

    It covers behaviour, not a file, so that another release of the tokenizer library that writes
    the same tokenizer differently is still the same tokenizer.

    Returns:
        32 bytes.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    specials: dict[str, str] = {
        name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())
    }
    probes = [tokenizer(text)["input_ids"] for text in _TOKENIZER_PROBES]
    template = tokenizer.chat_template
    return domain_hash("tokenizer", vocabulary, specials, probes, template or "")


def _describe(
    model: PreTrainedModel,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    block: BaseBlock,
) -> BaseDescription:
    modules = tuple(
        LinearModule(name=name, d_out=module.out_features, d_in=module.in_features)
        for name, module in linear_modules(model)
    )
    weights = {module.name + ".weight" for module in modules}
    n_unquantized = sum(
        parameter.numel() for name, parameter in model.named_parameters() if name not in weights
    )
    return BaseDescription(
        base=block,
        architecture=type(model).__name__,
        n_parameters=n_unquantized + sum(module.d_out * module.d_in for module in modules),
        max_positions=int(getattr(config, "max_position_embeddings", 0) or 2**20),
        has_chat_template=bool(tokenizer.chat_template),
        linear_modules=modules,
    )


def _place(model: PreTrainedModel, device: torch.device, compute_dtype: torch.dtype) -> None:
    quantized = {name for name, _ in linear_modules(model)}
    for _, module in linear_modules(model):
        # bitsandbytes dequantises to the input's dtype in forward, but to this one in backward:
        # left at the checkpoint's bfloat16, the gradient would be that of other weights.
        _quant_state(module).dtype = compute_dtype
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in quantized:
            parameter.data = parameter.data.to(compute_dtype)
    if device.type != "cpu":
        model.to(device)  # type: ignore[arg-type]  # transformers' annotation omits devices


def _probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, compute_dtype: torch.dtype
) -> None:
    ids = cast("list[int]", tokenizer(_TOKENIZER_PROBES[0])["input_ids"])
    other_end = [*ids[:-1], ids[0]]
    with torch.inference_mode():
        first, second = (
            model(input_ids=torch.tensor([tokens], device=model.device)).logits[0].float()
            for tokens in (ids, other_end)
        )
    if not bool(torch.isfinite(first).all()):
        msg = (
            f"the base gives values that are not finite in {compute_dtype}; use a GPU with native "
            "bfloat16 (compute capability 8.0 or newer), or a Llama-class base"
        )
        raise BaseModelError(msg)
    # Two sequences that differ in their last token; 16 bit kernels may round them differently.
    tolerance = 1e-4 if compute_dtype is torch.float32 else 0.02
    moved = float((first - second)[:-1].abs().max())
    if moved > tolerance * float(first.abs().max()):
        msg = (
            f"in the base a token sees those after it ({type(model).__name__} is an encoder); "
            "choose a decoder-only model such as Llama, Mistral or Qwen"
        )
        raise BaseModelError(msg)
    if not is_plain_output_layer(model, torch.tensor([ids], device=model.device)):
        msg = (
            f"the base changes its logits after the output layer ({type(model).__name__}, as "
            "Gemma 2 and Granite do), which the loss does not follow; choose a model such as "
            "Llama, Mistral or Qwen"
        )
        raise BaseModelError(msg)


def _first_line(error: BaseException) -> str:
    lines = str(error).split("\n")
    said = lines[0].strip() or type(error).__name__
    # Some of transformers' sentences end in a colon, and what they announce comes after it.
    return " ".join(" ".join(lines).split())[:300] if said.endswith(":") else said


def set_threads(n_threads: int) -> None:
    """Use this many CPU threads; one for each agent when agents share the cores.

    Args:
        n_threads: At least 1.
    """
    torch.set_num_threads(max(1, n_threads))


def limit_device_memory(max_bytes: int, device: torch.device) -> None:
    """Cap this process's memory on a CUDA device; on the CPU nothing is capped.

    Args:
        max_bytes: The owner's `--max-vram`.
        device: The device of the base.
    """
    if device.type == "cuda":
        total: Any = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max_bytes / total), device)

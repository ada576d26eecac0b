"""PEFT adapter folder ↔ named arrays ↔ one flat vector; numpy and safetensors only.

Three forms of the same numbers:

- **folder**: `adapter_model.safetensors`, `adapter_config.json` and a model card, which stock
  `PeftModel.from_pretrained` loads;
- **arrays**: a dict from PEFT's tensor names to float32 arrays;
- **vector**: one float32 array [n_values] in the order of a `VectorLayout`.

The server uses this module without torch; the agent uses the same code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from protocol.base_description import BaseDescription
from protocol.blocks import BaseBlock, Factor, LoraBlock
from protocol.layout import VectorLayout
from quant.errors import AdapterError

Float32Array = NDArray[np.float32]
AdapterArrays = dict[str, Float32Array]

WEIGHTS_NAME: Final = "adapter_model.safetensors"
CONFIG_NAME: Final = "adapter_config.json"
CARD_NAME: Final = "README.md"
_PREFIX: Final = "base_model.model."
_SUFFIX: Final = {Factor.A: ".lora_A.weight", Factor.B: ".lora_B.weight"}


def tensor_name(module: str, factor: Factor) -> str:
    """PEFT's name of one factor of a module, such as `….q_proj.lora_A.weight`."""
    return _PREFIX + module + _SUFFIX[factor]


def factor_of(name: str) -> Factor:
    """Which factor a tensor name stands for.

    Raises:
        AdapterError: Neither.
    """
    for factor, suffix in _SUFFIX.items():
        if name.startswith(_PREFIX) and name.endswith(suffix):
            return factor
    msg = f"not the name of a LoRA factor: {name!r}"
    raise AdapterError(msg)


def module_of(name: str) -> str:
    """The module that a tensor name belongs to, such as `model.layers.0.self_attn.q_proj`.

    Raises:
        AdapterError: Not the name of a factor.
    """
    return name.removeprefix(_PREFIX).removesuffix(_SUFFIX[factor_of(name)])


def adapter_shapes(base: BaseDescription, lora: LoraBlock) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the adapter: A is [rank, d_in], B is [d_out, rank].

    Raises:
        ManifestError: A target module is not in the base.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in base.targets(lora.target_modules).items():
        shapes[tensor_name(name, Factor.A)] = (lora.rank, module.d_in)
        shapes[tensor_name(name, Factor.B)] = (module.d_out, lora.rank)
    return shapes


def sent_layout(shapes: Mapping[str, tuple[int, ...]], sent: tuple[Factor, ...]) -> VectorLayout:
    """The layout of what agents send: the tensors of the factors in `sent`.

    Args:
        shapes: All tensors of the adapter.
        sent: The manifest's `lora.sent`.

    Raises:
        AdapterError: A name is not PEFT's name of a factor.
    """
    return VectorLayout.of_shapes(
        {name: tuple(shape) for name, shape in shapes.items() if factor_of(name) in sent}
    )


def initial_adapter(base: BaseDescription, lora: LoraBlock) -> AdapterArrays:
    """Release 0: A uniform in ±1/√d_in from `lora.init_seed`, B zero.

    Guarantees:
        1. Equal seeds and shapes give equal bytes on every machine; each tensor has a stream of
           its own, so adding a module leaves the others as they were.
        2. The adapter changes nothing: every B is zero.

    Raises:
        ManifestError: A target module is not in the base.

    Source: peft's default (Kaiming uniform with a = √5); LoRA, arXiv 2106.09685, section 4.1.
    """
    arrays: AdapterArrays = {}
    for name, shape in adapter_shapes(base, lora).items():
        if factor_of(name) is Factor.A:
            stream = np.random.SeedSequence([lora.init_seed, *name.encode()])
            bound = 1.0 / np.sqrt(shape[1])
            # Not `uniform`, whose multiplication and addition some machines round as one.
            unit = np.random.Generator(np.random.PCG64(stream)).random(shape)
            arrays[name] = ((2.0 * unit - 1.0) * bound).astype(np.float32)
        else:
            arrays[name] = np.zeros(shape, np.float32)
    return arrays


def flatten(arrays: Mapping[str, Float32Array], layout: VectorLayout) -> Float32Array:
    """Arrays to one vector [n_values]; arrays that the layout does not name are left out.

    Raises:
        AdapterError: A tensor is missing, or has another shape or dtype.
    """
    vector = np.empty(layout.n_values, np.float32)
    for slot, where in layout.slices():
        vector[where] = _checked(arrays, slot.name, slot.shape).reshape(-1)
    return vector


def unflatten(vector: Float32Array, layout: VectorLayout) -> AdapterArrays:
    """One vector [n_values] to arrays; copies, so the vector may change afterwards.

    Raises:
        AdapterError: The vector has another length or dtype.
    """
    return {name: part.copy() for name, part in parts_of(vector, layout).items()}


def parts_of(vector: Float32Array, layout: VectorLayout) -> AdapterArrays:
    """A vector's parts by tensor name: views, which change with it.

    Args:
        vector: [n_values] float32.
        layout: Its.

    Raises:
        AdapterError: The vector has another length or dtype.
    """
    if vector.shape != (layout.n_values,) or vector.dtype != np.float32:
        msg = f"expected float32 [{layout.n_values}], got {vector.dtype} {list(vector.shape)}"
        raise AdapterError(msg)
    return {slot.name: vector[where].reshape(slot.shape) for slot, where in layout.slices()}


def vector_to_bytes(vector: Float32Array) -> bytes:
    """The body of an open-mode upload: little-endian float32."""
    return vector.astype("<f4", copy=False).tobytes()


def vector_from_bytes(data: bytes | bytearray | memoryview, layout: VectorLayout) -> Float32Array:
    """Read the body of an open-mode upload.

    Raises:
        AdapterError: Another length than the layout's.
    """
    if len(data) != layout.n_bytes:
        msg = f"{len(data)} bytes; the layout has {layout.n_bytes}"
        raise AdapterError(msg)
    return np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)


def to_safetensors(arrays: Mapping[str, Float32Array]) -> bytes:
    """The bytes of a safetensors file: the same arrays always give the same bytes."""
    ordered = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    return safetensors.numpy.save(ordered, metadata={"format": "pt"})


def from_safetensors(data: bytes, shapes: Mapping[str, tuple[int, ...]]) -> AdapterArrays:
    """Read a safetensors file that must hold exactly the given float32 tensors, all finite.

    Raises:
        AdapterError: Not safetensors; a tensor is missing, extra, of another shape or dtype, or
            has values that are not finite.
    """
    try:
        arrays = safetensors.numpy.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        msg = f"not a safetensors file: {error}"
        raise AdapterError(msg) from error
    extra = sorted(set(arrays) - set(shapes))
    if extra:
        msg = f"unexpected tensor {extra[0]!r} ({len(extra)} in all)"
        raise AdapterError(msg)
    checked = {name: _checked(arrays, name, tuple(shape)) for name, shape in shapes.items()}
    for name, array in checked.items():
        if not np.isfinite(array).all():
            msg = f"tensor {name!r} has values that are not finite"
            raise AdapterError(msg)
    return checked


def _checked(
    arrays: Mapping[str, NDArray[np.generic]], name: str, shape: tuple[int, ...]
) -> Float32Array:
    array = arrays.get(name)
    if array is None:
        msg = f"tensor {name!r} is missing"
        raise AdapterError(msg)
    if array.shape != shape or array.dtype != np.float32:
        msg = f"tensor {name!r}: expected float32 {shape}, got {array.dtype} {array.shape}"
        raise AdapterError(msg)
    return array.astype(np.float32, copy=False)


def peft_config(base: BaseBlock, lora: LoraBlock) -> bytes:
    """The bytes of `adapter_config.json` that stock peft reads."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.model,
        "revision": base.revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(lora.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def write_folder(folder: Path, *, weights: bytes, config: bytes, card: str) -> None:
    """Write a PEFT adapter folder; existing files of these three names are replaced.

    Args:
        folder: Created with its parents when missing.
        weights: Bytes of a safetensors file.
        config: Bytes of `adapter_config.json`.
        card: Text of `README.md`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS_NAME).write_bytes(weights)
    (folder / CONFIG_NAME).write_bytes(config)
    (folder / CARD_NAME).write_text(card, encoding="utf-8")


def read_folder(folder: Path) -> AdapterArrays:
    """Read the arrays of a PEFT LoRA folder, whatever its modules and rank.

    Raises:
        AdapterError: No such file, not LoRA in float32, or values that are not finite.
    """
    path = folder / WEIGHTS_NAME
    try:
        return read_arrays(path.read_bytes())
    except (OSError, AdapterError) as error:
        msg = f"cannot read {path}: {error}"
        raise AdapterError(msg) from error


def read_arrays(data: bytes) -> AdapterArrays:
    """Read the bytes of a PEFT LoRA file, whatever its modules and rank.

    Raises:
        AdapterError: Not safetensors, not LoRA in float32, or values that are not finite.
    """
    try:
        names = safetensors.numpy.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        msg = f"not a safetensors file: {error}"
        raise AdapterError(msg) from error
    for name in names:
        factor_of(name)
    return from_safetensors(data, {name: array.shape for name, array in names.items()})

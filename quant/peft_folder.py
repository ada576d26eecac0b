"""A finished LoRA adapter in a PEFT folder: ours, or anyone's that is plain LoRA.

`quant.adapter` reads and writes the adapters of a federation, whose shape is known. Here the shape
comes from the folder, so everything that it may hold and that we would not honour is refused: an
adapter that is read is computed as stock peft computes it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from protocol.base_description import BaseDescription
from protocol.blocks import Factor, LoraBlock
from protocol.errors import ProtocolError
from protocol.limits import MAX_TARGET_MODULES
from protocol.wire import explain, sha256
from quant.adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterArrays,
    adapter_shapes,
    factor_of,
    module_of,
)
from quant.base_model import LoadedBase
from quant.errors import AdapterError
from quant.lora import AdaptedModel
from quant.model_card import PROVENANCE_NAME, Provenance, read_provenance

_UNTOLD: Final[tuple[object, ...]] = (None, False, "none", [], {})
_PLAIN_INITS: Final[tuple[object, ...]] = (None, True, False, "gaussian")
_NOT_PLAIN: Final = (
    *("use_dora", "use_qalora", "use_bdlora", "bias", "lora_bias", "fan_in_fan_out"),
    *("modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication"),
    "layers_to_transform",
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config"),
)
"""Settings of peft that change what an adapter computes, or what else lies in its file."""


@dataclass(frozen=True, kw_only=True)
class FinishedAdapter:
    """A LoRA adapter as its folder holds it.

    Attributes:
        folder: Where it was read.
        base_model: What its configuration names as base.
        revision: Of the base; None: any.
        lora: Its shape. `alpha` is such that the scale is `alpha / rank`, rank-stabilised or not.
        arrays: float32, by PEFT's names.
        weights_sha256: 32 bytes, of the file they were read from.
        provenance: How it was made; None for a foreign adapter.
    """

    folder: Path
    base_model: str
    revision: str | None
    lora: LoraBlock
    arrays: AdapterArrays
    weights_sha256: bytes
    provenance: Provenance | None

    @property
    def scale(self) -> float:
        """The factor of `B · A`, which peft calls scaling."""
        return self.lora.scale

    def pairs(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(A [rank, d_in], B [d_out, rank]) in float32, by the name of the module they adapt."""
        found: dict[str, dict[Factor, np.ndarray]] = {}
        for name, array in self.arrays.items():
            found.setdefault(module_of(name), {})[factor_of(name)] = array
        return {name: (pair[Factor.A], pair[Factor.B]) for name, pair in found.items()}


def read_finished(folder: Path) -> FinishedAdapter:
    """Read a PEFT folder.

    Guarantees:
        1. What is read is plain LoRA: `W + s · B · A` on linear layers, and nothing else.
        2. With a provenance, the weights are those that it names, and so are rank, α and modules.

    Args:
        folder: With `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        AdapterError: Not such a folder, not plain LoRA, damaged, or changed since it was published.
    """
    config = _read_config(folder)
    try:
        data = (folder / WEIGHTS_NAME).read_bytes()
        tensors = safetensors.torch.load(data)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        msg = (
            f"cannot read {folder / WEIGHTS_NAME}: {error}; weights are read from safetensors only"
        )
        raise AdapterError(msg) from error
    arrays = {name: _as_float32(name, tensor) for name, tensor in tensors.items()}
    provenance = read_provenance(folder)
    digest = sha256(data)
    if provenance is not None and digest != provenance.weights_sha256:
        msg = (
            f"{folder / WEIGHTS_NAME} is not what {PROVENANCE_NAME} beside it describes; export it "
            f"again, or remove {PROVENANCE_NAME} to use it as an adapter of unknown origin"
        )
        raise AdapterError(msg)
    lora = _shape_of(folder, config, arrays)
    if provenance is not None and not _same_shape(lora, provenance.lora):
        msg = (
            f"{folder / CONFIG_NAME} has another rank, alpha or modules than {PROVENANCE_NAME} "
            f"beside it; export it again, or remove {PROVENANCE_NAME} to use it as an adapter of "
            "unknown origin"
        )
        raise AdapterError(msg)
    return FinishedAdapter(
        folder=folder,
        base_model=_text_of(folder, config, "base_model_name_or_path") or "",
        revision=_text_of(folder, config, "revision"),
        lora=lora,
        arrays=arrays,
        weights_sha256=digest,
        provenance=provenance,
    )


def check_fits(adapter: FinishedAdapter, base: BaseDescription) -> None:
    """Refuse an adapter that was made for another base.

    Guarantees:
        1. Returns only when the adapter has both factors of each module it targets in this base,
           in this base's shapes, and nothing more.

    Args:
        adapter: The adapter.
        base: The base.

    Raises:
        AdapterError: Otherwise; names the first difference.
    """
    try:
        expected = adapter_shapes(base, adapter.lora)
    except ProtocolError as error:
        msg = f"the adapter in {adapter.folder} is for another base: {error}"
        raise AdapterError(msg) from error
    for name in sorted(expected.keys() | adapter.arrays.keys()):
        found = adapter.arrays[name].shape if name in adapter.arrays else "no such tensor"
        wanted = expected.get(name, "no such layer")
        if found != wanted:
            msg = (
                f"the adapter in {adapter.folder} is for another base than {base.base.model!r}: "
                f"{module_of(name)} needs {wanted}, and the adapter has {found}; name its own base "
                f"({adapter.base_model!r}) with --base"
            )
            raise AdapterError(msg)


def attach(base: LoadedBase, adapter: FinishedAdapter) -> AdaptedModel:
    """Put a finished adapter on its base, in evaluation mode.

    Args:
        base: Without another adapter.
        adapter: The adapter.

    Raises:
        AdapterError: It is for another base.
    """
    check_fits(adapter, base.description)
    adapted = AdaptedModel(base, adapter.lora)
    adapted.load(adapter.arrays)
    adapted.model.eval()
    return adapted


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        reason = f"it has no {path.name}" if folder.is_dir() else "there is no such folder"
        msg = f"{folder} is no adapter folder: {reason} ({error.strerror})"
        raise AdapterError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"{path} is not JSON: {error}"
        raise AdapterError(msg) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        msg = f"{path} describes {kind or 'no adapter'}, not a LoRA adapter of peft"
        raise AdapterError(msg)
    special = [key for key in _NOT_PLAIN if config.get(key) not in _UNTOLD]
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        special.append("init_lora_weights")
    if special:
        msg = (
            f"the adapter in {folder} is more than plain LoRA: {special[0]} is "
            f"{config[special[0]]!r}; use it with peft itself"
        )
        raise AdapterError(msg)
    return config


def _text_of(folder: Path, config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    if value is None or isinstance(value, str):
        return value
    msg = f"{folder / CONFIG_NAME} gives {value!r} for {key!r}, which must be a text"
    raise AdapterError(msg)


def _same_shape(one: LoraBlock, other: LoraBlock) -> bool:
    return (one.rank, one.alpha, set(one.target_modules)) == (
        *(other.rank, other.alpha),
        set(other.target_modules),
    )


def _as_float32(name: str, tensor: torch.Tensor) -> np.ndarray:
    factor_of(name)
    if not tensor.is_floating_point() or tensor.ndim != 2:
        msg = f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, not a factor's matrix"
        raise AdapterError(msg)
    array: np.ndarray = tensor.float().numpy()
    if not np.isfinite(array).all():
        msg = f"tensor {name!r} has values that are not finite"
        raise AdapterError(msg)
    return array


def _shape_of(folder: Path, config: Mapping[str, Any], arrays: AdapterArrays) -> LoraBlock:
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        if config.get("use_rslora"):
            alpha *= math.sqrt(rank)  # peft's scale is then alpha / sqrt(rank)
        targets = _targets_of(folder, config.get("target_modules"), set(map(module_of, arrays)))
        return LoraBlock(rank=rank, alpha=alpha, target_modules=targets, init_seed=0)
    except ValidationError as error:
        msg = f"cannot use the adapter in {folder}: {explain('its shape', error)}"
        raise AdapterError(msg) from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        msg = f"{folder / CONFIG_NAME} gives no rank and alpha: {error}"
        raise AdapterError(msg) from error


def _targets_of(folder: Path, told: object, modules: set[str]) -> tuple[str, ...]:
    """The names that cover the adapted modules; tensors that stock peft leaves out are refused."""
    by_last_name = tuple(sorted({module.rpartition(".")[2] for module in modules}))
    if not isinstance(told, list):  # a pattern, which is not tried
        return by_last_name
    endings = {"." + str(target): str(target) for target in told}
    used: set[str] = set()
    for module in sorted(modules):
        found = {target for ending, target in endings.items() if f".{module}".endswith(ending)}
        if not found:
            msg = f"{folder / WEIGHTS_NAME} adapts {module!r}, which {CONFIG_NAME} does not target"
            raise AdapterError(msg)
        used |= found
    # Some list every layer in full; `check_fits` then asks for the same layers by their last names.
    return by_last_name if len(used) > MAX_TARGET_MODULES else tuple(sorted(used))

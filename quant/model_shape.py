"""The shape of a Llama-class model, read from its configuration alone: no weights, no torch."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from protocol.blocks import Factor, LoraBlock
from quant.errors import BaseModelError

_NF4_BLOCK: Final = 64
_NESTED_BLOCK: Final = 256


_MOST_WIDTH: Final = 2**24
_MOST_LAYERS: Final = 1000
_MOST_POSITIONS: Final = 2**31
_DEFAULT_POSITIONS: Final = 2048  # of Llama in transformers


class Norm(StrEnum):
    """How a model writes its RMS norm, which decides what autograd keeps of it."""

    LLAMA = "llama"
    GEMMA = "gemma"
    """Multiplies by 1 + weight, a new tensor of its own."""


class FloatType(StrEnum):
    """A floating point type, by the names that configurations use."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def n_bytes(self) -> int:
        """Bytes of one number."""
        return 4 if self is FloatType.FLOAT32 else 2


@dataclass(frozen=True, kw_only=True)
class _Class:
    """What a model type's configuration leaves unsaid."""

    norm: Norm = Norm.LLAMA
    norms_heads: bool = False
    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    qkv_bias: bool = False


_CLASSES: Final[Mapping[str, _Class]] = {
    "llama": _Class(),
    "mistral": _Class(kv_heads=8),
    "qwen2": _Class(kv_heads=32, qkv_bias=True),
    "qwen3": _Class(kv_heads=32, head_dim=128, norms_heads=True),
    "gemma": _Class(norm=Norm.GEMMA, kv_heads=16, head_dim=256, tied=True),
}
"""The model types whose modelling code of transformers 5.23 the formulas were counted on."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder-only model of the Llama class.

    Attributes:
        model_type: As transformers calls it, such as `"llama"`.
        hidden: Width of the residual stream.
        intermediate: Width of the gated feed-forward layer.
        n_layers: Decoder layers.
        n_heads: Query heads.
        n_kv_heads: Key and value heads.
        head_dim: Width of one head.
        vocab: Rows of the embedding.
        tied: The output layer is the embedding.
        norm: How the norms are written.
        norms_heads: Queries and keys are normed head by head.
        n_biases: Numbers in the biases of one layer.
        max_positions: Longest sequence that the model knows.
        stored: Type of the checkpoint's weights; None: the configuration does not say.
    """

    model_type: str
    hidden: int
    intermediate: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    norm: Norm = Norm.LLAMA
    norms_heads: bool = False
    n_biases: int = 0
    max_positions: int = 2**20
    stored: FloatType | None = None

    @property
    def query(self) -> int:
        """Width of the queries and of the attention's output."""
        return self.n_heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of the keys, and of the values."""
        return self.n_kv_heads * self.head_dim

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """(d_out, d_in) of the linear layers of one decoder layer, by name."""
        return {
            "q_proj": (self.query, self.hidden),
            "k_proj": (self.key, self.hidden),
            "v_proj": (self.key, self.hidden),
            "o_proj": (self.hidden, self.query),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def n_parameters(self) -> int:
        """All parameters."""
        linear = sum(d_out * d_in for d_out, d_in in self.linears.values())
        return self.n_layers * linear + self._n_unquantized

    @property
    def _n_unquantized(self) -> int:
        per_layer = 2 * self.hidden + self.n_biases + (2 * self.head_dim if self.norms_heads else 0)
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return embeddings + self.n_layers * per_layer + self.hidden

    def weight_bytes(self, compute: FloatType) -> int:
        """The base in NF4 with double quantisation, the rest in the compute type.

        0.51587 bytes a quantised number: half a byte of code, a byte of scale for 64 of them, and
        4 bytes for 256 scales. Left out: tables of 1.1 KB a linear layer.

        Args:
            compute: What embeddings, norms and biases are cast to.
        """
        quantized = 0
        for d_out, d_in in self.linears.values():
            blocks = math.ceil(d_out * d_in / _NF4_BLOCK)
            quantized += (
                math.ceil(d_out * d_in / 2) + blocks + 4 * math.ceil(blocks / _NESTED_BLOCK)
            )
        return self.n_layers * quantized + compute.n_bytes * self._n_unquantized


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    """What of a LoRA adapter costs memory.

    Attributes:
        rank: Rank of every factor pair.
        modules: Adapted linear layers of each decoder layer, by their last name.
        trains_a: False when A is frozen (FFA-LoRA).
    """

    rank: int
    modules: frozenset[str]
    trains_a: bool = True

    @classmethod
    def of(cls, block: LoraBlock) -> "LoraShape":
        """The shape of a manifest's adapter."""
        return cls(
            rank=block.rank,
            modules=frozenset(name.rpartition(".")[2] for name in block.target_modules),
            trains_a=Factor.A in block.sent,
        )

    def n_parameters(self, shape: ModelShape, *, trained: bool = False) -> int:
        """Numbers in the adapter.

        Args:
            shape: The base.
            trained: Only those that are trained.

        Raises:
            BaseModelError: A module that models of the Llama class do not have.
        """
        unknown = self.modules - shape.linears.keys()
        if unknown:
            msg = (
                f"memory cannot be predicted for an adapter on {min(unknown)!r}; "
                f"known are {', '.join(shape.linears)}"
            )
            raise BaseModelError(msg)
        chosen = [shape.linears[name] for name in self.modules]
        with_a = self.trains_a or not trained
        widths = sum(d_out + (d_in if with_a else 0) for d_out, d_in in chosen)
        return self.rank * shape.n_layers * widths


def read_shape(config: Mapping[str, object], *, name: str) -> ModelShape:
    """The shape that a configuration describes.

    Args:
        config: The parsed `config.json`, or `to_dict()` of a configuration.
        name: What to call the model in messages.

    Raises:
        BaseModelError: Not of the Llama class, or a size is missing, in one sentence.
    """
    model_type = config.get("model_type")
    found = _CLASSES.get(model_type) if isinstance(model_type, str) else None
    if found is None or not isinstance(model_type, str):
        msg = (
            f"memory cannot be predicted for {name!r}: its type is {model_type!r}, and the "
            f"formulas hold for dense decoders alone ({', '.join(_CLASSES)})"
        )
        raise BaseModelError(msg)
    hidden = _size(config, "hidden_size", name)
    intermediate = _size(config, "intermediate_size", name)
    n_heads = _size(config, "num_attention_heads", name)
    n_kv_heads = _size(config, "num_key_value_heads", name, found.kv_heads or n_heads)
    head_dim = _size(config, "head_dim", name, found.head_dim or hidden // n_heads)
    query, key = n_heads * head_dim, n_kv_heads * head_dim
    attention_bias = bool(config.get("attention_bias", False))
    n_biases = (query + 2 * key if attention_bias or found.qkv_bias else 0) + (
        hidden if attention_bias else 0
    )
    n_biases += 2 * intermediate + hidden if config.get("mlp_bias", False) else 0
    return ModelShape(
        model_type=model_type,
        hidden=hidden,
        intermediate=intermediate,
        n_layers=_size(config, "num_hidden_layers", name, most=_MOST_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab=_size(config, "vocab_size", name),
        tied=bool(config.get("tie_word_embeddings", found.tied)),
        norm=found.norm,
        norms_heads=found.norms_heads,
        n_biases=n_biases,
        max_positions=_size(
            config, "max_position_embeddings", name, _DEFAULT_POSITIONS, most=_MOST_POSITIONS
        ),
        stored=_stored(config),
    )


def read_shape_file(path: Path, *, name: str) -> ModelShape:
    """The shape that a `config.json` describes.

    Args:
        path: The file.
        name: What to call the model in messages.

    Raises:
        BaseModelError: It cannot be read, is of a quantised checkpoint, or as `read_shape`.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"cannot read the configuration of {name!r}, {path}: {error}"
        raise BaseModelError(msg) from error
    if not isinstance(config, dict):
        msg = f"the configuration of {name!r}, {path}, is no JSON object"
        raise BaseModelError(msg)
    if config.get("quantization_config"):
        msg = f"{name!r} is already quantised; choose the 16 or 32 bit checkpoint"
        raise BaseModelError(msg)
    return read_shape(config, name=name)


def _size(
    config: Mapping[str, object],
    key: str,
    name: str,
    default: int | None = None,
    *,
    most: int = _MOST_WIDTH,
) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        msg = (
            f"the configuration of {name!r} needs a whole number from 1 to {most:,} for {key!r}, "
            f"not {str(value)[:40] if isinstance(value, str) else type(value).__name__}"
        )
        raise BaseModelError(msg)
    return value


def _stored(config: Mapping[str, object]) -> FloatType | None:
    written = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return FloatType(written) if written in set(FloatType) else None

"""Fed-SB: the r × r core between a fixed A and a fixed B, as tensors and as an ordinary adapter."""

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from aggregator_server.aggregation.lora_pairs import LoraAdapter, Pair
from aggregator_server.errors import AggregationError
from protocol.blocks import Factor
from quant.adapter import module_of, tensor_name

_CORE_SUFFIX: Final = ".lora_core.weight"


def core_name(module: str) -> str:
    """The name of a module's core, beside PEFT's names of its factors."""
    return tensor_name(module, Factor.A).removesuffix(".lora_A.weight") + _CORE_SUFFIX


def core_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The cores that go with an adapter: [rank, rank] for each module.

    Raises:
        quant.errors.AdapterError: A name that is not of a LoRA factor.
    """
    modules = {module_of(name) for name in shapes}
    ranks = {module: shapes[tensor_name(module, Factor.A)][0] for module in modules}
    return {core_name(module): (rank, rank) for module, rank in sorted(ranks.items())}


def fold_core(frozen: LoraAdapter, cores: Mapping[str, NDArray[np.floating]]) -> LoraAdapter:
    """Fed-SB's s·B·R·A as an ordinary adapter, which stock PEFT loads: B·R takes B's place.

    Guarantees:
        1. Exact, and linear in R: the fold of the mean core is the mean of the folds.

    Args:
        frozen: A and B, which never change.
        cores: R of each module, [rank, rank].

    Raises:
        AggregationError: A core that is missing, extra, or of another shape.

    Source: Fed-SB (Singhal et al.), arXiv 2502.15436.
    """
    if set(cores) != set(frozen.pairs):
        msg = "the cores and the frozen adapter have other modules"
        raise AggregationError(msg)
    pairs: dict[str, Pair] = {}
    for module, pair in frozen.pairs.items():
        core = cores[module]
        if core.shape != (pair.rank, pair.rank):
            msg = f"the core of {module!r} is {core.shape}; expected {(pair.rank, pair.rank)}"
            raise AggregationError(msg)
        pairs[module] = Pair(A=pair.A, B=pair.B.astype(np.float64) @ core.astype(np.float64))
    return LoraAdapter(pairs=pairs, scale=frozen.scale)

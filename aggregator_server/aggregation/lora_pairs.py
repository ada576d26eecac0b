"""Adapters as pairs of factors: which A belongs to which B, and who trained them.

A module's change is ΔW = s·B·A with A [rank, d_in], B [d_out, rank] and the scale s = alpha / rank.
Rules that look at single agents' factors take a `Cohort`, which is built from `PlainUpdate`s: a
masked update does not fit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator_server.errors import AggregationError
from privacy.updates import PlainUpdate
from protocol.blocks import Factor
from protocol.layout import VectorLayout
from quant.adapter import AdapterArrays, factor_of, flatten, module_of, tensor_name, unflatten

FloatArray = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """The factors of one product B·A.

    Raises (at construction): AggregationError: Not two matrices with one rank in common.
    """

    A: FloatArray
    """[rank, d_in], float32 or float64."""
    B: FloatArray
    """[d_out, rank], float32 or float64."""

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or len(self.A) != self.B.shape[1]:
            msg = f"A {self.A.shape} and B {self.B.shape} have no product B·A"
            raise AggregationError(msg)

    @property
    def rank(self) -> int:
        """Number of rows of A, and of columns of B."""
        return len(self.A)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product: (d_out, d_in)."""
        return len(self.B), self.A.shape[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraAdapter:
    """A whole adapter: s·B·A for each module.

    Raises (at construction): AggregationError: No module, or a scale that is not above 0.
    """

    pairs: Mapping[str, Pair]
    """By the module's name."""
    scale: float
    """s = alpha / rank, as the peft library multiplies."""

    def __post_init__(self) -> None:
        if not self.pairs or not (math.isfinite(self.scale) and self.scale > 0):
            msg = f"an adapter of {len(self.pairs)} modules and scale {self.scale}"
            raise AggregationError(msg)

    def arrays(self) -> AdapterArrays:
        """Its tensors by PEFT's names, in float32; the scale is not in them.

        Raises:
            AggregationError: A value that float32 cannot hold.
        """
        arrays: AdapterArrays = {}
        with np.errstate(over="ignore"):
            for module, pair in self.pairs.items():
                arrays[tensor_name(module, Factor.A)] = pair.A.astype(np.float32)
                arrays[tensor_name(module, Factor.B)] = pair.B.astype(np.float32)
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                msg = f"tensor {name!r} of the new adapter has values that are not finite"
                raise AggregationError(msg)
        return arrays


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalAdapter:
    """What one agent's model is after its training."""

    adapter: LoraAdapter
    weight: int
    """FedAvg weight, at least 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """The agents of one round, in the order that the caller fixes.

    Guarantees:
        1. All agents have the same modules, each of the same d_in and d_out; ranks and scales may
           differ.
        2. Every value is finite.

    Raises (at construction): AggregationError: No agent, other modules or shapes, a weight below
    1, or a value that is not finite.
    """

    agents: tuple[LocalAdapter, ...]

    def __post_init__(self) -> None:
        if not self.agents:
            msg = "there is no agent to aggregate"
            raise AggregationError(msg)
        shapes = {module: pair.shape for module, pair in self.agents[0].adapter.pairs.items()}
        for index, agent in enumerate(self.agents):
            pairs = agent.adapter.pairs
            if agent.weight < 1:
                msg = f"agent {index} has weight {agent.weight}; at least 1"
                raise AggregationError(msg)
            if {module: pair.shape for module, pair in pairs.items()} != shapes:
                msg = f"agent {index} has other modules, or modules of other shapes, than the first"
                raise AggregationError(msg)
            if not all(np.isfinite(p.A).all() and np.isfinite(p.B).all() for p in pairs.values()):
                msg = f"the adapter of agent {index} has values that are not finite"
                raise AggregationError(msg)

    @property
    def modules(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(sorted(self.agents[0].adapter.pairs))

    @property
    def shares(self) -> NDArray[np.float64]:
        """p_k = w_k / Σ w, [n_agents]."""
        weights = np.array([agent.weight for agent in self.agents], np.float64)
        return weights / float(weights.sum())

    @property
    def scales(self) -> NDArray[np.float64]:
        """s_k, [n_agents]."""
        return np.array([agent.adapter.scale for agent in self.agents], np.float64)

    def pairs(self, module: str) -> list[Pair]:
        """One module's factors, of each agent."""
        return [agent.adapter.pairs[module] for agent in self.agents]

    def common_scale(self) -> float:
        """The scale of all agents, for rules that average factors.

        Raises:
            AggregationError: Scales or ranks differ.
        """
        first = self.agents[0].adapter
        for index, agent in enumerate(self.agents):
            ranks = {module: pair.rank for module, pair in agent.adapter.pairs.items()}
            if agent.adapter.scale != first.scale or any(
                rank != first.pairs[module].rank for module, rank in ranks.items()
            ):
                msg = (
                    f"agent {index} has another scale or rank than the first; average factors of "
                    "mixed ranks as padded updates, or stack them"
                )
                raise AggregationError(msg)
        return first.scale


def pairs_of(arrays: AdapterArrays) -> dict[str, Pair]:
    """Group an adapter's tensors into pairs by module.

    Guarantees:
        1. `LoraAdapter(pairs=pairs_of(arrays), …).arrays()` are the same tensors, bit for bit.

    Raises:
        AggregationError: A factor without its other one, or two that do not fit.
        quant.errors.AdapterError: A name that is not of a LoRA factor.
    """
    factors: dict[str, dict[Factor, NDArray[np.float32]]] = {}
    for name, array in arrays.items():
        factors.setdefault(module_of(name), {})[factor_of(name)] = array
    for module, found in factors.items():
        if len(found) != len(Factor):
            msg = f"module {module!r} has {', '.join(found)} alone; a product needs A and B"
            raise AggregationError(msg)
    return {
        module: Pair(A=found[Factor.A], B=found[Factor.B])
        for module, found in sorted(factors.items())
    }


def local_adapter(
    update: PlainUpdate, start: AdapterArrays, layout: VectorLayout, *, scale: float
) -> LocalAdapter:
    """An agent's adapter from its update: what it started from plus what it sent.

    Factors that the layout does not send stay the very arrays of `start`, so that they are equal
    for all agents, bit for bit.

    Args:
        update: Local minus global in the layout's order.
        start: The whole adapter of the release that the round started from.
        layout: Of what is sent.
        scale: s = alpha / rank.

    Raises:
        AggregationError: An update of another length.
        quant.errors.AdapterError: `start` does not hold what the layout names.
    """
    if update.vector.shape != (layout.n_values,):
        msg = f"an update of {update.vector.shape} values; the layout has {layout.n_values}"
        raise AggregationError(msg)
    moved = flatten(start, layout) + update.vector
    pairs = pairs_of({**start, **unflatten(moved, layout)})
    return LocalAdapter(adapter=LoraAdapter(pairs=pairs, scale=scale), weight=update.weight)

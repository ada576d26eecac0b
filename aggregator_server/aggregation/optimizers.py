"""Server optimisers: the mean update taken as a gradient step of the global adapter.

FedAvg adds the mean as it is; the others keep moments over the rounds. Each is a class of its own
settings, so that none has a setting that does nothing. They see the mean alone: under masks they
learn nothing more than FedAvg, and behind a mean with noise they spend no privacy.

```
FedAvg      step = η·Δ
FedAvgM     m ← β·m + Δ                                     step = η·m
FedAdagrad  m ← β₁·m + (1 − β₁)·Δ   v ← v + Δ²              step = η·m / (√v + τ)
FedAdam     m ← β₁·m + (1 − β₁)·Δ   v ← β₂·v + (1 − β₂)·Δ²  step = η·m / (√v + τ)
FedYogi     m ← β₁·m + (1 − β₁)·Δ   v ← v − (1 − β₂)·Δ²·sign(v − Δ²)
                                                            step = η·m / (√v + τ)
```

Source: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithms 1 and 2;
FedAvgM: Hsu et al., arXiv 1909.06335 (server momentum). As in algorithm 2, no moment is corrected
for its start. β₁, β₂ and τ default to what the paper's experiments fix, so FedAdagrad has no
momentum.
The paper tunes η for each task; 10⁻³ here is our choice: for an adapter, whose mean update is far
below τ in each value, the step is then about half of FedAvg's (η / (τ + τ)) and shrinks where
updates are large.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Self

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from aggregator_server.errors import AggregationError
from protocol.blocks import FedAvgBlock, OptimizerBlock

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """The mean update itself, times η; no state.

    Raises (at construction): AggregationError: A setting out of range. So do all below.
    """

    rule: ClassVar[str] = "fedavg"
    learning_rate: float = 1.0
    """η, above 0."""

    def __post_init__(self) -> None:
        _require_positive("learning_rate", self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class FedAvgM:
    """Momentum: the sum of the mean updates so far, older ones decayed."""

    rule: ClassVar[str] = "fedavgm"
    learning_rate: float = 1.0
    """η, above 0."""
    momentum: float = 0.9
    """β in [0, 1)."""

    def __post_init__(self) -> None:
        _require_positive("learning_rate", self.learning_rate)
        _require_decay("momentum", self.momentum)


@dataclass(frozen=True, kw_only=True)
class FedAdagrad:
    """Steps that shrink by all squares so far."""

    rule: ClassVar[str] = "fedadagrad"
    learning_rate: float = 1e-3
    """η, above 0."""
    beta1: float = 0.0
    """β₁ in [0, 1)."""
    tau: float = 1e-3
    """τ, above 0; v starts at τ²."""

    def __post_init__(self) -> None:
        _require_positive("learning_rate", self.learning_rate)
        _require_decay("beta1", self.beta1)
        _require_positive("tau", self.tau)


@dataclass(frozen=True, kw_only=True)
class FedAdam:
    """Steps that shrink by a decayed mean of squares."""

    rule: ClassVar[str] = "fedadam"
    learning_rate: float = 1e-3
    """η, above 0."""
    beta1: float = 0.9
    """β₁ in [0, 1)."""
    beta2: float = 0.99
    """β₂ in [0, 1)."""
    tau: float = 1e-3
    """τ, above 0; v starts at τ²."""

    def __post_init__(self) -> None:
        _require_positive("learning_rate", self.learning_rate)
        _require_decay("beta1", self.beta1)
        _require_decay("beta2", self.beta2)
        _require_positive("tau", self.tau)


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdam):
    """FedAdam whose v changes by Δ² at most, whichever of both is larger."""

    rule: ClassVar[str] = "fedyogi"


Optimizer = FedAvg | FedAvgM | FedAdagrad | FedAdam | FedYogi
RULES: Final[dict[str, type[Optimizer]]] = {
    kind.rule: kind for kind in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi)
}


def optimizer_of(block: OptimizerBlock) -> Optimizer:
    """The optimiser of a manifest.

    Args:
        block: The manifest's.

    Raises:
        AggregationError: A setting out of range.
    """
    if isinstance(block, FedAvgBlock):
        return FedAvg(learning_rate=block.learning_rate)
    return RULES[block.kind](**block.model_dump(exclude={"kind"}))


@dataclass(frozen=True, kw_only=True, eq=False)
class OptimizerState:
    """What an optimiser keeps between rounds: 8 or 16 bytes a value, in float64.

    Float64, because v starts at τ² = 10⁻⁶ and squares of an adapter's updates are near 10⁻¹⁴,
    which float32 would not add.

    Guarantees:
        1. `from_bytes(to_bytes(state))` has the same bits, and equal states give equal bytes, so a
           server that was killed goes on as one that was not.
        2. Reading runs nothing that the file says: safetensors holds numbers only.
    """

    rule: str
    """Whose moments these are; no other optimiser takes them."""
    n_steps: int
    """Means taken so far."""
    m: Float64Array | None
    """First moment, [n_values]; None where nothing is remembered (β₁ = 0)."""
    v: Float64Array | None
    """Second moment, [n_values], no value negative; None for FedAvgM."""

    def to_bytes(self) -> bytes:
        """A safetensors file; the rule's name is part of the tensors' names."""
        tensors: dict[str, NDArray[np.generic]] = {"n_steps": np.array([self.n_steps], np.int64)}
        if self.m is not None:
            tensors["m"] = self.m
        if self.v is not None:
            tensors["v"] = self.v
        # Not as metadata, whose order differs from one process to the next.
        return safetensors.numpy.save({f"{self.rule}.{name}": t for name, t in tensors.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote.

        Raises:
            AggregationError: Not such a file, or values that no optimiser leaves.
        """
        try:
            tensors = safetensors.numpy.load(data)
        except (SafetensorError, KeyError, ValueError) as error:
            msg = f"not an optimiser's state: {error}; restore it from a backup"
            raise AggregationError(msg) from error
        rules = {name.partition(".")[0] for name in tensors}
        rule = rules.pop() if len(rules) == 1 else ""
        if rule not in RULES or not set(tensors) <= {f"{rule}.{key}" for key in ("n_steps", *"mv")}:
            msg = f"not an optimiser's state: it holds {sorted(tensors)}; restore it from a backup"
            raise AggregationError(msg)
        n_steps = tensors.get(f"{rule}.n_steps")
        if n_steps is None or n_steps.shape != (1,) or n_steps.dtype != np.int64 or n_steps[0] < 0:
            msg = f"the state of {rule} does not say after how many steps it is"
            raise AggregationError(msg)
        m, v = (_read_moment(rule, name, tensors.get(f"{rule}.{name}")) for name in "mv")
        return cls(rule=rule, n_steps=int(n_steps[0]), m=m, v=v)


def initial_state(optimizer: Optimizer, *, n_values: int) -> OptimizerState | None:
    """Before the first mean: m is 0 and v is τ²; None for FedAvg, which keeps nothing.

    Args:
        optimizer: Its settings.
        n_values: Length of the means to come, at least 1.

    Source: arXiv 2003.00295, algorithm 2 (v₋₁ ≥ τ²).
    """
    if isinstance(optimizer, FedAvg):
        return None
    v = None if isinstance(optimizer, FedAvgM) else np.full(n_values, optimizer.tau**2)
    m = np.zeros(n_values) if _decay(optimizer) > 0 else None
    return OptimizerState(rule=optimizer.rule, n_steps=0, m=m, v=v)


def apply(
    optimizer: Optimizer, state: OptimizerState | None, mean: Float64Array
) -> tuple[Float64Array, OptimizerState | None]:
    """One server step.

    Guarantees:
        1. Nothing that is given changes: after a failure, or a kill before the result is stored,
           the same call gives the same bits again.
        2. FedAvg at η = 1 gives the mean itself, bit for bit, and keeps no state.
        3. The step and the new state are finite.

    Args:
        optimizer: Its settings.
        state: `initial_state`, or what the step before gave; None exactly for FedAvg.
        mean: The mean update, [n_values] float64.

    Returns:
        The step to add to the global vector, [n_values] float64, and the state after it.

    Raises:
        AggregationError: A mean that is not a finite vector; a state that is missing, of another
            optimiser or of another length; a step beyond float64.

    Source: the formulae at the top of this module.
    """
    if mean.ndim != 1 or not np.isfinite(mean).all():
        msg = f"the mean update has shape {mean.shape} or values that are not finite"
        raise AggregationError(msg)
    with np.errstate(over="ignore", invalid="ignore"):  # the results are checked as a whole
        if isinstance(optimizer, FedAvg):
            if state is not None:
                msg = f"fedavg keeps no state, and was given one of {state.rule}"
                raise AggregationError(msg)
            return _finite(optimizer, optimizer.learning_rate * mean), None
        before = _checked(optimizer, state, n_values=len(mean))
        m = _first_moment(optimizer, before.m, mean)
        if isinstance(optimizer, FedAvgM):
            v, step = None, optimizer.learning_rate * m
        else:
            v = _finite(optimizer, _second_moment(optimizer, before.v, mean))
            step = optimizer.learning_rate * m / (np.sqrt(v) + optimizer.tau)
    after = OptimizerState(
        rule=optimizer.rule,
        n_steps=before.n_steps + 1,
        m=None if before.m is None else m,  # finite where the step is: no factor of it is zero
        v=v,
    )
    return _finite(optimizer, step), after


def _decay(optimizer: FedAvgM | FedAdagrad | FedAdam) -> float:
    return optimizer.momentum if isinstance(optimizer, FedAvgM) else optimizer.beta1


def _first_moment(
    optimizer: FedAvgM | FedAdagrad | FedAdam, m: Float64Array | None, mean: Float64Array
) -> Float64Array:
    if m is None:  # β₁ = 0
        return mean
    if isinstance(optimizer, FedAvgM):
        return optimizer.momentum * m + mean
    return optimizer.beta1 * m + (1.0 - optimizer.beta1) * mean


def _second_moment(
    optimizer: FedAdagrad | FedAdam, v: Float64Array | None, mean: Float64Array
) -> Float64Array:
    square = mean * mean
    if v is None:
        msg = f"the state of {optimizer.rule} has no second moment"  # `_checked` refuses it before
        raise AggregationError(msg)
    if isinstance(optimizer, FedAdagrad):
        return v + square
    if isinstance(optimizer, FedYogi):
        return v - (1.0 - optimizer.beta2) * square * np.sign(v - square)
    return optimizer.beta2 * v + (1.0 - optimizer.beta2) * square


def _checked(
    optimizer: FedAvgM | FedAdagrad | FedAdam, state: OptimizerState | None, *, n_values: int
) -> OptimizerState:
    if state is None or state.rule != optimizer.rule:
        found = "no state" if state is None else f"the state of {state.rule}"
        msg = f"{optimizer.rule} was given {found}; begin with `initial_state` or its own last one"
        raise AggregationError(msg)
    expected = initial_state(optimizer, n_values=1)
    for name in ("m", "v"):
        moment = getattr(state, name)
        wanted = getattr(expected, name) is not None
        if (moment is not None) != wanted or (wanted and moment.shape != (n_values,)):
            shape = None if moment is None else moment.shape
            msg = (
                f"the state of {state.rule} has {name} of shape {shape}; "
                f"with these settings it is {(n_values,) if wanted else None}"
            )
            raise AggregationError(msg)
    return state


def _read_moment(rule: str, name: str, moment: NDArray[np.generic] | None) -> Float64Array | None:
    if moment is None:
        return None
    if moment.dtype != np.float64 or moment.ndim != 1:
        msg = f"{name} of {rule}: expected float64 [n], got {moment.dtype} {moment.shape}"
        raise AggregationError(msg)
    read = moment.astype(np.float64, copy=False)
    if not np.isfinite(read).all() or (name == "v" and (read < 0).any()):
        msg = f"{name} of {rule} has values that are not finite, or squares below zero"
        raise AggregationError(msg)
    return read


def _finite(optimizer: Optimizer, values: Float64Array) -> Float64Array:
    if not np.isfinite(values).all():
        msg = f"the step of {optimizer.rule} has values that are not finite"
        raise AggregationError(msg)
    return values


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        msg = f"{name} must be finite and above 0, not {value}"
        raise AggregationError(msg)


def _require_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        msg = f"{name} must be at least 0 and below 1, not {value}"
        raise AggregationError(msg)

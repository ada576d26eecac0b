"""Every rule for LoRA on the demo's federation in one process, for `benchmarks.lora_rules`.

Training and averaging are the product's own where the product knows the rule, and its libraries
where it does not. What an adapter cannot hold (the residual of FedEx-LoRA, the stack of FLoRA)
stands frozen beside the trained rows, as further rows of the same adapter: a 4-bit base takes none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import torch

from aggregator_server.aggregation import optimizers
from aggregator_server.aggregation.fedavg import average
from aggregator_server.aggregation.lora import fedex, flora
from aggregator_server.aggregation.lora_core import core_name, core_shapes
from aggregator_server.aggregation.lora_flex import flexlora_step
from aggregator_server.aggregation.lora_pairs import (
    Cohort,
    LocalAdapter,
    LoraAdapter,
    Pair,
    local_adapter,
    pairs_of,
)
from aggregator_server.aggregation.lora_products import best_rank, total
from aggregator_server.aggregation.robust.units import ArrayUnits
from benchmarks.dp_utility_jobs import agent_examples
from benchmarks.tiny_federation import Recipe, Visit, generator, train_update
from edge_agent.training.gradients import StepGradient
from edge_agent.training.trainer import ClipNorm, GradientTransform
from privacy.updates import CellSum, Float32Array, PlainUpdate
from protocol.blocks import Factor, LoraBlock, LoraRule
from protocol.layout import VectorLayout
from quant.adapter import AdapterArrays, factor_of, flatten, initial_adapter, sent_layout, unflatten
from quant.base_model import LoadedBase
from quant.lora import AdaptedModel
from quant.lora_function import AdaptedLayer
from quant.lora_turns import sent_factors
from quant.lora_vector import split

BOTH: Final = (Factor.A, Factor.B)
_ORDER_STREAM, _ADAPTER_STREAM = 2, 3


class Method(StrEnum):
    """How the adapters of all agents become one, by the names of their papers."""

    FEDIT = "fedit"
    FFA_LORA = "ffa-lora"
    ROLORA = "rolora"
    FLEXLORA = "flexlora"
    FEDSA_LORA = "fedsa-lora"
    FED_SB = "fed-sb"
    FLORA = "flora"
    FEDEX = "fedex"


@dataclass(frozen=True, kw_only=True)
class Federation:
    """The demo's agents under one seed, whatever the rule; all take part in every round.

    Attributes:
        base: Loaded once; no adapter is attached.
        recipe: Of the agents.
        seed: Of records, order of batches and release 0.
        optimizer: What the server does with a mean; rules that make no mean of factors add it.
    """

    base: LoadedBase
    recipe: Recipe
    seed: int
    optimizer: optimizers.Optimizer

    @property
    def lora(self) -> LoraBlock:
        """The adapter."""
        return self.recipe.lora(int(generator(self.seed, _ADAPTER_STREAM).integers(2**31)))

    def start(self, number: int = 0) -> AdapterArrays:
        """Release 0; under another number, factors drawn anew."""
        lora = self.lora
        drawn = lora.model_copy(update={"init_seed": lora.init_seed + number})
        return initial_adapter(self.base.description, drawn)

    def train(
        self,
        adapted: AdaptedModel,
        start: AdapterArrays,
        layout: VectorLayout,
        *,
        number: int,
        agent: int,
        transforms: tuple[GradientTransform, ...] | None = None,
    ) -> PlainUpdate:
        """What an agent sends in a round.

        Args:
            adapted: The model; its adapter is replaced.
            start: What the agent starts from.
            layout: Of the update.
            number: The round's, from 0.
            agent: Its number, from 0.
            transforms: Of the gradient; None: the recipe's clipping.
        """
        order = int(generator(self.seed, _ORDER_STREAM, number, agent).integers(2**31))
        return train_update(
            adapted,
            agent_examples(self.recipe, self.seed, agent),
            self.recipe.training,
            Visit(number=number, n_rounds=self.recipe.n_rounds, seed=order, transforms=transforms),
            start,
            layout,
        )

    def train_all(
        self,
        adapted: AdaptedModel,
        start: AdapterArrays,
        layout: VectorLayout,
        *,
        number: int,
        transforms: tuple[GradientTransform, ...] | None = None,
    ) -> list[PlainUpdate]:
        """What all agents send in a round that they start alike; arguments as of `train`."""
        return [
            self.train(adapted, start, layout, number=number, agent=agent, transforms=transforms)
            for agent in range(self.recipe.n_agents)
        ]


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a federation ended with.

    Attributes:
        adapted: The model.
        adapters: What to load into it: one adapter, or one for each agent.
        n_up: Values that an agent sent over all rounds.
        n_down: Values that it fetched.
    """

    adapted: AdaptedModel
    adapters: Mapping[str, AdapterArrays]
    n_up: int
    n_down: int


def federate(method: Method, federation: Federation) -> Made:
    """Run all rounds of a rule.

    Args:
        method: The rule.
        federation: Who, what and how often.
    """
    match method:
        case Method.FEDIT | Method.FFA_LORA | Method.ROLORA:
            return _by_means(LoraRule(method.value), federation)
        case Method.FEDSA_LORA:
            return _by_shared_a(federation)
        case Method.FLEXLORA:
            return _by_products(federation)
        case Method.FED_SB:
            return _by_cores(federation)
        case Method.FLORA | Method.FEDEX:
            return _beside_frozen_rows(method, federation)


def _mean(updates: Sequence[PlainUpdate]) -> np.ndarray:
    cells = map(CellSum.of_plain, updates)
    return average(cells, n_values=len(updates[0].vector)).mean


def _added(start: Float32Array, step: np.ndarray) -> Float32Array:
    return (start + step).astype(np.float32)


def _by_means(rule: LoraRule, federation: Federation) -> Made:
    """FedIT, FFA-LoRA, RoLoRA: the mean of what is sent, then the server's optimiser."""
    adapted = AdaptedModel(federation.base, federation.lora)
    release, state, n_sent = federation.start(), None, 0
    for number in range(federation.recipe.n_rounds):
        factors = sent_factors(rule, number)
        adapted.train_only(factors)
        layout = sent_layout(adapted.shapes(), factors)
        updates = federation.train_all(adapted, release, layout, number=number)
        if number == 0:
            state = optimizers.initial_state(federation.optimizer, n_values=layout.n_values)
        step, state = optimizers.apply(federation.optimizer, state, _mean(updates))
        release |= unflatten(_added(flatten(release, layout), step), layout)
        n_sent += layout.n_values
    return Made(adapted=adapted, adapters={"all": release}, n_up=n_sent, n_down=n_sent)


def _by_shared_a(federation: Federation) -> Made:
    """FedSA-LoRA: the mean of A; every agent keeps a B of its own, and has a model of its own."""
    adapted = AdaptedModel(federation.base, federation.lora)
    adapted.train_only(BOTH)
    whole = sent_layout(adapted.shapes(), BOTH)
    shared = sent_layout(adapted.shapes(), (Factor.A,))
    release, own = federation.start(), dict[int, AdapterArrays]()
    for number in range(federation.recipe.n_rounds):
        updates = []
        for agent in range(federation.recipe.n_agents):
            start = release | own.get(agent, {})
            update = federation.train(adapted, start, whole, number=number, agent=agent)
            moved = unflatten(_added(flatten(start, whole), update.vector), whole)
            own[agent] = {n: array for n, array in moved.items() if factor_of(n) is Factor.B}
            part = flatten(unflatten(update.vector, whole), shared)
            updates.append(PlainUpdate(vector=part, weight=update.weight))
        release |= unflatten(_added(flatten(release, shared), _mean(updates)), shared)
    n_sent = federation.recipe.n_rounds * shared.n_values
    personal = {str(agent): release | own[agent] for agent in sorted(own)}
    return Made(adapted=adapted, adapters=personal, n_up=n_sent, n_down=n_sent)


def _by_products(federation: Federation) -> Made:
    """FlexLoRA: the mean of the products, cut to the adapter's rank."""
    adapted = AdaptedModel(federation.base, federation.lora)
    adapted.train_only(BOTH)
    layout = sent_layout(adapted.shapes(), BOTH)
    vector = flatten(federation.start(), layout)
    for number in range(federation.recipe.n_rounds):
        updates = federation.train_all(adapted, unflatten(vector, layout), layout, number=number)
        units = ArrayUnits(
            np.stack([update.vector for update in updates]),
            np.array([update.weight for update in updates], np.int64),
        )
        vector = _added(vector, flexlora_step(units, vector, layout, federation.lora).step)
    n_sent = federation.recipe.n_rounds * layout.n_values
    release = unflatten(vector, layout)
    return Made(adapted=adapted, adapters={"all": release}, n_up=n_sent, n_down=n_sent)


class CoreModel(AdaptedModel):
    """A base with Fed-SB's adapter s·B·R·A: A and B stay, R [rank, rank] is trained."""

    def __init__(self, base: LoadedBase, lora: LoraBlock) -> None:
        """Attach it; every R is zero until `load`."""
        self.cores: dict[str, torch.nn.Parameter] = {}
        super().__init__(base, lora)
        for factor in self.factors.values():
            factor.requires_grad_(False)  # noqa: FBT003 - torch's
        self._core_shapes = {name: tuple(self.cores[name].shape) for name in sorted(self.cores)}
        n_values = sum(core.numel() for core in self.cores.values())
        self._weights, self._gradient = torch.zeros(n_values), torch.zeros(n_values)
        for name, part in self.parts(self._weights).items():
            self.cores[name].data = part

    def _take_over(self, module: torch.nn.Module, layer: AdaptedLayer) -> None:
        core = torch.nn.Parameter(torch.zeros(self.lora.rank, self.lora.rank))
        self.cores[core_name(layer.name)] = core

        def forward(x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = layer.base(x)
            return found + layer.scale * (x @ layer.a.T @ core.T @ layer.b.T)

        module.forward = forward

    @property
    def weights(self) -> torch.Tensor:
        """The cores."""
        return self._weights

    def trains(self, layout: VectorLayout) -> bool:
        """Whether a layout is of the cores."""
        return {slot.name: slot.shape for slot in layout.slots} == self._core_shapes

    def parts(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """By core."""
        return split(vector, self._core_shapes)

    def fresh_gradient(self) -> torch.Tensor:
        """That of the cores."""
        for name, part in self.parts(self._gradient).items():
            self.cores[name].grad = part
        return self._gradient.zero_()

    def load(self, arrays: Mapping[str, Float32Array]) -> None:
        """Put factors and cores in place."""
        super().load({name: array for name, array in arrays.items() if name not in self.cores})
        for name, part in self.parts(self._weights).items():
            part.copy_(torch.from_numpy(arrays[name]))

    def arrays(self) -> AdapterArrays:
        """Factors and cores."""
        cores = {name: core.detach().numpy().copy() for name, core in self.cores.items()}
        return super().arrays() | cores


def _by_cores(federation: Federation) -> Made:
    """Fed-SB: the mean of the cores; A from release 0, B drawn like it."""
    adapted = CoreModel(federation.base, federation.lora)
    layout = VectorLayout.of_shapes(core_shapes(adapted.shapes()))
    release = federation.start()
    rng = np.random.Generator(np.random.PCG64(federation.lora.init_seed))
    for name, array in release.items():
        if factor_of(name) is Factor.B:
            release[name] = (rng.standard_normal(array.shape) / array.shape[0] ** 0.5).astype(
                np.float32
            )
    vector = np.zeros(layout.n_values, np.float32)
    for number in range(federation.recipe.n_rounds):
        start = release | unflatten(vector, layout)
        updates = federation.train_all(adapted, start, layout, number=number)
        vector = _added(vector, _mean(updates))
    n_sent = federation.recipe.n_rounds * layout.n_values
    last = release | unflatten(vector, layout)
    return Made(adapted=adapted, adapters={"all": last}, n_up=n_sent, n_down=n_sent)


@dataclass(frozen=True)
class KeepRows:
    """Leaves gradient to the first rows of rank alone; what stands beside them stays frozen."""

    rank: int

    def __call__(self, gradient: StepGradient, *, step: int) -> None:  # noqa: ARG002 - interface
        """Zero the others in place."""
        for name, part in gradient.parts.items():
            frozen = part[self.rank :] if factor_of(name) is Factor.A else part[:, self.rank :]
            frozen.zero_()


@dataclass(frozen=True, kw_only=True)
class _Wide:
    """Trained rows and frozen ones as one adapter of a higher rank and the same scale."""

    lora: LoraBlock
    arrays: AdapterArrays

    @classmethod
    def of(cls, lora: LoraBlock, trained: AdapterArrays, frozen: LoraAdapter | None) -> "_Wide":
        if frozen is None:
            return cls(lora=lora, arrays=trained)
        pairs = pairs_of(trained)
        scale = lora.scale
        wide = {
            module: Pair(
                A=np.concatenate([pair.A, frozen.pairs[module].A]),
                B=np.concatenate([pair.B, frozen.pairs[module].B * (frozen.scale / scale)], axis=1),
            )
            for module, pair in pairs.items()
        }
        rank = next(iter(wide.values())).rank
        block = lora.model_copy(update={"rank": rank, "alpha": scale * rank})
        return cls(lora=block, arrays=LoraAdapter(pairs=wide, scale=scale).arrays())


def _beside_frozen_rows(method: Method, federation: Federation) -> Made:
    """FLoRA (the stack is frozen, new factors every round) and FedEx-LoRA (the residual is)."""
    lora, scale = federation.lora, federation.lora.scale
    release: AdapterArrays = federation.start()
    narrow = sent_layout({name: array.shape for name, array in release.items()}, BOTH)
    transforms = (KeepRows(lora.rank), ClipNorm(federation.recipe.clip_norm))
    frozen: LoraAdapter | None = None
    n_up = n_down = 0
    for number in range(federation.recipe.n_rounds):
        wide = _Wide.of(lora, release, frozen)
        adapted = AdaptedModel(federation.base, wide.lora)
        adapted.train_only(BOTH)
        layout = sent_layout(adapted.shapes(), BOTH)
        agents = []
        for update in federation.train_all(
            adapted, wide.arrays, layout, number=number, transforms=transforms
        ):
            own = {
                name: (array[: lora.rank] if factor_of(name) is Factor.A else array[:, : lora.rank])
                for name, array in unflatten(update.vector, layout).items()
            }
            plain = PlainUpdate(vector=flatten(own, narrow), weight=update.weight)
            agents.append(local_adapter(plain, release, narrow, scale=scale))
        adapted.detach()
        n_up += narrow.n_values
        # The stack of all; or the mean, and a gap of the rank of all but one.
        n_down += federation.recipe.n_agents * narrow.n_values
        if method is Method.FLORA:
            release, frozen = _stacked(agents, federation, frozen, number + 1)
        else:
            found = fedex(Cohort(agents=tuple(agents)), previous=frozen)
            release, frozen = found.adapter.arrays(), found.residual
    wide = _Wide.of(lora, release, frozen)
    last = AdaptedModel(federation.base, wide.lora)
    return Made(adapted=last, adapters={"all": wide.arrays}, n_up=n_up, n_down=n_down)


def _stacked(
    agents: Sequence[LocalAdapter], federation: Federation, frozen: LoraAdapter | None, number: int
) -> tuple[AdapterArrays, LoraAdapter]:
    """FLoRA's next start: factors drawn anew, beside all that was learnt."""
    stack = flora(Cohort(agents=tuple(agents)))
    start = pairs_of(federation.start())
    pairs = {}
    for module, pair in stack.pairs.items():
        # The stack is Σ p_k s B_k A_k; its own start s B_0 A_0 is zero, as B_0 is.
        parts = [pair] if frozen is None else [pair, frozen.pairs[module]]
        pairs[module] = total(parts, [1.0] * len(parts))
    rank = min(next(iter(pairs.values())).rank, max(min(pair.shape) for pair in start.values()))
    exact = {module: best_rank(pair, rank).pair for module, pair in pairs.items()}
    return federation.start(number), LoraAdapter(pairs=exact, scale=1.0)

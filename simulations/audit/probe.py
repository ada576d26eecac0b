"""The subspace probe: which words were in a batch, read off the change of the first layer's A.

The rows of the gradient of A are mixtures of the layer's inputs, which in the first layer are the
embeddings of the tokens, after the layer's norm. A token whose embedding lies in their span was in
the batch. Queries, keys and values of one layer have the same inputs, so their rows are taken
together: three times the rank. What every record has, the template's tokens, the adversary knows;
they are projected out, and only the others have to fit.

It works on a gradient, and on an update that is one, as plain SGD's is over few steps. What AdamW
makes of a gradient is no longer a mixture of inputs, unless its ε is large against the gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from edge_agent.data.tokens import Example
from privacy.auditing.membership import auc
from privacy.auditing.probes import subspace_distance
from protocol.blocks import Factor, Schedule
from quant.adapter import AdapterArrays, Float32Array, factor_of, module_of, unflatten
from simulations.audit.recipe import AuditRecipe, Claim
from simulations.audit.records import as_examples, ordinary_records
from simulations.audit.scores import Float64Array
from simulations.audit.training import Subject
from simulations.errors import AuditInputError

_PURPOSE: Final = 3
_N_EARLIER: Final = 64
_N_EARLIER_STEPS: Final = 10
_NEAR: Final = 0.05
"""A token nearer than this to the row space counts as found."""
_STRENGTH: Final = 1e-4
"""A direction of the row space weaker than this part of the strongest one is rounding."""
_LARGE_EPS: Final = 1.0
_SAME_INPUT: Final = ("q_proj", "k_proj", "v_proj")


class Seen(StrEnum):
    """What the adversary has of one step."""

    GRADIENT = "gradient"
    LINEAR = "AdamW update, eps 1"
    UPDATE = "AdamW update"
    NOISY = "gradient with noise"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was found in batches of one size.

    Attributes:
        seen: What the adversary had.
        n_examples: Records of a batch.
        n_batches: Batches that were probed.
        n_directions: Of the row space beside the known tokens, at most; mean over batches.
        n_unknown: Different tokens of a batch beside the known ones; mean over batches.
        n_found: Tokens found, over all batches.
        n_right: Of these, in their batch.
        n_wanted: Unknown tokens of all batches.
        auc: How often a token of the batch is nearer than another token; mean over batches.
    """

    seen: Seen
    n_examples: int
    n_batches: int
    n_directions: float
    n_unknown: float
    n_found: int
    n_right: int
    n_wanted: int
    auc: float

    @property
    def precision(self) -> float | None:
        """Of the tokens found, the part that is right; None where none was found."""
        return self.n_right / self.n_found if self.n_found else None

    @property
    def recall(self) -> float:
        """Of the unknown tokens, the part that was found."""
        return self.n_right / self.n_wanted


def probe_updates(
    subject: Subject,
    recipe: AuditRecipe,
    *,
    noise: Claim | None,
    secret: bytes | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[Probe, ...]:
    """Probe one step on batches of several sizes.

    The step begins at an adapter that earlier records have trained: at B = 0, where LoRA starts,
    A has no gradient.

    Args:
        subject: With both factors sent; its adapter is replaced.
        recipe: Sizes and seed.
        noise: The noise that is probed as well; None: none is.
        secret: Of the noise; None: the system's.
        on_batch: Told after each batch, `n_probe_batches` of them.

    Raises:
        AuditInputError: A is not sent, so it does not change.
        TrainingError: A training gave nothing.
    """
    if Factor.A not in subject.adapted.lora.sent:
        raise AuditInputError("B alone is sent: A does not change, and there is nothing to probe")
    rng = np.random.default_rng(np.random.SeedSequence([recipe.seed, _PURPOSE]))
    block = recipe.training(batch_size=16, n_steps=_N_EARLIER_STEPS)
    n_probed = max(recipe.probe_sizes) * recipe.n_probes
    records = ordinary_records(_N_EARLIER + n_probed, rng)
    examples = as_examples(records, subject.base.tokenizer, block)
    earlier, probed = examples[:_N_EARLIER], examples[_N_EARLIER:]
    off = Claim(
        epsilon=float("inf"),
        delta=recipe.delta,
        noise_multiplier=None,
        sampling_probability=1.0,
        n_steps=1,
    )
    start = subject.train(earlier, block, off, seed=recipe.seed, clip_norm=recipe.clip_norm).final
    found = []
    for seen, sizes in _experiments(recipe, noise):
        claim = off if noise is None or seen is not Seen.NOISY else noise
        for size in sizes:
            finder = _Finder(subject, recipe, _known(earlier))
            for number in range(recipe.n_probes):
                batch = probed[number * size : (number + 1) * size]
                change = _change(subject, recipe, seen, claim, batch, start, secret)
                finder.look(change, batch)
                on_batch()
            found.append(finder.result(seen, size))
    return tuple(found)


def n_probe_batches(recipe: AuditRecipe, *, noise: Claim | None) -> int:
    """How many batches `probe_updates` probes."""
    return recipe.n_probes * sum(len(sizes) for _, sizes in _experiments(recipe, noise))


def _experiments(recipe: AuditRecipe, noise: Claim | None) -> list[tuple[Seen, tuple[int, ...]]]:
    smallest = recipe.probe_sizes[:1]
    found = [
        (Seen.GRADIENT, recipe.probe_sizes),
        (Seen.LINEAR, smallest),
        (Seen.UPDATE, smallest),
    ]
    return found if noise is None else [*found, (Seen.NOISY, smallest)]


def _change(
    subject: Subject,
    recipe: AuditRecipe,
    seen: Seen,
    claim: Claim,
    batch: tuple[Example, ...],
    start: AdapterArrays,
    secret: bytes | None,
) -> AdapterArrays:
    block = recipe.training(batch_size=len(batch), n_steps=1)
    eps = _LARGE_EPS if seen is Seen.LINEAR else block.eps
    block = block.model_copy(update={"eps": eps, "schedule": Schedule.CONSTANT})
    everybody = Claim(
        epsilon=claim.epsilon,
        delta=claim.delta,
        noise_multiplier=claim.noise_multiplier,
        sampling_probability=1.0,  # whether a record is drawn is not the question here
        n_steps=1,
    )
    trained = subject.train(
        batch,
        block,
        everybody,
        seed=recipe.seed,
        clip_norm=recipe.clip_norm,
        start=start,
        secret=secret,
    )
    vector = trained.steps[0].gradient
    if seen in (Seen.LINEAR, Seen.UPDATE):
        vector = trained.update
    return unflatten(vector, subject.layout)


def _known(examples: tuple[Example, ...]) -> list[int]:
    """Tokens that every record has: the template's."""
    sets = [set(example.input_ids.tolist()) for example in examples]
    return sorted(set.intersection(*sets))


class _Finder:
    """Looks for tokens in changes, and counts."""

    def __init__(self, subject: Subject, recipe: AuditRecipe, known: list[int]) -> None:
        self._known = known
        inputs = first_inputs(subject)  # [V, d_in]
        basis = np.linalg.qr(inputs[known].T)[0]  # [d_in, k]
        self._apart: Float64Array = np.eye(inputs.shape[1]) - basis @ basis.T
        self._candidates = inputs @ self._apart
        self._others = np.setdiff1d(np.arange(len(inputs)), known)
        self._n_batches = recipe.n_probes
        self._n_found = self._n_right = self._n_wanted = 0
        self._n_directions: list[int] = []
        self._aucs: list[float] = []

    def look(self, change: AdapterArrays, batch: tuple[Example, ...]) -> None:
        rows = first_rows(change) @ self._apart
        strengths = np.linalg.svd(rows, compute_uv=False)
        rank = int((strengths > _STRENGTH * strengths[0]).sum())
        distances = subspace_distance(rows, self._candidates, rank=max(1, rank))
        tokens = np.concatenate([example.input_ids for example in batch])
        is_in = np.isin(self._others, tokens)
        near = distances[self._others] < _NEAR
        self._n_found += int(near.sum())
        self._n_right += int((near & is_in).sum())
        self._n_wanted += int(is_in.sum())
        self._n_directions.append(rank)
        self._aucs.append(auc(-distances[self._others][is_in], -distances[self._others][~is_in]))

    def result(self, seen: Seen, n_examples: int) -> Probe:
        return Probe(
            seen=seen,
            n_examples=n_examples,
            n_batches=self._n_batches,
            n_directions=float(np.mean(self._n_directions)),
            n_unknown=self._n_wanted / self._n_batches,
            n_found=self._n_found,
            n_right=self._n_right,
            n_wanted=self._n_wanted,
            auc=float(np.mean(self._aucs)),
        )


def first_rows(change: Mapping[str, Float32Array]) -> Float64Array:
    """The rows of all A of the first layer that read its input [3 · rank, d_in], of one strength.

    Args:
        change: By PEFT's names.

    Raises:
        AuditInputError: The adapter has none of them, or they did not change.
    """
    found = []
    for name in sorted(change):
        module = module_of(name)
        is_first = ".layers.0." in f".{module}" and module.rpartition(".")[2] in _SAME_INPUT
        if is_first and factor_of(name) is Factor.A and change[name].any():
            rows = change[name].astype(np.float64)
            found.append(rows / np.linalg.norm(rows))
    if not found:
        raise AuditInputError(
            "no A of the first layer's queries, keys or values changed, so there is nothing to "
            "probe"
        )
    return np.concatenate(found)


def first_inputs(subject: Subject) -> Float64Array:
    """What each token is to the first layer [V, d_in]: its embedding after the layer's norm."""
    model = subject.base.model
    norm = model.get_submodule("model.layers.0.input_layernorm")
    embeddings = model.get_input_embeddings()
    weight = embeddings.get_parameter("weight").detach()
    inputs: Float64Array = norm(weight).double().cpu().numpy()
    return inputs

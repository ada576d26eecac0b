"""Which examples make up the logical batch of each step.

A sampler is a pure function of (seed or secret, step): it has no cursor to save, and a resumed run
draws what an uninterrupted one would have drawn.
"""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from privacy.noise import SecureStream

SAMPLING_PURPOSE: Final = "sheepfold/dp-sgd/sampling"
_UINT32: Final = 1 << 32


class BatchSampler(Protocol):
    """Chooses the examples of a step."""

    def indices(self, step: int) -> NDArray[np.int64]:
        """The examples of step `step` (from 0): indices, possibly none, at most once each."""
        ...

    def n_steps(self, *, local_steps: int | None, local_epochs: int | None) -> int:
        """How many steps a round has; exactly one argument is set."""
        ...


@dataclass(frozen=True, kw_only=True)
class ShuffledBatches:
    """Epochs without replacement, each in an order of its own; the last batch may be short.

    Guarantees:
        1. In each epoch every example is drawn exactly once.
        2. The order depends on (seed, epoch) alone.

    Args:
        n_examples: At least 1.
        batch_size: At least 1.
        seed: Any non-negative integer.
    """

    n_examples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of one pass over the examples."""
        return -(-self.n_examples // self.batch_size)

    def indices(self, step: int) -> NDArray[np.int64]:
        """The examples of step `step`, shape [at most batch_size]."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        order = generator.permutation(self.n_examples)
        return order[batch * self.batch_size : (batch + 1) * self.batch_size].astype(np.int64)

    def n_steps(self, *, local_steps: int | None, local_epochs: int | None) -> int:
        """`local_steps`, or the batches of `local_epochs` passes."""
        if local_steps is not None:
            return local_steps
        return (local_epochs or 0) * self.steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class PoissonBatches:
    """Every example is in a step's batch by a coin of its own: batches vary, and may be empty.

    It is what the accounting of DP-SGD speaks of; shuffled batches of a fixed size are not, and
    nobody may know the coins.

    Guarantees:
        1. Each example is drawn with probability `probability` or up to 2^-32 less, independently
           of all others and of all other steps.
        2. The batches depend on (secret, step) alone.

    Args:
        n_examples: At least 1.
        probability: q, from 2^-32 to 1.
        secret: At least 32 bytes of this attempt that nobody else knows.

    Raises:
        ValueError: A probability that is none, or too small to be drawn.

    Source: Abadi et al. (arXiv 1607.00133), section 2; Chua et al., "How private are DP-SGD
    implementations?" (arXiv 2403.17673), for why it must be these.
    """

    n_examples: int
    probability: float
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Check the probability."""
        if not 1 / _UINT32 <= self.probability <= 1.0:
            msg = f"a sampling probability is from 2^-32 to 1, not {self.probability}"
            raise ValueError(msg)

    def __repr__(self) -> str:
        """For the digest of a run, without the secret."""
        known = hashlib.sha256(self.secret).hexdigest()
        return f"PoissonBatches({self.n_examples}, {self.probability!r}, secret sha256:{known})"

    def indices(self, step: int) -> NDArray[np.int64]:
        """The examples of step `step`, shape [any number up to n_examples]."""
        stream = SecureStream.of(self.secret, SAMPLING_PURPOSE, step)
        threshold = math.floor(self.probability * _UINT32) / _UINT32
        return np.flatnonzero(stream.uniform(self.n_examples) < threshold).astype(np.int64)

    def n_steps(self, *, local_steps: int | None, local_epochs: int | None) -> int:
        """`local_steps`, or as many as draw `local_epochs` times the examples in expectation."""
        if local_steps is not None:
            return local_steps
        return (local_epochs or 0) * math.ceil(1.0 / self.probability)

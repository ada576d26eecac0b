"""Which examples make up the logical batch of each step.

A sampler is a pure function of (seed, step): it has no cursor to save, and a resumed run draws
what an uninterrupted one would have drawn.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class BatchSampler(Protocol):
    """Chooses the examples of a step. Differential privacy brings a Poisson sampler of its own."""

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

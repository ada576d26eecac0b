"""What a step's gradient is made of: the mean over its examples, or a private release.

The engine cuts a logical batch into micro-batches and steps the optimiser; a rule says how a
micro-batch's gradients are taken and what becomes of their sum.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch

from edge_agent.errors import TrainingError
from privacy.dp_sgd.mechanism import Mechanism, clip_and_add, release
from privacy.errors import ClippingError
from privacy.noise import SecureStream
from quant.lora import AdaptedModel

Gradients = dict[str, torch.Tensor]

NOISE_PURPOSE: Final = "sheepfold/dp-sgd/noise"


class GradientRule(Protocol):
    """How the gradients of a logical batch become the one that the optimiser gets."""

    def add(
        self, adapted: AdaptedModel, losses: torch.Tensor, totals: Gradients, *, loss_scale: float
    ) -> bool:
        """Go backward from a micro-batch's losses [B] and add their gradients.

        Returns:
            False where the gradients overflowed at this loss scale; nothing was added.
        """
        ...

    def finish(self, totals: Gradients, *, n_examples: int, step: int) -> None:
        """Make the step's gradient of the sum over `n_examples`, in place."""
        ...


@dataclass(frozen=True)
class MeanGradient:
    """The mean over the examples. Not private."""

    def add(
        self, adapted: AdaptedModel, losses: torch.Tensor, totals: Gradients, *, loss_scale: float
    ) -> bool:
        """Add the gradient of the losses' sum."""
        (losses.sum() * loss_scale).backward()
        found = {
            name: factor.grad / loss_scale
            for name, factor in adapted.trainable.items()
            if factor.grad is not None
        }
        if loss_scale > 1.0 and not all(bool(g.isfinite().all()) for g in found.values()):
            return False
        for name, gradient in found.items():
            totals[name] += gradient
        return True

    def finish(self, totals: Gradients, *, n_examples: int, step: int) -> None:  # noqa: ARG002 - interface
        """Divide by the number of examples."""
        for total in totals.values():
            total.div_(max(1, n_examples))


@dataclass(frozen=True, kw_only=True)
class PrivateGradient:
    """DP-SGD (profile P1): each example's gradient clipped, noise on the sum, a fixed divisor.

    Guarantees:
        1. One example changes the sum of a step by at most the clip norm, whatever its gradient,
           also one that is not finite.
        2. The same secret and step give the same noise, so a step that is done again after a crash
           releases nothing new; another secret or step gives independent noise.
        3. Nothing that is trained goes without a gradient of single examples.

    Args:
        mechanism: Clip norm, noise multiplier, expected batch size.
        secret: At least 32 bytes of this attempt, of the system's generator; they stay here.
    """

    mechanism: Mechanism
    secret: bytes = field(repr=False)

    def __repr__(self) -> str:
        """For the digest of a run: another secret is another run, and nobody reads it from here."""
        known = hashlib.sha256(self.secret).hexdigest()
        return f"PrivateGradient({self.mechanism!r}, secret sha256:{known})"

    def add(
        self, adapted: AdaptedModel, losses: torch.Tensor, totals: Gradients, *, loss_scale: float
    ) -> bool:
        """Clip and add the gradients of single examples; never False.

        One that overflowed adds zero. Trying all again at another scale would let it show in how
        the others are rounded.

        Raises:
            TrainingError: Something is trained that cannot be clipped.
        """
        with adapted.per_example_gradients() as found:
            (losses.sum() * loss_scale).backward()
        for gradient in found.values():
            gradient.div_(loss_scale)
        self._check(adapted)
        try:
            clip_and_add(found, totals, clip_norm=self.mechanism.clip_norm)
        except ClippingError as error:
            msg = f"differential privacy is asked for, and {error}; nothing is trained"
            raise TrainingError(msg) from error
        return True

    def finish(self, totals: Gradients, *, n_examples: int, step: int) -> None:  # noqa: ARG002 - interface
        """Add the noise and divide by the expected batch size, whatever was drawn."""
        release(totals, self.mechanism, SecureStream.of(self.secret, NOISE_PURPOSE, step))

    @staticmethod
    def _check(adapted: AdaptedModel) -> None:
        """Whatever gets a gradient in the ordinary way goes past the clipping."""
        for name, parameter in adapted.model.named_parameters():
            if parameter.grad is not None:
                msg = (
                    f"differential privacy is asked for, and {name} is trained as a whole: its "
                    "gradient cannot be clipped example by example; nothing is trained"
                )
                raise TrainingError(msg)

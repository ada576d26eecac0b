"""The Gaussian mechanism of DP-SGD over a sum of clipped gradients.

For the examples b of one Poisson sample, gradients g_b over all tensors jointly, clip norm C, noise
multiplier z and expected batch size E:

    mean = (Σ_b g_b · min(1, C / ‖g_b‖) + N(0, z²C² I)) / E

Adding or removing one example changes the sum by at most C in L2 norm, so a step is a sampled
Gaussian mechanism of multiplier z, and E is no secret: it does not depend on the sample.

Source: Abadi et al. (arXiv 1607.00133), algorithm 1; Mironov, Talwar, Zhang (arXiv 1908.10530) for
sampling by independent coins.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from privacy.errors import ClippingError

Noise = Callable[[int], NDArray[np.float64]]
"""Gives the next n standard normal values: [n] float64, the caller's to change."""

_SLACK: Final = 1.0 - 1e-5
"""Keeps a clipped gradient within C in spite of float32 rounding."""


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What a step's release is made of.

    Attributes:
        clip_norm: C, in the units of a gradient; above 0.
        noise_multiplier: z, the noise's standard deviation over C; above 0.
        expected_batch: E = q · n, in examples; above 0.

    Raises:
        ClippingError: A value that is not finite, or not above 0.
    """

    clip_norm: float
    noise_multiplier: float
    expected_batch: float

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("clip_norm", "noise_multiplier", "expected_batch"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                msg = f"{name} = {value}; it must be finite and above 0"
                raise ClippingError(msg)


@dataclass(frozen=True)
class Clipped:
    """What became of the examples of a micro-batch; it stays on this machine."""

    n_examples: int
    n_clipped: int
    n_not_finite: int
    """Examples whose gradient is not finite; each adds zero."""


def clip_and_add(
    per_example: Mapping[str, torch.Tensor], totals: Mapping[str, torch.Tensor], *, clip_norm: float
) -> Clipped:
    """Add each example's gradient to the totals, scaled to an L2 norm of at most `clip_norm`.

    Guarantees:
        1. One example changes the totals by at most `clip_norm` in L2 norm over all tensors.
        2. An example with a value that is not finite adds zero, and changes nothing of the others'.
        3. Cutting a batch into several calls changes the totals by float32 rounding only.
        4. An error, also one of memory, leaves the totals as they were: nothing is added twice by
            trying again.

    Args:
        per_example: [B, *shape] float32 by name; every name of `totals`, no other.
        totals: [*shape] float32 by name, changed in place.
        clip_norm: C, above 0.

    Raises:
        ClippingError: A tensor is missing, or is of another shape: its layer was not seen by the
            backward pass, or gives a batch's examples as one. Nothing was added.
    """
    _check(per_example, totals)
    squares = [_squares(gradient) for gradient in per_example.values()]
    norms = torch.stack(squares).sum(0).sqrt()  # [B] float64
    finite = norms.isfinite()
    factors = (clip_norm * _SLACK / norms.clamp(min=clip_norm * _SLACK)).float()
    spoilt = not bool(finite.all())
    sums = {}
    for name, gradient in per_example.items():
        if spoilt:
            finite_rows = finite.view(-1, *[1] * (gradient.ndim - 1))
            gradient = torch.where(finite_rows, gradient, 0.0)  # noqa: PLW2901 - the same, made safe
        sums[name] = torch.tensordot(torch.where(finite, factors, 0.0), gradient, dims=1)
    for name, total in totals.items():
        total.add_(sums[name])
    return Clipped(
        n_examples=len(norms),
        n_clipped=int((finite & (norms > clip_norm)).sum()),
        n_not_finite=int((~finite).sum()),
    )


def release(totals: Mapping[str, torch.Tensor], mechanism: Mechanism, noise: Noise) -> None:
    """Turn sums of clipped gradients into the noisy mean, in place.

    Args:
        totals: [*shape] float32 by name; which numbers a tensor gets follows the order.
        mechanism: Noise and expected batch size.
        noise: Fresh for this step: its numbers are used for nothing else.
    """
    std = mechanism.noise_multiplier * mechanism.clip_norm
    for total in totals.values():
        values = torch.from_numpy(noise(total.numel())).to(total.device)
        # In float64, so that what is rounded is the noisy sum and not the noise.
        noisy = values.view_as(total).mul_(std).add_(total)
        total.copy_(noisy.div_(mechanism.expected_batch))


def _check(per_example: Mapping[str, torch.Tensor], totals: Mapping[str, torch.Tensor]) -> None:
    for name in [*totals, *per_example]:
        gradient, total = per_example.get(name), totals.get(name)
        if total is None or gradient is None:
            seen = "is not trained here" if total is None else "has no gradient of single examples"
            msg = f"{name} {seen}: it cannot be clipped, so nothing with it is private"
            raise ClippingError(msg)
        if gradient.shape[1:] != total.shape or not len(gradient):
            msg = (
                f"{name}: gradients of shape {list(gradient.shape)} where [B, "
                f"{', '.join(map(str, total.shape))}] is needed, B at least 1"
            )
            raise ClippingError(msg)
    if len({len(gradient) for gradient in per_example.values()}) > 1:
        msg = "the tensors' gradients are of different numbers of examples"
        raise ClippingError(msg)


def _squares(gradient: torch.Tensor) -> torch.Tensor:
    """The squared L2 norm of each example's gradient: [B] float64."""
    norms: torch.Tensor = torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.ndim)))
    return norms.double().square()

"""Dropout of an adapter's input, as a function of the example and the layer alone.

Which values of an example are dropped depends on its own seed and on the layer: not on the batch it
stands in, nor on its padding, nor on any generator. So a step's gradient stays the same however its
batch is cut to fit a device, activations that are computed again see the same mask, and a training
that is resumed equals one that ran through.

The gaps between dropped values are drawn from their geometric distribution, each from a hash of
seed, layer and its number. At the usual 5 % that costs a third of one random draw for each value.
"""

import math
from typing import Final

import torch


def _signed(value: int) -> int:
    """The 64 bits of an unsigned integer as torch's int64 reads them."""
    return value - 2**64 if value >= 2**63 else value


_WEYL: Final = _signed(0x9E3779B97F4A7C15)
_FIRST: Final = _signed(0xBF58476D1CE4E5B9)
_SECOND: Final = _signed(0x94D049BB133111EB)
_UNIT: Final = 2.0**-24


def dropped_places(
    x: torch.Tensor, *, seeds: torch.Tensor, layer: int, probability: float
) -> torch.Tensor:
    """Where an example's values are dropped.

    Guarantees:
        1. Each value is dropped with the given probability, independently of the others.
        2. An example's places depend on its seed and the layer alone: padding it, or putting others
           beside it, leaves them as they were.

    Args:
        x: [B, T, d], or [B·T, d] with the examples one after the other.
        seeds: [B] int64, one for each example, on the device of `x`.
        layer: Number of the layer.
        probability: Above 0, below 1.

    Returns:
        [n] int64 positions in the flattened `x`; those beyond an example's end are `x.numel()`, one
        past the last.

    Raises:
        ValueError: As many seeds as the batch has examples were not given.

    Source: SplitMix64 (Steele, Lea, Flood; OOPSLA 2014) for the hash.
    """
    n_values, left = divmod(x.numel(), len(seeds))
    if left or (x.ndim == 3 and len(x) != len(seeds)):
        msg = f"{len(seeds)} seeds for a batch of shape {list(x.shape)}; give one for each example"
        raise ValueError(msg)
    expected = n_values * probability
    # Six standard deviations more than expected: enough gaps but for one time in 10⁹.
    n_gaps = math.ceil(expected + 6.0 * math.sqrt(expected) + 10.0)
    streams = _hash(seeds + _signed((layer + 1) * 0xD1342543DE82EF95 % 2**64))  # [B]
    numbers = torch.arange(1, n_gaps + 1, device=x.device)  # [n]
    draws = _hash(streams[:, None] + numbers * _WEYL)  # [B, n]
    uniform = (draws >> 40).bitwise_and_(0xFFFFFF).float().mul_(_UNIT)  # in [0, 1), 24 bits
    gaps = uniform.neg_().log1p_().div_(math.log1p(-probability)).long().add_(1)
    places = gaps.cumsum(1).sub_(1)  # within the example
    starts = torch.arange(0, len(seeds) * n_values, n_values, device=x.device)
    return torch.where(places < n_values, places + starts[:, None], x.numel()).flatten()


def drop(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """A copy of `x` with zeros at the places.

    Args:
        x: Any shape.
        places: From `dropped_places`, for this shape.
    """
    padded = x.new_empty(x.numel() + 1)  # the last takes what lies past the end
    kept = padded[:-1].view(x.shape).copy_(x)
    padded.index_fill_(0, places, 0.0)
    return kept


def _hash(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shifted(z, 30)).mul_(_FIRST)
    z = (z ^ _shifted(z, 27)).mul_(_SECOND)
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, n_bits: int) -> torch.Tensor:
    """The bits of z moved right, zeros moved in: torch's own shift moves in the sign."""
    return (z >> n_bits).bitwise_and_(2 ** (64 - n_bits) - 1)

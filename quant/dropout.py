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
_LAYER: Final = _signed(0xD1342543DE82EF95)
_FIRST: Final = _signed(0xBF58476D1CE4E5B9)
_SECOND: Final = _signed(0x94D049BB133111EB)
_UNIT: Final = 2.0**-24
_BLOCK: Final = 512


def streams_of(seeds: torch.Tensor, *, n_layers: int) -> torch.Tensor:
    """The stream of random numbers of each layer and example.

    Args:
        seeds: [B] int64, one for each example.
        n_layers: How many layers drop.

    Returns:
        [n_layers, B] int64.
    """
    layers = torch.arange(1, n_layers + 1, device=seeds.device).mul_(_LAYER)
    return _mixed(layers[:, None] + seeds)


def dropped_places(x: torch.Tensor, *, streams: torch.Tensor, probability: float) -> torch.Tensor:
    """Where an example's values are dropped.

    Guarantees:
        1. Each value is dropped with the given probability, independently of the others.
        2. An example's places depend on its stream alone: padding it, or putting others beside it,
           leaves them as they were.

    Args:
        x: [B, T, d], or [B·T, d] with the examples one after the other.
        streams: [B] int64, a row of `streams_of`, on the device of `x`.
        probability: Above 0, below 1.

    Returns:
        [n] int64 positions in the flattened `x`; those beyond an example's end are `x.numel()`, one
        past the last.

    Raises:
        ValueError: As many streams as the batch has examples were not given.

    Source: SplitMix64 (Steele, Lea, Flood; OOPSLA 2014) for the hash, of which 24 bits are used.
    """
    n_examples = len(streams)
    n_values, left = divmod(x.numel(), n_examples)
    if left or (x.ndim == 3 and len(x) != n_examples):
        msg = f"{n_examples} streams for a batch of shape {list(x.shape)}; give one an example"
        raise ValueError(msg)
    expected = n_values * probability
    # Six standard deviations more than expected: enough gaps but for one time in 10⁹.
    n_gaps = math.ceil(expected + 6.0 * math.sqrt(expected) + 10.0)
    n_gaps += -n_gaps % _BLOCK
    # Few operations: a small base's step on a GPU lasts as long as the start of its kernels.
    numbers = torch.arange(1, n_gaps + 1, device=x.device)  # [n]
    draws = _mixed((streams[:, None] + numbers).mul_(_WEYL))  # [B, n]
    uniform = draws.bitwise_right_shift_(40).float().mul_(_UNIT)  # in [-1/2, 1/2), 24 bits
    gaps = uniform.add_(0.5 + _UNIT).log_().div_(math.log1p(-probability)).long()  # from 0 on
    places = _running_sums(gaps).add_(numbers)  # within the example, from 1 on
    starts = torch.arange(-1, n_examples * n_values - 1, n_values, device=x.device)
    return torch.where(places <= n_values, places + starts[:, None], x.numel()).flatten()


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


def _mixed(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64 without its last step, which leaves the upper 31 bits as they are; in place."""
    z.bitwise_xor_(_shifted(z, 30)).mul_(_FIRST)
    return z.bitwise_xor_(_shifted(z, 27)).mul_(_SECOND)


def _shifted(z: torch.Tensor, n_bits: int) -> torch.Tensor:
    """The bits of z moved right, zeros moved in: torch's own shift moves in the sign."""
    return (z >> n_bits).bitwise_and_(2 ** (64 - n_bits) - 1)


def _running_sums(values: torch.Tensor) -> torch.Tensor:
    """Cumulative sums along the rows of [B, n], n a multiple of the block."""
    if values.device.type == "cpu":
        return values.cumsum(1)
    # A GPU adds up a long row with few threads; many short ones keep all of them at work.
    blocks = values.view(len(values), -1, _BLOCK).cumsum(2)  # [B, n / block, block]
    before = blocks[:, :, -1].cumsum(1).sub_(blocks[:, :, -1])
    return blocks.add_(before[:, :, None]).view_as(values)

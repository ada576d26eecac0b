"""The reference NF4 codec holds its guarantees for arbitrary tensors."""

import bitsandbytes.functional as bnb
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from quant.nf4 import (
    BLOCK_SIZE,
    DOUBLE_QUANT_ERROR,
    ROUND_TRIP_ERROR,
    Float32Array,
    NestedAbsmax,
    dequantize_absmax,
    dequantize_nf4,
    pack_codes,
    quantize_nf4,
    unpack_codes,
)


@st.composite
def tensors(draw: st.DrawFn) -> Float32Array:
    """Tensors of any shape up to 3 dimensions, of normal magnitude, with zeros and repeats."""
    shape = draw(npst.array_shapes(max_dims=3, max_side=40))
    magnitude = st.floats(-1.0, 1.0, width=32, allow_subnormal=False)
    scale = np.float32(2.0 ** draw(st.integers(-60, 60)))
    values = draw(npst.arrays(np.float32, shape, elements=magnitude, fill=st.just(0.0)))
    # Products under the smallest normal number are zero: the guarantees speak of normal ones.
    tiny = np.abs(values) < np.float32(2.0**-30)
    return np.where(tiny, np.float32(0), values * scale).astype(np.float32)


def block_absmax(values: Float32Array) -> Float32Array:
    """The largest magnitude of each value's block, float32 [n]."""
    flat = np.abs(values.reshape(-1))
    blocks = [flat[i : i + BLOCK_SIZE] for i in range(0, flat.size, BLOCK_SIZE)]
    return np.concatenate([np.full(b.size, b.max(), dtype=np.float32) for b in blocks])


@settings(deadline=None, max_examples=60)
@given(tensors())
def test_codes_and_absmax_equal_those_of_bitsandbytes(values: Float32Array) -> None:
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(values), quant_type="nf4", blocksize=BLOCK_SIZE
    )
    ours = quantize_nf4(values, double_quant=False)
    assert isinstance(ours.absmax, np.ndarray)
    assert np.array_equal(ours.codes, packed.numpy().reshape(-1))
    assert np.array_equal(ours.absmax, state.absmax.numpy())


@settings(deadline=None, max_examples=60)
@given(tensors())
def test_round_trip_stays_within_its_bound_and_keeps_zero_and_absmax(values: Float32Array) -> None:
    decoded = dequantize_nf4(quantize_nf4(values, double_quant=False))
    absmax = block_absmax(values).reshape(values.shape)
    assert (np.abs(decoded - values) <= ROUND_TRIP_ERROR * absmax).all()
    assert not decoded[values == 0].any()
    assert np.array_equal(block_absmax(decoded), block_absmax(values))


@settings(deadline=None, max_examples=60)
@given(tensors())
def test_encoding_what_was_decoded_gives_the_same_codes(values: Float32Array) -> None:
    encoded = quantize_nf4(values, double_quant=False)
    again = quantize_nf4(dequantize_nf4(encoded), double_quant=False)
    assert np.array_equal(again.codes, encoded.codes)


@settings(deadline=None, max_examples=60)
@given(tensors())
def test_double_quantised_absmax_stays_within_its_bound(values: Float32Array) -> None:
    encoded = quantize_nf4(values, double_quant=True)
    assert isinstance(encoded.absmax, NestedAbsmax)
    exact = block_absmax(values)[::BLOCK_SIZE]
    nested = np.repeat(encoded.absmax.absmax, 256)[: exact.size]
    # The smallest stored absmax of a short last block is 1e-38, not zero.
    bound = DOUBLE_QUANT_ERROR * nested + 2.0**-22 * exact + 1e-38
    assert (np.abs(dequantize_absmax(encoded.absmax) - exact) <= bound).all()
    assert not dequantize_nf4(encoded)[values == 0].any()


@given(npst.arrays(np.uint8, st.integers(0, 200), elements=st.integers(0, 15)))
def test_packing_round_trips_any_codes(codes: np.ndarray) -> None:
    packed = pack_codes(codes)
    assert packed.size == (codes.size + 1) // 2
    assert np.array_equal(unpack_codes(packed, codes.size), codes)

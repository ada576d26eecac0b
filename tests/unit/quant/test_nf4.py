"""The reference NF4 codec against bitsandbytes, and its own edge cases."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from quant.errors import NF4Error
from quant.nf4 import (
    BLOCK_SIZE,
    DOUBLE_QUANT_ERROR,
    NF4_LEVELS,
    ROUND_TRIP_ERROR,
    TABLE_STEP,
    Float32Array,
    NestedAbsmax,
    NF4Array,
    dequantize_absmax,
    dequantize_nf4,
    dynamic_map,
    pack_codes,
    quantize_nf4,
    unpack_codes,
)

SHAPES = [(1,), (2,), (3,), (63,), (64,), (65,), (127,), (7, 9), (64, 64), (300, 64), (97, 33)]


def make_weights(shape: tuple[int, ...], *, scale: float = 0.02, seed: int = 0) -> Float32Array:
    """Normal values, as in a trained linear layer."""
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def bnb_encode(values: Float32Array, *, double_quant: bool) -> NF4Array:
    """The buffers that bitsandbytes writes, as an `NF4Array`."""
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(values),
        quant_type="nf4",
        blocksize=BLOCK_SIZE,
        compress_statistics=double_quant,
    )
    absmax: Float32Array | NestedAbsmax = state.absmax.numpy()
    if double_quant:
        absmax = NestedAbsmax(
            codes=state.absmax.numpy(),
            absmax=state.state2.absmax.numpy(),
            offset=float(state.offset),
        )
    return NF4Array(codes=packed.numpy().reshape(-1), absmax=absmax, shape=values.shape)


def bnb_decode(values: Float32Array, *, double_quant: bool) -> Float32Array:
    """What bitsandbytes makes of the values after a round trip."""
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(values),
        quant_type="nf4",
        blocksize=BLOCK_SIZE,
        compress_statistics=double_quant,
    )
    decoded: Float32Array = bnb.dequantize_4bit(packed, state).numpy().reshape(values.shape)
    return decoded


def exact_absmax(values: Float32Array) -> Float32Array:
    """The largest magnitude of each block, by a plain loop."""
    flat = np.abs(values.reshape(-1))
    starts = range(0, flat.size, BLOCK_SIZE)
    return np.array([flat[i : i + BLOCK_SIZE].max() for i in starts], dtype=np.float32)


class TestAgainstBitsandbytes:
    def test_levels_and_dynamic_map_are_the_same(self) -> None:
        assert np.array_equal(
            np.array(NF4_LEVELS, dtype=np.float32), bnb.get_4bit_type("nf4", device="cpu").numpy()
        )
        assert np.array_equal(dynamic_map(), bnb.create_dynamic_map().numpy())

    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("scale", [1e-42, 1e-30, 0.02, 1e30])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_codes_are_the_same_byte_by_byte(
        self, shape: tuple[int, ...], scale: float, double_quant: bool
    ) -> None:
        values = make_weights(shape, scale=scale)
        ours = quantize_nf4(values, double_quant=double_quant)
        assert np.array_equal(ours.codes, bnb_encode(values, double_quant=double_quant).codes)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_plain_absmax_is_the_same_bit_for_bit(self, shape: tuple[int, ...]) -> None:
        values = make_weights(shape)
        ours = quantize_nf4(values, double_quant=False)
        theirs = bnb_encode(values, double_quant=False)
        assert isinstance(ours.absmax, np.ndarray)
        assert isinstance(theirs.absmax, np.ndarray)
        assert np.array_equal(ours.absmax, theirs.absmax)

    def test_a_tie_goes_to_the_lower_code_on_both_sides(self) -> None:
        levels = np.array(NF4_LEVELS, dtype=np.float32)
        ties = (levels[:-1] + levels[1:]) / np.float32(2)
        values = np.zeros(BLOCK_SIZE, dtype=np.float32)
        values[:15], values[15] = ties, 1.0  # absmax 1: the values are their own scaled selves
        above = values.copy()
        above[:15] = np.nextafter(ties, np.float32(2))
        for block, first in ((values, 0), (above, 1)):
            ours = quantize_nf4(block, double_quant=False).codes
            assert unpack_codes(ours, BLOCK_SIZE)[:15].tolist() == list(range(first, 15 + first))
            assert np.array_equal(ours, bnb_encode(block, double_quant=False).codes)

    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_decoding_their_buffers_gives_their_values_bit_for_bit(
        self, shape: tuple[int, ...], double_quant: bool
    ) -> None:
        values = make_weights(shape)
        decoded = dequantize_nf4(bnb_encode(values, double_quant=double_quant))
        assert np.array_equal(decoded, bnb_decode(values, double_quant=double_quant))

    @pytest.mark.parametrize("shape", [(300, 64), (97, 333), (513, 256)])
    def test_double_quantised_absmax_of_both_is_within_the_stated_error(
        self, shape: tuple[int, ...]
    ) -> None:
        values = make_weights(shape)
        exact = exact_absmax(values)
        for encoded, error in (
            (quantize_nf4(values, double_quant=True), DOUBLE_QUANT_ERROR),
            (bnb_encode(values, double_quant=True), DOUBLE_QUANT_ERROR + TABLE_STEP),
        ):
            assert isinstance(encoded.absmax, NestedAbsmax)
            scale = np.repeat(encoded.absmax.absmax, 256)[: exact.size]
            bound = error * scale + 2.0**-22 * exact
            assert (np.abs(dequantize_absmax(encoded.absmax) - exact) <= bound).all()

    def test_offset_and_nested_absmax_agree_to_rounding(self) -> None:
        values = make_weights((513, 256))
        ours = quantize_nf4(values, double_quant=True).absmax
        theirs = bnb_encode(values, double_quant=True).absmax
        assert isinstance(ours, NestedAbsmax)
        assert isinstance(theirs, NestedAbsmax)
        assert ours.offset == pytest.approx(theirs.offset, rel=1e-6)
        np.testing.assert_allclose(ours.absmax, theirs.absmax, rtol=1e-4)
        # Near a midpoint their table picks the neighbour: rare, and never further than that.
        assert (ours.codes != theirs.codes).mean() < 0.02

    def test_a_bfloat16_checkpoint_widened_to_float32_gives_the_same_codes(self) -> None:
        values = torch.from_numpy(make_weights((64, 96))).to(torch.bfloat16)
        packed, _ = bnb.quantize_4bit(values, quant_type="nf4", blocksize=BLOCK_SIZE)
        ours = quantize_nf4(values.float().numpy(), double_quant=False)
        assert np.array_equal(ours.codes, packed.numpy().reshape(-1))


class TestCodec:
    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("shape", [*SHAPES, (), (2, 3, 5)])
    def test_round_trip_keeps_shape_and_error_bound(
        self, shape: tuple[int, ...], double_quant: bool
    ) -> None:
        values = make_weights(shape)
        encoded = quantize_nf4(values, double_quant=double_quant)
        decoded = dequantize_nf4(encoded)
        absmax = np.repeat(exact_absmax(values), BLOCK_SIZE)[: values.size].reshape(shape)
        bound = ROUND_TRIP_ERROR * absmax
        if isinstance(encoded.absmax, NestedAbsmax):
            lost = np.abs(dequantize_absmax(encoded.absmax) - exact_absmax(values))
            bound = bound + np.repeat(lost, BLOCK_SIZE)[: values.size].reshape(shape)
        assert decoded.shape == shape
        assert decoded.dtype == np.float32
        assert (np.abs(decoded - values) <= bound).all()

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_zeros_decode_to_zeros_between_other_blocks(self, double_quant: bool) -> None:
        values = make_weights((3 * BLOCK_SIZE + 5,))
        values[BLOCK_SIZE : 2 * BLOCK_SIZE] = 0.0
        values[-5:] = 0.0
        decoded = dequantize_nf4(quantize_nf4(values, double_quant=double_quant))
        assert not decoded[BLOCK_SIZE : 2 * BLOCK_SIZE].any()
        assert not decoded[-5:].any()
        assert decoded[:BLOCK_SIZE].any()

    def test_double_quantisation_costs_one_byte_a_block_and_five_a_nested_block(self) -> None:
        encoded = quantize_nf4(make_weights((512, 64)), double_quant=True)
        assert isinstance(encoded.absmax, NestedAbsmax)
        assert encoded.codes.nbytes == 512 * 64 // 2
        assert encoded.absmax.codes.nbytes == 512
        assert encoded.absmax.absmax.shape == (2,)

    def test_float16_is_taken_as_its_float32_self(self) -> None:
        values = make_weights((5, 64)).astype(np.float16)
        wide = quantize_nf4(values.astype(np.float32), double_quant=False)
        assert np.array_equal(quantize_nf4(values, double_quant=False).codes, wide.codes)

    def test_a_strided_array_is_read_row_by_row(self) -> None:
        values = make_weights((64, 96))
        turned = np.ascontiguousarray(values.T)
        assert np.array_equal(
            quantize_nf4(values.T, double_quant=False).codes,
            quantize_nf4(turned, double_quant=False).codes,
        )

    def test_the_first_code_is_in_the_high_half_and_an_odd_count_is_padded_with_zero(self) -> None:
        packed = pack_codes(np.array([1, 2, 15], dtype=np.uint8))
        assert packed.tolist() == [0x12, 0xF7]
        assert unpack_codes(packed, 3).tolist() == [1, 2, 15]


class TestRefusals:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_value_that_is_not_finite_is_refused(self, bad: float) -> None:
        values = make_weights((64,))
        values[3] = bad
        with pytest.raises(NF4Error, match="1 of 64 values are not finite"):
            quantize_nf4(values, double_quant=False)

    def test_an_empty_array_is_refused(self) -> None:
        with pytest.raises(NF4Error, match="nothing to encode"):
            quantize_nf4(np.zeros((0, 4), dtype=np.float32), double_quant=False)

    def test_another_dtype_is_refused(self) -> None:
        with pytest.raises(NF4Error, match="not float64"):
            quantize_nf4(np.zeros(4), double_quant=False)  # type: ignore[arg-type]

    def test_parts_of_a_wrong_length_or_type_are_refused(self) -> None:
        good = quantize_nf4(make_weights((65,)), double_quant=False)
        assert isinstance(good.absmax, np.ndarray)
        with pytest.raises(NF4Error, match=r"codes must be uint8 \[33\], got uint8 \[32\]"):
            NF4Array(codes=good.codes[:-1], absmax=good.absmax, shape=(65,))
        with pytest.raises(NF4Error, match=r"absmax must be float32 \[2\], got float32 \[1\]"):
            NF4Array(codes=good.codes, absmax=good.absmax[:1], shape=(65,))
        with pytest.raises(NF4Error, match=r"absmax must be float32 \[2\], got float64 \[2\]"):
            NF4Array(codes=good.codes, absmax=good.absmax.astype(np.float64), shape=(65,))
        with pytest.raises(NF4Error, match=r"shape \(0, 65\) holds no values"):
            NF4Array(codes=good.codes, absmax=good.absmax, shape=(0, 65))

    def test_a_code_that_needs_more_than_four_bits_is_refused(self) -> None:
        with pytest.raises(NF4Error, match="code 16 does not fit"):
            pack_codes(np.array([16], dtype=np.uint8))

    def test_packed_bytes_that_do_not_match_the_count_are_refused(self) -> None:
        with pytest.raises(NF4Error, match=r"packed codes must be uint8 \[3\]"):
            unpack_codes(np.zeros(2, dtype=np.uint8), 5)

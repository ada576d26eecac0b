"""A slow, readable NF4 codec in numpy: the oracle that the fast one is tested against.

NF4 (QLoRA, section 3) cuts a tensor, read row by row, into blocks of 64 values, scales each block
by its largest magnitude (its *absmax*) to [-1, 1] and keeps for every value the index of the
nearest of 16 fixed levels, the quantiles of a normal distribution. Two indices share a byte.
Double quantisation stores the absmax values themselves in 8 bits: their mean (the *offset*) is
subtracted, and blocks of 256 differences are scaled by a *nested absmax* and rounded to a fixed
map of 256 levels that is finer near zero.

The arithmetic, in single precision, and the order of the bytes are those of bitsandbytes 0.50, so
that packed codes compare byte by byte. Its conventions, which no paper states:

- a level owns the interval up to the *midpoint* to its upper neighbour, midpoint included: a tie
  goes to the lower code;
- full blocks are multiplied by the reciprocal of their absmax, a short last block is divided by
  it, which may differ in the last bit and so, rarely, in the code;
- an absmax under 1e-38 is replaced by 1e-38 before the reciprocal; in a short last block also in
  what is stored;
- the first of two values is in the high half of the byte; an odd count is padded with code 7
  (zero).

The 8-bit codes of the absmax values are the one place where we do not follow it: on the CPU
bitsandbytes looks them up in a table of 65,536 steps, so that values within half a step of a
midpoint (and tiny ones) get a neighbouring code. Here they go to the nearest level, ties to the
lower one. `DOUBLE_QUANT_ERROR` and `TABLE_STEP` bound what that can change.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quant.errors import NF4Error

BLOCK_SIZE: Final = 64
"""Values that share one absmax."""

NESTED_BLOCK_SIZE: Final = 256
"""Absmax values that share one nested absmax."""

NF4_LEVELS: Final[tuple[float, ...]] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 levels of NF4 (QLoRA, appendix E), exact in single precision."""

ROUND_TRIP_ERROR: Final = 0.1520
"""Largest |value - decoded value| of a block, in units of its absmax: half the widest gap."""

DOUBLE_QUANT_ERROR: Final = 0.00704
"""Largest |absmax - decoded absmax|, in units of the nested absmax: half the map's widest gap."""

TABLE_STEP: Final = 1.0 / 65_535.0
"""What the lookup table of bitsandbytes on the CPU may add to `DOUBLE_QUANT_ERROR`."""

_SMALLEST_ABSMAX: Final = np.float32(1e-38)
_N_LEVELS: Final = 16
_ZERO_CODE: Final = 7
_EXPONENTS: Final = 7  # decades of the 8-bit map, from 1e-6 to 1

Float32Array = NDArray[np.float32]
ByteArray = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class NestedAbsmax:
    """The absmax values of a tensor after double quantisation.

    Attributes:
        codes: uint8 [n_blocks], indices into `dynamic_map()`.
        absmax: float32 [ceil(n_blocks / 256)], the scale of each nested block.
        offset: the mean that was subtracted, exact in single precision.
    """

    codes: ByteArray
    absmax: Float32Array
    offset: float


@dataclass(frozen=True, kw_only=True, eq=False)
class NF4Array:
    """A tensor in NF4. Its parts are consistent: a value that exists can be decoded.

    Attributes:
        codes: uint8 [ceil(n / 2)], two codes a byte, the first in the high half.
        absmax: float32 [ceil(n / 64)], or the same in 8 bits.
        shape: of the tensor; n is its product.
    """

    codes: ByteArray
    absmax: Float32Array | NestedAbsmax
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that every part has the type and the length that the shape asks for.

        Raises:
            NF4Error: a part is of another type or length, or the shape is empty.
        """
        n = math.prod(self.shape)
        if n < 1 or min(self.shape, default=1) < 0:
            msg = f"shape {self.shape} holds no values"
            raise NF4Error(msg)
        n_blocks = _ceil_div(n, BLOCK_SIZE)
        _check_part("codes", self.codes, np.uint8, _ceil_div(n, 2))
        if isinstance(self.absmax, NestedAbsmax):
            n_nested = _ceil_div(n_blocks, NESTED_BLOCK_SIZE)
            _check_part("absmax.codes", self.absmax.codes, np.uint8, n_blocks)
            _check_part("absmax.absmax", self.absmax.absmax, np.float32, n_nested)
        else:
            _check_part("absmax", self.absmax, np.float32, n_blocks)

    @property
    def n_values(self) -> int:
        """Number of values of the tensor."""
        return math.prod(self.shape)


def quantize_nf4(
    array: NDArray[np.float16] | NDArray[np.float32], *, double_quant: bool
) -> NF4Array:
    """Encode a tensor in NF4, blocks of 64, optionally with its scales in 8 bits.

    Guarantees:
        1. The codes are those of bitsandbytes 0.50 on the CPU, byte by byte, for any finite input.
        2. Without double quantisation the absmax values are those of bitsandbytes, bit for bit.
        3. With it, each decodes to within `DOUBLE_QUANT_ERROR` nested absmax of the exact one,
           plus rounding (2**-22 of its value).
        4. Decoding returns each value of a block to within `ROUND_TRIP_ERROR` of the block's
           absmax, plus what the absmax itself lost to double quantisation.
        5. A zero decodes to zero. Without double quantisation the largest magnitude of a block is
           kept exactly, and what was decoded encodes to the same codes again.

        Guarantees 3 to 5 hold where every absmax is zero or from 1e-30 to 1e30: beyond, reciprocals
        and sums leave the range of normal single-precision numbers.

    Args:
        array: float16 or float32, any shape, finite. (A bfloat16 tensor is widened to float32
            first: that loses nothing.)
        double_quant: whether to quantise the absmax values too.

    Returns:
        The encoded tensor.

    Raises:
        NF4Error: the array is of another dtype, is empty, or holds a NaN or an infinity.

    Source: QLoRA, arXiv 2305.14314, section 3 and appendix E.
    """
    if array.dtype not in (np.float16, np.float32):
        msg = f"NF4 encodes float16 and float32, not {array.dtype}; convert the array first"
        raise NF4Error(msg)
    if array.size == 0:
        msg = f"an array of shape {array.shape} holds nothing to encode"
        raise NF4Error(msg)
    values = array.astype(np.float32).reshape(-1)
    if not np.isfinite(values).all():
        msg = f"{int((~np.isfinite(values)).sum())} of {values.size} values are not finite"
        raise NF4Error(msg)
    scaled, absmax = _scale_blocks(values)
    return NF4Array(
        codes=pack_codes(_nearest(scaled, np.array(NF4_LEVELS, dtype=np.float32))),
        absmax=quantize_absmax(absmax) if double_quant else absmax,
        shape=tuple(array.shape),
    )


def dequantize_nf4(encoded: NF4Array) -> Float32Array:
    """Decode a tensor from NF4.

    Guarantees:
        1. From buffers written by bitsandbytes it returns what bitsandbytes returns for float32,
           bit for bit.

    Args:
        encoded: the tensor in NF4, from `quantize_nf4` or built from another codec's buffers.

    Returns:
        float32 [*encoded.shape].
    """
    levels = np.array(NF4_LEVELS, dtype=np.float32)[unpack_codes(encoded.codes, encoded.n_values)]
    absmax = encoded.absmax
    if isinstance(absmax, NestedAbsmax):
        absmax = dequantize_absmax(absmax)
    scales = np.repeat(absmax, BLOCK_SIZE)[: encoded.n_values]
    decoded: Float32Array = (levels * scales).reshape(encoded.shape)
    return decoded


def quantize_absmax(absmax: Float32Array) -> NestedAbsmax:
    """Encode absmax values in 8 bits.

    Args:
        absmax: float32 [n_blocks], finite, not empty.

    Returns:
        Codes, nested absmax values and offset.
    """
    offset = np.float32(absmax.mean(dtype=np.float64))
    centred = absmax - offset
    nested = _block_absmax(centred, NESTED_BLOCK_SIZE)
    # A nested block of equal values has scale 0: divide by anything, the decoder multiplies by 0.
    divisor = np.where(nested > 0, nested, np.float32(1))
    scaled = centred / np.repeat(divisor, NESTED_BLOCK_SIZE)[: centred.size]
    return NestedAbsmax(codes=_nearest(scaled, dynamic_map()), absmax=nested, offset=float(offset))


def dequantize_absmax(nested: NestedAbsmax) -> Float32Array:
    """Decode absmax values from 8 bits.

    Args:
        nested: codes, nested absmax values and offset.

    Returns:
        float32 [n_blocks].
    """
    scales = np.repeat(nested.absmax, NESTED_BLOCK_SIZE)[: nested.codes.size]
    decoded: Float32Array = dynamic_map()[nested.codes] * scales + np.float32(nested.offset)
    return decoded


def dynamic_map() -> Float32Array:
    """Return the 256 levels of the 8-bit dynamic type, ascending.

    Seven decades from 1e-6 to 1, each split evenly between a tenth of its top and its top, the
    number of levels doubling with the decade; both signs; zero; and one. There is no minus one:
    the lowest level is -0.9930.

    Returns:
        float32 [256].

    Source: 8-bit approximations, arXiv 1511.04561; 8-bit optimizers, arXiv 2110.02861, as
    bitsandbytes spells it out.
    """
    levels = [np.float32(0), np.float32(1)]
    for decade in range(_EXPONENTS):
        bounds = _linspace(0.1, 1.0, 2**decade + 1)
        scale = np.float32(10.0 ** (decade - _EXPONENTS + 1))
        for mean in (bounds[:-1] + bounds[1:]) / np.float32(2):
            levels += [scale * mean, -scale * mean]
    return np.sort(np.array(levels, dtype=np.float32))


def pack_codes(codes: ByteArray) -> ByteArray:
    """Put two 4-bit codes into each byte, the first in the high half.

    Args:
        codes: uint8 [n], each under 16; an odd count is padded with the code of zero.

    Returns:
        uint8 [ceil(n / 2)].

    Raises:
        NF4Error: a code is 16 or more.
    """
    if codes.size and int(codes.max()) >= _N_LEVELS:
        msg = f"code {int(codes.max())} does not fit into 4 bits"
        raise NF4Error(msg)
    padded = np.concatenate([codes, np.full(codes.size % 2, _ZERO_CODE, dtype=np.uint8)])
    packed: ByteArray = (padded[::2] << np.uint8(4)) | padded[1::2]
    return packed


def unpack_codes(packed: ByteArray, n_values: int) -> ByteArray:
    """Take the 4-bit codes out of their bytes.

    Args:
        packed: uint8 [ceil(n_values / 2)].
        n_values: how many codes to return; the padding of an odd count is dropped.

    Returns:
        uint8 [n_values], each under 16.

    Raises:
        NF4Error: the bytes hold fewer or more codes than that.
    """
    _check_part("packed codes", packed, np.uint8, _ceil_div(n_values, 2))
    codes = np.empty(2 * packed.size, dtype=np.uint8)
    codes[::2] = packed >> np.uint8(4)
    codes[1::2] = packed & np.uint8(0x0F)
    return codes[:n_values]


def _scale_blocks(values: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Return values [n] over their block's absmax, clamped to [-1, 1], and absmax [n_blocks]."""
    absmax = _block_absmax(values, BLOCK_SIZE)
    n_full = values.size - values.size % BLOCK_SIZE
    n_full_blocks = n_full // BLOCK_SIZE
    # The stored absmax of a full block is exact, that of a short one is held above the minimum.
    absmax[n_full_blocks:] = np.maximum(absmax[n_full_blocks:], _SMALLEST_ABSMAX)
    reciprocal = np.float32(1) / np.maximum(absmax[:n_full_blocks], _SMALLEST_ABSMAX)
    scaled = np.empty_like(values)
    scaled[:n_full] = values[:n_full] * np.repeat(reciprocal, BLOCK_SIZE)
    scaled[n_full:] = values[n_full:] / np.repeat(absmax[n_full_blocks:], values.size - n_full)
    return np.clip(scaled, np.float32(-1), np.float32(1)), absmax


def _block_absmax(values: Float32Array, block_size: int) -> Float32Array:
    """Return the largest magnitude of each block, float32 [ceil(n / block_size)]."""
    result: Float32Array = np.maximum.reduceat(
        np.abs(values), np.arange(0, values.size, block_size)
    )
    return result


def _nearest(values: Float32Array, levels: Float32Array) -> ByteArray:
    """Return the index of the level nearest to each value, the lower one of two as near."""
    midpoints = (levels[:-1] + levels[1:]) / np.float32(2)
    codes: NDArray[np.intp] = np.searchsorted(midpoints, values, side="left")
    return codes.astype(np.uint8)


def _linspace(start: float, stop: float, n: int) -> Float32Array:
    """Space n points evenly as torch does: single-precision step, from both ends, fused.

    A fused multiply-add rounds once; in double precision the product is exact, so rounding the
    sum to single precision at the end is the same.
    """
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(n - 1))
    index = np.arange(n)
    upward = np.float64(first) + step * index
    downward = np.float64(last) - step * (n - 1 - index)
    return np.where(index < n // 2, upward, downward).astype(np.float32)


def _check_part(name: str, part: NDArray[np.generic], dtype: type[np.generic], size: int) -> None:
    """Raise NF4Error unless the part is a vector of this dtype and length."""
    if part.dtype != dtype or part.shape != (size,):
        msg = (
            f"{name} must be {np.dtype(dtype).name} [{size}], "
            f"got {part.dtype.name} {_shape_text(part.shape)}"
        )
        raise NF4Error(msg)


def _shape_text(shape: Sequence[int]) -> str:
    return "[" + ", ".join(str(n) for n in shape) + "]"


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)

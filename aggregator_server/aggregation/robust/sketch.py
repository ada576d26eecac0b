"""A random projection of each update to a few thousand dimensions, of which inner products survive.

Spectral scores need inner products of all pairs of updates: n² times 17.9 million multiplications.
On sketches they are n² times four thousand, and the updates are read once.

The values are cut into blocks of `n_dims`. In each block every value gets a random sign of its own,
the block is rotated by a random offset, and all blocks are added up. Both are needed. With signs
alone, a hostile agent who knows the layout could put all its energy where one bucket will collect
it (values 17, 17 + n_dims, 17 + 2·n_dims, …): its sketch would be one random number, near zero in a
tenth of the rounds, and all its fellows' sketches parallel or opposite at random. With rotations
alone, energy of both signs would cancel. The seed of both must be drawn after the uploads close,
or an update could be made that its sketch does not show.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from aggregator_server.aggregation.robust.units import Float64Array
from aggregator_server.errors import AggregationError
from privacy.noise import KEY_BYTES, SecureStream
from privacy.updates import Float32Array

N_DIMS: Final = 4096
_MIN_DIMS: Final = 8
_CHUNK_VALUES: Final = 1 << 15
_SIGN_BIT: Final = 31


class Sketcher:
    """One linear map S from n_values to n_dims dimensions.

    Guarantees:
        1. Linear: the sketch of a·x + b·y is a·Sx + b·Sy, so updates may be scaled afterwards.
        2. Unbiased: over the seeds, E⟨Sx, Sy⟩ = ⟨x, y⟩ for any x and y fixed before the seed.
        3. Var⟨Sx, Sy⟩ ≤ (‖x‖²·‖y‖² + ⟨x, y⟩²) / n_dims, wherever x and y have their energy; a
           norm is thus right to √(1/(2·n_dims)), 1.1 % at 4096, as its standard deviation.
        4. Equal seeds give equal sketches.
        5. Memory: n_values / 8 bytes for the signs, and half a megabyte of buffers.

    The variance: over the signs, ⟨Sx, Sy⟩ − ⟨x, y⟩ is a sum over pairs that share a bucket, of
    (x_i·y_j + x_j·y_i) with independent signs. Two values of one block never share a bucket; two of
    different blocks do with probability 1/n_dims, as the difference of their offsets is uniform.

    Args:
        seed: 32 bytes, drawn after the uploads were closed.
        n_values: Length of an update, at least 1.
        n_dims: Length of a sketch; a power of two from 8.

    Raises:
        AggregationError: A seed of another length, or a number that cannot be.

    Source: Charikar, Chen and Farach-Colton, "Finding frequent items in data streams" (2002), as
    the feature hashing of Weinberger et al. (arXiv 0902.2206). We deviate in the hash: buckets are
    independent between blocks and distinct within one, which the variance above allows, and which
    needs no scattered writes.
    """

    def __init__(self, seed: bytes, *, n_values: int, n_dims: int = N_DIMS) -> None:
        """Draw signs and offsets."""
        if len(seed) != KEY_BYTES:
            msg = f"the seed of a sketch has {KEY_BYTES} bytes, not {len(seed)}"
            raise AggregationError(msg)
        if n_values < 1 or n_dims < _MIN_DIMS or n_dims & (n_dims - 1):
            msg = (
                f"a sketch of {n_values} values to {n_dims} dimensions; "
                f"expected at least 1 value, and a power of two from {_MIN_DIMS} dimensions"
            )
            raise AggregationError(msg)
        self.n_values = n_values
        self.n_dims = n_dims
        n_blocks = -(-n_values // n_dims)
        signs = SecureStream.of(seed, "sketch signs", 0).take_bytes(-(-n_values // 8))
        self._packed_signs = np.frombuffer(signs, np.uint8)
        offsets = SecureStream.of(seed, "sketch offsets", 0).take_bytes(4 * n_blocks)
        # n_dims divides 2^32, so the remainder of uniform words is uniform.
        self._offsets = [int(word) % n_dims for word in np.frombuffer(offsets, "<u4")]

    def sketch(self, vector: Float32Array) -> Float64Array:
        """Project an update.

        Args:
            vector: [n_values] float32, contiguous.

        Returns:
            [n_dims] float64. Not finite where the vector is not.

        Raises:
            AggregationError: A vector of another length or type.
        """
        if vector.shape != (self.n_values,) or vector.dtype != np.float32:
            msg = f"a vector of {vector.shape} {vector.dtype}; expected ({self.n_values},) float32"
            raise AggregationError(msg)
        n_dims = self.n_dims
        chunk = max(n_dims, _CHUNK_VALUES)
        words: NDArray[np.uint32] = np.empty(chunk, np.uint32)
        signed = np.empty(chunk)
        blocks = signed.reshape(-1, n_dims)
        twice = np.zeros(2 * n_dims)  # a rotated block runs past the end; folded below
        raw = vector.view(np.uint32)
        block = 0
        with np.errstate(invalid="ignore"):
            for start in range(0, self.n_values, chunk):
                run = raw[start : start + chunk]
                bits = np.unpackbits(self._packed_signs[start // 8 : (start + chunk) // 8])
                part = words[: len(run)]
                np.copyto(part, bits[: len(run)])
                np.left_shift(part, _SIGN_BIT, out=part)
                np.bitwise_xor(part, run, out=part)  # a random bit onto each value's sign
                np.copyto(signed[: len(run)], part.view(np.float32))
                signed[len(run) :] = 0.0
                for row in blocks[: -(-len(run) // n_dims)]:
                    offset = self._offsets[block]
                    twice[offset : offset + n_dims] += row
                    block += 1
            return twice[:n_dims] + twice[n_dims:]

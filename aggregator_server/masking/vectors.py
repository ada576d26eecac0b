"""The bytes of masked vectors and of sums among the blobs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from aggregator_server.blobs import Blobs
from aggregator_server.errors import AggregationError
from aggregator_server.store.store import Store
from privacy.fixed_point import EncodingPlan, decode
from privacy.masking import Words
from privacy.updates import CellSum
from protocol.limits import PART_BYTES
from protocol.wire import sha256

SUMS: Final = "sums"
"""Where the sums of cells are kept among the blobs."""


@dataclass(frozen=True, kw_only=True)
class StoredPart:
    """A part of a masked vector."""

    key: str
    sha256: bytes


@dataclass(frozen=True, kw_only=True)
class PartReader:
    """Reads slices of every member's vector; plain values, so that other processes can have it."""

    blobs: Blobs
    vectors: tuple[tuple[StoredPart, ...], ...]

    def __call__(self, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop` of each vector.

        Args:
            start: A multiple of the part's size.
            stop: At most one part further.

        Raises:
            AggregationError: A part has changed on disk since it was accepted.
            BlobError: It cannot be read.
        """
        for parts in self.vectors:
            part = parts[start // PART_BYTES]
            data = self.blobs.read(part.key)
            if len(data) != stop - start or sha256(data) != part.sha256:
                msg = f"{part.key} has changed on disk since it was accepted"
                raise AggregationError(msg)
            yield data


def sum_key(transcript: bytes) -> str:
    """Where the sum of a cell is kept."""
    return f"{SUMS}/{transcript.hex()}"


def put_sum(blobs: Blobs, transcript: bytes, payload: Words) -> bytes:
    """Store a checked sum.

    Returns:
        Its SHA-256.

    Raises:
        NoSpaceError: It does not fit; nothing was stored.
    """
    data = payload.tobytes()
    blobs.put(sum_key(transcript), data)
    return sha256(data)


def sweep_sums(store: Store, blobs: Blobs) -> None:
    """Delete the sums of rounds that are over.

    Raises:
        BlobError: One cannot be deleted; calling again goes on.
    """
    for transcript in store.cells.deletable_sums():
        blobs.delete(sum_key(transcript))
        store.cells.sum_deleted(transcript)


def load_sum(blobs: Blobs, transcript: bytes, digest: bytes, plan: EncodingPlan) -> CellSum:
    """The sum of a cell.

    Raises:
        AggregationError: Its bytes are no longer those that were stored.
        BlobError: They cannot be read.
    """
    data = blobs.read(sum_key(transcript))
    if sha256(data) != digest:
        msg = f"the sum of cell {transcript.hex()[:12]} has changed on disk"
        raise AggregationError(msg)
    return cell_sum(np.frombuffer(data, plan.dtype), plan)


def cell_sum(payload: Words, plan: EncodingPlan) -> CellSum:
    """What the words of a checked sum say of their cell.

    Args:
        payload: [n_payload] words from `fixed_point.checked_sum`.
        plan: Of the round.

    Raises:
        SumError: Another length.
    """
    found = decode(payload, plan)
    return CellSum(
        weighted_sum=found.values * np.float32(plan.max_weight),
        weight_sum=found.weight_sum,
        n_members=found.n_members,
        row_weights=found.row_weights,
    )

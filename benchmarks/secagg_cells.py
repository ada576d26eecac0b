"""Cells of `simulations.masked_cells` as the benchmark wants them: their blocks, drops and crowds.

What is timed by `benchmarks.secagg` is the code of `privacy` and `aggregator_server.unmask` itself.
"""

import hashlib
import random
import time
from collections.abc import Sequence
from typing import IO, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from aggregator_server.unmask import Unmasker
from privacy.fixed_point import EncodingPlan, agreed_layout, encode
from privacy.masked_vector import masked_runs
from privacy.masking import Words
from privacy.noise import SecureStream
from privacy.secagg.agent import MaskPlan
from protocol.blocks import CellMasking
from protocol.layout import VectorLayout
from simulations.masked_cells import (
    CellTerms,
    LostCell,
    Member,
    SimulatedCell,
    Stage,
    masked_sum,
)

_LATE_FRAC: Final = 0.2


def masking_for(n_members: int, word_bits: Literal[16, 32] = 16) -> CellMasking:
    """A block under which `n_members` ready agents make one cell."""
    target = max(5, n_members // 2 + 1)
    return CellMasking(
        word_bits=word_bits,
        max_change=0.02,
        clip_norm=1e6,
        cell_target=target,
        max_cell=max(n_members, 2 * target - 1),
    )


def terms_for(n_values: int, masking: CellMasking) -> CellTerms:
    """The terms of a vector of `n_values` in one tensor."""
    layout = agreed_layout(VectorLayout.of_shapes({"update": (n_values,)}), masking)
    return CellTerms(
        plan=EncodingPlan.of(layout, masking, max_weight=1),
        masking=masking,
        federation=bytes(16),
        round_number=1,
        round_digest=bytes(32),
    )


def update_of(n_values: int, seed: int) -> NDArray[np.float32]:
    """What an agent might have trained."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.002, n_values).astype(np.float32)


def payload_of(n_values: int, seed: int, plan: EncodingPlan) -> Words:
    """The same, encoded."""
    return encode(update_of(n_values, seed), weight=1, plan=plan, stream=SecureStream())


def make_cell(n_members: int, n_values: int, masking: CellMasking) -> SimulatedCell:
    """A cell that waits for SHARES.

    Args:
        n_members: m.
        n_values: d.
        masking: The manifest's block.
    """
    return SimulatedCell(terms_for(n_values, masking), n_members)


def shared_cell(n_members: int, n_values: int, masking: CellMasking) -> SimulatedCell:
    """The same, all of whose members have shared.

    Args:
        n_members: m.
        n_values: d.
        masking: The manifest's block.
    """
    cell = make_cell(n_members, n_values, masking)
    cell.share(cell.members)
    cell.server.close_sharing()
    return cell


def mask_into(file: IO[bytes], payload: Words, plan: MaskPlan, encoding: EncodingPlan) -> bytes:
    """Write an encoded update under its masks, in parts as the agent does; its SHA-256."""
    digest = hashlib.sha256()
    for run in masked_runs(payload, plan.masks, plan.checks, encoding):
        digest.update(run.data)
        file.write(run.data)
    return digest.digest()


def unmask(
    cell: SimulatedCell, vectors: Sequence[Words], unmasker: Unmasker
) -> tuple[Words, float]:
    """The sum of a cell whose members have revealed, and how long the server took.

    Rebuilding secrets, adding the vectors up, removing the masks, checking the sum.
    """
    began = time.perf_counter()
    payload = cell.unmask(vectors, unmasker)
    return payload, time.perf_counter() - began


def prepared(
    n_members: int, n_values: int, n_drops: int, masking: CellMasking
) -> tuple[SimulatedCell, list[Words], Words]:
    """A cell that has revealed, `n_drops` of whose members shared and sent nothing more.

    Returns:
        The cell, the survivors' masked vectors, and the true sum of their payloads.
    """
    cell = shared_cell(n_members, n_values, masking)
    gone = cell.members[:: max(1, n_members // max(1, n_drops))][:n_drops]
    alive = [member for member in cell.members if member not in gone]
    vectors, total = [], np.zeros(cell.plan.n_payload, cell.plan.dtype)
    for number, member in enumerate(alive):
        payload = payload_of(n_values, number, cell.plan)
        masked = cell.masked(payload, cell.take_bundle(member))
        vectors.append(masked)
        total += payload
        cell.upload(member, hashlib.sha256(masked.data).digest())
    cell.server.close_uploading()
    confirmed = cell.confirm(alive)
    if confirmed is None:
        raise RuntimeError("too few survivors")
    cell.reveal(alive, confirmed)
    return cell, vectors, total


def crowd_cell(
    n_members: int, n_values: int, masking: CellMasking, rng: random.Random, drop_frac: float
) -> dict[str, Any]:
    """One cell of a crowd, whose members vanish at random stages; exact, or lost.

    Args:
        n_members: m.
        n_values: d.
        masking: The block.
        rng: Decides who vanishes when, and who is late: late messages come last in their stage.
        drop_frac: Chance of each member to vanish somewhere.
    """
    terms = terms_for(n_values, masking)
    vanishings = {
        place: rng.choice(list(Stage)) for place in range(n_members) if rng.random() < drop_frac
    }

    def late_last(members: Sequence[Member]) -> list[Member]:
        late = [member for member in members if rng.random() < _LATE_FRAC]
        return [member for member in members if member not in late] + late

    payloads = [payload_of(n_values, number, terms.plan) for number in range(n_members)]
    found = masked_sum(terms, payloads, vanishings, arrive=late_last)
    if isinstance(found, LostCell):
        return {"lost": found.reason.value, "n_gone": len(vanishings)}
    total = np.zeros(terms.plan.n_payload, terms.plan.dtype)
    for place in range(n_members):
        if vanishings.get(place, Stage.BEFORE_REVEAL) > Stage.BEFORE_UPLOAD:
            total += payloads[place]
    exact = bool(np.array_equal(found.payload, total))
    return {"lost": None, "n_gone": len(vanishings), "exact": exact}

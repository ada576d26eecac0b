"""A simulated cell without its cryptography says what the cell with all of it says."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.fixed_point import EncodingPlan, agreed_layout, encode
from privacy.masking import Words
from privacy.noise import SecureStream
from protocol.blocks import CellMasking
from protocol.layout import VectorLayout
from protocol.wire import sha256
from simulations.masked_cells import (
    CellOutcome,
    CellTerms,
    CellTotal,
    Stage,
    masked_sum,
    plain_sum,
)

HONEST, WRAPPING, LONG, LYING = "honest", "wrapping", "long", "lying"
"""What the words are: encoded updates; any that the ring holds; a mean beyond the clip norm; a
count that is none."""


def make_terms(*, word_bits: Any, colluders: int | None, kind: str) -> CellTerms:
    masking = CellMasking(
        word_bits=word_bits,
        max_change=0.5,
        clip_norm=0.1 if kind == LONG else 1e6,
        cell_target=5,
        max_cell=9,
        colluders=colluders,
    )
    layout = agreed_layout(VectorLayout.of_shapes({"a": (17, 11), "b": (40,)}), masking)
    return CellTerms(
        plan=EncodingPlan.of(layout, masking, max_weight=50),
        masking=masking,
        federation=sha256(b"federation")[:16],
        round_number=3,
        round_digest=sha256(b"round"),
    )


def make_payload(plan: EncodingPlan, rng: np.random.Generator, kind: str, place: int) -> Words:
    weight = int(rng.integers(1, plan.max_weight + 1))
    if kind == HONEST:
        vector = rng.normal(0, 0.1, plan.layout.n_values).astype(np.float32)
        return encode(vector, weight=weight, plan=plan, stream=SecureStream(rng.bytes(32)))
    words = rng.integers(0, 2**plan.word_bits, plan.n_payload).astype(plan.dtype)
    words[-3:] = weight, 1 + (kind == LYING and place == 2), int(rng.integers(0, 2))
    return words


def told(outcome: CellOutcome) -> object:
    """An outcome as a value that can be compared."""
    if isinstance(outcome, CellTotal):
        return outcome.counted, outcome.payload.dtype, outcome.payload.tobytes()
    return outcome


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    n_members=st.integers(5, 9),
    word_bits=st.sampled_from([16, 32]),
    colluders=st.none() | st.integers(1, 4),
    kind=st.sampled_from([HONEST, HONEST, WRAPPING, WRAPPING, LONG, LYING]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_guarantee_1_of_the_plain_sum_it_says_what_the_masked_one_says(
    n_members: int,
    word_bits: Any,
    colluders: int | None,
    kind: str,
    seed: int,
    data: st.DataObject,
) -> None:
    terms = make_terms(word_bits=word_bits, colluders=colluders, kind=kind)
    # As many leave as the cell tolerates, or one more, or any number.
    most = n_members - terms.threshold(n_members)
    n_gone = data.draw(st.sampled_from([most, most + 1]) | st.integers(0, n_members))
    gone = data.draw(st.permutations(range(n_members)))[:n_gone]
    vanishings = {place: data.draw(st.sampled_from(Stage)) for place in gone}
    shuffled = data.draw(st.randoms(use_true_random=False))
    rng = np.random.default_rng(seed)
    payloads = [make_payload(terms.plan, rng, kind, place) for place in range(n_members)]
    before = [payload.copy() for payload in payloads]

    def arrive(members: Sequence[Any]) -> list[Any]:
        return shuffled.sample(members, len(members))

    masked = masked_sum(terms, payloads, vanishings, arrive=arrive)
    plain = plain_sum(terms, payloads, vanishings)
    assert told(masked) == told(plain)
    for payload, was in zip(payloads, before, strict=True):
        np.testing.assert_array_equal(payload, was)

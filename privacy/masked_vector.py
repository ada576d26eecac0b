"""An encoded update under its masks, made a run at a time: nothing holds the whole of it."""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from privacy.fixed_point import EncodingPlan, fill_with_checks
from privacy.masking import Mask, MaskAdder, Words

RUN_BYTES: Final = 1024 * 1024
"""Of a run: it stays in the cache while every mask is added and its digest is taken."""


def masked_runs(
    payload: Words, masks: Sequence[Mask], checks: Words, plan: EncodingPlan
) -> Iterator[Words]:
    """The masked vector in order: the payload with check words in it, plus every mask.

    Args:
        payload: [n_payload] words from `fixed_point.encode`; may be a file mapped into memory.
        masks: With their signs.
        checks: [16] check words.
        plan: Of the federation.

    Yields:
        Runs of at most 1 MiB; each is good until the next one is asked for.
    """
    adder = MaskAdder(masks, word_bits=plan.word_bits)
    step = RUN_BYTES // plan.dtype.itemsize
    buffer = np.empty(min(step, plan.n_words), plan.dtype)
    for start in range(0, plan.n_words, step):
        run = buffer[: min(step, plan.n_words - start)]
        fill_with_checks(run, payload, checks, plan, start)
        adder.add(run)
        yield run

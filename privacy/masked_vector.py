"""An encoded update under its masks, made a run at a time: nothing holds the whole of it."""

from collections.abc import Iterator, Sequence
from typing import Final

from privacy.fixed_point import EncodingPlan, with_checks
from privacy.masking import Mask, MaskAdder, Words

RUN_BYTES: Final = 4 * 1024 * 1024
"""Of a run; a multiple of the cipher's block, so that any run of a vector can be made by itself."""


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
        Runs of at most 4 MiB; each is the caller's.
    """
    adder = MaskAdder(masks, word_bits=plan.word_bits)
    step = RUN_BYTES // plan.dtype.itemsize
    for start in range(0, plan.n_words, step):
        run = with_checks(payload, checks, plan, start, min(start + step, plan.n_words))
        adder.add(run)
        yield run

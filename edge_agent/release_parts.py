"""The files that a release is put together from: agents fetch what a round changed, no more."""

from collections.abc import Callable

from edge_agent.errors import TrustError
from protocol.blocks import Factor, LoraBlock, LoraRule
from protocol.chain import BlobRef, Release
from quant.lora_turns import changed_factors

Parts = list[tuple[BlobRef, tuple[Factor, ...]]]


def parts_of(
    release: Release, lora: LoraBlock, release_of: Callable[[int], Release | None]
) -> Parts:
    """The files of a release, newest first, and the factors in each.

    The file that a release names as `sent` holds what its round changed. What that leaves out
    stands in the file of the release before; what no round changes, in the adapter of release 0.

    Args:
        release: Of a verified chain.
        lora: The manifest's block.
        release_of: Gives the earlier ones by number; None for one that was not seen.

    Raises:
        TrustError: An earlier release was not seen.
    """
    parts: Parts = []
    missing = set(Factor)
    at: Release | None = release
    while missing:
        if at is None:
            msg = f"release {release.number} stands on one that was never seen; run the agent first"
            raise TrustError(msg)
        if at.rolled_back_to is not None:
            at = release_of(at.rolled_back_to)
            continue
        changed = changed_factors(lora.rule, at.number)
        if missing & set(changed):
            parts.append((at.sent, changed))
            missing -= set(changed)
        if missing and at.number == 0:
            parts.append((at.adapter, tuple(Factor)))
            missing.clear()
        elif missing:
            at = release_of(at.number - 1 if missing & set(lora.sent) else 0)
    return parts


def round_n_bytes(lora: LoraBlock, first: Release) -> int:
    """Size of the factors that travel in a round; of the larger one where they take turns.

    Args:
        lora: The manifest's block.
        first: Release 0.
    """
    if lora.rule is LoraRule.ROLORA:
        return max(first.sent.n_bytes, first.adapter.n_bytes - first.sent.n_bytes)
    return first.sent.n_bytes

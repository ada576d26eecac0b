"""When an open round ends: a pure decision from numbers and the time."""

from dataclasses import dataclass
from enum import Enum

from aggregator_server.store.rows import RoundProgress, UploadProgress
from protocol.blocks import RoundsBlock
from protocol.chain import RoundManifest
from protocol.limits import PART_BYTES


class Ending(Enum):
    """What becomes of an open round now."""

    WAIT = "wait"
    CLOSE = "close"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """An ending with its reason, in words for people."""

    ending: Ending
    reason: str


def decide(
    rules: RoundsBlock,
    manifest: RoundManifest,
    progress: RoundProgress,
    *,
    now: float,
) -> Decision:
    """Whether an open round goes on, closes or fails.

    | Situation | Ending |
    | --- | --- |
    | `cohort_target` uploads | close |
    | every place that is held has an upload, `min_cohort` reached | close |
    | before the deadline | wait |
    | deadline past, an upload moves, before the cap | wait |
    | deadline past, `min_cohort` reached | close |
    | deadline past, fewer | fail |

    Args:
        rules: The federation's block.
        manifest: The round's times.
        progress: Uploads so far; free places have been filled with all who are present.
        now: Seconds since the Unix epoch.
    """
    n = progress.n_accepted
    enough = n >= rules.min_cohort
    if n >= rules.cohort_target:
        return Decision(ending=Ending.CLOSE, reason=f"{n} uploads, the target")
    if enough and progress.n_open == 0:
        return Decision(ending=Ending.CLOSE, reason=f"all {n} that could upload have")
    if now < manifest.deadline_at:
        return Decision(ending=Ending.WAIT, reason="before the deadline")
    if now < manifest.cap_at and any(
        moves(
            upload,
            deadline_at=manifest.deadline_at,
            rate=rules.min_upload_bytes_per_s,
            now=now,
        )
        for upload in progress.receiving
    ):
        return Decision(ending=Ending.WAIT, reason="an upload is moving")
    if enough:
        return Decision(ending=Ending.CLOSE, reason=f"{n} uploads at the deadline")
    return Decision(
        ending=Ending.FAIL, reason=f"too few uploads: {n} of at least {rules.min_cohort}"
    )


def moves(upload: UploadProgress, *, deadline_at: float, rate: float, now: float) -> bool:
    """Whether an upload began in time and goes on at a rate that is worth waiting for.

    Args:
        upload: How far it has come.
        deadline_at: Before which it must have begun, in seconds since the Unix epoch.
        rate: Least bytes per second.
        now: Seconds since the Unix epoch.
    """
    # Bytes arrive in whole parts, so the part on its way counts as arrived.
    on_its_way = min(PART_BYTES, upload.n_bytes - upload.n_bytes_received)
    elapsed_s = now - upload.started_at
    in_time = upload.started_at < deadline_at
    return in_time and upload.n_bytes_received + on_its_way >= rate * elapsed_s

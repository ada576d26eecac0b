"""When an open round ends: the table of `decide`, row by row."""

import pytest

from aggregator_server.closing import Ending, decide
from aggregator_server.store.rows import RoundProgress, UploadProgress
from protocol.blocks import RoundsBlock
from protocol.chain import BlobRef, RoundManifest
from protocol.limits import PART_BYTES

OPENED = 1000.0
DEADLINE = OPENED + 3600
CAP = OPENED + 7200
RATE = 1000.0
RULES = RoundsBlock(
    n_rounds=1,
    cohort_target=4,
    min_cohort=2,
    deadline_s=3600,
    cap_s=7200,
    min_upload_bytes_per_s=RATE,
)
MANIFEST = RoundManifest(
    federation=bytes(16),
    federation_digest=bytes(32),
    round=1,
    release=0,
    release_digest=bytes(32),
    sent=BlobRef(sha256=bytes(32), n_bytes=1),
    selection_seed=bytes(32),
    cohort_size=5,
    schedule_start=0.0,
    schedule_end=1.0,
    update_n_bytes=100,
    opened_at=OPENED,
    deadline_at=DEADLINE,
    cap_at=CAP,
)


def progress(n_accepted: int, *, n_open: int, receiving: tuple[UploadProgress, ...] = ()):
    return RoundProgress(
        n_selected=n_accepted + n_open,
        n_accepted=n_accepted,
        n_open=n_open,
        bytes_received=0,
        receiving=receiving,
        n_ready=0,
    )


def uploading(*, started_at: float, n_bytes_received: int) -> tuple[UploadProgress, ...]:
    n_bytes = 100 * PART_BYTES
    return (
        UploadProgress(started_at=started_at, n_bytes=n_bytes, n_bytes_received=n_bytes_received),
    )


MOVING = uploading(started_at=DEADLINE - 10, n_bytes_received=0)
STALLED = uploading(started_at=OPENED - 10_000, n_bytes_received=0)
LATE = uploading(started_at=DEADLINE + 1, n_bytes_received=0)


@pytest.mark.parametrize(
    ("state", "now", "ending"),
    [
        (progress(3, n_open=2), OPENED, Ending.WAIT),
        (progress(4, n_open=1), OPENED, Ending.CLOSE),
        (progress(5, n_open=0), OPENED, Ending.CLOSE),
        (progress(2, n_open=0), OPENED, Ending.CLOSE),
        (progress(1, n_open=0), OPENED, Ending.WAIT),
        (progress(0, n_open=0), OPENED, Ending.WAIT),
        (progress(2, n_open=3), DEADLINE - 1, Ending.WAIT),
        (progress(2, n_open=3), DEADLINE, Ending.CLOSE),
        (progress(1, n_open=4), DEADLINE, Ending.FAIL),
        (progress(2, n_open=3, receiving=MOVING), DEADLINE, Ending.WAIT),
        (progress(1, n_open=3, receiving=MOVING), DEADLINE, Ending.WAIT),
        (progress(1, n_open=3, receiving=STALLED), DEADLINE, Ending.FAIL),
        (progress(2, n_open=3, receiving=STALLED), DEADLINE, Ending.CLOSE),
        (progress(2, n_open=3, receiving=LATE), DEADLINE + 2, Ending.CLOSE),
        (progress(2, n_open=3, receiving=MOVING), CAP, Ending.CLOSE),
        (progress(1, n_open=3, receiving=MOVING), CAP, Ending.FAIL),
    ],
)
def test_an_open_round_ends_by_the_table(state, now, ending):
    assert decide(RULES, MANIFEST, state, now=now).ending is ending


def test_an_upload_moves_while_it_keeps_the_least_rate_counting_the_part_on_its_way():
    elapsed_s = PART_BYTES / RATE
    started_at = DEADLINE - 1
    for extra_s, ending in ((-1, Ending.WAIT), (1, Ending.FAIL)):
        now = started_at + 2 * elapsed_s + extra_s
        state = progress(
            1,
            n_open=3,
            receiving=uploading(started_at=started_at, n_bytes_received=PART_BYTES),
        )
        manifest = MANIFEST.model_copy(update={"cap_at": now + 1})
        assert decide(RULES, manifest, state, now=now).ending is ending


def test_a_failure_says_how_many_were_needed():
    decision = decide(RULES, MANIFEST, progress(1, n_open=4), now=DEADLINE)
    assert decision.reason == "too few uploads: 1 of at least 2"

"""Bodies with rules of their own."""

import json
from collections.abc import Callable

import pytest

from protocol.chain import RoundManifest
from protocol.errors import ManifestError
from protocol.limits import MAX_PARTS, MAX_UPDATE_BYTES, PART_BYTES
from protocol.messages import (
    TaskReply,
    TrainTask,
    UploadHeader,
    UploadState,
    UploadStatus,
    WaitReason,
    WaitTask,
)
from protocol.signing import Signer, sign
from protocol.wire import parse


def make_header(n_bytes: int, **changes: object) -> UploadHeader:
    values: dict[str, object] = {
        "federation": bytes(16),
        "round": 1,
        "attempt": 1,
        "agent": bytes(32),
        "round_digest": bytes(32),
        "layout": bytes(32),
        "weight": 1,
        "body_sha256": bytes(32),
        "body_n_bytes": n_bytes,
    }
    return UploadHeader(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n_bytes", "n_parts", "last"),
    [
        (1, 1, 1),
        (PART_BYTES - 1, 1, PART_BYTES - 1),
        (PART_BYTES, 1, PART_BYTES),
        (PART_BYTES + 1, 2, 1),
        (MAX_UPDATE_BYTES, MAX_PARTS, PART_BYTES),
    ],
)
def test_the_parts_add_up_to_the_body(n_bytes: int, n_parts: int, last: int) -> None:
    header = make_header(n_bytes)
    assert header.n_parts == n_parts
    assert header.part_n_bytes(n_parts - 1) == last
    assert sum(header.part_n_bytes(part) for part in range(n_parts)) == n_bytes


def test_every_field_of_a_header_is_in_its_digest() -> None:
    header = make_header(8)
    others = [
        {"federation": bytes([1]) * 16},
        {"round": 2},
        {"attempt": 2},
        {"agent": bytes([1]) * 32},
        {"round_digest": bytes([1]) * 32},
        {"layout": bytes([1]) * 32},
        {"weight": 2},
        {"body_sha256": bytes([1]) * 32},
        {"body_n_bytes": 12},
    ]
    assert {key for other in others for key in other} == set(UploadHeader.model_fields) - {
        "version"
    }
    digests = {make_header(8, **other).digest() for other in others}
    assert len(digests | {header.digest()}) == len(others) + 1


@pytest.mark.parametrize(
    "changes", [{"weight": 0}, {"round": 0}, {"attempt": 0}, {"round": 2**31}, {"body_n_bytes": 0}]
)
def test_a_header_beyond_the_limits_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        make_header(8, **changes)


def test_a_task_is_told_apart_by_its_kind(
    make_round: Callable[..., RoundManifest], server_key: Signer
) -> None:
    train = TaskReply(
        task=TrainTask(round=sign(server_key, "round", make_round()).signed), newest_release=0
    )
    wait = TaskReply(task=WaitTask(reason=WaitReason.FINISHED, retry_after_s=1.0), newest_release=3)
    for reply in (train, wait):
        assert parse(TaskReply, reply.canonical()) == reply
    with pytest.raises(ManifestError, match="kind"):
        parse(TaskReply, b'{"task": {"kind": "run-code"}, "newest_release": 0}')


@pytest.mark.parametrize("missing", [[-1], [MAX_PARTS], [*range(MAX_PARTS), 0]])
def test_parts_that_no_upload_has_are_refused(missing: list[int]) -> None:
    with pytest.raises(ManifestError, match="missing"):
        parse(UploadStatus, json.dumps({"state": UploadState.RECEIVING, "missing": missing}))

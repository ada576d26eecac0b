"""Uploads: a signed header, numbered parts, one acceptance.

The bytes of a part are on disk before its row is; its row is before it is acknowledged. What
nobody needs is deleted from the journal's word, so a kill in between leaves nothing behind.
"""

import threading
from collections.abc import Iterator
from hashlib import sha256 as new_sha256
from typing import Final

import numpy as np
import structlog

from aggregator_server.blobs import Blobs
from aggregator_server.charter import Charter
from aggregator_server.config import Retention
from aggregator_server.errors import (
    AggregationError,
    BlobError,
    BlobMissingError,
    Refusal,
    refuse_first,
)
from aggregator_server.masking.vectors import StoredPart
from aggregator_server.membership import require_author, require_federation
from aggregator_server.phase import base_release
from aggregator_server.store.rows import (
    CellRow,
    NewUpload,
    PartRow,
    RoundRow,
    UploadPhase,
    UploadRow,
)
from aggregator_server.store.store import Store
from aggregator_server.store.uploads import refuse_ended
from privacy.updates import CellSum, Float32Array, PlainUpdate
from protocol.chain import RoundManifest
from protocol.clock import Clock
from protocol.errors import SignatureError
from protocol.helped import HelperUpload
from protocol.masked import MaskedHeader
from protocol.messages import (
    BodyHead,
    UploadHeader,
    UploadState,
    UploadStatus,
    member_of_one,
    transcript_of_one,
)
from protocol.phases import CELL_TRANSITIONS, CellEvent, CellPhase, advance
from protocol.problems import ProblemType
from protocol.signing import Signed, verify
from protocol.wire import canonical_json, domain_hash, parse, sha256

UPLOADS: Final = "uploads"
"""Where the bytes of uploads are kept among the blobs."""
_MAX_ATTEMPTS: Final = 1000
"""Of an agent in a round: each leaves a row in the journal for good."""
_N_LOCKS: Final = 64
_MAX_FLOAT32: Final = float(np.finfo(np.float32).max)
_log = structlog.get_logger(__name__)


class Uploads:
    """The uploads of all rounds.

    Guarantees:
        1. An acknowledged part survives `kill -9`; so does an acknowledged acceptance.
        2. An update is accepted once: another attempt of its agent in the round is refused, the
           same one gets the stored answer.
        3. An accepted body has the header's digest and length, and finite values only.
        4. A refused request changes nothing, but for a complete body that cannot be used: its
           bytes are deleted.
    """

    def __init__(
        self, store: Store, blobs: Blobs, charter: Charter, clock: Clock, *, retention: Retention
    ) -> None:
        """Serve the uploads that the store knows."""
        self._store = store
        self._blobs = blobs
        self._charter = charter
        self._clock = clock
        self._retention = retention
        self._locks = [threading.Lock() for _ in range(_N_LOCKS)]

    def begin(self, identity: bytes, signed: Signed[UploadHeader]) -> UploadStatus:
        """Announce an upload.

        Args:
            identity: Who makes the request.
            signed: The header.

        Returns:
            Where it stands; the stored answer when the same header came before.

        Raises:
            Refusal: The header is not this agent's, contradicts the round's manifest, or the round
                does not take it.
            NoSpaceError: The body would not fit.
        """
        header = signed.body
        require_author(identity, header.agent)
        try:
            verify(signed, "upload", key=identity)
        except SignatureError as error:
            raise Refusal(ProblemType.BAD_SIGNATURE, str(error)) from error
        require_federation(self._charter, header.federation)
        row = self._store.rounds.get(header.round)
        if row is None:
            raise Refusal(ProblemType.NOT_FOUND, f"there is no round {header.round}")
        self._check_header(header, row)
        if self._store.uploads.find(header.round, identity, header.attempt) is None:
            self._blobs.require_space(header.body_n_bytes)
        upload = self._store.uploads.begin(
            NewUpload(
                round=header.round,
                agent=identity,
                attempt=header.attempt,
                header=signed.canonical(),
                digest=header.digest(),
                weight=header.weight,
                n_bytes=header.body_n_bytes,
                started_at=self._clock.now(),
            )
        )
        if header.attempt > 1:
            self.sweep()  # an earlier attempt may have ended here
        return self._status(upload)

    def begin_masked(
        self, identity: bytes, signed: Signed[MaskedHeader], *, round_number: int, attempt: int
    ) -> UploadStatus:
        """Announce a masked upload, whose head the cell has checked.

        Args:
            identity: Who makes the request.
            signed: The header.
            round_number: Of its cell.
            attempt: Of the READY with which the agent is in the cell.

        Returns:
            Where it stands; the stored answer when the same header came before.

        Raises:
            Refusal: Another header came before (`conflict`), or the cell takes no uploads.
            NoSpaceError: The body would not fit.
        """
        header = signed.body
        if self._store.uploads.find(round_number, identity, attempt) is None:
            self._blobs.require_space(header.body_n_bytes)
        upload = self._store.uploads.begin(
            NewUpload(
                round=round_number,
                agent=identity,
                attempt=attempt,
                header=signed.canonical(),
                digest=header.digest(),
                weight=0,
                n_bytes=header.body_n_bytes,
                started_at=self._clock.now(),
                transcript=header.transcript,
            )
        )
        return self._status(upload)

    def begin_helped(self, identity: bytes, upload: HelperUpload) -> UploadStatus:
        """Announce an upload under a helper's mask.

        Args:
            identity: Who makes the request.
            upload: The signed header with the sealed seed.

        Returns:
            Where it stands; the stored answer when the same one came before.

        Raises:
            Refusal: It is not this agent's, contradicts the round's manifest, or the round does
                not take it.
            NoSpaceError: The body would not fit.
        """
        header = upload.header.body
        require_author(identity, header.agent)
        registrar = self._charter.manifest.registrar
        try:
            verify(upload.header, "helper-upload", key=identity)
            verify(header.credential, "credential", key=registrar)
        except SignatureError as error:
            raise Refusal(ProblemType.BAD_SIGNATURE, str(error)) from error
        require_federation(self._charter, header.federation)
        row = self._store.rounds.get(header.round)
        if row is None:
            raise Refusal(ProblemType.NOT_FOUND, f"there is no round {header.round}")
        credential = header.credential.body
        n_bytes = parse(Signed[RoundManifest], row.manifest).body.update_n_bytes
        refuse_first(
            ProblemType.BAD_MESSAGE,
            {
                "round_digest is not that of the round's manifest": (
                    header.round_digest != row.digest
                ),
                "the credential is another agent's or federation's": (
                    (credential.agent, credential.federation) != (identity, header.federation)
                ),
                "the credential has expired": credential.expires_at < self._clock.now(),
                "the sealed seed is not the one that was signed": (
                    sha256(upload.sealed) != header.sealed_sha256
                ),
                f"body_n_bytes is {header.body_n_bytes}, not {n_bytes}": (
                    header.body_n_bytes != n_bytes
                ),
            },
        )
        if self._store.uploads.find(header.round, identity, header.attempt) is None:
            self._blobs.require_space(header.body_n_bytes)
        begun = self._store.uploads.begin(
            NewUpload(
                round=header.round,
                agent=identity,
                attempt=header.attempt,
                header=upload.canonical(),
                digest=sha256(upload.canonical()),
                weight=0,
                n_bytes=header.body_n_bytes,
                started_at=self._clock.now(),
            )
        )
        if header.attempt > 1:
            self.sweep()  # an earlier attempt may have ended here
        return self._status(begun)

    def status(self, identity: bytes, round_number: int, attempt: int) -> UploadStatus:
        """Where an upload stands.

        Raises:
            Refusal: No such upload, or it ended without being accepted.
        """
        return self._status(self._find(identity, round_number, attempt))

    def put_part(
        self, identity: bytes, round_number: int, attempt: int, n: int, body: bytes
    ) -> UploadStatus:
        """Store one part.

        Args:
            identity: Who makes the request.
            round_number: The upload's round.
            attempt: The upload's attempt.
            n: The part's number, from 0.
            body: Exactly the bytes of that part.

        Returns:
            Where the upload stands; the stored answer when the same part came before.

        Raises:
            Refusal: No such upload or part, another length, another body for a journalled part
                (`conflict`), or the upload takes no more parts.
            NoSpaceError: The disk is full; nothing was stored.
        """
        upload = self._find(identity, round_number, attempt)
        header = _header(upload)
        if n >= header.n_parts:
            raise Refusal(
                ProblemType.NOT_FOUND, f"there is no part {n}; the upload has {header.n_parts}"
            )
        if len(body) != header.part_n_bytes(n):
            raise Refusal(
                ProblemType.BAD_REQUEST,
                f"part {n} has {header.part_n_bytes(n)} bytes, not {len(body)}",
            )
        part = PartRow(upload=upload.id, n=n, sha256=sha256(body), n_bytes=len(body))
        with self._lock(upload.id):
            if not any(known.n == n for known in self._store.uploads.parts(upload.id)):
                if upload.phase is UploadPhase.ACCEPTED:  # its bytes are in a release, and gone
                    return self._status(upload)
                refuse_ended(upload)
                self._blobs.put(_part_key(part), body)
            try:
                upload = self._store.uploads.add_part(part)
            except Refusal:
                self._discard_unjournalled(part)
                raise
        return self._status(upload)

    def complete(self, identity: bytes, round_number: int, attempt: int) -> UploadStatus:
        """Verify a whole upload and accept it.

        Returns:
            `accepted`; the stored answer when it was accepted before.

        Raises:
            Refusal: Parts are missing (`incomplete`), the body is not the header's
                (`digest-mismatch`: its parts are to be sent again), has values that are not finite
                (`not-finite`), or the round has closed.
        """
        upload = self._find(identity, round_number, attempt)
        with self._lock(upload.id):
            upload = self._find(identity, round_number, attempt)
            if upload.phase is UploadPhase.ACCEPTED:
                return self._status(upload)
            refuse_ended(upload)
            missing = self._missing(upload)
            if missing:
                raise Refusal(
                    ProblemType.INCOMPLETE,
                    f"{len(missing)} parts are missing, the first is {missing[0]}",
                )
            self._verify_body(upload)
            cell = None if upload.weight == 0 else _cell_of_one(upload)
            try:
                accepted = self._store.uploads.accept(upload.id, cell, now=self._clock.now())
            except Refusal:
                self.sweep()  # of a cell that has gone on: deleted unread
                raise
        _log.info("upload accepted", round=round_number, n_bytes=upload.n_bytes)
        return self._status(accepted)

    def load(self, upload: UploadRow) -> CellSum:
        """The sum of an accepted upload's cell of one.

        Raises:
            AggregationError: Its bytes are no longer those that were accepted.
            BlobError: They cannot be read.
        """
        header = _header(upload)
        vector: Float32Array = np.empty(upload.n_bytes // 4, "<f4")
        raw = vector.view(np.uint8)
        start = 0
        for chunk in self._chunks(upload):
            raw[start : start + len(chunk)] = np.frombuffer(chunk, np.uint8)
            start += len(chunk)
        if start != upload.n_bytes or new_sha256(raw.data).digest() != header.body_sha256:
            msg = f"the bytes of upload {upload.id} have changed on disk since it was accepted"
            raise AggregationError(msg)
        native = vector.astype(np.float32, copy=False)
        layout = self._charter.turns.at(base_release(self._store, upload.round)).layout
        return CellSum.of_plain(PlainUpdate.of_body(native, layout, weight=upload.weight))

    def sweep(self) -> None:
        """Delete the bytes that nobody needs: ended uploads, and updates that are in a release."""
        keep = self._retention is Retention.KEEP
        for upload in self._store.uploads.deletable(keep_accepted=keep):
            try:
                self._blobs.delete_all(_folder(upload.id))
            except BlobError as error:
                _log.warning("cannot delete an upload's bytes yet", error=str(error))
                continue
            self._store.uploads.deleted(upload.id)

    def tidy(self) -> None:
        """Delete bytes of which the journal knows nothing any more; when the server starts.

        A part may reach the disk just after the bytes of its upload were deleted. The server
        deletes it again, unless it is killed in between.

        Raises:
            BlobError: They cannot be listed or deleted; calling again goes on.
        """
        known = self._store.uploads.with_bytes()
        for name in self._blobs.names(UPLOADS):
            if name.isdecimal() and int(name) not in known:
                self._blobs.delete_all(_folder(int(name)))

    def _check_header(self, header: UploadHeader, row: RoundRow) -> None:
        manifest = parse(Signed[RoundManifest], row.manifest).body
        max_weight = self._charter.manifest.max_weight
        layout = self._charter.turns.at(manifest.release).layout
        problems = {
            "round_digest is not that of the round's manifest": header.round_digest != row.digest,
            "layout is not the round's": header.layout != layout.digest(),
            f"attempt {header.attempt} is above {_MAX_ATTEMPTS}": header.attempt > _MAX_ATTEMPTS,
            f"weight {header.weight} is above {max_weight}": header.weight > max_weight,
            f"body_n_bytes is {header.body_n_bytes}, not {manifest.update_n_bytes}": (
                header.body_n_bytes != manifest.update_n_bytes
            ),
        }
        refuse_first(ProblemType.BAD_REQUEST, problems)

    def _find(self, identity: bytes, round_number: int, attempt: int) -> UploadRow:
        upload = self._store.uploads.find(round_number, identity, attempt)
        if upload is None:
            raise Refusal(
                ProblemType.NOT_FOUND,
                f"no header came for round {round_number}, attempt {attempt}",
            )
        return upload

    def _status(self, upload: UploadRow) -> UploadStatus:
        if upload.phase is UploadPhase.ACCEPTED:
            return UploadStatus(state=UploadState.ACCEPTED, missing=())
        refuse_ended(upload)
        return UploadStatus(state=UploadState.RECEIVING, missing=self._missing(upload))

    def _missing(self, upload: UploadRow) -> tuple[int, ...]:
        arrived = {part.n for part in self._store.uploads.parts(upload.id)}
        return tuple(n for n in range(_header(upload).n_parts) if n not in arrived)

    def _chunks(self, upload: UploadRow) -> Iterator[bytes]:
        for part in self._store.uploads.parts(upload.id):
            yield self._blobs.read(_part_key(part))

    def _verify_body(self, upload: UploadRow) -> None:
        digest = new_sha256()
        n_bytes = 0
        finite = True
        masked = upload.weight == 0  # its words say nothing, so there is nothing to see
        # A value that is finite, but not once it is weighted, would spoil the whole round.
        # The small margin is for the rounding of the product.
        largest = np.float32(_MAX_FLOAT32 / max(1, upload.weight) * (1 - 1e-6))
        try:
            for chunk in self._chunks(upload):
                digest.update(chunk)
                n_bytes += len(chunk)
                # NaN compares false; parts are multiples of four bytes, as PART_BYTES is.
                finite = finite and (
                    masked or bool((np.abs(np.frombuffer(chunk, "<f4")) <= largest).all())
                )
        except BlobMissingError as error:
            _log.warning("a part vanished before its upload was complete", error=str(error))
        if n_bytes != upload.n_bytes or digest.digest() != _header(upload).body_sha256:
            for part in self._store.uploads.reset(upload.id):
                self._blobs.delete(_part_key(part))
            raise Refusal(
                ProblemType.DIGEST_MISMATCH,
                "the body's SHA-256 is not the header's; its parts were deleted, send them again",
            )
        if not finite:
            self._store.uploads.refuse(upload.id)
            self.sweep()
            raise Refusal(
                ProblemType.NOT_FINITE, "the update has NaN, infinite or overflowing values"
            )

    def _discard_unjournalled(self, part: PartRow) -> None:
        known = {(row.n, row.sha256) for row in self._store.uploads.parts(part.upload)}
        if (part.n, part.sha256) not in known:
            self._blobs.delete(_part_key(part))

    def _lock(self, upload: int) -> threading.Lock:
        return self._locks[upload % _N_LOCKS]


def stored_parts(store: Store, upload: UploadRow) -> tuple[StoredPart, ...]:
    """Where the parts of an upload are, ascending."""
    parts = store.uploads.parts(upload.id)
    return tuple(StoredPart(key=_part_key(part), sha256=part.sha256) for part in parts)


def _header(upload: UploadRow) -> BodyHead:
    if upload.transcript is not None:
        return parse(Signed[MaskedHeader], upload.header).body
    if upload.weight == 0:
        return parse(HelperUpload, upload.header).header.body
    return parse(Signed[UploadHeader], upload.header).body


def _folder(upload: int) -> str:
    return f"{UPLOADS}/{upload}"


def _part_key(part: PartRow) -> str:
    # The digest is part of the name, so that two bodies for one part never overwrite each other.
    return f"{_folder(part.upload)}/{part.n}-{part.sha256.hex()}"


def _cell_of_one(upload: UploadRow) -> CellRow:
    signed = parse(Signed[UploadHeader], upload.header)
    member = member_of_one(signed)
    return CellRow(
        transcript=transcript_of_one(signed),
        round=upload.round,
        phase=advance(CELL_TRANSITIONS, CellPhase.UPLOADING, CellEvent.PLAIN_UPLOAD_ACCEPTED),
        members_digest=domain_hash("survivors", [member]),
        members=canonical_json([member]).decode("ascii"),
        upload=upload.id,
        n_members=1,
        weight_sum=upload.weight,
    )

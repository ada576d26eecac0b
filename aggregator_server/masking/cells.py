"""The cells of masked rounds at work: messages in, stages on, news out, sums at the end.

All state is in the store; what is kept in memory is only read from it. Every stage has a deadline
and ends in its successor or in FAILED, with a signed reason for the members (PROTOCOL, "States").
"""

from collections.abc import Callable, Collection
from typing import Final

import structlog

from aggregator_server.blobs import Blobs
from aggregator_server.charter import Charter, MaskedTerms
from aggregator_server.closing import moves
from aggregator_server.errors import (
    AggregationError,
    BlobMissingError,
    Refusal,
    refuse_first,
)
from aggregator_server.masking.books import Books
from aggregator_server.masking.vectors import PartReader, put_sum
from aggregator_server.membership import require_author
from aggregator_server.phase import base_release
from aggregator_server.store.cells import OVER, identities_of
from aggregator_server.store.rows import (
    CellRow,
    MaskedCellRow,
    MessageKind,
    ReadyRow,
)
from aggregator_server.store.store import Store
from aggregator_server.unmask import Unmasker
from aggregator_server.uploads import stored_parts
from privacy.errors import MaskedMessageError, SumError
from privacy.fixed_point import N_TAIL_WORDS, checked_sum
from privacy.secagg.checks import keys_are_sound
from privacy.secagg.derive import survivors_hash
from privacy.secagg.server import CellServer, Recovery, UnrecoverableError
from protocol.blocks import CellMasking
from protocol.clock import Clock
from protocol.errors import SignatureError
from protocol.masked import (
    BundleNews,
    CellNews,
    Complaint,
    Confirm,
    ConfirmedNews,
    EndedNews,
    Failed,
    FailedNews,
    FailureReason,
    MaskedHeader,
    News,
    NoNews,
    Ready,
    ReadyList,
    Reveal,
    Roster,
    RosterNews,
    Shares,
    SurvivorsNews,
    entries_json,
)
from protocol.phases import CELL_TRANSITIONS, AgentPhase, CellEvent, CellPhase, advance
from protocol.problems import ProblemType
from protocol.signing import Signed, sign, verify
from protocol.wire import canonical_json, parse, sha256

_NOTHING: Final = NoNews(retry_after_s=0.5)
_LEFT_OUT: Final = EndedNews(counted=False)
_REVEAL_STAGES: Final = 2.0
"""Shares of several members are wanted then, and nothing can be tried again."""
_log = structlog.get_logger(__name__)


class Cells:
    """The cells of all masked rounds.

    Guarantees:
        1. A message that was acknowledged survives `kill -9`; another one of its kind is refused.
        2. A cell is unmasked at most once, and never after its FAILED was journalled.
        3. A vector that is not among the survivors is never read.

    Args:
        store: Where all state is.
        blobs: Where vectors and sums are.
        charter: A masked federation's.
        terms: How it masks.
        masking: The manifest's block.
        clock: For deadlines.
        unmasker: Removes the masks.
    """

    def __init__(
        self,
        *,
        store: Store,
        blobs: Blobs,
        charter: Charter,
        terms: MaskedTerms,
        masking: CellMasking,
        clock: Clock,
        unmasker: Unmasker,
    ) -> None:
        """Begin with nothing in memory."""
        self._store = store
        self._blobs = blobs
        self._charter = charter
        self._masking = masking
        self._turns = terms.turns
        self._clock = clock
        self._unmasker = unmasker
        self._books = Books(store, terms)

    # What members send

    def ready(self, identity: bytes, signed: Signed[Ready], *, round_digest: bytes) -> None:
        """Take a READY.

        Args:
            identity: Who makes the request.
            signed: The message.
            round_digest: Of its round's manifest.

        Raises:
            Refusal: It is not this agent's, of another round, expired, under a credential that
                does not hold, with keys that nobody should use, or the round takes none.
        """
        body = signed.body
        require_author(identity, body.agent)
        _verified(lambda: verify(signed, "ready", key=identity))
        credential = body.credential.body
        registrar = self._charter.manifest.registrar
        _verified(lambda: verify(body.credential, "credential", key=registrar))
        now = self._clock.now()
        faults = {
            "round_digest is not that of the round's manifest": body.round_digest != round_digest,
            "the credential is another agent's or federation's": (
                (credential.agent, credential.federation) != (identity, body.federation)
            ),
            "the credential has expired": credential.expires_at < now,
            "expires_at is past": body.expires_at < now,
            "sealing_key and masking_key must differ": body.sealing_key == body.masking_key,
            "a key is of low order or not canonical": not keys_are_sound(body),
        }
        refuse_first(ProblemType.BAD_MESSAGE, faults)
        self._store.readies.add(
            ReadyRow(
                round=body.round,
                agent=identity,
                attempt=body.attempt,
                message=signed.canonical(),
                digest=body.digest(),
                wave=None,
            )
        )

    def shares(self, identity: bytes, transcript: bytes, shares: Shares) -> None:
        """Take a dealer's shares (message 4).

        Raises:
            Refusal: They contradict the cell, others came before, or the stage is over.
        """
        require_author(identity, shares.header.body.agent)
        self._take(
            identity,
            transcript,
            MessageKind.SHARES,
            message=shares.canonical(),
            check=lambda book: book.check_shares(shares),
            phases={CellPhase.SHARING},
        )

    def complain(self, identity: bytes, transcript: bytes, signed: Signed[Complaint]) -> None:
        """Take a complaint about a dealer.

        Raises:
            Refusal: It contradicts the cell, or the stage is over.
        """
        require_author(identity, signed.body.agent)
        self._take(
            identity,
            transcript,
            MessageKind.COMPLAINT,
            message=signed.canonical(),
            check=lambda book: book.check_complaint(signed),
            phases={CellPhase.UPLOADING},
            about=signed.body.dealer.body.agent,
        )

    def check_upload(self, identity: bytes, signed: Signed[MaskedHeader]) -> None:
        """Check the head of a masked upload against its cell (message 6).

        Raises:
            Refusal: It contradicts the cell, or the cell takes no uploads.
        """
        require_author(identity, signed.body.agent)
        row = self._row(signed.body.transcript)
        if row.phase is not CellPhase.UPLOADING:
            raise Refusal(ProblemType.STAGE_CLOSED, f"the cell is {row.phase.value}")
        with self._books.of(row) as book:
            _checked(lambda: book.check_upload(signed))

    def confirm(self, identity: bytes, transcript: bytes, confirm: Confirm) -> None:
        """Take a survivor's word (message 8).

        Raises:
            Refusal: It is over another U3, another came before, or the stage is over.
        """
        require_author(identity, confirm.agent)
        self._take(
            identity,
            transcript,
            MessageKind.CONFIRM,
            message=confirm.canonical(),
            check=lambda book: book.check_confirm(confirm),
            phases={CellPhase.CONFIRMING, CellPhase.REVEALING},
        )

    def reveal(self, identity: bytes, transcript: bytes, signed: Signed[Reveal]) -> None:
        """Take what a survivor reveals (message 10).

        Raises:
            Refusal: It contradicts the cell, another came before, or the stage is over.
        """
        require_author(identity, signed.body.agent)
        self._take(
            identity,
            transcript,
            MessageKind.REVEAL,
            message=signed.canonical(),
            check=lambda book: book.check_reveal(signed),
            phases={CellPhase.REVEALING},
        )

    def _take(
        self,
        identity: bytes,
        transcript: bytes,
        kind: MessageKind,
        *,
        message: bytes,
        check: Callable[[CellServer], None],
        phases: Collection[CellPhase],
        about: bytes = b"",
    ) -> None:
        row = self._row(transcript)
        if row.phase in phases:
            with self._books.of(row) as book:
                _checked(lambda: check(book))
        else:
            # Nothing unchecked is journalled, also if the stage begins just now; but a repeated
            # message gets its stored answer.
            phases = ()
        self._store.cells.add_message(
            transcript,
            identity,
            kind,
            about=about,
            message=message,
            digest=sha256(message),
            phases=phases,
        )

    def _row(self, transcript: bytes) -> MaskedCellRow:
        row = self._store.cells.get(transcript)
        if row is None:
            raise Refusal(ProblemType.NOT_FOUND, "there is no such cell")
        return row

    # What members are told

    def news(
        self, identity: bytes, *, round_number: int, attempt: int, phase: AgentPhase
    ) -> CellNews:
        """What there is for an agent that stands at `phase` with its READY of `attempt`."""
        # The cell is asked for last: a list may be drawn up, or the round end, between any two
        # questions, and what the earlier ones said must still hold for what is found.
        over = self._round_is_over(round_number)
        waits = phase is AgentPhase.READY and self._store.readies.waits(
            round_number, identity, attempt
        )
        row = self._store.cells.of_attempt(round_number, identity, attempt)
        if row is None:
            return CellNews(news=_NOTHING if waits else _LEFT_OUT)
        if row.phase is CellPhase.FAILED and row.failed is not None:
            return CellNews(news=FailedNews(failed=parse(Signed[Failed], row.failed)))
        if row.phase is CellPhase.UNMASKED or over:
            survivors = identities_of(row.survivors or "[]")
            counted = row.phase is CellPhase.UNMASKED and identity in survivors
            return CellNews(news=EndedNews(counted=counted))
        with self._books.of(row) as book:
            return CellNews(news=self._stage_news(row, book, identity, phase))

    def _stage_news(
        self, row: MaskedCellRow, book: CellServer, identity: bytes, phase: AgentPhase
    ) -> News:
        """What a cell that is at work has for a member at `phase`."""
        if phase is AgentPhase.READY:
            return self._roster_news(row) if row.phase is CellPhase.SHARING else _LEFT_OUT
        if phase is AgentPhase.SHARED:
            return _NOTHING if row.shared is None else _bundle_news(row, book, identity)
        if row.survivors is None:
            return _NOTHING
        if identity not in identities_of(row.survivors):
            return _LEFT_OUT
        if phase is AgentPhase.UPLOADED:
            return SurvivorsNews(survivors=book.survivors())
        confirmed = book.confirmed() if row.phase is CellPhase.REVEALING else None
        return _NOTHING if confirmed is None else ConfirmedNews(confirmed=confirmed)

    def _roster_news(self, row: MaskedCellRow) -> RosterNews:
        wave = self._store.readies.wave(row.round, row.wave)
        return RosterNews(
            ready_list=parse(Signed[ReadyList], wave.message),
            roster=parse(Signed[Roster], row.roster),
        )

    def _round_is_over(self, round_number: int) -> bool:
        row = self._store.rounds.get(round_number)
        return row is None or row.over

    # Stages

    def advance(self, row: MaskedCellRow) -> bool:
        """Move a cell on as far as it goes by one stage.

        Returns:
            Whether it moved.

        Raises:
            StaleWriteError: Something arrived meanwhile; call again.
            StoreError: Nothing was journalled.
            BlobError: A vector or sum cannot be read or written now.
        """
        if row.phase in OVER:
            return False
        with self._books.of(row) as book:
            stages = {
                CellPhase.SHARING: self._close_sharing,
                CellPhase.UPLOADING: self._close_uploading,
                CellPhase.CONFIRMING: self._close_confirming,
                CellPhase.REVEALING: self._close_revealing,
            }
            return stages[row.phase](row, book)

    def _late(self, row: MaskedCellRow, *, n_stages: float = 1.0) -> bool:
        return self._clock.now() >= row.stage_at + n_stages * self._masking.stage_s

    def _close_sharing(self, row: MaskedCellRow, book: CellServer) -> bool:
        if len(book.shares) < len(book.cell.readies) and not self._late(row):
            return False
        if len(book.shares) < book.cell.threshold:
            return self._fail(row, FailureReason.TOO_FEW_SHARED)
        self._move(row, CellEvent.SHARES_ARRIVED, shared=tuple(sorted(book.shares)))
        return True

    def _close_uploading(self, row: MaskedCellRow, book: CellServer) -> bool:
        if book.hopeless_dealers():
            return self._fail(row, FailureReason.BAD_SHARES, blamed=book.guilty_dealers())
        shared = identities_of(row.shared or "[]")
        if len(book.uploads) < len(shared) and not self._uploads_are_over(row):
            return False
        if len(book.uploads) < book.cell.threshold:
            return self._fail(row, FailureReason.TOO_FEW_UPLOADED)
        self._move(row, CellEvent.UPLOADS_ARRIVED, survivors=tuple(sorted(book.uploads)))
        return True

    def _uploads_are_over(self, row: MaskedCellRow) -> bool:
        if not self._late(row):
            return False
        now, rules = self._clock.now(), self._charter.manifest.rounds
        longest_s = self._charter.update_n_bytes / rules.min_upload_bytes_per_s
        if now >= row.stage_at + self._masking.stage_s + longest_s:
            return True
        deadline = row.stage_at + self._masking.stage_s
        return not any(
            moves(upload, deadline_at=deadline, rate=rules.min_upload_bytes_per_s, now=now)
            for upload in self._store.cells.receiving(row.transcript, row.round)
        )

    def _close_confirming(self, row: MaskedCellRow, book: CellServer) -> bool:
        if book.confirmed() is not None:
            self._move(row, CellEvent.SURVIVORS_CONFIRMED)
            return True
        return self._late(row) and self._fail(row, FailureReason.TOO_FEW_CONFIRMED)

    def _close_revealing(self, row: MaskedCellRow, book: CellServer) -> bool:
        try:
            recovery = book.recover(last_call=self._late(row, n_stages=_REVEAL_STAGES))
        except UnrecoverableError as error:
            _log.warning("a cell is lost", round=row.round, error=str(error))
            reason = FailureReason.BAD_SHARES if error.blamed else FailureReason.TOO_FEW_REVEALED
            return self._fail(row, reason, blamed=error.blamed)
        if recovery is None:
            return False
        if recovery.blamed:
            names = [member.hex()[:12] for member in recovery.blamed]
            _log.warning("members sent wrong shares", round=row.round, members=names)
        return self._unmask(row, book, recovery)

    def _unmask(self, row: MaskedCellRow, book: CellServer, recovery: Recovery) -> bool:
        uploads = self._store.cells.uploads(row.transcript)
        survivors = tuple(upload.agent for upload in uploads)
        if survivors != recovery.survivors:  # cannot be: U3 was journalled with these very uploads
            return self._fail(row, FailureReason.BAD_SUM)
        plan = self._turns.plan_at(base_release(self._store, row.round))
        reader = PartReader(
            blobs=self._blobs,
            vectors=tuple(stored_parts(self._store, upload) for upload in uploads),
        )
        try:
            words = self._unmasker.unmask(
                reader,
                recovery.masks,
                n_words=plan.n_words,
                word_bits=plan.word_bits,
            )
            payload = checked_sum(words, recovery.checks, plan, n_members=len(recovery.survivors))
        except (SumError, AggregationError, BlobMissingError) as error:
            _log.warning("a cell is lost", round=row.round, error=str(error))
            return self._fail(row, FailureReason.BAD_SUM)
        entries = book.survivor_entries()
        digest = put_sum(self._blobs, row.transcript, payload)
        self._store.cells.finish(
            CellRow(
                transcript=row.transcript,
                round=row.round,
                phase=advance(CELL_TRANSITIONS, row.phase, CellEvent.SUM_RECOVERED),
                members_digest=survivors_hash(entries),
                members=canonical_json(entries_json(entries)).decode("ascii"),
                upload=None,
                n_members=len(entries),
                weight_sum=int(payload[-N_TAIL_WORDS]),
                sum_sha256=digest,
            )
        )
        self._books.forget(row.transcript)
        _log.info(
            "cell unmasked",
            round=row.round,
            n_members=len(entries),
            n_clipped=int(payload[-1]),
        )
        return True

    def _move(
        self,
        row: MaskedCellRow,
        event: CellEvent,
        *,
        shared: tuple[bytes, ...] | None = None,
        survivors: tuple[bytes, ...] | None = None,
    ) -> None:
        phase = advance(CELL_TRANSITIONS, row.phase, event)
        self._store.cells.move(
            row.transcript,
            seen=row.phase,
            to=phase,
            now=self._clock.now(),
            shared=shared,
            survivors=survivors,
        )
        _log.info("cell moved", round=row.round, cell=row.number, phase=phase.value)

    def _fail(
        self, row: MaskedCellRow, reason: FailureReason, *, blamed: tuple[bytes, ...] = ()
    ) -> bool:
        # A second failure is the last one, and after CONFIRM an update must be in no other sum.
        may_retry = row.wave == 1 and row.phase is not CellPhase.REVEALING
        body = Failed(
            federation=self._charter.manifest.federation,
            round=row.round,
            transcript=row.transcript,
            reason=reason,
            blamed=blamed,
            may_retry=may_retry,
        )
        signed = sign(self._charter.keys.server, "failed", body).signed
        self._store.cells.fail(
            row.transcript,
            seen=row.phase,
            failed=signed.canonical(),
            retried=not may_retry,
            now=self._clock.now(),
        )
        self._books.forget(row.transcript)
        _log.warning("cell failed", round=row.round, cell=row.number, reason=reason.value)
        return True


def _bundle_news(row: MaskedCellRow, book: CellServer, identity: bytes) -> News:
    bundle = book.bundle_for(identity)
    if bundle is None or row.phase is not CellPhase.UPLOADING:
        return _LEFT_OUT
    return BundleNews(bundle=bundle)


def _verified(check: Callable[[], object]) -> None:
    try:
        check()
    except SignatureError as error:
        raise Refusal(ProblemType.BAD_SIGNATURE, str(error)) from error


def _checked(check: Callable[[], None]) -> None:
    try:
        check()
    except MaskedMessageError as error:
        raise Refusal(ProblemType.BAD_MESSAGE, str(error)) from error

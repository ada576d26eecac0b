"""A federation at work, without HTTP: what the routes, the command line and a simulator call."""

import os
from collections.abc import Mapping
from pathlib import Path

import structlog

from aggregator_server.blobs import Blobs, open_blobs
from aggregator_server.charter import Charter
from aggregator_server.config import ServerConfig, ServerSection, Setting, load_config
from aggregator_server.errors import BlobError, Refusal, StoreError
from aggregator_server.evaluations import Evaluations
from aggregator_server.evidence import Evidence
from aggregator_server.founding import CONFIG_NAME, places_of, reconcile, stored_charter
from aggregator_server.helper.client import HelperClient
from aggregator_server.keys import load_keys
from aggregator_server.masking.cells import Cells
from aggregator_server.masking.helped import HelpedRounds
from aggregator_server.membership import (
    Membership,
    require_author,
    require_federation,
)
from aggregator_server.phase import round_manifest
from aggregator_server.releases import ADAPTERS, Releases
from aggregator_server.rounds import Rounds
from aggregator_server.store.database import Database
from aggregator_server.store.rows import IncidentRow, RoundRow
from aggregator_server.store.store import Store
from aggregator_server.tasks import task_reply
from aggregator_server.unmask import Unmasker
from aggregator_server.uploads import Uploads
from aggregator_server.wakeups import Wakeups
from protocol.blocks import CellMasking, HelperMasking
from protocol.clock import Clock, SystemClock
from protocol.errors import SignatureError
from protocol.gating import EvaluationReport
from protocol.helped import HelperUpload
from protocol.masked import MaskedHeader, Ready
from protocol.messages import (
    Credential,
    Discovery,
    Enrolment,
    FederationStatus,
    Revocation,
    RoundStatus,
    TaskReply,
    UploadHeader,
    UploadStatus,
    Withdrawal,
)
from protocol.phases import CellPhase
from protocol.problems import ProblemType
from protocol.signing import Signed, verify
from protocol.transport_signing import VerifiedRequest
from protocol.wire import domain_hash

_log = structlog.get_logger(__name__)


class Federation:
    """One federation: its rooms, and what each request does.

    Every method may be called from any thread. Nothing happens by itself: `advance` moves the
    round on, and is called by the server's clockwork, a test or a simulator.

    Guarantees:
        1. What was acknowledged survives `kill -9`.
        2. A request that is refused has changed nothing.
    """

    def __init__(
        self, *, config: ServerConfig, charter: Charter, store: Store, blobs: Blobs, clock: Clock
    ) -> None:
        """Build the rooms; see `open_federation`."""
        self.config = config
        self.charter = charter
        self.clock = clock
        self.wakeups = Wakeups()
        """Wakes long polls: an agent's task may have changed."""
        self.work = Wakeups()
        """Wakes the clockwork: there may be something for `advance` to do."""
        self._store = store
        self._blobs = blobs
        self.membership = Membership(store, charter, clock, policy=config.server.enrolment)
        self.uploads = Uploads(store, blobs, charter, clock, retention=config.server.retention)
        self.releases = Releases(store, blobs, charter, clock)
        self.evaluations = Evaluations(store, blobs, charter)
        self.evidence = Evidence(store, charter, clock)
        self.unmasker = Unmasker(config.server.unmask_processes)
        self.cells: Cells | None = None
        """At work where updates are masked."""
        helped: HelpedRounds | None = None
        masking = charter.manifest.masking
        if charter.masked is not None and isinstance(masking, HelperMasking):
            helped = HelpedRounds(
                store=store,
                blobs=blobs,
                charter=charter,
                terms=charter.masked,
                masking=masking,
                client=HelperClient(config.server.helper_url),
            )
        if charter.masked is not None and isinstance(masking, CellMasking):
            self.cells = Cells(
                store=store,
                blobs=blobs,
                charter=charter,
                terms=charter.masked,
                masking=masking,
                clock=clock,
                unmasker=self.unmasker,
            )
        self.rounds = Rounds(
            store=store,
            blobs=blobs,
            charter=charter,
            uploads=self.uploads,
            releases=self.releases,
            clock=clock,
            settings=config.server,
            masked=self.cells or helped,
        )
        self._changes = -1

    def advance(self) -> bool:
        """Move the round on as far as it goes now, and wake the long polls if that concerns them.

        Returns:
            Whether an agent that waits may have something to do now, by this process or another.

        Raises:
            ServerError: A fault that belongs to no round; the next call tries again.
        """
        self.membership.flush()
        self.rounds.advance()
        changes = self._store.changes()
        changed = changes != self._changes
        self._changes = changes
        if changed:
            self.wakeups.notify()
        return changed

    def stop_waiting(self) -> None:
        """Answer all long polls now and hold none any more: the server is about to stop."""
        self.wakeups.close()
        self.work.close()

    def close(self) -> None:
        """Journal what is only counted, and close the database."""
        self.stop_waiting()
        self.unmasker.close()
        try:
            self.membership.flush()
        except StoreError as error:
            _log.warning("the last counts were not journalled", error=str(error))
        self._store.close()

    def discovery(self) -> Discovery:
        """What anyone may ask."""
        return Discovery(
            federation=self.charter.signed,
            enrolment=self.config.server.enrolment.value,
            server_time=self.clock.now(),
        )

    def enrol(self, request: VerifiedRequest, signed: Signed[Enrolment]) -> Signed[Credential]:
        """Make an agent a member; see `Membership.enrol`."""
        credential = self.membership.enrol(request, signed)
        self.work.notify()
        return credential

    def revoke(self, identity: bytes, signed: Signed[Revocation]) -> None:
        """End a membership; see `Membership.revoke`."""
        self.membership.revoke(identity, signed)
        self.work.notify()

    def task(self, identity: bytes, *, after: int) -> TaskReply:
        """What an agent should do now; see `tasks.task_reply`.

        Args:
            identity: A member.
            after: The last round that it is done with, 0 for none.
        """
        return task_reply(
            self._store.rounds.view(identity),
            after=after,
            n_rounds=self.charter.manifest.rounds.n_rounds,
            has_space=self._has_space(),
        )

    def begin_upload(self, identity: bytes, signed: Signed[UploadHeader]) -> UploadStatus:
        """Announce an upload; see `Uploads.begin`.

        Raises:
            Refusal: Also in a federation that masks updates: a plain one is not taken.
        """
        if self.charter.masked is not None:
            raise Refusal(ProblemType.BAD_REQUEST, "this federation takes masked updates only")
        return self.uploads.begin(identity, signed)

    def begin_helped_upload(self, identity: bytes, upload: HelperUpload) -> UploadStatus:
        """Announce an upload under a helper's mask; see `Uploads.begin_helped`.

        Raises:
            Refusal: Also in a federation without a helper (`not-found`).
        """
        if not isinstance(self.charter.manifest.masking, HelperMasking):
            raise Refusal(ProblemType.NOT_FOUND, "this federation has no helper")
        return self.uploads.begin_helped(identity, upload)

    def masked(self) -> Cells:
        """The cells of a federation that masks.

        Raises:
            Refusal: It does not (`not-found`).
        """
        if self.cells is None:
            raise Refusal(ProblemType.NOT_FOUND, "this federation forms no masked cells")
        return self.cells

    def ready(self, identity: bytes, signed: Signed[Ready]) -> None:
        """Take a READY; see `Cells.ready`."""
        cells = self.masked()
        require_federation(self.charter, signed.body.federation)
        row = self._store.rounds.get(signed.body.round)
        if row is None:
            raise Refusal(ProblemType.NOT_FOUND, f"there is no round {signed.body.round}")
        cells.ready(identity, signed, round_digest=row.digest)
        self.work.notify()

    def begin_masked_upload(self, identity: bytes, signed: Signed[MaskedHeader]) -> UploadStatus:
        """Announce a masked upload; see `Cells.check_upload` and `Uploads.begin_masked`.

        One that was announced before gets its stored answer, also when its cell has gone on.
        """
        cells, header = self.masked(), signed.body
        member = self._store.cells.member(header.transcript, identity)
        if member is None:
            cells.check_upload(identity, signed)  # says what is wrong, if there is such a cell
            raise Refusal(ProblemType.NOT_FOUND, "there is no such cell of this agent's")
        known = self._store.uploads.find(member.round, identity, member.attempt)
        if known is not None and known.digest == header.digest():
            return self.uploads.status(identity, member.round, member.attempt)
        cells.check_upload(identity, signed)
        return self.uploads.begin_masked(
            identity, signed, round_number=member.round, attempt=member.attempt
        )

    def complete_upload(self, identity: bytes, round_number: int, attempt: int) -> UploadStatus:
        """Verify and accept an upload; see `Uploads.complete`."""
        status = self.uploads.complete(identity, round_number, attempt)
        self.work.notify()
        return status

    def withdraw(self, identity: bytes, signed: Signed[Withdrawal]) -> None:
        """Give an agent's place in a round to another.

        Args:
            identity: Who makes the request.
            signed: The withdrawal; again changes nothing.

        Raises:
            Refusal: A signature of another key, another federation, no place in the round, an
                update already accepted, or a round that has closed.
        """
        body = signed.body
        require_author(identity, body.agent)
        try:
            verify(signed, "withdrawal", key=identity)
        except SignatureError as error:
            raise Refusal(ProblemType.BAD_SIGNATURE, str(error)) from error
        require_federation(self.charter, body.federation)
        digest = domain_hash("withdrawal", body.as_json())
        self._store.rounds.withdraw(body.round, identity, reason=body.reason.value, digest=digest)
        self.uploads.sweep()
        self.work.notify()

    def admit_evaluator(self, request: VerifiedRequest) -> bytes:
        """Admit a request of the evaluator once.

        Raises:
            Refusal: Of anyone else, `stale` or `replayed`.
        """
        self.evaluations.require_evaluator(request.identity)
        self.membership.admit_once(request)
        return request.identity

    def judge(self, identity: bytes, signed: Signed[EvaluationReport]) -> None:
        """Take the evaluator's report; see `Evaluations.receive`."""
        self.evaluations.receive(identity, signed)
        self.work.notify()

    def incidents(self) -> tuple[IncidentRow, ...]:
        """What the operator should know of, oldest first."""
        return self._store.incidents.all()

    def check(self) -> None:
        """Ask the database for one number.

        Raises:
            StoreError: It does not answer.
        """
        self._store.changes()

    def status(self) -> FederationStatus:
        """The federation as anyone may see it: counts, no identities."""
        now = self.clock.now()
        counts = self._store.counts(seen_after=now - self.config.server.presence_s)
        rules = self.charter.manifest.rounds
        last = self._store.rounds.latest()
        return FederationStatus(
            name=self.charter.manifest.name,
            n_enrolled=counts.n_enrolled,
            n_present=counts.n_present,
            newest_release=counts.newest_release,
            n_rounds=rules.n_rounds,
            n_releases_of_rounds=counts.n_releases_of_rounds,
            finished=counts.n_releases_of_rounds >= rules.n_rounds,
            round=None if last is None else self._round_status(last),
            bytes_up=counts.bytes_up,
            bytes_down=counts.bytes_down,
            server_time=now,
        )

    def _round_status(self, row: RoundRow) -> RoundStatus:
        manifest = round_manifest(row)
        progress = self._store.rounds.progress(row.number)
        cells = () if self.cells is None else self._store.cells.of_round(row.number)
        return RoundStatus(
            round=row.number,
            phase=row.phase,
            n_selected=progress.n_selected,
            n_uploads=progress.n_accepted,
            n_uploading=len(progress.receiving),
            bytes_received=progress.bytes_received,
            opened_at=manifest.opened_at,
            deadline_at=manifest.deadline_at,
            n_ready=progress.n_ready,
            n_cells=len(cells),
            n_cells_failed=sum(cell.phase is CellPhase.FAILED for cell in cells),
            failure=row.failure,
        )

    def _has_space(self) -> bool:
        try:
            self._blobs.require_space(self.charter.update_n_bytes)
        except BlobError:
            return False
        return True


def open_federation(
    directory: Path,
    *,
    clock: Clock | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Setting | None] | None = None,
    may_edit: bool = False,
) -> Federation:
    """Open a federation that `init` founded.

    Args:
        directory: Its folder.
        clock: The one source of time; the machine's by default.
        environment: Settings of `[server]`; `os.environ` by default.
        flags: Settings that go before both.
        may_edit: Only for the one process that serves: an edited recipe makes the manifest and
            release 0 anew, or is refused once somebody has joined, and what a killed server left
            on disk is deleted. Others go by the manifest that is served.

    Raises:
        ConfigError: The settings cannot be honoured, or differ from what the members accepted.
        KeyFileError: The keys cannot be used.
        StoreError: The database cannot be used.
        ChainError: The releases are not this federation's.
    """
    config = _load(directory, environment=environment, flags=flags)
    keys = load_keys(directory)
    database_url, blobs_url = places_of(directory, config)
    blobs = open_blobs(blobs_url, min_free_bytes=config.server.min_free_bytes)
    store = Store(Database(database_url))
    try:
        store.check_version()
        charter = (
            reconcile(directory, config=config, keys=keys, store=store, blobs=blobs)
            if may_edit
            else stored_charter(directory, keys=keys, store=store)
        )
        federation = Federation(
            config=config,
            charter=charter,
            store=store,
            blobs=blobs,
            clock=clock or SystemClock(),
        )
        federation.releases.verify_newest()
        if may_edit:
            _tidy(federation.uploads, blobs)
    except BaseException:
        store.close()
        raise
    return federation


def _tidy(uploads: Uploads, blobs: Blobs) -> None:
    try:
        uploads.tidy()
        blobs.tidy(ADAPTERS)
    except BlobError as error:
        _log.warning("what a killed server left behind is not deleted yet", error=str(error))


def read_settings(
    directory: Path, *, flags: Mapping[str, Setting | None] | None = None
) -> ServerSection:
    """How a federation's server is to be run, before it is opened.

    Raises:
        ConfigError: The settings cannot be honoured.
    """
    return _load(directory, environment=None, flags=flags).server


def _load(
    directory: Path,
    *,
    environment: Mapping[str, str] | None,
    flags: Mapping[str, Setting | None] | None,
) -> ServerConfig:
    source = os.environ if environment is None else environment
    return load_config(directory / CONFIG_NAME, environment=source, flags=flags)

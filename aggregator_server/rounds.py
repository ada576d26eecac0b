"""The round's state machine: one phase object for each phase that does work.

A phase has a name and its work; the work ends in an event, whose successor stands in
`protocol.phases.ROUND_TRANSITIONS`, or in None while there is something to wait for. Every fault
ends in FAILED with its reason. The state is in the store alone: after `kill -9` the next `advance`
takes up the phase where it stood, and each phase's work can be done again.
"""

import dataclasses
import secrets
import threading
from collections.abc import Mapping
from typing import Final

import structlog

from aggregator_server.blobs import Blobs
from aggregator_server.candidates import CandidateMaker
from aggregator_server.charter import Charter
from aggregator_server.closing import Ending, decide
from aggregator_server.config import ServerSection
from aggregator_server.errors import (
    BlobError,
    BlobMissingError,
    HelperError,
    NoSpaceError,
    ServerError,
    StaleWriteError,
    StoreBusyError,
)
from aggregator_server.evaluations import Evaluations
from aggregator_server.evidence import Evidence
from aggregator_server.gating import EvaluatorsGate, Passed, Ungated
from aggregator_server.masking.cells import Cells
from aggregator_server.masking.gathering import FIRST_WAVE, Waves
from aggregator_server.masking.helped import HelpedRounds
from aggregator_server.masking.vectors import sweep_sums
from aggregator_server.merging import Merger
from aggregator_server.phase import Found, Phase, round_manifest
from aggregator_server.releases import Releases, RoundResult
from aggregator_server.selection import cohort_size, draw
from aggregator_server.store.rounds import TERMINAL
from aggregator_server.store.rows import RoundRow
from aggregator_server.store.store import Store
from aggregator_server.uploads import Uploads
from privacy.errors import PrivacyError
from protocol.blocks import CellMasking, EvaluatorGate, HelperMasking
from protocol.chain import CellRef, RoundManifest
from protocol.clock import Clock
from protocol.errors import ProtocolError
from protocol.limits import MAX_TEXT_CHARS
from protocol.phases import ROUND_TRANSITIONS, RoundEvent, RoundPhase, advance
from protocol.signing import Signed, sign
from protocol.wire import parse
from quant.errors import QuantError

_SEED_BYTES: Final = 32
_TRANSIENT: Final = (StoreBusyError, NoSpaceError)
_OURS: Final = (ServerError, ProtocolError, QuantError, PrivacyError)
"""Errors whose message is written for people; any other may name what is not for everyone."""
_log = structlog.get_logger(__name__)


class Open:
    """OPEN: fills free places, and closes the round when it is time."""

    name = RoundPhase.OPEN

    def __init__(
        self,
        store: Store,
        charter: Charter,
        clock: Clock,
        *,
        presence_s: float,
        waves: Waves | None,
        helped: bool,
    ) -> None:
        """Use the rules of the charter."""
        self._store = store
        self._rules = charter.manifest.rounds
        self._clock = clock
        self._presence_s = presence_s
        self._waves = waves
        self._helped = helped

    def work(self, row: RoundRow) -> Found | None:
        """Replace those who withdrew; close at the target, or by the deadline's rules.

        In the masked mode READY messages count instead of uploads, and cells are formed.
        """
        manifest = round_manifest(row)
        now = self._clock.now()
        progress = self._store.rounds.progress(row.number)
        n_free = manifest.cohort_size - progress.n_selected
        if n_free > 0:
            candidates = self._store.rounds.candidates(
                row.number, seen_after=now - self._presence_s
            )
            drawn = draw(manifest.selection_seed, candidates, n=n_free, round_number=row.number)
            if drawn:
                self._store.rounds.select(row.number, drawn)
                progress = self._store.rounds.progress(row.number)
        waiting = () if self._waves is None else self._waves.waiting(row)
        if self._waves is not None:
            progress = dataclasses.replace(
                progress,
                n_accepted=len(waiting),
                n_open=progress.n_selected - progress.n_ready,
                receiving=(),
            )
        decision = decide(self._rules, manifest, progress, now=now)
        if decision.ending is Ending.WAIT:
            return None
        n_accepted = progress.n_accepted if self._waves is None else None
        if decision.ending is Ending.FAIL:
            return Found(event=RoundEvent.FAIL, failure=decision.reason, n_accepted=n_accepted)
        _log.info("round closes", round=row.number, reason=decision.reason)
        if self._waves is not None:
            self._waves.form(manifest, waiting, wave=FIRST_WAVE)
            return Found(event=RoundEvent.WAVE_GATHERS, journalled=True)
        event = RoundEvent.WAVE_GATHERS if self._helped else RoundEvent.CELLS_ENDED
        return Found(event=event, n_accepted=n_accepted)


class Helped:
    """GATHERING under helper masks: the helper is asked until it answers, or time is up."""

    name = RoundPhase.GATHERING

    def __init__(self, helped: HelpedRounds, clock: Clock, *, wait_s: float) -> None:
        """Wait for the helper so long after the round's cap."""
        self._helped = helped
        self._clock = clock
        self._wait_s = wait_s

    def work(self, row: RoundRow) -> Found | None:
        """Take the masks off; None while the helper does not answer."""
        signed = parse(Signed[RoundManifest], row.manifest)
        try:
            n_cells = self._helped.close(row, signed)
        except HelperError as error:
            if self._clock.now() < signed.body.cap_at + self._wait_s:
                _log.warning("the round waits for the helper", round=row.number, error=str(error))
                return None
            return Found(event=RoundEvent.FAIL, failure=str(error))
        if n_cells:
            return Found(event=RoundEvent.CELLS_ENDED)
        return Found(event=RoundEvent.FAIL, failure="no cell of the round gave a sum")


class Gathering:
    """GATHERING: the cells of a masked round work; the round goes on once all are over."""

    name = RoundPhase.GATHERING

    def __init__(self, store: Store, waves: Waves) -> None:
        """Let the waves move the cells."""
        self._store = store
        self._waves = waves

    def work(self, row: RoundRow) -> Found | None:
        """Move the cells on; None while one of them may still give a sum."""
        if not self._waves.advance(row, round_manifest(row)):
            return None
        if self._store.uploads.cells(row.number):
            return Found(event=RoundEvent.CELLS_ENDED)
        return Found(event=RoundEvent.FAIL, failure="no cell of the round gave a sum")


class Unmasked:
    """UNMASKED: every cell's sum is known; the filter decides which of them count, and how much."""

    name = RoundPhase.UNMASKED

    def __init__(self, store: Store, merger: Merger) -> None:
        """Read cells from the store."""
        self._store = store
        self._merger = merger

    def work(self, row: RoundRow) -> Found | None:
        """Decide once: what is journalled here is what will be averaged."""
        decision = self._merger.decide(self._store.uploads.cells(row.number))
        if decision.report.n_rejected:
            _log.warning(
                "the filter removed cells",
                round=row.number,
                removed={
                    cell.transcript.hex()[:8]: cell.removed
                    for cell in decision.cells
                    if cell.removed is not None
                },
            )
        return Found(
            event=RoundEvent.FILTER_DONE, filter_report=decision.canonical().decode("ascii")
        )


class Gated:
    """GATED: the candidate that passed becomes the release."""

    name = RoundPhase.GATED

    def __init__(self, store: Store, releases: Releases) -> None:
        """Read cells, write a release."""
        self._store = store
        self._releases = releases

    def work(self, row: RoundRow) -> Found | None:
        """Publish, in one transaction with the round's end."""
        passed = parse(Passed, row.passed or "")
        candidate, cells = passed.candidate, self._store.uploads.cells(row.number)
        kept = frozenset(candidate.accepted)
        accepted, rejected = (
            tuple(
                CellRef(transcript=cell.transcript, members=cell.members_digest)
                for cell in cells
                if (cell.transcript in kept) is wanted
            )
            for wanted in (True, False)
        )
        release = self._releases.publish(
            RoundResult(
                number=row.number,
                digest=row.digest,
                files=candidate.files,
                accepted=accepted,
                rejected=rejected,
                aggregation=candidate.aggregation,
                filter=candidate.filter,
                verdict=passed.verdict,
                optimizer_state=candidate.optimizer_state,
                control_book=candidate.control_book,
            )
        )
        n_agents = candidate.aggregation.n_agents
        _log.info("release published", release=release.number, n_agents=n_agents)
        return Found(event=RoundEvent.RELEASE_JOURNALLED, journalled=True)


class Rounds:
    """Opens rounds and moves them on.

    Guarantees:
        1. A round number belongs to one manifest digest; failed rounds consume it.
        2. An upload that was acknowledged as accepted is in the sum of its round, once; one that
           was not never is.
        3. After `kill -9` the same round goes on.
    """

    def __init__(
        self,
        *,
        store: Store,
        blobs: Blobs,
        charter: Charter,
        uploads: Uploads,
        releases: Releases,
        clock: Clock,
        settings: ServerSection,
        masked: Cells | HelpedRounds | None = None,
    ) -> None:
        """Build the phases; with `masked`, those of its trust model."""
        presence_s = settings.presence_s
        self._store = store
        self._blobs = blobs
        self._charter = charter
        self._uploads = uploads
        self._releases = releases
        self._evaluations = Evaluations(store, blobs, charter)
        self._evidence = Evidence(store, charter, clock) if settings.quarantine else None
        self._clock = clock
        self._presence_s = presence_s
        self._lock = threading.Lock()
        masking, gate = charter.manifest.masking, charter.manifest.gate
        waves = None
        gathering: tuple[Phase, ...] = ()
        if isinstance(masked, Cells) and isinstance(masking, CellMasking):
            waves = Waves(
                store=store,
                charter=charter,
                masking=masking,
                cells=masked,
                clock=clock,
                presence_s=presence_s,
            )
            gathering = (Gathering(store, waves),)
        elif isinstance(masked, HelpedRounds) and isinstance(masking, HelperMasking):
            gathering = (Helped(masked, clock, wait_s=masking.helper_wait_s),)
        merger = Merger(store, blobs, uploads, releases, charter)
        maker = CandidateMaker(store, blobs, merger, releases, charter)
        phases: tuple[Phase, ...] = (
            Open(
                store,
                charter,
                clock,
                presence_s=presence_s,
                waves=waves,
                helped=isinstance(masked, HelpedRounds),
            ),
            *gathering,
            Unmasked(store, merger),
            EvaluatorsGate(store, maker, releases, charter, gate, clock)
            if isinstance(gate, EvaluatorGate)
            else Ungated(maker),
            Gated(store, releases),
        )
        self._phases: Mapping[RoundPhase, Phase] = {phase.name: phase for phase in phases}

    def advance(self) -> bool:
        """Do all that can be done now; the clockwork's one call.

        Returns:
            Whether anything moved.
        """
        moved = False
        with self._lock:
            try:
                while self._step():
                    moved = True
                self._uploads.sweep()
                self._evaluations.sweep()
                sweep_sums(self._store, self._blobs)
            except _TRANSIENT as error:
                _log.warning("the round waits", error=str(error))
        return moved

    def _step(self) -> bool:
        row = self._store.rounds.latest()
        try:
            if row is None or row.phase in TERMINAL:
                return self._open_next()
            return self._work(row)
        except StaleWriteError as error:
            _log.info("another writer was first", error=str(error))
            return True

    def _work(self, row: RoundRow) -> bool:
        try:
            found = self._phases[row.phase].work(row)
        except (*_TRANSIENT, StaleWriteError):
            raise
        except BlobMissingError as error:
            found = _failed(row, error)
        except BlobError as error:
            _log.warning("the round waits", round=row.number, error=str(error))
            return False
        except Exception as error:  # noqa: BLE001 - every fault of a round ends in FAILED
            found = _failed(row, error)
        if found is None:
            return False
        successor = advance(ROUND_TRANSITIONS, row.phase, found.event)
        if not found.journalled:
            self._store.rounds.move(
                row.number,
                seen=row.phase,
                to=successor,
                n_accepted=found.n_accepted,
                filter_report=found.filter_report,
                passed=found.passed,
                failure=found.failure,
                incident=found.incident,
            )
        _log.info("round moved", round=row.number, phase=successor.value, failure=found.failure)
        return True

    def _open_next(self) -> bool:
        rules = self._charter.manifest.rounds
        n_done = self._store.releases.n_of_rounds()
        if n_done >= rules.n_rounds:
            return False
        if self._evidence is not None:
            self._evidence.review()
        now = self._clock.now()
        present = self._store.agents.present(seen_after=now - self._presence_s)
        if len(present) < rules.min_cohort:
            return False
        self._blobs.require_space(self._charter.update_n_bytes)
        last = self._store.rounds.latest()
        manifest = self._manifest(
            1 if last is None else last.number + 1,
            n_present=len(present),
            n_done=n_done,
            now=now,
        )
        signed = sign(self._charter.keys.server, "round", manifest).signed
        row = RoundRow(
            number=manifest.round,
            phase=RoundPhase.OPEN,
            manifest=signed.canonical(),
            digest=manifest.digest(),
            failure=None,
            filter_report=None,
            passed=None,
        )
        drawn = draw(
            manifest.selection_seed,
            present,
            n=manifest.cohort_size,
            round_number=manifest.round,
        )
        self._store.rounds.open(row, release=manifest.release, ranks=drawn)
        _log.info("round opened", round=row.number, n_selected=len(drawn))
        return True

    def _manifest(self, number: int, *, n_present: int, n_done: int, now: float) -> RoundManifest:
        manifest = self._charter.manifest
        rules = manifest.rounds
        release = self._releases.newest()
        return RoundManifest(
            federation=manifest.federation,
            federation_digest=self._charter.digest,
            round=number,
            release=release.number,
            release_digest=release.digest(),
            sent=release.sent,
            selection_seed=secrets.token_bytes(_SEED_BYTES),
            cohort_size=cohort_size(rules, n_present=n_present),
            schedule_start=n_done / rules.n_rounds,
            schedule_end=(n_done + 1) / rules.n_rounds,
            update_n_bytes=self._charter.turns.at(release.number).n_bytes,
            opened_at=now,
            deadline_at=now + rules.deadline_s,
            cap_at=now + rules.cap_s,
        )


def _failed(row: RoundRow, error: Exception) -> Found:
    _log.error("round failed", round=row.number, exc_info=error)
    reason = str(error) if isinstance(error, _OURS) else "an internal fault; see the server's log"
    return Found(event=RoundEvent.FAIL, failure=reason[:MAX_TEXT_CHARS])

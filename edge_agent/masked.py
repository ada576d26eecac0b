"""A masked round on the agent's side: `privacy.secagg.agent` with a journal and a transport.

Each turn takes one step: it makes the next message, keeps it, sends it, and asks for news. Killed
at any moment and started again, the agent repeats the messages that it kept.
"""

import hashlib
import math
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from edge_agent.durable import write_durably, write_hashed
from edge_agent.errors import JournalError, RefusedError, TrainingError, TrustError
from edge_agent.journal import Part
from edge_agent.member import Member
from edge_agent.transport import Transport, Upload
from privacy.errors import UpdateRangeError
from privacy.fixed_point import EncodingPlan, encode
from privacy.masked_vector import masked_runs
from privacy.masking import Words
from privacy.noise import SecureStream
from privacy.secagg.agent import SecAggAgent
from privacy.secagg.checks import CellPolicy
from privacy.turns import Turns
from privacy.updates import PlainUpdate
from protocol.blocks import CellMasking
from protocol.checks import Check, CheckError
from protocol.clock import Clock
from protocol.limits import LONG_POLL_S, MAX_READY_ATTEMPTS, PART_BYTES
from protocol.masked import (
    BundleNews,
    ConfirmedNews,
    EndedNews,
    Failed,
    FailedNews,
    NoNews,
    RosterNews,
    SurvivorsNews,
)
from protocol.messages import UploadState
from protocol.phases import AgentEvent, AgentPhase
from protocol.problems import ProblemType
from protocol.signing import Signed

MASKED_PHASES: Final = frozenset(
    {
        AgentPhase.READY,
        AgentPhase.SHARED,
        AgentPhase.UPLOADED,
        AgentPhase.CONFIRMED,
        AgentPhase.REVEALED,
    }
)
"""Where a part stands while a cell works on it."""
_GONE_ON: Final = frozenset({ProblemType.STAGE_CLOSED, ProblemType.ROUND_CLOSED})
_MENDABLE: Final = frozenset({ProblemType.INCOMPLETE, ProblemType.DIGEST_MISMATCH})
_MAX_UPLOAD_TRIES: Final = 5


def encoded(update: PlainUpdate, plan: EncodingPlan) -> Words:
    """A finished update as words, its checks done.

    Raises:
        TrainingError: It is zero, not finite, or does not fit the agreed range (checks 15, 18).
    """
    if not update.vector.any():
        raise TrainingError(str(CheckError(Check.UNMOVED, "The update is zero.")))
    try:
        return encode(
            update.vector,
            weight=update.weight,
            plan=plan,
            stream=SecureStream(),
            participation=update.participation,
        )
    except UpdateRangeError as error:
        finite = bool(np.isfinite(update.vector).all())
        check = Check.OUT_OF_RANGE if finite else Check.NOT_FINITE
        raise TrainingError(str(CheckError(check, f"{error}."))) from error


class MaskedRounds:
    """The masked part of an agent's work.

    Guarantees:
        1. Every message is in the journal before its first byte leaves; for one transcript it is
           made once, whatever happens.
        2. The encoded update is made once and every attempt masks the same one.
        3. A check that fails ends the part: nothing more of it leaves, and the owner is told.
        4. Once CONFIRM is signed, the update is masked for no other cell.

    Args:
        member: Home, journal, manifest, identity, and what the owner asks of a cell.
        masking: The manifest's block.
        turns: How the updates of each round become words.
        transport: To the server.
        clock: Time.
        say: Tells the owner what happens.
        wait: Waits, unless the owner stops the agent.
        stopping: Whether the owner has.

    Raises:
        JournalError: The membership has no credential.
        TrustError: The federation's cells may be smaller than the owner accepts (check 3).
    """

    def __init__(
        self,
        *,
        member: Member,
        masking: CellMasking,
        turns: Turns,
        transport: Transport,
        clock: Clock,
        say: Callable[[str, str], None],
        wait: Callable[[float], None],
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Check the manifest against the owner's wishes; nothing is sent."""
        owner, credential = member.owners_cell, member.membership.credential
        if credential is None:
            msg = "the enrolment was not finished; run `join` again"
            raise JournalError(msg)
        if masking.min_cell < owner.min_cell:
            msg = (
                f"this federation forms cells of {masking.min_cell} agents, and you ask for "
                f"{owner.min_cell} at least"
            )
            raise TrustError(msg, Check.SMALL_CELL)
        self._home = member.home
        self._journal = member.journal
        self._signer = member.signer
        self._credential = credential
        self._manifest = member.membership.federation.body
        self._masking = masking
        self._turns = turns
        self._owner = owner
        self._transport = transport
        self._clock = clock
        self._say = say
        self._wait = wait
        self._stopping = stopping
        self._heard: set[tuple[bytes, AgentPhase]] = set()
        """What the server has acknowledged in this process; more is only repeated."""
        self._ready_until: dict[bytes, float] = {}

    # The finished update

    def keep(self, part: Part, update: PlainUpdate) -> Part:
        """Encode a finished update, once, and keep it.

        Raises:
            TrainingError: It is zero, not finite, or does not fit the agreed range (checks 15, 18).
            JournalError: It cannot be written.
        """
        words = encoded(update, self._plan(part))
        path = self._home.encoded_update(part.round, part.attempt)
        try:
            write_durably(path, words.data)
        except OSError as error:
            msg = f"cannot keep the finished update at {path}: {error}; free some space"
            raise JournalError(msg) from error
        return self._journal.move_part(
            part,
            AgentEvent.TRAINING_DONE,
            now=self._clock.now(),
            words_sha256=hashlib.sha256(words.data).digest(),
        )

    # One step

    def turn(self, part: Part) -> None:
        """Take one step with a part that is trained.

        Raises:
            TransportError: The server cannot be reached, or refuses what must be said.
            JournalError: The finished update cannot be read.
        """
        if part.phase is AgentPhase.TRAINED:
            if not self._delayed(part):
                return
            part = self._get_ready(part)
        state = self._journal.attempt(part.round)
        if state is None:
            self._abandon(part, "the attempt is no longer in the journal")
            return
        agent = SecAggAgent(self._signer, self._policy(part), state)
        try:
            self._step(part, agent)
        except CheckError as error:
            self._say("refused", f"round {part.round}: {error}")
            self._abandon(part, str(error))

    def _plan(self, part: Part) -> EncodingPlan:
        return self._turns.plan_at(part.manifest.body.release)

    def _policy(self, part: Part) -> CellPolicy:
        return CellPolicy(
            federation=self._manifest.federation,
            round=part.round,
            round_digest=part.manifest.body.digest(),
            server=self._manifest.server,
            registrar=self._manifest.registrar,
            masking=self._masking,
            body_n_bytes=self._plan(part).n_bytes,
            min_members=max(self._masking.min_cell, self._owner.min_cell),
            friends=self._owner.friends,
            min_friends=self._owner.min_friends,
        )

    def _delayed(self, part: Part) -> bool:
        """Wait before the first READY, as its time would tell how long training took.

        Returns:
            Whether the wait is over, and was not cut short by a stop.
        """
        if self._journal.n_attempts(part.round) == 0 and self._masking.ready_delay_s > 0:
            longest_ms = int(self._masking.ready_delay_s * 1000)
            self._wait(secrets.randbelow(longest_ms + 1) / 1000)
        return not self._stopping()

    def _get_ready(self, part: Part) -> Part:
        n_attempts = self._journal.n_attempts(part.round)
        agent = SecAggAgent.begin(
            self._signer,
            self._policy(part),
            credential=self._credential,
            attempt=n_attempts + 1,
            expires_at=math.ceil(part.manifest.body.cap_at),
            # Under P2 one noisy update goes into one upload: two sums would average its noise out.
            tried_again=self._plan(part).noise is not None
            or self._journal.upload_begun(part.round),
        )
        self._say("ready", f"round {part.round}: waiting for a cell")
        return self._journal.save_attempt(part, agent.state)

    def _step(self, part: Part, agent: SecAggAgent) -> None:
        match agent.state.phase:
            case AgentPhase.READY:
                self._tell(agent, lambda: self._transport.ready(agent.state.ready))
                self._hear(part, agent)
            case AgentPhase.SHARED:
                self._share(part, agent)
            case AgentPhase.UPLOADED:
                self._hear(part, agent)
            case AgentPhase.CONFIRMED:
                self._confirm(part, agent)
            case _:
                self._reveal(part, agent)

    def _share(self, part: Part, agent: SecAggAgent) -> None:
        shares = agent.state.shares
        if shares is not None:
            self._tell(agent, lambda: self._transport.shares(shares, round_number=part.round))
        if not agent.state.headers:
            self._hear(part, agent)
            return
        for complaint in agent.state.complaints:
            self._say("complaint", f"round {part.round}: a member's shares do not open")
            send = partial(self._transport.complain, complaint, round_number=part.round)
            self._quietly(send)
        if agent.state.upload is None:
            try:
                digest = self._mask(part, agent)
            except JournalError:
                if self._is_over(part, agent):
                    return
                raise
            agent.sign_upload(digest)
            self._journal.save_attempt(part, agent.state)
        if self._upload(part, agent):
            agent.uploaded()
            self._journal.save_attempt(part, agent.state)
        else:
            self._hear(part, agent)  # the cell has gone on: what became of it?

    def _confirm(self, part: Part, agent: SecAggAgent) -> None:
        confirm = agent.state.confirm
        if confirm is not None:
            self._tell(agent, lambda: self._transport.confirm(confirm, round_number=part.round))
        self._hear(part, agent)

    def _reveal(self, part: Part, agent: SecAggAgent) -> None:
        reveal = agent.state.reveal
        if reveal is not None:
            self._quietly(lambda: self._transport.reveal(reveal, round_number=part.round))
        self._end(part, "its sum counts this update, if the cell is not lost")

    def _tell(self, agent: SecAggAgent, send: Callable[[], object]) -> None:
        key = (agent.state.ready.body.nonce, agent.state.phase)
        if key not in self._heard:
            self._quietly(send)
            self._heard.add(key)
            self._ready_until.setdefault(agent.state.ready.body.nonce, self._latest())

    def _quietly(self, send: Callable[[], object]) -> bool:
        """Send; where the cell has gone on without it, the news will say what became of it."""
        try:
            send()
        except RefusedError as error:
            if error.document.problem_type not in _GONE_ON:
                raise
            return False
        return True

    def _latest(self) -> float:
        rounds = self._manifest.rounds
        return self._clock.monotonic() + rounds.cap_s

    # News

    def _hear(self, part: Part, agent: SecAggAgent) -> None:
        answer = self._transport.cell_news(
            round_number=part.round,
            attempt=agent.state.ready.body.attempt,
            phase=agent.state.phase,
            wait_s=LONG_POLL_S,
        )
        match answer.news:
            case NoNews(retry_after_s=retry_after_s):
                self._wait(retry_after_s)
                return
            case RosterNews(ready_list=ready_list, roster=roster):
                self._check_age(agent)
                agent.receive_roster(ready_list, roster)
                n_members = len(roster.body.members)
                self._say("cell", f"round {part.round}: in a cell of {n_members}")
            case BundleNews(bundle=bundle):
                agent.receive_bundle(bundle)
            case SurvivorsNews(survivors=survivors):
                agent.receive_survivors(survivors)
            case ConfirmedNews(confirmed=confirmed):
                agent.receive_confirmed(confirmed)
            case FailedNews(failed=failed):
                self._after_failure(part, agent, failed)
                return
            case EndedNews(counted=counted):
                self._after_end(part, agent, counted=counted)
                return
        self._journal.save_attempt(part, agent.state)

    def _is_over(self, part: Part, agent: SecAggAgent) -> bool:
        """Whether the cell is over for this agent; then the part has ended."""
        answer = self._transport.cell_news(
            round_number=part.round,
            attempt=agent.state.ready.body.attempt,
            phase=agent.state.phase,
            wait_s=0.0,
        )
        match answer.news:
            case FailedNews():
                self._abandon(part, "its cell failed, and the finished update is lost")
            case EndedNews(counted=counted):
                self._after_end(part, agent, counted=counted)
            case _:
                return False
        return True

    def _check_age(self, agent: SecAggAgent) -> None:
        # By the monotonic clock: the machine's own may be wrong, and the server's is its word.
        until = self._ready_until.get(agent.state.ready.body.nonce)
        if until is not None and self._clock.monotonic() > until:
            raise CheckError(Check.EXPIRED_READY, "Yours is too old by your own clock.")

    def _after_failure(self, part: Part, agent: SecAggAgent, failed: Signed[Failed]) -> None:
        phase, reason = agent.state.phase, failed.body.reason.value
        may_retry = agent.receive_failed(failed)
        if not may_retry:
            consumed = phase is AgentPhase.CONFIRMED or phase is AgentPhase.REVEALED
            check = Check.CONSUMED if consumed else Check.NO_RETRY
            self._abandon(part, f"its cell failed: {reason}. {check.sentence} {check.code}")
            return
        if not failed.body.may_retry or agent.state.ready.body.attempt >= MAX_READY_ATTEMPTS:
            self._abandon(part, f"its cell failed: {reason}")
            return
        self._say("retrying", f"round {part.round}: its cell failed ({reason}); once more")
        self._masked_path(part, agent).unlink(missing_ok=True)
        self._get_ready(self._journal.fail_attempt(part))

    def _after_end(self, part: Part, agent: SecAggAgent, *, counted: bool) -> None:
        if counted and agent.state.phase in {AgentPhase.UPLOADED, AgentPhase.CONFIRMED}:
            self._journal.move_part(
                part, AgentEvent.SUM_KNOWN, now=self._clock.now(), note="in its cell's sum"
            )
            self._finish(part, "its cell's sum is known")
            return
        self._abandon(part, "the cell went on without this agent")

    def _end(self, part: Part, note: str) -> None:
        self._journal.end_part(part, now=self._clock.now(), note=note)
        self._finish(part, "revealed; nothing more is needed of this agent")

    def _finish(self, part: Part, text: str) -> None:
        self._discard()
        self._say("uploaded", f"round {part.round}: {text}")

    def _abandon(self, part: Part, note: str) -> None:
        self._journal.abandon_part(part, now=self._clock.now(), note=note)
        self._discard()
        self._say("abandoned", f"round {part.round}: {note}")

    def _discard(self) -> None:
        for path in self._home.update_files():
            path.unlink(missing_ok=True)

    # The masked update

    def _masked_path(self, part: Part, agent: SecAggAgent) -> Path:
        return self._home.masked_update(part.round, agent.state.ready.body.attempt)

    def _mask(self, part: Part, agent: SecAggAgent) -> bytes:
        """Write the masked update, a chunk at a time.

        Returns:
            Its SHA-256.
        """
        plan, encoding = agent.mask_plan(), self._plan(part)
        source = self._home.encoded_update(part.round, part.attempt)
        try:
            words = np.memmap(source, encoding.dtype, mode="r")
            if hashlib.sha256(words.data).digest() != part.words_sha256:
                msg = f"the finished update of round {part.round} has changed on disk"
                raise JournalError(msg)
            runs = masked_runs(words, plan.masks, plan.checks, encoding)
            return write_hashed(self._masked_path(part, agent), (run.data for run in runs))
        except (OSError, ValueError) as error:
            msg = f"the finished update of round {part.round} cannot be masked: {error}"
            raise JournalError(msg) from error

    def _upload(self, part: Part, agent: SecAggAgent) -> bool:
        """Send the masked update; False when the cell no longer takes it."""
        self._say("uploading", f"round {part.round}: {self._plan(part).n_bytes} masked bytes")
        for _ in range(_MAX_UPLOAD_TRIES):
            try:
                if self._upload_once(part, agent):
                    return True
            except RefusedError as error:
                if error.document.problem_type in _GONE_ON:
                    return False
                if error.document.problem_type not in _MENDABLE:
                    raise
        return False

    def _upload_once(self, part: Part, agent: SecAggAgent) -> bool:
        signed = agent.state.upload
        if signed is None:  # cannot be: it was signed just before
            return False
        status = self._transport.begin_masked_upload(signed, round_number=part.round)
        if status.state is UploadState.ACCEPTED:
            return True
        upload = Upload(
            round=part.round,
            attempt=agent.state.ready.body.attempt,
            head=signed.body,
            what="masked update",
        )
        if any(index >= upload.head.n_parts for index in status.missing):
            msg = f"the server asks for part {max(status.missing)} of {upload.head.n_parts}"
            raise TrustError(msg)
        try:
            with self._masked_path(part, agent).open("rb") as file:
                for index in status.missing:
                    file.seek(index * PART_BYTES)
                    self._transport.put_part(upload, index, file.read(PART_BYTES))
        except OSError as error:
            msg = f"the masked update of round {part.round} cannot be read: {error}"
            raise JournalError(msg) from error
        return self._transport.complete(upload).state is UploadState.ACCEPTED

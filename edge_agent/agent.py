"""The agent's loop: poll, verify, fetch, train, upload; through restarts, pauses and lost answers.

The base model is loaded once and stays; adapters are swapped. All state that matters is in the
journal, so the process is disposable: killed at any moment and started again, it goes on with the
same part in the same round.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from edge_agent.chain import check_round
from edge_agent.controls import OwnControl
from edge_agent.data.tokens import TokenizedData
from edge_agent.errors import (
    AgentError,
    CheckpointError,
    DataError,
    JournalError,
    OutOfMemoryError,
    RefusedError,
    TrainingError,
    TrainingStoppedError,
    TransportError,
    TrustError,
)
from edge_agent.following import ReleaseFollower
from edge_agent.helped import HelpedRounds
from edge_agent.journal import Part
from edge_agent.masked import MaskedRounds
from edge_agent.member import Member
from edge_agent.own_part import own_part
from edge_agent.plain import PlainRounds
from edge_agent.politeness import OwnersWishes
from edge_agent.training.gradients import GradientRule, MeanGradient
from edge_agent.training.planning import Chosen, choose_settings
from edge_agent.training.sampling import BatchSampler, ShuffledBatches
from edge_agent.training.trainer import LocalTrainer, RoundRecipe, TrainerOptions, TrainingProgress
from edge_agent.transport import Transport, Upload
from privacy.errors import AccountingError, LedgerError, PrivacyError
from privacy.ledger import Quote
from privacy.updates import PlainUpdate
from protocol.blocks import CellMasking, HelperMasking, Weighting
from protocol.chain import RoundManifest
from protocol.checks import Check
from protocol.clock import Clock
from protocol.limits import LONG_POLL_S, PART_BYTES
from protocol.messages import (
    BodyHead,
    TrainTask,
    UploadState,
    UploadStatus,
    WaitReason,
    WaitTask,
    Withdrawal,
    WithdrawalReason,
)
from protocol.phases import AgentEvent
from protocol.privacy import AgentPrivacy, ExamplePrivacy
from protocol.problems import Advice, ProblemType
from protocol.signing import Signed, sign
from protocol.wire import domain_hash
from quant.base_model import LoadedBase
from quant.lora import AdaptedModel
from quant.lora_turns import sent_factors

_MAX_UPLOAD_TRIES: Final = 5
_WAIT_SLICE_S: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class AgentEventReport:
    """Something that the owner may want to see; never sent anywhere."""

    kind: str
    text: str
    progress: TrainingProgress | None = None


class Agent:
    """One membership at work.

    Guarantees:
        1. A finished update and its signed header are journalled before a byte of them leaves;
           after a restart the same bytes are sent under the same attempt.
        2. Nothing is trained on an adapter, a release or a round whose checks failed.
        3. An update that is zero or not finite is never sent.
        4. Where the federation asks for differential privacy, nothing is trained without it.

    Args:
        member: Home, journal, what the owner agreed to, and the agent's identity.
        transport: To the server; addressed to the federation.
        base: The federation's base, its fingerprint checked.
        data: The owner's examples.
        wishes: Pause, hours, stop.
        clock: Time.
        on_event: Told what happens.
        max_vram_bytes: Most GPU memory to use; None: whatever is free.

    Raises:
        JournalError: The membership has no credential.
        TrustError: The manifest's layout is not the one of this base, or its cells may be smaller
            than the owner accepts.
        ConfigError: The owner chose a rank or modules that the manifest does not allow.
        EncodingPlanError: A masked sum could wrap.
    """

    def __init__(
        self,
        *,
        member: Member,
        transport: Transport,
        base: LoadedBase,
        data: TokenizedData,
        wishes: OwnersWishes,
        clock: Clock,
        on_event: Callable[[AgentEventReport], None],
        max_vram_bytes: int | None = None,
    ) -> None:
        """Put the parts together; nothing is sent yet."""
        if member.membership.credential is None:
            msg = "the enrolment was not finished; run `join` again"
            raise JournalError(msg)
        self._home = member.home
        self._journal = member.journal
        self._manifest = member.membership.federation.body
        profile = self._manifest.privacy
        if (isinstance(profile, ExamplePrivacy) and member.private is None) or (
            isinstance(profile, AgentPrivacy) and member.charges is None
        ):
            msg = "the federation asks for differential privacy, and this agent was set up without"
            raise TrustError(msg)
        self._private = member.private
        self._charges = member.charges
        self._signer = member.signer
        self._transport = transport
        self._data = data
        self._wishes = wishes
        self._clock = clock
        self._on_event = on_event
        self._releases = ReleaseFollower(
            home=member.home,
            journal=member.journal,
            manifest=self._manifest,
            base=base.description,
            transport=transport,
        )
        self._turns = self._releases.turns
        self._control: OwnControl | None = None
        if self._manifest.training.scaffold:
            self._control = OwnControl(
                home=member.home, journal=member.journal, releases=self._releases
            )
        adapt = AdaptedModel if self._private is None else self._private.adapt
        self._own = own_part(base.description, self._manifest.lora, member.owners_part)
        self._adapted = adapt(base, self._own.lora)
        self._max_vram_bytes = max_vram_bytes
        self._chosen: Chosen | None = None
        self._plain = PlainRounds(member=member, turns=self._turns, clock=clock)
        self._masked: MaskedRounds | None = None
        self._helped: HelpedRounds | None = None
        masking = self._manifest.masking
        if isinstance(masking, CellMasking | HelperMasking):
            if isinstance(masking, HelperMasking):
                self._helped = HelpedRounds(
                    member=member, masking=masking, turns=self._turns, clock=clock
                )
            else:
                self._masked = MaskedRounds(
                    member=member,
                    masking=masking,
                    turns=self._turns,
                    transport=transport,
                    clock=clock,
                    say=self._say,
                    wait=self._wait,
                    stopping=wishes.stopping,
                )
        elif member.owners_cell.min_cell or member.owners_cell.min_friends:
            msg = "this federation masks nothing; min_cell and min_friends ask for masked cells"
            raise TrustError(msg, Check.SMALL_CELL)

    def run(self, *, until_finished: bool = False) -> None:
        """Take part until the owner stops it.

        Args:
            until_finished: Also end when the federation has made its last release.

        Raises:
            AgentError: Something that only the owner can mend; what was done so far is journalled.
        """
        while not self._wishes.stopping():
            reason = self._wishes.reason_to_wait()
            if reason is not None:
                self._wait_out(reason)
                continue
            try:
                pause_s = self._turn()
                if pause_s is None:
                    continue
                if until_finished:
                    return
                self._wait(pause_s)
            except TrainingStoppedError:
                return
            except TransportError as error:
                if self._wishes.stopping():
                    return
                self._after_refusal(error)

    def _turn(self) -> float | None:
        """One turn of the loop; once the federation is finished, how long to wait for more."""
        part = self._journal.open_part()
        if part is not None and part.trained:
            self._end_training()  # a kill may have come before it
            self._send(part)
            return None
        reply = self._transport.task(after=self._journal.last_ended_round(), wait_s=LONG_POLL_S)
        moved = self._releases.follow(reply.newest_release)
        match reply.task:
            case TrainTask(round=manifest):
                self._take_part(manifest, chain_moved=moved)
            case WaitTask(reason=WaitReason.FINISHED, retry_after_s=retry_after_s):
                self._abandon_open_part("the federation ended")
                self._say("finished", "the federation made its last release")
                return retry_after_s
            case WaitTask(reason=reason, retry_after_s=retry_after_s):
                self._say("waiting", reason.value.replace("-", " "))
                self._wait(retry_after_s)
        return None

    def _wait_out(self, reason: str) -> None:
        # Told once, not at every look: each telling is a write that reaches the disk.
        self._say("waiting", reason)
        while not self._wishes.stopping() and self._wishes.reason_to_wait() == reason:
            self._clock.sleep(_WAIT_SLICE_S)

    def _wait(self, duration_s: float) -> None:
        until = self._clock.monotonic() + duration_s
        while not self._wishes.stopping() and self._clock.monotonic() < until:
            self._clock.sleep(min(_WAIT_SLICE_S, max(0.0, until - self._clock.monotonic())))

    def _after_refusal(self, error: TransportError) -> None:
        """Drop the round's work when that is the advice; where there is none, the owner is told."""
        discard = isinstance(error, RefusedError) and error.document.advice is Advice.DISCARD
        if not discard or self._journal.open_part() is None:
            raise error
        self._abandon_open_part(str(error))

    def _abandon_open_part(self, note: str) -> None:
        part = self._journal.open_part()
        if part is None:
            return
        self._journal.abandon_part(part, now=self._clock.now(), note=note)
        self._discard_files()
        self._say("abandoned", f"round {part.round}: {note}")

    # A round

    def _take_part(self, signed: Signed[RoundManifest], *, chain_moved: bool) -> None:
        newest = self._journal.newest_release()
        if newest is None:  # cannot be: `_turn` followed the chain up to the round's release
            msg = "a round before the first release"
            raise TrustError(msg)
        if chain_moved and signed.body.release < newest.number:
            # The round closed between this agent's poll and its look at the chain: poll again.
            self._say("waiting", f"round {signed.body.round} closed meanwhile")
            return
        round_manifest = check_round(
            signed,
            self._manifest,
            newest,
            self._turns.at(newest.number).n_bytes,
            last_round=self._journal.last_ended_round(),
        )
        open_part = self._journal.open_part()
        if open_part is not None and open_part.round != round_manifest.round:
            self._abandon_open_part(f"round {round_manifest.round} began")
        elif open_part is not None and open_part.manifest != signed:
            msg = f"round {round_manifest.round} is refused: it was begun under another manifest"
            raise TrustError(msg)
        part = self._journal.begin_part(signed, now=self._clock.now())
        try:
            self._train(part)
        except TrainingStoppedError:
            self._say("stopped", f"round {part.round} is kept and goes on at the next start")
            raise
        except CheckpointError:
            raise  # once the owner has made room on the disk, the round goes on
        except (TrainingError, DataError, TrustError, LedgerError, AccountingError) as error:
            self._withdraw(part, error)
            raise

    def _train(self, part: Part) -> None:
        round_manifest = part.manifest.body
        release, start = self._releases.newest()
        chosen = self._choose()
        text = f"round {part.round} from release {release.number}; {chosen.text}"
        self._say("training", text)
        block = self._manifest.training
        n_examples = len(self._data.examples)
        sampler, rule = self._drawing(part)
        variates = None if self._control is None else self._control.begin(part)
        trainer = LocalTrainer(
            self._adapted,
            self._data.examples,
            RoundRecipe(
                training=block,
                schedule_start=round_manifest.schedule_start,
                schedule_end=round_manifest.schedule_end,
                seed=self._seed(round_manifest, "dropout"),
            ),
            sampler=sampler,
            clock=self._clock,
            options=TrainerOptions(
                control=self._wishes,
                rule=rule,
                variates=variates,
                on_progress=self._show_progress,
                state_path=self._home.training_state,
                settings=chosen.settings,
            ),
        )
        self._adapted.train_only(sent_factors(self._manifest.lora.rule, release.number))
        layout = self._own.trained(self._turns.at(release.number).layout)
        result = trainer.run(self._own.start_of(start), layout, weight=self._weight(n_examples))
        update = self._own.spread(result.update)
        if self._control is not None and variates is not None:
            update = self._control.keep(part, update, variates.renewed(result.n_steps))
        part = self._keeper()(part, update)
        self._end_training()
        if self._helped is not None:
            self._wait(self._helped.delay_s())
        self._send(part)

    def _drawing(self, part: Part) -> tuple[BatchSampler, GradientRule]:
        """Which examples a step has and what it makes of them; a private round is charged first."""
        block = self._manifest.training
        if self._charges is not None:
            self._say_charged(
                part, self._charges.charge(part.round, part.attempt, now=self._clock.now())
            )
        if self._private is None:
            seed = self._seed(part.manifest.body, "batches")
            n_examples = len(self._data.examples)
            sampler = ShuffledBatches(n_examples=n_examples, batch_size=block.batch_size, seed=seed)
            return sampler, MeanGradient()
        batches, rule, quote = self._private.begin(part.round, part.attempt, now=self._clock.now())
        self._say_charged(part, quote)
        return batches, rule

    def _say_charged(self, part: Part, quote: Quote) -> None:
        self._say("charged", f"round {part.round}: ε {quote.before:.3g} → {quote.after:.3g} spent")

    def _end_training(self) -> None:
        self._home.training_state.unlink(missing_ok=True)
        if self._private is not None:
            self._private.end()

    def _keeper(self) -> Callable[[Part, PlainUpdate], Part]:
        """What keeps a finished update, by the federation's trust model."""
        if self._masked is not None:
            return self._masked.keep
        return self._plain.keep if self._helped is None else self._helped.keep

    def _choose(self) -> Chosen:
        # Once: the base, the data and the card stay the same while this process lives.
        if self._chosen is None:
            self._chosen = choose_settings(
                self._adapted,
                longest=max((len(e.input_ids) for e in self._data.examples), default=1),
                private=self._private is not None,
                max_vram_bytes=self._max_vram_bytes,
            )
        return self._chosen

    def _weight(self, n_examples: int) -> int:
        if self._manifest.aggregation.weighting is Weighting.UNIFORM:
            return 1
        return min(n_examples, self._manifest.max_weight)

    def _seed(self, manifest: RoundManifest, purpose: str) -> int:
        # From the private key, so that nobody else can tell the order of the owner's examples; the
        # same after a restart, so that training resumes exactly.
        material = self._signer.private_bytes() + domain_hash(purpose, manifest.as_json())
        return int.from_bytes(hashlib.sha256(material).digest()[:8], "big")

    def _withdraw(self, part: Part, error: AgentError | PrivacyError) -> None:
        reason = WithdrawalReason.TRAINING_FAILED
        if isinstance(error, OutOfMemoryError):
            reason = WithdrawalReason.OUT_OF_MEMORY
        elif isinstance(error, TrustError | PrivacyError):
            reason = WithdrawalReason.REFUSED_BY_POLICY
        withdrawal = Withdrawal(
            federation=self._manifest.federation,
            round=part.round,
            agent=self._signer.identity,
            reason=reason,
        )
        self._journal.move_part(part, AgentEvent.ABANDON, now=self._clock.now(), note=str(error))
        self._discard_files()
        self._say("withdrawn", f"round {part.round}: {error}")
        try:
            self._transport.withdraw(sign(self._signer, "withdrawal", withdrawal).signed)
        except TransportError as unheard:  # the caller raises what matters to the owner
            self._say("withdrawn", f"round {part.round}: the server was not told: {unheard}")

    # The upload

    def _send(self, part: Part) -> None:
        if self._masked is None:
            self._upload(part)
        else:
            self._masked.turn(part)

    def _discard_files(self) -> None:
        # All of them: one is left over when a kill came between acceptance and this.
        for path in self._home.update_files():
            path.unlink(missing_ok=True)
        self._end_training()

    def _upload(self, part: Part) -> None:
        begin, upload, path = self._announced(part)
        self._say("uploading", f"round {part.round}: {upload.head.body_n_bytes} bytes")
        for _ in range(_MAX_UPLOAD_TRIES):
            if self._upload_once(begin, upload, path):
                self._journal.move_part(
                    part, AgentEvent.UPLOAD_ACCEPTED, now=self._clock.now(), note="accepted"
                )
                self._discard_files()
                self._say("uploaded", f"round {part.round} was accepted")
                return
        self._abandon_open_part(f"the server did not take it in {_MAX_UPLOAD_TRIES} tries")

    def _announced(self, part: Part) -> tuple[Callable[[], UploadStatus], Upload, Path]:
        """How a part's upload is announced, what it is, and where its bytes lie."""
        number, attempt = part.round, part.attempt
        if part.helped is not None:
            head: BodyHead = part.helped.header.body
            upload = Upload(round=number, attempt=attempt, head=head, what="masked update")
            path = self._home.masked_update(number, attempt)
            return partial(self._transport.begin_helped_upload, part.helped), upload, path
        if part.header is None:  # cannot be: a part is TRAINED only together with its header
            msg = f"round {number} has no signed header"
            raise JournalError(msg)
        upload = Upload(round=number, attempt=attempt, head=part.header.body)
        path = self._home.plain_update(number, attempt)
        return partial(self._transport.begin_upload, part.header), upload, path

    def _upload_once(self, begin: Callable[[], UploadStatus], upload: Upload, path: Path) -> bool:
        status = begin()
        if status.state is UploadState.ACCEPTED:
            return True
        if any(index >= upload.head.n_parts for index in status.missing):
            last = max(status.missing)
            msg = f"the server asks for part {last} of {upload.head.n_parts} of an upload"
            raise TrustError(msg)
        try:
            with path.open("rb") as file:
                for index in status.missing:
                    file.seek(index * PART_BYTES)
                    self._transport.put_part(upload, index, file.read(PART_BYTES))
            status = self._transport.complete(upload)
        except OSError as error:
            msg = f"the finished update of round {upload.round} cannot be read: {error}"
            raise JournalError(msg) from error
        except RefusedError as error:
            mendable = {ProblemType.INCOMPLETE, ProblemType.DIGEST_MISMATCH}
            if error.document.problem_type in mendable:
                return False
            raise
        return status.state is UploadState.ACCEPTED

    # What the owner sees

    def _show_progress(self, progress: TrainingProgress) -> None:
        text = f"step {progress.step} of {progress.n_steps}"
        self._on_event(AgentEventReport(kind="progress", text=text, progress=progress))

    def _say(self, kind: str, text: str) -> None:
        self._journal.set_activity(kind=kind, text=text, at=self._clock.now(), pid=os.getpid())
        self._journal.add_received(self._transport.take_received_bytes())
        self._on_event(AgentEventReport(kind=kind, text=text))

"""A round under helper masks on the agent's side: one mask, its seed sealed to the second operator.

The masked update and its signed head are made once and kept before a byte leaves; the update is
consumed by its upload. Nothing is asked of the agent afterwards.
"""

import os
import secrets

from edge_agent.durable import write_hashed
from edge_agent.errors import JournalError, TrustError
from edge_agent.journal import Part
from edge_agent.masked import encoded
from edge_agent.member import Member
from privacy.helper import SEED_BYTES, mask_seed, seal_context, seal_seed
from privacy.masked_vector import masked_runs
from privacy.masking import Mask
from privacy.secagg.derive import check_words
from privacy.turns import Turns
from privacy.updates import PlainUpdate
from protocol.blocks import HelperMasking
from protocol.checks import Check
from protocol.clock import Clock
from protocol.helped import HelperHeader, HelperUpload
from protocol.phases import AgentEvent
from protocol.signing import sign
from protocol.wire import sha256


class HelpedRounds:
    """The masked part of an agent's work under the second trust model.

    Guarantees:
        1. For each update one seed is drawn and one masked vector made, kept before it is sent;
           whatever happens, the same bytes are sent.

    Args:
        member: Home, journal, manifest, identity, and what the owner asks of a cell.
        masking: The manifest's block.
        turns: How the updates of each round become words.
        clock: Time.

    Raises:
        TrustError: The federation's cells may be smaller than the owner accepts (check 3).
        JournalError: The membership has no credential.
    """

    def __init__(
        self, *, member: Member, masking: HelperMasking, turns: Turns, clock: Clock
    ) -> None:
        """Check the manifest against the owner's wishes; nothing is sent."""
        credential = member.membership.credential
        if credential is None:
            msg = "the enrolment was not finished; run `join` again"
            raise JournalError(msg)
        if masking.min_cell < member.owners_cell.min_cell:
            msg = (
                f"this federation forms cells of {masking.min_cell} agents, and you ask for "
                f"{member.owners_cell.min_cell} at least"
            )
            raise TrustError(msg, Check.SMALL_CELL)
        if member.owners_cell.min_friends:
            msg = "under helper masks nobody can promise who is in your cell; set min_friends = 0"
            raise TrustError(msg, Check.TOO_FEW_FRIENDS)
        self._member = member
        self._credential = credential
        self._masking = masking
        self._turns = turns
        self._clock = clock

    def delay_s(self) -> float:
        """How long to wait before a new update is announced: when would tell of training time."""
        return secrets.randbelow(int(self._masking.ready_delay_s * 1000) + 1) / 1000

    def keep(self, part: Part, update: PlainUpdate) -> Part:
        """Encode, mask and seal a finished update, once, and keep it.

        Raises:
            TrainingError: It is zero, not finite, or does not fit the agreed range (checks 15, 18).
            JournalError: It cannot be written.
        """
        manifest, signer = part.manifest.body, self._member.signer
        plan = self._turns.plan_at(manifest.release)
        words = encoded(update, plan)
        seed = os.urandom(SEED_BYTES)
        mask = Mask(seed=mask_seed(seed, manifest, signer.identity), sign=1)
        checks = check_words(manifest.digest(), word_bits=plan.word_bits)
        path = self._member.home.masked_update(part.round, part.attempt)
        try:
            runs = masked_runs(words, [mask], checks, plan)
            digest = write_hashed(path, (run.data for run in runs))
        except OSError as error:
            msg = f"cannot keep the finished update at {path}: {error}; free some space"
            raise JournalError(msg) from error
        context = seal_context(manifest, signer.identity)
        sealed = seal_seed(seed, self._masking.helper_key, context=context)
        header = HelperHeader(
            federation=manifest.federation,
            round=part.round,
            attempt=part.attempt,
            agent=signer.identity,
            round_digest=manifest.digest(),
            credential=self._credential,
            sealed_sha256=sha256(sealed),
            body_sha256=digest,
            body_n_bytes=plan.n_bytes,
        )
        upload = HelperUpload(header=sign(signer, "helper-upload", header).signed, sealed=sealed)
        return self._member.journal.move_part(
            part, AgentEvent.TRAINING_DONE, now=self._clock.now(), helped=upload
        )

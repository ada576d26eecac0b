"""A round of the open mode on the agent's side: the update as it is, under a signed header."""

from edge_agent.durable import write_durably
from edge_agent.errors import JournalError
from edge_agent.journal import Part
from edge_agent.member import Member
from privacy.turns import Turns
from privacy.updates import PlainUpdate
from protocol.clock import Clock
from protocol.messages import UploadHeader
from protocol.phases import AgentEvent
from protocol.signing import sign
from protocol.wire import sha256
from quant.adapter import vector_to_bytes


class PlainRounds:
    """Keeps finished updates where nothing is masked.

    Args:
        member: Home, journal, manifest, identity.
        turns: What the updates of each round look like.
        clock: Time.
    """

    def __init__(self, *, member: Member, turns: Turns, clock: Clock) -> None:
        """Nothing is kept yet."""
        self._member = member
        self._turns = turns
        self._clock = clock

    def keep(self, part: Part, update: PlainUpdate) -> Part:
        """Write a finished update, and journal its signed header.

        Raises:
            JournalError: It cannot be written.
        """
        manifest, signer = self._member.membership.federation.body, self._member.signer
        body = vector_to_bytes(update.body())
        header = UploadHeader(
            federation=manifest.federation,
            round=part.round,
            attempt=part.attempt,
            agent=signer.identity,
            round_digest=part.manifest.body.digest(),
            layout=self._turns.at(part.manifest.body.release).layout.digest(),
            weight=update.weight,
            body_sha256=sha256(body),
            body_n_bytes=len(body),
        )
        path = self._member.home.plain_update(part.round, part.attempt)
        try:
            write_durably(path, body)
        except OSError as error:
            msg = f"cannot keep the finished update at {path}: {error}; free some space"
            raise JournalError(msg) from error
        return self._member.journal.move_part(
            part,
            AgentEvent.TRAINING_DONE,
            now=self._clock.now(),
            header=sign(signer, "upload", header).signed,
        )

"""Who may speak: enrolment, invites, transport signatures, presence."""

import secrets
import threading
from typing import Final

from aggregator_server.charter import Charter
from aggregator_server.config import Enrolment as EnrolmentPolicy
from aggregator_server.errors import MemberError, Refusal, StoreError
from aggregator_server.store.rows import AgentRow, InviteRow, MemberRow
from aggregator_server.store.store import Store
from protocol.clock import Clock
from protocol.errors import SignatureError
from protocol.limits import CREDENTIAL_LIFETIME_S, INVITE_CODE_BYTES
from protocol.messages import Credential, Enrolment, Revocation
from protocol.problems import ProblemType
from protocol.signing import (
    Invite,
    InviteProof,
    Signed,
    fingerprint,
    invite_id,
    sign,
    verify,
    verify_invite,
)
from protocol.transport_signing import (
    ReplayedSignatureError,
    ReplayGuard,
    StaleSignatureError,
    VerifiedRequest,
)
from protocol.wire import b64u_encode, parse

_SEEN_EVERY_S: Final = 5.0
_STALE_RETRY_S: Final = 1.0
_NO_INVITE: Final = "a valid invite with a use left is needed to join; ask the operator for one"


class Membership:
    """Members, invites and the freshness of their requests.

    Guarantees:
        1. An acknowledged enrolment or revocation survives `kill -9`.
        2. A transport signature is admitted at most once, and remembered for members and valid
           enrolments only, so strangers cannot fill the memory.
        3. A refused request changes nothing.
    """

    def __init__(
        self, store: Store, charter: Charter, clock: Clock, *, policy: EnrolmentPolicy
    ) -> None:
        """Begin with no signature remembered."""
        self._store = store
        self._charter = charter
        self._clock = clock
        self._policy = policy
        self._guard = ReplayGuard(started_at=clock.now())
        self._lock = threading.Lock()
        self._seen: dict[bytes, float] = {}
        self._journalled: dict[bytes, float] = {}
        self._bytes_down = 0

    def admit(self, request: VerifiedRequest, *, even_revoked: bool = False) -> bytes:
        """Admit a member's request once.

        Args:
            request: Whose signature holds.
            even_revoked: Whether a former member may make it.

        Returns:
            The member's identity.

        Raises:
            Refusal: Not a member (`unknown-agent`, `revoked`), `stale` or `replayed`.
        """
        agent = self.require_member(request.identity, even_revoked=even_revoked)
        self.admit_once(request)
        if agent.revoked_at is None:
            self._saw(agent)
        return request.identity

    def admit_once(self, request: VerifiedRequest) -> None:
        """Admit a request once, of whoever is known: a member, or the evaluator.

        Args:
            request: Whose signature holds.

        Raises:
            Refusal: `stale` or `replayed`.
        """
        try:
            with self._lock:
                self._guard.admit(request, now=self._clock.now())
        except StaleSignatureError as error:
            raise Refusal(ProblemType.STALE, str(error), retry_after_s=_STALE_RETRY_S) from error
        except ReplayedSignatureError as error:
            raise Refusal(ProblemType.REPLAYED, str(error)) from error

    def require_member(self, identity: bytes, *, even_revoked: bool = False) -> AgentRow:
        """A member, or a refusal.

        Args:
            identity: Its key.
            even_revoked: Whether a former member will do.

        Raises:
            Refusal: Not a member (`unknown-agent`, `revoked`).
        """
        agent = self._store.agents.get(identity)
        if agent is None:
            raise Refusal(
                ProblemType.UNKNOWN_AGENT, f"{b64u_encode(identity)} has not enrolled here"
            )
        if agent.revoked_at is not None and not even_revoked:
            raise Refusal(
                ProblemType.REVOKED, f"the membership of {b64u_encode(identity)} has ended"
            )
        return agent

    def enrol(self, request: VerifiedRequest, signed: Signed[Enrolment]) -> Signed[Credential]:
        """Make an agent a member.

        Args:
            request: The request, whose transport signature holds.
            signed: The enrolment.

        Returns:
            Its credential; the stored one when it is a member already.

        Raises:
            Refusal: A signature of another key, another federation, no valid invite, `stale` or
                `replayed`.
        """
        body = signed.body
        require_author(request.identity, body.agent)
        try:
            verify(signed, "enrolment", key=body.agent)
        except SignatureError as error:
            raise Refusal(ProblemType.BAD_SIGNATURE, str(error)) from error
        require_federation(self._charter, body.federation)
        if body.federation_digest != self._charter.digest:
            raise Refusal(
                ProblemType.BAD_REQUEST, "the federation's manifest is another one; fetch it again"
            )
        known = self._store.agents.get(body.agent)
        member = known is not None and known.revoked_at is None
        invite = None if member else self._check_invite(body, known)
        self.admit_once(request)
        if known is not None and member:
            self._saw(known)
            return self._stored_credential(known)
        now = self._clock.now()
        row = self._store.agents.enrol(
            body.agent, credential=self._new_credential(body.agent), invite=invite, now=now
        )
        return parse(Signed[Credential], row.credential)

    def revoke(self, identity: bytes, signed: Signed[Revocation]) -> None:
        """End a membership at the agent's own wish; again changes nothing.

        Args:
            identity: Who makes the request.
            signed: The revocation.

        Raises:
            Refusal: A signature of another key, or another federation.
        """
        require_author(identity, signed.body.agent)
        try:
            verify(signed, "revocation", key=identity)
        except SignatureError as error:
            raise Refusal(ProblemType.BAD_SIGNATURE, str(error)) from error
        require_federation(self._charter, signed.body.federation)
        self._store.agents.revoke(identity, now=self._clock.now())

    def members(self) -> tuple[MemberRow, ...]:
        """All members, past ones too, in the order of their enrolment."""
        return self._store.agents.members()

    def expel(self, name: str) -> bytes:
        """End a membership at the operator's wish, at once; its place in an open round is freed.

        The agent comes back only by an invite made since. An update of its that was accepted
        stays: it was acknowledged.

        Args:
            name: The identity in base64url, or as many of its first characters as tell it apart.

        Returns:
            The identity.

        Raises:
            MemberError: No agent, or several, whose identity begins so.
        """
        identity = self._named(name)
        self._store.agents.revoke(identity, now=self._clock.now(), bar=True)
        return identity

    def readmit(self, name: str) -> bytes:
        """End a quarantine; the evidence of rounds up to now no longer counts.

        Args:
            name: As in `expel`.

        Returns:
            The identity.

        Raises:
            MemberError: No agent, or several, whose identity begins so.
        """
        identity = self._named(name)
        last = self._store.rounds.latest()
        self._store.agents.readmit(identity, judged_from=1 if last is None else last.number + 1)
        return identity

    def _named(self, name: str) -> bytes:
        found = [
            member.identity
            for member in self._store.agents.members()
            if b64u_encode(member.identity).startswith(name)
        ]
        if len(found) != 1 or not name:
            begins = f"{len(found)} agents have" if found else "no agent has"
            msg = f"{begins} an identity that begins with {name!r}; `agents list` shows them"
            raise MemberError(msg)
        return found[0]

    def invite(self, *, n_uses: int = 1) -> Invite:
        """Draw and journal an invite.

        Args:
            n_uses: How many agents it lets in, at least 1.
        """
        code = secrets.token_bytes(INVITE_CODE_BYTES)
        self._store.agents.add_invite(
            InviteRow(
                id=invite_id(code),
                code=code,
                created_at=self._clock.now(),
                n_uses=n_uses,
                uses_left=n_uses,
            )
        )
        server = self._charter.keys.server.identity
        return Invite(code=code, server_fingerprint=fingerprint(server))

    def served(self, n_bytes: int) -> None:
        """Count bytes that agents fetched; journalled with the next `flush`."""
        with self._lock:
            self._bytes_down += n_bytes

    def flush(self) -> None:
        """Journal who was seen and what was served since the last call.

        A killed server forgets what was not yet journalled: agents show up again by themselves,
        and the count of bytes served is a little short.

        Raises:
            StoreError: Nothing was journalled; the next call tries again.
        """
        with self._lock:
            seen, self._seen = self._seen, {}
            n_bytes, self._bytes_down = self._bytes_down, 0
        if not seen and not n_bytes:
            return
        try:
            self._store.agents.saw(seen, bytes_down=n_bytes)
        except StoreError:
            with self._lock:
                self._seen = {**seen, **self._seen}
                self._bytes_down += n_bytes
            raise

    def _saw(self, agent: AgentRow) -> None:
        now = self._clock.now()
        with self._lock:
            elapsed_s = now - self._journalled.get(agent.identity, agent.last_seen)
            if 0 <= elapsed_s < _SEEN_EVERY_S:  # negative: the clock was set back
                return
            self._journalled[agent.identity] = now
            self._seen[agent.identity] = now

    def _check_invite(self, body: Enrolment, known: AgentRow | None) -> bytes | None:
        barred = known is not None and known.barred
        if self._policy is EnrolmentPolicy.OPEN and not barred:
            return None
        return self._check_proof(body.agent, body.invite)

    def _check_proof(self, agent: bytes, proof: InviteProof | None) -> bytes:
        # One answer for all that can be wrong, so that invites cannot be probed.
        row = None if proof is None else self._store.agents.invite(proof.invite)
        if proof is None or row is None or row.code is None or row.uses_left < 1:
            raise Refusal(ProblemType.INVITE_REFUSED, _NO_INVITE)
        try:
            verify_invite(proof, row.code, agent=agent, server=self._charter.keys.server.identity)
        except SignatureError as error:
            raise Refusal(ProblemType.INVITE_REFUSED, _NO_INVITE) from error
        return row.id

    def _stored_credential(self, agent: AgentRow) -> Signed[Credential]:
        stored = parse(Signed[Credential], agent.credential)
        if stored.body.expires_at > self._clock.now():
            return stored
        renewed = self._new_credential(agent.identity)
        self._store.agents.renew(agent.identity, renewed)
        return parse(Signed[Credential], renewed)

    def _new_credential(self, agent: bytes) -> bytes:
        body = Credential(
            federation=self._charter.manifest.federation,
            agent=agent,
            expires_at=int(self._clock.now()) + CREDENTIAL_LIFETIME_S,
        )
        return sign(self._charter.keys.registrar, "credential", body).signed.canonical()


def require_author(identity: bytes, agent: bytes) -> None:
    """Refuse a message about another agent than the one that makes the request.

    Raises:
        Refusal: `bad-signature`.
    """
    if identity != agent:
        raise Refusal(
            ProblemType.BAD_SIGNATURE,
            f"the request is signed by {b64u_encode(identity)}, "
            f"its message is about {b64u_encode(agent)}",
        )


def require_federation(charter: Charter, federation: bytes) -> None:
    """Refuse a message for another federation.

    Raises:
        Refusal: `unknown-federation`.
    """
    if federation != charter.manifest.federation:
        raise Refusal(
            ProblemType.UNKNOWN_FEDERATION, f"here is only the federation {charter.path_id}"
        )

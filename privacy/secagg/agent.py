"""An agent's part in one attempt at a masked round: message in, checks, message out.

The state is one frozen value that the caller journals before it sends anything; from it the same
messages can be repeated after a restart, and never others for the same transcript.

```
READY ── roster ──▶ SHARED ── bundle, upload ──▶ UPLOADED ── survivors ──▶ CONFIRMED ── confirmed ──▶ REVEALED
```
"""  # noqa: E501 - a drawing

import os
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import Field

from privacy.errors import ShareError
from privacy.masking import Mask, Words
from privacy.secagg import derive
from privacy.secagg.cells import CellView
from privacy.secagg.checks import (
    CellPolicy,
    check_bundle,
    check_roster,
    check_server_signature,
    check_survivors,
    confirmers,
)
from privacy.secagg.derive import ShareKind
from privacy.shares import Entropy, is_share, split
from protocol.checks import Check, CheckError
from protocol.masked import (
    MISSING_SHARE,
    Bundle,
    Complaint,
    Confirm,
    Confirmed,
    Entries,
    Failed,
    MaskedHeader,
    Ready,
    ReadyList,
    Reveal,
    Roster,
    Shares,
    SharesHeader,
    Survivors,
)
from protocol.messages import Credential
from protocol.phases import AGENT_TRANSITIONS, AgentEvent, AgentPhase, advance
from protocol.signing import Signed, Signer, sign
from protocol.wire import Bytes32, Bytes33, Identity, WireModel, sha256

_SECRET_BYTES: Final = 32


class ReceivedShares(WireModel):
    """What a dealer gave; `protocol.masked.MISSING_SHARE` where it gave nothing that holds."""

    dealer: Identity
    self_share: Annotated[Bytes33, Field(repr=False)]
    mask_share: Annotated[Bytes33, Field(repr=False)]


class AttemptState(WireModel):
    """All of an attempt, secrets too; erased when the attempt is over (PROTOCOL, check 8)."""

    version: Literal[1] = 1
    phase: AgentPhase
    ready: Signed[Ready]
    sealing_private_key: Annotated[Bytes32, Field(repr=False)]
    masking_private_key: Annotated[Bytes32, Field(repr=False)]
    self_seed: Annotated[Bytes32, Field(repr=False)]
    tried_again: bool
    """Whether this attempt is the one that follows an attempt whose update was uploaded."""
    roster: Signed[Roster] | None = None
    shares: Shares | None = None
    headers: tuple[Signed[SharesHeader], ...] = ()
    received: Annotated[tuple[ReceivedShares, ...], Field(repr=False)] = ()
    complaints: tuple[Signed[Complaint], ...] = ()
    upload: Signed[MaskedHeader] | None = None
    survivors: Survivors | None = None
    confirm: Confirm | None = None
    reveal: Annotated[Signed[Reveal] | None, Field(repr=False)] = None


@dataclass(frozen=True, kw_only=True)
class MaskPlan:
    """How an agent masks its update in its cell."""

    masks: tuple[Mask, ...]
    checks: Words
    """[16] check words, the same for all members."""


class SecAggAgent:
    """One attempt of one agent.

    Guarantees (numbered as PROTOCOL's checks where there is one):
        1. A message is made only when all its checks hold; a failed one changes nothing.
        2. The same message in gives the same message out; another one for the same step is refused.
        3. For each member it reveals a share of one secret only, and once.

    Args:
        signer: The agent's identity.
        policy: What it holds the cell against.
        state: From `begin`, or from the journal.
        entropy: For shares; the operating system's generator unless a test needs fixed ones.
    """

    def __init__(
        self,
        signer: Signer,
        policy: CellPolicy,
        state: AttemptState,
        *,
        entropy: Entropy = os.urandom,
    ) -> None:
        """Take up an attempt where its state stands."""
        self._signer = signer
        self._policy = policy
        self._entropy = entropy
        self.state = state
        self._cell: CellView | None = None
        self._bundle: bytes | None = None

    @classmethod
    def begin(
        cls,
        signer: Signer,
        policy: CellPolicy,
        *,
        credential: Signed[Credential],
        attempt: int,
        expires_at: int,
        tried_again: bool = False,
        entropy: Entropy = os.urandom,
    ) -> "SecAggAgent":
        """Draw fresh keys and sign READY; any earlier attempt of this update is over with it.

        Args:
            signer: The agent's identity.
            policy: What it holds the cell against.
            credential: The registrar's word on this agent.
            attempt: Above that of every earlier READY in the round.
            expires_at: Seconds since the Unix epoch; a cell formed later must not use this READY.
            tried_again: An earlier attempt of this update reached its upload.
            entropy: For keys and shares.
        """
        sealing, masking, self_seed, nonce = (entropy(_SECRET_BYTES) for _ in range(4))
        ready = Ready(
            federation=policy.federation,
            round=policy.round,
            attempt=attempt,
            agent=signer.identity,
            round_digest=policy.round_digest,
            credential=credential,
            sealing_key=derive.public_key_of(sealing),
            masking_key=derive.public_key_of(masking),
            nonce=nonce,
            expires_at=expires_at,
        )
        state = AttemptState(
            phase=AgentPhase.READY,
            ready=sign(signer, "ready", ready).signed,
            sealing_private_key=sealing,
            masking_private_key=masking,
            self_seed=self_seed,
            tried_again=tried_again,
        )
        return cls(signer, policy, state, entropy=entropy)

    @property
    def transcript(self) -> bytes | None:
        """T, once a roster was accepted."""
        return None if self.state.roster is None else self._view().transcript

    # ROSTER in, SHARES out

    def receive_roster(self, ready_list: Signed[ReadyList], roster: Signed[Roster]) -> Shares:
        """Check a cell and share two secrets with its members (messages 3 and 4).

        Raises:
            CheckError: Checks 1 to 7 or 9.
        """
        state = self.state
        if state.roster is not None and state.shares is not None:
            if state.roster != roster:
                found = "It was used for the cell that you accepted first."
                raise CheckError(Check.SPENT_READY, found)
            return state.shares
        cell = check_roster(ready_list, roster, policy=self._policy, ready=state.ready)
        shares = self._deal(cell)
        self._cell = cell
        self._move(AgentEvent.SHARES_SENT, roster=roster, shares=shares)
        return shares

    def _deal(self, cell: CellView) -> Shares:
        transcript, own = cell.transcript, self._signer.identity
        others = [ready for identity, ready in cell.readies.items() if identity != own]
        me = cell.places[own]
        dealt = {}
        for kind, secret in (
            (ShareKind.SELF, self.state.self_seed),
            (ShareKind.MASK, self.state.masking_private_key),
        ):
            shares = split(
                secret,
                n_shares=len(cell.readies),
                threshold=cell.threshold,
                entropy=self._entropy,
            )
            dealt[kind] = shares[:me] + shares[me + 1 :]
        ciphertexts = tuple(
            derive.seal_shares(
                derive.agree(self.state.sealing_private_key, other.sealing_key),
                self_share + mask_share,
                transcript=transcript,
                sender=own,
                receiver=other.agent,
            )
            for other, self_share, mask_share in zip(
                others, dealt[ShareKind.SELF], dealt[ShareKind.MASK], strict=True
            )
        )

        def digests(kind: ShareKind) -> tuple[bytes, ...]:
            return tuple(
                derive.share_digest(transcript, own, other.agent, kind, share)
                for other, share in zip(others, dealt[kind], strict=True)
            )

        header = SharesHeader(
            transcript=transcript,
            agent=own,
            commitment=derive.commitment(transcript, own, self.state.self_seed),
            ciphertexts=tuple(sha256(ciphertext) for ciphertext in ciphertexts),
            self_shares=digests(ShareKind.SELF),
            mask_shares=digests(ShareKind.MASK),
        )
        return Shares(header=sign(self._signer, "shares", header).signed, ciphertexts=ciphertexts)

    # BUNDLE in, masks and complaints out

    def receive_bundle(self, bundle: Bundle) -> MaskPlan:
        """Check who shared, open what they sealed, and derive the masks (message 5).

        A dealer whose ciphertext does not open, or holds other shares than it signed, is complained
        of (`state.complaints`); the attempt goes on.

        Raises:
            CheckError: Check 10.
        """
        cell = self._view()
        if self.state.headers:
            if bundle.headers != self.state.headers:
                raise CheckError(Check.BAD_BUNDLE, "A second, other one was shown.")
            return self.mask_plan()
        if self.state.shares is None:  # cannot be: the roster is kept together with the shares
            raise CheckError(Check.BAD_BUNDLE, "You have not shared yet.")
        check_bundle(bundle, cell, own=self.state.shares.header)
        received, complaints = [], []
        others = (header for header in bundle.headers if header.body.agent != self._signer.identity)
        for header, ciphertext in zip(others, bundle.ciphertexts, strict=True):
            shares = self._open(header.body, ciphertext, cell)
            received.append(shares)
            if shares.self_share == MISSING_SHARE:
                complaint = Complaint(
                    transcript=cell.transcript,
                    agent=self._signer.identity,
                    dealer=header,
                    ciphertext=ciphertext,
                )
                complaints.append(sign(self._signer, "complaint", complaint).signed)
        self._update(headers=bundle.headers, received=tuple(received), complaints=tuple(complaints))
        return self.mask_plan()

    def _open(self, header: SharesHeader, ciphertext: bytes, cell: CellView) -> ReceivedShares:
        own, transcript = self._signer.identity, cell.transcript
        missing = ReceivedShares(
            dealer=header.agent, self_share=MISSING_SHARE, mask_share=MISSING_SHARE
        )
        ready = cell.readies[header.agent]
        try:
            self_share, mask_share = derive.open_shares(
                derive.agree(self.state.sealing_private_key, ready.sealing_key),
                ciphertext,
                transcript=transcript,
                sender=header.agent,
                receiver=own,
            )
        except ShareError:
            return missing
        place = cell.place(header.agent, own)
        for kind, share, digest in (
            (ShareKind.SELF, self_share, header.self_shares[place]),
            (ShareKind.MASK, mask_share, header.mask_shares[place]),
        ):
            signed = derive.share_digest(transcript, header.agent, own, kind, share) == digest
            if not signed or not is_share(share):
                return missing
        return ReceivedShares(dealer=header.agent, self_share=self_share, mask_share=mask_share)

    def mask_plan(self) -> MaskPlan:
        """The masks of this agent's update, once the bundle was accepted.

        Raises:
            CheckError: It was not (check 10).
        """
        cell = self._view()
        if not self.state.headers:
            raise CheckError(Check.BAD_BUNDLE, "You have accepted none yet.")
        own, bundle = self._signer.identity, self._bundle_hash()
        masks = [
            Mask(seed=derive.self_mask_seed(self.state.self_seed, bundle, own), sign=1),
        ]
        for header in self.state.headers:
            other = header.body.agent
            if other == own:
                continue
            secret = derive.agree(self.state.masking_private_key, cell.readies[other].masking_key)
            seed = derive.pair_seed(secret, bundle, own, other)
            masks.append(Mask(seed=seed, sign=derive.pair_sign(own, other)))
        checks = derive.check_words(bundle, word_bits=self._policy.masking.word_bits)
        return MaskPlan(masks=tuple(masks), checks=checks)

    def sign_upload(self, body_sha256: bytes) -> Signed[MaskedHeader]:
        """Sign the head of the masked update, once for each transcript (message 6).

        Args:
            body_sha256: Of the masked vector, which is journalled before.

        Raises:
            CheckError: Another body was signed for this transcript (check 7).
        """
        cell = self._view()
        if not self.state.headers:
            raise CheckError(Check.BAD_BUNDLE, "You have accepted none yet.")
        if self.state.upload is not None:
            if self.state.upload.body.body_sha256 != body_sha256:
                found = "Another masked update was signed for this cell."
                raise CheckError(Check.SPENT_READY, found)
            return self.state.upload
        header = MaskedHeader(
            transcript=cell.transcript,
            bundle=self._bundle_hash(),
            agent=self._signer.identity,
            body_sha256=body_sha256,
            body_n_bytes=self._policy.body_n_bytes,
        )
        signed = sign(self._signer, "masked-upload", header).signed
        self._update(upload=signed)
        return signed

    def uploaded(self) -> None:
        """Note that the server has the whole of the masked update."""
        if self.state.phase is AgentPhase.SHARED and self.state.upload is not None:
            self._move(AgentEvent.UPLOAD_ACCEPTED)

    # SURVIVORS in, CONFIRM out

    def receive_survivors(self, survivors: Survivors) -> Confirm:
        """Check who survived and sign it; the update is consumed (messages 7 and 8).

        Raises:
            CheckError: Check 11.
        """
        cell, state = self._view(), self.state
        if state.survivors is not None and state.confirm is not None:
            if state.survivors.entries() != survivors.entries():
                raise CheckError(Check.TWO_SURVIVORS, "You have confirmed another one.")
            return state.confirm
        if state.upload is None or state.phase is not AgentPhase.UPLOADED:
            raise CheckError(Check.BAD_SURVIVORS, "Your upload was not accepted yet.")
        check_survivors(
            survivors,
            cell,
            shared={header.body.agent for header in state.headers},
            bundle=self._bundle_hash(),
            own=state.upload,
        )
        message = derive.confirm_hash(self._bundle_hash(), survivors.entries())
        confirm = Confirm(
            transcript=cell.transcript,
            agent=self._signer.identity,
            signature=self._signer.sign_bytes(message),
        )
        self._move(AgentEvent.CONFIRM_SIGNED, survivors=survivors, confirm=confirm)
        return confirm

    # CONFIRMED in, REVEAL out

    def receive_confirmed(self, confirmed: Confirmed) -> Signed[Reveal]:
        """Check that enough survivors confirmed the same, and reveal (messages 9 and 10).

        What is revealed follows from U2 and U3 alone: the self share of who survived, the mask
        share of who did not.

        Raises:
            CheckError: Checks 12 and 13.
        """
        cell, state = self._view(), self.state
        if state.reveal is not None:
            return state.reveal
        if state.survivors is None:
            raise CheckError(Check.UNCONFIRMED, "You have confirmed none.")
        survivors = state.survivors.entries()
        alive = {identity for identity, _ in survivors}
        message = derive.confirm_hash(self._bundle_hash(), survivors)
        agreed = confirmers(confirmed, alive, message)
        if confirmed.transcript != cell.transcript or len(agreed) < cell.threshold:
            found = f"{len(agreed)} do; at least {cell.threshold} must."
            raise CheckError(Check.UNCONFIRMED, found)
        reveal = self._reveal(cell, survivors)
        self._move(AgentEvent.REVEAL_SENT, reveal=reveal)
        return reveal

    def _reveal(self, cell: CellView, survivors: Entries) -> Signed[Reveal]:
        alive = {identity for identity, _ in survivors}
        # Each dealer falls into one of two disjoint sets, so no two kinds of one member can leave.
        self_shares = tuple(
            (given.dealer, given.self_share)
            for given in self.state.received
            if given.dealer in alive
        )
        mask_shares = tuple(
            (given.dealer, given.mask_share)
            for given in self.state.received
            if given.dealer not in alive
        )
        body = Reveal(
            transcript=cell.transcript,
            agent=self._signer.identity,
            self_seed=self.state.self_seed,
            self_shares=self_shares,
            mask_shares=mask_shares,
        )
        return sign(self._signer, "reveal", body).signed

    # FAILED in

    def receive_failed(self, failed: Signed[Failed]) -> bool:
        """Whether the update may be tried again after a failed cell (PROTOCOL, check 14).

        Before the upload it always may; after it once; never after CONFIRM, which consumes it.

        Raises:
            CheckError: Not the server's word, or of another cell.
        """
        check_server_signature(failed, "failed", self._policy.server)
        body = failed.body
        if (body.federation, body.round) != (self._policy.federation, self._policy.round):
            raise CheckError(Check.NO_RETRY, "The failure is of another round.")
        if self.transcript is not None and body.transcript != self.transcript:
            raise CheckError(Check.NO_RETRY, "The failure is of another cell.")
        phase = self.state.phase
        if phase is AgentPhase.CONFIRMED or phase is AgentPhase.REVEALED:
            return False
        if phase is AgentPhase.READY or phase is AgentPhase.SHARED:
            return self.state.upload is None or not self.state.tried_again
        return phase is AgentPhase.UPLOADED and not self.state.tried_again

    # State

    def _view(self) -> CellView:
        if self._cell is None:
            if self.state.roster is None:
                raise CheckError(Check.BAD_BUNDLE, "You have accepted no cell yet.")
            self._cell = CellView(self.state.roster.body)
        return self._cell

    def _bundle_hash(self) -> bytes:
        if self._bundle is None:
            entries = tuple((head.body.agent, head.body.digest()) for head in self.state.headers)
            self._bundle = derive.bundle_hash(self._view().transcript, entries)
        return self._bundle

    def _move(self, event: AgentEvent, **changes: object) -> None:
        phase = advance(AGENT_TRANSITIONS, self.state.phase, event)
        self._update(phase=phase, **changes)

    def _update(self, **changes: object) -> None:
        self.state = self.state.model_copy(update=changes)

"""A cell as the server sees it: which messages it has, what may come next, and the sum's seeds.

Pure and without vectors: the caller journals what `check_*` accepts, adds it, and asks what the
stage can give. The same messages in any order give the same cell.

```
SHARING ── t shared ──▶ UPLOADING ── t uploaded ──▶ CONFIRMING ── t confirmed ──▶ REVEALING ──▶ sum
```
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeVar

from privacy.errors import MaskedMessageError, ShareError
from privacy.masking import Mask, Words
from privacy.secagg import derive
from privacy.secagg.cells import CellView
from privacy.secagg.derive import ShareKind
from privacy.shares import Rebuilder, correct, is_share
from protocol.errors import SignatureError
from protocol.masked import (
    MISSING_SHARE,
    Bundle,
    Complaint,
    Confirm,
    Confirmed,
    Entries,
    MaskedHeader,
    Reveal,
    Roster,
    Shares,
    SharesHeader,
    Survivors,
)
from protocol.signing import Signed, verify, verify_bytes
from protocol.wire import b64u_encode, sha256

MessageT = TypeVar("MessageT", SharesHeader, MaskedHeader, Reveal, Complaint)


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What removes the masks of a cell's sum.

    `masks` are to be added to the sum of the survivors' vectors; their signs are turned already.
    """

    survivors: tuple[bytes, ...]
    masks: tuple[Mask, ...]
    checks: Words
    """[16] check words of one member."""
    blamed: tuple[bytes, ...]
    """Who revealed or dealt something that its own signature contradicts."""


class UnrecoverableError(MaskedMessageError):
    """A secret cannot be rebuilt, whatever else arrives; `blamed` dealt it wrong."""

    def __init__(self, message: str, blamed: tuple[bytes, ...]) -> None:
        """Name the dealers."""
        super().__init__(message)
        self.blamed = blamed


class _Rebuilding:
    """Lagrange coefficients by the places of the shares, and who was caught."""

    def __init__(self, *, final: bool) -> None:
        self.final = final
        """Whether nothing more will be revealed."""
        self._rebuilders: dict[tuple[int, ...], Rebuilder] = {}
        self.blamed: set[bytes] = set()

    def secret(self, shares: Mapping[int, bytes]) -> bytes | None:
        places = tuple(sorted(shares))
        if places not in self._rebuilders:
            self._rebuilders[places] = Rebuilder(places)
        try:
            return self._rebuilders[places].secret([shares[place] for place in places])
        except ShareError:
            return None


class CellServer:
    """The messages of one cell.

    Guarantees:
        1. `check_*` accepts a message of a member, for this transcript, whose signature holds; that
           a second one is refused is the journal's part.
        2. `recover` gives the masks of the survivors' sum only, and only from secrets that match
           their commitments and public keys.
        3. A survivor's mask key is never rebuilt, nor the self seed of one who did not survive.

    Args:
        roster: The cell.
        body_n_bytes: Size of a masked update.
        word_bits: k.
    """

    def __init__(self, roster: Roster, *, body_n_bytes: int, word_bits: Literal[16, 32]) -> None:
        """Begin with no messages."""
        self.cell = CellView(roster)
        self._body_n_bytes = body_n_bytes
        self._word_bits: Literal[16, 32] = word_bits
        self.shares: dict[bytes, Shares] = {}
        self.complaints: dict[tuple[bytes, bytes], Signed[Complaint]] = {}
        self.uploads: dict[bytes, Signed[MaskedHeader]] = {}
        """Of those whose whole body arrived."""
        self.confirms: dict[bytes, Confirm] = {}
        self.reveals: dict[bytes, Signed[Reveal]] = {}
        self._u2: tuple[bytes, ...] | None = None
        self._u3: tuple[bytes, ...] | None = None
        self._bundle_hash: bytes | None = None

    # SHARES

    def check_shares(self, shares: Shares) -> None:
        """Check a dealer's shares.

        Raises:
            MaskedMessageError: Not a member's, of another cell, or ciphertexts that are not those
                of the header.
        """
        header = shares.header
        self._check_author(header.body.agent, header.body.transcript)
        _check_signature(header, "shares")
        body, others = header.body, len(self.cell.readies) - 1
        counts = {len(body.ciphertexts), len(body.self_shares), len(body.mask_shares)}
        if counts != {others} or len(shares.ciphertexts) != others:
            msg = f"a dealer gives {others} members a share each, of both kinds"
            raise MaskedMessageError(msg)
        if tuple(sha256(ciphertext) for ciphertext in shares.ciphertexts) != body.ciphertexts:
            msg = "the ciphertexts are not those whose digests were signed"
            raise MaskedMessageError(msg)

    def close_sharing(self, dealers: tuple[bytes, ...] | None = None) -> tuple[bytes, ...]:
        """Fix U2: the members whose shares arrived, or those that the journal names.

        Raises:
            MaskedMessageError: Fewer than t.
        """
        chosen = tuple(sorted(self.shares)) if dealers is None else dealers
        self._require(len(chosen), "shared")
        self._u2 = chosen
        return chosen

    def bundle_for(self, receiver: bytes) -> Bundle | None:
        """What a member of U2 is sent; None for others."""
        shared = self._shared()
        if receiver not in shared:
            return None
        return Bundle(
            transcript=self.cell.transcript,
            headers=tuple(self.shares[dealer].header for dealer in shared),
            ciphertexts=tuple(
                self.shares[dealer].ciphertexts[self.cell.place(dealer, receiver)]
                for dealer in shared
                if dealer != receiver
            ),
        )

    def bundle_hash(self) -> bytes:
        """T2."""
        if self._bundle_hash is None:
            entries = tuple(
                (dealer, self.shares[dealer].header.body.digest()) for dealer in self._shared()
            )
            self._bundle_hash = derive.bundle_hash(self.cell.transcript, entries)
        return self._bundle_hash

    def check_complaint(self, signed: Signed[Complaint]) -> None:
        """Check a complaint: evidence that is kept, not a proof.

        Raises:
            MaskedMessageError: Not a member's, or the ciphertext is not the one that the dealer
                signed, which speaks against the way of the message and not against the dealer.
        """
        body, dealer = signed.body, signed.body.dealer.body.agent
        self._check_author(body.agent, body.transcript)
        _check_signature(signed, "complaint")
        shared, known = self._shared(), self.shares.get(dealer)
        if body.agent not in shared or dealer not in shared:
            msg = "the complaint is of shares that its dealer did not send in time, or to another"
            raise MaskedMessageError(msg)
        if known is None or known.header != body.dealer or dealer == body.agent:
            msg = "the complaint shows a header that its dealer did not send"
            raise MaskedMessageError(msg)
        place = self.cell.place(dealer, body.agent)
        if sha256(body.ciphertext) != known.header.body.ciphertexts[place]:
            msg = "the complaint shows a ciphertext that its dealer did not sign"
            raise MaskedMessageError(msg)

    def hopeless_dealers(self) -> tuple[bytes, ...]:
        """Dealers of U2 of whom fewer than t members hold shares, as far as complaints go."""
        shared = self._shared()
        n_holders = {dealer: len(shared) - 1 for dealer in shared}
        suspects = {
            dealer for accuser, dealer in self.complaints if {accuser, dealer} <= set(shared)
        }
        for accuser, accused in self.complaints:
            if accuser in shared and accused in suspects:
                n_holders[accused] -= 1
        return tuple(d for d in shared if d in suspects and n_holders[d] < self.cell.threshold)

    def guilty_dealers(self) -> tuple[bytes, ...]:
        """Dealers of whom more members complain than could all be lying."""
        n_accusers = Counter(dealer for _, dealer in self.complaints)
        return tuple(sorted(d for d, n in n_accusers.items() if n > self.cell.colluders))

    # UPLOAD

    def check_upload(self, signed: Signed[MaskedHeader]) -> None:
        """Check the head of a masked upload.

        Raises:
            MaskedMessageError: Not a member's of U2, of other masks, or of another size.
        """
        body = signed.body
        self._check_author(body.agent, body.transcript)
        _check_signature(signed, "masked-upload")
        if body.agent not in self._shared():
            msg = "the sender has shared nothing in time, so nobody masks with it"
            raise MaskedMessageError(msg)
        if body.bundle != self.bundle_hash():
            msg = "the update is masked for other members than those who shared"
            raise MaskedMessageError(msg)
        if body.body_n_bytes != self._body_n_bytes:
            msg = f"body_n_bytes is {body.body_n_bytes}, not {self._body_n_bytes}"
            raise MaskedMessageError(msg)

    def close_uploading(self, survivors: tuple[bytes, ...] | None = None) -> tuple[bytes, ...]:
        """Fix U3: the members whose whole update arrived, or those that the journal names.

        Raises:
            MaskedMessageError: Fewer than t.
        """
        chosen = tuple(sorted(self.uploads)) if survivors is None else survivors
        self._require(len(chosen), "uploaded")
        self._u3 = chosen
        return chosen

    def survivors(self) -> Survivors:
        """Message 7."""
        headers = tuple(self.uploads[member] for member in self._alive())
        return Survivors(transcript=self.cell.transcript, headers=headers)

    def survivor_entries(self) -> Entries:
        """U3."""
        return self.survivors().entries()

    # CONFIRM

    def check_confirm(self, confirm: Confirm) -> None:
        """Check a survivor's word on U3.

        Raises:
            MaskedMessageError: Not a survivor's, or over another U3.
        """
        self._check_author(confirm.agent, confirm.transcript)
        if confirm.agent not in self._alive():
            msg = "the sender is not among the survivors"
            raise MaskedMessageError(msg)
        message = derive.confirm_hash(self.bundle_hash(), self.survivor_entries())
        try:
            verify_bytes(confirm.agent, confirm.signature, message)
        except SignatureError as error:
            msg = f"CONFIRM is over another U3: {error}"
            raise MaskedMessageError(msg) from error

    def confirmed(self) -> Confirmed | None:
        """Message 9, once t survivors confirmed."""
        if len(self.confirms) < self.cell.threshold:
            return None
        ordered = tuple(self.confirms[agent] for agent in sorted(self.confirms))
        return Confirmed(transcript=self.cell.transcript, confirmations=ordered)

    # REVEAL

    def check_reveal(self, signed: Signed[Reveal]) -> None:
        """Check what a survivor reveals: the right kind of share for each member.

        Single shares are checked when they are needed; a wrong one names its revealer.

        Raises:
            MaskedMessageError: Not a survivor's, or shares of other members or kinds.
        """
        body, alive, shared = signed.body, self._alive(), self._shared()
        self._check_author(body.agent, body.transcript)
        _check_signature(signed, "reveal")
        if body.agent not in alive:
            msg = "the sender is not among the survivors"
            raise MaskedMessageError(msg)
        of_self = tuple(dealer for dealer, _ in body.self_shares)
        of_mask = tuple(dealer for dealer, _ in body.mask_shares)
        if of_self != tuple(member for member in alive if member != body.agent) or of_mask != tuple(
            member for member in shared if member not in alive
        ):
            msg = "REVEAL holds a self share of each other survivor, a mask share of who is not"
            raise MaskedMessageError(msg)
        if derive.commitment(self.cell.transcript, body.agent, body.self_seed) != (
            self.shares[body.agent].header.body.commitment
        ):
            msg = "self_seed is not the one that was committed to"
            raise MaskedMessageError(msg)

    def recover(self, *, last_call: bool = False) -> Recovery | None:
        """The masks of the survivors' sum, once enough was revealed; None before.

        Args:
            last_call: Nothing more will come.

        Raises:
            UnrecoverableError: Nothing more will come, and a secret cannot be rebuilt: too little
                was revealed, or a dealer's shares are not of the secret that it committed to.
        """
        alive, shared = self._alive(), self._shared()
        known = _Rebuilding(final=last_call or len(self.reveals) == len(alive))
        bundle = self.bundle_hash()
        masks: list[Mask] = []
        for member in alive:
            self_seed = self._self_seed(member, known)
            if self_seed is None:
                return None
            masks.append(Mask(seed=derive.self_mask_seed(self_seed, bundle, member), sign=-1))
        for gone in (member for member in shared if member not in alive):
            private_key = self._mask_key(gone, known)
            if private_key is None:
                return None
            for member in alive:
                secret = derive.agree(private_key, self.cell.readies[member].masking_key)
                seed = derive.pair_seed(secret, bundle, member, gone)
                # The sign of the one that is gone: it takes away what the survivor put in.
                masks.append(Mask(seed=seed, sign=derive.pair_sign(gone, member)))
        return Recovery(
            survivors=alive,
            masks=tuple(masks),
            checks=derive.check_words(bundle, word_bits=self._word_bits),
            blamed=tuple(sorted(known.blamed)),
        )

    def _self_seed(self, member: bytes, known: "_Rebuilding") -> bytes | None:
        reveal = self.reveals.get(member)
        if reveal is not None:  # checked against the commitment when it came
            return reveal.body.self_seed
        expected = self.shares[member].header.body.commitment

        def holds(secret: bytes) -> bool:
            return derive.commitment(self.cell.transcript, member, secret) == expected

        return self._rebuild(member, ShareKind.SELF, holds, known)

    def _mask_key(self, member: bytes, known: "_Rebuilding") -> bytes | None:
        expected = self.cell.readies[member].masking_key

        def holds(secret: bytes) -> bool:
            return derive.public_key_of(secret) == expected

        return self._rebuild(member, ShareKind.MASK, holds, known)

    def _rebuild(
        self,
        dealer: bytes,
        kind: ShareKind,
        holds: Callable[[bytes], bool],
        known: "_Rebuilding",
    ) -> bytes | None:
        threshold = self.cell.threshold
        shares = self._revealed(dealer, kind, known, limit=threshold)
        if len(shares) < threshold:
            self._give_up_at_the_end(dealer, f"{len(shares)} shares are left", known)
            return None
        secret = known.secret(shares)
        if secret is not None and holds(secret):
            return secret
        # Each share is the one that the dealer signed, so the dealer is proved guilty.
        known.blamed.add(dealer)
        with suppress(ShareError):
            secret, _ = correct(self._revealed(dealer, kind, known), threshold=threshold)
            if holds(secret):
                return secret
        self._give_up_at_the_end(dealer, "its shares are not of one secret", known)
        return None

    def _give_up_at_the_end(self, dealer: bytes, reason: str, known: "_Rebuilding") -> None:
        if known.final:
            msg = f"a secret of {b64u_encode(dealer)[:12]} cannot be rebuilt: {reason}"
            raise UnrecoverableError(msg, tuple(sorted(known.blamed)))

    def _revealed(
        self, dealer: bytes, kind: ShareKind, known: "_Rebuilding", *, limit: int | None = None
    ) -> dict[int, bytes]:
        """The shares of a dealer that are what it signed, by x; at most `limit`.

        Who reveals another share than the dealer signed is blamed; so is a dealer that signed what
        is no share. That one is missing is the word of a single member, which nobody can disprove:
        the dealer is blamed when more say so than could all be lying.
        """
        header = self.shares[dealer].header.body
        digests = header.self_shares if kind is ShareKind.SELF else header.mask_shares
        found: dict[int, bytes] = {}
        n_missing = 0
        for agent in sorted(self.reveals):
            if len(found) == limit:
                break  # shares are checked when they are needed
            body = self.reveals[agent].body
            given = dict(body.self_shares if kind is ShareKind.SELF else body.mask_shares)
            share = given.get(dealer)
            if share is None:  # its own
                continue
            if share == MISSING_SHARE:
                n_missing += 1
                continue
            digest = derive.share_digest(self.cell.transcript, dealer, agent, kind, share)
            if digest != digests[self.cell.place(dealer, agent)]:
                known.blamed.add(agent)
            elif not is_share(share):
                known.blamed.add(dealer)
            else:
                found[self.cell.places[agent] + 1] = share
        if n_missing > self.cell.colluders:
            known.blamed.add(dealer)
        return found

    # What holds for all

    def _check_author(self, agent: bytes, transcript: bytes) -> None:
        if agent not in self.cell.readies:
            msg = f"{b64u_encode(agent)} is not a member of this cell"
            raise MaskedMessageError(msg)
        if transcript != self.cell.transcript:
            msg = "the message is of another cell"
            raise MaskedMessageError(msg)

    def _require(self, n_members: int, what: str) -> None:
        if n_members < self.cell.threshold:
            msg = f"{n_members} members {what}; at least {self.cell.threshold} must"
            raise MaskedMessageError(msg)

    def _shared(self) -> tuple[bytes, ...]:
        if self._u2 is None:
            msg = "the cell still waits for shares"
            raise MaskedMessageError(msg)
        return self._u2

    def _alive(self) -> tuple[bytes, ...]:
        if self._u3 is None:
            msg = "the cell still waits for uploads"
            raise MaskedMessageError(msg)
        return self._u3


def _check_signature(signed: Signed[MessageT], name: str) -> None:
    try:
        verify(signed, name, key=signed.body.agent)
    except SignatureError as error:
        raise MaskedMessageError(str(error)) from error

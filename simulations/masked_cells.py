"""A masked cell of simulated agents: with all of its cryptography, or by its rules alone.

`masked_sum` plays the shipped state machines of agents and server against each other, without HTTP
and without a journal: keys, shares, masks and check words are real. `plain_sum` makes none of them
and says the same: who counts, whether the cell is lost and why, and the sum. A member's place is
where it stands in the roster, from 0; it vanishes before one of its messages, and for good.

```
          SHARES            upload            CONFIRM            REVEAL
lost if   fewer than t      fewer than t      fewer than t       fewer than t
counts    -                 whoever uploads   as before          as before
```

A federation gives the members of a lost cell a second one, where it may; that is the caller's, and
`left_to_try` says who they are.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

import numpy as np

from aggregator_server.unmask import Unmasker
from privacy.errors import MaskedMessageError, SumError
from privacy.fixed_point import N_CHECK_WORDS, EncodingPlan, checked_sum, with_checks
from privacy.masked_vector import masked_runs
from privacy.masking import Words
from privacy.secagg import cells
from privacy.secagg.agent import MaskPlan, SecAggAgent
from privacy.secagg.checks import CellPolicy
from privacy.secagg.server import CellServer, UnrecoverableError
from protocol.blocks import CellMasking
from protocol.masked import Confirmed, FailureReason, ReadyList, Roster
from protocol.messages import Credential
from protocol.signing import Signed, Signer, sign
from simulations.errors import MaskedCellError

_FORMED_AT: Final = 1_800_000_000
_EXPIRES_AT: Final = _FORMED_AT + 3600


class Stage(IntEnum):
    """Before which message a member vanishes."""

    BEFORE_SHARES = 0
    BEFORE_UPLOAD = 1
    BEFORE_CONFIRM = 2
    BEFORE_REVEAL = 3


_REASONS: Final = {
    Stage.BEFORE_SHARES: FailureReason.TOO_FEW_SHARED,
    Stage.BEFORE_UPLOAD: FailureReason.TOO_FEW_UPLOADED,
    Stage.BEFORE_CONFIRM: FailureReason.TOO_FEW_CONFIRMED,
    Stage.BEFORE_REVEAL: FailureReason.TOO_FEW_REVEALED,
}


@dataclass(frozen=True, kw_only=True)
class CellTerms:
    """What the members of a cell know of their federation and round.

    Raises (at construction):
        MaskedCellError: The plan is not of this masking, or an id or number that cannot be.
    """

    plan: EncodingPlan
    masking: CellMasking
    federation: bytes
    """16 bytes."""
    round_number: int
    """At least 1."""
    round_digest: bytes
    """Of the round's manifest, 32 bytes."""

    def __post_init__(self) -> None:
        """Refuse what no federation has."""
        told = (self.plan.word_bits, self.plan.max_members)
        agreed = (self.masking.word_bits, self.masking.max_cell)
        if told != agreed:
            msg = f"the plan has words and members of {told}, the masking of {agreed}"
            raise MaskedCellError(msg)
        if (len(self.federation), len(self.round_digest)) != (16, 32) or self.round_number < 1:
            msg = (
                f"an id of {len(self.federation)} bytes, a digest of {len(self.round_digest)} and "
                f"round {self.round_number}; expected 16, 32 and at least 1"
            )
            raise MaskedCellError(msg)

    def colluders(self, n_members: int) -> int:
        """How many colluding members a cell tolerates.

        Args:
            n_members: m.

        Raises:
            MaskedCellError: No federation under this masking forms such a cell.
        """
        smallest, largest = self.masking.min_cell, 2 * self.masking.cell_target - 1
        if not smallest <= n_members <= largest:
            msg = (
                f"a cell of {n_members} members; with masking.cell_target "
                f"{self.masking.cell_target} a cell has {smallest} to {largest}"
            )
            raise MaskedCellError(msg)
        return cells.colluders(n_members, wanted=self.masking.colluders)

    def threshold(self, n_members: int) -> int:
        """T: how many members must be there at every stage.

        Args:
            n_members: m.

        Raises:
            MaskedCellError: See `colluders`.
        """
        return cells.threshold(n_members, self.colluders(n_members))


@dataclass(frozen=True, kw_only=True, eq=False)
class CellTotal:
    """A cell that gave a sum."""

    payload: Words
    """[n_payload], checked: `fixed_point.decode` says what it holds."""
    counted: tuple[int, ...]
    """Places of those whose payloads are in it, ascending."""


@dataclass(frozen=True, kw_only=True)
class LostCell:
    """A cell that gave none."""

    reason: FailureReason


CellOutcome: TypeAlias = CellTotal | LostCell


def n_uploads(found: CellOutcome, n_members: int, vanishings: Mapping[int, Stage]) -> int:
    """How many members of a cell sent their masked update.

    Args:
        found: What became of the cell.
        n_members: m.
        vanishings: Who leaves it, and before what.
    """
    if isinstance(found, LostCell) and found.reason is _REASONS[Stage.BEFORE_SHARES]:
        return 0
    return sum(
        place not in vanishings or vanishings[place] > Stage.BEFORE_UPLOAD
        for place in range(n_members)
    )


def left_to_try(
    found: LostCell, n_members: int, vanishings: Mapping[int, Stage], *, with_noise: bool
) -> tuple[int, ...]:
    """Places of those who may be in a second cell after the loss of their first one.

    They are still there, and have not confirmed: after that an update must be in no other sum
    (PROTOCOL, "Failure"). Nor may a noisy one have been sent: two sums would average its noise out.

    Args:
        found: The loss.
        n_members: m.
        vanishings: Who left it, and before what.
        with_noise: Whether members' noise is in their updates (profile P2).
    """
    lost_at = next((stage for stage, reason in _REASONS.items() if reason is found.reason), None)
    # Whoever is still there has uploaded if it was lost later than before shares; confirmed, if
    # later than before the upload; all the more where all came and the sum was bad.
    last = Stage.BEFORE_SHARES if with_noise else Stage.BEFORE_UPLOAD
    if lost_at is None or lost_at > last:
        return ()
    return tuple(
        place
        for place in range(n_members)
        if place not in vanishings or vanishings[place] > lost_at
    )


@dataclass(frozen=True, kw_only=True)
class Member:
    """A simulated agent."""

    agent: SecAggAgent

    @property
    def identity(self) -> bytes:
        """Its public key."""
        return self.agent.state.ready.body.agent


class SimulatedCell:
    """One cell of simulated agents and its server, moved on stage by stage.

    Guarantees:
        1. Every message passes the checks of whoever receives it, agent or server.

    Keys are of the operating system's generator, new for each cell; nothing that a cell gives
    depends on them. The list of ready agents names this cell alone, so it is drawn from it as in a
    federation.

    Args:
        terms: Of its round.
        n_members: m.

    Raises:
        MaskedCellError: No federation forms such a cell.
    """

    def __init__(self, terms: CellTerms, n_members: int) -> None:
        """Make keys, READY messages, list and roster."""
        colluders = terms.colluders(n_members)
        self._terms = terms
        self.plan = terms.plan
        self._key, registrar = Signer.generate(), Signer.generate()
        policy = CellPolicy(
            federation=terms.federation,
            round=terms.round_number,
            round_digest=terms.round_digest,
            server=self._key.identity,
            registrar=registrar.identity,
            masking=terms.masking,
            body_n_bytes=terms.plan.n_bytes,
            min_members=terms.masking.min_cell,
        )
        members = [_ready_member(policy, registrar) for _ in range(n_members)]
        self.members: tuple[Member, ...] = tuple(sorted(members, key=lambda one: one.identity))
        """By place."""
        self.ready_list, self.roster = self._formed(colluders)
        self.server = CellServer(
            self.roster.body,
            body_n_bytes=terms.plan.n_bytes,
            word_bits=terms.plan.word_bits,
        )
        """Its `close_sharing` ends SHARES, `close_uploading` the uploads."""

    def _formed(self, colluders: int) -> tuple[Signed[ReadyList], Signed[Roster]]:
        terms, readies = self._terms, tuple(one.agent.state.ready for one in self.members)
        listed = ReadyList(
            federation=terms.federation,
            round=terms.round_number,
            round_digest=terms.round_digest,
            wave=1,
            entries=tuple((ready.body.agent, ready.body.digest()) for ready in readies),
        )
        roster = Roster(
            federation=terms.federation,
            round=terms.round_number,
            round_digest=terms.round_digest,
            list_digest=listed.digest(),
            cell=0,
            formed_at=_FORMED_AT,
            members=readies,
            threshold=cells.threshold(len(readies), colluders),
            colluders=colluders,
        )
        signed = sign(self._key, "ready-list", listed).signed
        return signed, sign(self._key, "roster", roster).signed

    def share(self, members: Iterable[Member]) -> None:
        """These members deal their shares."""
        for member in members:
            shares = member.agent.receive_roster(self.ready_list, self.roster)
            self.server.check_shares(shares)
            self.server.shares[member.identity] = shares

    def take_bundle(self, member: Member) -> MaskPlan:
        """A member opens what the others dealt it.

        Raises:
            MaskedCellError: It has shared nothing itself.
            MaskedMessageError: Sharing has not ended.
        """
        bundle = self.server.bundle_for(member.identity)
        if bundle is None:
            msg = "a member that has shared nothing is sent no bundle"
            raise MaskedCellError(msg)
        return member.agent.receive_bundle(bundle)

    def masked(self, payload: Words, plan: MaskPlan) -> Words:
        """An encoded update under its masks.

        Args:
            payload: [n_payload].
            plan: Of its member.

        Returns:
            [n_words].
        """
        words = np.empty(self.plan.n_words, self.plan.dtype)
        n_done = 0
        for run in masked_runs(payload, plan.masks, plan.checks, self.plan):
            words[n_done : n_done + len(run)] = run
            n_done += len(run)
        return words

    def upload(self, member: Member, digest: bytes) -> None:
        """A member's whole masked update is with the server.

        Args:
            member: Has taken its bundle.
            digest: SHA-256 of the update.
        """
        header = member.agent.sign_upload(digest)
        self.server.check_upload(header)
        self.server.uploads[member.identity] = header
        member.agent.uploaded()

    def confirm(self, members: Iterable[Member]) -> Confirmed | None:
        """These survivors confirm; None if they are too few.

        Raises:
            MaskedMessageError: Uploading has not ended.
        """
        survivors = self.server.survivors()
        for member in members:
            confirm = member.agent.receive_survivors(survivors)
            self.server.check_confirm(confirm)
            self.server.confirms[member.identity] = confirm
        return self.server.confirmed()

    def reveal(self, members: Iterable[Member], confirmed: Confirmed) -> None:
        """These survivors reveal."""
        for member in members:
            reveal = member.agent.receive_confirmed(confirmed)
            self.server.check_reveal(reveal)
            self.server.reveals[member.identity] = reveal

    def unmask(self, vectors: Sequence[Words], unmasker: Unmasker) -> Words:
        """The sum of the survivors' payloads; nothing more is revealed.

        Args:
            vectors: Of all survivors, each [n_words].
            unmasker: Adds and unmasks.

        Returns:
            [n_payload].

        Raises:
            UnrecoverableError: Too little was revealed.
            SumError: Not the sum of honest members' payloads.
        """
        recovery = self.server.recover(last_call=True)
        if recovery is None:  # cannot be: it raises at the last call
            msg = "the last call gave neither a sum nor a reason"
            raise MaskedCellError(msg)
        words = unmasker.unmask(
            _InMemory(tuple(vectors)),
            recovery.masks,
            n_words=self.plan.n_words,
            word_bits=self.plan.word_bits,
        )
        return checked_sum(words, recovery.checks, self.plan, n_members=len(recovery.survivors))


def _ready_member(policy: CellPolicy, registrar: Signer) -> Member:
    signer = Signer.generate()
    credential = Credential(
        federation=policy.federation, agent=signer.identity, expires_at=_EXPIRES_AT
    )
    agent = SecAggAgent.begin(
        signer,
        policy,
        credential=sign(registrar, "credential", credential).signed,
        attempt=1,
        expires_at=_EXPIRES_AT,
    )
    return Member(agent=agent)


@dataclass(frozen=True)
class _InMemory:
    """Reads slices of vectors that are in memory."""

    vectors: tuple[Words, ...]

    def __call__(self, start: int, stop: int) -> Iterator[memoryview]:
        for vector in self.vectors:
            yield vector.data.cast("B")[start:stop]


def _in_order(members: Sequence[Member]) -> Sequence[Member]:
    return members


def masked_sum(
    terms: CellTerms,
    payloads: Sequence[Words],
    vanishings: Mapping[int, Stage],
    *,
    arrive: Callable[[Sequence[Member]], Sequence[Member]] = _in_order,
) -> CellOutcome:
    """Play a cell to its end, with all of its cryptography.

    Guarantees:
        1. A sum is that of the payloads of whoever uploaded, word for word in Z_2^k.
        2. Neither keys nor the order of messages change what comes out.

    It holds the masked vectors of all members in memory.

    Args:
        terms: Of the round.
        payloads: By place, each [n_payload] words from `fixed_point.encode`, or an attacker's.
        vanishings: By place, for whoever does not stay to the end.
        arrive: In which order the messages of a stage come, given who sends one.

    Raises:
        MaskedCellError: No federation forms such a cell, words of another length or type, or a
            place that nobody has.
    """
    _check(terms, payloads, vanishings)
    cell = SimulatedCell(terms, len(payloads))
    own = {member.identity: payload for member, payload in zip(cell.members, payloads, strict=True)}

    def there(stage: Stage) -> Sequence[Member]:
        return arrive([cell.members[place] for place in _there(stage, len(payloads), vanishings)])

    cell.share(there(Stage.BEFORE_SHARES))
    try:
        cell.server.close_sharing()
    except MaskedMessageError:
        return LostCell(reason=FailureReason.TOO_FEW_SHARED)
    vectors = []
    for member in there(Stage.BEFORE_UPLOAD):
        vector = cell.masked(own[member.identity], cell.take_bundle(member))
        cell.upload(member, hashlib.sha256(vector.data).digest())
        vectors.append(vector)
    try:
        survivors = cell.server.close_uploading()
    except MaskedMessageError:
        return LostCell(reason=FailureReason.TOO_FEW_UPLOADED)
    confirmed = cell.confirm(there(Stage.BEFORE_CONFIRM))
    if confirmed is None:
        return LostCell(reason=FailureReason.TOO_FEW_CONFIRMED)
    cell.reveal(there(Stage.BEFORE_REVEAL), confirmed)
    try:
        payload = cell.unmask(vectors, Unmasker())
    except UnrecoverableError:
        return LostCell(reason=FailureReason.TOO_FEW_REVEALED)
    except SumError:
        return LostCell(reason=FailureReason.BAD_SUM)
    places = {member.identity: place for place, member in enumerate(cell.members)}
    return CellTotal(payload=payload, counted=tuple(places[identity] for identity in survivors))


def plain_sum(
    terms: CellTerms, payloads: Sequence[Words], vanishings: Mapping[int, Stage]
) -> CellOutcome:
    """What `masked_sum` gives, without its cryptography.

    Guarantees:
        1. The same outcome as `masked_sum`: the same places counted, the same words, or a cell
           that is lost for the same reason.

    Args:
        terms: Of the round.
        payloads: By place, each [n_payload] words.
        vanishings: By place, for whoever does not stay to the end.

    Raises:
        MaskedCellError: As `masked_sum`.
    """
    _check(terms, payloads, vanishings)
    plan, threshold = terms.plan, terms.threshold(len(payloads))
    for stage, reason in _REASONS.items():
        if len(_there(stage, len(payloads), vanishings)) < threshold:
            return LostCell(reason=reason)
    counted = _there(Stage.BEFORE_UPLOAD, len(payloads), vanishings)
    total: Words = np.zeros(plan.n_payload, plan.dtype)
    for place in counted:
        total += payloads[place]
    checks: Words = np.zeros(N_CHECK_WORDS, plan.dtype)  # they add up; the rest is looked at
    words = with_checks(total, checks, plan, 0, plan.n_words)
    try:
        payload = checked_sum(words, checks, plan, n_members=len(counted))
    except SumError:
        return LostCell(reason=FailureReason.BAD_SUM)
    return CellTotal(payload=payload, counted=counted)


def _there(stage: Stage, n_members: int, vanishings: Mapping[int, Stage]) -> tuple[int, ...]:
    """Places of those who have not vanished before a stage's message."""
    gone = {place for place, when in vanishings.items() if when <= stage}
    return tuple(place for place in range(n_members) if place not in gone)


def _check(terms: CellTerms, payloads: Sequence[Words], vanishings: Mapping[int, Stage]) -> None:
    terms.colluders(len(payloads))
    plan = terms.plan
    for place, payload in enumerate(payloads):
        if payload.shape != (plan.n_payload,) or payload.dtype != plan.dtype:
            msg = (
                f"the payload at place {place} has shape {payload.shape} and type {payload.dtype}; "
                f"expected ({plan.n_payload},) {plan.dtype}"
            )
            raise MaskedCellError(msg)
    unknown = sorted(set(vanishings) - set(range(len(payloads))))
    if unknown:
        msg = f"places {unknown} vanish; the cell has 0 to {len(payloads) - 1}"
        raise MaskedCellError(msg)

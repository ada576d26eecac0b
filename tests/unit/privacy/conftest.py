"""A cell with the keys of all its members, whom a test plays by hand.

Keys and entropy follow from a seed, so a failure can be repeated. Every message that the helpers
carry goes through its JSON, as between two machines.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from privacy.fixed_point import EncodingPlan, agreed_layout, encode, split_sum, with_checks
from privacy.masking import MaskAdder, Words
from privacy.noise import SecureStream
from privacy.secagg import cells, derive
from privacy.secagg.agent import MaskPlan, SecAggAgent
from privacy.secagg.checks import CellPolicy
from privacy.secagg.derive import ShareKind
from privacy.secagg.server import CellServer
from privacy.shares import split
from protocol.blocks import CellMasking
from protocol.checks import Check, CheckError
from protocol.layout import VectorLayout
from protocol.limits import MAX_CELL
from protocol.masked import (
    Bundle,
    Confirm,
    Confirmed,
    Failed,
    FailureReason,
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
from protocol.phases import AgentPhase
from protocol.signing import Signed, Signer, sign
from protocol.wire import parse, sha256

FEDERATION = bytes(range(16))
ROUND = 3
ROUND_DIGEST = sha256(b"the manifest of the round")
FORMED_AT = 1_800_000_000
SHAPES = {"a": (3, 7), "b": (20,)}


class FakeEntropy:
    """Bytes that follow from a seed; counts what was drawn."""

    def __init__(self, seed: object) -> None:
        self._random = random.Random(str(seed))
        self.n_bytes = 0

    def __call__(self, n_bytes: int) -> bytes:
        self.n_bytes += n_bytes
        return self._random.randbytes(n_bytes)


class CountingSigner(Signer):
    """A key that counts what it signed."""

    n_signed = 0

    def sign_bytes(self, message: bytes) -> bytes:
        self.n_signed += 1
        return super().sign_bytes(message)


def make_signer(seed: object) -> CountingSigner:
    signer = CountingSigner.from_private_bytes(sha256(str(seed).encode()))
    assert isinstance(signer, CountingSigner)
    return signer


class Cell:
    """One cell of a wave: its members are `agents`, by identity; `everyone` was in the list."""

    def __init__(
        self,
        n_ready: int,
        *,
        target: int | None = None,
        cell: int = 0,
        seed: object = 0,
        beacon: bytes | None = None,
        word_bits: Any = 16,
        colluders: int | None = None,
        max_weight: int = 50,
        min_members: int = 5,
        max_cell: int | None = None,
    ) -> None:
        wanted = max(5, n_ready) if target is None else target
        self.masking = CellMasking(
            word_bits=word_bits,
            max_change=1.0,
            clip_norm=20.0,
            cell_target=wanted,
            max_cell=min(MAX_CELL, 2 * wanted - 1) if max_cell is None else max_cell,
            colluders=colluders,
        )
        layout = agreed_layout(VectorLayout.of_shapes(SHAPES), self.masking)
        self.plan = EncodingPlan.of(layout, self.masking, max_weight=max_weight)
        self.registrar, self.key = make_signer("registrar"), make_signer("server")
        self.beacon, self.cell = beacon, cell
        self.policy = CellPolicy(
            federation=FEDERATION,
            round=ROUND,
            round_digest=ROUND_DIGEST,
            server=self.key.identity,
            registrar=self.registrar.identity,
            masking=self.masking,
            body_n_bytes=self.plan.n_bytes,
            min_members=min_members,
        )
        signers = [make_signer(f"{seed}, member {i}") for i in range(n_ready)]
        signers.sort(key=lambda signer: signer.identity)
        self.everyone = [
            self.begin(signer, seed=f"{seed}, {i}") for i, signer in enumerate(signers)
        ]
        drawn = cells.assign(self._listed([a.state.ready for a in self.everyone]), wanted)[cell]
        self.agents = [agent for agent in self.everyone if identity(agent) in drawn]
        self.listed, self.roster = self.offer()
        self.server = self.make_server()
        self.plans: dict[int, MaskPlan] = {}
        self.bodies: dict[int, Words] = {}

    def begin(
        self, signer: Signer, *, seed: object, attempt: int = 1, tried_again: bool = False
    ) -> SecAggAgent:
        return SecAggAgent.begin(
            signer,
            self.policy,
            credential=self.credential(signer.identity),
            attempt=attempt,
            expires_at=FORMED_AT + 600,
            tried_again=tried_again,
            entropy=FakeEntropy(seed),
        )

    def make_server(self) -> CellServer:
        return CellServer(
            self.roster.body, body_n_bytes=self.plan.n_bytes, word_bits=self.plan.word_bits
        )

    @property
    def ids(self) -> list[bytes]:
        return [identity(agent) for agent in self.agents]

    @property
    def readies(self) -> list[Signed[Ready]]:
        return [agent.state.ready for agent in self.agents]

    @property
    def threshold(self) -> int:
        return self.roster.body.threshold

    # Documents, also false ones

    def credential(
        self, agent: bytes, *, signer: Signer | None = None, **changes: Any
    ) -> Signed[Credential]:
        body = Credential(federation=FEDERATION, agent=agent, expires_at=FORMED_AT + 1_000_000)
        return sign(signer or self.registrar, "credential", body.model_copy(update=changes)).signed

    def ready(self, i: int, **changes: Any) -> Signed[Ready]:
        """Member i's READY with other fields, signed by it again."""
        agent = self.agents[i]
        body = agent.state.ready.body.model_copy(update=changes)
        return sign(agent._signer, "ready", body).signed

    def with_ready(self, i: int, **changes: Any) -> list[Signed[Ready]]:
        readies = self.readies
        readies[i] = self.ready(i, **changes)
        return readies

    def offer(
        self,
        readies: Sequence[Signed[Ready]] | None = None,
        *,
        listed: dict[str, Any] | None = None,
        roster: dict[str, Any] | None = None,
        list_key: Signer | None = None,
        roster_key: Signer | None = None,
    ) -> tuple[Signed[ReadyList], Signed[Roster]]:
        """What the server says of a cell of these READYs; consistent but for the changes."""
        members = tuple(self.readies if readies is None else readies)
        inside = {id(agent) for agent in self.agents}
        outside = [agent.state.ready for agent in self.everyone if id(agent) not in inside]
        ready_list = self._listed([*outside, *members]).model_copy(update=listed or {})
        n_members = max(2, len(members))
        c = cells.colluders(n_members, wanted=self.masking.colluders)
        body = Roster(
            federation=FEDERATION,
            round=ROUND,
            round_digest=ROUND_DIGEST,
            list_digest=ready_list.digest(),
            cell=self.cell,
            formed_at=FORMED_AT,
            members=members,
            threshold=cells.threshold(n_members, c),
            colluders=c,
        ).model_copy(update=roster or {})
        return (
            wired(Signed[ReadyList], sign(list_key or self.key, "ready-list", ready_list).signed),
            wired(Signed[Roster], sign(roster_key or self.key, "roster", body).signed),
        )

    def _listed(self, readies: Iterable[Signed[Ready]]) -> ReadyList:
        return ReadyList(
            federation=FEDERATION,
            round=ROUND,
            round_digest=ROUND_DIGEST,
            wave=1,
            entries=tuple(sorted((ready.body.agent, ready.body.digest()) for ready in readies)),
            beacon=self.beacon,
        )

    def failed(self, *, key: Signer | None = None, **changes: Any) -> Signed[Failed]:
        body = Failed(
            federation=FEDERATION,
            round=ROUND,
            transcript=self.roster.body.transcript(),
            reason=FailureReason.TOO_FEW_UPLOADED,
        ).model_copy(update=changes)
        return wired(Signed[Failed], sign(key or self.key, "failed", body).signed)

    def deal(
        self,
        i: int,
        *,
        of_self: Sequence[bytes] | None = None,
        of_mask: Sequence[bytes] | None = None,
        unopenable: Iterable[int] = (),
        unsigned: Iterable[int] = (),
        **changes: Any,
    ) -> Shares:
        """SHARES of a dealer who cheats.

        `of_self` and `of_mask` are its shares by place, one for each member; `unopenable` members
        get a ciphertext that does not open, `unsigned` ones other shares than the header says.
        """
        agent, me = self.agents[i], self.ids[i]
        state, transcript = agent.state, self.roster.body.transcript()

        def shared(secret: bytes, given: Sequence[bytes] | None, name: str) -> Sequence[bytes]:
            if given is not None:
                return given
            n_shares, entropy = len(self.agents), FakeEntropy(f"{name} of {i}")
            return split(secret, n_shares=n_shares, threshold=self.threshold, entropy=entropy)

        of_self = shared(state.self_seed, of_self, "self")
        of_mask = shared(state.masking_private_key, of_mask, "mask")
        ciphertexts = []
        digests: dict[ShareKind, list[bytes]] = {ShareKind.SELF: [], ShareKind.MASK: []}
        for j, other in enumerate(self.agents):
            if j == i:
                continue
            plaintext = of_self[j] + of_mask[j]
            if j in unsigned:
                plaintext = of_mask[j] + of_self[j]
            secret = derive.agree(state.sealing_private_key, other.state.ready.body.sealing_key)
            sealed = derive.seal_shares(
                secret, plaintext, transcript=transcript, sender=me, receiver=self.ids[j]
            )
            ciphertexts.append(bytes(82) if j in unopenable else sealed)
            for kind, share in ((ShareKind.SELF, of_self[j]), (ShareKind.MASK, of_mask[j])):
                digest = derive.share_digest(transcript, me, self.ids[j], kind, share)
                digests[kind].append(digest)
        header = SharesHeader(
            transcript=transcript,
            agent=me,
            commitment=derive.commitment(transcript, me, state.self_seed),
            ciphertexts=tuple(sha256(ciphertext) for ciphertext in ciphertexts),
            self_shares=tuple(digests[ShareKind.SELF]),
            mask_shares=tuple(digests[ShareKind.MASK]),
        ).model_copy(update=changes)
        signed = sign(agent._signer, "shares", header).signed
        return Shares(header=signed, ciphertexts=tuple(ciphertexts))

    # The stages; `who` are places, all by default

    def share(self, who: Iterable[int] | None = None) -> None:
        for i in self._all(who):
            shares = self.agents[i].receive_roster(self.listed, self.roster)
            self.add_shares(wired(Shares, shares))

    def share_badly(self, i: int, **how: Any) -> None:
        """As `share`, with what `deal` makes; the cheat itself believes in it and goes on."""
        agent, shares = self.agents[i], self.deal(i, **how)
        agent.state = agent.state.model_copy(
            update={"phase": AgentPhase.SHARED, "roster": self.roster, "shares": shares}
        )
        self.add_shares(wired(Shares, shares))

    def add_shares(self, shares: Shares) -> None:
        self.server.check_shares(shares)
        self.server.shares[shares.header.body.agent] = shares

    def bundle(self, i: int) -> Bundle:
        bundle = self.server.bundle_for(self.ids[i])
        assert bundle is not None
        return wired(Bundle, bundle)

    def mask(self, who: Iterable[int] | None = None) -> None:
        for i in self._all(who):
            self.plans[i] = self.agents[i].receive_bundle(self.bundle(i))

    def payload(self, i: int) -> Words:
        values = np.random.default_rng(i).uniform(-1.2, 1.2, self.plan.layout.n_values)
        stream = SecureStream(sha256(bytes([i])))
        return encode(values.astype(np.float32), weight=i + 1, plan=self.plan, stream=stream)

    def masked(self, i: int) -> Words:
        plan = self.plans[i]
        words = with_checks(self.payload(i), plan.checks, self.plan, 0, self.plan.n_words)
        MaskAdder(plan.masks, word_bits=self.plan.word_bits).add(words)
        return words

    def upload(self, who: Iterable[int] | None = None) -> None:
        for i in self._all(who):
            self.bodies[i] = self.masked(i)
            header = self.agents[i].sign_upload(sha256(self.bodies[i].tobytes()))
            self.add_upload(wired(Signed[MaskedHeader], header))
            self.agents[i].uploaded()

    def add_upload(self, header: Signed[MaskedHeader]) -> None:
        self.server.check_upload(header)
        self.server.uploads[header.body.agent] = header

    def survivors(self) -> Survivors:
        return wired(Survivors, self.server.survivors())

    def confirm(self, who: Iterable[int] | None = None) -> None:
        for i in self._all(who):
            confirm = wired(Confirm, self.agents[i].receive_survivors(self.survivors()))
            self.server.check_confirm(confirm)
            self.server.confirms[confirm.agent] = confirm

    def confirmed(self) -> Confirmed:
        confirmed = self.server.confirmed()
        assert confirmed is not None
        return wired(Confirmed, confirmed)

    def reveal(self, who: Iterable[int] | None = None) -> None:
        for i in self._all(who):
            self.add_reveal(self.agents[i].receive_confirmed(self.confirmed()))

    def add_reveal(self, reveal: Signed[Reveal]) -> None:
        arrived = wired(Signed[Reveal], reveal)
        self.server.check_reveal(arrived)
        self.server.reveals[arrived.body.agent] = arrived

    def false_reveal(self, i: int, **changes: Any) -> Signed[Reveal]:
        """Member i's REVEAL with other fields, signed by it."""
        agent = self.agents[i]
        body = agent.receive_confirmed(self.confirmed()).body.model_copy(update=changes)
        return sign(agent._signer, "reveal", body).signed

    def up_to(self, stage: str, *, gone: Iterable[int] = ()) -> "Cell":
        """Play up to a stage, inclusive; `gone` share their secrets and upload nothing."""
        alive = [i for i in range(len(self.agents)) if i not in set(gone)]
        stages: dict[str, Callable[[], Any]] = {
            "share": self.share,
            "close-sharing": self.server.close_sharing,
            "mask": self.mask,
            "upload": lambda: self.upload(alive),
            "close-uploading": self.server.close_uploading,
            "confirm": lambda: self.confirm(alive),
            "reveal": lambda: self.reveal(alive),
        }
        for name, play in stages.items():
            play()
            if name == stage:
                return self
        raise AssertionError(stage)

    # The sum

    def unmasked(self) -> Words:
        """The survivors' sum as the server gets it, without its check words."""
        recovery = self.server.recover()
        assert recovery is not None
        places = [self.ids.index(survivor) for survivor in recovery.survivors]
        total = np.zeros(self.plan.n_words, self.plan.dtype)
        for place in places:
            total += self.bodies[place]
        MaskAdder(recovery.masks, word_bits=self.plan.word_bits).add(total)
        return split_sum(total, recovery.checks, self.plan, n_members=len(places))

    def plain_sum(self, who: Iterable[int]) -> Words:
        total = np.zeros(self.plan.n_payload, self.plan.dtype)
        for i in who:
            total += self.payload(i)
        return total

    def _all(self, who: Iterable[int] | None) -> Iterable[int]:
        return range(len(self.agents)) if who is None else who


def identity(agent: SecAggAgent) -> bytes:
    return agent.state.ready.body.agent


def wired(model: Any, message: Any) -> Any:
    """A message as it arrives on another machine."""
    return parse(model, message.canonical())


@pytest.fixture
def make_cell() -> Callable[..., Cell]:
    return Cell


@pytest.fixture
def make_entropy() -> Callable[[object], FakeEntropy]:
    return FakeEntropy


@pytest.fixture
def make_key() -> Callable[[object], CountingSigner]:
    """A key that stands in no cell, unless the seed is one of a cell."""
    return make_signer


@pytest.fixture
def over_the_wire() -> Callable[[Any, Any], Any]:
    return wired


@pytest.fixture
def refused() -> Callable[[SecAggAgent, Check, Callable[[], object]], CheckError]:
    """Demands that a call is refused with this check, signs and draws nothing, changes nothing."""

    def demand(agent: SecAggAgent, check: Check, call: Callable[[], object]) -> CheckError:
        signer, entropy = agent._signer, agent._entropy
        assert isinstance(signer, CountingSigner)
        assert isinstance(entropy, FakeEntropy)
        before = (agent.state, agent.state.canonical(), signer.n_signed, entropy.n_bytes)
        with pytest.raises(CheckError) as caught:
            call()
        assert caught.value.check is check, caught.value
        after = (agent.state, agent.state.canonical(), signer.n_signed, entropy.n_bytes)
        assert after == before
        return caught.value

    return demand

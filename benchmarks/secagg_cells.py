"""Cells of simulated agents over the shipped state machines, without HTTP and without a journal.

What is timed by `benchmarks.secagg` is the code of `privacy` and `aggregator_server.unmask` itself.
"""

import hashlib
import random
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, Literal

import numpy as np
from numpy.typing import NDArray

from aggregator_server.unmask import Unmasker
from privacy.errors import MaskedMessageError
from privacy.fixed_point import EncodingPlan, agreed_layout, encode, split_sum
from privacy.masked_vector import masked_runs
from privacy.masking import Words
from privacy.noise import SecureStream
from privacy.secagg import cells
from privacy.secagg.agent import MaskPlan, SecAggAgent
from privacy.secagg.checks import CellPolicy
from privacy.secagg.server import CellServer
from protocol.blocks import CellMasking
from protocol.layout import VectorLayout
from protocol.masked import Bundle, Confirmed, ReadyList, Roster
from protocol.messages import Credential
from protocol.signing import Signed, Signer, sign

FEDERATION: Final = bytes(16)
ROUND_DIGEST: Final = bytes(32)
NOW: Final = 1_800_000_000
STAGES: Final = ("before SHARES", "before UPLOAD", "before CONFIRM", "before REVEAL")


def masking_for(n_members: int, word_bits: Literal[16, 32] = 16) -> CellMasking:
    """A block under which `n_members` ready agents make one cell."""
    target = max(5, n_members // 2 + 1)
    return CellMasking(
        word_bits=word_bits,
        max_change=0.02,
        clip_norm=1e6,
        cell_target=target,
        max_cell=max(n_members, 2 * target - 1),
    )


def plan_for(n_values: int, masking: CellMasking) -> EncodingPlan:
    """The plan of a vector of `n_values` in one tensor."""
    layout = agreed_layout(VectorLayout.of_shapes({"update": (n_values,)}), masking)
    return EncodingPlan.of(layout, masking, max_weight=1)


def update_of(n_values: int, seed: int) -> NDArray[np.float32]:
    """What an agent might have trained."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.002, n_values).astype(np.float32)


@dataclass
class Member:
    """A simulated agent."""

    agent: SecAggAgent
    identity: bytes
    bundle: Bundle | None = None


class Cell:
    """One cell of simulated agents and its server.

    Args:
        n_members: m.
        n_values: d.
        masking: The manifest's block.
    """

    def __init__(self, n_members: int, n_values: int, masking: CellMasking) -> None:
        """Make keys, READY messages, list and roster."""
        self.plan = plan_for(n_values, masking)
        self.server_key, registrar = Signer.generate(), Signer.generate()
        members = []
        for _ in range(n_members):
            signer = Signer.generate()
            credential = Credential(
                federation=FEDERATION, agent=signer.identity, expires_at=NOW + 1000
            )
            policy = CellPolicy(
                federation=FEDERATION,
                round=1,
                round_digest=ROUND_DIGEST,
                server=self.server_key.identity,
                registrar=registrar.identity,
                masking=masking,
                body_n_bytes=self.plan.n_bytes,
                min_members=masking.min_cell,
            )
            agent = SecAggAgent.begin(
                signer,
                policy,
                credential=sign(registrar, "credential", credential).signed,
                attempt=1,
                expires_at=NOW + 1000,
            )
            members.append(Member(agent=agent, identity=signer.identity))
        self.members = sorted(members, key=lambda member: member.identity)
        self.ready_list, self.roster = self._formed(masking)
        self.server = CellServer(
            self.roster.body, body_n_bytes=self.plan.n_bytes, word_bits=masking.word_bits
        )

    def _formed(self, masking: CellMasking) -> tuple[Signed[ReadyList], Signed[Roster]]:
        listed = ReadyList(
            federation=FEDERATION,
            round=1,
            round_digest=ROUND_DIGEST,
            wave=1,
            entries=tuple((m.identity, m.agent.state.ready.body.digest()) for m in self.members),
        )
        n_members = len(self.members)
        colluders = cells.colluders(n_members, wanted=masking.colluders)
        roster = Roster(
            federation=FEDERATION,
            round=1,
            round_digest=ROUND_DIGEST,
            list_digest=listed.digest(),
            cell=0,
            formed_at=NOW,
            members=tuple(m.agent.state.ready for m in self.members),
            threshold=cells.threshold(n_members, colluders),
            colluders=colluders,
        )
        signed = sign(self.server_key, "ready-list", listed).signed
        return signed, sign(self.server_key, "roster", roster).signed

    def share(self, members: Sequence[Member]) -> None:
        """These members deal their shares, and sharing ends."""
        for member in members:
            shares = member.agent.receive_roster(self.ready_list, self.roster)
            self.server.check_shares(shares)
            self.server.shares[member.identity] = shares
        self.server.close_sharing()

    def take_bundle(self, member: Member) -> MaskPlan:
        """A member opens its bundle."""
        bundle = self.server.bundle_for(member.identity)
        if bundle is None:
            raise RuntimeError("the member has shared nothing")
        return member.agent.receive_bundle(bundle)

    def masked(self, payload: Words, plan: MaskPlan) -> tuple[Words, bytes]:
        """An encoded update under its masks, and its SHA-256."""
        with tempfile.TemporaryFile() as file:
            digest = self.mask_into(file, payload, plan)
            file.seek(0)
            return np.fromfile(file, self.plan.dtype), digest

    def mask_into(self, file: BinaryIO, payload: Words, plan: MaskPlan) -> bytes:
        """Write an encoded update under its masks, in parts as the agent does; its SHA-256."""
        digest = hashlib.sha256()
        for run in masked_runs(payload, plan.masks, plan.checks, self.plan):
            digest.update(run.data)
            file.write(run.data)
        return digest.digest()

    def upload(self, member: Member, digest: bytes) -> None:
        """A member's whole masked update is with the server."""
        header = member.agent.sign_upload(digest)
        self.server.check_upload(header)
        self.server.uploads[member.identity] = header
        member.agent.uploaded()

    def confirm(self, members: Sequence[Member]) -> Confirmed | None:
        """These survivors confirm."""
        self.server.close_uploading()
        survivors = self.server.survivors()
        for member in members:
            confirm = member.agent.receive_survivors(survivors)
            self.server.check_confirm(confirm)
            self.server.confirms[member.identity] = confirm
        return self.server.confirmed()

    def reveal(self, members: Sequence[Member], confirmed: Confirmed) -> None:
        """These survivors reveal."""
        for member in members:
            reveal = member.agent.receive_confirmed(confirmed)
            self.server.check_reveal(reveal)
            self.server.reveals[member.identity] = reveal


@dataclass(frozen=True)
class InMemory:
    """Reads slices of vectors that are in memory."""

    vectors: tuple[Words, ...]

    def __call__(self, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes `start` to `stop` of each."""
        for vector in self.vectors:
            yield memoryview(vector).cast("B")[start:stop]


def unmask(cell: Cell, vectors: Sequence[Words], unmasker: Unmasker) -> tuple[Words, float]:
    """The sum of a cell whose members have revealed, and how long the server took.

    Rebuilding secrets, adding the vectors up, removing the masks, checking the check words.
    """
    began = time.perf_counter()
    recovery = cell.server.recover()
    if recovery is None:
        raise RuntimeError("too little was revealed")
    words = unmasker.unmask(
        InMemory(tuple(vectors)),
        recovery.masks,
        n_words=cell.plan.n_words,
        word_bits=cell.plan.word_bits,
    )
    payload = split_sum(words, recovery.checks, cell.plan, n_members=len(recovery.survivors))
    return payload, time.perf_counter() - began


def prepared(
    n_members: int, n_values: int, n_drops: int, masking: CellMasking
) -> tuple[Cell, list[Words], Words]:
    """A cell that has revealed, `n_drops` of whose members shared and sent nothing more.

    Returns:
        The cell, the survivors' masked vectors, and the true sum of their payloads.
    """
    cell = Cell(n_members, n_values, masking)
    cell.share(cell.members)
    gone = {member.identity for member in cell.members[:: max(1, n_members // max(1, n_drops))]}
    gone = set(sorted(gone)[:n_drops])
    vectors, total = [], np.zeros(cell.plan.n_payload, cell.plan.dtype)
    for number, member in enumerate(cell.members):
        plan = cell.take_bundle(member)
        if member.identity in gone:
            continue
        payload = encode(
            update_of(n_values, number), weight=1, plan=cell.plan, stream=SecureStream()
        )
        masked, digest = cell.masked(payload, plan)
        vectors.append(masked)
        total += payload
        cell.upload(member, digest)
    alive = [member for member in cell.members if member.identity not in gone]
    confirmed = cell.confirm(alive)
    if confirmed is None:
        raise RuntimeError("too few survivors")
    cell.reveal(alive, confirmed)
    return cell, vectors, total


def crowd_cell(
    n_members: int, n_values: int, masking: CellMasking, rng: random.Random, drop_frac: float
) -> dict[str, Any]:
    """One cell of a crowd, whose members vanish at random stages; exact, or lost.

    Args:
        n_members: m.
        n_values: d.
        masking: The block.
        rng: Decides who vanishes when, and who is late: late messages come last in their stage.
        drop_frac: Chance of each member to vanish somewhere.
    """
    cell = Cell(n_members, n_values, masking)
    leaves = {
        member.identity: rng.randrange(len(STAGES)) if rng.random() < drop_frac else len(STAGES)
        for member in cell.members
    }

    def there(stage: int, among: Collection[bytes]) -> list[Member]:
        found = [m for m in cell.members if m.identity in among and leaves[m.identity] > stage]
        late = [member for member in found if rng.random() < 0.2]
        return [member for member in found if member not in late] + late

    everyone = {member.identity for member in cell.members}
    n_gone = sum(stage < len(STAGES) for stage in leaves.values())
    try:
        cell.share(there(0, everyone))
        vectors, total = {}, np.zeros(cell.plan.n_payload, cell.plan.dtype)
        for number, member in enumerate(there(1, cell.server.shares)):
            plan = cell.take_bundle(member)
            payload = encode(
                update_of(n_values, number), weight=1, plan=cell.plan, stream=SecureStream()
            )
            masked, digest = cell.masked(payload, plan)
            cell.upload(member, digest)
            vectors[member.identity] = masked
            total += payload
        confirmed = cell.confirm(there(2, cell.server.uploads))
        if confirmed is None:
            return {"lost": "confirm", "n_gone": n_gone}
        cell.reveal(there(3, cell.server.confirms), confirmed)
        if len(cell.server.reveals) < cell.server.cell.threshold:
            return {"lost": "reveal", "n_gone": n_gone}
    except MaskedMessageError as error:
        return {"lost": str(error), "n_gone": n_gone}
    ordered = [vectors[identity] for identity in sorted(vectors)]
    found, _ = unmask(cell, ordered, Unmasker())
    return {"lost": None, "n_gone": n_gone, "exact": bool(np.array_equal(found, total))}

"""Writes `secagg_v1.json`, the golden transcripts of two cells, with words of 16 and of 32 bits.

    python tests/vectors/make_secagg_vectors.py

Six members share their secrets. One drops out then, so that its mask key is rebuilt; one vanishes
after its upload, so that its self seed is. All keys and all entropy follow from this file. Run it
only for a new version of the protocol. The tests do not trust it: they compute everything again
with whole numbers, `hashlib` and `hmac`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from privacy.fixed_point import EncodingPlan, agreed_layout, decode, encode, split_sum, with_checks
from privacy.masking import MaskAdder, Words
from privacy.noise import SecureStream
from privacy.secagg import cells, derive
from privacy.secagg.agent import MaskPlan, SecAggAgent
from privacy.secagg.checks import CellPolicy
from privacy.secagg.server import CellServer
from protocol.blocks import CellMasking
from protocol.layout import VectorLayout
from protocol.masked import Confirmed, Entries, ReadyList, Roster, entries_json
from protocol.messages import Credential
from protocol.signing import Signer, sign

TARGET = Path(__file__).with_name("secagg_v1.json")
N_MEMBERS = 6
DROPS = 2
"""Shares its secrets and uploads nothing; by place in the roster."""
VANISHES = 4
"""Uploads and confirms, and reveals nothing."""
SHAPES = {"layer.lora_A.weight": (5, 4), "layer.lora_B.weight": (4, 5)}
MAX_WEIGHT = 50
FORMED_AT = 1_800_000_000


def fixed(*names: object, n_bytes: int = 32) -> bytes:
    """Bytes that follow from a name."""
    return hashlib.shake_256(repr(names).encode()).digest(n_bytes)


class Draws:
    """Entropy that follows from a name, and a record of it."""

    def __init__(self, *names: object) -> None:
        self._names = names
        self.made: list[bytes] = []

    def __call__(self, n_bytes: int) -> bytes:
        self.made.append(fixed(*self._names, len(self.made), n_bytes=n_bytes))
        return self.made[-1]


class Member:
    """An agent with what it draws, and its update."""

    def __init__(self, name: str, place: int, signer: Signer, policy: CellPolicy) -> None:
        self.signer = signer
        self.draws = Draws(name, "draws", place)
        registrar = Signer.from_private_bytes(fixed("registrar"))
        credential = Credential(
            federation=policy.federation, agent=signer.identity, expires_at=FORMED_AT + 10**6
        )
        self.agent = SecAggAgent.begin(
            signer,
            policy,
            credential=sign(registrar, "credential", credential).signed,
            attempt=1 + place % 3,
            expires_at=FORMED_AT + 600 + place,
            entropy=self.draws,
        )
        self.rounding_key = fixed(name, "rounding", place)
        raw = np.frombuffer(fixed(name, "update", place, n_bytes=2 * 40), "<u2")
        self.update = (raw.astype(np.float64) / 2**15 - 1.0).astype(np.float32)
        self.update[place] = 0.0
        self.update[[place + 7, place + 20]] = (
            1.5,
            -1.5,
        )  # too large, where the weight is the largest
        self.weight = MAX_WEIGHT if place == 3 else 7 * (place + 1)

    def payload(self, plan: EncodingPlan) -> Words:
        """The update as words."""
        stream = SecureStream(self.rounding_key)
        return encode(self.update, weight=self.weight, plan=plan, stream=stream)

    def as_json(self) -> dict[str, Any]:
        """Everything that the member starts from."""
        sealing, masking, self_seed, nonce, of_self, of_mask = self.draws.made
        return {
            "signing_private": self.signer.private_bytes().hex(),
            "sealing_private": sealing.hex(),
            "masking_private": masking.hex(),
            "self_seed": self_seed.hex(),
            "nonce": nonce.hex(),
            "self_coefficients": of_self.hex(),
            "mask_coefficients": of_mask.hex(),
            "rounding_key": self.rounding_key.hex(),
            "update": self.update.tobytes().hex(),
            "weight": self.weight,
        }


def masked_vector(payload: Words, masks: MaskPlan, plan: EncodingPlan) -> Words:
    """A member's masked vector."""
    words = with_checks(payload, masks.checks, plan, 0, plan.n_words)
    MaskAdder(masks.masks, word_bits=plan.word_bits).add(words)
    return words


def upload(members: list[Member], cell: CellServer, plan: EncodingPlan) -> list[Words | None]:
    """From BUNDLE to UPLOAD; the masked vectors."""
    cell.close_sharing()
    masked: list[Words | None] = [None] * len(members)
    for place, member in enumerate(members):
        bundle = cell.bundle_for(member.signer.identity)
        if bundle is None:
            raise ValueError(place)
        masks = member.agent.receive_bundle(bundle)
        if place == DROPS:
            continue
        words = masked_vector(member.payload(plan), masks, plan)
        masked[place] = words
        header = member.agent.sign_upload(hashlib.sha256(words.tobytes()).digest())
        cell.check_upload(header)
        cell.uploads[member.signer.identity] = header
        member.agent.uploaded()
    cell.close_uploading()
    return masked


def confirm_and_reveal(members: list[Member], cell: CellServer) -> Confirmed:
    """From SURVIVORS to REVEAL."""
    alive = [member for place, member in enumerate(members) if place != DROPS]
    for member in alive:
        confirm = member.agent.receive_survivors(cell.survivors())
        cell.check_confirm(confirm)
        cell.confirms[confirm.agent] = confirm
    confirmed = cell.confirmed()
    if confirmed is None:
        raise ValueError(cell.confirms)
    for member in alive:
        if member is not members[VANISHES]:
            reveal = member.agent.receive_confirmed(confirmed)
            cell.check_reveal(reveal)
            cell.reveals[member.signer.identity] = reveal
    return confirmed


def transcript(name: str, word_bits: Any) -> dict[str, Any]:
    """One cell from its keys to its sum."""
    server = Signer.from_private_bytes(fixed("server"))
    registrar = Signer.from_private_bytes(fixed("registrar"))
    masking = CellMasking(
        word_bits=word_bits, max_change=1.0, clip_norm=50.0, cell_target=N_MEMBERS, max_cell=11
    )
    layout = agreed_layout(VectorLayout.of_shapes(SHAPES), masking)
    plan = EncodingPlan.of(layout, masking, max_weight=MAX_WEIGHT)
    federation, round_digest = fixed("federation", n_bytes=16), fixed(name, "manifest")
    policy = CellPolicy(
        federation=federation,
        round=3,
        round_digest=round_digest,
        server=server.identity,
        registrar=registrar.identity,
        masking=masking,
        body_n_bytes=plan.n_bytes,
        min_members=5,
    )
    signers = [Signer.from_private_bytes(fixed(name, "member", i)) for i in range(N_MEMBERS)]
    signers.sort(key=lambda signer: signer.identity)
    members = [Member(name, place, signer, policy) for place, signer in enumerate(signers)]
    readies = tuple(member.agent.state.ready for member in members)
    listed = ReadyList(
        federation=federation,
        round=3,
        round_digest=round_digest,
        wave=1,
        entries=tuple((ready.body.agent, ready.body.digest()) for ready in readies),
        beacon=fixed(name, "beacon") if word_bits == 32 else None,
    )
    colluders = cells.colluders(N_MEMBERS)
    roster = Roster(
        federation=federation,
        round=3,
        round_digest=round_digest,
        list_digest=listed.digest(),
        cell=0,
        formed_at=FORMED_AT,
        members=readies,
        threshold=cells.threshold(N_MEMBERS, colluders),
        colluders=colluders,
    )
    ready_list, signed_roster = (
        sign(server, "ready-list", listed).signed,
        sign(server, "roster", roster).signed,
    )
    cell = CellServer(roster, body_n_bytes=plan.n_bytes, word_bits=word_bits)

    for member in members:
        shares = member.agent.receive_roster(ready_list, signed_roster)
        cell.check_shares(shares)
        cell.shares[member.signer.identity] = shares
    masked = upload(members, cell, plan)
    alive = [member for place, member in enumerate(members) if place != DROPS]
    confirmed = confirm_and_reveal(members, cell)
    recovery = cell.recover()
    if recovery is None:
        raise ValueError(name)
    total = np.zeros(plan.n_words, plan.dtype)
    for vector in masked:
        if vector is not None:
            total += vector
    MaskAdder(recovery.masks, word_bits=word_bits).add(total)
    found = decode(split_sum(total, recovery.checks, plan, n_members=len(alive)), plan)
    shared = tuple((i, cell.shares[i].header.body.digest()) for i in cell.shares)
    survivors = cell.survivor_entries()
    return {
        "name": name,
        "word_bits": word_bits,
        "max_weight": MAX_WEIGHT,
        "layout": layout.as_json(),
        "masking": masking.as_json(),
        "server": server.private_bytes().hex(),
        "registrar": registrar.private_bytes().hex(),
        "drops": DROPS,
        "vanishes": VANISHES,
        "members": [member.as_json() for member in members],
        "ready_list": ready_list.as_json(),
        "roster": signed_roster.as_json(),
        "transcript": roster.transcript().hex(),
        "shares": [cell.shares[member.signer.identity].as_json() for member in members],
        "u2": entries_json(shared),
        "bundle": cell.bundle_hash().hex(),
        "check_words": recovery.checks.tolist(),
        "payloads": [member.payload(plan).tolist() for member in members],
        "masked": [None if vector is None else vector.tobytes().hex() for vector in masked],
        "uploads": [cell.uploads[member.signer.identity].as_json() for member in alive],
        "u3": entries_json(survivors),
        "survivors_hash": derive.survivors_hash(survivors).hex(),
        "confirm_hash": derive.confirm_hash(cell.bundle_hash(), survivors).hex(),
        "confirmed": confirmed.as_json(),
        "reveals": [reveal.as_json() for reveal in cell.reveals.values()],
        "rebuilt": {
            "masking_private": members[DROPS].agent.state.masking_private_key.hex(),
            "self_seed": members[VANISHES].agent.state.self_seed.hex(),
        },
        "sum": total.tolist(),
        "weight_sum": found.weight_sum,
        "n_members": found.n_members,
        "n_clipped": found.n_clipped,
        "values": found.values.tobytes().hex(),
        "bad": bad_cases(members, cell, shared),
    }


def bad_cases(members: list[Member], cell: CellServer, shared: Entries) -> dict[str, Any]:
    """What has to be refused, though it looks right."""
    receiver = members[0].agent
    dealer = members[DROPS].signer.identity
    given = next(one for one in receiver.state.received if one.dealer == dealer)
    corrupted = given.mask_share[:-1] + bytes([given.mask_share[-1] ^ 1])
    other_bundle = derive.bundle_hash(cell.cell.transcript, shared[:-1])
    upload = members[0].agent.state.upload
    if upload is None:
        raise ValueError(dealer)
    header = upload.body.model_copy(update={"bundle": other_bundle})
    prime = 2**255 - 19
    return {
        "bad_share": {"receiver": 0, "kind": "mask", "share": corrupted.hex()},
        "bad_low_order_keys": [
            point.to_bytes(32, "little").hex()
            for point in (
                0,
                1,
                prime - 1,
                325606250916557431795983626356110631294008115727848805560023387167927233504,
                39382357235489614581723060781553021112529911719440698176882885853963445705823,
            )
        ],
        "bad_not_canonical_keys": [
            number.to_bytes(32, "little").hex()
            for number in (prime, prime + 9, 2**255 - 1, 2**255 + 9)
        ],
        "bad_t2": {
            "bundle": other_bundle.hex(),
            "upload": sign(members[0].signer, "masked-upload", header).signed.as_json(),
        },
    }


def vectors() -> dict[str, Any]:
    """Everything, as JSON."""
    return {
        "provenance": "made by tests/vectors/make_secagg_vectors.py under protocol version 1; "
        "checked by tests/unit/privacy/test_golden_transcript.py with whole numbers, hashlib, "
        "hmac, and cryptography for Ed25519 alone",
        "cases": [transcript("words of 16 bits", 16), transcript("words of 32 bits", 32)],
    }


def main() -> None:
    """Write the file."""
    text = json.dumps(vectors(), indent=1, ensure_ascii=False, sort_keys=True)
    TARGET.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

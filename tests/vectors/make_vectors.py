"""Writes `sheepfold_v1.json`, the golden vectors of our own byte rules.

    python tests/vectors/make_vectors.py

Run it only for a new version of the protocol: what is signed under version 1 never changes. The
tests do not trust this script; they compute every hash again with `json` and `hashlib`, every
signature base by hand, and verify the signatures with the cryptography library alone.
"""

import json
from pathlib import Path
from typing import Any

from protocol.blocks import BaseBlock, LoraBlock, RoundsBlock, TrainingBlock
from protocol.chain import (
    AggregationReport,
    BlobRef,
    CellRef,
    FilterReport,
    NoVerdict,
    Release,
    RoundManifest,
)
from protocol.layout import TensorSlot, VectorLayout
from protocol.manifest import FederationManifest
from protocol.messages import Credential, Enrolment, UploadHeader
from protocol.signing import Invite, Signer, fingerprint, invite_id, prove_invite, sign
from protocol.transport_signing import sign_request
from protocol.wire import WireModel, b64u_encode, domain_hash

TARGET = Path(__file__).with_name("sheepfold_v1.json")
SERVER = Signer.from_private_bytes(bytes(range(32)))
AGENT = Signer.from_private_bytes(bytes(range(32, 64)))
CODE = bytes(range(64, 80))
NOW = 1_800_000_000.5
NONCE = bytes(range(16))
URL = "https://server.example/v1/federations/AAECAwQFBgcICQoLDA0ODw/uploads?x=%C3%A9&y="


def documents() -> dict[str, WireModel]:
    """One document of each kind that is hashed."""
    layout = VectorLayout(
        slots=(
            TensorSlot(name="a.lora_A.weight", shape=(2, 3), offset=0),
            TensorSlot(
                name="a.lora_B.weight", shape=(4, 2), offset=6, step=0.0625, clip_amplitude=127
            ),
        )
    )
    federation = FederationManifest(
        federation=bytes(range(16)),
        name="Prøve “1”",
        description="Line one\nline two\t€ 😀",
        server=SERVER.identity,
        registrar=SERVER.identity,
        registrar_held_by_server=True,
        created_at=NOW,
        base=BaseBlock(
            model="org/base",
            revision="abc",
            source_dtype="bfloat16",
            fingerprint=bytes([1]) * 32,
            tokenizer_digest=bytes([2]) * 32,
        ),
        lora=LoraBlock(rank=2, alpha=4.0, target_modules=("q_proj",), init_seed=2**53 - 1),
        layout=layout.digest(),
        # Not 1e-8: Python writes it as 1e-08, and the naive computation uses Python's numbers.
        training=TrainingBlock(local_steps=10, learning_rate=0.003, eps=0.0001),
        rounds=RoundsBlock(n_rounds=5, cohort_target=3, min_cohort=2),
    )
    blob = BlobRef(sha256=bytes([3]) * 32, n_bytes=56)
    first = Release(
        federation=federation.federation,
        number=0,
        round=0,
        previous=None,
        federation_digest=federation.digest(),
        round_digest=None,
        adapter=blob,
        sent=blob,
        config=blob,
        accepted=(),
        rejected=(),
        aggregation=AggregationReport(rule="none", n_cells=0, n_agents=0, update_norm=0.0),
        filter=FilterReport(rule="none", n_cells=0, n_rejected=0),
        verdict=NoVerdict(),
        created_at=NOW,
    )
    round_manifest = RoundManifest(
        federation=federation.federation,
        federation_digest=federation.digest(),
        round=1,
        release=0,
        release_digest=first.digest(),
        sent=blob,
        selection_seed=bytes([4]) * 32,
        cohort_size=4,
        schedule_start=0.0,
        schedule_end=0.2,
        update_n_bytes=layout.n_bytes,
        opened_at=NOW,
        deadline_at=NOW + 3600,
        cap_at=NOW + 7200,
    )
    upload = UploadHeader(
        federation=federation.federation,
        round=1,
        attempt=1,
        agent=AGENT.identity,
        round_digest=round_manifest.digest(),
        layout=layout.digest(),
        weight=17,
        body_sha256=bytes([5]) * 32,
        body_n_bytes=layout.n_bytes,
    )
    second = first.model_copy(
        update={
            "number": 1,
            "round": 1,
            "previous": first.digest(),
            "round_digest": round_manifest.digest(),
            "accepted": (CellRef(transcript=bytes([6]) * 32, members=bytes([7]) * 32),),
            "aggregation": AggregationReport(
                rule="fedavg", n_cells=1, n_agents=1, update_norm=0.375
            ),
        }
    )
    return {
        "layout": layout,
        "federation": federation,
        "release": second,
        "round": round_manifest,
        "upload": upload,
    }


def signed_messages(federation: FederationManifest, upload: UploadHeader) -> list[dict[str, Any]]:
    """Messages with their signatures."""
    proof = prove_invite(CODE, agent=AGENT.identity, server=SERVER.identity)
    enrolment = Enrolment(
        federation=federation.federation,
        federation_digest=federation.digest(),
        agent=AGENT.identity,
        invite=proof,
    )
    credential = Credential(
        federation=federation.federation, agent=AGENT.identity, expires_at=int(NOW) + 1000
    )
    cases = [
        ("enrolment", AGENT, enrolment),
        ("credential", SERVER, credential),
        ("upload", AGENT, upload),
    ]
    return [
        {"name": name, **sign(signer, name, body).signed.as_json()} for name, signer, body in cases
    ]


def transport() -> dict[str, Any]:
    """A signed request."""
    body = b'{"hello":"world"}'
    headers = sign_request(AGENT, method="POST", url=URL, body=body, created=int(NOW), nonce=NONCE)
    return {
        "method": "POST",
        "url": URL,
        "body": body.decode(),
        "key": b64u_encode(AGENT.identity),
        "created": int(NOW),
        "nonce": b64u_encode(NONCE),
        "headers": headers,
    }


def vectors() -> dict[str, Any]:
    """Everything, as JSON."""
    found = documents()
    federation, upload = found["federation"], found["upload"]
    if not isinstance(federation, FederationManifest) or not isinstance(upload, UploadHeader):
        raise TypeError
    hashed: list[tuple[str, list[Any]]] = [
        ("empty", []),
        ("round", [{}]),
        ("release", [{}]),
        ("order", [{"b": 1, "a": [2, None, True], "€": "é"}]),
        ("nested", [[[]], {"": {}}]),
    ]
    invite = Invite(code=CODE, server_fingerprint=fingerprint(SERVER.identity))
    proof = prove_invite(CODE, agent=AGENT.identity, server=SERVER.identity)
    return {
        "provenance": "made by tests/vectors/make_vectors.py under protocol version 1; "
        "checked by tests/unit/protocol/test_vectors.py with json, hashlib, hmac and cryptography",
        "keys": {
            "server": {
                "private": SERVER.private_bytes().hex(),
                "identity": b64u_encode(SERVER.identity),
            },
            "agent": {
                "private": AGENT.private_bytes().hex(),
                "identity": b64u_encode(AGENT.identity),
            },
        },
        "domain_hash": [
            {"name": name, "values": values, "sha256": domain_hash(name, *values).hex()}
            for name, values in hashed
        ],
        "documents": [
            {"kind": kind, "body": document.as_json(), "digest": domain_hash_of(document)}
            for kind, document in found.items()
        ],
        "signed": signed_messages(federation, upload),
        "invite": {
            "code": CODE.hex(),
            "text": invite.format(),
            "id": b64u_encode(invite_id(CODE)),
            "mac": b64u_encode(proof.mac),
        },
        "transport": transport(),
    }


def domain_hash_of(document: WireModel) -> str:
    """The digest that the document gives itself."""
    digest: bytes = document.digest()  # type: ignore[attr-defined]
    return digest.hex()


def main() -> None:
    """Write the file."""
    text = json.dumps(vectors(), indent=1, ensure_ascii=False, sort_keys=True)
    TARGET.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

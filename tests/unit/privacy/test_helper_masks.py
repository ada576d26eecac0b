"""Helper masks: what is sealed, what the helper checks, and that the masks come off."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from privacy.errors import MaskedMessageError, ShareError
from privacy.fixed_point import EncodingPlan, agreed_layout, encode, split_sum, with_checks
from privacy.helper import (
    HelperKey,
    check_helped,
    mask_seed,
    seal_context,
    seal_seed,
)
from privacy.masking import Mask, MaskAdder
from privacy.noise import SecureStream
from privacy.secagg.derive import check_words
from protocol.blocks import AggregationBlock, HelperMasking, RoundsBlock
from protocol.chain import RoundManifest
from protocol.helped import HelperDescription, HelperHeader, HelperRequest, HelperUpload
from protocol.layout import VectorLayout
from protocol.masked import ReadyList
from protocol.messages import Credential
from protocol.signing import Signed, Signer, sign
from protocol.wire import sha256

N_AGENTS = 6
N_VALUES = 40


class Helped:
    """Two operators, agents and one closed round."""

    def __init__(self, make_manifest: Callable[..., Any], make_round: Callable[..., Any]) -> None:
        self.server, self.registrar, self.helper = (Signer.generate() for _ in range(3))
        self.key_bytes = HelperKey.generate()
        self.key = HelperKey(self.key_bytes)
        self.own = HelperDescription(helper=self.helper.identity, helper_key=self.key.public_bytes)
        self.masking = HelperMasking(
            max_change=0.1,
            clip_norm=10.0,
            cell_target=5,
            max_cell=9,
            helper=self.own.helper,
            helper_key=self.own.helper_key,
        )
        layout = agreed_layout(VectorLayout.of_shapes({"a": (N_VALUES,)}), self.masking)
        self.plan = EncodingPlan.of(layout, self.masking, max_weight=4)
        self.federation = make_manifest(
            server=self.server.identity,
            registrar=self.registrar.identity,
            registrar_held_by_server=False,
            masking=self.masking,
            aggregation=AggregationBlock(max_weight=4),
            rounds=RoundsBlock(n_rounds=3, cohort_target=6, min_cohort=5),
        )
        self.manifest: RoundManifest = make_round(
            self.federation,
            federation_digest=self.federation.digest(),
            update_n_bytes=self.plan.n_bytes,
        )
        self.agents = sorted((Signer.generate() for _ in range(N_AGENTS)), key=lambda s: s.identity)
        self.seeds = {agent.identity: bytes([i]) * 32 for i, agent in enumerate(self.agents)}
        self.vectors: dict[bytes, np.ndarray] = {}
        self.total = np.zeros(self.plan.n_payload, self.plan.dtype)
        self.uploads = [self.upload(i) for i in range(N_AGENTS)]

    def credential(self, agent: Signer, **changes: Any) -> Signed[Credential]:
        values = {
            "federation": self.federation.federation,
            "agent": agent.identity,
            "expires_at": int(self.manifest.opened_at) + 1000,
        }
        body = Credential(**{**values, **changes})
        return sign(self.registrar, "credential", body).signed

    def upload(self, index: int, **changes: Any) -> HelperUpload:
        agent = self.agents[index]
        seed = self.seeds[agent.identity]
        rng = np.random.default_rng(index)
        update = rng.normal(0, 0.01, N_VALUES).astype(np.float32)
        words = encode(update, weight=1 + index % 4, plan=self.plan, stream=SecureStream())
        checks = check_words(self.manifest.digest(), word_bits=16)
        masked = with_checks(words, checks, self.plan, 0, self.plan.n_words)
        mask = Mask(seed=mask_seed(seed, self.manifest, agent.identity), sign=1)
        MaskAdder([mask], word_bits=16).add(masked)
        if agent.identity not in self.vectors:
            self.vectors[agent.identity] = masked
            self.total += words
        context = seal_context(self.manifest, agent.identity)
        sealed = changes.pop("sealed", None) or seal_seed(
            seed, self.own.helper_key, context=context
        )
        values = {
            "federation": self.manifest.federation,
            "round": self.manifest.round,
            "attempt": 1,
            "agent": agent.identity,
            "round_digest": self.manifest.digest(),
            "credential": self.credential(agent),
            "sealed_sha256": sha256(sealed),
            "body_sha256": sha256(masked.tobytes()),
            "body_n_bytes": self.plan.n_bytes,
        }
        header = HelperHeader(**{**values, **changes})
        return HelperUpload(header=sign(agent, "helper-upload", header).signed, sealed=sealed)

    def request(self, *, signer: Signer | None = None, **changes: Any) -> Signed[HelperRequest]:
        uploads = changes.pop("uploads", tuple(self.uploads))
        entries = sorted((u.header.body.agent, u.header.body.digest()) for u in uploads)
        listed = ReadyList(
            federation=self.manifest.federation,
            round=self.manifest.round,
            round_digest=self.manifest.digest(),
            wave=1,
            entries=tuple(changes.pop("entries", entries)),
        )
        values = {
            "federation": sign(self.server, "federation", self.federation).signed,
            "round": sign(self.server, "round", self.manifest).signed,
            "uploads_list": listed,
            "uploads": uploads,
        }
        body = HelperRequest(**{**values, **changes})
        return sign(signer or self.server, "helper-request", body).signed


@pytest.fixture
def helped(make_manifest, make_round) -> Helped:
    return Helped(make_manifest, make_round)


def refused(helped: Helped, request: Signed[HelperRequest], says: str) -> None:
    with pytest.raises(MaskedMessageError, match=says):
        check_helped(request, own=helped.own)


def test_the_masks_of_a_cell_come_off_its_sum(helped: Helped) -> None:
    (cell,) = check_helped(helped.request(), own=helped.own)
    masks = []
    for upload in cell.uploads:
        agent = upload.header.body.agent
        seed = helped.key.open(upload.sealed, context=seal_context(helped.manifest, agent))
        masks.append(Mask(seed=mask_seed(seed, helped.manifest, agent), sign=-1))
    words = sum(helped.vectors.values(), start=np.zeros(helped.plan.n_words, "<u2"))
    MaskAdder(masks, word_bits=16).add(words)
    checks = check_words(helped.manifest.digest(), word_bits=16)
    payload = split_sum(words, checks, helped.plan, n_members=N_AGENTS)
    assert np.array_equal(payload, helped.total)


def test_a_seal_opens_for_its_upload_alone(helped: Helped) -> None:
    agent, other = helped.agents[0].identity, helped.agents[1].identity
    sealed = helped.uploads[0].sealed
    context = seal_context(helped.manifest, agent)
    assert helped.key.open(sealed, context=context) == helped.seeds[agent]
    next_round = helped.manifest.model_copy(update={"round": helped.manifest.round + 1})
    for wrong in (seal_context(helped.manifest, other), seal_context(next_round, agent)):
        with pytest.raises(ShareError):
            helped.key.open(sealed, context=wrong)
    with pytest.raises(ShareError):
        HelperKey(HelperKey.generate()).open(sealed, context=context)
    with pytest.raises(ShareError):
        helped.key.open(sealed[:-1] + bytes([sealed[-1] ^ 1]), context=context)


def test_two_seals_of_one_seed_differ_and_have_one_size(helped: Helped) -> None:
    context = seal_context(helped.manifest, helped.agents[0].identity)
    seals = {seal_seed(bytes(32), helped.own.helper_key, context=context) for _ in range(4)}
    assert len(seals) == 4
    assert {len(seal) for seal in seals} == {1168}


def test_a_key_is_read_as_it_was_written(helped: Helped) -> None:
    assert HelperKey(helped.key_bytes).public_bytes == helped.own.helper_key
    with pytest.raises(ValueError, match="96 bytes"):
        HelperKey(helped.key_bytes[:-1])


def test_guarantee_1_a_request_of_another_server_is_refused(helped: Helped) -> None:
    refused(helped, helped.request(signer=Signer.generate()), "not by the expected")


def test_guarantee_1_a_manifest_that_pins_another_helper_is_refused(helped: Helped) -> None:
    other = HelperDescription(helper=bytes(32), helper_key=helped.own.helper_key)
    with pytest.raises(MaskedMessageError, match="another helper"):
        check_helped(helped.request(), own=other)


def test_guarantee_1_an_identity_that_stands_twice_is_refused(helped: Helped) -> None:
    twice = (*helped.uploads, helped.upload(0, attempt=2))
    refused(helped, helped.request(uploads=twice), "each upload once")


def test_guarantee_1_a_list_that_leaves_an_upload_out_is_refused(helped: Helped) -> None:
    entries = [(u.header.body.agent, u.header.body.digest()) for u in helped.uploads[:-1]]
    refused(helped, helped.request(entries=sorted(entries)), "each upload once")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"round_digest": bytes(32)}, "another round"),
        ({"round": 77}, "another round"),
        ({"body_n_bytes": 5}, "another size"),
        ({"sealed_sha256": bytes(32)}, "another sealed seed"),
    ],
)
def test_guarantee_1_an_upload_that_contradicts_the_round_is_refused(
    helped: Helped, changes: dict[str, Any], says: str
) -> None:
    uploads = (helped.upload(0, **changes), *helped.uploads[1:])
    refused(helped, helped.request(uploads=uploads), says)


def test_guarantee_1_credentials_must_be_the_registrars_and_the_agents_own(helped: Helped) -> None:
    first, second = helped.agents[:2]
    for credential, says in (
        (helped.credential(second), "another's credential"),
        (helped.credential(first, federation=bytes([9]) * 16), "another's credential"),
        (
            helped.credential(first, expires_at=int(helped.manifest.opened_at) - 1),
            "expired credential",
        ),
    ):
        uploads = (helped.upload(0, credential=credential), *helped.uploads[1:])
        refused(helped, helped.request(uploads=uploads), says)
    forged = sign(Signer.generate(), "credential", helped.credential(first).body).signed
    uploads = (helped.upload(0, credential=forged), *helped.uploads[1:])
    refused(helped, helped.request(uploads=uploads), "not by the expected")


def test_guarantee_1_a_header_of_another_signature_is_refused(helped: Helped) -> None:
    mine, other = helped.uploads[0], helped.uploads[1]
    mixed = mine.header.model_copy(update={"signature": other.header.signature})
    uploads = (mine.model_copy(update={"header": mixed}), *helped.uploads[1:])
    refused(helped, helped.request(uploads=uploads), "does not hold")


def test_guarantee_2_fewer_uploads_than_the_smallest_cell_are_refused(helped: Helped) -> None:
    refused(helped, helped.request(uploads=tuple(helped.uploads[:4])), "at least 5")
    assert len(check_helped(helped.request(uploads=tuple(helped.uploads[:5])), own=helped.own)) == 1

"""What the agent checks by itself: every single fault is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_agent.chain import (
    check_change,
    check_credential,
    check_discovery,
    check_first_release,
    check_releases,
    check_round,
)
from edge_agent.errors import TrustError
from protocol.blocks import EvaluatorGate
from protocol.chain import BlobRef, EvaluatorVerdict, NoVerdict, Release
from protocol.gating import EvaluationReport
from protocol.layout import VectorLayout
from protocol.messages import Credential, Discovery
from protocol.signing import Invite, Signed, Signer, fingerprint, sign

NOTHING: dict[int, Release] = {}


def follow(manifest, last, signed, known=NOTHING) -> list[Release]:
    """`check_releases` of an agent that has verified what is known."""
    return check_releases(manifest, last, signed, earlier=known.get)


LAYOUT = VectorLayout.of_shapes({"a": (100,)})
Make = Callable[..., Any]


@pytest.fixture
def stranger() -> Signer:
    return Signer.from_private_bytes(bytes([9]) * 32)


# Discovery


def discovery(signer: Signer, manifest, *, name: str = "federation") -> Discovery:
    return Discovery(
        federation=sign(signer, name, manifest).signed, enrolment="open", server_time=1.0
    )


def test_a_manifest_signed_by_the_server_that_it_names_is_accepted(
    make_manifest: Make, server_key: Signer
) -> None:
    manifest = make_manifest()
    assert check_discovery(discovery(server_key, manifest), None) == manifest
    invite = Invite(code=bytes(16), server_fingerprint=fingerprint(server_key.identity))
    assert check_discovery(discovery(server_key, manifest), invite) == manifest


def test_a_manifest_signed_by_another_key_or_as_another_document_is_refused(
    make_manifest: Make, server_key: Signer, stranger: Signer
) -> None:
    manifest = make_manifest()
    faults = [
        discovery(stranger, manifest),
        discovery(server_key, manifest, name="round"),
        discovery(server_key, make_manifest(server=stranger.identity)),
    ]
    signed = discovery(server_key, manifest)
    other = signed.federation.model_copy(update={"body": make_manifest(name="Other")})
    faults.append(signed.model_copy(update={"federation": other}))
    for fault in faults:
        with pytest.raises(TrustError, match="federation document is refused"):
            check_discovery(fault, None)


def test_a_server_that_the_invite_is_not_for_is_refused(
    make_manifest: Make, stranger: Signer, server_key: Signer
) -> None:
    """Man in the middle: a whole federation under a key of the attacker's own."""
    theirs = make_manifest(server=stranger.identity, registrar=stranger.identity)
    invite = Invite(code=bytes(16), server_fingerprint=fingerprint(server_key.identity))
    with pytest.raises(TrustError, match="the invite is for another server"):
        check_discovery(discovery(stranger, theirs), invite)


# Credential


def test_the_registrars_word_for_this_agent_here_is_accepted_and_nothing_else(
    make_manifest: Make, server_key: Signer, agent_key: Signer, stranger: Signer
) -> None:
    manifest = make_manifest(registrar=server_key.identity)

    def credential(signer: Signer = server_key, name: str = "credential", **changes: Any):
        values = {
            "federation": manifest.federation,
            "agent": agent_key.identity,
            "expires_at": 2_000_000_000,
            **changes,
        }
        return sign(signer, name, Credential(**values)).signed

    check_credential(credential(), manifest, agent_key.identity)
    for fault in (
        credential(stranger),
        credential(agent_key),
        credential(name="enrolment"),
        credential(agent=stranger.identity),
        credential(federation=bytes(16)),
    ):
        with pytest.raises(TrustError):
            check_credential(fault, manifest, agent_key.identity)
    apart = make_manifest(registrar=stranger.identity, registrar_held_by_server=False)
    check_credential(credential(stranger), apart, agent_key.identity)
    with pytest.raises(TrustError):
        check_credential(credential(server_key), apart, agent_key.identity)


# Releases


@pytest.fixture
def chain(make_manifest: Make, make_release: Make, server_key: Signer):
    """Releases 0 to 3, signed."""
    manifest = make_manifest()
    releases = [make_release(manifest)]
    for _ in range(3):
        releases.append(make_release(manifest, after=releases[-1]))
    return manifest, [sign(server_key, "release", release).signed for release in releases]


def test_guarantee_1_a_whole_chain_is_accepted_in_pages(chain) -> None:
    manifest, signed = chain
    bodies = [item.body for item in signed]
    assert follow(manifest, None, signed) == bodies
    assert follow(manifest, bodies[1], signed[2:]) == bodies[2:]
    assert follow(manifest, bodies[3], []) == []
    assert check_first_release(manifest, signed) == bodies[0]
    with pytest.raises(TrustError, match="shows no release"):
        check_first_release(manifest, [])


@pytest.mark.parametrize(
    "order", [[1], [0, 2], [1, 0], [0, 0], [0, 1, 1], [0, 1, 3], [0, 1, 2, 3, 0]]
)
def test_guarantee_1_a_gap_a_repetition_or_another_order_is_refused(
    chain, order: list[int]
) -> None:
    manifest, signed = chain
    with pytest.raises(TrustError, match="does not continue it"):
        follow(manifest, None, [signed[i] for i in order])


def test_guarantee_1_going_back_is_refused(chain) -> None:
    """Rollback: a server that presents an older release as the newest."""
    manifest, signed = chain
    for back in (0, 1, 2):
        with pytest.raises(TrustError, match="does not continue it"):
            follow(manifest, signed[2].body, [signed[back]])


def test_guarantee_1_a_fork_is_refused(chain, make_release: Make, server_key: Signer) -> None:
    """Equivocation: the same number, signed by the server, with another history."""
    manifest, signed = chain
    blob = BlobRef(sha256=bytes([77]) * 32, n_bytes=100)
    other_first = make_release(manifest, adapter=blob, sent=blob)
    forked = make_release(manifest, after=other_first)
    with pytest.raises(TrustError, match="does not continue it"):
        follow(manifest, signed[0].body, [sign(server_key, "release", forked).signed])
    with pytest.raises(TrustError, match="does not continue it"):
        follow(manifest, None, [sign(server_key, "release", other_first).signed, signed[1]])


def test_guarantee_1_another_key_another_kind_or_another_federation_is_refused(
    chain, make_manifest: Make, make_release: Make, server_key: Signer, stranger: Signer
) -> None:
    manifest, signed = chain
    first = signed[0].body
    elsewhere = make_manifest(federation=bytes(16))
    renamed = make_manifest(name="Other")
    faults = [
        sign(stranger, "release", first).signed,
        sign(server_key, "round", first).signed,
        signed[0].model_copy(update={"body": make_release(manifest, created_at=1.0)}),
        sign(server_key, "release", make_release(elsewhere)).signed,
        sign(server_key, "release", make_release(renamed)).signed,
    ]
    for fault in faults:
        with pytest.raises(TrustError):
            follow(manifest, None, [fault])


def test_nothing_of_a_page_with_a_fault_is_accepted(chain, stranger: Signer) -> None:
    manifest, signed = chain
    page = [*signed[:3], sign(stranger, "release", signed[3].body).signed]
    with pytest.raises(TrustError):
        follow(manifest, None, page)


# Rounds


@pytest.fixture
def offered(chain, make_round: Make, server_key: Signer):
    manifest, signed = chain
    newest = signed[2].body

    def make(signer: Signer = server_key, name: str = "round", **changes: Any):
        return sign(signer, name, make_round(manifest, newest, **changes)).signed

    def check(item: Signed[Any], *, last_round: int = 2):
        return check_round(item, manifest, newest, LAYOUT.n_bytes, last_round=last_round)

    return make, check


def test_a_round_from_the_newest_release_is_accepted(offered) -> None:
    make, check = offered
    assert check(make()).round == 3
    assert check(make(round=9)).round == 9  # rounds that failed consume numbers


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"federation": bytes(16)}, "another federation"),
        ({"federation_digest": bytes(32)}, "another federation"),
        ({"round": 2}, "does not rise above 2"),
        ({"round": 1}, "does not rise above 2"),
        ({"release": 1}, "newest release, 2"),
        ({"release": 3}, "newest release, 2"),
        ({"release_digest": bytes(32)}, "newest release, 2"),
        ({"sent": BlobRef(sha256=bytes(32), n_bytes=100)}, "newest release, 2"),
        ({"sent": BlobRef(sha256=bytes([2]) * 32, n_bytes=101)}, "newest release, 2"),
        ({"update_n_bytes": 404}, "asks for 404 bytes, the layout has 400"),
        ({"update_n_bytes": 396}, "asks for 396 bytes, the layout has 400"),
    ],
)
def test_a_round_with_a_single_fault_is_refused(offered, change, says: str) -> None:
    make, check = offered
    with pytest.raises(TrustError, match=says):
        check(make(**change))


def test_a_round_of_another_key_or_kind_is_refused(offered, stranger: Signer) -> None:
    make, check = offered
    for fault in (make(stranger), make(name="release")):
        with pytest.raises(TrustError, match="round document is refused"):
            check(fault)
    altered = make().model_copy(update={"body": make(cohort_size=9).body})
    with pytest.raises(TrustError):
        check(altered)


# Check 17


def arrays(value: float, n: int = 4) -> dict[str, np.ndarray]:
    return {"a": np.full(n, value, np.float32), "b": np.zeros(2, np.float32)}


@pytest.mark.parametrize(
    ("value", "n_releases", "accepted"),
    [(0.0, 1, True), (0.5, 1, True), (0.5001, 1, False), (0.9999, 2, True), (1.001, 2, False)],
)
def test_an_adapter_may_move_by_the_limit_for_each_release(
    value: float, n_releases: int, *, accepted: bool
) -> None:
    def check() -> None:
        check_change(arrays(0.0), arrays(value), max_tensor_change_norm=1.0, n_releases=n_releases)

    if accepted:
        check()
    else:
        with pytest.raises(TrustError, match=r"changed 'a' by .* above the limit"):
            check()


def test_one_tensor_that_moves_too_far_is_enough() -> None:
    after = arrays(0.0)
    after["b"] = np.array([0.0, -3.0], np.float32)
    with pytest.raises(TrustError, match="'b' by 3"):
        check_change(arrays(0.0), after, max_tensor_change_norm=2.0, n_releases=1)


def test_a_change_that_float32_cannot_hold_is_refused_without_a_fault() -> None:
    largest = float(np.finfo(np.float32).max)
    with pytest.raises(TrustError, match="above the limit"):
        check_change(arrays(-largest), arrays(largest), max_tensor_change_norm=1e30, n_releases=1)


# The gate


GATE = EvaluatorGate(
    evaluator=Signer.from_private_bytes(bytes([7]) * 32).identity,
    max_loss_increase=0.1,
    max_category_loss_increase=0.5,
)


@pytest.fixture
def gated(make_manifest: Make, make_release: Make, server_key: Signer):
    """Checks a release 1 with a report of the evaluator's, changed as the test says."""
    manifest = make_manifest(gate=GATE)
    first = make_release(manifest)

    def check(*, key: int = 7, name: str = "evaluation", verdict=None, **changes: Any) -> None:
        release = make_release(manifest, after=first)
        fields = {
            "federation": manifest.federation,
            "round": release.round,
            "task": bytes(32),
            "evaluator": GATE.evaluator,
            "data": bytes(32),
            "current": first.adapter.sha256,
            "candidates": (bytes(32), release.adapter.sha256),
            "categories": ("closed_qa", "open_qa"),
            "n_records": (4, 5),
            "losses": ((2.0, 3.0), (9.0, 9.0), (1.5, 3.4)),
        }
        report = EvaluationReport(**{**fields, **changes})
        signer = Signer.from_private_bytes(bytes([key]) * 32)
        own = EvaluatorVerdict(report=sign(signer, name, report).signed, n_left_out=0)
        release = release.model_copy(update={"verdict": verdict or own})
        signed = [sign(server_key, "release", item).signed for item in (first, release)]
        assert follow(manifest, None, signed) == [first, release]

    return check


def test_guarantee_3_a_release_that_the_evaluator_signed_for_is_accepted(gated) -> None:
    gated()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"verdict": NoVerdict()}, "has no report"),
        ({"key": 8}, "is refused"),
        ({"name": "release"}, "is refused"),
        ({"candidates": (bytes(32), bytes([9]) * 32)}, "on something else"),
        ({"federation": bytes([9]) * 16}, "on something else"),
        ({"round": 7}, "on something else"),
        ({"losses": ((2.0, 3.0), (1.0, 1.0), (2.1, 3.2))}, "averaged over 2 categories"),
        ({"losses": ((2.0, 3.0), (1.0, 1.0), (1.0, 3.6))}, "its loss on 'open_qa' rises"),
        ({"losses": ((2.0, 3.0), (1.0, 1.0), (1.0, None))}, "not finite"),
    ],
)
def test_guarantee_3_any_other_release_of_a_gated_federation_is_refused(
    gated, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(TrustError, match=says):
        gated(**changes)


# Rollbacks


def test_guarantee_2_a_rollback_is_an_earlier_adapter_and_needs_no_evaluator(
    make_manifest: Make, make_release: Make, server_key: Signer
) -> None:
    def sign_all(*releases) -> list[Signed]:
        return [sign(server_key, "release", release).signed for release in releases]

    for manifest in (make_manifest(), make_manifest(gate=GATE)):
        first = make_release(manifest)
        again = {"round": 0, "round_digest": None, "rolled_back_to": 0, "adapter": first.adapter}
        back = make_release(manifest, after=first, **again)
        assert follow(manifest, None, sign_all(first, back)) == [first, back]
        assert follow(manifest, first, sign_all(back), {0: first}) == [back]
        other = BlobRef(sha256=bytes([9]) * 32, n_bytes=100)
        for lie in ({"adapter": other}, {"rolled_back_to": None}):
            release = make_release(manifest, after=first, **{**again, **lie})
            with pytest.raises(TrustError, match="comes from no round"):
                follow(manifest, None, sign_all(first, release))
        with pytest.raises(TrustError, match="comes from no round"):
            follow(manifest, first, sign_all(back))

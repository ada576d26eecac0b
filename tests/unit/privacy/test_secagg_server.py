"""A cell with hostile members: who is refused, who is named, and what the server never learns."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from privacy.errors import MaskedMessageError, SumError
from privacy.masking import Mask, MaskAdder, expand
from privacy.secagg import derive
from privacy.secagg import server as server_module
from privacy.secagg.agent import SecAggAgent
from privacy.secagg.server import CellServer, UnrecoverableError
from privacy.shares import PRIME, Rebuilder, split
from protocol.masked import MISSING_SHARE, Complaint
from protocol.signing import Signed, sign
from protocol.wire import sha256


def line(constant: int, n_shares: int, *, threshold: int, slope: int = 7) -> list[bytes]:
    """Shares of any constant, also of one that is no secret."""
    return [
        ((constant + slope * x ** (threshold - 1)) % PRIME).to_bytes(33, "big")
        for x in range(1, n_shares + 1)
    ]


def honest_shares(cell: Any, secret: bytes, make_entropy: Any) -> list[bytes]:
    return list(
        split(
            secret,
            n_shares=len(cell.agents),
            threshold=cell.threshold,
            entropy=make_entropy("shares of a cheat"),
        )
    )


def play_on(cell: Any, *, gone: Iterable[int], silent: Iterable[int] = ()) -> None:
    """From SHARING to the end: `gone` do not upload, `silent` do not reveal."""
    everyone = range(len(cell.agents))
    alive = [i for i in everyone if i not in set(gone)]
    cell.server.close_sharing()
    cell.mask()
    cell.upload(alive)
    cell.server.close_uploading()
    cell.confirm(alive)
    cell.reveal([i for i in alive if i not in set(silent)])


# The sum


def test_every_set_of_survivors_and_of_revealers_gives_its_sum(make_cell: Any) -> None:
    # Guarantee 2: all of 2^6 sets, as far as t = 4 allows; fewer revealers give nothing.
    cell = make_cell(6).up_to("mask")
    states, shares = [agent.state for agent in cell.agents], dict(cell.server.shares)
    n_sums = 0
    for n_alive in (4, 5, 6):
        for alive in itertools.combinations(range(6), n_alive):
            cell.server = cell.make_server()
            cell.server.shares.update(shares)
            cell.server.close_sharing()
            for agent, state in zip(cell.agents, states, strict=True):
                agent.state = state
            cell.upload(alive)
            cell.server.close_uploading()
            cell.confirm(alive)
            cell.reveal(alive)
            reveals, expected = dict(cell.server.reveals), cell.plain_sum(alive)
            for n_revealed in range(n_alive + 1):
                for revealed in itertools.combinations(alive, n_revealed):
                    cell.server.reveals = {cell.ids[i]: reveals[cell.ids[i]] for i in revealed}
                    if n_revealed < 4:
                        assert cell.server.recover() is None
                        continue
                    recovery = cell.server.recover()
                    assert recovery.blamed == ()
                    assert recovery.survivors == tuple(cell.ids[i] for i in alive)
                    assert np.array_equal(cell.unmasked(), expected)
                    n_sums += 1
    assert n_sums == 15 + 6 * (5 + 1) + (15 + 6 + 1)


def test_messages_in_any_order_give_the_same_cell(make_cell: Any) -> None:
    cell = make_cell(6).up_to("reveal", gone=[2])
    first = cell.server
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 71):
        other = cell.make_server()
        for name in ("shares", "uploads", "confirms", "reveals"):
            messages = getattr(first, name)
            for i in order:
                if cell.ids[i] in messages:
                    getattr(other, name)[cell.ids[i]] = messages[cell.ids[i]]
        assert other.close_sharing() == tuple(cell.ids)
        assert other.bundle_hash() == first.bundle_hash()
        other.close_uploading()
        assert other.survivors() == first.survivors()
        assert other.confirmed() == first.confirmed()
        assert other.recover().masks == first.recover().masks


def test_two_manifests_for_one_round_give_no_sum(make_cell: Any) -> None:
    # Members masked under another T2 do not cancel, which the check words show.
    cell = make_cell(6).up_to("reveal")
    other = make_cell(6, seed="other").up_to("mask")
    cell.bodies[3] = other.masked(3)
    with pytest.raises(SumError, match="check words"):
        cell.unmasked()


# What is never learnt


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """All that a server rebuilds and derives from secrets."""
    found: dict[str, list[Any]] = {"rebuilt": [], "self": [], "keys": []}
    rebuild = CellServer._rebuild

    def spied(self: Any, dealer: bytes, kind: Any, *rest: Any) -> Any:
        found["rebuilt"].append((dealer, kind.value))
        return rebuild(self, dealer, kind, *rest)

    class FakeDerive:
        def __getattr__(self, name: str) -> Any:
            return getattr(derive, name)

        def self_mask_seed(self, seed: bytes, bundle: bytes, agent: bytes) -> bytes:
            found["self"].append((seed, agent))
            return derive.self_mask_seed(seed, bundle, agent)

        def agree(self, private_key: bytes, public_key: bytes) -> bytes:
            found["keys"].append(private_key)
            return derive.agree(private_key, public_key)

    monkeypatch.setattr(CellServer, "_rebuild", spied)
    monkeypatch.setattr(server_module, "derive", FakeDerive())
    return found


def test_no_survivors_mask_key_is_rebuilt_nor_the_seed_of_who_is_gone(
    make_cell: Any, derived: dict[str, list[Any]]
) -> None:
    # Guarantee 3: member 1 and 4 are gone, 6 survives and vanishes before its REVEAL.
    cell = make_cell(10)
    cell.share()
    play_on(cell, gone=[1, 4], silent=[6])
    assert cell.server.recover() is not None
    survivors = [i for i in range(10) if i not in (1, 4)]
    assert sorted(derived["rebuilt"]) == sorted(
        [(cell.ids[6], "self"), (cell.ids[1], "mask"), (cell.ids[4], "mask")]
    )
    assert {seed for seed, _ in derived["self"]} == {
        cell.agents[i].state.self_seed for i in survivors
    }
    assert [agent for _, agent in derived["self"]] == [cell.ids[i] for i in survivors]
    assert set(derived["keys"]) == {cell.agents[i].state.masking_private_key for i in (1, 4)}


@pytest.mark.parametrize("revealers", [range(5), [0, 1, 2, 3]])
def test_a_late_upload_stays_hidden(revealers: Iterable[int], make_cell: Any) -> None:
    # Member 5 uploads after SURVIVORS. Its mask key is rebuilt, so all its pair masks are known;
    # its own mask is not, and hides the whole vector.
    cell = make_cell(6)
    cell.share()
    cell.server.close_sharing()
    cell.mask()
    cell.upload(range(5))
    assert cell.server.close_uploading() == tuple(cell.ids[:5])
    late, words = cell.ids[5], cell.masked(5)
    header = cell.agents[5].sign_upload(sha256(words.tobytes()))
    cell.server.uploads[late] = header
    assert late not in dict(cell.server.survivor_entries())
    cell.confirm(range(5))
    cell.reveal(revealers)
    assert np.array_equal(cell.unmasked(), cell.plain_sum(range(5)))

    # All that the cell ever told the server about member 5:
    of_self, of_mask = [], {}
    for agent, reveal in cell.server.reveals.items():
        of_self += [share for dealer, share in reveal.body.self_shares if dealer == late]
        of_self += [reveal.body.self_seed] if reveal.body.agent == late else []
        for dealer, share in reveal.body.mask_shares:
            assert dealer == late
            of_mask[cell.ids.index(agent) + 1] = share
    assert of_self == []
    places = sorted(of_mask)[: cell.threshold]
    key = Rebuilder(places).secret([of_mask[x] for x in places])
    assert key == cell.agents[5].state.masking_private_key

    t2 = cell.server.bundle_hash()
    pair_masks = []
    for other in cell.ids[:5]:
        secret = derive.agree(key, cell.server.cell.readies[other].masking_key)
        seed = derive.pair_seed(secret, t2, other, late)
        pair_masks.append(Mask(seed=seed, sign=derive.pair_sign(other, late)))
    checks = derive.check_words(t2, word_bits=16)
    positions = list(cell.plan.check_positions())
    plain = np.empty_like(words)
    plain[positions] = checks
    plain[np.delete(np.arange(len(plain)), positions)] = cell.payload(5)
    for n_removed in range(len(pair_masks) + 1):
        for removed in itertools.combinations(pair_masks, n_removed):
            left = words.copy()
            MaskAdder(removed, word_bits=16).add(left)
            assert (left == plain).mean() < 0.2
            assert not np.array_equal(left[positions], checks)
    # What is left is the one mask that nobody can remove.
    own = derive.self_mask_seed(cell.agents[5].state.self_seed, t2, late)
    assert np.array_equal(left - plain, expand(own, len(left), word_bits=16))


def test_a_survivor_is_hidden_by_each_other_survivor(make_cell: Any) -> None:
    # With all seeds b revealed and c members' keys in hand, one honest pair mask still hides it.
    cell = make_cell(6).up_to("reveal")
    t2 = cell.server.bundle_hash()
    words = cell.bodies[0].copy()
    known = [
        Mask(seed=derive.self_mask_seed(cell.agents[0].state.self_seed, t2, cell.ids[0]), sign=-1)
    ]
    for i in range(1, 5):  # four members collude, member 5 does not
        secret = derive.agree(
            cell.agents[i].state.masking_private_key, cell.readies[0].body.masking_key
        )
        seed = derive.pair_seed(secret, t2, cell.ids[0], cell.ids[i])
        known.append(Mask(seed=seed, sign=derive.pair_sign(cell.ids[i], cell.ids[0])))
    MaskAdder(known, word_bits=16).add(words)
    payload = np.delete(words, list(cell.plan.check_positions()))
    assert (payload == cell.payload(0)).mean() < 0.2


# SHARES


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"transcript": bytes(32)}, "another cell"),
        ({"self_shares": (bytes(32),) * 4}, "5 members"),
        ({"self_shares": (bytes(32),) * 6}, "5 members"),
        ({"mask_shares": ()}, "5 members"),
        ({"ciphertexts": (bytes(32),) * 4}, "5 members"),
        ({"ciphertexts": (bytes(32),) * 5}, "digests"),
    ],
    ids=["cell", "fewer", "more", "none", "fewer ciphertexts", "other ciphertexts"],
)
def test_shares_that_contradict_the_cell_are_refused(
    change: dict[str, Any], says: str, make_cell: Any
) -> None:
    cell = make_cell(6)
    with pytest.raises(MaskedMessageError, match=says):
        cell.server.check_shares(cell.deal(2, **change))


@pytest.mark.parametrize("n_ciphertexts", [0, 4, 6])
def test_ciphertexts_left_out_or_added_are_refused(n_ciphertexts: int, make_cell: Any) -> None:
    cell = make_cell(6)
    shares = cell.deal(2)
    given = (*shares.ciphertexts, bytes(82))[:n_ciphertexts]
    with pytest.raises(MaskedMessageError, match="5 members"):
        cell.server.check_shares(shares.model_copy(update={"ciphertexts": given}))


def test_swapped_ciphertexts_are_refused(make_cell: Any) -> None:
    cell = make_cell(6)
    shares = cell.deal(2)
    first, second, *rest = shares.ciphertexts
    swapped = shares.model_copy(update={"ciphertexts": (second, first, *rest)})
    with pytest.raises(MaskedMessageError, match="digests"):
        cell.server.check_shares(swapped)


def test_shares_of_a_stranger_are_refused(make_cell: Any, make_key: Any) -> None:
    cell = make_cell(6)
    stranger = make_key("a stranger")
    shares = cell.deal(2, agent=stranger.identity)
    header = sign(stranger, "shares", shares.header.body).signed
    with pytest.raises(MaskedMessageError, match="not a member"):
        cell.server.check_shares(shares.model_copy(update={"header": header}))


def test_fewer_than_t_dealers_are_no_cell(make_cell: Any) -> None:
    cell = make_cell(6)
    cell.share(range(3))
    with pytest.raises(MaskedMessageError, match="3 members shared; at least 4 must"):
        cell.server.close_sharing()
    with pytest.raises(MaskedMessageError, match="waits for shares"):
        cell.server.bundle_hash()
    cell.share([3])
    assert cell.server.close_sharing() == tuple(cell.ids[:4])


def test_who_shares_late_is_in_no_bundle(make_cell: Any) -> None:
    cell = make_cell(6)
    cell.share(range(5))
    cell.server.close_sharing()
    t2 = cell.server.bundle_hash()
    cell.share([5])
    assert cell.server.bundle_hash() == t2
    assert cell.server.bundle_for(cell.ids[5]) is None
    assert cell.ids[5] not in dict(cell.bundle(0).entries())
    cell.mask(range(5))
    cell.upload(range(5))
    body = cell.agents[0].state.upload.body.model_copy(update={"agent": cell.ids[5]})
    header = sign(cell.agents[5]._signer, "masked-upload", body).signed
    with pytest.raises(MaskedMessageError, match="shared nothing in time"):
        cell.server.check_upload(header)


# Signatures


def test_messages_that_their_senders_did_not_sign_are_refused(
    make_cell: Any, make_key: Any
) -> None:
    cell = make_cell(6)
    cell.share_badly(5, unopenable=[0])
    cell.share(range(5))
    play_on(cell, gone=[4])
    forger = make_key("a forger")
    server = cell.server
    shares = server.shares[cell.ids[0]]
    (complaint,) = cell.agents[0].state.complaints
    checks: list[tuple[str, Any, Callable[[Any], None]]] = [
        (
            "shares",
            shares.header,
            lambda header: server.check_shares(shares.model_copy(update={"header": header})),
        ),
        ("masked-upload", server.uploads[cell.ids[0]], server.check_upload),
        ("reveal", server.reveals[cell.ids[0]], server.check_reveal),
        ("complaint", complaint, server.check_complaint),
    ]
    for name, good, check in checks:
        check(good)
        forged = sign(forger, name, good.body).signed
        other_kind = sign(cell.agents[0]._signer, "ready", good.body).signed
        for bad in (forged, forged.model_copy(update={"key": good.key}), other_kind):
            with pytest.raises(MaskedMessageError, match="sign"):
                check(bad)
    confirm = server.confirms[cell.ids[0]]
    server.check_confirm(confirm)
    with pytest.raises(MaskedMessageError, match="another U3"):
        server.check_confirm(
            confirm.model_copy(update={"signature": server.confirms[cell.ids[1]].signature})
        )


def test_messages_of_another_cell_are_refused(make_cell: Any) -> None:
    cell = make_cell(6).up_to("reveal", gone=[4])
    server, signer = cell.server, cell.agents[0]._signer
    other = {"transcript": bytes(32)}
    upload = server.uploads[cell.ids[0]].body.model_copy(update=other)
    reveal = server.reveals[cell.ids[0]].body.model_copy(update=other)
    with pytest.raises(MaskedMessageError, match="another cell"):
        server.check_upload(sign(signer, "masked-upload", upload).signed)
    with pytest.raises(MaskedMessageError, match="another cell"):
        server.check_reveal(sign(signer, "reveal", reveal).signed)
    with pytest.raises(MaskedMessageError, match="another cell"):
        server.check_confirm(server.confirms[cell.ids[0]].model_copy(update=other))


# Complaints


@pytest.fixture
def accused(make_cell: Any) -> Any:
    """Ten members, t = 7, c = 2. Member 9 gives 0 to 3 what does not open."""
    cell = make_cell(10)
    cell.share_badly(9, unopenable=range(4))
    cell.share(range(9))
    cell.server.close_sharing()
    cell.mask()
    return cell


def complain(cell: Any, who: Iterable[int]) -> None:
    for i in who:
        (complaint,) = cell.agents[i].state.complaints
        cell.server.check_complaint(complaint)
        cell.server.complaints[complaint.body.agent, complaint.body.dealer.body.agent] = complaint


@pytest.mark.parametrize(
    ("n_accusers", "guilty", "hopeless"),
    [(0, False, False), (2, False, False), (3, True, True), (4, True, True)],
)
def test_a_dealer_is_guilty_when_more_complain_than_could_lie(
    n_accusers: int, guilty: bool, hopeless: bool, accused: Any
) -> None:
    # Nine hold a share of member 9: with three complaints six are left, fewer than t.
    complain(accused, range(n_accusers))
    dealer = (accused.ids[9],)
    assert accused.server.guilty_dealers() == (dealer if guilty else ())
    assert accused.server.hopeless_dealers() == (dealer if hopeless else ())


def test_colluders_alone_cannot_make_a_dealer_guilty(accused: Any) -> None:
    for i in (4, 5):  # c = 2: they hold good shares, and lie
        complaint = false_complaint(accused, i, 0)
        accused.server.check_complaint(complaint)
        accused.server.complaints[accused.ids[i], accused.ids[0]] = complaint
    assert accused.server.guilty_dealers() == ()
    assert accused.server.hopeless_dealers() == ()


def test_a_dealer_of_whom_nobody_complains_is_not_hopeless(make_cell: Any) -> None:
    # Four of six shared: three others hold shares of each, fewer than t, and all may still go well.
    cell = make_cell(6)
    cell.share(range(4))
    cell.server.close_sharing()
    assert cell.server.hopeless_dealers() == ()


def false_complaint(cell: Any, i: int, of: int, **changes: Any) -> Signed[Complaint]:
    """Member i complains of a dealer who gave it good shares."""
    bundle = cell.bundle(i)
    others = [j for j in range(len(cell.agents)) if j != i]
    body = Complaint(
        transcript=bundle.transcript,
        agent=cell.ids[i],
        dealer=bundle.headers[of],
        ciphertext=bundle.ciphertexts[others.index(of)],
    ).model_copy(update=changes)
    return sign(cell.agents[i]._signer, "complaint", body).signed


def test_a_complaint_over_a_ciphertext_that_the_dealer_did_not_sign_is_refused(
    accused: Any,
) -> None:
    # It would blame the dealer for what happened on the way.
    for ciphertext in (bytes([1]) * 82, accused.bundle(5).ciphertexts[0]):
        complaint = false_complaint(accused, 4, 0, ciphertext=ciphertext)
        with pytest.raises(MaskedMessageError, match="did not sign"):
            accused.server.check_complaint(complaint)


def test_a_complaint_over_a_header_that_the_dealer_did_not_send_is_refused(accused: Any) -> None:
    other = accused.deal(0).header  # signed, and never sent
    forged = accused.bundle(4).headers[0].model_copy(update={"signature": bytes(64)})
    for header in (other, forged):
        complaint = false_complaint(accused, 4, 0, dealer=header)
        with pytest.raises(MaskedMessageError, match="did not send"):
            accused.server.check_complaint(complaint)


def test_a_complaint_of_oneself_or_of_a_stranger_is_refused(accused: Any, make_key: Any) -> None:
    own = accused.bundle(4).headers[4]
    with pytest.raises(MaskedMessageError, match="did not send"):
        accused.server.check_complaint(false_complaint(accused, 4, 0, dealer=own))
    stranger = make_key("a stranger")
    body = own.body.model_copy(update={"agent": stranger.identity})
    unknown = sign(stranger, "shares", body).signed
    with pytest.raises(MaskedMessageError, match="did not send"):
        accused.server.check_complaint(false_complaint(accused, 4, 0, dealer=unknown))
    complaint = false_complaint(accused, 4, 0, agent=stranger.identity)
    with pytest.raises(MaskedMessageError, match="not a member"):
        accused.server.check_complaint(complaint)
    complaint = false_complaint(accused, 4, 0, transcript=bytes(32))
    with pytest.raises(MaskedMessageError, match="another cell"):
        accused.server.check_complaint(complaint)


def test_a_complaint_of_who_shared_too_late_ends_nothing(make_cell: Any) -> None:
    # Member 5 shared after U2 was fixed: nobody masks with it, whatever a friend of it says.
    cell = make_cell(6)
    cell.share(range(5))
    cell.server.close_sharing()
    cell.share([5])
    late = cell.server.shares[cell.ids[5]]
    place = cell.server.cell.place(cell.ids[5], cell.ids[0])
    body = Complaint(
        transcript=late.header.body.transcript,
        agent=cell.ids[0],
        dealer=late.header,
        ciphertext=late.ciphertexts[place],
    )
    complaint = sign(cell.agents[0]._signer, "complaint", body).signed
    try:
        cell.server.check_complaint(complaint)
    except MaskedMessageError:
        return
    cell.server.complaints[cell.ids[0], cell.ids[5]] = complaint
    assert cell.server.hopeless_dealers() == ()


# UPLOAD


def test_uploads_that_contradict_the_cell_are_refused(make_cell: Any) -> None:
    cell = make_cell(6).up_to("upload")
    for change, says in (
        ({"bundle": bytes(32)}, "other members"),
        ({"body_n_bytes": cell.plan.n_bytes + 1}, "body_n_bytes"),
    ):
        body = cell.agents[0].state.upload.body.model_copy(update=change)
        with pytest.raises(MaskedMessageError, match=says):
            cell.server.check_upload(sign(cell.agents[0]._signer, "masked-upload", body).signed)


def test_fewer_than_t_survivors_are_no_cell(make_cell: Any) -> None:
    cell = make_cell(6).up_to("mask")
    cell.upload(range(3))
    with pytest.raises(MaskedMessageError, match="3 members uploaded; at least 4 must"):
        cell.server.close_uploading()
    with pytest.raises(MaskedMessageError, match="waits for uploads"):
        cell.server.survivors()


def test_a_cell_resumes_from_the_journal_with_the_members_it_names(make_cell: Any) -> None:
    # More messages may lie in the journal than were counted when a stage was closed.
    cell = make_cell(6).up_to("upload")
    later = cell.make_server()
    later.shares.update(cell.server.shares)
    later.uploads.update(cell.server.uploads)
    assert later.close_sharing(tuple(cell.ids)) == tuple(cell.ids)
    assert later.close_uploading(tuple(cell.ids[:4])) == tuple(cell.ids[:4])
    assert [identity for identity, _ in later.survivor_entries()] == cell.ids[:4]
    with pytest.raises(MaskedMessageError, match="at least 4"):
        later.close_sharing(tuple(cell.ids[:3]))
    with pytest.raises(MaskedMessageError, match="at least 4"):
        later.close_uploading(tuple(cell.ids[:3]))


# CONFIRM


def test_confirms_that_contradict_the_cell_are_refused(make_cell: Any, make_key: Any) -> None:
    cell = make_cell(6).up_to("close-uploading", gone=[5])
    good = cell.agents[0].receive_survivors(cell.survivors())
    message = derive.confirm_hash(cell.server.bundle_hash(), cell.server.survivor_entries())
    dropped = good.model_copy(
        update={
            "agent": cell.ids[5],
            "signature": cell.agents[5]._signer.sign_bytes(message),
        }
    )
    with pytest.raises(MaskedMessageError, match="not among the survivors"):
        cell.server.check_confirm(dropped)
    stranger = make_key("a stranger").identity
    with pytest.raises(MaskedMessageError, match="not a member"):
        cell.server.check_confirm(good.model_copy(update={"agent": stranger}))
    fewer = cell.server.survivor_entries()[:4]
    other = derive.confirm_hash(cell.server.bundle_hash(), fewer)
    signature = cell.agents[0]._signer.sign_bytes(other)
    with pytest.raises(MaskedMessageError, match="another U3"):
        cell.server.check_confirm(good.model_copy(update={"signature": signature}))


def test_fewer_than_t_confirms_are_not_shown(make_cell: Any) -> None:
    cell = make_cell(6).up_to("close-uploading")
    for i in range(6):
        assert (cell.server.confirmed() is not None) is (i >= 4)
        cell.confirm([i])


# REVEAL


def test_reveals_of_the_wrong_kind_are_refused(make_cell: Any) -> None:
    # Member 5 is gone: a self share of it is what must not be known, or a survivor's mask share.
    cell = make_cell(6).up_to("confirm", gone=[5])
    body = cell.agents[0].receive_confirmed(cell.confirmed()).body
    share = body.mask_shares[0][1]
    for changes in (
        {"self_shares": (*body.self_shares, (cell.ids[5], share)), "mask_shares": ()},
        {"self_shares": (*body.self_shares, (cell.ids[5], share))},
        {"self_shares": body.self_shares[1:], "mask_shares": ((cell.ids[1], share),)},
        {"mask_shares": (*body.mask_shares, *body.mask_shares)},
        {"mask_shares": ()},
        {"self_shares": body.self_shares[:-1]},
        {"self_shares": body.self_shares[::-1]},
        {"self_shares": ((cell.ids[0], share), *body.self_shares)},
    ):
        with pytest.raises(MaskedMessageError, match="a self share of each other survivor"):
            cell.server.check_reveal(cell.false_reveal(0, **changes))


def test_a_self_seed_other_than_the_committed_one_is_refused(make_cell: Any) -> None:
    # With another b the sum would keep the member's own mask.
    cell = make_cell(6).up_to("confirm")
    for seed in (bytes(32), cell.agents[1].state.self_seed):
        with pytest.raises(MaskedMessageError, match="committed"):
            cell.server.check_reveal(cell.false_reveal(0, self_seed=seed))


def test_a_commitment_to_another_seed_is_found_at_the_reveal(make_cell: Any) -> None:
    cell = make_cell(6)
    transcript = cell.roster.body.transcript()
    other = derive.commitment(transcript, cell.ids[5], bytes(32))
    cell.share_badly(5, commitment=other)
    cell.share(range(5))
    play_on(cell, gone=[], silent=[5])
    with pytest.raises(MaskedMessageError, match="committed"):
        cell.reveal([5])
    # b is rebuilt then, and is not what was committed to either: no sum with a wrong mask.
    assert cell.server.recover() is None


def test_a_commitment_of_another_member_or_cell_does_not_hold(make_cell: Any) -> None:
    # A copied commitment does not bind the copier, who cannot open it.
    transcript, seed = bytes(32), bytes(range(32))
    for other in (
        derive.commitment(transcript, b"\1" * 32, seed),
        derive.commitment(b"\1" * 32, b"\2" * 32, seed),
        derive.commitment(transcript, b"\2" * 32, bytes(32)),
    ):
        assert other != derive.commitment(transcript, b"\2" * 32, seed)


def test_a_reveal_of_who_did_not_survive_is_refused(make_cell: Any) -> None:
    cell = make_cell(6).up_to("reveal", gone=[5])
    body = cell.agents[0].state.reveal.body.model_copy(
        update={"agent": cell.ids[5], "self_seed": cell.agents[5].state.self_seed}
    )
    with pytest.raises(MaskedMessageError, match="not among the survivors"):
        cell.server.check_reveal(sign(cell.agents[5]._signer, "reveal", body).signed)


# Wrong shares, by who reveals them


def lie(cell: Any, i: int, dealer: int, *, share: bytes = bytes(33)) -> None:
    """Member i reveals another share of a dealer than it was given."""
    body = cell.agents[i].receive_confirmed(cell.confirmed()).body

    def changed(given: Any) -> Any:
        return tuple((d, share if d == cell.ids[dealer] else s) for d, s in given)

    reveal = cell.false_reveal(
        i, self_shares=changed(body.self_shares), mask_shares=changed(body.mask_shares)
    )
    cell.add_reveal(reveal)


@pytest.mark.parametrize("liar", [0, 2, 4])
def test_a_wrong_mask_share_names_who_reveals_it_and_the_sum_is_right(
    liar: int, make_cell: Any
) -> None:
    cell = make_cell(6).up_to("confirm", gone=[5])
    lie(cell, liar, 5)
    cell.reveal(i for i in range(5) if i != liar)
    blamed = cell.server.recover().blamed
    # Only as many shares are looked at as are needed: the last member's may not be among them.
    assert blamed == (() if liar == 4 else (cell.ids[liar],))
    assert np.array_equal(cell.unmasked(), cell.plain_sum(range(5)))


@pytest.mark.parametrize("liar", [0, 2])
def test_a_wrong_self_share_names_who_reveals_it_and_the_sum_is_right(
    liar: int, make_cell: Any
) -> None:
    cell = make_cell(6).up_to("confirm")
    lie(cell, liar, 5)
    cell.reveal(i for i in range(5) if i != liar)
    assert cell.server.recover().blamed == (cell.ids[liar],)
    assert np.array_equal(cell.unmasked(), cell.plain_sum(range(6)))


def test_a_share_of_another_kind_or_member_is_a_wrong_one(make_cell: Any) -> None:
    # Each is a good share, of something else: the digest binds kind, dealer and receiver.
    cell = make_cell(10).up_to("confirm", gone=[9])
    given = {received.dealer: received for received in cell.agents[0].state.received}
    for_1 = {received.dealer: received for received in cell.agents[1].state.received}
    wrong = (
        given[cell.ids[9]].self_share,
        given[cell.ids[8]].mask_share,
        for_1[cell.ids[9]].mask_share,
    )
    cell.reveal(range(1, 9))
    for share in wrong:
        lie(cell, 0, 9, share=share)
        assert cell.server.recover().blamed == (cell.ids[0],)


def test_a_share_that_is_said_to_be_missing_blames_nobody(make_cell: Any) -> None:
    cell = make_cell(6).up_to("confirm", gone=[5])
    lie(cell, 0, 5, share=MISSING_SHARE)
    cell.reveal(range(1, 5))
    assert cell.server.recover().blamed == ()
    assert np.array_equal(cell.unmasked(), cell.plain_sum(range(5)))


def test_more_reveals_may_still_help_where_shares_are_wrong(make_cell: Any) -> None:
    cell = make_cell(6).up_to("confirm", gone=[5])
    lie(cell, 0, 5)
    cell.reveal([1, 2, 3])
    assert cell.server.recover() is None
    cell.reveal([4])
    assert cell.server.recover() is not None


@pytest.mark.parametrize("share", [bytes(33), MISSING_SHARE], ids=["wrong", "missing"])
def test_a_liar_who_spoils_a_cell_cannot_blame_who_dropped_out(
    share: bytes, make_cell: Any
) -> None:
    # Five members, t = 4, c = 1; the fifth drops out, as anybody may. One liar leaves three shares.
    # PROTOCOL: a revealed share that does not match its digest names its responder. That one is
    # missing is the word of a single member, which no dealer can disprove.
    cell = make_cell(5).up_to("confirm", gone=[4])
    lie(cell, 0, 4, share=share)
    cell.reveal([1, 2, 3])
    with pytest.raises(UnrecoverableError) as caught:
        cell.server.recover()
    assert cell.ids[4] not in caught.value.blamed
    if share != MISSING_SHARE:
        assert caught.value.blamed == (cell.ids[0],)


def test_coefficients_are_computed_once_for_each_set_of_responders(
    make_cell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two mask keys and a self seed are rebuilt from the shares of the same seven members.
    made = []

    class CountingRebuilder(Rebuilder):
        def __init__(self, places: Any) -> None:
            made.append(tuple(places))
            super().__init__(places)

    monkeypatch.setattr(server_module, "Rebuilder", CountingRebuilder)
    cell = make_cell(10)
    cell.share()
    play_on(cell, gone=[8, 9], silent=[7])
    assert np.array_equal(cell.unmasked(), cell.plain_sum(range(8)))
    assert made == [(1, 2, 3, 4, 5, 6, 7)]


# Wrong shares, by who deals them


@pytest.mark.parametrize("wrong", [0, 3, 8])
def test_a_dealer_with_few_wrong_shares_is_named_and_corrected(
    wrong: int, make_cell: Any, make_entropy: Any
) -> None:
    # Ten members, t = 7; nine shares are revealed, of which one may be wrong.
    cell = make_cell(10)
    shares = honest_shares(cell, cell.agents[9].state.masking_private_key, make_entropy)
    shares[wrong] = bytes(33)
    cell.share_badly(9, of_mask=shares)
    cell.share(range(9))
    play_on(cell, gone=[9])
    # Where the first seven shares are right, nothing else is looked at.
    assert cell.server.recover().blamed == ((cell.ids[9],) if wrong < 7 else ())
    assert np.array_equal(cell.unmasked(), cell.plain_sum(range(9)))


def test_a_survivor_with_few_wrong_shares_of_its_seed_is_named_and_corrected(
    make_cell: Any, make_entropy: Any
) -> None:
    cell = make_cell(10)
    shares = honest_shares(cell, cell.agents[9].state.self_seed, make_entropy)
    shares[2] = bytes(33)
    cell.share_badly(9, of_self=shares)
    cell.share(range(9))
    play_on(cell, gone=[], silent=[9])
    assert cell.server.recover().blamed == (cell.ids[9],)
    assert np.array_equal(cell.unmasked(), cell.plain_sum(range(10)))


def test_a_dealer_with_wrong_shares_that_reveals_its_seed_does_no_harm(make_cell: Any) -> None:
    cell = make_cell(6)
    cell.share_badly(5, of_self=line(1, 6, threshold=4), of_mask=line(2, 6, threshold=4))
    cell.share(range(5))
    play_on(cell, gone=[])
    assert cell.server.recover().blamed == ()
    assert np.array_equal(cell.unmasked(), cell.plain_sum(range(6)))


def test_a_dealer_of_no_single_polynomial_is_proved_guilty(
    make_cell: Any, make_entropy: Any
) -> None:
    cell = make_cell(10)
    shares = honest_shares(cell, cell.agents[9].state.masking_private_key, make_entropy)
    shares[1], shares[4] = bytes(33), bytes(32) + b"\1"
    cell.share_badly(9, of_mask=shares)
    cell.share(range(9))
    play_on(cell, gone=[9], silent=[8])
    assert cell.server.recover() is None  # another share may help
    cell.reveal([8])
    with pytest.raises(UnrecoverableError, match="not of one secret") as caught:
        cell.server.recover()
    assert caught.value.blamed == (cell.ids[9],)


@pytest.mark.parametrize(
    "constant",
    [bytes(range(32)), (2**256).to_bytes(33, "big"), (PRIME - 1).to_bytes(33, "big")],
    ids=["another", "2^256", "p-1"],
)
def test_a_dealer_of_another_secret_is_proved_guilty(constant: bytes, make_cell: Any) -> None:
    # All shares lie on one polynomial; it is not that of the key that everyone masks with.
    cell = make_cell(10)
    shares = line(int.from_bytes(constant, "big"), 10, threshold=7)
    cell.share_badly(9, of_mask=shares)
    cell.share(range(9))
    play_on(cell, gone=[9])
    with pytest.raises(UnrecoverableError, match="not of one secret") as caught:
        cell.server.recover()
    assert caught.value.blamed == (cell.ids[9],)


def test_a_survivor_that_dealt_another_seed_gives_no_sum_unless_it_reveals(make_cell: Any) -> None:
    # While it is silent its seed is rebuilt, and is not the one that it committed to.
    cell = make_cell(10)
    cell.share_badly(9, of_self=line(5, 10, threshold=7))
    cell.share(range(9))
    play_on(cell, gone=[], silent=[9])
    assert cell.server.recover() is None
    cell.reveal([9])
    assert cell.server.recover().blamed == ()


def test_a_dealer_that_gives_a_wrong_secret_to_the_others_never_gives_a_wrong_sum(
    make_cell: Any, make_entropy: Any
) -> None:
    # However many of its shares are of another polynomial, it is either its key or no sum.
    for n_wrong in (0, 1, 2, 5, 9):
        cell = make_cell(10)
        shares = honest_shares(cell, cell.agents[9].state.masking_private_key, make_entropy)
        shares[:n_wrong] = line(5, 10, threshold=7)[:n_wrong]
        cell.share_badly(9, of_mask=shares)
        cell.share(range(9))
        play_on(cell, gone=[9])
        if n_wrong > 1:
            with pytest.raises(UnrecoverableError) as caught:
                cell.server.recover()
            assert caught.value.blamed == (cell.ids[9],)
            continue
        recovery = cell.server.recover()
        assert recovery.blamed == ((cell.ids[9],) if n_wrong else ())
        assert np.array_equal(cell.unmasked(), cell.plain_sum(range(9)))


def test_a_share_above_the_prime_is_one_wrong_share(make_cell: Any, make_entropy: Any) -> None:
    # Signed by its dealer like the others, and no share at all. Eight good ones are left, seven
    # are needed: the dealer is named and the sum is known.
    cell = make_cell(10)
    shares = honest_shares(cell, cell.agents[9].state.masking_private_key, make_entropy)
    shares[3] = PRIME.to_bytes(33, "big")
    cell.share_badly(9, of_mask=shares)
    cell.share(range(9))
    cell.server.close_sharing()
    cell.mask()
    cell.upload(range(9))
    cell.server.close_uploading()
    cell.confirm(range(9))
    # An agent that complains says that it holds none; one that does not look passes it on.
    assert cell.agents[3].state.complaints
    lie(cell, 3, 9, share=shares[3])
    cell.reveal(i for i in range(9) if i != 3)
    assert cell.server.recover().blamed == (cell.ids[9],)
    assert np.array_equal(cell.unmasked(), cell.plain_sum(range(9)))


def test_colluding_members_cannot_have_an_honest_dealer_blamed(make_cell: Any) -> None:
    # Their false shares do not match the dealer's digests, so they never count against it.
    cell = make_cell(10).up_to("confirm", gone=[9])
    for liar in (0, 1):
        lie(cell, liar, 9, share=cell.agents[liar].state.received[0].mask_share)
    cell.reveal(range(2, 9))
    assert cell.server.recover().blamed == (cell.ids[0], cell.ids[1])
    assert np.array_equal(cell.unmasked(), cell.plain_sum(range(9)))


# Order


def test_no_stage_comes_before_the_one_that_it_needs(make_cell: Any) -> None:
    cell = make_cell(6).up_to("reveal")
    server = cell.make_server()
    early: list[Callable[[], object]] = [
        lambda: server.bundle_for(cell.ids[0]),
        server.bundle_hash,
        server.hopeless_dealers,
        lambda: server.check_upload(cell.agents[0].state.upload),
        server.survivors,
        lambda: server.check_confirm(cell.agents[0].state.confirm),
        lambda: server.check_reveal(cell.agents[0].state.reveal),
        server.recover,
    ]
    for call in early:
        with pytest.raises(MaskedMessageError, match="waits for"):
            call()


def test_a_member_that_did_not_share_gets_no_bundle(make_cell: Any) -> None:
    cell = make_cell(6)
    cell.share(range(5))
    cell.server.close_sharing()
    assert cell.server.bundle_for(cell.ids[5]) is None
    assert cell.server.bundle_for(bytes(32)) is None
    assert len(cell.bundle(0).headers) == 5


def test_a_member_gets_no_ciphertext_that_is_sealed_to_another(make_cell: Any) -> None:
    cell = make_cell(6).up_to("close-sharing")
    given = [ciphertext for i in range(6) for ciphertext in cell.bundle(i).ciphertexts]
    assert len(set(given)) == 6 * 5
    agent = SecAggAgent(cell.agents[0]._signer, cell.policy, cell.agents[0].state)
    agent.receive_bundle(cell.bundle(0))
    assert agent.state.complaints == ()

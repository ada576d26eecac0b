"""Masks cancel for any cell and any drop-outs, and what the server holds says nothing more."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from privacy import masking
from privacy import shares as shares_module
from privacy.errors import MaskedMessageError, ShareError
from privacy.fixed_point import (
    EncodingPlan,
    agreed_layout,
    decode,
    encode,
    split_sum,
    with_checks,
)
from privacy.masking import Mask, MaskAdder, Words, expand, word_dtype
from privacy.noise import SecureStream
from privacy.secagg import cells, derive
from privacy.secagg.agent import SecAggAgent
from privacy.secagg.checks import CellPolicy
from privacy.secagg.server import CellServer
from privacy.shares import PRIME, Rebuilder, correct, split
from protocol.blocks import CellMasking
from protocol.layout import PARTICIPATION, VectorLayout
from protocol.masked import ReadyList, Roster
from protocol.messages import Credential
from protocol.signing import Signed, Signer, sign
from protocol.wire import sha256

FEDERATION, ROUND, ROUND_DIGEST = bytes(16), 1, bytes([1]) * 32
FORMED_AT = 1_800_000_000
WORD_BITS: list[Any] = [16, 32]
bytes32 = st.binary(min_size=32, max_size=32)


# Any cell, any drop-outs

STAYS = "stays"
LEAVES = ("before SHARES", "before UPLOAD", "before CONFIRM", "before REVEAL")
"""When a member vanishes for good."""


@functools.cache
def signer(i: int) -> Signer:
    return Signer.from_private_bytes(sha256(b"property" + bytes([i])))


@functools.cache
def credential(i: int) -> Signed[Credential]:
    body = Credential(federation=FEDERATION, agent=signer(i).identity, expires_at=FORMED_AT + 10**6)
    return sign(signer(101), "credential", body).signed


@dataclass
class Run:
    """A cell that is played to its end, with the members that leave."""

    plan: EncodingPlan
    server: CellServer
    agents: list[SecAggAgent]
    offer: tuple[Signed[ReadyList], Signed[Roster]]


def make_run(n_members: int, *, word_bits: Any, colluders: int | None) -> Run:
    masking_block = CellMasking(
        word_bits=word_bits,
        max_change=1.0,
        clip_norm=100.0,
        cell_target=n_members,
        max_cell=2 * n_members - 1,
        colluders=colluders,
    )
    layout = agreed_layout(VectorLayout.of_shapes({"a": (13,)}), masking_block)
    plan = EncodingPlan.of(layout, masking_block, max_weight=100)
    policy = CellPolicy(
        federation=FEDERATION,
        round=ROUND,
        round_digest=ROUND_DIGEST,
        server=signer(100).identity,
        registrar=signer(101).identity,
        masking=masking_block,
        body_n_bytes=plan.n_bytes,
        min_members=5,
    )
    agents = [
        SecAggAgent.begin(
            signer(i), policy, credential=credential(i), attempt=1, expires_at=FORMED_AT + 60
        )
        for i in range(n_members)
    ]
    agents.sort(key=identity)
    readies = tuple(agent.state.ready for agent in agents)
    ready_list = ReadyList(
        federation=FEDERATION,
        round=ROUND,
        round_digest=ROUND_DIGEST,
        wave=1,
        entries=tuple((ready.body.agent, ready.body.digest()) for ready in readies),
    )
    c = cells.colluders(n_members, wanted=colluders)
    roster = Roster(
        federation=FEDERATION,
        round=ROUND,
        round_digest=ROUND_DIGEST,
        list_digest=ready_list.digest(),
        cell=0,
        formed_at=FORMED_AT,
        members=readies,
        threshold=cells.threshold(n_members, c),
        colluders=c,
    )
    offer = (
        sign(signer(100), "ready-list", ready_list).signed,
        sign(signer(100), "roster", roster).signed,
    )
    server = CellServer(roster, body_n_bytes=plan.n_bytes, word_bits=word_bits)
    return Run(plan=plan, server=server, agents=agents, offer=offer)


@given(
    word_bits=st.sampled_from([16, 32]),
    members=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 1700)), min_size=5, max_size=19),
    seed=st.integers(0, 2**32 - 1),
)
def test_participation_survives_the_ring_exactly(
    word_bits: Any, members: list[tuple[int, int]], seed: int
) -> None:
    """However many members of whatever weights, beside values that are rounded and clipped."""
    masking_block = CellMasking(
        word_bits=word_bits, max_change=0.01, clip_norm=0.1, cell_target=10, max_cell=19
    )
    shapes = {"a": (13,), PARTICIPATION: (2, 4)}
    layout = agreed_layout(VectorLayout.of_shapes(shapes), masking_block)
    plan = EncodingPlan.of(layout, masking_block, max_weight=1700)
    rng = np.random.default_rng(seed)
    total = np.zeros(plan.n_payload, plan.dtype)
    expected = np.zeros((2, 4), np.int64)
    for rank, weight in members:
        rows = np.zeros((2, 4), np.float32)
        rows[:, :rank] = 1.0
        expected += weight * rows.astype(np.int64)
        vector = rng.normal(size=13).astype(np.float32)
        total += encode(
            vector,
            weight=weight,
            plan=plan,
            stream=SecureStream(),
            participation=rows.reshape(-1),
        )
    found = decode(total, plan)
    assert found.row_weights is not None
    np.testing.assert_array_equal(found.row_weights, expected.reshape(-1))
    assert found.weight_sum == sum(weight for _, weight in members)


def identity(agent: SecAggAgent) -> bytes:
    return agent.state.ready.body.agent


def payload_of(agent: SecAggAgent, plan: EncodingPlan) -> Words:
    """Any words at all that a member may encode; unlike those of every other member."""
    rng = np.random.default_rng(list(identity(agent)[:8]))
    words = rng.integers(0, 2**plan.word_bits, plan.n_payload).astype(plan.dtype)
    words[-3:] = rng.integers(1, 101), 1, rng.integers(0, 2)
    return words


def summed(parts: Iterable[Words], plan: EncodingPlan, n_words: int) -> Words:
    total: Words = np.zeros(n_words, plan.dtype)
    for part in parts:
        total += part
    return total


def play(run: Run, leaves: dict[bytes, int], arrival: Callable[[list[Any]], list[Any]]) -> Any:
    """The unmasked payload, or None where the cell is lost."""
    server, plan = run.server, run.plan

    def present(stage: int) -> list[SecAggAgent]:
        return arrival([agent for agent in run.agents if leaves[identity(agent)] > stage])

    for agent in present(0):
        shares = agent.receive_roster(*run.offer)
        server.check_shares(shares)
        server.shares[identity(agent)] = shares
    server.close_sharing()
    bodies = {}
    for agent in arrival([agent for agent in run.agents if leaves[identity(agent)] > 0]):
        bundle = server.bundle_for(identity(agent))
        assert bundle is not None
        masks = agent.receive_bundle(bundle)
        if leaves[identity(agent)] <= 1:
            continue
        words = with_checks(payload_of(agent, plan), masks.checks, plan, 0, plan.n_words)
        MaskAdder(masks.masks, word_bits=plan.word_bits).add(words)
        header = agent.sign_upload(sha256(words.tobytes()))
        server.check_upload(header)
        server.uploads[identity(agent)] = header
        bodies[identity(agent)] = words
        agent.uploaded()
    server.close_uploading()
    for agent in present(2):
        confirm = agent.receive_survivors(server.survivors())
        server.check_confirm(confirm)
        server.confirms[identity(agent)] = confirm
    confirmed = server.confirmed()
    if confirmed is None:
        return None
    for agent in present(3):
        reveal = agent.receive_confirmed(confirmed)
        server.check_reveal(reveal)
        server.reveals[identity(agent)] = reveal
    recovery = server.recover()
    if recovery is None:
        return None
    assert recovery.blamed == ()
    total = summed((bodies[member] for member in recovery.survivors), plan, plan.n_words)
    MaskAdder(recovery.masks, word_bits=plan.word_bits).add(total)
    return split_sum(total, recovery.checks, plan, n_members=len(recovery.survivors))


@settings(deadline=None, max_examples=90, derandomize=True)
@given(
    n_members=st.integers(5, 12),
    word_bits=st.sampled_from(WORD_BITS),
    colluders=st.none() | st.integers(1, 8),
    data=st.data(),
)
def test_a_cell_gives_the_sum_of_its_survivors_or_none(
    n_members: int, word_bits: Any, colluders: int | None, data: st.DataObject
) -> None:
    run = make_run(n_members, word_bits=word_bits, colluders=colluders)
    t = run.server.cell.threshold
    # As many leave as the cell tolerates, or one more, or any number.
    n_gone = data.draw(
        st.sampled_from([n_members - t, n_members - t + 1]) | st.integers(0, n_members)
    )
    gone = data.draw(st.permutations(range(n_members)))[:n_gone]
    when = {i: data.draw(st.integers(0, len(LEAVES) - 1)) for i in gone}
    leaves = {identity(agent): when.get(i, 4) for i, agent in enumerate(run.agents)}
    shuffled = data.draw(st.randoms(use_true_random=False))

    def arrival(agents: list[Any]) -> list[Any]:
        return shuffled.sample(agents, len(agents))

    n_left = [sum(stage > at for stage in leaves.values()) for at in range(4)]
    try:
        payload = play(run, leaves, arrival)
    except MaskedMessageError:
        payload = None
        assert n_left[0] < t or n_left[1] < t
    assert (payload is not None) == (min(n_left) >= t)
    if payload is not None:
        alive = [agent for agent in run.agents if leaves[identity(agent)] > 1]
        expected = summed(
            (payload_of(agent, run.plan) for agent in alive), run.plan, run.plan.n_payload
        )
        assert np.array_equal(payload, expected)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(n_members=st.integers(5, 8), data=st.data())
def test_a_sum_is_decoded_to_the_sum_of_the_updates(n_members: int, data: st.DataObject) -> None:
    run = make_run(n_members, word_bits=data.draw(st.sampled_from(WORD_BITS)), colluders=None)
    plan = run.plan
    step = plan.layout.slots[0].step or 0.0
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    weights = rng.integers(1, 101, n_members)
    vectors = rng.uniform(-1.0, 1.0, (n_members, 13)).astype(np.float32)
    payloads = [
        encode(vector, weight=int(weight), plan=plan, stream=SecureStream(sha256(bytes([i]))))
        for i, (vector, weight) in enumerate(zip(vectors, weights, strict=True))
    ]
    found = decode(summed(payloads, plan, plan.n_payload), plan)
    exact = (weights[:, None] / 100 * vectors.astype(np.float64)).sum(axis=0)
    assert np.all(np.abs(found.values - exact) <= n_members * (step + 1e-6))
    assert (found.weight_sum, found.n_members) == (weights.sum(), n_members)


# Fewer shares than the threshold say nothing


def distributions(
    prime: int, *, threshold: int, n_shares: int, places: tuple[int, ...], no_zeros: bool = False
) -> dict[int, Counter[tuple[int, ...]]]:
    """For each secret below a small prime: how often the shares at some places have which values.

    Every polynomial is dealt once, by the module's own `split`.
    """
    found = {}
    lowest = int(no_zeros)
    for secret in range(prime):
        counts: Counter[tuple[int, ...]] = Counter()
        for coefficients in itertools.product(range(lowest, prime), repeat=threshold - 1):
            entropy = b"".join(c.to_bytes(48, "big") for c in coefficients)
            dealt = split(
                secret.to_bytes(32, "big"),
                n_shares=n_shares,
                threshold=threshold,
                entropy=lambda n_bytes, entropy=entropy: entropy[:n_bytes],
            )
            counts[tuple(int.from_bytes(dealt[x - 1], "big") for x in places)] += 1
        found[secret] = counts
    return found


@pytest.mark.parametrize(("prime", "threshold"), [(5, 2), (7, 2), (7, 3), (5, 4)])
def test_fewer_shares_than_the_threshold_are_uniform_whatever_the_secret(
    prime: int, threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares_module, "PRIME", prime)
    n_shares = prime - 1
    for n_seen in range(1, threshold):
        for places in itertools.combinations(range(1, n_shares + 1), n_seen):
            found = distributions(prime, threshold=threshold, n_shares=n_shares, places=places)
            for counts in found.values():
                assert counts == found[0]
                assert len(counts) == prime**n_seen  # every combination is seen,
                assert len(set(counts.values())) == 1  # and each as often as every other


@pytest.mark.parametrize(("prime", "threshold"), [(5, 2), (7, 3)])
def test_threshold_shares_belong_to_one_secret_alone(
    prime: int, threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The test above can fail: one share more, and no two secrets have a combination in common.
    monkeypatch.setattr(shares_module, "PRIME", prime)
    for places in itertools.combinations(range(1, prime), threshold):
        found = distributions(prime, threshold=threshold, n_shares=prime - 1, places=places)
        for secret, counts in found.items():
            assert all(not counts.keys() & found[other].keys() for other in range(secret))
            for values in counts:
                shares = [value.to_bytes(33, "big") for value in values]
                assert Rebuilder(places).secret(shares) == secret.to_bytes(32, "big")


@pytest.mark.parametrize(("prime", "threshold"), [(5, 2), (7, 3)])
def test_coefficients_that_are_never_zero_would_tell_of_the_secret(
    prime: int, threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A usual mistake, which the test above would find.
    monkeypatch.setattr(shares_module, "PRIME", prime)
    places = tuple(range(1, threshold))
    found = distributions(
        prime, threshold=threshold, n_shares=prime - 1, places=places, no_zeros=True
    )
    assert any(counts != found[0] for counts in found.values())


# Wrong shares


@st.composite
def dealt(draw: st.DrawFn) -> tuple[bytes, int, list[bytes]]:
    """A secret, a threshold, and its shares."""
    threshold = draw(st.integers(1, 10))
    n_shares = draw(st.integers(threshold, 16))
    secret = draw(bytes32 | st.sampled_from([bytes(32), b"\xff" * 32]))
    stream = SecureStream(draw(bytes32))
    shares = split(secret, n_shares=n_shares, threshold=threshold, entropy=stream.take_bytes)
    return secret, threshold, list(shares)


elements = st.integers(0, PRIME - 1) | st.integers(0, 3) | st.integers(PRIME - 3, PRIME - 1)


def commitment_to(secret: bytes) -> bytes:
    return derive.commitment(bytes(32), bytes(32), secret)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(dealt(), st.data())
def test_threshold_shares_in_any_order_give_the_secret(
    case: tuple[bytes, int, list[bytes]], data: st.DataObject
) -> None:
    secret, threshold, shares = case
    places = data.draw(st.permutations(range(1, len(shares) + 1)))[:threshold]
    assert Rebuilder(places).secret([shares[x - 1] for x in places]) == secret


@settings(deadline=None, max_examples=150, derandomize=True)
@given(dealt(), st.data())
def test_as_many_wrong_shares_as_can_be_are_corrected_and_located(
    case: tuple[bytes, int, list[bytes]], data: st.DataObject
) -> None:
    secret, threshold, shares = case
    given_places = data.draw(st.permutations(range(1, len(shares) + 1)))
    n_given = data.draw(st.integers(threshold, len(shares)))
    given_shares = {x: shares[x - 1] for x in given_places[:n_given]}
    n_wrong = data.draw(st.integers(0, (n_given - threshold) // 2))
    wrong = given_places[:n_wrong]
    for x in wrong:
        value = data.draw(elements).to_bytes(33, "big")
        assume(value != shares[x - 1])
        given_shares[x] = value
    assert correct(given_shares, threshold=threshold) == (secret, frozenset(wrong))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(dealt(), st.data())
def test_more_wrong_shares_never_give_another_secret_that_passes_for_it(
    case: tuple[bytes, int, list[bytes]], data: st.DataObject
) -> None:
    # Either they are refused, or the commitment refuses what they give.
    secret, threshold, shares = case
    n_most = (len(shares) - threshold) // 2
    n_wrong = data.draw(st.integers(n_most + 1, len(shares)))
    given_shares = dict(enumerate(shares, start=1))
    for x in data.draw(st.permutations(range(1, len(shares) + 1)))[:n_wrong]:
        value = data.draw(elements).to_bytes(33, "big")
        assume(value != shares[x - 1])
        given_shares[x] = value
    try:
        found, wrong = correct(given_shares, threshold=threshold)
    except ShareError:
        return
    assert 2 * len(wrong) <= len(shares) - threshold
    assert (commitment_to(found) == commitment_to(secret)) == (found == secret)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(dealt(), bytes32, st.data())
def test_shares_moved_onto_another_polynomial_are_caught_by_the_commitment_alone(
    case: tuple[bytes, int, list[bytes]], other: bytes, data: st.DataObject
) -> None:
    # The worst that colluders can do: nothing in the shares is wrong, all of them are another's.
    secret, threshold, shares = case
    assume(other != secret)
    stream = SecureStream(data.draw(bytes32))
    moved = split(other, n_shares=len(shares), threshold=threshold, entropy=stream.take_bytes)
    n_kept = data.draw(st.integers(0, (len(shares) - threshold) // 2))
    mixed = dict(enumerate([*shares[:n_kept], *moved[n_kept:]], start=1))
    found, wrong = correct(mixed, threshold=threshold)
    assert found == other
    assert wrong <= set(range(1, n_kept + 1))
    assert commitment_to(found) != commitment_to(secret)


# What a masked vector looks like

N_WORDS = 1 << 16
CHI_SQUARE_LIMIT = 410.0
"""255 degrees of freedom: uniform bytes exceed it once in 10^9 tries."""


def worst_plane(words: Any) -> float:
    """The largest χ² of the bytes of the words, taken by their place in the word."""
    planes = words.view(np.uint8).reshape(len(words), -1).T
    expected = len(words) / 256
    return max(
        float(((np.bincount(plane, minlength=256) - expected) ** 2 / expected).sum())
        for plane in planes
    )


def fixed_vectors(word_bits: Any) -> tuple[Words, Words]:
    """Nothing but zeros, and small numbers around zero as an update has them."""
    values = np.rint(np.random.default_rng(0).normal(scale=3.0, size=N_WORDS)).astype(np.int64)
    dtype = word_dtype(word_bits)
    return np.zeros(N_WORDS, dtype), values.astype(dtype)


def masked_with(seeds: Iterable[bytes], plain: Words, word_bits: Any) -> Words:
    words = plain.copy()
    masks = [Mask(seed=seed, sign=1 if i % 2 else -1) for i, seed in enumerate(seeds)]
    MaskAdder(masks, word_bits=word_bits).add(words)
    return words


@pytest.mark.parametrize("word_bits", WORD_BITS)
@pytest.mark.parametrize("n_masks", [1, 2, 5])
def test_a_masked_vector_is_uniform_in_every_byte(n_masks: int, word_bits: Any) -> None:
    for start, plain in itertools.product(range(5), fixed_vectors(word_bits)):
        seeds = [sha256(bytes([start, i])) for i in range(n_masks)]
        words = masked_with(seeds, plain, word_bits)
        assert worst_plane(words) < CHI_SQUARE_LIMIT
        if plain.any():  # and has nothing in common with what it hides
            correlation = np.corrcoef(words.astype(np.float64), plain.astype(np.float64))[0, 1]
            assert abs(correlation) < 6 / np.sqrt(N_WORDS)


def test_two_vectors_under_two_seeds_differ_uniformly() -> None:
    for word_bits in WORD_BITS:
        _, plain = fixed_vectors(word_bits)
        first = masked_with([sha256(b"1")], plain, word_bits)
        other = masked_with([sha256(b"2")], plain, word_bits)
        assert worst_plane(first - other) < CHI_SQUARE_LIMIT
        # The same seed twice would leave nothing of the mask: that is why T2 salts every seed.
        assert not (first - masked_with([sha256(b"1")], plain, word_bits)).any()


@pytest.mark.parametrize(
    ("word_bits", "broken"),
    [
        (32, lambda mask: mask & 0x0FFFFFFF),
        (32, lambda mask: mask % np.uint32(10**9)),
        (16, lambda mask: mask & 0x0FFF),
        (16, lambda mask: mask % np.uint16(60_000)),
        (16, lambda mask: (mask.astype(np.uint64) ** 2 % 65521).astype("<u2")),
        (16, lambda mask: mask | 1),
        (16, lambda mask: np.minimum(mask, np.roll(mask, 1))),
        (16, lambda mask: mask * 0),
    ],
    ids=["28 bits", "decimal", "12 bits", "60,000", "squares", "odd", "smaller of two", "none"],
)
def test_a_broken_mask_is_seen(word_bits: Any, broken: Any) -> None:
    # The tests above can fail.
    mask = expand(sha256(b"seed"), N_WORDS, word_bits=word_bits)
    wrong = broken(mask).astype(mask.dtype)
    plains = fixed_vectors(word_bits)
    assert max(worst_plane(plain + mask) for plain in plains) < CHI_SQUARE_LIMIT
    assert max(worst_plane(plain + wrong) for plain in plains) > CHI_SQUARE_LIMIT


# Cuts

runs = st.lists(st.integers(0, 400), max_size=6).map(sorted)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    st.lists(st.tuples(bytes32, st.sampled_from([1, -1])), max_size=4),
    st.sampled_from(WORD_BITS),
    runs,
    st.sampled_from([16, 32, 48, 256, 1 << 18]),
    st.integers(0, 25),
    st.randoms(use_true_random=False),
)
@example([], 16, [], 16, 0, None)
def test_neither_chunks_nor_runs_nor_order_matter(
    pairs: list[tuple[bytes, Any]],
    word_bits: Any,
    cuts: list[int],
    chunk_bytes: int,
    start_block: int,
    shuffled: Any,
) -> None:
    masks = [Mask(seed=seed, sign=sign) for seed, sign in pairs]
    dtype = word_dtype(word_bits)
    plain = np.arange(400).astype(dtype)
    expected = plain.copy()
    for mask in masks:  # one stream after the other, in whole
        stream = expand(mask.seed, 400, word_bits=word_bits)
        expected = expected + stream if mask.sign > 0 else expected - stream
    if shuffled is not None:
        shuffled.shuffle(masks)
    start = start_block * 128 // word_bits
    words = plain.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "CHUNK_BYTES", chunk_bytes)
        adder = MaskAdder(masks, word_bits=word_bits, start_word=start)
        bounds = [start, *(cut for cut in cuts if cut > start), 400]
        for one, other in itertools.pairwise(bounds):
            adder.add(words[one:other])
    assert np.array_equal(words[start:], expected[start:])
    assert np.array_equal(words[:start], plain[:start])


@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.integers(1, 120), st.sampled_from(WORD_BITS), st.data())
def test_a_vector_with_checks_may_be_made_in_any_runs(
    n_values: int, word_bits: Any, data: st.DataObject
) -> None:
    layout = VectorLayout.of_shapes({"a": (n_values,)}, step=1.0, clip_amplitude=1)
    plan = EncodingPlan(
        layout=layout, word_bits=word_bits, max_members=5, max_weight=1, clip_norm=1.0
    )
    payload = np.arange(plan.n_payload).astype(plan.dtype)
    checks = derive.check_words(bytes(32), word_bits=word_bits)
    cuts = data.draw(st.lists(st.integers(0, plan.n_words), max_size=8).map(sorted))
    parts = [
        with_checks(payload, checks, plan, start, stop)
        for start, stop in itertools.pairwise([0, *cuts, plan.n_words])
    ]
    words = np.concatenate(parts)
    positions = list(plan.check_positions())
    assert np.array_equal(words[positions], checks)
    assert np.array_equal(np.delete(words, positions), payload)

"""Encoding: unbiased, bounded, and without a wrap at the largest values that a cell can have."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from privacy.errors import EncodingPlanError, SumError, UpdateRangeError
from privacy.fixed_point import (
    N_CHECK_WORDS,
    N_TAIL_WORDS,
    EncodingPlan,
    agreed_layout,
    amplitude_of,
    checked_sum,
    decode,
    encode,
    split_sum,
    with_checks,
)
from privacy.masking import Mask, MaskAdder, expand
from privacy.noise import SecureStream
from privacy.secagg.derive import check_words
from privacy.updates import l2_norm
from protocol.blocks import CellMasking, NoMasking
from protocol.layout import PARTICIPATION, VectorLayout
from protocol.limits import MAX_CELL, MAX_UPDATE_BYTES
from protocol.privacy import AgentPrivacy

WORD_BITS: list[Any] = [16, 32]
KEY = bytes(range(32))


class FakeStream(SecureStream):
    """Always the same number: rounding that is not random."""

    def __init__(self, number: float) -> None:
        super().__init__(KEY)
        self._number = number

    def fill_uniform(self, values: Any) -> None:
        values[:] = self._number


def make_plan(
    n_values: int = 20,
    *,
    word_bits: Any = 16,
    max_cell: int = 19,
    max_weight: int = 1,
    max_change: float = 1.0,
    clip_norm: float = 1e6,
) -> EncodingPlan:
    target = (max_cell + 1) // 2
    masking = CellMasking(
        word_bits=word_bits,
        max_change=max_change,
        clip_norm=clip_norm,
        cell_target=target,
        max_cell=max_cell,
    )
    shapes = {"a": (n_values // 4,), "b": (n_values - n_values // 4,)}
    layout = agreed_layout(VectorLayout.of_shapes(shapes), masking)
    return EncodingPlan.of(layout, masking, max_weight=max_weight)


def amplitude(plan: EncodingPlan) -> int:
    found = plan.layout.slots[0].clip_amplitude
    assert found is not None
    return found


def step(plan: EncodingPlan) -> float:
    found = plan.layout.slots[0].step
    assert found is not None
    return found


def signed(payload: Any) -> Any:
    """The words of the tensors as signed whole numbers."""
    return payload[:-3].view(f"i{payload.dtype.itemsize}").astype(np.int64)


def constant(plan: EncodingPlan, steps: float) -> Any:
    return np.full(plan.layout.n_values, steps * step(plan), np.float32)


def encoded(vector: Any, plan: EncodingPlan, *, weight: int = 1, stream: Any = None) -> Any:
    return encode(vector, weight=weight, plan=plan, stream=stream or SecureStream(KEY))


# No wrap


def test_the_amplitude_is_the_largest_that_never_wraps() -> None:
    for word_bits in WORD_BITS:
        half = 2 ** (word_bits - 1) - 1
        for n_members in range(5, 129):
            found = amplitude_of(word_bits=word_bits, max_members=n_members)
            assert n_members * (found + 1) <= half < n_members * (found + 2)


@pytest.mark.parametrize("n_members", [2**14, 2**15, 10**6])
def test_a_cell_that_leaves_no_amplitude_is_refused(n_members: int) -> None:
    with pytest.raises(EncodingPlanError, match="word_bits = 32"):
        amplitude_of(word_bits=16, max_members=n_members)


@pytest.mark.parametrize("word_bits", WORD_BITS)
@pytest.mark.parametrize("max_cell", [9, 19, MAX_CELL])
def test_the_largest_cell_of_the_largest_updates_decodes_exactly(
    max_cell: int, word_bits: Any
) -> None:
    # Guarantee 1 of EncodingPlan: every value at ±A, every weight W, for all members.
    max_weight = min(1_000_000, (2**word_bits - 1) // max_cell)
    plan = make_plan(word_bits=word_bits, max_cell=max_cell, max_weight=max_weight)
    vector = np.where(np.arange(20) % 2, -3.0, 3.0).astype(np.float32)
    payload = encoded(vector, plan, weight=max_weight)
    total = np.zeros_like(payload)
    for _ in range(max_cell):
        total += payload
    assert set(signed(total).tolist()) == {max_cell * amplitude(plan), -max_cell * amplitude(plan)}
    found = decode(total, plan)
    exact = np.float32(max_cell * amplitude(plan) * step(plan))
    assert np.array_equal(found.values, np.where(np.arange(20) % 2, -exact, exact))
    assert (found.weight_sum, found.n_members) == (max_cell * max_weight, max_cell)
    assert found.n_clipped == max_cell


@pytest.mark.parametrize("word_bits", WORD_BITS)
def test_one_step_more_would_be_refused(word_bits: Any) -> None:
    plan = make_plan(word_bits=word_bits)
    for changes in (
        {"max_members": plan.max_members + 1},
        {"max_weight": (2**word_bits - 1) // plan.max_members + 1},
    ):
        fields: dict[str, Any] = {**vars(plan), **changes}
        with pytest.raises(EncodingPlanError, match="wrap"):
            EncodingPlan(**fields)
    for more in (0, 1):
        layout = VectorLayout.of_shapes(
            {"a": (4,)}, step=1.0, clip_amplitude=amplitude(plan) + more
        )
        fields = {**vars(plan), "layout": layout}
        if more:
            with pytest.raises(EncodingPlanError, match="'a'"):
                EncodingPlan(**fields)
        else:
            EncodingPlan(**fields)


def test_one_tensor_of_several_that_wraps_is_enough() -> None:
    plan = make_plan()
    slots = list(plan.layout.slots)
    slots[1] = slots[1].model_copy(update={"clip_amplitude": amplitude(plan) + 1})
    with pytest.raises(EncodingPlanError, match="'b'"):
        EncodingPlan(**{**vars(plan), "layout": VectorLayout(slots=tuple(slots))})


@pytest.mark.parametrize("missing", ["step", "clip_amplitude"])
def test_a_layout_without_a_step_or_amplitude_is_refused(missing: str) -> None:
    plan = make_plan()
    slots = [slot.model_copy(update={missing: None}) for slot in plan.layout.slots]
    with pytest.raises(EncodingPlanError, match="no step or amplitude"):
        EncodingPlan(**{**vars(plan), "layout": VectorLayout(slots=tuple(slots))})


def test_more_words_than_a_body_may_have_are_refused() -> None:
    n_values = MAX_UPDATE_BYTES // 4
    layout = VectorLayout.of_shapes({"a": (n_values,)}, step=1.0, clip_amplitude=1)
    with pytest.raises(EncodingPlanError, match="bytes of words"):
        EncodingPlan(layout=layout, word_bits=32, max_members=5, max_weight=1, clip_norm=1.0)


def test_the_layout_of_a_masked_federation_reaches_the_largest_change() -> None:
    masking = CellMasking(max_change=0.02, clip_norm=1.0)
    shapes = {"a": (2, 3), "b": (4,)}
    layout = agreed_layout(VectorLayout.of_shapes(shapes), masking)
    for slot in layout.slots:
        assert slot.clip_amplitude == amplitude_of(word_bits=16, max_members=masking.max_cell)
        assert slot.step is not None
        assert math.isclose(slot.step * slot.clip_amplitude, 0.02)
    assert {slot.name: slot.shape for slot in layout.slots} == shapes


def test_the_layout_of_an_open_federation_has_no_steps() -> None:
    layout = VectorLayout.of_shapes({"a": (2, 3)})
    assert agreed_layout(layout, NoMasking()) == layout


# Participation


def mixed_plan(word_bits: Any = 16, **changes: Any) -> EncodingPlan:
    """Of make_plan's tensors, and of two modules of four rank rows."""
    plan = make_plan(word_bits=word_bits, **changes)
    first = plan.layout.slots[0]
    shapes = {slot.name: slot.shape for slot in plan.layout.slots}
    layout = VectorLayout.of_shapes(
        {**shapes, PARTICIPATION: (2, 4)}, step=first.step, clip_amplitude=first.clip_amplitude
    )
    return replace(plan, layout=layout)


ROWS = np.array([1, 1, 1, 0, 1, 1, 0, 0], np.float32)


@pytest.mark.parametrize("word_bits", WORD_BITS)
def test_encode_guarantee_4_a_participation_is_the_weight_or_nothing(word_bits: Any) -> None:
    plan = mixed_plan(word_bits, max_weight=40)
    for number in (0.0, 1.0 - 2.0**-53):
        payload = encode(
            np.full(20, 0.5, np.float32),
            weight=37,
            plan=plan,
            stream=FakeStream(number),
            participation=ROWS,
        )
        assert payload[20:28].tolist() == [37 * int(row) for row in ROWS]


def test_encode_guarantee_4_participation_is_in_no_norm_and_is_never_cut() -> None:
    plan = mixed_plan(clip_norm=0.01)
    plain = make_plan(clip_norm=0.01)
    assert plan.rounding_norm == plain.rounding_norm
    vector = np.full(20, 0.5, np.float32)
    payload = encode(
        vector, weight=1, plan=plan, stream=SecureStream(KEY), participation=np.ones(8, np.float32)
    )
    alone = encoded(vector, plain)
    assert payload[:20].tolist() == alone[:20].tolist()
    assert payload[20:28].tolist() == [1] * 8
    assert payload[-3:].tolist() == [1, 1, 1]


@pytest.mark.parametrize("word_bits", WORD_BITS)
def test_the_largest_cell_of_the_largest_weights_says_exactly_who_trained(word_bits: Any) -> None:
    max_weight = min(1_000_000, (2**word_bits - 1) // 19)
    plan = mixed_plan(word_bits, max_weight=max_weight)
    vector = np.full(20, -3.0, np.float32)
    payload = encode(
        vector, weight=max_weight, plan=plan, stream=SecureStream(KEY), participation=ROWS
    )
    total = np.zeros_like(payload)
    for _ in range(19):
        total += payload
    found = decode(total, plan)
    assert found.row_weights is not None
    assert found.row_weights.tolist() == (19.0 * max_weight * ROWS.astype(np.float64)).tolist()
    assert len(found.values) == 20


@pytest.mark.parametrize(
    "rows", [None, np.ones(7, np.float32), ROWS * 0.5, -ROWS, ROWS * np.float32(np.nan)]
)
def test_any_other_participation_is_refused(rows: Any) -> None:
    with pytest.raises(UpdateRangeError, match="expected 8, each 0 or 1"):
        encode(
            np.ones(20, np.float32),
            weight=1,
            plan=mixed_plan(),
            stream=SecureStream(KEY),
            participation=rows,
        )
    with pytest.raises(UpdateRangeError, match="expected 0"):
        encode(
            np.ones(20, np.float32),
            weight=1,
            plan=make_plan(),
            stream=SecureStream(KEY),
            participation=ROWS,
        )


# Encoding

N_DRAWS = 1 << 18
"""Enough that a bias of a hundredth of a step has a z-score of 10 and more."""


def z_score(steps: float, stream: Any, *, word_bits: Any = 16) -> float:
    """How many standard deviations the mean of many roundings lies from the value itself."""
    plan = make_plan(N_DRAWS, word_bits=word_bits)
    vector = constant(plan, steps)
    exact = float(vector[0]) / step(plan)
    frac = exact - math.floor(exact)
    deviation = math.sqrt(frac * (1 - frac) / N_DRAWS)
    mean = signed(encoded(vector, plan, stream=stream)).mean()
    return float((mean - exact) / deviation)


@pytest.mark.parametrize("word_bits", WORD_BITS)
@pytest.mark.parametrize("steps", [0.5, 0.3, -0.3, 0.01, -0.01, 17.83, -1000.25])
def test_rounding_keeps_the_mean(steps: float, word_bits: Any) -> None:
    # Guarantee 1.
    assert abs(z_score(steps, SecureStream(KEY), word_bits=word_bits)) < 5.0


@pytest.mark.parametrize("steps", [0.3, -0.3, 0.01, 17.83])
@pytest.mark.parametrize("number", [0.0, 0.5, 1.0 - 2.0**-32], ids=["floor", "nearest", "ceil"])
def test_rounding_that_is_not_random_does_not_keep_the_mean(steps: float, number: float) -> None:
    # The test above can fail: each of the usual ways to round is caught by it.
    assert abs(z_score(steps, FakeStream(number))) > 5.0


def test_a_slight_bias_of_the_randomness_does_not_keep_the_mean() -> None:
    class Slanted(SecureStream):
        def fill_uniform(self, values: Any) -> None:
            super().fill_uniform(values)
            values *= 0.98

    assert abs(z_score(0.5, SecureStream(KEY))) < 5.0
    assert abs(z_score(0.5, Slanted(KEY))) > 5.0


def test_a_rounded_value_is_one_of_its_two_neighbours() -> None:
    plan = make_plan(4000)
    vector = np.random.default_rng(0).uniform(-0.9, 0.9, 4000).astype(np.float32)
    exact = vector.astype(np.float64) / step(plan)
    found = signed(encoded(vector, plan))
    assert np.all((found == np.floor(exact)) | (found == np.floor(exact) + 1))
    assert np.any(found == np.floor(exact))
    assert np.any(found != np.floor(exact))


def test_whole_steps_are_kept_as_they_are() -> None:
    plan = make_plan(9, max_change=float(amplitude_of(word_bits=16, max_members=19)))
    vector = np.arange(-4, 5).astype(np.float32)
    assert step(plan) == 1.0
    assert signed(encoded(vector, plan)).tolist() == list(range(-4, 5))


def test_equal_streams_encode_alike_and_others_do_not() -> None:
    plan = make_plan(1000)
    vector = constant(plan, 0.5)
    first = encoded(vector, plan, stream=SecureStream(KEY))
    assert np.array_equal(first, encoded(vector, plan, stream=SecureStream(KEY)))
    assert not np.array_equal(first, encoded(vector, plan, stream=SecureStream()))


def test_an_update_is_not_changed_by_its_encoding() -> None:
    plan = make_plan(clip_norm=0.1)
    vector = np.random.default_rng(0).normal(size=20).astype(np.float32)
    before = vector.copy()
    vector.setflags(write=False)
    encoded(vector, plan)
    assert np.array_equal(vector, before)


@pytest.mark.parametrize("word_bits", WORD_BITS)
def test_the_weight_scales_what_is_encoded_and_stands_behind_it(word_bits: Any) -> None:
    plan = make_plan(N_DRAWS, word_bits=word_bits, max_weight=40)
    payload = encoded(constant(plan, 80.0), plan, weight=10)
    assert abs(signed(payload).mean() - 20.0) < 0.01  # (w/W)·x
    assert payload[-3:].tolist() == [10, 1, 0]


def test_a_long_update_is_shortened_to_the_clip_norm_and_says_so() -> None:
    plan = make_plan(4000, clip_norm=1.0)
    vector = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    payload = encoded(vector, plan)
    values = decode(payload, plan).values
    cosine = float(values @ vector) / (np.linalg.norm(values) * np.linalg.norm(vector))
    assert payload[-1] == 1
    assert cosine > 0.99
    noise = math.sqrt(4000) * step(plan)
    assert 1.0 - noise <= np.linalg.norm(values) <= 1.0 + noise


@pytest.mark.parametrize("word_bits", WORD_BITS)
def test_a_large_value_is_clipped_and_says_so(word_bits: Any) -> None:
    plan = make_plan(word_bits=word_bits)
    for far in (1.01, 100.0, 1e5):
        for sign in (1.0, -1.0):
            vector = np.zeros(20, np.float32)
            vector[7] = sign * far
            payload = encoded(vector, plan)
            assert signed(payload)[7] == sign * amplitude(plan)
            assert payload[-1] == 1


def test_an_update_that_fits_does_not_say_that_it_was_clipped() -> None:
    plan = make_plan(clip_norm=10.0)
    for vector in (np.zeros(20), np.full(20, 0.9), np.full(20, -0.9)):
        assert encoded(vector.astype(np.float32), plan)[-1] == 0


@pytest.mark.parametrize("weight", [1, 3, 40])
@pytest.mark.parametrize("scale", [1e-6, 0.01, 1.0, 50.0])
def test_the_encoded_norm_is_bounded(scale: float, weight: int) -> None:
    # Guarantee 2, PROTOCOL's check 15: ‖Δe‖ ≤ (w/W)·C + √(Σ d Δ²), whatever the update.
    plan = make_plan(500, clip_norm=2.0, max_weight=40)
    bound = weight / 40 * 2.0 + math.sqrt(500) * step(plan)
    for seed in range(5):
        vector = (np.random.default_rng(seed).normal(size=500) * scale).astype(np.float32)
        for stream in (SecureStream(KEY), FakeStream(0.0), FakeStream(1.0 - 2.0**-32)):
            payload = encoded(vector, plan, weight=weight, stream=stream)
            assert np.linalg.norm(signed(payload) * step(plan)) <= bound


@pytest.mark.parametrize("number", [2.0, -2.0])
def test_an_encoding_that_is_longer_than_it_may_be_is_refused(number: float) -> None:
    # Cannot be with numbers in [0, 1); check 15 is there for the fault that nobody thought of.
    plan = make_plan(500, clip_norm=1e-3)
    with pytest.raises(UpdateRangeError, match="agreed"):
        encoded(np.zeros(500, np.float32), plan, stream=FakeStream(number))


def make_noisy_plan(n_values: int = 400, *, share_variance: float = 1e9) -> EncodingPlan:
    masking = CellMasking(
        word_bits=32, max_change=2.0, clip_norm=2.0, cell_target=10, min_cell=10, max_cell=19
    )
    privacy = AgentPrivacy(
        epsilon=8.0, delta=1e-5, clip_norm=2.0, steps_per_clip=2**16, share_variance=share_variance
    )
    layout = agreed_layout(VectorLayout.of_shapes({"a": (n_values,)}), masking, privacy)
    return EncodingPlan.of(layout, masking, max_weight=1, privacy=privacy)


@pytest.mark.parametrize("share_variance", [16.0, 1e9])
def test_under_p2_the_words_hold_a_share_of_the_noise_and_no_flag(share_variance: float) -> None:
    # Guarantee 3
    plan = make_noisy_plan(20_000, share_variance=share_variance)
    vector = np.full(20_000, 1.0, np.float32)  # far longer than C
    words = encoded(vector, plan)
    assert words.dtype == np.uint32
    assert words[-N_TAIL_WORDS:].tolist() == [1, 1, 0]
    clipped = 2.0 / math.sqrt(20_000)
    noise = decode(words, plan).values / step(plan) - clipped / step(plan)
    rounding = 0.25  # at most, of the variance
    spread = 5 / math.sqrt(2 * 20_000)
    assert share_variance * (1 - 2 * spread) < noise.var()
    assert noise.var() < (share_variance + rounding) * (1 + 2 * spread)


def test_a_noisy_sum_of_the_largest_cell_neither_wraps_nor_seems_too_long() -> None:
    plan = make_noisy_plan()
    vectors = np.random.default_rng(0).normal(size=(19, 400)).astype(np.float32)
    payloads = [
        encoded(vector, plan, stream=SecureStream(bytes([number]) * 32))
        for number, vector in enumerate(vectors)
    ]
    checks = np.arange(N_CHECK_WORDS, dtype=np.uint32)
    words = sum(with_checks(p, checks, plan, 0, plan.n_words) for p in payloads)
    found = decode(checked_sum(words, checks, plan, n_members=19), plan)
    exact = sum(v / np.linalg.norm(v) * 2.0 for v in vectors.astype(np.float64))
    std = step(plan) * math.sqrt(19 * 1e9)
    assert np.abs(found.values - exact).max() < 5 * std
    spoilt = words.copy()
    spoilt[[n for n in range(300) if n not in plan.check_positions()]] += np.uint32(2**28)
    with pytest.raises(SumError, match=r"at most .* is agreed"):
        checked_sum(spoilt, checks, plan, n_members=19)


def test_under_p3_nothing_of_a_sum_shows_before_the_noise() -> None:
    """Neither who clipped, nor whether the sum is longer than it should be: a member could ask."""
    plain = make_plan(clip_norm=1.0)
    central = replace(plain, is_noised_later=True)
    long = np.full(20, 1.0, np.float32)
    assert encoded(long, plain)[-1] == 1
    assert encoded(long, central)[-1] == 0
    checks = np.arange(N_CHECK_WORDS, dtype=np.uint16)
    payload = encoded(long, central).copy()
    payload[:20] = amplitude(plain)  # no honest sum is so long
    payload[-1] = 9
    words = with_checks(payload, checks, central, 0, central.n_words)
    with pytest.raises(SumError, match="say that they clipped"):
        checked_sum(words, checks, plain, n_members=1)
    checked_sum(words, checks, central, n_members=1)
    payload[-1] = 0
    words = with_checks(payload, checks, central, 0, central.n_words)
    with pytest.raises(SumError, match=r"at most .* is agreed"):
        checked_sum(words, checks, plain, n_members=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 19])
def test_what_is_not_finite_is_refused(value: float, place: int) -> None:
    vector = np.zeros(20, np.float32)
    vector[place] = value
    with pytest.raises(UpdateRangeError, match="not finite"):
        encoded(vector, make_plan())


def test_infinities_that_cancel_are_refused() -> None:
    vector = np.zeros(20, np.float32)
    vector[[3, 4]] = math.inf, -math.inf
    with pytest.raises(UpdateRangeError, match="not finite"):
        encoded(vector, make_plan())


@pytest.mark.parametrize("shape", [(19,), (21,), (0,), (20, 1)])
def test_an_update_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UpdateRangeError, match="20 values"):
        encoded(np.zeros(shape, np.float32), make_plan())


@pytest.mark.parametrize("weight", [-1, 0, 41])
def test_a_weight_outside_its_range_is_refused(weight: int) -> None:
    with pytest.raises(UpdateRangeError, match="from 1 to 40"):
        encoded(np.zeros(20, np.float32), make_plan(max_weight=40), weight=weight)


def test_the_norm_is_that_of_float64() -> None:
    rng = np.random.default_rng(0)
    vector = rng.normal(size=100_003).astype(np.float32)
    assert math.isclose(l2_norm(vector), float(np.linalg.norm(vector.astype(np.float64))))
    huge = np.full(4, 3e38, np.float32)  # squares that float32 has not
    assert math.isclose(l2_norm(huge), 2 * float(huge[0]))
    assert l2_norm(np.zeros(3, np.float32)) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_norm_of_what_is_not_finite_is_no_number(value: float) -> None:
    assert math.isnan(l2_norm(np.array([1.0, value], np.float32)))


# Check words


@pytest.mark.parametrize("n_values", [1, 2, 13, 29, 1000, 4096])
def test_check_words_are_spread_over_the_vector_and_end_it(n_values: int) -> None:
    layout = VectorLayout.of_shapes({"a": (n_values,)}, step=1.0, clip_amplitude=1)
    plan = EncodingPlan(layout=layout, word_bits=16, max_members=5, max_weight=1, clip_norm=1.0)
    positions = plan.check_positions()
    gaps = np.diff([-1, *positions])
    assert len(set(positions)) == N_CHECK_WORDS == 16
    assert positions[-1] == plan.n_words - 1
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("word_bits", WORD_BITS)
def test_check_words_do_not_touch_the_payload(word_bits: Any) -> None:
    plan = make_plan(41, word_bits=word_bits)
    payload = np.arange(1, plan.n_payload + 1).astype(plan.dtype)
    checks = check_words(KEY, word_bits=word_bits)
    words = with_checks(payload, checks, plan, 0, plan.n_words)
    positions = list(plan.check_positions())
    assert np.array_equal(words[positions], checks)
    assert np.array_equal(np.delete(words, positions), payload)


@pytest.mark.parametrize("n_values", [5, 29, 41])
def test_the_cuts_do_not_matter(n_values: int) -> None:
    plan = make_plan(n_values)
    payload = np.arange(1, plan.n_payload + 1).astype(plan.dtype)
    checks = check_words(KEY, word_bits=16)
    whole = with_checks(payload, checks, plan, 0, plan.n_words)
    for start in range(plan.n_words + 1):
        for stop in range(start, plan.n_words + 1):
            run = with_checks(payload, checks, plan, start, stop)
            assert np.array_equal(run, whole[start:stop]), (start, stop)


def test_a_run_is_a_copy() -> None:
    plan = make_plan()
    payload = np.zeros(plan.n_payload, plan.dtype)
    run = with_checks(payload, check_words(KEY, word_bits=16), plan, 0, plan.n_words)
    run += 1
    assert not payload.any()


# Sums


@pytest.fixture(params=WORD_BITS, ids=str)
def plan(request: pytest.FixtureRequest) -> EncodingPlan:
    return make_plan(41, word_bits=request.param, max_weight=40)


@pytest.fixture
def checks(plan: EncodingPlan) -> Any:
    return check_words(KEY, word_bits=plan.word_bits)


def members(plan: EncodingPlan, n_members: int = 5) -> list[Any]:
    rng = np.random.default_rng(1)
    return [
        encoded(rng.normal(size=41).astype(np.float32) * 0.3, plan, weight=6 * (i + 1))
        for i in range(n_members)
    ]


def summed(payloads: list[Any], checks: Any, plan: EncodingPlan) -> Any:
    total = np.zeros(plan.n_words, plan.dtype)
    for payload in payloads:
        total += with_checks(payload, checks, plan, 0, plan.n_words)
    return total


def test_a_sum_gives_its_payload_back(plan: EncodingPlan, checks: Any) -> None:
    payloads = members(plan)
    payload = split_sum(summed(payloads, checks, plan), checks, plan, n_members=5)
    assert np.array_equal(payload, np.sum(payloads, axis=0, dtype=plan.dtype))
    found = decode(payload, plan)
    assert (found.weight_sum, found.n_members) == (6 * 15, 5)
    exact = sum(signed(payload) for payload in payloads) * step(plan)
    assert np.allclose(found.values, exact, rtol=1e-6, atol=0.0)


def test_a_sum_with_a_mask_left_in_it_is_refused(plan: EncodingPlan, checks: Any) -> None:
    total = summed(members(plan), checks, plan)
    masks = [Mask(seed=bytes([i]) * 32, sign=1) for i in range(3)]
    MaskAdder(masks, word_bits=plan.word_bits).add(total)
    turned = [Mask(seed=mask.seed, sign=-1) for mask in masks]
    for removed in (turned[:2], turned[1:], [], [*turned, turned[0]], [*turned[:2], masks[2]]):
        words = total.copy()
        MaskAdder(removed, word_bits=plan.word_bits).add(words)
        with pytest.raises(SumError, match="check words"):
            split_sum(words, checks, plan, n_members=5)
    MaskAdder(turned, word_bits=plan.word_bits).add(total)
    split_sum(total, checks, plan, n_members=5)


def test_a_mask_that_is_off_by_one_word_is_refused(plan: EncodingPlan, checks: Any) -> None:
    total = summed(members(plan), checks, plan)
    mask = expand(KEY, plan.n_words + 1, word_bits=plan.word_bits)
    total += mask[:-1]
    total -= mask[1:]
    with pytest.raises(SumError, match="check words"):
        split_sum(total, checks, plan, n_members=5)


def test_check_words_of_another_cell_are_refused(plan: EncodingPlan, checks: Any) -> None:
    total = summed(members(plan), checks, plan)
    other = check_words(bytes(32), word_bits=plan.word_bits)
    with pytest.raises(SumError, match="check words"):
        split_sum(total, other, plan, n_members=5)


@pytest.mark.parametrize("n_members", [4, 6])
def test_a_sum_of_more_or_fewer_members_is_refused(
    n_members: int, plan: EncodingPlan, checks: Any
) -> None:
    total = summed(members(plan, n_members), checks, plan)
    with pytest.raises(SumError, match="check words"):
        split_sum(total, checks, plan, n_members=5)


def test_each_check_word_counts(plan: EncodingPlan, checks: Any) -> None:
    total = summed(members(plan), checks, plan)
    for position in plan.check_positions():
        words = total.copy()
        words[position] += 1
        with pytest.raises(SumError, match="check words"):
            split_sum(words, checks, plan, n_members=5)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (-2, 4, "count word says 4"),
        (-2, 6, "count word says 6"),
        (-2, 0, "count word says 0"),
        (-3, 4, "weights"),
        (-3, 0, "weights"),
        (-3, 5 * 40 + 1, "weights"),
        (-3, 2**16 - 1, "weights"),
        (-1, 6, "clipped"),
        (-1, 2**16 - 1, "clipped"),
    ],
)
def test_a_member_that_lies_about_its_tail_is_found(
    place: int, value: int, says: str, plan: EncodingPlan, checks: Any
) -> None:
    payload = np.sum(members(plan), axis=0, dtype=plan.dtype)
    payload[place] = value
    sum_of_checks = (checks.astype(np.uint64) * np.uint64(5)).astype(plan.dtype)
    words = with_checks(payload, sum_of_checks, plan, 0, plan.n_words)
    with pytest.raises(SumError, match=says):
        split_sum(words, checks, plan, n_members=5)


@pytest.mark.parametrize(("place", "value"), [(-3, 5), (-3, 200), (-1, 0), (-1, 5)])
def test_the_ends_of_the_ranges_are_accepted(
    place: int, value: int, plan: EncodingPlan, checks: Any
) -> None:
    payload = np.sum(members(plan), axis=0, dtype=plan.dtype)
    payload[place] = value
    sum_of_checks = (checks.astype(np.uint64) * np.uint64(5)).astype(plan.dtype)
    words = with_checks(payload, sum_of_checks, plan, 0, plan.n_words)
    assert np.array_equal(split_sum(words, checks, plan, n_members=5), payload)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_sum_of_another_length_is_not_decoded(more: int, plan: EncodingPlan) -> None:
    with pytest.raises(SumError, match="words"):
        decode(np.zeros(plan.n_payload + more, plan.dtype), plan)


def test_weight_count_and_flag_are_unsigned_and_values_signed() -> None:
    plan = make_plan(4, max_cell=9, max_weight=7281)
    payload = np.array([1, 2**16 - 1, 2**15, 2**15 - 1, 65529, 9, 9], "<u2")
    found = decode(payload, plan)
    assert (found.weight_sum, found.n_members, found.n_clipped) == (65529, 9, 9)
    exact = np.array([1, -1, -(2**15), 2**15 - 1]) * step(plan)
    assert np.array_equal(found.values, exact.astype(np.float32))
    assert found.values.dtype == np.float32

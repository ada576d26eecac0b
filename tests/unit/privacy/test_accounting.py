"""ε of compositions: against published values, other accountants, and exact formulas."""

import logging
import math
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from privacy import accounting
from privacy.accounting import (
    LEAST_MULTIPLIER,
    MAX_EPSILON,
    MAX_MULTIPLIER,
    MAX_STEPS,
    SampledGaussian,
    Spent,
    calibrate,
    spent,
    usual_delta,
)
from privacy.errors import AccountingError

ALMOST_ALL = 1.0 - 1e-9
"""A sample of everybody that goes the way of a sample: through the grid, step by step."""
few = settings(
    deadline=None,
    max_examples=5,
    derandomize=True,
    phases=[Phase.generate],  # shrinking would take minutes, and says little about a number
)
events = st.builds(
    SampledGaussian,
    noise_multiplier=st.floats(0.7, 8.0),
    sampling_probability=st.sampled_from([0.01, 0.1, 1.0]),
    n_steps=st.integers(1, 60),
)


def make_event(noise: float = 1.0, sampled: float = 1.0, n_steps: int = 1) -> SampledGaussian:
    return SampledGaussian(noise_multiplier=noise, sampling_probability=sampled, n_steps=n_steps)


def one(noise: float, sampled: float, n_steps: int, *, delta: float = 1e-5) -> Spent:
    return spent([make_event(noise, sampled, n_steps)], delta=delta)


def exact_epsilon(noise: float, delta: float) -> float:
    """Of one release to everybody: the analytic Gaussian mechanism, Balle & Wang 2018, Theorem 8.

    δ(ε) = Φ(1/2z − εz) − e^ε·Φ(−1/2z − εz).
    """

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2.0)) / 2.0

    def delta_of(epsilon: float) -> float:
        near, far = 0.5 / noise - epsilon * noise, -0.5 / noise - epsilon * noise
        return phi(near) - math.exp(epsilon) * phi(far)

    low, high = 0.0, 500.0
    for _ in range(100):
        middle = (low + high) / 2.0
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


# Against other sources


@pytest.mark.parametrize(
    ("noise", "sampled", "n_steps", "delta", "pld", "rdp"),
    [
        (1.0, 0.01, 1000, 1e-5, 1.8282, 2.1014),
        (0.7, 0.032, 93, 1e-4, 4.2532, 5.2421),
        (2.0, 1.0, 10, 1e-5, 7.5113, 8.0794),
        (1.1, 0.004, 10_000, 1e-6, 2.0951, 2.2617),
    ],
)
def test_the_reference_values_of_the_design_are_met(
    noise: float, sampled: float, n_steps: int, delta: float, pld: float, rdp: float
) -> None:
    found = one(noise, sampled, n_steps, delta=delta)
    assert found.pld == pytest.approx(pld, abs=5e-4)
    assert found.rdp == pytest.approx(rdp, abs=5e-4)
    assert found.epsilon == found.pld


@pytest.mark.filterwarnings("ignore")  # of opacus and of what it imports
@pytest.mark.parametrize(
    ("history", "delta"),
    [
        ([(1.0, 0.01, 1000)], 1e-5),
        ([(1.1, 0.004, 10_000)], 1e-6),
        ([(0.8, 0.1, 10)], 1e-5),
        ([(1.0, 0.01, 500), (1.5, 0.02, 300)], 1e-5),
    ],
)
def test_opacus_is_of_the_same_opinion(
    history: list[tuple[float, float, int]], delta: float
) -> None:
    from opacus.accountants import PRVAccountant, RDPAccountant

    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history, rdp.history = list(history), list(history)
    found = spent([make_event(*step) for step in history], delta=delta)
    assert found.rdp == pytest.approx(rdp.get_epsilon(delta), rel=1e-3)
    # What it returns is an upper bound, with an error on either side of its estimate.
    upper = prv.get_epsilon(delta, eps_error=0.005)
    assert upper - 2 * 0.0055 <= found.pld <= upper


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize("sampled", [1.0, ALMOST_ALL])
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0, 4.0, 100.0])
def test_one_release_to_all_costs_what_the_analytic_formula_says(
    noise: float, sampled: float, delta: float
) -> None:
    # Guarantee 1: never below, and not far above.
    exact = exact_epsilon(noise, delta)
    found = one(noise, sampled, 1, delta=delta).pld
    assert exact * (1.0 - 1e-6) <= found <= exact * 1.0001 + 1e-4


@pytest.mark.parametrize(("noise", "n_steps"), [(2.0, 10), (30.0, 1000), (30_000.0, 100_000)])
@pytest.mark.parametrize("sampled", [1.0, ALMOST_ALL])
def test_n_releases_cost_what_one_with_root_n_times_less_noise_costs(
    noise: float, n_steps: int, sampled: float
) -> None:
    # Guarantee 1, for steps so small that a grid of a fixed width would be too coarse for them.
    exact = exact_epsilon(noise / math.sqrt(n_steps), 1e-7)
    found = one(noise, sampled, n_steps, delta=1e-7).pld
    assert exact * (1.0 - 1e-6) <= found <= exact * 1.001


def test_releases_of_different_noise_are_composed_as_the_analytic_formula_says() -> None:
    mixed = [make_event(2.0, ALMOST_ALL, 5), make_event(3.0, ALMOST_ALL, 7), make_event(3.0)]
    exact = exact_epsilon((5 / 4 + 7 / 9 + 1 / 9) ** -0.5, 1e-6)
    assert exact <= spent(mixed, delta=1e-6).pld <= exact * 1.0001


@pytest.mark.parametrize(("noise", "sampled", "n_steps"), [(1.0, 1e-4, 1000), (1.0, 0.001, 10)])
def test_a_finer_grid_makes_no_difference_to_rare_samples(
    noise: float, sampled: float, n_steps: int
) -> None:
    # Guarantee 1, where RDP is a poor guide to the width of the grid's cells.
    event = make_event(noise, sampled, n_steps)
    fine = accounting._epsilon_by_pld([event], 1e-5, 2.0**-15)
    found = spent([event], delta=1e-5)
    assert found.rdp > 4 * found.pld
    assert fine <= found.pld <= fine + 0.002


def test_the_grid_of_one_step_has_a_bounded_size() -> None:
    # Or a ledger with one noisy and many quiet releases would take minutes and gigabytes.
    strong, many = make_event(0.05, 0.01), make_event(5.0, 0.01, 100_000)
    width = accounting._cell_width([strong, many], spent([many], delta=1e-5).rdp)
    loss = accounting._step_loss(0.05, 0.01, width)
    assert 1 << 16 < loss._pmf_remove.size <= 1 << 19


def test_epsilons_are_not_added() -> None:
    first, second = make_event(1.0, 0.01, 300), make_event(2.0, 0.1, 50)
    alone = [spent([event], delta=1e-5).epsilon for event in (first, second)]
    together = spent([first, second], delta=1e-5).epsilon
    assert max(alone) < together < 0.9 * sum(alone)


# Properties


@few
@given(st.lists(events, min_size=1, max_size=3), st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_rdp_is_never_below_pld(releases: list[SampledGaussian], delta: float) -> None:
    # Guarantee 3.
    found = spent(releases, delta=delta)
    assert 0.0 < found.pld <= found.rdp * 1.001 + 1e-3


@few
@given(st.lists(events, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_order_and_splitting_do_not_matter(releases: list[SampledGaussian], random: Any) -> None:
    # Guarantee 2. The store of results must not answer in place of the accountant.
    first = spent(releases, delta=1e-5)
    split = []
    for event in releases:
        n_before = random.randint(0, event.n_steps)
        split += [
            make_event(event.noise_multiplier, event.sampling_probability, n_steps)
            for n_steps in (n_before, event.n_steps - n_before)
        ]
    random.shuffle(split)
    accounting._composed.cache_clear()
    assert spent(split, delta=1e-5) == first


@few
@given(events)
def test_epsilon_grows_with_steps_and_sampling_and_falls_with_noise(
    event: SampledGaussian,
) -> None:
    noise, n_steps = event.noise_multiplier, event.n_steps
    for cheaper, dearer in (
        (one(noise, 0.1, n_steps), one(noise, 0.1, 2 * n_steps)),
        (one(noise, 0.1, n_steps), one(noise, 0.15, n_steps)),
        (one(1.2 * noise, 0.1, n_steps), one(noise, 0.1, n_steps)),
    ):
        assert cheaper.pld < dearer.pld
        assert cheaper.rdp < dearer.rdp


def test_epsilon_grows_as_delta_falls() -> None:
    found = [one(1.0, 0.1, 10, delta=delta).pld for delta in (1e-2, 1e-4, 1e-6, 1e-8)]
    assert all(a < b for a, b in pairwise(found))


# The ends of the ranges


def test_nothing_released_costs_nothing() -> None:
    nothing = Spent(pld=0.0, rdp=0.0)
    assert spent([], delta=1e-5) == nothing
    for sampled in (0.5, 1.0):
        empty = [make_event(noise, sampled, n_steps=0) for noise in (1.0, 1e-9)]
        assert spent(empty, delta=1e-5) == nothing


def test_almost_no_noise_promises_nothing() -> None:
    nothing_promised = Spent(pld=math.inf, rdp=math.inf)
    for noise in (0.99 * LEAST_MULTIPLIER, 1e-200, 5e-324):
        assert one(noise, 0.001, 1) == nothing_promised
    assert one(LEAST_MULTIPLIER, 1.0, 1) == nothing_promised
    assert one(1.0, 1.0, 10_000) == nothing_promised
    assert spent([make_event(), make_event(1e-9)], delta=1e-5) == nothing_promised


def test_the_largest_epsilon_is_still_a_number() -> None:
    found = one(0.037, 1.0, 1)
    assert 0.95 * MAX_EPSILON < found.rdp <= MAX_EPSILON
    assert found.pld == pytest.approx(exact_epsilon(0.037, 1e-5), rel=1e-3)


def test_noise_without_end_and_samples_of_almost_nobody_cost_nothing() -> None:
    assert one(1e300, 1.0, 5).epsilon == 0.0
    assert one(1.0, 5e-324, 5).epsilon == 0.0


def test_a_composition_that_is_too_long_is_refused() -> None:
    for n_steps in (MAX_STEPS + 1, 10**400):
        with pytest.raises(AccountingError, match=f"at most {MAX_STEPS}"):
            one(1e3, 1.0, n_steps)
    assert one(1e3, 1.0, MAX_STEPS).pld == pytest.approx(exact_epsilon(1.0, 1e-5), rel=1e-4)


@pytest.mark.parametrize(
    ("sampled", "n_steps", "delta", "least"),
    [(1.0, 1, 0.99e-12, "1e-12"), (0.01, 1000, 0.99e-11, "1e-11")],
)
def test_a_delta_that_rounding_would_hide_is_refused(
    sampled: float, n_steps: int, delta: float, least: str
) -> None:
    with pytest.raises(AccountingError, match=f"choose {least} or more"):
        one(1.0, sampled, n_steps, delta=delta)
    assert one(1.0, sampled, n_steps, delta=float(least)).pld > 0.0


def test_the_smallest_delta_is_not_hidden_by_rounding() -> None:
    exact = exact_epsilon(1.0, 1e-10)
    found = one(100.0, ALMOST_ALL, 10_000, delta=1e-10).pld
    assert exact <= found <= exact * 1.001


# Faults


@pytest.mark.parametrize("pld", [2.002, 3.0, math.inf, math.nan])
def test_an_accountant_that_contradicts_the_other_is_found(
    pld: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounting._composed.cache_clear()
    monkeypatch.setattr(accounting, "_epsilon_by_rdp", lambda *_: 2.0)
    monkeypatch.setattr(accounting, "_epsilon_by_pld", lambda *_: 2.001)
    assert one(1.0, 0.5, 1).pld == 2.001
    accounting._composed.cache_clear()
    monkeypatch.setattr(accounting, "_epsilon_by_pld", lambda *_: pld + 1e-2)
    with pytest.raises(AccountingError, match="RDP, which cannot be less"):
        one(1.0, 0.5, 1)


def test_orders_that_rdp_skips_are_not_logged_and_other_warnings_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    accounting._step_divergences.cache_clear()
    accounting._composed.cache_clear()
    one(0.7, 0.032, 93)
    assert not caplog.records
    RdpAccountant().compose(PoissonSampledDpEvent(0.032, GaussianDpEvent(0.7)))
    assert "failed to converge" in caplog.text
    with accounting._without_warnings_of_rdp():
        logging.getLogger("absl").warning("something else")
    assert "something else" in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("noise_multiplier", value) for value in (0.0, -1.0, math.inf, math.nan)],
        *[("sampling_probability", value) for value in (0.0, -0.1, 1.0 + 1e-9, math.nan)],
        *[("n_steps", value) for value in (-1, 1.0, True, math.nan, None)],
    ],
)
def test_an_event_that_cannot_be_is_refused(field: str, value: Any) -> None:
    fields: dict[str, Any] = {**vars(make_event()), field: value}
    with pytest.raises(AccountingError, match=str(value)):
        SampledGaussian(**fields)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, math.inf])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    for releases in ([], [make_event()]):
        with pytest.raises(AccountingError, match="δ = "):
            spent(releases, delta=delta)


def test_the_usual_delta_is_less_than_one_in_n() -> None:
    assert usual_delta(2) == pytest.approx(0.4665165)
    assert usual_delta(10_000) == pytest.approx(3.9810717e-5)


@pytest.mark.parametrize("n_units", [1, 0, -5])
def test_no_delta_is_usual_for_fewer_than_two(n_units: int) -> None:
    with pytest.raises(AccountingError, match=f"{n_units} units"):
        usual_delta(n_units)


# Calibration


def fake_spent(releases: Sequence[SampledGaussian], *, delta: float) -> Spent:
    """An accountant that takes no time: ε grows as it should, by a simple formula."""
    epsilon = sum(e.n_steps * e.sampling_probability / e.noise_multiplier**2 for e in releases)
    return Spent(pld=epsilon - math.log10(delta) * epsilon**0.5, rdp=math.inf)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    st.floats(0.01, 20.0),
    st.sampled_from([1e-3, 1e-5]),
    st.sampled_from([0.02, 1.0]),
    st.integers(1, 40),
    st.lists(events, max_size=3),
)
def test_calibrated_noise_spends_the_budget_and_no_more(
    more: float, delta: float, sampled: float, n_steps: int, earlier: list[SampledGaussian]
) -> None:
    # Guarantees 1 and 2 of calibrate. The budget is `more` on top of what was spent.
    budget = more + fake_spent(earlier, delta=delta).epsilon
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounting, "spent", fake_spent)
        noise = calibrate(
            epsilon=budget,
            delta=delta,
            sampling_probability=sampled,
            n_steps=n_steps,
            earlier=earlier,
        )

    def total(multiplier: float) -> float:
        releases = [*earlier, make_event(multiplier, sampled, n_steps)]
        return fake_spent(releases, delta=delta).epsilon

    assert total(noise) <= budget < total(noise / 1.001)


def test_calibration_finds_the_noise_of_the_analytic_formula() -> None:
    noise = calibrate(
        epsilon=exact_epsilon(1.0, 1e-5), delta=1e-5, sampling_probability=1.0, n_steps=4
    )
    assert 2.0 <= noise <= 2.0 * 1.001


def test_what_was_released_before_needs_more_noise_now() -> None:
    # Of the precision 1/1.0² that the budget allows, 1/2.0² is used up.
    noise = calibrate(
        epsilon=exact_epsilon(1.0, 1e-5),
        delta=1e-5,
        sampling_probability=1.0,
        n_steps=1,
        earlier=[make_event(2.0)],
    )
    exact = 0.75**-0.5
    assert exact <= noise <= exact * 1.001


def test_a_budget_without_end_still_asks_for_some_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "spent", fake_spent)
    noise = calibrate(epsilon=1e9, delta=1e-5, sampling_probability=1.0, n_steps=1)
    assert LEAST_MULTIPLIER <= noise <= LEAST_MULTIPLIER * 1.001


def test_a_budget_that_is_already_spent_is_refused() -> None:
    with pytest.raises(AccountingError, match="already spent"):
        calibrate(
            epsilon=1.0,
            delta=1e-5,
            sampling_probability=0.01,
            n_steps=1,
            earlier=[make_event(2.0, n_steps=10)],
        )


def test_a_budget_that_no_noise_keeps_is_refused() -> None:
    before = make_event(1.0)
    with pytest.raises(AccountingError, match=f"even a noise multiplier of {MAX_MULTIPLIER:g}"):
        calibrate(
            epsilon=spent([before], delta=1e-5).epsilon,
            delta=1e-5,
            sampling_probability=1.0,
            n_steps=100,
            earlier=[before],
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("epsilon", value) for value in (0.0, -1.0, math.inf, math.nan)],
        *[("delta", value) for value in (0.0, 1.0, math.nan)],
        *[("sampling_probability", value) for value in (0.0, 1.5, math.nan)],
        *[("n_steps", value) for value in (0, -1, 1.5)],
    ],
)
def test_a_calibration_that_makes_no_sense_is_refused(field: str, value: Any) -> None:
    fields: dict[str, Any] = {
        "epsilon": 1.0,
        "delta": 1e-5,
        "sampling_probability": 1.0,
        "n_steps": 1,
        field: value,
    }
    with pytest.raises(AccountingError, match=str(value)):
        calibrate(**fields)


def test_the_accountant_does_without_torch() -> None:
    script = "import sys, privacy.accounting; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)

"""Server optimisers: the paper's formulae value by value, and states that outlive a process."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator_server.aggregation.optimizers import (
    RULES,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    Optimizer,
    OptimizerState,
    apply,
    initial_state,
)
from aggregator_server.errors import AggregationError

N_VALUES = 7
STATEFUL = [
    FedAvgM(learning_rate=0.7, momentum=0.8),
    FedAdagrad(learning_rate=0.3, tau=0.02),
    FedAdagrad(learning_rate=0.3, beta1=0.5, tau=0.02),
    FedAdam(learning_rate=0.3, beta1=0.6, beta2=0.9, tau=0.02),
    FedYogi(learning_rate=0.3, beta1=0.6, beta2=0.9, tau=0.02),
]
finite = st.floats(-1e3, 1e3, allow_subnormal=False)


def name_of(value: object) -> str | None:
    return f"{value.rule}-{getattr(value, 'beta1', '')}" if isinstance(value, Optimizer) else None


def run(optimizer: Optimizer, means: np.ndarray, state: OptimizerState | None = None):
    """The steps, and the last state."""
    state = state or initial_state(optimizer, n_values=means.shape[1])
    steps = []
    for mean in means:
        step, state = apply(optimizer, state, mean)
        steps.append(step)
    return np.array(steps), state


def make_means(n: int = 6, *, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, N_VALUES)) * 10.0 ** rng.integers(-4, 1, (n, N_VALUES))


def slow_steps(optimizer: Optimizer, deltas: list[float]) -> list[float]:
    """One value at a time, written from algorithm 2 of arXiv 2003.00295 and 1909.06335."""
    steps = []
    m, eta = 0.0, optimizer.learning_rate
    v = getattr(optimizer, "tau", 0.0) ** 2
    for delta in deltas:
        if isinstance(optimizer, FedAvg):
            steps.append(eta * delta)
            continue
        if isinstance(optimizer, FedAvgM):
            m = optimizer.momentum * m + delta
            steps.append(eta * m)
            continue
        m = optimizer.beta1 * m + (1 - optimizer.beta1) * delta
        if optimizer.rule == "fedadagrad":
            v = v + delta**2
        elif optimizer.rule == "fedadam":
            v = optimizer.beta2 * v + (1 - optimizer.beta2) * delta**2
        else:
            sign = math.copysign(1.0, v - delta**2) if v != delta**2 else 0.0
            v = v - (1 - optimizer.beta2) * delta**2 * sign
        steps.append(eta * m / (math.sqrt(v) + optimizer.tau))
    return steps


@pytest.mark.parametrize("optimizer", [FedAvg(learning_rate=0.5), *STATEFUL], ids=name_of)
@settings(max_examples=60, deadline=None)
@given(deltas=st.lists(finite, min_size=1, max_size=8))
def test_every_step_is_the_papers(optimizer, deltas):
    steps, _ = run(optimizer, np.array(deltas)[:, None])
    np.testing.assert_allclose(steps[:, 0], slow_steps(optimizer, deltas), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("optimizer", STATEFUL, ids=name_of)
def test_values_do_not_mix(optimizer):
    means = make_means()
    steps, _ = run(optimizer, means)
    slow = np.array([slow_steps(optimizer, list(column)) for column in means.T]).T
    np.testing.assert_allclose(steps, slow, rtol=1e-12)


def test_the_defaults_are_the_papers():
    assert (FedAvg().learning_rate, FedAvgM().learning_rate, FedAvgM().momentum) == (1.0, 1.0, 0.9)
    assert FedAdagrad().beta1 == 0.0
    for kind in (FedAdam, FedYogi):
        assert (kind().beta1, kind().beta2, kind().tau) == (0.9, 0.99, 1e-3)


def test_yogi_leaves_v_where_it_equals_the_square():
    optimizer = FedYogi(tau=0.5)
    _, state = apply(optimizer, initial_state(optimizer, n_values=1), np.array([0.5]))
    assert state.v.tolist() == [0.25]


def test_fedavg_gives_the_mean_itself_and_keeps_no_state():
    mean = make_means(1)[0]
    step, state = apply(FedAvg(), initial_state(FedAvg(), n_values=N_VALUES), mean)
    assert step.tobytes() == mean.tobytes()
    assert step is not mean
    assert state is None


def test_momentum_zero_is_fedavg():
    means = make_means()
    steps, state = run(FedAvgM(momentum=0.0), means)
    assert steps.tobytes() == means.tobytes()
    assert state.m is None


def test_small_updates_move_by_half_a_step_of_fedavg_at_the_default_rate():
    mean = np.full(3, 1e-6)
    step, _ = apply(FedAdagrad(), initial_state(FedAdagrad(), n_values=3), mean)
    np.testing.assert_allclose(step, mean / 2, rtol=1e-5)


def test_squares_far_below_tau_squared_still_count():
    optimizer = FedAdagrad()
    _, state = run(optimizer, np.full((4, 1), 1e-7))
    assert state.v[0] - optimizer.tau**2 == pytest.approx(4e-14, rel=1e-2)


@pytest.mark.parametrize("optimizer", STATEFUL, ids=name_of)
def test_nothing_that_is_given_changes(optimizer):
    means = make_means(2)
    _, state = run(optimizer, means[:1])
    kept, mean = state.to_bytes(), means[1].copy()
    first = apply(optimizer, state, mean)
    again = apply(optimizer, state, mean)
    assert state.to_bytes() == kept
    assert mean.tobytes() == means[1].tobytes()
    assert first[0].tobytes() == again[0].tobytes()
    assert first[1].to_bytes() == again[1].to_bytes()
    assert first[1].n_steps == state.n_steps + 1


@pytest.mark.parametrize("optimizer", STATEFUL, ids=name_of)
def test_a_killed_server_goes_on_as_one_that_was_not(optimizer):
    means = make_means(6)
    steps, last = run(optimizer, means)
    _, before = run(optimizer, means[:3])
    restored = OptimizerState.from_bytes(before.to_bytes())
    resumed_steps, resumed = run(optimizer, means[3:], restored)
    assert resumed_steps.tobytes() == steps[3:].tobytes()
    assert resumed.to_bytes() == last.to_bytes()
    assert (resumed.rule, resumed.n_steps) == (optimizer.rule, 6)


def test_equal_states_give_equal_bytes_in_every_process():
    script = (
        "from aggregator_server.aggregation.optimizers import *;"
        "print(initial_state(FedAdam(), n_values=3).to_bytes().hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()
        for _ in range(3)
    }
    assert found == {initial_state(FedAdam(), n_values=3).to_bytes().hex()}


@pytest.mark.parametrize("optimizer", STATEFUL, ids=name_of)
@pytest.mark.parametrize("name", ["m", "v"])
def test_a_state_of_another_length_is_refused(optimizer, name):
    _, state = run(optimizer, make_means(1))
    if getattr(state, name) is None:
        other = dataclasses.replace(state, **{name: np.ones(N_VALUES)})
    else:
        other = dataclasses.replace(state, **{name: np.ones(N_VALUES + 1)})
    with pytest.raises(AggregationError, match=f"has {name} of shape"):
        apply(optimizer, other, np.ones(N_VALUES))


@pytest.mark.parametrize("optimizer", STATEFUL, ids=name_of)
def test_a_state_that_is_missing_or_of_another_optimizer_is_refused(optimizer):
    with pytest.raises(AggregationError, match="was given no state"):
        apply(optimizer, None, np.ones(N_VALUES))
    other = next(each for each in STATEFUL if each.rule != optimizer.rule)
    with pytest.raises(AggregationError, match="was given the state of"):
        apply(optimizer, initial_state(other, n_values=N_VALUES), np.ones(N_VALUES))


def test_fedavg_refuses_a_state():
    with pytest.raises(AggregationError, match="keeps no state"):
        apply(FedAvg(), initial_state(FedAdam(), n_values=3), np.ones(3))


@pytest.mark.parametrize("bad", [np.array([1.0, np.nan]), np.array([np.inf, 0.0]), np.ones((2, 1))])
@pytest.mark.parametrize("optimizer", [FedAvg(), FedAdam()], ids=name_of)
def test_a_mean_that_is_not_a_finite_vector_is_refused(optimizer, bad):
    with pytest.raises(AggregationError, match=r"the mean update has .* not finite"):
        apply(optimizer, initial_state(optimizer, n_values=2), bad)


@pytest.mark.parametrize(
    ("optimizer", "value"),
    [
        (FedAvg(learning_rate=1e10), 1e300),
        (FedAvgM(learning_rate=1e10), 1e300),
        (FedAdagrad(), 1e200),
        (FedAdam(), 1e200),
        (FedYogi(), 1e200),
    ],
    ids=name_of,
)
def test_a_step_beyond_float64_is_refused(optimizer, value):
    with pytest.raises(AggregationError, match="not finite"):
        apply(optimizer, initial_state(optimizer, n_values=1), np.array([value]))


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        *((kind, "learning_rate", value) for kind in RULES.values() for value in (0.0, math.inf)),
        (FedAvgM, "momentum", 1.0),
        *((kind, "beta1", -0.1) for kind in (FedAdagrad, FedAdam, FedYogi)),
        *((kind, "beta2", 1.0) for kind in (FedAdam, FedYogi)),
        *((kind, "tau", 0.0) for kind in (FedAdagrad, FedAdam, FedYogi)),
        (FedAdam, "tau", math.nan),
    ],
)
def test_a_setting_out_of_range_is_refused(kind, setting, value):
    with pytest.raises(AggregationError, match=f"{setting} must be .* not {value}"):
        kind(**{setting: value})


def test_bytes_that_are_no_state_are_refused():
    with pytest.raises(AggregationError, match="not an optimiser's state"):
        OptimizerState.from_bytes(b"\x80\x04}.")  # a pickle


N_STEPS = np.array([1], np.int64)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"fedavg.m": np.ones(2), "fedadam.v": np.ones(2), "fedadam.n_steps": N_STEPS},
        {"sgd.m": np.ones(2), "sgd.n_steps": N_STEPS},
        {"fedadam.m": np.ones(2), "fedadam.v": np.ones(2)},
        {"fedadam.n_steps": -N_STEPS},
        {"fedadam.n_steps": N_STEPS.astype(np.float64)},
        {"fedadam.m": np.ones(2, np.float32), "fedadam.n_steps": N_STEPS},
        {"fedadam.m": np.ones((2, 1)), "fedadam.n_steps": N_STEPS},
        {"fedadam.m": np.array([np.nan]), "fedadam.n_steps": N_STEPS},
        {"fedadam.v": np.array([-1e-9]), "fedadam.n_steps": N_STEPS},
        {"fedadam.w": np.ones(2), "fedadam.n_steps": N_STEPS},
    ],
)
def test_values_that_no_optimizer_leaves_are_refused(tensors):
    with pytest.raises(AggregationError):
        OptimizerState.from_bytes(safetensors.numpy.save(tensors))


def test_a_state_without_a_moment_that_the_settings_need_is_refused():
    state = OptimizerState(rule="fedadam", n_steps=1, m=np.zeros(2), v=None)
    with pytest.raises(AggregationError, match="has v of shape None"):
        apply(FedAdam(), state, np.ones(2))

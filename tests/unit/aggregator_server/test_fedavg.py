"""Weighted averaging: the right numbers, in little memory, or an error."""

import weakref

import numpy as np
import pytest

from aggregator_server.aggregation.fedavg import apply_mean, average
from aggregator_server.errors import AggregationError
from privacy.updates import CellSum, PlainUpdate

N_VALUES = 1000


def make_updates(n: int, *, seed: int = 0) -> list[PlainUpdate]:
    rng = np.random.default_rng(seed)
    return [
        PlainUpdate(
            vector=rng.standard_normal(N_VALUES).astype(np.float32),
            weight=int(rng.integers(1, 500)),
        )
        for _ in range(n)
    ]


def cells_of(updates):
    return (CellSum.of_plain(update) for update in updates)


def test_the_mean_is_the_weighted_mean_in_float64():
    updates = make_updates(9)
    expected = np.average(
        [update.vector.astype(np.float64) for update in updates],
        axis=0,
        weights=[update.weight for update in updates],
    )
    result = average(cells_of(updates), n_values=N_VALUES)
    np.testing.assert_allclose(result.mean, expected, rtol=1e-5, atol=1e-7)
    assert result.n_agents == result.n_cells == 9
    assert result.weight_sum == sum(update.weight for update in updates)
    assert result.norm == pytest.approx(np.linalg.norm(expected), rel=1e-6)


def test_equal_cells_in_equal_order_give_equal_bits():
    updates = make_updates(9)
    first = average(cells_of(updates), n_values=N_VALUES).mean
    again = average(cells_of(updates), n_values=N_VALUES).mean
    assert first.tobytes() == again.tobytes()


@pytest.mark.parametrize("n_agents", [4, 64])
def test_memory_does_not_depend_on_the_number_of_cells(n_agents):
    made: list[weakref.ref[CellSum]] = []
    most_alive = 0

    def make_cell() -> CellSum:
        nonlocal most_alive
        update = PlainUpdate(vector=np.ones(N_VALUES, np.float32), weight=1)
        cell = CellSum.of_plain(update)
        made.append(weakref.ref(cell))
        most_alive = max(most_alive, sum(ref() is not None for ref in made))
        return cell

    average((make_cell() for _ in range(n_agents)), n_values=N_VALUES)
    assert len(made) == n_agents
    assert most_alive == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_mean_that_is_not_finite_is_refused(value):
    values = np.array([0, value, 0], np.float32)
    cell = CellSum(weighted_sum=values, weight_sum=2, n_members=1)
    with pytest.raises(AggregationError, match="not finite"):
        average([cell], n_values=3)


def test_opposite_infinities_do_not_slip_through():
    cells = [
        CellSum(weighted_sum=np.array([sign * np.inf], np.float32), weight_sum=1, n_members=1)
        for sign in (1, -1)
    ]
    with pytest.raises(AggregationError, match="not finite"):
        average(cells, n_values=1)


def test_no_cell_is_refused():
    with pytest.raises(AggregationError, match="no cell"):
        average([], n_values=3)


@pytest.mark.parametrize(("n_values", "weight"), [(4, 1), (3, 0)])
def test_a_cell_of_another_length_or_without_weight_is_refused(n_values, weight):
    cell = CellSum(weighted_sum=np.zeros(n_values, np.float32), weight_sum=weight, n_members=1)
    with pytest.raises(AggregationError, match="expected"):
        average([cell], n_values=3)


def test_the_mean_is_added_in_float64_and_rounded_once():
    vector = np.array([1.0], np.float32)
    mean = np.array([2.0**-24 + 2.0**-50])
    assert apply_mean(vector, mean)[0] == np.float32(1 + 2.0**-23)


def test_a_new_adapter_beyond_float32_is_refused():
    with pytest.raises(AggregationError, match="not finite"):
        apply_mean(np.array([3e38], np.float32), np.array([3e38]))

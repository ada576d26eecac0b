"""What a round makes of updates read one by one: the covariance gap, FlexLoRA; against products."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from aggregator_server.aggregation.lora import flexlora
from aggregator_server.aggregation.lora_flex import flexlora_step
from aggregator_server.aggregation.lora_gap import N_DIMS, estimate_gap, kept_updates
from aggregator_server.aggregation.lora_pairs import Cohort, local_adapter
from aggregator_server.aggregation.robust.units import ArrayUnits
from aggregator_server.errors import AggregationError
from privacy.updates import PlainUpdate
from protocol.blocks import Factor, LoraBlock
from quant.adapter import flatten, sent_layout, tensor_name, unflatten

SCALE = 2.0


def layout_of(modules, rank, sent=(Factor.A, Factor.B)):
    shapes = {}
    for name, (d_out, d_in) in modules.items():
        shapes[tensor_name(name, Factor.A)] = (rank, d_in)
        shapes[tensor_name(name, Factor.B)] = (d_out, rank)
    return sent_layout(shapes, sent)


def seed_of(number):
    return number.to_bytes(32, "big")


def products(vector, layout, modules):
    arrays = unflatten(vector, layout)
    return {
        name: SCALE
        * arrays[tensor_name(name, Factor.B)].astype(np.float64)
        @ arrays[tensor_name(name, Factor.A)].astype(np.float64)
        for name in modules
    }


def dense_norms(shares, updates, start, layout, modules):
    """‖gap‖ and ‖change‖ with every product multiplied out."""
    mean = sum(p * u.astype(np.float64) for p, u in zip(shares, updates, strict=True))
    of_means = products((start + mean).astype(np.float32), layout, modules)
    before = products(start, layout, modules)
    each = [products(start + update, layout, modules) for update in updates]
    gap = change = 0.0
    for name in modules:
        ideal = sum(p * one[name] for p, one in zip(shares, each, strict=True))
        gap += np.sum((ideal - of_means[name]) ** 2)
        change += np.sum((ideal - before[name]) ** 2)
    return np.sqrt(gap), np.sqrt(change)


def draw(modules, rank, n_agents, seed):
    rng = np.random.default_rng(seed)
    layout = layout_of(modules, rank)
    make = lambda: rng.standard_normal(layout.n_values).astype(np.float32)  # noqa: E731
    weights = rng.integers(1, 300, n_agents)
    return layout, weights / weights.sum(), [make() for _ in range(n_agents)], make()


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    sides=st.lists(
        st.tuples(st.integers(1, N_DIMS), st.integers(1, N_DIMS)), min_size=1, max_size=3
    ),
    rank=st.integers(1, 4),
    n_agents=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_on_small_layers_it_is_the_norm_of_the_dense_covariance(sides, rank, n_agents, seed):
    modules = {f"m{index}": side for index, side in enumerate(sides)}
    layout, shares, updates, start = draw(modules, rank, n_agents, seed)
    found = estimate_gap(
        zip(shares, updates, strict=True),
        start=start,
        layout=layout,
        scale=SCALE,
        seed=seed_of(seed),
    )
    gap, change = dense_norms(shares, updates, start, layout, modules)
    assert found.estimated_norm == pytest.approx(gap, rel=1e-4, abs=1e-4 * change)
    assert found.estimated_change_norm == pytest.approx(change, rel=1e-5)


def test_on_large_layers_its_square_is_right_in_the_mean_and_its_spread_is_bounded():
    modules = {"m": (700, 900)}
    layout, shares, updates, start = draw(modules, 1, 2, 3)  # a gap of rank one: the worst case
    gap, change = dense_norms(shares, updates, start, layout, modules)
    n_seeds = 300
    ratios = np.empty((n_seeds, 2))
    for number in range(n_seeds):
        found = estimate_gap(
            zip(shares, updates, strict=True),
            start=start,
            layout=layout,
            scale=SCALE,
            seed=seed_of(number),
        )
        ratios[number] = found.estimated_norm / gap, found.estimated_change_norm / change
    squares = ratios**2
    bound = np.sqrt(4 / N_DIMS + 4 / N_DIMS**2)
    assert np.abs(squares.mean(axis=0) - 1).max() < 4 * bound / np.sqrt(n_seeds)
    assert 0.5 * bound < squares[:, 0].std() < 1.2 * bound
    assert ratios[:, 0].std() < 0.6 * bound  # about 9 % of the norm


def test_one_agent_and_agents_that_agree_lose_nothing():
    modules = {"m": (40, 300)}
    layout, _shares, (update,), start = draw(modules, 2, 1, 5)
    for shares in ([1.0], [0.25, 0.75]):
        found = estimate_gap(
            ((share, update) for share in shares),
            start=start,
            layout=layout,
            scale=SCALE,
            seed=seed_of(1),
        )
        assert found.estimated_norm < 1e-10 * found.estimated_change_norm


def test_memory_does_not_grow_with_the_agents():
    modules = {"m": (4000, 4000)}
    layout = layout_of(modules, 4)
    start = np.zeros(layout.n_values, np.float32)

    def peak(n_agents):
        updates = (
            (1 / n_agents, np.random.default_rng(k).standard_normal(layout.n_values, np.float32))
            for k in range(n_agents)
        )
        tracemalloc.start()
        estimate_gap(updates, start=start, layout=layout, scale=SCALE, seed=seed_of(0))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(12) < 1.2 * peak(2)


def test_the_kept_are_weighted_among_themselves_and_scaled_as_the_filter_says():
    means = np.arange(6, dtype=np.float32).reshape(3, 2)
    units = ArrayUnits(means, np.array([1, 5, 3], np.int64))
    kept, factors = np.array([True, False, True]), np.array([1.0, 0.0, 0.5])
    found = list(kept_updates(units, kept, factors))
    assert [share for share, _ in found] == [0.25, 0.75]
    np.testing.assert_array_equal([vector for _, vector in found], [[0, 1], [2, 2.5]])


def test_a_factor_that_stays_and_updates_of_another_length_are_refused():
    modules = {"m": (3, 4)}
    alone = layout_of(modules, 2, (Factor.B,))
    start = np.zeros(alone.n_values, np.float32)
    with pytest.raises(AggregationError, match="sends B alone"):
        estimate_gap([(1.0, start)], start=start, layout=alone, scale=1.0, seed=seed_of(0))
    layout = layout_of(modules, 2)
    whole = np.zeros(layout.n_values, np.float32)
    with pytest.raises(AggregationError, match="layout has 14"):
        estimate_gap([(1.0, whole[1:])], start=whole, layout=layout, scale=1.0, seed=seed_of(0))


# FlexLoRA, some modules at a time.


def flex_case(n_agents=4, rank=3, seed=0):
    modules = {"m0": (9, 7), "m1": (5, 11), "m2": (30, 20)}
    layout, _shares, updates, start = draw(modules, rank, n_agents, seed)
    weights = np.random.default_rng(seed).integers(1, 99, n_agents)
    units = ArrayUnits(np.stack(updates), weights)
    lora = LoraBlock(rank=rank, alpha=SCALE * rank, target_modules=("m0",), init_seed=1)
    return modules, layout, units, start, lora


@pytest.mark.parametrize("group_bytes", [1, 4 * 4 * 3 * 40, 1 << 28])
def test_flexlora_by_groups_is_flexlora_of_all_agents_at_once(group_bytes):
    _modules, layout, units, start, lora = flex_case()
    arrays = unflatten(start, layout)
    agents = tuple(
        local_adapter(PlainUpdate(vector=units.load(k), weight=int(w)), arrays, layout, scale=SCALE)
        for k, w in enumerate(units.weights)
    )
    best = flexlora(Cohort(agents=agents), rank=lora.rank, scale=SCALE)
    found = flexlora_step(units, start, layout, lora, group_bytes=group_bytes)
    np.testing.assert_allclose(
        start + found.step, flatten(best.adapter.arrays(), layout), atol=1e-5
    )
    assert found.error_norm == pytest.approx(best.error_norm, rel=1e-5)


def test_the_step_of_flexlora_leads_to_the_nearest_product_of_its_rank():
    modules, layout, units, start, lora = flex_case(seed=3)
    found = flexlora_step(units, start, layout, lora)
    after = products((start + found.step).astype(np.float32), layout, modules)
    shares = units.weights / units.weights.sum()
    missing = cut_off = 0.0
    for name in modules:
        each = (products(start + units.load(k), layout, modules)[name] for k in range(4))
        ideal = sum(p * product for p, product in zip(shares, each, strict=True))
        missing += np.sum((ideal - after[name]) ** 2)
        cut_off += np.sum(np.linalg.svd(ideal, compute_uv=False)[lora.rank :] ** 2)
    assert np.sqrt(missing) == pytest.approx(np.sqrt(cut_off), rel=1e-4)
    assert found.error_norm == pytest.approx(np.sqrt(cut_off), rel=1e-4)


def test_groups_are_read_one_after_another():
    _modules, layout, units, start, lora = flex_case()
    loads = []
    load = units.load
    units.load = lambda index: (loads.append(index), load(index))[1]
    flexlora_step(units, start, layout, lora, group_bytes=1)
    assert loads == [0, 1, 2, 3] * 3


def test_flexlora_refuses_sums_of_several_agents():
    _modules, layout, units, start, lora = flex_case()
    cells = ArrayUnits(np.stack([units.load(0)]), np.array([5]), np.array([3]))
    with pytest.raises(AggregationError, match="single agents' factors, not sums over 3"):
        flexlora_step(cells, start, layout, lora)

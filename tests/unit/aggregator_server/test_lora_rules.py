"""LoRA rules against dense float64 products: what each equals, on any shapes, ranks and weights."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator_server.aggregation import lora, lora_products
from aggregator_server.aggregation.fedavg import apply_mean, average
from aggregator_server.aggregation.lora import (
    covariance_gap,
    fedex,
    fedit,
    flexlora,
    flora,
    rescaled,
    truncated,
)
from aggregator_server.aggregation.lora_core import core_name, core_shapes, fold_core
from aggregator_server.aggregation.lora_pairs import (
    Cohort,
    LocalAdapter,
    LoraAdapter,
    Pair,
    local_adapter,
    pairs_of,
)
from aggregator_server.aggregation.lora_products import best_rank, norm, total
from aggregator_server.errors import AggregationError
from privacy.updates import CellSum, PlainUpdate
from protocol.blocks import Factor, LoraBlock, LoraRule
from quant.adapter import flatten, sent_layout, tensor_name, unflatten
from quant.errors import AdapterError
from quant.lora_turns import changed_factors, sent_factors, turn_layouts

MODULES = {"layers.0.q_proj": (9, 7), "layers.0.down_proj": (5, 11)}  # (d_out, d_in)
SCALE = 1.5
seeds = st.integers(0, 2**32 - 1)
some = settings(max_examples=60, deadline=None)


@st.composite
def cohorts(draw, *, mixed: bool = False, shared: str = ""):
    """Agents of random shapes, ranks and weights; with `shared`, that factor is one for all."""
    rng = np.random.default_rng(draw(seeds))
    side = st.integers(1, 12)
    modules = {f"m{index}": (draw(side), draw(side)) for index in range(draw(st.integers(1, 3)))}
    n_agents, rank = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    common = make_adapter(rng, modules, rank)
    agents = []
    for _ in range(n_agents):
        own = make_adapter(
            rng,
            modules,
            draw(st.integers(1, 5)) if mixed else rank,
            scale=draw(st.sampled_from([0.25, 1.5, 4.0])) if mixed else SCALE,
        )
        if shared:
            pairs = {
                module: dataclasses.replace(pair, **{shared: getattr(common.pairs[module], shared)})
                for module, pair in own.pairs.items()
            }
            own = dataclasses.replace(own, pairs=pairs)
        agents.append(LocalAdapter(adapter=own, weight=draw(st.integers(1, 500))))
    return Cohort(agents=tuple(agents))


def make_adapter(rng, modules, rank, *, scale=SCALE, dtype=np.float64) -> LoraAdapter:
    pairs = {
        module: Pair(
            A=rng.standard_normal((rank, d_in)).astype(dtype),
            B=rng.standard_normal((d_out, rank)).astype(dtype),
        )
        for module, (d_out, d_in) in modules.items()
    }
    return LoraAdapter(pairs=pairs, scale=scale)


def make_cohort(n: int = 4, rank: int = 3, *, modules=MODULES, seed: int = 0) -> Cohort:
    rng = np.random.default_rng(seed)
    return Cohort(
        agents=tuple(
            LocalAdapter(adapter=make_adapter(rng, modules, rank), weight=int(rng.integers(1, 9)))
            for _ in range(n)
        )
    )


def dense(adapter: LoraAdapter) -> dict[str, np.ndarray]:
    """s·B·A of each module, multiplied out."""
    return {
        module: adapter.scale * pair.B.astype(np.float64) @ pair.A.astype(np.float64)
        for module, pair in adapter.pairs.items()
    }


def ideal(cohort: Cohort) -> dict[str, np.ndarray]:
    """ΔW* = Σ p_k s_k B_k A_k, multiplied out."""
    weights = [agent.weight for agent in cohort.agents]
    each = [dense(agent.adapter) for agent in cohort.agents]
    return {
        module: sum(
            w / sum(weights) * products[module] for w, products in zip(weights, each, strict=True)
        )
        for module in cohort.modules
    }


def dense_covariance(cohort: Cohort) -> dict[str, np.ndarray]:
    """Σ p_k s (B_k − B̄)(A_k − Ā), multiplied out."""
    gaps = {}
    for module in cohort.modules:
        pairs = cohort.pairs(module)
        A = np.average([pair.A for pair in pairs], axis=0, weights=cohort.shares)
        B = np.average([pair.B for pair in pairs], axis=0, weights=cohort.shares)
        gaps[module] = SCALE * sum(
            p * (pair.B - B) @ (pair.A - A) for p, pair in zip(cohort.shares, pairs, strict=True)
        )
    return gaps


def frobenius(products: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(product**2) for product in products.values())))


def minus(left, right) -> dict[str, np.ndarray]:
    assert left.keys() == right.keys()
    return {module: left[module] - right[module] for module in left}


def size_of(cohort: Cohort) -> float:
    """What rounding is relative to."""
    return sum(
        agent.adapter.scale
        * sum(
            np.linalg.norm(pair.A) * np.linalg.norm(pair.B) for pair in agent.adapter.pairs.values()
        )
        for agent in cohort.agents
    )


def assert_equal(left, right, size: float) -> None:
    assert frobenius(minus(left, right)) <= 1e-13 * size


# Exactness: each rule against the dense ideal.


@some
@given(cohorts())
def test_fedit_is_off_by_exactly_the_covariance(cohort):
    off = minus(ideal(cohort), dense(fedit(cohort)))
    assert_equal(off, dense_covariance(cohort), size_of(cohort))


@some
@given(cohorts())
def test_the_covariance_gap_is_that_of_the_dense_products(cohort):
    report, gaps, best = covariance_gap(cohort), dense_covariance(cohort), ideal(cohort)
    size = size_of(cohort)
    assert report.gap_norm == pytest.approx(frobenius(gaps), rel=1e-12, abs=1e-13 * size)
    assert report.ideal_norm == pytest.approx(frobenius(best), rel=1e-12, abs=1e-13 * size)
    assert report.by_module == pytest.approx(
        {module: float(np.linalg.norm(gap)) for module, gap in gaps.items()}, abs=1e-13 * size
    )
    if report.gap_norm:
        assert report.relative == report.gap_norm / report.ideal_norm


@pytest.mark.parametrize("shared", ["A", "B"])
@some
@given(data=st.data())
def test_a_shared_factor_makes_the_mean_of_the_other_exact(shared, data):
    cohort = data.draw(cohorts(shared=shared))
    report = covariance_gap(cohort)
    assert report.gap_norm == 0.0
    assert report.relative == 0.0
    mean = fedit(cohort)
    assert_equal(dense(mean), ideal(cohort), size_of(cohort))
    for module, pair in mean.pairs.items():
        own = getattr(cohort.pairs(module)[0], shared)
        assert getattr(pair, shared).tobytes() == own.tobytes()


@some
@given(cohorts(mixed=True))
def test_flora_is_exact_and_of_the_added_rank(cohort):
    stacked = flora(cohort)
    assert_equal(dense(stacked), ideal(cohort), size_of(cohort))
    for module, pair in stacked.pairs.items():
        assert pair.rank == sum(own.rank for own in cohort.pairs(module))


@some
@given(cohorts(mixed=True), st.integers(1, 8))
def test_flexlora_is_the_best_of_its_rank(cohort, rank):
    found = flexlora(cohort, rank=rank, scale=0.5)
    best, missing = ideal(cohort), []
    for module, product in dense(found.adapter).items():
        values = np.linalg.svd(best[module], compute_uv=False)
        missing.extend(values[rank:])
        error = np.linalg.norm(product - best[module])
        assert error <= np.linalg.norm(values[rank:]) + 1e-12 * size_of(cohort)
        assert found.adapter.pairs[module].rank == rank
    assert found.error_norm == pytest.approx(np.linalg.norm(missing), abs=1e-12 * size_of(cohort))
    off = frobenius(minus(dense(found.adapter), best))
    assert off == pytest.approx(found.error_norm, abs=1e-12 * size_of(cohort))


@some
@given(cohorts(mixed=True), st.integers(1, 4))
def test_the_first_rows_of_flexlora_are_the_best_of_a_lower_rank(cohort, rank):
    wide = flexlora(cohort, rank=5, scale=2.0).adapter
    cut = truncated(wide, rank=rank, scale=8.0)
    direct = flexlora(cohort, rank=rank, scale=2.0).error_norm
    off = frobenius(minus(dense(cut), ideal(cohort)))
    assert off == pytest.approx(direct, abs=1e-12 * size_of(cohort))
    assert cut.scale == 8.0


@some
@given(cohorts())
def test_fedex_is_exact_with_its_whole_residual(cohort):
    found = fedex(cohort)
    assert found.error_norm == 0.0
    sum_of_both = minus(
        dense(found.adapter), {m: -product for m, product in dense(found.residual).items()}
    )
    assert_equal(sum_of_both, ideal(cohort), 10 * size_of(cohort))
    assert_equal(dense(found.adapter), dense(fedit(cohort)), size_of(cohort))
    n_agents, rank = len(cohort.agents), cohort.agents[0].adapter.pairs["m0"].rank
    widest = max(min(pair.shape) for pair in found.adapter.pairs.values())
    for pair in found.residual.pairs.values():
        assert pair.rank <= max(1, min((n_agents - 1) * rank, widest))


@some
@given(cohorts(), st.integers(1, 4))
def test_fedex_truncated_is_the_best_residual_of_its_rank(cohort, rank):
    found, gaps = fedex(cohort, residual_rank=rank), dense_covariance(cohort)
    missing = []
    for module, gap in gaps.items():
        values = np.linalg.svd(gap, compute_uv=False)
        missing.extend(values[rank:])
        assert found.residual.pairs[module].rank <= rank
    size = size_of(cohort)
    assert found.error_norm == pytest.approx(np.linalg.norm(missing), abs=1e-12 * size)
    off = frobenius(minus(dense(found.residual), gaps))
    assert off == pytest.approx(found.error_norm, abs=1e-12 * size)


def test_fedex_keeps_what_earlier_rounds_owed():
    first, second = make_cohort(seed=1), make_cohort(n=2, rank=1, seed=2)
    owed = fedex(first).residual
    found = fedex(second, previous=owed)
    expected = minus(dense_covariance(second), {m: -gap for m, gap in dense(owed).items()})
    assert found.error_norm == 0.0
    assert_equal(dense(found.residual), expected, 10 * size_of(first))


@pytest.mark.parametrize("rule", [covariance_gap, fedit, fedex])
def test_rules_that_average_factors_refuse_mixed_ranks_and_scales(rule):
    one, two = make_cohort(1, rank=2).agents[0], make_cohort(1, rank=3).agents[0]
    with pytest.raises(AggregationError, match="another scale or rank"):
        rule(Cohort(agents=(one, two)))
    other = dataclasses.replace(two, adapter=dataclasses.replace(two.adapter, scale=SCALE * 2))
    with pytest.raises(AggregationError, match="another scale or rank"):
        rule(Cohort(agents=(two, other)))


def test_big_layers_are_never_multiplied_out():
    """All rules together never hold a quarter of one dense product."""
    d, rank, n_agents = 3000, 2, 3
    cohort = make_cohort(n_agents, rank, modules={"m0": (d, d)})
    tracemalloc.start()
    try:
        covariance_gap(cohort)
        flexlora(cohort, rank=rank, scale=1.0)
        fedex(cohort)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 * d * d / 4


# Products without multiplying out.


@some
@given(seeds, st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
def test_the_norm_is_that_of_the_dense_product(seed, d_out, d_in, rank):
    pair = make_adapter(np.random.default_rng(seed), {"m": (d_out, d_in)}, rank).pairs["m"]
    assert norm(pair) == pytest.approx(np.linalg.norm(pair.B @ pair.A), rel=1e-12)


def test_a_small_gap_beside_large_factors_keeps_its_digits():
    """A Gram matrix, or ΔW* minus s·B̄·Ā, would lose all of them."""
    rng = np.random.default_rng(0)
    start = make_adapter(rng, MODULES, 3)
    agents = []
    for _ in range(4):
        off = make_adapter(rng, MODULES, 3)
        pairs = {
            module: Pair(
                A=np.float64(pair.A + 2.0**-30 * off.pairs[module].A),
                B=np.float64(pair.B + 2.0**-30 * off.pairs[module].B),
            )
            for module, pair in start.pairs.items()
        }
        agents.append(LocalAdapter(adapter=LoraAdapter(pairs=pairs, scale=SCALE), weight=1))
    cohort = Cohort(agents=tuple(agents))
    expected = frobenius(dense_covariance(cohort))
    assert covariance_gap(cohort).gap_norm == pytest.approx(expected, rel=1e-6)
    assert covariance_gap(cohort).relative < 1e-17


def test_a_product_of_low_rank_comes_back_with_zero_rows_beyond():
    pair = make_adapter(np.random.default_rng(0), {"m": (6, 5)}, 2).pairs["m"]
    found = best_rank(pair, 4)
    np.testing.assert_allclose(found.pair.B @ found.pair.A, pair.B @ pair.A, atol=1e-13)
    assert not found.pair.A[2:].any()
    assert not found.pair.B[:, 2:].any()
    np.testing.assert_allclose(found.pair.A[:2] @ found.pair.A[:2].T, np.eye(2), atol=1e-13)
    assert found.error_norm == 0.0


def test_rows_of_a_factor_stay_ready_to_learn_where_the_product_has_less_rank():
    """Of rank 1 by value but rank 3 in its factors: A is orthonormal, only B is zero."""
    A = np.outer(np.ones(3), np.arange(1.0, 6.0))
    pair = Pair(A=A, B=np.random.default_rng(0).standard_normal((6, 3)))
    found = best_rank(pair, 3).pair
    np.testing.assert_allclose(found.A @ found.A.T, np.eye(3), atol=1e-12)


def test_sums_of_other_shapes_and_ranks_below_one_are_refused():
    rng = np.random.default_rng(0)
    one = make_adapter(rng, {"m": (3, 4)}, 2).pairs["m"]
    two = make_adapter(rng, {"m": (4, 4)}, 2).pairs["m"]
    with pytest.raises(AggregationError, match="have no sum"):
        total([one, two], [1.0, 1.0])
    with pytest.raises(AggregationError, match="one shape and rank"):
        lora_products.covariance([one, two], np.array([0.5, 0.5]))
    with pytest.raises(AggregationError, match="at least 1, not 0"):
        best_rank(one, 0)


def test_a_gap_without_an_ideal_has_no_ratio():
    """Two agents that cancel: ΔW* is zero, and s·B̄·Ā is not."""
    one = Pair(A=np.array([[1.0]]), B=np.array([[3.0]]))
    two = Pair(A=np.array([[3.0]]), B=np.array([[-1.0]]))
    agents = tuple(
        LocalAdapter(adapter=LoraAdapter(pairs={"m": pair}, scale=1.0), weight=1)
        for pair in (one, two)
    )
    report = covariance_gap(Cohort(agents=agents))
    assert report.gap_norm == pytest.approx(2.0)
    assert report.ideal_norm == pytest.approx(0.0, abs=1e-15)
    assert lora.GapReport(gap_norm=1.0, ideal_norm=0.0, by_module={}).relative is None


def test_a_round_that_learnt_nothing_has_no_gap():
    """Release 0: every B is zero, so ΔW* is too."""
    zero = make_cohort(1).agents[0]
    pairs = {m: Pair(A=p.A, B=0.0 * p.B) for m, p in zero.adapter.pairs.items()}
    still = dataclasses.replace(zero, adapter=LoraAdapter(pairs=pairs, scale=SCALE))
    report = covariance_gap(Cohort(agents=(still, still)))
    assert (report.gap_norm, report.ideal_norm, report.relative) == (0.0, 0.0, 0.0)


def test_what_cannot_be_cut_or_scaled_is_refused():
    adapter = make_cohort(1).agents[0].adapter
    for rank in (0, 4):
        with pytest.raises(AggregationError, match=f"cannot cut .* to rank {rank}"):
            truncated(adapter, rank=rank, scale=1.0)
    for scale in (0.0, np.nan, np.inf):
        with pytest.raises(AggregationError, match="scale"):
            rescaled(adapter, scale)
    with pytest.raises(AggregationError, match="at least 1, not 0"):
        fedex(make_cohort(), residual_rank=0)
    with pytest.raises(AggregationError, match="other modules"):
        fedex(make_cohort(), previous=make_cohort(modules={"m0": (2, 2)}).agents[0].adapter)


# Pairs.


def make_arrays(rank: int = 3, *, seed: int = 0, modules=MODULES):
    rng = np.random.default_rng(seed)
    return make_adapter(rng, modules, rank, dtype=np.float32).arrays()


def shapes_of(arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def test_tensors_go_to_pairs_and_back_bit_for_bit():
    arrays = make_arrays()
    pairs = pairs_of(arrays)
    assert list(pairs) == sorted(MODULES)
    again = LoraAdapter(pairs=pairs, scale=1.0).arrays()
    assert again.keys() == arrays.keys()
    assert all(again[name].tobytes() == arrays[name].tobytes() for name in arrays)


def test_a_factor_without_its_other_one_is_refused():
    arrays = make_arrays()
    del arrays[tensor_name("layers.0.q_proj", Factor.B)]
    with pytest.raises(AggregationError, match=r"q_proj.*has A alone"):
        pairs_of(arrays)
    with pytest.raises(AdapterError, match="not the name"):
        pairs_of({"lm_head.weight": np.ones((2, 2), np.float32)})


def test_the_scale_is_pefts():
    block = LoraBlock(rank=8, alpha=12.0, target_modules=("q_proj",), init_seed=0)
    assert block.scale == 1.5


def test_an_agents_adapter_is_the_start_plus_its_update():
    start, local = make_arrays(seed=0), make_arrays(seed=1)
    layout = sent_layout(shapes_of(start), (Factor.B,))
    vector = flatten(local, layout) - flatten(start, layout)
    found = local_adapter(PlainUpdate(vector=vector, weight=7), start, layout, scale=SCALE)
    assert found.weight == 7
    for module, pair in found.adapter.pairs.items():
        assert pair.A is start[tensor_name(module, Factor.A)]
        np.testing.assert_allclose(pair.B, local[tensor_name(module, Factor.B)], atol=1e-6)
    short = PlainUpdate(vector=vector[:1], weight=1)
    with pytest.raises(AggregationError, match="the layout has"):
        local_adapter(short, start, layout, scale=SCALE)


def broken_agent(**change):
    agent = make_cohort(1).agents[0]
    pair = agent.adapter.pairs["layers.0.q_proj"]
    pairs = {**agent.adapter.pairs, "layers.0.q_proj": dataclasses.replace(pair, **change)}
    return dataclasses.replace(agent, adapter=dataclasses.replace(agent.adapter, pairs=pairs))


def test_a_cohort_of_unlike_agents_is_refused():
    good = make_cohort(1).agents[0]
    with pytest.raises(AggregationError, match="no agent"):
        Cohort(agents=())
    with pytest.raises(AggregationError, match="weight 0"):
        Cohort(agents=(good, dataclasses.replace(good, weight=0)))
    with pytest.raises(AggregationError, match="agent 1 has other modules"):
        Cohort(agents=(good, make_cohort(1, modules={"m": (2, 2)}).agents[0]))
    with pytest.raises(AggregationError, match="other shapes"):
        Cohort(agents=(good, broken_agent(A=np.ones((3, 8)))))
    with pytest.raises(AggregationError, match="agent 1 has values that are not finite"):
        Cohort(agents=(good, broken_agent(A=np.full((3, 7), np.nan))))


def test_factors_that_have_no_product_are_refused():
    with pytest.raises(AggregationError, match="no product"):
        Pair(A=np.ones((2, 3)), B=np.ones((4, 3)))
    with pytest.raises(AggregationError, match="0 modules"):
        LoraAdapter(pairs={}, scale=1.0)
    with pytest.raises(AggregationError, match="scale 0"):
        dataclasses.replace(make_cohort(1).agents[0].adapter, scale=0.0)


def test_an_adapter_beyond_float32_is_refused():
    pair = Pair(A=np.full((1, 1), 1e39), B=np.ones((1, 1)))
    with pytest.raises(AggregationError, match=r"lora_A.*not finite"):
        LoraAdapter(pairs={"m": pair}, scale=1.0).arrays()


# What is sent.


@pytest.mark.parametrize(
    ("rule", "turns"),
    [
        (LoraRule.FEDIT, ("AB", "AB", "AB")),
        (LoraRule.FFA_LORA, ("B", "B", "B")),
        (LoraRule.ROLORA, ("B", "A", "B")),
        (LoraRule.FLEXLORA, ("AB", "AB", "AB")),
    ],
)
def test_each_rule_sends_its_factors_in_their_turn(rule, turns):
    shapes = shapes_of(make_arrays())
    for turn, expected in enumerate(turns):
        assert "".join(sent_factors(rule, turn)) == expected
        layouts = turn_layouts(rule, shapes)
        names = {slot.name for slot in layouts[turn % len(layouts)].slots}
        assert names == {tensor_name(m, Factor(f)) for m in MODULES for f in expected}
        assert changed_factors(rule, turn + 1) == sent_factors(rule, turn)
    assert changed_factors(rule, 0) == sent_factors(rule, 0)
    with pytest.raises(AdapterError, match="not -1"):
        sent_factors(rule, -1)


def test_cores_are_named_beside_the_factors():
    shapes = shapes_of(make_arrays(rank=3))
    assert core_name("layers.0.q_proj") == "base_model.model.layers.0.q_proj.lora_core.weight"
    assert core_shapes(shapes) == {core_name(module): (3, 3) for module in MODULES}


def plain_mean(locals_, start, layout):
    """FedAvg of what is sent, as a server of masked sums would: the new arrays."""
    updates = [flatten(arrays, layout) - flatten(start, layout) for arrays in locals_]
    weights = [3, 1, 5][: len(locals_)]
    cells = [
        CellSum.of_plain(PlainUpdate(vector=vector, weight=weight))
        for vector, weight in zip(updates, weights, strict=True)
    ]
    mean = average(cells, n_values=layout.n_values).mean
    moved = unflatten(apply_mean(flatten(start, layout), mean), layout)
    return {**start, **moved}, np.array(weights) / sum(weights)


@pytest.mark.parametrize(
    ("rule", "turn"), [(LoraRule.FFA_LORA, 0), (LoraRule.ROLORA, 0), (LoraRule.ROLORA, 1)]
)
def test_rules_with_one_factor_in_turn_are_exact_on_plain_means(rule, turn):
    start = make_arrays(seed=9)
    layout = turn_layouts(rule, shapes_of(start))[turn]
    locals_ = []
    for seed in range(3):
        trained = make_arrays(seed=seed)
        locals_.append({**start, **unflatten(flatten(trained, layout), layout)})
    new, shares = plain_mean(locals_, start, layout)
    for module, pair in pairs_of(new).items():
        expected = sum(
            p * pairs_of(arrays)[module].B.astype(np.float64) @ pairs_of(arrays)[module].A
            for p, arrays in zip(shares, locals_, strict=True)
        )
        np.testing.assert_allclose(pair.B @ pair.A, expected, atol=1e-5)


def test_fedsa_shares_the_mean_of_a_and_leaves_b_with_its_agent():
    """No common model: the mean of the personal ones is that of the factors, B̄·Ā."""
    start = make_arrays(seed=9)
    layout = sent_layout(shapes_of(start), (Factor.A,))
    locals_ = [make_arrays(seed=seed) for seed in range(3)]
    new, shares = plain_mean(locals_, start, layout)
    for module in MODULES:
        A = new[tensor_name(module, Factor.A)]
        name = tensor_name(module, Factor.B)
        assert new[name] is start[name]
        personal = sum(p * own[name] @ A for p, own in zip(shares, locals_, strict=True))
        mean_B = sum(p * own[name] for p, own in zip(shares, locals_, strict=True))
        mean_A = sum(
            p * own[tensor_name(module, Factor.A)] for p, own in zip(shares, locals_, strict=True)
        )
        np.testing.assert_allclose(personal, mean_B @ mean_A, atol=1e-5)


@some
@given(seeds, st.integers(1, 5), st.integers(1, 6))
def test_fed_sb_is_exact_and_folds_into_a_stock_adapter(seed, rank, n_agents):
    rng = np.random.default_rng(seed)
    frozen = make_adapter(rng, MODULES, rank)
    shares = rng.dirichlet(np.ones(n_agents))
    cores = [{m: rng.standard_normal((rank, rank)) for m in MODULES} for _ in range(n_agents)]
    mean = {m: sum(p * own[m] for p, own in zip(shares, cores, strict=True)) for m in MODULES}
    found = fold_core(frozen, mean)
    for module, pair in frozen.pairs.items():
        expected = SCALE * sum(
            p * pair.B @ own[module] @ pair.A for p, own in zip(shares, cores, strict=True)
        )
        np.testing.assert_allclose(dense(found)[module], expected, atol=1e-11)
        assert found.pairs[module].A is pair.A


def test_cores_that_do_not_fit_are_refused():
    frozen = make_cohort(1).agents[0].adapter
    cores = {module: np.eye(3) for module in MODULES}
    with pytest.raises(AggregationError, match="other modules"):
        fold_core(frozen, {"layers.0.q_proj": np.eye(3)})
    with pytest.raises(AggregationError, match=r"expected \(3, 3\)"):
        fold_core(frozen, {**cores, "layers.0.q_proj": np.eye(2)})

"""Agents of different ranks and modules: exact means, hostile claims, filters, whole rounds."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator_server.aggregation.fedavg import average
from aggregator_server.aggregation.mixed_ranks import RankRows
from aggregator_server.aggregation.robust.outcome import robust_mean
from aggregator_server.aggregation.robust.pipeline import Mode, run_pipeline
from aggregator_server.aggregation.robust.units import ArrayUnits
from aggregator_server.errors import AggregationError
from aggregator_server.recipes import OPTIMIZERS, Optimizer
from privacy.updates import CellSum, PlainUpdate, l2_norm
from protocol.base_description import BaseDescription, LinearModule
from protocol.blocks import BaseBlock, Factor, FilterRule, LoraBlock, LoraRule
from protocol.phases import RoundPhase
from quant.adapter import adapter_shapes, flatten, sent_layout, unflatten
from quant.mixed_ranks import crop, modules_of, own_lora, pad, participation

RANK = 8
BOTH = (Factor.A, Factor.B)
N_DRAWN = 10_000
"""More than an adapter has values here."""
BASE = BaseDescription(
    base=BaseBlock(
        model="synthetic/tiny",
        source_dtype="float32",
        fingerprint=bytes(32),
        tokenizer_digest=bytes(32),
    ),
    architecture="LlamaForCausalLM",
    n_parameters=1000,
    max_positions=64,
    has_chat_template=False,
    linear_modules=tuple(
        LinearModule(name=f"layers.{layer}.{name}", d_out=d_out, d_in=12)
        for layer in range(2)
        for name, d_out in (("q_proj", 10), ("v_proj", 14))
    ),
)
MIXED = {"min_rank": 2, "optional_modules": ("v_proj",)}


def make_lora(sent=BOTH) -> LoraBlock:
    return LoraBlock(
        rank=RANK,
        alpha=16.0,
        target_modules=("q_proj", "v_proj"),
        init_seed=1,
        sent=sent,
        **MIXED,
    )


def make_rows(sent=BOTH) -> RankRows:
    lora = make_lora(sent)
    return RankRows.of(sent_layout(adapter_shapes(BASE, lora), lora.sent), lora)


def spread(values, lora, base, *, rank, left_out=(), weight=1) -> PlainUpdate:
    """What an agent of this part sends, if training moved the whole adapter by `values`."""
    own = own_lora(lora, rank=rank, left_out=left_out)
    small = sent_layout(adapter_shapes(base, own), lora.sent)
    whole = sent_layout(adapter_shapes(base, lora), lora.sent)
    arrays = unflatten(values[: whole.n_values].astype(np.float32), whole)
    mine = crop(arrays, {slot.name: slot.shape for slot in small.slots})
    return PlainUpdate(
        vector=pad(flatten(mine, small), small, whole),
        weight=weight,
        participation=participation(small, whole),
    )


def make_update(rank, left_out=(), *, weight=1, seed=0, sent=BOTH, scale=1.0) -> PlainUpdate:
    values = scale * np.random.default_rng(seed).standard_normal(N_DRAWN)
    return spread(values, make_lora(sent), BASE, rank=rank, left_out=left_out, weight=weight)


def dense_mean(updates, layout) -> np.ndarray:
    """Σ w·x / Σ w over those who trained a value, one value at a time, in float64."""
    places = modules_of(layout)
    mean = np.zeros(layout.n_values)
    for slot, where in layout.slices():
        module, is_a = slot.name.removeprefix("base_model.model.").split(".lora_")
        for i, j in np.ndindex(*slot.shape):
            row = i if is_a.startswith("A") else j
            at = where.start + i * slot.shape[1] + j
            rank = slot.shape[0] if is_a.startswith("A") else slot.shape[1]
            have = [u for u in updates if u.participation[places[module] * rank + row] == 1.0]
            if have:
                weights = [float(u.weight) for u in have]
                mean[at] = np.average([float(u.vector[at]) for u in have], weights=weights)
    return mean


def summed(updates) -> CellSum:
    """A cell of several agents, as an exact sum gives it."""
    sums = [CellSum.of_plain(update) for update in updates]
    return CellSum(
        weighted_sum=np.sum([s.weighted_sum.astype(np.float64) for s in sums], axis=0).astype(
            np.float32
        ),
        weight_sum=sum(s.weight_sum for s in sums),
        n_members=len(sums),
        row_weights=np.sum([s.row_weights for s in sums], axis=0),
    )


agents = st.lists(
    st.tuples(st.integers(2, RANK), st.sampled_from([(), ("v_proj",)]), st.integers(1, 40)),
    min_size=1,
    max_size=5,
)


class TestAverage:
    @settings(max_examples=15, deadline=None)
    @given(who=agents, cut=st.integers(0, 5), sent=st.sampled_from([BOTH, (Factor.B,)]))
    def test_guarantee_1_each_row_is_the_mean_of_who_trained_it_however_they_were_grouped(
        self, who, cut, sent
    ):
        rows = make_rows(sent)
        updates = [
            make_update(rank, left_out, weight=weight, seed=i, sent=sent)
            for i, (rank, left_out, weight) in enumerate(who)
        ]
        expected = dense_mean(updates, rows.tensors)
        found = rows.average(CellSum.of_plain(update) for update in updates)
        np.testing.assert_allclose(found.mean, expected, rtol=2e-6, atol=1e-7)
        cells = [summed(group) for group in (updates[:cut], updates[cut:]) if group]
        again = rows.average(cells)
        assert (again.n_agents, again.weight_sum) == (found.n_agents, found.weight_sum)
        np.testing.assert_allclose(again.mean, expected, rtol=1e-5, atol=1e-6)

    def test_guarantee_2_where_all_train_all_it_is_fedavg(self):
        cells = [CellSum.of_plain(make_update(RANK, weight=i + 1, seed=i)) for i in range(4)]
        rows = make_rows()
        plain = average(cells, n_values=rows.tensors.n_values)
        assert rows.average(cells).mean.tobytes() == plain.mean.tobytes()

    def test_guarantee_3_a_row_that_nobody_says_to_have_trained_does_not_move(self):
        """Whatever a lying agent adds to it."""
        rows = make_rows()
        honest, liar = make_update(2), make_update(RANK, seed=1)
        liar = dataclasses.replace(liar, participation=honest.participation)
        cells = [CellSum.of_plain(honest), CellSum.of_plain(liar)]
        untrained = rows.untrained(cells)
        assert 0 < untrained.sum() < len(untrained)
        assert not rows.average(cells).mean[untrained].any()
        assert rows.average(cells).mean[~untrained].all()

    def test_a_cell_without_participation_is_refused(self):
        rows = make_rows()
        cell = dataclasses.replace(CellSum.of_plain(make_update(4)), row_weights=None)
        with pytest.raises(AggregationError, match="without participation"):
            rows.average([cell])


class TestFaults:
    @settings(max_examples=30, deadline=None)
    @given(who=agents)
    def test_honest_units_have_none(self, who):
        rows = make_rows()
        updates = [make_update(rank, out, weight=weight) for rank, out, weight in who]
        assert all(rows.fault_of(CellSum.of_plain(update)) is None for update in updates)
        assert rows.fault_of(summed(updates)) is None

    @pytest.mark.parametrize(
        ("place", "value", "words"),
        [
            (0, -1.0, "not from 0 to its weight, 12"),
            (0, 13.0, "not from 0 to its weight, 12"),
            (0, float("nan"), "not from 0 to its weight"),
            (7, float("inf"), "not from 0 to its weight"),
            (slice(0, 8), 0.0, "leaves out a module that every agent trains"),
            (1, 11.0, "fewer than 2 rows"),
            (5, 7.0, "a row without the one before it"),
        ],
    )
    def test_guarantee_1_row_weights_that_no_honest_agents_have_are_named(
        self, place, value, words
    ):
        rows = make_rows()
        cell = summed([make_update(4, weight=5), make_update(6, ("v_proj",), weight=7)])
        weights = cell.row_weights.copy()
        weights[place] = value
        if words.startswith("a row"):
            weights[3:5] = 6.0
        fault = rows.fault_of(dataclasses.replace(cell, row_weights=weights))
        assert fault is not None
        assert words in fault

    @pytest.mark.parametrize("share", [0.5, 1e-6])
    def test_guarantee_2_one_agent_cannot_train_a_part_of_a_row(self, share):
        """A small part would make the mean of the row, which is divided by it, of any size."""
        cell = CellSum.of_plain(make_update(4, weight=4))
        weights = cell.row_weights.copy()
        weights[-RANK:][:2] *= share
        weights[-RANK:][2:] = 0.0
        fault = make_rows().fault_of(dataclasses.replace(cell, row_weights=weights))
        assert fault is not None
        assert "between none and all" in fault

    @pytest.mark.parametrize("weights", [None, np.ones(3)])
    def test_participation_of_another_length_is_named(self, weights):
        cell = dataclasses.replace(CellSum.of_plain(make_update(4)), row_weights=weights)
        assert "has not the 32 values" in (make_rows().fault_of(cell) or "")


class TestFilling:
    def test_the_mean_of_filled_units_is_that_of_each_row_over_who_trained_it(self):
        rows = make_rows()
        updates = [
            make_update(rank, out, weight=weight, seed=weight)
            for rank, out, weight in ((2, (), 5), (4, ("v_proj",), 7), (8, (), 11))
        ]
        cells = [CellSum.of_plain(update) for update in updates]
        fill = rows.average(cells).mean.astype(np.float32)  # nothing capped
        means = np.stack([rows.filled(c, fill).weighted_sum / c.weight_sum for c in cells])
        units = ArrayUnits(means.astype(np.float32), np.array([5, 7, 11]))
        mean = robust_mean(units, np.ones(3, np.bool_), np.ones(3))
        np.testing.assert_allclose(mean, dense_mean(updates, rows.tensors), rtol=1e-5, atol=1e-6)

    def test_guarantee_1_who_alone_has_a_row_fills_it_with_no_more_than_the_median_length(self):
        rows = make_rows()
        honest = [make_update(2, seed=i) for i in range(4)]
        loud = make_update(RANK, seed=9, scale=1e6)
        cells = [CellSum.of_plain(update) for update in (*honest, loud)]
        fill = rows.fill([partial(lambda cell: cell, cell) for cell in cells])
        n_all, n_own = rows.tensors.n_values, np.count_nonzero(honest[0].vector)
        lengths = [l2_norm(update.vector) * np.sqrt(n_all / n_own) for update in honest]
        assert l2_norm(fill) <= max(lengths) * 1.001

    def test_a_median_does_not_take_an_untrained_row_for_one_that_stood_still(self):
        """With zeros where half of the agents lack a row, it would move half as far."""
        rows = make_rows()
        updates = alike(6, common=1.0, own=0.3, rank=lambda i: 2 if i % 2 else RANK)
        cells = [CellSum.of_plain(update) for update in updates]
        fill = rows.fill([partial(lambda cell: cell, cell) for cell in cells])
        lacking = rows.untrained(cells[1:2])
        wanted = np.mean([update.vector for update in updates[::2]], axis=0)[lacking]
        moved = []
        for filling in (fill, 0 * fill):
            found = judged([rows.filled(cell, filling) for cell in cells], rows)
            assert found.outcome.kept.all()
            moved.append(float(found.mean[lacking] @ wanted / (wanted @ wanted)))
        assert moved[0] > 0.9
        assert moved[1] < 0.65


def alike(n_agents, *, common, own, rank, seed=1):
    """Updates that share a direction, of agents of several ranks."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal(N_DRAWN)
    return [
        spread(
            common * shared + own * rng.standard_normal(N_DRAWN), make_lora(), BASE, rank=rank(i)
        )
        for i in range(n_agents)
    ]


def judged(cells, rows):
    """What the default filter makes of units as it sees them."""
    means = np.stack([cell.weighted_sum / np.float32(cell.weight_sum) for cell in cells])
    units = ArrayUnits(means, np.ones(len(cells), np.int64))
    return run_pipeline(units, mode=Mode.OPEN, layout=rows.tensors, seed=bytes([7]) * 32)


class TestStretched:
    @settings(max_examples=15, deadline=None)
    @given(who=agents)
    def test_guarantee_1_what_was_trained_is_stretched_and_the_rest_is_zero(self, who):
        rows = make_rows()
        updates = [make_update(rank, out, weight=w, seed=w) for rank, out, w in who]
        cell = summed(updates)
        lacking = rows.untrained([cell])
        found = rows.stretched(cell)
        assert not found.weighted_sum[lacking].any()
        stretch = np.sqrt(len(lacking) / np.sum(~lacking))
        expected = stretch * dense_mean(updates, rows.tensors)
        np.testing.assert_allclose(
            found.weighted_sum / found.weight_sum, expected, rtol=1e-4, atol=1e-5
        )

    def test_honest_agents_of_one_low_rank_are_no_copies(self):
        """As they stand, they lie nearer to each other than the others to any."""
        lora = make_lora().model_copy(update={"rank": 16, "min_rank": 1})
        rows = RankRows.of(sent_layout(adapter_shapes(BASE, lora), lora.sent), lora)
        rng = np.random.default_rng(1)
        updates = [
            spread(rng.standard_normal(N_DRAWN), lora, BASE, rank=1 if i < 3 else 16)
            for i in range(12)
        ]
        cells = [CellSum.of_plain(update) for update in updates]
        assert judged([rows.stretched(cell) for cell in cells], rows).outcome.kept.all()
        zero = np.zeros(rows.tensors.n_values, np.float32)
        padded = judged([rows.filled(cell, zero) for cell in cells], rows).outcome.kept
        assert not padded[:3].all()

    def test_an_attacker_of_low_rank_does_not_hide_behind_the_rows_of_others(self):
        rows = make_rows()
        updates = alike(12, common=1.0, own=0.5, rank=lambda i: 2 if i == 11 else RANK)
        updates[-1] = dataclasses.replace(updates[-1], vector=-updates[-1].vector)
        cells = [CellSum.of_plain(update) for update in updates]
        kept = judged([rows.stretched(cell) for cell in cells], rows).outcome.kept
        assert kept.tolist() == [True] * 11 + [False]
        fill = rows.fill([partial(lambda cell: cell, cell) for cell in cells])
        assert judged([rows.filled(cell, fill) for cell in cells], rows).outcome.kept[-1]


@pytest.fixture
def make_mixed_case(make_case):
    """A federation of rank 8 whose agents may train 2 rows or more, and leave v_proj out."""

    def make(**options):
        def edit(config):
            block = LoraBlock(**{**config.lora.model_dump(), **MIXED})
            return config.model_copy(update={"lora": block})

        return make_case(edit=edit, rank=RANK, **options)

    return make


WHO = ((2, ()), (4, ("v_proj",)), (8, ()), (8, ("v_proj",)), (3, ()), (5, ()))


def make_round(case, start_round, base, n, *, seed=1, common=0.0):
    """Agents of the parts in `WHO`, in turn, with their updates and the round."""
    agents, manifest = start_round(case, n)
    rng = np.random.default_rng(seed)
    lora = case.manifest.lora
    shared = rng.standard_normal(N_DRAWN)
    updates = [
        spread(
            common * shared + rng.standard_normal(N_DRAWN),
            lora,
            base,
            rank=WHO[i % len(WHO)][0],
            left_out=WHO[i % len(WHO)][1],
            weight=3 + i,
        )
        for i in range(len(agents))
    ]
    return agents, manifest, updates


def moved(case):
    releases = case.federation.releases
    newest = releases.newest()
    return releases.vector(newest).astype(np.float64) - releases.vector(
        releases.get(newest.number - 1)
    )


class TestRounds:
    @pytest.mark.parametrize("sent", [BOTH, (Factor.B,)])
    def test_an_open_round_of_mixed_ranks_is_exact(self, make_mixed_case, start_round, base, sent):
        rule = LoraRule.FEDIT if sent == BOTH else LoraRule.FFA_LORA
        case = make_mixed_case(cohort_target=6, lora_rule=rule)
        agents, manifest, updates = make_round(case, start_round, base, 6)
        assert manifest.update_n_bytes == case.federation.charter.layout.n_bytes
        for agent, update in zip(agents, updates, strict=True):
            assert agent.upload(manifest, update.body(), weight=update.weight).status_code == 200
        case.advance()
        expected = dense_mean(updates, case.federation.charter.layout.tensors)
        np.testing.assert_allclose(moved(case), expected, rtol=1e-5, atol=1e-6)
        release = case.federation.releases.newest()
        assert release.aggregation.n_agents == 6
        assert release.aggregation.update_norm == pytest.approx(np.linalg.norm(expected))

    @pytest.mark.parametrize("filter_rule", list(FilterRule))
    @pytest.mark.parametrize("value", [-1.0, 0.5, 1e-3, 2.0])
    def test_a_hostile_participation_drops_its_update(
        self, make_mixed_case, start_round, base, value, filter_rule
    ):
        case = make_mixed_case(cohort_target=4, filter=filter_rule)
        agents, manifest, updates = make_round(case, start_round, base, 4)
        said = updates[2].participation.copy()
        said[-1] = value
        liar = dataclasses.replace(updates[2], participation=said)
        for agent, update in zip(agents, (*updates[:2], liar, updates[3]), strict=True):
            assert agent.upload(manifest, update.body(), weight=update.weight).status_code == 200
        case.advance()
        release = case.federation.releases.newest()
        assert release.number == 1
        assert (release.filter.n_cells, release.filter.n_rejected) == (4, 1)
        assert len(release.rejected) == 1
        assert release.aggregation.n_agents == 3
        if filter_rule is FilterRule.NONE:
            honest = [*updates[:2], updates[3]]
            expected = dense_mean(honest, case.federation.charter.layout.tensors)
            np.testing.assert_allclose(moved(case), expected, rtol=1e-5, atol=1e-6)

    def test_a_round_of_hostile_participations_alone_fails(
        self, make_mixed_case, start_round, base
    ):
        case = make_mixed_case(cohort_target=2)
        agents, manifest, updates = make_round(case, start_round, base, 2)
        for agent, update in zip(agents, updates, strict=True):
            body = dataclasses.replace(update, participation=-update.participation).body()
            agent.upload(manifest, body, weight=1)
        case.advance()
        status = case.federation._store.rounds.get(manifest.round)
        assert status.phase is RoundPhase.FAILED
        assert "none of the 2 cells can be used: its participation" in status.failure

    def test_momentum_does_not_move_a_row_that_nobody_trained(
        self, make_mixed_case, start_round, base
    ):
        case = make_mixed_case(cohort_target=2, optimizer=OPTIMIZERS[Optimizer.FEDAVGM])
        agents, manifest, _ = make_round(case, start_round, base, 2)
        lora = case.manifest.lora
        vectors = np.ones(N_DRAWN)
        for rank in (8, 2):
            for agent in agents:
                update = spread(vectors, lora, base, rank=rank)
                body = update.body()
                assert agent.upload(manifest, body, weight=1).status_code == 200
            case.advance()
            manifest = agents[0].task(after=manifest.round).task.round.body if rank == 8 else None
        still = update.vector == 0.0
        assert still.any()
        assert not moved(case)[still].any()
        assert moved(case)[~still].all()

    def test_the_robust_filter_takes_units_of_different_ranks(
        self, make_mixed_case, start_round, base
    ):
        case = make_mixed_case(cohort_target=12, filter=FilterRule.ROBUST)
        agents, manifest, updates = make_round(case, start_round, base, 12, common=2.0)
        attacker = dataclasses.replace(updates[-1], vector=-50.0 * updates[2].vector)
        attacker = dataclasses.replace(attacker, participation=updates[2].participation)
        for agent, update in zip(agents, (*updates[:-1], attacker), strict=True):
            assert agent.upload(manifest, update.body(), weight=3).status_code == 200
        case.advance()
        release = case.federation.releases.newest()
        assert (release.filter.rule, release.filter.n_cells) == (FilterRule.ROBUST, 12)
        assert 1 <= release.filter.n_rejected <= 3
        honest = dense_mean(
            [dataclasses.replace(update, weight=3) for update in updates[:-1]],
            case.federation.charter.layout.tensors,
        )
        found = moved(case)
        cosine = found @ honest / np.linalg.norm(found) / np.linalg.norm(honest)
        assert cosine > 0.8  # the attacker alone would turn it round

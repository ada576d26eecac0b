"""The rules of a round with arrays in memory: what each part gives by itself, bit for bit."""

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import aggregator_server
from aggregator_server.aggregation import optimizers
from aggregator_server.aggregation.fedavg import apply_mean, average
from aggregator_server.aggregation.lora_flex import flexlora_step
from aggregator_server.aggregation.lora_gap import estimate_gap, kept_updates
from aggregator_server.aggregation.mixed_ranks import RankRows
from aggregator_server.aggregation.robust.outcome import robust_mean
from aggregator_server.aggregation.robust.pipeline import Mode, run_pipeline
from aggregator_server.aggregation.robust.units import ArrayUnits
from aggregator_server.aggregation.scaffold import ControlBook, renewed
from aggregator_server.errors import AggregationError
from aggregator_server.filtering import LEFT_OUT
from aggregator_server.masking.vectors import cell_sum
from aggregator_server.merge_rules import SYSTEM, Chance, MergeRules, RoundSums, Start
from aggregator_server.merging import Merger
from aggregator_server.private_recipes import PrivacyOptions, Profile
from privacy.central import noisy_mean
from privacy.fixed_point import encode
from privacy.noise import SecureStream
from privacy.turns import Turns, UpdateTerms
from privacy.updates import CellSum, PlainUpdate
from protocol.blocks import (
    AggregationBlock,
    CellMasking,
    FedAdamBlock,
    FedAvgBlock,
    FilterBlock,
    FilterRule,
    LoraBlock,
    LoraRule,
    RoundsBlock,
    TrainingBlock,
    Weighting,
)
from protocol.manifest import FederationManifest
from protocol.privacy import AdaptiveClip, CentralPrivacy
from protocol.wire import sha256
from quant.adapter import adapter_shapes, flatten, initial_adapter
from quant.companions import update_layouts

RANK, N_AGENTS = 4, 12
LORA = {"rank": RANK, "alpha": 8.0, "target_modules": ("q_proj", "v_proj"), "init_seed": 7}
TRAINING = {"local_steps": 10, "learning_rate": 1e-3}
ADAM = AggregationBlock(optimizer=FedAdamBlock(learning_rate=0.3, tau=0.02))
ROBUST = FilterBlock(rule=FilterRule.ROBUST)
CELLS = CellMasking(word_bits=32, max_change=2.0, clip_norm=1e3, cell_target=5, max_cell=9)
NOISY = {
    "privacy": CentralPrivacy(
        epsilon=8.0,
        delta=1e-5,
        clip_norm=3.0,
        noise_multiplier=0.7,
        adaptive=AdaptiveClip(count_std=2.0),
    ),
    "aggregation": AggregationBlock(weighting=Weighting.UNIFORM),
}
OPEN_ROUNDS = RoundsBlock(n_rounds=3, cohort_target=N_AGENTS, min_cohort=1)
BLOCKS = {
    "mean": {},
    "optimizer": {"aggregation": ADAM},
    "robust": {"filter": ROBUST},
    "masked": {
        "masking": CELLS,
        "filter": ROBUST,
        "rounds": RoundsBlock(n_rounds=3, cohort_target=45, min_cohort=5),
        "aggregation": AggregationBlock(max_weight=100),
    },
    "mixed": {"lora": LoraBlock(**LORA, min_rank=2), "filter": ROBUST, "aggregation": ADAM},
    "flexlora": {"lora": LoraBlock(**LORA, rule=LoraRule.FLEXLORA)},
    "scaffold": {"training": TrainingBlock(**TRAINING, scaffold=True), "filter": ROBUST},
    "noisy": NOISY,
}
CHANCE = Chance.of(bytes(range(32)), 3)


@dataclass(frozen=True)
class Cell:
    """A cell in memory."""

    found: CellSum
    only_member: bytes

    @property
    def transcript(self) -> bytes:
        return sha256(self.only_member)

    @property
    def weight_sum(self) -> int:
        return self.found.weight_sum

    @property
    def n_members(self) -> int:
        return self.found.n_members


def units_of(sums: Sequence[CellSum]) -> ArrayUnits:
    means = [found.weighted_sum / np.float32(found.weight_sum) for found in sums]
    weights = [found.weight_sum for found in sums]
    members = [found.n_members for found in sums]
    return ArrayUnits(np.stack(means), np.array(weights), np.array(members))


@dataclass(frozen=True)
class World:
    """A federation without a server: its rules, and what a first round gave."""

    rules: MergeRules
    sums: RoundSums[Cell]
    start: Start
    lora: LoraBlock

    @property
    def layout(self):
        return self.sums.tensors

    @property
    def loaded(self) -> list[CellSum]:
        return list(self.sums.each())

    @property
    def as_units(self) -> ArrayUnits:
        return units_of(self.loaded)

    def decide(self, chance: Chance = CHANCE):
        return self.rules.decide(self.sums, chance=chance)

    def merge(self, chance: Chance = CHANCE, **start: Callable[[], object]):
        began = Start(**{"vector": self.start.vector, **start})
        return self.rules.merge(self.sums, self.decide(chance), began, chance=chance)


def make_found(terms: UpdateTerms, manifest: FederationManifest, number: int) -> CellSum:
    """Of one agent, or of five under masks.

    The last pulls against the others, and the first moves a tensor as no other does, which the
    filter minds of an agent and not of a cell.
    """
    rng = np.random.default_rng([5, number])
    n_values = terms.layout.tensors.n_values
    common = np.random.default_rng(5).standard_normal(n_values)
    vector = (0.1 * common + 0.3 * rng.standard_normal(n_values)).astype(np.float32)
    if number == N_AGENTS - 1:
        vector = -vector
    if number != 0:
        vector[: terms.layout.tensors.slots[0].n_values] *= 0.02
    weight = min(manifest.max_weight, 3 + number)
    if terms.plan is not None:
        total = np.zeros(terms.plan.n_payload, terms.plan.dtype)
        for _ in range(5):
            total += encode(vector, weight=weight, plan=terms.plan, stream=SecureStream(bytes(32)))
        return cell_sum(total, terms.plan)
    participation = control = None
    if manifest.lora.is_mixed:
        rows = np.ones(terms.layout.n_values - n_values, np.float32).reshape(-1, RANK)
        rows[:, 2 + number % 2 :] = 0.0  # nobody trains the last
        participation = rows.reshape(-1)
    if manifest.training.scaffold:
        control = rng.standard_normal(n_values).astype(np.float32)
    return CellSum.of_plain(
        PlainUpdate(vector=vector, weight=weight, participation=participation, control=control)
    )


@pytest.fixture
def make_world(make_manifest, make_base_of):
    def make(name: str = "mean", **options: int) -> World:
        base = make_base_of(**options)
        blocks = {"lora": LoraBlock(**LORA), "rounds": OPEN_ROUNDS, **BLOCKS[name]}
        manifest = make_manifest(base=base.base, **blocks)
        shapes = adapter_shapes(base, manifest.lora)
        turns = Turns.of(update_layouts(shapes, manifest.lora, manifest.training), manifest)
        terms = turns.at(0)
        tensors = terms.layout.tensors
        vector = flatten(initial_adapter(base, manifest.lora), tensors)
        cells = [
            Cell(found=make_found(terms, manifest, number), only_member=bytes([number]) * 32)
            for number in range(N_AGENTS)
        ]
        return World(
            rules=MergeRules(manifest, tensors),
            sums=RoundSums(cells=cells, load=lambda cell: cell.found, terms=terms),
            start=Start(vector=lambda: vector),
            lora=manifest.lora,
        )

    return make


def kept_of(world: World, decision) -> list[CellSum]:
    return [found for found, keeps in zip(world.loaded, decision.kept, strict=True) if keeps]


# Each part by itself


def test_without_a_filter_the_step_is_the_weighted_mean(make_world):
    world = make_world()
    decision, merged = world.decide(), world.merge()
    plain = average(world.loaded, n_values=world.layout.n_values)
    assert decision.kept.all()
    assert merged.step.tobytes() == plain.mean.tobytes()
    assert (merged.report.n_cells, merged.report.n_agents) == (N_AGENTS, N_AGENTS)
    assert merged.report.update_norm == plain.norm
    assert merged.optimizer_state is None
    assert merged.control is None


@pytest.mark.parametrize(
    ("name", "mode", "n_removed"), [("robust", Mode.OPEN, 2), ("masked", Mode.CELLS, 1)]
)
def test_a_filtered_round_is_the_pipelines(make_world, name, mode, n_removed):
    world = make_world(name)
    decision, merged = world.decide(), world.merge()
    found = run_pipeline(world.as_units, mode=mode, layout=world.layout, seed=CHANCE.filter_seed())
    assert found.outcome.n_removed == n_removed
    np.testing.assert_array_equal(decision.kept, found.outcome.kept)
    np.testing.assert_array_equal(decision.factors, found.outcome.factors)
    assert [cell.removed for cell in decision.cells if cell.removed] == list(
        found.outcome.reasons.values()
    )
    assert merged.step.tobytes() == found.mean.tobytes()
    assert merged.report.n_agents == sum(cell.n_members for cell in kept_of(world, decision))


def test_an_optimiser_goes_on_from_the_state_that_it_is_given(make_world):
    world = make_world("optimizer")
    optimizer = optimizers.optimizer_of(ADAM.optimizer)
    mean = average(world.loaded, n_values=world.layout.n_values).mean
    state, kept = optimizers.initial_state(optimizer, n_values=len(mean)), None
    for _ in range(3):
        step, state = optimizers.apply(optimizer, state, mean)
        merged = world.merge(optimizer_state=lambda kept=kept: kept)
        kept = merged.optimizer_state
        assert merged.step.tobytes() == step.tobytes()
        assert kept == state.to_bytes()


def test_rank_rows_are_filtered_and_averaged_over_those_who_trained_them(make_world):
    world = make_world("mixed")
    rows = RankRows.of(world.layout, world.lora)
    decision = world.decide()
    kept = kept_of(world, decision)
    seen = run_pipeline(
        units_of([rows.stretched(found) for found in world.loaded]),
        mode=Mode.OPEN,
        layout=world.layout,
        seed=CHANCE.filter_seed(),
    )
    np.testing.assert_array_equal(decision.kept, seen.outcome.kept)
    np.testing.assert_array_equal(decision.factors, seen.outcome.factors)
    assert not decision.kept.all()
    fill = rows.fill([lambda found=found: found for found in kept])
    filled = units_of([rows.filled(found, fill) for found in world.loaded])
    mean = robust_mean(filled, decision.kept, decision.factors)
    moved = optimizers.OptimizerState(
        rule="fedadam", n_steps=1, m=np.ones_like(mean), v=np.ones_like(mean)
    )
    step, after = optimizers.apply(optimizers.optimizer_of(ADAM.optimizer), moved, mean)
    untrained = rows.untrained(kept)
    assert 0 < untrained.sum() < len(mean)
    assert step[untrained].all()
    merged = world.merge(optimizer_state=moved.to_bytes)
    np.testing.assert_array_equal(merged.step, np.where(untrained, 0.0, step))
    assert merged.optimizer_state == after.to_bytes()


def test_a_cell_whose_participation_lies_is_left_out_before_the_filter(make_world):
    world = make_world("mixed")
    liar = world.sums.cells[0]
    liar.found.row_weights[0] = 0.5
    decision = world.decide()
    assert decision.cells[0].removed.startswith("its participation is between none and all")
    assert decision.cells[0].factor == 0.0
    others = world.sums.only(world.sums.cells[1:])
    assert decision.cells[1:] == world.rules.decide(others, chance=CHANCE).cells


def test_flexlora_averages_products(make_world):
    world = make_world("flexlora")
    merged = world.merge()
    found = flexlora_step(world.as_units, world.start.vector(), world.layout, world.lora)
    assert merged.step.tobytes() == found.step.tobytes()
    assert merged.report.rule == "flexlora"
    assert merged.report.left_out_norm == found.error_norm


def test_the_gap_is_that_of_the_kept_updates(make_world):
    world = make_world("robust", size=160)
    decision, gap = world.decide(), world.merge().report.covariance_gap
    found = estimate_gap(
        kept_updates(world.as_units, decision.kept, decision.factors),
        start=world.start.vector(),
        layout=world.layout,
        scale=world.lora.scale,
        seed=CHANCE.gap_seed(),
    )
    assert gap == found


@pytest.mark.parametrize("clip_norm", [None, 1.25])
def test_a_noisy_mean_is_that_of_its_stream(make_world, clip_norm):
    world = make_world("noisy")
    merged = world.merge(clip_norm=lambda: clip_norm)
    found = noisy_mean(
        world.loaded,
        n_values=world.layout.n_values,
        privacy=NOISY["privacy"],
        clip_norm=clip_norm or 3.0,
        rounding_norm=0.0,
        stream=CHANCE.noise(),
    )
    assert merged.step.tobytes() == found.mean.tobytes()
    assert merged.report.next_clip_norm == found.next_clip_norm
    assert merged.report.clip_norm == (clip_norm or 3.0)


def test_control_variates_are_renewed_from_those_that_count(make_world):
    world = make_world("scaffold")
    decision, merged = world.decide(), world.merge()
    changes = {
        cell.only_member: lambda cell=cell: cell.found.control
        for cell, keeps in zip(world.sums.cells, decision.kept, strict=True)
        if keeps
    }
    assert 1 < len(changes) < N_AGENTS
    zero = np.zeros(world.layout.n_values, np.float32)
    control, book = renewed(zero, ControlBook(), changes, capped=True)
    assert merged.control[0].tobytes() == control.tobytes()
    assert merged.control[1] == book
    again = world.merge(control=lambda: merged.control)
    expected = renewed(control, book, changes, capped=True)
    assert again.control[0].tobytes() == expected[0].tobytes()


def test_what_is_left_out_is_judged_no_more_and_the_others_anew(make_world):
    world = make_world("robust")
    decision = world.decide()
    left_out = world.sums.cells[2]
    found = world.rules.decide_without(world.sums, decision, {left_out.transcript}, chance=CHANCE)
    assert found.cells[2].removed == LEFT_OUT
    assert found.cells[-1] == decision.cells[-1]
    assert found.report.n_rejected == sum(cell.removed is not None for cell in found.cells)
    rest = world.sums.only([world.sums.cells[i] for i in np.flatnonzero(decision.kept) if i != 2])
    assert [cell for cell in found.cells if cell.removed is None] == [
        cell for cell in world.rules.decide(rest, chance=CHANCE).cells if cell.removed is None
    ]
    everyone = {cell.transcript for cell in world.sums.cells}
    with pytest.raises(AggregationError, match="leaves out all 12 cells"):
        world.rules.decide_without(world.sums, decision, everyone, chance=CHANCE)


def test_a_decision_on_other_cells_is_refused(make_world):
    world = make_world()
    fewer = world.sums.only(world.sums.cells[1:])
    with pytest.raises(AggregationError, match="decided on other cells"):
        world.rules.merge(fewer, world.decide(), world.start, chance=CHANCE)


# Guarantees of MergeRules


def everything_of(world: World, chance: Chance) -> Sequence[object]:
    decision, merged = world.decide(chance), world.merge(chance)
    control = None if merged.control is None else (merged.control[0].tobytes(), merged.control[1])
    return [
        decision.canonical(),
        merged.step.tobytes(),
        merged.report,
        merged.optimizer_state,
        control,
    ]


@pytest.mark.parametrize("name", BLOCKS)
def test_guarantee_1_equal_input_gives_equal_bits(make_world, name):
    chance = Chance.of(bytes(range(32)), 3)
    first = everything_of(make_world(name, size=160), CHANCE)
    assert everything_of(make_world(name, size=160), CHANCE) == first
    assert everything_of(make_world(name, size=160), chance) == first


@pytest.mark.parametrize("name", ["robust", "noisy", "mean"])
@pytest.mark.parametrize("other", [Chance.of(bytes(32), 3), Chance.of(bytes(range(32)), 4), SYSTEM])
def test_other_chance_gives_other_scores_noise_and_gaps(make_world, name, other):
    world = make_world(name, size=160)
    ours, theirs = everything_of(world, CHANCE), everything_of(world, other)
    assert (ours[0] != theirs[0]) is (name == "robust")  # scores come from a projection
    assert (ours[1] != theirs[1]) is (name == "noisy")
    assert ours[2] != theirs[2]


def never(*_: object) -> object:
    raise AssertionError("nobody needs this")


def test_guarantee_2_what_no_rule_needs_is_not_asked_for(make_world):
    blind = Chance(filter_seed=never, gap_seed=never, noise=never)
    start = {"vector": never, "clip_norm": never, "control": never}
    for name in ("mixed", "masked", "noisy", "mean", "flexlora"):
        world = make_world(name)
        needs = {
            "mixed": {"filter_seed": CHANCE.filter_seed},
            "masked": {"filter_seed": CHANCE.filter_seed},
            "noisy": {"noise": CHANCE.noise},
            "mean": {"gap_seed": CHANCE.gap_seed},
            "flexlora": {},
        }[name]
        asked = {
            "noisy": {"clip_norm": lambda: None},
            "mean": {"vector": world.start.vector},
            "flexlora": {"vector": world.start.vector},
        }.get(name, {})
        chance = Chance(**{**vars(blind), **needs})
        assert world.merge(chance, **{**start, **asked}).step.any()


# Chance


def test_guarantee_1_of_chance_the_system_never_says_the_same_twice():
    assert Chance() == SYSTEM
    draws = {SYSTEM.filter_seed() for _ in range(3)} | {SYSTEM.gap_seed() for _ in range(3)}
    draws |= {SYSTEM.noise().take_bytes(32) for _ in range(3)}
    assert len(draws) == 9
    assert {len(draw) for draw in draws} == {32}


def test_guarantee_2_of_chance_a_secret_and_a_number_always_say_the_same():
    def says(chance: Chance) -> tuple[bytes, ...]:
        return (chance.filter_seed(), chance.gap_seed(), chance.noise().take_bytes(32))

    assert says(CHANCE) == says(CHANCE) == says(Chance.of(bytes(range(32)), 3))
    other = says(Chance.of(bytes(range(32)), 4)) + says(Chance.of(bytes(32), 3))
    assert len({*says(CHANCE), *other}) == 9


# The server


def test_the_server_chooses_no_chance():
    """So it has the default, the operating system; the argument can only be named."""
    folder = Path(aggregator_server.__file__).parent
    choosing = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "chance"
    }
    assert choosing == {"merge_rules.py"}  # where one rule hands on to another what it was given


def test_guarantee_1_of_the_merger_a_mean_that_is_made_again_has_other_noise(
    make_case, start_round
):
    options = PrivacyOptions(epsilon=8.0, profile=Profile.CENTRAL, clip_norm=0.5)
    case = make_case(cohort_target=2, privacy=options)
    agents, manifest = start_round(case, 2)
    for agent in agents:
        agent.upload(manifest, agent.constant(1e-3))
    federation = case.federation
    store = federation._store
    merger = Merger(
        store, federation._blobs, federation.uploads, federation.releases, federation.charter
    )
    cells, base = store.uploads.cells(1), federation.releases.newest()
    assert {cell.only_member for cell in cells} == {agent.identity for agent in agents}
    decision = merger.decide(cells)
    first, second = (merger.merge(cells, decision, base) for _ in range(2))
    assert first.report.clip_norm == 0.5
    assert (first.step != second.step).all()
    assert np.isfinite(apply_mean(federation.releases.vector(base), first.step)).all()


def test_the_optimiser_of_a_block_has_its_settings():
    assert optimizers.optimizer_of(FedAvgBlock(learning_rate=0.5)) == optimizers.FedAvg(
        learning_rate=0.5
    )
    assert optimizers.optimizer_of(ADAM.optimizer) == optimizers.FedAdam(
        learning_rate=0.3, tau=0.02
    )

"""An agent that trains a part of the adapter: what it trains, sends, and is told."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from edge_agent.config import AgentSettings, load_settings, save_settings
from edge_agent.consent import disclose
from edge_agent.data.tokens import Example
from edge_agent.errors import ConfigError, TrainingError
from edge_agent.explaining import explain
from edge_agent.masked import encoded
from edge_agent.member import OwnersPart
from edge_agent.own_part import OwnPart, own_part
from edge_agent.training.planning import fitting_rank, workload_of
from edge_agent.training.sampling import ShuffledBatches
from edge_agent.training.trainer import LocalTrainer, RoundRecipe
from privacy.fixed_point import EncodingPlan, agreed_layout
from privacy.updates import PlainUpdate
from protocol.blocks import (
    AggregationBlock,
    CellMasking,
    Factor,
    LoraBlock,
    RoundsBlock,
    TrainingBlock,
)
from protocol.clock import SystemClock
from protocol.layout import PARTICIPATION
from quant.adapter import adapter_shapes, initial_adapter, sent_layout, unflatten
from quant.base_model import LoadedBase
from quant.companions import update_layout
from quant.errors import MemoryLimitError
from quant.fitting import choose
from quant.lora import AdaptedModel
from quant.mixed_ranks import by_row, modules_of, own_lora

RANK = 8


def make_lora(**changes: Any) -> LoraBlock:
    values = {
        "rank": RANK,
        "alpha": 16.0,
        "target_modules": ("q_proj", "v_proj"),
        "init_seed": 7,
        "min_rank": 2,
        "optional_modules": ("v_proj",),
    }
    return LoraBlock(**{**values, **changes})


def make_examples(n_examples: int = 12) -> list[Example]:
    rng = np.random.default_rng(3)
    return [
        Example(
            input_ids=rng.integers(3, 300, 20).astype(np.int32),
            loss_mask=np.arange(20) >= 8,
            source=f"made[{number}]",
            category=None,
            truncated=False,
        )
        for number in range(n_examples)
    ]


def train(base: LoadedBase, part: OwnPart, start: Any, n_steps: int = 4) -> PlainUpdate:
    adapted = AdaptedModel(base, part.lora)
    examples = make_examples()
    block = TrainingBlock(batch_size=4, local_steps=n_steps, learning_rate=1e-2)
    try:
        trainer = LocalTrainer(
            adapted,
            examples,
            RoundRecipe(training=block, schedule_start=0.0, schedule_end=0.5, seed=3),
            sampler=ShuffledBatches(n_examples=len(examples), batch_size=4, seed=11),
            clock=SystemClock(),
        )
        update = trainer.run(part.start_of(start), part.layout, weight=5).update
    finally:
        adapted.detach()
    return part.spread(update)


@pytest.mark.parametrize("sent", [(Factor.A, Factor.B), (Factor.B,)])
@pytest.mark.parametrize(("rank", "left_out"), [(2, ()), (5, ("v_proj",)), (None, ())])
def test_guarantee_1_an_agent_moves_its_own_rows_and_no_other(
    random_base: LoadedBase, sent: tuple[Factor, ...], rank: int | None, left_out: tuple[str, ...]
) -> None:
    lora = make_lora(sent=sent)
    part = own_part(random_base.description, lora, OwnersPart(rank=rank, left_out=left_out))
    start = initial_adapter(random_base.description, lora)
    update = train(random_base, part, start)
    whole = sent_layout(adapter_shapes(random_base.description, lora), sent)
    assert update.vector.shape == (whole.n_values,)
    assert update.participation is not None
    said = update.participation.reshape(-1, RANK)
    places = modules_of(whole)
    for slot, where in whole.slices():
        rows = by_row(update.vector[where], slot)
        module = next(name for name in places if f".{name}.lora_" in slot.name)
        n_rows = 0 if any(module.endswith(name) for name in left_out) else rank or RANK
        assert said[places[module]].tolist() == [1.0] * n_rows + [0.0] * (RANK - n_rows)
        assert not rows[n_rows:].any()
        if slot.name.endswith("lora_B.weight"):
            assert (np.abs(rows[:n_rows]).max(axis=1) > 0.0).all()
    moved = unflatten(update.vector, whole)
    for name, change in moved.items():  # what nobody trained stays as it was, bit for bit
        untouched = change == 0.0
        assert (start[name] + change)[untouched].tobytes() == start[name][untouched].tobytes()


@pytest.mark.parametrize("rank", [2, 4])
def test_rows_of_an_agent_of_low_rank_mean_the_same_as_those_of_the_whole(
    random_base: LoadedBase, rank: int
) -> None:
    """With the other rows zero, the whole adapter computes what the agent's own one does."""
    lora = make_lora(optional_modules=())
    part = own_part(random_base.description, lora, OwnersPart(rank=rank))
    start = initial_adapter(random_base.description, lora)
    rng = np.random.default_rng(1)
    start = {
        name: array + rng.normal(0.0, 0.05, array.shape).astype(np.float32)
        for name, array in start.items()
    }
    for name, array in start.items():
        if "lora_B" in name:
            array[:, rank:] = 0.0
    found = []
    for block, arrays in ((lora, start), (part.lora, part.start_of(start))):
        adapted = AdaptedModel(random_base, block)
        adapted.load(arrays)
        adapted.model.eval()
        with torch.no_grad():
            ids = torch.arange(3, 19).unsqueeze(0)
            found.append(adapted.model(input_ids=ids).logits.float().numpy())
        adapted.detach()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_where_all_train_all_the_update_is_as_the_trainer_made_it(random_base: LoadedBase) -> None:
    lora = make_lora(min_rank=None, optional_modules=())
    part = own_part(random_base.description, lora, OwnersPart())
    update = PlainUpdate(vector=np.ones(part.layout.n_values, np.float32), weight=3)
    assert part.spread(update) is update
    assert part.lora == lora


def test_an_update_that_moved_nothing_is_not_masked_whatever_it_says_of_rows(
    random_base: LoadedBase,
) -> None:
    lora = make_lora()
    part = own_part(random_base.description, lora, OwnersPart(rank=2))
    masking = CellMasking(max_change=1.0, clip_norm=1.0)
    training = TrainingBlock(local_steps=1, learning_rate=1e-3)
    layout = update_layout(adapter_shapes(random_base.description, lora), lora, training)
    plan = EncodingPlan.of(agreed_layout(layout, masking), masking, max_weight=9)
    zero = PlainUpdate(vector=np.zeros(part.layout.n_values, np.float32), weight=3)
    with pytest.raises(TrainingError, match="zero"):
        encoded(part.spread(zero), plan)
    words = encoded(part.spread(replace(zero, vector=zero.vector + 0.001)), plan)
    where = layout.companion(PARTICIPATION)
    assert sorted(set(words[where].tolist())) == [0, 3]


def test_what_the_manifest_does_not_allow_is_refused_by_the_name_of_the_setting(
    random_base: LoadedBase,
) -> None:
    for owner in (OwnersPart(rank=1), OwnersPart(left_out=("q_proj",))):
        with pytest.raises(ConfigError, match=r"change --rank or --leave-out"):
            own_part(random_base.description, make_lora(), owner)


def test_rank_and_modules_are_settings_like_others(tmp_path) -> None:
    settings = AgentSettings(rank=4, leave_out=("v_proj",))
    save_settings(tmp_path, settings)
    assert load_settings(tmp_path, {}) == settings
    assert load_settings(tmp_path, {"rank": 2}).rank == 2
    with pytest.raises(ConfigError, match="'rank'"):
        load_settings(tmp_path, {"rank": 0})


# What the owner is told


@pytest.mark.parametrize(
    ("masking", "told"),
    [
        (None, "so the server sees it of you by yourself: it hints at the memory of your card"),
        (
            CellMasking(max_change=1.0, clip_norm=1.0),
            "travels masked: of each row, the server learns how much weight of a whole cell",
        ),
    ],
)
def test_join_says_what_a_rank_of_ones_own_tells(make_manifest: Any, masking, told: str) -> None:
    manifest = make_manifest(lora=make_lora(), **({} if masking is None else masking_of(masking)))

    def leaves(owner: OwnersPart | None) -> str:
        disclosure = disclose(
            manifest, server_host="h", base_folder=None, round_n_bytes=100, own_part=owner
        )
        return " ".join(disclosure.what_leaves)

    assert told in leaves(None)
    assert "It trains as many rank rows as fit your card, in all modules." in leaves(None)
    chosen = OwnersPart(rank=3, left_out=("v_proj",))
    assert "It trains 3 rank rows, and leaves out v_proj." in leaves(chosen)
    learns = " ".join(explain(manifest).learns)
    assert "rank row" in learns


def masking_of(masking: CellMasking) -> dict[str, Any]:
    return {
        "masking": masking,
        "aggregation": AggregationBlock(max_weight=100),
        "rounds": RoundsBlock(n_rounds=1, cohort_target=10, min_cohort=10),
    }


def test_join_says_nothing_of_ranks_where_all_train_all(make_manifest: Any) -> None:
    manifest = make_manifest()
    disclosure = disclose(manifest, server_host="h", base_folder=None, round_n_bytes=100)
    assert not [line for line in disclosure.what_leaves if "rank row" in line]
    assert not [line for line in explain(manifest).learns if "rank row" in line]


# The rank that fits


@dataclass
class FakeMeter:
    """A card of a size."""

    limit: int

    def limit_bytes(self) -> int:
        return self.limit

    def added_bytes(self, work: Any) -> int:
        raise NotImplementedError

    def seconds(self, work: Any) -> float:
        raise NotImplementedError


def test_a_card_too_small_for_the_federations_rank_gets_one_that_fits(
    random_base: LoadedBase,
) -> None:
    lora = LoraBlock(
        rank=1024, alpha=2048.0, target_modules=("q_proj", "v_proj"), init_seed=1, min_rank=8
    )
    own = own_lora(lora, rank=None, left_out=())
    adapted = AdaptedModel(random_base, own_lora(lora, rank=8, left_out=()))
    workload = workload_of(adapted, longest=64)
    adapted.detach()

    def smallest_limit(rank: int) -> int:
        sized = replace(workload, lora=replace(workload.lora, rank=rank))
        low, high = 0, 10**12
        while high - low > 1000:
            middle = (low + high) // 2
            try:
                choose(sized, limit_bytes=middle)
            except MemoryLimitError:
                low = middle
            else:
                high = middle
        return high

    def chosen(limit: int) -> int:
        return fitting_rank(random_base, own, lowest=8, longest=64, meter=FakeMeter(limit))

    assert chosen(10**12) == 1024
    assert chosen(smallest_limit(512)) == 512
    assert chosen(smallest_limit(64) + 10_000) == 64
    assert chosen(1) == 8
    assert fitting_rank(random_base, own, lowest=8, longest=64) == 1024  # a CPU has no such limit

"""What a round's updates look like, by the release that it starts from."""

import pytest

from privacy.errors import EncodingPlanError
from privacy.fixed_point import EncodingPlan, agreed_layout
from privacy.turns import Turns
from protocol.blocks import AggregationBlock, CellMasking, RoundsBlock
from protocol.layout import VectorLayout

LAYOUTS = tuple(VectorLayout.of_shapes({"t": (n,)}) for n in (6, 10))
MASKING = CellMasking(max_change=0.1, clip_norm=1.0)
MASKED = {
    "masking": MASKING,
    "rounds": RoundsBlock(n_rounds=2, cohort_target=10, min_cohort=5),
    "aggregation": AggregationBlock(max_weight=100),
}


def test_guarantee_1_the_terms_follow_the_number_of_the_release(make_manifest):
    turns = Turns.of(LAYOUTS, make_manifest())
    assert [turns.at(release).layout for release in range(5)] == [*LAYOUTS, *LAYOUTS, LAYOUTS[0]]
    assert [turns.at(release).n_bytes for release in (0, 1)] == [24, 40]
    assert turns.max_n_bytes == 40
    one = Turns.of(LAYOUTS[:1], make_manifest())
    assert [one.at(release).layout for release in range(3)] == [LAYOUTS[0]] * 3


def test_under_masks_each_turn_has_the_plan_of_its_layout(make_manifest):
    turns = Turns.of(LAYOUTS, make_manifest(**MASKED))
    for release in range(4):
        layout = agreed_layout(LAYOUTS[release % 2], MASKING)
        plan = EncodingPlan.of(layout, MASKING, max_weight=100)
        assert turns.plan_at(release) == plan
        assert turns.at(release).layout == layout
        assert turns.at(release).n_bytes == plan.n_bytes


def test_without_masks_there_are_no_words(make_manifest):
    with pytest.raises(EncodingPlanError, match="masks nothing"):
        Turns.of(LAYOUTS, make_manifest()).plan_at(0)

"""The order of an adapter's numbers in one vector."""

from typing import Any

import pytest
from pydantic import ValidationError

from protocol import limits
from protocol.errors import ManifestError
from protocol.layout import PARTICIPATION, TensorSlot, VectorLayout
from protocol.wire import parse

SHAPES = {"b": (2, 3), "a": (4,), "c.d": (1, 1, 5)}


def slot(name: str, shape: tuple[int, ...], offset: int, **more: Any) -> TensorSlot:
    return TensorSlot(name=name, shape=shape, offset=offset, **more)


def test_guarantee_1_slots_follow_one_another_sorted_by_name() -> None:
    layout = VectorLayout.of_shapes(SHAPES)
    places = [(found.name, where.start, where.stop) for found, where in layout.slices()]
    assert places == [("a", 0, 4), ("b", 4, 10), ("c.d", 10, 15)]
    assert (layout.n_values, layout.n_bytes, len(layout)) == (15, 60, 3)


@pytest.mark.parametrize(
    ("slots", "fault"),
    [
        ((slot("a", (2,), 0), slot("b", (2,), 3)), "ends at 2"),
        ((slot("a", (2,), 0), slot("b", (2,), 1)), "ends at 2"),
        ((slot("a", (2,), 1),), "ends at 0"),
        ((slot("b", (2,), 0), slot("a", (2,), 2)), "must ascend"),
        ((slot("a", (2,), 0), slot("a", (2,), 2)), "must ascend"),
        ((), "at least 1 item"),
    ],
)
def test_guarantee_1_gaps_overlaps_and_disorder_are_refused(
    slots: tuple[TensorSlot, ...], fault: str
) -> None:
    with pytest.raises(ValidationError, match=fault):
        VectorLayout(slots=slots)


def test_guarantee_2_equal_digests_mean_equal_layouts() -> None:
    layout = VectorLayout(slots=(slot("a", (2, 3), 0), slot("b", (4,), 6)))
    again = VectorLayout.of_shapes({"b": (4,), "a": (2, 3)})
    assert again == layout
    assert again.digest() == layout.digest()
    others = [
        (slot("a", (3, 2), 0), slot("b", (4,), 6)),
        (slot("a", (6,), 0), slot("b", (4,), 6)),
        (slot("A", (2, 3), 0), slot("b", (4,), 6)),
        (slot("a", (2, 3), 0),),
        (slot("a", (2, 3), 0), slot("b", (2, 2), 6)),
        (slot("a", (2, 3), 0, step=0.5), slot("b", (4,), 6)),
        (slot("a", (2, 3), 0, step=0.25), slot("b", (4,), 6)),
        (slot("a", (2, 3), 0, clip_amplitude=7), slot("b", (4,), 6)),
        (slot("a", (2, 3), 0), slot("b", (4,), 6, clip_amplitude=7)),
    ]
    digests = {VectorLayout(slots=slots).digest() for slots in others} | {layout.digest()}
    assert len(digests) == len(others) + 1


@pytest.mark.parametrize(
    "values",
    [
        {"shape": ()},
        {"shape": (0,)},
        {"shape": (-1, -1)},
        {"shape": (2,) * 9},
        {"name": ""},
        {"name": "x" * (limits.MAX_TENSOR_NAME_CHARS + 1)},
        {"offset": -1},
        {"step": 0.0},
        {"step": float("nan")},
        {"clip_amplitude": 0},
        {"clip_amplitude": 2**53},
    ],
)
def test_a_slot_beyond_the_limits_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TensorSlot(**{"name": "a", "shape": (2,), "offset": 0, **values})


def test_a_vector_beyond_the_limit_is_refused_though_each_tensor_is_not() -> None:
    n_values = limits.MAX_UPDATE_BYTES // 4
    assert VectorLayout.of_shapes({"a": (n_values,)}).n_bytes == limits.MAX_UPDATE_BYTES
    with pytest.raises(ValidationError, match="exceed"):
        VectorLayout.of_shapes({"a": (n_values,), "b": (1,)})
    with pytest.raises(ValidationError, match="exceed"):
        VectorLayout.of_shapes({"a": (2**31 - 1,) * 8})


def test_a_layout_round_trips_as_json() -> None:
    layout = VectorLayout.of_shapes(SHAPES)
    assert parse(VectorLayout, layout.canonical()) == layout
    with pytest.raises(ManifestError, match="slots"):
        parse(VectorLayout, b'{"slots": []}')


def test_guarantee_3_companions_stand_behind_the_tensors() -> None:
    layout = VectorLayout.of_shapes({**SHAPES, PARTICIPATION: (2, 4)}, step=0.5, clip_amplitude=7)
    assert layout.tensors == VectorLayout.of_shapes(SHAPES, step=0.5, clip_amplitude=7)
    assert layout.companion(PARTICIPATION) == slice(15, 23)
    assert layout.tensors.companion(PARTICIPATION) is None
    last = layout.slots[-1]
    assert (last.is_companion, last.step, last.clip_amplitude) == (True, None, None)
    with pytest.raises(ValidationError, match="stands behind the companion"):
        VectorLayout.of_shapes({PARTICIPATION: (2,), "z": (3,)})


def test_a_layout_without_companions_is_its_own_tensors() -> None:
    layout = VectorLayout.of_shapes(SHAPES)
    assert layout.tensors is layout
    assert layout.companion("a") is None

"""Sweeps: utility, privacy, bytes, and the best of them."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image
from matplotlib.figure import Figure
from pyarrow import csv, parquet
from rich.console import Console

from simulations.errors import OutputError
from simulations.lab.records import EndNote, Measure
from simulations.lab.report import surface_figure
from simulations.lab.report.surface import Surface, SweepPoint, pareto_front
from simulations.lab.report.surface_figure import draw_surface

COSTS = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, math.inf])


def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    nowhere_worse = all(a <= b for a, b in zip(one, other, strict=True))
    return nowhere_worse and any(a < b for a, b in zip(one, other, strict=True))


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[COSTS] * n), max_size=25)))
def test_no_point_of_the_front_is_dominated_and_every_other_is(
    points: list[tuple[float, ...]],
) -> None:
    flags = pareto_front(points)
    front = [point for point, flag in zip(points, flags, strict=True) if flag]
    assert bool(front) == bool(points)
    for point, flag in zip(points, flags, strict=True):
        assert flag != any(dominates(other, point) for other in points)
        if not flag:
            assert any(dominates(other, point) for other in front)


@given(st.lists(st.tuples(COSTS, COSTS), min_size=1, max_size=10), st.randoms())
def test_the_order_of_points_does_not_matter(points: list[tuple[float, ...]], random: Any) -> None:
    shuffled = random.sample(range(len(points)), len(points))
    flags = pareto_front(points)
    assert pareto_front([points[place] for place in shuffled]) == [flags[p] for p in shuffled]


def test_no_points_have_no_front_and_nan_is_refused() -> None:
    assert pareto_front([]) == []
    assert pareto_front([(1.0, 1.0), (1.0, 1.0)]) == [True, True]
    with pytest.raises(ValueError, match="NaN"):
        pareto_front([(math.nan, 1.0)])
    with pytest.raises(ValueError, match="inhomogeneous"):
        pareto_front([(1.0,), (1.0, 2.0)])


@pytest.fixture
def make_point(
    make_run: Callable[..., Path], make_round: Callable[..., Any], make_scores: Callable[..., Any]
) -> Callable[..., SweepPoint]:
    """A combination of settings, run with two seeds, whose losses are 0.1 below and above."""

    def make(
        loss: float,
        epsilon: float | None,
        *,
        n_bytes: int = 4000,
        profile: str = "P1",
        ended: bool = True,
        guarantee: str = "no formal guarantee (profile P0): ε = ∞",
        n_crafted: int | None = None,
        **settings: Any,
    ) -> SweepPoint:
        roots = {}
        for seed, shift in ((1, -0.1), (2, 0.1)):
            notes = [
                make_round(1, bytes_up=n_bytes, bytes_down=0, epsilon=epsilon, n_crafted=n_crafted),
                *([] if n_crafted is None else [make_round(2, n_crafted=0)]),
                *make_scores(1, {"a": loss + shift - 1.0, "b": loss + shift + 1.0}),
                *make_scores(1, {"a": 0.2, "b": 0.4}, Measure.EXACT_MATCH),
                *([EndNote(wall_s=1.0)] if ended else []),
            ]
            name = "-".join(str(value) for value in (*settings.values(), epsilon, seed))
            promised = "P0" if epsilon is None else profile
            roots[seed] = make_run(name, notes, seed=seed, profile=promised, guarantee=guarantee)
        return SweepPoint(settings={"federation.epsilon": epsilon, **settings}, roots=roots)

    return make


@pytest.fixture
def surface(make_point: Callable[..., SweepPoint]) -> Surface:
    return Surface.of(
        [
            make_point(3.0, 1.0, rank=8),
            make_point(3.1, 1.0, rank=16, n_bytes=8000),  # worse, and sends more
            make_point(2.5, 8.0, rank=8),
            make_point(2.4, 8.0, rank=16, n_bytes=8000),
            make_point(2.6, None, rank=8),  # no privacy, and no better for it
            make_point(2.0, None, rank=16, n_bytes=8000),
        ]
    )


def test_a_row_tells_in_how_many_rounds_it_was_attacked(
    make_point: Callable[..., SweepPoint],
) -> None:
    calm, attacked = (
        make_point(3.0, 1.0, attack="none"),
        make_point(3.5, 1.0, attack="alie", n_crafted=2),
    )
    found = Surface.of([calm, attacked])
    assert [row.attacked for row in found.rows] == [None, (2, 4)]  # two seeds of two rounds
    head, _, first, second, *_ = found.markdown().splitlines()
    assert head.rstrip(" |").endswith("rounds attacked")
    assert first.rstrip(" |").endswith("–")
    assert second.rstrip(" |").endswith("2 of 4")
    row = json.loads(json.dumps(found.as_json()))["rows"][1]
    assert (row["rounds_attacked"], row["rounds"]) == (2, 4)
    assert "attacked" not in Surface.of([calm]).markdown()


def test_rows_tell_utility_privacy_and_bytes(surface: Surface) -> None:
    row = surface.rows[0]
    loss = row.utility[Measure.LOSS]
    assert loss.by_seed == pytest.approx({1: 2.9, 2: 3.1})
    assert loss.mean == pytest.approx(3.0)
    assert loss.std == pytest.approx(math.sqrt(0.02))
    assert row.utility[Measure.EXACT_MATCH].mean == pytest.approx(0.3)
    assert (row.epsilon, row.profile, row.n_bytes_per_agent) == (1.0, "P1", 1000.0)
    assert surface.rows[4].epsilon is None
    assert surface.rows[4].profile == "P0"
    assert surface.axes() == ("federation.epsilon", "rank")


def test_the_front_holds_what_nothing_beats(surface: Surface) -> None:
    by_loss = [row.on_front[Measure.LOSS] for row in surface.rows]
    assert by_loss == [True, False, True, True, False, True]
    # All match alike: the least ε and bytes are best.
    by_match = [row.on_front[Measure.EXACT_MATCH] for row in surface.rows]
    assert by_match == [True, False, False, False, False, False]


def test_epsilons_of_two_profiles_do_not_beat_one_another(
    make_point: Callable[..., SweepPoint],
) -> None:
    found = Surface.of(
        [
            make_point(2.0, 1.0, unit="example"),
            make_point(3.0, 2.0, unit="agent", profile="P2"),
            make_point(2.5, None, unit="none"),
        ]
    )
    # Without privacy and worse than an example's ε: beaten by it, whatever agents' ε say.
    assert [row.on_front[Measure.LOSS] for row in found.rows] == [True, True, False]
    assert [row.profile for row in found.rows] == ["P1", "P2", "P0"]


def test_unfinished_runs_are_on_no_front_and_beat_nothing(
    make_point: Callable[..., SweepPoint],
) -> None:
    found = Surface.of([make_point(1.0, 1.0, rank=4, ended=False), make_point(3.0, 8.0, rank=8)])
    assert [row.on_front[Measure.LOSS] for row in found.rows] == [False, True]
    assert [row.n_unfinished for row in found.rows] == [2, 0]
    assert "2 (2 unfinished)" in found.markdown()


def test_the_epsilon_of_a_private_run_that_has_not_begun_is_not_infinite(
    make_run: Callable[..., Path],
) -> None:
    roots = {1: make_run("new", [], profile="P3")}
    found = Surface.of([SweepPoint(settings={"rank": 8}, roots=roots)])
    assert (found.rows[0].epsilon, found.rows[0].profile) == (None, "P3")
    assert found.markdown().splitlines()[2].endswith("| 1 (1 unfinished) | – | P3 | – |")


def test_parquet_and_csv_hold_every_number(surface: Surface, tmp_path: Path) -> None:
    paths = surface.write(tmp_path / "sweep")
    assert [path.name for path in paths] == ["surface.parquet", "surface.csv"]
    table = parquet.read_table(paths[0])
    assert table.column("epsilon").to_pylist() == [1.0, 1.0, 8.0, 8.0, None, None]
    assert table.column("rank").to_pylist() == [8, 16] * 3
    assert table.schema.field("rank").type == pa.int64()
    assert table.column("loss_mean").to_pylist() == pytest.approx([3.0, 3.1, 2.5, 2.4, 2.6, 2.0])
    assert table.column("bytes_per_agent").to_pylist()[:2] == [1000.0, 2000.0]
    assert table.column("on_front_loss").to_pylist() == [True, False, True, True, False, True]
    assert table.column("rouge_l_mean").null_count == 6
    assert table.schema.field("rouge_l_mean").type == pa.float64()
    assert csv.read_csv(paths[1]).column("loss_mean") == table.column("loss_mean")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((1, None), pa.int64()),
        ((1, 2.5), pa.float64()),
        ((1, "auto"), pa.string()),
        ((True, False), pa.bool_()),
        ((True, 3), pa.string()),
        ((None, None), pa.string()),
    ],
)
def test_a_setting_has_the_type_that_holds_all_its_values(
    make_point: Callable[..., SweepPoint], values: tuple[Any, Any], kind: pa.DataType
) -> None:
    points = [make_point(2.0, float(place), key=value) for place, value in enumerate(values)]
    assert Surface.of(points).arrow().schema.field("key").type == kind


def test_a_setting_that_is_a_list_is_written_as_json(
    make_point: Callable[..., SweepPoint], tmp_path: Path
) -> None:
    modules = (["q_proj"], ["q_proj", "v_proj"], None)
    points = [
        make_point(2.0 + place, 1.0, place=place, target_modules=value)
        for place, value in enumerate(modules)
    ]
    found = Surface.of(points)
    paths = found.write(tmp_path)
    texts = ['["q_proj"]', '["q_proj", "v_proj"]', None]
    assert parquet.read_table(paths[0]).column("target_modules").to_pylist() == texts
    assert csv.read_csv(paths[1]).num_rows == 3
    assert r'| \["q_proj", "v_proj"\] |' in found.markdown()
    draw_surface(found, tmp_path / "surface.png")


def test_tables_mark_the_front(surface: Surface) -> None:
    lines = surface.markdown().splitlines()
    assert lines[0].startswith("| epsilon | rank | seeds | held-out loss | exact match, % | ε |")
    assert "| 1 | 8 | 2 | 3.000 ± 0.141 ◆ | 30.0 ± 0.0 ◆ | 1 | P1 | 1.00 kB |" in lines
    assert "| none | 8 | 2 | 2.600 ± 0.141 | 30.0 ± 0.0 | ∞ | P0 | 1.00 kB |" in lines
    console = Console(file=io.StringIO(), width=120)
    console.print(surface.table())
    assert isinstance(console.file, io.StringIO)
    assert "3.000 ± 0.141 ◆" in console.file.getvalue()


def test_tables_say_what_their_columns_are_and_what_is_promised(
    make_point: Callable[..., SweepPoint],
) -> None:
    promised = {epsilon: f"ε ≤ {epsilon} at δ = 1e-05 for each example" for epsilon in (1.0, 8.0)}
    points = [
        make_point(3.0, epsilon, rank=rank, guarantee=promised[epsilon])
        for epsilon in (1.0, 8.0)
        for rank in (4, 8)
    ]
    found = Surface.of([*points, make_point(2.0, None, rank=4)])
    console = Console(file=io.StringIO(), width=400)
    console.print(found.table())
    assert isinstance(console.file, io.StringIO)
    for text in (found.markdown(), " ".join(console.file.getvalue().split())):
        for said in (*promised.values(), "no formal guarantee (profile P0): ε = ∞"):
            assert text.count(said) == 1
        assert "◆: no other row is at least as good" in text
        assert "mean ± standard deviation over seeds" in text
        assert "those of the masked vectors, without the messages of keys and shares" in text


def test_json_has_no_infinity(surface: Surface) -> None:
    found = json.loads(json.dumps(surface.as_json(), allow_nan=False))
    assert found["rows"][5]["epsilon"] is None
    assert found["rows"][0]["on_front"] == {"loss": True, "exact_match": True}
    assert found["rows"][0]["settings"] == {"federation.epsilon": 1.0, "rank": 8}


def test_it_is_drawn(surface: Surface, tmp_path: Path) -> None:
    draw_surface(surface, tmp_path / "surface.png")
    pixels = image.imread(tmp_path / "surface.png")
    assert pixels.shape[0] > 400
    assert len(np.unique(pixels)) > 10


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would be written."""
    found: list[Figure] = []
    monkeypatch.setattr(surface_figure, "write_png", lambda figure, _: found.append(figure))
    return found


def best_lines(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for line in figure.axes[0].get_lines()
        if str(line.get_label()).startswith("best at")
    }


def test_each_profile_has_a_line_of_its_own_to_what_is_best(
    make_point: Callable[..., SweepPoint], drawn: list[Figure]
) -> None:
    points = [
        make_point(3.0, 1.0, unit="example", rank=4),
        make_point(2.8, 4.0, unit="example", rank=4),
        make_point(2.5, 2.0, unit="agent", rank=4, profile="P2"),  # better, of another thing
        make_point(2.9, 8.0, unit="agent", rank=4, profile="P2"),
        make_point(2.0, None, unit="none", rank=4),
    ]
    draw_surface(Surface.of(points), Path("surface.png"))
    lines = best_lines(drawn[0])
    assert lines["best at this ε or less, P1"][1] == pytest.approx([3.0, 2.8, 2.0])
    assert lines["best at this ε or less, P2"][1] == pytest.approx([2.5, 2.5, 2.0])
    assert lines["best at this ε or less, P2"][0][:2] == [2.0, 8.0]
    draw_surface(Surface.of(points[:2]), Path("surface.png"))
    assert set(best_lines(drawn[1])) == {"best at this ε or less"}


def test_points_of_one_epsilon_and_utility_stand_side_by_side(
    make_point: Callable[..., SweepPoint], drawn: list[Figure]
) -> None:
    points = [
        make_point(3.0, epsilon, masking=masking)
        for epsilon in (2.0, 8.0, None)
        for masking in ("off", "cells")
    ]
    draw_surface(Surface.of(points), Path("surface.png"))
    at = {
        round(float(x), 6)
        for one in drawn[0].axes[0].collections
        for x, _ in np.asarray(one.get_offsets())
        if x > 0.0
    }
    assert len(at) == 6
    assert all(min(abs(math.log(x / tick)) for tick in (2.0, 8.0, 20.0)) < 0.1 for x in at)


def test_an_unfinished_run_does_not_make_epsilon_a_setting_beside_itself(
    make_point: Callable[..., SweepPoint], drawn: list[Figure]
) -> None:
    points = [make_point(3.0, epsilon, rank=rank) for epsilon in (2.0, 8.0) for rank in (4, 8)]
    part = make_point(4.0, 5.0, rank=16, ended=False)  # has spent 5 of its 8 so far
    points.append(replace(part, settings={"federation.epsilon": 8.0, "rank": 16}))
    draw_surface(Surface.of(points), Path("surface.png"))
    _, labels = drawn[0].axes[0].get_legend_handles_labels()
    assert [one for one in labels if "=" in one] == ["rank = 4", "rank = 8", "rank = 16"]


@pytest.mark.parametrize("epsilons", [(None,), (0.0, None), (2.0,), tuple(range(1, 20))])
def test_any_epsilons_are_drawn(
    make_point: Callable[..., SweepPoint], tmp_path: Path, epsilons: tuple[float | None, ...]
) -> None:
    points = [make_point(2.0, epsilon, key=f"{epsilon}$_") for epsilon in epsilons]
    draw_surface(Surface.of(points), tmp_path / "surface.png")
    assert image.imread(tmp_path / "surface.png").size


def test_many_settings_are_drawn_and_those_left_out_are_named(
    make_point: Callable[..., SweepPoint], tmp_path: Path
) -> None:
    points = [
        make_point(2.0 + place / 10, 1.0 + place % 2, a=place, b=place % 3, c=place % 4)
        for place in range(12)
    ]
    draw_surface(Surface.of(points), tmp_path / "surface.png")
    assert image.imread(tmp_path / "surface.png").size


def test_what_makes_no_surface_is_refused(
    make_point: Callable[..., SweepPoint], make_run: Callable[..., Path], tmp_path: Path
) -> None:
    one, other = make_point(2.0, 1.0, rank=8), make_point(2.0, None, rank=9)
    with pytest.raises(OutputError, match="the same settings of all"):
        Surface.of([one, make_point(2.0, 1.0)])
    with pytest.raises(OutputError, match="at least one point"):
        Surface.of([])
    with pytest.raises(OutputError, match="is of seed 1, not 5"):
        Surface.of([SweepPoint(settings={}, roots={5: one.roots[1]})])
    with pytest.raises(OutputError, match="are of profiles P0 and P1"):
        Surface.of([SweepPoint(settings={}, roots={1: one.roots[1], 2: other.roots[2]})])
    with pytest.raises(OutputError, match="no run of the settings"):
        Surface.of([SweepPoint(settings={}, roots={})])
    unmeasured = Surface.of([SweepPoint(settings={}, roots={1: make_run("new", [])})])
    with pytest.raises(OutputError, match="nothing to draw"):
        draw_surface(unmeasured, tmp_path / "surface.png")

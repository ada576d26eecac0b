"""The figures of a run."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from simulations.errors import OutputError
from simulations.lab.records import Arm, EndNote, Fate, Measure, Note
from simulations.lab.report.drawing import (
    BLUE,
    ORANGE,
    as_png,
    bytes_text,
    label,
    time_text,
)
from simulations.lab.report.figures import (
    draw_all,
    draw_bytes,
    draw_categories,
    draw_curves,
    draw_durations,
    draw_epsilon,
    draw_times,
    write_figures,
)
from simulations.lab.report.history import History
from simulations.lab.report.participation import draw_participation, fate_grid

ALWAYS = {"curves", "categories", "bytes", "participation", "times"}


def lines(figure: Figure, place: int = 0) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (
            [float(x) for x in line.get_xdata()],
            [float(y) for y in line.get_ydata()],
        )
        for line in figure.axes[place].get_lines()
    }


def is_a_picture(png: bytes) -> bool:
    pixels = image.imread(io.BytesIO(png), format="png")
    return bool(pixels.shape[0] > 200 and pixels.shape[1] > 300 and len(np.unique(pixels)) > 2)


@pytest.fixture
def make_population_run(
    make_run: Callable[..., Path], make_round: Callable[..., Any], make_scores: Callable[..., Any]
) -> Callable[..., Path]:
    """A run of many rounds and clients, each client in its turn."""

    def make(n_clients: int, n_rounds: int, cohort: int = 5) -> Path:
        notes: list[Note] = list(make_scores(0, {"a": 3.0}))
        for number in range(1, n_rounds + 1):
            first = cohort * (number - 1)
            chosen = [(first + place) % n_clients for place in range(cohort)]
            fates = dict.fromkeys(chosen, Fate.COUNTED) | {chosen[0]: Fate.LATE}
            notes.append(make_round(number, fates=fates, waited_s=60.0, duration_s=3540.0))
        notes += make_scores(n_rounds, {"a": 2.0})
        return make_run(
            f"{n_clients}-{n_rounds}",
            [*notes, EndNote(wall_s=1.0)],
            n_clients=n_clients,
            n_rounds=n_rounds,
        )

    return make


def test_each_figure_is_a_picture(finished_run: Path) -> None:
    drawings = draw_all(History.read(finished_run))
    assert {drawing.name for drawing in drawings} == {*ALWAYS, "epsilon"}
    assert all(is_a_picture(drawing.png) for drawing in drawings)
    assert all(drawing.title and drawing.text for drawing in drawings)


def test_figures_are_files_and_equal_notes_give_equal_files(finished_run: Path) -> None:
    paths = write_figures(finished_run)
    assert {path.parent for path in paths} == {finished_run / "figures"}
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_figures(finished_run)] == before


def test_the_average_is_drawn_over_releases_and_over_bytes(finished_run: Path) -> None:
    figure = draw_curves(History.read(finished_run))
    assert figure is not None
    assert len(figure.axes) == 2  # exact match was measured twice only: that is no curve
    assert lines(figure)["average"] == ([0.0, 1.0, 2.0], [4.0, 3.0, 2.0])
    assert lines(figure)["open_qa"] == ([0.0, 1.0, 2.0], [5.0, 3.5, 2.5])
    assert lines(figure, 1)["average"] == ([0.0, 3.0, 18.0], [4.0, 3.0, 2.0])  # kB


def test_a_training_without_traffic_has_no_axis_of_bytes(
    make_run: Callable[..., Path], make_round: Callable[..., Any], make_scores: Callable[..., Any]
) -> None:
    notes = [*make_scores(0, {"a": 3.0}), make_round(1), *make_scores(1, {"a": 2.0})]
    history = History.read(make_run("one", notes, arm=Arm.CENTRALISED))
    figure = draw_curves(history)
    assert figure is not None
    assert len(figure.axes) == 1
    assert {drawing.name for drawing in draw_all(history)} == {*("curves", "categories", "times")}


def test_more_categories_than_colours_are_drawn_alike(
    make_run: Callable[..., Path], make_scores: Callable[..., Any]
) -> None:
    names = {f"subject {number}": 1.0 + number for number in range(57)}
    history = History.read(make_run("mmlu", [*make_scores(0, names), *make_scores(1, names)]))
    figure = draw_curves(history)
    assert figure is not None
    named = [name for name in lines(figure) if not name.startswith("_")]
    assert named == ["each category", "average"]
    bars = draw_categories(history)
    assert bars is not None
    assert len(bars.axes[0].get_yticks()) == 41
    assert "the 40 with most records of 57 categories" in bars.axes[0].get_title()


def test_bars_hold_the_newest_release_against_the_first(finished_run: Path) -> None:
    figure = draw_categories(History.read(finished_run))
    assert figure is not None
    loss, exact = figure.axes
    widths = [[bar.get_width() for bar in bars] for bars in loss.containers if len(bars) == 3]
    assert widths == [[3.0, 5.0, 4.0], [1.5, 2.5, 2.0]]
    widths = [[bar.get_width() for bar in bars] for bars in exact.containers]
    assert widths[1] == pytest.approx([70.0, 50.0, 60.0])  # per cent
    assert [text.get_text() for text in loss.get_yticklabels()] == [
        "closed_qa",
        "open_qa",
        "average",
    ]


def test_bytes_are_cumulated(finished_run: Path) -> None:
    figure = draw_bytes(History.read(finished_run))
    assert figure is not None
    assert lines(figure, 1)["up"] == ([0.0, 1.0, 2.0, 3.0], [0.0, 2.0, 6.0, 12.0])
    assert lines(figure, 1)["both"][1] == [0.0, 3.0, 9.0, 18.0]


@pytest.mark.parametrize("n_rounds", [5, 60])
def test_bytes_up_and_down_are_both_seen_where_they_are_equal(
    make_run: Callable[..., Path], make_round: Callable[..., Any], n_rounds: int
) -> None:
    rounds = [make_round(n, bytes_up=2000, bytes_down=2000) for n in range(1, n_rounds + 1)]
    figure = draw_bytes(History.read(make_run("equal", rounds, n_rounds=n_rounds)))
    assert figure is not None
    for axes in figure.axes:
        axes.get_legend().remove()
    pixels = image.imread(io.BytesIO(as_png(figure)), format="png")[..., :3]
    for half in (pixels[:, : pixels.shape[1] // 2], pixels[:, pixels.shape[1] // 2 :]):
        for colour in (BLUE, ORANGE):
            assert (np.abs(half - to_rgb(colour)).max(axis=2) < 0.02).sum() > 300


def test_epsilon_stands_under_the_words_of_its_guarantee(
    make_run: Callable[..., Path], make_round: Callable[..., Any]
) -> None:
    guarantee = "profile P1: ε ≤ 2 at δ = 1e-05 for each example"
    rounds = [make_round(number, epsilon=float(number)) for number in (1, 2)]
    figure = draw_epsilon(History.read(make_run("dp", rounds, guarantee=guarantee)))
    assert figure is not None
    assert figure.axes[0].get_title() == guarantee
    assert figure.axes[0].get_lines()[0].get_ydata().tolist() == [0.0, 1.0, 2.0]


def test_without_privacy_or_population_there_is_no_such_figure(
    make_run: Callable[..., Path], make_round: Callable[..., Any]
) -> None:
    history = History.read(make_run("plain", [make_round(1)]))
    assert draw_epsilon(history) is None
    assert draw_durations(history) is None


def test_simulated_time_includes_the_wait_for_agents(
    make_population_run: Callable[..., Path],
) -> None:
    figure = draw_durations(History.read(make_population_run(10, 4)))
    assert figure is not None
    (line,) = figure.axes[1].get_lines()
    assert line.get_ydata().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]  # hours


def test_the_server_s_share_of_the_time_is_said(finished_run: Path) -> None:
    figure = draw_times(History.read(finished_run))
    assert figure is not None
    assert "14.3 %" in figure.axes[0].get_title(loc="left")  # 0.5 of 3.5


def test_the_grid_knows_what_became_of_whom(finished_run: Path) -> None:
    grid = fate_grid(History.read(finished_run))
    fates = list(Fate)
    assert grid.shape == (4, 3)
    assert grid[:, 1].tolist() == [-1, -1, fates.index(Fate.FAILED), fates.index(Fate.CELL_LOST)]
    assert grid[1].tolist() == [fates.index(Fate.COUNTED), -1, fates.index(Fate.LATE)]


@pytest.mark.parametrize(("n_clients", "n_rounds"), [(5, 3), (150, 20), (151, 20), (1000, 120)])
def test_few_and_many_clients_are_drawn(
    make_population_run: Callable[..., Path], n_clients: int, n_rounds: int
) -> None:
    history = History.read(make_population_run(n_clients, n_rounds))
    figure = draw_participation(history)
    assert figure is not None
    (shown,) = figure.axes[0].get_images()
    n_rows, n_columns = shown.get_array().shape
    assert n_columns == n_rounds
    assert n_rows <= 150
    if n_clients > 150:  # how many of each few clients counted: 4 of 5 in each round
        assert shown.get_array().sum() == 4 * n_rounds
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert sum(heights) == n_clients


def test_everything_is_drawn_of_a_run_of_hundreds_of_rounds(
    make_population_run: Callable[..., Path],
) -> None:
    drawings = draw_all(History.read(make_population_run(300, 200)))
    assert {drawing.name for drawing in drawings} == {*ALWAYS, "durations"}
    assert all(is_a_picture(drawing.png) for drawing in drawings)


def test_a_run_that_has_just_begun_has_no_figures(make_run: Callable[..., Path]) -> None:
    assert draw_all(History.read(make_run("new", []))) == ()


def test_odd_names_of_categories_are_drawn_as_they_are(
    make_run: Callable[..., Path], make_scores: Callable[..., Any]
) -> None:
    names = {"$x^{": 1.0, "_hidden": 2.0, "分類": 3.0, "a\x1b[31mb": 4.0, "": 5.0}
    notes = [*make_scores(0, names), *make_scores(1, names)]
    notes += [*make_scores(0, names, Measure.ROUGE_L), *make_scores(1, names, Measure.ROUGE_L)]
    drawings = draw_all(History.read(make_run("odd", notes)))
    assert {drawing.name for drawing in drawings} == {"curves", "categories"}


def test_a_picture_that_cannot_be_written_is_named(finished_run: Path) -> None:
    (finished_run / "figures").write_text("a file where the folder belongs")
    with pytest.raises(OutputError, match=r"cannot write .*figures"):
        write_figures(finished_run)


def test_labels_hide_nothing_and_are_not_too_long() -> None:
    assert label("_x$y") == r" _x\$y"
    assert len(label("x" * 100)) == 24


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.50 kB"), (2.5e6, "2.50 MB"), (3e9, "3.00 GB")],
)
def test_bytes_are_read_in_units(n_bytes: float, text: str) -> None:
    assert bytes_text(n_bytes) == text


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (0.0, "0 ms"),
        (0.25, "250 ms"),
        (90.0, "90 s"),
        (600.0, "10 min"),
        (9000.0, "2.5 h"),
        (259_200.0, "3 days"),
    ],
)
def test_times_are_read_in_units(time_s: float, text: str) -> None:
    assert time_text(time_s) == text

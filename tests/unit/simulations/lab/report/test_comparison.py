"""Arms side by side, and relative scores."""

import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure
from rich.console import Console

from simulations.errors import OutputError
from simulations.lab.records import Arm, EndNote, Measure
from simulations.lab.report import comparison_figure
from simulations.lab.report.comparison import PAPER_RELATIVE_SCORE, Comparison
from simulations.lab.report.comparison_figure import draw_relative_scores

LOSSES = {
    # By arm and seed: category a, category b.
    (Arm.BASE, 1): (6.0, 4.0),
    (Arm.BASE, 2): (5.0, 5.0),
    (Arm.FEDERATED, 1): (4.0, 4.0),
    (Arm.FEDERATED, 2): (5.0, 3.0),
    (Arm.CENTRALISED, 1): (3.0, 3.0),
    (Arm.CENTRALISED, 2): (2.0, 2.0),
}
MATCHES = {
    (Arm.BASE, 1): (0.0, 0.0),
    (Arm.BASE, 2): (0.0, 0.0),
    (Arm.FEDERATED, 1): (0.4, 0.2),
    (Arm.FEDERATED, 2): (0.5, 0.5),
    (Arm.CENTRALISED, 1): (0.8, 0.2),
    (Arm.CENTRALISED, 2): (0.5, 0.0),
}


@pytest.fixture
def make_arm(make_run: Callable[..., Path], make_scores: Callable[..., Any]) -> Callable[..., Path]:
    def make(arm: Arm, seed: int, *, client: int | None = None, **card: Any) -> Path:
        a, b = LOSSES.get((arm, seed), (4.0, 4.0))
        notes = [*make_scores(0, {"a": 9.0, "b": 9.0}), *make_scores(1, {"a": a, "b": b})]
        if (arm, seed) in MATCHES:
            a, b = MATCHES[arm, seed]
            notes += make_scores(1, {"a": a, "b": b}, Measure.EXACT_MATCH)
        name = f"{arm.value}-{client}-{seed}"
        notes.append(EndNote(wall_s=1.0))
        return make_run(name, notes, arm=arm, seed=seed, client=client, **card)

    return make


@pytest.fixture
def roots(make_arm: Callable[..., Path]) -> list[Path]:
    return [
        *(make_arm(arm, seed) for arm, seed in LOSSES),
        make_arm(Arm.LOCAL, 1, client=3),
        make_arm(Arm.LOCAL, 2, client=3),
        make_arm(Arm.LOCAL, 1, client=0),
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would be written."""
    found: list[Figure] = []
    monkeypatch.setattr(comparison_figure, "write_png", lambda figure, _: found.append(figure))
    return found


@pytest.fixture
def comparison(roots: list[Path]) -> Comparison:
    return Comparison.of(roots)


def test_runs_are_grouped_by_arm_and_client(comparison: Comparison) -> None:
    assert comparison.labels == ("base", "local 3", "local 0", "federated", "centralised")
    assert comparison.reference == "centralised"
    assert comparison.measures == (Measure.LOSS, Measure.EXACT_MATCH)
    assert not comparison.unfinished


def test_scores_are_means_over_seeds_of_averages_over_categories(comparison: Comparison) -> None:
    found = comparison.scores["base"][Measure.LOSS]
    assert found.average is not None
    assert found.average.by_seed == {1: 5.0, 2: 5.0}
    assert (found.average.mean, found.average.std) == (5.0, 0.0)
    assert found.by_category["a"] is not None
    assert found.by_category["a"].std == pytest.approx(statistics.stdev([6.0, 5.0]))
    alone = comparison.scores["local 0"][Measure.LOSS].average
    assert alone is not None
    assert alone.std is None  # one seed
    assert comparison.scores["local 0"][Measure.EXACT_MATCH].average is None


def test_relative_losses_are_the_other_way_round_and_paired_by_seed(
    comparison: Comparison,
) -> None:
    found = comparison.relative["federated"][Measure.LOSS]
    assert found.average is not None
    assert found.average.by_seed == {1: 3.0 / 4.0, 2: 2.0 / 4.0}
    assert found.average.mean == pytest.approx(0.625)
    assert found.by_category["a"] is not None
    assert found.by_category["a"].by_seed == {1: 3.0 / 4.0, 2: 2.0 / 5.0}
    itself = comparison.relative["centralised"][Measure.LOSS].average
    assert itself is not None
    assert itself.by_seed == {1: 1.0, 2: 1.0}


def test_relative_scores_are_the_model_s_by_centralised_s(comparison: Comparison) -> None:
    found = comparison.relative["federated"][Measure.EXACT_MATCH]
    assert found.average is not None
    # Of averages over categories, not averages of ratios.
    assert found.average.by_seed == pytest.approx({1: 0.3 / 0.5, 2: 0.5 / 0.25})


def test_a_relative_score_is_over_every_seed_of_the_model_or_there_is_none(
    make_arm: Callable[..., Path], comparison: Comparison, drawn: list[Figure]
) -> None:
    # In seed 2 all data in one place scores nothing in b: seed 1 alone would tell half the truth.
    assert comparison.relative["federated"][Measure.EXACT_MATCH].by_category["b"] is None
    found = comparison.as_json()["relative"]["federated"]["exact_match"]["by_category"]
    assert found["a"]["mean"] == pytest.approx((0.4 / 0.8 + 0.5 / 0.5) / 2)
    assert found["b"] is None
    rows = comparison.markdown().split("### Exact match, ÷ centralised")[1].splitlines()
    assert next(row for row in rows if row.startswith("| b |")).split(" | ")[4] == "–"
    draw_relative_scores(comparison, Path("relative.png"))
    bars = {bar.get_label(): len(bar) for bar in drawn[0].axes[1].containers if len(bar)}
    assert bars["federated"] == 2  # a and the average

    third = Comparison.of(
        [*(make_arm(Arm.FEDERATED, seed) for seed in (5, 6)), make_arm(Arm.CENTRALISED, 5)]
    )
    early = third.relative["federated"][Measure.LOSS].average
    assert early is not None
    assert list(early.by_seed) == [5]  # seed 6 has no yardstick, as in a series that ended early


def test_json_has_no_nan_and_the_paper_s_number_with_its_measure(comparison: Comparison) -> None:
    found = json.loads(json.dumps(comparison.as_json(), allow_nan=False))
    assert found["scores"]["base"]["loss"]["average"]["mean"] == 5.0
    assert found["scores"]["local 0"]["loss"]["average"]["std"] is None
    assert found["scores"]["local 0"]["exact_match"]["average"] is None
    assert found["relative"]["federated"]["loss"]["average"]["by_seed"] == {"1": 0.75, "2": 0.5}
    assert found["paper"]["federated_to_centralised"] == PAPER_RELATIVE_SCORE == 0.919
    assert "GPT-4" in found["paper"]["measure"]


def test_learning_rates_are_told_where_they_differ(
    make_run: Callable[..., Path], make_round: Callable[..., Any]
) -> None:
    def of(**rates: float) -> Comparison:
        roots = [
            make_run(f"{name}-{rate}", [make_round(1, learning_rate=rate)], arm=Arm(name))
            for name, rate in rates.items()
        ]
        return Comparison.of(roots)

    unlike = of(federated=8e-3, centralised=2e-3)
    assert "learning rates: federated 0.008, centralised 0.002" in unlike.markdown()
    assert unlike.as_json()["learning_rates"] == {"federated": 8e-3, "centralised": 2e-3}
    assert "learning rates" not in of(federated=4e-3, centralised=4e-3).markdown()


def test_tables_show_mean_and_deviation(comparison: Comparison) -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(comparison.table())
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue().replace("\N{NO-BREAK SPACE}", " ")
    assert "4.000 ± 0.000" in shown
    assert "0.625 ± 0.177" in shown
    assert "higher is better" in shown
    assert "another measure" in shown


def test_markdown_shows_averages_and_each_category(comparison: Comparison) -> None:
    text = comparison.markdown()
    assert "| federated | 2 | 4.000 ± 0.000 | 0.625 ± 0.177 | 40.0 ± 14.1 | 1.300 ± 0.990 |" in text
    assert "### Held-out loss, ÷ centralised" in text
    assert "| a | 5.500 ± 0.707 | 4.000 ± 0.000 | 4.000 | 4.500 ± 0.707 | 2.500 ± 0.707 |" in text
    widths = {line.count(" | ") for line in text.split("### ")[1].splitlines() if "|" in line}
    assert widths == {5}


def test_markdown_of_odd_categories_keeps_its_columns(
    make_run: Callable[..., Path], make_scores: Callable[..., Any]
) -> None:
    root = make_run("odd", make_scores(0, {"a|b\n<script>`x`": 1.0}))
    text = Comparison.of([root]).markdown()
    assert r"| a\|b &lt;script&gt;\`x\` | 1.000 |" in text


def test_runs_can_be_named(make_arm: Callable[..., Path]) -> None:
    roots = [make_arm(Arm.LOCAL, 1, client=3), make_arm(Arm.LOCAL, 2, client=8)]
    found = Comparison.of(roots, labels=["local, smallest"] * 2)
    average = found.scores["local, smallest"][Measure.LOSS].average
    assert average is not None
    assert set(average.by_seed) == {1, 2}


def test_without_a_centralised_run_there_are_no_relative_scores(
    make_arm: Callable[..., Path], tmp_path: Path
) -> None:
    found = Comparison.of([make_arm(Arm.FEDERATED, 1)])
    assert found.reference is None
    assert not found.relative
    assert "÷ centralised" not in found.markdown()
    with pytest.raises(OutputError, match="run the centralised arm"):
        draw_relative_scores(found, tmp_path / "relative.png")


def test_a_ratio_of_fewer_seeds_than_its_score_names_them(make_arm: Callable[..., Path]) -> None:
    found = Comparison.of(
        [*(make_arm(Arm.FEDERATED, seed) for seed in (1, 2)), make_arm(Arm.CENTRALISED, 2)]
    )
    row = next(line for line in found.markdown().splitlines() if line.startswith("| federated |"))
    assert "0.500 (seed 2)" in row
    average = [line for line in found.markdown().splitlines() if line.startswith("| average |")]
    assert "0.500 (seed 2)" in average[1]
    assert (
        "(seed"
        not in Comparison.of(
            [make_arm(arm, 3) for arm in (Arm.FEDERATED, Arm.CENTRALISED)]
        ).markdown()
    )


def test_an_arm_whose_seeds_have_no_counterpart_is_not_related(
    make_arm: Callable[..., Path],
) -> None:
    found = Comparison.of([make_arm(Arm.FEDERATED, 1), make_arm(Arm.CENTRALISED, 2)])
    assert found.relative["federated"][Measure.LOSS].average is None
    json.dumps(found.as_json(), allow_nan=False)


def test_unfinished_runs_are_named(
    make_run: Callable[..., Path], make_scores: Callable[..., Any]
) -> None:
    found = Comparison.of([make_run("cut", make_scores(0, {"a": 1.0}))])
    assert found.unfinished == ("federated, seed 1 (unfinished: 0 of 3 rounds)",)
    assert "unfinished: 0 of 3 rounds" in found.markdown()


def test_one_run_twice_is_refused(roots: list[Path]) -> None:
    with pytest.raises(OutputError, match="are both base, seed 1"):
        Comparison.of([*roots, roots[0]])


@pytest.mark.parametrize(
    ("field", "what"),
    [("base_fingerprint", "base"), ("data_sha256", "data")],
)
def test_runs_that_do_not_compare_are_refused(
    make_arm: Callable[..., Path], field: str, what: str
) -> None:
    other = make_arm(Arm.CENTRALISED, 1, **{field: "55" * 32})
    with pytest.raises(OutputError, match=f"their {what} differs"):
        Comparison.of([make_arm(Arm.FEDERATED, 1), other])


def test_data_may_differ_between_seeds_but_not_the_experiment_of_an_arm(
    make_arm: Callable[..., Path],
) -> None:
    one = make_arm(Arm.FEDERATED, 1)
    Comparison.of([one, make_arm(Arm.FEDERATED, 2, data_sha256="55" * 32)])
    with pytest.raises(OutputError, match="their experiment differs"):
        Comparison.of([one, make_arm(Arm.FEDERATED, 3, experiment_sha256="55" * 32)])


def test_relative_scores_are_drawn_with_their_seeds(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "figures" / "relative.png"
    draw_relative_scores(comparison, path)
    pixels = image.imread(path)
    assert pixels.shape[0] > 400
    assert len(np.unique(pixels)) > 10


def test_a_picture_that_cannot_be_written_is_named(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        draw_relative_scores(comparison, tmp_path / "file" / "relative.png")

"""Figure 2 of the paper, and how unlike clients are."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from simulations.cli import app
from simulations.errors import PartitionError
from simulations.partition.figure import as_json, default_clients, draw, table
from simulations.partition.heterogeneity import measure_heterogeneity
from simulations.partition.schemes import Partition, PartitionRecipe, Scheme, make_partition


def make_column(n_each: int = 40, names: str = "abcd") -> list[str]:
    return [names[i % len(names)] for i in range(n_each * len(names))]


def make_split(column: list[str], scheme: Scheme = Scheme.DIRICHLET, **changes: Any) -> Partition:
    values = {"n_clients": 5, "seed": 1, "n_held_out": 2, "min_records": 1, **changes}
    return make_partition(column, PartitionRecipe(scheme=scheme, **values))


def of_sizes(*sizes: int) -> Partition:
    recipe = PartitionRecipe(scheme=Scheme.IID, n_clients=len(sizes), seed=0, n_held_out=0)
    clients = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return Partition(
        recipe=recipe, held_out=np.array([], np.int64), clients=tuple(clients), n_tries=1
    )


# --- heterogeneity ----------------------------------------------------------------------------


def test_clients_of_one_distribution_differ_by_nothing() -> None:
    found = measure_heterogeneity(np.array([[3, 1, 4], [6, 2, 8], [30, 10, 40]]))
    assert found.total_variation == pytest.approx([0.0, 0.0, 0.0], abs=1e-15)
    assert found.mean_total_variation == pytest.approx(0.0, abs=1e-15)
    assert found.mean_effective_categories == pytest.approx(found.federation_effective_categories)


def test_a_client_of_one_category_differs_by_what_the_category_lacks() -> None:
    counts = np.diag([10, 30, 60])
    found = measure_heterogeneity(counts)
    assert found.total_variation == pytest.approx([0.9, 0.7, 0.4])
    assert found.mean_total_variation == pytest.approx(2.0 / 3.0)
    assert found.effective_categories == pytest.approx([1.0, 1.0, 1.0])


def test_k_categories_alike_are_worth_k() -> None:
    found = measure_heterogeneity(np.array([[5, 5, 0, 0], [2, 2, 2, 2]]))
    assert found.effective_categories == pytest.approx([2.0, 4.0])
    assert found.federation_effective_categories == pytest.approx(
        np.exp(-2 * (7 / 18) * np.log(7 / 18) - 2 * (2 / 18) * np.log(2 / 18))
    )


@pytest.mark.parametrize(
    ("volumes", "gini"), [([7, 7, 7], 0.0), ([1, 3], 0.25), ([1, 1, 1, 97], 0.72), ([5], 0.0)]
)
def test_the_gini_coefficient_is_that_of_volumes(volumes: list[int], gini: float) -> None:
    found = measure_heterogeneity(np.array(volumes)[:, np.newaxis])
    assert found.volume_gini == pytest.approx(gini)


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), min_size=1),
    st.integers(0, 99),
)
def test_the_order_of_clients_and_categories_does_not_matter(
    rows: list[list[int]], seed: int
) -> None:
    counts = np.array(rows)
    rng = np.random.default_rng(seed)
    mixed = counts[rng.permutation(len(counts))][:, rng.permutation(3)]
    wider = np.column_stack([mixed, np.zeros(len(mixed), np.int64)])  # a category nobody holds
    first, second = measure_heterogeneity(counts).as_json(), measure_heterogeneity(wider).as_json()
    assert first == pytest.approx(second)
    assert 0.0 <= first["mean_total_variation"] < 1.0
    assert 0.0 <= first["volume_gini"] < 1.0


@pytest.mark.parametrize("counts", [np.zeros((0, 3), np.int64), np.array([[1, 2], [0, 0]])])
def test_a_client_without_records_has_no_distribution(counts: np.ndarray) -> None:
    with pytest.raises(PartitionError, match="has no distribution to measure"):
        measure_heterogeneity(counts)


def test_skewed_clients_differ_more_than_random_ones_and_single_categories_most() -> None:
    column = make_column(200)
    means = [
        as_json(make_split(column, scheme, n_clients=20), column)["heterogeneity"][
            "mean_total_variation"
        ]
        for scheme in (Scheme.IID, Scheme.DIRICHLET, Scheme.BY_CATEGORY)
    ]
    assert means == sorted(means)
    assert means[0] < 0.25
    assert means[2] == pytest.approx(0.75)


def test_the_json_tells_of_each_client_how_far_it_is_from_all() -> None:
    column = make_column()
    found = as_json(make_split(column, Scheme.BY_CATEGORY, n_clients=4), column, by="language")
    assert found["by"] == "language"
    assert [client["total_variation"] for client in found["clients"]] == pytest.approx([0.75] * 4)
    assert found["heterogeneity"] == pytest.approx(
        {
            "mean_total_variation": 0.75,
            "mean_effective_categories": 1.0,
            "federation_effective_categories": 4.0,
            "volume_gini": 0.0,
        }
    )


# --- the figure -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [
        ((5, 1, 9, 3, 7), (1, 0, 2)),
        ((4, 2, 3, 1), (3, 2, 0)),  # of an even number the upper median
        ((2, 1), (1, 0)),
        ((3,), (0,)),
        ((2, 2, 2), (0, 1, 2)),
    ],
)
def test_the_clients_shown_are_the_smallest_the_median_and_the_largest(
    sizes: tuple[int, ...], chosen: tuple[int, ...]
) -> None:
    assert default_clients(of_sizes(*sizes)) == chosen


@pytest.fixture
def drawn_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text of a figure that is saved."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    texts: list[str] = []
    save = Figure.savefig

    def record(figure: Figure, *arguments: Any, **options: Any) -> None:
        save(figure, *arguments, **options)
        texts.extend(text.get_text() for text in figure.findobj(Text) if text.get_text())

    monkeypatch.setattr(Figure, "savefig", record)
    return texts


def test_the_figure_holds_clients_against_the_federation(
    tmp_path: Path, drawn_texts: list[str]
) -> None:
    column = make_column()
    partition = make_split(column, Scheme.BY_CATEGORY, n_clients=4)
    draw(partition, column, tmp_path / "a.png", clients=[3, 1, 3], by="language")
    assert "client 3, largest: 38 records\n1 of 4 languages, TV 0.75" in drawn_texts
    assert "all 4 clients: 152 records\n4 languages" in drawn_texts
    assert sum(text.startswith("client ") and "\n" in text for text in drawn_texts) == 2
    assert drawn_texts.count("none") == 2 * 3
    assert any("total variation (TV) from all clients: 0.75" in text for text in drawn_texts)
    assert any(text.startswith("by-category, by language: 152 records") for text in drawn_texts)


def test_a_client_may_be_the_only_one(tmp_path: Path, drawn_texts: list[str]) -> None:
    column = make_column(names="a")
    draw(make_split(column, Scheme.IID, n_clients=1), column, tmp_path / "a.png")
    assert "client 0: 38 records\n1 of 1 categories, TV 0.00" in drawn_texts


@pytest.mark.parametrize("n_shown", [1, 4, 11])
def test_as_many_clients_as_are_named_are_drawn(
    tmp_path: Path, drawn_texts: list[str], n_shown: int
) -> None:
    column = make_column()
    partition = make_split(column, Scheme.IID, n_clients=15)
    draw(partition, column, tmp_path / "a.png", clients=range(n_shown))
    assert sum("categories, TV" in text for text in drawn_texts) == n_shown


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([0, 5], "there is no client 5 to show: they are numbered 0 to 4"),
        ([-1], "there is no client -1"),
        ([], "0 clients to show; choose 1 to 11"),
    ],
)
def test_clients_that_are_not_there_are_refused(
    tmp_path: Path, clients: list[int], message: str
) -> None:
    column = make_column()
    with pytest.raises(PartitionError, match=message):
        draw(make_split(column), column, tmp_path / "a.png", clients=clients)
    assert not (tmp_path / "a.png").exists()


def test_more_clients_than_have_room_are_refused(tmp_path: Path) -> None:
    column = make_column()
    partition = make_split(column, Scheme.IID, n_clients=15)
    with pytest.raises(PartitionError, match="12 clients to show; choose 1 to 11"):
        draw(partition, column, tmp_path / "a.png", clients=range(12))


def test_of_many_values_the_largest_are_shown_and_the_others_as_one(
    tmp_path: Path, drawn_texts: list[str]
) -> None:
    column = [f"value {k:02}" for k in range(30) for _ in range(5 + (k % 7 == 0))]
    partition = make_split(column, Scheme.IID)
    draw(partition, column, tmp_path / "a.png", by="domain")
    assert "21 others" in drawn_texts
    assert "values of domain held" in drawn_texts
    shown = table(partition, column, by="domain")
    assert len(shown.columns) == 1 + 10 + 2
    cells = [[str(cell) for cell in column.cells] for column in shown.columns]
    assert [column[-2] for column in cells] == ["held out", *["2"] * 9, "42", "60", "30"]
    assert [cells[0][-1], cells[-2][-1], cells[-1][-1]] == ["all", str(len(column)), "30"]
    console = Console(file=io.StringIO(), width=80)
    console.print(shown)
    assert "iid, by domain" in console.file.getvalue()


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def records_file(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    rows = [
        {"instruction": f"Say {i}.", "response": str(i), "category": "abc"[i % 3]}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_command_draws_the_clients_that_are_named(
    records_file: Path, tmp_path: Path, drawn_texts: list[str]
) -> None:
    arguments = [
        *("partition", str(records_file), "--scheme", "iid", "--clients", "6", "--held-out", "1"),
        *("--out", str(tmp_path / "p.json"), "--figure", str(tmp_path / "p.png")),
        *("--clients-shown", "5,0", "--json", str(tmp_path / "found.json")),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    panels = [text.split(":")[0] for text in drawn_texts if "categories, TV" in text]
    assert [panel.split(",")[0] for panel in panels] == ["client 5", "client 0"]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    mean = found["heterogeneity"]["mean_total_variation"]
    assert f"Total variation of a client's category from that of all, mean: {mean:.2f}" in " ".join(
        result.output.split()
    )


@pytest.mark.parametrize("given_clients", ["one", "1,,2", ""])
def test_the_command_refuses_what_are_no_numbers_of_clients(
    records_file: Path, tmp_path: Path, given_clients: str
) -> None:
    arguments = [
        *("partition", str(records_file), "--out", str(tmp_path / "p.json")),
        *("--clients-shown", given_clients),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert not (tmp_path / "p.json").exists()


def test_the_command_refuses_clients_to_show_before_it_writes_anything(
    records_file: Path, tmp_path: Path
) -> None:
    arguments = ["partition", str(records_file), "--out", str(tmp_path / "p.json")]
    alone = CliRunner().invoke(app, [*arguments, "--clients-shown", "1"])
    assert alone.exit_code == 2  # without a figure
    options = ["--figure", str(tmp_path / "p.png"), "--clients", "6", "--clients-shown", "1,6"]
    beyond = CliRunner().invoke(app, [*arguments, *options])
    assert isinstance(beyond.exception, PartitionError)
    assert list(tmp_path.iterdir()) == [records_file]

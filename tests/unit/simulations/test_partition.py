"""Partition schemes: the paper's counts on Dolly's column of categories, and on the real file."""

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from edge_agent.data.records import UNCATEGORIZED
from edge_agent.errors import DataError
from simulations.cli import app
from simulations.errors import OutputError, PartitionError
from simulations.partition.figure import as_json, draw, table
from simulations.partition.manifest import PartitionManifest, SourceFile, read_source, selected
from simulations.partition.schemes import (
    Partition,
    PartitionRecipe,
    Scheme,
    default_min_records,
    make_partition,
)

OFFICIAL = {
    "brainstorming": 1766,
    "classification": 2136,
    "closed_qa": 1773,
    "creative_writing": 709,
    "general_qa": 2191,
    "information_extraction": 1506,
    "open_qa": 3742,
    "summarization": 1188,
}
"""Records of each category in the official databricks-dolly-15k: 15,011."""

SHARED = "databricks-dolly-15k.shared.jsonl.xz"
N_SHARED = 13_461


def make_column(counts: dict[str, int] = OFFICIAL) -> list[str]:
    """A column with these counts, in an order like the file's: mixed."""
    column = [name for name, count in counts.items() for _ in range(count)]
    return [str(name) for name in np.random.default_rng(0).permutation(column)]


def make_recipe(scheme: Scheme = Scheme.IID, **changes: Any) -> PartitionRecipe:
    values = {"n_clients": 100, "seed": 1, "min_records": default_min_records(scheme), **changes}
    return PartitionRecipe(scheme=scheme, **values)


@pytest.fixture(scope="module")
def official() -> list[str]:
    return make_column()


@pytest.fixture(scope="module")
def dolly(data_dir: Path) -> Path:
    return data_dir / "dolly" / SHARED


@pytest.fixture(scope="module")
def shared(dolly: Path) -> tuple[str, ...]:
    return read_source(dolly).categories


# --- the paper's counts -----------------------------------------------------------------------


def test_equal_volume_gives_148_to_150_records_of_mostly_two_categories(
    official: list[str],
) -> None:
    for seed in range(5):
        partition = make_partition(official, make_recipe(Scheme.EQUAL_VOLUME, seed=seed))
        sizes = Counter(partition.sizes.tolist())
        # 14,931 records make 131 shards of 75 and 69 of 74.
        assert set(sizes) <= {148, 149, 150}
        assert sum(size * n for size, n in sizes.items()) == 14_931
        _, counts = partition.counts(official)
        kinds = Counter((counts > 0).sum(axis=1).tolist())
        assert kinds[2] >= 75
        assert max(kinds) <= 4  # two shards, each across at most one border


def test_skewed_gives_at_least_40_records_and_sizes_up_to_about_440(official: list[str]) -> None:
    sizes = [
        make_partition(official, make_recipe(Scheme.SKEWED, seed=seed)).sizes for seed in range(20)
    ]
    assert all(size.min() >= 40 for size in sizes)
    assert np.mean([size.min() for size in sizes]) == pytest.approx(44, abs=4)  # 41 in the paper
    assert np.mean([size.max() for size in sizes]) == pytest.approx(440, rel=0.25)
    assert all(size.sum() == 14_931 for size in sizes)


def test_about_one_skewed_try_in_seven_succeeds(official: list[str]) -> None:
    n_seeds = 60
    tries = [
        make_partition(official, make_recipe(Scheme.SKEWED, seed=seed)).n_tries
        for seed in range(n_seeds)
    ]
    # The number of tries is geometric: the mean over 60 lies within ± 35 % but once in 150 times.
    assert np.mean(tries) == pytest.approx(7, rel=0.35)


@pytest.mark.parametrize("scheme", Scheme)
def test_80_records_are_held_out_ten_of_each_category(official: list[str], scheme: Scheme) -> None:
    partition = make_partition(official, make_recipe(scheme))
    assert partition.held_out.size == 80
    assert set(Counter(official[i] for i in partition.held_out).values()) == {10}


def test_on_the_real_file_equal_volume_gives_133_or_134_records(shared: tuple[str, ...]) -> None:
    # The shared copy has 13,461 of the 15,011 records: 13,381 make 181 shards of 67 and 19 of 66.
    partition = make_partition(shared, make_recipe(Scheme.EQUAL_VOLUME))
    assert len(shared) == N_SHARED
    assert partition.held_out.size == 80
    assert 132 <= partition.sizes.min() <= partition.sizes.max() <= 134
    assert partition.sizes.sum() == 13_381
    _, counts = partition.counts(shared)
    assert Counter((counts > 0).sum(axis=1).tolist()).most_common(1)[0][0] == 2


def test_on_the_real_file_skewed_gives_at_least_40_records(shared: tuple[str, ...]) -> None:
    # A tenth fewer records with the same least number: about one try in sixteen succeeds.
    found = [make_partition(shared, make_recipe(Scheme.SKEWED, seed=seed)) for seed in range(40)]
    assert all(partition.sizes.min() >= 40 for partition in found)
    assert np.mean([partition.sizes.max() for partition in found]) == pytest.approx(390, rel=0.25)
    assert 9 < np.mean([partition.n_tries for partition in found]) < 26


# --- each scheme ------------------------------------------------------------------------------


def test_no_client_gains_once_it_holds_its_fair_share(official: list[str]) -> None:
    partition = make_partition(official, make_recipe(Scheme.SKEWED))
    names, counts = partition.counts(official)
    before = counts.cumsum(axis=1) - counts  # [N, C]: held when category c is dealt
    fair_share = 14_931 / 100
    assert list(names) == sorted(OFFICIAL)
    assert (counts[before >= fair_share] == 0).all()
    assert (before >= fair_share).any()


def test_without_the_cap_a_client_may_gain_beyond_its_fair_share(official: list[str]) -> None:
    partition = make_partition(official, make_recipe(Scheme.DIRICHLET))
    _, counts = partition.counts(official)
    before = counts.cumsum(axis=1) - counts
    assert (counts[before >= 14_931 / 100] > 0).any()


def test_a_large_alpha_gives_like_shares_and_a_small_one_few_owners(official: list[str]) -> None:
    def share_of_the_largest(alpha: float) -> float:
        recipe = make_recipe(Scheme.DIRICHLET, n_clients=10, alpha=alpha)
        _, counts = make_partition(official, recipe).counts(official)
        return float((counts.max(axis=0) / counts.sum(axis=0)).mean())

    assert share_of_the_largest(1e4) == pytest.approx(0.1, abs=0.01)
    assert share_of_the_largest(0.1) > 0.4


def test_iid_clients_hold_every_category_in_its_share(official: list[str]) -> None:
    partition = make_partition(official, make_recipe(Scheme.IID, n_clients=5))
    _, counts = partition.counts(official)
    assert np.ptp(partition.sizes) <= 1
    expected = counts.sum(axis=0) / 5
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_quantity_skews_volumes_and_leaves_categories_as_they_are(official: list[str]) -> None:
    def volumes_and_spread(alpha: float) -> tuple[float, float]:
        recipe = make_recipe(Scheme.QUANTITY, n_clients=10, alpha=alpha, min_records=200)
        partition = make_partition(official, recipe)
        _, counts = partition.counts(official)
        expected = np.outer(partition.sizes, counts.sum(axis=0)) / counts.sum()
        return (
            float(partition.sizes.max() / partition.sizes.min()),
            float((np.abs(counts - expected) / np.sqrt(expected)).max()),
        )

    assert volumes_and_spread(0.5)[0] > 3.0
    assert volumes_and_spread(1e6)[0] < 1.1
    assert max(volumes_and_spread(alpha)[1] for alpha in (0.5, 1e6)) < 5.0


@pytest.mark.parametrize(("n_clients", "n_kinds"), [(100, 1), (8, 1), (4, 2), (3, 3)])
def test_by_category_gives_one_category_a_client_or_whole_ones(
    official: list[str], n_clients: int, n_kinds: int
) -> None:
    partition = make_partition(official, make_recipe(Scheme.BY_CATEGORY, n_clients=n_clients))
    _, counts = partition.counts(official)
    assert int((counts > 0).sum(axis=1).max()) == n_kinds
    owners = (counts > 0).sum(axis=0)
    assert owners.tolist() == [max(1, len(range(c, n_clients, 8))) for c in range(8)]


def test_a_tiny_alpha_still_gives_every_record_away() -> None:
    column = make_column({"a": 50, "b": 50, "c": 50})
    recipe = make_recipe(Scheme.SKEWED, n_clients=3, alpha=1e-3, n_held_out=0, min_records=50)
    partition = make_partition(column, recipe)
    assert partition.sizes.tolist() == [50, 50, 50]


# --- guarantees of all ------------------------------------------------------------------------

columns = st.lists(st.sampled_from(["a", "b", "c", UNCATEGORIZED]), min_size=30, max_size=200)


@settings(max_examples=60, deadline=None)
@given(
    column=columns,
    scheme=st.sampled_from(Scheme),
    n_clients=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    n_held_out=st.integers(0, 3),
)
def test_every_record_is_held_out_or_with_exactly_one_client_and_none_is_empty(
    column: list[str], scheme: Scheme, n_clients: int, seed: int, n_held_out: int
) -> None:
    recipe = make_recipe(
        scheme, n_clients=n_clients, seed=seed, n_held_out=n_held_out, min_records=1
    )
    try:
        partition = make_partition(column, recipe)
    except PartitionError:
        return
    given_away = np.concatenate([partition.held_out, *partition.clients])
    assert sorted(given_away.tolist()) == list(range(len(column)))
    assert len(partition.clients) == n_clients
    assert partition.sizes.min() >= 1
    held_out = Counter(column[i] for i in partition.held_out)
    assert held_out == {name: n_held_out for name in set(column) if n_held_out}


def test_the_held_out_records_depend_on_the_seed_alone(official: list[str]) -> None:
    first = make_partition(official, make_recipe(Scheme.IID)).held_out
    for scheme in Scheme:
        other = make_partition(official, make_recipe(scheme, n_clients=7, alpha=3.0))
        assert np.array_equal(other.held_out, first)
    assert not np.array_equal(make_partition(official, make_recipe(seed=2)).held_out, first)


@pytest.mark.parametrize("scheme", Scheme)
def test_the_same_recipe_gives_the_same_indices_without_the_global_generator(
    official: list[str], scheme: Scheme
) -> None:
    recipe = make_recipe(scheme, n_clients=20)
    state = np.random.get_state(legacy=False)  # noqa: NPY002 - that it stays as it was
    first, second = make_partition(official, recipe), make_partition(official, recipe)
    after = np.random.get_state(legacy=False)  # noqa: NPY002 - as above
    assert all(np.array_equal(a, b) for a, b in zip(first.clients, second.clients, strict=True))
    assert np.array_equal(state["state"]["key"], after["state"]["key"])
    other = make_partition(official, replace(recipe, seed=2))
    assert any(not np.array_equal(a, b) for a, b in zip(first.clients, other.clients, strict=True))


def test_indices_are_read_only(official: list[str]) -> None:
    partition = make_partition(official, make_recipe())
    with pytest.raises(ValueError, match="read-only"):
        partition.clients[0][0] = 5


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_clients": 14_932}, "14932 clients cannot share 14931 records"),
        ({"n_held_out": 710}, "'creative_writing' has 709 records, fewer than the 710"),
        (
            {"scheme": Scheme.SKEWED, "n_clients": 400, "min_records": 40},
            "400 clients with at least 40 records each need 16000; there are 14931",
        ),
        (
            {"scheme": Scheme.SKEWED, "n_clients": 200, "min_records": 40, "max_tries": 7},
            "7 tries, and at best the smallest of 200 clients had",
        ),
        (
            {"scheme": Scheme.DIRICHLET, "n_clients": 100, "alpha": 0.01, "max_tries": 3},
            "3 tries, and at best .* of the 1 wanted",
        ),
        ({"scheme": Scheme.BY_CATEGORY, "n_held_out": 709}, "client 3 of 100 gets no record"),
        ({"scheme": Scheme.EQUAL_VOLUME, "n_clients": 0}, "n_clients is 0"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"n_held_out": -1}, "n_held_out is -1"),
        ({"min_records": 0}, "min_records is 0"),
        ({"max_tries": 0}, "max_tries is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"alpha": 1e308}, r"alpha is 1e\+308; it must be above 0 and at most 1e\+09"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_numbers(
    official: list[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PartitionError, match=message):
        make_partition(official, make_recipe(**changes))


def test_no_records_are_refused() -> None:
    with pytest.raises(PartitionError, match="1 clients cannot share 0 records"):
        make_partition([], make_recipe(n_clients=1))


@pytest.mark.parametrize(
    "clients", [([0, 1], [1, 2]), ([0, 1], [3, 4]), ([0, -1], [1, 2])], ids=["twice", "gap", "sign"]
)
def test_indices_that_are_no_partition_are_refused(clients: tuple[list[int], ...]) -> None:
    with pytest.raises(PartitionError, match="no partition"):
        Partition(
            recipe=make_recipe(n_clients=2),
            held_out=np.array([], np.int64),
            clients=tuple(np.array(share, np.int64) for share in clients),
            n_tries=1,
        )


def test_a_column_of_another_length_is_refused(official: list[str]) -> None:
    partition = make_partition(official, make_recipe())
    with pytest.raises(PartitionError, match="3 categories for a partition of 15011 records"):
        partition.counts(["a", "b", "c"])


# --- the manifest -----------------------------------------------------------------------------


@pytest.fixture
def records_file(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    rows = [
        {"instruction": f"Say {i}.", "response": str(i), "category": ["a", "b", ""][i % 3]}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def manifest(records_file: Path) -> PartitionManifest:
    source = read_source(records_file)
    recipe = make_recipe(Scheme.SKEWED, n_clients=4, n_held_out=2, min_records=3)
    return PartitionManifest.of(source, make_partition(source.column, recipe))


def test_a_manifest_comes_back_as_it_was_saved(manifest: PartitionManifest, tmp_path: Path) -> None:
    digest = manifest.save(tmp_path / "a.json")
    loaded = PartitionManifest.load(tmp_path / "a.json", data=manifest.sources)
    assert loaded.sources == manifest.sources
    assert loaded.by == manifest.by == "category"
    assert loaded.partition.recipe == manifest.partition.recipe
    assert loaded.partition.n_tries == manifest.partition.n_tries
    pairs = zip(loaded.partition.clients, manifest.partition.clients, strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert np.array_equal(loaded.partition.held_out, manifest.partition.held_out)
    assert loaded.save(tmp_path / "b.json") == digest
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def swap_two_records(document: dict[str, Any]) -> None:
    first, second = document["clients"][0], document["clients"][1]
    first[0], second[0] = second[0], first[0]


def rename_source(document: dict[str, Any]) -> None:
    document["source"]["name"] = "other.jsonl"


def raise_alpha(document: dict[str, Any]) -> None:
    document["parameters"]["alpha"] = 0.6


@pytest.mark.parametrize("change", [swap_two_records, rename_source, raise_alpha])
def test_a_changed_manifest_is_refused(
    manifest: PartitionManifest, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    path = tmp_path / "a.json"
    manifest.save(path)
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(PartitionError, match="was changed after it was saved"):
        PartitionManifest.load(path)


def test_a_manifest_of_another_file_is_refused(
    manifest: PartitionManifest, records_file: Path, tmp_path: Path
) -> None:
    manifest.save(tmp_path / "a.json")
    text = records_file.read_text(encoding="utf-8")
    records_file.write_text(text.replace("Say 7.", "Say seven."), encoding="utf-8")
    with pytest.raises(PartitionError, match="would name other records"):
        PartitionManifest.load(tmp_path / "a.json", data=read_source(records_file).file)


def test_a_manifest_that_forgets_records_is_refused(
    manifest: PartitionManifest, tmp_path: Path
) -> None:
    source = manifest.sources[0].model_copy(update={"n_records": 61})
    PartitionManifest(sources=(source,), partition=manifest.partition).save(tmp_path / "a.json")
    with pytest.raises(PartitionError, match="splits 60 records of a file that has 61"):
        PartitionManifest.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no manifest of a partition"),
        ("{}", "is no manifest of a partition: manifest: scheme"),
        ("[1, 2]", "is no manifest of a partition"),
    ],
    ids=["empty", "no fields", "a list"],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(PartitionError, match=message):
        PartitionManifest.load(tmp_path / "a.json")


def test_a_manifest_replaces_nothing_but_a_manifest(
    manifest: PartitionManifest, records_file: Path, tmp_path: Path
) -> None:
    before = records_file.read_bytes()
    with pytest.raises(OutputError, match=r"records\.jsonl exists, and is no manifest"):
        manifest.save(records_file)
    assert records_file.read_bytes() == before
    (tmp_path / "a.json").touch()
    digest = manifest.save(tmp_path / "a.json")
    assert manifest.save(tmp_path / "a.json") == digest


def test_a_manifest_with_other_clients_than_it_speaks_of_is_refused(
    manifest: PartitionManifest, tmp_path: Path
) -> None:
    recipe = replace(manifest.partition.recipe, n_clients=9)
    partition = replace(manifest.partition, recipe=recipe)
    PartitionManifest(sources=manifest.sources, partition=partition).save(tmp_path / "a.json")
    with pytest.raises(PartitionError, match="has 4 clients and speaks of 9"):
        PartitionManifest.load(tmp_path / "a.json")


def test_an_index_beyond_every_file_is_refused(manifest: PartitionManifest, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    manifest.save(path)
    document = json.loads(path.read_text(encoding="utf-8"))
    document["clients"][0][0] = 2**63
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(PartitionError, match="no manifest of a partition"):
        PartitionManifest.load(path)


def test_an_unknown_scheme_is_refused(manifest: PartitionManifest, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    manifest.save(path)
    text = path.read_text(encoding="utf-8").replace('"skewed"', '"spiral"')
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PartitionError, match=r"'spiral' is not .* known schemes are equal-volume"):
        PartitionManifest.load(path)


def test_places_that_cannot_be_read_or_written_are_named(
    manifest: PartitionManifest, tmp_path: Path
) -> None:
    with pytest.raises(PartitionError, match="cannot read the manifest"):
        PartitionManifest.load(tmp_path / "none.json")
    (tmp_path / "no folder").write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        manifest.save(tmp_path / "no folder" / "a.json")


def test_a_packed_file_has_the_digest_of_the_unpacked_one(dolly: Path) -> None:
    found = read_source(dolly)
    # "sha256 unpacked" of the data's own description.
    assert found.file == SourceFile(
        name=SHARED,
        sha256=bytes.fromhex("edc4a55ffda14222757babfd52ac6fc662219ee349bc4adbc3202abf98b00f08"),
        n_records=N_SHARED,
    )
    assert found.n_malformed == 0


def test_records_without_a_category_are_one_of_their_own(records_file: Path) -> None:
    assert Counter(read_source(records_file).categories) == {"a": 20, "b": 20, UNCATEGORIZED: 20}


def test_records_are_selected_in_order_and_an_index_beyond_them_is_refused(
    records_file: Path,
) -> None:
    records = read_source(records_file).records
    assert [record.response for record in selected(records, [7, 3])] == ["7", "3"]
    for beyond in (60, -1):
        with pytest.raises(PartitionError, match=f"index {beyond} names no record"):
            selected(records, [0, beyond])


def test_a_missing_data_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read_source(tmp_path / "none.jsonl")


# --- figure, table, command -------------------------------------------------------------------


@pytest.mark.parametrize("n_clients", [3, 100])
def test_the_figure_is_a_picture(official: list[str], tmp_path: Path, n_clients: int) -> None:
    partition = make_partition(official, make_recipe(Scheme.DIRICHLET, n_clients=n_clients))
    draw(partition, official, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").stat().st_size > 20_000


@pytest.mark.parametrize("name", ["no/folder.png", "picture.unheard"])
def test_a_figure_that_cannot_be_written_is_refused(
    official: list[str], tmp_path: Path, name: str
) -> None:
    partition = make_partition(official, make_recipe(n_clients=3))
    with pytest.raises(OutputError, match="cannot draw"):
        draw(partition, official, tmp_path / name)


def test_the_table_shows_the_largest_and_smallest_clients_and_the_sums(
    official: list[str],
) -> None:
    few = table(make_partition(official, make_recipe(n_clients=3)), official)
    assert few.row_count == 3 + 2
    many = table(make_partition(official, make_recipe(n_clients=100)), official)
    assert many.row_count == 12 + 1 + 2
    assert [str(cell) for cell in list(many.columns[-2].cells)[-2:]] == ["80", "15011"]


def test_categories_are_texts_of_others(tmp_path: Path) -> None:
    """Markup, mathematics and escape sequences in a category are shown as they stand."""
    names = ["[/x]", "$a^$", "_y", "\x1b[2J"]
    categories = [names[i % 4] for i in range(40)]
    partition = make_partition(categories, make_recipe(Scheme.IID, n_clients=2, n_held_out=1))
    draw(partition, categories, tmp_path / "a.png")
    console = Console(file=io.StringIO(), width=80)
    console.print(table(partition, categories))
    shown = console.file.getvalue()
    assert "[/x]" in shown
    assert "$a^$" in shown
    assert "\x1b" not in shown


def test_the_numbers_of_the_json_are_those_of_the_partition(official: list[str]) -> None:
    partition = make_partition(official, make_recipe(Scheme.SKEWED))
    found = as_json(partition, official)
    assert [client["n_records"] for client in found["clients"]] == partition.sizes.tolist()
    assert found["smallest"] == min(client["n_records"] for client in found["clients"])
    assert sum(client["by_category"]["open_qa"] for client in found["clients"]) == 3732


def test_the_command_writes_manifest_figure_and_json(records_file: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "p.json", tmp_path / "p.png"
    arguments = [
        *("partition", str(records_file), "--scheme", "equal-volume", "--clients", "3"),
        *("--held-out", "2", "--seed", "4", "--out", str(out), "--figure", str(picture)),
        *("--json", "-"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    loaded = PartitionManifest.load(out, data=read_source(records_file).file)
    assert found["sha256"] == loaded.sources[0].sha256.hex()
    assert [client["n_records"] for client in found["clients"]] == [18, 18, 18]
    assert loaded.partition.recipe == make_recipe(
        Scheme.EQUAL_VOLUME, n_clients=3, seed=4, n_held_out=2
    )
    assert picture.exists()


def test_the_command_takes_the_papers_minimum_for_its_own_scheme_only(
    records_file: Path, tmp_path: Path
) -> None:
    for scheme, least in (("skewed", 40), ("dirichlet", 1)):
        out = tmp_path / f"{scheme}.json"
        arguments = [
            *("partition", str(records_file), "--scheme", scheme, "--clients", "1"),
            *("--out", str(out)),
        ]
        result = CliRunner().invoke(app, [*arguments, "--held-out", "0"])
        assert result.exit_code == 0, result.output
        assert PartitionManifest.load(out).partition.recipe.min_records == least

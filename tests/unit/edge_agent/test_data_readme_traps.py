"""Real data sets, with the oddities that their description warns of; skipped without them."""

import csv
import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edge_agent.data.reading import read_records
from edge_agent.data.records import Role, dataset_digest

DOLLY = "dolly/databricks-dolly-15k.shared.jsonl.xz"
CONTEXT_CATEGORIES = {"closed_qa", "information_extraction", "summarization"}


def raw_lines(path: Path) -> list[dict[str, Any]]:
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rb") as stream:
        return [json.loads(line) for line in stream.read().decode("utf-8").split("\n") if line]


class TestDolly:
    def test_every_record_is_read_and_every_character_kept(self, data_dir: Path) -> None:
        # No-break spaces, tabs, U+FFFD, zero-width marks, a stray U+FEFF, blanks at the ends.
        records, report = read_records(data_dir / DOLLY)
        assert (report.n_read, report.n_malformed) == (13_461, 0)
        raw = raw_lines(data_dir / DOLLY)
        kept = [(r.instruction, r.context, r.response, r.category) for r in records]
        assert kept == [(r["instruction"], r["context"], r["response"], r["category"]) for r in raw]
        assert sum("\ufeff" in r.response for r in records) == 1
        assert sum(len(r.response) == 1 for r in records) > 0
        assert max(len(r.response) for r in records) > 20_000
        assert records[0].source == "databricks-dolly-15k.shared.jsonl.xz:1"

    def test_categories_and_empty_contexts_are_as_described(self, data_dir: Path) -> None:
        records, _ = read_records(data_dir / DOLLY)
        assert Counter(r.category for r in records) == {
            "brainstorming": 1592,
            "classification": 1926,
            "closed_qa": 1596,
            "creative_writing": 637,
            "general_qa": 1938,
            "information_extraction": 1337,
            "open_qa": 3372,
            "summarization": 1063,
        }
        assert sum(r.context == "" for r in records) == 9465
        assert {r.category for r in records if r.context} == CONTEXT_CATEGORIES

    def test_identical_records_are_all_kept_and_counted_by_the_digest(self, data_dir: Path) -> None:
        records, _ = read_records(data_dir / DOLLY)
        texts = Counter((r.instruction, r.context, r.response) for r in records)
        assert max(texts.values()) == 2
        distinct = {(r.instruction, r.context, r.response): r for r in records}
        assert dataset_digest(distinct.values()) != dataset_digest(records)

    def test_without_its_last_line_break_it_is_the_same(
        self, data_dir: Path, tmp_path: Path
    ) -> None:
        lines = lzma.decompress((data_dir / DOLLY).read_bytes()).split(b"\n")[:500]
        for name, content in (
            ("a.jsonl", b"\n".join(lines)),
            ("b.jsonl", b"\n".join([*lines, b""])),
        ):
            (tmp_path / name).write_bytes(content)
        (one, _), (two, _) = read_records(tmp_path / "a.jsonl"), read_records(tmp_path / "b.jsonl")
        assert len(one) == 500
        assert dataset_digest(one) == dataset_digest(two)

    def test_as_csv_or_parquet_it_has_the_same_digest(self, data_dir: Path, tmp_path: Path) -> None:
        rows = raw_lines(data_dir / DOLLY)[::7]
        with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
        (tmp_path / "d.json").write_text(json.dumps(rows[::-1]))
        digests = set()
        for name in ("d.csv", "d.parquet", "d.json"):
            records, report = read_records(tmp_path / name)
            assert (len(records), report.n_malformed) == (len(rows), 0)
            digests.add(dataset_digest(records))
        assert len(digests) == 1

    def test_the_finnish_copy_is_as_long_with_the_same_categories(self, data_dir: Path) -> None:
        finnish, report = read_records(data_dir / "dolly-fi/dolly-15k-fi.shared.jsonl.xz")
        english, _ = read_records(data_dir / DOLLY)
        assert report.n_malformed == 0
        assert [r.category for r in finnish] == [r.category for r in english]
        assert sum("[3]" in r.context for r in finnish) > 0


class TestOthers:
    def test_the_four_empty_outputs_of_alpaca_are_named(self, data_dir: Path) -> None:
        records, report = read_records(data_dir / "alpaca/alpaca_random_9k.json.xz")
        assert (report.n_read, report.n_records, report.n_malformed) == (9229, 9225, 4)
        assert [(m.location, m.reason) for m in report.malformed] == [
            (f"alpaca_random_9k.json.xz[{index}]", "its output is blank")
            for index in (1461, 3587, 6234, 8990)
        ]
        assert report.n_no_input_markers == 123
        raw = json.loads(
            lzma.decompress((data_dir / "alpaca/alpaca_random_9k.json.xz").read_bytes())
        )
        n_empty = sum(not r["input"].strip() and bool(r["output"]) for r in raw)
        assert sum(r.context == "" for r in records) == n_empty + 123

    def test_alpaca_remarks_within_a_longer_input_are_kept(self, data_dir: Path) -> None:
        records, _ = read_records(data_dir / "alpaca/alpaca_random_9k.json.xz")
        kept = {r.context for r in records if "noinput" in r.context.lower()}
        assert {"He was <noinput>", "<noinput> 8"} <= kept
        assert "<noinput>" not in kept

    def test_french_chats_keep_their_turns(self, data_dir: Path) -> None:
        records, report = read_records(data_dir / "fr/oasst_20230412_fr_top1.jsonl.xz")
        assert (report.n_read, report.n_malformed) == (256, 0)
        chats = [r.messages for r in records if r.messages is not None]
        assert Counter(len(turns) for turns in chats) == {4: 116, 6: 3}
        assert sum(r.messages is None for r in records) == 137
        assert all(turns[0].role is Role.USER for turns in chats)
        assert all(turns[-1].role is Role.ASSISTANT for turns in chats)

    @pytest.mark.parametrize(
        ("name", "n_records"),
        [
            ("self-instruct/seed_tasks.jsonl", 175),
            ("fr/seed_tasks_vigogne.jsonl", 175),  # no line break at its end
            ("self-instruct/user_oriented_instructions.jsonl", 252),
            ("self-instruct/text-davinci-003_predictions.jsonl", 252),
            ("gsm8k/train.jsonl.xz", 7473),
        ],
    )
    def test_nested_instances_and_other_names_are_read_whole(
        self, data_dir: Path, name: str, n_records: int
    ) -> None:
        records, report = read_records(data_dir / name)
        assert (len(records), report.n_malformed) == (n_records, 0)

    def test_the_mmlu_array_is_read_also_under_the_name_its_source_gives_it(
        self, data_dir: Path, tmp_path: Path
    ) -> None:
        packed = (data_dir / "mmlu/mmlu_test_1444.json.xz").read_bytes()
        (tmp_path / "mmlu_test_1444.jsonl").write_bytes(lzma.decompress(packed))
        records, report = read_records(tmp_path / "mmlu_test_1444.jsonl")
        assert (len(records), report.n_malformed) == (1444, 0)
        assert records[0].context.startswith("Qusetion: ")
        assert records[0].response == "The answer is: C. Hurler syndrome"

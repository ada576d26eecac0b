"""Reading records: formats, field names, and every way a file or an entry can be bad."""

import csv
import gzip
import json
import lzma
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edge_agent.data.fields import is_no_input_marker
from edge_agent.data.reading import read_records
from edge_agent.data.records import (
    N_REASONS_KEPT,
    ChatMessage,
    OnMalformed,
    ReadReport,
    Record,
    Role,
    dataset_digest,
)
from edge_agent.data.sources import FileSource, HubSource, parse_source
from edge_agent.errors import DataError, MalformedRecordError

ROWS = [
    {
        "instruction": "Name a colour.",
        "context": "",
        "response": "Red.",
        "category": "open_qa",
    },
    {
        "instruction": 'Say "hi",\nthen stop.',
        "context": " kept\u00a0as\tit is ",
        "response": "hi \U0001f600\ufeff",
        "category": "closed_qa",
    },
]


def make_file(folder: Path, content: str | bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def make_jsonl(rows: Sequence[object], *, escape: bool = True) -> str:
    return "".join(json.dumps(row, ensure_ascii=escape) + "\n" for row in rows)


def read_one(folder: Path, row: object) -> Record:
    (record,), _ = read_records(make_file(folder, make_jsonl([row])))
    return record


def reason_for(folder: Path, row: object) -> str:
    """Why an entry is refused."""
    with pytest.raises(MalformedRecordError) as caught:
        read_records(make_file(folder, make_jsonl([plain(), row])), on_malformed=OnMalformed.FAIL)
    assert caught.value.location == "data.jsonl:2"
    return caught.value.reason


def plain(**changes: object) -> dict[str, object]:
    return {"instruction": "Ask.", "context": "", "response": "Say.", **changes}


class TestFormats:
    def write(self, folder: Path, name: str) -> Path:
        """The same rows in the format that the name asks for."""
        plain_name = name.removesuffix(".xz").removesuffix(".gz")
        path = folder / plain_name
        match path.suffix:
            case ".json":
                path.write_text(json.dumps(ROWS))
            case ".jsonl" | ".ndjson":
                path.write_text(make_jsonl(ROWS))
            case ".csv":
                with path.open("w", newline="", encoding="utf-8") as stream:
                    writer = csv.DictWriter(stream, list(ROWS[0]))
                    writer.writeheader()
                    writer.writerows(ROWS)
            case ".parquet":
                pq.write_table(pa.Table.from_pylist(ROWS), path)
        if name.endswith(".xz"):
            (folder / name).write_bytes(lzma.compress(path.read_bytes()))
        elif name.endswith(".gz"):
            (folder / name).write_bytes(gzip.compress(path.read_bytes()))
        return folder / name

    @pytest.mark.parametrize("packing", ["", ".xz", ".gz"])
    @pytest.mark.parametrize(
        ("ending", "locations"),
        [
            (".json", ["[0]", "[1]"]),
            (".jsonl", [":1", ":2"]),
            (".ndjson", [":1", ":2"]),
            (".csv", [":2", ":3"]),
            (".parquet", ["[0]", "[1]"]),
        ],
    )
    def test_every_format_gives_the_same_records_and_its_own_locations(
        self, tmp_path: Path, ending: str, locations: list[str], packing: str
    ) -> None:
        name = f"data{ending}{packing}"
        records, report = read_records(self.write(tmp_path, name))
        assert [r.source for r in records] == [name + place for place in locations]
        got = [
            {
                "instruction": r.instruction,
                "context": r.context,
                "response": r.response,
                "category": r.category,
            }
            for r in records
        ]
        assert got == ROWS
        assert report == ReadReport(
            source=name,
            n_read=2,
            n_records=2,
            n_malformed=0,
            n_no_input_markers=0,
            malformed=(),
        )

    def test_a_json_array_named_jsonl_is_read_as_the_array_it_is(self, tmp_path: Path) -> None:
        records, _ = read_records(make_file(tmp_path, "\n " + json.dumps(ROWS, indent=1)))
        assert [r.source for r in records] == ["data.jsonl[0]", "data.jsonl[1]"]

    def test_lines_of_objects_named_json_are_read_as_the_lines_they_are(
        self, tmp_path: Path
    ) -> None:
        records, _ = read_records(make_file(tmp_path, make_jsonl(ROWS), "data.json"))
        assert [r.source for r in records] == ["data.json:1", "data.json:2"]

    def test_an_object_that_holds_one_list_is_read_as_that_list(self, tmp_path: Path) -> None:
        content = json.dumps({"version": 1, "data": ROWS})
        records, _ = read_records(make_file(tmp_path, content, "data.json"))
        assert len(records) == 2

    def test_an_object_that_is_a_record_is_read_as_one(self, tmp_path: Path) -> None:
        content = json.dumps({"instruction": "a", "instances": [{"input": "", "output": "b"}]})
        records, _ = read_records(make_file(tmp_path, content, "data.json"))
        assert [r.response for r in records] == ["b"]

    def test_an_object_that_holds_several_lists_is_refused(self, tmp_path: Path) -> None:
        path = make_file(tmp_path, json.dumps({"test": ROWS, "train": ROWS}), "data.json")
        with pytest.raises(DataError, match=r"several lists \(test, train\)"):
            read_records(path)

    @pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv"])
    def test_a_byte_order_mark_is_dropped(self, tmp_path: Path, name: str) -> None:
        content = {
            "data.jsonl": make_jsonl(ROWS),
            "data.json": json.dumps(ROWS),
            "data.csv": "instruction,response\nAsk.,Say.\n",
        }[name]
        records, report = read_records(
            make_file(tmp_path, b"\xef\xbb\xbf" + content.encode(), name)
        )
        assert records[0].instruction in {"Name a colour.", "Ask."}
        assert report.n_malformed == 0

    def test_utf16_is_refused_by_its_name(self, tmp_path: Path) -> None:
        path = make_file(tmp_path, make_jsonl(ROWS).encode("utf-16"))
        with pytest.raises(DataError, match="is UTF-16: save it as UTF-8"):
            read_records(path)

    def test_a_missing_last_line_break_and_blank_lines_change_nothing(self, tmp_path: Path) -> None:
        content = "\n" + make_jsonl(ROWS).replace("\n", "\r\n\n").rstrip()
        records, report = read_records(make_file(tmp_path, content))
        assert [r.source for r in records] == ["data.jsonl:2", "data.jsonl:4"]
        assert report.n_read == 2

    def test_line_separators_inside_a_text_do_not_end_a_line(self, tmp_path: Path) -> None:
        row = plain(response="a\u2028b\u0085c\x0bd")
        record, _ = read_records(make_file(tmp_path, make_jsonl([row], escape=False)))
        assert record[0].response == "a\u2028b\u0085c\x0bd"

    def test_escaped_surrogate_pairs_are_one_character(self, tmp_path: Path) -> None:
        content = '{"instruction": "a", "response": "\\ud83d\\ude00"}'
        (record,), _ = read_records(make_file(tmp_path, content))
        assert record.response == "\U0001f600"

    def test_csv_cells_may_hold_line_breaks_quotes_and_long_texts(self, tmp_path: Path) -> None:
        long = "x" * 200_000  # beyond the csv module's own limit
        content = f'instruction,response\r\n"a\nb ""c""","d\r\n\r\ne"\r\n\r\nlong,{long}\r\n'
        limit = csv.field_size_limit()
        records, _ = read_records(make_file(tmp_path, content, "data.csv"))
        assert [(r.instruction, r.response) for r in records] == [
            ('a\nb "c"', "d\r\n\r\ne"),
            ("long", long),
        ]
        assert [r.source for r in records] == ["data.csv:2", "data.csv:7"]
        assert csv.field_size_limit() == limit

    def test_parquet_rows_may_hold_nulls_and_nested_chats(self, tmp_path: Path) -> None:
        rows = [
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"messages": None},
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
        (record,), report = read_records(tmp_path / "data.parquet")
        assert (record.instruction, record.response) == ("a", "b")
        assert report.malformed[0].location == "data.parquet[1]"

    def test_reading_lines_loads_neither_torch_nor_pyarrow_nor_a_hub_client(
        self, tmp_path: Path
    ) -> None:
        import subprocess

        path = make_file(tmp_path, make_jsonl(ROWS))
        script = (
            "import sys; from edge_agent.data.reading import read_records; "
            f"read_records({str(path)!r}); import edge_agent.data.tokens; "
            "print([m for m in ('torch', 'transformers', 'pyarrow', 'huggingface_hub') "
            "if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]"


class TestFieldNames:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"instruction": "a", "context": "b", "response": "c"}, ("a", "b", "c")),
            ({"instruction": "a", "input": "b", "output": "c"}, ("a", "b", "c")),
            ({"instruction": "a", "input": "b", "response": "c"}, ("a", "b", "c")),
            ({"prompt": "a", "completion": "c"}, ("a", "", "c")),
            ({"prompt": "a", "response": "c"}, ("a", "", "c")),
            ({"question": "a", "answer": "c"}, ("a", "", "c")),
            ({"instruction": "a", "prompt": "ignored", "response": "c"}, ("a", "", "c")),
            ({"instruction": "a", "context": None, "response": "c"}, ("a", "", "c")),
            ({"instruction": "a", "context": " \n", "response": "c"}, ("a", "", "c")),
            ({"instruction": "a", "response": "", "output": "c"}, ("a", "", "c")),
            ({"instruction": " a", "context": "b ", "response": "c\n"}, (" a", "b ", "c\n")),
        ],
    )
    def test_known_names_are_understood_and_texts_kept(
        self, tmp_path: Path, row: dict[str, Any], expected: tuple[str, str, str]
    ) -> None:
        record = read_one(tmp_path, row)
        assert (record.instruction, record.context, record.response) == expected
        assert record.category is None
        assert record.messages is None

    @pytest.mark.parametrize(
        "text",
        ["<noinput>", "No input", "no input.", "[noinput]", "No input required.", "<noinput"],
    )
    def test_an_alpaca_input_that_says_there_is_none_counts_as_empty(
        self, tmp_path: Path, text: str
    ) -> None:
        path = make_file(tmp_path, make_jsonl([{"instruction": "a", "input": text, "output": "c"}]))
        (record,), report = read_records(path)
        assert record.context == ""
        assert report.n_no_input_markers == 1

    @pytest.mark.parametrize(
        "text", ["He was <noinput>", "<noinput> 8", "Noise input", "There is no input here at all"]
    )
    def test_a_text_that_merely_mentions_it_is_kept(self, tmp_path: Path, text: str) -> None:
        assert not is_no_input_marker(text)
        record = read_one(tmp_path, {"instruction": "a", "input": text, "output": "c"})
        assert record.context == text

    def test_a_dolly_context_is_never_taken_for_such_a_remark(self, tmp_path: Path) -> None:
        assert read_one(tmp_path, plain(context="No input")).context == "No input"

    def test_self_instruct_instances_become_records_of_their_own(self, tmp_path: Path) -> None:
        instances = [{"input": "x", "output": "y"}, {"input": "", "output": "z"}]
        row = {"instruction": "a", "instances": instances, "category": "open_qa"}
        records, report = read_records(make_file(tmp_path, make_jsonl([row])))
        assert [(r.instruction, r.context, r.response) for r in records] == [
            ("a", "x", "y"),
            ("a", "", "z"),
        ]
        assert [r.source for r in records] == ["data.jsonl:1#0", "data.jsonl:1#1"]
        assert (report.n_read, report.n_records) == (1, 2)

    def test_a_chat_of_one_question_and_answer_is_an_ordinary_record(self, tmp_path: Path) -> None:
        messages = [{"content": "a", "role": "user"}, {"content": "b", "role": "assistant"}]
        record = read_one(tmp_path, {"id": 3, "messages": messages})
        assert (record.instruction, record.context, record.response) == ("a", "", "b")
        assert record.messages is None

    def test_a_longer_chat_keeps_its_turns(self, tmp_path: Path) -> None:
        turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
        turns.append(("assistant", "d"))
        messages = [{"role": role, "content": text} for role, text in turns]
        record = read_one(tmp_path, {"messages": messages})
        assert record.messages == tuple(ChatMessage(role=Role(r), content=t) for r, t in turns)
        assert (record.instruction, record.response) == ("a", "d")


class TestMalformedEntries:
    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ([1, 2], "not an object but JSON of type list"),
            ("text", "not an object but JSON of type str"),
            (None, "not an object but JSON of type NoneType"),
            ({}, "no instruction, prompt, question or messages among its fields (none)"),
            (
                {"text": "x"},
                "no instruction, prompt, question or messages among its fields ('text')",
            ),
            ({"instruction": "a"}, "no response or output or completion or answer"),
            (plain(response=""), "its response is blank"),
            (plain(response=" \u00a0\n"), "its response is blank"),
            (plain(instruction=" "), "its instruction is blank"),
            (
                plain(instruction=None),
                (
                    "no instruction, prompt, question or messages among its "
                    "fields ('context', 'instruction', 'response')"
                ),
            ),
            (plain(response=5), "its response is not text but of type int"),
            (plain(context=["a"]), "its context is not text but of type list"),
            (plain(category=7), "its category is not text but of type int"),
            (
                plain(response="a\0b"),
                ("its response holds a NUL character: is the file of another encoding?"),
            ),
            (
                plain(response="a\ud800"),
                ("its response holds a lone surrogate or bytes that are not UTF-8 (place 1)"),
            ),
            (
                plain(context="a", input="b"),
                ("both context and input, which mean the same, with different texts"),
            ),
            (
                {"instruction": "a", "instances": []},
                "'instances' is not a list with something in it",
            ),
            ({"instruction": "a", "instances": ["b"]}, "instances[0] is not an object"),
            ({"messages": []}, "'messages' is not a list with something in it"),
            ({"messages": ["a"]}, "messages[0] is not an object"),
            (
                {"messages": [{"role": "tool", "content": "a"}]},
                "the role of messages[0] is none of system, user, assistant",
            ),
            (
                {"messages": [{"role": ["user"], "content": "a"}]},
                "the role of messages[0] is none of system, user, assistant",
            ),
            (
                {"messages": [{"role": "user"}]},
                "the content of messages[0] is not text but of type NoneType",
            ),
            (
                {"messages": [{"role": "user", "content": " "}]},
                "the content of messages[0] is blank",
            ),
            (
                {"messages": [{"role": "assistant", "content": "a"}]},
                "messages[0] is of role 'assistant' where 'user' is due",
            ),
            (
                {
                    "messages": [
                        {"role": "system", "content": "s"},
                        {"role": "user", "content": "a"},
                        {"role": "user", "content": "b"},
                    ]
                },
                "messages[2] is of role 'user' where 'assistant' is due",
            ),
            (
                {"messages": [{"role": "user", "content": "a"}]},
                "the last of its messages is not the assistant's: there is nothing to learn",
            ),
            (
                {"messages": [{"role": "system", "content": "a"}]},
                "the last of its messages is not the assistant's: there is nothing to learn",
            ),
        ],
    )
    def test_each_is_refused_with_its_reason(
        self, tmp_path: Path, row: object, reason: str
    ) -> None:
        assert reason_for(tmp_path, row) == reason

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b'{"instruction": "a", "response": "b"', "not valid JSON: Expecting ',' delimiter "),
            (b'{"instruction": "\xff", "response": "b"}', "not valid UTF-8 (byte 17)"),
            (b"[" * 200_000, "JSON that cannot be parsed: "),
            (b'{"a": ' + b"9" * 5000 + b"}", "JSON that cannot be parsed: "),
            (b"nonsense", "not valid JSON: Expecting value (column 1)"),
        ],
    )
    def test_a_line_that_is_not_json_is_named_and_the_next_one_read(
        self, tmp_path: Path, line: bytes, reason: str
    ) -> None:
        content = make_jsonl(ROWS[:1]).encode() + line + b"\n" + make_jsonl(ROWS[1:]).encode()
        records, report = read_records(make_file(tmp_path, content))
        assert [r.source for r in records] == ["data.jsonl:1", "data.jsonl:3"]
        assert (report.n_read, report.n_records, report.n_malformed) == (3, 2, 1)
        assert report.malformed[0].location == "data.jsonl:2"
        assert report.malformed[0].reason.startswith(reason)

    def test_skipping_counts_all_and_describes_the_first_few(self, tmp_path: Path) -> None:
        rows = [plain(), *[plain(response="")] * (N_REASONS_KEPT + 5), plain()]
        records, report = read_records(make_file(tmp_path, make_jsonl(rows)))
        assert len(records) == 2
        assert report.n_malformed == N_REASONS_KEPT + 5
        assert [m.location for m in report.malformed] == [
            f"data.jsonl:{line}" for line in range(2, N_REASONS_KEPT + 2)
        ]

    def test_failing_stops_at_the_first_with_its_place(self, tmp_path: Path) -> None:
        path = make_file(tmp_path, json.dumps([plain(), plain(response="")]), "data.json")
        with pytest.raises(MalformedRecordError, match=r"^data\.json\[1\]: its response is blank$"):
            read_records(path, on_malformed=OnMalformed.FAIL)

    def test_bytes_that_are_not_utf8_spoil_only_their_entry_of_an_array(
        self, tmp_path: Path
    ) -> None:
        content = json.dumps([plain(), plain(response="X"), plain()]).encode()
        path = make_file(tmp_path, content.replace(b'"X"', b'"caf\xe9"'), "data.json")
        records, report = read_records(path)
        assert len(records) == 2
        assert report.malformed[0].location == "data.json[1]"
        assert "not UTF-8" in report.malformed[0].reason

    def test_bytes_that_are_not_utf8_and_ragged_rows_spoil_only_their_row_of_a_csv(
        self, tmp_path: Path
    ) -> None:
        content = b"instruction,response\na,caf\xe9\nb,c,d\ne\ng,h\n"
        records, report = read_records(make_file(tmp_path, content, "data.csv"))
        assert [r.instruction for r in records] == ["g"]
        assert [(m.location, m.reason) for m in report.malformed] == [
            (
                "data.csv:2",
                "its response holds a lone surrogate or bytes that are not UTF-8 (place 3)",
            ),
            ("data.csv:3", "3 cells under a header of 2"),
            ("data.csv:4", "1 cells under a header of 2"),
        ]

    def test_no_message_repeats_a_text_of_the_record(self, tmp_path: Path) -> None:
        secret = "my diagnosis"
        for row in (
            plain(instruction=secret, response=""),
            plain(context=secret, input=secret + "!"),
            plain(response=secret + "\0"),
            {"messages": [{"role": "user", "content": secret}]},
        ):
            assert secret not in reason_for(tmp_path, row)


class TestUnreadableSources:
    @pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv"])
    @pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
    def test_an_empty_file_is_refused(self, tmp_path: Path, name: str, content: str) -> None:
        with pytest.raises(DataError, match=r"holds no records|is empty"):
            read_records(make_file(tmp_path, content, name))

    def test_an_empty_array_and_a_lone_header_are_refused(self, tmp_path: Path) -> None:
        for content, name in (("[]", "data.json"), ("instruction,response\n", "data.csv")):
            with pytest.raises(DataError, match="holds no records"):
                read_records(make_file(tmp_path, content, name))

    def test_only_malformed_entries_are_one_error_with_the_first_reason(
        self, tmp_path: Path
    ) -> None:
        path = make_file(tmp_path, make_jsonl([plain(response="")] * 3))
        with pytest.raises(
            DataError,
            match=r"^none of the 3 records in data\.jsonl can be used; the first, "
            r"data\.jsonl:1: its response is blank$",
        ):
            read_records(path)

    def test_a_broken_document_is_named_by_line_and_column(self, tmp_path: Path) -> None:
        path = make_file(tmp_path, '[{"instruction": "a",\n "response": }]', "data.json")
        with pytest.raises(DataError, match=r"data\.json:2: not valid JSON: .* \(column 14\)"):
            read_records(path)

    @pytest.mark.parametrize("content", ["7", '"text"', "null", '{"a": 1}'])
    def test_a_document_without_a_list_is_refused(self, tmp_path: Path, content: str) -> None:
        with pytest.raises(DataError, match="holds no list of records"):
            read_records(make_file(tmp_path, content, "data.json"))

    def test_a_document_nested_too_deeply_is_refused(self, tmp_path: Path) -> None:
        path = make_file(tmp_path, "[" * 200_000, "data.json")
        with pytest.raises(DataError, match="cannot be parsed"):
            read_records(path)

    @pytest.mark.parametrize("content", ['a,response\n"x,y\nz,w\n', 'a,b\n"x"y,z\n'])
    def test_broken_quoting_of_a_csv_is_fatal_and_named_by_line(
        self, tmp_path: Path, content: str
    ) -> None:
        with pytest.raises(DataError, match=r"data\.csv:2: broken CSV in the record that begins"):
            read_records(make_file(tmp_path, content, "data.csv"))

    def test_a_csv_column_named_twice_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="stands twice"):
            read_records(make_file(tmp_path, "response,response\na,b\n", "data.csv"))

    @pytest.mark.parametrize("packing", ["xz", "gz"])
    @pytest.mark.parametrize("n_bytes", [3, 60])
    def test_a_truncated_archive_is_refused(
        self, tmp_path: Path, packing: str, n_bytes: int
    ) -> None:
        pack = lzma.compress if packing == "xz" else gzip.compress
        content = pack(make_jsonl([plain(response=str(i)) for i in range(50)]).encode())[:n_bytes]
        with pytest.raises(DataError, match="cannot be read"):
            read_records(make_file(tmp_path, content, f"data.jsonl.{packing}"))

    @pytest.mark.parametrize("name", ["data.parquet", "data.parquet.xz"])
    def test_a_parquet_file_that_is_none_is_refused(self, tmp_path: Path, name: str) -> None:
        content = lzma.compress(b"PAR1 not") if name.endswith("xz") else b"PAR1 not"
        with pytest.raises(DataError, match="not a readable Parquet file"):
            read_records(make_file(tmp_path, content, name))

    def test_an_unknown_ending_is_refused_with_those_known(self, tmp_path: Path) -> None:
        path = make_file(tmp_path, "x", "data.txt.xz")
        with pytest.raises(DataError, match=r"data\.txt\.xz: unknown ending; known are \.json, "):
            read_records(path)


class TestParseSource:
    def test_a_path_is_a_file(self, tmp_path: Path) -> None:
        path = make_file(tmp_path, "")
        assert parse_source(path) == parse_source(str(path)) == FileSource(path=path)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("hub:a/b", ("a/b", None, None)),
            ("hub:a/b-c.d@v1.0", ("a/b-c.d", "v1.0", None)),
            ("hub:a/b:data/train.jsonl", ("a/b", None, "data/train.jsonl")),
            ("hub:a/b@refs/pr/1:x.csv", ("a/b", "refs/pr/1", "x.csv")),
        ],
    )
    def test_the_hub_form_is_read_and_written_back(
        self, text: str, expected: tuple[str, str | None, str | None]
    ) -> None:
        source = parse_source(text)
        assert isinstance(source, HubSource)
        assert (source.repo_id, source.revision, source.filename) == expected
        assert str(source) == text

    @pytest.mark.parametrize("text", ["hub:", "hub:a", "hub:a/b/c", "hub:a/b@", "hub:a b/c"])
    def test_another_hub_form_is_refused(self, text: str) -> None:
        with pytest.raises(DataError, match="is not of the form hub:owner/name"):
            parse_source(text)

    def test_a_bare_hub_name_is_refused_with_the_form_to_write(self) -> None:
        with pytest.raises(
            DataError, match=r"on the hub write hub:databricks/databricks-dolly-15k"
        ):
            parse_source("databricks/databricks-dolly-15k")

    @pytest.mark.parametrize("text", ["missing.jsonl", "folder/missing.jsonl", "./a/b"])
    def test_a_mistyped_path_is_never_taken_for_a_hub_name(self, text: str) -> None:
        with pytest.raises(DataError, match="there is no file") as caught:
            parse_source(text)
        assert "hub:" not in str(caught.value)

    def test_a_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is a folder: name one file in it"):
            parse_source(tmp_path)


class TestDatasetDigest:
    def make(self, **changes: Any) -> Record:
        fields: dict[str, Any] = {
            "instruction": "a",
            "context": "b",
            "response": "c",
            "category": None,
            "messages": None,
            "source": "x:1",
        }
        return Record(**{**fields, **changes})

    def test_it_is_the_published_one(self) -> None:
        # A changed digest would give every owner's privacy ledger a fresh budget.
        assert dataset_digest([self.make()]) == (
            "277d5b4327a0bf34e90f5ddd0fa9230fffe5db2a6a92b229f5c47a6b39662b7e"
        )

    def test_order_category_and_place_do_not_matter(self) -> None:
        one, two = self.make(), self.make(response="d")
        there = self.make(category="open_qa", source="y[7]")
        assert dataset_digest([one, two]) == dataset_digest([two, there])

    def test_texts_fields_and_counts_do(self) -> None:
        messages = tuple(
            ChatMessage(role=role, content=text)
            for role, text in ((Role.SYSTEM, "a"), (Role.USER, "b"), (Role.ASSISTANT, "c"))
        )
        sets = [
            [],
            [self.make()],
            [self.make(), self.make()],
            [self.make(response="c ")],
            [self.make(instruction="ab", context="")],
            [self.make(instruction="", context="ab")],
            [self.make(messages=messages)],
        ]
        assert len({dataset_digest(records) for records in sets}) == len(sets)

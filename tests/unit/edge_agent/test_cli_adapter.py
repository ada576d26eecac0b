"""`ask`, `chat` and `export` as typed, in process."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from edge_agent import cli, cli_adapter
from edge_agent.home import AgentHome
from edge_agent.journal import Journal
from protocol.blocks import LoraBlock
from protocol.messages import ReleasePage
from protocol.signing import sign
from protocol.wire import sha256
from quant.adapter import (
    WEIGHTS_NAME,
    adapter_shapes,
    initial_adapter,
    read_folder,
    sent_layout,
    to_safetensors,
)
from quant.base_model import LoadedBase, load_base
from quant.export import read_gguf
from quant.model_card import read_provenance

SHORT = ("--max-new-tokens", "8")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def unboxed(done: Done) -> str:
    """What a box of rich tells, on one line."""
    return " ".join(done.err.replace("│", " ").split())


Type = Callable[..., Done]


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli_adapter, "_PATIENCE_S", 0.0)
    monkeypatch.setenv("SHEEPFOLD_AGENT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SHEEPFOLD_AGENT_DEVICE", "cpu")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Type:
    def run(*arguments: object, typed: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["sheepfold-agent", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Done(code=int(ended.value.code or 0), out=captured.out, err=captured.err)

    return run


@pytest.fixture
def tiny_adapter(make_adapter_folder, tmp_path: Path) -> Path:
    base = load_base("embedded:tiny", device=torch.device("cpu"))
    return make_adapter_folder(tmp_path / "adapter", base.description)


@pytest.fixture
def joined(random_base: LoadedBase, server, answer, server_key, make_manifest, make_release, home):
    """A home that joined a federation whose server shows release 0."""
    base = random_base.description
    lora = LoraBlock(rank=2, alpha=4.0, target_modules=("q_proj", "v_proj"), init_seed=7)
    layout = sent_layout(adapter_shapes(base, lora), lora.sent).digest()
    manifest = make_manifest(base=base.base, lora=lora, layout=layout)
    weights = to_safetensors(initial_adapter(base, lora))
    ref = {"sha256": sha256(weights), "n_bytes": len(weights)}
    release = make_release(manifest, adapter=ref, sent=ref)
    signed = sign(server_key, "release", release).signed

    def give(seen):
        if "/blobs/" in seen.path:
            return answer(body=weights)
        return answer(body=ReleasePage(releases=(signed,), newest=0).canonical())

    server.script = [give]
    home.create()
    journal = Journal(home.journal_path)
    federation = sign(server_key, "federation", manifest).signed
    journal.join(url=server.url, federation=federation, data="x", now=1.0)
    journal.close()
    return home


@pytest.fixture
def home(tmp_path: Path) -> AgentHome:
    return AgentHome(tmp_path / "home")


# A folder


def test_an_adapter_is_asked_from_a_folder(type_in: Type, tiny_adapter: Path) -> None:
    done = type_in("ask", tiny_adapter, "Where does Anna live?")
    assert done.code == 0, done.err
    assert done.out.strip()
    assert done.out.endswith("\n")
    told = type_in("ask", tiny_adapter, "Where does Anna live?", "--json", "-")
    answer = json.loads(told.out)
    assert answer["answer"] + "\n" == done.out
    assert (answer["base"], answer["template"]) == ("embedded:tiny", "alpaca")
    assert (answer["template_known"], answer["release"]) == (True, 1)
    assert answer["federation"] == "Test"


def test_a_context_is_given_as_text_or_as_a_file(
    type_in: Type, tiny_adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "context.txt").write_text("Anna lives in a red house.", encoding="utf-8")
    ask = ("ask", tiny_adapter, "Where?", "--json", "-", *SHORT)
    without = json.loads(type_in(*ask).out)
    by_text = json.loads(type_in(*ask, "--context", "Anna lives in a red house.").out)
    by_file = json.loads(type_in(*ask, "--context-file", tmp_path / "context.txt").out)
    assert by_text == by_file
    assert by_text["n_prompt_tokens"] > without["n_prompt_tokens"]
    (tmp_path / "context.txt").write_bytes(b"\xff\xfe")
    done = type_in(*ask, "--context-file", tmp_path / "context.txt")
    assert done.code == 2
    assert "is not UTF-8 text" in unboxed(done)


def test_json_in_a_file_leaves_the_answer_on_standard_output(
    type_in: Type, tiny_adapter: Path, tmp_path: Path
) -> None:
    path = tmp_path / "answer.json"
    done = type_in("ask", tiny_adapter, "Where?", "--json", path, *SHORT)
    assert json.loads(path.read_text())["answer"] + "\n" == done.out
    assert "cut after 8 tokens" in done.err


def test_draws_are_told_with_their_seed(type_in: Type, tiny_adapter: Path) -> None:
    ask = ("ask", tiny_adapter, "Where?", "--json", "-", "--temperature", "2", *SHORT)
    first, again, other = (json.loads(type_in(*ask, "--seed", seed).out) for seed in (1, 1, 2))
    assert first == again
    assert (first["temperature"], first["seed"]) == (2.0, 1)
    assert first["answer"] != other["answer"]


def test_a_foreign_adapter_is_asked_with_alpacas_prompt_and_it_is_said(
    type_in: Type, make_adapter_folder, random_base: LoadedBase, random_base_dir, tmp_path: Path
) -> None:
    folder = make_adapter_folder(tmp_path / "f", random_base.description, foreign=True)
    done = type_in("ask", folder, "Where?", "--base", random_base_dir, *SHORT)
    assert done.code == 0, done.err
    assert "does not say how it was trained" in done.err


def test_a_model_cannot_write_escape_sequences_to_a_terminal(
    type_in: Type, tiny_adapter: Path, monkeypatch
) -> None:
    """A model may have learnt them from anyone's records."""
    from edge_agent.answering import Answer, Answerer, Ending

    evil = "one\x1b[2J\x9b\x07\ttwo\nthree"

    def answer(self, record, sampling, *, on_text):
        on_text(evil)
        return Answer(
            text=evil,
            ending=Ending.END_OF_TEXT,
            n_prompt_tokens=1,
            n_new_tokens=1,
            prompt_was_cut=True,
        )

    monkeypatch.setattr(Answerer, "answer", answer)
    assert evil in type_in("ask", tiny_adapter, "Where?").out  # into a file: as it was said
    monkeypatch.setattr(cli_adapter, "_is_terminal", lambda: True)
    done = type_in("ask", tiny_adapter, "Where?")
    assert done.out == "one [2J  \ttwo\nthree\n"
    assert "lost its end" in done.err


def test_chat_answers_each_line_and_ends_with_the_input(type_in: Type, tiny_adapter: Path) -> None:
    done = type_in("chat", tiny_adapter, *SHORT, typed="Where?\n\n/reset\nWho?\n")
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) >= 2
    assert "no turns" in done.err
    assert "nothing to forget" in done.err


def test_chat_goes_on_after_a_question_that_cannot_be_asked(
    type_in: Type, tiny_adapter: Path
) -> None:
    done = type_in("chat", tiny_adapter, "--max-new-tokens", "600", typed="Where?\nWho?\n")
    assert done.code == 0
    assert done.err.count("at most 512 tokens") == 2


def test_chat_goes_on_after_a_line_that_is_not_utf_8(
    type_in: Type, tiny_adapter: Path, monkeypatch
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\nWho?\n"), encoding="utf-8")
    monkeypatch.setattr(io, "StringIO", lambda _: typed)
    done = type_in("chat", tiny_adapter, *SHORT)
    assert done.code == 0, done.err
    assert done.err.count("cut after") == 2


def test_a_chat_template_remembers_until_it_is_told_to_forget(
    type_in: Type, make_adapter_folder, random_base_dir: Path, tmp_path: Path
) -> None:
    import shutil

    from transformers import AutoTokenizer

    from protocol.blocks import Template

    base_dir = tmp_path / "chat-base"
    shutil.copytree(random_base_dir, base_dir)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer.save_pretrained(base_dir)
    base = load_base(base_dir, device=torch.device("cpu")).description
    folder = make_adapter_folder(tmp_path / "adapter", base, template=Template.CHAT)
    long = "Ben has three green boats. " * 60
    done = type_in(
        *("chat", folder, "--base", base_dir, *SHORT),
        typed=f"Where?\n{long}\n{long}\n/reset\nWho?\n",
    )
    assert done.code == 0, done.err
    assert "no turns" not in done.err
    assert "oldest questions were forgotten" in done.err
    assert "Forgotten." in done.err


# The newest release


def test_the_newest_release_is_asked_while_the_agent_works(
    type_in: Type, joined: AgentHome, random_base_dir: Path
) -> None:
    lock = joined.lock()
    done = type_in("ask", "newest", "Where?", "--base", random_base_dir, "--json", "-", *SHORT)
    lock.release()
    assert done.code == 0, done.err
    assert json.loads(done.out)["release"] == 0


def test_the_newest_release_is_exported_while_the_agent_works(
    type_in: Type, joined: AgentHome, tmp_path: Path
) -> None:
    lock = joined.lock()
    done = type_in("export", tmp_path / "out", "--json", tmp_path / "told.json")
    lock.release()
    assert done.code == 0, done.err
    assert "Release 0 is in" in done.err
    assert read_folder(tmp_path / "out")
    told = read_provenance(tmp_path / "out")
    assert told is not None
    assert told.release == 0
    assert json.loads((tmp_path / "told.json").read_text()) == {
        "folder": str(tmp_path / "out"),
        "gguf": None,
        "release": 0,
        "merged": False,
        "merge_error": None,
    }


def test_the_base_of_the_home_is_used_for_its_own_releases(
    type_in: Type, joined: AgentHome, random_base_dir: Path, tmp_path: Path
) -> None:
    done = type_in("ask", "newest", "Where?", *SHORT)
    assert done.code == 1
    assert "name it with --base" in done.err
    (joined.root / "agent.toml").write_text(f'base = "{random_base_dir}"\nthreads = 1\n')
    assert type_in("ask", "newest", "Where?", *SHORT).code == 0
    assert type_in("export", "--gguf", tmp_path / "x.gguf").code == 0


def test_without_the_server_the_last_release_that_was_seen_is_used_and_it_is_said(
    type_in: Type, joined: AgentHome, server, tmp_path: Path
) -> None:
    assert type_in("export", tmp_path / "a").code == 0
    journal = Journal(joined.journal_path)
    page = json.loads(server.script[0](type("Seen", (), {"path": ""})).body)
    from protocol.chain import Release
    from protocol.signing import Signed
    from protocol.wire import parse

    signed = parse(Signed[Release], json.dumps(page["releases"][0]))
    journal.add_release(0, signed)
    journal.close()
    weights = (tmp_path / "a" / WEIGHTS_NAME).read_bytes()
    (joined.cache / sha256(weights).hex()).write_bytes(weights)
    server.close()
    done = type_in("export", tmp_path / "b")
    assert done.code == 0, done.err
    assert "Release 0 is used; the server cannot be asked" in done.err
    assert (tmp_path / "b" / WEIGHTS_NAME).read_bytes() == weights


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_before_joining_there_is_no_newest_release(type_in: Type, command: str) -> None:
    done = type_in(command, "newest", *(["Where?"] if command == "ask" else []))
    assert done.code == 1
    assert "no federation was joined" in done.err


# Exports


def test_a_folder_is_exported_merged_and_as_gguf(
    type_in: Type, tiny_adapter: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    out, gguf = tmp_path / "out", tmp_path / "x.gguf"
    done = type_in(
        *("export", out, "--adapter", tiny_adapter, "--merge", "--gguf", gguf, "--json", "-")
    )
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert 0 < told["merge_error"] < 5e-4
    assert f"merged; error {told['merge_error']:.1e}" in done.err
    assert "16 layers" in done.err
    assert AutoModelForCausalLM.from_pretrained(out)
    assert read_gguf(gguf)[0]["general.type"] == "adapter"
    again = type_in("export", out, "--adapter", tiny_adapter)
    assert again.code == 1
    assert "not empty" in again.err
    assert type_in("export", out, "--adapter", tiny_adapter, "--force").code == 0
    assert read_folder(out)


# Wrong


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ask", "adapter"), "Missing argument"),
        (("ask", "adapter", " "), "nothing to ask"),
        (("ask", "adapter", "x", "--context", "a", "--context-file", __file__), "not both"),
        (("ask", "adapter", "x", "--context-file", "/nowhere"), "does not exist"),
        (("ask", "adapter", "\udcff"), "not UTF-8 text"),
        (("ask", "adapter", "x", "--context", "\udcff"), "not UTF-8 text"),
        (("ask", "adapter", "x", "--max-new-tokens", "0"), "max-new-tokens"),
        (("ask", "adapter", "x", "--temperature", "-1"), "temperature"),
        (("export",), "name a folder"),
        (("export", "--merge", "--gguf", "x"), "needs a folder"),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else value.replace(" ", "-"),
)
def test_wrong_usage_exits_with_2(type_in: Type, arguments: tuple[str, ...], says: str) -> None:
    done = type_in(*arguments)
    assert done.code == 2
    assert says in unboxed(done)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ask", "nowhere", "Where?"), "nowhere is no adapter folder: there is no such folder"),
        (("chat", "nowhere"), "nowhere is no adapter folder: there is no such folder"),
        (("export", "out", "--adapter", "nowhere"), "no adapter folder"),
        (("ask", "adapter", "Where?", "--base", "./none"), "there is no folder './none'"),
        (("ask", "adapter", "Where?", "--device", "tpu"), "'device'"),
        (("ask", "foreign", "Where?", "--base", "embedded:tiny"), "for another base"),
        (("ask", "foreign", "Where?"), "name it with --base"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_used_is_one_sentence(
    type_in: Type,
    tiny_adapter: Path,
    make_adapter_folder,
    random_base: LoadedBase,
    tmp_path: Path,
    monkeypatch,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    make_adapter_folder(tmp_path / "foreign", random_base.description, foreign=True)
    monkeypatch.chdir(tmp_path)
    done = type_in(*arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[-1].startswith("Error: ")
    assert says in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\nsys.argv = ['sheepfold-agent', 'ask', '--help']\n"
        "from edge_agent import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'gguf', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"

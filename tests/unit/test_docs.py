"""What README and docs/ say is true: commands, options, settings, links, names, tables, samples."""

import importlib
import importlib.util
import re
import shlex
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from aggregator_server.cli import app as server_cli
from aggregator_server.config import ServerConfig, ServerSection
from aggregator_server.federation import Federation, open_federation
from aggregator_server.founding import found_federation
from aggregator_server.metrics import Metrics
from aggregator_server.recipes import RecipeOptions, make_config
from edge_agent.cli import app as agent_cli
from edge_agent.config import AgentSettings
from protocol.base_description import BaseDescription, LinearModule
from protocol.blocks import BaseBlock
from protocol.clock import SystemClock
from simulations.cli import app as sim_cli
from simulations.population import PopulationFile

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = (REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted(DOCS.rglob("*.md")))
APPS = {"sheepfold-agent": agent_cli, "sheepfold-server": server_cli, "sheepfold-sim": sim_cli}
PACKAGES = ("protocol", "privacy", "quant", "edge_agent", "aggregator_server", "simulations")

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_CODE_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_ENDS_COMMAND = {">", ">>", "|", "&", "&&", ";"}


@dataclass(frozen=True)
class Fence:
    language: str
    text: str


def text_of(page: Path) -> str:
    return re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def fences(page: Path, language: str) -> list[str]:
    found = _FENCE.finditer(text_of(page))
    return [match["text"] for match in found if match["language"] == language]


def spans(page: Path) -> list[str]:
    return _CODE_SPAN.findall(_FENCE.sub("", text_of(page)))


def shell_lines(page: Path) -> Iterator[list[str]]:
    """Each command of a bash fence as words, up to a pipe or a redirection."""
    for text in fences(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            end = next((i for i, word in enumerate(words) if word in _ENDS_COMMAND), len(words))
            if words:
                yield [words[0].removeprefix(".venv/bin/"), *words[1:end]]


@cache
def command_tree(program: str) -> Any:
    return typer.main.get_command(APPS[program])


def walk(program: str, words: list[str]) -> tuple[Any, list[str]]:
    """The innermost command that the words name, and what is left of them."""
    command = command_tree(program)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words[0]]
        words = words[1:]
    return command, words


def options_of(command: Any) -> set[str]:
    own = {name for parameter in command.params for name in parameter.opts if name[:2] == "--"}
    return {"--help"}.union(own, *map(options_of, getattr(command, "commands", {}).values()))


def table_rows(page: Path, head: str) -> list[list[str]]:
    """The cells of every table whose header row begins with `head`."""
    rows: list[list[str]] = []
    inside = False
    for line in text_of(page).splitlines():
        inside = line.startswith(head) or (inside and line.startswith("|"))
        if inside and not line.startswith((head, "| ---")):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


# Commands


def test_commands_in_code_blocks_parse() -> None:
    named = set()
    for page in PAGES:
        for program, *words in shell_lines(page):
            if program not in APPS:
                continue
            named.add(program)
            command, rest = walk(program, words)
            try:
                command.make_context(program, rest)
            except Exception as error:  # noqa: BLE001 - whatever it is, name the page and the line
                pytest.fail(f"{page.name}: {program} {shlex.join(words)}: {error!r}")
            assert not hasattr(command, "commands"), f"{page.name}: {program} {words} does nothing"
    assert named == set(APPS)


def test_commands_in_sentences_exist_with_their_options() -> None:
    quoted = [span for page in PAGES for span in spans(page) if span.split()[0] in APPS]
    for span in quoted:
        program, *words = span.split()
        command, rest = walk(program, words)
        is_group = hasattr(command, "commands")
        assert not (is_group and rest and not rest[0].startswith("-")), f"{span}: no such command"
        assert {word for word in rest if word.startswith("--")} <= options_of(command), span
    assert quoted


def test_options_in_sentences_belong_to_some_command() -> None:
    known = set().union(*(options_of(command_tree(program)) for program in APPS))
    quoted = {span.split()[0] for page in PAGES for span in spans(page) if span.startswith("--")}
    assert quoted - known == set()
    assert quoted


def test_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    lines = [
        words
        for page in PAGES
        for words in (*shell_lines(page), *(span.split() for span in spans(page)))
    ]
    quoted = {words[1] for words in lines if words[0] == "make" and words[1:]}
    assert quoted - targets == set()
    assert quoted


# Settings


def test_environment_variables_are_settings() -> None:
    agent = {f"SHEEPFOLD_AGENT_{key.upper()}" for key in (*AgentSettings.model_fields, "home")}
    server = {f"SHEEPFOLD_SERVER_{key.upper()}" for key in ServerSection.model_fields}
    pattern = re.compile(r"SHEEPFOLD_(?:AGENT|SERVER)_[A-Z_]+[A-Z]")
    quoted = {name for page in PAGES for name in pattern.findall(text_of(page))}
    assert quoted - agent - server == set()
    assert agent <= quoted  # the volunteer's page names all of them


def _mode(kind: type[BaseModel]) -> object:
    return kind.model_fields["mode"].default


def test_toml_blocks_hold_known_keys() -> None:
    blocks = [tomllib.loads(text) for page in PAGES for text in fences(page, "toml")]
    for tree in blocks:
        if "device" in tree:
            PopulationFile.model_validate(tree)
            continue
        if not any(isinstance(value, dict) for value in tree.values()):
            AgentSettings(**tree)
            continue
        for section, values in tree.items():
            model = ServerConfig.model_fields[section].annotation
            if section == "masking":  # one block for each mode
                model = next(kind for kind in get_args(model) if _mode(kind) == values["mode"])
            assert isinstance(model, type)
            assert issubclass(model, BaseModel)
            assert set(values) - set(model.model_fields) == set(), section
    assert blocks


# Links and names


def test_links_to_files_lead_somewhere() -> None:
    links = [
        (page, target.partition("#")[0])
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", text_of(page)))
        if "://" not in target
    ]
    assert [(page.name, to) for page, to in links if to and not (page.parent / to).exists()] == []
    assert links


def test_every_page_is_in_the_navigation() -> None:
    navigation = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)}
    assert pages - set(re.findall(r"\S+\.md$", navigation, re.MULTILINE)) == set()
    assert pages


def test_dotted_names_of_the_packages_exist() -> None:
    pattern = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+")
    quoted = {span for page in PAGES for span in spans(page) if pattern.fullmatch(span)}
    for name in quoted:
        resolve(name)
    assert quoted


def resolve(name: str) -> object:
    """Import as much of a dotted name as is a module; the rest are attributes."""
    head, *rest = name.split(".")
    found: Any = importlib.import_module(head)
    for part in rest:
        if isinstance(found, ModuleType) and not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


# Tables


def test_tables_of_the_protocol_page_are_those_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- table: {name} -->" in page for name in script.tables())
    assert script.filled(page) == page, "run: python docs/tables.py"


def make_description() -> BaseDescription:
    block = BaseBlock(
        model="made-up", source_dtype="float32", fingerprint=b"f" * 32, tokenizer_digest=b"t" * 32
    )
    return BaseDescription(
        base=block,
        architecture="LlamaForCausalLM",
        n_parameters=4096,
        max_positions=512,
        has_chat_template=False,
        linear_modules=(LinearModule(name="model.layers.0.q_proj", d_out=64, d_in=64),),
    )


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    base = make_description()
    config = make_config(RecipeOptions(name="Docs"), base)
    found_federation(tmp_path / "fed", config=config, base=base, clock=SystemClock())
    opened = open_federation(tmp_path / "fed", environment={})
    yield opened
    opened.close()


def test_routes_of_the_protocol_page_are_those_of_the_server(federation: Federation) -> None:
    from aggregator_server.app import create_app

    documented = set()
    for method, path, *_ in table_rows(DOCS / "protocol.md", "| method | path |"):
        documented.add((method, _CODE_SPAN.findall(path)[0]))
    prefix = "/v1/federations/{federation}"
    served = {
        (method.upper(), path.removeprefix(prefix))
        for path, methods in create_app(federation).openapi()["paths"].items()
        for method in methods
    }
    assert documented == served


def test_metrics_in_the_operators_table_are_those_of_the_server(federation: Federation) -> None:
    rendered = Metrics().render(federation.status()).decode()
    served = set(re.findall(r"^# TYPE (sheepfold_\w+) ", rendered, re.MULTILINE))
    rows = table_rows(DOCS / "quickstart-operator.md", "| metric |")
    assert {name for row in rows for name in _CODE_SPAN.findall(row[0])} == {
        name for name in served if not name.endswith("_created")
    }


def test_json_fields_in_the_researchers_table_are_those_of_the_demo(
    federation: Federation, tmp_path: Path
) -> None:
    from simulations.demo import DemoFolder, DemoRecipe, DemoResult
    from simulations.demo_report import as_json
    from simulations.measuring import Measurement
    from simulations.yardsticks import ModelScore, SeedScore

    seed = SeedScore(exact_match={"open_qa": 0.5}, loss={"open_qa": 1.0}, answers=("It is red.",))
    measured = Measurement(name="base", score=ModelScore(seeds=(seed, seed)))
    result = DemoResult(
        recipe=DemoRecipe(),
        base=measured,
        local=(measured,),
        federated=measured,
        centralised=measured,
        losses=(1.0,),
        held_out=(),
        bytes_up_per_agent=1,
        bytes_down_per_agent=1,
        wall_s=1.0,
        folder=DemoFolder(root=tmp_path),
        manifest=federation.charter.manifest,
    )
    rows = table_rows(DOCS / "quickstart-researcher.md", "| field |")
    documented = {name for row in rows for name in _CODE_SPAN.findall(row[0])}
    assert documented == set(as_json(result))


# Samples


def test_python_samples_compile() -> None:
    samples = [(page.name, text) for page in PAGES for text in fences(page, "python")]
    for name, text in samples:
        compile(text, name, "exec")
    assert samples


def test_researchers_samples_run(
    random_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As printed, but for the base: a random one, so that nothing depends on what it can say.
    monkeypatch.setattr("quant.base_model.tiny_base_path", lambda: random_base_dir)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names: dict[str, Any] = {"__name__": "sample"}
    for text in fences(DOCS / "quickstart-researcher.md", "python"):
        exec(compile(text, "quickstart-researcher.md", "exec"), names)
    assert [signed.body.aggregation.n_agents for signed in names["signed_releases"]] == [0, 3, 3]
    assert (names["folder"] / "adapter" / "adapter_model.safetensors").is_file()

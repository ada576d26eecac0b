"""`sheepfold-agent ask`, `chat` and `export`: what a finished adapter is good for."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Final

import typer

from edge_agent.cli_shared import (
    DeviceOption,
    HomeOption,
    JsonOption,
    ThreadsOption,
    opened,
    say,
    write_json,
)
from edge_agent.config import AgentSettings, default_home, load_settings
from edge_agent.plain_text import plain, shown
from protocol.clock import SystemClock

if TYPE_CHECKING:
    from edge_agent.answering import Answer, Answerer, Sampling
    from protocol.blocks import Template
    from quant.peft_folder import FinishedAdapter

NEWEST: Final = "newest"
"""In place of a folder: the newest release of the federation that was joined."""

_PATIENCE_S: Final = 30.0
_GB: Final = 1_000_000_000
_RESET: Final = "/reset"

AdapterArgument = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="A PEFT folder, or `newest`: the newest release of the federation you joined. "
        "(A folder of that name is `./newest`.)",
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(help="Folder or hub id of the base model; default: the one the adapter names."),
]
TokensOption = Annotated[
    int, typer.Option("--max-new-tokens", help="Cut an answer after so many tokens.", min=1)
]
TemperatureOption = Annotated[
    float, typer.Option(help="0: always the likeliest token; above: draw.", min=0.0, max=100.0)
]
SeedOption = Annotated[int, typer.Option(help="Of the draws.", min=0, max=2**32)]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the agent's."""
    for command in (ask, chat, export):
        app.command()(command)


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A model that can be asked."""

    answerer: "Answerer"
    adapter: "FinishedAdapter"
    template: "Template"
    template_known: bool


def ask(
    adapter: AdapterArgument,
    instruction: Annotated[str, typer.Argument(help="What to ask.")],
    *,
    context: Annotated[str, typer.Option(help="The text it is asked about.")] = "",
    context_file: Annotated[
        Path | None, typer.Option(help="A UTF-8 file with that text.", exists=True, dir_okay=False)
    ] = None,
    base: BaseOption = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    home: HomeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Ask a finished adapter one question; the answer is on standard output.

    Example: `sheepfold-agent ask my-adapter "What is a sheepfold?"`
    """
    if not instruction.strip():
        raise typer.BadParameter("there is nothing to ask", param_hint="INSTRUCTION")
    for hint, text in (("INSTRUCTION", instruction), ("--context", context)):
        if any("\ud800" <= sign <= "\udfff" for sign in text):  # how Python keeps other bytes
            raise typer.BadParameter("it is not UTF-8 text", param_hint=hint)
    if context and context_file is not None:
        raise typer.BadParameter("give --context or --context-file, not both")
    if context_file is not None:
        context = _read_text(context_file)
    from edge_agent.answering import Sampling, single_question

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    ready = prepare(adapter, home, base=base, device=device, threads=threads)
    quiet = json_path == "-"
    answer = ready.answerer.answer(
        single_question(instruction, context),
        sampling,
        on_text=(lambda _: None) if quiet else _print_text,
    )
    if not quiet:
        _print_text("\n")
    _tell_ending(answer)
    if json_path is not None:
        write_json(json_path, _as_json(answer, ready, sampling))


def chat(
    adapter: AdapterArgument,
    *,
    base: BaseOption = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    home: HomeOption = None,
) -> None:
    """Talk with a finished adapter, one line at a time; Ctrl-D ends, `/reset` begins anew.

    Example: `sheepfold-agent chat newest`
    """
    from edge_agent.answering import Conversation, Sampling
    from edge_agent.errors import EvaluationError, MalformedRecordError, OutOfMemoryError

    ready = prepare(adapter, home, base=base, device=device, threads=threads)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    conversation = Conversation(ready.answerer, ready.template)
    if not conversation.remembers:
        say("This template has no turns: each question is asked by itself.")
    for line in _lines():
        if line == _RESET:
            conversation.reset()
            say("Forgotten." if conversation.remembers else "There is nothing to forget.")
            continue
        before = conversation.n_remembered
        try:
            answer = conversation.say(line, sampling, on_text=_print_text)
        except (EvaluationError, MalformedRecordError, OutOfMemoryError) as error:
            say(str(error))
            continue
        _print_text("\n")
        _tell_ending(answer)
        if conversation.remembers and conversation.n_remembered <= before:
            say("The oldest questions were forgotten: the model has no room for them.")


def export(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Where the PEFT folder goes, or with --merge the whole model."),
    ] = None,
    *,
    adapter: Annotated[
        str, typer.Option(metavar="ADAPTER", help="A PEFT folder, or `newest`.")
    ] = NEWEST,
    merged: Annotated[
        bool,
        typer.Option("--merge", help="Write base and adapter as one float16 model instead."),
    ] = False,
    gguf: Annotated[
        Path | None, typer.Option(help="Write the adapter for llama.cpp into this file as well.")
    ] = None,
    base: BaseOption = None,
    threads: ThreadsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    home: HomeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Write the newest adapter as a folder that stock peft loads, merged, or for llama.cpp.

    Example: `sheepfold-agent export my-adapter --gguf my-adapter.gguf`
    """
    if folder is None and gguf is None:
        raise typer.BadParameter("name a folder, or a file with --gguf", param_hint="FOLDER")
    if merged and folder is None:
        raise typer.BadParameter("--merge needs a folder", param_hint="FOLDER")
    with _finished(adapter, home, threads=threads) as (finished, settings):
        from edge_agent.exporting import export_adapter

        done = export_adapter(
            finished,
            folder=folder,
            merged=merged,
            gguf=gguf,
            base=base or (settings.base if adapter == NEWEST else None),
            force=force,
            say=say,
        )
        release = None if finished.provenance is None else finished.provenance.release
    what = "The adapter" if release is None else f"Release {release}"
    if done.folder is not None:
        told = "" if done.merge_error is None else f", merged; error {done.merge_error:.1e}"
        say(f"{what} is in {done.folder}{told}")
    if done.gguf is not None:
        say(f"{what} is in {done.gguf}, {done.n_gguf_layers} layers")
    if json_path is not None:
        found = {
            "folder": None if done.folder is None else str(done.folder),
            "gguf": None if done.gguf is None else str(done.gguf),
            "release": release,
            "merged": merged,
            "merge_error": done.merge_error,
        }
        write_json(json_path, found)


@contextmanager
def _finished(
    adapter: str, home: Path | None, *, device: str | None = None, threads: int | None = None
) -> Iterator[tuple["FinishedAdapter", AgentSettings]]:
    """The adapter that the word or folder names; its folder lasts as long as the context."""
    flags = {"device": device, "threads": threads}
    if adapter != NEWEST:
        settings = load_settings(home or default_home(), flags)
        _set_threads(settings)
        from quant.peft_folder import read_finished

        yield read_finished(Path(adapter).expanduser()), settings
        return
    from edge_agent.newest import connect, joined, newest_release

    with opened(home) as (agent_home, journal), TemporaryDirectory() as temporary:
        settings = load_settings(agent_home.root, flags)
        transport = connect(
            agent_home, joined(journal), clock=SystemClock(), patience_s=_PATIENCE_S
        )
        try:
            newest = newest_release(agent_home, journal, transport)
        finally:
            if transport is not None:
                transport.close()
        if newest.note:
            say(f"Release {newest.release.number} is used; {newest.note}")
        folder = Path(temporary) / f"release-{newest.release.number}"
        newest.write(folder)
        _set_threads(settings)
        from quant.peft_folder import read_finished

        yield read_finished(folder), settings


def _set_threads(settings: AgentSettings) -> None:
    if settings.threads is not None:
        from quant.base_model import set_threads

        set_threads(settings.threads)


def prepare(
    adapter: str,
    home: Path | None,
    *,
    base: str | None,
    device: str | None,
    threads: int | None,
) -> Ready:
    """Load the adapter that a word or folder names, on its base.

    Args:
        adapter: As `AdapterArgument`.
        home: Of the federation, for `newest`.
        base: A folder or hub id in place of the named base.
        device: None: the first GPU, or the CPU.
        threads: Of the CPU; None: as many as torch likes.

    Raises:
        QuantError: Adapter or base cannot be used.
        AgentError: The newest release cannot be had.
    """
    with _finished(adapter, home, device=device, threads=threads) as (finished, settings):
        from edge_agent.answering import Answerer, load_base_of, template_of
        from quant.base_model import limit_device_memory, parse_device

        template, known = template_of(finished)
        if not known:
            say("This adapter does not say how it was trained; it is asked with Alpaca's prompt.")
        place = None if settings.device is None else parse_device(settings.device)
        own = settings.base if adapter == NEWEST else None
        source = base or own
        say(f"Loading {source or finished.base_model} in NF4 …")
        loaded = load_base_of(finished, source, device=place)
        if settings.max_vram_gb is not None:
            limit_device_memory(int(settings.max_vram_gb * _GB), loaded.device)
        answerer = Answerer(loaded, finished, template)
        return Ready(answerer=answerer, adapter=finished, template=template, template_known=known)


def _lines() -> Iterator[str]:
    """What is typed, line by line, without blank ones; Ctrl-D ends it."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a line that is not UTF-8 ends no conversation
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _print_text(text: str) -> None:
    sys.stdout.write(shown(text) if _is_terminal() else text)
    sys.stdout.flush()


def _tell_ending(answer: "Answer") -> None:
    from edge_agent.answering import Ending

    if answer.prompt_was_cut:
        say("The question was too long for this model, and lost its end.")
    if answer.ending is Ending.LENGTH:
        say(f"(cut after {answer.n_new_tokens} tokens: --max-new-tokens)")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{plain(str(path))} is not UTF-8 text") from None


def _as_json(answer: "Answer", ready: Ready, sampling: "Sampling") -> dict[str, object]:
    told = ready.adapter.provenance
    return {
        "answer": answer.text,
        "ending": answer.ending.value,
        "n_prompt_tokens": answer.n_prompt_tokens,
        "n_new_tokens": answer.n_new_tokens,
        "prompt_was_cut": answer.prompt_was_cut,
        "template": ready.template.value,
        "template_known": ready.template_known,
        "base": ready.adapter.base_model,
        "federation": None if told is None else told.name,
        "release": None if told is None else told.release,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
    }

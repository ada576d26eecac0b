"""`sheepfold-agent`: what a volunteer types."""

import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from edge_agent import cli_adapter, cli_evaluate, cli_privacy
from edge_agent.cli_shared import (
    DeviceOption,
    HomeOption,
    JsonOption,
    ThreadsOption,
    console,
    opened,
    write_json,
)
from edge_agent.config import AgentSettings, default_home, load_settings, save_settings
from edge_agent.data.records import OnMalformed
from edge_agent.errors import AgentError, JournalError, TransportError
from edge_agent.home import AgentHome
from edge_agent.plain_text import escaped
from privacy.errors import PrivacyError
from protocol.clock import SystemClock
from protocol.errors import ProtocolError
from quant.errors import QuantError
from quant.quiet import quiet_libraries

if TYPE_CHECKING:
    from edge_agent.membership import Offer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Lend your GPU to a federation that trains on your data without taking it.

Your records never leave this machine; what does, `join` tells before it asks.

**First time:** `sheepfold-agent join https://server --data my-records.jsonl --invite CODE`

**After a reboot:** `sheepfold-agent run`
""",
)
_JOIN_PATIENCE_S: Final = 30.0
_MB: Final = 1_000_000
_N_REASONS_SHOWN: Final = 3

BaseOption = Annotated[
    str | None,
    typer.Option(help="Folder with the base model; default: fetch the one the federation names."),
]
VramOption = Annotated[
    float | None, typer.Option("--max-vram", help="Most GPU memory to use, in GB.", min=0.1)
]
HoursOption = Annotated[
    str | None, typer.Option(help="Hours of the day to train in, such as `22-07`.")
]
MalformedOption = Annotated[
    OnMalformed | None, typer.Option(help="What to do with a record that cannot be used.")
]
RankOption = Annotated[
    int | None,
    typer.Option(
        help="Rank rows to train, where the federation lets you choose; default: all that fit.",
        min=1,
    ),
]
LeaveOutOption = Annotated[
    list[str] | None,
    typer.Option(help="A module not to train, of those that may be left out; may be repeated."),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Agree without being asked.")]


def main() -> None:
    """Run the command line; errors of ours are one sentence and exit code 1."""
    quiet_libraries()
    try:
        app()
    except (AgentError, QuantError, ProtocolError, PrivacyError, OSError) as error:
        console.print(f"[bold red]Error:[/] {escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(1)


@app.command()
def join(
    url: Annotated[str, typer.Argument(help="The server, such as `https://example.org`.")],
    data: Annotated[str, typer.Option(help="Your records: JSON, JSONL, CSV, Parquet, hub:ID.")],
    *,
    invite: Annotated[str | None, typer.Option(help="The code that you were given.")] = None,
    home: HomeOption = None,
    yes: YesOption = False,
    no_run: Annotated[bool, typer.Option("--no-run", help="Join, but do not train yet.")] = False,
    until_finished: Annotated[
        bool, typer.Option("--until-finished", help="End with the federation's last release.")
    ] = False,
    base: BaseOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    max_vram: VramOption = None,
    hours: HoursOption = None,
    on_malformed: MalformedOption = None,
    rank: RankOption = None,
    leave_out: LeaveOutOption = None,
) -> None:
    """Join a federation: shows what will leave this machine, asks, enrols, and trains.

    Example: `sheepfold-agent join https://example.org --data notes.jsonl --invite sheepfold1-…`
    """
    from edge_agent import membership

    agent_home = AgentHome(home or default_home())
    flags = {
        "base": base,
        "device": device,
        "threads": threads,
        "max_vram_gb": max_vram,
        "hours": hours,
        "on_malformed": on_malformed,
        "rank": rank,
        "leave_out": tuple(leave_out) if leave_out else None,
    }
    settings = load_settings(agent_home.root, flags)
    console.print(f"Looking at {escaped(url)} …", highlight=False)
    offer = membership.look(
        url, invite, data, settings, clock=SystemClock(), patience_s=_JOIN_PATIENCE_S
    )
    _show_offer(offer)
    if not yes and not typer.confirm("Join this federation?", default=False, err=True):
        console.print("Nothing was sent, nothing was kept.")
        raise typer.Exit(1)
    membership.enrol(offer, agent_home, clock=SystemClock(), patience_s=_JOIN_PATIENCE_S)
    save_settings(agent_home.root, settings)
    console.print(f"Joined. Key and journal are in {agent_home.root}", highlight=False)
    cli_privacy.agree(offer.manifest, settings)
    if no_run:
        console.print("Start training with `sheepfold-agent run`.")
        return
    _work(agent_home, settings, until_finished=until_finished)


def _show_offer(offer: "Offer") -> None:
    manifest, disclosure = offer.manifest, offer.disclosure
    lines = [
        f"[bold]{escaped(manifest.name)}[/]",
        *([escaped(manifest.description)] if manifest.description else []),
        f"Base model: {escaped(manifest.base.model)}; {manifest.rounds.n_rounds} rounds",
        *_data_lines(offer),
        "",
        "[bold]What leaves this machine[/]",
        *(f"• {escaped(line)}" for line in disclosure.what_leaves),
        "",
        "[bold]Who is contacted[/]",
        *(f"• {escaped(line)}" for line in disclosure.hosts),
        "",
        "[bold]What is not promised[/]",
        *(f"• {escaped(line)}" for line in disclosure.warnings),
    ]
    console.print(Panel("\n".join(lines), title="Before you join", highlight=False))


def _data_lines(offer: "Offer") -> list[str]:
    source = escaped(offer.data)
    report = offer.report
    if report is None:
        return [f"Your data: {source}, fetched and counted once you agree"]
    lines = [f"Your data: {report.n_records} records from {source}"]
    if report.n_malformed:
        lines[0] += f" ({report.n_malformed} cannot be used)"
    shown = report.malformed[:_N_REASONS_SHOWN]
    return lines + [escaped(f"  {item.location}: {item.reason}") for item in shown]


@app.command()
def run(
    *,
    home: HomeOption = None,
    data: Annotated[str | None, typer.Option(help="Use other records from now on.")] = None,
    until_finished: Annotated[
        bool, typer.Option("--until-finished", help="End with the federation's last release.")
    ] = False,
    base: BaseOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    max_vram: VramOption = None,
    hours: HoursOption = None,
    on_malformed: MalformedOption = None,
    rank: RankOption = None,
    leave_out: LeaveOutOption = None,
) -> None:
    """Take part in the federation that was joined, until Ctrl-C. Goes on where it was."""
    agent_home = AgentHome(home or default_home())
    flags = {
        "base": base,
        "device": device,
        "threads": threads,
        "max_vram_gb": max_vram,
        "hours": hours,
        "on_malformed": on_malformed,
        "rank": rank,
        "leave_out": tuple(leave_out) if leave_out else None,
    }
    settings = load_settings(agent_home.root, flags)
    if data is not None:
        from edge_agent.membership import absolute_source

        with opened(home) as (_, journal):
            journal.set_data(absolute_source(data))
    _work(agent_home, settings, until_finished=until_finished)


def _work(agent_home: AgentHome, settings: AgentSettings, *, until_finished: bool) -> None:
    with opened(agent_home.root) as (_, journal):
        # Now: who has not joined is told so without waiting for torch.
        from edge_agent.display import Display
        from edge_agent.worker import prepare

        with Display(console) as display:
            worker = prepare(
                agent_home, journal, settings, clock=SystemClock(), on_event=display.show
            )

            def stop(number: int, _: object) -> None:
                worker.wishes.stop()
                signal.signal(number, signal.default_int_handler)  # the second one does not wait

            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop)
            with worker:
                worker.agent.run(until_finished=until_finished)


@app.command()
def status(*, home: HomeOption = None, json_path: JsonOption = None) -> None:
    """What the agent is doing, and what it has done."""
    from edge_agent import membership

    with opened(home) as (agent_home, journal):
        found = membership.describe(agent_home, journal, clock=SystemClock())
    if json_path is not None:
        write_json(json_path, found)
        return
    table = Table(show_header=False, box=None)
    for key, value in found.items():
        text = str(value)
        if isinstance(value, dict):
            text = "; ".join(f"{name.replace('_', ' ')} {what}" for name, what in value.items())
        table.add_row(f"[bold]{key.replace('_', ' ')}[/]", escaped(text))
    Console().print(table)


@app.command()
def pause(*, home: HomeOption = None) -> None:
    """Pause at the next micro-batch; nothing is lost."""
    with opened(home) as (_, journal):
        journal.set_paused(paused=True)
    console.print("Paused. `sheepfold-agent resume` continues.")


@app.command()
def resume(*, home: HomeOption = None) -> None:
    """Continue after a pause."""
    with opened(home) as (_, journal):
        journal.set_paused(paused=False)
    console.print("Resumed.")


@app.command()
def sent(*, home: HomeOption = None, json_path: JsonOption = None) -> None:
    """Everything that left this machine: when, what, where to, how many bytes, digest."""
    with opened(home) as (_, journal):
        items = journal.sent()
    if json_path is not None:
        write_json(json_path, [{**asdict(item), "sha256": item.sha256.hex()} for item in items])
        return
    table = Table("when (UTC)", "what", "round", "bytes", "to", "SHA-256")
    for item in items:
        table.add_row(
            datetime.fromtimestamp(item.at, tz=UTC).strftime("%Y-%m-%d %H:%M:%S"),
            item.what,
            "" if item.round is None else str(item.round),
            f"{item.n_bytes:,}",
            item.host,
            item.sha256.hex()[:16] + "…",
        )
    output = Console()
    output.print(table)
    total = sum(item.n_bytes for item in items)
    output.print(f"{len(items)} bodies, {total / _MB:.2f} MB. Polls carry no body.")


@app.command()
def explain(*, home: HomeOption = None, json_path: JsonOption = None) -> None:
    """What the server of your federation can learn of you, what it cannot, what is not claimed."""
    from edge_agent.explaining import explain as explained

    with opened(home) as (_, journal):
        member = journal.membership()
    if member is None:
        msg = "no federation was joined here; `join` explains before it asks"
        raise JournalError(msg)
    found = explained(member.federation.body)
    if json_path is not None:
        write_json(json_path, found.as_json())
        return
    sections = (
        ("What the server can learn", found.learns),
        ("What it cannot learn", found.does_not_learn),
        ("What is not claimed", found.not_claimed),
    )
    lines = [f"[bold]{escaped(found.trust_model)}[/]", escaped(found.privacy)]
    for heading, sentences in sections:
        lines += ["", f"[bold]{heading}[/]", *(f"• {escaped(text)}" for text in sentences)]
    Console().print("\n".join(lines), highlight=False)


@app.command()
def leave(*, home: HomeOption = None, yes: YesOption = False) -> None:
    """Revoke the membership; says what cannot be recalled."""
    from edge_agent import membership

    with opened(home) as (agent_home, journal):
        n_accepted = membership.n_accepted(journal)
        console.print(
            f"{n_accepted} update(s) of yours are part of published releases. They cannot be "
            "recalled: whoever has the releases has them. From now on nothing more leaves this "
            "machine."
        )
        if not yes and not typer.confirm("Leave the federation?", default=False, err=True):
            raise typer.Exit(1)
        try:
            membership.leave(agent_home, journal, clock=SystemClock(), patience_s=_JOIN_PATIENCE_S)
        except TransportError as error:
            console.print(
                f"[yellow]The server was not told ({escaped(str(error))}); try again later. This "
                "agent no longer takes part.[/]",
                highlight=False,
            )
            raise typer.Exit(1) from None
    console.print("Left. `sheepfold-agent forget` removes key, cache and journal.")


@app.command()
def forget(*, home: HomeOption = None, yes: YesOption = False) -> None:
    """Remove key, cache and journal from this machine."""
    agent_home = AgentHome(home or default_home())
    if not agent_home.journal_path.exists() and not agent_home.key_path.exists():
        console.print(f"There is no agent in {agent_home.root}.", highlight=False)
        return
    membership = None
    with suppress(AgentError, ProtocolError), opened(home) as (_, journal):  # damaged: forget too
        membership = journal.membership()
    if membership is not None and membership.left_at is None:
        console.print("You are still a member: `sheepfold-agent leave` first tells the server.")
    question = f"Remove everything in {agent_home.root}?"
    if not yes and not typer.confirm(question, default=False, err=True):
        raise typer.Exit(1)
    agent_home.lock().release()
    for path in agent_home.forget():
        console.print(f"removed {path}", highlight=False)


cli_adapter.register(app)
cli_evaluate.register(app)
cli_privacy.register(app)


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="`embedded:tiny`, a hub id, a folder, or a `config.json`.")
    ],
    *,
    gpu: Annotated[str, typer.Option(help="Memory of the card.")] = "24GB",
    length: Annotated[int, typer.Option(help="Tokens of the longest example.", min=1)] = 512,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.", min=1, max=1024)] = 8,
    dp: Annotated[bool, typer.Option("--dp", help="With example-level privacy.")] = False,
    revision: Annotated[str | None, typer.Option(help="Commit or tag of a hub model.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Will training fit on a card? Reads the model's configuration alone, no weights.

    Example: `sheepfold-agent plan meta-llama/Llama-2-7b-hf --gpu 24GB --length 1024`
    """
    from edge_agent.plan import plan_model

    found = plan_model(model, gpu=gpu, length=length, rank=rank, private=dp, revision=revision)
    if json_path is not None:
        write_json(json_path, found.as_json())
    if json_path != "-":
        output = Console()
        output.print(escaped(found.heading()), highlight=False)
        output.print(found.table())
        output.print(f"\n{escaped(found.advice())}", highlight=False)
    if not found.fits:
        raise typer.Exit(1)


@app.command("describe-base")
def describe_base(
    model: Annotated[str, typer.Argument(help="`embedded:tiny`, a hub id, or a folder.")],
    *,
    out: Annotated[Path, typer.Option(help="Where the description goes.")] = Path("base.json"),
    revision: Annotated[str | None, typer.Option(help="Commit or tag of a hub model.")] = None,
    name: Annotated[
        str | None, typer.Option(help="The name that volunteers fetch it by, if not MODEL.")
    ] = None,
) -> None:
    """For operators: write what the server must know of a base model (it never loads it)."""
    from protocol.base_description import BaseDescription
    from protocol.wire import parse
    from quant.base_model import load_base

    console.print(f"Loading {escaped(model)} in NF4 …", highlight=False)
    description = load_base(model, revision=revision).description
    if name is not None:
        block = description.base.model_copy(update={"model": name})
        renamed = description.model_copy(update={"base": block})
        description = parse(BaseDescription, renamed.canonical())  # a copy is not checked
    out.write_bytes(description.canonical() + b"\n")
    console.print(
        f"{out}: {description.architecture}, {description.n_parameters:,} parameters, "
        f"fingerprint {description.base.fingerprint.hex()[:16]}…",
        highlight=False,
    )


@app.command("install-service")
def install_service(*, home: HomeOption = None) -> None:
    """Print a systemd user unit that runs the agent after a reboot."""
    from edge_agent.service import systemd_unit

    agent_home = AgentHome((home or default_home()).absolute())
    sys.stdout.write(systemd_unit(agent_home.root))


if __name__ == "__main__":
    main()

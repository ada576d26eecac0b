"""`sheepfold-server`: the operator's commands."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aggregator_server import cli_agents, cli_helper, cli_releases
from aggregator_server.cli_shared import (
    Directory,
    JsonPath,
    answer,
    opened,
    sentences,
    write_json,
)
from aggregator_server.private_recipes import Profile
from aggregator_server.recipes import Masking, Optimizer
from protocol.blocks import (
    CellMasking,
    EvaluatorGate,
    FilterRule,
    GateBlock,
    HelperMasking,
    LoraRule,
    MaskingBlock,
    Schedule,
    Template,
)
from protocol.guarantee import describe_privacy

if TYPE_CHECKING:
    from aggregator_server.lock import ServeLock
    from aggregator_server.web.serving import Listening

app = typer.Typer(
    name="sheepfold-server",
    help="""Run a federation: agents train one LoRA adapter together, and their data stays theirs.

    [bold]sheepfold-server init[/] fed --embedded --open-enrolment
    [bold]sheepfold-server serve[/] fed
    [bold]sheepfold-server status[/] fed
    """,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(cli_releases.app, name="releases")
app.add_typer(cli_agents.app, name="agents")
app.add_typer(cli_helper.app, name="helper")


def main() -> None:
    """Run the command line; exit 0 done, 2 wrong usage, 1 anything else with one sentence."""
    app()


@app.command()
def init(  # noqa: PLR0917 - one parameter for each option
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    base: Annotated[
        Path | None,
        typer.Option(help="base.json of `sheepfold-agent describe-base MODEL`."),
    ] = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Use the tiny base that comes with sheepfold.")
    ] = False,
    name: Annotated[str, typer.Option(help="What volunteers see.")] = "A Sheepfold federation",
    description: Annotated[str, typer.Option(help="A sentence about what is learnt.")] = "",
    rounds: Annotated[int, typer.Option(help="Rounds until it is finished.")] = 20,
    cohort: Annotated[int, typer.Option(help="Updates that close a round.")] = 5,
    min_cohort: Annotated[
        int | None, typer.Option(help="Fewest agents for a round.  [default: 5 if masked, else 2]")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 8,
    alpha: Annotated[float | None, typer.Option(help="Its scale.  [default: 2 x rank]")] = None,
    dropout: Annotated[
        float | None,
        typer.Option(help="Dropout before the adapter.  [default: 0.05; 0 with --epsilon]"),
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="Layers, as q_proj,v_proj.  [default: the paper's six, or all linear]"),
    ] = None,
    lora_rule: Annotated[
        LoraRule | None,
        typer.Option(
            help="What agents send, and what becomes of it.  [default: ffa-lora (B alone) under "
            "masks or noise, else fedit (A and B)]"
        ),
    ] = None,
    masking: Annotated[
        Masking, typer.Option(help="Secure aggregation; auto: on where 5 or more are expected.")
    ] = Masking.AUTO,
    helper: Annotated[
        Path | None, typer.Option(help="helper.json of the second operator, for helper masks.")
    ] = None,
    helper_url: Annotated[str, typer.Option(help="Where that helper answers.")] = "",
    cell: Annotated[
        int | None, typer.Option(help="Agents of a masked cell.  [default: 10, or the cohort]")
    ] = None,
    word_bits: Annotated[int, typer.Option(help="Bits of a masked value: 16 or 32.")] = 16,
    ready_delay_s: Annotated[
        float, typer.Option(help="Longest random wait before a masked update is announced.")
    ] = 10.0,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Differential privacy over all rounds; see --profile."),
    ] = None,
    delta: Annotated[
        float, typer.Option(help="With --epsilon; well below 1 / records, or 1 / agents.")
    ] = 1e-5,
    profile: Annotated[
        Profile,
        typer.Option(
            help="P1: each example, by DP-SGD on the agents. P2: each agent, from the server too, "
            "by noise under masks. P3: each agent, from the public, by noise on the server."
        ),
    ] = Profile.EXAMPLE,
    clip_norm: Annotated[
        float | None,
        typer.Option(
            help="Largest norm of an example's gradient (P1), or of an update.  [default: 1 for "
            "P1, else by learning rate, steps and size]"
        ),
    ] = None,
    adaptive_clip: Annotated[
        bool, typer.Option("--adaptive-clip", help="P3: let it follow the updates' norms.")
    ] = False,
    filtering: Annotated[
        FilterRule | None,
        typer.Option(
            "--filter",
            help="robust: cut updates, or means of cells, to the median norm, and remove what is "
            "hostile on evidence.  [default: robust where 8 or more are expected, else none]",
            show_default=False,
        ),
    ] = None,
    evaluator: Annotated[
        str | None,
        typer.Option(
            help="Identity of the agent that must let a release pass (`sheepfold-agent identity`)."
        ),
    ] = None,
    optimizer: Annotated[
        Optimizer, typer.Option(help="What becomes of the mean update, at its usual settings.")
    ] = Optimizer.FEDAVG,
    template: Annotated[
        Template, typer.Option(help="How a record becomes a prompt.")
    ] = Template.ALPACA,
    max_length: Annotated[int, typer.Option(help="Longest record in tokens.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Records for each optimiser step.")] = 32,
    local_steps: Annotated[int | None, typer.Option(help="Steps in each round.")] = None,
    local_epochs: Annotated[
        int | None, typer.Option(help="Or passes over the data.  [default: 1]")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 1.5e-4,
    schedule: Annotated[
        Schedule, typer.Option(help="Of the learning rate, over all rounds.")
    ] = Schedule.COSINE,
    deadline_s: Annotated[float, typer.Option(help="Seconds until a round closes.")] = 86400.0,
    open_enrolment: Annotated[
        bool, typer.Option("--open-enrolment", help="Let anyone join, without an invite.")
    ] = False,
    database_url: Annotated[
        str,
        typer.Option(
            envvar="SHEEPFOLD_SERVER_DATABASE_URL",
            help="postgresql://user@host/name.  [default: SQLite in DIR]",
            show_default=False,
        ),
    ] = "",
    blobs_url: Annotated[
        str,
        typer.Option(
            envvar="SHEEPFOLD_SERVER_BLOBS_URL",
            help="An fsspec URL, as s3://bucket/name.  [default: a folder in DIR]",
            show_default=False,
        ),
    ] = "",
    json_path: JsonPath = None,
) -> None:
    """Found a federation: keys, release 0 and a commented federation.toml.

    A password in a URL is not written: keep it in the environment.

    Examples:
    sheepfold-server init fed --embedded --open-enrolment --rounds 5

    sheepfold-server init fed --base base.json --name "Notes" --cohort 10 --lora-rule ffa-lora

    sheepfold-server init fed --embedded --database-url postgresql://sheepfold@db.internal/fed
    """
    from aggregator_server.config import secret_settings
    from aggregator_server.founding import CONFIG_NAME, found_federation, load_base
    from aggregator_server.helper.service import load_description
    from aggregator_server.private_recipes import PrivacyOptions
    from aggregator_server.recipes import OPTIMIZERS, RecipeOptions, make_config
    from protocol.clock import SystemClock
    from protocol.signing import format_fingerprint
    from protocol.wire import b64u_decode

    if base is not None and embedded:
        message = "give --base or --embedded, not both"
        raise typer.BadParameter(message)
    if word_bits not in {16, 32}:
        message = f"--word-bits is 16 or 32, not {word_bits}"
        raise typer.BadParameter(message)
    with sentences():
        described = load_base(_embedded_base() if base is None else base)
        helping = None if helper is None else load_description(helper)
        options = RecipeOptions(
            name=name,
            description=description,
            n_rounds=rounds,
            cohort_target=cohort,
            min_cohort=min_cohort,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            target_modules=_names(target_modules),
            lora_rule=lora_rule,
            masking=masking,
            helper=helping,
            helper_url=helper_url,
            cell_target=cell,
            word_bits=32 if word_bits == 32 else 16,
            ready_delay_s=ready_delay_s,
            privacy=PrivacyOptions(
                epsilon=epsilon,
                delta=delta,
                profile=profile,
                clip_norm=clip_norm,
                adaptive_clip=adaptive_clip,
            ),
            filter=filtering,
            evaluator=None if evaluator is None else b64u_decode(evaluator, n_bytes=32),
            optimizer=OPTIMIZERS[optimizer],
            template=template,
            max_length=max_length,
            batch_size=batch_size,
            local_steps=local_steps,
            local_epochs=local_epochs,
            learning_rate=learning_rate,
            schedule=schedule,
            deadline_s=deadline_s,
            open_enrolment=open_enrolment,
            database_url=database_url,
            blobs_url=blobs_url,
        )
        config = make_config(options, described)
        charter = found_federation(directory, config=config, base=described, clock=SystemClock())
    fingerprint = format_fingerprint(charter.keys.server.identity)
    n_bytes = charter.update_n_bytes
    if base is None and not embedded:
        typer.echo("No --base was given: this federation uses the tiny embedded base.", err=True)
    text = (
        f"Founded {config.federation.name!r} in {directory}, on the base {described.base.model}.\n"
        f"Each update has {n_bytes:,} bytes. The server's fingerprint is {fingerprint}.\n"
        f"Look through {directory / CONFIG_NAME}, then run: sheepfold-server serve {directory}"
    )
    secrets = secret_settings(config.server)
    if secrets:
        text += f"\nNot written, as it holds a password; set it always: {', '.join(secrets)}"
    answer(
        json_path,
        text,
        {
            "directory": str(directory),
            "federation": charter.path_id,
            "fingerprint": fingerprint,
            "update_n_bytes": n_bytes,
            "keep_in_environment": secrets,
        },
    )


@app.command()
def serve(
    directory: Directory,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes any free one.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    behind_proxy: Annotated[
        bool,
        typer.Option(
            "--behind-proxy",
            help="A proxy in front ends TLS; it must pass paths and bodies on unchanged.",
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log every request.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Serve a federation until Ctrl-C; prints one line when it is ready.

    Plain http is served on loopback only. Everywhere else give a certificate, or say that a proxy
    in front ends TLS (--behind-proxy).

    Examples:
    sheepfold-server serve fed

    sheepfold-server serve fed --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
    """
    from aggregator_server.federation import open_federation, read_settings
    from aggregator_server.lock import only_server
    from aggregator_server.logs import configure_logs
    from aggregator_server.web.serving import run

    flags = {
        "host": host,
        "port": port,
        "tls_cert": None if tls_cert is None else str(tls_cert),
        "tls_key": None if tls_key is None else str(tls_key),
        "behind_proxy": behind_proxy or None,
    }
    with sentences():
        configure_logs(read_settings(directory, flags=flags).log_format, verbose=verbose)
        with only_server(directory) as lock:
            federation = open_federation(directory, flags=flags, may_edit=True)
            try:
                run(federation, on_ready=_announcer(json_path, lock))
            finally:
                federation.close()


@app.command()
def invite(
    directory: Directory,
    uses: Annotated[int, typer.Option(min=1, help="How many agents it lets in.")] = 1,
    json_path: JsonPath = None,
) -> None:
    """Make an invite and print the command that a volunteer runs.

    Its address is public_url, or else where the server listens now.

    Example:
    sheepfold-server invite fed --uses 10
    """
    from aggregator_server.addresses import join_address
    from aggregator_server.lock import served_at

    with opened(directory) as federation:
        address = join_address(federation.config.server, running=served_at(directory))
        made = federation.membership.invite(n_uses=uses).format()
    command = f"sheepfold-agent join {address.url or 'URL'} --data FILE --invite {made}"
    if address.note is not None:
        typer.echo(address.note, err=True)
    answer(
        json_path,
        f"{made}\n\nLets in {uses}. Hand it over privately; a volunteer runs:\n{command}",
        {"invite": made, "uses": uses, "url": address.url, "command": command},
    )


@app.command()
def status(directory: Directory, json_path: JsonPath = None) -> None:
    """Show rounds, agents and bytes.

    Example:
    sheepfold-server status fed --json -
    """
    with opened(directory) as federation:
        now = federation.status()
        manifest = federation.charter.manifest
        n_incidents = len(federation.incidents())
    last = now.round
    lines = [
        f"{now.name}: {now.n_releases_of_rounds} of {now.n_rounds} rounds done"
        + (", finished" if now.finished else ""),
        f"agents: {now.n_enrolled} enrolled, {now.n_present} present",
        f"newest release: {now.newest_release}",
        f"bytes: {now.bytes_up:,} up, {now.bytes_down:,} down",
        (
            f"privacy: {describe_privacy(manifest.privacy, n_rounds=manifest.rounds.n_rounds)}; "
            f"{_masking_line(manifest.masking)}"
        ),
        f"filter: {manifest.filter.rule.value}; gate: {_gate_line(manifest.gate)}",
    ]
    if last is not None:
        lines.append(
            f"round {last.round}: {last.phase.value}, {last.n_uploads} of {last.n_selected} updates"
            + (f", {last.n_cells_failed} of {last.n_cells} cells failed" if last.n_cells else "")
            + (f", {last.failure}" if last.failure else "")
        )
    if n_incidents:
        lines.append(f"incidents: {n_incidents}; see `sheepfold-server incidents {directory}`")
    answer(json_path, "\n".join(lines), {**now.as_json(), "n_incidents": n_incidents})


@app.command()
def incidents(directory: Directory, json_path: JsonPath = None) -> None:
    """List what the operator should know of: rounds that the evaluator stopped, and the like.

    Example:
    sheepfold-server incidents fed
    """
    from aggregator_server.listing import incidents_as_json, incidents_table

    with opened(directory) as federation:
        found = federation.incidents()
    answer(json_path, incidents_table(found), incidents_as_json(found))


def _embedded_base() -> Path:
    from quant.tiny import tiny_base_path

    return tiny_base_path() / "base.json"


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _masking_line(masking: MaskingBlock) -> str:
    if isinstance(masking, CellMasking | HelperMasking):
        by = " by a helper" if isinstance(masking, HelperMasking) else ""
        return f"masked{by} in cells of {masking.min_cell} to {masking.max_cell}"
    return "masking off"


def _gate_line(gate: GateBlock) -> str:
    if not isinstance(gate, EvaluatorGate):
        return "none"
    from protocol.signing import format_fingerprint

    return f"evaluator {format_fingerprint(gate.evaluator)}"


def _announcer(json_path: Path | None, lock: "ServeLock") -> Callable[["Listening"], None]:
    def announce(listening: "Listening") -> None:
        lock.tell(listening.url)
        if json_path is not None:
            write_json(json_path, listening.as_json())
        if json_path is None or str(json_path) != "-":
            typer.echo(listening.line())
        sys.stdout.flush()

    return announce


if __name__ == "__main__":
    main()

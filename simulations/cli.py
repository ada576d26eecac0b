"""`sheepfold-sim`: the laboratory's commands."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from aggregator_server.errors import ServerError
from aggregator_server.recipes import Masking
from edge_agent.errors import AgentError
from privacy.errors import PrivacyError
from protocol.blocks import LoraRule
from protocol.errors import ProtocolError
from protocol.guarantee import describe_privacy
from quant.errors import QuantError
from quant.quiet import quiet_libraries
from simulations import cli_audit, cli_judge, cli_partition, cli_run, cli_timetable
from simulations.cli_shared import console
from simulations.errors import SimulationError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Federations on one machine: what is studied is what is shipped.

**Begin with** `sheepfold-sim demo`: a server and five agents, from base model to adapter.
""",
)


_ERRORS = (SimulationError, AgentError, PrivacyError, QuantError, ProtocolError, ServerError)
"""Of ours: one sentence each."""


def main() -> None:
    """Run the command line; errors of ours are one sentence and exit code 1."""
    quiet_libraries()
    try:
        app()
    except _ERRORS as error:
        text = str(error).replace("[", r"\[")
        console.print(f"[bold red]Error:[/] {text}", highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(1)


@app.command()
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("sheepfold-demo"),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")] = False,
    masking: Annotated[
        Masking, typer.Option(help="Secure aggregation: cells, or off.")
    ] = Masking.CELLS,
    lora_rule: Annotated[
        LoraRule | None,
        typer.Option(
            help="What agents send, and what becomes of it.  [default: ffa-lora (B alone) if "
            "masked, else fedit (A and B)]"
        ),
    ] = None,
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="PATH", help="Write JSON here; `-` for stdout.")
    ] = None,
) -> None:
    """A real federation on this machine: a server, five agents, HTTP, 4-bit training.

    Ends with a table (base, each agent alone, the federation, all data in one place), a figure,
    and an adapter that stock peft loads. Takes a few minutes on two cores.
    """
    from simulations import demo_report
    from simulations.demo import DemoFolder, DemoRecipe, run_demo

    usual = LoraRule.FEDIT if masking is Masking.OFF else LoraRule.FFA_LORA
    recipe = DemoRecipe(lora_rule=lora_rule or usual, masking=masking)
    folder = DemoFolder.create(out, force=force)
    with demo_report.DemoDisplay(console) as display:
        result = run_demo(folder, recipe, display)
    found = demo_report.as_json(result)
    figure = out / "results.png"
    demo_report.draw(result, figure)
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    (out / "results.json").write_text(text, encoding="utf-8")
    if json_path is not None and json_path != "-":
        Path(json_path).write_text(text, encoding="utf-8")
    shown = console if json_path == "-" else Console()
    shown.print(demo_report.table(result))
    shown.print(demo_report.answers(result))
    match = found["exact_match"]
    shown.print(
        f"The federation scores {100 * match['federated']:.0f} %, the best agent alone "
        f"{100 * max(match['local']):.0f} %, all data in one place "
        f"{100 * match['centralised']:.0f} %. Each agent sent "
        f"{found['bytes_up_per_agent'] / 1e6:.2f} MB; its records stayed with it. Privacy: "
        f"{describe_privacy(result.manifest.privacy, n_rounds=result.recipe.n_rounds)}; "
        f"{'the server saw sums only' if found['masked'] else 'masking off'}. "
        f"{found['wall_s']:.0f} s.",
        highlight=False,
    )
    shown.print(f"Adapter: {folder.adapter}\nFigure:  {figure}\n", highlight=False, soft_wrap=True)
    shown.print("Try next:")
    for command in demo_report.next_commands(result):
        shown.print(f"  {command}", highlight=False, soft_wrap=True)
    if json_path == "-":
        sys.stdout.write(text)


@app.command("make-tiny-base")
def make_tiny_base(
    out: Annotated[Path, typer.Argument(help="A new folder for the base.")],
    *,
    seed: Annotated[int | None, typer.Option(help="Default: the shipped base's.")] = None,
) -> None:
    """Rebuild the embedded base: world, tokenizer, pre-training, `base.json`."""
    from simulations.tiny_base import rebuild

    report = rebuild(out, seed=seed, show=lambda text: console.print(text, highlight=False))
    console.print(report, highlight=False)


cli_audit.register(app)
cli_judge.register(app)
cli_partition.register(app)
cli_timetable.register(app)
cli_run.register(app)

if __name__ == "__main__":
    main()

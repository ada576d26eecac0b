"""`sheepfold-agent privacy`, and what `join` says of a budget."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from edge_agent.cli_shared import HomeOption, JsonOption, console, opened, write_json
from edge_agent.config import AgentSettings, load_settings
from edge_agent.errors import JournalError
from edge_agent.plain_text import escaped
from protocol.clock import SystemClock
from protocol.manifest import FederationManifest
from protocol.privacy import AgentPrivacy, ExamplePrivacy

if TYPE_CHECKING:
    from edge_agent.spending import Spending

_DEFAULT_DELTA: Final = 1e-5
_BAR: Final = 20


def register(app: typer.Typer) -> None:
    """Add the command to the agent's."""
    app.command()(privacy)


def agree(manifest: FederationManifest, settings: AgentSettings) -> None:
    """The owner has agreed to the federation's ε: it is the budget where there was none."""
    from edge_agent.charging import example_epsilon, noise_of_agents
    from edge_agent.spending import agree_budget

    asked, event = manifest.privacy, noise_of_agents(manifest)
    if isinstance(asked, ExamplePrivacy):
        epsilon = (
            asked.epsilon if settings.epsilon is None else min(asked.epsilon, settings.epsilon)
        )
    elif isinstance(asked, AgentPrivacy) and event is not None:
        n_rounds = manifest.rounds.n_rounds
        epsilon = 1.001 * example_epsilon(event, n_rounds=n_rounds, delta=asked.delta)
    else:
        return  # no noise against the server: nothing that a ledger could count
    path = settings.ledger_path
    now = SystemClock().now()
    budget, is_new = agree_budget(path, epsilon=epsilon, delta=asked.delta, now=now)
    console.print(
        f"Your privacy budget {'is now' if is_new else 'stays at'} ε = {budget.epsilon:g} at δ = "
        f"{budget.delta:g} for each record, in all federations together; it is kept in "
        f"{escaped(str(path))}. `sheepfold-agent privacy` shows and changes it.",
        highlight=False,
    )
    if is_new and isinstance(asked, AgentPrivacy):
        console.print(
            f"That is what this federation's ε = {asked.epsilon:g} for you as a whole comes to for "
            "a single record. Lower it if you mean to join others that protect records.",
            highlight=False,
        )


def privacy(
    *,
    home: HomeOption = None,
    budget: Annotated[
        float | None, typer.Option(help="Set ε for each of your records, in all federations.")
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="With --budget; well below 1 / records.  [default: as it was, or 1e-5]"),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """What your records have spent of their privacy, what is left, and for what.

    ε says how much more likely anything that is seen becomes by one of your records: by a factor of
    e^ε at most, but for a chance of about δ. Smaller is stronger.
    """
    from edge_agent.data.reading import read_records
    from edge_agent.spending import set_budget, spending

    if delta is not None and budget is None:
        message = "give --budget together with --delta"
        raise typer.BadParameter(message)
    with opened(home) as (agent_home, journal):
        member = journal.membership()
    if member is None:
        message = "no federation was joined here; begin with `sheepfold-agent join`"
        raise JournalError(message)
    settings = load_settings(agent_home.root, {})
    records, _ = read_records(member.data, on_malformed=settings.on_malformed)
    found = spending(settings.ledger_path, records)
    if budget is not None:
        kept = _DEFAULT_DELTA if found.budget is None else found.budget.delta
        set_budget(
            settings.ledger_path,
            epsilon=budget,
            delta=kept if delta is None else delta,
            now=SystemClock().now(),
        )
        found = spending(settings.ledger_path, records)
    if json_path is not None:
        write_json(json_path, found.as_json())
        return
    _show(found)


def _show(found: "Spending") -> None:
    from edge_agent.spending import ADVERSARY, UNIT

    out = Console()
    if found.budget is None:
        out.print(
            "No budget is set, so no federation with differential privacy may train on your "
            "records; `sheepfold-agent privacy --budget 8` sets one.",
            highlight=False,
        )
        return
    budget = found.budget
    out.print(
        f"Spent ε = {found.spent:.3g} of {budget.epsilon:g} at δ = {budget.delta:g}, by the record "
        f"that spent most of {found.n_records}; {found.left:.3g} is left.\n"
        f"Unit: {UNIT}. Against {ADVERSARY}. PLD accountant.",
        highlight=False,
    )
    if found.n_duplicates:
        out.print(
            f"{found.n_duplicates} records occur more than once: those are protected less.",
            highlight=False,
        )
    if not found.history:
        out.print("Nothing was trained privately yet.", highlight=False)
        return
    table = Table("when (UTC)", "federation", "round", "q", "noise", "steps", "ε then", "")
    largest = max(budget.epsilon, *(row.epsilon for row in found.history))
    for row in found.history:
        table.add_row(
            datetime.fromtimestamp(row.at, UTC).strftime("%m-%d %H:%M"),
            row.participation.federation.hex()[:8],
            str(row.participation.round),
            f"{row.event.sampling_probability:.3g}",
            f"{row.event.noise_multiplier:.3g}",
            str(row.event.n_steps),
            f"{row.epsilon:.3g}",
            "█" * max(1, round(_BAR * row.epsilon / largest)),
        )
    table.add_row("", "", "", "", "", "", f"{budget.epsilon:g}", "budget".ljust(_BAR, "·"))
    out.print(table)

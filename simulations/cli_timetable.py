"""`sheepfold-sim timetable`: how long rounds will take, before anyone is invited."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from simulations.cli_shared import console, write_json

if TYPE_CHECKING:
    from simulations.population import Population, SimulatedRound

_MINUTE_S = 60.0


def register(app: typer.Typer) -> None:
    """Add the command of this module to the laboratory's."""
    app.command()(timetable)


def timetable(
    population: Annotated[Path, typer.Argument(help="Devices, networks, hours: a TOML file.")],
    *,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the federation.")] = 20,
    cohort: Annotated[int, typer.Option(min=1, help="Updates that close a round.")] = 5,
    min_cohort: Annotated[int, typer.Option(min=1, help="Fewest updates of a round.")] = 2,
    over_selection: Annotated[float, typer.Option(help="Times the target is selected.")] = 1.3,
    deadline_s: Annotated[float, typer.Option(help="Seconds until a round closes.")] = 86400.0,
    tokens: Annotated[int, typer.Option(min=1, help="That an agent trains on in a round.")] = (
        100_000
    ),
    update_mb: Annotated[float, typer.Option(min=0.0, help="Of an update; fetched, too.")] = 71.6,
    seeds: Annotated[int, typer.Option(min=1, help="Populations and draws to try.")] = 3,
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="PATH", help="Write JSON here; `-` for stdout.")
    ] = None,
) -> None:
    """Tell how long a federation's rounds take with given volunteers; nothing is trained.

    Rounds are drawn and closed by the server's own rules, on a simulated clock. The figures are as
    good as the file that says what devices can do.
    """
    from pydantic import ValidationError

    from protocol.blocks import RoundsBlock
    from protocol.wire import explain
    from simulations.errors import PopulationError
    from simulations.population import Population, Workload, read_population, simulate

    try:
        rules = RoundsBlock(
            n_rounds=rounds,
            cohort_target=cohort,
            min_cohort=min_cohort,
            over_selection=over_selection,
            deadline_s=deadline_s,
            cap_s=deadline_s * 1.1,
        )
    except ValidationError as error:
        raise PopulationError(explain("the rounds", error)) from error
    file = read_population(population)
    n_bytes = int(update_mb * 1e6)
    work = Workload(n_tokens=tokens, down_n_bytes=n_bytes, up_n_bytes=n_bytes)
    found = []
    for seed in range(seeds):
        drawn = Population.of(file, seed=seed)
        found.append((drawn, simulate(drawn, rules, work, seed=seed)))
    told = _summary(found)
    shown = console if json_path == "-" else Console()
    shown.print(_table(told))
    if json_path is not None:
        write_json(told, json_path)


def _summary(found: "list[tuple[Population, list[SimulatedRound]]]") -> dict[str, Any]:
    from simulations.population import Fate, shares_by_class

    measures: dict[str, list[float]] = {}
    for population, rounds in found:
        done = [one for one in rounds if one.failure is None]
        n_selected = sum(len(one.fates) for one in rounds)
        figures = {
            "minutes of a round": float(np.mean([one.duration_s for one in done])) / _MINUTE_S,
            "longest, minutes": max(one.duration_s for one in done) / _MINUTE_S,
            "waiting for agents, minutes a round": (
                sum(one.waited_s for one in rounds) / len(done) / _MINUTE_S
            ),
            "hours in all": sum(one.waited_s + one.duration_s for one in rounds) / 3600.0,
            "failed rounds": float(len(rounds) - len(done)),
            "selected whose update counts": (
                sum(one.n(Fate.ACCEPTED) for one in done) / n_selected
            ),
            "selected who finish in vain": sum(one.n(Fate.LATE) for one in rounds) / n_selected,
            "GB up": sum(one.up_n_bytes for one in rounds) / 1e9,
            "GB down": sum(one.down_n_bytes for one in rounds) / 1e9,
        }
        for name, share in shares_by_class(population, rounds).items():
            figures[f"updates from {name}"] = share
        for name, value in figures.items():
            measures.setdefault(name, []).append(value)
    return {
        name: {"mean": float(np.mean(values)), "lowest": min(values), "highest": max(values)}
        for name, values in measures.items()
    }


def _table(told: dict[str, Any]) -> Table:
    table = Table("what", "mean", "lowest to highest")
    for name, one in told.items():
        table.add_row(name, f"{one['mean']:.3g}", f"{one['lowest']:.3g} to {one['highest']:.3g}")
    return table

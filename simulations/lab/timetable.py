"""Who takes part in each round of a run, and what becomes of them before their update comes in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.blocks import RoundsBlock
from simulations import population
from simulations.errors import ExperimentError
from simulations.lab.experiment import PopulationSection
from simulations.lab.records import Fate

_FAST: Final = 1e15
"""Tokens or bytes a second, of devices that nothing is known of: no time passes."""
_FATES: Final = {
    population.Fate.ACCEPTED: Fate.COUNTED,
    population.Fate.LATE: Fate.LATE,
    population.Fate.DROPPED: Fate.DROPPED,
}


@dataclass(frozen=True, kw_only=True)
class PlannedRound:
    """Who a round selects.

    Attributes:
        number: From 1.
        fates: Of all that are selected, as far as devices and networks decide.
        waited_s: Simulated time until enough were there; None: devices are not known.
        duration_s: Simulated time from opening to closing.
        failure: Why the round comes to nothing.
        n_fetched: Of those selected, how many have fetched the release by the end.
        late_n_bytes: That those sent whose update came too late.
    """

    number: int
    fates: dict[int, Fate]
    waited_s: float | None = None
    duration_s: float | None = None
    failure: str | None = None
    n_fetched: int
    late_n_bytes: int = 0

    @property
    def cohort(self) -> tuple[int, ...]:
        """Those whose updates come in, ascending."""
        came = (agent for agent, fate in self.fates.items() if fate is Fate.COUNTED)
        return tuple(sorted(came))


def alone(client: int) -> Iterator[PlannedRound]:
    """The one round of a baseline.

    Args:
        client: Who trains.
    """
    yield PlannedRound(number=1, fates={client: Fate.COUNTED}, n_fetched=1)


def timetable(
    section: PopulationSection,
    rules: RoundsBlock,
    *,
    n_tokens: Sequence[int] | None,
    n_clients: int,
    down_n_bytes: int,
    up_n_bytes: int,
    seed: int,
) -> Iterator[PlannedRound]:
    """Rounds without end, drawn and closed by the server's own rules.

    Args:
        section: Of the experiment.
        rules: Of the federation.
        n_tokens: That each client trains on in a round; None where no devices are known.
        n_clients: Of the run; each is an agent of the population.
        down_n_bytes: Of a release.
        up_n_bytes: Of an update.
        seed: Of the run.

    Raises:
        ExperimentError: The cohort is larger than the run.
        PopulationError: The file cannot be read, or never enough agents are there.
    """
    if rules.min_cohort > n_clients:
        msg = f"a round needs {rules.min_cohort} agents, and there are {n_clients} clients"
        raise ExperimentError(msg)
    known = section.file is not None
    file = (
        population.read_population(Path(section.file))
        if section.file is not None
        else population.PopulationFile(
            n_agents=n_clients,
            device=(
                population.DeviceClass(
                    name="any",
                    share=1.0,
                    tokens_per_s=_FAST,
                    up_bytes_per_s=_FAST,
                    down_bytes_per_s=_FAST,
                    drop_out=section.drop_out,
                ),
            ),
        )
    )
    drawn = population.Population.of(file.model_copy(update={"n_agents": n_clients}), seed=seed)
    workload = population.Workload(
        n_tokens=1 if n_tokens is None else population.per_agent(n_tokens),
        down_n_bytes=down_n_bytes,
        up_n_bytes=up_n_bytes,
    )
    for one in population.rounds_of(drawn, rules, workload, seed=seed):
        yield PlannedRound(
            number=one.number,
            fates={agent: _FATES[fate] for agent, fate in one.fates.items()},
            waited_s=one.waited_s if known else None,
            duration_s=one.duration_s if known else None,
            failure=one.failure,
            n_fetched=one.down_n_bytes // down_n_bytes,
            late_n_bytes=one.up_n_bytes - one.n(population.Fate.ACCEPTED) * up_n_bytes,
        )

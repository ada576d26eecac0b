"""Who takes part, when, and how fast; and what a federation's rules make of it, in simulated time.

Agents have devices, networks and hours. Nothing is trained and nobody waits. A round is drawn and
closed by the server's own functions (`aggregator_server.selection.draw`,
`aggregator_server.closing.decide`), so a deadline or an over-selection that is tried here does in a
federation what it did here. What devices can do is yours to say: no figure of theirs is built in.
"""

import hashlib
import itertools
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aggregator_server.closing import Ending, decide
from aggregator_server.selection import cohort_size, draw
from aggregator_server.store.rows import RoundProgress, UploadProgress
from protocol.blocks import RoundsBlock
from protocol.chain import BlobRef, RoundManifest
from protocol.wire import explain
from simulations.errors import PopulationError

HOUR_S: Final = 3600.0
_DAY_HOURS: Final = 24
_EPOCH_S: Final = 1_800_000_000.0
"""Where simulated time begins; a midnight would do as well, and this one is far from zero."""
_LOOK_EVERY_S: Final = 60.0
"""How often a server without enough agents is looked at again."""
_LONGEST_WAIT_S: Final = 30 * 24 * HOUR_S
_DEVICES, _PRESENCE, _ROUNDS = range(3)
"""Streams of a seed."""


class DeviceClass(BaseModel):
    """One kind of volunteer's machine.

    Attributes:
        name: For tables.
        share: Of the population, relative to the other classes'.
        tokens_per_s: That it trains on.
        up_bytes_per_s: Of its network.
        down_bytes_per_s: Of its network.
        drop_out: Chance that it begins a round and never finishes it.
        hours: For each hour of its own day the chance that it is there; one number: at any hour.
        spread: Standard deviation of the logarithm of its speeds from one machine to the next.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1)
    share: float = Field(gt=0.0)
    tokens_per_s: float = Field(gt=0.0)
    up_bytes_per_s: float = Field(gt=0.0)
    down_bytes_per_s: float = Field(gt=0.0)
    drop_out: float = Field(default=0.0, ge=0.0, le=1.0)
    hours: tuple[float, ...] = (1.0,)
    spread: float = Field(default=0.0, ge=0.0, le=2.0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.hours) not in {1, _DAY_HOURS} or not all(0.0 <= h <= 1.0 for h in self.hours):
            msg = f"hours has {len(self.hours)} numbers; expected 1 or 24, from 0 to 1"
            raise ValueError(msg)
        return self


class PopulationFile(BaseModel):
    """A population as a TOML file says it: how many agents, and of which classes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_agents: int = Field(ge=1, le=1_000_000)
    time_zones: int = Field(default=1, ge=1, le=_DAY_HOURS)
    """Agents are spread evenly over so many neighbouring hours of the day."""
    device: tuple[DeviceClass, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [one.name for one in self.device]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            msg = f"two devices are called {twice!r}; give each a name of its own"
            raise ValueError(msg)
        return self

    def digest(self) -> str:
        """SHA-256 of what it says, hexadecimal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a round asks of an agent."""

    n_tokens: int | np.ndarray
    """Trained on, all passes together; of each agent, [n_agents], or of all alike."""
    down_n_bytes: int
    up_n_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Population:
    """Agents with their devices; arrays are [n_agents].

    Attributes:
        classes: What the numbers in `kind` mean.
        kind: Index of each agent's class.
        speed: Factor on the class's speeds.
        zone_h: Hours by which its day is ahead.
        seed: Of all draws.
    """

    classes: tuple[DeviceClass, ...]
    kind: np.ndarray
    speed: np.ndarray
    zone_h: np.ndarray
    seed: int

    @classmethod
    def of(cls, file: PopulationFile, *, seed: int) -> "Population":
        """Draw a population.

        Args:
            file: How many of what.
            seed: Not negative; equal seeds give equal populations.
        """
        rng = _generator(seed, _DEVICES)
        shares = np.array([one.share for one in file.device])
        kind = rng.choice(len(shares), file.n_agents, p=shares / shares.sum())
        spreads = np.array([one.spread for one in file.device])[kind]
        return cls(
            classes=file.device,
            kind=kind,
            speed=np.exp(spreads * rng.standard_normal(file.n_agents)),
            zone_h=rng.integers(file.time_zones, size=file.n_agents),
            seed=seed,
        )

    def __len__(self) -> int:
        """Number of agents."""
        return len(self.kind)

    def column(self, name: str) -> np.ndarray:
        """A number of each agent's class, [n_agents]."""
        values: np.ndarray = np.array([getattr(one, name) for one in self.classes])[self.kind]
        return values

    def present(self, at_s: float) -> np.ndarray:
        """Which agents are there, [n_agents] bool; one draw for each agent and hour.

        Args:
            at_s: Simulated time.
        """
        hour = int(at_s // HOUR_S)
        chances = np.array([one.hours * (_DAY_HOURS // len(one.hours)) for one in self.classes])
        chance = chances[self.kind, (hour + self.zone_h) % _DAY_HOURS]
        drawn: np.ndarray = _generator(self.seed, _PRESENCE, hour).random(len(self)) < chance
        return drawn


class Fate(StrEnum):
    """What became of an agent that was selected."""

    ACCEPTED = "accepted"
    LATE = "late"
    """It would have finished, and the round had closed."""
    DROPPED = "dropped"


@dataclass(frozen=True, kw_only=True)
class SimulatedRound:
    """One round; times in seconds of simulated time."""

    number: int
    waited_s: float
    """Until enough agents were there."""
    duration_s: float
    """From opening to closing."""
    fates: dict[int, Fate]
    """Of each selected agent."""
    down_n_bytes: int
    up_n_bytes: int
    failure: str | None

    def n(self, fate: Fate) -> int:
        """How many selected agents had this fate."""
        return sum(found is fate for found in self.fates.values())


def read_population(path: Path) -> PopulationFile:
    """Read a population's TOML file.

    Raises:
        PopulationError: It cannot be read, or a number is out of its range.
    """
    try:
        with path.open("rb") as file:
            tree = tomllib.load(file)
        return PopulationFile.model_validate(tree)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"cannot read {path}: {error}"
        raise PopulationError(msg) from error
    except ValidationError as error:
        raise PopulationError(explain(str(path), error)) from error


def simulate(
    population: Population, rules: RoundsBlock, workload: Workload, *, seed: int
) -> list[SimulatedRound]:
    """All rounds of a federation, one after the other.

    Guarantees:
        1. A round closes when the server's own `decide` closes it, to the second of the event that
           made it.
        2. Equal seeds give equal rounds.
        3. A round that fails does not count among `rules.n_rounds`, as in a federation; at most as
           many fail.

    Args:
        population: Who may come.
        rules: The federation's.
        workload: Of a round, alike for all.
        seed: Of cohorts and drop-outs.

    Raises:
        PopulationError: Never enough agents are there at once, or as many rounds failed as were
            wanted.
    """
    found: list[SimulatedRound] = []
    n_done = 0
    for one in rounds_of(population, rules, workload, seed=seed):
        found.append(one)
        n_done += one.failure is None
        if n_done == rules.n_rounds:
            break
        if len(found) - n_done >= rules.n_rounds:
            msg = (
                f"{rules.n_rounds} rounds failed ({found[-1].failure}): lower rounds.min_cohort, "
                "or give a longer deadline"
            )
            raise PopulationError(msg)
    return found


def rounds_of(
    population: Population, rules: RoundsBlock, workload: Workload, *, seed: int
) -> Iterator[SimulatedRound]:
    """Rounds without end, failed ones too: whoever asks says when there are enough.

    Args:
        population: Who may come.
        rules: The federation's.
        workload: Of a round.
        seed: Of cohorts and drop-outs.

    Yields:
        Rounds, numbered from 1.

    Raises:
        PopulationError: Never enough agents are there at once.
    """
    now = _EPOCH_S
    for index in itertools.count():
        opened = _opening(population, rules, now)
        rng = _generator(seed, _ROUNDS, index)
        one = _round(population, rules, workload, index + 1, now, opened, rng)
        yield one
        now = opened + one.duration_s


def per_agent(n_tokens: Sequence[int]) -> np.ndarray:
    """Tokens of each agent, for a `Workload`.

    Args:
        n_tokens: In the agents' order.
    """
    return np.asarray(n_tokens, np.float64)


def _opening(population: Population, rules: RoundsBlock, now: float) -> float:
    at = now
    while population.present(at).sum() < rules.min_cohort:
        at += _LOOK_EVERY_S
        if at - now > _LONGEST_WAIT_S:
            msg = (
                f"in 30 days there were never {rules.min_cohort} of {len(population)} agents at "
                "once, as rounds.min_cohort asks"
            )
            raise PopulationError(msg)
    return at


def _round(
    population: Population,
    rules: RoundsBlock,
    workload: Workload,
    number: int,
    ready: float,
    opened: float,
    rng: np.random.Generator,
) -> SimulatedRound:
    present = np.flatnonzero(population.present(opened))
    names = {int(agent): int(agent).to_bytes(32, "big") for agent in present}
    manifest = _manifest(rules, number, opened, len(present), rng.bytes(32))
    drawn = draw(
        manifest.selection_seed, names.values(), n=manifest.cohort_size, round_number=number
    )
    selected = np.array([int.from_bytes(row.agent, "big") for row in drawn])
    speed = population.speed[selected]
    fetched = opened + workload.down_n_bytes / (
        population.column("down_bytes_per_s")[selected] * speed
    )
    n_tokens = np.broadcast_to(workload.n_tokens, len(population))[selected]
    trained = fetched + n_tokens / (population.column("tokens_per_s")[selected] * speed)
    up_rate = population.column("up_bytes_per_s")[selected] * speed
    finished = trained + workload.up_n_bytes / up_rate
    dropped = rng.random(len(selected)) < population.column("drop_out")[selected]
    finished[dropped] = np.inf
    closed, accepted, failure = _close(rules, manifest, workload, trained, finished, up_rate)
    fates = {
        int(agent): Fate.DROPPED if gone else Fate.ACCEPTED if came else Fate.LATE
        for agent, came, gone in zip(selected, accepted, dropped, strict=True)
    }
    part = np.clip((closed - trained) * up_rate, 0.0, workload.up_n_bytes)
    sent = np.where(finished <= closed, workload.up_n_bytes, part)
    return SimulatedRound(
        number=number,
        waited_s=opened - ready,
        duration_s=closed - opened,
        fates=fates,
        down_n_bytes=int((fetched <= closed).sum()) * workload.down_n_bytes,
        up_n_bytes=int(sent[~dropped].sum()),
        failure=failure,
    )


def _close(
    rules: RoundsBlock,
    manifest: RoundManifest,
    workload: Workload,
    trained: np.ndarray,
    finished: np.ndarray,
    up_rate: np.ndarray,
) -> tuple[float, np.ndarray, str | None]:
    """When the server closes a round, whose updates it has by then, and why it failed if it did.

    Updates come one after the other: of those that come at the same moment, in the order in which
    their agents were drawn.
    """
    accepted = np.zeros(len(finished), np.bool_)
    order = np.argsort(finished, kind="stable")
    events: list[tuple[float, int | None]] = [
        (float(finished[place]), int(place)) for place in order if np.isfinite(finished[place])
    ]
    events += [(manifest.deadline_at, None), (manifest.cap_at, None)]
    for now, place in sorted(events, key=lambda event: event[0]):
        if place is not None:
            accepted[place] = True
        uploading = (trained < now) & ~accepted & np.isfinite(finished)
        progress = RoundProgress(
            n_selected=len(finished),
            n_accepted=int(accepted.sum()),
            n_open=int((~accepted).sum()),
            bytes_received=0,
            receiving=tuple(
                UploadProgress(
                    started_at=float(start),
                    n_bytes=workload.up_n_bytes,
                    n_bytes_received=int((now - start) * rate),
                )
                for start, rate in zip(trained[uploading], up_rate[uploading], strict=True)
            ),
            n_ready=0,
        )
        decision = decide(rules, manifest, progress, now=now)
        if decision.ending is not Ending.WAIT:
            failed = decision.ending is Ending.FAIL
            return now, accepted, decision.reason if failed else None
    msg = "the server's rules never closed a round"  # cannot be: the cap ends every wait
    raise PopulationError(msg)


def _manifest(
    rules: RoundsBlock, number: int, opened: float, n_present: int, selection_seed: bytes
) -> RoundManifest:
    nothing = bytes(32)
    return RoundManifest(
        federation=bytes(16),
        federation_digest=nothing,
        round=number,
        release=number - 1,
        release_digest=nothing,
        sent=BlobRef(sha256=nothing, n_bytes=0),
        selection_seed=selection_seed,
        cohort_size=cohort_size(rules, n_present=n_present),
        schedule_start=0.0,
        schedule_end=1.0,
        update_n_bytes=1,
        opened_at=opened,
        deadline_at=opened + rules.deadline_s,
        cap_at=opened + rules.cap_s,
    )


def shares_by_class(population: Population, rounds: Sequence[SimulatedRound]) -> dict[str, float]:
    """Which part of all accepted updates came from each class; 0 where there is none."""
    counts = np.zeros(len(population.classes))
    for one in rounds:
        if one.failure is None:
            for agent, fate in one.fates.items():
                counts[population.kind[agent]] += fate is Fate.ACCEPTED
    total = max(counts.sum(), 1.0)
    return {
        one.name: float(count / total)
        for one, count in zip(population.classes, counts, strict=True)
    }


def _generator(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(words))))

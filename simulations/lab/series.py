"""Several runs of one question: the arms of a comparison, the points of a sweep, an attack.

Each run has a folder of its own and one engine serves them all, so a series that was interrupted
goes on where it stood, and the base is loaded once.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aggregator_server.errors import ServerError
from edge_agent.errors import AgentError
from privacy.errors import PrivacyError
from protocol.errors import ProtocolError
from simulations.errors import ExperimentError, PartitionError
from simulations.lab import engines
from simulations.lab.data import data_sha256, prepare_data
from simulations.lab.engines import Engine
from simulations.lab.experiment import DataSection, Experiment
from simulations.lab.folder import RunFolder
from simulations.lab.records import Arm, Setting
from simulations.lab.report.history import History
from simulations.lab.run import Request, holds_another, is_of
from simulations.lab.terms import make_terms
from simulations.lab.visits import Setup


@dataclass(frozen=True, kw_only=True)
class Member:
    """A run of a series.

    Attributes:
        request: What is to be run.
        folder: Its folder's name, or path, within the series'.
        label: What it is called in tables.
        settings: What it differs in from the others, by dotted key.
    """

    request: Request
    folder: Path
    label: str
    settings: Mapping[str, Setting]


def arms(experiment: Experiment, *, seeds: Sequence[int]) -> list[Member]:
    """The arms of a comparison: base, locals, centralised, federated.

    Args:
        experiment: Whose question it is.
        seeds: Under each of which all are run.

    Raises:
        DataError: The records cannot be read.
        PartitionError: They cannot be split.
    """
    members = []
    for seed in seeds:
        data = prepare_data(experiment.data, seed=seed)
        named: list[tuple[str, Arm, int | None]] = [("base", Arm.BASE, None)]
        named += [
            (f"local, {size}", Arm.LOCAL, data.client_named(size))
            for size in experiment.baselines.local
        ]
        named += [("federated", Arm.FEDERATED, None), ("centralised", Arm.CENTRALISED, None)]
        for label, arm, client in named:
            request = Request(experiment=experiment, arm=arm, client=client, seed=seed)
            folder = Path(f"{label.replace(', ', '-')}-seed-{seed}")
            members.append(Member(request=request, folder=folder, label=label, settings={}))
    return members


def sweep(experiment: Experiment, *, seeds: Sequence[int]) -> list[Member]:
    """All combinations of the sweep's values, each under every seed.

    Args:
        experiment: With a sweep.
        seeds: Of each combination.

    Raises:
        ExperimentError: There is no sweep, or it has a key or value that cannot be.
    """
    if not experiment.sweep:
        msg = (
            f"the experiment {experiment.name!r} has nothing to sweep; give it a table such as\n"
            '[sweep]\n"federation.epsilon" = [2, 8, "none"]'
        )
        raise ExperimentError(msg)
    keys = tuple(experiment.sweep)
    points = [
        dict(zip(keys, values, strict=True))
        for values in itertools.product(*experiment.sweep.values())
    ]
    return _members(experiment, points, seeds)


def attacks(
    experiment: Experiment, *, names: Sequence[str], share: float, filters: Sequence[str]
) -> list[Member]:
    """Every attack, and none, under every filter.

    Args:
        experiment: What is attacked.
        names: Of attacks on updates.
        share: Of the clients that attack.
        filters: The manifest's rules.

    Raises:
        ExperimentError: No such attack or filter.
    """
    points: list[dict[str, Setting]] = []
    for rule in filters:
        points.append({"federation.filter": rule, "attack.name": None, "attack.share": None})
        points += [
            {"federation.filter": rule, "attack.name": name, "attack.share": share}
            for name in names
        ]
    return _members(experiment, points, experiment.seeds)


def ended(root: Path, members: Sequence[Member]) -> list[bool]:
    """Which members' runs are over.

    Args:
        root: The series' folder.
        members: In any order.

    Raises:
        DataError: Records cannot be read.
        OutputError: A folder holds another run: better told now than after hours of the others.
        PopulationError: A population cannot be read.
    """
    digests: dict[tuple[DataSection, int], str] = {}
    found = []
    for member in members:
        folder, request = root / member.folder, member.request
        if not RunFolder(folder).is_begun:
            found.append(False)
            continue
        section, seed = request.experiment.data, request.seed
        if (section, seed) not in digests:
            digests[section, seed] = data_sha256(section, seed=seed)
        history = History.read(folder)
        if not is_of(history.card, request, data_sha256=digests[section, seed]):
            raise holds_another(folder, history.card)
        found.append(history.end is not None)
    return found


def check(members: Sequence[Member], engine: Engine) -> None:
    """Find out before the first run whether there can be a federation, and records, for each.

    Each point once; federations of those on the first one's base, as loading another takes long.

    Args:
        members: At least one.
        engine: Whose base it is.

    Raises:
        ExperimentError: There cannot; it says which, and why.
        EngineError: A worker died.
        QuantError: The base cannot be loaded.
    """
    first = members[0].request.experiment
    section = first.base
    base = engines.describe(
        engine,
        Setup(model=section.model, revision=section.revision, device=first.engine.device),
    )
    prepared: set[DataSection] = set()
    for label, member in {member.label: member for member in members}.items():
        request, experiment = member.request, member.request.experiment
        try:
            if experiment.base == section:
                make_terms(experiment, base, arm=request.arm, seed=request.seed)
            if experiment.data not in prepared:
                prepare_data(experiment.data, seed=request.seed)
                prepared.add(experiment.data)
        except (AgentError, PartitionError, PrivacyError, ProtocolError, ServerError) as error:
            msg = f"{label}: {error}"
            raise ExperimentError(msg) from error


def _members(
    experiment: Experiment, points: Sequence[Mapping[str, Setting]], seeds: Sequence[int]
) -> list[Member]:
    members = []
    for settings in points:
        varied = experiment.with_values({**settings, "sweep": {}})
        parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in settings.items()]
        members += [
            Member(
                request=Request(experiment=varied, seed=seed),
                folder=Path("_".join(parts)) / f"seed-{seed}",
                label=", ".join(part.replace("-", " ", 1) for part in parts),
                settings=settings,
            )
            for seed in seeds
        ]
    return members

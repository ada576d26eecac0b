"""`sheepfold-sim run`, `compare`, `sweep`, `attack`, `report`: the laboratory's experiments."""

import difflib
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from protocol.blocks import FilterRule
from simulations.attacks.names import UpdateAttack
from simulations.cli_shared import console, write_json
from simulations.errors import ExperimentError, OutputError, SimulationError
from simulations.lab.records import Arm

if TYPE_CHECKING:
    from simulations.lab.engines import Engine
    from simulations.lab.experiment import Experiment
    from simulations.lab.series import Member

Name = Annotated[
    str,
    typer.Argument(
        metavar="EXPERIMENT",
        help="`fedit`, `flexlora`, `dolly`, `privacy`, or a TOML file of yours.",
    ),
]
Out = Annotated[Path | None, typer.Option(help="Where the results go.  [default: runs/EXPERIMENT]")]
Model = Annotated[
    str | None, typer.Option(help="The base: embedded:tiny, a folder, or a model of the hub.")
]
Data = Annotated[
    list[str] | None,
    typer.Option(help="Records: a file, or `hub:owner/name`; may be given again."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key, such as federation.rank=16."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes or Ray actors, of one thread each.")
]
Ray = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Run on Ray: `local`, or a cluster's address.")
]
Group = Annotated[
    str | None, typer.Option(help="How many agents train at once: a number, or `auto`.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.  [default: a GPU if any]")]
Real = Annotated[
    bool,
    typer.Option("--real-crypto", help="Run the cryptography of masked sums; the same result."),
]
Seeds = Annotated[str | None, typer.Option(metavar="1,2,3", help="Instead of the experiment's.")]
Json = Annotated[
    str | None, typer.Option("--json", metavar="PATH", help="Write JSON here; `-` for stdout.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the laboratory's."""
    for command in (run, compare, sweep, attack, report):
        app.command()(command)


@dataclass(frozen=True)
class _Wishes:
    """What the flags say that all commands of experiments have."""

    model: str | None
    data: list[str] | None
    pairs: list[str] | None
    workers: int | None
    ray: str | None
    group: str | None
    device: str | None
    real: bool

    def __post_init__(self) -> None:
        if self.group is not None and self.group != "auto" and not self.group.isdigit():
            msg = f"--group is a number or auto, not {self.group!r}"
            raise typer.BadParameter(msg)

    def experiment(self, name: str) -> "Experiment":
        """The experiment with what was asked for."""
        from simulations.lab.experiment import EngineKind, load_experiment

        found = load_experiment(_path_of(name))
        values: dict[str, object] = dict(map(_pair, self.pairs or ()))
        if self.model is not None:
            values["base.model"] = self.model
        if self.data:
            values["data.source"] = self.data
        if self.ray is not None:
            values["engine.kind"] = EngineKind.RAY.value
        elif self.workers is not None and self.workers > 1:
            kind = values.get("engine.kind", found.engine.kind)
            values["engine.kind"] = EngineKind.PROCESSES.value if kind == EngineKind.HERE else kind
        if self.workers is not None:
            values["engine.workers"] = self.workers
        if self.group is not None:
            values["engine.group"] = self.group if self.group == "auto" else int(self.group)
        if self.device is not None:
            values["engine.device"] = self.device
        if self.real:
            values["engine.cryptography"] = "real"
        return found.with_values(values)

    def engine(self, experiment: "Experiment") -> "Engine":
        """Where it runs."""
        from simulations.lab.engines import make_engine

        address = None if self.ray in {None, "local"} else self.ray
        return make_engine(experiment.engine, ray_address=address)


def run(
    name: Name,
    *,
    arm: Annotated[
        Arm, typer.Option(help="Who sees which records: the federation, or a baseline.")
    ] = Arm.FEDERATED,
    client: Annotated[
        str, typer.Option(help="With --arm local: smallest, median, largest, or a number.")
    ] = "median",
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="[default: the experiment's first]")
    ] = None,
    out: Out = None,
    model: Model = None,
    data: Data = None,
    pairs: Set = None,
    workers: Workers = None,
    ray: Ray = None,
    group: Group = None,
    device: Device = None,
    real: Real = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print the experiment with every default; run nothing.")
    ] = False,
    json_path: Json = None,
) -> None:
    """Run an experiment, or go on with it: virtual agents, the agent's trainer, the server's rules.

    The folder holds everything: journal, releases, adapter, tables, figures, `report.html`. A run
    that was killed goes on from where it stood when the same command is given again.
    """
    wishes = _Wishes(model, data, pairs, workers, ray, group, device, real)
    experiment = wishes.experiment(name)
    if show:
        sys.stdout.write(experiment.as_toml())
        return
    from simulations.lab.data import prepare_data
    from simulations.lab.run import Request
    from simulations.lab.series import Member, ended

    used = experiment.seeds[0] if seed is None else seed
    number: int | None = None
    if arm is Arm.LOCAL:
        found = prepare_data(experiment.data, seed=used)
        number = found.client_named(client)
    request = Request(experiment=experiment, arm=arm, client=number, seed=used)
    root = _root(out, experiment) if out is not None else _root(out, experiment) / request.name
    member = Member(request=request, folder=Path(), label=request.name, settings={})
    _run_all(root, [member], wishes, experiment, over=ended(root, [member]))
    _tell(root, json_path)


def compare(
    name: Name,
    *,
    seeds: Seeds = None,
    out: Out = None,
    model: Model = None,
    data: Data = None,
    pairs: Set = None,
    workers: Workers = None,
    ray: Ray = None,
    group: Group = None,
    device: Device = None,
    real: Real = False,
    json_path: Json = None,
) -> None:
    """The paper's comparison: base, clients alone, all in one place, the federation; every seed."""
    from simulations.lab.series import arms

    wishes = _Wishes(model, data, pairs, workers, ray, group, device, real)
    experiment = wishes.experiment(name)
    root = _root(out, experiment)
    members = arms(experiment, seeds=_seeds(seeds, experiment))
    _run_series(root, members, wishes, experiment, partial(_comparison, root, json_path=json_path))


def sweep(
    name: Name,
    *,
    seeds: Seeds = None,
    out: Out = None,
    model: Model = None,
    data: Data = None,
    pairs: Set = None,
    workers: Workers = None,
    ray: Ray = None,
    group: Group = None,
    device: Device = None,
    real: Real = False,
    json_path: Json = None,
) -> None:
    """Utility, privacy and bytes over all combinations of the experiment's `[sweep]`."""
    from simulations.lab.series import sweep as points

    wishes = _Wishes(model, data, pairs, workers, ray, group, device, real)
    experiment = wishes.experiment(name)
    root = _root(out, experiment)
    members = points(experiment, seeds=_seeds(seeds, experiment))
    _run_series(root, members, wishes, experiment, partial(_surface, root, json_path=json_path))


def attack(
    name: Name,
    *,
    attacks: Annotated[list[UpdateAttack], typer.Option("--attack", help="May be given again.")],
    share: Annotated[float, typer.Option(help="Of the clients that attack.")] = 0.2,
    filters: Annotated[
        list[FilterRule] | None, typer.Option("--filter", help="May be given again.  [both]")
    ] = None,
    out: Out = None,
    model: Model = None,
    data: Data = None,
    pairs: Set = None,
    workers: Workers = None,
    ray: Ray = None,
    group: Group = None,
    device: Device = None,
    real: Real = False,
    json_path: Json = None,
) -> None:
    """What attackers do to an experiment, under each filter and beside no attack at all."""
    from simulations.lab.series import attacks as points

    wishes = _Wishes(model, data, pairs, workers, ray, group, device, real)
    experiment = wishes.experiment(name)
    root = _root(out, experiment)
    rules = filters or [FilterRule.NONE, FilterRule.ROBUST]
    members = points(
        experiment,
        names=[one.value for one in attacks],
        share=share,
        filters=[rule.value for rule in rules],
    )
    _run_series(root, members, wishes, experiment, partial(_surface, root, json_path=json_path))


def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")], *, json_path: Json = None
) -> None:
    """Write a run's page, figures and tables anew from its journal, finished or not."""
    _refuse_series(folder)
    _write_report(folder)
    _tell(folder, json_path)


def _path_of(name: str) -> Path:
    """A file of the user's, or an experiment that comes with Sheepfold.

    Raises:
        ExperimentError: There is neither.
    """
    path, folder = Path(name), Path(str(files("simulations.experiments")))
    shipped = {one.stem: one for one in sorted(folder.glob("*.toml"))}
    if path.is_file() or (path.exists() and name not in shipped):
        return path
    if name not in shipped:
        near = difflib.get_close_matches(path.stem, shipped, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        msg = (
            f"there is no file {name!r} and no experiment of that name; {hint}"
            f"Those that come along: {', '.join(shipped)}"
        )
        raise ExperimentError(msg)
    return shipped[name]


def _pair(text: str) -> tuple[str, object]:
    import json

    key, equals, value = text.partition("=")
    if not equals:
        msg = f"--set takes KEY=VALUE, not {text!r}"
        raise typer.BadParameter(msg)
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value


def _seeds(text: str | None, experiment: "Experiment") -> tuple[int, ...]:
    if text is None:
        return experiment.seeds
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        msg = f"--seeds takes numbers such as 1,2,3, not {text!r}"
        raise typer.BadParameter(msg) from error
    return experiment.with_values({"seeds": seeds}).seeds


def _root(out: Path | None, experiment: "Experiment") -> Path:
    return Path("runs") / experiment.name if out is None else out


def _run_all(
    root: Path,
    members: "Sequence[Member]",
    wishes: _Wishes,
    experiment: "Experiment",
    *,
    over: Sequence[bool],
) -> None:
    """Run those that are not over, and write what reports are missing."""
    from quant.quiet import quiet_libraries
    from simulations.lab.display import RunDisplay, SeriesPace
    from simulations.lab.folder import RunFolder
    from simulations.lab.run import run as run_one
    from simulations.lab.series import check

    quiet_libraries()
    pace = SeriesPace(members, ended=over)
    todo = [member for member, is_over in zip(members, over, strict=True) if not is_over]
    if len(todo) < len(members):
        there = len(members) - len(todo)
        console.print(f"Already there: {there} of {len(members)} runs.", highlight=False)
    for member, is_over in zip(members, over, strict=True):
        folder = root / member.folder
        if is_over and not RunFolder(folder).report.exists():
            _write_report(folder)
    if not todo:
        return
    engine = wishes.engine(experiment)
    try:
        if len(todo) > 1:
            check(todo, engine)
        for number, (member, is_over) in enumerate(zip(members, over, strict=True), start=1):
            if is_over:
                continue
            folder, begun = root / member.folder, time.monotonic()
            title = member.label
            if len(members) > 1:
                title = f"[{number} of {len(members)}] {member.label}, seed {member.request.seed}"
            with RunDisplay(
                console,
                title,
                every=member.request.experiment.evaluation.every,
                usual_s=pace.usual_s(member),
                later_s=pace.later_s(number),
            ) as display:
                run_one(folder, member.request, engine, display)
            _write_report(folder)
            if display.was_run_whole:
                pace.ran(member, time.monotonic() - begun)
    finally:
        engine.close()


def _run_series(
    root: Path,
    members: "Sequence[Member]",
    wishes: _Wishes,
    experiment: "Experiment",
    show: Callable[["Sequence[Member]"], None],
) -> None:
    """Run all, and show what came of them: of as many as there are, where an error ends it early.

    Raises:
        BaseException: That error, whatever can be shown.
    """
    from edge_agent.errors import AgentError
    from simulations.lab.series import ended

    over = ended(root, members)
    try:
        _run_all(root, members, wishes, experiment, over=over)
    except BaseException:  # Ctrl-C is one: hours of runs are worth their table
        with suppress(AgentError, SimulationError):  # why the series ended is what must be told
            there = [member for member in members if _is_measured(root / member.folder)]
            if there:
                told = f"Ended early: this is of {len(there)} of {len(members)} runs."
                console.print(told, highlight=False)
                show(there)
        raise
    show(members)


def _is_measured(folder: Path) -> bool:
    """Whether a run has anything to show."""
    from simulations.lab.folder import RunFolder
    from simulations.lab.report.history import History

    return RunFolder(folder).is_begun and bool(History.read(folder).measures)


def _refuse_series(folder: Path) -> None:
    from simulations.lab.folder import RunFolder

    below = sorted(one for level in ("*", "*/*") for one in folder.glob(level))
    runs = [str(one.relative_to(folder)) for one in below if RunFolder(one).is_begun]
    if runs and not RunFolder(folder).is_begun:
        more = f" and {len(runs) - 5} more" if len(runs) > 5 else ""
        msg = (
            f"{folder} holds a series of {len(runs)} runs "
            f"({', '.join(runs[:5])}{more}); name one of them, or give the series' command again, "
            "which writes its table anew"
        )
        raise OutputError(msg)


def _write_text(path: Path, text: str) -> None:
    from simulations.files import appearing

    with appearing(path) as file:
        file.write(text.encode())


def _write_report(folder: Path) -> None:
    from simulations.lab.report.page import write_report
    from simulations.lab.report.tables import export_tables
    from simulations.lab.report.tensorboard import write_events

    export_tables(folder)
    write_events(folder)
    write_report(folder)


def _tell(root: Path, json_path: str | None) -> None:
    from simulations.lab.report.comparison import Comparison

    found = Comparison.of([root])
    shown = console if json_path == "-" else Console()
    shown.print(found.table())
    shown.print(
        f"Report:  {root / 'report.html'}\nAdapter: {root / 'adapter'}",
        highlight=False,
        soft_wrap=True,
    )
    if json_path is not None:
        write_json(found.as_json(), json_path)


def _comparison(root: Path, members: "Sequence[Member]", *, json_path: str | None) -> None:
    from simulations.lab.report.comparison import Comparison
    from simulations.lab.report.comparison_figure import draw_relative_scores

    found = Comparison.of(
        [root / member.folder for member in members], labels=[member.label for member in members]
    )
    shown = console if json_path == "-" else Console()
    shown.print(found.table())
    _write_text(root / "comparison.md", found.markdown())
    write_json(found.as_json(), str(root / "comparison.json"))
    if json_path is not None:
        write_json(found.as_json(), json_path)
    draw_relative_scores(found, root / "comparison.png")
    shown.print(f"Figure: {root / 'comparison.png'}", highlight=False, soft_wrap=True)


def _surface(root: Path, members: "Sequence[Member]", *, json_path: str | None) -> None:
    from simulations.lab.report.surface import Surface, SweepPoint
    from simulations.lab.report.surface_figure import draw_surface

    points: dict[str, SweepPoint] = {}
    for member in members:
        earlier = points.get(member.label)
        roots = {} if earlier is None else dict(earlier.roots)
        roots[member.request.seed] = root / member.folder
        points[member.label] = SweepPoint(settings=member.settings, roots=roots)
    found = Surface.of(list(points.values()))
    shown = console if json_path == "-" else Console()
    shown.print(found.table())
    found.write(root)
    _write_text(root / "surface.md", found.markdown())
    told: dict[str, Any] = found.as_json()
    write_json(told, str(root / "surface.json"))
    if json_path is not None:
        write_json(told, json_path)
    draw_surface(found, root / "surface.png")
    shown.print(f"Figure: {root / 'surface.png'}", highlight=False, soft_wrap=True)

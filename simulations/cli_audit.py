"""`sheepfold-sim audit`: what a training, an update and a release betray."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from simulations.cli_shared import console, parse_factors, write_json

if TYPE_CHECKING:
    from simulations.audit.recipe import AuditRecipe, Protection, ReleaseRules


def register(app: typer.Typer) -> None:
    """Add the command of this module to the laboratory's."""
    app.command()(audit)


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go."""

    figure: Path | None
    json_path: str | None

    @property
    def console(self) -> Console:
        """Of tables and sentences: standard output, unless JSON goes there."""
        return console if self.json_path == "-" else Console()


def audit(
    *,
    epsilon: Annotated[
        list[float] | None,
        typer.Option(help="Audit a training with this ε; may be given again.  [default: 8 and 1]"),
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Audit a training with this much noise instead.")
    ] = None,
    no_noise: Annotated[
        bool, typer.Option("--no-noise", help="Audit a training without noise only.")
    ] = False,
    delta: Annotated[float, typer.Option(help="δ of claims and bounds.")] = 1e-5,
    confidence: Annotated[float, typer.Option(help="Of the bounds from canaries.")] = 0.999,
    canaries: Annotated[
        int, typer.Option(min=8, max=4096, help="Canaries of a run; a coin decides for each.")
    ] = 256,
    ordinary: Annotated[
        int, typer.Option(min=1, max=4096, help="Ordinary records beside the canaries.")
    ] = 64,
    steps: Annotated[
        int, typer.Option(min=1, max=10_000, help="Steps of a training with canaries.")
    ] = 6,
    sampling: Annotated[
        float, typer.Option(help="Chance of a record to be in a step of that training.")
    ] = 0.5,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs with canaries.")] = 2,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Of the first run.")] = 1,
    sent: Annotated[str, typer.Option(help="Factors that are trained: A,B or B.")] = "A,B",
    release: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Instead: membership inference on this PEFT folder."),
    ] = None,
    members: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Records that it was trained on.")
    ] = None,
    non_members: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Records like them that it was not.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of its base; default: the one that it names."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=16, max=131_072, help="Tokens of a record; default: the training's."),
    ] = None,
    figure: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw scores and ROC.")] = None,
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="PATH", help="Write JSON here; `-` for stdout.")
    ] = None,
) -> None:
    """Attack a training, an update and a release: what do they betray?

    Without `--release`, on the embedded base, with noise off and on: canaries (a lower bound on
    ε beside the ε that is claimed), membership inference, and a probe for the tokens of one step.
    Takes two to three minutes on one core. Fails if a bound exceeds a claim.
    """
    from simulations.audit.recipe import AuditRecipe, ReleaseRules

    if release is not None:
        if members is None or non_members is None:
            raise typer.BadParameter("--release needs --members and --non-members")
        if epsilon or noise_multiplier is not None or no_noise:
            raise typer.BadParameter("--release is what it is: name no ε and no noise beside it")
        _audit_release(
            release,
            members,
            non_members,
            rules=ReleaseRules(base=base, max_length=max_length, seed=seed, delta=delta),
            output=Output(figure=figure, json_path=json_path),
        )
        return
    if members or non_members or base or max_length:
        raise typer.BadParameter("--members, --non-members, --base and --max-length need --release")
    _audit_embedded(
        AuditRecipe(
            protections=_protections(epsilon or [], noise_multiplier, no_noise=no_noise),
            delta=delta,
            confidence=confidence,
            seed=seed,
            n_runs=seeds,
            n_canaries=canaries,
            n_ordinary=ordinary,
            n_steps=steps,
            sampling_probability=sampling,
            sent=parse_factors(sent),
        ),
        Output(figure=figure, json_path=json_path),
    )


def _protections(
    epsilons: list[float], noise_multiplier: float | None, *, no_noise: bool
) -> "tuple[Protection, ...]":
    """Noise off first, then what was asked for, or the recipe's own."""
    from simulations.audit.recipe import AuditRecipe, Protection

    targets = [Protection(epsilon=one) for one in epsilons]
    if noise_multiplier is not None:
        targets.append(Protection(noise_multiplier=noise_multiplier))
    if no_noise and targets:
        raise typer.BadParameter("--no-noise excludes --epsilon and --noise-multiplier")
    if no_noise or targets:
        return (Protection(), *targets)
    return AuditRecipe().protections


def _audit_embedded(recipe: "AuditRecipe", output: Output) -> None:
    from simulations.audit import figure, report
    from simulations.audit.run import run_audit

    with report.AuditDisplay(console) as display:
        result = run_audit(recipe, display.tell)
    shown = output.console
    for table in (
        report.canary_table(result),
        report.membership_table(result),
        report.probe_table(result),
    ):
        if table is not None:
            shown.print(table)
    for sentence in report.sentences(result):
        shown.print(sentence, highlight=False, markup=False)
    if output.figure is not None:
        figure.draw(result, output.figure)
        shown.print(f"Figure: {output.figure}", highlight=False, markup=False, soft_wrap=True)
    if output.json_path is not None:
        write_json(report.as_json(result), output.json_path)
    report.require_claims(result)


def _audit_release(
    release: Path, members: Path, non_members: Path, *, rules: "ReleaseRules", output: Output
) -> None:
    from simulations.audit import figure, report
    from simulations.audit.membership import audit_release

    with report.AuditDisplay(console) as display:
        found = audit_release(release, members, non_members, rules=rules, tell=display.tell)
    shown = output.console
    shown.print(report.release_table(found))
    shown.print(f"Claimed of it: {found.claim}.", highlight=False, markup=False)
    if output.figure is not None:
        figure.draw_release(found, output.figure)
        shown.print(f"Figure: {output.figure}", highlight=False, markup=False, soft_wrap=True)
    if output.json_path is not None:
        write_json(report.release_json(found), output.json_path)

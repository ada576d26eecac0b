"""`sheepfold-server releases`: the published adapters."""

from pathlib import Path
from typing import Annotated

import typer

from aggregator_server.cli_shared import Directory, JsonPath, answer, opened

app = typer.Typer(
    help="The published adapters: list, show, roll back, export.", no_args_is_help=True
)
Number = Annotated[int, typer.Argument(metavar="N", min=0, help="The release's number.")]


@app.command("list")
def list_releases(directory: Directory, json_path: JsonPath = None) -> None:
    """List all releases, and check the whole chain.

    Example:
    sheepfold-server releases list fed
    """
    from protocol.chain import AggregationReport

    with opened(directory) as federation:
        federation.releases.verify()
        releases = [signed.body for signed in federation.releases.all()]
    lines = ["release  round  agents  update norm  note"]
    for release in releases:
        back = release.rolled_back_to
        report = release.aggregation
        note = "" if back is None else f"rolled back to {back}"
        if isinstance(report, AggregationReport) and report.covariance_gap is not None:
            note = f"averaging lost {report.covariance_gap.describe()}"
        lines.append(
            f"{release.number:7d}  {release.round:5d}  {report.n_agents:6d}  "
            f"{report.update_norm:11.4g}  {note}"
        )
    answer(json_path, "\n".join(lines), [release.as_json() for release in releases])


@app.command("show")
def show_release(directory: Directory, number: Number, json_path: JsonPath = None) -> None:
    """Show one release: what it was made of, and the digests of its files.

    Example:
    sheepfold-server releases show fed 3
    """
    import json

    with opened(directory) as federation:
        release = federation.releases.get(number)
    shown = {**release.as_json(), "digest": release.digest().hex()}
    answer(json_path, json.dumps(shown, indent=2), shown)


@app.command("rollback")
def roll_back(directory: Directory, number: Number, json_path: JsonPath = None) -> None:
    """Publish an older adapter again, as a new release; a round under way fails.

    Example:
    sheepfold-server releases rollback fed 3
    """
    with opened(directory) as federation:
        release = federation.releases.roll_back(number)
    answer(
        json_path,
        f"Release {release.number} holds the adapter of release {number} again.",
        release.as_json(),
    )


@app.command("export")
def export(
    directory: Directory,
    number: Number,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write it.")],
    json_path: JsonPath = None,
) -> None:
    """Write a release as a folder that stock PEFT loads.

    Example:
    sheepfold-server releases export fed 20 my-adapter
    """
    with opened(directory) as federation:
        release = federation.releases.export(number, folder)
    answer(
        json_path,
        f"Wrote release {number} to {folder}; load it with "
        f'PeftModel.from_pretrained(base, "{folder}").',
        {"folder": str(folder), "release": release.as_json()},
    )

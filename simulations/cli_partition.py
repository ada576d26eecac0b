"""`sheepfold-sim partition`: who holds which records, saved, drawn and in numbers."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edge_agent.plain_text import plain
from simulations.cli_shared import console, write_json
from simulations.partition.schemes import DRAWN_SCHEMES, Scheme


def register(app: typer.Typer) -> None:
    """Add the command of this module to the laboratory's."""
    app.command()(partition)


def partition(
    data: Annotated[
        list[Path], typer.Argument(help="Records: JSON, JSON Lines, CSV or Parquet; several count.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="The manifest to write: who holds which records.")],
    scheme: Annotated[Scheme, typer.Option(help="How records are split.")] = Scheme.SKEWED,
    by: Annotated[
        str,
        typer.Option(
            metavar="COLUMN",
            help="What is split: category, language, file, or a field by its name.",
        ),
    ] = "category",
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…", help="That column's value for each file, such as en,fi for language."
        ),
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Over how many clients.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of all draws.")] = 1,
    held_out: Annotated[
        int, typer.Option(min=0, help="Records of each category (or language, …) for no client.")
    ] = 10,
    alpha: Annotated[
        float, typer.Option(help="Concentration of Dirichlet draws (skewed, dirichlet, quantity).")
    ] = 0.5,
    min_records: Annotated[
        int | None,
        typer.Option(min=1, help="Least records of a client; default 40 if skewed, else 1."),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Draw category by client, and local against federated."),
    ] = None,
    clients_shown: Annotated[
        str | None,
        typer.Option(
            metavar="3,17,…",
            help="Clients that the figure holds against the federation.  "
            "[default: smallest, median, largest]",
        ),
    ] = None,
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="PATH", help="Write JSON here; `-` for stdout.")
    ] = None,
) -> None:
    """Split data over clients, and save which record went where.

    The paper's two schemes are `equal-volume` (few categories a client) and `skewed` (unequal
    volume too; the one that it ran). `--scheme by-category --by language` gives one language a
    client. The manifest holds the indices and the files' digests.
    """
    from simulations.partition import figure as partition_figure
    from simulations.partition.heterogeneity import measure_heterogeneity
    from simulations.partition.manifest import PartitionManifest, read_source
    from simulations.partition.schemes import PartitionRecipe, default_min_records, make_partition

    chosen = _client_numbers(clients_shown)
    if chosen is not None:
        if figure is None:
            msg = "--clients-shown is about the figure; add --figure PNG"
            raise typer.BadParameter(msg)
        chosen = partition_figure.checked_clients(chosen, n_clients=clients)
    recipe = PartitionRecipe(
        scheme=scheme,
        n_clients=clients,
        seed=seed,
        n_held_out=held_out,
        alpha=alpha,
        min_records=default_min_records(scheme) if min_records is None else min_records,
    )
    source = read_source(
        *data,
        by=by,
        labels=None if labels is None else [part.strip() for part in labels.split(",")],
    )
    split = make_partition(source.column, recipe)
    digest = PartitionManifest.of(source, split).save(out)
    shown = console if json_path == "-" else Console()
    shown.print(partition_figure.table(split, source.column, by=by))
    tries = f" Draws until the smallest client had enough: {split.n_tries}."
    unlike = measure_heterogeneity(split.counts(source.column)[1])
    shown.print(
        f"{split.n_records:,} records; clients hold {split.sizes.min()} to {split.sizes.max()}."
        f"{tries if scheme in DRAWN_SCHEMES else ''}\n"
        f"Total variation of a client's {plain(by)} from that of all, mean: "
        f"{unlike.mean_total_variation:.2f}. Gini of volumes: {unlike.volume_gini:.2f}.\n"
        f"Manifest: {out}, digest {digest[:16]}…",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if source.n_malformed:
        shown.print(f"Left out as malformed: {source.n_malformed}.", highlight=False)
    if figure is not None:
        partition_figure.draw(split, source.column, figure, clients=chosen, by=by)
        shown.print(f"Figure:   {figure}", highlight=False, markup=False, soft_wrap=True)
    if json_path is not None:
        found = partition_figure.as_json(split, source.column, by=by)
        files = [
            {
                "name": file.name,
                "sha256": file.sha256.hex(),
                "n_records": file.n_records,
                "label": file.label,
            }
            for file in source.files
        ]
        one = files[0]["sha256"] if len(files) == 1 else None
        found |= {"digest": digest, "sha256": one, "files": files, "manifest": str(out)}
        write_json(found, json_path)


def _client_numbers(text: str | None) -> tuple[int, ...] | None:
    """The clients that `--clients-shown` names.

    Raises:
        BadParameter: Something else than numbers with commas between them.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        msg = f"--clients-shown takes numbers such as 3,17,42, not {text!r}"
        raise typer.BadParameter(msg) from error

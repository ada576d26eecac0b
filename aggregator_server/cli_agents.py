"""`sheepfold-server agents`: the members."""

from typing import Annotated

import typer

from aggregator_server.cli_shared import Directory, JsonPath, answer, opened

app = typer.Typer(
    help="The members: list them, end a membership or a quarantine.", no_args_is_help=True
)


@app.command("list")
def list_agents(directory: Directory, json_path: JsonPath = None) -> None:
    """List all members, past ones too, and what filter and evaluator say of their updates.

    "removed" counts the updates, or cells with this member, that were left out. The log-odds say by
    how much a unit is likelier to be left out with it; a member is suspected at 3 standard errors.

    Example:
    sheepfold-server agents list fed
    """
    from aggregator_server.listing import as_json, table

    with opened(directory) as federation:
        members = federation.membership.members()
        evidence = federation.evidence.reputations()
    answer(json_path, table(members, evidence), as_json(members, evidence))


# One identity in 64 begins with a dash, which is no option then.
@app.command("revoke", context_settings={"ignore_unknown_options": True})
def revoke_agent(
    directory: Directory,
    identity: Annotated[
        str, typer.Argument(metavar="IDENTITY", help="From the list; its beginning will do.")
    ],
    json_path: JsonPath = None,
) -> None:
    """End a membership at once; its place in an open round goes to another.

    The agent comes back only by an invite made after this. What it sent before stays in the round
    and in the releases: see `releases rollback`.

    Example:
    sheepfold-server agents revoke fed k3Jx9Qb
    """
    from protocol.wire import b64u_encode

    with opened(directory) as federation:
        agent = b64u_encode(federation.membership.expel(identity))
    answer(json_path, f"{agent} is no member any more.", {"agent": agent})


@app.command("readmit", context_settings={"ignore_unknown_options": True})
def readmit_agent(
    directory: Directory,
    identity: Annotated[
        str, typer.Argument(metavar="IDENTITY", help="From the list; its beginning will do.")
    ],
    json_path: JsonPath = None,
) -> None:
    """End a member's quarantine; what rounds up to now said of it no longer counts.

    Example:
    sheepfold-server agents readmit fed k3Jx9Qb
    """
    from protocol.wire import b64u_encode

    with opened(directory) as federation:
        agent = b64u_encode(federation.membership.readmit(identity))
    answer(json_path, f"{agent} may be drawn again.", {"agent": agent})

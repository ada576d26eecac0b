"""`sheepfold-server helper`: what the second operator types."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aggregator_server.cli_shared import JsonPath, answer, sentences

if TYPE_CHECKING:
    from aggregator_server.helper.service import HelperService

app = typer.Typer(
    help="Be the second operator of a federation with helper masks: know masks, never updates.",
    no_args_is_help=True,
)
HelperDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="The helper's folder.")]


@app.command()
def init(directory: HelperDirectory, json_path: JsonPath = None) -> None:
    """Draw the helper's keys, and write helper.json for the federation's operator.

    Example:
    sheepfold-server helper init my-helper
    """
    from aggregator_server.helper.service import DESCRIPTION_NAME, found_helper
    from protocol.signing import format_fingerprint

    with sentences():
        description = found_helper(directory)
    path = directory / DESCRIPTION_NAME
    answer(
        json_path,
        f"Made a helper in {directory}, fingerprint {format_fingerprint(description.helper)}.\n"
        f"Hand {path} to the operator, who founds the federation with --masking helper --helper.\n"
        f"Then run: sheepfold-server helper serve {directory}",
        {"directory": str(directory), "description": str(path), **description.as_json()},
    )


@app.command()
def serve(
    directory: HelperDirectory,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.", min=0)] = 8751,
    tls_cert: Annotated[str, typer.Option(help="Certificate chain (PEM).")] = "",
    tls_key: Annotated[str, typer.Option(help="Its private key (PEM).")] = "",
    server: Annotated[
        list[str] | None,
        typer.Option(help="Identity of a server that may ask; again for more.  [default: any]"),
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Answer a federation's server, once for each round, until Ctrl-C.

    Plain http is served on loopback only.

    Example:
    sheepfold-server helper serve my-helper --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
    """
    from aggregator_server.config import LogFormat, ServerSection
    from aggregator_server.helper.service import HelperService
    from aggregator_server.helper_app import create_helper_app
    from aggregator_server.logs import configure_logs
    from aggregator_server.web.serving import run_app
    from protocol.wire import b64u_decode

    with sentences():
        settings = ServerSection(host=host, port=port, tls_cert=tls_cert, tls_key=tls_key)
        configure_logs(LogFormat.CONSOLE, verbose=False)
        allowed = frozenset(b64u_decode(name, n_bytes=32) for name in server or ())
        service = HelperService(directory, servers=allowed)
        try:
            run_app(
                create_helper_app(service),
                settings,
                on_ready=lambda url: _ready(url, service, json_path),
            )
        finally:
            service.close()


def _ready(url: str, service: "HelperService", json_path: Path | None) -> None:
    from protocol.signing import format_fingerprint

    fingerprint = format_fingerprint(service.description.helper).replace(" ", "-")
    answer(
        json_path,
        f"ready {url} helper fingerprint {fingerprint}",
        {"url": url, "fingerprint": fingerprint},
    )
    sys.stdout.flush()

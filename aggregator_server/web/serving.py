"""Runs the application: one process, one port, ready when it says so."""

import json
import resource
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn
from fastapi import FastAPI

from aggregator_server.addresses import base_url, is_loopback
from aggregator_server.app import create_app
from aggregator_server.config import ServerSection
from aggregator_server.errors import ConfigError
from aggregator_server.federation import Federation
from aggregator_server.web.connections import Connection
from protocol.limits import KIB
from protocol.signing import format_fingerprint

_GRACE_S: Final = 10
_KEEP_ALIVE_S: Final = 65
_MAX_HEAD_BYTES: Final = 16 * KIB


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a server can be reached, told once it accepts connections."""

    url: str
    federation: str
    fingerprint: str

    def line(self) -> str:
        """One line for people and scripts."""
        return f"ready {self.url} federation {self.federation} fingerprint {self.fingerprint}"

    def as_json(self) -> str:
        """The same as JSON."""
        return json.dumps(
            {"url": self.url, "federation": self.federation, "fingerprint": self.fingerprint}
        )


def check_address(settings: ServerSection) -> None:
    """Refuse plain http where others could read it.

    Args:
        settings: Host, TLS files, and whether a proxy stands in front.

    Raises:
        ConfigError: A host that is not loopback without TLS and without `behind_proxy`, or TLS
            files that cannot be used.
    """
    if bool(settings.tls_cert) != bool(settings.tls_key):
        msg = "tls_cert and tls_key go together; one of them is missing"
        raise ConfigError(msg)
    if settings.tls_cert:
        _check_tls_files(settings.tls_cert, settings.tls_key)
    elif not (settings.behind_proxy or is_loopback(settings.host)):
        _refuse_plain_http(settings.host)


def _check_tls_files(cert: str, key: str) -> None:
    def no_password() -> str:
        msg = f"tls_key {key} is encrypted; give one that is not, readable by the server alone"
        raise ConfigError(msg)

    try:
        for path in (cert, key):
            Path(path).read_bytes()  # ssl's own error does not name the file
        # Nobody is there to type a password when a server starts by itself.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, no_password)
    except (OSError, ValueError) as error:
        msg = f"the TLS files cannot be used: {error}"
        raise ConfigError(msg) from error


def _refuse_plain_http(host: str) -> None:
    msg = (
        f"host {host} is reachable from elsewhere and there is no TLS: give --tls-cert "
        "and --tls-key, or --behind-proxy if a proxy on this network ends TLS"
    )
    raise ConfigError(msg)


def run(federation: Federation, *, on_ready: Callable[[Listening], None]) -> None:
    """Serve a federation until SIGINT or SIGTERM.

    Args:
        federation: Open; the caller closes it.
        on_ready: Told once connections are accepted.

    Raises:
        ConfigError: Plain http where others could read it, TLS files that cannot be used, or an
            address that cannot be listened on.
    """
    charter = federation.charter

    def tell(url: str) -> None:
        fingerprint = format_fingerprint(charter.keys.server.identity).replace(" ", "-")
        on_ready(Listening(url=url, federation=charter.path_id, fingerprint=fingerprint))

    run_app(
        create_app(federation),
        federation.config.server,
        on_ready=tell,
        on_stop=federation.stop_waiting,
    )


def run_app(
    app: FastAPI,
    settings: ServerSection,
    *,
    on_ready: Callable[[str], None],
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Serve an application until SIGINT or SIGTERM.

    Args:
        app: What to serve.
        settings: Host, port and TLS.
        on_ready: Told the address once connections are accepted.
        on_stop: Called when the process is asked to stop.

    Raises:
        ConfigError: Plain http where others could read it, TLS files that cannot be used, or an
            address that cannot be listened on.
    """
    check_address(settings)
    _allow_many_connections()
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
        http=Connection,
        ws="none",
        lifespan="on",  # never without the clockwork
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
        timeout_keep_alive=_KEEP_ALIVE_S,
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
    )
    with _listen(settings.host, settings.port) as listening:
        _Server(config, settings, on_ready=on_ready, on_stop=on_stop).run([listening])


def _listen(host: str, port: int) -> socket.socket:
    # Not left to the library, which would end the process by itself with a status of its own.
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server((str(address[0]), port), family=family)
    except OSError as error:
        msg = f"cannot listen on host {host}, port {port}: {error.strerror}"
        raise ConfigError(msg) from error


def _allow_many_connections() -> None:
    # Each agent that polls holds a connection, and many systems begin with 1,024 open files.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Server(uvicorn.Server):
    """Tells when it is ready, and answers long polls at once when it stops."""

    def __init__(
        self,
        config: uvicorn.Config,
        settings: ServerSection,
        *,
        on_ready: Callable[[str], None],
        on_stop: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._settings = settings
        self._on_ready = on_ready
        self._on_stop = on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            self._on_ready(base_url(self._settings, port))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - theirs
        # Not the library's own handler: it would raise the signal again once all is shut down,
        # and a server that was asked to stop has done what it should.
        self._on_stop()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

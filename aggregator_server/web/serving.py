"""Runs the application: one process, one port, ready when it says so."""

import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from socket import socket
from types import FrameType
from typing import Final

import uvicorn

from aggregator_server.app import create_app
from aggregator_server.config import ServerSection
from aggregator_server.errors import ConfigError, InUseError
from aggregator_server.federation import Federation
from protocol.signing import format_fingerprint

_LOCK_NAME: Final = "serve.lock"
_GRACE_S: Final = 10
_KEEP_ALIVE_S: Final = 65


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
        ConfigError: A host that is not loopback without TLS and without `behind_proxy`, or only
            one of the two TLS files.
    """
    if bool(settings.tls_cert) != bool(settings.tls_key):
        msg = "tls_cert and tls_key go together; one of them is missing"
        raise ConfigError(msg)
    if settings.tls_cert or settings.behind_proxy or _is_loopback(settings.host):
        return
    msg = (
        f"host {settings.host} is reachable from elsewhere and there is no TLS: give --tls-cert "
        "and --tls-key, or --behind-proxy if a proxy on this network ends TLS"
    )
    raise ConfigError(msg)


@contextmanager
def only_server(directory: Path) -> Iterator[None]:
    """Hold the federation's folder: a second server would close rounds under the first.

    The lock ends with the process, however it ends.

    Raises:
        InUseError: Another process holds it.
    """
    descriptor = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            msg = f"another process serves {directory}; stop it first"
            raise InUseError(msg) from error
        yield
    finally:
        os.close(descriptor)


def run(federation: Federation, *, on_ready: Callable[[Listening], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        federation: Open; the caller closes it.
        on_ready: Told once connections are accepted.

    Raises:
        ConfigError: Plain http where others could read it, or TLS files that cannot be used.
    """
    settings = federation.config.server
    check_address(settings)
    try:
        config = uvicorn.Config(
            create_app(federation),
            host=settings.host,
            port=settings.port,
            ssl_certfile=settings.tls_cert or None,
            ssl_keyfile=settings.tls_key or None,
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
        config.load()
    except (OSError, ValueError) as error:
        msg = f"the TLS files cannot be used: {error}"
        raise ConfigError(msg) from error
    _Server(config, federation, on_ready).run()


class _Server(uvicorn.Server):
    """Tells when it is ready, and answers long polls at once when it stops."""

    def __init__(
        self, config: uvicorn.Config, federation: Federation, on_ready: Callable[[Listening], None]
    ) -> None:
        super().__init__(config)
        self._federation = federation
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready(self._listening())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - theirs
        # Not the library's own handler: it would raise the signal again once all is shut down,
        # and a server that was asked to stop has done what it should.
        self._federation.stop_waiting()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    def _listening(self) -> Listening:
        settings = self._federation.config.server
        port = self.servers[0].sockets[0].getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        scheme = "https" if settings.tls_cert else "http"
        charter = self._federation.charter
        return Listening(
            url=f"{scheme}://{host}:{port}",
            federation=charter.path_id,
            fingerprint=format_fingerprint(charter.keys.server.identity).replace(" ", "-"),
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

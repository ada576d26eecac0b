"""Under which address agents reach a server, as far as it can know."""

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from aggregator_server.config import ServerSection

_SET_IT: Final = "set public_url in [server] of federation.toml"


@dataclass(frozen=True, kw_only=True)
class JoinAddress:
    """What an invite tells volunteers."""

    url: str | None
    """None when no address is known that an agent can use."""
    note: str | None
    """What the operator should know of it, in one sentence."""


def join_address(settings: ServerSection, *, running: str | None) -> JoinAddress:
    """The address for an invite.

    | Situation | Address |
    | --- | --- |
    | `public_url` is set | that |
    | https on a host of its own | where the server listens, or would |
    | loopback | the same, with a note |
    | all addresses, or plain http for a proxy | none, with a note |

    Args:
        settings: `[server]`.
        running: Where a server listens now; None when none runs.
    """
    if settings.public_url:
        return JoinAddress(url=settings.public_url.rstrip("/"), note=None)
    url = running or base_url(settings, settings.port)
    host = urlsplit(url).hostname or ""
    if urlsplit(url).port == 0:
        return JoinAddress(
            url=None, note=f"No server runs, and its port is any free one: start it, or {_SET_IT}."
        )
    if is_loopback(host):
        note = f"Only agents on this machine reach {url}; for others {_SET_IT}."
        return JoinAddress(url=url, note=note)
    if _is_unspecified(host) or url.startswith("http:"):
        note = (
            f"Agents cannot reach a server at {host}: {_SET_IT} to the https address that they can."
        )
        return JoinAddress(url=None, note=note)
    return JoinAddress(url=url, note=None)


def base_url(settings: ServerSection, port: int) -> str:
    """The URL of a server that listens on a port by these settings."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.tls_cert else 'http'}://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, seen from itself."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_unspecified(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False

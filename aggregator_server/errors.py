"""Errors of the server.

```
ServerError
├── ConfigError          federation.toml, an environment variable or a flag that cannot be honoured
├── KeyFileError         a key file that is missing, damaged or readable by others
├── StoreError           the database cannot be used
│   ├── SchemaError      it was written by a newer version, or is not a federation's
│   ├── StoreBusyError   it does not answer now; trying again may help
│   └── StaleWriteError  what the write was based on has changed meanwhile; nothing was written
├── BlobError            a blob cannot be read or written
│   ├── BlobMissingError no such blob
│   └── NoSpaceError     the disk is full, or nearly so; nothing was stored
├── ChainError           the releases do not follow one another
├── AggregationError     an average that cannot be published
├── MemberError          no member, or several, of the name that was given
├── HelperError          the helper cannot be reached, refuses, or answers what it should not
├── InUseError           another process serves this federation
└── Refusal              a request that gets a problem document; nothing was changed
```
"""

from collections.abc import Mapping

from protocol.problems import ProblemType


class ServerError(Exception):
    """Root of everything that `aggregator_server` raises."""


class ConfigError(ServerError):
    """A setting that cannot be honoured; names the key, the value and what is accepted."""


class KeyFileError(ServerError):
    """A key file that is missing, damaged or readable by others."""


class StoreError(ServerError):
    """The database cannot be used."""


class SchemaError(StoreError):
    """The database was written by a newer version, or holds no federation."""


class StoreBusyError(StoreError):
    """The database does not answer now; trying again may help."""


class StaleWriteError(StoreError):
    """What a write was based on has changed meanwhile; nothing was written."""


class BlobError(ServerError):
    """A blob cannot be read or written."""


class BlobMissingError(BlobError):
    """No such blob."""


class NoSpaceError(BlobError):
    """The disk is full, or has less than the configured free space; nothing was stored."""


class ChainError(ServerError):
    """The releases do not follow one another, or are not signed by this server."""


class AggregationError(ServerError):
    """An average that cannot be published."""


class MemberError(ServerError):
    """No member, or several, of the name that was given."""


class HelperError(ServerError):
    """The helper cannot be reached, refuses, or answers what it should not."""


class InUseError(ServerError):
    """Another process serves this federation."""


class Refusal(ServerError):  # noqa: N818 - an answer to the agent, not a fault of the server
    """A request that gets a problem document; nothing was changed.

    Args:
        problem: Its type, which carries the HTTP status and the agent's next step.
        detail: What, where, the limit, what to do; no secrets.
        retry_after_s: Least wait before the next try.
    """

    def __init__(
        self, problem: ProblemType, detail: str, *, retry_after_s: float | None = None
    ) -> None:
        """Refuse with a problem type."""
        super().__init__(detail)
        self.problem = problem
        self.detail = detail
        self.retry_after_s = retry_after_s


def refuse_first(problem: ProblemType, faults: Mapping[str, bool]) -> None:
    """Refuse for the first fault that is there.

    Args:
        problem: The type of the refusal.
        faults: What is wrong, in words, and whether it is.

    Raises:
        Refusal: One of them is there.
    """
    for fault, found in faults.items():
        if found:
            raise Refusal(problem, fault)

"""Errors of the agent.

```
AgentError
├── DataError                  a source that cannot be read, or holds nothing to train on
│   ├── MalformedRecordError   one record that cannot be used; fatal only if the owner asked
│   └── TemplateError          a template that cannot be applied with this tokenizer or length
├── ExportTargetError          something is in the way of an export
├── EvaluationError            a model or set of examples that cannot be scored
├── TrainingError              training that gave nothing to send, or could not go on
│   ├── TrainingStoppedError   the owner stopped it; its state was saved
│   ├── OutOfMemoryError       not even one example fits
│   └── CheckpointError        the training state cannot be written
├── ConfigError                a setting that cannot be honoured
├── JournalError               a home or journal that cannot be used
├── TransportError             the server cannot be reached, or does not speak this protocol
│   ├── UnreachableError       no whole answer; the same body may be sent again
│   ├── OtherBytesError        a download is not what its digest promises
│   └── RefusedError           a problem document
└── TrustError                 signatures, chain or manifest contradict what the server sent
```
"""

from protocol.checks import Check
from protocol.problems import ProblemDocument


class AgentError(Exception):
    """Root of everything that `edge_agent` raises."""


class DataError(AgentError):
    """A source of records that cannot be read, or that holds no usable record."""


class MalformedRecordError(DataError):
    """One record that cannot be used.

    Attributes:
        location: where it stands, such as `records.jsonl:12` or `records.json[3]`.
        reason: what is wrong with it, in words for its owner.
    """

    def __init__(self, location: str, reason: str) -> None:
        """Name the record and what is wrong with it.

        Args:
            location: where the record stands.
            reason: what is wrong with it.
        """
        super().__init__(f"{location}: {reason}")
        self.location = location
        self.reason = reason


class TemplateError(DataError):
    """A prompt template that cannot be applied with this tokenizer or at this length."""


class ExportTargetError(AgentError):
    """Something is in the way of an export; it was not touched."""


class EvaluationError(AgentError):
    """A model or a set of examples that cannot be scored."""


class TrainingError(AgentError):
    """Training that gave nothing to send, or could not go on."""


class TrainingStoppedError(TrainingError):
    """The owner stopped a training; its state was saved."""


class OutOfMemoryError(TrainingError):
    """Not even one example fits into the memory that the owner allows."""


class CheckpointError(TrainingError):
    """The training state cannot be written."""


class ConfigError(AgentError):
    """A setting that cannot be honoured; the message names it and what is accepted."""


class JournalError(AgentError):
    """A home or journal that cannot be used: none, of a newer version, or in use."""


class TransportError(AgentError):
    """The server cannot be reached, or does not speak this protocol."""


class UnreachableError(TransportError):
    """No answer, or none that is whole; the same body may be sent again."""


class OtherBytesError(TransportError):
    """A download is not what its digest promises; nothing of it is used."""


class RefusedError(TransportError):
    """The server refused; `document` says why and what to do next."""

    def __init__(self, document: ProblemDocument) -> None:
        """Keep the problem document."""
        super().__init__(f"{document.title} {document.detail}".strip())
        self.document = document


class TrustError(AgentError):
    """The server sent something that its signatures, its chain or its manifest contradict.

    Attributes:
        check: Which check of PROTOCOL's list failed, if it is one of them.
    """

    def __init__(self, message: str, check: Check | None = None) -> None:
        """Name what was found, and the check."""
        super().__init__(message if check is None else f"{message} {check.code}")
        self.check = check

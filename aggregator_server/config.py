"""The settings of a federation: `federation.toml` as one frozen tree.

The recipe (`federation`, `lora`, `training`, `aggregation`, `masking`, `rounds`, `change_limits`)
goes into the manifest that volunteers accept, so it stands in the file alone. `[server]` is how
this server is run: flags beat the environment (`SHEEPFOLD_SERVER_<KEY>`), which beats the file.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from aggregator_server.errors import ConfigError
from protocol import limits
from protocol.blocks import (
    SENT,
    AggregationBlock,
    CellMasking,
    ChangeLimitsBlock,
    EvaluatorGate,
    FilterBlock,
    GateBlock,
    HelperMasking,
    LoraBlock,
    LoraRule,
    MaskingBlock,
    NoGate,
    NoMasking,
    RoundsBlock,
    TrainingBlock,
)
from protocol.numbers import Text
from protocol.privacy import (
    AgentPrivacy,
    CentralPrivacy,
    ExamplePrivacy,
    NoPrivacy,
    PrivacyBlock,
)

ENVIRONMENT_PREFIX: Final = "SHEEPFOLD_SERVER_"
Setting: TypeAlias = str | int | float | bool
_MIB: Final = limits.MIB
_MASKING: Final = {"cells": CellMasking, "helper": HelperMasking}
_PRIVACY: Final = {"P1": ExamplePrivacy, "P2": AgentPrivacy, "P3": CentralPrivacy}
_GATES: Final = {"evaluator": EvaluatorGate}
_SECRET_KEYS: Final = frozenset({"database_url", "blobs_url"})
_PASSWORDS: Final = (
    (re.compile(r"(?<=://)([^:/@]*):[^@]*@"), r"\1@"),
    (re.compile(r"(?i)([?&])(?:ssl)?password=[^&]*&?"), r"\1"),
)


class Enrolment(StrEnum):
    """Who may join."""

    INVITE = "invite"
    OPEN = "open"


class Retention(StrEnum):
    """What happens to plain updates once the release that they went into is journalled."""

    DELETE = "delete"
    KEEP = "keep"


class LogFormat(StrEnum):
    """How log lines look."""

    CONSOLE = "console"
    JSON = "json"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FederationSection(_Section):
    """What the federation is called."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: Text = ""


class ServerSection(_Section):
    """How this server is run; nothing here is part of the manifest."""

    enrolment: Enrolment = Enrolment.INVITE
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8750
    public_url: Annotated[str, Field(pattern=r"^(https?://[^\s/]\S*)?$")] = ""
    tls_cert: str = ""
    tls_key: str = ""
    behind_proxy: bool = False
    database_url: SecretStr = SecretStr("")
    blobs_url: SecretStr = SecretStr("")
    retention: Retention = Retention.DELETE
    min_free_bytes: Annotated[int, Field(ge=0)] = 512 * _MIB
    presence_s: Annotated[float, Field(ge=2 * limits.LONG_POLL_S, le=24 * 3600)] = 120.0
    quarantine: bool = False
    helper_url: Annotated[str, Field(pattern=r"^(https?://[^\s/]+/?)?$")] = ""
    unmask_processes: Annotated[int, Field(ge=1, le=256)] = 1
    log_format: LogFormat = LogFormat.CONSOLE


class ServerConfig(_Section):
    """The whole of `federation.toml`."""

    federation: FederationSection
    lora: LoraBlock
    training: TrainingBlock
    aggregation: AggregationBlock = AggregationBlock()
    masking: MaskingBlock = NoMasking()
    privacy: PrivacyBlock = NoPrivacy()
    filter: FilterBlock = FilterBlock()
    gate: GateBlock = NoGate()
    rounds: RoundsBlock
    change_limits: ChangeLimitsBlock = ChangeLimitsBlock()
    server: ServerSection = ServerSection()


def load_config(
    path: Path,
    *,
    environment: Mapping[str, str],
    flags: Mapping[str, Setting | None] | None = None,
) -> ServerConfig:
    """Read `federation.toml`, then the environment, then flags.

    Args:
        path: The file.
        environment: Such as `os.environ`; only `SHEEPFOLD_SERVER_<KEY>` is looked at.
        flags: Keys of `[server]`; None stands for a flag that was not given.

    Raises:
        ConfigError: The file cannot be read, or a key is unknown, missing or out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror}; `sheepfold-server init` writes it"
        raise ConfigError(msg) from error
    return parse_config(text, source=str(path), environment=environment, flags=flags or {})


def parse_config(
    text: str,
    *,
    source: str,
    environment: Mapping[str, str],
    flags: Mapping[str, Setting | None],
) -> ServerConfig:
    """Read settings from the text of a TOML file, the environment and flags.

    Args:
        text: TOML.
        source: What to call the text in messages.
        environment: Only `SHEEPFOLD_SERVER_<KEY>` is looked at.
        flags: Keys of `[server]`; None stands for a flag that was not given.

    Raises:
        ConfigError: Not TOML, or a key is unknown, missing or out of range.
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        msg = f"{source} is not TOML: {error}"
        raise ConfigError(msg) from error
    _refuse_unknown(tree, ServerConfig, source, ())
    server = {
        **tree.get("server", {}),
        **_from_environment(environment),
        **{key: value for key, value in flags.items() if value is not None},
    }
    tree["server"] = server
    training = tree.get("training", {})
    if training.get("max_grad_norm") == 0:  # TOML has no null
        training["max_grad_norm"] = None
    lora = tree.get("lora", {})
    if lora.get("rule") in set(LoraRule):
        lora.setdefault("sent", SENT[LoraRule(lora["rule"])])
    try:
        # By way of JSON, in which arrays may become tuples and strings enumerations, while the
        # manifest's blocks stay strict about everything else.
        return ServerConfig.model_validate_json(json.dumps(tree))
    except (TypeError, ValueError) as error:
        raise ConfigError(_explain(error, source)) from error


def secret_settings(settings: ServerSection) -> list[str]:
    """The environment variables that must be set, as the file does not hold their passwords."""
    urls = {key: getattr(settings, key).get_secret_value() for key in sorted(_SECRET_KEYS)}
    return [
        ENVIRONMENT_PREFIX + key.upper()
        for key, url in urls.items()
        if without_password(url) != url
    ]


def without_password(url: str) -> str:
    """A URL of a database or of blobs as it may be written down and shown."""
    for pattern, kept in _PASSWORDS:
        url = pattern.sub(kept, url)
    return url.rstrip("?&")


def _from_environment(environment: Mapping[str, str]) -> dict[str, Setting]:
    known = {ENVIRONMENT_PREFIX + key.upper(): key for key in ServerSection.model_fields}
    found: dict[str, Setting] = {}
    for name, value in environment.items():
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        if name not in known:
            msg = f"the environment sets {name}, which is no setting{_nearest(name, list(known))}"
            raise ConfigError(msg)
        found[known[name]] = value
    return found


def _refuse_unknown(
    tree: Mapping[str, Any], model: type[BaseModel], source: str, where: tuple[str, ...]
) -> None:
    fields = {name: info for name, info in model.model_fields.items() if name != "version"}
    for key, value in tree.items():
        if key not in fields:
            name = ".".join((*where, key))
            msg = f"{source}: unknown key {name!r}{_nearest(key, list(fields))}"
            raise ConfigError(msg)
        inner = fields[key].annotation
        if key == "masking" and isinstance(value, Mapping):
            inner = _MASKING.get(str(value.get("mode")), NoMasking)
        if key == "privacy" and isinstance(value, Mapping):
            inner = _PRIVACY.get(str(value.get("profile")), NoPrivacy)
        if key == "gate" and isinstance(value, Mapping):
            inner = _GATES.get(str(value.get("rule")), NoGate)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            if not isinstance(value, Mapping):
                msg = f"{source}: [{key}] must be a section"
                raise ConfigError(msg)
            _refuse_unknown(value, inner, source, (*where, key))


def _nearest(key: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(valid))}"


def _explain(error: Exception, source: str) -> str:
    if not isinstance(error, ValidationError):
        return f"{source}: {error}"
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    secret = bool(_SECRET_KEYS & {str(part) for part in first["loc"]})
    given = (
        "" if secret or first["type"] == "missing" else f" (given: {str(first['input'])[:80]!r})"
    )
    return f"{source}: {where}: {first['msg']}{given}"

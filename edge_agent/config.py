"""The volunteer's settings: flags beat the environment, which beats `agent.toml` in the home.

Environment variables begin with `SHEEPFOLD_AGENT_`, for instance `SHEEPFOLD_AGENT_THREADS=2`.
"""

import datetime as dt
import difflib
import json
import re
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Self

import platformdirs
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from edge_agent.data.records import OnMalformed
from edge_agent.errors import ConfigError
from protocol import limits

SETTINGS_NAME: Final = "agent.toml"
_HOURS: Final = re.compile(r"^(\d{1,2})-(\d{1,2})$")
_HOURS_A_DAY: Final = 24


def default_home() -> Path:
    """Where the agent keeps key, journal and cache, unless told otherwise."""
    return platformdirs.user_data_path("sheepfold-agent", appauthor=False)


def default_ledger() -> Path:
    """The owner's privacy ledger: of the machine, so that another home is no second budget."""
    return platformdirs.user_data_path("sheepfold-privacy", appauthor=False) / "ledger.sqlite"


class Hours(str):
    """Hours of the day in which training may run, such as `22-07`: from 22:00 to 06:59."""

    __slots__ = ()

    def allows(self, moment: dt.datetime) -> bool:
        """Whether a local time lies within these hours.

        Args:
            moment: Local time.
        """
        first, last = (int(part) for part in self.split("-"))
        if first == last:
            return True
        if first < last:
            return first <= moment.hour < last
        return moment.hour >= first or moment.hour < last


class DpEngine(StrEnum):
    """What makes the gradients of single examples under DP-SGD."""

    SHEEPFOLD = "sheepfold"
    OPACUS = "opacus"
    """The field's reference, to compare: slower, and without recomputed activations."""


class AgentSettings(BaseSettings):
    """What the owner allows. Nothing here makes more leave the machine."""

    model_config = SettingsConfigDict(env_prefix="SHEEPFOLD_AGENT_", frozen=True, extra="forbid")

    base: str | None = None
    """Folder of the base model; None: fetch the one that the federation names."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    max_vram_gb: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    hours: str | None = None
    on_malformed: OnMalformed = OnMalformed.SKIP
    min_cell: Annotated[int, Field(ge=0, le=limits.MAX_CELL)] = 0
    """Fewest agents of a masked cell that the owner accepts; 0: the manifest's."""
    friends: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")], ...] = ()
    """Identities of agents that the owner trusts, in base64url."""
    min_friends: Annotated[int, Field(ge=0, le=limits.MAX_CELL)] = 0
    """How many of them must be in a masked cell."""

    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Rank rows to train where the federation allows ranks of one's own; None: all that fit."""
    leave_out: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = ()
    """Modules not to train, of those that the federation allows to leave out."""

    epsilon: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """The largest ε of differential privacy that the owner accepts; None: the federation's, ∞."""
    ledger: str | None = None
    """Another file for the privacy ledger than the machine's own."""
    dp_engine: DpEngine = DpEngine.SHEEPFOLD
    """What makes the gradients of single examples; clipping, noise and account are the same."""

    @field_validator("base")
    @classmethod
    def _base(cls, value: str | None) -> str | None:
        if value is None or not (folder := Path(value).expanduser()).is_dir():
            return value
        return str(folder.absolute())  # `run` may be started from anywhere

    @field_validator("hours")
    @classmethod
    def _hours(cls, value: str | None) -> str | None:
        if value is None:
            return None
        match = _HOURS.match(value)
        if not match or any(int(hour) > _HOURS_A_DAY for hour in match.groups()):
            msg = f"hours must look like 22-07 (from 22:00 until 07:00), not {value!r}"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _friends(self) -> Self:
        if self.min_friends > len(set(self.friends)):
            msg = f"min_friends is {self.min_friends}, and friends names {len(set(self.friends))}"
            raise ValueError(msg)
        return self

    @property
    def ledger_path(self) -> Path:
        """Where the owner's privacy ledger lies."""
        return default_ledger() if self.ledger is None else Path(self.ledger).expanduser()

    @property
    def allowed_hours(self) -> Hours | None:
        """The hours as a window, or None when every hour is allowed."""
        return None if self.hours is None else Hours(self.hours)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only arguments and the environment; the file is read by `load_settings`."""
        del settings_cls, dotenv_settings, file_secret_settings
        return init_settings, env_settings


def load_settings(home: Path, flags: dict[str, Any]) -> AgentSettings:
    """The settings for a home.

    Args:
        home: Whose `agent.toml` is read, if it exists.
        flags: What was given on the command line; None means "not given".

    Raises:
        ConfigError: An unknown key, with the nearest valid one, or a value that is not accepted.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    known = set(AgentSettings.model_fields)
    path = home / SETTINGS_NAME
    in_file: dict[str, Any] = {}
    if path.exists():
        try:
            in_file = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            msg = f"cannot read {path}: {error}"
            raise ConfigError(msg) from error
    for key in in_file.keys() | given.keys():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {sorted(known)}"
            msg = f"unknown setting {key!r}{hint}"
            raise ConfigError(msg)
    try:
        from_environment = AgentSettings().model_dump(exclude_unset=True)
        return AgentSettings(**{**in_file, **from_environment, **given})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        msg = f"setting {where!r}: {first['msg']} (given: {first['input']!r})"
        raise ConfigError(msg) from error


def save_settings(home: Path, settings: AgentSettings) -> None:
    """Write `agent.toml`, so that the next `run` needs no flags.

    Args:
        home: Must exist.
        settings: What to keep; defaults are left out.
    """
    lines = ["# Sheepfold agent. Flags and SHEEPFOLD_AGENT_* variables beat this file."]
    values = settings.model_dump(mode="json", exclude_defaults=True)
    # A JSON string or number is a TOML one too, but for the escaped halves of a surrogate pair.
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    (home / SETTINGS_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")

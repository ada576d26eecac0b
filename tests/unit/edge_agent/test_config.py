"""The volunteer's settings: flags beat the environment, which beats the file."""

import datetime as dt
import tomllib
from pathlib import Path

import pytest

from edge_agent.config import (
    SETTINGS_NAME,
    AgentSettings,
    Hours,
    default_home,
    load_settings,
    save_settings,
)
from edge_agent.data.records import OnMalformed
from edge_agent.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in AgentSettings.model_fields:
        monkeypatch.delenv(f"SHEEPFOLD_AGENT_{field.upper()}", raising=False)


def write(home: Path, text: str) -> None:
    (home / SETTINGS_NAME).write_text(text, encoding="utf-8")


def test_without_anything_there_are_defaults(tmp_path: Path) -> None:
    settings = load_settings(tmp_path / "missing", {"threads": None, "hours": None})
    assert settings == AgentSettings()
    assert settings.on_malformed is OnMalformed.SKIP
    assert settings.allowed_hours is None


def test_flags_beat_the_environment_which_beats_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 'threads = 1\nhours = "01-02"\ndevice = "cpu"\n')
    monkeypatch.setenv("SHEEPFOLD_AGENT_THREADS", "2")
    monkeypatch.setenv("SHEEPFOLD_AGENT_HOURS", "02-03")
    settings = load_settings(tmp_path, {"threads": 3, "device": None})
    assert (settings.threads, settings.hours, settings.device) == (3, "02-03", "cpu")


def test_variables_of_other_things_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHEEPFOLD_AGENT_HOME", str(tmp_path))
    monkeypatch.setenv("SHEEPFOLD_AGENT_SOMETHING", "x")
    assert load_settings(tmp_path, {}) == AgentSettings()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("thread = 2", "unknown setting 'thread'; did you mean 'threads'"),
        ("xyz = 2", "unknown setting 'xyz'; known: "),
        ("threads = 0", "setting 'threads'.*given: 0"),
        ("threads = 1.5", "setting 'threads'"),
        ('device = "gpu"', "setting 'device'"),
        ('device = "cuda:"', "setting 'device'"),
        ('device = "cpu\\n"', "setting 'device'"),
        ("max_vram_gb = 0", "setting 'max_vram_gb'"),
        ("max_vram_gb = inf", "setting 'max_vram_gb'"),
        ("max_vram_gb = nan", "setting 'max_vram_gb'"),
        ('hours = "22"', "must look like 22-07"),
        ('hours = "25-07"', "must look like 22-07"),
        ('hours = "22-07h"', "must look like 22-07"),
        ('hours = "-1-07"', "must look like 22-07"),
        ("hours = 22", "setting 'hours'"),
        ('on_malformed = "ignore"', "setting 'on_malformed'"),
        ("threads = ", "cannot read"),
        ("\x00", "cannot read"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_named(tmp_path: Path, text: str, says: str) -> None:
    write(tmp_path, text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_settings(tmp_path, {})
    assert "\n" not in str(caught.value)


def test_a_wrong_flag_or_variable_is_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="'hours'"):
        load_settings(tmp_path, {"hours": "night"})
    with pytest.raises(ConfigError, match="did you mean 'max_vram_gb'"):
        load_settings(tmp_path, {"max_vram": 3})
    monkeypatch.setenv("SHEEPFOLD_AGENT_THREADS", "many")
    with pytest.raises(ConfigError, match="'threads'"):
        load_settings(tmp_path, {})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    settings = AgentSettings(
        base='/models/a "b" \\c\'s/モデル/🐑/\ttab',
        device="cuda:1",
        threads=3,
        max_vram_gb=11.5,
        hours="22-07",
        on_malformed=OnMalformed.FAIL,
    )
    save_settings(tmp_path, settings)
    assert load_settings(tmp_path, {}) == settings
    save_settings(tmp_path, AgentSettings())
    assert tomllib.loads((tmp_path / SETTINGS_NAME).read_text(encoding="utf-8")) == {}


def test_a_folder_with_the_base_is_kept_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service starts elsewhere."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_settings(tmp_path, {"base": "models"}).base == str(tmp_path / "models")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_settings(tmp_path, {"base": "~/models"}).base == str(tmp_path / "models")
    assert load_settings(tmp_path, {"base": "org/model"}).base == "org/model"


@pytest.mark.parametrize(
    ("hours", "allowed"),
    [
        ("22-07", {22, 23, 0, 1, 2, 3, 4, 5, 6}),
        ("09-17", set(range(9, 17))),
        ("0-24", set(range(24))),
        ("22-24", {22, 23}),
        ("24-2", {0, 1}),
        ("22-0", {22, 23}),
        ("5-5", set(range(24))),
        ("0-0", set(range(24))),
    ],
)
def test_hours_are_a_window_that_may_span_midnight(hours: str, allowed: set[int]) -> None:
    window = AgentSettings(hours=hours).allowed_hours
    assert window is not None
    for hour in range(24):
        for minute in (0, 59):
            moment = dt.datetime(2026, 1, 1, hour, minute, tzinfo=dt.UTC)
            assert window.allows(moment) is (hour in allowed)


def test_hours_are_text() -> None:
    assert f"{Hours('22-07')}" == "22-07"


def test_the_default_home_is_a_folder_of_the_users() -> None:
    assert default_home().is_absolute()
    assert default_home().name == "sheepfold-agent"

"""Processes of their own, which end with the test that started them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations.processes import Process


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes find the packages where this process did."""
    import protocol

    monkeypatch.setenv("PYTHONPATH", str(Path(protocol.__file__).parents[1]))


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    """Whatever is put in here is killed in the end."""
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()

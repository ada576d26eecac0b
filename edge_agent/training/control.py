"""What the owner wants of a running agent, asked before every micro-batch."""

from enum import StrEnum
from typing import Protocol


class Wish(StrEnum):
    """What the owner wants of a running training."""

    GO = "go"
    PAUSE = "pause"
    STOP = "stop"


class Control(Protocol):
    """Asked before every micro-batch."""

    def wish(self) -> Wish:
        """What the owner wants now."""
        ...


class Unattended:
    """A control that never interferes."""

    def wish(self) -> Wish:
        """Go on."""
        return Wish.GO

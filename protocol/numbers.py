"""Numbers of the wire, each with its range."""

from typing import Annotated

from pydantic import Field

from protocol import limits

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0, le=limits.MAX_COUNT)]
PositiveInt = Annotated[int, Field(ge=1, le=limits.MAX_COUNT)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
RoundNumber = Annotated[int, Field(ge=1, le=2**31 - 1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Text = Annotated[str, Field(max_length=limits.MAX_TEXT_CHARS)]
Seconds = Annotated[float, Field(gt=0.0, le=30 * 24 * 3600)]
UnixSeconds = Annotated[int, Field(ge=10**9, lt=10**10)]
"""Whole seconds since the Unix epoch, always of ten digits: its size tells nothing."""
UnixTime = Annotated[float, Field(ge=0.0, lt=253_402_300_800.0)]  # up to the year 9999

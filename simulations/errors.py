"""Errors of the laboratory.

```
SimulationError
├── OutputError     a place for results that cannot be used
└── ProcessError    a server or agent process that did not do its part
```
"""


class SimulationError(Exception):
    """Root of everything that `simulations` raises."""


class OutputError(SimulationError):
    """A place for results that cannot be used."""


class ProcessError(SimulationError):
    """A server or agent process that did not start, or ended with an error."""

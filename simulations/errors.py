"""Errors of the laboratory.

```
SimulationError
├── OutputError     a place for results that cannot be used
├── PartitionError  records that cannot be split so, or a manifest that does not fit
└── ProcessError    a server or agent process that did not do its part
```
"""


class SimulationError(Exception):
    """Root of everything that `simulations` raises."""


class OutputError(SimulationError):
    """A place for results that cannot be used."""


class PartitionError(SimulationError):
    """Records that cannot be split as asked, or a partition's manifest that does not fit."""


class ProcessError(SimulationError):
    """A server or agent process that did not start, or ended with an error."""

"""Errors of the laboratory.

```
SimulationError
├── AttackError        an attack that cannot be made with what its attackers have
├── AuditInputError    an audit that cannot be made of this
├── ClaimRefutedError  an audit that found more than what is claimed
├── JudgeError         a judge that cannot be asked, or whose answer cannot be read
├── OutputError        a place for results that cannot be used
├── PartitionError     records that cannot be split so, or a manifest that does not fit
├── PopulationError    agents that no round can be made with, or a file that describes none
└── ProcessError       a server or agent process that did not do its part
```
"""


class SimulationError(Exception):
    """Root of everything that `simulations` raises."""


class AttackError(SimulationError):
    """An attack that cannot be made: of these numbers, these updates or these records."""


class AuditInputError(SimulationError):
    """An audit that cannot be made: of these settings, these records or this release."""


class ClaimRefutedError(SimulationError):
    """A lower bound that exceeds the ε that is claimed: the claim is wrong, or the code is."""


class JudgeError(SimulationError):
    """A judge that cannot be asked, an answer of its that cannot be read, or nothing to compare."""


class OutputError(SimulationError):
    """A place for results that cannot be used."""


class PartitionError(SimulationError):
    """Records that cannot be split as asked, or a partition's manifest that does not fit."""


class PopulationError(SimulationError):
    """A population that cannot be read, or with which a federation's rules close no rounds."""


class ProcessError(SimulationError):
    """A server or agent process that did not start, or ended with an error."""

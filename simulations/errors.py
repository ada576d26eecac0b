"""Errors of the laboratory.

```
SimulationError
├── AttackError        an attack that cannot be made with what its attackers have
├── AuditInputError    an audit that cannot be made of this
├── ClaimRefutedError  an audit that found more than what is claimed
├── EngineError        virtual agents that cannot be run, or a worker that died
├── ExperimentError    an experiment that cannot be run as it is written
├── JudgeError         a judge that cannot be asked, or whose answer cannot be read
├── MaskedCellError    a masked cell that no federation would form, or words that do not fit it
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


class EngineError(SimulationError):
    """An engine that cannot start, or a worker of it that ended in the midst of its work."""


class ExperimentError(SimulationError):
    """An experiment's file, or what it asks for, that cannot be."""


class JudgeError(SimulationError):
    """A judge that cannot be asked, an answer of its that cannot be read, or nothing to compare."""


class MaskedCellError(SimulationError):
    """A masked cell that no federation would form, or words that do not fit its plan."""


class OutputError(SimulationError):
    """A place for results that cannot be used."""


class PartitionError(SimulationError):
    """Records that cannot be split as asked, or a partition's manifest that does not fit."""


class PopulationError(SimulationError):
    """A population that cannot be read, or with which a federation's rules close no rounds."""


class ProcessError(SimulationError):
    """A server or agent process that did not start, or ended with an error."""

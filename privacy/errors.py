"""Errors of the mathematics of privacy.

```
PrivacyError
├── EncodingPlanError     an encoding in which a sum could wrap
├── UpdateRangeError      an update that does not fit the encoding, or is not finite
├── ShareError            shares from which a secret cannot be rebuilt
├── MaskedMessageError    a message of an agent that the server refuses
├── SumError              a sum that is not the one of the members that it should be of
├── ClippingError         a gradient that cannot be clipped example by example
├── AuditError            scores from which an audit can say nothing
├── NoiseError            noise that cannot be drawn, or would not protect (a ValueError too)
│   └── DrownedError      noise under which nothing of the updates would be left
└── LedgerError           a ledger that cannot be read or written, or a charge that contradicts it
    └── BudgetError       a round that would spend more ε than the owner allows
```

A refusal of the agent is a `protocol.checks.CheckError`.
"""


class PrivacyError(Exception):
    """Root of everything that `privacy` raises."""


class EncodingPlanError(PrivacyError):
    """An encoding in which a sum could wrap, or a value cannot be told from zero."""


class UpdateRangeError(PrivacyError):
    """An update that does not fit the encoding, or has values that are not finite."""


class ShareError(PrivacyError):
    """Shares from which a secret cannot be rebuilt."""


class MaskedMessageError(PrivacyError):
    """A message of an agent that contradicts its cell; nothing of it is kept."""


class SumError(PrivacyError):
    """A sum whose count, weight or check words are not those of the members it should be of."""


class ClippingError(PrivacyError):
    """A gradient that cannot be clipped example by example, or a mechanism that is none."""


class AuditError(PrivacyError):
    """Scores or settings from which an audit can say nothing: shapes, values, levels."""


class LedgerError(PrivacyError):
    """A ledger that cannot be read or written, or a charge that contradicts what it holds."""


class BudgetError(LedgerError):
    """A round that would spend more ε than the owner allows, or an owner who allowed none yet."""


class AccountingError(PrivacyError):
    """A privacy budget that cannot be kept, or a composition whose ε cannot be trusted."""


class NoiseError(PrivacyError, ValueError):
    """Noise that cannot be drawn, would wrap a sum, or would not protect as it is accounted for."""


class DrownedError(NoiseError):
    """Noise under which nothing of the updates would be left: too many values for the agents."""

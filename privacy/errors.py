"""Errors of the mathematics of privacy.

```
PrivacyError
├── EncodingPlanError     an encoding in which a sum could wrap
├── UpdateRangeError      an update that does not fit the encoding, or is not finite
├── ShareError            shares from which a secret cannot be rebuilt
├── MaskedMessageError    a message of an agent that the server refuses
└── SumError              a sum that is not the one of the members that it should be of
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

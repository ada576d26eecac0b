"""Errors of the shared vocabulary.

```
ProtocolError
├── EncodingError      bytes or JSON that are not in the one accepted form
├── ManifestError      a manifest that this version cannot honour
├── LayoutError        a vector layout that contradicts itself
├── SignatureError     a signature, key, time or nonce that does not hold
├── InviteError        an invite code that cannot be read
├── CheckError         a check of the agent that failed (in `protocol.checks`)
└── TransitionError    an event that the current phase does not allow
```
"""


class ProtocolError(Exception):
    """Root of everything that `protocol` raises."""


class EncodingError(ProtocolError):
    """Bytes, base64url or JSON that are not in the one accepted form."""


class ManifestError(ProtocolError):
    """A manifest or message with a field, version or value that this version cannot honour."""


class LayoutError(ProtocolError):
    """A vector layout that contradicts itself or exceeds the limits."""


class SignatureError(ProtocolError):
    """A signature, signing key, creation time or nonce that does not hold."""


class InviteError(ProtocolError):
    """An invite code that cannot be read."""


class TransitionError(ProtocolError):
    """An event that the current phase does not allow; nothing was changed."""

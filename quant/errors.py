"""Errors of the model's numbers.

```
QuantError
├── BaseModelError         a base that cannot be used, or is not the manifest's
│   └── FingerprintError   the base is another one than the federation's
├── AdapterError           an adapter file or vector that does not fit its layout
├── ExportError            a format that cannot hold this model or adapter
├── MemoryLimitError       no settings of a step fit into the memory that is allowed
└── NF4Error               arrays that are not an NF4 encoding
```
"""


class QuantError(Exception):
    """Root of everything that `quant` raises."""


class BaseModelError(QuantError):
    """A base model that cannot be used; the message says why and what to do."""


class FingerprintError(BaseModelError):
    """The base on this machine is another one than the federation's."""


class AdapterError(QuantError):
    """An adapter file, folder or vector that does not fit its layout."""


class ExportError(QuantError):
    """A format that cannot hold this model or adapter; nothing was written."""


class MemoryLimitError(QuantError):
    """No settings of a step fit into the memory that is allowed."""


class NF4Error(QuantError, ValueError):
    """Arrays that are not an NF4 encoding, or cannot become one."""

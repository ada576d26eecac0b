"""Errors of the embedded world.

```
QuantError (quant.errors)
└── TinyWorldError     a request that the invented world cannot meet
```
"""

from quant.errors import QuantError


class TinyWorldError(QuantError, ValueError):
    """A request that the invented world cannot meet; the message says which limit it passes."""

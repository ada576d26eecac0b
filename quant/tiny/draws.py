"""Many single draws from one generator, each of them cheap."""

from collections.abc import Sequence
from functools import partial
from typing import Final, TypeVar

import numpy as np

T = TypeVar("T")

_WORD: Final = 1 << 32


class Draws:
    """Draws from a generator, word by word: a call of `Generator.integers` takes thrice as long.

    Guarantees:
        1. Every draw is the generator's own, which goes on behind it: `below(n)` is `integers(n)`,
           bit for bit, and takes as many words.

    Args:
        rng: Where the words come from.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        """Draw nothing yet."""
        interface = rng.bit_generator.ctypes
        self._rng = rng
        self._word = partial(interface.next_uint32, interface.state)

    def below(self, n: int) -> int:
        """A whole number from 0 to `n` - 1, all with equal chance.

        Args:
            n: At least 1, at most 2^32 - 1.

        Source: D. Lemire, "Fast random integer generation in an interval", arXiv 1805.10941; the
        same words are refused as in numpy.
        """
        if n == 1:
            return 0
        product: int = self._word() * n
        if product % _WORD < n:
            least = (_WORD - n) % n
            while product % _WORD < least:
                product = self._word() * n
        return product // _WORD

    def pick(self, items: Sequence[T]) -> T:
        """One of `items`, each with equal chance."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """`items` in random order."""
        return [items[i] for i in self._rng.permutation(len(items)).tolist()]

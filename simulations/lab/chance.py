"""All chance of a run, from its seed: what two sittings, engines or machines draw alike.

In a federation noise, masks and sampling come from the operating system and are nobody's to repeat.
In the laboratory they come from the run's seed by AES-CTR and PCG64, so that a run can be repeated
bit for bit. Such noise protects nobody, and nothing here is ever sent.
"""

from dataclasses import dataclass

import numpy as np

from protocol.wire import domain_hash

_SEED_BITS = 53


@dataclass(frozen=True)
class RunChance:
    """Draws of a run; every use has a purpose of its own.

    Guarantees:
        1. Equal seeds, purposes and numbers give equal draws; any other gives independent ones.
    """

    seed: int

    def secret(self, purpose: str, *numbers: int) -> bytes:
        """32 bytes that stand for those of an operating system.

        Args:
            purpose: What for.
            numbers: Such as round and agent.
        """
        return domain_hash("laboratory", self.seed, purpose, list(numbers))

    def integer(self, purpose: str, *numbers: int) -> int:
        """A whole number of 53 bits.

        Args:
            purpose: What for.
            numbers: Such as round and agent.
        """
        drawn = int.from_bytes(self.secret(purpose, *numbers)[:8], "big")
        return drawn >> (64 - _SEED_BITS)

    def generator(self, purpose: str, *numbers: int) -> np.random.Generator:
        """A generator for what is no secret anywhere: drop-outs, order, thinning.

        Args:
            purpose: What for.
            numbers: Such as round and agent.
        """
        words = np.frombuffer(self.secret(purpose, *numbers), np.uint32).tolist()
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))

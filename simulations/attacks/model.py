"""Attacks on updates that need no search: crude ones, clones, and members who do nothing."""

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from privacy.updates import Float32Array, l2_norm
from simulations.attacks.knowledge import Attack, Knowledge, require_at_least
from simulations.attacks.vectors import as_updates

_TINY_STD: Final = 1e-6


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Each attacker sends its own update, `factor` times as long.

    With n / m an average over all agents becomes (to what the honest ones agree on) what the
    attackers trained, which is how a backdoor is put in at one stroke.

    Attackers know: their own update; n and m where no factor is given.

    Attributes:
        factor: Above 0; None: n / m.

    Source: Bagdasaryan et al., "How To Backdoor Federated Learning", AISTATS 2020 (arXiv
        1807.00459), section 4, equation 3, with global learning rate 1 and m attackers who share
        the work.
    """

    factor: float | None = None

    def __post_init__(self) -> None:
        """Check the factor."""
        if self.factor is not None:
            require_at_least("factor", self.factor, 0.0, above=True)

    def craft(
        self,
        knowledge: Knowledge,
        *,
        rng: np.random.Generator,  # noqa: ARG002 - interface
    ) -> Float32Array:
        """Make what is sent; see `Attack.craft`."""
        whole = knowledge.n_agents / knowledge.n_attackers
        factor = whole if self.factor is None else self.factor
        return _times(knowledge.own_updates, factor)


@dataclass(frozen=True, kw_only=True)
class SignFlip:
    """Each attacker sends its own update backwards, `factor` times as long.

    With factor 1 its norm is an honest one, so no cap on norms touches it.

    Attackers know: their own update.

    Attributes:
        factor: Above 0.

    Source: Li et al., "RSA: Byzantine-Robust Stochastic Aggregation Methods", AAAI 2019 (arXiv
        1811.03761), section "Numerical tests": there with factor 4.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        """Check the factor."""
        require_at_least("factor", self.factor, 0.0, above=True)

    def craft(
        self,
        knowledge: Knowledge,
        *,
        rng: np.random.Generator,  # noqa: ARG002 - interface
    ) -> Float32Array:
        """Make what is sent; see `Attack.craft`."""
        return _times(knowledge.own_updates, -self.factor)


@dataclass(frozen=True, kw_only=True)
class GaussianNoise:
    """Each attacker sends Gaussian noise of its own, about `factor` times its update's norm long.

    Attackers know: the norm of their own update.

    Attributes:
        factor: Expected length of the noise as a multiple of the update's norm, above 0.

    Source: Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017, section 5: there
        with a standard deviation of 200 whatever the updates are. Ours follows their scale, so
        that the attack means the same for every adapter.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        """Check the factor."""
        require_at_least("factor", self.factor, 0.0, above=True)

    def craft(self, knowledge: Knowledge, *, rng: np.random.Generator) -> Float32Array:
        """Make what is sent; see `Attack.craft`."""
        zero = np.zeros_like(knowledge.own_updates)
        norms = [self.factor * l2_norm(row) for row in knowledge.own_updates]
        return _with_noise(zero, norms, rng)


@dataclass(frozen=True, kw_only=True)
class Clones:
    """One adversary under many names: all attackers send the first one's malicious update.

    Attackers know: what the attack that is cloned knows.

    Attributes:
        of: The attack that makes the one update.
        jitter_frac: Length of the noise that sets copies apart, as a part of the update's norm; 0:
            the copies are equal bit by bit.

    Source: Fung et al., "The Limitations of Federated Learning in Sybil Settings", RAID 2020
        (arXiv 1808.04866), section 4; the jitter is the answer to a filter that looks for equals.
    """

    of: Attack = field(default_factory=lambda: SignFlip(factor=1.0))
    jitter_frac: float = 0.0

    def __post_init__(self) -> None:
        """Check the jitter."""
        require_at_least("jitter_frac", self.jitter_frac, 0.0)

    def craft(self, knowledge: Knowledge, *, rng: np.random.Generator) -> Float32Array:
        """Make what is sent; see `Attack.craft`."""
        first = self.of.craft(knowledge, rng=rng)[0]
        copies = as_updates(first, n_rows=knowledge.n_attackers)
        if self.jitter_frac == 0.0:
            return copies
        norm = self.jitter_frac * l2_norm(first)
        return _with_noise(copies, [norm] * len(copies), rng)


@dataclass(frozen=True, kw_only=True)
class IdleNoise:
    """Free riders who do not train: each sends noise next to nothing, as zero would be refused.

    Attackers know: the length of an update, nothing else.

    Attributes:
        noise_std: Of each value, absolute, above 0.

    Source: Fraboni et al., "Free-rider Attacks on Model Aggregation in Federated Learning",
        AISTATS 2021 (arXiv 2006.11901), the disguised free rider with noise that does not depend
        on the round.
    """

    noise_std: float = _TINY_STD

    def __post_init__(self) -> None:
        """Check the noise."""
        require_at_least("noise_std", self.noise_std, 0.0, above=True)

    def craft(self, knowledge: Knowledge, *, rng: np.random.Generator) -> Float32Array:
        """Make what is sent; see `Attack.craft`."""
        zero = np.zeros_like(knowledge.own_updates)
        norm = self.noise_std * float(np.sqrt(knowledge.n_values))
        return _with_noise(zero, [norm] * len(zero), rng)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Free riders who send the last round's change of the adapter again, with a little noise.

    In the first round there is none, and they send what `IdleNoise` sends.

    Attackers know: the last two releases.

    Attributes:
        noise_frac: Length of the noise as a part of the change's norm; without noise free riders
            would send equal updates.

    Source: Lin, Du and Liu, "Free-riders in Federated Learning: Attacks and Defenses" (arXiv
        1911.12560), the "delta weights" and "advanced delta weights" attacks.
    """

    noise_frac: float = 0.01

    def __post_init__(self) -> None:
        """Check the noise."""
        require_at_least("noise_frac", self.noise_frac, 0.0)

    def craft(self, knowledge: Knowledge, *, rng: np.random.Generator) -> Float32Array:
        """Make what is sent; see `Attack.craft`."""
        if knowledge.last_change is None:
            return IdleNoise().craft(knowledge, rng=rng)
        copies = as_updates(knowledge.last_change, n_rows=knowledge.n_attackers)
        norm = self.noise_frac * l2_norm(knowledge.last_change)
        return _with_noise(copies, [norm] * len(copies), rng)


def _times(rows: Float32Array, factor: float) -> Float32Array:
    # In float64: 1e39 times a float32 need not overflow, and float32 itself cannot hold it.
    return np.stack([as_updates(row.astype(np.float64) * factor, n_rows=1)[0] for row in rows])


def _with_noise(rows: Float32Array, norms: list[float], rng: np.random.Generator) -> Float32Array:
    """Add Gaussian noise to each row, `norm`² its squared length on average; uses `rows` up."""
    with np.errstate(over="ignore", invalid="ignore"):  # `as_updates` looks at the sum
        for number, norm in enumerate(norms):
            noise = rng.standard_normal(rows.shape[1], np.float32)
            rows[number] += noise * np.float32(norm / np.sqrt(rows.shape[1]))
    return as_updates(rows, n_rows=len(rows))

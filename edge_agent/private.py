"""Profile P1 on the agent: its terms, the owner's ledger, and the secrets of a training.

The federation says how much ε each example may cost in all rounds together. The agent finds the
noise multiplier that keeps to it for the number of its own examples, charges the owner's ledger
before each training, and trains with DP-SGD.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.charging import RoundCharges, example_epsilon, noise_of_agents
from edge_agent.data.records import Record
from edge_agent.durable import remove_durably, write_durably
from edge_agent.errors import JournalError, TrustError
from edge_agent.training.gradients import PrivateGradient
from edge_agent.training.sampling import PoissonBatches
from privacy.accounting import WEAK_MULTIPLIER, SampledGaussian, calibrate
from privacy.dp_sgd.mechanism import Mechanism
from privacy.ledger import Quote
from protocol.manifest import FederationManifest
from protocol.privacy import AgentPrivacy, CentralPrivacy, ExamplePrivacy
from protocol.wire import canonical_json
from quant.lora import AdaptedModel

_SECRET_BYTES: Final = 32


@dataclass(frozen=True, kw_only=True)
class PrivacyTerms:
    """What keeps each of an owner's examples within (ε, δ) over a whole federation.

    Attributes:
        epsilon: The smaller one of the federation's and the owner's.
        delta: The federation's.
        clip_norm: Largest L2 norm of an example's gradient.
        noise_multiplier: z, of each step.
        n_examples: The owner's.
        batch_size: Examples of a step in expectation, as far as there are so many.
        n_steps: Of a round.
        n_rounds: Of the federation.
    """

    epsilon: float
    delta: float
    clip_norm: float
    noise_multiplier: float
    n_examples: int
    batch_size: int
    n_steps: int
    n_rounds: int

    @property
    def sampling_probability(self) -> float:
        """q: how likely an example is in a step's batch."""
        return min(1.0, self.batch_size / self.n_examples)

    @property
    def event(self) -> SampledGaussian:
        """What a round releases."""
        return SampledGaussian(
            noise_multiplier=self.noise_multiplier,
            sampling_probability=self.sampling_probability,
            n_steps=self.n_steps,
        )

    @property
    def mechanism(self) -> Mechanism:
        """What a step releases."""
        return Mechanism(
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            expected_batch=self.sampling_probability * self.n_examples,
        )

    def describe(self) -> str:
        """All that an ε means, in one line."""
        weak = (
            f"; a noise multiplier under {WEAK_MULTIPLIER:g} protects little"
            if self.noise_multiplier < WEAK_MULTIPLIER
            else ""
        )
        return (
            f"ε ≤ {self.epsilon:g} at δ = {self.delta:g} for each of {self.n_examples} examples "
            f"(add or remove one; against server, members and public) in {self.n_rounds} rounds of "
            f"{self.n_steps} steps; Poisson sampling with q = {self.sampling_probability:.4g}, "
            f"noise multiplier {self.noise_multiplier:.4g}, clip norm {self.clip_norm:g}; PLD "
            f"accountant{weak}"
        )


def require_owners_epsilon(manifest: FederationManifest, epsilon: float | None) -> None:
    """Refuse a federation without the privacy that the owner demands.

    Args:
        manifest: The federation's.
        epsilon: The largest ε that the owner accepts; None: any, also ∞.

    Raises:
        TrustError: The federation does not protect the owner's examples so well, or not at all,
            from the server.
    """
    if epsilon is None or isinstance(manifest.privacy, ExamplePrivacy):
        return  # P1: the agent's own noise keeps the smaller ε
    event, profile = noise_of_agents(manifest), manifest.privacy.profile
    if event is not None and isinstance(manifest.privacy, AgentPrivacy):
        delta = manifest.privacy.delta
        found = example_epsilon(event, n_rounds=manifest.rounds.n_rounds, delta=delta)
        if found <= epsilon:
            return
        has = f"keeps ε ≤ {found:.3g} for each example, at δ = {delta:g} (profile {profile})"
    elif isinstance(manifest.privacy, CentralPrivacy):
        has = f"protects nobody from the server (profile {profile}), against which its ε = ∞"
    else:
        has = f"has no differential privacy (profile {profile}, ε = ∞)"
    msg = (
        f"you accept ε ≤ {epsilon:g}, and this federation {has}; change `epsilon` in agent.toml, "
        "or take it out, to join it"
    )
    raise TrustError(msg)


def make_terms(
    manifest: FederationManifest, *, n_examples: int, owners_epsilon: float | None = None
) -> PrivacyTerms:
    """The terms for an owner's examples: the stronger of what federation and owner ask for.

    Args:
        manifest: Of profile P1.
        n_examples: How many there are; at least 1. It is taken as known to everybody.
        owners_epsilon: The largest ε that the owner accepts.

    Raises:
        AccountingError: No noise keeps to it.
        ValueError: The manifest is not of profile P1.
    """
    privacy, n_steps = manifest.privacy, manifest.training.local_steps
    if not isinstance(privacy, ExamplePrivacy) or n_steps is None:
        msg = f"profile {privacy.profile} has no terms of DP-SGD"
        raise ValueError(msg)
    epsilon = privacy.epsilon if owners_epsilon is None else min(privacy.epsilon, owners_epsilon)
    batch_size, n_rounds = manifest.training.batch_size, manifest.rounds.n_rounds
    return PrivacyTerms(
        epsilon=epsilon,
        delta=privacy.delta,
        clip_norm=privacy.clip_norm,
        noise_multiplier=calibrate(
            epsilon=epsilon,
            delta=privacy.delta,
            sampling_probability=min(1.0, batch_size / n_examples),
            n_steps=n_rounds * n_steps,
        ),
        n_examples=n_examples,
        batch_size=batch_size,
        n_steps=n_steps,
        n_rounds=n_rounds,
    )


def record_bytes(records: Iterable[Record]) -> Iterable[bytes]:
    """What a record is to the ledger: its words, whatever file they lie in and wherever there."""
    for record in records:
        turns = (
            None
            if record.messages is None
            else [text for turn in record.messages for text in (turn.role.value, turn.content)]
        )
        yield canonical_json([record.instruction, record.context, record.response, turns])


class PrivateRounds:
    """Charges the ledger, and gives a training its coins and its noise.

    Guarantees:
        1. Nothing is trained before its round is charged to every record of the owner.
        2. A training that goes on after a kill has the coins and the noise that it began with, and
           is charged once; any other training of the same round is another attempt.
        3. Once a training is over, nobody can say which noise it had.

    Args:
        terms: Of this federation and these examples.
        charges: To the owner's ledger, for what `terms` release.
        secret_path: Where the secret of a training is kept while it lasts.
        n_noise_threads: Threads that make noise while a GPU is at work; 0: none.
        adapt: What makes gradients of single examples.
    """

    def __init__(
        self,
        *,
        terms: PrivacyTerms,
        charges: RoundCharges,
        secret_path: Path,
        n_noise_threads: int = 0,
        adapt: type[AdaptedModel] = AdaptedModel,
    ) -> None:
        """Take the parts; nothing is charged yet."""
        self.terms = terms
        self.adapt = adapt
        self._charges = charges
        self._secret_path = secret_path
        self._n_noise_threads = n_noise_threads

    def begin(
        self, round_number: int, attempt: int, *, now: float
    ) -> tuple[PoissonBatches, PrivateGradient, Quote]:
        """Charge a round, then give what its training needs.

        Args:
            round_number: The round.
            attempt: The agent's attempt at it.
            now: Seconds since the Unix epoch.

        Raises:
            PrivacyError: See `RoundCharges.charge`.
            JournalError: The secret cannot be kept.
        """
        quote = self._charges.charge(round_number, attempt, now=now)
        secret = self._secret(round_number, attempt)
        sampler = PoissonBatches(
            n_examples=self.terms.n_examples,
            probability=self.terms.sampling_probability,
            secret=secret,
        )
        rule = PrivateGradient(
            mechanism=self.terms.mechanism, secret=secret, n_noise_threads=self._n_noise_threads
        )
        return sampler, rule, quote

    def end(self) -> None:
        """Forget the secret of a training that is over, also if power is cut now."""
        remove_durably(self._secret_path)

    def _secret(self, round_number: int, attempt: int) -> bytes:
        name = f"{self._charges.name} {round_number} {attempt} "
        try:
            if self._secret_path.exists():
                kept = self._secret_path.read_text(encoding="ascii")
                if kept.startswith(name) and len(kept) == len(name) + 2 * _SECRET_BYTES:
                    return bytes.fromhex(kept.removeprefix(name))
            secret = os.urandom(_SECRET_BYTES)
            write_durably(self._secret_path, (name + secret.hex()).encode())
        except (OSError, ValueError) as error:
            msg = f"cannot keep {self._secret_path}: {error}; free some space"
            raise JournalError(msg) from error
        return secret

"""What differential privacy has cost so far, by the accountants of agent and server."""

import functools
from collections import Counter

from edge_agent.charging import example_epsilon
from edge_agent.private import make_terms
from privacy.accounting import SampledGaussian, spent
from privacy.agent_accounting import spent_by_agent
from privacy.distributed_noise import agent_noise
from protocol.manifest import FederationManifest
from protocol.privacy import AgentPrivacy, CentralPrivacy, ExamplePrivacy


class Spending:
    """The largest ε that any agent has spent, as rounds go by.

    Under P1 it is of each of its examples, under P2 of the agent; both are charged when a
    training begins, whatever becomes of it, and no agent begins more trainings than the
    federation's ε counts rounds: so the agents' own ledgers have it. Each agent finds the noise
    for as many examples as it has, so that the largest need not be of the one with the most or the
    fewest, nor of the one that trained most often. Under P3 it is of the agent, for the releases
    that its updates are in, which is where the server adds its noise.

    Args:
        manifest: Of the run.
        n_values: Of an update.
    """

    def __init__(self, manifest: FederationManifest, *, n_values: int) -> None:
        """Nothing is spent."""
        self._manifest = manifest
        self._n_values = n_values
        self._times: Counter[int] = Counter()
        self._n_examples: dict[int, int] = {}
        self._of_examples = functools.cache(self._of_example)
        self._of_rounds = functools.cache(self._of_agent)

    @property
    def begins_with_training(self) -> bool:
        """Whether an agent is charged before it trains; else for the release that it is in."""
        return isinstance(self._manifest.privacy, ExamplePrivacy | AgentPrivacy)

    def admits(self, agent: int) -> bool:
        """Whether an agent's ledger lets it begin another training.

        Args:
            agent: The client's number.
        """
        n_rounds = self._manifest.rounds.n_rounds
        return not self.begins_with_training or self._times[agent] < n_rounds

    def charge(self, agent: int, *, n_examples: int) -> None:
        """Charge an agent for a round.

        Args:
            agent: The client's number.
            n_examples: That it has.
        """
        self._times[agent] += 1
        self._n_examples[agent] = n_examples

    @property
    def epsilon(self) -> float | None:
        """Spent so far; None without differential privacy, 0 before anyone trained."""
        privacy = self._manifest.privacy
        if not isinstance(privacy, ExamplePrivacy | AgentPrivacy | CentralPrivacy):
            return None
        if not self._times:
            return 0.0
        if not isinstance(privacy, ExamplePrivacy):
            return self._of_rounds(max(self._times.values()))
        return max(
            self._of_examples(self._n_examples[agent], times)
            for agent, times in self._times.items()
        )

    def _of_example(self, n_examples: int, n_rounds: int) -> float:
        terms = make_terms(self._manifest, n_examples=n_examples)
        return example_epsilon(terms.event, n_rounds=n_rounds, delta=terms.delta)

    def _of_agent(self, n_rounds: int) -> float:
        privacy = self._manifest.privacy
        if isinstance(privacy, CentralPrivacy):
            event = SampledGaussian(
                noise_multiplier=privacy.noise_multiplier, sampling_probability=1.0, n_steps=1
            )
            return spent([event] * n_rounds, delta=privacy.delta).epsilon
        noise = agent_noise(privacy, self._manifest.masking, n_values=self._n_values)
        if noise is None or not isinstance(privacy, AgentPrivacy):  # cannot be: P1 is asked apart
            msg = f"profile {privacy.profile} has no noise of agents"
            raise TypeError(msg)
        return spent_by_agent(noise, n_rounds=n_rounds, delta=privacy.delta).epsilon

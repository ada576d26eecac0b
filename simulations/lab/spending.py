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
    """The ε of the agent that took part most often, as rounds go by.

    Under P1 that is of each of its examples, charged when a training begins, whatever becomes of
    it; under P2 and P3 of the agent, for the releases that its updates are in.

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

    def trained(self, agent: int, *, n_examples: int) -> None:
        """An agent trained a round.

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
        most = max(self._times.values())
        if not isinstance(privacy, ExamplePrivacy):
            return self._of_rounds(most)
        fewest = min(
            self._n_examples[agent] for agent, times in self._times.items() if times == most
        )
        return self._of_examples(fewest, most)

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

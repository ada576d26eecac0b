"""What a federation promises of differential privacy: one block for each profile.

An ε means nothing by itself: each block says what it protects, from whom, and by what mechanism
(LEARNING, "Differential privacy").
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from protocol import limits
from protocol.numbers import PositiveFloat, PositiveInt
from protocol.wire import WireModel

Epsilon = Annotated[float, Field(gt=0.0, le=limits.MAX_EPSILON)]
Delta = Annotated[float, Field(gt=0.0, le=limits.MAX_DELTA)]


class NoPrivacy(WireModel):
    """P0: no formal guarantee, ε = ∞."""

    version: Literal[1] = 1
    profile: Literal["P0"] = "P0"


class ExamplePrivacy(WireModel):
    """P1: each example is protected from server, members and public, by DP-SGD on the agent.

    In all rounds of the federation together, an agent spends at most (`epsilon`, `delta`) on each
    of its examples; neighbouring data sets differ in one example, added or removed. It finds the
    noise multiplier that this takes for the number of its examples by itself.

    `clip_norm` is the largest L2 norm of an example's gradient, over all tensors that are trained.
    """

    version: Literal[1] = 1
    profile: Literal["P1"] = "P1"
    epsilon: Epsilon
    delta: Delta
    clip_norm: PositiveFloat


class AgentPrivacy(WireModel):
    """P2: each agent is protected from the server and the public, by shares of noise under masks.

    Neighbours differ in whether one agent's updates are its own or zero. `epsilon` and `delta`
    hold for all rounds together, and for the sum that the server sees: within what masking
    promises, and with no more colluding members than a cell tolerates.

    `clip_norm` is the largest L2 norm of an update, `steps_per_clip` how many steps of the ring it
    is long, `share_variance` that of the discrete Gaussian noise of each agent, in steps².
    """

    version: Literal[1] = 1
    profile: Literal["P2"] = "P2"
    epsilon: Epsilon
    delta: Delta
    clip_norm: PositiveFloat
    steps_per_clip: PositiveInt
    share_variance: PositiveFloat


class AdaptiveClip(WireModel):
    """The clip norm follows a quantile of the updates' norms, of which only a noisy count is used.

    After each round, C becomes C · exp(−`learning_rate` · (b − `quantile`)), where b is the noisy
    fraction of updates no longer than C; `count_std` is the standard deviation of the noise of
    their number.

    Source: Andrew et al., arXiv 1905.03871, algorithm 1.
    """

    quantile: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    count_std: PositiveFloat


class CentralPrivacy(WireModel):
    """P3: each agent is protected from the public, by clipping and noise on the server.

    Neighbours differ in whether one agent's updates are its own or none; how many agents took part
    is known. `epsilon` and `delta` hold for all releases together, for an agent that takes part in
    every round. The server itself sees what masking leaves it to see.

    `clip_norm` is the largest L2 norm of an update, at first; `noise_multiplier` is that of a
    whole round: the standard deviation of the noise of the sum over `clip_norm` is as much, and
    somewhat more where a part of the budget goes to an adaptive clip norm.
    """

    version: Literal[1] = 1
    profile: Literal["P3"] = "P3"
    epsilon: Epsilon
    delta: Delta
    clip_norm: PositiveFloat
    noise_multiplier: PositiveFloat
    adaptive: AdaptiveClip | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.adaptive is not None and 2.0 * self.adaptive.count_std <= self.noise_multiplier:
            msg = (
                f"adaptive.count_std {self.adaptive.count_std:g} must be above half the noise "
                f"multiplier, {self.noise_multiplier / 2.0:.4g}: counting alone would spend it all"
            )
            raise ValueError(msg)
        return self


PrivacyBlock = Annotated[
    NoPrivacy | ExamplePrivacy | AgentPrivacy | CentralPrivacy, Field(discriminator="profile")
]
"""What of the training data is protected by differential privacy, and from whom."""

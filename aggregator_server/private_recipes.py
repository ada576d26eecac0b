"""Recipes with differential privacy: noise that keeps an ε, and masks that fit it."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from aggregator_server.errors import ConfigError
from protocol.blocks import CellMasking, MaskingBlock, RoundsBlock, SumMasking
from protocol.limits import MIN_CELL
from protocol.privacy import (
    AdaptiveClip,
    AgentPrivacy,
    CentralPrivacy,
    ExamplePrivacy,
    NoPrivacy,
    PrivacyBlock,
)

_EXAMPLE_CLIP_NORM: Final = 1.0
_USUAL_UPDATE: Final = 0.1
"""Norm of an update, relative to one in which Adam moves every value as far as it can."""
_COUNTED_FRAC: Final = 0.05
"""Standard deviation of the noisy count of short updates, relative to the cohort."""


class Profile(StrEnum):
    """Who is protected, and from whom; see `protocol.privacy`."""

    EXAMPLE = "P1"
    AGENT = "P2"
    CENTRAL = "P3"


@dataclass(frozen=True, kw_only=True)
class PrivacyOptions:
    """What `init` was told of differential privacy.

    Attributes:
        epsilon: Over all rounds; None: no differential privacy.
        delta: With it.
        profile: Who is protected.
        clip_norm: Largest norm of an example's gradient (P1) or an update; None: 1, or what is
            usual for the learning rate, the steps and the size of the adapter.
        adaptive_clip: P3: let the clip norm follow the updates' norms.
    """

    epsilon: float | None = None
    delta: float = 1e-5
    profile: Profile = Profile.EXAMPLE
    clip_norm: float | None = None
    adaptive_clip: bool = False

    @property
    def is_on(self) -> bool:
        """Whether there is any."""
        return self.epsilon is not None

    @property
    def is_of_examples(self) -> bool:
        """Whether agents run DP-SGD."""
        return self.is_on and self.profile is Profile.EXAMPLE


def private_blocks(
    options: PrivacyOptions,
    *,
    masking: MaskingBlock,
    rounds: RoundsBlock,
    n_values: int,
    max_change: float,
) -> tuple[PrivacyBlock, MaskingBlock]:
    """Privacy and masking of a recipe.

    Args:
        options: What the operator asked for.
        masking: What it would be without.
        rounds: How many, of whom.
        n_values: Of an update.
        max_change: How far Adam can move one value in a round.

    Raises:
        ConfigError: Options that do not go together.
        AccountingError: No noise keeps to it.
        DrownedError: P2, and the noise would drown the updates.
        ValidationError: A value out of range.
    """
    epsilon = options.epsilon
    if options.adaptive_clip and not (options.is_on and options.profile is Profile.CENTRAL):
        msg = "--adaptive-clip is for --profile P3: only there does the server clip"
        raise ConfigError(msg)
    if epsilon is None:
        return NoPrivacy(), masking
    clip_norm = options.clip_norm
    if options.profile is Profile.EXAMPLE:
        if clip_norm is None:
            clip_norm = _EXAMPLE_CLIP_NORM
        example = ExamplePrivacy(epsilon=epsilon, delta=options.delta, clip_norm=clip_norm)
        return example, masking
    if clip_norm is None:
        clip_norm = _USUAL_UPDATE * max_change * math.sqrt(n_values)
    if options.profile is Profile.CENTRAL:
        if isinstance(masking, SumMasking):
            masking = masking.model_copy(update={"clip_norm": clip_norm})
        return _central(options, epsilon, clip_norm, rounds), masking
    return _agents(options, epsilon, clip_norm, masking, rounds, n_values)


def _central(
    options: PrivacyOptions, epsilon: float, clip_norm: float, rounds: RoundsBlock
) -> CentralPrivacy:
    from privacy.accounting import calibrate  # noqa: PLC0415 - scipy, and only `init` needs it

    multiplier = calibrate(
        epsilon=epsilon, delta=options.delta, sampling_probability=1.0, n_steps=rounds.n_rounds
    )
    adaptive = None
    if options.adaptive_clip:
        count_std = max(_COUNTED_FRAC * rounds.cohort_target, 2.0 * multiplier)
        adaptive = AdaptiveClip(count_std=count_std)
    return CentralPrivacy(
        epsilon=epsilon,
        delta=options.delta,
        clip_norm=clip_norm,
        noise_multiplier=multiplier,
        adaptive=adaptive,
    )


def _agents(
    options: PrivacyOptions,
    epsilon: float,
    clip_norm: float,
    masking: MaskingBlock,
    rounds: RoundsBlock,
    n_values: int,
) -> tuple[AgentPrivacy, CellMasking]:
    from privacy.agent_accounting import (  # noqa: PLC0415 - scipy, and only `init` needs it
        calibrate_noise,
    )
    from privacy.distributed_noise import Cohort  # noqa: PLC0415 - the same

    if not isinstance(masking, CellMasking):
        msg = (
            f"profile P2 needs masked cells, and masking.mode is {masking.mode!r}: give "
            f"--masking cells and at least --min-cohort {MIN_CELL}"
        )
        raise ConfigError(msg)
    # One cell holds all that a round may select: each has noise of its own.
    most_ready = math.ceil(rounds.over_selection * rounds.cohort_target)
    target = max(most_ready // 2 + 1, rounds.min_cohort)
    masking = CellMasking.model_validate(
        {
            **masking.model_dump(),
            "word_bits": 32,
            "clip_norm": clip_norm,
            "max_change": clip_norm,
            "cell_target": target,
            "min_cell": rounds.min_cohort,
            "max_cell": 2 * target - 1,
        },
    )
    noise = calibrate_noise(
        epsilon=epsilon,
        delta=options.delta,
        n_rounds=rounds.n_rounds,
        n_values=n_values,
        clip_norm=clip_norm,
        cohort=Cohort.of_cells(
            masking.min_cell, masking.max_cell, wanted_colluders=masking.colluders
        ),
    )
    privacy = AgentPrivacy(
        epsilon=epsilon,
        delta=options.delta,
        clip_norm=clip_norm,
        steps_per_clip=noise.steps_per_clip,
        share_variance=noise.share_variance,
    )
    return privacy, masking

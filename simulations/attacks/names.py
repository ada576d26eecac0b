"""What attacks are called; what they are stands in `catalogue`."""

from enum import StrEnum


class UpdateAttack(StrEnum):
    """The attacks on updates."""

    SCALING = "scaling"
    MODEL_REPLACEMENT = "model-replacement"
    SIGN_FLIP = "sign-flip"
    SIGN_FLIP_SCALED = "sign-flip-scaled"
    GAUSSIAN_NOISE = "gaussian-noise"
    GAUSSIAN_NOISE_SCALED = "gaussian-noise-scaled"
    ALIE = "alie"
    ALIE_WIDE = "alie-wide"
    INNER_PRODUCT_SMALL = "inner-product-small"
    INNER_PRODUCT_LARGE = "inner-product-large"
    MIN_MAX = "min-max"
    MIN_MAX_UNIT = "min-max-unit"
    MIN_SUM = "min-sum"
    MIN_SUM_UNIT = "min-sum-unit"
    CLONES = "clones"
    CLONES_JITTERED = "clones-jittered"
    IDLE_NOISE = "idle-noise"
    REPLAY = "replay"
    ADAPTIVE = "adaptive"


class RecordAttack(StrEnum):
    """The attacks by data."""

    FLIP_FACTS = "flip-facts"
    SWAP_ANSWERS = "swap-answers"
    BACKDOOR = "backdoor"

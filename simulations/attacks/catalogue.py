"""All attacks by name, with the parameters that an experiment runs them with."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Final

from simulations.attacks.adaptive import Adaptive, Survives
from simulations.attacks.data import Backdoor, DataAttack, FlipFacts, SwapAnswers
from simulations.attacks.hidden import Alie, Direction, InnerProduct, MinMax, MinSum
from simulations.attacks.knowledge import Attack
from simulations.attacks.model import (
    Clones,
    GaussianNoise,
    IdleNoise,
    Replay,
    Scaling,
    SignFlip,
)
from simulations.attacks.names import RecordAttack, UpdateAttack

Parameter = bool | int | float | str | None


_UPDATE_ATTACKS: Final[Mapping[UpdateAttack, Attack]] = MappingProxyType(
    {
        UpdateAttack.SCALING: Scaling(factor=10.0),
        UpdateAttack.MODEL_REPLACEMENT: Scaling(),
        UpdateAttack.SIGN_FLIP: SignFlip(),
        UpdateAttack.SIGN_FLIP_SCALED: SignFlip(factor=10.0),
        UpdateAttack.GAUSSIAN_NOISE: GaussianNoise(),
        UpdateAttack.GAUSSIAN_NOISE_SCALED: GaussianNoise(factor=10.0),
        UpdateAttack.ALIE: Alie(),
        UpdateAttack.ALIE_WIDE: Alie(z=1.5),
        UpdateAttack.INNER_PRODUCT_SMALL: InnerProduct(scale=0.5),
        UpdateAttack.INNER_PRODUCT_LARGE: InnerProduct(scale=10.0),
        UpdateAttack.MIN_MAX: MinMax(),
        UpdateAttack.MIN_MAX_UNIT: MinMax(direction=Direction.UNIT),
        UpdateAttack.MIN_SUM: MinSum(),
        UpdateAttack.MIN_SUM_UNIT: MinSum(direction=Direction.UNIT),
        UpdateAttack.CLONES: Clones(),
        UpdateAttack.CLONES_JITTERED: Clones(jitter_frac=0.1),
        UpdateAttack.IDLE_NOISE: IdleNoise(),
        UpdateAttack.REPLAY: Replay(),
    }
)
RECORD_ATTACKS: Final[Mapping[RecordAttack, DataAttack]] = MappingProxyType(
    {
        RecordAttack.FLIP_FACTS: FlipFacts(),
        RecordAttack.SWAP_ANSWERS: SwapAnswers(),
        RecordAttack.BACKDOOR: Backdoor(),
    }
)


def update_attacks(
    *, omniscient: bool = False, survives: Survives | None = None
) -> dict[UpdateAttack, Attack]:
    """All attacks on updates, in the order of `UpdateAttack`.

    Args:
        omniscient: Let those attacks see the honest updates that can use them; the others stay.
        survives: The filter under attack; None: there is no adaptive attack.
    """
    attacks = dict(_UPDATE_ATTACKS)
    if survives is not None:
        attacks[UpdateAttack.ADAPTIVE] = Adaptive(survives=survives)
    return {name: _seeing(attack) if omniscient else attack for name, attack in attacks.items()}


def parameters_of(attack: Attack | DataAttack) -> dict[str, Parameter]:
    """An attack's class and parameters, flat and fit for JSON.

    A part that is an attack itself gives `part.parameter`; a filter is named by its function.

    Args:
        attack: One of this package's.
    """
    return _flat(attack)


def _flat(attack: object) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {"attack": type(attack).__name__}
    if not is_dataclass(attack):
        return found
    for field in fields(attack):
        value = getattr(attack, field.name)
        if hasattr(value, "craft"):
            found |= {f"{field.name}.{name}": part for name, part in _flat(value).items()}
        elif isinstance(value, Enum):
            found[field.name] = str(value.value)
        elif value is None or isinstance(value, bool | int | float | str):
            found[field.name] = value
        else:
            found[field.name] = getattr(value, "__name__", type(value).__name__)
    return found


def _seeing(attack: Attack) -> Attack:
    match attack:
        case Alie() | InnerProduct() | MinMax() | MinSum() | Adaptive():
            return replace(attack, omniscient=True)
        case _:
            return attack

"""What a federation's privacy block says, in the words that every screen and card uses."""

import math

from protocol.manifest import FederationManifest
from protocol.privacy import (
    AgentPrivacy,
    CentralPrivacy,
    ExamplePrivacy,
    NoPrivacy,
    PrivacyBlock,
)

OFF = "no formal guarantee (profile P0): ε = ∞"


def describe_privacy(privacy: PrivacyBlock, *, n_rounds: int) -> str:
    """The guarantee in one line: never an ε without δ, unit, relation and adversary.

    Args:
        privacy: The manifest's block.
        n_rounds: Over how many rounds it holds.
    """
    if isinstance(privacy, NoPrivacy):
        return OFF
    unit, meant = _meaning(privacy)
    return (
        f"profile {privacy.profile}: ε ≤ {privacy.epsilon:g} at δ = {privacy.delta:g} for each "
        f"{unit}, over all {n_rounds} rounds ({meant}; PLD accountant)"
    )


def _meaning(privacy: ExamplePrivacy | AgentPrivacy | CentralPrivacy) -> tuple[str, str]:
    """Whom or what it protects, and how from whom."""
    if isinstance(privacy, ExamplePrivacy):
        meant = (
            "add or remove one example; against server, members and public; DP-SGD on each agent "
            "with Poisson sampling and a noise multiplier of its own"
        )
        return "example", meant
    if isinstance(privacy, AgentPrivacy):
        share = math.sqrt(privacy.share_variance) / privacy.steps_per_clip
        meant = (
            "its updates or zero; against the server within what masking promises, members that "
            f"do not collude, and the public; discrete Gaussian noise of {share:.4g} clip norms "
            f"added by each agent, clip norm {privacy.clip_norm:g}, no sampling"
        )
        return "agent", meant
    adaptive = " at first, adaptive" if privacy.adaptive is not None else ""
    meant = (
        "its updates or none; against the public only, not the server; clipping and Gaussian noise "
        f"on the server, noise multiplier {privacy.noise_multiplier:.4g}, clip norm "
        f"{privacy.clip_norm:g}{adaptive}, no sampling"
    )
    return "agent", meant


def privacy_json(manifest: FederationManifest) -> dict[str, object]:
    """The same for programs; `epsilon` is None where there is no guarantee."""
    privacy = manifest.privacy
    if isinstance(privacy, NoPrivacy):
        return {"profile": privacy.profile, "epsilon": None}
    told: dict[str, object] = {
        "profile": privacy.profile,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "clip_norm": privacy.clip_norm,
        "rounds": manifest.rounds.n_rounds,
        "accountant": "PLD",
    }
    if isinstance(privacy, ExamplePrivacy):
        return told | {
            "unit": "example",
            "neighbouring": "add or remove one",
            "adversary": "server, members, public",
            "sampling": "Poisson",
            "noise_multiplier": "each agent's own",
        }
    if isinstance(privacy, AgentPrivacy):
        return told | {
            "unit": "agent",
            "neighbouring": "its updates or zero",
            "adversary": "server within masking, members that do not collude, public",
            "sampling": "none",
            "share_std": math.sqrt(privacy.share_variance) / privacy.steps_per_clip,
        }
    return told | {
        "unit": "agent",
        "neighbouring": "its updates or none",
        "adversary": "public",
        "sampling": "none",
        "noise_multiplier": privacy.noise_multiplier,
        "adaptive_clip": privacy.adaptive is not None,
    }

"""What a federation's privacy block says, in the words that every screen and card uses."""

from protocol.manifest import ExamplePrivacy, FederationManifest, NoPrivacy, PrivacyBlock

OFF = "no formal guarantee (profile P0): ε = ∞"


def describe_privacy(privacy: PrivacyBlock, *, n_rounds: int) -> str:
    """The guarantee in one line: never an ε without δ, unit, relation and adversary.

    Args:
        privacy: The manifest's block.
        n_rounds: Over how many rounds it holds.
    """
    if isinstance(privacy, NoPrivacy):
        return OFF
    return (
        f"profile P1: ε ≤ {privacy.epsilon:g} at δ = {privacy.delta:g} for each example, over all "
        f"{n_rounds} rounds (add or remove one example; against server, members and public; DP-SGD "
        "on each agent with Poisson sampling and a noise multiplier of its own; PLD accountant)"
    )


def privacy_json(manifest: FederationManifest) -> dict[str, object]:
    """The same for programs; `epsilon` is None where there is no guarantee."""
    privacy = manifest.privacy
    if not isinstance(privacy, ExamplePrivacy):
        return {"profile": privacy.profile, "epsilon": None}
    return {
        "profile": privacy.profile,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "unit": "example",
        "neighbouring": "add or remove one",
        "adversary": "server, members, public",
        "sampling": "Poisson",
        "noise_multiplier": "each agent's own",
        "rounds": manifest.rounds.n_rounds,
        "accountant": "PLD",
    }

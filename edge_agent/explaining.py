"""What the server of a federation can learn of this agent, what it cannot, and what is not claimed.

In plain words, from the manifest that the owner accepted (PROTOCOL, "What is claimed, and what is
not"). `join` shows the short form, `sheepfold-agent explain` all of it.
"""

from dataclasses import dataclass, replace

from privacy.secagg import cells
from protocol.blocks import CellMasking, EvaluatorGate, HelperMasking, SumMasking, Weighting
from protocol.guarantee import describe_privacy
from protocol.manifest import FederationManifest
from protocol.privacy import AgentPrivacy, CentralPrivacy, NoPrivacy
from protocol.signing import format_fingerprint

_EVERY_MODE = (
    "That a published adapter hides its training data: whoever has it can ask it.",
    "Anonymity: your key, your network address and when you take part are visible.",
)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Plain sentences about a federation."""

    trust_model: str
    """Which trust model is in force, in one sentence."""
    privacy: str
    """The formal guarantee, or that there is none."""
    learns: tuple[str, ...]
    does_not_learn: tuple[str, ...]
    not_claimed: tuple[str, ...]

    def as_json(self) -> dict[str, str | tuple[str, ...]]:
        """For scripts."""
        return {
            "trust_model": self.trust_model,
            "privacy": self.privacy,
            "learns": self.learns,
            "does_not_learn": self.does_not_learn,
            "not_claimed": self.not_claimed,
        }


def explain(manifest: FederationManifest) -> Explanation:
    """What a federation's server can learn.

    Args:
        manifest: Its checks have run.
    """
    if isinstance(manifest.masking, CellMasking):
        found = _of_cells(manifest, manifest.masking)
    elif isinstance(manifest.masking, HelperMasking):
        found = _of_helper(manifest, manifest.masking)
    else:
        found = _of_open_mode(manifest)
    if isinstance(manifest.gate, EvaluatorGate):
        return replace(found, learns=(*found.learns, _of_evaluator(manifest, manifest.gate)))
    return found


def _privacy(manifest: FederationManifest) -> str:
    described = describe_privacy(manifest.privacy, n_rounds=manifest.rounds.n_rounds)
    return f"Differential privacy: {described}."


def _of_open_mode(manifest: FederationManifest) -> Explanation:
    learns = [
        (
            "Your update by itself. Parts of the text that it was trained on can be reconstructed "
            "from it by someone who tries."
        ),
        "When your agent polls, trains and uploads.",
    ]
    if manifest.aggregation.weighting is Weighting.N_EXAMPLES:
        learns.append(
            f"How many examples you have, up to {manifest.aggregation.max_weight}: the weight of "
            "your update."
        )
    if manifest.training.scaffold:
        learns.append(
            "How the mean gradient of your training changed since your last round (SCAFFOLD): it "
            "tells of your data what the update tells, and more plainly."
        )
    if manifest.lora.is_mixed:
        learns.append(
            "Which rank rows of which modules you trained, which hints at the memory of your card."
        )
    return Explanation(
        trust_model="Open: you trust the operator with each of your updates. Masking is off.",
        privacy=_privacy(manifest),
        learns=tuple(learns),
        does_not_learn=("Your records, prompts and file names, as such.",),
        not_claimed=(*_of_noise(manifest), *_EVERY_MODE),
    )


def _of_evaluator(manifest: FederationManifest, gate: EvaluatorGate) -> str:
    who = f"The operator's evaluator (fingerprint {format_fingerprint(gate.evaluator)})"
    seen = "sums of cells" if isinstance(manifest.masking, SumMasking) else "single updates"
    parts = (
        f", and, where one does not pass, the same without some of the updates: with the first, "
        f"these tell {seen}"
        if gate.max_retries
        else ""
    )
    return f"{who}: each adapter before it is published{parts}."


def _tail_words(manifest: FederationManifest) -> str:
    """What travels beside the values of a sum."""
    if isinstance(manifest.privacy, AgentPrivacy | CentralPrivacy):
        return "The number of agents in a sum; all weigh alike."
    return (
        "The number of agents in a sum, the sum of their weights, and how many of them cut their "
        "update to the agreed range."
    )


def _rows_of_sums(manifest: FederationManifest) -> tuple[str, ...]:
    """What a sum says of ranks and modules of agents' own."""
    if not manifest.lora.is_mixed:
        return ()
    return (
        (
            "How much of a sum's weight trained each rank row of each module; of you alone only "
            "what follows from that, as when all or none trained it."
        ),
    )


def _of_cells(manifest: FederationManifest, masking: CellMasking) -> Explanation:
    smallest = masking.min_cell
    colluders = cells.colluders(smallest, wanted=masking.colluders)
    threshold = cells.threshold(smallest, colluders)
    honest = threshold - colluders
    learns = [
        (
            f"One sum of the updates of each cell of {smallest} to {masking.max_cell} agents, of "
            f"which at least {honest} are honest if no more than the tolerated members collude "
            "with it. A sum still tells something of what is in it."
        ),
        _tail_words(manifest),
        *_rows_of_sums(manifest),
        (
            "Who takes part, when, and who drops out at which step. READY is sent after a random "
            f"delay of up to {masking.ready_delay_s:g} s, so its time hints only roughly at how "
            "long you trained."
        ),
    ]
    does_not = [
        (
            f"Your update by itself, as long as at most {colluders} of a cell of {smallest} (more "
            "in a larger one) give the server what they know."
        ),
        "How many examples you have: the weight travels masked.",
        "Your losses, records, prompts and file names.",
    ]
    not_claimed = [
        *_of_noise(manifest),
        (
            "Protection from a server that invents members: with enough of its own in your cell it "
            "could subtract them from the sum."
        ),
        "That other members send honest numbers: one of them can spoil its cell.",
        "Secrecy against a future quantum computer that was given today's traffic.",
        "That erased keys leave no trace on flash storage.",
        *_EVERY_MODE,
    ]
    if manifest.registrar_held_by_server:
        not_claimed.insert(
            0,
            "Protection from a dishonest server: here the server itself decides who is a member. "
            "Masks hide your update from a server that keeps to the protocol, and from whoever "
            "reads its disk later.",
        )
    return Explanation(
        trust_model=(
            "Masked cells: an honest-but-curious server sees one sum for each cell of "
            f"{smallest} to {masking.max_cell} agents, never your update."
        ),
        privacy=_privacy(manifest),
        learns=tuple(learns),
        does_not_learn=tuple(does_not),
        not_claimed=tuple(not_claimed),
    )


def _of_helper(manifest: FederationManifest, masking: HelperMasking) -> Explanation:
    helper = format_fingerprint(masking.helper)
    not_claimed = [
        (
            "Anything, if the two operators collude: then they can read your update. You trust "
            "that the helper is somebody else."
        ),
        *_of_noise(manifest),
        (
            "Protection from a server that invents members: with enough of its own in your cell it "
            "could subtract them from the sum."
        ),
        "That other members send honest numbers: one of them can spoil its cell.",
        *_EVERY_MODE,
    ]
    if manifest.registrar_held_by_server:
        not_claimed.insert(
            1,
            "Protection from a server that lies about who is a member: it decides that itself.",
        )
    return Explanation(
        trust_model=(
            "Helper masks: your update is hidden as long as the server and its helper (fingerprint "
            f"{helper}) do not collude; the server sees one sum for each cell of "
            f"{masking.min_cell} to {masking.max_cell} agents."
        ),
        privacy=_privacy(manifest),
        learns=(
            (
                "The server: one sum of the updates of each cell, the number of agents in it, the "
                "sum of their weights, how many cut their update, and who takes part, when. A sum "
                "still tells something of what is in it."
            ),
            *_rows_of_sums(manifest),
            (
                "The helper: who takes part in a round, and the seed of your mask. It never sees "
                "your update, masked or not."
            ),
        ),
        does_not_learn=(
            "Either of them alone: your update by itself.",
            "How many examples you have: the weight travels masked.",
            "Your losses, records, prompts and file names.",
        ),
        not_claimed=tuple(not_claimed),
    )


def _of_noise(manifest: FederationManifest) -> tuple[str, ...]:
    """What differential privacy leaves unclaimed, on or off."""
    if isinstance(manifest.privacy, AgentPrivacy | CentralPrivacy):
        found = [
            "That your taking part is hidden: who is in a round is known to the server.",
            "More than agents one by one: several agents of one owner are protected less.",
        ]
        if isinstance(manifest.privacy, CentralPrivacy):
            found.append("Any formal privacy against the server, which adds the noise: ε = ∞.")
            if isinstance(manifest.masking, SumMasking):
                found.append("Its ε where a member of your cell cheats: all must be honest.")
        return tuple(found)
    if not isinstance(manifest.privacy, NoPrivacy):
        return (
            (
                "More than each example by itself: what several of your records have in common, or "
                "a record that occurs several times, is protected less."
            ),
            "That the number of your examples is hidden: it is taken as known.",
        )
    masked = isinstance(manifest.masking, SumMasking)
    sums = "Privacy of the sums themselves: secure aggregation is not differential privacy."
    return (
        "Any formal privacy: differential privacy is off (profile P0), ε = ∞.",
        *([sums] if masked else []),
        "Privacy over many rounds: what sums or releases of several rounds tell together.",
    )

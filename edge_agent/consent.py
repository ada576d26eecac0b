"""What `join` tells the owner before anything happens, in plain words."""

import os
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from edge_agent.explaining import explain
from edge_agent.member import OwnersPart
from protocol.blocks import EvaluatorGate, HelperMasking, LoraRule, SumMasking, Weighting
from protocol.manifest import FederationManifest
from protocol.privacy import AgentPrivacy, CentralPrivacy, NoPrivacy
from protocol.signing import format_fingerprint
from quant.tiny import EMBEDDED_NAME

_DEFAULT_HUB: Final = "https://huggingface.co"
_MB: Final = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Disclosure:
    """The three things an owner must know: what leaves, who is contacted, what is not promised."""

    what_leaves: tuple[str, ...]
    hosts: tuple[str, ...]
    warnings: tuple[str, ...]


def hub_host() -> str:
    """The host of the model hub, as the environment sets it."""
    return urlsplit(os.environ.get("HF_ENDPOINT", _DEFAULT_HUB)).netloc


def _privacy(manifest: FederationManifest) -> str:
    if isinstance(manifest.privacy, NoPrivacy):
        return (
            "Differential privacy is off (profile P0): ε = ∞. An update can reveal parts of the "
            "data that it was trained on to whoever sees it."
        )
    if isinstance(manifest.privacy, CentralPrivacy):
        return (
            f"{explain(manifest).privacy} The server adds the noise, so you trust it with that: "
            "against the server itself, and against any record of yours, ε = ∞."
        )
    if isinstance(manifest.privacy, AgentPrivacy):
        return (
            f"{explain(manifest).privacy} Each agent adds a share of the noise before anything "
            "leaves, and only a sum with enough other shares can be read; smaller ε is stronger. "
            "For each single record of yours, more than twice that ε is counted in your ledger."
        )
    return (
        f"{explain(manifest).privacy} It is kept by your own agent, which adds the noise before "
        "anything leaves; smaller ε is stronger, and e^ε bounds how much more likely anything seen "
        "becomes by one of your records. More rounds than ε allows are refused."
    )


def _gate(manifest: FederationManifest) -> str:
    gate = manifest.gate
    if not isinstance(gate, EvaluatorGate):
        return "Nobody checks an adapter before it is published: members may spoil it unnoticed."
    return (
        "An evaluator of the operator's sees each adapter before it is published, and your agent "
        f"takes none that it did not sign for (fingerprint {format_fingerprint(gate.evaluator)}). "
        "It guards what the adapter learns, not your privacy."
    )


def _control(manifest: FederationManifest) -> tuple[str, ...]:
    if not manifest.training.scaffold:
        return ()
    return (
        (
            "In the same upload, how the mean gradient of your training changed since your last "
            "round (SCAFFOLD). It tells of your data what the update tells, and more plainly."
        ),
    )


def _which_part(manifest: FederationManifest, own: OwnersPart | None) -> tuple[str, ...]:
    """What is told of the rank and modules of an agent's own, where it may have any."""
    lora = manifest.lora
    if not lora.is_mixed:
        return ()
    rank = None if own is None else own.rank
    left_out = () if own is None else own.left_out
    rows = "as many rank rows as fit your card" if rank is None else f"{rank} rank rows"
    if lora.min_rank is None:
        rows = f"all {lora.rank} rank rows"
    trains = f"It trains {rows}"
    trains += f", and leaves out {', '.join(left_out)}." if left_out else ", in all modules."
    if isinstance(manifest.masking, SumMasking):
        told = (
            "Which rows of which modules travels masked: of each row, the server learns how much "
            "weight of a whole cell trained it."
        )
    else:
        told = (
            "Which rows of which modules goes along, so the server sees it of you by yourself: it "
            "hints at the memory of your card."
        )
    return (f"{trains} {told}",)


def disclose(
    manifest: FederationManifest,
    *,
    server_host: str,
    base_folder: str | None,
    round_n_bytes: int,
    data_from_hub: bool = False,
    own_part: OwnersPart | None = None,
) -> Disclosure:
    """Put a federation's manifest into words.

    Args:
        manifest: Its checks have run.
        server_host: Host and port of the server.
        base_folder: The owner's copy of the base; None: it is fetched from the hub.
        round_n_bytes: Size of the factors that travel, as a release holds them.
        data_from_hub: Whether the owner's records are a data set of the hub.
        own_part: What of the adapter the owner chose to train; None: nothing was chosen.
    """
    masked = isinstance(manifest.masking, SumMasking)
    factors = " and ".join(manifest.lora.sent)
    if manifest.lora.rule is LoraRule.ROLORA:
        factors = "B or A, which take turns,"
    if manifest.training.scaffold:  # a control variate is as long as the update
        round_n_bytes *= 2
    if isinstance(manifest.masking, SumMasking):  # words of 16 or 32 bits for float32
        round_n_bytes = round_n_bytes * manifest.masking.word_bits // 32
    size = f"{round_n_bytes / _MB:.2f} MB"
    leaves = [
        (
            f"In each round that draws you: an adapter update of {size}"
            f"{', masked so that only a sum of it can be read' if masked else ''}, which is the "
            f"change that training on your data makes to the factors {factors} of a LoRA adapter "
            f"of rank {manifest.lora.rank}."
        ),
        *_which_part(manifest, own_part),
        *_control(manifest),
        "Your agent's public key and signatures.",
        "When your agent polls, trains and uploads, and your network address.",
    ]
    if isinstance(manifest.masking, HelperMasking):
        leaves.append("The seed of your update's mask, sealed to the helper alone.")
    elif masked:
        leaves.append(
            "Messages that set the masks up and, once enough members agree, take them off the sum: "
            "fresh public keys, sealed shares, confirmations."
        )
    elif manifest.aggregation.weighting is Weighting.N_EXAMPLES:
        leaves.append(
            "The number of your examples (at most "
            f"{manifest.aggregation.max_weight} is said), as the weight of your update."
        )
    leaves.append("If a round cannot be finished: that, and why, as one of four codes.")
    leaves.append("Never: your records, your prompts, your losses, your files' names.")
    hosts = [server_host]
    if base_folder is None and manifest.base.model != EMBEDDED_NAME:
        hosts.append(f"{hub_host()} (to download the base model {manifest.base.model})")
    if data_from_hub:
        hosts.append(f"{hub_host()} (to download the data set that you named)")
    warnings = [
        _privacy(manifest),
        explain(manifest).trust_model,
        _gate(manifest),
    ]
    if manifest.registrar_held_by_server:
        warnings.append(
            "The server itself decides who is a member, so nothing here protects you from a "
            "dishonest server, masks neither."
            if masked
            else "The server itself decides who is a member, so nothing here protects you from a "
            "dishonest server."
        )
    warnings.append(
        f"The server's key is {format_fingerprint(manifest.server)}; it is pinned from now on."
    )
    return Disclosure(what_leaves=tuple(leaves), hosts=tuple(hosts), warnings=tuple(warnings))

"""Where an adapter comes from, for machines (`sheepfold.json`) and for people (`README.md`).

Both say how an adapter was made: base, federation, round, recipe, privacy. Neither says anything of
the data but how many agents had some: no record, no loss, no name of a file or of an agent.

The server uses this module without torch.
"""

import json
import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from protocol.blocks import (
    AggregationBlock,
    BaseBlock,
    EvaluatorGate,
    FilterBlock,
    GateBlock,
    LoraBlock,
    MaskingBlock,
    NoGate,
    TrainingBlock,
)
from protocol.chain import (
    AggregationReport,
    CovarianceGap,
    EvaluatorVerdict,
    NoVerdict,
    Release,
    Verdict,
)
from protocol.errors import ProtocolError
from protocol.guarantee import describe_privacy
from protocol.limits import MAX_JSON_BYTES
from protocol.manifest import FederationManifest
from protocol.numbers import Count, PositiveInt, Text
from protocol.privacy import PrivacyBlock
from protocol.signing import format_fingerprint
from protocol.wire import Bytes16, Digest, Identity, WireModel, is_none, parse
from quant.adapter import write_folder
from quant.errors import AdapterError
from quant.tiny import EMBEDDED_NAME

PROVENANCE_NAME: Final = "sheepfold.json"
TAGS: Final = "tags: [lora, federated-learning, instruction-tuning, sheepfold]"
"""A line of the header of every card of ours."""


class Provenance(WireModel):
    """What a published adapter is and how it was made, free of data.

    `release_digest` is the release's place in the chain: it covers every release before it.
    `n_agents` is what the release says of its own round.
    """

    version: Literal[1] = 1
    federation: Bytes16
    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: Text = ""
    server: Identity
    base: BaseBlock
    lora: LoraBlock
    training: TrainingBlock
    masking: MaskingBlock
    privacy: PrivacyBlock
    aggregation: AggregationBlock
    filter: FilterBlock = FilterBlock()
    gate: GateBlock = NoGate()
    verdict: Verdict = NoVerdict()
    n_rounds: PositiveInt
    release: Count
    round: Count
    rolled_back_to: Count | None = None
    n_agents: Count
    covariance_gap: Annotated[CovarianceGap | None, Field(exclude_if=is_none)] = None
    release_digest: Digest
    weights_sha256: Digest

    def pretty(self) -> bytes:
        """The bytes of `sheepfold.json`, for machines and for people."""
        return (json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n").encode()


class CardKind(Enum):
    """What lies beside a card; the values are the library and the relation of its header."""

    ADAPTER = ("peft", "adapter")
    MERGED = ("transformers", "finetune")
    GGUF = ("gguf", "adapter")


def provenance_of(manifest: FederationManifest, release: Release) -> Provenance:
    """What the signed documents say of a released adapter.

    Args:
        manifest: The federation's.
        release: One of its releases.
    """
    report = release.aggregation
    return Provenance(
        federation=manifest.federation,
        name=manifest.name,
        description=manifest.description,
        server=manifest.server,
        base=manifest.base,
        lora=manifest.lora,
        training=manifest.training,
        masking=manifest.masking,
        privacy=manifest.privacy,
        aggregation=manifest.aggregation,
        filter=manifest.filter,
        gate=manifest.gate,
        verdict=release.verdict,
        n_rounds=manifest.rounds.n_rounds,
        release=release.number,
        round=release.round,
        rolled_back_to=release.rolled_back_to,
        n_agents=report.n_agents,
        covariance_gap=report.covariance_gap if isinstance(report, AggregationReport) else None,
        release_digest=release.digest(),
        weights_sha256=release.adapter.sha256,
    )


def read_provenance(folder: Path) -> Provenance | None:
    """The provenance beside an adapter; None where nobody wrote one.

    Args:
        folder: A PEFT adapter folder.

    Raises:
        AdapterError: There is one, and it cannot be read.
    """
    path = folder / PROVENANCE_NAME
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            return parse(Provenance, file.read(MAX_JSON_BYTES + 1))
    except (OSError, ProtocolError) as error:
        msg = f"cannot read {path}: {error}; without that file the adapter counts as a foreign one"
        raise AdapterError(msg) from error


def write_release(
    folder: Path, *, manifest: FederationManifest, release: Release, weights: bytes, config: bytes
) -> None:
    """Write a release as a PEFT folder with its provenance and its card.

    Args:
        folder: Created with its parents when missing; files of these names are replaced.
        manifest: The federation's.
        release: The release.
        weights: Bytes of `adapter_model.safetensors`, as the release names them.
        config: Bytes of `adapter_config.json`.
    """
    provenance = provenance_of(manifest, release)
    write_folder(folder, weights=weights, config=config, card=model_card(provenance))
    (folder / PROVENANCE_NAME).write_bytes(provenance.pretty())


def model_card(
    provenance: Provenance,
    *,
    kind: CardKind = CardKind.ADAPTER,
    file_name: str = "",
    merge_error: float | None = None,
) -> str:
    """The model card: a header that the Hugging Face hub reads, then text for people.

    Args:
        provenance: What the card says.
        kind: What lies beside it.
        file_name: Of the GGUF file.
        merge_error: `quant.export.logit_error` of a merged model.
    """
    return _header(provenance.base.model, kind) + "\n".join(
        [
            f"# {_cell(provenance.name)}: release {provenance.release}",
            "",
            *_description(provenance.description),
            "",
            *_table([*_kind_rows(kind, merge_error), *_rows(provenance)]),
            "",
            "Made by Sheepfold. The records that it learnt from never left their owners' machines.",
            "",
            *_usage(provenance.base.model, provenance.base.revision, kind, file_name),
            "",
        ]
    )


def foreign_card(
    base_model: str,
    *,
    kind: CardKind,
    weights_sha256: bytes,
    file_name: str = "",
    merge_error: float | None = None,
) -> str:
    """The card of something made from an adapter that came without provenance.

    Args:
        base_model: What its configuration names as base; may be empty.
        kind: What lies beside the card.
        weights_sha256: Digest of the adapter's `adapter_model.safetensors`, 32 bytes.
        file_name: Of the GGUF file.
        merge_error: `quant.export.logit_error` of a merged model.
    """
    rows = [
        *_kind_rows(kind, merge_error),
        ("Base model", _code(base_model) if base_model else "unknown"),
        ("SHA-256 of the adapter's weights", _code(weights_sha256.hex())),
        ("Privacy", "unknown: the adapter came without a record of how it was made"),
    ]
    return _header(base_model, kind) + "\n".join(
        [
            "# From an adapter of unknown origin",
            "",
            *_table(rows),
            "",
            *_usage(base_model, None, kind, file_name),
            "",
        ]
    )


def _header(base_model: str, kind: CardKind) -> str:
    library, relation = kind.value
    lines = [
        "---",
        *([f"base_model: {json.dumps(base_model)}"] if base_model else []),  # JSON is YAML
        *([f"base_model_relation: {relation}"] if base_model else []),
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        TAGS,
        "---",
    ]
    return "\n".join(lines) + "\n\n"


def _description(text: str) -> list[str]:
    """The operator's own words, as a quotation: they cannot pass for a part of the card."""
    if not text:
        return ["A LoRA adapter trained by federated instruction tuning."]
    return [f"> {line}".rstrip() for line in text.splitlines()]


def _kind_rows(kind: CardKind, merge_error: float | None) -> list[tuple[str, str]]:
    if kind is CardKind.ADAPTER:
        return []
    if kind is CardKind.GGUF:
        return [("What", "the adapter as a GGUF LoRA file, float32")]
    rows = [("What", "base, dequantised from NF4, and adapter in one: float16")]
    if merge_error is not None:
        told = f"{merge_error:.1e} of the largest logit, against NF4 base and adapter"
        rows.append(("Error of merging", told))
    return rows


def _rows(told: Provenance) -> list[tuple[str, str]]:
    factors = ", ".join(told.lora.sent)
    privacy = describe_privacy(told.privacy, n_rounds=told.n_rounds)
    again = "" if told.rolled_back_to is None else f"; release {told.rolled_back_to} again"
    revision = "" if told.base.revision is None else f", revision {_code(told.base.revision)}"
    made = (
        f"round {told.round} of {told.n_rounds} from {told.n_agents} agents, "
        f"rule `{told.aggregation.rule}` weighted by `{told.aggregation.weighting}`{again}"
        if told.n_agents
        else f"no round of its own{again or ': the common start'}"
    )
    return [
        ("Base model", f"{_code(told.base.model)}{revision}, NF4 with double quantisation"),
        ("Fingerprint of the base", _code(told.base.fingerprint.hex())),
        (
            "Adapter",
            f"rank {told.lora.rank}, α {told.lora.alpha:g}, rule `{told.lora.rule}`, factors sent: "
            f"{factors}, on " + ", ".join(_code(name) for name in told.lora.target_modules),
        ),
        ("Made in", made),
        *_gap_rows(told.covariance_gap),
        ("Training", _recipe(told.training)),
        ("Prompt template", _code(told.training.template)),
        ("Privacy", f"{privacy}; masking {told.masking.mode}"),
        ("Outlier filter", _code(told.filter.rule)),
        ("Gate", _gate(told)),
        ("Federation", _code(told.federation.hex())),
        ("Fingerprint of the server's key", _code(format_fingerprint(told.server))),
        ("Release digest, which covers all before it", _code(told.release_digest.hex())),
        ("SHA-256 of the adapter's weights", _code(told.weights_sha256.hex())),
    ]


def _gate(told: Provenance) -> str:
    """Whether anyone looked at the adapter before it was published, and what was found."""
    verdict = told.verdict
    if not isinstance(told.gate, EvaluatorGate):
        return "`none`: nobody scored this adapter before it was published"
    who = f"evaluator {_code(format_fingerprint(told.gate.evaluator))}"
    if not isinstance(verdict, EvaluatorVerdict):
        return f"{who}; not asked, as no round made this release"
    report = verdict.report.body
    row = 1 + report.candidates.index(told.weights_sha256)
    left = "" if not verdict.n_left_out else f", without {verdict.n_left_out} of the round's cells"
    return (
        f"{who} found a held-out loss of {report.mean_loss(row):.4g} nats per token after "
        f"{report.mean_loss(0):.4g}, averaged over {len(report.categories)} categories{left}"
    )


def _gap_rows(gap: CovarianceGap | None) -> list[tuple[str, str]]:
    if gap is None:
        return []
    return [("Lost by averaging A and B apart", gap.describe())]


def _recipe(block: TrainingBlock) -> str:
    length = (
        f"{block.local_steps} steps"
        if block.local_steps is not None
        else f"{block.local_epochs} epochs"
    )
    clip = "" if block.max_grad_norm is None else f", gradient norm at most {block.max_grad_norm:g}"
    return (
        f"each agent and round {length} of batch {block.batch_size}, AdamW, learning rate "
        f"{block.learning_rate:g} {block.schedule} to {block.final_frac:g} of it{clip}, loss on "
        f"{block.loss_on}, at most {block.max_length} tokens"
    )


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def _cell(text: str) -> str:
    """A text of others on one line, unable to end its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_cell(text).replace('`', chr(39))}`"


def _usage(base_model: str, revision: str | None, kind: CardKind, file_name: str) -> list[str]:
    if kind is CardKind.GGUF:
        named = shlex.quote(" ".join(file_name.split()) or "THIS.gguf")
        return ["```text", f"llama-cli --model BASE.gguf --lora {named}", "```"]
    return ["```python", *_loading_code(base_model, revision, kind), "```"]


def _loading_code(base_model: str, revision: str | None, kind: CardKind) -> list[str]:
    if kind is CardKind.MERGED:
        return [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("this-folder")',
            'tokenizer = AutoTokenizer.from_pretrained("this-folder")',
        ]
    embedded = base_model == EMBEDDED_NAME
    pinned = "" if revision is None else f", revision={json.dumps(revision)}"
    return [
        "from peft import PeftModel",
        *(["from quant.tiny import tiny_base_path"] if embedded else []),
        "from transformers import AutoModelForCausalLM",
        "",
        "base = AutoModelForCausalLM.from_pretrained("
        + ("tiny_base_path()" if embedded else json.dumps(base_model or "BASE") + pinned)
        + ")",
        'model = PeftModel.from_pretrained(base, "this-folder")',
    ]

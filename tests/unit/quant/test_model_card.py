"""What a published adapter says of itself, to people and to machines."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from protocol.blocks import BaseBlock, EvaluatorGate, TrainingBlock
from protocol.chain import AggregationReport, BlobRef, CovarianceGap, EvaluatorVerdict
from protocol.gating import EvaluationReport
from protocol.signing import format_fingerprint, sign
from quant.adapter import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from quant.errors import AdapterError
from quant.model_card import (
    PROVENANCE_NAME,
    TAGS,
    CardKind,
    Provenance,
    foreign_card,
    model_card,
    provenance_of,
    read_provenance,
    write_release,
)

WEIGHTS = BlobRef(sha256=bytes([9]) * 32, n_bytes=10)


@pytest.fixture
def manifest(make_manifest):
    return make_manifest(name="Notes", description="Of three clinics.")


@pytest.fixture
def release(manifest, make_release):
    return make_release(
        manifest,
        after=make_release(manifest),
        adapter=WEIGHTS,
        aggregation=AggregationReport(rule="fedavg", n_cells=3, n_agents=3, update_norm=0.5),
    )


@pytest.fixture
def provenance(manifest, release) -> Provenance:
    return provenance_of(manifest, release)


def test_the_card_says_what_it_is_how_it_was_made_and_how_private(
    manifest, release, provenance
) -> None:
    card = model_card(provenance)
    for piece in (
        "# Notes: release 1",
        "> Of three clinics.",
        "`synthetic/tiny`",
        manifest.base.fingerprint.hex(),
        "rank 4, α 8, rule `fedit`, factors sent: A, B, on `q_proj`, `v_proj`",
        "round 1 of 3 from 3 agents, rule `fedavg` weighted by `n_examples`",
        "10 steps of batch 32, AdamW, learning rate 0.001 cosine to 0.1",
        "loss on response, at most 512 tokens",
        "`alpaca`",
        "ε = ∞",
        "masking off",
        "| Outlier filter | `none` |",
        "| Gate | `none`: nobody scored this adapter",
        manifest.federation.hex(),
        WEIGHTS.sha256.hex(),
        release.digest().hex(),
        "PeftModel.from_pretrained",
    ):
        assert piece in card, piece


def test_the_card_of_a_gated_adapter_says_what_the_evaluator_found(
    make_manifest, make_release, agent_key
) -> None:
    manifest = make_manifest(gate=EvaluatorGate(evaluator=agent_key.identity))
    first = make_release(manifest)
    release = make_release(manifest, after=first, adapter=WEIGHTS)
    report = EvaluationReport(
        federation=manifest.federation,
        round=release.round,
        task=bytes(32),
        evaluator=agent_key.identity,
        data=bytes(32),
        current=first.adapter.sha256,
        candidates=(bytes(32), WEIGHTS.sha256),
        categories=("closed_qa", "open_qa"),
        n_records=(4, 5),
        losses=((2.0, 3.0), (9.0, 9.0), (1.0, 2.5)),
    )
    verdict = EvaluatorVerdict(report=sign(agent_key, "evaluation", report).signed, n_left_out=2)
    card = model_card(provenance_of(manifest, release.model_copy(update={"verdict": verdict})))
    assert (
        "found a held-out loss of 1.75 nats per token after 2.5, averaged over 2 categories, "
        "without 2 of the round's cells"
    ) in card
    assert format_fingerprint(agent_key.identity) in card
    assert "not asked, as no round made this release" in model_card(provenance_of(manifest, first))


def test_the_card_tells_what_averaging_lost_where_the_release_does(
    manifest, make_release, release
) -> None:
    gap = CovarianceGap(estimated_norm=0.03, estimated_change_norm=0.5)
    report = release.aggregation.model_copy(update={"covariance_gap": gap})
    told = provenance_of(manifest, release.model_copy(update={"aggregation": report}))
    assert "| Lost by averaging A and B apart | about 6.0% of the change |" in model_card(told)
    assert "averaging" not in model_card(provenance_of(manifest, release))
    still = CovarianceGap(estimated_norm=0.0, estimated_change_norm=0.0)
    assert still.describe() == "of a round that changed nothing"


def test_the_first_and_a_rolled_back_release_name_no_agents(
    make_manifest, make_release, manifest, release
) -> None:
    first = model_card(provenance_of(make_manifest(), make_release()))
    assert "the common start" in first
    assert "A LoRA adapter trained by federated instruction tuning." in first
    again = make_release(manifest, after=release, rolled_back_to=0)
    assert "release 0 again" in model_card(provenance_of(manifest, again))


@pytest.mark.parametrize("kind", list(CardKind), ids=lambda kind: kind.name.lower())
def test_the_header_is_one_that_the_hub_reads(provenance, kind: CardKind) -> None:
    for card in (
        model_card(provenance, kind=kind),
        foreign_card("some/base", kind=kind, weights_sha256=bytes(32)),
    ):
        data = ModelCard(card).data
        assert data.library_name == {"ADAPTER": "peft", "MERGED": "transformers"}.get(
            kind.name, "gguf"
        )
        assert data.base_model in {"synthetic/tiny", "some/base"}
        assert data.pipeline_tag == "text-generation"
        assert {"lora", "federated-learning"} <= set(data.tags)
        assert TAGS in card


def test_texts_of_others_cannot_break_header_or_table(make_manifest, make_release) -> None:
    """A federation's operator and its base are named by others."""
    base = BaseBlock(
        model='a"\n---\nlicense: mit | `x`',
        source_dtype="bfloat16",
        fingerprint=bytes(32),
        tokenizer_digest=bytes(32),
    )
    manifest = make_manifest(base=base, name="Nice\n# other | title")
    card = model_card(provenance_of(manifest, make_release(manifest)))
    header = card.split("\n---\n")[0].removeprefix("---\n")
    assert yaml.safe_load(header)["base_model"] == base.model
    assert "license" not in yaml.safe_load(header)
    assert "# Nice # other \\| title: release 0\n" in card
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {3}


def test_a_description_cannot_pass_for_a_part_of_the_card(make_manifest, make_release) -> None:
    text = "Nice.\n\n## Privacy\n| Privacy | ε = 0.1 |\n"
    manifest = make_manifest(description=text)
    lines = model_card(provenance_of(manifest, make_release(manifest))).splitlines()
    assert all(f"> {line}".rstrip() in lines for line in text.splitlines())
    assert "## Privacy" not in lines
    assert sum(line.startswith("| Privacy") for line in lines) == 1


def test_the_code_of_the_card_loads_the_revision_that_was_trained_on(
    make_manifest, make_release
) -> None:
    base = make_manifest().base.model_copy(update={"revision": "abc"})
    manifest = make_manifest(base=base)
    card = model_card(provenance_of(manifest, make_release(manifest)))
    assert 'from_pretrained("synthetic/tiny", revision="abc")' in card


def test_a_file_name_is_quoted_for_the_shell(provenance) -> None:
    card = model_card(provenance, kind=CardKind.GGUF, file_name="my notes; rm.gguf")
    assert "--lora 'my notes; rm.gguf'" in card


def test_a_base_that_nobody_names_is_not_in_the_header() -> None:
    card = foreign_card("", kind=CardKind.ADAPTER, weights_sha256=bytes(32))
    assert ModelCard(card).data.base_model is None
    assert "| Base model | unknown |" in card


def test_epochs_and_no_clipping_are_told_too(make_manifest, make_release) -> None:
    training = TrainingBlock(local_epochs=2, learning_rate=1e-3, max_grad_norm=None)
    manifest = make_manifest(training=training)
    card = model_card(provenance_of(manifest, make_release(manifest)))
    assert "2 epochs" in card
    assert "gradient norm" not in card


def test_a_merged_model_tells_its_error_and_a_gguf_file_its_name(provenance) -> None:
    merged = model_card(provenance, kind=CardKind.MERGED, merge_error=3.1e-4)
    assert "3.1e-04 of the largest logit" in merged
    assert "AutoModelForCausalLM" in merged
    assert "PeftModel" not in merged
    gguf = model_card(provenance, kind=CardKind.GGUF, file_name="my.gguf")
    assert "--lora my.gguf" in gguf


def test_an_adapter_of_unknown_origin_claims_no_privacy() -> None:
    card = foreign_card("some/base", kind=CardKind.MERGED, weights_sha256=bytes(32))
    assert "Privacy | unknown" in card
    assert "ε" not in card


def test_the_embedded_base_is_loaded_from_the_package(provenance) -> None:
    base = provenance.base.model_copy(update={"model": "embedded:tiny"})
    card = model_card(provenance.model_copy(update={"base": base}))
    assert "tiny_base_path()" in card


def test_provenance_holds_nothing_of_the_data(provenance) -> None:
    """Every field comes from the signed manifest or the signed release."""
    told = json.loads(provenance.pretty())
    assert set(told) == {
        *("version", "federation", "name", "description", "server", "base", "lora", "training"),
        *(
            "masking",
            "privacy",
            "aggregation",
            "filter",
            "gate",
            "verdict",
            "n_rounds",
            "release",
            "round",
            "rolled_back_to",
        ),
        *("n_agents", "release_digest", "weights_sha256"),
    }


def test_a_written_release_is_read_back(manifest, release, provenance, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "adapter"
    write_release(folder, manifest=manifest, release=release, weights=b"w", config=b"{}")
    names = {path.name for path in folder.iterdir()}
    assert names == {WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, PROVENANCE_NAME}
    assert read_provenance(folder) == provenance
    assert (folder / CARD_NAME).read_text(encoding="utf-8") == model_card(provenance)


@pytest.mark.parametrize("text", ["junk", "{}", '{"version": 2}', "x" * 2_000_000])
def test_bad_provenance_is_refused(tmp_path: Path, text: str) -> None:
    assert read_provenance(tmp_path) is None
    (tmp_path / PROVENANCE_NAME).write_text(text)
    with pytest.raises(AdapterError, match=r"cannot read .*sheepfold\.json"):
        read_provenance(tmp_path)

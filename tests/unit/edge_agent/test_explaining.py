"""What an owner is told of the server: which trust model is in force, and what is not claimed."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent import cli
from edge_agent.consent import disclose
from edge_agent.explaining import Explanation, explain
from edge_agent.home import AgentHome
from edge_agent.journal import Journal
from protocol.blocks import (
    AggregationBlock,
    CellMasking,
    EvaluatorGate,
    HelperMasking,
    RoundsBlock,
    Weighting,
)
from protocol.manifest import FederationManifest
from protocol.messages import Discovery, ReleasePage
from protocol.signing import Signer, format_fingerprint, sign

Make = Callable[..., FederationManifest]


def cells(**changes: Any) -> CellMasking:
    values = {"max_change": 1.0, "clip_norm": 20.0, "cell_target": 10, "ready_delay_s": 12.5}
    return CellMasking(**{**values, **changes})


@pytest.fixture
def make_masked(make_manifest: Make, agent_key: Signer) -> Make:
    """A masked federation; `apart` is the registrar in other hands than the server's."""

    def make(*, apart: bool = True, **changes: Any) -> FederationManifest:
        values: dict[str, Any] = {
            "masking": cells(),
            "aggregation": AggregationBlock(max_weight=50),
            "rounds": RoundsBlock(n_rounds=3, cohort_target=40, min_cohort=40),
        }
        if apart:
            values |= {"registrar": agent_key.identity, "registrar_held_by_server": False}
        return make_manifest(**{**values, **changes})

    return make


@pytest.fixture
def make_any(make_manifest: Make, make_masked: Make, agent_key: Signer) -> Make:
    """A federation by the name of its trust model."""

    def make(mode: str, *, apart: bool) -> FederationManifest:
        if mode == "cells":
            return make_masked(apart=apart)
        if mode == "helper":
            helper = HelperMasking(
                max_change=1.0, clip_norm=20.0, helper=agent_key.identity, helper_key=bytes(1216)
            )
            return make_masked(apart=apart, masking=helper)
        if not apart:
            return make_manifest()
        return make_manifest(registrar=agent_key.identity, registrar_held_by_server=False)

    return make


def whole(found: Explanation) -> str:
    parts = (found.trust_model, *found.learns, *found.does_not_learn, *found.not_claimed)
    return "\n".join(parts)


# The open mode


def test_of_the_open_mode_it_is_said_that_the_operator_sees_each_update(
    make_manifest: Make,
) -> None:
    found = explain(make_manifest())
    assert found.trust_model.startswith("Open: you trust the operator")
    assert "Masking is off" in found.trust_model
    assert "Your update by itself" in found.learns[0]
    assert "reconstructed" in found.learns[0]
    assert not any("update" in text for text in found.does_not_learn)


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (AggregationBlock(max_weight=77), True),
        (AggregationBlock(weighting=Weighting.UNIFORM), False),
    ],
)
def test_that_the_number_of_examples_is_learnt_is_said_only_where_it_is_so(
    make_manifest: Make, make_masked: Make, block: AggregationBlock, told: bool
) -> None:
    found = explain(make_manifest(aggregation=block))
    assert any("How many examples you have, up to 77" in text for text in found.learns) is told
    masked = explain(make_masked(aggregation=block.model_copy(update={"max_weight": 77})))
    assert not any("How many examples" in text for text in masked.learns)
    assert any("How many examples you have" in text for text in masked.does_not_learn)


# Masked cells


def test_of_masked_cells_it_is_said_that_the_server_sees_one_sum_for_each(
    make_masked: Make,
) -> None:
    found = explain(make_masked())
    assert found.trust_model.startswith("Masked cells: an honest-but-curious server")
    assert "never your update" in found.trust_model
    assert "5 to 19 agents" in found.trust_model
    assert not any(text.startswith("Your update by itself") for text in found.learns)
    assert any(text.startswith("Your update by itself") for text in found.does_not_learn)
    assert any("delay of up to 12.5 s" in text for text in found.learns)


@pytest.mark.parametrize(
    ("block", "colluders", "honest"),
    [
        (cells(cell_target=5, min_cell=5, max_cell=9), 1, 3),
        (cells(min_cell=10), 2, 5),
        (cells(min_cell=10, colluders=4), 4, 4),
        (cells(cell_target=16, min_cell=16, max_cell=32), 3, 7),
    ],
)
def test_the_numbers_are_those_of_the_smallest_cell(
    make_masked: Make, block: CellMasking, colluders: int, honest: int
) -> None:
    """PROTOCOL, "Cells": c = max(1, (m + 2)//5) or more, and t = ⌊(m + c)/2⌋ + 1."""
    found = explain(make_masked(masking=block))
    smallest = block.min_cell
    assert f"each cell of {smallest} to {block.max_cell} agents" in found.learns[0]
    assert f"at least {honest} are honest" in found.learns[0]
    limit = f"at most {colluders} of a cell of {smallest}"
    assert any(limit in text for text in found.does_not_learn)


def test_what_masks_do_not_give_is_said(make_masked: Make) -> None:
    text = "\n".join(explain(make_masked()).not_claimed)
    for piece in (
        "secure aggregation is not differential privacy",
        "a server that invents members",
        "one of them can spoil its cell",
        "future quantum computer",
        "flash storage",
        "Privacy over many rounds",
        "Anonymity",
    ):
        assert piece in text, piece


def test_that_the_server_decides_who_is_a_member_is_the_first_thing_that_is_not_claimed(
    make_masked: Make,
) -> None:
    held = explain(make_masked(apart=False)).not_claimed
    assert held[0].startswith("Protection from a dishonest server")
    assert "the server itself decides who is a member" in held[0]
    apart = explain(make_masked()).not_claimed
    assert not any("decides who is a member" in text for text in apart)
    assert set(apart) < set(held)


# Whatever the mode


@pytest.mark.parametrize("apart", [False, True], ids=["registrar-held", "registrar-apart"])
@pytest.mark.parametrize("mode", ["open", "cells", "helper"])
def test_epsilon_is_infinite_in_every_mode(make_any: Make, mode: str, apart: bool) -> None:
    manifest = make_any(mode, apart=apart)
    found = explain(manifest)
    assert sum("ε = ∞" in text for text in found.not_claimed) == 1
    assert any("differential privacy is off (profile P0)" in text for text in found.not_claimed)
    assert "ε" not in "\n".join((found.trust_model, *found.learns, *found.does_not_learn))


@pytest.mark.parametrize("mode", ["open", "cells", "helper"])
def test_under_noise_every_epsilon_comes_with_all_that_it_means(make_any: Make, mode: str) -> None:
    manifest = with_noise(make_any(mode, apart=False))
    found = explain(manifest)
    told = disclose(manifest, server_host="example.org", base_folder=None, round_n_bytes=4_000_000)
    texts = [found.privacy, *(text for text in told.warnings if "ε" in text)]
    assert len(texts) == 2
    for text in texts:
        for part in ("P1", "ε ≤ 8", "δ = 1e-05", "each example", "add or remove one", "PLD"):
            assert part in text
        for part in ("server, members and public", "Poisson", "multiplier", "all 3 rounds"):
            assert part in text
    assert not any("∞" in text for text in (*texts, *found.not_claimed, *told.warnings))
    assert any("taken as known" in text for text in found.not_claimed)


def with_noise(manifest: FederationManifest) -> FederationManifest:
    data = manifest.as_json()
    data["privacy"] = {
        "version": 1,
        "profile": "P1",
        "epsilon": 8.0,
        "delta": 1e-5,
        "clip_norm": 1.0,
    }
    data["aggregation"]["weighting"] = "uniform"
    data["lora"]["dropout"] = 0.0
    data["training"] |= {"local_steps": 10, "local_epochs": None}
    return FederationManifest.model_validate_json(json.dumps(data))


@pytest.mark.parametrize("apart", [False, True], ids=["registrar-held", "registrar-apart"])
@pytest.mark.parametrize("mode", ["open", "cells", "helper"])
def test_join_says_which_trust_model_is_in_force(make_any: Make, mode: str, apart: bool) -> None:
    manifest = make_any(mode, apart=apart)
    told = disclose(manifest, server_host="example.org", base_folder=None, round_n_bytes=4_000_000)
    assert explain(manifest).trust_model in told.warnings
    assert any("ε = ∞" in text for text in told.warnings)
    held = [text for text in told.warnings if "decides who is a member" in text]
    assert len(held) == (0 if apart else 1)
    if not apart and mode != "open":
        assert "masks neither" in held[0]
    masked = mode != "open"
    assert any("masked so that only a sum" in text for text in told.what_leaves) is masked
    size = "2.00 MB" if masked else "4.00 MB"  # words of 16 bits
    assert f"an adapter update of {size}" in told.what_leaves[0]
    assert any("number of your examples" in text for text in told.what_leaves) is not masked


@pytest.mark.parametrize("mode", ["open", "cells", "helper"])
def test_every_sentence_is_one_and_nothing_is_said_twice(make_any: Make, mode: str) -> None:
    found = explain(make_any(mode, apart=False))
    sentences = whole(found).split("\n")
    assert all(text.endswith(".") and text[0].isupper() for text in sentences)
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize("mode", ["open", "cells", "helper"])
def test_what_an_evaluator_sees_is_said_where_there_is_one(
    make_any: Make, agent_key, mode: str
) -> None:
    manifest = make_any(mode, apart=False)
    assert "evaluator" not in whole(explain(manifest))
    gate = EvaluatorGate(evaluator=agent_key.identity)
    found = explain(manifest.model_copy(update={"gate": gate})).learns[-1]
    assert format_fingerprint(agent_key.identity) in found
    assert ("single updates" if mode == "open" else "sums of cells") in found
    once = gate.model_copy(update={"max_retries": 0})
    assert "without" not in explain(manifest.model_copy(update={"gate": once})).learns[-1]


@pytest.mark.parametrize("mode", ["open", "cells"])
def test_join_says_whether_anybody_checks_what_is_published(
    make_any: Make, agent_key, mode: str
) -> None:
    manifest = make_any(mode, apart=False)
    told = disclose(manifest, server_host="h", base_folder=None, round_n_bytes=1).warnings
    assert any(text.startswith("Nobody checks an adapter") for text in told)
    gated = manifest.model_copy(update={"gate": EvaluatorGate(evaluator=agent_key.identity)})
    told = disclose(gated, server_host="h", base_folder=None, round_n_bytes=1).warnings
    assert any(format_fingerprint(agent_key.identity) in text for text in told)


# The command


@pytest.fixture
def type_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run a command as typed: its exit code, its output, its errors."""
    monkeypatch.setenv("SHEEPFOLD_AGENT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str, answer: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sheepfold-agent", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def joined(tmp_path: Path, server_key: Signer) -> Callable[[FederationManifest], None]:
    """A home that joined a federation."""

    def join(manifest: FederationManifest) -> None:
        home = AgentHome(tmp_path / "home")
        home.create()
        journal = Journal(home.journal_path)
        signed = sign(server_key, "federation", manifest).signed
        journal.join(url="https://h", federation=signed, data="x", now=1.0)
        journal.close()

    return join


@pytest.mark.parametrize("mode", ["open", "cells", "helper"])
def test_explain_gives_all_of_it_as_json(type_in, joined, make_any: Make, mode: str) -> None:
    manifest = make_any(mode, apart=False)
    joined(manifest)
    code, out, err = type_in("explain", "--json", "-")
    assert (code, err) == (0, "")
    found = json.loads(out)
    expected = explain(manifest)
    assert found == {
        "trust_model": expected.trust_model,
        "privacy": expected.privacy,
        "learns": list(expected.learns),
        "does_not_learn": list(expected.does_not_learn),
        "not_claimed": list(expected.not_claimed),
    }


def test_explain_writes_json_to_a_file(type_in, joined, make_any: Make, tmp_path: Path) -> None:
    joined(make_any("cells", apart=True))
    code, out, _ = type_in("explain", "--json", str(tmp_path / "found.json"))
    assert (code, out) == (0, "")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["trust_model"].startswith("Masked cells")


@pytest.mark.parametrize("mode", ["open", "cells", "helper"])
def test_explain_tells_all_of_it_in_words(type_in, joined, make_any: Make, mode: str) -> None:
    manifest = make_any(mode, apart=True)
    joined(manifest)
    code, out, _ = type_in("explain")
    assert code == 0
    told = " ".join(out.split())
    for text in whole(explain(manifest)).split("\n"):
        assert text in told
    for heading in ("can learn", "cannot learn", "not claimed"):
        assert heading in told


def test_explain_before_joining_says_how_to_begin(type_in, tmp_path: Path) -> None:
    code, out, err = type_in("explain", "--json", "-")
    assert (code, out) == (1, "")
    assert "no federation was joined" in err
    assert "sheepfold-agent join" in err
    assert not (tmp_path / "home").exists()


def test_explain_explains_itself(type_in) -> None:
    code, out, _ = type_in("explain", "--help")
    assert code == 0
    assert "What the server of your federation can learn" in " ".join(out.split())


@pytest.mark.parametrize("mode", ["cells", "open"])
def test_join_shows_the_trust_model_before_it_asks(
    type_in, make_any: Make, make_release, server, answer, server_key, tmp_path: Path, mode: str
) -> None:
    manifest = make_any(mode, apart=False)
    discovery = Discovery(
        federation=sign(server_key, "federation", manifest).signed,
        enrolment="open",
        server_time=1.0,
    )
    release = sign(server_key, "release", make_release(manifest)).signed
    page = ReleasePage(releases=(release,), newest=0)

    def give(seen: Any) -> Any:
        found = discovery if seen.path == "/v1/federation" else page
        return answer(body=found.canonical())

    server.script = [give]
    data = tmp_path / "notes.jsonl"
    data.write_text(json.dumps({"instruction": "Say 1.", "response": "1"}) + "\n")
    code, _, err = type_in("join", server.url, "--data", str(data), answer="n\n")
    assert code == 1
    told = " ".join(err.replace("│", " ").split())
    assert explain(manifest).trust_model in told
    assert "ε = ∞" in told
    assert format_fingerprint(server_key.identity) in told
    assert told.index(explain(manifest).trust_model) < told.index("Join this federation?")
    assert {seen.method for seen in server.seen} == {"GET"}

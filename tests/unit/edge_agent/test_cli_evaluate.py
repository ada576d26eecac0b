"""`identity` and `evaluate` as typed, in process; the evaluator's role has a test of processes."""

import json
import sys
from pathlib import Path

import pytest
import torch

from edge_agent import cli
from edge_agent.home import AgentHome
from protocol.signing import format_fingerprint
from protocol.wire import b64u_decode
from quant.base_model import load_base


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHEEPFOLD_AGENT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SHEEPFOLD_AGENT_DEVICE", "cpu")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sheepfold-agent", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def records(tmp_path: Path) -> Path:
    rows = [
        {"instruction": f"Name thing {k}.", "context": "", "response": "A hen.", "category": name}
        for name in ("open_qa", "closed_qa")
        for k in range(3)
    ]
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_an_identity_is_made_once(type_in, tmp_path: Path) -> None:
    code, out, err = type_in("identity")
    assert code == 0, err
    assert type_in("identity")[1] == out
    own = AgentHome(tmp_path / "home").load_or_create_signer().identity
    assert b64u_decode(out.strip(), n_bytes=32) == own
    assert format_fingerprint(own) in err
    told = json.loads(type_in("identity", "--json", "-")[1])
    assert told["identity"] == out.strip()


def test_an_adapter_is_scored_by_category(
    type_in, make_adapter_folder, records: Path, tmp_path: Path
) -> None:
    base = load_base("embedded:tiny", device=torch.device("cpu"))
    adapter = make_adapter_folder(tmp_path / "adapter", base.description)
    code, out, err = type_in(
        "evaluate", adapter, "--data", records, "--max-new-tokens", 8, "--json", "-"
    )
    assert code == 0, err
    found = json.loads(out)
    assert set(found) == {"loss", "exact_match", "rouge_l"}
    by_category = found["loss"]["by_category"]
    assert {name: one["n_records"] for name, one in by_category.items()} == {
        "closed_qa": 3,
        "open_qa": 3,
    }
    mean = sum(one["score"] for one in by_category.values()) / 2
    assert found["loss"]["average_over_categories"] == pytest.approx(mean)
    shown = type_in("evaluate", adapter, "--data", records, "--max-new-tokens", 8)[1]
    assert "average over categories" in shown
    assert f"{found['loss']['average_over_categories']:.4f}" in shown


def test_what_is_missing_is_one_sentence(type_in, tmp_path: Path, records: Path) -> None:
    code, _, err = type_in("evaluate", tmp_path / "none", "--data", records)
    assert code == 1
    assert "there is no such folder" in " ".join(err.split())
    code, _, err = type_in(
        "evaluate", "http://example.org", "--role", "evaluator", "--data", records
    )
    assert code == 1
    assert "is not encrypted" in " ".join(err.split())

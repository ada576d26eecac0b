"""Exports: whole or not at all, and nothing that is in the way is lost."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from edge_agent import exporting
from edge_agent.errors import ExportTargetError
from edge_agent.exporting import check_targets, export_adapter
from quant.adapter import CONFIG_NAME, WEIGHTS_NAME, read_folder
from quant.base_model import LoadedBase
from quant.errors import BaseModelError, ExportError, FingerprintError
from quant.export import read_gguf
from quant.model_card import PROVENANCE_NAME, read_provenance
from quant.peft_folder import FinishedAdapter, read_finished


@pytest.fixture
def adapter(random_base: LoadedBase, make_adapter_folder, tmp_path: Path) -> FinishedAdapter:
    return read_finished(make_adapter_folder(tmp_path / "adapter", random_base.description))


@pytest.fixture
def run(adapter: FinishedAdapter, random_base_dir: Path):
    def run(**changes):
        values = {
            "folder": None,
            "merged": False,
            "gguf": None,
            "base": str(random_base_dir),
            "force": False,
            "say": lambda _: None,
        }
        return export_adapter(changes.pop("adapter", adapter), **{**values, **changes})

    return run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_peft_folder_is_the_adapters_with_provenance_and_card(
    run, adapter: FinishedAdapter, tmp_path: Path
) -> None:
    done = run(folder=tmp_path / "deep" / "out")
    assert (done.merge_error, done.gguf) == (None, None)
    assert everything(tmp_path / "deep" / "out") == everything(adapter.folder)
    assert names(tmp_path / "deep") == {"out"}


def test_a_merged_model_stands_with_card_and_provenance(
    run, adapter: FinishedAdapter, tmp_path: Path
) -> None:
    done = run(folder=tmp_path / "out", merged=True, gguf=tmp_path / "a" / "x.gguf")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert done.merge_error is not None
    assert 0 < done.merge_error < 5e-4
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"{done.merge_error:.1e}" in card
    assert "library_name: transformers" in card
    assert read_provenance(tmp_path / "out") == adapter.provenance
    assert CONFIG_NAME not in names(tmp_path / "out")
    assert names(tmp_path / "a") == {"x.gguf", "x.gguf.md"}
    assert "--lora x.gguf" in (tmp_path / "a" / "x.gguf.md").read_text(encoding="utf-8")
    assert done.n_gguf_layers == len(read_gguf(tmp_path / "a" / "x.gguf")[1]) // 2 == 8


def test_a_foreign_adapter_is_exported_as_one_of_unknown_origin(
    run, random_base: LoadedBase, make_adapter_folder, tmp_path: Path
) -> None:
    folder = make_adapter_folder(tmp_path / "f", random_base.description, foreign=True)
    foreign = read_finished(folder)
    run(adapter=foreign, folder=tmp_path / "out", merged=True, gguf=tmp_path / "x.gguf")
    for card in (tmp_path / "out" / "README.md", tmp_path / "x.gguf.md"):
        assert "unknown origin" in card.read_text(encoding="utf-8")
    assert PROVENANCE_NAME not in names(tmp_path / "out")


def test_a_foreign_folder_is_exported_with_a_card_that_claims_nothing(
    run, random_base: LoadedBase, make_adapter_folder, tmp_path: Path
) -> None:
    folder = make_adapter_folder(tmp_path / "f", random_base.description, foreign=True)
    foreign = read_finished(folder)
    for force in (False, True):  # and so it is known for an export
        run(adapter=foreign, folder=tmp_path / "out", force=force)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "unknown origin" in card
    assert "Somebody" not in card
    assert everything(tmp_path / "out") == {**everything(folder), "README.md": card.encode()}


def test_an_earlier_export_is_replaced_on_request_only_and_whole(run, tmp_path: Path) -> None:
    out, gguf = tmp_path / "out", tmp_path / "x.gguf"
    run(folder=out, merged=True, gguf=gguf)
    before = everything(tmp_path)
    with pytest.raises(ExportTargetError, match=r"not empty; name a new folder.*--force"):
        run(folder=out)
    with pytest.raises(ExportTargetError, match="exists already"):
        run(gguf=gguf)
    assert everything(tmp_path) == before
    run(folder=out, gguf=gguf, force=True)
    assert "model.safetensors" not in names(out)  # or transformers would load two things at once
    assert read_folder(out)
    run(folder=out, merged=True, force=True)
    assert WEIGHTS_NAME not in names(out)


def test_files_that_no_export_wrote_are_never_replaced(
    run, random_base_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(folder=out)
    (out / "thesis.txt").write_text("mine")
    for folder in (out, random_base_dir):  # a base model has files of the names of an export
        before = everything(folder)
        with pytest.raises(ExportTargetError, match="which no export wrote"):
            run(folder=folder, force=True, base=None)
        assert everything(folder) == before


def test_a_file_that_no_export_wrote_is_never_replaced_by_gguf(
    run, adapter: FinishedAdapter, tmp_path: Path
) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    (tmp_path / "x.gguf.md").write_text("mine")
    weights = adapter.folder / WEIGHTS_NAME
    before = everything(tmp_path)
    for path in (tmp_path / "base.gguf", tmp_path / "x.gguf", weights):
        with pytest.raises(ExportTargetError, match="no export wrote it"):
            run(gguf=path, force=True)
    assert everything(tmp_path) == before


def test_a_file_that_is_put_there_meanwhile_is_not_lost(run, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    run(folder=out)

    def slow_merge(stage: Path, *_: object) -> float:
        (stage / "model.safetensors").touch()
        (out / "thesis.txt").write_text("mine")
        return 0.0

    monkeypatch.setattr(exporting, "_merge_into", slow_merge)
    with pytest.raises(ExportTargetError, match=r"thesis\.txt, which no export wrote"):
        run(folder=out, merged=True, force=True)
    assert {"thesis.txt", WEIGHTS_NAME} <= names(out)


def test_an_empty_folder_is_filled_and_a_file_is_no_folder(run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run(folder=tmp_path / "empty")
    assert WEIGHTS_NAME in names(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportTargetError, match="is a file"):
        run(folder=tmp_path / "file", force=True)
    with pytest.raises(ExportTargetError, match="exists already"):
        check_targets(None, tmp_path / "empty", force=True)
    with pytest.raises(ExportTargetError, match="cannot be both"):
        run(folder=tmp_path / "x", gguf=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_an_export_is_made_from_is_not_its_target(
    run, adapter: FinishedAdapter, random_base_dir: Path
) -> None:
    for folder in (adapter.folder, adapter.folder / "." / ".." / adapter.folder.name):
        before = everything(adapter.folder)
        with pytest.raises(ExportTargetError, match="made from"):
            run(folder=folder, merged=True, force=True)
        assert everything(adapter.folder) == before


def test_an_error_leaves_no_half_and_what_was_there(run, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    run(folder=out)
    before = everything(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "logit_error", full)
    with pytest.raises(OSError, match="No space left"):
        run(folder=out, merged=True, force=True)
    assert everything(tmp_path) == before
    with pytest.raises(OSError, match="No space left"):
        run(folder=tmp_path / "new", merged=True)
    assert everything(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_leavings_of_a_killed_export_do_not_matter(run, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_text("half")
    run(folder=tmp_path / "out")
    assert "model.safetensors" not in names(tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_an_export_killed_between_its_two_moves_loses_nothing(
    run, tmp_path: Path, monkeypatch
) -> None:
    run(folder=tmp_path / "out")
    before = everything(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    (tmp_path / ".out.partial").mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "_copy_into", full)
    with pytest.raises(ExportTargetError, match="is not empty"):
        run(folder=tmp_path / "out")
    assert everything(tmp_path / "out") == before
    with pytest.raises(OSError, match="No space left"):
        run(folder=tmp_path / "out", force=True)
    assert everything(tmp_path / "out") == before


def test_a_folder_that_cannot_be_replaced_is_put_back(run, tmp_path: Path, monkeypatch) -> None:
    run(folder=tmp_path / "out")
    before = everything(tmp_path)
    replace = Path.replace

    def busy(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(16, "Device or resource busy")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", busy)
    with pytest.raises(OSError, match="busy"):
        run(folder=tmp_path / "out", force=True)
    assert everything(tmp_path) == before


def test_a_format_that_cannot_hold_it_is_told_before_anything_is_merged(
    run, random_base_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "gpt"
    other.mkdir()
    config = json.loads((random_base_dir / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["NewForCausalLM"]}))
    with pytest.raises(ExportError, match="NewForCausalLM"):
        run(folder=tmp_path / "out", merged=True, gguf=tmp_path / "x.gguf", base=str(other))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "x.gguf").exists()


def test_merging_needs_the_base_that_it_was_made_for(run, tmp_path: Path) -> None:
    with pytest.raises(FingerprintError):
        run(folder=tmp_path / "out", merged=True, base="embedded:tiny")
    with pytest.raises(BaseModelError, match="in a folder, name it with --base"):
        run(folder=tmp_path / "out", merged=True, base=None)
    with pytest.raises(BaseModelError, match="in a folder, name it with --base"):
        run(gguf=tmp_path / "x.gguf", base=None)
    assert names(tmp_path) == {"adapter"}

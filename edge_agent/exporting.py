"""Writes a finished adapter for others: its PEFT folder, merged into its base, or as GGUF.

A target appears whole or not at all, and what is in the way is never lost: a folder is replaced
only on request, and only when all that it holds are files of an earlier export.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import PretrainedConfig

from edge_agent.answering import base_hint, base_source, load_base_of, single_question, template_of
from edge_agent.data.tokens import RecordTokenizer
from edge_agent.errors import ExportTargetError
from protocol.blocks import LossOn
from quant.adapter import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from quant.export import base_config, gguf_tensors, logit_error, merge, write_gguf
from quant.model_card import PROVENANCE_NAME, TAGS, CardKind, foreign_card, model_card
from quant.peft_folder import FinishedAdapter, attach

_FILES_OF_PEFT: Final = (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, PROVENANCE_NAME)
_OURS: Final = re.compile(
    r"adapter_(model\.safetensors|config\.json)|README\.md|sheepfold\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json"
    r"|tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|chat_template\.jinja"
)
"""Names that an export may have written."""
_QUESTIONS: Final = (
    "Name three things that can be seen in a street.",
    "Explain in two sentences why the sky is blue.",
    "Write a short letter to a friend who has moved to another town.",
)
"""What a merged model is compared on."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote.

    Attributes:
        folder: The PEFT folder, or the merged model's; None if none was asked for.
        gguf: The GGUF file; None if none was asked for.
        n_gguf_layers: How many layers it adapts.
        merge_error: `quant.export.logit_error`; None without merging.
    """

    folder: Path | None
    gguf: Path | None
    n_gguf_layers: int
    merge_error: float | None


def export_adapter(
    adapter: FinishedAdapter,
    *,
    folder: Path | None,
    merged: bool,
    gguf: Path | None,
    base: str | None,
    force: bool,
    say: Callable[[str], None],
) -> Exported:
    """Write an adapter as asked.

    Guarantees:
        1. A folder or file that is in the way stays as it was, unless `force` is set and an earlier
           export wrote all of it.
        2. After an error there is no half of a folder or file.

    Args:
        adapter: What to export.
        folder: Where the PEFT folder or the merged model goes; None: nowhere.
        merged: Whether base and adapter become one model there.
        gguf: Where a GGUF LoRA file goes; None: nowhere. Its card goes beside it.
        base: A folder or hub id of the base; None: as the adapter names it.
        force: Replace an earlier export.
        say: Told what takes long.

    Raises:
        ExportTargetError: Something is in the way.
        QuantError: The base cannot be used or is another one, or a format cannot hold the adapter.
    """
    if folder is not None:
        _put_back(folder)
    check_targets(folder, gguf, force=force)
    sources = {adapter.folder.resolve()} | (set() if base is None else {Path(base).resolve()})
    if folder is not None and folder.resolve() in sources:
        msg = f"{folder} is what the export is made from; name another folder"
        raise ExportTargetError(msg)
    if folder is not None and gguf is not None and folder.resolve() == gguf.resolve():
        msg = f"{gguf} cannot be both the folder and the GGUF file; name another file"
        raise ExportTargetError(msg)
    if gguf is not None:
        gguf_tensors(adapter, _config_of(adapter, base))  # refused now, not after a merge
    merge_error = None
    n_layers = 0
    if folder is not None:
        with _staged(folder) as stage:
            if merged:
                merge_error = _merge_into(stage, adapter, base, say)
            else:
                _copy_into(stage, adapter)
            check_targets(folder, None, force=force)  # merging takes long enough to add a file
    if gguf is not None:
        gguf.parent.mkdir(parents=True, exist_ok=True)
        n_layers = write_gguf(gguf, adapter, _config_of(adapter, base))
        card = _card(adapter, CardKind.GGUF, file_name=gguf.name)
        _card_beside(gguf).write_text(card, encoding="utf-8")
    return Exported(folder=folder, gguf=gguf, n_gguf_layers=n_layers, merge_error=merge_error)


def check_targets(folder: Path | None, gguf: Path | None, *, force: bool) -> None:
    """Refuse targets where something is in the way; nothing is touched.

    Args:
        folder: As `export_adapter`.
        gguf: As `export_adapter`.
        force: As `export_adapter`.

    Raises:
        ExportTargetError: Something is in the way.
    """
    if folder is not None and folder.exists():
        if not folder.is_dir():
            msg = f"{folder} is a file; name a folder"
            raise ExportTargetError(msg)
        names = sorted(path.name for path in folder.iterdir())
        if names and not force:
            msg = f"{folder} is not empty; name a new folder, or replace an export with --force"
            raise ExportTargetError(msg)
        foreign = [name for name in names if not _OURS.fullmatch(name)]
        if names and (foreign or not _is_our_card(folder / CARD_NAME)):
            msg = (
                f"{folder} holds {(foreign or names)[0]}, which no export wrote; name a new or "
                "empty folder"
            )
            raise ExportTargetError(msg)
    if gguf is None:
        return
    for path in (gguf, _card_beside(gguf)):
        if path.is_dir() or (path.exists() and not force):
            msg = f"{path} exists already; name another file, or replace it with --force"
            raise ExportTargetError(msg)
        if path.exists() and not _is_our_card(_card_beside(gguf)):
            msg = f"{path} exists already, and no export wrote it; name another file"
            raise ExportTargetError(msg)


def _is_our_card(path: Path) -> bool:
    """Whether an export wrote this card: a base model's folder has files of the same names."""
    try:
        return TAGS in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _config_of(adapter: FinishedAdapter, given: str | None) -> PretrainedConfig:
    with base_hint(adapter, given):
        source, revision = base_source(adapter, given)
        return base_config(source, revision=revision)


def _card_beside(gguf: Path) -> Path:
    return gguf.with_name(gguf.name + ".md")


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, which takes its place once the context ends well."""
    folder = folder.resolve()
    stage, old = folder.with_name(f".{folder.name}.partial"), _aside(folder)
    for left_over in (stage, old):  # of an export that was killed
        if left_over.exists():
            shutil.rmtree(left_over)
    stage.mkdir(parents=True)
    try:
        yield stage
        _take_place(stage, folder, old)
    finally:
        if stage.exists():
            shutil.rmtree(stage)


def _aside(folder: Path) -> Path:
    """Where an earlier export stands while a new one takes its place."""
    return folder.resolve().with_name(f".{folder.resolve().name}.old")


def _put_back(folder: Path) -> None:
    """Bring back an earlier export that a kill left aside, between the moves of `_take_place`."""
    if folder.resolve().name and _aside(folder).exists() and not folder.exists():
        _aside(folder).replace(folder.resolve())


def _take_place(stage: Path, folder: Path, old: Path) -> None:
    """Put `stage` where `folder` is; when that fails, `folder` is as it was."""
    was_there = folder.exists() and any(folder.iterdir())
    if was_there:
        folder.replace(old)
    try:
        stage.replace(folder)
    except OSError:
        if was_there:
            old.replace(folder)
        raise
    if was_there:
        shutil.rmtree(old)


def _copy_into(stage: Path, adapter: FinishedAdapter) -> None:
    for name in _FILES_OF_PEFT:
        source = adapter.folder / name
        if source.is_file():
            shutil.copyfile(source, stage / name)
    if adapter.provenance is None:  # whatever a foreign card claims, nobody here can vouch for it
        card = _card(adapter, CardKind.ADAPTER)
        (stage / CARD_NAME).write_text(card, encoding="utf-8")


def _merge_into(
    stage: Path, adapter: FinishedAdapter, given: str | None, say: Callable[[str], None]
) -> float:
    say(f"Loading {given or adapter.base_model} in NF4 on the CPU …")
    base = load_base_of(adapter, given, device=torch.device("cpu"))
    say("Merging …")
    merge(base, adapter, _config_of(adapter, given), stage)
    say("Comparing the merged model with base and adapter …")
    n_positions = base.description.max_positions
    prompter = RecordTokenizer(
        base.tokenizer,
        template=template_of(adapter)[0],
        loss_on=LossOn.RESPONSE,
        max_length=n_positions,
    )
    prompts = [
        prompter.prompt(single_question(text), max_tokens=n_positions) for text in _QUESTIONS
    ]
    error = logit_error(attach(base, adapter), stage, prompts)
    card = _card(adapter, CardKind.MERGED, merge_error=error)
    (stage / CARD_NAME).write_text(card, encoding="utf-8")
    if adapter.provenance is not None:
        (stage / PROVENANCE_NAME).write_bytes(adapter.provenance.pretty())
    return error


def _card(
    adapter: FinishedAdapter,
    kind: CardKind,
    *,
    file_name: str = "",
    merge_error: float | None = None,
) -> str:
    if adapter.provenance is not None:
        return model_card(
            adapter.provenance, kind=kind, file_name=file_name, merge_error=merge_error
        )
    return foreign_card(
        adapter.base_model,
        kind=kind,
        weights_sha256=adapter.weights_sha256,
        file_name=file_name,
        merge_error=merge_error,
    )

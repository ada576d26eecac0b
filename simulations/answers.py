"""Lets an adapter answer a file of questions, so that a judge can compare it with others."""

import json
from collections.abc import Callable
from os import SEEK_END
from pathlib import Path
from typing import Final

from edge_agent.answering import Answerer, Sampling, load_base_of, single_question, template_of
from protocol.blocks import Template
from quant.base_model import parse_device
from quant.peft_folder import FinishedAdapter, read_finished
from simulations.errors import OutputError
from simulations.judging import read_answers, read_questions
from simulations.lab.experiment import load_experiment
from simulations.lab.folder import RunFolder

_BEGIN: Final = b'{"question_id": '


def answer_questions(
    adapter: Path,
    questions: Path,
    out: Path,
    *,
    base: str | None,
    device: str | None,
    max_new_tokens: int,
    on_answer: Callable[[int, int], None],
) -> int:
    """Answer every question once, always by the likeliest token, and go on with what is missing.

    Guarantees:
        1. A last line that a kill cut short is left out, and its question answered again.

    Args:
        adapter: A PEFT folder, such as a run's.
        questions: JSON Lines, as Vicuna's.
        out: JSON Lines of `question_id` and `text`; answers that are there stay.
        base: None: the one that the adapter names.
        device: None: a GPU where there is one.
        max_new_tokens: Longest answer.
        on_answer: Told how many of how many are done.

    Returns:
        How many were answered now.

    Raises:
        AdapterError: The folder is no adapter, or of another base.
        BaseModelError: The base cannot be loaded.
        JudgeError: A file cannot be read.
        OutputError: The answers cannot be written.
    """
    asked = read_questions(questions)
    _mend_last_line(out)
    known = read_answers(out) if out.exists() else {}
    missing = [question for question in asked if question.id not in known]
    if not missing:
        return 0
    finished = read_finished(adapter)
    template = template_of_folder(finished, adapter)
    place = None if device is None else parse_device(device)
    answerer = Answerer(load_base_of(finished, base, device=place), finished, template)
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens, seed=0)
    try:
        with out.open("a", encoding="utf-8") as file:
            for number, question in enumerate(missing, start=1):
                found = answerer.answer(single_question(question.text), sampling)
                row = {"question_id": question.id, "text": found.text}  # as _BEGIN has it
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                on_answer(len(known) + number, len(asked))
    except OSError as error:
        msg = f"cannot write {out}: {error.strerror}"
        raise OutputError(msg) from error
    return len(missing)


def template_of_folder(finished: FinishedAdapter, folder: Path) -> Template:
    """The template that an adapter was trained with: its provenance says it, or its run.

    Args:
        finished: The adapter.
        folder: Where it lies; of a run: within the run's folder.

    Raises:
        ExperimentError: The run's experiment cannot be read.
    """
    template, is_known = template_of(finished)
    run = RunFolder(folder.resolve().parent)
    if not is_known and run.is_begun and run.experiment.exists():
        return load_experiment(run.experiment).federation.template
    return template


def _mend_last_line(path: Path) -> None:
    """Drop a last line that is half an answer of ours; end one that only lacks its end."""
    try:
        whole = path.read_bytes() if path.exists() else b""
        last = whole[whole.rfind(b"\n") + 1 :]
        if not last:
            return
        with path.open("r+b") as file:
            if _is_json(last):
                file.seek(0, SEEK_END)
                file.write(b"\n")
            elif last.startswith(_BEGIN[: len(last)]):
                file.truncate(len(whole) - len(last))
    except OSError as error:
        msg = f"cannot mend {path}: {error.strerror}"
        raise OutputError(msg) from error


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True

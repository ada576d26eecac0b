"""`sheepfold-agent identity` and `evaluate`: how good an adapter is, for oneself or a server."""

import signal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from edge_agent.cli_adapter import BaseOption, TokensOption, prepare
from edge_agent.cli_shared import (
    DeviceOption,
    HomeOption,
    JsonOption,
    ThreadsOption,
    say,
    write_json,
)
from edge_agent.config import default_home, load_settings
from edge_agent.home import AgentHome
from edge_agent.plain_text import escaped
from protocol.clock import SystemClock

if TYPE_CHECKING:
    from edge_agent.evaluation import AnswerScores, Scores

_MB: Final = 1_000_000


class Role(StrEnum):
    """For whom an adapter is scored."""

    OWNER = "owner"
    """For whoever types the command: a table."""
    EVALUATOR = "evaluator"
    """For a federation's server, which publishes what passes."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the agent's."""
    for command in (identity, evaluate):
        app.command()(command)


def identity(*, home: HomeOption = None, json_path: JsonOption = None) -> None:
    """Print the identity of the key in a home; the key is made when there is none.

    For an evaluator: its operator founds the federation with `--evaluator IDENTITY`.

    Example: `sheepfold-agent identity --home my-evaluator`
    """
    from protocol.signing import format_fingerprint
    from protocol.wire import b64u_encode

    agent_home = AgentHome(home or default_home())
    agent_home.create()
    own = agent_home.load_or_create_signer().identity
    found = {"identity": b64u_encode(own), "fingerprint": format_fingerprint(own)}
    if json_path is not None:
        write_json(json_path, found)
    if json_path != "-":
        Console().print(found["identity"], highlight=False, soft_wrap=True)
        say(f"Its fingerprint is {found['fingerprint']}")


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A PEFT folder or `newest`; with --role evaluator the server's address.",
        ),
    ],
    *,
    data: Annotated[str, typer.Option(help="Held-out records: JSON, JSONL, CSV, Parquet.")],
    role: Annotated[Role, typer.Option(help="For yourself, or as a federation's evaluator.")] = (
        Role.OWNER
    ),
    until_finished: Annotated[
        bool, typer.Option("--until-finished", help="evaluator: end with the last release.")
    ] = False,
    base: BaseOption = None,
    max_new_tokens: TokensOption = 128,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    home: HomeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Score an adapter on held-out records, by category.

    As a federation's evaluator: fetch each candidate, score it on your records, and sign what was
    found; the server publishes only what passes. Nothing of the records leaves this machine but
    their categories' names, sizes and mean losses.

    Examples:
    `sheepfold-agent evaluate newest --data held-out.jsonl`

    `sheepfold-agent evaluate https://server --role evaluator --data held-out.jsonl --home judge`
    """
    if role is Role.EVALUATOR:
        _judge(target, data, home, base=base, device=device, threads=threads, finite=until_finished)
        return
    from edge_agent.data.reading import read_records
    from edge_agent.data.tokens import tokenize
    from edge_agent.evaluation import held_out_loss, score_answers
    from protocol.blocks import LossOn

    records, _ = read_records(data)
    ready = prepare(target, home, base=base, device=device, threads=threads)
    loaded = ready.answerer.adapted.base
    max_length = loaded.description.max_positions
    told = ready.adapter.provenance
    if told is not None:
        max_length = min(max_length, told.training.max_length)
    examples = tokenize(
        records,
        loaded.tokenizer,
        template=ready.template,
        loss_on=LossOn.RESPONSE if told is None else told.training.loss_on,
        max_length=max_length,
    ).examples
    model = ready.answerer.adapted.model
    say(f"Scoring {len(examples)} records …")
    loss = held_out_loss(model, examples, pad_id=loaded.pad_id)
    answers = score_answers(
        model,
        loaded.tokenizer,
        records,
        template=ready.template,
        max_length=max_length,
        max_new_tokens=min(max_new_tokens, max_length - 1),
    )
    if json_path is not None:
        write_json(json_path, _as_json(loss, answers))
    if json_path != "-":
        Console().print(_table(loss, answers))


def _judge(
    url: str,
    data: str,
    home: Path | None,
    *,
    base: str | None,
    device: str | None,
    threads: int | None,
    finite: bool,
) -> None:
    from edge_agent.data.reading import read_records
    from edge_agent.evaluator import Evaluator, pin_federation
    from edge_agent.transport import Transport
    from edge_agent.worker import load_federation_base

    agent_home = AgentHome(home or default_home())
    agent_home.create()
    settings = load_settings(agent_home.root, {"base": base, "device": device, "threads": threads})
    records, _ = read_records(data)
    wishes: list[int] = []

    def stop(number: int, _: object) -> None:
        wishes.append(number)
        signal.signal(number, signal.default_int_handler)  # the second one does not wait

    lock = agent_home.lock()
    signer = agent_home.load_or_create_signer()
    transport = Transport(
        url,
        clock=SystemClock(),
        signer=signer,
        on_retry=lambda reason, pause_s: say(f"{reason}; again in {pause_s:.0f} s"),
        stopped=lambda: bool(wishes),
    )
    try:
        manifest = pin_federation(agent_home, transport, signer)
        say(f"Evaluator of {manifest.name}; loading {manifest.base.model} in NF4 …")
        evaluator = Evaluator(
            home=agent_home,
            manifest=manifest,
            transport=transport,
            signer=signer,
            base=load_federation_base(manifest, settings),
            records=records,
            say=say,
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        evaluator.run(stopped=lambda: bool(wishes), until_finished=finite)
    finally:
        transport.close()
        lock.release()


def _table(loss: "Scores", answers: "AnswerScores") -> Table:
    table = Table("category", "records", "loss", "exact match", "ROUGE-L")
    exact, rouge = answers.exact_match, answers.rouge_l
    for name, one in loss.by_category.items():
        table.add_row(
            escaped(name),
            str(one.n_examples),
            f"{one.score:.4f}",
            f"{exact.by_category[name].score:.3f}",
            f"{rouge.by_category[name].score:.3f}",
        )
    table.add_row(
        "average over categories",
        str(loss.n_examples),
        f"{loss.average_over_categories:.4f}",
        f"{exact.average_over_categories:.3f}",
        f"{rouge.average_over_categories:.3f}",
    )
    return table


def _as_json(loss: "Scores", answers: "AnswerScores") -> dict[str, object]:
    measures = {"loss": loss, "exact_match": answers.exact_match, "rouge_l": answers.rouge_l}
    return {
        name: {
            "by_category": {
                category: {"score": one.score, "n_records": one.n_examples}
                for category, one in scores.by_category.items()
            },
            "average_over_categories": scores.average_over_categories,
        }
        for name, scores in measures.items()
    }

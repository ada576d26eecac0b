"""`sheepfold-sim answer` and `judge`: answers compared by any OpenAI-compatible endpoint."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from simulations.cli_shared import console, write_json

if TYPE_CHECKING:
    from simulations.judge import Match
    from simulations.judging import Comparison


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the laboratory's."""
    app.command()(answer)
    app.command()(judge)


def answer(
    adapter: Annotated[Path, typer.Argument(help="A PEFT folder, such as a run's `adapter`.")],
    *,
    questions: Annotated[Path, typer.Option(help="The questions: JSON Lines, as Vicuna's.")],
    out: Annotated[Path, typer.Option(help="JSON Lines for `judge`; what is there stays.")],
    base: Annotated[
        str | None, typer.Option(help="A folder or a model of the hub.  [default: the adapter's]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
) -> None:
    """Let an adapter answer questions, for a judge to compare: the likeliest token each time."""
    from simulations.answers import answer_questions

    with _progress() as progress:
        task = progress.add_task("answering", total=None)
        n_new = answer_questions(
            adapter,
            questions,
            out,
            base=base,
            device=device,
            max_new_tokens=max_new_tokens,
            on_answer=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(f"{n_new} answered now: {out}", highlight=False, soft_wrap=True)


def judge(
    answers: Annotated[Path, typer.Argument(help="Your model's answers: JSON Lines.")],
    *,
    against: Annotated[list[Path], typer.Option(help="Another model's answers; again for more.")],
    questions: Annotated[Path, typer.Option(help="The questions: JSON Lines, as Vicuna's.")],
    endpoint: Annotated[str, typer.Option(help="Such as `https://api.openai.com/v1`.")],
    model: Annotated[str, typer.Option(help="The judge, as the endpoint names it.")],
    prompts: Annotated[
        Path | None, typer.Option(help="FastChat's judge prompts, in place of our words.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Keep reviews here, and pay for none twice.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest review.")] = 1024,
    ratings: Annotated[int, typer.Option(min=1, help="Of each pair, in each order.")] = 3,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Requests at once.")] = 4,
    prompt_price: Annotated[float, typer.Option(min=0.0, help="Of a million tokens asked.")] = 0.0,
    completion_price: Annotated[
        float, typer.Option(min=0.0, help="Of a million tokens answered.")
    ] = 0.0,
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="PATH", help="Write JSON here; `-` for stdout.")
    ] = None,
) -> None:
    """Have a judge compare answers pairwise, as the paper's Table 3: both orders, three ratings.

    The endpoint's key is taken from SHEEPFOLD_JUDGE_KEY. Questions and answers go to the endpoint.
    """
    from simulations.judge import Judge, Usage, play, reviews_in
    from simulations.judging import OWN_PROMPTS, compare, read_answers, read_prompts, read_questions

    asked = read_questions(questions)
    own = read_answers(answers)
    rivals = {name: read_answers(path) for name, path in _named(against).items()}
    told = OWN_PROMPTS if prompts is None else read_prompts(prompts)
    who = Judge(endpoint=endpoint, model=model, max_tokens=max_tokens, n_parallel=parallel)
    matches: dict[str, tuple[Match, Comparison]] = {}
    usage = Usage()
    with reviews_in(cache) as known, _progress() as progress:
        for name, rival in rivals.items():
            task = progress.add_task(name, total=None)
            match = play(
                who,
                asked,
                own,
                rival,
                prompts=told,
                cache=known,
                n_ratings=ratings,
                on_done=lambda done, total, task=task: progress.update(  # type: ignore[misc]
                    task, completed=done, total=total
                ),
            )
            matches[name] = (match, compare(match.ratings))
            usage = usage.plus(match.usage)
    cost = usage.cost(prompt_price=prompt_price, completion_price=completion_price)
    shown = console if json_path == "-" else Console()
    shown.print(_table(answers.stem, matches))
    shown.print(
        f"{usage.n_requests} requests, {usage.n_prompt_tokens:,} tokens asked, "
        f"{usage.n_completion_tokens:,} answered"
        + (f", cost {cost:.2f}" if prompt_price or completion_price else ""),
        highlight=False,
    )
    if json_path is not None:
        found = {name: _as_json(*pair) for name, pair in matches.items()}
        write_json({"judge": model, "own": answers.stem, "against": found, "cost": cost}, json_path)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _named(paths: Sequence[Path]) -> dict[str, Path]:
    stems = Counter(path.stem for path in paths)
    named: dict[str, Path] = {}
    for path in paths:
        folder = f"{path.parent.resolve().name}/" if stems[path.stem] > 1 else ""
        name = folder + path.stem
        if name in named:
            msg = f"--against: {named[name]} and {path} would both be named {name}; rename one"
            raise typer.BadParameter(msg)
        named[name] = path
    return named


def _table(own: str, matches: "dict[str, tuple[Match, Comparison]]") -> Table:
    table = Table(
        "against",
        "its score",
        f"score of {own}",
        "relative score",
        "won / tied / lost",
        "place",
        "unreadable",
    )
    for name, (match, found) in matches.items():
        std_error = f"{found.std_error:.3f}" if found.n_questions > 1 else "–"
        table.add_row(
            name,
            f"{found.rival:.1f}",
            f"{found.own:.1f}",
            f"{found.relative:.3f} ± {std_error}",
            f"{found.n_wins} / {found.n_ties} / {found.n_losses}",
            f"{found.position_bias:+.2f}",
            str(match.n_unreadable),
        )
    table.caption = (
        "Sums over the questions of mean scores; ± one standard error over questions; place: by "
        "how much the answer that stands first is favoured; unreadable: ratings left out."
    )
    for name, (match, _) in matches.items():
        if match.left_out:
            table.caption += (
                f" Against {name}, these questions have no rating in one order and are left out: "
                f"{', '.join(match.left_out)}."
            )
    return table


def _as_json(match: "Match", found: "Comparison") -> dict[str, Any]:
    return {
        "own": found.own,
        "rival": found.rival,
        "relative": found.relative,
        "std_error": found.std_error if found.n_questions > 1 else None,
        "n_questions": found.n_questions,
        "n_ratings": found.n_ratings,
        "n_wins": found.n_wins,
        "n_ties": found.n_ties,
        "n_losses": found.n_losses,
        "position_bias": found.position_bias,
        "n_from_cache": match.n_from_cache,
        "n_unreadable": match.n_unreadable,
        "left_out": list(match.left_out),
        "ratings": [
            {
                "question": rating.question,
                "swapped": rating.swapped,
                "own": rating.own,
                "rival": rating.rival,
            }
            for rating in match.ratings
        ],
    }

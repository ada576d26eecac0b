"""What a running agent shows: a progress bar on a terminal, plain lines elsewhere."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from edge_agent.agent import AgentEventReport
from edge_agent.plain_text import plain


class Display:
    """Shows the events of an agent.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        """Begin with no bar."""
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._last = ""

    def __enter__(self) -> Self:
        """Start the live view."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the live view."""
        self._progress.stop()

    def show(self, event: AgentEventReport) -> None:
        """Show one event; a repeated one is shown once."""
        if event.progress is not None:
            step, total, loss = event.progress.step, event.progress.n_steps, event.progress.loss
            if self._task is None:
                self._task = self._progress.add_task("training", total=total, loss=loss)
            self._progress.update(self._task, completed=step, total=total, loss=loss)
            return
        if self._task is not None and event.kind != "progress":
            self._progress.remove_task(self._task)
            self._task = None
        line = plain(f"{event.kind}: {event.text}")
        if line != self._last:
            self._last = line
            self._progress.console.print(line, highlight=False, markup=False)

"""Runs the jobs of a benchmark in processes of one thread each, and keeps what they found."""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from quant.base_model import set_threads
from quant.quiet import quiet_libraries

Result = Mapping[str, Any]


class Named(Protocol):
    """A job."""

    @property
    def name(self) -> str:
        """A file's name, different for each job."""
        ...


JobT = TypeVar("JobT", bound=Named)


class Runner(Generic[JobT]):
    """Runs jobs in some processes of one thread each, and keeps what they found.

    Args:
        work: What a process does with a job; the result holds `cpu_s`.
        kept: Where results are kept; what is there already is not run again.
        headline: A result in a few words.
        n_workers: Number of processes.
    """

    def __init__(
        self,
        work: Callable[[JobT], Result],
        kept: Path,
        *,
        headline: Callable[[Result], str],
        n_workers: int = 2,
    ) -> None:
        """Start the processes."""
        self._work = work
        self._kept = kept
        self._headline = headline
        kept.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._pool = ProcessPoolExecutor(n_workers, mp_context=context, initializer=prepare_process)

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes; what has not begun never will."""
        self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[JobT], what: str) -> list[Result]:
        """Run what has not been run; results in the order of the jobs."""
        missing = [job for job in jobs if not self._path(job).exists()]
        if len(missing) < len(jobs):
            show(f"{what}: {len(jobs) - len(missing)} of {len(jobs)} kept from an earlier run")
        began = time.perf_counter()
        running = {self._pool.submit(self._work, job): job for job in missing}
        for done, future in enumerate(as_completed(running), start=1):
            job, found = running[future], future.result()
            path = self._path(job)
            half = path.with_suffix(".part")
            half.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
            half.replace(path)
            spent = time.perf_counter() - began
            show(
                f"{what}: {done} of {len(missing)}, {job.name}, {self._headline(found)}, "
                f"{found['cpu_s']:.0f} s of a core; {spent:.0f} s so far"
            )
        return [json.loads(self._path(job).read_text(encoding="utf-8")) for job in jobs]

    def _path(self, job: JobT) -> Path:
        return self._kept / f"{job.name}.json"


def show(text: str) -> None:
    """Say how it goes, on standard error."""
    print(text, file=sys.stderr, flush=True)


def prepare_process() -> None:
    """What a worker process does first: it has one core."""
    quiet_libraries()
    set_threads(1)

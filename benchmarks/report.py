"""The common form of every benchmark's result: rows of ratios, as JSON and as a table.

A ratio is ours ÷ peer, measured in one run on one machine. Its `spread` is that of the ratio over
the runs, which are paired: each run measures both sides, one after the other.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from rich.console import Console
from rich.table import Table

from simulations.machine import processor

Better = Literal["lower", "higher"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
        what: What is compared, in words.
        ours: Our figure: the median over the runs.
        peer: The peer's, or the machine's limit; None for a figure without a peer.
        peer_name: Who that is.
        unit: Of both.
        ratio: Median of ours ÷ peer; `ours` itself where there is no peer.
        better: Whether a lower or a higher ratio is better.
        target: What `ratio` should reach; None: no target was set.
        met: Whether it does; None without a target.
        n_runs: How often it was measured.
        spread: Smallest and largest ratio over the runs.
    """

    what: str
    ours: float
    peer: float | None
    peer_name: str
    unit: str
    ratio: float
    better: Better
    target: float | None
    met: bool | None
    n_runs: int
    spread: tuple[float, float]

    @classmethod
    def of(
        cls,
        what: str,
        ours: Sequence[float],
        peer: Sequence[float] | None,
        *,
        peer_name: str,
        unit: str,
        better: Better = "lower",
        target: float | None = None,
    ) -> Self:
        """Compare paired runs.

        Args:
            what: What is compared.
            ours: One figure for each run.
            peer: The peer's, in the same order; None: `ours` is compared with the target itself.
            peer_name: Who that is.
            unit: Of both.
            better: Which way is good.
            target: What the ratio should reach.
        """
        ratios = (
            [float(a) for a in ours]
            if peer is None
            else [a / b for a, b in zip(ours, peer, strict=True)]
        )
        ratio = float(np.median(ratios))
        met = None
        if target is not None:
            met = ratio <= target if better == "lower" else ratio >= target
        return cls(
            what=what,
            ours=float(np.median(ours)),
            peer=None if peer is None else float(np.median(peer)),
            peer_name=peer_name,
            unit=unit,
            ratio=ratio,
            better=better,
            target=target,
            met=met,
            n_runs=len(ratios),
            spread=(min(ratios), max(ratios)),
        )


def machine() -> dict[str, Any]:
    """What this runs on."""
    described: dict[str, Any] = {
        "processor": processor(),
        "n_cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name)
            for name in ("torch", "transformers", "peft", "bitsandbytes", "numpy")
        },
    }
    gpu = _gpu()
    if gpu:
        described["gpu"] = gpu
    return described


def _gpu() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--quick", action="store_true", help="under three minutes on two cores")
    parser.add_argument("--json", metavar="FILE", help="write the result here; `-` for stdout")


def write_report(
    rows: Sequence[Row], *, module: str, json_target: str | None, details: object = None
) -> None:
    """Print the rows as a table, and write them as JSON where that was asked for.

    Args:
        rows: The comparisons.
        module: Name of the benchmark, as in `python -m benchmarks.NAME`.
        json_target: A path, `-` for standard output, or None.
        details: Whatever else the benchmark found; added under `details`.
    """
    Console(stderr=json_target == "-", width=140).print(as_table(rows))
    if json_target is None:
        return
    report: dict[str, Any] = {
        "machine": machine(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "rows": [asdict(row) for row in rows],
    }
    if details is not None:
        report["details"] = details
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if json_target == "-":
        sys.stdout.write(text)
    else:
        Path(json_target).write_text(text, encoding="utf-8")


def as_table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    table = Table("what", "ours", "peer", "named", "ratio", "spread", "target", "met", "runs")
    for row in rows:
        sign = "≤" if row.better == "lower" else "≥"
        table.add_row(
            row.what,
            f"{row.ours:.4g} {row.unit}",
            "" if row.peer is None else f"{row.peer:.4g} {row.unit}",
            row.peer_name,
            f"{row.ratio:.3g}",
            f"{row.spread[0]:.3g}–{row.spread[1]:.3g}",
            "" if row.target is None else f"{sign} {row.target:g}",
            "" if row.met is None else ("yes" if row.met else "[bold red]no[/]"),
            str(row.n_runs),
        )
    return table


def as_markdown(rows: Sequence[Row]) -> str:
    """The rows as a table for docs/benchmarks.md."""
    lines = [
        "| what | ours | peer | ratio (smallest to largest) | target | met | runs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        peer = row.peer_name if row.peer is None else f"{row.peer:.3g} {row.unit}: {row.peer_name}"
        sign = "≤" if row.better == "lower" else "≥"
        cells = (
            row.what,
            f"{row.ours:.3g} {row.unit}".strip(),
            peer,
            f"**{row.ratio:.3g}** ({row.spread[0]:.3g} to {row.spread[1]:.3g})",
            "" if row.target is None else f"{sign} {row.target:g}",
            {None: "", True: "yes", False: "**no**"}[row.met],
            str(row.n_runs),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def in_own_process(module: str, job: object) -> Any:
    """Run one side of a comparison in a process of its own.

    Args:
        module: Run as `python -m module --job JSON`; its last line of output is JSON.
        job: What to do.

    Raises:
        RuntimeError: The side failed; the message ends with what it said.
    """
    command = [sys.executable, "-m", module, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-5:])
        msg = f"{module} failed on {job!r}:\n{said}"
        raise RuntimeError(msg)
    return json.loads(done.stdout.strip().splitlines()[-1])

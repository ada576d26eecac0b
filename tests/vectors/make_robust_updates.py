"""Writes `robust_updates.json`: real updates, honest and hostile, for tests of the filter.

    python tests/vectors/make_robust_updates.py --cache FOLDER

The updates are those that `benchmarks.robustness` records under its first seed, of 90,112 values
each. A filter that knows only lengths and angles needs no more of n updates than n coordinates in
the space that they span, and these have the same inner products. Attackers come first. Run it only
if other updates are wanted: the tests say themselves what has to become of each.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.dolly_base import default_cache
from benchmarks.robustness_jobs import (
    CELLS_OF_5,
    DIRICHLET,
    OPEN,
    Arrangement,
    Settings,
    Threat,
    as_units,
    recorded,
    sent_by_attackers,
)
from benchmarks.robustness_recording import Federation, Population, record
from quant.base_model import set_threads

TARGET = Path(__file__).with_name("robust_updates.json")
SEED = 1
LATE_SEED = 2
CASES = (
    (OPEN, Threat.SIGN_FLIP, 0.1),
    *((OPEN, threat, 0.2) for threat in (Threat.ALIE, Threat.SCALING, Threat.CLONES)),
    *((OPEN, threat, 0.2) for threat in (Threat.INNER_PRODUCT_SMALL, Threat.IDLE)),
    *((arrangement, Threat.NONE, 0.0) for arrangement in (OPEN, DIRICHLET, CELLS_OF_5)),
    (CELLS_OF_5, Threat.SIGN_FLIP_SCALED, 0.05),
)


def coordinates(rows: np.ndarray) -> np.ndarray:
    """Of n rows [n, n]: the same inner products, in the space that the rows span."""
    wide = rows.astype(np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.T)
    return vectors * np.sqrt(np.maximum(values, 0.0))


def make(arrangement: Arrangement, threat: Threat, share: float, cache: Path) -> dict[str, object]:
    """One case."""
    settings = Settings()
    federation = Federation(settings.population(arrangement.division, SEED))
    recording = recorded(settings, arrangement.division, SEED, cache)
    population = federation.population
    n_agents = arrangement.n_agents
    attackers = list(population.attackers(n_agents, arrangement.n_attackers(share)))
    rows = recording.updates[:n_agents].copy()
    if attackers:
        rows[attackers] = sent_by_attackers(
            threat,
            rows[attackers],
            np.delete(rows, attackers, axis=0),
            arrangement=arrangement,
            layout=federation.layout,
            number=population.n_warm_rounds,
            last_change=recording.last_change,
            seed=SEED,
        )
    cells = arrangement.cells(SEED)
    hostile = np.isin(cells, attackers).any(axis=1)
    order = np.argsort(~hostile, kind="stable")
    units = as_units(rows, cells)
    means = np.stack([units.load(int(index)) for index in order])
    rare = [
        place for place, index in enumerate(order) if np.isin(cells[index], population.rare).any()
    ]
    name = f"{arrangement.key}: {threat.value}"
    return described(name, arrangement, means, n_hostile=int(hostile.sum()), rare=rare)


def make_late() -> dict[str, object]:
    """The fifth of eight rounds without an attacker, when kinds begin to pull apart."""
    population = Population(
        division=OPEN.division,
        n_agents=OPEN.n_agents,
        seed=LATE_SEED,
        recipe=replace(Settings().rounds, n_rounds=8),
        n_warm_rounds=4,
    )
    updates = record(Federation(population), (), ()).updates
    return described("open: late", OPEN, updates, n_hostile=0, rare=list(population.rare))


def described(
    name: str, arrangement: Arrangement, means: np.ndarray, *, n_hostile: int, rare: list[int]
) -> dict[str, object]:
    """A case as JSON."""
    return {
        "name": name,
        "mode": arrangement.mode.value,
        "n_hostile": n_hostile,
        "rare": rare,
        "units": [[float(f"{value:.6g}") for value in row] for row in coordinates(means)],
    }


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=default_cache())
    cache = parser.parse_args().cache
    set_threads(1)
    cases = [*(make(*case, cache) for case in CASES), make_late()]
    text = json.dumps({"made_by": Path(__file__).name, "seed": SEED, "cases": cases})
    TARGET.write_text(text.replace("]], ", "]],\n").replace("], [", "],\n[") + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""One aggregation of recorded updates under attack, and federations in rounds."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from aggregator_server.aggregation.fedavg import apply_mean
from aggregator_server.aggregation.robust.outcome import FilterOutcome, Rule
from benchmarks.robustness_jobs import (
    Arrangement,
    Case,
    Settings,
    Threat,
    aggregated,
    as_units,
    held_out,
    held_out_examples,
    sent_by_attackers,
)
from benchmarks.robustness_recording import Federation, Recording
from benchmarks.tiny_federation import (
    MAX_NEW_TOKENS,
    exact_match_by_category,
    loss_by_category,
)
from edge_agent.evaluation import score_answers
from privacy.updates import Float32Array
from quant.tiny.instructions import Category
from simulations.attacks.catalogue import RECORD_ATTACKS
from simulations.attacks.data import Backdoor, backdoor_success
from simulations.attacks.names import RecordAttack

_N_PROBES: Final = 1
"""Held-out records of each category that carry the trigger."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What became of the units of one aggregation.

    Attributes:
        n_contaminated: Units with an attacker.
        n_caught: Of these, removed.
        n_honest: Units without one.
        n_false: Of these, removed.
        n_rare: Units without an attacker that hold an agent with data of its own.
        n_rare_removed: Of these, removed.
    """

    n_units: int
    n_contaminated: int
    n_caught: int
    n_honest: int
    n_false: int
    n_rare: int
    n_rare_removed: int

    @classmethod
    def of(
        cls,
        outcome: FilterOutcome,
        cells: np.ndarray,
        attackers: Sequence[int],
        rare: Sequence[int],
    ) -> "Judged":
        """Count."""
        bad = np.isin(cells, attackers).any(axis=1)
        unlike = np.isin(cells, rare).any(axis=1) & ~bad
        gone = ~outcome.kept
        return cls(
            n_units=len(cells),
            n_contaminated=int(bad.sum()),
            n_caught=int((bad & gone).sum()),
            n_honest=int((~bad).sum()),
            n_false=int((~bad & gone).sum()),
            n_rare=int(unlike.sum()),
            n_rare_removed=int((unlike & gone).sum()),
        )


class Scorer:
    """Losses of releases on held-out records; each release is measured once.

    Args:
        federation: Whose model.
        settings: Of the run.
    """

    def __init__(self, federation: Federation, settings: Settings) -> None:
        """Nothing is measured yet."""
        population = federation.population
        self._federation = federation
        self._examples = held_out_examples(settings.n_held_out, population.seed, population.recipe)
        self._found: dict[str, dict[str, float]] = {}

    def loss(self, vector: Float32Array) -> dict[str, float]:
        """By category."""
        key = hashlib.sha256(vector.tobytes()).hexdigest()
        if key not in self._found:
            adapted = self._federation.adapted
            adapted.load(self._federation.release(vector))
            self._found[key] = loss_by_category(adapted, self._examples)
        return self._found[key]


def probe_backdoor(federation: Federation, vector: Float32Array, n_per_category: int) -> float:
    """The share of triggered instructions that get the attacker's response."""
    backdoor = RECORD_ATTACKS[RecordAttack.BACKDOOR]
    if not isinstance(backdoor, Backdoor):
        msg = f"{RecordAttack.BACKDOOR} is a {type(backdoor).__name__} in the catalogue"
        raise TypeError(msg)
    adapted, block = federation.adapted, federation.population.recipe.training
    adapted.load(federation.release(vector))
    records = held_out(n_per_category, federation.population.seed)
    texts = [
        [
            answer.text
            for answer in score_answers(
                adapted.model,
                adapted.base.tokenizer,
                asked,
                template=block.template,
                max_length=block.max_length,
                max_new_tokens=MAX_NEW_TOKENS,
            ).answers
        ]
        for asked in (backdoor.probes(records), records[:1])
    ]
    return backdoor_success(
        backdoor, triggered_answers=texts[0], clean_answers=texts[1]
    ).success_frac


def replay(
    federation: Federation,
    recording: Recording,
    arrangement: Arrangement,
    threat: Threat,
    scorer: Scorer,
) -> list[dict[str, Any]]:
    """One aggregation by each rule, at each share of attackers.

    Args:
        federation: Of the recording.
        recording: Updates from its release.
        arrangement: How many of its agents, and in which units.
        threat: What attackers do.
        scorer: Of the federation.

    Returns:
        One result for each share and rule, as JSON; without an attacker, also one without a rule,
        of the release as it was before.
    """
    population, layout = federation.population, federation.layout
    seed, number = population.seed, population.n_warm_rounds
    cells = arrangement.cells(seed)
    made = []
    for share in (0.0,) if threat is Threat.NONE else arrangement.shares:
        attackers = population.attackers(arrangement.n_agents, arrangement.n_attackers(share))
        rows = recording.updates[: arrangement.n_agents].copy()
        if attackers:
            own = rows[list(attackers)]
            if threat.poison is not None:
                own = recording.poisoned_by(threat.poison, attackers)
            rows[list(attackers)] = sent_by_attackers(
                threat,
                own,
                np.delete(rows, attackers, axis=0),
                arrangement=arrangement,
                layout=layout,
                number=number,
                last_change=recording.last_change,
                seed=seed,
            )
        units = as_units(rows, cells)
        for rule in arrangement.rules(share):
            found = aggregated(rule, units, arrangement, layout, seed)
            vector = apply_mean(recording.release, found.mean)
            judged = Judged.of(found.outcome, cells, attackers, population.rare)
            success = None
            if threat.poison is RecordAttack.BACKDOOR and rule in {Rule.PIPELINE, Rule.MEAN}:
                success = probe_backdoor(federation, vector, _N_PROBES)
            case = {"threat": threat.name, "share": share, "n_attackers": len(attackers)}
            made.append(
                _result(arrangement, seed, rule, scorer.loss(vector), success) | case | vars(judged)
            )
    if threat is Threat.NONE:
        before = _result(arrangement, seed, None, scorer.loss(recording.release), None)
        made.append(made[0] | before)
    return made


def _result(
    arrangement: Arrangement,
    seed: int,
    rule: Rule | None,
    loss: dict[str, float],
    success: float | None,
) -> dict[str, Any]:
    return {
        "arrangement": arrangement.key,
        "seed": seed,
        "rule": None if rule is None else rule.value,
        "loss": loss,
        "backdoor": success,
    }


class Rounds:
    """Federations from release 0, one rule in every round.

    Args:
        federation: Who; all of them take part in every round.
        settings: Of the run.
    """

    def __init__(self, federation: Federation, settings: Settings) -> None:
        """Nothing is trained yet."""
        self._federation = federation
        self._settings = settings
        # Every federation starts from the same release: its first updates are trained once.
        self._first: dict[tuple[int, RecordAttack | None], Float32Array] = {}

    def run(self, case: Case) -> dict[str, Any]:
        """Run one.

        Args:
            case: What the attackers do in every round, and how the server makes the mean.

        Returns:
            Scores after the last round, and what the rule removed in each.
        """
        began = time.process_time()
        federation, arrangement = self._federation, case.arrangement
        population, layout = federation.population, federation.layout
        seed, n_agents = population.seed, arrangement.n_agents
        share = 0.0 if case.threat is Threat.NONE else self._settings.share_in_rounds
        attackers = population.attackers(n_agents, arrangement.n_attackers(share))
        cells = arrangement.cells(seed)
        vector, last_change = federation.first_vector, None
        judged = []
        for number in range(population.recipe.n_rounds):
            rows = self._sent(case, attackers, vector, number, last_change)
            found = aggregated(case.rule, as_units(rows, cells), arrangement, layout, seed + number)
            judged.append(vars(Judged.of(found.outcome, cells, attackers, population.rare)))
            after = apply_mean(vector, found.mean)
            vector, last_change = after, after - vector
        return self._measured(vector, case) | {
            "arrangement": arrangement.key,
            "seed": seed,
            "threat": case.threat.name,
            "rule": case.rule.value,
            "n_attackers": len(attackers),
            "rounds": judged,
            "cpu_s": round(time.process_time() - began, 1),
        }

    def _sent(
        self,
        case: Case,
        attackers: Sequence[int],
        vector: Float32Array,
        number: int,
        last_change: Float32Array | None,
    ) -> Float32Array:
        """What all agents send in a round, [n_agents, n_values]."""
        n_agents = case.arrangement.n_agents
        honest = [agent for agent in range(n_agents) if agent not in attackers]
        rows = np.empty((n_agents, self._federation.layout.n_values), np.float32)
        rows[honest] = self._trained(vector, honest, number, None)
        if attackers:
            rows[list(attackers)] = sent_by_attackers(
                case.threat,
                self._trained(vector, attackers, number, case.threat.poison),
                rows[honest],
                arrangement=case.arrangement,
                layout=self._federation.layout,
                number=number,
                last_change=last_change,
                seed=self._federation.population.seed + number,
            )
        return rows

    def _trained(
        self,
        vector: Float32Array,
        agents: Sequence[int],
        number: int,
        poison: RecordAttack | None,
    ) -> Float32Array:
        if number > 0:
            return self._federation.updates(vector, agents, number=number, poison=poison)
        for agent in agents:
            if (agent, poison) not in self._first:
                (row,) = self._federation.updates(vector, [agent], number=0, poison=poison)
                self._first[agent, poison] = row
        return np.stack([self._first[agent, poison] for agent in agents])

    def _measured(self, vector: Float32Array, case: Case) -> dict[str, Any]:
        federation, n_answered = self._federation, case.n_answered
        seed, recipe = federation.population.seed, federation.population.recipe
        adapted = federation.adapted
        adapted.load(federation.release(vector))
        backdoored = case.threat.poison is RecordAttack.BACKDOOR
        return {
            "n_answers": n_answered * len(Category),
            "loss": loss_by_category(adapted, held_out_examples(n_answered, seed, recipe)),
            "exact_match": exact_match_by_category(
                adapted, held_out(n_answered, seed), recipe, max_new_tokens=MAX_NEW_TOKENS
            ),
            "backdoor": probe_backdoor(federation, vector, _N_PROBES) if backdoored else None,
        }
